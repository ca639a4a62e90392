# SPDX-License-Identifier: Apache-2.0
"""Room COURIERS: which mail goes to the smarthost, with TLS and a login or not at all."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import (
    HOST,
    MESSAGE,
    Peer,
    Serve,
    Server,
    Zone,
    address,
    delivery,
    plain_secret,
    run,
    trust,
    wait_for,
)
from test_notifications import ANA, BEN, EVA, REFUSED, outcomes, reports, send

import chasquid
from chasquid import Delivery, Destination, DsnParameters, Result, State

SMART = "smart.example"
ZONE = {
    (SMART, "A"): ["127.0.0.1"],
    ("there.example", "MX"): ["10 mx.there.example"],
    ("mx.there.example", "A"): ["127.0.0.1"],
}
LOGIN = ("ana@isp.example", "correct horse")
SECRET = plain_secret(*LOGIN)
HELLO = f"""
    S: 220 {SMART} ESMTP
    C: EHLO {HOST}
    S: 250-{SMART}
"""
STARTTLS = f"""{HELLO}
    S: 250 STARTTLS
    C: STARTTLS
    S: 220 go on
    * TLS
    C: EHLO {HOST}
"""
EXTENSIONS = """
    S: 250-smart.example
    S: 250-8BITMIME
    S: 250-SMTPUTF8
    S: 250-DSN
    S: 250 AUTH PLAIN LOGIN
"""
WELCOME = f"""
    C: AUTH PLAIN {SECRET}
    S: 235 2.7.0 welcome
"""
TRANSFER = """
    C: MAIL FROM:<eva@there.example>
    S: 250 fine
    C: RCPT TO:<eva@there.example>
    S: 250 fine
"""
CONTENT = """
    C: DATA
    S: 354 go on
    C.
    S: 250 2.0.0 queued as 42
    C: QUIT
    S: 221 bye
"""
WHOLE = STARTTLS + EXTENSIONS + WELCOME + TRANSFER + CONTENT


@pytest.fixture(autouse=True)
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the certificate of the smarthost be a valid one."""
    trust(monkeypatch, tmp_path, SMART)


def attempt(
    *scripts: str,
    destinations: Sequence[Destination] = (address(EVA),),
    load: Delivery | None = None,
    login: tuple[str, str] | None = LOGIN,
    names: Sequence[str] = (SMART,),
) -> tuple[list[Result], Peer]:
    """Let the courier attempt a delivery to a smarthost that follows a script."""
    with Peer(*scripts, names=names) as peer:

        async def main(loop: chasquid.Loop) -> list[Result]:
            asked = chasquid.Names(loop, Zone(ZONE).ask)
            place = f"{SMART}:{peer.port}"
            courier = chasquid.SmarthostCourier(loop, asked, HOST, place, login)
            return await courier.deliver(load or delivery(), destinations)

        return run(main), peer


# --- a delivery ---


def test_a_message_goes_with_tls_and_a_login() -> None:
    (result,), peer = attempt(WHOLE)
    assert (result.state, result.status) == (State.SENT, "2.0.0")
    assert "queued as 42" in result.text
    assert SMART in result.remote_mta
    assert peer.messages == [MESSAGE + b".\r\n"]


def test_without_a_user_nobody_logs_in() -> None:
    (result,), _ = attempt(STARTTLS + EXTENSIONS + TRANSFER + CONTENT, login=None)
    assert result.state == State.SENT


def test_user_and_password_may_be_any_text() -> None:
    secret = plain_secret("mañana", 'пароль =:"')
    script = WHOLE.replace(SECRET, secret)
    (result,), _ = attempt(script, login=("mañana", 'пароль =:"'))
    assert result.state == State.SENT


