"""Every rule of the configuration: what is taken, what is refused, and what a refusal says."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hive.errors import ConfigInvalid
from hive.settings import FILE_BYTES, FIXED, Auth, Server, Settings, Timeouts, load

MODEL = """
[models.small]
engine = "command"
device = "cpu"
command = ["engine", "--uds", "{socket}"]
"""
NO_DEVICE = (
    'a model must name its device: device = "cuda:N", "GPU-<uuid>", a list, or "cpu"; '
    "hive never chooses one"
)
SHA = hashlib.sha256(b"a key").hexdigest()
KEY = f"""
[[auth.keys]]
name = "ci"
sha256 = "{SHA}"
"""

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hives_own = ("HIVE_", "CUDA_VISIBLE_DEVICES", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "XDG_")
    for name in [name for name in os.environ if name.startswith(hives_own)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """Load a text as the configuration file."""

    def run(text: str = MODEL, **flags: Any) -> Settings:
        file = tmp_path / "h.toml"
        file.write_text(text)
        return load(file, {"server": flags})

    return run


@pytest.fixture
def problems(loaded: Load) -> Callable[..., list[str]]:
    """Every problem that loading a text finds, without the file's name."""

    def run(text: str, **flags: Any) -> list[str]:
        with pytest.raises(ConfigInvalid) as caught:
            loaded(text, **flags)
        found: list[str] = caught.value.details["problems"]
        return [problem.partition("h.toml: ")[2] or problem for problem in found]

    return run


Problems = Callable[..., list[str]]


def model(extra: str = "", *, device: str | None = '"cpu"', name: str = "small") -> str:
    """A valid model's table, with more keys or another device."""
    lines = [f"[models.{name}]", 'engine = "command"', 'command = ["engine", "{socket}"]']
    if device is not None:
        lines.append(f"device = {device}")
    return "\n".join([*lines, extra, ""])


# ── Defaults ────────────────────────────────────────────────────────────────────────────────────


def test_the_defaults_are_those_of_the_contract(loaded: Load) -> None:
    settings = loaded()
    server, limits, small = settings.server, settings.timeouts, settings.models["small"]

    assert (server.host, server.port, server.gpu_error_policy) == ("127.0.0.1", 7411, "exit")
    assert (server.drain_s, server.driver_wait_s) == (30, 0)
    assert (server.max_body_mib, server.body_s) == (32, 10)
    assert (limits.request_s, limits.queue_s, limits.connect_s) == (30, 5, 2)
    assert (limits.inference_s, limits.stall_s, limits.stream_total_s) == (25, 25, 0)
    assert (limits.cleanup_s, limits.kill_s, limits.load_s) == (5, 5, 300)
    assert (settings.restarts.starts, settings.restarts.window_s) == (5, 300)
    assert (settings.breaker.failures, settings.breaker.cooldown_s) == (5, 60)
    kept = settings.windows
    assert (kept.kv_tier_gib, kept.kv_ram_gib, kept.kv_chunk_tokens) == (10, 1, 256)
    assert (kept.session_idle_s, kept.max_sessions) == (86_400, 10_000)
    assert (kept.max_windows, kept.max_gib) == (1000, 0)
    assert kept.kv_server == ()
    assert kept.catalogue_url.get_secret_value() == ""
    assert (small.max_concurrent, small.queue_depth) == (64, 32)
    assert (small.kv_cache_gib, small.required_vram_gib, small.windows) == (0, 0, False)
    assert (small.args, small.env, small.replicas, small.alternatives) == ((), {}, (), ())
    assert small.health_path == "/health"


def test_a_keys_defaults_are_those_of_the_contract(loaded: Load) -> None:
    (key,) = loaded(MODEL + KEY).auth.keys

    assert (key.scopes, key.priority) == (("inference",), "normal")
    assert (key.max_concurrent, key.requests_per_minute) == (8, 0)


def test_settings_cannot_be_changed_once_they_are_loaded(loaded: Load) -> None:
    settings = loaded()

    with pytest.raises(ValidationError):
        setattr(settings.server, "port", 1)  # noqa: B010 (mypy forbids it, too)
    with pytest.raises(ValidationError):
        setattr(settings, "timeouts", Timeouts())  # noqa: B010


@pytest.mark.parametrize(
    ("key", "systemd", "xdg"),
    [
        ("state_dir", "STATE_DIRECTORY", "XDG_STATE_HOME"),
        ("runtime_dir", "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"),
    ],
)
def test_directories_come_from_systemd_then_from_the_users_own(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, key: str, systemd: str, xdg: str
) -> None:
    monkeypatch.setenv(xdg, "/x")
    assert getattr(loaded().server, key) == Path("/x/hive")

    monkeypatch.setenv(systemd, "/sys/one:/sys/two")
    assert getattr(loaded().server, key) == Path("/sys/one")


