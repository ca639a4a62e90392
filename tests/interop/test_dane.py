# SPDX-License-Identifier: Apache-2.0
"""Servers whose certificates are in zones that NSD serves signed and Unbound validates."""

from __future__ import annotations

import base64
import hashlib
import ssl
from pathlib import Path

import pytest

from .peers import Nsd, Postfix, Unbound
from .server import Chasquid
from .tools import ANA, DORA, Certificate, letter, make_certificate, program, run

RECORDS = "@ MX 10 mx\nmx A 127.0.0.1\n"


def tlsa(port: int, parameters: str, certificate: Path) -> str:
    """Return the record of a certificate, or with selector 1 of its key."""
    pem = certificate.read_text()
    usage, selector, matching = parameters.split()
    if selector == "0":
        content = ssl.PEM_cert_to_DER_cert(pem)
    else:
        key = run(program("openssl"), "x509", "-noout", "-pubkey", input=pem).stdout
        content = base64.b64decode("".join(key.splitlines()[1:-1]))
    if matching != "0":
        content = hashlib.new({"1": "sha256", "2": "sha512"}[matching], content).digest()
    return f"_{port}._tcp.mx TLSA {usage} {selector} {matching} {content.hex()}\n"


def wrong_tlsa(port: int, parameters: str = "3 1 1") -> str:
    return f"_{port}._tcp.mx TLSA {parameters} {'5a' * 32}\n"


def sign_certificate(directory: Path, authority: Certificate, name: str) -> Certificate:
    """Make a certificate signed by an authority, which is also in the chain."""
    directory.mkdir()
    made = Certificate(directory / "fullchain.pem", directory / "privkey.pem")
    run(
        *[program("openssl"), "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"],
        *["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={name}"],
        *["-CA", str(authority.fullchain), "-CAkey", str(authority.privkey)],
        *["-addext", f"subjectAltName=DNS:{name}", "-addext", "basicConstraints=CA:FALSE"],
        *["-keyout", str(made.privkey), "-out", str(made.fullchain)],
    )
    with made.fullchain.open("a") as chain:
        chain.write(authority.fullchain.read_text())
    return made


@pytest.fixture
def resolve(start, names):
    """Serve zones below a signed "example", and return the resolver that validates them."""

    def resolve(zones: dict[str, str], **how: list[str]) -> Unbound:
        return start(Unbound, start(Nsd, {"example": "", **zones}, **how), names)

    return resolve


@pytest.fixture
def send(start):
    """Start a chasquid that asks a resolver, and have Ana write to Dora."""

    def send(resolver: Unbound, port: int) -> Chasquid:
        chasquid = start(Chasquid, resolver, outgoing_smtp_port=port)
        chasquid.submit(ANA, [DORA], letter("signed names", ANA, DORA))
        return chasquid

    return send


def assert_deferred(chasquid: Chasquid, postfix: Postfix, *reasons: str) -> None:
    """The letter must be in the queue, and Postfix must not even know who wrote it."""
    chasquid.wait_for_log("event=next-attempt")
    for reason in reasons:
        assert reason in chasquid.log()
    assert chasquid.queue_ids()
    assert ANA not in postfix.log()
    assert not postfix.letters(DORA)


def assert_no_other_authority_was_asked(postfix: Postfix) -> None:
    assert "alert unknown ca" not in postfix.log()


