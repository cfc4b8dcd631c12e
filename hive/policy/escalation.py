"""What a person is told, how urgently, and when it is over (C30, C34, C35).

Pure: every call takes the monotonic time. Whoever listens says what happened; `Escalations` answers
with what is to be told: each (rule, subject) once, and once more when it is over. What happens again
meanwhile is counted. Nothing here grows with what clients send: subjects are names of the
configuration, and a window of time is a few numbers.

S2's four levels are Severity's (C35): info is INFO, warning is MEDIUM and HIGH, critical is CRITICAL,
emergency is EMERGENCY.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cache
from typing import Any, NamedTuple

from hive.errors import Family, Severity, by_code
from hive.policy.breaker import BreakerState
from hive.policy.lifecycle import State

WINDOW_S = 300.0  # 5 minutes (R189)
FAILURES = 5  # more than these in WINDOW_S (R189)
LEAST_CALLS = 20  # a rate of fewer says nothing (C34)
ERROR_RATE = 0.5  # more than this (R190)
TIMEOUT_RATE = 0.1  # more than this (R256)
IN_SUCCESSION = 5  # timeouts without an answer between them (R255)
REFUSED_CLIENTS = 20  # more than these in WINDOW_S: a key is being guessed, or was revoked
DOWN_S = 300.0  # longer than this without the catalogue (R255)
CALM = 0.5  # a rate is over at this share of what raised it: it does not flap at its limit
STEP_S = 10.0  # calls are counted in steps of this
_STEPS = int(WINDOW_S / STEP_S)

# From the least to the worst.
LEVELS = tuple(Severity)


class Rule(StrEnum):
    """Why somebody is told."""

    REPEATED_FAILURES = "repeated_failures"
    ERROR_RATE = "error_rate"
    TIMEOUT = "timeout"
    TIMEOUT_RATE = "timeout_rate"
    TIMEOUTS_IN_SUCCESSION = "timeouts_in_succession"
    RETRIES_EXHAUSTED = "retries_exhausted"
    OPERATION_FAILED = "operation_failed"
    DATA_DAMAGED = "data_damaged"
    INTERNAL_ERROR = "internal_error"
    ROLLBACK_FAILED = "rollback_failed"
    BREAKER_OPEN = "breaker_open"
    WORKER_FAILED = "worker_failed"
    WORKER_LOST = "worker_lost"
    DEVICE_FAILED = "device_failed"
    LEAK_FOUND = "leak_found"
    SERVICE_DEGRADED = "service_degraded"
    CATALOGUE_DOWN = "catalogue_down"
    CREDENTIALS_REFUSED = "credentials_refused"
    CLIENTS_REFUSED = "clients_refused"
    AUDIT_FAILED = "audit_failed"
    AUDIT_DAMAGED = "audit_damaged"


@dataclass(frozen=True, slots=True)
class About:
    """A rule's level, what it says of its subject, and what is to be done.

    Without an action of its own it is that of the error's code.
    """

    level: Severity
    says: str
    action: str = ""


RULES: Mapping[Rule, About] = {
    Rule.REPEATED_FAILURES: About(
        Severity.HIGH, f"{{subject}} failed more than {FAILURES} times in 5 minutes."
    ),
    Rule.ERROR_RATE: About(
        Severity.HIGH, f"More than {ERROR_RATE:.0%} of the calls of {{subject}} failed."
    ),
    Rule.TIMEOUT: About(Severity.MEDIUM, "{subject} took longer than its limit."),
    Rule.TIMEOUT_RATE: About(
        Severity.HIGH,
        f"More than {TIMEOUT_RATE:.0%} of the calls of {{subject}} took longer than their limit.",
    ),
    Rule.TIMEOUTS_IN_SUCCESSION: About(
        Severity.CRITICAL,
        f"{IN_SUCCESSION} calls of {{subject}} in succession took longer than their limit.",
    ),
    Rule.RETRIES_EXHAUSTED: About(
        Severity.HIGH,
        "Every retry of {subject} failed, and no other worker took it.",
        "See 'hive worker list' and 'hive worker logs WORKER' for why the engine does not answer; "
        "'hive worker restart WORKER' starts it anew.",
    ),
    Rule.OPERATION_FAILED: About(
        Severity.CRITICAL, "{subject} failed, which changes or removes what clients keep."
    ),
    Rule.DATA_DAMAGED: About(Severity.HIGH, "{subject} found data that is damaged."),
    Rule.INTERNAL_ERROR: About(Severity.HIGH, "{subject} met what hive did not expect."),
    Rule.ROLLBACK_FAILED: About(
        Severity.EMERGENCY,
        "{subject} failed: a window is half made or half deleted, and cannot be removed; hive tries "
        "it again until it is gone.",
        "Check the disk under server.state_dir (space, rights, errors in the kernel's log); hive "
        "goes on by itself as soon as files can be removed there.",
    ),
    Rule.BREAKER_OPEN: About(
        Severity.HIGH,
        "The breaker of {subject} is open: the worker failed again and again, and is not asked.",
        "See 'hive worker logs WORKER'; 'hive worker restart WORKER' starts the engine anew.",
    ),
    Rule.WORKER_FAILED: About(
        Severity.CRITICAL,
        "{subject} is FAILED: hive does not start it again by itself.",
        "'hive worker show WORKER' and 'hive worker logs WORKER' tell why; after the repair "
        "'hive worker start WORKER'.",
    ),
    Rule.WORKER_LOST: About(
        Severity.CRITICAL,
        "{subject} is LOST: a process of its engine survived SIGKILL.",
        "The kernel's log tells in which driver the process hangs; the host may need a restart.",
    ),
    Rule.DEVICE_FAILED: About(
        Severity.CRITICAL,
        "{subject} failed: nothing is started there until an operator releases it.",
        "'hive devices' tells why; repair the device, then release it with 'hive worker release "
        "WORKER'.",
    ),
    Rule.LEAK_FOUND: About(
        Severity.CRITICAL,
        "{subject} was not given back after the worker's end.",
        "'hive leaks' names each holder and how to clear it.",
    ),
    Rule.SERVICE_DEGRADED: About(
        Severity.CRITICAL,
        "A model has no worker left that can serve it, or more than half of the workers fail.",
        "'hive status' and 'hive alerts' show which parts fail; begin with devices, then workers.",
    ),
    Rule.CATALOGUE_DOWN: About(
        Severity.CRITICAL, "The catalogue of sessions and windows is away for more than 5 minutes."
    ),
    Rule.CREDENTIALS_REFUSED: About(
        Severity.CRITICAL,
        "hive's own credentials were refused by {subject}.",
        "Correct them in hive.toml: alerts.webhook_token or webhook_token_file for the webhook, "
        "windows.catalogue_url for the catalogue.",
    ),
    Rule.CLIENTS_REFUSED: About(
        Severity.MEDIUM,
        f"More than {REFUSED_CLIENTS} requests in 5 minutes came with a key that is not valid or "
        "does not have the scope.",
        "hive's log has each of them (codes UNAUTHORIZED and FORBIDDEN): a client has an old key, "
        "or somebody guesses.",
    ),
    Rule.AUDIT_FAILED: About(
        Severity.CRITICAL,
        "The audit log cannot be written: what is done meanwhile is held in memory, and is lost if it "
        "is too much or hive ends.",
        "Check the disk under server.state_dir (space, rights, errors in the kernel's log); hive "
        "goes on by itself as soon as it can write there.",
    ),
    Rule.AUDIT_DAMAGED: About(
        Severity.CRITICAL,
        "The audit log is not as hive left it: somebody or the disk has changed it.",
        "'hive audit verify' names the record; copy STATE/audit before anything else is done, and "
        "find out who could write there. It stays open until hive's next start.",
    ),
}

# ── What an error asks for ──────────────────────────────────────────────────────────────────────


class Alerting(StrEnum):
    """When an error of a family is a person's business (R114)."""

    NONE = "none"
    RATE = "by rate"
    REPEATED = "on repeated failures"
    ALWAYS = "always"


