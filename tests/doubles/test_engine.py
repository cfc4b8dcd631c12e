"""The engine double does what it is told, and only that."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import engine_command
from tests.doubles.nvml import Gpus
from tests.doubles.test_lmcache import MODEL, Cache, names
from tests.patience import wait_until

DEADLINE_S = 10.0
PROMPT = {"messages": [{"role": "user", "content": "say it, tag=abc"}]}


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A raw connection, so that a test sees what is on the wire."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(str(path))
        self.got = b""

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def ask(self, method: str, path: str, body: object = None, headers: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
        head = f"{method} {path} HTTP/1.1\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
        self.send(head.encode() + data)

    def until(self, mark: bytes) -> bytes:
        """Everything up to the mark, which stays read."""
        while mark not in self.got:
            if not (data := self._socket.recv(65536)):
                raise EOFError(self.got)
            self.got += data
        before, _, self.got = self.got.partition(mark)
        return before + mark

    def rest(self) -> bytes:
        """Everything until the other side closes."""
        with suppress(ConnectionResetError):
            while data := self._socket.recv(65536):
                self.got += data
        return self.got

    def reply(self) -> Reply:
        lines = self.until(b"\r\n\r\n").decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        if "transfer-encoding" in headers:
            body = unchunked(self.until(b"\r\n0\r\n\r\n"))
        else:
            size = int(headers["content-length"])
            while len(self.got) < size:
                self.got += self._socket.recv(65536)
            body, self.got = self.got[:size], self.got[size:]
        return Reply(int(lines[0].split()[1]), headers, body)


def unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return body


def events(body: bytes) -> list[Any]:
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line[6:]) for line in lines if line != b"data: [DONE]"]


def text(body: bytes) -> str:
    return "".join(
        choice["delta"]["content"] for event in events(body) for choice in event["choices"]
    )


def said(tag: str, tokens: int) -> str:
    return "".join(f"{tag}:{k} " for k in range(tokens))


@dataclass
class Engine:
    socket: Path
    process: subprocess.Popen[str]
    clients: list[Client] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)

    def client(self) -> Client:
        self.clients.append(Client(self.socket))
        return self.clients[-1]

    def ask(self, method: str, path: str, body: object = None, headers: str = "") -> Reply:
        with closing(Client(self.socket)) as client:
            client.ask(method, path, body, headers)
            return client.reply()

    def chat(self, **more: object) -> Reply:
        return self.ask("POST", "/v1/chat/completions", {**PROMPT, **more})

    def streaming(self, **more: object) -> Client:
        client = self.client()
        client.ask("POST", "/v1/chat/completions", {**PROMPT, "stream": True, **more})
        return client

    def turn(self, **knobs: object) -> None:
        reply = self.ask("POST", "/double/knobs", knobs)
        assert reply.status == 200, reply.body

    def look(self) -> dict[str, Any]:
        """Its children and litter, noted for the clean-up."""
        self.tree = self.ask("GET", "/double/state").json["tree"]
        return self.tree

    def gauge(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        values = [line.split()[-1] for line in lines if line.startswith("vllm:" + name)]
        return sum(map(float, values))

    def ended(self) -> int:
        return self.process.wait(DEADLINE_S)

    def printed(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    engines: list[Engine] = []

    def launch(*flags: str, ready: bool = True, **options: Any) -> Engine:
        path = tmp_path / f"{len(engines)}.sock"
        command = engine_command("--uds", str(path), "--max-life-s", "30", *flags)
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)
        engines.append(Engine(path, process))
        if ready:
            assert process.stdout is not None
            while "Starting vLLM API server" not in process.stdout.readline():
                assert process.poll() is None, engines[-1].printed()
        return engines[-1]

    yield launch
    for engine in engines:
        for client in engine.clients:
            client.close()
        for pid in (engine.tree.get(name) for name in ("core", "worker", "busy", "escaped")):
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        engine.process.kill()
        engine.process.wait()
        for pipe in (engine.process.stdout, engine.process.stderr):
            assert pipe is not None
            pipe.close()
        for name in engine.tree.get("shm", ()):
            Path("/dev/shm", name).unlink(missing_ok=True)


def gone(pid: int) -> bool:
    """Whether the process ends before the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], DEADLINE_S)[0])
    finally:
        os.close(fd)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
    return True


# What it answers


def test_it_says_that_it_is_well_and_what_it_serves(start: Start) -> None:
    engine = start("--model", "llama")
    assert engine.ask("GET", "/health").status == 200
    assert engine.ask("GET", "/version").json == {"version": "0.32.0+double"}
    assert [m["id"] for m in engine.ask("GET", "/v1/models").json["data"]] == ["llama"]
    assert engine.ask("GET", "/nope").status == 404
    assert engine.chat(model="other").json["error"]["type"] == "NotFoundError"
    assert engine.chat(messages=[]).status == 400
    engine.ask("POST", "/v1/load_lora_adapter", {"lora_name": "l1", "lora_path": "/l"})
    assert engine.chat(model="l1").status == 200


def test_an_answer_names_the_tag_of_its_prompt_once_for_every_token(start: Start) -> None:
    engine = start()
    whole = engine.chat(max_tokens=3).json
    assert whole["choices"][0]["message"]["content"] == said("abc", 3)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 3
    assert engine.chat().json["usage"]["completion_tokens"] == 16
    assert len(engine.chat(n=2).json["choices"]) == 2


