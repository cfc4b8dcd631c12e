"""The only file that knows HTTP, ports and processes: hive as a client or operator meets it.

`Hive` runs the real daemon as a subprocess with a configuration of its own; `Stream` and `ask`
are its clients; `Double` looks at what the engine double saw.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hive.workers import guard
from steps import leaks
from steps.waiting import must, until
from tests.doubles import engine_command, lmcache_command

HIVE = [sys.executable, "-m", "hive"]
# What the engine double is told of the LMCache double.
BESIDE = ("--kv", "{kv}", "--kv-model", "{kv_path}", "--kv-chunk", "{kv_chunk}")
START_S = 20.0
STOP_S = 30.0
ROOT = Path(__file__).parent.parent


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def code(self) -> str | None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(self.json["error"]["code"])
        return None


@dataclass
class Ran:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def last_line(self) -> Any:
        """The last line on stderr, which is JSON after a failed start (contract)."""
        return json.loads(self.err.strip().splitlines()[-1])


def run_hive(*args: str, env: Mapping[str, str] | None = None, within_s: float = 60) -> Ran:
    """Run a command of the CLI to its end."""
    began = time.monotonic()
    process = subprocess.Popen(
        [*HIVE, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**_environment(), **(env or {})},
    )
    leaks.started_pids.add(process.pid)
    try:
        out, err = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(
            f"hive {' '.join(args)}: still runs after {within_s} s\n{err}"
        ) from None
    return Ran(process.returncode, out, err, time.monotonic() - began)


def _environment() -> dict[str, str]:
    """This process's, less what would configure hive behind the test's back."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HIVE_", "CUDA_"))}
    for name in ("HIVE_ENGINES",):
        if name in os.environ:
            env[name] = os.environ[name]
    return env