def test_without_any_of_them_the_directories_are_the_users(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    assert loaded().server.state_dir == Path("/home/me/.local/state/hive")
    assert loaded().server.runtime_dir == Path(f"/tmp/hive-{os.getuid()}")


def test_directories_become_absolute(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = '[server]\nstate_dir = "~/s"\nruntime_dir = "r"\n' + MODEL

    assert loaded(text).server.state_dir == Path("/home/me/s")
    assert loaded(text).server.runtime_dir == Path.cwd() / "r"


def test_the_first_default_file_is_the_one_beside_us(tmp_path: Path) -> None:
    (tmp_path / "hive.toml").write_text("[server]\nport = 7\n" + MODEL)

    assert load().server.port == 7


# ── Where a value comes from ────────────────────────────────────────────────────────────────────


def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key by key: what one source leaves out comes from the next."""
    text = '[server]\nport = 1\ndrain_s = 1\nhost = "localhost"\n' + MODEL
    monkeypatch.setenv("HIVE_SERVER__PORT", "2")
    monkeypatch.setenv("HIVE_SERVER__DRAIN_S", "2.5")
    server = loaded(text, port=3, host=None).server

    assert (server.port, server.drain_s, server.host) == (3, 2.5, "localhost")


@pytest.mark.parametrize("section", FIXED)
def test_every_scalar_of_a_fixed_section_can_come_from_the_environment(
    loaded: Load, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    default = getattr(loaded(), section)
    values = {
        name: str(value or "1")  # the default again, which is always valid
        for name in type(default).model_fields
        if not isinstance(value := getattr(default, name), tuple | dict)
    }
    if "catalogue_url" in values:  # empty means another thing in the environment
        values["catalogue_url"] = "postgresql:///hive"
    if "backup_dir" in values:
        values["backup_dir"] = "/srv/backups"
    if "webhook_url" in values:
        values["webhook_url"] = "http://127.0.0.1:9093/api/v2/alerts"
        del values["webhook_token_file"]  # instead of the token
    for name, value in values.items():
        monkeypatch.setenv(f"HIVE_{section.upper()}__{name.upper()}", value)
    text = f"[{section}]\n" + "".join(f"{name} = -1\n" for name in values) + MODEL

    for name in values:
        assert getattr(getattr(loaded(text), section), name) != -1


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("HIVE_SEVER__PORT", "HIVE_SERVER__"),
        ("HIVE_TIMEOUT__QUEUE_S", "HIVE_TIMEOUTS__"),
        ("HIVE_MODELS__SMALL__DEVICE", "known: server, timeouts"),
    ],
)
def test_a_variable_of_no_section_is_refused_and_the_nearest_named(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, variable: str, near: str
) -> None:
    """Else a misspelt override would be passed over in silence."""
    monkeypatch.setenv(variable, "1")
    (problem,) = problems(MODEL)

    assert problem.startswith(f"{variable}: ")
    assert near in problem


def test_hives_other_variables_are_no_settings(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HIVE_URL", "HIVE_API_KEY", "HIVE_CONFIG", "HIVE_ENGINES", "HIVE_MARK"):
        monkeypatch.setenv(name, "something")

    assert loaded().server.port == 7411


def test_a_key_in_the_environment_is_unknown_like_one_in_the_file(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_SERVER__POTR", "1")

    (problem,) = problems(MODEL)
    assert problem.endswith("server.potr: unknown key; did you mean 'port'?")


def test_a_bad_value_from_the_environment_is_told_by_its_variable(
    loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_SERVER__PORT", "abc")
    with pytest.raises(ConfigInvalid) as caught:
        loaded()

    assert "HIVE_SERVER__PORT" in caught.value.message


@pytest.mark.parametrize("variable", ["HIVE_SERVER", "HIVE_MODELS", "HIVE_AUTH"])
def test_a_whole_section_in_one_variable_is_refused(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "abc")

    assert any(variable in problem for problem in problems(MODEL))


# ── What a refusal says ─────────────────────────────────────────────────────────────────────────


def test_all_problems_are_reported_at_once(problems: Problems) -> None:
    """File, key, value given and what is right, one line each (R074, R156, R220)."""
    found = problems(
        """
        typo = 1
        [server]
        port = 99999
        hots = "x"
        gpu_error_policy = "ignore"
        [timeouts]
        queue_s = 50
        [restarts]
        starts = -1
        [models.a]
        engine = "vlm"
        device = "cpu"
        [models.b]
        engine = "vllm"
        path = "/m"
        [models.c]
        engine = "vllm"
        path = "/m"
        command = ["x"]
        device = "cpu"
        [models.d]
        engine = "command"
        command = ["x", "{socket}"]
        device = "cpu"
        qeue_depth = 3
        timeouts = { stall = 2 }
        """
    )

    assert sorted(found) == sorted(
        [
            "typo: unknown key; known here: server, timeouts, restarts, breaker, auth, windows, alerts, audit, models",
            "server.port: input should be less than or equal to 65535 (got 99999)",
            "server.hots: unknown key; did you mean 'host'?",
            "server.gpu_error_policy: input should be 'exit' or 'quarantine' (got 'ignore')",
            "timeouts: queue_s (50.0) must not exceed request_s (30)",
            "restarts.starts: input should be greater than or equal to 0 (got -1)",
            "models.a.engine: input should be 'vllm' or 'command' (got 'vlm')",
            f"models.b: {NO_DEVICE}",
            'models.c: command belongs to engine = "command"',
            "models.d.qeue_depth: unknown key; did you mean 'queue_depth'?",
            "models.d.timeouts.stall: unknown key; did you mean 'stall_s'?",
        ]
    )


def test_the_message_is_the_first_problem_and_counts_the_others(
    loaded: Load, tmp_path: Path
) -> None:
    """(R028, R029)"""
    with pytest.raises(ConfigInvalid) as caught:
        loaded("[server]\nport = -1\nhots = 1\n" + MODEL)
    error = caught.value

    assert error.message.startswith(f"{tmp_path / 'h.toml'}: server.port: ")
    assert error.message.endswith("(got -1) (and 1 more)")
    assert "hive check" in error.suggested_action
    assert error.exit_code == 1


def test_the_checks_between_sections_are_reported_together(problems: Problems) -> None:
    """(R220)"""
    text = '[server]\nhost = "0.0.0.0"\n' + model('alternatives = ["gone"]', device='"cuda:0"')

    assert len(problems(text + model(device='"cuda:0"', name="other"))) == 3


def test_a_models_own_checks_are_reported_together(problems: Problems) -> None:
    """(R220)"""
    assert len(problems('[models.small]\nengine = "vllm"\n')) == 2


def test_a_value_that_is_long_is_cut(problems: Problems) -> None:
    (problem,) = problems(f'[server]\nlog_level = "{"x" * 500}"\n{MODEL}')

    assert len(problem) < 200
    assert problem.endswith("…)")


def test_secrets_are_not_shown(problems: Problems) -> None:
    """Neither a key's hash nor what an engine gets in its environment (R076)."""
    keys = '\n[[auth.keys]]\nname = "ci"\nsha256 = "s3cr3t"\nkey = "s3cr3t"\n'
    found = problems(model('env = "HF_TOKEN=s3cr3t"') + keys)

    assert len(found) == 3
    assert not [problem for problem in found if "s3cr3t" in problem]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://hive:s3cr3t@db.example:5433/hive",
        "postgres://hive:s3%40cr3t@[::1]/hive?sslmode=require",
        "postgresql+asyncpg://hive@db/hive?password=s3cr3t",
        "postgresql:///hive?host=/run/postgresql&password=s3cr3t",
    ],
)
def test_a_databases_url_is_taken_as_it_is_and_shown_to_nobody(loaded: Load, url: str) -> None:
    """R076"""
    settings = loaded(f'[windows]\ncatalogue_url = "{url}"\n' + MODEL)

    assert settings.windows.catalogue_url.get_secret_value() == url
    assert "s3" not in f"{settings!r}{settings}{settings.model_dump()}{settings.model_dump_json()}"


