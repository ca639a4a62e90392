# SPDX-License-Identifier: Apache-2.0
"""Room HOOKS: the operator's programs, as the server runs them, and the sample of one."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import (
    MEGABYTE,
    FakeClock,
    FakeCourier,
    RunningClock,
    Serve,
    Server,
    Wire,
    Zone,
    greeted,
    logged_in,
    rcpt,
    record,
    run,
    turns,
    wait_for,
)

import chasquid

SAMPLE = Path(__file__).resolve().parent.parent / "sample-config" / "hooks" / "post-data"
EVE = "eva@there.example"
HERE = "here.example"


def program(directory: Path, name: str, text: str) -> Path:
    """Write a shell script that may be run."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def post_data(server: Server, text: str) -> Path:
    return program(server.config_dir / "hooks", "post-data", text)


def alias_resolve(server: Server, text: str) -> Path:
    return program(server.config_dir / "hooks", "alias-resolve", text)


def transfer(
    wire: Wire,
    data: bytes = b"Subject: x\r\n\r\nhello\r\n",
    sender: str = EVE,
    recipients: Sequence[str] = ("ana@here.example",),
) -> str:
    """Send a message, transparent already; return the last reply."""
    assert wire.ask(f"MAIL FROM:<{sender}>").startswith("250 ")
    for recipient in recipients:
        assert wire.ask(f"RCPT TO:<{recipient}>").startswith("250 ")
    assert wire.ask("DATA").startswith("354 ")
    wire.send(data + b".\r\n")
    return wire.reply()


def send(server: Server, data: bytes = b"Subject: x\r\n\r\nhello\r\n") -> str:
    with greeted(server) as wire:
        return transfer(wire, data)


def on_top(message: bytes) -> bytes:
    """Return what was put in front of the trace fields, in a message from a Maildir."""
    head, mark, _ = message.partition(b"Authentication-Results:")
    assert mark
    assert head.startswith(b"Return-Path: ")
    return head.split(b"\n", 2)[2]


# --- post-data: what it is told ---


