"""Steps about GPUs: the driver's double, what it shows, and what befalls it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from steps import leaks
from steps.story import MODEL, WORKER, Story, is_alive
from steps.waiting import must
from tests.doubles.nvml import Gpus

HOLDER = "import sys; sys.stdin.read()"  # ends with its input
MIB = 2**20
# What "a GPU that …" means to the driver's double.
STATES: dict[str, Any] = {
    "could not remap a memory row": lambda gpus: gpus.change(0, remap_failed=1),
    "is split into instances": lambda gpus: gpus.change(0, mig=1),
    "does not answer the driver": lambda gpus: gpus.hang("nvmlDeviceGetMemoryInfo", 0),
    "is lost": lambda gpus: gpus.fail("nvmlDeviceGetMemoryInfo", 15, 0),
}
# A process of another program on the device, by scenario.
strangers: list["subprocess.Popen[bytes]"] = []


@pytest.fixture(autouse=True)
def _strangers_end() -> Iterator[None]:
    yield
    while strangers:
        process = strangers.pop()
        process.communicate(b"")


def gpus_of(story: Story) -> Gpus:
    """The scenario's GPUs; hive and its engines see them from their start."""
    if "gpus" not in story.kept:
        story.kept["gpus"] = Gpus(story.hive.home / "gpu")
        story.hive.env |= story.kept["gpus"].env
    gpus: Gpus = story.kept["gpus"]
    return gpus


def model_on(story: Story, name: str, device: str) -> None:
    model = story.hive.models.get(name)
    knobs, extra = (model.knobs, model.extra) if model else ((), {})
    story.hive.model(name, *knobs, **{**extra, "device": device})


def hold(story: Story, mib: int) -> None:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", HOLDER], stdin=subprocess.PIPE)
    leaks.started_pids.add(process.pid)
    strangers.append(process)
    gpus_of(story).hold(0, process.pid, mib)


# ── what there is ───────────────────────────────────────────────────────────────────────────────


@given("a GPU")
def _(story: Story) -> None:
    gpus_of(story).add()


@given(parsers.parse("a GPU with {total:d} MiB, of which {used:d} MiB are used"))
def _(story: Story, total: int, used: int) -> None:
    gpus_of(story).add(total_mib=total, base_mib=used)


@given(parsers.parse("a GPU that {state}"))
def _(story: Story, state: str) -> None:
    story.hive.sections["server"]["driver_call_s"] = 0.5
    gpus_of(story).add()
    STATES[state](gpus_of(story))


@given("a driver that shows its GPU only after a second")
def _(story: Story) -> None:
    gpus = gpus_of(story)
    plugging = threading.Timer(1, gpus.add)
    plugging.start()
    story.kept["plugging"] = plugging


@given("two GPUs, of which the second has the name that sorts first")
def _(story: Story) -> None:
    # CUDA's own order goes by speed; the driver's by the bus. Nothing else may decide.
    gpus_of(story).add(0, name="NVIDIA T4", uuid="GPU-bbbbbbbb-0000-0000-0000-000000000000")
    gpus_of(story).add(1, name="NVIDIA A100", uuid="GPU-aaaaaaaa-0000-0000-0000-000000000000")


@given(parsers.parse("a model on {device:S}"))
def _(story: Story, device: str) -> None:
    model_on(story, MODEL, device)


@given("a model on the second GPU by its UUID")
def _(story: Story) -> None:
    model_on(story, MODEL, "GPU-aaaaaaaa-0000-0000-0000-000000000000")


@given(parsers.parse("a second model on {device}"))
def _(story: Story, device: str) -> None:
    model_on(story, "other", device)


@given(parsers.parse('the model may be replaced by "{name}"'))
def _(story: Story, name: str) -> None:
    model = story.hive.models[MODEL]
    story.hive.model(name, device="cpu")
    story.hive.model(MODEL, *model.knobs, **{**model.extra, "alternatives": [name]})


