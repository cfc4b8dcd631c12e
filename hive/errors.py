"""Every refusal and failure of hive, once: code, status, severity, and what to do about it.

A cause is a class; its class attributes are the contract (docs/errors.md is generated from them)
and an instance adds the measured facts. Sources: decisions C11, C22, C29 and C31; R027-R048,
R065, R076, R078-R099, R108, R113.
"""

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar


class Family(StrEnum):
    """The nine families every error belongs to (C31)."""

    VALIDATION = "validation"
    NOT_FOUND = "not_found"
    STATE = "state"
    STORAGE = "storage"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    RESOURCE = "resource"
    SECURITY = "security"
    INTERNAL = "internal"


class Severity(StrEnum):
    """How bad it is for the operator (C35)."""

    INFO = "info"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"
    EMERGENCY = "emergency"


_LEVEL = {
    Family.VALIDATION: "info",
    Family.NOT_FOUND: "info",
    Family.STATE: "info",
    Family.INTERNAL: "error",
}  # everything else is a warning (C29)

_SEVERITY = {
    Family.VALIDATION: Severity.INFO,
    Family.NOT_FOUND: Severity.INFO,
    Family.STATE: Severity.INFO,
    Family.INTERNAL: Severity.HIGH,
}

# Detail keys that any error may show; each class adds its own (an allow-list: R076, C21).
_COMMON_DETAILS = frozenset(
    {"reason", "phase", "timeout_seconds", "elapsed_seconds", "resource_info", "model", "worker"}
)


class HiveError(Exception):
    """An error with one code, one HTTP status and one piece of advice.

    `message` says what happened and why, for a person; `param` names the offending field of the
    request; `retry_after_s` (seconds, unrounded) is the hint behind Retry-After; `details` hold
    measured facts, of which only the keys in `shows` ever leave the process.
    """

    code: ClassVar[str] = "UNKNOWN_ERROR"
    number: ClassVar[str | None] = "CWM-9999"
    status: ClassVar[int] = 500
    family: ClassVar[Family] = Family.INTERNAL
    kind: ClassVar[str] = "api_error"  # the `type` that OpenAI and Anthropic clients look at
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    level: ClassVar[str] = "error"
    severity: ClassVar[Severity] = Severity.HIGH
    shows: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = "An error that hive could not classify."
    action: ClassVar[str] = "Look the request id up in hive's log and report what it says."

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "family" in own:
            if "level" not in own:
                cls.level = _LEVEL.get(cls.family, "warning")
            if "severity" not in own:
                cls.severity = _SEVERITY.get(cls.family, Severity.MEDIUM)
        if "code" in own and "number" not in own:
            cls.number = None

    def __init__(
        self,
        message: str | None = None,
        *,
        action: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        **details: Any,
    ) -> None:
        self.message = message or self.summary
        super().__init__(self.message)
        self.suggested_action = action or self.action
        self.param = param
        self.retry_after_s = retry_after_s
        self.details: Mapping[str, Any] = details
        self.timestamp = datetime.now(UTC)

    @property
    def retry_after_seconds(self) -> int | None:
        """The hint as clients get it: whole seconds from 1 to 30, or None (R030, R058)."""
        if self.retry_after_s is None:
            return None
        return max(1, min(30, math.ceil(self.retry_after_s)))

    @property
    def public_details(self) -> dict[str, Any]:
        """The details that may leave the process (C21)."""
        allowed = _COMMON_DETAILS | self.shows
        return {k: v for k, v in self.details.items() if k in allowed and v is not None}

    def __repr__(self) -> str:
        return f"<{self.code} {self.message!r}>"


# ── The caller's request ────────────────────────────────────────────────────────────────────────


class ValidationFailed(HiveError):
    code, status = "VALIDATION_ERROR", 400
    family, kind = Family.VALIDATION, "invalid_request_error"
    shows = frozenset({"validation_errors", "position", "allowed"})
    summary = "The request is not valid."
    action = "Correct the field that is named and send the request again."


class InvalidSessionId(ValidationFailed):
    code, number = "INVALID_SESSION_ID", "CWM-1001"
    summary = "Invalid session ID format"
    action = "Use 1 to 64 letters, digits, '-' or '_', beginning with a letter or digit."


class InvalidWindowName(ValidationFailed):
    code, number = "INVALID_WINDOW_NAME", "CWM-1002"
    summary = "Invalid window name format"
    action = "Use 1 to 128 letters, digits, '-' or '_', beginning with a letter or digit."


class InvalidParameter(ValidationFailed):
    code, number = "INVALID_PARAMETER", "CWM-1003"
    summary = "A parameter has a value that cannot be used."
    action = "Correct the parameter that is named and send the request again."


