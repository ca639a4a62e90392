# SPDX-License-Identifier: Apache-2.0
"""Rooms HOST CHECKS, DOMAIN CHECKS, DOCTOR: broken set-ups in a table.

Each must yield one finding, whose advice, applied, makes it disappear; see `Setup.follow`.
"""

from __future__ import annotations

import calendar
import functools
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support import (
    CommandLine,
    RunningClock,
    Serve,
    Server,
    certificate,
    config_text,
    greeted,
    users_file,
    wait_for,
    write_certificate,
)

import chasquid
from chasquid import Answer, Finding, Level, Machine, Talk, TemporaryFailure

DOMAIN, HOST, IP, SIX = "example.com", "mail.example.com", "5.45.100.25", "2a03:4000::25"
OTHER_IP = "5.45.200.7"  # somebody else's
SERVERS = {"ns1.example.net": "5.45.111.53", "ns2.example.net": "5.45.112.53"}
SMARTHOST = "smtp.example.net"
HOSTS = "127.0.0.1 localhost\n127.0.1.1 mail.example.com mail\n"  # as Debian writes it
NOW = float(calendar.timegm((2026, 11, 27, 12, 0, 0)))
REVERSE = "25.100.45.5"
KEY_NAME = f"r1._domainkey.{DOMAIN}"
GB = 1024 * 1024 * 1024
POLICY = f"version: STSv1\nmode: enforce\nmx: {HOST}\nmax_age: 86400\n"

Records = tuple[str, ...]


@functools.cache
def key() -> chasquid.DkimKey:
    return chasquid.DkimKey(DOMAIN, "r1", chasquid.new_key("rsa2048"))


def refused(name: str) -> TemporaryFailure:
    return TemporaryFailure(f"5.45.1.1 answers REFUSED for {name}", "4.4.3")


