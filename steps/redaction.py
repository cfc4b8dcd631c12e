"""Steps about redaction: a secret of its own in every input, and each looked for in every output."""

import base64
import contextlib
import hashlib
import json
import re
import secrets
import sys
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pytest_bdd import given, then, when

from hive.errors import by_code
from steps.driver import Answer, chat_body, journal
from steps.mcp import Agent
from steps.memory import HEADER, SMALL, WINDOWS
from steps.story import CHAT, Story
from steps.waiting import must
from tests.doubles.webhook import Webhook

OWNER, OTHER, ADMIN, SCRAPER = "owner", "other", "admin", "scraper"  # keys, and who asks with them
SCOPES = {OWNER: "inference", OTHER: "inference", ADMIN: "admin", SCRAPER: "metrics"}
MODEL, BROKEN = "llama", "broken"
# Where what was planted may be found after all: the mark, the places (a pattern), and why.
OWNERS = "(answer to|agent of) (owner|admin)|command of admin"
MAY = (
    ("conversation", "(answer to|agent of) owner", "it is the owner's, who gets it back to go on"),
    ("description", OWNERS, "for whose window it is, and for an admin"),
    ("tag", OWNERS, "for whose window it is, and for an admin"),
    ("engineword", "answer to owner", "the engine's own refusal is passed on as it is"),
    ("idlikekey", "answer to owner", "the request's id, which it chose, goes back to it"),
    ("requestid", "answer to owner", "the request's id, which it chose, goes back to it"),
    ("requestid", "answer to admin|the log|audit .*", "it is there to be found, by an admin"),
    ("ownname", "answer to owner", "R083: a name that does not exist is repeated to who asked"),
    ("ownname", "the log", "the path of a request is in its line"),
    ("enginepath", "log of a worker|the log", "the engine's words, for who must find the file"),
    ("enginehost", "log of a worker|the log", "the engine's words, for who looks after the host"),
    ("home", "log of a worker|the log", "the engine's words, and hive's for who is at the host"),
)
# hive, but what takes secrets and paths out of texts leaves them as they are.
TALKATIVE = """
import runpy, sys
import hive.policy.redaction as redaction

redaction.without_secrets = redaction.for_clients = lambda text: text
sys.argv = sys.argv[sys.argv.index("hive") :]
runpy.run_module("hive", run_name="__main__", alter_sys=True)
"""


