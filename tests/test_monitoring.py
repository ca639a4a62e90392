# SPDX-License-Identifier: Apache-2.0
"""Room MONITORING: the page, the metrics, and what no request may do."""

from __future__ import annotations

import base64
import html.parser
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    HOST,
    SECONDS,
    FakeClock,
    FakeCourier,
    RunningClock,
    Serve,
    Server,
    Wire,
    greeted,
    logged_in,
    plain_secret,
    play,
    record,
    started_by_systemd,
    wait_for,
)
from support import send as send_message

import chasquid
from chasquid import Delivery, Destination, QueueLine, Result, State, Status

EVIL = "<script>alert(1)</script>"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"
OPEN_METRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"


class Reply(NamedTuple):
    """What came back: the status line, the fields (names in lower case), the body."""

    status: str
    fields: dict[str, str]
    body: str


class Refusing:
    """The servers elsewhere, which say something evil to everybody."""

    def __init__(self, state: str = State.DEFERRED) -> None:
        self.state = state

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        said = f"mx.there.example says 450 {EVIL}"
        return [Result(self.state, f"{'45'[self.state == State.FAILED]}.0.0", said)] * len(
            destinations
        )


def monitored(serve: Serve, **keywords: object) -> Server:
    return serve(monitoring_address="127.0.0.1:0", **keywords)


def port(server: Server) -> int:
    return server.daemon._listeners.monitoring[0].getsockname()[1]  # type: ignore[no-any-return]


def send(server: Server, request: bytes) -> bytes:
    """Send octets to the monitoring port; return all that comes until it is closed."""
    with socket.create_connection(("127.0.0.1", port(server)), SECONDS) as connection:
        connection.settimeout(SECONDS)
        connection.sendall(request)
        return receive(connection)


def receive(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def ask(
    server: Server, path: str = "/", method: str = "GET", body: str = "", **fields: str
) -> Reply:
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port(server)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    answer = send(server, ("\r\n".join(lines) + "\r\n\r\n" + body).encode()).decode()
    head, _, body = answer.partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    return Reply(status, {name.lower(): value for name, value in pairs}, body)


def still_works(server: Server) -> None:
    assert ask(server, "/health").status == "HTTP/1.1 200 OK"
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")


def mail(server: Server, sender: str, recipient: str, login: bool = False) -> None:
    with logged_in(server) if login else greeted(server) as wire:
        data = b"Subject: confidential\r\n\r\nThe treasure is below the oak.\r\n"
        assert send_message(wire, data, recipient, sender).startswith("250 ")
        assert wire.ask("QUIT").startswith("221 ")


# --- requests ---


def test_health_is_ok(serve: Serve) -> None:
    reply = ask(monitored(serve), "/health")
    assert (reply.status, reply.body) == ("HTTP/1.1 200 OK", "ok\n")
    assert reply.fields["content-type"] == "text/plain"


@pytest.mark.parametrize("path", ["/", "/metrics", "/health", "/?x=<y>", "/metrics?name[]=a"])
def test_every_answer_says_that_nothing_may_be_loaded_or_kept(serve: Serve, path: str) -> None:
    reply = ask(monitored(serve), path)
    assert reply.status == "HTTP/1.1 200 OK"
    policy = reply.fields["content-security-policy"]
    assert policy.split("; ") == [
        "default-src 'none'", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'",
    ]  # fmt: skip
    assert reply.fields["x-content-type-options"] == "nosniff"
    assert reply.fields["cache-control"] == "no-store"
    assert reply.fields["connection"] == "close"
    assert int(reply.fields["content-length"]) == len(reply.body.encode())


@pytest.mark.parametrize("path", ["/", "/metrics", "/health", "/nowhere"])
def test_head_is_get_without_a_body(serve: Serve, path: str) -> None:
    server = monitored(serve)
    head, get = ask(server, path, "HEAD"), ask(server, path)
    assert head.status == get.status
    assert head.body == ""
    assert set(head.fields) == set(get.fields)
    assert int(head.fields["content-length"]) > 0


@pytest.mark.parametrize("path", ["/nowhere", "/exit", "/metrics/", "//", "/../etc/passwd", "x"])
def test_what_is_not_there_is_not_found(serve: Serve, path: str) -> None:
    server = monitored(serve)
    assert ask(server, path).status == "HTTP/1.1 404 Not Found"
    still_works(server)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "get", "PATCH"])
