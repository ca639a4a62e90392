# SPDX-License-Identifier: Apache-2.0
"""Room TLS POLICY: what is demanded of a connection, and that couriers and server keep to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dns.flags
import dns.message
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CONTENT,
    DOWN,
    ENVELOPE,
    EVA,
    GREETING,
    HOST,
    LETTER,
    MX,
    SECONDS,
    SECURE,
    STARTTLS,
    FakeClock,
    Inline,
    Peer,
    RunningClock,
    Serve,
    Server,
    Wire,
    Zone,
    address,
    certificate,
    delivery,
    greeted,
    greeted_with_tls,
    logged_in,
    needs_openssl,
    no_policy,
    play,
    record,
    run,
    send,
    tls_policies,
    trusting,
    turns,
    wait_for,
    write_certificate,
)

import chasquid
from chasquid import (
    DEFERRED,
    FAILED,
    PLAIN,
    SENT,
    TLS_CLIENT,
    TLS_INSECURE,
    TLS_SECURE,
    Delivery,
    DomainInfo,
    StsPolicy,
    Target,
    TemporaryFailure,
    Tlsa,
    TlsRequirement,
)

Records = Mapping[tuple[str, str], Any]


@pytest.fixture(autouse=True)
def untrusting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no certificate be valid, whatever this machine trusts, if a test does not say so."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))


def domain_file(directory: Path, domain: str = "there.example") -> Path:
    return directory / "domaininfo" / f"s:{domain}"


def domain_text(incoming: str, outgoing: str, domain: str = "there.example") -> str:
    return f'name: "{domain}"\nincoming_sec_level: {incoming}\noutgoing_sec_level: {outgoing}\n'


def remember(directory: Path, outgoing: str, domain: str = "there.example") -> None:
    path = domain_file(directory, domain)
    path.parent.mkdir(exist_ok=True)
    path.write_text(domain_text(PLAIN, outgoing, domain))


# --- security levels: the files ---


def with_levels(
    directory: Path,
    main: Callable[[chasquid.SecurityLevels], Coroutine[Any, Any, Any]],
    workers: chasquid.Workers | None = None,
) -> Any:
    """Run `main` with the levels that are kept below `directory`, as after a start."""

    async def started(loop: chasquid.Loop) -> Any:
        log = record(directory)
        try:
            return await main(chasquid.SecurityLevels(loop, log, str(directory / "domaininfo")))
        finally:
            log.close()

    return run(started, workers=workers)


def kept(directory: Path, domain: str = "there.example") -> DomainInfo:
    """Return what is known after a start."""
    return with_levels(directory, lambda levels: levels.of(domain))  # type: ignore[no-any-return]


def test_what_was_seen_is_written_as_the_go_server_writes_it(tmp_path: Path) -> None:
    async def main(levels: chasquid.SecurityLevels) -> None:
        await levels.saw_incoming("there.example", True)
        assert domain_file(tmp_path).read_text() == domain_text(TLS_CLIENT, PLAIN)
        await levels.saw_outgoing("there.example", TLS_SECURE)
        assert domain_file(tmp_path).read_text() == domain_text(TLS_CLIENT, TLS_SECURE)

    with_levels(tmp_path, main)
    assert os.listdir(tmp_path / "domaininfo") == ["s:there.example"]
    assert kept(tmp_path) == DomainInfo(TLS_CLIENT, TLS_SECURE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name:  "there.example"\nincoming_sec_level:  TLS_CLIENT\n', (TLS_CLIENT, PLAIN)),
        ('name: "there.example"\noutgoing_sec_level: TLS_SECURE\n', (PLAIN, TLS_SECURE)),
        ('name:"there.example" outgoing_sec_level:TLS_INSECURE', (PLAIN, TLS_INSECURE)),
        ('outgoing_sec_level: PLAIN\nincoming_sec_level: PLAIN\nname: ""', (PLAIN, PLAIN)),
        ('name: "there.example"\n', (PLAIN, PLAIN)),
        ("", (PLAIN, PLAIN)),
    ],
)
def test_files_of_the_go_server_are_read(
    tmp_path: Path, text: str, expected: tuple[str, str]
) -> None:
    domain_file(tmp_path).parent.mkdir()
    domain_file(tmp_path).write_text(text)
    assert kept(tmp_path) == DomainInfo(*expected)


@given(st.text("abzAZ09-._~ñüł漢%:+", min_size=1, max_size=20))
def test_a_file_is_named_as_go_escapes_a_query(domain: str) -> None:
    name = os.path.basename(chasquid.domain_info_path("directory", domain))
    assert name == f"s:{urllib.parse.quote_plus(domain)}"


def test_an_international_domain_is_kept_in_unicode(tmp_path: Path) -> None:
    with_levels(tmp_path, lambda levels: levels.saw_outgoing("ñandú.example", TLS_INSECURE))
    path = domain_file(tmp_path, "%C3%B1and%C3%BA.example")
    assert path.read_text() == domain_text(PLAIN, TLS_INSECURE, "ñandú.example")
    assert kept(tmp_path, "ñandú.example").outgoing == TLS_INSECURE


@pytest.mark.parametrize(
    "labels",
    [
        ["x" * 63] * 3,
        ["ü" * 50] * 3,
        ["漢" * 20] * 3,
        ["x" * 63] * 3 + ["x" * 51],
    ],
)
def test_a_domain_may_be_as_long_as_domains_are(tmp_path: Path, labels: list[str]) -> None:
    domain = ".".join([*labels, "example"])
    assert len(chasquid.domain_to_ascii(domain)) <= 253
    with_levels(tmp_path, lambda levels: levels.saw_outgoing(domain, TLS_SECURE))
    assert kept(tmp_path, domain).outgoing == TLS_SECURE
    assert (tmp_path / "server.log").read_text().count("error") == 0


@pytest.mark.parametrize(
    "content",
    [b"outgoing_sec_level: HIGH\n", b'outgoing_sec_level: "TLS_SECURE"', b'name: "', b"\0\xff{",
     b"outgoing_sec_level { }"],
)  # fmt: skip
def test_mail_of_a_domain_waits_while_its_file_is_corrupt(tmp_path: Path, content: bytes) -> None:
    domain_file(tmp_path).parent.mkdir()
    domain_file(tmp_path).write_bytes(content)

    async def main(levels: chasquid.SecurityLevels) -> None:
        for ask in (
            lambda: levels.of("there.example"),
            lambda: levels.accepts("there.example", False),
            lambda: levels.saw_outgoing("there.example", TLS_INSECURE),
        ):
            with pytest.raises(chasquid.TemporaryFailure, match="of there.example cannot be read"):
                await ask()
        assert domain_file(tmp_path).read_bytes() == content
        assert await levels.forget("there.example")
        await levels.saw_outgoing("there.example", TLS_INSECURE)

    with_levels(tmp_path, main)
    log = (tmp_path / "server.log").read_text()
    assert f"security levels: error: {domain_file(tmp_path)}" in log
    assert domain_file(tmp_path).read_text() == domain_text(PLAIN, TLS_INSECURE)


def test_mail_from_a_domain_with_a_corrupt_file_is_answered_451(serve: Serve) -> None:
    zone = Zone({("there.example", "TXT"): ["v=spf1 +all"]})
    server = serve(ask=zone.ask)
    path = server.data_dir / "domaininfo" / "s:there.example"
    path.parent.mkdir()
    path.write_bytes(b"incoming_sec_level: HIGH\n")
    with greeted(server) as wire:
        reply = wire.ask("MAIL FROM:<eva@there.example>")
        assert reply == "451 4.3.0 what was seen of there.example cannot be read"
        path.write_bytes(b"incoming_sec_level: PLAIN\n")
        assert wire.ask("MAIL FROM:<eva@there.example>").startswith("250 ")
    assert f"{path}:1: expected one of PLAIN" in server.log


def test_mail_from_a_domain_with_a_corrupt_file_waits_with_tls_too(serve: Serve) -> None:
    zone = Zone({("there.example", "TXT"): ["v=spf1 +all"]})
    server = serve(ask=zone.ask)
    path = server.data_dir / "domaininfo" / "s:there.example"
    path.mkdir(parents=True)
    with greeted(server) as wire:
        assert wire.ask("STARTTLS").startswith("220 ")
        wire.start_tls(trusting())
        assert wire.ask("EHLO client.example").startswith("250-")
        reply = wire.ask("MAIL FROM:<eva@there.example>")
        assert reply == "451 4.3.0 what was seen of there.example cannot be read"
        path.rmdir()
        letter = b"From: eva@there.example\r\n\r\nIt works.\r\n"
        assert send(wire, letter, sender="eva@there.example").startswith("250 ")
    assert "s:there.example: it cannot be read: Is a directory; mail from and to it" in server.log


def test_mail_to_a_domain_with_a_corrupt_file_waits(tmp_path: Path) -> None:
    domain_file(tmp_path).parent.mkdir()
    domain_file(tmp_path).write_bytes(b"outgoing_sec_level: HIGH\n")
    with Peer(GREETING + ENVELOPE + CONTENT, names=("mx.there.example",)) as peer:
        result = deliver(tmp_path, Zone(MX), peer.port)
        assert (result.state, result.status) == (chasquid.DEFERRED, "4.3.0")
        assert result.text.endswith("what was seen of there.example cannot be read")
        domain_file(tmp_path).unlink()
        assert deliver(tmp_path, Zone(MX), peer.port).state == chasquid.SENT
    assert f"{domain_file(tmp_path)}:1: expected one of" in (tmp_path / "server.log").read_text()


def test_a_directory_that_cannot_be_written_keeps_nothing_but_the_memory(tmp_path: Path) -> None:
    (tmp_path / "domaininfo").symlink_to("nowhere/at/all")

    async def main(levels: chasquid.SecurityLevels) -> None:
        await levels.saw_incoming("there.example", True)
        assert await levels.of("there.example") == DomainInfo(TLS_CLIENT)
        assert not await levels.accepts("there.example", False)

    with_levels(tmp_path, main)
    assert "s:there.example cannot be written" in (tmp_path / "server.log").read_text()
    assert not (tmp_path / "domaininfo").exists()


SIGHTS = st.tuples(st.just("in"), st.booleans()) | st.tuples(
    st.just("out"), st.sampled_from([PLAIN, TLS_INSECURE, TLS_SECURE])
)


@given(st.lists(st.lists(SIGHTS, max_size=4), max_size=3))
@settings(max_examples=40)
def test_levels_only_rise_also_over_restarts(
    tmp_path_factory: pytest.TempPathFactory, lives: list[list[tuple[str, Any]]]
) -> None:
    directory = tmp_path_factory.mktemp("levels")
    best = DomainInfo()
    for life in lives:

        async def main(levels: chasquid.SecurityLevels, life: list[tuple[str, Any]] = life) -> None:
            nonlocal best
            for direction, seen in life:
                if direction == "in":
                    await levels.saw_incoming("there.example", seen)
                    best = best._replace(incoming=TLS_CLIENT if seen else best.incoming)
                else:
                    await levels.saw_outgoing("there.example", seen)
                    highest = max(best.outgoing, seen, key=chasquid.LEVELS.index)
                    best = best._replace(outgoing=highest)
                assert await levels.of("there.example") == best
                assert await levels.accepts("there.example", True)
                plain = await levels.accepts("there.example", False)
                assert plain == (best.incoming == PLAIN)

        with_levels(directory, main)
        assert kept(directory) == best
        assert kept(directory, "other.example") == DomainInfo()


class Held(chasquid.Workers):
    """Workers that do a job when they are told to, in any order."""

    def __init__(self) -> None:
        super().__init__(0)
        self.jobs: list[Callable[[], None]] = []

    def submit(
        self,
        job: Callable[[], object],
        done: Callable[[object, BaseException | None], None],
    ) -> None:
        self.jobs.append(lambda: done(job(), None))


def test_a_file_that_is_read_late_lowers_no_level(tmp_path: Path) -> None:
    workers = Held()

    async def main(levels: chasquid.SecurityLevels) -> DomainInfo:
        loop = levels._loop
        tasks = [
            loop.spawn(levels.saw_outgoing("there.example", TLS_SECURE), "delivery"),
            loop.spawn(levels.of("there.example"), "another"),
        ]
        while not all(task.done for task in tasks):
            await turns(loop)
            if workers.jobs:
                workers.jobs.pop(0)()
        await turns(loop)
        return await levels.of("there.example")

    assert with_levels(tmp_path, main, workers).outgoing == TLS_SECURE


def test_of_two_writings_at_once_the_higher_level_stays(tmp_path: Path) -> None:
    workers = Held()

    async def main(levels: chasquid.SecurityLevels) -> None:
        loop = levels._loop
        known = loop.spawn(levels.of("there.example"), "reading")
        await turns(loop)
        workers.jobs.pop()()
        await known.join()
        tasks = [
            loop.spawn(levels.saw_outgoing("there.example", level), level)
            for level in (TLS_INSECURE, TLS_SECURE)
        ]
        while not all(task.done for task in tasks):
            await turns(loop)
            workers.jobs.pop()()
            await turns(loop)

    with_levels(tmp_path, main, workers)
    assert kept(tmp_path).outgoing == TLS_SECURE


def test_what_is_forgotten_is_forgotten_in_memory_and_on_the_disk(tmp_path: Path) -> None:
    async def main(levels: chasquid.SecurityLevels) -> None:
        await levels.saw_outgoing("there.example", TLS_SECURE)
        await levels.saw_outgoing("other.example", TLS_SECURE)
        assert await levels.forget("there.example")
        assert not await levels.forget("there.example")
        assert await levels.of("there.example") == DomainInfo()

    with_levels(tmp_path, main)
    assert os.listdir(tmp_path / "domaininfo") == ["s:other.example"]


# --- security levels: mail that comes in ---

OPEN = ["v=spf1 ip4:127.0.0.1 -all"]


def sends(server: Server, sender: str, tls: bool) -> str:
    """Return the reply to a message, or to MAIL where that is refused."""
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
        assert server.daemon.record.counters["security levels", "refused", "in"] == 1
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


# --- security levels: mail that goes out ---


class SignedZone(Zone):
    """A zone whose answers are authentic, but for the questions in `unsigned`.

    `aliases` says what some names stand for.
    """

    def __init__(
        self,
        table: Records,
        unsigned: Sequence[tuple[str, str]] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(table)
        self._unsigned = unsigned
        self._aliases = aliases or {}

    async def ask(self, name: str, kind: str) -> chasquid.Answer:
        answer = await super().ask(name, kind)
        return answer._replace(
            authentic=(name, kind) not in self._unsigned,
            canonical=self._aliases.get(name, "") if answer.records else "",
        )


class Attempt(NamedTuple):
    """What came of one attempt to deliver."""

    state: str
    status: str
    text: str
    messages: list[bytes]


def deliver(
    directory: Path,
    zone: Zone,
    port: int = 1,
    load: Delivery | None = None,
    target: Target = EVA[0],
    fetch: chasquid.FetchPolicy = no_policy,
) -> chasquid.Result:
    """Let a courier deliver one message; what it keeps and logs is below `directory`."""
    log = record(directory)

    async def main(loop: chasquid.Loop) -> chasquid.Result:
        names = chasquid.Names(loop, zone.ask)
        policies = tls_policies(loop, names, log, directory, fetch)
        courier = chasquid.SmtpCourier(loop, names, log, policies, HOST, port, lambda: 0.5)
        [result] = await courier.deliver(load or delivery(), [target])
        return result

    try:
        return run(main)
    finally:
        log.close()


def attempt(
    directory: Path,
    *scripts: str,
    peer: Peer | None = None,
    records: Records = MX,
    tlsa: Any = None,
    unsigned: Sequence[tuple[str, str]] = (),
    **more: Any,
) -> Attempt:
    """Let a courier deliver to a server that follows `scripts`.

    With `tlsa`, the zone is signed, and has these records for the server's port.
    """
    peer = peer or Peer(*scripts, names=("mx.there.example",))
    with peer:
        zone = Zone(records)
        if tlsa is not None:
            question = (f"_{peer.port}._tcp.mx.there.example", "TLSA")
            unsigned = [question if one == ("", "TLSA") else one for one in unsigned]
            zone = SignedZone({**records, question: tlsa}, unsigned)
        result = deliver(directory, zone, peer.port, **more)
    return Attempt(result.state, result.status, result.text, peer.messages)


DELIVERED = STARTTLS + SECURE + ENVELOPE + CONTENT
REFUSES_CERTIFICATE = STARTTLS + "S: 220 go on\n* TLS\n* close"
NO_TLS = GREETING + "* closed"
BROKEN = {
    "no STARTTLS": NO_TLS,
    "STARTTLS refused": STARTTLS + "S: 454 4.7.0 not today\n* closed",
    "no handshake": STARTTLS + "S: 220 go on\nS: this is no handshake\n* close",
    "closed": STARTTLS + "S: 220 go on\n* close",
}


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the certificate of mx.there.example be valid."""
    chain = write_certificate(tmp_path / "authority", "mx.there.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))


def assert_refused(found: Attempt, *texts: str) -> None:
    assert (found.state, found.status, found.messages) == (DEFERRED, "4.7.5", []), found
    for text in (*texts, "less is not safe"):
        assert text in found.text


def test_a_server_without_tls_teaches_nothing(tmp_path: Path) -> None:
    assert attempt(tmp_path, GREETING + ENVELOPE + CONTENT).state == SENT
    assert not (tmp_path / "domaininfo").exists()


def test_tls_is_learned(tmp_path: Path) -> None:
    assert attempt(tmp_path, REFUSES_CERTIFICATE, DELIVERED).state == SENT
    assert domain_file(tmp_path).read_text() == domain_text(PLAIN, TLS_INSECURE)


def test_tls_with_a_valid_certificate_is_learned(tmp_path: Path, trusted: None) -> None:
    remember(tmp_path, TLS_INSECURE)
    assert attempt(tmp_path, DELIVERED).state == SENT
    assert domain_file(tmp_path).read_text() == domain_text(PLAIN, TLS_SECURE)


def test_the_level_is_learned_also_where_the_message_is_refused(tmp_path: Path) -> None:
    refusal = "C: MAIL FROM:…\nS: 550 5.7.1 no\n* closed"
    unwanted = (STARTTLS + SECURE + refusal).replace("* closed", "C: QUIT\nS: 221 bye")
    assert attempt(tmp_path, REFUSES_CERTIFICATE, unwanted).state == FAILED
    assert kept(tmp_path).outgoing == TLS_INSECURE


def test_the_level_is_of_the_domain_in_unicode(tmp_path: Path) -> None:
    records = {("xn--bcher-kva.example", "MX"): ("10 mx.there.example.",),
               ("mx.there.example", "A"): ("127.0.0.1",)}  # fmt: skip
    rcpt = ENVELOPE.replace("TO:<eva@there", "TO:<eva@xn--bcher-kva")
    scripts = [REFUSES_CERTIFICATE, STARTTLS + SECURE + rcpt + CONTENT]
    target = address("eva@bücher.example")
    assert attempt(tmp_path, *scripts, records=records, target=target).state == SENT
    assert kept(tmp_path, "bücher.example").outgoing == TLS_INSECURE


def test_the_level_is_of_the_host_where_that_is_named(tmp_path: Path) -> None:
    with Peer(REFUSES_CERTIFICATE, DELIVERED, names=("mx.there.example",)) as peer:
        target = address("eva@there.example", f"mx.there.example:{peer.port}")
        assert deliver(tmp_path, Zone(MX), target=target).state == SENT
    assert kept(tmp_path, "mx.there.example").outgoing == TLS_INSECURE
    assert kept(tmp_path, "there.example") == DomainInfo()


@pytest.mark.parametrize("level", [TLS_INSECURE, TLS_SECURE])
@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_who_has_shown_tls_gets_nothing_without(tmp_path: Path, level: str, script: str) -> None:
    remember(tmp_path, level)
    assert_refused(attempt(tmp_path, script), f"it was {level} before")
    assert kept(tmp_path).outgoing == level


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_downgrade_is_counted_and_told(tmp_path: Path, script: str) -> None:
    remember(tmp_path, TLS_INSECURE)
    log = record(tmp_path)

    async def main(loop: chasquid.Loop) -> chasquid.Result:
        names = chasquid.Names(loop, Zone(MX).ask)
        policies = tls_policies(loop, names, log, tmp_path)
        courier = chasquid.SmtpCourier(loop, names, log, policies, HOST, peer.port, lambda: 0.5)
        [result] = await courier.deliver(delivery(), EVA)
        return result

    with Peer(script, names=("mx.there.example",)) as peer:
        result = run(main)
    assert log.counters["security levels", "refused", "out"] == 1
    assert result.text.startswith(f"mx.there.example (127.0.0.1:{peer.port}): ")


def test_who_has_shown_no_valid_certificate_need_not_now(tmp_path: Path) -> None:
    remember(tmp_path, TLS_INSECURE)
    assert attempt(tmp_path, REFUSES_CERTIFICATE, DELIVERED).state == SENT


def test_who_has_shown_a_valid_certificate_gets_nothing_with_another(tmp_path: Path) -> None:
    remember(tmp_path, TLS_SECURE)
    found = attempt(tmp_path, REFUSES_CERTIFICATE)
    assert_refused(found, "the certificate is not valid", "it was TLS_SECURE before")


def test_a_certificate_for_another_name_is_not_valid(tmp_path: Path, trusted: None) -> None:
    remember(tmp_path, TLS_SECURE)
    records = {
        ("there.example", "MX"): ("10 other.example.",),
        ("other.example", "A"): ("127.0.0.1",),
    }
    assert_refused(attempt(tmp_path, REFUSES_CERTIFICATE, records=records), "not valid")


def test_who_has_shown_a_valid_certificate_gets_mail_with_one(
    tmp_path: Path, trusted: None
) -> None:
    remember(tmp_path, TLS_SECURE)
    assert attempt(tmp_path, DELIVERED).state == SENT


def test_where_one_server_is_not_safe_the_next_is_tried(tmp_path: Path) -> None:
    remember(tmp_path, TLS_INSECURE)
    records = {**MX, ("there.example", "MX"): ("5 a.example.", "10 mx.there.example."),
               ("a.example", "A"): ("127.0.0.1",)}  # fmt: skip
    assert attempt(tmp_path, NO_TLS, REFUSES_CERTIFICATE, DELIVERED, records=records).state == SENT


# --- security levels: forgetting them ---


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


@pytest.mark.parametrize("record", ["", "3", "3 1", "3 1 1", "x y z w", "3 1 1 zz"])
def test_a_record_that_is_no_tlsa_cannot_be_used(record: str) -> None:
    assert chasquid.parse_tlsa(record) is None


# --- DANE: records ---

PEM = certificate("mx.there.example")[0]
DER = ssl.PEM_cert_to_DER_cert(PEM)
_POINT = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
KEY = DER[DER.index(_POINT) :][:91]  # the key of the curve P-256 and what stands before it
CONTENTS = {0: DER, 1: KEY}
HASHES: dict[int, Callable[[bytes], bytes]] = {
    0: lambda data: data,
    1: lambda data: hashlib.sha256(data).digest(),
    2: lambda data: hashlib.sha512(data).digest(),
}
SELECTIONS = [(selector, matching) for selector in CONTENTS for matching in HASHES]


def tlsa(usage: int, selector: int = 1, matching: int = 1, der: bytes = DER) -> str:
    content = der if selector == 0 else chasquid.public_key_info(der)
    return f"{usage} {selector} {matching} {HASHES[matching](content).hex()}"


WRONG = f"3 1 1 {'5a' * 32}"


def test_a_record_is_parsed() -> None:
    assert chasquid.parse_tlsa("3 1 1 0aFF") == Tlsa(3, 1, 1, b"\x0a\xff")
    assert chasquid.parse_tlsa("2 0 2 0aff 00 c0ff") == Tlsa(2, 0, 2, b"\x0a\xff\0\xc0\xff")


@pytest.mark.parametrize(
    "text",
    ["0 0 1 ab", "1 1 1 ab", "4 1 1 ab", "255 1 1 ab", "-3 1 1 ab", "3 2 1 ab", "3 255 1 ab",
     "3 1 3 ab", "3 1 255 ab", "3 1 1", "3 1 1 ", "3 1 1 abc", "3 1 1 xy", "x 1 1 ab"],
)  # fmt: skip
def test_a_record_that_cannot_be_used(text: str) -> None:
    assert chasquid.parse_tlsa(text) is None


@given(
    st.builds(
        Tlsa,
        st.integers(2, 3),
        st.integers(0, 1),
        st.integers(0, 2),
        st.binary(min_size=1, max_size=70),
    ),
    st.integers(1, 70),
)
def test_a_record_survives_its_text(record: Tlsa, step: int) -> None:
    digits = record.data.hex()
    pieces = " ".join(digits[start : start + step] for start in range(0, len(digits), step))
    text = f"{record.usage} {record.selector} {record.matching} {pieces}"
    assert chasquid.parse_tlsa(text) == record


@pytest.mark.parametrize(("selector", "matching"), SELECTIONS)
def test_a_record_matches_its_certificate_alone(selector: int, matching: int) -> None:
    data = HASHES[matching](CONTENTS[selector])
    for usage in (2, 3):
        assert Tlsa(usage, selector, matching, data).matches(DER)
        assert not Tlsa(usage, 1 - selector, matching, data).matches(DER)
        assert not Tlsa(usage, selector, (matching + 1) % 3, data).matches(DER)
        for changed in (data[:-1], data + b"\0", data[:-1] + bytes([data[-1] ^ 1]), b""):
            assert not Tlsa(usage, selector, matching, changed).matches(DER)
        other = ssl.PEM_cert_to_DER_cert(certificate("other.example")[0])
        assert not Tlsa(usage, selector, matching, data).matches(other)


@pytest.mark.parametrize(
    "der",
    [b"", b"\x30", b"\x30\x03\x02\x01\x01", DER[:40], b"\xff" * 50],
    ids=["empty", "a tag", "a number", "cut short", "noise"],
)
def test_what_is_no_certificate_matches_nothing(der: bytes) -> None:
    assert not Tlsa(3, 1, 1, hashlib.sha256(b"").digest()).matches(der)
    assert not Tlsa(3, 1, 0, b"").matches(der)


# --- DANE: deliveries ---


@pytest.mark.parametrize(("selector", "matching"), SELECTIONS)
def test_a_certificate_that_is_in_the_dns_is_safe(
    tmp_path: Path, selector: int, matching: int
) -> None:
    records = [tlsa(3, selector, matching)]
    assert attempt(tmp_path, DELIVERED, tlsa=records).state == SENT


def test_one_of_several_records_is_enough(tmp_path: Path) -> None:
    records = [WRONG, "0 0 0 ab", tlsa(2), tlsa(3)]
    assert attempt(tmp_path, DELIVERED, tlsa=records).state == SENT


def test_the_server_s_own_certificate_need_not_bear_its_name(tmp_path: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert(certificate("other.example")[0])
    peer = Peer(DELIVERED, names=("other.example",))
    assert attempt(tmp_path, peer=peer, tlsa=[tlsa(3, der=der)]).state == SENT


def test_dane_teaches_no_more_than_that_there_is_tls(tmp_path: Path) -> None:
    assert attempt(tmp_path, DELIVERED, tlsa=[tlsa(3)]).state == SENT
    assert kept(tmp_path).outgoing == TLS_INSECURE
    assert attempt(tmp_path, REFUSES_CERTIFICATE, DELIVERED).state == SENT


def test_another_certificate_gets_nothing_though_it_is_valid(tmp_path: Path, trusted: None) -> None:
    found = attempt(tmp_path, STARTTLS + SECURE + "* closed", tlsa=[WRONG])
    assert_refused(found, "matches no TLSA record", "DANE")


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_with_a_record_nothing_goes_without_tls(tmp_path: Path, script: str) -> None:
    assert_refused(attempt(tmp_path, script, tlsa=[tlsa(3)]), "DANE")


@pytest.mark.parametrize("text", ["0 0 1 ab", "1 1 1 ab", "3 2 1 ab", "3 1 3 ab"])
def test_records_that_cannot_be_used_still_demand_tls(tmp_path: Path, text: str) -> None:
    assert attempt(tmp_path, REFUSES_CERTIFICATE, DELIVERED, tlsa=[text]).state == SENT
    domain_file(tmp_path).unlink()
    for script in BROKEN.values():
        assert_refused(attempt(tmp_path, script, tlsa=[text]), "DANE")


def test_records_that_cannot_be_used_lower_no_level(tmp_path: Path) -> None:
    remember(tmp_path, TLS_SECURE)
    assert_refused(attempt(tmp_path, REFUSES_CERTIFICATE, tlsa=["1 1 1 ab"]), "TLS_SECURE")


@pytest.mark.parametrize(
    "failing",
    [
        ("there.example", "MX"),
        ("mx.there.example", "A"),
        ("_1._tcp.mx.there.example", "TLSA"),
    ],
)
def test_where_the_records_cannot_be_had_nothing_is_sent(
    tmp_path: Path, failing: tuple[str, str]
) -> None:
    result = deliver(tmp_path, SignedZone({**MX, failing: DOWN}))
    assert (result.state, result.status) == (DEFERRED, "4.4.3")
    assert "down" in result.text


@pytest.mark.parametrize(
    "unsigned", [("there.example", "MX"), ("mx.there.example", "A"), ("", "TLSA")]
)
def test_records_that_are_not_authentic_are_nothing(
    tmp_path: Path, unsigned: tuple[str, str]
) -> None:
    found = attempt(tmp_path, GREETING + ENVELOPE + CONTENT, tlsa=[WRONG], unsigned=[unsigned])
    assert found.state == SENT


@pytest.mark.parametrize("question", [("there.example", "MX"), ("mx.there.example", "A")])
def test_records_are_not_even_asked_for_where_the_domain_is_not_signed(
    tmp_path: Path, question: tuple[str, str]
) -> None:
    zone = SignedZone({**MX, ("_1._tcp.mx.there.example", "TLSA"): DOWN}, [question])
    assert "cannot connect" in deliver(tmp_path, zone).text
    assert "TLSA" not in [kind for _, kind in zone.asked]


def test_a_server_that_somebody_here_named_needs_no_signed_mx(tmp_path: Path) -> None:
    with Peer(STARTTLS + SECURE + "* closed", names=("mx.there.example",)) as peer:
        zone = SignedZone({**MX, (f"_{peer.port}._tcp.mx.there.example", "TLSA"): [WRONG]})
        target = address("eva@there.example", f"mx.there.example:{peer.port}")
        result = deliver(tmp_path, zone, target=target)
    assert (result.state, result.status) == (DEFERRED, "4.7.5")
    assert ("there.example", "MX") not in zone.asked


# --- DANE: authorities ---


class Issued(NamedTuple):
    """A certificate and its key."""

    chain: str
    key: str

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.chain)


def issue(directory: Path, name: str, issuer: Issued | None = None) -> Issued:
    """Make a certificate for `name`; an authority where there is no `issuer`."""
    place = Path(directory) / f"{len(list(directory.iterdir()))}-{name}"
    place.mkdir()
    (place / "extensions").write_text(
        f"subjectAltName=DNS:{name}\nbasicConstraints=CA:FALSE\n"
        if issuer
        else "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\n"
    )
    run_openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", place / "key")
    run_openssl("req", "-new", "-key", place / "key", "-subj", f"/CN={name}", "-out", place / "csr")
    signing: list[object] = ["-signkey", place / "key"]
    if issuer is not None:
        (place / "ca").write_text(issuer.chain)
        (place / "ca-key").write_text(issuer.key)
        signing = ["-CA", place / "ca", "-CAkey", place / "ca-key", "-CAcreateserial"]
    run_openssl("x509", "-req", "-in", place / "csr", *signing, "-days", "2", "-out", place / "crt",
                "-extfile", place / "extensions")  # fmt: skip
    return Issued((place / "crt").read_text(), (place / "key").read_text())


def run_openssl(*arguments: object) -> None:
    command = ["openssl", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


class Authorities(NamedTuple):
    """Two authorities, and servers of the first: the right one, and one of another name."""

    one: Issued
    other: Issued
    server: Issued
    misnamed: Issued


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    place = tmp_path_factory.mktemp("authorities")
    one, other = issue(place, "One"), issue(place, "Other")
    server = issue(place, "mx.there.example", one)
    return Authorities(one, other, server, issue(place, "other.example", one))


class Chained(Peer):
    """A peer that shows a given chain."""

    def __init__(self, *scripts: str, chain: Sequence[Issued], directory: Path) -> None:
        super().__init__(*scripts)
        (directory / "chain.pem").write_text("".join(one.chain for one in chain))
        (directory / "key.pem").write_text(chain[0].key)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "chain.pem", directory / "key.pem")

    def _step(self, wire: Wire, kind: str, rest: str) -> None:
        if (kind, rest) == ("*", "TLS"):
            with contextlib.suppress(ssl.SSLError):
                wire.start_tls(self._context, server_side=True)
        else:
            super()._step(wire, kind, rest)


LOOKED_AT = STARTTLS + SECURE + "* closed"


@needs_openssl
@pytest.mark.parametrize(("selector", "matching"), SELECTIONS)
def test_a_server_is_safe_whose_authority_is_in_the_dns(
    tmp_path: Path, authorities: Authorities, selector: int, matching: int
) -> None:
    chain = [authorities.server, authorities.one]
    peer = Chained(LOOKED_AT, DELIVERED, chain=chain, directory=tmp_path)
    records = [tlsa(2, selector, matching, authorities.one.der)]
    assert attempt(tmp_path, peer=peer, tlsa=records).state == SENT


@needs_openssl
def test_an_authority_does_not_make_up_for_the_wrong_name(
    tmp_path: Path, authorities: Authorities
) -> None:
    chain = [authorities.misnamed, authorities.one]
    peer = Chained(LOOKED_AT, REFUSES_CERTIFICATE, chain=chain, directory=tmp_path)
    found = attempt(tmp_path, peer=peer, tlsa=[tlsa(2, der=authorities.one.der)])
    assert_refused(found, "the certificate is not valid", "DANE")


@needs_openssl
def test_an_authority_that_is_shown_but_has_not_signed_is_not_enough(
    tmp_path: Path, authorities: Authorities
) -> None:
    chain = [authorities.server, authorities.other]
    peer = Chained(LOOKED_AT, REFUSES_CERTIFICATE, chain=chain, directory=tmp_path)
    found = attempt(tmp_path, peer=peer, tlsa=[tlsa(2, der=authorities.other.der)])
    assert_refused(found, "the certificate is not valid", "DANE")


@needs_openssl
@pytest.mark.parametrize("usage", [2, 3])
def test_an_authority_that_is_not_in_the_dns_is_not_enough(
    tmp_path: Path, authorities: Authorities, usage: int
) -> None:
    chain = [authorities.server, authorities.one]
    peer = Chained(LOOKED_AT, chain=chain, directory=tmp_path)
    wanted = authorities.other if usage == 2 else authorities.one  # 3 is the server's own alone
    found = attempt(tmp_path, peer=peer, tlsa=[tlsa(usage, der=wanted.der)])
    assert_refused(found, "matches no TLSA record", "DANE")


# --- DANE: whose word is taken for it that an answer is authentic ---


def own_address() -> str:
    """Return an address of this machine that is not on loopback, or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return ""
        found = str(probe.getsockname()[0])
    return "" if found.startswith(("127.", "0.")) else found


@contextlib.contextmanager
def name_server(host: str, authentic: bool, seen: list[int]) -> Iterator[str]:
    """Answer every question, with the AD bit or without; `seen` gets the bits of questions."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as raw:
        try:
            raw.bind((host, 0))
        except OSError:
            pytest.skip(f"there is no {host}")

        def serve() -> None:
            while True:
                wire, client = raw.recvfrom(4096)
                if not wire:
                    return
                query = dns.message.from_wire(wire)
                seen.append(int(query.flags))
                response = dns.message.make_response(query)
                response.flags |= dns.flags.RA | (dns.flags.AD if authentic else 0)
                question = query.question[0]
                if question.rdtype.name == "A":
                    response.answer.append(
                        dns.rrset.from_text(question.name, 60, "IN", "A", "192.0.2.1")
                    )
                raw.sendto(response.to_wire(), client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            number = raw.getsockname()[1]
            yield f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
        finally:
            with socket.socket(family, socket.SOCK_DGRAM) as bell:
                bell.sendto(b"", raw.getsockname())
            thread.join()


def question(place: str, kind: str, trust_ad: bool) -> chasquid.Answer:
    async def main(loop: chasquid.Loop) -> chasquid.Answer:
        return await chasquid.DnsClient(loop, [place], trust_ad).ask("there.example", kind)

    return run(main)


@pytest.mark.parametrize("kind", ["A", "MX"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1"])
@pytest.mark.parametrize("authentic", [True, False])
def test_a_server_on_this_machine_is_believed_what_is_authentic(
    host: str, authentic: bool, kind: str
) -> None:
    seen: list[int] = []
    with name_server(host, authentic, seen) as place:
        for trust_ad in (False, True):
            answer = question(place, kind, trust_ad)
            assert answer.records == (("192.0.2.1",) if kind == "A" else ())
            assert answer.authentic is authentic
    assert all(flags & dns.flags.AD for flags in seen)


@pytest.mark.parametrize("authentic", [True, False])
def test_another_server_is_believed_only_where_that_is_set(authentic: bool) -> None:
    host = own_address()
    if not host:
        pytest.skip("this machine has no address but those on loopback")
    with name_server(host, authentic, []) as place:
        assert question(place, "A", False) == chasquid.Answer(True, ("192.0.2.1",), 60, False)
        assert question(place, "A", True) == chasquid.Answer(True, ("192.0.2.1",), 60, authentic)


# --- MTA-STS: policies ---

POLICY = b"version: STSv1\nmode: enforce\nmx: mx.there.example\nmax_age: 86400\n"


def parse(text: bytes) -> StsPolicy:
    return chasquid.parse_sts_policy(text, "1", 5.0)


@pytest.mark.parametrize(
    "text",
    [
        POLICY,
        POLICY.replace(b"\n", b"\r\n"),
        POLICY.rstrip(b"\n"),
        b"\n\n" + POLICY + b"\n\r\n\n",
        POLICY.replace(b": ", b":"),
        POLICY.replace(b": ", b" :\t  ").replace(b"\n", b" \n"),
        POLICY + b"x-more: hello\nno colon\n: nothing\n\xff\xfe: \xff\n",
        b"x: y\n" + POLICY,
        b"max_age: 86400\nmx: mx.there.example\nmode: enforce\nversion: STSv1\n",
        POLICY.replace(b"mx.there.example", b"MX.There.Example."),
    ],
)
def test_a_policy_however_it_is_written(text: bytes) -> None:
    assert parse(text) == StsPolicy("1", "enforce", ("mx.there.example",), 86400, 5.0)


def test_a_policy_may_name_several_servers_and_patterns() -> None:
    assert parse(POLICY + b"mx: *.example.net\nmx: b.example").mx == (
        "mx.there.example", "*.example.net", "b.example",
    )  # fmt: skip


def test_a_policy_of_the_mode_none_needs_no_server() -> None:
    assert parse(b"version: STSv1\nmode: none\nmax_age: 0") == StsPolicy("1", "none", (), 0, 5.0)


@pytest.mark.parametrize(
    ("age", "expected"),
    [("0", 0), ("31557600", 31557600), ("31557601", 31557600), ("9" * 10, 31557600)],
)
def test_no_policy_is_kept_longer_than_a_year(age: str, expected: int) -> None:
    assert parse(POLICY.replace(b"86400", age.encode())).max_age == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b"version: STSv1\n", b"", "version"),
        (b"STSv1", b"STSv2", "version"),
        (b"STSv1", b"stsv1", "version"),
        (b"version", b"Version", "version"),
        (b"\n", b"\r", "version"),
        (b"mode: enforce\n", b"", "mode"),
        (b"enforce", b"Enforce", "mode"),
        (b"enforce", b"report", "mode"),
        (b"mx: mx.there.example\n", b"", "mx"),
        (b"max_age: 86400\n", b"", "max_age"),
        (b"86400", b"", "max_age"),
        (b"86400", b"-1", "max_age"),
        (b"86400", b"1.5", "max_age"),
        (b"86400", b"1 day", "max_age"),
        (b"86400", b"1" * 11, "max_age"),
        (POLICY, b"", "version"),
        (POLICY, b"<html></html>", "version"),
        (POLICY, b"\xff\xfe" * 100, "version"),
    ],
)
def test_what_is_no_policy(old: bytes, new: bytes, expected: str) -> None:
    assert old in POLICY
    with pytest.raises(ValueError, match=f"expected {expected}"):
        parse(POLICY.replace(old, new))


def test_a_server_without_a_name_is_none() -> None:
    with pytest.raises(ValueError, match="expected mx"):
        parse(POLICY.replace(b"mx.there.example", b""))


@given(st.binary(max_size=200) | st.lists(st.sampled_from(
    [*POLICY.split(b"\n"), b"mx: *.a.example", b"\r", b"mode: none", b"max_age: \xd9\xa3", b":"]
)).map(b"\n".join))  # fmt: skip
def test_a_policy_is_right_or_a_value_error(text: bytes) -> None:
    try:
        found = parse(text)
    except ValueError as error:
        assert "expected" in str(error)
    else:
        assert found.mode == "none" or found.mx
        assert 0 <= found.max_age <= 31557600


@pytest.mark.parametrize(
    ("pattern", "host", "expected"),
    [
        ("mx.there.example", "mx.there.example", True),
        ("mx.there.example", "there.example", False),
        ("mx.there.example", "a.mx.there.example", False),
        ("mx.there.example", "xmx.there.example", False),
        ("*.there.example", "mx.there.example", True),
        ("*.there.example", "there.example", False),
        ("*.there.example", "a.mx.there.example", False),
        ("*.there.example", "mx.nothere.example", False),
        ("m*.there.example", "mx.there.example", False),
        ("*", "mx.there.example", False),
        ("*.*.example", "mx.there.example", False),
        ("mx.*.example", "mx.there.example", False),
    ],
)
def test_a_pattern_stands_for_one_label(pattern: str, host: str, expected: bool) -> None:
    policy = StsPolicy("1", "enforce", ("other.example", pattern), 86400, 0.0)
    assert policy.allows(host) is expected


# --- MTA-STS: what is fetched, kept and fetched again ---


class Web:
    """The policies of domains, and how often they were fetched."""

    def __init__(self) -> None:
        self.found: dict[str, bytes | Exception] = {}
        self.fetched: list[str] = []
        self.gate: chasquid.Event | None = None

    async def fetch(self, domain: str) -> bytes:
        self.fetched.append(domain)
        if self.gate is not None:
            await self.gate.wait()
        found = self.found.get(domain, chasquid.ChasquidError("there is no web server"))
        if isinstance(found, Exception):
            raise found
        return found


class Sts:
    """The policies of a server over its lives; `announce` sets a domain's TXT record."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = FakeClock()
        self.web = Web()
        self.records: dict[tuple[str, str], Any] = {}
        self.policies: chasquid.StsPolicies
        self.loop: chasquid.Loop
        self.counters: Mapping[tuple[str, ...], int] = {}
        self.announce("1")
        self.publish()

    def announce(self, id: str | None, domain: str = "there.example") -> None:
        texts = [] if id is None else ["v=spf1 -all", f"v=STSv1; id={id};"]
        self.records[f"_mta-sts.{domain}", "TXT"] = texts

    def publish(
        self, mode: str = "enforce", age: int = 86400, domain: str = "there.example"
    ) -> None:
        text = POLICY.replace(b"enforce", mode.encode()).replace(b"86400", str(age).encode())
        self.web.found[domain] = text

    def live(self, main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run `main` in a server that has just been started."""

        async def started(loop: chasquid.Loop) -> Any:
            log = record(self.directory, self.clock)
            self.loop = loop
            names = chasquid.Names(loop, Zone(self.records).ask)
            self.policies = chasquid.StsPolicies(
                loop, log, names, self.web.fetch, str(self.directory / "sts-cache")
            )
            self.policies.load()
            self.counters = log.counters
            try:
                return await main()
            finally:
                log.close()

        return run(started, clock=self.clock, workers=Inline())

    async def mode(self, domain: str = "there.example") -> str:
        """Return the mode of the policy that is in force, or "" where there is none."""
        policy = await self.policies.policy(domain)
        return policy.mode if policy else ""

    def wait(self, seconds: float) -> None:
        """Let time pass, and answers of the DNS be forgotten."""
        self.clock.advance(max(seconds, 301))


@pytest.fixture
def sts(tmp_path: Path) -> Sts:
    return Sts(tmp_path)


def test_a_policy_is_fetched_once_and_kept(sts: Sts) -> None:
    async def main() -> None:
        for _ in range(3):
            policy = await sts.policies.policy("there.example")
            assert policy == StsPolicy(
                "1", "enforce", ("mx.there.example",), 86400, 1_700_000_000.0
            )
            sts.wait(3600)
        assert sts.web.fetched == ["there.example"]
        assert sts.counters["mta-sts", "fetched"] == 1

    sts.live(main)


def test_without_an_announcement_nothing_is_fetched(sts: Sts) -> None:
    async def main() -> None:
        for domain in ("other.example", "there.example"):
            assert await sts.policies.policy(domain) is None
        assert sts.web.fetched == []

    sts.announce(None)
    sts.live(main)


@pytest.mark.parametrize(
    "texts",
    [
        ["v=STSv1"],
        ["v=STSv1;"],
        ["v=STSv1; id="],
        ["v=STSv1; id=a-b"],
        ["v=STSv1; id=" + "1" * 33],
        ["v=STSv2; id=1"],
        ["v=STSv10; id=1"],
        ["x=y; v=STSv1; id=1"],
        ["v=stsv1; id=1"],
        ["id=1; v=STSv1"],
        ["v=STSv1; uid=1"],
        ["v=STSv1; id=1", "v=STSv1; id=1"],
        ["v=STSv1; id=1", "v=STSv1; id=2"],
        DOWN,
    ],
)
def test_an_announcement_that_is_none(sts: Sts, texts: Any) -> None:
    sts.records["_mta-sts.there.example", "TXT"] = texts
    assert sts.live(sts.mode) == ""
    assert sts.web.fetched == []


@pytest.mark.parametrize(
    "text",
    ["v=STSv1; id=1", "v=STSv1;id=1;", "v=STSv1 ; id = 1 ; x=y", "v=STSv1; x=y; id=1",
     "v=STSv1; id=" + "a" * 32],
)  # fmt: skip
def test_an_announcement_however_it_is_written(sts: Sts, text: str) -> None:
    sts.records["_mta-sts.there.example", "TXT"] = [text, "hello"]
    assert sts.live(sts.mode) == "enforce"


def test_another_id_has_the_policy_fetched_again(sts: Sts) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.announce("2")
        sts.publish("testing")
        assert await sts.mode() == "enforce", "the announcement is still in the cache"
        sts.wait(301)
        assert await sts.mode() == "testing"
        assert len(sts.web.fetched) == 2

    sts.live(main)


@pytest.mark.parametrize("answer", [chasquid.ChasquidError("down"), b"<html>", OSError("down")])
def test_the_old_policy_holds_while_the_new_cannot_be_had_until_it_is_too_old(
    sts: Sts, answer: Any
) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.announce("2")
        sts.web.found["there.example"] = answer
        for _ in range(3):
            sts.wait(20_000)
            assert await sts.mode() == "enforce"
        assert len(sts.web.fetched) == 4
        assert sts.counters["mta-sts", "failed"] == 3
        sts.wait(86_400 - 60_000 + 1)
        assert await sts.mode() == ""

    sts.live(main)
    assert "the policy of there.example cannot be had" in (sts.directory / "server.log").read_text()


def test_after_a_failure_nothing_is_fetched_for_five_minutes(sts: Sts) -> None:
    async def main() -> None:
        sts.web.found.clear()
        for seconds, count in ((0, 1), (299, 1), (2, 2), (298, 2), (3, 3)):
            sts.clock.advance(seconds)
            assert await sts.mode() == ""
            assert len(sts.web.fetched) == count
        sts.publish()
        sts.clock.advance(301)
        assert await sts.mode() == "enforce"

    sts.live(main)


def test_the_pause_is_of_one_domain_alone(sts: Sts) -> None:
    async def main() -> None:
        sts.announce("1", "other.example")
        assert await sts.mode("other.example") == ""
        assert await sts.mode() == "enforce"

    sts.live(main)


@pytest.mark.parametrize("texts", [[], DOWN, ["v=STSv1; id="]])
def test_a_policy_holds_without_its_announcement_until_it_is_too_old(sts: Sts, texts: Any) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.records["_mta-sts.there.example", "TXT"] = texts
        sts.wait(86_400)
        assert await sts.mode() == "enforce"
        sts.wait(1)
        assert await sts.mode() == ""

    sts.live(main)


def test_an_old_policy_is_replaced_by_the_same_one(sts: Sts) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.wait(86_401)
        assert await sts.mode() == "enforce"
        assert len(sts.web.fetched) == 2

    sts.live(main)


def test_two_deliveries_at_once_fetch_once(sts: Sts) -> None:
    async def main() -> None:
        sts.web.gate = chasquid.Event(sts.loop)
        tasks = [sts.loop.spawn(sts.mode(), "delivery") for _ in range(3)]
        await turns(sts.loop)
        assert not any(task.done for task in tasks)
        sts.web.gate.set()
        assert [await task.join() for task in tasks] == ["enforce"] * 3
        assert len(sts.web.fetched) == 1

    sts.live(main)


def test_a_delivery_that_is_given_up_spoils_nothing_for_the_other(sts: Sts) -> None:
    async def main() -> None:
        sts.web.gate = chasquid.Event(sts.loop)
        tasks = [sts.loop.spawn(sts.mode(), "delivery") for _ in range(2)]
        await turns(sts.loop)
        tasks[0].cancel()
        await turns(sts.loop)
        sts.web.gate.set()
        assert await tasks[1].join() == "enforce"

    sts.live(main)


def test_a_web_server_that_is_silent_is_waited_for_one_minute(sts: Sts) -> None:
    async def main() -> None:
        sts.web.gate = chasquid.Event(sts.loop)
        task = sts.loop.spawn(sts.mode(), "delivery")
        for seconds, done in ((59, False), (2, True)):
            await turns(sts.loop)
            sts.clock.advance(seconds)
            await turns(sts.loop)
            assert task.done is done
        assert await task.join() == ""
        assert sts.counters["mta-sts", "failed"] == 1
        sts.web.gate.set()
        sts.clock.advance(301)
        assert await sts.mode() == "enforce"

    sts.live(main)


def test_a_restart_reads_what_is_on_the_disk(sts: Sts) -> None:
    assert sts.live(sts.mode) == "enforce"
    sts.web.found.clear()
    sts.records["_mta-sts.there.example", "TXT"] = DOWN
    assert sts.live(sts.mode) == "enforce"
    sts.wait(86_401)
    assert sts.live(sts.mode) == ""
    assert len(sts.web.fetched) == 1


def test_the_whole_policy_survives_a_restart(sts: Sts) -> None:
    sts.web.found["there.example"] = POLICY + b"mx: *.example.net\n"
    before = sts.live(lambda: sts.policies.policy("there.example"))
    after = sts.live(lambda: sts.policies.policy("there.example"))
    assert before == after
    assert after.allows("a.example.net")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"{}", b'{"mx": 5}', b'{"mx": ["a"]}', b"\xff\0",
     b'{"id": "1", "mode": "enforce", "mx": ["a"], "max_age": 5, "fetched": 0, "more": 1}'],
)  # fmt: skip
def test_a_corrupt_file_is_passed_over(sts: Sts, content: bytes) -> None:
    cache = sts.directory / "sts-cache"
    cache.mkdir()
    (cache / "there.example").write_bytes(content)
    (cache / "directory").mkdir()
    assert sts.live(sts.mode) == "enforce"
    assert json.loads((cache / "there.example").read_bytes())["id"] == "1"


