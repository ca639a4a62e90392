# SPDX-License-Identifier: Apache-2.0
"""Room DNS: the cache, mail exchangers, and real questions to a real little name server."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import traceback
from collections.abc import Callable

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from support import FakeClock, run, turns

import chasquid

Answer, Names = chasquid.Answer, chasquid.Names
TemporaryFailure, PermanentFailure = chasquid.TemporaryFailure, chasquid.PermanentFailure

NOTHING = Answer(True, (), 60)
MISSING = Answer(False, (), 60)


class Table:
    """Answers from a table, counting the questions; what is not in it does not exist."""

    def __init__(self, loop, **answers: chasquid.Answer | Exception) -> None:
        self.answers: dict[tuple[str, str], object] = {}
        self.asked: list[tuple[str, str]] = []
        self.gate = chasquid.Event(loop)
        self.gate.set()
        for key, answer in answers.items():
            kind, _, name = key.partition("_")
            self.answers[name.replace("_", "."), kind] = answer

    async def ask(self, name: str, kind: str) -> chasquid.Answer:
        self.asked.append((name, kind))
        await self.gate.wait()
        answer = self.answers.get((name, kind), MISSING)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Answer)
        return answer


def mx(*records: str, ttl: float = 60) -> chasquid.Answer:
    return Answer(True, records, ttl)


# --- The cache ------------------------------------------------------------------------------


def test_an_answer_is_kept_as_long_as_its_ttl():
    async def main(loop):
        table = Table(loop, A_a_example=Answer(True, ("192.0.2.1",), 60))
        names = Names(loop, table.ask)
        for seconds, questions in ((0, 1), (59, 1), (2, 2), (10, 2)):
            loop.clock.now += seconds
            assert (await names.query("a.example", "A")).records == ("192.0.2.1",)
            assert len(table.asked) == questions

    run(main, FakeClock())


@pytest.mark.parametrize("answer", [MISSING, NOTHING])
def test_that_there_is_nothing_is_kept_as_well(answer):
    async def main(loop):
        table = Table(loop, TXT_a_example=answer)
        names = Names(loop, table.ask)
        for _ in range(3):
            assert await names.query("a.example", "TXT") == answer
        assert len(table.asked) == 1
        loop.clock.now += 61
        assert await names.query("a.example", "TXT") == answer
        assert len(table.asked) == 2

    run(main, FakeClock())


@pytest.mark.parametrize(("ttl", "kept"), [(0, 1), (-5, 1), (10**9, 86400)])
def test_no_ttl_is_taken_too_far(ttl, kept):
    async def main(loop):
        table = Table(loop, A_a_example=Answer(True, ("192.0.2.1",), ttl))
        names = Names(loop, table.ask)
        await names.query("a.example", "A")
        loop.clock.now += kept - 0.5
        await names.query("a.example", "A")
        assert len(table.asked) == 1
        loop.clock.now += 1
        await names.query("a.example", "A")
        assert len(table.asked) == 2

    run(main, FakeClock())


def test_a_failure_is_remembered_for_a_moment_only():
    async def main(loop):
        table = Table(loop, A_a_example=TemporaryFailure("down", "4.4.3"))
        names = Names(loop, table.ask)
        for _ in range(3):
            with pytest.raises(TemporaryFailure, match="down"):
                await names.query("a.example", "A")
        assert len(table.asked) == 1
        loop.clock.now += 6
        table.answers["a.example", "A"] = Answer(True, ("192.0.2.1",), 60)
        assert (await names.query("a.example", "A")).records == ("192.0.2.1",)

    run(main, FakeClock())


def test_a_failure_is_raised_anew_to_each_asker():
    async def main(loop):
        names = Names(loop, Table(loop, A_a_example=TemporaryFailure("down", "4.4.3")).ask)
        errors = []
        for _ in range(3):
            with pytest.raises(TemporaryFailure, match="down") as caught:
                await names.query("a.example", "A")
            errors.append(caught.value)
        assert len(set(map(id, errors))) == 3
        depths = [len(list(traceback.walk_tb(error.__traceback__))) for error in errors]
        assert depths[1] == depths[2]

    run(main, FakeClock())


def test_case_and_the_last_dot_make_no_other_name_but_the_kind_another_question():
    async def main(loop):
        table = Table(loop, A_a_example=NOTHING, MX_a_example=NOTHING)
        names = Names(loop, table.ask)
        for name in ("a.example", "A.Example", "a.example."):
            await names.query(name, "A")
        await names.query("a.example", "MX")
        return table.asked

    assert run(main) == [("a.example", "A"), ("a.example", "MX")]


def test_those_who_ask_the_same_at_the_same_time_share_one_question():
    async def main(loop):
        table = Table(loop, A_a_example=Answer(True, ("192.0.2.1",), 60))
        table.gate.clear()
        names = Names(loop, table.ask)
        tasks = [loop.spawn(names.query("a.example", "A"), "asks") for _ in range(5)]
        await turns(loop)
        table.gate.set()
        answers = {await task.join() for task in tasks}
        assert len(table.asked) == 1
        return answers

    assert run(main) == {Answer(True, ("192.0.2.1",), 60)}


def test_those_who_share_a_question_share_its_failure():
    async def main(loop):
        table = Table(loop, A_a_example=TemporaryFailure("down"))
        table.gate.clear()
        names = Names(loop, table.ask)

        async def asks():
            with pytest.raises(TemporaryFailure, match="down"):
                await names.query("a.example", "A")

        tasks = [loop.spawn(asks(), "asks") for _ in range(3)]
        await turns(loop)
        table.gate.set()
        for task in tasks:
            await task.join()
        return len(table.asked)

    assert run(main) == 1


def test_who_is_in_a_hurry_stops_waiting_and_the_answer_serves_the_next():
    async def main(loop):
        table = Table(loop, A_a_example=Answer(True, ("192.0.2.1",), 60))
        table.gate.clear()
        names = Names(loop, table.ask)

        async def hurried():
            with pytest.raises(chasquid.Expired), loop.deadline(3):
                await names.query("a.example", "A")

        task = loop.spawn(hurried(), "hurried")
        cancelled = loop.spawn(names.query("a.example", "A"), "cancelled")
        await turns(loop)
        cancelled.cancel()
        loop.clock.now += 4
        await task.join()
        table.gate.set()
        await turns(loop)
        assert (await names.query("a.example", "A")).records == ("192.0.2.1",)
        return len(table.asked)

    assert run(main, FakeClock()) == 1


def test_a_question_that_nobody_answers_fails_in_its_time():
    async def main(loop):
        table = Table(loop)
        table.gate.clear()
        names = Names(loop, table.ask)

        async def asks():
            with pytest.raises(TemporaryFailure, match="in time") as caught:
                await names.query("a.example", "A")
            return caught.value.status

        task = loop.spawn(asks(), "asks")
        await turns(loop)
        loop.clock.now += chasquid.DNS_SECONDS + 1
        return await task.join()

    assert run(main, FakeClock()) == "4.4.3"


def test_the_cache_stays_of_a_size_and_still_answers():
    async def main(loop):
        asked = 0

        async def ask(name: str, kind: str) -> chasquid.Answer:
            nonlocal asked
            asked += 1
            return Answer(True, (name,), 60)

        names = Names(loop, ask)
        for number in range(11_000):
            await names.query(f"n{number}.example", "A")
        assert asked == 11_000
        assert (await names.query("n10999.example", "A")).records == ("n10999.example",)
        assert asked == 11_000
        await names.query("n0.example", "A")  # the oldest went
        return asked

    assert run(main, FakeClock()) == 11_001


# --- Mail exchangers and addresses ----------------------------------------------------------


def exchangers(domain: str = "a.example", **answers) -> object:
    async def main(loop):
        try:
            return await Names(loop, Table(loop, **answers).ask).mail_exchangers(domain)
        except (TemporaryFailure, PermanentFailure) as error:
            return type(error), error.status

    return run(main)


def test_exchangers_come_by_preference_and_without_their_last_dot():
    assert exchangers(MX_a_example=mx("20 b.example.", "5 C.Example.", "20 a.example.")) == [
        (5, "c.example"),
        (20, "a.example"),
        (20, "b.example"),
    ]


def test_a_domain_without_mx_is_its_own_exchanger_if_it_has_an_address():
    one = Answer(True, ("192.0.2.1",), 60)
    six = Answer(True, ("2001:db8::1",), 60)
    assert exchangers(MX_a_example=NOTHING, A_a_example=one) == [(0, "a.example")]
    assert exchangers(MX_a_example=NOTHING, AAAA_a_example=six) == [(0, "a.example")]


def test_a_domain_with_neither_mx_nor_address_has_no_server_for_good():
    assert exchangers(MX_a_example=NOTHING, A_a_example=NOTHING, AAAA_a_example=NOTHING) == (
        PermanentFailure,
        "5.1.2",
    )


def test_a_domain_that_does_not_exist_is_told_apart_from_one_that_nobody_could_ask():
    assert exchangers() == (PermanentFailure, "5.1.2")
    failure = TemporaryFailure("down", "4.4.3")
    assert exchangers(MX_a_example=failure) == (TemporaryFailure, "4.4.3")
    down = {"MX_a_example": NOTHING, "A_a_example": failure, "AAAA_a_example": failure}
    assert exchangers(**down) == (TemporaryFailure, "4.4.3")
    down["AAAA_a_example"] = NOTHING
    assert exchangers(**down) == (TemporaryFailure, "4.4.3")


def test_a_null_mx_takes_no_mail_for_good():
    address = Answer(True, ("192.0.2.1",), 60)
    assert exchangers(MX_a_example=mx("0 ."), A_a_example=address) == (PermanentFailure, "5.1.10")


def test_a_null_mx_among_others_is_left_out():
    assert exchangers(MX_a_example=mx("0 .", "10 b.example.")) == [(10, "b.example")]


def test_nothing_but_null_mxs_takes_no_mail_either():
    assert exchangers(MX_a_example=mx("0 .", "10 .")) == (PermanentFailure, "5.1.10")


def addresses(host: str = "a.example", **answers) -> object:
    async def main(loop):
        table = Table(loop, **answers)
        return await Names(loop, table.ask).addresses(host), len(table.asked)

    return run(main)


def test_addresses_are_of_both_families():
    one = Answer(True, ("192.0.2.1", "192.0.2.2"), 60)
    six = Answer(True, ("2001:db8::1",), 60)
    found, _ = addresses(A_a_example=one, AAAA_a_example=six)
    assert sorted(found) == ["192.0.2.1", "192.0.2.2", "2001:db8::1"]


def test_addresses_of_one_family_do_where_the_other_cannot_be_asked():
    one = Answer(True, ("192.0.2.1",), 60)
    found, _ = addresses(A_a_example=one, AAAA_a_example=TemporaryFailure("down"))
    assert found == ["192.0.2.1"]
    with pytest.raises(TemporaryFailure):
        addresses(A_a_example=NOTHING, AAAA_a_example=TemporaryFailure("down"))


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "localhost"])
def test_what_needs_no_question_is_not_asked(host):
    found, questions = addresses(host)
    assert questions == 0
    assert host == "localhost" or found == [host]


@pytest.mark.parametrize("text", ["192.0.2.1", "::1", "2001:db8::1"])
def test_ip_addresses(text):
    assert chasquid.is_ip_address(text)


@pytest.mark.parametrize("text", ["", "a", "192.0.2", "[::1]", "192.0.2.1\x00", "1.2.3.4:25", "ñ"])
def test_what_is_no_ip_address(text):
    assert not chasquid.is_ip_address(text)


# --- DnsClient, with a real server ------------------------------------------------------------

Respond = Callable[[dns.message.Message, str], dns.message.Message | None]


class NameServer:
    """A name server at an address of this machine, over UDP and TCP; it answers as told."""

    def __init__(self, respond: Respond, host: str = "127.0.0.1") -> None:
        self.respond = respond
        self.seen: list[tuple[str, str, str]] = []
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for _ in range(50):
            self._udp = socket.socket(self._family, socket.SOCK_DGRAM)
            self._tcp = socket.socket(self._family, socket.SOCK_STREAM)
            try:
                self._udp.bind((host, 0))
                self._tcp.bind(self._udp.getsockname())
                break
            except OSError as error:  # if somebody has the port for TCP: another one
                self._udp.close()
                self._tcp.close()
                if error.errno != errno.EADDRINUSE:
                    raise
        self._tcp.listen()
        self._threads = [threading.Thread(target=each) for each in (self._datagrams, self._streams)]
        for thread in self._threads:
            thread.start()

    @property
    def place(self) -> str:
        host, port = self._udp.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        with socket.socket(self._family, socket.SOCK_DGRAM) as bell:
            bell.sendto(b"", self._udp.getsockname())
        socket.create_connection(self._tcp.getsockname()[:2]).close()
        for thread in self._threads:
            thread.join()
        self._udp.close()
        self._tcp.close()

    def _answer(self, wire: bytes, via: str) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name = question.name.to_text()
        self.seen.append((name, dns.rdatatype.to_text(question.rdtype), via))
        response = self.respond(query, via)
        return None if response is None else response.to_wire(max_size=65535)

    def _datagrams(self) -> None:
        while True:
            wire, place = self._udp.recvfrom(65535)
            if not wire:
                return
            answer = self._answer(wire, "UDP")
            if answer is not None:
                self._udp.sendto(answer, place)

    def _streams(self) -> None:
        while True:
            connection, _ = self._tcp.accept()
            with connection, connection.makefile("rb") as file:
                size = file.read(2)
                if not size:
                    return
                answer = self._answer(file.read(struct.unpack(">H", size)[0]), "TCP")
                if answer is not None:
                    framed = struct.pack(">H", len(answer)) + answer
                    for start in range(0, len(framed), 1000):  # in pieces
                        connection.sendall(framed[start : start + 1000])


@contextlib.contextmanager
def serving(*responds: Respond):
    servers = [NameServer(respond) for respond in responds]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def answering(*rrsets: str, soa: str | None = None, rcode: str = "NOERROR") -> Respond:
    """Respond with "name ttl kind data" lines, and the SOA in the authority section."""

    def respond(query: dns.message.Message, via: str) -> dns.message.Message:
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        response.set_rcode(dns.rcode.from_text(rcode))
        for section, lines in ((response.answer, rrsets), (response.authority, [soa])):
            for line in filter(None, lines):
                name, ttl, kind, data = line.split(" ", 3)
                section.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
        return response

    return respond


SOA = "example. {} SOA ns.example. admin.example. 1 7200 900 1209600 {}"


def ask(name: str, kind: str, *responds: Respond) -> object:
    """Ask the servers; return the answer or the failure, and what they saw."""
    with serving(*responds) as servers:

        async def main(loop):
            client = chasquid.DnsClient(loop, [server.place for server in servers])
            try:
                return await client.ask(name, kind)
            except TemporaryFailure as error:
                return error

        return run(main), [server.seen for server in servers]


def test_records_come_with_their_ttl():
    found, seen = ask("a.example", "A", answering("a.example. 300 A 192.0.2.1"))
    assert found == Answer(True, ("192.0.2.1",), 300)
    assert seen == [[("a.example.", "A", "UDP")]]


def test_mail_exchangers_come_in_presentation_form():
    respond = answering("a.example. 300 MX 10 mx.a.example.", "a.example. 300 MX 0 .")
    found, _ = ask("a.example.", "MX", respond)
    assert sorted(found.records) == ["0 .", "10 mx.a.example."]


def test_the_strings_of_a_text_are_joined_and_keep_their_octets():
    found, _ = ask("a.example", "TXT", answering('a.example. 300 TXT "v=spf1 " "a\\255\\"" "-all"'))
    assert found.records == ('v=spf1 a\xff"-all',)


def test_a_name_is_never_looked_for_below_another():
    _, seen = ask("alone", "A", answering(rcode="NXDOMAIN", soa=SOA.format(60, 60)))
    assert seen == [[("alone.", "A", "UDP")]]


def test_an_alias_is_followed_and_the_shortest_ttl_counts():
    respond = answering("a.example. 20 CNAME b.example.", "b.example. 300 A 192.0.2.1")
    assert ask("a.example", "A", respond)[0] == Answer(
        True, ("192.0.2.1",), 20, canonical="b.example"
    )


def test_no_such_name_and_no_such_record_are_two_things():
    missing = answering(rcode="NXDOMAIN", soa=SOA.format(600, 60))
    assert ask("a.example", "MX", missing)[0] == Answer(False, (), 60)
    nothing = answering(soa=SOA.format(600, 70))
    assert ask("a.example", "MX", nothing)[0] == Answer(True, (), 70)


@pytest.mark.parametrize("rcode", ["NXDOMAIN", "NOERROR"])
def test_that_there_is_nothing_is_hardly_kept_where_nobody_says_for_how_long(rcode):
    # RFC 2308, 5: "Negative responses without SOA records SHOULD NOT be cached"
    found, _ = ask("a.example", "MX", answering(rcode=rcode))
    assert found.exists == (rcode == "NOERROR")
    assert found.ttl <= 300


def test_a_long_answer_is_fetched_over_tcp():
    lines = [f"a.example. 300 TXT {'x' * 200}{number}" for number in range(30)]
    whole = answering(*lines)

    def respond(query: dns.message.Message, via: str) -> dns.message.Message:
        if via == "TCP":
            return whole(query, via)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.TC
        return response

    found, seen = ask("a.example", "TXT", respond)
    assert len(found.records) == 30
    assert seen == [[("a.example.", "TXT", "UDP"), ("a.example.", "TXT", "TCP")]]


@pytest.mark.parametrize("rcode", ["SERVFAIL", "REFUSED", "NOTIMP"])
def test_a_server_that_cannot_say_is_a_failure_that_may_pass(rcode):
    found, _ = ask("a.example", "A", answering(rcode=rcode))
    assert isinstance(found, TemporaryFailure)
    assert found.status == "4.4.3"


def test_a_server_that_does_not_know_edns_is_asked_once_more_without():
    """RFC 6891, 7"""
    known = answering("a.example. 300 A 192.0.2.1")
    versions = []

    def respond(query: dns.message.Message, via: str) -> dns.message.Message:
        versions.append(query.edns)
        if query.edns < 0:
            return known(query, via)
        response = answering(rcode="FORMERR")(query, via)
        response.use_edns(-1)
        return response

    found, _ = ask("a.example", "A", respond)
    assert found == Answer(True, ("192.0.2.1",), 300)
    assert versions == [0, -1]


@pytest.mark.parametrize("rcode", ["SERVFAIL", "REFUSED"])
def test_the_second_server_is_asked_where_the_first_cannot_say(rcode):
    found, seen = ask(
        "a.example", "A", answering(rcode=rcode), answering("a.example. 300 A 192.0.2.1")
    )
    assert found == Answer(True, ("192.0.2.1",), 300)
    assert [len(each) for each in seen] == [1, 1]


def test_the_second_server_is_asked_where_the_first_is_silent():
    found, _ = ask(
        "a.example", "A", lambda query, via: None, answering("a.example. 300 A 192.0.2.1")
    )
    assert found == Answer(True, ("192.0.2.1",), 300)


def test_that_no_server_listens_is_known_at_once():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
        raw.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{raw.getsockname()[1]}"

    async def main(loop):
        client = chasquid.DnsClient(loop, [place])
        with loop.deadline(chasquid.DNS_SECONDS / 3), pytest.raises(TemporaryFailure) as caught:
            await client.ask("a.example", "A")
        assert caught.value.status == "4.4.3"

    run(main)


def test_who_waits_for_a_silent_server_may_stop_and_nothing_is_left_open():
    with serving(lambda query, via: None) as servers:

        async def main(loop):
            names = Names(loop, chasquid.DnsClient(loop, [servers[0].place]).ask)
            task = loop.spawn(names.query("a.example", "A"), "asks")
            with loop.deadline(30):
                while not servers[0].seen:
                    await loop.sleep(0.001)
            task.cancel()
            with pytest.raises(chasquid.Cancelled):
                await task.join()

        run(main)  # which ends the question as well
        assert servers[0].seen == [("a.example.", "A", "UDP")]


def test_an_answer_to_another_question_is_not_taken():
    right = answering("a.example. 300 A 192.0.2.1")

    def respond(query: dns.message.Message, via: str) -> dns.message.Message:
        response = right(query, via)
        response.id ^= 1
        return response

    with serving(respond) as servers:

        async def main(loop):
            with pytest.raises(chasquid.Expired), loop.deadline(0.3):
                await chasquid.DnsClient(loop, [servers[0].place]).ask("a.example", "A")
            return True

        # The deadline may come up inside the resolver, which then says so in its own way.
        with contextlib.suppress(TemporaryFailure):
            assert run(main)


def test_many_questions_at_once_get_each_its_answer():
    def respond(query: dns.message.Message, via: str) -> dns.message.Message:
        name = query.question[0].name.to_text()
        number = int(name.split(".")[0][1:])
        return answering(f"{name} 300 A 192.0.2.{number}")(query, via)

    with serving(respond) as servers:

        async def main(loop):
            names = Names(loop, chasquid.DnsClient(loop, [servers[0].place]).ask)
            tasks = [
                loop.spawn(names.query(f"n{number}.example", "A"), "asks") for number in range(40)
            ]
            return [(await task.join()).records for task in tasks]

        assert run(main) == [(f"192.0.2.{number}",) for number in range(40)]


@pytest.mark.parametrize("name", ["a..example", "x" * 64 + ".example", "y." * 130 + "example"])
def test_a_name_that_cannot_be_does_not_exist(name):
    found, seen = ask(name, "A", answering("a.example. 300 A 192.0.2.1"))
    assert found.exists is False
    assert seen == [[]]


# --- whose word is taken for it that an answer is authentic (DNSSEC) ---


def own_address() -> str:
    """Return an address of this machine that is not on loopback, or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return ""
        found = str(probe.getsockname()[0])
    return "" if found.startswith(("127.", "0.")) else found


