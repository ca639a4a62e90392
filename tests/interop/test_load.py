# SPDX-License-Identifier: Apache-2.0
"""More than a server can take: many sessions of all kinds, too many, and a long queue."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import load
import pytest
from bench.growth import fill_queue
from load import Far, Held, InUse, Traffic, arrived, busy_server, held, misdelivered, overload
from support import wait_for

from chasquid import ChasquidError, ask_running_server

from .server import USERS, WORLD, Chasquid
from .tools import free_port, unavailable

SESSIONS = int(
    os.environ.get("SESSIONS", "10000")
)  # memory is looked at after a half and at the end
SECONDS = float(os.environ.get("LOAD_SECONDS", "20"))
WAITING = 100_000


@pytest.fixture
def ports() -> tuple[int, int]:
    """Where the other server is, and where metrics are."""
    return free_port(), free_port()


def test_ten_thousand_sessions_of_mixed_ends_leave_nothing(place, ports) -> None:
    """Good mail, and each way to be hostile, in turn; so twice, the second time as the first."""

    async def some(traffic: Traffic, count: int) -> None:
        kinds = list(load.HOSTILE)
        places = asyncio.Semaphore(50)

        async def one(number: int) -> None:
            async with places:
                if number % 2:
                    await traffic.deliver(traffic.new_letter())
                else:
                    # the slow ones in turn with fifty quick ones, or this would take an hour
                    slow = number % 100 == 0
                    names = list(load.SLOW if slow else load.QUICK)
                    await traffic.be_hostile(names[number // (100 if slow else 2) % len(names)])

        await asyncio.gather(*map(one, range(count)))
        assert set(traffic.ends) == set(kinds)

    with busy_server(place / "server", *ports) as server:
        traffic, half = Traffic(server), SESSIONS // 2
        asyncio.run(traffic.deliver(traffic.new_letter()))
        idle, tasks = held(server.pid).descriptors, server.in_use().tasks

        def after_half() -> tuple[Held, InUse]:
            asyncio.run(some(traffic, half))
            wait_for(lambda: held(server.pid).descriptors <= idle, "all descriptors to be closed")
            wait_for(lambda: server.in_use().tasks <= tasks, "all tasks to end")
            return held(server.pid), server.in_use()

        (before, used_before), (after, used_after) = after_half(), after_half()
        told = f"{used_before}, then {used_after}"
        assert after.threads <= before.threads
        # one object that is left of each session would be seen, or a hundred octets
        assert used_after.objects - used_before.objects < half / 4 + 500, told
        assert used_after.octets - used_before.octets < half * 100 + 200_000, told
        assert not waiting(server)
        assert not list((server.data_dir / "queue" / "tmp").iterdir())
        assert not misdelivered(traffic.letters, arrived(server))
        assert "event=crash" not in server.log()


def test_at_twice_what_it_takes_it_sheds_and_all_good_mail_arrives(place, ports) -> None:
    async def all_of_it() -> load.Outcome:
        far = Far()
        async with far.running(ports[0]):
            return await overload(server, far, SECONDS, times=2.0)

    with busy_server(place / "server", *ports) as server:
        outcome = asyncio.run(all_of_it())
    assert not outcome.wrong, load.report(outcome)
    assert outcome.offered > 1.5 * outcome.capacity, load.report(outcome)


@pytest.fixture
def memory_disk() -> Iterator[Path]:
    """A directory in memory, where so many files are made and removed in no time."""
    if not os.access("/dev/shm", os.W_OK):
        unavailable("/dev/shm cannot be written")
    with tempfile.TemporaryDirectory(prefix="chasquid-", dir="/dev/shm") as name:
        yield Path(name)


# the disk stands before `start`, so that it outlives what is started on it
def test_a_hundred_thousand_waiting_messages_hold_up_nobody(memory_disk, start, names) -> None:
    """They wait for other servers; meanwhile mail comes in and goes out as always."""
    names.records.update(WORLD)
    fill_queue(memory_disk / "queue", WAITING, time.time())  # due in five minutes
    for path in (memory_disk / "queue" / "cur").iterdir():
        os.utime(path, (1, 1))  # as a copy may have it, so all are read at once
    port = free_port()
    server = start(
        Chasquid, names, users=USERS, data_dir=str(memory_disk), outgoing_smtp_port=port,
        max_queue_items=1_000_000,
    )  # fmt: skip
    far, traffic = Far(), Traffic(server)

    async def served(count: int) -> None:
        letters = [traffic.new_letter(far=bool(number % 2)) for number in range(count)]
        taken = sum(far.taken.values()) + count // 2
        async with far.running(port):
            for start in range(0, count, 40):
                await asyncio.gather(*map(traffic.deliver, letters[start : start + 40]))
            while sum(far.taken.values()) < taken:
                await asyncio.sleep(0.05)
        assert not traffic.codes
        assert not misdelivered(letters, arrived(server) + far.taken)

    asyncio.run(asyncio.wait_for(served(200), 60))  # while the queue is still being read

    def all_read() -> bool:
        time.sleep(0.5)  # the log is long
        return server.log().count("event=found") == WAITING

    wait_for(all_read, "all to be read", 60)
    asyncio.run(asyncio.wait_for(served(200), 60))
    assert len(list((memory_disk / "queue" / "cur").iterdir())) == WAITING
    assert held(server.pid).memory < 100 + WAITING / 1024, "more than 1 kB for each"


def waiting(server: Chasquid) -> list[Path]:
    """Return the files of the queue."""
    return [*server.data_dir.glob("queue/new/*"), *server.data_dir.glob("queue/cur/*")]


def test_without_descriptors_mail_waits_and_nothing_breaks(start, names) -> None:
    """The server may open so many files more, or none; then as many as it likes again."""
    names.records.update(WORLD)
    port = free_port()
    server = start(Chasquid, names, users=USERS, outgoing_smtp_port=port)
    hook = server.config_dir / "hooks" / "post-data"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexec cat >/dev/null\n")
    hook.chmod(0o755)
    far, traffic = Far(), Traffic(server)

    async def served() -> Held:
        async with far.running(port):
            await traffic.deliver(traffic.new_letter())
            await traffic.deliver(traffic.new_letter(far=True))
            before = held(server.pid)
            for spare in (0, 1, 2, 3, 5, 8):
                await fill(before.descriptors + spare)
        return before

    async def fill(limit: int) -> None:
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, hard))
        letters = [traffic.new_letter(far=bool(number % 2)) for number in range(10)]
        tasks = [asyncio.create_task(traffic.deliver(letter)) for letter in letters]
        await asyncio.sleep(1.5)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
        await asyncio.gather(*tasks)
        while waiting(server):
            with contextlib.suppress(ChasquidError):
                ask_running_server(str(server.data_dir), "queue-retry", "all")
            await asyncio.sleep(0.1)

    before = asyncio.run(asyncio.wait_for(served(), 120))
    assert not misdelivered(traffic.letters, arrived(server) + far.taken)
    wait_for(lambda: held(server.pid).descriptors <= before.descriptors, "all to be closed")
    assert "event=crash" not in server.log()
    assert traffic.codes["451"] and "Too many open files; pausing" in server.log()
