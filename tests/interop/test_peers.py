# SPDX-License-Identifier: Apache-2.0
"""The peers among themselves: where these fail, the others say nothing about chasquid."""

from __future__ import annotations

import imaplib
import smtplib

import dns.resolver
import pytest

from .clients import smtp_source, swaks
from .peers import Dovecot, Exim, NameServer, Postfix, SmtpSink, unix_socket_accepts
from .tools import LOOPBACK, letter, subjects


def test_postfix_delivers_what_swaks_sends_over_tls(start):
    postfix = start(Postfix)
    session = swaks(postfix.port, "--tls", "-f", "a@client.example", "-t", "dora@dest.example")
    assert session.status == 0, session.text
    [message] = postfix.wait_for_letters("dora@dest.example")
    assert "TLSv1.3" in message["Received"]


def test_postfix_refuses_a_mailbox_that_does_not_exist(start):
    postfix = start(Postfix)
    session = swaks(postfix.port, "-f", "a@client.example", "-t", "nobody@dest.example")
    assert session.status != 0
    assert session.refusals[0].startswith("550 5.1.1")


def test_postfix_relays_to_exim_over_tls(start):
    exim = start(Exim)
    postfix = start(Postfix, relay_port=exim.port)
    postfix.send("p@dest.example", ["elsa@exim.example"], letter("one", "p@dest.example", "elsa"))
    [message] = exim.wait_for_letters("elsa@exim.example")
    assert message["Return-path"] == "<p@dest.example>"
    exim.wait_for_log("X=TLS1.3")


def test_exim_relays_to_postfix_over_tls(start):
    postfix = start(Postfix)
    exim = start(Exim, relay_port=postfix.port)
    exim.send("e@exim.example", ["dora@dest.example"], letter("two", "e@exim.example", "dora"))
    [message] = postfix.wait_for_letters("dora@dest.example")
    assert message["Subject"] == "two"
    assert "TLS" in message["Received"]


def test_exim_refuses_a_mailbox_that_does_not_exist(start):
    exim = start(Exim)
    session = swaks(exim.port, "-f", "a@client.example", "-t", "nobody@exim.example")
    assert session.refusals[0].startswith("550 no such mailbox here")


def test_dovecot_takes_lmtp_and_shows_it_over_imap(start):
    users = {"lena@here.example": "lamp", "full@here.example": "brim"}
    dovecot = start(Dovecot, users=users, full=["full@here.example"])
    assert unix_socket_accepts(dovecot.lmtp_socket)
    message = letter("three", "a@client.example", "lena@here.example")
    with smtplib.LMTP(LOOPBACK, dovecot.lmtp_port) as client:
        client.ehlo("client.example")
        client.docmd("MAIL FROM:<a@client.example>")
        assert client.docmd("RCPT TO:<lena@here.example>")[0] == 250
        assert client.docmd("RCPT TO:<full@here.example>")[0] == 250
        assert client.docmd("RCPT TO:<nobody@here.example>")[0] == 550
        assert client.docmd("DATA")[0] == 354
        client.send(message.as_bytes() + b".\r\n")
        assert client.getreply()[0] == 250
        assert client.getreply()[0] == 552
    with imaplib.IMAP4(LOOPBACK, dovecot.imap_port) as imap:
        imap.login("lena@here.example", "lamp")
        assert imap.select("INBOX") == ("OK", [b"1"])


def test_smtp_source_fills_smtp_sink(start):
    sink = start(SmtpSink)
    smtp_source(sink.port, sender="s@a.example", recipient="r@b.example", messages=20, sessions=2)
    assert len(sink.wait_for_letters(20)) == 20


@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_the_name_server_answers(tcp: bool):
    records = {
        "dest.example": {
            "MX": ["10 mx.dest.example."],
            "TXT": [f"{number}{'x' * 200}" for number in range(20)],
        },
        "mx.dest.example": {"A": ["127.0.0.1"]},
        "broken.example": "SERVFAIL",
    }
    with NameServer(records) as server:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = [LOOPBACK], server.port
        resolver.lifetime = 5
        [answer] = resolver.resolve("dest.example", "MX", tcp=tcp)
        assert answer.exchange.to_text() == "mx.dest.example."
        assert len(resolver.resolve("dest.example", "TXT", tcp=tcp)) == 20
        with pytest.raises(dns.resolver.NXDOMAIN):
            resolver.resolve("other.example", "MX", tcp=tcp)
        with pytest.raises(dns.resolver.NoAnswer):
            resolver.resolve("mx.dest.example", "AAAA", tcp=tcp)
        with pytest.raises(dns.resolver.NoNameservers):
            resolver.resolve("broken.example", "A", tcp=tcp)


def test_postfix_receives_internationalized_addresses(start):
    postfix = start(Postfix, mailboxes=["δοκιμή"])
    message = letter("grüße", "ñandú@client.example", "δοκιμή@dest.example")
    with smtplib.SMTP(LOOPBACK, postfix.port, "client.example") as client:
        client.send_message(message, "ñandú@client.example", ["δοκιμή@dest.example"])
    assert subjects(postfix.wait_for_letters("δοκιμή@dest.example")) == ["grüße"]
