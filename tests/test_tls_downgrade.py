# SPDX-License-Identifier: Apache-2.0
"""Rooms TLS POLICY, COURIERS, SMTP CLIENT, SESSION: somebody takes TLS away on the way.

What must hold from end to end if STARTTLS is hidden or another certificate is shown, and for
messages that demand TLS or do without it (RFC 8689).
"""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import (
    CONTENT,
    DOWN,
    ENVELOPE,
    GREETING,
    HOST,
    LETTER,
    MX,
    SECURE,
    STARTTLS,
    FakeCourier,
    Issued,
    Peer,
    RunningClock,
    Serve,
    Server,
    Zone,
    address,
    delivery,
    greeted,
    greeted_with_tls,
    issue,
    logged_in,
    needs_openssl,
    no_policy,
    play,
    record,
    run,
    send,
    tls_policies,
    trust,
    wait_for,
)
from test_tls_policy import (
    OTHER_DER,
    POLICY,
    SELECTIONS,
    WRONG,
    domain_file,
    domain_text,
    kept,
    remember,
    tlsa,
)

import chasquid
from chasquid import (
    PLAIN,
    TLS_CLIENT,
    TLS_INSECURE,
    TLS_SECURE,
    DomainInfo,
    State,
    StsPolicy,
)

Records = Mapping[tuple[str, str], Any]
pytestmark = pytest.mark.usefixtures("untrusting")

# --- mail that comes in ---

OPEN = ["v=spf1 ip4:127.0.0.1 -all"]


def sends(server: Server, sender: str, tls: bool) -> str:
    """Return the reply to a message, or to MAIL if that is refused."""
    with greeted_with_tls(server) if tls else greeted(server) as wire:
        reply = wire.ask(f"MAIL FROM:<{sender}>")
        if reply.startswith("250 "):
            assert wire.ask("RSET").startswith("250 ")
            reply = send(wire, LETTER, sender=sender)
        assert wire.ask("NOOP").startswith("250 ")
        return reply


def ask(records: Records) -> Callable[[str, str], Any]:
    return Zone(records).ask


def test_who_has_sent_with_tls_sends_with_it_from_then_on(tmp_path: Path) -> None:
    server = Server(tmp_path, ask=ask({("there.example", "TXT"): OPEN}))
    with server:
        assert sends(server, "eva@there.example", tls=False).startswith("250 ")
        assert not domain_file(server.data_dir).exists()
        assert sends(server, "eva@there.example", tls=True).startswith("250 ")
        assert domain_file(server.data_dir).read_text() == domain_text(TLS_CLIENT, PLAIN)
        refusal = sends(server, "eva@there.example", tls=False)
        assert refusal.startswith("550 5.7.3 ")
        assert "there.example" in refusal and "STARTTLS" in refusal
        assert sends(server, "eva@there.example", tls=True).startswith("250 ")
        assert server.daemon.log.counters["security_levels", "refused", "in"] == 1
        assert len(server.mail("ana")) == 3
    with server:
        assert sends(server, "eva@there.example", tls=False).startswith("550 5.7.3 ")
        assert sends(server, "eva@there.example", tls=True).startswith("250 ")


@pytest.mark.parametrize("record", ["v=spf1 ~all", "v=spf1 ?all", "v=spf1 nonsense", None, DOWN])
def test_without_an_spf_pass_a_level_is_neither_set_nor_kept(serve: Serve, record: Any) -> None:
    found = [record] if isinstance(record, str) else record
    server = serve(ask=ask({("there.example", "TXT"): found} if record else {}))
    assert sends(server, "eva@there.example", tls=True).startswith("250 ")
    assert not domain_file(server.data_dir).exists()
    domain_file(server.data_dir).parent.mkdir()
    domain_file(server.data_dir).write_text(domain_text(TLS_CLIENT, PLAIN))
    assert sends(server, "eva@there.example", tls=False).startswith("250 ")


