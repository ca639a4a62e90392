# SPDX-License-Identifier: Apache-2.0
"""MESSAGE: the header block, stored messages, line ends."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lower import chasquid, cuts, searched

Message = chasquid.Message
PLACES = st.lists(st.integers(0, 10_000), max_size=8)
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
