"""hive's own requests to an engine: health, probes, metrics, small work; each with a deadline."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
from yarl import URL

HEALTH_S = 2.0  # an engine that is up answers its health check at once
PROBE_S = 60.0  # a first token may still compile kernels


class ProbeFailed(Exception):
    """The engine is not ready: what it answered, in one line."""


class EngineClient:
    """Requests over the worker's unix socket, or to `address` (http://HOST:PORT) where that is told.

    Close it with `async with` or `close`.
    """

    def __init__(self, socket: Path, model: str, address: str | None = None) -> None:
        self.model = model
        self._socket, self._address = socket, address
        self._session = aiohttp.ClientSession(
            base_url=address or "http://engine",
            connector=aiohttp.TCPConnector(force_close=True)
            if address
            else aiohttp.UnixConnector(str(socket), force_close=True),
            timeout=aiohttp.ClientTimeout(total=PROBE_S),
            skip_auto_headers=("User-Agent",),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def is_healthy(self, path: str) -> bool:
        try:
            timeout = aiohttp.ClientTimeout(total=HEALTH_S)
            async with self._session.get(path, timeout=timeout) as answer:
                return answer.status == 200  # noqa: PLR2004
        except (OSError, TimeoutError, aiohttp.ClientError):
            return False

    async def is_listening(self) -> bool:
        """Whether anybody takes connections; who is merely slow or full does."""
        try:
            async with asyncio.timeout(HEALTH_S):
                if self._address:
                    url = URL(self._address)
                    _, writer = await asyncio.open_connection(url.host, url.port)
                else:
                    _, writer = await asyncio.open_unix_connection(self._socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (OSError, TimeoutError):
            return True
        writer.close()
        return True

    async def ask(
        self, method: str, path: str, body: Any = None, within_s: float = PROBE_S
    ) -> tuple[int, bytes]:
        """One request with JSON: status and raw answer. Raises ProbeFailed when it breaks off."""
        limit = aiohttp.ClientTimeout(total=within_s)
        try:
            async with self._session.request(method, path, json=body, timeout=limit) as answer:
                return answer.status, await answer.read()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, aiohttp.ClientError) as exc:
            raise ProbeFailed(f"{method} {path}: {type(exc).__name__}") from exc

    async def read(
        self, path: str, within_s: float, most_bytes: int, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """GET: status and raw answer, as it was sent. Raises ProbeFailed when it is longer, late, or
        breaks off."""
        limit = aiohttp.ClientTimeout(total=within_s)
        asked = {"Accept-Encoding": "identity", **(headers or {})}
        try:
            async with self._session.get(
                path, headers=asked, timeout=limit, allow_redirects=False, auto_decompress=False
            ) as answer:
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > most_bytes:
                        raise ProbeFailed(f"GET {path}: more than {most_bytes} bytes")
                return answer.status, bytes(body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, aiohttp.ClientError) as exc:
            raise ProbeFailed(f"GET {path}: {type(exc).__name__}") from exc
        except RuntimeError as exc:  # it was closed just now
            raise ProbeFailed(f"GET {path}: {exc}") from exc

    async def must(self, method: str, path: str, body: Any = None) -> bytes:
        """Like `ask`, and anything but 2xx is ProbeFailed."""
        status, answer = await self.ask(method, path, body)
        if not 200 <= status < 300:  # noqa: PLR2004
            raise ProbeFailed(f"{method} {path}: status {status}")
        return answer