@pytest.mark.parametrize(
    ("url", "finding"),
    [
        ("s3cr3t", "this is no URL; PostgreSQL's is postgresql://"),
        ("mysql://u:s3cr3t@db/hive", "mysql is not supported; leave it empty for SQLite"),
        ("postgresql+psycopg://u:s3cr3t@db/hive", "postgresql+psycopg is not supported"),
        ("u:s3cr3t://db/hive", "this is not supported"),
        ("sqlite:////x/s3cr3t.db", "sqlite is not supported; leave it empty for SQLite"),
        ("postgresql://u:s3cr3t@db", "it names no database"),
        ("postgresql://u:s3cr3t@db/", "it names no database"),
        ("postgresql://u:a@db:s3cr3t/hive", "its port is no number from 1 to 65535"),
        ("postgresql://u:p/s3cr3t@db/hive", "its port is no number"),
        ("postgresql://u:s3cr3t@db:0/hive", "its port is no number"),
        ("postgresql://[u:s3cr3t@db/hive", "its port is no number"),
        ("postgresql://u:s3cr3t@db/hi\\u0000ve", "a NUL character cannot be part of it"),
    ],
)
def test_what_is_no_database_of_the_catalogue_is_refused_without_showing_it(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, url: str, finding: str
) -> None:
    """R076: whether it comes from the file or from the environment."""
    (found,) = problems(f'[windows]\ncatalogue_url = "{url}"\n' + MODEL)
    assert found.startswith(f"windows.catalogue_url: {finding}")
    assert "s3cr3t" not in found
    if "\\" not in url:
        monkeypatch.setenv("HIVE_WINDOWS__CATALOGUE_URL", url)
        (found,) = problems(MODEL)
        assert found.startswith(f"HIVE_WINDOWS__CATALOGUE_URL: windows.catalogue_url: {finding}")
        assert "s3cr3t" not in found


