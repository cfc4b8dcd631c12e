"""The `vllm` engine: vLLM's OpenAI server from an environment of its own, on a unix socket."""

import json
from pathlib import Path

from hive.errors import ConfigInvalid, WorkerSpawnFailed
from hive.settings import Model
from hive.workers.client import EngineClient
from hive.workers.command import engine_environment, nice_on, probe_as
from hive.workers.environment import managed_python
from hive.workers.footprint import CPU_KV_GIB, CPU_KV_VARIABLE, GIB, argument, stated_utilization
from hive.workers.identity import identity_of, path_for
from hive.workers.model_files import ModelFiles, model_files
from hive.workers.process import Launch, Place
from hive.workers.site import HOST, Site

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


# An engine whose LMCache hangs goes on without it after so long, instead of 300 s.
KV_ANSWER_S, KV_HEARTBEAT_S = 3, 2

# With "cpu" vLLM computes on the CPU, whatever it was built for and whichever GPUs it sees.
BACKEND_VARIABLE = "VLLM_TARGET_DEVICE"
# What the model says goes, so what hive's own environment says of it does not.
_NOT_INHERITED = (CPU_KV_VARIABLE, BACKEND_VARIABLE)


def on_cuda(model: Model) -> bool:
    """Whether a worker of the model computes on a GPU."""
    return any(devices != ("cpu",) for devices in model.workers)


def python_of(name: str, model: Model) -> Path:
    """The Python of the model's engine environment.

    Raises WorkerSpawnFailed if there is none, or only the managed one for a model on a GPU: that
    has the CPU build, which would compute on the CPU. ConfigInvalid if `env` chooses the CPU.
    """
    if on_cuda(model):
        if model.env.get(BACKEND_VARIABLE, "").lower() == "cpu":
            raise ConfigInvalid(
                f"models.{name}.env: {BACKEND_VARIABLE} is 'cpu', but the model's device is a GPU.",
                action=f'Remove it, or choose the CPU with device = "cpu" in models.{name}.',
            )
        if model.python is None:
            raise WorkerSpawnFailed(
                f"Model {name}: there is no engine environment for a GPU; the one that hive "
                "installs has the CPU build of vLLM.",
                action="Set the model's 'python' to the Python of an environment that has vllm's "
                'CUDA build and lmcache; or choose the CPU with device = "cpu".',
            )
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


def files_of(name: str, model: Model) -> ModelFiles | None:
    """A path must be a whole model directory; None: the weights are not known.

    What looks like a hub id is left to vLLM, and so are the files that another loader reads, or
    makes up ('--load-format dummy'). Raises ConfigInvalid that names models.NAME.path.
    """
    assert model.path is not None
    path = Path(model.path)
    looks_local = path.is_absolute() or model.path.startswith((".", "~"))
    if path.is_dir():
        is_other = argument(model.args, "--load-format") is not None
        return None if is_other else model_files(name, path)
    if looks_local or path.exists():
        raise ConfigInvalid(
            f"models.{name}.path: {model.path} is not a directory.",
            action="Name the directory that holds the model's config.json and weights.",
        )
    return None


class VllmEngine:
    """vLLM's own arguments are made from the settings; `args` and `env` come after them.

    Nothing here depends on an earlier start: every start asks for the same, on the same devices.
    """

    health_path = "/health"
    computing: tuple[str, ...] = VITAL
    address: str | None = None

    def __init__(self, name: str, model: Model, kv: Site | None = None) -> None:
        """`kv` is the LMCache server that a model with `windows = true` uses."""
        self.name, self.model = name, model
        self.has_gauges = model.running != "none"
        self._kv = kv if model.windows else None

    def launch(
        self, place: Place, devices: tuple[str, ...], visible: str | None, total_bytes: int
    ) -> Launch:
        model = self.model
        assert model.path is not None
        is_local = Path(model.path).is_dir()
        path = str(Path(model.path).absolute()) if is_local else model.path
        # Absolute, since the engine starts in another directory; a venv's python is a link.
        python = python_of(self.name, model).absolute()
        identity, kv_path = None, ""
        if self._kv is not None:
            identity = identity_of(self.name, model, devices, self._kv.chunk_tokens, python)
            path = kv_path = str(path_for(self.name, identity, self._kv.state_dir))
        argv = [
            str(python),
            "-m",
            SERVER,
            "--model",
            path,
            "--served-model-name",
            self.name,
            "--uds",
            str(place.socket),
            "--disable-uvicorn-access-log",
            # A line a request with its id, which is hive's: an engine's trouble is found by it. Of
            # prompts it would tell only at its debug level, and not even then more than nothing.
            "--enable-log-requests",
            "--max-log-len",
            "0",
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
        argv += self._memory(devices, total_bytes)
        argv += self._cache()
        env = engine_environment(model, place, visible, extra)
        for variable in set(_NOT_INHERITED) - set(model.env):
            env.pop(variable, None)
        return Launch(
            [*argv, *model.args],
            env,
            VITAL,
            nice_on(devices),
            identity=identity,
            kv_path=kv_path,
        )

    def _cache(self) -> list[str]:
        """What vLLM is told of the LMCache beside it: with limits, or one that hangs hangs it."""
        if self._kv is None:
            return []
        connector = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": f"tcp://{HOST}",
                "lmcache.mp.port": self._kv.port,
                "lmcache.mp.mq_timeout": KV_ANSWER_S,
                "lmcache.mp.heartbeat_interval": KV_HEARTBEAT_S,
            },
        }
        told = json.dumps(connector)
        # Without it the engine does not say how much of a prompt it found in its cache.
        # … nor, without the last, which tokens a conversation becomes (`…/render`).
        flags = ["--enable-prompt-tokens-details", "--enable-scale-out"]
        return ["--kv-transfer-config", told, *flags]

    def _memory(self, devices: tuple[str, ...], total_bytes: int) -> list[str]:
        """What vLLM is told of memory: what the preflight has found to be free."""
        model = self.model
        kv_gib = model.kv_cache_gib or (CPU_KV_GIB if devices == ("cpu",) else 0)
        told = ["--kv-cache-memory-bytes", str(int(kv_gib * GIB))] if kv_gib else []
        if devices == ("cpu",):
            return told
        files = files_of(self.name, model)
        share = stated_utilization(self.name, model, files, len(devices), total_bytes)
        if share is not None:
            told += ["--gpu-memory-utilization", f"{share:g}"]
        return told

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