def test_all_recipients_go_in_one_transaction_whatever_their_domain() -> None:
    script = STARTTLS + EXTENSIONS + WELCOME + TRANSFER + """
        C: RCPT TO:<max@else.example>
        S: 250 fine
        C: RCPT TO:<ida@xn--bcher-kva.example>
        S: 250 fine
    """ + CONTENT  # fmt: skip
    destinations = [address(EVA), address("max@else.example"), address("ida@bücher.example")]
    results, _ = attempt(script, destinations=destinations)
    assert [result.state for result in results] == [State.SENT] * 3


def test_more_recipients_than_a_transaction_may_have_go_in_several() -> None:
    def transfer(count: int) -> str:
        recipients = "C: RCPT TO:<…@there.example>\nS: 250 fine\n" * count
        return f"C: MAIL FROM:<…\nS: 250 fine\n{recipients}C: DATA\nS: 354 go\nC.\nS: 250 fine\n"

    script = STARTTLS + EXTENSIONS + WELCOME + transfer(100) + transfer(20) + "C: QUIT\nS: 221 bye"
    destinations = [address(f"n{number}@there.example") for number in range(120)]
    results, peer = attempt(script, destinations=destinations)
    assert [result.state for result in results] == [State.SENT] * 120
    assert len(peer.messages) == 2


def test_what_was_sent_stays_sent_where_a_later_transaction_breaks() -> None:
    recipients = "C: RCPT TO:<…@there.example>\nS: 250 fine\n" * 100
    first = f"C: MAIL FROM:<…\nS: 250 fine\n{recipients}C: DATA\nS: 354 go\nC.\nS: 250 fine\n"
    script = STARTTLS + EXTENSIONS + WELCOME + first + "C: MAIL FROM:<…\n* close"
    destinations = [address(f"n{number}@there.example") for number in range(101)]
    results, _ = attempt(script, destinations=destinations)
    assert [result.state for result in results] == [State.SENT] * 100 + [State.DEFERRED]


def test_what_the_message_needs_is_said() -> None:
    script = STARTTLS + EXTENSIONS + WELCOME + """
        C: MAIL FROM:<ana@here.example> BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=QQ
        S: 250 fine
        C: RCPT TO:<ñandú@there.example> NOTIFY=SUCCESS ORCPT=rfc822;old
        S: 250 fine
    """ + CONTENT  # fmt: skip
    destination = address("ñandú@there.example")
    load = delivery(
        "Subject: grüße\r\n\r\nx\r\n".encode(), ANA, smtputf8=True, ret="HDRS", envid="QQ",
        dsn_parameters={destination: DsnParameters(("SUCCESS",), "rfc822;old")},
    )  # fmt: skip
    (result,), _ = attempt(script, destinations=[destination], load=load)
    assert (result.state, result.passed_on) == (State.SENT, True)


def test_what_the_smarthost_lacks_fails() -> None:
    script = STARTTLS + "S: 250-smart.example\nS: 250 AUTH PLAIN\n" + WELCOME
    script += "C: QUIT\nS: 221 bye"
    load = delivery("Subject: grüße\r\n\r\nx\r\n".encode(), smtputf8=True)
    (result,), _ = attempt(script, load=load)
    assert (result.state, result.status) == (State.FAILED, "5.6.7")
    assert "does not have SMTPUTF8" in result.text


def test_smtputf8_is_not_asked_for_where_the_message_does_not_need_it() -> None:
    (result,), _ = attempt(WHOLE, load=delivery(smtputf8=True))
    assert result.state == State.SENT


# --- TLS or nothing ---


def refused(*scripts: str, **options: object) -> str:
    """Return why nothing was sent; it must be tried again later."""
    results, peer = attempt(*scripts, **options)  # type: ignore[arg-type]
    (result,) = results
    assert result.state == State.DEFERRED, result
    assert result.status.startswith("4."), result
    assert peer.messages == []
    assert LOGIN[1] not in result.text and SECRET not in result.text
    return result.text


def test_without_starttls_nothing_is_sent() -> None:
    text = refused(f"{HELLO}\nS: 250 AUTH PLAIN\n* closed")
    assert "does not offer STARTTLS" in text
    assert SMART in text


