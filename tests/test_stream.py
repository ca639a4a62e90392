# SPDX-License-Identifier: Apache-2.0
"""Room STREAM: lines and pieces, TLS, deadlines, and the end of a connection."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SECONDS, cuts, run, searched, socket_pair, turns

import chasquid

BareNewline, Disconnected, LineTooLong = (
    chasquid.BareNewline,
    chasquid.Disconnected,
    chasquid.LineTooLong,
)
Stream = chasquid.Stream


def over_pair(call):
    """Run `call(loop, stream, other)`, `other` being the socket at the far end."""

    async def main(loop):
        with socket_pair() as (one, other):
            other.setblocking(False)
            stream = Stream(loop, one)
            try:
                with loop.deadline(SECONDS):
                    return await call(loop, stream, other)
            finally:
                stream.close()

    return run(main)


def received(other: socket.socket) -> bytes:
    """What has arrived at the far end by now."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := other.recv(65536):
            data += piece
    return data


async def lines_of(stream, limit: int = 100) -> list[object]:
    """Every line up to the end of the connection, or the error in its place."""
    lines: list[object] = []
    while True:
        try:
            lines.append(await stream.read_line(limit))
        except (LineTooLong, BareNewline) as error:
            lines.append(type(error))
        except Disconnected:
            return lines


def lines_sent(*pieces: bytes, limit: int = 100) -> list[object]:
    async def call(loop, stream, other):
        async def send():
            for piece in pieces:
                other.sendall(piece)
                await loop.turn()
            other.shutdown(socket.SHUT_WR)

        sender = loop.spawn(send(), "sends")
        lines = await lines_of(stream, limit)
        await sender.join()
        return lines

    return over_pair(call)


# --- Reading --------------------------------------------------------------------------------


def test_lines_come_without_their_ends():
    assert lines_sent(b"one\r\n\r\ntwo\r\n") == [b"one", b"", b"two"]


def test_a_line_that_never_ends_is_no_line():
    assert lines_sent(b"one\r\ntw") == [b"one"]


def test_a_line_may_be_as_long_as_its_limit_with_its_end():
    assert lines_sent(b"x" * 98 + b"\r\n", b"x" * 99 + b"\r\n", b"y\r\n") == [
        b"x" * 98,
        LineTooLong,
        b"y",
    ]


@pytest.mark.parametrize("size", [100, 5_000, 300_000])
def test_a_line_that_is_too_long_is_thrown_away_whole_and_the_next_one_read(size):
    line = b"x" * size + b"\r\n"
    pieces = [line[start : start + 4096] for start in range(0, len(line), 4096)]
    assert lines_sent(*pieces, b"next\r\n") == [LineTooLong, b"next"]


@pytest.mark.parametrize(
    "data", [b"a\n", b"a\rb\r\n", b"\n", b"a\r\r\n", b"\r\r\n", b"a\x00\n", b"a\rb\n"]
)
def test_a_line_with_a_bare_newline_is_refused_and_the_next_one_read(data):
    assert lines_sent(data, b"next\r\n") == [BareNewline, b"next"]


@searched
@given(
    st.lists(st.sampled_from([b"a", b"\r\n", b"\n", b"\r", b"b" * 40, b"c" * 130]), max_size=10),
    st.lists(st.integers(0, 10_000), max_size=6),
)
def test_lines_do_not_depend_on_how_the_octets_are_cut(parts, places):
    data = b"".join(parts)
    assert lines_sent(*cuts(data, places)) == lines_sent(data)


def test_pieces_are_at_most_as_long_as_asked_and_at_least_one_octet():
    async def call(loop, stream, other):
        other.sendall(b"abcdef")
        pieces = [await stream.read_some(4), await stream.read_some(4)]
        other.sendall(b"g")
        return [*pieces, await stream.read_some()]

    assert over_pair(call) == [b"abcd", b"ef", b"g"]


def test_what_is_put_back_is_read_next():
    async def call(loop, stream, other):
        other.sendall(b"abc\r\n")
        piece = await stream.read_some(2)
        stream.unread(b"X" + piece)
        return await stream.read_line()

    assert over_pair(call) == b"Xabc"


