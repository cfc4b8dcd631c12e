"""Who a tool is called for, and the calls that it makes to the daemon in that name."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from hive.client.control import ControlPlane, Result
from hive.client.http import asked, events, is_told, opened, told_error, was_not_sent, watched
from hive.client.repeating import Ask
from hive.errors import DaemonUnreachable, HiveError, OperationTimeout, WindowNotFound
from hive.policy.control import MOST_POLLS, POLL_S, Failure, classify

log = logging.getLogger(__name__)

FAILED = "failed"  # the source of a part that is not there
PART_S = 5.0  # of each part of an answer that is put together of several (R262)

Report = Callable[[str, int, int], Awaitable[None]]  # phase, done, of how many


@dataclass(frozen=True, slots=True)
class Caller:
    """One call of a tool. `api_key` is the caller's own, None where it has sent none."""

    plane: ControlPlane
    url: str | None
    api_key: str | None = field(repr=False)
    report: Report

    def request(self, method: str, path: str, **more: Any) -> Ask:
        """A request as the control plane makes it, once or more often."""

        async def ask(limit_s: float) -> Any:
            return await asked(method, path, **self._daemon(limit_s), **more)

        return ask

    async def ask(self, tool: str, method: str, path: str, **more: Any) -> Result:
        """One request. Raises HiveError."""
        return await self.plane.run(
            tool, self.request(method, path, **more), self.key(method, path)
        )

    async def watch(self, tool: str, method: str, path: str, **more: Any) -> Result:
        """One request, of whose progress the caller hears, all of it before this returns.

        Raises HiveError.
        """
        heard: asyncio.Queue[tuple[str, int, int] | None] = asyncio.Queue()

        def told(phase: str, done: int, total: int) -> None:
            heard.put_nowait((phase, done, total))

        async def ask(limit_s: float) -> Any:
            return await watched(method, path, told, **self._daemon(limit_s), **more)

        async def hand_on() -> None:
            while (one := await heard.get()) is not None:
                await self.report(*one)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hand_on(), name="progress")
            try:
                return await self.plane.run(tool, ask, self.key(method, path))
            except HiveError as exc:
                error = exc  # a group would wrap it
            finally:
                heard.put_nowait(None)  # the last step came with the result, and is told before it
        raise error

    async def stream(self, tool: str, path: str, body: Any, headers: dict[str, str]) -> list[Any]:
        """The events of a stream, to its end. Raises HiveError, also for an error in the stream."""

        async def ask(limit_s: float) -> Any:
            got: list[Any] = []
            is_whole = False
            daemon = self._daemon(limit_s)
            async with opened("POST", path, json=body, headers=headers, **daemon) as answer:
                async for kind, data in events(answer.content):  # to its end: leaving is a cancel
                    if kind == "error":
                        raise told_error(data, answer.status)
                    if data == b"[DONE]":
                        is_whole = True
                    else:
                        got.append(json.loads(data))
                        await self.report("generate", len(got), 0)
            if not is_whole:
                raise DaemonUnreachable("The daemon's answer ended in the middle.")
            return got

        found = await self.plane.run(tool, ask, self.key("POST", path))
        events_of: list[Any] = found.data
        return events_of

    async def parts(self, tool: str, asks: dict[str, Ask], about: str = "") -> Result:
        """Each part of an answer that several requests make; what fails is skipped, and told.

        In its place is `{"source": "failed"}` (R213, R219). Raises the first part's error where none
        could be had (C20, R067, R172, R262).
        """

        async def gather(_limit_s: float) -> Any:
            async def part(ask: Ask) -> tuple[str, Any]:
                try:
                    async with asyncio.timeout(PART_S):
                        return "success", await ask(PART_S)
                except TimeoutError:
                    return "timeout", None
                except HiveError as exc:
                    return "error", exc

            found = dict(zip(asks, await asyncio.gather(*map(part, asks.values())), strict=True))
            if all(how != "success" for how, _ in found.values()):
                failed = [what for how, what in found.values() if how == "error"]
                raise (
                    failed[0]
                    if failed
                    else OperationTimeout(f"{tool} exceeded {PART_S:g}s timeout")
                )
            return found

        result = await self.plane.run(tool, gather, self.key("GET", f"{tool} {about}"))
        data = {
            name: what if how == "success" else {"source": FAILED}
            for name, (how, what) in result.data.items()
        }
        lacking = tuple(
            f"{name} failed ({what.code if isinstance(what, HiveError) else how}): skipping it"
            for name, (how, what) in result.data.items()
            if how != "success"
        )
        return Result(data, result.source, result.age_s, (*result.warnings, *lacking))

    async def settled(
        self, error: HiveError, name: str, look: Callable[[], Awaitable[Any]]
    ) -> Result:
        """How a change ended whose answer was lost: `look` gives its outcome, None while it goes on.

        Raises `error` again where nothing of it is known or found (R198-R200).
        """
        if is_told(error) or was_not_sent(error):
            raise error
        log.warning("%s: the answer was lost, its outcome is looked for", name)
        for _ in range(MOST_POLLS):
            await asyncio.sleep(POLL_S)
            try:
                found = await look()
            except WindowNotFound as exc:
                log.warning("%s: it has not happened", name)
                raise error from exc
            except HiveError as exc:
                if classify(exc) is Failure.UNAUTHORIZED:
                    break
                continue  # it may be starting just now, or have no time for whoever asks
            if found is not None:
                return Result(found, warnings=("The answer was lost; this was found afterwards.",))
        log.warning("%s: nothing is known of its outcome", name)
        return Result(
            {"status": "timeout", "task_id": name},
            warnings=("Nothing is known of its outcome: ask window_status later.",),
        )

    def key(self, method: str, path: str) -> tuple[str, ...]:
        """What an answer is remembered by: whose it is and what was asked."""
        whose = hashlib.sha256((self.api_key or "").encode()).hexdigest()
        return (whose, str(self.url), method, path)

    def _daemon(self, limit_s: float) -> dict[str, Any]:
        return {"url": self.url, "api_key": self.api_key, "timeout_s": limit_s}
