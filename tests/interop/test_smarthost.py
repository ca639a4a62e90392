# SPDX-License-Identifier: Apache-2.0
"""A Postfix with SASL is the smarthost."""

from __future__ import annotations

import pytest
from support import wait_for

from .peers import SaslAuth, Smarthost
from .server import USERS, Chasquid
from .tools import letter, subjects

USER, PASSWORD = "ana@isp.example", "correct horse =)"


@pytest.fixture
def smarthost(start, names, monkeypatch):
    """A smarthost whose certificate is valid."""
    auth = start(SaslAuth, users={USER: PASSWORD})
    made = start(Smarthost, auth)
    names.records["mx.dest.example"] = {"A": ["127.0.0.1"]}
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    return made


def customer(start, names, place, port, password=PASSWORD, **settings):
    """Start a chasquid that sends all by way of this smarthost."""
    (place / "smarthost-password").write_text(f"{password}\n")
    return start(
        Chasquid,
        names,
        users=USERS,
        smarthost=f"mx.dest.example:{port}",
        smarthost_user=USER,
        smarthost_password_file=str(place / "smarthost-password"),
        **settings,
    )


def mail_log(chasquid):
    return (chasquid.directory / "mail.log").read_text()


def test_mail_goes_there_with_starttls_and_a_login(start, names, place, smarthost):
    chasquid = customer(start, names, place, smarthost.port)
    recipients = ["dora@dest.example", "diego@dest.example", "bob@here.example"]
    chasquid.submit("ana@here.example", recipients, letter("by post", "ana", *recipients))
    [arrived] = smarthost.wait_for_letters("dora@dest.example")
    assert arrived["Subject"] == "by post"
    by_postfix = arrived.get_all("Received")[0]
    assert "using TLSv1.3" in by_postfix
    assert f"(Authenticated sender: {USER})" in by_postfix
    smarthost.wait_for_letters("diego@dest.example")
    assert subjects(chasquid.wait_for_letters("bob@here.example")) == ["by post"]
    assert smarthost.letters("bob@here.example") == [], "what is for here stays here"
    smarthost.wait_for_log("sasl_method=PLAIN")
    wait_for(lambda: not chasquid.queue_ids(), "an empty queue")


def test_mail_goes_to_port_465_with_tls_from_the_start(start, names, place, smarthost):
    names.records["mx.dest.example"] = {"A": [smarthost.tls_address]}
    chasquid = customer(start, names, place, 465)
    message = letter("wrapped", "ana@here.example", "dora@dest.example")
    chasquid.submit("ana@here.example", ["dora@dest.example"], message)
    [arrived] = smarthost.wait_for_letters("dora@dest.example")
    assert f"(Authenticated sender: {USER})" in arrived.get_all("Received")[0]


def test_internationalized_mail_goes_there(start, names, place, smarthost):
    chasquid = customer(start, names, place, smarthost.port)
    message = letter("grüße", "ana@here.example", "dora@dest.example")
    chasquid.submit("ana@here.example", ["dora@dest.example"], message)
    [arrived] = smarthost.wait_for_letters("dora@dest.example")
    assert arrived["Subject"] == "grüße"


def test_with_a_wrong_password_mail_waits_until_it_is_right(start, names, place, smarthost):
    chasquid = customer(start, names, place, smarthost.port, password="wrong")
    message = letter("patience", "ana@here.example", "dora@dest.example")
    chasquid.submit("ana@here.example", ["dora@dest.example"], message)
    wait_for(lambda: "answers AUTH with 535 5.7.8" in mail_log(chasquid), "the refusal")
    wait_for(lambda: len(chasquid.queue_ids()) == 1, "the queue")
    assert "wrong" not in mail_log(chasquid)
    assert smarthost.letters("dora@dest.example") == []
    (place / "smarthost-password").write_text(f"{PASSWORD}\n")
    chasquid.restart()
    chasquid.command("queue", "retry", "all")
    assert subjects(smarthost.wait_for_letters("dora@dest.example")) == ["patience"]


def test_without_a_valid_certificate_nothing_is_sent(start, names, place, smarthost, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    chasquid = customer(start, names, place, smarthost.port)
    message = letter("not so", "ana@here.example", "dora@dest.example")
    chasquid.submit("ana@here.example", ["dora@dest.example"], message)
    wait_for(lambda: "the certificate is not valid" in mail_log(chasquid), "the attempt")
    assert len(chasquid.queue_ids()) == 1
    assert "sasl_username" not in smarthost.log()


def test_without_starttls_nothing_is_sent(start, names, place, smarthost):
    smarthost.change(smtpd_tls_security_level="none", smtpd_tls_auth_only="no")
    chasquid = customer(start, names, place, smarthost.port)
    message = letter("in the clear", "ana@here.example", "dora@dest.example")
    chasquid.submit("ana@here.example", ["dora@dest.example"], message)
    wait_for(lambda: "does not offer STARTTLS" in mail_log(chasquid), "the attempt")
    assert smarthost.letters("dora@dest.example") == []


def test_who_is_unknown_there_is_reported_and_the_others_are_served(start, names, place, smarthost):
    chasquid = customer(start, names, place, smarthost.port)
    recipients = ["nobody@dest.example", "dora@dest.example"]
    chasquid.submit("ana@here.example", recipients, letter("half", "ana", *recipients))
    smarthost.wait_for_letters("dora@dest.example")
    [report] = chasquid.wait_for_letters("ana@here.example")
    assert report.get_content_type() == "multipart/report"
    assert "550 5.1.1" in report.as_string() and "nobody@dest.example" in report.as_string()


def test_only_what_cannot_be_sent_directly_goes_there(start, names, place, smarthost):
    names.records["dest.example"] = {"MX": ["10 mx.dest.example."]}
    chasquid = customer(start, names, place, smarthost.port, smarthost_after=1)
    message = letter("second way", "ana@here.example", "dora@dest.example")
    chasquid.submit("ana@here.example", ["dora@dest.example"], message)
    wait_for(
        lambda: "event=deferred " in mail_log(chasquid), "the first attempt"
    )  # nothing at port 25
    wait_for(lambda: len(chasquid.queue_ids()) == 1, "the queue")
    assert smarthost.letters("dora@dest.example") == []
    chasquid.command("queue", "retry", "all")
    [arrived] = smarthost.wait_for_letters("dora@dest.example")
    assert f"(Authenticated sender: {USER})" in arrived.get_all("Received")[0]


def test_one_recipient_goes_there_by_an_alias(start, names, place, smarthost):
    via = f"mx.dest.example:{smarthost.port}"
    chasquid = customer(start, names, place, smarthost.port, smarthost_after=99)
    (chasquid.config_dir / "domains/here.example/aliases").write_text(
        f"far: dora@dest.example via {via}\n"
    )
    chasquid.hang_up()
    resolve = ("aliases-resolve", "far@here.example")
    wait_for(lambda: via in chasquid.command(*resolve, check=False).stdout, "the alias")
    message = letter("by alias", "ana@here.example", "far@here.example")
    chasquid.submit("ana@here.example", ["far@here.example"], message)
    [arrived] = smarthost.wait_for_letters("dora@dest.example")
    assert f"(Authenticated sender: {USER})" in arrived.get_all("Received")[0]
