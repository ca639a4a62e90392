# SPDX-License-Identifier: Apache-2.0
"""What we sign is good for opendkim, rspamd and Mail::DKIM, and what they sign is for us."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import smtplib
import subprocess
from pathlib import Path

import dns.zone
import pytest

from .peers import NameServer, OpenDkim, Postfix, Rspamd
from .server import Chasquid, There
from .tools import ANA, DORA, LOOPBACK, program, run, unavailable, wait_for

HEAD = b"From: Somebody <%s>\r\nTo: %s\r\nSubject: %s\r\n"
BODY = b"Hello.\r\n\r\nThis is  all.\r\n"
LISTS = (
    b"List-Id: Birds <birds.here.example>\r\nList-Unsubscribe: <https://here.example/u>,\r\n"
    b" <mailto:leave@here.example>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"
    b"List-Post: NO\r\nPrecedence: bulk\r\n"
)
FOLDED = (
    b"References: <one@here.example>\r\n\t<two@here.example>\r\n  <three@here.example>\r\n"
    b"Cc:\r\n diego@dest.example\r\nIN-Reply-To:  \t<one@here.example> \r\nKeywords:\r\n"
)
MANY = b"Cc: " + b",\r\n ".join(b"Guest %d <g%d@dest.example>" % (n, n) for n in range(80))

# By subject: fields after the first three, and the body.
LETTERS = {
    "plain": (b"", BODY),
    "no body": (b"", b""),
    "only empty lines": (b"", b"\r\n\r\n\r\n"),
    "empty lines at the end": (b"", BODY + b"\r\n" * 5),
    "an empty line at the start": (b"", b"\r\n" + BODY),
    "spaces": (b"X-Spaces:  a   b\t c  \r\n", b" a  b\t\tc \t \r\n   \r\n.\r\n..b\r\n\t\r\n \r\n"),
    "eight bits": (b"", "Grüße, καλημέρα.\r\n".encode() + bytes(range(128, 256)) + b"\r\n"),
    "grüße": ("X-Place: Köln\r\n".encode(), "Grüße.\r\n".encode()),
    "long lines": (b"", (b"x" * 997 + b"\r\n" + b"y z " * 240 + b"\r\n") * 20),
    "300 kB": (b"", b"".join(b"line %6d of many\r\n" % n for n in range(14_000))),
    "folded": (FOLDED, BODY),
    "lists": (LISTS, BODY),
    "many recipients": (MANY + b"\r\n", BODY),
    "two of a kind": (b"X-A: 1\r\nX-A: 2\r\nComments: 1\r\nComments: 2\r\n", BODY),
    "mime": (b'MIME-Version: 1.0\r\nContent-Type: text/html;\r\n\tcharset="utf-8"\r\n', BODY),
}


def letter_in_octets(subject: str, sender: str = ANA, recipient: str = DORA) -> bytes:
    fields, body = LETTERS[subject]
    names = (sender.encode(), recipient.encode(), subject.encode())
    return HEAD % names + fields + b"\r\n" + body


def publish(names: NameServer, record: str) -> None:
    """Put what was printed for a zone file where everybody finds it."""
    zone = dns.zone.from_text("$TTL 60\n" + record, ".", relativize=False, check_origin=False)
    for name, kinds in zone.nodes.items():
        [rdataset] = kinds
        values = [rdata.to_text() for rdata in rdataset]
        names.records[name.to_unicode(omit_final_dot=True)] = {"TXT": values}


def make_keys(chasquid: Chasquid, names: NameServer, domain: str = "here.example") -> None:
    """Have a server sign with a key of each kind."""
    for algorithm in ("rsa2048", "ed25519"):
        words = ("dkim-keygen", domain, algorithm, "--algo", algorithm)
        record = chasquid.command(*words).stdout
        publish(names, record)
    chasquid.restart()


def submit(chasquid: Chasquid, sender: str, recipient: str, message: bytes) -> None:
    options = ["BODY=8BITMIME", *([] if message.isascii() else ["SMTPUTF8"])]
    with chasquid.submission(sender) as client:
        assert not client.sendmail(sender, [recipient], message, mail_options=options)


def octets_by_subject(directory: Path) -> dict[str, bytes]:
    """Return the messages of a Maildir as they came over the wire."""
    found = {}
    for path in directory.glob("new/*"):
        message = path.read_bytes().replace(b"\n", b"\r\n")
        found[field(message, b"Subject")] = message
    return found


def field(message: bytes, name: bytes) -> str:
    """Return the topmost field of a name, on one line."""
    header = re.sub(rb"\r\n(?=[ \t])", b"", message.partition(b"\r\n\r\n")[0])
    return re.findall(rb"^%s: (.*)\r?$" % name, header, re.MULTILINE)[0].decode().strip()


def opendkim_results(message: bytes) -> set[str]:
    """Return selector and result of each signature, as opendkim wrote them down."""
    results = field(message, b"Authentication-Results")
    assert results.startswith(OpenDkim.authserv)
    pairs = re.findall(r"dkim=(\w+)(?: \(.*?\))? [^;]*header\.s=(\w+)", results)
    return {f"{selector} {result}" for result, selector in pairs}


def mail_dkim(names: NameServer, message: bytes) -> list[str]:
    """Return algorithm and result of each signature, as Mail::DKIM says them."""
    return perl(_VERIFY, message, str(names.port)).decode().splitlines()


def perl(script: str, message: bytes, *arguments: str) -> bytes:
    """Return what a script that uses Mail::DKIM says of a message."""
    command = [program("perl"), "-e", script, *arguments]
    done = subprocess.run(command, input=message, capture_output=True, timeout=60)
    if b"Can't locate Mail/DKIM" in done.stderr:
        unavailable("Mail::DKIM is not installed")
    assert done.returncode == 0, done.stderr
    return done.stdout


_VERIFY = r"""
use strict; use warnings;
use Mail::DKIM::DNS; use Mail::DKIM::Verifier; use Net::DNS::Resolver;
my $resolver = Net::DNS::Resolver->new(nameservers => ["127.0.0.1"], port => $ARGV[0]);
Mail::DKIM::DNS::resolver($resolver);
my $verifier = Mail::DKIM::Verifier->new;
binmode STDIN; local $/;
$verifier->PRINT(scalar <STDIN>);
$verifier->CLOSE;
print $_->algorithm, " ", $_->result_detail, "\n" for $verifier->signatures;
"""


def our_results(message: bytes) -> list[str]:
    """Return the result of each signature, as we wrote them down."""
    results = field(message, b"Authentication-Results")
    assert results.startswith(f"{Chasquid.hostname};")
    return re.findall(r"dkim=(\w+)", results)


@pytest.fixture
def opendkim(start, names) -> OpenDkim:
    return start(OpenDkim, names)


@pytest.fixture
def postfix(start, names, opendkim) -> Postfix:
    """A Postfix for dest.example that has opendkim verify its mail."""
    names.records["dest.example"] = {"MX": ["0 mx.dest.example."]}
    names.records["mx.dest.example"] = {"A": ["127.0.0.1"]}
    return start(Postfix, settings=opendkim.for_postfix)


def wait_for_all(chasquid: Chasquid, postfix: Postfix) -> None:
    """Wait for LETTERS; opendkim is now and then too busy, and Postfix puts a letter off then."""
    new = postfix.maildir(DORA) / "new"

    def have_arrived() -> bool:
        if new.exists() and len(list(new.iterdir())) >= len(LETTERS):
            return True
        chasquid.command("queue", "retry", "all")
        return False

    wait_for(have_arrived, "all letters")


class TestWhatWeSign:
    def test_others_accept_both_signatures_of_any_letter(self, start, names, postfix):
        chasquid = start(Chasquid, names, outgoing_smtp_port=postfix.port)
        rspamd = start(Rspamd, names)
        make_keys(chasquid, names)
        for subject in LETTERS:
            submit(chasquid, ANA, DORA, letter_in_octets(subject))
        wait_for_all(chasquid, postfix)
        arrived = octets_by_subject(postfix.maildir(DORA))
        assert arrived.keys() == LETTERS.keys()
        for subject, message in arrived.items():
            assert opendkim_results(message) == {"rsa2048 pass", "ed25519 pass"}, subject
            assert "rsa-sha256 pass" in mail_dkim(names, message), subject
            of_rspamd = rspamd.check(message)
            both = {"here.example:s=rsa2048", "here.example:s=ed25519"}
            assert set(of_rspamd["R_DKIM_ALLOW"]) == both, subject

    def test_others_see_what_was_changed(self, start, names, postfix):
        chasquid = start(Chasquid, names, outgoing_smtp_port=postfix.port)
        rspamd = start(Rspamd, names)
        make_keys(chasquid, names)
        submit(chasquid, ANA, DORA, letter_in_octets("plain"))
        postfix.wait_for_letters(DORA)
        [message] = octets_by_subject(postfix.maildir(DORA)).values()
        for changed in (
            message.replace(b"This is", b"That is"),
            message.replace(b"Subject: plain", b"Subject: fancy"),
            message.replace(b"\r\nSubject:", b"\r\nReply-To: eve@client.example\r\nSubject:"),
            b"From: eve@client.example\r\n" + message,
        ):
            assert not any("pass" in line for line in mail_dkim(names, changed))
            assert "R_DKIM_ALLOW" not in rspamd.check(changed)

    def test_a_domain_in_another_script_signs_under_its_ascii_name(self, start, names, postfix):
        address = "δοκιμή@παράδειγμα.example"
        users = {address: "secret"}
        chasquid = start(Chasquid, names, users=users, outgoing_smtp_port=postfix.port)
        make_keys(chasquid, names, "παράδειγμα.example")
        submit(chasquid, address, DORA, letter_in_octets("plain", address))
        postfix.wait_for_letters(DORA)
        [message] = octets_by_subject(postfix.maildir(DORA)).values()
        assert opendkim_results(message) == {"rsa2048 pass", "ed25519 pass"}
        assert "header.d=xn--" in field(message, b"Authentication-Results")
        assert "rsa-sha256 pass" in mail_dkim(names, message)

    def test_a_notification_is_signed_by_the_domain_above_our_host(self, start, names, postfix):
        aliases = {"here.example": "broken: | false\n"}
        chasquid = start(Chasquid, names, aliases=aliases, outgoing_smtp_port=postfix.port)
        make_keys(chasquid, names)
        with chasquid.smtp() as client:
            message = letter_in_octets("plain", DORA, "broken@here.example")
            client.sendmail(DORA, ["broken@here.example"], message)
        postfix.wait_for_letters(DORA)
        [message] = octets_by_subject(postfix.maildir(DORA)).values()
        assert opendkim_results(message) == {"rsa2048 pass", "ed25519 pass"}
        assert "header.d=here.example" in field(message, b"Authentication-Results")

    def test_a_key_made_with_opendkim_genkey_signs_here(self, start, names, place, postfix):
        chasquid = start(Chasquid, names, outgoing_smtp_port=postfix.port)
        private = genkey(names, place, "here.example", "theirs")
        domain = chasquid.config_dir / "domains" / "here.example"
        shutil.copy(private, domain / "dkim:theirs.pem")
        chasquid.restart()
        submit(chasquid, ANA, DORA, letter_in_octets("plain"))
        postfix.wait_for_letters(DORA)
        [message] = octets_by_subject(postfix.maildir(DORA)).values()
        assert opendkim_results(message) == {"theirs pass"}

    def test_opendkim_testkey_finds_that_key_and_record_fit(self, chasquid, names, opendkim):
        for selector in ("one", "two"):
            made = chasquid.command("dkim-keygen", "here.example", selector).stdout
            publish(names, made)
        domain = chasquid.config_dir / "domains" / "here.example"
        command = [program("opendkim-testkey"), "-d", "here.example", "-x", str(opendkim.config)]
        run(*command, "-s", "one", "-k", str(domain / "dkim:one.pem"))
        wrong = run(*command, "-s", "two", "-k", str(domain / "dkim:one.pem"), check=False)
        assert "keys do not match" in wrong.stdout


def genkey(names: NameServer, directory: Path, domain: str, selector: str) -> Path:
    """Make a key as opendkim's manual says, publish it, and return its file."""
    run(
        *[program("opendkim-genkey"), "--append-domain", "--bits=2048"],
        *[f"--directory={directory}", f"--domain={domain}", f"--selector={selector}"],
    )
    publish(names, (directory / f"{selector}.txt").read_text())
    return directory / f"{selector}.private"


