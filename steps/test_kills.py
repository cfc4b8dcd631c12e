"""Ten kills (`--soak`: two hundred) of each of an engine's processes, at moments that chance chooses."""

import os
import random
import signal
import time

import pytest

from steps.driver import Hive
from steps.story import MODEL, WORKER, Story
from steps.waiting import must

KILLS, MANY_KILLS = 10, 200
KNOWN_S = 2.0  # within this the client knows
SEED = int(os.environ.get("KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.mark.double
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["leader", "core", "guard"])
def test_whoever_is_killed_whenever_the_client_knows_and_the_worker_heals(
    hive: Hive, victim: str, pytestconfig: pytest.Config
) -> None:
    kills = MANY_KILLS if pytestconfig.getoption("soak") else KILLS
    print(f"KILLS_SEED={SEED}")
    chance = random.Random(f"{SEED} {victim}")
    hive.sections["restarts"] = {"starts": kills, "backoff_s": 0.01, "backoff_max_s": 0.02}
    hive.model(MODEL, "--core", "--shm", "2", "--token-s", "0.005", "--tokens", "20000")
    hive.start()
    for number in range(kills):
        story = Story(hive)
        story.begin()
        story.client.wait_for_events(chance.randrange(20))
        names = story.double.state["tree"]["shm"]
        must(lambda n=names: all(name in hive.records for name in n), 2, "the record")  # type: ignore[misc]
        story.look_at_tree()
        os.kill(_victim(story, victim), signal.SIGKILL)
        killed_at = time.monotonic()
        story.client.wait_for_end()
        said = f"kill {number} of seed {SEED}"
        assert story.client.ended_at is not None
        assert story.client.ended_at - killed_at < KNOWN_S, said
        told = story.client.last_error["code"] if story.client.last_error else story.answer.code
        assert told == "WORKER_CRASHED", f"{said}: {story.client.body[-600:]!r}"
        story.must_be_gone(5)
        must(lambda n=number: hive.worker(WORKER)["starts"] == n + 2, 5, said)  # type: ignore[misc]
        hive.wait_state("READY", WORKER)
        assert len(list((hive.runtime / "w").iterdir())) == 1, said


def _victim(story: Story, victim: str) -> int:
    if victim == "core":
        return story.member("VLLM::Engine").pid
    pid: int = story.hive.worker(WORKER)["pid" if victim == "leader" else "guard_pid"]
    return pid
