# SPDX-License-Identifier: Apache-2.0
"""DNS records are published at name servers that people run: BIND and Knot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import dns.tsig
import dns.update
import pytest

import chasquid

from .peers import Bind, Knot, UpdatedNames
from .server import PROGRAM
from .tools import LOOPBACK, run

Start = Callable[..., Any]

SERVERS = pytest.mark.parametrize("kind", [Bind, Knot], ids=["bind", "knot"])
DKIM = chasquid.DkimKey("here.example", "mail", chasquid.new_key("rsa2048"))
NEEDS = chasquid.DnsNeeds("here.example", "mail.here.example", ("192.0.2.25",), (DKIM,))
RECORDS = chasquid.domain_records(NEEDS._replace(sts_id="abc"))


def nobody(name: str, kind: str) -> list[str]:
    """Resolve nothing: what is published must not need it."""
    raise chasquid.TemporaryFailure(f"asked for {name} {kind}")


def publish(
    server: UpdatedNames, data_dir: Path, *, key: chasquid.TsigKey | None = None, **options: Any
) -> list[str]:
    records = options.pop("records", RECORDS)
    key = key or chasquid.read_tsig_key(str(server.key))
    options.setdefault("resolve", nobody)
    return chasquid.publish(records, key, str(data_dir), **options)


def verbs(lines: list[str]) -> dict[str, str]:
    """Return what became of each name and type."""
    parts = [line.split(":")[0].rsplit(" ", 2) for line in lines]
    return {f"{name} {kind}": verb for verb, name, kind in parts}


@SERVERS
def test_all_records_are_made_and_nothing_is_sent_again(
    kind: type[UpdatedNames], start: Start, tmp_path: Path
) -> None:
    server = start(kind, {"here.example": ""})
    planned = publish(server, tmp_path, dry_run=True)
    assert set(verbs(planned).values()) == {"would make"}
    assert server.ask("here.example.", "MX") == []
    made = publish(server, tmp_path)
    assert set(verbs(made).values()) == {"made"} and verbs(made).keys() == verbs(planned).keys()
    for record in RECORDS:
        found = server.ask(f"{record.name}.", record.kind)
        if record.kind == "TXT":
            assert [text.replace('" "', "") for text in found] == [f'"{record.value}"']
        elif record.kind == "CNAME":
            assert f"{record.value}." in found
        else:
            assert found == [record.value + ("" if record.kind == "A" else ".")]
    serial = server.ask("here.example.", "SOA")
    assert set(verbs(publish(server, tmp_path)).values()) == {"kept"}
    assert server.ask("here.example.", "SOA") == serial


@SERVERS
def test_what_others_made_stays(kind: type[UpdatedNames], start: Start, tmp_path: Path) -> None:
    zone = (
        '@ MX 5 mx.else.example.\n@ TXT "google-site-verification=1"\n@ TXT "v=spf1 -all"\n'
        "mail CNAME else.example.\nmta-sts A 192.0.2.1\n* TXT wild\nautoconfig TXT hello\n"
    )
    server = start(kind, {"here.example": zone})
    lines = publish(server, tmp_path)
    told = {line.partition(":")[0]: line for line in lines}
    for line in (
        "kept here.example MX: there is 5 mx.else.example, not made by chasquid; wanted 10 "
        "mail.here.example",
        "kept here.example TXT: there is v=spf1 -all, not made by chasquid; wanted v=spf1 mx ~all",
        "kept mail.here.example A: there is CNAME else.example, not made by chasquid",
        "kept mta-sts.here.example CNAME: there is A 192.0.2.1, not made by chasquid",
        "kept autoconfig.here.example CNAME: there is TXT hello, not made by chasquid",
        "made _dmarc.here.example TXT",  # the wildcard says "wild" of it
    ):
        assert told[line.partition(":")[0]] == line
    assert server.ask("here.example.", "MX") == ["5 mx.else.example."]
    assert server.ask("here.example.", "TXT") == ['"google-site-verification=1"', '"v=spf1 -all"']
    assert server.ask("mta-sts.here.example.", "A") == ["192.0.2.1"]
    assert server.ask("_dmarc.here.example.", "TXT") == ['"v=DMARC1; p=quarantine"']
    assert server.ask("any.here.example.", "TXT") == ['"wild"']


@SERVERS
def test_what_we_made_is_changed_and_what_stands_beside_it_stays(
    kind: type[UpdatedNames], start: Start, tmp_path: Path
) -> None:
    server = start(kind, {"here.example": '@ TXT "else"\n'})
    publish(server, tmp_path)
    new = NEEDS._replace(
        host="mx.here.example", addresses=("192.0.2.26",), smarthost="smtp.example.net"
    )
    lines = publish(server, tmp_path, records=chasquid.domain_records(new))
    assert {line for line in lines if not line.startswith("kept")} == {
        "changed here.example MX", "made mx.here.example A", "changed here.example TXT",
        "made mx.here.example TXT", "changed _submissions._tcp.here.example SRV",
        "changed _submission._tcp.here.example SRV", "changed _imaps._tcp.here.example SRV",
    }  # fmt: skip
    assert server.ask("here.example.", "MX") == ["10 mx.here.example."]
    assert server.ask("here.example.", "TXT") == ['"else"', '"v=spf1 mx ?all"']
    assert server.ask("mail.here.example.", "A") == ["192.0.2.25"]  # perhaps others use it
    known = json.loads((tmp_path / "published.json").read_text())["records"]
    assert known["here.example TXT"] == ["v=spf1 mx ?all"]
    assert (tmp_path / "published.json").stat().st_mode & 0o777 == 0o600


@SERVERS
def test_a_change_by_others_meanwhile_is_seen(
    kind: type[UpdatedNames], start: Start, tmp_path: Path
) -> None:
    server = start(kind, {"here.example": ""})
    key = chasquid.read_tsig_key(str(server.key))
    sent = []

    def exchange(message: Any, host: str, port: int) -> Any:
        if isinstance(message, dns.update.UpdateMessage) and not sent:
            other = dns.update.UpdateMessage("here.example.")
            other.add("here.example.", 60, "MX", "5 mx.else.example.")
            other.use_tsig(dns.tsig.Key(key.name, key.secret, key.algorithm))
            sent.append(dns.query.tcp(other, host, timeout=60, port=port).rcode())
        return chasquid.exchange_by_tcp(message, host, port)

    lines = publish(server, tmp_path, exchange=exchange)
    assert sent == [0]
    assert [line for line in lines if " here.example MX" in line] == [
        "kept here.example MX: there is 5 mx.else.example, not made by chasquid; wanted 10 "
        "mail.here.example"
    ]
    assert server.ask("here.example.", "MX") == ["5 mx.else.example."]
    assert server.ask("_dmarc.here.example.", "TXT") != []


@SERVERS
@pytest.mark.parametrize(
    "change, expected",
    [
        ({"name": "other"}, "does not know the key other, or not for here.example"),
        ({"secret": "c2VjcmV0"}, "knows another secret for the key update"),
    ],
)
def test_a_wrong_key_is_told(
    kind: type[UpdatedNames], start: Start, tmp_path: Path, change: dict[str, str], expected: str
) -> None:
    server = start(kind, {"here.example": ""})
    key = chasquid.read_tsig_key(str(server.key))._replace(**change)
    for dry_run in (True, False):
        with pytest.raises(chasquid.ChasquidError, match=expected):
            publish(server, tmp_path, key=key, dry_run=dry_run)
    assert server.ask("here.example.", "MX") == []


@SERVERS
def test_a_zone_that_the_key_may_not_change_is_told(
    kind: type[UpdatedNames], start: Start, tmp_path: Path
) -> None:
    server = start(kind, {"here.example": ""}, closed=["here.example"])
    text = {  # Knot knows keys for each zone
        Bind: "does not let the key update see or change here.example: allow it there",
        Knot: "does not know the key update, or not for here.example",
    }
    with pytest.raises(chasquid.ChasquidError, match=text[kind]):
        publish(server, tmp_path)
    assert server.ask("here.example.", "MX") == []


@SERVERS
def test_a_host_in_another_zone(kind: type[UpdatedNames], start: Start, tmp_path: Path) -> None:
    zones = {"here.example": "", "provider.example": "mx A 192.0.2.25\nmx2 A 192.0.2.1\n"}
    server = start(kind, zones, closed=["provider.example"])
    for host, expected in [("mx", "kept mx.provider.example A"), ("mx2", "kept mx2.provider")]:
        needs = NEEDS._replace(host=f"{host}.provider.example")
        records = [one for one in chasquid.domain_records(needs) if not one.optional]
        lines = publish(server, tmp_path, records=records)
        assert any(line.startswith(expected) for line in lines), lines
        assert not any(line.startswith("failed") for line in lines), lines
    needs = NEEDS._replace(host="new.provider.example")
    lines = publish(server, tmp_path, records=chasquid.domain_records(needs))
    assert lines[-1].startswith("failed provider.example: the name server ")
    assert lines[-1].endswith("(REFUSED)" if kind is Bind else "(BADKEY)")
    assert "changed here.example MX" in lines


@SERVERS
def test_the_primary_server_is_found_in_the_dns(
    kind: type[UpdatedNames], start: Start, tmp_path: Path
) -> None:
    """The SOA names it; only the port is not in the DNS, so what asks is told it."""
    server = start(kind, {"here.example": ""})
    resolve = chasquid.blocking_resolver([f"{LOOPBACK}:{server.port}"])
    key = chasquid.read_tsig_key(str(server.key))._replace(server="")

    def exchange(message: Any, host: str, port: int) -> Any:
        assert (host, port) == (LOOPBACK, 53)
        return chasquid.exchange_by_tcp(message, host, server.port)

    lines = publish(server, tmp_path, key=key, resolve=resolve, exchange=exchange)
    assert set(verbs(lines).values()) == {"made"}


@SERVERS
def test_behind_nat_all_else_is_published(
    kind: type[UpdatedNames], start: Start, tmp_path: Path
) -> None:
    server = start(kind, {"here.example": ""})
    records = chasquid.domain_records(NEEDS._replace(addresses=()))
    lines = publish(server, tmp_path, records=records)
    why = "this host does not know its public address: name it with --address"
    assert lines[:2] == [
        "failed here.example MX: its host has no address yet",
        f"failed mail.here.example A: {why}",
    ]
    assert {line.split()[0] for line in lines[2:]} == {"made"}
    publish(server, tmp_path, records=chasquid.domain_records(NEEDS)[1:2])
    lines = publish(server, tmp_path, records=records)
    assert lines[:2] == ["made here.example MX", "kept mail.here.example A"]
    assert server.ask("here.example.", "MX") == ["10 mail.here.example."]


@SERVERS
def test_the_command(kind: type[UpdatedNames], start: Start, tmp_path: Path) -> None:
    """It is run as a program, so that an archive can be tested too."""
    server = start(kind, {"here.example": ""})
    (tmp_path / "domains" / "here.example").mkdir(parents=True)
    (tmp_path / "chasquid.conf").write_text(
        f'hostname: "mail.here.example"\ndata_dir: "{tmp_path}/data"\n'
    )
    words = [sys.executable, PROGRAM, "--config-dir", str(tmp_path), "dns", "publish"]
    words += ["--dns-key", str(server.key), "--address", "192.0.2.25"]
    assert "would make here.example MX" in run(*words, "--dry-run").stdout
    assert server.ask("here.example.", "MX") == []
    ended = run(*words)
    assert "made here.example MX" in ended.stdout and ended.stderr == ""
    assert server.ask("here.example.", "MX") == ["10 mail.here.example."]