def test_other_methods_are_not_allowed(serve: Serve, method: str) -> None:
    reply = ask(monitored(serve), "/", method)
    assert reply.status == "HTTP/1.1 405 Method Not Allowed"
    assert reply.body == "GET, HEAD or POST\n"


@pytest.mark.parametrize(
    ("request_", "status_line"),
    [
        (b"\r\n", b""),
        (b"GET\r\n\r\n", b""),
        (b"GET /\r\n\r\n", b""),
        (b"GET / HTTP/2.0\r\n\r\n", b""),
        (b"GET / x HTTP/1.1\r\n\r\n", b""),
        (b"GET / HTTP/1.1\nHost: x\n\n", b""),
        (b"EHLO client.example\r\n", b""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\n", b""),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 99 + b"\r\n", b"HTTP/1.1 200 OK"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 100 + b"\r\n", b""),
        (b"GET / HTTP/1.1\r\nX-A: " + b"b" * 8000 + b"\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET / HTTP/1.1\r\nX-A: " + b"b" * 9000 + b"\r\n\r\n", b""),
        (b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", b""),
        (b"\xff\xfe\0\r\n\r\n", b""),
        (b"\xff\xfe / HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b""),
    ],
    ids=range(18),
)
def test_what_is_no_request_is_not_answered_and_disturbs_nobody(
    serve: Serve, request_: bytes, status_line: bytes
) -> None:
    """An empty status line stands for a connection that is closed without a byte."""
    server = monitored(serve)
    assert send(server, request_).partition(b"\r\n")[0] == status_line
    still_works(server)


def test_who_closes_early_disturbs_nobody(serve: Serve) -> None:
    server = monitored(serve)
    for request in (b"", b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port(server)), SECONDS) as connection:
            connection.sendall(request)
    still_works(server)


def test_fields_that_are_none_are_passed_over(serve: Serve) -> None:
    request = b"GET /health HTTP/1.0\r\nno colon\r\n: x\r\n\xff\xfe: \xff\r\n\r\n"
    assert send(monitored(serve), request).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_request_may_come_in_pieces(serve: Serve) -> None:
    server = monitored(serve)
    with socket.create_connection(("127.0.0.1", port(server)), SECONDS) as connection:
        for octet in b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n":
            connection.sendall(bytes([octet]))
            server.settle()
        assert receive(connection).endswith(b"\r\n\r\nok\n")


def test_clients_that_are_slow_hold_up_nobody_and_are_sent_away(serve: Serve) -> None:
    clock = RunningClock()
    server = monitored(serve, clock=clock)
    slow = [socket.create_connection(("127.0.0.1", port(server)), SECONDS) for _ in range(30)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(b"GET / HTTP/1.1\r\nX: y\r\n"[: number % 20])
        still_works(server)
        clock.advance(11)
        server.settle()
        for connection in slow:
            assert receive(connection) == b""
    finally:
        for connection in slow:
            connection.close()
    still_works(server)


# --- the end ---


def test_post_to_exit_ends_the_server(tmp_path: Path) -> None:
    with Server(tmp_path, monitoring_address="127.0.0.1:0") as server:
        reply = ask(server, "/exit", "POST", body="x" * 1000, Content_Length="1000")
        assert (reply.status, reply.body) == ("HTTP/1.1 200 OK", "stopping\n")
        server.join()
    assert 'source=monitoring text="asked to exit"' in server.log
    assert server.log.rstrip().endswith("stopped")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "post", "OPTIONS"])
def test_nothing_but_post_ends_the_server(serve: Serve, method: str) -> None:
    server = monitored(serve)
    assert re.match("HTTP/1.1 40[45] ", ask(server, "/exit", method).status)
    server.settle()
    still_works(server)


@pytest.mark.parametrize(
    "fields",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"ORIGIN": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "same-origin"},
    ],
)
def test_no_web_page_ends_the_server(serve: Serve, fields: dict[str, str]) -> None:
    server = monitored(serve)
    reply = ask(server, "/exit", "POST", **fields)
    assert reply.status == "HTTP/1.1 403 Forbidden"
    server.settle()
    still_works(server)
    assert "monitoring" in server.log and "asked to exit" not in server.log


@pytest.mark.parametrize("path", ["/", "/metrics", "/Exit", "/exit/"])
def test_post_goes_nowhere_else(serve: Serve, path: str) -> None:
    server = monitored(serve)
    assert ask(server, path, "POST").status == "HTTP/1.1 404 Not Found"
    still_works(server)


