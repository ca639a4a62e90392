# SPDX-License-Identifier: Apache-2.0
"""Every block of commands in README.md is typed, in its order, on a machine of its own.

The machine has systemd, sudo, Dovecot, fail2ban … as Debian has them, but no network: `STAND_INS`
are what takes the place of the world lookups. A block runs as it stands, or with the words that
`PLACEHOLDERS` names replaced, or it is in `NOT_RUN` with the reason and with what is checked
instead. A new block that does not work as it stands fails the test until it is in one of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from support import wait_for

from .machine import Done, Machine
from .tools import program

T = TypeVar("T")

TOP = Path(__file__).resolve().parent.parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")
INBOX = "/var/lib/chasquid/mail/example.com/ana/new"
PASSWORD = "a good password"

# What is typed where a program asks.
ANSWERS = {
    r"(?:password|once more|retype.*):": f"{PASSWORD}\n",
    r"Ctrl-C ends\.": "\x03",
}
CAPTURE = "python3 chasquid.pyz capture\n"  # another block has it in the background

STAND_INS = {
    # Everything but certbot is here already. As Debian has it, services start.
    "apt": r"""
        set -e
        [ "$1" = install ] && shift
        for package; do
            case $package in certbot) continue ;; esac
            dpkg-query -W -f '${Status}\n' "$package" | grep ' installed$'
            systemctl start "$package.service" 2>/dev/null || true
        done
    """,
    # An authority that everybody trusts, and that looks the name up before it signs.
    "certbot": r"""
        set -e
        [ "$1 $2 $3 $5" = "certonly --standalone -d --deploy-hook" ]
        [ "$(getent ahostsv4 "$4" | head -n 1 | cut -d ' ' -f 1)" = 192.0.2.25 ] ||
            { echo "the challenge for $4 has failed: it has no address" >&2; exit 1; }
        export RENEWED_LINEAGE=/etc/letsencrypt/live/$4
        mkdir -p "$RENEWED_LINEAGE" && cd "$RENEWED_LINEAGE"
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout privkey.pem \
            -subj "/CN=$4" -addext "subjectAltName=DNS:$4" -out request.pem 2>/dev/null
        openssl x509 -req -in request.pem -CA /root/ca.pem -CAkey /root/ca.key -days 90 \
            -copy_extensions copy -out fullchain.pem 2>/dev/null
        exec "$6"
    """,
    # A person, who knows what is to be written into a file.
    "editor": r"""
        case $1 in
            *-password) echo secret > "$1" ;;
            *) test -s "$1" ;;
        esac
    """,
    # A second host, whose /etc/chasquid is elsewhere.
    "ssh": r"""
        [ "$1" = elsewhere ] && shift && exec sh -c "$*"
        [ "$1 $2 $3" = "-l root mx2.example.com" ] && shift 3
        exec unshare -m sh -c 'mount --bind /srv/mx2 /etc/chasquid && exec "$@"' sh "$@"
    """,
}

CA = """\
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=Test CA" \
    -addext basicConstraints=critical,CA:TRUE -keyout /root/ca.key -out /root/ca.pem 2>/dev/null
cp /root/ca.pem /usr/local/share/ca-certificates/test.crt
update-ca-certificates >/dev/null
"""

# Everything below the root, so that a name that is not there does not exist.
NAME_SERVER = """\
server:
  ip-address: 127.0.0.1
  username: ""
  database: ""
  pidfile: ""
  server-count: 1
  zonesdir: /etc/nsd
remote-control:
  control-enable: no
zone:
  name: "."
  zonefile: test.zone
