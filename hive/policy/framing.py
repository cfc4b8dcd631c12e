"""Where an engine's answer ends: HTTP/1.1's framing, followed without touching a byte.

Pure. What is passed on unchanged must be understood exactly: an end seen too early or too late would
give one request's bytes to the next one on the same connection. So whatever has two readings is
malformed (RFC 9112, sections 4, 6 and 7), and the connection that brought it is not used again.
"""

import functools
import re
from dataclasses import dataclass

MOST_HEAD = 64 * 1024  # bytes of a head, or of trailers
MOST_LINE = 1024  # bytes of a chunk's size line
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*\Z")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\Z")
_LENGTH = re.compile(rb"[0-9]{1,18}\Z")
# Fields of the connection, not of the message; and hive's own id goes to the client.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade x-request-id".split()
)
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"content-type"))
_BODILESS = (204, 304)
_REMEMBERED_HEAD = 2048  # bytes; longer ones are read anew each time


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; of nothing, the last one."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Malformed(Exception):
    """It is not HTTP/1.1, or can be read in two ways; `args[0]` says what is wrong."""


@dataclass(frozen=True, slots=True)
class Head:
    """An answer's status line and fields.

    `fields` are those that concern the message, not the connection, as the engine wrote them, a
    line each. `length` is the body's, bytes; None where it is chunked or ends with the connection.
    """

    status: int
    reason: bytes
    fields: bytes
    opening: bytes  # the status line, and `fields`
    content_type: bytes  # lower case, without parameters
    length: int | None
    is_chunked: bool
    is_kept: bool  # the connection can carry another request
    has_server: bool  # it says what made it

    @property
    def is_stream(self) -> bool:
        """Whether its body is server-sent events."""
        return self.content_type == b"text/event-stream"

    def body(self) -> "Framing":
        """What finds the end of its body."""
        if self.is_chunked:
            return Chunks()
        return UntilClosed() if self.length is None else Length(self.length)


def read_head(raw: bytes, *, answers_head: bool = False) -> Head:
    """From the status line to the last field's end of line. Raises Malformed.

    `answers_head`: the request was a HEAD, so there is no body whatever the fields say.
    """
    if len(raw) <= _REMEMBERED_HEAD:
        return _remembered(raw, answers_head)
    return _read_head(raw, answers_head)


def _read_head(raw: bytes, answers_head: bool) -> Head:
    first, *lines = raw.removesuffix(b"\r\n").split(b"\r\n")
    status_line = _STATUS.match(first)
    if status_line is None:
        raise Malformed("its first line is no status line of HTTP/1.1")
    status, is_newer = int(status_line[2]), status_line[1] == b"1"
    values: dict[bytes, list[bytes]] = {}
    fields: list[tuple[bytes, bytes]] = []
    for line in lines:
        field = _FIELD.match(line)
        if field is None:
            raise Malformed("a line of its head is no field")
        name = field[1].lower()
        fields.append((name, line))
        values.setdefault(name, []).append(field[2])
    named = {token.lower() for token in _listed(values, b"connection")}
    if named & _FRAMING:
        raise Malformed("its Connection field names what frames it")
    length, is_chunked = _framed(values, is_newer=is_newer)
    if answers_head or status in _BODILESS:
        length, is_chunked = 0, False
    dropped = _HOP_BY_HOP | named
    kinds = values.get(b"content-type", [b""])
    reason = status_line[3] or b""
    kept = b"".join(line + b"\r\n" for name, line in fields if name not in dropped)
    return Head(
        status=status,
        reason=reason,
        fields=kept,
        opening=b"HTTP/1.1 %d %s\r\n%s" % (status, reason, kept),
        content_type=kinds[0].partition(b";")[0].strip().lower(),
        length=length,
        is_chunked=is_chunked,
        # Without a length only the connection's end ends it.
        is_kept=is_newer and b"close" not in named and (is_chunked or length is not None),
        has_server=b"server" in values,
    )


def _framed(values: dict[bytes, list[bytes]], *, is_newer: bool) -> tuple[int | None, bool]:
    """The body's length where it is told, and whether it is chunked."""
    codings = [coding.lower() for coding in _listed(values, b"transfer-encoding")]
    lengths = set(_listed(values, b"content-length"))
    if codings:
        if lengths:
            raise Malformed("it has both a length and a transfer coding")
        if codings != [b"chunked"] or not is_newer:
            raise Malformed("its transfer coding is not the chunked one of HTTP/1.1")
        return None, True
    if not lengths:
        return None, False
    (text, *others) = lengths
    if others or not _LENGTH.match(text):
        raise Malformed("its Content-Length is no number, or several")
    return int(text), False


