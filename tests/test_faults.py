# SPDX-License-Identifier: Apache-2.0
"""Room FAULTS: rules that are refused, that count, and what each does to a client."""

from __future__ import annotations

import json
import math
import smtplib
import socket
import ssl
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SECONDS, FakeClock, Wire, wait_for
from support import smtp_client as client

import chasquid
from chasquid import CaptureServer, Fault, FaultError

STAGES = chasquid.STAGES


def script(tls: str = "STARTTLS", magic: bool = True) -> chasquid.Script:
    return chasquid.Script(FakeClock(), STAGES, tls, magic)


def send(server: CaptureServer, *to: str) -> dict[str, tuple[int, bytes]]:
    with client(server) as smtp:
        return smtp.sendmail("a@a.example", to or ("ana@here.example",), b"Subject: x\r\n\r\nx\r\n")


# --- rules that are refused ---


@pytest.mark.parametrize(
    "rule, sentence",
    [
        ({"stage": "ETRN", "drop": True}, "'ETRN' is no stage; expected one of connect, EHLO"),
        ({"stage": "QUIT", "drop": True, "hang": True}, "expected one of reply, raw, drop"),
        ({"stage": "RCPT"}, "the rule does nothing: give it a reply, a delay, a drop"),
        ({"stage": "RCPT", "times": 3}, "the rule does nothing"),
        ({"stage": "RCPT", "reply": "650 fine"}, "expected a reply, like '451'"),
        ({"stage": "RCPT", "reply": "fine"}, "expected a reply, like '451'"),
        ({"stage": "RCPT", "reply": "451", "raw": "x"}, "expected one of reply, raw, drop"),
        ({"stage": "RCPT", "drop": True, "probability": 0}, "a number of percent from 1 to 100"),
        ({"stage": "RCPT", "probability": 50}, "the rule does nothing"),
        ({"stage": "RCPT", "reply": "451 5.2.1 a"}, "451 and 5.2.1 do not fit"),
        ({"stage": "RCPT", "drop": True, "address": "ana"}, "write 'ana@*' for any domain"),
        ({"stage": "EHLO", "drop": True, "address": "a@b"}, "there is no address at EHLO"),
        ({"stage": "RCPT", "drop": True, "nth": -1}, "a rule counts from 1"),
        ({"stage": "RCPT", "drop": True, "nth": 1, "times": 1}, "one of nth, times and per_second"),
        ({"stage": "RCPT", "delay": -1}, "expected a time of 0 to 3600 seconds"),
        ({"stage": "RCPT", "drip": -0.1}, "expected a time of 0 to 3600 seconds"),
        ({"stage": "STARTTLS", "certificate": "old"}, "certificate: expected one of expired"),
        ({"stage": "EHLO", "certificate": "expired"}, "the handshake is at STARTTLS, not at EHLO"),
        ({"stage": "EHLO", "without": ["BINARYMIME"]}, "EHLO never offers 'BINARYMIME'"),
        ({"stage": "MAIL", "without": ["SIZE"]}, "extensions are offered at EHLO, not at MAIL"),
        ({"stage": "RCPT", "drop_after": 9}, "drop_after counts octets of a message, at DATA"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, Any], sentence: str) -> None:
    rules = script()
    with pytest.raises(FaultError) as caught:
        rules.add_rule(rule)
    assert sentence in str(caught.value)
    assert rules.describe() == []


@pytest.mark.parametrize(
    "rule, sentence",
    [
        ({}, "a rule needs a stage: connect, EHLO"),
        ({"stage": "RCPT", "replay": "451"}, "a rule has no 'replay'; it may have stage, reply"),
        ({"stage": None}, "stage of a rule: expected text"),
        ({"stage": {"a": [1]}}, "stage of a rule: expected text"),
        ({"stage": "RCPT", "reply": True}, "reply of a rule: expected text"),
        ({"stage": "RCPT", "nth": True, "drop": True}, "nth of a rule: expected a number"),
        ({"stage": "RCPT", "nth": 1.5, "drop": True}, "nth of a rule: expected a number"),
        ({"stage": "RCPT", "delay": "1"}, "delay of a rule: expected seconds"),
        ({"stage": "RCPT", "drop": 1}, "drop of a rule: expected true or false"),
        ({"stage": "EHLO", "without": 5}, "without of a rule: expected a list"),
        ({"stage": "EHLO", "without": [["SIZE"]]}, "without of a rule: expected a list"),
    ],
)
def test_json_that_is_no_rule_is_refused(rule: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FaultError) as caught:
        script().add_rule(json.loads(json.dumps(rule)))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_a_delay_has_to_be_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(FaultError):
        script().add(Fault("RCPT", delay=seconds))


def test_a_reply_may_be_a_number_and_an_extension_a_word() -> None:
    rules = script()
    rules.add(Fault("RCPT", reply=451))  # type: ignore[arg-type]
    rules.add(Fault("EHLO", without="SIZE"))  # type: ignore[arg-type]
    assert [rule.get("reply") or rule["without"] for rule in rules.describe()] == ["451", ["SIZE"]]


def test_a_stage_that_never_comes_up_is_refused() -> None:
    for stage in ("STARTTLS", "AUTH"):
        with pytest.raises(FaultError, match=f"{stage} never comes up at this server"):
            CaptureServer().fault(stage, drop=True)
        with pytest.raises(FaultError, match=f"does not offer {stage}"):
            CaptureServer().fault("EHLO", without=stage)
    with pytest.raises(FaultError, match="this server does no TLS"):
        CaptureServer().fault("connect", certificate="expired")
    with pytest.raises(FaultError, match="the handshake is at connect"):
        CaptureServer(tls="implicit").fault("EHLO", certificate="expired")


def test_a_rule_behind_one_that_always_acts_is_refused() -> None:
    rules = script()
    first = rules.add(Fault("RCPT", reply="451"))
    with pytest.raises(FaultError, match=f"rule {first} for RCPT always comes first"):
        rules.add(Fault("RCPT", reply="550", address="ana@*"))
    rules.add(Fault("MAIL", reply="451", address="ana@*"))
    rules.add(Fault("MAIL", reply="451", address="ben@*"))
    assert rules.remove_rule(first)
    assert not rules.remove_rule(first)
    rules.add(Fault("RCPT", reply="550", address="ana@*"))


def test_rules_one_behind_the_other_are_a_sequence() -> None:
    rules = script()
    rules.add(Fault("RCPT", reply="451", times=2))
    rules.add(Fault("RCPT", reply="452", times=1))
    assert replies(rules, "RCPT", 4, "a@b.example") == [451, 451, 452, 0]


@pytest.mark.parametrize("later", [{"nth": 1}, {"nth": 2}])
def test_a_rule_behind_one_that_takes_all_its_turns_is_refused(later: dict[str, int]) -> None:
    rules = script()
    rules.add(Fault("RCPT", reply="451", times=2))
    with pytest.raises(FaultError, match="can never act"):
        rules.add(Fault("RCPT", reply="452", **later))  # type: ignore[arg-type]


# --- counting ---


def replies(rules: chasquid.Script, stage: str, count: int, *addresses: str) -> list[int]:
    found = [rules.effect(stage, addresses) for _ in range(count)]
    return [each.reply.code if each and each.reply else 0 for each in found]


def test_rules_count_what_matches_whether_or_not_they_act() -> None:
    rules = script()
    rules.add(Fault("RCPT", reply="451", times=2))
    rules.add(Fault("RCPT", reply="452", nth=4))
    rules.add(Fault("RCPT", reply="450", times=3))
    assert replies(rules, "RCPT", 7, "a@b.example") == [451, 451, 450, 452, 450, 450, 0]
    assert [(rule["matched"], rule["acted"]) for rule in rules.describe()] == [
        (7, 2),
        (7, 1),
        (7, 3),
    ]
    rules.clear()
    assert rules.describe() == []
    assert replies(rules, "RCPT", 1, "a@b.example") == [0]


def test_patterns_fit_without_regard_to_case_and_any_recipient() -> None:
    rules = script()
    rules.add(Fault("DATA", reply="451", address="ANA@*.Example"))
    assert replies(rules, "DATA", 1, "ben@b.example", "ana@B.EXAMPLE") == [451]
    assert replies(rules, "DATA", 1, "ben@b.example") == [0]
    rules.add(Fault("MAIL", reply="550", address=""))
    assert replies(rules, "MAIL", 1, "") == [550]
    assert replies(rules, "MAIL", 1, "a@b") == [0]


def test_a_rate_is_counted_over_a_second_that_moves_along() -> None:
    clock = FakeClock()
    rules = chasquid.Script(clock, STAGES, "")
    rules.add(Fault("MAIL", per_second=2))
    assert replies(rules, "MAIL", 4, "a@b") == [0, 0, 421, 421]
    clock.now += 1.0
    assert replies(rules, "MAIL", 3, "a@b") == [0, 0, 421]


def test_rules_are_described_as_they_were_written() -> None:
    rules = script()
    given = {"stage": "EHLO", "without": ["SIZE"], "delay": 0.5, "times": 2}
    id = rules.add_rule(given)
    assert rules.describe() == [{"id": id, **given, "matched": 0, "acted": 0}]
    assert json.loads(json.dumps(rules.describe())) == rules.describe()


ADDRESS = st.sampled_from(["", "a@b.example", "ana+450@b", "ana+dot550@b", "ü@b", "a+delay3@b"])
RULES = st.builds(
    Fault,
    st.sampled_from(STAGES),
    reply=st.sampled_from(["", "451", "550 5.1.1 no", "250", "x", "421 4.0.0 ü"]),
    address=st.sampled_from(["*", "a@*", "*@b.example", "", "[", "[!a]@*", "ana"]),
    nth=st.integers(-1, 3), times=st.integers(-1, 3), per_second=st.integers(-1, 2),
    delay=st.floats(-1, 2), drop=st.booleans(), hang=st.booleans(),
    drop_after=st.integers(-1, 2),
    certificate=st.sampled_from(["", "expired", "?"]),
    without=st.lists(st.sampled_from(["SIZE", "DSN", "?"]), max_size=2).map(tuple),
)  # fmt: skip
PLACES = st.lists(st.tuples(st.sampled_from(STAGES), st.lists(ADDRESS, max_size=2)), max_size=12)


@settings(max_examples=60)
@given(st.lists(RULES, max_size=6), PLACES)
def test_no_rule_that_was_taken_fails_later(
    faults: list[Fault], places: list[tuple[str, list[str]]]
) -> None:
    rules = script()
    for fault in faults:
        try:
            rules.add(fault)
        except FaultError as error:
            assert str(error) and "\n" not in str(error)
    for stage, addresses in places:
        rules.effect(stage, addresses)
    for row in rules.describe():
        assert row["acted"] <= row["matched"] <= len(places)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(0, 12))
