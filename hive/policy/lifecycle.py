"""The states of a worker and the news that move it, as one table.

STARTING has no process yet (it may be waiting out a restart's pause), LOADING has one that does
not answer yet, READY answered its probe, DRAINING takes nothing new, STOPPING is ending its
process tree. FAILED, QUARANTINED and LOST wait for an operator: QUARANTINED means that its device
may not be used, LOST that a process survived SIGKILL.
"""

from enum import StrEnum


class State(StrEnum):
    STOPPED = "STOPPED"
    STARTING = "STARTING"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPING = "STOPPING"
    FAILED = "FAILED"
    QUARANTINED = "QUARANTINED"
    LOST = "LOST"


class News(StrEnum):
    START_ASKED = "start_asked"
    STOP_ASKED = "stop_asked"
    HASTE_ASKED = "haste_asked"  # stop without draining
    SPAWNED = "spawned"
    SPAWN_FAILED = "spawn_failed"
    ANSWERED = "answered"  # the probe succeeded
    LOAD_EXPIRED = "load_expired"
    DEVICE_FAILED = "device_failed"  # one of its devices may not be used any more
    HUNG = "hung"  # the engine is there and makes no progress
    EXITED = "exited"  # the engine's first process ended
    DRAINED = "drained"  # nothing in flight, or drain_s is over
    GONE = "gone"  # the tree is gone and nothing is to follow
    RESTART_DUE = "restart_due"  # the tree is gone and a start follows
    GAVE_UP = "gave_up"  # the tree is gone and the restart policy allows no more
    QUARANTINE = "quarantine"  # the tree is gone and its device waits for an operator
    RELEASED = "released"  # an operator trusts the device again
    SURVIVED = "survived"  # a member outlived SIGKILL


NEXT: dict[State, dict[News, State]] = {
    State.STOPPED: {News.START_ASKED: State.STARTING},
    State.STARTING: {
        News.SPAWNED: State.LOADING,
        News.SPAWN_FAILED: State.STOPPING,
        News.DEVICE_FAILED: State.STOPPING,
        News.STOP_ASKED: State.STOPPING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.LOADING: {
        News.ANSWERED: State.READY,
        News.EXITED: State.STOPPING,
        News.LOAD_EXPIRED: State.STOPPING,
        News.DEVICE_FAILED: State.STOPPING,
        News.STOP_ASKED: State.STOPPING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.READY: {
        News.EXITED: State.STOPPING,
        News.HUNG: State.STOPPING,
        News.DEVICE_FAILED: State.STOPPING,
        News.STOP_ASKED: State.DRAINING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.DRAINING: {
        News.DRAINED: State.STOPPING,
        News.EXITED: State.STOPPING,
        News.HUNG: State.STOPPING,
        News.DEVICE_FAILED: State.STOPPING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.STOPPING: {
        News.GONE: State.STOPPED,
        News.RESTART_DUE: State.STARTING,
        News.GAVE_UP: State.FAILED,
        News.QUARANTINE: State.QUARANTINED,
        News.SURVIVED: State.LOST,
    },
    State.FAILED: {News.START_ASKED: State.STARTING, News.STOP_ASKED: State.STOPPED},
    State.QUARANTINED: {News.RELEASED: State.STARTING, News.STOP_ASKED: State.STOPPED},
    State.LOST: {News.GONE: State.STOPPED},
}

# A client may be told to come back: these states lead to READY without an operator.
ON_THE_WAY = frozenset({State.STARTING, State.LOADING})
# Nothing of the worker runs and nothing will by itself.
AT_REST = frozenset({State.STOPPED, State.FAILED, State.QUARANTINED, State.LOST})
# States in which a process tree may exist.
ALIVE = frozenset({State.LOADING, State.READY, State.DRAINING, State.STOPPING, State.LOST})


def step(state: State, news: News) -> State:
    """The state after `news`; the same state where the table has no entry for it."""
    return NEXT[state].get(news, state)