class Planted:
    """The marks, what was said where, and who said it."""

    def __init__(self, story: Story) -> None:
        self.story, self.hive = story, story.hive
        self.marks: dict[str, str] = {}
        self.told: list[tuple[str, str]] = []  # place, text
        self.webhook = Webhook()
        self.keys = {who: self.key(f"{who}key") for who in SCOPES}
        self.state = self.hive.home / self.mark("statedir")

    def mark(self, name: str) -> str:
        """Of nothing else's form: only what hive knows to be a secret's place, or form, saves it."""
        return self.marks.setdefault(name, f"Z{secrets.token_hex(8)}q")

    def key(self, name: str) -> str:
        """As `hive key new` makes them."""
        return "hive_" + self.mark(name) + secrets.token_urlsafe(32)[: 43 - len(self.mark(name))]

    def heard(self, place: str, text: str | bytes) -> None:
        self.told.append((place, text if isinstance(text, str) else text.decode(errors="replace")))

    # ── what is planted before hive starts ──────────────────────────────────────────────────────

    def configure(self) -> None:
        hive, mark = self.hive, self.mark
        self.webhook.start()
        self.marks["home"] = hive.home.name  # of every absolute path
        model_path = hive.home / mark("modelpath")
        model_path.mkdir()
        self.webhook.token = mark("webhooktoken")
        hive.sections["server"] |= {"state_dir": str(self.state), "log_level": "debug"}
        hive.sections["restarts"] = {"starts": 1, "backoff_s": 0.05}
        hive.sections["alerts"] = {
            "webhook_url": f"{self.webhook.url}?{mark('webhookurl')}",
            "webhook_token": self.webhook.token,
            "level": "info",
        }
        hive.sections["windows"] = dict(SMALL)
        hive.keys = [
            {"name": who, "sha256": self.hash_of(who), "scopes": [scope]}
            for who, scope in SCOPES.items()
        ]
        hive.key = self.keys[ADMIN]
        knobs = ("--stderr", self.engine_says(), "--max-model-len", "4000")
        environment = {"HF_TOKEN": f"hf_{mark('envtoken')}", "DATABASE": mark("envvalue")}
        hive.model(MODEL, *knobs, windows=True, path=str(model_path), env=environment)
        hive.model(BROKEN, "--load-fail", f"RuntimeError: {self.engine_says()}")

    def hash_of(self, who: str) -> str:
        return self.marks.setdefault(
            f"hash of {who}'s key", hashlib.sha256(self.keys[who].encode()).hexdigest()
        )

    def engine_says(self) -> str:
        """What engines and libraries print of their surroundings, on one line, as a last word is."""
        mark = self.mark
        return (
            f"cannot load with api_key={mark('enginekey')} Authorization: Bearer {mark('enginebearer')} "
            f"token: '{mark('enginetoken')}' cache_salt={mark('enginesalt')} sk-{mark('vendorkey')} "
            f"hf_{mark('hubtoken')} http://user:{mark('urlpassword')}@{mark('enginehost')}.internal/x "
            f"/opt/{mark('enginepath')}/weights"
        )

    # ── who asks ────────────────────────────────────────────────────────────────────────────────

    def ask(
        self, who: str, method: str, path: str, body: Any = None, as_: str = "", **headers: str
    ) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if who in self.keys and not {"Authorization", "X-Api-Key"} & named.keys():
            named["Authorization"] = f"Bearer {self.keys[who]}"
        named.setdefault("Authorization", "") if who not in self.keys else None
        answer = self.hive.ask(method, path, body, named, timeout_s=30)
        self.heard(as_ or f"answer to {who}", f"{answer.status} {dict(answer.headers)}\n")
        self.heard(as_ or f"answer to {who}", answer.body)
        return answer

    def good(self, *args: Any, **headers: str) -> Any:
        answer = self.ask(*args, **headers)
        assert answer.status < 300, (args, answer)
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.json if is_json else None

    def use_everything(self) -> None:
        self.infer()
        self.ask_as_strangers()
        self.ask_with_bad_headers()
        self.remember()
        self.send_what_is_no_http()
        self.fail_at_the_engine()

    def infer(self) -> None:
        """Prompts and what else is in a body, answered and refused."""
        mark = self.mark
        said = {
            "messages": [
                {"role": "system", "content": f"be {mark('systemprompt')}"},
                {"role": "user", "content": [{"type": "text", "text": f"a {mark('prompt')}"}]},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {
                                "name": "f",
                                "arguments": f'{{"a": "{mark("toolargument")}"}}',
                            },
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": mark("toolresult")},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "description": mark("tool")}}],
            "user": mark("enduser"),
            "cache_salt": mark("owncachesalt"),
            "max_tokens": 4,
        }
        headers = {
            "User_Agent": mark("useragent"),
            "Referer": f"https://{mark('referer')}.example/",
            "Cookie": f"session={mark('cookie')}",
            "Host": f"{mark('host')}.internal",
            "X_Forwarded_For": mark("forwarded"),
            "X_Request_Id": mark("requestid"),
        }
        self.good(OWNER, "POST", CHAT, {"model": MODEL, **said}, **headers)
        headers["X_Request_Id"] = f"sk-{mark('idlikekey')}"  # somebody's mistake
        self.good(OWNER, "POST", CHAT, {"model": MODEL, "stream": True, **said}, **headers)
        self.good(OWNER, "POST", "/tokenize", {"model": MODEL, "prompt": mark("prompt")})
        self.good(OWNER, "POST", "/v1/embeddings", {"model": MODEL, "input": mark("prompt")})
        for body in (
            {"model": mark("modelname"), **said},
            {"model": BROKEN, **said},
            {"model": {"name": mark("modelname")}, **said},
            json.dumps({"model": MODEL, **said}).encode()[:-1],
            f'{{"model": "{MODEL}", "prompt": {mark("prompt")}}}'.encode(),
            json.dumps({"prompt": mark("prompt")}).encode(),
            {"model": MODEL, "prompt": "a", "max_tokens": mark("engineword")},
        ):
            path = CHAT if b"messages" in json.dumps(str(body)).encode() else "/v1/completions"
            assert self.ask(OWNER, "POST", path, body).status >= 400
        boundary = mark("boundary")
        form = f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{mark("prompt")}\r\n'
        kind = f"multipart/form-data; boundary={boundary}"
        self.ask(OWNER, "POST", "/v1/audio/transcriptions", form.encode(), Content_Type=kind)

    def ask_as_strangers(self) -> None:
        """Wrong keys where keys belong, and where they do not."""
        wrong, mark = self.key("wrongkey"), self.mark
        basic = base64.b64encode(f"user:{mark('basic')}".encode()).decode()
        self.marks["basic as it was sent"] = basic
        query = urllib.parse.urlencode({"api_key": wrong, "token": mark("querytoken")})
        for headers in (
            {"Authorization": f"Bearer {wrong}"},
            {"Authorization": wrong},
            {"Authorization": f"Basic {basic}"},
            {"Authorization": "", "X_Api_Key": wrong},
        ):
            for path in (f"/v1/models?{query}", f"/hive/v1/status?{query}", f"/metrics?{query}"):
                assert self.ask("stranger", "GET", path, **headers).status == 401
            answer = self.ask("stranger", "POST", f"{CHAT}?{query}", chat_body(MODEL), **headers)
            assert answer.status == 401
        key = urllib.parse.quote(self.keys[OWNER])
        self.ask("stranger", "GET", f"/hive/v1/status?api_key={key}", Authorization="")
        self.ask(OWNER, "GET", f"/hive/v1/sessions/sk-{mark('keyinpath')}")
        self.ask(OWNER, "GET", f"/v1/models/hf_{mark('keyinmodel')}")
        for path in ("/hive/v1/leaks", "/metrics", "/hive/v1/events"):
            assert self.ask(OTHER, "GET", path).status == 403

    def ask_with_bad_headers(self) -> None:
        mark, body = self.mark("badheader"), chat_body(MODEL)
        for name in (
            *("X_Hive_Timeout", "X_Request_Deadline", "X_Hive_Priority", "X_Hive_Session"),
            *("Content_Encoding", "Expect", "Content_Type", "Accept", "Last_Event_ID"),
        ):
            self.ask(OWNER, "POST", CHAT, body, **{name: f"{mark} {mark}"})
        for query in (
            f"state={mark}", f"sort={mark}", f"limit={mark}", f"tag={mark}", f"owner={mark}", f"model={mark}"
        ):  # fmt: skip
            self.ask(OWNER, "GET", f"{WINDOWS}?{query}")
        for method in ("PUT", "GET", "DELETE"):
            self.ask(OWNER, method, f"/v1/completions?{mark}")

    def remember(self) -> None:
        """Sessions, windows and backups, and what others ask of them."""
        mark = self.mark
        words = " ".join(f"{mark('conversation')}{n}" for n in range(60))
        session = self.good(OWNER, "POST", "/hive/v1/sessions", {"model": MODEL})["id"]
        talk = chat_body(MODEL, max_tokens=4) | {"messages": [{"role": "user", "content": words}]}
        named = {HEADER.replace("-", "_"): session}
        self.good(OWNER, "POST", CHAT, talk, **named)
        self.ask(OWNER, "POST", CHAT, {**talk, "cache_salt": mark("owncachesalt")}, **named)
        window = {
            "session_id": session,
            "name": "monday",
            "description": f"about {mark('description')}",
            "tags": [mark("tag")],
        }
        self.good(OWNER, "POST", WINDOWS, window)
        self.ask(OWNER, "POST", WINDOWS, window)
        for who in (OWNER, ADMIN, OTHER):
            for path in (WINDOWS, f"{WINDOWS}/monday", f"{WINDOWS}?tag={mark('tag')}"):
                self.ask(who, "GET", path)
            self.ask(
                who,
                "GET",
                f"/hive/v1/sessions/{session}",
                as_="answer to owner" if who == ADMIN else "",
            )
        self.good(OWNER, "POST", f"{WINDOWS}/monday/verify")
        self.good(OWNER, "POST", f"{WINDOWS}/monday/clone", {"name": "tuesday"})
        self.good(OWNER, "POST", "/hive/v1/backups", {"window": "monday"})
        self.good(OWNER, "DELETE", f"{WINDOWS}/tuesday")
        self.good(OWNER, "POST", "/hive/v1/backups/restore", {"window": "monday", "name": "again"})
        for who in (OWNER, OTHER):
            for what in ("thaw", "verify", "repair"):
                self.ask(who, "POST", f"{WINDOWS}/monday/{what}", {})
            self.ask(who, "GET", f"{WINDOWS}/{mark('ownname') if who == OWNER else 'monday'}")
        bad = mark("badbody")
        unknown = mark("ownname")
        for body in (
            {"session_id": unknown, "name": "x"},
            {"session_id": session, "name": f"/{bad}"},
        ):
            self.ask(OWNER, "POST", WINDOWS, body)
        self.ask(OWNER, "POST", WINDOWS, {**window, "description": [bad]})
        self.ask(OWNER, "POST", WINDOWS, f'{{"session_id": {bad}'.encode())
        self.ask(OWNER, "POST", "/hive/v1/backups/restore", {"window": "monday", "timestamp": bad})

    def send_what_is_no_http(self) -> None:
        mark = self.mark("nohttp")
        for sent in (
            f"{mark}\r\n\r\n",
            f"GET /livez HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {mark}\0\r\n\r\n",
            f"GET /{mark} HTTP/7.7\r\n\r\n",
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-A: {mark * 600}\r\n\r\n",
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{mark}\r\n",
            f"GET http://[{mark}/ HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            with self.hive.send_raw(sent.encode()) as sock:
                got = b""
                with contextlib.suppress(OSError):
                    while part := sock.recv(65536):
                        got += part
            assert b" 400 " in got, got
            self.heard("answer to stranger", got)

    def fail_at_the_engine(self) -> None:
        """An event for requests that failed at a worker, with their ids."""
        double = self.hive.double(MODEL)
        double.set(hang_up=3)
        prompt = {"model": MODEL, "prompt": self.mark("prompt")}
        headers = {"X_Request_Id": f"sk-{self.mark('idlikekey')}", "X_Hive_Timeout": "0.5"}
        assert self.ask(OWNER, "POST", "/v1/completions", prompt, **headers).status >= 500
        double.set(hang_up=0, answer_status="500")
        self.ask(OWNER, "POST", "/v1/completions", prompt)
        double.set(answer_status="")
        self.hive.double(MODEL).die("segv")
        must(lambda: self.hive.logged("engine exited", worker=f"{MODEL}-0"), 10, "its end")

    # ── what is told ────────────────────────────────────────────────────────────────────────────

    def listen_to(self, agent: Agent) -> None:
        """An agent's tools, with the owner's key and an admin's."""
        for who in (OWNER, ADMIN):
            agent.come("stdio", self.keys[who])
            for tool, arguments in (
                ("window_list", {}),
                ("window_status", {"window_name": "monday"}),
                ("window_thaw", {"window_name": "monday"}),
                ("window_freeze", {"session_id": "nobody", "window_name": self.mark("agentword")}),
                ("session_list", {}),
                ("worker_list", {}),
                ("cache_stats", {}),
                ("health_check", {}),
                ("get_metrics_data", {}),
                (
                    "chat",
                    {
                        "model": BROKEN,
                        "messages": [{"role": "user", "content": self.mark("prompt")}],
                    },
                ),
            ):
                if tool == "window_thaw" and who == ADMIN:
                    continue  # it would be the admin's conversation then
                agent.call(tool, **arguments)
                said = agent.last.model_dump_json() if agent.last else ""
                self.heard(f"agent of {who}", said)
        agent.ends.close()

    def read_everything(self) -> None:
        """Every path of hive's own document that can be got, for everybody."""
        document = self.good(ADMIN, "GET", "/hive/v1/openapi.json")
        variables = {"id": f"{BROKEN}-0", "window": "monday", "name": "monday"}
        for path, methods in document["paths"].items():
            if "get" not in methods or path == "/hive/v1/events":
                continue
            named = re.sub(r"\{(\w+)\}", lambda found: variables.get(found[1], "x"), path)
            if path.endswith("/logs"):
                for worker in (f"{MODEL}-0", f"{BROKEN}-0", "lmcache"):
                    self.ask(
                        ADMIN, "GET", named.replace(f"{BROKEN}-0", worker), as_="log of a worker"
                    )
                continue
            for who in (ADMIN, OTHER, SCRAPER):
                if ("windows" not in path and "sessions/" not in path) or who != ADMIN:
                    self.ask(who, "GET", named, as_=f"answer to {who}")
        self.ask(ADMIN, "GET", f"/hive/v1/workers/{MODEL}-0")

    def run_commands(self) -> None:
        for command in (("worker", "list"), ("window", "list"), ("alerts",)):
            ran = self.hive.cli(*command)
            self.heard("command of admin", ran.out + ran.err)

    def collect(self) -> None:
        """What is on record after hive's end."""
        assert self.story.watcher
        self.heard("events", self.story.watcher.body)
        self.heard("the log", self.hive.log_text)
        for file in (
            sorted((self.state / "audit").rglob("*")) if (self.state / "audit").exists() else ()
        ):
            if file.is_file():
                self.heard(f"audit {file.name}", file.read_bytes())
        for delivery in self.webhook.deliveries:
            self.heard("webhook", delivery.body)
        # The session's own salt, which nobody but the engine ever hears.
        bodies = [str(line.get("body")) for line in journal(self.hive.journal(MODEL))]
        salts = {salt for body in bodies for salt in re.findall(r'"cache_salt": ?"([^"]+)"', body)}
        for number, salt in enumerate(sorted(salts - {self.mark("owncachesalt")})):
            self.marks[f"salt {number}"] = salt
        assert any(name.startswith("salt") for name in self.marks)

    # ── the search ──────────────────────────────────────────────────────────────────────────────

    def found(self) -> list[tuple[str, str, str]]:
        """The mark, the place, and what stands around it: each of both once."""
        where: dict[tuple[str, str], str] = {}
        for place, text in self.told:
            for name, mark in self.marks.items():
                for form in forms_of(mark):
                    at = text.find(form)
                    if at >= 0:
                        where.setdefault((name, place), text[max(0, at - 200) : at + 80])
        return [(name, place, around) for (name, place), around in where.items()]

    def misplaced(self) -> list[str]:
        return [
            f"{name} in {place}: …{around}…"
            for name, place, around in self.found()
            if not any(name == one and re.fullmatch(where, place) for one, where, _ in MAY)
        ]


def forms_of(mark: str) -> Iterator[str]:
    """As it is, and in base64 at each of the three places where it can begin."""
    yield mark
    for before in range(3):
        text = base64.b64encode(b"x" * before + mark.encode()).decode()
        yield text[(4 if before else 0) : -4].rstrip("=")


@pytest.fixture
def planted(story: Story) -> Iterator[Planted]:
    it = Planted(story)
    try:
        yield it
    finally:
        it.webhook.stop()


@given("secrets are planted in every input")
def _(planted: Planted) -> None:
    planted.configure()


@given("the catalogue is at an address that nobody has")
def _(planted: Planted) -> None:
    mark = planted.mark
    address = f"postgresql://{mark('user')}:{mark('password')}@127.0.0.1:1/{mark('database')}"
    planted.hive.sections["windows"]["catalogue_url"] = f"{address}?{mark('parameter')}=1"


@then("what it printed has no secret in it")
def _(planted: Planted) -> None:
    ran = planted.story.ran
    assert ran
    planted.heard("the end", ran.out + ran.err)
    # Where its directories are, and which database it wants, is for who starts it.
    wrong = [one for one in planted.misplaced() if not re.match("home|database|user ", one)]
    assert not wrong, wrong


@given("hive is serving with everything planted")
def _(planted: Planted) -> None:
    hive = planted.hive
    hive.start(is_ready=False)
    planted.story.watcher = hive.stream(
        "/hive/v1/events", method="GET", headers={"Last-Event-ID": "0-0"}
    )
    hive.wait_state("READY", f"{MODEL}-0")
    hive.wait_state("FAILED", f"{BROKEN}-0")


@given("a hive whose redaction does nothing is serving with everything planted")
def _(planted: Planted) -> None:
    planted.hive.starter = (sys.executable, "-c", TALKATIVE)
    hive = planted.hive
    hive.start(is_ready=False)
    planted.story.watcher = hive.stream(
        "/hive/v1/events", method="GET", headers={"Last-Event-ID": "0-0"}
    )
    hive.wait_state("READY", f"{MODEL}-0")
    hive.wait_state("FAILED", f"{BROKEN}-0")


@when("everything of hive is used with everything planted")
def _(planted: Planted, agent: Agent) -> None:
    planted.use_everything()
    planted.listen_to(agent)
    planted.run_commands()
    planted.read_everything()
    planted.hive.stop()
    planted.collect()


@when("its HTTP API is used with everything planted")
def _(planted: Planted) -> None:
    planted.use_everything()
    planted.read_everything()
    planted.hive.stop()
    planted.collect()


@then("no secret is found where it does not belong")
def _(planted: Planted) -> None:
    places = Counter(place for place, _ in planted.told)
    audited = {f"audit {file.name}" for file in (planted.state / "audit").iterdir()}
    assert places.keys() > audited
    assert audited
    assert places.keys() >= {
        "webhook",
        "the log",
        "events",
        "log of a worker",
        "agent of owner",
        "answer to other",
    }
    assert not (wrong := planted.misplaced()), f"{len(wrong)}:\n" + "\n\n".join(wrong)
    # What is allowed is really there, or the table would be longer than it must be.
    there = {(name, place) for name, place, _ in planted.found()}
    idle = [
        (one, where)
        for one, where, _ in MAY
        if not any(name == one and re.fullmatch(where, place) for name, place in there)
    ]
    assert not idle, f"nothing needs these rows of MAY: {idle}"


@then("secrets are found in the log, the events, a worker's log and answers")
def _(planted: Planted) -> None:
    wrong = "\n".join(planted.misplaced())
    for place in ("the log", "events", "log of a worker", "answer to admin"):
        assert f" in {place}: " in wrong, (place, wrong)


@then("every code in the log can be explained, at the level that the code has")
def _(planted: Planted) -> None:
    lines = [line for line in planted.hive.log if line.get("code") or line.get("error_code")]
    codes = {line.get("code") or line["error_code"] for line in lines}
    assert len(codes) > 8, codes
    assert not [code for code in codes if by_code(code) is None]
    ended = [line for line in lines if line["event"] == "request"]
    for line in ended:
        cls = by_code(line["code"])
        assert cls is not None
        assert line["level"] == cls.level, line
    for line in planted.hive.logged("window operation failed"):
        cls = by_code(line["error_code"])
        assert cls is not None
        assert line["level"] == cls.level, line
    done = planted.hive.logged("window operation done")
    assert {line["operation"] for line in done} >= {"freeze", "thaw", "verify"}
    fields = {"session_id", "window_name", "duration_ms", "blocks_stored"}
    assert all(line.keys() >= fields and line["level"] == "info" for line in done)
    ran = planted.hive.cli("explain", ended[0]["code"])
    assert ran.code == 0
    assert ended[0]["code"] in ran.out


@then("nothing is told twice of one request")
def _(planted: Planted) -> None:
    told: Counter[tuple[str, str]] = Counter()
    for line in planted.hive.log:
        if "request_id" in line and line["event"] != "request is sent again":
            told[line["request_id"], line["event"]] += 1
    ids = {planted.mark("requestid"), "[secret]"}  # that several requests came with
    twice = {key: count for key, count in told.items() if count > 1 and key[0] not in ids}
    assert not twice, twice
    assert len(told) > 50