def test_a_rule_acts_as_often_as_it_says(times: int, more: int) -> None:
    rules = script()
    rules.add(Fault("RCPT", reply="451", times=times))
    assert replies(rules, "RCPT", times + more, "a@b") == [451] * times + [0] * more


# --- recipients that name their failure ---


@pytest.mark.parametrize(
    "address, stage, field, value",
    [
        ("ana+450@b", "RCPT", "reply", "450"),
        ("ana+x+599@b", "RCPT", "reply", "599"),
        ("ana+dot451@b", "message", "reply", "451"),
        ("ana+timeout@b", "RCPT", "hang", True),
        ("ana+DROP@b", "RCPT", "drop", True),
        ("ana+slow@b", "RCPT", "drip", 0.1),
        ("ana+delay12@b", "RCPT", "delay", 12.0),
    ],
)
def test_a_recipient_names_its_failure(address: str, stage: str, field: str, value: object) -> None:
    effect = script().effect(stage, [address])
    assert effect is not None and getattr(effect.fault, field) == value
    other = "message" if stage == "RCPT" else "RCPT"
    assert script().effect(other, [address]) is None
    assert script(magic=False).effect(stage, [address]) is None


@pytest.mark.parametrize(
    "address",
    ["450@b", "ana+250@b", "ana+4500@b", "ana+news@b", "ana+@b", "ana+450.x@b", "ana+dot@b",
     "ana+delay@b", "ana+delay1234@b", "ana-450@b", "+news@b"],
)  # fmt: skip
def test_ordinary_addresses_are_left_alone(address: str) -> None:
    for stage in ("RCPT", "message"):
        assert script().effect(stage, [address]) is None