def test_a_chat_streams_in_order_to_its_end(start: Start) -> None:
    engine = start()
    body = engine.chat(stream=True, max_tokens=500, stream_options={"include_usage": True}).body
    *chunks, usage = events(body)
    assert text(body) == said("abc", 500)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 500
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_completion_streams_every_choice_of_every_prompt(start: Start) -> None:
    ask = {"prompt": ["tag=p", "tag=q"], "n": 2, "max_tokens": 4, "stream": True}
    body = start().ask("POST", "/v1/completions", ask).body
    texts = ["", "", "", ""]
    for event in events(body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [said("p", 4), said("p", 4), said("q", 4), said("q", 4)]


def test_responses_are_numbered_and_kept(start: Start) -> None:
    engine = start()
    ask = {"input": "tag=r", "max_output_tokens": 3, "stream": True}
    got = events(engine.ask("POST", "/v1/responses", ask).body)
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    assert "".join(event["delta"] for event in got if "delta" in event) == said("r", 3)
    made = got[-1]["response"]
    assert engine.ask("GET", f"/v1/responses/{made['id']}").json == made
    assert engine.ask("DELETE", f"/v1/responses/{made['id']}").json["deleted"] is True
    assert engine.ask("GET", f"/v1/responses/{made['id']}").status == 404
    whole = engine.ask("POST", "/v1/responses", {"input": "tag=r"}).json
    assert whole["output"][0]["content"][0]["text"] == said("r", 16)


def test_messages_have_anthropics_shape(start: Start) -> None:
    engine = start()
    whole = engine.ask("POST", "/v1/messages", {**PROMPT, "max_tokens": 2}).json
    assert (whole["type"], whole["stop_reason"]) == ("message", "max_tokens")
    assert whole["content"] == [{"type": "text", "text": said("abc", 2)}]
    body = engine.ask("POST", "/v1/messages", {**PROMPT, "max_tokens": 2, "stream": True}).body
    kinds = [event["type"] for event in events(body)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-1] == "message_stop"


def test_tokens_go_back_to_text(start: Start) -> None:
    engine = start()
    tokens = engine.ask("POST", "/tokenize", {"prompt": "grüß"}).json["tokens"]
    assert engine.ask("POST", "/detokenize", {"tokens": tokens}).json == {"prompt": "grüß"}


def test_inference_without_text_is_answered_at_once(start: Start) -> None:
    engine = start()
    ask = {"input": ["a", "b"], "documents": ["a", "b"], "text_1": "q", "text_2": ["a", "b"]}
    assert len(engine.ask("POST", "/v1/embeddings", ask).json["data"]) == 2
    assert len(engine.ask("POST", "/pooling", ask).json["data"]) == 2
    assert len(engine.ask("POST", "/score", ask).json["data"]) == 2
    assert len(engine.ask("POST", "/rerank", ask).json["results"]) == 2


def test_an_audio_file_is_measured(start: Start) -> None:
    disposition = b'content-disposition: form-data; name="file"; filename="a.wav"'
    form = b"--B\r\n%b\r\n\r\n%b\r\n--B--\r\n" % (disposition, b"\r\n" * 5000)
    headers = "content-type: multipart/form-data; boundary=B\r\n"
    reply = start().ask("POST", "/v1/audio/transcriptions", form, headers)
    assert reply.json["text"] == "10000 bytes"


def test_a_chunked_request_and_the_next_one_come_over_one_connection(start: Start) -> None:
    client = start().client()
    body = json.dumps({**PROMPT, "max_tokens": 1}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body)
    client.send(head + chunks + b"0\r\ntrailer: 1\r\n\r\n")
    assert client.reply().status == 200
    client.ask("GET", "/health", headers="connection: close\r\n")
    assert client.reply().status == 200
    assert client.rest() == b""


def test_nonsense_is_refused_and_the_connection_closed(start: Start) -> None:
    client = start().client()
    client.send(b"nonsense\r\n\r\n")
    assert client.rest().startswith(b"HTTP/1.1 400 ")


def test_events_can_be_padded(start: Start) -> None:
    body = start("--event-bytes", "1000").chat(stream=True, max_tokens=5).body
    sizes = [len(event) for event in body.split(b"\n\n")]
    assert sum(990 < size <= 1000 for size in sizes) == 4


# Its tokens


def word(text: str) -> int:
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def ids(text: str) -> list[int]:
    return [word(one) for one in text.split()]


def test_a_chat_is_rendered_to_tokens(start: Start) -> None:
    engine = start("--max-model-len", "100")
    calls = [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "image_url"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    ask = {"model": "m", "messages": messages, "cache_salt": "s", "max_tokens": 7}
    path = "/v1/chat/completions/render"
    got = engine.ask("POST", path, ask, "X-Request-Id: r-1\r\n").json
    said = f"<system> be kind </s> <user> a b </s> <assistant> {json.dumps(calls)} </s> <assistant>"
    assert got["token_ids"] == ids(said)
    assert (got["request_id"], got["model"], got["cache_salt"]) == ("chatcmpl-r-1", "m", "s")
    assert got["sampling_params"] == {"max_tokens": 7, "output_kind": 2, "skip_clone": True}
    more = {"add_generation_prompt": False, "stream": True, "max_tokens": None}
    got = engine.ask("POST", path, ask | more).json
    assert got["token_ids"] == ids(said)[:-1]
    assert got["stream"] is True
    assert got["sampling_params"]["max_tokens"] == 100 - len(ids(said)) + 1
    assert engine.ask("POST", path, {"messages": []}).status == 400
    assert engine.ask("GET", path).status == 405
    assert engine.ask("GET", "/double/state").json["kv_lost"] is False


def test_a_message_with_its_system_is_rendered_to_tokens(start: Start) -> None:
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    block = {"type": "tool_result", "content": [{"type": "text", "text": "c d"}]}
    messages = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [block]}]
    ask = {"system": "be kind", "messages": messages, "max_tokens": 1}
    got = start().ask("POST", "/v1/messages/render", ask).json
    said = f"<system> be kind </s> <assistant> {json.dumps(use)} </s> <user> c d </s> <assistant>"
    assert got["token_ids"] == ids(said)


