# SPDX-License-Identifier: Apache-2.0
"""Room CAPTURE: what a server for tests promises to those who test with it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import multiprocessing
import os
import re
import smtplib
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from email.message import EmailMessage
from typing import Any

import pytest
from support import SECONDS, Wire, wait_for
from support import smtp_client as client

import chasquid
from chasquid import CaptureServer, ChasquidError, Fault, NotArrived, NotFound

PATH = os.path.dirname(chasquid.__file__)
SMALL = b"Subject: x\r\n\r\nx\r\n"


def send(server: CaptureServer, raw: bytes = SMALL, *to: str) -> None:
    with client(server) as smtp:
        smtp.sendmail("a@a.example", to or ("ana@here.example",), raw, ["BODY=8BITMIME"])


def captured(raw: bytes) -> Any:
    """Return a message as a server that captured it shows it."""
    client = chasquid.ClientInfo(
        chasquid.Dialogue("", "", 0.0), chasquid.SMTP_PORT, "", "", False, "", ""
    )
    one = chasquid.Captured(
        0.0, client, "a@a.example", ["ana@here.example"], raw=raw.replace(b"\n", b"\r\n"),
        smtputf8=False,
    )  # fmt: skip
    return one.message


def plain(text: str) -> Any:
    return captured(b"Content-Type: text/plain; charset=utf-8\n\n" + text.encode())


def page(html: str) -> Any:
    return captured(b"Content-Type: text/html; charset=utf-8\n\n" + html.encode())


# --- running ---


def test_a_server_starts_and_stops_as_often_as_one_likes() -> None:
    server = CaptureServer()
    assert not server.is_running and "stopped" in repr(server)
    with pytest.raises(ChasquidError, match="not running: start it, or use it in a with block"):
        _ = server.port
    server.stop()
    server.start()
    with pytest.raises(ChasquidError, match="running already, at port"):
        server.start()
    send(server)
    assert repr(server) == f"<CaptureServer at 127.0.0.1:{server.port}, 1 message>"
    server.stop()
    server.stop()
    assert len(server.messages) == 1
    with server:
        send(server)
        assert len(server.messages) == 2


def test_a_port_can_be_had_again_at_once() -> None:
    with CaptureServer() as server:
        port = server.port
        with pytest.raises(
            ChasquidError, match=f"cannot listen on 127.0.0.1:{port}: Address already"
        ):
            CaptureServer(port=port).start()
        open_connection = client(server)
    for _ in range(3):
        with CaptureServer(port=port) as server:
            send(server)
            assert server.port == port
    open_connection.close()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"host": "192.0.2.1"}, "cannot listen on 192.0.2.1:0"),
        ({"host": "256.1.1.1"}, "256.1.1.1:0 is no address to listen at"),
        ({"port": -1}, "is no address to listen at"),
        ({"tls": True}, "tls: expected"),
        ({"size_limit": 0}, "size_limit: expected a number from 1"),
        ({"login_required": True}, "nobody logs in without TLS"),
        ({"tls_required": True}, 'tls_required needs tls="starttls" or "implicit"'),
        ({"nonsense": 1}, "there is no setting 'nonsense'; there are"),
    ],
)
def test_settings_that_make_no_sense_are_told(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ChasquidError) as caught:
        CaptureServer(**settings).start()
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"port": 70000}, {"host": "ü" * 100}, {"name": "a b"}, {"name": None},
     {"name": ""},
     {"size_limit": "1"}, {"keep": -1}, {"keep": "a"}, {"users": ["a"]}, {"timeout": "x"}],
    ids=str,
)  # fmt: skip
def test_settings_of_a_wrong_kind_are_told(settings: dict[str, Any]) -> None:
    server = None
    try:
        with pytest.raises(ChasquidError):
            server = CaptureServer(**settings)
            server.start()
    finally:
        if server is not None:
            server.stop()


def test_nothing_is_left_behind() -> None:
    with CaptureServer(tls="starttls") as server:
        send(server)
    gc.collect()
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for number in range(50):
        with CaptureServer(tls="starttls" if number % 2 else "off") as server:
            raw = socket.create_connection(server.address)
            if number % 5 == 0:
                send(server)
        raw.close()
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_start_that_fails_leaves_nothing_behind() -> None:
    with CaptureServer() as server:
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(5):
            with pytest.raises(ChasquidError):
                CaptureServer(port=server.port).start()
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_many_servers_side_by_side() -> None:
    errors: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for number in range(5):
                with CaptureServer() as server:
                    send(server, SMALL, f"{name}-{number}@here.example")
                    [message] = server.wait_for(1, SECONDS)
                    assert message.rcpt_tos == [f"{name}-{number}@here.example"]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert errors == []


def _in_a_child(server: CaptureServer) -> None:
    send(server)
    server.stop()


def test_a_fork_of_the_process_does_no_harm() -> None:
    with CaptureServer(tls="starttls") as server:
        child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(server,))
        child.start()
        child.join(SECONDS)
        assert child.exitcode == 0
        send(server)
        assert len(server.wait_for(2, SECONDS)) == 2
        assert os.path.exists(server.certificate)


def test_threads_that_want_certificates_at_once_get_the_same() -> None:
    code = """
        import sys, threading, time
        sys.path.insert(0, sys.argv[1])
        import chasquid

        make = chasquid.self_signed_certificate

        def slowly(names, at):
            time.sleep(0.02)
            return make(names, at)

        chasquid.self_signed_certificate = slowly
        servers = [chasquid.CaptureServer(tls="starttls") for _ in range(4)]
        found = []
        note = lambda server: found.append(server.certificate)
        threads = [threading.Thread(target=note, args=(server,)) for server in servers]
        for one in threads: one.start()
        for one in threads: one.join()
        assert len(set(found)) == 1, found
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), PATH], capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr.decode()


