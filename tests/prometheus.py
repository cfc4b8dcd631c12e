"""A real Prometheus for tests: from the host's own package, on loopback, gone at the end.

It scrapes a hive as deploy/prometheus/prometheus.example.yml says, with hive's own rules; only more
often, so that a test need not wait.
"""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from steps import leaks
from tests.patience import wait_until

START_S = 30.0
SCRAPES, EVALUATIONS = "1s", "500ms"  # how often
DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "hive.rules.yml"
EXAMPLE = DEPLOY / "prometheus" / "prometheus.example.yml"
HOW = "make test-tools"
OK, LINT = 0, 3  # exit codes of promtool check metrics
WITH_US = ("setpriv", "--pdeathsig", "TERM")  # a test process that is killed leaves no server
_LISTENS = re.compile(r'msg="Listening on" address=\S+:(\d+)')


def program(name: str) -> str:
    """Where it is; skips the test, with the reason, where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {HOW}")
    return found


def promtool(*args: str | Path) -> str:
    """What it says; fails the test where it objects."""
    done = _promtool(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def complaints(page: str) -> list[str]:
    """What promtool has against a page of metrics. Fails the test where it cannot be read."""
    done = _promtool("check", "metrics", text=page)
    assert done.returncode in (OK, LINT), done.stderr
    return done.stderr.splitlines()


def _promtool(*args: str | Path, text: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program("promtool"), *args],
        input=text,
        env={**os.environ, "GOGC": "800"},  # a third quicker
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )


class Prometheus:
    """One server with its own data."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, hive_port: int, key: str | None = None) -> None:
        """Scrape the hive there, with that key, and evaluate its rules."""
        self._configure(hive_port, key)
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *WITH_US,
                    program("prometheus"),
                    f"--config.file={self.home / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self.home / 'data'}",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
            )
        leaks.started_pids.add(self._process.pid)
        wait_until(self._is_ready, "Prometheus", START_S)

    def _configure(self, hive_port: int, key: str | None) -> None:
        """The example as an operator fills it in."""
        config = yaml.safe_load(EXAMPLE.read_text())
        config["global"] = {"scrape_interval": SCRAPES, "evaluation_interval": EVALUATIONS}
        config["rule_files"] = [str(RULES)]
        del config["alerting"]
        (job,) = config["scrape_configs"]
        job["scrape_timeout"] = SCRAPES
        job["static_configs"] = [{"targets": [f"127.0.0.1:{hive_port}"]}]
        if key is None:
            del job["authorization"]
        else:
            key_file = self.home / "hive.key"
            key_file.write_text(key)
            job["authorization"]["credentials_file"] = str(key_file)
        (self.home / "prometheus.yml").write_text(yaml.safe_dump(config))

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        if listens := _LISTENS.search(self.log):
            self.port = int(listens[1])
        return "Server is ready to receive web requests" in self.log and self.port > 0

    @property
    def log(self) -> str:
        path = self.home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    # ── what it says ────────────────────────────────────────────────────────────────────────────

    def api(self, path: str, **params: object) -> Any:
        """The data of an answer; fails the test where Prometheus objects."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        try:
            query = f"?{urlencode(params)}" if params else ""
            connection.request("GET", f"/api/v1/{path}{query}")
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series that it has now, each with its labels and [time, value]."""
        found: list[dict[str, Any]] = self.api("query", query=expr)["result"]
        return found

    def history(self, expr: str, since: float, until: float) -> list[dict[str, Any]]:
        """The series that it had, a value a second, as a dashboard asks for them."""
        asked = {"query": expr, "start": since, "end": until, "step": 1}
        found: list[dict[str, Any]] = self.api("query_range", **asked)["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> Any:
        """What it scrapes, and what came of it last."""
        return self.api("targets")["activeTargets"]

    def has_evaluated(self) -> bool:
        """Whether every rule was, after a scrape that began now. Fails where one cannot be."""
        now = time.time()
        wait_until(lambda: self.query(f"timestamp(up) > {now}"), "a scrape", START_S)
        scraped = datetime.now(UTC)
        wait_until(lambda: self._evaluated_since(scraped), "every rule evaluated", START_S)
        assert [rule["lastError"] for rule in self.rules() if rule.get("lastError")] == []
        return True

    def _evaluated_since(self, when: datetime) -> bool:
        return all(datetime.fromisoformat(rule["lastEvaluation"]) > when for rule in self.rules())

    def firing(self, alert: str) -> list[dict[str, Any]]:
        """The alerts of that name that fire now."""
        return [
            one
            for one in self.api("alerts")["alerts"]
            if one["labels"]["alertname"] == alert and one["state"] == "firing"
        ]

    def end(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"Prometheus did not end:\n{self.log}") from None
        finally:
            self._process = None


@contextmanager
def server() -> Iterator[Prometheus]:
    """One to start; it ends with the block. Skips the test, with the reason, where there is none."""
    program("prometheus")
    home = Path(tempfile.mkdtemp(prefix="hprom", dir="/tmp"))
    it = Prometheus(home)
    try:
        yield it
    finally:
        it.end()
        shutil.rmtree(home)