def test_magic_at_a_server() -> None:
    with CaptureServer() as server:
        refused = send(server, "ana+news@b.example", "ana+450@b.example")
        assert list(refused) == ["ana+450@b.example"]
        assert server.messages[0].rcpt_tos == ["ana+news@b.example"]
        with pytest.raises(smtplib.SMTPDataError) as caught:
            send(server, "ana+dot552@b.example")
        assert caught.value.smtp_code == 552
        with pytest.raises(smtplib.SMTPServerDisconnected):
            send(server, "ana+drop@b.example")
        assert len(server.messages) == 1
    with CaptureServer(magic=False) as server:
        assert send(server, "ana+450@b.example") == {}


# --- what happens ---


def code_at(server: CaptureServer, stage: str) -> int:
    """Return the code of the reply at a stage, 0 where the connection ends."""
    try:
        with Wire.to(*server.address) as wire:
            for name, line in (
                ("connect", ""),
                ("EHLO", "EHLO c.example"),
                ("MAIL", "MAIL FROM:<a@a.example>"),
                ("RCPT", "RCPT TO:<ana@b.example>"),
                ("DATA", "DATA"),
                ("message", "Subject: x\r\n\r\nx\r\n."),
            ):
                if line:
                    wire.say(line)
                reply = wire.reply()
                if name == stage:
                    return int(reply[:3] or 0)
    except OSError:
        return 0
    raise AssertionError(stage)


