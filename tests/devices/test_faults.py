"""The catalogue of Xids says what each is worth: a device, one engine's crash, or a note."""

import pytest

from hive.devices.faults import LOOK, XIDS, Fault, Kind, fault


@pytest.mark.parametrize("xid", [48, 62, 64, 74, 79, 95, 119, 120])
def test_these_say_that_the_device_cannot_be_trusted(xid: int) -> None:
    assert fault(xid).kind is Kind.DEVICE


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 94, 109])
def test_these_are_one_engines_own_doing(xid: int) -> None:
    """Killing everything for an access out of bounds would be worse than the fault."""
    assert fault(xid).kind is Kind.APPLICATION
    assert fault(xid).action == LOOK


@pytest.mark.parametrize("xid", [63, 92])
def test_these_change_nothing(xid: int) -> None:
    assert fault(xid).kind is Kind.NOTE


@pytest.mark.parametrize("xid", [0, 1, 999, 2**40])
def test_an_unknown_one_is_never_a_reason_to_kill(xid: int) -> None:
    assert fault(xid).kind is Kind.NOTE
    assert fault(xid).meaning == "not in hive's catalogue"
    assert "NVIDIA" in fault(xid).action


@pytest.mark.parametrize(("xid", "known"), XIDS.items())
def test_each_says_what_it_means_and_what_to_do(xid: int, known: Fault) -> None:
    """The meaning fits into a sentence; who was set aside learns how to come back."""
    assert fault(xid) is known
    assert known.meaning
    assert not known.meaning.endswith(".")
    assert known.action.endswith(".")
    if known.kind is Kind.DEVICE:
        assert "hive worker release" in known.action
