"""Every knob of the engine double: its default, its meaning, and how it is set."""

import fcntl
import json
import os
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DIE_HOWS = (
    "exit0",
    "exit1",
    "sigkill",
    "segv",
    "abort",
    "greedy",
    "midchunk",
    "core",
    "cuda",
    "cuda_oom",
    "cuda_oom_words",
    "cuda_ecc",
    "cuda_illegal",
    "hangup",
    "hangup-midchunk",
)
CUDA_KINDS = ("illegal", "oom", "oom_words", "ecc", "launch", "lost")
VRAM_SHORT = ("budget", "allocation")
MALFORMED = ("status-line", "chunk-size", "content-length")
EARLY = ("close", "drain")


def knob(default: Any, meaning: str, choices: tuple[str, ...] = (), *, fixed: bool = False) -> Any:
    """A knob; a fixed one means something at the start only and is refused later."""
    return field(default=default, metadata={"meaning": meaning, "choices": choices, "fixed": fixed})


@dataclass
class Settable:
    """Fields made with `knob`, set together or not at all."""

    def set(self, changes: Mapping[str, object], *, running: bool = True) -> None:
        """Apply all the changes or, with a ValueError, none."""
        known = {f.name: f for f in fields(self)}
        checked = {}
        for name, value in changes.items():
            if name not in known:
                raise ValueError(f"no knob {name!r}; there are: {', '.join(known)}")
            knob_ = known[name]
            if running and knob_.metadata["fixed"]:
                raise ValueError(f"{name} means something at the start only")
            checked[name] = _checked(name, knob_.type, knob_.metadata["choices"], value)
        for name, value in checked.items():
            setattr(self, name, value)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Knobs(Settable):
    # Where and what it serves
    uds: str = knob("", "listen on this unix socket", fixed=True)
    control: str = knob("", "listen here too, from the very start: for the test", fixed=True)
    model: str = knob("", "the served model's name; empty: answer to any name", fixed=True)
    journal: str = knob("", "append a JSON line here for every start and request", fixed=True)
    script: str = knob(
        "",
        "a JSON file with a list of knob objects: each start takes the first away and applies it",
        fixed=True,
    )
    dtype: str = knob("", "vLLM's own argument; the double computes with none", fixed=True)
    max_life_s: float = knob(
        600.0, "every process of the double ends itself after this", fixed=True
    )

    # How quick it is
    load_s: float = knob(0.0, "listen only after this long", fixed=True)
    warm_s: float = knob(0.0, "/health answers 503 for this long after listening", fixed=True)
    first_token_s: float = knob(0.0, "seconds of prefill before the first token")
    token_s: float = knob(0.0, "seconds between tokens; 0: as fast as possible")
    tokens: int = knob(16, "tokens of an answer when the request does not bound them")
    burst: int = knob(1, "events written together when --token-s is 0")
    event_bytes: int = knob(0, "pad every token's event to about this size")
    max_running: int = knob(256, "sequences that run at once; others wait")
    max_model_len: int = knob(0, "prompt and answer beyond it are refused with 400; 0: no limit")
    kv_tokens: int = knob(100_000, "KV cache size in tokens, for the usage gauge")
    abort_s: float = knob(0.0, "an aborted request keeps its seat for this long; inf: for ever")
    term_s: float = knob(0.0, "a clean exit after SIGTERM takes this long")

    # Where its KV cache is kept besides (tests/doubles/lmcache)
    kv: str = knob("", "HOST:PORT of the LMCache double; empty: no KV cache at all", fixed=True)
    kv_model: str = knob("", "the model's path in the names of blocks", fixed=True)
    kv_chunk: int = knob(256, "tokens of a chunk, as the LMCache double has it")
    kv_workers: int = knob(1, "tensor-parallel size")
    kv_timeout_s: float = knob(
        0.5, "a question to the LMCache double that takes longer is the last one of this life"
    )
    kv_start_s: float = knob(
        0.0,
        "wait so long for the LMCache double, then exit 1 without it, as vLLM does (after 300 s);"
        " 0: start without it",
        fixed=True,
    )

    # How it answers
    health_status: int = knob(200, "status of /health")
    health_s: float = knob(0.0, "/health answers after this long; inf: never")
    metrics_status: int = knob(200, "status of /metrics; with another one it is empty")
    metrics_s: float = knob(0.0, "/metrics answers after this long; inf: never")
    good_requests: int = knob(
        0, "the first N inference requests are spared the faults below (a readiness probe is one)"
    )
    answer_status: str = knob(
        "", "CODE or CODE:RETRY_AFTER; inference is answered with this error, as vLLM words it"
    )
    silent: bool = knob(False, "inference is never answered, not even with a head")
    stop_after: int | None = knob(None, "no token after the Nth; the connection stays open")
    malformed: str = knob("", "break the answer to inference in this way", MALFORMED)
    hang_up: int = knob(0, "close the connection to the next N inference requests, unanswered")
    early_answer: str = knob(
        "", "answer inference with 413 before its body was read, then close or read on", EARLY
    )
    fd_leak: bool = knob(False, "open a file descriptor at every inference request; never close it")

    # How it dies
    die_after: int | None = knob(None, "die when an answer has N tokens; 0: before its first byte")
    die_how: str = knob("exit1", "the way to die", DIE_HOWS)
    cuda_error: int | None = knob(
        None, "after N inference requests print a CUDA traceback on stderr and exit with status 1"
    )
    cuda_kind: str = knob(
        "illegal",
        "which CUDA error; oom_words: an error of another kind whose text has those words",
        CUDA_KINDS,
    )
    exit_after_s: float | None = knob(None, "exit, cleaned up but unasked, so long after listening")
    exit_code: int = knob(0, "the status of that exit")
    load_fail: str = knob("", "print this on stderr instead of listening and exit 1", fixed=True)
    ignore_term: bool = knob(False, "leader and children ignore SIGTERM and SIGINT")

    # What it takes and leaves behind
    vram_mib: int = knob(
        0, "take so much of each of CUDA_VISIBLE_DEVICES (NVML_DOUBLE) before loading", fixed=True
    )
    vram_short: str = knob(
        "budget",
        "how it fails when less is free: at vLLM's check before loading, or while torch allocates",
        VRAM_SHORT,
        fixed=True,
    )
    core: bool = knob(False, "fork a VLLM::EngineCore child with a VLLM::Worker under it")
    setsid_grandchild: bool = knob(
        False, "fork a process into a session of its own that ignores SIGTERM and lives on"
    )
    wipe_environment: bool = knob(
        False, "that process hides its environment, as setproctitle does", fixed=True
    )
    busy: bool = knob(False, "a VLLM::Worker child burns CPU")
    shm: int = knob(0, "map N files psm_… of 64 KiB in /dev/shm; a clean exit removes them")
    tmp: int = knob(0, "leave N files in $TMPDIR")

    # What it prints
    stderr: str = knob("", "print this on stderr at the start", fixed=True)
    noise: float = knob(0.0, "log lines a second, on stdout and stderr in turn")
    log_prompts: bool = knob(False, "log every request with its prompt, as vLLM can")


