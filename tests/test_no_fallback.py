"""No way leads from a configured GPU to another device, the CPU or less than was asked for (C6).

Read and run: every table, every argument and environment that an engine can be started with, for
the first time and after every kind of end, and the code that sees a device's error (R013-R015).
"""

import ast
import dataclasses
import importlib
import itertools
import json
import os
import pkgutil
import re
import sys
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import hive
from hive.devices import nvml
from hive.devices.nvml import Device, Driver
from hive.devices.watch import Devices
from hive.errors import CudaDeviceNotFound, DeviceError, GpuQuarantined, ServiceUnavailable
from hive.events import Announcer
from hive.policy import lifecycle
from hive.policy.admission import Ticket
from hive.policy.lifecycle import News, State
from hive.policy.restarts import RestartPolicy
from hive.settings import Settings
from hive.workers.client import EngineClient
from hive.workers.fleet import Fleet
from hive.workers.ledger import Ledger
from hive.workers.ports import Engine
from hive.workers.preflight import prepare_directories
from hive.workers.process import Launch, Place
from hive.workers.worker import Worker, WorkerPlan
from tests.devices.conftest import driver, driver_of, gpus  # noqa: F401 (fixtures)
from tests.doubles.engine import tracebacks
from tests.doubles.nvml import Gpus
from tests.patience import awaited, short_directory, until
from tests.workers.standing import admitted, standing

GIB = 2**30
TOP = Path(__file__).parents[1]
# What a program may be told to compute on.
DEVICE = re.compile(r"cpu|cuda:\d*|mps|xpu|rocm|hip|tpu")
UUIDS = [f"GPU-{number:08d}-0000-0000-0000-000000000000" for number in range(3)]
NAMES = {f"cuda:{number}": uuid for number, uuid in enumerate(UUIDS)} | {u: u for u in UUIDS}
SMALL = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}"]}


@pytest.fixture
def home() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


def settings_of(home: Path, models: Mapping[str, Any], **sections: Any) -> Settings:
    server = {"state_dir": home / "s", "runtime_dir": home / "r", "gpu_error_policy": "quarantine"}
    given = {"server": server, "models": {**models, "small": SMALL}, **sections}
    settings = Settings.model_validate(given)
    prepare_directories(settings)
    return settings


def fleet_of(settings: Settings, driver: Driver, resolved: Mapping[str, Device]) -> Fleet:
    announcer = Announcer()
    ledger = Ledger(settings.server.state_dir / "ledger", announcer.announce)
    devices = Devices(driver, resolved, announcer, poll_s=0.01)
    return Fleet(settings, devices, ledger, announcer)


# ── Every start's arguments and environment ─────────────────────────────────────────────────────

