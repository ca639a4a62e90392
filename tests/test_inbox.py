# SPDX-License-Identifier: Apache-2.0
"""Room INBOX: what it answers over a connection, and what hostile mail cannot do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import SECONDS, record, wait_for

import chasquid
from chasquid import Captured, ChasquidError, Inbox, Mailbox


class Reply(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Faults:
    """Rules that do nothing but be there."""

    def __init__(self) -> None:
        self.rules: dict[str, Mapping[str, Any]] = {}

    def describe(self) -> list[dict[str, Any]]:
        return [{"id": id, **rule} for id, rule in self.rules.items()]

    def add_rule(self, rule: Mapping[str, Any]) -> str:
        if "stage" not in rule:
            raise ChasquidError("a rule needs a stage")
        self.rules[id := str(len(self.rules) + 1)] = rule
        return id

    def remove_rule(self, id: str) -> bool:
        return self.rules.pop(id, None) is not None

    def clear(self) -> None:
        self.rules.clear()


class Running:
    """An inbox on a loop in a thread."""

    def __init__(self, place: Path, release: Any = None) -> None:
        self.mailbox, self.faults = Mailbox(), Faults()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._place = place
        self._release = release
        self.crashes: list[str] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.post(self._stop.set)
        self._thread.join(SECONDS)
        self._listener.close()
        log = (self._place / "server.log").read_text()
        assert (self.crashes, log) == ([], "")

    def _run(self) -> None:
        workers = chasquid.Workers(2)
        self._loop = loop = chasquid.Loop(
            chasquid.Clock(), workers, lambda name, error: self.crashes.append(f"{name}: {error!r}")
        )
        self._stop = chasquid.Event(loop)
        smtp = "smtp://127.0.0.1:1025"
        inbox = Inbox(loop, record(self._place), self.mailbox, self.faults, self._release, smtp)

        async def serve() -> None:
            while True:
                await loop.readable(self._listener.fileno())
                raw, _ = self._listener.accept()
                loop.spawn(inbox.answer(chasquid.Stream(loop, raw)), "request")

        async def main() -> None:
            server = loop.spawn(serve(), "listener")
            self._ready.set()
            await self._stop.wait()
            server.cancel()

        loop.run(main())
        workers.close()
        loop.close()

    def add(self, raw: bytes, **fields: Any) -> str:
        dialogue = chasquid.Dialogue("smtp", "192.0.2.1", 1.0)
        dialogue.add("C", "EHLO client.example")
        values = {
            "mail_from": "eva@there.example", "rcpt_tos": ["ana@here.example"],
            "received": 1_700_000_000.25, **fields,
        }  # fmt: skip
        captured = Captured(
            chasquid.new_id(), values["received"], values["mail_from"], values["rcpt_tos"],
            raw.replace(b"\n", b"\r\n"), peer="192.0.2.1", port="smtp", hello="client.example",
            tls="", login="", smtputf8=False, dialogue=dialogue,
        )  # fmt: skip
        self.mailbox.add(captured)
        return captured.id

    def send(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), SECONDS) as connection:
            connection.sendall(request)
            data = bytearray()
            while piece := connection.recv(65536):
                data += piece
        return bytes(data)

    def ask(
        self, path: str, method: str = "GET", body: object = None, host: str = "", **fields: str
    ) -> Reply:
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{self.port}'}"]
        if body is not None:
            fields = {"Content-Type": "application/json", **fields}
            lines.append(f"Content-Length: {len(data)}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        head, _, rest = self.send(("\r\n".join(lines) + "\r\n\r\n").encode() + data).partition(
            b"\r\n\r\n"
        )
        status, *lines = head.decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        return Reply(int(status.split()[1]), {name.lower(): text for name, text in pairs}, rest)

    def get(self, path: str) -> Any:
        reply = self.ask(f"/api/v1/{path}")
        assert reply.status == 200, reply
        return reply.json


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as running:
        yield running


LETTER = b"From: Eva <eva@there.example>\nTo: ana@here.example\nSubject: %s\n\nThe %s is here.\n"
RICH = b"""From: =?utf-8?q?J=C3=BCrgen?= <j@x.example>
Subject: rich
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/html; charset=utf-8

%s
--b
Content-Type: image/png; name=dot.png
Content-ID: <dot@x>
Content-Transfer-Encoding: base64

iVBORw0KGgo=
--b
Content-Type: image/svg+xml
Content-Disposition: attachment; filename="../..\\\\ev\\"il\xc3\xbc.svg"

