# SPDX-License-Identifier: Apache-2.0
"""Rooms LOOP, DNS, HOOKS, COURIERS, QUEUE: clocks, servers, name servers and programs that fail.

A whole server each time, on a clock that is moved ahead: what takes minutes takes none here.
Each time the mail arrives in the end, or its sender is told; nobody hears 250 for what is not
kept, and of what was open, running or waiting nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from support import (
    HOST,
    LETTER,
    MX,
    SECONDS,
    FakeCourier,
    Peer,
    RunningClock,
    Serve,
    Server,
    Zone,
    greeted,
    logged_in,
    send,
    wait_for,
)

import chasquid

ANA, EVA = "ana@here.example", "eva@there.example"
YEAR = 365 * 86400.0


class Held(NamedTuple):
    """What is open, running and waiting."""

    descriptors: int
    threads: int  # but for the server's workers, which come when they are needed
    tasks: int
    children: frozenset[int]


def held(server: Server) -> Held:
    """Return what this process, and the loop of `server`, hold now.

    But for the journal, whose files are opened and settled whenever it is time.
    """
    tasks = [task.name for task in list(server.daemon.loop._tasks) if "journal" not in task.name]
    descriptors = []
    for fd in os.listdir("/dev/fd"):
        try:
            descriptors.append(os.readlink(f"/dev/fd/{fd}"))
        except FileNotFoundError:  # that of the list itself
            continue
        except OSError:  # only Linux tells
            descriptors.append("")
    threads = [thread for thread in threading.enumerate() if "worker" not in thread.name]
    children: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children.update(map(int, path.read_text().split()))
    return Held(
        sum("/journal" not in place for place in descriptors), len(threads),
        len(tasks) - tasks.count("records of DKIM keys"),  # which begins a while after the start
        frozenset(children),
    )  # fmt: skip


@contextlib.contextmanager
def nothing_left(server: Server, tasks: int = 0) -> Iterator[None]:
    """Check that after the block nothing is held that was not held before it.

    But for so many `tasks`: the queue has one that reads what is due.
    """
    server.wait_until_ready()
    server.settle()
    before = held(server)
    yield

    def given_back() -> Any:
        server.settle()
        now = held(server)
        descriptors = now.descriptors <= before.descriptors
        fits = descriptors and now.threads <= before.threads and now.children <= before.children
        return fits and now.tasks <= before.tasks + tasks

    wait_for(given_back, f"no more than {before}")


def moving_clock(server: Callable[[], Server]) -> RunningClock:
    """Return a clock for a server that looks at its timers whenever that is moved."""
    return RunningClock(lambda: server().daemon.loop.post(lambda: None))


class Place:
    """Starts a server whose clock is moved by `clock.advance`."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.clock = moving_clock(lambda: self.server)
        self.server: Server

    def start(self, **keywords: Any) -> Server:
        """Start it, and have everything loaded that a first message loads."""
        self.server = self._serve(clock=self.clock, random=lambda: 0.0, **keywords)
        return self.server

    @contextlib.contextmanager
    def hurrying(self) -> Iterator[None]:
        """Let time go fast within the block, so that whoever is waited for is given up soon."""
        over = threading.Event()

        def hurry() -> None:
            while not over.wait(0.01):
                self.clock.advance(2.0)

        thread = threading.Thread(target=hurry, name="clock")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture
def place(serve: Serve) -> Place:
    return Place(serve)


