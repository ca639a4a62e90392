# SPDX-License-Identifier: Apache-2.0
"""Rooms SESSION, RECEPTION: what does not read well as a dialogue; see dialogues too."""

from __future__ import annotations

import contextlib
import email
import os
import shutil
import ssl
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    HOST,
    MEGABYTE,
    SECONDS,
    FakeCourier,
    RunningClock,
    Serve,
    Server,
    Wire,
    greeted,
    logged_in,
    send,
    trusting,
    wait_for,
)

import chasquid

TRACE = ["Authentication-Results", "Received-SPF", "Received"]  # of who has not logged in


# --- lines and packets ---


def test_a_command_line_of_1000_octets_is_let_in_and_one_more_is_not(serve: Serve) -> None:
    with greeted(serve()) as wire:
        wire.send(b"NOOP " + b"x" * 993 + b"\r\n")
        assert wire.reply().startswith("250 ")
        wire.send(b"NOOP " + b"x" * 994 + b"\r\n")
        assert wire.reply().startswith("500 5.5.2 ")
        assert wire.ask("NOOP").startswith("250 ")


def test_a_line_of_a_megabyte_gets_one_reply_and_the_next_command_another(serve: Serve) -> None:
    with greeted(serve()) as wire:
        wire.send(b"NOOP " + b"x" * MEGABYTE + b"\r\nNOOP\r\n")
        assert wire.reply().startswith("500 5.5.2 ")
        assert wire.reply().startswith("250 ")


def test_an_answer_to_auth_may_be_longer_than_a_command_but_not_much(serve: Serve) -> None:
    with serve().connect("submission over TLS") as wire:
        wire.start_tls(trusting())
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("AUTH PLAIN") == "334 "
        assert wire.ask("A" * 12_000).startswith("501 5.5.2 expected identity")
        assert wire.ask("AUTH PLAIN") == "334 "
        assert wire.ask("A" * 13_000).startswith("500 5.5.2 ")
        assert wire.ask("NOOP").startswith("250 ")


DIALOGUE = (
    b"EHLO client.example\r\nMAIL FROM:<eva@there.example>\r\nRCPT TO:<ana@here.example>\r\n"
    b"RCPT TO:<nobody@here.example>\r\nDATA\r\nSubject: x\r\n\r\n..\r\nBye\r\n.\r\n"
    b"MAIL FROM:<>\r\nRCPT TO:<ben@here.example>\r\nBDAT 7\r\nA: b\r\n\rBDAT 1 LAST\r\n\nQUIT\r\n"
)
CODES = "220 250 250 250 550 354 250 250 250 250 250 221"


def codes(wire: Wire) -> str:
    """Return the codes of all replies until the server closes."""
    found = []
    while reply := wire.reply():
        found.append(reply[:3])
    return " ".join(found)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, len(DIALOGUE)])
def test_a_dialogue_goes_the_same_in_packets_of_any_size(serve: Serve, size: int) -> None:
    server = serve()
    with server.connect() as wire:
        for start in range(0, len(DIALOGUE), size):
            wire.send(DIALOGUE[start : start + size])
        assert codes(wire) == CODES
    assert server.mail("ana")[0].endswith(b"Subject: x\n\n.\nBye\n")
    assert server.mail("ben")[0].endswith(b"A: b\n\n")


def test_a_dialogue_goes_the_same_when_it_is_split_at_any_octet(serve: Serve) -> None:
    server = serve(max_queue_items=2 * len(DIALOGUE))
    wires = [server.connect() for _ in DIALOGUE]
    for number, wire in enumerate(wires):
        wire.send(DIALOGUE[:number])
    for number, wire in enumerate(wires):
        wire.send(DIALOGUE[number:])
    for wire in wires:
        assert codes(wire) == CODES
        wire.close()
    assert len(server.mail("ana")) == len(server.mail("ben")) == len(DIALOGUE)
    assert all(letter.endswith(b"Subject: x\n\n.\nBye\n") for letter in server.mail("ana"))


