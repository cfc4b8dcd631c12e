"""Engines' own metrics: what one of them says, read and checked; what all say, as one page.

An engine is believed nothing: what a scraper would refuse, or what would make another engine's or
hive's own series invalid, is left out and counted. The rules are those of OpenMetrics, which are
the stricter ones, so both formats of a page are valid.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TextIO, cast

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_fd_to_metric_families
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

OWN = "hive_"  # no engine may speak in hive's name
LINE_CHARS = 16 * 1024
HELP_CHARS = 1000
PAUSE_LINES = 16  # the thread that reads lets others run after so many …
PAUSE_S = 0.0001  # … since without a pause the event loop would wait up to 5 ms for each turn
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
# What samples of a family may be called beyond its own name; another family called so would clash.
_SUFFIXES = {
    "counter": ("_total", "_created"),
    "gauge": (),
    "histogram": ("_bucket", "_count", "_sum", "_created"),
    "summary": ("_count", "_sum", "_created"),
    "unknown": (),
}
_PART_LABEL = {"histogram": "le", "summary": "quantile"}

Labels = dict[str, str]
Key = tuple[tuple[str, str], ...]


class Unreadable(Exception):
    """What an engine said is no exposition, or takes too long to read."""


@dataclass(slots=True)
class Told:
    """What one engine told: the families that are valid, and how many were left out."""

    families: dict[str, Metric] = field(default_factory=dict)
    left_out: int = 0


@dataclass(slots=True)
class _Group:
    """The samples of one family that share their labels, but for `le` and `quantile`."""

    labels: Labels
    parts: dict[float, float] = field(default_factory=dict)  # buckets or quantiles
    values: dict[str, float] = field(default_factory=dict)  # by what follows the family's name


def no_limit() -> None:
    """Read for as long as it takes."""


def read(text: str, worker: str, check: Callable[[], None] = no_limit) -> Told:
    """The families of an engine's text format, each sample with the label `worker`.

    `check` is called before each line, and may raise Unreadable. A label of the engine's own that
    is called `worker` becomes `exported_worker`; times of samples are dropped, as they are of now.
    Raises Unreadable.
    """
    found: dict[str, Metric] = {}
    torn: set[str] = set()
    try:
        lines = cast("TextIO", _lines(text, check))  # it only iterates over it
        for family in text_fd_to_metric_families(lines):
            same = found.setdefault(family.name, family)
            if same.type != family.type:
                torn.add(family.name)
            elif same is not family:
                same.samples.extend(family.samples)
    except Unreadable:
        raise
    except Exception as exc:
        raise Unreadable(f"{type(exc).__name__}: {exc}") from exc
    _fold(found)
    told = Told(left_out=len(torn))
    for name, family in found.items():
        if name in torn:
            continue
        if (kept := _checked(family, worker, check)) is not None:
            told.families[name] = kept
        told.left_out += len(kept.samples if kept else ()) < len(family.samples)
    return told


def merged(told: Iterable[Told]) -> list[Metric]:
    """One family for each name, in the order of `told`.

    Of two engines that mean different things by a name the first one is right: the other's family
    is left out, and counted in its `left_out`.
    """
    families: dict[str, Metric] = {}
    owners: dict[str, str] = {}  # of every name that a family may use: the family
    for one in told:
        for name, family in one.families.items():
            names = [name, *(name + suffix for suffix in _SUFFIXES[family.type])]
            if name in families and families[name].type == family.type:
                families[name].samples.extend(family.samples)
            elif any(taken in owners for taken in names):
                one.left_out += 1
            else:
                families[name] = _like(family, family.samples)
                owners |= dict.fromkeys(names, name)
    return list(families.values())


def _lines(text: str, check: Callable[[], None]) -> Iterator[str]:
    for number, line in enumerate(text.split("\n")):
        check()
        if len(line) > LINE_CHARS:
            raise Unreadable(f"a line of {len(line)} characters")
        if number % PAUSE_LINES == PAUSE_LINES - 1:
            time.sleep(PAUSE_S)
        yield line


def _fold(found: dict[str, Metric]) -> None:
    """Make one family of what is one in OpenMetrics alone, where no other may be called so.

    In the text format `x_created` is a gauge beside the counter x, and `x_total` is none of x where
    the TYPE is x's.
    """
    for suffix, kind in (("_created", "gauge"), ("_total", "unknown")):
        for name in [name for name in found if name.endswith(suffix)]:
            of = found.get(name.removesuffix(suffix))
            if of is not None and suffix in _SUFFIXES.get(of.type, ()) and found[name].type == kind:
                of.samples.extend(found.pop(name).samples)


def _checked(family: Metric, worker: str, check: Callable[[], None]) -> Metric | None:
    """The family with what is valid of it; None where nothing is."""
    names = {family.name, *(sample.name for sample in family.samples)}
    if family.type not in _SUFFIXES or not all(map(_NAME.fullmatch, names)):
        return None
    if any(name.startswith(OWN) for name in names):
        return None
    part_label = _PART_LABEL.get(family.type)
    groups: dict[Key, _Group] = {}
    for number, sample in enumerate(family.samples):
        check()
        if number % PAUSE_LINES == PAUSE_LINES - 1:
            time.sleep(PAUSE_S)
        _sort_in(sample, family, part_label, worker, groups)
    valid = [group for group in groups.values() if _is_valid(group, family.type)]
    samples = [sample for group in valid for sample in _samples(group, family.name, part_label)]
    return _like(family, samples) if samples else None


def _sort_in(
    sample: Sample, family: Metric, part_label: str | None, worker: str, groups: dict[Key, _Group]
) -> None:
    """Put a sample, unless it is not a valid one, into its group."""
    suffix = sample.name.removeprefix(family.name)
    is_part = part_label is not None and suffix == ("_bucket" if part_label == "le" else "")
    # As in Prometheus an empty label is none.
    labels = {name: value for name, value in sample.labels.items() if value}
    if not all(map(_LABEL.fullmatch, labels)):
        return
    try:
        value = float(sample.value)
        part = float(labels.pop(part_label, "")) if is_part and part_label else 0.0
    except (ValueError, OverflowError):
        return
    if math.isnan(part):
        return
    labels = _with_worker(labels, worker)
    group = groups.setdefault(tuple(sorted(labels.items())), _Group(labels))
    if is_part:
        group.parts.setdefault(part, value)
    else:
        group.values.setdefault(suffix, value)


def _with_worker(labels: Labels, worker: str) -> Labels:
    """As Prometheus does with labels of a target that a sample has as well."""
    own = labels.pop("worker", None)
    if own is not None:
        name = "exported_worker"
        while name in labels:
            name = f"exported_{name}"
        labels[name] = own
    return {**labels, "worker": worker}


def _is_valid(group: _Group, kind: str) -> bool:
    values = group.values
    if values.get("_created", 0) < 0 or not math.isfinite(values.get("_created", 0)):
        del values["_created"]
    match kind:
        case "counter":
            return values.get("_total", -1) >= 0
        case "histogram":
            return _is_histogram(group)
        case "summary":
            quantiles = all(0 <= at <= 1 and not value < 0 for at, value in group.parts.items())
            sums = all(values.get(name, 0) >= 0 for name in ("_sum", "_count"))
            is_something = bool(group.parts) or "_count" in values or "_sum" in values
            return quantiles and sums and _is_whole(values.get("_count", 0.0)) and is_something
    return "" in values


def _is_histogram(group: _Group) -> bool:
    """Buckets from the lowest up to +Inf, each a count that holds those before it; sum and count."""
    counts = [group.parts[bound] for bound in sorted(group.parts)]
    rises = all(low <= high for low, high in itertools.pairwise(counts))
    return (
        math.inf in group.parts
        and min(group.parts) >= 0
        and all(count >= 0 and _is_whole(count) for count in counts)
        and rises
        and group.values.get("_count") == counts[-1]
        and group.values.get("_sum", -1) >= 0
    )


def _is_whole(value: float) -> bool:
    return math.isfinite(value) and value.is_integer()


def _samples(group: _Group, name: str, part_label: str | None) -> Iterator[Sample]:
    suffix = "_bucket" if part_label == "le" else ""
    for part in sorted(group.parts):
        labels = {**group.labels, str(part_label): floatToGoString(part)}  # type: ignore[no-untyped-call]
        yield Sample(name + suffix, labels, group.parts[part])
    for ending in ("", "_total", "_count", "_sum", "_created"):
        if ending in group.values:
            yield Sample(name + ending, group.labels, group.values[ending])


def _like(family: Metric, samples: list[Sample]) -> Metric:
    about = " ".join(family.documentation.split())[:HELP_CHARS]
    made = Metric(family.name, about or "An engine's own; it tells no more of it.", family.type)
    made.samples = list(samples)
    return made
