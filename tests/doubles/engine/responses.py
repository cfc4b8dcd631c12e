"""The Responses interface: every event has a name and a sequence number."""

from tests.doubles.engine.asks import DONE, Ask, Json, Refused, ask_of, error, event, new_id
from tests.doubles.engine.shapes import Shape


class Responses(Shape):
    @classmethod
    def read(cls, body: Json) -> Ask:
        asked = body.get("input")
        if not asked:
            raise Refused(400, "input: Field required", "input")
        last = asked[-1] if isinstance(asked, list) else asked
        return ask_of(body, [last], asked, "max_output_tokens")

    def make_id(self) -> str:
        self.message_id = new_id("msg_")
        self.sequence = 0
        return new_id("resp_")

    def opening(self) -> list[bytes]:
        begun = self._response("in_progress", [], None)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event(
                "response.output_item.added", output_index=0, item=self._message("in_progress", [])
            ),
            self._event("response.content_part.added", **self._place(), part=part),
        ]

    def token(self, part: int, k: int) -> bytes:
        return self._numbered(super().token(part, k))

    def delta(self, part: int, k: int | str, reason: str | None = None) -> bytes:  # noqa: ARG002
        name, sequence = "response.output_text.delta", "\ue001"
        body = {"type": name, "sequence_number": sequence, **self._place()}
        made = event(body | {"delta": f"{self.stems[part]}{k} ", "logprobs": []}, name)
        return made.replace(f'"{sequence}"'.encode(), b"\1")

    def closing(self, tokens: int, reason: str) -> list[bytes]:
        last = self._numbered(self.delta(0, tokens - 1))
        text = self.text(0, tokens)
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        message = self._message("completed", [part])
        whole = self.whole(tokens, reason)
        return [
            last,
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(
                "response.completed" if reason == "stop" else "response.incomplete", response=whole
            ),
        ]

    def whole(self, tokens: int, reason: str) -> Json:
        part = {"type": "output_text", "text": self.text(0, tokens), "annotations": []}
        status = "completed" if reason == "stop" else "incomplete"
        usage = {
            "input_tokens": self.ask.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.ask.prompt_tokens + tokens,
        }
        return self._response(status, [self._message(status, [part])], usage)

    def failing(self, status: int, message: str) -> list[bytes]:
        return [event(error(status, message), "error"), DONE]

    def _numbered(self, delta: bytes) -> bytes:
        made = delta.replace(b"\1", b"%d" % self.sequence)
        self.sequence += 1
        return made

    def _event(self, name: str, **more: object) -> bytes:
        made = event({"type": name, "sequence_number": self.sequence, **more}, name)
        self.sequence += 1
        return made

    def _place(self) -> Json:
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def _message(self, status: str, content: list[Json]) -> Json:
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _response(self, status: str, output: list[Json], usage: Json | None) -> Json:
        short = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "error": None,
            "instructions": self.ask.body.get("instructions"),
            "metadata": self.ask.body.get("metadata"),
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "max_output_tokens": self.ask.max_tokens,
            "usage": usage,
        }
