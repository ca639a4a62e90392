# SPDX-License-Identifier: Apache-2.0
"""Room STORAGE PROCESS: a process writes the journal, and may die at any point."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import SECONDS, record, run, wait_for
from test_journal import Place

import chasquid

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="there is a journal on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # threads of earlier tests
]

SEGMENT = chasquid.CHUNK
COUNTED = ("open", "write", "pwrite", "fdatasync", "fsync", "rename", "unlink", "utime", "stat")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def on_disk(place, call, segment_size=SEGMENT, close=True):
    """Run `call(loop, disk, process)`; return its result, and what the log says."""
    logs, made = place.mail.parent, []
    log = record(logs)

    async def main(loop):
        process = chasquid.StorageProcess(loop, log)
        made.append(process)
        disk = chasquid.Disk(loop, log, process)
        await disk.open_journal(str(place.journal), segment_size)
        with loop.deadline(SECONDS):
            result = await call(loop, disk, process)
            if close:
                await disk.close()
        return result

    try:
        result = run(main)
    finally:
        gc.unfreeze()  # what tests before have left in cycles may be open files
        log.close()
        for process in made:
            if not process.has_died:
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
    return result, (logs / "server.log").read_text()


class Deadly:
    """The module os, whose calls kill the process after so many."""

    def __init__(self, after: int) -> None:
        self._left = after

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def call(*arguments, **keywords):
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            return real(*arguments, **keywords)

        return call


def in_the_process(monkeypatch, change):
    """Have `change()` called in a storage process, before it does anything."""
    real = chasquid._Storage.run_and_exit

    def run_and_exit(storage):
        change()
        real(storage)

    monkeypatch.setattr(chasquid._Storage, "run_and_exit", run_and_exit)


def letter(n: int) -> bytes:
    return b"%d" % n * 9_000


async def many(place, loop, disk):
    """Make, append to, rename and remove files at the same time, more than a segment holds."""

    async def one(n):
        await disk.create(place.path(f"m{n}", "tmp"), letter(n), place.path(f"m{n}"))
        await disk.append(place.path(f"m{n}"), b"+", place.path(f"m{n}", "cur"), (1e8, 1e9))
        path = place.path(f"m{n}", "cur")
        await chasquid.together(loop, [disk.append(path, end, path) for end in (b"!", b"?")])
        if n % 3 == 0:
            await disk.remove(place.path(f"m{n}", "cur"))

    for task in [loop.spawn(one(n), "one") for n in range(10)]:
        await task.join()


MANY = {f"cur/m{n}": letter(n) + b"+!?" for n in range(10) if n % 3}


def test_the_process_writes_what_is_asked_for_and_ends_in_order(place):
    async def call(loop, disk, process):
        await many(place, loop, disk)
        assert disk._journal is process
        return process.pid

    pid, log = on_disk(place, call)
    assert place.content() == MANY
    assert place.replay() == 0
    assert "storage process" not in log
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)  # nothing is left of it


def test_what_it_was_told_is_in_the_journal_without_an_orderly_end(place):
    async def call(loop, disk, process):
        await many(place, loop, disk)

    on_disk(place, call, 16 * SEGMENT, close=False)
    for path in (place.mail / "cur").iterdir():
        path.unlink()
    assert place.replay() == len(MANY)
    assert place.content() == MANY


@pytest.mark.parametrize("first", range(4))  # so that they run side by side
def test_it_may_die_before_any_call_and_nobody_is_told_of_a_failure(tmp_path, monkeypatch, first):
    died = True
    for calls in itertools.count(first, 4):
        place = Place(tmp_path / str(calls))
        with monkeypatch.context() as patch:
            in_the_process(patch, lambda calls=calls: setattr(chasquid, "os", Deadly(calls)))

            async def call(loop, disk, process, place=place):
                await many(place, loop, disk)

            _, log = on_disk(place, call)
        died = "the storage process has ended with signal 9" in log
        place.replay()  # if it died at the end, when all was answered
        assert place.content() == MANY, f"died before call {calls}"
        if not died:
            break
    assert calls > 100


def test_what_it_vouched_for_is_made_safe_by_threads_when_it_dies(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_SETTLE_SECONDS", 0.05)

    async def call(loop, disk, process):
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))
        os.kill(process.pid, signal.SIGKILL)
        while disk._journal is process:
            await loop.sleep(0.01)
        await disk.create(place.path("b", "tmp"), b"y", place.path("b"))

    _, log = on_disk(place, call)
    assert log.count("the storage process has ended with signal 9; threads do its work") == 1
    assert place.content() == {"new/a": b"x", "new/b": b"y"}


def test_if_it_dies_while_it_syncs_what_it_vouched_for_threads_do_it(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_SETTLE_SECONDS", 0.05)
    dies = lambda journal: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    in_the_process(monkeypatch, lambda: setattr(chasquid.Journal, "settle", dies))

    async def call(loop, disk, process):
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))
        while disk._journal is process:
            await loop.sleep(0.01)

    on_disk(place, call)
    assert place.content() == {"new/a": b"x"}
    assert place.replay() == 0


def test_who_is_sending_when_it_dies_does_not_wait_for_ever(place):
    async def call(loop, disk, process):
        os.kill(process.pid, signal.SIGSTOP)
        data = bytes(chasquid.SEGMENT_SIZE // 16)  # more than a channel holds
        name = place.path("a", "tmp"), place.path("a")
        task = loop.spawn(disk.create(name[0], data, name[1]), "create")
        await loop.sleep(0.1)
        assert process._sending._free == 0, "it is still sending"
        os.kill(process.pid, signal.SIGKILL)
        await task.join()

    on_disk(place, call, chasquid.SEGMENT_SIZE)
    assert place.content() == {"new/a": bytes(chasquid.SEGMENT_SIZE // 16)}


def test_if_it_dies_and_its_journal_cannot_be_replayed_all_is_refused_until_it_can(
    place, monkeypatch
):
    monkeypatch.setattr(chasquid, "_RECOVERY_PAUSES", (0.02, 0.02))
    replay = chasquid.replay_journal

    def refuses(directory):
        raise chasquid.ConfigError(directory, 0, "mend that")

    async def call(loop, disk, process):
        async def create(name):
            await disk.create(place.path(name, "tmp"), b"x", place.path(name))

        await create("a")
        monkeypatch.setattr(chasquid, "replay_journal", refuses)
        os.kill(process.pid, signal.SIGKILL)
        for name in ("refused", "too"):
            with pytest.raises(OSError, match="mend that"):
                await create(name)
        monkeypatch.setattr(chasquid, "replay_journal", replay)
        while disk._journal is process:
            await loop.sleep(0.01)
        await create("b")

    on_disk(place, call)
    assert place.content() == {"new/a": b"x", "new/b": b"x"}


def test_a_sync_that_fails_in_it_is_told_and_it_goes_on_when_all_is_safe(place, monkeypatch):
    broken = place.mail.parent / "broken"
    real = os.fdatasync

    def fdatasync(fd):
        if broken.exists():
            raise OSError(errno.EIO, "broken")
        real(fd)

    in_the_process(monkeypatch, lambda: setattr(os, "fdatasync", fdatasync))

    async def call(loop, disk, process):
        async def create(name):
            await disk.create(place.path(name, "tmp"), b"x", place.path(name))

        await create("a")
        broken.touch()
        with pytest.raises(OSError, match="broken"):
            await create("b")
        broken.unlink()
        while disk._recovery is not None:
            await loop.sleep(0.01)
        await create("c")
        assert disk._journal is process

    on_disk(place, call)
    assert place.content() == {"new/a": b"x", "new/c": b"x"}


def test_the_error_of_one_file_is_that_of_the_one_who_asked(place):
    async def call(loop, disk, process):
        with pytest.raises(FileNotFoundError) as caught:
            await disk.create(place.path("x/y", "tmp"), b"", place.path("y"))
        assert caught.value.filename == place.path("x/y", "tmp")
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))

    on_disk(place, call)
    assert place.content() == {"new/a": b"x"}


def test_a_batch_larger_than_the_channel_is_sent_while_others_wait(place):
    async def call(loop, disk, process):
        async def create(n):
            await disk.create(place.path(f"m{n}", "tmp"), bytes(60_000), place.path(f"m{n}"))

        await chasquid.together(loop, [create(n) for n in range(60)])

    on_disk(place, call, chasquid.SEGMENT_SIZE)
    assert place.content() == {f"new/m{n}": bytes(60_000) for n in range(60)}


def test_where_there_can_be_no_journal_the_process_ends(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_file_system_type", lambda path: "nfs")

    async def call(loop, disk, process):
        assert process.has_died
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, 0)
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))

    _, log = on_disk(place, call)
    assert "there is no journal, so each file is synced for itself" in log
    assert place.content() == {"new/a": b"x"}


def test_a_loop_that_ends_while_it_works_waits_for_its_answer(place):
    async def call(loop, disk, process):
        loop.spawn(disk.create(place.path("a", "tmp"), b"x", place.path("a")), "create")
        await loop.turn()

    on_disk(place, call, close=False)
    assert place.content() == {"new/a": b"x"}


# --- beside a server ---

SERVER = """
import os, sys, chasquid
loop = chasquid.Loop(chasquid.Clock(), chasquid.Workers(1), print)
log = chasquid.Log(*[chasquid.Sink(sys.argv[1], loop.clock)] * 2)
secret = os.open("/dev/null", os.O_RDONLY)
async def main():
    process = chasquid.StorageProcess(loop, log)
    disk = chasquid.Disk(loop, log, process)
    await disk.open_journal(sys.argv[2], 65536)
    print(process.pid, flush=True)
    await loop.sleep(3600)
loop.run(main())
"""


@contextlib.contextmanager
def server(place):
    top = Path(chasquid.__file__).parent
    arguments = [sys.executable, "-c", SERVER, str(place.mail / "log"), str(place.journal)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=top) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def is_there(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_it_dies_with_its_server_and_by_no_signal_that_is_for_the_server(place):
    with server(place) as (process, pid):
        assert Path(f"/proc/{pid}/comm").read_text() == "chasquid-disk\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        time.sleep(0.05)
        assert is_there(pid)
        os.kill(pid, signal.SIGSTOP)  # it cannot even see that the server is gone
        process.kill()
        process.wait()
        wait_for(lambda: not is_there(pid), "the storage process to end")


def test_it_holds_nothing_of_the_server(place):
    with server(place) as (_, pid):
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        segments = {str(place.journal / name) for name in "01"}
        others = [path for path in held if path not in segments and path != str(place.journal)]
        standard = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
        assert len(others) == len(standard) + 1
        assert sum(path.startswith("socket:") for path in others) == 1