def test_the_end_of_the_connection_is_told_when_all_was_read():
    async def call(loop, stream, other):
        other.sendall(b"last")
        other.close()
        assert await stream.read_some() == b"last"
        with pytest.raises(Disconnected):
            await stream.read_some()
        return True

    assert over_pair(call)


def test_a_deadline_passes_while_nothing_comes():
    async def call(loop, stream, other):
        other.sendall(b"half a li")
        with pytest.raises(chasquid.Expired), loop.deadline(0.05):
            await stream.read_line()
        other.sendall(b"ne\r\n")
        return await stream.read_line()

    assert over_pair(call) == b"half a line"


def test_a_peer_that_floods_leaves_the_others_their_turn():
    async def call(loop, stream, other):
        stop = threading.Event()
        other.setblocking(True)

        def flood():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    other.sendall(b"x" * 65536)

        thread = threading.Thread(target=flood)
        thread.start()

        async def swallow():
            while True:
                await stream.read_some()

        task = loop.spawn(swallow(), "swallows")
        try:
            for _ in range(50):
                await loop.sleep(0.001)
        finally:
            task.cancel()
            stop.set()
            stream.close()
            thread.join()
        return True

    assert over_pair(call)


# --- Writing --------------------------------------------------------------------------------


def test_replies_to_pipelined_commands_leave_together_when_input_runs_out():
    async def call(loop, stream, other):
        other.sendall(b"one\r\ntwo\r\nthree\r\nfo")

        async def serve():
            while True:
                stream.write(b"ok " + await stream.read_line() + b"\r\n")

        task = loop.spawn(serve(), "serves")
        early = []
        for _ in range(3):
            early.append(received(other))
            await turns(loop, 1)
        await turns(loop)
        early.append(received(other))
        task.cancel()
        return [piece for piece in early if piece]

    assert over_pair(call) == [b"ok one\r\nok two\r\nok three\r\n"]


def test_nothing_is_sent_before_it_must_be():
    async def call(loop, stream, other):
        stream.write(b"a")
        await stream.send(b"b")
        before = received(other)
        await stream.flush()
        return before, received(other)

    assert over_pair(call) == (b"", b"ab")


def test_a_large_write_waits_for_a_slow_reader():
    data = os.urandom(2_000_000)

    async def call(loop, stream, other):
        got = bytearray()

        async def read():
            while len(got) < len(data):
                await loop.readable(other.fileno())
                got.extend(other.recv(10_000))
            loop.forget(other.fileno())

        reader = loop.spawn(read(), "reads")
        for start in range(0, len(data), 50_000):
            await stream.send(data[start : start + 50_000])
        await stream.flush()
        await reader.join()
        return bytes(got)

    assert over_pair(call) == data


def test_writing_to_whoever_is_gone_is_told():
    async def call(loop, stream, other):
        other.close()
        with pytest.raises(Disconnected):
            for _ in range(100):
                stream.write(b"x" * 100_000)
                await stream.flush()
        return True

    assert over_pair(call)


def test_a_deadline_passes_while_the_other_side_reads_nothing():
    async def call(loop, stream, other):
        stream.write(b"x" * 50_000_000)
        with pytest.raises(chasquid.Expired), loop.deadline(0.05):
            await stream.flush()
        return True

    assert over_pair(call)


# --- The end --------------------------------------------------------------------------------


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def test_finish_delivers_the_last_reply_though_input_was_left_unread():
    """A reset, which unread input would bring about, may destroy what is on its way."""
    near, far = tcp_pair()
    near.settimeout(SECONDS)
    seen = []

    def client() -> None:
        near.sendall(b"QUIT\r\n" + b"more\r\n" * 20_000)
        time.sleep(0.05)  # what came too early is there by now
        with near, near.makefile("rb") as file:
            seen.append(file.read())

    thread = threading.Thread(target=client)
    thread.start()

    async def main(loop):
        stream = Stream(loop, far)
        with loop.deadline(SECONDS):
            stream.write(b"221 " + await stream.read_line() + b"\r\n")
            await stream.finish()

    run(main)
    thread.join()
    assert seen == [b"221 QUIT\r\n"]


def test_finish_does_not_wait_for_ever_for_a_peer_that_stays():
    async def call(loop, stream, other):
        stream.write(b"221 bye\r\n")
        began = time.monotonic()
        task = loop.spawn(stream.finish(), "finishes")
        await turns(loop)
        assert received(other) == b"221 bye\r\n"
        other.close()
        await task.join()
        return time.monotonic() - began

    assert over_pair(call) < 15