def test_where_starttls_is_refused_nothing_is_sent() -> None:
    assert "454" in refused(f"{HELLO}\nS: 250 STARTTLS\nC: STARTTLS\nS: 454 not now\n* closed")


@pytest.mark.parametrize("names", [("other.example",), ("127.0.0.1",), ("*.smart.example",)])
def test_with_a_certificate_for_somebody_else_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    trust(monkeypatch, tmp_path, *names)
    script = f"{HELLO}\nS: 250 STARTTLS\nC: STARTTLS\nS: 220 go on\n* TLS\n* close"
    assert "certificate" in refused(script, names=names)


def test_with_a_certificate_that_nobody_vouches_for_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(monkeypatch, tmp_path, "other.example")
    script = f"{HELLO}\nS: 250 STARTTLS\nC: STARTTLS\nS: 220 go on\n* TLS\n* close"
    assert "certificate is not valid" in refused(script)


def test_what_is_said_in_the_clear_behind_starttls_is_not_believed() -> None:
    script = f"""{HELLO}
        S: 250 STARTTLS
        C: STARTTLS
        S= 220 go on\\r\\n250-evil\\r\\n250 AUTH PLAIN\\r\\n
        * TLS
        * close
    """
    assert refused(script)


def test_where_the_connection_breaks_nothing_is_lost() -> None:
    assert refused(f"{HELLO}\n* close")
    assert refused(STARTTLS + "* close")
    assert refused(STARTTLS + EXTENSIONS + f"C: AUTH PLAIN {SECRET}\n* close")


def without_a_server(place: str) -> Result:
    """Return what comes of a smarthost that no name server knows."""

    async def main(loop: chasquid.Loop) -> list[Result]:
        names = chasquid.Names(loop, Zone({}).ask)
        courier = chasquid.SmarthostCourier(loop, names, HOST, place, LOGIN)
        return await courier.deliver(delivery(), [address(EVA)])

    (result,) = run(main)
    return result


def test_a_smarthost_without_an_address_is_said_to_have_none() -> None:
    result = without_a_server(f"{SMART}:587")
    assert result.state == State.DEFERRED
    assert SMART in result.text and "587" in result.text and "no address" in result.text


@pytest.mark.parametrize("name", ["bü\u2028cher.example", "é" * 64], ids=["separator", "long"])
def test_a_smarthost_whose_name_is_none_makes_no_mail_fail(name: str) -> None:
    assert without_a_server(f"{name}:587").state == State.DEFERRED


def test_on_port_465_tls_comes_first() -> None:
    script = f"""
        * TLS
        S: 220 {SMART} ESMTP
        C: EHLO {HOST}
    """ + EXTENSIONS + WELCOME + TRANSFER + CONTENT  # fmt: skip
    ports: list[int] = []
    with Peer(script, names=(SMART,)) as peer:

        async def redirected(loop: chasquid.Loop, host: str, port: int) -> chasquid.Stream:
            ports.append(port)
            return await chasquid.connect(loop, host, peer.port)  # only root may listen on 465

        async def main(loop: chasquid.Loop) -> list[Result]:
            names = chasquid.Names(loop, Zone(ZONE).ask)
            courier = chasquid.SmarthostCourier(
                loop, names, HOST, f"{SMART}:465", LOGIN, connect=redirected
            )
            return await courier.deliver(delivery(), [address(EVA)])

        (result,) = run(main)
    assert result.state == State.SENT
    assert ports == [465]


def in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("offered", "first"), [("LOGIN XOAUTH2", "VXNlcm5hbWU6"), ("XOAUTH2 LOGIN", "who are you?")]
)
def test_where_plain_is_not_offered_login_is_used_whatever_it_asks(
    offered: str, first: str
) -> None:
    extensions = EXTENSIONS.replace("AUTH PLAIN LOGIN", f"AUTH {offered}")
    login = f"""
        C: AUTH LOGIN
        S: 334 {first}
        C: {in_base64(LOGIN[0])}
        S: 334
        C: {in_base64(LOGIN[1])}
        S: 235 2.7.0 welcome
    """
    (result,), _ = attempt(STARTTLS + extensions + login + TRANSFER + CONTENT)
    assert result.state == State.SENT


