"""What an engine said before it ended, from log files as they really are."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.workers.diagnosis import (
    LINE_CHARS,
    SEARCH_BYTES,
    TAIL_LINES,
    Cause,
    Diagnosis,
    classify,
    diagnose,
    last_words,
    log_files,
    open_log,
    read_tail,
)
from hive.workers.guard import HEADER
from hive.workers.messages import WORDS_CHARS
from tests.patience import short_directory
from tests.workers.samples import Sample, samples

START = f"{HEADER}2026-01-01T00:00:00+0000 pid 7\n"


def said(tmp_path: Path, text: str) -> list[str]:
    log = tmp_path / "a.log"
    log.write_text(text)
    return last_words(log)


def test_the_last_lines_are_what_is_quoted(tmp_path: Path) -> None:
    text = START + "".join(f"line {n}\n" for n in range(20))

    assert said(tmp_path, text) == [f"line {n}" for n in range(20 - TAIL_LINES, 20)]


def test_frames_and_blank_lines_are_left_out_and_the_error_stays(tmp_path: Path) -> None:
    text = f"""{START}Traceback (most recent call last):
  File "engine.py", line 1, in load
    raise RuntimeError("CUDA error: an illegal memory access")

RuntimeError: CUDA error: an illegal memory access
"""
    assert said(tmp_path, text) == [
        "Traceback (most recent call last):",
        "RuntimeError: CUDA error: an illegal memory access",
    ]


def test_colours_are_left_out_and_what_else_steers_a_terminal_is_shown(tmp_path: Path) -> None:
    said_ = said(tmp_path, f"{START}\x1b[31mred\x1b[0m \x1b]0;PWN\x07\x1b[2J \x9b\n")

    assert said_ == [r"red \x1b]0;PWN\x07\x1b[2J \x9b"]


def test_the_words_of_a_fault_steer_no_terminal() -> None:
    found = classify([f"{TRACEBACK}", "torch.OutOfMemoryError: CUDA out of memory. \x1b[2J"])

    assert found is not None
    assert found.words == r"torch.OutOfMemoryError: CUDA out of memory. \x1b[2J"


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/etc/hosts")])
def test_what_an_engine_puts_in_its_logs_place_is_not_read_and_not_waited_for(
    tmp_path: Path, put: Callable[[Path], None]
) -> None:
    log = tmp_path / "m-0.log"
    put(log)

    assert (read_tail(log), last_words(log), diagnose(log)) == (b"", [], None)
    with pytest.raises(OSError, match=r"regular|Is a directory|symbolic links"):
        open_log(log)


def test_only_what_rotation_made_is_an_older_log(tmp_path: Path) -> None:
    for name in ("m-0.log", "m-0.log.1", "m-0.log.12", "m-0.log.1x", "m-0.log.x", "m-0.log.²"):
        (tmp_path / name).touch()

    assert [path.name for path in log_files(tmp_path / "m-0.log")] == [
        *("m-0.log.12", "m-0.log.1", "m-0.log"),
    ]


def test_what_an_earlier_start_said_is_not_this_ones(tmp_path: Path) -> None:
    assert said(tmp_path, f"{START}old error\n{START}new error\n") == ["new error"]
    assert said(tmp_path, f"{START}old error\n{START}") == []


def test_a_long_line_is_cut_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(START.encode() + b"\xff\xfe" + b"x" * 5000 + b"\n")

    assert [len(line) for line in last_words(log)] == [LINE_CHARS]


def test_a_log_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert last_words(tmp_path / "gone.log") == []
    assert read_tail(tmp_path) == b""


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=40),
    st.integers(1, 200),
)
def test_a_tail_is_bounded_and_begins_with_a_whole_line(lines: list[bytes], most: int) -> None:
    with short_directory() as directory:
        log = directory / "a.log"
        log.write_bytes(b"".join(line + b"\n" for line in lines))
        whole, tail = log.read_bytes(), read_tail(log, most)

    assert len(tail) <= most
    assert whole.endswith(tail)
    assert len(tail) == len(whole) or whole[: len(whole) - len(tail)].endswith(b"\n")


def test_the_files_of_a_log_are_told_oldest_first(tmp_path: Path) -> None:
    log = tmp_path / "a-1.log"
    for name in ("a-1.log", "a-1.log.1", "a-1.log.2", "a-1.log.10", "a-11.log", "b.log"):
        (tmp_path / name).touch()

    assert [path.name for path in log_files(log)] == [
        "a-1.log.10",
        "a-1.log.2",
        "a-1.log.1",
        "a-1.log",
    ]
    assert list(log_files(tmp_path / "gone.log")) == []


# ── The fault that ended an engine ──────────────────────────────────────────────────────────────

FAULTS = [
    sample
    for file in ("out_of_memory", "device_fault", "application_fault", "no_device")
    for sample in samples(file)
]
HARMLESS = samples("not_a_fault")
EVERY = pytest.mark.parametrize("sample", [*FAULTS, *HARMLESS], ids=str)
FAULT = pytest.mark.parametrize("sample", FAULTS, ids=str)

TRACEBACK = "Traceback (most recent call last):"
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
    "capacity of 23.57 GiB of which 605.88 MiB is free."
)
ECC = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"
ILLEGAL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"


def told(found: Diagnosis | None) -> tuple[Cause | None, dict[str, float]]:
    """In the form of a sample."""
    if found is None:
        return None, {}
    sizes = {
        "required": found.required_gib,
        "available": found.available_gib,
        "total": found.total_gib,
    }
    return found.cause, {name: size for name, size in sizes.items() if size is not None}


def record(
    *lines: str,
    at: str = "11-21 12:00:00",
    who: str = "EngineCore pid=7",
    level: str = "ERROR",
    place: str = "core.py:1512",
) -> list[str]:
    """One record of vLLM's log, which repeats its prefix before each line."""
    return [f"({who}) {level} {at} [{place}] {line}" for line in lines]


