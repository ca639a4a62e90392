# SPDX-License-Identifier: Apache-2.0
"""Room KEYS: certificates made and read, Ed25519, RSA keys; all from arithmetic alone."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import re
import socket
import ssl
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import needs_openssl, searched, searched_briefly

import chasquid

NAMES = ["mail.example.org", "ñandú.example", "127.0.0.1", "::1", "localhost"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The paths of a certificate and of its key."""
    directory = tmp_path_factory.mktemp("certificate")
    certificate, key = chasquid.self_signed_certificate(NAMES, time.time())
    (directory / "cert.pem").write_text(certificate)
    (directory / "key.pem").write_text(key)
    return str(directory / "cert.pem"), str(directory / "key.pem")


def openssl(*arguments: str) -> str:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60)
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


# --- keys on P-256, and requests for certificates ---


def test_an_ec_key_is_read_back_as_it_was_written():
    for key in (chasquid.new_ec_key(), chasquid._ec_key(1), chasquid._ec_key(chasquid._N - 1)):
        assert chasquid.parse_ec_key(key.to_pem().encode(), "key.pem") == key


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"rubbish",
        b"-----BEGIN EC PRIVATE KEY-----\n!\n-----END EC PRIVATE KEY-----",
        b"-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----",
        chasquid._ec_key(1)._replace(secret=0).to_pem().encode(),
        chasquid._ec_key(1)._replace(secret=chasquid._N).to_pem().encode(),
        chasquid.Ed25519Key(bytes(32)).to_pem().encode(),
    ],
)
def test_what_is_no_ec_key_is_told_of(pem):
    with pytest.raises(chasquid.ConfigError, match=r"^key.pem: expected an EC PRIVATE KEY on "):
        chasquid.parse_ec_key(pem, "key.pem")


@needs_openssl
def test_openssl_reads_an_ec_key(tmp_path):
    key = chasquid.new_ec_key()
    (tmp_path / "key.pem").write_text(key.to_pem())
    openssl("ec", "-in", str(tmp_path / "key.pem"), "-check", "-noout")
    public = openssl("ec", "-in", str(tmp_path / "key.pem"), "-pubout")
    assert public == chasquid._pem("PUBLIC KEY", key.public)


@needs_openssl
def test_openssl_finds_a_request_good(tmp_path):
    path = tmp_path / "request"
    path.write_bytes(chasquid.certificate_request(chasquid.new_ec_key(), "ñandú.example"))
    text = openssl("req", "-inform", "DER", "-in", str(path), "-noout", "-verify", "-text")
    assert "DNS:xn--and-6ma2c.example\n" in text
    assert "ecdsa-with-SHA256" in text


@needs_openssl
def test_openssl_reads_the_answer_to_a_challenge(tmp_path):
    chain, _ = chasquid.challenge_certificate("a.example", b"\xab" * 32, time.time())
    (tmp_path / "cert.pem").write_text(chain)
    text = openssl("asn1parse", "-in", str(tmp_path / "cert.pem"))
    extension = text.partition("1.3.6.1.5.5.7.1.31")[2]
    assert re.search(r"\A\n.*BOOLEAN +:255\n.*OCTET STRING .*:0420(AB){32}\n", extension)


def test_who_has_issued_a_certificate_can_be_told():
    chain, _ = chasquid.self_signed_certificate(["a.example"], time.time())
    assert chasquid.is_self_signed(chain.encode())
    with pytest.raises(ValueError):
        chasquid.is_self_signed(b"")


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
    arguments = [part for extension in extensions for part in ("-addext", extension)]
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


# --- Ed25519 ------------------------------------------------------------------------------------