@pytest.mark.parametrize("stage", ["connect", "EHLO", "MAIL", "RCPT", "DATA", "message"])
def test_each_stage_fails_as_it_is_told_to(stage: str) -> None:
    with CaptureServer() as server:
        server.fault(stage, reply="451 4.9.9 on purpose", times=1)
        server.fault(stage, drop=True, nth=2)
        server.fault(stage, delay=0.05, nth=3)
        server.fault(stage, drip=0.0005, nth=4)
        assert code_at(server, stage) == 451
        assert code_at(server, stage) == 0
        began = time.monotonic()
        good = code_at(server, stage)
        assert time.monotonic() - began >= 0.05
        assert 200 <= good < 400 and code_at(server, stage) == good
        assert [rule["acted"] for rule in server.script.describe()] == [1, 1, 1, 1]


@pytest.mark.parametrize("stage", ["connect", "EHLO", "MAIL", "RCPT", "DATA", "message"])
@pytest.mark.parametrize("effect", [{"hang": True}, {"delay": 60.0}, {"drip": 30.0}])
def test_a_server_ends_at_once_whatever_it_is_suffering(stage: str, effect: dict[str, Any]) -> None:
    threads = set(threading.enumerate())
    server = CaptureServer()
    server.start()
    server.fault(stage, **effect)
    helper = threading.Thread(target=code_at, args=(server, stage))
    helper.start()
    wait_for(lambda: server.script.describe()[0]["acted"], "the fault")
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 20.0
    helper.join(SECONDS)
    assert set(threading.enumerate()) == threads


def test_a_login_that_fails_on_purpose() -> None:
    with CaptureServer(login_in_the_clear=True) as server:
        server.fault("AUTH", reply="454 4.7.0 later", times=1)
        with client(server) as smtp:
            assert smtp.docmd("AUTH PLAIN", "AHVzZXIAcGFzc3dvcmQ=")[0] == 454
            assert smtp.login(server.login, server.password)[0] == 235


