# SPDX-License-Identifier: Apache-2.0
"""A configuration and data directory of the Go server, served as it is.

The files are in the forms that its manual describes and its commands write. Only what the
place of a test demands is overridden: which name server, and which port of others.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support import wait_for

from .clients import swaks
from .peers import Dovecot, Peer, Postfix, Rspamd
from .server import PROGRAM, Chasquid
from .tools import ANA, LOOPBACK, free_port, letter, make_certificate, program, run

BOB = "bob@here.example"
OLGA = "olga@old.example"
PAT = "pat@here.example"  # whom only Dovecot knows

SPF = '"v=spf1 ip4:127.0.0.1 -all"'

CONF = """\
# The name of this host.
hostname: "mail.here.example"

max_data_size_mb: 1

smtp_address: "127.0.0.1:{go.smtp_port}"
submission_address: "127.0.0.1:{go.submission_port}"
submission_over_tls_address: "127.0.0.1:{go.tls_port}"

# Only for this machine.
monitoring_address: "127.0.0.1:{go.monitoring_port}"

mail_delivery_agent_bin: "{go.agent}"
mail_delivery_agent_args: "-f"
mail_delivery_agent_args: "%from%"
mail_delivery_agent_args: "-d"
mail_delivery_agent_args: "%to_user%"

data_dir: "{go.data_dir}"

suffix_separators: "+-"
drop_characters: "._"

mail_log_path: "{go.directory}/mail.log"

dovecot_auth: {dovecot_auth}
dovecot_userdb_path: "{userdb}"
dovecot_client_path: "{client}"

haproxy_incoming: {haproxy_incoming}

max_queue_items: 300
give_up_send_after: "12h"
"""

ALIASES = """\
# What is here goes to somebody else.

postmaster: ana
team: ana, Bob@here.example
Sales.Office: bob
robot: | {pipe} robot
partner: dora@dest.example
*: ana
"""

# Called as the server calls maildrop; one file for each message.
AGENT = """\
#!/bin/sh
set -e
[ "$1" = -f ] && [ "$3" = -d ] && [ $# = 4 ]
file=$(mktemp {mail}/.new.XXXXXX)
{{ echo "From: $2" ; cat ; }} > "$file"
mkdir -p "{mail}/$4"
mv "$file" "{mail}/$4/${{file##*.}}"
"""

PIPE = """\
#!/bin/sh
mkdir -p "{mail}/$1"
cat > "{mail}/$1/.part" && mv "{mail}/$1/.part" "{mail}/$1/message"
"""

POST_DATA = """\
#!/bin/sh
message=$(cat)
if echo "$message" | grep -q '^Subject: refuse me' ; then
    echo "no such subjects here"
    exit 20
fi
if echo "$message" | grep -q '^Subject: not now' ; then
    echo "come back tomorrow"
    echo "for the operator alone" >&2
    exit 1
fi
echo "X-Hook-From: <$MAIL_FROM>"
echo "X-Hook-To: $RCPT_TO"
echo "X-Hook-Login: ${AUTH_AS:-nobody}"
echo "X-Hook-Facts: tls=$ON_TLS local=$FROM_LOCAL_DOMAIN spf=$SPF_PASS from=$REMOTE_ADDR"
echo "X-Hook-Hello: $EHLO_DOMAIN"
"""

ALIAS_RESOLVE = """\
#!/bin/sh
case $1 in
    choir@here.example) echo "ana, bob" ;;
    clock@here.example | team@here.example) echo "| {pipe} clock" ;;
    broken@here.example) exit 1 ;;
