# SPDX-License-Identifier: Apache-2.0
"""Behind HAProxy: the server sees its clients' addresses, not the proxy's."""

from __future__ import annotations

import base64
import smtplib
import socket
import ssl
import time

import pytest

from .clients import swaks
from .peers import Haproxy
from .server import USERS, Behind
from .tools import LOOPBACK, letter

CLIENT = "127.0.0.77"  # what is all loopback still has many addresses
LOGIN = ("--auth", "PLAIN", "--auth-user", "ana@here.example", "--auth-password", "secret")
AS_ANA = ("--from", "ana@here.example", "--to", "bob@here.example")

both_versions = pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2"])


class BehindAndStrict(Behind):
    flags = ("haproxy_incoming", "limit_loopback")


@pytest.fixture
def both(start, names):
    """Return a function that starts both, for one version of the header."""

    def both(send, kind=Behind, **settings):
        chasquid = start(kind, names, users=USERS, **settings)
        return chasquid, start(Haproxy, [(port, send) for port in chasquid.ports])

    return both


def connected(host, port, source):
    client = smtplib.SMTP(host, port, "client.example", 20, source_address=(source, 0))
    client._host = "localhost"  # the name in the certificate
    client.ehlo()
    return client


def received(message):
    return " ".join(message["Received"].split())


@both_versions
@pytest.mark.parametrize(
    ("host", "source", "literal"),
    [(LOOPBACK, CLIENT, f"[{CLIENT}]"), ("::1", "::1", "[IPv6:::1]")],
)
def test_received_and_log_see_the_client(both, send, host, source, literal):
    chasquid, haproxy = both(send)
    message = letter("through", "carl@client.example", "ana@here.example")
    with connected(host, haproxy.ports[0], source) as client:
        client.starttls(context=chasquid.tls_context())
        client.ehlo()
        client.send_message(message, "carl@client.example", ["ana@here.example"])
    [arrived] = chasquid.wait_for_letters("ana@here.example")
    assert f"from client.example ({literal}) by mail.here.example" in received(arrived)
    assert "ESMTPS" in received(arrived)
    chasquid.wait_for_log(f"peer={source} port=smtp helo=client.example")


@both_versions
def test_spf_sees_the_client(both, names, send):
    chasquid, haproxy = both(send)
    names.records["client.example"] = {"TXT": [f'"v=spf1 ip4:{CLIENT} -all"']}
    message = letter("judged", "carl@client.example", "ana@here.example")
    with connected(LOOPBACK, haproxy.ports[0], CLIENT) as client:
        client.send_message(message, "carl@client.example", ["ana@here.example"])
    [arrived] = chasquid.wait_for_letters("ana@here.example")
    assert arrived["Received-SPF"].startswith("pass")
    with connected(LOOPBACK, haproxy.ports[0], "127.0.0.78") as client:
        code, text = client.mail("carl@client.example")
        assert (code, text[:7]) == (550, b"5.7.23 ")
        assert b"127.0.0.78" in text


@both_versions
@pytest.mark.parametrize("way", ["submission", "submission over TLS"])
def test_users_submit_through_it(both, send, way):
    chasquid, haproxy = both(send)
    port, tls = {
        "submission": (haproxy.ports[1], "--tls"),
        "submission over TLS": (haproxy.ports[2], "--tls-on-connect"),
    }[way]
    session = swaks(port, tls, *LOGIN, *AS_ANA, "--local-interface", CLIENT)
    assert session.status == 0, session.text
    [arrived] = chasquid.wait_for_letters("bob@here.example")
    assert CLIENT not in received(arrived), "where our users are is nobody's business"
    name = f'"{way}"' if " " in way else way
    chasquid.wait_for_log(f"peer={CLIENT} port={name} helo=client.example user=ana@here.example")


def test_a_hello_of_tls_comes_together_with_the_header(both):
    chasquid, haproxy = both("send-proxy-v2")
    context = chasquid.tls_context()
    for _ in range(20):
        raw = socket.create_connection((LOOPBACK, haproxy.ports[2]), 20)
        with context.wrap_socket(raw, server_hostname="localhost") as tls:
            assert isinstance(tls, ssl.SSLSocket)
            assert tls.recv(1000).startswith(b"220 ")


def test_limits_are_those_of_the_client_and_not_of_the_proxy(both):
    chasquid, haproxy = both("send-proxy", BehindAndStrict, max_connections_per_address=2)
    port = haproxy.ports[0]
    with connected(LOOPBACK, port, CLIENT), connected(LOOPBACK, port, CLIENT):
        with pytest.raises(smtplib.SMTPConnectError, match="421"):
            connected(LOOPBACK, port, CLIENT)
        with connected(LOOPBACK, port, "127.0.0.78") as other:
            assert other.noop()[0] == 250
    chasquid.wait_for_log(f"peer={CLIENT} port=smtp limit=connections")


def test_a_failed_login_is_logged_with_the_client(both):
    chasquid, haproxy = both("send-proxy")
    with connected(LOOPBACK, haproxy.ports[1], CLIENT) as client:
        client.starttls(context=chasquid.tls_context())
        client.ehlo()
        secret = base64.b64encode(b"\0ana@here.example\0guessed").decode()
        assert client.docmd("AUTH PLAIN", secret)[0] == 535
    chasquid.wait_for_log(f"peer={CLIENT} port=submission user=ana@here.example")


def test_its_health_checks_are_no_mail_and_harm_nobody(both):
    chasquid, haproxy = both("send-proxy-v2 check check-send-proxy inter 100ms")
    time.sleep(0.5)
    with connected(LOOPBACK, haproxy.ports[0], CLIENT) as client:
        message = letter("checked", "carl@client.example", "ana@here.example")
        client.send_message(message, "carl@client.example", ["ana@here.example"])
    [arrived] = chasquid.wait_for_letters("ana@here.example")
    assert f"([{CLIENT}])" in received(arrived)
    assert "Traceback" not in chasquid.log()
    assert "server chasquid is DOWN" not in haproxy.log()


def test_a_proxy_that_sends_no_header_is_not_served(both):
    chasquid, haproxy = both("")
    with socket.create_connection((LOOPBACK, haproxy.ports[0]), 20) as client:
        client.sendall(b"EHLO client.example\r\n")
        assert client.recv(1000) == b""
    chasquid.wait_for_log("expected a PROXY header")