def test_the_hook_reads_the_message_with_our_trace_on_top(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    seen = tmp_path / "seen"
    post_data(server, f"cat > {seen}")
    data = b"Subject: x\r\nTo: y\r\n\r\n..dots\r\n\r\n"
    assert send(server, data).startswith("250 ")
    (stored,) = server.mail("ana")
    message = seen.read_bytes()
    assert message.startswith(b"Authentication-Results: ")
    assert message.endswith(data.replace(b"..", b"."))
    assert email.message_from_bytes(message).keys() == [
        *["Authentication-Results", "Received-SPF", "Received", "Subject", "To"]
    ]
    assert stored.endswith(message.replace(b"\r\n", b"\n"))
    assert b"\n" not in message.replace(b"\r\n", b"")


def environment(path: Path) -> dict[str, str]:
    pairs = path.read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


OF_THE_SHELL = {"_", "SHLVL", "OLDPWD"}


def test_the_hook_is_told_of_a_stranger(serve: Serve, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("USER", "mail"), ("SHELL", "/bin/sh"), ("A_SECRET", "x")):
        monkeypatch.setenv(name, value)
    zone = Zone({("there.example", "TXT"): ["v=spf1 ip4:127.0.0.1 -all"]})
    server = serve(ask=zone.ask, aliases={"here.example": "all: ana, ben\n"})
    post_data(server, f"env -0 > {tmp_path}/env")
    with greeted(server, hello="a_b!(c)$d[1:2].é-x".replace("(", "").replace(")", "")) as wire:
        recipients = ["all@here.example", "Ana+x@Here.Example"]
        assert transfer(wire, recipients=recipients).startswith("250 ")
    told = environment(tmp_path / "env")
    assert {name: told[name] for name in told.keys() - OF_THE_SHELL - {"LANG"}} == {
        "USER": "mail",
        "SHELL": "/bin/sh",
        "PATH": os.environ["PATH"],
        "PWD": str(server.config_dir),
        "REMOTE_ADDR": "127.0.0.1",
        "EHLO_DOMAIN": "abcd[1:2].-x",
        "EHLO_DOMAIN_RAW": "a_b!c$d[1:2].é-x",
        "MAIL_FROM": EVE,
        "RCPT_TO": "all@here.example Ana+x@here.example",
        "AUTH_AS": "",
        "ON_TLS": "0",
        "FROM_LOCAL_DOMAIN": "0",
        "SPF_PASS": "1",
        "SPF_RESULT": "pass",
        "DKIM_RESULTS": "",
        "DMARC_RESULT": "none",
    }


def test_the_hook_is_told_of_a_user(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    post_data(server, f"env -0 > {tmp_path}/env")
    with logged_in(server) as wire:
        reply = transfer(wire, sender="ana@here.example", recipients=["ben@here.example"])
        assert reply.startswith("250 ")
    told = environment(tmp_path / "env")
    expected = {
        "AUTH_AS": "ana@here.example",
        "ON_TLS": "1",
        "FROM_LOCAL_DOMAIN": "1",
        "SPF_PASS": "0",
        "EHLO_DOMAIN": "client.example",
    }
    assert {name: told[name] for name in expected} == expected


def test_the_hook_is_told_of_a_failed_check(serve: Serve, tmp_path: Path) -> None:
    zone = Zone(
        {
            ("there.example", "TXT"): ["v=spf1 ~all"],
            ("_dmarc.there.example", "TXT"): ["v=DMARC1; p=none"],
        }
    )
    server = serve(ask=zone.ask)
    post_data(server, f"env -0 > {tmp_path}/env")
    signature = (
        b"DKIM-Signature: v=1; a=rsa-sha256; d=there.example; s=gone; h=from; bh=eA==; b=eA==\r\n"
    )
    header = b"From: eva@there.example\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\n\r\n"
    assert send(server, signature + header).startswith("250 ")
    told = environment(tmp_path / "env")
    assert told["SPF_RESULT"] == "softfail"
    assert told["SPF_PASS"] == "0"
    assert told["DMARC_RESULT"] == "fail"
    assert told["DKIM_RESULTS"] not in ("", "pass")


def test_the_null_sender_is_told_as_nothing(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    post_data(server, f"env -0 > {tmp_path}/env")
    with greeted(server) as wire:
        assert transfer(wire, sender="").startswith("250 ")
    told = environment(tmp_path / "env")
    assert told["MAIL_FROM"] == ""
    assert told["FROM_LOCAL_DOMAIN"] == "0"


# --- post-data: what it answers ---


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("exit 20", "554 5.7.1 refused by a filter"),
        ("echo no; exit 20", "554 5.7.1 no"),
        ("echo no >&2; exit 20", "554 5.7.1 no"),
        ("echo first; echo last; echo; exit 20", "554 5.7.1 last"),
        ("cat > /dev/null; echo 'no  way '; exit 20", "554 5.7.1 no  way"),
        ("exit 1", "451 4.3.0 post-data failed"),
        ("echo not now; exit 1", "451 4.3.0 not now"),
        ("echo not now; exit 75", "451 4.3.0 not now"),
        ("echo not now; exit 21", "451 4.3.0 not now"),
        ("echo not now; exit 255", "451 4.3.0 not now"),
        ("echo dying; kill -9 $$", "451 4.3.0 dying"),
        ("kill -TERM $$", "451 4.3.0 post-data failed"),
        ("printf 'a\\001b\\033[31mc\\r\\n'; exit 20", "554 5.7.1 a b [31mc"),
        ("printf 'one\\rtwo'; exit 20", "554 5.7.1 one two"),
        ("printf '\\377\\303\\251'; exit 20", "554 5.7.1 \ufffdé"),
        ("printf 'x%.0s' $(seq 2000); exit 20", "554 5.7.1 " + "x" * 199 + "…"),
        ("printf 'a\\n250 2.0.0 b\\r\\n\\r\\n'; exit 20", "554 5.7.1 250 2.0.0 b"),
    ],
)
def test_an_exit_status_becomes_a_reply_with_the_last_line(
    serve: Serve, text: str, reply: str
) -> None:
    server = serve()
    hook = post_data(server, text)
    with greeted(server) as wire:
        assert transfer(wire) == reply
        hook.unlink()
        assert transfer(wire).startswith("250 "), "nothing is left of the first message"
    assert len(server.mail("ana")) == 1


def test_a_refusal_is_logged_and_counted_and_leaves_nothing(serve: Serve) -> None:
    server = serve()
    post_data(server, "echo 'too much spam'; exit 20")
    assert send(server).startswith("554 ")
    post_data(server, "echo 'the scanner is down'; exit 3")
    assert send(server).startswith("451 ")
    assert "code=554 status=5.7.1 from=<eva@there.example> to=<ana@here.example>" in server.mail_log
    assert "post-data failed, exit status 3: the scanner is down" in server.log
    assert server.daemon.log.counters["post_data", "20"] == 1
    assert server.daemon.log.counters["post_data", "3"] == 1
    assert not server.queued()


def test_a_client_is_refused_again_after_bdat(serve: Serve) -> None:
    server = serve()
    post_data(server, "echo no; exit 20")
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        wire.send(b"BDAT 4 LAST\r\nA: b")
        assert wire.reply() == "554 5.7.1 no"
        assert wire.ask("MAIL FROM:<>").startswith("250 ")


@pytest.mark.parametrize(
    ("printed", "fields"),
    [
        ("", b""),
        ("\\n\\n", b""),
        ("X-Spam: no", b"X-Spam: no\n"),
        ("X-Spam: no\\n", b"X-Spam: no\n"),
        ("X-A: b\\r\\nX-C: d\\r\\n", b"X-A: b\nX-C: d\n"),
        ("X-A: b\\nX-C: d\\r\\n\\r\\n", b"X-A: b\nX-C: d\n"),
        ("\\nX-A: b\\n", b"X-A: b\n"),
        ("X-A: b\\n\\tc\\n d\\nX-E:\\n", b"X-A: b\n\tc\n d\nX-E:\n"),
    ],
)
def test_what_a_hook_prints_becomes_header_fields(
    serve: Serve, printed: str, fields: bytes
) -> None:
    server = serve()
    post_data(server, f"cat > /dev/null; printf '{printed}'; echo ignored >&2")
    assert send(server).startswith("250 ")
    (message,) = server.mail("ana")
    assert on_top(message) == fields
    assert message.endswith(b"\nSubject: x\n\nhello\n")
    assert "prints what is no header" not in server.log


@pytest.mark.parametrize(
    "printed",
    [
        "this is fine",
        "X-A: b\\n\\nX-C: d\\n",
        "X-A: b\\r\\n\\r\\na body\\r\\n",
        " X-A: b\\n",
        "X-A: b\\nno field\\n",
        "X-A: b\\rX-C: d\\n",
        "X-A: b\\r\\r\\nX-C: d\\n",
        "X-A: \\000\\n",
        "X A: b\\n",
        "\\303\\251: b\\n",
        ": b\\n",
    ],
)
def test_what_is_no_header_is_left_out_and_logged(serve: Serve, printed: str) -> None:
    server = serve()
    post_data(server, f"printf '{printed}'")
    assert send(server).startswith("250 ")
    (message,) = server.mail("ana")
    assert on_top(message) == b""
    assert message.endswith(b"\nSubject: x\n\nhello\n")
    assert "post-data prints what is no header, left out" in server.log


def test_fields_go_above_the_signature_and_the_trace_of_a_user(serve: Serve) -> None:
    server = serve()
    post_data(server, "echo X-Scanned: yes")
    with logged_in(server) as wire:
        reply = transfer(wire, sender="ana@here.example", recipients=["ben@here.example"])
        assert reply.startswith("250 ")
    names = email.message_from_bytes(server.mail("ben")[0]).keys()
    assert names[2:4] == ["X-Scanned", "Received"]


@pytest.mark.parametrize(
    ("printed", "is_junk"),
    [
        ("X-Spam-Flag: YES", True),
        ("X-Score: 9\\nx-spam-flag:yes\\n", True),
        ("X-Spam-Flag: NO", False),
        ("X-Spam-Flag: YES, perhaps", False),
        ("X-Spam: YES", False),
        ("X-Spam-Flag: YES\\n\\nnonsense", False),
    ],
)
def test_what_the_hook_calls_spam_goes_into_its_own_folder(
    serve: Serve, printed: str, is_junk: bool
) -> None:
    server = serve()
    post_data(server, f"printf '{printed}'")
    assert send(server).startswith("250 ")
    assert len(server.junk()) == is_junk
    assert len(server.mail("ana")) == (not is_junk)


def test_what_the_sender_calls_spam_does_not(serve: Serve) -> None:
    server = serve()
    post_data(server, "echo X-Spam-Flag: NO")
    assert send(server, b"X-Spam-Flag: YES\r\n\r\n").startswith("250 ")
    assert len(server.mail("ana")) == 1


# --- post-data: whether it is run at all ---


def test_a_hook_that_may_not_be_run_is_ignored(serve: Serve) -> None:
    server = serve()
    path = post_data(server, "exit 20")
    path.chmod(0o644)
    assert send(server).startswith("250 ")
    path.chmod(0o755)
    assert send(server).startswith("554 ")
    path.unlink()
    assert send(server).startswith("250 ")
    path.mkdir()
    assert send(server).startswith("250 ")


def test_a_hook_whose_interpreter_is_missing_is_a_failure_for_now(serve: Serve) -> None:
    server = serve()
    post_data(server, "").write_text("#!/nowhere/sh\n")
    assert send(server) == "451 4.3.0 post-data cannot be run"
    assert "post-data cannot be run: No such file or directory" in server.log
    assert not server.queued()


def test_a_hook_may_be_a_link_and_stand_anywhere(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    target = program(tmp_path / "elsewhere", "filter", "pwd; exit 20")
    (server.config_dir / "hooks").mkdir()
    (server.config_dir / "hooks" / "post-data").symlink_to(target)
    assert send(server) == f"554 5.7.1 {server.config_dir}"


# --- post-data: large, slow, many ---


def large(octets: int) -> bytes:
    return b"Subject: x\r\n\r\n" + b"0123456789abcde\r\n" * (octets // 17)


@pytest.mark.parametrize("octets", [60 * 1024, 64 * 1024, 70 * 1024, 3 * MEGABYTE])
def test_a_large_message_is_shown_whole(serve: Serve, tmp_path: Path, octets: int) -> None:
    server = serve()
    post_data(server, f"sleep 0.05; cat > {tmp_path}/seen; echo X-Size: $(wc -c < {tmp_path}/seen)")
    data = large(octets)
    assert send(server, data).startswith("250 ")
    (message,) = server.mail("ana")
    seen = (tmp_path / "seen").read_bytes()
    assert seen.endswith(b"\r\n" + data)
    assert on_top(message) == b"X-Size: %d\n" % len(seen)


@pytest.mark.parametrize("text", ["exit 0", "exec < /dev/null; sleep 0.1", "head -c 10 >/dev/null"])
def test_a_hook_need_not_read_its_input(serve: Serve, text: str) -> None:
    server = serve()
    post_data(server, text)
    assert send(server, large(MEGABYTE)).startswith("250 ")
    assert len(server.mail("ana")) == 1


def test_a_hook_may_print_while_it_reads(serve: Serve) -> None:
    server = serve()
    post_data(server, "cat; cat >&2; exit 20")
    assert send(server, large(MEGABYTE)).startswith("554 5.7.1 ")


@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize("status", [0, 20])
def test_a_hook_that_prints_megabytes_harms_nobody(serve: Serve, stream: int, status: int) -> None:
    server = serve()
    post_data(server, f"head -c 5000000 /dev/zero | tr '\\0' x >&{stream}; exit {status}")
    reply = send(server)
    if status:
        assert reply == "554 5.7.1 " + "x" * 199 + "…"
    else:
        assert reply.startswith("250 ")
        assert on_top(server.mail("ana")[0]) == b""


def test_fields_come_whole_or_not_at_all(serve: Serve) -> None:
    server = serve()
    post_data(server, f"seq -f 'X-Field: {'x' * 85} %04.0f' 1 3000")
    assert send(server).startswith("250 ")
    fields = on_top(server.mail("ana")[0]).splitlines()
    assert len(fields) in (0, 3000)


async def started(loop: Any, path: Path) -> None:
    """Wait until a hook has written a line to `path`; the clock may stand."""
    while not (path.exists() and path.read_bytes().endswith(b"\n")):
        time.sleep(0.001)
        await loop.turn()


def with_hooks(
    tmp_path: Path, use: Callable[[Any, chasquid.Hooks, FakeClock], Coroutine[Any, Any, Any]]
) -> str:
    """Use the hooks of `tmp_path`, with a clock that stands; return the log."""
    clock = FakeClock()
    log = record(tmp_path)

    async def main(loop: Any) -> None:
        hooks = chasquid.Hooks(chasquid.Programs(loop), log, str(tmp_path))
        await use(loop, hooks, clock)

    run(main, clock)
    return (tmp_path / "server.log").read_text()


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_hook_has_a_minute_and_is_then_killed_with_its_children(tmp_path: Path) -> None:
    text = f"sleep 1000 & echo $! > {tmp_path}/child; echo started; wait"
    program(tmp_path / "hooks", "post-data", text)

    async def use(loop: Any, hooks: chasquid.Hooks, clock: FakeClock) -> None:
        task = loop.spawn(hooks.post_data({}, [b"x"]), "hook")
        await started(loop, tmp_path / "child")
        clock.advance(59.9)
        await turns(loop)
        assert not task.done, "it has not had its minute yet"
        clock.advance(0.2)
        with pytest.raises(chasquid.TemporaryFailure, match="post-data took too long"):
            await task.join()

    log = with_hooks(tmp_path, use)
    assert "hooks/post-data took more than 60s" in log
    child = int((tmp_path / "child").read_text())
    wait_for(lambda: not is_alive(child), "the child to be killed")


def test_a_child_that_goes_on_in_the_background_holds_up_nobody(serve: Serve) -> None:
    server = serve()
    post_data(server, "sleep 50 & echo X-A: b")
    began = time.monotonic()
    assert send(server).startswith("250 ")
    assert time.monotonic() - began < 40
    assert on_top(server.mail("ana")[0]) == b"X-A: b\n"


def test_twenty_messages_at_once_do_not_wait_for_each_other(serve: Serve) -> None:
    server = serve()
    here = server.directory / "here"
    here.mkdir()
    post_data(  # each waits for two others
        server,
        "subject=$(sed -n 's/^Subject: \\([0-9]*\\).*/\\1/p')\n"
        f"touch {here}/$subject\n"
        f"until [ $(ls {here} | wc -l) -ge 3 ]; do sleep 0.02; done\n"
        'echo "X-Number: $subject"\n'
        '[ $((subject % 5)) -ne 0 ] || { echo "no $subject"; exit 20; }',
    )
    wires = [greeted(server) for _ in range(20)]
    for number, wire in enumerate(wires):
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(b"Subject: %d\r\n\r\n" % number + b"x" * 70_000 + b"\r\n.\r\n")
    with greeted(server) as other:
        assert other.ask("NOOP").startswith("250 ")
    for number, wire in enumerate(wires):
        expected = "250 2.0.0 " if number % 5 else f"554 5.7.1 no {number}"
        assert wire.reply().startswith(expected)
        wire.close()
    found = [email.message_from_bytes(letter) for letter in server.mail("ana")]
    assert len(found) == 16
    assert all(each["X-Number"] == each["Subject"] for each in found)


def test_a_server_that_stops_does_not_leave_a_hook_behind(serve: Serve, tmp_path: Path) -> None:
    server = serve(clock=(clock := RunningClock()))
    post_data(
        server, f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 99"
    )
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(b"A: b\r\n\r\n.\r\n")
        wait_for(lambda: (tmp_path / "pid").exists(), "the hook to start")
        server.daemon.stop()
        wait_for(lambda: "stopping" in server.log, "the server to begin to stop")
        while server.is_running:
            clock.advance(3)
            server.daemon.loop.post(lambda: None)
            time.sleep(0.02)
        server.join()
        assert not wire.reply().startswith("250 ")
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert not server.queued()


# --- alias-resolve ---


def test_the_hook_is_asked_for_each_address_as_it_came(serve: Serve, tmp_path: Path) -> None:
    server = serve(
        aliases={"here.example": "team: ana, eva@far.example\n"},
        remote=FakeCourier(chasquid.State.SENT),
    )
    alias_resolve(server, f'[ $# = 1 ] && echo "$1" >> {tmp_path}/asked')
    assert rcpt(server, "Team+x@Here.Example").startswith("250 ")
    assert (tmp_path / "asked").read_text().splitlines() == [
        *["Team+x@here.example", "team@here.example", "ana@here.example"]
    ]


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("t.eam@here.example", ["t.eam@", "ana@"]),  # the alias of the file is enough
        ("told+x@here.example", ["told+x@", "ben@"]),
        ("to.ld+y@here.example", ["to.ld+y@", "told@", "ben@"]),
        ("ben+x@here.example", ["ben+x@", "ben@"]),
    ],
)
def test_the_hook_is_not_asked_again_about_what_is_known(
    serve: Serve, tmp_path: Path, address: str, asked: list[str]
) -> None:
    server = serve(aliases={"here.example": "team: ana\n"})
    alias_resolve(
        server,
        f'echo "$1" >> {tmp_path}/asked\ncase $1 in told+x@*|told@*) echo ben ;; esac',
    )
    assert rcpt(server, address).startswith("250 ")
    lines = (tmp_path / "asked").read_text().splitlines()
    assert lines == [f"{name}here.example" for name in asked]


def test_the_hook_gets_the_environment_of_the_server(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE", "postgres://db")
    server = serve()
    alias_resolve(server, f'echo "$DATABASE" > {tmp_path}/seen')
    assert rcpt(server, "ana@here.example").startswith("250 ")
    assert (tmp_path / "seen").read_text() == "postgres://db\n"


def test_the_hook_is_asked_for_the_catch_all_last(serve: Serve, tmp_path: Path) -> None:
    server = serve(users={"here.example": {"ana": "secret"}})
    asked = tmp_path / "asked"
    alias_resolve(server, f'echo "$1" >> {asked}; [ "$1" != "*@here.example" ] || echo ana')
    assert rcpt(server, "no.body+x@here.example").startswith("250 ")
    assert asked.read_text().splitlines() == [
        "no.body+x@here.example", "nobody@here.example", "*@here.example", "ana@here.example"
    ]  # fmt: skip
    asked.unlink()
    assert rcpt(server, "ana@here.example").startswith("250 ")
    assert asked.read_text().splitlines() == ["ana@here.example"]


def test_the_hook_decides_where_mail_goes(serve: Serve, tmp_path: Path) -> None:
    courier = FakeCourier(chasquid.State.SENT)
    server = serve(remote=courier)
    alias_resolve(
        server,
        'case "$1" in\n'
        "virtual@*) echo ana, ben@here.example,eva@far.example ;;\n"
        "star@*) echo '*@far.example' ;;\n"
        "routed@*) echo eva@far.example via mx1.far.example/192.0.2.1:26 ;;\n"
        f"robot@*) echo '| /bin/sh -c \"cat > {tmp_path}/piped\"' ;;\n"
        "esac",
    )
    with greeted(server) as wire:
        names = ("virtual", "star", "routed", "robot")
        recipients = [f"{name}@here.example" for name in names]
        assert transfer(wire, recipients=recipients).startswith("250 ")
    assert len(server.mail("ana")) == len(server.mail("ben")) == 1
    far = chasquid.Destination("address", "eva@far.example")
    routed = far._replace(via=("mx1.far.example", "192.0.2.1:26"))
    star = far._replace(value="star@far.example")
    assert sorted(courier.destinations) == sorted([far, routed, star])
    assert (tmp_path / "piped").read_bytes().endswith(b"hello\r\n")


def test_the_hook_adds_to_what_the_file_says_and_wins_over_users(serve: Serve) -> None:
    server = serve(aliases={"here.example": "team: ana\n*: ana\n"})
    alias_resolve(
        server,
        'case "$1" in team@*) echo ben ;; ana@*) echo ana, ben ;; ben+only@*) echo ana ;; esac',
    )

    def resolved(address: str) -> set[str]:
        done: list[Any] = []
        loop = server.daemon.loop

        async def ask() -> None:
            done.append([each.value for each in await server.daemon.resolve(address)])

        loop.post(lambda: loop.spawn(ask(), "resolve"))
        return set(wait_for(lambda: done, "an answer")[0])

    both = {"ana@here.example", "ben@here.example"}
    assert resolved("team@here.example") == both
    assert resolved("ana@here.example") == both
    assert resolved("ben@here.example") == {"ben@here.example"}
    assert resolved("ben+only@here.example") == both
    assert resolved("anybody@here.example") == both, "by the catch-all, to ana"


def test_a_hook_that_prints_nothing_changes_nothing(serve: Serve) -> None:
    server = serve(aliases={"here.example": "team: ana\n"})
    alias_resolve(server, "echo; echo '  '; echo 'for the operator' >&2")
    assert rcpt(server, "team@here.example").startswith("250 ")
    assert rcpt(server, "ben@here.example").startswith("250 ")
    assert rcpt(server, "nobody@here.example").startswith("550 5.1.1 ")


def test_the_hook_is_not_asked_of_other_peoples_domains(serve: Serve, tmp_path: Path) -> None:
    server = serve(remote=FakeCourier(chasquid.State.SENT))
    alias_resolve(server, f"touch {tmp_path}/asked; exit 1")
    assert rcpt(server, "eva@far.example").startswith("550 5.7.1 ")
    with logged_in(server) as wire:
        assert wire.ask("MAIL FROM:<ana@here.example>").startswith("250 ")
        assert wire.ask("RCPT TO:<eva@far.example>").startswith("250 ")
    assert not (tmp_path / "asked").exists()


def test_a_hook_that_may_not_be_run_is_not_asked(serve: Serve) -> None:
    server = serve()
    alias_resolve(server, "exit 1").chmod(0o600)
    assert rcpt(server, "ana@here.example").startswith("250 ")


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("exit 1", "451 4.3.0 alias-resolve failed"),
        ("exit 20", "451 4.3.0 alias-resolve failed"),
        ("echo ben; echo the database is down >&2; exit 1", "451 4.3.0 the database is down"),
        ("kill -9 $$", "451 4.3.0 alias-resolve failed"),
        ("echo 'ana ben'", "451 4.3.5 the aliases of this address cannot be told"),
        ("echo ana; echo ben", "451 4.3.5 "),
        ("echo ,", "451 4.3.5 "),
        ("echo '|'", "451 4.3.5 "),
        ("echo '<ana@here.example>'", "451 4.3.5 "),
        ("echo ana@", "451 4.3.5 "),
        ("echo @here.example", "451 4.3.5 "),
        ("echo ana via", "451 4.3.5 "),
        ("echo ana via host:port", "451 4.3.5 "),
        ("echo ana@a..b", "451 4.3.5 "),
        ("seq 100000", "451 4.3.5 "),
    ],
)
def test_a_hook_that_fails_or_prints_nonsense_is_for_later(
    serve: Serve, text: str, reply: str
) -> None:
    server = serve()
    hook = alias_resolve(server, text)
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith(reply)
        hook.unlink()
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
    assert "event=error source=hooks " in server.log


