# SPDX-License-Identifier: Apache-2.0
"""Room PUBLISHING: which records a domain needs, how they are shown, and how published."""

import ipaddress
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.update
import dns.zone
import pytest
from support import CommandLine

import chasquid
from chasquid import DkimKey, DnsNeeds, DnsRecord, domain_records, record_table, zone_file

KEY = DkimKey("example.com", "mail", chasquid.new_key("rsa2048"))
NEEDS = DnsNeeds("example.com", "mail.example.com", ("192.0.2.25", "2001:db8::25"), (KEY,))


def rows(records: list[DnsRecord], optional: bool) -> list[tuple[str, str, str]]:
    return [(r.name, r.kind, r.value) for r in records if r.optional == optional]


def test_what_a_domain_needs() -> None:
    assert rows(domain_records(NEEDS), optional=False) == [
        ("example.com", "MX", "10 mail.example.com"),
        ("mail.example.com", "A", "192.0.2.25"),
        ("mail.example.com", "AAAA", "2001:db8::25"),
        ("example.com", "TXT", "v=spf1 mx ~all"),
        ("mail._domainkey.example.com", "TXT", KEY.record),
        ("_dmarc.example.com", "TXT", "v=DMARC1; p=quarantine"),
    ]


def test_what_is_optional() -> None:
    assert rows(domain_records(NEEDS._replace(sts_id="abc")), optional=True) == [
        ("mail.example.com", "TXT", "v=spf1 a -all"),
        ("_smtp._tls.example.com", "TXT", "v=TLSRPTv1; rua=mailto:postmaster@example.com"),
        ("_submissions._tcp.example.com", "SRV", "0 1 465 mail.example.com"),
        ("_submission._tcp.example.com", "SRV", "0 1 587 mail.example.com"),
        ("_imaps._tcp.example.com", "SRV", "0 1 993 mail.example.com"),
        ("_mta-sts.example.com", "TXT", "v=STSv1; id=abc"),
        ("mta-sts.example.com", "CNAME", "mail.example.com"),
        ("autoconfig.example.com", "CNAME", "mail.example.com"),
    ]


def test_no_policy_is_announced_that_nobody_serves() -> None:
    assert not {"MTA-STS", "autoconfig"} & {r.purpose for r in domain_records(NEEDS)}


def test_a_host_that_is_the_domain_has_one_spf_record() -> None:
    records = domain_records(NEEDS._replace(host="example.com"))
    assert [r.value for r in records if r.purpose == "SPF"] == ["v=spf1 mx ~all"]


def test_a_smarthost_may_send_for_the_domain() -> None:
    records = domain_records(NEEDS._replace(smarthost="smtp.example.net:587"))
    assert [r.value for r in records if r.purpose == "SPF"][:1] == ["v=spf1 mx ?all"]


def test_the_table_has_names_without_the_domain_and_texts_as_one_string() -> None:
    records = domain_records(NEEDS)[:6]
    assert record_table(records, "example.com") == [
        "@                MX     10 mail.example.com",
        "mail             A      192.0.2.25",
        "mail             AAAA   2001:db8::25",
        "@                TXT    v=spf1 mx ~all",
        f"mail._domainkey  TXT    {KEY.record}",
        "_dmarc           TXT    v=DMARC1; p=quarantine",
    ]


def test_a_name_outside_the_domain_stands_whole_in_the_table() -> None:
    record = DnsRecord("mail.example.net", "A", "192.0.2.25", "address")
    assert record_table([record], "example.com") == ["mail.example.net.  A      192.0.2.25"]
    lookalike = record._replace(name="mail.badexample.com")
    assert record_table([lookalike], "example.com")[0].startswith("mail.badexample.com.")


def test_behind_nat_the_address_is_to_be_filled_in() -> None:
    records = domain_records(NEEDS._replace(addresses=()))
    assert record_table(records[1:2], "example.com") == ["mail  A      (your public IPv4 address)"]
    assert "; mail.example.com.\tIN A\t(your public IPv4 address)\n" in zone_file(records)


