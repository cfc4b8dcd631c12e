"""Bytes that nobody should send, for hive's inference surface: requests that are no JSON, no HTTP, or two.

Hypothesis draws bodies, headers and framings; they go over raw sockets, many at once, each with a good
request behind it on the same connection. Whatever comes, an answer is hive's with a code, or the engine's;
the connection is closed or still means what it says; and hive's memory does not grow with it. A few in
every test run, many under `--soak`; FUZZ_SEED repeats a choice.
"""

import contextlib
import json
import os
import random
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st

from hive.errors import HiveError, InternalError, by_code
from steps.driver import Hive, new_hive
from steps.memory import SMALL
from steps.waiting import must

SEED = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
FEW, MANY = 14, 1500  # batches
BATCH = 48  # requests of one, at once
LATE_S = 10.0  # nothing takes so long: see body_s and inference_s below
BODY_S = 0.2
# Memory: a body of which one copy were kept for each request would be 64 KiB each time.
BODY_BYTES = 64 * 1024
WARM, FEW_MORE, MANY_MORE = 600, 1200, 40_000  # requests
# What hive keeps on purpose grows with requests: an id and a moment of each that ended within 10 minutes
# (gateway/traffic.py), some 300 bytes. What is kept a bounded number of times (texts of refusals, scopes of
# paths) and the allocator's own settle between the 1,000th and the 5,000th request, at 18 MB more at most;
# from there to the 20,000th it was 2 MB. One copy of each body would be 75 MB in the short run, and 1 KiB
# of each request 39 MB in the long one.
REMEMBERED_BYTES = 300
NOISE_MB = 24.0
TOLD = "told-by-the-one-behind"  # the id of the good request
SMUGGLED = "smuggled"  # the id of a request that is only there if hive takes a body for one


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    """Without keys: all that is sent gets as far as it can."""
    with new_hive() as it:
        it.sections["server"] |= {"body_s": BODY_S, "max_body_mib": 1}
        it.sections["timeouts"] = {"inference_s": 4, "cleanup_s": 1, "request_s": 6, "queue_s": 3}
        it.sections["breaker"] = {"failures": 1000}
        it.sections["windows"] = dict(SMALL)
        it.model("m", "--max-model-len", "512", max_concurrent=64, queue_depth=64, windows=True)
        it.start(is_shared=True)
        yield it


@dataclass(frozen=True)
class Raw:
    """What is sent, `late` after a moment, and whether its end is where it says."""

    head: bytes
    body: bytes
    is_whole: bool  # what is behind it is another request
    late: bytes = b""

    def __repr__(self) -> str:
        return f"Raw({self.head!r}, {self.body!r}, {self.is_whole}, {self.late!r})"


# ── what is sent ────────────────────────────────────────────────────────────────────────────────

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/audio/transcriptions"),
    *(
        "/v1/responses",
        "/v1/messages",
        "/v1/rerank",
        "/tokenize",
        "/detokenize",
        "/pooling",
        "/score",
    ),
)
ODD_PATHS = (
    *(
        "/v1/",
        "/v1",
        "//v1/completions",
        "/v1/../hive/v1/status",
        "/v1/%2e%2e/metrics",
        "/v1/a%00b",
    ),
    *(
        "/v1/completions/",
        "/v1/completions?" + "q" * 4000,
        "/v1/completions#x",
        "/v1/%zz",
        "/v1/\\x",
    ),
    *(
        "http://other/v1/completions",
        "http://[::1/v1/completions",
        "*",
        "/tokenize?model=m",
        "/score/x",
    ),
    *(
        "/v1/responses/resp_x",
        "/v1/responses/%ff/cancel",
        "/v1/chat/completions/render",
        "/" + "a" * 8000,
    ),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, True]),
)
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "\0", "\ud800", "\ufeff", "x" * 5000, "\u202e", "m", "true", "[DONE]"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
NAMES = (
    *(
        "model",
        "messages",
        "prompt",
        "input",
        "stream",
        "max_tokens",
        "stop",
        "documents",
        "text_1",
    ),
    *(
        "cache_salt",
        "stream_options",
        "echo",
        "tools",
        "logit_bias",
        "previous_response_id",
        "file",
    ),
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """A request as it should be, but for some members; some of them twice."""
    good = {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "prompt": "a",
        "input": "a",
        "max_tokens": 4,
    }
    more = draw(st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=4))
    members = [
        *good.items(),
        *more,
        *draw(st.lists(st.sampled_from(list(good.items())), max_size=2)),
    ]
    if draw(st.booleans()):
        members = draw(st.permutations(members))
    if draw(st.integers(0, 4)) == 0:  # many choices: few, or more than anybody may ask for
        members.append(("n", draw(st.sampled_from([2, 3, 0, -1, 10**6, 10**30, "2", 1.5, None]))))
    return b"{%b}" % b",".join(dumped(name) + b":" + dumped(value) for name, value in members)


