# SPDX-License-Identifier: Apache-2.0
"""Rooms DKIM, KEY WATCH: signatures, those of others verified and our own made.

What is verified here was signed by dkimpy or by `signed`, which follows RFC 6376 without
either library and signs whatever it is told to.
"""

from __future__ import annotations

import base64
import email
import functools
import hashlib
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dkim.util
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
    DOWN,
    HOST,
    PROGRAM,
    CommandLine,
    FakeClock,
    Inline,
    Server,
    Wire,
    Zone,
    cuts,
    is_quick,
    record,
    run,
    searched,
    searched_briefly,
    trusting,
    turns,
    wait_for,
)

import chasquid

NOW = 1_700_000_000.0
RESULTS = {"none", "pass", "fail", "policy", "neutral", "temperror", "permerror"}  # RFC 8601, 2.7.1
DOMAIN = "there.example"
SELECTOR = "sel"
KEY_NAME = f"{SELECTOR}._domainkey.{DOMAIN}"
HEADER = (
    b"Received: from a\r\n\tby b; today\r\n"
    b"From: Eva  <eva@there.example>\r\n"
    b"To: ana@here.example\r\n"
    b"Subject: =?utf-8?q?ma=C3=B1ana?=\r\n   and  more \r\n"
    b"Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n"
)
BODY = b"Hello  Ana,\r\n\r\n\tit works. \r\n\r\n\r\n"
MESSAGE = HEADER + b"\r\n" + BODY


@functools.cache
def rsa() -> chasquid.RsaKey:
    key = chasquid.new_key("rsa1024")
    assert isinstance(key, chasquid.RsaKey)
    return key


ED25519 = chasquid.Ed25519Key(bytes(range(32)))


# --- signing by hand ----------------------------------------------------------------------------


def relaxed_field(raw: bytes) -> bytes:
    """RFC 6376, 3.4.2."""
    name, _, value = raw.partition(b":")
    value = re.sub(rb"[ \t]+", b" ", value.replace(b"\r\n", b"")).strip(b" ")
    return name.strip().lower() + b":" + value + b"\r\n"