def test_a_zone_file_says_the_same() -> None:
    records = domain_records(NEEDS._replace(sts_id="abc"))
    zone = dns.zone.from_text(zone_file(records), origin=".", relativize=False, check_origin=False)
    found = {
        (
            name.to_text(omit_final_dot=True),
            dns.rdatatype.to_text(data.rdtype),
            b"".join(data.strings).decode()
            if data.rdtype == dns.rdatatype.TXT
            else data.to_text().rstrip("."),
        )
        for name, _, data in zone.iterate_rdatas()
    }
    assert found == {(r.name, r.kind, r.value) for r in records}


def test_only_public_addresses_of_this_host_are_told() -> None:
    for address in chasquid.public_addresses():
        assert ipaddress.ip_address(address).is_global


@pytest.mark.parametrize(
    "address, public",
    [
        ("192.168.1.5", False),
        ("100.64.0.1", False),  # behind a provider's NAT; RFC 6598
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("9.9.9.9", True),
        ("2620:fe::fe", True),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert chasquid.is_public_address(address) == public


# --- the key ---

BIND_KEY = """
# made by hand
key "update.example.com" {
\talgorithm hmac-sha256;
\tsecret "c2VjcmV0//8=";
};
"""
KNOT_KEY = """\
# hmac-sha512:update:c2VjcmV0
key:
  - id: update
    algorithm: hmac-sha512
    secret: c2VjcmV0
"""


@pytest.mark.parametrize(
    "text, expected",
    [
        (BIND_KEY, ("update.example.com", "hmac-sha256", "c2VjcmV0//8=", "", "")),
        (KNOT_KEY, ("update", "hmac-sha512", "c2VjcmV0", "", "")),
        (
            'key k { algorithm "hmac-sha1"; secret c2VjcmV0; };',
            ("k", "hmac-sha1", "c2VjcmV0", "", ""),
        ),
        (
            BIND_KEY + "// server ns.example.com\n# zone Example.com.\n",
            ("update.example.com", "hmac-sha256", "c2VjcmV0//8=", "ns.example.com", "example.com"),
        ),
        (
            KNOT_KEY + "# server: [2001:db8::1]:5353\n",
            ("update", "hmac-sha512", "c2VjcmV0", "[2001:db8::1]:5353", ""),
        ),
        (
            '# the server side of it\nkey "k" {\n algorithm hmac-sha256;\n secret "c2VjcmV0"; };\n'
            "server 192.0.2.53;\n",
            ("k", "hmac-sha256", "c2VjcmV0", "192.0.2.53", ""),
        ),
    ],
)
def test_a_key_is_read_as_bind_and_knot_write_it(
    tmp_path: Path, text: str, expected: tuple[str, ...]
) -> None:
    (tmp_path / "key").write_text(text)
    assert chasquid.read_tsig_key(str(tmp_path / "key")) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "expected one key, as key"),
        (BIND_KEY + KNOT_KEY, "expected one key, as key"),
        (BIND_KEY.replace("hmac-sha256", "rot13"), "expected one of the algorithms"),
        (BIND_KEY.replace("8=", "8"), "the secret or the server is malformed"),
        (BIND_KEY + "server a:b:c.d\n", "the secret or the server is malformed"),
    ],
)
def test_a_file_that_is_no_key_is_told(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(chasquid.ConfigError, match=f"key: {expected}"):
        chasquid.read_tsig_key(str(tmp_path / "key"))


# --- publishing ---

UPDATE_KEY = chasquid.TsigKey("update", "hmac-sha256", "c2VjcmV0")
SERVER_KEY = UPDATE_KEY._replace(server="192.0.2.53")
NEEDED = [record for record in domain_records(NEEDS) if not record.optional]


class Primary:
    """A name server for some zones, as a table; it believes every key.

    `records` are texts as in a zone file, by name and type. `before_update` is called before
    each change. If `fails` is a code it answers with that, an exception is raised.
    """

    def __init__(self, *zones: str, records: dict[tuple[str, str], list[str]] | None = None):
        self.zones = zones
        self.records = dict(records or {})
        for zone in zones:
            self.records[zone, "SOA"] = [f"ns.{zone}. postmaster.{zone}. 1 3600 600 86400 60"]
        self.before_update: Callable[[], object] = lambda: None
        self.fails: str | Exception = ""
        self.fails_updates: str | Exception = ""
        self.signs = True
        self.updates: list[Any] = []
        self.asked: list[tuple[str, int]] = []

    def exchange(self, message: Any, host: str, port: int) -> Any:
        self.asked.append((host, port))
        is_update = isinstance(message, dns.update.UpdateMessage)
        fails = self.fails or (self.fails_updates if is_update else "")
        if isinstance(fails, Exception):
            raise fails
        response = dns.message.make_response(message)
        if not self.signs:
            response.tsig = None
        code = fails or (self.update(message) if is_update else self.query(message, response))
        response.set_rcode(dns.rcode.from_text(code))
        return response

    def query(self, message: Any, response: Any) -> str:
        asked = message.question[0]
        name = asked.name.to_text(omit_final_dot=True)
        if not any(f".{name}".endswith(f".{zone}") for zone in self.zones):
            return "REFUSED"
        response.flags |= dns.flags.AA
        for kind in (dns.rdatatype.to_text(asked.rdtype), "CNAME"):
            if values := self.records.get((name, kind)):
                response.answer.append(dns.rrset.from_text_list(asked.name, 60, "IN", kind, values))
                return "NOERROR"
        return "NOERROR"

    def update(self, message: Any) -> str:
        self.before_update()
        self.updates.append(message)
        for rrset in message.prerequisite:
            name, kind = rrset.name.to_text(omit_final_dot=True), rrset.rdtype.name
            if not len(rrset) and any(
                there == name and kind in ("ANY", other) for there, other in self.records
            ):
                return "YXDOMAIN" if kind == "ANY" else "YXRRSET"
            if len(rrset) and rrset[0].to_text() not in self.records.get((name, kind), []):
                return "NXRRSET"
        for rrset in message.update:
            values = self.records.setdefault(
                (rrset.name.to_text(omit_final_dot=True), rrset.rdtype.name), []
            )
            for record in rrset:
                values.remove(record.to_text()) if rrset.deleting else values.append(
                    record.to_text()
                )
        self.records = {key: values for key, values in self.records.items() if values}
        return "NOERROR"


def resolver_of(table: dict[tuple[str, str], list[str]]) -> chasquid.Resolve:
    return lambda name, kind: table.get((name, kind), [])


def nobody(name: str, kind: str) -> list[str]:
    raise chasquid.TemporaryFailure(f"no name server could answer for {name} {kind}")


def publish(
    primary: Primary, data_dir: Path, records: list[DnsRecord] = NEEDED, **options: Any
) -> list[str]:
    options = {"resolve": nobody, "exchange": primary.exchange, **options}
    return chasquid.publish(records, options.pop("key", SERVER_KEY), str(data_dir), **options)


def test_what_is_missing_is_made_in_one_change(tmp_path: Path) -> None:
    primary = Primary("example.com")
    assert publish(primary, tmp_path, dry_run=True) == [
        "would make example.com MX",
        "would make mail.example.com A",
        "would make mail.example.com AAAA",
        "would make example.com TXT",
        "would make mail._domainkey.example.com TXT",
        "would make _dmarc.example.com TXT",
    ]
    assert primary.updates == [] and not (tmp_path / "published.json").exists()
    lines = publish(primary, tmp_path)
    assert {line.split()[0] for line in lines} == {"made"} and len(primary.updates) == 1
    assert primary.records["example.com", "MX"] == ["10 mail.example.com."]
    [dkim] = primary.records["mail._domainkey.example.com", "TXT"]
    assert dkim.replace('" "', "") == f'"{KEY.record}"'
    assert {line.split()[0] for line in publish(primary, tmp_path)} == {"kept"}
    assert len(primary.updates) == 1


def test_what_we_made_is_remembered_for_the_owner_alone(tmp_path: Path) -> None:
    publish(Primary("example.com"), tmp_path / "data")
    path = tmp_path / "data" / "published.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    known = json.loads(path.read_text())
    assert known["version"] == 1
    assert known["records"]["example.com MX"] == ["10 mail.example.com"]


OTHER_MX = "there is 5 mx.else.example, not made by chasquid; wanted 10 mail.example.com"


@pytest.mark.parametrize(
    "kind, there, wanted, line",
    [
        ("MX", ["5 mx.else.example."], "10 mail.example.com", f"kept example.com MX: {OTHER_MX}"),
        ("MX", ["10 MAIL.example.com."], "10 mail.example.com", "kept example.com MX"),
        (
            "MX",
            ["10 mail.example.com.", "20 backup.else.example."],
            "10 mail.example.com",
            "kept example.com MX",
        ),
        ("TXT", ['"v=spf1" " mx ~all"'], "v=spf1 mx ~all", "kept example.com TXT"),
        ("TXT", ['"other"', '"v=spf1 mx ~all"'], "v=spf1 mx ~all", "kept example.com TXT"),
        ("TXT", ['"v=spf10 or so"', '"v=verify"'], "v=spf1 mx ~all", "made example.com TXT"),
        (
            "TXT",
            ['"v=spf1 -all"'],
            "v=spf1 mx ~all",
            "kept example.com TXT: there is v=spf1 -all, not made by chasquid; "
            "wanted v=spf1 mx ~all",
        ),
        ("TXT", ['"v=DMARC1;p=none"'], "v=DMARC1; p=none", "kept example.com TXT"),
        ("TXT", ['"v=DKIM1 ; k=rsa; p=x;"'], "v=DKIM1; k=rsa; p=x", "kept example.com TXT"),
        ("AAAA", ["2001:db8::25"], "2001:0db8::0025", "kept example.com AAAA"),
        (
            "A",
            ["192.0.2.1"],
            "192.0.2.2",
            "kept example.com A: there is 192.0.2.1, not made by chasquid; wanted 192.0.2.2",
        ),
    ],
)
def test_what_others_made_stays(
    tmp_path: Path, kind: str, there: list[str], wanted: str, line: str
) -> None:
    primary = Primary("example.com", records={("example.com", kind): list(there)})
    assert publish(primary, tmp_path, [DnsRecord("example.com", kind, wanted, "")]) == [line]
    assert set(there) <= set(primary.records["example.com", kind])


@pytest.mark.parametrize(
    "records, line",
    [
        ({("a.example.com", "CNAME"): ["b.else.example."]}, "TXT"),
        ({("a.example.com", "A"): ["192.0.2.1"]}, "CNAME"),
    ],
)
def test_beside_an_alias_nothing_is_made(tmp_path: Path, records: Any, line: str) -> None:
    primary = Primary("example.com", records=records)
    value = "v=spf1 -all" if line == "TXT" else "mail.example.com"
    [found] = publish(primary, tmp_path, [DnsRecord("a.example.com", line, value, "")])
    assert found.startswith(f"kept a.example.com {line}: there is ")
    assert primary.updates == []


def test_what_we_made_is_changed_and_nothing_else(tmp_path: Path) -> None:
    primary = Primary("example.com", records={("example.com", "TXT"): ['"else"']})
    publish(primary, tmp_path)
    new = NEEDS._replace(addresses=("192.0.2.26",), smarthost="smtp.example.net")
    records = [record for record in domain_records(new) if not record.optional]
    lines = publish(primary, tmp_path, records)
    assert [line for line in lines if not line.startswith("kept ")] == [
        "changed mail.example.com A",
        "changed example.com TXT",
    ]
    assert primary.records["example.com", "TXT"] == ['"else"', '"v=spf1 mx ?all"']
    assert primary.records["mail.example.com", "AAAA"] == ["2001:db8::25"]  # not asked for, stays
    primary.records["example.com", "TXT"] = ['"v=spf1 a -all"']  # by hand
    assert any("there is v=spf1 a -all" in line for line in publish(primary, tmp_path))


def test_a_record_that_was_there_before_us_is_never_ours(tmp_path: Path) -> None:
    there = {("example.com", "MX"): ["10 mail.example.com."]}
    primary = Primary("example.com", records=there)
    publish(primary, tmp_path)
    other = [DnsRecord("example.com", "MX", "10 mx.example.com", "MX")]
    assert publish(primary, tmp_path, other)[0].startswith("kept example.com MX: there is 10 mail.")


def test_a_change_by_somebody_else_is_looked_at_again(tmp_path: Path) -> None:
    primary = Primary("example.com")

    def meddle() -> None:
        primary.records.setdefault(("example.com", "MX"), ["5 mx.else.example."])

    primary.before_update = meddle
    assert f"kept example.com MX: {OTHER_MX}" in publish(primary, tmp_path)
    assert len(primary.updates) == 2
    assert primary.records["example.com", "MX"] == ["5 mx.else.example."]


def test_who_changes_it_all_the_time_wins(tmp_path: Path) -> None:
    primary = Primary("example.com")
    primary.fails_updates = "NXRRSET"
    with pytest.raises(chasquid.ChasquidError, match="somebody else is changing it all the time"):
        publish(primary, tmp_path)
    assert not (tmp_path / "published.json").exists()


@pytest.mark.parametrize(
    "fails, expected",
    [
        ("REFUSED", "does not let the key update see or change example.com"),
        ("NOTAUTH", "does not serve the zone example.com: name the server that does"),
        ("NOTIMP", "takes no changes by DNS update"),
        ("SERVFAIL", "failed at that; its own log says why (SERVFAIL)"),
        ("NOTZONE", "answers NOTZONE (NOTZONE)"),
        (dns.tsig.PeerBadKey(), "does not know the key update"),
        (dns.tsig.PeerBadSignature(), "knows another secret for the key update"),
        (dns.tsig.BadSignature(), "knows another secret for the key update"),
        (dns.tsig.PeerBadTime(), "has another time than this host: set the clocks"),
        (dns.tsig.BadTime(), "has another time than this host: set the clocks"),
        (ConnectionRefusedError(111, "Connection refused"), "cannot be asked: Connection refused"),
        (dns.exception.Timeout(timeout=10), "cannot be asked: "),
        (EOFError(), "cannot be asked: "),
    ],
    ids=str,
)
def test_a_failure_is_one_sentence(tmp_path: Path, fails: str | Exception, expected: str) -> None:
    primary = Primary("example.com")
    primary.fails_updates = fails
    with pytest.raises(chasquid.ChasquidError) as caught:
        publish(primary, tmp_path)
    assert str(caught.value).startswith("the name server 192.0.2.53 ")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_an_answer_that_is_not_signed_is_not_believed(tmp_path: Path) -> None:
    primary = Primary("example.com")
    primary.signs = False
    with pytest.raises(chasquid.ChasquidError, match="the answer .* is not signed"):
        publish(primary, tmp_path)


def test_a_server_that_cannot_be_reached_is_waited_for_once(tmp_path: Path) -> None:
    primary = Primary("example.com")
    primary.fails = TimeoutError("timed out")
    with pytest.raises(chasquid.ChasquidError, match="192.0.2.53 cannot be asked: timed out"):
        publish(primary, tmp_path)
    assert len(primary.asked) == 1


WORLD = {
    ("example.com", "SOA"): ["ns.example.net. root.example.net. 1 2 3 4 5"],
    ("ns.example.net", "A"): ["192.0.2.1", "192.0.2.2"],
    ("ns.example.net", "AAAA"): ["2001:db8::1"],
}


def test_the_primary_server_is_that_of_the_soa_at_any_of_its_addresses(tmp_path: Path) -> None:
    primary = Primary("example.com")

    def exchange(message: Any, host: str, port: int) -> Any:
        if host != "2001:db8::1":
            raise TimeoutError("timed out")
        return primary.exchange(message, host, port)

    lines = publish(
        primary, tmp_path, key=UPDATE_KEY, resolve=resolver_of(WORLD), exchange=exchange
    )
    assert {line.split()[0] for line in lines} == {"made"}
    assert set(primary.asked) == {("2001:db8::1", 53)}


@pytest.mark.parametrize(
    "world, expected",
    [
        ({}, "no zone is found that example.com is in; is the domain registered"),
        ({("com", "SOA"): ["ns.example.net. a. 1 2 3 4 5"]}, "is the domain registered"),
        ({("example.com", "SOA"): ["ns.x. a. 1 2 3 4 5"]}, "the name server ns.x has no address"),
    ],
)
def test_a_domain_that_is_not_in_the_dns_is_told(tmp_path: Path, world: Any, expected: str) -> None:
    with pytest.raises(chasquid.ChasquidError, match=expected):
        publish(Primary(), tmp_path, key=UPDATE_KEY, resolve=resolver_of(world))


def test_a_server_that_has_not_the_zone_is_told(tmp_path: Path) -> None:
    with pytest.raises(chasquid.ChasquidError, match="ns.example.net does not serve the zone"):
        publish(Primary("other.example"), tmp_path, key=UPDATE_KEY, resolve=resolver_of(WORLD))


def test_a_host_in_a_zone_of_others_does_not_hold_up_ours(tmp_path: Path) -> None:
    world = {**WORLD, ("provider.net", "SOA"): ["ns.provider.net. root. 1 2 3 4 5"]}
    records = domain_records(NEEDS._replace(host="vps.provider.net"))
    lines = publish(Primary("example.com"), tmp_path, records, resolve=resolver_of(world))
    failed = [line for line in lines if line.startswith("failed ")]
    assert failed[0] == (
        "failed vps.provider.net A: the name server ns.provider.net has no address"
    )
    assert "made example.com MX" in lines


def test_a_host_that_is_a_domain_too_gets_one_spf_record(tmp_path: Path) -> None:
    primary = Primary("example.com")
    other = NEEDS._replace(domain="mail.example.com", keys=())
    for records in (
        [*domain_records(NEEDS), *domain_records(other)],
        [*domain_records(other), *domain_records(NEEDS)],
    ):
        publish(primary, tmp_path, records)
        assert primary.records["mail.example.com", "TXT"] == ['"v=spf1 mx ~all"']
        assert primary.records["mail.example.com", "A"] == ["192.0.2.25"]


def test_what_was_published_is_not_guessed_from_a_damaged_file(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"records": [1]}', '{"records": {"a": 1}}'):
        (tmp_path / "published.json").write_text(text)
        with pytest.raises(chasquid.ConfigError, match="published.json: it is damaged"):
            publish(Primary("example.com"), tmp_path)


# --- the command ---


def test_the_records_are_shown(commands: CommandLine) -> None:
    ended = commands.run("dns", "show", "--address", "192.0.2.25", "--address", "2001:db8::25")
    assert ended.status == 0 and ended.err == ""
    assert ended.out.startswith(
        "here.example needs:\n"
        "  @       MX     10 mail.here.example\n"
        "  mail    A      192.0.2.25\n"
        "  mail    AAAA   2001:db8::25\n"
        "  @       TXT    v=spf1 mx ~all\n"
        "  _dmarc  TXT    v=DMARC1; p=quarantine\n"
        "\n"
        "here.example may have:\n"
    )
    zone = commands.run("dns", "show", "here.example", "--zone", "--address", "192.0.2.25").out
    assert zone.startswith("$TTL 3600\nhere.example.\tIN MX\t10 mail.here.example.\n")


def test_only_domains_that_others_write_to_need_records(commands: CommandLine) -> None:
    commands.write("domains/mail.here.example/aliases", "root: ana@here.example\n")
    commands.write("domains/lists.example/aliases", "all: ana@here.example\n")
    shown = commands.run("dns", "show").out
    assert "here.example needs:" in shown and "lists.example needs:" in shown
    assert "mail.here.example needs:" not in shown
    assert "mail.here.example needs:" in commands.run("dns", "show", "mail.here.example").out
    assert commands.fails("dns", "show", "else.example") == "else.example is not served here"
    users = commands.write("domains/here.example/users", "oops\n")
    assert commands.fails("dns", "show").startswith(f"{users}:")


def test_the_policy_that_our_web_listener_serves_is_announced(commands: CommandLine) -> None:
    assert "v=STSv1" not in commands.run("dns", "show").out
    commands.configure(web_address="127.0.0.1:8080")
    policy = chasquid.sts_policy_text(["mail.here.example"])
    announced = f"TXT    v=STSv1; id={chasquid.sts_policy_id(policy)}\n"
    assert announced in commands.run("dns", "show").out


def test_publishing_wants_a_key_and_addresses_are_checked(commands: CommandLine) -> None:
    assert commands.fails("dns", "publish") == (
        "expected --dns-key FILE, with the key that the name server knows"
    )
    assert "expected IP addresses" in commands.fails("dns", "show", "--address", "mail")
    text = commands.fails("dns", "publish", "--dns-key", str(commands.config_dir / "none"))
    assert text.endswith("none: it cannot be read: No such file or directory")