def test_a_message_arrives_as_it_was_sent_however_it_is_cut(serve: Serve) -> None:
    server = serve()
    line = st.binary(max_size=30).map(lambda one: one.replace(b"\r", b"").replace(b"\n", b""))

    @settings(max_examples=40)
    @given(
        lines=st.lists(st.one_of(line, st.sampled_from([b"", b".", b"..", b".x"])), max_size=12),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
        chunked=st.booleans(),
    )
    def check(lines: list[bytes], sizes: list[int], chunked: bool) -> None:
        content = b"Subject: x\r\n\r\n" + b"".join(text_line + b"\r\n" for text_line in lines)
        shutil.rmtree(server.maildir("ana"), ignore_errors=True)
        with greeted(server) as wire:
            assert wire.ask("MAIL FROM:<>").startswith("250 ")
            assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
            wire_form = content
            if not chunked:
                wire.say("DATA")
                assert wire.reply().startswith("354 ")
                wire_form = content.replace(b"\r\n.", b"\r\n..") + b".\r\n"
            start = count = 0
            while start < len(wire_form):
                piece = wire_form[start : start + sizes[count % len(sizes)]]
                wire.send(b"BDAT %d\r\n%b" % (len(piece), piece) if chunked else piece)
                start += len(piece)
                count += 1
            if chunked:
                wire.say("BDAT 0 LAST")
                assert all(wire.reply().startswith("250 ") for _ in range(count))
            assert wire.reply().startswith("250 2.0.0 OK: queued as ")
        (stored,) = server.mail("ana")
        assert stored.endswith(content.replace(b"\r\n", b"\n"))
        head = stored[: -len(content.replace(b"\r\n", b"\n"))]
        names = email.message_from_bytes(head).keys()
        assert names == ["Return-Path", "Delivered-To", *TRACE]

    check()


# --- limits ---