@pytest.mark.parametrize(
    "changed", [{"max_age": "86400"}, {"fetched": None}, {"mode": 5, "max_age": [1]}, {"mx": [5]}]
)
def test_a_file_with_values_of_the_wrong_kind_is_passed_over(
    sts: Sts, changed: dict[str, Any]
) -> None:
    policy = StsPolicy("1", "none", ("mx.there.example",), 86400, sts.clock.now)
    cache = sts.directory / "sts-cache"
    cache.mkdir()
    (cache / "there.example").write_text(json.dumps({**policy._asdict(), **changed}))
    assert sts.live(sts.mode) == "enforce"


def test_a_cache_that_cannot_be_written_keeps_nothing_but_the_memory(sts: Sts) -> None:
    (sts.directory / "sts-cache").write_text("in the way")

    async def main() -> None:
        for _ in range(2):
            assert await sts.mode() == "enforce"

    sts.live(main)
    assert len(sts.web.fetched) == 1
    assert "cannot be written" in (sts.directory / "server.log").read_text()


def test_a_policy_is_refreshed_before_it_is_too_old(sts: Sts) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.publish("testing", age=7 * 86_400)
        task = sts.loop.spawn(sts.policies.refresh_forever(), "refresh")
        await turns(sts.loop)
        for count in (1, 1, 1, 2, 2, 2, 2, 3):
            sts.clock.advance(6 * 3600 + 1)
            await turns(sts.loop)
            assert len(sts.web.fetched) == count
        assert await sts.mode() == "testing"
        task.cancel()

    sts.publish(age=7 * 86_400)
    sts.live(main)