def test_a_connection_that_ends_in_the_middle_of_a_message() -> None:
    with CaptureServer() as server:
        server.fault("DATA", drop_after=1000, times=1)
        with Wire.to(*server.address) as wire:
            wire.reply()
            for line in ("EHLO c", "MAIL FROM:<a@a.example>", "RCPT TO:<b@b.example>", "DATA"):
                wire.say(line)
                wire.reply()
            wire.send(b"x: " + b"y" * 500 + b"\r\n" + b"z" * 600)
            assert wire.line() == ""
        assert server.messages == []


def test_drop_after_is_about_one_message() -> None:
    with CaptureServer() as server, client(server) as smtp:
        server.fault("DATA", drop_after=1000, nth=1)
        smtp.sendmail("a@a.example", ["b@b.example"], b"Subject: 1\r\n\r\nx\r\n")
        smtp.sendmail("a@a.example", ["b@b.example"], b"Subject: 2\r\n\r\n" + b"y" * 990)
        assert len(server.messages) == 2


def test_rules_count_over_all_connections() -> None:
    with CaptureServer() as server:
        server.fault("RCPT", reply=451, times=2)
        for _ in range(2):
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                send(server)
        assert send(server) == {}


def test_who_is_too_fast_is_sent_away() -> None:
    with CaptureServer(faults=[Fault("MAIL", per_second=3)]) as server:
        with client(server) as smtp:
            codes = []
            for _ in range(3):
                codes.append(smtp.mail("a@a.example")[0])
                smtp.rset()
            codes.append(smtp.mail("a@a.example")[0])
        assert codes == [250, 250, 250, 421]


def test_a_421_closes_the_connection() -> None:
    faults = [Fault("MAIL", reply="421 4.3.2 bye")]
    with CaptureServer(faults=faults) as server, Wire.to(*server.address) as wire:
        wire.reply()
        wire.say("EHLO c")
        wire.reply()
        wire.say("MAIL FROM:<a@a.example>")
        assert wire.reply() == "421 4.3.2 bye"
        assert wire.line() == ""


def test_replies_on_purpose_do_not_count_as_errors_of_the_client() -> None:
    faults = [Fault("RCPT", reply="550 5.1.1 no")]
    with CaptureServer(faults=faults) as server, client(server) as smtp:
        smtp.mail("a@a.example")
        assert {smtp.rcpt("b@b.example")[0] for _ in range(50)} == {550}


# --- certificates and extensions ---

REASONS = [
    ("expired", "certificate has expired"),
    ("wrong-name", "IP address mismatch, certificate is not valid for '127.0.0.1'"),
    ("untrusted", "self-signed certificate"),
    ("broken", ""),
]


@pytest.mark.parametrize("kind, why", REASONS)
@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_certificates_that_are_wrong_in_one_way(kind: str, why: str, tls: str) -> None:
    with CaptureServer(tls=tls) as server:
        server.fault("STARTTLS" if tls == "starttls" else "connect", certificate=kind, times=1)

        def connect() -> None:
            context = server.client_context()
            if tls == "implicit":
                smtplib.SMTP_SSL(*server.address, context=context, timeout=SECONDS).quit()
                return
            with client(server) as smtp:
                smtp.starttls(context=context)

        with pytest.raises((ssl.SSLError, smtplib.SMTPException)) as caught:
            connect()
        if why:
            assert isinstance(caught.value, ssl.SSLCertVerificationError)
            assert why in caught.value.verify_message
        else:
            assert not isinstance(caught.value, ssl.SSLCertVerificationError)
        connect()


