# SPDX-License-Identifier: Apache-2.0
"""Room SMTP SYNTAX: replies, commands, paths, transparency; and who tries to abuse them."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import PLACES, cuts, searched

import chasquid

Refused, Reply = chasquid.Refused, chasquid.Reply
BareNewline = chasquid.BareNewline
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def refusal(call, *arguments) -> chasquid.Reply:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    reply = caught.value.reply
    assert 500 <= reply.code <= 599
    assert reply.status.startswith("5.")
    return reply


# --- Replies --------------------------------------------------------------------------------


def test_a_reply_is_code_status_and_text():
    assert Reply(250, "2.1.0", "fine").encode() == b"250 2.1.0 fine\r\n"
    assert Reply(354, "", "go on").encode() == b"354 go on\r\n"


def test_a_reply_of_several_lines_has_its_code_on_each():
    assert (
        Reply(250, "", "host\nSIZE 1\nHELP").encode() == b"250-host\r\n250-SIZE 1\r\n250 HELP\r\n"
    )
    assert Reply(550, "5.7.1", "no\nnever").encode() == b"550-5.7.1 no\r\n550 5.7.1 never\r\n"


def test_a_reply_is_an_error_from_400_on():
    assert [Reply(code, "", "").is_error for code in (250, 354, 421, 550)] == [False] * 2 + [
        True
    ] * 2


@searched
@given(ANY_TEXT)
@example("\r\n250 2.0.0 injected\r\n")
@example("x\r250 injected")
@example("\u2028\x85\x1c")
def test_reply_injection_a_text_never_makes_a_line_that_the_server_did_not_mean(text):
    encoded = Reply(550, "5.1.1", text).encode()
    lines = encoded.decode().split("\r\n")
    assert lines.pop() == ""
    assert len(lines) == text.count("\n") + 1
    assert not re.search(rb"[\r\n]", encoded.replace(b"\r\n", b""))
    assert all(line.startswith("550-5.1.1 ") for line in lines[:-1])
    assert lines[-1].startswith("550 5.1.1 ")


@pytest.mark.parametrize("status", ["", "2.0.0", "5.7.23"])
@pytest.mark.parametrize("text", ["x" * 2000, "ñ" * 2000, "😀" * 2000, "x" * 490])
def test_a_reply_line_is_at_most_512_octets(status, text):
    # RFC 5321, 4.5.3.1.5
    encoded = Reply(550, status, text).encode()
    assert len(encoded) <= 512
    encoded.decode()


def test_a_reply_as_text_is_one_line():
    assert str(Reply(250, "2.0.0", "a\nb")) == "250 2.0.0 a b"
    assert str(Reply(354, "", "go")) == "354 go"


# --- Commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (b"NOOP", ("NOOP", "")),
        (b"  noop  ", ("NOOP", "")),
        (b"Mail FROM:<a@b> SIZE=1", ("MAIL", "FROM:<a@b> SIZE=1")),
        (b"helo   x \t", ("HELO", "x")),
        (b"", ("", "")),
        ("RCPT TO:<ñ@ñ.example>".encode(), ("RCPT", "TO:<ñ@ñ.example>")),
    ],
)
def test_a_command_is_a_verb_and_its_argument(line, command):
    assert chasquid.parse_command(line) == command


@pytest.mark.parametrize(
    "line",
    [b"NOOP\x00", b"\x1bNOOP", b"NOOP \r x", b"NOOP \n x", b"NOOP\x7f", b"\xff",
     b"NOOP \xed\xa0\x80", b"NOOP \xc0\x80", "NOOP \x85".encode(), "NOOP \u2028x".encode(),
     b"MAIL FROM:<a\x00@b>"],
)  # fmt: skip
def test_a_command_with_control_characters_or_no_utf8_is_refused(line):
    reply = refusal(chasquid.parse_command, line)
    assert (reply.code, reply.status) == (500, "5.5.2")


@pytest.mark.parametrize("verb", ["ſtarttls", "quıt", "\uff31\uff35\uff29\uff34", "ﬁnd"])
def test_a_letter_that_only_looks_like_one_makes_no_known_verb(verb):
    """Whoever stands between sees no STARTTLS there; so must we."""
    try:
        assert not chasquid.parse_command(verb.encode())[0].isascii()
    except Refused as refused:
        assert refused.reply.code == 500


@searched
@given(st.binary(max_size=60))
def test_any_line_is_a_command_or_refused(line):
    try:
        verb, argument = chasquid.parse_command(line)
    except Refused as refused:
        assert refused.reply.code == 500
        return
    assert " " not in verb
    assert verb == verb.upper() or not verb.isascii()
    assert argument == argument.strip(" ")


# --- Paths ----------------------------------------------------------------------------------


def path_of(argument: str, keyword: str = "TO:") -> str:
    return chasquid.parse_path(argument, keyword).address


@pytest.mark.parametrize(
    ("argument", "address"),
    [
        ("TO:<a@b.example>", "a@b.example"),
        ("to: \t<a@b.example>", "a@b.example"),
        ("TO:a@b.example", "a@b.example"),
        ("TO:<>", ""),
        ("TO:<postmaster>", "postmaster"),
        ("TO:<Postmaster@B.Example>", "Postmaster@b.example"),
        # source routes, RFC 5321, appendix C
        ("TO:<@one.example:a@b.example>", "a@b.example"),
        ("TO:<@one.example,@two.example:a@b.example>", "a@b.example"),
        # quoted strings
        ('TO:<"a b"@c.example>', '"a b"@c.example'),
        ('TO:<"ab"@c.example>', "ab@c.example"),
        ('TO:<"a\\b"@c.example>', "ab@c.example"),
        ('TO:<"a@b"@c.example>', '"a@b"@c.example'),
        ('TO:<"a>b"@c.example>', '"a>b"@c.example'),
        ('TO:<"a\\"b"@c.example>', '"a\\"b"@c.example'),
        ('TO:<""@c.example>', '""@c.example'),
        ('TO:<"@x:y"@c.example>', '"@x:y"@c.example'),
        # what practice writes
        ("TO:<a..b@c.example>", "a..b@c.example"),
        ("TO:<.a.@c.example>", ".a.@c.example"),
        ("TO:<a@b_c.example>", "a@b_c.example"),
        ("TO:<!#$%&'*+/=?^_`{|}~-@c.example>", "!#$%&'*+/=?^_`{|}~-@c.example"),
        # address literals
        ("TO:<a@[192.0.2.1]>", "a@[192.0.2.1]"),
        ("TO:<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]"),
        # internationalised
        ("TO:<ñ@ñaca.example>", "ñ@ñaca.example"),
        ("TO:<ñ@xn--aca-6ma.example>", "ñ@ñaca.example"),
        ("TO:<a@ÑACA.Example>", "a@ñaca.example"),
    ],
)
def test_a_path_that_is_right(argument, address):
    assert path_of(argument) == address


@pytest.mark.parametrize(
    "argument",
    [
        "", "TO", "TO:", "TO: ", "FROM:<a@b>", "TO <a@b>", "TO:<a@b", "TO:a@b>", "TO:<<a@b>>",
        "TO:<a@b><c@d>", "TO:<a@b>SIZE=1", "TO:<a b@c>", "TO:<a@b c>", 'TO:<"a@b>', 'TO:<a"b@c>',
        'TO:<"a"b@c>', "TO:<a@>", "TO:<@b>", "TO:<@>", "TO:<@b:>x", "TO:<a@b@c>", "TO:<a,b@c>",
        "TO:<a;b@c>", "TO:<a(b)@c>", "TO:<a:b@c>", "TO:<a\\b@c>", "TO:<[a]@c>",
        "TO:<a@b..c>", "TO:<a@.b>", "TO:<a@b.>", "TO:<a@ñ.>", "TO:<a@b/c>", "TO:<a@b:25>",
        "TO:<a@-ñ.example>", "TO:<a@xn--a.example>", "TO:<a@ñ_b.example>",
        "TO:<a@[300.0.2.1]>", "TO:<a@[1.2.3]>", "TO:<a@[IPv6:192.0.2.1]>", "TO:<a@[IPv6:::g]>",
        "TO:<a@[::1]>", "TO:<a@[IPv6:::1>", "TO:<a@[]>", "TO:<a@[192.0.2.1].example>",
        "TO:<a@[x-tag:thing]>", "TO:< >", "TO: < a@b >", "TO:,", 'TO:""',
        "TO:<" + "a" * 311 + "@b.example>", "TO:<a@" + "b." * 160 + "example>",
        "TO:<" + "ñ" * 160 + "@b.example>",
    ],
)  # fmt: skip
def test_a_path_that_is_wrong(argument):
    reply = refusal(path_of, argument)
    assert reply.code == 501
    assert reply.status in ("5.5.4", "5.1.3")


def test_what_is_wrong_with_a_sender_is_told_as_such():
    assert refusal(path_of, "FROM:<a@b", "FROM:").status == "5.1.7"
    assert refusal(path_of, "FROM:<a@b..c>", "FROM:").status == "5.1.7"


@pytest.mark.parametrize("shape", ["a{}b@c.example", '"a{}b"@c.example', "a@c{}d.example"])
@pytest.mark.parametrize(
    "codes",
    [range(32), [127], range(0x80, 0xA0), [0x2028, 0x2029]],
    ids=["C0", "DEL", "C1", "separators"],
)
def test_control_characters_make_no_address(shape, codes):
    for code in codes:
        refusal(chasquid.parse_address, shape.format(chr(code)))


@searched
@given(ANY_TEXT, st.sampled_from(["FROM:", "TO:"]))
@example('<"\\"@a>', "TO:")
@example("<@a:@b:c@d>", "TO:")
@example("<" + '"\\' * 30, "TO:")
def test_any_path_is_an_address_without_line_ends_or_refused(text, keyword):
    try:
        path = chasquid.parse_path(keyword + text, keyword)
    except Refused as refused:
        assert refused.reply.code == 501
        return
    assert not re.search(r"[\r\n\x00]", path.address)


ATOMS = st.text(st.sampled_from("aZ0.!#$%&'*+-/=?^_`{|}~ñ"), min_size=1, max_size=12)
QUOTED = st.lists(
    st.sampled_from(["a", " ", "@", "<", ">", ",", ".", "\\\\", '\\"', "\\a", "ñ", "(", "[", ":"]),
    max_size=8,
).map(lambda parts: f'"{"".join(parts)}"')
DOMAINS = st.sampled_from(
    ["example", "a.example", "A-B.Example", "ñ.example", "xn--aca-6ma.example", "[192.0.2.1]",
     "[IPv6:2001:db8::1]", "_x.example"]
)  # fmt: skip


@searched
@given(ATOMS | QUOTED, DOMAINS)
def test_an_address_that_was_parsed_is_parsed_to_itself(local, domain):
    once = chasquid.parse_address(f"{local}@{domain}")
    assert chasquid.parse_address(once) == once
    assert path_of(f"TO:<{once}>") == once
    assert chasquid.split_address(once)[1] == chasquid.domain_to_unicode(domain)


@searched
@given(QUOTED, DOMAINS)
def test_needless_backslashes_make_no_other_address(local, domain):
    """RFC 5321, 4.1.2: quoted pairs are another spelling of the same local-part."""
    content = re.sub(r"\\(.)", r"\1", local[1:-1])
    spelled = '"' + "".join(f"\\{char}" if char.isascii() else char for char in content) + '"'
    assert chasquid.parse_address(f"{spelled}@{domain}") == chasquid.parse_address(
        f"{local}@{domain}"
    )


# --- Parameters -----------------------------------------------------------------------------


def test_parameters_have_names_in_upper_case_and_values_as_they_came():
    path = chasquid.parse_path("FROM:<a@b> size=5  Body=8BITMIME SMTPUTF8 X-y=+2B", "FROM:")
    assert path.parameters == {"SIZE": "5", "BODY": "8BITMIME", "SMTPUTF8": "", "X-Y": "+2B"}
    assert chasquid.parse_path("FROM:a@b SIZE=5", "FROM:").parameters == {"SIZE": "5"}


@pytest.mark.parametrize(
    "text", ["=5", "SIZE=", "SIZE=5=6", "-A=1", "A_B=1", "ñ=1", "SIZE=5 size=6", "A=\x7f", "ſIZE=1"]
)
def test_malformed_parameters_are_refused(text):
    assert refusal(path_of, f"FROM:<a@b> {text}", "FROM:").status == "5.5.4"


@pytest.mark.parametrize(
    "name", ["example", "mail.example.org", "[192.0.2.1]", "[IPv6:::1]", "ñ.example", "my_pc"]
)
def test_a_client_may_name_itself(name):
    assert chasquid.is_host_name(name)


@pytest.mark.parametrize(
    "name", ["", "a b", "a\tb", "a\r\nb", "a@b", "x" * 256, "<a>", "a(b)", "a;b", 'a"b', "a\\b"]
)
def test_a_client_may_not_name_itself_so_that_a_field_breaks(name):
    assert not chasquid.is_host_name(name)


# --- Transparency ---------------------------------------------------------------------------


def decode(pieces: list[bytes]) -> tuple[bytes, bool, bytes]:
    """Feed pieces as they come from a connection; the message, whether it ended, the rest."""
    decoder, out = chasquid.DataDecoder(), b""
    for number, piece in enumerate(pieces):
        out += decoder.feed(piece)
        if decoder.done:
            return out, True, decoder.rest + b"".join(pieces[number + 1 :])
    return out, False, b""


def encode(pieces: list[bytes]) -> bytes:
    encoder = chasquid.DataEncoder()
    return b"".join([*map(encoder.feed, pieces), encoder.end()])


MESSAGES = st.lists(st.text(st.sampled_from(".a \tñ"), max_size=5)).map(
    lambda lines: "".join(f"{line}\r\n" for line in lines).encode()
)


@searched
@given(MESSAGES, PLACES, PLACES, st.binary(max_size=5))
@example(b".\r\n..\r\n\r\n.\r\n", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8], b".\r\n")
def test_a_message_survives_transparency_however_it_is_cut(message, places, others, rest):
    sent = encode(cuts(message, places))
    assert sent.endswith(b".\r\n")
    assert decode(cuts(sent + rest, others)) == (message, True, rest)


def test_a_message_survives_every_cut_in_three():
    message = b".\r\n..a\r\n\r\n.\r\nend.\r\n"
    for one, other in itertools.combinations(range(len(message) + 1), 2):
        sent = encode([message[:one], message[one:other], message[other:]])
        assert sent == b"..\r\n...a\r\n\r\n..\r\nend.\r\n.\r\n"
    sent += b"QUIT\r\n"
    for one, other in itertools.combinations(range(len(sent) + 1), 2):
        assert decode([sent[:one], sent[one:other], sent[other:]]) == (message, True, b"QUIT\r\n")


def test_a_message_whose_last_line_is_not_ended_gets_its_end():
    assert encode([b"a"]) == b"a\r\n.\r\n"
    assert encode([]) == b".\r\n"
    assert decode([b".\r\n"]) == (b"", True, b"")


def test_a_first_dot_is_taken_off_and_nothing_else():
    assert decode([b".a\r\n..\r\n. \r\na.\r\n.\r\n"]) == (b"a\r\n.\r\n \r\na.\r\n", True, b"")


@searched
@given(MESSAGES, PLACES)
def test_octets_are_given_as_soon_as_they_are_certain(message, places):
    """Only what may yet be the end is held back: four octets at most."""
    decoder, given_, fed = chasquid.DataDecoder(), 0, 0
    for piece in cuts(message.replace(b"\r\n.", b"\r\nx").replace(b".", b"x", 1), places):
        given_ += len(decoder.feed(piece))
        fed += len(piece)
        assert fed - given_ <= 4


# The attack that is known as SMTP smuggling: something that one server takes for the end
# of a message and another for a part of it, with commands of the attacker behind it.
ENDS = [
    b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\r.\n", b"\n.\r",
    b"\n\n.\n\n", b"\r\r\n.\r\n", b"\r\n.\r\r\n", b"\n\r.\n\r", b"\r\n\x00.\r\n\n", b"\r\n.\x00\n",
    b"\n.\r\n.\r\n", b"\r\n..\n", b"\n..\r\n", b"\r\n.\r\x00\n", b"\r\n.\n\r\n", b"\r\n\n.\r\n",
]  # fmt: skip
SMUGGLED = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<victim@example.org>\r\nDATA\r\nhello\r\n.\r\n"


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_smuggling_no_variant_of_the_end_ends_a_message(end):
    data = b"Subject: x\r\n\r\nbody" + end + SMUGGLED
    region = range(len(data) - len(SMUGGLED) - len(end) - 1, len(data) - len(SMUGGLED) + 3)
    cuttings = [[data], [data[n : n + 1] for n in range(len(data))]]
    cuttings += [[data[:one], data[one:]] for one in range(len(data))]
    cuttings += [
        [data[:one], data[one:other], data[other:]]
        for one, other in itertools.combinations(region, 2)
    ]
    for pieces in cuttings:
        with pytest.raises(BareNewline):
            decode(pieces)


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_smuggling_what_follows_a_wrong_end_is_never_given_out(end):
    """A server that read on would have stored a message with the wrong end in it."""
    data = b"body" + end + SMUGGLED
    for cut in range(len(data)):
        decoder, out = chasquid.DataDecoder(), b""
        with pytest.raises(BareNewline):
            for piece in (data[:cut], data[cut:]):
                out += decoder.feed(piece)
        assert b"MAIL FROM" not in out


@searched
@given(st.text(st.sampled_from("\r\n.a")).map(str.encode), PLACES)
@example(b"\r", [])
@example(b"\r\n.\r", [1, 2, 3])
def test_smuggling_the_decoder_agrees_with_the_standard_however_it_is_cut(data, places):
    """Against a reference: the first CRLF.CRLF, and no CR or LF alone before it."""
    end = (b"\r\n" + data).find(b"\r\n.\r\n")
    body = data if end < 0 else data[:end]
    alone = re.search(rb"\r(?!\n)|(?<!\r)\n", body if end >= 0 else body.removesuffix(b"\r"))
    try:
        out, done, rest = decode(cuts(data, places))
    except BareNewline:
        assert alone
        return
    assert not alone or end < 0
    assert done == (end >= 0)
    if done:
        assert rest == data[end + 3 :]
        assert out == re.sub(rb"(^|\r\n)\.", rb"\1", body)


@pytest.mark.parametrize("data", [b"a\rb", b"a\nb", b"\n", b"\r", b"a\r\r\n", b"\n\r"])
def test_a_cr_or_lf_alone_is_seen(data):
    with pytest.raises(BareNewline):
        chasquid.check_newlines(data)


def test_pairs_are_no_bare_newlines():
    chasquid.check_newlines(b"")
    chasquid.check_newlines(b"a\r\n\r\nb\r\n")


# --- Replies of other servers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"250 ok", (250, False, "ok")),
        (b"250-more", (250, True, "more")),
        (b"354", (354, False, "")),
        (b"250 \xff", (250, False, "\ufffd")),
    ],
)
def test_a_reply_line_is_read(line, parts):
    assert chasquid.parse_reply_line(line) == parts


@pytest.mark.parametrize(
    "line", [b"", b"25", b"25x ok", b"2500 ok", b"250_ok", b" 250 ok", b"\xb2\xb20"]
)
def test_what_is_no_reply_line_is_refused(line):
    with pytest.raises(ValueError, match="is no reply"):
        chasquid.parse_reply_line(line)


@searched
@given(
    st.integers(200, 599),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=60),
)
def test_a_reply_that_was_written_is_read_back(code, text):
    status = f"{code // 100}.1.5" if code // 100 != 3 else ""
    line = Reply(code, status, text).encode().removesuffix(b"\r\n")
    number, more, rest = chasquid.parse_reply_line(line)
    assert (number, more) == (code, False)
    if status:
        assert chasquid.parse_status(number, rest) == (status, text)


@pytest.mark.parametrize(
    ("code", "text", "status", "rest"),
    [
        (550, "5.1.1 no such user", "5.1.1", "no such user"),
        (550, "no such user", "5.0.0", "no such user"),
        (450, "5.1.1 a status of another class", "4.0.0", "5.1.1 a status of another class"),
        (250, "2.0.0", "2.0.0", ""),
        (550, "5.1.1.1 no", "5.0.0", "5.1.1.1 no"),
        (550, "5.1.1234 no", "5.0.0", "5.1.1234 no"),
    ],
)
def test_the_enhanced_code_is_taken_where_it_fits(code, text, status, rest):
    assert chasquid.parse_status(code, text) == (status, rest)