def test_a_policy_of_a_few_hours_is_refreshed_earlier(sts: Sts) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        task = sts.loop.spawn(sts.policies.refresh_forever(), "refresh")
        await turns(sts.loop)
        sts.clock.advance(6 * 3600 + 1)
        await turns(sts.loop)
        assert len(sts.web.fetched) == 2
        task.cancel()

    sts.publish(age=10 * 3600)
    sts.live(main)


def test_a_refresh_that_fails_leaves_the_policy_and_the_next_mends_it(sts: Sts) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        task = sts.loop.spawn(sts.policies.refresh_forever(), "refresh")
        await turns(sts.loop)
        sts.web.found.clear()
        sts.clock.advance(6 * 3600 + 1)
        await turns(sts.loop)
        assert await sts.mode() == "enforce"
        sts.publish("testing")
        sts.clock.advance(6 * 3600 + 1)
        await turns(sts.loop)
        assert await sts.mode() == "testing"
        task.cancel()

    sts.publish(age=12 * 3600 + 100)
    sts.live(main)


def test_a_policy_that_is_too_old_is_removed_from_the_disk(sts: Sts) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        assert (sts.directory / "sts-cache" / "there.example").exists()
        task = sts.loop.spawn(sts.policies.refresh_forever(), "refresh")
        await turns(sts.loop)
        sts.announce(None)
        sts.clock.advance(6 * 3600 + 1)
        await turns(sts.loop)
        assert os.listdir(sts.directory / "sts-cache") == []
        task.cancel()

    sts.publish(age=3600)
    sts.live(main)