FAMILIES: Mapping[Family, Alerting] = {
    Family.VALIDATION: Alerting.NONE,
    Family.NOT_FOUND: Alerting.NONE,
    Family.STATE: Alerting.NONE,
    Family.STORAGE: Alerting.REPEATED,
    Family.CONNECTION: Alerting.REPEATED,
    Family.TIMEOUT: Alerting.REPEATED,
    Family.RESOURCE: Alerting.REPEATED,
    Family.SECURITY: Alerting.RATE,
    Family.INTERNAL: Alerting.ALWAYS,
}
# Codes that say nothing new, or that a client alone can bring about.
CODES: Mapping[str, Alerting] = {
    "RATE_LIMITED": Alerting.NONE,  # the client's quota
    "SERVICE_UNAVAILABLE": Alerting.NONE,  # it is full; a worker that failed is told as such
    "CONCURRENCY_LIMIT": Alerting.NONE,
    "STORAGE_QUOTA_EXCEEDED": Alerting.NONE,
    "REQUEST_TIMEOUT": Alerting.NONE,  # the client's own limit, or it sent too slowly
    "CIRCUIT_BREAKER_OPEN": Alerting.NONE,  # told when it opened
    "GPU_QUARANTINED": Alerting.NONE,  # told when it failed
    "RETRY_BACKOFF": Alerting.REPEATED,
}
# Half done they lose something (R186); half frozen or thawed nothing is.
DESTRUCTIVE = frozenset({"delete", "restore"})
DAMAGED = "STORAGE_CORRUPTED"  # (R188)
AWAY = "STORE_UNREACHABLE"
REFUSED = frozenset({"STORE_CREDENTIALS_REFUSED"})  # hive's own, not a client's

