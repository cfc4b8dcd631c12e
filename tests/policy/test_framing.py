"""Where an answer ends: every way to cut it leads to the same end, and nothing has two readings."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hive.policy.framing import (
    Chunks,
    Framing,
    Length,
    Malformed,
    UntilClosed,
    chunk,
    read_head,
)

OK = b"HTTP/1.1 200 OK\r\n"
payloads = st.lists(st.binary(min_size=1, max_size=50) | st.sampled_from([b"\r\n", b"0\r\n\r\n"]))
extensions = st.sampled_from([b"", b";a", b" ; a=b", b';a="\x80"'])
trailers = st.sampled_from([b"", b"X: y\r\n", b"A: b\r\nC:\r\n"])
cuts = st.lists(st.integers(1, 9), min_size=1)


def pieces(raw: bytes, sizes: list[int]) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        size = sizes[len(found) % len(sizes)]
        found.append(raw[at : at + size])
        at += size
    return found


def followed(framing: Framing, raw: bytes, sizes: list[int]) -> tuple[int, bytes]:
    """Where in all of it the body ended (-1: it did not), and what was in it."""
    at, payload = 0, list[bytes]()
    for piece in pieces(raw, sizes):
        end = framing.feed(piece, payload)
        if end >= 0:
            return at + end, b"".join(payload)
        at += len(piece)
    return -1, b"".join(payload)


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────


@given(payloads, extensions, trailers, st.binary(max_size=9), cuts)
@example([b"x"], b"", b"", b"", [1])
def test_a_chunked_body_ends_where_it_ends_however_it_is_cut(
    parts: list[bytes], extension: bytes, trailer: bytes, behind: bytes, sizes: list[int]
) -> None:
    body = b"".join(b"%X%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    body += b"0\r\n" + trailer + b"\r\n"

    assert followed(Chunks(), body + behind, sizes) == (len(body), b"".join(parts))
    assert followed(Chunks(), body[:-1], sizes)[0] == -1


@given(st.binary(min_size=1, max_size=60), st.binary(max_size=9), cuts)
def test_a_body_of_known_length_ends_there(body: bytes, behind: bytes, sizes: list[int]) -> None:
    assert followed(Length(len(body)), body + behind, sizes) == (len(body), body)
    assert followed(Length(len(body) + 1), body, sizes) == (-1, body)


@given(st.binary(max_size=60), cuts)
def test_a_body_without_a_length_never_ends_by_itself(body: bytes, sizes: list[int]) -> None:
    assert followed(UntilClosed(), body, sizes) == (-1, body)


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\nx\r\n",
        b"0x1\r\nx\r\n",
        b"1_0\r\n",
        b" 1\r\nx\r\n",
        b"\r\n1\r\nx\r\n",
        b"1\nx\r\n",
        b"1\r\nxy\r\n",
        b"1\r\nx\ry",
        b"1\r\nx\n\r\n",
        b"2\r\nx\r\n0\r\n\r\n",
        b"1;\x00\r\nx\r\n",
        b"1" * 16 + b"\r\n",
        b"1;" + b"a" * 2000,
        b"0\r\nno field\r\n\r\n",
        b"0\r\nX: \x01\r\n\r\n",
        b"0\r\n" + b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 2000 + b"\r\n",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_chunk_is_malformed_however_it_is_cut(body: bytes, size: int) -> None:
    with pytest.raises(Malformed):
        followed(Chunks(), body, [size])


@given(payloads, cuts)
def test_between_two_chunks_is_known(parts: list[bytes], sizes: list[int]) -> None:
    """There an event of hive's own can be added."""
    ends = {0}
    for part in parts:
        ends.add(max(ends) + len(chunk(part)))
    chunks, at = Chunks(), 0
    assert chunks.is_between
    for piece in pieces(b"".join(map(chunk, parts)), sizes):
        chunks.feed(piece)
        at += len(piece)
        assert chunks.is_between is (at in ends)


