# SPDX-License-Identifier: Apache-2.0
"""Rooms COMMANDS, CAPTURE: `capture`, its ports, its options, and the messages that it sends on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import smtplib
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import MODULE, SECONDS

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

    def send(self, recipient: str = "ana@here.example") -> None:
        with smtplib.SMTP(*self.smtp, timeout=SECONDS) as client:
            client.sendmail("shop@here.example", [recipient], LETTER)


@contextlib.contextmanager
def capture(*options: str) -> Iterator[Capture]:
    """Run the command until the block ends; it must end well."""
    command = [sys.executable, str(MODULE), "capture", *ANYWHERE, *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = ""
        while "Ctrl-C" not in told:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            told += line
        smtp = re.search(r"smtp://([\d.]+):(\d+)", told)
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
    command = [sys.executable, str(MODULE), "capture", *ANYWHERE, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    return line


def test_mail_is_shown_searched_and_deleted() -> None:
    with capture() as server:
        server.send()
        [message] = server.ask("wait?count=1&query=welcome")["messages"]
        assert message["rcpt_tos"] == ["ana@here.example"]
        shown = server.ask(f"messages/{message['id']}")
        assert shown["text"] == ".hello\n"
        transcript = shown["transcript"].lower()  # smtplib differs by version
        assert "c: rcpt to:<ana@here.example>" in transcript
        with urllib.request.urlopen(f"{server.web}api/v1/messages/{message['id']}/raw") as raw:
            assert raw.read() == LETTER.encode()
        assert server.ask("messages", method="DELETE") == {"deleted": 1}


def test_who_waits_in_vain_hears_what_did_arrive() -> None:
    with capture() as server:
        server.send()
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.ask("wait?count=2&timeout=0.1")
        assert caught.value.code == 408
        told = json.loads(caught.value.read())
        assert told["error"].startswith("1 of 2 messages came within 0.1 s")
        assert told["arrived"][0]["subject"] == "Welcome"


def test_faults_are_given_at_the_start_and_later() -> None:
    rule = '{"stage": "DATA", "reply": "450", "times": 1}'
    with capture("--fault", "MAIL 451 4.2.1 busy", "--fault", rule) as server:
        assert [one["stage"] for one in server.ask("faults")["faults"]] == ["MAIL", "DATA"]
        with pytest.raises(smtplib.SMTPSenderRefused, match="busy"):
            server.send()
        server.ask("faults", method="DELETE")
        assert server.ask("faults", {"stage": "RCPT", "reply": "550"}) == {"id": "3"}
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            server.send()
        server.ask("faults/3", method="DELETE")
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
            path = f"messages/{message['id']}/release"
            told = server.ask(path, {"to": ["eva@there.example"]})
            assert "eva@there.example: sent" in told["released"]
            with pytest.raises(urllib.error.HTTPError) as caught:
                server.ask(path, {"to": ["ben@there.example"]})
            assert "nobody" in json.loads(caught.value.read())["error"]
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
                server.ask(f"messages/{message['id']}/release", {"to": ["eva@there.example"]})
            assert "does not offer STARTTLS" in json.loads(caught.value.read())["error"]
        assert real.messages == []


def test_a_port_that_is_taken_is_told() -> None:
    with chasquid.CaptureServer() as other:
        line = refused("--smtp", f"127.0.0.1:{other.port}")
        assert f"cannot listen on 127.0.0.1:{other.port}: Address already in use" in line
        assert "Address already in use" in refused("--web", f"127.0.0.1:{other.port}")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--fault", "RCPT 250"], "expected a reply that refuses"),
        (["--fault", "{nonsense"], "is no JSON"),
        (["--fault", "[1]"], "'[1]' is no stage"),
        (["--fault", "null"], "'null' is no stage"),
        (["--release", "here:25", "--release-user", "ana"], "--release-password-file together"),
        (["--smtp", "here:port"], "--smtp: 'here:port' is no host:port"),
        (["--keep", "-1"], "keep: expected a number from 0"),
        (["--login", "ana"], "--login: expected USER:PASSWORD"),
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
    words = [sys.executable, str(MODULE), command, *options]
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
