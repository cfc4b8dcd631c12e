"""The real daemon on doubles, started once for a module's tests; and who uses it."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steps.driver import Answer, Hive, Stream, new_hive
from steps.waiting import must
from tests.gateway.serving import bearer, key, secret_of
from tests.windows.making import CHUNK

WINDOWS = {"kv_chunk_tokens": CHUNK, "kv_ram_gib": 0.1, "kv_tier_gib": 1}
KEYS = ("ada", "bob", "cyd")
_number = itertools.count()
# hive, but with less patience: a block that is not written has its eight tries in 5 seconds.
IMPATIENT = """
import runpy, sys
import hive.windows.blocks as blocks
from hive.policy.retries import RETRIES, RetryPolicy

blocks.STALL_S = 0.5
RETRIES["block_write"] = RetryPolicy(8, (0.05,))
sys.argv = sys.argv[sys.argv.index("hive") :]
runpy.run_module("hive", run_name="__main__", alter_sys=True)
"""


@contextmanager
def daemon(*knobs: str, windows: dict[str, Any] | None = None, **sections: Any) -> Iterator[Hive]:
    """Model "m" has windows, "n" has not. The client of `Hive` is the admin, "root"."""
    with new_hive() as hive:
        hive.starter = (sys.executable, "-c", IMPATIENT)
        hive.sections |= {**sections, "windows": {**WINDOWS, **(windows or {})}}
        keys = [key("root", "inference", "admin"), *map(key, KEYS), key("eve", "metrics")]
        hive.keys = [{**one, "max_concurrent": 0} for one in keys]
        hive.key = secret_of("root")
        hive.model("m", *knobs, windows=True)
        hive.model("n")
        hive.start(is_shared=True)
        yield hive


class Owner:
    """Whoever has a key, and what they do with windows."""

    def __init__(self, hive: Hive, name: str = "ada") -> None:
        self.hive, self.name = hive, name

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.hive.ask(method, path, body, {**bearer(self.name), **named})

    def stream(self, path: str, body: Any, **headers: str) -> Stream:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.hive.stream(path, body, {**bearer(self.name), **named})

    # ── sessions ────────────────────────────────────────────────────────────────────────────────

    def session(self, model: str = "m") -> str:
        answer = self.ask("POST", "/hive/v1/sessions", {"model": model})
        assert answer.status == 201, answer.body
        told: str = answer.json["id"]
        return told

    def chat(
        self, session: str, messages: list[Any], path: str = "/v1/chat/completions", **more: Any
    ) -> Answer:
        body = {"model": "m", "messages": messages, "max_tokens": 8, **more}
        return self.ask("POST", path, body, X_Hive_Session=session)

    def talk(self, words: int = 60) -> str:
        """A session in which that was said, which nobody said before."""
        session = self.session()
        answer = self.chat(session, said(words))
        assert answer.status == 200, answer.body
        return session

    def found(self, session: str) -> Any:
        answer = self.ask("GET", f"/hive/v1/sessions/{session}")
        assert answer.status == 200, answer.body
        return answer.json

    def state(self, session: str) -> str:
        told: str = self.found(session)["state"]
        return told

    # ── windows ─────────────────────────────────────────────────────────────────────────────────

    def freeze(self, session: str, name: str, **more: Any) -> Answer:
        return self.ask("POST", "/hive/v1/windows", {"session_id": session, "name": name, **more})

    def frozen(self, words: int = 60, **more: Any) -> tuple[str, str]:
        """A session, and the name of the window that it was frozen into."""
        session, name = self.talk(words), new_name()
        answer = self.freeze(session, name, **more)
        assert answer.status == 201, answer.body
        return session, name

    def window(self, name: str) -> Any:
        answer = self.ask("GET", f"/hive/v1/windows/{name}")
        assert answer.status == 200, answer.body
        return answer.json

    def do(self, what: str, name: str, body: Any = None, **headers: str) -> Answer:
        return self.ask("POST", f"/hive/v1/windows/{name}/{what}", body or {}, **headers)

    def names(self, query: str = "") -> list[str]:
        answer = self.ask("GET", f"/hive/v1/windows{query}")
        assert answer.status == 200, answer.body
        return [one["name"] for one in answer.json["windows"]]

    # ── on disk ─────────────────────────────────────────────────────────────────────────────────

    def folder(self, name: str) -> Path:
        (found,) = (
            path.parent
            for path in (self.hive.state / "windows").glob("*/manifest.json")
            if (told := manifest_of(path.parent))["name"] == name and told["owner"] == self.name
        )
        return found

    def blocks(self, name: str) -> list[Path]:
        return sorted(path for path in self.folder(name).iterdir() if path.suffix != ".json")

    def in_tier(self, name: str) -> list[Path | None]:
        """LMCache's name of each of its blocks."""
        there = {path.stat().st_ino: path for path in tier_of(self.hive)}
        return [there.get(path.stat().st_ino) for path in self.blocks(name)]


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())["manifest"]


def tier_of(hive: Hive) -> list[Path]:
    return [path for path in (hive.state / "kv").iterdir() if path.is_file()]


def new_name() -> str:
    return f"w{next(_number)}"


def said(words: int = 60) -> list[dict[str, str]]:
    """A message that nobody said before."""
    mark = next(_number)
    text = " ".join(f"m{mark}x{at}" for at in range(words))
    return [{"role": "user", "content": text}]


def told_by(answer: Answer) -> tuple[int, str | None, str | None]:
    """Status, code and number of an error."""
    details = answer.error["details"] if answer.code else {}
    return answer.status, answer.code, details.get("number")


@contextmanager
def turned(hive: Hive, **knobs: Any) -> Iterator[None]:
    """The LMCache double misbehaves while the block runs."""
    well = {"store_s": 0.0, "lose_stores": False, "fail_every": 0, "prefetch_s": 0.0}
    hive.turn_cache(**knobs)
    try:
        yield
    finally:
        hive.turn_cache(**{name: well[name] for name in knobs})


def state_of(hive: Hive) -> tuple[set[str], set[str]]:
    """The folders there are, and the names that the catalogue has, half-made ones too."""
    directory = hive.state / "windows"
    folders = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    rows: set[str] = set()
    for state in ("FREEZING", "FROZEN", "DELETING"):
        found = hive.ask("GET", f"/hive/v1/windows?state={state}&limit=1000").json["windows"]
        rows |= {f"{one['owner']}:{one['name']}:{state}" for one in found}
    return folders, rows


def wait_quiet(hive: Hive, wanted: tuple[set[str], set[str]]) -> None:
    """Until nothing of a freeze is left but what was there before."""
    must(lambda: state_of(hive) == wanted, 10, lambda: f"{wanted}; there is {state_of(hive)}")


def texts(hive: Hive) -> str:
    """All that the daemon has ever printed."""
    with contextlib.suppress(OSError):
        return hive.log_text
    return ""
