"""hive is killed in the middle of a freeze, twenty times (`--soak`: two hundred), at moments that
chance chooses: afterwards there is a whole window or none, and nothing that belongs to neither."""

import os
import random
import time

import pytest

from steps.driver import Hive
from steps.memory import SMALL, WINDOWS, answered_session
from steps.story import MODEL, Story
from steps.waiting import must

KILLS, MANY_KILLS = 20, 200
SEED = int(os.environ.get("KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.mark.double
@pytest.mark.timeout(1800)
@pytest.mark.requirement("R107")
def test_whenever_hive_is_killed_a_window_is_whole_or_was_never_there(
    hive: Hive, pytestconfig: pytest.Config
) -> None:
    kills = MANY_KILLS if pytestconfig.getoption("soak") else KILLS
    print(f"KILLS_SEED={SEED}")
    chance = random.Random(SEED)
    hive.sections["windows"] = dict(SMALL)
    hive.model(MODEL, windows=True)
    hive.start()
    longest_s = _freeze_s(hive)
    whole = 1
    for number in range(kills):
        name, said = f"w{number}", f"kill {number} of seed {SEED}"
        session = answered_session(Story(hive))
        client = hive.stream(WINDOWS, {"session_id": session, "name": name})
        time.sleep(chance.uniform(0, 1.2 * longest_s))  # a moment, whatever happens in it
        assert hive.process is not None
        hive.process.kill()
        hive.process.wait()
        client.wait_for_end()
        must(lambda: not list((hive.runtime / "w").iterdir()), 15, "the guards have ended all")
        hive.start()
        rows = {w["name"]: w for w in hive.ask("GET", f"{WINDOWS}?limit=1000").json["windows"]}
        state = hive.ask("GET", f"/hive/v1/sessions/{session}").json["state"]
        # Whoever was told that it is frozen finds it so.
        assert client.status != 201 or name in rows, said
        assert state == ("FROZEN" if name in rows else "ACTIVE"), said
        whole += name in rows
        if name in rows:
            report = hive.ask("POST", f"{WINDOWS}/{name}/verify", {}).json
            assert report["whole"], (said, report)
            assert report["blocks"] == rows[name]["tokens"] // SMALL["kv_chunk_tokens"], said
        folders = list((hive.state / "windows").iterdir())
        assert len(folders) == whole == len(rows), (said, folders, rows)
        half_made = hive.ask("GET", f"{WINDOWS}?state=FREEZING").json["windows"]
        assert half_made == [], said
        assert list((hive.state / "kv" / "tmp").iterdir()) == [], said
    print(f"{whole - 1} of {kills} windows were whole")
    hive.stop()


def _freeze_s(hive: Hive) -> float:
    """How long a freeze takes that nobody disturbs."""
    session = answered_session(Story(hive))
    answer = hive.ask("POST", WINDOWS, {"session_id": session, "name": "first"})
    assert answer.status == 201, answer.body
    return answer.seconds