def test_rubbish_does_not_bring_it_down() -> None:
    with CaptureServer(tls="starttls") as server:
        for rubbish in (b"\0" * 5000, b"\xff\xfe\r\n", b"GET / HTTP/1.1\r\n\r\n", b"a" * 100_000,
                        b"\x16\x03\x01\x02\x00\x01\x00", b"MAIL FROM:<\r\nDATA\r\n"):  # fmt: skip
            with socket.create_connection(server.address) as raw:
                raw.sendall(rubbish)
        send(server)
        assert len(server.messages) == 1
        assert not [line for line in server.log if "event=error " in line or "event=crash " in line]


# --- TLS and logins ---


def test_tls() -> None:
    with CaptureServer(tls="starttls", tls_required=True) as server:
        with client(server) as smtp:
            assert smtp.mail("a@a.example")[0] == 530
            smtp.starttls(context=server.client_context())
            smtp.sendmail("a@a.example", ["b@b.example"], SMALL)
        with client(server) as smtp, pytest.raises(ssl.SSLCertVerificationError):
            smtp.starttls(context=ssl.create_default_context())
        assert server.messages[0].tls.startswith("TLSv1.3 ")
    with CaptureServer(tls="implicit") as server:
        with smtplib.SMTP_SSL(*server.address, context=server.client_context()) as smtp:
            assert not smtp.has_extn("starttls")
            smtp.sendmail("a@a.example", ["b@b.example"], SMALL)
        with pytest.raises(ssl.SSLCertVerificationError):
            smtplib.SMTP_SSL(*server.address, context=ssl.create_default_context())
    with CaptureServer() as server, client(server) as smtp:
        assert not smtp.has_extn("starttls") and not smtp.has_extn("auth")
        with pytest.raises(ChasquidError, match="the server does no TLS: make it with"):
            server.client_context()


@pytest.mark.parametrize(
    "users",
    [None, {"user": "password"}, lambda name, password: (name, password) == ("user", "password")],
    ids=["none", "mapping", "callable"],
)
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_logins(users: Any, mechanism: str) -> None:
    with CaptureServer(
        users=users, tls="starttls", login_in_the_clear=True, login_required=True
    ) as server:
        with client(server) as smtp:
            assert smtp.mail("a@a.example")[0] == 530
            auth = getattr(smtp, f"auth_{mechanism.lower()}")
            smtp.user, smtp.password = "user", "wr0ng-secret"
            with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
                smtp.auth(mechanism, auth)
            assert caught.value.smtp_code == 535
            smtp.password = "password"
            assert smtp.auth(mechanism, auth)[0] == 235
            smtp.sendmail("anyone@else.example", ["b@b.example"], SMALL)
        [message] = server.messages
        assert message.login == "user"
        everything = "\n".join([*server.transcripts, *server.log])
        for secret in ("wr0ng-secret", "password", "cGFzc3dvcmQ", "wr0n"):
            encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
            assert encoded not in everything and f"C: {secret}" not in everything
        assert "wr0ng-secret" not in everything