VALIDATION_ACTION = (
    "Compare each parameter with docs/http.md: its name, its type, its range, and that what it "
    "names exists."
)
DEFAULT_ACTION = (
    "Look at hive's log around this time; 'hive explain CODE' tells of the codes in it."
)


@cache
def alerting(code: str) -> Alerting:
    """What an error's code asks for; one that hive does not know is unforeseen."""
    error = by_code(code)
    if error is None:
        return Alerting.ALWAYS
    return CODES.get(error.code) or FAMILIES[error.family]


def recommended_action(rule: Rule, code: str) -> str:
    """The rule's own, else the code's, else that of its family, else a general one (R195)."""
    if own := RULES[rule].action:
        return own
    error = by_code(code) if code else None
    if error is None:
        return DEFAULT_ACTION
    return VALIDATION_ACTION if error.family is Family.VALIDATION else error.action


class Outcome(IntEnum):
    """How a call ended, for whoever counts. NEUTRAL says nothing of the operation."""

    WELL = 0
    NEUTRAL = 1
    FAILED = 2
    TIMED_OUT = 3


@cache
def outcome(code: str, status: int = 0) -> Outcome:
    """Of a call that ended with this code (empty: none), and this HTTP status (0: it has none).

    What an engine answers itself has no code: its 429 and 503 are back-pressure.
    """
    if code:
        if alerting(code) in (Alerting.NONE, Alerting.RATE):
            return Outcome.NEUTRAL
        error = by_code(code)
        is_late = error is not None and error.family is Family.TIMEOUT
        return Outcome.TIMED_OUT if is_late else Outcome.FAILED
    if status in (429, 503) or 400 <= status < 500:  # noqa: PLR2004
        return Outcome.NEUTRAL
    return Outcome.FAILED if status >= 500 else Outcome.WELL  # noqa: PLR2004


# ── What is told ────────────────────────────────────────────────────────────────────────────────


class Subject(NamedTuple):
    """What an escalation is about; names of the configuration only, empty where they do not apply."""

    operation: str
    model: str = ""
    worker: str = ""
    device: str = ""
    kind: str = ""  # of a leak

    def __str__(self) -> str:
        """As a sentence begins: Inference of llama; Worker llama-0; Device cuda:0."""
        if self.kind:
            return f"A {self.kind.replace('_', ' ')} of worker {self.worker}"
        if self.device:
            return f"Device {self.device}"
        if self.operation == "worker":
            return f"Worker {self.worker}"
        words = self.operation.replace("_", " ")
        about = self.model or self.worker
        return f"{words[:1].upper()}{words[1:]}{f' of {about}' if about else ''}"


@dataclass(frozen=True, slots=True)
class Raised:
    """Somebody is to be told."""

    rule: Rule
    subject: Subject
    code: str
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> Severity:
        return RULES[self.rule].level

    @property
    def said(self) -> str:
        return RULES[self.rule].says.format(subject=self.subject)

    @property
    def action(self) -> str:
        return recommended_action(self.rule, self.code)


@dataclass(frozen=True, slots=True)
class Over:
    """What was told is over, after `seconds`, and happened `repeats` times more meanwhile."""

    raised: Raised
    seconds: float
    repeats: int


Change = Raised | Over
NOTHING: tuple[Change, ...] = ()


@dataclass(slots=True)
class Open:
    """An escalation that is not over yet; times are monotonic seconds."""

    raised: Raised
    since: float
    last: float
    repeats: int = 0


# ── Windows of time ─────────────────────────────────────────────────────────────────────────────