def test_completions_are_rendered_to_tokens(start: Start) -> None:
    engine = start()
    asked: list[tuple[object, list[list[int]]]] = [
        ("a b", [ids("a b")]),
        ([5, 6], [[5, 6]]),
        (["a", "b"], [ids("a"), ids("b")]),
        ([[5], [6]], [[5], [6]]),
    ]
    for prompt, wanted in asked:
        got = engine.ask("POST", "/v1/completions/render", {"prompt": prompt}).json
        assert [one["token_ids"] for one in got] == wanted
    assert [one["request_id"][-2:] for one in got] == ["-0", "-1"]
    wrongs: tuple[object, ...] = ("", [{}], [["a"]])
    for wrong in wrongs:
        assert engine.ask("POST", "/v1/completions/render", {"prompt": wrong}).status == 400


def test_tokens_of_prompt_and_answer_are_told_when_asked_for(start: Start) -> None:
    engine = start()
    prompt, made = ids("<user> say it, tag=abc </s> <assistant>"), ids(said("abc", 3))
    ask = {"return_token_ids": True, "max_tokens": 3}
    whole = engine.chat(**ask).json
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (prompt, made)
    first, *rest = events(engine.chat(**ask, stream=True).body)
    assert first["prompt_token_ids"] == prompt
    assert [event["choices"][0]["token_ids"] for event in rest] == [[one] for one in made]
    assert "prompt_token_ids" not in rest[0]
    completion = {**ask, "prompt": ["tag=p", "tag=q"]}
    choices = engine.ask("POST", "/v1/completions", completion).json["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [ids("tag=p"), ids("tag=q")]
    assert [choice["token_ids"] for choice in choices] == [ids(said("p", 3)), ids(said("q", 3))]
    got = events(engine.ask("POST", "/v1/completions", {**completion, "stream": True}).body)
    tellers = [event["choices"][0] for event in got if "prompt_token_ids" in str(event)]
    assert [choice["prompt_token_ids"] for choice in tellers] == [ids("tag=p"), ids("tag=q")]


@pytest.mark.parametrize("salt", ["", 5, "a@b", "x" * 129])
def test_a_wrong_salt_is_refused(start: Start, salt: object) -> None:
    reply = start().chat(cache_salt=salt)
    told = reply.json["error"]
    assert (reply.status, told["type"], told["param"]) == (400, "BadRequestError", "cache_salt")
    assert told["message"].startswith("Parameter 'cache_salt' must be ")


# Its KV cache


CHUNK = 4


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Callable[..., Cache]]:
    made: list[Cache] = []

    def start(*flags: str) -> Cache:
        made.append(Cache(tmp_path / "tier", flags, ()))
        return made[-1].ready()

    yield start
    for cache in made:
        cache.end()


def beside(cache: Cache, *more: str) -> tuple[str, ...]:
    where = ("--kv", f"127.0.0.1:{cache.port}", "--kv-model", MODEL)
    # Long enough for a busy machine; the tests of what is lost take less.
    return (*where, "--kv-chunk", str(CHUNK), "--kv-timeout-s", "9", *more)


def complete(engine: Engine, prompt: object, **more: object) -> dict[str, Any]:
    reply = engine.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1, **more})
    usage: dict[str, Any] = reply.json["usage"]
    return usage


def cached(engine: Engine, prompt: object, **more: object) -> int:
    tokens: int = complete(engine, prompt, **more)["prompt_tokens_details"]["cached_tokens"]
    return tokens


TOKENS = list(range(10, 19))  # two full chunks and one token more


def test_a_prompt_is_cached_in_the_engine_and_beside_it(
    start: Start, caches: Callable[..., Cache]
) -> None:
    cache = caches()
    engine = start(*beside(cache))
    usage = complete(engine, TOKENS)
    assert usage["prompt_tokens"] == 9
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert [file.name for file in cache.stored(2)] == sorted(names(TOKENS))
    assert cached(engine, TOKENS) == 8
    assert cached(engine, TOKENS, cache_salt="s") == 0
    assert cached(engine, [*TOKENS[:7], 1, 2, 3]) == 4
    assert cached(start(*beside(cache)), TOKENS) == 8
    assert cached(start(*beside(cache, "--kv-workers", "2")), TOKENS) == 0
    assert engine.ask("GET", "/double/state").json["kv_lost"] is False


def test_a_whole_prompt_is_never_cached(start: Start, caches: Callable[..., Cache]) -> None:
    cache = caches("--lose-stores")
    engine = start(*beside(cache))
    cached(engine, TOKENS[:8])
    assert cached(engine, TOKENS[:8]) == 7  # LMCache has it all
    cache.http("POST", "/cache/clear")
    assert cached(engine, TOKENS[:8]) == 4  # its own cache has whole blocks
    assert cached(engine, TOKENS) == 8


