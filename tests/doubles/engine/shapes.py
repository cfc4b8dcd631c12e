"""What vLLM's text answers look like, streamed and whole."""

import time

from tests.doubles.engine.asks import DONE, Ask, Json, Refused, ask_of, error, event, new_id
from tests.doubles.engine.tokens import chat_ids, prompt_ids, text_ids


class Shape:
    """How one answer is worded, streamed or whole."""

    def __init__(self, ask: Ask, model: str, event_bytes: int) -> None:
        self.ask = ask
        self.model = model
        self.created = int(time.time())
        self.id = self.make_id()
        self.stems = [ask.stem(part) for part in range(ask.parts)]
        self._templates = [self._template(part, event_bytes) for part in range(ask.parts)]

    @classmethod
    def read(cls, body: Json) -> Ask:
        raise NotImplementedError

    @classmethod
    def ids(cls, body: Json) -> list[list[int]] | None:  # noqa: ARG003
        """The tokens of every prompt; None where no KV cache is kept."""
        return None

    def make_id(self) -> str:
        raise NotImplementedError

    def text(self, part: int, tokens: int) -> str:
        return "".join(f"{self.stems[part]}{k} " for k in range(tokens))

    def token(self, part: int, k: int) -> bytes:
        if self.ask.token_ids:
            return self.delta(part, k)
        return self._templates[part].replace(b"\0", b"%d" % k)

    def opening(self) -> list[bytes]:
        return []

    def delta(self, part: int, k: int | str, reason: str | None = None) -> bytes:
        """The event of token k."""
        raise NotImplementedError

    def closing(self, tokens: int, reason: str) -> list[bytes]:
        """The events of the last token and of the end."""
        raise NotImplementedError

    def whole(self, tokens: int, reason: str) -> Json:
        raise NotImplementedError

    def failing(self, status: int, message: str) -> list[bytes]:
        """The events that end a stream whose engine died."""
        return [event(error(status, message)), DONE]

    def usage(self, tokens: int) -> Json:
        made, cached = tokens * self.ask.parts, self.ask.cached_tokens
        return {
            "prompt_tokens": self.ask.prompt_tokens,
            "total_tokens": self.ask.prompt_tokens + made,
            "completion_tokens": made,
            "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        }

    def _template(self, part: int, event_bytes: int) -> bytes:
        """A token's event with a NUL where its number goes: encoding each one would be too slow."""
        number = "\ue000"
        made = self.delta(part, number)
        padding = event_bytes - len(made) - len(',"padding":""')
        if padding > 0:
            made = b'%b,"padding":"%b"}\n\n' % (made.removesuffix(b"}\n\n"), b"x" * padding)
        return made.replace(f'"{number}"'.encode(), b"\0").replace(number.encode(), b"\0")


class Chat(Shape):
    @classmethod
    def read(cls, body: Json) -> Ask:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages: Field required", "messages")
        return ask_of(body, messages[-1:], messages, "max_completion_tokens", "max_tokens")

    @classmethod
    def ids(cls, body: Json) -> list[list[int]]:
        return [chat_ids(body, body["messages"])]

    def make_id(self) -> str:
        return new_id("chatcmpl-")

    def opening(self) -> list[bytes]:
        first = {"role": "assistant", "content": ""}
        more = self._prompt_ids()
        return [self._chunk([_choice(i, "delta", first)], **more) for i in range(self.ask.parts)]

    def delta(self, part: int, k: int | str, reason: str | None = None) -> bytes:
        text = f"{self.stems[part]}{k} "
        choice = _choice(part, "delta", {"content": text}, reason)
        if self.ask.token_ids:
            choice["token_ids"] = text_ids(text)
        return self._chunk([choice])

    def closing(self, tokens: int, reason: str) -> list[bytes]:
        events = [self.delta(i, tokens - 1, reason) for i in range(self.ask.parts)]
        if self.ask.include_usage:
            events.append(self._chunk([], usage=self.usage(tokens)))
        return [*events, DONE]

    def whole(self, tokens: int, reason: str) -> Json:
        choices = []
        for i in range(self.ask.parts):
            message = {"role": "assistant", "content": self.text(i, tokens), "refusal": None}
            choices.append(_choice(i, "message", message, reason) | {"stop_reason": None})
            if self.ask.token_ids:
                choices[i]["token_ids"] = text_ids(self.text(i, tokens))
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(tokens),
            "kv_transfer_params": None,
            **self._prompt_ids(),
        }

    def _prompt_ids(self) -> Json:
        return {"prompt_token_ids": self.ids(self.ask.body)[0]} if self.ask.token_ids else {}

    def _chunk(self, choices: list[Json], **more: object) -> bytes:
        return event(
            {
                "id": self.id,
                "object": "chat.completion.chunk",
                "created": self.created,
                "model": self.model,
                "choices": choices,
                **more,
            }
        )


