"""Text of others for a person's terminal: what would steer the terminal is shown, not obeyed."""

import re

# Control characters but tab and newline; what changes the direction of writing; and halves of
# characters, which no terminal's encoding has.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""The text with such characters as `\x1b`."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
