"""An engine that computes with torch and does nothing else: VRAM that is really held, and lost.

A program for the `command` engine, of the standard library and torch alone, so that any interpreter
with torch runs it. Its device is cuda:0 of CUDA_VISIBLE_DEVICES; the CPU only if `--device cpu` says
so. It listens on `--uds SOCKET` once it has computed something, and answers

- GET  /health
- POST /v1/completions, /v1/chat/completions: for each token (max_tokens; `stream` or not) a small
  product of matrices, computed on the device
- POST /v1/device: the device, as torch sees it
- POST /v1/hog {"gib": N}: takes and keeps so much of it
- POST /v1/oom {"gib": N}: takes pieces of that size (1) until torch raises
  torch.OutOfMemoryError, of which it dies
- POST /v1/fault {"kind": "illegal"}: an index out of bounds on the device, of which it dies;
  {"kind": "simulated_oom"}: dies of an error of that class which nothing but this caused

each with or without /v1. What hive passes on has to be under it.
"""

import argparse
import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
import time
import traceback
from typing import Any, NoReturn

import torch  # type: ignore[import-not-found]  # of the interpreter that runs this

GIB = 2**30
SIDE = 256  # of the matrices
TOKENS = 1200  # of an answer that is not limited: a minute
TOKEN_S = 0.05  # between two of them
RAISED = "raised at "  # seconds since the epoch, right before the traceback


class Refused(Exception):
    """What a client asks for cannot be done."""


class Engine:
    """The device, and what is held of it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.child: subprocess.Popen[str] | None = None
        self._held: list[Any] = []

    def compute(self) -> int:
        """SIDE, from the device."""
        ones = torch.ones(SIDE, SIDE, device=self.device)
        return int((ones @ ones)[0, 0].item())

    def hold(self, gib: float) -> None:
        """Take so much and keep it, written to, so that it is there and not only promised."""
        self._held.append(self._take(gib).fill_(1))
        self._wait()

    def exhaust(self, piece_gib: float) -> NoReturn:
        if self.device.type != "cuda":
            raise Refused("on the CPU this would take the memory of the whole host")
        while True:
            self._held.append(self._take(piece_gib))

    def fault(self, kind: str) -> None:
        if kind == "simulated_oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Simulated: nothing was allocated")
        if kind != "illegal":
            raise Refused(f"no such kind of fault: {kind}")
        few = torch.arange(8, device=self.device)
        few[torch.tensor([1 << 20], device=self.device)]
        self._wait()  # a kernel's failure is told by a later call

    def describe(self) -> dict[str, Any]:
        count = torch.cuda.device_count() if self.device.type == "cuda" else 0
        seen = [torch.cuda.get_device_properties(number) for number in range(count)]
        return {
            "device": str(self.device),
            "names": [one.name for one in seen],
            # Since torch 2.4; without the "GPU-" that the driver puts before it.
            "uuids": [str(one.uuid) if hasattr(one, "uuid") else None for one in seen],
            "pid": os.getpid(),
            "child": self.child.pid if self.child else None,
        }

    def let_child_hold(self, gib: float) -> None:
        """Hold it in a process in a session of its own, which outlives this one."""
        program = [sys.executable, "-P", os.path.abspath(__file__), "--hold-only"]
        flags = ["--hold-gib", str(gib), "--device", str(self.device)]
        self.child = subprocess.Popen(
            [*program, *flags], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.child.stdout
        if not self.child.stdout.readline():
            sys.exit("the child could not take what it was to hold")

    def _take(self, gib: float) -> Any:
        return torch.empty(int(gib * GIB), dtype=torch.uint8, device=self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A thread for each request; what one of them cannot survive ends the process."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, engine: Engine) -> None:
        super().__init__(path, Handler)
        self.engine = engine

    def handle_error(self, _request: object, _address: object) -> None:
        if isinstance(sys.exception(), OSError):
            return  # a client that left
        # As of an exception that nobody caught: nothing is cleaned up, the driver does that.
        sys.stderr.write(f"{RAISED}{time.time():.6f}\n")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; OpenAI's shapes, as far as a probe looks at them."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {})
        else:
            self._answer(404, {"error": {"message": "not found"}})

    def do_POST(self) -> None:
        engine = self.server.engine
        try:
            asked = json.loads(
                self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}"
            )
            match self.path.removeprefix("/v1"):
                case "/completions" | "/chat/completions" as path:
                    self._generate(path.startswith("/chat"), asked)
                case "/device":
                    self._answer(200, engine.describe())
                case "/hog":
                    engine.hold(float(asked["gib"]))
                    self._answer(200, {})
                case "/oom":
                    engine.exhaust(float(asked.get("gib", 1)))
                case "/fault":
                    engine.fault(asked["kind"])
                    self._answer(500, {"error": {"message": "the device noticed nothing"}})
                case _:
                    self._answer(404, {"error": {"message": "not found"}})
        except (Refused, KeyError, ValueError) as exc:
            self._answer(400, {"error": {"message": str(exc), "type": "BadRequestError"}})

    def _generate(self, is_chat: bool, asked: dict[str, Any]) -> None:
        most = int(asked.get("max_tokens") or TOKENS)
        model, is_stream = asked.get("model", ""), bool(asked.get("stream"))
        if is_stream:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        text = ""
        for number in range(most):
            if number:
                time.sleep(TOKEN_S)
            token = f" {self.server.engine.compute()}"
            text += token
            if is_stream:
                self._send_event(json.dumps(_answer_of(model, is_chat, token, "delta")))
        if is_stream:
            self._send_event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        else:
            self._answer(200, _answer_of(model, is_chat, text, "message"))

    def _send_event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: a client of a unix socket has no address to be logged."""


def _answer_of(model: str, is_chat: bool, text: str, part: str) -> dict[str, Any]:
    """A whole answer ("message"), or one token of it ("delta")."""
    said = {part: {"role": "assistant", "content": text}} if is_chat else {"text": text}
    kind = "chat.completion" if is_chat else "text_completion"
    return {
        "id": f"torch-{time.time_ns():x}",
        "object": f"{kind}.chunk" if is_chat and part == "delta" else kind,
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "finish_reason": "length"}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--uds", metavar="SOCKET")
    parser.add_argument("--device", choices=("cuda:0", "cpu"), default="cuda:0")
    parser.add_argument("--hold-gib", type=float, default=0.0, help="taken before it listens")
    parser.add_argument("--child", action="store_true", help="a child holds it, in its own session")
    parser.add_argument("--hold-only", action="store_true", help="hold it, say so, do not serve")
    asked = parser.parse_args()
    if not asked.uds and not asked.hold_only:
        parser.error("--uds or --hold-only is needed")
    engine = Engine(asked.device)
    engine.compute()  # without a device it ends here, in torch's own words
    if asked.child:
        engine.let_child_hold(asked.hold_gib)
    elif asked.hold_gib:
        engine.hold(asked.hold_gib)
    if asked.hold_only:
        print("holding", flush=True)
        while True:
            signal.pause()
    with Server(asked.uds, engine) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
