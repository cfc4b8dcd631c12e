"""What a model needs of VRAM, host memory and disk, worked out before anything is started.

Sizes are bytes; what people read is GiB and MiB, as nvidia-smi and free count. Fields named *_gb
hold GiB, too (of *_mb: MiB), rounded so that a shortage never reads "8.1 needed, 8.1 available".
The facts about vLLM are in docs/engines.md, "Memory". R017, R019, C9; EH-004a to EH-006a.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from hive.errors import ConfigInvalid, GpuVramExhausted
from hive.settings import Model, Settings
from hive.workers.model_files import ModelFiles
from hive.workers.process import LOG_BYTES, LOG_FILES

MIB, GIB = 2**20, 2**30
UTILIZATION = 0.92  # vLLM's default
SHARES = 10_000  # a share that hive passes on is so many of these; 1 is 8 MiB of 80 GiB

# Taken on the device before vLLM looks how much is free, so it must be free beside the claim.
CUDA_BYTES = 512 * MIB
# A forward pass of max_num_batched_tokens, and CUDA graphs. Reported for 8 B parameters: 1.3 GiB.
ACTIVATION_BYTES = 1 * GIB
# Resident memory of the CPU build without weights and KV cache (docs/engines.md, Processes).
SERVER_BYTES = 1200 * MIB  # API server and EngineCore
WORKER_BYTES = 600 * MIB  # each Worker
CACHE_SERVER_BYTES = 600 * MIB  # LMCache, without its chunks
CPU_WEIGHTS = 1.2  # EH-004a
CPU_KV_GIB = 1.0
CPU_KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # whole GiB; vLLM lets it win over the option

STATE_BYTES = 64 * MIB  # journals and what else is small
TEMPORARY_BYTES = 64 * MIB  # a worker's sockets and the kernels that inductor compiles

# Options with which the weights or the KV cache take another size than the files say.
_CHANGES_SIZE = (
    *("--load-f", "--config", "--hf-c", "--hf-o", "--quant", "-q", "--dtype", "--kv-cache-d"),
    *("--cpu-off", "--offload", "--num-gpu", "--language-m", "--tensor-p", "-tp", "--pipeline-p"),
    *("-pp", "--data-p", "-dp", "--decode-c", "-dcp", "--prefill-c", "-pcp"),
)
# Keys of config.json of models whose KV cache is not one of every token in every layer.
_OTHER_CACHE = re.compile(
    r"lora_rank|sliding_window$|mamba|ssm|linear_|hybrid|block_type|block_configs|attn_layer|"
    r"attention_interval|kv_shared|compress|encoder|n_head_kv|num_kv_heads|multi_query|"
    r"attention_groups|kv_cache_(scheme|quant)"
)
_AMBIGUOUS = len("--device")  # a beginning of this length may be another option
HIGHEST = 10**9  # of any count that config.json or an argument may state: layers, heads, tokens
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings", "model_max_length")


@dataclass(frozen=True, slots=True)
class Need:
    """What must be free, of what it consists, and in words what decided it.

    `least`: what it would be if vLLM claimed no more than it uses; 0 where that is not known.
    """

    bytes: int
    parts: tuple[tuple[str, int], ...]
    source: str
    least: int = 0


def _added(*parts: tuple[str, int]) -> Need:
    total = sum(size for _, size in parts)
    words = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return Need(total, parts, f"{words} GiB", total)


def gib_up(size: int) -> float:
    return math.ceil(size * 10 / GIB) / 10


def gib_down(size: int) -> float:
    return math.floor(size * 10 / GIB) / 10


# ── What vLLM is told ───────────────────────────────────────────────────────────────────────────


def argument(args: Sequence[str], *options: str) -> str | None:
    """The value of an option in a model's args, as vLLM's parser reads them.

    Underscores and unique beginnings are accepted, and the last one wins; None if there is none.
    """
    found = None
    for at, part in enumerate(args):
        flag, has_value, value = part.partition("=")
        flag = flag.replace("_", "-")
        is_meant = len(flag) > _AMBIGUOUS and any(one.startswith(flag) for one in options)
        if flag in options or is_meant:
            found = value if has_value else next(iter(args[at + 1 : at + 2]), None)
    return found


def told_utilization(name: str, model: Model) -> float | None:
    """The share of a device in the model's args, if it is there.

    Raises ConfigInvalid for one that vLLM would not take.
    """
    options = ("--gpu-memory-utilization", "--device-memory-utilization")
    told = argument(model.args, *options)
    if told is None:
        return None
    try:
        if 0 < float(told) <= 1:
            return float(told)
    except ValueError:
        pass
    raise ConfigInvalid(
        f"models.{name}.args: {options[0]} {told}: vLLM takes a number above 0 and at most 1.",
        action=f"Correct {options[0]} in models.{name}.args.",
    )


def _count(text: str | None) -> int | None:
    """vLLM's numbers: 8k is 8,000 and 8K is 8,192. None for what is not one ("auto", say)."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([kmgtKMGT]?)", (text or "").strip(), re.ASCII)
    if not match:
        return None
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[2].isupper() else 1000) ** power)


