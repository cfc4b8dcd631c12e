"""The `command` engine: any program that serves the OpenAI API on a unix socket."""

import os
import shutil
from collections.abc import Mapping

from hive.errors import WorkerSpawnFailed
from hive.settings import Model
from hive.workers.client import EngineClient
from hive.workers.identity import identity_of, path_for
from hive.workers.process import Launch, Place
from hive.workers.site import Site

CPU_NICE = 10

# What is hive's alone: an engine that inherited NOTIFY_SOCKET could speak for hive to systemd.
_NOT_INHERITED = ("HIVE_", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "CUDA_VISIBLE_DEVICES")


def engine_environment(
    model: Model, place: Place, visible: str | None, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """hive's environment less what is hive's own, plus `extra`, the model's, and hive's marks."""
    return cleaned_environment(place, visible, {**(extra or {}), **model.env})


def cleaned_environment(
    place: Place, visible: str | None, extra: Mapping[str, str]
) -> dict[str, str]:
    """hive's environment less what is hive's own, plus `extra` and hive's marks."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
    env |= extra
    # SPT_NOENV: vLLM's setproctitle would overwrite the environment, and the mark with it.
    env |= {"HIVE_MARK": place.mark, "SPT_NOENV": "1", "TMPDIR": str(place.tmp)}
    # Empty, not absent: an engine on the CPU must not find a GPU by itself.
    env["CUDA_VISIBLE_DEVICES"] = visible or ""
    return env


async def probe_as(kind: str, client: EngineClient, health_path: str) -> None:
    """The smallest piece of a kind of work (completion, chat, embedding, classify, pooling, health)."""
    model = client.model
    if kind == "completion":
        await client.must(
            "POST", "/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1}
        )
    elif kind == "chat":
        say = [{"role": "user", "content": "a"}]
        await client.must(
            "POST", "/v1/chat/completions", {"model": model, "messages": say, "max_tokens": 1}
        )
    elif kind == "embedding":
        await client.must("POST", "/v1/embeddings", {"model": model, "input": "a"})
    elif kind in ("classify", "pooling"):
        await client.must("POST", f"/{kind}", {"model": model, "input": "a"})
    else:
        await client.must("GET", health_path)


def nice_on(devices: tuple[str, ...]) -> int:
    """An engine that computes on the CPU leaves hive the time to answer while it does.

    Seen: vLLM's spinning threads kept everything else waiting for seconds on two cores.
    """
    return CPU_NICE if devices == ("cpu",) else 0


class CommandEngine:
    """Runs the configured command with {socket}, {model} and {device} filled in."""

    computing: tuple[str, ...] = ()
    address: str | None = None

    def __init__(self, name: str, model: Model, kv: Site | None = None) -> None:
        """`kv` is the LMCache server that a model with `windows = true` uses."""
        self.name, self.model = name, model
        self._kv = kv if model.windows else None
        self.has_gauges = model.running == "vllm"
        self.health_path = model.health_path
        self.probe_kind = model.probe or "completion"

    def launch(
        self,
        place: Place,
        devices: tuple[str, ...],
        visible: str | None,
        total_bytes: int,  # noqa: ARG002 (nobody knows how to tell a command)
    ) -> Launch:
        program = shutil.which(self.model.command[0])
        if program is None:
            raise WorkerSpawnFailed(
                f"Model {self.name}: the program {self.model.command[0]!r} is not there or is "
                "not executable.",
                action="Correct the model's 'command', or install the program.",
                expected=self.model.command[0],
            )
        filled = {
            "{socket}": str(place.socket),
            "{model}": self.name,
            "{device}": ",".join(devices),
        }
        identity, kv_path = None, ""
        if self._kv is not None:
            chunk = self._kv.chunk_tokens
            identity = identity_of(self.name, self.model, devices, chunk, self.model.python)
            kv_path = str(path_for(self.name, identity, self._kv.state_dir))
            cache = {"{kv}": self._kv.address, "{kv_path}": kv_path, "{kv_chunk}": str(chunk)}
            filled |= cache
        argv = [os.path.abspath(program)]  # the engine starts in another directory
        for part in self.model.command[1:]:
            for word, value in filled.items():
                part = part.replace(word, value)  # noqa: PLW2901 (three small substitutions)
            argv.append(part)
        env = engine_environment(self.model, place, visible)
        return Launch(
            [*argv, *self.model.args],
            env,
            nice=nice_on(devices),
            identity=identity,
            kv_path=kv_path,
        )

    async def probe(self, client: EngineClient) -> None:
        await probe_as(self.probe_kind, client, self.health_path)

    def __repr__(self) -> str:
        return f"<CommandEngine {self.name} {self.model.command[0]}>"
