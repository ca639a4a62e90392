# SPDX-License-Identifier: Apache-2.0
"""What a TLS connection costs the server: a new session, and one that is resumed.

    python -m tests.bench.tls [--connections 500]

The server runs in a process of its own. What counts is the processor time that it has used for
a connection to its port for submission over TLS: handshake, greeting, EHLO and QUIT. The
certificate has a key of P-256, as those that `init` and ACME make.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import tempfile
from pathlib import Path

from tests.bench.growth import processor_seconds
from tests.bench.logins import free_port, make_config, server

WARM_UP = 20


def connect(port: int, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSocket:
    """Connect, say EHLO and QUIT; the socket, which is closed, knows its session."""
    raw = socket.create_connection(("127.0.0.1", port))
    tls = context.wrap_socket(raw, server_hostname="mail.here.example", session=session)
    for command in (b"EHLO bench.example\r\n", b"QUIT\r\n"):
        assert tls.recv(1000)[:3] in (b"220", b"250")
        tls.sendall(command)
    assert tls.recv(1000).startswith(b"221")
    return tls


def milliseconds(pid: int, port: int, count: int, resumed: bool) -> float:
    """What a connection costs the server, on average."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    session, before = None, 0.0
    for number in range(WARM_UP + count):
        if number == WARM_UP:
            before = processor_seconds(pid)
        with connect(port, context, session if resumed else None) as tls:
            assert bool(tls.session_reused) == (resumed and number > 0)
            session = tls.session
    return (processor_seconds(pid) - before) / count * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=500)
    count = parser.parse_args().connections
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        make_config(Path(name), port)
        with open(Path(name, "chasquid.conf"), "a", encoding="utf-8") as stream:
            stream.write("max_connections_per_minute: 1000000\n")
        with server(Path(name)) as pid:
            for _ in range(3):
                new, again = (milliseconds(pid, port, count, resumed) for resumed in (False, True))
                print(f"processor time: {new:.2f} ms a new session, {again:.2f} ms resumed")


if __name__ == "__main__":
    main()