def test_who_may_log_in_first() -> None:
    assert (CaptureServer().login, CaptureServer().password) == ("user", "password")
    server = CaptureServer(users={"ana": "1", "ben": "2"})
    assert (server.login, server.password) == ("ana", "1")
    with pytest.raises(ChasquidError, match="no list of users"):
        _ = CaptureServer(users=lambda name, password: True).login


def test_wrong_passwords_never_lock_out() -> None:
    with CaptureServer(login_in_the_clear=True) as server:
        for _ in range(30):
            with client(server) as smtp:
                assert smtp.docmd("AUTH PLAIN AHVzZXIAeA==")[0] == 535
        with client(server) as smtp:
            assert smtp.login("user", "password")[0] == 235


# --- what is kept ---


def test_the_octets_are_exact() -> None:
    raw = b"Subject: x\r\n\r\n.\r\n..a\r\n.b\r\n\r\n  \t\r\n" + "größer ".encode() + b"\xff\x80\r\n"
    with CaptureServer() as server:
        send(server, raw)
        with Wire.to(*server.address) as wire:
            wire.reply()
            for line in ("EHLO c", "MAIL FROM:<>", "RCPT TO:<Ana+x@Here.Example>"):
                wire.say(line)
                wire.reply()
            wire.send(b"BDAT 7\r\n" + raw[:7] + b"BDAT %d LAST\r\n" % (len(raw) - 7) + raw[7:])
            wire.reply()
            wire.reply()
        by_data, by_bdat = server.wait_for(2)
        assert by_data.raw == by_bdat.raw == raw
        assert by_bdat.mail_from == "" and by_bdat.rcpt_tos[0].lower() == "ana+x@here.example"
        assert by_bdat.peer == "127.0.0.1" and by_bdat.hello == "c"


def test_the_size_limit() -> None:
    with CaptureServer(size_limit=1000) as server, client(server) as smtp:
        assert smtp.esmtp_features["size"] == "1000"
        assert smtp.docmd("MAIL FROM:<a@a.example> SIZE=1001")[0] == 552
        with pytest.raises(smtplib.SMTPDataError) as caught:
            smtp.mail("a@a.example")
            smtp.rcpt("b@b.example")
            raise smtplib.SMTPDataError(*smtp.data(SMALL + b"y" * 2000))
        assert caught.value.smtp_code == 552 and b"1000 octets" in bytes(caught.value.smtp_error)
        exact = SMALL + b"y" * (1000 - len(SMALL) - 2) + b"\r\n"
        smtp.mail("a@a.example")
        smtp.rcpt("b@b.example")
        assert smtp.data(exact)[0] == 250
        assert [len(message.raw) for message in server.messages] == [1000]


def test_a_large_message() -> None:
    raw = SMALL + (b"z" * 998 + b"\r\n") * 20_000
    with CaptureServer() as server:
        send(server, raw)
        assert server.messages[0].raw == raw


def test_an_envelope_of_its_own_for_each_message() -> None:
    with CaptureServer(faults=[Fault("RCPT", reply="550", address="no@*")]) as server:
        with client(server) as smtp:
            smtp.mail("gone@a.example")
            smtp.rcpt("gone@b.example")
            smtp.rset()
            for number in range(3):
                to = [f"{number}@b.example", "no@b.example", "hidden@b.example"]
                smtp.sendmail(f"{number}@a.example", to, b"To: 0@b.example\r\n\r\n")
        for number, message in enumerate(server.messages):
            assert message.mail_from == f"{number}@a.example"
            assert message.rcpt_tos == [f"{number}@b.example", "hidden@b.example"]
            assert message["To"] == "0@b.example" and message["Bcc"] is None