def submit(server: Server, *recipients: str, data: bytes = LETTER) -> str:
    """Send a message from Ana, who has logged in; return its id."""
    with logged_in(server) as wire:
        assert wire.ask(f"MAIL FROM:<{ANA}>").startswith("250 ")
        for recipient in recipients or (EVA,):
            assert wire.ask(f"RCPT TO:<{recipient}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(data.replace(b"eva@there", b"ana@here") + b".\r\n")
        reply = wire.reply()
    assert reply.startswith("250 ")
    return reply.rpartition(" ")[2]


# --- servers that halt ---


class Halting(Peer):
    """A peer that does nothing at all at `* halt`, until it may go on.

    `halts` is released each time it halts, and `goes_on` lets it.
    """

    def __init__(self, *scripts: str) -> None:
        super().__init__(*scripts, names=("mx.there.example",))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.halts = threading.Semaphore(0)
        self.goes_on = threading.Semaphore(0)

    def _step(self, wire: Any, kind: str, rest: str) -> None:
        if (kind, rest) != ("*", "halt"):
            super()._step(wire, kind, rest)
            return
        self.halts.release()
        assert self.goes_on.acquire(timeout=SECONDS), "the client has not gone on"


OPENING = f"""
    S: 220 mx.there.example ESMTP
    C: EHLO {HOST}
    S: 250-mx.there.example
    S: 250 STARTTLS
"""
IN_THE_CLEAR = OPENING.replace("S: 250-mx", "# mx").replace("250 STARTTLS", "250 fine")
ENVELOPE = f"""
    C: MAIL FROM:<{ANA}>
    S: 250 2.1.0 fine
    C: RCPT TO:<{EVA}>
    S: 250 2.1.5 fine
"""
DATA = """
    C: DATA
    S: 354 go on
"""
END = """
    C.
    S: 250 2.6.0 got it
"""
QUIT = """
    C: QUIT
    S: 221 bye
"""
TAKEN = IN_THE_CLEAR + ENVELOPE + DATA + END + QUIT
TO_TLS = OPENING + "C: STARTTLS\n"
HALTS = {
    "at the greeting": ("", 300, "did not answer in time"),
    "amid the greeting": ("S= 220-mx.there\\r\\n22\n", 300, "did not answer in time"),
    "at EHLO": (IN_THE_CLEAR.rpartition("S:")[0], 300, "did not answer in time"),
    "at STARTTLS": (TO_TLS, 300, "did not answer in time"),
    "at MAIL": (IN_THE_CLEAR + ENVELOPE.partition("S:")[0], 300, "did not answer in time"),
    "at RCPT": (IN_THE_CLEAR + ENVELOPE.rpartition("S:")[0], 300, "did not answer in time"),
    "at DATA": (IN_THE_CLEAR + ENVELOPE + "C: DATA\n", 120, "did not answer in time"),
    "after the message": (
        IN_THE_CLEAR + ENVELOPE + DATA + "C.\n", 600, "nothing after the message was sent",
    ),
    "amid the last reply": (
        IN_THE_CLEAR + ENVELOPE + DATA + "C.\nS= 250 2.6.\n", 600, "nothing after the message was",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", HALTS)
def test_a_server_that_halts_is_left_in_time_and_gets_the_message_later(
    place: Place, stage: str
) -> None:
    script, seconds, text = HALTS[stage]
    with Halting(script + "* halt", TAKEN) as peer:
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=peer.port)
        with nothing_left(server, tasks=1):
            id = submit(server)
            assert peer.halts.acquire(timeout=SECONDS)
            server.settle()
            place.clock.advance(seconds - 20)
            server.settle()
            assert "event=deferred" not in server.mail_log
            place.clock.advance(21)
            server.settle()
            place.clock.advance(3)  # for the answer to QUIT, if it comes to that
            wait_for(lambda: f"event=next-attempt id={id}" in server.mail_log, "the time-out")
            assert text in server.mail_log
            peer.goes_on.release()
            place.clock.advance(61)
            wait_for(lambda: f"event=done id={id} attempts=2" in server.mail_log, "its delivery")
    assert not server.queued()
    assert len(peer.messages) == 1 + ("C." in script)


def test_a_handshake_that_halts_is_left_and_the_message_goes_in_the_clear(place: Place) -> None:
    with Halting(TO_TLS + "S: 220 go on\n* halt", TAKEN) as peer:
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=peer.port)
        with nothing_left(server, tasks=1):
            id = submit(server)
            assert peer.halts.acquire(timeout=SECONDS)
            server.settle()
            place.clock.advance(61)
            wait_for(lambda: "did not finish the TLS handshake" in server.log, "the time-out")
            peer.goes_on.release()
            wait_for(lambda: f"event=done id={id} attempts=1" in server.mail_log, "its delivery")
    assert len(peer.messages) == 1


def test_a_server_that_reads_no_more_of_a_message_is_left_after_three_minutes(
    place: Place,
) -> None:
    with Halting(IN_THE_CLEAR + ENVELOPE + DATA + "* halt", TAKEN) as peer:
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=peer.port)
        with nothing_left(server, tasks=1):
            large = LETTER + (b"x" * 900 + b"\r\n") * 7000  # than the system keeps on its way
            id = submit(server, data=large)
            assert peer.halts.acquire(timeout=SECONDS)
            with place.hurrying():
                wait_for(lambda: f"event=next-attempt id={id}" in server.mail_log, "the time-out")
            peer.goes_on.release()
            place.clock.advance(61)
            wait_for(lambda: f"event=done id={id} attempts=2" in server.mail_log, "its delivery")
    assert [len(message) > len(large) for message in peer.messages] == [True]


