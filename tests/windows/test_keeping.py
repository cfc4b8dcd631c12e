"""All of it over the daemon's lives: killed, with another model, without its database, full."""

import signal
import subprocess
import sys

from steps.driver import Hive
from steps.waiting import must
from tests.patience import short_directory
from tests.windows.daemon import Owner, daemon, new_name, said, state_of, tier_of, told_by

QUOTA = "STORAGE_QUOTA_EXCEEDED"


LEAVING = """
import asyncio, os, random, sys
from pathlib import Path
from hive.errors import HiveError
from hive.storage.catalogue import Session, opened

def files():
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum("catalogue.db" in os.readlink(path) for path in paths if os.path.exists(path))

async def main():
    chance = random.Random(20261122)
    async with opened(Path(sys.argv[1])) as catalogue:
        async def add(name):
            await catalogue.add_session(Session(name, "ada", "m", "salt", 1.0, 1.0))

        await add("first")
        before = files()
        loop = asyncio.get_running_loop()
        for at in range(50):
            async with asyncio.TaskGroup() as tasks:
                made = [tasks.create_task(add(f"s{at}-{one}")) for one in range(16)]
                for one in made:
                    loop.call_later(chance.uniform(0, 0.03), one.cancel)
        await add("last")
        print(files() <= before, flush=True)
    os._exit(0)

asyncio.run(main())
"""


def test_who_leaves_in_the_middle_of_a_change_leaves_no_connection_behind() -> None:
    """R075, R107: clients may leave at any moment."""
    with short_directory() as home:
        argv = [sys.executable, "-c", LEAVING, str(home)]
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert ran.stdout == "True\n", ran.stderr[-2000:]


def restart(hive: Hive) -> None:
    hive.stop()
    hive.start()


def test_windows_outlive_a_kill_and_their_database() -> None:
    """R106, R107, C28, C.5: freeze, kill in the middle of another, thaw; then without catalogue."""
    with daemon(server={"drain_s": 1}) as hive:
        ada = Owner(hive)
        session, name = ada.frozen(60, tags=["kept"], description="häng 😀")
        clone = new_name()
        assert ada.do("clone", name, {"name": clone}).status == 201
        before, window = state_of(hive), ada.window(name)
        other, half = ada.session(), new_name()
        hive.turn_cache(lose_stores=True)
        assert ada.chat(other, said(40)).status == 200
        stream = ada.stream("/hive/v1/windows", {"session_id": other, "name": half})
        must(lambda: half in ada.names("?state=FREEZING"), 5, "a freeze")
        hive.signal(signal.SIGKILL)
        hive.wait_exit()
        stream.leave()

        hive.start()
        assert state_of(hive) == before
        assert hive.logged(f"window {half} was not frozen whole: removed")
        assert (ada.state(other), ada.state(session)) == ("ACTIVE", "FROZEN")
        assert ada.window(name) == window
        told = ada.do("thaw", name, {"require_full": True}).json
        more = [*told["messages"], {"role": "user", "content": "go on"}]
        usage = ada.chat(told["session_id"], more).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= told["receipt"]["usable_tokens"]
        assert told["receipt"]["usable_tokens"] >= 60
        assert ada.freeze(other, half).status == 201

        last, never = ada.session(), new_name()
        hive.turn_cache(lose_stores=True)
        assert ada.chat(last, said(40)).status == 200
        stream = ada.stream("/hive/v1/windows", {"session_id": last, "name": never})
        must(lambda: never in ada.names("?state=FREEZING"), 5, "a freeze")
        hive.signal(signal.SIGTERM)  # it is refused, and undone, before hive ends
        assert hive.wait_exit() == 0
        assert stream.answer.status in (500, 502, 503)
        assert not hive.logged(f"window {never} was not frozen whole: removed")
        (hive.state / "catalogue.db").write_bytes(b"this is no database" * 1000)
        hive.start()
        assert set(ada.names()) == {name, clone, half}
        again = ada.window(name)
        assert again["receipt"] is None
        assert {**again, "receipt": window["receipt"]} == window
        assert ada.ask("GET", "/hive/v1/sessions").json["sessions"] == []
        assert ada.do("thaw", name, {"require_full": True}).status == 200
        into = ada.do("thaw", name, {"session_id": session})
        assert told_by(into) == (404, "SESSION_NOT_FOUND", "CWM-2001")
        assert list((hive.state).glob("catalogue.db.damaged-*"))


def test_a_quota_another_model_and_a_full_tier() -> None:
    """R091, C25, C27: CWM-4003 is one key's; a window is of no use to another model."""
    with daemon(windows={"max_windows": 2}) as hive:
        ada, bob = Owner(hive), Owner(hive, "bob")
        _, name = ada.frozen(60)
        _, spare = ada.frozen(30)
        session = ada.talk(30)
        before = state_of(hive)
        for answer in (
            ada.freeze(session, new_name()),
            ada.do("clone", name, {"name": new_name()}),
        ):
            assert told_by(answer) == (507, QUOTA, "CWM-4003")
            assert answer.error["message"] == (
                "Storage quota exceeded: this key has 2 windows, and may have 2."
            )
            assert answer.error["details"]["retryable"] is False
            assert "elete old windows" in answer.error["details"]["suggested_action"]
        assert state_of(hive) == before
        assert ada.state(session) == "ACTIVE"
        bob.frozen(20)
        assert ada.ask("DELETE", f"/hive/v1/windows/{spare}").status == 204
        assert ada.freeze(session, new_name()).status == 201

        # Another dtype, no room for unshared blocks, and no bytes for bob.
        hive.models["m"].extra["args"] = ["--dtype", "half"]
        hive.sections["windows"] |= {
            "max_windows": 0,
            "max_gib": 3000 / 2**30,
            "kv_tier_gib": 0.000001,
        }
        shared = {path for path in tier_of(hive) if path.stat().st_nlink > 1}
        restart(hive)
        assert shared <= set(tier_of(hive))
        for what in ("thaw", "repair"):
            if what == "repair":
                (block, *_) = ada.blocks(name)
                kept = block.read_bytes()
                block.unlink()
            answer = ada.do(what, name)
            assert told_by(answer) == (409, "MODEL_INCOMPATIBLE", None)
            fields = answer.error["details"]["fields"]
            assert fields["dtype"] == {"frozen": "auto", "now": "half"}
            assert set(fields) == {"dtype", "arguments"}
            assert answer.error["message"] == (
                "The window was frozen from another model: dtype, arguments differ."
            )
        assert ada.do("verify", name).json["missing"] == [block.name]  # whatever model runs
        block.write_bytes(kept)
        assert ada.do("verify", name).json["whole"] is True
        assert ada.window(name)["receipt"] is None
        folders = state_of(hive)
        busy = bob.talk(60)
        answer = bob.freeze(busy, new_name())
        assert told_by(answer) == (507, QUOTA, "CWM-4003")
        assert "GiB" in answer.error["message"]
        assert state_of(hive) == folders
        assert bob.state(busy) == "ACTIVE"

        hive.models["m"].extra["args"] = []
        restart(hive)
        assert ada.do("thaw", name, {"require_full": True}).status == 200
        # What nobody shares was taken away at the start; what windows share never is.
        assert all(path.stat().st_nlink > 1 for path in tier_of(hive))
