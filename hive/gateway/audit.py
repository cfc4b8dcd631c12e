"""GET /hive/v1/audit: who did what, page by page."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from aiohttp import web

from hive.errors import StorageReadFailed, ValidationFailed
from hive.gateway.openapi import described
from hive.gateway.queries import whole_number
from hive.storage import audit
from hive.storage.threads import in_its_own_thread

PAGE, MOST = 100, 1000
LATEST = 10**15  # above any index


class AuditWanted(TypedDict, total=False):
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST, description=f"At most so many; {PAGE}.")]
    before: Annotated[
        int, msgspec.Meta(ge=0, le=LATEST, description="Only records with a smaller index.")
    ]


class AuditRecord(TypedDict):
    index: int
    timestamp: str
    actor: str
    action: str
    target: str
    outcome: str
    request_id: str | None
    detail: dict[str, Any]
    previous_hash: str
    hash: str


class AuditPage(TypedDict):
    records: list[AuditRecord]
    next_before: NotRequired[int]


class AuditApi:
    """The handler; what is recorded is telemetry/audit's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/hive/v1/audit", self.audit, allow_head=False)]

    @described({200: AuditPage}, query=AuditWanted, errors=[ValidationFailed, StorageReadFailed])
    async def audit(self, request: web.Request) -> web.Response:
        """The audit log, the newest record first, in pages (?limit=, before=INDEX)."""
        most = _number(request, "limit", PAGE, 1, MOST)
        before = _number(request, "before", LATEST, 0, LATEST)
        try:
            found = await in_its_own_thread(partial(audit.page, self._directory, most, before))
        except OSError as exc:
            raise StorageReadFailed(
                f"The audit log cannot be read: {exc.strerror}.",
                action="Check the rights under server.state_dir, then try again.",
            ) from exc
        more = {"next_before": found[-1]["index"]} if len(found) == most else {}
        return web.json_response({"records": found, **more})


def _number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    number = whole_number(request.query.get(name, str(default)), least, most)
    if number is None:
        raise ValidationFailed(
            f"'{name}' must be a whole number from {least} to {most}.", param=name
        )
    return number