def test_a_database_without_its_driver_is_refused(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an environment that the extra was not installed in."""
    here = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", here)
    for name in [name for name in sys.modules if name.partition(".")[0] == "asyncpg"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    (found,) = problems('[windows]\ncatalogue_url = "postgresql:///x"\n' + MODEL)

    assert "asyncpg, which is not installed: pip install 'hive[postgres]'" in found


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("[server\n", "is not TOML: "),
        ("[server]\nport = 1\nport = 2\n", "is not TOML: "),
        ("\udcff", "is not UTF-8 (byte 0)"),
        ("#" * (FILE_BYTES + 1), "has more than 1 MiB"),
    ],
    ids=["syntax", "duplicate", "encoding", "size"],
)
def test_a_file_that_cannot_be_understood_is_refused(
    tmp_path: Path, text: str, finding: str
) -> None:
    file = tmp_path / "h.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigInvalid, match=r"h\.toml: ") as caught:
        load(file)

    assert finding in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """(R157)"""
    with pytest.raises(ConfigInvalid) as caught:
        load(tmp_path / "gone.toml")

    assert "gone.toml: cannot be read: No such file or directory" in caught.value.message
    assert "--config" in caught.value.suggested_action


@pytest.mark.skipif(Path("/etc/hive/hive.toml").exists(), reason="this host has a configuration")
def test_without_any_file_it_is_said_where_one_belongs() -> None:
    with pytest.raises(ConfigInvalid, match=r"hive\.toml or /etc/hive/hive\.toml"):
        load()


def test_a_configuration_without_models_is_refused(problems: Problems) -> None:
    (problem,) = problems("[server]\nport = 1\n")

    assert problem.startswith("models: no model is configured")


# ── Timeouts ────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(1, 1000), st.floats(0, 1000), st.floats(0.1, 1000), st.floats(0.1, 1000))
def test_the_cascade_is_checked_exactly(
    request_s: float, queue_s: float, inference_s: float, cleanup_s: float
) -> None:
    """The inner limits lie within the outer one, or the configuration is refused (R049)."""
    values = {
        "request_s": request_s,
        "queue_s": queue_s,
        "inference_s": inference_s,
        "cleanup_s": cleanup_s,
    }
    if queue_s <= request_s and inference_s + cleanup_s <= request_s:
        assert Timeouts(**values).request_s == request_s
    else:
        with pytest.raises(ValidationError, match="must not exceed request_s"):
            Timeouts(**values)


def test_a_models_own_timeouts_replace_the_common_ones(loaded: Load) -> None:
    settings = loaded(model("timeouts = { inference_s = 4, cleanup_s = 2, request_s = 6 }"))
    merged = settings.timeouts_of(settings.models["small"])

    assert (merged.inference_s, merged.cleanup_s, merged.request_s) == (4, 2, 6)
    assert (merged.queue_s, merged.stall_s, merged.load_s) == (5, 25, 300)


def test_the_contracts_own_example_of_a_models_timeouts_is_taken(loaded: Load) -> None:
    """Nobody who shortens a model's request_s thinks of the common queue_s."""
    settings = loaded(model("timeouts = { inference_s = 2, cleanup_s = 1, request_s = 3 }"))

    assert settings.timeouts_of(settings.models["small"]).queue_s <= 3


@pytest.mark.parametrize(
    "own", ["inference_s = 26", "request_s = 20", "cleanup_s = 6", "request_s = 4, inference_s = 1"]
)
def test_a_models_own_timeouts_keep_the_cascade_with_the_common_ones(
    problems: Problems, own: str
) -> None:
    """(R049)"""
    (problem,) = problems(model(f"timeouts = {{ {own} }}"))

    assert problem.startswith("models.small.timeouts: ")
    assert "inference_s + cleanup_s <= request_s" in problem


@pytest.mark.parametrize("value", ["-1", "0", "inf", "nan", "100000", '"soon"', "[]"])
def test_a_limit_is_a_positive_number_of_seconds_within_a_day(
    problems: Problems, value: str
) -> None:
    found = problems(f"[timeouts]\nconnect_s = {value}\n{MODEL}")

    assert len(found) == 1
    assert found[0].startswith("timeouts.connect_s: ")


@pytest.mark.parametrize("key", ["queue_s", "stream_total_s"])
def test_some_limits_may_be_0_for_none(loaded: Load, key: str) -> None:
    assert getattr(loaded(f"[timeouts]\n{key} = 0\n{MODEL}").timeouts, key) == 0


# ── Devices ─────────────────────────────────────────────────────────────────────────────────────

UUID = "GPU-8f5a0c1e-1234-5678-9abc-def012345678"


@pytest.mark.parametrize(
    ("device", "workers"),
    [
        ('"cpu"', (("cpu",),)),
        ('"cuda:0"', (("cuda:0",),)),
        ('"cuda:17"', (("cuda:17",),)),
        (f'"{UUID}"', ((UUID,),)),
        ('["cuda:0", "cuda:1"]', (("cuda:0", "cuda:1"),)),
    ],
)
def test_a_device_is_named_in_one_of_four_ways(
    loaded: Load, device: str, workers: tuple[tuple[str, ...], ...]
) -> None:
    """(R020)"""
    assert loaded(model(device=device)).models["small"].workers == workers


@pytest.mark.parametrize(
    "device",
    [
        '"cuda"',
        '"cuda:"',
        '"cuda:-1"',
        '"cuda:01"',
        '"cuda:0 "',
        '"CUDA:0"',
        '"gpu"',
        '"auto"',
        '"GPU-"',
        '"CPU"',
        '""',
        "0",
        "[]",
        '["cuda:0", "cuda:0"]',
        '["cuda:0", "cpu"]',
        '["cuda:0", "auto"]',
    ],
)
def test_any_other_device_is_refused_and_none_is_guessed(problems: Problems, device: str) -> None:
    """(R020)"""
    found = problems(model(device=device))

    assert all(problem.startswith("models.small.device") for problem in found)


def test_one_bad_item_is_one_problem(problems: Problems) -> None:
    assert len(problems(model(device='"auto"'))) == 1


@pytest.mark.parametrize("extra", ["", "replicas = []"])
def test_a_model_that_names_no_device_is_refused(problems: Problems, extra: str) -> None:
    """hive never chooses one (R020)."""
    (problem,) = problems(model(extra, device=None))

    assert "must name its device" in problem
    assert "hive never chooses" in problem


def test_each_replica_is_a_worker_with_its_own_devices(loaded: Load) -> None:
    one_each = loaded(model('replicas = ["cuda:0", "cuda:1"]', device=None)).models["small"]
    pairs = loaded(model('replicas = [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]', device=None))

    assert one_each.workers == (("cuda:0",), ("cuda:1",))
    assert pairs.models["small"].workers == (("cuda:0", "cuda:1"), ("cuda:2", "cuda:3"))


def test_several_workers_may_run_on_the_cpu(loaded: Load) -> None:
    assert len(loaded(model('replicas = ["cpu", "cpu"]', device=None)).models["small"].workers) == 2


def test_device_and_replicas_exclude_each_other(problems: Problems) -> None:
    assert problems(model('replicas = ["cpu"]')) == [
        "models.small: give either device or replicas, not both"
    ]


def test_two_models_on_one_device_must_state_their_vram(problems: Problems, loaded: Load) -> None:
    one = model("kv_cache_gib = 2", device='"cuda:0"', name="one")
    (problem,) = problems(one + model(device='"cuda:0"', name="two"))

    assert "one, two share cuda:0" in problem
    assert "missing for two" in problem
    for stated in ("kv_cache_gib = 1", "required_vram_gib = 1"):
        two = model(stated, device='"cuda:0"', name="two")
        assert len(loaded(one + two).models) == 2


def test_two_workers_of_one_model_on_one_device_must_state_their_vram_too(
    problems: Problems,
) -> None:
    (problem,) = problems(model('replicas = ["cuda:0", "cuda:0"]', device=None))

    assert "share cuda:0" in problem


def test_models_may_share_the_cpu(loaded: Load) -> None:
    assert len(loaded(model(name="one") + model(name="two")).models) == 2


@pytest.mark.parametrize("value", ["0", "", "GPU-1"])
def test_cuda_visible_devices_in_hives_environment_is_refused(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Even empty: hive sets it for each engine, by UUID (R020)."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    (problem,) = problems(MODEL)

    assert "CUDA_VISIBLE_DEVICES is set in hive's environment" in problem
    assert "unset it" in problem


def test_cuda_visible_devices_in_a_models_environment_is_refused(problems: Problems) -> None:
    (problem,) = problems(model('env = { CUDA_VISIBLE_DEVICES = "0" }'))

    assert "models.small: env must not set CUDA_VISIBLE_DEVICES" in problem


# ── Models ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5", "a.b.c"])
def test_an_unquoted_name_with_a_dot_is_explained(problems: Problems, name: str) -> None:
    """TOML makes tables of it; 'unknown key 1-8b' would help nobody."""
    first, second, *_ = name.split(".")

    assert problems(model(name=name)) == [
        f'models.{first}.{second}: quote a name with a dot: [models."{first}.{second}"]'
    ]


@pytest.mark.parametrize("name", ["a", "llama-3.1-8b", "A_b.c", "x" * 64])
def test_a_models_name_is_what_clients_can_send(loaded: Load, name: str) -> None:
    assert list(loaded(model(name=f'"{name}"')).models) == [name]


@pytest.mark.parametrize("name", ["", "-a", "a-", ".a", "a b", "a/b", "é", "x" * 65, "a\\n"])
def test_other_names_are_refused(problems: Problems, name: str) -> None:
    (problem,) = problems(model(name=f'"{name}"'))

    assert "a model's name is 1 to 64 of letters" in problem


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ('engine = "vllm"', "engine vllm needs path"),
        ('engine = "vllm"\npath = "/m"\ncommand = ["x"]', 'command belongs to engine = "command"'),
        ('engine = "command"', 'engine command needs command = ["prog", "--uds", '),
        ('engine = "command"\ncommand = ["x", "--port", "1"]', "command must pass {"),
        ('path = "/m"', "field required"),
        ('engine = "vllm"\npath = ""', "at least 1 character"),
        ('engine = "vllm"\npath = "/m"\nhealth_path = "health"', "should match pattern '^/'"),
        ('engine = "vllm"\npath = "/m"\nprobe = "none"', "(got 'none')"),
        ('engine = "vllm"\npath = "/m"\nrunning = "yes"', "'vllm' or 'none' (got 'yes')"),
        ('engine = "vllm"\npath = "/m"\nmax_concurrent = 0', "(got 0)"),
        ('engine = "vllm"\npath = "/m"\nqueue_depth = -1', "(got -1)"),
        ('engine = "vllm"\npath = "/m"\nargs = "--x"', "args"),
    ],
)
def test_what_a_model_must_say_is_checked(problems: Problems, text: str, finding: str) -> None:
    (problem,) = problems(f'[models.small]\ndevice = "cpu"\n{text}\n')

    assert problem.startswith("models.small")
    assert finding in problem


