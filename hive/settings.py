"""Every knob of hive: its name, its unit, its default, and what it must agree with.

`load` reads a TOML file, lets `HIVE_SECTION__KEY` variables and flags override scalar keys, and
either returns frozen `Settings` or raises one `ConfigInvalid` that lists every problem with the
key, what was given, what would be right and the nearest known key (R020, R049, R074, C10).
"""

import difflib
import errno
import importlib.util
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from hive.errors import ConfigInvalid

DEFAULT_FILES = (Path("hive.toml"), Path("/etc/hive/hive.toml"))
FILE_BYTES = 2**20  # of a configuration: one of a thousand models has a fifth of it
SOCKET_PATH_BYTES = 107  # sun_path less the closing NUL
PATH_BYTES, NAME_BYTES = 4095, 255  # the kernel's limits of a path, and of each part of it
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?\Z")
_CATALOGUES = ("postgresql", "postgres", "postgresql+asyncpg")
_OWN_LABELS = frozenset(
    {"alertname", "severity", "rule", "operation", "model", "worker", "device", "kind"}
)
# Values that no message repeats.
_SECRETS = frozenset({"catalogue_url", "webhook_url", "webhook_token", "sha256"})
_GPU_DEVICE = re.compile(r"(cuda:(0|[1-9][0-9]{0,2})|GPU-[0-9a-fA-F-]{8,36})\Z")

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]  # 0 = none


def _device(value: str) -> str:
    if value == "cpu" or _GPU_DEVICE.match(value):
        return value
    raise PydanticCustomError(
        "device", 'a device is "cuda:N" (NVML\'s N), "GPU-<uuid>" or "cpu"; hive never chooses one'
    )


def _text(value: str) -> str:
    """What the kernel takes as an argument, a variable or a name: all but NUL."""
    if "\0" in value:
        raise PydanticCustomError("nul", "a NUL character cannot be part of it")
    return value


def _location(value: str) -> str:
    """A path, or what may be one, that the kernel would look up."""
    encoded = os.fsencode(_text(value))
    if len(encoded) > PATH_BYTES or max(map(len, encoded.split(b"/"))) > NAME_BYTES:
        raise PydanticCustomError(
            "path_length",
            "a path has at most {path} bytes, and each part of it {name}",
            {"path": PATH_BYTES, "name": NAME_BYTES},
        )
    return value


def _path(value: Path) -> Path:
    return Path(_location(str(value)))


def _variable(name: str) -> str:
    if not name or "=" in name:
        raise PydanticCustomError("variable", "the name of a variable is not empty and has no '='")
    return name


def _host(value: str) -> str:
    """A name or address that can be looked up at all."""
    try:
        _text(value).encode("idna")
    except UnicodeError as exc:
        raise PydanticCustomError("host", "this is neither an address nor a host's name") from exc
    return value


def _catalogue_url(value: SecretStr) -> SecretStr:
    """PostgreSQL's, or empty. No message repeats a part that may be its password."""
    text = _text(value.get_secret_value())
    if not text:
        return value
    scheme, has_scheme, _ = text.partition("://")
    try:
        parts = urlsplit(text)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        port_fits = False
    if not has_scheme:
        what = "this is no URL"
    elif scheme not in _CATALOGUES:
        kind = scheme if re.fullmatch(r"[a-z0-9+.-]{1,32}", scheme) else "this"
        what = f"{kind} is not supported; leave it empty for SQLite"
    elif not port_fits:
        what = "its port is no number from 1 to 65535 (in a password write @ as %40, : as %3A, / as %2F)"
    elif len(parts.path) < 2:  # noqa: PLR2004 (a slash and a name)
        what = "it names no database"
    elif importlib.util.find_spec("asyncpg") is None:
        raise PydanticCustomError(
            "catalogue_driver",
            "PostgreSQL needs the driver asyncpg, which is not installed: pip install 'hive[postgres]'",
        )
    else:
        return value
    raise PydanticCustomError(
        "catalogue_url",
        "{what}; PostgreSQL's is postgresql://user:password@host/database, or "
        "postgresql:///database?host=/run/postgresql for a unix socket",
        {"what": what},
    )