class Setup:
    """A set-up in which all is well: a configuration directory, and a `World` for the rest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config_dir = directory / "config"
        self.settings: dict[str, object] = {"hostname": HOST, "data_dir": str(directory / "data")}
        self.write(f"domains/{DOMAIN}/users", users_file({"ana": "secret"}).decode())
        self.write(f"domains/{DOMAIN}/aliases", "postmaster: ana\n")
        self.key_file = self.write(f"domains/{DOMAIN}/dkim:r1.pem", key().key.to_pem())
        self.renew()
        (directory / "data").mkdir()
        self.dns: dict[tuple[str, str], Records | Exception] = {
            (".", "SOA"): ("a.root-servers.net. nstld.example. 2026112700 1800 900 604800 86400",),
            ("gmail.com", "MX"): ("5 mx.gmail.com.",),
            ("mx.gmail.com", "A"): ("5.45.3.3",),
            (DOMAIN, "NS"): tuple(f"{name}." for name in SERVERS),
            (DOMAIN, "SOA"): ("ns1.example.net. admin.example.net. 7 3600 600 86400 60",),
            **{(name, "A"): (ip,) for name, ip in SERVERS.items()},
            (DOMAIN, "MX"): (f"10 {HOST}.",),
            (HOST, "A"): (IP,),
            (DOMAIN, "TXT"): ("v=spf1 mx ~all", "some-site-verification=1"),
            (KEY_NAME, "TXT"): (key().record,),
            (f"_dmarc.{DOMAIN}", "TXT"): ("v=DMARC1; p=quarantine",),
            (f"{REVERSE}.in-addr.arpa", "PTR"): (f"{HOST}.",),
            (SMARTHOST, "A"): ("5.45.9.9",),
        }
        self.signed: set[str] = set()
        self.by_server: dict[tuple[str, str, str], Records | Exception] = {}
        self.aliases: dict[str, str] = {}  # CNAME
        self.policies: dict[str, str] = {}
        self.sessions: list[str] | None | Exception = ["smtp 5.45.77.77", "submission 10.0.0.2"]
        self.own: list[str] = [IP]
        self.state = Machine(HOSTS, 0, frozenset(), 100 * GB, 50 * GB, GB, True)
        self.time = NOW
        self.greeting = f"220 {HOST} ESMTP chasquid"
        self.rcpt = "550 5.7.1 Relaying denied"
        self.tls_problem = ""
        self.ports = {("127.0.0.1", port) for port in (25, 465, 587, 993)}
        self.ports |= {("5.45.3.3", 25), ("5.45.9.9", 587)}
        self.imap = "* OK [CAPABILITY IMAP4rev1] Dovecot ready."
        self.offers_tls = True
        self.elsewhere: dict[tuple[str, int], str] = {}  # what others greet with

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.config_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def renew(self) -> None:
        """Have a certificate for the host, as a program that gets them would write it."""
        write_certificate(self.config_dir / "certs" / HOST, HOST)
        (self.config_dir / "certs" / HOST / "privkey.pem").chmod(0o600)

    # --- the World ---

    def query(self, name: str, kind: str, server: str = "") -> Answer:
        if server:
            assert server in SERVERS.values()
            if f".{name}".endswith(f".{DOMAIN}") is False:
                raise TemporaryFailure(f"{server} is not in charge of {name}", "4.4.3")
        found = self.by_server.get((server, name, kind), self.dns.get((name, kind), ()))
        found = self.by_server.get((server, "*", "*"), found)
        if isinstance(found, Exception):
            raise found
        exists = any(f".{known}".endswith(f".{name}") for known, _ in self.dns) or name == "."
        canonical = self.aliases.get(name, "")
        if canonical and not server:
            there = self.dns.get((canonical, kind), ())
            assert not isinstance(there, Exception)
            return Answer(True, there, 60.0, canonical=canonical)
        return Answer(exists or bool(canonical), found, 60.0, canonical=canonical)

    def talk(
        self, host: str, port: int, commands: Sequence[str] = (), name: str = "", tls: bool = False
    ) -> Talk:
        if (host, port) in self.elsewhere:
            return Talk((self.elsewhere[host, port], *("250 OK" for _ in commands)))
        if (host, port) not in self.ports:
            raise chasquid.Disconnected(f"cannot connect to [{host}]:{port}: Connection refused")
        if port in (993, 143):
            return Talk((self.imap,))
        replies = {"RCPT": self.rcpt, "STARTTLS": "220 ready" if self.offers_tls else "502 no"}
        said = [replies.get(command.split()[0], "250 OK") for command in commands]
        secure = tls or (commands and commands[-1] == "STARTTLS" and self.offers_tls)
        chain = (chasquid.ssl.PEM_cert_to_DER_cert(certificate(HOST)[0]),) if secure else ()
        return Talk((self.greeting, *said), self.tls_problem if secure else "", chain)

    def fetch_policy(self, domain: str) -> bytes:
        if domain not in self.policies:
            raise chasquid.ChasquidError("the web server answers with status 404")
        return self.policies[domain].encode()

    def ask_server(self, command: str) -> list[str] | None:
        assert command == "sessions"
        if isinstance(self.sessions, Exception):
            raise self.sessions
        return self.sessions

    def addresses(self) -> Sequence[str]:
        return self.own

    def machine(self) -> Machine:
        return self.state

    def now(self) -> float:
        return self.time

    # --- the doctor ---

    def diagnose(self) -> list[Finding]:
        self.write("chasquid.conf", config_text(self.settings).replace("True", "true"))
        problems: list[chasquid.ConfigError] = []
        config = chasquid.load_config(str(self.config_dir), "", problems)
        facts = chasquid.facts_of(chasquid.examine_files(config, problems), self)
        return chasquid.diagnose(facts)

    def ill(self) -> list[Finding]:
        return [finding for finding in self.diagnose() if finding.level is not Level.OK]

    def follow(self, fix: str) -> None:
        """Do what a finding says, as far as it is a record to enter or a command to run."""
        if match := re.search(
            r": (@|[\w.-]+) +(MX|A|AAAA|TXT) +(.*?)(?:; if .*)?$", fix.partition("\n")[0]
        ):
            name, kind, value = match.groups()
            name = name[:-1] if name.endswith(".") else f"{name}.{DOMAIN}"
            name = name.removeprefix("@.")
            value += "." if kind == "MX" else ""
            self.aliases.pop(name, None)
            self.dns[name, kind] = (value,)
            self.dns.pop((f"{name}.{DOMAIN}", kind), None)
        elif fix.startswith("sudo certbot") or "--acme-agree" in fix:
            self.renew()
            self.tls_problem = ""
        elif fix.startswith("sudo systemctl"):
            self.sessions = ["smtp 5.45.77.77"]
            self.ports |= {("127.0.0.1", port) for port in (25, 465, 587)}
            self.offers_tls = True
        elif fix.startswith("sudo timedatectl"):
            self.time = NOW
            self.state = self.state._replace(synchronised=True)
        elif re.match(r"sudo chmod|sudo chown|echo ", fix):
            subprocess.run(["sh", "-ec", fix.replace("sudo ", "")], check=True)
            self.state = self.state._replace(user=0)
        elif match := re.search(r"set its PTR record to (\S+?)(;|$)", fix):
            self.dns[f"{REVERSE}.in-addr.arpa", "PTR"] = (f"{match[1]}.",)
        else:
            raise AssertionError(f"how is this followed? {fix}")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


Change = Callable[[Setup], object]


class Row(NamedTuple):
    """A set-up that is broken in one way, and the finding that it must yield.

    `mended` does what the advice says, if `Setup.follow` cannot.
    """

    name: str
    change: Change
    check: str
    level: Level
    text: str
    mended: Change | None = None


MEND, ADVICE, UNKNOWN = Level.MEND, Level.ADVICE, Level.UNKNOWN


def dns_is(name: str, kind: str, *records: str) -> Change:
    """Have other records at a name; without any, none."""

    def change(setup: Setup) -> None:
        setup.dns[name, kind] = records

    return change


def and_also(*changes: Change) -> Change:
    return lambda setup: [change(setup) for change in changes]


def attribute(name: str, value: object) -> Change:
    return lambda setup: setattr(setup, name, value)


def machine(**values: object) -> Change:
    def change(setup: Setup) -> None:
        setup.state = setup.state._replace(**values)  # type: ignore[arg-type]

    return change


def settings(**values: object) -> Change:
    return lambda setup: setup.settings.update(values)


def moved(name: str, kind: str, to: str) -> Change:
    def change(setup: Setup) -> None:
        setup.dns[to, kind] = setup.dns.pop((name, kind))

    return change


def aliased(name: str, to: str) -> Change:
    """Have a CNAME at a name, and its addresses at another."""

    def change(setup: Setup) -> None:
        setup.dns[to, "A"] = setup.dns.pop((name, "A"))
        setup.aliases[name] = to

    return change


def fails(name: str, kind: str) -> Change:
    def change(setup: Setup) -> None:
        setup.dns[name, kind] = refused(name)

    return change


def sts(policy: str | None, record: str = "v=STSv1; id=7") -> Change:
    def change(setup: Setup) -> None:
        setup.dns[f"_mta-sts.{DOMAIN}", "TXT"] = (record,)
        if policy is not None:
            setup.policies[DOMAIN] = policy

    return change


def no_resolver(setup: Setup) -> None:
    for name, kind in list(setup.dns):
        setup.dns[name, kind] = TemporaryFailure("1.1.1.1 did not answer in time", "4.4.3")
    setup.dns[HOST, "NS"] = refused(HOST)


def broken_dnssec(setup: Setup) -> None:
    for name in (DOMAIN, HOST):
        setup.dns[name, "NS"] = TemporaryFailure(f"5.45.1.1 answers SERVFAIL for {name}", "4.4.3")
    setup.dns[DOMAIN, "DS"] = setup.dns[HOST, "DS"] = ("1 13 2 00",)


def without_domain(setup: Setup) -> None:
    setup.dns = {key: value for key, value in setup.dns.items() if DOMAIN not in key[0]}
    setup.dns["com", "NS"] = ()


def expired_certificate(setup: Setup) -> None:
    chain, private = chasquid.self_signed_certificate([HOST], NOW - 11 * 365 * 86400)
    setup.write(f"certs/{HOST}/fullchain.pem", chain)
    setup.write(f"certs/{HOST}/privkey.pem", private)


def expiring_certificate(setup: Setup, days: int = 9) -> None:
    chain, private = chasquid.self_signed_certificate([HOST], NOW - (3650 - days) * 86400 + 9)
    setup.write(f"certs/{HOST}/fullchain.pem", chain)
    setup.write(f"certs/{HOST}/privkey.pem", private)


def certificate_of_another_name(setup: Setup) -> None:
    write_certificate(setup.config_dir / "certs" / HOST, "other.example")


def without_certificate(setup: Setup) -> None:
    for path in (setup.config_dir / "certs" / HOST).iterdir():
        path.unlink()


def foreign_key(setup: Setup) -> None:
    path = setup.config_dir / "certs" / HOST / "privkey.pem"
    path.write_text(certificate("other.example")[1])


def behind_nat(setup: Setup) -> None:
    setup.own = []
    setup.sessions = []


def without_port(*ports: int) -> Change:
    def change(setup: Setup) -> None:
        setup.ports = {place for place in setup.ports if place[1] not in ports}

    return change


def nothing_outward(setup: Setup) -> None:
    setup.ports.discard(("5.45.3.3", 25))


def smarthost(setup: Setup) -> None:
    nothing_outward(setup)
    setup.settings["smarthost"] = f"{SMARTHOST}:587"
    setup.dns[DOMAIN, "TXT"] = ("v=spf1 mx ?all",)
    setup.dns.pop((f"{REVERSE}.in-addr.arpa", "PTR"), None)


def tlsa(data: str, signed: bool = True) -> Change:
    def change(setup: Setup) -> None:
        setup.dns[f"_25._tcp.{HOST}", "TLSA"] = (data,)
        if signed:
            setup.dns[DOMAIN, "DS"] = ("1 13 2 00",)

    return change


def own_tlsa() -> str:
    import hashlib

    info = chasquid.public_key_info(chasquid.ssl.PEM_cert_to_DER_cert(certificate(HOST)[0]))
    return f"3 1 1 {hashlib.sha256(info).hexdigest()}"


def at(server: str, name: str, kind: str, answer: Records | Exception) -> Change:
    def change(setup: Setup) -> None:
        setup.by_server[SERVERS[server], name, kind] = answer

    return change


def healed(setup: Setup) -> None:
    setup.by_server.clear()


def fresh(setup: Setup) -> None:
    """Have the DNS of a set-up in which all is well."""
    setup.dns = Setup(setup.directory / "fresh").dns


def listed(zone: str, answer: str) -> Change:
    return dns_is(f"{REVERSE}.{zone}", "A", answer)


def own_resolver(setup: Setup) -> None:
    setup.dns = {name: found for name, found in setup.dns.items() if "spamhaus" not in name[0]}


SPF_NAME, DMARC_NAME = (DOMAIN, "TXT"), (f"_dmarc.{DOMAIN}", "TXT")
OTHER_KEY = "v=DKIM1; k=rsa; p=MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A"

ROWS = [
    # the files
    Row("unknown key", settings(max_data=1), "files", MEND, "expected a known key",
        lambda setup: setup.settings.pop("max_data")),
    Row("users file broken", lambda s: s.write(f"domains/{DOMAIN}/aliases", "x y\n"), "files", MEND,
        "aliases:1: expected", lambda s: s.write(f"domains/{DOMAIN}/aliases", "postmaster: ana\n")),
    Row("dangling alias", lambda s: s.write(f"domains/{DOMAIN}/aliases",
                                            "postmaster: ana\nsales: nobody\n"),
        "files", MEND, "sales@example.com leads to nobody",
        lambda s: s.write(f"domains/{DOMAIN}/aliases", "postmaster: ana\n")),
    Row("alias hides a user", lambda s: s.write(f"domains/{DOMAIN}/aliases",
                                                "postmaster: ana\nana: x@example.org\n"),
        "files", ADVICE, "an alias hides this user",
        lambda s: s.write(f"domains/{DOMAIN}/aliases", "postmaster: ana\n")),
    Row("key does not fit", foreign_key, "files", MEND, "expected a certificate chain that fits",
        Setup.renew),
    Row("key for all to read", lambda s: s.key_file.chmod(0o644), "modes", MEND,
        "anybody on this host may read"),
    Row("aliases for all to change",
        lambda s: (s.config_dir / f"domains/{DOMAIN}/aliases").chmod(0o666), "modes", MEND,
        "anybody on this host may change"),
    Row("users of another owner", machine(user=12345), "modes", MEND, "(user 12345) may not read"),
    Row("no postmaster", lambda s: s.write(f"domains/{DOMAIN}/aliases", ""), "postmaster", ADVICE,
        "there is no postmaster@example.com"),
    # certificates
    Row("no certificate", without_certificate, "certificates", MEND, "there is no certificate"),
    Row("expired", expired_certificate, "certificates", MEND, "has expired"),
    Row("expires soon", expiring_certificate, "certificates", ADVICE, "expires in 9 days"),
    Row("expires today", lambda s: expiring_certificate(s, 0), "certificates", MEND, "in 0 days"),
    Row("for another name", certificate_of_another_name, "certificates", MEND,
        f"no certificate in certs is for {HOST}"),
    Row("self-signed", attribute("tls_problem", "the certificate is not valid: self-signed"),
        "ports", MEND, "self-signed: mail programs warn"),
    # the running server
    Row("not running", and_also(attribute("sessions", None), without_port(465, 587)), "server",
        MEND, "the server is not running"),
    Row("who may not ask", attribute("sessions", chasquid.ChasquidError("Permission denied")),
        "server", UNKNOWN, "could not be checked: Permission denied",
        attribute("sessions", ["smtp 5.45.77.77"])),
    Row("no submission", without_port(587), "ports", MEND, "port 587 (submission) does not answer"),
    Row("another program at 25", lambda s: s.elsewhere.update(
        {("127.0.0.1", 25): "220 mail ESMTP Exim 4.96"}), "ports", MEND,
        "another program is at port 25", lambda setup: setup.elsewhere.clear()),
    Row("no STARTTLS", attribute("offers_tls", False), "ports", MEND, "port 587 offers no TLS"),
    Row("behind HAProxy", settings(haproxy_incoming=True), "ports", UNKNOWN,
        "the ports are not tried", lambda setup: setup.settings.pop("haproxy_incoming")),
    Row("open relay", attribute("rcpt", "250 2.1.5 OK"), "relay", MEND, "this is an open relay",
        attribute("rcpt", "550 no")),
    Row("no IMAP", without_port(993), "imap", ADVICE, "no IMAP server answers",
        lambda setup: setup.ports.add(("127.0.0.1", 143))),
    # the machine
    Row("clock of 1970", attribute("time", 7 * 86400.0), "clock", MEND, "the clock is wrong"),
    Row("clock that nobody keeps", machine(synchronised=False), "clock", ADVICE, "no time service"),
    Row("disk full", machine(free=10 * 1024 * 1024), "disk", MEND, "all mail is refused for now",
        machine(free=50 * GB)),
    Row("disk nearly full", machine(free=70 * 1024 * 1024), "disk", ADVICE, "soon all mail",
        machine(free=50 * GB)),
    Row("little memory", machine(memory=20 * 1024 * 1024), "memory", ADVICE, "only 20 MB of memory",
        machine(memory=GB)),
    # name servers
    Row("resolver fails", no_resolver, "name servers", MEND, "no name server answers here", fresh),
    Row("domain not registered", without_domain, "name servers", MEND, "does not exist", fresh),
    Row("broken DNSSEC", broken_dnssec, "name servers", MEND, "signatures do not fit", fresh),
    Row("dead name server", at("ns2.example.net", "*", "*", refused(DOMAIN)), "name servers",
        ADVICE, "ns2.example.net, a name server of example.com, is no help", healed),
    Row("stale name server",
        at("ns2.example.net", DOMAIN, "SOA", ("ns1. admin. 6 3600 600 86400 60",)), "name servers",
        ADVICE, "different versions of it: ns1.example.net has 7, ns2.example.net has 6", healed),
    Row("name servers out of reach", and_also(
        *(at(name, "*", "*", TemporaryFailure("time-out", "4.4.3")) for name in SERVERS)),
        "name servers", UNKNOWN, "can be asked from here", healed),
    # the address of the host
    Row("no address", and_also(dns_is(HOST, "A"), machine(hosts="")), "address", MEND,
        f"{HOST} has no address in the DNS, so nobody finds this host"),
    Row("only in /etc/hosts", dns_is(HOST, "A"), "address", MEND, "it stands only in /etc/hosts"),
    Row("private address", dns_is(HOST, "A", "192.168.1.5"), "address", MEND,
        "nobody can reach from outside"),
    Row("behind a provider's NAT", and_also(dns_is(HOST, "A", "100.64.3.4"), behind_nat), "address",
        MEND, "nobody can reach", and_also(attribute("sessions", ["smtp 5.45.77.77"]), fresh)),
    Row("changed address",
        and_also(attribute("own", [OTHER_IP]),
                 dns_is("7.200.45.5.in-addr.arpa", "PTR", f"{HOST}.")),
        "address", MEND, f"this host sends from {OTHER_IP}"),
    Row("IPv6 without AAAA",
        and_also(attribute("own", [IP, SIX]),
                 dns_is(f"{'.'.join('52' + '0' * 22 + '0004' + '30a2')}.ip6.arpa", "PTR",
                        f"{HOST}.")),
        "address", MEND, f"sends from {SIX}, but the DNS says that {HOST} is elsewhere"),
    Row("no PTR", dns_is(f"{REVERSE}.in-addr.arpa", "PTR"), "ptr", MEND, "has no PTR record"),
    Row("PTR that does not lead back", dns_is(f"{REVERSE}.in-addr.arpa", "PTR", "x.example.net."),
        "ptr", MEND, "which is not 5.45.100.25 in the DNS"),
    Row("PTR of the provider",
        and_also(dns_is(f"{REVERSE}.in-addr.arpa", "PTR", "ip5.example.net."),
                 dns_is("ip5.example.net", "A", IP)), "ptr", ADVICE, "a line of a household"),
    Row("PTR nobody can say", fails(f"{REVERSE}.in-addr.arpa", "PTR"), "ptr", UNKNOWN,
        "could not be checked: 5.45.1.1 answers REFUSED", fresh),
    # the line
    Row("port 25 outward closed", nothing_outward, "outward", MEND, "so no mail leaves", smarthost),
    Row("a DNS without others", and_also(dns_is("gmail.com", "MX")), "outward", UNKNOWN,
        "port 25 outward is not tried", fresh),
    Row("smarthost out of reach", and_also(smarthost, without_port(587),
                                           lambda s: s.ports.add(("127.0.0.1", 587))),
        "outward", MEND, f"the smarthost {SMARTHOST}:587 cannot be reached",
        lambda setup: setup.ports.add(("5.45.9.9", 587))),
    Row("nobody came yet", attribute("sessions", ["smtp 127.0.0.1", "smtp 192.168.1.2"]),
        "reachable", UNKNOWN, "nobody from outside has come to port 25 yet",
        attribute("sessions", ["smtp 5.45.77.77"])),
    Row("NAT without forwarding", behind_nat, "reachable", UNKNOWN, "cannot be seen from here",
        attribute("sessions", ["smtp 5.45.77.77"])),
    Row("NAT to another host",
        and_also(behind_nat, lambda s: s.elsewhere.update({(IP, 25): "220 router ESMTP"})),
        "reachable", MEND, "another server answers: '220 router ESMTP'",
        attribute("sessions", ["smtp 5.45.77.77"])),
    Row("home line by Spamhaus", listed("zen.spamhaus.org", "127.0.0.10"), "block lists", MEND,
        "a line that should not send mail", smarthost),
    Row("on a block list", listed("zen.spamhaus.org", "127.0.0.2"), "block lists", MEND,
        "on the block list zen.spamhaus.org", own_resolver),
    Row("block list says that we may not ask", listed("zen.spamhaus.org", "127.255.255.254"),
        "block lists", UNKNOWN, "does not answer us", own_resolver),
    Row("block list refuses", fails(f"{REVERSE}.zen.spamhaus.org", "A"), "block lists", UNKNOWN,
        "REFUSED", own_resolver),
    Row("resolver that invents answers", listed("zen.spamhaus.org", "62.0.0.1"), "block lists",
        UNKNOWN, "invents the answer", own_resolver),
    Row("TLSA of an old certificate", tlsa("3 1 1 " + "5a" * 32), "dane", MEND,
        "so servers with DANE send nothing", tlsa(own_tlsa())),
    Row("TLSA that is not signed", tlsa(own_tlsa(), signed=False), "dane", ADVICE,
        "is not signed (DNSSEC)", tlsa(own_tlsa())),
    # MX
    Row("no MX", dns_is(DOMAIN, "MX"), "mx", MEND, "has no MX record"),
    Row("MX to another", and_also(dns_is(DOMAIN, "MX", "10 mx.example.org."),
                                  dns_is("mx.example.org", "A", OTHER_IP)), "mx", MEND,
        "mail for example.com goes to mx.example.org, not to this host"),
    Row("null MX", dns_is(DOMAIN, "MX", "0 ."), "mx", MEND, "takes no mail (null MX"),
    Row("MX with the domain doubled", dns_is(DOMAIN, "MX", f"10 {HOST}.{DOMAIN}."), "mx", MEND,
        "the form has added the domain", dns_is(DOMAIN, "MX", f"10 {HOST}.")),
    Row("MX that is an address", dns_is(DOMAIN, "MX", f"10 {IP}."), "mx", MEND, "must be a name"),
    Row("CNAME as MX", and_also(dns_is(DOMAIN, "MX", f"10 smtp.{DOMAIN}."),
                                lambda s: s.aliases.update({f"smtp.{DOMAIN}": HOST})), "mx", MEND,
        "is an alias (CNAME)"),
    Row("second MX without an address", dns_is(DOMAIN, "MX", f"10 {HOST}.", "20 gone.example.org."),
        "mx", MEND, "gone.example.org has no address"),
    # SPF
    Row("no SPF", dns_is(*SPF_NAME), "spf", MEND, "there is no SPF record"),
    Row("two SPF records", dns_is(*SPF_NAME, "v=spf1 mx ~all", "v=spf1 a -all"), "spf", MEND,
        "has 2 SPF records", dns_is(*SPF_NAME, "v=spf1 mx ~all")),
    Row("SPF of another host", dns_is(*SPF_NAME, "v=spf1 ip4:5.45.200.7 -all"), "spf", MEND,
        "does not let this host send"),
    Row("SPF for everybody", dns_is(*SPF_NAME, "v=spf1 +all"), "spf", MEND, "lets anybody send"),
    Row("SPF with a mistake", dns_is(*SPF_NAME, "v=spf1 mx ip4:5.45 ~all"), "spf", MEND, "is void"),
    Row("SPF in quotes", dns_is(*SPF_NAME, '"v=spf1 mx ~all"'), "spf", MEND, "has quotes"),
    Row("SPF that leads to a dead name",
        and_also(dns_is(*SPF_NAME, "v=spf1 include:spf.example.net ~all"),
                 fails("spf.example.net", "TXT")),
        "spf", UNKNOWN, "nobody could look up", dns_is(*SPF_NAME, "v=spf1 mx ~all")),
    # DKIM
    Row("no DKIM record", dns_is(KEY_NAME, "TXT"), "dkim", MEND, "there is no DKIM record"),
    Row("DKIM with the domain doubled", moved(KEY_NAME, "TXT", f"{KEY_NAME}.{DOMAIN}"), "dkim",
        MEND, f"stands at r1._domainkey.{DOMAIN}.{DOMAIN}: the form adds the domain"),
    Row("DKIM of another key", dns_is(KEY_NAME, "TXT", OTHER_KEY[:-6] + "XX"), "dkim", MEND,
        "is of another key"),
    Row("DKIM cut short", lambda s: dns_is(KEY_NAME, "TXT", key().record[:255])(s), "dkim", MEND,
        "is cut short"),
    Row("DKIM revoked", dns_is(KEY_NAME, "TXT", "v=DKIM1; k=rsa; p="), "dkim", MEND, "revokes"),
    Row("DKIM in test", lambda s: dns_is(KEY_NAME, "TXT", key().record + "; t=y")(s), "dkim",
        ADVICE, "t=y"),
    Row("two DKIM records", lambda s: dns_is(KEY_NAME, "TXT", key().record, OTHER_KEY)(s), "dkim",
        MEND, "there are 2 DKIM records"),
    Row("no DKIM key", lambda s: s.key_file.unlink(), "dkim",
        ADVICE, "has no DKIM key",
        lambda s: s.write(f"domains/{DOMAIN}/dkim:r1.pem", key().key.to_pem())),
    # DMARC
    Row("no DMARC", dns_is(*DMARC_NAME), "dmarc", MEND, "there is no DMARC record"),
    Row("DMARC with the domain doubled", moved(*DMARC_NAME, f"_dmarc.{DOMAIN}.{DOMAIN}"), "dmarc",
        MEND, f"stands at _dmarc.{DOMAIN}.{DOMAIN}"),
    Row("two DMARC records", dns_is(*DMARC_NAME, "v=DMARC1; p=none", "v=DMARC1; p=reject"), "dmarc",
        MEND, "there are 2 DMARC records"),
    Row("DMARC without a policy", dns_is(*DMARC_NAME, "v=DMARC1; p=block"), "dmarc", MEND,
        "has no valid policy"),
    # MTA-STS and TLSRPT
    Row("MTA-STS without a policy", sts(None), "mta-sts", MEND, "cannot be had from https://",
        sts(POLICY)),
    Row("MTA-STS with a bad policy", sts("version: STSv1\nmode: strict\n"), "mta-sts", MEND,
        "expected mode", sts(POLICY)),
    Row("MTA-STS without the MX", sts(POLICY.replace(HOST, "old.example.com")), "mta-sts", MEND,
        "does not name the mail exchanger", sts(POLICY)),
    Row("MTA-STS in test without the MX",
        sts(POLICY.replace(HOST, "old.example.com").replace("enforce", "testing")), "mta-sts",
        ADVICE, "does not name the mail exchanger", sts(POLICY)),
    Row("MTA-STS for a name without a certificate",
        and_also(sts(POLICY.replace(HOST, "*.example.com")),
                 dns_is(DOMAIN, "MX", f"10 mx.{DOMAIN}."), dns_is(f"mx.{DOMAIN}", "A", IP)),
        "mta-sts", MEND, "no certificate is for mx.example.com",
        dns_is(DOMAIN, "MX", f"10 {HOST}.")),
    Row("MTA-STS with an old id", sts(chasquid.sts_policy_text([HOST])), "mta-sts", ADVICE,
        "is that of an older policy"),
    Row("MTA-STS without an id", sts(POLICY, "v=STSv1; id=2026-11-27"), "mta-sts", MEND,
        "with a valid id", sts(POLICY)),
    Row("TLSRPT without an address", dns_is(f"_smtp._tls.{DOMAIN}", "TXT", "v=TLSRPTv1; rua="),
        "tlsrpt", ADVICE, "no reports on TLS are sent"),
]  # fmt: skip


def told(findings: Sequence[Finding]) -> list[str]:
    return [f"{one.level} {one.check} {one.domain}: {one.text} -> {one.fix}" for one in findings]


def test_nothing_is_found_where_all_is_well(setup: Setup) -> None:
    findings = setup.diagnose()
    assert told([finding for finding in findings if finding.level is not Level.OK]) == []
    assert [finding.check for finding in findings] == [
        check.name for check in (*chasquid.HOST_CHECKS, *chasquid.DOMAIN_CHECKS)
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_broken_set_up_has_one_finding_and_its_advice_helps(setup: Setup, row: Row) -> None:
    row.change(setup)
    found = setup.ill()
    assert [(one.check, one.level) for one in found] == [(row.check, row.level)], told(found)
    [finding] = found
    assert row.text in finding.text
    if row.level is not UNKNOWN:
        assert finding.fix
    (row.mended or (lambda setup: setup.follow(finding.fix)))(setup)
    assert told(setup.ill()) == []


GOOD = {
    "another preference": dns_is(DOMAIN, "MX", f"77 {HOST}."),
    "a second MX of somebody else": and_also(
        dns_is(DOMAIN, "MX", f"10 {HOST}.", "20 mx.example.org."),
        dns_is("mx.example.org", "A", OTHER_IP),
    ),
    "an MX of another name for this host": and_also(
        dns_is(DOMAIN, "MX", f"10 mx.{DOMAIN}."), dns_is(f"mx.{DOMAIN}", "A", IP)
    ),
    "no MX, but an address": and_also(
        dns_is(DOMAIN, "MX"), dns_is(DOMAIN, "A", IP), dns_is(*SPF_NAME, "v=spf1 a -all")
    ),
    "SPF by address": dns_is(*SPF_NAME, f"v=spf1 ip4:{IP} -all"),
    "SPF by include": and_also(
        dns_is(*SPF_NAME, "v=spf1 include:_spf.example.net -all"),
        dns_is("_spf.example.net", "TXT", "v=spf1 ip4:5.45.100.0/24 -all"),
    ),
    "SPF in capitals": dns_is(*SPF_NAME, "V=SPF1 MX ~ALL"),
    "DMARC with any policy": dns_is(*DMARC_NAME, "v=DMARC1;p=none;rua=mailto:ana@example.com"),
    "DMARC with reports only": dns_is(*DMARC_NAME, "v=DMARC1; rua=mailto:ana@example.com"),
    "DKIM in other words": lambda s: dns_is(
        KEY_NAME, "TXT", key().record.replace("v=DKIM1; k=rsa; ", "").replace("p=", "p= ")
    )(s),
    "MTA-STS": sts(POLICY),
    "MTA-STS by a wildcard": sts(POLICY.replace(HOST, "*.example.com")),
    "TLSRPT": dns_is(f"_smtp._tls.{DOMAIN}", "TXT", "v=TLSRPTv1; rua=mailto:ana@example.com"),
    "TLSA": lambda s: tlsa(own_tlsa())(s),
    "a smarthost": smarthost,
    "a small host in front": and_also(
        smarthost,
        settings(trusted_relay=OTHER_IP),
        dns_is(DOMAIN, "MX", "10 front.example.net."),
        dns_is("front.example.net", "A", OTHER_IP),
    ),
    "a small host in front, over a tunnel": and_also(
        smarthost,
        behind_nat,
        settings(trusted_relay=OTHER_IP),
        dns_is(HOST, "A", "10.8.0.2"),
        dns_is(DOMAIN, "MX", "10 front.example.net."),
        dns_is("front.example.net", "A", OTHER_IP),
    ),
    "NAT, with a forwarded port": and_also(
        behind_nat, lambda s: s.elsewhere.update({(IP, 25): f"220 {HOST} ESMTP"}),
        attribute("sessions", ["smtp 5.45.77.77"]),
    ),
    "a root zone without a date": dns_is(".", "SOA", "a. b. 1 2 3 4 5"),
    "Dovecot knows the users": and_also(
        settings(dovecot_auth=True),
        lambda s: s.write(f"domains/{DOMAIN}/aliases", "sales: nobody\n"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_whatever_serves_as_well_is_not_complained_of(setup: Setup, name: str) -> None:
    GOOD[name](setup)
    assert told(setup.ill()) == []


def test_what_domain_records_advises_is_well(setup: Setup) -> None:
    """All of it, the optional records too."""
    needs = chasquid.DnsNeeds(DOMAIN, HOST, (IP,), (key(),), sts_id="7")
    setup.policies[DOMAIN] = POLICY
    for purpose in ("MX", "address", "SPF", "DKIM", "DMARC", "MTA-STS", "TLSRPT", "SRV"):
        for record in chasquid.domain_records(needs):
            if record.purpose == purpose and record.kind == "CNAME":
                setup.aliases[record.name] = record.value
            elif record.purpose == purpose:
                setup.dns[record.name, record.kind] = (record.value,)
    assert told(setup.ill()) == []


def test_where_certificates_are_fetched_the_log_says_why_none_has_come(setup: Setup) -> None:
    setup.settings["acme"] = True
    expired_certificate(setup)
    without_certificate(setup)
    [finding] = setup.ill()
    assert "journalctl" in finding.fix


def test_a_check_that_breaks_is_unknown_and_the_others_go_on(setup: Setup) -> None:
    setup.dns["gmail.com", "MX"] = ("nonsense",)
    [finding] = setup.ill()
    assert (finding.check, finding.level) == ("outward", Level.UNKNOWN)
    assert finding.text.startswith("the check itself has failed: IndexError")


def test_what_others_may_not_read_is_unknown_to_them(setup: Setup) -> None:
    """But if the server itself cannot read it, it must be mended."""
    setup.diagnose()
    examined = chasquid.examine_files(chasquid.load_config(str(setup.config_dir)), ())
    examined = examined._replace(wrong=("users: it cannot be read: Permission denied",))
    for user, level in ((os.geteuid(), Level.MEND), (12345, Level.UNKNOWN)):
        setup.state = setup.state._replace(user=user)
        findings = chasquid.diagnose(chasquid.facts_of(examined, setup), [DOMAIN])
        assert findings[0].level is level


def test_the_lines_of_an_advice_stand_below_each_other(setup: Setup) -> None:
    nothing_outward(setup)
    lines = "\n".join(chasquid.report(setup.diagnose())).splitlines()
    at = next(number for number, line in enumerate(lines) if "no mail leaves" in line)
    assert lines[at + 2 : at + 5] == [
        '       smarthost: "HOST:587"',
        '       smarthost_user: "USER"',
        f'       smarthost_password_file: "{setup.config_dir}/smarthost-password"',
    ]


def test_what_others_have_written_cannot_act_on_a_terminal(setup: Setup) -> None:
    dns_is(*SPF_NAME, "v=spf1 ip4:5.45.200.7 \033[2J\r\n -all")(setup)
    setup.elsewhere["127.0.0.1", 25] = "220 \033]0;evil\a"
    lines = "\n".join(chasquid.report(setup.diagnose()))
    assert "evil" in lines and "[2J" in lines
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", lines)


def test_the_report_has_what_is_well_in_one_line(setup: Setup) -> None:
    dns_is(DOMAIN, "MX")(setup)
    lines = list(chasquid.report(setup.diagnose()))
    assert lines[0].startswith("this host: well are files, modes, certificates, server, ports")
    assert lines[1:] == [
        f"{DOMAIN}: well are spf, dkim, dmarc, mta-sts, tlsrpt, postmaster",
        "  must be mended  mx: example.com has no MX record, so its mail does not come here",
        f"    -> publish: @  MX     10 {HOST}",
    ]


def test_waiting_ends_when_nothing_must_be_mended(setup: Setup) -> None:
    dns_is(DOMAIN, "MX")(setup)
    told: list[list[Finding]] = []
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            dns_is(DOMAIN, "MX", f"10 {HOST}.")(setup)

    findings = chasquid.watch(setup.diagnose, told.append, sleep)
    assert chasquid.to_mend(findings) == []
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]
    assert [len(chasquid.to_mend(each)) for each in told] == [1, 0]  # only what has changed


# --- the command, and the server's daily check ---


@pytest.mark.usefixtures("impatient")
def test_the_command_says_what_to_mend(commands: CommandLine) -> None:
    commands.configure(dns_server="127.0.0.1:1", data_dir=str(commands.config_dir))
    ended = commands.run("doctor")
    assert ended.status == 1
    lines = ended.out.splitlines()
    assert lines[-1].endswith(" must be mended.")
    at = next(number for number, line in enumerate(lines) if "no name server answers" in line)
    assert lines[at + 1].startswith("    -> name one in chasquid.conf")
    assert ended.err == ""


@pytest.mark.usefixtures("impatient")
def test_findings_for_programs(commands: CommandLine) -> None:
    commands.configure(dns_server="127.0.0.1:1", data_dir=str(commands.config_dir))
    ended = commands.run("doctor", "--json", "here.example")
    assert ended.status == 1
    findings = json.loads(ended.out)
    assert {tuple(finding) for finding in findings} == {Finding._fields}
    assert ("server", "mend") in {(finding["check"], finding["level"]) for finding in findings}


def test_a_domain_that_is_not_served(commands: CommandLine) -> None:
    commands.configure(dns_server="127.0.0.1:1")
    error = commands.fails("doctor", "other.example")
    assert "other.example is no domain of this server" in error


FOUND = [
    Finding("mx", Level.MEND, "there is no <MX>", "publish: @  MX  10 mail", DOMAIN),
    Finding("imap", Level.ADVICE, "no IMAP", "apt install"),
    Finding("spf", Level.OK, domain=DOMAIN),
]


def test_the_server_has_itself_checked_each_day(serve: Serve) -> None:
    found = [FOUND]
    clock = RunningClock()
    server = serve(clock=clock, examine=lambda: found[0], monitoring_address="127.0.0.1:0")
    assert server.daemon._status().checked == 0

    def check(seconds: float) -> None:
        before = server.daemon._status().checked
        clock.advance(seconds)
        server.settle()
        wait_for(lambda: server.daemon._status().checked != before, "the daily check")
        server.settle()

    check(61)
    assert 'event=finding check=mx domain=example.com text="there is no <MX>"' in server.log
    assert server.log.count("event=finding") == 1
    status = server.daemon._status()
    assert "<b>mx example.com</b> there is no &lt;MX&gt;" in chasquid.page(status)
    metrics = chasquid.metrics(status, open_metrics=True)
    assert 'chasquid_check_failed{check="mx",domain="example.com"} 1' in metrics
    assert 'chasquid_check_failed{check="imap",domain=""} 0' in metrics
    found[0] = FOUND[1:]
    check(86401)
    assert server.log.count("event=finding") == 1
    assert 'check="mx"' not in chasquid.metrics(server.daemon._status(), open_metrics=True)


def test_a_daily_check_that_breaks_is_tried_again(tmp_path: Path) -> None:
    calls: list[float] = []

    def examine() -> list[Finding]:
        calls.append(0)
        raise OSError("oops")

    clock = RunningClock()
    server = Server(tmp_path, clock=clock, examine=examine)
    server.start()
    try:
        for count, seconds in ((1, 61), (2, 86401)):
            clock.advance(seconds)
            server.settle()
            wait_for(lambda count=count: len(calls) == count, "a daily check")
            server.settle()
    finally:
        server.stop()
    assert server.log.count('source="daily check" text="OSError: oops"') == 2


def test_what_the_running_server_says_of_sessions(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        wire.ask("QUIT")
    config = chasquid.load_config(str(server.config_dir))
    assert chasquid.RealWorld(config).ask_server("sessions") == ["smtp 127.0.0.1"]