class Stream:
    """A streamed request, read in a thread as it arrives."""

    def __init__(self, connection: http.client.HTTPConnection, began: float) -> None:
        self._connection = connection
        self.began = began
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.is_whole = False  # ended with the last chunk
        self.ended_at: float | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            answer = self._connection.getresponse()
            self.status = answer.status
            self.headers = {k.lower(): v for k, v in answer.getheaders()}
            while piece := answer.read1(65536):
                self.pieces.append(piece)
                self.times.append(time.monotonic())
            self.is_whole = True
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass
        self.ended_at = time.monotonic()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer, once it has ended."""
        self.wait_for_end()
        assert self.ended_at is not None
        return Answer(self.status or 0, self.headers, self.body, self.ended_at - self.began)

    @property
    def events(self) -> list[str]:
        """The data of each whole event."""
        found = []
        for event in self.body.decode(errors="replace").split("\n\n")[:-1]:
            data = [line[6:] for line in event.splitlines() if line.startswith("data: ")]
            found.append("\n".join(data))
        return found

    @property
    def text(self) -> str:
        """The generated text of a chat or completions stream."""
        text = ""
        for event in self.events:
            if event != "[DONE]":
                for choice in json.loads(event).get("choices", []):
                    text += choice.get("delta", choice).get("content") or choice.get("text") or ""
        return text

    @property
    def last_error(self) -> Any:
        """The error of the last event, or None."""
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            return json.loads(self.events[-1])["error"]
        return None

    def wait_for_events(self, count: int, seconds: float = 10) -> None:
        must(
            lambda: len(self.events) >= count,
            seconds,
            lambda: f"{count} events; have {self.body!r}",
        )

    def wait_for_end(self, seconds: float = 15) -> None:
        must(
            lambda: self.ended_at is not None,
            seconds,
            lambda: f"the end of the stream; have {self.body!r}",
        )
        self._thread.join()
        self._connection.close()

    @property
    def ids(self) -> list[str]:
        """The id of each event."""
        lines = self.body.decode(errors="replace").splitlines()
        return [line[4:] for line in lines if line.startswith("id: ")]

    def leave(self) -> None:
        """Close the connection, as a client that has gone."""
        with contextlib.suppress(OSError):
            if self._connection.sock is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._connection.close()


@dataclass
class ModelConfig:
    """One [models.NAME] on the double; `knobs` are the double's flags."""

    knobs: Sequence[str] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class Hive:
    """One daemon under test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.models: dict[str, ModelConfig] = {}
        self.sections: dict[str, dict[str, Any]] = {
            "server": {"drain_s": 5},
            "restarts": {"backoff_s": 0.05, "starts": 5},
            "timeouts": {"cleanup_s": 1, "inference_s": 20, "load_s": 20},
        }
        self.keys: list[dict[str, Any]] = []
        self.key: str | None = None  # what the client and the CLI send
        self.env: dict[str, str] = {}
        self.starter: tuple[str, ...] = ()  # a program, with arguments, that becomes hive
        self.pass_fds: tuple[int, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._descriptors: int | None = None
        self._log_before = 0  # bytes that earlier lives wrote into the log

    # ── configuration ───────────────────────────────────────────────────────────────────────────

    @property
    def config(self) -> Path:
        return self.home / "hive.toml"

    @property
    def runtime(self) -> Path:
        return self.home / "r"

    @property
    def state(self) -> Path:
        return self.home / "s"

    def model(self, name: str = "m", *knobs: str, **extra: Any) -> None:
        """Configure a model on the double."""
        self.models[name] = ModelConfig(knobs, extra)

    def write_config(self) -> None:
        if any(
            m.extra.get("windows") and m.extra.get("engine") != "vllm" for m in self.models.values()
        ):
            self.sections.setdefault("windows", {}).setdefault("kv_server", lmcache_command())
        server = {
            "port": self.port,
            "state_dir": str(self.state),
            "runtime_dir": str(self.runtime),
            **self.sections.get("server", {}),
        }
        lines: list[str] = []
        for section, keys in {**self.sections, "server": server}.items():
            lines += [f"[{section}]", *(f"{k} = {_toml(v)}" for k, v in keys.items())]
        for key in self.keys:
            lines += ["[[auth.keys]]", *(f"{k} = {_toml(v)}" for k, v in key.items())]
        for name, model in self.models.items():
            fields: dict[str, Any] = {"engine": "command", **model.extra}
            if "replicas" not in fields:
                fields.setdefault("device", "cpu")
            if fields["engine"] == "command" and "command" not in fields:
                fields.setdefault("running", "vllm")
                # Each replica has a control of its own: see `double_of`.
                control = "{socket}.ctl" if "replicas" in fields else str(self.control(name))
                fields["command"] = engine_command(
                    "--uds", "{socket}", "--model", "{model}", "--control", control,
                    "--journal", str(self.journal(name)), *model.knobs,
                    *(BESIDE if fields.get("windows") else ()),
                )  # fmt: skip
            lines += [f'[models."{name}"]', *(f"{k} = {_toml(v)}" for k, v in fields.items())]
        self.config.write_text("\n".join(lines) + "\n")

    def control(self, name: str) -> Path:
        return self.home / f"{name}.ctl"

    def journal(self, name: str) -> Path:
        return self.home / f"{name}.journal"

    # ── the daemon's life ───────────────────────────────────────────────────────────────────────

    def launch(self) -> None:
        """Start the daemon and return at once."""
        self.write_config()
        self._log_before = len(self.log_text)
        with (self.home / "hive.log").open("ab") as out:
            self.process = subprocess.Popen(
                [*self.starter, *HIVE, "serve", "--config", str(self.config)],
                pass_fds=self.pass_fds,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**_environment(), **self.env},
                # As a service has: a share of the CPU of its own, where the kernel shares by session.
                start_new_session=True,
            )
        leaks.started_pids.add(self.process.pid)

    def start(
        self, *, is_ready: bool = True, is_shared: bool = False, within_s: float = START_S
    ) -> None:
        """Start the daemon; return when it listens, and when every model can serve.

        Where several tests share it, it and what it starts are no leaks of theirs.
        """
        self.launch()
        assert self.process is not None
        if is_shared:
            leaks.shared_pids.add(self.process.pid)
        self.start_was_launched(within_s, is_ready=is_ready)

    def start_was_launched(self, within_s: float, *, is_ready: bool = True) -> None:
        must(self._find_port, within_s, lambda: f"listening; its log:\n{self.log_text}")
        if is_ready:
            self.wait_ready(within_s)
            self._descriptors = self._count_descriptors()

    def _find_port(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"hive ended with {self.process.returncode}:\n{self.log_text}")
        for line in _json_lines(self.log_text[self._log_before :]):
            if line.get("event") == "daemon" and line.get("state") == "listening":
                self.port = int(line["detail"].rpartition(":")[2])
                return True
        return False

    def serve_to_the_end(self, within_s: float = 30) -> Ran:
        """`hive serve` where it is expected to end by itself."""
        self.write_config()
        return run_hive("serve", "--config", str(self.config), env=self.env, within_s=within_s)

    def wait_ready(self, within_s: float = START_S) -> None:
        def all_ready() -> bool:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"hive ended with {self.process.returncode}:\n{self.log_text}")
            return all(w["state"] == "READY" for w in self.workers)

        must(all_ready, within_s, lambda: f"every worker READY; its log:\n{self.log_text}")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait_exit(self, within_s: float = STOP_S) -> int:
        assert self.process is not None
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hive still runs after {within_s} s:\n{self.log_text}") from None

    def stop(self) -> None:
        """Stop the daemon cleanly and check that it left nothing."""
        if self.process is None:
            return
        if self.process.poll() is None:
            if self._descriptors is not None:
                self._check_descriptors(self._descriptors)
            self.signal(signal.SIGTERM)
            try:
                code = self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"hive did not stop:\n{self.log_text}") from None
            assert code == 0, f"hive ended with {code}:\n{self.log_text}"
            assert self.leftovers() == [], self.leftovers()
        self.process = None

    def leftovers(self) -> list[str]:
        """What of its workers is still there: directories, sockets."""
        found = [str(p.name) for p in (self.runtime / "w").glob("*")]
        sockets = Path("/proc/net/unix").read_text()
        found += [line for line in sockets.splitlines() if str(self.runtime) in line]
        return found

    def _count_descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def _check_descriptors(self, before: int) -> None:
        with contextlib.suppress(AssertionError, OSError):
            # A worker that is being started just now has descriptors of its own.
            until(lambda: not {w["state"] for w in self.workers} & {"STARTING", "STOPPING"}, 5)
        if not until(lambda: self._count_descriptors() <= before, 5):
            assert self.process is not None
            base = Path(f"/proc/{self.process.pid}/fd")
            names = [os.readlink(base / fd) for fd in os.listdir(base)]
            raise AssertionError(f"descriptors grew from {before} to {len(names)}: {names}")

    # ── what a client or operator sees ──────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_text(self) -> str:
        path = self.home / "hive.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def log(self) -> list[dict[str, Any]]:
        return _json_lines(self.log_text)

    @property
    def last_error(self) -> Any:
        """The error in the last line that it printed, as after a failed start."""
        return json.loads(self.log_text.strip().splitlines()[-1])["error"]

    def logged(self, event: str, **facts: object) -> list[dict[str, Any]]:
        """Log lines of an event with these facts."""
        return [
            line
            for line in self.log
            if line.get("event") == event and all(line.get(k) == v for k, v in facts.items())
        ]

    def connect(self, timeout_s: float = 30) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30,
    ) -> Answer:
        """One request, whole; `body` is JSON unless it is bytes."""
        connection = self.connect(timeout_s)
        began = time.monotonic()
        try:
            connection.request(method, path, _encoded(body), self._headers(body, headers))
            answer = connection.getresponse()
            content = answer.read()
            found = {k.lower(): v for k, v in answer.getheaders()}
            return Answer(answer.status, found, content, time.monotonic() - began)
        finally:
            connection.close()

    def stream(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> Stream:
        """One request whose answer is read in a thread as it arrives."""
        connection = self.connect()
        began = time.monotonic()
        connection.request(method, path, _encoded(body), self._headers(body, headers))
        return Stream(connection, began)

    def send_raw(self, data: bytes) -> socket.socket:
        """A connection on which these bytes were sent; the caller closes it."""
        sock = socket.create_connection(("127.0.0.1", self.port), 30)
        sock.sendall(data)
        return sock

    def _headers(self, body: Any, headers: Mapping[str, str] | None) -> dict[str, str]:
        found = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            found["Authorization"] = f"Bearer {self.key}"
        return {**found, **(headers or {})}

    def chat(self, model: str = "m", tag: str = "x", **fields: Any) -> Answer:
        return self.ask("POST", "/v1/chat/completions", chat_body(model, tag, **fields))

    def chat_stream(self, model: str = "m", tag: str = "x", **fields: Any) -> Stream:
        return self.stream("/v1/chat/completions", chat_body(model, tag, stream=True, **fields))

    def cli(self, *args: str, within_s: float = 60) -> Ran:
        """A command of the CLI that talks to this daemon."""
        env = {**self.env, "HIVE_URL": self.url}
        env |= {"HIVE_API_KEY": self.key} if self.key else {}
        return run_hive(*args, env=env, within_s=within_s)

    @property
    def workers(self) -> list[dict[str, Any]]:
        answer = self.ask("GET", "/hive/v1/workers")
        assert answer.status == 200, answer.body
        workers: list[dict[str, Any]] = answer.json["workers"]
        return workers

    def worker(self, worker_id: str = "m-0") -> dict[str, Any]:
        return next(w for w in self.workers if w["id"] == worker_id)

    def wait_state(self, state: str, worker_id: str = "m-0", within_s: float = 15) -> None:
        must(
            lambda: self.worker(worker_id)["state"] == state,
            within_s,
            lambda: f"{worker_id} {state}; it is {self.worker(worker_id)}",
        )

    def readiness(self, query: str = "") -> Answer:
        return self.ask("GET", f"/readyz{query}")

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 when the series is not there."""
        text = self.ask("GET", "/metrics").body.decode()
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(
                f'{k}="{v}"' in series for k, v in labels.items()
            ):
                return float(value)
        return 0.0

    @property
    def records(self) -> str:
        """What the guards wrote down for whoever must clean up after them."""
        return "".join(p.read_text() for p in (self.state / "ledger").glob("*.tree.json"))

    def double(self, name: str = "m") -> "Double":
        return Double(self.control(name))

    def cache(self) -> http.client.HTTPConnection:
        """LMCache's own interface, which only hive talks to."""
        command = Path(f"/proc/{self.worker('lmcache')['pid']}/cmdline").read_bytes()
        words = command.decode().split("\0")
        port = int(words[words.index("--http-port") + 1])
        return http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def turn_cache(self, **knobs: object) -> None:
        """Turn knobs of the LMCache double."""
        connection = self.cache()
        try:
            connection.request("POST", "/double/knobs", json.dumps(knobs))
            assert connection.getresponse().status == 200
        finally:
            connection.close()

    def double_of(self, worker_id: str) -> "Double":
        """The double behind one of several replicas."""
        command = Path(f"/proc/{self.worker(worker_id)['pid']}/cmdline").read_bytes()
        words = command.decode().split("\0")
        return Double(Path(words[words.index("--control") + 1]))

    def tree(self, worker_id: str = "m-0") -> list[guard.Process]:
        """The guard of a worker and every process below it."""
        guard_pid = self.worker(worker_id)["guard_pid"]
        root = guard.look_at(guard_pid)
        return ([root] if root else []) + guard.descendants(guard_pid)


