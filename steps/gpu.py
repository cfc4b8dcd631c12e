"""Steps on a real GPU: a torch process in the engine's place, VRAM as the driver counts it.

What is missing skips a scenario and says so. The driver is asked in a process of its own, because
this one may have loaded the driver's double (tests/doubles/nvml). docs/gpu.md tells how to run it.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from pytest_bdd import given, parsers, then, when

from steps import leaks
from steps.driver import ROOT
from steps.story import MODEL, WORKER, Story
from steps.waiting import must, until

PROGRAM = ROOT / "tests" / "doubles" / "torch_engine.py"
PYTHON = "HIVE_GPU_PYTHON"  # names a Python that has torch for CUDA
DEVICE = "cuda:0"
MIB, GIB = 2**20, 2**30
LOAD_S = 120.0  # torch, read from a cold disk, and its CUDA context
RETURN_S = 10.0  # what the driver may need to take the memory of an ended process back
TOLERANCE = 256 * MIB  # the driver's own bookkeeping
CONTEXT = 2 * GIB  # beside what a process of torch asks for: CUDA's context, kernels, cuBLAS
LOOK = """
import json, pynvml as nvml

def look(index):
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        is_split = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:
        is_split = False
    return {
        "index": index,
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "name": nvml.nvmlDeviceGetName(handle),
        "total": memory.total,
        "used": memory.used,
        "free": memory.free,
        "pids": sorted(p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)),
        "is_split": is_split,
    }

try:
    nvml.nvmlInit()
    print(json.dumps([look(index) for index in range(nvml.nvmlDeviceGetCount())]))
except nvml.NVMLError as exc:
    raise SystemExit(str(exc))
"""
COMPUTE = "import torch; print(int(torch.ones(2, device='cuda:0').sum()))"


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver tells it; bytes."""

    index: int
    uuid: str
    name: str
    total: int
    used: int
    free: int
    pids: list[int]
    is_split: bool


class NoDriver(Exception):
    """The driver's own words."""


def look() -> list[Gpu]:
    """Every GPU of this host, now."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOOK],
        env=_seeing(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise NoDriver(_last_line(done.stderr))
    return [Gpu(**one) for one in json.loads(done.stdout)]


def first() -> Gpu:
    return look()[0]


def _seeing(visible: str | None = None) -> dict[str, str]:
    """This process's environment, with the real driver, and to CUDA that GPU alone."""
    env = {k: v for k, v in os.environ.items() if k not in ("NVML_DOUBLE", "CUDA_VISIBLE_DEVICES")}
    return env if visible is None else {**env, "CUDA_VISIBLE_DEVICES": visible}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


# ── what there is to be ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def gpus_of_host() -> None:
    """At least one GPU, or the reason why not."""
    try:
        if not look():
            pytest.skip("no GPU: the driver lists none")
    except NoDriver as exc:
        pytest.skip(f"no GPU that can be asked: {exc}")


@pytest.fixture(scope="session")
def torch_python(gpus_of_host: None) -> str:
    """A Python whose torch computes on the GPU; what was named and does not is no reason to skip."""
    named = os.environ.get(PYTHON)
    python = named or (sys.executable if importlib.util.find_spec("torch") else None)
    if python is None:
        pytest.skip(f"no torch: set {PYTHON} to a Python that has it for CUDA (docs/gpu.md)")
    try:
        done = subprocess.run(
            [python, "-c", COMPUTE],
            env=_seeing(first().uuid),
            capture_output=True,
            text=True,
            timeout=LOAD_S,
            check=False,
        )
    except OSError as exc:
        pytest.fail(f"{PYTHON}={python}: {exc.strerror}", pytrace=False)
    if done.returncode:
        said = f"torch of {python} cannot compute on {DEVICE}: {_last_line(done.stderr)}"
        (pytest.fail if named else pytest.skip)(said)
    return python


@pytest.fixture(autouse=True)
def _vram_gate(request: pytest.FixtureRequest) -> Iterator[None]:
    """The leak gate for VRAM: used memory of every GPU is back where it was."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    request.getfixturevalue("gpus_of_host")
    before = {gpu.uuid: gpu.used for gpu in look()}
    yield
    left: list[str] = []

    def is_back() -> bool:
        nonlocal left
        left = [
            f"{(gpu.used - before[gpu.uuid]) / MIB:.0f} MiB of cuda:{gpu.index} (pids {gpu.pids})"
            for gpu in look()
            if gpu.used - before[gpu.uuid] > TOLERANCE
        ]
        return not left

    if not until(is_back, RETURN_S):
        said = f"{request.node.name} left VRAM behind: {'; '.join(left)}"
        pytest.fail(f"RESOURCE_LEAK_DETECTED: {said}", pytrace=False)


Hold = Callable[[int], "subprocess.Popen[bytes]"]


@pytest.fixture
def hold(torch_python: str) -> Iterator[Hold]:
    """Start a process that is not hive's and holds so many GiB of the GPU."""
    started: list[subprocess.Popen[bytes]] = []

    def start(gib: int) -> "subprocess.Popen[bytes]":
        command = [torch_python, "-P", str(PROGRAM), "--hold-only", "--hold-gib", str(gib)]
        process = subprocess.Popen(command, env=_seeing(first().uuid), stdout=subprocess.PIPE)
        leaks.started_pids.add(process.pid)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == b"holding\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@given("a real GPU on which nobody computes")
