"""Everything at once, by chance: whatever happened, nothing is left, and hive itself stays flat.

A crowd asks while engines, guards and hive itself are killed, GPUs fail and come back, and workers
are stopped and started. Then everybody rests, what must hold at rest is looked at, and it begins
again. A few rounds in every test run, SOAK_MINUTES (3) under `--soak`; SOAK_SEED repeats a choice
of actions, though not their exact moments.
"""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hive.workers import cgroup, guard
from steps import leaks
from steps.crowd import Crowd
from steps.driver import Hive
from steps.waiting import must, until
from tests.doubles.nvml import Gpus

SEED = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
LONG_S = 60 * float(os.environ.get("SOAK_MINUTES", "3"))
SHORT_S = 8.0
ROUND_S = 12.0  # longer than OWN_KILL_S: a GPU that is left alone for a round may fail
CLIENTS = 8
REST_S = 30.0  # for everything to be ready again, and for what was taken to be given back
LINGER_S = 8.0  # for what is just ending: descriptors of a request that broke off
# After two rounds hive has met everything once; what it keeps on purpose (1000 events, the metrics'
# series, remembered responses) is full by then. Twice what was seen beyond that.
GROWTH_MB = 12.0
MODELS: dict[str, tuple[str | list[str], tuple[str, ...]]] = {
    "alone": ("cuda:0", ("--core", "--shm", "2", "--tmp", "2")),
    "hiding": ("cuda:1", ("--core", "--shm", "1", "--setsid-grandchild")),
    "parallel": (["cuda:2", "cuda:3"], ("--core", "--load-s", "0.1")),
    "small": ("cpu", ("--shm", "1", "--tmp", "1")),
}
GPUS = {"alone": (0,), "hiding": (1,), "parallel": (2, 3)}
FATAL, HARMLESS = (48, 79, 95, 119), (13, 31, 43, 63)  # Xids


@pytest.mark.double
@pytest.mark.timeout(LONG_S + 240)
def test_whatever_happens_nothing_is_left_and_hive_stays_flat(
    hive: Hive, pytestconfig: pytest.Config
) -> None:
    is_long = bool(pytestconfig.getoption("soak"))
    print(f"SOAK_SEED={SEED}")
    soak = Soak(hive, random.Random(f"soak {SEED}"), LONG_S if is_long else SHORT_S)
    with soak.told():
        soak.begin()
        soak.run()
        soak.end()
    print(soak.summary())
    if is_long:
        missing = [a.__name__ for a, _ in soak.actions if not soak.crowd.counts[a.__name__]]
        assert not missing, f"chance never chose {missing}: let it run longer"


