"""Inference that makes no text: embeddings, scores, and speech whose size is the answer."""

from base64 import b64encode
from struct import pack

from tests.doubles.engine.asks import Ask, Json, Refused, ask_of, new_id, words
from tests.doubles.engine.shapes import Shape


class Once(Shape):
    """Inference that makes no text: one step, then the answer."""

    @classmethod
    def read(cls, body: Json) -> Ask:
        asked = body.get("input", body.get("messages", body.get("documents", body.get("text_2"))))
        if asked is None:
            raise Refused(400, "input: Field required", "input")
        ask = ask_of({"model": body.get("model")}, [asked], asked)
        ask.max_tokens, ask.body = 1, body
        return ask

    def make_id(self) -> str:
        return new_id("embd-")

    def delta(self, part: int, k: int | str, reason: str | None = None) -> bytes:  # noqa: ARG002
        return b""

    def inputs(self) -> list[object]:
        asked = self.ask.body.get("input", self.ask.body.get("messages"))
        whole = not isinstance(asked, list) or (
            bool(asked) and not isinstance(asked[0], str | list)
        )
        return [asked] if whole or not isinstance(asked, list) else asked

    def list_of(self, rows: list[Json]) -> Json:
        usage = self.usage(0)
        return {
            "id": self.id,
            "object": "list",
            "created": self.created,
            "model": self.model,
            "data": rows,
            "usage": usage,
        }


class Embeddings(Once):
    def whole(self, tokens: int, reason: str) -> Json:  # noqa: ARG002
        rows = []
        for index, asked in enumerate(self.inputs()):
            vector: object = _vector(words(asked))
            if self.ask.body.get("encoding_format") == "base64":
                vector = _base64(_vector(words(asked)))
            rows.append({"index": index, "object": "embedding", "embedding": vector})
        return self.list_of(rows)


class Pooling(Once):
    def whole(self, tokens: int, reason: str) -> Json:  # noqa: ARG002
        return self.list_of(
            [
                {"index": index, "object": "pooling", "data": _vector(words(asked))}
                for index, asked in enumerate(self.inputs())
            ]
        )


class Score(Once):
    def whole(self, tokens: int, reason: str) -> Json:  # noqa: ARG002
        second = self.ask.body.get("text_2") or self.ask.body.get("documents") or []
        others = second if isinstance(second, list) else [second]
        return self.list_of(
            [
                {"index": index, "object": "score", "score": _vector(words(other))[0]}
                for index, other in enumerate(others)
            ]
        )


class Rerank(Once):
    def whole(self, tokens: int, reason: str) -> Json:  # noqa: ARG002
        rows: list[Json] = [
            {
                "index": index,
                "document": {"text": words(document)},
                "relevance_score": _vector(words(document))[0],
            }
            for index, document in enumerate(self.ask.body.get("documents") or [])
        ]
        rows.sort(key=lambda row: row["relevance_score"], reverse=True)
        usage = {"total_tokens": self.ask.prompt_tokens}
        return {"id": self.id, "model": self.model, "usage": usage, "results": rows}


class Transcription(Once):
    """Speech to text; its answer is the number of bytes that the file has."""

    def whole(self, tokens: int, reason: str) -> Json:  # noqa: ARG002
        size = self.ask.body["file_bytes"]
        return {"text": f"{size} bytes", "usage": {"type": "duration", "seconds": 1}}


def _vector(text: str) -> list[float]:
    """Eight numbers that depend on the text alone."""
    total = sum(text.encode())
    return [(total * k % 251) / 251 for k in range(1, 9)]


def _base64(vector: list[float]) -> str:
    return b64encode(pack(f"<{len(vector)}f", *vector)).decode()