EXTENSIONS = ("PIPELINING 8BITMIME SMTPUTF8 SIZE ENHANCEDSTATUSCODES CHUNKING LIMITS DSN HELP "
              "AUTH STARTTLS").split()  # fmt: skip


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_extension_that_is_not_offered(name: str) -> None:
    with CaptureServer(tls="starttls", login_in_the_clear=True) as server:
        with client(server) as smtp:
            assert smtp.has_extn(name)
        server.fault("EHLO", without=name)
        with client(server) as smtp:
            assert not smtp.has_extn(name)
            assert len(smtp.esmtp_features) >= len(EXTENSIONS) - 1
            parameter = {"SIZE": "SIZE=5", "8BITMIME": "BODY=8BITMIME", "DSN": "RET=HDRS"}.get(name)
            if parameter:
                assert smtp.docmd(f"MAIL FROM:<a@a.example> {parameter}")[0] == 555
            command = {"STARTTLS": "STARTTLS", "AUTH": "AUTH PLAIN AA==", "CHUNKING": "BDAT 0"}
            if name in command:
                assert smtp.docmd(command[name])[0] in (500, 502)


def test_a_chunk_that_is_not_to_be_sent_is_no_command() -> None:
    faults = [Fault("EHLO", without=("CHUNKING",))]
    with CaptureServer(faults=faults) as server, Wire.to(*server.address) as wire:
        wire.reply()
        wire.say("EHLO c")
        wire.reply()
        wire.send(b"BDAT 6\r\nNOOP\r\nRSET\r\n")
        assert wire.reply()[:3] == "502"
        assert wire.reply()[:3] == "250"
        wire.say("QUIT")
        assert wire.reply()[:3] == "221"


def test_a_rule_can_be_added_while_sessions_run() -> None:
    with CaptureServer() as server, client(server) as smtp:
        assert smtp.mail("a@a.example")[0] == 250
        server.fault("RCPT", reply="551")
        assert smtp.rcpt("b@b.example")[0] == 551
        server.reset()
        assert smtp.rcpt("b@b.example")[0] == 250


def test_reset_keeps_the_rules_of_the_start_and_lets_them_count_anew() -> None:
    with CaptureServer(faults=[Fault("RCPT", reply="451", times=1)]) as server:
        server.fault("DATA", drop=True)
        for _ in range(2):
            with pytest.raises(smtplib.SMTPRecipientsRefused):
                send(server)
            server.reset()
            assert [rule["stage"] for rule in server.script.describe()] == ["RCPT"]


def test_nobody_hears_anything_from_a_server_that_hangs() -> None:
    faults = [Fault("connect", hang=True)]
    with (
        CaptureServer(faults=faults) as server,
        socket.create_connection(server.address, SECONDS) as raw,
    ):
        raw.settimeout(0.05)
        with pytest.raises(TimeoutError):
            raw.recv(1)


@pytest.mark.parametrize("name", ["nth", "times"])
def test_a_rule_that_is_to_act_on_no_time_is_refused(name: str) -> None:
    with pytest.raises(FaultError, match=f"{name}: expected a number from 1, found 0"):
        script().add_rule({"stage": "RCPT", "reply": "451", name: 0})


# --- replies of any kind ---


def say(server: CaptureServer, *commands: bytes) -> list[bytes]:
    """Return the greeting, and what is answered to each command."""
    with socket.create_connection(server.address, SECONDS) as connection:
        file = connection.makefile("rb")
        answers = [file.readline()]
        for command in commands:
            connection.sendall(command + b"\r\n")
            lines = [file.readline()]
            while lines[-1][3:4] == b"-":
                lines.append(file.readline())
            answers.append(b"".join(lines))
    return answers


def test_a_greeting_of_ones_own() -> None:
    with CaptureServer(faults=Fault("connect", reply="220 mx.example Postfix")) as server:
        assert say(server, b"NOOP") == [b"220 mx.example Postfix\r\n", b"250 2.0.0 OK\r\n"]


