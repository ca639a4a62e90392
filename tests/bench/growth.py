# SPDX-License-Identifier: Apache-2.0
"""What a server costs as what it holds grows: none of it may grow faster than that.

    python -m tests.bench.growth [--only WORD]

Each row measures the same thing with a number of somethings and with ten times as many (a
Maildir: a thousand times). Function calls and octets are the same in every run; seconds and the
memory of a process are not, and are only shown. The exit status is 1 if something counted grows
faster than it may.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import MESSAGE, FakeClock, Inline, address, delivery, record, run, unsigned

import chasquid
from tests.bench.logins import free_port, make_config, memory

OURS = "here.example"
TOLERANCE = 1.15
SECONDS = 300.0


class Row(NamedTuple):
    """What is measured, for two sizes; `allowed` is how much more the larger may cost."""

    name: str
    sizes: tuple[int, int]
    measure: Callable[[Path, int], dict[str, float]]
    allowed: float


@contextlib.contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count the functions, ours and those in C, that are called in the block; yield the count."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        yield lambda: count
    finally:
        sys.setprofile(None)


def calls_of(job: Callable[[], object]) -> int:
    """Return how many functions are called by a job."""
    with counting() as count:
        job()
    return count()


def octets_of(job: Callable[[], object]) -> int:
    """Return how much memory is held by what `job` returns."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = job()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] if kept is not None else 0
    finally:
        tracemalloc.stop()


# --- the configuration ---


def make_domains(directory: Path, domains: int = 1, users: int = 1, aliases: int = 1) -> None:
    """Write a configuration directory; the domains are as large as each other."""
    scrypt = 'scrypt: { logN: 14 r: 8 p: 1 keyLen: 32 salt: "c2FsdA==" encrypted: "eA==" }'
    for number in range(domains):
        path = directory / "domains" / f"d{number}.example"
        path.mkdir(parents=True)
        entries = (f'users: {{ key: "u{one}" value: {{ {scrypt} }} }}\n' for one in range(users))
        (path / "users").write_text("".join(entries))
        lines = (f"a{one}: u0, b{one}@far.example\n" for one in range(aliases))
        (path / "aliases").write_text("".join(lines))
    (directory / "chasquid.conf").write_text(f'data_dir: "{directory}/data"\n')


def measure_domains(directory: Path, size: int, what: str) -> dict[str, float]:
    make_domains(directory, **{what: size})
    config = chasquid.load_config(str(directory))
    loaded = chasquid.load_domains(config)
    assert not loaded.problems
    return {
        "calls to read": calls_of(lambda: chasquid.load_domains(config)),
        "calls to read again": calls_of(lambda: chasquid.load_domains(config, loaded.each)),
        "calls to look for changes": calls_of(lambda: chasquid.file_signature(str(directory))),
        "kB": octets_of(lambda: chasquid.load_domains(config)) / 1024,
    }


def measure_expansion(directory: Path, size: int) -> dict[str, float]:
    make_domains(directory, users=size, aliases=size)
    aliases = chasquid.load_domains(chasquid.load_config(str(directory))).aliases
    aliases.expand(f"a{size - 1}@d0.example")
    return {"calls": calls_of(lambda: aliases.expand(f"a{size - 2}@d0.example"))}


async def counted(wait: Awaitable[object]) -> int:
    """As `calls_of`, for something that is awaited."""
    with counting() as count:
        await wait
    return count()


# --- deliveries ---


def measure_maildir(directory: Path, size: int) -> dict[str, float]:
    for part in ("tmp", "new", "cur"):
        (directory / "ana" / part).mkdir(parents=True)
    for number in range(size):
        (directory / "ana" / "cur" / f"{number}.M1P1Q{number}.host,S=1:2,S").touch()

    async def exists(user: str, domain: str) -> bool:
        return True

    async def deliver(loop: chasquid.Loop) -> int:
        disk = chasquid.Disk(loop)
        courier = chasquid.MaildirCourier(
            loop, disk, f"{directory}/%to_user%", "", "host", user_exists=exists
        )
        message = delivery(MESSAGE)
        await courier.deliver(message, [address(f"ana@{OURS}")])
        return await counted(courier.deliver(message, [address(f"ana@{OURS}")]))

    return {"calls": run(deliver, clock=FakeClock(), workers=Inline())}