@pytest.mark.parametrize("command", ["", 'command = ["x"]'])
def test_the_placeholder_is_shown_as_it_must_be_written(problems: Problems, command: str) -> None:
    (problem,) = problems(f'[models.small]\ndevice = "cpu"\nengine = "command"\n{command}\n')

    assert "{socket}" in problem
    assert "{{" not in problem


def test_a_queue_of_0_refuses_at_once_and_is_allowed(loaded: Load) -> None:
    small = loaded(model("queue_depth = 0\nmax_concurrent = 1")).models["small"]

    assert (small.max_concurrent, small.queue_depth) == (1, 0)


def test_an_alternative_must_be_configured(problems: Problems, loaded: Load) -> None:
    """It is a hint in an error, never switched to."""
    (problem,) = problems(model('alternatives = ["tiny"]'))

    assert "models.small.alternatives names 'tiny', which is not configured" in problem
    assert loaded(model('alternatives = ["tiny"]') + model(name="tiny")).models


# ── Where hive listens ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(loaded: Load, host: str) -> None:
    assert loaded(f'[server]\nhost = "{host}"\n{MODEL}').server.is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "gpu-host"])
def test_anything_else_needs_a_key(problems: Problems, loaded: Load, host: str) -> None:
    text = f'[server]\nhost = "{host}"\n{MODEL}'
    (problem,) = problems(text)

    assert f"server.host = '{host}' is not loopback" in problem
    assert "hive key new" in problem
    assert not loaded(text + KEY).server.is_loopback


