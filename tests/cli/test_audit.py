"""`hive audit` and `hive reload`, beside a running daemon and from its files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive.cli import run
from hive.storage.audit import page
from steps.driver import Hive, new_hive
from steps.waiting import must
from tests.gateway.serving import key, secret_of


@pytest.fixture(scope="module")
def hive() -> Iterator[Hive]:
    with new_hive() as made:
        made.sections["server"] = {"port": 0}
        made.keys = [key("ops", "admin", "inference")]
        made.key = secret_of("ops")
        made.model("m")
        made.start(is_shared=True)
        yield made


def test_what_the_operator_did_is_listed(hive: Hive) -> None:
    assert hive.cli("worker", "restart", "m-0").code == 0
    hive.wait_ready()
    listed: list[dict[str, str]] = []

    def is_listed() -> bool:
        listed[:] = json.loads(hive.cli("audit", "list", "--json").out)["records"]
        return any(one["action"] == "worker.restart" for one in listed)

    must(is_listed, 10, "the record")
    (record,) = (one for one in listed if one["action"] == "worker.restart")
    assert record["actor"] == f"ops:{hive.keys[0]['sha256'][:6]}"
    shown = hive.cli("audit", "list", "--lines", "3")
    assert shown.code == 0
    assert len(shown.out.strip().splitlines()) == 4


def test_the_files_are_verified_beside_a_running_hive(hive: Hive) -> None:
    ran = hive.cli("audit", "verify", "--config", str(hive.config), "--json")

    assert ran.code == 0
    assert ran.json["ok"] is True
    assert ran.json["records"] == ran.json["last_index"] + 1
    head = hive.cli("audit", "verify", "--config", str(hive.config), "--head", ran.json["head"])
    assert head.code == 0
    assert hive.cli("audit", "verify", "--config", str(hive.config), "--head", "0" * 64).code == 1


def test_a_changed_record_is_named(
    hive: Hive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File, line and index; exit code 1."""
    copy = tmp_path / "audit"
    copy.mkdir()
    source = hive.state / "audit"
    text = (source / "audit.jsonl").read_bytes()
    (copy / "audit.jsonl").write_bytes(text.replace(b'"key.used"', b'"key.lost"'))
    (copy / "head.json").write_bytes((source / "head.json").read_bytes())
    index = next(one["index"] for one in page(source, 1000) if one["action"] == "key.used")

    assert run(["audit", "verify", "--state-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"audit.jsonl, line {index + 1}, index {index}: the record was changed" in said
    assert "what to do" in said
    assert run(["audit", "verify", "--state-dir", str(tmp_path), "--json"]) == 1
    problem = json.loads(capsys.readouterr().out)["problem"]
    assert (problem["file"], problem["line"], problem["index"]) == ("audit.jsonl", index + 1, index)


def test_an_empty_directory_has_nothing_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["audit", "verify", "--state-dir", str(tmp_path)]) == 1
    assert "there is no audit log" in capsys.readouterr().err  # a wrong name, say
    (tmp_path / "audit").mkdir()
    assert run(["audit", "verify", "--state-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "0 records in 0 files are whole and in order\n"


def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "audit" / "head.json").mkdir(parents=True)

    assert run(["audit", "verify", "--state-dir", str(tmp_path)]) == 1
    assert "STORAGE_READ_FAILED" in capsys.readouterr().err


def test_a_reload_says_what_changed_or_what_is_in_the_way(hive: Hive) -> None:
    hive.sections["server"]["drain_s"] = 1
    hive.write_config()
    assert hive.cli("reload").out == "changed: server.drain_s\n"
    assert hive.cli("reload", "--json").json == {"changed": []}
    assert hive.cli("reload").out == "nothing is different\n"

    hive.models["m"].extra["max_concurrent"] = 7
    hive.write_config()
    refused = hive.cli("reload")
    assert refused.code == 1
    assert "models.m.max_concurrent: it cannot change while hive runs; restart hive" in refused.err
    del hive.models["m"].extra["max_concurrent"]
