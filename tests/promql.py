"""What an expression of PromQL names: as much of the language as hive's own rules and panels use."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_TIMES = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_SELECTOR = re.compile(rf"({_NAME})\b(?!\s*\()\s*(?:\{{([^}}]*)\}})?")
_MATCHER = re.compile(rf'({_NAME})\s*(=~|!~|!=|=)\s*"([^"]*)"')
_WORDS = frozenset({"and", "or", "unless", "bool"})


@dataclass(frozen=True)
class Selector:
    """A metric, or a recorded series, and what its labels must be."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]

    def wants(self, label: str) -> list[str]:
        """The values that it asks for; "a|b" are two."""
        asked = [value for name, sign, value in self.matchers if name == label and "!" not in sign]
        return [one for value in asked for one in value.split("|")]

    def matches(self, labels: dict[str, str]) -> bool:
        return all(_holds(sign, value, labels.get(name, "")) for name, sign, value in self.matchers)


def _holds(sign: str, wanted: str, found: str) -> bool:
    same = bool(re.fullmatch(wanted, found)) if "~" in sign else wanted == found
    return same != ("!" in sign)


def selectors(expr: str) -> Iterator[Selector]:
    """Every series that it reads."""
    bare = _TIMES.sub("", _GROUPING.sub("", expr))
    for found in _SELECTOR.finditer(bare):
        if found[1] not in _WORDS:
            yield Selector(found[1], tuple(_MATCHER.findall(found[2] or "")))


def groupings(expr: str) -> set[str]:
    """The labels that it groups by or joins on."""
    return {
        name.strip()
        for found in _GROUPING.finditer(expr)
        for name in found[1].split(",")
        if name.strip()
    }
