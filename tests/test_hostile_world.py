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
    """Return what this process, and the loop of `server`, hold now."""
    tasks = [task.name for task in list(server.daemon.loop._tasks)]
    threads = [thread for thread in threading.enumerate() if "worker" not in thread.name]
    children: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children.update(map(int, path.read_text().split()))
    return Held(
        len(os.listdir("/dev/fd")), len(threads),
        len(tasks) - tasks.count("records of DKIM keys"),  # which begins a while after the start
        frozenset(children),
    )  # fmt: skip


@contextlib.contextmanager
def nothing_left(server: Server, tasks: int = 0) -> Iterator[None]:
    """Check that after the block nothing is held that was not held before it.

    But for so many `tasks`: the queue has one that reads what is due.
    """
    wait_for(lambda: server.daemon._loaded.is_set, "the libraries")
    server.settle()
    before = held(server)
    yield

    def given_back() -> Any:
        server.settle()
        now = held(server)
        descriptors = now.descriptors <= before.descriptors
        fits = descriptors and now.threads <= before.threads and now.children <= before.children
        return fits and now.tasks <= before.tasks + tasks

    wait_for(given_back, f"no more than {before}", 5)


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
IN_THE_CLEAR = OPENING.replace("    S: 250-mx.there.example\n    S: 250 STARTTLS", "    S: 250 fine")
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
