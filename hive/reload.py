"""Settings that change while hive runs: read and judged whole, then all of them or none.

`Settings` stay frozen: a part that reads some has an `apply`, which takes the new ones at once and
cannot fail. What needs a restart is refused by name, and then nothing changes.
"""

import asyncio
import logging
from collections.abc import Callable

from hive.errors import (
    ConfigInvalid,
    Conflict,
    HiveError,
    InternalError,
    ReloadRefused,
    RequestCancelled,
)
from hive.events import Announcer, ReloadBegan, ReloadEnded
from hive.policy.reloading import Change, differences, is_one_of
from hive.settings import RELOADABLE, Settings
from hive.storage.threads import in_its_own_thread

log = logging.getLogger(__name__)

READ_S = 10.0  # for the configuration file, which may be far away

Apply = Callable[[Settings], None]


class Reloader:
    """Holds the settings that are in force. One reload at a time; others wait for it."""

    def __init__(
        self, settings: Settings, reread: Callable[[], Settings], announcer: Announcer
    ) -> None:
        """`reread` loads them again as at the start; blocking, raises ConfigInvalid."""
        self.settings = settings
        self._reread, self._announcer = reread, announcer
        self._parts: list[Apply] = []
        self._judges: list[Apply] = []
        self._turn = asyncio.Lock()
        self._reading: asyncio.Timeout | None = None
        self._is_closed = False

    def tells(self, *parts: Apply) -> None:
        """`parts` hear of new settings, in this order, in one go of the event loop."""
        self._parts += parts

    def asks(self, *judges: Apply) -> None:
        """`judges` raise ConfigInvalid for settings that cannot be in force here."""
        self._judges += judges

    def close(self) -> None:
        """hive is stopping: nothing changes any more, and nothing is waited for."""
        self._is_closed = True
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    async def reload(self, by: str) -> list[str]:
        """Read the settings again and put them in force; the names of what is different now.

        Raises ConfigInvalid, ReloadRefused that names what needs a restart, Conflict while hive
        stops; then nothing has changed. Raises InternalError, which says whether anything has.
        """
        async with self._turn:
            self._announcer.announce(ReloadBegan(by))
            changed: list[str] = []
            error: HiveError | None = None
            try:
                self._must_be_open()
                new = await self._read()
                self._must_be_open()
                changed = self._changed(new)
                self._apply(new)
            except HiveError as exc:
                error = exc
                raise
            except asyncio.CancelledError:
                error = RequestCancelled("Who asked for the reload left; nothing has changed.")
                raise
            except Exception as exc:  # the boundary: hive goes on with what it has (C19)
                log.exception("the reload failed")
                error = InternalError("The reload failed; hive's log says why.")
                raise error from exc
            finally:
                self._announcer.announce(_ended(by, changed, error))
        return changed

    def _must_be_open(self) -> None:
        if self._is_closed:
            raise Conflict(
                "hive is stopping and reloads nothing any more.",
                action="Start hive again: it reads its settings then.",
                state="stopping",
            )

    async def _read(self) -> Settings:
        try:
            async with asyncio.timeout(READ_S) as self._reading:
                return await in_its_own_thread(self._reread)
        except HiveError:
            raise
        except TimeoutError as exc:
            self._must_be_open()
            raise ConfigInvalid(
                f"The configuration file could not be read within {READ_S:g} s.",
                action="Look at the disk that it is on, then reload again.",
            ) from exc
        except Exception as exc:  # the boundary: hive goes on with what it has (C19)
            log.exception("the configuration could not be read")
            raise InternalError(
                "The configuration could not be read; hive's log says why."
            ) from exc
        finally:
            self._reading = None

    def _changed(self, new: Settings) -> list[str]:
        """The names of what is different. Raises ReloadRefused, ConfigInvalid."""
        found = differences(self.settings, new)
        fixed = [change for change in found if not is_one_of(change.path, RELOADABLE)]
        if fixed:
            raise _refused(fixed)
        for judge in self._judges:
            judge(new)
        return [change.key for change in found]

    def _apply(self, new: Settings) -> None:
        old = self.settings
        told: list[Apply] = []
        try:
            for part in self._parts:
                told.append(part)
                part(new)
        except Exception as exc:  # what nobody foresaw: nothing half applied (C19)
            log.exception("new settings could not be applied; the old ones stay")
            raise _not_applied(_took_back(told, old)) from exc
        self.settings = new

    def __repr__(self) -> str:
        return f"<Reloader {len(self._parts)} parts>"


def _took_back(told: list[Apply], old: Settings) -> bool:
    """Whether every part that was told has the old settings again; each gets its chance."""
    is_whole = True
    for part in told:
        try:
            part(old)
        except Exception:
            is_whole = False
            log.exception("%r could not go back to the old settings", part)
    return is_whole


def _not_applied(is_whole: bool) -> InternalError:
    if is_whole:
        return InternalError("The new settings could not be applied; the old ones stay.")
    return InternalError(
        "The new settings could not be applied, and a part of hive did not take the old ones again.",
        action="Restart hive: settings are half applied. Its log names the part and says why.",
    )


def _refused(fixed: list[Change]) -> ReloadRefused:
    keys = [change.key for change in fixed]
    return ReloadRefused(
        f"These settings need a restart, so nothing was changed: {', '.join(keys)}.",
        problems=[f"{key}: it cannot change while hive runs; restart hive" for key in keys],
        keys=keys,
    )


def _ended(by: str, changed: list[str], error: HiveError | None) -> ReloadEnded:
    if error is None:
        return ReloadEnded(by, tuple(changed))
    problems = tuple(error.details.get("problems") or [error.message])
    refused = tuple(error.details.get("keys") or ())
    return ReloadEnded(by, (), error.code, refused, problems)
