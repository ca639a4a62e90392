# SPDX-License-Identifier: Apache-2.0
"""`init` on a machine with systemd and Dovecot 2.3, from an archive to a mail that was read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import wait_for

from .machine import Machine
from .tools import program

TOP = Path(__file__).resolve().parent.parent.parent
ARCHIVE = "/root/chasquid.pyz"
INIT = f"python3 {ARCHIVE} init ana@example.com"
PORTS = (25, 465, 587, 993)
TREES = "/etc /usr/local /var/lib/chasquid"


class Fresh(Machine):
    """A machine on which chasquid was never installed."""

    def prepare(self, archive: Path) -> None:
        self.root("cat > /etc/hosts", True, "127.0.0.1 localhost box mail.example.com\n")
        self.root("rm -f /etc/resolv.conf; echo nameserver 127.0.0.1 > /etc/resolv.conf", True)
        self.root("userdel chasquid; rm -rf /var/lib/chasquid /etc/chasquid", False)
        self.root("systemctl enable dovecot", True)  # as Debian's package does
        self.copy(archive.parent, "/root")

    def init(self, *options: str) -> str:
        """Return what the command prints; it must succeed."""
        return self.root(" ".join([INIT, *options]), True).text

    def files(self) -> str:
        """Return every file of the system, with owner, mode and size."""
        shown = "-type d -printf '%p %u %g %m\\n' -o -printf '%p %u %g %m %s %l\\n'"
        listing = f"find {TREES} -not -name '*-' '(' {shown} ')' 2>/dev/null | sort"
        return self.root(f"{listing}; getent passwd chasquid").text

    def listening(self) -> set[int]:
        found = re.findall(r":(\d+) ", self.root("ss -Hltn", True).text)
        return {int(port) for port in found} & set(PORTS)

    def send(self, password: str, subject: str) -> None:
        self.root(
            "swaks --server mail.example.com --port 465 --tls-on-connect --auth PLAIN"
            f" --auth-user ana@example.com --auth-password '{password}' --from ana@example.com"
            f" --to ana@example.com --header 'Subject: {subject}'",
            True,
        )

    def read(self, password: str, number: int = 1) -> str:
        """Return a message of ana's inbox, over IMAP; "" without one."""
        address = f"imaps://mail.example.com/INBOX;MAILINDEX={number}"
        done = self.root(f"curl -sSk --user 'ana@example.com:{password}' '{address}'")
        return done.text if done.status == 0 else ""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "chasquid.pyz"
    build = [sys.executable, str(TOP / "build_zipapp.py"), "--output", str(path)]
    subprocess.run(build, check=True, capture_output=True)
    return path


@pytest.fixture
def fresh(start, archive: Path) -> Fresh:
    for name in ("dovecot", "swaks", "curl", "ss"):
        program(name)
    machine = start(Fresh, "box", "192.0.2.25/32")
    machine.prepare(archive)
    return machine


def password_in(text: str) -> str:
    [password] = re.findall(r"^The password of ana@example\.com is  (\S+)$", text, re.MULTILINE)
    return str(password)


def states(text: str) -> set[str]:
    return set(re.findall(r"^(made|kept|would make)  ", text, re.MULTILINE))


