# SPDX-License-Identifier: Apache-2.0
"""Room SPF: what it says of a sender, what hostile records cost, what a server makes of it."""

from __future__ import annotations

import email
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from support import (
    DOWN,
    HOST,
    LETTER,
    FakeClock,
    RunningClock,
    Serve,
    Server,
    Wire,
    Zone,
    greeted,
    logged_in,
    run,
    send,
    turns,
    wait_for,
)

import chasquid
from chasquid import Spf

Table = dict[tuple[str, str], Sequence[str] | Exception]

CLIENT = "192.0.2.1"
PLAIN = re.compile(r"[ -~]*")  # on one line, in ASCII


def table(records: Mapping[Any, Any]) -> Table:
    """Return what a Zone takes; a name alone stands for its TXT, a text for one record."""
    found: Table = {}
    for key, value in records.items():
        question = key if isinstance(key, tuple) else (key, "TXT")
        found[question] = [value] if isinstance(value, str) else value
    return found


def look(
    records: Mapping[Any, Any],
    ip: str = CLIENT,
    sender: str = "eva@there.example",
    hello: str = "mx.there.example",
) -> tuple[Spf, list[tuple[str, str]], float]:
    """Return the result, the questions, and the seconds of processor time it took."""
    zone = Zone(table(records))

    async def main(loop: chasquid.Loop) -> tuple[Spf, float]:
        names = chasquid.Names(loop, zone.ask)
        start = time.thread_time()
        found = await chasquid.check_spf(names, loop, ip, sender, hello, HOST)
        return found, time.thread_time() - start

    found, seconds = run(main)
    return found, zone.asked, seconds


def check(records: Mapping[Any, Any], **who: str) -> Spf:
    return look(records, **who)[0]


def result(record: str, records: Mapping[Any, Any] | None = None, **who: str) -> str:
    """Return what comes out where there.example has `record`."""
    return check({"there.example": record, **(records or {})}, **who).result


# --- results ---


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ({"there.example": "v=spf1 ip4:192.0.2.0/24 -all"}, "pass"),
        ({"there.example": "v=spf1 -all"}, "fail"),
        ({"there.example": "v=spf1 ~all"}, "softfail"),
        ({"there.example": "v=spf1 ?all"}, "neutral"),
        ({"there.example": "v=spf1 ip4:192.0.2.2"}, "neutral"),
        ({"there.example": ["google-site-verification=1", "v=spf10 -all"]}, "none"),
        ({}, "none"),
        ({"there.example": "v=spf1 nonsense -all"}, "permerror"),
        ({"there.example": ["v=spf1 -all", "v=spf1 +all"]}, "permerror"),
        ({"there.example": DOWN}, "temperror"),
    ],
)
def test_each_result(records: dict[str, Any], expected: str) -> None:
    found = check(records)
    assert (found.result, found.identity, found.domain) == (expected, "mailfrom", "there.example")


def test_no_address_of_a_host_matches_but_the_client_s() -> None:
    records = {("mx.there.example", "A"): ["192.0.2.9", CLIENT]}
    assert result("v=spf1 a:mx.there.example -all", records) == "pass"
    assert result("v=spf1 a:mx.there.example -all", records, ip="192.0.2.8") == "fail"


def test_exchangers_and_names_of_the_client_match() -> None:
    records = {
        ("there.example", "MX"): ["10 mx.there.example."],
        ("mx.there.example", "A"): [CLIENT],
        ("1.2.0.192.in-addr.arpa", "PTR"): ["mx.there.example."],
    }
    assert result("v=spf1 mx -all", records) == "pass"
    assert result("v=spf1 ptr -all", records) == "pass"
    assert result("v=spf1 ptr:other.example -all", records) == "fail"
    explained = {**records, "why.example": "you are %{p}"}
    found = check({"there.example": "v=spf1 -all exp=why.example", **explained})
    assert found.explanation == "you are mx.there.example"


# --- who is judged ---


def test_for_the_null_reverse_path_the_name_of_helo_is_judged() -> None:
    records = {"mx.there.example": "v=spf1 -all"}
    found = check(records, sender="", hello="MX.There.Example.")
    assert found[:3] == ("fail", "helo", "mx.there.example")
    found = check({"mx.there.example": "v=spf1 exists:%{l}.%{o} -all",
                   ("postmaster.mx.there.example", "A"): ["127.0.0.2"]}, sender="")  # fmt: skip
    assert found.result == "pass"