class Soak:
    """One run: what is done to hive, and what must hold whenever all is at rest."""

    def __init__(self, hive: Hive, chance: random.Random, seconds: float) -> None:
        self.hive, self.chance, self.seconds = hive, chance, seconds
        self.gpus = Gpus(hive.home / "gpu")
        self.crowd = Crowd(hive, tuple(MODELS))
        self.actions: list[tuple[Callable[[str], object], int]] = [
            (self.kill_a_process, 8),
            (self.die_by_itself, 4),
            (self.stop, 2),
            (self.start, 4),
            (self.restart, 3),
            (self.litter, 3),
            (self.lose_the_gpu, 1),
            (self.run_out_of_vram, 1),
            (self.report_an_xid, 2),
            (self.repair, 3),
        ]
        self.touched: dict[str, float] = {}  # when a model's engine was last disturbed
        self.flat: dict[str, int] = {}  # of this life at its first rest
        self.rss: list[float] = []  # of this life at each rest, MB
        self.growth_mb = 0.0  # the most of any life
        self.marks: set[str] = set()  # every start that was ever seen
        self.rests = 0
        self.before = leaks.Snapshot()  # what others left in /dev/shm is not hive's

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever goes wrong is told with the seed and with what was done last."""
        try:
            yield
        except Exception as exc:
            last = "\n  ".join(self.crowd.last)
            raise AssertionError(f"{exc}\nSOAK_SEED={SEED}; what was last:\n  {last}") from exc
        finally:
            self.crowd.over.set()

    def begin(self) -> None:
        for index in range(4):
            self.gpus.add(index)
        hive = self.hive
        hive.env |= self.gpus.env
        hive.sections["server"] |= {"gpu_error_policy": "quarantine", "drain_s": 1}
        hive.sections["restarts"] = {"starts": 1000, "backoff_s": 0.02, "backoff_max_s": 0.1}
        hive.sections["timeouts"]["cleanup_s"] = 0.5
        life = ("--token-s", "0.005", "--max-life-s", str(self.seconds + 300))
        for name, (device, knobs) in MODELS.items():
            vram = ("--vram-mib", "1024") if name in GPUS else ()
            hive.model(name, *life, *knobs, *vram, device=device)
        hive.start()
        self.crowd.up.set()

    def run(self) -> None:
        began = time.monotonic()
        while (left := began + self.seconds - time.monotonic()) > 0:
            # In its second half the soak stays with one life: growth needs time to be seen.
            self.round(min(ROUND_S, left), may_kill_hive=left > self.seconds / 2)
            self.rest()

    def end(self) -> None:
        """hive stops, and what it had on record is empty."""
        self.crowd.note("hive is asked to stop")
        self.hive.stop()
        assert self.growth_mb < GROWTH_MB, f"hive's memory grew by {self.growth_mb:.1f} MB"
        left = [*(self.hive.state / "ledger").iterdir(), *(self.hive.runtime / "w").iterdir()]
        left += self._groups(self.marks)
        assert not left, f"left after hive's end: {left}"

    def summary(self) -> str:
        counts = ", ".join(f"{what} {n}" for what, n in sorted(self.crowd.counts.items()))
        return f"{self.rests} rests, {self.crowd.lives} lives, +{self.growth_mb:.1f} MB; {counts}"

    # ── one round ───────────────────────────────────────────────────────────────────────────────

    def round(self, seconds: float, *, may_kill_hive: bool) -> None:
        calm = self.chance.choice(list(GPUS))
        others = [name for name in MODELS if name != calm]
        self.crowd.note(f"round {self.rests + 1}; {calm} is left alone")
        self.crowd.come([f"{SEED}.{self.rests}.{n}" for n in range(CLIENTS)])
        ends_at = time.monotonic() + seconds
        kills_hive = may_kill_hive and self.chance.random() < 0.7
        does, weights = zip(*self.actions, strict=True)
        while time.monotonic() < ends_at:
            until(lambda: False, self.chance.uniform(0, 0.3))
            (do,) = self.chance.choices(does, weights)
            name = self.chance.choice(others)
            self.crowd.note(f"{do.__name__} {name}")
            self.crowd.count(do.__name__)
            do(name)
            leaks._reap_orphans()
            if self.crowd.faults:
                break
        if kills_hive:
            self.kill_hive()
        self.fail_the_calm_one(calm)
        self.crowd.go(REST_S)

    def fail_the_calm_one(self, name: str) -> None:
        """A fatal Xid is a fault at any time, also right after hive's own kill."""
        (index, *_) = GPUS[name]
        for one in GPUS[name]:
            hears = f"/hive/v1/devices/cuda:{one}"
            must(lambda h=hears: self._get(h)["events"] == "event set", 5, "Xids are heard")  # type: ignore[misc]
        xid = self.chance.choice(FATAL)
        self.crowd.note(f"Xid {xid} on cuda:{index}")
        self.gpus.xid(index, xid)
        self.hive.wait_state("QUARANTINED", f"{name}-0")
        self.crowd.count("quarantined by an Xid")
        self.touched[name] = time.monotonic()

    # ── what may happen to an engine ────────────────────────────────────────────────────────────

    def kill_a_process(self, name: str) -> None:
        """Any of its tree, the guard too."""
        self._wait_until_recorded(name)
        if members := self.hive.tree(f"{name}-0"):
            victim = self.chance.choice(members)
            self.crowd.note(f"  SIGKILL {victim.name} ({victim.pid}, {victim.state})")
            guard.send_signal(victim, signal.SIGKILL)

    def die_by_itself(self, name: str) -> None:
        self._die(name, self.chance.choice(("exit0", "segv", "cuda_illegal", "core")))

    def run_out_of_vram(self, name: str) -> None:
        self._die(name, "cuda_oom")

    def stop(self, name: str) -> None:
        self._ask(name, "stop")

    def start(self, name: str) -> None:
        self._ask(name, "start")

    def restart(self, name: str) -> None:
        self._ask(name, "restart")

    def litter(self, name: str) -> None:
        """Shared memory, temporary files and a process in a session of its own."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            double = self.hive.double(name)
            held = double.state["tree"]
            double.set(
                shm=min(len(held["shm"]) + 2, 8),
                tmp=min(len(held["tmp"]) + 3, 12),
                setsid_grandchild=self.chance.random() < 0.5,
            )

    def lose_the_gpu(self, name: str) -> None:
        if name in GPUS:
            self.gpus.change(self.chance.choice(GPUS[name]), lost=1)

    def report_an_xid(self, name: str) -> None:
        """A fault, evidence, a note, or the echo of a kill: no matter here."""
        if name in GPUS:
            xid = self.chance.choice(FATAL + HARMLESS)
            self.crowd.note(f"  Xid {xid}")
            self.gpus.xid(self.chance.choice(GPUS[name]), xid)

    def repair(self, name: str) -> None:
        for index in GPUS.get(name, ()):
            self.gpus.change(index, lost=0)
        self._ask(name, "release")

    def kill_hive(self) -> None:
        """SIGKILL, sometimes together with guards; the new one serves."""
        for name in MODELS:
            self._wait_until_recorded(name)
        guards = [w["guard_pid"] for w in self.hive.workers if w["guard_pid"]]
        # Looked at once, so that a stranger with the same pid is never signalled.
        roots = [p for p in map(guard.look_at, guards) if p and p.name == "hive-guard"]
        doomed = self.chance.sample(roots, self.chance.choice((0, 0, 1, len(roots))))
        self.crowd.note(f"SIGKILL hive and {len(doomed)} guards")
        self.crowd.count("kill_hive" + (" and guards" if doomed else ""))
        self._remember_marks()
        self.crowd.up.clear()
        self.crowd.lives += 1
        for root in doomed:  # so that none of them sees hive's end
            guard.send_signal(root, signal.SIGSTOP)
        self.hive.signal(signal.SIGKILL)
        for root in doomed:
            guard.send_signal(root, signal.SIGKILL)
        self.hive.wait_exit()
        for index in range(4):
            self.gpus.change(index, lost=0)
        self._look_at_log()
        (self.hive.home / "hive.log").unlink()
        self.touched.clear()
        self.flat.clear()
        self.rss.clear()
        self.hive.start()
        self.crowd.up.set()

    def _die(self, name: str, how: str) -> None:
        self._wait_until_recorded(name)
        self.crowd.note(f"  {how}")
        self.hive.double(name).die(how)

    def _ask(self, name: str, action: str) -> None:
        answer = self.hive.ask("POST", f"/hive/v1/workers/{name}-0/{action}")
        # What cannot be done now is a conflict; a GPU that is still broken is not released.
        if answer.status != 202 and answer.code not in ("CONFLICT", "CUDA_DEVICE_FAILED"):
            self.crowd.fault(f"{action} of {name}: {answer.status} {answer.body!r}")

    def _wait_until_recorded(self, name: str) -> None:
        """A name in /dev/shm is known to hive a moment after it appeared, not at once."""
        self.touched[name] = time.monotonic()

        def is_so() -> bool:
            try:
                names = self.hive.double(name).state["tree"]["shm"]
            except (OSError, http.client.HTTPException, ValueError):
                return True  # it is not there
            return all(shm in self.hive.records for shm in names)

        must(is_so, 5, f"a record of {name}'s shared memory")

    # ── what holds at rest ──────────────────────────────────────────────────────────────────────

    def rest(self) -> None:
        """Everybody has gone and everything is repaired: all is ready again, nothing is left."""
        self.crowd.note("rest")
        for index in range(4):
            self.gpus.change(index, lost=0)
        must(self._is_ready, REST_S, lambda: f"all ready: {self.hive.workers}")
        wrong: list[str] = []

        def is_clean() -> bool:
            wrong[:] = self._wrong()
            return not wrong

        assert until(is_clean, LINGER_S), "; ".join(wrong)
        self._look_at_log()
        self.rss.append(_status_kb(self._pid, "VmRSS") / 1024)
        if len(self.rss) > 3:
            self.growth_mb = max(self.growth_mb, self.rss[-1] - max(self.rss[:3]))
        self.rests += 1
        self.crowd.note(f"rested: {self.rss[-1]:.1f} MB, {self.flat}")
        assert not self.crowd.faults, "; ".join(self.crowd.faults)

    def _is_ready(self) -> bool:
        for worker in self.hive.workers:
            name = worker["model"]
            if worker["state"] == "QUARANTINED":
                self._ask(name, "release")
            elif worker["state"] == "STOPPED":
                self._ask(name, "start")
            assert worker["state"] != "FAILED", worker
        return all(w["state"] == "READY" and not w["in_flight"] for w in self.hive.workers)

    def _wrong(self) -> list[str]:
        """What is there and should not be; each worker has one of everything."""
        leaks._reap_orphans()
        self._remember_marks()
        hive, count = self.hive, len(MODELS)
        found = [f"leak {leak}" for leak in self._get("/hive/v1/leaks")["leaks"]]
        found += [f"in flight {one}" for one in self._get("/hive/v1/requests")["requests"]]
        records = sorted(path.name for path in (hive.state / "ledger").iterdir())
        if [name[16:] for name in records] != [".json", ".tree.json"] * count:
            found.append(f"records {records}")
        homes = sorted(path.name for path in (hive.runtime / "w").iterdir())
        if len(homes) != count:
            found.append(f"homes {homes}")
        sockets = [line for line in _unix_sockets() if str(hive.runtime) in line]
        if len(sockets) != count:
            found.append(f"sockets {sockets}")
        now = {name[:16] for name in records}
        found += [f"control group {path.name}" for path in self._groups(self.marks - now)]
        here = leaks.Snapshot()
        own = {self._pid} | {p.pid for name in MODELS for p in hive.tree(f"{name}-0")}
        found += [f"process {p}" for p in here.processes.values() if p.pid not in own]
        held = {shm for name in MODELS for shm in hive.double(name).state["tree"]["shm"]}
        shm = here.shm - self.before.shm
        found += [f"shared memory {name}{_age(name)}" for name in shm ^ held]
        for what, number in self._numbers().items():
            if number > self.flat.setdefault(what, number):
                found.append(f"{what} grew from {self.flat[what]} to {number}")
        return found

    def _numbers(self) -> dict[str, int]:
        links = Path(f"/proc/{self._pid}/fd")
        targets = []
        for fd in os.listdir(links):
            with contextlib.suppress(OSError):
                targets.append(os.readlink(links / fd))
        # What is asked just now, and its answer, have a connection; those are counted at rest, too.
        return {"descriptors": len(targets)}

    def _look_at_log(self) -> None:
        """Nothing that nobody caught, and no leak, not even one that was cleared later."""
        for text in self.hive.log_text.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                raise AssertionError(f"in hive's log: {text}") from None
            is_bad = "exception" in line or line.get("level") == "critical"
            assert not is_bad, f"in hive's log: {text}"
            assert line["event"] not in ("leak", "leak cleared"), f"in hive's log: {text}"

    @property
    def _pid(self) -> int:
        assert self.hive.process is not None
        return self.hive.process.pid

    def _get(self, path: str) -> Any:
        answer = self.hive.ask("GET", path)
        assert answer.status == 200, (path, answer)
        return answer.json

    def _remember_marks(self) -> None:
        self.marks |= {path.name[:16] for path in (self.hive.state / "ledger").glob("*.json")}

    def _groups(self, marks: set[str]) -> list[Path]:
        """Control groups that are still there of these starts."""
        read = [Path("/proc/self", name).read_text() for name in ("mountinfo", "cgroup")]
        places = list(cgroup.own_groups(*read))
        return [g for place in places for mark in marks if (g := place / f"hive-{mark}").is_dir()]


def _status_kb(pid: int, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def _age(name: str) -> str:
    with contextlib.suppress(OSError):
        return f", {time.time() - os.stat(guard.SHM + name).st_mtime:.3f} s old"
    return ", which is not there"


def _unix_sockets() -> list[str]:
    return Path("/proc/net/unix").read_text().splitlines()