def _webhook_url(value: SecretStr) -> SecretStr:
    """HTTP, or empty. No message repeats a part that may be a secret."""
    text = _text(value.get_secret_value())
    if not text:
        return value
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
        is_usable = bool(parts.hostname) and has_port
    except ValueError:
        parts, is_usable = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not is_usable or not text.isprintable():
        what = "this is no URL of HTTP"
    elif parts.username is not None or parts.password is not None:
        what = "a password does not belong into the URL; webhook_token is sent as a bearer token"
    else:
        return value
    raise PydanticCustomError(
        "webhook_url", "{what}; Alertmanager's is http://host:9093/api/v2/alerts", {"what": what}
    )


def _token(value: SecretStr) -> SecretStr:
    """What fits into a header."""
    text = value.get_secret_value()
    if text and not re.fullmatch(r"[\x21-\x7e]{1,4096}", text):
        raise PydanticCustomError(
            "token", "a token is 1 to 4096 printable characters of ASCII, without spaces"
        )
    return value


def _label(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", name) or name in _OWN_LABELS:
        raise PydanticCustomError(
            "label",
            "a label is letters, digits and '_', not beginning with a digit, and none of hive's own "
            "({own})",
            {"own": ", ".join(sorted(_OWN_LABELS))},
        )
    return name


def _as_devices(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _one_kind(devices: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(devices)) != len(devices):
        raise PydanticCustomError("device", "a device is named twice")
    if "cpu" in devices and len(devices) > 1:
        raise PydanticCustomError("device", '"cpu" cannot be part of a list of devices')
    return devices


def _refuse(problems: Iterator[str]) -> None:
    """One validation error of all the problems, a line each; `_problems` takes it apart."""
    if found := list(problems):
        raise PydanticCustomError("disagree", "{found}", {"found": "\n".join(found)})


Device = Annotated[str, AfterValidator(_device)]
Text = Annotated[str, AfterValidator(_text)]
Location = Annotated[str, Field(min_length=1), AfterValidator(_location)]
FilePath = Annotated[Path, AfterValidator(_path)]
# One worker's devices: one, or several for tensor parallelism.
Devices = Annotated[
    tuple[Device, ...],
    Field(min_length=1, max_length=64),
    BeforeValidator(_as_devices),
    AfterValidator(_one_kind),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _default_state_dir() -> Path:
    systemd = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if systemd:
        return Path(systemd)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "hive"


def _default_runtime_dir() -> Path:
    systemd = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if systemd:
        return Path(systemd)
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "hive" if base else Path(f"/tmp/hive-{os.getuid()}")  # noqa: S108 (made 0700, owner checked)


class Server(Section):
    """Where hive listens, where it keeps things, and what it does on a GPU error."""

    host: Annotated[str, Field(min_length=1), AfterValidator(_host)] = Field(
        "127.0.0.1",
        description="Address to listen on; anything but loopback needs API keys.",
    )
    port: int = Field(
        7411, ge=0, le=65535, description="TCP port; 0 lets the kernel choose (it is logged)."
    )
    state_dir: FilePath = Field(
        default_factory=_default_state_dir,
        description="Logs, journals and windows; made 0700, and for hive's user to write alone. Default: $STATE_DIRECTORY, else $XDG_STATE_HOME/hive.",
    )
    runtime_dir: FilePath = Field(
        default_factory=_default_runtime_dir,
        description="Sockets and engines' temporary files; made 0700, and for hive's user to write alone. Default: $RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/hive.",
    )
    gpu_error_policy: Literal["exit", "quarantine"] = Field(
        "exit", description="What a device fault does at run time."
    )
    drain_s: SecondsOrNone = Field(
        30, description="Seconds that running requests get when hive or a worker stops."
    )
    driver_wait_s: SecondsOrNone = Field(
        0, description="Seconds to wait at boot for the GPU's device nodes."
    )
    driver_call_s: Seconds = Field(
        5, description="Longest wait for one call of the GPU's driver; then the device is LOST."
    )
    max_body_mib: float = Field(32, gt=0, le=4096, description="Largest request body, MiB.")
    max_buffered_mib: float = Field(
        512,
        gt=0,
        le=65536,
        description="All buffered request bodies together, MiB; beyond it requests are refused.",
    )
    body_s: Seconds = Field(10, description="Seconds to receive a request body.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )

    @field_validator("state_dir", "runtime_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        try:
            return value.expanduser().absolute()
        except RuntimeError as exc:
            raise PydanticCustomError("home", "there is no such user's home directory") from exc

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


class Timeouts(Section):
    """Every limit lies inside its parent's (R046-R049, C15)."""

    request_s: Seconds = Field(30, description="Arrival to the first byte of the answer, seconds.")
    queue_s: SecondsOrNone = Field(5, description="Longest wait for a slot, seconds.")
    connect_s: Seconds = Field(2, description="To connect to the engine, seconds.")
    inference_s: Seconds = Field(
        25, description="Slot given to the answer (streams: to the first token), seconds."
    )
    stall_s: Seconds = Field(25, description="Between two tokens of a stream, seconds.")
    stream_total_s: SecondsOrNone = Field(0, description="A whole stream, seconds; 0 = no limit.")
    cleanup_s: Seconds = Field(
        5, description="To see an abort confirmed, and from TERM to KILL, seconds."
    )
    kill_s: Seconds = Field(
        5,
        description="From KILL to giving a process up as LOST, seconds. Host memory takes time to "
        "free: allow more for an engine that holds hundreds of GiB of it.",
    )
    load_s: Seconds = Field(300, description="An engine's start to READY, seconds.")

    @model_validator(mode="after")
    def _cascade(self) -> Self:
        if self.queue_s > self.request_s:
            raise PydanticCustomError(
                "cascade",
                "queue_s ({queue}) must not exceed request_s ({request})",
                {"queue": self.queue_s, "request": self.request_s},
            )
        if self.inference_s + self.cleanup_s > self.request_s:
            raise PydanticCustomError(
                "cascade",
                "inference_s + cleanup_s ({inner}) must not exceed request_s ({request})",
                {"inner": self.inference_s + self.cleanup_s, "request": self.request_s},
            )
        return self


class Restarts(Section):
    """Starts that nobody asked for; beyond them a worker is FAILED (C5)."""

    starts: int = Field(
        5, ge=0, le=1000, description="Restarts allowed within window_s; 0 = never restart."
    )
    window_s: Seconds = Field(300, description="The window in which restarts are counted, seconds.")
    backoff_s: SecondsOrNone = Field(
        1, description="Pause before the first restart in the window, seconds; doubles each time."
    )
    backoff_max_s: Seconds = Field(60, description="Longest pause before a restart, seconds.")


class Breaker(Section):
    """When a worker that keeps failing is not asked for a while."""

    failures: int = Field(
        5, ge=1, le=1000, description="Consecutive failures that open a worker's breaker."
    )
    cooldown_s: Seconds = Field(60, description="Seconds until one probe is let through.")


class ApiKey(Section):
    """One caller's key; made by `hive key new NAME`, kept only as its hash."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="Who uses it.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, hexadecimal.")
    scopes: tuple[Literal["inference", "admin", "metrics"], ...] = Field(
        ("inference",), min_length=1, description="What it may do."
    )
    priority: Literal["interactive", "normal", "batch"] = Field(
        "normal", description="Highest priority it may ask for."
    )
    max_concurrent: int = Field(
        8, ge=0, le=100_000, description="Requests at once; beyond it 429. 0 = no limit."
    )
    requests_per_minute: int = Field(0, ge=0, description="Rate limit; 0 = none.")


class Auth(Section):
    """Who may ask for what; without keys everybody may everything, on loopback only."""

    keys: tuple[ApiKey, ...] = Field((), description="Made by `hive key new NAME`.")

    @field_validator("keys")
    @classmethod
    def _names_differ(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        names = [key.name for key in keys]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise PydanticCustomError(
                "keys", "key names must differ; given twice: {names}", {"names": ", ".join(twice)}
            )
        return keys


class Windows(Section):
    """Context windows, and the tier of files that holds their KV cache."""

    kv_tier_gib: float = Field(
        10, gt=0, le=1_000_000, description="LMCache's file tier, GiB, bounded by hive."
    )
    kv_ram_gib: float = Field(
        1, ge=0.1, le=100_000, description="Host memory that LMCache keeps chunks in, GiB."
    )
    kv_chunk_tokens: int = Field(
        256,
        ge=16,
        le=65_536,
        description="Tokens in a KV chunk; a multiple of the engines' block size.",
    )
    kv_server: tuple[Text, ...] = Field(
        (),
        description="Program to run as the LMCache server, with arguments; LMCache's own are "
        "added. Default: the one in the engine's environment.",
    )
    catalogue_url: Annotated[SecretStr, AfterValidator(_catalogue_url)] = Field(
        SecretStr(""),
        description="Database of sessions and windows, one for each hive: "
        "`postgresql://user:password@host/database` (needs `hive[postgres]`). Secret. Default: SQLite, "
        "`STATE/catalogue.db`.",
    )
    session_idle_s: float = Field(
        86_400,
        gt=0,
        le=31_536_000,
        allow_inf_nan=False,
        description="Seconds after which an unused session expires.",
    )
    max_sessions: int = Field(
        10_000, ge=0, le=10_000_000, description="Sessions of one API key; 0 = no limit."
    )
    max_windows: int = Field(
        1000, ge=0, le=10_000_000, description="Windows of one API key; 0 = no limit."
    )
    max_gib: float = Field(
        0, ge=0, le=1_000_000, description="Disk of one API key's windows, GiB; 0 = no limit."
    )
    backup_dir: FilePath | None = Field(
        None,
        description="Backups of windows; made 0700, and for hive's user alone. May be on another "
        "file system. Default: backups in server.state_dir.",
    )
    max_backups: int = Field(
        100, ge=0, le=10_000_000, description="Backups of one API key; 0 = no limit."
    )

    @field_validator("backup_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise PydanticCustomError("relative", "a path is absolute, it begins with '/'")
        return value


class Alerts(Section):
    """Where escalations are sent: an Alertmanager, or whatever takes its messages."""

    webhook_url: Annotated[SecretStr, AfterValidator(_webhook_url)] = Field(
        SecretStr(""),
        description="Where they are sent by POST, as `http://127.0.0.1:9093/api/v2/alerts`. Secret. "
        "Default: nowhere; `hive alerts` and the log have them all the same.",
    )
    webhook_token: Annotated[SecretStr, AfterValidator(_token)] = Field(
        SecretStr(""), description="Sent as `Authorization: Bearer TOKEN`. Secret. Default: none."
    )
    webhook_token_file: FilePath | None = Field(
        None, description="A file that holds the token, read anew for each message."
    )
    level: Literal["info", "medium", "high", "critical", "emergency"] = Field(
        "high", description="Least level that is sent."
    )
    labels: dict[Annotated[str, AfterValidator(_label)], Text] = Field(
        default_factory=dict,
        description='Labels added to each alert, as `{ host = "gpu7" }`: they tell one hive\'s from '
        "another's.",
    )
    runbook_url: Text = Field(
        "docs/escalation.md", description="Where alerts are explained; `#alertname` is added."
    )
    timeout_s: Seconds = Field(5, description="For the webhook to answer, seconds.")
    retry_max_s: Seconds = Field(
        300,
        description="Longest pause before a message is tried again, seconds; the first is 1, then "
        "they double.",
    )
    keep_s: Seconds = Field(
        86_400, description="Seconds after which a message that cannot be sent is dropped."
    )
    max_waiting: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Messages that may wait; beyond it the oldest of the lowest level is dropped.",
    )

    @field_validator("webhook_token_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise PydanticCustomError("relative", "a path is absolute, it begins with '/'")
        return value

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        has_token = bool(self.webhook_token.get_secret_value())
        if has_token and self.webhook_token_file is not None:
            raise PydanticCustomError(
                "tokens", "give webhook_token or webhook_token_file, not both"
            )
        if (has_token or self.webhook_token_file) and not self.webhook_url.get_secret_value():
            raise PydanticCustomError("tokens", "a token needs a webhook_url to be sent to")
        return self


class Audit(Section):
    """The log of who did what (docs/audit.md): `STATE/audit`, a chain over all of its files."""

    max_mib: float = Field(
        10, ge=0.01, le=10_000, description="Size of a file at which the next one begins, MiB."
    )
    keep: int = Field(
        10, ge=1, le=10_000, description="Older files that are kept; then the oldest is removed."
    )


class TimeoutOverrides(Section):
    """A model's own limits; what is not set comes from [timeouts]."""

    request_s: Seconds | None = None
    queue_s: SecondsOrNone | None = None
    connect_s: Seconds | None = None
    inference_s: Seconds | None = None
    stall_s: Seconds | None = None
    stream_total_s: SecondsOrNone | None = None
    cleanup_s: Seconds | None = None
    kill_s: Seconds | None = None
    load_s: Seconds | None = None


class Model(Section):
    """One model, under the name that clients use."""

    engine: Literal["vllm", "command"] = Field(
        description="vllm, or command for any OpenAI-compatible server."
    )
    path: Location | None = Field(
        None, description="Directory of the model, or a hub id (engine vllm)."
    )
    device: Devices | None = Field(
        None,
        description='"cuda:N", "GPU-<uuid>", a list (tensor parallel) or "cpu". Never guessed.',
    )
    replicas: tuple[Devices, ...] = Field(
        (), description="Devices of each worker, instead of `device`."
    )
    max_concurrent: int = Field(64, ge=1, le=100_000, description="Slots of one worker.")
    queue_depth: int = Field(
        32, ge=0, le=100_000, description="Requests that may wait; 0 = refuse at once."
    )
    kv_cache_gib: float = Field(
        0,
        ge=0,
        le=100_000,
        description="KV cache, GiB. CPU: 0 means 1; CUDA: 0 means vLLM's own claim.",
    )
    required_vram_gib: float = Field(
        0, ge=0, le=100_000, description="VRAM needed, GiB; 0 = worked out."
    )
    alternatives: tuple[str, ...] = Field(
        (), description="Models named in VRAM errors' hints; never switched to."
    )
    windows: bool = Field(False, description="LMCache beside it, for context windows.")
    args: tuple[Text, ...] = Field((), description="Arguments passed on to the engine.")
    env: dict[Annotated[Text, AfterValidator(_variable)], Text] = Field(
        default_factory=dict, description="Environment added for the engine."
    )
    python: FilePath | None = Field(
        None,
        description="Python of the engine's environment; default: the one `hive engine install` made.",
    )
    command: tuple[Text, ...] = Field(
        (),
        description="Program and arguments (engine command); {socket}, {model} and {device} are "
        "filled in, with windows = true also {kv}, {kv_path} and {kv_chunk}.",
    )
    health_path: Text = Field(
        "/health", pattern=r"^/", description="Path that answers 200 when the engine is up."
    )
    probe: Literal["completion", "chat", "embedding", "health"] | None = Field(
        None, description="What must succeed before READY; vllm chooses it from the model's task."
    )
    running: Literal["vllm", "none"] | None = Field(
        None,
        description='"vllm": the engine publishes vLLM\'s gauges, by which hive sees its progress and '
        'that an abort took effect; "none": it does not, is judged by its processes alone, and is '
        "never ended for what a client gave up. Default: vllm for vllm, none for command.",
    )
    timeouts: TimeoutOverrides = Field(
        default_factory=TimeoutOverrides, description="Limits of this model, instead of [timeouts]."
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        _refuse(self._disagreements())
        return self

    def _disagreements(self) -> Iterator[str]:
        if not self.device and not self.replicas:
            yield (
                'a model must name its device: device = "cuda:N", "GPU-<uuid>", a list, or "cpu"; '
                "hive never chooses one"
            )
        if self.device and self.replicas:
            yield "give either device or replicas, not both"
        if self.engine == "vllm" and not self.path:
            yield "engine vllm needs path: a model directory or a hub id"
        if self.engine == "vllm" and self.command:
            yield 'command belongs to engine = "command"'
        if self.engine == "command" and not self.command:
            yield 'engine command needs command = ["prog", "--uds", "{socket}"]'
        elif self.engine == "command" and not any("{socket}" in part for part in self.command):
            yield "command must pass {socket} on: the unix socket that hive talks to"
        if self.windows and self.engine == "command" and not any("{kv}" in p for p in self.command):
            yield "windows = true: command must pass {kv} on, the address of the LMCache server"
        if "CUDA_VISIBLE_DEVICES" in self.env:
            yield "env must not set CUDA_VISIBLE_DEVICES: hive sets it from device"

    @property
    def workers(self) -> tuple[tuple[str, ...], ...]:
        """The devices of each worker of this model."""
        return self.replicas or ((self.device,) if self.device else ())


class Settings(BaseSettings):
    """All of hive.toml, frozen."""

    model_config = SettingsConfigDict(
        env_prefix="HIVE_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    server: Server = Field(default_factory=Server)
    timeouts: Timeouts = Field(default_factory=Timeouts)
    restarts: Restarts = Field(default_factory=Restarts)
    breaker: Breaker = Field(default_factory=Breaker)
    auth: Auth = Field(default_factory=Auth)
    windows: Windows = Field(default_factory=Windows)
    alerts: Alerts = Field(default_factory=Alerts)
    audit: Audit = Field(default_factory=Audit)
    models: dict[str, Model] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        checks = (
            self._check_models(),
            self._check_binding(),
            self._check_sharing(),
            self._check_directories(),
            self._check_socket_path(),
        )
        _refuse(problem for check in checks for problem in check)
        return self

    def _check_models(self) -> Iterator[str]:
        for name, model in self.models.items():
            if not NAME.match(name):
                yield (
                    f"models.{name!r}: a model's name is 1 to 64 of letters, digits, '.', '_' and "
                    "'-', beginning and ending with a letter or digit"
                )
            limits = self.timeouts_of(model)
            inner = limits.inference_s + limits.cleanup_s
            if limits.queue_s > limits.request_s or inner > limits.request_s:
                yield (
                    f"models.{name}.timeouts: with [timeouts] they must keep queue_s <= request_s "
                    f"and inference_s + cleanup_s <= request_s (here {limits.queue_s:g} <= "
                    f"{limits.request_s:g} and {inner:g} <= {limits.request_s:g})"
                )
            for other in model.alternatives:
                if other not in self.models:
                    yield f"models.{name}.alternatives names {other!r}, which is not configured"

    def _check_binding(self) -> Iterator[str]:
        if not self.server.is_loopback and not self.auth.keys:
            yield (
                f"server.host = {self.server.host!r} is not loopback, so API keys are needed: make "
                "one with 'hive key new NAME', or bind 127.0.0.1"
            )

    def _check_sharing(self) -> Iterator[str]:
        users: dict[str, list[str]] = {}
        for name, model in self.models.items():
            for devices in model.workers:
                for device in devices:
                    if device != "cpu":
                        users.setdefault(device, []).append(name)
        for device, names in users.items():
            silent = [
                n
                for n in dict.fromkeys(names)
                if not (self.models[n].required_vram_gib or self.models[n].kv_cache_gib)
            ]
            if len(names) > 1 and silent:
                yield (
                    f"{', '.join(names)} share {device}: each must state its VRAM (kv_cache_gib or "
                    f"required_vram_gib); missing for {', '.join(silent)}"
                )

    def _check_directories(self) -> Iterator[str]:
        state, runtime = self.server.state_dir, self.server.runtime_dir
        if os.path.realpath(state) == os.path.realpath(runtime):
            yield (
                f"server.state_dir and server.runtime_dir are the same directory ({runtime}): what "
                "hive keeps and what it clears away need one each"
            )
        if self.windows.backup_dir is not None:
            yield from self._check_backups(os.path.realpath(self.windows.backup_dir))

    def _check_backups(self, backups: str) -> Iterator[str]:
        """What belongs to nobody is removed from hive's own directories, or taken for its own."""
        state, runtime = self.server.state_dir, self.server.runtime_dir
        own = [runtime, *(state / name for name in ("kv", "windows", "m", "ledger", "logs"))]
        for directory in map(os.path.realpath, own):
            if backups == directory or backups.startswith(f"{directory}{os.sep}"):
                yield (
                    f"windows.backup_dir is {backups}, which hive itself uses and clears: backups "
                    "need a directory of their own"
                )
        if backups == os.path.realpath(state):
            yield "windows.backup_dir and server.state_dir are the same: backups need one of their own"

    def _check_socket_path(self) -> Iterator[str]:
        # A worker's own socket is w/N/s; vLLM makes others named by a UUID in w/N/t.
        longest = "w/999999/t/" + "u" * 36
        if all(model.engine == "command" for model in self.models.values()):
            longest = "w/999999/s"
        size = len(os.fsencode(self.server.runtime_dir / longest))
        if size > SOCKET_PATH_BYTES:
            yield (
                f"server.runtime_dir is too long by {size - SOCKET_PATH_BYTES} bytes: an engine's "
                f"socket would have {size}, a unix socket path has at most {SOCKET_PATH_BYTES}; "
                "choose a shorter directory"
            )

    @property
    def backup_dir(self) -> Path:
        """Where backups of windows are."""
        return self.windows.backup_dir or self.server.state_dir / "backups"

    def timeouts_of(self, model: Model) -> Timeouts:
        """[timeouts] with the model's own values put in (not validated again).

        Who shortens a model's request_s need not name queue_s, too: it is never longer.
        """
        own = model.timeouts.model_dump(exclude_none=True)
        merged = self.timeouts.model_copy(update=own)
        if "queue_s" in own:
            return merged
        return merged.model_copy(update={"queue_s": min(merged.queue_s, merged.request_s)})


# Sections whose scalar keys the environment may set.
FIXED = ("server", "timeouts", "restarts", "breaker", "windows", "alerts", "audit")


# What `hive reload` changes while hive runs (policy/reloading); "*" is any one name, or all below.
# All else needs a restart.
RELOADABLE = (
    "auth.keys.*",
    "server.log_level",
    "server.drain_s",
    "server.gpu_error_policy",
    "server.max_body_mib",
    "server.max_buffered_mib",
    "server.body_s",
    "timeouts.*",
    "restarts.*",
    "breaker.*",
    "windows.session_idle_s",
    "windows.max_sessions",
    "windows.max_windows",
    "windows.max_gib",
    "windows.max_backups",
    "alerts.webhook_token",
    "alerts.webhook_token_file",
    "alerts.level",
    "alerts.labels",
    "alerts.runbook_url",
    "alerts.timeout_s",
    "alerts.retry_max_s",
    "alerts.keep_s",
    "alerts.max_waiting",
    "audit.*",
    "models.*.queue_depth",
    "models.*.timeouts.*",
)


class _ScalarEnvironment(EnvSettingsSource):
    """HIVE_SECTION__KEY for the fixed sections only: keys and models belong in the file."""

    def __call__(self) -> dict[str, Any]:
        found: dict[str, dict[str, str]] = {}
        for name, value in os.environ.items():
            section, key = _section_and_key(name)
            if section in FIXED and key:
                found.setdefault(section, {})[key] = value
        return found


def _section_and_key(variable: str) -> tuple[str, str]:
    """What HIVE_SECTION__KEY would set; empty for other variables."""
    if not variable.startswith("HIVE_"):
        return "", ""
    section, _, key = variable.removeprefix("HIVE_").lower().partition("__")
    return section, key


def load(
    file: Path | None = None, flags: Mapping[str, Mapping[str, Any]] | None = None
) -> Settings:
    """Read the settings; `flags` maps section to key to value and wins over everything.

    Without `file` the first of `DEFAULT_FILES` that exists is read.
    Raises ConfigInvalid with every problem found, before anything has been done.
    """
    path = file or default_file()
    document = _read(path)
    unquoted = dict(_unquoted_names(document))
    problems = [*_unknown_variables(), *(f"{path}: {problem}" for problem in unquoted.values())]
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        problems.append(
            "CUDA_VISIBLE_DEVICES is set in hive's environment: unset it and name devices in "
            "each model's 'device'; hive sets it for each engine by UUID"
        )
    settings = None
    try:
        settings = _build(document, flags or {})
    except ValidationError as exc:
        found = exc.errors(include_url=False)
        problems += [
            f"{_source(detail['loc'], path, flags or {})}: {line}"
            for detail in found
            if detail["loc"][:2] not in unquoted and not _is_echo(detail, found)
            for line in _problems(detail)
        ]
    if settings and not settings.models:
        problems.append(
            f"{path}: models: no model is configured; add [models.NAME] with engine, path and device"
        )
    if problems or settings is None:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise ConfigInvalid(f"{problems[0]}{more}", problems=problems)
    return settings


def default_file() -> Path:
    """The first of `DEFAULT_FILES` that exists. Raises ConfigInvalid without one."""
    path = next((p for p in DEFAULT_FILES if p.is_file()), None)
    if path is None:
        names = " or ".join(str(p) for p in DEFAULT_FILES)
        raise ConfigInvalid(
            f"No configuration file: {names} does not exist.",
            action="Write one (README, 'Configure'), or name it with --config FILE.",
        )
    return path


def open_regular(path: Path, flags: int = 0) -> BinaryIO:
    """A file, for reading. Raises OSError; a pipe or a device is refused, not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(fd, "rb")


def text_of(path: Path) -> str:
    """What a configuration file says. Raises ConfigInvalid."""
    try:
        with open_regular(path) as file:
            text = file.read(FILE_BYTES + 1)
            if len(text) > FILE_BYTES:  # a reload of it would hold up everything else for seconds
                raise ConfigInvalid(
                    f"{path}: has more than {FILE_BYTES >> 20} MiB.",
                    action="Name hive's configuration with --config FILE.",
                )
            return text.decode()
    except UnicodeDecodeError as exc:
        raise ConfigInvalid(
            f"{path}: is not UTF-8 (byte {exc.start}).", action="Save the file as UTF-8."
        ) from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL in its name
        raise ConfigInvalid(
            f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}.",
            action="Name an existing, readable file with --config FILE.",
        ) from exc


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text_of(path))
    except (ValueError, RecursionError) as exc:  # not only TOMLDecodeError: a number of 5000 digits
        raise ConfigInvalid(
            f"{path}: is not TOML: {exc}.", action="Correct the line that is named."
        ) from exc


def _build(document: Mapping[str, Any], flags: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Flags above the environment above the file, key by key."""
    given = {s: {k: v for k, v in keys.items() if v is not None} for s, keys in flags.items()}

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                InitSettingsSource(settings_cls, given),
                _ScalarEnvironment(settings_cls),
                InitSettingsSource(settings_cls, dict(document)),
            )

    return Sourced()


def _unknown_variables() -> Iterator[str]:
    """HIVE_A__B where A is no section, and HIVE_A where it is one."""
    for name in sorted(os.environ):
        section, key = _section_and_key(name)
        if not key and section in Settings.model_fields:
            yield f"{name}: a section cannot be set as a whole; set its keys, as HIVE_SERVER__PORT"
        if key and section not in FIXED:
            near = _nearest(section, FIXED)
            hint = f"; did you mean HIVE_{near.upper()}__…" if near else ""
            yield f"{name}: no section of that name can be set by the environment{hint} (known: {', '.join(FIXED)})"


def _unquoted_names(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """[models.llama-3.1-8b] is the table 1-8b inside llama-3: say so instead of 'unknown key'."""
    models = document.get("models")
    for name, table in models.items() if isinstance(models, dict) else ():
        for key, value in (
            table.items() if isinstance(table, dict) and "engine" not in table else ()
        ):
            if isinstance(value, dict) and key not in Model.model_fields:
                wanted = f'[models."{name}.{key}"]'
                yield ("models", name), f"models.{name}.{key}: quote a name with a dot: {wanted}"


def _nearest(word: str, known: Any) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys known in the section that `location` lies in."""
    match location:
        case ("models", _, "timeouts", *_):
            owner: type[BaseModel] = TimeoutOverrides
        case ("models", _, _, *_):
            owner = Model
        case ("auth", "keys", _, *_):
            owner = ApiKey
        case (str(section), _, *_) if section in Settings.model_fields:
            kind = Settings.model_fields[section].annotation
            owner = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else Settings
        case _:
            owner = Settings
    return list(owner.model_fields)


def _source(
    location: tuple[int | str, ...], file: Path, flags: Mapping[str, Mapping[str, Any]]
) -> str:
    """Where a value came from: a flag, a variable or the file."""
    section, key = (*map(str, location), "", "")[:2]
    if flags.get(section, {}).get(key) is not None:
        return f"--{key.replace('_', '-')}"
    named = (name for name in os.environ if key and _section_and_key(name) == (section, key))
    return next(named, str(file)) if section in FIXED else str(file)


def _is_echo(detail: ErrorDetails, all_of_them: list[ErrorDetails]) -> bool:
    """A list found too short only because its items were refused, which is told already."""
    at = detail["loc"]
    return detail["type"] == "too_short" and any(
        other["loc"][: len(at)] == at and len(other["loc"]) > len(at) for other in all_of_them
    )


def _problems(detail: ErrorDetails) -> Iterator[str]:
    """A line each: key, what was given, what would be right, the nearest known key."""
    if detail["type"] == "disagree":
        key = ".".join(map(str, detail["loc"]))
        for line in detail["msg"].split("\n"):
            yield f"{key}: {line}" if key else line
    else:
        yield _problem(detail)


def _problem(detail: ErrorDetails) -> str:
    location = detail["loc"]
    key = ".".join(str(part) for part in location if not str(part).startswith("function-"))
    if detail["type"] == "extra_forbidden":
        known = _fields_at(location)
        near = _nearest(str(location[-1]), known)
        hint = f"did you mean '{near}'?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    what = detail["msg"]
    what = what[0].lower() + what[1:]
    given = detail.get("input")
    shown = (
        isinstance(given, str | int | float | bool)
        and "env" not in location
        and _SECRETS.isdisjoint(location)
    )
    got = f" (got {_short(given)})" if shown else ""
    return f"{key}: {what}{got}" if key else f"{what}"


def _short(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