def form(boundary: str, model: bytes, audio: bytes) -> bytes:
    line = f"--{boundary}".encode()
    named = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model + b"\r\n"
    file = (
        b'\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + audio + b"\r\n"
    )
    return line + named + line + file + line + b"--\r\n"


BODIES = (
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 100, b"{}", b'"m"', b"m", b"1e999", b"NaN", b"-",
    b"[" * 100_000, b'{"model":' * 20_000, b'{"model": "m", "prompt": ' + b"[" * 50_000,
    b'{"model": "\xff"}', b'{"model": "\\ud800"}', b'{"model": "\\u0000"}', b'{"model": "m"} {}',
    b'{"model": "m", "model": "x"}', b'{"model": "x", "model": "m", "prompt": "a"}',
    b'\xef\xbb\xbf{"model": "m", "prompt": "a"}', b'{"model": "m", "prompt": "a", "n": 1' + b"0" * 5000 + b"}",
    b'{"model": "m", "prompt": "\xc3\x28"}', b'{"model": "m", "prompt": "a\0b"}', b"{'model': 'm'}",
    b'{"model": "' + b"m" * 300_000 + b'"}', b'{"model":"m","prompt":"' + b"a" * 600_000 + b'"}',
    b"x" * (2**20 + 1),
)  # fmt: skip
bodies = st.one_of(
    objects(), objects(), st.sampled_from(BODIES), st.binary(max_size=300), values.map(dumped),
    st.builds(form, st.sampled_from(["b", "x y", "-" * 70]), st.sampled_from([b"m", b"", b"\xff", b"m" * 999]),
              st.binary(max_size=300)),
)  # fmt: skip
KINDS = (
    *(
        "application/json",
        "multipart/form-data; boundary=b",
        'multipart/form-data; boundary="x y"',
        "",
    ),
    *(
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/plain; charset=\xff",
        "a/b/c;;=;",
    ),
    *(
        "multipart/form-data; boundary=" + "-" * 70,
        "application/json; charset=utf-16",
        "MULTIPART/x",
    ),
)
ODD_HEADERS = (
    b"X-Request-Id: a b", b"X-Request-Id: \xff\xfe", b"X-Request-Id: " + b"i" * 500, b"X-Hive-Timeout: -1",
    b"X-Hive-Timeout: 1e3", b"X-Hive-Timeout: nan", b"X-Request-Deadline: 0000-00-00", b"X-Hive-Session: ../x",
    b"X-Hive-Session: none", b"X-Request-Deadline: 9999-12-31T23:59:59+00:00", b"X-Hive-Priority: root",
    b"X-Request-Deadline: 0001-01-01T00:00:00+23:59", b"Content-Encoding: gzip", b"Content-Encoding: identity",
    b"Expect: 100-continue", b"Expect: \xff", b"Expect: 200-ok", b"Upgrade: websocket", b"Upgrade: h2c",
    b"Connection: upgrade", b"Connection: close", b"Connection: keep-alive, close, \xff", b"TE: trailers",
    b"Authorization: Bearer \xff\xfe", b"Authorization: Basic Zm9v", b"Cookie: " + b"c=1; " * 1000,
    b"Range: bytes=0-", b"Accept: \xff", b"Accept-Encoding: gzip", b"X-A:" + b" " * 4000 + b"b", b"X-A: " + b"a" * 9000,
    b"X A: b", b"X-A : b", b": b", b"X-A", b"X-A: a\0b", b"X-A: a\rb", b"X-A: a\r\n folded", b"\xff: b", b"",
    b"Host: a\r\nHost: b", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, chunked", b"Content-Length: x",
    b"\r\n".join(b"X-%d: y" % n for n in range(200)), b"X-Forwarded-For: 1.2.3.4", b"Sec-WebSocket-Key: x",
)  # fmt: skip
FRAMINGS = (
    *(
        "length",
        "length",
        "length",
        "chunks",
        "chunks",
        "none",
        "shorter",
        "longer",
        "negative",
        "plus",
    ),
    *(
        "twice",
        "two lengths",
        "both",
        "both, other order",
        "bad size",
        "late bad size",
        "huge size",
    ),
    *("no last chunk", "trailers", "extensions", "bare newlines", "spaced length", "hex length"),
)


