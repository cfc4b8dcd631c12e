"""The VRAM of the NVML double: who holds how much, read and written as files."""

import os

DEFAULTS = {"total_mib": 81920, "base_mib": 500, "keeps": 0}


class Short(Exception):
    """A GPU with too little free; `index` counts the visible ones, as CUDA does."""

    def __init__(self, index: int, free_mib: int, total_mib: int) -> None:
        super().__init__(index, free_mib, total_mib)
        self.index, self.free_mib, self.total_mib = index, free_mib, total_mib


def visible() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; none for a process that is to use no GPU."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def take(directory: str, uuids: list[str], pid: int, mib: int) -> None:
    """Hold so much of every GPU or, with Short or KeyError (no such GPU), of none."""
    there = gpus(directory)
    for index, uuid in enumerate(uuids):
        total_mib = there[uuid]["total_mib"]
        free_mib = total_mib - used_mib(directory, uuid)
        if free_mib < mib:
            raise Short(index, free_mib, total_mib)
    for uuid in uuids:
        hold(directory, uuid, pid, mib)


def gpus(directory: str) -> dict[str, dict[str, int]]:
    """The listed GPUs: UUID to total_mib, base_mib and keeps."""
    found = {}
    with open(os.path.join(directory, "state"), encoding="utf-8") as state:
        for line in state:
            word, *words = line.split() or [""]
            if word == "gpu":
                said = dict(pair.split("=", 1) for pair in words[1:])
                numbers = {key: int(said.get(key, value)) for key, value in DEFAULTS.items()}
                found[said["uuid"]] = numbers
    return found


def used_mib(directory: str, uuid: str) -> int:
    """Used memory as NVML shows it: the base and what living processes hold.

    What dead processes held counts on a GPU that keeps it. Raises KeyError for an unlisted GPU.
    """
    gpu = gpus(directory)[uuid]
    used = gpu["base_mib"]
    folder = os.path.join(directory, "hold", uuid)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.isdigit() and (gpu["keeps"] or lives(int(name))):
            with open(os.path.join(folder, name), encoding="ascii") as held:
                used += int(held.read())
    return min(used, gpu["total_mib"])


def hold(directory: str, uuid: str, pid: int, mib: int) -> None:
    """Write down that a process holds so much of a GPU, instead of what it held before."""
    folder = os.path.join(directory, "hold", uuid)
    os.makedirs(folder, exist_ok=True)
    half = os.path.join(folder, f".{pid}")
    with open(half, "w", encoding="ascii") as held:
        held.write(str(mib))
    os.replace(half, os.path.join(folder, str(pid)))


def lives(pid: int) -> bool:
    """Whether a process holds anything still: a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZXx"
    except (FileNotFoundError, ProcessLookupError):
        return False