@pytest.mark.parametrize("form", ["AUTH LOGIN PLAIN", "auth plain", "AUTH=PLAIN"])
def test_plain_comes_before_login_and_old_forms_are_understood(form: str) -> None:
    script = WHOLE.replace("AUTH PLAIN LOGIN", form)
    (result,), _ = attempt(script)
    assert result.state == State.SENT


# --- what it refuses ---


@pytest.mark.parametrize("reply", ["535 5.7.8 wrong password", "454 4.7.0 not now", "504 5.5.4 no"])
def test_a_login_that_is_refused_is_tried_again_later(reply: str) -> None:
    text = refused(STARTTLS + EXTENSIONS + f"C: AUTH PLAIN {SECRET}\nS: {reply}\n* closed")
    assert f"answers AUTH with {reply}" in text


@pytest.mark.parametrize(
    ("line", "said"),
    [("AUTH XOAUTH2 GSSAPI", "offers only XOAUTH2 GSSAPI; "), ("HELP", "offers no login (AUTH)")],
)
def test_a_smarthost_without_a_mechanism_of_ours_is_told_of(line: str, said: str) -> None:
    text = refused(STARTTLS + EXTENSIONS.replace("AUTH PLAIN LOGIN", line) + "* closed")
    assert f"{said}" in text and "expected PLAIN or LOGIN" in text


def test_why_nothing_was_sent_is_said_once() -> None:
    text = refused(STARTTLS + EXTENSIONS + f"C: AUTH PLAIN {SECRET}\nS: 535 5.7.8 no\n* closed")
    assert text.count(SMART) == 1


def test_where_a_login_is_needed_and_there_is_none_it_is_tried_again_later() -> None:
    text = refused(
        STARTTLS + EXTENSIONS + "C: MAIL FROM:<…\nS: 530 5.7.0 log in first\nC: QUIT\nS: 221 bye",
        login=None,
    )
    assert "530 5.7.0 log in first" in text


@pytest.mark.parametrize("greeting", ["554 no service", "421 too busy"])
def test_a_smarthost_that_greets_with_a_refusal_is_tried_again_later(greeting: str) -> None:
    assert greeting.partition(" ")[2] in refused(f"S: {greeting}\n* closed")


def test_recipients_that_are_refused_fail_and_the_others_are_served() -> None:
    script = STARTTLS + EXTENSIONS + WELCOME + """
        C: MAIL FROM:<eva@there.example>
        S: 250 fine
        C: RCPT TO:<eva@there.example>
        S: 550 5.1.1 who is that?
        C: RCPT TO:<eve@there.example>
        S: 450 4.2.1 later
        C: RCPT TO:<max@there.example>
        S: 250 fine
    """ + CONTENT  # fmt: skip
    destinations = [address(f"{name}@there.example") for name in ("eva", "eve", "max")]
    results, _ = attempt(script, destinations=destinations)
    assert [(result.state, result.status) for result in results] == [
        (State.FAILED, "5.1.1"), (State.DEFERRED, "4.2.1"), (State.SENT, "2.0.0")
    ]  # fmt: skip
    assert "who is that?" in results[0].text


def test_552_is_temporary_once_a_recipient_was_accepted() -> None:
    """RFC 5321, 4.5.3.1.10"""
    script = STARTTLS + EXTENSIONS + WELCOME + """
        C: MAIL FROM:<eva@there.example>
        S: 250 fine
        C: RCPT TO:<eva@there.example>
        S: 552 5.2.2 the mailbox is full
        C: RCPT TO:<eve@there.example>
        S: 250 fine
        C: RCPT TO:<max@there.example>
        S: 552 too many recipients
    """ + CONTENT  # fmt: skip
    destinations = [address(f"{name}@there.example") for name in ("eva", "eve", "max")]
    results, _ = attempt(script, destinations=destinations)
    assert [(result.state, result.status) for result in results] == [
        (State.FAILED, "5.2.2"), (State.SENT, "2.0.0"), (State.DEFERRED, "4.5.3")
    ]  # fmt: skip


