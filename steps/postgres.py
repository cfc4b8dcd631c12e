"""Steps about PostgreSQL as the catalogue: a real server, which hangs or ends while hive runs."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_bdd import given, parsers, then, when

from steps.driver import Hive, chat_body, run_hive
from steps.memory import HEADER, SMALL, WINDOWS, chat_in
from steps.story import CHAT, MODEL, Story
from steps.waiting import must
from tests.postgres import Server, server

PASSWORD = "g3heim"
DATABASE = "hive"
# hive, but with less patience.
PROGRAM = """
import runpy, sys
import hive.storage.postgres as postgres

postgres.LIMIT_S = 2.0
sys.argv = sys.argv[sys.argv.index("hive") :]
runpy.run_module("hive", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The one that tests share: it ends with them."""
    with server() as it:
        yield it


@pytest.fixture
def own_postgres() -> Iterator[Server]:
    """One that a scenario may break."""
    with server() as it:
        yield it


@given("the catalogue is a PostgreSQL database")
def _(story: Story, own_postgres: Server) -> None:
    own_postgres.make_database(DATABASE)
    url = own_postgres.url(DATABASE, password=PASSWORD)
    windows = story.hive.sections.setdefault("windows", {})
    windows |= {**SMALL, "catalogue_url": url}
    story.hive.starter = (sys.executable, "-c", PROGRAM)


@given("hive has a model with windows")
def _(story: Story) -> None:
    story.hive.model(MODEL, windows=True)


@given("its answer is written down")
def _(story: Story) -> None:
    path = f"/hive/v1/sessions/{story.kept['session']}"
    must(lambda: story.hive.ask("GET", path).json["messages"], 5, "the answer is recorded")


@given("PostgreSQL has ended")
@when("PostgreSQL ends")
def _(own_postgres: Server) -> None:
    own_postgres.end()


@when("PostgreSQL hangs")
def _(own_postgres: Server) -> None:
    own_postgres.hang()


@when("PostgreSQL is back")
def _(own_postgres: Server) -> None:
    if own_postgres.process is None:
        own_postgres.start()
    own_postgres.go_on()


@when("hive is stopped, the database is made anew, and hive is started again")
def _(story: Story, own_postgres: Server) -> None:
    story.hive.stop()
    own_postgres.sql(f"DROP DATABASE {DATABASE}")
    own_postgres.make_database(DATABASE)
    story.hive.start()


@when("another hive is started with the same database")
def _(story: Story) -> None:
    second = Hive(Path(tempfile.mkdtemp(dir=story.hive.home)))
    second.sections["windows"] = dict(story.hive.sections["windows"])
    second.model(MODEL, windows=True)
    story.ran = second.serve_to_the_end()


@when(parsers.parse("the operator runs hive {command} for it"))
def _(story: Story, command: str) -> None:
    story.hive.write_config()
    story.ran = run_hive(command, "--config", str(story.hive.config))


@then(
    parsers.parse(
        "freeze, thaw, list and a chat in a session are refused with {code} within {seconds:d} "
        "seconds"
    )
)
def _(story: Story, code: str, seconds: int) -> None:
    session = story.kept["session"]
    asked = [
        story.hive.stream(WINDOWS, {"session_id": session, "name": "wednesday"}),
        story.hive.stream(f"{WINDOWS}/monday/thaw", {}),
        story.hive.stream(CHAT, chat_in(), {HEADER: session}),
    ]
    answers = [story.hive.ask("GET", WINDOWS), *(one.answer for one in asked)]
    assert [answer.code for answer in answers] == [code] * len(answers)
    assert max(answer.seconds for answer in answers) < seconds


@then("chats without a session are answered meanwhile")
def _(story: Story) -> None:
    listed = story.hive.stream(f"{WINDOWS}/monday/thaw", {})
    for number in range(3):
        answer = story.hive.ask("POST", CHAT, chat_body(MODEL, f"without {number}"))
        assert answer.status == 200, answer.body
        assert answer.seconds < 2
    listed.wait_for_end()


@then(parsers.parse('the windows are "{names}"'))
def _(story: Story, names: str) -> None:
    found = story.hive.ask("GET", f"{WINDOWS}?sort=name&order=asc").json["windows"]
    assert ", ".join(one["name"] for one in found) == names


@then("there is no catalogue in hive's state directory")
def _(story: Story) -> None:
    assert not list(story.hive.state.glob("catalogue.db*"))


@then("the database's password is in no log")
def _(story: Story) -> None:
    assert "STORE_UNREACHABLE" in story.hive.log_text
    assert PASSWORD not in story.hive.log_text


@then("it names the database, and not its password")
def _(story: Story) -> None:
    assert story.ran
    told = "".join((story.ran.out + story.ran.err).split())  # a table has lines of its own
    assert f"postgresql://hive@/{DATABASE}?host=" in told
    assert PASSWORD not in told