class TestCertificatesInTheDns:
    @pytest.mark.parametrize("parameters", ["3 1 1", "3 1 2", "3 1 0", "3 0 1"])
    def test_a_server_whose_certificate_matches_gets_the_letter(
        self, start, resolve, send, parameters
    ):
        postfix = start(Postfix)
        record = tlsa(postfix.port, parameters, postfix.certificate)
        chasquid = send(resolve({"dest.example": RECORDS + record}), postfix.port)
        [arrived] = postfix.wait_for_letters(DORA)
        assert "using TLSv1.3" in arrived["Received"]
        assert_no_other_authority_was_asked(postfix)
        # of the authorities that others trust, none says that the certificate is valid
        chasquid.wait_for_log("dest.example is now PLAIN and TLS_INSECURE")

    def test_one_record_of_several_is_enough(self, start, resolve, send):
        postfix = start(Postfix)
        records = wrong_tlsa(postfix.port) + tlsa(postfix.port, "3 1 1", postfix.certificate)
        send(resolve({"dest.example": RECORDS + records}), postfix.port)
        postfix.wait_for_letters(DORA)

    def test_a_certificate_that_does_not_match_gets_nothing(self, start, resolve, send):
        postfix = start(Postfix)
        records = RECORDS + wrong_tlsa(postfix.port)
        chasquid = send(resolve({"dest.example": records}), postfix.port)
        assert_deferred(chasquid, postfix, "4.7.5", "matches no TLSA record")

    def test_a_server_that_hides_starttls_gets_nothing(self, start, resolve, send):
        postfix = start(Postfix, settings={"smtpd_tls_security_level": "none"})
        records = RECORDS + tlsa(postfix.port, "3 1 1", postfix.certificate)
        chasquid = send(resolve({"dest.example": records}), postfix.port)
        assert_deferred(chasquid, postfix, "4.7.5", "does not offer TLS")

    def test_records_that_cannot_be_used_still_promise_tls(self, start, resolve, send):
        postfix = start(Postfix, settings={"smtpd_tls_security_level": "none"})
        records = RECORDS + wrong_tlsa(postfix.port, "1 1 1")
        chasquid = send(resolve({"dest.example": records}), postfix.port)
        assert_deferred(chasquid, postfix, "4.7.5", "does not offer TLS")

    def test_without_a_record_any_certificate_will_do(self, start, resolve, send):
        postfix = start(Postfix)
        chasquid = send(resolve({"dest.example": RECORDS}), postfix.port)
        postfix.wait_for_letters(DORA)
        chasquid.wait_for_log("dest.example is now PLAIN and TLS_INSECURE")
        assert "alert unknown ca" in postfix.log(), "a valid one was not even hoped for"

    def test_a_letter_that_waives_tls_goes_out_all_the_same(self, start, resolve):
        postfix = start(Postfix)
        records = RECORDS + wrong_tlsa(postfix.port)
        resolver = resolve({"dest.example": records})
        chasquid = start(Chasquid, resolver, outgoing_smtp_port=postfix.port)
        message = letter("at any rate", ANA, DORA)
        message["TLS-Required"] = "No"
        chasquid.submit(ANA, [DORA], message)
        postfix.wait_for_letters(DORA)

    def test_smtp_check_tells_of_it_and_sends_a_message(self, start, resolve):
        postfix = start(Postfix)
        records = RECORDS + tlsa(postfix.port, "3 1 1", postfix.certificate)
        resolver = resolve({"dest.example": records})
        chasquid = start(Chasquid, resolver, outgoing_smtp_port=postfix.port)
        chasquid.command("dkim-keygen", "here.example", "r1")
        done = chasquid.command("smtp-check", "--send", DORA)
        assert "MX 10 mx.dest.example: at least TLS_SECURE (DANE)" in done.stdout
        assert "  127.0.0.1: DANE, TLSv1.3 " in done.stdout
        assert f"For {DORA}: delivered." in done.stdout
        [arrived] = postfix.wait_for_letters(DORA)
        assert "d=here.example;" in arrived["DKIM-Signature"]

    def test_smtp_check_says_why_nothing_would_be_sent(self, start, resolve):
        postfix = start(Postfix)
        resolver = resolve({"dest.example": RECORDS + wrong_tlsa(postfix.port)})
        chasquid = start(Chasquid, resolver, outgoing_smtp_port=postfix.port)
        done = chasquid.command("smtp-check", "dest.example", check=False)
        assert done.returncode == 1
        assert "the certificate matches no TLSA record; less is not safe (DANE)" in done.stdout


class TestAuthoritiesInTheDns:
    def start_postfix(self, start, certificate):
        settings = {
            "smtpd_tls_cert_file": certificate.fullchain,
            "smtpd_tls_key_file": certificate.privkey,
        }
        return start(Postfix, settings=settings)

    @pytest.mark.parametrize("parameters", ["2 1 1", "2 0 1"])
    def test_a_certificate_from_the_authority_will_do(
        self, start, place, resolve, send, parameters
    ):
        authority = make_certificate(place / "authority", "authority.example")
        certificate = sign_certificate(place / "signed", authority, "mx.dest.example")
        postfix = self.start_postfix(start, certificate)
        record = tlsa(postfix.port, parameters, authority.fullchain)
        send(resolve({"dest.example": RECORDS + record}), postfix.port)
        postfix.wait_for_letters(DORA)
        assert_no_other_authority_was_asked(postfix)

    def test_a_certificate_for_another_name_will_not(self, start, place, resolve, send):
        authority = make_certificate(place / "authority", "authority.example")
        certificate = sign_certificate(place / "signed", authority, "mx.other.example")
        postfix = self.start_postfix(start, certificate)
        record = tlsa(postfix.port, "2 1 1", authority.fullchain)
        chasquid = send(resolve({"dest.example": RECORDS + record}), postfix.port)
        assert_deferred(chasquid, postfix, "4.7.5")

    def test_a_certificate_with_the_authority_beside_it_will_not(self, start, place, resolve, send):
        authority = make_certificate(place / "authority", "authority.example")
        certificate = make_certificate(place / "own", "mx.dest.example")
        with certificate.fullchain.open("a") as chain:
            chain.write(authority.fullchain.read_text())
        postfix = self.start_postfix(start, certificate)
        record = tlsa(postfix.port, "2 1 1", authority.fullchain)
        chasquid = send(resolve({"dest.example": RECORDS + record}), postfix.port)
        assert_deferred(chasquid, postfix, "4.7.5")