def test_a_message_that_is_refused_fails() -> None:
    content = CONTENT.replace("250 2.0.0 queued as 42", "554 5.7.1 this is spam")
    (result,), _ = attempt(STARTTLS + EXTENSIONS + WELCOME + TRANSFER + content)
    assert (result.state, result.status) == (State.FAILED, "5.7.1")


def test_the_server_that_answered_is_named_in_reports_by_its_name() -> None:
    (result,), _ = attempt(WHOLE)
    assert result.remote_mta.partition(" ")[0] == SMART


# --- which mail goes there ---


class Direct:
    """The way that is no smarthost; it never gets anything done."""

    def __init__(self, result: Result) -> None:
        self.result = result

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        return [self.result] * len(destinations)


def route(destination: Destination, after: int, attempts: int, place: str = f"{SMART}:587") -> str:
    """Return the name of the way that `destination` takes."""
    nobody = Direct(REFUSED)
    smarthost = chasquid.Smarthost(nobody, place, after)
    couriers = chasquid.Couriers(
        nobody, nobody, nobody, lambda domain: domain == "here.example", smarthost
    )
    return couriers.route(destination, attempts).key[0]


@pytest.mark.parametrize(
    ("after", "ways"),
    [(0, ["smarthost"] * 4), (1, ["mx"] + ["smarthost"] * 3), (3, ["mx"] * 3 + ["smarthost"])],
)
def test_mail_for_elsewhere_goes_there_after_so_many_attempts(after: int, ways: list[str]) -> None:
    assert [route(address(EVA), after, attempts) for attempts in range(4)] == ways


@pytest.mark.parametrize("attempts", [0, 5])
def test_mail_for_here_never_goes_there(attempts: int) -> None:
    assert route(address(BEN), 0, attempts) == "local"
    assert route(Destination("pipe", "cat"), 0, attempts) == "pipe"


def test_mail_for_somebody_via_the_smarthost_goes_there_at_once() -> None:
    assert route(address(EVA, f"{SMART}:587"), 99, 0) == "smarthost"
    assert route(address(BEN, f"{SMART}:587"), 99, 0) == "smarthost"


@pytest.mark.parametrize("via", [(SMART,), (f"{SMART}:25",), (f"{SMART}:587", "mx.else.example")])
def test_mail_for_somebody_via_other_servers_goes_to_those(via: tuple[str, ...]) -> None:
    assert route(address(EVA, *via), 0, 9) == "via"


def smart_server(serve: Serve, peer: Peer, tmp_path: Path, **settings: object) -> Server:
    """Start a server with this smarthost."""
    secret = tmp_path / "smarthost-password"
    secret.write_text(f"{LOGIN[1]}\n")
    return serve(
        ask=Zone(ZONE).ask,
        smarthost=f"{SMART}:{peer.port}",
        smarthost_user=LOGIN[0],
        smarthost_password_file=secret,
        **settings,
    )


SUBMITTED = WHOLE.replace("FROM:<eva@there.example>", "FROM:<ana@here.example>…")


def test_a_server_hands_all_that_is_for_elsewhere_to_its_smarthost(
    serve: Serve, tmp_path: Path
) -> None:
    script = SUBMITTED.replace("C: DATA", "C: RCPT TO:<max@else.example>\nS: 250 fine\nC: DATA")
    with Peer(script, names=(SMART,)) as peer:
        server = smart_server(serve, peer, tmp_path)
        send(server, ANA, EVA, BEN, "max@else.example")
        assert len(server.mail("ben")) == 1
    (content,) = peer.messages
    assert b"Subject: hello" in content
    assert server.mail_log.count("event=delivered ") == 3
    assert server.daemon.log.counters["deliveries", "smarthost", "sent"] == 2
    assert LOGIN[1] not in server.mail_log + server.log


