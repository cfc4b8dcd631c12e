"""The NVML double, asked by the real pynvml in a process of its own."""

import os
import select
import subprocess
import sys
import threading
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.doubles import nvml
from tests.patience import wait_until

TOP = Path(__file__).parents[2]
DEADLINE_S = 20.0
HELD_BACK_S = 0.3  # a call that returns at all returns long before
MIB = 1024 * 1024
XID = pynvml.nvmlEventTypeXidCriticalError
# Answers each line: the value of an expression, or the NVML code with which it failed.
CALLER = """
import os, sys, threading
from pynvml import *
for line in sys.stdin:
    try:
        try:
            answer = eval(line)
        except SyntaxError:
            answer = exec(line)
        print(repr((0, answer)), flush=True)
    except NVMLError as exc:
        print(repr((exc.value, str(exc))), flush=True)
"""


class NvmlError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code


class Caller:
    """A process with pynvml, which lives while the GPUs change."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
        )

    def __call__(self, code: str) -> Any:
        """The value. Raises NvmlError for what pynvml raises."""
        self.tell(code)
        return self.answer()

    def tell(self, code: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(code.encode() + b"\n")
        self.process.stdin.flush()

    def answers(self, within_s: float) -> bool:
        assert self.process.stdout
        return bool(select.select([self.process.stdout], [], [], within_s)[0])

    def answer(self) -> Any:
        assert self.process.stdout
        assert self.answers(DEADLINE_S), "no answer"
        code, value = literal_eval(self.process.stdout.readline().decode())
        if code:
            raise NvmlError(code, value)
        return value

    def refusal(self, code: str) -> int:
        """The NVML code with which the call fails."""
        with pytest.raises(NvmlError) as caught:
            self(code)
        return caught.value.code

    def memory(self, handle: str = "h") -> tuple[int, int, int]:
        """Total, used and free, in MiB."""
        self(f"m = nvmlDeviceGetMemoryInfo({handle})")
        total, used, free = self("(m.total, m.used, m.free)")
        return total // MIB, used // MIB, free // MIB

    def processes(self) -> dict[int, int]:
        """Pid to MiB."""
        code = "[(p.pid, p.usedGpuMemory) for p in nvmlDeviceGetComputeRunningProcesses(h)]"
        return {pid: used // MIB for pid, used in self(code)}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


Call = Callable[[dict[str, str]], Caller]


@pytest.fixture
def gpus(tmp_path: Path) -> nvml.Gpus:
    gpus = nvml.Gpus(tmp_path / "nvml")
    gpus.add(0)
    return gpus


@pytest.fixture
def call() -> Iterator[Call]:
    callers: list[Caller] = []

    def start(env: dict[str, str]) -> Caller:
        callers.append(Caller(env))
        return callers[-1]

    yield start
    for caller in callers:
        caller.close()


@pytest.fixture
def ask(gpus: nvml.Gpus, call: Call) -> Caller:
    """A caller for whom `h` is GPU 0."""
    ask = call(gpus.env)
    ask("nvmlInit()")
    ask("h = nvmlDeviceGetHandleByIndex(0)")
    return ask


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin
    process.stdin.close()


# What there is


def test_the_driver_tells_its_versions(tmp_path: Path, call: Call) -> None:
    ask = call(nvml.Gpus(tmp_path, driver="570.1.2").env)
    ask("nvmlInit()")
    assert ask("nvmlSystemGetDriverVersion()") == "570.1.2"
    assert ask("nvmlSystemGetNVMLVersion()") == "13.570.1.2"
    assert ask("nvmlSystemGetCudaDriverVersion()") == 13000
    assert ask("nvmlSystemGetCudaDriverVersion_v2()") == 13000
    assert ask("nvmlDeviceGetCount()") == 0


def test_gpus_are_numbered_in_the_order_of_their_indices(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.add(2, name="NVIDIA A100-SXM4-40GB", pci="00000001:AF:00.0")
    gpus.add(1, uuid="GPU-abc")
    assert ask("nvmlDeviceGetCount()") == 3
    uuids = ask("[nvmlDeviceGetUUID(nvmlDeviceGetHandleByIndex(i)) for i in range(3)]")
    assert uuids == [
        "GPU-00000000-0000-0000-0000-000000000000",
        "GPU-abc",
        "GPU-00000002-0000-0000-0000-000000000000",
    ]
    ask("g = nvmlDeviceGetHandleByUUID('GPU-abc')")
    assert ask("(nvmlDeviceGetIndex(g), nvmlDeviceGetMinorNumber(g))") == (1, 1)
    ask("g = nvmlDeviceGetHandleByIndex(2)")
    assert ask("nvmlDeviceGetName(g)") == "NVIDIA A100-SXM4-40GB"
    ask("pci = nvmlDeviceGetPciInfo(g)")
    assert ask("(pci.busId, pci.domain, pci.bus)") == ("00000001:AF:00.0", 1, 0xAF)
    assert ask("pci.busIdLegacy") == "0001:AF:00.0"
    assert ask.refusal("nvmlDeviceGetHandleByIndex(3)") == pynvml.NVML_ERROR_INVALID_ARGUMENT
    assert ask.refusal("nvmlDeviceGetHandleByUUID('GPU-x')") == pynvml.NVML_ERROR_NOT_FOUND


def test_the_order_of_the_lines_does_not_matter(gpus: nvml.Gpus, ask: Caller) -> None:
    (gpus.directory / "state").write_text("gpu 1 uuid=GPU-b\ngpu 0 uuid=GPU-a\n")
    uuids = ask("[nvmlDeviceGetUUID(nvmlDeviceGetHandleByIndex(i)) for i in range(2)]")
    assert uuids == ["GPU-a", "GPU-b"]


def test_a_name_has_its_spaces_again(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.change(0, name="NVIDIA H200 NVL")
    assert ask("nvmlDeviceGetName(h)") == "NVIDIA H200 NVL"


def test_nobody_is_answered_before_init_or_after_the_last_shutdown(
    gpus: nvml.Gpus, call: Call
) -> None:
    ask = call(gpus.env)
    ask("nvmlInit()")
    ask("nvmlInit()")
    ask("nvmlShutdown()")
    assert ask("nvmlDeviceGetCount()") == 1
    ask("nvmlShutdown()")
    assert ask.refusal("nvmlDeviceGetCount()") == pynvml.NVML_ERROR_UNINITIALIZED
    assert ask.refusal("nvmlShutdown()") == pynvml.NVML_ERROR_UNINITIALIZED


def test_without_its_directory_there_is_no_driver(gpus: nvml.Gpus, call: Call) -> None:
    for directory in (str(gpus.directory / "nowhere"), ""):
        ask = call({**gpus.env, "NVML_DOUBLE": directory})
        assert ask.refusal("nvmlInit()") == pynvml.NVML_ERROR_DRIVER_NOT_LOADED


# How it is


def test_health_is_what_the_fields_say(gpus: nvml.Gpus, ask: Caller) -> None:
    def health() -> list[Any]:
        return [
            ask("nvmlDeviceGetTemperature(h, NVML_TEMPERATURE_GPU)"),
            ask("nvmlDeviceGetTemperatureV(h, NVML_TEMPERATURE_GPU)"),
            ask(
                "nvmlDeviceGetTotalEccErrors("
                "h, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC)"
            ),
            ask(
                "nvmlDeviceGetTotalEccErrors("
                "h, NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_VOLATILE_ECC)"
            ),
            ask("nvmlDeviceGetRemappedRows(h)[2:]"),
            ask("nvmlDeviceGetMigMode(h)"),
            ask("nvmlDeviceGetEccMode(h)"),
            ask("nvmlDeviceGetUtilizationRates(h).gpu"),
        ]

    assert health() == [40, 40, 0, 0, (0, 0), [0, 0], [1, 1], 0]
    gpus.change(0, temp=91, ecc=3, remap_pending=1, remap_failed=1, mig=1, util=99)
    assert health() == [91, 91, 3, 0, (1, 1), [1, 1], [1, 1], 99]


@pytest.mark.parametrize(
    ("field", "question"),
    [
        ("ecc", "nvmlDeviceGetTotalEccErrors(h, 1, 0)"),
        ("ecc", "nvmlDeviceGetEccMode(h)"),
        ("remap_pending", "nvmlDeviceGetRemappedRows(h)"),
        ("retired_pending", "nvmlDeviceGetRetiredPagesPendingStatus(h)"),
        ("mig", "nvmlDeviceGetMigMode(h)"),
    ],
)
def test_what_a_gpu_lacks_is_not_supported(
    gpus: nvml.Gpus, ask: Caller, field: str, question: str
) -> None:
    gpus.change(0, **{field: -1})
    assert ask.refusal(question) == pynvml.NVML_ERROR_NOT_SUPPORTED
    gpus.change(0, **{field: 0})
    ask(question)


# Memory and who holds it


def test_memory_is_the_base_and_what_living_processes_hold(
    gpus: nvml.Gpus, ask: Caller, holder: subprocess.Popen[bytes]
) -> None:
    gpus.change(0, total_mib=1000, base_mib=100)
    gpus.add(1)
    assert ask.memory() == (1000, 100, 900)
    assert ask.processes() == {}
    gpus.hold(0, holder.pid, 300)
    gpus.hold(0, os.getpid(), 7)
    assert ask.memory() == (1000, 407, 593)
    assert ask.processes() == {holder.pid: 300, os.getpid(): 7}
    assert gpus.used_mib(0) == 407
    assert gpus.used_mib(1) == 500
    ask("m = nvmlDeviceGetMemoryInfo(h, nvmlMemory_v2)")
    assert ask("(m.total, m.reserved, m.used, m.free)") == (1000 * MIB, 0, 407 * MIB, 593 * MIB)
    gpus.release(0, os.getpid())
    holder.kill()  # a zombie from now on: nobody has waited for it
    wait_until(lambda: ask.memory()[1] == 100, "the dead process's memory is free again")
    assert ask.processes() == {}
    assert gpus.used_mib(0) == 100


def test_memory_of_the_dead_can_stay(
    gpus: nvml.Gpus, ask: Caller, holder: subprocess.Popen[bytes]
) -> None:
    gpus.change(0, keeps=1)
    gpus.hold(0, holder.pid, 300)
    assert ask.processes() == {holder.pid: 300}
    holder.kill()
    holder.wait()
    assert ask.processes() == {}
    assert ask.memory()[1] == gpus.used_mib(0) == 800
    gpus.release(0, holder.pid)
    assert ask.memory()[1] == gpus.used_mib(0) == 500


def test_no_more_is_used_than_there_is(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.change(0, total_mib=1000)
    gpus.hold(0, os.getpid(), 2000)
    assert ask.memory() == (1000, 1000, 0)
    assert gpus.used_mib(0) == 1000


def test_many_processes_are_all_listed(gpus: nvml.Gpus, ask: Caller) -> None:
    children = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(20)]
    try:
        for child in children:
            gpus.hold(0, child.pid, 1)
        assert ask.processes() == {child.pid: 1 for child in children}
    finally:
        for child in children:
            child.communicate()


def test_processes_can_be_hidden_but_not_their_memory(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.hold(0, os.getpid(), 300)
    gpus.hide_pids()
    assert ask.processes() == {}
    assert ask.memory()[1] == 800
    gpus.heal()
    assert ask.processes() == {os.getpid(): 300}
    assert ask("nvmlDeviceGetGraphicsRunningProcesses(h)") == []


# How it fails


def test_a_function_fails_as_told_until_it_is_healed(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.add(1)
    ask("g = nvmlDeviceGetHandleByIndex(1)")
    gpus.fail("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_UNKNOWN, index=1)
    gpus.fail("nvmlDeviceGetCount", pynvml.NVML_ERROR_NO_PERMISSION)
    assert ask.refusal("nvmlDeviceGetMemoryInfo(g)") == pynvml.NVML_ERROR_UNKNOWN
    assert ask.refusal("nvmlDeviceGetMemoryInfo(g, nvmlMemory_v2)") == pynvml.NVML_ERROR_UNKNOWN
    assert ask.refusal("nvmlDeviceGetCount()") == pynvml.NVML_ERROR_NO_PERMISSION
    assert ask.memory("h")[1] == 500
    gpus.heal()
    assert ask.memory("g")[1] == 500
    assert ask("nvmlDeviceGetCount()") == 2


def test_init_can_fail(gpus: nvml.Gpus, call: Call) -> None:
    gpus.fail("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    ask = call(gpus.env)
    assert ask.refusal("nvmlInit()") == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    gpus.heal()
    ask("nvmlInit()")


def test_every_function_fails_and_a_misspelt_one_is_refused(gpus: nvml.Gpus) -> None:
    for function in nvml.functions():
        assert hasattr(pynvml, function), function
    for wrong in ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemory"):
        with pytest.raises(ValueError, match="there are: nvmlDeviceGetCompute"):
            gpus.fail(wrong, 3)
        with pytest.raises(ValueError, match=wrong):
            gpus.hang(wrong)
    with pytest.raises(TypeError):
        gpus.change(0, temperature=3)


@pytest.mark.parametrize("line", ["gpu", "gpu 1 speed=3", "fail nvmlInit", "nonsense 1", "gpu x"])
def test_a_line_that_says_nothing_fails_every_call(gpus: nvml.Gpus, ask: Caller, line: str) -> None:
    with (gpus.directory / "state").open("a") as state:
        state.write(line + "\n")
    assert ask.refusal("nvmlDeviceGetCount()") == pynvml.NVML_ERROR_UNKNOWN


def test_a_call_that_hangs_holds_up_no_other_thread(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.add(1)
    ask("g = nvmlDeviceGetHandleByIndex(1)")
    gpus.hang("nvmlDeviceGetMemoryInfo", index=0)
    ask("t = threading.Thread(target=nvmlDeviceGetMemoryInfo, args=(h,), daemon=True)")
    ask("t.start()")
    assert ask.memory("g")[1] == 500
    assert ask(f"(t.join({HELD_BACK_S}), t.is_alive())[1]")
    gpus.heal()
    assert ask.memory("h")[1] == 500
    assert ask("t.is_alive()")
    gpus.hang("nvmlDeviceGetMemoryInfo")
    ask.tell("nvmlDeviceGetMemoryInfo(g)")
    assert not ask.answers(HELD_BACK_S)


def test_init_can_hang(gpus: nvml.Gpus, call: Call) -> None:
    gpus.hang("nvmlInit")
    ask = call(gpus.env)
    assert ask("1 + 1") == 2
    ask.tell("nvmlInit()")
    assert not ask.answers(HELD_BACK_S)


def test_a_gpu_that_fell_off_the_bus_is_lost(gpus: nvml.Gpus, ask: Caller) -> None:
    uuid = gpus.add(1)
    ask("g = nvmlDeviceGetHandleByIndex(1)")
    gpus.remove(0)
    for question in ("nvmlDeviceGetMemoryInfo(h)", "nvmlDeviceGetUUID(h)", "nvmlDeviceGetName(h)"):
        assert ask.refusal(question) == pynvml.NVML_ERROR_GPU_IS_LOST
    assert ask("nvmlDeviceGetCount()") == 1
    assert ask("nvmlDeviceGetUUID(nvmlDeviceGetHandleByIndex(0))") == uuid
    assert ask("(nvmlDeviceGetIndex(g), nvmlDeviceGetMinorNumber(g))") == (0, 1)
    gone = "nvmlDeviceGetHandleByUUID('GPU-00000000-0000-0000-0000-000000000000')"
    assert ask.refusal(gone) == pynvml.NVML_ERROR_NOT_FOUND
    gpus.add(0)
    assert ask("nvmlDeviceGetIndex(h)") == 0


def test_a_lost_gpu_can_be_counted_still(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.change(0, lost=1)
    assert ask("nvmlDeviceGetCount()") == 1
    for question in ("nvmlDeviceGetHandleByIndex(0)", "nvmlDeviceGetMemoryInfo(h)"):
        assert ask.refusal(question) == pynvml.NVML_ERROR_GPU_IS_LOST


def test_errors_have_the_drivers_words(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.change(0, lost=1)
    with pytest.raises(NvmlError, match="GPU is lost"):
        ask("nvmlDeviceGetMemoryInfo(h)")


# Events


def watch(ask: Caller, *handles: str) -> None:
    ask("events = nvmlEventSetCreate()")
    for handle in handles:
        ask(f"nvmlDeviceRegisterEvents({handle}, nvmlEventTypeXidCriticalError, events)")


def wait(timeout_ms: int) -> str:
    return (
        f"(lambda e: (nvmlDeviceGetIndex(e.device), e.eventType, e.eventData))"
        f"(nvmlEventSetWait(events, {timeout_ms}))"
    )


def test_an_xid_reaches_whoever_registered_for_its_gpu(gpus: nvml.Gpus, ask: Caller) -> None:
    gpus.add(1)
    ask("g = nvmlDeviceGetHandleByIndex(1)")
    gpus.xid(0, 13)  # before the registration
    watch(ask, "h")
    gpus.xid(1, 31)  # of a GPU that is not registered
    gpus.xid(0, 79)
    gpus.xid(0, 48)
    assert ask(wait(0)) == (0, XID, 79)
    assert ask(wait(0)) == (0, XID, 48)
    assert ask.refusal(wait(0)) == pynvml.NVML_ERROR_TIMEOUT
    gpus.xid(1, 32)
    ask("nvmlDeviceRegisterEvents(g, nvmlEventTypeXidCriticalError, events)")
    gpus.xid(1, 94)
    assert ask(wait(0)) == (1, XID, 94)
    assert ask("nvmlDeviceGetSupportedEventTypes(h) & nvmlEventTypeXidCriticalError") == XID


def test_an_xid_ends_a_wait_at_once(gpus: nvml.Gpus, ask: Caller) -> None:
    watch(ask, "h")
    ask.tell(wait(60_000))
    assert not ask.answers(HELD_BACK_S)
    began = time.monotonic()
    gpus.xid(0, 79)
    assert ask.answer() == (0, XID, 79)
    assert time.monotonic() - began < 5


def test_a_wait_ends_with_its_timeout(ask: Caller) -> None:
    watch(ask, "h")
    ask("fds = len(os.listdir('/proc/self/fd'))")
    began = time.monotonic()
    assert ask.refusal(wait(200)) == pynvml.NVML_ERROR_TIMEOUT
    assert 0.19 < time.monotonic() - began < 5
    assert ask("len(os.listdir('/proc/self/fd')) - fds") == 0


def test_half_an_event_is_waited_for(gpus: nvml.Gpus, ask: Caller) -> None:
    watch(ask, "h")
    with (gpus.directory / "events").open("a") as events:
        events.write("GPU-00000000-0000-0000-0000-000000000000 7")
        events.flush()
        assert ask.refusal(wait(0)) == pynvml.NVML_ERROR_TIMEOUT
        events.write("9\n")
    assert ask(wait(0)) == (0, XID, 79)


def test_a_loss_ends_a_wait_after_the_xid_that_tells_of_it(gpus: nvml.Gpus, ask: Caller) -> None:
    question = "nvmlEventSetWait(events, 60_000).eventData"
    watch(ask, "h")
    gpus.xid(0, 79)
    gpus.remove(0)
    assert ask(question) == 79
    assert ask.refusal(question) == pynvml.NVML_ERROR_GPU_IS_LOST
    gpus.add(0)
    ask.tell(question)
    assert not ask.answers(HELD_BACK_S)
    gpus.remove(0)
    with pytest.raises(NvmlError, match="GPU is lost"):
        ask.answer()


def test_waiting_fails_and_registering_too(gpus: nvml.Gpus, ask: Caller) -> None:
    watch(ask, "h")
    ask.tell(wait(60_000))
    gpus.fail("nvmlEventSetWait", pynvml.NVML_ERROR_UNKNOWN)  # also the call that waits already
    with pytest.raises(NvmlError) as caught:
        ask.answer()
    assert caught.value.code == pynvml.NVML_ERROR_UNKNOWN
    gpus.fail("nvmlDeviceRegisterEvents", pynvml.NVML_ERROR_NOT_SUPPORTED)
    register = "nvmlDeviceRegisterEvents(h, nvmlEventTypeXidCriticalError, events)"
    assert ask.refusal(register) == pynvml.NVML_ERROR_NOT_SUPPORTED
    gpus.heal()
    ask(register)
    assert ask.refusal(register.replace("h, nvml", "h, 1 << 40 | nvml")) == (
        pynvml.NVML_ERROR_NOT_SUPPORTED
    )
    ask("nvmlEventSetFree(events)")
    assert ask.refusal(register) == pynvml.NVML_ERROR_INVALID_ARGUMENT


# Many at once


def test_threads_may_ask_while_the_gpus_change(gpus: nvml.Gpus, ask: Caller) -> None:
    """Every answer is one that was true at some time; no descriptor stays open."""
    ask("seen = set(); fds = len(os.listdir('/proc/self/fd'))")
    ask(
        "look = lambda: [seen.add((nvmlDeviceGetTemperature(h, 0), nvmlDeviceGetCount()))"
        " for _ in range(3000)]"
    )
    ask("threads = [threading.Thread(target=look) for _ in range(4)]")
    ask.tell("[t.start() for t in threads] and [t.join() for t in threads] and len(seen)")
    temp = 0
    while not ask.answers(0):
        temp = (temp + 1) % 2
        gpus.change(0, temp=50 + temp)
    assert ask.answer() >= 2
    assert ask("seen <= {(40, 1), (50, 1), (51, 1)}"), ask("seen")
    assert ask("len(os.listdir('/proc/self/fd')) - fds") == 0


def test_a_process_can_load_it_without_the_loaders_path(gpus: nvml.Gpus) -> None:
    code = "import pynvml, tests.doubles.nvml as d; d.load(); pynvml.nvmlInit()"
    env = {**os.environ, "NVML_DOUBLE": gpus.env["NVML_DOUBLE"], "PYTHONPATH": str(TOP)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=DEADLINE_S)


def test_two_builds_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[Path] = []
    build = nvml.library.__wrapped__
    threads = [threading.Thread(target=lambda: built.append(build())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 3
    assert {*built} == {built[0]}
    assert os.listdir(built[0].parent) == [nvml.NAME]