"""
ZONE = "$ORIGIN .\n$TTL 60\n. SOA ns. me. 1 3600 600 86400 60\n. NS ns.\nns. A 127.0.0.1\n"


class Block(NamedTuple):
    """A fenced block of README.md."""

    language: str
    text: str
    line: int


def blocks() -> Iterator[Block]:
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield Block(match[1], match[2], README.count("\n", 0, match.start()) + 1)


class Reader(Machine):
    """The machine of somebody who does what README.md says."""

    def prepare(self) -> None:
        self.root(CA, True)
        for name, text in STAND_INS.items():
            path = f"/usr/local/bin/{name}"
            self.root(f"cat > {path} && chmod 755 {path}", True, f"#!/bin/bash\n{text}")
        self.root("systemctl enable dovecot", True)  # as Debian's package does
        self.root("useradd -m -s /bin/bash -G sudo me", True)
        rules = "me ALL=(ALL) NOPASSWD: ALL\nDefaults env_keep += SYSTEMD_PAGER\n"
        self.root("cat > /etc/sudoers.d/me", True, rules)
        self.root("cat > /etc/hosts", True, "127.0.0.1 localhost mail\n::1 localhost\n")
        self.root("rm -f /etc/resolv.conf; echo nameserver 127.0.0.1 > /etc/resolv.conf", True)
        self.root("mkdir -p /etc/nsd && cat > /etc/nsd/test.conf", True, NAME_SERVER)
        self.zone = ZONE
        self.publish("")
        self.copy(TOP, "/home/me/chasquid", "./.git", "./.venv", "./chasquid.pyz")
        self.root("chown -R me: /home/me", True)

    def publish(self, records: str) -> None:
        """Put records into the DNS."""
        self.zone += records
        self.root("cat > /etc/nsd/test.zone", True, self.zone)
        self.root("systemctl stop names.service 2>/dev/null; systemctl reset-failed")
        self.root("systemd-run --unit names nsd -d -c /etc/nsd/test.conf", True)
        wait_for(lambda: self.root("getent hosts ns.").status == 0, "the name server")

    def sh(self, command: str) -> str:
        """Return what a command of root's prints; it must succeed."""
        return self.root(command, True).text

    def configure(self, text: str) -> None:
        self.root("cat >> /etc/chasquid/chasquid.conf", True, text)

    def send(self, recipient: str, subject: str) -> None:
        """Send something as ana."""
        self.sh(
            "swaks --server mail.example.com --port 587 --tls --auth PLAIN"
            f" --auth-user ana@example.com --auth-password '{PASSWORD}' --from ana@example.com"
            f" --to {recipient} --header 'Subject: {subject}'"
        )

    def inbox(self) -> list[str]:
        """Return the names of ana's new messages, the oldest first."""
        return self.sh(f"ls -rt {INBOX}").split()

    def waiting(self) -> list[str]:
        """Return the ids of what is in the queue."""
        return re.findall(r"^[0-9a-f]{16}\b", self.sh("chasquid queue list"), re.MULTILINE)


Look = Callable[[Reader], None]
Check = Callable[[Reader, Done], None]


# --- what is done before a block, and what must hold after it ---


def a_level_is_known(reader: Reader) -> None:
    path = "/var/lib/chasquid/domaininfo/s:example.net"
    text = 'name: "example.net"\nincoming_sec_level: TLS_CLIENT\n'
    reader.root(f"install -d -o chasquid -g chasquid $(dirname {path}); cat > {path}", True, text)
    reader.root(f"chown chasquid: {path}", True)


def a_message_waits(reader: Reader) -> None:
    reader.send("someone@example.net", "waits")
    wait_for(reader.waiting, "the message in the queue")


def a_second_host(reader: Reader) -> None:
    reader.sh("mkdir -p /srv/mx2/certs/mx2.example.com /srv/mx2/domains/old.example")


def postfix_was_here(reader: Reader) -> None:
    reader.sh("echo 'webmaster: ana, /var/mail/web' > /etc/aliases; mkdir -p /etc/postfix")
    reader.sh("echo 'hello@example.com ana' > /etc/postfix/virtual")
    reader.sh(
        "mkdir -p /home/ana/Maildir/{cur,new,tmp}; echo hi > /home/ana/Maildir/cur/1.M1.x:2,S"
    )


