# SPDX-License-Identifier: Apache-2.0
"""Room WEB: challenges, MTA-STS policies, autoconfig, HTTP and HTTPS on one port."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    HOST,
    SECONDS,
    Serve,
    Server,
    certificate,
    run,
    searched,
    started_by_systemd,
    trusting,
    wait_for,
    write_certificate,
)

import chasquid
from chasquid import Challenges, HttpRequest, Loop, Web, WebSite

DOMAIN = "here.example"
IDN = "xn--and-6ma2c.example"
SITE = WebSite(HOST, frozenset((DOMAIN, IDN)), chasquid.sts_policy_text([HOST]))
AUTODISCOVER = "/autodiscover/autodiscover.xml"
SCHEMA = "{http://schemas.microsoft.com/exchange/autodiscover/outlook/responseschema/2006a}"


def answer(
    path: str, host: str = DOMAIN, method: str = "GET", body: str = "", **tokens: str
) -> tuple[int, str, str]:
    """Return status, content type and body of what is answered."""

    async def main(loop: Loop) -> bytes:
        challenges = Challenges()
        challenges.tokens.update(tokens)
        log = chasquid.Log(*[chasquid.Sink("<stdout>", loop.clock)] * 2)
        web = Web(loop, log, challenges, lambda: SITE)
        return web.respond(HttpRequest(method, path, "", {"host": host}), body.encode())

    head, _, text = run(main).decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), fields["Content-Type"], text


# --- what is there ---


def test_the_policy_of_a_domain() -> None:
    status, kind, text = answer("/.well-known/mta-sts.txt", "mta-sts.here.example")
    assert (status, kind) == (200, "text/plain")
    assert text == (
        "version: STSv1\n"
        "mode: enforce\n"
        "mx: mail.here.example\n"
        "max_age: 604800\n"
    )  # fmt: skip
    parsed = chasquid.parse_sts_policy(text.encode(), "1", 0.0)
    assert parsed.allows(HOST) and parsed.mode == "enforce"


def test_the_id_of_a_policy_changes_with_it() -> None:
    ids = [
        chasquid.sts_policy_id(chasquid.sts_policy_text(hosts, mode))
        for hosts, mode in (([HOST], "enforce"), ([HOST], "testing"), ([HOST, "b.example"], "none"))
    ]
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9]{1,32}", id) for id in ids)  # RFC 8461, 3.1


@pytest.mark.parametrize(
    ("host", "path"),
    [
        ("autoconfig.here.example", "/mail/config-v1.1.xml"),
        ("autoconfig.here.example:80", "/.well-known/autoconfig/mail/config-v1.1.xml"),
        ("HERE.example.", "/.well-known/autoconfig/mail/config-v1.1.xml"),
    ],
)
def test_thunderbird_is_told_of_the_services(host: str, path: str) -> None:
    status, kind, text = answer(path, host)
    assert (status, kind) == (200, "text/xml; charset=utf-8")
    provider = xml.etree.ElementTree.fromstring(text)[0]
    assert provider.get("id") == provider.findtext("domain") == DOMAIN
    assert [
        (server.tag, server.get("type"), *(child.text for child in server))
        for server in (*provider.iter("incomingServer"), *provider.iter("outgoingServer"))
    ] == [
        ("incomingServer", "imap", HOST, "993", "SSL", "password-cleartext", "%EMAILADDRESS%"),
        ("outgoingServer", "smtp", HOST, "465", "SSL", "password-cleartext", "%EMAILADDRESS%"),
        ("outgoingServer", "smtp", HOST, "587", "STARTTLS", "password-cleartext", "%EMAILADDRESS%"),
    ]


def asked_by_outlook(address: str) -> str:
    schema = "http://schemas.microsoft.com/exchange/autodiscover/outlook"
    return (
        f'<?xml version="1.0"?><Autodiscover xmlns="{schema}/requestschema/2006"><Request>'
        f"<EMailAddress>{address}</EMailAddress>"
        f"<AcceptableResponseSchema>{schema}/responseschema/2006a</AcceptableResponseSchema>"
        "</Request></Autodiscover>"
    )


@pytest.mark.parametrize("path", [AUTODISCOVER, "/Autodiscover/Autodiscover.xml"])
def test_outlook_is_told_of_the_services(path: str) -> None:
    status, kind, text = answer(path, HOST, "POST", asked_by_outlook("ana@here.example"))
    assert (status, kind) == (200, "text/xml; charset=utf-8")
    protocols = list(xml.etree.ElementTree.fromstring(text).iter(f"{SCHEMA}Protocol"))
    assert [
        [protocol.findtext(SCHEMA + name) for name in ("Type", "Server", "Port", "LoginName")]
        for protocol in protocols
    ] == [["IMAP", HOST, "993", "ana@here.example"], ["SMTP", HOST, "465", "ana@here.example"]]


def test_an_address_comes_back_as_text_and_nothing_else() -> None:
    evil = "&lt;b&gt;&amp;&quot;&apos;@here.example"
    status, _, text = answer(AUTODISCOVER, HOST, "POST", asked_by_outlook(evil))
    assert status == 200
    [login, _] = xml.etree.ElementTree.fromstring(text).iter(f"{SCHEMA}LoginName")
    assert login.text == "<b>&\"'@here.example"
    assert "<b>" not in text


def test_an_address_may_have_an_international_domain() -> None:
    assert answer(AUTODISCOVER, HOST, "POST", asked_by_outlook("ana@ñandú.example"))[0] == 200


def test_the_answer_to_a_challenge_is_there_under_any_name() -> None:
    found = answer("/.well-known/acme-challenge/abc", "else.example", abc="abc.print")
    assert found == (200, "application/octet-stream", "abc.print")


def test_head_has_no_body() -> None:
    assert answer("/.well-known/mta-sts.txt", "mta-sts.here.example", "HEAD")[::2] == (200, "")


# --- what is not there ---


@pytest.mark.parametrize(
    ("method", "host", "path"),
    [
        ("GET", HOST, "/"),
        ("GET", DOMAIN, "/.well-known/mta-sts.txt"),
        ("GET", "mta-sts.else.example", "/.well-known/mta-sts.txt"),
        ("GET", "mta-sts.here.example", "/"),
        ("GET", "mta-sts.here.example", "/mail/config-v1.1.xml"),
        ("GET", "autoconfig.else.example", "/mail/config-v1.1.xml"),
        ("GET", DOMAIN, "/mail/config-v1.1.xml"),
        ("GET", "a]b", "/mail/config-v1.1.xml"),
        ("GET", "", "/.well-known/autoconfig/mail/config-v1.1.xml"),
        ("GET", DOMAIN, "/.well-known/acme-challenge/"),
        ("GET", DOMAIN, "/.well-known/acme-challenge/other"),
        ("GET", DOMAIN, "/.well-known/acme-challenge/../../etc/passwd"),
        ("GET", DOMAIN, AUTODISCOVER),
        ("POST", "mta-sts.here.example", "/.well-known/mta-sts.txt"),
        ("PUT", DOMAIN, "/.well-known/autoconfig/mail/config-v1.1.xml"),
        ("GET", DOMAIN, "/metrics"),
    ],
)
def test_all_else_is_not_found(method: str, host: str, path: str) -> None:
    assert answer(path, host, method, abc="x")[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<EMailAddress></EMailAddress>",
        asked_by_outlook("ana@else.example"),
        asked_by_outlook("ana"),
        asked_by_outlook("ana@" + "x" * 300),
        asked_by_outlook("<b>ana@here.example</b>"),
        asked_by_outlook("ana@\ud7ff.example"),
    ],
)
def test_outlook_is_told_nothing_of_others(body: str) -> None:
    assert answer(AUTODISCOVER, HOST, "POST", body)[0] == 404


@searched
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=60))
def test_no_request_is_too_strange(path: str, host: str, address: str) -> None:
    for method in ("GET", "POST"):
        body = asked_by_outlook(address).encode("utf-8", "replace").decode()
        assert answer("/" + path, host, method, body)[0] in (200, 404)


# --- on the wire ---


def port(server: Server) -> int:
    return int(server.daemon._listeners.web[0].getsockname()[1])


@pytest.fixture
def web(serve: Serve) -> Server:
    return serve(web_address="127.0.0.1:0")


@contextlib.contextmanager
def connected(server: Server, *, tls: str = "") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port(server)), SECONDS) as raw:
        if not tls:
            yield raw
            return
        with trusting().wrap_socket(raw, server_hostname=tls) as wrapped:
            yield wrapped


def request(server: Server, host: str, path: str, *, tls: bool = False, name: str = HOST) -> str:
    with connected(server, tls=name if tls else "") as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@pytest.mark.parametrize("tls", [False, True])
def test_http_and_https_come_to_the_same_port(web: Server, tls: bool) -> None:
    text = request(web, "mta-sts.here.example", "/.well-known/mta-sts.txt", tls=tls)
    assert text.startswith("HTTP/1.1 200 OK\r\n")
    assert "mx: mail.here.example\n" in text


def test_a_policy_is_for_testing_until_the_certificate_is_an_authority_s(web: Server) -> None:
    text = request(web, "mta-sts.here.example", "/.well-known/mta-sts.txt", tls=True)
    assert "mode: testing\n" in text


def test_a_new_domain_is_served_after_a_reload(web: Server) -> None:
    path = "/.well-known/autoconfig/mail/config-v1.1.xml"
    assert " 404 " in request(web, "new.example", path)
    web.write("domains/new.example/aliases", b"")
    web.daemon.reload()
    wait_for(lambda: " 200 " in request(web, "new.example", path), "the domain to be served")


def test_https_shows_the_certificate_for_the_name(web: Server) -> None:
    write_certificate(web.config_dir / "certs" / "sts", "mta-sts.here.example")
    web.daemon.reload()
    expected = ssl.PEM_cert_to_DER_cert(certificate("mta-sts.here.example")[0])

    def shown() -> bytes | None:
        with connected(web, tls="mta-sts.here.example") as connection:
            assert isinstance(connection, ssl.SSLSocket)
            return connection.getpeercert(binary_form=True)

    wait_for(lambda: shown() == expected, "the new certificate")


def test_without_a_certificate_only_http_is_spoken(serve: Serve) -> None:
    server = serve(web_address="127.0.0.1:0", certificates=())
    assert " 404 " in request(server, DOMAIN, "/")
    with pytest.raises((ssl.SSLError, OSError)):
        request(server, DOMAIN, "/", tls=True)


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO x\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"\x16\x03\x01\x00\x00",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101,
        b"GET /" + b"a" * 10_000,
    ],
    ids=["smtp", "no hello", "empty record", "zeros", "many headers", "long line"],
)
def test_what_is_no_request_ends_the_connection(web: Server, octets: bytes) -> None:
    with connected(web) as connection:
        connection.sendall(octets)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert b"200" not in connection.recv(65536)
    assert " 404 " in request(web, DOMAIN, "/")


def test_a_hello_in_pieces_is_waited_for(web: Server) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client.wrap_bio(incoming, outgoing, server_hostname=HOST)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    with connected(web) as connection:
        for piece in (hello[:3], hello[3:100], hello[100:]):
            time.sleep(0.03)
            connection.sendall(piece)
        assert connection.recv(1) == b"\x16"


def test_a_body_that_is_too_large_is_refused(web: Server) -> None:
    with connected(web) as connection:
        head = f"POST {AUTODISCOVER} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 20000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_one_client_has_a_few_connections_at_a_time(web: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(chasquid._WEB_CONNECTIONS_EACH):
            stack.enter_context(connected(web)).sendall(b"G")
        with connected(web) as another:
            assert another.recv(1) == b""
    wait_for(lambda: not web.daemon._web._open, "the connections to be counted down")
    assert " 404 " in request(web, DOMAIN, "/")


def test_an_authority_gets_the_certificate_of_its_challenge_and_no_other(
    web: Server, tmp_path: Path
) -> None:
    digest = bytes(range(32))
    context = None
    for name in (HOST, "other.example"):
        chain, key = chasquid.challenge_certificate(name, digest, time.time())
        path = tmp_path / f"{name}.pem"
        path.write_text(chain + key)
        context = chasquid.server_tls_context(str(path), str(path))
        web.daemon._web._challenges.add(name, context)
    client = trusting()
    client.set_alpn_protocols(["acme-tls/1"])
    for name in (HOST, "other.example"):
        expected = (tmp_path / f"{name}.pem").read_text().partition("-----BEGIN EC")[0]
        with (
            connected(web) as raw,
            client.wrap_socket(raw, server_hostname=name) as tls,
        ):
            assert tls.selected_alpn_protocol() == "acme-tls/1"
            assert tls.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(expected)
            assert tls.recv(1) == b""
    with connected(web) as raw, pytest.raises(ssl.SSLError):
        client.wrap_socket(raw, server_hostname="third.example")
    with connected(web, tls=HOST) as tls:  # any other client sees what it always does
        assert isinstance(tls, ssl.SSLSocket)
        usual = ssl.PEM_cert_to_DER_cert(certificate(HOST)[0])
        assert tls.getpeercert(binary_form=True) == usual
    web.daemon._web._challenges.remove(HOST)
    with connected(web) as raw, pytest.raises(ssl.SSLError):
        client.wrap_socket(raw, server_hostname=HOST)


def test_systemd_passes_its_socket_by_name(tmp_path: Path) -> None:
    server = Server(tmp_path, web_address="systemd")
    with (
        started_by_systemd(server, "smtp", "web") as (_, ports),
        socket.create_connection(("127.0.0.1", ports[1]), SECONDS) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