@pytest.mark.parametrize(
    "printed",
    ["a\\001b", "a\\001b@far.example", "\\377@far.example", "| /bin/cat\\neva@far.example"],
)
def test_a_hook_that_prints_control_characters_is_for_later(serve: Serve, printed: str) -> None:
    server = serve(remote=FakeCourier(chasquid.State.SENT))
    alias_resolve(server, f"case \"$1\" in ana@*) printf '{printed}' ;; esac")
    assert rcpt(server, "ana@here.example").startswith("451 4.3.5 ")


def test_a_hook_whose_interpreter_is_missing_is_for_later(serve: Serve) -> None:
    server = serve()
    alias_resolve(server, "").write_text("#!/nowhere/sh\n")
    assert rcpt(server, "ana@here.example") == "451 4.3.0 alias-resolve cannot be run"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ('case "$1" in a@*) echo b ;; b@*) echo a ;; esac', "451 4.3.5 "),
        ('echo "x$1"', "451 4.3.5 "),
        ('echo "$1"', "550 5.1.1 "),  # the mailbox of a user who is not there
        ('case "$1" in a@*) echo b, b+x ;; *) echo ben ;; esac', "250 "),
    ],
)
def test_a_hook_that_leads_in_circles_is_found_out(serve: Serve, text: str, reply: str) -> None:
    server = serve()
    alias_resolve(server, text)
    assert rcpt(server, "a@here.example").startswith(reply)