def test_a_message_that_was_not_accepted_sets_no_level(serve: Serve) -> None:
    server = serve(ask=ask({("there.example", "TXT"): OPEN}))
    with greeted_with_tls(server) as wire:
        assert wire.ask("MAIL FROM:<eva@there.example>").startswith("250 ")
        assert wire.ask("RCPT TO:<nobody@here.example>").startswith("550 ")
        assert wire.ask("RSET").startswith("250 ")
        assert wire.ask("QUIT").startswith("221 ")
    assert sends(server, "eva@there.example", tls=False).startswith("250 ")


def test_a_notification_and_our_users_have_no_level(serve: Serve) -> None:
    records = {("client.example", "TXT"): OPEN, ("here.example", "TXT"): OPEN}
    server = serve(ask=ask(records))
    with logged_in(server) as wire:
        assert send(wire, LETTER, sender="ana@here.example").startswith("250 ")
    assert sends(server, "", tls=True).startswith("250 ")
    assert sends(server, "", tls=False).startswith("250 ")
    server.mail("ana")
    assert not (server.data_dir / "domaininfo").exists()


def test_the_level_of_an_international_domain(serve: Serve) -> None:
    server = serve(ask=ask({("xn--bcher-kva.example", "TXT"): OPEN}))
    assert sends(server, "eva@xn--bcher-kva.example", tls=True).startswith("250 ")
    assert domain_file(server.data_dir, "b%C3%BCcher.example").exists()
    assert sends(server, "eva@bücher.example", tls=False).startswith("550 5.7.3 ")


@pytest.mark.parametrize("with_tls", [False, True])
def test_mail_from_a_domain_with_a_corrupt_file_waits(serve: Serve, with_tls: bool) -> None:
    server = serve(ask=ask({("there.example", "TXT"): ["v=spf1 +all"]}))
    path = domain_file(server.data_dir)
    path.mkdir(parents=True)
    with greeted_with_tls(server) if with_tls else greeted(server) as wire:
        for waits in range(2):
            reply = wire.ask("MAIL FROM:<eva@there.example>")
            assert reply == "451 4.3.0 what was seen of there.example cannot be read"
            if waits == 0:
                path.rmdir()
                path.write_bytes(b"incoming_sec_level: HIGH\n")
        path.write_bytes(b"incoming_sec_level: PLAIN\n")
        assert send(wire, LETTER, sender="eva@there.example").startswith("250 ")
    assert "s:there.example: it cannot be read: Is a directory; mail from and to it" in server.log
    assert f"{path}:1: expected one of PLAIN" in server.log


# --- security levels are forgotten ---


def forget(server: Server, domain: str) -> int:
    return chasquid.main(["--config-dir", str(server.config_dir), "domaininfo-remove", domain])


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("given", "domain", "name"),
    [
        ("there.example", "there.example", "there.example"),
        ("There.Example", "there.example", "there.example"),
        ("bücher.example", "bücher.example", "b%C3%BCcher.example"),
        ("xn--bcher-kva.example", "bücher.example", "b%C3%BCcher.example"),
    ],
)
def test_domaininfo_remove_forgets_what_was_seen(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    running: bool,
    given: str,
    domain: str,
    name: str,
) -> None:
    ascii = chasquid.domain_to_ascii(domain)
    server = Server(tmp_path, ask=ask({(ascii, "TXT"): OPEN}))
    path = domain_file(server.data_dir, name)
    with server if running else contextlib.nullcontext():
        if running:
            assert sends(server, f"eva@{ascii}", tls=True).startswith("250 ")
            assert sends(server, f"eva@{ascii}", tls=False).startswith("550 5.7.3 ")
        else:
            path.parent.mkdir(parents=True)
            path.write_text(domain_text(TLS_CLIENT, TLS_SECURE, domain))
        assert path.exists()
        assert forget(server, given) == 0
        assert capsys.readouterr().out == f"what was seen of {domain} is forgotten\n"
        assert not path.exists()
        if running:
            assert sends(server, f"eva@{ascii}", tls=False).startswith("250 ")
        assert forget(server, given) == 1
        assert capsys.readouterr().err == f"chasquid: nothing was known of {domain}\n"


def test_domaininfo_remove_wants_a_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forget(Server(tmp_path), "../there") == 1
    assert "../there" in capsys.readouterr().err


