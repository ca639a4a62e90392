# SPDX-License-Identifier: Apache-2.0
"""Rooms JOURNAL, DISK: many files by one sync, and what is left of them after a power cut.

A cut is played by what it leaves: files that are gone, empty, cut short or full of zeros, while
the journal's segments hold what was synced.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from support import SECONDS, run

import chasquid

SIZE = 128 * 1024


class Place:
    """A directory with a Maildir and a journal."""

    def __init__(self, directory: Path) -> None:
        self.mail = directory / "mail"
        for name in ("tmp", "new", "cur"):
            (self.mail / name).mkdir(parents=True)
        self.journal = directory / "journal"
        self._opened: list[chasquid.Journal] = []

    def close(self) -> None:
        """Give back the descriptors, as the end of a process would."""
        for journal in self._opened:
            journal.close()

    def path(self, name: str, place: str = "new") -> str:
        return str(self.mail / place / name)

    def creation(self, name: str, data: bytes) -> chasquid.Creation:
        return chasquid.Creation(self.path(name, "tmp"), data, self.path(name))

    def growth(self, name: str, data: bytes, target: str = "cur") -> chasquid.Growth:
        source = "cur" if os.path.exists(self.path(name, "cur")) else "new"
        return chasquid.Growth(self.path(name, source), data, self.path(name, target), None)

    def open(self) -> chasquid.Journal:
        self._opened.append(chasquid.Journal(str(self.journal), SIZE))
        return self._opened[-1]

    def replay(self) -> int:
        return chasquid.replay_journal(str(self.journal))

    def content(self) -> dict[str, bytes]:
        return {
            f"{place}/{path.name}": path.read_bytes()
            for place in ("tmp", "new", "cur")
            for path in (self.mail / place).iterdir()
        }


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.close()


def commit(journal, *changes):
    assert journal.commit(changes)
    assert [change.error for change in changes] == [None] * len(changes)


def empty(path):
    Path(path).write_bytes(b"")


def zeros(path):
    Path(path).write_bytes(bytes(os.path.getsize(path)))


def short(path):
    os.truncate(path, os.path.getsize(path) // 2)


DAMAGE = {"gone": os.unlink, "empty": empty, "zeros": zeros, "short": short}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_a_cut_takes_is_written_anew(place, damage):
    commit(place.open(), *(place.creation(f"m{n}", b"%d" % n * 500) for n in range(3)))
    before = place.content()
    damage(place.path("m1"))
    assert place.replay() == 1
    assert place.content() == before
    assert place.replay() == 0, "the segments were dropped"


def test_what_an_older_journal_said_is_not_believed_when_the_clock_was_set_back(place, monkeypatch):
    journal = place.open()
    for name in ("a", "b"):
        commit(journal, place.creation(name, b"x" * 99))
    journal.close()
    assert place.replay() == 0
    os.unlink(place.path("b"))
    monkeypatch.setattr(chasquid.time, "time_ns", lambda: 0)
    commit(place.open(), place.creation("c", b"x" * 99))  # as long as the record of "a" was
    assert place.replay() == 0
    assert sorted(place.content()) == ["new/a", "new/c"]


def test_what_is_there_as_it_must_be_is_left_alone_wherever_it_was_moved(place):
    commit(place.open(), *(place.creation(name, b"x" * 99) for name in ("a", "b", "c")))
    os.rename(place.path("b"), place.path("b:2,S", "cur"))
    os.rename(place.path("c"), place.path("c", "cur"))
    times = [os.stat(place.mail / name).st_ino for name in ("new/a", "cur/b:2,S", "cur/c")]
    assert place.replay() == 0
    assert sorted(place.content()) == ["cur/b:2,S", "cur/c", "new/a"]
    assert times == [os.stat(place.mail / name).st_ino for name in ("new/a", "cur/b:2,S", "cur/c")]


def test_a_message_that_a_reader_has_moved_is_mended_under_its_flags(place):
    commit(place.open(), place.creation("a", b"x" * 99))
    os.rename(place.path("a"), place.path("a:2,FS", "cur"))
    zeros(place.path("a:2,FS", "cur"))
    assert place.replay() == 1
    assert place.content() == {"cur/a:2,FS": b"x" * 99}


def test_a_large_mailbox_is_not_read_again_for_each_message_that_is_missing(place, monkeypatch):
    journal = place.open()
    commit(journal, *(place.creation(f"m{n}", b"x") for n in range(50)))
    journal.close()
    os.rename(place.path("m0"), place.path("m0:2,S", "cur"))
    for n in range(1, 50):
        os.unlink(place.path(f"m{n}"))
    read, scandir = [], os.scandir

    def noted(path):
        read.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    assert place.replay() == 49
    assert read == [str(place.mail / "cur")]
    assert set(place.content()) == {"cur/m0:2,S", *(f"new/m{n}" for n in range(1, 50))}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_was_appended_is_there_again(place, damage):
    journal = place.open()
    commit(journal, place.creation("a", b"message\n"))
    commit(journal, place.growth("a", b"first\n"))
    commit(journal, place.growth("a", b"second\n"))
    damage(place.path("a", "cur"))
    assert place.replay() == 1
    assert list(place.content().values()) == [b"message\nfirst\nsecond\n"]


@pytest.mark.parametrize("damage", [zeros, short])
def test_what_was_appended_to_an_older_file_is_there_again(place, damage):
    Path(place.path("old")).write_bytes(b"of yesterday\n")
    commit(place.open(), place.growth("old", b"line\n"))
    data = bytearray(b"of yesterday\nline\n")
    Path(place.path("old", "cur")).write_bytes(data[:13] + (bytes(5) if damage is zeros else b""))
    assert place.replay() == 1
    assert place.content() == {"cur/old": bytes(data)}


def test_two_that_append_to_one_file_at_once_both_count(place):
    Path(place.path("a")).write_bytes(b"0")
    commit(place.open(), *(place.growth("a", line, "new") for line in (b"one", b"two")))
    os.truncate(place.path("a"), 1)
    assert place.replay() == 1
    assert place.content() == {"new/a": b"0onetwo"}


def test_what_was_removed_stays_away(place):
    journal = place.open()
    commit(journal, place.creation("a", b"x"), place.creation("b", b"y"))
    commit(journal, place.growth("a", b"more"))
    commit(journal, chasquid.Removal(place.path("a", "cur")))
    assert place.replay() == 0
    assert place.content() == {"new/b": b"y"}


def test_a_cut_that_brings_a_removed_file_back_does_not_last(place):
    journal = place.open()
    commit(journal, place.creation("a", b"x"))
    commit(journal, chasquid.Removal(place.path("a")))
    Path(place.path("a")).write_bytes(b"x")
    place.replay()
    assert place.content() == {}


def test_what_a_cut_takes_is_found_where_its_data_dir_is_now(place, tmp_path):
    moved = tmp_path.with_name("moved")
    commit(place.open(), place.creation("a", b"x"))
    os.unlink(place.path("a"))
    os.rename(tmp_path, moved)
    assert chasquid.replay_journal(str(moved / "journal")) == 1
    assert (moved / "mail" / "new" / "a").read_bytes() == b"x"
    assert not tmp_path.exists()


def test_what_could_not_be_removed_is_not_removed_by_a_replay(place, monkeypatch):
    journal = place.open()
    commit(journal, place.creation("a", b"x"))

    def fails(path):
        raise OSError(errno.EIO, "broken")

    removal = chasquid.Removal(place.path("a"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fails)
        assert journal.commit([removal])
    assert isinstance(removal.error, OSError)
    os.unlink(place.path("a"))  # by the cut
    assert place.replay() == 1
    assert place.content() == {"new/a": b"x"}


def test_a_file_that_could_not_be_made_is_not_made_by_a_replay(place):
    journal = place.open()
    bad = chasquid.Creation(str(place.mail / "none" / "a"), b"x", place.path("a"))
    good = place.creation("b", b"y")
    assert journal.commit([bad, good])
    assert isinstance(bad.error, FileNotFoundError) and good.error is None
    place.replay()
    assert place.content() == {"new/b": b"y"}


def test_a_torn_record_ends_the_journal_and_one_of_before_is_not_taken_for_the_next(place):
    journal = place.open()
    for n in range(4):
        commit(journal, place.creation(f"old{n}", b"o" * 100))
    for _ in range(2):  # then it is the first segment again
        journal.switch()
        journal.settle()
    commit(journal, place.creation("new0", b"n" * 100))
    for name in os.listdir(place.mail / "new"):
        os.unlink(place.path(name))
    assert place.replay() == 1
    assert place.content() == {"new/new0": b"n" * 100}


@pytest.mark.parametrize("octet", [0, 9, 17, 21, 30, 100, 150])
def test_a_record_with_one_wrong_octet_does_not_count_nor_does_what_follows(place, octet):
    journal = place.open()
    commit(journal, place.creation("a", b"a" * 100))
    start = journal._active.offset
    commit(journal, place.creation("b", b"b" * 100))
    commit(journal, place.creation("c", b"c" * 100))
    for name in "abc":
        os.unlink(place.path(name))
    for segment in place.journal.iterdir():
        data = bytearray(segment.read_bytes())
        if data.startswith(b"journal"):
            data[start + octet] ^= 1
            segment.write_bytes(data)
    assert place.replay() == 1
    assert place.content() == {"new/a": b"a" * 100}


def test_a_full_segment_says_so_and_the_other_goes_on(place):
    journal = place.open()
    n = 0
    while journal.commit([place.creation(f"m{n}", bytes(10_000))]):
        n += 1
    assert 10 < n < 14
    journal.switch()
    commit(journal, place.creation(f"m{n}", b"in the other"))
    before = place.content()
    for name in os.listdir(place.mail / "new"):
        os.unlink(place.path(name))
    chasquid.replay_journal(str(place.journal))
    assert place.content() == before, "both count, in order"
    journal.settle()


def test_what_was_settled_is_not_replayed(place):
    journal = place.open()
    commit(journal, place.creation("a", b"x"))
    journal.switch()
    journal.settle()
    os.unlink(place.path("a"))  # somebody has read it
    assert place.replay() == 0
    assert place.content() == {}


def test_a_journal_that_was_not_replayed_is_not_overwritten(place):
    commit(place.open(), place.creation("a", b"x"))
    with pytest.raises(chasquid.ConfigError, match="was not replayed"):
        place.open()
    place.replay()
    place.open().close()


def test_what_is_of_a_newer_version_is_left_and_said(place):
    place.open().close()
    path = place.journal / "0"
    path.write_bytes(b"journal\x02" + bytes(100))
    with pytest.raises(chasquid.ConfigError, match="of a newer chasquid"):
        place.replay()
    assert path.read_bytes().startswith(b"journal\x02")


@pytest.mark.parametrize("octets", range(0, 25, 3))
def test_a_first_record_of_which_a_cut_has_left_so_much_does_not_count(place, octets):
    place.open().close()
    path = place.journal / "0"
    before = path.read_bytes()
    commit(place.open(), place.creation("a", b"x"))
    os.unlink(place.path("a"))
    data = path.read_bytes()
    for begin in (octets, octets + 1):
        path.write_bytes(data[:begin] + before[begin:])
        assert place.replay() == 0
    place.open().close()


def test_a_file_that_has_two_names_after_a_cut_keeps_the_one_that_counts(place):
    journal = place.open()
    commit(journal, place.creation("a", b"x" * 99))
    commit(journal, place.growth("a", b"line\n"))
    os.link(place.path("a", "cur"), place.path("a"))
    zeros(place.path("a"))
    assert place.replay() == 1
    assert place.content() == {"cur/a": b"x" * 99 + b"line\n"}


def test_what_cannot_be_written_anew_stays_in_the_journal(place):
    commit(place.open(), place.creation("a", b"x"))
    os.unlink(place.path("a"))
    (place.mail / "new").rmdir()
    (place.mail / "new").write_text("in the way")
    with pytest.raises(chasquid.ConfigError, match="cannot be written to its place"):
        place.replay()
    (place.mail / "new").unlink()
    assert place.replay() == 1
    assert place.content() == {"new/a": b"x"}


def test_after_a_failed_sync_all_is_written_anew_and_the_segments_go(place, monkeypatch):
    journal = place.open()
    commit(journal, place.creation("a", b"x" * 99), place.creation("b", b"y"))
    os.rename(place.path("b"), place.path("b:2,S", "cur"))
    inodes = [os.stat(place.mail / name).st_ino for name in ("new/a", "cur/b:2,S")]

    def fails(fd):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fdatasync", fails)
    refused = place.creation("c", b"z")
    assert journal.commit([refused])
    assert isinstance(refused.error, OSError) and journal.failure is refused.error
    also = place.creation("d", b"z")
    assert journal.commit([also]) and also.error is journal.failure
    journal.end()
    assert place.content() == {"new/a": b"x" * 99, "cur/b:2,S": b"y"}
    for name, inode in zip(("new/a", "cur/b:2,S"), inodes, strict=True):
        assert os.stat(place.mail / name).st_ino != inode, "what it held cannot be trusted"
    assert os.listdir(place.journal) == []


def test_a_start_after_a_failed_sync_trusts_the_disk_alone(place, monkeypatch):
    """What memory shows of a file is not what the disk has, until it is read from there."""
    journal = place.open()
    commit(journal, place.creation("a", b"x" * 99), place.creation("b", b"y"))
    journal.close()

    def forget(fd, offset, length, advice):
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path == place.path("a") and path not in forgotten:
            zeros(path)
        forgotten.add(path)

    forgotten: set[str] = set()
    monkeypatch.setattr(os, "posix_fadvise", forget)
    assert place.replay() == 1
    assert forgotten == {place.path("a"), place.path("b")}
    assert place.content() == {"new/a": b"x" * 99, "new/b": b"y"}


def test_a_file_system_that_cannot_be_synced_as_a_whole_gets_no_journal(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_file_system_type", lambda path: "vfat")
    with pytest.raises(OSError, match="cannot be synced as a whole"):
        place.open()


def test_a_small_disk_is_left_to_mail(place, monkeypatch):
    free = 15 * SIZE
    status = os.statvfs(place.mail)
    few = os.statvfs_result((4096, 4096, 9999, free // 4096, free // 4096, *tuple(status)[5:10]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: few)
        with pytest.raises(OSError, match="too little of the disk is free"):
            place.open()
    assert os.listdir(place.journal) == []
    place.open().close()


def test_a_mailbox_on_such_a_file_system_is_synced_file_by_file(place, monkeypatch):
    monkeypatch.setattr(
        chasquid, "_file_system_type", lambda path: "nfs" if "/mail" in path else "ext4"
    )
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/dev/fd/{fd}")), real(fd))
    )
    journal = place.open()
    # one device for the tests, so what is known of it is forgotten
    journal._file_systems._fds = {os.stat(place.mail).st_dev: -1}
    commit(journal, place.creation("a", b"x"))
    assert synced[-2:] == [place.path("a", "tmp"), str(place.mail / "new")]
    assert journal.is_empty


# --- on the loop ---


def on_disk(place, call, size=SIZE):
    async def main(loop):
        disk = chasquid.Disk(loop)
        await disk.open_journal(str(place.journal), size)
        with loop.deadline(20):
            result = await call(loop, disk)
            await disk.close()
        return result

    return run(main)


def test_many_tasks_write_more_than_the_journal_holds(place):
    async def call(loop, disk):
        async def one(n):
            for part in range(5):
                name = f"m{n}p{part}"
                await disk.create(place.path(name, "tmp"), b"%d" % n * 3000, place.path(name))
                await disk.append(place.path(name), b"+", place.path(name, "cur"))
                if part % 2:
                    await disk.remove(place.path(name, "cur"))

        for task in [loop.spawn(one(n), "one") for n in range(30)]:
            await task.join()

    on_disk(place, call)
    assert place.content() == {
        f"cur/m{n}p{part}": b"%d" % n * 3000 + b"+" for n in range(30) for part in (0, 2, 4)
    }
    assert place.replay() == 0


def test_so_many_changes_at_once_that_no_segment_has_room_for_them_are_made(place):
    async def call(loop, disk):
        async def one(n):
            await disk.remove(place.path(f"{n:0200}"))

        for n in range(1000):
            Path(place.path(f"{n:0200}")).touch()
        for task in [loop.spawn(one(n), "one") for n in range(1000)]:
            await task.join()
        assert place.content() == {}
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))

    on_disk(place, call)
    assert place.content() == {"new/a": b"x"}


def test_without_an_orderly_end_what_was_told_is_in_the_journal(place):
    async def call(loop, disk):
        for n in range(10):
            await disk.create(place.path(f"m{n}", "tmp"), b"x" * 100, place.path(f"m{n}"))

    async def main(loop):
        disk = chasquid.Disk(loop)
        await disk.open_journal(str(place.journal), SIZE)
        await call(loop, disk)

    run(main)
    for name in os.listdir(place.mail / "new"):
        os.unlink(place.path(name))
    assert place.replay() == 10


def test_what_the_journal_vouches_for_is_synced_after_a_while(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_SETTLE_SECONDS", 0.02)

    async def call(loop, disk):
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))
        journal = disk._journal.journal
        while journal._other.epoch < journal._active.epoch and not disk._settling:
            if journal.is_empty:
                break
            await loop.sleep(0.01)

    on_disk(place, call)
    os.unlink(place.path("a"))
    assert place.replay() == 0


def test_while_nothing_can_be_synced_all_is_refused_at_once(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_RECOVERY_PAUSES", (0.2, 0.2))
    syncs = {"fsync": os.fsync, "fdatasync": os.fdatasync}

    def fails(fd):
        raise OSError(errno.EIO, "broken")

    async def call(loop, disk):
        async def create(name):
            await disk.create(place.path(name, "tmp"), b"x", place.path(name))

        await create("a")
        for name in syncs:
            monkeypatch.setattr(os, name, fails)
        for n in range(5):
            with pytest.raises(OSError, match="broken"), loop.deadline(0.15):
                await create(f"refused{n}")
        for name, sync in syncs.items():
            monkeypatch.setattr(os, name, sync)
        while disk._recovery is not None:
            await loop.sleep(0.01)
        await create("b")

    on_disk(place, call)
    assert place.content() == {"new/a": b"x", "new/b": b"x"}


def test_a_failed_sync_is_told_and_mail_goes_on_when_all_is_safe(place, monkeypatch):
    real, left = os.fdatasync, [1]

    def fails_once(fd):
        if left and not left.clear():
            raise OSError(errno.EIO, "broken")
        real(fd)

    async def call(loop, disk):
        await disk.create(place.path("a", "tmp"), b"x", place.path("a"))
        monkeypatch.setattr(os, "fdatasync", fails_once)
        with pytest.raises(OSError, match="broken"):
            await disk.create(place.path("b", "tmp"), b"y", place.path("b"))
        while True:
            try:
                await disk.create(place.path("c", "tmp"), b"z", place.path("c"))
                break
            except OSError:
                await loop.sleep(0.01)

    on_disk(place, call)
    assert place.content() == {"new/a": b"x", "new/c": b"z"}


def test_without_a_journal_no_name_is_given_while_another_is_synced(place, monkeypatch):
    # a sync of the directory that fails would hide what became of the other name
    calls = []

    def slow(name):
        real = getattr(os, name)

        def call(*arguments):
            calls.append(name)
            time.sleep(0.02)
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    async def main(loop):
        disk = chasquid.Disk(loop)
        Path(place.path("large", "tmp")).write_bytes(b"x")
        slow("rename")
        monkeypatch.setattr(chasquid, "sync_directory", lambda path: calls.append("sync"))
        small = disk.create(place.path("small", "tmp"), b"y", place.path("small"))
        large = disk.move(place.path("large", "tmp"), place.path("large"))
        await chasquid.together(loop, [small, large])

    run(main)
    assert calls == ["rename", "sync"] * 2


def test_a_loop_that_ends_leaves_nobody_waiting_for_the_disk(place, monkeypatch):
    monkeypatch.setattr(chasquid, "_BATCH_OCTETS", 1)  # so that each is a batch of its own
    written = []

    async def main(loop):
        disk = chasquid.Disk(loop)

        async def hold():
            async with disk._using:
                await loop.sleep(3600)

        async def create(name):
            await disk.create(place.path(name, "tmp"), b"xx", place.path(name))
            written.append(name)

        loop.spawn(hold(), "hold")
        for name in ("a", "b", "c"):
            loop.spawn(create(name), name)
        for _ in range(5):
            await loop.turn()

    thread = threading.Thread(target=run, args=[main], daemon=True)
    thread.start()
    thread.join(SECONDS / 4)
    assert not thread.is_alive()
    assert sorted(place.content()) == [f"new/{name}" for name in written] != []


def test_a_rename_that_fails_although_it_was_done_leaves_what_was_told(place, monkeypatch):
    real = os.rename

    def rename(old, new):
        real(old, new)
        raise OSError(errno.ENOENT, "it was sent twice, and answered once")

    Path(place.path("old")).write_bytes(b"0")
    journal = place.open()
    monkeypatch.setattr(os, "rename", rename)
    changes = [place.creation("a", b"x"), place.growth("old", b"1")]
    assert journal.commit(changes)
    assert [type(change.error) for change in changes] == [FileNotFoundError, type(None)]
    assert place.content() == {"cur/old": b"01"}