class TestZonesThatAreNotSound:
    def test_records_of_an_unsigned_zone_are_ignored(self, start, resolve, send):
        postfix = start(Postfix)
        zones = {"dest.example": RECORDS + wrong_tlsa(postfix.port)}
        chasquid = send(resolve(zones, unsigned=["dest.example"]), postfix.port)
        postfix.wait_for_letters(DORA)
        chasquid.wait_for_log("dest.example is now PLAIN and TLS_INSECURE")

    def test_nothing_is_sent_where_the_signatures_have_expired(self, start, resolve, send):
        postfix = start(Postfix)
        chasquid = send(resolve({"dest.example": RECORDS}, expired=["dest.example"]), postfix.port)
        assert_deferred(chasquid, postfix, "4.4.3")

    def test_nor_where_those_of_the_host_have_expired(self, start, resolve, send):
        postfix = start(Postfix)
        zones = {"dest.example": "@ MX 10 mx.host.example.\n", "host.example": RECORDS}
        chasquid = send(resolve(zones, expired=["host.example"]), postfix.port)
        assert_deferred(chasquid, postfix, "4.4.3")

    def test_nor_where_only_those_of_the_certificates_have(self, start, resolve, send):
        postfix = start(Postfix)
        zones = {"dest.example": RECORDS, "_tcp.mx.dest.example": ""}
        chasquid = send(resolve(zones, expired=["_tcp.mx.dest.example"]), postfix.port)
        assert_deferred(chasquid, postfix, "4.4.3")


class Dest(Chasquid):
    hostname = "mx.dest.example"


class TestRequireTls:
    def submit(self, chasquid):
        message = letter("for your eyes", ANA, DORA)
        chasquid.submit(ANA, [DORA], message, mail_options=["REQUIRETLS"])

    def status(self, chasquid):
        [report] = chasquid.wait_for_letters(ANA)
        _, for_machines, _ = report.iter_parts()
        return for_machines.get_payload()[1]["Status"]

    def test_two_servers_pass_on_what_was_required(self, start, names, resolve):
        aliases = {"dest.example": "dora: dora2@dest.example, dina@open.example\n"}
        users = {DORA: "x", "dora2@dest.example": "x"}
        there = start(Dest, names, users=users, aliases=aliases)
        record = tlsa(there.smtp_port, "3 1 1", there.certificate)
        zones = {"dest.example": RECORDS + record, "open.example": RECORDS}
        resolver = resolve(zones, unsigned=["open.example"])
        there.settings["dns_server"] = resolver.address
        there.write_settings()
        there.restart()
        here = start(Chasquid, resolver, outgoing_smtp_port=there.smtp_port)
        self.submit(here)
        [arrived] = there.wait_for_letters("dora2@dest.example")
        assert "with ESMTPS" in arrived["Received"]
        there.wait_for_log("to=<dina@open.example> route=mx status=5.7.30")

    def test_a_server_that_does_not_know_the_extension_gets_nothing(self, start, resolve):
        postfix = start(Postfix)
        record = tlsa(postfix.port, "3 1 1", postfix.certificate)
        resolver = resolve({"dest.example": RECORDS + record})
        chasquid = start(Chasquid, resolver, outgoing_smtp_port=postfix.port)
        self.submit(chasquid)
        assert self.status(chasquid) == "5.7.30"
        assert ANA not in postfix.log()

    def test_a_server_that_nobody_vouches_for_gets_nothing(self, start, resolve):
        postfix = start(Postfix)
        resolver = resolve({"dest.example": RECORDS}, unsigned=["dest.example"])
        chasquid = start(Chasquid, resolver, outgoing_smtp_port=postfix.port)
        self.submit(chasquid)
        assert self.status(chasquid) == "5.7.30"
        assert "STARTTLS" not in postfix.log()
        assert ANA not in postfix.log()
