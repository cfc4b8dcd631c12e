"""The real vLLM loses its processes to SIGKILL, each in turn, at moments that chance chooses.

REAL_KILLS_ROUNDS (20) times under `--soak`, each about half a minute; in every test run
features/resilience/engine_death.feature kills each once. REAL_KILLS_SEED repeats whom it hits, what
goes on then, and how far that has come.
"""

import os
import random
import signal
import time
from typing import Any

import pytest

from hive.workers import guard
from hive.workers.vllm import VITAL
from steps.driver import Hive, Stream
from steps.real import START_S
from steps.starts import Start
from steps.waiting import must, until

SEED = int(os.environ.get("REAL_KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
ROUNDS = int(os.environ.get("REAL_KILLS_ROUNDS", "20"))
ROUND_S = 90.0  # one takes 35 s, on a busy machine more than twice that
KNOWN_S = 2.0  # within this everybody knows
GONE_S = 12.0  # what has to be killed is asked for 5 s first
LONG = 15_000  # tokens: half a minute of generating
MOST_EVENTS = 300  # at which a stream is hit
GUARD, LEADER, TRACKER = "guard", "API server", "resource tracker"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A limit to suit the rounds; none without `--soak`."""
    is_soak = metafunc.config.getoption("soak")
    marks = [
        pytest.mark.timeout(START_S + ROUNDS * ROUND_S),
        pytest.mark.skipif(not is_soak, reason="many times over: make soak"),
    ]
    metafunc.parametrize("rounds", [pytest.param(ROUNDS, marks=marks)])


@pytest.mark.engine
def test_whichever_process_is_killed_nothing_of_its_start_stays(
    real_hive: Hive, rounds: int
) -> None:
    print(f"\nREAL_KILLS_SEED={SEED}")
    chance = random.Random(f"real {SEED}")
    real_hive.wait_state("READY", within_s=START_S)
    in_turn: list[str] = []
    for number in range(rounds):
        if not in_turn:
            in_turn = sorted(_members(real_hive))
            chance.shuffle(in_turn)
        one = Round(real_hive, chance, in_turn.pop())
        print(f"round {number + 1}: {one.said}", end=": ", flush=True)
        one.run()
        print(one.told, flush=True)


class Round:
    """One kill, what its clients hear, and the start after it."""

    def __init__(self, hive: Hive, chance: random.Random, victim: str) -> None:
        self.hive, self.victim = hive, victim
        self.streams = chance.choice((0, 1, 3))
        self.waiting = chance.randrange(2) if self.streams else 0
        self.events = chance.randrange(MOST_EVENTS)
        self.pause_s = chance.uniform(0, 2)
        # What the engine can live without is killed as well, and then one that it cannot.
        others = sorted(_members(hive).keys() - {victim})
        self.next_victim = chance.choice(others) if not _is_vital(victim) else None
        self.told = ""

    @property
    def said(self) -> str:
        whom = f"{self.victim}, then {self.next_victim}" if self.next_victim else self.victim
        if not self.streams:
            return f"SIGKILL to {whom}, idle for {self.pause_s:.1f} s"
        return f"SIGKILL to {whom}, {self.streams}+{self.waiting} clients, {self.events} events"

    def run(self) -> None:
        clients = [self._stream() for _ in range(self.streams)]
        clients += [self._whole() for _ in range(self.waiting)]
        try:
            self._run(clients)
        finally:
            for client in clients:
                client.leave()

    def _run(self, clients: list[Stream]) -> None:
        hive = self.hive
        if clients:
            must(lambda: hive.worker()["in_flight"] == len(clients), 20, "all are in flight")
            clients[0].wait_for_events(self.events, 60)
        else:
            until(lambda: False, self.pause_s)
        victim, old = self.victim, Start.of(hive)
        if self.next_victim:
            self._live_without(clients)
            victim = self.next_victim
        killed_at = time.monotonic()
        guard.send_signal(_members(hive)[victim], signal.SIGKILL)
        for client in clients:
            client.wait_for_end()
        late_s = [(client.ended_at or 0) - killed_at for client in clients]
        assert max(late_s, default=0) < KNOWN_S, late_s
        assert [_cause(client) for client in clients] == [_expected(victim)] * len(clients)
        must(
            lambda: hive.readiness().status == 503, 0 if clients else KNOWN_S, "not ready any more"
        )
        must(lambda: not old.left(), GONE_S, lambda: f"nothing left of it; there is {old.left()}")
        gone_s = time.monotonic() - killed_at
        self._must_be_back(old)
        self.told = (
            f"told after {', '.join(f'{s:.3f}' for s in sorted(late_s)) or '-'} s, "
            f"gone after {gone_s:.1f} s, ready after {time.monotonic() - killed_at:.1f} s"
        )

    def _stream(self) -> Stream:
        return self.hive.chat_stream(max_tokens=LONG, ignore_eos=True)

    def _whole(self) -> Stream:
        body = {"model": "m", "prompt": "once", "max_tokens": LONG, "ignore_eos": True}
        return self.hive.stream("/v1/completions", body)

    def _live_without(self, clients: list[Stream]) -> None:
        victim = _members(self.hive)[self.victim]
        guard.send_signal(victim, signal.SIGKILL)
        must(lambda: not _lives(victim), 2, f"the end of {victim}")
        if clients:
            clients[0].wait_for_events(len(clients[0].events) + 20)
        else:
            _must_answer(self.hive)
        assert all(client.ended_at is None for client in clients)

    def _must_be_back(self, old: Start) -> None:
        """The next start serves, and is all that there is."""
        hive = self.hive
        must(lambda: hive.worker()["starts"] > old.number, 20, "the next start")
        hive.wait_state("READY", within_s=START_S)
        assert hive.worker()["starts"] == old.number + 1
        _must_answer(hive)
        assert hive.ask("GET", "/hive/v1/leaks").json == {"leaks": []}
        assert not hive.logged("leak")
        new = Start.of(hive)
        assert list((hive.runtime / "w").iterdir()) == [new.home]
        pages = {path.name for path in (hive.state / "ledger").iterdir()}
        assert pages == {f"{new.mark}.json", f"{new.mark}.tree.json"}
        assert old.left() == []


def _members(hive: Hive) -> dict[str, guard.Process]:
    """The worker's living processes, by what they are to it."""
    worker, found = hive.worker(), {}
    for process in hive.tree():
        if process.pid == worker["guard_pid"]:
            found[GUARD] = process
        elif process.pid == worker["pid"]:
            found[LEADER] = process
        elif guard.is_resource_tracker(process.pid):
            found[TRACKER] = process
        elif process.state != "Z":
            found[process.name] = process
    return found


def _is_vital(member: str) -> bool:
    return member in (GUARD, LEADER) or member.startswith(VITAL)


def _expected(victim: str) -> tuple[str, str]:
    """The code and the cause that a client is told."""
    cause = {GUARD: "guard_lost", LEADER: "signal"}.get(victim, "member_lost")
    return "WORKER_CRASHED", cause


def _cause(client: Stream) -> tuple[str, str]:
    error: Any = client.last_error or client.answer.error
    return error["code"], error["details"]["cause"]


def _must_answer(hive: Hive) -> None:
    body = {"model": "m", "prompt": "once", "max_tokens": 4, "ignore_eos": True}
    answer = hive.ask("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["completion_tokens"] == 4


def _lives(process: guard.Process) -> bool:
    now = guard.look_at(process.pid)
    return now is not None and now.start == process.start and now.state != "Z"
