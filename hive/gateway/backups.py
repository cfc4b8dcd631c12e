"""Backups of windows over HTTP: /hive/v1/backups. Whose they are is as it is with windows.

A backup itself is never sent: it holds its session's salt. Who wants it elsewhere copies the file.
"""

from typing import Any

import msgspec
from aiohttp import web

from hive.errors import (
    InvalidParameter,
    InvalidWindowName,
    ModelIncompatible,
    NotFound,
    PayloadTooLarge,
    StorageCorrupted,
    StorageQuotaExceeded,
    StorageReadFailed,
    StorageWriteFailed,
    WindowAlreadyExists,
)
from hive.gateway import shapes
from hive.gateway.openapi import EVENTS, JSON, described
from hive.gateway.windows import (
    MOST_OFFSET,
    OF_A_BODY,
    OF_A_WINDOW,
    OF_AN_OPERATION,
    OF_AN_OWNER,
    PAGE,
    Limit,
    Offset,
    OfOwner,
    WindowsApi,
    body_of,
    caller_of,
    number_of,
    owner_of,
    view,
)
from hive.storage.catalogue import MOST_PAGE
from hive.windows.archives import Found
from hive.windows.backups import Asker, Backups
from hive.windows.operations import Windows, checked_name
from hive.windows.work import Progress


class NewBackup(msgspec.Struct, forbid_unknown_fields=True):
    window: str


class RestoreWanted(msgspec.Struct, forbid_unknown_fields=True):
    window: str
    timestamp: str | None = None
    name: str | None = None


class BackupsWanted(OfOwner, total=False):
    window: str
    limit: Limit
    offset: Offset


class BackupsApi:
    """Handlers; what they do is hive/windows/backups.py."""

    def __init__(self, of_windows: WindowsApi, windows: Windows, backups: Backups) -> None:
        self._answer = of_windows.answer  # they count together
        self._windows, self._backups = windows, backups

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/hive/v1/backups", self.backups, allow_head=False),
            web.post("/hive/v1/backups", self.create),
            web.post("/hive/v1/backups/restore", self.restore),
            web.delete("/hive/v1/backups/{window}/{timestamp}", self.delete),
        ]

    @described(
        {200: shapes.Backups},
        query=BackupsWanted,
        errors=[*OF_AN_OWNER, InvalidParameter, InvalidWindowName, StorageReadFailed],
    )
    async def backups(self, request: web.Request) -> web.Response:
        """The caller's, the newest first, in pages (?window=, limit=, offset=)."""
        owner, window = owner_of(request), request.query.get("window")
        begin = number_of(request, "offset", 0, MOST_OFFSET)
        end = begin + number_of(request, "limit", PAGE, MOST_PAGE, 1)
        found, unreadable = await self._backups.listed(owner, window)
        more: dict[str, Any] = {"next_offset": end} if len(found) > end else {}
        if owner is None:
            more["unreadable"] = [{"file": one.file, "why": one.why} for one in unreadable]
        return web.json_response({"backups": [_backup(one) for one in found[begin:end]], **more})

    @described(
        {201: shapes.BackupView},
        body=NewBackup,
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[*OF_A_BODY, *OF_A_WINDOW, *OF_AN_OPERATION, StorageCorrupted, StorageQuotaExceeded],
    )
    async def create(self, request: web.Request) -> web.StreamResponse:
        """Back a window up into a file: 201, the backup."""
        wanted = await body_of(request, NewBackup)
        asker = _asker(request)
        owner = asker.owner
        checked_name(wanted.window)
        if owner is None and await self._windows.has_own(asker.name, wanted.window):
            owner = asker.name

        async def work(told: Progress) -> dict[str, Any]:
            return _backup(await self._backups.create(owner, wanted.window, told))

        return await self._answer(request, work, status=201)

    @described(
        {201: shapes.RestoredWindow},
        body=RestoreWanted,
        query=OfOwner,
        content=(JSON, EVENTS),
        errors=[
            *OF_A_BODY,
            *OF_A_WINDOW,
            *OF_AN_OPERATION,
            NotFound,
            ModelIncompatible,
            WindowAlreadyExists,
            StorageCorrupted,
            StorageQuotaExceeded,
            PayloadTooLarge,
        ],
    )
    async def restore(self, request: web.Request) -> web.StreamResponse:
        """A window from its newest backup, or the one that is named: 201, the window."""
        wanted = await body_of(request, RestoreWanted)
        asker = _asker(request)

        async def work(told: Progress) -> dict[str, Any]:
            window, header = await self._backups.restore(
                asker,
                wanted.window,
                timestamp=wanted.timestamp,
                new_name=wanted.name,
                told=told,
            )
            backup = {"window": header.name, "timestamp": header.timestamp}
            return {**view(window), "backup": backup}

        return await self._answer(request, work, status=201)

    @described(
        {204: None},
        query=OfOwner,
        errors=[*OF_A_WINDOW, NotFound, InvalidParameter, StorageReadFailed, StorageWriteFailed],
    )
    async def delete(self, request: web.Request) -> web.Response:
        """The file goes; the window stays."""
        told = request.match_info
        await self._backups.delete(_asker(request), told["window"], told["timestamp"])
        return web.Response(status=204)


def _asker(request: web.Request) -> Asker:
    caller = caller_of(request)
    return Asker(caller.name or "", owner_of(request), is_admin=caller.may("admin"))


def _backup(found: Found) -> dict[str, Any]:
    """As the API shows it: neither salt nor path (R076)."""
    header = found.header
    return {
        "window": header.name,
        "timestamp": header.timestamp,
        "owner": header.owner or None,
        "session_id": header.session_id,
        "model": header.model,
        "created_at": header.created_at,
        "frozen_at": header.frozen_at,
        "tokens": header.tokens,
        "blocks": header.blocks,
        "bytes": header.bytes,
        "file_bytes": header.size,
        "whole": found.is_whole,
        "description": header.description,
        "tags": header.tags,
    }