def _stated_kv(model: Model) -> int:
    """The KV cache that vLLM is told to make on a device; 0 where that is not stated."""
    told = _count(argument(model.args, "--kv-cache-memory-bytes"))
    return told or int(model.kv_cache_gib * GIB)


def _cpu_kv(model: Model) -> int:
    told = model.env.get(CPU_KV_VARIABLE, "")
    whole = int(told) * GIB if re.fullmatch(r"\d{1,9}", told, re.ASCII) else 0
    return whole or _stated_kv(model) or int(CPU_KV_GIB * GIB)


def _is_as_written(model: Model) -> bool:
    """Whether the engine's arguments leave weights and KV cache the size that the files say."""
    return not any(part.replace("_", "-").startswith(_CHANGES_SIZE) for part in model.args)


def kv_bytes_per_token(config: Mapping[str, Any], devices: int = 1) -> int | None:
    """What a token takes in the KV cache of each device; None where config.json does not tell.

    That is so for MLA, for sliding windows, for state-space and mixed models, and for a cache
    quantized by the checkpoint.
    """
    text = _text_part(config)
    quantization = config.get("quantization_config")
    marks = [text, quantization] if isinstance(quantization, dict) else [text]
    for key, value in (item for mark in marks for item in mark.items()):
        is_unused = key == "sliding_window" and text.get("use_sliding_window") is False
        if value and not is_unused and _OTHER_CACHE.search(key):
            return None
    layer_types = text.get("layer_types") or []
    if not isinstance(layer_types, list) or any(one != "full_attention" for one in layer_types):
        return None
    try:
        heads = _whole(text.get("num_attention_heads"))
        kv_heads = _whole(text.get("num_key_value_heads") or heads)
        head = _whole(text.get("head_dim") or _whole(text.get("hidden_size")) // heads)
        # 16 bit: "auto" casts float32, and nothing smaller is computed in.
        return _whole(text.get("num_hidden_layers")) * 2 * max(1, kv_heads // devices) * head * 2
    except ValueError:
        return None


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether a value of config.json can be a count: no text, no list that a product repeats."""
    return type(value) is int and 0 < value <= HIGHEST


def _whole(value: object) -> int:
    if not _is_whole(value):
        raise ValueError(f"not a count: {type(value).__name__}")
    return value


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model of one that also sees or hears."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _longest_request(model: Model, config: Mapping[str, Any]) -> int | None:
    """max_model_len, in tokens: what vLLM wants room for; None where it chooses ("auto")."""
    told = argument(model.args, "--max-model-len")
    text = _text_part(config)
    lengths = [length for key in _LENGTHS if _is_whole(length := text.get(key))]
    return _count(told) if told is not None else min(lengths, default=None)


def _one_request(model: Model, files: ModelFiles | None, devices: int) -> tuple[int, int]:
    """Tokens of the longest request and the KV cache that a token takes; zeros if not known."""
    if files is None or not _is_as_written(model):
        return 0, 0
    tokens = _longest_request(model, files.config)
    each = kv_bytes_per_token(files.config, devices)
    return (tokens, each) if tokens and each else (0, 0)


# ── VRAM ────────────────────────────────────────────────────────────────────────────────────────


def vram_needed(
    name: str,
    model: Model,
    files: ModelFiles | None,
    devices: int,
    total_bytes: int,
    smallest_bytes: int | None = None,
) -> Need | None:
    """What must be free on one of a worker's `devices`, of `total_bytes` as NVML counts.

    It is what was stated, or worked out, but never less than what vLLM looks for at its start.
    `smallest_bytes` are those of the smallest of the devices, where they differ. `files` is None
    where the weights are not known (a hub id). None: nobody says what a command takes.
    Raises ConfigInvalid for a utilization that vLLM would not take.
    """
    used = _used(model, files, devices)
    if model.engine != "vllm":
        return used
    share = utilization(name, model, files, devices, smallest_bytes or total_bytes)
    claim = math.ceil(share * total_bytes)
    claimed = Need(
        claim + CUDA_BYTES,
        (("claim", claim), ("CUDA", CUDA_BYTES)),
        f"vLLM's claim {share:g} × {total_bytes / GIB:.1f} GiB "  # noqa: RUF001 (the sign is meant)
        f"+ CUDA {CUDA_BYTES / GIB:.1f} GiB",
    )
    if used is None:
        return claimed
    return used if used.bytes >= claimed.bytes else replace(claimed, least=used.bytes)


def _used(model: Model, files: ModelFiles | None, devices: int) -> Need | None:
    """What a worker takes of each device, as stated or from its files; None: not known."""
    if model.required_vram_gib:
        stated = int(model.required_vram_gib * GIB)
        return Need(stated, (("required_vram_gib", stated),), "required_vram_gib", stated)
    if model.engine != "vllm" or files is None or not _is_as_written(model):
        return None
    tokens, each = _one_request(model, files, devices)
    return _added(
        ("weights", math.ceil(files.loaded_bytes / devices)),
        ("KV", _stated_kv(model) or tokens * each),
        ("activations", ACTIVATION_BYTES),
        ("CUDA", CUDA_BYTES),
    )


def stated_utilization(
    name: str, model: Model, files: ModelFiles | None, devices: int, smallest_bytes: int
) -> float | None:
    """The --gpu-memory-utilization with which vLLM looks for what the model states, and no more.

    None: args name one, or nothing is stated, or the weights are not known. What is left of the
    stated VRAM beside the CUDA context is claimed: rounded down, and of a total that is NVML's,
    which is the larger one, so vLLM finds free what hive has found free.
    Raises ConfigInvalid for a utilization in args that vLLM would not take.
    """
    if told_utilization(name, model) is not None:
        return None
    used = _used(model, files, devices)
    is_stated = model.required_vram_gib or _stated_kv(model)
    if used is None or not is_stated or smallest_bytes <= 0:
        return None
    shares = (used.bytes - CUDA_BYTES - 1) * SHARES // smallest_bytes
    return min(max(shares, 1), SHARES) / SHARES


def utilization(
    name: str, model: Model, files: ModelFiles | None, devices: int, smallest_bytes: int
) -> float:
    """The share of each device that vLLM claims: as told in args, as stated, or its default."""
    return (
        told_utilization(name, model)
        or stated_utilization(name, model, files, devices, smallest_bytes)
        or UTILIZATION
    )


def check_context(
    name: str, model: Model, files: ModelFiles | None, devices: Sequence[str], smallest_bytes: int
) -> ConfigInvalid | None:
    """vLLM refuses a KV cache that has no room for one request of max_model_len, after loading.

    `smallest_bytes` are those of the smallest CUDA device, of which vLLM claims its share; 0 on
    the CPU. Raises ConfigInvalid for a utilization that vLLM would not take.
    """
    tokens, each = _one_request(model, files, len(devices))
    if files is None or model.engine != "vllm" or not tokens:
        return None
    way = "a larger kv_cache_gib"
    if tuple(devices) == ("cpu",):
        room = _cpu_kv(model)
        has = f"it gets {room / GIB:g}"
    elif room := _stated_kv(model):
        has = f"it gets {room / GIB:g}"
    else:
        share = utilization(name, model, files, len(devices), smallest_bytes)
        room = int(share * smallest_bytes) - files.loaded_bytes // len(devices)
        has = f"vLLM's claim leaves {max(0, room) / GIB:.1f} beside the weights"
        way = "a higher '--gpu-memory-utilization'"
        if model.required_vram_gib and told_utilization(name, model) is None:
            way = "a higher required_vram_gib"
    if tokens * each < room:  # not equal: vLLM keeps one block back
        return None
    fits = max(0, room // each - 1) // 256 * 256
    return ConfigInvalid(
        f"models.{name}: a request of {tokens} tokens (max_model_len) needs a KV cache of "
        f"{gib_up(tokens * each)} GiB, but {has} GiB; vLLM would refuse to start.",
        action=f"In models.{name} set "
        + (f"'--max-model-len' of at most {fits} in args, or {way}." if fits else f"{way}."),
    )


def vram_error(
    model_name: str,
    device: str,
    need: Need,
    free_bytes: int,
    total_bytes: int,
    alternatives: Sequence[str],
) -> GpuVramExhausted:
    """The refusal, with what was measured and what would fit (R019, C9)."""
    required, available = gib_up(need.bytes), gib_down(free_bytes)
    hints = []
    if need.bytes <= total_bytes:
        hints.append(f"free {gib_up(need.bytes - free_bytes)} GiB on {device}")
    decided = need.parts[0][0]
    if decided == "claim":
        fits = (free_bytes - CUDA_BYTES - 1) * 100 // max(1, total_bytes) / 100
        if fits > 0 and fits * total_bytes + CUDA_BYTES >= need.least:
            hints.append(
                f"set gpu_memory_utilization to {fits:g}, the highest that fits now, and a lower "
                "max_model_len if its KV cache gets too small"
            )
        else:
            hints.append("set a lower gpu_memory_utilization and a lower max_model_len")
    elif decided == "required_vram_gib":
        hints.append(
            "state a lower required_vram_gib (for vLLM hive makes gpu_memory_utilization of it), "
            "with a lower max_model_len"
        )
    else:
        hints.append("set a lower max_model_len or kv_cache_gib")
    named = f" ({', '.join(alternatives)})" if alternatives else ""
    hints.append(f"configure a smaller model{named}")
    return GpuVramExhausted(
        f"GPU out of memory: {required}GB required, {available}GB available. "
        f"Model {model_name} needs it on {device}, which has {total_bytes / GIB:.1f} in all: "
        f"{need.source}.",
        action=f"Do one of these: {'; '.join(hints)}; explicitly choose another device; or choose "
        'the CPU with device = "cpu".',
        model=model_name,
        device=device,
        required_vram_gb=required,
        available_vram_gb=available,
        required_vram_mb=math.ceil(need.bytes / MIB),
        available_vram_mb=free_bytes // MIB,
        alternative_models=list(alternatives),
    )


# ── Host memory and disk ────────────────────────────────────────────────────────────────────────


def ram_needed(model: Model, files: ModelFiles | None, devices: Sequence[str]) -> Need | None:
    """Host memory of one worker (EH-004a); None for a command, of which nothing is known.

    On CUDA it is the least: weights are mapped and copied piece by piece, but .bin and .pt files
    are read whole, by each Worker.
    """
    if model.engine != "vllm":
        return None
    processes = ("processes", SERVER_BYTES + WORKER_BYTES * len(devices))
    if tuple(devices) != ("cpu",):
        copied = files.unmapped_bytes * len(devices) if files else 0
        return _added(processes, ("loading", copied)) if copied else _added(processes)
    kv = ("KV", _cpu_kv(model))
    if files is None:
        return _added(kv, processes)
    weights = math.ceil(files.weights_bytes * CPU_WEIGHTS)
    return _added((f"weights × {CPU_WEIGHTS}", weights), kv, processes)  # noqa: RUF001 (as above)


def cache_ram(settings: Settings) -> Need:
    """Host memory of the LMCache server."""
    chunks = int(settings.windows.kv_ram_gib * GIB)
    return _added(("chunks", chunks), ("process", CACHE_SERVER_BYTES))


def disk_needed(workers: int) -> dict[str, int]:
    """Bytes for each directory of [server]: full logs, and what engines leave for a while."""
    logs = LOG_BYTES * (LOG_FILES + 1) * workers
    return {"state_dir": STATE_BYTES + logs, "runtime_dir": TEMPORARY_BYTES * workers}
