# SPDX-License-Identifier: Apache-2.0
"""CERTIFICATE: one made from arithmetic alone, and the names in those of others."""

from __future__ import annotations

import datetime
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lower import chasquid, searched

NAMES = ["mail.example.org", "ñandú.example", "127.0.0.1", "::1", "localhost"]
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The paths of a certificate and of its key."""
    directory = tmp_path_factory.mktemp("certificate")
    certificate, key = chasquid.self_signed_certificate(NAMES, time.time())
    (directory / "cert.pem").write_text(certificate)
    (directory / "key.pem").write_text(key)
    return str(directory / "cert.pem"), str(directory / "key.pem")


def openssl(*arguments: str) -> str:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_openssl
def test_openssl_reads_the_certificate_as_it_was_meant(pair):
    text = openssl("x509", "-in", pair[0], "-noout", "-text", "-nameopt", "utf8")
    assert "Version: 3" in text
    assert "ecdsa-with-SHA256" in text
    assert "prime256v1" in text
    assert "CN=mail.example.org" in text.replace(" = ", "=")
    assert "CA:FALSE" in text
    alternative = re.search(r"Subject Alternative Name:[^\n]*\n *([^\n]*)", text)
    assert alternative
    assert alternative[1].split(", ") == [
        "DNS:mail.example.org",
        "DNS:xn--and-6ma2c.example",
        "IP Address:127.0.0.1",
        "IP Address:0:0:0:0:0:0:0:1",
        "DNS:localhost",
    ]


@needs_openssl
@pytest.mark.parametrize("strict", [[], ["-x509_strict"]])
def test_openssl_verifies_the_signature_the_purpose_and_the_name(pair, strict):
    openssl("verify", "-CAfile", pair[0], "-purpose", "sslserver", "-check_ss_sig", *strict,
            "-verify_hostname", "mail.example.org", pair[0])  # fmt: skip
    openssl("verify", "-CAfile", pair[0], "-verify_ip", "127.0.0.1", pair[0])


@needs_openssl
def test_openssl_finds_the_key_sound_and_fitting(pair):
    openssl("ec", "-in", pair[1], "-check", "-noout")
    public = openssl("ec", "-in", pair[1], "-pubout")
    assert openssl("x509", "-in", pair[0], "-noout", "-pubkey") == public


@needs_openssl
def test_every_signature_of_many_is_right(tmp_path):
    """Each has a new key and a new nonce; a slip in the arithmetic shows in some."""
    for number in range(8):
        path = tmp_path / f"{number}.pem"
        path.write_text(chasquid.self_signed_certificate([f"n{number}.example"], time.time())[0])
        openssl("verify", "-CAfile", str(path), "-check_ss_sig", str(path))


def told_of(certificate: str, *what: str) -> dict[str, str]:
    """What openssl says in lines of the form name=value."""
    done = subprocess.run(
        ["openssl", "x509", "-noout", *what], input=certificate, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@needs_openssl
def test_it_is_valid_from_yesterday_for_ten_years():
    now = 1_800_000_000.0
    made, _ = chasquid.self_signed_certificate(["a.example"], now)
    dates = told_of(made, "-dates")
    assert ssl.cert_time_to_seconds(dates["notBefore"]) == now - 86400
    assert ssl.cert_time_to_seconds(dates["notAfter"]) == now + 3650 * 86400


@needs_openssl
def test_a_date_after_2049_is_written_in_full():
    now = datetime.datetime(2049, 6, 1, tzinfo=datetime.UTC).timestamp()
    made, _ = chasquid.self_signed_certificate(["a.example"], now)
    dates = told_of(made, "-dates")
    assert dates["notBefore"].endswith(" 2049 GMT")
    assert dates["notAfter"].endswith(" 2059 GMT")


@needs_openssl
def test_no_two_have_the_same_serial_or_key():
    pairs = [chasquid.self_signed_certificate(["a.example"], time.time()) for _ in range(3)]
    serials = {told_of(made, "-serial")["serial"] for made, _ in pairs}
    assert len(serials) == len({key for _, key in pairs}) == 3


def handshake(pair, context: ssl.SSLContext, name: str) -> str | None:
    """Talk to a server with the certificate; what the client says of it, None for fine."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*pair)
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True) as tls:
                tls.sendall(b"hello")
                tls.recv(1)
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with context.wrap_socket(near, server_hostname=name) as tls:
            assert tls.recv(5) == b"hello"
        return None
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        near.close()
        thread.join()


