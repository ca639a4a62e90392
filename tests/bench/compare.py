# SPDX-License-Identifier: Apache-2.0
"""chasquid.pyz next to other servers on the same machine, in turn: speed, processor, memory.

    python -m tests.bench.compare [--rounds 3] [--share 1.0] [--load WORD …] [--server WORD …]
                                  [--readme README.md]

Each load is sent to each server in each round, the servers in turn, each anew; a message counts
when it is in the Maildir. A figure is a ratio to what Postfix had in the same round: of messages
a second; of processor time a message, of all processes of a server; and of the most memory
that these have, each for itself and its share of the rest (PSS), while ten messages of 25 MB come
in at once. The median of the rounds is given, and between which bounds they were. --share sends
so much less, --load and --server leave out others, and --readme writes the part on speed.

Loads with logins are sent by this program, over TLS from the start; all others by
smtp-source. Each server has an ext4 of its own, made anew on a loop device: ext4 looks at each
file that was removed in the last minutes before it makes another one, so in a directory beside
the others' each would pay for those before it. The disk below is the machine's, or it is in memory,
or takes 8 ms for a flush; see `disks`. Only the ratios mean anything: a machine is never as quiet
as it seems.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import os
import platform
import re
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it

from disks import Disk, make_file_system, mounted

from tests.bench.servers import PASSWORD, RECIPIENT, RECORDS, USER, Server, installed
from tests.interop.peers import NameServer
from tests.interop.tools import LOOPBACK, program, wait_for

SMALL = 5_000
LARGE = 25_000_000
SECONDS = 300.0
LOAD_SECONDS = 15.0  # about the longest that a load lasts; a slow server is sent less
FLUSH_SECONDS = 0.008
MEGABYTES = 512
TICKS = os.sysconf("SC_CLK_TCK")
POSTFIX = "Postfix"


class Load(NamedTuple):
    """What is sent, and how."""

    name: str
    messages: int
    sessions: int = 10
    each: int = 0  # messages a connection; 0: as many as there are
    logins: bool = False
    disk: str = "local"
    size: int = SMALL  # octets of a message


LOADS = (
    Load("ten sessions, many messages each", 2000),
    Load("ten sessions, a connection for each message", 1000, each=1),
    Load("one session", 600, sessions=1),
    Load("submission, many messages a login", 1000, logins=True),
    Load("submission, a login for each message", 200, each=1, logins=True),
    Load("slow disk: ten sessions", 500, disk="slow"),
    Load("slow disk: one session", 100, sessions=1, disk="slow"),
    Load("messages of 100 kB: ten sessions", 500, size=100_000),
    Load("messages of 1 MB: ten sessions", 100, size=1_000_000),
    Load("messages of 100 kB, slow disk: one session", 50, sessions=1, disk="slow", size=100_000),
    Load("disk in memory: ten sessions", 2000, disk="memory"),
    Load("disk in memory: one session", 600, sessions=1, disk="memory"),
)
PEAK = "peak of memory"


# --- sending ---


def send(server: Server, load: Load, count: int) -> None:
    if load.logins:
        share, rest = divmod(count, load.sessions)
        shares = [share + (number < rest) for number in range(load.sessions)]
        with concurrent.futures.ThreadPoolExecutor(load.sessions) as pool:
            list(pool.map(lambda messages: submit(server.tls_port, messages, load.each), shares))
        return
    command = [program("smtp-source"), "-s", str(load.sessions), "-m", str(count)]
    command += ["-l", str(load.size)]
    command += [] if load.each else ["-d"]
    command += ["-f", "load@source.example", "-t", RECIPIENT, f"{LOOPBACK}:{server.port}"]
    subprocess.run(command, check=True, timeout=SECONDS)


def submit(port: int, messages: int, each: int) -> None:
    """Send messages with logins, one after another, `each` a connection."""
    while messages > 0:
        part = min(messages, each or messages)
        with submission(port) as session:
            for _ in range(part):
                session.ask(f"MAIL FROM:<{USER}>", f"RCPT TO:<{RECIPIENT}>", "DATA", MESSAGE)
        messages -= part


HEADER = f"From: {USER}\r\nTo: {RECIPIENT}\r\nDate: Fri, 27 Nov 2026 08:00:00 +0000\r\n\r\n"
MESSAGE = HEADER + ("x" * 76 + "\r\n") * ((SMALL - len(HEADER)) // 78) + "."


class Session:
    """A client that waits for each reply, and takes none that refuses."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw
        self._replies = raw.makefile("rb")
        self._reply()

    def ask(self, *lines: str) -> None:
        for line in lines:
            self._raw.sendall(line.encode() + b"\r\n")
            self._reply()

    def _reply(self) -> None:
        while (line := self._replies.readline())[3:4] == b"-":
            pass
        if line[:1] not in (b"2", b"3"):
            raise AssertionError(f"the server says {line!r}")