def test_finish_does_not_listen_for_ever_to_a_peer_that_goes_on():
    async def call(loop, stream, other):
        other.setblocking(True)
        stop = threading.Event()

        def flood():
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    other.sendall(b"x" * 4096)

        thread = threading.Thread(target=flood)
        thread.start()
        stream.write(b"221 bye\r\n")
        await stream.finish()
        stop.set()
        thread.join()
        return True

    assert over_pair(call)


def test_closing_twice_and_finishing_what_is_broken_is_no_error():
    async def call(loop, stream, other):
        other.close()
        stream.write(b"x")
        await stream.finish()
        await stream.finish()
        stream.close()
        return True

    assert over_pair(call)


# --- TLS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = chasquid.self_signed_certificate(["mail.example.org"], time.time())
    (directory / "cert.pem").write_text(certificate)
    (directory / "key.pem").write_text(key)
    return str(directory / "cert.pem"), str(directory / "key.pem")


def over_tls(pair, serve, use, name="mail.example.org", verify=True, server_context=None):
    """Run `serve(stream)` and `use(stream)` at the two ends of a connection with TLS."""

    async def main(loop):
        near, far = tcp_pair()
        server, client = Stream(loop, far), Stream(loop, near)

        async def server_side():
            context = server_context or chasquid.server_tls_context(*pair)
            await server.start_tls(context, server_side=True)
            return await serve(server)

        try:
            with loop.deadline(SECONDS):
                task = loop.spawn(server_side(), "server")
                context = chasquid.client_tls_context(verify, pair[0])
                await client.start_tls(context, server_side=False, hostname=name)
                used = await use(client)
                return used, await task.join()
        finally:
            server.close()
            client.close()

    return run(main, crashes=[])


def test_tls_carries_lines_both_ways_and_tells_version_and_cipher(pair):
    async def serve(stream):
        stream.write(b"hello " + await stream.read_line() + b"\r\n")
        await stream.flush()
        return stream.tls_text

    async def use(stream):
        stream.write(b"world\r\n")
        return await stream.read_line()

    line, text = over_tls(pair, serve, use)
    assert line == b"hello world"
    assert text.startswith(("TLSv1.3 TLS_", "TLSv1.2 "))
    assert len(text.split()) == 2


def test_before_tls_there_is_no_version_to_tell():
    async def call(loop, stream, other):
        return stream.tls_text

    assert over_pair(call) == ""


def test_tls_carries_more_than_the_buffers_hold_both_ways_at_once(pair):
    data = os.urandom(3_000_000)

    async def exchange(stream):
        got = bytearray()

        async def read():
            while len(got) < len(data):
                got.extend(await stream.read_some())

        sent = 0
        while sent < len(data):
            await stream.send(data[sent : sent + 100_000])
            sent += 100_000
        await stream.flush()
        await read()
        return bytes(got) == data

    async def echo(stream):
        got = bytearray()
        while len(got) < len(data):
            piece = await stream.read_some()
            got.extend(piece)
        await stream.send(bytes(got))
        await stream.flush()
        return bytes(got) == data

    assert over_tls(pair, echo, exchange) == (True, True)


def test_an_octet_decrypted_already_is_read_without_waiting(pair):
    """TLS reads whole records; what is left of one makes no descriptor ready."""

    async def serve(stream):
        stream.write(b"a\r\nb\r\n" + b"x" * 15_000)
        await stream.flush()
        await stream.read_line()

    async def use(stream):
        assert await stream.read_some(3) == b"a\r\n"
        assert await stream.read_line() == b"b"
        left = 15_000
        while left:
            left -= len(await stream.read_some(100))
        stream.write(b"done\r\n")
        await stream.flush()
        return "read"

    assert over_tls(pair, serve, use)[0] == "read"