def _listed(values: dict[bytes, list[bytes]], name: bytes) -> list[bytes]:
    return [part.strip() for value in values.get(name, ()) for part in value.split(b",")]


# An engine's heads differ in a date and a length; within a second many are the same.
_remembered = functools.lru_cache(512)(_read_head)


@functools.lru_cache(4096)
def _size_of(line: bytes) -> int:
    found = _SIZE.match(line)
    if found is None or len(line) > MOST_LINE:
        raise Malformed("a chunk's size is no hexadecimal number")
    return int(found[1], 16)


class Chunks:
    """A chunked body, followed through its pieces; holds no byte of it but an unfinished line."""

    __slots__ = ("_is_last", "_left", "_line", "_trailers", "chunk_at")

    def __init__(self) -> None:
        self._left = 0  # bytes of the current chunk, its end of line included
        self._line = b""  # the beginning of a size or of a trailer
        self._is_last = False  # the chunk of size 0 was seen: trailers come
        self._trailers = 0  # bytes
        self.chunk_at = -1

    @property
    def is_between(self) -> bool:
        """Whether a chunk has just ended, and nothing of another one has come."""
        return not (self._left or self._line or self._is_last)

    def feed(self, data: bytes, into: list[bytes] | None = None) -> int:
        """Where in `data` the body ends, behind its last byte; -1: not yet. Raises Malformed.

        `into` gets what the chunks hold. `chunk_at` is then where in `data` the chunk begins that
        has not ended; -1: it began before.
        """
        at, size = 0, len(data)
        self.chunk_at = -1
        shift = len(self._line)
        if shift:
            data, self._line = self._line + data, b""
            size += shift
        elif not self._left and not self._is_last and into is None and data.endswith(b"\r\n"):
            end = data.find(b"\r\n")
            if (count := _size_of(data[:end])) and end + count + 4 == size:
                return -1  # one chunk, whole: an event of most engines
        while at < size:
            if self._left:
                at = self._skips(data, at, into)
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._begins(data[at:])
                break
            if self._is_last and end == at:
                return end + 2 - shift
            self._reads(data[at:end])
            self.chunk_at, at = at - shift, end + 2
        if not self._left:
            self.chunk_at = -1
        return -1

    def _skips(self, data: bytes, at: int, into: list[bytes] | None) -> int:
        """Go to the chunk's end, or as far as `data` goes."""
        left, size = self._left, len(data)
        end = at + left
        if into is not None and left > 2:  # noqa: PLR2004 (its end of line)
            into.append(data[at : min(end - 2, size)])
        self._left = max(0, end - size)
        if end <= size:
            is_right = data[max(at, end - 2) : end] == (b"\r\n" if left > 1 else b"\n")
        else:
            is_right = self._left != 1 or data[-1:] == b"\r"
        if not is_right:
            raise Malformed("a chunk is longer than its size")
        return end

    def _begins(self, line: bytes) -> None:
        self._line = line
        if len(line) > MOST_LINE:
            raise Malformed("a line of its framing is too long")

    def _reads(self, line: bytes) -> None:
        """A chunk's size, or a trailer behind the last chunk."""
        if self._is_last:
            self._trailers += len(line)
            if self._trailers > MOST_HEAD or not _FIELD.match(line):
                raise Malformed("its trailer is no field, or too long")
        elif count := _size_of(line):
            self._left = count + 2
        else:
            self._is_last = True


class Length:
    """A body of known length."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    def feed(self, data: bytes, into: list[bytes] | None = None) -> int:
        """As Chunks' own; raises nothing."""
        size = len(data)
        if into is not None:
            into.append(data[: self._left])
        if size < self._left:
            self._left -= size
            return -1
        end, self._left = self._left, 0
        return end


class UntilClosed:
    """A body that ends with its connection."""

    __slots__ = ()

    def feed(self, data: bytes, into: list[bytes] | None = None) -> int:
        """As Chunks' own: never the end; raises nothing."""
        if into is not None:
            into.append(data)
        return -1


Framing = Chunks | Length | UntilClosed