# --- MTA-STS: fetching over HTTPS ---


class WebServer:
    """A web server on loopback in a thread; `respond` gets each connection and its request."""

    def __init__(self, directory: Path, respond: Callable[[ssl.SSLSocket, bytes], None]) -> None:
        self.chain = write_certificate(directory / "web", "mta-sts.there.example")
        self.requests: list[bytes] = []
        self.names: list[str | None] = []
        self._respond = respond
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.chain, self.chain.parent / "privkey.pem")
        self._context.sni_callback = lambda _, name, __: self.names.append(name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            raw.settimeout(SECONDS)
            with raw, contextlib.suppress(OSError), self._context.wrap_socket(raw, True) as tls:
                request = b""
                while not request.endswith(b"\r\n\r\n") and (data := tls.recv(4096)):
                    request += data
                self.requests.append(request)
                self._respond(tls, request)
                tls.unwrap()


ADDRESS = {("mta-sts.there.example", "A"): ("127.0.0.1",)}


def fetch(
    server: WebServer, chain: Path | None = None, records: Records = ADDRESS
) -> bytes | chasquid.ChasquidError:
    """Return a policy, or why there is none."""

    async def main(loop: chasquid.Loop) -> bytes | chasquid.ChasquidError:
        names = chasquid.Names(loop, Zone(records).ask)
        context = chasquid.client_tls_context(True, str(chain or server.chain))
        web = chasquid.HttpsPolicies(loop, names, lambda: context, server.port)
        try:
            return await web.fetch("there.example")
        except chasquid.ChasquidError as error:
            return error

    return run(main)


def fetched(directory: Path, *pieces: bytes) -> bytes | chasquid.ChasquidError:
    """Return what comes of an answer that is sent in `pieces`."""

    def respond(tls: ssl.SSLSocket, request: bytes) -> None:
        for piece in pieces:
            tls.sendall(piece)

    with WebServer(directory, respond) as server:
        return fetch(server)


def response(
    body: bytes = POLICY, status: str = "200 OK", kind: str | None = "text/plain", **headers: object
) -> bytes:
    lines = [f"HTTP/1.1 {status}"] + ([f"Content-Type: {kind}"] if kind is not None else [])
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"


def test_the_request_is_as_it_must_be(tmp_path: Path) -> None:
    with WebServer(tmp_path, lambda tls, _: tls.sendall(response())) as server:
        assert fetch(server) == POLICY
    [request] = server.requests
    line, *headers = request.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert line == "GET /.well-known/mta-sts.txt HTTP/1.1"
    assert "Host: mta-sts.there.example" in headers
    assert "Connection: close" in headers
    assert server.names == ["mta-sts.there.example"]


@pytest.mark.parametrize(
    "pieces",
    [
        [response()],
        [response(Content_Length=len(POLICY))],
        [response(Content_Length=len(POLICY)) + b"and more"],
        [response(kind="Text/Plain; charset=utf-8")],
        [response(chunked(POLICY), Transfer_Encoding="chunked")],
        [response(chunked(POLICY[:10], POLICY[10:]), Transfer_Encoding="chunked")],
        [bytes([octet]) for octet in response(Content_Length=len(POLICY))],
        [response().replace(b"HTTP/1.1", b"HTTP/1.0")],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + response()],
        [response().replace(b"\r\n", b"\n", 2)],
    ],
    ids=["until the end", "a length", "more than the length", "charset", "a chunk", "chunks",
         "octet by octet", "HTTP/1.0", "100", "LF"],
)  # fmt: skip
def test_a_policy_however_it_is_sent(tmp_path: Path, pieces: list[bytes]) -> None:
    assert fetched(tmp_path, *pieces) == POLICY


