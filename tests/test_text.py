# SPDX-License-Identifier: Apache-2.0
"""Room TEXT: addresses, internationalised names, dates, text made safe."""

from __future__ import annotations

import email.utils

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import searched

import chasquid

ANY_TEXT = st.text(st.characters(codec=None), max_size=60)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("a@b", ("a", "b")),
        ("a", ("a", "")),
        ("", ("", "")),
        ('"a@b"@c', ('"a@b"', "c")),
        ("@c", ("", "c")),
        ("a@", ("a", "")),
    ],
)
def test_an_address_is_split_at_its_last_at_sign(address, parts):
    assert chasquid.split_address(address) == parts


@pytest.mark.parametrize(
    ("domain", "unicode"),
    [
        ("Example.ORG", "example.org"),
        ("xn--aca-6ma.example", "ñaca.example"),
        ("XN--ACA-6MA.Example", "ñaca.example"),
        ("ÑACA.example", "ñaca.example"),
        ("n\u0303aca.example", "ñaca.example"),  # n and a combining tilde
        ("ñaca\u3002example", "ñaca.example"),  # the ideographic full stop
        ("\uff45xample.org", "example.org"),  # a full-width letter
        ("straße.example", "straße.example"),
        ("_dmarc.example.org", "_dmarc.example.org"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("[IPv6:2001:DB8::1]", "[IPv6:2001:DB8::1]"),
    ],
)
def test_a_domain_has_one_form_in_unicode(domain, unicode):
    assert chasquid.domain_to_unicode(domain) == unicode


@pytest.mark.parametrize(
    "domain",
    [
        "", ".", "a..b", "a b", "-ñ-.example", "xn--a.example", "xn--zzzzzzzzzz\x00.org",
        "ñ" * 64 + ".example", "\u2028.org", "☃\ud800", "xn--\x7f", "a@ñ",
    ],
)  # fmt: skip
def test_a_malformed_domain_is_refused(domain):
    with pytest.raises(ValueError, match="no valid domain name"):
        chasquid.domain_to_unicode(domain)


def test_the_refusal_of_a_domain_is_one_printable_line():
    with pytest.raises(ValueError) as caught:
        chasquid.domain_to_unicode("ñ\r\n250 ok" + "x" * 500)
    assert chasquid.printable(str(caught.value).replace("\n", ""), 10_000)
    assert "\r" not in str(caught.value).split("is no valid")[0]
    assert "\n" not in str(caught.value).split("is no valid")[0]


@searched
@given(ANY_TEXT)
@example("xn--")
@example("xn--\xff")
@example("xn--a-\u0660")
@example("\u200d.com")
@example("xn--99999999999.com")
def test_a_domain_is_either_refused_or_brought_to_a_fixed_form(domain):
    try:
        once = chasquid.domain_to_unicode(domain)
    except ValueError:
        return
    assert chasquid.domain_to_unicode(once) == once
    if not once.startswith("["):
        ascii_form = chasquid.domain_to_ascii(once)
        assert ascii_form.isascii()
        assert chasquid.domain_to_unicode(ascii_form) == once


@searched
@given(ANY_TEXT)
def test_a_domain_in_ascii_is_ascii_or_refused(domain):
    try:
        assert chasquid.domain_to_ascii(domain).isascii()
    except ValueError:
        assert not domain.isascii()


def test_only_the_domain_of_an_address_turns_into_ascii():
    assert chasquid.address_to_ascii("ñoño@ñaca.example") == "ñoño@xn--aca-6ma.example"
    assert chasquid.address_to_ascii("Postmaster") == "Postmaster"
    assert chasquid.address_to_ascii("") == ""


@pytest.mark.parametrize(
    ("user", "form"),
    [
        ("Bob", "bob"),
        ("B.o-b+X", "b.o-b+x"),
        ("ÑOÑO", "ñoño"),
        ("n\u0303", "ñ"),
        ("\uff21", "a"),  # full-width
        ("Σίσυφος", "σίσυφος"),
    ],
)
def test_users_are_compared_without_case_and_width(user, form):
    assert chasquid.normalize_user(user) == form


@pytest.mark.parametrize("user", ["", "a b", "ñ\tx", "ñ\n", "\u2028ñ", "\ud800", "ñ\u0000"])
def test_a_user_name_that_the_profile_forbids_is_refused(user):
    with pytest.raises(ValueError):
        chasquid.normalize_user(user)


@searched
@given(ANY_TEXT)
def test_normalising_a_user_twice_changes_nothing_more(user):
    try:
        once = chasquid.normalize_user(user)
    except ValueError:
        return
    assert chasquid.normalize_user(once) == once


def test_an_address_is_compared_by_user_and_domain():
    assert chasquid.normalize_address("ÑoÑo@XN--ACA-6MA.example") == "ñoño@ñaca.example"


@pytest.mark.parametrize("address", ["", "bob", "bob@", "@example.org", "a b@example.org"])
def test_an_address_without_user_or_domain_cannot_be_compared(address):
    with pytest.raises(ValueError):
        chasquid.normalize_address(address)


@searched
@given(ANY_TEXT)
def test_printable_text_is_one_line_that_any_log_can_hold(text):
    safe = chasquid.printable(text)
    safe.encode()
    assert len(safe.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in safe)


def test_printable_text_is_cut_at_its_limit():
    assert chasquid.printable("x" * 500) == "x" * 500
    assert chasquid.printable("x" * 501) == "x" * 499 + "…"
    assert chasquid.printable("  a\r\n\tb  ", 20) == "a b"


def test_plural():
    assert [chasquid.plural(n, "message") for n in (0, 1, 2)] == [
        "0 messages",
        "1 message",
        "2 messages",
    ]


@searched
@given(st.integers(0, 4_102_444_800))
def test_a_date_reads_back_as_the_same_second(seconds):
    text = chasquid.rfc5322_date(seconds)
    assert email.utils.parsedate_to_datetime(text).timestamp() == seconds


def test_a_date_is_in_english_and_in_utc():
    assert chasquid.rfc5322_date(0) == "Thu, 1 Jan 1970 00:00:00 +0000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"), (0, "0s"), (45.2, "45s"), (59.6, "1m"), (720, "12m"), (3599.9, "1h 0m"),
        (11100, "3h 5m"), (187200, "2d 4h"),
    ],
)  # fmt: skip
def test_durations_as_a_person_says_them(seconds, text):
    assert chasquid.duration_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("host", ("host", 25)),
        ("host:1", ("host", 1)),
        (":587", ("", 587)),
        ("[::1]:2525", ("::1", 2525)),
        ("[::1]", ("::1", 25)),
        ("::1", ("::1", 25)),
        ("2001:db8::1", ("2001:db8::1", 25)),
        ("192.0.2.1:65535", ("192.0.2.1", 65535)),
        ("[fe80::1%eth0]:25", ("fe80::1%eth0", 25)),
    ],
)
def test_host_and_port(text, pair):
    assert chasquid.host_and_port(text, 25) == pair


@pytest.mark.parametrize(
    "text", ["host:", "host:x", "host:65536", "[::1", "::1]", "[]:25", "a:b:c", "host:-1", "[x y]"]
)
def test_what_is_no_host_and_port_is_refused(text):
    with pytest.raises(ValueError):
        chasquid.host_and_port(text, 25)


@searched
@given(st.text(max_size=30))
def test_host_and_port_raises_nothing_else(text):
    try:
        _, port = chasquid.host_and_port(text, 25)
    except ValueError:
        return
    assert 0 <= port <= 65535
