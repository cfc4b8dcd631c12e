"""What a model needs: the laws of the sums, and what vLLM really checks."""

import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hive.errors import ConfigInvalid
from hive.settings import Model, Settings
from hive.workers.footprint import (
    ACTIVATION_BYTES,
    CACHE_SERVER_BYTES,
    CUDA_BYTES,
    GIB,
    MIB,
    SERVER_BYTES,
    SHARES,
    UTILIZATION,
    WORKER_BYTES,
    Need,
    argument,
    cache_ram,
    check_context,
    disk_needed,
    gib_down,
    gib_up,
    kv_bytes_per_token,
    ram_needed,
    stated_utilization,
    told_utilization,
    utilization,
    vram_error,
    vram_needed,
)
from hive.workers.model_files import ModelFiles

H100 = 81_559 * MIB
LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
    "is_encoder_decoder": False,
}
KV_8B = 128 * 1024  # bytes a token, as everybody quotes it for this model
# As published by its makers, shortened to what bears on the cache.
DEEPSEEK = LLAMA_8B | {"model_type": "deepseek_v3", "kv_lora_rank": 512, "q_lora_rank": 1536}
sizes = st.integers(0, 200 * GIB)


def vllm(*args: str, **keys: Any) -> Model:
    return Model.model_validate(
        {"engine": "vllm", "path": "/m", "device": "cuda:0", "args": args, **keys}
    )


def command(**keys: Any) -> Model:
    return Model.model_validate(
        {"engine": "command", "device": "cuda:0", "command": ["sh", "{socket}"], **keys}
    )


def files(weights: int, config: dict[str, Any] | None = None, **keys: int) -> ModelFiles:
    return ModelFiles(config or {}, (Path("w"),), weights, **keys)


def needed(
    model: Model,
    found: ModelFiles | None,
    devices: int = 1,
    total: int = H100,
    smallest: int | None = None,
) -> Need:
    need = vram_needed("m", model, found, devices, total, smallest)
    assert need is not None
    return need


# ── What vLLM is told ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "share"),
    [
        ((), None),
        (("--gpu-memory-utilization", "0.5"), 0.5),
        (("--gpu-memory-utilization=0.5",), 0.5),
        (("--gpu_memory_utilization=0.4",), 0.4),
        (("--gpu_memory_utilization", ".3", "--gpu-memory-utilization=0.6"), 0.6),
        (("--gpu-memory-utilization", "0.6", "--device-memory-utilization", "0.3"), 0.3),
        (("--gpu-mem", "0.3"), 0.3),
        (("--gpu-memory-utilization=1e-1",), 0.1),
        (("--served", "--gpu-memory-utilizatio", "1"), 1.0),
        (("--swap", "0.5"), None),
    ],
)
def test_the_utilization_is_read_as_vllm_reads_it(
    args: tuple[str, ...], share: float | None
) -> None:
    """Each line but the last two was given to vLLM 0.32.0's own parser, with this result."""
    assert told_utilization("m", vllm(*args)) == share
    assert utilization("m", vllm(*args), None, 1, H100) == (share or UTILIZATION)


@pytest.mark.parametrize("told", ["0", "-0.5", "1.01", "92", "half", "nan", ""])
def test_a_utilization_that_vllm_would_not_take_is_refused(told: str) -> None:
    wrong = vllm("--gpu-memory-utilization", told, required_vram_gib=4)
    found = files(GIB, LLAMA_8B)
    message = re.escape(f"models.llama.args: --gpu-memory-utilization {told}: ")
    with pytest.raises(ConfigInvalid, match=message) as caught:
        vram_needed("llama", wrong, found, 1, H100)
    with pytest.raises(ConfigInvalid, match=message):
        check_context("llama", wrong, found, ("cuda:0",), H100)
    with pytest.raises(ConfigInvalid, match=message):
        stated_utilization("llama", wrong, found, 1, H100)

    assert "models.llama.args" in caught.value.suggested_action