def test_with_several_prompts_the_last_one_is_told_of(
    start: Start, caches: Callable[..., Cache]
) -> None:
    engine = start(*beside(caches()))
    cached(engine, TOKENS)
    usage = complete(engine, [[1, 2], TOKENS], n=2)
    assert usage["prompt_tokens"] == 11
    assert usage["prompt_tokens_details"] == {"cached_tokens": 8}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_where_it_was(
    start: Start, caches: Callable[..., Cache], stream: bool
) -> None:
    cache = caches()
    more = {"max_tokens": 7, "stream": stream, "stream_options": {"include_usage": True}}
    messages: list[dict[str, str]] = [{"role": "user", "content": "say it, tag=abc"}]
    body = start(*beside(cache)).chat(**more, messages=messages).body
    answer = text(body) if stream else json.loads(body)["choices"][0]["message"]["content"]
    # <user> say it, tag=abc </s> <assistant>, and of 7 tokens the last one was not computed.
    cache.stored(3)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
    body = start(*beside(cache)).chat(**more, messages=messages).body
    usage = (events(body)[-1] if stream else json.loads(body))["usage"]
    assert usage["prompt_tokens"] == 6 + 7 + 1 + 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 12}


def test_what_an_aborted_answer_computed_is_stored(
    start: Start, caches: Callable[..., Cache]
) -> None:
    cache = caches()
    engine = start(*beside(cache, "--stop-after", "7"))
    client = engine.streaming()
    client.until(b"abc:6 ")
    cache.stored(1)
    client.close()
    cache.stored(3)


def test_messages_tell_what_they_read_from_the_cache(
    start: Start, caches: Callable[..., Cache]
) -> None:
    engine = start(*beside(caches()))
    ask = {**PROMPT, "system": "be kind", "max_tokens": 2}
    usage = engine.ask("POST", "/v1/messages", ask).json["usage"]
    assert usage == {"input_tokens": 10, "output_tokens": 2, "cache_read_input_tokens": 0}
    assert engine.ask("POST", "/v1/messages", ask).json["usage"] == {
        "input_tokens": 2,
        "output_tokens": 2,
        "cache_read_input_tokens": 8,
    }
    begin, *_, end, _ = events(engine.ask("POST", "/v1/messages", {**ask, "stream": True}).body)
    assert begin["message"]["usage"] == {"input_tokens": 10, "output_tokens": 0}
    assert end["usage"]["cache_read_input_tokens"] == 8


def test_a_prefetch_is_of_use_to_an_engine_at_once(
    start: Start, caches: Callable[..., Cache]
) -> None:
    first = caches()
    complete(start(*beside(first)), TOKENS)
    first.stored(2)
    first.process.kill()
    cache = caches()
    engine = start(*beside(cache))
    status, told = cache.prefetch()  # its start made the model known
    assert status == 202
    assert cache.prefetched(told["request_id"])["found_keys"] == 2
    for file in cache.files():
        file.unlink()
    assert cached(engine, TOKENS) == 8
    cache.idle()
    assert not cache.files()


def test_a_cache_that_dies_is_never_asked_again(start: Start, caches: Callable[..., Cache]) -> None:
    cache = caches()
    engine = start(*beside(cache))
    cached(engine, TOKENS)
    cache.process.kill()
    assert eventually(lambda: bool(engine.ask("GET", "/double/state").json["kv_lost"]))
    assert cached(engine, TOKENS) == 8  # its own
    assert cached(engine, [1] * 9) == 0
    assert start(*beside(cache)).ask("GET", "/double/state").json["kv_lost"] is True


def test_a_cache_that_hangs_is_waited_for_once(start: Start, caches: Callable[..., Cache]) -> None:
    cache = caches()
    engine = start(*beside(cache))
    cache.process.send_signal(signal.SIGSTOP)
    client = engine.streaming()
    assert eventually(lambda: engine.gauge("num_requests_waiting") == 1)
    left = engine.streaming()
    assert eventually(lambda: engine.gauge("num_requests_waiting") == 2)
    left.close()
    assert eventually(lambda: engine.gauge("num_requests_waiting") == 1)
    engine.turn(kv_timeout_s=0.05)
    assert complete(engine, TOKENS)["prompt_tokens_details"] == {"cached_tokens": 0}
    client.until(b"[DONE]")
    assert engine.ask("GET", "/double/state").json["kv_lost"] is True
    cache.process.send_signal(signal.SIGCONT)
    assert cached(engine, [1] * 9) == 0


def test_a_start_can_wait_for_the_cache_or_fail(start: Start, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "tier", ("--load-s", "60"), ())
    try:
        engine = start(*beside(cache, "--kv-start-s", "0.1"), ready=False)
        assert engine.ended() == 1
        assert "ConnectionError: Cannot reach the LMCache MP server" in engine.printed()
        engine = start(*beside(cache, "--kv-start-s", "60"), ready=False)
        wait_until(lambda: engine.process.poll() is not None or _is_waiting(engine), "it waits")
        engine.process.terminate()
        assert engine.ended() == 0
    finally:
        cache.end()


