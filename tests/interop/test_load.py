# SPDX-License-Identifier: Apache-2.0
"""More than a server can take: many sessions of all kinds, too many, and a long queue."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import load
import pytest
from bench.growth import fill_queue
from load import Far, Traffic, arrived, busy_server, held, misdelivered, overload
from support import wait_for

from .server import USERS, WORLD, Chasquid
from .tools import free_port, unavailable

SESSIONS = int(os.environ.get("SESSIONS", "10000"))  # half of them before memory is looked at
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
        traffic = Traffic(server)
        asyncio.run(some(traffic, SESSIONS // 2))
        before = held(server.pid)
        asyncio.run(some(traffic, SESSIONS // 2))
        wait_for(
            lambda: held(server.pid).descriptors <= before.descriptors, "all descriptors closed"
        )
        after = held(server.pid)
        assert after.threads <= before.threads
        # half a kilobyte for each session would be seen
        assert after.memory - before.memory < SESSIONS / 2 * 0.5 / 1024 + 0.5, (before, after)
        assert not server.queue_ids()
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
