"""The double's life: load, listen on both ports, and end at once when told to."""

import asyncio
import os
import signal
import sys
from typing import NoReturn

from tests.doubles.engine.wire import Connection
from tests.doubles.lmcache.api import Api
from tests.doubles.lmcache.knobs import Knobs, Options, parse
from tests.doubles.lmcache.tier import Tier
from tests.doubles.lmcache.wires import Engines, Wire

READY = "LMCache double ready"


class Server:
    def __init__(self, knobs: Knobs, options: Options, loop: asyncio.AbstractEventLoop) -> None:
        self._knobs = knobs
        self._options = options
        self._loop = loop
        self._tier = Tier(options, knobs)
        self._engines = Engines(self._tier, self._write_later)
        self._api = Api(options, knobs, self._engines, loop)

    async def listen(self) -> None:
        await asyncio.sleep(self._knobs.load_s)
        options, http = self._options, set[Connection]()
        await self._loop.create_server(lambda: Wire(self._engines), options.host, options.port)
        await self._loop.create_server(
            lambda: Connection(self._api, http), options.http_host, options.http_port
        )
        print(READY, flush=True)

    def _write_later(self, names: list[str]) -> None:
        if names:
            self._api.pending_stores += 1
            self._loop.call_later(self._knobs.store_s, self._write, names)

    def _write(self, names: list[str]) -> None:
        self._tier.write(names)
        self._api.pending_stores -= 1


def main(argv: list[str]) -> NoReturn:
    knobs, options = parse(argv)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, knobs.max_life_s)
    loop = asyncio.new_event_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 0)
    try:
        loop.run_until_complete(Server(knobs, options, loop).listen())
    except OSError as exc:
        sys.exit(f"OSError: {exc}")
    loop.run_forever()
    raise AssertionError("nobody stops the loop: a signal ends the process")
