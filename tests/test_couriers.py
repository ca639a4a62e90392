# SPDX-License-Identifier: Apache-2.0
"""Rooms COURIERS, SMTP CLIENT: each courier against a directory, a program or a server in text."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    CONTENT,
    ENVELOPE,
    EVA,
    GREETING,
    HOST,
    MESSAGE,
    MX,
    SECURE,
    STARTTLS,
    FakeClock,
    Peer,
    Zone,
    address,
    delivery,
    record,
    run,
    tls_policies,
    trust,
    wait_for,
)

import chasquid
from chasquid import Delivery, Destination, Result, State


def deliver(
    make: Callable[[chasquid.Loop], chasquid.Courier],
    destinations: Sequence[Destination],
    load: Delivery | None = None,
    clock: chasquid.Clock | None = None,
) -> list[Result]:
    async def main(loop: chasquid.Loop) -> list[Result]:
        return await make(loop).deliver(load or delivery(), destinations)

    return run(main, clock=clock)


def states(results: Sequence[Result]) -> list[tuple[str, str]]:
    return [(result.state, result.status) for result in results]


# --- Maildir ---


async def somebody(user: str, domain: str) -> bool:
    return user != "nobody"


class Maildirs:
    """A courier's Maildirs below a directory; `ana` and `ben` are users, so is `..`."""

    def __init__(self, directory: Path, template: str = "%data_dir%/%to_domain%/%to_user%") -> None:
        self.directory = directory
        self.template = template
        self.host = HOST
        self.clock = FakeClock()

    def courier(self, loop: chasquid.Loop) -> chasquid.MaildirCourier:
        return chasquid.MaildirCourier(
            loop, chasquid.Disk(loop), self.template, str(self.directory), self.host,
            somebody,
        )  # fmt: skip

    def deliver(self, *addresses: str, load: Delivery | None = None) -> list[Result]:
        destinations = [address(each) for each in addresses]
        return deliver(self.courier, destinations, load, self.clock)

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.rglob("*") if path.is_file())