class TestWhatOthersSign:
    @pytest.mark.parametrize(
        ("algorithm", "forms"),
        [
            ("rsa-sha256", "relaxed/relaxed"),
            ("rsa-sha256", "simple/simple"),
            ("rsa-sha256", "relaxed/simple"),
            ("rsa-sha256", "simple/relaxed"),
            ("ed25519-sha256", "relaxed/relaxed"),
            ("ed25519-sha256", "relaxed/simple"),  # opendkim's simple/ is wrong, also for itself
        ],
    )
    def test_we_accept_what_opendkim_signs(self, start, names, place, chasquid, algorithm, forms):
        key = genkey(names, place, "dest.example", "mail")
        if algorithm == "ed25519-sha256":
            key = make_ed25519_key(names, place, "dest.example", "mail")
        settings = {
            "Mode": "s",
            "Domain": "dest.example",
            "Selector": "mail",
            "KeyFile": key,
            "Canonicalization": forms,
            "SignatureAlgorithm": algorithm,
            "OversignHeaders": "From,Subject",
            "InternalHosts": "127.0.0.1",
        }
        signer = start(OpenDkim, names, settings)
        postfix = start(Postfix, relay_port=chasquid.smtp_port, settings=signer.for_postfix)
        with smtplib.SMTP(LOOPBACK, postfix.port, "desk.example") as client:
            for subject in LETTERS:
                message = letter_in_octets(subject, DORA, ANA)
                options = ["BODY=8BITMIME", "SMTPUTF8"]
                client.sendmail(DORA, [ANA], message, mail_options=options)
        chasquid.wait_for_letters(ANA, len(LETTERS))
        arrived = octets_by_subject(chasquid.maildir(ANA))
        assert {subject: our_results(message) for subject, message in arrived.items()} == {
            subject: ["pass"] for subject in LETTERS
        }
        signature = field(arrived["plain"], b"DKIM-Signature")
        assert f"a={algorithm}; " in signature
        assert f"c={forms}; " in signature

    def test_we_accept_what_mail_dkim_signs(self, names, place, chasquid):
        key = place / "key.pem"
        run(program("openssl"), "genrsa", "-traditional", "-out", str(key), "2048")
        publish(names, dns_record("dest.example", "mail", "rsa", public_key(key)))
        wanted = set()
        with chasquid.smtp() as client:
            for subject, forms in itertools.product(
                LETTERS, ["relaxed/relaxed", "simple/simple", "relaxed/simple", "simple/relaxed"]
            ):
                message = letter_in_octets(subject, DORA, ANA)
                named = message.replace(b"\r\nSubject: ", f"\r\nSubject: {forms} ".encode())
                signed = sign_with_mail_dkim(named, key, forms) + named
                client.sendmail(DORA, [ANA], signed, mail_options=["BODY=8BITMIME", "SMTPUTF8"])
                wanted.add(f"{forms} {subject}")
        chasquid.wait_for_letters(ANA, len(wanted))
        arrived = octets_by_subject(chasquid.maildir(ANA))
        assert arrived.keys() == wanted
        assert [name for name in sorted(wanted) if our_results(arrived[name]) != ["pass"]] == []

    def test_we_see_what_was_changed(self, names, place, chasquid):
        key = place / "key.pem"
        run(program("openssl"), "genrsa", "-traditional", "-out", str(key), "2048")
        publish(names, dns_record("dest.example", "mail", "rsa", public_key(key)))
        message = letter_in_octets("plain", DORA, ANA)
        signed = sign_with_mail_dkim(message, key, "relaxed/relaxed") + message
        with chasquid.smtp() as client:
            for changed in (
                signed.replace(b"This is", b"That is"),
                signed.replace(b"Subject: plain", b"Subject: fancy"),
                signed.replace(b"Somebody", b"Everybody"),
                signed + b"P.S.\r\n",
            ):
                client.sendmail(DORA, [ANA], changed)
        arrived = chasquid.wait_for_letters(ANA, 4)
        for each in arrived:
            assert "dkim=fail" in each["Authentication-Results"]

    def test_a_signature_survives_being_sent_on(self, start, names, place, postfix):
        aliases = {"here.example": "far: dora@dest.example\n"}
        chasquid = start(Chasquid, names, aliases=aliases, outgoing_smtp_port=postfix.port)
        key = place / "key.pem"
        run(program("openssl"), "genrsa", "-traditional", "-out", str(key), "2048")
        publish(names, dns_record("dest.example", "mail", "rsa", public_key(key)))
        with chasquid.smtp() as client:
            for subject in LETTERS:
                message = letter_in_octets(subject, "diego@dest.example", "far@here.example")
                signed = sign_with_mail_dkim(message, key, "simple/simple") + message
                options = ["BODY=8BITMIME", "SMTPUTF8"]
                client.sendmail(
                    "diego@dest.example", ["far@here.example"], signed, mail_options=options
                )
        postfix.wait_for_letters(DORA, len(LETTERS))
        for subject, message in octets_by_subject(postfix.maildir(DORA)).items():
            assert opendkim_results(message) == {"mail pass"}, subject

    def test_another_chasquid_finds_both_signatures_good(self, start, names, chasquid):
        names.records["here.example"] = {"MX": ["0 mail.here.example."]}
        names.records["mail.here.example"] = {"A": ["127.0.0.1"]}
        names.records["_dmarc.there.example"] = {"TXT": ['"v=DMARC1; p=reject"']}
        there = start(
            There, names, users={"tom@there.example": "x"}, outgoing_smtp_port=chasquid.smtp_port
        )
        make_keys(there, names, "there.example")
        for subject in LETTERS:
            submit(there, "tom@there.example", ANA, letter_in_octets(subject, "tom@there.example"))
        chasquid.wait_for_letters(ANA, len(LETTERS))
        for subject, message in octets_by_subject(chasquid.maildir(ANA)).items():
            assert our_results(message) == ["pass", "pass"], subject
            assert "dmarc=pass" in field(message, b"Authentication-Results")