def test_a_message_with_everything() -> None:
    message = EmailMessage()
    message["Subject"] = "Größe"
    message["To"] = "grün@bücher.example"
    message.set_content("Schöne Grüße\n", cte="quoted-printable")
    message.add_alternative("<p>Schöne <b>Grüße</b></p>", subtype="html", cte="base64")
    message.add_attachment(b"\0\1", maintype="image", subtype="png", filename="ü.png")
    with CaptureServer() as server:
        with client(server) as smtp:
            smtp.send_message(message, "ä@a.example", ["grün@bücher.example"])
        [one] = server.messages
        assert one["Subject"] == "Größe" and one["to"] == "grün@bücher.example"
        assert one.smtputf8 and one.mail_from == "ä@a.example"
        assert one.rcpt_tos == ["grün@bücher.example"]
        assert one.text == "Schöne Grüße\n" and "<b>Grüße</b>" in one.html
        [attachment] = one.iter_attachments()
        assert attachment.get_filename() == "ü.png" and attachment.get_content() == b"\0\1"
        assert isinstance(one, EmailMessage)


def test_text_that_is_hard_to_read() -> None:
    assert captured(b"Content-Type: text/plain; charset=no-such\n\nabc\n").text == "abc\n"
    assert captured(b"").text == "" and captured(b"\n").html == ""
    assert captured(b"Content-Type: multipart/mixed\n\nabc\n").text in ("", "abc\n")
    assert captured(b"Content-Type: image/png\n\nabc\n").text == ""
    assert captured(b"Subject: a\n\nx\ny\n").get_content() == "x\ny\n"


def test_an_empty_message() -> None:
    with CaptureServer() as server:
        with client(server) as smtp:
            smtp.sendmail("a@a.example", ["b@b.example"], b"")
        assert server.messages[0].raw in (b"", b"\r\n")


def test_the_transcript() -> None:
    with CaptureServer() as server:
        send(server)
        lines = server.messages[0].transcript.split("\n")
        assert {line[:3] for line in lines} == {"C: ", "S: "}
        assert lines[0].startswith("S: 220 localhost") and lines[1] == "C: EHLO client.example"
        assert server.transcripts[0].startswith("S: 220")
        assert any("event=captured " in line for line in server.log)


def test_only_the_last_are_kept_where_that_is_asked_for() -> None:
    with CaptureServer(keep=2) as server:
        for name in "abc":
            send(server, SMALL, f"{name}@b.example")
        assert [message.rcpt_tos for message in server.messages] == [
            ["b@b.example"],
            ["c@b.example"],
        ]
        server.reset()
        assert server.messages == [] and server.transcripts == [] and server.log == []


def test_as_many_messages_and_connections_as_a_test_may_need() -> None:
    with CaptureServer() as server:
        with client(server) as smtp:
            for _ in range(300):
                smtp.sendmail("a@a.example", ["b@b.example"], SMALL)
        connections = [socket.create_connection(server.address, SECONDS) for _ in range(150)]
        for raw in connections:
            assert raw.recv(3) == b"220"
            raw.close()
        assert len(server.messages) == 300


def test_addresses_are_kept_as_they_were_written() -> None:
    with CaptureServer() as server:
        send(server, SMALL, "Ana+X@Here.Example")
        assert server.messages[0].rcpt_tos == ["Ana+X@Here.Example"]


def test_a_message_with_utf8_in_its_fields_can_be_written_again() -> None:
    message = captured("Subject: Größe\nX-Other: ü\n\nx\n".encode())
    assert "Größe".encode() in bytes(message)


# --- waiting ---


@pytest.mark.parametrize("what", [0, -1, True])
def test_what_cannot_be_waited_for(what: Any) -> None:
    with CaptureServer() as server, pytest.raises(ChasquidError, match="That nothing arrives"):
        server.wait_for(what)


@pytest.mark.parametrize("what", ["1", None, 1.5])
def test_what_is_no_number_cannot_be_waited_for(what: Any) -> None:
    with CaptureServer() as server, pytest.raises(ChasquidError, match="expected a number"):
        server.wait_for(what, timeout=0.01)


def test_waiting_for_messages_of_other_threads() -> None:
    with CaptureServer() as server:
        threads = [threading.Thread(target=send, args=(server, SMALL, f"{n}@b")) for n in range(8)]
        for thread in threads:
            thread.start()
        assert len(server.wait_for(8, SECONDS)) == 8
        found = server.wait_for(lambda message: "5@b" in message.rcpt_tos)
        assert found.rcpt_tos == ["5@b"]
        for thread in threads:
            thread.join()