@pytest.mark.parametrize(
    "hello", ["[192.0.2.1]", "[IPv6:2001:db8::1]", "192.0.2.1", "localhost", "a..b", "x_y", "…"]
)
def test_a_helo_that_names_no_domain_has_no_policy_and_nothing_is_asked(hello: str) -> None:
    found, asked, _ = look({(hello, "TXT"): ["v=spf1 -all"]}, sender="", hello=hello)
    assert (found.result, found.identity, asked) == ("none", "helo", [])


def test_a_sender_at_an_address_literal_has_no_policy() -> None:
    assert check({}, sender="eva@[192.0.2.1]") == Spf("none", "mailfrom")


def test_a_client_with_ipv6_is_compared_without_its_scope() -> None:
    record = "v=spf1 ip6:fe80::1 -all"
    assert result(record, ip="fe80::1%eth0") == "pass"
    assert result(record, ip="fe80::2%eth0") == "fail"
    assert result("v=spf1 a -all", {("there.example", "AAAA"): ["fe80::1"]}, ip="fe80::1") == "pass"


def test_a_client_with_ipv4_inside_ipv6_is_judged_by_ipv4() -> None:
    assert result("v=spf1 ip4:192.0.2.1 -all", ip="::ffff:192.0.2.1") == "pass"
    records = {("there.example", "A"): [CLIENT]}
    assert result("v=spf1 a -all", records, ip="::ffff:192.0.2.1") == "pass"


@pytest.mark.parametrize("local", ['"eva@innocent.example"', '"@"', '"a b@c"', "eva@innocent"])
def test_the_domain_is_what_follows_the_last_at(local: str) -> None:
    records = {"there.example": "v=spf1 -all", "innocent.example": "v=spf1 +all"}
    found, asked, _ = look(records, sender=f"{local}@there.example")
    assert found[:3] == ("fail", "mailfrom", "there.example")
    assert asked == [("there.example", "TXT")]


def test_an_internationalised_domain_is_asked_in_its_ascii_form() -> None:
    found = check({"xn--bcher-kva.example": "v=spf1 -all"}, sender="eva@Bücher.example")
    assert found[:3] == ("fail", "mailfrom", "xn--bcher-kva.example")


@pytest.mark.parametrize("macro", ["%{l}", "%{s}"])
def test_macros_with_a_local_part_that_is_not_ascii_match_nothing(macro: str) -> None:
    # RFC 8616, 4; and nothing is looked up, so no limit of look-ups can be reached by it
    terms = " ".join(f"exists:{macro}.{number}.example" for number in range(5))
    found, asked, _ = look({"there.example": f"v=spf1 {terms} ~all"}, sender="ñandú@there.example")
    assert found.result == "softfail"
    assert asked == [("there.example", "TXT")]


def test_macros_say_what_they_should() -> None:
    record = "v=spf1 exists:%{ir}.%{v}.%{l1r-}.lp._spf.%{d2} exists:%{h}.%{o} exists:%{L}%%.x -all"
    who = {"sender": "strong-bad@email.there.example"}
    _, asked, _ = look({"email.there.example": record}, **who)
    assert set(asked[1:]) == {
        ("1.2.0.192.in-addr.strong.lp._spf.there.example", "A"),
        ("mx.there.example.email.there.example", "A"),
        ("strong-bad%.x", "A"),
    }


@pytest.mark.parametrize("term", ["exists:%{%{d}}.x", "exists:%{d%{d}}.x", "a:%{%", "x=%{d", "a:%"])
def test_macros_in_macros_are_an_error_or_no_macros_but_never_let_anybody_in(term: str) -> None:
    assert result(f"v=spf1 {term} -all") in ("permerror", "fail")


# --- nobody could say ---


@pytest.mark.parametrize(
    ("term", "question"),
    [
        ("a", ("there.example", "A")),
        ("mx", ("there.example", "MX")),
        ("mx:two.example", ("mx.two.example", "A")),
        ("exists:%{i}.example", ("192.0.2.1.example", "A")),
        ("include:other.example", ("other.example", "TXT")),
        ("redirect=other.example", ("other.example", "TXT")),
    ],
)
def test_a_failure_that_may_pass_is_never_a_fail(term: str, question: tuple[str, str]) -> None:
    records = {("two.example", "MX"): ["10 mx.two.example."], question: DOWN}
    all_others = "" if term.startswith("redirect") else " -all"
    found = check({"there.example": f"v=spf1 {term}{all_others}", **records})
    assert found.result == "temperror"
    assert "down" in found.explanation


def test_what_was_decided_before_a_failure_holds() -> None:
    assert result("v=spf1 ip4:192.0.2.1 a:down.example", {("down.example", "A"): DOWN}) == "pass"


def test_an_explanation_that_cannot_be_had_is_left_out() -> None:
    found = check({"there.example": "v=spf1 -all exp=why.example", "why.example": DOWN})
    assert found.result == "fail"
    assert "down" not in found.explanation


