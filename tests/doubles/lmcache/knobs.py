"""The knobs of the LMCache double, and what it takes of LMCache's own options."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

from tests.doubles.engine.knobs import Settable, add_flags, knob


@dataclass
class Knobs(Settable):
    max_life_s: float = knob(600.0, "it ends itself after this", fixed=True)
    load_s: float = knob(0.0, "listen only after this long", fixed=True)
    health_status: int = knob(200, "status of /healthcheck")
    health_s: float = knob(0.0, "/healthcheck answers after this long; inf: never")
    store_s: float = knob(0.0, "a store reaches the disk only after this long")
    lose_stores: bool = knob(False, "nothing that is stored reaches the disk")
    fail_every: int = knob(0, "every Nth file that is to be written is not; 0: none")
    prefetch_s: float = knob(0.0, "seconds that a prefetch takes")


@dataclass(frozen=True)
class Options:
    """Those of LMCache's options that mean something here."""

    host: str
    port: int
    http_host: str
    http_port: int
    chunk_tokens: int
    base_path: str  # empty: no tier on disk
    tmp_dir: str | None
    retains: bool  # what a lookup reads from disk stays in RAM


def parse(argv: list[str]) -> tuple[Knobs, Options]:
    split = argv.index("server") if "server" in argv else len(argv)
    parser = ArgumentParser(
        prog="lmcache",
        allow_abbrev=False,
        usage="lmcache [knobs] server [LMCache's options]",
        description="A stand-in for `lmcache server` that can be told to misbehave."
        " Most knobs can be set later too: POST /double/knobs {name: value}.",
    )
    add_flags(parser, Knobs)
    knobs = Knobs()
    try:
        knobs.set(vars(parser.parse_args(argv[:split])), running=False)
    except ValueError as exc:
        parser.error(str(exc))
    if split == len(argv):
        parser.error("the command `server` is missing")
    return knobs, _options(argv[split + 1 :])


def _options(argv: list[str]) -> Options:
    parser = ArgumentParser(prog="lmcache server", allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=5555)
    parser.add_argument("--http-host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=8080)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--l1-size-gb", type=float, required=True)
    parser.add_argument("--eviction-policy", required=True)
    parser.add_argument("--l2-adapter", action="append", default=[])
    parser.add_argument("--l2-prefetch-policy", default="default")
    known, _ = parser.parse_known_args(argv)
    try:
        base_path, tmp_dir = _tier(known)
    except ValueError as exc:
        # argparse has no part in this one: LMCache dies of it with a traceback.
        sys.exit(f"ValueError: {exc}")
    return Options(
        host=known.host,
        port=known.port,
        http_host=known.http_host,
        http_port=known.http_port,
        chunk_tokens=known.chunk_size,
        base_path=base_path,
        tmp_dir=tmp_dir,
        retains=known.l2_prefetch_policy == "retain",
    )


def _tier(known: Namespace) -> tuple[str, str | None]:
    if not known.l2_adapter:
        return "", None
    adapter = json.loads(known.l2_adapter[0])
    if adapter.get("type") != "fs":
        raise ValueError(f"the double has no L2 adapter {adapter.get('type')!r}")
    base_path, tmp_dir = adapter.get("base_path"), adapter.get("relative_tmp_dir")
    if not isinstance(base_path, str) or not base_path:
        raise ValueError("base_path must be a non-empty string")
    if tmp_dir is not None and (os.path.isabs(tmp_dir) or ".." in tmp_dir.split("/")):
        raise ValueError("Invalid relative_tmp_dir: " + tmp_dir)
    return base_path, tmp_dir
