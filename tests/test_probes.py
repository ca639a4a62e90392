# SPDX-License-Identifier: Apache-2.0
"""Room PROBES: questions to real name servers, and dialogues with real ports."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import pytest
from support import HOST, Peer, Serve, config_text, trust
from test_dns import SOA, Respond, answering, serving

import chasquid
from chasquid import Answer, TemporaryFailure, Unasked


def world(directory: Path, **settings: object) -> chasquid.RealWorld:
    path = directory / "chasquid.conf"
    path.write_text(config_text({"hostname": HOST, "data_dir": directory, **settings}))
    return chasquid.RealWorld(chasquid.load_config(str(directory)))


def authority(respond: Respond) -> Respond:
    """Have a server say that it is in charge."""

    def authoritative(query: dns.message.Message, via: str) -> dns.message.Message | None:
        response = respond(query, via)
        if response is not None:
            response.flags |= dns.flags.AA
        return response

    return authoritative


def ask(tmp_path: Path, respond: Respond, name: str, kind: str) -> Answer:
    with serving(respond) as [server]:
        return world(tmp_path, dns_server=server.place).query(name, kind)


def ask_authority(tmp_path: Path, respond: Respond, name: str, kind: str) -> Answer:
    with serving(respond) as [server]:
        host, _, port = server.place.rpartition(":")
        asking = world(tmp_path)
        asking._dns_port = int(port)
        return asking.query(name, kind, host)


# --- questions ---


def test_a_resolver_is_asked(tmp_path: Path) -> None:
    found = ask(tmp_path, answering("a.example. 300 MX 10 mx.a.example."), "a.example", "MX")
    assert (found.exists, found.records) == (True, ("10 mx.a.example.",))
    found = ask(tmp_path, answering('a.example. 300 TXT "a" "b"'), "a.example.", "TXT")
    assert found.records == ("ab",)


def test_what_does_not_exist_and_what_is_empty_are_two_things(tmp_path: Path) -> None:
    nothing = answering(soa=SOA.format(60, 60), rcode="NXDOMAIN")
    assert ask(tmp_path, nothing, "a.example", "MX") == Answer(False, (), 0.0)
    found = ask(tmp_path, answering(soa=SOA.format(60, 60)), "a.example", "MX")
    assert (found.exists, found.records) == (True, ())


@pytest.mark.parametrize("code", ["SERVFAIL", "REFUSED", "FORMERR"])
def test_a_failure_is_no_answer(tmp_path: Path, code: str) -> None:
    with pytest.raises(TemporaryFailure, match=f"answers {code} for a.example MX"):
        ask(tmp_path, answering(rcode=code), "a.example", "MX")


def test_a_lost_packet_is_asked_for_again(tmp_path: Path) -> None:
    asked = []

    def lose_first(query: dns.message.Message, via: str) -> dns.message.Message | None:
        asked.append(via)
        return answering("a.example. 300 A 192.0.2.1")(query, via) if len(asked) > 1 else None

    assert ask(tmp_path, lose_first, "a.example", "A").records == ("192.0.2.1",)


@pytest.mark.usefixtures("impatient")
def test_silence_is_no_answer(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TemporaryFailure, match="did not answer for a.example A in time"):
        ask(tmp_path, lambda query, via: None, "a.example", "A")
    assert time.monotonic() - began < 10


def test_a_long_answer_comes_by_tcp(tmp_path: Path) -> None:
    def truncate(query: dns.message.Message, via: str) -> dns.message.Message | None:
        if via == "TCP":
            return answering("a.example. 300 A 192.0.2.1")(query, via)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.TC
        return response

    assert ask(tmp_path, truncate, "a.example", "A").records == ("192.0.2.1",)


def test_a_name_server_must_be_in_charge(tmp_path: Path) -> None:
    respond = answering("a.example. 300 A 192.0.2.1")
    assert ask_authority(tmp_path, authority(respond), "a.example", "A").records == ("192.0.2.1",)
    with pytest.raises(TemporaryFailure, match="is not in charge of a.example"):
        ask_authority(tmp_path, respond, "a.example", "A")


def test_an_alias_that_leads_out_of_the_zone_is_told(tmp_path: Path) -> None:
    respond = authority(answering("mta-sts.a.example. 300 CNAME web.b.example."))
    found = ask_authority(tmp_path, respond, "mta-sts.a.example", "A")
    assert (found.exists, found.records, found.canonical) == (True, (), "web.b.example")


def test_only_a_resolver_on_this_machine_is_believed_that_an_answer_is_signed(
    tmp_path: Path,
) -> None:
    def signed(query: dns.message.Message, via: str) -> dns.message.Message:
        response = answering("a.example. 300 A 192.0.2.1")(query, via)
        assert response is not None
        response.flags |= dns.flags.AD
        return response

    assert ask(tmp_path, signed, "a.example", "A").authentic


@pytest.mark.parametrize("name", ["a..example", "x" * 64 + ".example", "a." * 130])
def test_what_cannot_be_a_name_does_not_exist(tmp_path: Path, name: str) -> None:
    assert not world(tmp_path, dns_server="127.0.0.1:1").query(name, "A").exists


# --- zones ---


class Table:
    """A world that knows the DNS alone: answers by server, name and kind ("" is the resolver)."""

    def __init__(self, answers: dict[tuple[str, str, str], tuple[str, ...] | Exception]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, str]] = []

    def query(self, name: str, kind: str, server: str = "") -> Answer:
        self.asked.append((server, name, kind))
        found = self.answers.get((server, name, kind), ())
        if isinstance(found, Exception):
            raise found
        return Answer(any(name == known for _, known, _ in self.answers), found, 60.0)


DOWN = TemporaryFailure("it did not answer in time", "4.4.3")
DELEGATION: dict[tuple[str, str, str], tuple[str, ...] | Exception] = {
    ("", ".", "SOA"): ("a. b. 1 2 3 4 5",),
    ("", "a.example", "NS"): ("ns1.b.example.", "ns2.b.example."),
    ("", "ns1.b.example", "A"): ("192.0.2.1",),
    ("", "ns2.b.example", "AAAA"): ("2001:db8::2",),
    ("192.0.2.1", "a.example", "SOA"): ("ns. admin. 7 2 3 4 5",),
    ("2001:db8::2", "a.example", "SOA"): ("ns. admin. 8 2 3 4 5",),
    ("192.0.2.1", "a.example", "MX"): ("10 new.",),
    ("2001:db8::2", "a.example", "MX"): ("10 new.",),
    ("", "a.example", "MX"): ("10 old.",),
    ("", "other.example", "MX"): ("10 theirs.",),
}


def zones(changes: dict[tuple[str, str, str], tuple[str, ...] | Exception]) -> chasquid.Zones:
    return chasquid.Zones(Table({**DELEGATION, **changes}), ["a.example"])  # type: ignore[arg-type]


def test_own_names_are_asked_of_their_name_servers_and_others_of_the_resolver() -> None:
    found = zones({})
    assert found.ask("a.example", "MX").records == ("10 new.",)
    assert found.ask("Other.Example.", "MX").records == ("10 theirs.",)
    assert found.authority("a.example") == chasquid.Authority(
        "a.example",
        ("192.0.2.1", "2001:db8::2"),
        (("ns1.b.example", "7"), ("ns2.b.example", "8")),
        (),
    )


def test_a_name_server_that_fails_is_passed_over() -> None:
    found = zones({("192.0.2.1", "a.example", "SOA"): DOWN, ("192.0.2.1", "a.example", "MX"): DOWN})
    assert found.ask("a.example", "MX").records == ("10 new.",)
    assert found.authority("a.example").silent == (("ns1.b.example", str(DOWN)),)


def test_without_any_name_server_the_resolver_has_to_do() -> None:
    servers = ("192.0.2.1", "2001:db8::2")
    found = zones({(server, "a.example", "SOA"): DOWN for server in servers})
    assert found.ask("a.example", "MX").records == ("10 old.",)


def test_each_question_is_asked_once_though_many_ask_it() -> None:
    table = Table(DELEGATION)
    found = chasquid.Zones(table, ["a.example"])  # type: ignore[arg-type]
    jobs: list[Callable[[], Answer]] = [lambda: found.ask("a.example", "MX")] * 40
    assert {answer.records for answer in chasquid.in_parallel(jobs)} == {("10 new.",)}
    assert len(table.asked) == len(set(table.asked))


def test_without_a_resolver_nothing_is_asked() -> None:
    with pytest.raises(Unasked, match="no name server answers here") as raised:
        zones({("", ".", "SOA"): DOWN, ("", "a.example", "NS"): DOWN}).ask("a.example", "MX")
    assert "dns_server" in raised.value.fix


def test_jobs_run_side_by_side_and_their_results_stay_in_order() -> None:
    barrier = threading.Barrier(3, timeout=60)

    def job(number: int) -> int:
        if number < 3:
            barrier.wait()
        return number

    jobs = [lambda number=number: job(number) for number in range(30)]
    assert chasquid.in_parallel(jobs) == list(range(30))  # type: ignore[arg-type]
    assert chasquid.in_parallel([]) == []


# --- ports ---


def test_a_dialogue_with_tls_in_the_middle(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    commands = ("EHLO client.example", "STARTTLS", "EHLO client.example")
    talk = world(tmp_path).talk("127.0.0.1", server.port(), commands, name=HOST)
    assert talk.replies[0].startswith(f"220 {HOST} ")
    assert "STARTTLS" in talk.replies[1]
    assert "STARTTLS" not in talk.replies[3]
    assert talk.problem.startswith("the certificate is not valid: self-signed certificate")
    [shown] = talk.certificates
    pem = (server.config_dir / "certs" / HOST / "fullchain.pem").read_text()
    assert shown == chasquid.ssl.PEM_cert_to_DER_cert(pem)
    trust(monkeypatch, server.config_dir / "certs", HOST)
    talk = world(tmp_path).talk("127.0.0.1", server.port(), commands, name=HOST)
    assert talk.problem == ""
    talk = world(tmp_path).talk("127.0.0.1", server.port(), commands, name="other.example")
    assert "other.example" in talk.problem


def test_tls_from_the_start(serve: Serve, tmp_path: Path) -> None:
    port = serve().port("submission over TLS")
    talk = world(tmp_path).talk("127.0.0.1", port, name=HOST, tls=True)
    assert talk.replies[0].startswith(f"220 {HOST} ")
    assert talk.problem


@pytest.mark.usefixtures("impatient")
def test_a_port_where_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(chasquid.Disconnected, match="Connection refused"):
        world(tmp_path).talk("127.0.0.1", 1)
    with Peer("* closed") as peer:
        began = time.monotonic()
        with pytest.raises(chasquid.Disconnected, match="did not answer in time"):
            world(tmp_path).talk("127.0.0.1", peer.port)
        assert time.monotonic() - began < 10


def test_a_port_that_hangs_up(tmp_path: Path) -> None:
    with Peer("S: 220 hello\nC: EHLO …\n* close") as peer, pytest.raises(chasquid.Disconnected):
        world(tmp_path).talk("127.0.0.1", peer.port, ("EHLO x",))


def test_nobody_is_running(tmp_path: Path) -> None:
    assert world(tmp_path).ask_server("sessions") is None


# --- the machine ---


def test_what_the_machine_says_of_itself(tmp_path: Path) -> None:
    machine = world(tmp_path, data_dir=tmp_path / "not" / "yet").machine()
    assert "localhost" in machine.hosts
    assert machine.user == os.getuid()
    assert os.getgid() in machine.groups
    assert 0 < machine.free <= machine.disk
    assert machine.memory > 0 or not os.path.exists("/proc/meminfo")
    assert machine.synchronised in (True, False, None)