def test_a_reply_that_does_not_refuse_is_given_for_what_was_done() -> None:
    with CaptureServer() as server:
        server.fault("MAIL", reply="250 2.1.0 fine\nand more")
        server.fault("RCPT", reply="251 User not local; will forward")
        server.fault("message", reply="250 2.6.0 thanks", times=1)
        answers = say(
            server,
            b"HELO a.example",
            b"MAIL FROM:<a@a.example>",
            b"RCPT TO:<b@b.example>",
            b"DATA",
            b"Subject: x\r\n\r\nx\r\n.",
        )
        assert answers[2:] == [
            b"250-2.1.0 fine\r\n250 2.1.0 and more\r\n",
            b"251 User not local; will forward\r\n",
            b"354 End data with <CR><LF>.<CR><LF>\r\n",
            b"250 2.6.0 thanks\r\n",
        ]
        [message] = server.messages
        assert message.rcpt_tos == ["b@b.example"]


def test_what_was_refused_stays_refused() -> None:
    with CaptureServer() as server:
        server.fault("RCPT", reply="250 fine")
        assert say(server, b"HELO a.example", b"RCPT TO:<b@b.example>")[2].startswith(b"503 ")


def test_data_may_be_answered_without_being_asked_for() -> None:
    with CaptureServer() as server:
        server.fault("DATA", reply="250 got it")
        answers = say(
            server, b"HELO a.example", b"MAIL FROM:<a@a.example>", b"RCPT TO:<b@b.example>",
            b"DATA", b"NOOP",
        )  # fmt: skip
        assert answers[-2:] == [b"250 got it\r\n", b"250 2.0.0 OK\r\n"]


def test_raw_octets_instead_of_a_reply() -> None:
    with CaptureServer() as server:
        server.fault("connect", raw="SSH-2.0-OpenSSH\r\n")
        server.fault("EHLO", raw="250-a\r\n550 b\r\n")
        assert say(server, b"EHLO a.example") == [b"SSH-2.0-OpenSSH\r\n", b"250-a\r\n550 b\r\n"]


@pytest.mark.parametrize("stage", ["NOOP", "RSET", "VRFY", "EXPN", "HELP", "QUIT"])
def test_commands_that_are_no_part_of_a_message(stage: str) -> None:
    with CaptureServer() as server:
        server.fault(stage, reply="250 fine", nth=2)
        command = {"VRFY": b"VRFY ana", "EXPN": b"EXPN all"}.get(stage, stage.encode())
        commands = [b"HELO a.example", b"MAIL FROM:<a@a.example>", command]
        assert say(server, *commands)[-1] != b"250 fine\r\n"
        assert say(server, *commands)[-1] == b"250 fine\r\n"


def test_quit_ends_the_session_whatever_it_says() -> None:
    with CaptureServer(faults=Fault("QUIT", reply="221 bye")) as server:
        assert say(server, b"QUIT", b"NOOP")[1:] == [b"221 bye\r\n", b""]


def test_the_connection_is_dropped_after_a_reply() -> None:
    with CaptureServer() as server:
        server.fault("message", reply="250 2.0.0 got it", drop=True, times=1)
        server.fault("DATA", reply="354 go on", drop=True, nth=2)
        server.fault("RCPT", raw="250 \udcff\r\n", drop=True, nth=3)
        to = [b"HELO a.example", b"MAIL FROM:<a@a.example>", b"RCPT TO:<b@b.example>"]
        message = b"Subject: x\r\n\r\nx\r\n."
        assert say(server, *to, b"DATA", message, b"NOOP")[-2:] == [b"250 2.0.0 got it\r\n", b""]
        assert len(server.messages) == 1  # what was not refused is done
        assert say(server, *to, b"DATA", b"x")[-2:] == [b"354 go on\r\n", b""]
        assert say(server, *to, b"NOOP")[-2:] == [b"250 \xff\r\n", b""]
        assert len(server.messages) == 1


def test_probability_is_left_to_the_dice() -> None:
    thrown = iter([0.1, 0.9, 0.29])
    rules = chasquid.Script(FakeClock(), STAGES, "", random=lambda: next(thrown))
    rules.add_rule({"stage": "MAIL", "reply": "451", "probability": 30})
    acts = [rules.effect("MAIL", ["a@b"]) is not None for _ in range(3)]
    assert acts == [True, False, True]
    assert rules.describe()[0]["acted"] == 2
