# SPDX-License-Identifier: Apache-2.0
"""chasquid sends to smtp-sink, which plays servers that are old, poor or moody."""

from __future__ import annotations

import time

import pytest
from support import wait_for

from .peers import SmtpSink
from .server import Chasquid
from .tools import letter


@pytest.fixture
def start_both(start, names):
    names.records["sink.example"] = {"MX": ["10 mx.sink.example."]}
    names.records["mx.sink.example"] = {"A": ["127.0.0.1"]}

    def start_both(*options, **settings):
        sink = start(SmtpSink, *options)
        return sink, start(Chasquid, names, outgoing_smtp_port=sink.port, **settings)

    return start_both


def send(chasquid, subject, *recipients, body="Hello.\n"):
    message = letter(subject, "ana@here.example", *recipients, body=body)
    chasquid.submit("ana@here.example", list(recipients), message)


@pytest.mark.parametrize(
    "options",
    [(), ("-p",), ("-8",), ("-F",), ("-e", "-p", "-8"), ("-w", "1")],
    ids=["all", "no PIPELINING", "no 8BITMIME", "no enhanced codes", "no ESMTP", "slow"],
)
def test_every_kind_of_server_is_served(start_both, options):
    sink, chasquid = start_both(*options)
    send(chasquid, "to a sink", "a@sink.example", "b@sink.example", body=".\n.dots\n")
    [arrived] = sink.wait_for_letters()
    assert "X-Mail-Args: <ana@here.example>" in arrived
    assert "X-Rcpt-Args: <a@sink.example>" in arrived
    assert "X-Rcpt-Args: <b@sink.example>" in arrived
    assert arrived.replace("\r", "").rstrip("\n").endswith("\n\n.\n.dots")
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")


@pytest.mark.parametrize("command", ["mail", "rcpt", "data", "."])
def test_a_soft_refusal_is_tried_again(start_both, command):
    sink, chasquid = start_both("-r", command)
    send(chasquid, "soft", "a@sink.example")
    chasquid.wait_for_log("event=next-attempt")
    assert len(chasquid.queue_ids()) == 1
    assert not chasquid.letters("ana@here.example")


@pytest.mark.parametrize("command", ["mail", "rcpt", "data", "."])
def test_a_hard_refusal_gives_a_notification(start_both, command):
    sink, chasquid = start_both("-f", command)
    send(chasquid, "hard", "a@sink.example")
    [report] = chasquid.wait_for_letters("ana@here.example")
    _, for_machines, _ = report.iter_parts()
    assert for_machines.get_payload()[1]["Status"].startswith("5.")
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")


@pytest.mark.parametrize("command", ["connect", "mail", "rcpt", "data", "."])
def test_a_server_that_hangs_up_is_tried_again(start_both, command):
    sink, chasquid = start_both("-q", command)
    send(chasquid, "hung up", "a@sink.example")
    chasquid.wait_for_log("event=next-attempt")
    assert len(chasquid.queue_ids()) == 1
    assert not chasquid.letters("ana@here.example")


def test_a_server_that_says_421_is_tried_again(start_both):
    sink, chasquid = start_both("-Q", "data")
    send(chasquid, "421", "a@sink.example")
    chasquid.wait_for_log("event=next-attempt")
    assert len(chasquid.queue_ids()) == 1


def test_in_the_end_it_is_given_up(start_both):
    sink, chasquid = start_both("-r", "rcpt", give_up_send_after="1s")
    send(chasquid, "given up", "a@sink.example")
    chasquid.wait_for_log("event=next-attempt")
    time.sleep(1)
    chasquid.command("queue", "retry", "all")
    [report] = chasquid.wait_for_letters("ana@here.example")
    _, for_machines, _ = report.iter_parts()
    of_recipient = for_machines.get_payload()[1]
    assert of_recipient["Action"] == "failed"
    assert of_recipient["Status"].endswith(".4.7")
    kind, _, text = of_recipient["Diagnostic-Code"].partition("; ")
    assert kind.lower() != "smtp" or text.startswith("4"), "only a reply is of the kind smtp"
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