def test_a_policy_of_10_kb_is_taken_and_a_larger_one_is_not(tmp_path: Path) -> None:
    largest = POLICY.ljust(10 * 1024, b"\n")
    whole = response(largest)
    pieces = [whole[start : start + 3000] for start in range(0, len(whole), 3000)]
    assert fetched(tmp_path, *pieces) == largest
    for answer in (
        response(largest + b"\n"),
        response(largest + b"\n", Content_Length=len(largest) + 1),
        response(chunked(largest, b"\n"), Transfer_Encoding="chunked"),
        response(largest * 50),
    ):
        assert "larger than 10 kB" in str(fetched(tmp_path, answer))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (response(status="301 Moved", Location="https://other.example/"), "301"),
        (response(status="302 Found", Location="/elsewhere"), "302"),
        (response(status="204 No Content"), "204"),
        (response(status="404 Not Found"), "404"),
        (response(status="500 Oops"), "500"),
        (response(kind="text/html"), "text/plain"),
        (response(kind="application/octet-stream"), "text/plain"),
        (response(Content_Length=len(POLICY) + 1), "cut short"),
        (response(chunked(POLICY)[:-20], Transfer_Encoding="chunked"), "no HTTP"),
        (response(chunked(POLICY)[:-5], Transfer_Encoding="chunked"), "no HTTP"),
        (response(b"zz\r\n" + POLICY, Transfer_Encoding="chunked"), "no HTTP"),
        (b"", "no HTTP"),
        (b"HTTP/1.1 abc OK\r\n\r\n", "no HTTP"),
        (b"HTTP/7 200 OK\r\nContent-Type: text/plain\r\n\r\n" + POLICY, "no HTTP"),
        (b"220 mail.there.example ESMTP\r\n", "no HTTP"),
        (POLICY, "no HTTP"),
        (b"\0\xff" * 1000, "no HTTP"),
        (response(**{f"X-{number}": "y" for number in range(200)}), "no HTTP"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, "no HTTP"),
        (b"x" * 1_000_000, "no HTTP"),
    ],
)
def test_an_answer_that_is_no_policy(tmp_path: Path, answer: bytes, expected: str) -> None:
    found = fetched(tmp_path, answer)
    assert isinstance(found, chasquid.ChasquidError)
    assert expected in str(found)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200", response(X="y" * 70_000), response(b"")])