class SchemaInvalid(ValidationFailed):
    code, number = "SCHEMA_INVALID", "CWM-1004"
    summary = "The document does not have the expected shape."
    action = "Compare the document with the shape in docs, correct it and send it again."


class Unauthorized(HiveError):
    code, status = "UNAUTHORIZED", 401
    family, kind = Family.SECURITY, "authentication_error"
    summary = "Authentication required"
    action = (
        "Send 'Authorization: Bearer KEY' (or X-Api-Key; at the command line --api-key or "
        "HIVE_API_KEY) with a key made by 'hive key new'."
    )


class InvalidCredentials(Unauthorized):
    code, number = "INVALID_CREDENTIALS", "CWM-8002"
    summary = "The credentials are not valid."
    action = "Check the key; 'hive key list' shows which names exist, 'hive key new' makes one."


class Forbidden(HiveError):
    code, status = "FORBIDDEN", 403
    family, kind = Family.SECURITY, "permission_error"
    shows = frozenset({"required_scope"})
    summary = "Access denied"
    action = "Use a key that has the scope that is named; 'hive key list' shows each key's."


class AccessDenied(Forbidden):
    code, number = "ACCESS_DENIED", "CWM-8001"
    summary = "Access denied"
    action = "Use the key that owns the resource, or one with the admin scope."


class SessionIsolation(Forbidden):
    code, number = "SESSION_ISOLATION", "CWM-8003"
    summary = "A session may not reach another session's context."
    action = "Use only sessions and windows that this key made."


class NotFound(HiveError):
    code, status = "NOT_FOUND", 404
    family, kind = Family.NOT_FOUND, "not_found_error"
    shows = frozenset({"allowed"})
    summary = "Resource not found"
    action = "Check the path and the id; 'hive status' lists what there is."


class ModelNotFound(NotFound):
    code = "MODEL_NOT_FOUND"
    shows = frozenset({"available_models"})
    summary = "No such model is configured."
    action = "Use one of the models named here; GET /v1/models lists them."


class SessionNotFound(NotFound):
    code, number = "SESSION_NOT_FOUND", "CWM-2001"
    summary = "Session not found"
    action = "List the sessions with 'hive session list', or make one."


class WindowNotFound(NotFound):
    code, number = "WINDOW_NOT_FOUND", "CWM-2002"
    summary = "Window not found"
    action = "List the windows with window_list or 'hive window list'."


class Conflict(HiveError):
    code, status = "CONFLICT", 409
    family, kind = Family.STATE, "invalid_request_error"
    shows = frozenset({"state", "allowed"})
    summary = "The request conflicts with the current state."
    action = "Look at the current state and repeat the request when it allows it."


class BlockNotFound(Conflict):
    code, number = "BLOCK_NOT_FOUND", "CWM-2003"
    family = Family.NOT_FOUND
    summary = "Some context data is unavailable"
    action = "Thaw without require_full to recompute the rest, or freeze the session again."


class InvalidStateTransition(Conflict):
    code, number = "INVALID_STATE_TRANSITION", "CWM-3001"
    summary = "Cannot perform this operation in current state"
    action = "Check the state with window_status or 'hive window status'."


class SessionAlreadyFrozen(Conflict):
    code, number = "SESSION_ALREADY_FROZEN", "CWM-3002"
    summary = "Session is already frozen"
    action = "Thaw its window to go on with it."


class WindowAlreadyExists(Conflict):
    code, number = "WINDOW_ALREADY_EXISTS", "CWM-3003"
    summary = "Window name already exists"
    action = "Choose another name, or delete the existing window first."


class SessionNotActive(Conflict):
    code, number = "SESSION_NOT_ACTIVE", "CWM-3004"
    summary = "The session is not active."
    action = "Thaw the session's window, or make a new session."


class ModelIncompatible(Conflict):
    code = "MODEL_INCOMPATIBLE"
    shows = frozenset({"fields"})
    summary = "The model that runs now cannot use what the window holds."
    action = "Serve the model as it was when the window was frozen, or freeze it again."


class PayloadTooLarge(HiveError):
    code, status = "PAYLOAD_TOO_LARGE", 413
    family, kind = Family.VALIDATION, "request_too_large"
    shows = frozenset({"max_body_mib"})
    summary = "The request body is larger than this server accepts."
    action = "Send a smaller body, or raise server.max_body_mib."