@given(parsers.parse("its engine takes {mib:d} MiB of the GPU"))
def _(story: Story, mib: int) -> None:
    _with_knobs(story, "--vram-mib", str(mib))


@given("its engine needs more GPU memory than there is")
def _(story: Story) -> None:
    _with_knobs(story, "--vram-mib", "100000")


def _with_knobs(story: Story, *knobs: str) -> None:
    model = story.hive.models[MODEL]
    story.hive.model(MODEL, *model.knobs, *knobs, **model.extra)


@given(parsers.parse("another process holds {mib:d} MiB of it"))
@when(parsers.parse("another process takes {mib:d} MiB of it"))
def _(story: Story, mib: int) -> None:
    hold(story, mib)


@given("the GPU keeps what its processes held")
def _(story: Story) -> None:
    gpus_of(story).change(0, keeps=1)


@given("the driver shows no processes")
def _(story: Story) -> None:
    gpus_of(story).hide_pids()


# ── what happens to it ──────────────────────────────────────────────────────────────────────────


@given(parsers.parse("the driver has reported Xid {xid:d}"))
def _(story: Story, xid: int) -> None:
    _report(story, xid)
    story.hive.wait_state("QUARANTINED", WORKER)


@when(parsers.parse("the driver reports Xid {xid:d}"))
def _(story: Story, xid: int) -> None:
    _report(story, xid)


def _report(story: Story, xid: int) -> None:
    story.look_at_tree_if_any()
    gpus_of(story).xid(0, xid)


@given("the GPU has fallen off the bus")
def _(story: Story) -> None:
    story.look_at_tree_if_any()
    gpus_of(story).change(0, lost=1)
    story.hive.wait_state("QUARANTINED", WORKER)


@when("the GPU falls off the bus")
def _(story: Story) -> None:
    story.look_at_tree()
    gpus_of(story).change(0, lost=1)


@when("the driver hangs")
def _(story: Story) -> None:
    story.look_at_tree()
    gpus_of(story).hang("nvmlDeviceGetMemoryInfo", 0)


@when("the engine runs out of GPU memory")
def _(story: Story) -> None:
    story.look_at_tree()
    story.double.die("cuda_oom")


@when("the engine dies while it speaks of GPU memory")
def _(story: Story) -> None:
    story.look_at_tree()
    story.double.die("cuda_oom_words")


@when(parsers.parse("the driver reports Xid {xid:d} and the engine dies of it"))
def _(story: Story, xid: int) -> None:
    _report(story, xid)
    must(lambda: story.hive.metric("hive_xid_total", xid=str(xid)) == 1, 5, "the Xid is counted")
    story.double.die("cuda_illegal")


# ── what is seen ────────────────────────────────────────────────────────────────────────────────


@then("the engine sees the second GPU alone")
def _(story: Story) -> None:
    assert _visible(story) == "GPU-aaaaaaaa-0000-0000-0000-000000000000"


@then("the engine sees no GPU")
def _(story: Story) -> None:
    assert _visible(story) == ""


def _visible(story: Story) -> str:
    pid = story.hive.worker(WORKER)["pid"]
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    (visible,) = (e for e in environment if e.startswith("CUDA_VISIBLE_DEVICES="))
    return visible.partition("=")[2]


@then("it names that process")
def _(story: Story) -> None:
    assert story.ran
    assert f"(pid {strangers[-1].pid}" in story.ran.err
    told = story.ran.last_line["error"]["details"]["holders"]
    assert [holder["pid"] for holder in told] == [strangers[-1].pid]


@then("the worker's reason names that process")
def _(story: Story) -> None:
    assert f"(pid {strangers[-1].pid}" in story.hive.worker(WORKER)["reason"]


@then("the log names that process")
def _(story: Story) -> None:
    pid = strangers[-1].pid
    event = "a process that is not hive's holds a device"
    must(lambda: story.hive.logged(event, pid=pid), 5, f"{pid} in the log")