def told(host: str, authentic: bool, trust_ad: bool, kind: str = "A") -> Answer:
    """Return what is learnt from a server that sets the AD bit if `authentic`."""
    flags: list[int] = []

    def respond(query: dns.message.Message, via: str) -> dns.message.Message:
        flags.append(query.flags)
        response = answering(*["there.example. 60 A 192.0.2.1"] * (kind == "A"))(query, via)
        response.flags |= dns.flags.AD if authentic else 0
        return response

    try:
        server = NameServer(respond, host)
    except OSError:
        pytest.skip(f"there is no {host}")

    async def main(loop: chasquid.Loop) -> Answer:
        return await chasquid.DnsClient(loop, [server.place], trust_ad).ask("there.example", kind)

    with contextlib.closing(server):
        answer = run(main)
    assert flags and all(asked & dns.flags.AD for asked in flags)
    return answer


@pytest.mark.parametrize("kind", ["A", "MX"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1"])
@pytest.mark.parametrize("authentic", [True, False])
def test_a_server_on_this_machine_is_believed_what_is_authentic(
    host: str, authentic: bool, kind: str
) -> None:
    for trust_ad in (False, True):
        answer = told(host, authentic, trust_ad, kind)
        assert answer.records == (("192.0.2.1",) if kind == "A" else ())
        assert answer.authentic is authentic


@pytest.mark.parametrize("authentic", [True, False])
def test_another_server_is_believed_only_if_that_is_set(authentic: bool) -> None:
    host = own_address()
    if not host:
        pytest.skip("this machine has no address but those on loopback")
    assert told(host, authentic, False) == Answer(True, ("192.0.2.1",), 60, False)
    assert told(host, authentic, True) == Answer(True, ("192.0.2.1",), 60, authentic)
