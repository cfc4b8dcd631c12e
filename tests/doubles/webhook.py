"""A webhook for alerts on loopback: a real HTTP server that writes down what it gets."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Headers = dict[str, str]


@dataclass
class Delivery:
    """One POST as it came; `status` is what was answered, 0 where the connection was broken off."""

    path: str
    headers: Headers
    body: bytes
    status: int = 0

    @property
    def id(self) -> str:
        return self.headers["x-hive-delivery"]

    @property
    def alert(self) -> Any:
        (alert,) = self.alerts
        return alert

    @property
    def alerts(self) -> list[Any]:
        found: list[Any] = json.loads(self.body)
        return found

    @property
    def name(self) -> str:
        return str(self.alert["labels"]["alertname"])


@dataclass
class Webhook:
    """Answers `status` to everything, until somebody says otherwise.

    `arrived` is called with the number of a delivery before it is answered, `answered` afterwards;
    what they raise breaks the connection off. A repeat of what is open is no delivery.
    """

    status: int = 200
    answer_headers: Headers = field(default_factory=dict)
    answer: bytes = b"{}"
    token: str = ""  # when there is one, others are answered 401
    arrived: Callable[[int], None] = lambda _number: None
    answered: Callable[[int], None] = lambda _number: None
    deliveries: list[Delivery] = field(default_factory=list)
    repeats: list[Delivery] = field(default_factory=list)
    port: int = 0
    _server: ThreadingHTTPServer | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v2/alerts"

    @property
    def taken(self) -> list[Delivery]:
        return [one for one in self.deliveries if 200 <= one.status < 300]

    def start(self) -> None:
        """Listen, on the same port as before."""
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 0.5  # of a connection on which nothing comes

            def do_POST(self) -> None:
                webhook.take(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False
            allow_reuse_address = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def take(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers["Content-Length"])
        headers = {name.lower(): value for name, value in request.headers.items()}
        delivery = Delivery(request.path, headers, request.rfile.read(length))
        is_repeat = "x-hive-repeat" in headers
        (self.repeats if is_repeat else self.deliveries).append(delivery)
        number = 0 if is_repeat else len(self.deliveries)
        try:
            if number:
                self.arrived(number)
            is_known = not self.token or headers.get("authorization") == f"Bearer {self.token}"
            delivery.status = self.status if is_known else 401
            request.send_response(delivery.status)
            for name, value in self.answer_headers.items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(self.answer)))
            request.end_headers()
            request.wfile.write(self.answer)
            request.wfile.flush()
            if number:
                self.answered(number)
        except (ConnectionError, Broken):
            request.close_connection = True
            with contextlib.suppress(OSError):
                request.connection.shutdown(socket.SHUT_RDWR)


class Broken(Exception):
    """Raised by `arrived`: no answer."""


@contextmanager
def webhook(**fields: Any) -> Iterator[Webhook]:
    """One that listens while the block runs."""
    it = Webhook(**fields)
    it.start()
    try:
        yield it
    finally:
        it.stop()