def test_an_option_without_its_value_has_none() -> None:
    assert argument(["--max-model-len"], "--max-model-len") is None


# ── The KV cache of a token ─────────────────────────────────────────────────────────────────────


def test_the_cache_of_a_token_is_worked_out_from_the_config() -> None:
    assert kv_bytes_per_token(LLAMA_8B) == KV_8B
    assert kv_bytes_per_token({"text_config": LLAMA_8B, "vision_config": {}}) == KV_8B
    assert kv_bytes_per_token(LLAMA_8B | {"head_dim": 256}) == 2 * KV_8B
    assert kv_bytes_per_token(LLAMA_8B | {"num_key_value_heads": None}) == 4 * KV_8B


def test_the_heads_are_spread_over_the_devices_but_each_has_one() -> None:
    assert kv_bytes_per_token(LLAMA_8B, 4) == KV_8B // 4
    assert kv_bytes_per_token(LLAMA_8B, 16) == KV_8B // 8


@pytest.mark.parametrize(
    "config",
    [
        {},
        DEEPSEEK,
        LLAMA_8B | {"sliding_window": 4096},
        LLAMA_8B | {"layer_types": ["full_attention", "linear_attention"]},
        LLAMA_8B | {"layers_block_type": ["mamba"]},
        LLAMA_8B | {"full_attention_interval": 4},
        LLAMA_8B | {"num_kv_shared_layers": 10},
        LLAMA_8B | {"is_encoder_decoder": True},
        LLAMA_8B | {"multi_query": True},
        LLAMA_8B | {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}},
        LLAMA_8B | {"num_hidden_layers": "many"},
        LLAMA_8B | {"num_attention_heads": 0, "num_key_value_heads": 0},
        LLAMA_8B | {"layer_types": [[]]},
        LLAMA_8B | {"hidden_size": float("inf")},
    ],
)
def test_a_cache_that_the_config_does_not_tell_is_not_guessed(config: dict[str, Any]) -> None:
    assert kv_bytes_per_token(config) is None


def test_what_is_there_but_not_in_use_does_not_hide_the_cache() -> None:
    qwen = LLAMA_8B | {"sliding_window": 131_072, "use_sliding_window": False}
    newer = qwen | {"layer_types": ["full_attention"] * 32, "quantization_config": {"bits": 4}}

    assert kv_bytes_per_token(newer) == KV_8B


# ── VRAM ────────────────────────────────────────────────────────────────────────────────────────


def test_what_the_operator_states_is_what_is_needed() -> None:
    need = needed(vllm(required_vram_gib=3.5), files(20 * GIB, LLAMA_8B))

    assert (need.bytes, need.source) == (3.5 * GIB, "required_vram_gib")
    assert needed(command(required_vram_gib=4), None).bytes == 4 * GIB


def test_nobody_knows_what_a_command_takes() -> None:
    assert vram_needed("m", command(), None, 1, H100) is None
    assert ram_needed(command(), None, ("cpu",)) is None


def test_vllm_looks_for_its_claim_beside_its_own_context() -> None:
    need = needed(vllm(), files(15 * GIB, LLAMA_8B))

    assert need.bytes == pytest.approx(0.92 * H100 + CUDA_BYTES, abs=1)
    assert need.source == "vLLM's claim 0.92 × 79.6 GiB + CUDA 0.5 GiB"  # noqa: RUF001 (the sign is meant)
    assert sum(size for _, size in need.parts) == need.bytes


@pytest.mark.parametrize("model", [vllm(kv_cache_gib=4), vllm("--kv-cache-memory-bytes", "4G")])
def test_a_stated_kv_cache_is_claimed_with_the_rest_and_no_more(model: Model) -> None:
    """vLLM looks for its claim even where --kv-cache-memory-bytes is given (request_memory)."""
    need = needed(model, files(15 * GIB, LLAMA_8B))

    assert need.bytes == 19 * GIB + ACTIVATION_BYTES + CUDA_BYTES
    assert need.source == "weights 15.0 + KV 4.0 + activations 1.0 + CUDA 0.5 GiB"