def test_an_answer_that_ends_within_its_header_is_no_policy(tmp_path: Path, answer: bytes) -> None:
    found = fetched(tmp_path, answer)
    with pytest.raises((ValueError, chasquid.ChasquidError), match="expected version|no(t|) "):
        raise found if isinstance(found, Exception) else ValueError(parse(found))


@pytest.mark.parametrize("kind", [None, "", "policy", "text"])
def test_an_answer_that_does_not_say_its_type_is_no_policy(
    tmp_path: Path, kind: str | None
) -> None:
    assert isinstance(fetched(tmp_path, response(kind=kind)), chasquid.ChasquidError)


@given(
    st.binary(max_size=100)
    | st.tuples(st.integers(0, 200), st.integers(0, 200), st.binary(max_size=3)).map(
        lambda change: (lambda whole: whole[: change[0]] + change[2] + whole[change[1] :])(
            response(chunked(POLICY), Transfer_Encoding="chunked")
        )
    )
    | st.tuples(st.integers(0, 200), st.integers(0, 200), st.binary(max_size=3)).map(
        lambda change: (lambda whole: whole[: change[0]] + change[2] + whole[change[1] :])(
            response(Content_Length=len(POLICY))
        )
    )
)
@settings(max_examples=200)
def test_any_answer_is_a_policy_or_a_failure_in_words(answer: bytes) -> None:
    with contextlib.suppress(chasquid.ChasquidError):
        assert len(chasquid.HttpsPolicies._policy_in(answer)) <= 10 * 1024


