"""What a GPU's fault means and what to do about it: NVIDIA's Xid numbers as a catalogue.

A device fault says that the GPU itself cannot be trusted: `server.gpu_error_policy` decides. An
application fault is one engine's own doing and evidence for its crash, which the restart policy
handles. A note changes nothing. Source: NVIDIA's "Xid Errors" catalogue.
"""

from dataclasses import dataclass
from enum import StrEnum

RESET = (
    "Stop what uses the GPU, and hive where the reset is refused because it watches the GPU; reset "
    "it with 'nvidia-smi --gpu-reset' or reboot; then release it with 'hive worker release', or "
    "start hive."
)
REPLACE = (
    "Run the vendor's diagnostics: the GPU or its seat, power or cooling is probably broken. "
    "Release it with 'hive worker release' only after it passed."
)
LOOK = "Look at the engine's log with 'hive worker logs'; hive restarts the worker by itself."


class Kind(StrEnum):
    DEVICE = "device"
    APPLICATION = "application"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Fault:
    """One Xid: its kind, what it means in a few words, and what to do."""

    kind: Kind
    meaning: str
    action: str


def _device(meaning: str, action: str = RESET) -> Fault:
    return Fault(Kind.DEVICE, meaning, action)


def _application(meaning: str) -> Fault:
    return Fault(Kind.APPLICATION, meaning, LOOK)


def _note(
    meaning: str, action: str = "Nothing needs to be done now; watch whether it repeats."
) -> Fault:
    return Fault(Kind.NOTE, meaning, action)


XIDS: dict[int, Fault] = {
    8: _application("the GPU stopped processing a channel"),
    13: _application("an exception in the compute engine, such as an access out of bounds"),
    31: _application("a memory page fault, such as an illegal address"),
    32: _application("a corrupted push buffer"),
    38: _device("the driver's firmware failed"),
    43: _application("the GPU stopped processing because of the application"),
    44: _device("the graphics engine's context switch failed"),
    45: _application("channels were cleaned up early, as after a kill"),
    46: _device("the GPU stopped processing"),
    48: _device("an uncorrectable (double-bit) ECC error"),
    54: _device("auxiliary power is not connected", REPLACE),
    61: _device("the internal micro-controller stopped at a breakpoint"),
    62: _device("the internal micro-controller halted"),
    63: _note("a memory row was remapped or a page retired", "Reset the GPU at the next occasion."),
    64: _device("a memory row could not be remapped or a page not retired", REPLACE),
    68: _application("an exception in the video decoder"),
    69: _application("an error in the graphics engine's class"),
    74: _device("an NVLink error"),
    79: _device("the GPU has fallen off the bus", REPLACE),
    92: _note("a high rate of corrected (single-bit) ECC errors"),
    94: _application("a contained ECC error: only this application is affected"),
    95: _device("an uncontained ECC error"),
    109: _application("a context switch timed out"),
    110: _device("a security fault in the GPU's firmware"),
    119: _device("the GPU's system processor (GSP) does not answer"),
    120: _device("the GPU's system processor (GSP) failed"),
    121: _note("a corrected error on the link to the host processor"),
    123: _device("the power management unit does not answer"),
    140: _device("an unrecovered ECC error"),
    143: _device("the GPU could not be initialised"),
    145: _device("an NVLink error in the remote link"),
    149: _device("a fatal NVLink error"),
    154: _note("the recovery that the GPU asks for has changed", "See 'nvidia-smi -q' for it."),
    155: _device("NVLink's software-defined state failed"),
    156: _note("a resource of the GPU was retired"),
    157: _note("a resource of the GPU could not be retired"),
    158: _device("a fatal timeout on the GPU"),
}  # fmt: skip


def fault(xid: int) -> Fault:
    """The catalogue's entry; an Xid that is not in it is a note, never a reason to kill."""
    return XIDS.get(xid) or _note(
        "not in hive's catalogue", "Look the number up in NVIDIA's list of Xid errors."
    )