esac
"""


@functools.cache
def scrypt_entry(password: str, salt: bytes) -> dict[str, object]:
    encrypted = hashlib.scrypt(password.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=32)
    return {"logN": 14, "r": 8, "p": 1, "keyLen": 32, "salt": salt, "encrypted": encrypted}


def go_bytes(octets: bytes) -> str:
    """Write octets as Go's protobuf package does today: what is UTF-8 stays as it is."""
    written = ""
    for character in octets.decode("utf-8", "surrogateescape"):
        code = ord(character)
        if character in '"\\':
            written += "\\" + character
        elif character in "\n\r\t":
            written += {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
        elif code < 0x20 or code == 0x7F:
            written += f"\\x{code:02x}"
        elif 0xDC80 <= code <= 0xDCFF:
            written += f"\\x{code - 0xDC00:02x}"
        elif 0x80 <= code <= 0x9F:
            written += f"\\u{code:04x}"
        else:
            written += character
    return f'"{written}"'


def go_user(name: str, entry: dict[str, object]) -> str:
    """Return a user as today's chasquid-util writes one, with its irregular spaces."""
    lines = [f"users:  {{\n  key:  {go_bytes(name.encode())}\n  value:  {{\n    scrypt:  {{\n"]
    for key, value in entry.items():
        text = go_bytes(value) if isinstance(value, bytes) else value
        lines.append(f"      {key}:  {text}\n")
    return "".join(lines) + "    }\n  }\n}\n"


def old_go_user(name: str, entry: dict[str, object]) -> str:
    """Return a user as chasquid-util of years ago wrote one."""
    lines = [f'users: <\n  key: "{name}"\n  value: <\n    scrypt: <\n']
    for key, value in entry.items():
        if isinstance(value, bytes):
            value = '"' + "".join(f"\\{octet:03o}" for octet in value) + '"'
        lines.append(f"      {key}: {value}\n")
    return "".join(lines) + "    >\n  >\n>\n"


class DovecotForLogins(Dovecot):
    """Dovecot with the two sockets that chasquid's manual has it open."""

    def __init__(self, directory: Path, **keywords: object) -> None:
        super().__init__(directory, **keywords)  # type: ignore[arg-type]
        self.userdb_socket = directory / "auth-chasquid-userdb"
        self.client_socket = directory / "auth-chasquid-client"
        with (directory / "dovecot.conf").open("a") as file:
            file.write(
                "service auth {\n"
                f"  unix_listener {self.userdb_socket} {{\n    mode = 0660\n  }}\n"
                f"  unix_listener {self.client_socket} {{\n    mode = 0660\n  }}\n"
                "}\n"
            )


class GoDirectory(Chasquid):
    """The server on a directory that it has not written itself."""

    def __init__(
        self,
        directory: Path,
        *,
        overrides: str,
        dovecot: DovecotForLogins | None = None,
        haproxy_incoming: bool = False,
    ) -> None:
        Peer.__init__(self, directory)
        self.overrides = overrides
        self.smtp_port, self.submission_port, self.tls_port = free_port(), free_port(), free_port()
        self.monitoring_port = free_port()
        self.config_dir, self.data_dir = directory / "etc", directory / "lib"
        self.mail = directory / "mail"
        self.agent, self.pipe = directory / "maildrop", directory / "pipe"
        self.users = {ANA: "secret", BOB: "hidden", OLGA: "ölig", PAT: "patient"}
        for path in (self.config_dir / "hooks", self.data_dir / "queue", self.mail):
            path.mkdir(parents=True)
        self._write_programs()
        self._write_domains()
        self._write_certificates()
        self._write_data()
        (self.config_dir / "chasquid.conf").write_text(
            CONF.format(
                go=self,
                dovecot_auth=str(dovecot is not None).lower(),
                userdb=dovecot.userdb_socket if dovecot else "",
                client=dovecot.client_socket if dovecot else "",
                haproxy_incoming=str(haproxy_incoming).lower(),
            )
        )

    def _write_programs(self) -> None:
        hooks = self.config_dir / "hooks"
        for path, text in (
            (self.agent, AGENT.format(mail=self.mail)),
            (self.pipe, PIPE.format(mail=self.mail)),
            (hooks / "post-data", POST_DATA),
            (hooks / "alias-resolve", ALIAS_RESOLVE.format(pipe=self.pipe)),
        ):
            path.write_text(text)
            path.chmod(0o755)

    def _write_domains(self) -> None:
        here, old = (self.config_dir / "domains" / name for name in ("here.example", "old.example"))
        here.mkdir(parents=True)
        old.mkdir()
        salt = 'é"\\\n\x00\x7f\x85'.encode() + b"\xff\xfe7a\xc3"
        (here / "users").write_text(
            go_user("ana", scrypt_entry("secret", salt))
            + go_user("bob", scrypt_entry("hidden", bytes(range(16))))
        )
        (here / "aliases").write_text(ALIASES.format(pipe=self.pipe))
        (old / "users").write_text(old_go_user("olga", scrypt_entry("ölig", salt)))
        openssl = [program("openssl"), "genpkey", "-algorithm"]
        rsa = here / "dkim:2019.pem"
        run(*openssl, "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(rsa))
        run(*openssl, "ED25519", "-out", str(here / "dkim:young.pem"))
        for path in here.glob("dkim:*.pem"):
            assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----")  # PKCS#8

    def _write_certificates(self) -> None:
        """As certbot leaves them, with certs a link to its directory."""
        letsencrypt = self.directory / "letsencrypt"
        archive = letsencrypt / "archive" / "mail.here.example"
        made = make_certificate(archive, "mail.here.example", "localhost")
        live = letsencrypt / "live" / "mail.here.example"
        live.mkdir(parents=True)
        (letsencrypt / "live" / "README").write_text("One directory for each certificate.\n")
        for path in made:
            numbered = path.rename(path.with_stem(path.stem + "1"))
            link = os.path.relpath(numbered, live)
            (live / path.name).symlink_to(link)
        (self.config_dir / "certs").symlink_to(letsencrypt / "live")
        self.certificate = live / "fullchain.pem"

    def _write_data(self) -> None:
        levels = self.data_dir / "domaininfo"
        levels.mkdir()
        (levels / "s:dest.example").write_text(
            'name:  "dest.example"\nincoming_sec_level:  TLS_CLIENT\n'
            "outgoing_sec_level:  TLS_SECURE\n"
        )
        (levels / "s:%C3%B1and%C3%BA.example").write_text(
            'name: "ñandú.example"\nincoming_sec_level: TLS_CLIENT\n'
        )
        (levels / "s:plain.example").write_text('name:  "plain.example"\n')
        policies = self.data_dir / "sts-cache"
        policies.mkdir()
        (policies / "pol:dest.example").write_text(
            '{"Version":"STSv1","Mode":"testing","MXs":["mx.dest.example"],"MaxAge":86400000000000}'
        )

    @property
    def serve_command(self) -> list[str]:
        return [*self._prefix, "serve"]

    @property
    def _prefix(self) -> list[str]:
        options = ["--config-dir", str(self.config_dir), "--config-overrides", self.overrides]
        return [sys.executable, PROGRAM, *options]

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self._prefix, *words, check=check)

    def delivered(self, name: str) -> list[str]:
        """Return what the agent, or the pipe, was given for a user."""
        files = [path for path in (self.mail / name).glob("*") if not path.name.startswith(".")]
        return [path.read_text().replace("\r\n", "\n") for path in files]

    def wait_for_delivery(self, name: str) -> str:
        """Return the only message of a user."""
        wait_for(lambda: self.delivered(name), f"a message for {name}")
        [message] = self.delivered(name)
        return message

    def page(self, path: str) -> str:
        url = f"http://{LOOPBACK}:{self.monitoring_port}{path}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read().decode()


def overrides(names, outgoing_port=9) -> str:
    return f'dns_server: "{names.address}" outgoing_smtp_port: {outgoing_port}'


@pytest.fixture
def go(start, names):
    return start(GoDirectory, overrides=overrides(names))


def log_in(port, user, password, *options):
    return swaks(port, "--auth", "PLAIN", "--auth-user", user, "--auth-password", password,
                 "--quit-after", "AUTH", *options)  # fmt: skip


def send(go, subject, recipient, *options, sender="carl@client.example"):
    letter_ = ("--from", sender, "--to", recipient, "--header", f"Subject: {subject}")
    return swaks(go.smtp_port, *letter_, *options)


def field(message: str, name: str) -> str:
    return re.findall(rf"^{name}: (.*)$", message, re.MULTILINE)[0]


class TestUsers:
    def test_they_log_in_with_the_passwords_that_they_have(self, go):
        for user in (ANA, BOB, OLGA):
            for port, tls in ((go.submission_port, "--tls"), (go.tls_port, "--tls-on-connect")):
                session = log_in(port, user, go.users[user], tls)
                assert session.status == 0, session.text
                assert log_in(port, user, "secreT", tls).refusals[0].startswith("535")

    def test_the_users_command_accepts_the_files(self, go):
        go.command("check-userdb")
        assert go.command("authenticate", OLGA, "--password", "ölig").returncode == 0

    def test_a_new_user_does_not_harm_the_others(self, go):
        go.command("user-add", "neu@here.example", "--password", "fresh")
        for user, password in ((ANA, "secret"), (BOB, "hidden"), ("neu@here.example", "fresh")):
            assert go.command("authenticate", user, "--password", password).returncode == 0

    def test_those_of_dovecot_log_in_and_get_mail(self, start, names):
        dovecot = start(DovecotForLogins, users={PAT: "patient"})
        go = start(GoDirectory, overrides=overrides(names), dovecot=dovecot)
        (go.config_dir / "domains" / "here.example" / "aliases").write_text("team: pat, ana\n")
        go.restart()
        for user in (PAT, ANA):
            session = log_in(go.submission_port, user, go.users[user], "--tls")
            assert session.status == 0, session.text
        refused = log_in(go.submission_port, PAT, "secret", "--tls").refusals
        assert refused[0].startswith("535")
        assert send(go, "to a user of Dovecot", "p.a.t+x@here.example").status == 0
        assert "to a user of Dovecot" in go.wait_for_delivery("pat")
        assert send(go, "to nobody", "nobody@here.example").refusals[0].startswith("550")


class TestDelivery:
    def test_the_agent_gets_sender_user_and_message(self, go):
        assert send(go, "for the agent", BOB).status == 0
        message = go.wait_for_delivery("bob")
        assert message.startswith("From: carl@client.example\n")
        assert field(message, "Subject") == "for the agent"
        wait_for(lambda: not go.queue_ids(), "an empty queue")

    def test_suffixes_and_drop_characters_are_those_of_the_file(self, go):
        written = ["b.o_b", "bob+shop", "BOB-shop", "B.ob-a+b"]
        for name in written:
            assert send(go, name, f"{name}@here.example").status == 0
        wait_for(lambda: len(go.delivered("bob")) == len(written), "all of them")
        found = [field(message, "Subject") for message in go.delivered("bob")]
        assert sorted(found) == sorted(written)

    def test_an_alias_has_the_recipients_of_the_file_and_those_of_the_hook(self, go):
        assert send(go, "to all", "team@here.example").status == 0
        for user in ("ana", "bob", "clock"):
            assert field(go.wait_for_delivery(user), "Subject") == "to all"

    def test_the_name_of_an_alias_may_be_written_in_capitals_and_have_a_suffix(self, go):
        for name in ("Sales.Office", "sales.office", "SALES.office+x"):
            found = go.command("aliases-resolve", f"{name}@here.example").stdout
            assert found.split() == [BOB]

    def test_drop_characters_in_the_name_of_an_alias_do_not_count(self, go):
        for name in ("salesoffice", "sales_office+x"):
            found = go.command("aliases-resolve", f"{name}@here.example").stdout
            assert found.split() == [BOB]

    def test_a_pipe_gets_the_message(self, go):
        assert send(go, "for a program", "robot@here.example").status == 0
        assert field(go.wait_for_delivery("robot"), "Subject") == "for a program"

    def test_whom_nobody_knows_goes_to_the_asterisk(self, go):
        assert send(go, "to whom", "anybody@here.example").status == 0
        assert field(go.wait_for_delivery("ana"), "Subject") == "to whom"

    def test_a_domain_without_an_asterisk_refuses_whom_nobody_knows(self, go):
        assert send(go, "to whom", "anybody@old.example").refusals[0].startswith("550")

    def test_a_message_that_is_too_large_is_refused(self, go, place):
        body = place / "body"
        for octets, accepted in ((900_000, True), (1_100_000, False)):
            body.write_text(("x" * 69 + "\n") * (octets // 70))
            session = send(go, "large", BOB, "--body", f"@{body}")
            assert (session.status == 0) == accepted, session.text
        assert len(go.wait_for_delivery("bob")) > 900_000


class TestHooks:
    def test_post_data_adds_fields_and_is_told_what_the_manual_says(self, go, names):
        names.records["client.example"] = {"TXT": [SPF]}
        assert send(go, "seen", BOB, "--tls").status == 0
        message = go.wait_for_delivery("bob")
        assert field(message, "X-Hook-From") == "<carl@client.example>"
        assert field(message, "X-Hook-To") == BOB
        assert field(message, "X-Hook-Login") == "nobody"
        assert field(message, "X-Hook-Facts") == "tls=1 local=0 spf=1 from=127.0.0.1"
        assert field(message, "X-Hook-Hello") == "client.example"

    def test_post_data_is_told_who_has_logged_in(self, go):
        go.submit(ANA, [BOB], letter("mine", ANA, BOB))
        message = go.wait_for_delivery("bob")
        assert field(message, "X-Hook-Login") == ANA
        assert field(message, "X-Hook-Facts") == "tls=1 local=1 spf=0 from=127.0.0.1"

    def test_post_data_refuses_for_good(self, go):
        [refusal] = send(go, "refuse me", BOB).refusals
        assert refusal.startswith("5")
        assert "no such subjects here" in refusal
        assert not go.delivered("bob")

    def test_post_data_refuses_for_now_with_the_last_line_of_its_output(self, go):
        [refusal] = send(go, "not now", BOB).refusals
        assert refusal.startswith("4")
        assert "come back tomorrow" in refusal

    def test_alias_resolve_adds_aliases_and_pipes(self, go):
        assert send(go, "sing", "choir@here.example").status == 0
        assert send(go, "tick", "clock@here.example").status == 0
        for user, subject in (("ana", "sing"), ("bob", "sing"), ("clock", "tick")):
            assert field(go.wait_for_delivery(user), "Subject") == subject

    def test_alias_resolve_that_fails_is_for_now(self, go):
        [refusal] = send(go, "later", "broken@here.example").refusals
        assert refusal.startswith("4")


class TestSecurityLevels:
    @pytest.fixture
    def two(self, start, names):
        """The server, and a Postfix whose certificate nobody has signed."""
        postfix = start(Postfix, domain="dest.example")
        for domain in ("dest.example", "plain.example"):
            names.records[domain] = {"MX": ["10 mx.dest.example."]}
        names.records["mx.dest.example"] = {"A": [LOOPBACK]}
        return start(GoDirectory, overrides=overrides(names, postfix.port)), postfix

    def test_a_valid_certificate_that_was_seen_is_asked_for_again(self, two):
        go, postfix = two
        go.submit(ANA, ["dora@dest.example"], letter("to be safe", ANA, "dora@dest.example"))
        go.wait_for_log("event=next-attempt")
        assert "it was TLS_SECURE before" in go.log()
        assert not postfix.letters("dora@dest.example")
        go.command("domaininfo-remove", "dest.example")
        go.command("queue", "retry", "all")
        [arrived] = postfix.wait_for_letters("dora@dest.example")
        assert arrived["Subject"] == "to be safe"

    @pytest.mark.parametrize("domain", ["dest.example", "ñandú.example"])
    def test_who_has_sent_with_tls_must_do_so_again(self, go, names, domain):
        names.records[domain] = {"TXT": [SPF]}
        ascii = domain.encode("idna").decode()
        [refusal, *_] = send(go, "in plain", BOB, sender=f"dora@{ascii}").refusals
        assert refusal.startswith("550 5.7.3")
        session = send(go, "by TLS", BOB, "--tls", sender=f"dora@{ascii}")
        assert session.status == 0, session.text

    def test_who_never_has_need_not(self, go, names):
        names.records["plain.example"] = {"TXT": [SPF]}
        assert send(go, "in plain", BOB, sender="pia@plain.example").status == 0
        assert field(go.wait_for_delivery("bob"), "Subject") == "in plain"


def test_mail_is_signed_with_the_keys_of_both_kinds(start, names, go):
    publish_key(names, go, "2019", "rsa")
    publish_key(names, go, "young", "ed25519")
    go.submit(ANA, [BOB], letter("signed", ANA, BOB))
    message = go.wait_for_delivery("bob").partition("\n")[2]
    symbols = start(Rspamd, names).check(message.replace("\n", "\r\n").encode())
    assert sorted(symbols["R_DKIM_ALLOW"]) == ["here.example:s=2019", "here.example:s=young"]


def publish_key(names, go, selector, kind):
    """Put the record of a key where everybody finds it, as openssl makes it."""
    path = go.config_dir / "domains" / "here.example" / f"dkim:{selector}.pem"
    command = [program("openssl"), "pkey", "-pubout", "-outform", "DER", "-in", path]
    public = subprocess.run(command, check=True, capture_output=True).stdout
    if kind == "ed25519":
        public = public[12:]  # the key alone; RFC 8463, 4
    text = f"v=DKIM1; k={kind}; p={base64.b64encode(public).decode()}"
    pieces = " ".join(f'"{text[start : start + 200]}"' for start in range(0, len(text), 200))
    names.records[f"{selector}._domainkey.here.example"] = {"TXT": [pieces]}


def test_the_monitoring_page_tells_of_the_server(go):
    assert send(go, "counted", BOB).status == 0
    go.wait_for_delivery("bob")
    page = go.page("/")
    assert "mail.here.example" in page
    assert "max_queue_items: 300" in page
    assert re.search(r"^chasquid_messages_total\{state=\"queued\"\} 1$", go.page("/metrics"), re.M)


def test_every_key_of_the_file_is_in_force(go):
    text = go.command("print-config").stdout
    for line in (go.config_dir / "chasquid.conf").read_text().splitlines():
        if line.startswith("give_up_send_after"):
            assert 'give_up_send_after: "43200s"' in text.splitlines()
        elif line and not line.startswith("#"):
            assert line in text.splitlines()


def test_a_proxy_in_front_tells_who_the_client_is(start, names):
    go = start(GoDirectory, overrides=overrides(names), haproxy_incoming=True)
    for version, source in (("1", "192.0.2.1"), ("2", "192.0.2.2")):
        session = send(
            *(go, f"proxied {source}", BOB, "--proxy-version", version),
            *("--proxy-family", "TCP4" if version == "1" else "AF_INET"),
            *("--proxy-source", source, "--proxy-source-port", "4321"),
            *("--proxy-dest", "192.0.2.25", "--proxy-dest-port", "25"),
            *(() if version == "1" else ("--proxy-protocol", "STREAM", "--proxy-command", "PROXY")),
        )
        assert session.status == 0, session.text
    wait_for(lambda: len(go.delivered("bob")) == 2, "both messages")
    facts = sorted(field(message, "X-Hook-Facts") for message in go.delivered("bob"))
    assert facts == [f"tls=0 local=0 spf=0 from=192.0.2.{number}" for number in (1, 2)]