def failed(error: str, at: str = "11-21 12:00:00", who: str = "EngineCore pid=7") -> list[str]:
    title = "EngineCore encountered a fatal error."
    frames = ('  File "/opt/vllm/v1/engine/core.py", line 1496, in run_engine_core', "    run()")
    return record(title, TRACEBACK, *frames, error, at=at, who=who)


def throughput(at: str, generation: str = "61.0", prompt: str = "0.0") -> list[str]:
    return record(
        f"Engine 000: Avg prompt throughput: {prompt} tokens/s, Avg generation throughput: "
        f"{generation} tokens/s, Running: 1 reqs, Waiting: 0 reqs, GPU KV cache usage: 1.2%",
        at=at,
        who="APIServer pid=1",
        level="INFO",
        place="loggers.py:330",
    )


def said_at(at: str) -> list[str]:
    return record("Shutting down.", at=at, who="APIServer pid=1", level="INFO", place="a.py:1")


def cause(lines: list[str]) -> Cause | None:
    found = classify(lines)
    return found.cause if found else None


@EVERY
def test_what_real_engines_wrote_is_told_for_what_it_is(sample: Sample) -> None:
    assert told(classify(sample.lines)) == (sample.cause, sample.sizes), sample.source


@EVERY
def test_line_ends_and_colours_change_nothing(sample: Sample) -> None:
    """vLLM ends all lines of a record but the last with a carriage return, too."""
    prefix = re.compile(r"^(\([A-Za-z]\w* pid=\d+\)) ([A-Z]+) (\d\S+ \S+) (\[\S+:\d+\])")
    bright = "\x1b[0;36m\\1\x1b[0;0m \x1b[31m\\2\x1b[0m \x1b[90m\\3\x1b[0m \x1b[90m\\4\x1b[0m"
    coloured = [prefix.sub(bright, line) for line in sample.lines]

    for lines in ([line + "\r" for line in sample.lines], coloured):
        assert told(classify(lines)) == (sample.cause, sample.sizes)


@FAULT
def test_the_words_are_a_line_of_the_engine_without_its_prefix(sample: Sample) -> None:
    found = classify(sample.lines)

    assert found is not None
    words = found.words.removeprefix("NCCL: ")
    assert any(line.find(words) >= 0 for line in sample.lines)
    assert not re.match(r"\(\w+ |\[rank|\[E|ERROR|INFO| ", words)
    assert 0 < len(found.words) <= WORDS_CHARS


@FAULT
def test_a_fault_is_none_inside_of_other_text(sample: Sample) -> None:
    """A client's prompt may be somebody's whole log."""
    text = "\n".join(sample.lines)
    quoted = record(f"Received request r1: prompt: {text!r}", level="INFO")
    prompt = record(*f"prompt: {text}".split("\n"), level="INFO", who="APIServer pid=1")
    refused = record("Error in parser creation.", TRACEBACK, "ValueError: in this:")
    answer = ["ERROR:    Exception in ASGI application", TRACEBACK, "ValueError: in this:"]

    for lines in (
        quoted,
        prompt,
        [f"    {line}" for line in sample.lines],
        [f"> {line}" for line in sample.lines],
        record("Invalid request", TRACEBACK, *sample.lines, who="APIServer pid=1"),
        refused + record(repr(text)),
        [*answer, repr(text)],
    ):
        assert classify(lines) is None