# --- mail that goes out: what courier and server must do, by what is known of the server ---

DELIVERED = STARTTLS + SECURE + ENVELOPE + CONTENT
IN_THE_CLEAR = GREETING + ENVELOPE + CONTENT
REFUSES_CERTIFICATE = STARTTLS + "S: 220 go on\n* TLS\n* close"
LOOKED_AT = STARTTLS + SECURE + "* closed"  # the courier leaves when it has seen the certificate
NO_TLS = GREETING + "* closed"
BROKEN = {
    "no STARTTLS": NO_TLS,
    "STARTTLS refused": STARTTLS + "S: 454 4.7.0 not today\n* closed",
    "no handshake": STARTTLS + "S: 220 go on\nS: this is no handshake\n* close",
    "closed": STARTTLS + "S: 220 go on\n* close",
}
REFUSED_IN_TLS = STARTTLS + SECURE + "C: MAIL FROM:…\nS: 550 5.7.1 no\nC: QUIT\nS: 221 bye"
OTHER_MX = {("there.example", "MX"): ("10 other.example.",), ("other.example", "A"): ("127.0.0.1",)}
TWO_MX = {
    **MX,
    ("there.example", "MX"): ("5 a.example.", "10 mx.there.example."),
    ("a.example", "A"): ("127.0.0.1",),
}
LONG_MX = {
    ("there.example", "MX"): ("10 a.mx.there.example.",),
    ("a.mx.there.example", "A"): ("127.0.0.1",),
}
BUECHER = {("xn--bcher-kva.example", "MX"): ("10 mx.there.example.",), **MX}
TO_BUECHER = ENVELOPE.replace("TO:<eva@there", "TO:<eva@xn--bcher-kva")

FORBIDS = POLICY.replace(b"mx.there", b"mx.other")
WITH_REQUIRETLS = SECURE.replace("S: 250 mx", "S: 250-mx") + "S: 250 REQUIRETLS\n"
REQUIRED = (
    STARTTLS
    + WITH_REQUIRETLS
    + ENVELOPE.replace("FROM:<eva@there.example>", "FROM:<eva@there.example> REQUIRETLS")
    + CONTENT
)
OFFERED_TOO_EARLY = STARTTLS.replace("S: 250 STARTTLS", "S: 250-REQUIRETLS\nS: 250 STARTTLS")


class Case(NamedTuple):
    """What is known beforehand, what happens in each connection, and what must come of it.

    The scripts are of connections one after another; without any, nobody listens. With `tlsa`
    the zone is signed, but for `unsigned`, and has these records for the server's port, whose
    question is ("", "TLSA"). A `policy` is announced and can be fetched; of one that is b""
    there is only the announcement. `found` is state and status; with `UNSAFE` the refusal is
    counted and explained. `learned` is the outgoing level on the disk at the end; "" is no
    file, None is not looked at.
    """

    scripts: Sequence[str]
    found: tuple[str, str]
    says: Sequence[str] = ()
    level: str = ""
    learned: str | None = None
    trusted: bool = False  # the certificate of mx.there.example is valid
    records: Records = MX
    names: Sequence[str] = ("mx.there.example",)  # in the certificate
    tlsa: Any = None
    unsigned: Sequence[tuple[str, str]] = ()
    policy: bytes | None = None
    to: str = "there.example"
    named: bool = False  # the host is named by somebody here, not by the DNS
    never_asked: Sequence[str] = ()  # kinds of records
    load: Mapping[str, bool] = {}


SENT_IT, UNSAFE, REFUSED = (
    (State.SENT, "2.6.0"),
    (State.DEFERRED, "4.7.5"),
    (State.FAILED, "5.7.30"),
)


def sent(*scripts: str, **more: Any) -> Case:
    return Case(scripts, SENT_IT, **more)


def unsafe(script: str, *says: str, **more: Any) -> Case:
    return Case((script,), UNSAFE, says, **more)


def broken(what: str, **more: Any) -> dict[str, Case]:
    """Return a case for each connection in BROKEN; the refusal says why there must be TLS."""
    return {f"without TLS, {name}": unsafe(script, what, **more) for name, script in BROKEN.items()}


