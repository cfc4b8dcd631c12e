"""The states of a worker and the news that move it, as one table.

STARTING has no process yet (it may be waiting out a restart's pause), LOADING has one that does
not answer yet, READY answered its probe, DRAINING takes nothing new, STOPPING is ending its
process tree. FAILED and LOST wait for an operator; LOST means that a process survived SIGKILL.
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
    LOST = "LOST"


class News(StrEnum):
    START_ASKED = "start_asked"
    STOP_ASKED = "stop_asked"
    HASTE_ASKED = "haste_asked"  # stop without draining
    SPAWNED = "spawned"
    SPAWN_FAILED = "spawn_failed"
    ANSWERED = "answered"  # the probe succeeded
    LOAD_EXPIRED = "load_expired"
    EXITED = "exited"  # the engine's first process ended
    DRAINED = "drained"  # nothing in flight, or drain_s is over
    GONE = "gone"  # the tree is gone and nothing is to follow
    RESTART_DUE = "restart_due"  # the tree is gone and a start follows
    GAVE_UP = "gave_up"  # the tree is gone and the restart policy allows no more
    SURVIVED = "survived"  # a member outlived SIGKILL


NEXT: dict[State, dict[News, State]] = {
    State.STOPPED: {News.START_ASKED: State.STARTING},
    State.STARTING: {
        News.SPAWNED: State.LOADING,
        News.SPAWN_FAILED: State.STOPPING,
        News.STOP_ASKED: State.STOPPING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.LOADING: {
        News.ANSWERED: State.READY,
        News.EXITED: State.STOPPING,
        News.LOAD_EXPIRED: State.STOPPING,
        News.STOP_ASKED: State.STOPPING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.READY: {
        News.EXITED: State.STOPPING,
        News.STOP_ASKED: State.DRAINING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.DRAINING: {
        News.DRAINED: State.STOPPING,
        News.EXITED: State.STOPPING,
        News.HASTE_ASKED: State.STOPPING,
    },
    State.STOPPING: {
        News.GONE: State.STOPPED,
        News.RESTART_DUE: State.STARTING,
        News.GAVE_UP: State.FAILED,
        News.SURVIVED: State.LOST,
    },
    State.FAILED: {News.START_ASKED: State.STARTING, News.STOP_ASKED: State.STOPPED},
    State.LOST: {News.GONE: State.STOPPED},
}

# A client may be told to come back: these states lead to READY without an operator.
ON_THE_WAY = frozenset({State.STARTING, State.LOADING})
# States in which a process tree may exist.
ALIVE = frozenset({State.LOADING, State.READY, State.DRAINING, State.STOPPING, State.LOST})


def step(state: State, news: News) -> State:
    """The state after `news`; the same state where the table has no entry for it."""
    return NEXT[state].get(news, state)
