# SPDX-License-Identifier: Apache-2.0
"""Room CONFIG: the text format, the keys of chasquid.conf, the directories of the domains."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import searched, searched_briefly

import chasquid

Entry, Word, ConfigError = chasquid.Entry, chasquid.Word, chasquid.ConfigError


def parse(text: str | bytes) -> list[chasquid.Entry]:
    data = text.encode() if isinstance(text, str) else text
    return chasquid.parse_text_format(data, "file")


def value(text: str) -> chasquid.Value:
    (entry,) = parse(f"k: {text}")
    return entry.value


# --- The text format ------------------------------------------------------------------------


def test_entries_have_a_key_a_value_and_a_line():
    assert parse('# first\n\na: "x" # a comment\nb: 5\n') == [
        Entry("a", b"x", 3),
        Entry("b", Word("5"), 4),
    ]


def test_nothing_and_comments_alone_are_no_entries():
    assert parse("") == parse("# only this") == parse("\r\n \t\n#\n") == []


def test_a_number_sign_in_a_string_begins_no_comment():
    assert value('"a#b"') == b"a#b"


def test_strings_in_a_row_are_one_string():
    assert value('"a" \'b\'\n  "c"') == b"abc"


def test_either_quote_holds_the_other():
    assert value("'say \"so\"'") == b'say "so"'
    assert value('"it\'s"') == b"it's"


@pytest.mark.parametrize(
    ("text", "octets"),
    [
        (r'"\n\r\t\a\b\f\v\\\"\'\?"', b"\n\r\t\a\b\f\v\\\"'?"),
        (r'"\0\7\12\1234"', b"\x00\x07\n\x534"),
        (r'"\377"', b"\xff"),
        (r'"\x41\X4a\xfg"', b"AJ\x0fg"),
        (r'"\u00f1\U0001F600"', "ñ😀".encode()),
        ('"ñ"', "ñ".encode()),
    ],
)
def test_escapes_are_those_of_c(text, octets):
    assert value(text) == octets


def test_octets_that_are_no_utf8_may_stand_in_a_string():
    assert parse(b'k: "\xff\xfe"')[0].value == b"\xff\xfe"


@pytest.mark.parametrize(
    "text", [r'"\q"', r'"\x"', r'"\u12"', r'"\ud800"', r'"\U00110000"', r'"\8"']
)
def test_an_escape_that_c_does_not_have_is_refused(text):
    with pytest.raises(ConfigError, match=r"^file:1: expected"):
        value(text)


@pytest.mark.parametrize("text", ["a { b: 1 }", "a: { b: 1 }", "a < b: 1 >", "a: < b: 1; >"])
def test_a_message_may_be_written_in_several_ways(text):
    assert parse(text) == [Entry("a", (Entry("b", Word("1"), 1),), 1)]


def test_messages_nest_and_keep_the_lines_of_their_entries():
    assert parse("a {\n b {\n  c: 1,\n  c: 2;\n }\n}") == [
        Entry("a", (Entry("b", (Entry("c", "1", 3), Entry("c", "2", 4)), 2),), 1)
    ]


def test_a_list_is_an_entry_for_each_of_its_values():
    assert parse('a: ["x", 5]') == [Entry("a", b"x", 1), Entry("a", Word("5"), 1)]
    assert parse("a: []") == []
    assert len(parse("a: [{ b: 1 }, { b: 2 }]")) == 2


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a", 1, "expected ':'"),
        ("a:", 1, "expected a value"),
        ("\na: :", 2, "expected a value"),
        ("a: 1\nb = 2", 2, "expected"),
        ("a {\n b: 1\n", 3, "expected a key or '}'"),
        ("a { b: 1 >", 1, "expected a key or '}'"),
        ("}", 1, "expected a key"),
        ('"a": 1', 1, "expected a key"),
        ('\n\na: "x', 3, "not closed"),
        ('a: "x\n"', 1, "not closed"),
        ("a: [1 2]", 1, "expected ',' or ']'"),
        ("a: [1,", 1, "expected a value"),
        ("a: [1", 1, "expected ',' or ']'"),
        ("a: 1 2", 1, "expected ':'"),
        ("a: \x00", 1, "expected"),
        ("ñ: 1", 1, "expected"),
    ],
)
def test_what_is_no_text_format_is_refused_with_its_line(text, line, word):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.line == line
    assert word in str(caught.value)


def test_after_a_mistake_the_next_line_is_read():
    text = 'a: 1\nb = 2\nc: "x\nd { e: [\n\x01\nf: 3 } g: 4\nh: 5'
    problems = []
    entries = chasquid.parse_text_format(text.encode(), "file", problems)
    assert [entry.key for entry in entries] == ["a", "g", "h"]
    assert [problem.line for problem in problems] == [2, 3, 5]
    assert "found a string that is not closed" in str(problems[1])


@pytest.mark.parametrize("bad", ["b", "b:", "b = 1", "b: [1", "b: 'x"])
def test_a_mistake_in_a_message_is_told_once(bad):
    text = f"m: {{\n a: 1\n n: {{\n {bad}\n c: 2\n }}\n}}\nlast: 1\n"
    problems = []
    entries = chasquid.parse_text_format(text.encode(), "file", problems)
    assert len(problems) == 1
    assert entries == [Entry("last", Word("1"), 8)]


@searched
@given(st.lists(st.sampled_from(["a", ":", "{", "}", "[", "]", ",", '"', "\\", "\n", "1", "\0"])))
def test_mistakes_are_found_one_by_one_whatever_the_text_is(parts):
    data, problems = "".join(parts).encode(), []
    entries = chasquid.parse_text_format(data, "file", problems)
    lines = [problem.line for problem in problems]
    assert lines == sorted(set(lines))
    if problems:
        with pytest.raises(ConfigError) as caught:
            parse(data)
        assert str(caught.value) == str(problems[0])
    else:
        assert entries == parse(data)


def test_a_file_that_nests_without_end_is_refused():
    with pytest.raises(ConfigError):
        parse("a{" * 100_000)


@searched
@given(st.binary(max_size=80))
@example(b'a: "\\')
@example(b"a: '")
@example(b"[")
def test_the_parser_takes_any_octets_or_says_where_it_stopped(data):
    try:
        parse(data)
    except ConfigError as error:
        assert 1 <= error.line <= data.count(b"\n") + 1
        assert "expected" in str(error)


@searched
@given(st.text(st.sampled_from("ab:{}<>[],;\"'\\#\n 1xu"), max_size=60))
def test_the_parser_takes_any_tangle_of_its_marks_or_says_where_it_stopped(text):
    try:
        parse(text)
    except ConfigError as error:
        assert 1 <= error.line <= text.count("\n") + 1


@searched
@given(st.binary())
@example(b'\\"\n\x00\x7f1')
def test_octets_survive_quoting(data):
    assert value(chasquid.quote(data)) == data
    assert chasquid.quote(data).isascii()


@searched
@given(st.text())
@example('\\"\n\x00\x7f1')
def test_text_survives_quoting(text):
    assert value(chasquid.quote(text)) == text.encode()


WORDS = st.from_regex(r"[A-Za-z0-9_.+-]{1,8}", fullmatch=True)
TREES = st.recursive(
    st.lists(st.tuples(WORDS, WORDS.map(Word) | st.binary(max_size=8)), max_size=4),
    lambda inner: st.lists(st.tuples(WORDS, WORDS.map(Word) | inner), max_size=4),
    max_leaves=12,
)


def written(tree: list, opening: str = "{", closing: str = "}") -> str:
    parts = []
    for key, inner in tree:
        if isinstance(inner, bytes):
            parts.append(f"{key}: {chasquid.quote(inner)}")
        elif isinstance(inner, str):
            parts.append(f"{key}: {inner}")
        else:
            parts.append(f"{key} {opening}\n{written(inner, opening, closing)}{closing}")
    return "\n".join(parts) + "\n"


def plain(entries: tuple | list) -> list:
    return [
        (entry.key, plain(entry.value) if isinstance(entry.value, tuple) else entry.value)
        for entry in entries
    ]


@searched_briefly
@given(TREES, st.sampled_from(["{}", "<>"]))
def test_what_is_written_is_read_back(tree, marks):
    assert plain(parse(written(tree, *marks))) == tree


# --- chasquid.conf --------------------------------------------------------------------------


def load(tmp_path, text: str | bytes, overrides: str = "") -> chasquid.Config:
    (tmp_path / "chasquid.conf").write_bytes(text.encode() if isinstance(text, str) else text)
    return chasquid.load_config(str(tmp_path), overrides)


def test_an_empty_file_means_the_defaults(tmp_path):
    config = load(tmp_path, "")
    assert config == chasquid.Config(str(tmp_path), socket.gethostname())
    assert config.max_data_size_mb == 50
    assert config.smtp_address == ("systemd",)
    assert (config.suffix_separators, config.drop_characters) == ("+", ".")
    assert (config.mail_log_path, config.log_path) == ("<syslog>", "<stderr>")
    assert (config.give_up_send_after, config.reload_every) == (20 * 3600, 30)
    assert (config.max_queue_items, config.outgoing_smtp_port) == (200, 25)


GO_CONFIG = r"""
# The name of this machine, as it appears in EHLO.
hostname: "mx.example.org"

