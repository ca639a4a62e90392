# SPDX-License-Identifier: Apache-2.0
"""Exim sends to chasquid, with BDAT where it can, and chasquid to Exim."""

from __future__ import annotations

from support import wait_for

from .peers import Exim
from .server import Chasquid
from .tools import letter


def test_exim_sends_in_chunks_over_tls(start, chasquid):
    exim = start(Exim, relay_port=chasquid.smtp_port)
    body = ".\n.a dot\n" + "a line of some length\n" * 20_000
    message = letter("chunks", "elsa@exim.example", "ana@here.example", body=body)
    exim.send("elsa@exim.example", ["ana@here.example"], message)
    [arrived] = chasquid.wait_for_letters("ana@here.example")
    assert arrived.get_content() == body
    assert "with ESMTPS" in arrived["Received"]
    [line] = wait_for(
        lambda: [one for one in exim.log().splitlines() if " => ana" in one], "a delivery by Exim"
    )
    assert " X=TLS1.3" in line
    assert " K " in line, "CHUNKING was not used"


def test_exim_sends_to_two_and_hears_of_a_third(start, chasquid):
    exim = start(Exim, relay_port=chasquid.smtp_port)
    recipients = ["ana@here.example", "bob@here.example", "nobody@here.example"]
    exim.send("elsa@exim.example", recipients, letter("three", "elsa@exim.example", *recipients))
    chasquid.wait_for_letters("ana@here.example")
    chasquid.wait_for_letters("bob@here.example")
    exim.wait_for_log("550 5.1.1")
    [bounce] = exim.wait_for_letters("elsa@exim.example")
    assert "nobody@here.example" in bounce.as_string()


def start_both(start, names):
    names.records["exim.example"] = {"MX": ["0 mx.exim.example."]}
    names.records["mx.exim.example"] = {"A": ["127.0.0.1"]}
    exim = start(Exim)
    return exim, start(Chasquid, names, outgoing_smtp_port=exim.port)


def test_chasquid_sends_over_tls_to_both_recipients_at_once(start, names):
    exim, chasquid = start_both(start, names)
    recipients = ["elsa@exim.example", "emil@exim.example"]
    message = letter("to exim", "ana@here.example", *recipients)
    chasquid.submit("ana@here.example", recipients, message)
    for address in recipients:
        [arrived] = exim.wait_for_letters(address)
        assert arrived["Return-path"] == "<ana@here.example>"
    [line] = [one for one in exim.log().splitlines() if " <= ana@here.example" in one]
    assert "P=esmtps" in line
    assert "X=TLS1.3" in line
    assert line.endswith("for elsa@exim.example emil@exim.example")


def test_a_refused_recipient_gives_a_notification(start, names):
    exim, chasquid = start_both(start, names)
    message = letter("nobody there", "ana@here.example", "nobody@exim.example")
    chasquid.submit("ana@here.example", ["nobody@exim.example"], message)
    [report] = chasquid.wait_for_letters("ana@here.example")
    _, for_machines, _ = report.iter_parts()
    of_recipient = for_machines.get_payload()[1]
    assert of_recipient["Action"] == "failed"
    # Exim's reply has no enhanced code, so only the class is known (RFC 3463, 2)
    assert of_recipient["Status"].startswith("5.")
    assert of_recipient["Diagnostic-Code"].startswith("smtp; 550")
    assert "no such mailbox here" in of_recipient["Diagnostic-Code"]
    assert not exim.letters("nobody@exim.example")