@FAULT
def test_a_fault_is_found_in_the_log_of_the_newest_start(sample: Sample, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    noise = record("Loading weights", level="INFO") * 50
    earlier = failed("RuntimeError: CUDA error: no CUDA-capable device is detected")
    starts = [START, *earlier, "cut in the mid", START, *noise, *sample.lines, ""]
    text = "\n".join(starts).replace(f"{START}\n", START).replace("mid\n", "mid")
    log.write_bytes(text.encode())

    assert told(diagnose(log)) == (sample.cause, sample.sizes)


def test_what_an_earlier_start_ended_of_is_not_this_ones_fault(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join([START + failed(ECC)[0], *failed(ECC)[1:], START]))

    assert diagnose(log) is None
    assert diagnose(tmp_path / "gone.log") is None


def test_a_prompt_makes_no_line_and_no_start_of_an_engine(tmp_path: Path) -> None:
    """Unicode's own line ends, a bare carriage return, and hive's own words."""
    log = tmp_path / "a.log"
    breaks = "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    forged = [
        f'JSON body: {{"content":"x{mark}{TRACEBACK}{mark}  File{mark}{ECC}{mark}{START[:-1]}"}}'
        for mark in breaks
    ]
    asked = "\n".join(record(*forged, level="DEBUG", who="APIServer pid=1"))
    log.write_bytes(START.encode() + asked.encode() + b"\n")
    assert diagnose(log) is None

    fault = "\n".join(failed(OUT_OF_MEMORY))
    log.write_bytes(f"{START}{asked}\n{fault}\n{asked}\n".encode())
    found = diagnose(log)
    assert found is not None
    assert found.cause is Cause.OUT_OF_MEMORY