# At most this large, in megabytes.
max_data_size_mb: 20

# Where to listen; "systemd" takes the sockets that were passed in.
smtp_address: "systemd"
smtp_address: ":25"
submission_address: "192.0.2.1:587"
submission_over_tls_address: "[2001:db8::1]:465"

# Numbers for whoever watches the server. Not for the public.
monitoring_address: "127.0.0.1:1099"

mail_delivery_agent_bin: "/usr/bin/procmail"
mail_delivery_agent_args: "-f"
mail_delivery_agent_args: "%from%"
mail_delivery_agent_args: "-d"
mail_delivery_agent_args: "%to_user%"

data_dir: "/var/lib/chasquid"

suffix_separators: "+-"
drop_characters: "._"

mail_log_path: "<stdout>"

dovecot_auth: true
dovecot_userdb_path: "/run/dovecot/auth-userdb"
dovecot_client_path: "/run/dovecot/auth-client"

haproxy_incoming: false
max_queue_items: 500
give_up_send_after: "12h30m"
"""


def test_a_configuration_for_the_go_server_works_unchanged(tmp_path):
    config = load(tmp_path, GO_CONFIG)
    assert config.hostname == "mx.example.org"
    assert config.max_data_size_mb == 20
    assert config.smtp_address == ("systemd", ":25")
    assert config.submission_over_tls_address == ("[2001:db8::1]:465",)
    assert config.mail_delivery_agent_bin == "/usr/bin/procmail"
    assert config.mail_delivery_agent_args == ("-f", "%from%", "-d", "%to_user%")
    assert (config.suffix_separators, config.drop_characters) == ("+-", "._")
    assert config.give_up_send_after == 12.5 * 3600
    assert config.max_queue_items == 500


GOOD = [
    ("hostname", '"mail.example.com"', "mail.example.com"),
    ("hostname", '"ñandú.example"', "ñandú.example"),
    ("max_data_size_mb", "1", 1),
    ("max_data_size_mb", "0x10", 16),
    ("smtp_address", '"systemd"', ("systemd",)),
    ("smtp_address", '[":25", "127.0.0.1:2525"]', (":25", "127.0.0.1:2525")),
    ("smtp_address", '"127.0.0.1:0"', ("127.0.0.1:0",)),
    ("submission_address", '"[::1]:587"', ("[::1]:587",)),
    ("submission_over_tls_address", '"localhost:465"', ("localhost:465",)),
    ("mail_delivery_agent_bin", '"/bin/true"', "/bin/true"),
    ("mail_delivery_agent_args", '["-f", ""]', ("-f", "")),
    ("lmtp_address", '"/run/lmtp"', "/run/lmtp"),
    ("lmtp_address", '"127.0.0.1:24"', "127.0.0.1:24"),
    ("lmtp_address", '""', ""),
    ("maildir", '"/home/%to_user%/Maildir"', "/home/%to_user%/Maildir"),
    ("maildir", '"%data_dir%/%to%"', "%data_dir%/%to%"),
    ("data_dir", '"/srv/mail"', "/srv/mail"),
    ("user", '"mail"', "mail"),
    ("suffix_separators", '""', ""),
    ("drop_characters", '"._"', "._"),
    ("mail_log_path", '"<syslog>"', "<syslog>"),
    ("mail_log_path", '"/var/log/mail"', "/var/log/mail"),
    ("log_path", '"<stdout>"', "<stdout>"),
    ("acme", "true", True), ("acme_url", '"https://ca.example/dir"', "https://ca.example/dir"),
    ("web_address", '":80"', (":80",)), ("web_address", '"systemd"', ("systemd",)),
    ("dovecot_auth", "true", True), ("dovecot_userdb_path", '"/run/u"', "/run/u"),
    ("dovecot_client_path", '"/run/c"', "/run/c"), ("haproxy_incoming", "true", True),
    ("smarthost", '"smtp.example.com:587"', "smtp.example.com:587"), ("smarthost_after", "3", 3),
    ("trusted_relay", '["192.0.2.25", "2001:db8::/64"]', ("192.0.2.25/32", "2001:db8::/64")),
    ("smarthost_user", '"ana"', "ana"), ("smarthost_password_file", '"/etc/p"', "/etc/p"),
    ("sender_must_match", "true", True), ("limit_loopback", "true", True),
    ("max_connections", "0", 0), ("max_connections_per_address", "5", 5),
    ("max_connections_per_minute", "5", 5),
    ("max_messages_per_minute", "5", 5), ("max_recipients_per_minute", "5", 5),
    ("max_user_messages_per_minute", "5", 5), ("max_user_recipients_per_minute", "5", 5),
    ("max_failed_logins", "0", 0), ("min_octets_per_second", "5", 5), ("min_free_disk_mb", "0", 0),
    ("monitoring_address", '"127.0.0.1:1099"', "127.0.0.1:1099"), ("monitoring_address", '""', ""),
    ("dns_trust_ad", "true", True), ("dmarc_policy", '"report"', "report"),
    ("dns_server", '["192.0.2.53", "[::1]:5353", "::1", "127.0.0.1:53"]',
     ("192.0.2.53", "[::1]:5353", "::1", "127.0.0.1:53")),
    ("outgoing_smtp_port", "2525", 2525),
    ("max_received_headers", "10", 10),
    ("max_queue_items", "5", 5),
    ("give_up_send_after", '"1h30m"', 5400.0),
    ("give_up_send_after", '"1.5s"', 1.5),
    ("reload_every", '"500ms"', 0.5),
    ("reload_every", '"20µs"', 20e-6),
    ("reload_every", '"20μs"', 20e-6),  # the Greek letter, which Go takes as well
    ("reload_every", '".5s"', 0.5),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "expected"), GOOD)
def test_a_good_value(tmp_path, key, text, expected):
    assert getattr(load(tmp_path, f"{key}: {text}"), key) == pytest.approx(expected)


BAD = [
    ("hostname", '""'), ("hostname", "mail.example.com"), ("hostname", '"a b"'),
    ("hostname", '"a\\r\\nb"'), ("hostname", '"a\\000b"'), ("hostname", '"ñ..example"'),
    ("hostname", '"[192.0.2.1]"'), ("hostname", '"me@example.com"'), ("hostname", '"\\377"'),
    ("max_data_size_mb", "0"), ("max_data_size_mb", "-1"), ("max_data_size_mb", '"50"'),
    ("max_data_size_mb", "many"), ("max_data_size_mb", "1.5"), ("max_data_size_mb", "{ }"),
    ("smtp_address", "25"), ("smtp_address", '"25"'), ("smtp_address", '"localhost"'),
    ("smtp_address", '"host:99999"'), ("smtp_address", '"host:smtp"'), ("smtp_address", '""'),
    ("smtp_address", '"::1"'), ("smtp_address", '"[::1]"'),  # these name no port
    ("submission_address", '[":587", "x"]'), ("submission_over_tls_address", '"host:"'),
    ("mail_delivery_agent_bin", "true"), ("mail_delivery_agent_args", "5"),
    ("lmtp_address", '"dovecot"'), ("lmtp_address", '":24"'), ("lmtp_address", '"host:0"'),
    ("maildir", '"relative/%to_user%"'), ("maildir", '"/mail/%user%"'), ("maildir", '"/mail"'),
    ("data_dir", "5"), ("data_dir", '""'), ("user", "8"),
    ("log_path", '"a\\000b"'), ("suffix_separators", "1"), ("drop_characters", "x"),
    ("mail_log_path", '"<none>"'), ("log_path", '"<syslog"'),
    ("dns_server", '"dns.example.org"'), ("dns_server", '":53"'), ("dns_server", '"1.2.3.4:x"'),
    ("acme", '"yes"'), ("acme_url", '"http://ca.example/dir"'), ("acme_url", '"https:///dir"'),
    ("acme_url", '"https://ca.example/a b"'), ("web_address", '"x:y"'),
    ("dovecot_auth", '"yes"'), ("dovecot_userdb_path", "1"), ("dovecot_client_path", "1"),
    ("haproxy_incoming", "1"), ("smarthost", '"smtp.example.com"'), ("smarthost", '":25"'),
    ("trusted_relay", '"host"'), ("trusted_relay", '"192.0.2.1/24"'),
    ("smarthost_user", "x"), ("smarthost_password_file", "x"), ("smarthost_after", "-1"),
    ("sender_must_match", "1"), ("limit_loopback", "1"), ("max_connections", '"5"'),
    ("max_connections_per_address", "-1"), ("max_connections_per_minute", "x"),
    ("max_messages_per_minute", "x"),
    ("max_recipients_per_minute", "x"), ("max_user_messages_per_minute", "x"),
    ("max_user_recipients_per_minute", "x"), ("max_failed_logins", "x"),
    ("min_octets_per_second", "x"), ("min_free_disk_mb", "x"), ("monitoring_address", '"x:y"'),
    ("dns_trust_ad", '"true"'), ("dns_trust_ad", "1"), ("dmarc_policy", '"reject"'),
    ("dmarc_policy", "enforce"), ("dns_server", '"999.1.1.1"'), ("dns_server", '"1.2.3"'),
    ("outgoing_smtp_port", "65536"), ("outgoing_smtp_port", "0"),
    ("max_received_headers", "0"), ("max_queue_items", "0"),
    ("give_up_send_after", "20"), ("give_up_send_after", '"20"'), ("give_up_send_after", '"0s"'),
    ("give_up_send_after", '"-1h"'), ("give_up_send_after", '"1d"'), ("reload_every", '""'),
    ("reload_every", '"1h 30m"'), ("reload_every", '"soon"'),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), BAD)
def test_a_bad_value_is_refused_with_its_line_and_what_was_expected(tmp_path, key, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"# a comment\n\n{key}: {text}\n")
    assert str(caught.value).startswith(f"{tmp_path}/chasquid.conf:3: {key}: expected")
    assert caught.value.line == 3
    assert "\n" not in str(caught.value)
    assert ", found " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("max_queue_items: many", "many"),
        ('max_queue_items: "7"', '"7"'),
        ("max_queue_items { a: 1 }", "a message"),
        ('hostname: "a\\r\\nñ"', r'"a\015\012ñ"'),
        (b'hostname: "\xff"', '"\ufffd"'),
        ('maildir: "/mail/%user%"', '"/mail/%user%"'),
    ],
)
def test_what_was_found_in_place_of_a_value_is_told_as_it_is_written(tmp_path, text, found):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).endswith(f", found {found}")


def test_the_table_has_a_row_for_each_field():
    assert list(chasquid._KEYS) == [*chasquid.Config._fields[1:]]
    config = chasquid.Config("")
    for name, key in chasquid._KEYS.items():
        assert getattr(config, name) == key.default
        assert isinstance(key.default, tuple) == key.repeated
        assert key.help.endswith(".") and ". " not in key.help


def test_every_key_was_tried_with_good_and_bad_values():
    assert {key for key, _, _ in GOOD} == set(chasquid._KEYS)
    assert {key for key, _ in BAD} == set(chasquid._KEYS)


@pytest.mark.parametrize(
    ("key", "near"), [("hostnam", "hostname"), ("smtp_adress", "smtp_address")]
)
def test_an_unknown_key_is_refused_with_one_that_is_near(tmp_path, key, near):
    with pytest.raises(ConfigError, match=f":2: expected a known key.*is it '{near}'"):
        load(tmp_path, f'hostname: "a"\n{key}: "x"\n')


def test_an_unknown_key_that_is_near_to_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found 'zzzzzz'$"):
        load(tmp_path, "zzzzzz: 1")


@pytest.mark.parametrize("key", ["hostname", "max_queue_items"])
def test_a_key_that_stands_once_may_not_stand_twice(tmp_path, key):
    value = '"a"' if key == "hostname" else "1"
    with pytest.raises(ConfigError, match=f":2: {key}: expected once, found again after line 1$"):
        load(tmp_path, f"{key}: {value}\n{key}: {value}\n")


def test_an_agent_and_lmtp_at_once_are_refused(tmp_path):
    agent, lmtp = 'mail_delivery_agent_bin: "/bin/a"\n', 'lmtp_address: "/run/b"'
    with pytest.raises(ConfigError, match=r"chasquid.conf:2: expected .*, not both"):
        load(tmp_path, agent + lmtp)
    with pytest.raises(ConfigError, match=r"^--config-overrides:1: expected .*, not both"):
        load(tmp_path, agent, lmtp)


def test_overrides_replace_what_the_file_says(tmp_path):
    config = load(
        tmp_path,
        'hostname: "a"\nsmtp_address: ":1"\nsmtp_address: ":2"\nmax_queue_items: 7',
        'hostname: "b" smtp_address: ":3"',
    )
    assert (config.hostname, config.smtp_address, config.max_queue_items) == ("b", (":3",), 7)


def test_a_mistake_in_the_overrides_is_told_as_one_in_the_overrides(tmp_path):
    with pytest.raises(ConfigError, match=r"^--config-overrides:1: max_queue_items: expected"):
        load(tmp_path, "", "max_queue_items: x")


def test_overrides_that_are_no_utf8_are_refused(tmp_path):
    with pytest.raises(ConfigError):
        load(tmp_path, "", 'hostname: "\udcff"')


def test_relative_paths_are_below_the_configuration_those_of_overrides_below_here(tmp_path):
    text = (
        'data_dir: "data"\nlog_path: "logs/a/log"\nmail_log_path: "<syslog>"\n'
        'mail_delivery_agent_bin: "bin/mda"\ndovecot_client_path: "/run/x"\n'
        'smarthost_password_file: "../secret"\n'
    )
    config = load(tmp_path, text)
    assert config.data_dir == str(tmp_path / "data")
    assert config.log_path == str(tmp_path / "logs/a/log")
    assert config.mail_log_path == "<syslog>"
    assert config.mail_delivery_agent_bin == str(tmp_path / "bin/mda")
    assert config.dovecot_client_path == "/run/x"
    assert config.smarthost_password_file == str(tmp_path.parent / "secret")
    assert os.path.isabs(config.config_dir)
    config = chasquid.load_config(str(tmp_path), 'data_dir: "data"')
    assert config.data_dir == os.path.abspath("data")


def test_a_program_without_a_slash_is_looked_for_in_path(tmp_path):
    assert load(tmp_path, 'mail_delivery_agent_bin: "maildrop"').mail_delivery_agent_bin == (
        "maildrop"
    )
    here = load(tmp_path, 'mail_delivery_agent_bin: "./maildrop"').mail_delivery_agent_bin
    assert here == str(tmp_path / "maildrop")


@pytest.mark.parametrize(
    ("value", "expected"), [("lmtp:24", "lmtp:24"), ("run/lmtp", "run/lmtp"), ("/run/l", "/run/l")]
)
def test_a_socket_for_lmtp_may_be_relative_too(tmp_path, value, expected):
    found = load(tmp_path, f'lmtp_address: "{value}"').lmtp_address
    assert found == (str(tmp_path / expected) if value == "run/lmtp" else expected)


def test_the_directory_of_a_log_is_made(tmp_path):
    sink = chasquid.Sink(str(tmp_path / "a" / "b" / "log"), chasquid.Clock())
    sink.write("hello")
    sink.close()
    assert "hello" in (tmp_path / "a" / "b" / "log").read_text()


def test_all_mistakes_of_the_file_are_told_in_the_order_of_its_lines(tmp_path):
    text = (
        'hostname: "x"\nmax_queue_items: 0\nlog_path "a"\ndns_trust_ad: true\n'
        'data_dir: "not closed\nno_such_key: 1\nmail_log_path:'
    )
    (tmp_path / "chasquid.conf").write_text(text)
    problems = []
    config = chasquid.load_config(str(tmp_path), "nor_this: 1", problems)
    assert [problem.line for problem in problems] == [2, 3, 5, 6, 7, 1]
    assert str(problems[-1]).startswith("--config-overrides:1: ")
    assert (config.hostname, config.dns_trust_ad, config.max_queue_items) == ("x", True, 200)
    with pytest.raises(ConfigError, match=r":2: max_queue_items: expected"):
        chasquid.load_config(str(tmp_path))


def test_a_missing_or_unreadable_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="chasquid.conf: it cannot be read: No such file"):
        chasquid.load_config(str(tmp_path))
    (tmp_path / "chasquid.conf").mkdir()
    with pytest.raises(ConfigError, match="chasquid.conf: it cannot be read"):
        chasquid.load_config(str(tmp_path))


@pytest.mark.parametrize("explained", [False, True])
def test_the_printed_configuration_reads_back_as_itself(tmp_path, explained):
    text = "\n".join(f"{key}: {text}" for key, text in {row[0]: row[1] for row in GOOD}.items())
    text = text.replace('lmtp_address: ""', 'lmtp_address: "/x"').replace('"/bin/true"', '""')
    config = load(tmp_path, text)
    assert load(tmp_path, chasquid.config_text(config, explained)) == config


def test_the_printed_defaults_read_back_as_the_defaults(tmp_path):
    config = chasquid.Config(str(tmp_path), "a")
    assert load(tmp_path, chasquid.config_text(config)) == config
    assert chasquid.changed_keys(config) == ["hostname"]


def test_a_printed_key_is_explained_once():
    config = chasquid.Config("", "a", smtp_address=(":25", ":2525"))
    text = chasquid.config_text(config, explained=True)
    help = chasquid._KEYS["smtp_address"].help
    assert f'\n# {help}\nsmtp_address: ":25"\nsmtp_address: ":2525"\n# ' in text
    assert "#" not in chasquid.config_text(config)


@searched_briefly
@given(st.integers(1, 10_000_000), st.integers(1, 10**12))
def test_durations_and_numbers_survive_being_printed(tmp_path_factory, seconds, number):
    directory = tmp_path_factory.getbasetemp()
    config = chasquid.Config(
        str(directory), "a", give_up_send_after=float(seconds), max_queue_items=number
    )
    again = load(directory, chasquid.config_text(config))
    assert again.give_up_send_after == seconds
    assert again.max_queue_items == number


# --- Domains --------------------------------------------------------------------------------


def test_each_directory_is_a_domain_in_unicode(tmp_path):
    for name in ("Example.org", "xn--aca-6ma.example", ".git"):
        (tmp_path / "domains" / name).mkdir(parents=True)
    (tmp_path / "domains" / "README").write_text("")
    assert chasquid.domain_directories(str(tmp_path)) == {
        "example.org": str(tmp_path / "domains" / "Example.org"),
        "ñaca.example": str(tmp_path / "domains" / "xn--aca-6ma.example"),
    }


def test_without_the_directory_there_are_no_domains(tmp_path):
    assert chasquid.domain_directories(str(tmp_path)) == {}


def test_a_directory_that_is_no_domain_is_refused(tmp_path):
    (tmp_path / "domains" / "ñ..example").mkdir(parents=True)
    with pytest.raises(ConfigError, match="expected a domain name"):
        chasquid.domain_directories(str(tmp_path))


def test_a_directory_that_is_no_domain_hides_no_other(tmp_path):
    for name in ("ñ..example", "fine.example"):
        (tmp_path / "domains" / name).mkdir(parents=True)
    problems = []
    assert [*chasquid.domain_directories(str(tmp_path), problems)] == ["fine.example"]
    assert ["expected a domain name" in str(problem) for problem in problems] == [True]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "domains").write_text("")
    with pytest.raises(ConfigError, match="it cannot be read"):
        chasquid.domain_directories(str(tmp_path))