def _is_waiting(engine: Engine) -> bool:
    """Whether it handles SIGTERM already."""
    status = Path(f"/proc/{engine.process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    blocked = re.search(r"SigBlk:\s*(\w+)", status)
    assert caught
    assert blocked
    term = 1 << (signal.SIGTERM - 1)
    return bool(int(caught[1], 16) & term and not int(blocked[1], 16) & term)


# Who runs and who waits


def test_a_client_that_leaves_frees_its_seat(start: Start) -> None:
    engine = start("--token-s", "0.001")
    for leave in (Client.close, Client.half_close):
        client = engine.streaming(max_tokens=100_000)
        client.until(b"abc:1 ")
        assert engine.gauge("num_requests_running") == 1
        leave(client)
        assert eventually(lambda: engine.gauge("num_requests_running") == 0)
    seen = engine.ask("GET", "/double/requests").json
    assert [request["outcome"] for request in seen] == ["aborted", "aborted"]


def test_an_abort_can_take_its_time(start: Start) -> None:
    engine = start("--stop-after", "2", "--abort-s", "inf")
    client = engine.streaming()
    client.until(b"abc:1 ")
    client.close()
    assert eventually(
        lambda: bool(engine.ask("GET", "/double/requests").json[0]["outcome"] == "aborted")
    )
    assert engine.gauge("num_requests_running") == 1


def test_requests_beyond_the_seats_wait_and_are_counted(start: Start) -> None:
    engine = start("--max-running", "1", "--stop-after", "3")
    first, second = engine.streaming(max_tokens=4), engine.streaming(max_tokens=4)
    first.until(b"abc:2 ")
    second.until(b"\r\n\r\n")  # its head comes before its turn
    assert engine.gauge("num_requests_running") == 1
    assert engine.gauge("num_requests_waiting") == 1
    assert engine.gauge("kv_cache_usage_perc") > 0
    engine.turn(stop_after=None)
    first.until(b"[DONE]")
    assert text(unchunked(second.until(b"\r\n0\r\n\r\n"))) == said("abc", 4)
    assert engine.gauge("generation_tokens_total") == 8
    assert engine.gauge("prompt_tokens_total") == 2 * len(PROMPT["messages"][0]["content"])
    assert engine.gauge("request_success_total") == 2


def test_a_prefill_shows_in_the_kv_cache_alone(start: Start) -> None:
    engine = start("--first-token-s", "60")
    engine.streaming().until(b"\r\n\r\n")
    before = engine.gauge("kv_cache_usage_perc")
    assert eventually(lambda: engine.gauge("kv_cache_usage_perc") > before)
    assert engine.gauge("generation_tokens_total") == 0
    engine.turn(silent=True)
    assert engine.gauge("kv_cache_usage_perc") == 0


def test_what_was_asked_can_be_recounted(start: Start, tmp_path: Path) -> None:
    engine = start("--journal", str(tmp_path / "journal"))
    engine.ask("POST", "/v1/completions", {"prompt": "x"}, "X-Request-Id: r-1\r\n")
    (seen,) = engine.ask("GET", "/double/requests").json
    assert seen["headers"]["x-request-id"] == "r-1"
    assert (seen["body_bytes"], seen["body"]) == (15, '{"prompt": "x"}')
    assert (seen["outcome"], seen["status"], seen["tokens"]) == ("finished", 200, 16)
    assert seen["started"] <= seen["finished"]
    lines = (tmp_path / "journal").read_text().splitlines()
    assert [json.loads(line)["what"] for line in lines] == ["start", "request"]


# How it misbehaves while it lives


def test_a_stream_hangs_and_goes_on_when_the_knob_is_turned(start: Start) -> None:
    engine = start("--stop-after", "3")
    client = engine.streaming(max_tokens=5)
    client.until(b"abc:2 ")
    engine.turn(stop_after=None)
    client.until(b"abc:4 ")


def test_the_first_requests_can_be_spared(start: Start) -> None:
    engine = start("--answer-status", "503:7", "--good-requests", "1")
    assert engine.chat().status == 200
    reply = engine.chat()
    assert (reply.status, reply.headers["retry-after"]) == (503, "7")
    assert reply.json["error"]["code"] == 503


def test_a_silent_engine_says_nothing_but_that_it_is_well(start: Start) -> None:
    engine = start("--silent")
    client = engine.streaming()
    assert eventually(lambda: engine.gauge("num_requests_running") == 1)
    assert engine.ask("GET", "/health").status == 200
    engine.turn(silent=False)
    assert client.reply().status == 200


@pytest.mark.parametrize(
    ("kind", "broken"),
    [("status-line", b"2OO"), ("chunk-size", b"\r\nzz\r\n"), ("content-length", b"length: 1013")],
)
def test_an_answer_can_be_malformed(start: Start, kind: str, broken: bytes) -> None:
    assert broken in start("--malformed", kind).streaming().rest()


def test_an_answer_can_come_before_the_body(start: Start) -> None:
    engine = start("--early-answer", "close")
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n"
    client = engine.client()
    client.send(head)
    assert client.rest().startswith(b"HTTP/1.1 413 ")
    engine.turn(early_answer="drain")
    client = engine.client()
    client.send(head)
    assert client.reply().status == 413
    client.send(b"123456789")
    client.ask("GET", "/health")
    assert client.reply().status == 200


def test_a_connection_can_end_early_while_the_process_lives(start: Start) -> None:
    engine = start("--die-after", "2", "--die-how", "hangup")
    assert engine.streaming().rest().endswith(b"\n\n\r\n")
    engine.turn(die_how="hangup-midchunk")
    assert not engine.streaming().rest().endswith(b"\r\n")
    assert engine.ask("GET", "/health").status == 200
    assert eventually(lambda: engine.gauge("num_requests_running") == 0)


def test_descriptors_can_leak(start: Start) -> None:
    engine = start("--fd-leak")
    before = engine.ask("GET", "/double/state").json["fds"]
    for _ in range(5):
        engine.chat()
    assert engine.ask("GET", "/double/state").json["fds"] == before + 5


def test_a_wrong_knob_changes_nothing(start: Start) -> None:
    engine = start()
    before = engine.ask("GET", "/double/knobs").json
    for wrong in ({"token_s": 1, "tokns": 2}, {"token_s": "x"}, {"core": 1}, {"uds": "y"}):
        assert engine.ask("POST", "/double/knobs", wrong).status == 400
    assert engine.ask("GET", "/double/knobs").json == before


# How it starts


def test_it_listens_only_when_it_has_loaded_and_is_well_only_when_warm(
    start: Start, tmp_path: Path
) -> None:
    control = tmp_path / "control.sock"
    flags = ("--load-s", "60", "--control", str(control))
    engine = start(*flags, ready=False)
    assert eventually(control.exists)
    assert not engine.socket.exists()
    engine.process.terminate()
    assert engine.ended() == 0
    assert start("--warm-s", "60").ask("GET", "/health").status == 503


def test_a_load_can_fail(start: Start) -> None:
    engine = start("--load-fail", "ValueError: no", "--core", ready=False)
    assert engine.ended() == 1
    assert engine.printed() == "ValueError: no\n"


def test_a_stale_socket_is_in_its_way(start: Start) -> None:
    first = start()
    first.process.kill()
    first.ended()
    again = start("--uds", str(first.socket), ready=False)
    assert again.ended() == 1
    assert "Address already in use" in again.printed()


def test_every_start_plays_the_next_act_of_its_script(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('[{"load_fail": "first"}, {"tokens": 3}]')
    assert start("--script", str(script), ready=False).ended() == 1
    assert start("--script", str(script)).chat().json["usage"]["completion_tokens"] == 3
    assert start("--script", str(script)).chat().json["usage"]["completion_tokens"] == 16


# How it dies


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("exit0", 0),
        ("exit1", 1),
        ("sigkill", -signal.SIGKILL),
        ("segv", -signal.SIGSEGV),
        ("abort", -signal.SIGABRT),
    ],
)
def test_it_dies_between_two_tokens(start: Start, how: str, status: int) -> None:
    engine = start("--die-after", "3", "--die-how", how)
    got = engine.streaming().rest()
    assert engine.ended() == status
    assert got.endswith(b"\n\n\r\n")  # whole chunks
    assert got.count(b"abc:") == 3


