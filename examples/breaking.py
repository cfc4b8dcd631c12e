"""Two models, four breakages, and what an operator sees of each, as a page: docs/walkthrough.md.

    .venv/bin/python examples/breaking.py > docs/walkthrough.md

Run in the checkout; nothing but doubles is needed (a C compiler for the GPU's and the disk's).
"""

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from steps.driver import Hive, new_hive  # noqa: E402 (found by the line above)
from steps.waiting import must  # noqa: E402
from tests.doubles.fs import Faults, Rule  # noqa: E402
from tests.doubles.nvml import Gpus  # noqa: E402

CHATS = "/v1/chat/completions"
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
WIDE = {"COLUMNS": "150"}
LOUD = ("error", "warning")
LEFT_OUT = ("timestamp", "logger", "request_id", "method", "bytes_in", "bytes_out", "mark")


def clock() -> str:
    """Now, as alerts are dated."""
    return datetime.now(UTC).isoformat()


class Webhook:
    """What an Alertmanager would be told: each alert, as one line."""

    def __init__(self) -> None:
        told = self.told = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.extend(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.told: list[dict[str, Any]]
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v2/alerts"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Night:
    """An operator's terminal, beside a hive that is broken."""

    def __init__(self, hive: Hive, gpus: Gpus, disk: Faults, webhook: Webhook) -> None:
        self.hive, self.gpus, self.disk, self.webhook = hive, gpus, disk, webhook
        self.seen = self.told = 0

    def title(self, text: str) -> None:
        print(f"\n## {text}\n", flush=True)

    def run(self, line: str) -> None:
        """A command of hive's, printed with its output."""
        env = {**os.environ, **WIDE, "HIVE_URL": self.hive.url}
        words = [sys.executable, "-m", "hive", *shlex.split(line)]
        ran = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        self._say(
            f"hive {line}".replace(str(self.hive.home), "/var/lib/hive"), ran.stdout + ran.stderr
        )

    def curl(self, body: dict[str, Any], path: str = CHATS) -> None:
        answer = self.hive.ask("POST", path, body)
        lines = [f"{answer.status}", json.dumps(answer.json, indent=2)]
        self._say(f"curl {path} -d '{json.dumps(body)}'", "\n".join(lines))

    def metrics(self, *names: str) -> None:
        text = self.hive.ask("GET", "/metrics").body.decode()
        found = [
            line
            for line in text.splitlines()
            if line.startswith(names) and not line.endswith(" 0.0") and "_created" not in line
        ]
        self._say(f"curl -s /metrics | grep -E '^({'|'.join(names)})'", "\n".join(found))

    def log(self) -> None:
        """What was logged as a warning or worse since the last look."""
        must(lambda: any(one.get("level") in LOUD for one in self.hive.log[self.seen :]), 5, "news")
        lines = [line for line in self.hive.log[self.seen :] if line.get("level") in LOUD]
        self.seen = len(self.hive.log)
        short = [
            json.dumps({k: v for k, v in line.items() if k not in LEFT_OUT and v not in ("", None)})
            for line in lines
        ]
        self._say("journalctl -u hive -p warning", "\n".join(short))

    def pager(self, count: int) -> None:
        """What the webhook was told since the last look, `count` messages at least."""
        must(lambda: len(self.webhook.told) >= self.told + count, 20, f"{count} messages")
        new = self.webhook.told[self.told :]
        self.told = len(self.webhook.told)
        lines = [
            f"{'over:' if one.get('endsAt', '9') < clock() else 'firing:'} "
            f"{one['labels'].get('severity')}: {one['annotations']['summary']}"
            for one in new
        ]
        print("The webhook was told, meanwhile:\n")
        print("```\n" + "\n".join(lines) + "\n```\n", flush=True)

    def note(self, text: str) -> None:
        print(f"{text}\n", flush=True)

    def _say(self, command: str, output: str) -> None:
        text = f"$ {command}\n{output.rstrip()}".replace(str(self.hive.state), "/var/lib/hive")
        lines = text.replace(str(self.hive.port), "7411").splitlines()
        print("\n".join(["```", *(line.rstrip() for line in lines), "```", ""]), flush=True)


@contextlib.contextmanager
def serving() -> Iterator[Night]:
    """llama on a GPU, other on the CPU with windows; the GPU, its driver and the engines are doubles."""
    webhook = Webhook()
    with new_hive() as hive:
        gpus, disk = Gpus(hive.home / "gpu"), Faults(hive.home / "faults")
        gpus.add()
        hive.env |= gpus.env
        hive.starter = disk.starter
        hive.sections["server"] |= {"gpu_error_policy": "quarantine"}
        hive.sections["timeouts"] = {
            "queue_s": 2,
            "request_s": 4,
            "inference_s": 2,
            "stall_s": 2,
            "cleanup_s": 1,
            "load_s": 20,
        }
        hive.sections["alerts"] = {"webhook_url": webhook.url}
        hive.sections["windows"] = {"kv_chunk_tokens": 16, "kv_tier_gib": 1}
        hive.model("llama", "--vram-mib", "20000", device="cuda:0")
        hive.model("other", windows=True)
        hive.start()
        yield Night(hive, gpus, disk, webhook)
        disk.off()
        hive.stop()


def main() -> None:
    print(INTRODUCTION)
    with serving() as night:
        all_is_well(night)
        killed(night)
        hung(night)
        full(night)
        unplugged(night)


INTRODUCTION = """\
<!-- Made by `.venv/bin/python examples/breaking.py > docs/walkthrough.md`: real output, of a real hive. -->

# What breaks, and what is seen of it

A hive with two models, broken in four ways, as its operator sees it: `llama` on a GPU, `other` on the CPU with
windows. hive is the real one; its engines, the GPU's driver and the disk's faults are the doubles of the tests, and
the limits are short (an answer may take 2 s), so that nobody waits. A line that begins with `$` is a command as it
is typed, what follows is what it printed; of log lines the time, the logger and the request's id are left out.

The order of looking is always the same: `hive status` says how much is served, `hive alerts` what a person must
know and what to do about it, the log what happened before, `hive explain CODE` what a code means."""


def all_is_well(night: Night) -> None:
    night.title("All is well")
    night.run("status")
    night.run("worker list")
    night.run("alerts")
    night.seen = len(night.hive.log)


def killed(night: Night) -> None:
    hive = night.hive
    night.title("An engine is killed")
    night.note(
        "`kill -9` of llama's engine, as the kernel does it where memory ends. A client that comes now:"
    )
    os.kill(hive.worker("llama-0")["pid"], signal.SIGKILL)
    must(lambda: hive.worker("llama-0")["state"] != "READY", 10, "it was noticed")
    night.curl(CHAT)
    hive.wait_state("READY", "llama-0")
    night.note("hive has started it again by itself. What happened is in the log:")
    night.log()
    night.run("worker list")
    night.metrics("hive_worker_exits_total", "hive_worker_starts_total", "hive_leaks_total")
    night.note(
        "**What to do:** nothing, once; `hive worker logs llama-0` for why, when it comes again."
    )
    night.run("leaks")


def hung(night: Night) -> None:
    hive = night.hive
    night.title("An engine hangs")
    night.note(
        "other's engine gets SIGSTOP: it lives, holds its memory, and does nothing. A client waits in vain:"
    )
    os.kill(hive.worker("other-0")["pid"], signal.SIGSTOP)
    night.curl({**CHAT, "model": "other"})
    must(lambda: hive.worker("other-0")["starts"] > 1, 30, "a new engine")
    hive.wait_state("READY", "other-0")
    night.note("Nothing moved any more, so hive ended the whole tree and started another:")
    night.log()
    night.run("explain WORKER_HUNG")
    night.metrics("hive_timeouts_total", "hive_worker_exits_total", "hive_cancellations_total")
    night.note(
        "**What to do:** nothing, once. The client may send its request again (`retryable`)."
    )


def full(night: Night) -> None:
    hive = night.hive
    night.title("The disk is full")
    session = hive.ask("POST", "/hive/v1/sessions", {"model": "other"}).json["id"]
    talk = {**CHAT, "model": "other", "messages": [{"role": "user", "content": "word " * 90}]}
    told = {"X-Hive-Session": session}
    must(lambda: hive.ask("POST", CHATS, talk, told).status == HTTPStatus.OK, 20, "an answer")
    night.note(
        "Every write into the windows' directory fails with ENOSPC while a client freezes a session:"
    )
    night.disk.add(Rule("*/windows/*/0*", "open|write|link", errno.ENOSPC))
    night.curl({"session_id": session, "name": "monday"}, "/hive/v1/windows")
    night.log()
    night.note("Nothing of it is left, and the session goes on:")
    night.run("window list")
    night.run(f"session show {session}")
    night.metrics("hive_window_failures_total")
    night.note("**What to do:** make room (here: the fault is taken back), then freeze again.")
    night.disk.off()
    night.run(f"window freeze {session} monday")


def unplugged(night: Night) -> None:
    hive = night.hive
    night.title("A GPU falls off the bus")
    night.note(
        'The driver reports Xid 79 and then no longer knows the GPU; `gpu_error_policy = "quarantine"`:'
    )
    night.gpus.xid(0, 79)
    night.gpus.fail("nvmlDeviceGetMemoryInfo", 15, 0)
    must(lambda: hive.worker("llama-0")["state"] == "QUARANTINED", 20, "the quarantine")
    night.curl(CHAT)
    night.run("status")
    night.run("alerts")
    night.log()
    night.pager(2)
    night.run("devices")
    night.metrics("hive_device_state", "hive_xid_total", "hive_escalations_total")
    night.note(
        "**What to do:** what `hive alerts` says. The other model is served meanwhile. After the repair:"
    )
    night.gpus.heal()
    night.run("worker release llama-0")
    hive.wait_state("READY", "llama-0")
    night.run("status")
    night.pager(1)
    night.note("Who did what, for the morning:")
    night.run("audit list --lines 8")
    night.run(f"audit verify --state-dir {hive.state}")


if __name__ == "__main__":
    main()
