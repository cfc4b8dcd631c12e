"""The chain of the audit log: each record carries the hash of the one before it.

Pure. A line is the canonical JSON of a record: keys sorted, no spaces, ASCII. Its `hash` is SHA-256
over the same record without it, so that whoever changes, removes, adds or moves a record must make
every hash after it anew.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ZEROS = "0" * 64  # what the first record has before it


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """A record's place in the chain."""

    index: int
    hash: str


START = Link(-1, ZEROS)  # the first record has the index 0


class Broken(ValueError):
    """A line is not the record that must stand there; the text says what it is instead."""


def sealed(facts: Mapping[str, Any], after: Link) -> tuple[bytes, Link]:
    """A record of these facts as the line that follows `after`, and its own place."""
    record = {**facts, "index": after.index + 1, "previous_hash": after.hash}
    digest = hashlib.sha256(_canonical(record)).hexdigest()
    return _canonical({**record, "hash": digest}) + b"\n", Link(after.index + 1, digest)


def opened(line: bytes, after: Link | None = None) -> tuple[dict[str, Any], Link]:
    """The record of a whole line, and its place; it must follow `after`, where that is known.

    Raises Broken.
    """
    if not line.endswith(b"\n"):
        raise Broken("the line has no end")
    try:
        record = json.loads(line)
        canonical = _canonical(record)
    except (ValueError, RecursionError):  # it may nest deeper than can be read, or than written
        raise Broken("the line is no JSON") from None
    if not isinstance(record, dict):
        raise Broken("the line is no record")
    if canonical + b"\n" != line:
        raise Broken("the record was changed: it is not written as hive writes it")
    link = _place_of(record)
    if after is not None:
        _must_follow(link, after)
        if record["previous_hash"] != after.hash:
            raise Broken(
                "the record does not follow the one before it: its previous_hash is another"
            )
    bare = {key: value for key, value in record.items() if key != "hash"}
    if hashlib.sha256(_canonical(bare)).hexdigest() != link.hash:
        raise Broken("the record was changed: its hash is another")
    return record, link


def _place_of(record: Mapping[str, Any]) -> Link:
    index, own, before = (record.get(key) for key in ("index", "hash", "previous_hash"))
    # type: True is 1, too
    if type(index) is not int or not isinstance(own, str) or not isinstance(before, str):
        raise Broken("the record was changed: it has no index, hash or previous_hash")
    return Link(index, own)


def _must_follow(link: Link, after: Link) -> None:
    wanted = after.index + 1
    if link.index > wanted:
        count = link.index - wanted
        which = f"record {wanted} is" if count == 1 else f"records {wanted} to {link.index - 1} are"
        raise Broken(f"{which} missing: the index here is {link.index}")
    if link.index < wanted:
        raise Broken(f"the record is out of order: its index is {link.index}, not {wanted}")


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
