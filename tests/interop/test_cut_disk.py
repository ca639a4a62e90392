# SPDX-License-Identifier: Apache-2.0
"""The power goes, below a real file system, while mail comes in.

A server works on an ext4 that loses what was not flushed. While clients send letters, for
mailboxes that are made for the first time and for other servers, its disk is copied as a cut
would leave it. From each copy a server is started, and every letter that had got its 250 by
then must be in its mailbox, in the queue, or at the other server, and whole.

CUT_ROUNDS says how often that is done (1).
"""

from __future__ import annotations

import os
import random
import re
import smtplib
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from disks import Disk, mounted
from support import wait_for

import chasquid as module

from .peers import NameServer
from .server import Chasquid
from .tools import LOOPBACK, free_port, need_disks, program

ROUNDS = int(os.environ.get("CUT_ROUNDS", "1"))
CUTS = ("none", "random", "all", "random")
CLIENTS = 4
USERS = [f"user{number}@here.example" for number in range(40)]
LARGE = 300_000
MEGABYTES = 192


@pytest.fixture(autouse=True)
def needs() -> None:
    need_disks()


class Cut(NamedTuple):
    """A disk after a cut, what was accepted before it, and what others have got."""

    image: Path
    accepted: dict[str, list[str]]  # by label: who must have the letter
    taken: list[str]  # labels


def body(label: str) -> str:
    """Return what a letter says; how many lines, its label tells."""
    return f"{label:.<76}\n" * int(label.rpartition("x")[2]) + f"end of {label}\n"


class Letters:
    """Clients that send letters at the same time until they are stopped."""

    def __init__(self, port: int) -> None:
        self.accepted: dict[str, list[str]] = {}
        self._port = port
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=[number]) for number in range(CLIENTS)
        ]

    def __enter__(self) -> Letters:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures, self._failures

    def _run(self, number: int) -> None:
        try:
            chance = random.Random(number)
            with smtplib.SMTP(LOOPBACK, self._port, timeout=60) as client:
                client.ehlo()
                count = 0
                while not self._stop.is_set():
                    count += 1
                    lines = LARGE // 77 if chance.random() < 0.03 else chance.randint(1, 60)
                    self._send(client, f"c{number}n{count}x{lines}", chance)
        except BaseException as error:
            self._failures.append(error)

    def _send(self, client: smtplib.SMTP, label: str, chance: random.Random) -> None:
        recipients = chance.choice(
            [
                [chance.choice(USERS)],
                chance.sample(USERS, 3),
                ["far@here.example"],
                ["busy@here.example"],
                [chance.choice(USERS), "far@here.example", "busy@here.example"],
            ]
        )
        text = f"Subject: {label}\n\n{body(label)}"
        client.sendmail("eva@there.example", recipients, text)
        self.accepted[label] = recipients


class Found:
    """Letters on a disk, by label and recipient."""

    def __init__(self, data_dir: Path) -> None:
        self.copies: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        for path in data_dir.glob("mail/here.example/*/[nc]*/*"):
            self._add(path.read_bytes(), [f"{path.parent.parent.name}@here.example"], str(path))
        contents = module.read_queue(str(data_dir / "queue"))
        self.problems += [str(why) for why in (contents.unreadable, contents.unread) if why]
        self.problems += [str(path) for path in data_dir.glob("queue/bad/*")]
        for item in contents.items:
            whose = [recipient.original for recipient in item.recipients if recipient.is_open]
            self._add(b"".join(item.message.chunks()), whose, item.message.path)

    def _add(self, data: bytes, recipients: list[str], path: str) -> None:
        text = data.replace(b"\r\n", b"\n").decode("ascii", "replace")
        subject = re.search(r"^Subject: (c\d+n\d+x\d+)$", text, re.MULTILINE)
        label = subject[1] if subject else ""
        if not label or not text.endswith(f"\n\n{body(label)}"):
            self.problems.append(f"{path} is in part: {len(data)} octets")
        self.copies.update((label, recipient) for recipient in recipients)


def keywords_for(data_dir: Path, far_port: int) -> dict[str, Any]:
    far, busy = f"{LOOPBACK}:{far_port}", f"{LOOPBACK}:{free_port()}"
    return {
        "users": dict.fromkeys(USERS, "secret"),
        "aliases": {
            "here.example": f"far: eva@there.example via {far}\n"
            f"busy: eva@there.example via {busy}\n"
        },
        "data_dir": str(data_dir),
        "max_queue_items": 100_000,
    }


def cuts_under_load(
    server: Chasquid, disk: Disk, taken: Callable[[], list[str]], chance: random.Random
) -> list[Cut]:
    """Let letters come in, and cut the disk's power now and then; it goes on all the same."""
    cuts = []
    with Letters(server.smtp_port) as letters:
        for survives in CUTS:
            count = len(letters.accepted) + 10
            wait_for(lambda count=count: len(letters.accepted) > count, "letters to be accepted")
            time.sleep(chance.uniform(0, 1))
            accepted = letters.accepted.copy()
            image = disk.cut(survives, chance.randrange(1000))
            cuts.append(Cut(image, accepted, taken()))
    return cuts


