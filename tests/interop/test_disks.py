# SPDX-License-Identifier: Apache-2.0
"""That the disks of `disks` do with a flush what they say, and leave nothing behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from os import fsync, sync  # those of the system, which conftest has replaced in `os` for a test
from pathlib import Path

import disks
import pytest
from disks import BLOCK, Disk, make_file_system, mounted
from support import wait_for

from .tools import need_disks, program

FLUSH = 0.008
OLD, NEW = b"o" * BLOCK, b"n" * BLOCK
BLOCKS = 64


@pytest.fixture(autouse=True)
def needs() -> None:
    need_disks()


def is_mounted(path: Path) -> bool:
    return f" {path} " in Path("/proc/mounts").read_text()


def write_synced(path: Path, data: bytes = b"x") -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())


def overwrite(path: Path, data: bytes) -> None:
    """Write over what a file has, past the cache of the system, and flush nothing."""
    with mmap.mmap(-1, len(data)) as buffer:  # its address is a multiple of a page's size
        buffer[:] = data
        file = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            assert os.pwrite(file, buffer, 0) == len(data)
        finally:
            os.close(file)


def blocks(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]


def test_a_flush_takes_its_time(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk", flush_seconds=FLUSH) as disk:
        for number in range(5):
            before, start = disk.flushes, time.perf_counter()
            write_synced(disk.path / str(number))
            seconds, flushes = time.perf_counter() - start, disk.flushes - before
            assert flushes >= 1
            assert seconds >= flushes * FLUSH


def test_flushes_at_the_same_time_are_merged(tmp_path: Path) -> None:
    count = 16
    with Disk(tmp_path / "disk", flush_seconds=FLUSH) as disk:

        def flushes(write: Callable[[], object]) -> int:
            before = disk.flushes
            write()
            return disk.flushes - before

        def one_by_one() -> None:
            for number in range(count):
                write_synced(disk.path / f"alone{number}")

        def together() -> None:
            barrier = threading.Barrier(count)

            def one(number: int) -> None:
                barrier.wait()
                write_synced(disk.path / f"together{number}")

            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                list(pool.map(one, range(count)))

        alone, merged = flushes(one_by_one), flushes(together)
        assert alone >= count
        assert merged < alone / 2


def test_a_cut_loses_what_was_not_flushed(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk") as disk:
        write_synced(disk.path / "file", OLD * BLOCKS)
        overwrite(disk.path / "file", NEW * BLOCKS)
        (disk.path / "unsynced").write_bytes(NEW)
        kinds = [("none", 0), ("all", 0), ("random", 1), ("random", 1), ("random", 2)]
        images = [disk.cut(*kind) for kind in kinds]
        sync()
        images.append(disk.cut("none"))
        assert blocks(disk.path / "file") == [NEW] * BLOCKS
    found = []
    for image in images:
        with mounted(image) as path:
            found.append(blocks(path / "file"))
            assert (path / "unsynced").exists() == (image is images[-1])
    none, all_, first, again, other, flushed = found
    assert none == [OLD] * BLOCKS
    assert all_ == flushed == [NEW] * BLOCKS
    assert first == again != other
    assert {*first} == {*other} == {OLD, NEW}


@contextlib.contextmanager
def writer(directory: Path) -> Iterator[list[str]]:
    """Write files in a thread, and delete some; yield the list of those that were synced."""
    done: list[str] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            name = f"{len(done)}"
            write_synced(directory / name, name.encode() * 1000)
            done.append(name)
            (directory / f"{name}.unsynced").write_bytes(NEW)
            with contextlib.suppress(FileNotFoundError):
                (directory / f"{len(done) - 10}.unsynced").unlink()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        task = pool.submit(write)
        try:
            yield done
        finally:
            stop.set()
        task.result()


def test_a_file_system_is_whole_after_a_cut_and_has_what_was_synced(tmp_path: Path) -> None:
    cuts: list[tuple[list[str], Path]] = []
    with Disk(tmp_path / "disk") as disk, writer(disk.path) as done:
        for seed, survives in enumerate(("none", "all", "random", "random", "random", "random")):
            count = len(done) + 20
            wait_for(lambda count=count: len(done) >= count, "files to be written")
            names = done.copy()
            cuts.append((names, disk.cut(survives, seed)))
    for names, image in cuts:
        with mounted(image) as path:
            for name in names:
                assert (path / name).read_bytes() == name.encode() * 1000
        check = subprocess.run(
            [program("e2fsck"), "-f", "-n", str(image)], capture_output=True, text=True
        )
        assert check.returncode == 0, check.stdout


def test_a_file_in_use_does_not_keep_a_disk_mounted(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk") as disk:
        file = (disk.path / "file").open("wb")
        threading.Timer(0.5, file.close).start()  # as a process does that takes long to end
    assert not is_mounted(disk.path)


def test_nothing_is_left_of_a_user_who_was_killed(tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    program = "import sys, pathlib, disks\nwith disks.Disk(pathlib.Path(sys.argv[1])):\n    input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE,
        cwd=Path(disks.__file__).parent,
    ) as process:
        wait_for(lambda: is_mounted(directory / "mounted"), "the disk to be mounted")
        process.send_signal(signal.SIGKILL)
    for name in ("mounted", "device"):
        path = directory / name
        wait_for(lambda path=path: not is_mounted(path), f"{path} to be unmounted")


def test_a_file_system_in_a_file(tmp_path: Path) -> None:
    make_file_system(tmp_path / "image", megabytes=16)
    with mounted(tmp_path / "image") as path:
        (path / "file").write_text("text")
    with mounted(tmp_path / "image") as path:
        assert (path / "file").read_text() == "text"
    assert not is_mounted(path)


def test_what_is_no_file_system_is_not_mounted(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(BLOCK * 100))
    with pytest.raises(OSError, match=r"^mount -o loop,noatime \S+/image "), \
            mounted(tmp_path / "image"):  # fmt: skip
        pass
    assert not is_mounted(tmp_path / "image.mounted")
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match=r"^mkfs\.ext4 "):
        make_file_system(tmp_path / "empty")