class Completion(Shape):
    @classmethod
    def read(cls, body: Json) -> Ask:
        prompt = body.get("prompt")
        if prompt is None or prompt == []:
            raise Refused(400, "Either prompt or prompt_embeds must be provided", "prompt")
        many = isinstance(prompt, list) and not isinstance(prompt[0], int)
        ask = ask_of(body, prompt if many else [prompt], prompt, "max_tokens")
        if isinstance(prompt, list) and not isinstance(prompt[0], str):  # token ids
            ask.prompt_tokens = sum(map(len, prompt)) if many else len(prompt)
        return ask

    @classmethod
    def ids(cls, body: Json) -> list[list[int]]:
        return prompt_ids(body["prompt"])

    def make_id(self) -> str:
        return new_id("cmpl-")

    def delta(self, part: int, k: int | str, reason: str | None = None) -> bytes:
        text = f"{self.stems[part]}{k} "
        choice = _choice(part, "text", text, reason)
        if self.ask.token_ids:
            if k == 0:
                choice |= self._prompt_ids(part)
            choice["token_ids"] = text_ids(text)
        return event(self._body([choice | {"stop_reason": None}]))

    def closing(self, tokens: int, reason: str) -> list[bytes]:
        events = [self.delta(i, tokens - 1, reason) for i in range(self.ask.parts)]
        if self.ask.include_usage:
            events.append(event(self._body([]) | {"usage": self.usage(tokens)}))
        return [*events, DONE]

    def whole(self, tokens: int, reason: str) -> Json:
        choices = [
            _choice(i, "text", self.text(i, tokens), reason) | {"stop_reason": None}
            for i in range(self.ask.parts)
        ]
        if self.ask.token_ids:
            for i, choice in enumerate(choices):
                choice |= {"token_ids": text_ids(self.text(i, tokens)), **self._prompt_ids(i)}
        return self._body(choices) | {"usage": self.usage(tokens)}

    def _prompt_ids(self, part: int) -> Json:
        return {"prompt_token_ids": self.ids(self.ask.body)[part // self.ask.n]}

    def _body(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class Messages(Shape):
    """Anthropic's interface, as vLLM translates it."""

    @classmethod
    def read(cls, body: Json) -> Ask:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages: Field required", "messages")
        if "max_tokens" not in body:
            raise Refused(400, "max_tokens: Field required", "max_tokens")
        return ask_of(body, messages[-1:], [body.get("system"), *messages], "max_tokens")

    @classmethod
    def ids(cls, body: Json) -> list[list[int]]:
        first = {"role": "system", "content": body.get("system")}
        return [chat_ids({}, [*([first] if body.get("system") else []), *body["messages"]])]

    def make_id(self) -> str:
        return new_id("chatcmpl-")  # vLLM hands its chat id on

    def opening(self) -> list[bytes]:
        block = {"type": "text", "text": ""}
        return [
            self._event(
                "message_start", message=self._message([], None, self._usage(0, begin=True))
            ),
            self._event("content_block_start", index=0, content_block=block),
        ]

    def delta(self, part: int, k: int | str, reason: str | None = None) -> bytes:  # noqa: ARG002
        text = {"type": "text_delta", "text": f"{self.stems[part]}{k} "}
        return self._event("content_block_delta", index=0, delta=text)

    def closing(self, tokens: int, reason: str) -> list[bytes]:
        usage = self._usage(tokens)
        return [
            self.delta(0, tokens - 1),
            self._event("content_block_stop", index=0),
            self._event("message_delta", delta={"stop_reason": _stop_reason(reason)}, usage=usage),
            self._event("message_stop"),
            DONE,
        ]

    def whole(self, tokens: int, reason: str) -> Json:
        content = [{"type": "text", "text": self.text(0, tokens)}]
        return self._message(content, _stop_reason(reason), self._usage(tokens))

    def failing(self, status: int, message: str) -> list[bytes]:  # noqa: ARG002
        told = {"type": "internal_error", "message": message}
        return [event({"type": "error", "error": told}, "error"), DONE]

    def _event(self, name: str, **more: object) -> bytes:
        return event({"type": name, **more}, name)

    def _usage(self, tokens: int, *, begin: bool = False) -> Json:
        """What was cached is no input; at the begin of a stream vLLM does not tell it yet."""
        cached, total = self.ask.cached_tokens, self.ask.prompt_tokens
        if cached is None or begin:
            return {"input_tokens": total, "output_tokens": tokens}
        return {
            "input_tokens": total - cached,
            "output_tokens": tokens,
            "cache_read_input_tokens": cached,
        }

    def _message(self, content: list[Json], stop_reason: str | None, usage: Json) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": usage,
        }


def _choice(index: int, name: str, value: Json | str, reason: str | None = None) -> Json:
    return {"index": index, name: value, "logprobs": None, "finish_reason": reason}


def _stop_reason(reason: str) -> str:
    return "end_turn" if reason == "stop" else "max_tokens"