# --- where it listens ---


def test_it_listens_nowhere_unless_told_to(serve: Serve) -> None:
    assert serve().daemon._listeners.monitoring == []


def test_a_port_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(chasquid.ConfigError, match="monitoring_address: cannot listen"):
            Server(tmp_path, monitoring_address=address).make()


@pytest.mark.parametrize("value", ["localhost", "x:y", ":70000"])
def test_an_address_is_a_host_and_a_port(tmp_path: Path, value: str) -> None:
    with pytest.raises(chasquid.ConfigError, match='monitoring_address: expected "systemd"'):
        Server(tmp_path, monitoring_address=value).make()


def test_a_socket_of_systemd_is_served(tmp_path: Path) -> None:
    systemd = dict.fromkeys(
        ("smtp_address", "submission_address", "submission_over_tls_address", "monitoring_address"),
        "systemd",
    )
    server = Server(tmp_path, **systemd)
    with started_by_systemd(server, "smtp", "monitoring") as (process, (smtp, monitoring)):
        with Wire.to("127.0.0.1", smtp) as wire:
            assert wire.reply().startswith(f"220 {HOST} ")
        with socket.create_connection(("127.0.0.1", monitoring), SECONDS) as connection:
            connection.sendall(b"POST /exit HTTP/1.1\r\n\r\n")
            assert receive(connection).endswith(b"stopping\n")
        assert process.wait(SECONDS) == 0


# --- the page ---


def test_the_page_of_a_server_that_has_done_nothing(serve: Serve) -> None:
    page = ask(monitored(serve))
    assert page.fields["content-type"] == "text/html; charset=utf-8"
    assert page.body.startswith("<!doctype html>")
    for text in (f"chasquid at {HOST}", f"version {chasquid.__version__}", "It is empty.",
                 "queued, of 200", "listening for smtp on [127.0.0.1]:"):  # fmt: skip
        assert text in page.body


def test_the_page_shows_what_waits_and_why(serve: Serve) -> None:
    server = monitored(serve, remote=Refusing(), random=lambda: 0.5)  # pauses without chance
    mail(server, "ana@here.example", "eva@there.example", login=True)
    server.wait_for_attempts()
    page = ask(server).body
    (file,) = server.queued("cur")
    assert f"<code>{file[4:20]}</code> from &lt;ana@here.example&gt;" in page
    assert "<b>eva@there.example</b>" in page
    assert f"<span class=wait>deferred</span>: mx.there.example says 450 {ESCAPED}" in page
    assert "next attempt in 1m" in page


def test_the_page_counts(serve: Serve) -> None:
    server = monitored(serve)
    mail(server, "eva@there.example", "ana@here.example")
    wait_for(lambda: not server.queued(), "the delivery")
    page = ask(server).body
    assert re.search(r"<b class=''>1</b>accepted", page)
    assert re.search(r"<b class='good'>1</b>delivered", page)
    assert re.search(r"<b class=''>0</b>failed", page)
    assert "<tr><td>messages queued<td>1" in page


def test_the_page_shows_recent_sessions_the_last_one_first(serve: Serve) -> None:
    server = monitored(serve)
    for name in ("first", "second"):
        with server.connect() as wire:
            wire.reply()
            wire.ask(f"EHLO {name}.example")
            if name == "second":
                page = ask(server).body
                assert page.index("C: EHLO second.example") < page.index("C: EHLO first.example")
                assert page.count("under way") == 1
            wire.ask("QUIT")
            assert wire.is_closed()

    def over(page: str) -> bool:
        return "S: 221 2.0.0 " in page and "under way" not in page

    wait_for(lambda: over(ask(server).body), "the session to end")


def test_the_page_shows_no_content_of_messages(serve: Serve) -> None:
    server = monitored(serve, remote=Refusing())
    mail(server, "ana@here.example", "eva@there.example", login=True)
    with server.connect() as wire:
        wire.reply()
        for line in ("EHLO x", "MAIL FROM:<eva@there.example>", "RCPT TO:<ana@here.example>"):
            wire.ask(line)
        wire.send(b"BDAT 20\r\nSubject: hush hush\r\n")
        assert wire.reply().startswith("250 ")
        assert wire.ask("RSET").startswith("250 ")
    page = ask(server).body
    assert "eva@there.example" in page
    for text in ("confidential", "treasure", "hush"):
        assert text not in page


