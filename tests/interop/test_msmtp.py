# SPDX-License-Identifier: Apache-2.0
"""msmtp submits as a user does, checking the certificate, in both ways there are."""

from __future__ import annotations

import pytest

from .clients import Msmtp
from .server import Chasquid
from .tools import letter


def msmtp(place, chasquid, tls, **changes):
    port = chasquid.submission_port if tls == "starttls" else chasquid.tls_port
    settings = {
        "port": port,
        "user": "ana@here.example",
        "password": "secret",
        "tls": tls,
        "trust": chasquid.certificate,
        **changes,
    }
    return Msmtp(place / "msmtp", **settings)


both_ways = pytest.mark.parametrize("tls", ["starttls", "on-connect"])


@both_ways
def test_a_letter_is_submitted(place, chasquid, tls):
    message = letter("from msmtp", "ana@here.example", "bob@here.example")
    msmtp(place, chasquid, tls).send(["bob@here.example", "ana@here.example"], message)
    for address in ("bob@here.example", "ana@here.example"):
        [arrived] = chasquid.wait_for_letters(address)
        assert arrived["Subject"] == "from msmtp"
        assert arrived["Return-Path"] == "<ana@here.example>"


@both_ways
def test_what_msmtp_says_of_the_server(place, chasquid, tls):
    info = msmtp(place, chasquid, tls).server_info()
    assert "TLS1.3" in info
    assert "PLAIN" in info and "LOGIN" in info
    assert "PIPELINING" in info


@both_ways
def test_a_wrong_password_is_refused(place, chasquid, tls):
    client = msmtp(place, chasquid, tls, password="guessed")
    message = letter("no", "ana@here.example", "bob@here.example")
    session = client.try_to_send(["bob@here.example"], message)
    assert session.status == 77  # EX_NOPERM
    assert "535 5.7.8" in session.text
    assert not chasquid.letters("bob@here.example")


@both_ways
def test_a_recipient_that_does_not_exist_is_refused(place, chasquid, tls):
    message = letter("no", "ana@here.example", "nobody@here.example")
    session = msmtp(place, chasquid, tls).try_to_send(["nobody@here.example"], message)
    assert session.status == 65  # EX_DATAERR
    assert "550 5.1.1" in session.text


def test_an_internationalized_user_logs_in(place, start, names):
    # msmtp does not know SMTPUTF8, so the envelope has to be ASCII
    users = {"ñandú@here.example": "contraseña", "bob@here.example": "hidden"}
    chasquid = start(Chasquid, names, users=users)
    login = {"user": "ñandú@here.example", "password": "contraseña"}
    message = letter("grüße", "ana@here.example", "bob@here.example")
    client = msmtp(place, chasquid, "starttls", sender="ana@here.example", **login)
    client.send(["bob@here.example"], message)
    [arrived] = chasquid.wait_for_letters("bob@here.example")
    assert arrived["Subject"] == "grüße"
    chasquid.wait_for_log("user=ñandú@here.example")
