# SPDX-License-Identifier: Apache-2.0
"""Postfix and chasquid tell one another's senders what became of their mail."""

from __future__ import annotations

import smtplib

from support import wait_for

from .peers import Postfix
from .server import USERS, WORLD, Chasquid
from .tools import LOOPBACK, letter


def start_both(start, names, **postfix_settings):
    """Start a Postfix and a chasquid that send to each other."""
    names.records.update(WORLD)
    postfix = start(Postfix)
    chasquid = start(Chasquid, names, users=USERS, outgoing_smtp_port=postfix.port)
    postfix.change(
        relayhost=f"[{LOOPBACK}]:{chasquid.smtp_port}", default_transport="smtp", **postfix_settings
    )
    return postfix, chasquid


def status(report):
    """Return the fields of a report about the message, and about its one recipient."""
    [part] = [one for one in report.walk() if one.get_content_type() == "message/delivery-status"]
    message, recipient = part.get_payload()
    return message, recipient


def submit(chasquid, dsn, recipient="dora@dest.example"):
    message = letter("asking", "ana@here.example", recipient)
    options = {"mail_options": ["RET=HDRS", "ENVID=QQ+2B314"], "rcpt_options": dsn}
    chasquid.submit("ana@here.example", [recipient], message, **options)


def test_postfix_reports_success_for_us(start, names):
    postfix, chasquid = start_both(start, names)
    submit(chasquid, ["NOTIFY=SUCCESS", "ORCPT=rfc822;Dora+2Bx@old.example"])
    postfix.wait_for_letters("dora@dest.example")
    [report] = chasquid.wait_for_letters("ana@here.example")
    message, recipient = status(report)
    assert message["Reporting-MTA"] == f"dns; {postfix.hostname}"
    assert message["Original-Envelope-Id"] == "QQ+314"
    assert recipient["Original-Recipient"] == "rfc822;Dora+x@old.example"
    assert recipient["Action"] == "delivered"
    assert report["Return-Path"] == "<>"
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
    assert len(chasquid.letters("ana@here.example")) == 1, "one report is enough"


def test_to_a_postfix_without_the_extension_we_say_that_it_was_relayed(start, names):
    postfix, chasquid = start_both(start, names, smtpd_discard_ehlo_keywords="dsn")
    submit(chasquid, ["NOTIFY=SUCCESS", "ORCPT=rfc822;Dora+2Bx@old.example"])
    postfix.wait_for_letters("dora@dest.example")
    [report] = chasquid.wait_for_letters("ana@here.example")
    message, recipient = status(report)
    assert message["Reporting-MTA"] == f"dns; {chasquid.hostname}"
    assert message["Original-Envelope-Id"] == "QQ+314"
    assert recipient["Original-Recipient"].replace(" ", "") == "rfc822;Dora+x@old.example"
    assert recipient["Action"] == "relayed"
    assert recipient["Remote-MTA"] == f"dns; {postfix.hostname}"


def test_who_never_wants_to_hear_does_not_hear_from_either(start, names):
    postfix, chasquid = start_both(start, names)
    submit(chasquid, ["NOTIFY=NEVER"], "nobody@dest.example")
    log = chasquid.directory / "mail.log"
    wait_for(lambda: "says 550 5.1.1" in log.read_text(), "the refusal")
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
    assert chasquid.letters("ana@here.example") == []
    submit(chasquid, ["NOTIFY=FAILURE"], "nobody@dest.example")
    [report] = chasquid.wait_for_letters("ana@here.example")
    assert status(report)[1]["Action"] == "failed"
    assert "text/rfc822-headers" in [part.get_content_type() for part in report.walk()]


def test_we_report_success_to_a_sender_behind_postfix(start, names):
    postfix, chasquid = start_both(start, names)
    message = letter("asked", "dora@dest.example", "bob@here.example")
    with smtplib.SMTP(LOOPBACK, postfix.port, timeout=60) as client:
        client.send_message(
            message, "dora@dest.example", ["bob@here.example"],
            mail_options=["ENVID=XY314"], rcpt_options=["NOTIFY=SUCCESS,FAILURE"],
        )  # fmt: skip
    chasquid.wait_for_letters("bob@here.example")
    [report] = postfix.wait_for_letters("dora@dest.example")
    message, recipient = status(report)
    assert message["Reporting-MTA"] == f"dns; {chasquid.hostname}"
    assert message["Original-Envelope-Id"] == "XY314"
    assert recipient["Action"] == "delivered"
    assert recipient["Original-Recipient"].replace(" ", "") == "rfc822;bob@here.example"
    assert report["Return-Path"] == "<>"