class RateLimited(HiveError):
    code, number, status = "RATE_LIMITED", "CWM-7002", 429
    family, kind, retryable = Family.RESOURCE, "rate_limit_error", True
    shows = frozenset({"current_requests", "max_concurrent", "requests_per_minute"})
    summary = "Too many requests"
    action = "Wait for the time in Retry-After, then send the request again."


class RequestCancelled(HiveError):
    code, status = "REQUEST_CANCELLED", 499
    family, kind = Family.STATE, "api_error"
    summary = "The request was cancelled before its answer was complete."
    action = "Nothing needs to be done; send the request again if it is still wanted."


class HttpError(HiveError):
    """Any other HTTP status (R042): the status is the instance's own."""

    code, status = "HTTP_ERROR", 400
    family, kind = Family.VALIDATION, "invalid_request_error"
    shows = frozenset({"allowed"})
    summary = "The HTTP request cannot be served as it is."
    action = "Check the method and the path against the documentation."

    def __init__(self, message: str, *, status: int, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status  # type: ignore[misc]  # this one class has a status per instance


# ── Devices ─────────────────────────────────────────────────────────────────────────────────────


class DeviceError(HiveError):
    """Promise 1: a device error is never retried on another device (C6)."""

    status, family, kind = 500, Family.RESOURCE, "api_error"
    level, severity = "error", Severity.CRITICAL
    shows = frozenset({"device", "available_devices", "xid", "holders"})


class CudaDeviceFailed(DeviceError):
    code = "CUDA_DEVICE_FAILED"
    level, severity = "error", Severity.CRITICAL
    summary = "A CUDA device failed."
    action = (
        "Check GPU drivers, verify device availability, or explicitly select another device or "
        "the CPU backend in the model's 'device'."
    )


class CudaDeviceNotFound(DeviceError):
    code = "CUDA_DEVICE_NOT_FOUND"
    level, severity = "error", Severity.CRITICAL
    summary = "The configured CUDA device does not exist on this host."
    action = "Set the model's 'device' to one that 'hive devices --local' lists."


class CudaDriverMissing(DeviceError):
    code = "CUDA_DRIVER_MISSING"
    level, severity = "error", Severity.CRITICAL
    summary = "The NVIDIA driver is not installed or not loaded on this host."
    action = (
        "Install the NVIDIA driver and check it with nvidia-smi; or choose the CPU explicitly "
        'with device = "cpu".'
    )


class GpuVramExhausted(DeviceError):
    code = "GPU_VRAM_EXHAUSTED"
    level, severity = "error", Severity.CRITICAL
    shows = frozenset(
        {
            "device",
            "required_vram_gb",
            "available_vram_gb",
            "required_vram_mb",
            "available_vram_mb",
            "alternative_models",
        }
    )
    summary = "The GPU does not have enough free memory."
    action = (
        "Use a smaller model, set a lower gpu_memory_utilization or max_model_len explicitly, "
        "or explicitly choose another device."
    )


class GpuQuarantined(DeviceError):
    code, status, kind = "GPU_QUARANTINED", 503, "overloaded_error"
    level, severity = "error", Severity.CRITICAL
    summary = "The device of this model is quarantined after a fault."
    action = (
        "An operator finds the cause with 'hive devices', repairs the device, and then releases it "
        "with 'hive worker release WORKER'."
    )


# ── Workers and engines ─────────────────────────────────────────────────────────────────────────


class WorkerSpawnFailed(HiveError):
    code, status = "WORKER_SPAWN_FAILED", 500
    family, severity, level = Family.INTERNAL, Severity.HIGH, "error"
    shows = frozenset({"expected"})
    summary = "The engine's process could not be started."
    action = "Run 'hive check'; 'hive engine install cpu' makes the CPU engine's environment."


class ResourceLeakDetected(HiveError):
    code, status = "RESOURCE_LEAK_DETECTED", 500
    family, severity, level = Family.INTERNAL, Severity.CRITICAL, "error"
    shows = frozenset({"leaked_processes", "leaked_temp_files", "leaks"})
    summary = "Something that a worker took was not given back."
    action = "Manual cleanup required: the details name each holder."


class BadGateway(HiveError):
    code, status = "BAD_GATEWAY", 502
    family, retryable = Family.CONNECTION, True
    summary = "The engine's answer could not be used."
    action = "Send the request again; if it persists, see 'hive worker logs WORKER'."


class WorkerCrashed(HiveError):
    code, status = "WORKER_CRASHED", 502
    family, retryable = Family.CONNECTION, True
    severity, level = Severity.HIGH, "error"
    shows = frozenset({"cause", "exit_status", "signal"})
    summary = "The engine's process ended while it was needed."
    action = (
        "hive restarts the worker by itself; send the request again, and see "
        "'hive worker logs WORKER' for the cause."
    )


class WorkerHung(HiveError):
    code, status = "WORKER_HUNG", 502
    family, retryable = Family.CONNECTION, True
    severity, level = Severity.HIGH, "error"
    summary = "The engine made no progress and was ended."
    action = "hive restarts the worker by itself; send the request again."


class EngineUnreachable(BadGateway):
    code, number = "ENGINE_UNREACHABLE", "CWM-5001"
    summary = "Cannot connect to inference server"
    action = "See 'hive worker list'; 'hive worker restart WORKER' starts the engine anew."


class KvServerUnreachable(BadGateway):
    code, number = "KV_SERVER_UNREACHABLE", "CWM-5002"
    summary = "Cannot connect to the KV cache server"
    action = "See 'hive health --verbose'; hive restarts the KV server by itself."


class StoreUnreachable(BadGateway):
    code, number = "STORE_UNREACHABLE", "CWM-5003"
    summary = "Cannot connect to the catalogue's database"
    action = "Check that the database is running and reachable; hive reconnects by itself."


class StoreCredentialsRefused(StoreUnreachable):
    code = "STORE_CREDENTIALS_REFUSED"
    retryable = False
    severity = Severity.CRITICAL
    summary = "The catalogue's database refuses hive's user or password."
    action = "Correct windows.catalogue_url, or the user's password in the database."


class ServiceUnavailable(HiveError):
    """Retryable only when it carries a hint; `reason` is one of contract's (C12)."""

    code, status = "SERVICE_UNAVAILABLE", 503
    family, kind, retryable = Family.RESOURCE, "overloaded_error", True
    shows = frozenset({"current_requests", "max_concurrent", "state"})
    summary = "The service cannot take this request now."
    action = "Send the request again after the time in Retry-After."

    def __init__(self, message: str | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        # Without a hint waiting is no help: an operator must act first.
        self.retryable = self.retry_after_s is not None  # type: ignore[misc]


class CircuitBreakerOpen(HiveError):
    code, status = "CIRCUIT_BREAKER_OPEN", 503
    family, kind, retryable = Family.CONNECTION, "overloaded_error", True
    severity = Severity.HIGH
    shows = frozenset({"failure_count", "failure_threshold", "cooldown_seconds", "state"})
    summary = "The worker failed repeatedly and is not asked for a while."
    action = "Wait for cooldown, then send the request again."


class RetryBackoff(HiveError):
    code, status = "RETRY_BACKOFF", 503
    family, kind, retryable = Family.CONNECTION, "overloaded_error", True
    shows = frozenset(
        {"attempt", "max_attempts", "next_retry_seconds", "backoff_strategy", "schedule"}
    )
    summary = "The operation failed and the next attempt does not fit the deadline."
    action = "Send the request again after the time in Retry-After."


# ── Time ────────────────────────────────────────────────────────────────────────────────────────


class TimeoutFailure(HiveError):
    status, family, kind = 504, Family.TIMEOUT, "timeout_error"
    retryable, exit_code = True, 124


class GatewayTimeout(TimeoutFailure):
    code = "GATEWAY_TIMEOUT"
    summary = "The engine did not accept the connection in time."
    action = "Send the request again; see 'hive worker list' if it persists."


class InferenceTimeout(TimeoutFailure):
    code = "INFERENCE_TIMEOUT"
    summary = "The engine did not answer in time."
    action = "Increase timeout or use smaller model."


class RequestTimeout(TimeoutFailure):
    code = "REQUEST_TIMEOUT"
    summary = "The request as a whole took longer than its deadline."
    action = "Allow more time for the request, or ask for less."


class LoadingTimeout(TimeoutFailure):
    code = "LOADING_TIMEOUT"
    severity, level = Severity.HIGH, "error"
    summary = "The engine did not become ready within timeouts.load_s."
    action = "See 'hive worker logs WORKER' for where it stands; raise timeouts.load_s if it works."


class EngineTimeout(TimeoutFailure):
    code, number = "ENGINE_TIMEOUT", "CWM-6001"
    summary = "The inference server did not answer in time."
    action = "Try again once; 'hive worker restart WORKER' if it persists."


class OperationTimeout(TimeoutFailure):
    code, number = "OPERATION_TIMEOUT", "CWM-6002"
    summary = "The operation took longer than its limit."
    action = "Try again once; a shorter context takes less time."


class StorageTimeout(TimeoutFailure):
    code, number = "STORAGE_TIMEOUT", "CWM-6003"
    summary = "The storage did not answer in time."
    action = "Check the disk under server.state_dir, then try again."


# ── Storage and host resources ──────────────────────────────────────────────────────────────────


class StorageWriteFailed(HiveError):
    code, number, status = "STORAGE_WRITE_FAILED", "CWM-4001", 500
    family, retryable = Family.STORAGE, True
    summary = "Failed to save context data"
    action = "Check free space and rights under server.state_dir, then try again."


class StorageReadFailed(HiveError):
    code, number, status = "STORAGE_READ_FAILED", "CWM-4002", 500
    family, retryable = Family.STORAGE, True
    summary = "Failed to load context data"
    action = "Try again; 'hive window diagnose --check-integrity' finds damaged windows."


class StorageCorrupted(HiveError):
    code, number, status = "STORAGE_CORRUPTED", "CWM-4004", 500
    family = Family.STORAGE
    summary = "Context data failed its integrity check."
    action = "Delete and re-freeze the window; 'hive window repair NAME --attempt-recovery' recovers what it can."


class StorageQuotaExceeded(HiveError):
    code, number, status = "STORAGE_QUOTA_EXCEEDED", "CWM-4003", 507
    family = Family.STORAGE
    summary = "The quota for context windows is used up."
    action = "Delete old windows with 'hive window delete'."


class InsufficientRam(HiveError):
    code, status, family = "INSUFFICIENT_RAM", 507, Family.RESOURCE
    shows = frozenset({"required_ram_mb", "available_ram_mb"})
    summary = "The host does not have enough free memory."
    action = "Free host memory, or configure a smaller model or KV cache."


class InsufficientDisk(HiveError):
    code, status, family = "INSUFFICIENT_DISK", 507, Family.RESOURCE
    shows = frozenset({"required_disk_mb", "available_disk_mb"})
    summary = "The disk does not have enough free space."
    action = "Free the amount of space that is named, then start again."


class MemoryExhausted(HiveError):
    code, number, status = "MEMORY_EXHAUSTED", "CWM-7001", 507
    family = Family.RESOURCE
    summary = "Insufficient memory"
    action = "Free host memory, then try again."


class ConcurrencyLimit(HiveError):
    code, number, status = "CONCURRENCY_LIMIT", "CWM-7003", 503
    family, kind, retryable = Family.RESOURCE, "overloaded_error", True
    summary = "Too many operations of this kind are running."
    action = "Wait for the time in Retry-After, then try again."


# ── hive itself ─────────────────────────────────────────────────────────────────────────────────


class ConfigInvalid(HiveError):
    code, status = "CONFIG_INVALID", 422  # over HTTP only as the answer to a reload
    family, severity, level = Family.VALIDATION, Severity.HIGH, "error"
    shows = frozenset({"problems"})
    summary = "The configuration cannot be used."
    action = "Correct the keys that are named; 'hive check' tries the result without serving."


class ReloadRefused(ConfigInvalid):
    code, status = "RELOAD_REFUSED", 409
    family, severity, level = Family.STATE, Severity.HIGH, "error"
    shows = frozenset({"problems", "keys"})
    summary = "Settings were changed that need a restart; nothing was changed."
    action = (
        "Restart hive to put all of them in force, or take the keys that are named back and "
        "reload again: what else is different applies then."
    )


class AddressInUse(HiveError):
    code, exit_code = "ADDRESS_IN_USE", 70
    family, severity, level = Family.CONNECTION, Severity.HIGH, "error"
    summary = "The address to listen on is taken."
    action = "Stop the program that holds it, or set server.port to a free port."


class DaemonUnreachable(HiveError):
    code, exit_code = "DAEMON_UNREACHABLE", 255
    family = Family.CONNECTION
    summary = "The hive daemon cannot be reached."
    action = "Start it with 'hive serve', or name its address with --url or HIVE_URL."


class InternalError(HiveError):
    code, number, exit_code = "INTERNAL_ERROR", "CWM-9001", 70
    family = Family.INTERNAL
    summary = "hive met a condition that it did not expect."
    action = "Look the request id up in hive's log and report what it says."


def every_error() -> Iterator[type[HiveError]]:
    """Each class that has a code of its own, in the order of this file."""

    def below(cls: type[HiveError]) -> Iterator[type[HiveError]]:
        if "code" in vars(cls):
            yield cls
        for child in cls.__subclasses__():
            yield from below(child)

    yield from below(HiveError)


@cache
def by_code(code: str) -> type[HiveError] | None:
    """The class for a code (`WORKER_CRASHED`) or number (`CWM-2001`), in any case; else None."""
    wanted = code.strip().upper()
    return next((cls for cls in every_error() if wanted in (cls.code, cls.number)), None)