def make_ed25519_key(names: NameServer, directory: Path, domain: str, selector: str) -> Path:
    path = directory / f"{selector}.ed25519"
    run(program("openssl"), "genpkey", "-algorithm", "ed25519", "-out", str(path))
    public = base64.b64decode(public_key(path))[-32:]  # RFC 8463, 4: without the DER around it
    publish(names, dns_record(domain, selector, "ed25519", base64.b64encode(public).decode()))
    return path


def public_key(path: Path) -> str:
    """Return the public half of a key in PEM, as base64."""
    text = run(program("openssl"), "pkey", "-in", str(path), "-pubout").stdout
    return "".join(text.splitlines()[1:-1])


def dns_record(domain: str, selector: str, kind: str, public: str) -> str:
    first, rest = public[:200], public[200:]
    return f'{selector}._domainkey.{domain}. IN TXT "v=DKIM1; k={kind}; p={first}" "{rest}"\n'


def sign_with_mail_dkim(message: bytes, key: Path, forms: str) -> bytes:
    """Return the signature of dest.example, as a field."""
    return perl(_SIGN, message, str(key), forms)


_SIGN = r"""
use strict; use warnings;
use Mail::DKIM::Signer;
my $signer = Mail::DKIM::Signer->new(
    Algorithm => "rsa-sha256", Method => $ARGV[1], Domain => "dest.example",
    Selector => "mail", KeyFile => $ARGV[0]);
binmode STDIN; local $/;
$signer->PRINT(scalar <STDIN>);
$signer->CLOSE;
print $signer->signature->as_string, "\r\n";
"""