@pytest.mark.parametrize(
    ("found", "args"), [(None, ()), (files(15 * GIB, LLAMA_8B), ("--quantization", "fp8"))]
)
def test_without_known_weights_a_stated_kv_cache_does_not_lower_the_claim(
    found: ModelFiles | None, args: tuple[str, ...]
) -> None:
    model = vllm(*args, kv_cache_gib=4)

    assert needed(model, found) == needed(vllm(), None)
    assert stated_utilization("m", model, found, 1, H100) is None


@pytest.mark.parametrize(
    ("args", "gib"),
    [
        ((), 30.0),
        (("--gpu-mem=0.2",), 30.0),
        (("--gpu-mem=0.5",), 40.32),
        (("--gpu-mem=1",), 80.15),
    ],
)
def test_of_a_stated_need_and_a_stated_utilization_the_larger_one_counts(
    args: tuple[str, ...], gib: float
) -> None:
    model = vllm(*args, required_vram_gib=30)

    assert needed(model, None).bytes / GIB == pytest.approx(gib, abs=0.01)
    assert (stated_utilization("m", model, None, 1, H100) is None) == bool(args)


def test_vllm_is_told_a_share_only_of_what_is_stated() -> None:
    found = files(15 * GIB, LLAMA_8B)
    half = vllm(required_vram_gib=H100 / GIB / 2 + 0.5)

    assert stated_utilization("m", vllm(), found, 1, H100) is None
    assert stated_utilization("m", vllm(kv_cache_gib=4), found, 1, H100) == 0.2511  # 20 of 79.65
    assert stated_utilization("m", half, None, 1, H100) == 0.4999  # the context comes to it
    assert stated_utilization("m", vllm(required_vram_gib=99_999), None, 1, H100) == 1


