"""What is different between two settings, by name, and what of it may change while hive runs.

Pure. A key's path is a tuple, since the names of models have dots; what has a `name` and stands in
a list, as API keys do, goes by that.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

Path = tuple[str, ...]


class Change(NamedTuple):
    """One key that is not the same; `how` is changed, added or removed."""

    path: Path
    how: str = "changed"

    @property
    def key(self) -> str:
        """As hive.toml has it, without its value: "models.llama.device", "auth.keys.ci (added)"."""
        name = ".".join(f'"{part}"' if "." in part else part for part in self.path)
        return name if self.how == "changed" else f"{name} ({self.how})"


def is_one_of(path: Path, patterns: Iterable[str]) -> bool:
    """Whether one of them fits: "server.port"; "*" is any one name, at the end all that is below."""
    return any(_fits(path, tuple(pattern.split("."))) for pattern in patterns)


def differences(old: BaseModel, new: BaseModel) -> list[Change]:
    """Every key that is not the same, in the order of the configuration."""
    return list(_different((), old, new))


def _fits(path: Path, pattern: Path) -> bool:
    if pattern[-1] == "*":  # all below
        head = pattern[:-1]
        return len(path) > len(head) and _fits(path[: len(head)], head)
    return len(path) == len(pattern) and all(
        wanted in ("*", part) for part, wanted in zip(path, pattern, strict=True)
    )


def _different(path: Path, old: Any, new: Any) -> Iterator[Change]:
    match old, new:
        case BaseModel(), BaseModel():
            for name in type(old).model_fields:
                yield from _different((*path, name), getattr(old, name), getattr(new, name))
        case dict(), dict() if _are_models([*old.values(), *new.values()]):
            yield from _of_names(path, old, new)
        case tuple(), tuple() if _are_models([*old, *new]):
            yield from _of_names(path, _named(old), _named(new))
        case _ if old != new:
            yield Change(path)


def _of_names(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in [*old, *(name for name in new if name not in old)]:
        own = (*path, name)
        if name not in new:
            yield Change(own, "removed")
        elif name not in old:
            yield Change(own, "added")
        else:
            yield from _different(own, old[name], new[name])


def _are_models(values: list[Any]) -> bool:
    return all(isinstance(value, BaseModel) for value in values)


def _named(values: tuple[Any, ...]) -> dict[str, Any]:
    return {value.name: value for value in values}
