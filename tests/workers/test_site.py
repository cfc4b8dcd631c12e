"""Where the LMCache server listens: on ports that are free, and stay so."""

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hive.errors import WorkerSpawnFailed
from hive.settings import Settings
from hive.workers import site
from hive.workers.site import HOST, Site, free_ports, site_of

MODEL = {"engine": "command", "device": "cpu", "command": ["sh", "{socket}", "{kv}"]}


def settings(home: Path, *windows: bool, **sections: Any) -> Settings:
    models = {f"m{number}": {**MODEL, "windows": one} for number, one in enumerate(windows)}
    server = {"state_dir": home / "s", "runtime_dir": home / "r"}
    return Settings.model_validate({"server": server, "models": models, **sections})


def test_where_no_model_has_windows_there_is_none(tmp_path: Path) -> None:
    assert site_of(settings(tmp_path, False, False)) is None


def test_where_it_is_is_told_to_all(tmp_path: Path) -> None:
    found = site_of(settings(tmp_path, False, True, windows={"kv_chunk_tokens": 64}))

    assert found is not None
    assert found == Site(tmp_path / "s", found.port, found.http_port, 64)
    assert found.tier == tmp_path / "s" / "kv"
    assert found.address == f"127.0.0.1:{found.port}"
    assert found.url == f"http://127.0.0.1:{found.http_port}"
    assert found.port != found.http_port
    assert not found.tier.exists()  # who starts it makes it


def test_the_ports_are_free_and_nobody_who_connects_anywhere_can_take_them() -> None:
    lowest_outgoing = int(site._RANGE.read_text().split()[0])
    ports = free_ports(4)

    assert len(set(ports)) == 4
    assert ports == sorted(ports)
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.socket()).bind((HOST, port))
    if lowest_outgoing > 10_200:
        assert all(10_000 <= port < lowest_outgoing for port in ports)


@pytest.mark.parametrize("told", [None, "", "x y", "1024\t65535\n"])
def test_a_range_that_is_not_told_or_leaves_nothing_is_no_obstacle(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "_RANGE", tmp_path / "range")
    if told is not None:
        (tmp_path / "range").write_text(told)

    assert all(10_000 <= port < 65_536 for port in free_ports(2))


def test_a_port_that_somebody_has_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 201 there are to choose from, and nearly all are taken."""
    monkeypatch.setattr(site, "_RANGE", tmp_path / "range")
    (tmp_path / "range").write_text("10201 60999\n")
    with ExitStack() as stack:
        kept = []
        for port in range(10_000, 10_201):
            one = stack.enter_context(socket.socket())
            try:
                one.bind((HOST, port))
            except OSError:  # somebody else's: it is not free either
                continue
            kept.append((port, one))
        for _, one in kept[50:52]:
            one.close()
        assert free_ports(1)[0] in {port for port, _ in kept[50:52]}
        with pytest.raises(WorkerSpawnFailed, match="No free ports") as caught:
            free_ports(3)

    assert "ss -ltn" in caught.value.suggested_action