def chunked(body: bytes, extension: bytes = b"") -> bytes:
    parts = (
        [body[at : at + 1000] for at in range(0, len(body), 1000)] if len(body) < 10_000 else [body]
    )
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in parts if p)


def framed(  # noqa: C901, PLR0912 (a table)
    framing: str, body: bytes
) -> tuple[list[bytes], bytes, bool, bytes]:
    """Headers, what is sent as the body, whether it ends where it says, and what comes late."""
    size, last = len(body), b"0\r\n\r\n"
    length, in_chunks = b"Content-Length: %d" % size, b"Transfer-Encoding: chunked"
    inside = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: %b\r\n\r\n" % SMUGGLED.encode()
    match framing:
        case "length":
            return [length], body, True, b""
        case "chunks":
            return [in_chunks], chunked(body) + last, True, b""
        case "none":
            return [], b"", True, b""
        case "shorter":  # the rest of it is what comes next
            return [b"Content-Length: %d" % (size // 2)], body, False, b""
        case "longer":
            return [b"Content-Length: %d" % (size + 50)], body, False, b""
        case "negative":
            return [b"Content-Length: -%d" % (size + 1)], body, False, b""
        case "plus":
            return [b"Content-Length: +%d" % size], body, False, b""
        case "spaced length":
            return [b"Content-Length: %d %d" % (size, size)], body, False, b""
        case "hex length":
            return [b"Content-Length: 0x%x" % size], body, False, b""
        case "twice":
            return [length, length], body, False, b""
        case "two lengths":  # of which the first would leave a request over
            return [b"Content-Length: 0", b"Content-Length: %d" % len(inside)], inside, False, b""
        case "both":
            return (
                [b"Content-Length: %d" % (len(last) + len(inside)), in_chunks],
                last + inside,
                False,
                b"",
            )
        case "both, other order":
            return (
                [in_chunks, b"Content-Length: %d" % (len(last) + len(inside))],
                last + inside,
                False,
                b"",
            )
        case "bad size":
            return [in_chunks], b"xyz\r\n" + body, False, b""
        case "late bad size":
            return [in_chunks], chunked(b"a" * 100), False, b"-5\r\n" + inside
        case "huge size":
            return [in_chunks], b"f" * 40 + b"\r\n" + body, False, b""
        case "no last chunk":
            return [in_chunks], chunked(body or b"a"), False, b""
        case "trailers":
            return (
                [in_chunks],
                chunked(body) + b"0\r\nX-Request-Id: smuggled\r\nA: b\r\n\r\n",
                True,
                b"",
            )
        case "extensions":
            return [in_chunks], chunked(body, b';a="\xff";' + b"b" * 200) + last, False, b""
    assert framing == "bare newlines"
    return [in_chunks], chunked(body).replace(b"\r\n", b"\n") + b"0\n\n", False, b""


@st.composite
def raws(draw: st.DrawFn) -> Raw:
    method = draw(
        st.sampled_from(
            ["POST"] * 12 + ["GET", "DELETE", "post", "PURGE", "P" * 300, "PO ST", "HEAD"]
        )
    )
    path = draw(
        st.one_of(st.sampled_from(PATHS), st.sampled_from(PATHS), st.sampled_from(ODD_PATHS))
    )
    version = draw(
        st.sampled_from(
            ["HTTP/1.1"] * 12 + ["HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "http/1.1", "", "X"]
        )
    )
    body = draw(bodies)
    framing = draw(st.sampled_from(FRAMINGS))
    framing_headers, sent, is_whole, late = framed(framing, body)
    event(f"framing: {framing}")
    odd = draw(st.lists(st.sampled_from(ODD_HEADERS), max_size=3))
    kind = draw(st.sampled_from([KINDS[0], KINDS[0], *KINDS])).encode("latin-1")
    lines = [b"Host: hive", b"Content-Type: " + kind, *odd, *framing_headers]
    if draw(st.booleans()):
        lines.reverse()
    head = b"\r\n".join([f"{method} {path} {version}".encode(), *lines]) + b"\r\n\r\n"
    may_close = method != "POST" or version != "HTTP/1.1" or bool(odd)
    return Raw(head, sent, is_whole and not may_close, late)


# ── what comes back ─────────────────────────────────────────────────────────────────────────────


@dataclass
class Reply:
    """One answer on a connection."""

    status: int
    headers: dict[str, str]
    body: bytes


class Line:
    """One connection: what was sent, and what has come back until it was closed."""

    def __init__(self, port: int, raw: Raw) -> None:
        self.raw = raw
        self.sock = socket.create_connection(("127.0.0.1", port), LATE_S)
        self.sock.setblocking(False)
        behind = f"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: {TOLD}-{id(self)}\r\n\r\n"
        self.unsent = raw.head + raw.body + (behind.encode() if raw.is_whole else b"")
        self.late_at = time.monotonic() + 0.05 if raw.late else None
        self.got = b""
        self.is_closed = False
        self.ends_at = time.monotonic() + LATE_S
        self.quiet_since = time.monotonic()

    @property
    def is_over(self) -> bool:
        """All that can come has come."""
        if self.is_closed or (self.raw.is_whole and f"{TOLD}-{id(self)}".encode() in self.got):
            return True
        # Nobody knows what such a request means: hive waits for more of it, or has answered.
        waited = time.monotonic() - self.quiet_since
        return not self.raw.is_whole and not self.unsent and waited > BODY_S + 0.3

    def turn(self, *, may_read: bool, may_write: bool) -> None:
        try:
            if may_write and self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent[:65536]) :]
                self.quiet_since = time.monotonic()
            if self.late_at is not None and not self.unsent and time.monotonic() > self.late_at:
                self.unsent, self.late_at = self.raw.late, None
            if may_read:
                data = self.sock.recv(262_144)
                self.quiet_since = time.monotonic()
                self.got += data
                self.is_closed = not data
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True  # hive refused it and did not read on


def exchange(hive: Hive, raws_: Sequence[Raw]) -> list[Line]:
    """All of them at once, each to its end."""
    lines = [Line(hive.port, raw) for raw in raws_]
    try:
        while open_ := [line for line in lines if not line.is_over]:
            reading = [line for line in open_ if not line.is_closed]
            writing = [line for line in reading if line.unsent]
            can_read, can_write, _ = select.select(
                [line.sock for line in reading], [line.sock for line in writing], [], 0.02
            )
            for line in open_:
                line.turn(may_read=line.sock in can_read, may_write=line.sock in can_write)
                assert time.monotonic() < line.ends_at, f"no end of {line.raw}; came: {line.got!r}"
    finally:
        for line in lines:
            line.sock.close()
    return lines


def replies_in(got: bytes) -> list[Reply]:
    """Every answer; HTTP is read strictly, for hive must write it so."""
    found = []
    while got:
        head, mark, rest = got.partition(b"\r\n\r\n")
        assert mark, f"no end of a head: {head[:200]!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0"), first
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        if status == "100":
            got = rest
            continue
        if headers.get("transfer-encoding") == "chunked":
            body, rest = unchunked(rest)
        elif "content-length" in headers:
            size = int(headers["content-length"])
            body, rest = rest[:size], rest[size:]
        else:
            body, rest = rest, b""
        found.append(Reply(int(status), headers, body))
        got = rest
    return found