def found_after(cut: Cut, server: Chasquid) -> Found:
    """Start a server on what a cut has left, and return what is there then."""
    with mounted(cut.image) as path:
        server.settings["data_dir"] = str(path / "data")
        server.write_settings()
        server.start()
        with server.smtp() as client:  # it answers when it has taken up what was there
            client.noop()
        server.stop()
        return Found(path / "data")


RUN = """
import shutil, sys
from pathlib import Path
shutil.rmtree = lambda path: None  # it would not be recorded
import test_cut_disk
for op in test_cut_disk.run(test_cut_disk.WAYS["all kinds"], Path(sys.argv[1])):
    if op.kind != "mark":
        print(op.kind.replace(" ", "-"), op.path or "-", op.other or "-", len(op.data))
"""
CHANGING = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,truncate,ftruncate,fallocate,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "copy_file_range,sendfile,splice,mmap"
)
NAMED = ("rename", "link", "symlink", "unlink", "mkdir", "rmdir")


def seen_by_kernel(trace: str, disk: Path) -> Counter[tuple[str, ...]]:
    """Return the calls that changed something below `disk`, from what strace has written."""
    found: Counter[tuple[str, ...]] = Counter()
    for name, arguments, result in re.findall(r"^(\w+)\((.*)\) += (\d+)", trace, re.MULTILINE):
        paths = re.findall(rf'"{disk}/([^"]+)"', arguments)
        on_file = re.match(rf"\d+<{disk}/", arguments)
        kind = name.removesuffix("2").removesuffix("at")
        if on_file and name in ("write", "pwrite64"):
            found["write", result] += 1
        elif paths and name == "openat":
            if "O_CREAT" in arguments:
                found["create", *paths] += 1
        elif paths and kind in NAMED:
            found[kind, *paths] += 1
        elif (
            paths
            or on_file
            or name == "mmap"
            and f"<{disk}/" in arguments
            and "MAP_SHARED" in arguments
        ):
            found[name, arguments] += 1
    return found


def test_no_call_passes_by_the_recorder(place: Path) -> None:
    tests, disk = Path(__file__).resolve().parent.parent, place / "run" / "disk"
    command = [program("strace"), "-ff", "-y", "-s", "0", "-qq", "-e", f"trace={CHANGING}"]
    disk.parent.mkdir()
    done = subprocess.run(
        [*command, "-o", place / "trace", sys.executable, "-c", RUN, disk.parent],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    recorded: Counter[tuple[str, ...]] = Counter()
    for kind, path, other, octets in map(str.split, done.stdout.splitlines()):
        if kind == "write":
            recorded["write", octets] += 1
        elif kind in ("create", *NAMED):
            recorded[kind, path, *([other] if other != "-" else [])] += 1
    traces = "".join(path.read_text() for path in place.glob("trace.*"))
    assert len(recorded) > 30
    kernel = seen_by_kernel(traces, disk)
    assert (recorded - kernel, kernel - recorded) == (Counter(), Counter())


def test_every_250_counts_after_a_cut(names: NameServer, place: Path) -> None:
    letters = copies = 0
    for number in range(ROUNDS):
        directory, chance = place / f"round{number}", random.Random(number)
        directory.mkdir()
        with module.CaptureServer(keep=1_000_000, keep_octets=1 << 30) as far:

            def taken(far: module.CaptureServer = far, since: int = 0) -> list[str]:
                return [str(message["Subject"]) for message in far.messages[since:]]

            with Disk(directory / "disk", megabytes=MEGABYTES) as disk:
                keywords = keywords_for(disk.path / "data", far.port)
                with Chasquid(directory / "first", names, **keywords) as server:
                    cuts = cuts_under_load(server, disk, taken, chance)
            second = Chasquid(directory / "second", names, **keywords)
            for cut in cuts:
                before = len(taken())
                found = found_after(cut, second)
                owed = {(label, who) for label, whose in cut.accepted.items() for who in whose}
                had = {(label, "far@here.example") for label in [*cut.taken, *taken(since=before)]}
                missing = sorted(owed - found.copies.keys() - had)
                text = f"{len(missing)} of {len(owed)} are lost, as {missing[:5]}"
                assert not missing, f"after cut {cuts.index(cut)}: {text}"
                assert not found.problems, found.problems[:5]
                letters += len(owed)
                twice = {copy for copy, count in found.copies.items() if count > 1}
                copies += len(twice | (had & found.copies.keys()))
                cut.image.unlink()
    print(f"{ROUNDS * len(CUTS)} cuts, {letters} copies accounted for, {copies} of them twice")