def test_the_hook_and_the_file_lead_in_circles_together(serve: Serve) -> None:
    server = serve(aliases={"here.example": "a: b\n"})
    alias_resolve(server, 'case "$1" in b@*) echo a ;; esac')
    assert rcpt(server, "a@here.example").startswith("451 4.3.5 ")


def test_an_alias_hook_has_five_seconds(tmp_path: Path) -> None:
    program(tmp_path / "hooks", "alias-resolve", f"echo up > {tmp_path}/up; sleep 1000")

    async def use(loop: Any, hooks: chasquid.Hooks, clock: FakeClock) -> None:
        task = loop.spawn(hooks.alias_destinations("a@b.example"), "hook")
        await started(loop, tmp_path / "up")
        clock.advance(4.9)
        await turns(loop)
        assert not task.done
        clock.advance(0.2)
        with pytest.raises(chasquid.TemporaryFailure, match="alias-resolve took too long"):
            await task.join()

    assert "took more than 5s" in with_hooks(tmp_path, use)


def test_an_address_is_one_argument_whatever_is_in_it(tmp_path: Path) -> None:
    text = f'printf "%s|" "$#" "$1" > {tmp_path}/asked; printf %s "$PWD" >> {tmp_path}/asked'
    program(tmp_path / "hooks", "alias-resolve", text)

    async def use(loop: Any, hooks: chasquid.Hooks, clock: FakeClock) -> None:
        for address in ("a b;$(id)'\"`@b.example", "-n@b.example", "é@ñ.example", "*@b.example"):
            assert await hooks.alias_destinations(address) == ()
            assert (tmp_path / "asked").read_text() == f"1|{address}|{tmp_path}"

    with_hooks(tmp_path, use)