def test_waiting_in_vain_tells_what_did_arrive() -> None:
    def is_welcome(message: object) -> bool:
        return False

    with CaptureServer(timeout=0.02) as server:
        with pytest.raises(
            NotArrived, match="waited 0.02 s in vain for 1 message; (?s:.*)nobody has"
        ) as e:
            server.wait_for()
        assert isinstance(e.value, AssertionError)
        send(server, "Subject: Grüße\r\n\r\n".encode())
        with pytest.raises(NotArrived) as caught:
            server.wait_for(is_welcome)
        text = str(caught.value)
        assert "a message that is_welcome is true of; arrived: 1 message" in text
        assert "from <a@a.example> to ana@here.example: 'Grüße'" in text
        assert "c: rcpt to:<ana@here.example>" in text.lower()  # smtplib differs by version


def test_a_condition_that_fails_is_heard() -> None:
    with CaptureServer() as server:
        send(server)
        with pytest.raises(ZeroDivisionError):
            server.wait_for(lambda message: 1 / 0)


def test_waiting_at_a_server_that_is_stopped() -> None:
    server = CaptureServer()
    with pytest.raises(ChasquidError, match="not started: call start\\(\\)"):
        server.wait_for(1, SECONDS)
    server.start()
    threading.Timer(0.05, server.stop).start()
    began = time.monotonic()
    with pytest.raises(ChasquidError, match="stopped"):
        server.wait_for(1, SECONDS)
    assert time.monotonic() - began < SECONDS / 2
    wait_for(lambda: threading.active_count() == 1 or not server.is_running, "the end")


def test_what_comes_while_a_condition_is_asked_is_not_overlooked() -> None:
    server = CaptureServer()

    def second(message: Any) -> bool:
        if server.is_running:
            send(server, SMALL, "second@b.example")
            server.stop()
        return message.rcpt_tos == ["second@b.example"]

    with server:
        send(server)
        assert server.wait_for(second).rcpt_tos == ["second@b.example"]


# --- links and codes ---


def test_links() -> None:
    mail = page('<p><a href="https://t.example/c?a=1&amp;b=2">x</a> <a href="mailto:a@b">m</a>'
                '<a href="HTTPS://u.example/unsubscribe">y</a></p>')  # fmt: skip
    assert mail.links() == ["https://t.example/c?a=1&b=2", "HTTPS://u.example/unsubscribe"]
    assert mail.link("unsubscribe").endswith("/unsubscribe")
    with pytest.raises(NotFound, match="no link in the message fits 'reset'; it has: https://t"):
        mail.link("reset")
    text = plain("Siehe https://a.example/x. Oder (https://b.example/y), <https://c.example/z>!\n")
    assert text.links() == ["https://a.example/x", "https://b.example/y", "https://c.example/z"]
    assert plain("nothing").links() == []
    assert page('<a href="https://a.example/?t=abc.">x</a>').links() == [
        "https://a.example/?t=abc."
    ]
    assert plain("HTTPS://a.example/x").links() == ["HTTPS://a.example/x"]


@pytest.mark.parametrize(
    "mail, link",
    [
        (plain("https://a.example/Foo_(bar)"), "https://a.example/Foo_(bar)"),
        (plain("[https://a.example/[x]]"), "https://a.example/[x]"),
    ],
    ids=["round", "square"],
)
def test_links_are_whole(mail: Any, link: str) -> None:
    assert mail.links() == [link]


@pytest.mark.parametrize(
    "text, code",
    [
        ("Your code is 482913.", "482913"),
        ("Your verification code: 482 913", "482913"),
        ("Use 482-913 to log in", "482913"),
        ("Ihr Bestätigungscode lautet 482913. Er gilt 10 Minuten.", "482913"),
        ("Ihr Code: 4821\nBestellung vom 22.11.2026", "4821"),
        ("Votre code de vérification est 482913", "482913"),
        ("Order 20481234: your PIN is 7712", "7712"),
        ("22.11.2026: 482913", "482913"),
    ],
)
def test_codes(text: str, code: str) -> None:
    assert plain(text).code() == code
    assert page(f"<style>#123456 {{}}</style><p style='color:#654321'>{text}</p>").code() == code


