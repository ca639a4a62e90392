# SPDX-License-Identifier: Apache-2.0
"""CaptureServer as those see it who send with other programs than Python."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import wait_for

import chasquid as server

from .clients import Msmtp, Transcript, swaks
from .peers import Postfix
from .tools import ANA, BOB, letter, program, run, unavailable

ENVELOPE = ("--from", ANA, "--to", BOB)
LOGIN = ("--auth-user", "user", "--auth-password", "password")

both_ways = pytest.mark.parametrize("tls", ["starttls", "implicit"])

Make = Callable[..., server.CaptureServer]


@pytest.fixture
def make() -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> server.CaptureServer:
            return stack.enter_context(server.CaptureServer(**settings))

        yield make


@pytest.fixture
def plain(make: Make) -> server.CaptureServer:
    return make()


def check_arrived(mail: server.CaptureServer, subject: str, tls: bool = True) -> None:
    """Whether one message from Ana to Bob has come, and over TLS with a login, or without."""
    [message] = mail.wait_for(1)
    assert message["Subject"] == subject
    assert (message.mail_from, message.rcpt_tos) == (ANA, [BOB])
    assert message.login == ("user" if tls else "")
    assert message.tls.startswith("TLSv1.3 ") == tls


# --- swaks ---


def test_swaks(plain):
    session = swaks(plain.port, *ENVELOPE, "--header", "Subject: plain")
    assert session.status == 0, session.text
    check_arrived(plain, "plain", tls=False)


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@both_ways
def test_swaks_logs_in_over_tls(make, tls, mechanism):
    mail = make(tls=tls, login_required=True)
    way = {"starttls": "--tls", "implicit": "--tls-on-connect"}[tls]
    trust = ("--tls-verify", "--tls-ca-path", mail.certificate)
    subject = ("--header", f"Subject: by {mechanism}")
    session = swaks(mail.port, way, *trust, "--auth", mechanism, *LOGIN, *ENVELOPE, *subject)
    assert session.status == 0, session.text
    check_arrived(mail, f"by {mechanism}")


def test_swaks_pipelines(plain):
    session = swaks(plain.port, "--pipeline", "--from", ANA, "--to", f"{BOB},eva@there.example")
    assert session.status == 0, session.text
    [message] = plain.wait_for(1)
    assert message.rcpt_tos == [BOB, "eva@there.example"]


def test_swaks_shows_a_421_and_that_the_connection_ends(plain):
    plain.fault("MAIL", reply="421 4.3.2 going down", times=1)
    session = swaks(plain.port, *ENVELOPE)
    assert session.status == 23  # of swaks: MAIL was refused
    assert session.refusals == ["421 4.3.2 going down"]
    assert swaks(plain.port, *ENVELOPE).status == 0


def test_swaks_sees_a_dropped_connection(plain):
    plain.fault("DATA", drop=True)
    session = swaks(plain.port, *ENVELOPE)
    assert session.status == 6, session.text  # of swaks: the connection was lost
    assert plain.messages == []


# --- msmtp ---


def msmtp(place: Any, mail: server.CaptureServer, name: str = "msmtp", **changes: Any) -> Msmtp:
    tls = {"starttls": "starttls", "implicit": "on-connect"}[mail.settings.tls]
    settings = {"user": "user", "password": "password", "sender": ANA, **changes}
    return Msmtp(place / name, port=mail.port, tls=tls, trust=mail.certificate, **settings)


@both_ways
def test_msmtp(place, make, tls):
    mail = make(tls=tls, login_required=True)
    msmtp(place, mail).send([BOB], letter("by msmtp", ANA, BOB))
    check_arrived(mail, "by msmtp")


def test_msmtp_says_by_its_status_that_it_may_try_again(place, make):
    mail = make(tls="starttls", login_required=True)
    mail.fault("RCPT", reply="451 4.2.1 busy", times=2)
    client, message = msmtp(place, mail), letter("third time", ANA, BOB)
    for _ in range(2):
        session = client.try_to_send([BOB], message)
        assert session.status == 69, session.text  # EX_UNAVAILABLE; 65 would be for good
        assert "451 4.2.1 busy" in session.text
    client.send([BOB], message)
    check_arrived(mail, "third time")


def test_msmtp_is_told_that_a_password_is_wrong(place, make):
    mail = make(tls="starttls")
    session = msmtp(place, mail, password="guessed").try_to_send([BOB], letter("no", ANA, BOB))
    assert session.status == 77, session.text  # EX_NOPERM
    assert mail.messages == []


@pytest.mark.parametrize("kind", ["expired", "wrong-name", "untrusted", "broken"])
@both_ways
def test_msmtp_refuses_a_certificate_that_is_no_good(place, make, tls, kind):
    mail = make(tls=tls)
    mail.fault({"starttls": "STARTTLS", "implicit": "connect"}[tls], certificate=kind, times=1)
    client, message = msmtp(place, mail), letter("with a good one", ANA, BOB)
    session = client.try_to_send([BOB], message)
    assert session.status != 0, session.text
    assert mail.messages == []
    client.send([BOB], message)
    check_arrived(mail, "with a good one")


# --- curl ---


def curl(mail: server.CaptureServer, *options: str, subject: str = "by curl") -> Transcript:
    scheme = "smtps" if mail.settings.tls == "implicit" else "smtp"
    command = [program("curl"), "-sS", "-v", "--max-time", "20", "--crlf", "--upload-file", "-"]
    command += ["--url", f"{scheme}://localhost:{mail.port}/client.example"]
    command += ["--mail-from", ANA, "--mail-rcpt", BOB, *options]
    program("curl")
    text = str(letter(subject, ANA, BOB)).replace("\r\n", "\n")
    done = run(*command, input=text, check=False)
    return Transcript(done.returncode, done.stdout + done.stderr)


def test_curl(plain):
    done = curl(plain)
    assert done.status == 0, done.text
    check_arrived(plain, "by curl", tls=False)


@both_ways
def test_curl_logs_in_over_tls(make, tls):
    mail = make(tls=tls, login_required=True)
    way = ("--ssl-reqd", "--cacert", mail.certificate, "--user", "user:password")
    done = curl(mail, *way)
    assert done.status == 0, done.text
    check_arrived(mail, "by curl")


def test_curl_will_not_go_on_where_starttls_is_gone(make):
    mail = make(tls="starttls")
    mail.fault("EHLO", without="STARTTLS", times=1)
    done = curl(mail, "--ssl-reqd", "--cacert", mail.certificate)
    assert done.status == 64, done.text  # of curl: TLS was required
    assert mail.messages == []


def test_curl_sees_that_the_connection_is_dropped_amid_the_message(plain):
    plain.fault("DATA", drop_after=100)
    done = curl(plain)
    assert done.status in (55, 56), done.text  # of curl: sending or receiving failed
    assert plain.messages == []


# --- Perl ---

_PERL = """\
use strict; use Net::SMTP;
my ($port, $ca) = @ARGV;
my $smtp = Net::SMTP->new('localhost', Port => $port, Hello => 'client.example', Timeout => 20)
    or die "connect: $@";