def certbot_keeps_what_it_fetched(reader: Reader) -> None:
    """Let live/NAME hold links into archive/NAME, with certbot's modes, and no copy be there."""
    reader.root(KEPT_BY_CERTBOT, True)


KEPT_BY_CERTBOT = """\
set -e
cd /etc/letsencrypt
mkdir -p archive/mail.example.com
for name in fullchain privkey; do
    mv live/mail.example.com/$name.pem archive/mail.example.com/${name}1.pem
    ln -s ../../archive/mail.example.com/${name}1.pem live/mail.example.com/$name.pem
done
chmod 700 live archive
chmod 755 live/mail.example.com archive/mail.example.com
chmod 644 archive/mail.example.com/fullchain1.pem
chmod 600 archive/mail.example.com/privkey1.pem
rm -r /etc/chasquid/certs/mail.example.com
"""


def there_is_another_version(reader: Reader) -> None:
    """Change the archive as far as its name in the library tells: a comment at its end."""
    script = (
        "import zipfile; archive = zipfile.ZipFile('/home/me/chasquid/chasquid.pyz', 'a');"
        " archive.comment = b'another'; archive.close()"
    )
    reader.sh(f'python3 -c "{script}"')


BEFORE: dict[str, Look] = {
    "sudo chasquid upgrade ": there_is_another_version,
    "sudo ln -s ": lambda reader: reader.root("rm /usr/sbin/sendmail", True) and None,
    "sudo chasquid import ": postfix_was_here,
    "sudo chgrp chasquid /etc/letsencrypt": certbot_keeps_what_it_fetched,
    "sudo -u chasquid chasquid domaininfo-remove ": a_level_is_known,
    "sudo -u chasquid chasquid queue list ": a_message_waits,
    "sudo rsync ": a_second_host,
}


def it_was_tried(reader: Reader, done: Done) -> None:
    assert "for trying things out in /home/me/.local/share/chasquid-try" in done.text


def it_is_installed(reader: Reader, done: Done) -> None:
    assert reader.sh("chasquid version").startswith("chasquid ")
    assert "IMAP: ana@example.com can log in" in done.text
    assert "mail  " in done.text and "v=spf1 mx ~all" in done.text
    listening = reader.sh("ss -ltn")
    assert not [port for port in (25, 465, 587, 993) if f":{port} " not in listening]
    assert "event=ready" in reader.sh("journalctl -u chasquid")


def the_password_is_another(reader: Reader, done: Done) -> None:
    assert "has a new password" in done.text
    record = reader.sh("sudo -u chasquid chasquid dkim-dns example.com")
    assert record.count("_domainkey.example.com.") == 2
    reader.publish(record)


def the_certificate_is_there(reader: Reader, done: Done) -> None:
    listing = reader.sh("stat -c '%U %G %a' /etc/chasquid/certs/mail.example.com/privkey.pem")
    assert listing == "root chasquid 640\n"
    for port in (465, 993):  # the servers look by themselves
        show = f"openssl s_client -connect 127.0.0.1:{port} -verify_return_error </dev/null"
        wait_for(lambda show=show: reader.root(show).status == 0, "the new certificate")


def both_arrive_in_the_inbox(reader: Reader, done: Done) -> None:
    assert "Verification: OK" in done.text
    wait_for(lambda: len(reader.inbox()) == 2, "both messages")
    assert reader.root(f"ls {INBOX}/../.Junk").status != 0
    assert "Return-Path: <>" in reader.sh(f"cat {INBOX}/{reader.inbox()[0]}")


def the_signature_is_good(reader: Reader, done: Done) -> None:
    assert re.search(r"\bpass\b", done.text), done.text
    assert "Return-Path: <>" in reader.sh(f"{FETCH}'INBOX;MAILINDEX=1'")