def test_a_maildir_has_its_three_directories_and_the_message_in_new(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    (result,) = place.deliver("ana@here.example")
    maildir = tmp_path / "here.example" / "ana"
    assert sorted(folder.name for folder in maildir.iterdir()) == ["cur", "new", "tmp"]
    (path,) = place.files()
    assert path.parent == maildir / "new"
    assert result == Result(State.SENT, "2.0.0", f"stored as {path}")


class Crowded(chasquid.Disk):
    """Counts the files that are on their way to the disk at a time."""

    under_way = most = 0

    async def create(self, temporary: str, data: bytes, path: str) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await super().create(temporary, data, path)
        self.under_way -= 1


def test_a_message_for_many_is_synced_for_sixteen_at_a_time(tmp_path: Path) -> None:
    names = [*(f"u{number}@here.example" for number in range(20)), "nobody@here.example"]

    async def use(loop: chasquid.Loop) -> None:
        disk = Crowded(loop)
        courier = chasquid.MaildirCourier(
            loop, disk, "%data_dir%/%to_user%", str(tmp_path), HOST, somebody
        )
        for _ in range(2):  # at first the directories are made, one by one
            disk.most = 0
            results = await courier.deliver(delivery(), [address(name) for name in names])
            assert [result.state for result in results] == [State.SENT] * 20 + [State.FAILED]
            for name, result in zip(names[:20], results, strict=False):
                path = Path(result.text.removeprefix("stored as "))
                assert f"Delivered-To: {name}\n" in path.read_text()
        assert disk.most == 16

    run(use)


def test_a_maildir_that_was_removed_is_made_again(tmp_path: Path) -> None:
    async def twice(loop: chasquid.Loop) -> None:
        courier = Maildirs(tmp_path).courier(loop)
        for part in ("new", "cur", "tmp", "."):
            for _ in range(2):
                (result,) = await courier.deliver(delivery(), [address("ana@here.example")])
                assert result.state == State.SENT
            shutil.rmtree(tmp_path / "here.example" / "ana" / part, ignore_errors=True)

    run(twice)


def test_lines_in_a_maildir_end_with_lf_below_return_path_and_delivered_to(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    place.deliver("ana@here.example", load=delivery(prefix=b"Received: by us\r\n\tnow\r\n"))
    assert place.files()[0].read_bytes() == (
        b"Return-Path: <eva@there.example>\nDelivered-To: ana@here.example\n"
        b"Received: by us\n\tnow\nSubject: hello\n\nIt works.\n"
    )


def test_the_size_in_the_name_is_that_of_the_file(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    stored = tmp_path / "stored"
    stored.write_bytes(MESSAGE * 9000 + b"the journal")
    message = chasquid.Message(b"A: b\r\n", str(stored), len(MESSAGE) * 9000)
    place.deliver("ana@here.example")
    place.deliver("ana@here.example", load=delivery()._replace(message=message))
    files = [path for path in place.files() if path != stored]
    assert len(files) == 2
    for path in files:
        assert path.name.endswith(f",S={path.stat().st_size}")
        assert b"the journal" not in path.read_bytes()


def test_mail_in_a_maildir_is_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        place = Maildirs(tmp_path)
        place.deliver("ana@here.example")
    finally:
        os.umask(old)
    (path,) = place.files()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in (path.parent, path.parent.parent, path.parent.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_messages_of_the_same_moment_have_different_names(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    results = place.deliver(*["ana@here.example"] * 20)
    assert [result.state for result in results] == [State.SENT] * 20
    assert len(place.files()) == 20


def test_a_name_in_a_maildir_has_no_slash_and_no_colon_from_the_host(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    place.host = "a/b:c"
    place.deliver("ana@here.example")
    assert r".a\057b\072c,S=" in place.files()[0].name


def test_who_is_no_user_gets_nothing_and_that_is_final(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    results = place.deliver("nobody@here.example", "ana@here.example")
    assert states(results) == [(State.FAILED, "5.1.1"), (State.SENT, "2.0.0")]


@pytest.mark.parametrize(
    "name",
    ["../ana@here.example", "a/b@here.example", "..@here.example", ".@here.example",
     "ana@..", "ana@../here.example", "a\0b@here.example", "ana@."],
)  # fmt: skip
def test_a_name_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    place = Maildirs(tmp_path)
    assert states(place.deliver(name)) == [(State.FAILED, "5.1.3")]
    assert list(tmp_path.iterdir()) == []


def test_no_name_leads_out_of_the_directory() -> None:
    async def main(loop: chasquid.Loop) -> chasquid.MaildirCourier:
        return Maildirs(Path("/mail")).courier(loop)

    courier = run(main)

    @given(user=st.text(min_size=1), domain=st.text(min_size=1))
    def check(user: str, domain: str) -> None:
        try:
            found = courier.directory(f"{user}@{domain}")
        except ValueError:
            return
        assert os.path.normpath(found) == found
        assert found.startswith("/mail/") and found.count("/") == 3

    check()


def test_the_template_may_hold_the_whole_address(tmp_path: Path) -> None:
    place = Maildirs(tmp_path, "%data_dir%/%to%")
    place.deliver("ana@here.example")
    assert place.files()[0].parent.parent == tmp_path / "ana@here.example"


class Noting(chasquid.Disk):
    """A disk that notes what it is asked for, and what is in new at that moment."""

    def __init__(self, loop: chasquid.Loop, directory: Path) -> None:
        super().__init__(loop)
        self.notes: list[tuple[str, str, int]] = []
        self._directory = directory

    async def create(self, temporary: str, data: bytes, path: str) -> None:
        self._note("writes", temporary)
        await super().create(temporary, data, path)
        assert not os.path.exists(temporary)
        self._note("stored", path)

    def _note(self, what: str, path: str) -> None:
        count = len(list(self._directory.glob("*/*/new/*")))
        self.notes.append((what, os.path.basename(os.path.dirname(path)), count))


def test_a_message_is_written_in_tmp_before_it_is_seen_in_new(tmp_path: Path) -> None:
    disks: list[Noting] = []

    def make(loop: chasquid.Loop) -> chasquid.MaildirCourier:
        disks.append(Noting(loop, tmp_path))
        return chasquid.MaildirCourier(
            loop, disks[0], "%data_dir%/%to_domain%/%to_user%", str(tmp_path), HOST,
            somebody,
        )  # fmt: skip

    assert [result.state for result in deliver(make, [address("ana@here.example")])] == [State.SENT]
    assert disks[0].notes == [("writes", "tmp", 0), ("stored", "new", 1)]


def test_a_maildir_that_cannot_be_made_defers(tmp_path: Path) -> None:
    (tmp_path / "here.example").write_bytes(b"")
    (result,) = Maildirs(tmp_path).deliver("ana@here.example")
    assert (result.state, result.status) == (State.DEFERRED, "4.3.0")


def test_a_message_that_cannot_be_read_defers_and_leaves_nothing(tmp_path: Path) -> None:
    place = Maildirs(tmp_path)
    message = chasquid.Message(b"", str(tmp_path / "gone"), 10)
    (result,) = place.deliver("ana@here.example", load=delivery()._replace(message=message))
    assert result.state == State.DEFERRED
    assert place.files() == []


# --- programs ---


class Spawned:
    """Starts programs as a server does, and keeps what it was asked to start."""

    def __init__(self, error: OSError | None = None) -> None:
        self.argv: list[list[str]] = []
        self.env: list[dict[str, str]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._error = error

    def __call__(
        self, argv: Sequence[str], *, stdin: int, env: Mapping[str, str], cwd: str | None
    ) -> subprocess.Popen[bytes]:
        self.argv.append(list(argv))
        self.env.append(dict(env))
        if self._error is not None:
            raise self._error
        process = chasquid.spawn_program(argv, stdin=stdin, env=env, cwd=cwd)
        self.processes.append(process)
        return process


def agent(
    program: str, *arguments: str, spawn: Spawned | None = None
) -> Callable[[chasquid.Loop], chasquid.AgentCourier]:
    return lambda loop: chasquid.AgentCourier(
        chasquid.Programs(loop, spawn or Spawned()), program, arguments
    )


def shell(script: str) -> Callable[[chasquid.Loop], chasquid.AgentCourier]:
    return agent("/bin/sh", "-c", script)


ANA = [address("ana@here.example")]


def test_the_agent_gets_the_message_with_crlf(tmp_path: Path) -> None:
    got = tmp_path / "got"
    (result,) = deliver(shell(f"cat > {got}"), ANA, delivery(prefix=b"A: b\r\n"))
    assert (result.state, result.status) == (State.SENT, "2.0.0")
    assert got.read_bytes() == b"A: b\r\n" + MESSAGE


def test_the_agent_gets_a_large_message_whole(tmp_path: Path) -> None:
    got = tmp_path / "got"
    data = MESSAGE * 50_000
    (result,) = deliver(shell(f"sleep 0.01; cat > {got}"), ANA, delivery(data))
    assert result.state == State.SENT
    assert got.read_bytes() == data


@pytest.mark.parametrize(
    ("ending", "state", "status"),
    [
        ("exit 0", State.SENT, "2.0.0"),
        ("exit 75", State.DEFERRED, "4.3.0"),
        ("exit 1", State.FAILED, "5.3.0"),
        ("exit 77", State.FAILED, "5.3.0"),
        ("exit 127", State.DEFERRED, "4.3.0"),
        ("kill -9 $$", State.DEFERRED, "4.3.0"),
    ],
)
def test_the_agents_exit_decides(ending: str, state: str, status: str) -> None:
    assert states(deliver(shell(f"cat > /dev/null; {ending}"), ANA)) == [(state, status)]


def test_what_a_failed_agent_says_is_told_on_one_line() -> None:
    script = "echo first >&2; printf 'no \\033room\\n' >&2; exit 1"
    (result,) = deliver(shell(script), ANA)
    assert result.text.endswith(", exit status 1: no  room") or "no room" in result.text
    assert result.text.isprintable()


def test_an_agent_need_not_read_the_message() -> None:
    (result,) = deliver(shell("exit 0"), ANA, delivery(MESSAGE * 50_000))
    assert result.state == State.SENT


def test_an_agent_that_talks_without_end_is_read_and_not_kept() -> None:
    script = "head -c 10000000 /dev/zero >&2; exit 75"
    (result,) = deliver(shell(script), ANA)
    assert result.state == State.DEFERRED
    assert len(result.text) < 1000


def test_an_agent_that_cannot_be_started_defers() -> None:
    (result,) = deliver(agent("/nowhere/agent"), ANA)
    assert result.state == State.DEFERRED
    assert "agent cannot be started: No such file or directory" in result.text


def test_a_system_that_cannot_start_programs_defers() -> None:
    spawn = Spawned(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))
    (result,) = deliver(agent("/bin/true", spawn=spawn), ANA)
    assert result.state == State.DEFERRED


def test_an_agent_that_takes_too_long_is_ended_with_its_children() -> None:
    clock = FakeClock()
    spawn = Spawned()
    make = agent("/bin/sh", "-c", "sleep 1000 & echo up; wait", spawn=spawn)

    async def main(loop: chasquid.Loop) -> list[Result]:
        task = loop.spawn(make(loop).deliver(delivery(), ANA), "delivery")
        while not spawn.processes:
            await loop.turn()
        for _ in range(5):
            await loop.turn()
        clock.advance(29)
        for _ in range(5):
            await loop.turn()
        assert spawn.processes[0].poll() is None
        clock.advance(2)
        return await task.join()  # type: ignore[no-any-return]

    (result,) = run(main, clock=clock)
    assert result.state == State.DEFERRED
    assert "sh took more than 30s" in result.text
    group = spawn.processes[0].pid

    def gone() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    # nobody is left in the group of the program
    wait_for(gone, "the program's children to end")


def test_the_agents_arguments_are_filled_in() -> None:
    spawn = Spawned()
    arguments = ("%from%", "%from_user%", "%from_domain%", "%to%", "%to_user%", "%to_domain%",
                 "-x=%to_user%%%", "%other%", "to%")  # fmt: skip
    deliver(agent("/bin/true", *arguments, spawn=spawn), ANA)
    assert spawn.argv == [
        ["/bin/true", "eva@there.example", "eva", "there.example", "ana@here.example", "ana",
         "here.example", "-x=ana%%", "%other%", "to%"]
    ]  # fmt: skip


def test_without_arguments_the_agent_gets_the_usual_ones() -> None:
    spawn = Spawned()
    deliver(agent("/bin/true", spawn=spawn), ANA)
    assert spawn.argv == [["/bin/true", "-f", "eva@there.example", "-d", "ana"]]


def test_what_means_something_to_a_shell_is_taken_out_of_arguments() -> None:
    spawn = Spawned()
    load = delivery(sender="$(rm -rf /);`x`|y&'z'\"\n\\{a}<b>@there.example")
    deliver(agent("/bin/true", "%from%", "%to_user%", spawn=spawn), [address("../a b@here")], load)
    assert spawn.argv == [["/bin/true", "rm-rfxyzab@there.example", "..ab"]]


@given(sender=st.text(), recipient=st.text())
def test_no_address_brings_a_dangerous_character_into_an_argument(
    sender: str, recipient: str
) -> None:
    spawn = Spawned(OSError(errno.EAGAIN, "not now"))
    deliver(
        agent("/bin/true", "%from%", "%to%", "%from_user%", "%to_domain%", spawn=spawn),
        [address(recipient)],
        delivery(sender=sender),
    )
    assert not set("".join(spawn.argv[0][1:])) & set("\0\n\r\t /;\"'\\|*&$%()[]{}`!<>")


def test_each_recipient_has_a_run_of_its_own() -> None:
    spawn = Spawned()
    script = 'test "$RECIPIENT" = ana@here.example'
    destinations = [address("ben@here.example"), *ANA]
    results = deliver(agent("/bin/sh", "-c", script, spawn=spawn), destinations)
    assert [result.state for result in results] == [State.FAILED, State.SENT]
    assert [environment["SENDER"] for environment in spawn.env] == ["eva@there.example"] * 2


def test_a_program_inherits_our_environment_without_what_systemd_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Europe/Zurich")
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "3")
    spawn = Spawned()
    deliver(agent("/bin/true", spawn=spawn), ANA)
    [environment] = spawn.env
    assert environment["TZ"] == "Europe/Zurich"
    assert not [name for name in environment if name.startswith(("LISTEN_", "NOTIFY_"))]
    assert environment["RECIPIENT"] == "ana@here.example" and "SENDER" in environment


def pipe(
    command: str, load: Delivery | None = None, spawn: Spawned | None = None
) -> tuple[Result, Spawned]:
    spawn = spawn or Spawned()
    (result,) = deliver(
        lambda loop: chasquid.PipeCourier(chasquid.Programs(loop, spawn)),
        [Destination("pipe", command)],
        load,
    )
    return result, spawn


def test_a_pipe_gets_the_message(tmp_path: Path) -> None:
    got = tmp_path / "got"
    result, _ = pipe(f"tee '{got}'")
    assert result.state == State.SENT
    assert got.read_bytes() == MESSAGE


def test_a_pipe_is_split_as_a_shell_would_and_not_run_by_one() -> None:
    result, spawn = pipe("/bin/true 'one two' three\\ four ; $HOME > x | y")
    assert result.state == State.SENT
    assert spawn.argv == [["/bin/true", "one two", "three four", ";", "$HOME", ">", "x", "|", "y"]]


def test_a_pipe_that_is_malformed_fails() -> None:
    result, _ = pipe("/bin/true 'not closed")
    assert (result.state, result.status) == (State.FAILED, "5.3.5")


@pytest.mark.parametrize(
    ("status", "state"), [(0, State.SENT), (75, State.DEFERRED), (3, State.FAILED)]
)
def test_the_exit_of_a_pipe_decides(status: int, state: str) -> None:
    assert pipe(f"/bin/sh -c 'exit {status}'")[0].state == state


@pytest.mark.parametrize("command", ["/nowhere/program", "''", "/bin/true a\0b"])
def test_a_pipe_that_cannot_be_started_defers(command: str) -> None:
    assert pipe(command)[0].state == State.DEFERRED


# --- SMTP ---


class Smtp:
    """An SMTP courier with a given zone; what it logs is below `directory`."""

    def __init__(
        self,
        directory: Path,
        port: int = 1,
        zone: Mapping[tuple[str, str], Any] = MX,
        random: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self.zone = Zone(zone)
        self._directory = directory
        self._log = record(directory)
        self._port = port
        self._random = random

    def courier(self, loop: chasquid.Loop) -> chasquid.SmtpCourier:
        names = chasquid.Names(loop, self.zone.ask)
        policies = tls_policies(loop, names, self._log, self._directory)
        return chasquid.SmtpCourier(
            loop, names, self._log, policies, HOST, self._port, self._random
        )

    def deliver(
        self, destinations: Sequence[Destination] = EVA, load: Delivery | None = None
    ) -> Any:
        return deliver(self.courier, destinations, load)


def attempt(
    tmp_path: Path,
    *scripts: str,
    destinations: Sequence[Destination] = EVA,
    load: Delivery | None = None,
    zone: Mapping[tuple[str, str], Any] = MX,
) -> tuple[list[Result], Peer]:
    """Let a courier attempt a delivery to servers that follow `scripts`, one after another."""
    with Peer(*scripts, names=("mx.there.example",)) as peer:
        results = Smtp(tmp_path, peer.port, zone).deliver(destinations, load)
    return results, peer


def test_a_message_is_sent_command_by_command(tmp_path: Path) -> None:
    script = GREETING + """
        C: MAIL FROM:<eva@there.example>
        * nothing more
        S: 250 2.1.0 fine
        C: RCPT TO:<eva@there.example>
        * nothing more
        S: 250 2.1.5 fine
    """ + CONTENT  # fmt: skip
    (result,), peer = attempt(tmp_path, script)
    assert (result.state, result.status) == (State.SENT, "2.6.0")
    assert result.remote_mta == f"mx.there.example (127.0.0.1:{peer.port})"
    assert "got it" in result.text
    assert peer.messages == [MESSAGE + b".\r\n"]


def test_with_pipelining_the_envelope_goes_in_one_piece(tmp_path: Path) -> None:
    script = f"""
        S: 220 mx.there.example ESMTP
        C: EHLO {HOST}
        S: 250-mx.there.example
        S: 250 PIPELINING
        C: MAIL FROM:<eva@there.example>
        C: RCPT TO:<eva@there.example>
        C: RCPT TO:<eve@there.example>
        C: DATA
        S: 250 fine
        S: 250 fine
        S: 550 5.1.1 not here
        S: 354 go on
        C.
        S: 250 2.0.0 got it
        C: QUIT
        S: 221 bye
    """
    results, peer = attempt(tmp_path, script, destinations=[*EVA, address("eve@there.example")])
    assert states(results) == [(State.SENT, "2.0.0"), (State.FAILED, "5.1.1")]
    assert len(peer.messages) == 1


def test_with_pipelining_a_data_that_nobody_wants_is_ended(tmp_path: Path) -> None:
    script = f"""
        S: 220 mx.there.example ESMTP
        C: EHLO {HOST}
        S: 250-mx.there.example
        S: 250 PIPELINING
        C: MAIL FROM:<eva@there.example>
        C: RCPT TO:<eva@there.example>
        C: DATA
        S: 250 fine
        S: 450 4.2.1 later
        S: 354 go on
        C.
        S: 554 5.5.1 no valid recipients
        C: QUIT
        S: 221 bye
    """
    results, peer = attempt(tmp_path, script)
    assert states(results) == [(State.DEFERRED, "4.2.1")]
    assert peer.messages == [b".\r\n"]


def test_with_pipelining_a_refused_sender_is_refused_for_all(tmp_path: Path) -> None:
    script = f"""
        S: 220 mx.there.example ESMTP
        C: EHLO {HOST}
        S: 250-mx.there.example
        S: 250 PIPELINING
        C: MAIL FROM:<eva@there.example>
        C: RCPT TO:<eva@there.example>
        C: DATA
        S: 550 5.7.1 not you
        S: 503 5.5.1 MAIL first
        S: 503 5.5.1 MAIL first
        C: QUIT
        S: 221 bye
    """
    (result,), _ = attempt(tmp_path, script)
    assert (result.state, result.status) == (State.FAILED, "5.7.1")
    assert "not you" in result.text


def test_a_server_without_ehlo_gets_helo(tmp_path: Path) -> None:
    script = f"""
        S: 220 mx.there.example
        C: EHLO {HOST}
        S: 500 what?
        C: HELO {HOST}
        S: 250 mx.there.example
    """
    results, _ = attempt(tmp_path, script + ENVELOPE + CONTENT)
    assert states(results) == [(State.SENT, "2.6.0")]


def test_what_the_server_has_is_used(tmp_path: Path) -> None:
    data = "Subject: hello\r\n\r\nŽofie\r\n".encode()
    script = f"""
        S: 220 mx.there.example ESMTP
        C: EHLO {HOST}
        S: 250-mx.there.example
        S: 250-size 1000000
        S: 250-8bitmime
        S: 250 SMTPUTF8
        C: MAIL FROM:<žofie@there.example> SIZE={len(data) + 6} BODY=8BITMIME SMTPUTF8
        S: 250 fine
        C: RCPT TO:<eva@there.example>
        S: 250 fine
    """
    load = delivery(data, "žofie@there.example", prefix=b"A: b\r\n", smtputf8=True)
    results, peer = attempt(tmp_path, script + CONTENT, load=load)
    assert states(results) == [(State.SENT, "2.6.0")]
    assert peer.messages == [b"A: b\r\n" + data + b".\r\n"]


def test_dots_are_doubled_on_the_way(tmp_path: Path) -> None:
    data = b".Subject: x\r\n\r\n.\r\n..\r\na.b\r\n.end"
    _, peer = attempt(tmp_path, GREETING + ENVELOPE + CONTENT, load=delivery(data))
    assert peer.messages == [b"..Subject: x\r\n\r\n..\r\n...\r\na.b\r\n..end\r\n.\r\n"]


@pytest.mark.parametrize("code", [4, 5])
@pytest.mark.parametrize("stage", ["greeting", "ehlo", "mail", "rcpt", "data", "end"])
def test_a_refusal_is_passed_on_at_each_stage(tmp_path: Path, stage: str, code: int) -> None:
    refusal = f"S: {code}51 {code}.7.9 not now"
    quit = "\nC: QUIT\nS: 221 bye"
    scripts = {
        "greeting": f"{refusal}\n* closed",
        "ehlo": GREETING.replace("S: 250 mx.there.example", refusal) + "* closed",
        "mail": GREETING + ENVELOPE.partition("S:")[0] + refusal + quit,
        "rcpt": GREETING + ENVELOPE.rpartition("S:")[0] + refusal + quit,
        "data": GREETING + ENVELOPE + CONTENT.partition("S:")[0] + refusal + quit,
        "end": GREETING + ENVELOPE + CONTENT.replace("S: 250 2.6.0 got it", refusal),
    }
    results, _ = attempt(tmp_path, scripts[stage])
    assert states(results) == [(State.DEFERRED if code == 4 else State.FAILED, f"{code}.7.9")]
    assert "not now" in results[0].text


@pytest.mark.parametrize("stage", range(9))
def test_a_connection_that_drops_defers_at_each_stage(tmp_path: Path, stage: int) -> None:
    whole = [line.strip() for line in (GREETING + ENVELOPE + CONTENT).split("\n") if line.strip()]
    replies = [number for number, line in enumerate(whole) if line.startswith("S:")]
    places = [0, *(place for reply in replies[:5] for place in (reply, reply + 1))][:9]
    script = "\n".join(whole[: places[stage]]) + "\n* close"
    results, peer = attempt(tmp_path, script)
    assert [result.state for result in results] == [State.DEFERRED]


def test_a_connection_that_drops_before_the_last_reply_defers(tmp_path: Path) -> None:
    script = GREETING + ENVELOPE + "C: DATA\nS: 354 go on\nC.\n* close"
    results, peer = attempt(tmp_path, script)
    assert [result.state for result in results] == [State.DEFERRED]
    assert len(peer.messages) == 1


def test_a_connection_that_drops_after_the_last_reply_has_delivered(tmp_path: Path) -> None:
    script = GREETING + ENVELOPE + "C: DATA\nS: 354 go on\nC.\nS: 250 got it\n* close"
    results, _ = attempt(tmp_path, script)
    assert [result.state for result in results] == [State.SENT]


@pytest.mark.parametrize(
    "greeting",
    ["SSH-2.0-OpenSSH_9.2", "HTTP/1.1 400 Bad Request", "22", "2200 hello", "220_hello", ""],
)
def test_who_does_not_speak_smtp_defers(tmp_path: Path, greeting: str) -> None:
    (result,), _ = attempt(tmp_path, f"S: {greeting}\n* closed")
    assert (result.state, result.status) == (State.DEFERRED, "4.5.0")
    assert "does not speak SMTP" in result.text


def test_a_reply_that_never_ends_defers(tmp_path: Path) -> None:
    (result,), _ = attempt(tmp_path, "\n".join(["S: 220-hello"] * 201) + "\n* closed")
    assert result.state == State.DEFERRED


def test_a_reply_line_that_never_ends_defers(tmp_path: Path) -> None:
    (result,), _ = attempt(tmp_path, f"S: 220 {'x' * 100_000}\n* closed")
    assert result.state == State.DEFERRED


@pytest.mark.parametrize("reply", ["250 2.0.0 fine", "220 2.0.0 fine", "334 go on"])
def test_a_message_that_was_not_asked_for_is_not_taken_as_sent(tmp_path: Path, reply: str) -> None:
    script = GREETING + ENVELOPE + f"C: DATA\nS: {reply}\n* close"
    results, _ = attempt(tmp_path, script)
    assert [result.state for result in results] == [State.DEFERRED]


@pytest.mark.parametrize("reply", ["354 go on", "334 go on", "150 soon"])
def test_only_a_2xx_at_the_end_means_that_it_was_sent(tmp_path: Path, reply: str) -> None:
    script = GREETING + ENVELOPE + f"C: DATA\nS: 354 go on\nC.\nS: {reply}\n* close"
    results, _ = attempt(tmp_path, script)
    assert [result.state for result in results] == [State.DEFERRED]


def test_each_recipient_has_its_own_result(tmp_path: Path) -> None:
    script = GREETING + """
        C: MAIL FROM:<eva@there.example>
        S: 250 fine
        C: RCPT TO:<one@there.example>
        S: 550 5.1.1 not here
        C: RCPT TO:<two@there.example>
        S: 251 2.1.5 will forward
        C: RCPT TO:<three@there.example>
        S: 452 4.2.2 full
    """ + CONTENT  # fmt: skip
    destinations = [address(f"{name}@there.example") for name in ("one", "two", "three")]
    results, _ = attempt(tmp_path, script, destinations=destinations)
    assert states(results) == [
        (State.FAILED, "5.1.1"),
        (State.SENT, "2.6.0"),
        (State.DEFERRED, "4.2.2"),
    ]


def test_more_than_a_hundred_recipients_go_in_several_transactions(tmp_path: Path) -> None:
    def script(numbers: range) -> str:
        rcpts = "".join(f"C: RCPT TO:<u{n}@there.example>\nS: 250 fine\n" for n in numbers)
        mail = "C: MAIL FROM:<eva@there.example>\nS: 250 fine\n"
        return GREETING + mail + rcpts + CONTENT

    destinations = [address(f"u{number}@there.example") for number in range(130)]
    results, peer = attempt(
        tmp_path, script(range(100)), script(range(100, 130)), destinations=destinations
    )
    assert [result.state for result in results] == [State.SENT] * 130
    assert len(peer.messages) == 2


def test_an_enhanced_code_that_contradicts_the_reply_is_not_believed(tmp_path: Path) -> None:
    script = f"{GREETING}{ENVELOPE.partition('S:')[0]}S: 550 2.1.0 no\nC: QUIT\nS: 221 bye"
    assert states(attempt(tmp_path, script)[0]) == [(State.FAILED, "5.0.0")]


# --- which server ---


def hosts_asked(smtp: Smtp) -> list[str]:
    """Return the hosts whose addresses were asked for, in order."""
    return [name for name, kind in smtp.zone.asked if kind == "A"]


def zone_of(*records: str, domain: str = "there.example") -> dict[tuple[str, str], Any]:
    """Return a zone with these MX; the hosts have addresses where nobody listens."""
    hosts = [record.split()[1].rstrip(".") for record in records]
    return {(domain, "MX"): records, **{(host, "A"): ("127.0.0.1",) for host in hosts}}


@pytest.fixture
def deaf_port() -> int:
    """A port on which nobody listens."""
    with Peer() as peer:
        return peer.port


def test_servers_are_tried_in_the_order_of_preference(tmp_path: Path, deaf_port: int) -> None:
    smtp = Smtp(tmp_path, deaf_port, zone_of("30 c.example.", "10 a.example.", "20 b.example."))
    assert [result.state for result in smtp.deliver()] == [State.DEFERRED]
    assert hosts_asked(smtp) == ["a.example", "b.example", "c.example"]


def test_servers_of_the_same_preference_are_shuffled(tmp_path: Path, deaf_port: int) -> None:
    numbers = iter([0.3, 0.1, 0.2, 0.9])
    zone = zone_of("10 a.example.", "10 b.example.", "10 c.example.", "5 z.example.")
    # preferences come sorted: z, a, b, c
    smtp = Smtp(tmp_path, deaf_port, zone, lambda: next(numbers))
    smtp.deliver()
    assert hosts_asked(smtp) == ["z.example", "a.example", "b.example", "c.example"]
    numbers = iter([0.3, 0.9, 0.2, 0.1])
    smtp = Smtp(tmp_path, deaf_port, zone, lambda: next(numbers))
    smtp.deliver()
    assert hosts_asked(smtp) == ["z.example", "c.example", "b.example", "a.example"]


def test_at_most_five_servers_are_tried(tmp_path: Path, deaf_port: int) -> None:
    smtp = Smtp(tmp_path, deaf_port, zone_of(*(f"{n} mx{n}.example." for n in range(10, 20))))
    smtp.deliver()
    assert hosts_asked(smtp) == [f"mx{n}.example" for n in range(10, 15)]


def test_the_next_server_is_tried_where_one_is_down(tmp_path: Path) -> None:
    zone = zone_of("10 a.example.", "20 b.example.")
    results, _ = attempt(tmp_path, "* close", GREETING + ENVELOPE + CONTENT, zone=zone)
    assert [result.state for result in results] == [State.SENT]
    assert results[0].remote_mta.startswith("b.example ")


def test_a_server_that_will_not_have_us_does_not_decide_for_the_others(tmp_path: Path) -> None:
    zone = zone_of("10 a.example.", "20 b.example.")
    results, _ = attempt(tmp_path, "S: 554 no", GREETING + ENVELOPE + CONTENT, zone=zone)
    assert [result.state for result in results] == [State.SENT]


def test_one_server_that_may_work_later_defers_it_all(tmp_path: Path) -> None:
    zone = zone_of("10 a.example.", "20 b.example.")
    results, _ = attempt(tmp_path, "S: 554 5.7.1 no", "S: 421 4.3.2 later", zone=zone)
    assert states(results) == [(State.DEFERRED, "4.3.2")]


def test_the_next_address_is_tried_where_one_is_down(tmp_path: Path) -> None:
    zone = {**MX, ("mx.there.example", "AAAA"): ("::1",)}
    (result,), _ = attempt(tmp_path, GREETING + ENVELOPE + CONTENT, zone=zone)
    assert result.state == State.SENT
    assert result.remote_mta.startswith("mx.there.example (127.0.0.1:")


def test_a_server_without_an_address_is_passed_over(tmp_path: Path) -> None:
    zone = {
        ("there.example", "MX"): ("10 gone.example.", "20 broken.example.", "30 mx.example."),
        ("broken.example", "A"): chasquid.TemporaryFailure("no answer", "4.4.3"),
        ("broken.example", "AAAA"): chasquid.TemporaryFailure("no answer", "4.4.3"),
        ("mx.example", "A"): ("127.0.0.1",),
    }
    results, _ = attempt(tmp_path, GREETING + ENVELOPE + CONTENT, zone=zone)
    assert [result.state for result in results] == [State.SENT]


def test_a_domain_without_mx_is_its_own_server(tmp_path: Path) -> None:
    zone = {("there.example", "A"): ("127.0.0.1",)}
    (result,), _ = attempt(tmp_path, GREETING + ENVELOPE + CONTENT, zone=zone)
    assert result.state == State.SENT
    assert result.remote_mta.startswith("there.example ")


@pytest.mark.parametrize(
    ("zone", "state", "status"),
    [
        ({}, State.FAILED, "5.1.2"),
        ({("there.example", "TXT"): ("v=spf1",)}, State.FAILED, "5.1.2"),
        ({("there.example", "MX"): ("0 .",)}, State.FAILED, "5.1.10"),
        (
            {("there.example", "MX"): chasquid.TemporaryFailure("?", "4.4.3")},
            State.DEFERRED,
            "4.4.3",
        ),
        ({("there.example", "MX"): ("10 mx.there.example.",)}, State.DEFERRED, "4.4.1"),
    ],
    ids=["no domain", "no server", "null MX", "no answer", "no address"],
)
def test_a_domain_without_a_server(
    tmp_path: Path, zone: Mapping[tuple[str, str], Any], state: str, status: str
) -> None:
    assert states(Smtp(tmp_path, 1, zone).deliver()) == [(state, status)]


def test_a_null_mx_that_stands_there_twice_is_no_server(tmp_path: Path) -> None:
    zone = {("there.example", "MX"): ("0 .", "10 .")}
    results = Smtp(tmp_path, 1, zone).deliver()
    assert [result.state for result in results] != [State.SENT]


def test_only_servers_nearer_than_we_are_get_mail_of_ours_to_forward(tmp_path: Path) -> None:
    zone = zone_of("10 near.example.", f"20 {HOST}.", "20 like.example.", "30 far.example.")
    results, _ = attempt(tmp_path, "* close", zone=zone)
    assert [result.state for result in results] == [State.DEFERRED]
    assert results[0].remote_mta.startswith("near.example ")


def test_mail_that_would_come_back_to_us_fails(tmp_path: Path) -> None:
    zone = zone_of(f"10 {HOST}.", "20 far.example.")
    assert states(Smtp(tmp_path, 1, zone).deliver()) == [(State.FAILED, "5.4.6")]


def test_an_address_literal_is_a_server(tmp_path: Path) -> None:
    script = GREETING + ENVELOPE.replace("eva@there.example>\n    S: 250 2.1.5",
                                         "eva@[127.0.0.1]>\n    S: 250 2.1.5")  # fmt: skip
    results, _ = attempt(
        tmp_path, script + CONTENT, destinations=[address("eva@[127.0.0.1]")], zone={}
    )
    assert [result.state for result in results] == [State.SENT]


def test_via_names_the_servers_and_no_mx_is_asked(tmp_path: Path, deaf_port: int) -> None:
    with Peer(GREETING + ENVELOPE + CONTENT) as peer:
        smtp = Smtp(tmp_path, peer.port, {("relay.example", "A"): ("127.0.0.1",)})
        via = (f"127.0.0.1:{deaf_port}", "relay.example")
        results = smtp.deliver([address("eva@there.example", *via)])
    assert [result.state for result in results] == [State.SENT]
    assert ("there.example", "MX") not in smtp.zone.asked


# --- SMTPUTF8 ---


def test_an_international_address_needs_smtputf8(tmp_path: Path) -> None:
    script = GREETING + "* closed"
    results, _ = attempt(tmp_path, script, destinations=[address("žofie@there.example")])
    assert states(results) == [(State.FAILED, "5.6.7")]


def test_an_international_domain_does_not(tmp_path: Path) -> None:
    zone = {
        ("xn--bcher-kva.example", "MX"): ("10 mx.there.example.",),
        ("mx.there.example", "A"): ("127.0.0.1",),
    }
    script = GREETING + ENVELOPE.replace("there.example", "xn--bcher-kva.example") + CONTENT
    results, _ = attempt(
        tmp_path, script, destinations=[address("eva@bücher.example")], zone=zone,
        load=delivery(sender="eva@bücher.example", smtputf8=True),
    )  # fmt: skip
    assert [result.state for result in results] == [State.SENT]


def test_an_international_header_needs_smtputf8(tmp_path: Path) -> None:
    load = delivery("Subject: žofie\r\n\r\n".encode(), smtputf8=True)
    results, _ = attempt(tmp_path, GREETING + "* closed", load=load)
    assert states(results) == [(State.FAILED, "5.6.7")]


# --- TLS ---

PLAIN = f"""
    S: 220 mx.there.example ESMTP
    C: EHLO {HOST}
    S: 250-mx.there.example
    S: 250 STARTTLS
"""


def test_a_certificate_that_is_not_valid_still_encrypts(tmp_path: Path) -> None:
    first = STARTTLS + "S: 220 go on\n* TLS\n* close"
    results, peer = attempt(tmp_path, first, STARTTLS + SECURE + ENVELOPE + CONTENT)
    assert [result.state for result in results] == [State.SENT]
    assert "the certificate is not valid" in (tmp_path / "server.log").read_text()


def test_a_valid_certificate_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(monkeypatch, tmp_path, "mx.there.example")
    results, _ = attempt(tmp_path, STARTTLS + SECURE + ENVELOPE + CONTENT)
    assert [result.state for result in results] == [State.SENT]


@pytest.mark.parametrize(
    "failure",
    ["S: 454 4.7.0 not today", "S: 220 go on\nS: this is no handshake", "S: 220 go on\n* close"],
)
def test_where_tls_fails_the_message_goes_in_the_clear(tmp_path: Path, failure: str) -> None:
    results, _ = attempt(tmp_path, STARTTLS + failure, PLAIN + ENVELOPE + CONTENT)
    assert [result.state for result in results] == [State.SENT]


def test_what_a_server_says_in_the_clear_behind_starttls_is_not_believed(tmp_path: Path) -> None:
    injected = SECURE.replace("S: 220 go on", "S= 220 go on\\r\\n250-evil\\r\\n250 AUTH\\r\\n")
    first = STARTTLS + "S: 220 go on\n* TLS\n* close"
    results, _ = attempt(tmp_path, first, STARTTLS + injected + ENVELOPE + CONTENT)
    assert [result.state for result in results] == [State.SENT]


# --- LMTP ---

LHLO = f"""
    S: 220 dovecot
    C: LHLO {HOST}
    S: 250-dovecot
    S: 250 PIPELINING
    C: MAIL FROM:<eva@there.example>
    C: RCPT TO:<ana@here.example>
    C: RCPT TO:<ben@here.example>
    C: DATA
    S: 250 fine
"""
BOTH = [address("ana@here.example"), address("ben@here.example")]


def lmtp(
    place: str, zone: Mapping[tuple[str, str], Any] | None = None
) -> Callable[[chasquid.Loop], chasquid.Courier]:
    return lambda loop: chasquid.LmtpCourier(
        loop, chasquid.Names(loop, Zone(zone or {}).ask), place, HOST
    )


def test_lmtp_replies_for_each_recipient() -> None:
    script = LHLO + """
        S: 250 fine
        S: 250 fine
        S: 354 go on
        C.
        S: 250 2.0.0 in the box
        S: 452 4.2.2 full
        C: QUIT
        S: 221 bye
    """  # fmt: skip
    with Peer(script) as peer:
        results = deliver(lmtp(f"127.0.0.1:{peer.port}"), BOTH)
    assert states(results) == [(State.SENT, "2.0.0"), (State.DEFERRED, "4.2.2")]


def test_lmtp_replies_only_for_recipients_that_were_accepted() -> None:
    script = LHLO + """
        S: 550 5.1.1 not here
        S: 250 fine
        S: 354 go on
        C.
        S: 250 2.0.0 in the box
        C: QUIT
        S: 221 bye
    """  # fmt: skip
    with Peer(script) as peer:
        results = deliver(lmtp(f"localhost:{peer.port}"), BOTH)
    assert states(results) == [(State.FAILED, "5.1.1"), (State.SENT, "2.0.0")]


def test_lmtp_over_a_socket_in_the_file_system(tmp_path: Path) -> None:
    script = LHLO + """
        S: 250 fine
        S: 250 fine
        S: 354 go on
        C.
        S: 250 2.0.0 in the box
        S: 552 5.2.2 too big
        C: QUIT
        S: 221 bye
    """  # fmt: skip
    path = str(tmp_path / "lmtp")
    with Peer(script, path=path):
        results = deliver(lmtp(path), BOTH)
    assert states(results) == [(State.SENT, "2.0.0"), (State.FAILED, "5.2.2")]


def test_lmtp_that_is_down_defers(tmp_path: Path, deaf_port: int) -> None:
    for place in (str(tmp_path / "none"), f"127.0.0.1:{deaf_port}", "nowhere.example:24"):
        assert states(deliver(lmtp(place), BOTH)) == [(State.DEFERRED, "4.4.1")] * 2


@pytest.mark.parametrize(
    "script", ["S: 554 no", "* close", "S: hello", LHLO + "* close", LHLO + "S: 250 fine\n* close"]
)
def test_lmtp_that_does_not_work_defers(script: str) -> None:
    with Peer(script) as peer:
        results = deliver(lmtp(f"127.0.0.1:{peer.port}"), BOTH)
    assert [result.state for result in results] == [State.DEFERRED] * 2


def test_lmtp_that_stops_between_its_replies_is_believed_in_none() -> None:
    script = LHLO + "S: 250 a\nS: 250 b\nS: 354 go on\nC.\nS: 250 in the box\n* close"
    with Peer(script) as peer:
        results = deliver(lmtp(f"127.0.0.1:{peer.port}"), BOTH)
    assert results[1].state == State.DEFERRED


# --- the choice ---


class Nobody:
    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        raise AssertionError("nobody delivers here")


def test_each_destination_has_its_courier() -> None:
    local, piped, remote = Nobody(), Nobody(), Nobody()
    couriers = chasquid.Couriers(local, piped, remote, lambda domain: domain == "here.example")
    routes = {
        destination: couriers.route(destination)
        for destination in (
            *ANA,
            *EVA,
            address("ana@here.example", "relay"),
            Destination("pipe", "x"),
        )
    }
    assert [(route.courier, route.local) for route in routes.values()] == [
        (local, True), (remote, False), (remote, False), (piped, True)
    ]  # fmt: skip
    assert len({route.key for route in routes.values()}) == 4


def test_those_who_share_a_way_travel_together() -> None:
    couriers = chasquid.Couriers(
        Nobody(), Nobody(), Nobody(), lambda domain: domain == "here.example"
    )

    def key(destination: Destination) -> tuple[str, ...]:
        return couriers.route(destination).key

    assert key(address("a@there.example")) == key(address("b@there.example"))
    assert key(address("a@there.example")) != key(address("a@else.example"))
    assert key(address("a@x.example", "r1")) == key(address("b@y.example", "r1"))
    assert key(address("a@x.example", "r1")) != key(address("a@x.example", "r2"))
