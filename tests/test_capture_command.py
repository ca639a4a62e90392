# SPDX-License-Identifier: Apache-2.0
"""Rooms COMMANDS, CAPTURE: `capture`, its ports, its options, and the messages that it sends on."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import smtplib
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import PROGRAM, SECONDS

import chasquid

ANYWHERE = ("--smtp", "127.0.0.1:0", "--web", "127.0.0.1:0")
LETTER = "Subject: Welcome\r\n\r\n.hello\r\n"


class Capture(NamedTuple):
    """A running `capture`: where mail goes, and where it is shown."""

    smtp: tuple[str, int]
    web: str
    told: str

    def ask(self, path: str, body: object = None, method: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.web}api/v1/{path}", data, fields, method=method or None
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.loads(response.read())

    def text(self, path: str, body: object = None, method: str = "") -> str:
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.web}api/v1/{path}"
        request = urllib.request.Request(url, data, method=method or None)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            octets: bytes = response.read()
        return octets.decode()

    def send(self, recipient: str = "ana@here.example") -> None:
        with smtplib.SMTP(*self.smtp, timeout=SECONDS) as client:
            client.sendmail("shop@here.example", [recipient], LETTER)


def _free_port() -> int:
    """Return a port that is free at both families."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def capture(*options: str) -> Iterator[Capture]:
    """Run the command until the block ends; it must end well."""
    command = [*PROGRAM, "capture", *ANYWHERE, *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = ""
        while "Ctrl-C" not in told:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            told += line
        smtp = re.search(r"smtp://([\w.]+):(\d+)", told)
        web = re.search(r"http://\S+", told)
        assert smtp is not None and web is not None
        try:
            yield Capture((smtp[1], int(smtp[2])), web[0], told)
        finally:
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=SECONDS)
            assert (process.returncode, errors) == (0, ""), errors
        if "certificate" in rest:
            path = rest.split()[-1]
            assert not os.path.exists(path)