if ($ca) {
    $smtp->starttls(SSL_ca_file => $ca, SSL_verifycn_name => 'localhost') or die "tls: $@";
    $smtp->auth('user', 'password') or die 'auth: ' . $smtp->message;
}
$smtp->mail('ana@here.example') or die 'mail: ' . $smtp->message;
$smtp->to('bob@here.example') or die 'to: ' . $smtp->message;
$smtp->data("Subject: by Perl\\n", "\\n", ".a line with a dot\\n") or die 'data: ' . $smtp->message;
$smtp->quit;
"""


def net_smtp(mail: server.CaptureServer, *arguments: str) -> Transcript:
    needed = ["-MNet::SMTP", "-MIO::Socket::SSL", "-MAuthen::SASL"]
    if run(program("perl"), *needed, "-e", "1", check=False).returncode:
        unavailable("Perl has no Net::SMTP with IO::Socket::SSL and Authen::SASL")
    done = run("perl", "-", str(mail.port), *arguments, input=_PERL, check=False)
    return Transcript(done.returncode, done.stdout + done.stderr)


def test_net_smtp(plain):
    done = net_smtp(plain)
    assert done.status == 0, done.text
    check_arrived(plain, "by Perl", tls=False)
    assert plain.messages[0].raw.endswith(b"\r\n\r\n.a line with a dot\r\n")


def test_net_smtp_logs_in_over_tls(make):
    mail = make(tls="starttls", login_required=True)
    done = net_smtp(mail, mail.certificate)
    assert done.status == 0, done.text
    check_arrived(mail, "by Perl")


def test_net_smtp_is_told_that_the_message_is_refused(plain):
    plain.fault("message", reply="554 5.7.1 no, thanks")
    done = net_smtp(plain)
    assert done.status != 0
    assert "data: 5.7.1 no, thanks" in done.text


# --- Postfix ---


def test_postfix_relays_and_tries_again(start, plain):
    plain.fault("RCPT", reply="451 4.2.1 busy", times=2)
    # Postfix asks again at once where it is told to, instead of after minutes
    fast = {"minimal_backoff_time": "1s", "maximal_backoff_time": "1s", "queue_run_delay": "1s"}
    postfix = start(Postfix, relay_port=plain.port, settings=fast)
    postfix.send(ANA, [BOB], letter("by Postfix", ANA, BOB))
    check_arrived_from_postfix(plain.wait_for(1, timeout=60))
    refusals = re.findall(r"status=deferred .*451 4\.2\.1 busy", postfix.log())
    assert len(refusals) == 2, postfix.log()
    wait_for(lambda: "is empty" in postfix.queue(), "an empty queue")


def test_postfix_trusts_the_certificate(start, make):
    mail = make(tls="starttls", tls_required=True)
    verify = {
        "smtp_tls_security_level": "verify",
        "smtp_tls_verify_cert_match": "localhost",
        "smtp_tls_CAfile": mail.certificate,
    }
    postfix = start(Postfix, relay_port=mail.port, settings=verify)
    postfix.send(ANA, [BOB], letter("by Postfix", ANA, BOB))
    [message] = check_arrived_from_postfix(mail.wait_for(1, timeout=60))
    assert message.tls.startswith("TLSv1.3 ")
    assert "Verified TLS connection established" in postfix.log()


def test_postfix_returns_what_is_refused_for_good(start, plain):
    plain.fault("RCPT", address=BOB, reply="550 5.1.1 nobody here")
    postfix = start(Postfix, relay_port=plain.port)
    postfix.send(ANA, [BOB], letter("to nobody", ANA, BOB))
    [notification] = plain.wait_for(1, timeout=60)
    assert (notification.mail_from, notification.rcpt_tos) == ("", [ANA])
    assert "550 5.1.1 nobody here" in " ".join(notification.text.split())


def check_arrived_from_postfix(messages: list[Any]) -> list[Any]:
    [message] = messages
    assert message["Subject"] == "by Postfix"
    assert (message.mail_from, message.rcpt_tos) == (ANA, [BOB])
    assert message.hello == Postfix.hostname
    return messages
