"""What a directory holds, made safe from a power cut. Everything blocks.

The kernel tells of a lost write once: after a sync that failed, the next one says that all is well,
whether it is or not. So nothing is synced again: whoever tries again changes the directory anew.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ASIDE = "~"  # an entry that is being made anew


@contextmanager
def synced(directory: Path) -> Iterator[None]:
    """What the block changes in it is on disk afterwards. Raises OSError; then nothing is certain.

    It is opened before the change: whoever has it open hears of each write that is lost from then
    on, whoever else has heard of it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield
        os.fsync(fd)
    finally:
        os.close(fd)


def touched(directory: Path, name: str) -> None:
    """Change it anew, where what was to be removed is gone already. Raises OSError.

    `name` is one that nothing has; its entry takes the place of the one that went.
    """
    (directory / name).mkdir(mode=0o700)
    (directory / name).rmdir()


def renewed(directory: Path) -> None:
    """Every entry of it made anew, under the name it had. Raises OSError."""
    for name in sorted(os.listdir(directory)):
        real, aside = name.removesuffix(_ASIDE), f"{name.removesuffix(_ASIDE)}{_ASIDE}"
        if name != aside:
            (directory / name).rename(directory / aside)
        (directory / aside).rename(directory / real)