LEVEL_CASES = {
    "without TLS nothing is learned": sent(IN_THE_CLEAR, learned=""),
    "TLS is learned": sent(REFUSES_CERTIFICATE, DELIVERED, learned=TLS_INSECURE),
    "a valid certificate is learned": sent(
        DELIVERED, level=TLS_INSECURE, trusted=True, learned=TLS_SECURE
    ),
    "TLS is learned though the message is refused": Case(
        (REFUSES_CERTIFICATE, REFUSED_IN_TLS), (State.FAILED, "5.7.1"), learned=TLS_INSECURE
    ),
    "the level is of the domain in Unicode": sent(
        REFUSES_CERTIFICATE,
        STARTTLS + SECURE + TO_BUECHER + CONTENT,
        records=BUECHER, to="bücher.example", learned=TLS_INSECURE,
    ),
    "no valid certificate before, none now": sent(
        REFUSES_CERTIFICATE, DELIVERED, level=TLS_INSECURE, learned=TLS_INSECURE
    ),
    "a valid certificate before, none now": unsafe(
        REFUSES_CERTIFICATE, "the certificate is not valid", "it was TLS_SECURE before",
        level=TLS_SECURE, learned=TLS_SECURE,
    ),
    "a valid certificate for another name": unsafe(
        REFUSES_CERTIFICATE, "not valid", level=TLS_SECURE, records=OTHER_MX, trusted=True
    ),
    "a valid certificate before and now": sent(DELIVERED, level=TLS_SECURE, trusted=True),
    "the next server is tried": sent(
        NO_TLS, REFUSES_CERTIFICATE, DELIVERED, level=TLS_INSECURE, records=TWO_MX
    ),
    **{
        f"{level} before, {name}": unsafe(
            script, f"it was {level} before", level=level, learned=level
        )
        for level in (TLS_INSECURE, TLS_SECURE)
        for name, script in BROKEN.items()
    },
}  # fmt: skip


def dane_cases() -> Iterator[tuple[str, Case]]:
    right, unusable = tlsa(3), "1 1 1 ab"
    for selector, matching in SELECTIONS:
        yield f"3 {selector} {matching}", sent(DELIVERED, tlsa=[tlsa(3, selector, matching)])
    yield "one of several is enough", sent(DELIVERED, tlsa=[WRONG, "0 0 0 ab", tlsa(2), right])
    yield (
        "the server's own certificate need not bear its name",
        sent(DELIVERED, names=["other.example"], tlsa=[tlsa(3, der=OTHER_DER)]),
    )
    yield "it teaches that there is TLS", sent(DELIVERED, tlsa=[right], learned=TLS_INSECURE)
    yield (
        "another certificate, though valid",
        unsafe(LOOKED_AT, "matches no TLSA record", "DANE", tlsa=[WRONG], trusted=True),
    )
    for name, script in BROKEN.items():
        yield f"a record, {name}", unsafe(script, "DANE", tlsa=[right])
    for text in ("0 0 1 ab", unusable, "3 2 1 ab", "3 1 3 ab"):
        yield f"{text} demands TLS", sent(REFUSES_CERTIFICATE, DELIVERED, tlsa=[text])
        for name, script in BROKEN.items():
            yield f"{text} demands TLS, {name}", unsafe(script, "DANE", tlsa=[text])
    yield (
        f"{unusable} lowers no level",
        unsafe(REFUSES_CERTIFICATE, "TLS_SECURE", tlsa=[unusable], level=TLS_SECURE),
    )
    for question in MX:
        down = {**MX, question: DOWN}
        yield (
            f"{question[1]} cannot be had",
            Case((), (State.DEFERRED, "4.4.3"), ["down"], records=down, tlsa=[]),
        )
        yield (
            f"{question[1]} is not authentic",
            sent(IN_THE_CLEAR, tlsa=[WRONG], unsigned=[question]),
        )
        yield f"{question[1]} is not authentic, TLSA not asked for", Case(
            (), (State.DEFERRED, "4.4.1"), ["cannot connect"],
            tlsa=DOWN, unsigned=[question], never_asked=["TLSA"],
        )  # fmt: skip
    yield "TLSA cannot be had", Case((), (State.DEFERRED, "4.4.3"), ["down"], tlsa=DOWN)
    yield "TLSA is not authentic", sent(IN_THE_CLEAR, tlsa=[WRONG], unsigned=[("", "TLSA")])
    yield (
        "a named host needs no signed MX",
        unsafe(LOOKED_AT, "DANE", tlsa=[WRONG], named=True, never_asked=["MX"]),
    )


