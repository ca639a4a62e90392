# SPDX-License-Identifier: Apache-2.0
"""Room STORAGE: durable writes, blocking ones and those on the loop."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from support import MODULE, run, turns

import chasquid


def mode_of(path: object) -> int:
    return stat.S_IMODE(os.stat(str(path)).st_mode)


def test_directories_are_made_with_those_above_them(tmp_path):
    path = tmp_path / "a" / "b" / "c"
    chasquid.make_directory(str(path))
    assert path.is_dir()
    assert [mode_of(each) for each in (path, path.parent, path.parent.parent)] == [0o700] * 3
    chasquid.make_directory(str(path))  # once more is no error


def test_a_directory_cannot_be_made_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        chasquid.make_directory(str(tmp_path / "file"))


def test_a_created_file_holds_its_chunks_for_its_owner_alone(tmp_path):
    path = tmp_path / "new"
    chasquid.create_synced(str(path), [b"one ", b"", b"two"])
    assert path.read_bytes() == b"one two"
    assert mode_of(path) == 0o600


def test_a_file_that_exists_is_never_overwritten(tmp_path):
    path = tmp_path / "new"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        chasquid.create_synced(str(path), [b"new"])
    assert path.read_bytes() == b"old"


def test_nothing_is_left_where_a_write_fails_half_way(tmp_path):
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        chasquid.create_synced(str(tmp_path / "new"), chunks())
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError):
            chasquid.write_all(fd, b"x")
    finally:
        os.close(fd)


def test_all_is_written_where_the_system_takes_it_in_pieces():
    reader, writer = os.pipe()
    data = os.urandom(500_000)
    got = bytearray()

    def read() -> None:
        while piece := os.read(reader, 4096):
            got.extend(piece)

    thread = threading.Thread(target=read)
    thread.start()
    chasquid.write_all(writer, data)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert got == data


def test_a_move_takes_the_place_of_its_target(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "tmp" / "x").write_bytes(b"new")
    (tmp_path / "new" / "x").write_bytes(b"old")
    chasquid.move_synced(str(tmp_path / "tmp" / "x"), str(tmp_path / "new" / "x"))
    assert (tmp_path / "new" / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path / "tmp") == []


def test_an_append_adds_to_the_end_and_makes_no_file(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"a\n")
    chasquid.append_synced(str(path), b"b\n")
    assert path.read_bytes() == b"a\nb\n"
    with pytest.raises(FileNotFoundError):
        chasquid.append_synced(str(tmp_path / "none"), b"b\n")
    assert os.listdir(tmp_path) == ["journal"]


def test_a_replacement_keeps_the_mode_of_what_it_replaces(tmp_path):
    path = tmp_path / "users"
    path.write_bytes(b"old")
    path.chmod(0o640)
    chasquid.replace_durably(str(path), b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", 0o640)
    assert os.listdir(tmp_path) == ["users"]


def test_a_replacement_of_nothing_has_the_mode_that_was_asked_for(tmp_path):
    path = tmp_path / "users"
    chasquid.replace_durably(str(path), b"new", 0o644)
    assert (path.read_bytes(), mode_of(path)) == (b"new", 0o644)


def test_a_replacement_that_fails_leaves_the_old_content_alone(tmp_path):
    path = tmp_path / "users"
    path.mkdir()  # a file cannot take the place of a directory
    (path / "inside").write_bytes(b"")
    with pytest.raises(OSError):
        chasquid.replace_durably(str(path), b"new")
    assert os.listdir(tmp_path) == ["users"]
    assert os.listdir(path) == ["inside"]


def test_a_replacement_works_on_a_name_without_a_directory(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import chasquid\n"
        "chasquid.replace_durably('users', b'new')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODULE.parent)], cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stderr.decode()[-200:]) == (0, "")
    assert (tmp_path / "users").read_bytes() == b"new"


# --- On the loop ----------------------------------------------------------------------------


def on_disk(call, crashes=None, threads=4):
    async def main(loop):
        with loop.deadline(60):
            return await call(loop, chasquid.Disk(loop))

    return run(main, crashes=crashes, threads=threads)


async def create(disk, path):
    await disk.create(f"{path}.tmp", b"x", str(path))


def test_many_files_created_and_moved_at_once_are_all_there(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "new").mkdir()

    async def call(loop, disk):
        async def deliver(number):
            name = str(number)
            temporary, path = str(tmp_path / "tmp" / name), str(tmp_path / "new" / name)
            await disk.create(temporary, name.encode() * 100, path)
            if number % 2:
                await disk.remove(str(tmp_path / "new" / name))

        for task in [loop.spawn(deliver(number), "delivers") for number in range(60)]:
            await task.join()

    on_disk(call)
    assert sorted(map(int, os.listdir(tmp_path / "new"))) == list(range(0, 60, 2))
    assert (tmp_path / "new" / "58").read_bytes() == b"58" * 100
    assert os.listdir(tmp_path / "tmp") == []


def test_an_error_comes_to_those_whom_it_concerns_and_to_nobody_else(tmp_path):
    async def call(loop, disk):
        async def outcome(work):
            try:
                return await work
            except OSError as error:
                return type(error)

        works = [
            create(disk, tmp_path / "good"),
            disk.remove(str(tmp_path / "none")),
            disk.remove(str(tmp_path / "none")),
            create(disk, tmp_path / "none" / "bad"),
            disk.create(str(tmp_path / "tmp"), b"x", str(tmp_path / "none" / "worse")),
            disk.commit(10_000, b"x", str(tmp_path / "tmp"), str(tmp_path / "f")),
        ]
        tasks = [loop.spawn(outcome(work), "works") for work in works]
        return [await task.join() for task in tasks]

    results = on_disk(call)
    none = FileNotFoundError
    assert results == [None, None, None, none, none, OSError]
    assert os.listdir(tmp_path) == ["good"]


def test_a_file_that_exists_is_not_created_again_on_the_loop(tmp_path):
    (tmp_path / "f").write_bytes(b"old")

    async def call(loop, disk):
        with pytest.raises(FileExistsError):
            await disk.create(str(tmp_path / "f"), b"new", str(tmp_path / "g"))

    on_disk(call)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_a_job_that_fails_in_a_way_that_nobody_foresaw_is_told_and_the_disk_goes_on(
    tmp_path, threads
):
    async def call(loop, disk):
        async def fails(work):
            with pytest.raises((OSError, ValueError)), loop.deadline(60):
                await work

        works = [
            disk.remove(str(tmp_path)),  # no file
            disk.create("a\0b", b"x", str(tmp_path / "f")),  # no system call takes that
            disk.create(str(tmp_path / "f"), "no octets", str(tmp_path / "g")),
        ]
        for task in [loop.spawn(fails(work), "fails") for work in works]:
            await task.join()
        with loop.deadline(60):
            await create(disk, tmp_path / "after")

    on_disk(call, crashes=[], threads=threads)
    assert os.listdir(tmp_path) == ["after"]


class Tired(chasquid.Workers):
    """Workers without a thread to start, until somebody says otherwise."""

    tired = True

    def submit(self, job, done) -> None:
        if self.tired:
            raise chasquid.ChasquidError("no worker thread can be started")
        super().submit(job, done)


def test_a_moment_without_threads_is_told_and_the_disk_goes_on(tmp_path):
    workers = Tired(1)
    loop = chasquid.Loop(chasquid.Clock(), workers, lambda name, error: None)

    async def main():
        disk = chasquid.Disk(loop)
        with pytest.raises((OSError, chasquid.ChasquidError)) as caught, loop.deadline(60):
            await create(disk, tmp_path / "first")
        assert not isinstance(caught.value, chasquid.Expired)
        workers.tired = False
        with loop.deadline(60):
            await create(disk, tmp_path / "second")

    try:
        loop.run(main())
    finally:
        workers.close()
    assert os.listdir(tmp_path) == ["second"]


def test_who_is_cancelled_while_a_file_is_synced_leaves_none_behind(tmp_path):
    async def call(loop, disk):
        tasks = [
            loop.spawn(create(disk, tmp_path / f"f{number}"), "creates") for number in range(12)
        ]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                await turns(loop, 1)
                task.cancel()
        kept = []
        for number, task in enumerate(tasks):
            try:
                await task.join()
                kept.append(f"f{number}")
            except chasquid.Cancelled:
                pass
        await create(disk, tmp_path / "after")
        return [*kept, "after"]

    assert sorted(on_disk(call)) == sorted(os.listdir(tmp_path))


def test_a_directory_that_is_there_is_made_durable_too(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    synced = []
    monkeypatch.setattr(chasquid, "sync_directory", synced.append)
    chasquid.make_directory(str(tmp_path / "a" / "b"))
    assert synced[:2] == [str(tmp_path / "a"), str(tmp_path)]
    assert synced[-1] == "/"


@pytest.mark.parametrize(("number", "fails"), [(errno.EACCES, False), (errno.EIO, True)])
def test_what_is_not_ours_to_sync_is_passed_over(tmp_path, monkeypatch, number, fails):
    def refuse(path):
        raise OSError(number, "no")

    monkeypatch.setattr(chasquid, "sync_directory", refuse)
    if fails:
        with pytest.raises(OSError, match="no"):
            chasquid.make_directory(str(tmp_path))
    else:
        chasquid.make_directory(str(tmp_path))
