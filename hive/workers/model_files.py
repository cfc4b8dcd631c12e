"""Whether a model's files are whole and readable, and how large its weights are (R017)."""

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from hive.errors import ConfigInvalid

HEADER_BYTES = 100_000_000  # the longest header that the safetensors library reads
HIGHEST = 2**53  # of any number in a header; a larger one is no size of anything
TOLD = 5  # problems of one model that are told one by one
_KINDS = (".safetensors", ".bin", ".pt")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A whole model: its config.json, and the sizes of the weights that vLLM would load.

    `float32_bytes` of the weights are halved when loaded: vLLM's dtype "auto" casts to 16 bit.
    `unmapped_bytes` is the largest file that loading copies whole (.bin, .pt); safetensors are
    mapped.
    """

    config: Mapping[str, Any]
    files: tuple[Path, ...]
    weights_bytes: int
    float32_bytes: int = 0
    unmapped_bytes: int = 0

    @property
    def loaded_bytes(self) -> int:
        return self.weights_bytes - self.float32_bytes // 2


def model_files(name: str, path: Path) -> ModelFiles:
    """Look at every file that vLLM would load from a directory, without reading the weights.

    Raises one ConfigInvalid that names models.NAME.path and all that is missing, truncated,
    damaged, or not readable by this user.
    """
    problems: list[str] = []
    config = _json_object(path / "config.json", problems)
    files = _weights(path, problems)
    weights = float32 = unmapped = 0
    for file in files:
        try:
            size, of_float32 = _inspect(file)
        except (OSError, ValueError) as exc:
            problems.append(_problem(file, exc))
            continue
        weights, float32 = weights + size, float32 + of_float32
        if file.suffix != ".safetensors":
            unmapped = max(unmapped, size)
    if problems:
        more = f"; and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        raise ConfigInvalid(
            f"models.{name}.path: {path} is no whole model: {'; '.join(problems[:TOLD])}{more}.",
            action="Copy or download the named files again, and let hive's user read them.",
        )
    return ModelFiles(config, files, weights, float32, unmapped)


def _problem(file: Path, exc: OSError | ValueError) -> str:
    if not isinstance(exc, OSError):
        return f"{file.name} {exc}"
    if exc.errno == errno.ENOENT:
        gone = f" (a link to {os.readlink(file)})" if file.is_symlink() else ""
        return f"{file.name} is missing{gone}"
    try:
        about = file.stat()
        whose = f" (mode {stat.S_IMODE(about.st_mode):04o}, owner {about.st_uid})"
    except OSError:
        whose = ""
    return f"{file.name} cannot be read by user {os.geteuid()}: {exc.strerror}{whose}"


def _json_object(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        with _regular(file) as opened:
            # A read takes the memory for all that it may read.
            size = min(os.fstat(opened.fileno()).st_size, HEADER_BYTES)
            found = json.loads(opened.read(size))
        if isinstance(found, dict):
            return found
        problems.append(f"{file.name} is not a JSON object")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        problems.append(f"{file.name} is not JSON")
    except (OSError, ValueError) as exc:
        problems.append(_problem(file, exc))
    return {}


def _weights(path: Path, problems: list[str]) -> tuple[Path, ...]:
    """The files that vLLM's loader chooses: of the first kind that is there, those in the index."""
    try:
        names = sorted(os.listdir(path))
    except OSError as exc:
        problems.append(_problem(path, exc))
        return ()
    # Mistral's own format wins over the same weights in Hugging Face's beside it.
    for prefix, kind in (("consolidated", ".safetensors"), *(("", k) for k in _KINDS)):
        of_kind = [n for n in names if n.startswith(prefix) and n not in _NOT_WEIGHTS]
        chosen = [n for n in of_kind if n.endswith(kind)]
        indices = [n for n in of_kind if n.endswith(f"{kind}.index.json")]
        if indices:  # the shortest name is the plain one; others are of variants (fp16, say)
            index = path / min(indices, key=len)
            shards = _json_object(index, problems).get("weight_map")
            if isinstance(shards, dict) and shards:
                chosen = sorted({str(shard) for shard in shards.values()})
            else:
                problems.append(f"{index.name} names no files")
        if chosen:
            return tuple(path / n for n in chosen)
    problems.append("there are no weights (*.safetensors, *.bin or *.pt)")
    return ()


def _regular(file: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, ValueError for what is none (a pipe would block)."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("is not a file")
    return open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")


def _inspect(file: Path) -> tuple[int, int]:
    """Size, and how much of it is float32. Raises OSError, or ValueError with what is wrong."""
    with _regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if not size:
            raise ValueError("is empty")
        head = opened.read(8)
        if head == b"version ":
            raise ValueError("is a Git LFS pointer, not the weights ('git lfs pull' fetches them)")
        return size, _float32(head, opened, size) if file.suffix == ".safetensors" else 0


def _float32(head: bytes, opened: BinaryIO, size: int) -> int:
    """Check a safetensors file: 8 bytes of length, a JSON header, tensors without a gap.

    The bytes of float32 tensors. Raises ValueError saying what is wrong.
    """
    length = int.from_bytes(head, "little")
    if size >= 8 and not 2 <= length <= HEADER_BYTES:  # noqa: PLR2004 (the length's size, "{}")
        raise ValueError(f"has a damaged header (of {length} bytes, it says)")
    if size < 8 + length:
        raise ValueError(f"is truncated ({size} bytes are not even its header)")
    text = opened.read(length)
    try:
        tensors = [_Tensor.of(v) for k, v in json.loads(text).items() if k != "__metadata__"]
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as exc:
        raise ValueError("has a damaged header") from exc
    end, float32, is_whole = 0, 0, True
    for start, stop, is_float32, bits in sorted(tensors):
        is_whole = is_whole and start == end and bits == (stop - start) * 8
        end, float32 = stop, float32 + (stop - start) * is_float32
    whole = 8 + length + end
    if not is_whole:
        raise ValueError("has a damaged header (a tensor is not where or what it should be)")
    if size != whole:
        what = "is truncated" if size < whole else "is too long"
        raise ValueError(f"{what} ({size} bytes instead of {whole})")
    return float32


class _Tensor(NamedTuple):
    """Where a header says that a tensor is, and how large its shape and type make it."""

    start: int
    stop: int
    is_float32: bool
    bits: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Raises AttributeError, LookupError, TypeError or ValueError for what is no entry."""
        start, stop = map(_whole, entry["data_offsets"])
        dtype, bits = entry["dtype"], 1
        for size in entry["shape"]:
            bits = _whole(bits * _whole(size))
        each = 8 if dtype == "BOOL" else int(re.findall(r"\d{1,4}", dtype)[0])
        return cls(start, stop, dtype == "F32", bits * each)


def _whole(number: object) -> int:
    """A number as a header may have it. Raises ValueError."""
    if type(number) is not int or not 0 <= number <= HIGHEST:
        raise ValueError("not a size")
    return number
