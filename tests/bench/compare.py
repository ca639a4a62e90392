# SPDX-License-Identifier: Apache-2.0
"""chasquid next to Postfix on the same machine, in turn: messages a second, and memory.

    python -m tests.bench.compare [--messages 3000] [--rounds 3]

smtp-source sends over ten sessions with many messages a connection; a message counts
when it is in the Maildir. Memory is the largest sum, over the processes of a server, of
what each has for itself and its share of the rest (PSS), while ten messages of 25 MB come
in at once. Only the ratios mean anything: a machine is never as quiet as it seems.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it

from tests.interop.peers import MailboxPeer, NameServer, Postfix
from tests.interop.server import Chasquid
from tests.interop.tools import LOOPBACK, program, wait_for

SESSIONS = 10
SMALL = 5_000
LARGE = 25_000_000
SECONDS = 300.0


def send(port: int, address: str, count: int, size: int) -> None:
    command = [program("smtp-source"), "-s", str(SESSIONS), "-m", str(count), "-l", str(size), "-d"]
    command += ["-f", "load@source.example", "-t", address, f"{LOOPBACK}:{port}"]
    subprocess.run(command, check=True, timeout=SECONDS)


def deliver(maildir: Path, port: int, address: str, count: int, size: int) -> float:
    """Send `count` messages and return the seconds until all are in the Maildir."""
    new = maildir / "new"
    before = len(os.listdir(new)) if new.is_dir() else 0

    def arrived() -> bool:
        return new.is_dir() and len(os.listdir(new)) >= before + count

    start = time.perf_counter()
    send(port, address, count, size)
    wait_for(arrived, f"{count} messages in {maildir}", SECONDS)
    return time.perf_counter() - start


class Memory:
    """Watches the memory of a process and all that it started; `peak` is in kB."""

    def __init__(self, pid: int) -> None:
        self._session = os.getsid(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = 0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, sum(map(pss, self._processes())))

    def _processes(self) -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.getsid(int(name)) == self._session:
                    found.append(int(name))
            except ProcessLookupError:
                pass
        return found


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended meanwhile
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def servers(directory: Path, names: NameServer) -> dict[str, tuple[MailboxPeer | Chasquid, str]]:
    """Return the servers to compare, each with an address that it has a Maildir for."""
    user = "ana@here.example"
    postfix = Postfix(
        directory / "postfix",
        settings={"message_size_limit": 50_000_000, "virtual_mailbox_limit": 0},
    )
    return {
        "chasquid": (Chasquid(directory / "chasquid", names, users={user: "secret"}), user),
        "Postfix": (postfix, "dora@dest.example"),
    }


def pid_of(server: MailboxPeer | Chasquid) -> int:
    """Return the process that the others descend from; Postfix starts it by a detour."""
    if isinstance(server, Chasquid):
        return server.pid
    return int((server.directory / "queue/pid/master.pid").read_text())


def port_of(server: MailboxPeer | Chasquid) -> int:
    return server.smtp_port if isinstance(server, Chasquid) else server.port  # type: ignore[attr-defined]


def compare(messages: int, rounds: int) -> None:
    rates: dict[str, list[float]] = {"chasquid": [], "Postfix": []}
    peaks: dict[str, list[int]] = {"chasquid": [], "Postfix": []}
    for _ in range(rounds):
        # each round anew, for a directory of many thousand files slows both
        with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary, NameServer() as names:
            os.chmod(temporary, 0o755)  # Postfix delivers as a user of its own
            for name, (server, address) in servers(Path(temporary), names).items():
                with server:
                    maildir, port = server.maildir(address), port_of(server)
                    deliver(maildir, port, address, SESSIONS, SMALL)  # warms up
                    seconds = deliver(maildir, port, address, messages, SMALL)
                    rates[name].append(messages / seconds)
                    with Memory(pid_of(server)) as memory:
                        deliver(maildir, port, address, SESSIONS, LARGE)
                    peaks[name].append(memory.peak)
                rate, peak = rates[name][-1], peaks[name][-1] / 1024
                print(f"{name:9} {rate:7.0f} messages/s   {peak:6.1f} MB", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    print(f"chasquid/Postfix, messages a second: {spread(ratios)}")
    ratios = [ours / theirs for ours, theirs in zip(*peaks.values(), strict=True)]
    print(f"chasquid/Postfix, peak memory:       {spread(ratios)}")


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    compare(arguments.messages, arguments.rounds)
