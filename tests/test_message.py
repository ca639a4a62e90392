# SPDX-License-Identifier: Apache-2.0
"""Room MESSAGE: header block and fields, authors, the hash of a body, stored messages."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import tracemalloc

import pytest
from dkim import canonicalization
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import PLACES, cuts, is_quick, searched

import chasquid

Message = chasquid.Message
TANGLED = st.text(st.sampled_from("\r\n.a: \t")).map(str.encode)


@pytest.mark.parametrize(
    ("data", "block"),
    [
        (b"", None),
        (b"\r\n", b""),
        (b"\r\nbody\r\n\r\n", b""),
        (b"A: b\r\n", None),
        (b"A: b\r\n\r\n", b"A: b\r\n"),
        (b"A: b\r\n c\r\nD: e\r\n\r\nbody\r\n\r\n", b"A: b\r\n c\r\nD: e\r\n"),
        (b"A: b\n\nbody\r\n\r\n", b"A: b\n\nbody\r\n"),  # LF alone ends no line
    ],
)
def test_the_header_ends_at_the_first_empty_line(data, block):
    assert chasquid.header_block(data) == block


@searched
@given(TANGLED, TANGLED)
def test_what_follows_the_empty_line_never_changes_the_header(head, body):
    block = chasquid.header_block(head)
    if block is not None:
        assert chasquid.header_block(head + body) == block
        assert head.startswith(block + b"\r\n")


def names(block: bytes) -> list[str]:
    return [field.name for field in chasquid.header_fields(block)]


def test_fields_have_lower_case_names():
    block = b"From: a\r\nSubject:b\r\n\tc\r\n  d\r\nX-Odd \t: e:f\r\nEmpty:\r\n"
    assert names(block) == ["from", "subject", "x-odd", "empty"]
    assert names(b"") == []


@pytest.mark.parametrize(
    "block",
    [b" folded first\r\n", b"no colon\r\n", b": no name\r\n", b"A: b\r\n\r\n", b"s p: x\r\n",
     b"\xc3\xb1: x\r\n", b"From a@b Mon\r\n", b"A\x00: b\r\n"],
)  # fmt: skip
def test_a_line_that_is_no_field_is_refused(block):
    with pytest.raises(ValueError):
        chasquid.header_fields(block)


FIELDS = st.lists(
    st.tuples(
        st.from_regex(r"[!-9;-~]{1,12}", fullmatch=True),
        st.lists(st.from_regex(r"[!-~ñ]{1,10}", fullmatch=True), min_size=1, max_size=3),
    ),
    max_size=5,
)


@searched
@given(FIELDS)
def test_folded_fields_are_read_back(fields):
    block = b"".join(chasquid.fold(name, *parts) for name, parts in fields)
    assert names(block) == [name.lower() for name, _ in fields]


def test_a_message_in_memory_comes_with_what_stands_in_front():
    message = Message(b"P: 1\r\n", "/nonexistent", 9, b"A: b\r\n\r\nx")
    assert b"".join(message.chunks()) == b"P: 1\r\nA: b\r\n\r\nx"
    assert message.header() == b"P: 1\r\nA: b\r\n"


def test_a_message_on_the_disk_ends_where_its_size_says(tmp_path):
    data = b"A: b\r\n\r\n" + b"x" * (2 * chasquid.CHUNK) + b"\r\n"
    (tmp_path / "m").write_bytes(data + b'{"journal": 1}\n')
    message = Message(b"P: 1\r\n", str(tmp_path / "m"), len(data))
    chunks = list(message.chunks())
    assert b"".join(chunks) == b"P: 1\r\n" + data
    assert max(map(len, chunks)) <= chasquid.CHUNK
    assert message.header() == b"P: 1\r\nA: b\r\n"


def test_a_file_that_is_too_short_is_an_error_and_not_a_shorter_message(tmp_path):
    (tmp_path / "m").write_bytes(b"A: b\r\n")
    with pytest.raises(OSError, match="shorter"):
        list(Message(b"", str(tmp_path / "m"), 100).chunks())


@pytest.mark.parametrize("prefix", [b"", b"P: 1\r\n"])
@pytest.mark.parametrize("data", [b"\r\nbody\r\nmore", b"", b"A: b\r\n", b"A: b\r\n\r\nx"])
def test_the_header_is_what_stands_before_the_first_empty_line(tmp_path, prefix, data):
    (tmp_path / "m").write_bytes(data)
    expected = (prefix + data).split(b"\r\n\r\n")[0].removesuffix(b"\r\n")
    if (prefix + data).startswith(b"\r\n"):
        expected = b""
    for message in (
        Message(prefix, str(tmp_path / "m"), len(data)),
        Message(prefix, "/nonexistent", len(data), data),
    ):
        assert message.header().removesuffix(b"\r\n") == expected


def test_a_header_without_end_is_not_read_for_ever(tmp_path):
    data = b"A: b\r\n" * 1_000_000
    (tmp_path / "m").write_bytes(data)
    header = Message(b"", str(tmp_path / "m"), len(data)).header()
    assert chasquid.HEADER_LIMIT <= len(header) <= chasquid.HEADER_LIMIT + 2 * chasquid.CHUNK


@searched
@given(TANGLED, PLACES)
@example(b"\r\r\n\r", [1, 2, 3])
@example(b"\r\n", [1])
def test_line_ends_become_lf_wherever_the_message_is_cut(data, places):
    pieces = cuts(data, places)
    assert b"".join(pieces) == data
    assert b"".join(chasquid.with_lf(pieces)) == data.replace(b"\r\n", b"\n")


@searched
@given(st.lists(st.text(st.sampled_from("a.\t"), max_size=4)), PLACES)
def test_line_ends_of_a_message_come_back(lines, places):
    data = "".join(f"{line}\r\n" for line in lines).encode()
    lf = b"".join(chasquid.with_lf(cuts(data, places)))
    assert lf.replace(b"\n", b"\r\n") == data


def test_a_folded_field_has_one_part_on_each_line():
    assert chasquid.fold("Received", "from a", "by b;", "today") == (
        b"Received: from a\r\n\tby b;\r\n\ttoday\r\n"
    )


# --- fields -------------------------------------------------------------------------------------

VALUES = st.lists(st.text(st.sampled_from('ab :;,"()\\\t<>@ñ')), min_size=1, max_size=4)


@searched
@given(st.lists(st.tuples(st.from_regex(r"[!-9;-~]{1,9}", fullmatch=True),
                          st.sampled_from(["", " ", "\t "]), VALUES), max_size=6))  # fmt: skip
def test_the_fields_make_up_the_header_again(parts):
    raw = [
        f"{name}{space}:{(chr(13) + chr(10) + chr(9)).join(lines)}\r\n".encode()
        for name, space, lines in parts
    ]
    fields = chasquid.header_fields(b"".join(raw))
    assert [field.raw for field in fields] == raw
    assert [field.name for field in fields] == [name.lower() for name, _, _ in parts]
    assert [field.value for field in fields] == [each.partition(b":")[2] for each in raw]


@searched
@given(st.text(st.sampled_from("\r\na: \t")).map(str.encode))
def test_no_octet_of_a_header_is_lost(block):
    with contextlib.suppress(ValueError):
        assert b"".join(field.raw for field in chasquid.header_fields(block)) == block


def test_what_is_said_of_a_bad_line_is_short_and_printable():
    with pytest.raises(ValueError) as caught:
        chasquid.header_fields(b"A: b\r\nbad \x07\xff\x00" + b"x" * 100_000 + b"\r\n")
    assert str(caught.value).startswith("bad ")
    assert len(str(caught.value)) <= 60 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "field", [b"A:\r\n", b"A: b\r\n c\r\n\td\r\n", b"A:" + b"\r\n " * 100 + b"\r\n"]
)
def test_a_header_has_at_most_a_thousand_fields(field):
    assert len(chasquid.header_fields(field * 1000)) == 1000
    with pytest.raises(ValueError, match="more than 1000 fields"):
        chasquid.header_fields(field * 1001)


def test_a_header_of_60_000_fields_is_refused_at_once():
    block = b"A:\r\n" * 60_000

    def refused() -> None:
        with pytest.raises(ValueError):
            chasquid.header_fields(block)

    assert is_quick(refused, 1.0)


# --- comments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("", ""),
        ("a (b) c", "a   c"),
        ("a(b(c)d)e", "a  e"),
        ("(a)(b)", "  "),
        ('a "(b)" c', 'a "(b)" c'),
        (r'a "\"(b" c', r'a "\"(b" c'),
        (r"a (\)b) c", "a   c"),
        (r"a (\(b) c", "a   c"),
        (r"a \( c", r"a \( c"),
        ('a (") b', "a   b"),
        ("a\r\n (b\r\n c)\r\n d", "a\r\n  \r\n d"),
    ],
)
def test_comments_are_left_out(text, plain):
    assert chasquid.without_comments(text) == plain


@pytest.mark.parametrize("text", ["(", "(a", "((a)", 'a "b', r'"a\"', ")", "a)", "\\", "(\\"])
def test_what_is_not_closed_is_an_error(text):
    with pytest.raises(ValueError):
        chasquid.without_comments(text)


@searched
@given(st.recursive(
    st.text(st.sampled_from("ab c@<")).filter(bool),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=6,
).filter(lambda text: text.startswith("(")))  # fmt: skip
def test_a_comment_may_hold_comments(comment):
    assert chasquid.without_comments(f"x{comment}y").split() == ["x", "y"]


def test_what_stands_for_quoted_strings_may_be_chosen():
    assert chasquid.without_comments('"a@b" ("c") <d"e"f@g>', quoted="-") == "-   <d-f@g>"


# --- authors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "domains"),
    [
        ("ana@a.example", "a.example"),
        ("Ana <ana@a.example>", "a.example"),
        ("<ana@A.Example.>", "a.example"),
        ("Ana\r\n <ana@a.example> (late)", "a.example"),
        ("ana @ a . example", "a.example"),
        ("<@relay.example:ana@a.example>", "a.example"),
        # an "@" that is no part of an address
        ('"Ana, ana@b.example" <ana@a.example>', "a.example"),
        (r'"Ana \"<ana@b.example>" <ana@a.example>', "a.example"),
        ("Ana (ana@b.example) <ana@a.example>", "a.example"),
        ("(x@b.example (y@c.example)) ana@a.example (z@d.example)", "a.example"),
        ('"ana@b.example"@a.example', "a.example"),
        ("=?utf-8?q?ana=40b.example?= <ana@a.example>", "a.example"),
        ("ana＠b.example <ana@a.example>", "a.example"),
        # several
        ("ana@a.example, Ben <ben@b.example>", "a.example b.example"),
        ("ana@a.example, ben@A.example, eva@a.EXAMPLE", "a.example"),
        ("friends: ana@a.example, B <b@b.example>;", "a.example b.example"),
        ("one: a@a.example;, two: b@b.example;, c@c.example", "a.example b.example c.example"),
        ("a@a.example,, b@b.example,", "a.example b.example"),
        ("nobody:;", ""),
        # in other scripts
        ("ana@ñandú.example", "xn--and-6ma2c.example"),
        ("ana@ÑANDÚ。example", "xn--and-6ma2c.example"),
        ("ana@XN--and-6MA2C.example", "xn--and-6ma2c.example"),
        # malformed: whatever a reader might take for the domain
        ("<ana@a.example> <ben@b.example>", "a.example b.example"),
        ("ana@a.example ben@b.example", "a.example b.example"),
        ("ana@a.example@b.example", "a.example b.example"),
        ("<<ana@a.example>>", "a.example"),
        ("Ana <ana@a.example", "a.example"),
        ("ana@a.example>, ben@b.example", "a.example b.example"),
        ('"Ana <ana@a.example>, ben@b.example', "a.example b.example"),
        ("(Ana <ana@a.example>, ben@b.example", "a.example b.example"),
        ("Ana) <ana@a.example>, ben@b.example", "a.example b.example"),
        ("<ana@a.example>: ben@b.example;", "a.example b.example"),
        ("ana@a.example, junk", "a.example"),
        ("<@a.example,@b.example:ana@c.example>", "a.example b.example c.example"),
        ("@a.example", "a.example"),
        ('ana@"a.example"', "a.example"),
        # nothing
        ("", ""),
        (" \r\n ", ""),
        ("Ana", ""),
        ("ana@", ""),
        ("ana@.", ""),
        ("ana@..., ben@b.example", "b.example"),
        ("ana@\u2602.example, ben@b.example", "b.example"),
    ],
)  # fmt: skip
def test_the_domains_of_authors(value, domains):
    assert chasquid.author_domains(value.encode()) == domains.split()


def test_octets_that_are_no_text_hide_no_author():
    assert chasquid.author_domains(b"\xff\xfe <ana@a.example>, b@\xff.example") == ["a.example"]


@searched
@given(st.text(st.sampled_from('ab.@<>,;:"()\\ ñ\t')))
def test_any_text_has_domains_in_a_form_for_the_dns(text):
    for domain in chasquid.author_domains(text.encode()):
        assert domain.isascii() and domain and domain == domain.lower()


@searched
@given(st.lists(st.sampled_from(["a.example", "b.example", "ñ.example"]), min_size=1, max_size=4),
       st.text(st.sampled_from('<>,;:"()\\ @'), max_size=4),
       st.integers(0, 60))  # fmt: skip
def test_no_junk_between_addresses_hides_them_all(domains, junk, place):
    text = ", ".join(f"Name <x@{domain}>" for domain in domains)
    place = place % (text.index("<") + 1)
    assert chasquid.author_domains((text[:place] + junk + text[place:]).encode())


ATOM = st.text(st.sampled_from("aB0-_.+'= @<>"), max_size=8)


@searched
@given(ATOM, ATOM, ATOM, st.sampled_from(["", " ", "\r\n"]))
def test_an_ordinary_from_field_says_what_it_says_beside_a_comment(name, local, domain, end):
    # with a comment the field is read in the long way
    for value in (f" {name} <{local}@{domain}>{end}", f" {local}@{domain}{end}"):
        plain = chasquid.author_domains(value.encode())
        assert plain == chasquid.author_domains(b" ()" + value.encode())


LONG = 256 * 1024


def repeated(text: str) -> bytes:
    return (text * (LONG // len(text.encode()))).encode()


@pytest.mark.parametrize(
    "value",
    [repeated(text) for text in (
        " ", ",", ";", ":", "@", "<", ">", '"', "\\", "(", ")", "x", "a@b.example,", "<a@", "<a@,",
        "x:", "g:a@b.c;", "\r\n ", "a@ñ.example,", "<@a,",
    )]
    + [b"(" * (LONG // 2) + b")" * (LONG // 2), b"a@" + repeated("."), b"x <a@" + repeated("b"),
       b"<a@b.example>" + repeated(" ") + b"x"],
    ids=lambda value: repr(value[:12]),
)  # fmt: skip
def test_a_from_field_of_any_content_takes_time_in_line_with_its_length(value):
    # a second is twenty times what most of these need; twice the work for each octet before
    # it would need minutes
    assert is_quick(lambda: chasquid.author_domains(value), 2.0)


# --- results in our name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "claims"),
    [
        (b"Authentication-Results: mail.here.example; spf=pass", True),
        (b"AUTHENTICATION-RESULTS : MAIL.here.Example ; spf=pass", True),
        (b"Authentication-Results:\r\n\tmail.here.example\r\n 1; none", True),
        (b"Authentication-Results: (a; comment) mail.here.example (b);", True),
        (b'Authentication-Results: "mail.here.example"; none', True),
        (b'Authentication-Results: "mail.here\\.example"; none', True),
        (b"Authentication-Results: mail.here.example.; none", True),
        (b"Authentication-Results: mail.here.example", True),
        (b"Authentication-Results:", True),
        (b"Authentication-Results: ; spf=pass", True),
        (b"Authentication-Results: (mail.here.example; spf=pass", True),
        (b'Authentication-Results: "mail.here.example; spf=pass', True),
        (b"Authentication-Results: (" + b"x" * 2000 + b") mail.here.example; none", True),
        (b"Authentication-Results: other.example; spf=pass", False),
        (b"Authentication-Results: other.example;" + b" spf=pass;" * 2000, False),
        (b"Authentication-Results: other.example; x=mail.here.example", False),
        (b"Authentication-Results: x.mail.here.example; spf=pass", False),
        (b"X-Authentication-Results: mail.here.example; spf=pass", False),
        (b"Received: mail.here.example; spf=pass", False),
    ],
)
def test_whose_results_they_are(raw, claims):
    (field,) = chasquid.header_fields(raw + b"\r\n")
    assert chasquid.claims_results_of(field, "mail.here.example") is claims


def test_results_of_a_host_in_another_script_are_recognised():
    for name in ("ñandú.example", "ÑANDÚ.example", "xn--and-6ma2c.example"):
        (field,) = chasquid.header_fields(f"Authentication-Results: {name}; none\r\n".encode())
        assert chasquid.claims_results_of(field, "xn--and-6ma2c.example")


# --- the hash of a body -------------------------------------------------------------------------

LINES = st.lists(
    st.text(st.sampled_from("ab \t.\0"), max_size=6).map(str.encode) | st.just(b"\xff\xc3"),
    max_size=8,
)
BODIES = st.builds(
    lambda lines, end: b"\r\n".join(lines) + end,
    LINES,
    st.sampled_from([b"", b"\r\n", b"\r\n\r\n"]),
)
FORMS = {"simple": canonicalization.Simple, "relaxed": canonicalization.Relaxed}


def hashed(form: str, pieces: list[bytes]) -> tuple[bytes, int]:
    body = chasquid.BodyHash(relaxed=form == "relaxed")
    for piece in pieces:
        body.feed(piece)
    return body.digest(), body.length


def by_dkimpy(form: str, body: bytes) -> tuple[bytes, int]:
    canonical = FORMS[form].canonicalize_body(body)
    return hashlib.sha256(canonical).digest(), len(canonical)


@pytest.mark.parametrize("form", FORMS)
@settings(searched, max_examples=300)
@given(BODIES, PLACES)
@example(b"", [])
@example(b" ", [])
@example(b"\r\n", [1])
@example(b"a\r\n \r\n", [2, 3, 4])
@example(b"a \t\r\n \r\n b", [2, 3, 4, 5, 6, 7])
@example(b"a\r\n" + b"\r\n" * 200_000 + b"b", [100_001])
@example(b"a" + b" \t" * 500 + b"b\r\n", [101])
def test_a_body_has_the_hash_that_dkimpy_finds_wherever_it_is_cut(form, body, places):
    assert hashed(form, cuts(body, places)) == by_dkimpy(form, body)


@pytest.mark.parametrize("form", FORMS)
def test_a_body_may_come_octet_by_octet(form):
    body = b" a  b\t\r\n\t\r\n\r\nc\r\n. \r\n\r\n \r\n\r\n"
    assert hashed(form, [bytes([octet]) for octet in body]) == by_dkimpy(form, body)


def test_the_hash_of_an_empty_body_is_the_one_of_the_standard():
    # RFC 6376, 3.4.3 and 3.4.4
    found = {form: base64.b64encode(hashed(form, [])[0]) for form in FORMS}
    assert found == {
        "simple": b"frcCV1k9oG9oKj3dpUqdJg1PxRT2RSN/XKdLCPjaYaY=",
        "relaxed": b"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
    }


@pytest.mark.parametrize("form", FORMS)
def test_what_a_hash_needs_of_memory_does_not_grow_with_the_body(form):
    body = chasquid.BodyHash(relaxed=form == "relaxed")
    piece = b"a  b\r\n" * 5000 + b" " * 10_000 + b"\r\n" * 10_000
    body.feed(piece)
    tracemalloc.start()
    try:
        for _ in range(20):
            body.feed(piece)
        assert tracemalloc.get_traced_memory()[0] < 10_000
        assert tracemalloc.get_traced_memory()[1] < 8 * len(piece)
    finally:
        tracemalloc.stop()