def it_runs_again(reader: Reader, done: Done) -> None:
    log = "journalctl -u chasquid"
    wait_for(lambda: reader.sh(log).count("event=starting ") == 2, "the second start")
    assert "the server runs as version " in done.text
    assert reader.sh("readlink /usr/local/bin/chasquid").startswith("/usr/local/lib/chasquid/")
    reader.send("ana@example.com", "after the upgrade")


def both_backups_are_whole(reader: Reader, done: Done) -> None:
    names = reader.sh("tar -tf /root/chasquid.tar")
    assert "config/domains/example.com/users" in names and "mail/" not in names
    assert reader.sh("stat -c %a /root/chasquid.tar") == "600\n"
    assert "mail/example.com/ana/new/" in reader.sh("tar -tzf /home/me/chasquid/chasquid.tar.gz")


def programs_send(reader: Reader, done: Done) -> None:
    before = len(reader.inbox())
    reader.type("me", "echo hello | mail -s 'from me' root\n", {})
    reader.sh("echo hello | mail -s 'from root' ana")
    wait_for(lambda: len(reader.inbox()) == before + 2, "the messages of programs")
    refused = reader.type("me", "echo hello | /usr/sbin/sendmail someone@example.net\n", {})
    assert refused.status == 77 and "Relaying denied: programs of me" in refused.text
    assert "dkim=" not in reader.sh(f"cat {INBOX}/{reader.inbox()[-1]}")


def it_was_taken_over(reader: Reader, done: Done) -> None:
    assert "1 message copied" in done.text and "mail cannot go into the file" in done.text
    for name in ("webmaster", "hello"):
        resolved = reader.sh(f"sudo -u chasquid chasquid aliases-resolve {name}@example.com")
        assert resolved == "ana@example.com\n"
    listing = reader.sh("stat -c '%U %a' /var/lib/chasquid/mail/example.com/ana/cur/1.M1.x:2,S")
    assert listing == "chasquid 600\n"


def it_is_forgotten(reader: Reader, done: Done) -> None:
    assert "what was seen of example.net is forgotten" in done.text


def it_is_a_hash(reader: Reader, done: Done) -> None:
    assert re.search(r"^[0-9a-f]{64}\b", done.text, re.MULTILINE)


def the_web_listener_answers(reader: Reader, done: Done) -> None:
    for scheme in ("http", "https"):
        place = f"{scheme}://mail.example.com/.well-known/mta-sts.txt"
        policy = reader.sh(f"curl -sS -H 'Host: mta-sts.example.com' {place}")
        assert "mode: enforce\nmx: mail.example.com\n" in policy
    assert "no certificate for mta-sts.example.com yet" in reader.sh("journalctl -u chasquid")


def the_link_is_followed(reader: Reader, done: Done) -> None:
    assert "can be used" in reader.sh("sudo -u chasquid chasquid check")
    reader.sh("systemctl restart chasquid")
    log = reader.sh("journalctl -u chasquid --since -1min")
    assert log.count("certificates: mail.example.com") and "cannot be read" not in log
    reader.sh("curl -sS https://mail.example.com/")


FETCH = f"curl -sS -k --user 'ana@example.com:{PASSWORD}' imaps://mail.example.com/"


def ana_can_log_in(reader: Reader, done: Done) -> None:
    assert "INBOX" in reader.sh(FETCH)


def it_uses_the_smarthost(reader: Reader, done: Done) -> None:
    log = wait_for(
        lambda: "through smtp.provider.example:587" in reader.sh("journalctl -u chasquid"),
        "the start",
    )
    assert log


def mail_passes_the_filter(reader: Reader, done: Done) -> None:
    before = len(reader.inbox())
    reader.send("ana@example.com", "filtered")
    wait_for(lambda: len(reader.inbox()) > before, "the message")


def the_jail_is_there(reader: Reader, done: Done) -> None:
    status = "fail2ban-client status chasquid"
    wait_for(lambda: "Journal matches:" in reader.root(status).text, "the jail")


def nothing_waits(reader: Reader, done: Done) -> None:
    assert reader.waiting() == []


