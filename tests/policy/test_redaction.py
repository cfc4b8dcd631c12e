"""What is planted in a text never leaves it, wherever it stands; what is no secret stays."""

import string
import time
from base64 import urlsafe_b64encode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hive.policy.redaction import for_clients, without_secrets

TOKEN = string.ascii_letters + string.digits + "_-"
BEFORE = st.sampled_from(["", " ", '"', "'", "(", "\n", "=", ": ", ", "])
AFTER = st.sampled_from(["", " ", '"', "'", ")", "\n", ", ", "; "])
prose = st.text(max_size=40)
words = st.text(string.ascii_letters + " ,;'()\n", max_size=80)
planted = st.text(TOKEN[:62], min_size=24, max_size=64).map(lambda text: f"Zq{text}")
own_keys = st.binary(min_size=32, max_size=32).map(lambda raw: urlsafe_b64encode(raw).decode()[:43])
segments = st.text(TOKEN + ".", min_size=6, max_size=20).map(lambda text: f"Zq{text}")
octets = st.integers(0, 255)
addresses = st.tuples(octets, octets, octets, octets).map(lambda four: ".".join(map(str, four)))

FORMS = (
    "sk-{}",
    "hf_{}",
    "Authorization: Bearer {}",
    "authorization: bearer {}",
    "X-Api-Key: {}",
    "https://somebody:{}@example.org/x",
    "redis://somebody:{}@example.org:6379/0",
    "?api_key={}&x=1",
    "token={}",
    "password={}",
    '{{"cache_salt": "{}"}}',
    '{{"cache_salt":"{}"}}',
)
ROUTES = (
    "/v1/chat/completions",
    "/v1/models/llama",
    "/hive/v1/workers/llama-0/logs",
    "/hive/v1/events",
    "/livez",
    "/readyz",
    "/metrics",
    "/health",
    "/ui",
    "/tokenize",
    "/detokenize",
    "/rerank",
    "/score",
    "/pooling",
)


@given(prose, BEFORE, st.sampled_from(FORMS), planted, AFTER, prose)
def test_a_planted_secret_survives_neither_in_logs_nor_in_answers(
    before: str, opening: str, form: str, secret: str, closing: str, after: str
) -> None:
    """Keys, tokens, salts and passwords in the forms that logs have them in (R076)."""
    text = f"{before} {opening}{form.format(secret)}{closing} {after}"

    assert secret not in without_secrets(text)
    assert secret not in for_clients(text)


@given(prose, BEFORE, own_keys, AFTER, prose)
def test_a_key_that_hive_made_survives_nowhere(
    before: str, opening: str, key: str, closing: str, after: str
) -> None:
    """Whatever 43 characters 'hive key new' drew (R076)."""
    text = f"{before} {opening}hive_{key}{closing} {after}"

    assert key not in without_secrets(text)
    assert key not in for_clients(text)


@given(prose, BEFORE, st.lists(segments, min_size=1, max_size=5), AFTER, prose)
def test_a_planted_path_survives_in_no_answer(
    before: str, opening: str, parts: list[str], closing: str, after: str
) -> None:
    """An absolute path tells how the host is laid out (R076)."""
    answer = for_clients(f"{before} {opening.strip(':')}/{'/'.join(parts)}{closing} {after}")

    assert not [part for part in parts if part in answer]


@given(words, BEFORE, addresses, st.none() | st.integers(1, 65535), AFTER, words)
def test_a_planted_address_survives_in_no_answer(
    before: str, opening: str, address: str, port: int | None, closing: str, after: str
) -> None:
    """Hosts are named in logs only (R076)."""
    where = address if port is None else f"{address}:{port}"

    assert address not in for_clients(f"{before} {opening}{where}{closing} {after}")


@given(
    words,
    st.sampled_from(["http", "https", "tcp", "redis", "postgresql", "sqlite+aiosqlite"]),
    segments,
    words,
)
def test_a_planted_url_survives_in_no_answer(
    before: str, scheme: str, host: str, after: str
) -> None:
    """What hive talks to is not the client's to know (R076)."""
    assert host not in for_clients(f"{before} {scheme}://{host}:8000/{host}?x={host} {after}")


@given(st.sampled_from(ROUTES), BEFORE, AFTER)
def test_hives_own_routes_are_no_secret(route: str, opening: str, closing: str) -> None:
    text = f"POST {opening}{route}{closing} is served"

    assert for_clients(text) == text


@given(words)
def test_plain_words_stay_as_they_are(text: str) -> None:
    assert without_secrets(text) == text
    assert for_clients(text) == text


@given(st.lists(prose | st.sampled_from(["/etc/x", "10.0.0.1", "http://h/x", "hf_" + "a" * 9])))
@example(["key hive_" + "x" * 40, " at /srv/x of http://u:p@h and 10.1.2.3:80 ", "token=abc"])
def test_redacting_what_was_redacted_changes_nothing(parts: list[str]) -> None:
    text = " ".join(parts)

    assert without_secrets(without_secrets(text)) == without_secrets(text)
    assert for_clients(for_clients(text)) == for_clients(text)


def test_the_words_around_a_secret_stay() -> None:
    assert without_secrets("the key hive_0123456789abcdefXYZ was refused") == (
        "the key [secret] was refused"
    )
    assert for_clients("cannot read /srv/models/x/config.json: it is gone") == (
        "cannot read [path]: it is gone"
    )


LEAKS = {
    "an address at the end of a sentence": ("No route to 10.1.2.3.", "10.1.2.3"),
    "a port at the end of a sentence": ("No route to 10.1.2.3:8000.", "8000"),
    "an IPv6 address": ("cannot listen on [fd00::12:7]:8000", "fd00::12:7"),
    "a path after a colon": ("OSError:/srv/secret/model: gone", "secret"),
    "a file's URL": ("cannot open file:///srv/secret/x", "secret"),
    "a socket's URL": ("bind ipc:///run/secret/s failed", "secret"),
    "an unlisted scheme": ("cannot connect to wss://secret.example/x", "secret"),
    "a path that begins like a route": ("no file /health-secret/x", "secret"),
    "a password after a vendor's key": ("https://hf_abcdefgh:s3cr3t@example.org", "s3cr3t"),
    "the host of a URL with a password": ("redis://me:pw@secret.example/0 failed", "secret.ex"),
    "a dotted bearer": ("Bearer sk-abcdefgh.s3cr3t", "s3cr3t"),
    "a JSON field": ('{"api_key": "s3cr3t"}', "s3cr3t"),
    "a password after a colon": ("password: s3cr3t", "s3cr3t"),
    "an engine's argument list": ("args: {'api_key': ['s3cr3t']}", "s3cr3t"),
}


@pytest.mark.parametrize(("text", "secret"), LEAKS.values(), ids=LEAKS)
def test_the_less_usual_forms_are_found_too(text: str, secret: str) -> None:
    assert secret not in for_clients(text)


def test_a_metrics_name_is_no_key() -> None:
    name = "hive_event_loop_lag_seconds"

    assert without_secrets(name) == name


def test_a_text_made_to_be_slow_is_not() -> None:
    """Anybody may send a path, and it is looked through on hive's own event loop."""
    began = time.process_time()
    without_secrets("x://" + ":" * 200_000)
    without_secrets("://" * 70_000)
    assert time.process_time() - began < 5
