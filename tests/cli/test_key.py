"""`hive key`: keys in the configuration file, which is otherwise left as somebody wrote it."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hive import cli
from hive.settings import load

Capture = pytest.CaptureFixture[str]

WRITTEN = """\
# Our host.
[server]
port = 7411   # as everywhere

[models.small]   # the only one
engine = "command"
device = "cpu"
command = ["engine", "{socket}"]
"""


# Even root obeys the rights of files here: PR_CAPBSET_DROP of CAP_DAC_OVERRIDE.
POWERLESS = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("HIVE_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HIVE_CONFIG", str(tmp_path / "hive.toml"))
    path = tmp_path / "hive.toml"
    path.write_text(WRITTEN)
    path.chmod(0o640)
    return path


def made(capsys: Capture, *args: str) -> str:
    assert cli.run(["key", "new", *args]) == 0
    return capsys.readouterr().out.strip()


def hive(*args: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A hive of its own, in whose process something is done first."""
    code = f"import sys\n{before}\nfrom hive.__main__ import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )


def test_a_new_key_is_printed_once_and_only_its_hash_is_kept(file: Path, capsys: Capture) -> None:
    """(R076)"""
    value = made(capsys, "ci")
    (key,) = load(file).auth.keys

    assert value.startswith("hive_")
    assert len(value) == len("hive_") + 43
    assert value not in file.read_text()
    assert (key.name, key.scopes, key.priority) == ("ci", ("inference",), "normal")
    assert key.sha256 == hashlib.sha256(value.encode()).hexdigest()


def test_every_key_is_another(file: Path, capsys: Capture) -> None:
    assert made(capsys, "one") != made(capsys, "two")
    assert [key.name for key in load(file).auth.keys] == ["one", "two"]


def test_what_somebody_wrote_stays_as_it_is(file: Path, capsys: Capture) -> None:
    """Comments, spaces and order, through a key's whole life."""
    made(capsys, "ci")
    assert file.read_text().startswith(WRITTEN)
    made(capsys, "web")
    assert cli.run(["key", "revoke", "ci"]) == 0
    assert file.read_text().startswith(WRITTEN)
    assert file.stat().st_mode & 0o777 == 0o640


def test_the_last_key_revoked_leaves_a_file_that_loads(file: Path, capsys: Capture) -> None:
    made(capsys, "ci")
    assert cli.run(["key", "revoke", "ci"]) == 0

    assert load(file).auth.keys == ()
    assert made(capsys, "again")


def test_a_keys_rights_are_given_when_it_is_made(file: Path, capsys: Capture) -> None:
    rights = ["--scope", "admin", "--scope", "metrics", "--priority", "batch"]
    made(capsys, "ops", *rights, "--max-concurrent", "2", "--requests-per-minute", "60")
    (key,) = load(file).auth.keys

    assert key.scopes == ("admin", "metrics")
    assert key.priority == "batch"
    assert (key.max_concurrent, key.requests_per_minute) == (2, 60)


def test_the_list_shows_names_and_rights_and_no_hash(file: Path, capsys: Capture) -> None:
    made(capsys, "ci")
    assert cli.run(["key", "list"]) == 0
    table = capsys.readouterr().out
    assert cli.run(["key", "list", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["keys"]

    assert "ci" in table
    assert listed["name"] == "ci"
    assert "sha256" not in listed
    assert load(file).auth.keys[0].sha256 not in table


def test_programs_get_the_new_key_as_json(file: Path, capsys: Capture) -> None:
    told = json.loads(made(capsys, "ci", "--json"))

    assert told["name"] == "ci"
    assert told["file"] == str(file)
    assert hashlib.sha256(told["key"].encode()).hexdigest() in file.read_text()


def test_a_file_without_keys_lists_none(file: Path, capsys: Capture) -> None:
    assert cli.run(["key", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"keys": []}
    assert file.read_text() == WRITTEN


@pytest.mark.parametrize(
    ("args", "status", "finding"),
    [
        (["new", "ci"], 1, "A key named ci exists already."),
        (["revoke", "web"], 1, "There is no key named web; there are: ci."),
        (["new", "a b"], 2, "a name is 1 to 64 letters"),
        (["new", ""], 2, "a name is 1 to 64 letters"),
        (["new", "x", "--scope", "root"], 2, "'root' is not one of"),
        (["new"], 2, "Missing argument 'NAME'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    file: Path, capsys: Capture, args: list[str], status: int, finding: str
) -> None:
    made(capsys, "ci")
    before = file.read_bytes()

    assert cli.run(["key", *args]) == status
    assert finding in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["[server\n", "auth = { keys = [] }\n", "[auth]\nkeys = [1]\n"])
def test_a_file_that_is_not_understood_is_left_alone(
    file: Path, capsys: Capture, text: str
) -> None:
    file.write_text(text)

    assert cli.run(["key", "new", "ci"]) == 1
    assert "nothing was changed" in capsys.readouterr().err
    assert file.read_text() == text


def test_a_file_that_is_not_there_is_named(file: Path, capsys: Capture) -> None:
    file.unlink()

    assert cli.run(["key", "new", "ci"]) == 1
    assert "hive.toml: cannot be read: No such file" in capsys.readouterr().err


def test_when_the_disk_is_full_the_file_stays_as_it_was(file: Path) -> None:
    """It is replaced whole or not at all."""
    limit = f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, (100, 100))"
    done = hive("key", "new", "ci", before=limit)

    assert done.returncode == 1
    assert "hive.toml: cannot be written: File too large" in done.stderr
    assert "nothing was changed" in done.stderr
    assert done.stdout == ""
    assert file.read_text() == WRITTEN
    assert list(file.parent.iterdir()) == [file]


def test_where_nothing_may_be_written_it_is_said_clearly(file: Path) -> None:
    file.chmod(0o440)
    file.parent.chmod(0o550)
    try:
        done = subprocess.run(
            [sys.executable, "-c", POWERLESS, sys.executable, "-m", "hive", "key", "new", "ci"],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        file.parent.chmod(0o750)

    assert done.returncode == 1
    assert "hive.toml: cannot be written: Permission denied" in done.stderr
    assert "Check the rights of the file and its directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert file.read_text() == WRITTEN


def test_a_configuration_behind_a_link_is_written_where_it_lies(
    file: Path, tmp_path: Path, capsys: Capture
) -> None:
    elsewhere = tmp_path / "elsewhere.toml"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    made(capsys, "ci")

    assert file.is_symlink()
    assert load(elsewhere).auth.keys


def test_the_files_mode_stays_whatever_the_umask(file: Path, capsys: Capture) -> None:
    old = os.umask(0o077)
    try:
        made(capsys, "ci")
    finally:
        os.umask(old)

    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_files_owner_stays(file: Path, capsys: Capture) -> None:
    """Else a key made by root locks the daemon's own user out of its configuration."""
    os.chown(file, 65534, 65534)
    made(capsys, "ci")

    assert (file.stat().st_uid, file.stat().st_gid) == (65534, 65534)