class Held:
    """A courier whose destinations answer when they are told to."""

    def __init__(self, loop: chasquid.Loop) -> None:
        self.answer = chasquid.Event(loop)
        self.most = 0
        self.delivered = 0

    async def deliver(self, delivery: Any, destinations: Any) -> list[chasquid.Result]:
        await self.answer.wait()
        self.delivered += 1
        return [chasquid.Result(chasquid.State.SENT, "2.0.0", "done")] * len(destinations)


def make_queue(loop: chasquid.Loop, directory: Path, clock: FakeClock, held: Held) -> Any:
    async def itself(name: str) -> list[chasquid.Destination]:
        return [address(name)]

    couriers = chasquid.Couriers(held, held, held, OURS.__eq__)
    settings = chasquid.QueueSettings(str(directory / "queue"), OURS, 72_000, 10**6, "+")
    queue = chasquid.Queue(
        loop, chasquid.Disk(loop), record(directory, clock), settings, couriers,
        itself, OURS.__eq__, lambda: 0.5, unsigned,
    )  # fmt: skip
    queue.recover()
    return queue


def measure_burst(directory: Path, size: int) -> dict[str, float]:
    """Messages for ten destinations that are slow, all at once."""
    clock = FakeClock()

    async def accept(queue: Any, number: int) -> None:
        draft = queue.draft()
        await draft.add(MESSAGE + b"x" * 5000)
        draft.complete()
        to = f"eva@slow{number % 10}.example"
        recipients = (chasquid.FinalRecipient(address(to), to),)
        envelope = chasquid.Envelope(draft.id, f"a@{OURS}", recipients, clock.time(), b"A: b\r\n")
        await queue.accept(draft, envelope, {})

    async def burst(loop: chasquid.Loop) -> dict[str, float]:
        held = Held(loop)
        queue = make_queue(loop, directory, clock, held)
        tracemalloc.start()
        for number in range(size):
            await accept(queue, number)
        gc.collect()
        octets = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()

        async def rest() -> None:
            held.answer.set()
            while queue.count:
                await loop.turn()

        calls = await counted(rest())
        assert held.delivered == size
        return {"kB": octets / 1024, "calls until all are delivered": calls}

    return run(burst, clock=clock, workers=Inline())


# --- a queue that waits ---


def fill_queue(directory: Path, size: int, now: float) -> None:
    """Write messages that were deferred once; they are due in the next minutes."""
    for place in ("tmp", "new", "cur", "bad"):
        (directory / place).mkdir(parents=True)
    for number in range(size):
        id, due = f"{number:013}", now + 300 + number % 600
        to = f"eva@far{number % 1000}.example"
        recipients = (chasquid.FinalRecipient(address(to), to),)
        prefix = b"Received: " + b"x" * 300 + b"\r\n"
        envelope = chasquid.Envelope(id, f"ana@{OURS}", recipients, now - 60, prefix)
        item = chasquid.Item(envelope, chasquid.Message(prefix, "", len(MESSAGE)))
        item.attempts, item.next_attempt = 1, due
        item.recipients[0].result = chasquid.Result(
            chasquid.State.DEFERRED, "4.4.1", "mx.far.example (192.0.2.1:25): connection refused"
        )
        path = directory / "cur" / f"{id},S={len(MESSAGE)}"
        path.write_bytes(MESSAGE + envelope.to_line() + item.journal_line(now))
        os.utime(path, (due, due))


def measure_waiting(directory: Path, size: int) -> dict[str, float]:
    clock = FakeClock()
    fill_queue(directory / "queue", size, clock.time())

    async def start(loop: chasquid.Loop) -> dict[str, float]:
        held = Held(loop)
        made: list[Any] = []

        async def all_read() -> None:
            made.append(make_queue(loop, directory, clock, held))
            while made[0].next_due() == float("-inf"):
                await loop.turn()

        calls = await counted(all_read())
        made.clear()
        gc.collect()
        tracemalloc.start()
        await all_read()
        gc.collect()
        octets = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert made[0].count == size
        return {"calls to read all at the start": calls, "kB": octets / 1024}

    return run(start, clock=clock, workers=Inline())