def test_who_does_not_say_goodbye_has_the_message_all_the_same(place: Place) -> None:
    with Halting(IN_THE_CLEAR + ENVELOPE + DATA + END + "C: QUIT\n* halt") as peer:
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=peer.port)
        with nothing_left(server, tasks=1):
            id = submit(server)
            assert peer.halts.acquire(timeout=SECONDS)
            server.settle()
            place.clock.advance(3)
            wait_for(lambda: f"event=done id={id} attempts=1" in server.mail_log, "its end")
            peer.goes_on.release()
    assert len(peer.messages) == 1


def test_a_reply_that_drips_has_no_more_time_than_any_other(place: Place) -> None:
    drops = "".join(f"S= {drop}\n* halt\n" for drop in ("2", "2", "0", " ", "\\r"))
    with Halting(drops, TAKEN) as peer:
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=peer.port)
        with nothing_left(server, tasks=1):
            id = submit(server)
            for _ in range(5):
                assert peer.halts.acquire(timeout=SECONDS)
                server.settle()
                place.clock.advance(61)
                peer.goes_on.release()
            wait_for(lambda: f"event=next-attempt id={id}" in server.mail_log, "the time-out")
            place.clock.advance(61)
            wait_for(lambda: f"event=done id={id} attempts=2" in server.mail_log, "its delivery")


def test_replies_that_come_in_time_but_late_have_an_hour_in_all(place: Place) -> None:
    recipients = [f"eva{number}@there.example" for number in range(20)]
    late = "".join(f"C: RCPT TO:<{recipient}>\n* halt\nS: 250 fine\n" for recipient in recipients)
    script = IN_THE_CLEAR + ENVELOPE.partition("    C: RCPT")[0] + late
    with Halting(script, "* close") as peer:
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=peer.port)
        id = submit(server, *recipients)
        for count in range(20):
            assert f"event=deferred id={id}" not in server.mail_log, count
            assert peer.halts.acquire(timeout=SECONDS)
            server.settle()
            place.clock.advance(290)
            if count == 12:  # 13 times 290 seconds are more than an hour
                break
            peer.goes_on.release()
        wait_for(lambda: server.mail_log.count("event=deferred") == 20, "the time-out")
        assert "did not answer in time" in server.mail_log
        peer.problems.clear()
        for _ in recipients:
            peer.goes_on.release()
        place.clock.advance(61)
        wait_for(lambda: server.mail_log.count("event=deferred") == 40, "the next attempt")
        peer.problems.clear()  # its script was left, as it had to be


