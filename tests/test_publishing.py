# SPDX-License-Identifier: Apache-2.0
"""Room PUBLISHING: which records a domain needs, and the forms in which they are shown."""

import ipaddress

import dns.rdatatype
import dns.zone
import pytest

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