class Double:
    """What the engine double saw and holds, asked over its control socket."""

    def __init__(self, control: Path) -> None:
        self._control = control

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return json.loads(self.ask_text(method, path, body))

    def ask_text(self, method: str, path: str, body: Any = None) -> str:
        connection = http.client.HTTPConnection("double", timeout=5)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(str(self._control))
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, _encoded(body), headers)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", "/double/state")
        return found

    @property
    def requests(self) -> list[dict[str, Any]]:
        found: Any = self.ask("GET", "/double/requests")
        seen: list[dict[str, Any]] = found["requests"] if isinstance(found, dict) else found
        return seen

    def set(self, **knobs: Any) -> None:
        self.ask("POST", "/double/knobs", knobs)

    def die(self, how: str) -> None:
        """Have it die; its answer to that may be lost with it."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self.ask("POST", "/double/die", {"how": how})

    def wait_running(self, count: int, seconds: float = 10) -> None:
        """Until it generates for `count` requests, and nobody waits."""

        def is_so() -> bool:
            state = self.state
            return bool(state["running"] == count and state["waiting"] == 0)

        must(is_so, seconds, lambda: f"{count} running in the engine; it has {self.state}")


def journal(path: Path) -> list[dict[str, Any]]:
    """What the double wrote down: a line for each start and each request."""
    return _json_lines(path.read_text()) if path.exists() else []


def _json_lines(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def chat_body(model: str = "m", tag: str = "x", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"tag={tag}"}], **fields}


def _encoded(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value)


@contextlib.contextmanager
def new_hive() -> Iterator[Hive]:
    """A daemon to configure and start; stopped, and checked, at the end."""
    hive = Hive(Path(tempfile.mkdtemp(prefix="hv", dir="/tmp")))
    try:
        yield hive
        hive.stop()
    finally:
        if hive.process is not None and hive.process.poll() is None:
            hive.process.kill()
            hive.process.wait()
        shutil.rmtree(hive.home, ignore_errors=True)


@pytest.fixture(name="hive")
def _hive() -> Iterator[Hive]:
    """A daemon of one test."""
    with new_hive() as hive:
        yield hive
