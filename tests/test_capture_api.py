# SPDX-License-Identifier: Apache-2.0
"""Room CAPTURE API: what it answers over a connection, and what hostile mail cannot do."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import SECONDS, record, wait_for

import chasquid
from chasquid import Captured, ChasquidError, Inbox, Mailbox, Script


class Reply(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """An inbox on a loop in a thread."""

    def __init__(self, place: Path, release: Any = None, login: Any = None) -> None:
        self.mailbox = Mailbox()
        self.faults = Script(chasquid.Clock(), chasquid.STAGES, "", random=lambda: 0.5)
        self._login = login
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
        log = record(self._place)
        inbox = Inbox(
            loop, log, self.mailbox, self.faults, release=self._release, smtp=smtp,
            login=self._login,
        )  # fmt: skip

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
        client = chasquid.ClientInfo(
            dialogue, chasquid.SMTP_PORT, "192.0.2.1", "client.example", True, "", ""
        )
        captured = Captured(
            values["received"], client, values["mail_from"], values["rcpt_tos"],
            raw=raw.replace(b"\n", b"\r\n"), smtputf8=False,
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


def test_a_list_is_newest_first(inbox: Running) -> None:
    ids = [inbox.add(LETTER % (word, word)) for word in (b"apple", b"pear")]
    found = inbox.get("messages")
    assert [each["ID"] for each in found["messages"]] == ids[::-1]
    newest = found["messages"][0]
    assert {**newest, "ID": ""} == {
        "ID": "",
        "MessageID": "",
        "Read": False,
        "From": {"Name": "Eva", "Address": "eva@there.example"},
        "To": [{"Name": "", "Address": "ana@here.example"}],
        "Cc": [],
        "Bcc": [],
        "ReplyTo": [],
        "Subject": "pear",
        "Created": "2023-11-14T22:13:20.250Z",
        "Tags": [],
        "Size": len(inbox.mailbox.all()[1].raw),
        "Attachments": 0,
        "Snippet": "The pear is here.",
        "Username": "",
    }
    counts = {name: found[name] for name in found if name != "messages"}
    assert counts == {
        "total": 2, "unread": 2, "messages_count": 2, "messages_unread": 2, "start": 0, "tags": [],
    }  # fmt: skip
    [second] = inbox.get("messages?limit=1&start=1")["messages"]
    assert second["Subject"] == "apple"


def test_who_is_named_in_the_envelope_alone_is_a_hidden_recipient(inbox: Running) -> None:
    inbox.add(LETTER % (b"a", b"a"), rcpt_tos=["ANA@here.example", "ben@here.example"])
    [entry] = inbox.get("messages")["messages"]
    assert entry["Bcc"] == [{"Name": "", "Address": "ben@here.example"}]


@pytest.mark.parametrize(
    ("query", "subjects"),
    [
        ("APPLE", ["apple"]),
        ("eva", ["rich", "pear", "apple"]),
        ("subject:pear", ["pear"]),
        ("from:pear", []),
        ('"pear+is"', ["pear"]),
        ("pear+apple", []),
        ("-pear", ["rich", "apple"]),
        ("!subject:pear+-apple", ["rich"]),
        ("to:ana@here.example", ["rich", "pear", "apple"]),
        ("cc:ana", []),
        ("has:attachment", ["rich"]),
        ("is:read", ["pear"]),
        ("is:unread", ["rich", "apple"]),
        ("larger:0.3KB", ["rich"]),
        ("smaller:300", ["pear", "apple"]),
        ("before:2023-11-15", ["rich", "pear", "apple"]),
        ("after:2023/11/15", []),
        ("after:2023-11-15&tz=Asia/Tokyo", ["rich", "pear", "apple"]),
        ("tag:x", []),
        ("odd:word", []),
    ],
)
def test_a_search_in_the_form_of_mailpit(inbox: Running, query: str, subjects: list[str]) -> None:
    inbox.add(LETTER % (b"apple", b"apple"))
    pear = inbox.add(LETTER % (b"pear", b"pear"))
    inbox.add(RICH % b"x")
    inbox.get(f"message/{pear}")  # to have looked at it is to have read it
    found = inbox.get(f"search?query={query}")
    assert [each["Subject"] for each in found["messages"]] == subjects
    assert found["messages_count"] == len(subjects)


@pytest.mark.parametrize("query", ["before:yesterday", "larger:big", "after:2023-01-01&tz=Nowhere"])
def test_a_search_that_makes_no_sense_is_refused(inbox: Running, query: str) -> None:
    assert inbox.ask(f"/api/v1/search?query={query}").status == 400


def test_a_message_is_shown_whole(inbox: Running) -> None:
    id = inbox.add(RICH % b"<p>Hello</p><a href='https://x.example/?a=1&amp;b=2'>go</a>")
    shown = inbox.get("message/latest")
    assert shown["ID"] == id
    assert shown["From"] == {"Name": "Jürgen", "Address": "j@x.example"}
    assert shown["ReturnPath"] == "eva@there.example"
    assert shown["HTML"].startswith("<p>Hello</p>") and shown["Text"] == ""
    assert shown["Links"] == ["https://x.example/?a=1&b=2"]
    assert [(part["PartID"], part["ContentType"]) for part in shown["Attachments"]] == [
        ("2", "image/png"), ("3", "image/svg+xml"),
    ]  # fmt: skip
    checksums = shown["Attachments"][0]["Checksums"]
    assert checksums["SHA1"] == hashlib.sha1(b"\x89PNG\r\n\x1a\n").hexdigest()
    assert inbox.get(f"message/{id}/headers")["Subject"] == ["rich"]
    assert inbox.ask(f"/api/v1/message/{id}/dialogue").body == b"C: EHLO client.example"
    raw = inbox.ask(f"/api/v1/message/{id}/raw")
    assert raw.fields["content-type"] == "text/plain; charset=utf-8"
    assert raw.body == inbox.mailbox.all()[0].raw
    assert inbox.ask(f"/view/{id}.txt").body == b""


def test_html_comes_in_a_sandbox_and_acts_on_nothing(inbox: Running) -> None:
    html = (
        b"<base href=http://evil.example><meta http-equiv=refresh content='0;url=//e'>"
        b"<LINK rel=preconnect href=//e><script>alert(1)</script><img src='cid:dot@x'>"
        b"<img src=http://evil.example/x.png>"
    )
    id = inbox.add(RICH % html)
    reply = inbox.ask(f"/view/{id}.html")
    policy = reply.fields["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    assert policy[0] == "sandbox allow-popups allow-popups-to-escape-sandbox"
    page = reply.body.decode().lower()
    assert page.count("<base") == 1 and "<base target=_blank>" in page
    assert "<link" not in page and "<meta http-equiv" not in page
    assert "data:image/png;base64,ivborw0kggo=" in page
    assert [part["PartID"] for part in inbox.get(f"message/{id}")["Inline"]] == ["2"]
    assert b"Remote content is blocked" in inbox.ask(f"/message/{id}").body
    more = inbox.ask(f"/view/{id}.html?remote=1").fields["content-security-policy"]
    assert "img-src data: http: https:" in more and "sandbox allow-popups" in more
    assert "script" not in more


def test_an_attachment_is_a_file_with_a_harmless_name_and_type(inbox: Running) -> None:
    id = inbox.add(RICH % b"x")
    reply = inbox.ask(f"/api/v1/message/{id}/part/3")
    assert reply.fields["content-type"] == "application/octet-stream"
    said = reply.fields["content-disposition"]
    assert said.startswith("attachment; filename=\"ev'il") and ".." not in said
    assert said.count('"') == 2
    assert reply.fields["content-security-policy"].startswith("sandbox;")
    assert inbox.ask(f"/api/v1/message/{id}/part/2").body == b"\x89PNG\r\n\x1a\n"
    for number in (0, 4, 99999):
        assert inbox.ask(f"/api/v1/message/{id}/part/{number}").status == 404


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
    assert inbox.get("messages")["messages"][0]["ID"] == id
    assert inbox.get(f"message/{id}")["ID"] == id
    assert inbox.ask(f"/api/v1/message/{id}/part/1").status == 200
    for view in ("", "?view=text", "?view=headers", "?view=source", "?view=checks"):
        assert inbox.ask(f"/message/{id}{view}").status == 200
    shown = inbox.ask(f"/api/v1/message/{id}/raw")
    assert shown.status == 200 and shown.body == raw.replace(b"\n", b"\r\n")


def test_a_large_message_comes_whole_and_holds_up_nobody(inbox: Running) -> None:
    raw = b"Subject: big\n\n" + (b"x" * 76 + b"\n") * 250_000
    id = inbox.add(raw)
    waits, ended = [], threading.Event()

    def probe() -> None:
        while not ended.is_set():
            began = time.monotonic()
            inbox.ask("/livez")
            waits.append(time.monotonic() - began)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        assert inbox.get("messages")["messages"][0]["Size"] == len(raw) + 250_002
        assert len(inbox.get(f"message/{id}")["Text"]) == chasquid._TEXT_LIMIT
        assert inbox.ask(f"/api/v1/message/{id}/raw").body == inbox.mailbox.all()[0].raw
    finally:
        ended.set()
        prober.join(SECONDS)
    assert len(waits) > 1 and max(waits) < 5


def test_deleting(inbox: Running) -> None:
    first, second, third, _ = (inbox.add(LETTER % (w, w)) for w in (b"a", b"b", b"c", b"d"))
    assert inbox.ask("/api/v1/messages", "DELETE", {"IDs": [first]}).body == b"ok"
    for path in ("", "/raw", "/headers", "/part/1"):
        assert inbox.ask(f"/api/v1/message/{first}{path}").status == 404
    assert inbox.get(f"message/{second}")["ID"] == second
    assert inbox.ask("/api/v1/search?query=subject:c", "DELETE").body == b"ok"
    assert inbox.ask(f"/api/v1/message/{third}").status == 404
    assert inbox.ask("/api/v1/search", "DELETE").status == 400  # that would be all
    assert inbox.get("messages")["total"] == 2
    assert inbox.ask("/api/v1/messages", "DELETE").body == b"ok"
    assert inbox.get("messages")["total"] == 0
    assert inbox.get("info")["RuntimeStats"]["MessagesDeleted"] == 4


def test_marking_as_read(inbox: Running) -> None:
    first, _ = (inbox.add(LETTER % (b"a", b"a")) for _ in range(2))
    inbox.ask("/api/v1/messages", "PUT", {"IDs": [first], "Read": True})
    assert inbox.get("messages")["unread"] == 1
    inbox.ask("/api/v1/messages", "PUT", {"Read": True})
    assert inbox.get("info")["Unread"] == 0
    inbox.ask("/api/v1/messages", "PUT", {"IDs": [], "Read": False})
    assert inbox.get("messages")["unread"] == 2


def test_a_message_is_sent_by_the_interface(inbox: Running) -> None:
    described = {
        "From": {"Email": "shop@x.example", "Name": "Söhop"},
        "To": [{"Email": "ana@here.example", "Name": "Ana"}],
        "Cc": [{"Email": "ben@here.example"}],
        "Bcc": ["eva@here.example"],
        "Subject": "Wélcome",
        "Text": "hello",
        "HTML": "<p>hello</p>",
        "Headers": {"X-Kind": "test"},
        "Attachments": [{"Content": "aGk=", "Filename": "hi.txt", "ContentType": "text/plain"}],
    }
    id = inbox.ask("/api/v1/send", "POST", described).json["ID"]
    shown = inbox.get(f"message/{id}")
    assert (shown["Subject"], shown["Text"], shown["HTML"]) == (
        "Wélcome", "hello\n", "<p>hello</p>\n",
    )  # fmt: skip
    assert shown["From"] == {"Name": "Söhop", "Address": "shop@x.example"}
    assert shown["Bcc"] == [{"Name": "", "Address": "eva@here.example"}]
    assert shown["Attachments"][0]["FileName"] == "hi.txt"
    assert inbox.ask(f"/api/v1/message/{id}/part/3").body == b"hi"
    assert inbox.get(f"message/{id}/headers")["X-Kind"] == ["test"]


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"From": {"Email": "nobody"}},
        {"From": {"Email": "a@b.example"}, "To": [{"Email": "x\r\ny@z"}]},
        {"From": {"Email": "a@b.example"}, "Headers": {"X-Bad": "a\r\nb: c"}},
        {"From": {"Email": "a@b.example"}, "Attachments": [{"Content": "!", "Filename": "x"}]},
        {"From": {"Email": "a@b.example"}, "To": 5},
    ],
)
def test_what_describes_no_message_is_refused(inbox: Running, described: object) -> None:
    assert inbox.ask("/api/v1/send", "POST", described).status == 400
    assert inbox.mailbox.all() == []


def test_chaos_is_a_view_of_the_faults(inbox: Running) -> None:
    off = {"ErrorCode": 451, "Probability": 0}
    assert inbox.get("chaos") == {"Authentication": off, "Recipient": off, "Sender": off}
    wanted = {"ErrorCode": 550, "Probability": 60}
    told = inbox.ask("/api/v1/chaos", "PUT", {"Recipient": wanted}).json
    assert told == {"Authentication": off, "Recipient": wanted, "Sender": off}
    [rule] = inbox.get("faults")["faults"]
    assert (rule["stage"], rule["reply"], rule["probability"]) == ("RCPT", "550", 60)
    effect = inbox.faults.effect("RCPT", ["ana@here.example"])
    assert effect is not None and effect.reply is not None and effect.reply.code == 550
    inbox.ask("/api/v1/chaos", "PUT", {"Recipient": {"ErrorCode": 550, "Probability": 40}})
    assert inbox.faults.effect("RCPT", ["ana@here.example"]) is None  # the dice say 50
    inbox.ask("/api/v1/chaos", "PUT", {})
    assert inbox.get("faults") == {"faults": []}
    for bad in ({"ErrorCode": 250, "Probability": 1}, {"ErrorCode": 451, "Probability": 101}):
        assert inbox.ask("/api/v1/chaos", "PUT", {"Sender": bad}).status == 400


def test_what_tools_ask_of_the_server(inbox: Running) -> None:
    assert inbox.ask("/livez").body == inbox.ask("/readyz").body == b"ok"
    assert inbox.get("tags") == []
    assert inbox.get("webui")["MessageRelay"]["Enabled"] is False
    info = inbox.get("info")
    assert info["Messages"] == 0 and info["Version"].startswith("chasquid ")


def test_waiting_ends_when_the_messages_are_there(inbox: Running) -> None:
    timer = threading.Timer(0.2, lambda: inbox.add(LETTER % (b"late", b"late")))
    timer.start()
    began = time.monotonic()
    assert inbox.get("wait?query=late&timeout=15")["messages"][0]["Subject"] == "late"
    assert time.monotonic() - began < 10
    timer.join()
    late = inbox.ask("/api/v1/wait?count=3&timeout=0.1")
    assert late.status == 408
    assert late.json["messages_count"] == 1 and late.json["messages"][0]["Subject"] == "late"
    assert late.json["Error"].startswith("1 of 3 messages came within 0.1 s")


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
    path = f"/api/v1/message/{id}"
    for fields in (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"}, {"Origin": own, "Sec_Fetch_Site": "same-site"},
    ):  # fmt: skip
        assert inbox.ask("/api/v1/messages", "DELETE", **fields).status == 403, fields
        assert inbox.ask(f"/message/{id}/delete", "POST", **fields).status == 403, fields
        assert inbox.ask(path, **fields).status == 403, fields  # the time alone would tell it much
    assert inbox.ask("/", Sec_Fetch_Site="cross-site").status == 200  # a link to the page
    assert inbox.ask("/api/v1/messages", host="evil.example").status == 421
    assert inbox.ask("/api/v1/messages", host="mailserver:8025").status == 200
    same = {"Origin": own, "Sec_Fetch_Site": "same-origin"}
    assert inbox.ask("/api/v1/messages", "DELETE", **same).status == 200


def test_faults(inbox: Running) -> None:
    rule = {"stage": "RCPT", "reply": "451"}
    assert inbox.ask("/api/v1/faults", "POST", rule).json == {"id": "1"}
    assert inbox.get("faults") == {"faults": [{"id": "1", "matched": 0, "acted": 0, **rule}]}
    bad = inbox.ask("/api/v1/faults", "POST", {"x": 1})
    assert bad.status == 400 and b"a rule has no 'x'" in bad.body
    assert inbox.ask("/api/v1/faults/1", "DELETE").status == 200
    assert inbox.ask("/api/v1/faults/1", "DELETE").status == 404
    assert inbox.ask("/api/v1/faults", "DELETE").body == b"ok"


def test_release(tmp_path: Path, inbox: Running) -> None:
    id = inbox.add(LETTER % (b"a", b"a"))
    path, body = f"/api/v1/message/{id}/release", {"To": ["x@y.example"]}
    refused = inbox.ask(path, "POST", body)
    assert refused.status == 400 and b"--release" in refused.body
    sent = []

    async def release(captured: Captured, to: Sequence[str]) -> str:
        if "bad@y.example" in to:
            raise ChasquidError("the smarthost said no")
        sent.append(to)
        return f"sent to {', '.join(to)}"

    (tmp_path / "other").mkdir()
    with Running(tmp_path / "other", release) as other:
        path = f"/api/v1/message/{other.add(LETTER % (b'a', b'a'))}/release"
        assert other.ask(path, "POST", body).body == b"ok"
        assert sent == [["x@y.example"]]
        failed = other.ask(path, "POST", {"To": ["bad@y.example"]})
        assert (failed.status, failed.body) == (502, b"the smarthost said no\n")
        for to in ([], "x@y.example", ["x"], [1], ["a@b\r\nX: y"], None):
            assert other.ask(path, "POST", {"To": to}).status == 400, to


def test_a_login_where_there_is_one(tmp_path: Path) -> None:
    with Running(tmp_path, login=("ana", "se:cret")) as inbox:
        asked = inbox.ask("/")
        assert asked.status == 401
        assert asked.fields["www-authenticate"].startswith('Basic realm="chasquid"')
        assert inbox.ask("/livez").status == 200
        for given in ("Basic eDp5", "Basic", "Bearer YW5hOnNlOmNyZXQ=", "Basic \xff"):
            assert inbox.ask("/api/v1/messages", Authorization=given).status == 401
        right = {"Authorization": "Basic YW5hOnNlOmNyZXQ="}
        assert inbox.ask("/api/v1/messages", host="mail.example.com", **right).status == 200


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("GET", "/api/v1/message/nope", {}, 404),
        ("GET", "/api/v1/message/latest", {}, 404),
        ("POST", "/api/v1/messages", {}, 405),
        ("POST", "/api/v1/faults", {}, 400),
        ("POST", "/api/v1/faults", {"Transfer_Encoding": "chunked"}, 411),
        ("POST", "/api/v1/faults", {"Content_Length": "99999999"}, 413),
        ("GET", "/api/v1/messages?limit=x", {}, 400),
        ("GET", "/api/v1/wait?timeout=-1", {}, 400),
    ],
)
def test_every_error_is_a_sentence(
    inbox: Running, method: str, path: str, fields: dict[str, str], status: int
) -> None:
    reply = inbox.ask(path, method, **fields)
    assert (reply.status, reply.fields["content-type"]) == (status, "text/plain; charset=utf-8")
    assert len(reply.body) > 10


def test_the_page_lists_and_shows(inbox: Running) -> None:
    assert b"Send some to <code>smtp://127.0.0.1:1025" in inbox.ask("/").body
    id = inbox.add(RICH % b"<p>Hello</p>")
    page = inbox.ask("/").body.decode()
    assert f'<li class=new><a href="/message/{id}"' in page and "<b>Jürgen</b>" in page
    shown = inbox.ask(f"/message/{id}").body.decode()
    assert "<title>chasquid inbox</title>" in shown and "Attachments (2)" in shown
    files = inbox.ask(f"/message/{id}?view=files").body.decode()
    assert f'href="/api/v1/message/{id}/part/2"' in files
    assert "No message has these words" in inbox.ask("/?query=nothing").body.decode()
    other = inbox.add(LETTER % (b"other", b"other"))
    gone = inbox.ask(f"/message/{other}/delete", "POST")
    assert (gone.status, gone.fields["location"]) == (303, f"/message/{id}")
    assert inbox.ask(f"/message/{id}/delete", "POST").fields["location"] == "/"


def test_a_mail_is_text_in_the_page(inbox: Running) -> None:
    evil = b"<script>alert(1)</script>\"'"
    raw = b"From: %s <a@b>\nSubject: %s\nX-%s: %s\n\n%s" % (evil, evil, b"Y", evil, evil)
    id = inbox.add(raw, mail_from="<b>@x", rcpt_tos=['"><i>@x'])
    for path in ("/", *(f"/message/{id}?view={view}" for view in chasquid._VIEWS)):
        page = inbox.ask(f"{path}").body.decode()
        body = page.partition("<main>")[2].partition("</main>")[0]
        assert "<script>" not in body and "<i>" not in body and "<b>@x" not in body, path


def test_the_page_runs_its_own_script_alone(inbox: Running) -> None:
    page, other = inbox.ask("/"), inbox.ask("/")
    policy = page.fields["content-security-policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert nonce and f"<script nonce={nonce}>" in page.body.decode()
    assert policy != other.fields["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    text = page.body.decode()
    assert "innerHTML" not in text and "smtp://127.0.0.1:1025" in text
    assert inbox.ask("/health").body == b"ok"
    assert inbox.ask("/", "HEAD").body == b""


# --- hostile mail and pages, in the time that they take ---


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
    monkeypatch.setattr(chasquid, "_API_LISTENERS", 1)
    with socket.create_connection(("127.0.0.1", inbox.port), SECONDS) as first:
        first.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(100).startswith(b"HTTP/1.1 200")
        assert inbox.ask("/api/v1/events").status == 503
