# SPDX-License-Identifier: Apache-2.0
"""Certificates from pebble, an authority for tests, and the pages of the web listener."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import wait_for

from .peers import NameServer, Pebble
from .server import Behind, Chasquid
from .tools import LOOPBACK, accepts, free_port, need_root, unavailable

HERE = {"A": [LOOPBACK]}
HOST = Chasquid.hostname
POLICY = f"version: STSv1\nmode: enforce\nmx: {HOST}\nmax_age: 604800\n"


class Fetching(Behind):
    """chasquid with `acme: true`, a web listener, and trust in the authority."""

    flags = ("acme",)

    def __init__(self, directory: Path, names: NameServer, pebble: Pebble, **settings: Any) -> None:
        self._authority = pebble.certificate
        super().__init__(directory, names, acme_url=pebble.url, **settings)

    def start(self) -> None:
        surroundings = {**os.environ, "SSL_CERT_FILE": str(self._authority)}
        self._run(self.serve_command, *self.ports, env=surroundings)

    def chain(self, name: str) -> Path:
        return self.data_dir / "acme" / "certs" / name / "fullchain.pem"


@pytest.fixture
def fetching(start: Callable[..., Any], names: NameServer) -> Callable[..., Any]:
    """Start pebble and chasquid; say which of the two challenges can be met."""

    def fetching(
        *, http: bool = True, tls: bool = True, issued_for: int = 90 * 86400
    ) -> tuple[Fetching, Pebble, int]:
        names.records[HOST] = HERE
        port, nowhere = free_port(), free_port()
        pebble = start(
            Pebble, names, http_port=port if http else nowhere, tls_port=port if tls else nowhere,
            issued_for=issued_for,
        )  # fmt: skip
        server = start(Fetching, names, pebble, web_address=f"{LOOPBACK}:{port}")
        return server, pebble, port

    return fetching


def shown(port: int, name: str, root: str) -> bytes:
    """Return the certificate for `name` that is shown at `port`, if it is a valid one."""
    context = ssl.create_default_context(cadata=root)
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    with (
        socket.create_connection((LOOPBACK, port), 20) as raw,
        context.wrap_socket(raw, server_hostname=name) as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


def is_shown(port: int, name: str, root: str) -> bool:
    try:
        return bool(shown(port, name, root))
    except ssl.SSLError:
        time.sleep(0.1)
        return False


@pytest.mark.parametrize("challenge", ["http", "tls"])
def test_a_certificate_comes_and_is_in_force_at_once(
    fetching: Callable[..., Any], challenge: str
) -> None:
    server, pebble, port = fetching(http=challenge == "http", tls=challenge == "tls")
    root = pebble.root()
    wait_for(lambda: is_shown(server.tls_port, HOST, root), "the certificate to be in force")
    assert is_shown(port, HOST, root)
    assert [path.name for path in (server.data_dir / "acme" / "certs").iterdir()] == [HOST]
    secrets = [server.data_dir / "acme" / "account.pem", server.chain(HOST).parent / "privkey.pem"]
    assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600, 0o600]
    server.wait_for_log("no certificate for autoconfig.here.example yet: the DNS has no address")


def test_without_a_web_listener_port_80_is_open_as_long_as_it_must_be(
    start: Callable[..., Any], names: NameServer
) -> None:
    need_root()
    if accepts(80):
        unavailable("something listens on port 80")
    names.records[HOST] = HERE
    pebble = start(Pebble, names, http_port=80, tls_port=free_port())
    server = start(Fetching, names, pebble)
    root = pebble.root()
    wait_for(lambda: is_shown(server.tls_port, HOST, root), "the certificate to be in force")
    wait_for(lambda: not accepts(80), "port 80 to be closed")


def test_the_names_of_domains_follow_when_they_lead_here(
    fetching: Callable[..., Any], names: NameServer
) -> None:
    for name in ("mta-sts.here.example", "autoconfig.here.example"):
        names.records[name] = HERE
    server, pebble, port = fetching()
    root = pebble.root()
    for name in ("mta-sts.here.example", "autoconfig.here.example"):
        wait_for(lambda name=name: is_shown(port, name, root), f"{name} to be served", 60)

    def page(address: str) -> str:
        host = address.split("/")[2]
        context = ssl.create_default_context(cadata=root)
        with (
            socket.create_connection((LOOPBACK, port), 20) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            path = "/" + address.split("/", 3)[3]
            tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            return b"".join(iter(lambda: tls.recv(65536), b"")).decode().partition("\r\n\r\n")[2]

    assert page("https://mta-sts.here.example/.well-known/mta-sts.txt") == POLICY
    assert HOST in page("https://autoconfig.here.example/mail/config-v1.1.xml")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{LOOPBACK}:{port}/", timeout=60)


def test_a_certificate_is_renewed_and_keeps_its_key(fetching: Callable[..., Any]) -> None:
    server, pebble, port = fetching(issued_for=15)
    root = pebble.root()
    wait_for(lambda: is_shown(port, HOST, root), "the first certificate")
    first = shown(port, HOST, root)
    key = (server.chain(HOST).parent / "privkey.pem").read_text()
    wait_for(lambda: shown(port, HOST, root) != first, "the renewal")
    assert (server.chain(HOST).parent / "privkey.pem").read_text() == key


def test_what_the_authority_says_is_warned_of(
    fetching: Callable[..., Any], names: NameServer
) -> None:
    server, _, port = fetching(http=False, tls=False)
    server.wait_for_log("event=warning source=acme", 60)
    [line] = [line for line in server.log().splitlines() if "source=acme" in line and HOST in line]
    assert "(http-01)" in line and "(tls-alpn-01)" in line and "next attempt in 5m" in line
    assert not server.chain(HOST).exists()


def test_the_directories_of_certbot_work_by_a_link(
    chasquid: Chasquid, fetching: Callable[..., Any], place: Path
) -> None:
    """What certbot leaves: live/NAME holds links into archive/NAME, moved at each renewal."""
    issuer, pebble, port = fetching()
    root = pebble.root()
    wait_for(lambda: is_shown(port, HOST, root), "a certificate")
    live, archive = place / "live" / HOST, place / "archive" / HOST
    live.mkdir(parents=True)
    archive.mkdir(parents=True)
    source = issuer.chain(HOST).parent
    old = chasquid.config_dir / "certs" / HOST
    for number, origin in ((1, old), (2, source)):
        for name in ("fullchain", "privkey"):
            shutil.copy(origin / f"{name}.pem", archive / f"{name}{number}.pem")

    def point(number: int) -> None:
        for name in ("fullchain", "privkey"):
            link = live / f"{name}.pem"
            link.unlink(missing_ok=True)
            link.symlink_to(f"../../archive/{HOST}/{name}{number}.pem")

    point(1)
    shutil.rmtree(old)
    old.symlink_to(live)
    chasquid.restart()
    assert not is_shown(chasquid.tls_port, HOST, root)
    point(2)
    chasquid.hang_up()
    wait_for(lambda: is_shown(chasquid.tls_port, HOST, root), "the renewal to be noticed")
