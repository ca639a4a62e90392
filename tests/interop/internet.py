# SPDX-License-Identifier: Apache-2.0
"""The Internet, as far as a mail server sees it: a network, the DNS from its root on, a world.

It is a namespace with many addresses, to which a `Machine` is joined by a cable of its own.
Nothing of it can be seen from this system, and nothing of it reaches any other network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace

from support import wait_for

from .machine import Machine
from .peers import OpenDkim, Pebble, Peer, Postfix
from .tools import LOOPBACK, make_certificate, need_root, program, run, unavailable

# Addresses that a program takes for public ones; those for documentation are none.
GATEWAY, HOST = "11.0.0.1", "11.0.0.25"
NAMES, WORLD, AUTHORITY = "11.0.1.53", "11.0.1.25", "11.0.1.14"

_BEGIN = """
set -e
mount --make-rprivate /
mount --bind "$1" /etc/resolv.conf
shift
ip link set lo up
for address; do
    ip addr add "$address/32" dev lo
done
echo ready
exec sleep infinity
"""

_ACCEPTS = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"


class Internet(Peer):
    """The network; programs of it are started by way of `enter`."""

    def __init__(self, directory: Path) -> None:
        need_root()
        super().__init__(directory)
        self._resolv = directory / "resolv.conf"
        self._resolv.write_text(f"nameserver {NAMES}\n")

    @property
    def enter(self) -> list[str]:
        """What stands before a command that is to run inside."""
        return [program("nsenter"), "-t", str(self.pid), "-n", "-m"]

    def start(self) -> None:
        begin = ["sh", "-c", _BEGIN, "internet", self._resolv, NAMES, WORLD, AUTHORITY]
        self._run([program("unshare"), "--net", "--mount", *begin])
        process = self._process
        assert process is not None

        def ready() -> bool:
            if process.poll() is not None:
                unavailable(f"no network can be made here: {self.log()[-300:].strip()}")
            return "ready" in self.log()

        wait_for(ready, "the network")

    def run(self, *command: str) -> str:
        """Run a program inside, to its end, and return what it prints."""
        return run(*self.enter, *command).stdout

    def accepts(self, address: str, port: int) -> bool:
        probe = [*self.enter, sys.executable, "-c", _ACCEPTS, address, str(port)]
        return subprocess.run(probe, capture_output=True, timeout=60).returncode == 0

    def join(self, machine: Machine) -> None:
        """Lay a cable to a machine, which gets an address, a gateway and a name server."""
        cable = ["link", "add", "cable", "type", "veth", "peer", "name", "eth0"]
        self.run("ip", *cable, "netns", str(machine.pid))
        self.run("ip", "addr", "add", f"{GATEWAY}/24", "dev", "cable")
        self.run("ip", "link", "set", "cable", "up")
        machine.root(
            f"ip addr add {HOST}/24 dev eth0 && ip link set eth0 up"
            f" && ip route add default via {GATEWAY}"
            f" && rm -f /etc/resolv.conf && echo nameserver {NAMES} > /etc/resolv.conf",
            True,
        )


class Outside:
    """A peer that runs in the Internet; a class of peers follows it in the order of the bases."""

    internet: Internet
    place = LOOPBACK  # where it listens

    def _run(self, command: list[object], *ports: int, **options: object) -> None:
        super()._run([*self.internet.enter, *command], **options)  # type: ignore[misc]

        def ready() -> bool:
            process = self._process  # type: ignore[attr-defined]
            assert process.poll() is None, self.log()  # type: ignore[attr-defined]
            return all(self.internet.accepts(self.place, port) for port in ports)

        wait_for(ready, f"{type(self).__name__} to listen on {ports}")


class Names(Outside, Peer):
    """BIND as all name servers that there are; example.com takes changes with `key`."""

    place = NAMES

    def __init__(self, directory: Path, internet: Internet) -> None:
        super().__init__(directory)
        self.internet = internet
        self.key = directory / "update.key"
        self.key.write_text(run(program("tsig-keygen"), "update.example.com").stdout)
        conf = _NAMED_CONF.format(directory=directory, names=NAMES) + self.key.read_text()
        for zone, text in _ZONES.items():
            path = directory / f"{zone.strip('.') or 'root'}.zone"
            path.write_text(f"$ORIGIN {zone}\n{_ZONE_BEGIN}" + text)
            policy = "grant update.example.com zonesub ANY;" if zone == "example.com." else ""
            changes = f"update-policy {{ {policy} }};" if policy else ""
            conf += f'zone "{zone}" {{ type primary; file "{path}"; {changes} }};\n'
        (directory / "named.conf").write_text(conf)

    def start(self) -> None:
        conf = self.directory / "named.conf"
        self._run([program("named"), "-g", "-n", "1", "-c", conf], 53)


_NAMED_CONF = """\
options {{
  directory "{directory}";
  pid-file none;
  session-keyfile none;
  lock-file none;
  listen-on {{ {names}; 127.0.0.1; }};
  listen-on-v6 {{ none; }};
  recursion yes;
  allow-recursion {{ any; }};
  dnssec-validation no;
  empty-zones-enable no;
  notify no;
}};
controls {{ }};
"""

# What is not there is remembered for a second only, or a test would have to wait.
_ZONE_BEGIN = """\
$TTL 5
@ SOA ns.world.net. hostmaster.world.net. 1 3600 600 86400 1
@ NS ns.world.net.
"""

_ZONES = {
    ".": f"com NS ns.world.net.\nnet NS ns.world.net.\n11.in-addr.arpa NS ns.world.net.\n"
    f"ns.world.net A {NAMES}\n",
    "com.": "example NS ns.world.net.\n",
    "net.": f"world NS ns.world.net.\nns.world A {NAMES}\n",
    "example.com.": "",
    "world.net.": f"ns A {NAMES}\nmx A {WORLD}\nacme A {AUTHORITY}\n@ MX 10 mx\n"
    f'@ TXT "v=spf1 mx -all"\n_dmarc TXT "v=DMARC1; p=reject"\n',
    "11.in-addr.arpa.": "25.0.0 PTR mail.example.com.\n25.1.0 PTR mx.world.net.\n",
}


class WorldDkim(Outside, OpenDkim):
    """Verifies signatures of what the world gets."""

    authserv = "mx.world.net"

    def __init__(self, directory: Path, internet: Internet) -> None:
        self.internet = internet
        super().__init__(directory, SimpleNamespace(port=53))  # type: ignore[arg-type]


class WorldDmarc(Outside, Peer):
    """opendmarc, which checks SPF and DMARC of what the world gets."""

    def __init__(self, directory: Path, internet: Internet) -> None:
        super().__init__(directory)
        self.internet = internet
        self.port = 8893
        lines = {
            "Socket": f"inet:{self.port}@{LOOPBACK}",
            "AuthservID": "mx.world.net",
            "TrustedAuthservIDs": "mx.world.net",
            "SPFSelfValidate": "true",
            "SPFIgnoreResults": "true",
            "RejectFailures": "false",
            "Syslog": "false",
        }
        text = "".join(f"{key} {value}\n" for key, value in lines.items())
        (directory / "opendmarc.conf").write_text(text)

    def start(self) -> None:
        conf = self.directory / "opendmarc.conf"
        self._run([program("opendmarc"), "-f", "-c", conf], self.port)


class World(Outside, Postfix):
    """Postfix as everybody else: dora@world.net, who checks what comes with SPF, DKIM and DMARC."""

    hostname = "mx.world.net"
    place = WORLD

    def __init__(
        self, directory: Path, internet: Internet, dkim: WorldDkim, dmarc: WorldDmarc
    ) -> None:
        self.internet = internet
        settings = {
            **dkim.for_postfix,
            "smtpd_milters": f"inet:{LOOPBACK}:{dkim.port} inet:{LOOPBACK}:{dmarc.port}",
            "non_smtpd_milters": "",
            "inet_interfaces": WORLD,
            "mynetworks": WORLD,
            "default_transport": "smtp",
            "smtp_bind_address": WORLD,
            "smtp_host_lookup": "dns",
            "smtp_dns_support_level": "enabled",
        }
        super().__init__(directory, domain="world.net", settings=settings)
        master = self.config / "master.cf"
        master.write_text(master.read_text().replace(f"{LOOPBACK}:{self.port} ", f"{WORLD}:25 "))
        self.port = 25

    def send(self, sender: str, recipients: Iterable[str], message: EmailMessage) -> None:
        command = [*self.internet.enter, program("sendmail"), "-C", str(self.config), "-i"]
        text = message.as_bytes().decode().replace("\r\n", "\n")
        run(*command, "-f", sender, "--", *recipients, input=text)


class Authority(Outside, Pebble):
    """pebble at acme.world.net; it looks for answers where the DNS says, at the usual ports."""

    place = AUTHORITY

    def __init__(self, directory: Path, internet: Internet) -> None:
        self.internet = internet
        super().__init__(directory, SimpleNamespace(address=f"{NAMES}:53"), 80, 443)  # type: ignore[arg-type]
        self.certificate = make_certificate(directory / "world", "acme.world.net").fullchain
        self.url = "https://acme.world.net:14000/dir"
        settings = json.loads((directory / "pebble.json").read_text())
        settings["pebble"] |= {
            "listenAddress": f"{AUTHORITY}:14000",
            "managementListenAddress": f"{AUTHORITY}:15000",
            "certificate": str(self.certificate),
            "privateKey": str(self.certificate.parent / "privkey.pem"),
        }
        (directory / "pebble.json").write_text(json.dumps(settings))
        self.port, self._management = 14000, 15000

    def root(self) -> str:
        url = f"https://{AUTHORITY}:15000/roots/0"
        return self.internet.run(program("curl"), "-sSk", url)