def test_it_dies_inside_a_chunk(start: Start) -> None:
    engine = start("--die-after", "3", "--die-how", "midchunk")
    got = engine.streaming().rest()
    assert engine.ended() == 1
    assert got.count(b"abc:") == 3
    assert not got.endswith(b"\r\n")


def test_it_dies_before_the_first_byte(start: Start) -> None:
    engine = start("--die-after", "0")
    client = engine.client()
    client.ask("POST", "/v1/chat/completions", PROMPT)
    assert client.rest() == b""
    assert engine.ended() == 1


@pytest.mark.parametrize("flags", [(), ("--core",)])
def test_when_enginecore_dies_streams_are_told_and_it_exits_0(
    start: Start, flags: tuple[str, ...]
) -> None:
    engine = start("--stop-after", "3", *flags)
    stream, whole = engine.streaming(), engine.client()
    whole.ask("POST", "/v1/chat/completions", PROMPT)
    stream.until(b"abc:2 ")
    assert eventually(lambda: engine.gauge("num_requests_running") == 2)
    tree = engine.look()
    assert engine.ask("POST", "/double/die", {"how": "core"}).status == 202
    end = stream.until(b"\r\n0\r\n\r\n")
    assert events(end)[-1]["error"]["code"] == 500
    assert b"[DONE]" in end
    assert whole.reply().status == 500
    assert engine.ask("GET", "/health").status == 503
    assert engine.chat().status == 500
    assert engine.ended() == 0
    assert "EngineDeadError" in engine.printed()
    assert all(gone(tree[name]) for name in ("core", "worker") if tree[name])


def test_a_cuda_error_is_printed_before_it_dies(start: Start) -> None:
    engine = start("--cuda-error", "1", "--core")
    engine.look()
    assert engine.chat().status == 200
    assert engine.streaming().rest() == b""
    assert engine.ended() == 1
    assert "CUDA error: an illegal memory access" in engine.printed()