@pytest.mark.parametrize("pause", [3, 8, 10**6])
def test_after_20_seconds_it_is_given_up(pause: int) -> None:
    records = {f"n{number}.example": f"v=spf1 include:n{number + 1}.example -all"
               for number in range(9)}  # fmt: skip
    zone = Zone(table({**records, "n9.example": "v=spf1 +all"}))

    async def main(loop: chasquid.Loop) -> tuple[Spf, float]:
        async def ask(name: str, kind: str) -> chasquid.Answer:
            await loop.sleep(pause)
            return await zone.ask(name, kind)

        names = chasquid.Names(loop, ask)
        start = loop.clock.monotonic()
        sender = "eva@n0.example"
        task = loop.spawn(chasquid.check_spf(names, loop, CLIENT, sender, "x.example", HOST), "spf")
        while not task.done:
            await turns(loop)
            loop.clock.now += 0.5  # type: ignore[attr-defined]
        return await task.join(), loop.clock.monotonic() - start

    found, seconds = run(main, clock=FakeClock())
    assert found.result == "temperror"
    assert seconds <= 22
    assert seconds >= 15, "given up too early"


# --- limits ---


def padded(record: str, size: int) -> str:
    """Return a record of `size` octets that begins as `record` does, and fails all."""
    term = " ip4:198.51.100.1"
    record += term * ((size - len(record) - 5) // len(term))
    return record + " " * (size - len(record) - 4) + "-all"


def test_a_record_of_4_kb_is_read_and_a_longer_one_is_an_error() -> None:
    record = padded("v=spf1", 4096)
    assert len(record) == 4096
    assert result(record) == "fail"
    assert result(padded("v=spf1", 4097)) == "permerror"
    assert result("v=spf1 include:other.example -all",
                  {"other.example": padded("v=spf1", 4097)}) == "permerror"  # fmt: skip


def test_another_text_of_any_length_beside_the_record_does_no_harm() -> None:
    assert check({"there.example": ["x" * 60_000, "v=spf1 -all"]}).result == "fail"


def test_an_explanation_of_endless_macros_is_left_out() -> None:
    found = check({"there.example": "v=spf1 -all exp=why.example", "why.example": "%{s} " * 800})
    assert (found.result, found.explanation) == ("fail", "")


@pytest.mark.parametrize(
    "text",
    ["no\r\n250 2.0.0 yes", "a\nb\rc\x00d\x1be", "cañón ☃\x85x\u2028y".encode().decode("latin-1"),
     "x" * 4090, "no: " + "%{s} " * 150, "é" * 4000],
    ids=["CRLF", "controls", "not ASCII", "long", "long by macros", "long and not ASCII"],
)  # fmt: skip
def test_an_explanation_becomes_one_short_line_of_ascii(text: str) -> None:
    found = check({"there.example": "v=spf1 -all exp=why.example", "why.example": text})
    assert found.result == "fail"
    assert found.explanation or not text.isascii()  # RFC 7208, 6.2: such a text is left out
    assert PLAIN.fullmatch(found.explanation), found.explanation
    assert len(found.explanation) <= 200


def test_an_explanation_is_what_the_domain_says() -> None:
    found = check({"there.example": "v=spf1 -all exp=why.%{d}",
                   "why.there.example": "%{i} is not ours; ask %{r}, %{s}"})  # fmt: skip
    assert found.explanation == f"192.0.2.1 is not ours; ask {HOST}, eva@there.example"


def test_the_text_of_an_error_is_one_short_line_of_ascii() -> None:
    found = check({"there.example": "v=spf1 " + "x" * 3000 + "\r\n\x1b -all"})
    assert found.result == "permerror"
    assert PLAIN.fullmatch(found.explanation), found.explanation
    assert len(found.explanation) <= 200


CIRCLES = {
    "includes": {
        "there.example": "v=spf1 include:b.example -all",
        "b.example": "v=spf1 include:there.example -all",
    },
    "redirects": {
        "there.example": "v=spf1 redirect=b.example",
        "b.example": "v=spf1 redirect=there.example",
    },
    "itself": {"there.example": "v=spf1 redirect=there.example"},
    "included itself": {
        "there.example": "v=spf1 include:b.example -all",
        "b.example": "v=spf1 include:b.example -all",
    },
}


@pytest.mark.parametrize("records", CIRCLES.values(), ids=CIRCLES)
def test_what_goes_in_circles_is_an_error(records: dict[str, str]) -> None:
    found, asked, _ = look(records)
    assert found.result == "permerror"
    assert len(asked) == len(records)


def test_ten_terms_may_ask_and_eleven_may_not() -> None:
    hosts = {(f"a{number}.example", "A"): ["192.0.2.9"] for number in range(11)}
    for count, expected in ((10, "fail"), (11, "permerror")):
        terms = " ".join(f"a:a{number}.example" for number in range(count))
        assert result(f"v=spf1 {terms} -all", hosts) == expected


def test_two_names_may_have_nothing_and_three_may_not() -> None:
    for count, expected in ((2, "fail"), (3, "permerror")):
        terms = " ".join(f"a:a{number}.example" for number in range(count))
        assert result(f"v=spf1 {terms} -all") == expected


def test_ten_exchangers_are_looked_up_and_eleven_are_an_error() -> None:
    hosts: dict[Any, Any] = {(f"mx{number}.example", "A"): ["192.0.2.9"] for number in range(11)}
    hosts["mx9.example", "A"] = [CLIENT]
    exchangers = [f"10 mx{number}.example." for number in range(11)]
    found, asked, _ = look({"there.example": "v=spf1 mx -all",
                            ("there.example", "MX"): exchangers[:10], **hosts})  # fmt: skip
    assert (found.result, len(asked)) == ("pass", 12)
    found, asked, _ = look({"there.example": "v=spf1 mx -all",
                            ("there.example", "MX"): exchangers, **hosts})  # fmt: skip
    assert (found.result, len(asked)) == ("permerror", 2)


def test_of_the_names_of_a_client_ten_count() -> None:
    names = [f"n{number}.there.example." for number in range(11)]
    others: dict[Any, Any] = {(name[:-1], "A"): ["192.0.2.9"] for name in names}
    for place, expected in ((9, "pass"), (10, "fail")):
        hosts = {**others, (names[place][:-1], "A"): [CLIENT]}
        hosts["1.2.0.192.in-addr.arpa", "PTR"] = names
        found, asked, _ = look({"there.example": "v=spf1 ptr -all", **hosts})
        assert found.result == expected
        assert len(asked) <= 12


def test_a_policy_that_leads_ever_further_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    records = {f"n{number}.example": f"v=spf1 include:n{number + 1}.example exp=x{number}.example"
               for number in range(9)}  # fmt: skip
    records["n9.example"] = "v=spf1 +all"
    found, asked, _ = look(records, sender="eva@n0.example")
    assert (found.result, len(asked)) == ("pass", 19)
    monkeypatch.setattr(chasquid, "_SPF_ROUNDS", 5)
    found, asked, _ = look(records, sender="eva@n0.example")
    assert (found.result, len(asked)) == ("permerror", 11)


@pytest.mark.parametrize("count", [13, 30, 790])
def test_no_name_is_asked_that_is_longer_than_names_can_be(count: int) -> None:
    record = f"v=spf1 exists:{'%{s}.' * count}example -all"
    _, asked, _ = look({"there.example": record})
    assert max(len(name) for name, _ in asked) <= 253


def chain(term: str, text: str = "") -> dict[str, str]:
    """Return ten policies, each of which includes the next, with `term` in each."""
    names = ["there.example", *(f"c{number}.example" for number in range(10))]
    records = {name: f"v=spf1 include:{then} {term} -all"
               for name, then in zip(names, names[1:], strict=False)}  # fmt: skip
    records[names[-1]] = "v=spf1 ?all"
    return records | {f"why.{name}": text for name in names if text}


DOTS = "." * 3900
WIDE = padded("v=spf1", 4096).removesuffix("-all")
HOSTILE: dict[str, dict[str, Any]] = {
    "4 kB of empty a:": {"there.example": ("v=spf1" + " a:" * 1400)[:4096]},
    "4 kB of a:": {"there.example": ("v=spf1" + " a:a.example" * 400)[:4090]},
    "4 kB of dots with a %": {"there.example": f"v=spf1 a:%_{DOTS}.ee -all"},
    "4 kB of one label": {"there.example": f"v=spf1 a:x.{'a' * 4000}!.ee -all"},
    "4 kB of braces": {"there.example": f"v=spf1 a:{'%{' * 1900}.ee -all"},
    "ten includes of 4 kB": {
        "there.example": "v=spf1" + "".join(f" include:i{n}.example" for n in range(10)) + " -all",
        **{f"i{n}.example": WIDE for n in range(10)},
    },
    "ten includes of 4 kB of dots": {
        "there.example": "v=spf1" + "".join(f" include:i{n}.example" for n in range(10)) + " -all",
        **{f"i{n}.example": f"v=spf1 a:%_{DOTS}.ee" for n in range(10)},
    },
    "a chain of names of dots": chain(f"exp=%_{DOTS}.ee"),
    "a chain of long labels": chain(f"exp=x.{'a' * 3900}!.ee"),
    "a chain of unknown modifiers": chain(f"x=%_{DOTS}"),
    "a chain of many terms": chain(" ".join(f"ip4:192.0.3.{n}" for n in range(90))),
    "a chain of texts of dots": chain("exp=why.%{d}", "%_" + DOTS),
    "a chain of texts of macros": chain("exp=why.%{d}", "%{s}" * 1000),
    "a chain of texts of braces": chain("exp=why.%{d}", "%{" * 2000),
    "includes in a circle": CIRCLES["includes"],
    "60 kB": {"there.example": "v=spf1" + " a:a.example" * 5000},
    "an explanation of two lines": {
        "there.example": "v=spf1 -all exp=why.example", "why.example": "no\r\n250 yes",
    },
}  # fmt: skip


@pytest.mark.parametrize("records", HOSTILE.values(), ids=HOSTILE)
def test_hostile_records_take_little_of_the_loop_s_time(records: dict[str, Any]) -> None:
    found, asked, seconds = look(records)
    assert found.result != "pass"
    assert len(asked) <= 24
    assert seconds < 1, "everybody else waits meanwhile"


def test_loops_in_several_threads_do_not_disturb_each_other() -> None:
    problems: list[object] = []
    addresses = {
        "pass": [CLIENT],
        "fail": ["192.0.2.9"],
        "temperror": DOWN,
        "permerror": [CLIENT, "nonsense"],
    }

    def judge(expected: str) -> None:
        records = {"i.example": "v=spf1 a:h.example", ("h.example", "A"): addresses[expected]}
        try:
            for _ in range(20):
                found = result("v=spf1 include:i.example -all", records)
                if found != expected:
                    problems.append((expected, found))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=judge, args=(expected,)) for expected in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# --- the server ---

