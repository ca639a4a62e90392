# SPDX-License-Identifier: Apache-2.0
"""Rooms STREAM, LISTENERS: the PROXY header, what it says, and what happens without it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
    RunningClock,
    Serve,
    Server,
    Wire,
    Zone,
    cuts,
    run,
    searched,
    socket_pair,
    trusting,
    wait_for,
)

import chasquid

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LIMIT = 536
IPV4, IPV6 = st.ip_addresses(v=4), st.ip_addresses(v=6)
ADDRESSES = st.one_of(IPV4, IPV6)
TLVS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=60)), max_size=4)
NOTHING: list[tuple[int, bytes]] = []


def version_1(address: Any, port: int = 4321) -> bytes:
    kind = "TCP6" if address.version == 6 else "TCP4"
    own = "2001:db8::25" if address.version == 6 else "198.51.100.25"
    return f"PROXY {kind} {address} {own} {port} 25\r\n".encode()


def version_2(
    address: Any,
    tlvs: list[tuple[int, bytes]] = NOTHING,
    first: int = 0x21,
    transport: int = 1,
) -> bytes:
    """Return a header: version and command in `first`, the family that of `address`."""
    family = 0x20 if address.version == 6 else 0x10
    content = address.packed * 2 + struct.pack(">HH", 4321, 25)
    content += b"".join(struct.pack(">BH", kind, len(value)) + value for kind, value in tlvs)
    return binary(first, family | transport, content)


def binary(first: int, family: int, content: bytes) -> bytes:
    return SIGNATURE + struct.pack(">BBH", first, family, len(content)) + content


CLIENT = ipaddress.ip_address("192.0.2.7")
CLIENT_6 = ipaddress.ip_address("2001:db8::7")
TELLING = st.one_of(  # headers, and whom they tell of
    ADDRESSES.map(lambda one: (version_1(one), str(one))),
    st.builds(lambda one, tlvs: (version_2(one, tlvs), str(one)), ADDRESSES, TLVS),
)
SILENT = st.one_of(  # headers that tell of nobody
    st.sampled_from([b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ff::1 ff::2 1 2\r\n"]),
    st.builds(lambda tlvs: version_2(CLIENT, tlvs, first=0x20), TLVS),  # LOCAL
    ADDRESSES.map(lambda one: version_2(one, transport=2)),  # UDP
    st.binary(max_size=216).map(lambda paths: binary(0x21, 0x31, paths)),  # a path
    st.binary(max_size=40).map(lambda content: binary(0x21, 0x00, content)),
)


# --- what it says ---


@searched
@given(TELLING, st.binary(max_size=50))
def test_a_header_tells_its_length_and_the_client(header, rest):
    data, peer = header
    length, found = chasquid.parse_proxy_header(data + rest)
    assert length == len(data)
    assert ipaddress.ip_address(found) == ipaddress.ip_address(peer)


@searched
@given(SILENT, st.binary(max_size=50))
def test_a_header_that_tells_of_nobody_is_still_a_header(data, rest):
    assert chasquid.parse_proxy_header(data + rest) == (len(data), "")


@searched
@given(st.one_of(TELLING.map(lambda one: one[0]), SILENT), st.data())
def test_a_header_that_is_cut_anywhere_is_not_complete_yet(header, data):
    end = data.draw(st.integers(0, len(header) - 1))
    assert chasquid.parse_proxy_header(header[:end]) is None


@searched
@given(
    st.builds(
        lambda start, more: start + more,
        st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11\x00"]),
        st.binary(max_size=120),
    )
)
@example(b"PROXY TCP4 \xff\xff 1.2.3.4 1 2\r\n")
@example(SIGNATURE + b"\x21\x11\x00\x0c" + b"\x00" * 12)
def test_any_octets_are_a_header_or_the_start_of_one_or_refused(data):
    try:
        found = chasquid.parse_proxy_header(data)
    except ValueError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 200
        return
    if found is not None:
        length, peer = found
        assert 0 < length <= len(data)
        assert not peer or ipaddress.ip_address(peer)


@pytest.mark.parametrize(
    "data",
    [
        b"EHLO client.example\r\n",
        b"\x16\x03\x01",
        b"proxy TCP4 192.0.2.7 198.51.100.25 1 2\r\n",
        b"PROXY\r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.25 1\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.25 1 2 3\r\n",
        b"PROXY TCP4  192.0.2.7 198.51.100.25 1 2\r\n",
        b"PROXY TCP4 192.0.2.256 198.51.100.25 1 2\r\n",
        b"PROXY TCP4 client.example 198.51.100.25 1 2\r\n",
        b"PROXY TCP4 [192.0.2.7] 198.51.100.25 1 2\r\n",
        b"PROXY UDP4 192.0.2.7 198.51.100.25 1 2\r\n",
        b"PROXY TCP4 192.0.2.7\0 198.51.100.25 1 2\r\n",
        b"PROXY TCP4 " + b"1" * 100,
        SIGNATURE[:-1] + b"X",
        SIGNATURE + b"\x11\x11\x00\x0c" + b"\x00" * 12,
        SIGNATURE + b"\x31\x11\x00\x0c" + b"\x00" * 12,
        SIGNATURE + b"\x21\x11\xff\xff",
        version_2(CLIENT, [(0xEA, b"x" * LIMIT)])[:16],
    ],
    ids=repr,
)
def test_what_is_no_header_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        chasquid.parse_proxy_header(data)


@pytest.mark.parametrize("excess", [0, 1])
def test_a_header_of_536_octets_is_read_and_a_longer_one_is_not(excess):
    data = version_2(CLIENT, [(0xEA, b"x" * (LIMIT - 16 - 12 - 3 + excess))])
    assert len(data) == LIMIT + excess
    if excess:
        with pytest.raises(ValueError, match="length"):
            chasquid.parse_proxy_header(data)
    else:
        assert chasquid.parse_proxy_header(data) == (LIMIT, "192.0.2.7")


@pytest.mark.parametrize(
    "data",
    [
        version_2(CLIENT, first=0x22),  # a command that is not assigned
        version_2(CLIENT, first=0x2F),
        binary(0x21, 0x11, b"\x7f\0\0\x01"),  # too short for its family
        b"PROXY TCP4 2001:db8::7 2001:db8::25 1 2\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.25 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.25 1 70000\r\n",
        b"PROXY TCP4 192.0.2.7 nobody x y\r\n",
        b"PROXY UNKNOWN " + b"x" * 100 + b"\r\n",  # 107 octets at most
    ],
    ids=repr,
)
def test_a_header_that_breaks_the_rules_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        chasquid.parse_proxy_header(data)


@pytest.mark.parametrize("written", ["0:0:0:0:0:0:0:1", "::FFFF:127.0.0.1", "2001:DB8:0::7"])
def test_an_address_comes_in_one_form_however_it_is_written(written):
    _, peer = chasquid.parse_proxy_header(f"PROXY TCP6 {written} ::1 1 2\r\n".encode())
    assert peer == socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, peer))


# --- reading it from a socket ---


def read(*pieces: bytes, end: bool = False) -> tuple[str, bytes]:
    """Have `pieces` come one after the other; return the client and what is left."""
    with socket_pair() as (ours, theirs):
        ours.setblocking(False)

        async def main(loop: Any) -> tuple[str, bytes]:
            async def send() -> None:
                for piece in pieces:
                    theirs.sendall(piece)
                    await loop.sleep(0.02 if len(pieces) < 20 else 0.001)
                if end:
                    theirs.shutdown(socket.SHUT_WR)

            sender = loop.spawn(send(), "sender")
            try:
                peer = await chasquid.proxied_peer(loop, ours)
            finally:
                if not end:
                    await sender.join()
                loop.forget(ours.fileno())
            left = b""
            with contextlib.suppress(BlockingIOError):
                left = ours.recv(65536)
            return peer, left

        return run(main)


@pytest.mark.parametrize("header", [version_1(CLIENT), version_2(CLIENT, [(1, b"h2")])])
@pytest.mark.parametrize("rest", [b"", b"EHLO client.example\r\n", b"\x16\x03\x01" * 500])
def test_what_comes_after_the_header_is_left_in_the_socket(header, rest):
    assert read(header + rest) == ("192.0.2.7", rest)


@pytest.mark.parametrize("header", [version_1(CLIENT_6), version_2(CLIENT_6, [(1, b"h2")])])
def test_a_header_in_packets_of_any_size_is_read(header):
    rest = b"EHLO me\r\n"
    for places in ([1], [11, 12], [5, 6, 7, 15, 16], [len(header) - 1], list(range(200))):
        assert read(*cuts(header + rest, places)) == ("2001:db8::7", rest)


@pytest.mark.parametrize(
    "data",
    [
        b"EHLO client.example\r\n",
        b"\0" * 5000,
        b"PROXY TCP4 " + b"x" * 5000,
        SIGNATURE + b"\xff" * 9,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_header_ends_the_connection(data):
    with pytest.raises(chasquid.Disconnected, match="expected a PROXY header"):
        read(data)


def test_an_end_without_a_header_is_told():
    with pytest.raises(chasquid.Disconnected, match="expected a PROXY header"):
        read(end=True)


@pytest.mark.parametrize("start", [b"", b"PROXY TCP4 192.0.2.7", SIGNATURE, SIGNATURE + b"\x21"])
def test_a_header_that_does_not_come_in_time_is_not_waited_for(start):
    clock = RunningClock()
    with socket_pair() as (ours, theirs):
        ours.setblocking(False)
        theirs.sendall(start)

        async def main(loop: Any) -> float:
            def advance() -> None:
                clock.advance(5)
                loop.post(lambda: None)

            threading.Timer(0.05, advance).start()
            began = loop.clock.monotonic()
            with pytest.raises(chasquid.Expired):
                await chasquid.proxied_peer(loop, ours)
            loop.forget(ours.fileno())
            return loop.clock.monotonic() - began

        assert 5.0 <= run(main, clock) < 9.9


# --- a server behind a proxy ---


def proxied(server: Server, header: bytes = b"", port: str = "smtp") -> Wire:
    wire = server.connect(port)
    wire.send(header or version_1(CLIENT))
    return wire


def deliver(wire: Wire, sender: str = "eva@there.example") -> str:
    for command in (
        "EHLO client.example",
        f"MAIL FROM:<{sender}>",
        "RCPT TO:<ana@here.example>",
        "DATA",
    ):
        reply = wire.ask(command)
        if reply[:1] not in "23":
            return reply
    return wire.ask("Subject: x\r\n\r\nhello\r\n.")


@pytest.mark.parametrize(
    ("header", "literal"),
    [
        (version_1(CLIENT), "[192.0.2.7]"),
        (version_2(CLIENT, [(0x05, b"unique")]), "[192.0.2.7]"),
        (version_1(CLIENT_6), "[IPv6:2001:db8::7]"),
        (version_2(CLIENT_6), "[IPv6:2001:db8::7]"),
        (version_2(ipaddress.ip_address("::ffff:192.0.2.7")), "[192.0.2.7]"),
        (b"PROXY UNKNOWN\r\n", "[127.0.0.1]"),
        (version_2(CLIENT, first=0x20), "[127.0.0.1]"),
    ],
)
def test_log_and_received_see_the_client(behind: Serve, header: bytes, literal: str) -> None:
    server = behind()
    with proxied(server, header) as wire:
        assert wire.reply().startswith("220 ")
        assert deliver(wire).startswith("250 ")
    (message,) = server.mail("ana")
    assert f"from client.example ({literal})" in " ".join(message.decode().split())
    peer = literal.strip("[]").removeprefix("IPv6:")
    assert f"peer={peer} port=smtp helo=client.example " in server.mail_log


def test_spf_sees_the_client(behind: Serve) -> None:
    zone = Zone({("there.example", "TXT"): ["v=spf1 ip4:192.0.2.7 ip6:2001:db8::7 -all"]})
    server = behind(ask=zone.ask)
    other = ipaddress.ip_address("192.0.2.8")
    for address, code in ((CLIENT, "250 "), (CLIENT_6, "250 "), (other, "550 5.7.23 ")):
        with proxied(server, version_2(address)) as wire:
            assert wire.reply().startswith("220 ")
            assert deliver(wire).startswith(code)
    assert b"Received-SPF: pass" in server.mail("ana")[0]


def test_commands_right_behind_the_header_are_answered(behind: Serve) -> None:
    server = behind()
    with proxied(server, version_1(CLIENT) + b"EHLO client.example\r\nNOOP\r\nQUIT\r\n") as wire:
        assert [wire.reply()[:3] for _ in range(4)] == ["220", "250", "250", "221"]


def test_a_hello_of_tls_in_the_same_packet_as_the_header_is_answered(behind: Serve) -> None:
    server = behind()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting().wrap_bio(incoming, outgoing)
    with server.connect("submission over TLS") as wire:
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        wire.send(version_2(CLIENT) + outgoing.read())

        def through(step: Callable[[], Any]) -> Any:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    data = wire.socket.recv(65536)
                    assert data, "closed within TLS"
                    incoming.write(data)
                finally:
                    wire.socket.sendall(outgoing.read())

        through(tls.do_handshake)
        assert through(lambda: tls.read(1000)).startswith(b"220 ")
        through(lambda: tls.write(b"EHLO client.example\r\n"))
        assert b"AUTH PLAIN LOGIN" in through(lambda: tls.read(1000))


def test_starttls_comes_after_the_header(behind: Serve) -> None:
    with proxied(behind(), port="submission") as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("STARTTLS").startswith("220 ")
        wire.start_tls(trusting())
        assert "AUTH PLAIN LOGIN" in wire.ask("EHLO client.example")


@pytest.mark.parametrize("port", ["smtp", "submission over TLS"])
def test_who_sends_no_header_gets_no_word(behind: Serve, port: str) -> None:
    server = behind(max_connections=2)
    for _ in range(5):
        with server.connect(port) as wire:
            wire.send(b"EHLO client.example\r\n")
            assert wire.is_closed()
    assert 'source=haproxy text="127.0.0.1: expected a PROXY header' in server.log
    with proxied(server) as wire:
        assert wire.reply().startswith("220 ")


def test_who_never_sends_a_header_is_sent_away(behind: Serve) -> None:
    clock = RunningClock()
    server = behind(clock=clock)
    with server.connect() as silent, server.connect() as slow, server.connect() as gone:
        slow.send(b"PROXY TCP4 192.")
        gone.close()
        server.settle()
        assert not silent.has_more()
        clock.advance(5)
        wait_for(
            lambda: server.log.count("event=warning source=haproxy") == 3, "all to be sent away"
        )
        assert silent.is_closed()
        assert slow.is_closed()


def test_a_server_that_is_not_behind_a_proxy_believes_no_header(tmp_path: Path) -> None:
    with Server(tmp_path) as server, proxied(server) as wire:
        assert wire.reply().startswith("220 ")
        assert wire.reply().startswith("500 5.5.1 ")
        assert wire.ask("NOOP").startswith("250 ")
    assert "192.0.2.7" not in server.mail_log


@pytest.mark.parametrize(
    ("peer", "clean"),
    [("::ffff:192.0.2.1", "192.0.2.1"), ("::ffff:0:102:304", "::ffff:0:102:304"),
     ("fe80::1%eth0", "fe80::1"), ("192.0.2.1", "192.0.2.1"), ("local", "local")],
)  # fmt: skip
def test_only_a_mapped_address_loses_its_prefix(peer: str, clean: str) -> None:
    assert chasquid.clean_peer(peer) == clean
