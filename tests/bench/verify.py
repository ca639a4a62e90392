# SPDX-License-Identifier: Apache-2.0
"""Verifying a large message next to dkimpy's own `dkim.verify`, in turn: time, and memory.

    python -m tests.bench.verify [--megabytes 25] [--rounds 3]

The message is signed with a relaxed body, its lines by turns text with white space of all
kinds and base64. Each verifies it in a process of its own, from a file; ours reads that in
pieces. What counts is the processor's time for verifying alone, without the start, and
how much the process has grown meanwhile at most (VmHWM). Only the ratios mean anything: a
machine is never as quiet as it seems.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import chasquid

MEGABYTE = 1_000_000
DOMAIN, SELECTOR = "here.example", "bench"
HEADER = b"From: ana@here.example\r\nTo: eva@there.example\r\nSubject: a large message\r\n"
TEXT = (
    b"A line  of text with double  spaces, and one \tof tabs, as people write them;\r\n"
    b"the next ends in white space. \t\r\n"
    b"\r\n"
    b"    And one more, indented, that is as long as lines of text most often are.\r\n"
)


@functools.cache
def key() -> chasquid.DkimKey:
    # made of the same numbers in every process
    p, q = prime_after(2**512 - 2**509), prime_after(2**512 - 2**510)
    d = pow(65537, -1, (p - 1) * (q - 1))
    numbers = (p * q, 65537, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p))
    return chasquid.DkimKey(DOMAIN, SELECTOR, chasquid.RsaKey(*numbers))


def prime_after(number: int) -> int:
    number |= 1
    while pow(2, number - 1, number) != 1 or (number - 1) % 65537 == 0:
        number += 2
    return number


def body(octets: int) -> Iterator[bytes]:
    """Yield text and base64 by turns, of so many octets in all."""
    noise = hashlib.shake_256(b"bench").digest(57 * 600)
    encoded = base64.encodebytes(noise).replace(b"\n", b"\r\n")
    text = TEXT * (len(encoded) // len(TEXT))
    while octets > 0:
        for piece in (text, encoded):
            yield piece[: max(0, octets - 2)] + (b"\r\n" if octets <= len(piece) else b"")
            octets -= len(piece)
            if octets <= 0:
                return


def write_message(path: Path, octets: int) -> None:
    signature = chasquid.sign([key()], HEADER, body(octets), time.time())
    with path.open("wb") as file:
        file.write(signature + HEADER + b"\r\n")
        file.writelines(body(octets))


# --- what is measured, each in a process of its own ---


async def known(name: str, kind: str) -> chasquid.Answer:
    return chasquid.Answer(True, (key().record,), 60.0)


def verify_ours(path: str) -> bool:
    message = chasquid.Message(b"", path, os.path.getsize(path))
    header = message.header()

    def read() -> Iterator[bytes]:
        skip = len(header) + 2
        for chunk in message.chunks():
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))

    async def verify(loop: chasquid.Loop) -> list[chasquid.Signature]:
        names = chasquid.Names(loop, known)
        fields = chasquid.header_fields(header)
        return await chasquid.verify_signatures(names, loop, fields, read)

    return [one.result for one in on_loop(verify)] == ["pass"]


def on_loop(main: Callable[[chasquid.Loop], Coroutine[Any, Any, Any]]) -> Any:
    def on_crash(name: str, error: BaseException) -> None:
        raise error

    workers = chasquid.Workers(1)
    loop = chasquid.Loop(chasquid.Clock(), workers, on_crash)
    try:
        return loop.run(main(loop))
    finally:
        workers.close()
        loop.close()


def verify_dkimpy(path: str) -> bool:
    import dkim

    data = Path(path).read_bytes()
    return bool(dkim.verify(data, dnsfunc=lambda name, timeout=0: key().record.encode()))


VERIFIERS = {"chasquid": verify_ours, "dkimpy": verify_dkimpy}


def peak() -> int:
    """Return the most memory that this process has had, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure_here(name: str, path: str, small: str) -> None:
    verify = VERIFIERS[name]
    assert verify(small)  # loads what is needed, so that it counts for neither
    before, start = peak(), time.process_time()
    assert verify(path)
    print(time.process_time() - start, peak() - before)


# --- in turn ---


def measure(name: str, path: Path, small: Path) -> tuple[float, float]:
    """Return seconds, and MB by which the process has grown."""
    command = [sys.executable, "-m", "tests.bench.verify", "--measure", name, str(path), str(small)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) / 1024


def compare(megabytes: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        paths = {size: Path(directory, f"{size}.eml") for size in (0, megabytes, 2 * megabytes)}
        for size, path in paths.items():
            write_message(path, size * MEGABYTE or 1000)
        times: dict[str, list[float]] = {name: [] for name in VERIFIERS}
        grown: dict[str, list[float]] = {name: [] for name in VERIFIERS}
        for _ in range(rounds):
            for name in VERIFIERS:
                seconds, megabytes_more = measure(name, paths[megabytes], paths[0])
                times[name].append(seconds)
                grown[name].append(megabytes_more)
                print(f"{name:9} {seconds:6.2f} s   {megabytes_more:7.1f} MB more", flush=True)
        ratios = [ours / theirs for ours, theirs in zip(*times.values(), strict=True)]
        print(f"chasquid/dkimpy, time:           {spread(ratios)}")
        ratios = [ours / theirs for ours, theirs in zip(*grown.values(), strict=True)]
        print(f"chasquid/dkimpy, growth:         {spread(ratios)}")
        seconds, megabytes_more = measure("chasquid", paths[2 * megabytes], paths[0])
        print(f"chasquid, twice as large:        {seconds:.2f} s, {megabytes_more:.1f} MB more")


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_here(*arguments.measure)
    else:
        compare(arguments.megabytes, arguments.rounds)