def unchunked(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, mark, rest = rest.partition(b"\r\n")
        if not mark:
            return body, b""  # cut off, which is told by the missing end
        length = int(size, 16)
        if not length:
            return body, rest.removeprefix(b"\r\n")
        body, rest = body + rest[:length], rest[length + 2 :]


def told(line: Line) -> None:
    """Judge it; what is wrong is told with what was sent."""
    try:
        judge(line)
    except (AssertionError, ValueError, LookupError, TypeError) as exc:
        sent = line.raw.head + line.raw.body[:2000]
        raise AssertionError(
            f"FUZZ_SEED={SEED}: {exc!r}\nsent: {sent!r}\ncame: {line.got[:2000]!r}"
        ) from exc


def judge(line: Line) -> None:
    """What must hold of whatever came back."""
    is_head = line.raw.head.startswith(b"HEAD ")
    if is_head:  # has no body, whatever its length says
        return
    for reply in replies_in(line.got):
        assert reply.headers.get("x-request-id") != SMUGGLED, (
            f"what was in a body was answered: {line.raw}"
        )
        assert "aiohttp" not in reply.headers.get("server", ""), reply
        if reply.status < 400:
            continue
        told = json.loads(reply.body)
        code = told["error"]["code"] if "error" in told else None
        if isinstance(code, str):
            cls = by_code(code)
            assert cls is not None, f"{code} is no code of hive's"
            assert_hives(cls, reply, told)
        else:
            assert code == reply.status or "detail" in told, f"nobody's answer: {reply}"
            assert reply.status < 500, f"the engine failed: {reply}"
    if line.raw.is_whole:
        ids = [reply.headers.get("x-request-id", "") for reply in replies_in(line.got)]
        assert line.is_closed or ids[-1] == f"{TOLD}-{id(line)}", f"{line.raw}: {ids}"
        assert len(ids) <= 2, f"more answers than requests: {line.raw}: {ids}"


def assert_hives(cls: type[HiveError], reply: Reply, told: Any) -> None:
    assert cls is not InternalError, f"an error of hive's own: {told}"
    assert reply.status != 500, told
    assert reply.headers["x-request-id"] == told["error"]["details"]["request_id"]
    assert reply.headers["server"] == "hive"
    assert told["error"]["details"]["suggested_action"]


# ── the tests ───────────────────────────────────────────────────────────────────────────────────


def test_whatever_is_sent_is_answered_with_a_code_or_by_the_engine(
    hive: Hive, pytestconfig: pytest.Config
) -> None:
    """R027, R032: and hive is as it was."""
    print(f"FUZZ_SEED={SEED}")
    sent = 0

    @seed(SEED)
    @settings(
        max_examples=MANY if pytestconfig.getoption("soak") else FEW,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # what failed is told; to shrink a batch takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(batch=st.lists(raws(), min_size=BATCH, max_size=BATCH))
    def each(batch: list[Raw]) -> None:
        nonlocal sent
        sent += len(batch)
        for line in exchange(hive, batch):
            told(line)

    each()
    print(f"{sent} requests")
    must_be_well(hive)


def test_memory_is_flat(hive: Hive, pytestconfig: pytest.Config) -> None:
    """Thousands of requests of every bad kind, with large bodies, after a warm-up with the same."""
    chance = random.Random(f"fuzz {SEED}")
    more = MANY_MORE if pytestconfig.getoption("soak") else FEW_MORE
    ask_badly(hive, chance, WARM)
    before = rss_mb(hive)
    ask_badly(hive, chance, more)
    must_be_well(hive)
    grown = rss_mb(hive) - before
    allowed = NOISE_MB + more * REMEMBERED_BYTES / 2**20
    print(
        f"{more} requests, {more * BODY_BYTES / 2**20:.0f} MB of bodies: {grown:+.1f} MB of {allowed:.1f}"
    )
    assert grown < allowed, f"FUZZ_SEED={SEED}: hive grew by {grown:.1f} MB"


def ask_badly(hive: Hive, chance: random.Random, count: int) -> None:
    quick = [one for one in FRAMINGS if one not in ("longer", "late bad size", "no last chunk")]
    for _ in range(count // 30):
        batch = []
        for number in range(30):
            filler = bytes(chance.choices(b"abcdefgh", k=64)) * (BODY_BYTES // 64)
            odd = chance.choice(ODD_HEADERS)
            body = chance.choice(
                [
                    b'{"model":"m","prompt":"%b","max_tokens":1}' % filler,
                    b'{"model":"%b"}' % filler,
                    b'{"model":"m","messages":[{"role":"user","content":"%b"}' % filler,
                    form("b", b"m", filler),
                    filler,
                ]
            )
            # A few of the slow ones are enough.
            framing = chance.choice(FRAMINGS if not number else quick)
            headers, sent, _, late = framed(framing, body)
            path = chance.choice([*PATHS, f"/v1/{chance.getrandbits(400):x}"]).encode()
            lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
            lines += [b"Content-Type: " + chance.choice(KINDS).encode("latin-1")]
            lines += [odd] if chance.random() < 0.3 else []
            batch.append(Raw(b"\r\n".join(lines) + b"\r\n\r\n", sent, is_whole=False, late=late))
        for line in exchange(hive, batch):
            told(line)


def must_be_well(hive: Hive) -> None:
    """Nothing is in flight, nothing restarted, nothing unforeseen was logged, and it answers."""
    must(lambda: not hive.ask("GET", "/hive/v1/requests").json["requests"], LATE_S, "an idle hive")
    must(lambda: hive.worker("m-0")["in_flight"] == 0, LATE_S, "free slots")
    worker = hive.worker("m-0")
    assert (worker["state"], worker["starts"], worker["waiting"]) == ("READY", 1, 0), worker
    assert worker["breaker"]["state"] == "closed"
    assert hive.chat(max_tokens=1).status == 200
    bad = [
        line for line in hive.log if "exception" in line or line["level"] in ("error", "critical")
    ]
    assert not bad, bad[:3]


def rss_mb(hive: Hive) -> float:
    """At rest, as steps/test_soak.py has it."""
    assert hive.process is not None
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{hive.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    raise AssertionError("hive is not there")
