# SPDX-License-Identifier: Apache-2.0
"""swaks says what clients say, right and wrong."""

from __future__ import annotations

import pytest

from .clients import swaks

FROM_OUTSIDE = ("--from", "carl@client.example", "--to", "ana@here.example")
AS_ANA = ("--from", "ana@here.example", "--to", "bob@here.example")
LOGIN = ("--auth-user", "ana@here.example", "--auth-password", "secret")


def test_ehlo_offers_what_there_is(chasquid):
    session = swaks(chasquid.smtp_port, "--quit-after", "EHLO")
    assert session.status == 0, session.text
    offered = {reply[4:].partition(" ")[0] for reply in session.replies if reply[:3] == "250"}
    expected = {"PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE", "ENHANCEDSTATUSCODES", "STARTTLS"}
    assert expected <= offered
    assert "AUTH" not in offered, "logging in is for TLS only"


def test_inside_tls_logging_in_is_offered_and_starttls_is_not(chasquid):
    session = swaks(chasquid.smtp_port, "--tls", "--quit-after", "EHLO")
    assert session.status == 0, session.text
    inside = session.replies[-2:] + session.replies
    assert any(reply[4:].startswith("AUTH ") for reply in inside)
    assert sum(reply[4:] == "STARTTLS" for reply in inside) == 1


def test_mail_from_outside_is_accepted(chasquid):
    session = swaks(chasquid.smtp_port, *FROM_OUTSIDE)
    assert session.status == 0, session.text
    [arrived] = chasquid.wait_for_letters("ana@here.example")
    assert "from client.example ([127.0.0.1])" in " ".join(arrived["Received"].split())


def test_pipelined_commands(chasquid):
    to_both = ("--from", "carl@client.example", "--to", "ana@here.example,bob@here.example")
    session = swaks(chasquid.smtp_port, "--pipeline", *to_both)
    assert session.status == 0, session.text
    chasquid.wait_for_letters("ana@here.example")
    chasquid.wait_for_letters("bob@here.example")


def test_pipelined_commands_with_one_recipient_refused(chasquid):
    to_both = ("--from", "carl@client.example", "--to", "nobody@here.example,bob@here.example")
    session = swaks(chasquid.smtp_port, "--pipeline", "--tls", *to_both)
    assert session.refusals[0].startswith("550 5.1.1")
    chasquid.wait_for_letters("bob@here.example")


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("way", ["submission", "submission over TLS", "smtp"])
def test_logging_in(chasquid, way, mechanism):
    port, tls = {
        "submission": (chasquid.submission_port, "--tls"),
        "submission over TLS": (chasquid.tls_port, "--tls-on-connect"),
        "smtp": (chasquid.smtp_port, "--tls"),
    }[way]
    session = swaks(port, tls, "--auth", mechanism, *LOGIN, *AS_ANA)
    assert session.status == 0, session.text
    assert any(reply.startswith("235 2.7.0") for reply in session.replies)
    [arrived] = chasquid.wait_for_letters("bob@here.example")
    assert "with ESMTPSA" in arrived["Received"]


def test_the_certificate_passes_verification(chasquid):
    session = swaks(
        chasquid.submission_port,
        *["--tls", "--tls-verify", "--tls-ca-path", str(chasquid.certificate)],
        *["--auth", "PLAIN", *LOGIN, *AS_ANA],
    )
    assert session.status == 0, session.text


def test_a_wrong_password_is_refused(chasquid):
    wrong = ("--auth-user", "ana@here.example", "--auth-password", "guessed")
    session = swaks(chasquid.submission_port, "--tls", "--auth", "PLAIN", *wrong, *AS_ANA)
    assert session.status != 0
    assert session.refusals[0].startswith("535 5.7.8")
    assert not chasquid.letters("bob@here.example")


def test_an_unknown_user_is_refused_like_a_wrong_password(chasquid):
    unknown = ("--auth-user", "nobody@here.example", "--auth-password", "guessed")
    session = swaks(chasquid.submission_port, "--tls", "--auth", "LOGIN", *unknown, *AS_ANA)
    assert session.refusals[0].startswith("535 5.7.8")


def test_submission_without_logging_in_is_refused(chasquid):
    session = swaks(chasquid.submission_port, "--tls", *AS_ANA)
    assert session.status != 0
    assert session.refusals[0].startswith("5")
    assert not chasquid.letters("bob@here.example")


def test_relaying_is_refused(chasquid):
    to_elsewhere = ("--from", "carl@client.example", "--to", "dora@dest.example")
    session = swaks(chasquid.smtp_port, *to_elsewhere)
    assert session.status != 0
    assert session.refusals[0].startswith("550 5.7.1")


def test_an_unknown_recipient_is_refused(chasquid):
    to_nobody = ("--from", "carl@client.example", "--to", "nobody@here.example")
    session = swaks(chasquid.smtp_port, *to_nobody)
    assert session.status != 0
    assert session.refusals[0].startswith("550 5.1.1")


def test_a_null_sender_is_accepted(chasquid):
    author = ("--h-From", "Postmaster <postmaster@client.example>")
    session = swaks(chasquid.smtp_port, "--from", "<>", "--to", "ana@here.example", *author)
    assert session.status == 0, session.text
    [arrived] = chasquid.wait_for_letters("ana@here.example")
    assert arrived["Return-Path"] == "<>"


def test_suffixes_and_dots_lead_to_the_user(chasquid):
    session = swaks(
        chasquid.smtp_port, "--from", "carl@client.example", "--to", "A.na+lists@Here.Example"
    )
    assert session.status == 0, session.text
    chasquid.wait_for_letters("ana@here.example")
