"""One HTTP exchange over TCP or a unix socket, its body as the bytes that arrived."""

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exchange:
    status: int
    content_type: str | None
    body: bytes


def exchange(
    where: Path | tuple[str, int], path: str, body: Any, request_id: str | None = None
) -> Exchange:
    """POST `body` as JSON to an engine's socket or to an address."""
    connection = http.client.HTTPConnection("engine", timeout=60)
    if isinstance(where, Path):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(where))
    else:
        connection.sock = socket.create_connection(where)
    headers = {"Content-Type": "application/json"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    try:
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return Exchange(answer.status, answer.getheader("Content-Type"), answer.read())
    finally:
        connection.close()
