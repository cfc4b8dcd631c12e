"""A crowd of clients that ask for everything at random, and judge each answer that they get.

An answer is whole, to the last token, or a coded error that a broken engine explains. Anything
else is a fault: it is put down, and fails the test that made the crowd.
"""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from steps.driver import Hive, chat_body

CHAT = "/v1/chat/completions"
# What may become of a request whose engine is killed, stopped or on a broken device.
ERRORS = {
    "WORKER_CRASHED": 502,
    "SERVICE_UNAVAILABLE": 503,
    "GPU_QUARANTINED": 503,
    "CUDA_DEVICE_FAILED": 500,
    "GPU_VRAM_EXHAUSTED": 500,
}
OPERATORS = ("/hive/v1/workers", "/hive/v1/status", "/hive/v1/devices", "/metrics", "/livez")
MOST_TOKENS = 60
PAUSE_S = 0.05  # between two requests of a client, at most
STREAM_S = 15.0  # far beyond what the longest answer takes


class Crowd:
    """What all clients of a test have in common: where they ask, and what they have seen."""

    def __init__(self, hive: Hive, models: tuple[str, ...]) -> None:
        self.hive, self.models = hive, models
        self.lives = 1  # of hive: while this changes, connections may break
        self.up = threading.Event()  # hive listens
        self.over = threading.Event()  # nobody asks any more
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.last: deque[str] = deque(maxlen=60)  # what happened, and what was done
        self._began = time.monotonic()
        self._writing = threading.Lock()
        self._clients: list[threading.Thread] = []

    def note(self, said: str) -> None:
        self.last.append(f"{time.monotonic() - self._began:8.3f} {said}")

    def count(self, what: str) -> None:
        with self._writing:
            self.counts[what] += 1

    def fault(self, said: str) -> None:
        self.note(f"FAULT {said}")
        with self._writing:
            self.faults.append(said)

    def come(self, seeds: list[str]) -> None:
        """Let one client begin for each seed."""
        self.over.clear()
        for seed in seeds:
            client = Client(self, random.Random(seed), seed)
            self._clients.append(threading.Thread(target=client.run, name=seed, daemon=True))
            self._clients[-1].start()

    def go(self, within_s: float) -> None:
        """Let every client finish what it is at; one that cannot has been waiting for nothing."""
        self.over.set()
        self.up.set()
        until = time.monotonic() + within_s
        for thread in self._clients:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self.fault(f"client {thread.name} still waits after {within_s:g} s")
        self._clients.clear()


class Client:
    """One client: asks, waits or leaves, judges, pauses, and asks again."""

    def __init__(self, crowd: Crowd, chance: random.Random, name: str) -> None:
        self.crowd, self.chance, self.name = crowd, chance, name
        self._asked = 0

    def run(self) -> None:
        kinds: list[Callable[[], None]] = [self._whole, self._stream, self._leave, self._operate]
        while not self.crowd.over.is_set():
            (kind,) = self.chance.choices(kinds, (4, 5, 3, 1))
            pause_s = self.chance.uniform(0, PAUSE_S)
            if not self.crowd.up.wait(1):
                continue
            lives = self.crowd.lives
            try:
                kind()
            except (OSError, http.client.HTTPException) as exc:
                self._broken(lives, f"{kind.__name__}: {exc!r}")
            except Exception as exc:  # noqa: BLE001 (a client that ends of it would tell nobody)
                self.crowd.fault(f"{self.name}: {kind.__name__}: {exc!r}")
            self.crowd.over.wait(pause_s)

    def _broken(self, lives: int, said: str) -> None:
        """A connection that broke is explained by hive's own end alone."""
        if self.crowd.lives == lives and self.crowd.up.is_set():
            self.crowd.fault(f"{self.name}: a broken connection: {said}")
        self.crowd.count("broken by hive's kill")

    def _ask_for(self, **fields: Any) -> tuple[dict[str, Any], str]:
        """A chat's body, and the text that it is to be answered with."""
        self._asked += 1
        tag, tokens = f"{self.name}-{self._asked}", self.chance.randint(1, MOST_TOKENS)
        model = self.chance.choice(self.crowd.models)
        text = "".join(f"{tag}:{k} " for k in range(tokens))
        return chat_body(model, tag, max_tokens=tokens, **fields), text

    def _whole(self) -> None:
        body, text = self._ask_for()
        answer = self.crowd.hive.ask("POST", CHAT, body)
        if answer.status == 200:
            said = answer.json["choices"][0]["message"]["content"]
            self._judge_text("whole", said, text)
        else:
            self._judge_error(answer.status, answer.body)

    def _stream(self) -> None:
        body, text = self._ask_for(stream=True)
        lives = self.crowd.lives
        stream = self.crowd.hive.stream(CHAT, body)
        try:
            stream.wait_for_end(STREAM_S)
        except AssertionError as exc:
            self.crowd.fault(f"{self.name}: {exc}")
            stream.leave()
            return
        if not stream.is_whole:
            self._broken(lives, f"{stream.status} {stream.body[-300:]!r}")
        elif stream.status != 200:
            self._judge_error(stream.status or 0, stream.body)
        elif stream.last_error:
            self._judge_error(None, json.dumps({"error": stream.last_error}).encode())
        elif stream.events[-1] != "[DONE]":
            self.crowd.fault(f"{self.name}: ends without a word: {stream.body[-300:]!r}")
        else:
            self._judge_text("streamed", stream.text, text)

    def _leave(self) -> None:
        """Ask, and be gone: at once, before the answer, or in the middle of it."""
        body, _ = self._ask_for(stream=self.chance.random() < 0.7)
        connection = self.crowd.hive.connect()
        try:
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            sock = connection.sock
            sock.settimeout(self.chance.uniform(0.001, 0.3))
            with suppress(TimeoutError):
                for _ in range(self.chance.randrange(8)):
                    if not sock.recv(512):
                        break
            if self.chance.random() < 0.5:
                sock.shutdown(socket.SHUT_RDWR)
        finally:
            connection.close()
        self.crowd.count("left")

    def _operate(self) -> None:
        path = self.chance.choice([*OPERATORS, "/readyz", "/hive/v1/events"])
        if path == "/hive/v1/events":
            watcher = self.crowd.hive.stream(path, method="GET")
            self.crowd.over.wait(self.chance.uniform(0, 0.5))
            watcher.leave()
        else:
            status = self.crowd.hive.ask("GET", path).status
            if status != 200 and (path, status) != ("/readyz", 503):
                self.crowd.fault(f"{self.name}: {path} is answered with {status}")
        self.crowd.count("operated")

    def _judge_text(self, how: str, said: str, expected: str) -> None:
        if said != expected:
            self.crowd.fault(f"{self.name}: {how}, but {said!r} instead of {expected!r}")
        self.crowd.count(how)

    def _judge_error(self, status: int | None, body: bytes) -> None:
        """`status` is None for an error in a stream that had begun."""
        try:
            error = json.loads(body)["error"]
            code, told = error["code"], error["details"]
            is_right = ERRORS[code] == told["http_status"] and told["suggested_action"]
            if not is_right or status not in (None, ERRORS[code]):
                self.crowd.fault(f"{self.name}: status {status} with {body!r}")
        except (ValueError, KeyError, TypeError):
            self.crowd.fault(f"{self.name}: status {status} with {body!r}")
            return
        self.crowd.count(f"{code}{' in a stream' if status is None else ''}")