def test_a_server_tries_by_itself_first_where_that_is_asked_for(
    serve: Serve, tmp_path: Path
) -> None:
    busy = "S: 421 4.3.2 too busy\n* close"
    with Peer(busy, busy) as direct, Peer(SUBMITTED, names=(SMART,)) as smart:
        server = smart_server(
            serve, smart, tmp_path, smarthost_after=2, outgoing_smtp_port=direct.port
        )
        send(server, ANA, EVA)
        for count in (1, 2):
            server.wait_for_attempts(count)
            server.settle()
            assert smart.messages == []
            chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all")
        wait_for(lambda: not server.queued(), "the smarthost to be asked")
    assert len(smart.messages) == 1
    assert re.search(r"event=delivered .*status=2\.0\.0 .*smart\.example", server.mail_log)


def test_a_server_hands_single_recipients_to_the_smarthost_by_an_alias(
    serve: Serve, tmp_path: Path
) -> None:
    with Peer(SUBMITTED, names=(SMART,)) as smart:
        server = smart_server(serve, smart, tmp_path, smarthost_after=50, outgoing_smtp_port=1)
        alias = f"eva: {EVA} via {SMART}:{smart.port}\n"
        server.write("domains/here.example/aliases", alias.encode())
        server.daemon.reload()
        wait_for(lambda: "event=reloaded" in server.log, "the aliases to be read")
        send(server, ANA, "eva@here.example")
        wait_for(lambda: not server.queued(), "the smarthost to be asked")
    assert len(smart.messages) == 1


def test_the_sender_hears_that_the_smarthost_refused_a_recipient(
    serve: Serve, tmp_path: Path
) -> None:
    script = STARTTLS + EXTENSIONS + WELCOME + """
        C: MAIL FROM:<ana@here.example>…
        S: 250 fine
        C: RCPT TO:<eva@there.example>
        S: 550 5.1.1 who is that?
        C: QUIT
        S: 221 bye
    """  # fmt: skip
    with Peer(script, names=(SMART,)) as smart:
        server = smart_server(serve, smart, tmp_path)
        send(server, ANA, EVA)
        (report,) = reports(server.mail("ana"))
    assert outcomes([report]) == [(EVA, "failed")]
    assert "who is that?" in report.text
    (fields,) = report.recipients
    assert fields["Diagnostic-Code"] == "smtp; 550 5.1.1 who is that?"


# --- its configuration ---


@pytest.mark.parametrize(
    "settings",
    [{"smarthost_user": "ana"}, {"smarthost_password_file": "{here}/password"}],
)
def test_a_user_needs_a_password_and_a_password_a_user(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    (tmp_path / "password").write_text("x\n")
    filled = {key: value.format(here=tmp_path) for key, value in settings.items()}
    with pytest.raises(chasquid.ConfigError, match="together, or neither"):
        Server(tmp_path / "server", smarthost="smart.example:587", **filled).make()


def test_a_password_file_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    server = Server(
        tmp_path, smarthost="smart.example:587", smarthost_user="ana",
        smarthost_password_file=tmp_path / "nowhere",
    )  # fmt: skip
    with pytest.raises(chasquid.ConfigError, match="nowhere: it cannot be read"):
        server.make()


@pytest.mark.parametrize(
    "text", ["smart.example", ":587", "smart.example:x", "smart.example:70000"]
)
def test_a_smarthost_is_a_host_and_a_port(tmp_path: Path, text: str) -> None:
    with pytest.raises(chasquid.ConfigError, match='chasquid.conf:.*expected "host:port"'):
        Server(tmp_path, smarthost=text).make()