STS_CASES = {
    "in the policy, with a valid certificate": sent(DELIVERED, policy=POLICY, trusted=True),
    "not in the policy": Case(
        (), UNSAFE, ["a.mx.there.example", "MTA-STS"], records=LONG_MX, trusted=True,
        policy=POLICY.replace(b"mx.there", b"*.there.example\nmx: mx.other"),
    ),
    "only servers in the policy are used": sent(
        DELIVERED, policy=POLICY, records=TWO_MX, trusted=True
    ),
    "no valid certificate": unsafe(REFUSES_CERTIFICATE, "MTA-STS", policy=POLICY),
    **broken("MTA-STS", policy=POLICY),
    "testing": sent(IN_THE_CLEAR, policy=FORBIDS.replace(b"enforce", b"testing")),
    "none": sent(IN_THE_CLEAR, policy=FORBIDS.replace(b"enforce", b"none")),
    "announced, but it cannot be had": sent(IN_THE_CLEAR, policy=b""),
    "an international domain": Case(
        (), UNSAFE, ["MTA-STS"], policy=FORBIDS, records=BUECHER, to="bücher.example"
    ),
    "a named host needs no policy": sent(
        IN_THE_CLEAR, policy=POLICY, named=True, never_asked=["TXT"],
        records={**MX, ("_mta-sts.mx.there.example", "TXT"): ("v=STSv1; id=1",)},
    ),
    "DANE wins over a policy that forbids": sent(DELIVERED, policy=FORBIDS, tlsa=[tlsa(3)]),
    "DANE wins over a policy that allows": unsafe(
        LOOKED_AT, "DANE", policy=POLICY, tlsa=[WRONG], trusted=True
    ),
    "TLSA that cannot be used leaves the policy": unsafe(
        NO_TLS, "MTA-STS", policy=POLICY, tlsa=["1 1 1 ab"], trusted=True
    ),
    "TLSA that cannot be used, and TLS by the policy": sent(
        DELIVERED, policy=POLICY, tlsa=["1 1 1 ab"], trusted=True
    ),
}  # fmt: skip

NEEDS, OPTIONAL = {"require_tls": True}, {"tls_optional": True}
REQUIRETLS_CASES = {
    "a signed server is told": sent(REQUIRED, tlsa=[], trusted=True, load=NEEDS),
    "a server of a policy is told": sent(REQUIRED, policy=POLICY, trusted=True, load=NEEDS),
    "DANE is enough": sent(REQUIRED, tlsa=[tlsa(3)], load=NEEDS),
    "a named server is told": sent(REQUIRED, named=True, trusted=True, load=NEEDS),
    "nobody vouches for the server": Case(
        (), REFUSED, ["REQUIRETLS", "mx.there.example"], load=NEEDS
    ),
    "nobody vouches, and the policy cannot be had": Case(
        (), REFUSED, ["REQUIRETLS", "mx.there.example"], policy=b"", load=NEEDS
    ),
    "the MX is not signed": Case(
        (), REFUSED, tlsa=[], unsigned=[("there.example", "MX")], load=NEEDS
    ),
    "the A is not signed": Case(
        (), REFUSED, tlsa=[], unsigned=[("mx.there.example", "A")], load=NEEDS
    ),
    "the server does not know of it": Case(
        (LOOKED_AT,), REFUSED, ["REQUIRETLS"], tlsa=[], trusted=True, load=NEEDS
    ),
    "the server knows of it before TLS only": Case(
        (OFFERED_TOO_EARLY + SECURE + "* closed",), REFUSED, ["REQUIRETLS"],
        tlsa=[], trusted=True, load=NEEDS,
    ),
    "no valid certificate": unsafe(REFUSES_CERTIFICATE, "REQUIRETLS", tlsa=[], load=NEEDS),
    **broken("REQUIRETLS", tlsa=[], load=NEEDS),
    "who does not need it does not say so": sent(
        STARTTLS + WITH_REQUIRETLS + ENVELOPE + CONTENT, tlsa=[], trusted=True
    ),
    **{
        f"TLS-Required: No ignores {what}": sent(
            IN_THE_CLEAR, level=TLS_SECURE, learned=TLS_SECURE, load=OPTIONAL, **more
        )
        for what, more in {
            "the level": {},
            "a policy that allows": {"policy": POLICY},
            "a policy that forbids": {"policy": FORBIDS},
            "DANE": {"tlsa": [WRONG]},
        }.items()
    },
    "TLS-Required: No uses TLS and learns nothing": sent(
        REFUSES_CERTIFICATE, DELIVERED, load=OPTIONAL, learned=""
    ),
    "REQUIRETLS wins over TLS-Required: No": unsafe(
        NO_TLS, "REQUIRETLS", tlsa=[], load=NEEDS | OPTIONAL
    ),
    "REQUIRETLS wins, and nobody vouches": Case((), REFUSED, load=NEEDS | OPTIONAL),
}  # fmt: skip

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "level": LEVEL_CASES,
        "DANE": dict(dane_cases()),
        "MTA-STS": STS_CASES,
        "REQUIRETLS": REQUIRETLS_CASES,
    }.items()
    for name, case in cases.items()
}


