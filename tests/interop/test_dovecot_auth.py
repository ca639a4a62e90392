# SPDX-License-Identifier: Apache-2.0
"""Dovecot knows the users: it checks their passwords, keeps their mail, and shows it."""

from __future__ import annotations

import base64
import imaplib
import smtplib

import pytest
from support import wait_for

from .clients import swaks
from .peers import DovecotDirectory
from .server import Chasquid
from .tools import LOOPBACK, letter, subjects

IN_FILE = {"ana@here.example": "secret"}
IN_DOVECOT = {"dov@here.example": "päss wörd", "bob@here.example": "hidden"}
DOV = "dov@here.example"


class Asking(Chasquid):
    """chasquid that asks Dovecot beside its own files."""

    def write_settings(self) -> None:
        super().write_settings()
        with (self.config_dir / "chasquid.conf").open("a") as file:
            file.write("dovecot_auth: true\n")


@pytest.fixture
def both(start, names):
    """Dovecot, and chasquid that asks it and delivers to it."""
    dovecot = start(DovecotDirectory, users={**IN_FILE, **IN_DOVECOT})
    chasquid = start(
        Asking,
        names,
        users=IN_FILE,
        aliases={"here.example": "team: ana, bob\n"},
        dovecot_userdb_path=str(dovecot.userdb_socket),
        dovecot_client_path=str(dovecot.client_socket),
        lmtp_address=str(dovecot.lmtp_socket),
    )
    return dovecot, chasquid


def login(chasquid, user, password):
    """Return code and text of the reply to a login."""
    with smtplib.SMTP("localhost", chasquid.submission_port, "desk.example", timeout=60) as client:
        client.starttls(context=chasquid.tls_context())
        client.ehlo()
        secret = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
        code, text = client.docmd("AUTH PLAIN", secret)
        return code, text.decode()


def rcpt(chasquid, address):
    with chasquid.smtp() as client:
        client.ehlo()
        assert client.mail("carl@client.example")[0] == 250
        code, text = client.rcpt(address)
        return code, text.decode()


def subjects_over_imap(dovecot, user, password):
    with imaplib.IMAP4(LOOPBACK, dovecot.imap_port) as imap:
        imap.login(user, password)
        imap.select("INBOX")
        _, [found] = imap.search(None, "ALL")
        read = [
            imap.fetch(each.decode(), "(BODY[HEADER.FIELDS (SUBJECT)])") for each in found.split()
        ]
        return [data[0][1].decode().strip().removeprefix("Subject: ") for _, data in read]


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("way", ["submission", "submission over TLS"])
def test_a_user_of_dovecot_submits_and_reads(both, way, mechanism):
    dovecot, chasquid = both
    port, tls = {
        "submission": (chasquid.submission_port, "--tls"),
        "submission over TLS": (chasquid.tls_port, "--tls-on-connect"),
    }[way]
    session = swaks(
        *[port, tls, "--auth", mechanism, "--auth-user", "bob@here.example"],
        *["--auth-password", "hidden", "--from", "bob@here.example"],
        *["--to", f"{DOV},ana@here.example", "--header", "Subject: over it all"],
    )
    assert session.status == 0, session.text
    for user, password in ((DOV, IN_DOVECOT[DOV].encode()), ("ana@here.example", "secret")):
        dovecot.wait_for_letters(user)
        if isinstance(password, str):
            assert subjects_over_imap(dovecot, user, password) == ["over it all"]
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")


@pytest.mark.parametrize(
    ("user", "password", "code"),
    [
        (DOV, "päss wörd", 235),
        ("DOV@Here.Example", "päss wörd", 235),
        (DOV, "pass word", 535),
        (DOV, "", 535),
        ("nobody@here.example", "hidden", 535),
        ("dov@elsewhere.example", "päss wörd", 535),
        ("ana@here.example", "secret", 235),
        ("ana@here.example", "guessed", 535),
    ],
)
def test_logging_in(both, user, password, code):
    _, chasquid = both
    assert login(chasquid, user, password)[0] == code


def test_dovecot_is_asked_who_has_a_mailbox(both):
    dovecot, chasquid = both
    for address in (DOV, "Dov+lists@Here.Example", "ana@here.example", "team@here.example"):
        assert rcpt(chasquid, address)[0] == 250
    code, text = rcpt(chasquid, "nobody@here.example")
    assert (code, text[:6]) == (550, "5.1.1 ")
    message = letter("to many", "carl@client.example", DOV, "team@here.example")
    with chasquid.smtp() as client:
        refused = client.send_message(
            message, "carl@client.example", ["dov+x@here.example", "team@here.example"]
        )
        assert not refused
    for address in (DOV, "bob@here.example", "ana@here.example"):
        assert subjects(dovecot.wait_for_letters(address)) == ["to many"]
    assert subjects_over_imap(dovecot, "bob@here.example", "hidden") == ["to many"]


def test_while_dovecot_is_down_its_users_are_told_to_wait(both):
    dovecot, chasquid = both
    dovecot.stop()
    code, text = login(chasquid, DOV, IN_DOVECOT[DOV])
    assert (code, text[:6]) == (454, "4.3.0 ")
    code, text = rcpt(chasquid, DOV)
    assert (code, text[:6]) == (451, "4.3.0 ")
    assert login(chasquid, "ana@here.example", "secret")[0] == 235
    assert rcpt(chasquid, "ana@here.example")[0] == 250
    dovecot.start()
    assert login(chasquid, DOV, IN_DOVECOT[DOV])[0] == 235
    assert rcpt(chasquid, DOV)[0] == 250


def test_what_was_accepted_waits_until_dovecot_is_back(both):
    dovecot, chasquid = both
    with chasquid.smtp() as client:
        client.ehlo()
        assert client.mail("carl@client.example")[0] == 250
        assert client.rcpt(DOV)[0] == 250
        dovecot.stop()
        message = letter("in between", "carl@client.example", DOV)
        assert client.data(message.as_bytes())[0] == 250
    chasquid.wait_for_log("event=next-attempt")
    dovecot.start()
    chasquid.command("queue", "retry", "all")
    assert subjects(dovecot.wait_for_letters(DOV)) == ["in between"]


def test_a_check_that_fails_is_not_taken_for_a_wrong_password(both):
    dovecot, chasquid = both
    dovecot.break_passwords()
    code, text = login(chasquid, DOV, IN_DOVECOT[DOV])
    assert "checkpassword" in dovecot.log()
    assert (code, text[:6]) == (454, "4.3.0 ")


def test_a_check_that_fails_lets_nobody_in(both):
    dovecot, chasquid = both
    dovecot.break_passwords()
    assert login(chasquid, DOV, IN_DOVECOT[DOV])[0] in (454, 535)