def test_the_rule_holds_for_a_host_from_the_environment_or_a_flag(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not loopback" in problems(MODEL, host="0.0.0.0")[0]
    monkeypatch.setenv("HIVE_SERVER__HOST", "0.0.0.0")
    assert "not loopback" in problems(MODEL)[0]


@pytest.mark.parametrize("port", ["-1", "65536", "1.5", '"http"'])
def test_a_port_is_a_port(problems: Problems, port: str) -> None:
    assert problems(f"[server]\nport = {port}\n{MODEL}")[0].startswith("server.port: ")


def test_a_runtime_directory_too_long_for_a_socket_is_refused_by_its_key(
    problems: Problems, loaded: Load
) -> None:
    """A unix socket's path has 107 bytes; bytes, not characters."""
    fits = "/" + "é" * 44
    assert loaded(f'[server]\nruntime_dir = "{fits}"\n{MODEL}').server.runtime_dir == Path(fits)

    (problem,) = problems(f'[server]\nruntime_dir = "/{"é" * 50}"\n{MODEL}')
    assert "server.runtime_dir is too long" in problem
    assert "at most 107" in problem


# ── Keys ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key",
    [
        f'name = ""\nsha256 = "{SHA}"',
        f'name = "a b"\nsha256 = "{SHA}"',
        'name = "ci"',
        f'name = "ci"\nsha256 = "{SHA[:-1]}"',
        f'name = "ci"\nsha256 = "{SHA.upper()}"',
        f'name = "ci"\nsha256 = "{SHA}"\nscopes = []',
        f'name = "ci"\nsha256 = "{SHA}"\nscopes = ["root"]',
        f'name = "ci"\nsha256 = "{SHA}"\npriority = "urgent"',
        f'name = "ci"\nsha256 = "{SHA}"\nmax_concurrent = -1',
    ],
)
def test_a_key_that_is_not_as_it_must_be_is_refused(problems: Problems, key: str) -> None:
    found = problems(f"{MODEL}\n[[auth.keys]]\n{key}\n")

    assert all(problem.startswith("auth.keys.0.") for problem in found)