def _checked(name: str, kind: object, choices: tuple[str, ...], value: object) -> object:
    if kind is float or kind == float | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif kind is int or kind == int | None:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)  # type: ignore[arg-type]  # bool or str
    if value is None:
        fits = kind in (int | None, float | None)
    if name == "answer_status" and value:
        fits = fits and str(value).partition(":")[0].isdigit()
    if not fits or (choices and value not in ("", *choices)):
        raise ValueError(f"{name}: {value!r} does not fit {choices or kind}")
    return value


def parse(argv: list[str]) -> Knobs:
    parser = ArgumentParser(
        prog="engine",
        allow_abbrev=False,
        description="A stand-in for vLLM that can be told to misbehave."
        " Most knobs can be set later too: POST /double/knobs {name: value}.",
    )
    add_flags(parser, Knobs)
    knobs = Knobs()
    try:
        knobs.set(vars(parser.parse_args(argv)), running=False)
        if knobs.script:
            knobs.set(_next_act(knobs.script), running=False)
    except ValueError as exc:
        parser.error(str(exc))
    if not knobs.uds:
        parser.error("--uds is required")
    if knobs.vram_mib and "NVML_DOUBLE" not in os.environ:
        parser.error("--vram-mib needs NVML_DOUBLE in the environment")
    return knobs


def add_flags(parser: ArgumentParser, kind_of_knobs: type[Settable]) -> None:
    """A flag for every knob."""
    for f in fields(kind_of_knobs):
        flag, meaning = "--" + f.name.replace("_", "-"), f.metadata["meaning"]
        if f.metadata["fixed"]:
            meaning += " (at the start only)"
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=meaning)
            continue
        kind = {int | None: int, float | None: float}.get(f.type, f.type)  # type: ignore[arg-type]
        parser.add_argument(
            flag,
            type=kind,  # type: ignore[arg-type]  # what fields() calls a type may be a string
            default=f.default,
            choices=f.metadata["choices"] or None,
            metavar=None if f.metadata["choices"] else kind.__name__.upper(),  # type: ignore[union-attr]
            help=meaning,
        )


def _next_act(script: str) -> dict[str, object]:
    """Take the first act away, so that the next start plays the one after it."""
    file = os.open(script, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # two replicas may start at once
        acts = json.loads(os.read(file, 1 << 20) or b"[]")
        if not acts:
            return {}
        rest = json.dumps(acts[1:]).encode()
        os.pwrite(file, rest, 0)
        os.ftruncate(file, len(rest))
        act: dict[str, object] = acts[0]
        return act
    finally:
        os.close(file)