# RFC 8032, 7.1: secret key, public key, message, signature.
LONG_MESSAGE = """
CLiytzNCQkN2D+QmpLVJCGMhEKZsL2WR6r0zRePk65j6biZL8J7+Eu5Q+PVOn3ex41X2xQVE4j+xQz3fc76E2HnefABG3EmW
2edz9Lye/lc4gprbJsgbN8k6GycLIDKdZYZ1/G6lNOCBCkQygmv1jJQe+2XVejOLvS4mZA+J/7wahY78uFUO46XhmYvRd+k6
c2PDRP5rGZ7l0C6C1SLE/roVRS+AKIqCGleRFuxtrSs7MQ2pA0AapiEAq10aNlU+BiA7M4kMybgy9574BWDMuaOc52eWftYo
xq1XPLEW2+/v11SZ2pa9aKipe5KKi7wQO2Yh/N4r7KEjHSBr5s2ex6/29slPzXIE7TRVxoyD9KQdpK8rdO9cU/HYrHC9y37R
hc6BvYQ1nUQlTZVinphVqUp8GVjR+K2l0FMu2KWqP7LRe6cOtiSOWU4aIpesu7OdUC8ajG628c4is94aH0DMJFVBGagxqarW
B5ytiEJd5r3hqRh+u2CSz2e/KxP9ZfJwiNeLfog8h1nSxPXGWtt1U4eK1XX5+th46AoMm6Y7y8wnMuaUhbvJyQv71iSB2Qib
7M+Az+LfFqLPZb2S3Vl7BwfgkXr0i7t1/tQT0jj1VVp6Vp2Aw0FKjQhZ3GWkYSi6snr4enExTzGMeCsj6/6Ai4KwziZAHS4i
8E2D0SVdxRrd07daKxrgeEUE31Q6+Jab4+pwgv9/yYiMFE2ir1hCnslgMdvK09rZrw3Lqq8mjLj8/+rZTzx8pJXgVqm0es23
Uftz5mbGxlWt6Clyl9B60bpeQ/G8oyMBZRM54ikEzIxC9YwwwEqv2wON2ghH3ZiNzabzv9FcS0xFJQBKoG7v+MpheDqs7Ff7
PR+SsP4v0ahfZyRRe2XmFK1oCNb27jTf9zEP3IKuv9kEsB4dxUspJwlLLbaNb5A7aEAa3r9afgjXj/TvXWNlOmUEDPm/1Kyn
mEp003FFmGeA/AsWrEUWSd5hiKfb3xkfZLX8Xiq0e1f39yds1BnBejyo4bk5rknkiKy6a5ZWELVIAQnIsXuA4be3UN/HWY1d
UBH9LcxWAKMu9bUqHsyCDjCKo0JyGqwJQ79mhrZLJXk3ZQTMxJPZfmrtP7D5zXGkPdSX8B8XwOLLN5eqKi8lZlYWjmxJavxf
uTJG9rERY5ijRvGmQfOwQemJ95FPkMwsf/81eHblBrUNM0unfCJbwwe6U3FS8/FhDk6v5ZX22dkNEfqpM6Fe8TaVRoaKfzpF
qWdo1A/Z0DQSwJHGMVz0/efLaGBpNzgNsuqqcHtMQYXDLt3N0wZwXk3B/8hy7u5HWmTfrIarpBwGGJg/h0HF72jToQHoo7jK
xgyQXBX8kQhAuUwAoLnQ
"""
VECTORS = {
    "1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        b"",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    "2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        b"\x72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    "3": (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        b"\xaf\x82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    "1024": (
        "f5e5767cf153319517630f226876b86c8160cc583bc013744c6bf255f5cc0ee5",
        "278117fc144c72340f67d0f2316e8386ceffbf2b2428c9c51fef7c597f1d426e",
        base64.b64decode(LONG_MESSAGE),
        "0aab4c900501b3e24d7cdf4663326a3a87df5e4843b2cbdb67cbf6e460fec350"
        "aa5371b1508f9f4528ecea23c436d94b5e8fcd4f681e30a6ac00a9704a188a03",
    ),
    "SHA(abc)": (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").digest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
}
ORDER = 2**252 + 27742317777372353535851937790883648493
PRIME = 2**255 - 19


@pytest.mark.parametrize("name", VECTORS)
def test_the_examples_of_the_standard_are_signed_as_it_says(name):
    seed, public, message, signature = VECTORS[name]
    key = chasquid.Ed25519Key(bytes.fromhex(seed))
    assert key.public.hex() == public
    assert key.sign(message).hex() == signature


@pytest.mark.parametrize("name", VECTORS)
def test_the_examples_of_the_standard_are_valid_and_not_for_another_message(name):
    _, public, message, signature = VECTORS[name]
    octets, proof = bytes.fromhex(public), bytes.fromhex(signature)
    assert chasquid.ed25519_verify(octets, message, proof)
    assert not chasquid.ed25519_verify(octets, message + b"\0", proof)


@searched_briefly
@given(st.data())
def test_a_signature_with_one_bit_changed_is_not_valid(data):
    _, public, message, signature = VECTORS["SHA(abc)"]
    parts = [bytearray.fromhex(public), bytearray(message), bytearray.fromhex(signature)]
    part = parts[data.draw(st.integers(0, 2))]
    part[data.draw(st.integers(0, len(part) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not chasquid.ed25519_verify(*map(bytes, parts))


@pytest.mark.parametrize("times", [1, 2, 8, 15])
def test_the_same_signature_cannot_be_written_in_another_way(times):
    _, public, message, signature = VECTORS["3"]
    octets, proof = bytes.fromhex(public), bytes.fromhex(signature)
    s = int.from_bytes(proof[32:], "little") + times * ORDER
    other = proof[:32] + s.to_bytes(32, "little")
    assert not chasquid.ed25519_verify(octets, message, other)


@pytest.mark.parametrize("change", [
    lambda proof: b"", lambda proof: proof[:32], lambda proof: proof[:63],
    lambda proof: proof + b"\0", lambda proof: proof + bytes(32), lambda proof: proof * 2,
])  # fmt: skip
def test_a_signature_of_another_length_is_not_valid(change):
    _, public, message, signature = VECTORS["2"]  # its last octet is 0
    proof = bytes.fromhex(signature)
    assert not chasquid.ed25519_verify(bytes.fromhex(public), message, change(proof))


NO_POINTS = {
    "empty": b"",
    "short": bytes(31),
    "long": bytes(33),
    "y is the prime": PRIME.to_bytes(32, "little"),
    "y is the prime and one": (PRIME + 1).to_bytes(32, "little"),
    "y is the largest": (2**255 - 1).to_bytes(32, "little"),
    "minus zero": (1 | 1 << 255).to_bytes(32, "little"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_POINTS)
def test_octets_that_are_no_point_are_no_key(name):
    # read as points of small order, they would be valid for many messages with R = 1 and s = 0
    proof = (1).to_bytes(32, "little") + bytes(32)
    assert not any(
        chasquid.ed25519_verify(NO_POINTS[name], bytes([number]), proof) for number in range(40)
    )


@searched
@given(st.binary(max_size=40), st.binary(max_size=8), st.binary(max_size=70))
def test_any_octets_are_a_signature_or_none(public, message, signature):
    assert chasquid.ed25519_verify(public, message, signature) in (True, False)


@needs_openssl
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_openssl_makes_the_same_signature(tmp_path, length):
    key = chasquid.new_key("ed25519")
    message = bytes(range(256)) * 4
    (tmp_path / "k").write_text(key.to_pem())
    (tmp_path / "m").write_bytes(message[:length])
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", str(tmp_path / "k"), "-in",
            str(tmp_path / "m"), "-out", str(tmp_path / "s"))  # fmt: skip
    assert (tmp_path / "s").read_bytes() == key.sign(message[:length])


# --- private keys -------------------------------------------------------------------------------


def written(*arguments: str) -> bytes:
    """What openssl prints, as octets."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def rsa_key():
    return chasquid.new_key("rsa1024")


ED25519 = chasquid.Ed25519Key(bytes.fromhex(VECTORS["1"][0]))


@pytest.mark.parametrize("make", [rsa_key, lambda: ED25519], ids=["RSA", "Ed25519"])
@pytest.mark.parametrize("change", [bytes, lambda pem: pem.replace(b"\n", b"\r\n"),
                                    lambda pem: b"a comment\n" + pem + b"more\n"],
                         ids=["LF", "CRLF", "with text around"])  # fmt: skip
def test_a_key_that_was_written_is_read_back(make, change):
    key = make()
    assert chasquid.parse_private_key(change(key.to_pem().encode()), "k.pem") == key


@needs_openssl
def test_openssl_finds_new_keys_sound(tmp_path):
    for algorithm, text in [("rsa1024", "1024 bit"), ("rsa2048", "2048 bit"),
                            ("ed25519", "ED25519")]:  # fmt: skip
        path = tmp_path / algorithm
        path.write_text(chasquid.new_key(algorithm).to_pem())
        openssl("pkey", "-in", str(path), "-check", "-noout")
        assert text in openssl("pkey", "-in", str(path), "-noout", "-text")


@needs_openssl
def test_openssl_finds_the_same_public_key(tmp_path):
    for key in (rsa_key(), ED25519):
        (tmp_path / "k").write_text(key.to_pem())
        public = written("pkey", "-in", str(tmp_path / "k"), "-pubout", "-outform", "DER")
        assert public[-32:] == key.public if key is ED25519 else public == key.public


def test_no_two_new_keys_are_the_same():
    assert chasquid.new_key("ed25519") != chasquid.new_key("ed25519")
    one, other = chasquid.new_key("rsa1024"), chasquid.new_key("rsa1024")
    assert not {one.prime1, one.prime2} & {other.prime1, other.prime2}
    assert one.modulus.bit_length() == other.modulus.bit_length() == 1024


@needs_openssl
@pytest.mark.parametrize("form", ["PKCS#1", "PKCS#8"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_rsa_keys_of_openssl_are_read(tmp_path, form, end):
    (tmp_path / "k").write_text(rsa_key().to_pem())
    option = ["-traditional"] if form == "PKCS#1" else []
    pem = written("pkey", "-in", str(tmp_path / "k"), *option)
    assert (b"BEGIN RSA PRIVATE KEY" in pem) == (form == "PKCS#1")
    assert chasquid.parse_private_key(pem.replace(b"\n", end), "k.pem") == rsa_key()


@needs_openssl
def test_an_ed25519_key_of_openssl_is_read(tmp_path):
    pem = written("genpkey", "-algorithm", "ed25519")
    key = chasquid.parse_private_key(pem, "k.pem")
    (tmp_path / "k").write_bytes(pem)
    assert written("pkey", "-in", str(tmp_path / "k"), "-pubout", "-outform", "DER").endswith(
        key.public
    )


def refusal(pem: bytes) -> str:
    with pytest.raises(chasquid.ConfigError) as caught:
        chasquid.parse_private_key(pem, "/etc/dkim:a.pem")
    text = str(caught.value)
    assert text.startswith("/etc/dkim:a.pem: expected ") and "\n" not in text
    return text.removeprefix("/etc/dkim:a.pem: expected ")


@needs_openssl
@pytest.mark.parametrize("option", [[], ["-traditional"]], ids=["PKCS#8", "PKCS#1"])
def test_an_encrypted_key_is_refused_with_a_hint(tmp_path, option):
    (tmp_path / "k").write_text(rsa_key().to_pem())
    pem = written("pkey", "-in", str(tmp_path / "k"), "-aes128", "-passout", "pass:x", *option)
    assert b"ENCRYPTED" in pem
    assert "decrypt it with 'openssl pkey'" in refusal(pem)


@needs_openssl
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ecparam", "-name", "prime256v1", "-genkey", "-noout"], "found EC PRIVATE KEY"),
        (["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
         "the algorithm is neither RSA nor Ed25519"),
        (["genpkey", "-algorithm", "x25519"], "the algorithm is neither RSA nor Ed25519"),
        (["genpkey", "-algorithm", "ed448"], "the algorithm is neither RSA nor Ed25519"),
        (["genrsa", "512"], "an RSA key must have 1024 to 8192 bits"),
    ],
    ids=["EC", "EC in PKCS#8", "X25519", "Ed448", "short RSA"],
)  # fmt: skip
def test_a_key_that_cannot_sign_mail_is_refused(arguments, told):
    assert told in refusal(written(*arguments))


@pytest.mark.parametrize(
    "pem",
    [b"", b"hello\n", b"\xff\x00", b"-----BEGIN PRIVATE KEY-----\n",
     b"-----BEGIN PRIVATE KEY-----\n-----END RSA PRIVATE KEY-----\n"],
)  # fmt: skip
def test_what_is_no_pem_is_refused(pem):
    assert refusal(pem) == "a private key in PEM"


def as_pem(kind: str, der: bytes) -> bytes:
    return (
        f"-----BEGIN {kind}-----\n{base64.encodebytes(der).decode()}-----END {kind}-----\n".encode()
    )


def der_of(key) -> bytes:
    return base64.b64decode(re.sub(r"-----.*?-----", "", key.to_pem()))


@pytest.mark.parametrize("make", [rsa_key, lambda: ED25519], ids=["RSA", "Ed25519"])
def test_a_key_that_is_cut_short_anywhere_is_refused(make):
    der = der_of(make())
    for length in range(len(der) - 1):
        refusal(as_pem("PRIVATE KEY", der[:length]))


def test_a_key_that_does_not_say_its_algorithm_is_refused():
    for algorithm in (b"", b"\x06", b"\x05\x00"):
        content = der(0x30, integer(0), der(0x30, algorithm), der(0x04, bytes(34)))
        refusal(as_pem("PRIVATE KEY", content))


@pytest.mark.parametrize("field", chasquid.RsaKey._fields)
def test_an_rsa_key_whose_numbers_do_not_fit_together_is_refused(field):
    key = rsa_key()
    broken = key._replace(**{field: getattr(key, field) ^ 2})
    assert "do not fit together" in refusal(broken.to_pem().encode())


@searched
@given(st.data())
def test_a_damaged_key_is_read_or_refused_with_a_sentence(data):
    der = bytearray(der_of(data.draw(st.sampled_from([rsa_key(), ED25519]))))
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, min(40, len(der) - 1)))] = data.draw(st.integers(0, 255))
    kind = data.draw(st.sampled_from(["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"]))
    try:
        key = chasquid.parse_private_key(as_pem(kind, bytes(der)), "k.pem")
    except chasquid.ConfigError as error:
        assert str(error).startswith("k.pem: expected ")
    else:
        assert isinstance(key, chasquid.PrivateKey)


@searched
@given(st.binary(max_size=300), st.sampled_from(["PRIVATE KEY", "RSA PRIVATE KEY"]))
def test_any_octets_are_a_key_or_refused_with_a_sentence(data, kind):
    refusal(as_pem(kind, data))
    refusal(f"-----BEGIN {kind}-----".encode() + data + f"-----END {kind}-----".encode())


# --- public keys --------------------------------------------------------------------------------


def der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content).to_bytes(3, "big")
    return bytes([tag, 0x83]) + size + content


def integer(value: int) -> bytes:
    return der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


RSA_ALGORITHM = bytes.fromhex("300d06092a864886f70d0101010500")


def public_key(modulus: int, exponent: int, wrapped: bool = True) -> bytes:
    """SubjectPublicKeyInfo, or RSAPublicKey alone."""
    numbers = der(0x30, integer(modulus), integer(exponent))
    return der(0x30, RSA_ALGORITHM, der(0x03, b"\0", numbers)) if wrapped else numbers


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("bits", [1024, 2048, 8192])
@pytest.mark.parametrize("exponent", [3, 65537, 2**32 - 1])
def test_the_numbers_of_a_public_key_are_read(wrapped, bits, exponent):
    modulus = (1 << bits) - 1
    assert chasquid.rsa_public_numbers(public_key(modulus, exponent, wrapped)) == (
        modulus,
        exponent,
    )


def test_our_own_public_key_has_its_numbers():
    assert chasquid.rsa_public_numbers(rsa_key().public) == (rsa_key().modulus, 65537)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("bits", "exponent"),
    [(512, 65537), (1023, 65537), (8193, 65537), (16384, 65537), (2048, 0), (2048, 1), (2048, 2),
     (2048, 65536), (2048, 2**32 + 1), (2048, 2**2047 + 1)],
)  # fmt: skip
def test_numbers_that_no_signature_should_be_checked_with_are_refused(wrapped, bits, exponent):
    with pytest.raises(ValueError):
        chasquid.rsa_public_numbers(public_key((1 << bits) - 1, exponent, wrapped))


def test_a_modulus_is_never_longer_than_it_seems():
    # read as a negative number, it would have few bits; others read it as a huge one
    modulus = der(0x02, b"\xff" * 2000 + bytes(128))
    with pytest.raises(ValueError):
        chasquid.rsa_public_numbers(der(0x30, modulus, integer(65537)))


@searched
@given(st.binary(max_size=300))
def test_any_octets_are_a_public_key_or_raise_one_kind_of_error(data):
    with pytest.raises(ValueError):
        chasquid.rsa_public_numbers(data)


@searched
@given(st.data())
def test_a_damaged_public_key_is_read_or_raises_one_kind_of_error(data):
    octets = bytearray(rsa_key().public)
    for _ in range(data.draw(st.integers(1, 4))):
        octets[data.draw(st.integers(0, 40))] = data.draw(st.integers(0, 255))
    octets = octets[: data.draw(st.integers(0, len(octets)))]
    try:
        modulus, exponent = chasquid.rsa_public_numbers(bytes(octets))
    except ValueError:
        return
    assert 1024 <= modulus.bit_length() <= 8192 and 2 < exponent < 1 << 32


# --- public_key_info ----------------------------------------------------------------------------


@needs_openssl
def test_the_public_key_of_our_own_certificate_is_what_openssl_finds(pair):
    public = openssl("x509", "-in", pair[0], "-noout", "-pubkey")
    with open(pair[0]) as file:
        certificate = ssl.PEM_cert_to_DER_cert(file.read())
    info = chasquid.public_key_info(certificate)
    assert info == base64.b64decode(re.sub(r"-----.*?-----", "", public))


@needs_openssl
@pytest.mark.parametrize("kind", ["rsa:1024", "ed25519", "version 1"])
def test_the_public_key_of_certificates_of_openssl_is_found(tmp_path, kind):
    key, request, made = (str(tmp_path / name) for name in "krc")
    openssl("req", "-new", "-newkey", kind if ":" in kind else "ed25519", "-nodes", "-keyout", key,
            "-out", request, "-subj", "/CN=a.example")  # fmt: skip
    if kind == "version 1":
        openssl("x509", "-req", "-in", request, "-signkey", key, "-out", made)
        assert "Version: 1 " in openssl("x509", "-in", made, "-noout", "-text")
    else:
        openssl("req", "-x509", "-key", key, "-out", made, "-subj", "/CN=a.example")
    public = written("pkey", "-in", key, "-pubout", "-outform", "DER")
    der = written("x509", "-in", made, "-outform", "DER")
    assert chasquid.public_key_info(der) == public


def test_a_certificate_that_is_cut_short_has_its_key_or_raises_one_kind_of_error(pair):
    with open(pair[0]) as file:
        certificate = ssl.PEM_cert_to_DER_cert(file.read())
    info = chasquid.public_key_info(certificate)
    for length in range(certificate.index(info)):
        with pytest.raises(ValueError):
            chasquid.public_key_info(certificate[:length])


@searched
@given(st.binary(max_size=200))
def test_any_octets_have_no_public_key_or_raise_one_kind_of_error(data):
    with contextlib.suppress(ValueError):
        assert isinstance(chasquid.public_key_info(data), bytes)


@given(st.integers(-(2**31), 2**38))
def test_a_time_in_a_certificate_is_read_as_it_was_written(seconds: int) -> None:
    moment = time.gmtime(seconds)
    text = time.strftime("%m%d%H%M%SZ", moment)
    if 0 < moment.tm_year < 10000:
        assert chasquid._moment(0x18, f"{moment.tm_year:04}{text}".encode()) == seconds
    if 1950 <= moment.tm_year < 2050:
        assert chasquid._moment(0x17, f"{moment.tm_year % 100:02}{text}".encode()) == seconds


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x17, b"20260101000000Z"),
        (0x18, b"260101000000Z"),
        (0x17, b"2601010000Z"),
        (0x17, b"260101000000+0100"),
    ],
)
def test_what_is_no_time_in_a_certificate_is_refused(tag: int, text: bytes) -> None:
    with pytest.raises(ValueError, match="is no time in a certificate"):
        chasquid._moment(tag, text)