# RFC 5322: 3.2.3 and 3.2.4; RFC 2045, 5.1
DOT_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`{|}~-]+"
QUOTED = r'"(?:[^"\\]|\\.)*"'
COMMENT = r"\((?:[^()\\]|\\.)*\)"
LOOSE = rf"(?:\s|{COMMENT})*"  # CFWS
PROPERTY = rf"(smtp|header)\.([a-z]+)=({QUOTED}|(?:{DOT_ATOM}@)?{TOKEN})"


def unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def received_spf(message: Message) -> tuple[str, dict[str, str]]:
    """Return the result and the pairs of the only field (RFC 7208, 9.1)."""
    [field] = message.get_all("Received-SPF", [])
    head = re.match(rf"([a-z]+)\s+{COMMENT}\s+", field)
    assert head, field
    pairs: dict[str, str] = {}
    rest = field[head.end() :]
    while rest:
        pair = re.match(rf"([a-z][a-z0-9_.-]*)=({DOT_ATOM}|{QUOTED})(?:;\s*|$)", rest)
        assert pair, rest
        assert pair[1] not in pairs
        pairs[pair[1]] = unquoted(pair[2])
        rest = rest[pair.end() :]
    return head[1], pairs


def results(field: str) -> tuple[str, dict[str, tuple[str, dict[str, str]]]]:
    """Return the server, and by method the result and its properties (RFC 8601, 2.2)."""
    server, *infos = re.split(rf"{LOOSE};{LOOSE}", field.strip())
    assert re.fullmatch(TOKEN, server), server
    found = {}
    for info in infos if infos != ["none"] else []:
        match = re.fullmatch(rf"([a-z-]+)=([a-z]+)((?:{LOOSE}{PROPERTY})*){LOOSE}", info)
        assert match, info
        found[match[1]] = (
            match[2],
            {
                f"{kind}.{name}": unquoted(value)
                for kind, name, value in re.findall(PROPERTY, match[3])
            },
        )
    return server, found


def ours(message: Message) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the results in our name, which come first and once."""
    fields = [results(field) for field in message.get_all("Authentication-Results", [])]
    assert [server for server, _ in fields].count(HOST) == 1
    assert fields[0][0] == HOST
    return fields[0][1]


def zone(records: Mapping[Any, Any]) -> Callable[[str, str], Any]:
    return Zone(table(records)).ask


def delivered(server: Server, sender: str, data: bytes = LETTER, mail: str = "") -> bytes:
    """Send a message from a stranger; return what is in the Maildir."""
    with greeted(server) as wire:
        assert wire.ask(f"MAIL FROM:<{sender}>{mail}").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(data + b".\r\n")
        assert wire.reply().startswith("250 ")
    return server.mail("ana")[-1]


def test_a_fail_is_refused_with_the_explanation_on_one_line(serve: Serve) -> None:
    text = "go away\r\n250 2.1.0 ok\r\n" + "x" * 220
    server = serve(ask=zone({"there.example": "v=spf1 -all exp=why.example", "why.example": text,
                             "good.example": "v=spf1 +all"}))  # fmt: skip
    with greeted(server) as wire:
        wire.say("MAIL FROM:<eva@there.example>")
        line = wire.line()
        assert line.startswith("550 5.7.23 ")
        assert "there.example" in line and "127.0.0.1" in line
        assert "go away 250 2.1.0 ok" in line
        assert PLAIN.fullmatch(line), line
        assert len(line) < 510
        assert wire.ask("NOOP").startswith("250 2.0.0 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("503 ")
        assert wire.ask("MAIL FROM:<eva@good.example>").startswith("250 ")
    assert server.daemon.log.counters["spf", "fail"] == 1


def test_a_fail_of_the_helo_identity_is_refused_too(serve: Serve) -> None:
    server = serve(ask=zone({"client.example": "v=spf1 -all"}))
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("550 5.7.23 ")
        assert wire.ask("MAIL FROM:<eva@there.example>").startswith("250 ")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("v=spf1 +all", "pass"),
        ("v=spf1 ~all", "softfail"),
        ("v=spf1 ?all", "neutral"),
        (None, "none"),
        (f'v=spf1 {"(" * 150}nonsense\\")))\x1b{"é" * 200} -all', "permerror"),
        (f"v=spf1 {'x' * 3000} -all", "permerror"),
        (DOWN, "temperror"),
    ],
)
def test_every_other_result_lets_the_message_in_and_is_written_down(
    serve: Serve, record: Any, expected: str
) -> None:
    server = serve(ask=zone({"there.example": record} if record else {}))
    stored = delivered(server, "eva@there.example")
    message = email.message_from_bytes(stored)
    found, pairs = received_spf(message)
    assert found == expected
    assert pairs == {
        "client-ip": "127.0.0.1",
        "envelope-from": "eva@there.example",
        "helo": "client.example",
        "receiver": HOST,
        "identity": "mailfrom",
    }
    assert ours(message)["spf"] == (expected, {"smtp.mailfrom": "eva@there.example"})
    assert message.keys()[2:5] == ["Authentication-Results", "Received-SPF", "Received"]
    assert stored.isascii()
    assert max(map(len, stored.split(b"\n"))) <= 998
    assert server.daemon.log.counters["spf", expected] == 1


def test_the_helo_identity_is_written_down_as_such(serve: Serve) -> None:
    server = serve(ask=zone({"client.example": "v=spf1 +all"}))
    message = email.message_from_bytes(delivered(server, ""))
    found, pairs = received_spf(message)
    assert found == "pass"
    assert pairs == {"client-ip": "127.0.0.1", "helo": "client.example", "receiver": HOST,
                     "identity": "helo"}  # fmt: skip
    assert ours(message)["spf"] == ("pass", {"smtp.helo": "client.example"})


@pytest.mark.parametrize(
    "sender",
    ['"a\\"b@c; x"@there.example', "o'neill+x/y=z@there.example", '"a (b) c"@there.example',
     "{a|b}~@there.example"],
)  # fmt: skip
def test_an_odd_sender_is_written_down_so_that_it_can_be_read_again(
    serve: Serve, sender: str
) -> None:
    message = email.message_from_bytes(delivered(serve(), sender))
    assert received_spf(message)[1]["envelope-from"] == sender
    [domain] = ours(message)["spf"][1].values()
    assert domain in (sender, "there.example")


def test_without_smtputf8_the_fields_are_ascii(serve: Serve) -> None:
    stored = delivered(serve(), "eva@xn--bcher-kva.example")
    pairs = received_spf(email.message_from_bytes(stored))[1]
    assert pairs["envelope-from"] == "eva@xn--bcher-kva.example"
    assert stored[stored.index(b"Authentication-Results:") :].isascii()


def test_a_name_in_helo_that_is_not_ascii_leaves_the_fields_ascii(serve: Serve) -> None:
    server = serve()
    with server.connect() as wire:
        wire.reply()
        assert wire.ask("EHLO ñandú").startswith("250-")
        assert send(wire, LETTER, sender="eva@there.example").startswith("250 ")
    assert server.mail("ana")[-1].isascii()


def test_with_smtputf8_the_sender_is_written_as_it_came(serve: Serve) -> None:
    stored = delivered(serve(), "ñandú@bücher.example", mail=" SMTPUTF8")
    assert "ñandú@bücher.example".encode() in stored.partition(b"\nReceived: ")[0]


def test_our_users_are_not_judged(serve: Serve) -> None:
    table = Zone(
        {("here.example", "TXT"): ["v=spf1 -all"], ("client.example", "TXT"): ["v=spf1 -all"]}
    )
    server = serve(ask=table.ask)
    with logged_in(server) as wire:
        assert send(wire, LETTER, sender="ana@here.example").startswith("250 ")
        assert send(wire, LETTER, sender="").startswith("250 ")
    for stored in server.mail("ana"):
        assert b"Received-SPF" not in stored
        assert b"Authentication-Results" not in stored
    # which certificates it needs is asked for at the start
    assert set(table.asked) <= {("here.example", "MX")}
    with greeted(server) as wire:  # who has not logged in may not say to be one of them
        assert wire.ask("MAIL FROM:<ana@here.example>").startswith("550 5.7.23 ")


# --- forged results ---

FORGED = {
    "plain": b"Authentication-Results: mail.here.example; spf=pass",
    "case": b"AUTHENTICATION-results: Mail.HERE.Example; spf=pass",
    "no space": b"Authentication-Results:mail.here.example;spf=pass",
    "space before the colon": b"Authentication-Results : mail.here.example; spf=pass",
    "version": b"Authentication-Results: mail.here.example 1; spf=pass",
    "comment": b"Authentication-Results: (a(b)\\) c) mail.here.example (d); spf=pass",
    "comment with the sign of the end": b"Authentication-Results: (;) mail.here.example; spf=pass",
    "quoted": b'Authentication-Results: "mail.here.example"; spf=pass',
    "quoted with backslashes": b'Authentication-Results: "mail\\.here.\\example"; spf=pass',
    "folded": b"Authentication-Results:\r\n mail.here.example\r\n\t;\r\n spf=pass",
    "last dot": b"Authentication-Results: mail.here.example.; spf=pass",
    "only the name": b"Authentication-Results: mail.here.example",
    "empty": b"Authentication-Results:",
    "comment that stays open": b"Authentication-Results: (a mail.here.example; spf=pass",
    "quote that stays open": b'Authentication-Results: "mail.here.example; spf=pass',
    "in pieces": b"Authentication-Results: mail.here(x).example; spf=pass",
    "in pieces with spaces": b"Authentication-Results: mail . here . example; spf=pass",
    "wide": "Authentication-Results: mail.ｈere.example; spf=pass".encode(),
}
OTHERS = {
    "another": b"Authentication-Results: mail.there.example; spf=pass",
    "one below": b"Authentication-Results: x.mail.here.example; spf=pass",
    "one above": b"Authentication-Results: here.example; spf=pass",
    "named later": b"Authentication-Results: there.example; spf=pass smtp.helo=mail.here.example",
    "named in a comment": b"Authentication-Results: there.example (mail.here.example); none",
    "another field": b"X-Authentication-Results: mail.here.example; spf=pass",
    "a longer name": b"Authentication-Results-X: mail.here.example; spf=pass",
    "no server, as some write it": b"Subject: mail.here.example; spf=pass",
}
IN_FRONT = ["return-path", "delivered-to", "authentication-results", "received-spf", "received"]
SIZES = {"small": 1, "larger than memory": 5000}
BODY = b"Authentication-Results: mail.here.example; spf=pass\r\n\r\n..dots\r\nthe end, " + b"x" * 50


def stored_below(stored: bytes) -> bytes:
    """Return what is stored below the fields that we put in front, with CRLF."""
    data = stored.replace(b"\n", b"\r\n")
    block = chasquid.header_block(data)
    fields = chasquid.header_fields(data if block is None else block)
    assert [field.name for field in fields[: len(IN_FRONT)]] == IN_FRONT
    return data[sum(len(field.raw) for field in fields[: len(IN_FRONT)]) :]


@pytest.mark.parametrize("count", SIZES.values(), ids=SIZES)
def test_forged_results_go_and_all_else_stays(serve: Serve, count: int) -> None:
    server = serve()
    kept = [b"From: eva@there.example", *OTHERS.values(), b"To: ana@here.example"]
    forged = list(FORGED.values())
    mixed = [*forged, *(each for pair in zip(kept, forged, strict=False) for each in pair)]
    mixed += kept[len(forged) :] + forged
    body = (BODY + b"\r\n") * count
    data = b"\r\n".join(mixed) + b"\r\n\r\n" + body
    stored = delivered(server, "eva@there.example", data.replace(b"\r\n..", b"\r\n..."))
    assert stored_below(stored) == b"\r\n".join(kept) + b"\r\n\r\n" + body
    assert len(ours(email.message_from_bytes(stored))) >= 3


@pytest.mark.parametrize("field", FORGED.values(), ids=FORGED)
def test_a_forged_field_by_itself_goes(serve: Serve, field: bytes) -> None:
    server = serve()
    stored = delivered(server, "eva@there.example", field + b"\r\n\r\nbody\r\n")
    assert stored_below(stored) == b"\r\nbody\r\n"


@pytest.mark.parametrize("field", OTHERS.values(), ids=OTHERS)
def test_a_field_of_another_by_itself_stays(serve: Serve, field: bytes) -> None:
    server = serve()
    stored = delivered(server, "eva@there.example", field + b"\r\n\r\nbody\r\n")
    assert stored_below(stored) == field + b"\r\n\r\nbody\r\n"


@pytest.mark.parametrize("count", [1, 3000])
def test_forged_results_go_from_a_message_that_is_only_a_header(serve: Serve, count: int) -> None:
    server = serve()
    data = (
        b"Subject: no body\r\n" + FORGED["plain"] + b"\r\n" + b"X-Long:" + b" and long\r\n" * count
    )
    stored = delivered(server, "eva@there.example", data)
    assert stored_below(stored) == data.replace(FORGED["plain"] + b"\r\n", b"")


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_forged_results_go_however_the_chunks_are_cut(serve: Serve, step: int) -> None:
    server = serve()
    data = FORGED["folded"] + b"\r\nSubject: x\r\n" + FORGED["plain"] + b"\r\n\r\nbody\r\n"
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<eva@there.example>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        for start in range(0, len(data), step):
            chunk = data[start : start + step]
            last = " LAST" if start + step >= len(data) else ""
            wire.send(f"BDAT {len(chunk)}{last}\r\n".encode() + chunk)
            assert wire.reply().startswith("250 ")
    assert stored_below(server.mail("ana")[-1]) == b"Subject: x\r\n\r\nbody\r\n"


def test_what_our_users_forge_goes_too(serve: Serve) -> None:
    server = serve()
    with logged_in(server) as wire:
        data = FORGED["plain"] + b"\r\n" + LETTER
        assert send(wire, data, sender="ana@here.example").startswith("250 ")
    assert b"Authentication-Results" not in server.mail("ana")[-1]


# --- name servers that never answer ---


def test_a_crowd_that_waits_for_name_servers_keeps_none_of_our_users_waiting(serve: Serve) -> None:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = max(50, min(1000, (descriptors - 500) // 2))
    clock = RunningClock()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        server = serve(ask=None, dns_server=place, clock=clock)
        crowd = [server.connect() for _ in range(count)]
        try:
            for number, wire in enumerate(crowd):
                wire.send(f"HELO x\r\nMAIL FROM:<eva@n{number}.example>\r\n".encode())
            counters = server.daemon.log.counters
            wait_for(lambda: counters["commands", "MAIL"] == count, "the crowd to say MAIL")
            start = time.monotonic()
            with logged_in(server) as wire:
                assert send(wire, LETTER, sender="ben@here.example").startswith("250 ")
            assert server.mail("ana")
            assert time.monotonic() - start < 14
            assert not any(key[0] == "spf" for key in counters), "somebody has been answered"
            _let_go(server, clock, crowd)
        finally:
            for wire in crowd:
                wire.close()
        assert counters["spf", "temperror"] == count


def _let_go(server: Server, clock: RunningClock, crowd: Sequence[Wire]) -> None:
    """Let the time pass for which anybody waits; all senders are let in."""
    server.settle()
    clock.advance(30)
    server.settle()
    for wire in crowd:
        assert [wire.reply()[:3] for _ in range(3)] == ["220", "250", "250"]


@pytest.mark.parametrize("error", [TypeError("odd"), ValueError("odd"), ImportError("gone")])
def test_a_check_that_breaks_lets_nobody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise error

    zone = Zone({("there.example", "TXT"): ["v=spf1 -all"]})
    server = Server(tmp_path, ask=zone.ask)
    server.start()
    try:
        with greeted(server) as wire:
            with monkeypatch.context() as patched:
                patched.setattr(chasquid._spf_query(), "_values", broken)
                reply = "451 4.3.0 Local error in processing: a check has failed by a fault of ours"
                assert wire.ask("MAIL FROM:<eva@there.example>") == reply
            assert wire.ask("MAIL FROM:<eva@there.example>").startswith("550 5.7.23 ")
        assert "MAIL in session" in server.log
        assert f"{type(error).__name__}: {error}" in server.log
        assert server.daemon.log.counters["crashes",] == 1
    finally:
        server.stop()
