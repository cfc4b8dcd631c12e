"""What queries hold, read strictly."""

from typing import Annotated, TypedDict

import msgspec


class OfModel(TypedDict, total=False):
    """A query that more than one handler takes."""

    model: Annotated[str, msgspec.Meta(description="Of this model alone.")]


def whole_number(text: str, least: int, most: int) -> int | None:
    """The number, from `least` (0 or more) to `most`, in plain digits; None for anything else."""
    if not text.isascii() or not text.isdigit() or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if least <= number <= most else None
