# SPDX-License-Identifier: Apache-2.0
"""How long the server takes from exec to its first 220, and how large its archive is.

    python -m tests.bench.start [--archive FILE] [--vs FILE] [--runs 60]

The measure is an interpreter that does nothing, `python3 -I -S -c pass`, which runs before
each start, so that a machine that is slow for a while is slow for both. Without --archive
an archive is built for this Python. The server has one domain, one user and a certificate;
its socket is handed to it as systemd does, and the client is connected before it starts, so
that nothing polls. Each figure is the median: wall time until the 220, the processor time
that the process had used by then, and the ratio of both to the empty interpreter's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.logins import make_config

HERE = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-I", "-S"]
GREETING_SECONDS = 60


class Start(NamedTuple):
    """What one start took, in milliseconds."""

    wall: float
    processor: float


def measured(command: Sequence[str], raw: socket.socket | None, until: Callable[[], None]) -> Start:
    """Run a command until `until` returns; with `raw` as systemd's first socket, if it is given."""
    begin = time.perf_counter()
    pid = os.fork()
    if not pid:
        environment = dict(os.environ)
        if raw:
            environment |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
            environment |= {"LISTEN_FDNAMES": "smtp"}
            os.dup2(raw.fileno(), 3)
            os.set_inheritable(3, True)
        os.execve(command[0], command, environment)
    until()
    wall = time.perf_counter() - begin
    if raw:
        os.kill(pid, signal.SIGKILL)
    _, _, usage = os.wait4(pid, 0)
    wall = wall if raw else time.perf_counter() - begin
    return Start(wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000)


def empty() -> Start:
    """What the interpreter takes to do nothing."""
    return measured([*PYTHON, "-c", "pass"], None, lambda: None)


def server(archive: Path, directory: Path) -> Start:
    """What the server in `archive` takes to say 220."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(raw.getsockname()))
        client.settimeout(GREETING_SECONDS)

        def greeted() -> None:
            assert client.recv(100).startswith(b"220 "), f"{archive} gave no greeting"

        command = [*PYTHON, str(archive), "--config-dir", str(directory), "serve"]
        return measured(command, raw, greeted)


def built(directory: Path) -> Path:
    """An archive of this checkout for this Python."""
    path = directory / "chasquid.pyz"
    words = ["--cache", str(HERE / ".cache"), "--output", str(path), "--pythons", sys.executable]
    subprocess.run([sys.executable, str(HERE / "build_zipapp.py"), *words], check=True)
    return path


def report(name: str, rounds: Sequence[tuple[Start, Start]]) -> None:
    """Print the medians of (empty interpreter, server) and of their ratios."""
    for kind in Start._fields:
        pairs = [(getattr(idle, kind), getattr(start, kind)) for idle, start in rounds]
        middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
        ratio = statistics.median(start / idle for idle, start in pairs)
        print(
            f"{name:32} {kind:9} {middle[1]:6.1f} ms, empty {middle[0]:5.1f} ms,"
            f" ratio of medians {middle[1] / middle[0]:5.2f}, median of ratios {ratio:5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--vs", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--runs", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name, "config")
        make_config(directory, 0)
        with open(directory / "chasquid.conf", "a", encoding="utf-8") as stream:
            stream.write('smtp_address: "systemd"\n')
        archives = [arguments.archive or built(Path(name)), *arguments.vs]
        rounds: dict[Path, list[tuple[Start, Start]]] = {path: [] for path in archives}
        for number in range(arguments.runs + 1):
            for path in archives:
                pair = empty(), server(path.resolve(), directory)
                if number:  # the first is for the disk cache
                    rounds[path].append(pair)
        for path in archives:
            report(f"{path.name}, {path.stat().st_size / 1000:,.0f} kB", rounds[path])


if __name__ == "__main__":
    main()