@pytest.mark.parametrize("name", ["mail.example.org", "ñandú.example", "127.0.0.1", "::1"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_client_that_trusts_it_accepts_each_of_its_names(pair, name, strict):
    context = ssl.create_default_context(cafile=pair[0])
    if strict:
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert handshake(pair, context, chasquid.domain_to_ascii(name)) is None


def test_a_client_refuses_other_names_and_whoever_does_not_trust_it(pair):
    trusting = ssl.create_default_context(cafile=pair[0])
    assert "mismatch" in (handshake(pair, trusting, "other.example.org") or "")
    assert "self" in (handshake(pair, ssl.create_default_context(), "mail.example.org") or "")


# --- certificate_names ------------------------------------------------------------------------


def test_the_names_of_our_own_certificate_are_its_hosts(pair):
    with open(pair[0], "rb") as file:
        names = chasquid.certificate_names(file.read())
    assert names == {"mail.example.org", "xn--and-6ma2c.example", "localhost"}


def made_by_openssl(directory, *extensions: str) -> bytes:
    arguments = [part for one in extensions for part in ("-addext", one)]
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", str(directory / "k"), "-out", str(directory / "c"), "-days", "2",
            "-subj", "/CN=cn.example", *arguments)  # fmt: skip
    return (directory / "c").read_bytes()


MANY = [f"host{number}.example.org" for number in range(60)]


@needs_openssl
@pytest.mark.parametrize(
    ("extensions", "names"),
    [
        (["subjectAltName=DNS:a.example"], {"a.example"}),
        (["subjectAltName=DNS:A.Example,DNS:*.b.example,IP:192.0.2.1,email:x@y.example"],
         {"a.example", "*.b.example"}),
        (["subjectAltName=critical,DNS:a.example"], {"a.example"}),
        (["keyUsage=digitalSignature", "subjectAltName=URI:https://x.example/,DNS:a.example"],
         {"a.example"}),
        (["subjectAltName=" + ",".join(f"DNS:{name}" for name in MANY)], set(MANY)),
        (["subjectAltName=IP:192.0.2.1"], set()),
        ([], set()),
    ],
    ids=["one", "mixed", "critical", "among others", "many", "no host", "none"],
)  # fmt: skip
def test_the_names_in_certificates_of_openssl(tmp_path, extensions, names):
    assert chasquid.certificate_names(made_by_openssl(tmp_path, *extensions)) == names


def test_only_the_first_certificate_of_a_chain_counts(pair):
    with open(pair[0], "rb") as file:
        first = file.read()
    second = chasquid.self_signed_certificate(["other.example"], time.time())[0].encode()
    chain = b"a comment\n" + first + second
    assert "other.example" not in chasquid.certificate_names(chain)
    assert chasquid.certificate_names(chain) == chasquid.certificate_names(first)


@searched
@given(st.binary(max_size=200))
def test_any_octets_have_names_or_none(data):
    assert isinstance(chasquid.certificate_names(data), set)
    pem = b"-----BEGIN CERTIFICATE-----" + data + b"-----END CERTIFICATE-----"
    assert isinstance(chasquid.certificate_names(pem), set)


@searched
@given(st.data())
def test_a_damaged_certificate_has_names_or_none(pair, data):
    with open(pair[0]) as file:
        der = bytearray(ssl.PEM_cert_to_DER_cert(file.read()))
    for _ in range(data.draw(st.integers(1, 6))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    der = der[: data.draw(st.integers(0, len(der)))]
    names = chasquid.certificate_names(ssl.DER_cert_to_PEM_cert(bytes(der)).encode())
    assert all(isinstance(name, str) for name in names)
