# SPDX-License-Identifier: Apache-2.0
"""A host with a network of its own, whose DNS NSD serves: doctor before and after publishing."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import chasquid as module

from .peers import Nsd, Unbound
from .server import Chasquid
from .tools import need_root, program, run, unavailable

IP, OUTSIDE, GMAIL = "5.45.100.25", "5.45.77.77", "5.45.3.3"
DOMAIN, HOST = "here.example", "mail.here.example"
CLONE_NEWNET = 0x40000000
# What there is besides: a server that anybody may connect to, and block lists without entries.
OTHERS = {
    "gmail.com": f"@ MX 5 mx\nmx A {GMAIL}\n",
    "zen.spamhaus.org": "",
    "bl.spamcop.net": "",
    "100.45.5.in-addr.arpa": f"25 PTR {HOST}.\n",
}


@contextlib.contextmanager
def own_network(*addresses: str) -> Iterator[None]:
    """Have nothing but a loopback interface, which has `addresses` and leads everywhere.

    That holds for this thread, and for the threads and programs that it starts.
    """
    need_root()
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET):
        unavailable(f"no network can be made here: {os.strerror(ctypes.get_errno())}")
    try:
        ip = program("ip")
        run(ip, "link", "set", "lo", "up")
        for address in addresses:
            run(ip, "address", "add", f"{address}/32", "dev", "lo")
        run(ip, "route", "add", "default", "dev", "lo", "src", addresses[0])
        yield
    finally:
        assert libc.setns(before, CLONE_NEWNET) == 0
        os.close(before)


class _Greeting(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"220 mx.gmail.com ESMTP\r\n")
        self.rfile.readline()


@pytest.fixture
def network() -> Iterator[None]:
    with own_network(IP, OUTSIDE, GMAIL):
        server = socketserver.ThreadingTCPServer((GMAIL, 25), _Greeting)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield
        server.shutdown()
        server.server_close()


def records(chasquid: Chasquid) -> str:
    """Return what is to be published, as the zone file has it, but for the address of the host."""
    config = module.load_config(str(chasquid.config_dir))
    keys = module.load_domains(config).keys[DOMAIN]
    needs = module.DnsNeeds(DOMAIN, HOST, (IP,), keys)
    return module.zone_file(module.domain_records(needs))


def start_host(start: Any, names: Any) -> Chasquid:
    """Start a server with a DKIM key, to which somebody from outside has come."""
    chasquid: Chasquid = start(Chasquid, names, aliases={DOMAIN: "postmaster: ana\n"})
    chasquid.command("dkim-keygen", DOMAIN, "r1")
    with socket.create_connection(
        ("127.0.0.1", chasquid.smtp_port), 5, source_address=(OUTSIDE, 0)
    ) as client:
        client.recv(100)
        client.sendall(b"QUIT\r\n")
        client.recv(100)
    return chasquid


def resolve(stack: contextlib.ExitStack, chasquid: Chasquid, nsd: Nsd, names: Any) -> None:
    """Start a resolver for what NSD serves, and name it in chasquid.conf."""
    unbound = Unbound(nsd.directory.with_suffix(".unbound"), nsd, names)
    stack.enter_context(unbound)
    chasquid.settings["dns_server"] = unbound.address
    chasquid.write_settings()


def doctor(chasquid: Chasquid, *words: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Return the exit status, and the findings that are not well, by their check."""
    done = chasquid.command("doctor", "--json", *words, check=False)
    assert done.stderr == ""
    findings = json.loads(done.stdout)
    return done.returncode, {
        finding["check"]: finding for finding in findings if finding["level"] != "ok"
    }


def test_before_and_after_publishing(
    network: None, start: Any, names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = {"example": "", DOMAIN: f"mail A {IP}\n", **OTHERS}
    with contextlib.ExitStack() as stack:

        def serve(zones: dict[str, str], directory: str) -> Nsd:
            nsd = Nsd(place / directory, zones, unsigned=list(zones), port=53)
            return stack.enter_context(nsd)

        chasquid = start_host(start, names)
        place = chasquid.directory.parent
        monkeypatch.setenv("SSL_CERT_FILE", str(chasquid.certificate))
        nsd = serve(empty, "before")
        resolve(stack, chasquid, nsd, names)

        status, found = doctor(chasquid)
        assert status == 1
        assert {check for check, one in found.items() if one["level"] == "mend"} == {
            "mx", "spf", "dkim", "dmarc",
        }  # fmt: skip
        assert found["mx"]["fix"] == f"publish: @  MX     10 {HOST}"
        of_this_machine = {"imap", "clock", "disk", "memory", "certificates"}
        assert set(found) - of_this_machine == {"mx", "spf", "dkim", "dmarc"}

        print(chasquid.command("doctor", check=False).stdout)

        nsd.stop()
        serve({**empty, DOMAIN: records(chasquid)}, "after")
        began = time.monotonic()
        status, found = doctor(chasquid)  # nothing is stale, though the resolver has a cache
        took = time.monotonic() - began
        assert (status, {check for check, one in found.items() if one["level"] == "mend"}) == (
            0,
            set(),
        ), found
        assert took < 30
        person = chasquid.command("doctor", DOMAIN)
        assert "Nothing must be mended." in person.stdout
        print(person.stdout, f"{took:.1f} s")


def test_signed_zones_and_those_whose_signatures_have_expired(
    network: None, start: Any, names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for expired in ([], [DOMAIN]):
        with contextlib.ExitStack() as stack:
            directory = f"{'expired' if expired else 'signed'}"
            chasquid = start_host(start, names)
            place = chasquid.directory.parent
            monkeypatch.setenv("SSL_CERT_FILE", str(chasquid.certificate))
            zones = {"example": "", DOMAIN: records(chasquid), **OTHERS}
            nsd = Nsd(place / directory, zones, unsigned=list(OTHERS), expired=expired, port=53)
            stack.enter_context(nsd)
            resolve(stack, chasquid, nsd, names)
            status, found = doctor(chasquid)
            wrong = {check for check, one in found.items() if one["level"] == "mend"}
            if expired:
                assert (status, wrong) == (1, {"name servers"})
                assert "the signatures do not fit or have expired" in found["name servers"]["text"]
            else:
                assert (status, wrong) == (0, set()), found
