"""The `vllm` engine: vLLM's OpenAI server from an environment of its own, on a unix socket."""

from pathlib import Path

from hive.errors import WorkerSpawnFailed
from hive.settings import Model
from hive.workers.client import EngineClient
from hive.workers.command import engine_environment, nice_on, probe_as
from hive.workers.environment import managed_python
from hive.workers.process import Launch, Place

SERVER = "vllm.entrypoints.openai.api_server"  # the `vllm` script of the CPU build cannot start

# The API server outlives these by up to 5 s, with its streams ended as if all were well.
VITAL = ("VLLM::EngineCor", "VLLM::Worker")

# Routes are registered by task, so the first that exists tells what the model is for.
_PROBES = (
    ("/v1/completions", "completion"),
    ("/v1/embeddings", "embedding"),
    ("/classify", "classify"),
    ("/pooling", "pooling"),
)
_METHOD_NOT_ALLOWED = 405


def python_of(name: str, model: Model) -> Path:
    """The Python of the model's engine environment. Raises WorkerSpawnFailed if there is none."""
    python = model.python or managed_python()
    if python is None:
        raise WorkerSpawnFailed(
            f"Model {name}: there is no engine environment.",
            action="Run 'hive engine install cpu', or set the model's 'python' to the Python of "
            "an environment that has vllm and lmcache.",
        )
    if not python.is_file():
        raise WorkerSpawnFailed(
            f"Model {name}: the engine's python does not exist.",
            action="Set the model's 'python' to an existing interpreter, or remove it to use the "
            "managed environment ('hive engine install cpu').",
            expected=str(python),
        )
    return python


class VllmEngine:
    """vLLM's own arguments are made from the settings; `args` and `env` come after them."""

    health_path = "/health"

    def __init__(self, name: str, model: Model) -> None:
        self.name, self.model = name, model

    def launch(self, place: Place, devices: tuple[str, ...], visible: str | None) -> Launch:
        model = self.model
        assert model.path is not None
        is_local = Path(model.path).is_dir()
        path = str(Path(model.path).absolute()) if is_local else model.path
        argv = [
            # Absolute, since the engine starts in another directory; a venv's python is a link.
            str(python_of(self.name, model).absolute()),
            "-m",
            SERVER,
            "--model",
            path,
            "--served-model-name",
            self.name,
            "--uds",
            str(place.socket),
            "--disable-uvicorn-access-log",
        ]
        extra = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "LMCACHE_TRACK_USAGE": "false",
            "LMCACHE_DISABLE_BANNER": "1",
            "PYTHONHASHSEED": "0",
        }
        if is_local:
            extra["HF_HUB_OFFLINE"] = "1"  # everything is there: nothing may be fetched instead
        if len(devices) > 1:
            argv += ["--tensor-parallel-size", str(len(devices))]
        if devices == ("cpu",):
            extra["VLLM_CPU_KVCACHE_SPACE"] = f"{model.kv_cache_gib or 1:g}"
        elif model.kv_cache_gib:
            argv += ["--kv-cache-memory-bytes", str(int(model.kv_cache_gib * 2**30))]
        env = engine_environment(model, place, visible, extra)
        return Launch([*argv, *model.args], env, VITAL, nice_on(devices))

    async def probe(self, client: EngineClient) -> None:
        kind = self.model.probe or await self._task(client)
        await probe_as(kind, client, self.health_path)

    async def _task(self, client: EngineClient) -> str:
        """What this model can do: a route that exists answers GET with 405, another with 404."""
        for route, kind in _PROBES:
            status, _ = await client.ask("GET", route)
            if status == _METHOD_NOT_ALLOWED:
                return kind
        return "health"  # a model for speech only, say: being up is all that can be asked

    def __repr__(self) -> str:
        return f"<VllmEngine {self.name}>"