@then(
    parsers.parse(
        "the error tells {required:d} MiB required, {available:d} MiB available, "
        'and "{other}" as an alternative'
    )
)
def _(story: Story, required: int, available: int, other: str) -> None:
    assert story.ran
    told = story.ran.last_line["error"]["details"]
    assert told["required_vram_mb"] == required
    assert told["available_vram_mb"] == available
    assert told["alternative_models"] == [other]
    assert told["model"] == MODEL
    assert told["device"] == "cuda:0"


@given("the worker was started in vain")
def _(story: Story) -> None:
    story.hive.ask("POST", f"/hive/v1/workers/{WORKER}/start")
    story.hive.wait_state("QUARANTINED", WORKER)


@then("the worker is quarantined")
def _(story: Story) -> None:
    story.hive.wait_state("QUARANTINED", WORKER)


@then(parsers.parse("the metrics say that {device} is {state}"))
def _(story: Story, device: str, state: str) -> None:
    must(
        lambda: story.hive.metric("hive_device_state", device=device, state=state) == 1,
        5,
        f"{device} is {state}",
    )


@then(
    parsers.parse(
        "the metrics say that {device} has {celsius:d} °C, {errors:d} ECC errors and {gib:d} GiB "
        "of memory"
    )
)
def _(story: Story, device: str, celsius: int, errors: int, gib: int) -> None:
    metric = story.hive.metric
    must(lambda: metric("hive_device_temperature_celsius", device=device) == celsius, 5, "a look")
    assert metric("hive_device_ecc_errors", device=device) == errors
    assert metric("hive_device_vram_bytes", device=device, kind="total") == gib * 2**30


@then(parsers.parse("readiness and metrics say that {device} is {state}"))
def _(story: Story, device: str, state: str) -> None:
    must(
        lambda: story.hive.metric("hive_device_state", device=device, state=state) == 1,
        5,
        f"{device} is {state}",
    )
    assert story.hive.readiness().json["devices"][device] == state


@then(parsers.parse("the metrics count Xid {xid:d} on {device}"))
def _(story: Story, xid: int, device: str) -> None:
    must(
        lambda: story.hive.metric("hive_xid_total", device=device, xid=str(xid)) == 1,
        5,
        f"Xid {xid}",
    )


@then(parsers.parse("the last line of the log is the error {code}"))
def _(story: Story, code: str) -> None:
    story.hive.wait_exit()
    assert story.hive.last_error["code"] == code


@then(parsers.parse('the log says "{text}"'))
def _(story: Story, text: str) -> None:
    must(lambda: text in story.hive.log_text, 5, lambda: f"{text} in {story.hive.log_text}")


@then(parsers.parse("the VRAM of {device} was {outcome}"))
def _(story: Story, device: str, outcome: str) -> None:
    must(
        lambda: story.hive.metric("hive_vram_receipts_total", device=device, outcome=outcome) == 1,
        15,
        lambda: f"a receipt; have {story.hive.logged('vram after the end')}",
    )


@then(parsers.parse('"hive leaks" tells {mib:d} MiB of VRAM'))
def _(story: Story, mib: int) -> None:
    ran = story.hive.cli("leaks", "--json")
    assert ran.code == 1
    (leak,) = ran.json["leaks"]
    assert leak["kind"] == "vram"
    assert leak["worker"] == WORKER
    assert f"{mib} MiB" in leak["holder"]
    assert leak["how_to_clear"]


@then("there are no leaks")
def _(story: Story) -> None:
    ran = story.hive.cli("leaks", "--json")
    assert (ran.code, ran.json) == (0, {"leaks": []})


@then(parsers.parse("hive ends with exit code {code:d} when it is asked to stop"))
def _(story: Story, code: int) -> None:
    assert story.hive.process
    story.hive.process.terminate()
    assert story.hive.wait_exit() == code
    assert story.hive.last_error["code"] == "RESOURCE_LEAK_DETECTED"
    assert not any(map(is_alive, story.processes))