@pytest.mark.parametrize(
    ("how", "printed"),
    [
        ("cuda_oom", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "),
        ("cuda_oom_words", "ValueError: Prompt"),
        ("cuda_ecc", "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"),
        ("cuda_illegal", "torch.AcceleratorError: CUDA error: an illegal memory access was"),
        ("cuda", "torch.AcceleratorError: CUDA error: unspecified launch failure"),
    ],
)
def test_each_cuda_error_is_told_as_vllm_tells_it(start: Start, how: str, printed: str) -> None:
    engine = start("--cuda-kind", "launch", "--core")
    tree = engine.look()
    assert engine.ask("POST", "/double/die", {"how": how}).status == 202
    assert engine.ended() == 1
    assert gone(tree["core"])
    lines = engine.printed().splitlines()
    errors = [line.split("] ", 1)[-1] for line in lines if line.startswith("(EngineCore pid=")]
    assert errors[0] == "EngineCore encountered a fatal error."
    assert sum(line.startswith(printed) for line in errors) == 1
    assert re.fullmatch(r"\(EngineCore pid=\d+\) Process EngineCore:", errors[len(errors) // 2])
    assert re.match(r"\(APIServer pid=\d+\) ERROR .*EngineDeadError: EngineCore enc", lines[-1])


def test_words_of_an_error_are_not_the_error(start: Start) -> None:
    engine = start("--die-how", "cuda_oom_words", "--die-after", "1")
    engine.streaming().rest()
    assert engine.ended() == 1
    printed = engine.printed()
    assert "CUDA out of memory" in printed
    assert not re.search(r"(?m)(\] |\d\) )torch\.OutOfMemoryError", printed)


def test_it_exits_unasked(start: Start) -> None:
    engine = start("--exit-after-s", "0.01", "--exit-code", "3", "--core", "--shm", "1")
    assert engine.ended() == 3


def test_it_ends_itself_after_its_time(start: Start) -> None:
    flags = ("--core", "--setsid-grandchild", "--busy", "--ignore-term")
    engine = start(*flags, "--max-life-s", "1")
    tree = engine.look()
    assert engine.ended() == -signal.SIGALRM
    assert all(gone(tree[name]) for name in ("core", "worker", "escaped", "busy"))


# What VRAM it takes


@pytest.fixture
def gpus(tmp_path: Path) -> Gpus:
    gpus = Gpus(tmp_path / "nvml")
    gpus.add(0, total_mib=10_000)
    gpus.add(1, total_mib=10_000)
    return gpus


def seeing(gpus: Gpus, *uuids: str) -> dict[str, str]:
    return {**os.environ, **gpus.env, "CUDA_VISIBLE_DEVICES": ",".join(uuids)}


def uuid(index: int) -> str:
    return f"GPU-{index:08d}-0000-0000-0000-000000000000"


@pytest.mark.parametrize(("flags", "holder"), [((), "leader"), (("--core",), "worker")])
def test_it_holds_vram_of_every_gpu_it_sees_until_it_is_gone(
    start: Start, gpus: Gpus, flags: tuple[str, ...], holder: str
) -> None:
    gpus.add(2)
    engine = start("--vram-mib", "9000", *flags, env=seeing(gpus, uuid(1), uuid(0)))
    tree = engine.look()
    for index in (0, 1):
        held = gpus.directory / "hold" / uuid(index) / str(tree[holder])
        assert held.read_text() == "9000"
    assert [gpus.used_mib(index) for index in (0, 1, 2)] == [9500, 9500, 500]
    engine.process.terminate()
    assert engine.ended() == 0
    assert eventually(lambda: [gpus.used_mib(index) for index in (0, 1)] == [500, 500])


def test_it_holds_vram_while_it_loads(start: Start, gpus: Gpus) -> None:
    start("--vram-mib", "100", "--load-s", "60", ready=False, env=seeing(gpus, uuid(0)))
    assert eventually(lambda: gpus.used_mib(0) == 600)


def test_a_worker_that_outlives_the_rest_keeps_its_vram(start: Start, gpus: Gpus) -> None:
    flags = ("--vram-mib", "100", "--core", "--ignore-term")
    engine = start(*flags, env=seeing(gpus, uuid(0)))
    tree = engine.look()
    engine.process.kill()
    engine.ended()
    os.kill(tree["core"], signal.SIGKILL)
    assert gone(tree["core"])
    assert alive(tree["worker"])
    assert gpus.used_mib(0) == 600
    os.kill(tree["worker"], signal.SIGKILL)
    assert gone(tree["worker"])
    assert eventually(lambda: gpus.used_mib(0) == 500)


SHORT = {
    "budget": (
        "ValueError: Free memory on device cuda:1 (4.39/9.77 GiB) on startup is less than desired"
        " GPU memory utilization (0.8, 7.81 GiB). Decrease GPU memory utilization or reduce GPU"
        " memory used by other processes.\n"
    ),
    "allocation": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.81 GiB. GPU 1 has a total"
        " capacity of 9.77 GiB of which 4.39 GiB is free. "
    ),
}


@pytest.mark.parametrize(("short", "printed"), SHORT.items())
def test_with_too_little_vram_it_fails_and_holds_nothing(
    start: Start, gpus: Gpus, short: str, printed: str
) -> None:
    gpus.hold(0, os.getpid(), 5000)
    flags = ("--vram-mib", "8000", "--vram-short", short, "--core")
    engine = start(*flags, ready=False, env=seeing(gpus, uuid(1), uuid(0)))
    assert engine.ended() == 1
    told = engine.printed()
    assert re.search(
        rf"\(EngineCore pid=\d+\) ERROR [-:\d ]+\[double\.py:1\] {re.escape(printed)}", told
    )
    assert told.endswith("Failed core proc(s): {'EngineCore': 1}\n")
    assert [gpus.used_mib(index) for index in (0, 1)] == [5500, 500]
    assert not engine.socket.exists()


def test_a_gpu_that_is_gone_ends_the_start(start: Start, gpus: Gpus) -> None:
    gpus.remove(0)
    engine = start("--vram-mib", "1", ready=False, env=seeing(gpus, uuid(0)))
    assert engine.ended() == 1
    assert "No CUDA GPUs are available" in engine.printed()


def test_without_a_visible_gpu_it_takes_none(start: Start, gpus: Gpus) -> None:
    assert start("--vram-mib", "1", env=seeing(gpus)).chat().status == 200
    assert not list((gpus.directory / "hold").iterdir())


# What it leaves behind


def test_a_sigterm_ends_it_and_all_that_is_its(start: Start) -> None:
    engine = start("--core", "--busy", "--shm", "3")
    tree = engine.look()
    for pid, name in ((tree["core"], "VLLM::EngineCor"), (tree["worker"], "VLLM::Worker")):
        line = Path(f"/proc/{pid}/cmdline")
        wait_until(lambda f=line, n=name: f.read_bytes().startswith(n.encode()), name)  # type: ignore[misc]
        assert Path(f"/proc/{pid}/comm").read_text().strip() == name
    assert all(Path("/dev/shm", name).stat().st_size == 65536 for name in tree["shm"])
    maps = Path(f"/proc/{tree['core']}/maps").read_text()
    assert all(name in maps for name in tree["shm"])
    engine.process.terminate()
    assert engine.ended() == 0
    assert not engine.socket.exists()
    assert not any(Path("/proc", str(tree[name])).exists() for name in ("core", "busy"))
    assert gone(tree["worker"])
    assert not any(Path("/dev/shm", name).exists() for name in tree["shm"])


def test_children_and_shared_memory_outlive_a_killed_leader(start: Start) -> None:
    engine = start("--core", "--shm", "2")
    tree = engine.look()
    engine.process.kill()
    engine.ended()
    assert alive(tree["core"])
    assert alive(tree["worker"])
    assert engine.socket.exists()
    os.kill(tree["core"], signal.SIGKILL)
    assert gone(tree["core"])
    assert gone(tree["worker"])  # as vLLM's does when its EngineCore is gone
    assert all(Path("/dev/shm", name).exists() for name in tree["shm"])


def test_an_enginecore_that_outlived_its_leader_cleans_up_when_told_to(start: Start) -> None:
    engine = start("--core", "--shm", "2")
    tree = engine.look()
    engine.process.kill()
    engine.ended()
    os.kill(tree["core"], signal.SIGTERM)
    assert gone(tree["core"])
    assert not any(Path("/dev/shm", name).exists() for name in tree["shm"])


def test_a_grandchild_escapes_and_ignores_sigterm(start: Start, tmp_path: Path) -> None:
    engine = start("--setsid-grandchild", "--tmp", "2", env={"TMPDIR": str(tmp_path)})
    tree = engine.look()
    assert os.getsid(tree["escaped"]) != os.getsid(engine.process.pid)
    os.kill(tree["escaped"], signal.SIGTERM)
    engine.process.terminate()
    assert engine.ended() == 0
    assert alive(tree["escaped"])
    assert len(list(tmp_path.glob("vllm-*"))) == 2


def test_who_escaped_can_hide_its_environment(start: Start) -> None:
    engines = [
        start("--setsid-grandchild", *flags, env={"WHOSE": "mine"})
        for flags in ([], ["--wipe-environment"])
    ]
    known, hidden = (Path(f"/proc/{e.look()['escaped']}/environ").read_bytes() for e in engines)
    assert known == b"WHOSE=mine\0"
    assert not hidden.strip(b"\0")
    assert Path(f"/proc/{engines[1].process.pid}/environ").read_bytes() == known


def test_greed_has_a_bound(start: Start) -> None:
    engine = start()
    assert engine.ask("POST", "/double/die", {"how": "greedy"}).status == 202
    assert engine.ended() == 1


def test_sigterm_can_be_ignored_by_all_of_it(start: Start) -> None:
    engine = start("--core")
    tree = engine.look()
    engine.turn(ignore_term=True)
    for pid in (tree["worker"], tree["core"], engine.process.pid):
        os.kill(pid, signal.SIGTERM)
    assert engine.ask("GET", "/health").status == 200
    assert alive(tree["core"])
    assert alive(tree["worker"])
    engine.turn(ignore_term=False)
    engine.process.terminate()
    assert engine.ended() == 0
    assert gone(tree["worker"])


def test_children_are_made_and_ended_later_too(start: Start) -> None:
    engine = start()
    engine.turn(core=True, busy=True, setsid_grandchild=True)
    tree = engine.look()
    assert all(alive(tree[name]) for name in ("core", "worker", "busy", "escaped"))
    held = engine.client()  # a fork must not keep it open
    held.ask("GET", "/health", headers="connection: close\r\n")
    held.reply()
    engine.turn(busy=False)
    assert gone(tree["busy"])
    engine.process.terminate()
    assert engine.ended() == 0
    assert held.rest() == b""


def test_what_the_parent_passed_on_is_passed_on(start: Start) -> None:
    reader, writer = os.pipe()
    engine = start("--core", pass_fds=(writer,))
    os.close(writer)
    tree = engine.look()
    assert Path(f"/proc/{tree['worker']}/fd/{writer}").exists()
    engine.process.terminate()
    assert engine.ended() == 0
    assert os.read(reader, 1) == b""  # nobody holds it any more
    os.close(reader)


def test_noise_comes_on_both_outputs(start: Start) -> None:
    engine = start("--noise", "1000", "--stderr", "hello")
    assert engine.process.stdout is not None
    assert engine.process.stderr is not None
    assert engine.process.stderr.readline() == "hello\n"
    assert "throughput" in engine.process.stderr.readline()
    assert "throughput" in engine.process.stdout.readline()