class Attempt(NamedTuple):
    """What came of one attempt to deliver: the result, and what was asked, counted and logged."""

    result: chasquid.Result
    asked: list[tuple[str, str]]
    refused: int


def attempt(directory: Path, case: Case, port: int) -> Attempt:
    """Let a courier deliver to a server at `port`; what it keeps and logs is below `directory`."""
    ascii = chasquid.domain_to_ascii(case.to)
    records = dict(case.records)
    if case.policy is not None:
        records[f"_mta-sts.{ascii}", "TXT"] = ("v=STSv1; id=1",)
    unsigned: Sequence[tuple[str, str]] = ()
    if case.tlsa is not None:
        question = (f"_{port}._tcp.mx.there.example", "TLSA")
        records[question] = case.tlsa
        unsigned = [question if key == ("", "TLSA") else key for key in case.unsigned]
    zone = Zone(records, signed=case.tlsa is not None, unsigned=unsigned)
    via = [f"mx.there.example:{port}"] if case.named else []
    log = record(directory)

    async def fetch(domain: str) -> bytes:
        assert domain == ascii
        return case.policy or await no_policy(domain)

    async def main(loop: chasquid.Loop) -> chasquid.Result:
        names = chasquid.Names(loop, zone.ask)
        policies = tls_policies(loop, names, log, directory, fetch)
        courier = chasquid.SmtpCourier(loop, names, log, policies, HOST, port, lambda: 0.5)
        targets = [address(f"eva@{case.to}", *via)]
        [result] = await courier.deliver(delivery(**case.load), targets)
        return result

    try:
        return Attempt(run(main), zone.asked, log.counters["security_levels", "refused", "out"])
    finally:
        log.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_delivery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if case.trusted:
        trust(monkeypatch, tmp_path, "mx.there.example")
    if case.level:
        remember(tmp_path, case.level, case.to)
    port = 1  # where nobody listens
    if case.scripts:
        with Peer(*case.scripts, names=case.names) as peer:
            found = attempt(tmp_path, case, port := peer.port)
        assert len(peer.messages) == (case.found == SENT_IT)
    else:
        found = attempt(tmp_path, case, port)
    result = found.result
    assert (result.state, result.status) == case.found, result
    for text in case.says:
        assert text in result.text
    if case.scripts and case.found == UNSAFE:
        host = case.records[case.to, "MX"][0].split()[1].rstrip(".")
        assert result.text.startswith(f"{host} (127.0.0.1:{port}): ")
        assert "less is not safe" in result.text
        assert found.refused == 1
    assert not set(case.never_asked) & {kind for _, kind in found.asked}
    if case.learned == "":
        assert not (tmp_path / "domaininfo").exists()
    elif case.learned is not None:
        path = Path(chasquid.domain_info_path(str(tmp_path / "domaininfo"), case.to))
        assert path.read_text() == domain_text(PLAIN, case.learned, case.to)


