"""A model that is not whole is told before an engine tries to load it."""

import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hive.errors import ConfigInvalid
from hive.workers.model_files import HEADER_BYTES, TOLD, ModelFiles, model_files
from tests.patience import short_directory

MIB = 2**20
INDEX = "model.safetensors.index.json"


def tensor(start: int, stop: int, dtype: str = "BF16") -> dict[str, Any]:
    width = {"BF16": 2, "F32": 4}[dtype]
    return {"dtype": dtype, "shape": [(stop - start) // width], "data_offsets": [start, stop]}


def safetensors(file: Path, tensors: dict[str, Any], data_bytes: int) -> int:
    """Write a file with a real header and `data_bytes` that take no room on the disk; its size."""
    header = json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode()
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        out.truncate(8 + len(header) + data_bytes)
    return file.stat().st_size


def index(directory: Path, *files: str, name: str = INDEX) -> None:
    shards = {f"layers.{number}": file for number, file in enumerate(files)}
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model of one file with two tensors."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    whole = {"a": tensor(0, MIB), "b": tensor(MIB, 3 * MIB, "F32")}
    safetensors(tmp_path / "model.safetensors", whole, 3 * MIB)
    return tmp_path


def look(path: Path) -> ModelFiles:
    return model_files("m", path)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigInvalid) as refused:
        look(path)
    assert refused.value.message.startswith(f"models.m.path: {path} is no whole model: ")
    return refused.value.message.partition("whole model: ")[2]


# ── A whole model ───────────────────────────────────────────────────────────────────────────────


def test_a_whole_model_tells_its_size_and_its_config(model: Path) -> None:
    found = look(model)

    assert found.weights_bytes == (model / "model.safetensors").stat().st_size
    assert found.config == {"num_hidden_layers": 2}
    assert found.files == (model / "model.safetensors",)
    assert found.unmapped_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("BOOL", [12]), ("F8_E4M3", [3, 4]), ("F4", [24]), ("I64", [1, 1]), ("U8", [12]), ("F64", [])],
)
def test_every_width_of_a_tensor_is_known(model: Path, dtype: str, shape: list[int]) -> None:
    size = 8 if dtype in ("I64", "F64") else 12
    one = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    safetensors(model / "model.safetensors", one, size)

    assert look(model).weights_bytes > size


def test_what_is_float32_takes_half_when_loaded(model: Path) -> None:
    found = look(model)

    assert found.float32_bytes == 2 * MIB
    assert found.loaded_bytes == found.weights_bytes - MIB


