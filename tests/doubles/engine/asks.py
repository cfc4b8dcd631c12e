"""What a request asks for, and the words with which vLLM refuses it."""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

MOST_SALT = 128
MOST_CHOICES = 16384  # VLLM_MAX_N_SEQUENCES
TAG = re.compile(r"tag=([\w.-]+)")
DONE = b"data: [DONE]\n\n"
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
_serial = count()

Json = dict[str, Any]


class Refused(Exception):
    """The request is not one that vLLM would serve."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error(status, message, param)


def error(status: int, message: str, param: str | None = None) -> Json:
    kind = ERROR_TYPES.get(status, "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def encoded(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def event(body: Json, name: str = "") -> bytes:
    prefix = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (prefix, encoded(body))


def new_id(prefix: str) -> str:
    return f"{prefix}{next(_serial):08x}{time.time_ns():024x}"


def words(content: object) -> str:
    """The text of a message's content, a prompt, or an input: a string or parts of one."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return words(content.get("text") or content.get("content") or "")
    if isinstance(content, list):
        return "\n".join(words(part) for part in content)
    return ""


@dataclass
class Ask:
    """What a request asks for, in the same words for every kind of inference."""

    model: str
    prompts: list[str]  # each one's last message or whole text: the tag is looked for there
    prompt_tokens: int
    max_tokens: int | None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    token_ids: bool = False
    cached_tokens: int | None = None  # of the prompt; None: there is no KV cache
    body: Json = field(default_factory=dict)

    @property
    def parts(self) -> int:
        return len(self.prompts) * self.n

    def stem(self, part: int) -> str:
        """What each token of this part begins with."""
        found = TAG.search(self.prompts[part // self.n])
        return f"{found[1]}:" if found else "t"


def ask_of(body: Json, prompts: Iterable[object], history: object, *limits: str) -> Ask:
    texts = [words(prompt) for prompt in prompts]
    bounds = [body[name] for name in limits if body.get(name) is not None]
    if any(not isinstance(bound, int) or bound < 1 for bound in bounds):
        raise Refused(400, f"{limits[0]} must be at least 1, got {bounds[0]}.", limits[0])
    choices = body.get("n") or 1
    if not isinstance(choices, int) or choices < 1:
        raise Refused(400, f"n must be at least 1, got {choices}.", "n")
    if choices > MOST_CHOICES:
        raise Refused(400, f"n must be at most {MOST_CHOICES}, got {choices}.", "n")
    options = body.get("stream_options") or {}
    return Ask(
        model=body.get("model") or "",
        prompts=texts,
        prompt_tokens=max(len(words(history).encode()), 1),
        max_tokens=bounds[0] if bounds else None,
        n=choices,
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        token_ids=bool(body.get("return_token_ids")),
        body=body,
    )


def salt_of(body: Json) -> str:
    salt = body.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not salt:
        told = "must be a non-empty string if provided."
    elif len(salt) > MOST_SALT or set(salt) & set("@/\\\0"):
        told = (
            f"must be at most {MOST_SALT} characters and must not contain '@', '/', '\\\\', or NUL."
        )
    else:
        return salt
    message = f"Parameter 'cache_salt' {told} (parameter=cache_salt)"
    raise Refused(400, message, "cache_salt")


def multipart(body: bytes, content_type: str) -> Json:
    """A form's fields; a file is known by its size alone."""
    boundary = content_type.partition("boundary=")[2].split(";")[0].strip('" ')
    if not boundary:
        raise Refused(400, "file: Field required", "file")
    form: Json = {}
    for part in body.split(b"--" + boundary.encode())[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="([^"]*)"', head)
        value = value.removesuffix(b"\r\n")
        if name is None:
            continue
        if b"filename=" in head:
            form["file_bytes"] = len(value)
        else:
            form[name[1].decode()] = value.decode(errors="replace")
    if "file_bytes" not in form:
        raise Refused(400, "file: Field required", "file")
    return form | {"input": "audio"}
