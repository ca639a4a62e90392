# SPDX-License-Identifier: Apache-2.0
"""Room READER: what a person reads in a message, whatever it is made of."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import is_quick

import chasquid
from chasquid import ReadMessage, code_in, decode_text, decode_words, links_in, text_of_html


def read(text: str | bytes) -> ReadMessage:
    raw = text.encode() if isinstance(text, str) else text
    return ReadMessage(raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))


def html(body: bytes, kind: str = "text/html") -> ReadMessage:
    return read(f"Content-Type: {kind}\n\n".encode() + body)


# --- charsets ---


@pytest.mark.parametrize(
    ("label", "octets", "text"),
    [
        ("iso-8859-1", b"\x93caf\xe9\x94 \x80", "“café” €"),  # holds windows-1252
        ("latin1", b"\x85", "…"),
        ("ISO-8859-9", b"\xfd\x80", "ı€"),
        ("gb2312", "鎔镕".encode("gbk"), "鎔镕"),  # holds GBK
        ("x-gbk", "镕".encode("gbk"), "镕"),
        ("shift_jis", b"\x87\x40", "①"),  # holds cp932
        ("x-sjis", b"\x87\x40", "①"),
        ("windows-874", "สวัสดี".encode("cp874"), "สวัสดี"),
        ("tis-620", "สวัสดี".encode("cp874"), "สวัสดี"),
        ("iso-8859-8-i", "שלום".encode("iso8859_8"), "שלום"),
        ("iso-8859-8-e", "שלום".encode("iso8859_8"), "שלום"),
        ("ks_c_5601-1987", "똠".encode("cp949"), "똠"),
        ("big5", "㗎".encode("big5hkscs"), "㗎"),
        ("x-euc-jp", "日本".encode("euc_jp"), "日本"),
        ("iso-2022-jp", "日本".encode("iso2022_jp"), "日本"),
        ("unicode-1-1-utf-7", b"+AOQ-", "ä"),
        ("koi8-r", "Привет".encode("koi8_r"), "Привет"),
        ("utf8", "ä".encode(), "ä"),
        (' "UTF-8" ', "ä".encode(), "ä"),
        ("us-ascii", "ä".encode(), "ä"),  # UTF-8 is tried first
        ("us-ascii", b"\xe4", "ä"),
        ("", "ä".encode(), "ä"),
        ("", b"\xe4", "ä"),
        ("x-nonsense", "ä".encode(), "ä"),
        ("x-cp1251", "Я".encode("cp1251"), "Я"),
        ("zlib", b"x", "x"),  # no charset, but a codec of Python
        ("idna", b"x", "x"),
        ("punycode", b"x", "x"),
        ("unicode_escape", b"\\x41", "\\x41"),
    ],
)
def test_charsets_are_what_mail_means_by_them(label: str, octets: bytes, text: str) -> None:
    assert decode_text(octets, label) == text
    header = f"Content-Type: text/plain; charset={label.strip() or chr(34) * 2}\n"
    encoded = base64.b64encode(octets).decode()
    message = read(f"{header}Content-Transfer-Encoding: base64\n\n{encoded}\n")
    assert message.text == text


def test_html_may_name_its_charset_itself() -> None:
    page = b'<html><head><meta charset="windows-1251"><p>\xcf\xf0'
    assert "Пр" in html(page).html
    old = b'<META http-equiv=Content-Type content="text/html; charset=koi8-r"><p>\xf0\xd2'
    assert "Пр" in html(old).html
    assert "Пр" in html(page, "text/html; charset=us-ascii").html
    assert "Пр" not in html(page, "text/html; charset=utf-8").html  # the header wins


@given(st.binary(max_size=200), st.text(max_size=20))
def test_any_octets_and_label_give_a_text(octets: bytes, label: str) -> None:
    decode_text(octets, label).encode()


# --- encoded words ---


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("plain", "plain"),
        ("=?utf-8?q?=C3=A4?=", "ä"),
        ("Hi =?utf-8?q?=C3=A4?= =?utf-8?b?w6Q=?= you =?no?q?x?=", "Hi ää you x"),
        ("=?utf-8*de?Q?Gr=C3=BC=C3=9Fe?=", "Grüße"),  # with a language
        ("=?utf-8?Q?two words?=", "two words"),
        ("=?utf-8?Q?a_b?=", "a b"),
        ("=?utf-8?b?w6Q?=", "ä"),  # without its padding
        ("=?utf-8?q?=C3?= =?utf-8?q?=A4?=", "ä"),  # a character split among two
        ("=?iso-8859-1?q?=93x=94?=", "“x”"),
        ("a=?utf-8?q?b?=c", "abc"),
        ("=?utf-8?q?ä?=", "ä"),  # raw octets in it
        ("=?utf-8?q?" + "x" * 2000 + "?=", "x" * 2000),
        ("=?utf-8?q?a?= \t =?utf-8?q?b?=", "ab"),
        ("=?utf-8?q?a?= b =?utf-8?q?c?=", "a b c"),
        ("=?utf-8?x?a?=", "=?utf-8?x?a?="),
        ("=?utf-8?q?a", "=?utf-8?q?a"),
    ],
)
def test_encoded_words_as_mail_programs_read_them(written: str, meant: str) -> None:
    assert decode_words(written) == meant
    assert read(f"Subject: {written}\n\n").headers == [("Subject", meant)]


# --- structure ---


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ('attachment; filename="a.txt"', "a.txt"),
        ("attachment; filename=a b.txt", "a b.txt"),
        ('attachment; filename="grün.txt"', "grün.txt"),  # raw UTF-8
        ("attachment; filename==?utf-8?q?gr=C3=BCn?=", "grün"),  # not even quoted
        ('attachment; filename="=?utf-8?b?Z3LDvG4=?="', "grün"),
        ("attachment; filename=\"a\"; filename*=utf-8''gr%C3%BCn", "grün"),
        ("attachment; filename*=utf-8'de'gr%C3%BCn; filename=a", "grün"),
        ("attachment; filename*0*=utf-8''gr%C3; filename*1*=%BC; filename*2=n", "grün"),
        ("attachment; filename*1=b; filename*0=a", "ab"),
        ('attachment (really); filename="a (1).txt" (a name)', "a (1).txt"),
        ('attachment; filename="a;b\\"c"', 'a;b"c'),
    ],
)
def test_names_of_files(field: str, name: str) -> None:
    message = read(f"Content-Disposition: {field}\n\nx")
    assert [part.filename for part in message.attachments] == [name]


def test_comments_stand_in_fields_of_mime() -> None:
    message = read(
        "Content-Type: text/plain (plain); charset=(a charset)utf-8\n"
        "Content-Transfer-Encoding: base64 (as usual)\n\nw6Q=\n"
    )
    assert message.text == "ä"


@pytest.mark.parametrize(
    "header",
    [
        "Content-Type: multipart/related; boundary=b\n\nnever opened",
        "Content-Type: multipart/related\n\nnever opened",
        "Content-Type: multipart/mixed; boundary=b\n\n--b--\n",
        "Content-Type: nonsense\n\nnever opened",
    ],
)
def test_a_multipart_message_without_parts_is_a_text(header: str) -> None:
    message = read(header)
    assert len(message.parts) == 1 and message.shown_text is not None
    assert message.links() == [] and code_in(message.shown_text) is None


def test_an_attached_message_comes_back_octet_for_octet() -> None:
    attached = b"Subject:  odd  \r\n folded\r\nX:y\r\n\r\n.\r\n  \r\nbody\xff"
    raw = (
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
        b"Content-Type: message/rfc822\r\n\r\n" + attached + b"\r\n--b--\r\n"
    )
    [part] = ReadMessage(raw).attachments
    assert (part.content_type, part.data) == ("message/rfc822", attached)


def test_boundaries_that_begin_alike() -> None:
    message = read(
        "Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Type: multipart/alternative; "
        "boundary=bb\n\n--bb\n\nplain\n--bb\nContent-Type: text/html\n\n<p>rich\n--bb--\n--b\n"
        "Content-Type: image/png\n\nx\n--b--\n"
    )
    assert (message.text, message.html) == ("plain", "<p>rich")
    assert [part.content_type for part in message.attachments] == ["image/png"]


def test_lines_that_flow_are_one() -> None:
    message = read(
        "Content-Type: text/plain; format=flowed\n\n"
        "one \ntwo\n> quoted \n> more\n>> deeper\n-- \nname\n"
    )
    assert message.text == "one two\n> quoted more\n>> deeper\n-- \nname\n"
    joined = read(
        "Content-Type: text/plain; format=flowed; delsp=yes\n\nhttps://x.example/a \nb/c\n"
    )
    assert joined.links() == ["https://x.example/ab/c"]


def test_addresses_have_names() -> None:
    message = read("To: =?utf-8?q?J=C3=BCrgen?= <j@x.example>, b@x.example\nTO: c@x.example\n\n")
    assert message.addresses("to") == [
        ("Jürgen", "j@x.example"), ("", "b@x.example"), ("", "c@x.example"),
    ]  # fmt: skip


@given(st.binary(max_size=500))
def test_any_octets_can_be_read(raw: bytes) -> None:
    message = ReadMessage(raw)
    assert message.parts
    message.links()
    code_in(message.shown_text)


LINES = [
    "--b",
    "--b--",
    "--c",
    "",
    "Content-Type: multipart/mixed; boundary=c",
    "Content-Type: text/html",
    "x",
    "Content-Transfer-Encoding: base64",
]


@given(st.lists(st.sampled_from(LINES)))
def test_any_structure_can_be_read(lines: list[str]) -> None:
    head = "Content-Type: multipart/mixed; boundary=b\r\n\r\n"
    message = ReadMessage((head + "\r\n".join(lines)).encode())
    assert [part.number for part in message.parts] == list(range(1, len(message.parts) + 1))


# --- links, codes and warnings ---


def test_a_link_in_a_comment_of_html_is_none() -> None:
    page = "<!-- <a href='https://old.example/'> --><a href=https://new.example/>x</a>"
    assert links_in(page, "") == ["https://new.example/"]
    assert links_in("<!--[if mso]><a href='https://mso.example/'><![endif]-->", "") == []
    assert links_in("<!-- never closed <a href='https://x.example/'>", "") == []
    assert text_of_html("a<!-- b -->c") == "ac"


def test_a_link_in_brackets_goes_over_lines() -> None:
    text = "see <https://x.example/a/\n  very/long/path?q=1>\nor https://y.example/."
    assert links_in("", text) == ["https://x.example/a/very/long/path?q=1", "https://y.example/"]


def test_a_code_with_a_digit_in_each_cell() -> None:
    cells = "".join(f"<td style='border:1px'>{digit}</td>\n   " for digit in "493027")
    page = f"<p>Your code:</p><table>\n<tr>\n{cells}</tr></table><p>Bye</p>"
    assert code_in(text_of_html(page)) == "493027"
    assert code_in(text_of_html(f"<table><tr>{cells}</tr></table>")) == "493027"


def test_what_mail_programs_do_not_show_is_told() -> None:
    assert chasquid.html_warnings("<p>plain</p><img alt='' src='cid:x'>") == []
    found = chasquid.html_warnings("<script>x</script><div style='display:flex'><img src=a.webp>")
    assert [text.split(" ")[0] for text in found] == ["scripts", "Outlook", "an"]
    assert "102 kB" in chasquid.html_warnings("x" * 110_000)[0]


# --- hostile mail, in the time that it takes ---


@pytest.mark.parametrize(
    "raw",
    [
        b"Subject: " + b"=?a?q?x " * 14_000 + b"\r\n\r\nx",
        b"Subject: " + b"=?" * 60_000 + b"\r\n\r\nx",
        b"Subject: " + b"=?a?q?x?= " * 14_000 + b"\r\n\r\nx",
        b'Content-Type: text/plain; a="' + b'\\";' * 40_000 + b"\r\n\r\nx",
        b"Content-Type: text/plain; " + b"(" * 100_000 + b"\r\n\r\nx",
        b"Content-Disposition: attachment; " + b"a=b; " * 20_000 + b"\r\n\r\nx",
        b"Content-Disposition: attachment; " + b"a*1=b; " * 20_000 + b"\r\n\r\nx",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 20_000,
        b"Content-Type: text/html\r\n\r\n" + b"<!--" * 50_000,
        b"Content-Type: text/html\r\n\r\n" + b"<a href=" * 50_000,
        b"Content-Type: text/plain\r\n\r\n" + b"<https://" * 50_000,
        b"Content-Type: text/plain\r\n\r\n" + b"1 " * 100_000,
        b"Content-Transfer-Encoding: base64\r\n\r\n" + b"=" * 200_000,
        b"A:" * 100_000,
        b"A\r\n" * 100_000,
        b"".join(
            b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
            for n in range(3000)
        ),
    ],
    ids=range(16),
)
def test_hostile_mail_is_read_in_little_time(raw: bytes) -> None:
    """A square of these lengths would be tens of seconds."""

    def reading() -> None:
        message = ReadMessage(raw)
        message.links()
        code_in(message.shown_text)
        chasquid.html_warnings(message.html)

    assert is_quick(reading, 5.0)