# --- the sample of post-data ---

RSPAMC = """\
printf '%s\\n' "$@" > {place}/arguments
cat > {place}/message
printf 'Results for file: stdin (0.1 seconds)\\n[Metric: default]\\nAction: {action}\\n'
printf 'Spam: false\\nScore: 4.20 / 15.00\\nSymbol: X (1.00)\\n'
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory to be all of PATH, with nothing in it that looks at mail."""
    directory = tmp_path / "tools"
    directory.mkdir()
    for name in ("sh", "cat", "mktemp", "rm", "sed", "head", "printf"):
        found = shutil.which(name)
        assert found
        (directory / name).symlink_to(found)
    return directory


def run_sample(tools: Path, message: bytes = b"A: b\r\n\r\nx\r\n", **told: str) -> tuple[int, str]:
    """Run the sample; return its exit status and what it printed."""
    scratch = tools.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    told = {"REMOTE_ADDR": "192.0.2.7", "MAIL_FROM": EVE, "RCPT_TO": "ana@here.example", **told}
    done = subprocess.run(
        [str(SAMPLE)],
        input=message,
        env={"PATH": str(tools), "TMPDIR": str(scratch), "EHLO_DOMAIN": "client.example", **told},
        cwd=tools.parent,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert not list(scratch.iterdir()), "a copy of the message is left behind"
    assert not done.stderr
    return done.returncode, done.stdout.decode()


def test_the_sample_accepts_all_where_there_is_nothing_to_ask(tools: Path) -> None:
    assert run_sample(tools) == (0, "")


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (0, (0, "")),
        (1, (20, "the message holds a virus\n")),
        (2, (0, "X-Virus-Status: not checked\n")),
    ],
)
@pytest.mark.parametrize("user", ["", "ana@here.example"])
def test_the_sample_asks_clamdscan_about_everybody(
    tools: Path, status: int, result: tuple[int, str], user: str
) -> None:
    text = f'for last; do :; done; cat "$last" > {tools.parent}/scanned; exit {status}'
    program(tools, "clamdscan", text)
    assert run_sample(tools, b"A: b\r\n\r\nx\r\n", AUTH_AS=user) == result
    assert (tools.parent / "scanned").read_bytes() == b"A: b\r\n\r\nx\r\n"