ON = (["cpu"], ["cuda:0"], [UUIDS[1]], ["cuda:0", "cuda:1"], ["cuda:2", UUIDS[0]])
MEMORY: tuple[dict[str, Any], ...] = (
    {},
    {"kv_cache_gib": 0.5},
    {"kv_cache_gib": 40},
    {"required_vram_gib": 0.1},
    {"required_vram_gib": 200},
    {"kv_cache_gib": 4, "required_vram_gib": 30},
)
ARGS = ((), ("--max-model-len", "512"), ("--gpu-memory-utilization=0.5", "--dtype", "float16"))
TOTALS = (16 * GIB, 80 * GIB)
# What hive itself may say to vLLM; each is checked below.
OWN_OPTIONS = {
    "--model",
    "--served-model-name",
    "--uds",
    "--disable-uvicorn-access-log",
    "--enable-log-requests",
    "--max-log-len",
    "--tensor-parallel-size",
    "--kv-cache-memory-bytes",
    "--gpu-memory-utilization",
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A whole model of 8 GiB that take no room on the disk."""
    (tmp_path / "config.json").write_text("{}")
    tensor = {"dtype": "BF16", "shape": [4 * GIB], "data_offsets": [0, 8 * GIB]}
    header = json.dumps({"w": tensor}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8 * GIB)
    return tmp_path


def engines(weights: Path) -> Iterator[dict[str, Any]]:
    for path in ("org/large", str(weights)):
        yield {"engine": "vllm", "path": path, "python": sys.executable}
    command = ["sh", "{socket}", "{model}"]
    yield {"engine": "command", "command": command}


def plans(home: Path, models: Mapping[str, Any]) -> list[WorkerPlan]:
    """What is planned for each model but the small one."""
    resolved = {name: Device(UUIDS.index(uuid), uuid, "a GPU") for name, uuid in NAMES.items()}
    fleet = fleet_of(settings_of(home, models), Driver(), resolved)
    return [worker.plan for worker in fleet.workers.values() if worker.model != "small"]


def placeless(launch: Launch, place: Place) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment without what differs in each start: its directory and its mark."""

    def put(text: str) -> str:
        return text.replace(str(place.home), "HOME").replace(place.mark, "MARK")

    return [put(part) for part in launch.argv], {k: put(v) for k, v in launch.env.items()}


def after(argv: list[str], option: str) -> str | None:
    return argv[argv.index(option) + 1] if option in argv else None


@pytest.mark.parametrize("on", ON, ids=",".join)
def test_an_engine_is_told_its_own_devices_and_nothing_less(
    on: list[str], home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment that would lead it astray."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    uuids = [NAMES[name] for name in on if name != "cpu"]
    asked = [
        {**engine, **memory, "args": args, "device": on, "alternatives": ["small"]}
        for engine, memory, args in itertools.product(engines(weights), MEMORY, ARGS)
    ]
    # One at a time: they are not to share their devices.
    for model, total in itertools.product(asked, TOTALS):
        (plan,) = plans(home, {"large": model})
        assert plan.devices == tuple(on)
        place, again = (Place(Path(f"/run/hive/w/{number}"), Path("/dev/null")) for number in "12")
        size = total if uuids else 0
        launch = plan.engine.launch(place, plan.devices, plan.visible, size)
        argv, env = placeless(launch, place)

        assert env["CUDA_VISIBLE_DEVICES"] == ",".join(uuids)
        assert "VLLM_TARGET_DEVICE" not in env or model["engine"] == "command"
        assert argv[len(argv) - len(model["args"]) :] == list(model["args"])
        said = [f"{key}={value}" for key, value in env.items() if os.environ.get(key) != value]
        words = " ".join([*argv[1:], *said]).lower()
        assert "small" not in words
        assert set(re.findall(r"gpu-[0-9a-f-]{8,}", words)) == {uuid.lower() for uuid in uuids}
        if model["engine"] == "vllm":
            check_vllm(argv[: len(argv) - len(model["args"])], env, model, uuids)
            assert not uuids or not re.search(r"cpu|cuda:|--device", words), words
        second = plan.engine.launch(again, plan.devices, plan.visible, size)
        assert placeless(second, again) == (argv, env)


def check_vllm(
    own: list[str], env: Mapping[str, str], model: Mapping[str, Any], uuids: Collection[str]
) -> None:
    """hive's `own` arguments ask for all that is configured, and for nothing that is less."""
    assert {part for part in own if part.startswith("--")} <= OWN_OPTIONS
    assert "VLLM_CPU_KVCACHE_SPACE" not in env
    assert after(own, "--model") == model["path"]
    assert after(own, "--tensor-parallel-size") == (str(len(uuids)) if len(uuids) > 1 else None)
    kv_gib = model.get("kv_cache_gib", 0) or (0 if uuids else 1)
    kv = str(int(kv_gib * GIB)) if kv_gib else None
    assert after(own, "--kv-cache-memory-bytes") == kv
    share = after(own, "--gpu-memory-utilization")
    assert share is None or (uuids and 0 < float(share) <= 1)


def test_a_name_means_one_gpu_or_none(gpus: Gpus, driver: Driver) -> None:
    for number, uuid in enumerate(UUIDS):
        gpus.add(number, uuid=uuid)

    resolved = nvml.resolve(driver, [*NAMES, "cpu"])
    assert {name: device.uuid for name, device in resolved.items()} == NAMES
    for missing in ("cuda:3", "GPU-99999999-0000-0000-0000-000000000000"):
        with pytest.raises(CudaDeviceNotFound):
            nvml.resolve(driver, ["cuda:0", missing])


@pytest.mark.parametrize("state", [state for state in State if state is not State.READY])
@awaited
async def test_a_request_is_never_answered_by_another_model(home: Path, state: State) -> None:
    """(R015)"""
    large = {**SMALL, "device": "cuda:0", "alternatives": ["small"]}
    resolved = {"cuda:0": Device(0, UUIDS[0], "a GPU")}
    fleet = fleet_of(settings_of(home, {"large": large}), Driver(), resolved)
    async with standing(fleet.worker("small-0")), standing(fleet.worker("large-0"), state):
        with pytest.raises((ServiceUnavailable, GpuQuarantined)):
            await admitted(fleet.door("large"), Ticket())

        assert (await admitted(fleet.door("small"), Ticket())).worker.id == "small-0"


# ── After every kind of end ─────────────────────────────────────────────────────────────────────


class Recorded:
    """An engine whose launches are written down, while a program runs that ends in some way."""

    def __init__(self, engine: Engine, ends: Path) -> None:
        self.health_path = engine.health_path
        self.has_gauges, self.computing = engine.has_gauges, engine.computing
        self.address = engine.address
        self.launches: list[tuple[list[str], dict[str, str]]] = []
        self._engine, self._ends = engine, ends

    def launch(
        self, place: Place, devices: tuple[str, ...], visible: str | None, total_bytes: int
    ) -> Launch:
        launch = self._engine.launch(place, devices, visible, total_bytes)
        self.launches.append(placeless(launch, place))
        return replace(launch, argv=["/bin/sh", str(self._ends)], vital=(), kill_s=5)

    async def probe(self, client: EngineClient) -> None:
        await self._engine.probe(client)  # never: nothing here listens


class Story:
    """A model on two GPUs that ends again and again; what may take its place is beside it."""

    def __init__(self, home: Path, gpus: Gpus, driver: Driver, weights: Path) -> None:
        for number in range(3):
            gpus.add(number, uuid=UUIDS[number], total_mib=81559)
        model: dict[str, Any] = {
            "engine": "vllm",
            "path": str(weights),
            "python": sys.executable,
            "device": ["cuda:1", UUIDS[0]],
            "kv_cache_gib": 20,
            "alternatives": ["small"],
            "timeouts": {"load_s": 300, "cleanup_s": 1},
        }
        restarts = {"starts": 2, "backoff_s": 0}
        settings = settings_of(home, {"large": model}, restarts=restarts)
        resolved = nvml.resolve(driver, model["device"])
        self.gpus = gpus
        self.fleet = fleet_of(settings, driver, resolved)
        self.worker = self.fleet.worker("large-0")
        self.ends = home / "ends"
        self.engine = Recorded(self.worker.plan.engine, self.ends)
        self.plan = self.worker.plan = replace(self.worker.plan, engine=self.engine)

    def now_ends_by(self, script: str) -> None:
        self.ends.write_text(script)

    @asynccontextmanager
    async def told(self) -> AsyncIterator[Worker]:
        devices = self.fleet._devices
        async with devices.watching(), self.fleet.running():
            await until(
                lambda: all(one.hears_events and one.reading for one in devices.watched.values()),
                "the devices to be watched",
            )
            yield self.worker

    def check(self, starts: int) -> None:
        """So many starts, all of them the same, on what was configured; nobody in its place."""
        assert len(self.engine.launches) == starts
        argv, env = self.engine.launches[0]
        assert env["CUDA_VISIBLE_DEVICES"] == f"{UUIDS[1]},{UUIDS[0]}"
        assert after(argv, "--tensor-parallel-size") == "2"
        assert after(argv, "--kv-cache-memory-bytes") == str(20 * GIB)
        assert all(launch == (argv, env) for launch in self.engine.launches)
        assert self.worker.plan is self.plan
        assert self.plan.devices == ("cuda:1", UUIDS[0])
        assert self.fleet.worker("small-0").counts.starts == 0


@pytest.fixture
def story(home: Path, gpus: Gpus, driver: Driver, weights: Path) -> Story:
    return Story(home, gpus, driver, weights)


def saying(words: str, then: str) -> str:
    return f"cat >&2 <<'WORDS'\n{words}\nWORDS\n{then}\n"


HANGS = "exec sleep 1000"
CRASHES = {
    "status 0": "exit 0",
    "status 1": "exit 1",
    "killed": "kill -9 $$",
    "segmentation fault": "kill -SEGV $$",
    "not enough memory in the host": saying("RuntimeError: std::bad_alloc", "exit 1"),
    "no such option": saying("api_server.py: error: unrecognized arguments: --x", "exit 2"),
}
FAULTS = {
    "out of memory": saying(tracebacks.cuda("oom"), "exit 1"),
    "illegal access": saying(tracebacks.cuda("illegal"), "exit 1"),
    "ecc": saying(tracebacks.cuda("ecc"), "exit 1"),
    "lost": saying(tracebacks.cuda("lost"), "exit 1"),
    "no such GPU": saying(tracebacks.no_gpu(), "exit 1"),
    "too little free": saying(tracebacks.over_budget(0, 900, 81559, 75000), "exit 1"),
    "out of memory while loading": saying(tracebacks.out_of_memory(1, 9, 81559, 99), "exit 1"),
}


@pytest.mark.parametrize("how", CRASHES)
@awaited
async def test_a_crash_leads_to_the_same_start_again(story: Story, how: str) -> None:
    story.now_ends_by(CRASHES[how])
    async with story.told() as worker:
        await worker.start()
        await worker.wait_for(State.FAILED)
        story.check(starts=3)
        await worker.start()
        await worker.wait_for(State.FAILED)
        story.check(starts=6)


@pytest.mark.parametrize("how", FAULTS)
@awaited
async def test_a_devices_fault_leads_nowhere_until_it_is_released(story: Story, how: str) -> None:
    """(R013, R014, R015)"""
    story.now_ends_by(FAULTS[how])
    async with story.told() as worker:
        await worker.start()
        for starts in (1, 2):
            await worker.wait_for(State.QUARANTINED, State.FAILED)
            if worker.state is State.FAILED:  # the program's own fault, not the device's
                assert how == "illegal access"
                story.check(starts=3)
                return
            story.check(starts)
            await story.fleet.release_worker(worker)
        await worker.wait_for(State.QUARANTINED)
        story.check(starts=3)


@awaited
async def test_a_device_that_fails_under_a_worker_is_not_exchanged(story: Story) -> None:
    story.now_ends_by(HANGS)
    async with story.told() as worker:
        await worker.start()
        await worker.wait_for(State.LOADING)
        story.gpus.xid(1, 79)
        await worker.wait_for(State.QUARANTINED)
        story.check(starts=1)
        await story.fleet.release_worker(worker)
        await worker.wait_for(State.LOADING)
        story.check(starts=2)


@awaited
async def test_a_device_that_is_too_full_ends_the_start_and_is_not_exchanged(
    story: Story,
) -> None:
    """There is a third one, with all of its memory free, and room in less."""
    story.now_ends_by(HANGS)
    story.gpus.change(1, base_mib=80_000)
    async with story.told() as worker:
        await worker.start()
        await worker.wait_for(State.FAILED)
        assert worker.error is not None
        assert worker.error.code == "GPU_VRAM_EXHAUSTED"
        assert story.engine.launches == []
        story.gpus.change(1, base_mib=500)
        await worker.start()
        await worker.wait_for(State.LOADING)
        story.check(starts=1)


@awaited
async def test_an_operators_restart_is_the_same_start_again(story: Story) -> None:
    story.now_ends_by(HANGS)
    async with story.told() as worker:
        await worker.start()
        await worker.wait_for(State.LOADING)
        await worker.restart()
        await until(lambda: len(story.engine.launches) == 2, "the second start")
        await worker.wait_for(State.LOADING)
        await worker.stop()
        await worker.wait_for(State.STOPPED)
        await worker.start()
        await worker.wait_for(State.LOADING)
        story.check(starts=3)


@awaited
async def test_a_start_that_takes_too_long_is_not_made_smaller(story: Story) -> None:
    story.now_ends_by(HANGS)
    timeouts = story.plan.timeouts.model_copy(update={"load_s": 0.05})
    story.plan = story.worker.plan = replace(story.plan, timeouts=timeouts)
    async with story.told() as worker:
        await worker.start()
        await worker.wait_for(State.FAILED)
        story.check(starts=3)


# ── The tables ──────────────────────────────────────────────────────────────────────────────────


RUN = {"hive.__main__", "hive.workers.tiny_model", "hive.storage.migrations.env"}


def modules() -> Iterator[tuple[str, Any]]:
    for found in pkgutil.walk_packages(hive.__path__, "hive."):
        # These are run: as the program, by an engine's Python, by Alembic.
        if found.name not in RUN:
            yield found.name, importlib.import_module(found.name)


def strings(value: object) -> Iterator[str]:
    """Every text in a table, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(strings, itertools.chain(*value.items())))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from itertools.chain.from_iterable(map(strings, value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from strings([getattr(value, one.name) for one in dataclasses.fields(value)])


def test_no_table_names_a_device_to_go_to() -> None:
    """Retries, restarts, states, faults, probes and whatever else is looked up."""
    tables = [
        (f"{name}.{key}", value)
        for name, module in modules()
        for key, value in vars(module).items()
        if not key.startswith("__") and isinstance(value, Mapping | list | tuple | set | frozenset)
    ]
    found = [where for where, table in tables if any(map(DEVICE.fullmatch, strings(table)))]

    assert len(tables) > 30
    assert found == ["hive.workers.identity.BLOCK_SIZES"]  # vLLM's own, to check a chunk's size


def test_a_workers_states_know_nothing_of_devices() -> None:
    """What follows is a state, so a fault can change what is done and never where."""
    assert set(lifecycle.NEXT) == set(State)
    for news in lifecycle.NEXT.values():
        assert all(type(key) is News and type(value) is State for key, value in news.items())
    numbers = RestartPolicy(starts=1, window_s=1, backoff_s=1, backoff_max_s=1)
    assert all(isinstance(value, int | float) for value in dataclasses.astuple(numbers))


def test_plans_and_settings_cannot_be_changed(home: Path) -> None:
    (plan,) = plans(home, {"large": {**SMALL, "device": "cuda:0"}})
    for field in dataclasses.fields(WorkerPlan):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plan, field.name, None)
    settings = settings_of(home, {"large": {**SMALL, "device": "cuda:0"}})
    for section in (settings, settings.server, settings.models["large"]):
        for name in type(section).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, None)


# ── The code ────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Code:
    """A piece of hive's source, with the pieces that it lies in, innermost first."""

    module: str
    node: ast.AST
    around: tuple[ast.AST, ...]

    def __str__(self) -> str:
        return f"{self.module}: {ast.unparse(self.node)}"


def code() -> list[Code]:
    def below(module: str, node: ast.AST, around: tuple[ast.AST, ...]) -> Iterator[Code]:
        yield Code(module, node, around)
        for child in ast.iter_child_nodes(node):
            yield from below(module, child, (node, *around))

    return [
        piece
        for file in sorted((TOP / "hive").rglob("*.py"))
        for piece in below(
            str(file.relative_to(TOP / "hive").with_suffix("")), ast.parse(file.read_text()), ()
        )
    ]


CODE = code()


def of(*kinds: type[ast.AST]) -> Iterator[Code]:
    return (piece for piece in CODE if isinstance(piece.node, kinds))


def called(node: ast.AST) -> str:
    """The last name of what is called: launch of self.plan.engine.launch(…)."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def function(piece: Code) -> str:
    """The function that a piece of code is in."""
    inside = (o for o in piece.around if isinstance(o, ast.FunctionDef | ast.AsyncFunctionDef))
    return next((one.name for one in inside), "")


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute in a piece of code."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return found | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def uses(attribute: str) -> list[Code]:
    return [p for p in of(ast.Attribute) if getattr(p.node, "attr", "") == attribute]


def test_a_device_is_only_ever_compared_with_never_chosen() -> None:
    """Neither "cpu" nor "cuda:0" is a value that hive's code gives to anything."""
    chosen = {
        f"{piece.module}: {ast.unparse(piece.around[0])}"
        for piece in of(ast.Constant)
        if isinstance(value := getattr(piece.node, "value", None), str)
        and DEVICE.fullmatch(value)
        and not any(isinstance(outer, ast.Compare) for outer in piece.around[:2])
    }

    assert chosen == {
        "cli/engine: ['cpu']",  # the argument of 'hive engine install cpu'
        "devices/nvml: f'cuda:{self.index}'",  # what a GPU is called, and found by
        "devices/nvml: name.startswith('cuda:')",
        "devices/nvml: name.removeprefix('cuda:')",
        "workers/fleet: ('cpu',)",  # of the LMCache server, which no model is
        # Which of vLLM's two block sizes is meant, by the devices that are planned.
        "workers/identity: {'cpu': 128, 'cuda': 16}",
        "workers/identity: 'cpu' if tuple(devices) == ('cpu',) else 'cuda'",
    }


def test_only_the_fleet_makes_plans_and_a_worker_keeps_its_own() -> None:
    made = set()
    for piece in of(ast.Call):
        if called(piece.node) == "WorkerPlan":
            assert isinstance(piece.node, ast.Call)
            given = {word.arg: ast.unparse(word.value) for word in piece.node.keywords}
            where = f"{piece.module}.{function(piece)}"
            made.add((where, given["engine"], given["devices"], given["visible"]))
    assert made == {
        ("workers/fleet._plans", "engine_of(name, model, self.site)", "devices", "visible or None"),
        ("workers/fleet._plan_of_cache", "KvServer(settings, site)", "('cpu',)", "None"),
    }
    stored = {
        f"{piece.module}.{function(piece)}: {ast.unparse(piece.node)}"
        for name in ("plan", "engine", "devices", "visible", "device", "replicas")
        for piece in uses(name)
        if not isinstance(getattr(piece.node, "ctx", None), ast.Load)
    }
    # A reload changes its limits and nothing else: see the next test.
    assert stored == {"workers/worker.__init__: self.plan", "workers/worker.apply: self.plan"}


def test_nothing_makes_a_changed_copy_of_a_plan_a_model_or_the_settings() -> None:
    copying = {"replace", "model_copy", "model_construct", "setattr", "__setattr__", "__dict__"}
    copies = {
        str(piece)
        for piece in of(ast.Call)
        if called(piece.node) in copying
        and names_in(piece.node) & {"model", "models", "settings", "device", "devices", "visible"}
    }
    plans = {
        str(piece)
        for piece in of(ast.Call)
        if called(piece.node) in copying and "plan" in names_in(piece.node)
    }

    # A path as LMCache writes it in the name of a file: a text.
    assert copies <= {"windows/engines: model.replace('-SEP-', '/')"}
    assert plans <= {
        # How long a process may survive SIGKILL is the guard's business.
        "workers/worker: replace(launch, kill_s=self.plan.timeouts.kill_s)",
        # A reload's.
        "workers/worker: replace(self.plan, timeouts=timeouts, restarts=restarts, drain_s=drain_s)",
    }


def test_what_is_launched_is_what_was_planned() -> None:
    used = [piece for piece in uses("launch") if not piece.module.endswith("guard")]
    # What a life was started with is kept to be told.
    kept = {str(piece) for piece in used if ast.unparse(piece.node).endswith("life.launch")}
    assert kept == {"workers/worker: life.launch", "windows/engines: permit.life.launch"}
    (launch,) = (
        piece
        for piece in used
        if str(piece) not in kept and ast.unparse(piece.node) != "self.launch"
    )

    (given,) = (outer for outer in launch.around[:1] if isinstance(outer, ast.Call))
    assert launch.module == "workers/worker"
    assert [ast.unparse(one) for one in given.args] == [
        "self.plan.engine.launch",
        "place",
        "self.plan.devices",
        "self.plan.visible",
        "smallest",
    ]


def test_alternatives_are_told_and_never_used() -> None:
    used = set()
    for piece in uses("alternatives"):
        outer = piece.around[0]
        is_error = called(outer) == "vram_error"
        said = "vram_error" if is_error else ast.unparse(outer).splitlines()[0]
        used.add(f"{piece.module}: {said}")

    assert used == {
        "settings: for other in model.alternatives:",  # each must be a model
        "workers/fleet: alternatives=model.alternatives",  # of the plan
        "workers/preflight: vram_error",
        "workers/worker: list(self.plan.alternatives)",  # a detail of the error
    }


def caught_with(error: type[BaseException]) -> set[str]:
    """The names by which an error, or one of its kind, can be caught."""
    below = set(itertools.chain.from_iterable(map(caught_with_below, error.__subclasses__())))
    return below | {kind.__name__ for kind in error.__mro__}


def caught_with_below(error: type[BaseException]) -> set[str]:
    return {error.__name__}.union(*map(caught_with_below, error.__subclasses__()))


# What starts an engine, or finds a device to start one on.
BEGINS = {
    *("launch", "spawn", "engine_of", "VllmEngine", "CommandEngine", "WorkerPlan", "Worker"),
    *("resolve", "find", "devices", "Device", "start", "restart", "restarted", "begin", "run"),
}


def test_whoever_sees_a_devices_error_tells_it_and_begins_nothing() -> None:
    """Neither in the handler nor by leaving it unsaid (R013)."""
    caught = caught_with(DeviceError)
    assert {"HiveError", "Exception", "GpuVramExhausted", "DeviceLost", "DriverHung"} <= caught
    seen, silent, begins = 0, set(), []
    for piece in of(ast.ExceptHandler):
        handler = piece.node
        assert isinstance(handler, ast.ExceptHandler)
        if handler.type is not None and not names_in(handler.type) & caught:
            continue
        seen += 1
        inside = list(itertools.chain.from_iterable(map(ast.walk, handler.body)))
        names = {part.id for part in inside if isinstance(part, ast.Name)}
        says = any(
            isinstance(part, ast.Raise)
            or called(part) in ("exception", "print_exc")
            or any(word.arg == "exc_info" for word in getattr(part, "keywords", ()))
            for part in inside
        )
        where = f"{piece.module}.{function(piece)}"
        if not says and handler.name not in names:
            silent.add(f"{where}: {'; '.join(map(ast.unparse, handler.body))}")
        begins += [f"{where}: {ast.unparse(part)}" for part in inside if called(part) in BEGINS]

    assert seen > 15
    assert begins == []
    # _read has told it; at the end of a command nothing is left to tell, a line of the log may be lost.
    assert {one for one in silent if "/" in one and not one.startswith("telemetry/logs")} == {
        "devices/watch._look: return",
        "windows/blocks._in_tier: return None",  # a broken manifest: how many is not known
    }


def test_the_one_place_that_leaves_a_devices_error_unsaid_only_learns_of_pids() -> None:
    caught = caught_with(DeviceError)
    suppressing = {
        f"{piece.module}.{function(piece)}"
        for piece in of(ast.Call)
        if called(piece.node) == "suppress" and names_in(piece.node) & caught
    }

    # The others ask no device: a worker that was stopped just now, a database that is away, a
    # reload that has told by itself why nothing has changed, a session that nobody was told of.
    others = {
        "__main__._tidy_up",
        "daemon.reload",
        "workers/fleet._renew",
        "windows/sessions._expiring",
        "mcp/tools.chat",
    }
    assert suppressing - others == {"devices/watch.see_pids"}