def test_starttls_discards_what_was_sent_ahead_in_the_clear(pair):
    """RFC 3207, 6: a command that an attacker put in must not be taken for the client's."""

    async def main(loop):
        near, far = tcp_pair()
        server, client = Stream(loop, far), Stream(loop, near)

        async def serve():
            assert await server.read_line() == b"STARTTLS"
            server.write(b"220 go\r\n")
            await server.start_tls(chasquid.server_tls_context(*pair), server_side=True)
            return await server.read_line()

        try:
            with loop.deadline(SECONDS):
                task = loop.spawn(serve(), "server")
                client.write(b"STARTTLS\r\nINJECTED\r\nINJ")
                assert await client.read_line() == b"220 go"
                context = chasquid.client_tls_context(True, pair[0])
                await client.start_tls(context, server_side=False, hostname="mail.example.org")
                client.write(b"GENUINE\r\n")
                await client.flush()
                return await task.join()
        finally:
            server.close()
            client.close()

    assert run(main) == b"GENUINE"


def test_starttls_discards_replies_that_a_server_sent_ahead_in_the_clear(pair):
    async def main(loop):
        near, far = tcp_pair()
        server, client = Stream(loop, far), Stream(loop, near)

        async def serve():
            server.write(b"220 go\r\n250 injected\r\n")
            await server.flush()
            await server.start_tls(chasquid.server_tls_context(*pair), server_side=True)
            server.write(b"250 genuine\r\n")
            await server.flush()

        try:
            with loop.deadline(SECONDS):
                task = loop.spawn(serve(), "server")
                await loop.sleep(0.02)
                assert await client.read_line() == b"220 go"
                context = chasquid.client_tls_context(False)
                await client.start_tls(context, server_side=False, hostname="mail.example.org")
                line = await client.read_line()
                await task.join()
                return line
        finally:
            server.close()
            client.close()

    assert run(main) == b"250 genuine"


def refused_by_client(pair, name: str, authorities: str | None, verify: bool = True):
    async def main(loop):
        near, far = tcp_pair()
        server, client = Stream(loop, far), Stream(loop, near)

        async def serve():
            with contextlib.suppress(chasquid.TLSFailed, Disconnected):
                await server.start_tls(chasquid.server_tls_context(*pair), server_side=True)
                await server.read_line()

        try:
            with loop.deadline(SECONDS):
                task = loop.spawn(serve(), "server")
                context = chasquid.client_tls_context(verify, authorities)
                try:
                    await client.start_tls(context, server_side=False, hostname=name)
                except chasquid.TLSFailed as error:
                    return error
                finally:
                    client.close()
                    await task.join()
        finally:
            server.close()

    return run(main)


def test_a_certificate_for_another_name_or_from_nobody_known_is_told_as_unverified(pair):
    for name, authorities in (("other.example", pair[0]), ("mail.example.org", None)):
        error = refused_by_client(pair, name, authorities)
        assert isinstance(error, chasquid.TLSFailed)
        assert error.unverified
        assert str(error).startswith("the certificate is not valid: ")


def test_without_verification_any_certificate_will_do(pair):
    assert refused_by_client(pair, "other.example", None, verify=False) is None


@pytest.mark.parametrize("noise", [b"EHLO me\r\n" * 20, b"\x16\x03\x01\x00\x05hello", b""])
def test_a_handshake_with_what_is_no_tls_fails_and_may_be_closed(pair, noise):
    async def call(loop, stream, other):
        other.sendall(noise)
        other.shutdown(socket.SHUT_WR)
        with pytest.raises((chasquid.TLSFailed, Disconnected)) as caught:
            await stream.start_tls(chasquid.server_tls_context(*pair), server_side=True)
        await stream.finish()
        return getattr(caught.value, "unverified", False)

    assert over_pair(call) is False


def test_a_handshake_that_nobody_answers_ends_at_its_deadline(pair):
    async def call(loop, stream, other):
        with pytest.raises(chasquid.Expired), loop.deadline(0.05):
            await stream.start_tls(chasquid.server_tls_context(*pair), server_side=True)
        return True

    assert over_pair(call)