def the_story_is_told(reader: Reader, done: Done) -> None:
    assert "Came in by submission" in done.text


def the_second_host_is_the_same(reader: Reader, done: Done) -> None:
    reader.sh("diff -r --exclude=certs /etc/chasquid /srv/mx2")
    assert reader.sh("ls /srv/mx2/certs").split() == ["mx2.example.com"]


def nothing_listens(reader: Reader, done: Done) -> None:
    listening = reader.sh("ss -ltn")
    assert not [port for port in (25, 465, 587) if f":{port} " in listening]
    reader.sh("test -f /etc/chasquid.before/chasquid.conf")


def it_was_captured(reader: Reader, done: Done) -> None:
    assert '"Subject": "Welcome"' in done.text


AFTER: dict[str, Check] = {
    "python3 build_zipapp.py && python3 chasquid.pyz try": it_was_tried,
    "sudo apt install dovecot-imapd  ": it_is_installed,
    "sudo apt install certbot": the_certificate_is_there,
    "sudo -u chasquid chasquid user-add ": the_password_is_another,
    "swaks ": both_arrive_in_the_inbox,
    "sudo cat ": the_signature_is_good,
    "sudo chasquid upgrade ": it_runs_again,
    "sudo chasquid backup /root/": both_backups_are_whole,
    "sudo ln -s ": programs_send,
    "sudo chasquid import ": it_was_taken_over,
    "sudo -u chasquid chasquid domaininfo-remove ": it_is_forgotten,
    "sudo chasquid init ana@example.com --acme-agree": the_web_listener_answers,
    "sudo chgrp chasquid /etc/letsencrypt": the_link_is_followed,
    "sudo openssl x509 ": it_is_a_hash,
    "sudo apt install dovecot-imapd\n": ana_can_log_in,
    "sudo install -o chasquid -m 600 /dev/null ": it_uses_the_smarthost,
    "sudo apt install rspamd": mail_passes_the_filter,
    "sudo apt install fail2ban ": the_jail_is_there,
    "sudo -u chasquid chasquid queue list ": nothing_waits,
    "sudo chasquid explain ": the_story_is_told,
    "sudo rsync ": the_second_host_is_the_same,
    "python3 chasquid.pyz capture ": it_was_captured,
    "sudo systemctl disable ": nothing_listens,
}


# --- words that a person replaces ---


def newest_file(reader: Reader) -> str:
    return reader.inbox()[-1]


def waiting_id(reader: Reader) -> str:
    return reader.waiting()[0]


def logged_id(reader: Reader) -> str:
    log = reader.sh("journalctl -u chasquid")
    return re.findall(r"event=queued id=([0-9a-f]{16}) from=<ana@example.com>", log)[-1]


PLACEHOLDERS: dict[str, tuple[str, Callable[[Reader], str]]] = {
    "sudo cat ": ("FILE", newest_file),
    "sudo -u chasquid chasquid queue list ": ("ID", waiting_id),
    "sudo chasquid explain ": ("ID", logged_id),
}


# --- blocks that are not typed ---


def ci_runs_the_tests(reader: Reader, block: Block) -> None:
    grep = "command=$(grep -m 1 '^python3 -m venv \\.venv &&' README.md)"
    assert grep in (TOP / ".ci" / "run").read_text()


def the_hook_resolves(reader: Reader, block: Block) -> None:
    reader.root("cat > /etc/chasquid/hooks/alias-resolve", True, block.text)
    reader.sh("chmod 755 /etc/chasquid/hooks/alias-resolve")
    resolved = reader.sh("sudo -u chasquid chasquid aliases-resolve team@example.com")
    assert "ana@example.com" in resolved


def the_records_are_shown(reader: Reader, block: Block) -> None:
    shown = reader.sh("chasquid dns show --address 192.0.2.25")
    assert "  mail  " in shown and " A      192.0.2.25" in shown