def test_from_an_archive_to_a_mail_that_was_read(fresh: Fresh) -> None:
    before = fresh.files()
    assert states(fresh.init("--dry-run")) == {"would make"}
    assert fresh.files() == before
    text = fresh.init()
    assert states(text) == {"made"}
    assert fresh.listening() == set(PORTS), text
    assert "IMAP: ana@example.com can log in" in text
    password = password_in(text)
    fresh.send(password, "first")
    assert "Subject: first" in wait_for(lambda: fresh.read(password), "the message")
    assert not fresh.read("wrong")

    # again: all is there, and nothing is changed
    before = fresh.files()
    again = fresh.init()
    assert states(again) == {"kept"} and "password of" not in again
    assert fresh.files() == before

    # another password, by the server's own user, is that of both
    shown = fresh.root("chasquid version; readlink -f /usr/local/bin/chasquid", True).text
    assert re.search(r"/usr/local/lib/chasquid/chasquid-[\d.]+-[0-9a-f]{8}\.pyz", shown)
    fresh.root("sudo -u chasquid chasquid user-add ana@example.com --password 'quite new'", True)
    assert fresh.read("quite new") and not fresh.read(password)
    fresh.send("quite new", "second")
    assert "Subject: second" in wait_for(lambda: fresh.read("quite new", 2), "the second")

    # the configuration has no mistake, and cron's mail would go to ana
    checked = fresh.root("chasquid check", True).text
    assert "it serves example.com, mail.example.com" in checked
    resolved = fresh.root("chasquid aliases-resolve root@mail.example.com", True).text
    assert resolved == "ana@example.com\n"

    # another user can log in to both at once; one that is removed to none
    other = fresh.root(f"python3 {ARCHIVE} init ben@example.com", True).text
    assert "IMAP: ben@example.com can log in" in other, other
    fresh.root("sudo -u chasquid chasquid user-remove ana@example.com", True)
    # Dovecot looks at its file once in a second
    wait_for(lambda: not fresh.read("quite new"), "the end of ana's password")

    # one who never logs in has a mailbox for Dovecot too
    fresh.root("sudo -u chasquid chasquid user-add info@example.com --receive-only", True)
    place = "maildir:/var/lib/chasquid/mail/example.com/info"
    look = "doveadm user info@example.com"
    wait_for(lambda: place in fresh.root(look).text, "the mailbox of info")

    # a new certificate is noticed by Dovecot
    serial = "openssl s_client -connect 127.0.0.1:993 </dev/null 2>/dev/null | openssl x509 -serial"
    old = fresh.root(serial, True).text
    place = "/etc/chasquid/certs/mail.example.com"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=new"
    names = "-addext subjectAltName=DNS:mail.example.com"
    fresh.root(f"cd {place} && {request} {names} -keyout privkey.pem -out new 2>/dev/null", True)
    fresh.root(f"cd {place} && mv new fullchain.pem", True)
    wait_for(lambda: fresh.root(serial, True).text != old, "the new certificate")

    # an authority that cannot be reached yet: all is ready for it, and mail works
    text = fresh.init("--acme-agree", "--acme", "https://127.0.0.1:1/directory")
    assert "authority for certificates cannot be asked for its terms" in text
    assert "IMAP: ana@example.com can log in" in text
    assert {"80", "443"} <= set(re.findall(r":(\d+) ", fresh.root("ss -Hltn", True).text))
    fresh.send(password_in(text), "third")
    show = "openssl s_client -connect 127.0.0.1:993 </dev/null 2>/dev/null | openssl x509"
    kept = "cat /var/lib/chasquid/acme/certs/mail.example.com/fullchain.pem"
    assert fresh.root(show, True).text == fresh.root(kept, True).text
    acme = ("--acme-agree", "--acme", "https://127.0.0.1:1/directory")
    assert states(fresh.init(*acme)) == {"kept"}


WIPE = """\
systemctl disable --now chasquid.service chasquid-smtp.socket chasquid-submission.socket \\
    chasquid-submission_tls.socket chasquid-dovecot.path
rm -rf /etc/chasquid /var/lib/chasquid /usr/local/lib/chasquid /usr/local/bin/chasquid
rm /etc/systemd/system/chasquid* /etc/dovecot/dovecot.conf
mv /etc/dovecot/dovecot.conf.orig /etc/dovecot/dovecot.conf
systemctl daemon-reload
useradd --system --user-group other && userdel chasquid
"""


def test_a_backup_with_its_mail_on_another_host(fresh: Fresh) -> None:
    password = password_in(fresh.init())
    fresh.send(password, "kept")
    wait_for(lambda: fresh.read(password), "the message")
    fresh.root("chasquid backup /root/backup.tar --mail", True)
    fresh.root(WIPE, True)
    text = fresh.init("--from", "/root/backup.tar")
    assert "made  what /root/backup.tar holds" in text and "password of" not in text
    assert "Subject: kept" in wait_for(lambda: fresh.read(password), "the message again")
    fresh.send(password, "new")
    assert "Subject: new" in wait_for(lambda: fresh.read(password, 2), "the second message")
    fresh.root("sudo -u chasquid chasquid user-add ana@example.com --password 'quite new'", True)
    wait_for(lambda: fresh.read("quite new"), "the new password")
    assert states(fresh.init("--from", "/root/backup.tar")) == {"kept"}


def test_a_server_that_does_not_start_leaves_nothing_behind(fresh: Fresh) -> None:
    before = fresh.files()
    units = "systemctl list-unit-files --no-legend 'chasquid*' | wc -l"
    place = "/etc/systemd/system/chasquid.service.d"
    fail = "[Service]\nExecStartPre=/bin/false\n"
    fresh.root(f"mkdir {place} && cat > {place}/fail.conf", True, fail)
    done = fresh.root(INIT)
    assert done.status == 1
    assert "what was made before is taken back" in done.text, done.text
    fresh.root(f"rm -r {place}", True)
    assert fresh.files() == before
    assert fresh.root(units, True).text.strip() == "0"
    assert not fresh.listening() & {25, 465, 587}
    assert states(fresh.init()) == {"made"}


def test_a_port_that_is_taken_is_named(fresh: Fresh) -> None:
    before = fresh.files()
    listen = "import socket, time; s = socket.create_server(('', 25)); time.sleep(600)"
    fresh.root(f'systemd-run --unit taken python3 -c "{listen}"', True)
    wait_for(lambda: 25 in fresh.listening(), "the other server")
    done = fresh.root(INIT)
    assert (done.status, done.text.count("\n")) == (1, 1)
    assert "port 25 is taken by another program" in done.text
    assert fresh.files() == before