def test_a_certificate_that_is_not_valid_is_refused(tmp_path: Path) -> None:
    other = write_certificate(tmp_path / "other", "mta-sts.other.example")
    with WebServer(tmp_path, lambda tls, _: tls.sendall(response())) as server:
        assert "the certificate is not valid" in str(fetch(server, other))
    assert not any(server.requests)


def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    class Misnamed(WebServer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.chain = write_certificate(tmp_path / "other", "there.example")
            self._context.load_cert_chain(self.chain, self.chain.parent / "privkey.pem")

    with Misnamed(tmp_path, lambda tls, _: tls.sendall(response())) as server:
        assert "the certificate is not valid" in str(fetch(server))
    assert not any(server.requests)


def test_a_web_server_without_an_address_or_that_is_down(tmp_path: Path) -> None:
    server = WebServer(tmp_path, lambda tls, _: None)
    server._listener.close()
    assert "cannot connect" in str(fetch(server))
    assert "has no address" in str(fetch(server, records={}))
    assert "down" in str(fetch(server, records={**ADDRESS, ("mta-sts.there.example", "A"): DOWN}))


def test_the_next_address_is_tried_where_one_is_down(tmp_path: Path) -> None:
    records = {("mta-sts.there.example", "A"): ("127.0.0.2", "127.0.0.1")}
    with WebServer(tmp_path, lambda tls, _: tls.sendall(response())) as server:
        assert fetch(server, records=records) == POLICY


@pytest.mark.parametrize("first", [b"", response()[:60]])
def test_a_web_server_that_stops_answering_is_left_after_a_minute(
    tmp_path: Path, first: bytes
) -> None:
    clock, asked, over = RunningClock(), threading.Event(), threading.Event()

    def respond(tls: ssl.SSLSocket, request: bytes) -> None:
        tls.sendall(first)
        asked.set()
        over.wait(SECONDS)

    async def main(loop: chasquid.Loop) -> chasquid.StsPolicy | None:
        names = chasquid.Names(loop, Zone({**ADDRESS, ANNOUNCED: ["v=STSv1; id=1"]}).ask)
        context = chasquid.client_tls_context(True, str(server.chain))
        web = chasquid.HttpsPolicies(loop, names, lambda: context, server.port)
        policies = chasquid.StsPolicies(loop, log, names, web.fetch, str(tmp_path / "cache"))
        task = loop.spawn(policies.policy("there.example"), "delivery")
        while not asked.is_set():
            await loop.sleep(0.005)
        clock.advance(55)
        await loop.sleep(0.02)
        assert not task.done
        clock.advance(6)
        return await task.join()

    log = record(tmp_path)
    with WebServer(tmp_path, respond) as server:
        try:
            assert run(main, clock=clock) is None
        finally:
            over.set()
    assert log.counters["mta-sts", "failed"] == 1
    log.close()


# --- MTA-STS: deliveries ---

ANNOUNCED = ("_mta-sts.there.example", "TXT")
STS_RECORDS: Records = {**MX, ANNOUNCED: ("v=STSv1; id=1",)}


def published(text: bytes = POLICY) -> chasquid.FetchPolicy:
    async def get(domain: str) -> bytes:
        assert domain == "there.example"
        return text

    return get


def test_a_server_in_the_policy_with_a_valid_certificate_gets_mail(
    tmp_path: Path, trusted: None
) -> None:
    assert attempt(tmp_path, DELIVERED, records=STS_RECORDS, fetch=published()).state == SENT


def test_a_server_that_is_not_in_the_policy_gets_nothing(tmp_path: Path, trusted: None) -> None:
    fetch = published(POLICY.replace(b"mx.there", b"*.there.example\nmx: mx.other"))
    records = {**STS_RECORDS, ("there.example", "MX"): ("10 a.mx.there.example.",),
               ("a.mx.there.example", "A"): ("127.0.0.1",)}  # fmt: skip
    result = deliver(tmp_path, Zone(records), fetch=fetch)
    assert (result.state, result.status) == (DEFERRED, "4.7.5")
    assert "a.mx.there.example" in result.text and "MTA-STS" in result.text


def test_of_several_servers_only_those_in_the_policy_are_used(
    tmp_path: Path, trusted: None
) -> None:
    records = {**STS_RECORDS, ("there.example", "MX"): ("5 a.example.", "10 mx.there.example."),
               ("a.example", "A"): ("127.0.0.1",)}  # fmt: skip
    assert attempt(tmp_path, DELIVERED, records=records, fetch=published()).state == SENT


@pytest.mark.parametrize("script", [REFUSES_CERTIFICATE, *BROKEN.values()])
def test_a_server_without_a_valid_certificate_gets_nothing(tmp_path: Path, script: str) -> None:
    assert_refused(attempt(tmp_path, script, records=STS_RECORDS, fetch=published()), "MTA-STS")


@pytest.mark.parametrize("mode", [b"testing", b"none"])
def test_a_policy_that_is_not_enforced_keeps_nothing_back(tmp_path: Path, mode: bytes) -> None:
    fetch = published(POLICY.replace(b"enforce", mode).replace(b"mx.there", b"mx.other"))
    script = GREETING + ENVELOPE + CONTENT
    assert attempt(tmp_path, script, records=STS_RECORDS, fetch=fetch).state == SENT


def test_a_server_that_has_just_started_keeps_to_the_policies_on_its_disk(tmp_path: Path) -> None:
    policy = StsPolicy("1", "enforce", ("mx.other.example",), 86400, time.time())
    server = Server(tmp_path, ask=ask(MX))
    (server.data_dir / "sts-cache").mkdir(parents=True)
    (server.data_dir / "sts-cache" / "there.example").write_text(json.dumps(policy._asdict()))
    with server:
        submit(server, "")
        wait_for(lambda: server.queued("cur"), "the first attempt")
        assert "none of the servers in the MTA-STS policy of there.example" in server.mail_log


def test_a_policy_that_cannot_be_had_keeps_nothing_back(tmp_path: Path) -> None:
    script = GREETING + ENVELOPE + CONTENT
    assert attempt(tmp_path, script, records=STS_RECORDS).state == SENT


def test_the_policy_of_an_international_domain_is_asked_for_in_a_labels(tmp_path: Path) -> None:
    asked: list[str] = []

    async def fetch(domain: str) -> bytes:
        asked.append(domain)
        return POLICY

    records = {("xn--bcher-kva.example", "MX"): ("10 mx.other.example.",),
               ("_mta-sts.xn--bcher-kva.example", "TXT"): ("v=STSv1; id=1",),
               ("mx.other.example", "A"): ("127.0.0.1",)}  # fmt: skip
    target = address("eva@bücher.example")
    assert deliver(tmp_path, Zone(records), target=target, fetch=fetch).status == "4.7.5"
    assert asked == ["xn--bcher-kva.example"]


def test_a_server_that_somebody_here_named_needs_no_policy(tmp_path: Path) -> None:
    with Peer(GREETING + ENVELOPE + CONTENT) as peer:
        target = address("eva@there.example", f"mx.there.example:{peer.port}")
        zone = Zone({**STS_RECORDS, ("_mta-sts.mx.there.example", "TXT"): ("v=STSv1; id=1",)})
        assert deliver(tmp_path, zone, target=target, fetch=published()).state == SENT
    assert not any(kind == "TXT" for _, kind in zone.asked)


def test_dane_wins_over_a_policy_that_would_forbid(tmp_path: Path) -> None:
    fetch = published(POLICY.replace(b"mx.there", b"mx.other"))
    found = attempt(tmp_path, DELIVERED, records=STS_RECORDS, fetch=fetch, tlsa=[tlsa(3)])
    assert found.state == SENT


def test_dane_wins_over_a_policy_that_would_allow(tmp_path: Path, trusted: None) -> None:
    script = STARTTLS + SECURE + "* closed"
    found = attempt(tmp_path, script, records=STS_RECORDS, fetch=published(), tlsa=[WRONG])
    assert_refused(found, "DANE")


def test_a_policy_holds_where_the_tlsa_records_cannot_be_used(
    tmp_path: Path, trusted: None
) -> None:
    more: dict[str, Any] = {"records": STS_RECORDS, "fetch": published(), "tlsa": ["1 1 1 ab"]}
    assert_refused(attempt(tmp_path, NO_TLS, **more), "MTA-STS")
    assert attempt(tmp_path, DELIVERED, **more).state == SENT


# --- what is demanded ---


def requirement(
    directory: Path, zone: Zone, by_mx: bool = True, host: str = "mx.there.example", **more: Any
) -> TlsRequirement:
    log = record(directory)

    async def main(loop: chasquid.Loop) -> TlsRequirement:
        policies = tls_policies(loop, chasquid.Names(loop, zone.ask), log, directory, **more)
        return await policies.requirement("there.example", host, 25, by_mx)

    return run(main)


SIGNED_TLSA = {**MX, ("_25._tcp.mx.there.example", "TLSA"): ["3 1 1 ab"]}


def test_each_demand_says_who_makes_it(tmp_path: Path) -> None:
    assert requirement(tmp_path, Zone(MX)) == TlsRequirement(PLAIN, (), "", vouched=False)
    assert requirement(tmp_path, SignedZone(MX)) == TlsRequirement(PLAIN, (), "", vouched=True)
    assert requirement(tmp_path, SignedZone(MX), by_mx=False) == TlsRequirement(
        PLAIN, (), "", vouched=False
    )
    assert requirement(tmp_path, SignedZone(SIGNED_TLSA)) == TlsRequirement(
        TLS_SECURE, (Tlsa(3, 1, 1, b"\xab"),), "DANE", vouched=True
    )
    assert requirement(tmp_path, Zone(STS_RECORDS), fetch=published()) == TlsRequirement(
        TLS_SECURE, (), "MTA-STS", vouched=True
    )
    remember(tmp_path, TLS_INSECURE)
    assert requirement(tmp_path, SignedZone(MX)) == TlsRequirement(
        TLS_INSECURE, (), "it was TLS_INSECURE before", vouched=True
    )


def test_a_host_with_ipv6_alone_is_signed_as_well(tmp_path: Path) -> None:
    records = {key: value for key, value in SIGNED_TLSA.items() if key[1] != "A"}
    assert requirement(
        tmp_path, SignedZone({**records, ("mx.there.example", "AAAA"): ["::1"]})
    ).tlsa
    unsigned = [("mx.there.example", "AAAA")]
    zone = SignedZone({**records, ("mx.there.example", "AAAA"): ["::1"]}, unsigned)
    assert requirement(tmp_path, zone) == TlsRequirement()


def test_of_an_address_nothing_is_asked(tmp_path: Path) -> None:
    zone = SignedZone({})
    assert requirement(tmp_path, zone, by_mx=False, host="127.0.0.1") == TlsRequirement()
    assert zone.asked == []


def test_for_an_alias_the_records_of_what_it_stands_for_come_first(tmp_path: Path) -> None:
    real, alias = "_25._tcp.real.example", "_25._tcp.mx.there.example"
    for found, expected in (
        ({real: ["3 1 1 ab"], alias: ["3 1 1 cd"]}, TlsRequirement(TLS_SECURE, (), "DANE", True)),
        ({real: ["3 1 1 ab"]}, TlsRequirement(TLS_SECURE, (), "DANE", True)),
        ({alias: ["3 1 1 ab"]}, TlsRequirement(TLS_SECURE, (), "DANE", True)),
        ({real: ["1 1 1 ab"], alias: ["3 1 1 ab"]}, TlsRequirement(TLS_INSECURE, (), "DANE", True)),
        ({}, TlsRequirement(PLAIN, (), "", True)),
    ):
        records = {**MX, **{(name, "TLSA"): texts for name, texts in found.items()}}
        zone = SignedZone(records, aliases={"mx.there.example": "real.example"})
        seen = requirement(tmp_path, zone)
        assert seen._replace(tlsa=()) == expected
        assert seen.tlsa == ((Tlsa(3, 1, 1, b"\xab"),) if expected.least == TLS_SECURE else ())


def test_where_the_records_of_an_alias_cannot_be_had_nothing_is_sent(tmp_path: Path) -> None:
    records = {**SIGNED_TLSA, ("_25._tcp.real.example", "TLSA"): DOWN}
    with pytest.raises(TemporaryFailure, match="down"):
        requirement(tmp_path, SignedZone(records, aliases={"mx.there.example": "real.example"}))


def test_only_so_many_records_are_looked_at(tmp_path: Path) -> None:
    many = [f"3 1 1 {number:04x}" for number in range(500)]
    zone = SignedZone({**MX, ("_25._tcp.mx.there.example", "TLSA"): many})
    assert len(requirement(tmp_path, zone).tlsa) == 20


# --- REQUIRETLS and "TLS-Required: No", coming in ---

NEEDS = delivery(require_tls=True)
WITH_REQUIRETLS = SECURE.replace("S: 250 mx", "S: 250-mx") + "S: 250 REQUIRETLS\n"
REQUIRED = WITH_REQUIRETLS + ENVELOPE.replace(
    "FROM:<eva@there.example>", "FROM:<eva@there.example> REQUIRETLS"
)


class Taking:
    """A courier that keeps what it gets, and has it delivered if it may."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.deliveries: list[Delivery] = []

    async def deliver(self, delivery: Delivery, targets: Sequence[Target]) -> list[chasquid.Result]:
        self.deliveries.append(delivery)
        return [chasquid.Result(self.state, "4.0.0", "as it is told")] * len(targets)


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


@pytest.mark.parametrize("parameters", ["", " REQUIRETLS", " BODY=8BITMIME REQUIRETLS"])
def test_requiretls_goes_with_the_message_and_survives_a_restart(
    tmp_path: Path, parameters: str
) -> None:
    clock, courier = RunningClock(), Taking(DEFERRED)
    server = Server(tmp_path, clock=clock, remote=courier)
    with server:
        submit(server, parameters)
        wait_for(lambda: server.queued("cur"), "the first attempt")
    courier.state = SENT
    with server:
        clock.advance(300)
        server.settle()
        wait_for(lambda: not server.queued(), "the second attempt")
    assert [one.require_tls for one in courier.deliveries] == ["REQUIRETLS" in parameters] * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("TLS-Required: No\r\n", True),
        ("tls-required:no\r\n", True),
        ("TLS-Required:\r\n NO \r\n", True),
        ("", False),
        ("TLS-Required: Yes\r\n", False),
        ("TLS-Required: \r\n", False),
        ("TLS-Required: No way\r\n", False),
        ("TLS-Required: No\r\nTLS-Required: No\r\n", False),
        ("X-TLS-Required: No\r\n", False),
        ("Subject: x\r\n\r\nTLS-Required: No\r\n", False),
    ],
)
def test_tls_required_no_goes_with_the_message_and_survives_a_restart(
    tmp_path: Path, fields: str, expected: bool
) -> None:
    clock, courier = RunningClock(), Taking(DEFERRED)
    server = Server(tmp_path, clock=clock, remote=courier)
    with server:
        submit(server, "", fields.encode() + LETTER)
        wait_for(lambda: server.queued("cur"), "the first attempt")
    courier.state = SENT
    with server:
        clock.advance(300)
        server.settle()
        wait_for(lambda: not server.queued(), "the second attempt")
    assert [one.tls_optional for one in courier.deliveries] == [expected] * 2
    assert not any(one.require_tls for one in courier.deliveries)


# --- REQUIRETLS and "TLS-Required: No", going out ---


def test_a_message_that_requires_tls_says_so_to_a_signed_server(
    tmp_path: Path, trusted: None
) -> None:
    found = attempt(tmp_path, STARTTLS + REQUIRED + CONTENT, tlsa=[], load=NEEDS)
    assert found.state == SENT


def test_a_message_that_requires_tls_says_so_to_a_server_of_a_policy(
    tmp_path: Path, trusted: None
) -> None:
    script = STARTTLS + REQUIRED + CONTENT
    found = attempt(tmp_path, script, records=STS_RECORDS, fetch=published(), load=NEEDS)
    assert found.state == SENT


def test_a_message_that_requires_tls_is_content_with_dane(tmp_path: Path) -> None:
    script = STARTTLS + REQUIRED + CONTENT
    assert attempt(tmp_path, script, tlsa=[tlsa(3)], load=NEEDS).state == SENT


def test_a_message_that_requires_tls_goes_through_a_named_server(
    tmp_path: Path, trusted: None
) -> None:
    with Peer(STARTTLS + REQUIRED + CONTENT, names=("mx.there.example",)) as peer:
        target = address("eva@there.example", f"mx.there.example:{peer.port}")
        assert deliver(tmp_path, Zone(MX), target=target, load=NEEDS).state == SENT


@pytest.mark.parametrize("records", [MX, {**MX, ANNOUNCED: ("v=STSv1; id=1",)}])
def test_it_fails_where_nobody_vouches_for_the_server(tmp_path: Path, records: Records) -> None:
    result = deliver(tmp_path, Zone(records), load=NEEDS)
    assert (result.state, result.status) == (FAILED, "5.7.30")
    assert "REQUIRETLS" in result.text and "mx.there.example" in result.text


@pytest.mark.parametrize("unsigned", [("there.example", "MX"), ("mx.there.example", "A")])
def test_it_fails_where_only_a_part_is_signed(tmp_path: Path, unsigned: tuple[str, str]) -> None:
    result = deliver(tmp_path, SignedZone(MX, [unsigned]), load=NEEDS)
    assert (result.state, result.status) == (FAILED, "5.7.30")


@pytest.mark.parametrize(
    "greeting",
    [STARTTLS, STARTTLS.replace("S: 250 STARTTLS", "S: 250-REQUIRETLS\nS: 250 STARTTLS")],
)
def test_it_fails_where_the_server_does_not_know_of_it_under_tls(
    tmp_path: Path, trusted: None, greeting: str
) -> None:
    found = attempt(tmp_path, greeting + SECURE + "* closed", tlsa=[], load=NEEDS)
    assert (found.state, found.status) == (FAILED, "5.7.30")
    assert "REQUIRETLS" in found.text


@pytest.mark.parametrize("script", [REFUSES_CERTIFICATE, *BROKEN.values()])
def test_it_waits_where_there_is_no_valid_certificate(tmp_path: Path, script: str) -> None:
    assert_refused(attempt(tmp_path, script, tlsa=[], load=NEEDS), "REQUIRETLS")


def test_a_message_that_does_not_require_tls_does_not_say_so(tmp_path: Path, trusted: None) -> None:
    script = STARTTLS + WITH_REQUIRETLS + ENVELOPE + CONTENT
    assert attempt(tmp_path, script, tlsa=[]).state == SENT


OPTIONAL = delivery(tls_optional=True)
IN_THE_CLEAR = GREETING + ENVELOPE + CONTENT


def test_tls_required_no_ignores_every_policy_and_level(tmp_path: Path) -> None:
    remember(tmp_path, TLS_SECURE)
    forbidding = published(POLICY.replace(b"mx.there", b"mx.other"))
    for more in (
        {"records": STS_RECORDS, "fetch": published()},
        {"records": STS_RECORDS, "fetch": forbidding},
        {"tlsa": [WRONG]},
        {},
    ):
        found = attempt(tmp_path, IN_THE_CLEAR, load=OPTIONAL, **more)  # type: ignore[arg-type]
        assert found.state == SENT
    assert kept(tmp_path).outgoing == TLS_SECURE


def test_tls_required_no_uses_tls_where_it_can_and_learns_nothing(tmp_path: Path) -> None:
    found = attempt(tmp_path, REFUSES_CERTIFICATE, DELIVERED, load=OPTIONAL)
    assert found.state == SENT
    assert not (tmp_path / "domaininfo").exists()


def test_requiretls_wins_over_tls_required_no(tmp_path: Path) -> None:
    both = delivery(require_tls=True, tls_optional=True)
    assert deliver(tmp_path, Zone(MX), load=both).status == "5.7.30"
    assert_refused(attempt(tmp_path, NO_TLS, tlsa=[], load=both), "REQUIRETLS")


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