SECRET = plain_secret("ana@here.example", "secret")
PASSWORD = base64.b64encode(b"secret").decode()


@pytest.mark.parametrize(
    "lines",
    [
        f"C: AUTH PLAIN {SECRET}\nS: 235 …",
        f"C: auth plain {SECRET}\nS: 235 …",
        f"C: AUTH  PLAIN {SECRET}\nS: 235 …",
        f"C: AUTH PLAIN\nS: 334…\nC: {SECRET}\nS: 235 …",
        f"C: AUTH LOGIN\nS: 334 …\nC: YW5hQGhlcmUuZXhhbXBsZQ==\nS: 334 …\nC: {PASSWORD}\nS: 235 …",
        f"C: AUTH PLAIN {SECRET[:-4]}\nS: 535 …",
        f"C: AUTH CRAM-MD5 {SECRET}\nS: 504 …",
    ],
)
@pytest.mark.usefixtures("no_pause")
def test_the_page_shows_no_password(serve: Serve, lines: str) -> None:
    server = monitored(serve)
    hello = "S: 220 …\nC: EHLO client.example\nS: 250-…\nS: 250 AUTH PLAIN LOGIN"
    play(server, f"* TLS\n{hello}\n{lines}\nC: NOOP\nS: 250 …", port="submission over TLS")
    page = ask(server).body
    assert "C: AUTH …" in page
    for text in (SECRET, SECRET[:-4], PASSWORD, "secret"):
        assert text.lower() not in page.lower()


@pytest.mark.parametrize(
    "lines",
    [
        f"C: AUTH LOGIN\nS: 538 …\nC: {PASSWORD}\nS: 500 …",
        f"C: AUTH\\tPLAIN {SECRET}\nS: 500 …".replace("\\t", "\t"),
        f"C: AUTHPLAIN {SECRET}\nS: 500 …",
        "C: DATA\nS: 503 …\nC: The secret treasure is below the oak.\nS: 500 …",
    ],
)
def test_the_page_shows_nothing_of_what_was_said_out_of_turn(serve: Serve, lines: str) -> None:
    server = monitored(serve)
    play(server, f"S: 220 …\nC: EHLO x\nS: 250-…\nS: 250 STARTTLS\n{lines}\nC: NOOP\nS: 250 …")
    page = ask(server).body
    assert "C: EHLO x" in page
    for text in (SECRET, PASSWORD, "treasure"):
        assert text.lower() not in page.lower()