def test_the_level_is_of_the_host_if_that_is_named(tmp_path: Path) -> None:
    case = sent(REFUSES_CERTIFICATE, DELIVERED, named=True)
    with Peer(*case.scripts, names=case.names) as peer:
        assert attempt(tmp_path, case, peer.port).result.state == State.SENT
    assert kept(tmp_path, "mx.there.example").outgoing == TLS_INSECURE
    assert kept(tmp_path, "there.example") == DomainInfo()


def test_mail_to_a_domain_with_a_corrupt_file_waits(tmp_path: Path) -> None:
    domain_file(tmp_path).parent.mkdir()
    domain_file(tmp_path).write_bytes(b"outgoing_sec_level: HIGH\n")
    case = sent(IN_THE_CLEAR)
    with Peer(*case.scripts) as peer:
        result = attempt(tmp_path, case, peer.port).result
        assert (result.state, result.status) == (State.DEFERRED, "4.3.0")
        assert result.text.endswith("what was seen of there.example cannot be read")
        domain_file(tmp_path).unlink()
        assert attempt(tmp_path, case, peer.port).result.state == State.SENT
    assert f"{domain_file(tmp_path)}:1: expected one of" in (tmp_path / "server.log").read_text()


def test_a_server_that_has_just_started_keeps_to_the_policies_on_its_disk(tmp_path: Path) -> None:
    policy = StsPolicy("1", "enforce", ("mx.other.example",), 86400, time.time())
    server = Server(tmp_path, ask=ask(MX))
    (server.data_dir / "sts-cache").mkdir(parents=True)
    (server.data_dir / "sts-cache" / "there.example").write_text(json.dumps(policy._asdict()))
    with server:
        submit(server, "")
        server.wait_for_attempts()
        assert "none of the servers in the MTA-STS policy of there.example" in server.mail_log


# --- DANE: authorities ---


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Issued]:
    """Two authorities, and servers of the first: the right one, and one of another name."""
    place = tmp_path_factory.mktemp("authorities")
    first, other = issue(place, "First"), issue(place, "Other")
    return {
        "first": first,
        "other": other,
        "server": issue(place, "mx.there.example", first),
        "misnamed": issue(place, "other.example", first),
    }


NOT_VALID = unsafe(REFUSES_CERTIFICATE, "the certificate is not valid", "DANE")
NO_MATCH = unsafe("", "matches no TLSA record", "DANE")  # what is shown is enough to see that
AUTHORITIES: dict[str, tuple[Sequence[str], tuple[int, int, int], str, Case]] = {
    **{
        f"2 {selector} {matching}": (
            ["server", "first"], (2, selector, matching), "first", sent(DELIVERED)
        )
        for selector, matching in SELECTIONS
    },
    "it does not mend the wrong name": (["misnamed", "first"], (2, 1, 1), "first", NOT_VALID),
    "it is shown but has not signed": (["server", "other"], (2, 1, 1), "other", NOT_VALID),
    "another is in the DNS": (["server", "first"], (2, 1, 1), "other", NO_MATCH),
    "3 is the server's own alone": (["server", "first"], (3, 1, 1), "first", NO_MATCH),
}  # fmt: skip