<svg onload=alert(1)>
--b--
"""


def test_a_list_is_newest_first_and_searched(inbox: Running) -> None:
    ids = [inbox.add(LETTER % (word, word)) for word in (b"apple", b"pear")]
    found = inbox.get("messages")
    assert [each["id"] for each in found["messages"]] == ids[::-1]
    assert found["messages"][0]["received"] == "2023-11-14T22:13:20.250Z"
    assert inbox.get("messages?limit=1&start=1")["messages"][0]["subject"] == "apple"
    for query, count in (
        ("APPLE", 1), ("eva", 2), ("subject:pear", 1), ("from:pear", 0), ('"pear+is"', 1),
        ("pear+apple", 0), ("to:ana@here.example", 2),
    ):  # fmt: skip
        assert inbox.get(f"messages?query={query}")["matching"] == count, query


def test_a_message_is_shown_whole(inbox: Running) -> None:
    id = inbox.add(RICH % b"<p>Hello</p><a href='https://x.example/?a=1&amp;b=2'>go</a>")
    shown = inbox.get(f"messages/{id}")
    assert shown["from"] == "Jürgen <j@x.example>"
    assert ["Subject", "rich"] in shown["headers"]
    assert shown["links"] == ["https://x.example/?a=1&b=2"]
    assert [part["content_type"] for part in shown["parts"]] == [
        "text/html", "image/png", "image/svg+xml",
    ]  # fmt: skip
    assert shown["transcript"] == "C: EHLO client.example"
    raw = inbox.ask(f"/api/v1/messages/{id}/raw")
    assert raw.fields["content-type"] == "message/rfc822"
    assert raw.body == inbox.mailbox.all()[0].raw


def test_html_comes_in_a_sandbox_and_acts_on_nothing(inbox: Running) -> None:
    html = (
        b"<base href=http://evil.example><meta http-equiv=refresh content='0;url=//e'>"
        b"<LINK rel=preconnect href=//e><script>alert(1)</script><img src='cid:dot@x'>"
        b"<img src=http://evil.example/x.png>"
    )
    id = inbox.add(RICH % html)
    reply = inbox.ask(f"/api/v1/messages/{id}/html")
    policy = reply.fields["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert policy[0] == "sandbox allow-popups allow-popups-to-escape-sandbox"
    page = reply.body.decode().lower()
    assert page.count("<base") == 1 and "<base target=_blank>" in page
    assert "<link" not in page and "<meta http-equiv" not in page
    assert "data:image/png;base64,ivborw0kggo=" in page
    assert inbox.get(f"messages/{id}")["remote"] is True
    more = inbox.ask(f"/api/v1/messages/{id}/html?remote=1").fields["content-security-policy"]
    assert "img-src data: http: https:" in more and "sandbox allow-popups" in more
    assert "script" not in more


def test_an_attachment_is_a_file_with_a_harmless_name_and_type(inbox: Running) -> None:
    id = inbox.add(RICH % b"x")
    reply = inbox.ask(f"/api/v1/messages/{id}/parts/3")
    assert reply.fields["content-type"] == "application/octet-stream"
    said = reply.fields["content-disposition"]
    assert said.startswith("attachment; filename=\"ev'il") and ".." not in said
    assert said.count('"') == 2
    assert reply.fields["content-security-policy"].startswith("sandbox;")
    assert inbox.ask(f"/api/v1/messages/{id}/parts/2").body == b"\x89PNG\r\n\x1a\n"
    for number in (0, 4, 99999):
        assert inbox.ask(f"/api/v1/messages/{id}/parts/{number}").status == 404


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\n", b"\0\xff\xfe", b"no header at all", b"Subject: <script>alert(1)</script>\n\nx",
        b"Subject: " + b"x" * 200_000 + b"\n\ny",
        b"Subject: =?x-unknown?b?AAA?= =?utf-8?b?\xff?=\n\nx",
        b"Content-Type: multipart/mixed; boundary=b\n\nnever opened",
        b"Content-Type: multipart/mixed\n\nnone",
        b"Content-Type: text/plain; charset=zlib\n\nx",
        b"Content-Type: text/plain; charset=\"\xff\"\n\nx",
        b"Content-Transfer-Encoding: base64\n\n!!!!",
        b"Content-Type: message/rfc822\nContent-Transfer-Encoding: base64\n\nAAAA",
        b"Content-Type: text/x; name*=utf-8''%ff; name*0*=x\n\nx",
        b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n)
                 for n in range(3000)),
        b"Content-Type: message/rfc822\n\n" * 3000,
    ],
    ids=range(16),
)  # fmt: skip
def test_broken_mail_is_shown_all_the_same(inbox: Running, raw: bytes) -> None:
    id = inbox.add(raw)
    assert inbox.get("messages")["messages"][0]["id"] == id
    assert inbox.get(f"messages/{id}")["parts"]
    assert inbox.ask(f"/api/v1/messages/{id}/parts/1").status == 200
    shown = inbox.ask(f"/api/v1/messages/{id}/raw")
    assert shown.status == 200 and shown.body == raw.replace(b"\n", b"\r\n")


def test_a_large_message_comes_whole_and_holds_up_nobody(inbox: Running) -> None:
    raw = b"Subject: big\n\n" + (b"x" * 76 + b"\n") * 250_000
    id = inbox.add(raw)
    waits, ended = [], threading.Event()

    def probe() -> None:
        while not ended.is_set():
            began = time.monotonic()
            inbox.ask("/health")
            waits.append(time.monotonic() - began)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        assert inbox.get("messages")["messages"][0]["size"] == len(raw) + 250_002
        assert len(inbox.get(f"messages/{id}")["text"]) == chasquid._TEXT_LIMIT
        assert inbox.ask(f"/api/v1/messages/{id}/raw").body == inbox.mailbox.all()[0].raw
    finally:
        ended.set()
        prober.join(SECONDS)
    assert len(waits) > 1 and max(waits) < 5


def test_deleting(inbox: Running) -> None:
    first, second, _ = (inbox.add(LETTER % (b"a", b"a")) for _ in range(3))
    assert inbox.ask(f"/api/v1/messages/{first}", "DELETE").json == {"deleted": 1}
    for part in ("", "/raw", "/html", "/parts/1"):
        assert inbox.ask(f"/api/v1/messages/{first}{part}").status == 404
    assert inbox.get(f"messages/{second}")["id"] == second
    assert inbox.ask("/api/v1/messages", "DELETE").json == {"deleted": 2}
    assert inbox.get("messages")["total"] == 0


def test_waiting_ends_when_the_messages_are_there(inbox: Running) -> None:
    timer = threading.Timer(0.2, lambda: inbox.add(LETTER % (b"late", b"late")))
    timer.start()
    began = time.monotonic()
    assert inbox.get("wait?query=late&timeout=15")["messages"][0]["subject"] == "late"
    assert time.monotonic() - began < 10
    timer.join()
    late = inbox.ask("/api/v1/wait?count=3&timeout=0.1")
    assert late.status == 408
    assert late.json["matching"] == 1 and late.json["arrived"][0]["subject"] == "late"
    assert late.json["error"].startswith("1 of 3 messages came within 0.1 s")


def test_events_tell_of_changes_and_end_with_the_client(inbox: Running) -> None:
    with socket.create_connection(("127.0.0.1", inbox.port), SECONDS) as connection:
        connection.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""

        def came(text: bytes) -> None:
            nonlocal data
            while text not in data:
                piece = connection.recv(4096)
                assert piece, data
                data += piece

        came(b'data: {"total": 0}\n\n')
        assert b"Content-Type: text/event-stream\r\n" in data
        inbox.add(LETTER % (b"a", b"a"))
        came(b'event: change\ndata: {"total": 1}\n\n')
        assert len(inbox.mailbox._watchers) == 1
    wait_for(lambda: not inbox.mailbox._watchers, "the stream to end")


def test_who_may_change_something(inbox: Running) -> None:
    id = inbox.add(LETTER % (b"a", b"a"))
    own = f"http://127.0.0.1:{inbox.port}"
    path = f"/api/v1/messages/{id}"
    for fields in (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"}, {"Origin": own, "Sec_Fetch_Site": "same-site"},
    ):  # fmt: skip
        assert inbox.ask(path, "DELETE", **fields).status == 403, fields
        assert inbox.ask(path, **fields).status == 403, fields  # the time alone would tell it much
    assert inbox.ask("/", Sec_Fetch_Site="cross-site").status == 200  # a link to the page
    assert inbox.ask("/api/v1/messages", host="evil.example").status == 421
    assert inbox.ask("/api/v1/messages", host="mailserver:8025").status == 200
    assert inbox.ask(path, "DELETE", Origin=own, Sec_Fetch_Site="same-origin").status == 200


def test_faults(inbox: Running) -> None:
    assert inbox.ask("/api/v1/faults", "POST", {"stage": "RCPT"}).json == {"id": "1"}
    assert inbox.get("faults") == {"faults": [{"id": "1", "stage": "RCPT"}]}
    bad = inbox.ask("/api/v1/faults", "POST", {"x": 1})
    assert (bad.status, bad.json) == (400, {"error": "a rule needs a stage"})
    assert inbox.ask("/api/v1/faults/1", "DELETE").status == 200
    assert inbox.ask("/api/v1/faults/1", "DELETE").status == 404
    assert inbox.ask("/api/v1/faults", "DELETE").json == {"deleted": 0}


def test_release(tmp_path: Path, inbox: Running) -> None:
    id = inbox.add(LETTER % (b"a", b"a"))
    path, body = f"/api/v1/messages/{id}/release", {"to": ["x@y.example"]}
    assert inbox.ask(path, "POST", body).status == 501

    async def release(captured: Captured, to: Sequence[str]) -> str:
        if "bad@y.example" in to:
            raise ChasquidError("the smarthost said no")
        return f"sent to {', '.join(to)}"

    (tmp_path / "other").mkdir()
    with Running(tmp_path / "other", release) as other:
        path = f"/api/v1/messages/{other.add(LETTER % (b'a', b'a'))}/release"
        assert other.ask(path, "POST", body).json == {"released": "sent to x@y.example"}
        failed = other.ask(path, "POST", {"to": ["bad@y.example"]})
        assert (failed.status, failed.json) == (502, {"error": "the smarthost said no"})
        for to in ([], "x@y.example", ["x"], [1], ["a@b\r\nX: y"], None):
            assert other.ask(path, "POST", {"to": to}).status == 400, to


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("GET", "/api/v1/messages/nope", {}, 404),
        ("PUT", "/api/v1/messages", {}, 405),
        ("POST", "/api/v1/faults", {"Content_Type": "text/plain"}, 415),
        ("POST", "/api/v1/faults", {"Content_Type": "application/json"}, 400),
        ("POST", "/api/v1/faults", {"Content_Type": "application/json",
                                    "Transfer_Encoding": "chunked"}, 411),
        ("POST", "/api/v1/faults", {"Content_Type": "application/json",
                                    "Content_Length": "99999999"}, 413),
        ("GET", "/api/v1/messages?limit=x", {}, 400),
        ("GET", "/api/v1/wait?timeout=-1", {}, 400),
    ],
)  # fmt: skip
def test_every_error_is_json(
    inbox: Running, method: str, path: str, fields: dict[str, str], status: int
) -> None:
    reply = inbox.ask(path, method, **fields)
    assert (reply.status, reply.fields["content-type"]) == (status, "application/json")
    assert list(reply.json) == ["error"] and len(reply.json["error"]) > 10


def test_the_page_runs_its_own_script_alone(inbox: Running) -> None:
    page, other = inbox.ask("/"), inbox.ask("/")
    policy = page.fields["content-security-policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert nonce and f"<script nonce={nonce}>" in page.body.decode()
    assert policy != other.fields["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    text = page.body.decode()
    assert "innerHTML" not in text and "smtp://127.0.0.1:1025" in text
    assert inbox.ask("/health").body == b"ok\n"
    assert inbox.ask("/", "HEAD").body == b""


# --- hostile mail and pages, in the time that they take ---


@pytest.mark.parametrize(
    "raw",
    [
        b"Subject: " + b"=?a?q?x " * 14_000 + b"\r\n\r\nx",
        b"Subject: " + b"=?" * 60_000 + b"\r\n\r\nx",
        b'Content-Type: text/plain; a="' + b'\\";' * 40_000 + b"\r\n\r\nx",
        b"Content-Disposition: attachment; " + b"a=b; " * 20_000 + b"\r\n\r\nx",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 20_000,
    ],
    ids=["words without an end", "beginnings", "quotes", "parameters", "parts"],
)
def test_hostile_mail_is_taken_apart_in_little_time(raw: bytes) -> None:
    """A square of these lengths would be tens of seconds."""
    start = time.process_time()
    chasquid._read_content(raw)
    assert time.process_time() - start < 5


def test_words_that_belong_together_are_joined() -> None:
    raw = b"Subject: Hi =?utf-8?q?=C3=A4?= =?utf-8?b?w6Q=?= you =?no?q?x?=\r\n\r\n"
    assert chasquid._read_content(raw).header("subject") == "Hi ää you =?no?q?x?="


def test_a_head_request_for_events_ends(inbox: Running) -> None:
    assert inbox.send(b"HEAD /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")[:12] == (
        b"HTTP/1.1 405"
    )


def test_a_request_with_two_hosts_is_none(inbox: Running) -> None:
    request = b"GET /api/v1/messages HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n"
    assert inbox.send(request) == b""


def test_only_so_many_pages_are_told_of_changes(
    inbox: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chasquid, "_INBOX_LISTENERS", 1)
    with socket.create_connection(("127.0.0.1", inbox.port), SECONDS) as first:
        first.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        assert inbox.ask("/api/v1/events").status == 503