@pytest.mark.parametrize(
    ("action", "result"),
    [
        ("no action", (0, "X-Spam-Score: 4.20 / 15.00\n")),
        ("add header", (0, "X-Spam-Score: 4.20 / 15.00\nX-Spam-Flag: YES\n")),
        ("reject", (20, "the message looks like spam\n")),
        ("greylist", (75, "try again later\n")),
        ("soft reject", (75, "try again later\n")),
    ],
)
def test_the_sample_does_as_rspamd_says(tools: Path, action: str, result: tuple[int, str]) -> None:
    program(tools, "rspamc", RSPAMC.format(place=tools.parent, action=action))
    program(tools, "spamc", "echo never; exit 1")
    assert run_sample(tools, RCPT_TO="ana@here.example ben@here.example") == result
    assert (tools.parent / "arguments").read_text().split("\n") == [
        *["--ip", "192.0.2.7", "--helo", "client.example", "--from", EVE],
        *["--rcpt", "ana@here.example", "--rcpt", "ben@here.example", "symbols", ""],
    ]
    assert (tools.parent / "message").read_bytes() == b"A: b\r\n\r\nx\r\n"


def test_the_sample_accepts_what_rspamd_cannot_judge(tools: Path) -> None:
    program(tools, "rspamc", "cat > /dev/null; exit 1")
    assert run_sample(tools) == (0, "")