@contextlib.contextmanager
def submission(port: int) -> Iterator[Session]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((LOOPBACK, port), timeout=60) as raw,
        context.wrap_socket(raw) as encrypted,
    ):
        encrypted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        session = Session(encrypted)
        secret = base64.b64encode(f"\0{USER}\0{PASSWORD}".encode()).decode()
        session.ask("EHLO source.example", f"AUTH PLAIN {secret}")
        yield session
        session.ask("QUIT")


def deliver(server: Server, load: Load, count: int) -> float:
    """Send `count` messages and return the seconds until all are in the Maildir."""
    new = server.maildir(RECIPIENT) / "new"
    before = len(os.listdir(new)) if new.is_dir() else 0

    def arrived() -> bool:
        return new.is_dir() and len(os.listdir(new)) >= before + count

    start = time.perf_counter()
    send(server, load, count)
    wait_for(arrived, f"{count} messages in {new}", SECONDS)
    return time.perf_counter() - start


# --- measuring ---


def processes(sessions: Sequence[int]) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(name)) in sessions:
                found.append(int(name))
    return found


def processor(sessions: Sequence[int]) -> float:
    """Return the seconds of processor time so far, of those processes that have ended as well."""
    ticks = 0
    for pid in processes(sessions):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            # utime, stime, and both of the children that were waited for
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


class Memory:
    """Watches the memory of all processes of some sessions; `peak` is in MB."""

    def __init__(self, sessions: Sequence[int]) -> None:
        self._sessions = sessions
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = 0.0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, sum(map(pss, processes(self._sessions))) / 1024)


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended meanwhile
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@contextlib.contextmanager
def place(disk: str) -> Iterator[tuple[Path, Disk | None]]:
    """A directory on such a disk, for one server; and the disk, where it counts flushes."""
    slow = None
    with contextlib.ExitStack() as stack:
        base = "/dev/shm" if disk == "memory" else "/var/tmp"
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=base)))
        os.chmod(path, 0o755)  # Postfix delivers as a user of its own
        if disk == "slow":
            slow = Disk(path / "disk", megabytes=MEGABYTES, flush_seconds=FLUSH_SECONDS)
            path = stack.enter_context(slow).path
        else:
            image = path / "image"
            write_zeros(image)  # or a flush would have to find room on the disk below, too
            make_file_system(image)
            path = stack.enter_context(mounted(image))
        yield path, slow


def write_zeros(path: Path) -> None:
    with path.open("xb") as file:
        for _ in range(MEGABYTES):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())


class Figures(NamedTuple):
    """What a server did under a load in one round."""

    rate: float  # messages a second
    processor: float  # milliseconds a message
    flushes: float  # for each message, where the disk counts them