def _(story: Story, torch_python: str) -> None:
    gpu = story.kept["before"] = first()
    if gpu.is_split:
        pytest.skip(f"{DEVICE} is split into MIG instances; hive serves whole GPUs")
    if gpu.pids:
        pytest.skip(f"{DEVICE} is used by others: pids {gpu.pids}")


@given(parsers.parse("a model on it whose engine holds {gib:d} GiB with torch"))
def _(story: Story, torch_python: str, gib: int) -> None:
    story.kept["held"] = gib * GIB
    _engine(story, torch_python, "--hold-gib", str(gib))
    story.hive.sections["timeouts"]["load_s"] = LOAD_S


@given(parsers.re(r"its memory is held by (?P<whom>the engine itself|a process that hid)"))
def _(story: Story, torch_python: str, whom: str) -> None:
    if whom == "a process that hid":
        gib = str(story.kept["held"] // GIB)
        _engine(story, torch_python, "--hold-gib", gib, "--child")


@given(parsers.parse("its engine needs {gib:d} GiB more than the GPU has"))
def _(story: Story, torch_python: str, gib: int) -> None:
    before: Gpu = story.kept["before"]
    asked_gib = math.ceil(before.free / GIB) + gib
    _engine(story, torch_python, "--hold-gib", str(asked_gib))
    _expect(story, asked_gib, before.free - CONTEXT, before.free + TOLERANCE)


@given(parsers.parse("the model is known to need {gib:d} GiB more than the GPU has"))
def _(story: Story, gib: int) -> None:
    before: Gpu = story.kept["before"]
    needed_gib = math.ceil(before.free / GIB) + gib
    model = story.hive.models[MODEL]
    story.hive.model(MODEL, **{**model.extra, "required_vram_gib": needed_gib})
    _expect(story, needed_gib, before.free - TOLERANCE, before.free + TOLERANCE)


def _engine(story: Story, python: str, *flags: str) -> None:
    command = [python, "-P", str(PROGRAM), "--uds", "{socket}", *flags]
    story.hive.model(MODEL, device=DEVICE, command=command)


def _expect(story: Story, asked_gib: int, least: int, most: int) -> None:
    """What an error must tell: how much was asked for, and between what the rest lies (bytes)."""
    story.kept["numbers"] = (asked_gib * 1024, least / MIB, most / MIB)


@given(parsers.parse("another process holds {gib:d} GiB of the GPU"))
def _(story: Story, hold: Hold, gib: int) -> None:
    process = hold(gib)
    if not (seen := first().pids):
        pytest.skip("the driver shows no processes here: nobody can be named")
    # Of another namespace (a container) their numbers are others.
    story.kept["holders"] = [process.pid] if process.pid in seen else seen


@given("hive is serving on the GPU")
def _(story: Story) -> None:
    story.hive.start(within_s=LOAD_S)
    ours = {process.pid for process in story.hive.tree(WORKER)}
    story.kept["sees_pids"] = not ours.isdisjoint(first().pids)


# ── what happens ────────────────────────────────────────────────────────────────────────────────


@when("hive is started on the GPU and ends by itself")
def _(story: Story) -> None:
    story.ran = story.hive.serve_to_the_end(within_s=LOAD_S)


@when(parsers.parse("the engine asks for {gib:d} GiB more than the GPU has left"))
def _(story: Story, gib: int) -> None:
    free = first().free
    asked_gib = math.ceil(free / GIB) + gib
    _expect(story, asked_gib, free - TOLERANCE, free + TOLERANCE)
    _exhaust(story, asked_gib)


@when("the engine takes all that is left, GiB by GiB")
def _(story: Story) -> None:
    _expect(story, 1, 0, GIB)
    _exhaust(story, 1)


@given("the engine has run out of the GPU's memory")
def _(story: Story) -> None:
    _exhaust(story, 1)
    story.hive.wait_state("QUARANTINED", WORKER)


def _exhaust(story: Story, gib: int) -> None:
    story.look_at_tree()
    story.ask("POST", "/v1/oom", {"model": MODEL, "gib": gib})


@when("a kernel of the engine reads out of bounds")
def _(story: Story) -> None:
    story.look_at_tree()
    story.ask("POST", "/v1/fault", {"model": MODEL, "kind": "illegal"})


# ── what is seen ────────────────────────────────────────────────────────────────────────────────


@then("the GPU is listed as the driver itself tells it")
def _(story: Story) -> None:
    gpu, shown = first(), _shown(story)
    assert (shown["uuid"], shown["name"]) == (gpu.uuid, gpu.name)
    assert shown["vram_total_bytes"] == gpu.total
    assert abs(shown["vram_used_bytes"] - gpu.used) <= TOLERANCE
    assert abs(shown["vram_free_bytes"] - gpu.free) <= TOLERANCE
    if gpu.pids:
        assert sorted(process["pid"] for process in shown["processes"]) == gpu.pids


def _shown(story: Story) -> Mapping[str, Any]:
    assert story.ran
    found: Mapping[str, Any] = next(d for d in story.ran.json["devices"] if d["id"] == DEVICE)
    return found


@then("the metrics tell the GPU's memory")
def _(story: Story) -> None:
    gpu = first()
    for kind, size in (("total", gpu.total), ("used", gpu.used), ("free", gpu.free)):
        told = story.hive.metric("hive_device_vram_bytes", device=DEVICE, kind=kind)
        assert abs(told - size) <= TOLERANCE, (kind, told, size)


@then("torch sees that GPU and no other")
def _(story: Story) -> None:
    before: Gpu = story.kept["before"]
    seen = story.ask("POST", "/v1/device", {"model": MODEL}).json
    assert seen["names"] == [before.name]
    assert seen["uuids"] in ([before.uuid.removeprefix("GPU-")], [None])


@then(parsers.parse("the GPU has {gib:d} GiB less"))
def _(story: Story, gib: int) -> None:
    before: Gpu = story.kept["before"]
    taken = before.free - first().free
    assert gib * GIB <= taken <= gib * GIB + CONTEXT, taken / MIB


@then("the engine's process is named for them, where the driver shows processes")
def _(story: Story) -> None:
    story.ran = story.hive.cli("devices", "--json")
    ours = [process for process in _shown(story)["processes"] if process["is_ours"]]
    if not story.kept["sees_pids"]:
        assert ours == []
        return
    assert [process["pid"] for process in ours] == [story.hive.worker(WORKER)["pid"]]
    (size,) = (process["vram_bytes"] for process in ours)
    assert size is None or size >= story.kept["held"]  # some drivers do not say


@then("its receipt says returned, or unproven where the driver shows no processes")
def _(story: Story) -> None:
    outcome = "returned" if story.kept["sees_pids"] else "unproven"
    must(
        lambda: story.hive.metric("hive_vram_receipts_total", device=DEVICE, outcome=outcome) == 1,
        RETURN_S + 5,
        lambda: f"{outcome}; have {story.hive.logged('vram after the end')}",
    )


@then("the GPU has all of it back")
def _(story: Story) -> None:
    before: Gpu = story.kept["before"]
    must(
        lambda: first().used - before.used <= TOLERANCE,
        RETURN_S,
        lambda: f"used as before ({before}); it is {first()}",
    )


@then("it names who holds the GPU")
def _(story: Story) -> None:
    assert story.ran
    told = story.ran.last_line["error"]["details"]["holders"]
    assert [holder["pid"] for holder in told] == story.kept["holders"]


@then("nothing was started on it")
def _(story: Story) -> None:
    assert not (story.hive.state / "logs" / f"{WORKER}.log").exists()


@then("the error tells what was asked for and what the driver had left")
def _(story: Story) -> None:
    error = story.ran.last_line["error"] if story.ran else story.answer.error
    required, least, most = story.kept["numbers"]
    told = error["details"]
    assert error["message"].startswith("GPU out of memory: "), error
    assert told["required_vram_mb"] == required
    assert least <= told["available_vram_mb"] <= most, (told, story.kept["numbers"])
    assert (told["model"], told["device"]) == (MODEL, DEVICE)


@then(parsers.parse('it tells "{name}" as an alternative, which was not started either'))
def _(story: Story, name: str) -> None:
    assert story.ran
    assert story.ran.last_line["error"]["details"]["alternative_models"] == [name]
    assert not (story.hive.state / "logs" / f"{name}-0.log").exists()


@then("the engine comes back")
def _(story: Story) -> None:
    must(lambda: story.hive.worker(WORKER)["starts"] > story.starts, LOAD_S, "a new start")
    story.hive.wait_state("READY", WORKER, within_s=LOAD_S)