@contextlib.contextmanager
def serving(directory: Path, *settings: str) -> Iterator[tuple[int, int, float]]:
    """Run a server; give its process id, its port, and the seconds until its first 220."""
    port = free_port()
    make_config(directory, free_port())
    with (directory / "chasquid.conf").open("a") as file:
        file.write(f'smtp_address: "127.0.0.1:{port}"\n' + "".join(f"{s}\n" for s in settings))
    command = [sys.executable, "-m", "chasquid", "--config-dir", str(directory), "serve"]
    start = time.perf_counter()
    with subprocess.Popen(command) as process:
        try:
            while not is_greeted(port):
                assert process.poll() is None and time.perf_counter() - start < SECONDS
                time.sleep(0.01)
            yield process.pid, port, time.perf_counter() - start
        finally:
            process.terminate()


def is_greeted(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), SECONDS) as raw:
            return raw.recv(100).startswith(b"220")
    except OSError:
        return False


def measure_start(directory: Path, size: int) -> dict[str, float]:
    """A server on a queue of deferred messages: its first 220, when it is ready, and memory."""
    fill_queue(directory / "data" / "queue", size, time.time())
    start = time.perf_counter()
    with serving(directory, "max_queue_items: 1000000") as (pid, port, greeting):
        slowest = 0.0
        while "event=ready" not in (directory / "log").read_text():
            assert time.perf_counter() - start < SECONDS
            begin = time.perf_counter()
            assert is_greeted(port)
            slowest = max(slowest, time.perf_counter() - begin)
        return {
            "s to the first 220": greeting, "s until it is ready": time.perf_counter() - start,
            "s of processor until then": processor_seconds(pid),
            "s to the slowest 220 meanwhile": slowest, "MB": memory(pid),
        }  # fmt: skip


def processor_seconds(pid: int) -> float:
    """Return how long a process has kept a processor busy."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure_connections(directory: Path, size: int) -> dict[str, float]:
    """What a process has grown by, with connections that have said EHLO and wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * size)), hard))
    with contextlib.ExitStack() as stack:
        pid, port, _ = stack.enter_context(
            serving(
                directory,
                "max_connections: 100000",
                "max_connections_per_address: 100000",
                "max_connections_per_minute: 100000",
            )
        )
        before = memory(pid)
        for _ in range(size):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), SECONDS))
            assert raw.recv(1000).startswith(b"220")
            raw.sendall(b"EHLO client.example\r\n")
            assert raw.recv(1000).startswith(b"250")
        return {"MB more": memory(pid) - before, "MB in all": memory(pid)}


ROWS = [
    Row("aliases", (10_000, 100_000), functools.partial(measure_domains, what="aliases"), 10),
    Row("users", (1_000, 10_000), functools.partial(measure_domains, what="users"), 10),
    Row("domains", (100, 1_000), functools.partial(measure_domains, what="domains"), 10),
    Row("an alias among", (1_000, 10_000), measure_expansion, 1),
    Row("into a Maildir of", (100, 100_000), measure_maildir, 1),
    Row("burst for ten slow", (1_000, 10_000), measure_burst, 10),
    Row("waiting messages", (1_000, 10_000), measure_waiting, 10),
    Row("start with a queue of", (1_000, 100_000), measure_start, 100),
    Row("idle connections", (100, 1_000), measure_connections, 10),
]
_SHOWN_ONLY = ("s ", "MB")  # what a machine that is busy, or an allocator, may change


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="rows with this word in their name")
    parser.add_argument("--dir", help="a directory for what is written (default: in memory)")
    arguments = parser.parse_args()
    place = arguments.dir or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
    worse = False
    for row in ROWS:
        if arguments.only not in row.name:
            continue
        costs = []
        for size in row.sizes:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                costs.append(row.measure(Path(directory), size))
        for what, small in costs[0].items():
            large = costs[1][what]
            grown = large / small if small else 0.0
            bad = grown > row.allowed * TOLERANCE and not what.startswith(_SHOWN_ONLY)
            worse = worse or bad
            verdict = f"WORSE THAN {row.allowed:g} TIMES" if bad else ""
            sizes = "{:,} to {:,}".format(*row.sizes)
            print(f"{row.name:22} {sizes:19} {what:31} {small:12,.1f} {large:14,.1f} "
                  f"{grown:7.2f} times {verdict}", flush=True)  # fmt: skip
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