HARD_CODES = [
    ("482913 is your code.\n\n© 2026 Example Inc.", "482913"),
    ("G-482913 is your Google verification code.", "482913"),
    ("Use 482913, it works for ten minutes", "482913"),
    ("Votre code : 482\N{NARROW NO-BREAK SPACE}913", "482913"),
    ("© 2026 Firma\nIhr Bestätigungscode lautet 4821", "4821"),
    ("Farbe #336699. Ihr Bestätigungscode: 482913", "482913"),
]


@pytest.mark.parametrize("text, code", HARD_CODES)
def test_codes_that_are_harder_to_see(text: str, code: str) -> None:
    assert plain(text).code() == code


@pytest.mark.parametrize(
    "text", ["© 2026 Example", "Color #336699", "Tel. 030 1234567", "https://a.example/?id=482913"]
)
def test_what_is_no_code(text: str) -> None:
    with pytest.raises(NotFound):
        plain(text).code()


def test_no_code_is_told_with_the_text() -> None:
    with pytest.raises(
        NotFound, match="no code in the message looks like one; its text is: 'Hello"
    ):
        plain("Hello, 12 apples for 3,50 €").code()
    assert plain("Your token: AB-12 now").code(r"token: (\S+)") == "AB-12"
    with pytest.raises(NotFound, match=r"fits 'x\+'"):
        plain("abc").code("x+")


def test_html_keeps_words_apart() -> None:
    assert page("<p>Your code is<br>482913<br>2026</p>").code() == "482913"
    assert "12" not in page("<table><tr><td>1</td><td>2</td></tr></table>").text


def test_what_is_hidden_is_no_text() -> None:
    html = "<html><head><title>T</title><style>s</style></head><body><script>x</script>a&amp;b"
    assert page(html).text.strip() == "a&b"


# --- many threads, and much mail ---


def test_of_so_many_octets_the_oldest_go() -> None:
    with CaptureServer(keep_octets=3000) as server:
        for number in range(5):
            send(server, b"Subject: %d\r\n\r\n" % number + b"x" * 1000)
        assert [message["Subject"] for message in server.messages] == ["3", "4"]
        send(server, b"Subject: big\r\n\r\n" + b"x" * 5000)
        assert [message["Subject"] for message in server.messages] == ["big"]


def test_results_that_a_message_claims_are_left_as_they_came() -> None:
    with CaptureServer() as server:
        send(server, b"Authentication-Results: localhost; spf=pass\r\nSubject: a\r\n\r\nx\r\n")
        assert server.messages[0]["Authentication-Results"] == "localhost; spf=pass"


def test_starts_and_stops_of_many_threads_leave_one_server_or_none() -> None:
    server = CaptureServer()

    def both() -> None:
        for _ in range(10):
            with contextlib.suppress(ChasquidError):
                server.start()
            server.stop()

    threads = [threading.Thread(target=both) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if re.fullmatch(r"chasquid-\d+", name)]


def test_a_server_that_is_to_stop_itself_says_so_and_can_be_stopped() -> None:
    told = []

    def right(user: str, password: str) -> bool:
        try:
            server.stop()
        except ChasquidError as error:
            told.append(str(error))
        return True

    server = CaptureServer(users=right, login_in_the_clear=True)
    with server, client(server) as smtp:
        smtp.login("ana", "secret")
    assert told == ["the server cannot be stopped from its own thread"]
    assert not server.is_running


def test_rules_meet_clients_that_send_in_chunks() -> None:
    faults = [Fault("DATA", reply="451 4.3.0 later", times=1)]
    with CaptureServer(faults=faults) as server, Wire.to(*server.address) as wire:
        wire.reply()
        for code, count in (("451", 0), ("250", 1)):
            for line in ("EHLO c", "MAIL FROM:<a@a.example>", "RCPT TO:<b@b.example>"):
                wire.say(line)
                assert wire.reply()[:3] == "250"
            wire.send(b"BDAT 6\r\nA: b\r\n")
            assert wire.reply()[:3] == code
            wire.send(b"BDAT 5 LAST\r\n\r\nx\r\n")
            assert wire.reply()[:3] == code
            assert len(server.messages) == count