class Calls:
    """An operation's calls of the last WINDOW_S, counted in steps of STEP_S."""

    def __init__(self) -> None:
        self.count = self.failed = self.late = 0
        self.in_a_row = 0  # calls that timed out, up to the last one
        self._steps: deque[list[int]] = deque()  # number, calls, failures, timeouts
        self._last: deque[float] = deque(maxlen=FAILURES + 1)  # failures

    def note(self, now: float, how: Outcome) -> None:
        """WELL, FAILED or TIMED_OUT; a call that timed out has failed, too."""
        number = int(now // STEP_S)
        if not self._steps or self._steps[-1][0] < number:
            self.forget(now)
            self._steps.append([number, 0, 0, 0])
        step = self._steps[-1]
        self.count += 1
        step[1] += 1
        if how is Outcome.WELL:
            self.in_a_row = 0
            return
        self._last.append(now)
        self.failed += 1
        step[2] += 1
        if how is Outcome.TIMED_OUT:
            self.late += 1
            step[3] += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0

    def forget(self, now: float) -> None:
        """What is older than the window."""
        least = int(now // STEP_S) - _STEPS
        while self._steps and self._steps[0][0] <= least:
            _, count, failed, late = self._steps.popleft()
            self.count -= count
            self.failed -= failed
            self.late -= late

    def failed_often(self, now: float) -> bool:
        """More than FAILURES in the last WINDOW_S, to the instant."""
        return len(self._last) > FAILURES and now - self._last[0] < WINDOW_S

    def rate(self, of: int) -> float:
        """Of the calls in the window; 0.0 with no calls (R185)."""
        return of / self.count if self.count else 0.0

    def exceeds(self, of: int, limit: float) -> bool:
        return self.count >= LEAST_CALLS and of > limit * self.count


# ── The whole ───────────────────────────────────────────────────────────────────────────────────

# These end when nothing like it happened for WINDOW_S: they are facts, not states.
_QUIETS = frozenset(
    {
        Rule.REPEATED_FAILURES,
        Rule.TIMEOUT,
        Rule.TIMEOUTS_IN_SUCCESSION,
        Rule.RETRIES_EXHAUSTED,
        Rule.OPERATION_FAILED,
        Rule.DATA_DAMAGED,
        Rule.INTERNAL_ERROR,
        Rule.CATALOGUE_DOWN,  # or when it answers; not every request that it answered is told
    }
)
CLIENTS = Subject("authentication")


class Escalations:
    """Decides what is told. `operations` are all whose calls are counted."""

    def __init__(self, operations: Iterable[Subject]) -> None:
        self._calls = {subject: Calls() for subject in operations}
        self._refused: deque[float] = deque(maxlen=REFUSED_CLIENTS + 1)
        self._away_since: float | None = None
        self._away_last = 0.0
        self._open: dict[tuple[Rule, Subject], Open] = {}

    @property
    def open(self) -> Collection[Open]:
        """What is not over, in the order in which it was told."""
        return self._open.values()

    def is_open(self, rule: Rule, subject: Subject) -> bool:
        return (rule, subject) in self._open

    def raised(
        self, rule: Rule, subject: Subject, now: float, code: str, **context: object
    ) -> tuple[Change, ...]:
        """It is so: told unless it was told before and is not over yet."""
        if known := self._open.get((rule, subject)):
            known.repeats += 1
            known.last = now
            return NOTHING
        told = Raised(rule, subject, code, context)
        self._open[rule, subject] = Open(told, now, now)
        return (told,)

    def over(self, rule: Rule, subject: Subject, now: float) -> tuple[Change, ...]:
        """Its cause is over."""
        known = self._open.pop((rule, subject), None)
        return (Over(known.raised, now - known.since, known.repeats),) if known else NOTHING

    def ended(
        self, operation: Subject, now: float, how: Outcome, code: str = ""
    ) -> tuple[Change, ...]:
        """A call of one of the operations came to its end."""
        if how is Outcome.NEUTRAL:
            return NOTHING
        calls = self._calls[operation]
        calls.note(now, how)
        if how is Outcome.WELL:
            return NOTHING  # `look` finds what is over
        found: list[Change] = []
        if calls.failed_often(now):
            found += self.raised(Rule.REPEATED_FAILURES, operation, now, code)
        if calls.exceeds(calls.failed, ERROR_RATE):
            facts = {"calls": calls.count, "failures": calls.failed}
            found += self.raised(Rule.ERROR_RATE, operation, now, code, **facts)
        if how is Outcome.TIMED_OUT:
            found += self._was_late(operation, calls, now, code)
        if code and alerting(code) is Alerting.ALWAYS:
            found += self.raised(Rule.INTERNAL_ERROR, operation, now, code)
        if code == DAMAGED:
            found += self.raised(Rule.DATA_DAMAGED, operation, now, code)
        if operation.operation in DESTRUCTIVE:
            found += self.raised(Rule.OPERATION_FAILED, operation, now, code)
        return tuple(found)

    def _was_late(self, operation: Subject, calls: Calls, now: float, code: str) -> list[Change]:
        found = list(self.raised(Rule.TIMEOUT, operation, now, code))
        if calls.exceeds(calls.late, TIMEOUT_RATE):
            facts = {"calls": calls.count, "timeouts": calls.late}
            found += self.raised(Rule.TIMEOUT_RATE, operation, now, code, **facts)
        if calls.in_a_row >= IN_SUCCESSION:
            found += self.raised(Rule.TIMEOUTS_IN_SUCCESSION, operation, now, code)
        return found

    def refused_client(self, now: float, code: str) -> tuple[Change, ...]:
        """A request came without a valid key, or without the scope: alone it is nobody's business."""
        self._refused.append(now)
        if len(self._refused) <= REFUSED_CLIENTS or now - self._refused[0] >= WINDOW_S:
            return NOTHING
        return self.raised(Rule.CLIENTS_REFUSED, CLIENTS, now, code)

    def catalogue(self, subject: Subject, now: float, *, is_away: bool) -> tuple[Change, ...]:
        """Whether it answered just now."""
        if not is_away:
            self._away_since = None
            return self.over(Rule.CATALOGUE_DOWN, subject, now)
        if self._away_since is None or now - self._away_last > WINDOW_S:
            self._away_since = now  # what was that long ago tells nothing of the time between
        self._away_last = now
        if now - self._away_since <= DOWN_S:
            return NOTHING
        return self.raised(Rule.CATALOGUE_DOWN, subject, now, AWAY)

    def look(self, now: float) -> tuple[Change, ...]:
        """What is over by now, without anything's happening."""
        for calls in self._calls.values():
            calls.forget(now)
        done = [key for key, known in self._open.items() if self._is_over(known, now)]
        return tuple(change for key in done for change in self.over(*key, now))

    def _is_over(self, known: Open, now: float) -> bool:
        rule, subject = known.raised.rule, known.raised.subject
        if rule is Rule.CLIENTS_REFUSED:
            recent = sum(now - at < WINDOW_S for at in self._refused)
            return recent <= CALM * REFUSED_CLIENTS
        calls = self._calls.get(subject)
        if calls is not None and rule is Rule.ERROR_RATE:
            return calls.rate(calls.failed) <= CALM * ERROR_RATE
        if calls is not None and rule is Rule.TIMEOUT_RATE:
            return calls.rate(calls.late) <= CALM * TIMEOUT_RATE
        if calls is not None and rule is Rule.TIMEOUTS_IN_SUCCESSION and not calls.in_a_row:
            return True
        return rule in _QUIETS and now - known.last >= WINDOW_S

    def __repr__(self) -> str:
        return f"<Escalations {[f'{rule} {subject}' for rule, subject in self._open]}>"


# ── How well all of it is ───────────────────────────────────────────────────────────────────────


class ServiceLevel(IntEnum):
    """How much of what is configured can be had (R263); the metric's value, too."""

    FULL = 0
    DEGRADED = 1  # something fails, and every model is served
    CRITICAL = 2  # a model is not served, or more than half of the workers are not there
    DOWN = 3  # nothing is served

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(slots=True)
class Part:
    """A worker, as the service level sees it."""

    model: str
    state: State = State.STOPPED
    breaker: BreakerState = BreakerState.CLOSED

    @property
    def serves(self) -> bool:
        return self.state is State.READY and self.breaker is not BreakerState.OPEN

    @property
    def is_broken(self) -> bool:
        """It will not serve before its cooldown is over, or somebody has acted."""
        is_given_up = self.state in (State.FAILED, State.QUARANTINED, State.LOST)
        return is_given_up or self.breaker is BreakerState.OPEN


def service_level(workers: Collection[Part], *, is_all_else_well: bool = True) -> ServiceLevel:
    """Of the models' workers; `is_all_else_well` is about devices and the LMCache server."""
    return _level(
        [(part.model, part.serves) for part in workers],
        is_well=is_all_else_well
        and all(p.serves and p.breaker is BreakerState.CLOSED for p in workers),
    )


def broken_level(workers: Collection[Part]) -> ServiceLevel:
    """As `service_level`, but a worker counts as served that is only on its way, or was stopped."""
    return _level([(part.model, not part.is_broken) for part in workers], is_well=True)


def _level(parts: list[tuple[str, bool]], *, is_well: bool) -> ServiceLevel:
    serving = sum(serves for _, serves in parts)
    if not serving:
        return ServiceLevel.DOWN
    models = {model for model, _ in parts}
    if models - {model for model, serves in parts if serves} or 2 * serving < len(parts):
        return ServiceLevel.CRITICAL
    return ServiceLevel.FULL if is_well and serving == len(parts) else ServiceLevel.DEGRADED