def test_two_keys_of_one_name_are_refused(problems: Problems) -> None:
    (problem,) = problems(MODEL + KEY + KEY)

    assert problem == "auth.keys: key names must differ; given twice: ci"


def test_sections_can_be_made_without_a_file() -> None:
    """What each part of hive gets is a plain value."""
    assert Server(port=1).port == 1
    assert Auth().keys == ()


# ── What the kernel would refuse ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (r'path = "/a\u0000b"', "path"),
        (r'python = "/a\u0000b"', "python"),
        (r'args = ["a", "\u0000"]', "args.1"),
        (r'env = { A = "\u0000" }', "env.A"),
        (r'env = { "A\u0000" = "b" }', "env"),
        (r'health_path = "/\u0000"', "health_path"),
        (r'command = ["\u0000", "{socket}"]', "command.0"),
    ],
)
def test_a_nul_is_refused_where_it_stands(problems: Problems, line: str, key: str) -> None:
    text = MODEL if not line.startswith("command") else MODEL.replace("command =", "args =")
    (problem,) = problems(f"{text}{line}\n")

    assert problem.startswith(f"models.small.{key}")
    assert "NUL" in problem


@pytest.mark.parametrize("key", ["state_dir", "runtime_dir", "host"])
def test_a_nul_in_the_servers_keys_is_refused(problems: Problems, key: str) -> None:
    (problem,) = problems(f'[server]\n{key} = "/a\\u0000b"\n{MODEL}')

    assert problem.startswith(f"server.{key}: a NUL character")


@pytest.mark.parametrize("name", ["", "A=B"])
def test_the_name_of_a_variable_must_be_one(problems: Problems, name: str) -> None:
    (problem,) = problems(f'{MODEL}env = {{ "{name}" = "1" }}\n')

    assert "the name of a variable" in problem


@pytest.mark.parametrize("path", ["x" * 256, "/".join(["x" * 200] * 21)])
@pytest.mark.parametrize("key", ["path", "python"])
def test_a_path_that_no_kernel_takes_is_refused(problems: Problems, path: str, key: str) -> None:
    (problem,) = problems(f'{MODEL}{key} = "{path}"\n')

    assert problem.startswith(f"models.small.{key}: a path has at most 4095 bytes")


@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".a"])
def test_a_host_that_cannot_be_looked_up_is_refused(problems: Problems, host: str) -> None:
    (problem,) = problems(f'[server]\nhost = "{host}"\n{MODEL}')

    assert problem.startswith("server.host: this is neither an address nor a host's name")


def test_a_home_of_nobody_is_refused(problems: Problems) -> None:
    (problem,) = problems(f'[server]\nstate_dir = "~nobody-of-that-name/x"\n{MODEL}')

    assert problem.startswith("server.state_dir: there is no such user's home directory")