def test_the_sample_hands_on_recipients_as_they_are(tools: Path) -> None:
    program(tools, "rspamc", RSPAMC.format(place=tools.parent, action="no action"))
    (tools.parent / "ana+secret@here.example").touch()
    assert run_sample(tools, RCPT_TO="ana+*@here.example")[0] == 0
    assert "\nana+*@here.example\n" in (tools.parent / "arguments").read_text()


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("echo 1.0/5.0; exit 0", (0, "X-Spam-Score: 1.0/5.0\n")),
        ("echo 9.9/5.0; exit 1", (0, "X-Spam-Score: 9.9/5.0\nX-Spam-Flag: YES\n")),
        ("echo 0/0; exit 74", (0, "")),
    ],
)
def test_the_sample_asks_spamassassin_where_there_is_no_rspamd(
    tools: Path, text: str, result: tuple[int, str]
) -> None:
    program(tools, "spamc", f"cat > {tools.parent}/message; {text}")
    assert run_sample(tools) == result
    assert (tools.parent / "message").read_bytes() == b"A: b\r\n\r\nx\r\n"


def test_the_sample_does_not_ask_our_users_whether_they_write_spam(tools: Path) -> None:
    for name in ("rspamc", "spamc"):
        program(tools, name, f"touch {tools.parent}/asked; exit 1")
    assert run_sample(tools, AUTH_AS="ana@here.example") == (0, "")
    assert not (tools.parent / "asked").exists()


