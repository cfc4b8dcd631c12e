"""Windows without a daemon: a KV tier with blocks in it, and what is frozen of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hive.policy.windows import Identity, Shape, block_names, chain
from hive.storage.catalogue import Window
from hive.windows.files import Manifest, WindowFiles, made

CHUNK = 16
SAID = {"kind": "chat", "body": {"messages": [{"role": "user", "content": "häng an 😀"}]}}
IDENTITY = Identity(
    "/models/m", "", "f00d", "bfloat16", "auto", 2, CHUNK, 16, "vllm 0.32.0", "a" * 16
)


def unheard(_: int) -> None:
    """Progress that nobody wants to hear of."""


def window(number: int = 0, **facts: Any) -> Window:
    told: dict[str, Any] = {
        "id": f"{number:032x}",
        "owner": "ada",
        "name": f"w{number}",
        "session_id": f"s{number}",
        "model": "m",
        "salt": f"salt{number}",
        "created_at": 1000.0 + number,
    }
    return Window(**{**told, **facts})


class Home:
    """A state directory with LMCache's tier; every block is `size` bytes of its own."""

    def __init__(self, home: Path, workers: int = 2, size: int = 3000) -> None:
        self.tier = home / "kv"
        self.tier.mkdir(mode=0o700, exist_ok=True)
        self.files = WindowFiles(home / "windows", self.tier)
        self.shape = Shape("/models/m", workers, CHUNK)
        self.size = size

    def names(self, tokens: Sequence[int], salt: str) -> list[list[str]]:
        return [block_names(self.shape, one, salt) for one in chain(tokens, CHUNK)]

    def store(self, names: Sequence[Sequence[str]]) -> None:
        """As LMCache does."""
        for chunk in names:
            for name in chunk:
                (self.tier / name).write_bytes(name.encode().ljust(self.size, b"."))

    def begun(self, one: Window, chunks: int = 3) -> tuple[Path, Manifest, list[list[str]]]:
        """Everything but the last step, which makes it whole."""
        tokens = list(range(chunks * CHUNK + 5))
        names = self.names(tokens, one.salt)
        self.store(names)
        part = self.files.begin(one.id)
        blocks = self.files.take(part, names, unheard)
        return part, made(one, SAID, tokens, chain(tokens, CHUNK), blocks, IDENTITY), names

    def frozen(self, one: Window, chunks: int = 3) -> tuple[Manifest, list[list[str]]]:
        part, manifest, names = self.begun(one, chunks)
        self.files.finish(part, manifest)
        return manifest, names

    def block(self, manifest: Manifest, chunk: int, rank: int = 0) -> Path:
        return self.files.folder(manifest.id) / manifest.blocks[chunk][rank].name

    def present(self) -> set[str]:
        """What is in the directory of windows, but what LMCache has."""
        directory = self.files.directory
        return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