@needs_openssl
@pytest.mark.parametrize(("shown", "kind", "in_dns", "case"), AUTHORITIES.values(), ids=AUTHORITIES)
def test_an_authority(
    tmp_path: Path,
    issued: dict[str, Issued],
    shown: Sequence[str],
    kind: tuple[int, int, int],
    in_dns: str,
    case: Case,
) -> None:
    (tmp_path / "chain.pem").write_text("".join(issued[name].chain for name in shown))
    (tmp_path / "key.pem").write_text(issued[shown[0]].key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
    scripts = [LOOKED_AT, *filter(None, case.scripts)]
    with Peer(*scripts, context=context) as peer:
        case = case._replace(tlsa=[tlsa(*kind, issued[in_dns].der)])
        result = attempt(tmp_path, case, peer.port).result
    assert (result.state, result.status) == case.found, result
    assert len(peer.messages) == (case.found == SENT_IT)
    for text in case.says:
        assert text in result.text


# --- REQUIRETLS and "TLS-Required: No", coming in ---


def test_requiretls_is_offered_and_taken_only_with_tls(serve: Serve) -> None:
    with greeted(serve()) as wire:
        assert "REQUIRETLS" not in wire.ask("EHLO client.example")
    play(
        serve(),
        """
        S: 220 …
        C: EHLO client.example
        S: 250-…
        S: 250 …
        C: MAIL FROM:<eva@there.example> REQUIRETLS
        S: 530 5.7.10 …
        C: STARTTLS
        S: 220 …
        * TLS
        C: EHLO client.example
        S: 250-…
        S: 250 …
        C: MAIL FROM:<eva@there.example> REQUIRETLS=yes
        S: 501 5.5.4 …
        C: MAIL FROM:<eva@there.example> requiretls
        S: 250 …
        """,
    )
    with greeted_with_tls(serve()) as wire:
        assert "\n250-REQUIRETLS\n" in wire.ask("EHLO client.example")
        assert wire.ask("HELO client.example").startswith("250 ")
        assert wire.ask("MAIL FROM:<eva@there.example> REQUIRETLS").startswith("555 5.5.4 ")


def submit(server: Server, parameters: str, data: bytes = LETTER) -> None:
    with logged_in(server) as wire:
        assert wire.ask(f"MAIL FROM:<ana@here.example>{parameters}").startswith("250 ")
        assert wire.ask("RCPT TO:<eva@there.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(data + b".\r\n")
        assert wire.reply().startswith("250 ")


@pytest.mark.parametrize(
    ("parameters", "fields", "require_tls", "tls_optional"),
    [
        ("", "", False, False),
        (" REQUIRETLS", "", True, False),
        (" BODY=8BITMIME REQUIRETLS", "", True, False),
        ("", "TLS-Required: No\r\n", False, True),
        ("", "tls-required:no\r\n", False, True),
        ("", "TLS-Required:\r\n NO \r\n", False, True),
        ("", "TLS-Required: Yes\r\n", False, False),
        ("", "TLS-Required: \r\n", False, False),
        ("", "TLS-Required: No way\r\n", False, False),
        ("", "TLS-Required: No\r\nTLS-Required: No\r\n", False, False),
        ("", "X-TLS-Required: No\r\n", False, False),
        ("", "Subject: x\r\n\r\nTLS-Required: No\r\n", False, False),
    ],
)
def test_what_a_message_requires_goes_with_it_and_survives_a_restart(
    tmp_path: Path, parameters: str, fields: str, require_tls: bool, tls_optional: bool
) -> None:
    clock, courier = RunningClock(), FakeCourier(State.DEFERRED)
    server = Server(tmp_path, clock=clock, remote=courier)
    with server:
        submit(server, parameters, fields.encode() + LETTER)
        server.wait_for_attempts()
    courier.state = State.SENT
    with server:
        clock.advance(300)
        server.settle()
        wait_for(lambda: not server.queued(), "the second attempt")
    found = [(delivery.require_tls, delivery.tls_optional) for delivery in courier.deliveries]
    assert found == [(require_tls, tls_optional)] * 2


@pytest.mark.parametrize(("parameters", "body"), [("", True), (" REQUIRETLS", False)])
def test_the_notification_of_a_message_that_requires_tls_carries_no_body(
    serve: Serve, parameters: str, body: bool
) -> None:
    records = {**MX, ("there.example", "MX"): ("0 .",)} if body else MX
    server = serve(ask=ask(records))
    submit(server, parameters)
    [notification] = server.mail("ana")
    assert b"Subject: hello\n" in notification
    assert (b"It works." in notification) is body
    assert (b"Content-Type: text/rfc822-headers\n" in notification) is not body
    assert (b"Status: 5.7.30\n" in notification) is not body