class Results:
    """All figures: for a kind of figure and a server, those of the rounds."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = {}

    def add(self, kind: str, server: str, value: float) -> None:
        self._values.setdefault((kind, server), []).append(value)

    def median(self, kind: str, server: str) -> float:
        return statistics.median(self._values[kind, server])

    def figure(self, kind: str, server: str) -> str:
        return f"{self.median(kind, server):.2f}" if (kind, server) in self._values else "–"

    def ratio(self, kind: str, server: str) -> str:
        """Return the median of the ratios to Postfix, and their bounds."""
        ours = self._values.get((kind, server))
        if not ours:
            return "–"
        pairs = zip(ours, self._values[kind, POSTFIX], strict=True)
        ratios = [value / theirs for value, theirs in pairs]
        spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
        return f"{statistics.median(ratios):.2f}{spread}"


def run_load(server: Server, load: Load, disk: Disk | None, share: float) -> Figures:
    deliver(server, load, load.sessions)  # warms up
    pilot = 2 * load.sessions
    most = pilot * LOAD_SECONDS / deliver(server, load, pilot)
    count = max(load.sessions, round(min(load.messages, most) * share))
    sessions = server.sessions(load.logins)
    before = processor(sessions)
    flushes = disk.flushes if disk else 0
    seconds = deliver(server, load, count)
    flushes = disk.flushes - flushes if disk else 0
    used = processor(sessions) - before
    return Figures(count / seconds, used * 1000 / count, flushes / count)


def run_round(results: Results, loads: Sequence[Load], names: Sequence[str], share: float) -> None:
    kinds = {name: kind for name, kind in installed().items() if name in names}
    for load in loads:
        for name, kind in kinds.items():
            with (
                place(load.disk) as (path, disk),
                NameServer(RECORDS) as dns,
                kind(path / "s", dns) as server,
            ):
                if load.logins and not server.tls_port:
                    continue
                figures = run_load(server, load, disk, share)
                results.add(load.name, name, figures.rate)
                results.add(processor_of(load), name, figures.processor)
                results.add(flushes_of(load), name, figures.flushes)
                if load is LOADS[0]:
                    with Memory(server.sessions(False)) as memory:
                        deliver(server, load._replace(size=LARGE), load.sessions)
                    results.add(PEAK, name, memory.peak)
                    show(PEAK, name, f"{memory.peak:.1f} MB")
            words = [f"{figures.rate:.0f} messages/s", f"{figures.processor:.2f} ms of processor"]
            words += [f"{figures.flushes:.2f} flushes"] if disk else []
            show(load.name, name, *words)


def flushes_of(load: Load) -> str:
    return f"flushes a message: {load.name}"


def processor_of(load: Load) -> str:
    return f"processor time: {load.name}"


def show(*words: str) -> None:
    print("   ".join(words), flush=True)


# --- the table ---


def table(results: Results, loads: Sequence[Load], names: Sequence[str]) -> str:
    """Return the table, as Markdown."""
    others = [name for name in names if name != POSTFIX]
    rows = [["", *others, POSTFIX], ["---"] * (len(others) + 2)]

    def row(kind: str, unit: str) -> None:
        theirs = f"{results.median(kind, POSTFIX):.3g} {unit}"
        rows.append([kind, *[results.ratio(kind, name) for name in others], theirs])

    for load in loads:
        row(load.name, "/s")
    for load in loads:
        if load.disk == "local":
            row(processor_of(load), "ms")
    if LOADS[0] in loads:
        row(PEAK, "MB")
    for load in loads:
        if load.disk == "slow":
            kind = flushes_of(load)
            rows.append([kind, *[results.figure(kind, name) for name in (*others, POSTFIX)]])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def conditions(rounds: int) -> str:
    cores = len(os.sched_getaffinity(0))
    linux = ".".join(platform.release().split(".")[:2])
    text = f"""\
Measured side by side on a machine with {cores} processors and Linux {linux}, with \
CPython {platform.python_version()}, by `python -m tests.bench.compare --rounds {rounds}`; medians \
of the rounds, and their bounds. Each column is a multiple of what Postfix did in the same round, \
which the last one has: of messages a second more is better; of processor time a message, and of \
memory while ten messages of 25 MB come in, less. Messages have 5 kB, where nothing else is said, \
and count once they are in a Maildir. Each server has a file system of its own (ext4, made anew) \
and is set up as its package has it, with its checks of senders, its syncs and its hash of \
passwords (Postfix with Dovecot's); chasquid.pyz remembers for a while a login that was right, so \
that it need not hash again. A slow disk takes 8 ms for a flush. How often a server has the disk \
flush is no multiple; with one session, one that does so less than once a message says 250 before \
the message is safe from a power cut. aiosmtpd only receives.
"""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def write_readme(path: Path, text: str) -> None:
    """Put `text` below the heading "Speed", which comes before "Development" where it is new."""
    part = f"## Speed\n\n{text}\n"
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(r"^## Speed\n.*?(?=^## )", lambda _: part, old, flags=re.M | re.S)
    if not count:
        new = old.replace("\n## Development\n", f"\n{part}## Development\n")
    path.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--load", nargs="*", default=[""], help="words in the names of loads")
    parser.add_argument("--server", nargs="*", default=[""], help="words in their names")
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    loads = [load for load in LOADS if any(word in load.name for word in arguments.load)]
    names = [
        name
        for name in installed()
        if name == POSTFIX or any(word in name for word in arguments.server)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the servers end too
    results = Results()
    start = time.monotonic()
    for number in range(arguments.rounds):
        show(f"round {number + 1}, after {time.monotonic() - start:.0f} s")
        run_round(results, loads, names, arguments.share)
    text = table(results, loads, names)
    print(text)
    if arguments.readme:
        write_readme(arguments.readme, f"{conditions(arguments.rounds)}\n{text}")


if __name__ == "__main__":
    main()