def test_the_server_may_choose_its_certificate_by_the_name_that_is_asked_for(pair, tmp_path):
    certificate, key = chasquid.self_signed_certificate(["second.example"], time.time())
    (tmp_path / "c").write_text(certificate)
    (tmp_path / "k").write_text(key)
    second = chasquid.server_tls_context(str(tmp_path / "c"), str(tmp_path / "k"))
    first = chasquid.server_tls_context(*pair)
    asked = []

    def choose(tls: ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        asked.append(name)
        if name == "second.example":
            tls.context = second

    first.sni_callback = choose

    async def serve(stream):
        await stream.read_line()

    async def use(stream):
        der = stream.tls.getpeercert(binary_form=True)
        stream.write(b"bye\r\n")
        await stream.flush()
        return ssl.DER_cert_to_PEM_cert(der)

    trusted = (str(tmp_path / "c"), "")
    got, _ = over_tls(trusted, serve, use, "second.example", server_context=first)
    assert got.strip() == certificate.strip()
    got, _ = over_tls(pair, serve, use, "mail.example.org", server_context=first)
    assert got.strip() != certificate.strip()
    assert asked == ["second.example", "mail.example.org"]


def test_finish_over_tls_delivers_the_last_reply_and_says_goodbye(pair):
    near, far = tcp_pair()
    near.settimeout(SECONDS)
    seen = []

    def client() -> None:
        context = chasquid.client_tls_context(True, pair[0])
        with context.wrap_socket(
            near, server_hostname="mail.example.org", suppress_ragged_eofs=False
        ) as tls:
            tls.sendall(b"QUIT\r\n" + b"more\r\n" * 1000)
            time.sleep(0.05)
            while piece := tls.recv(100):  # an end without a goodbye would raise
                seen.append(piece)

    thread = threading.Thread(target=client)
    thread.start()

    async def main(loop):
        stream = Stream(loop, far)
        with loop.deadline(SECONDS):
            await stream.start_tls(chasquid.server_tls_context(*pair), server_side=True)
            stream.write(b"221 " + await stream.read_line() + b"\r\n")
            await stream.finish()

    run(main)
    thread.join()
    assert b"".join(seen) == b"221 QUIT\r\n"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_versions_of_tls_that_are_broken_are_off_on_both_sides(pair, version):
    for context in (chasquid.server_tls_context(*pair), chasquid.client_tls_context(False)):
        assert context.minimum_version > version


def test_a_certificate_that_does_not_fit_its_key_is_refused_with_its_file(pair, tmp_path):
    _, other_key = chasquid.self_signed_certificate(["x.example"], time.time())
    (tmp_path / "other.pem").write_text(other_key)
    with pytest.raises(chasquid.ConfigError, match=r"cert.pem: expected a certificate chain"):
        chasquid.server_tls_context(pair[0], str(tmp_path / "other.pem"))


def test_a_certificate_that_is_missing_or_none_is_refused_with_its_file(pair, tmp_path):
    with pytest.raises(chasquid.ConfigError, match="none.pem: it cannot be read"):
        chasquid.server_tls_context(str(tmp_path / "none.pem"), pair[1])
    (tmp_path / "garbage.pem").write_bytes(b"\x00garbage")
    with pytest.raises(chasquid.ConfigError, match=r"garbage.pem: expected"):
        chasquid.server_tls_context(str(tmp_path / "garbage.pem"), pair[1])


# --- connect --------------------------------------------------------------------------------


def connected(host: str, port: int = 0):
    async def main(loop):
        with loop.deadline(SECONDS):
            stream = await chasquid.connect(loop, host, port)
        try:
            return await stream.read_line()
        finally:
            stream.close()

    return run(main)


@pytest.mark.parametrize("family", ["IPv4", "IPv6", "unix"])
def test_connect_reaches_addresses_and_paths(family, tmp_path):
    if family == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        place = (str(tmp_path / "s"), 0)
    else:
        kind, host = (socket.AF_INET, "127.0.0.1") if family == "IPv4" else (socket.AF_INET6, "::1")
        try:
            listener = socket.create_server((host, 0), family=kind)
        except OSError:
            pytest.skip(f"this machine has no {family}")
        place = (host, listener.getsockname()[1])

    def greet() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"220 hi\r\n")

    thread = threading.Thread(target=greet)
    thread.start()
    try:
        assert connected(*place) == b"220 hi"
    finally:
        thread.join()
        listener.close()


def test_connect_tells_where_and_why_it_failed(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Disconnected, match=rf"127\.0\.0\.1\]?:{port}: Connection refused"):
        connected("127.0.0.1", port)
    with pytest.raises(Disconnected, match="No such file"):
        connected(str(tmp_path / "none"))