def test_a_field_that_the_parser_fails_on_is_there_as_it_came() -> None:
    with CaptureServer() as server:
        send(server, b'From: "\r\nMessage-ID: <a@[\r\nSubject: b\r\n\r\nx\r\n')
        [message] = server.wait_for(1)
        assert (message["From"], message["Subject"]) == ('"', "b")
        assert message["Message-ID"]


def test_faults_may_be_mappings_and_nothing_else() -> None:
    rules = [Fault("MAIL", reply="450"), {"stage": "rcpt", "reply": 451}]
    assert [rule["stage"] for rule in CaptureServer(faults=rules).script.describe()] == [
        "MAIL",
        "RCPT",
    ]
    for wrong in ("RCPT 451", ["RCPT 451"]):
        with pytest.raises(
            ChasquidError, match="expected chasquid.Fault objects, found 'RCPT 451'"
        ):
            CaptureServer(faults=wrong)  # type: ignore[arg-type]
    with pytest.raises(ChasquidError, match="magic: expected True or False"):
        CaptureServer(magic="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_a_handshake_that_fails_stands_in_the_transcript(tls: str) -> None:
    with CaptureServer(tls=tls) as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            if tls == "implicit":
                trusting = ssl.create_default_context()
                smtplib.SMTP_SSL("localhost", server.port, timeout=SECONDS, context=trusting)
            else:
                with client(server) as smtp:
                    smtp.starttls(context=ssl.create_default_context())
        transcript = wait_for(
            lambda: [one for one in server.transcripts if "no TLS came about" in one], "the note"
        )
        assert "does the client trust `certificate`" in transcript[0]


def test_a_start_that_fails_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    server = CaptureServer()
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []

    def fail(*_: object, **named: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(chasquid, "ServerContext", fail)
    with pytest.raises(OSError, match="the disk is full"):
        server.start()
    if before:
        assert len(os.listdir("/proc/self/fd")) == len(before)
    monkeypatch.undo()
    with server:
        send(server)


# --- a test's own functions, and waiting in asyncio ---


def test_a_function_sees_each_message_and_may_refuse_it() -> None:
    with CaptureServer() as server:
        seen = []

        @server.on_message
        def look(message: Any) -> str | None:
            seen.append(message["Subject"])
            return "452 4.3.1 full" if "ben@here.example" in message.rcpt_tos else None

        with client(server) as smtp:
            smtp.sendmail("a@a.example", ["ana@here.example"], "Subject: one\n\nx")
            with pytest.raises(smtplib.SMTPDataError, match="full"):
                smtp.sendmail("a@a.example", ["ben@here.example"], "Subject: two\n\nx")
        assert seen == ["one", "two"]
        assert [message["Subject"] for message in server.messages] == ["one"]
        server.reset()
        with client(server) as smtp:
            smtp.sendmail("a@a.example", ["ben@here.example"], "Subject: three\n\nx")
        assert seen == ["one", "two"]


def test_a_function_sees_each_command_and_may_answer_it() -> None:
    with CaptureServer() as server:
        said = []

        @server.on_command
        def answer(verb: str, argument: str) -> str | None:
            said.append(verb)
            return "550 5.1.1 not her" if verb == "RCPT" and "ana" in argument else None

        with client(server) as smtp:
            refused = smtp.sendmail("a@a.example", ["ana@x.example", "ben@x.example"], "\nx")
        assert refused == {"ana@x.example": (550, b"5.1.1 not her")}
        assert said == ["EHLO", "MAIL", "RCPT", "RCPT", "DATA", "QUIT"]


def test_what_a_function_raises_is_a_failure_of_the_server() -> None:
    with CaptureServer() as server:

        @server.on_message
        def broken(message: Any) -> str | None:
            raise KeyError("oops")

        with client(server) as smtp, pytest.raises(smtplib.SMTPDataError, match="fault of ours"):
            smtp.sendmail("a@a.example", ["ana@here.example"], "\nx")
        assert any("KeyError" in line for line in server.log)


def test_commands_are_told_with_their_replies() -> None:
    with CaptureServer() as server:
        send(server)
        commands = server.commands
    assert [command.verb for command in commands] == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]
    assert commands[1].reply == "250 2.1.0 Sender OK"
    assert commands[2].argument.lower() == "to:<ana@here.example>"
    assert commands[3].reply.startswith("250 2.0.0 OK: queued as ")


def test_an_inbox_has_the_mail_of_one_recipient() -> None:
    with CaptureServer() as server:
        send(server, SMALL, "ana@here.example", "ben@here.example")
        send(server, SMALL, "Ben@here.example")
        assert [len(server.inbox(who)) for who in ("ana@here.example", "ben@here.example")] == [
            1,
            2,
        ]


def test_nothing_is_expected() -> None:
    with CaptureServer() as server:
        server.expect_nothing(0.01)
        send(server)
        with pytest.raises(chasquid.Unexpected, match="arrived: 1 message"):
            server.expect_nothing(5)


def test_waiting_in_asyncio() -> None:
    async def main() -> None:
        async with CaptureServer() as server:
            waiting = asyncio.ensure_future(server.arrived(lambda m: "ana@" in m.rcpt_tos[0]))
            await asyncio.to_thread(send, server)
            assert (await waiting).mail_from
            assert len(await server.arrived()) == 1
            server.wait_for(1)  # what is there needs no waiting
            with pytest.raises(ChasquidError, match=r"await server.arrived"):
                server.wait_for(2)
            with pytest.raises(NotArrived, match="2 messages; arrived: 1 message"):
                await server.arrived(2, timeout=0.01)
        assert not server.is_running

    asyncio.run(main())


def test_settings_are_changed_while_it_runs() -> None:
    with CaptureServer(login_in_the_clear=True) as server:
        server.configure(size_limit=100, users={"ana": "new"}, login_required=True)
        with client(server) as smtp:
            smtp.ehlo()
            assert smtp.esmtp_features["size"] == "100"
            with pytest.raises(smtplib.SMTPSenderRefused):
                smtp.sendmail("a@a.example", ["ana@here.example"], "\nx")
            smtp.login("ana", "new")
            smtp.sendmail("a@a.example", ["ana@here.example"], "\nx")
        for wrong in ({"tls": "off"}, {"size": 1}, {"size_limit": 0}):
            with pytest.raises(ChasquidError):
                server.configure(**wrong)
        assert server.settings.size_limit == 100


def test_a_certificate_and_an_authority_of_the_test(tmp_path: Any) -> None:
    chain, key = chasquid.self_signed_certificate(["localhost"], time.time())
    (tmp_path / "own.pem").write_text(chain + key)
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(tmp_path / "own.pem")
    trusting = ssl.create_default_context(cafile=str(tmp_path / "own.pem"))
    with (
        CaptureServer(tls_context=own, client_ca=str(tmp_path / "own.pem")) as server,
        smtplib.SMTP("localhost", server.port, timeout=SECONDS) as smtp,
    ):
        trusting.load_cert_chain(tmp_path / "own.pem")
        smtp.starttls(context=trusting)
        assert smtp.noop()[0] == 250
    with CaptureServer(tls="implicit", client_ca=str(tmp_path / "own.pem")) as server:
        context = server.client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # so that the handshake itself tells
        with pytest.raises(ssl.SSLError):
            smtplib.SMTP_SSL("localhost", server.port, context=context, timeout=SECONDS)
    for settings in ({"client_ca": "x"}, {"client_ca": "/nowhere", "tls": "starttls"}):
        with pytest.raises(ChasquidError, match="client_ca"):
            CaptureServer(**settings).start()


def test_a_unix_socket(tmp_path: Any) -> None:
    path = str(tmp_path / "smtp")
    with CaptureServer(path=path) as server:
        assert server.address == path
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(SECONDS)
            raw.connect(path)
            assert raw.recv(3) == b"220"
        with pytest.raises(ChasquidError, match="cannot listen on"):
            CaptureServer(path=path).start()
    assert not os.path.exists(path)


def test_what_is_no_header_is_taken_if_that_is_asked_for() -> None:
    odd = b"not a field\r\nSubject: x\r\n\r\nbody\r\n"
    with CaptureServer() as server, pytest.raises(smtplib.SMTPDataError):
        send(server, odd)
    with CaptureServer(lenient=True) as server:
        send(server, odd)
        assert server.messages[0].raw == odd


def test_a_failure_shows_the_line_of_the_test(tmp_path: Any) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_it(mail_server):\n    mail_server.wait_for(1, timeout=0)  # here\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "# here" in done.stdout and "def wait_for" not in done.stdout