def test_two_hundred_shards_of_four_gib_are_looked_at_and_not_read(model: Path) -> None:
    """However large, a model never sits in hive's memory (R147)."""
    (model / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-00200.safetensors" for number in range(200)]
    size = 4 * 1024 * MIB
    sizes = [safetensors(model / name, {"w": tensor(0, size)}, size) for name in names]
    index(model, *names)

    tracemalloc.start()
    assert look(model).weights_bytes == sum(sizes) > 200 * size
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MIB


def test_links_are_followed_as_in_the_hubs_cache(model: Path) -> None:
    blobs = model / "blobs"
    blobs.mkdir()
    (model / "model.safetensors").rename(blobs / "abc")
    (model / "model.safetensors").symlink_to("blobs/abc")

    assert look(model).weights_bytes == (blobs / "abc").stat().st_size


def test_only_the_files_of_the_index_are_counted(model: Path) -> None:
    safetensors(model / "extra.safetensors", {"w": tensor(0, 10)}, 10)
    index(model, "model.safetensors", "model.safetensors")

    assert look(model).files == (model / "model.safetensors",)


def test_the_plain_index_wins_over_a_variants(model: Path) -> None:
    index(model, "model.safetensors")
    index(model, "gone.safetensors", name="model.fp16.safetensors.index.json")

    assert look(model).files == (model / "model.safetensors",)


def test_mistrals_own_file_is_loaded_alone(model: Path) -> None:
    size = safetensors(model / "consolidated.safetensors", {"w": tensor(0, 10)}, 10)
    index(model, "model.safetensors")

    assert look(model).weights_bytes == size


def test_safetensors_win_over_the_same_weights_in_pickles(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x" * 100)

    assert look(model).files == (model / "model.safetensors",)


def test_pickles_are_read_whole_so_the_largest_one_counts(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model-1.bin").write_bytes(b"x" * 100)
    (model / "pytorch_model-2.bin").write_bytes(b"x" * 300)
    (model / "training_args.bin").write_bytes(b"")

    found = look(model)

    assert (found.weights_bytes, found.unmapped_bytes) == (400, 300)


# ── What is wrong ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "config.json is not JSON"),
        ("{", "config.json is not JSON"),
        ("[1]", "config.json is not a JSON object"),
        ("[" * 100_000, "config.json is not JSON"),
    ],
)
def test_a_config_that_is_none(model: Path, content: str, says: str) -> None:
    (model / "config.json").write_text(content)

    assert refusal(model) == f"{says}."


def test_a_config_that_is_no_text(model: Path) -> None:
    (model / "config.json").write_bytes(b'{"a": "\xff"}')

    assert refusal(model) == "config.json is not JSON."


def test_a_config_that_is_missing_or_a_directory(model: Path) -> None:
    (model / "config.json").unlink()
    assert refusal(model) == "config.json is missing."

    (model / "config.json").mkdir()
    assert refusal(model) == "config.json is not a file."


def test_no_weights_at_all(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "optimizer.bin").write_bytes(b"x")

    assert refusal(model).startswith("there are no weights (*.safetensors")


def test_a_directory_that_is_not_there(model: Path) -> None:
    said = refusal(model / "gone")

    assert "config.json is missing" in said
    assert "gone is missing" in said


def test_a_shard_of_the_index_that_is_missing_is_named(model: Path) -> None:
    index(model, "model.safetensors", "model-2.safetensors")

    assert refusal(model) == "model-2.safetensors is missing."


def test_a_link_into_the_hubs_cache_that_leads_nowhere_is_named(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blobs/abc")

    assert refusal(model) == "model.safetensors is missing (a link to ../blobs/abc)."


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "x"])
def test_an_index_that_names_no_files(model: Path, content: str) -> None:
    (model / INDEX).write_text(content)

    assert f"{INDEX} names no files" in refusal(model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_an_empty_file(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).touch()

    assert refusal(model) == f"{name} is empty."


def test_a_git_lfs_pointer_is_told_apart(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n"
    (model / "model.safetensors").write_text(pointer)

    assert "Git LFS pointer" in refusal(model)


def test_a_pipe_is_not_waited_for(model: Path) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")

    assert refusal(model) == "model.safetensors is not a file."


def test_a_file_with_something_after_the_last_tensor(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"x")

    assert "model.safetensors is too long" in refusal(model)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": tensor(0, 4), "b": tensor(6, 8)},
        {"a": tensor(0, 6), "b": tensor(4, 8)},
        {"a": tensor(4, 8)},
        {"a": tensor(8, 0)},
        {"a": tensor(0, 8) | {"shape": [5]}},
        {"a": tensor(0, 8) | {"dtype": "BF17"}},
        {"a": tensor(0, 8) | {"dtype": "BF"}},
        {"a": {"dtype": "BF16"}},
        {"a": {"data_offsets": [0, 8]}},
        {"a": tensor(0, 8) | {"data_offsets": [0, 8, 9]}},
        {"a": tensor(0, 8) | {"data_offsets": [0, "8"]}},
        {"a": tensor(0, 8) | {"data_offsets": None}},
        {"a": 3},
        {"a": tensor(0, 8) | {"data_offsets": [0, float("inf")]}},
        {"a": tensor(0, 8) | {"data_offsets": [0, 8.0]}},
        {"a": tensor(0, 8) | {"data_offsets": [0, 10**400]}},
        {"a": tensor(0, 8) | {"shape": [float("inf")]}},
        {"a": tensor(0, 8) | {"shape": [10**300] * 10}},
        {"a": tensor(0, 8) | {"shape": "4"}},
        {"a": tensor(0, 8) | {"dtype": "F" + "9" * 5000}},
    ],
    ids=lambda tensors: f"{tensors!r:.60}",
)
def test_a_header_that_makes_no_sense(model: Path, tensors: dict[str, Any]) -> None:
    safetensors(model / "model.safetensors", tensors, 8)

    assert "model.safetensors has a damaged header" in refusal(model)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES + 1, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_not_read(model: Path, length: int) -> None:
    with (model / "model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2 * HEADER_BYTES)

    assert f"has a damaged header (of {length} bytes, it says)" in refusal(model)


@pytest.mark.parametrize("header", [b"no JSON!", b"[1, 2]  ", b'{"a": \xff}', b"[" * 100_000])
def test_a_header_that_is_no_object(model: Path, header: bytes) -> None:
    whole = len(header).to_bytes(8, "little") + header
    (model / "model.safetensors").write_bytes(whole)

    assert "model.safetensors has a damaged header" in refusal(model)


WHOLE = {"a": tensor(0, 100), "b": tensor(100, 160, "F32")}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_truncated_anywhere_is_found(model: Path, data: st.DataObject) -> None:
    file = model / "model.safetensors"
    size = safetensors(file, WHOLE, 160)
    assert look(model).weights_bytes == size

    os.truncate(file, data.draw(st.integers(0, size - 1)))

    assert refusal(model).startswith(
        ("model.safetensors is truncated", "model.safetensors is empt")
    )


def test_all_that_is_wrong_is_told_at_once_and_within_bounds(model: Path) -> None:
    (model / "config.json").unlink()
    index(model, "model.safetensors", *(f"gone-{number}.safetensors" for number in range(20)))
    os.truncate(model / "model.safetensors", 100)

    said = refusal(model)

    assert said.startswith("config.json is missing; gone-0.safetensors is missing; ")
    assert said.count("; ") == TOLD
    assert said.endswith(f"; and {22 - TOLD} more.")


# ── Permissions ─────────────────────────────────────────────────────────────────────────────────


@contextmanager
def nobody() -> Iterator[int]:
    """As an ordinary user: root reads everything."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    os.seteuid(65534)
    try:
        yield 65534
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_hives_user_may_not_read(name: str) -> None:
    with short_directory() as directory:
        directory.chmod(0o755)
        (directory / "config.json").write_text("{}")
        safetensors(directory / "model.safetensors", WHOLE, 160)
        (directory / name).chmod(0o200)

        with nobody() as user:
            said = refusal(directory)

    assert said == (
        f"{name} cannot be read by user {user}: Permission denied "
        f"(mode 0200, owner {os.geteuid()})."
    )


def test_a_directory_that_hives_user_may_not_enter() -> None:
    with short_directory() as directory:
        (directory / "m").mkdir(mode=0)
        directory.chmod(0o755)

        with nobody() as user:
            said = refusal(directory / "m")
        (directory / "m").chmod(0o700)

    assert f"config.json cannot be read by user {user}: Permission denied" in said
    assert "(mode 0000" in said
