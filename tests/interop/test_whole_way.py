# SPDX-License-Identifier: Apache-2.0
"""A host in an Internet of its own, from nothing to mail that passes everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from support import wait_for

from .internet import HOST, Authority, Internet, Names, World, WorldDkim, WorldDmarc
from .machine import Machine
from .tools import letter, program

TOP = Path(__file__).resolve().parent.parent.parent
PROGRAM = "python3 /root/kit/chasquid.pyz"
DORA = "dora@world.net"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the archive, which is all that comes to the host."""
    path = tmp_path_factory.mktemp("kit")
    build = [sys.executable, str(TOP / "build_zipapp.py"), "--output", str(path / "chasquid.pyz")]
    subprocess.run(build, check=True, capture_output=True)
    return path


class Outer:
    """The Internet, and what happens in it."""

    def __init__(self, start: Callable[..., Any]) -> None:
        self.net: Internet = start(Internet)
        self.names: Names = start(Names, self.net)
        dkim, dmarc = start(WorldDkim, self.net), start(WorldDmarc, self.net)
        self.world: World = start(World, self.net, dkim, dmarc)
        self.authority: Authority = start(Authority, self.net)

    def results(self, message: EmailMessage) -> set[str]:
        """Return what the world thinks of a message, such as "dkim=pass"."""
        fields = " ".join(message.get_all("Authentication-Results", []))
        return set(re.findall(r"\b(?:spf|dkim|dmarc)=\w+", fields))


class Host(Machine):
    """A host on which nothing was set up."""

    def prepare(self, outer: Outer, kit: Path) -> None:
        self.root("cat > /etc/hosts", True, "127.0.0.1 localhost box\n")
        self.root("userdel chasquid; rm -rf /var/lib/chasquid /etc/chasquid")
        outer.net.join(self)
        self.copy(kit, "/root/kit")
        self.root("cat > /root/kit/update.key", True, outer.names.key.read_text())

    def trust(self, *certificates: str) -> None:
        """Trust these authorities, as those of the world are trusted."""
        for number, certificate in enumerate(certificates):
            path = f"/usr/local/share/ca-certificates/world-{number}.crt"
            self.root(f"cat > {path}", True, certificate)
        self.root("update-ca-certificates", True)

    def read(self, password: str) -> str:
        """Return the first message of ana's inbox, over IMAP; "" without one."""
        address = "imaps://mail.example.com/INBOX;MAILINDEX=1"
        done = self.root(f"curl -sS --user 'ana@example.com:{password}' '{address}'")
        return done.text if done.status == 0 else ""

    def submit(self, password: str, subject: str, to: str) -> None:
        """Send a message as ana, over the port for submission."""
        self.root(
            f"swaks --server {HOST} --port 465 --tls-on-connect --auth PLAIN"
            f" --auth-user ana@example.com --auth-password '{password}' --from ana@example.com"
            f" --to {to} --header 'Subject: {subject}'",
            True,
        )


@pytest.fixture
def outer(start: Callable[..., Any]) -> Outer:
    return Outer(start)


@pytest.fixture
def host(start: Callable[..., Any], outer: Outer, kit: Path) -> Host:
    program("swaks")
    machine: Host = start(Host, "box")
    machine.prepare(outer, kit)
    return machine


BY_HAND = f"""
set -e
mkdir -p /etc/chasquid
echo 'hostname: "mail.example.com"' > /etc/chasquid/chasquid.conf
for port in smtp:25 submission:587 submission_over_tls:465; do
    echo "${{port%:*}}_address: \\":${{port#*:}}\\"" >> /etc/chasquid/chasquid.conf
done
mkdir -p /etc/chasquid/certs/box && cd /etc/chasquid/certs/box
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=mail.example.com \\
    -addext subjectAltName=DNS:mail.example.com -keyout privkey.pem -out fullchain.pem 2>/dev/null
{PROGRAM} user-add ana@example.com --password 'a secret'
for key in r:rsa2048 e:ed25519; do
    mkdir -p /var/lib/chasquid/dkim-unseen
    touch /var/lib/chasquid/dkim-unseen/${{key%:*}}._domainkey.example.com
    {PROGRAM} dkim-keygen example.com ${{key%:*}} --algo ${{key#*:}}
done
systemd-run --unit chasquid {PROGRAM} serve
"""


def test_a_domain_that_is_published_passes_in_the_world(outer: Outer, host: Host) -> None:
    host.root(BY_HAND, True)
    wait_for(lambda: "event=ready" in host.log(), "the server")
    host.submit("a secret", "unknown", DORA)
    [first] = outer.world.wait_for_letters(DORA)
    assert not outer.results(first) & {"dkim=pass", "dmarc=pass"}
    assert "DKIM-Signature" not in first

    publish = f"{PROGRAM} dns publish --dns-key /root/kit/update.key"
    lines = host.root(publish, True).text.splitlines()
    assert {line.split()[0] for line in lines} == {"made"}, lines
    wait_for(lambda: host.log().count("event=key-seen") == 2, "the records to be seen")
    host.submit("a secret", "known", DORA)
    second = outer.world.wait_for_letters(DORA, 2)[-1]
    assert outer.results(second) >= {"spf=pass", "dkim=pass", "dmarc=pass"}, str(second)

    outer.world.send(DORA, ["ana@example.com"], letter("from the world", DORA, "ana@example.com"))
    inbox = "/var/lib/chasquid/mail/example.com/ana/new"
    found = wait_for(lambda: host.root(f"cat {inbox}/* 2>/dev/null").text, "the message")
    assert "Subject: from the world" in found and "spf=pass" in found


def test_from_an_empty_host_to_mail_both_ways(outer: Outer, host: Host) -> None:
    """Three commands: everything on the host, everything in the DNS, all is well.

    With -s it prints what a person sees.
    """
    program("curl")
    host.trust(outer.authority.certificate.read_text(), outer.authority.root())
    host.root("systemctl enable dovecot", True)  # as Debian's package does
    init = f"{PROGRAM} init ana@example.com --acme-agree --acme {outer.authority.url}"
    said = host.root(init, True).text
    [password] = re.findall(r"The password of ana@example\.com is  (\S+)", said)

    before = host.root("chasquid doctor")
    print(said, before.text)
    assert before.status == 1 and "there is no SPF record at example.com" in before.text
    publish = host.root("chasquid dns publish --dns-key /root/kit/update.key", True).text
    print(publish)
    assert {line.split()[0] for line in publish.splitlines()} == {"made"}, publish
    after = host.root("timeout 110 chasquid doctor --wait")
    print(after.text)
    assert after.status == 0 and "Nothing must be mended." in after.text, after.text

    host.submit(password, "hello world", DORA)
    [sent] = outer.world.wait_for_letters(DORA)
    assert outer.results(sent) >= {"spf=pass", "dkim=pass", "dmarc=pass"}, str(sent)
    outer.world.send(DORA, ["ana@example.com"], letter("hello ana", DORA, "ana@example.com"))
    assert "Subject: hello ana" in wait_for(lambda: host.read(password), "the message")
    assert not host.read("wrong")