def canonical_body(form: str, body: bytes) -> bytes:
    """RFC 6376, 3.4.3 and 3.4.4."""
    lines = body.split(b"\r\n")
    if form == "relaxed":
        lines = [re.sub(rb"[ \t]+", b" ", line).rstrip(b" ") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        return b"" if form == "relaxed" else b"\r\n"
    return b"\r\n".join(lines) + b"\r\n"


DIGEST_INFO = {
    "sha1": bytes.fromhex("3021300906052b0e03021a05000414"),
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
}  # RFC 8017, 9.2


def rsa_signature(modulus: int, private_exponent: int, data: bytes, hash: str) -> bytes:
    size = (modulus.bit_length() + 7) // 8
    info = DIGEST_INFO[hash] + hashlib.new(hash, data).digest()
    padded = b"\0\1" + b"\xff" * (size - len(info) - 3) + b"\0" + info
    return pow(int.from_bytes(padded, "big"), private_exponent, modulus).to_bytes(size, "big")


def split(message: bytes) -> tuple[bytes, bytes]:
    """Return header block and body; without an empty line, all of it is header."""
    header = chasquid.header_block(message)
    return (message, b"") if header is None else (header, message[len(header) + 2 :])


def signed(
    message: bytes = MESSAGE,
    key: chasquid.PrivateKey | None = None,
    write: Callable[[dict[str, str]], str] = lambda tags: "; ".join(map("=".join, tags.items())),
    fold: Callable[[str], str] = lambda b: b,
    **tags: str | None,
) -> bytes:
    """Return `message` with a signature on top, its tags changed as said; None: left out.

    `write` makes the field's value of them, `fold` may break up what stands in b=.
    """
    key = key or rsa()
    header, body = split(message)
    algorithm = "rsa-sha256" if isinstance(key, chasquid.RsaKey) else "ed25519-sha256"
    c = tags.get("c", "relaxed/relaxed") or "simple/simple"
    header_form, _, body_form = c.partition("/")
    canonical = canonical_body(body_form or "simple", body)
    length = tags.get("l")
    if length is not None and length.isdigit():
        canonical = canonical[: int(length)]
    hash = "sha1" if tags.get("a") == "rsa-sha1" else "sha256"
    digest = base64.b64encode(hashlib.new(hash, canonical).digest()).decode()
    all_tags = {
        "v": "1", "a": algorithm, "c": c, "d": DOMAIN, "s": SELECTOR,
        "h": "From:To:Subject:Date", "bh": digest, **tags, "b": "\x01",
    }  # fmt: skip
    kept = {name: value for name, value in all_tags.items() if value is not None}
    # RFC 6376, 3.7: without the value of b=, and the white space around it
    before, _, after = f"DKIM-Signature: {write(kept)}\r\n".encode().partition(b"\x01")
    ours = before.rstrip() + after.lstrip(b" \t")
    proof = prove(key, header, kept.get("h", ""), header_form, ours, hash)
    kept["b"] = fold(base64.b64encode(proof).decode())
    return f"DKIM-Signature: {write(kept)}\r\n".encode() + message


def prove(
    key: chasquid.PrivateKey, header: bytes, names: str, form: str, ours: bytes, hash: str
) -> bytes:
    canonical = relaxed_field if form == "relaxed" else bytes
    fields = [field.raw for field in chasquid.header_fields(header)][::-1]
    data = b""
    for name in names.lower().split(":"):
        for field in fields:
            if field.partition(b":")[0].strip().lower() == name.strip().encode():
                fields.remove(field)
                data += canonical(field)
                break
    data += canonical(ours).removesuffix(b"\r\n")
    if isinstance(key, chasquid.RsaKey):
        return rsa_signature(key.modulus, key.private_exponent, data, hash)
    return key.sign(hashlib.sha256(data).digest())


# --- verifying: what the tests ask for ----------------------------------------------------------


def key_record(key: chasquid.PrivateKey | None = None, **tags: str | None) -> str:
    key = key or rsa()
    kind = "rsa" if isinstance(key, chasquid.RsaKey) else "ed25519"
    public = base64.b64encode(key.public).decode()
    kept = {"v": "DKIM1", "k": kind, "p": public, **tags}
    return "; ".join(f"{name}={value}" for name, value in kept.items() if value is not None)


Records = Mapping[tuple[str, str], Sequence[str] | Exception]


def zone_of(records: Sequence[str] | Exception | Records | None) -> Zone:
    if isinstance(records, Mapping):
        return Zone(records)
    return Zone({(KEY_NAME, "TXT"): [key_record()] if records is None else records})


def verdicts(
    message: bytes,
    records: Sequence[str] | Exception | Records | None = None,
    *,
    names: Any = None,
    places: Sequence[int] = (),
    now: float = NOW,
) -> list[chasquid.Signature]:
    """Return what becomes of each signature; `records` are those of the key, or a zone."""
    header, body = split(message)

    async def main(loop: chasquid.Loop) -> list[chasquid.Signature]:
        asked = names(loop) if names else chasquid.Names(loop, zone_of(records).ask)
        return await chasquid.verify_signatures(
            asked, loop, chasquid.header_fields(header), lambda: cuts(body, list(places))
        )

    found = run(main, clock=FakeClock(now), workers=Inline())
    assert {signature.result for signature in found} <= RESULTS
    return found


def verdict(message: bytes, *args: Any, **options: Any) -> chasquid.Signature:
    (found,) = verdicts(message, *args, **options)
    return found


def outcome(message: bytes, *args: Any, **options: Any) -> str:
    found = verdict(message, *args, **options)
    return f"{found.result}: {found.reason}"


# --- the examples of the standards --------------------------------------------------------------

LETTER = """\
From: Joe SixPack <joe@football.example.com>
To: Suzie Q <suzie@shopping.example.net>
Subject: Is dinner ready?
Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)
Message-ID: <20030712040037.46341.5F8J@football.example.com>

Hi.

We lost the game. Are you hungry yet?

Joe.
"""
# RFC 8463, appendix A.
BOTH_ALGORITHMS = (
    """\
DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=brisbane; t=1528637909; h=from : to :
 subject : date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11Bus
 Fa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw==
DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=test; t=1528637909; h=from : to : subject :
 date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=F45dVWDfMbQDGHJFlXUNB2HKfbCeLRyhDXgFpEL8GwpsRe0IeIixNTe3
 DhCVlUrSjV4BwcVcOF6+FF3Zo9Rpo1tFOeS9mPYQTnGdaSGsgeefOsk2Jz
 dA+L10TeYt9BgDfQNZtKdN1WO//KgIqXP7OdEFE4LjFYNcUxZQ4FADY+8=
"""
    + LETTER
)
THEIR_KEYS = {
    ("brisbane._domainkey.football.example.com", "TXT"): [
        "v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
    ],
    ("test._domainkey.football.example.com", "TXT"): [
        "v=DKIM1; k=rsa; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDkHlOQoBTzWRiGs5V6NpP3idY6Wk08a5"
        "qhdR6wy5bdOKb2jLQiY/J16JYi0Qvx/byYzCNb3W91y3FutACDfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqMKrM3rG4"
        "hstT5QjvHO9PzoxZyVYLzBfO2EeC3Ip3G+2kryOTIKT+l/K4w3QIDAQAB"
    ],
    ("brisbane._domainkey.example.com", "TXT"): [
        "v=DKIM1; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDwIRP/UC3SBsEmGqZ9ZJW3/DkMoGeLnQg1fWn7/z"
        "YtIxN2SnFCjxOCKG9v3b4jYfcTNh5ijSsq631uBItLa7od+v/RtdC2UzJ1lWT947qR+Rcac2gbto/NMqJ0fzfVjH4"
        "OuKhitdY9tf6mcwGjaNBcWToIMmPSPDdQPNUYckcQ2QIDAQAB"
    ],
}  # fmt: skip
# RFC 6376, appendix A.2, with one space in front of "Are": only so does the body have the
# hash that stands in bh=.
SIMPLE = (
    """\
DKIM-Signature: v=1; a=rsa-sha256; s=brisbane; d=example.com;
      c=simple/simple; q=dns/txt; i=joe@football.example.com;
      h=Received : From : To : Subject : Date : Message-ID;
      bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
      b=AuUoFEfDxTDkHlLXSZEpZj79LICEps6eda7W3deTVFOk4yAUoqOB
        4nujc7YopdG5dWLSdNg6xNAZpOPr+kHxt1IrE+NahM6L/LbvaHut
        KVdkLLkpVaVVQPzeRDI009SO2Il5Lu7rDNH6mZckBdrIx0orEtZV
        4bmp/YzhwvcubU4=;
Received: from client1.football.example.com  [192.0.2.1]
      by submitserver.example.com with SUBMISSION;
      Fri, 11 Jul 2003 21:01:54 -0700 (PDT)
"""
    + LETTER
)


def with_crlf(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


def test_both_signatures_of_the_example_in_rfc_8463_pass() -> None:
    found = verdicts(with_crlf(BOTH_ALGORITHMS), THEIR_KEYS)
    assert found == [
        chasquid.Signature("pass", "", "football.example.com", "brisbane", "/gCrinpc"),
        chasquid.Signature("pass", "", "football.example.com", "test", "F45dVWDf"),
    ]


def test_the_signature_of_the_example_in_rfc_6376_passes() -> None:
    found = verdicts(with_crlf(SIMPLE), THEIR_KEYS)
    assert found == [chasquid.Signature("pass", "", "example.com", "brisbane", "AuUoFEfD")]


@pytest.mark.parametrize(
    "change",
    [("Joe.", "Jim."), ("dinner", "Dinner"), ("Suzie Q", "Suzie  Q"), ("game. Are", "game.  Are"),
     ("v=1;", "v=1 ;")],
)  # fmt: skip
def test_the_simple_forms_allow_no_change(change: tuple[str, str]) -> None:
    assert verdict(with_crlf(SIMPLE.replace(*change, 1)), THEIR_KEYS).result == "fail"


@pytest.mark.parametrize(
    "change",
    [("Suzie Q", "Suzie \t Q"), ("game. Are", "game.  Are"), ("Subject:", "SUBJECT :"),
     ("yet?", "yet? \t"), ("Joe.\n", "Joe.\n\n \n"), ("a=rsa", "a=\n  rsa")],
)  # fmt: skip
def test_the_relaxed_forms_allow_changes_of_white_space(change: tuple[str, str]) -> None:
    found = verdicts(with_crlf(BOTH_ALGORITHMS.replace(*change)), THEIR_KEYS)
    # a change of a signature's own field is one of white space as well
    assert "pass" in [signature.result for signature in found], found


# --- what passes --------------------------------------------------------------------------------

FORMS = ["simple/simple", "simple/relaxed", "relaxed/simple", "relaxed/relaxed"]


@pytest.mark.parametrize("key", ["rsa", "ed25519"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("places", [(), (1,), range(len(BODY))], ids=["whole", "two", "octets"])
def test_a_signature_made_by_hand_passes(form: str, key: str, places: Sequence[int]) -> None:
    private = rsa() if key == "rsa" else ED25519
    message = signed(key=private, c=form)
    assert outcome(message, [key_record(private)], places=places) == "pass: "


@pytest.mark.parametrize("form", FORMS)
def test_a_signature_of_dkimpy_passes(form: str) -> None:
    field = dkim.sign(
        MESSAGE, SELECTOR.encode(), DOMAIN.encode(), rsa().to_pem().encode(),
        canonicalize=tuple(form.encode().split(b"/")),
    )  # fmt: skip
    # dkimpy takes the time from the real clock
    assert outcome(field + MESSAGE, now=time.time()) == "pass: "


@pytest.mark.parametrize(
    ("c", "form"), [(None, "simple/simple"), ("simple", "simple/simple"), ("relaxed", "relaxed")]
)
def test_forms_that_are_not_said_are_simple(c: str | None, form: str) -> None:
    def write(tags: dict[str, str]) -> str:
        kept = {**tags, "c": c} if c else {k: v for k, v in tags.items() if k != "c"}
        return "; ".join(map("=".join, kept.items()))

    assert outcome(signed(c=form, write=write)) == "pass: "


LAYOUTS: dict[str, Callable[[dict[str, str]], str]] = {
    "no space": lambda tags: ";".join(map("=".join, tags.items())) + ";",
    "a fold at each tag": lambda tags: ";\r\n\t".join(map("=".join, tags.items())),
    "folds around everything": lambda tags: "\r\n ;\r\n\t".join(
        f"{name} \r\n =\r\n {value}" for name, value in tags.items()
    ),
    "b in the middle": lambda tags: "; ".join(map("=".join, sorted(tags.items()))),
    "an unknown tag": lambda tags: "; ".join(map("=".join, {**tags, "x-y_1": "z=1"}.items())),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["simple/simple", "relaxed/relaxed"])
def test_a_signature_may_be_laid_out_in_many_ways(layout: str, form: str) -> None:
    assert outcome(signed(write=LAYOUTS[layout], c=form)) == "pass: "


@pytest.mark.parametrize("gap", ["\r\n ", " ", "\t\r\n\t "])
def test_b_may_be_folded(gap: str) -> None:
    message = signed(fold=lambda b: gap.join(re.findall(".{1,7}", b)), c="simple/simple")
    assert outcome(message) == "pass: "


@pytest.mark.parametrize("tags", [
    {"i": "@there.example"}, {"i": "eva@there.example"}, {"i": "eva@mail.there.example"},
    {"i": "eva@MAIL.There.Example"}, {"i": "a=40b@there.example"}, {"q": "dns/txt"},
    {"t": str(int(NOW))}, {"t": str(int(NOW) + 200)}, {"x": str(int(NOW) + 1)},
    {"x": str(int(NOW) - 200)}, {"t": "1", "x": "2000000000"}, {"z": "From:eva@there.example"},
    {"d": "There.Example"}, {"s": "SEL"}, {"h": "from : to :\r\n from:subject:cc"},
], ids=str)  # fmt: skip
def test_what_a_signature_may_say_of_itself(tags: dict[str, str]) -> None:
    assert outcome(signed(**tags)) == "pass: "


RECORDS = {
    "no version": {"v": None},
    "no algorithm": {"k": None},
    "the hash": {"h": "sha256"},
    "several hashes": {"h": "sha1 : sha256"},
    "any service": {"s": "*"},
    "mail and more": {"s": "tlsrpt:email"},
    "a note": {"n": "a note"},
    "an unknown flag": {"t": "x"},
    "an unknown tag": {"zz": "1"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_what_a_record_may_say(name: str) -> None:
    assert outcome(signed(), [key_record(**RECORDS[name])]) == "pass: "


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace("; ", ";"), lambda text: f" {text} ; ",
     lambda text: text.replace("=", " = "), lambda text: re.sub("(p=.{40})", r"\1 ", text)],
)  # fmt: skip
def test_a_record_may_hold_white_space(change: Callable[[str], str]) -> None:
    assert outcome(signed(), [change(key_record())]) == "pass: "


def test_the_public_key_may_stand_without_its_algorithm() -> None:
    """An RSAPublicKey, as RFC 6376, 3.6.1 has it."""
    bare = rsa().public[22:]
    assert chasquid.rsa_public_numbers(bare) == (rsa().modulus, 65537)
    record = key_record(p=base64.b64encode(bare).decode())
    assert outcome(signed(), [record]) == "pass: "


@pytest.mark.parametrize("other", ["v=spf1 -all", "hello", "v=DKIM2; p=x", "p=!!", "", "v=DKIM1"])
def test_another_record_beside_the_key_does_no_harm(other: str) -> None:
    for records in ([other, key_record()], [key_record(), other]):
        assert outcome(signed(), records) == "pass: "


def test_one_of_several_signatures_says_nothing_of_the_others() -> None:
    message = signed(signed(signed(), s="gone"), key=ED25519, d="else.example")
    table = {
        (KEY_NAME, "TXT"): [key_record()],
        ("sel._domainkey.else.example", "TXT"): [key_record(ED25519)],
    }
    assert [verdict.result for verdict in verdicts(message, table)] == ["pass", "permerror", "pass"]


def test_only_the_first_five_signatures_are_looked_at() -> None:
    message = MESSAGE
    for number in range(50):
        message = signed(message, s=f"s{number}")
    zone = Zone({(f"s{number}._domainkey.{DOMAIN}", "TXT"): [key_record()] for number in range(50)})
    found = verdicts(message, names=lambda loop: chasquid.Names(loop, zone.ask))
    assert [signature.selector for signature in found] == ["s49", "s48", "s47", "s46", "s45"]
    assert [signature.result for signature in found] == ["pass"] * 5
    assert len(zone.asked) == 5


def test_a_message_without_a_signature_has_no_result() -> None:
    assert verdicts(MESSAGE) == []


def test_the_body_is_read_once_and_not_at_all_where_no_signature_can_pass() -> None:
    reads: list[int] = []

    async def main(loop: chasquid.Loop, message: bytes) -> list[chasquid.Signature]:
        def body() -> list[bytes]:
            reads.append(1)
            return [BODY]

        names = chasquid.Names(loop, zone_of(None).ask)
        fields = chasquid.header_fields(split(message)[0])
        return await chasquid.verify_signatures(names, loop, fields, body)

    both = signed(signed(c="simple/simple"))
    found = run(lambda loop: main(loop, both), clock=FakeClock(NOW), workers=Inline())
    assert [signature.result for signature in found] == ["pass", "pass"]
    assert reads == [1]
    run(lambda loop: main(loop, signed(s="gone")), clock=FakeClock(NOW), workers=Inline())
    assert reads == [1]


# --- what does not pass -------------------------------------------------------------------------

IN_AN_HOUR, AN_HOUR_AGO = str(int(NOW) + 3600), str(int(NOW) - 3600)
REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "SHA-1": ({"a": "rsa-sha1"}, "policy: SHA-1 proves nothing any more"),
    "From is not signed": ({"h": "To:Subject"}, "permerror: From is not signed"),
    "nothing is signed": ({"h": ""}, "permerror: From is not signed"),
    "no h": ({"h": None}, "neutral: the field is malformed"),
    "l is shorter": ({"l": "5"}, "policy: only a part of the body is signed"),
    "l is zero": ({"l": "0"}, "policy: only a part of the body is signed"),
    "l is longer": ({"l": "9999"}, "policy: only a part of the body is signed"),
    "l is negative": ({"l": "-1"}, "neutral: the field is malformed"),
    "l is endless": ({"l": "9" * 77}, "neutral: the field is malformed"),
    "l is no number": ({"l": "all"}, "neutral: the field is malformed"),
    "expired": ({"x": AN_HOUR_AGO}, "policy: the signature has expired"),
    "from the future": ({"t": IN_AN_HOUR}, "temperror: the signature is from the future"),
    "x before t": ({"t": "10", "x": "9"}, "neutral: x= is before t="),
    "t is no time": ({"t": "now"}, "neutral: t= is no time"),
    "t is endless": ({"t": "9" * 100}, "neutral: t= is no time"),
    "x is no time": ({"x": "-1"}, "neutral: x= is no time"),
    "x is empty": ({"x": ""}, "neutral: x= is no time"),
    "i of another domain": ({"i": "@else.example"}, "neutral: the field is malformed"),
    "i of a domain above": ({"i": "@example"}, "neutral: the field is malformed"),
    "i that ends alike": ({"i": "@nothere.example"}, "neutral: the field is malformed"),
    "i without @": ({"i": "there.example"}, "neutral: the field is malformed"),
    "unknown algorithm": ({"a": "rsa-sha512"}, "neutral: the field is malformed"),
    "no algorithm": ({"a": None}, "neutral: the field is malformed"),
    "unknown form": ({"c": "relaxed/nofws"}, "neutral: the canonical form is unknown"),
    "three forms": ({"c": "simple/simple/simple"}, "neutral: the canonical form is unknown"),
    "unknown query": ({"q": "dns/key"}, "neutral: the field is malformed"),
    "unknown version": ({"v": "2"}, "neutral: the field is malformed"),
    "no version": ({"v": None}, "neutral: the field is malformed"),
    "no domain": ({"d": None}, "neutral: the field is malformed"),
    "empty domain": ({"d": ""}, "neutral: the field is malformed"),
    "a domain with a slash": ({"d": "there.example/x"}, "neutral: the field is malformed"),
    "a domain with empty labels": ({"d": "there..example"}, "neutral: the field is malformed"),
    "a domain with a dot at its end": ({"d": "there.example."}, "neutral: the field is malformed"),
    "a domain in Unicode": ({"d": "ñ.example"}, "permerror: there is no key"),
    "a domain with a NUL": ({"d": "there\0.example"}, "neutral: the field is malformed"),
    "a domain that is too long": ({"d": "a." * 130 + "b"}, "neutral: the field is malformed"),
    "a label that is too long": ({"d": "a" * 64 + ".example"}, "neutral: the field is malformed"),
    "a selector that is too long": ({"s": "a" * 9000}, "neutral: the field is malformed"),
    "no selector": ({"s": None}, "neutral: the field is malformed"),
    "empty selector": ({"s": ""}, "neutral: the field is malformed"),
    "a selector with an @": ({"s": "a@b"}, "neutral: the field is malformed"),
    "no body hash": ({"bh": None}, "neutral: the field is malformed"),
    "a body hash that is none": ({"bh": "*"}, "neutral: the field is malformed"),
    "an empty body hash": ({"bh": ""}, "neutral: the field is malformed"),
    "another body hash": ({"bh": "AAAA"}, "fail: the body was changed"),
    "10,000 names": ({"h": "From:" + "a:" * 9999}, "policy: the field is too long"),
    "1,000 names": ({"h": "From:" + "a:" * 999}, "policy: h= names too many fields"),
    "64 kB of space": ({"z": " " * 65536}, "policy: the field is too long"),
    "a field of 16 kB": ({"z": "x" * 16384}, "policy: the field is too long"),
    "102 spaces": ({"z": "x" + " " * 102 + "x"}, "policy: the field is too long"),
    "101 white spaces": ({"z": "x" + "\t \r\n" * 26 + " x"}, "policy: the field is too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_signature_that_is_right_in_itself_does_not_pass_with(name: str) -> None:
    tags, told = REFUSED[name]
    assert outcome(signed(**tags)).startswith(told)


@pytest.mark.parametrize("form", FORMS)
def test_l_counts_where_it_is_the_length_of_the_body(form: str) -> None:
    length = len(canonical_body(form.partition("/")[2], BODY))
    for message, told in [
        (signed(c=form, l=str(length)), "pass: "),
        (signed(c=form, l=str(length)) + b"more\r\n", "policy: only a part of the body is signed"),
        (signed(c=form, l=str(length)).replace(b"Hello", b"HELLO"), "fail: the body was changed"),
    ]:
        assert outcome(message) == told


@pytest.mark.parametrize("tag", ["b", "d", "s", "h", "bh", "a", "v", "x-y"])
def test_a_tag_that_comes_twice_makes_the_field_malformed(tag: str) -> None:
    def write(tags: dict[str, str]) -> str:
        tags = {**tags, "x-y": "1"}
        return "; ".join(map("=".join, [*tags.items(), (tag, tags[tag])]))

    assert outcome(signed(write=write)) == "neutral: the field is malformed"


@pytest.mark.parametrize("value", [b"", b" ", b";", b"v=1", b"v", b"=", b"\0", b"\xff=\xff", b"b="])
def test_what_is_no_list_of_tags_is_malformed(value: bytes) -> None:
    found = verdict(b"DKIM-Signature:" + value + b"\r\n" + MESSAGE)
    assert found == chasquid.Signature("neutral", "the field is malformed")


UNFIT: dict[str, tuple[list[str], str]] = {
    "none": ([], "permerror: there is no key"),
    "empty": ([""], "permerror: the record is no DKIM key"),
    "no p": ([key_record(p=None)], "permerror: the record is no DKIM key"),
    "other version": ([key_record(v="DKIM2")], "permerror: the record is no DKIM key"),
    "revoked": ([key_record(p="")], "permerror: the key is revoked"),
    "revoked, a space": ([key_record(p=" ")], "permerror: the key is revoked"),
    "of another algorithm": ([key_record(ED25519)], "permerror: the key is for another algorithm"),
    "of no algorithm": ([key_record(k="dsa")], "permerror: the key is for another algorithm"),
    "for SHA-1": ([key_record(h="sha1")], "permerror: the key is not for SHA-256"),
    "for no hash": ([key_record(h="")], "permerror: the key is not for SHA-256"),
    "for another service": ([key_record(s="tlsrpt")], "permerror: the key is not for mail"),
    "for no service": ([key_record(s="")], "permerror: the key is not for mail"),
    "tested and for another service": (
        [key_record(t="y", s="tlsrpt")], "none: the key is not for mail; the key is being tested"
    ),
    "a tag twice": ([key_record() + "; k=rsa"], "permerror: the key record is malformed"),
    "no tags": (["hello"], "permerror: the key record is malformed"),
    "no base64": ([key_record(p="%%%%")], "policy: the key cannot be used"),
    "bad padding": ([key_record(p="MIGfM")], "policy: the key cannot be used"),
    "no key": ([key_record(p="AAAA")], "policy: the key cannot be used"),
    "4,097 octets": ([key_record(n="x" * 4096)], "permerror: the key record is longer than 4096"),
    "60 kB": ([key_record(n="x" * 60_000)], "permerror: the key record is longer than 4096"),
    "too many": ([f"hello {n}" for n in range(5)] + [key_record()],
                 "permerror: the key record is malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_signature_does_not_pass_with_a_key_that_is(name: str) -> None:
    records, told = UNFIT[name]
    assert outcome(signed(), records).startswith(told)


@pytest.mark.parametrize("flags", ["y", "s : y"])
def test_a_key_that_is_tested_lets_what_fits_pass_and_all_else_is_unsigned(flags: str) -> None:
    """RFC 6376, 3.6.1"""
    records = [key_record(t=flags)]
    assert outcome(signed(), records) == "pass: "
    told = "none: the signature does not fit; the key is being tested"
    assert outcome(signed().replace(b"Subject: ", b"Subject: x"), records) == told
    told = "none: the body was changed; the key is being tested"
    assert outcome(signed() + b"more\r\n", records) == told


def test_an_ed25519_key_of_another_size_cannot_be_used() -> None:
    for octets in (b"", bytes(31), bytes(33), ED25519.public * 2):
        record = key_record(ED25519, p=base64.b64encode(octets).decode() or "====")
        assert outcome(signed(key=ED25519), [record]).startswith("policy: the key cannot be used")


def test_a_strict_key_is_not_for_subdomains() -> None:
    records = [key_record(t="s")]
    assert outcome(signed(), records) == "pass: "
    assert outcome(signed(i="eva@there.example"), records) == "pass: "
    assert outcome(signed(i="eva@THERE.Example"), records) == "pass: "
    told = "permerror: the key is not for subdomains"
    assert outcome(signed(i="eva@mail.there.example"), records) == told


@functools.cache
def handy_primes() -> list[int]:
    """Primes that are one above a divisor of SMOOTH, so that RSA is quick with any of them."""
    divisors = [1]
    for prime, power in SMOOTH_FACTORS.items():
        divisors = [divisor * prime**n for divisor in divisors for n in range(power + 1)]
    candidates = (divisor + 1 for divisor in sorted(divisors) if divisor > 1 << 16)
    return [
        candidate
        for candidate in candidates
        if all(pow(b, candidate - 1, candidate) == 1 for b in (2, 3, 5, 7, 11))
    ]


SMOOTH_FACTORS = {2: 8, 3: 4, 5: 2, 7: 1, 11: 1, 13: 1, 17: 1, 19: 1, 23: 1}
SMOOTH = math.prod(prime**power for prime, power in SMOOTH_FACTORS.items())


@functools.cache
def sized_key(bits: int) -> chasquid.RsaKey:
    """Return a key of at least `bits` bits and not many more; good for tests alone."""
    modulus = 1
    for prime in handy_primes():
        if modulus.bit_length() >= bits:
            break
        modulus *= prime
    assert bits <= modulus.bit_length() < bits + 42
    return chasquid.RsaKey(modulus, 65537, pow(65537, -1, SMOOTH), 0, 0, 0, 0, 0)


@pytest.mark.parametrize("bits", [1024, 2048, 4096, 8192 - 42])
def test_a_key_of_a_sensible_size_passes(bits: int) -> None:
    key = sized_key(bits)
    assert outcome(signed(key=key), [key_record(key)]) == "pass: "


@pytest.mark.parametrize("bits", [512, 1024 - 42, 8193])
def test_a_key_that_is_too_short_or_too_long_is_not_used(bits: int) -> None:
    key = sized_key(bits)
    told = f"policy: the key cannot be used: an RSA key of {key.modulus.bit_length()} bits"
    assert outcome(signed(key=key), [key_record(key)]).startswith(told)


def test_a_key_of_16384_bits_is_not_used() -> None:
    key = rsa()._replace(modulus=(1 << 16384) - 1)
    told = "policy: the key cannot be used: an RSA key of 16384 bits"
    assert outcome(signed(), [key_record(key)]).startswith(told)


def test_a_key_with_a_huge_exponent_is_not_used() -> None:
    key = sized_key(2048)._replace(exponent=(1 << 2000) + 1)
    told = "policy: the key cannot be used: the exponent"
    assert outcome(signed(), [key_record(key)]).startswith(told)


def der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return bytes([tag, 0x82]) + len(content).to_bytes(2, "big") + content


HIDDEN_KEYS = {
    # others take the first of two bit strings
    "behind a key of a good size": der(
        0x30,
        bytes.fromhex("300d06092a864886f70d0101010500"),
        der(0x03, b"\0", der(0x30, der(0x02, b"\x7f" + b"\xff" * 1000), der(0x02, b"\x7f" * 1000))),
        der(0x03, b"\0", rsa().public[22:]),
    ),
    # others read every number as positive
    "in a negative number": der(
        0x30, der(0x02, b"\xff" * 2500 + bytes(127) + b"\1"), der(0x02, b"\1\0\1")
    ),
}


@pytest.mark.parametrize("name", HIDDEN_KEYS)
def test_no_large_key_can_be_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def computed(message: bytes, key: dict[str, int], length: int) -> bytes:
        sizes.append((key["modulus"].bit_length(), key["publicExponent"].bit_length()))
        return b""

    monkeypatch.setattr("dkim.crypto.rsa_encrypt", computed)
    record = key_record(p=base64.b64encode(HIDDEN_KEYS[name]).decode())
    assert len(record) < 4096
    assert verdict(signed(), [record]).result != "pass"
    assert all(modulus <= 8192 and exponent <= 32 for modulus, exponent in sizes)


def test_what_is_computed_with_a_good_key_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def computed(message: bytes, key: dict[str, int], length: int) -> bytes:
        sizes.append(key["modulus"].bit_length())
        return b""

    monkeypatch.setattr("dkim.crypto.rsa_encrypt", computed)
    assert outcome(signed()) == "fail: the signature does not fit"
    assert sizes == [1024]


# --- what was changed on the way ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ((b"Hello", b"HELLO"), "fail: the body was changed"),
        ((b"works. \r\n", b"works. \r\nmore\r\n"), "fail: the body was changed"),
        ((BODY, b""), "fail: the body was changed"),
        ((b"eva@there", b"eve@there"), "fail: the signature does not fit"),
        ((b"To: ", b"To: eve@there.example, "), "fail: the signature does not fit"),
        ((b"d=there.example", b"d=There.example"), "fail: the signature does not fit"),
        ((b"Received: from a", b"Received: from z"), "pass: "),
        ((HEADER, HEADER + b"X-More: x\r\n"), "pass: "),
        # above the signed one, as a reader shows it; only dkimpy's own rule for From sees it
        ((b"From: Eva", b"From: boss@there.example\r\nFrom: Eva"), "fail: "),
        ((b"To: ana", b"From: boss@there.example\r\nTo: ana"), "fail: "),
    ],
    ids=str,
)
def test_a_change_is_noticed_where_it_is_signed(change: tuple[bytes, bytes], told: str) -> None:
    assert outcome(signed().replace(*change)).startswith(told)


def test_a_field_that_is_signed_once_more_than_it_is_there_cannot_be_added() -> None:
    loose, closed = signed(h="From:Subject"), signed(h="From:Subject:Subject:Reply-To")
    for field in (b"Subject: win\r\n", b"Reply-To: eve@there.example\r\n"):
        for place in (b"Received: ", b"Date: "):
            assert outcome(loose.replace(place, field + place)) in (
                "pass: ", "fail: the signature does not fit"
            )  # fmt: skip
            told = "fail: the signature does not fit"
            assert outcome(closed.replace(place, field + place)) == told
    assert outcome(closed) == outcome(loose) == "pass: "


def test_another_key_does_not_fit() -> None:
    other = sized_key(1024)
    assert outcome(signed(), [key_record(other)]) == "fail: the signature does not fit"


@pytest.mark.parametrize("b", ["AAAA", "A" * 172, "/" * 172, "A" * 12_000, "AA==", "AAA="])
@pytest.mark.parametrize("key", ["rsa", "ed25519"])
def test_a_signature_of_any_length_does_not_fit(b: str, key: str) -> None:
    private = rsa() if key == "rsa" else ED25519
    found = verdict(signed(key=private, fold=lambda _: b), [key_record(private)])
    assert found.result == "fail"


# --- when the DNS does not answer ---------------------------------------------------------------


def test_a_failure_of_the_dns_is_temporary_and_says_so() -> None:
    found = verdict(signed(), chasquid.TemporaryFailure("no name server could answer", "4.4.3"))
    assert found == chasquid.Signature(
        "temperror", "no name server could answer", DOMAIN, SELECTOR, found.b
    )
    assert len(found.b) == 8


class Silent:
    """Name servers that never answer, but for what is in `known`."""

    def __init__(self, loop: chasquid.Loop, known: Mapping[str, str]) -> None:
        self._loop = loop
        self._known = known

    async def query(self, name: str, kind: str) -> chasquid.Answer:
        if name not in self._known:
            clock = self._loop.clock
            assert isinstance(clock, FakeClock)
            clock.advance(30.0)
            await self._loop.sleep(1000.0)
        return chasquid.Answer(True, (self._known[name],), 60.0)


def test_name_servers_that_take_too_long_are_a_temporary_failure() -> None:
    message = signed(signed(signed(s="late"), v="7"))
    found = verdicts(message, names=lambda loop: Silent(loop, {KEY_NAME: key_record()}))
    assert [signature.result for signature in found] == ["pass", "neutral", "temperror"]
    assert found[2].reason == "the name servers took too long"
    assert found[2].selector == "late"


def below_forwarders(own: int, others: int) -> bytes:
    """A message with signatures of its author's domain, below those of forwarders."""
    message = MESSAGE
    for _ in range(own):
        message = signed(message)
    for number in range(others):
        message = signed(message, d=f"list{number}.example")
    return message


@pytest.mark.parametrize(
    ("own", "others", "checked", "left_out"),
    [(1, 5, 1, False), (1, 60, 1, False), (3, 3, 3, False), (6, 1, 5, True), (0, 9, 0, False)],
)
def test_signatures_of_the_authors_domain_are_checked_before_those_of_forwarders(
    own: int, others: int, checked: int, left_out: bool
) -> None:
    fields = chasquid.header_fields(split(below_forwarders(own, others))[0])
    authors = [f"mail.{DOMAIN}"]
    chosen, some_left_out = chasquid.choose_signatures(fields, authors)
    assert len(chosen) == 5
    assert (
        len([signature for signature in chosen if f"d={DOMAIN};".encode() in signature.value])
        == checked
    )
    assert some_left_out == left_out
    assert [field for field in fields if any(field is other for other in chosen)] == chosen


@pytest.mark.parametrize(("own", "folder"), [(1, ""), (6, ""), (7, "Junk")])
def test_dmarc_refuses_nobody_whose_signature_was_not_looked_at(
    tmp_path: Path, own: int, folder: str
) -> None:
    """Six valid ones: the first five are checked, and pass. Seven, of which six are broken."""
    message = below_forwarders(1 if own == 1 else own - 1, 5)
    if own == 7:  # the lowest is the only good one
        message = signed(MESSAGE)
        for _ in range(6):
            message = signed(message).replace(b"bh=", b"bh=AAAA", 1)
    zone = Zone({
        (KEY_NAME, "TXT"): [key_record()], (f"_dmarc.{DOMAIN}", "TXT"): ["v=DMARC1; p=reject"],
    })  # fmt: skip
    data = message.replace(b"\r\n.", b"\r\n..")
    with Server(tmp_path, ask=zone.ask, clock=FakeClock(NOW)) as server:
        with server.connect() as wire:
            assert wire.reply().startswith("220 ")
            assert wire.ask("EHLO client.example").startswith("250-")
            assert wire.ask("MAIL FROM:<bounces@list.example>").startswith("250 ")
            assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
            assert wire.ask("DATA").startswith("354 ")
            wire.send(data + b".\r\n")
            assert wire.reply().startswith("250 ")
        wait_for(lambda: not server.queued(), "the delivery")
        junk = list((server.data_dir / "mail").glob("*/ana/.Junk/new/*"))
        assert bool(junk) == (folder == "Junk")


def test_names_in_unicode_are_those_in_a_labels() -> None:
    """RFC 8616, 5"""
    domain = "bücher.example"
    ascii_name = chasquid.domain_to_ascii(domain)
    key_name = f"{SELECTOR}._domainkey.{ascii_name}"
    message = signed(d=domain, i=f"@mail.{domain}")
    found = verdict(message, {(key_name, "TXT"): [key_record()]})
    assert (found.result, found.domain) == ("pass", ascii_name)
    other = signed(d=domain, i="@bücher2.example")
    assert verdict(other, {(key_name, "TXT"): [key_record()]}).result == "neutral"


@pytest.mark.parametrize("error", [ImportError("gone"), EOFError(), MemoryError(), OSError(5, "x")])
def test_what_is_wrong_here_is_no_result(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: Any) -> bool:
        raise error

    message = signed()
    for name in ("validate_signature_fields", "DKIM"):
        with monkeypatch.context() as patched:
            patched.setattr(chasquid._dkim(), name, broken)
            with pytest.raises(type(error)):
                outcome(message)


def test_a_fault_of_this_module_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """dkimpy calls our Ed25519: an error from there is not one of its own."""
    monkeypatch.setattr(chasquid, "ed25519_verify", None)  # what calls it fails, in our frame
    with pytest.raises(TypeError, match="not callable"):
        outcome(signed(key=ED25519), [key_record(ED25519)])
    monkeypatch.undo()
    assert outcome(signed(key=ED25519), [key_record(ED25519)]) == "pass: "


def test_the_dkimpy_of_others_in_the_process_stays_as_it_is() -> None:
    assert chasquid._dkim() is not dkim
    assert not hasattr(dkim, "nacl") or dkim.nacl is not chasquid._dkim().nacl


def test_a_body_that_cannot_be_read_is_an_error_of_its_own() -> None:
    def body() -> Iterator[bytes]:
        yield b"Hello"
        raise OSError(5, "the disk is broken")

    async def main(loop: chasquid.Loop) -> list[chasquid.Signature]:
        names = chasquid.Names(loop, zone_of(None).ask)
        fields = chasquid.header_fields(split(signed())[0])
        return await chasquid.verify_signatures(names, loop, fields, body)

    with pytest.raises(OSError, match="the disk is broken"):
        run(main, clock=FakeClock(NOW), workers=Inline())


# --- anything at all ----------------------------------------------------------------------------

ODDITIES = st.sampled_from(
    [b"", b";", b"=", b"\0", b"\xff", b"\r\n ", b" ", b"\t", b":", b"@", b"b=", b"; l=1", b"; x=1",
     b"; t=9", b"\xc3\xb1", b"9" * 80, b"; i=", b"/", b"\x0b", b"; h=from", b"AAAA", b"\\", b"%"]
)  # fmt: skip


def damage(data: st.DataObject, octets: bytes) -> bytes:
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(octets)))
        end = min(len(octets), start + data.draw(st.integers(0, 12)))
        octets = octets[:start] + data.draw(ODDITIES) + octets[end:]
    return octets


@searched
@given(st.data())
def test_any_signature_field_has_a_result(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([rsa(), ED25519]))
    message = signed(key=key, i="@there.example", q="dns/txt", t="1", c="simple/relaxed")
    value = message[len(b"DKIM-Signature:") : -len(MESSAGE) - 2]
    field = chasquid.Field("dkim-signature", b"DKIM-Signature:" + damage(data, value) + b"\r\n")

    async def main(loop: chasquid.Loop) -> list[chasquid.Signature]:
        names = chasquid.Names(loop, zone_of([key_record(key)]).ask)
        fields = [field, *chasquid.header_fields(HEADER)]
        return await chasquid.verify_signatures(names, loop, fields, lambda: [BODY])

    (found,) = run(main, clock=FakeClock(NOW), workers=Inline())
    assert found.result in RESULTS
    assert found.domain == "" or chasquid.ASCII_DOMAIN.fullmatch(found.domain)
    assert re.fullmatch("[A-Za-z0-9+/=]{0,8}", found.b)


@searched
@given(st.data())
def test_any_key_record_has_a_result(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([rsa(), ED25519]))
    record = damage(data, key_record(key, h="sha256", s="email", t="s").encode())
    assert verdict(signed(key=key), [record.decode("latin-1")]).result in RESULTS


@searched
@given(st.data())
def test_any_public_key_has_a_result(data: st.DataObject) -> None:
    octets = bytearray(rsa().public)
    for _ in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(0, 40))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    public = base64.b64encode(bytes(octets[: len(octets) - cut])).decode()
    assert verdict(signed(), [key_record(p=public)]).result in RESULTS


@searched
@given(st.binary(max_size=60), st.binary(max_size=60))
@example(b"", b"")
def test_any_octets_have_a_result(value: bytes, text: bytes) -> None:
    field = chasquid.Field("dkim-signature", b"DKIM-Signature:" + value)

    async def main(loop: chasquid.Loop) -> list[chasquid.Signature]:
        names = chasquid.Names(loop, zone_of([text.decode("latin-1")]).ask)
        return await chasquid.verify_signatures(names, loop, [field], lambda: [BODY])

    (found,) = run(main, clock=FakeClock(NOW), workers=Inline())
    assert found.result in RESULTS - {"pass"}
    assert verdict(signed(), [text.decode("latin-1")]).result in RESULTS - {"pass"}


def test_what_dkimpy_raises_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    message = signed()
    for error in (IndexError, AssertionError, UnicodeEncodeError("x", "y", 0, 1, "z"), TypeError):

        def broken(*_: Any, error: Any = error) -> bool:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(chasquid._dkim().DKIM, "verify_sig", broken)
            assert outcome(message) == "neutral: the signature cannot be processed"
        with monkeypatch.context() as patched:
            patched.setattr(chasquid._dkim(), "validate_signature_fields", broken)
            assert outcome(message) == "neutral: the field is malformed"
        with monkeypatch.context() as patched:
            patched.setattr("dkim.util.parse_tag_value", broken)
            assert outcome(message) == "neutral: the field is malformed"


# --- what takes long elsewhere ------------------------------------------------------------------


def many_fields(field: bytes) -> bytes:
    """A message whose header has as many fields as it may have, and 250 kB."""
    return (field + b"x" * 250 + b"\r\n") * 990 + MESSAGE


def with_h_of_16_kb() -> bytes:
    message = signed(h="From:" + "to:" * 5000)
    assert 15_000 < message.index(b"; bh=") < 16_384
    return message


Hostile = tuple[bytes, list[str] | None]
HOSTILE: dict[str, Callable[[], Hostile]] = {
    "40 kB of space in the body": lambda: (
        signed(HEADER + b"\r\na" + b" " * 40_000 + b"b\r\n"), None),
    "40 kB of space at the ends of lines": lambda: (
        signed(HEADER + b"\r\na" + (b" " * 999 + b"\r\n") * 40 + b"b\r\n"), None),
    "40 kB of space in a signed field": lambda: (
        signed(b"Subject: a" + b" " * 40_000 + b"b\r\nFrom: eva@there.example\r\n\r\n"), None),
    "40 kB of space in the signature": lambda: (signed(z="x" + " " * 40_000 + "x"), None),
    "4,000 folds in b=": lambda: (signed(fold=lambda b: "\r\n ".join(b[:160] * 25)), None),
    "4,000 folds after b=": lambda: (signed(fold=lambda b: b + "\r\n " * 4000), None),
    "160 long folds in b=": lambda: (
        signed(fold=lambda b: ("\r\n" + " " * 90).join(b[:160])), None),
    "160 times 99 spaces in b=": lambda: (signed(fold=lambda b: (" " * 99).join(b[:160])), None),
    "a key of 16,384 bits": lambda: (
        signed(), [key_record(rsa()._replace(modulus=(1 << 16384) - 1,
                                             exponent=(1 << 7000) + 1))]),
    "a record of 60 kB": lambda: (signed(), [key_record(n="x" * 60_000)]),
    "a record of 4 kB of semicolons": lambda: (signed(), [key_record() + ";" * 3800]),
    "50 signatures": lambda: (
        functools.reduce(lambda one, _: signed(one), range(50), MESSAGE), None),
    "h= of 16 kB": lambda: (with_h_of_16_kb(), None),
    "h= of 200 names that are not there": lambda: (
        signed(many_fields(b"A: "), h="From" + "".join(f":x{n}" for n in range(199))), None),
    "1,000 fields": lambda: (signed(many_fields(b"A: ")), None),
    "1,000 fields of a name that is signed": lambda: (
        signed(many_fields(b"To: "), h="From" + ":To" * 199), None),
}  # fmt: skip


@functools.cache
def hostile(name: str) -> Hostile:
    return HOSTILE[name]()


def test_what_is_hostile_gets_as_far_as_it_should() -> None:
    """The rest is refused before it could take long."""
    results = {name: verdicts(*hostile(name))[0].result for name in HOSTILE}
    assert {name for name, result in results.items() if result not in ("pass", "fail")} == {
        "40 kB of space in the signature",
        "4,000 folds after b=",
        "a key of 16,384 bits",
        "a record of 60 kB",
        "h= of 16 kB",
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_it_does_not_take_long_to_deal_with(name: str) -> None:
    message, records = hostile(name)
    verdicts(message, records)
    # dkimpy alone: half a second to ten
    assert is_quick(lambda: verdicts(message, records), 0.5)


# --- what is written down -----------------------------------------------------------------------

_CFWS = r"(?:\s|\((?:[^()\\]|\\.)*\))*"
_VALUE = r'[^\s;()"=]+|"(?:[^"\\]|\\.)*"'


def parsed_results(field: bytes) -> tuple[str, list[tuple[str, str, dict[str, str]]]]:
    """Return server and results (method, result, properties) of a field; RFC 8601, 2.2."""
    name, _, text = field.decode().partition(":")
    assert name == "Authentication-Results" and text.endswith("\r\n")
    assert max(map(len, field.split(b"\r\n"))) <= 998
    text = re.sub(r"\r\n(?=[ \t])", "", text.removesuffix("\r\n"))
    assert "\r" not in text and "\n" not in text
    server, *parts = split_outside_quotes(text)
    results = []
    for part in parts:
        match = re.fullmatch(rf"{_CFWS}(\w+)=(\w+){_CFWS}(.*)", part)
        assert match, part
        rest, properties = match[3], {}
        while rest:
            found = re.match(rf"(\w+\.[\w-]+)=({_VALUE}){_CFWS}", rest)
            assert found, rest
            value = found[2]
            if value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            properties[found[1]] = value
            rest = rest[found.end() :]
        results.append((match[1], match[2], properties))
    return server.strip(), results


def split_outside_quotes(text: str) -> list[str]:
    return re.findall(r'(?:"(?:[^"\\]|\\.)*"|\((?:[^()\\]|\\.)*\)|[^;"()])+', text)


def results_field(*signatures: chasquid.Signature) -> bytes:
    return chasquid.authentication_results(
        HOST, chasquid.Spf("none"), "", signatures, chasquid.Dmarc("none")
    )


def test_each_signature_has_a_result_with_domain_selector_and_beginning() -> None:
    server, results = parsed_results(results_field(
        chasquid.Signature("pass", "", "a.example", "one", "ab/+c=d1"),
        chasquid.Signature("permerror", "there is no key", "b.example", "two", "12345678"),
        chasquid.Signature("neutral", "the field is malformed"),
    ))  # fmt: skip
    assert server == HOST
    assert [result for result in results if result[0] == "dkim"] == [
        ("dkim", "pass", {"header.d": "a.example", "header.s": "one", "header.b": "ab/+c=d1"}),
        ("dkim", "permerror", {"header.d": "b.example", "header.s": "two", "header.b": "12345678"}),
        ("dkim", "neutral", {}),
    ]


def test_without_a_signature_there_is_one_result_that_says_so() -> None:
    _, results = parsed_results(results_field())
    assert [result for result in results if result[0] == "dkim"] == [("dkim", "none", {})]


@searched
@given(st.data())
def test_the_results_of_any_signature_can_be_read(data: st.DataObject) -> None:
    reason = data.draw(st.text(max_size=300))
    _, results = parsed_results(results_field(
        chasquid.Signature("fail", reason, "a.example", "s", "AAAA/+=="),
        chasquid.Signature("pass"),
    ))  # fmt: skip
    assert [result[:2] for result in results if result[0] == "dkim"] == [
        ("dkim", "fail"),
        ("dkim", "pass"),
    ]
    assert results[1][2]["header.b"] == "AAAA/+=="


@searched_briefly
@given(st.data())
def test_the_results_of_a_damaged_signature_can_be_read(data: st.DataObject) -> None:
    value = signed()[len(b"DKIM-Signature:") : -len(MESSAGE) - 2]
    field = chasquid.Field("dkim-signature", b"DKIM-Signature:" + damage(data, value) + b"\r\n")

    async def main(loop: chasquid.Loop) -> list[chasquid.Signature]:
        names = chasquid.Names(loop, zone_of(None).ask)
        fields = [field, *chasquid.header_fields(HEADER)]
        return await chasquid.verify_signatures(names, loop, fields, lambda: [BODY])

    (found,) = run(main, clock=FakeClock(NOW), workers=Inline())
    _, results = parsed_results(results_field(found))
    assert [result[1] for result in results if result[0] == "dkim"] == [found.result]


def test_a_long_name_does_not_make_a_line_too_long() -> None:
    parsed_results(results_field(verdict(signed(d="a." * 4000 + "b", s="c" * 4000))))


# --- our own signatures -------------------------------------------------------------------------


def keys(*private: chasquid.PrivateKey, domain: str = "here.example") -> list[chasquid.DkimKey]:
    return [chasquid.DkimKey(domain, f"k{n}", key) for n, key in enumerate(private)]


def zone_of_keys(made: Iterable[chasquid.DkimKey]) -> Records:
    return {(key.name, "TXT"): [key.record] for key in made}


def lookup(made: Iterable[chasquid.DkimKey]) -> Callable[..., bytes | None]:
    """Return what dkimpy asks for keys."""
    table = {f"{key.name}.".encode(): key.record.encode() for key in made}
    return lambda name, timeout=0: table.get(name)


def ours(made: Sequence[chasquid.DkimKey], message: bytes = MESSAGE, now: float = NOW) -> bytes:
    header, body = split(message)
    return chasquid.sign(made, header, [body], now) + message


def tags_of(field: bytes) -> dict[str, str]:
    value = re.sub(r"\s+", "", field.partition(b":")[2].decode())
    return dict(part.split("=", 1) for part in value.split(";"))


def test_each_key_makes_a_signature_and_both_sides_find_it_good() -> None:
    made = keys(rsa(), ED25519)
    message = ours(made)
    assert [verdict.result for verdict in verdicts(message, zone_of_keys(made))] == ["pass", "pass"]
    for place in range(2):
        assert chasquid._dkim().DKIM(message).verify(idx=place, dnsfunc=lookup(made))


def test_a_signature_of_ours_says_what_is_needed() -> None:
    made = keys(rsa(), ED25519)
    fields = chasquid.header_fields(ours(made).partition(b"\r\n\r\n")[0] + b"\r\n")
    for field, key, algorithm in zip(fields, made, ["rsa-sha256", "ed25519-sha256"], strict=False):
        tags = tags_of(field.raw)
        assert (tags["v"], tags["a"], tags["c"]) == ("1", algorithm, "relaxed/relaxed")
        assert (tags["d"], tags["s"], tags["t"]) == (key.domain, key.selector, str(int(NOW)))
        assert "l" not in tags and "x" not in tags


def test_no_line_of_a_signature_is_long() -> None:
    for line in ours(keys(rsa(), ED25519)).partition(HEADER)[0].split(b"\r\n"):
        assert len(line) <= 78
        assert not line or line.strip()


def test_what_is_signed_cannot_be_added_to() -> None:
    message = ours(keys(rsa()))
    made = zone_of_keys(keys(rsa()))
    names = tags_of(chasquid.header_fields(message.partition(b"\r\n\r\n")[0] + b"\r\n")[0].raw)[
        "h"
    ].split(":")
    assert names.count("from") == names.count("to") == names.count("subject") == 2
    assert "received" not in names and "dkim-signature" not in names
    for name in ("From", "To", "Cc", "Subject", "Date", "Message-ID", "Reply-To", "In-Reply-To",
                 "References", "MIME-Version", "Content-Type",
                 "Content-Transfer-Encoding"):  # fmt: skip
        added = f"{name}: x@there.example\r\n".encode()
        assert verdict(added + message, made).result == "fail", name
        assert verdict(message.replace(b"\r\n\r\n", b"\r\n" + added + b"\r\n", 1), made).result == (
            "fail"
        ), name
    assert verdict(b"Received: by us\r\nX-Spam: no\r\nSender: x\r\n" + message, made).result == (
        "pass"
    )


def test_fields_of_a_list_are_signed_where_they_are_there() -> None:
    message = ours(
        keys(rsa()), b"List-Id: <l.here.example>\r\nSender: a@here.example\r\n" + MESSAGE
    )
    made = zone_of_keys(keys(rsa()))
    assert verdict(message, made).result == "pass"
    assert verdict(message.replace(b"<l.here", b"<m.here"), made).result == "fail"
    assert verdict(message.replace(b"Sender: a@", b"Sender: b@"), made).result == "fail"


def test_a_header_full_of_one_name_does_not_make_h_endless() -> None:
    message = ours(keys(rsa()), b"To: a@here.example\r\n" * 900 + MESSAGE)
    assert len(message) - len(MESSAGE) - 900 * 20 < 2000
    assert verdict(message, zone_of_keys(keys(rsa()))).result == "pass"


BODIES = {
    "empty": b"",
    "an empty line": b"\r\n",
    "no line end": b"x",
    "white space alone": b" \t\r\n \r\n",
    "8 bit": "mañana\r\n".encode() + b"\xff\xfe\r\n",
    "a line of 10,000 octets": b"x " * 5000 + b"\r\n",
    "dots": b".\r\n..\r\n",
    "large": b"a  b \r\n\r\n" * 20_000,
}
HEADERS = {
    "usual": HEADER,
    "UTF-8": 'From: "Añá" <aña@ñ.example>\r\nSubject: mañana\r\n'.encode(),
    "8 bit": b"From: a@here.example\r\nSubject: \xff\xfe\r\n",
    "a long line": b"From: a@here.example\r\nSubject: " + b"x" * 900 + b"\r\n",
    "folds": b"From:\r\n\t a@here.example\r\nSubject:\r\n \t\r\n x\r\n",
    "a space before the colon": b"From : a@here.example\r\nSubject\t: x\r\n",
    "empty fields": b"From: a@here.example\r\nTo:\r\nSubject: \r\n",
    "two From": b"From: a@here.example\r\nFrom: b@here.example\r\n",
    "no From": b"Subject: x\r\n",
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("header", HEADERS)
def test_any_message_can_be_signed(header: str, body: str) -> None:
    made = keys(rsa(), ED25519)
    message = ours(made, HEADERS[header] + b"\r\n" + BODIES[body])
    assert [verdict.result for verdict in verdicts(message, zone_of_keys(made))] == ["pass", "pass"]
    if "before" not in header and body != "large":  # dkimpy reads no such field
        for place in range(2):
            assert chasquid._dkim().DKIM(message).verify(idx=place, dnsfunc=lookup(made))


@searched_briefly
@given(
    st.lists(st.tuples(
        st.sampled_from(["From", "To", "Subject", "X-a", "List-Id", "Resent-From"]),
        st.lists(st.text(st.sampled_from("ab \tñ=;:b"), max_size=30), min_size=1, max_size=3),
    ), max_size=6),
    st.lists(st.text(st.sampled_from("a \t."), max_size=5), max_size=4),
)  # fmt: skip
def test_whatever_we_sign_dkimpy_and_we_find_good(
    fields: list[tuple[str, list[str]]], lines: list[str]
) -> None:
    made = keys(rsa())
    header = b"From: x\r\n" + b"".join(chasquid.fold(name, *parts) for name, parts in fields)
    message = ours(made, header + b"\r\n" + "\r\n".join(lines).encode())
    assert verdict(message, zone_of_keys(made)).result == "pass"
    assert chasquid._dkim().verify(message, dnsfunc=lookup(made))


@pytest.mark.parametrize("name", ["a" * 60 + "." + "b" * 60 + ".example", "xn--and-6ma2c.example"])
def test_a_domain_of_any_length_can_sign(name: str) -> None:
    made = keys(rsa(), domain=name)
    message = ours(made)
    assert verdict(message, zone_of_keys(made)).domain == name
    assert chasquid._dkim().verify(message, dnsfunc=lookup(made))


def test_a_header_that_is_none_cannot_be_signed() -> None:
    with pytest.raises(ValueError):
        chasquid.sign(keys(rsa()), b"no field\r\n", [b""], NOW)


def test_a_key_has_a_name_and_a_record() -> None:
    made = keys(rsa(), ED25519)
    assert [key.name for key in made] == [
        "k0._domainkey.here.example", "k1._domainkey.here.example"
    ]  # fmt: skip
    assert made[1].record == f"v=DKIM1; k=ed25519; p={base64.b64encode(ED25519.public).decode()}"
    assert made[0].record == f"v=DKIM1; k=rsa; p={base64.b64encode(rsa().public).decode()}"


# --- keys in files ------------------------------------------------------------------------------


def test_the_keys_of_a_domain_are_read_in_the_order_of_their_selectors(tmp_path: Path) -> None:
    for name, key in [("dkim:b.pem", rsa()), ("dkim:a.pem", ED25519), ("dkim:B2.pem", rsa())]:
        (tmp_path / name).write_text(key.to_pem())
    for name in ("users", "dkim:a.pem.bak", "dkim:", "a.pem", "dkim_selector"):
        (tmp_path / name).write_text("no key")
    found = chasquid.load_dkim_keys(str(tmp_path), "ñandú.example")
    assert [(key.domain, key.selector) for key in found] == [
        ("xn--and-6ma2c.example", name) for name in ("b2", "a", "b")
    ]
    assert chasquid.load_dkim_keys(str(tmp_path / "none"), "x.example") == ()


@pytest.mark.parametrize("selector", ["", "a b", "a..b", "ñ\u2028", "a;b"])
def test_a_selector_that_is_none_is_told_with_its_file(tmp_path: Path, selector: str) -> None:
    path = tmp_path / f"dkim:{selector}.pem"
    path.write_text(ED25519.to_pem())
    with pytest.raises(chasquid.ConfigError) as caught:
        chasquid.load_dkim_keys(str(tmp_path), "x.example")
    assert str(caught.value).startswith(f"{path}: expected a selector after 'dkim:'")


# --- a signer -----------------------------------------------------------------------------------


def with_signer(
    directory: Path, made: Mapping[str, Sequence[chasquid.DkimKey]],
    use: Callable[[chasquid.Signer], Any],
) -> Any:  # fmt: skip
    async def main(loop: chasquid.Loop) -> Any:
        log = record(directory, loop.clock)
        try:
            return await use(chasquid.Signer(loop, log, made))
        finally:
            log.close()

    return run(main, clock=FakeClock(NOW), workers=Inline())


def test_a_domain_without_keys_signs_nothing_and_reads_no_body(tmp_path: Path) -> None:
    def body() -> list[bytes]:
        raise AssertionError("it was read")

    for made in ({}, {"here.example": ()}, {"else.example": keys(rsa())}):
        assert with_signer(
            tmp_path, made, lambda signer: signer.sign("here.example", HEADER, body)
        ) == b""  # fmt: skip


@pytest.mark.parametrize(
    ("there", "signs"),
    [
        (["mail.here.example", "here.example"], "mail.here.example"),
        (["here.example", "example"], "here.example"),
        (["example"], "example"),
        (["else.example", "x.mail.here.example"], ""),
        ([], ""),
    ],
)
def test_what_the_host_sends_is_signed_for_the_nearest_domain(
    tmp_path: Path, there: list[str], signs: str
) -> None:
    made = {name: keys(ED25519, domain=name) for name in there}
    field = with_signer(
        tmp_path, made, lambda signer: signer.sign_for_host(HOST, HEADER, lambda: [BODY])
    )
    assert (tags_of(field)["d"] if field else "") == signs


@pytest.mark.parametrize("error", [OSError(5, "broken"), ValueError("odd"), AssertionError()])
def test_what_cannot_be_signed_is_a_temporary_failure(tmp_path: Path, error: Exception) -> None:
    def body() -> Iterator[bytes]:
        yield b"x"
        raise error

    made = {"here.example": keys(rsa())}
    with pytest.raises(chasquid.TemporaryFailure) as caught:
        with_signer(tmp_path, made, lambda signer: signer.sign("here.example", HEADER, body))
    assert caught.value.status == "4.3.0"
    assert "event=crash " in (tmp_path / "server.log").read_text()


# --- keys whose records are not there yet -------------------------------------------------------

OUR_KEYS = keys(rsa(), ED25519)


def watched(
    directory: Path,
    answers: Mapping[tuple[str, str], Sequence[str] | Exception],
    use: Callable[[chasquid.KeyWatch, chasquid.Signer], Any],
    *made: chasquid.DkimKey,
    mark: bool = True,
) -> Any:
    """Run `use` with a watch over keys that have all a marker."""
    for key in made if mark else ():
        chasquid.mark_unseen(str(directory), key.name)

    async def main(loop: chasquid.Loop) -> Any:
        log, zone = record(directory, loop.clock), Zone(answers)
        try:
            signer = chasquid.Signer(loop, log, {"here.example": made})
            signer.unseen = chasquid.unseen_keys(str(directory))
            watch = chasquid.KeyWatch(loop, log, zone.ask, signer=signer, data_dir=str(directory))
            return await use(watch, signer)
        finally:
            log.close()

    return run(main, clock=FakeClock(NOW), workers=Inline())


async def look_and_sign(watch: chasquid.KeyWatch, signer: chasquid.Signer) -> bytes:
    await watch.look()
    return await signer.sign("here.example", HEADER, lambda: [BODY])


def test_a_marker_is_for_the_owner_alone_and_may_be_made_twice(tmp_path: Path) -> None:
    for _ in range(2):
        chasquid.mark_unseen(str(tmp_path), "a._domainkey.here.example")
    assert chasquid.unseen_keys(str(tmp_path)) == {"a._domainkey.here.example"}
    assert (tmp_path / "dkim-unseen").stat().st_mode & 0o777 == 0o700
    assert chasquid.unseen_keys(str(tmp_path / "none")) == frozenset()


def test_a_key_signs_when_its_record_is_there_and_its_marker_goes(tmp_path: Path) -> None:
    made = keys(rsa(), ED25519)
    field = watched(tmp_path, {(made[1].name, "TXT"): (made[1].record,)}, look_and_sign, *made)
    assert tags_of(field)["s"] == "k1" and field.count(b"DKIM-Signature") == 1
    assert chasquid.unseen_keys(str(tmp_path)) == {made[0].name}
    log = (tmp_path / "server.log").read_text()
    assert log.count("event=key-seen domain=here.example selector=k1\n") == 1
    assert "selector=k0" not in log


def spelt_otherwise(key: chasquid.DkimKey) -> str:
    """The same record in another order, with blanks, and a tag more."""
    tags = dict(tag.split("=", 1) for tag in key.record.split("; "))
    p = tags["p"][:40] + " " + tags["p"][40:]
    return f"v=DKIM1;p={p} ; s=email;k={tags['k']};"


@pytest.mark.parametrize("key", OUR_KEYS, ids=["rsa", "ed25519"])
def test_a_record_is_compared_by_what_it_says(key: chasquid.DkimKey) -> None:
    other = keys(chasquid.new_key("rsa1024"), chasquid.Ed25519Key(bytes(32)))[OUR_KEYS.index(key)]
    assert chasquid.publishes(key, key.record)
    assert chasquid.publishes(key, spelt_otherwise(key))
    for record_ in (
        other.record, "", "v=spf1 -all", "v=DKIM1; p=", "v=DKIM1; k=rsa; p=x", key.record[:-8],
        key.record + "; s=other", key.record + "; h=sha1", key.record.replace("DKIM1", "DKIM2"),
    ):  # fmt: skip
        assert not chasquid.publishes(key, record_), record_


@pytest.mark.parametrize(
    "answer",
    [
        (),
        ("v=spf1 -all",),
        (OUR_KEYS[0].record, "v=DKIM1; p="),  # which of them counts is open
        DOWN,
    ],
)
def test_a_key_without_its_record_does_not_sign(tmp_path: Path, answer: Any) -> None:
    key = OUR_KEYS[0]
    assert watched(tmp_path, {(key.name, "TXT"): answer}, look_and_sign, key) == b""
    assert chasquid.unseen_keys(str(tmp_path)) == {key.name}


def test_a_marker_that_cannot_be_removed_is_told(tmp_path: Path) -> None:
    key = OUR_KEYS[0]
    path = tmp_path / "dkim-unseen" / key.name
    path.mkdir(parents=True)
    (path / "file").touch()

    answers = {(key.name, "TXT"): (key.record,)}
    assert watched(tmp_path, answers, look_and_sign, key, mark=False) == b""
    assert (
        f"{path} cannot be removed, so the key does not sign: "
        in (tmp_path / "server.log").read_text()
    )


def test_records_are_looked_for_at_growing_intervals_and_when_asked(tmp_path: Path) -> None:
    clock = FakeClock(NOW)
    key = OUR_KEYS[0]
    chasquid.mark_unseen(str(tmp_path), key.name)
    looked: list[float] = []

    async def ask(name: str, kind: str) -> chasquid.Answer:
        looked.append(clock.now - NOW)
        return chasquid.Answer(False, (), 86400.0)

    async def main(loop: chasquid.Loop) -> None:
        log = record(tmp_path, clock)
        signer = chasquid.Signer(loop, log, {"here.example": (key,)})
        signer.unseen = chasquid.unseen_keys(str(tmp_path))
        watch = chasquid.KeyWatch(loop, log, ask, signer=signer, data_dir=str(tmp_path))
        task = loop.spawn(watch.run(), "watch")
        for _ in range(600):
            clock.advance(30)
            await turns(loop)
        watch.look_now()
        await turns(loop)
        task.cancel()
        log.close()

    run(main, clock=clock, workers=Inline())
    pauses = [round(b - a) for a, b in zip(looked, looked[1:], strict=False)]
    assert pauses[:6] == [60, 120, 240, 480, 960, 1920] and pauses[6] == 3600
    assert looked[-1] == 18000.0  # when asked


# --- in a server --------------------------------------------------------------------------------


class Outbox:
    """A courier that keeps what it is given, and refuses whoever is called nobody."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    async def deliver(
        self, delivery: chasquid.Delivery, destinations: Sequence[chasquid.Destination]
    ) -> list[chasquid.Result]:
        self.messages.append(b"".join(delivery.message.chunks()))
        return [
            chasquid.Result(chasquid.State.FAILED, "5.1.1", "no such user")
            if destination.value.startswith("nobody@")
            else chasquid.Result(chasquid.State.SENT, "2.0.0", "taken")
            for destination in destinations
        ]


class Signing:
    """A server with keys for here.example, and a client that has logged in there."""

    def __init__(
        self, directory: Path, files: Mapping[str, str] | None = None, **keywords: Any
    ) -> None:
        self.outbox = Outbox()
        self.server = Server(
            directory,
            **keywords,
            remote=self.outbox,
            users={"here.example": {"ana": "secret"}, "else.example": {"eva": "secret"}},
        )
        if files is None:
            files = {f"here.example/dkim:{key.selector}.pem": key.key.to_pem() for key in OUR_KEYS}
        for name, text in files.items():
            self.server.write(f"domains/{name}", text.encode())

    def __enter__(self) -> Signing:
        self.server.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self.server.__exit__(*arguments)

    def login(self) -> Wire:
        wire = self.server.connect("submission over TLS")
        wire.start_tls(trusting())
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("AUTH PLAIN AGFuYUBoZXJlLmV4YW1wbGUAc2VjcmV0").startswith("235 ")
        return wire

    def send(
        self, data: bytes, sender: str = "ana@here.example", to: str = "eva@there.example",
        chunks: Sequence[int] | None = None, options: str = "",
    ) -> str:  # fmt: skip
        """Send a message as a user; return the last reply. `chunks`: with BDAT, cut there."""
        with self.login() as wire:
            assert wire.ask(f"MAIL FROM:<{sender}>{options}").startswith("250 ")
            assert wire.ask(f"RCPT TO:<{to}>").startswith("250 ")
            if chunks is None:
                assert wire.ask("DATA").startswith("354 ")
                assert data.endswith(b"\r\n")
                wire.send(re.sub(rb"(?m)^\.", b"..", data) + b".\r\n")
                return wire.reply()
            pieces = cuts(data, list(chunks))
            for piece in pieces[:-1]:
                wire.send(b"BDAT %d\r\n" % len(piece) + piece)
                assert wire.reply().startswith("250 ")
            wire.send(b"BDAT %d LAST\r\n" % len(pieces[-1]) + pieces[-1])
            return wire.reply()

    def sent(self, *arguments: Any, **options: Any) -> bytes:
        """Send a message and return what leaves."""
        before = len(self.outbox.messages)
        reply = self.send(*arguments, **options)
        assert reply.startswith("250 "), reply
        wait_for(lambda: len(self.outbox.messages) > before, "the message to leave")
        return self.outbox.messages[-1]


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signing]:
    with Signing(tmp_path_factory.mktemp("signing")) as signing:
        yield signing


def assert_signed(message: bytes, by_dkimpy: bool = True) -> None:
    found = verdicts(message, zone_of_keys(OUR_KEYS), now=time.time())
    assert [(signature.result, signature.selector) for signature in found] == [
        ("pass", "k0"),
        ("pass", "k1"),
    ]
    for place in range(2 if by_dkimpy else 0):
        assert chasquid._dkim().DKIM(message).verify(idx=place, dnsfunc=lookup(OUR_KEYS))


def field_names(message: bytes) -> list[str]:
    return [field.name for field in chasquid.header_fields(split(message)[0])]


FROM = b"From: ana@here.example\r\n"
FULL = FROM + b"Date: Tue, 14 Nov 2023 22:13:20 +0000\r\nMessage-ID: <1@here.example>\r\n"
SENT_MESSAGES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "small": (FULL + b"Subject: hi\r\n\r\nHello\r\n", {}),
    "8 bit": (FULL + b"\r\nma\xc3\xb1ana \xff\r\n", {"options": " BODY=8BITMIME"}),
    "UTF-8 in the header": (FULL + "Subject: mañana\r\n\r\nHi\r\n".encode(),
                            {"options": " SMTPUTF8"}),
    "an empty body": (FULL + b"\r\n", {}),
    "nothing but a header": (FULL, {}),
    "a header without its last line end": (FULL.removesuffix(b"\r\n"), {"chunks": []}),
    "dots": (FULL + b"\r\n.\r\n..\r\n.x\r\n", {}),
    "no final line end": (FULL + b"\r\nHello", {"chunks": [3]}),
    "chunks in the middle of line ends": (
        FULL + b"\r\nHello\r\n\r\n", {"chunks": range(1, 90, 3)}),
    "more than memory holds": (FULL + b"\r\n" + b"Hello  you \r\n" * 8000, {}),
    "a large one in chunks": (FULL + b"\r\n" + b"x" * 70 * 2000, {"chunks": [70_000, 100_001]}),
    "a line of 10,000 octets": (FULL + b"\r\n" + b"x " * 5000 + b"\r\n", {}),
    "a large header": (FULL + (b"X-Large: " + b"x" * 200 + b"\r\n") * 900 + b"\r\nHello\r\n", {}),
    "forged results": (
        FULL + b"Authentication-Results: mail.here.example; dkim=pass\r\n\r\nHello\r\n", {}),
    "a signature already": (b"DKIM-Signature: v=1\r\n" + FULL + b"\r\nHello\r\n", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SENT_MESSAGES if "already" not in name])
def test_what_our_users_send_leaves_signed_by_every_key(signing: Signing, name: str) -> None:
    data, options = SENT_MESSAGES[name]
    message = signing.sent(data, **options)
    assert_signed(message)
    assert field_names(message)[:3] == ["dkim-signature", "dkim-signature", "received"]
    assert message.endswith(data.partition(b"\r\n\r\n")[2])


def test_a_signature_that_is_there_already_is_kept_below_ours(signing: Signing) -> None:
    message = signing.sent(SENT_MESSAGES["a signature already"][0])
    assert field_names(message)[:4] == ["dkim-signature"] * 2 + ["received", "dkim-signature"]
    found = verdicts(message, zone_of_keys(OUR_KEYS), now=time.time())
    assert [signature.result for signature in found] == ["pass", "pass", "neutral"]


def test_date_and_message_id_that_we_add_are_signed_and_received_is_not(signing: Signing) -> None:
    message = signing.sent(FROM + b"\r\nHello\r\n")
    assert_signed(message)
    assert field_names(message) == [
        "dkim-signature", "dkim-signature", "received", "date", "message-id", "from"
    ]  # fmt: skip
    made = zone_of_keys(OUR_KEYS)
    for name in (b"Date", b"Message-ID", b"From"):
        changed = re.sub(rb"\r\n" + name + rb": .*?\r\n", b"\r\n" + name + b": x\r\n", message)
        assert [verdict.result for verdict in verdicts(changed, made, now=time.time())] == [
            "fail"
        ] * 2
    assert_signed(re.sub(rb"\r\nReceived: (.*?\r\n\t)*.*?\r\n", b"\r\nReceived: x\r\n", message))


@pytest.mark.parametrize(
    ("closed", "added"),
    [
        ("from:subject:date:message-id", []),
        ("from : Date:\r\n\tfrom", ["message-id"]),
        ("from:MESSAGE-ID", ["date"]),
        ("from:subject", ["date", "message-id"]),
    ],
)
def test_no_field_is_added_that_a_signature_of_the_message_names(
    signing: Signing, closed: str, added: list[str]
) -> None:
    """RFC 6376, 5.4.2: a field named in h= that is not there is signed as being absent."""
    header = b"From: Eva <eva@there.example>\r\nSubject: for others\r\n"
    data = signed(header + b"\r\nHello\r\n", h=closed)
    message = signing.sent(data)
    names = field_names(message)
    assert names == [
        "dkim-signature", "dkim-signature", "received", *added, "dkim-signature", "from", "subject",
    ]  # fmt: skip
    keys = {**zone_of_keys(OUR_KEYS), (KEY_NAME, "TXT"): [key_record()]}
    found = verdicts(message, keys, now=time.time())
    assert [signature.result for signature in found] == ["pass"] * 3


def test_the_domain_of_mail_from_decides_whose_keys_sign(signing: Signing) -> None:
    assert_signed(signing.sent(FULL + b"\r\nHello\r\n", sender="other@HERE.Example"))
    for sender in ("eva@else.example", "ana@there.example", "ana@mail.here.example", ""):
        message = signing.sent(FULL + b"\r\nHello\r\n", sender=sender)
        assert "dkim-signature" not in field_names(message), sender


def test_what_comes_from_elsewhere_is_not_signed(signing: Signing) -> None:
    with signing.server.connect() as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("MAIL FROM:<ana@here.example>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(FULL + b"Subject: not signed\r\n\r\nHello\r\n.\r\n")
        assert wire.reply().startswith("250 ")
    (message,) = (
        letter for letter in signing.server.mail("ana") if b"Subject: not signed" in letter
    )
    assert b"DKIM-Signature" not in message
    assert b"dkim=none" in message


def test_what_stays_here_is_signed_as_well(signing: Signing) -> None:
    assert (
        signing.send(FULL + b"Subject: stays\r\n\r\nHello\r\n", to="ana@here.example")[:3] == "250"
    )
    (message,) = (letter for letter in signing.server.mail("ana") if b"Subject: stays" in letter)
    assert chasquid._dkim().verify(message, dnsfunc=lookup(OUR_KEYS))


def test_a_notification_is_signed_for_the_domain_above_our_host(signing: Signing) -> None:
    assert signing.send(FULL + b"\r\nHello\r\n", to="nobody@there.example").startswith("250 ")

    def notification() -> bytes:
        return next((letter for letter in signing.server.mail("ana") if b"5.1.1" in letter), b"")

    message = wait_for(notification, "the notification")
    assert email.message_from_bytes(message).get_content_type() == "multipart/report"
    for place in range(2):
        assert chasquid._dkim().DKIM(message).verify(idx=place, dnsfunc=lookup(OUR_KEYS))


def test_a_notification_is_signed_for_our_host_where_it_has_a_key(tmp_path: Path) -> None:
    files = {
        f"{HOST}/dkim:host.pem": rsa().to_pem(),
        "here.example/dkim:k1.pem": ED25519.to_pem(),
    }
    with Signing(tmp_path, files) as signing:
        assert signing.send(FULL + b"\r\nHello\r\n", to="nobody@there.example").startswith("250 ")
        message = wait_for(lambda: next(iter(signing.server.mail("ana")), b""), "the notification")
        host_key = chasquid.DkimKey(HOST, "host", rsa())
        assert message.count(b"d=mail.here.example") == 1
        assert chasquid._dkim().verify(message, dnsfunc=lookup([host_key]))


def test_keys_are_read_again(tmp_path: Path) -> None:
    with Signing(tmp_path, {}) as signing:
        assert "dkim-signature" not in field_names(signing.sent(FULL + b"\r\nHello\r\n"))
        for key in OUR_KEYS:
            name = f"domains/here.example/dkim:{key.selector}.pem"
            signing.server.write(name, key.key.to_pem().encode())
        signing.server.daemon.reload()
        wait_for(lambda: "event=reloaded" in signing.server.log, "the keys to be read")
        assert_signed(signing.sent(FULL + b"\r\nHello\r\n"))
        signing.server.write("domains/here.example/dkim:k0.pem", b"broken")
        signing.server.daemon.reload()
        mistake = "dkim:k0.pem: expected a private key in PEM"
        wait_for(lambda: mistake in signing.server.log, "the mistake to be told")
        assert_signed(signing.sent(FULL + b"\r\nHello\r\n"))


def test_a_new_key_with_a_marker_signs_once_its_record_is_there(tmp_path: Path) -> None:
    table: dict[tuple[str, str], Sequence[str] | Exception] = {}
    with Signing(tmp_path, {}, ask=Zone(table).ask) as signing:
        for key in OUR_KEYS:
            chasquid.mark_unseen(str(signing.server.data_dir), key.name)
            name = f"domains/here.example/dkim:{key.selector}.pem"
            signing.server.write(name, key.key.to_pem().encode())
        signing.server.daemon.reload()
        wait_for(lambda: "event=reloaded" in signing.server.log, "the keys to be read")
        assert "dkim-signature" not in field_names(signing.sent(FULL + b"\r\nHello\r\n"))
        assert "the DNS record of k0, k1 is not there yet" in chasquid.page(
            signing.server.daemon._status()
        )
        table.update({(key.name, "TXT"): (key.record,) for key in OUR_KEYS})
        signing.server.daemon.reload()
        wait_for(lambda: signing.server.log.count("event=key-seen") == 2, "the records to be seen")
        assert_signed(signing.sent(FULL + b"\r\nHello\r\n"))
        assert "is not there yet" not in chasquid.page(signing.server.daemon._status())


def test_at_the_start_the_log_and_check_say_which_keys_do_not_sign_yet(tmp_path: Path) -> None:
    server = Server(tmp_path)
    for key in OUR_KEYS:
        server.write(f"domains/here.example/dkim:{key.selector}.pem", key.key.to_pem().encode())
    chasquid.mark_unseen(str(server.data_dir), OUR_KEYS[0].name)
    with server:
        assert 'text="mail of here.example is signed with k1"' in server.log
        text = "the key k0 of here.example signs once k0._domainkey.here.example is in the DNS"
        assert f'text="{text}"' in server.log


def test_markers_that_cannot_be_read_are_told_and_keys_sign(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dkim-unseen").write_text("no directory")
    files = {f"here.example/dkim:{key.selector}.pem": key.key.to_pem() for key in OUR_KEYS}
    with Signing(tmp_path, files) as signing:
        assert "dkim-unseen: Not a directory; all keys sign" in signing.server.log
        assert_signed(signing.sent(FULL + b"\r\nHello\r\n"))


def test_with_a_broken_key_nothing_of_its_domain_leaves_unsigned(tmp_path: Path) -> None:
    users = {"here.example": {"ana": "secret"}, "else.example": {"eva": "secret"}}
    server = Server(tmp_path, users=users)
    path = server.write("domains/else.example/dkim:old.pem", rsa().to_pem()[:300].encode())
    with server:
        assert f"{path}: expected " in server.log
        with server.connect("submission over TLS") as wire:
            wire.start_tls(trusting())
            assert wire.reply().startswith("220 ")
            assert wire.ask("EHLO client.example").startswith("250-")
            assert wire.ask("AUTH PLAIN AGFuYUBoZXJlLmV4YW1wbGUAc2VjcmV0").startswith("235 ")
            assert wire.ask("MAIL FROM:<eva@else.example>").startswith("250 ")
            assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
            assert wire.ask("DATA").startswith("354 ")
            wire.send(b"Subject: x\r\n\r\nx\r\n.\r\n")
            assert wire.reply().startswith("451 4.3.5 the configuration of else.example ")


def test_a_message_that_cannot_be_signed_now_is_not_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> bytes:
        raise RuntimeError("the arithmetic is gone")

    with Signing(tmp_path) as signing:
        with monkeypatch.context() as patched:
            patched.setattr(chasquid, "sign", broken)
            reply = signing.send(FULL + b"\r\nHello\r\n")
        assert reply == "451 4.3.0 the message cannot be signed now"
        assert (
            'source="signing for here.example" text="RuntimeError: the arithmetic is gone"'
            in signing.server.log
        )
        assert signing.server.queued() == [] and signing.outbox.messages == []
        assert_signed(signing.sent(FULL + b"\r\nHello\r\n"))
        with monkeypatch.context() as patched:
            patched.setattr(chasquid, "sign", broken)
            assert signing.send(FULL + b"\r\nHello\r\n", sender="eva@else.example")[:3] == "250"
        forget_crashes(signing.server, 1)


def forget_crashes(server: Server, count: int) -> None:
    """The end of a server in a test complains of faults; this one had so many on purpose."""
    assert server.daemon.log.counters.pop(("crashes",)) == count


def test_a_notification_that_cannot_be_signed_leaves_unsigned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Signing(tmp_path) as signing:
        header = FULL + b"\r\n"

        def sometimes(made: Any, block: bytes, *rest: Any, sign: Any = chasquid.sign) -> bytes:
            if b"MAILER-DAEMON" in block or b"multipart/report" in block:
                raise RuntimeError("not now")
            return bytes(sign(made, block, *rest))

        monkeypatch.setattr(chasquid, "sign", sometimes)
        assert signing.send(header + b"Hello\r\n", to="nobody@there.example").startswith("250 ")
        message = wait_for(lambda: next(iter(signing.server.mail("ana")), b""), "the notification")
        assert not message.partition(b"\n\n")[0].count(b"DKIM-Signature")
        forget_crashes(signing.server, 1)


@pytest.mark.parametrize(
    ("there", "signed_by_others", "added"),
    [
        (b"", "From:Date:Message-ID", []),
        (b"", "from:date", ["Message-ID"]),
        (b"Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n", "from:message-id ", []),
        (b"", "from", ["Date", "Message-ID"]),
    ],
)
def test_no_field_that_a_signature_of_others_names_is_added(
    tmp_path: Path, there: bytes, signed_by_others: str, added: list[str]
) -> None:
    message = there + b"From: eva@there.example\r\nSubject: x\r\n\r\nHello\r\n"
    message = signed(message, h=signed_by_others, d="there.example")
    with Signing(tmp_path) as signing:
        sent = signing.sent(message)
    fields = [field.name for field in chasquid.header_fields(split(sent)[0])]
    assert [one for one in ("Date", "Message-ID") if one.lower() in fields and one.encode()
            not in there + b"".join([b"Date" for _ in there[:1]])] == added  # fmt: skip
    found = verdicts(sent, {(KEY_NAME, "TXT"): [key_record()]})
    assert found[-1].result == "pass"


def test_what_comes_from_elsewhere_is_verified(tmp_path: Path) -> None:
    message = signed(key=ED25519, s="ed", message=signed(c="simple/simple"))
    zone = Zone({
        (KEY_NAME, "TXT"): [key_record()],
        (f"ed._domainkey.{DOMAIN}", "TXT"): [key_record(ED25519)],
    })  # fmt: skip
    changed = message.replace(b"Hello", b"HELLO")
    with Server(tmp_path, ask=zone.ask) as server:
        for data, result in [
            (message, "pass"), (changed, "fail"), (message + b"x" * 200_000, "fail")
        ]:  # fmt: skip
            before = set(server.mail("ana"))
            with server.connect() as wire:
                assert wire.reply().startswith("220 ")
                assert wire.ask("EHLO client.example").startswith("250-")
                assert wire.ask("MAIL FROM:<eva@there.example>").startswith("250 ")
                assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
                wire.send(b"BDAT %d LAST\r\n" % len(data) + data)
                assert wire.reply().startswith("250 ")
            (delivered,) = set(server.mail("ana")) - before
            field = email.message_from_bytes(delivered)["Authentication-Results"]
            text = re.sub(r"\n(?=[ \t])", "\r\n", field)
            host, results = parsed_results(f"Authentication-Results: {text}\r\n".encode())
            assert host == HOST
            judged = [verdict for verdict in results if verdict[0] == "dkim"]
            assert [(verdict[1], verdict[2]["header.s"]) for verdict in judged] == [
                (result, "ed"), (result, "sel")
            ]  # fmt: skip


# --- the commands -------------------------------------------------------------------------------


@pytest.fixture
def commands(commands: CommandLine) -> CommandLine:
    """Commands on a domain whose directory is empty."""
    (commands.domain_dir / "users").unlink()
    return commands


def zone_line(text: str) -> tuple[str, list[str]]:
    """Return name and strings of the record in what a command printed."""
    import dns.zone

    found = re.search(r"^\S+\tIN TXT\t(\(\n[^)]*\)|\".*\")$", text, re.MULTILINE)
    assert found, text
    zone = dns.zone.from_text(
        f"$TTL 60\n{found[0]}\n", origin=".", relativize=False, check_origin=False
    )
    ((name, node),) = zone.nodes.items()
    (rdata,) = node.rdatasets[0]
    return str(name), [string.decode() for string in rdata.strings]


@pytest.mark.parametrize("algorithm", ["rsa2048", "ed25519"])
def test_a_new_key_is_written_and_its_record_shown(commands: CommandLine, algorithm: str) -> None:
    ended = commands.run("dkim-keygen", "here.example", "mail", "--algo", algorithm)
    path = commands.domain_dir / "dkim:mail.pem"
    assert ended.status == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(path) in ended.err
    key = chasquid.load_dkim_key(str(path), "here.example", "mail")
    assert isinstance(key.key, chasquid.Ed25519Key) == (algorithm == "ed25519")
    name, strings = zone_line(ended.out)
    assert name == "mail._domainkey.here.example."
    assert "".join(strings) == key.record
    assert all(len(string) <= 255 for string in strings)
    shown = commands.run("dkim-dns", "here.example")
    assert shown == (0, ended.out, "")  # the record alone is on standard output


def test_without_a_selector_it_is_the_date(commands: CommandLine) -> None:
    before = time.strftime("%Y%m%d", time.gmtime())
    ended = commands.run("dkim-keygen", "here.example", "--algo", "ed25519")
    after = time.strftime("%Y%m%d", time.gmtime())
    assert ended.status == 0
    assert os.listdir(commands.domain_dir)[0] in (f"dkim:{before}.pem", f"dkim:{after}.pem")


def test_check_names_keys_that_do_not_sign_yet(commands: CommandLine) -> None:
    (commands.domain_dir / "dkim:k0.pem").write_text(ED25519.to_pem())
    assert "dkim" not in commands.run("check").out
    chasquid.mark_unseen(str(commands.data_dir), "k0._domainkey.here.example")
    ended = commands.run("check")
    text = "the key k0 of here.example signs once k0._domainkey.here.example is in the DNS"
    assert f"warning: {text}; see dkim-dns" in ended.out and ended.status == 0


def test_a_key_is_never_overwritten(commands: CommandLine) -> None:
    path = commands.domain_dir / "dkim:mail.pem"
    path.write_text("precious")
    text = commands.fails("dkim-keygen", "here.example", "mail", "--algo", "ed25519")
    assert text.startswith(f"{path} exists already")
    assert path.read_text() == "precious"


def test_a_key_may_go_into_another_file(commands: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "key.pem"
    ended = commands.run("dkim-keygen", "here.example", "mail", str(path), "--algo", "ed25519")
    assert ended.status == 0 and str(path) in ended.err
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(commands.domain_dir) == []
    shown = commands.run("dkim-dns", "here.example", "mail", str(path))
    assert shown.out == ended.out


def test_a_domain_in_unicode_gets_a_record_in_ascii(commands: CommandLine) -> None:
    (commands.config_dir / "domains" / "ñandú.example").mkdir()
    ended = commands.run("dkim-keygen", "Ñandú.example", "s1", "--algo", "ed25519")
    assert (commands.config_dir / "domains" / "ñandú.example" / "dkim:s1.pem").exists()
    assert zone_line(ended.out)[0] == "s1._domainkey.xn--and-6ma2c.example."


@pytest.mark.parametrize("command", ["dkim-keygen", "dkim-dns", "dkim-sign"])
@pytest.mark.parametrize("selector", ["../x", "a/b", "a\0b", "a b", "a..b"])
def test_a_selector_that_is_none_is_refused_and_nothing_written(
    commands: CommandLine, command: str, selector: str
) -> None:
    options = ["--algo", "ed25519"] if command == "dkim-keygen" else []
    commands.fails(command, "here.example", selector, *options)
    assert os.listdir(commands.domain_dir) == []


def test_a_selector_that_is_none_is_refused_with_a_file_too(
    commands: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "key.pem"
    commands.fails("dkim-keygen", "here.example", "a b", str(path), "--algo", "ed25519")
    assert not path.exists()


@pytest.mark.parametrize("command", ["dkim-dns", "dkim-sign"])
def test_a_domain_without_keys_is_told_what_to_do(commands: CommandLine, command: str) -> None:
    text = commands.fails(command, "here.example")
    assert "make one with dkim-keygen" in text and str(commands.domain_dir) in text
    assert "cannot be read" in commands.fails(command, "here.example", "none")


@pytest.mark.parametrize(
    "arguments",
    [["dkim-keygen"], ["dkim-keygen", "here.example", "--algo", "rsa512"], ["dkim-dns"],
     ["dkim-verify", "here.example"], ["dkim-verify", "--txt"]],
)  # fmt: skip
def test_wrong_usage_ends_with_2(commands: CommandLine, arguments: list[str]) -> None:
    assert commands.run(*arguments).status == 2


def test_without_a_domain_that_of_from_signs(commands: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    commands.run("dkim-keygen", "here.example", "s", str(path), "--algo", "ed25519")
    (commands.domain_dir / "dkim:s.pem").write_bytes(path.read_bytes())
    words = [*PROGRAM, "--config-dir", str(commands.config_dir), "dkim-sign"]
    text = "From: Ana <ana@here.example>\n\nhello\n"
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "d=here.example" in done.stdout
    done = subprocess.run(words, input="To: x\n\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the message has no From with a domain" in done.stderr


def test_a_domain_that_is_none_is_refused(commands: CommandLine) -> None:
    for command in ("dkim-keygen", "dkim-dns", "dkim-sign"):
        assert "no valid domain name" in commands.fails(command, "ñ..example")


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("body", ["", "Hello  you \nmañana\n\n", "no end"])
def test_what_is_signed_on_the_command_line_is_verified_there(
    commands: CommandLine, end: str, body: str
) -> None:
    for key in OUR_KEYS:
        (commands.domain_dir / f"dkim:{key.selector}.pem").write_text(key.key.to_pem())
    message = f"From: ana@here.example\nSubject: hi\n\n{body}".replace("\n", end).encode()
    made = commands.run("dkim-sign", "here.example", data=message)
    assert made.status == 0 and made.err == "" and "\r" not in made.out
    assert made.out.count("DKIM-Signature:") == 2 and made.out.endswith("\n")
    one = commands.run("dkim-sign", "here.example", "k1", data=message)
    assert one.out.count("DKIM-Signature:") == 1
    for key, field in zip(OUR_KEYS, made.out.split("DKIM-Signature:")[1:], strict=True):
        whole = f"DKIM-Signature:{field}".replace("\n", end).encode() + message
        ended = commands.run("dkim-verify", "--txt", key.record, data=whole)
        told = f"pass  here.example, selector {key.selector}\n"
        assert ended == (0, told, "")
        assert chasquid._dkim().verify(whole, dnsfunc=lookup(OUR_KEYS))


def test_a_message_that_is_header_alone_can_be_signed(commands: CommandLine) -> None:
    (commands.domain_dir / "dkim:a.pem").write_text(ED25519.to_pem())
    made = commands.run("dkim-sign", "here.example", data=b"From: ana@here.example\nSubject: hi\n")
    assert made.status == 0
    message = made.out.encode() + b"From: ana@here.example\nSubject: hi\n"
    record = chasquid.DkimKey("here.example", "a", ED25519).record
    assert commands.run("dkim-verify", "--txt", record, data=message).status == 0


def test_a_signature_that_does_not_pass_ends_with_1_and_says_why(commands: CommandLine) -> None:
    message = ours(OUR_KEYS, now=time.time()).replace(b"Hello", b"HELLO")
    ended = commands.run("dkim-verify", "--txt", OUR_KEYS[1].record, data=message)
    assert ended == (
        1,
        "permerror  here.example, selector k0: the key is for another algorithm\n"
        "fail  here.example, selector k1: the body was changed\n",
        "",
    )


def test_one_good_signature_is_enough(commands: CommandLine) -> None:
    message = b"DKIM-Signature: x\r\n" + ours(OUR_KEYS, now=time.time())
    ended = commands.run("dkim-verify", "--txt", OUR_KEYS[0].record, data=message)
    assert ended.status == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == ["neutral", "pass", "permerror"]
    assert ended.out.startswith("neutral  ?, selector ?: the field is malformed\n")


def test_a_message_without_a_signature_is_an_error(commands: CommandLine) -> None:
    assert commands.fails("dkim-verify", data=MESSAGE) == "the message has no DKIM-Signature"
    assert commands.fails("dkim-verify", data=b"") == "the message has no DKIM-Signature"


@pytest.mark.parametrize("command", [["dkim-sign", "here.example"], ["dkim-verify"]])
def test_a_header_with_a_bad_line_is_an_error(commands: CommandLine, command: list[str]) -> None:
    (commands.domain_dir / "dkim:a.pem").write_text(ED25519.to_pem())
    text = commands.fails(*command, data=b"From: a\nno field\n\n")
    assert text == "the header holds a line that is no field: no field"


def test_a_record_of_any_text_is_no_reason_to_crash(commands: CommandLine) -> None:
    ended = commands.run("dkim-verify", "--txt", "p=ñ☂", data=ours(OUR_KEYS, now=time.time()))
    assert ended.status == 1 and ended.err == ""
    assert [line.split()[0] for line in ended.out.splitlines()] == ["permerror", "permerror"]
