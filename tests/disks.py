# SPDX-License-Identifier: Apache-2.0
"""A disk whose flushes we decide on: a file system like any other, as root on Linux.

    with Disk(tmp_path / "disk", flush_seconds=0.008) as disk:
        ...                              # work below disk.path
        image = disk.cut("random", 7)    # what a power cut leaves behind, now
    with mounted(image) as path:
        ...                              # as found after the power is back

The layers, from above: ext4 with its journal; a loop device; a file in a FUSE file system of
one file, its root; a process of its own (`serve`), which keeps all in memory. The loop driver
hands down each flush that ext4 asks for as an fsync of the file. What was written since the
last one is in what would be the disk's cache: a cut loses none, all, or some of its blocks.

This module speaks FUSE itself, so that it needs nothing but /dev/fuse, /dev/loop* and mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

BLOCK = 4096  # what a disk writes whole or not at all
CLOSE_SECONDS = 30.0
# what is still in use goes when it is not
UNMOUNT = 'for path; do umount "$path" || umount -l "$path"; done'


class Disk:
    """A mounted ext4 of so many megabytes, whose flushes take `flush_seconds`.

    `path` is the directory to work in; `directory` holds it, and the images of cuts.
    """

    def __init__(self, directory: Path, *, megabytes: int = 64, flush_seconds: float = 0.0) -> None:
        self.path = directory / "mounted"
        self._directory = directory
        self._device = directory / "device"
        self._size = megabytes << 20
        self._flush_seconds = flush_seconds
        self._cuts = 0

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        self._device.touch()
        self._control, theirs = socket.socketpair()
        words = [self._device, self.path, theirs.fileno(), self._size, self._flush_seconds]
        command = [sys.executable, "-I", "-S", __file__, *map(str, words)]
        # in a session of its own, so that Ctrl-C leaves it alive until all is unmounted
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        try:
            self._ask("ready")
            make_file_system(self._device)
            _run("mount", "-o", "loop,noatime", self._device, self.path)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def flushes(self) -> int:
        """How many flushes there were so far."""
        return int(self._ask("flushes"))

    def cut(self, survives: str = "none", seed: int = 0) -> Path:
        """Return a file with what a power cut would leave now; `mounted` gives it a directory.

        Of the blocks that were written since the last flush survive "none", "all", or
        "random" ones, by `seed`.
        """
        self._cuts += 1
        image = self._directory / f"cut{self._cuts}"
        self._ask(f"{survives} {seed} {image}")
        return image

    def _ask(self, question: str) -> str:
        self._control.sendall(question.encode())
        if not (answer := self._control.recv(1000)):
            raise OSError(f"the process of the disk {self._device} has ended")
        return answer.decode()

    def _close(self) -> None:
        """Have the process unmount all; it goes on until nobody uses a file there."""
        self._control.shutdown(socket.SHUT_RDWR)  # also where a child of ours has it
        self._control.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # which turns what is still asked into input/output errors
            self._process.wait()
            raise OSError(f"files below {self.path} were still in use") from None


@contextlib.contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """Mount a file with an ext4, as `Disk.cut` and `make_file_system` make them."""
    directory = image.with_name(image.name + ".mounted")
    directory.mkdir(exist_ok=True)
    _run("mount", "-o", "loop,noatime", image, directory)
    try:
        yield directory
    finally:
        _run("sh", "-c", UNMOUNT, "sh", directory)


def make_file_system(path: Path, megabytes: int = 0) -> None:
    """Make an ext4 in a file, which is there already unless megabytes are given."""
    if megabytes:
        with path.open("xb") as file:
            file.truncate(megabytes << 20)
    options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
    _run("mkfs.ext4", "-q", "-F", "-b", BLOCK, "-E", options, path)


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


# --- the process: one file over FUSE ---

# include/uapi/linux/fuse.h: requests and replies, and what each begins with
HEADER = struct.Struct("<IIQQIIII")  # length, operation, unique, node, uid, gid, pid, padding
REPLY = struct.Struct("<IiQ")  # length, error, unique
INIT = struct.Struct("<IIIIHHIIHHI28x")
ATTRIBUTES = struct.Struct("<QII QQQQQQ III IIIIIII")
OPENED = struct.Struct("<QII")
READ_WRITE = struct.Struct("<QQI")  # handle, offset, size, and more
WRITTEN = struct.Struct("<II")
STATUS = struct.Struct("<80x")

FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT_CALL, INTERRUPT, DESTROY, BATCH_FORGET = 18, 20, 25, 26, 36, 38, 42
WRITE_HEADER = HEADER.size + 40
VERSION = (7, 31)
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
MAX_WRITE = 1 << 20
ROOT = 1
MODE = 0o100600
PR_SET_IO_FLUSHER = 57


class Device:
    """The octets of a disk: as they are read, and as they survive the loss of its cache."""

    def __init__(self, size: int, flush_seconds: float) -> None:
        # memory that is there from the start, and takes none before it is written
        self.octets = mmap.mmap(-1, size)
        self._flushed = mmap.mmap(-1, size)
        self._cache: list[tuple[int, bytes]] = []
        self._flush_seconds = flush_seconds
        self.flushes = 0

    def write(self, offset: int, data: bytes) -> None:
        self.octets[offset : offset + len(data)] = data
        while data:  # by the blocks of the disk
            length = BLOCK - offset % BLOCK
            self._cache.append((offset, data[:length]))
            offset, data = offset + length, data[length:]

    def flush(self) -> None:
        time.sleep(self._flush_seconds)
        for offset, data in self._cache:
            self._flushed[offset : offset + len(data)] = data
        self._cache.clear()
        self.flushes += 1

    def cut(self, survives: str, seed: int) -> bytearray:
        """Return the octets after a power cut."""
        chance = {"none": 0.0, "all": 1.0, "random": 0.5}[survives]
        choice = random.Random(seed)
        octets = bytearray(self._flushed)
        for offset, data in self._cache:
            if choice.random() < chance:
                octets[offset : offset + len(data)] = data
        return octets


class FuseFile:
    """Answers what the kernel asks about a file system of one file, its root."""

    def __init__(self, fuse: int, device: Device) -> None:
        self._fuse = fuse
        self._device = device

    def answer(self) -> bool:
        """Answer one request; return False once the file system is unmounted."""
        try:
            request = os.read(self._fuse, MAX_WRITE + BLOCK)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                return True  # it was taken back
            raise
        operation, unique = HEADER.unpack_from(request)[1:3]
        if operation in (FORGET, BATCH_FORGET, INTERRUPT):
            return True
        reply = self._reply(operation, request)
        body, code = (b"", -errno.ENOSYS) if reply is None else (reply, 0)
        with contextlib.suppress(FileNotFoundError):  # nobody waits for it any more
            os.writev(self._fuse, [REPLY.pack(REPLY.size + len(body), code, unique), body])
        return True

    def _reply(self, operation: int, request: bytes) -> bytes | None:
        """Return what follows the header of a reply, or None for what we do not have."""
        if operation == READ:
            _, offset, size = READ_WRITE.unpack_from(request, HEADER.size)
            return self._device.octets[offset : offset + size]
        if operation == WRITE:
            _, offset, size = READ_WRITE.unpack_from(request, HEADER.size)
            self._device.write(offset, request[WRITE_HEADER : WRITE_HEADER + size])
            return WRITTEN.pack(size, 0)
        if operation == FSYNC:
            self._device.flush()
            return b""
        if operation == INIT_CALL:
            flags = BIG_WRITES | MAX_PAGES
            pages = MAX_WRITE // BLOCK
            return INIT.pack(*VERSION, MAX_WRITE, flags, 16, 12, MAX_WRITE, 1, pages, 0, 0)
        if operation in (GETATTR, SETATTR):
            size = len(self._device.octets)
            times = (0,) * 6
            rest = (MODE, 1, 0, 0, 0, BLOCK, 0)
            return ATTRIBUTES.pack(3600, 0, 0, ROOT, size, size // 512, *times, *rest)
        if operation == OPEN:
            return OPENED.pack(0, 0, 0)
        if operation == STATFS:
            return STATUS.pack()
        return b"" if operation in (RELEASE, FLUSH, DESTROY) else None


def serve(file: str, directory: str, control: socket.socket, device: Device) -> None:
    """Serve `device` as `file`; when `control` is closed, unmount both, and end after that."""
    libc = ctypes.CDLL(None, use_errno=True)
    # the kernel may wait for us to get memory, so our wait for memory must not wait for it
    libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode={MODE:o},user_id=0,group_id=0"
    if libc.mount(b"chasquid-tests", file.encode(), b"fuse", 0, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file)
    kernel = FuseFile(fuse, device)
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == fuse:
                if not kernel.answer():
                    return
            elif question := control.recv(1000).decode():
                control.sendall(answer(device, question).encode())
            else:
                poll.unregister(control)
                unmount(directory, file)


def answer(device: Device, question: str) -> str:
    if question == "flushes":
        return str(device.flushes)
    if question != "ready":
        survives, seed, image = question.split(" ", 2)
        write_sparsely(image, device.cut(survives, int(seed)))
    return "yes"


def write_sparsely(path: str, octets: bytearray) -> None:
    empty = bytes(BLOCK)
    with open(path, "xb") as file:
        file.truncate(len(octets))
        for offset in range(0, len(octets), BLOCK):
            if (block := octets[offset : offset + BLOCK]) != empty:
                os.pwrite(file.fileno(), block, offset)


def unmount(directory: str, file: str) -> None:
    """Begin to unmount, for which this process is needed."""
    command = ["sh", "-c", UNMOUNT, "sh", directory, file]
    subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


if __name__ == "__main__":
    _, file, directory, descriptor, size, seconds = sys.argv
    control = socket.socket(fileno=int(descriptor))
    serve(file, directory, control, Device(int(size), float(seconds)))
