# SPDX-License-Identifier: Apache-2.0
"""The sample filter for fail2ban finds who goes too far in the server's log, and nobody else."""

from __future__ import annotations

import base64
import re
import shutil
import socket
from pathlib import Path

import pytest

from .server import USERS, Behind
from .tools import LOOPBACK, program, run, unavailable

SAMPLE = Path(__file__).resolve().parents[2] / "sample-config" / "fail2ban" / "chasquid.conf"
COMMON = Path("/etc/fail2ban/filter.d/common.conf")
LIE = "x: 450 4.7.0 too many messages a minute from 192.0.2.1"


class Client:
    """A connection that pretends to come from `address`."""

    def __init__(self, chasquid, address, tls=False):
        port = chasquid.tls_port if tls else chasquid.smtp_port
        self._socket = socket.create_connection((LOOPBACK, port), 20)
        kind = "TCP6" if ":" in address else "TCP4"
        self._socket.sendall(f"PROXY {kind} {address} {address} 1 2\r\n".encode())
        if tls:
            context = chasquid.tls_context()
            self._socket = context.wrap_socket(self._socket, server_hostname="localhost")
        self._lines = self._socket.makefile("rb")
        self.greeting = self._reply()
        if self.greeting == "220":
            assert self.says("EHLO client.example") == "250"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lines.close()
        self._socket.close()

    def _reply(self):
        while (line := self._lines.readline().decode())[3:4] == "-":
            pass
        return line[:3]

    def says(self, line):
        """Return the code of the reply."""
        self._socket.sendall(line.encode() + b"\r\n")
        return self._reply()

    def logs_in(self, user, password):
        secret = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
        return self.says(f"AUTH PLAIN {secret}")


@pytest.fixture
def chasquid(start, names):
    names.records["liar.example"] = {"TXT": ['"v=spf1 exp=why.liar.example -all"']}
    names.records["why.liar.example"] = {"TXT": [f'"{LIE}"']}
    return start(
        Behind,
        names,
        users=USERS,
        max_failed_logins=2,
        max_messages_per_minute=4,
        max_recipients_per_minute=3,
        max_user_messages_per_minute=1,
        max_connections_per_address=2,
    )


def go_too_far(chasquid):
    """Have clients go over every limit; return their addresses."""
    with Client(chasquid, "192.0.2.1", tls=True) as client:
        assert client.logs_in("ana@here.example", "guessed") == "535"
    for user in ("ana", "bob"):  # who is not known counts for nothing
        with Client(chasquid, "2001:db8:0:1::1", tls=True) as client:
            assert client.logs_in(f"{user}@here.example", "guessed") == "535"
    with Client(chasquid, "2001:db8:0:1::2", tls=True) as client:
        assert client.logs_in("ana@here.example", "secret") == "454"
    with Client(chasquid, "192.0.2.2") as client:
        for _ in range(4):
            assert client.says("MAIL FROM:<carl@client.example>") == "250"
            assert client.says("RSET") == "250"
        assert client.says("MAIL FROM:<carl@client.example>") == "450"
    with Client(chasquid, "2001:db8:0:3::1") as client:
        assert client.says("MAIL FROM:<>") == "250"
        for number in range(3):
            assert client.says(f"RCPT TO:<ana+{number}@here.example>") == "250"
        assert client.says("RCPT TO:<ana@here.example>") == "450"
    with Client(chasquid, "192.0.2.4", tls=True) as client:
        assert client.logs_in("bob@here.example", "hidden") == "235"
        assert client.says("MAIL FROM:<bob@here.example>") == "250"
        assert client.says("RSET") == "250"
        assert client.says("MAIL FROM:<bob@here.example>") == "450"
    with Client(chasquid, "2001:db8:0:5::1"), Client(chasquid, "2001:db8:0:5::2"):
        assert Client(chasquid, "2001:db8:0:5::3").greeting == "421"
    return {
        *["192.0.2.1", "2001:db8:0:1::1", "2001:db8:0:1::2", "192.0.2.2", "2001:db8:0:3::1"],
        *["192.0.2.4", "2001:db8:0:5::3"],
    }


def behave(chasquid, number):
    """Have some clients do what is no reason to shut them out, however wrong it is."""
    with Client(chasquid, f"198.51.{number}.1") as client:
        assert client.says("MAIL FROM:<carl@client.example>") == "250"
        assert client.says("RCPT TO:<nobody@here.example>") == "550"
        assert client.says("RCPT TO:<ana@here.example>") == "250"
        assert client.says("DATA") == "354"
        assert client.says("Subject: x\r\n\r\n.") == "250"
    with Client(chasquid, f"198.51.{number}.2") as client:
        assert client.says("MAIL FROM:<eve@liar.example>") == "550"
        assert client.says("NONSENSE") == "500"
        assert client.says("AUTH PLAIN") == "421"
    with Client(chasquid, f"198.51.{number}.3") as client:
        assert client.says(f'MAIL FROM:<"{LIE}"@client.example>') == "250"
        assert client.says(f'RCPT TO:<"{LIE}"@here.example>') == "550"
        assert client.says("RCPT TO:<eve@far.example>") == "550"
    with Client(chasquid, f"2001:db8:{number}::1", tls=True) as client:
        assert client.logs_in("ana@here.example", "secret") == "235"
    with Client(chasquid, f"2001:db8:{number}::2") as client:
        assert client.says("GET / HTTP/1.1") == "502"


AS_FILE = r"\g<0>"
AS_SYSLOG = r"Nov 22 \2 mail chasquid[4711]: \4"
AS_NEW_SYSLOG = r"\1T\2.\g<3>456+00:00 mail chasquid[4711]: \4"


def in_form(log, form):
    """Return the lines of a log as another program would write them."""
    return re.sub(r"^(\S{10}) (\S{8})\.(\d{3}) (.*)$", form, log, flags=re.MULTILINE)


def found(place, log):
    """Return the addresses that the filter finds, as often as it does."""
    if not COMMON.exists():
        unavailable("fail2ban is not installed")
    filters = place / "filter.d"  # where a filter has common.conf beside it
    filters.mkdir(exist_ok=True)
    for path in (SAMPLE, COMMON):
        shutil.copy(path, filters)
    (place / "log").write_text(log)
    command = [program("fail2ban-regex"), "--raw", "-o", "ip"]
    return run(*command, str(place / "log"), str(filters / SAMPLE.name)).stdout.split()


def test_who_goes_too_far_is_found_and_nobody_else(chasquid, place):
    behave(chasquid, 1)
    expected = go_too_far(chasquid)
    behave(chasquid, 2)
    chasquid.wait_for_log("more than 2 connections")
    for form in (AS_FILE, AS_SYSLOG, AS_NEW_SYSLOG):
        log = in_form(chasquid.log(), form)
        addresses = found(place, log)
        assert set(addresses) == expected, log
        # the one that was locked out failed twice before
        assert sorted(addresses) == sorted([*expected, "2001:db8:0:1::1"])