def test_after_a_hundred_recipients_the_rest_is_for_later(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        for number in range(100):
            assert wire.ask(f"RCPT TO:<ana+{number}@here.example>").startswith("250 ")
        assert wire.ask("RCPT TO:<ben@here.example>").startswith("452 4.5.3 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(b"Subject: for many\r\n\r\n.\r\n")
        assert wire.reply().startswith("250 ")
    assert server.mail("ben") == []


def test_an_alias_for_many_counts_as_one_recipient(serve: Serve) -> None:
    names = ", ".join(f"ana+{number}" for number in range(150))
    server = serve(aliases={"here.example": f"all: {names}\n"})
    with greeted(server) as wire:
        assert send(wire, b"Subject: x\r\n\r\n", "all@here.example").startswith("250 ")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")


def test_a_message_of_exactly_the_limit_is_let_in(serve: Serve) -> None:
    server = serve(max_data_size_mb=1)
    head = b"Subject: x\r\n\r\n"
    body = (b"x" * 62 + b"\r\n") * 16384
    with greeted(server) as wire:
        assert send(wire, head + body[len(head) :]).startswith("250 ")
        assert send(wire, head + b"x" + body[len(head) :]).startswith("552 5.3.4 ")
    assert len(server.mail("ana")) == 1


def test_a_full_queue_is_said_at_mail(serve: Serve) -> None:
    aliases = {"here.example": "out: eva@there.example\n"}
    server = serve(max_queue_items=1, aliases=aliases, remote=FakeCourier())
    with greeted(server) as wire:
        assert send(wire, b"Subject: x\r\n\r\n", "out@here.example").startswith("250 ")
        assert wire.ask("MAIL FROM:<eva@there.example>").startswith("451 4.3.1 ")


def test_a_queue_that_fills_up_meanwhile_is_said_at_data(serve: Serve) -> None:
    aliases = {"here.example": "out: eva@there.example\n"}
    server = serve(max_queue_items=1, aliases=aliases, remote=FakeCourier())
    with greeted(server) as late, greeted(server) as wire:
        for each in (late, wire):
            assert each.ask("MAIL FROM:<>").startswith("250 ")
            assert each.ask("RCPT TO:<out@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(b"Subject: x\r\n\r\n.\r\n")
        assert wire.reply().startswith("250 ")
        assert late.ask("DATA").startswith("451 4.3.1 ")
    assert len(server.queued()) == 1


# --- time ---


def test_a_client_that_says_nothing_is_sent_away(serve: Serve) -> None:
    clock = RunningClock()
    server = serve(clock=clock)
    with greeted(server) as wire:
        clock.advance(50)
        assert wire.ask("NOOP").startswith("250 ")
        clock.advance(61)
        server.daemon.loop.post(lambda: None)
        assert wire.reply().startswith("421 4.4.2 ")
        assert wire.is_closed()


def test_a_client_that_stops_within_a_message_is_sent_away(serve: Serve) -> None:
    clock = RunningClock()
    server = serve(clock=clock)
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(b"Subject: x\r\n")
        server.settle()
        clock.advance(181)
        server.daemon.loop.post(lambda: None)
        assert wire.reply().startswith("421 4.4.2 ")
        assert wire.is_closed()
    assert server.queued() == []


def test_a_connection_ends_after_twenty_minutes_however_busy(serve: Serve) -> None:
    clock = RunningClock()
    server = serve(clock=clock)
    with greeted(server) as wire:
        for _ in range(23):
            clock.advance(50)
            assert wire.ask("NOOP").startswith("250 ")
        clock.advance(51)
        server.daemon.loop.post(lambda: None)
        assert wire.reply().startswith("421 4.4.2 ")
        assert wire.is_closed()


def test_a_failed_login_takes_half_a_second_for_whoever(serve: Serve) -> None:
    server = serve()
    clock = chasquid.Clock()
    with greeted(server) as wire:
        assert wire.ask("STARTTLS").startswith("220 ")
        wire.start_tls(trusting())
        assert wire.ask("EHLO client.example").startswith("250-")
        start = clock.monotonic()
        assert wire.ask("AUTH PLAIN AGFuYUBoZXJlLmV4YW1wbGUAd3Jvbmc=").startswith("535 ")
        assert clock.monotonic() - start >= 0.5


# --- what is added to a message ---


def received(message: bytes) -> str:
    return str(email.message_from_bytes(message)["Received"])


def test_received_tells_where_a_message_came_from(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        reply = send(wire, b"Subject: x\r\n\r\n", sender="eva@there.example")
    id = reply.split()[-1]
    found = " ".join(received(server.mail("ana")[0]).split())
    assert found.startswith(f"from client.example ([127.0.0.1]) by {HOST} (chasquid) with ESMTP")
    assert f" id {id} (over smtp, envelope from <eva@there.example>) ; " in found


def test_helo_is_told_as_smtp(serve: Serve) -> None:
    server = serve()
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("HELO client.example").startswith("250 ")
        assert send(wire, b"Subject: x\r\n\r\n").startswith("250 ")
    assert " with SMTP id " in " ".join(received(server.mail("ana")[0]).split())


def test_what_a_user_wrote_into_the_header_is_kept(serve: Serve) -> None:
    server = serve()
    header = b"Date: Thu, 1 Jan 1970 00:00:00 +0000\r\nmessage-id: <a@b>\r\n\r\n"
    with logged_in(server) as wire:
        assert send(wire, header).startswith("250 ")
    message = email.message_from_bytes(server.mail("ana")[0])
    assert message.get_all("Date") == ["Thu, 1 Jan 1970 00:00:00 +0000"]
    assert message.get_all("Message-ID") == ["<a@b>"]


def test_nothing_is_added_to_the_mail_of_strangers_but_the_trace(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        assert send(wire, b"Subject: x\r\n\r\n").startswith("250 ")
    names = email.message_from_bytes(server.mail("ana")[0]).keys()
    assert names == ["Return-Path", "Delivered-To", *TRACE, "Subject"]


def test_a_return_path_that_came_with_the_message_does_not_stay(serve: Serve) -> None:
    """RFC 5321, 4.4"""
    server = serve()
    with greeted(server) as wire:
        data = b"Return-Path: <a@b>\r\nSubject: x\r\nreturn-path:\r\n <c@d>\r\nTo: y\r\n\r\n"
        assert send(wire, data).startswith("250 ")
    message = email.message_from_bytes(server.mail("ana")[0])
    assert message.get_all("Return-Path") == ["<>"]
    assert message.keys()[-2:] == ["Subject", "To"]


def test_received_is_ascii_where_the_client_did_not_ask_for_smtputf8(serve: Serve) -> None:
    server = serve()
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO xn--bcher-kva.example").startswith("250-")
        reply = send(wire, b"Subject: x\r\n\r\n", sender="eva@xn--bcher-kva.example")
        assert reply.startswith("250 ")
    (message,) = server.mail("ana")
    start = message.index(b"Received: ")
    assert message[start:].isascii()


# --- what goes wrong ---


@pytest.mark.parametrize("place", ["tmp", "new"])
def test_a_message_that_cannot_be_stored_is_not_accepted(serve: Serve, place: str) -> None:
    server = serve()
    directory = server.data_dir / "queue" / place
    mailboxes = server.data_dir / "mail"
    with greeted(server) as wire:
        directory.rmdir()
        for path in (directory, mailboxes):
            path.write_bytes(b"")
        assert send(wire, b"Subject: x\r\n\r\n").startswith("451 4.3.1 ")
        for path in (directory, mailboxes):
            path.unlink()
        directory.mkdir()
        assert server.queued() == []
        assert send(wire, b"Subject: x\r\n\r\n").startswith("250 ")
    assert len(server.mail("ana")) == 1


def test_a_large_message_that_cannot_be_stored_is_read_and_refused(serve: Serve) -> None:
    server = serve()
    directory = server.data_dir / "queue" / "tmp"
    with greeted(server) as wire:
        directory.rmdir()
        directory.write_bytes(b"")
        reply = send(wire, b"Subject: x\r\n\r\n" + b"a line\r\n" * 50_000)
        assert reply.startswith("452 4.3.1 ")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        directory.unlink()
        directory.mkdir()


def test_what_is_no_tls_on_the_port_for_it_ends_that_connection_alone(serve: Serve) -> None:
    server = serve()
    with server.connect("submission over TLS") as wire:
        wire.send(b"EHLO client.example\r\n")
        with contextlib.suppress(ConnectionResetError):
            while wire.socket.recv(4096):
                pass  # an alert, perhaps
    with logged_in(server) as wire:
        assert wire.ask("NOOP").startswith("250 ")


def test_a_handshake_that_is_cut_off_ends_that_connection_alone(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        assert wire.ask("STARTTLS").startswith("220 ")
        wire.send(b"\x16\x03\x01\x02\x00")
    wait_for(lambda: "event=ended-early" in server.mail_log, "the server to notice")
    with greeted(server) as wire:
        assert wire.ask("NOOP").startswith("250 ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_not_spoken(serve: Serve) -> None:
    server = serve()
    context = trusting()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with server.connect("submission over TLS") as wire, pytest.raises((ssl.SSLError, OSError)):
        wire.start_tls(context)


def test_many_connections_at_once_are_served(serve: Serve) -> None:
    server = serve()
    wires = [greeted(server) for _ in range(100)]
    for wire in wires:
        wire.send(b"MAIL FROM:<>\r\nRCPT TO:<ana@here.example>\r\nDATA\r\nA: b\r\n\r\n.\r\n")
    for wire in wires:
        assert [wire.reply()[:3] for _ in range(4)] == ["250", "250", "354", "250"]
        wire.close()
    assert len(server.mail("ana")) == 100


def test_a_message_is_on_the_disk_before_it_is_answered_for(serve: Serve) -> None:
    server = serve(remote=FakeCourier())
    with logged_in(server) as wire:
        reply = send(wire, b"Subject: x\r\n\r\n", "eva@there.example", "ana@here.example")
        id = reply.split()[-1]
        (name,) = server.queued("new", "cur")
    assert name.split("/")[1] == f"{id},S=14"


def test_a_client_that_reads_nothing_holds_up_nobody(serve: Serve) -> None:
    server = serve()
    with server.connect() as deaf:
        deaf.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                deaf.socket.sendall(b"HELP\r\n" * 10_000)
        with greeted(server) as wire:
            wire.socket.settimeout(SECONDS)
            assert send(wire, b"Subject: x\r\n\r\n").startswith("250 ")


def test_a_slow_program_holds_up_neither_mailboxes_nor_replies_nor_other_programs(
    tmp_path: Path,
) -> None:
    gate, quick = tmp_path / "gate", tmp_path / "quick"
    os.mkfifo(gate)
    aliases = f"slow: | cat {gate}\nquick: | tee {quick}\n"
    with Server(tmp_path / "s", aliases={"here.example": aliases}) as server:
        with greeted(server) as wire:
            for _ in range(30):
                assert send(wire, b"Subject: x\r\n\r\n", "slow@here.example")[:3] == "250"
            assert send(wire, b"Subject: x\r\n\r\n", "quick@here.example")[:3] == "250"
            assert send(wire, b"Subject: x\r\n\r\n")[:3] == "250"
        wait_for(lambda: list(server.maildir("ana").glob("new/*")), "the mailbox")
        wait_for(lambda: quick.exists() and quick.read_bytes(), "the quick program")
        wait_for(lambda: len(server.queued()) == 30, "the end of the two others")
        assert "cat took it" not in server.mail_log
        end = threading.Event()

        def open_gate() -> None:
            while not end.is_set():
                with contextlib.suppress(OSError):
                    os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
                time.sleep(0.005)

        opener = threading.Thread(target=open_gate)
        opener.start()
        try:
            wait_for(lambda: not server.queued(), "the slow program")
        finally:
            end.set()
            opener.join()


def test_mail_for_a_program_that_half_the_queue_waits_for_is_refused_for_now(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    wait = f"timeout 10 sh -c 'until [ -e {gate} ]; do sleep 0.01; done'"
    with Server(
        tmp_path / "s", aliases={"here.example": f"slow: | {wait}\n"},
        max_queue_items=8,
    ) as server, greeted(server) as wire:  # fmt: skip
        replies = [send(wire, b"Subject: x\r\n\r\n", "slow@here.example") for _ in range(6)]
        assert replies[-1] == "451 4.3.2 too much mail is waiting for a program here"
        assert send(wire, b"Subject: x\r\n\r\n")[:3] == "250"
        gate.touch()


@pytest.mark.parametrize(
    ("command", "status"), [("MAIL FROM", "5.1.7"), ("RCPT TO", "5.1.3")], ids=["MAIL", "RCPT"]
)
@pytest.mark.parametrize(
    "address",
    [f"{'x' * 250}@here.example", f"x@{'y' * 64}.example", f"x@{'y.' * 127}example"],
    ids=["path", "label", "domain"],
)
def test_what_cannot_be_an_address_is_refused_before_anything_else(
    serve: Serve, command: str, status: str, address: str
) -> None:
    """RFC 5321, 4.5.3.1.3; RFC 1035, 2.3.4"""
    with greeted(serve()) as wire:
        if command == "RCPT TO":
            assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask(f"{command}:<{address}>").startswith(f"501 {status} ")
        assert wire.ask(f"{command}:<ana@here.example>").startswith("250 ")


def test_a_path_of_256_octets_is_let_in(serve: Serve) -> None:
    local = "x" * (256 - len("<@a.example>"))
    with greeted(serve()) as wire:
        assert wire.ask(f"MAIL FROM:<{local}@a.example>").startswith("250 ")


@pytest.mark.parametrize("letter", [b"\xdc", b"\x9a", b"\xa0", b"\xff"])  # Ü in Latin-1, CP437
@pytest.mark.parametrize("verb", [b"EHLO", b"helo"])
def test_the_name_of_a_client_need_not_be_utf8(serve: Serve, verb: bytes, letter: bytes) -> None:
    server = serve()
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")
        wire.send(verb + b" M" + letter + b"LLER\r\n")
        assert wire.reply()[:3] == "250"
        assert send(wire, b"Subject: x\r\n\r\n").startswith("250 ")
    assert b"from M?LLER ([127.0.0.1])" in server.mail("ana")[0]


def test_a_second_mail_hears_that_a_transaction_is_under_way(serve: Serve) -> None:
    with greeted(serve()) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert (
            wire.ask("MAIL FROM:<>")
            == "503 5.5.1 Bad sequence of commands: a transaction is under way"
        )


def test_an_empty_message_is_refused_also_in_chunks(serve: Serve) -> None:
    with greeted(serve()) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("BDAT 0 LAST") == "554 5.6.0 the message is empty"


@pytest.mark.parametrize("domains", [1, 2])
def test_a_login_without_a_domain_means_the_only_one_or_the_hosts_own(
    serve: Serve, domains: int
) -> None:
    users = {"here.example": {"ana": "secret"}}
    if domains == 2:
        users = {HOST: {"ana": "secret"}, "there.example": {"ana": "other"}}
    server = serve(users=users)
    with server.connect("submission over TLS") as wire:
        wire.start_tls(trusting())
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("AUTH PLAIN AGFuYQBzZWNyZXQ=").startswith("235 ")
    domain = "here.example" if domains == 1 else HOST
    assert f"user=ana@{domain}" in server.mail_log


def test_an_alias_that_leads_to_nobody_is_refused_and_of_some_the_rest_gets_it(
    serve: Serve,
) -> None:
    server = serve(aliases={"here.example": "sales: gone\nteam: gone, ana\n"})
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<sales@here.example>").startswith("550 5.1.1 ")
        assert wire.ask("RCPT TO:<x@localhost>").startswith("550 5.1.1 ")
        assert wire.ask("RSET").startswith("250 ")
        reply = send(wire, b"Subject: x\r\n\r\n", "team@here.example")
        assert reply.startswith("250 ")
    assert len(server.mail("ana")) == 1
    for name in ("sales", "team"):
        text = f"{name}@here.example leads to gone@here.example, who is no user here"
        assert f'event=warning source=aliases text="{text}"' in server.log
