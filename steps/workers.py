"""Steps about workers: their states, readiness, and restarts."""

from pytest_bdd import given, parsers, then, when

from steps.engines import LAST_WORDS, SECRET
from steps.story import MODEL, WORKER, Story
from steps.waiting import must


@given("the worker has failed")
@then("the worker is given up")
def _(story: Story) -> None:
    story.hive.wait_state("FAILED", WORKER)


@given("the worker is stopped")
@then("the worker comes to rest, stopped")
def _(story: Story) -> None:
    if story.hive.worker(WORKER)["state"] == "READY":
        story.hive.ask("POST", f"/hive/v1/workers/{WORKER}/stop")
    story.hive.wait_state("STOPPED", WORKER)


@then("the worker becomes ready")
def _(story: Story) -> None:
    story.hive.wait_state("READY", WORKER)


@then("the worker becomes ready again")
def _(story: Story) -> None:
    must(lambda: story.hive.worker(WORKER)["starts"] > story.starts, 10, "a new start")
    story.hive.wait_state("READY", WORKER)


@then("the worker's reason quotes the engine's last words")
def _(story: Story) -> None:
    assert LAST_WORDS in story.hive.worker(WORKER)["reason"]


@then("the worker's reason shows neither the key nor the path")
def _(story: Story) -> None:
    reason = story.hive.worker(WORKER)["reason"]
    assert "no access with" in reason
    assert SECRET not in reason
    assert "/etc/hf" not in reason
    assert SECRET not in story.hive.log_text


@then(parsers.parse('the worker\'s reason says "{text}"'))
def _(story: Story, text: str) -> None:
    assert text in story.hive.worker(WORKER)["reason"], story.hive.worker(WORKER)["reason"]


@then(parsers.parse('the worker\'s last exit is "{text}"'))
def _(story: Story, text: str) -> None:
    assert text in story.hive.worker(WORKER)["last_exit"], story.hive.worker(WORKER)["last_exit"]


@then(parsers.parse("the worker's last exit code is {code:d}"))
def _(story: Story, code: int) -> None:
    assert story.hive.worker(WORKER)["last_exit_code"] == code


@then(parsers.parse("the worker's error is {code}"))
def _(story: Story, code: str) -> None:
    assert story.hive.worker(WORKER)["error"] == code


@then(parsers.parse("the worker's load took at least {seconds:g} second"))
def _(story: Story, seconds: float) -> None:
    assert seconds <= story.hive.worker(WORKER)["load_seconds"] < seconds + 2
    assert story.hive.metric("hive_worker_load_seconds_count", model=MODEL) == 1


@then("the model is not ready")
@then("at that moment the model is not ready")
def _(story: Story) -> None:
    assert story.hive.readiness(f"?model={MODEL}").status == 503


@then("the model is ready")
def _(story: Story) -> None:
    must(lambda: story.hive.readiness(f"?model={MODEL}").status == 200, 10, "readiness")


@then(parsers.parse('the model "{name}" is ready, but "{other}" is not'))
def _(story: Story, name: str, other: str) -> None:
    must(lambda: story.hive.readiness(f"?model={name}").status == 200, 10, f"{name} ready")
    assert story.hive.readiness(f"?model={other}").status == 503
    assert story.hive.readiness().status == 200


@then("hive is alive, but not ready")
def _(story: Story) -> None:
    assert story.hive.ask("GET", "/livez").status == 200
    assert story.hive.readiness().status == 503


@then("the worker stays ready")
def _(story: Story) -> None:
    assert story.hive.worker(WORKER)["state"] == "READY"
    assert story.hive.worker(WORKER)["starts"] == 1


@when(parsers.re(r"the worker is asked to (?P<action>start|stop|restart)"))
def _(story: Story, action: str) -> None:
    story.look_at_tree_if_any()
    story.ask("POST", f"/hive/v1/workers/{WORKER}/{action}")


@given("the engine crashed for good")
def _(story: Story) -> None:
    story.double.die("segv")
    story.hive.wait_state("FAILED", WORKER)


@given("the engine crashed and restarts in half a minute")
def _(story: Story) -> None:
    story.double.die("segv")
    must(lambda: "restart 1 of" in story.hive.worker(WORKER)["reason"], 5, "a planned restart")


@when("the operator restarts the worker")
def _(story: Story) -> None:
    story.look_at_tree()
    assert story.hive.cli("worker", "restart", WORKER, "--wait", "5").code == 0


@then("the worker's processes are new")
def _(story: Story) -> None:
    assert story.processes
    assert not {p.pid for p in story.hive.tree(WORKER)} & {p.pid for p in story.processes}