def test_the_page_shows_the_configuration_without_secrets(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("correct horse\n")
    server = monitored(
        serve, smarthost="smart.example:587", smarthost_user="ana",
        smarthost_password_file=tmp_path / "password",
    )  # fmt: skip
    page = ask(server).body
    assert "smarthost: &quot;smart.example:587&quot;" in page
    assert "max_queue_items: 200" in page
    assert "correct horse" not in page


def test_what_clients_and_servers_say_is_escaped_wherever_it_is_shown(serve: Serve) -> None:
    server = monitored(serve, remote=Refusing(), hostname=HOST)
    with server.connect() as wire:
        wire.reply()
        wire.ask(f"EHLO {EVIL}")
        wire.ask("EHLO client.example")
        wire.ask(f'MAIL FROM:<"{EVIL}"@there.example>')
        wire.ask(f'RCPT TO:<"{EVIL}"@here.example>')
        wire.ask("QUIT")
    mail(server, "ana@here.example", f'"{EVIL}"@there.example', login=True)
    server.wait_for_attempts()
    page = ask(server).body
    assert "<script" not in page.lower()
    assert f"C: EHLO {ESCAPED}" in page
    assert f"<b>&quot;{ESCAPED}&quot;@there.example</b>" in page
    assert page.count(ESCAPED) >= 5


class Tags(html.parser.HTMLParser):
    """The tags of a page and their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[object] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.found.append(f"<!--{data}")

    def unknown_decl(self, data: str) -> None:
        self.found.append(f"<![{data}")


def status(text: str) -> Status:
    """Return a status in which everything that may come from outside is `text`."""
    dialogue = chasquid.Dialogue(text, text, 1.0)
    dialogue.add("C", text)
    line = QueueLine(text, text, text, text, ((text, text),))
    counters = {("commands", text): 1, ("messages", "queued"): 2}
    return Status(text, 9.0, 1.0, 1, (text,), (line,), 200, counters, (dialogue,), text)


hostile = st.text(st.sampled_from("<>&\"'/=! -[]{}`;abscript\\\n\0\xa0\u2028\ufeff"), max_size=30)


@settings(max_examples=40)
@given(st.one_of(hostile, st.text(max_size=20), st.just(EVIL), st.just("</pre><script>")))
def test_no_text_from_outside_makes_or_ends_a_tag(text: str) -> None:
    found = Tags(chasquid.page(status("x"))).found
    assert len(found) > 10
    assert Tags(chasquid.page(status(text))).found == found


def test_a_page_runs_no_script_and_loads_nothing() -> None:
    page = chasquid.page(status("x"))
    assert page.startswith("<!doctype html>") and len(page) > 1000
    assert not re.search(r"<script|<img|<link|<iframe|\son\w+=|url\(|@import|javascript:", page)


# --- what is kept of sessions ---


def test_only_the_last_sessions_are_kept_and_of_each_only_so_much(tmp_path: Path) -> None:
    kept = record(tmp_path, FakeClock())
    for number in range(53):
        dialogue = chasquid.Dialogue("smtp", f"192.0.2.{number}", 1.0)
        for _ in range(102):
            dialogue.add("C", "x" * 5000)
        kept.dialogues.append(dialogue)
    assert [one.peer for one in kept.dialogues] == [f"192.0.2.{n}" for n in range(3, 53)]
    assert {len(one.lines) for one in kept.dialogues} == {100}
    assert {len(line) for one in kept.dialogues for line in one.lines} == {303}


# --- metrics ---

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_SAMPLE = re.compile(rf'({_NAME})(?:\{{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\}})? (\S+)')


def parse_metrics(text: str, open_metrics: bool) -> dict[str, float]:
    """Return the samples; fail where the text is not in the format."""
    samples: dict[str, float] = {}
    families: dict[str, str] = {}
    lines = text.split("\n")
    assert lines.pop() == ""
    if open_metrics:
        assert lines.pop() == "# EOF"
    assert "# EOF" not in lines
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert family not in families, "a family stands there twice"
            families[family] = kind
        elif line.startswith("# HELP "):
            assert line.split(" ")[2] == family
        else:
            match = _SAMPLE.fullmatch(line)
            assert match is not None, line
            suffix = "_total" if open_metrics and families[family] == "counter" else ""
            assert match[1] == family + suffix
            assert families[family] != "counter" or match[1].endswith("_total")
            key = line.rpartition(" ")[0]
            assert key not in samples, "a sample stands there twice"
            samples[key] = float(match[3])
    return samples


def test_metrics_come_in_the_older_format_to_whoever_asks_for_nothing_else(serve: Serve) -> None:
    server = monitored(serve)
    for accept in ("", "*/*", "text/plain"):
        reply = ask(server, "/metrics", Accept=accept)
        assert reply.fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert parse_metrics(reply.body, open_metrics=False)["chasquid_queue_messages"] == 0


def test_metrics_come_as_openmetrics_to_whoever_asks_for_that(serve: Serve) -> None:
    reply = ask(monitored(serve), "/metrics", Accept=OPEN_METRICS)
    kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert reply.fields["content-type"] == kind
    samples = parse_metrics(reply.body, open_metrics=True)
    assert samples["chasquid_sessions"] == 0
    assert samples["chasquid_crashes_total"] == 0
    assert any(key.startswith("chasquid_build_info{") for key in samples)


def test_metrics_count_what_happens(serve: Serve) -> None:
    server = monitored(serve, remote=Refusing())
    mail(server, "eva@there.example", "ana@here.example")
    mail(server, "ana@here.example", "eva@there.example", login=True)
    server.wait_for_attempts()
    wait_for(lambda: server.daemon.queue.count == 1, "the end of the one that is delivered")
    with server.connect() as wire:
        wire.reply()
        wire.ask("EHLO x")
        wire.ask("NONSENSE")
        samples = parse_metrics(ask(server, "/metrics").body, open_metrics=False)
    assert samples['chasquid_messages_total{state="queued"}'] == 2
    assert samples['chasquid_deliveries_total{route="local",result="sent"}'] == 1
    assert samples['chasquid_deliveries_total{route="mx",result="deferred"}'] == 1
    assert samples['chasquid_connections_total{port="smtp"}'] == 2
    assert samples['chasquid_logins_total{result="succeeded"}'] == 1
    assert samples['chasquid_rejections_total{code="500"}'] == 1
    assert samples["chasquid_queue_messages"] == 1
    assert samples["chasquid_sessions"] == 1
    assert not any("NONSENSE" in key for key in samples)


def counters_of(metric: chasquid.Metric) -> st.SearchStrategy[tuple[str, ...]]:
    return st.tuples(st.just(metric.name), *[hostile] * len(metric.labels))


counted = st.dictionaries(
    st.sampled_from(sorted(chasquid.Metrics.BY_NAME.values())).flatmap(counters_of),
    st.integers(1, 10**15),
    max_size=12,
)


@given(counted, st.booleans())
def test_whatever_is_counted_the_format_is_kept(
    counters: Mapping[tuple[str, ...], int], open_metrics: bool
) -> None:
    told = status("x")._replace(counters=counters)
    samples = parse_metrics(chasquid.metrics(told, open_metrics), open_metrics)
    assert len(samples) > 10
    labelled = [key for key in samples if key.startswith(("chasquid_commands", "chasquid_spf"))]
    assert sum(samples[key] for key in labelled) == sum(
        count for (name, *_), count in counters.items() if name in ("commands", "spf")
    )


def test_the_values_that_are_known_are_those_of_the_rooms_that_count() -> None:
    metrics = chasquid.Metrics
    routes, states = {values[0] for values in metrics.DELIVERIES.known}, set(chasquid.State)
    assert routes == set(chasquid.RouteKind)
    assert {values[1] for values in metrics.DELIVERIES.known} == states - {chasquid.State.PENDING}
    assert {value for (value,) in metrics.NOTIFICATIONS.known} == set(chasquid.Action)


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1:1099", True), ("[::1]:1099", True), ("localhost", True),
     ("mail.here.example:80", True), ("evil.example", False), ("a b", False)],
)  # fmt: skip
def test_the_page_is_shown_under_no_name_that_a_stranger_made(
    serve: Serve, host: str, shown: bool
) -> None:
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    answer = send(monitored(serve), request)
    assert answer.startswith(b"HTTP/1.1 200 " if shown else b"HTTP/1.1 421 ")


def test_counters_exist_before_the_first_event(serve: Serve) -> None:
    found = parse_metrics(ask(monitored(serve), "/metrics")[2], False)
    for sample in (
        'chasquid_deliveries_total{route="mx",result="failed"}',
        'chasquid_logins_total{result="failed"}',
        'chasquid_rejections_total{code="550"}',
        'chasquid_spf_total{result="fail"}',
        'chasquid_limits_total{limit="rate"}',
    ):
        assert found[sample] == 0


def test_metrics_tell_of_the_process_the_queue_the_last_reload_and_certificates(
    serve: Serve,
) -> None:
    server = monitored(serve, remote=FakeCourier())
    mail(server, "ana@here.example", "eva@there.example", login=True)
    server.wait_for_attempts()
    found = parse_metrics(ask(server, "/metrics")[2], False)
    assert found["process_resident_memory_bytes"] > 1e6
    assert 3 < found["process_open_fds"] <= found["process_max_fds"]
    assert found["process_cpu_seconds_total"] > 0
    assert found["chasquid_queue_oldest_seconds"] > 0
    assert found["chasquid_reload_success"] == 1
    assert abs(found["chasquid_reload_time_seconds"] - time.time()) < 3600
    assert found[f'chasquid_certificate_expiry_seconds{{name="{HOST}"}}'] > time.time()
    path = server.write("domains/bad.example/users", b"oops")
    server.daemon.reload()
    wait_for(lambda: str(path) in server.log, "the complaint")
    found = parse_metrics(ask(server, "/metrics")[2], False)
    assert found["chasquid_reload_success"] == 0
    assert found["chasquid_configuration_problems"] == 1


def test_the_page_tells_of_envelopes_outcomes_domains_and_certificates(serve: Serve) -> None:
    server = monitored(serve)
    mail(server, "eva@there.example", "ana@here.example")
    page = ask(server, "/")[2]
    assert "&lt;eva@there.example&gt; to ana@here.example <span class=good>OK: queued as " in page
    assert " UTC smtp 127.0.0.1 " in page
    assert "<b>here.example</b> 2 users, <span class=wait>not signed</span>" in page
    assert f"<b>{HOST}</b> for {HOST}, <span class=good>until 2" in page