def test_a_server_that_answers_no_connection_is_left_after_half_a_minute(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        address = full.getsockname()
        for _ in range(4):  # whoever comes now waits for one of these to be accepted
            raw = stack.enter_context(socket.socket())
            raw.setblocking(False)
            raw.connect_ex(address)
        server = place.start(ask=Zone(MX).ask, outgoing_smtp_port=address[1])
        with nothing_left(server, tasks=1):
            id = submit(server)
            server.settle()
            assert "event=deferred" not in server.mail_log
            with place.hurrying():
                wait_for(lambda: f"event=next-attempt id={id}" in server.mail_log, "the time-out")
        assert "did not answer in time" in server.mail_log


# --- programs that misbehave ---

#: What a program does that never ends by itself; its marker says that it has begun.
HANGING = {
    "will not be ended": "trap '' TERM INT HUP; {begun}; sleep 1000",
    "has stopped itself": "{begun}; kill -STOP $$",
    "has closed everything": "{begun}; exec <&- >&- 2>&-; sleep 1000",
    "floods its output": "{begun}; exec yes",
    "floods its errors": "{begun}; exec yes >&2",
    "left a child in another session": (
        "setsid sh -c 'echo $$ >{child}; {begun}; exec sleep 1000' & sleep 1000"
    ),
}
#: What ends by itself, in no way that means success.
DYING = {
    "dies by a signal": "kill -SEGV $$",
    "dies as it floods": "head -c 5000000 /dev/zero; kill -ABRT $$",
}
ROLES = {"post-data": 60, "alias-resolve": 5, "pipe": 30, "agent": 30}  # with their seconds


class Program:
    """A shell script in one of the roles that programs have here."""

    def __init__(self, place: Place, directory: Path, role: str) -> None:
        self.place, self.role = place, role
        self.path, self.begun = directory / "program", directory / "begun"
        self.child = directory / "child"
        settings: dict[str, Any] = {}
        if role == "agent":
            settings["mail_delivery_agent_bin"] = self.path
        if role == "pipe":
            settings["aliases"] = {"here.example": f"piped: | {self.path}\n"}
        self.behave("exit 0")
        self.server = place.start(**settings)
        if role in ("post-data", "alias-resolve"):
            hooks = self.server.config_dir / "hooks"
            hooks.mkdir()
            (hooks / role).symlink_to(self.path)

    def behave(self, script: str) -> None:
        """Be another program from now on."""
        text = script.format(begun=f": >{self.begun}", child=self.child)
        new = self.path.with_suffix(".new")
        new.write_text(f"#!/bin/sh\n{text}\n")
        new.chmod(0o755)
        new.rename(self.path)

    def send(self, wait: Callable[[], object]) -> tuple[str, bool]:
        """Send a message; return the reply, and whether the message waits in the queue.

        `wait` is called while the program runs, or should.
        """
        server, recipient = self.server, "piped" if self.role == "pipe" else "ana"
        before = server.mail_log.count("event=next-attempt")
        with greeted(server) as wire:
            assert wire.ask("MAIL FROM:<>").startswith("250 ")
            wire.say(f"RCPT TO:<{recipient}@here.example>")
            if self.role == "alias-resolve":
                wait()
            reply = wire.reply()
            if reply.startswith("250 "):
                assert wire.ask("DATA").startswith("354 ")
                wire.send(LETTER + b".\r\n")
                if self.role == "post-data":
                    wait()
                reply = wire.reply()
            assert wire.ask("NOOP").startswith("250 "), "the session goes on"
        if self.role in ("pipe", "agent"):
            wait()
            wait_for(
                lambda: (
                    server.mail_log.count("event=next-attempt") > before
                    or "event=done" in server.mail_log
                ),
                "what came of it",
            )
        return reply, bool(server.queued("new", "cur"))

    def time_out(self) -> None:
        """Wait until the program has begun, and its time is over."""
        wait_for(self.begun.exists, "the program to begin")
        self.server.settle()
        self.place.clock.advance(ROLES[self.role] - 2)
        self.server.settle()
        assert "took more than" not in self.server.log + self.server.mail_log
        self.place.clock.advance(3)

    def check(self, script: str, wait: Callable[[], object]) -> None:
        """Misbehave, and then be a program that works: the message arrives."""
        with nothing_left(self.server, tasks=1):
            self.behave(script)
            reply, waits = self.send(wait)
            refused = self.role in ("post-data", "alias-resolve")
            assert reply.startswith("451 4." if refused else "250 2."), reply
            assert waits is not refused
            self.behave("exit 0")
            if refused:
                assert self.send(lambda: None) == (self.server_said, False)
            self.place.clock.advance(61)
            wait_for(lambda: "event=done" in self.server.mail_log, "the message to arrive")
        assert not self.server.queued()

    @property
    def server_said(self) -> str:
        """The reply to the last message that was accepted."""
        ids = [line.split("id=")[1].split()[0] for line in self.server.mail_log.splitlines()
               if "event=queued" in line]  # fmt: skip
        return f"250 2.0.0 OK: queued as {ids[-1]}"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("way", HANGING)
def test_a_program_that_never_ends_is_ended(
    place: Place, tmp_path: Path, role: str, way: str
) -> None:
    program = Program(place, tmp_path, role)
    try:
        program.check(HANGING[way], program.time_out)
    finally:
        if program.child.exists():  # which is none of the server's business any more
            os.kill(int(program.child.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("way", DYING)
def test_a_program_that_dies_is_run_again_later(
    place: Place, tmp_path: Path, role: str, way: str
) -> None:
    Program(place, tmp_path, role).check(DYING[way], lambda: None)


# --- clocks that jump ---

JUMPS = {
    "to 1970": lambda: -time.time() + 60.0,
    "a day back": lambda: -86400.0,
    "a day ahead": lambda: 86400.0,
    "twelve years ahead": lambda: 12 * YEAR,
}


def page_of(server: Server) -> str:
    """Return the status page."""
    [raw] = server.daemon._listeners.monitoring
    with urllib.request.urlopen(
        f"http://127.0.0.1:{raw.getsockname()[1]}/", timeout=SECONDS
    ) as page:
        return str(page.read().decode())


@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_changes_nothing_of_what_waits(place: Place, jump: str) -> None:
    remote = FakeCourier()
    server = place.start(remote=remote, monitoring_address="127.0.0.1:0")
    server.settle()
    id = submit(server)
    wait_for(lambda: f"event=next-attempt id={id}" in server.mail_log, "the first attempt")
    with nothing_left(server), greeted(server) as wire:
        for line in ("MAIL FROM:<>", f"RCPT TO:<{ANA}>", "DATA"):
            assert wire.ask(line)[0] in "23"
        wire.send(LETTER)
        server.settle()
        place.clock.jumped = JUMPS[jump]()
        wire.send(b".\r\n")
        assert wire.reply().startswith("250 ")
        assert send(wire, LETTER).startswith("250 ")
        assert "chasquid" in page_of(server)
        place.clock.advance(50)
        server.settle()
        assert len(remote.deliveries) == 1, "its minute is not over"
        place.clock.advance(15)
        wait_for(lambda: server.mail_log.count("event=next-attempt") == 2, "the second attempt")
        assert wire.ask("NOOP").startswith("421 "), "a minute is over for the client, too"
    assert "event=given-up" not in server.mail_log
    place.clock.jumped /= 2  # and a start, under a clock that has jumped again
    server.stop()
    remote.state = chasquid.State.SENT
    server.start()
    wait_for(lambda: f"event=found id={id}" in server.mail_log, "its file to be read")
    server.settle()
    place.clock.advance(22 * 60)  # no pause is longer
    wait_for(lambda: f"event=done id={id} attempts=3" in server.mail_log, "its delivery")
    assert not server.queued()
    assert len(server.mail("ana")) == 2, "nobody was told of a failure"


def test_all_messages_of_a_moment_that_comes_again_are_kept(serve: Serve) -> None:
    """A host without a clock of its own, where each start has the same process id."""
    clock, moment = RunningClock(), time.time()
    clock.time = lambda: moment  # type: ignore[method-assign]
    server = serve(clock=clock)
    for _ in range(3):
        server.stop()
        server.start()
        with greeted(server) as wire:
            assert send(wire, LETTER).startswith("250 ")
            assert send(wire, LETTER).startswith("250 ")
    assert len(server.mail("ana")) == 6


# --- name servers that lie, or say nothing ---

Datagrams = Callable[[bytes], list[bytes]]
Streams = Callable[[socket.socket, bytes], None]


class BadNameServer:
    """A name server of which each octet is up to the test, over UDP and TCP at one port.

    `over_udp` returns the datagrams that answer a question, `over_tcp` writes what it likes.
    """

    def __init__(self, over_udp: Datagrams, over_tcp: Streams) -> None:
        self._over_udp, self._over_tcp = over_udp, over_tcp
        while True:
            self._tcp = socket.create_server(("127.0.0.1", 0))
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._udp.bind(self._tcp.getsockname())
                break
            except OSError:  # somebody has the port for UDP: another one
                self._udp.close()
                self._tcp.close()
        self.place = f"127.0.0.1:{self._udp.getsockname()[1]}"
        self.asked = 0
        self._over = False
        self._threads = [
            threading.Thread(target=target, name="name server", daemon=True)
            for target in (self._datagrams, self._streams)
        ]

    def __enter__(self) -> BadNameServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bell:
            bell.sendto(b"", self._udp.getsockname())
        socket.create_connection(self._tcp.getsockname()).close()
        for thread in self._threads:
            thread.join()
        self._udp.close()
        self._tcp.close()

    def _datagrams(self) -> None:
        while True:
            query, place = self._udp.recvfrom(65535)
            if self._over:
                return
            self.asked += 1
            for datagram in self._over_udp(query):
                self._udp.sendto(datagram, place)

    def _streams(self) -> None:
        while True:
            connection, _ = self._tcp.accept()
            with connection, contextlib.suppress(OSError):
                if self._over:
                    return
                connection.settimeout(SECONDS)
                with connection.makefile("rb") as file:
                    query = file.read(int.from_bytes(file.read(2), "big"))
                if query:
                    self._over_tcp(connection, query)


def answer(query: bytes, *records: str, flags: int = 0, rcode: int = 0) -> dns.message.Message:
    """Return an answer of "kind data" lines for the name that is asked for."""
    asked = dns.message.from_wire(query)
    response = dns.message.make_response(asked)
    response.flags |= dns.flags.RA | flags
    response.set_rcode(dns.rcode.Rcode(rcode))
    for record in records:
        kind, _, data = record.partition(" ")
        name = asked.question[0].name
        response.answer.append(dns.rrset.from_text(name, 60, "IN", kind, data))
    return response


def chain(query: bytes) -> dns.message.Message:
    """Return an answer in which each name stands for another one, without an end."""
    response = answer(query)
    name = response.question[0].name.to_text()
    for number in range(60):
        following = f"x{number}.there.example."
        response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", following))
        name = following
    response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", "x0.there.example."))
    return response


def wrong_id(query: bytes) -> bytes:
    return bytes([query[0] ^ 1]) + answer(query, "A 127.0.0.1").to_wire()[1:]


def wrong_question(query: bytes) -> bytes:
    other = dns.message.make_query("other.example", "MX", id=struct.unpack(">H", query[:2])[0])
    return answer(other.to_wire(), "MX 0 mx.there.example.").to_wire()


def truncated(query: bytes) -> list[bytes]:
    return [answer(query, flags=dns.flags.TC).to_wire()]


def in_tcp(octets: bytes) -> bytes:
    return struct.pack(">H", len(octets)) + octets


def huge(query: bytes) -> bytes:
    """Return an answer that is as large as one can be."""
    response = answer(query)
    record = "{0} {0} {0}".format("x" * 250)
    for number in range(80):
        name = f"n{number}.there.example."
        response.answer.append(dns.rrset.from_text(name, 60, "IN", "TXT", record))
    return response.to_wire(max_size=65535)


def nothing(connection: socket.socket, query: bytes) -> None:
    """Close at once."""


def silent(connection: socket.socket, query: bytes) -> None:
    """Say nothing until the other side has gone."""
    connection.recv(1)


def drip(connection: socket.socket, query: bytes) -> None:
    """Say one octet after another, slowly, until the other side has gone."""
    for octet in in_tcp(answer(query, "A 127.0.0.1").to_wire()):
        connection.sendall(bytes([octet]))
        time.sleep(0.01)


class Lie(NamedTuple):
    """What a name server does, and what becomes of mail to there.example in the first attempt."""

    over_udp: Datagrams
    over_tcp: Streams = nothing
    outcome: str = "deferred"


JUNK = random.Random(2)
LIES = {
    "it says nothing": Lie(lambda query: []),
    "empty datagrams": Lie(lambda query: [b"", b""]),
    "octets of no meaning": Lie(
        lambda query: [JUNK.randbytes(200), query[:2] + JUNK.randbytes(99)]
    ),
    "half of an answer": Lie(lambda query: [answer(query, "A 127.0.0.1").to_wire()[:-3]]),
    "the question itself": Lie(lambda query: [query]),
    "a name that points to itself": Lie(
        lambda query: [query[:2] + b"\x81\x80" + query[4:6] + b"\0\1\0\0\0\0" + query[12:]
                       + b"\xc0" + bytes([len(query)]) + b"\0\1\0\1"]
    ),
    "another id": Lie(lambda query: [wrong_id(query)] * 20),
    "another question": Lie(lambda query: [wrong_question(query)] * 20),
    "names that lead to names without an end": Lie(lambda query: [chain(query).to_wire()]),
    "a name that leads to itself": Lie(
        lambda query: [answer(query, f"CNAME {dns.message.from_wire(query).question[0].name}")
                       .to_wire()]
    ),
    "cut short, and TCP is closed": Lie(truncated, nothing),
    "cut short, and TCP is silent": Lie(truncated, silent),
    "cut short, and TCP drips": Lie(truncated, drip),
    "cut short, and TCP has no meaning": Lie(
        truncated, lambda connection, query: connection.sendall(in_tcp(JUNK.randbytes(300)))
    ),
    "cut short, and TCP promises more than comes": Lie(
        truncated, lambda connection, query: connection.sendall(b"\xff\xff" + b"x" * 500)
    ),
    "as much as TCP can hold": Lie(
        truncated, lambda connection, query: connection.sendall(in_tcp(huge(query)))
    ),
    "it refuses": Lie(lambda query: [answer(query, rcode=dns.rcode.REFUSED).to_wire()]),
    "an answer code that there is not": Lie(lambda query: [answer(query, rcode=14).to_wire()]),
    "nothing exists": Lie(
        lambda query: [answer(query, rcode=dns.rcode.NXDOMAIN).to_wire()], outcome="failed"
    ),
}  # fmt: skip
SIGNED = (
    b"DKIM-Signature: v=1; a=rsa-sha256; d=there.example; s=s; h=from; bh="
    b"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=; b=AAAA\r\n" + LETTER
)


@pytest.mark.parametrize("lie", LIES)
def test_whatever_a_name_server_says_mail_comes_in_and_waits(place: Place, lie: str) -> None:
    over_udp, over_tcp, outcome = LIES[lie]
    with BadNameServer(over_udp, over_tcp) as names:
        server = place.start(ask=None, dns_server=names.place)
        with nothing_left(server, tasks=1):
            with greeted(server) as wire, place.hurrying():
                reply = send(wire, SIGNED, sender=EVA)
            assert reply.startswith("250 "), reply
            assert names.asked
            id = submit(server)
            with place.hurrying():
                wait_for(lambda: f"event={outcome} id={id} " in server.mail_log, "what comes of it")
    found = [path.read_bytes() for path in server.maildir("ana").glob("new/*")]
    assert any(b"DKIM-Signature" in message for message in found)
