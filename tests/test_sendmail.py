# SPDX-License-Identifier: Apache-2.0
"""Room SENDMAIL: what programs of this host write, and how it comes into the queue."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import HOST, MODULE, SECONDS, CommandLine, FakeCourier, Serve, run_command, wait_for

import chasquid

ANA, AT = "ana@here.example", "here.example"


def options(*words: str) -> chasquid.SendmailOptions:
    return chasquid.parse_sendmail_options(words)


def letter(text: str, *words: str, user: str = "root") -> chasquid.Letter:
    return chasquid.make_letter(text.encode(), options(*words), user, AT)


def status_of(text: str, *words: str) -> int:
    with pytest.raises(chasquid.NotSent) as refused:
        letter(text, *words)
    return refused.value.status


def fields(made: chasquid.Letter) -> list[str]:
    return made.message.partition(b"\r\n\r\n")[0].decode().split("\r\n")


# --- options ---


@pytest.mark.parametrize(
    ("line", "sender", "recipients"),
    [
        ("-i -FCronDaemon -B8BITMIME -oem root", None, ("root",)),  # cron of Debian
        ("-t -i -f www@here.example", "www@here.example", ()),  # PHP
        ("-i ana@here.example -f eva@there.example", "eva@there.example", ("ana@here.example",)),
        ("-oi -odb -N never -V abc -R hdrs -h 5 -r eva@there.example -- ana", "eva@there.example",
         ("ana",)),
        ("-f <> ana", "<>", ("ana",)),
        ("-bm -v -om -G -n -U ana", None, ("ana",)),
    ],
)  # fmt: skip
def test_options_of_other_programs_are_understood(line, sender, recipients):
    found = options(*line.split())
    assert (found.sender, found.recipients) == (sender, recipients)


@pytest.mark.parametrize("line", ["-i", "-oi", "-o i", "-ti"])
def test_a_dot_does_not_end_a_message_if_an_option_says_so(line):
    assert not options(*line.split()).dot_ends
    assert options("-t").dot_ends


@pytest.mark.parametrize("line", ["-bs", "-bp", "-bi", "-q", "-I", "-bd", "-Z", "-f"])
def test_what_cannot_be_done_is_wrong_usage(line):
    with pytest.raises(chasquid.NotSent) as refused:
        options(*line.split())
    assert refused.value.status == os.EX_USAGE


# --- messages ---


def test_a_message_without_a_header_gets_one():
    made = letter("http is fine\nand more\n", "ana")
    assert made.message == b"From: <root@here.example>\r\n\r\nhttp is fine\r\nand more\r\n"
    assert (made.sender, made.recipients) == ("root@here.example", (ANA,))


def test_names_in_the_header_get_the_domain():
    made = letter("From: root (Cron Daemon)\nTo: root\nCc: <ben>, eva@there.example\n\n.\n", "root")
    assert fields(made) == [
        "From: root@here.example (Cron Daemon)",
        "To: root@here.example",
        "Cc: <ben@here.example>, eva@there.example",
    ]
    assert made.message.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "field",
    [
        'To: "Doe, john, jim" <eva@there.example>',
        "To: eva@there.example (first, second, third)",
        "Cc: undisclosed-recipients:;",
        "Subject: root, toor",
    ],
)
def test_other_fields_stay_as_they_are(field):
    assert field in fields(letter(f"From: a@b\n{field}\n\nhello\n", "ana"))


def test_recipients_are_taken_from_the_header_and_bcc_is_removed():
    text = (
        "To: Ana <ana@here.example>,\n ben\nCc: team: eva@there.example, <x@y.example>;\n"
        "Bcc: z@y.example\n\nhi\n"
    )
    made = letter(text, "-t", "extra")
    assert made.recipients == (
        "extra@here.example", ANA, "ben@here.example", "eva@there.example", "x@y.example",
        "z@y.example",
    )  # fmt: skip
    assert b"z@y.example" not in made.message


def test_a_message_that_is_sent_once_more_goes_to_the_new_recipients():
    text = "To: ben@here.example\nResent-To: ana@here.example\nResent-From: x@y.example\n\nhi\n"
    assert letter(text, "-t").recipients == (ANA,)


def test_a_dot_alone_ends_the_message_unless_told_otherwise():
    text = "Subject: x\n\none\n.\ntwo\n"
    assert letter(text, "ana").message.endswith(b"one\r\n")
    assert letter(text, "-i", "ana").message.endswith(b"one\r\n.\r\ntwo\r\n")


def test_a_lone_cr_makes_no_field():
    made = letter("Subject: x\rBcc: y@there.example\n\nhello\n", "-t", "ana")
    assert fields(made)[1:] == ["Subject: x Bcc: y@there.example"]
    assert made.recipients == (ANA,)


def test_the_line_of_a_mailbox_is_no_field():
    made = letter("From eva Thu Oct  1 12:00:00 2026\nSubject: x\n\nhello\n", "ana")
    assert fields(made)[1:] == ["Subject: x"]


def test_the_full_name_stands_in_from():
    assert fields(letter("\nx\n", "-F", 'Ana "A" B.', "ana", user="ana"))[0] == (
        'From: "Ana \\"A\\" B." <ana@here.example>'
    )


@pytest.mark.parametrize(
    ("text", "words", "status"),
    [
        ("Subject: x\n\nx\n", ["-t"], os.EX_USAGE),
        ("Subject: x\n\nx\n", [], os.EX_USAGE),
        ("To: foo bar baz\n\nx\n", ["-t"], os.EX_DATAERR),
        ("To: a@b c@d\n\nx\n", ["-t"], os.EX_DATAERR),
        ("To: a@b; c@d\n\nx\n", ["-t"], os.EX_DATAERR),
        ("\nx\n", ["ana", "<>"], os.EX_USAGE),
        ("\nx\n", ["a@b>\r\nRCPT TO:<c@d"], os.EX_USAGE),
        ("a: b\n" * 1001 + "\nx\n", ["ana"], os.EX_DATAERR),
    ],
)
def test_what_is_no_letter_is_refused(text, words, status):
    assert status_of(text, *words) == status


def test_the_domain_is_that_of_the_host_if_it_is_served_else_the_first(tmp_path):
    config = chasquid.Config(str(tmp_path), hostname=HOST)
    assert chasquid.domain_of_host(config) == HOST
    (tmp_path / "domains" / AT).mkdir(parents=True)
    assert chasquid.domain_of_host(config) == AT
    (tmp_path / "domains" / HOST).mkdir()
    assert chasquid.domain_of_host(config) == HOST
    (tmp_path / "domains" / AT / "users").touch()
    assert chasquid.domain_of_host(config) == AT  # the host's own has aliases for programs alone
    (tmp_path / "domains" / HOST / "users").touch()
    assert chasquid.domain_of_host(config) == HOST


# --- into the server ---


def hand_over(server, text="Subject: hello\n\nhello\n", *words, user="root") -> str:
    connected = chasquid.connect_as_program(str(server.data_dir))
    assert connected is not None
    return chasquid.hand_over(connected, letter(text, *(words or ("ana",)), user=user))


def test_a_program_sends_without_a_login(serve: Serve):
    server = serve()
    assert hand_over(server).startswith("OK: queued as ")
    [stored] = server.mail("ana")
    assert b"Return-Path: <root@here.example>\n" in stored
    assert b" with local id " in stored
    assert b"\nDate: " in stored and b"\nMessage-ID: " in stored
    assert " port=sendmail " in server.mail_log and "spf=" not in server.mail_log


def test_a_program_of_the_owner_sends_to_anybody(serve: Serve):
    courier = FakeCourier()
    server = serve(remote=courier)
    hand_over(server, "From: x@y.example\n\nhello\n", "-f", "x@here.example", "d@dest.example")
    wait_for(lambda: courier.deliveries, "the delivery")


def test_more_recipients_than_a_transaction_takes(serve: Serve):
    server = serve(aliases={AT: "*: ana\n"})
    hand_over(server, "\nhello\n", *(f"u{number}" for number in range(150)))
    assert len(server.mail("ana")) == 2


def test_an_address_with_umlauts(serve: Serve):
    server = serve(aliases={AT: "jörg: ana\n"})
    hand_over(server, "\nhello\n", "-f", "größe@here.example", "jörg")
    assert len(server.mail("ana")) == 1


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["ana", "nobody"], os.EX_NOUSER),
        (["-f", "not an address", "ana"], os.EX_UNAVAILABLE),
    ],
)
def test_nobody_gets_what_one_recipient_does_not_get(serve: Serve, words, status):
    server = serve()
    with pytest.raises(chasquid.NotSent) as refused:
        hand_over(server, "\nhello\n", *words)
    assert refused.value.status == status
    assert server.mail("ana") == []


def test_too_large_a_message_is_refused(serve: Serve):
    server = serve(max_data_size_mb=1)
    with pytest.raises(chasquid.NotSent) as refused:
        hand_over(server, "\n" + "hello\n" * 200_000)
    assert refused.value.status == os.EX_DATAERR


def test_a_failure_for_now_can_be_tried_again(serve: Serve):
    server = serve(max_queue_items=1, remote=FakeCourier())
    hand_over(server, "\nhello\n", "dora@dest.example")
    with pytest.raises(chasquid.NotSent) as refused:
        hand_over(server)
    assert refused.value.status == os.EX_TEMPFAIL


def test_a_connection_is_closed_also_if_the_server_refuses_the_message():
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.settimeout(SECONDS)
        theirs.sendall(b"220 hello\r\n250 hello\r\n550 5.7.1 no\r\n221 bye\r\n")
        with pytest.raises(chasquid.NotSent, match="no") as refused:
            chasquid.hand_over(ours, letter("\nhello\n", "ana"))
        said = b"".join(iter(lambda: theirs.recv(4096), b""))  # until it is closed
    assert said.endswith(b"QUIT\r\n")
    assert refused.value.status == os.EX_NOPERM


def of_another_user(server) -> socket.socket:
    """Return a connection that is taken to be of a program of www-data."""
    ours, theirs = socket.socketpair()
    daemon = server.daemon
    daemon.loop.post(lambda: daemon._begin(chasquid.HOST_PORT, theirs, "127.0.0.1", "www-data"))
    return ours


def test_programs_of_other_users_send_to_our_domains_only(serve: Serve):
    server = serve()
    for recipient, status in ((ANA, 0), ("dora@dest.example", os.EX_NOPERM)):
        made = letter("\nhello\n", recipient, user="www-data")
        try:
            chasquid.hand_over(of_another_user(server), made)
            assert status == 0
        except chasquid.NotSent as refused:
            assert refused.status == status
            assert "programs of www-data" in str(refused)
    [stored] = server.mail("ana")
    assert b"Return-Path: <www-data@here.example>\n" in stored


def test_the_system_says_who_is_at_the_other_end(serve: Serve):
    raw = chasquid.connect_as_program(str(serve().data_dir))
    assert raw is not None
    with raw:
        assert chasquid.user_behind(raw) == (True, pwd.getpwuid(os.geteuid()).pw_name)


def test_a_server_that_breaks_off_is_worth_a_second_try(tmp_path: Path):
    ours, theirs = socket.socketpair()
    theirs.sendall(b"421 4.3.2 closing\r\n")
    with theirs, pytest.raises(chasquid.NotNow, match="closing"):
        chasquid.hand_over(ours, letter("\nx\n", "ana"))
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(chasquid.NotNow):
        chasquid.hand_over(ours, letter("\nx\n", "ana"))


# --- the command ---


def test_without_a_server_a_message_is_delivered_here_or_put_into_the_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = CommandLine(tmp_path, capsys)
    command.data_dir.mkdir()
    text = b"Subject: hello\n\nhello\n"
    ended = command.run("sendmail", "-i", "-f", "eva@there.example", "ana", data=text)
    assert ended == (0, "", "")
    assert command.run("sendmail", "-v", "dora@dest.example", data=text).out.startswith("OK: ")
    ended = command.run("sendmail", "nobody", data=text)
    assert (ended.status, ended.out) == (os.EX_NOUSER, "")
    assert ended.err.startswith("sendmail: nobody@here.example: ")
    listed = command.run("queue", "list").out
    assert "from <root@here.example>" in listed and listed.endswith("\n1 message\n")
    assert "0 attempts" in listed
    [stored] = command.data_dir.glob("mail/here.example/ana/new/*")  # it needs no queue
    assert stored.read_bytes().startswith(b"Return-Path: <eva@there.example>\n")


def test_without_a_data_dir_a_message_cannot_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = CommandLine(tmp_path, capsys).run("sendmail", "ana", data=b"\nhello\n")
    assert ended.status == os.EX_TEMPFAIL
    assert "there is no queue" in ended.err


def test_options_of_sendmail_are_not_those_of_other_commands(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    words = ("sendmail", "-v", "-C/dev/null", "-oi", "--", "ana")
    ended = run_command(capsys, server.config_dir, *words, data=b"\nhello\n.\nmore\n")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("OK: queued as ")
    assert server.mail("ana")[0].endswith(b"\nhello\n.\nmore\n")


def test_the_program_can_be_called_by_a_link(tmp_path: Path) -> None:
    link = tmp_path / "sendmail"
    link.symlink_to(MODULE)
    done = subprocess.run([sys.executable, link, "-bs"], capture_output=True, timeout=SECONDS)
    assert done.returncode == os.EX_USAGE
    assert done.stderr.startswith(b"sendmail: -bs: ")