def the_page_is_there(reader: Reader, block: Block) -> None:
    address = re.findall(r"-L 1099:(\S+) ", block.text)[0]
    reader.configure(f'monitoring_address: "{address}"\n')
    reader.sh("systemctl restart chasquid")
    assert "chasquid" in reader.sh(f"curl -sS http://{address}/")


def it_replaces_nothing(reader: Reader, block: Block) -> None:
    reader.sh("cp /home/me/chasquid/chasquid.tar.gz .")
    done = reader.root(block.text)
    assert done.status == 1 and "is there already; nothing was restored" in done.text


def certificate_and_address_are_wrong(reader: Reader, block: Block) -> None:
    """Nobody trusts the certificate yet, and the machine's address is of a network there is not."""
    done = reader.root(block.text)
    found = re.findall(r"^ +must be mended +(\S+):", done.text, re.MULTILINE)
    assert (done.status, found) == (1, ["ports", "address"]), done.text


NOT_RUN: dict[str, tuple[str, Callable[[Reader, Block], None]]] = {
    "sudo chasquid backup --restore ": ("it is typed on another host", it_replaces_nothing),
    "python3 -m venv ": (
        "it needs a package index, and runs the tests; .ci/run does it",
        ci_runs_the_tests,
    ),
    "sudo chasquid doctor\n": (
        "not all can be well on such a machine",
        certificate_and_address_are_wrong,
    ),
    "sudo chasquid dns publish ": (
        "the name server takes no updates; test_publishing.py has two that do",
        the_records_are_shown,
    ),
    "#!/bin/sh": ("it is a hook, not commands", the_hook_resolves),
    "ssh ": ("it is typed on another computer, and lasts", the_page_is_there),
}

# Blocks that are no commands, and are put where the text around them says.
TEXTS: dict[str, Callable[[Reader, str], None]] = {
    "mail.example.com.        A ": lambda reader, text: reader.publish(text),
    "smarthost: ": lambda reader, text: reader.configure(text),
}


@pytest.fixture
def reader(start, request: pytest.FixtureRequest) -> Reader:
    for name in ("sudo", "nsd", "rsync", "dovecot", "fail2ban-client", "swaks", "ip"):
        program(name)
    if not list((TOP / ".cache").glob("*.whl")):  # the machine has no network
        output = request.getfixturevalue("tmp_path") / "chasquid.pyz"
        subprocess.run(
            [sys.executable, str(TOP / "build_zipapp.py"), "--output", str(output)], check=True
        )
    machine = start(Reader, "mail", "192.0.2.25/32", "2001:db8::25/128")
    machine.prepare()
    return machine


def test_every_block_of_commands_can_be_typed_in_order(reader: Reader) -> None:
    for block in blocks():
        if block.language == "sh":
            follow(reader, block)
        elif put := entry(TEXTS, block):
            put(reader, block.text)


def follow(reader: Reader, block: Block) -> None:
    if instead := entry(NOT_RUN, block):
        instead[1](reader, block)
        return
    if prepare := entry(BEFORE, block):
        prepare(reader)
    text = block.text
    if placeholder := entry(PLACEHOLDERS, block):
        word, value = placeholder
        text = re.sub(rf"\b{word}\b", value(reader), text)
    key = {r"and all is forgotten\.": "\x03"} if text == CAPTURE else {}
    done = reader.type("me", text, {**ANSWERS, **key})
    assert done.status == 0, f"README.md:{block.line}:\n{block.text}\n{done.text}"
    if check := entry(AFTER, block):
        check(reader, done)


def entry(table: Mapping[str, T], block: Block) -> T | None:
    """Return what a table has for a block: each key is how one begins."""
    return next((value for key, value in table.items() if block.text.startswith(key)), None)


@pytest.mark.parametrize("table", [BEFORE, AFTER, PLACEHOLDERS, NOT_RUN, TEXTS])
def test_each_entry_of_a_table_is_for_one_block(table: Mapping[str, object]) -> None:
    for key in table:
        assert len([block for block in blocks() if block.text.startswith(key)]) == 1, key