def test_a_stated_need_below_the_cuda_context_is_not_believed() -> None:
    need = needed(vllm(required_vram_gib=0.1), None)

    assert stated_utilization("m", vllm(required_vram_gib=0.1), None, 1, H100) == 1 / SHARES
    assert need.bytes == CUDA_BYTES + -(-H100 // SHARES)


def test_of_unequal_devices_the_larger_one_must_have_its_own_share_free() -> None:
    """vLLM has one utilization for all of them; the smallest one decides."""
    model = vllm(required_vram_gib=16.5)
    small = needed(model, None, 2, 20 * GIB, 20 * GIB)
    large = needed(model, None, 2, 80 * GIB, 20 * GIB)

    assert small.source == "required_vram_gib"
    assert large.bytes / GIB == pytest.approx(4 * 16 + 0.5, abs=0.01)
    assert large.source.startswith("vLLM's claim 0.7999")


def vllm_starts(share: float, total: int, free: int) -> bool:
    """request_memory (vllm/v1/worker/utils.py), of CUDA's own total, which is the smaller one."""
    return free - CUDA_BYTES >= math.ceil(total * share)


@given(
    st.integers(1, 400).map(lambda quarters: quarters / 4),
    st.booleans(),
    sizes,
    st.integers(1, 8),
    st.integers(8 * GIB, 200 * GIB),
    st.integers(0, 2000),
)
def test_vllm_finds_free_what_hive_has_found_free_and_little_less_would_not_do(
    gib: float, is_kv: bool, weights: int, devices: int, total: int, reserved: int
) -> None:
    """The law of this module: the preflight's yes is vLLM's yes, and its no is not a whim."""
    model = vllm(**{"kv_cache_gib" if is_kv else "required_vram_gib": gib})
    found = files(weights, LLAMA_8B)
    need = needed(model, found, devices, total).bytes
    share = stated_utilization("m", model, found, devices, total)
    assume(need <= total)

    assert share is not None
    assert 0 < share <= 1
    assert vllm_starts(share, total, free=need)
    assert vllm_starts(share, total - reserved * MIB, free=need)
    assert not vllm_starts(share, total, free=need - total // SHARES - 3)


def test_what_the_model_takes_counts_where_it_is_more_than_the_claim() -> None:
    low = ("--gpu-memory-utilization", "0.1")
    need = needed(vllm(*low, kv_cache_gib=4), files(15 * GIB, LLAMA_8B))

    assert need.bytes == 19 * GIB + ACTIVATION_BYTES + CUDA_BYTES
    assert need.source == "weights 15.0 + KV 4.0 + activations 1.0 + CUDA 0.5 GiB"
    args = needed(vllm(*low, "--kv-cache-memory-bytes=4G"), files(15 * GIB, LLAMA_8B))
    assert args == need


def test_without_a_stated_kv_cache_one_request_must_fit() -> None:
    low = ("--gpu-memory-utilization", "0.1", "--max-model-len")
    found = files(15 * GIB, LLAMA_8B)

    assert dict(needed(vllm(*low[:2]), found).parts)["KV"] == 131_072 * KV_8B
    assert dict(needed(vllm(*low, "8K"), found).parts)["KV"] == 8192 * KV_8B
    assert dict(needed(vllm(*low, "8k"), found).parts)["KV"] == 8000 * KV_8B
    assert dict(needed(vllm(*low, "auto"), found).parts)["KV"] == 0


def test_weights_are_spread_over_the_devices() -> None:
    need = needed(vllm("--gpu-mem=0.01"), files(64 * GIB), devices=4)

    assert dict(need.parts)["weights"] == 16 * GIB


@pytest.mark.parametrize(
    "args",
    [
        ("--quantization", "fp8"),
        ("-q", "fp8"),
        ("--load_format=dummy",),
        ("--kv-cache-dtype", "fp8"),
        ("-tp", "8"),
        ("--cpu-offload-gb=30",),
    ],
)
def test_only_the_claim_counts_where_arguments_change_the_sizes(args: tuple[str, ...]) -> None:
    assert needed(vllm(*args, "--gpu-mem=0.1"), files(70 * GIB, LLAMA_8B)).parts[0][0] == "claim"
    assert check_context("m", vllm(*args), files(15 * GIB, LLAMA_8B), ("cpu",), 0) is None


shares = st.integers(1, 100).map(lambda percent: percent / 100)


@given(sizes, sizes, st.integers(0, 100), shares, st.integers(1, 8), st.integers(GIB, 200 * GIB))
def test_the_need_grows_with_each_of_its_parts_and_covers_claim_and_use(
    weights: int, more: int, kv_gib: int, share: float, devices: int, total: int
) -> None:
    def need(weights: int, kv_gib: int, share: float, total: int) -> Need:
        model = vllm(f"--gpu-memory-utilization={share}", kv_cache_gib=kv_gib)
        return needed(
            model, files(weights, LLAMA_8B | {"max_position_embeddings": 1}), devices, total
        )

    least = need(weights, kv_gib, share, total)

    assert need(weights + more, kv_gib, share, total).bytes >= least.bytes
    assert need(weights, kv_gib + 1, share, total).bytes >= least.bytes
    assert need(weights, kv_gib, min(1, share + 0.01), total).bytes >= least.bytes
    assert need(weights, kv_gib, share, total + more).bytes >= least.bytes
    assert least.bytes >= share * total
    assert least.bytes >= weights / devices + kv_gib * GIB
    assert least.bytes == sum(size for _, size in least.parts) >= least.least > 0


# ── One request must fit ────────────────────────────────────────────────────────────────────────


def test_a_cache_without_room_for_one_request_is_refused_with_what_would_fit() -> None:
    found = files(15 * GIB, LLAMA_8B)
    error = check_context("llama", vllm(kv_cache_gib=4), found, ("cuda:0",), H100)

    assert error is not None
    assert error.message == (
        "models.llama: a request of 131072 tokens (max_model_len) needs a KV cache of 16.0 GiB, "
        "but it gets 4 GiB; vLLM would refuse to start."
    )
    assert "'--max-model-len' of at most 32512 in args" in error.suggested_action
    assert "larger kv_cache_gib" in error.suggested_action


def test_the_length_that_is_said_to_fit_does_and_a_little_more_does_not() -> None:
    found = files(15 * GIB, LLAMA_8B)

    def error(tokens: int) -> ConfigInvalid | None:
        model = vllm("--max-model-len", str(tokens), kv_cache_gib=4)
        return check_context("m", model, found, ("cuda:0",), H100)

    assert error(32_512) is None
    assert error(32_768) is not None  # vLLM keeps a block back


def test_a_stated_need_that_leaves_no_room_beside_the_weights() -> None:
    found = files(15 * GIB, LLAMA_8B)

    assert check_context("m", vllm(required_vram_gib=32), found, ("cuda:0",), H100) is None
    error = check_context("m", vllm(required_vram_gib=16.5), found, ("cuda:0",), H100)
    assert error is not None
    assert "vLLM's claim leaves 1.0 beside the weights" in error.message
    assert "a higher required_vram_gib" in error.suggested_action
    told = vllm("--gpu-mem=0.2", required_vram_gib=16.5)
    error = check_context("m", told, found, ("cuda:0",), H100)
    assert error is not None
    assert "a higher '--gpu-memory-utilization'" in error.suggested_action


@pytest.mark.parametrize(
    ("model", "gib"),
    [
        (vllm(device="cpu"), 1),
        (vllm(device="cpu", kv_cache_gib=0.5), 0.5),
        (vllm("--kv-cache-memory-bytes=2G", device="cpu", kv_cache_gib=0.5), 2),
        (vllm("--kv-cache-mem=2G", device="cpu", env={"VLLM_CPU_KVCACHE_SPACE": "3"}), 3),
        (vllm(device="cpu", env={"VLLM_CPU_KVCACHE_SPACE": ""}), 1),
    ],
)
def test_on_the_cpu_the_kv_cache_is_the_one_that_wins_in_vllm(model: Model, gib: float) -> None:
    need = ram_needed(model, None, ("cpu",))
    error = check_context("m", model, files(GIB, LLAMA_8B), ("cpu",), 0)

    assert need is not None
    assert dict(need.parts)["KV"] == gib * GIB
    assert error is not None
    assert f"but it gets {gib:g} GiB" in error.message


def test_on_the_cpu_there_is_one_gib_unless_more_is_stated() -> None:
    found = files(15 * GIB, LLAMA_8B)

    assert check_context("m", vllm("--max-model-len=8000"), found, ("cpu",), 0) is None
    assert check_context("m", vllm(), found, ("cpu",), 0) is not None
    assert check_context("m", vllm(kv_cache_gib=17), found, ("cpu",), 0) is None


def test_a_claim_that_leaves_no_room_beside_the_weights() -> None:
    found = files(15 * GIB, LLAMA_8B)
    low = vllm("--gpu-memory-utilization", "0.2")

    assert check_context("m", vllm(), found, ("cuda:0",), H100) is None
    assert check_context("m", low, found, ("cuda:0", "cuda:1"), H100) is None
    error = check_context("m", low, found, ("cuda:0",), H100)
    assert error is not None
    assert "vLLM's claim leaves 0.9 beside the weights" in error.message
    assert "a higher '--gpu-memory-utilization'" in error.suggested_action
    assert "at most 7424" in error.suggested_action


def test_a_claim_below_the_weights_is_not_mended_by_a_shorter_request() -> None:
    low = vllm("--gpu-memory-utilization", "0.1")
    error = check_context("m", low, files(15 * GIB, LLAMA_8B), ("cuda:0",), H100)

    assert error is not None
    assert "--max-model-len" not in error.suggested_action


@pytest.mark.parametrize("config", [{}, DEEPSEEK, {"num_hidden_layers": 32}])
def test_what_is_not_known_is_not_refused(config: dict[str, Any]) -> None:
    assert check_context("m", vllm(), files(GIB, config), ("cpu",), 0) is None
    assert check_context("m", vllm(), None, ("cpu",), 0) is None
    assert check_context("m", command(), files(GIB, LLAMA_8B), ("cpu",), 0) is None


# ── The error ───────────────────────────────────────────────────────────────────────────────────


def test_the_error_has_what_was_measured_and_what_to_do() -> None:
    need = Need(int(14.2 * GIB), (("weights", int(14.2 * GIB)),), "weights 14.2 GiB")
    error = vram_error("llama", "cuda:1", need, int(8.15 * GIB), 24 * GIB, ("phi", "tiny"))

    assert error.message == (
        "GPU out of memory: 14.2GB required, 8.1GB available. Model llama needs it on cuda:1, "
        "which has 24.0 in all: weights 14.2 GiB."
    )
    assert error.public_details == {
        "model": "llama",
        "device": "cuda:1",
        "required_vram_gb": 14.2,
        "available_vram_gb": 8.1,
        "required_vram_mb": 14_541,
        "available_vram_mb": 8_345,
        "alternative_models": ["phi", "tiny"],
    }
    for hint in ("free 6.1 GiB on cuda:1", "max_model_len", "(phi, tiny)", 'device = "cpu"'):
        assert hint in error.suggested_action
    assert "explicitly choose another device" in error.suggested_action


def test_freeing_is_no_advice_where_the_device_is_too_small() -> None:
    need = needed(vllm(), files(70 * GIB, LLAMA_8B), total=24 * GIB)
    error = vram_error("m", "cuda:0", need, 23 * GIB, 24 * GIB, ())

    assert "free " not in error.suggested_action
    assert "configure a smaller model;" in error.suggested_action
    assert error.details["alternative_models"] == []


def test_a_stated_requirement_can_be_stated_lower() -> None:
    need = needed(vllm(required_vram_gib=30), None)
    error = vram_error("m", "cuda:0", need, 23 * GIB, H100, ())

    assert "lower required_vram_gib" in error.suggested_action
    assert "gpu_memory_utilization" in error.suggested_action


def offered(need: Need, free: int, total: int) -> str | None:
    action = vram_error("m", "cuda:0", need, free, total, ()).suggested_action
    match = re.search(r"gpu_memory_utilization to ([\d.]+), the highest", action)
    return match[1] if match else None


def test_no_utilization_is_offered_with_which_the_model_would_not_fit() -> None:
    need = needed(vllm(), files(60 * GIB))

    assert offered(need, 50 * GIB, H100) is None
    assert offered(need, 65 * GIB, H100) == "0.8"


@given(st.integers(GIB, 60 * GIB), st.integers(16 * GIB, 200 * GIB), st.integers(0, 90))
def test_the_highest_utilization_that_fits_is_offered(
    weights: int, total: int, percent_free: int
) -> None:
    free, found = total * percent_free // 100, files(weights)

    def at(share: float) -> Need:
        return needed(vllm(f"--gpu-memory-utilization={share:.2f}"), found, total=total)

    need = at(UTILIZATION)
    share = offered(need, free, total) if need.parts[0][0] == "claim" else None

    if share:
        assert at(float(share)).bytes <= free
        assert at(float(share) + 0.02).bytes > free
    else:  # with every claim that fits, the model itself does not fit into the claim
        fits = [at(percent / 100) for percent in range(1, 93)]
        assert all(n.bytes > free or n.parts[0][0] == "weights" for n in fits)


@given(sizes, sizes)
def test_a_shortage_never_reads_as_none(need: int, free: int) -> None:
    assume(need > free)

    assert gib_up(need) > gib_down(free)


# ── Host memory and disk ────────────────────────────────────────────────────────────────────────


def test_on_the_cpu_weights_times_1_2_the_kv_cache_and_the_processes_are_needed() -> None:
    found = files(5000 * MIB)
    need = ram_needed(vllm(device="cpu"), found, ("cpu",))

    assert need is not None
    assert need.parts[0] == ("weights × 1.2", 6000 * MIB)  # noqa: RUF001 (the sign is meant)
    assert need.bytes == 6000 * MIB + GIB + SERVER_BYTES + WORKER_BYTES
    more = ram_needed(vllm(device="cpu", kv_cache_gib=3), found, ("cpu",))
    assert more is not None
    assert more.bytes == need.bytes + 2 * GIB


def test_of_a_hub_id_only_the_rest_is_known() -> None:
    need = ram_needed(vllm(device="cpu"), None, ("cpu",))

    assert need is not None
    assert need.bytes == GIB + SERVER_BYTES + WORKER_BYTES


def test_on_cuda_only_what_is_read_whole_counts_once_for_each_device() -> None:
    pair = ("cuda:0", "cuda:1")
    mapped = ram_needed(vllm(), files(100 * GIB), pair)
    copied = ram_needed(vllm(), files(100 * GIB, unmapped_bytes=5 * GIB), pair)

    assert mapped is not None
    assert copied is not None
    assert mapped.bytes == SERVER_BYTES + 2 * WORKER_BYTES
    assert copied.bytes == mapped.bytes + 10 * GIB


@given(st.floats(0.1, 100_000))
def test_lmcache_needs_its_chunks_and_its_process(gib: float) -> None:
    need = cache_ram(Settings.model_validate({"windows": {"kv_ram_gib": gib}, "models": {}}))

    assert need.bytes == int(gib * GIB) + CACHE_SERVER_BYTES
    assert "chunks" in need.source
    assert "process" in need.source


def test_each_worker_may_fill_its_logs() -> None:
    none, three = disk_needed(0), disk_needed(3)

    assert three["state_dir"] - none["state_dir"] == 3 * 4 * 8 * MIB
    assert none["runtime_dir"] == 0 < three["runtime_dir"]


# ── Configurations that make no sense ───────────────────────────────────────────────────────────

KEYS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_size", "max_position_embeddings", "layer_types"),
)
JUNK = (float("inf"), float("nan"), 1.5, True, "x", [1], {"a": 1}, -1, 10**400, [["x"]], 5)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", JUNK, ids=lambda value: f"{value!r:.12}")
def test_a_config_of_any_content_is_read_without_an_error(key: str, value: object) -> None:
    found = files(GIB, LLAMA_8B | {key: value})
    for model in (vllm(), vllm(kv_cache_gib=1), vllm("--max-model-len", "9" * 400)):
        needed(model, found)
        assert check_context("m", model, found, ("cuda:0",), 80 * GIB) is None or value == 5


@pytest.mark.parametrize("layers", ["x", [1]])
def test_a_text_or_a_list_is_not_repeated_by_what_it_is_multiplied_with(layers: object) -> None:
    """Ten thousand million times, for other numbers of the same file."""
    tracemalloc.start()
    config = {"num_attention_heads": 1, "num_hidden_layers": layers, "head_dim": 10**6}

    assert kv_bytes_per_token(config) is None
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_variable_of_the_cpus_cache_that_is_no_number_is_not_read_as_one() -> None:
    for told in ("9" * 5000, "٣", "x", "-1"):
        model = vllm(device="cpu", env={"VLLM_CPU_KVCACHE_SPACE": told})
        need = ram_needed(model, files(GIB), ("cpu",))
        assert need is not None
        assert dict(need.parts)["KV"] == GIB


def test_a_device_without_memory_has_room_for_nothing() -> None:
    model = vllm(kv_cache_gib=1)
    need = vram_needed("m", model, files(GIB, LLAMA_8B), 1, 0)

    assert stated_utilization("m", model, files(GIB, LLAMA_8B), 1, 0) is None
    assert need is not None
    assert vram_error("m", "cuda:0", need, 0, 0, ()).details["available_vram_gb"] == 0
