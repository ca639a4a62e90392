# SPDX-License-Identifier: Apache-2.0
"""Room TLS POLICY: what was seen, what DANE and MTA-STS say, and what follows for a connection.

That couriers and server keep to it is in test_tls_downgrade.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DOWN,
    MX,
    SECONDS,
    FakeClock,
    Inline,
    RunningClock,
    Zone,
    certificate,
    record,
    run,
    tls_policies,
    turns,
    write_certificate,
)

import chasquid
from chasquid import (
    PLAIN,
    TLS_CLIENT,
    TLS_INSECURE,
    TLS_SECURE,
    DomainInfo,
    StsPolicy,
    TemporaryFailure,
    Tlsa,
    TlsRequirement,
)

Records = Mapping[tuple[str, str], Any]
ANNOUNCED = ("_mta-sts.there.example", "TXT")
POLICY = b"version: STSv1\nmode: enforce\nmx: mx.there.example\nmax_age: 86400\n"

pytestmark = pytest.mark.usefixtures("untrusting")


def domain_file(directory: Path, domain: str = "there.example") -> Path:
    return directory / "domaininfo" / f"s:{domain}"


def domain_text(incoming: str, outgoing: str, domain: str = "there.example") -> str:
    return f'name: "{domain}"\nincoming_sec_level: {incoming}\noutgoing_sec_level: {outgoing}\n'


def remember(directory: Path, outgoing: str, domain: str = "there.example") -> None:
    path = domain_file(directory, domain)
    path.parent.mkdir(exist_ok=True)
    path.write_text(domain_text(PLAIN, outgoing, domain))


# --- security levels ---


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
        ["ü" * 12] * 3,
        ["ü" * 50] * 3,
        ["漢" * 20] * 3,
        ["x" * 63] * 3 + ["x" * 51],
    ],
)
def test_a_domain_may_be_as_long_as_domains_are(tmp_path: Path, labels: list[str]) -> None:
    domain = ".".join([*labels, "example"])
    ascii, escaped = chasquid.domain_to_ascii(domain), urllib.parse.quote_plus(domain)
    assert len(ascii) <= 253
    name = os.path.basename(chasquid.domain_info_path("directory", domain))
    assert name == "s:" + (escaped if len(f"s:{escaped}") < 256 else ascii)
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
    assert f'event=error source="security levels" text="{domain_file(tmp_path)}' in log
    assert domain_file(tmp_path).read_text() == domain_text(PLAIN, TLS_INSECURE)


def test_a_directory_that_cannot_be_written_keeps_nothing_but_the_memory(tmp_path: Path) -> None:
    (tmp_path / "domaininfo").symlink_to("nowhere/at/all")

    async def main(levels: chasquid.SecurityLevels) -> None:
        await levels.saw_incoming("there.example", True)
        assert await levels.of("there.example") == DomainInfo(TLS_CLIENT)
        assert not await levels.accepts("there.example", False)
        assert await levels.forget("there.example")
        assert await levels.of("there.example") == DomainInfo()

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


# --- DANE ---

PEM = certificate("mx.there.example")[0]
DER = ssl.PEM_cert_to_DER_cert(PEM)
OTHER_DER = ssl.PEM_cert_to_DER_cert(certificate("other.example")[0])
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
    ["", "3", "3 1", "x y z w", "3 1 1 zz",
     "0 0 1 ab", "1 1 1 ab", "4 1 1 ab", "255 1 1 ab", "-3 1 1 ab", "3 2 1 ab", "3 255 1 ab",
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
        assert not Tlsa(usage, selector, matching, data).matches(OTHER_DER)


@pytest.mark.parametrize(
    "der",
    [b"", b"\x30", b"\x30\x03\x02\x01\x01", DER[:40], b"\xff" * 50],
    ids=["empty", "a tag", "a number", "cut short", "noise"],
)
def test_what_is_no_certificate_matches_nothing(der: bytes) -> None:
    assert not Tlsa(3, 1, 1, hashlib.sha256(b"").digest()).matches(der)
    assert not Tlsa(3, 1, 0, b"").matches(der)


# --- MTA-STS: policies ---


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


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (
            POLICY + b"mx: *.example.net\nmx: b.example",
            {"mx": ("mx.there.example", "*.example.net", "b.example")},
        ),
        (b"version: STSv1\nmode: none\nmax_age: 0", {"mode": "none", "mx": (), "max_age": 0}),
        (POLICY.replace(b"86400", b"0"), {"max_age": 0}),
        (POLICY.replace(b"86400", b"31557600"), {"max_age": 31557600}),
        (POLICY.replace(b"86400", b"31557601"), {"max_age": 31557600}),
        (POLICY.replace(b"86400", b"9" * 10), {"max_age": 31557600}),
    ],
    ids=["several servers", "none needs no server", "no age", "a year", "longer", "much longer"],
)
def test_what_a_policy_may_say(text: bytes, changed: dict[str, Any]) -> None:
    assert parse(text) == parse(POLICY)._replace(**changed)


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
        (b"mx.there.example", b"", "mx"),
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


class Sts:
    """The policies of a server over its lives, and the DNS and the web that it asks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = directory / "sts-cache"
        self.clock = FakeClock()
        self.records: dict[tuple[str, str], Any] = {}
        self.web: dict[str, bytes | Exception] = {}
        self.fetched: list[str] = []
        self.gate: chasquid.Event | None = None
        self.policies: chasquid.StsPolicies
        self.loop: chasquid.Loop
        self.counters: Mapping[tuple[str, ...], int] = {}
        self.announce("v=STSv1; id=1;")
        self.publish()

    def announce(self, *texts: str, domain: str = "there.example") -> None:
        self.records[f"_mta-sts.{domain}", "TXT"] = ["v=spf1 -all", *texts]

    def publish(self, mode: str = "enforce", age: str = "86400") -> None:
        text = POLICY.replace(b"enforce", mode.encode()).replace(b"86400", age.encode())
        self.web["there.example"] = text

    async def fetch(self, domain: str) -> bytes:
        self.fetched.append(domain)
        if self.gate is not None:
            await self.gate.wait()
        found = self.web.get(domain, chasquid.ChasquidError("there is no web server"))
        if isinstance(found, Exception):
            raise found
        return found

    def live(self, main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run `main` in a server that has just been started."""

        async def started(loop: chasquid.Loop) -> Any:
            log = record(self.directory, self.clock)
            self.loop, self.counters = loop, log.counters
            names = chasquid.Names(loop, Zone(self.records).ask)
            self.policies = chasquid.StsPolicies(loop, log, names, self.fetch, str(self.cache))
            self.policies.load()
            try:
                return await main()
            finally:
                log.close()

        return run(started, clock=self.clock, workers=Inline())

    async def mode(self, domain: str = "there.example") -> str:
        """Return the mode of the policy that is in force, or "no policy"."""
        policy = await self.policies.policy(domain)
        return policy.mode if policy else "no policy"

    async def follow(self, steps: str) -> None:
        """Take the steps of a scenario; see SCENARIOS."""
        refresh = None
        for step in filter(None, map(str.strip, steps.split(";"))):
            what, *words = step.split()
            if what == "announce":
                self.announce(*(f"v=STSv1; id={word}" for word in words))
            elif what == "publish":
                self.publish(*words)
            elif what == "take":  # everything off the web
                self.web.clear()
            elif what == "wait":
                self.clock.advance(float(words[0]))
                await turns(self.loop)
            elif what == "refresh":
                refresh = self.loop.spawn(self.policies.refresh_forever(), "refresh")
                await turns(self.loop)
            elif what == "fetched":
                assert len(self.fetched) == int(words[0]), step
            elif what == "failed":
                assert self.counters["mta_sts", "failed"] == int(words[0]), step
            else:
                assert await self.mode() == step
        if refresh is not None:
            refresh.cancel()


@pytest.fixture
def sts(tmp_path: Path) -> Sts:
    return Sts(tmp_path)


# A step is a mode that must be in force, or "no policy"; or how often it must have been
# fetched, or have failed, so far; or what happens. After 301 seconds the DNS is asked again.
SIX_HOURS = "wait 21601"
SCENARIOS = {
    "another id": "enforce; announce 2; publish testing; enforce; wait 301; testing; fetched 2",
    "the same policy again": "enforce; wait 86401; enforce; fetched 2",
    "five minutes of pause after a failure": (
        "take; no policy; fetched 1; wait 299; no policy; fetched 1; wait 2; no policy; fetched 2;"
        "wait 298; no policy; fetched 2; wait 3; no policy; fetched 3; publish; wait 301; enforce"
    ),
    "refreshed before it is too old": (
        "publish enforce 604800; enforce; publish testing 604800; refresh;"
        + "".join(f"{SIX_HOURS}; fetched {count};" for count in (1, 1, 1, 2, 2, 2, 2, 3))
        + "testing"
    ),
    "a policy of a few hours is refreshed earlier": (
        f"publish enforce 36000; enforce; refresh; {SIX_HOURS}; fetched 2"
    ),
    "a refresh that fails is mended by the next": (
        f"publish enforce 43300; enforce; refresh; take; {SIX_HOURS}; enforce;"
        f"publish testing; {SIX_HOURS}; testing"
    ),
}


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_a_policy_over_time(sts: Sts, steps: str) -> None:
    sts.live(lambda: sts.follow(steps))


def test_a_policy_is_fetched_once_and_kept(sts: Sts) -> None:
    async def main() -> None:
        for _ in range(3):
            policy = await sts.policies.policy("there.example")
            assert policy == StsPolicy(
                "1", "enforce", ("mx.there.example",), 86400, 1_700_000_000.0
            )
            sts.clock.advance(3600)
        assert sts.fetched == ["there.example"]
        assert sts.counters["mta_sts", "fetched"] == 1

    sts.live(main)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        *(([text, "hello"], "enforce") for text in (
            "v=STSv1; id=1", "v=STSv1;id=1;", "v=STSv1 ; id = 1 ; x=y", "v=STSv1; x=y; id=1",
            "v=STSv1; id=" + "a" * 32,
        )),
        *(([text], "no policy") for text in (
            "v=STSv1", "v=STSv1;", "v=STSv1; id=", "v=STSv1; id=a-b", "v=STSv1; id=" + "1" * 33,
            "v=STSv2; id=1", "v=STSv10; id=1", "x=y; v=STSv1; id=1", "v=stsv1; id=1",
            "id=1; v=STSv1", "v=STSv1; uid=1", "v=spf1 -all",
        )),
        (["v=STSv1; id=1", "v=STSv1; id=1"], "no policy"),
        (["v=STSv1; id=1", "v=STSv1; id=2"], "no policy"),
        ([], "no policy"),
        (None, "no policy"),
        (DOWN, "no policy"),
    ],
)  # fmt: skip
def test_an_announcement(sts: Sts, texts: Any, expected: str) -> None:
    sts.records = {} if texts is None else {ANNOUNCED: texts}
    assert sts.live(sts.mode) == expected
    assert len(sts.fetched) == (expected == "enforce")


@pytest.mark.parametrize("answer", [chasquid.ChasquidError("down"), b"<html>", OSError("down")])
def test_the_old_policy_holds_while_the_new_cannot_be_had_until_it_is_too_old(
    sts: Sts, answer: Any
) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.web["there.example"] = answer
        await sts.follow("announce 2;" + 3 * "wait 20000; enforce;" + "fetched 4; failed 3")
        await sts.follow("wait 26401; no policy")

    sts.live(main)
    assert "the policy of there.example cannot be had" in (sts.directory / "server.log").read_text()


def test_a_policy_that_came_while_the_clock_was_ahead_does_not_hold_for_ever(sts: Sts) -> None:
    async def main() -> None:
        sts.clock.jumped = 50 * 365 * 86400.0
        assert await sts.mode() == "enforce"
        sts.clock.jumped = 0.0
        assert await sts.mode() == "enforce"
        sts.records[ANNOUNCED] = []
        await sts.follow(f"refresh; {SIX_HOURS}; enforce; wait 86401; no policy")

    sts.live(main)


def test_the_pause_is_of_one_domain_alone(sts: Sts) -> None:
    async def main() -> None:
        sts.announce("v=STSv1; id=1", domain="other.example")
        assert await sts.mode("other.example") == "no policy"
        assert await sts.mode() == "enforce"

    sts.live(main)


@pytest.mark.parametrize("texts", [[], DOWN, ["v=STSv1; id="]])
def test_a_policy_holds_without_its_announcement_until_it_is_too_old(sts: Sts, texts: Any) -> None:
    async def main() -> None:
        assert await sts.mode() == "enforce"
        sts.records[ANNOUNCED] = texts
        await sts.follow("wait 86400; enforce; wait 301; no policy")

    sts.live(main)


def test_several_deliveries_at_once_fetch_once(sts: Sts) -> None:
    async def main() -> None:
        sts.gate = chasquid.Event(sts.loop)
        tasks = [sts.loop.spawn(sts.mode(), "delivery") for _ in range(3)]
        await turns(sts.loop)
        assert not any(task.done for task in tasks)
        sts.gate.set()
        assert [await task.join() for task in tasks] == ["enforce"] * 3
        assert len(sts.fetched) == 1

    sts.live(main)


def test_a_delivery_that_is_given_up_spoils_nothing_for_the_other(sts: Sts) -> None:
    async def main() -> None:
        sts.gate = chasquid.Event(sts.loop)
        tasks = [sts.loop.spawn(sts.mode(), "delivery") for _ in range(2)]
        await turns(sts.loop)
        tasks[0].cancel()
        await turns(sts.loop)
        sts.gate.set()
        assert await tasks[1].join() == "enforce"

    sts.live(main)


def test_a_web_server_that_is_silent_is_waited_for_one_minute(sts: Sts) -> None:
    async def main() -> None:
        sts.gate = chasquid.Event(sts.loop)
        task = sts.loop.spawn(sts.mode(), "delivery")
        for seconds, done in ((59, False), (2, True)):
            await turns(sts.loop)
            sts.clock.advance(seconds)
            await turns(sts.loop)
            assert task.done is done
        assert await task.join() == "no policy"
        assert sts.counters["mta_sts", "failed"] == 1
        sts.gate.set()
        await sts.follow("wait 301; enforce")

    sts.live(main)


def test_a_restart_reads_what_is_on_the_disk(sts: Sts) -> None:
    assert sts.live(sts.mode) == "enforce"
    sts.web.clear()
    sts.records[ANNOUNCED] = DOWN
    assert sts.live(sts.mode) == "enforce"
    sts.clock.advance(86_401)
    assert sts.live(sts.mode) == "no policy"
    assert len(sts.fetched) == 1


def test_the_whole_policy_survives_a_restart(sts: Sts) -> None:
    sts.web["there.example"] = POLICY + b"mx: *.example.net\n"
    before = sts.live(lambda: sts.policies.policy("there.example"))
    after = sts.live(lambda: sts.policies.policy("there.example"))
    assert before == after
    assert after.allows("a.example.net")


KEPT = StsPolicy("1", "none", ("mx.there.example",), 86400, FakeClock().now)._asdict()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"{}", b'{"mx": 5}', b'{"mx": ["a"]}', b"\xff\0",
     b'{"id": "1", "mode": "enforce", "mx": ["a"], "max_age": 5, "fetched": 0, "more": 1}',
     *(json.dumps({**KEPT, **changed}).encode() for changed in (
         {"max_age": "86400"}, {"fetched": None}, {"mode": 5, "max_age": [1]}, {"mx": [5]},
     ))],
)  # fmt: skip
def test_a_corrupt_file_is_passed_over(sts: Sts, content: bytes) -> None:
    sts.cache.mkdir()
    (sts.cache / "there.example").write_bytes(content)
    (sts.cache / "directory").mkdir()
    assert sts.live(sts.mode) == "enforce"
    assert json.loads((sts.cache / "there.example").read_bytes())["id"] == "1"


def test_a_cache_that_cannot_be_written_keeps_nothing_but_the_memory(sts: Sts) -> None:
    sts.cache.write_text("in the way")
    sts.live(lambda: sts.follow("enforce; enforce; fetched 1"))
    assert "cannot be written" in (sts.directory / "server.log").read_text()


def test_a_policy_that_is_too_old_is_removed_from_the_disk(sts: Sts) -> None:
    async def main() -> None:
        await sts.follow("publish enforce 3600; enforce")
        assert (sts.cache / "there.example").exists()
        await sts.follow("refresh; announce; wait 21601")
        assert os.listdir(sts.cache) == []

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


def outcome(directory: Path, *pieces: bytes) -> bytes | str:
    """Return the policy in an answer that is sent in `pieces`, or why there is none."""

    def respond(tls: ssl.SSLSocket, request: bytes) -> None:
        for piece in pieces:
            tls.sendall(piece)

    with WebServer(directory, respond) as server:
        found = fetch(server)
    return found if isinstance(found, bytes) else str(found)


def response(
    body: bytes = POLICY, status: str = "200 OK", kind: str | None = "text/plain", **headers: object
) -> bytes:
    lines = [f"HTTP/1.1 {status}"] + ([f"Content-Type: {kind}"] if kind is not None else [])
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    """Return a response in chunks; the last octets are b"0\\r\\n\\r\\n"."""
    body = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return response(body + b"0\r\n\r\n", Transfer_Encoding="chunked")


def test_the_request_is_as_it_must_be(tmp_path: Path) -> None:
    with WebServer(tmp_path, lambda tls, _: tls.sendall(response())) as server:
        assert fetch(server) == POLICY
    [request] = server.requests
    line, *headers = request.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert line == "GET /.well-known/mta-sts.txt HTTP/1.1"
    assert "Host: mta-sts.there.example" in headers
    assert "Connection: close" in headers
    assert server.names == ["mta-sts.there.example"]


WITH_LENGTH = response(Content_Length=len(POLICY))
LARGEST = POLICY.ljust(10 * 1024, b"\n")
TOO_LARGE = "the policy is larger than 10 kB"
ANSWERS: dict[str, tuple[Sequence[bytes], bytes | str]] = {
    "until the end": ([response()], POLICY),
    "a length": ([WITH_LENGTH], POLICY),
    "more than the length": ([WITH_LENGTH + b"and more"], POLICY),
    "charset": ([response(kind="Text/Plain; charset=utf-8")], POLICY),
    "a chunk": ([chunked(POLICY)], POLICY),
    "chunks": ([chunked(POLICY[:10], POLICY[10:])], POLICY),
    "octet by octet": ([bytes([octet]) for octet in WITH_LENGTH], POLICY),
    "HTTP/1.0": ([response().replace(b"HTTP/1.1", b"HTTP/1.0")], POLICY),
    "100": ([b"HTTP/1.1 100 Continue\r\n\r\n" + response()], POLICY),
    "LF": ([response().replace(b"\r\n", b"\n", 2)], POLICY),
    "empty": ([response(b"")], b""),
    "the largest": ([response(LARGEST)[start : start + 3000] for start in range(0, 11_000, 3000)],
                    LARGEST),
    "larger": ([response(LARGEST + b"\n")], TOO_LARGE),
    "larger, a length": ([response(LARGEST + b"\n", Content_Length=len(LARGEST) + 1)], TOO_LARGE),
    "larger, chunks": ([chunked(LARGEST, b"\n")], TOO_LARGE),
    "much larger": ([response(LARGEST * 50)], TOO_LARGE),
    "301": ([response(status="301 Moved", Location="https://other.example/")], "301"),
    "302": ([response(status="302 Found", Location="/elsewhere")], "302"),
    "204": ([response(status="204 No Content")], "204"),
    "404": ([response(status="404 Not Found")], "404"),
    "500": ([response(status="500 Oops")], "500"),
    **{
        f"the type {kind}": ([response(kind=kind)], "text/plain")
        for kind in ("text/html", "application/octet-stream", None, "", "policy", "text")
    },
    "cut short": ([response(Content_Length=len(POLICY) + 1)], "cut short"),
    **{
        what: ([answer], "no HTTP")
        for what, answer in {
            "within a chunk": chunked(POLICY)[:-20],
            "no last chunk": chunked(POLICY)[:-5],
            "no size of a chunk": response(b"zz\r\n" + POLICY, Transfer_Encoding="chunked"),
            "a chunk of which less is said": chunked(POLICY).replace(b"\r\n\r\n", b"\r\n\r\n1", 1),
            "another coding": response(Transfer_Encoding="gzip, chunked"),
            "a length that is none": response(Content_Length="many"),
            "a length below none": response(Content_Length=-1),
            "a long field": response(X="y" * 70_000),  # the rest is not read
            "within the status line": b"HTTP/1.1 200",
            "nothing": b"",
            "no status": b"HTTP/1.1 abc OK\r\n\r\n",
            "HTTP/7": response().replace(b"HTTP/1.1", b"HTTP/7"),
            "SMTP": b"220 mail.there.example ESMTP\r\n",
            "the policy alone": POLICY,
            "noise": b"\0\xff" * 1000,
            "many fields": response(**{f"X-{number}": "y" for number in range(200)}),
            "100 for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
            "a long line": b"x" * 1_000_000,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize(("pieces", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_of_the_web_server(
    tmp_path: Path, pieces: Sequence[bytes], expected: bytes | str
) -> None:
    found = outcome(tmp_path, *pieces)
    if isinstance(expected, bytes):
        assert found == expected
    else:
        assert isinstance(found, str) and expected in found


CHANGES = st.tuples(
    st.sampled_from([chunked(POLICY), WITH_LENGTH]),
    st.integers(0, 200),
    st.integers(0, 200),
    st.binary(max_size=3),
)


@given(
    st.binary(max_size=100)
    | CHANGES.map(lambda change: change[0][: change[1]] + change[3] + change[0][change[2] :])
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


def test_the_next_address_is_tried_if_the_first_is_down(tmp_path: Path) -> None:
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
    assert log.counters["mta_sts", "failed"] == 1
    log.close()


# --- what is demanded ---


def requirement(
    directory: Path, zone: Zone, by_mx: bool = True, host: str = "mx.there.example", **more: Any
) -> TlsRequirement:
    log = record(directory)

    async def main(loop: chasquid.Loop) -> TlsRequirement:
        policies = tls_policies(loop, chasquid.Names(loop, zone.ask), log, directory, **more)
        return await policies.requirement("there.example", host, 25, by_mx)

    return run(main)


REAL, ALIAS = "_25._tcp.real.example", "_25._tcp.mx.there.example"
AB = (Tlsa(3, 1, 1, b"\xab"),)
NOTHING, BY_DANE = TlsRequirement(), TlsRequirement(TLS_SECURE, AB, "DANE", authenticated=True)
AAAA = {("there.example", "MX"): MX["there.example", "MX"], ("mx.there.example", "AAAA"): ["::1"]}


def signed(
    *unsigned: tuple[str, str], records: Records = MX, alias: bool = False, **tlsa: Any
) -> Zone:
    """Return a signed zone; `at_real` and `at_mx` are its TLSA records."""
    names = {"at_real": REAL, "at_mx": ALIAS}
    found = {(names[place], "TLSA"): texts for place, texts in tlsa.items()}
    aliases = {"mx.there.example": "real.example"} if alias else {}
    return Zone({**records, **found}, signed=True, unsigned=unsigned, aliases=aliases)


async def published(domain: str) -> bytes:
    return POLICY


REQUIREMENTS: dict[str, tuple[Zone, dict[str, Any], TlsRequirement]] = {
    "unsigned": (Zone(MX), {}, NOTHING),
    "signed": (signed(), {}, TlsRequirement(authenticated=True)),
    "signed, a named host": (signed(), {"by_mx": False}, NOTHING),
    "TLSA": (signed(at_mx=["3 1 1 ab"]), {}, BY_DANE),
    "a policy": (
        Zone({**MX, ANNOUNCED: ("v=STSv1; id=1",)}), {"fetch": published},
        TlsRequirement(TLS_SECURE, (), "MTA-STS", authenticated=True),
    ),
    "IPv6 alone": (signed(records=AAAA, at_mx=["3 1 1 ab"]), {}, BY_DANE),
    "IPv6 alone, unsigned": (
        signed(("mx.there.example", "AAAA"), records=AAAA, at_mx=["3 1 1 ab"]), {}, NOTHING
    ),
    "an alias: what it stands for comes first": (
        signed(alias=True, at_real=["3 1 1 ab"], at_mx=["3 1 1 cd"]), {}, BY_DANE
    ),
    "an alias: only what it stands for": (signed(alias=True, at_real=["3 1 1 ab"]), {}, BY_DANE),
    "an alias: only itself": (signed(alias=True, at_mx=["3 1 1 ab"]), {}, BY_DANE),
    "an alias: what it stands for cannot be used": (
        signed(alias=True, at_real=["1 1 1 ab"], at_mx=["3 1 1 ab"]), {},
        TlsRequirement(TLS_INSECURE, (), "DANE", authenticated=True),
    ),
    "an alias: nothing": (signed(alias=True), {}, TlsRequirement(authenticated=True)),
}  # fmt: skip


@pytest.mark.parametrize(("zone", "more", "expected"), REQUIREMENTS.values(), ids=REQUIREMENTS)
def test_a_requirement_says_who_makes_it(
    tmp_path: Path, zone: Zone, more: dict[str, Any], expected: TlsRequirement
) -> None:
    assert requirement(tmp_path, zone, **more) == expected


def test_a_requirement_by_what_was_seen_before(tmp_path: Path) -> None:
    remember(tmp_path, TLS_INSECURE)
    assert requirement(tmp_path, signed()) == TlsRequirement(
        TLS_INSECURE, (), "it was TLS_INSECURE before", authenticated=True
    )


def test_of_an_address_nothing_is_asked(tmp_path: Path) -> None:
    zone = signed(records={})
    assert requirement(tmp_path, zone, by_mx=False, host="127.0.0.1") == NOTHING
    assert zone.asked == []


def test_if_the_records_of_an_alias_cannot_be_had_nothing_is_sent(tmp_path: Path) -> None:
    with pytest.raises(TemporaryFailure, match="down"):
        requirement(tmp_path, signed(alias=True, at_real=DOWN, at_mx=["3 1 1 ab"]))


def test_only_so_many_records_are_looked_at(tmp_path: Path) -> None:
    many = [f"3 1 1 {number:04x}" for number in range(500)]
    assert len(requirement(tmp_path, signed(at_mx=many)).tlsa) == 20
