# SPDX-License-Identifier: Apache-2.0
"""SPF against the test suite of RFC 7208, with a name server that serves its zones.

The suite comes in the source distribution of pyspf, and stays there: it is read out of the
package that build_zipapp.py fetches, and nothing of it is kept in this repository.
"""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from support import run

import build_zipapp
import chasquid as server

from .peers import NameServer
from .tools import unavailable

HOST = "mail.here.example"
MEMBER = "test/rfc7208-tests.yml"
CASES = 203

# A name server adds no more than this many aliases to an answer, however long they go on.
_ALIASES = 8


class Case(NamedTuple):
    name: str
    client: str
    hello: str
    sender: str
    results: tuple[str, ...]  # the first is preferred
    explanation: str | None
    zone: Mapping[str, list[Any]]


class ZoneServer(NameServer):
    """A name server for the zone of one case."""

    def serve(self, zone: Mapping[str, list[Any]]) -> None:
        self.records = {_key(name): _records(entries) for name, entries in zone.items()}
        self.questions.clear()

    def answer(self, question: bytes, limit: int) -> bytes:
        query = dns.message.from_wire(question)
        response = dns.message.make_response(query, recursion_available=True)
        name, kind = query.question[0].name, dns.rdatatype.to_text(query.question[0].rdtype)
        self.questions.append(f"{name} {kind}")
        for _ in range(_ALIASES):
            known = self.records.get(_key(name))
            if known is None:
                response.set_rcode(dns.rcode.NXDOMAIN)
            elif kind in known:
                response.answer.append(dns.rrset.from_text_list(name, 60, "IN", kind, known[kind]))
            elif "TIMEOUT" in known:
                response.answer.clear()
                response.set_rcode(dns.rcode.SERVFAIL)
            elif "CNAME" in known:
                alias = dns.rrset.from_text_list(name, 60, "IN", "CNAME", known["CNAME"])
                response.answer.append(alias)
                name = alias[0].target
                continue
            break
        else:  # the aliases go round in a circle
            response.answer.clear()
            response.set_rcode(dns.rcode.SERVFAIL)
        return response.to_wire() if limit > 1232 else _for_datagram(response)


def _for_datagram(response: dns.message.Message) -> bytes:
    wire = response.to_wire()
    if len(wire) > 512:  # less than anybody allows, so that TCP is tried too
        response.answer.clear()
        response.flags |= dns.flags.TC
        wire = response.to_wire()
    return wire


def _key(name: str | dns.name.Name) -> str:
    """The suite has names with spaces and "%", and names that differ from others in case."""
    if isinstance(name, str):
        labels = [label.encode() for label in name.rstrip(".").split(".")]
        name = dns.name.Name([*labels, b""])
    return name.to_text(omit_final_dot=True).lower()


def _records(entries: list[Any]) -> dict[str, list[str]]:
    """Return records by kind, in presentation form; those of SPF are TXT too.

    A TXT record, be it only "NONE", takes the place of those that SPF would give.
    """
    records: dict[str, list[str]] = {}
    for entry in entries:
        if entry == "TIMEOUT":
            records["TIMEOUT"] = []  # for every kind that is not here
            continue
        for kind, value in entry.items():
            texts = records.setdefault(kind, [])
            if value != "NONE":
                texts.append(_presentation(kind, value))
    records.setdefault("TXT", records.get("SPF", []))
    return {kind: values for kind, values in records.items() if values or kind == "TIMEOUT"}


def _presentation(kind: str, value: Any) -> str:
    if kind in ("TXT", "SPF"):
        strings = [value] if isinstance(value, str) else value or [""]
        return " ".join(f'"{"".join(_escaped(text))}"' for text in strings)
    if kind == "MX":
        return f"{value[0]} {dns.name.from_text(value[1] or '.')}"
    if kind in ("CNAME", "PTR"):
        return str(dns.name.from_text(value))
    return str(value)


def _escaped(text: str) -> Iterator[str]:
    for octet in text.encode():
        yield f"\\{octet:03}"


@functools.cache
def suite() -> dict[str, Case]:
    """Return the cases by name. Raises build_zipapp.Unable where there is no network."""
    import yaml

    [package] = [one for one in build_zipapp.PACKAGES if one.name == "pyspf"]
    cache = build_zipapp.HERE / ".cache"
    build_zipapp.fetch([package], cache)
    data = build_zipapp.cached(package, cache)
    assert data is not None
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.extractfile(f"{package.name}-{package.version}/{MEMBER}")
        assert member is not None
        scenarios = list(yaml.safe_load_all(member))
    cases = [
        _case(name, said, scenario["zonedata"])
        for scenario in scenarios
        for name, said in scenario["tests"].items()
    ]
    return {case.name: case for case in cases}


def _case(name: str, said: Mapping[str, Any], zone: Mapping[str, list[Any]]) -> Case:
    results = said["result"] if isinstance(said["result"], list) else [said["result"]]
    return Case(
        name, said["host"], said["helo"], said["mailfrom"], tuple(results),
        said.get("explanation"), zone,
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        wanted = "not interop" not in metafunc.config.option.markexpr
        try:
            names = list(suite()) if wanted else []
        except (build_zipapp.Unable, ImportError):
            names = ["any"]  # the test says why
        metafunc.parametrize("name", names)


@pytest.fixture(scope="module")
def zones() -> Iterator[ZoneServer]:
    with ZoneServer() as zones:
        yield zones


@pytest.fixture
def cases() -> dict[str, Case]:
    try:
        return suite()
    except (build_zipapp.Unable, ImportError) as error:
        unavailable(f"the suite of RFC 7208 cannot be had: {error}")


def check(zones: ZoneServer, case: Case) -> server.Spf:
    zones.serve(case.zone)

    async def main(loop: server.Loop) -> server.Spf:
        names = server.Names(loop, server.DnsClient(loop, [zones.address]).ask)
        return await server.check_spf(names, loop, case.client, case.sender, case.hello, HOST)

    return run(main)


def test_the_suite_is_complete(cases):
    assert len(cases) == CASES


def test_the_result_is_what_the_suite_says(zones, cases, name):
    case = cases[name]
    found = check(zones, case)
    assert found.result in case.results, (case, found, zones.questions)
    if case.explanation == "DEFAULT":  # nothing that the domain says
        assert found.explanation == ""
    elif case.explanation is not None:
        assert found.explanation == case.explanation