def test_where_an_unfinished_chunk_began_is_known() -> None:
    chunks = Chunks()
    chunks.feed(b"1\r\nx\r\n5\r\nab")
    assert chunks.chunk_at == 6
    chunks.feed(b"c")
    assert chunks.chunk_at == -1
    chunks.feed(b"de\r\n")
    assert chunks.chunk_at == -1


def test_a_chunk_says_its_size() -> None:
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


# ── heads ───────────────────────────────────────────────────────────────────────────────────────


def test_a_head_is_read_and_what_is_the_connections_own_left_out() -> None:
    head = read_head(
        OK + b"Date: now\r\nCONNECTION: keep-alive, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\n"
        b"Content-Type: Text/Event-Stream; charset=utf-8\r\nTransfer-Encoding: Chunked\r\n"
        b"X-Request-Id: theirs\r\nServer: uvicorn\r\n"
    )

    assert (head.status, head.reason, head.content_type) == (200, b"OK", b"text/event-stream")
    assert head.is_stream
    assert head.is_chunked
    assert head.is_kept
    assert head.has_server
    assert head.length is None
    assert isinstance(head.body(), Chunks)
    assert head.fields == (
        b"Date: now\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\nServer: uvicorn\r\n"
    )


@pytest.mark.parametrize(
    ("fields", "length", "is_kept"),
    [
        (b"Content-Length: 5\r\n", 5, True),
        (b"Content-Length: 5, 5\r\n", 5, True),
        (b"Content-Length: 5\r\nContent-Length: 5\r\n", 5, True),
        (b"Content-Length: 5\r\nConnection: close\r\n", 5, False),
        (b"", None, False),
    ],
)
def test_a_length_and_how_long_the_connection_lives(
    fields: bytes, length: int | None, is_kept: bool
) -> None:
    head = read_head(OK + fields)

    assert (head.length, head.is_kept) == (length, is_kept)
    assert isinstance(head.body(), UntilClosed if length is None else Length)
    assert not read_head(OK.replace(b"1.1", b"1.0") + fields).is_kept


@pytest.mark.parametrize("status", [204, 304])
def test_some_answers_have_no_body_whatever_they_say(status: int) -> None:
    for fields in (b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b""):
        head = read_head(b"HTTP/1.1 %d x\r\n" % status + fields)
        assert (head.length, head.is_chunked, head.is_kept) == (0, False, head.is_kept)
        assert read_head(OK + fields, answers_head=True).length == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/2 200 OK\r\n",
        b"HTTP/1.1 099 OK\r\n",
        b"HTTP/1.1 2000 OK\r\n",
        b"HTTP/1.1  200 OK\r\n",
        b"HTTP/1.1 200 O\nK\r\n",
        OK + b"no field\r\n",
        OK + b" folded: x\r\n",
        OK + b"X : y\r\n",
        OK + b"X: a\x00b\r\n",
        OK + b"X: a\nContent-Length: 5\r\n",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        OK + b"Content-Length: 5, 6\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n",
        OK + b"Content-Length: -5\r\n",
        OK + b"Content-Length: +5\r\n",
        OK + b"Content-Length: 5e1\r\n",
        OK + b"Content-Length: " + b"9" * 30 + b"\r\n",
        OK + b"Content-Length:\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        OK + b"Transfer-Encoding: identity\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n",
        OK + b"Connection: content-length\r\nContent-Length: 5\r\n",
    ],
    ids=lambda raw: repr(raw[:60]),
)
def test_what_could_be_read_in_two_ways_is_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        read_head(raw)


def test_a_long_head_is_read_as_well() -> None:
    assert read_head(OK + b"X: " + b"x" * 5000 + b"\r\n").status == 200


@given(st.binary(max_size=80))
def test_any_other_bytes_are_malformed_or_a_head(raw: bytes) -> None:
    for text in (raw, OK + raw + b"\r\n"):
        try:
            assert 100 <= read_head(text).status <= 999
        except Malformed as exc:
            assert exc.args
