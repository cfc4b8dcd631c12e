"""The LMCache double keeps, finds and loses blocks as LMCache would, or as it is told."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from hive.policy.windows import Shape, block_names, chain
from tests.patience import wait_until

DOUBLE = Path(__file__).parent / "lmcache"
DEADLINE_S = 10.0
MODEL = "/models/tiny"
CHUNK = 4
BLOCK_BYTES = 2048
TOKENS = list(range(10, 19))  # two full chunks and one token more


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cache:
    """One run of the double."""

    def __init__(self, directory: Path, flags: tuple[str, ...], options: tuple[str, ...]) -> None:
        self.directory = directory
        self.port, self.http_port = free_port(), free_port()
        files = {"type": "fs", "base_path": str(directory), "relative_tmp_dir": "tmp"}
        command = [sys.executable, "-I", str(DOUBLE), "--max-life-s", "60", *flags, "server"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--http-host", "127.0.0.1"]
        command += [f"--http-port={self.http_port}", "--l1-size-gb", "1.5"]
        command += ["--chunk-size", str(CHUNK), "--eviction-policy", "LRU"]
        command += ["--supported-transfer-mode", "engine_driven", "--l2-adapter", json.dumps(files)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*command, *options], stdout=pipe, text=True)
        self._engine: socket.socket | None = None
        self._told = b""

    def ready(self) -> "Cache":
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "LMCache double ready\n"
        return self

    def http(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        with closing(HTTPConnection("127.0.0.1", self.http_port, timeout=DEADLINE_S)) as client:
            client.request(method, path, json.dumps(body) if body is not None else None)
            reply = client.getresponse()
            return reply.status, json.loads(reply.read())

    def turn(self, **knobs: object) -> None:
        assert self.http("POST", "/double/knobs", knobs)[0] == 200

    def op(self, op: str, tokens: list[int] = TOKENS, **more: object) -> Any:
        body = {"op": op, "model": MODEL, "workers": 1, "salt": "", "tokens": tokens, **more}
        return self.line(json.dumps(body))

    def line(self, line: str) -> Any:
        if self._engine is None:
            self._engine = socket.create_connection(("127.0.0.1", self.port), DEADLINE_S)
        self._engine.sendall(line.encode() + b"\n")
        while b"\n" not in self._told:
            data = self._engine.recv(65536)
            assert data, "it hung up"
            self._told += data
        told, _, self._told = self._told.partition(b"\n")
        return json.loads(told)

    def hit(self, tokens: list[int] = TOKENS, **more: object) -> int:
        hit: int = self.op("lookup", tokens, **more)["hit_tokens"]
        return hit

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.is_file())

    def stored(self, count: int) -> list[Path]:
        wait_until(lambda: len(self.files()) == count, f"{count} files", DEADLINE_S)
        return self.files()

    def idle(self) -> None:
        """Wait until what is in RAM is on disk, as far as it ever will be."""
        wait_until(
            lambda: (
                self.http("GET", "/status")[1]["storage_manager"]["store_controller"][
                    "in_flight_task_count"
                ]
                == 0
            ),
            "no stores on their way",
        )

    def prefetch(self, **body: object) -> tuple[int, Any]:
        asked = {"model_name": MODEL, "world_size": 1, "token_ids": TOKENS, **body}
        return self.http("POST", "/cache/prefetches", asked)

    def prefetched(self, id_: str) -> Any:
        told: list[Any] = []

        def look() -> bool:
            status, body = self.http("GET", f"/cache/prefetches/{id_}")
            assert status == 200
            told.append(body)
            return bool(body["status"] == "completed")

        wait_until(look, "the prefetch", DEADLINE_S)
        return told[-1]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._engine is not None:
            self._engine.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Cache]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Start]:
    caches: list[Cache] = []

    def launch(*flags: str, options: tuple[str, ...] = ()) -> Cache:
        caches.append(Cache(tmp_path / "tier", flags, options))
        return caches[-1]

    yield launch
    for cache in caches:
        cache.end()


@pytest.fixture
def start(launch: Start) -> Start:
    return lambda *flags, **more: launch(*flags, **more).ready()


def names(tokens: list[int], workers: int = 1, salt: str = "") -> list[str]:
    shape = Shape(MODEL, workers, CHUNK)
    return [name for hash_ in chain(tokens, CHUNK) for name in block_names(shape, hash_, salt)]


# What it keeps


@pytest.mark.parametrize(("workers", "salt"), [(1, ""), (4, "s-1")])
def test_every_chunk_becomes_a_file_for_every_worker(start: Start, workers: int, salt: str) -> None:
    cache = start()
    assert cache.op("store", workers=workers, salt=salt) == {}
    files = cache.stored(2 * workers)
    assert {file.name for file in files} == set(names(TOKENS, workers, salt))
    assert {file.stat().st_size for file in files} == {BLOCK_BYTES}
    assert len({file.read_bytes() for file in files}) == 2 * workers
    assert not list((cache.directory / "tmp").iterdir())
    assert cache.hit(workers=workers, salt=salt) == 2 * CHUNK
    assert cache.hit(workers=workers, salt="other") == cache.hit(workers=2, salt=salt) == 0


def test_a_prefix_is_found_as_far_as_it_is_the_same(start: Start) -> None:
    cache = start()
    cache.op("store")
    assert cache.hit(TOKENS + TOKENS) == 2 * CHUNK
    assert cache.hit([*TOKENS[:6], 1, 2]) == CHUNK
    assert cache.hit(TOKENS[:3]) == cache.hit(TOKENS[1:]) == 0


def test_files_stay_and_are_found_after_a_new_start(start: Start) -> None:
    first = start()
    first.op("store")
    before = {file.name: file.read_bytes() for file in first.stored(2)}
    first.process.kill()
    second = start()
    assert second.hit() == 2 * CHUNK
    second.files()[0].unlink()
    second.op("store")
    assert {file.name: file.read_bytes() for file in second.stored(2)} == before


def test_only_a_prefix_of_whole_files_is_found(start: Start) -> None:
    first = start()
    first.op("store", workers=2)
    first.stored(4)
    first.process.kill()
    cache = start()
    last_of_second = cache.directory / names(TOKENS, 2)[3]
    whole = last_of_second.read_bytes()
    last_of_second.write_bytes(whole[:-1])
    assert cache.hit(workers=2) == CHUNK
    last_of_second.write_bytes(whole + b"more")
    assert cache.hit(workers=2) == 2 * CHUNK
    (cache.directory / names(TOKENS, 2)[0]).unlink()
    assert cache.hit(workers=2) == 0


@pytest.mark.parametrize(("options", "hit"), [((), 0), (("--l2-prefetch-policy=retain",), 8)])
def test_what_a_lookup_read_from_disk_stays_in_ram_only_if_told(
    start: Start, options: tuple[str, ...], hit: int
) -> None:
    first = start()
    first.op("store")
    first.stored(2)
    first.process.kill()
    cache = start(options=options)
    assert cache.hit() == 8
    for file in cache.files():
        file.unlink()
    assert cache.hit() == hit


def test_a_chunk_in_ram_is_not_written_again(start: Start) -> None:
    cache = start()
    cache.op("store")
    removed = cache.stored(2)[0]
    removed.unlink()
    cache.op("store", [*TOKENS, 1, 2, 3])
    assert cache.hit([*TOKENS, 1, 2, 3]) == 3 * CHUNK
    cache.stored(2)
    cache.idle()
    assert removed not in cache.files()


def test_what_is_stored_already_can_be_skipped(start: Start) -> None:
    cache = start()
    cache.op("store", skip=CHUNK)
    assert [file.name for file in cache.stored(1)] == names(TOKENS)[1:]
    assert cache.hit() == 0


def test_it_says_what_it_does_not_understand(start: Start) -> None:
    cache = start()
    assert "JSONDecodeError" in cache.line("nonsense")["error"]
    assert "error" in cache.line('{"op": "lookup"}')
    assert "error" in cache.op("drop")
    assert "error" in cache.op("store", [-1] * CHUNK)
    assert "must not contain" in cache.op("store", salt="a@b")["error"]
    assert cache.hit() == 0


# Its HTTP


def test_it_says_that_it_is_well(start: Start) -> None:
    cache = start()
    assert cache.http("GET", "/healthcheck") == (200, {"status": "healthy"})
    cache.op("store")
    status, told = cache.http("GET", "/status")
    assert (status, told["is_healthy"], told["chunk_size"]) == (200, True, CHUNK)
    assert told["storage_manager"]["l1_manager"]["total_object_count"] == 2
    assert told["storage_manager"]["l2_adapters"][0]["base_path"] == str(cache.directory)
    cache.turn(health_status=503)
    assert cache.http("GET", "/healthcheck")[0] == 503
    assert cache.http("GET", "/nothing") == (404, {"detail": "Not Found"})
    assert cache.http("POST", "/status", {})[0] == 405


def test_a_prefetch_brings_blocks_into_ram(start: Start) -> None:
    first = start()
    first.op("store", workers=2)
    first.stored(4)
    first.process.kill()
    cache = start()
    (cache.directory / names(TOKENS, 2)[3]).unlink()
    status, told = cache.prefetch(world_size=2)
    assert status == 503
    assert told["detail"].startswith("no layout registered for model_name='/models/tiny'")
    assert cache.hit([], workers=2) == 0  # makes the model known
    status, told = cache.prefetch(world_size=2)
    id_ = told["request_id"]
    assert (status, told) == (202, {"request_id": id_, "chunks": 2, "status": "submitted"})
    done = {"request_id": id_, "status": "completed", "found_keys": 2, "total_keys": 4}
    assert cache.prefetched(id_) == done
    status, told = cache.http("GET", f"/cache/prefetches/{id_}")
    assert status == 404
    assert told["detail"].startswith("unknown prefetch request_id=")
    for file in cache.files():
        file.unlink()
    assert cache.hit(workers=2) == CHUNK


def test_a_prefetch_can_take_its_time(start: Start) -> None:
    cache = start("--prefetch-s", "60")
    cache.hit([])
    _, told = cache.prefetch()
    pending = {"request_id": told["request_id"], "status": "pending"}
    assert cache.http("GET", f"/cache/prefetches/{told['request_id']}") == (200, pending)


def test_a_wrong_prefetch_is_refused(start: Start) -> None:
    cache = start()
    cache.hit([])
    assert cache.prefetch(token_ids=[1, 2]) == (202, {"chunks": 0, "status": "noop"})
    assert cache.prefetch(cache_salt="a/b")[0] == 400
    assert cache.prefetch(source_tier="l1")[0] == 400
    assert cache.prefetch(world_size=2)[0] == 503
    status, told = cache.prefetch(token_ids="x")
    assert (status, told["detail"][0]["loc"]) == (422, ["body", "token_ids"])


def test_a_model_is_known_as_long_as_its_engine_is_connected(start: Start) -> None:
    cache = start()
    cache.hit([])
    assert cache.prefetch()[0] == 202
    assert cache._engine is not None
    cache._engine.close()
    wait_until(lambda: cache.prefetch()[0] == 503, "it forgets the model", DEADLINE_S)


@pytest.mark.parametrize(
    ("tier", "deleted", "files", "hit"), [("l1", 2, 2, 8), ("l2", 2, 0, 8), ("all", 4, 0, 0)]
)
def test_objects_are_deleted_from_ram_and_disk(
    start: Start, tier: str, deleted: int, files: int, hit: int
) -> None:
    cache = start()
    cache.op("store")
    cache.stored(2)
    keys = [
        {"chunk_hash_hex": hash_.hex(), "model_name": MODEL, "kv_rank": 0x01000100}
        for hash_ in chain(TOKENS, CHUNK)
    ]
    told = cache.http("DELETE", "/cache/objects", {"keys": keys, "tier": tier})
    assert told == (200, {"deleted": deleted, "skipped": 0, "ok": True})
    assert (len(cache.files()), cache.hit()) == (files, hit)


def test_ram_can_be_cleared(start: Start) -> None:
    cache = start("--lose-stores")
    cache.op("store")
    assert cache.http("POST", "/cache/clear") == (200, {"status": "ok", "cleared": {"tier": "l1"}})
    assert cache.hit() == 0


# How it misbehaves


def test_a_store_can_reach_the_disk_late_or_never(start: Start) -> None:
    cache = start("--store-s", "60")
    cache.op("store", TOKENS[:CHUNK])
    assert cache.hit() == CHUNK  # RAM has it at once
    cache.turn(store_s=0, lose_stores=True)
    cache.op("store", [1] * CHUNK)
    cache.turn(lose_stores=False)
    cache.op("store", [2] * CHUNK)
    assert [file.name for file in cache.stored(1)] == names([2] * CHUNK)


def test_every_nth_write_can_fail(start: Start) -> None:
    cache = start("--fail-every", "3")
    tokens = list(range(6 * CHUNK))
    cache.op("store", tokens)
    wanted = [name for index, name in enumerate(names(tokens), 1) if index % 3]
    assert [file.name for file in cache.stored(4)] == sorted(wanted)
    assert cache.hit(tokens) == 6 * CHUNK


def test_a_health_check_can_hang(start: Start) -> None:
    cache = start("--health-s", "inf")
    with closing(socket.create_connection(("127.0.0.1", cache.http_port), DEADLINE_S)) as client:
        client.sendall(b"GET /healthcheck HTTP/1.1\r\n\r\n")
        assert cache.http("GET", "/status")[0] == 200
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)


def test_it_listens_only_when_it_has_loaded(launch: Start) -> None:
    cache = launch("--load-s", "60")
    with pytest.raises(ConnectionRefusedError):
        cache.http("GET", "/healthcheck")
    cache.process.terminate()
    assert cache.process.wait(DEADLINE_S) in (0, -signal.SIGTERM)  # Python may not be up yet
    assert cache.process.stdout is not None
    assert cache.process.stdout.read() == ""


def test_it_ends_at_once_when_told(start: Start) -> None:
    cache = start("--store-s", "60")
    cache.op("store")
    cache.process.terminate()
    assert cache.process.wait(DEADLINE_S) == 0
    assert not cache.files()


def test_it_ends_itself_after_its_time(launch: Start) -> None:
    cache = launch("--max-life-s", "0.5")
    assert cache.process.wait(DEADLINE_S) == -signal.SIGALRM


def test_a_wrong_knob_changes_nothing(start: Start) -> None:
    cache = start()
    before = cache.http("GET", "/double/knobs")
    for wrong in ({"store_s": 1, "stroe": 2}, {"fail_every": "x"}, {"load_s": 1}):
        assert cache.http("POST", "/double/knobs", wrong)[0] == 400
    assert cache.http("GET", "/double/knobs") == before


def test_options_of_lmcache_that_mean_nothing_here_are_taken(start: Start) -> None:
    cache = start(options=("--max-workers", "4", "--l1-use-lazy", "--session-ttl-seconds=9"))
    assert cache.hit() == 0


def test_a_wrong_option_ends_the_start(launch: Start) -> None:
    cache = launch(options=("--port", "x"))
    assert cache.process.wait(DEADLINE_S) == 2
    assert os.listdir(cache.directory.parent) == []