def test_the_sample_works_as_the_hook_of_a_server(serve: Serve, tools: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tools))
    server = serve()
    (server.config_dir / "hooks").mkdir()
    shutil.copy(SAMPLE, server.config_dir / "hooks" / "post-data")
    rspamc = RSPAMC.format(place=tools.parent, action="add header")
    program(tools, "rspamc", rspamc)
    assert send(server).startswith("250 ")
    (message,) = server.junk()
    assert on_top(message) == b"X-Spam-Score: 4.20 / 15.00\nX-Spam-Flag: YES\n"
    program(tools, "rspamc", rspamc.replace("add header", "reject"))
    assert send(server) == "554 5.7.1 the message looks like spam"
    program(tools, "clamdscan", "exit 1")
    assert send(server) == "554 5.7.1 the message holds a virus"


# --- what an expansion asks ---


def test_a_long_list_is_expanded_a_few_times_whoever_its_members_are() -> None:
    members = [f"m{number}" for number in range(300)]
    table = chasquid.parse_aliases(f"all: {', '.join(members)}".encode(), "aliases", HERE)
    aliases = chasquid.Aliases({HERE: table}, lambda user, domain: False, "+", ".")
    passes = 0

    class Counting(chasquid.Aliases):
        def expand(self, *arguments: Any) -> list[chasquid.Destination]:
            nonlocal passes
            passes += 1
            return super().expand(*arguments)

    aliases.__class__ = Counting

    async def exists(address: str) -> bool:
        return True

    async def nothing(address: str) -> tuple[chasquid.Destination, ...]:
        return ()

    async def main(loop: chasquid.Loop) -> list[chasquid.Destination]:
        return await aliases.expand_with(chasquid.ExternalLookups(nothing, exists), f"all@{HERE}")

    found = run(main)
    assert [destination.value for destination in found] == [f"{name}@{HERE}" for name in members]
    assert passes < 6


def test_an_alias_longer_than_what_is_read_is_for_later(serve: Serve) -> None:
    server = serve()
    alias_resolve(server, "seq -f 'user%.0f@far.example,' 8000; echo last@far.example")
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<ana@{HERE}>").startswith("451 4.3.5")


def test_a_report_waits_for_a_hook_that_fails_for_now(serve: Serve, tmp_path: Path) -> None:
    server = serve(aliases={HERE: "broken: | /bin/false\n"})
    down = tmp_path / "down"
    down.touch()
    text = f'case $1 in info@*) [ ! -e "{down}" ] || exit 1; echo ben;; esac'
    alias_resolve(server, text)
    with greeted(server) as wire:
        reply = transfer(
            wire, b"Subject: x\r\n\r\n", sender=f"info@{HERE}", recipients=[f"broken@{HERE}"]
        )
        assert reply.startswith("250 ")
    wait_for(lambda: "the notification must wait" in server.log, "the report to wait")
    assert len(server.queued()) == 1
    down.unlink()
    chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all")
    (report,) = server.mail("ben")
    assert b"Final-Recipient" in report