def test_a_log_that_is_no_text_is_read_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    junk = b"\xff\xfe\x00\xc3(\xed\xa0\x80" * 100
    long = b"(APIServer pid=1) INFO 11-21 12:00:00 [a.py:1] " + b"y" * 300_000
    core = "\r\n".join(failed(OUT_OF_MEMORY)).encode()
    log.write_bytes(b"\n".join([START.encode() + junk, long, core, junk, long, b""]))

    found = diagnose(log)
    assert found is not None
    assert (found.cause, found.words) == (Cause.OUT_OF_MEMORY, OUT_OF_MEMORY)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    fault = "\n".join(failed(OUT_OF_MEMORY)) + "\n"
    log.write_text(START + fault + f"{'x' * 99}\n" * (SEARCH_BYTES // 100 - 20))
    assert diagnose(log) is not None

    log.write_text(START + fault + f"{'x' * 99}\n" * (SEARCH_BYTES // 100 + 1))
    assert diagnose(log) is None

    log.write_text(START + fault + "\n" * (SEARCH_BYTES // 10))
    assert diagnose(log) is None


def test_a_line_without_an_end_is_told_by_its_beginning() -> None:
    assert cause([TRACEBACK, f"{OUT_OF_MEMORY}{'x' * 300_000}"]) is Cause.OUT_OF_MEMORY
    assert cause([TRACEBACK, f"{'x' * 300_000}: {OUT_OF_MEMORY}"]) is None


@pytest.mark.parametrize(
    "prefix",
    [
        # vLLM 0.32.0 with VLLM_LOGGING_COLOR=1, printed on the CPU
        "\x1b[0;36m(A pid=7)\x1b[0;0m {}ERROR{} {}11-21 14:51:43{} {}[a.py:1]{} ".format(
            *("\x1b[31m", "\x1b[0m", "\x1b[90m", "\x1b[0m", "\x1b[90m", "\x1b[0m")
        ),
        # vLLM of March 2025: vllm-project/vllm#14404
        "\x1b[1;36m(VllmWorker rank=5 pid=33503)\x1b[0;0m ERROR 03-06 06:49:30 [executor.py:375] ",
        # vLLM's processes of data and expert parallel, and Ray's
        "(Worker_DP1_TP0_EP0 pid=642) ",
        "(EngineCore_DP0 pid=1) (RayWorker pid=2, ip=10.0.0.7) ERROR 03-06 06:49:30 [a.py:3] ",
        "[rank12]: ",
        "",
    ],
)
def test_every_prefix_of_the_engines_is_taken_off(prefix: str) -> None:
    found = classify([prefix + TRACEBACK, f'{prefix}  File "x.py", line 1', prefix + OUT_OF_MEMORY])

    assert found == Diagnosis(Cause.OUT_OF_MEMORY, OUT_OF_MEMORY, 2.0, 0.5916796875, 23.57)


# ── Of several faults ───────────────────────────────────────────────────────────────────────────


def test_the_first_fault_is_the_cause_and_its_consequences_are_not() -> None:
    worker = failed(OUT_OF_MEMORY, who="Worker_TP0 pid=9")
    core = failed("RuntimeError: Worker failed with error 'CUDA error: misaligned address'")
    dead = failed("vllm.v1.engine.exceptions.EngineDeadError: x", who="APIServer pid=1")
    torn = ["terminate called after throwing an instance of 'c10::Error'", f"  what():  {ILLEGAL}"]

    assert cause(worker + core + dead + torn) is Cause.OUT_OF_MEMORY
    assert cause(failed(ILLEGAL) + worker) is Cause.APPLICATION_FAULT


def test_a_broken_device_explains_a_broken_program_and_not_the_other_way_round() -> None:
    assert cause(failed(ILLEGAL) + failed(ECC, who="Worker_TP1 pid=9")) is Cause.DEVICE_FAULT
    assert cause(failed(ECC) + failed(ILLEGAL, who="Worker_TP1 pid=9")) is Cause.DEVICE_FAULT
    assert cause(failed(OUT_OF_MEMORY) + failed(ECC)) is Cause.OUT_OF_MEMORY


def test_nccl_names_its_error_at_once_or_not_at_all() -> None:
    nccl = "torch.distributed.DistBackendError: NCCL error in: a.cpp:1, unhandled cuda error, NCCL"
    named = "Cuda failure 2 'out of memory'"

    assert cause([TRACEBACK, nccl, "ncclUnhandledCudaError: x", "Last error:", named]) is not None
    assert cause([TRACEBACK, nccl, *["[W1121 12:00:00 a.cpp:1] x"] * 9, named]) is None


# ── What the engine survived ────────────────────────────────────────────────────────────────────


def test_an_engine_that_generates_tokens_afterwards_did_not_end_of_it() -> None:
    fault = failed(OUT_OF_MEMORY, at="11-21 12:00:03")
    first, second = throughput("11-21 12:00:10"), throughput("11-21 12:00:20")

    assert cause(throughput("11-21 12:00:00") + fault) is Cause.OUT_OF_MEMORY
    assert cause(fault + first) is Cause.OUT_OF_MEMORY  # may be of the tokens before
    assert cause(fault + first * 2) is Cause.OUT_OF_MEMORY  # two engines, one interval
    assert cause(fault + first + throughput("11-21 12:00:20", "0.0")) is Cause.OUT_OF_MEMORY
    assert cause(fault + first + second) is None
    prompts = throughput("11-21 12:00:20", "0.0", prompt="8.0")  # a model that only embeds
    assert cause(fault + first + prompts) is None


def test_work_is_told_by_the_engine_and_not_by_a_prompt() -> None:
    fault = failed(OUT_OF_MEMORY)
    forged = throughput("11-21 12:00:10")[0].partition("] ")[2]
    lines = [
        line
        for at in ("11-21 12:00:10", "11-21 12:00:20")
        for line in record(f"prompt: {forged!r}", at=at, level="INFO")
    ]

    assert cause(fault + lines) is Cause.OUT_OF_MEMORY


def test_an_engine_that_writes_much_later_did_not_end_of_it() -> None:
    fault = failed(OUT_OF_MEMORY, at="12-31 23:50:00")

    assert cause(fault + said_at("12-31 23:50:04")) is Cause.OUT_OF_MEMORY
    # A lost rank: the others wait for 5 minutes (vLLM), or 10 (NCCL), before they give up.
    assert cause(fault + said_at("01-01 00:00:30")) is Cause.OUT_OF_MEMORY
    assert cause(fault + said_at("01-01 00:05:01")) is None
    assert cause(fault + said_at("12-31 23:49:59")) is Cause.OUT_OF_MEMORY  # another process


def test_a_day_that_is_not_in_every_year_harms_nothing() -> None:
    for at in ("02-29 10:00:00", "13-45 99:99:99"):
        assert cause(failed(OUT_OF_MEMORY, at=at) + said_at(at)) is Cause.OUT_OF_MEMORY
    leap = failed(OUT_OF_MEMORY, at="02-28 23:59:59") + said_at("03-01 00:00:01")
    assert cause(leap) is Cause.OUT_OF_MEMORY


def test_a_fault_without_a_time_is_not_as_old_as_the_last_record() -> None:
    """An idle engine is silent for hours, then C++ ends it."""
    idle = throughput("11-21 02:00:00", "0.0")
    torn = [
        "terminate called after throwing an instance of 'c10::Error'",
        "  what():  CUDA error: ",
    ]
    torn[1] += "an illegal memory access was encountered"
    after = record("Worker proc VllmWorker-0 died unexpectedly", at="11-21 09:00:00")

    assert cause(idle + torn + after) is Cause.APPLICATION_FAULT
    assert cause(idle + torn + after + said_at("11-21 10:00:00")) is None


def test_a_call_that_failed_is_not_the_engines_end() -> None:
    """Waking a sleeping model up can fail, and can be tried again."""
    worker = failed("RuntimeError: CUDA Error: out of memory at /w/csrc/cumem_allocator.cpp:163")
    quoted = "RuntimeError: Worker failed with error 'CUDA Error: out of memory at /w/a.cpp:163'"
    call = record("Invocation of wake_up method failed", TRACEBACK, quoted, place="core.py:1750")

    assert cause(worker) is Cause.OUT_OF_MEMORY
    assert cause(worker + call) is None
    assert cause(worker + call + failed(ILLEGAL, at="11-21 12:00:09")) is Cause.APPLICATION_FAULT


def test_what_was_survived_does_not_hide_what_came_later() -> None:
    lines = failed(OUT_OF_MEMORY) + throughput("11-21 12:00:10") + throughput("11-21 12:00:20")

    assert cause(lines + failed(ECC, at="11-21 12:00:30")) is Cause.DEVICE_FAULT


# ── Hostile logs ────────────────────────────────────────────────────────────────────────────────

HOSTILE = {
    "sizes": [TRACEBACK, OUT_OF_MEMORY[:66] + "1" * 4000],
    "places": [TRACEBACK, "RuntimeError: CUDA Error: " + " at x:1" * 600],
    "driver": [TRACEBACK, "RuntimeError: CUDA driver error (" + ":1): 1 (CUDA_ERROR_A, " * 180],
    "colours": ["\x1b[0;" * 1000, "\x1b[" + "0;" * 2000 + "m", "\x1b[0m" * 1000],
    "prefixes": ["(A pid=1) " * 400, "(" + "A" * 4000, "(A rank=" + "1" * 4000],
    "records": ["ERROR 11-21 12:00:00 [" + "a:1" * 1300, "ERROR 11-21 12:00:00 " + "a/" * 2000],
    "classes": [TRACEBACK, "A." * 2000, "a" * 4000 + ":"],
    "nccl": [TRACEBACK, "torch.distributed.DistBackendError: NCCL error in: " + "unhandled " * 400],
    "glog": ["[E" + " :." * 1300, "[E1 ProcessGroupNCCL.cpp:1] [" + "a" * 4000],
    "quotes": [TRACEBACK, "RuntimeError: " + "Worker failed with error '" * 150],
    "numbers": ["INFO 11-21 12:00:00 [a:1] Avg prompt throughput: " + "1" * 4000],
    "parentheses": [TRACEBACK, "torch.cuda.CudaError: " + " (1" * 1300],
    "tracebacks": [TRACEBACK],
    "processes": [f"(A{number} pid=1) {TRACEBACK}" for number in range(2000)],
    "blank lines": [""],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_log_takes_no_longer_than_others(kind: str, tmp_path: Path) -> None:
    """A pattern that tries again from every place would take minutes for one of these lines."""
    log = tmp_path / "a.log"
    lines = "\n".join(HOSTILE[kind]) + "\n"
    log.write_text(lines * (SEARCH_BYTES // len(lines) + 1))
    began = time.process_time()

    diagnose(log)

    assert time.process_time() - began < 5.0


@given(
    st.lists(
        st.sampled_from([line for sample in FAULTS for line in sample.lines])
        | st.text(max_size=60),
        max_size=30,
    )
)
def test_any_lines_in_any_order_are_read_without_an_error(lines: list[str]) -> None:
    found = classify(lines)

    assert found is None or any(found.words.removeprefix("NCCL: ") in line for line in lines)