def test_one_directory_cannot_be_both(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "d")
    server = f'[server]\nstate_dir = "{tmp_path}/d"\nruntime_dir = "{tmp_path}/link/."\n'
    (problem,) = problems(server + MODEL)

    assert problem.startswith("server.state_dir and server.runtime_dir are the same directory")


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("backups", "windows.backup_dir: a path is absolute"),
        ("~/backups", "windows.backup_dir: a path is absolute"),
        ("{top}/s", "windows.backup_dir and server.state_dir are the same"),
        ("{top}/s/kv", "windows.backup_dir is {top}/s/kv, which hive itself uses"),
        ("{top}/s/windows/b", "windows.backup_dir is {top}/s/windows/b, which hive itself uses"),
        ("{top}/r/backups", "windows.backup_dir is {top}/r/backups, which hive itself uses"),
        ("{top}/link/backups", "windows.backup_dir is {top}/r/backups, which hive itself uses"),
    ],
)
def test_backups_are_where_nothing_is_cleared(
    problems: Problems, tmp_path: Path, place: str, wrong: str
) -> None:
    """R049, R107: a directory that hive tidies would lose them."""
    (tmp_path / "link").symlink_to(tmp_path / "r")
    server = f'[server]\nstate_dir = "{tmp_path}/s"\nruntime_dir = "{tmp_path}/r"\n'
    windows = f'[windows]\nbackup_dir = "{place.format(top=tmp_path)}"\n'
    (problem,) = problems(server + windows + MODEL)

    assert problem.startswith(wrong.format(top=tmp_path))


def test_backups_are_below_the_state_unless_it_is_said_where(tmp_path: Path) -> None:
    server = {"state_dir": tmp_path / "s", "runtime_dir": tmp_path / "r"}
    given: dict[str, Any] = {
        "server": server,
        "models": {"m": {"engine": "command", "device": "cpu", "command": ["x{socket}"]}},
    }
    assert Settings.model_validate(given).backup_dir == tmp_path / "s" / "backups"
    given["windows"] = {"backup_dir": tmp_path / "elsewhere"}
    assert Settings.model_validate(given).backup_dir == tmp_path / "elsewhere"


def test_a_pipe_is_no_configuration_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "h.toml")
    with pytest.raises(ConfigInvalid, match="it is not a regular file"):
        load(tmp_path / "h.toml")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_a_value_that_no_parser_takes_is_told(loaded: Load, value: str) -> None:
    with pytest.raises(ConfigInvalid, match="is not TOML"):
        loaded(f"a = {value}\n{MODEL}")


# ── Windows ─────────────────────────────────────────────────────────────────────────────────────


def test_the_windows_keys_are_taken(loaded: Load) -> None:
    text = """
    [windows]
    kv_tier_gib = 0.5
    kv_ram_gib = 0.1
    kv_chunk_tokens = 16
    kv_server = ["/opt/lmcache", "--x"]
    session_idle_s = 0.5
    max_sessions = 0
    max_windows = 0
    max_gib = 2.5
    """
    kept = loaded(text + MODEL).windows

    assert (kept.kv_tier_gib, kept.kv_ram_gib, kept.kv_chunk_tokens) == (0.5, 0.1, 16)
    assert kept.kv_server == ("/opt/lmcache", "--x")
    assert (kept.session_idle_s, kept.max_sessions) == (0.5, 0)
    assert (kept.max_windows, kept.max_gib) == (0, 2.5)


@pytest.mark.parametrize(
    "line",
    [
        "kv_tier_gib = 0",
        "kv_ram_gib = 0",
        "kv_ram_gib = 100001",
        "kv_chunk_tokens = 15",
        "kv_chunk_tokens = 65537",
        "kv_chunk_tokens = 16.5",
        'kv_server = "lmcache"',
        "kv_server = [1]",
        "max_sessions = -1",
        "session_idle_s = 0",
        "session_idle_s = inf",
        "session_idle_s = nan",
        "max_windows = -1",
        "max_windows = 1.5",
        "max_gib = -1",
    ],
)
def test_a_windows_key_out_of_its_range_is_refused(problems: Problems, line: str) -> None:
    (problem,) = problems(f"[windows]\n{line}\n{MODEL}")

    assert problem.startswith(f"windows.{line.partition(' ')[0]}")


def test_a_command_with_windows_must_pass_the_address_of_lmcache_on(
    loaded: Load, problems: Problems
) -> None:
    (problem,) = problems(model("windows = true"))
    assert problem == (
        "models.small: windows = true: command must pass {kv} on, the address of the LMCache server"
    )

    text = model("windows = true").replace('"{socket}"', '"{socket}", "--kv={kv}"')
    assert loaded(text).models["small"].windows
    (problem,) = problems(text.replace("{kv}", "{kv_path}"))
    assert "{kv}" in problem
