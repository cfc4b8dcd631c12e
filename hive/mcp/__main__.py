"""The program behind `hive mcp`; `hive.cli.mcp` starts it with what it was told."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable

from hive.errors import AddressInUse, ConfigInvalid, HiveError
from hive.mcp.server import Hive
from hive.telemetry import logs

log = logging.getLogger("hive.mcp")

PATH = "/mcp"
LEAVE_S = 0.5  # for what is under way to notice
GRACE_S = 1  # for answers that are being sent; streams that stay open are cut off


async def over_stdio(hive: Hive) -> None:
    """One client on standard input and output, until it closes the input."""
    from mcp.server.stdio import stdio_server

    server = hive.server()
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


async def over_http(hive: Hive, host: str, port: int) -> None:
    """Any number of clients on a loopback address. Raises ConfigInvalid for another one."""
    import uvicorn
    from mcp.server.transport_security import TransportSecuritySettings

    if not _is_loopback(host):
        raise ConfigInvalid(
            f"hive mcp listens on loopback addresses only, not on {host}.",
            action="Leave --host out, and let a proxy with TLS stand before it.",
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as exc:
        raise AddressInUse(
            f"hive mcp cannot listen on port {port} of {host}: {exc.strerror}.",
            action="Stop the program that holds it, or name another with --port.",
        ) from exc
    place = f"[{host}]" if ":" in host else host
    hosts = sorted({f"{one}:*" for one in (place, "127.0.0.1", "localhost", "[::1]")})
    # A page in somebody's browser may name any host: for other spellings the library would not look.
    security = TransportSecuritySettings(
        allowed_hosts=hosts, allowed_origins=[f"http://{one}" for one in hosts]
    )
    app = hive.server().streamable_http_app(
        streamable_http_path=PATH, host=host, transport_security=security
    )
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=GRACE_S
    )
    log.info("listening on http://%s:%d%s", place, listening.getsockname()[1], PATH)
    with listening:
        await uvicorn.Server(config).serve(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may be anything tomorrow


async def _until_told(serving: Awaitable[None]) -> None:
    """SIGTERM and Ctrl+C end it cleanly."""
    task = asyncio.ensure_future(serving)
    loop = asyncio.get_running_loop()

    def end() -> None:
        task.cancel()
        # The thread that waits for the next line of a client's cannot be told to stop.
        loop.call_later(LEAVE_S, os._exit, 0)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main(options: dict[str, object]) -> int:
    """The exit status. `options`: transport, host, port, url, log_level; the key is in HIVE_API_KEY."""
    logs.configure(str(options["log_level"]))
    url = options["url"]
    hive = Hive(None if url is None else str(url), os.environ.get("HIVE_API_KEY"))
    try:
        if options["transport"] == "stdio":
            asyncio.run(_until_told(over_stdio(hive)))
        else:
            # uvicorn listens to both itself, ends, and raises what it heard once more.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: sys.exit(0))
            asyncio.run(over_http(hive, str(options["host"]), int(str(options["port"]))))
    except HiveError as exc:
        logs.tell(f"hive: {exc.message}\n  {exc.suggested_action}\n")
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
