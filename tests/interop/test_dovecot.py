# SPDX-License-Identifier: Apache-2.0
"""Dovecot takes mail from chasquid over LMTP, and reads a Maildir that chasquid wrote."""

from __future__ import annotations

import email
import email.policy
import imaplib

import pytest
from support import wait_for

from .peers import Dovecot
from .server import Chasquid
from .tools import LOOPBACK, letter, subjects

USERS = {
    "ana@here.example": "secret",
    "bob@here.example": "hidden",
    "full@here.example": "brim",
    "gone@here.example": "away",  # chasquid knows this one, Dovecot does not
}


def start_both(start, names, way="socket", **settings):
    users = {address: USERS[address] for address in USERS if address != "gone@here.example"}
    dovecot = start(Dovecot, users=users, full=["full@here.example"])
    address = str(dovecot.lmtp_socket)
    if way == "port":
        address = f"{LOOPBACK}:{dovecot.lmtp_port}"
    chasquid = start(Chasquid, names, users=USERS, lmtp_address=address, **settings)
    return dovecot, chasquid


@pytest.mark.parametrize("way", ["socket", "port"])
def test_delivery_over_lmtp(start, names, way):
    dovecot, chasquid = start_both(start, names, way)
    recipients = ["ana@here.example", "bob@here.example"]
    message = letter("lmtp", "carl@client.example", *recipients, body=".\n.dots\n..\n")
    with chasquid.smtp() as client:
        client.send_message(message, "carl@client.example", recipients)
    for address in recipients:
        [arrived] = dovecot.wait_for_letters(address)
        assert arrived["Return-Path"] == "<carl@client.example>"
        assert arrived.get_content() == ".\n.dots\n..\n"
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
    assert not (chasquid.data_dir / "mail").exists()


def test_a_mailbox_that_is_full_fails_alone(start, names):
    dovecot, chasquid = start_both(start, names)
    recipients = ["bob@here.example", "full@here.example"]
    message = letter("one is full", "ana@here.example", *recipients)
    chasquid.submit("ana@here.example", recipients, message)
    assert subjects(dovecot.wait_for_letters("bob@here.example")) == ["one is full"]
    [report] = dovecot.wait_for_letters("ana@here.example")
    of_recipient = report_on_one(report)
    assert of_recipient["Final-Recipient"] == "rfc822; full@here.example"
    assert of_recipient["Status"] == "5.2.2"
    assert not dovecot.letters("full@here.example")


def test_a_user_that_dovecot_does_not_know_fails_alone(start, names):
    dovecot, chasquid = start_both(start, names)
    recipients = ["gone@here.example", "bob@here.example"]
    message = letter("one is gone", "ana@here.example", *recipients)
    chasquid.submit("ana@here.example", recipients, message)
    assert subjects(dovecot.wait_for_letters("bob@here.example")) == ["one is gone"]
    [report] = dovecot.wait_for_letters("ana@here.example")
    of_recipient = report_on_one(report)
    assert of_recipient["Final-Recipient"] == "rfc822; gone@here.example"
    assert of_recipient["Status"] == "5.1.1"


def report_on_one(report):
    """Return the fields of the only recipient of a notification."""
    _, for_machines, _ = report.iter_parts()
    _, of_recipient = for_machines.get_payload()
    return of_recipient


def test_dovecot_that_is_down_is_tried_again(start, names):
    dovecot, chasquid = start_both(start, names)
    dovecot.stop()
    with chasquid.smtp() as client:
        message = letter("later", "carl@client.example", "ana@here.example")
        client.send_message(message, "carl@client.example", ["ana@here.example"])
    chasquid.wait_for_log("event=next-attempt")
    dovecot.start()
    chasquid.command("queue", "retry", "all")
    assert subjects(dovecot.wait_for_letters("ana@here.example")) == ["later"]


def test_dovecot_reads_the_maildir(start, chasquid):
    dovecot = start(Dovecot, users={"ana@here.example": "secret"})
    body = "Ein Gruß, und noch eine Zeile\n" * 50
    with chasquid.smtp() as client:
        for number in range(3):
            message = letter(f"number {number}", "carl@client.example", "ana@here.example")
            message.set_content(body, cte="8bit")
            client.send_message(
                message, "carl@client.example", ["ana@here.example"], ["BODY=8BITMIME"]
            )
    chasquid.wait_for_letters("ana@here.example", 3)
    dovecot.adopt("ana@here.example", chasquid.maildir("ana@here.example"))
    with imaplib.IMAP4(LOOPBACK, dovecot.imap_port) as imap:
        imap.login("ana@here.example", "secret")
        assert imap.select("INBOX") == ("OK", [b"3"])
        for number in (b"1", b"2", b"3"):
            _, [(head, content), _] = imap.fetch(number, "(RFC822.SIZE RFC822)")
            read = email.message_from_bytes(content, policy=email.policy.default)
            assert read["Subject"].startswith("number ")
            assert read.get_content() == body.replace("\n", "\r\n")
            assert int(head.split(b"RFC822.SIZE ")[1].split()[0]) == len(content)
        _, [found] = imap.search(None, "UNSEEN")
        assert not found, "what was fetched is seen"
