"""What is measured side by side: each on one core, in front of the same stub engine."""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gateway.load import KEY, Address
from hive.workers import guard
from steps.driver import Hive

THEIRS, OURS = 0, 1  # the core of what is measured, that of clients and engines
NICE = 10  # as hive runs an engine on the CPU
START_S = 20.0
TOOLS = Path(".bench")  # where `make bench-tools` puts what is not in hive's own environment
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Contestant:
    """`pids` are the first processes of what is measured; `engine` answers /left and /metrics."""

    name: str
    address: Address
    engine: Address
    pids: tuple[int, ...]
    refusal: str | None = None  # path that is refused, or of a full model
    spare: frozenset[int] = frozenset()  # processes below them that are not theirs: the engine

    def processes(self) -> set[int]:
        everything = list(guard.every_process())
        found = set(self.pids)
        for pid in self.pids:
            found |= {p.pid for p in guard.descendants(pid, everything)}
        return found - self.spare

    def cpu_s(self) -> float:
        """CPU time of the process tree, seconds; finer than ticks, from the scheduler."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def rss_mb(self) -> float:
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                total += int(found[1]) if found else 0
        return total / 1024


@contextlib.contextmanager
def running(*argv: str, core: int, quiet: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A process on one core, ended with the block."""
    process = subprocess.Popen(
        ["taskset", "-c", str(core), *argv],
        stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
    )
    try:
        yield process
    finally:
        children = list(guard.descendants(process.pid))
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                if (now := guard.look_at(child.pid)) and now.start == child.start:
                    os.kill(child.pid, 9)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def stub() -> Iterator[Address]:
    argv = ("nice", "-n", str(NICE), sys.executable, "-m", "benchmarks.gateway.stub", "--port", "0")
    with running(*argv, core=OURS, quiet=False) as process:
        assert process.stdout is not None
        yield "127.0.0.1", int(process.stdout.readline())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _answers(port: int, path: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at port {port}"
            time.sleep(0.1)


# ── each of them ────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def direct() -> Iterator[Contestant]:
    with stub() as engine:
        yield Contestant("direct", engine, engine, ())


@contextlib.contextmanager
def hive() -> Iterator[Contestant]:
    """With keys, so that every request is checked; model "full" has one slot, which is taken."""
    port, other = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as home:
        made = Hive(Path(home))
        made.starter = ("taskset", "-c", str(THEIRS))
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        made.keys = [
            {
                "name": "bench",
                "sha256": digest,
                "scopes": ["inference", "admin"],
                "max_concurrent": 0,
                "requests_per_minute": 0,
            }
        ]
        made.key = KEY
        made.sections = {"server": {"drain_s": 1}}
        for name, at, slots, room in (("m", port, 4096, 0), ("full", other, 1, 0)):
            engine = ("taskset", "-c", str(OURS), sys.executable, "-m", "benchmarks.gateway.stub")
            made.model(
                name,
                running="vllm",
                command=[*engine, "--uds", "{socket}", "--port", str(at)],
                env={"PYTHONPATH": os.getcwd()},
                max_concurrent=slots,
                queue_depth=room,
            )
        made.start()
        try:
            assert made.process is not None
            guards = [worker["guard_pid"] for worker in made.workers]
            spare = frozenset(p.pid for pid in guards for p in guard.descendants(pid))
            yield Contestant(
                "hive",
                ("127.0.0.1", made.port),
                ("127.0.0.1", port),
                (made.process.pid,),
                "full",
                spare,
            )
        finally:
            made.stop()


NGINX = """
worker_processes 1; daemon off; pid {home}/pid; error_log /dev/null;
events {{ worker_connections 8192; }}
http {{
  access_log {home}/access; client_body_temp_path {home}/b; proxy_temp_path {home}/p;
  fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 512; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 100000000; client_body_buffer_size 1m;
    location /refused {{ return 503 '{{"error": {{"message": "full"}}}}'; }}
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


@contextlib.contextmanager
def nginx() -> Iterator[Contestant]:
    with stub() as engine, tempfile.TemporaryDirectory(prefix="ng", dir="/tmp") as home:
        port = free_port()
        config = Path(home, "nginx.conf")
        config.write_text(NGINX.format(home=home, engine=engine[1], port=port))
        with running("nginx", "-c", str(config), "-p", home, core=THEIRS) as process:
            _answers(port, "/health")
            address = ("127.0.0.1", port)
            yield Contestant("nginx", address, engine, (process.pid,), "/refused")


HAPROXY = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  option http-no-delay
  option http-keep-alive
  option abortonclose
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend clients
  bind 127.0.0.1:{port}
  http-request return status 503 content-type application/json string full if {{ path /refused }}
  default_backend engines
backend engines
  server engine 127.0.0.1:{engine}
"""


@contextlib.contextmanager
def haproxy() -> Iterator[Contestant]:
    with stub() as engine, tempfile.TemporaryDirectory(prefix="ha", dir="/tmp") as home:
        port = free_port()
        config = Path(home, "haproxy.cfg")
        config.write_text(HAPROXY.format(engine=engine[1], port=port))
        with running("haproxy", "-db", "-f", str(config), core=THEIRS) as process:
            _answers(port, "/health")
            yield Contestant("haproxy", ("127.0.0.1", port), engine, (process.pid,), "/refused")


@contextlib.contextmanager
def _router(name: str, *argv: str) -> Iterator[Contestant]:
    with stub() as engine:
        port = free_port()
        url = f"http://127.0.0.1:{engine[1]}"
        argv = (*argv, "--prometheus-port", str(free_port()))  # both take the same one, else
        filled = [part.format(engine=url, port=port) for part in argv]
        with running(*filled, core=THEIRS) as process:
            _answers(port, "/health")
            _answers(port, "/v1/models")
            yield Contestant(name, ("127.0.0.1", port), engine, (process.pid,))


def sglang_router() -> contextlib.AbstractContextManager[Contestant]:
    return _router(
        "sglang-router",
        *(str(TOOLS / "bin" / "python"), "-m", "sglang_router.launch_router"),
        *("--worker-urls", "{engine}", "--host", "127.0.0.1", "--port", "{port}"),
        *("--policy", "round_robin", "--log-level", "error"),
    )


def vllm_router() -> contextlib.AbstractContextManager[Contestant]:
    return _router(
        "vllm-router",
        *(str(TOOLS / "bin" / "vllm-router"), "--worker-urls", "{engine}"),
        *("--host", "127.0.0.1", "--port", "{port}", "--policy", "round_robin"),
    )


Start = Callable[[], contextlib.AbstractContextManager[Contestant]]


def available() -> dict[str, Start | None]:
    """Every contestant; None for one whose program is not installed."""
    needed: dict[str, tuple[Start, bool]] = {
        "direct": (direct, True),
        "hive": (hive, True),
        "nginx": (nginx, shutil.which("nginx") is not None),
        "haproxy": (haproxy, shutil.which("haproxy") is not None),
        "sglang-router": (sglang_router, bool(list(TOOLS.glob("lib/*/*/sglang_router")))),
        "vllm-router": (vllm_router, (TOOLS / "bin" / "vllm-router").exists()),
    }
    return {name: start if is_there else None for name, (start, is_there) in needed.items()}
