"""What a scenario remembers from one step to the next: its daemon, its clients, what they got."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hive.workers import guard
from steps import leaks
from steps.driver import Answer, Double, Hive, Ran, Stream, chat_body
from steps.waiting import must

MODEL = "llama"
WORKER = "llama-0"
CHAT = "/v1/chat/completions"


class Story:
    """One scenario. The last thing that was asked is what `Then` looks at."""

    def __init__(self, hive: Hive) -> None:
        self.hive = hive
        self.clients: list[Stream] = []
        self.watcher: Stream | None = None  # of the event stream
        self.ran: Ran | None = None
        self.processes: list[guard.Process] = []  # a worker's tree, before something happened
        self.shared_memory: set[str] = set()
        self.happened_at = 0.0
        self.starts = 0  # of the worker, at that time
        self.sent = b""  # what must not be repeated in an answer
        self.sockets: list[socket.socket] = []
        self.follower: subprocess.Popen[bytes] | None = None
        self.kept: dict[str, Any] = {}
        self._answer: Answer | None = None

    # ── clients ─────────────────────────────────────────────────────────────────────────────────

    def begin(self, path: str = CHAT, body: Any = None, **headers: str) -> Stream:
        """Send a request and do not wait for its answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = chat_body(MODEL, f"c{len(self.clients)}", stream=True) if body is None else body
        self.clients.append(self.hive.stream(path, body, named))
        self._answer = None
        return self.clients[-1]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request and wait for its whole answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._answer = self.hive.ask(method, path, body, named)
        return self._answer

    @property
    def client(self) -> Stream:
        assert self.clients, "no client has asked for anything"
        return self.clients[-1]

    @property
    def answer(self) -> Answer:
        """The last answer, waited for if it is on its way."""
        return self._answer or self.client.answer

    def heard(self, answer: Answer) -> None:
        self._answer = answer

    # ── the engine ──────────────────────────────────────────────────────────────────────────────

    @property
    def double(self) -> Double:
        return self.hive.double(MODEL)

    def look_at_tree(self) -> None:
        """Remember the worker's processes, what they map, and when that was."""
        self.processes = self.hive.tree(WORKER)
        self.starts = self.hive.worker(WORKER)["starts"]
        for process in self.processes:
            self.shared_memory |= leaks.shm_of(process.pid)
        self.happened_at = time.monotonic()

    def look_at_tree_if_any(self) -> None:
        if self.hive.worker(WORKER)["pid"]:
            self.look_at_tree()

    def member(self, name: str) -> guard.Process:
        """A living member of the worker's tree, by the beginning of its name."""
        return next(p for p in self.hive.tree(WORKER) if p.name.startswith(name))

    def must_be_gone(self, within_s: float) -> None:
        """Every remembered process has ended."""
        must(
            lambda: not any(map(is_alive, self.processes)),
            within_s,
            lambda: f"the end of {[p for p in self.processes if is_alive(p)]}",
        )

    def end(self) -> None:
        for client in [*self.clients, *([self.watcher] if self.watcher else [])]:
            client.leave()
        for sock in self.sockets:
            sock.close()
        if self.follower is not None:
            if self.follower.poll() is None:
                self.follower.kill()
            self.follower.communicate()
        process = self.hive.process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


def is_alive(process: guard.Process) -> bool:
    """Whether it is the same process, and not only its exit status that nobody collected."""
    now = guard.look_at(process.pid)
    return now is not None and now.start == process.start and now.state not in "ZX"


@pytest.fixture
def story(hive: Hive) -> Iterator[Story]:
    told = Story(hive)
    yield told
    told.end()