def refused(*options: str) -> str:
    """Run a command that must fail; return its one line."""
    command = [*PROGRAM, "capture", *ANYWHERE, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    return line


def test_mail_is_shown_searched_and_deleted() -> None:
    with capture() as server:
        server.send()
        [message] = server.ask("wait?count=1&query=welcome")["messages"]
        shown = server.ask(f"message/{message['ID']}")
        assert shown["Envelope"]["To"] == ["ana@here.example"]
        assert shown["Text"] == ".hello\n"
        transcript = server.text(f"message/{message['ID']}/dialogue").lower()  # smtplib differs
        assert "c: rcpt to:<ana@here.example>" in transcript
        assert server.text(f"message/{message['ID']}/raw") == LETTER
        assert server.text("messages", method="DELETE") == "ok"


def test_who_waits_in_vain_hears_what_did_arrive() -> None:
    with capture() as server:
        server.send()
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.ask("wait?count=2&timeout=0.1")
        assert caught.value.code == 408
        told = json.loads(caught.value.read())
        assert told["Error"].startswith("1 of 2 messages came within 0.1 s")
        assert told["messages"][0]["Subject"] == "Welcome"


def test_faults_are_given_at_the_start_and_later() -> None:
    rule = '{"stage": "DATA", "reply": "450", "times": 1}'
    with capture("--fault", "MAIL 451 4.2.1 busy", "--fault", rule) as server:
        assert [one["stage"] for one in server.ask("faults")["faults"]] == ["MAIL", "DATA"]
        with pytest.raises(smtplib.SMTPSenderRefused, match="busy"):
            server.send()
        server.text("faults", method="DELETE")
        assert server.ask("faults", {"stage": "RCPT", "reply": "550"}) == {"id": "3"}
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            server.send()
        server.text("faults/3", method="DELETE")
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            server.send("ana+452@here.example")
        server.send()
    with capture("--no-magic") as server:
        server.send("ana+452@here.example")


def test_only_so_much_is_kept() -> None:
    with capture("--keep", "2") as server:
        for _ in range(3):
            server.send()
        assert server.ask("messages")["total"] == 2


def test_a_login_is_needed_beyond_the_loopback_address() -> None:
    with capture("--web", "0.0.0.0:0") as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.ask("messages")
        assert caught.value.code == 401
        told = re.search(r"login +chasquid, password (\w+)", server.told)
        assert told is not None
        request = urllib.request.Request(f"{server.web}api/v1/messages")
        login = base64.b64encode(f"chasquid:{told[1]}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            assert json.loads(response.read())["total"] == 0
    with capture("--web", "0.0.0.0:0", "--web-login", "off") as server:
        assert server.ask("messages")["total"] == 0
    with capture("--web-login", "ana:secret") as server, pytest.raises(urllib.error.HTTPError):
        server.ask("messages")


def test_a_name_is_listened_at_with_both_families() -> None:
    with capture("--smtp", f"localhost:{_free_port()}") as server:
        found = socket.getaddrinfo("localhost", server.smtp[1], type=socket.SOCK_STREAM)
        for family, _, _, _, address in found:
            with socket.socket(family) as raw:
                raw.settimeout(SECONDS)
                raw.connect(address)
                assert raw.recv(3) == b"220"


def test_logins() -> None:
    with capture("--login", "ana:se:cret", "--login", "ben:x") as server:
        with smtplib.SMTP(*server.smtp, timeout=SECONDS) as client:
            client.login("ana", "se:cret")
        with smtplib.SMTP(*server.smtp) as client, pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("ben", "y")
    with capture("--any-login") as server, smtplib.SMTP(*server.smtp) as client:
        client.login("who", "ever")
    with capture() as server, smtplib.SMTP(*server.smtp) as client:
        client.ehlo()
        assert not client.has_extn("auth")


def test_tls() -> None:
    with (
        capture("--tls", "starttls") as server,
        smtplib.SMTP("localhost", server.smtp[1]) as client,
    ):
        context = ssl._create_unverified_context()
        client.starttls(context=context)
        client.login("user", "password")


def test_a_message_is_sent_on(tmp_path: Path) -> None:
    with chasquid.CaptureServer() as real:
        real.fault("RCPT", reply="550 5.1.1 nobody", address="ben@*")
        with capture("--release", f"127.0.0.1:{real.port}") as server:
            server.send()
            [message] = server.ask("messages")["messages"]
            path = f"message/{message['ID']}/release"
            assert server.text(path, {"To": ["eva@there.example"]}) == "ok"
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.text(path, {"To": ["ben@there.example"]})
            assert b"nobody" in caught.value.read()
        [sent] = real.messages
        assert (sent.mail_from, sent.rcpt_tos) == ("shop@here.example", ["eva@there.example"])
        assert sent.raw == LETTER.encode()


def test_a_message_is_sent_on_after_a_login_only_with_tls(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("password\n")
    with chasquid.CaptureServer(login_in_the_clear=True) as real:
        options = ("--release-user", "user", "--release-password-file", str(tmp_path / "password"))
        with capture("--release", f"127.0.0.1:{real.port}", *options) as server:
            server.send()
            [message] = server.ask("messages")["messages"]
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.ask(f"message/{message['ID']}/release", {"To": ["eva@there.example"]})
            assert b"does not offer STARTTLS" in caught.value.read()
        assert real.messages == []


def test_a_port_that_is_taken_is_told() -> None:
    with chasquid.CaptureServer() as other:
        line = refused("--smtp", f"127.0.0.1:{other.port}")
        assert f"cannot listen on 127.0.0.1:{other.port}: Address already in use" in line
        assert "Address already in use" in refused("--web", f"127.0.0.1:{other.port}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--fault", "RCPT 999"], "expected a reply, like '451'"),
        (["--fault", "{nonsense"], "is no JSON"),
        (["--fault", "[1]"], "'[1]' is no stage"),
        (["--fault", "null"], "'null' is no stage"),
        (["--release", "here:25", "--release-user", "ana"], "--release-password-file together"),
        (["--smtp", "here:port"], "--smtp: 'here:port' is no host:port"),
        (["--keep", "-1"], "keep: expected a number from 0"),
        (["--login", "ana"], "--login: expected USER:PASSWORD"),
        (["--web-login", "ana"], "--web-login: expected USER:PASSWORD or off"),
        (["--release-user", "ana"], "expected --release"),
        (["--login", "ana:x", "--any-login"], "expected one of --login and --any-login"),
    ],
)
def test_wrong_usage_is_told(options: list[str], text: str) -> None:
    assert text in refused(*options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["capture", "try"])
def test_what_is_said_of_the_end_holds_as_soon_as_it_is_said(
    tmp_path: Path, command: str, number: int
) -> None:
    options = ANYWHERE if command == "capture" else ("--dir", str(tmp_path))
    words = [*PROGRAM, command, *options]
    for _ in range(2):
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            while "Ctrl-C ends" not in process.stdout.readline():
                pass
            process.send_signal(number)
            _, errors = process.communicate(timeout=SECONDS)
            assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("text", "place"),
    [("1025", ("127.0.0.1", 1025)), (":1025", ("", 1025)), ("localhost:25", ("localhost", 25))],
)
def test_a_number_alone_is_a_port_on_this_machine(text: str, place: tuple[str, int]) -> None:
    assert chasquid._place(text, "--smtp") == place
