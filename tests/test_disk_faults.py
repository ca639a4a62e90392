# SPDX-License-Identifier: Apache-2.0
"""Rooms STORAGE, ITEMS, QUEUE: each system call below them fails once, in turn.

The server here is a second copy of the module, whose `os` is a layer of ours: it numbers the
calls that concern files below a directory, and one of them fails. A call may fail without
having done anything, or when it is done already; a write leaves half of its data. Each time,
what got its 250 is delivered whole, what did not gets a 451 or 452, the session goes on, and
nothing is left behind in the process.

Of a sync that has failed nobody knows what it has written, and the next one may say nothing
of it. So a file whose sync failed must get no name, and a name whose directory could not be
synced must go.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from os_layer import Layer, copy_of_module
from support import Server, Wire, greeted, send, wait_for

import chasquid

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE)


class Fault(NamedTuple):
    """How a call fails: with which number, and whether it is carried out all the same."""

    number: int
    done: bool


NO_FAULT = Fault(0, False)


def faults(call: int, errors: int = len(ERRORS)) -> list[Fault]:
    """Return how a call fails: with so many errors, and with one of them although it is done."""
    numbers = [ERRORS[(call + more) % len(ERRORS)] for more in range(errors)]
    return [*(Fault(number, False) for number in numbers), Fault(numbers[0], True)]


class Below(Layer):
    """`os`, for files below `directory` one that can fail; for all else the real one.

    `doubtful` are names that a failed sync leaves in doubt, until they are taken away;
    `trusted` says where such a file got a name for good.
    """

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._lock = threading.Lock()
        self._unsynced: dict[str, set[str]] = {}  # names by directory, since its last sync
        self._unwritten: set[str] = set()  # files that were made, and not synced yet
        self._failed: set[str] = set()  # new files whose sync failed
        self._dead: set[str] = set()  # files whose sync failed, until they are removed
        self.doubtful: set[str] = set()
        self.trusted: list[str] = []
        self.seen: list[tuple[str, str]] = []
        self._lasting: frozenset[str] = frozenset()
        self.arm(0, NO_FAULT)

    def arm(self, call: int, fault: Fault, name: str = "") -> None:
        """Let the call of that number fail, counted from now, of all or of those of a name.

        0 is none.
        """
        with self._lock:
            self.seen = []
            self.hit: tuple[str, str] | None = None
            self._call, self._fault, self._name = call, fault, name

    @contextlib.contextmanager
    def failing(self, names: Iterable[str], fault: Fault) -> Iterator[None]:
        """Let all calls of these names fail within the block."""
        self.arm(0, fault)
        self._lasting = frozenset(names)
        try:
            yield
        finally:
            self._lasting = frozenset()

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        fd = self._do("open", path, lambda: os.open(path, flags, mode), undo=os.close)
        self._paths[fd] = os.fspath(path)
        if flags & os.O_EXCL:
            self._unwritten.add(path)
        return fd

    def close(self, fd: int) -> None:
        path = self._paths.pop(fd, "")
        self._do("close", path, lambda: os.close(fd), always=True)

    def write(self, fd: int, data: bytes) -> int:
        def half() -> int:
            return os.write(fd, data[: max(1, len(data) // 2)])

        return self._do("write", self._paths.get(fd, ""), lambda: os.write(fd, data), instead=half)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        path = self._paths.get(fd, "")
        if path in self._dead:
            self.trusted.append(path)

        def half() -> int:
            return os.pwrite(fd, data[: max(1, len(data) // 2)], offset)

        return self._do("pwrite", path, lambda: os.pwrite(fd, data, offset), instead=half)

    def syncfs(self, fd: int) -> None:
        try:
            self._do("syncfs", self._paths.get(fd, ""), lambda: None)
        except OSError:
            for names in self._unsynced.values():
                self.doubtful |= names
            self._unsynced.clear()
            raise
        self._unsynced.clear()
        self._unwritten.clear()

    def fsync(self, fd: int) -> None:
        path = self._paths.get(fd, "")
        if path in self._dead:
            self.trusted.append(path)
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        try:
            self._do("fsync", path, lambda: None)  # no power is cut here, and it takes long
        except OSError:
            if is_directory:
                self.doubtful |= self._unsynced.pop(path, set())
            else:
                self._dead.add(path)
                if path in self._unwritten:
                    self._failed.add(path)
            raise
        self._unsynced.pop(path, None)
        self._unwritten.discard(path)

    fdatasync = fsync

    def rename(self, old: str, new: str) -> None:
        self._do("rename", old, lambda: os.rename(old, new))
        if old in self._failed:
            self.trusted.append(new)
        self._made(new)

    def link(self, old: str, new: str) -> None:
        self._do("link", old, lambda: os.link(old, new))
        if old in self._failed:
            self.trusted.append(new)
        self._made(new)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self._do("mkdir", path, lambda: os.mkdir(path, mode))
        self._made(path)
        time.sleep(0.003)  # so that two meet who make directories at the same time

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: os.unlink(path))
        self._gone(path)

    def rmdir(self, path: str) -> None:
        self._do("rmdir", path, lambda: os.rmdir(path))
        self._gone(path)

    def _made(self, path: str) -> None:
        self.doubtful.discard(path)  # it is another file now
        self._unsynced.setdefault(os.path.dirname(path), set()).add(path)

    def _gone(self, path: str) -> None:
        self.doubtful.discard(path)
        self._failed.discard(path)
        self._dead.discard(path)
        self._unwritten.discard(path)

    def _do(
        self,
        name: str,
        path: str,
        call: Callable[[], Any],
        *,
        always: bool = False,
        instead: Callable[[], Any] = lambda: None,
        undo: Callable[[Any], Any] = lambda result: None,
    ) -> Any:
        if not self._is_ours(path):
            return call()
        with self._lock:
            self.seen.append((name, path))
            counted = [seen for seen, _ in self.seen if self._name in ("", seen)]
            fails = len(counted) == self._call and counted[-1] == name or name in self._lasting
            if fails:
                self.hit = (name, path)
        if not fails:
            return call()
        if always or self._fault.done:
            undo(call())
        else:
            instead()
        raise OSError(self._fault.number, os.strerror(self._fault.number), path)


class Remote:
    """Other servers, of which all is known: they defer, refuse or take everything."""

    def __init__(self, module: Any, state: str) -> None:
        self._module = module
        self.state = state
        self.taken: list[bytes] = []

    async def deliver(self, delivery: Any, destinations: Sequence[Any]) -> list[Any]:
        state = self._module.State(self.state)
        if state == "sent":
            self.taken.append(b"".join(delivery.message.chunks()))
        status = {"sent": "2.0.0", "deferred": "4.0.0", "failed": "5.0.0"}[self.state]
        return [self._module.Result(state, status, "so it is")] * len(destinations)


class Faulty(Server):
    """A server whose disk fails when it is told to."""

    def __init__(self, directory: Path, remote: str = "deferred") -> None:
        self.below = Below(str(directory))
        self.module = copy_of_module(self.below)
        self.remote = Remote(self.module, remote)
        self.piped = directory / "piped"
        self.log_start = 0  # where that of the message begins that is looked at
        super().__init__(
            directory,
            aliases={
                "here.example": f"team: ana, ben\npipe: | tee -a {self.piped}\n"
                "far: eva@there.example\n"
            },
            max_queue_items=100_000,
            remote=self.remote,
        )

    def make(self) -> Any:
        config = self.module.load_config(str(self.config_dir))
        return self.module.Daemon(config, **self._daemon_keywords)

    def events(self, id: str) -> list[str]:
        """Return the names of what has happened to a message."""
        with open(self.directory / "mail.log", encoding="utf-8") as log:
            log.seek(self.log_start)
            return re.findall(rf"event=(\S+) id={id}\b", log.read())

    def log_text(self) -> str:
        """Return the server's log, if there is one yet."""
        path = self.directory / "server.log"
        return path.read_text() if path.exists() else ""

    def has_journal(self) -> bool:
        """Tell whether what is written goes by way of the journal, and nothing is to be saved."""
        disk = self.daemon._disk
        return disk._recovery is None and disk._journal is not None

    def rest(self) -> None:
        """Wait until nothing happens on the disk any more."""
        before = -1
        while before != len(self.below.seen):
            before = len(self.below.seen)
            self.settle()
            time.sleep(0.004)

    def finish(self, id: str) -> None:
        """Have what is left of a message attempted until it is done."""

        def done() -> bool:
            if {"done", "lost"} & set(self.events(id)):
                return True
            with contextlib.suppress(chasquid.ChasquidError):
                chasquid.ask_running_server(str(self.data_dir), "queue-retry", id)
            return False

        wait_for(done, f"{id} to be done")


class Case(NamedTuple):
    """A kind of message: who gets it, from whom, how large, and what other servers do."""

    recipient: str
    mailboxes: tuple[str, ...]  # where it must be in the end
    octets: int = 100
    sender: str = ""
    remote: str = "sent"
    fresh: bool = False  # whether the Maildir must be made first, which takes many syncs


IN_MEMORY = chasquid.MEMORY_LIMIT + chasquid._BORROWED
CASES = {
    "a new mailbox": Case("ana", ("ana",), fresh=True),
    "two new mailboxes": Case("team", ("ana", "ben"), fresh=True),
    "a mailbox": Case("ana", ("ana",)),
    "two mailboxes": Case("team", ("ana", "ben")),
    "a large message": Case("ana", ("ana",), chasquid.MEMORY_LIMIT + 20_000),
    "a larger one, which goes round the journal": Case("ana", ("ana",), IN_MEMORY + 50_000),
    "a pipe": Case("pipe", ()),
    "another server": Case("far", ()),
    "another server that refuses it": Case(
        "far", ("ana",), sender="ana@here.example", remote="failed"
    ),
    "another server that is busy": Case("far", (), remote="deferred"),
}


def content(label: str, octets: int) -> bytes:
    return (
        f"Subject: {label}\r\n\r\n".encode() + (b"x" * 70 + b"\r\n") * (octets // 72) + b"end\r\n"
    )


class Attempt:
    """One message, with one call that fails, and what became of it."""

    def __init__(self, server: Faulty, wire: Wire, case: Case, label: str) -> None:
        self.server, self.wire, self.case, self.label = server, wire, case, label
        self.data = content(label, case.octets)

    def send(self, call: int, fault: Fault, name: str = "") -> tuple[str, str] | None:
        """Return the call that failed, if there was one of that number, and name."""
        server, below = self.server, self.server.below
        for user in ("ana", "ben"):
            if self.case.fresh:
                shutil.rmtree(server.maildir(user), ignore_errors=True)
            for path in server.maildir(user).glob("new/*"):
                path.unlink()
        server.log_start = (server.directory / "mail.log").stat().st_size
        below.arm(call, fault, name)
        recipient = f"{self.case.recipient}@here.example"
        reply = send(self.wire, self.data, recipient, self.case.sender)
        self.id = reply.rpartition(" ")[2] if reply.startswith("250 ") else ""
        if self.id:
            ends = {"done", "next-attempt", "lost"}  # if its file is removed, but not without error
            wait_for(lambda: ends & set(server.events(self.id)), f"an attempt of {self.id}")
        else:
            assert reply[:3] in ("451", "452"), (reply, below.hit)
        server.rest()
        hit, seen = below.hit, below.seen
        below.arm(0, NO_FAULT)
        assert not below.trusted, f"{self.label}: {below.trusted} was made of a failed sync"
        kept = {path for path in below.doubtful if os.path.exists(path)}
        assert not kept, f"{self.label}: {kept} is in doubt, and is there"
        below.doubtful.clear()
        left = self._halves()
        if hit is None or hit[0] not in ("open", "unlink"):  # which leave it for the next start
            assert not left, f"{self.label}: {hit} leaves {left}"
        self.calls = collections.Counter(called for called, _ in seen)
        return hit

    def _halves(self) -> list[Path]:
        """Return files that were not written to their end; take them away."""
        found = [
            *self.server.data_dir.glob("queue/tmp/*"),
            *self.server.data_dir.glob("mail/*/*/tmp/*"),
        ]
        for path in found:
            path.unlink()
        return found

    def check(self) -> None:
        """Have it delivered if it is owed, and look for it; what is not owed must be whole."""
        server, case = self.server, self.case
        if self.id and case.remote != "deferred":
            server.finish(self.id)
        for user in case.mailboxes:
            self._check_mailbox(user)
        if not self.id:
            return
        if case.recipient == "pipe":
            assert server.piped.read_bytes().endswith(self.data), self.label
        elif case.remote == "sent" and not case.mailboxes:
            assert any(taken.endswith(self.data) for taken in server.remote.taken), self.label
        elif case.remote == "deferred":
            assert any(self.id in name for name in server.queued("new", "cur")), self.label

    def _check_mailbox(self, user: str) -> None:
        found = [path.read_bytes() for path in self.server.maildir(user).glob("new/*")]
        if self.case.remote == "failed":
            wanted = f"Subject: {self.label}\n".encode()
            whole = [message for message in found if wanted in message]
        else:
            whole = [message for message in found if message.endswith(self._in_maildir())]
        assert len(whole) == len(found), f"{self.label}: a message for {user} is not whole"
        assert whole or not self.id, f"{self.label}: got its 250, and {user} has it not"

    def _in_maildir(self) -> bytes:
        return self.data.replace(b"\r\n", b"\n")


def held(server: Faulty) -> tuple[int, int]:
    """Return how many descriptors are open, and how many tasks there are.

    Not counted is a task that begins a while after the start.
    """
    names = [task.name for task in list(server.daemon.loop._tasks)]
    return len(os.listdir("/dev/fd")), len(names) - names.count("records of DKIM keys")


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Callable[[str], Faulty]]:
    with contextlib.ExitStack() as stack:

        def start(remote: str) -> Faulty:
            server = stack.enter_context(Faulty(tmp_path, remote))
            server.wait_until_ready()
            return server

        yield start


@pytest.mark.parametrize("name", CASES)
def test_a_call_fails_on_the_way_of_a_message(faulty, name):
    case = CASES[name]
    server = faulty(case.remote)
    wire = greeted(server)
    first = Attempt(server, wire, case, "none")
    assert first.send(0, NO_FAULT) is None
    first.check()
    server.rest()
    before = held(server)
    hits: set[str] = set()
    deferred = 0
    # by name, as in how many pieces a large message comes differs from time to time
    targets = [(name, call) for name in first.calls for call in range(1, first.calls[name] + 1)]
    for each, (name, call) in enumerate(targets):
        for number, fault in enumerate(faults(each, 1 if case.fresh else 4)):
            wait_for(server.has_journal, "what a failed sync has spoilt to be written anew")
            attempt = Attempt(server, wire, case, f"{name} {call} {number}")
            if hit := attempt.send(call, fault, name):
                hits.add(hit[0])
            assert wire.ask("NOOP").startswith("250 "), "the session goes on"
            attempt.check()
            deferred += bool(attempt.id)
            if not attempt.id:  # or three errors would end it
                wire.close()
                wire = greeted(server)
    assert hits >= {"open", "write", "fsync", "rename", "close"}
    assert "pwrite" in hits or case.octets > IN_MEMORY, "the journal has part in it"
    waiting = deferred if case.remote == "deferred" else 0

    def given_back() -> bool:
        descriptors, tasks = held(server)
        return descriptors <= before[0] and tasks <= before[1] + waiting

    wait_for(given_back, f"descriptors and tasks to be {before} again")
    wire.close()


LASTING = {
    "no space": (("write",), errno.ENOSPC),
    "no quota": (("write", "mkdir"), errno.EDQUOT),
    "nothing can be synced": (("fsync",), errno.EIO),
    "no descriptors": (("open",), errno.EMFILE),
    "nothing can be renamed or removed": (("rename", "link", "unlink"), errno.EIO),
    "nothing works": (("open", "write", "fsync", "rename", "link", "unlink", "mkdir"), errno.EIO),
}


@pytest.mark.parametrize("way", LASTING)
def test_a_disk_fails_for_a_while(faulty, way):
    """Nothing is taken meanwhile but what is stored; what waited before goes on afterwards."""
    names, number = LASTING[way]
    server = faulty("deferred")
    kinds = (
        "a mailbox",
        "two mailboxes",
        "a large message",
        "a pipe",
        "another server that is busy",
    )
    cases = {kind: CASES[kind]._replace(remote="deferred") for kind in kinds}
    wires = {kind: greeted(server) for kind in kinds}
    accepted: list[tuple[Case, bytes]] = []

    def all_kinds(label: str) -> int:
        before = len(accepted)
        for kind, case in cases.items():
            data = content(f"{label}, {kind}", case.octets)
            reply = send(wires[kind], data, f"{case.recipient}@here.example")
            assert reply[:3] in ("250", "451", "452"), reply
            if reply.startswith("250 "):
                accepted.append((case, data))
        return len(accepted) - before

    assert all_kinds("before") == len(kinds)
    server.rest()
    held_before = held(server)
    with server.below.failing(names, Fault(number, False)):
        assert all_kinds("meanwhile") < len(kinds)
        with contextlib.suppress(chasquid.ChasquidError):
            chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all")
        server.rest()
        assert all_kinds("still") < len(kinds)
    assert not server.below.trusted

    def takes_mail_again() -> bool:
        """After a failed sync it does so once all of before is safe."""
        with contextlib.closing(greeted(server)) as wire:
            data = content("is it safe", 100)
            taken = send(wire, data, "ana@here.example").startswith("250 ")
            if taken:
                accepted.append((CASES["a mailbox"], data))
            return taken

    wait_for(takes_mail_again, "the server to take mail again")
    for kind in kinds:  # the third error would end the dialogue
        wires[kind].close()
        wires[kind] = greeted(server)
    assert all_kinds("after") == len(kinds)
    server.remote.state = "sent"

    def retried() -> bool:
        with contextlib.suppress(chasquid.ChasquidError):
            chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all")
        return not server.queued("new", "cur")

    wait_for(retried, "an empty queue")
    for case, data in accepted:
        stored = data.replace(b"\r\n", b"\n")
        for user in case.mailboxes:
            found = [path.read_bytes() for path in server.maildir(user).glob("new/*")]
            assert any(message.endswith(stored) for message in found), (user, data[:60])
        if case.recipient == "far":
            assert any(taken.endswith(data) for taken in server.remote.taken), data[:60]
        if case.recipient == "pipe":
            assert data in server.piped.read_bytes(), data[:60]
    wait_for(
        lambda: all(now <= then for now, then in zip(held(server), held_before, strict=True)),
        f"descriptors and tasks to be {held_before} again",
    )
    for wire in wires.values():
        wire.close()


def started(server: Faulty) -> bool:
    """Start a server; tell whether it runs, or has said in a sentence why it does not."""
    ready = server.log_text().count("event=ready")
    server._error = None  # of the start before
    try:
        server.start()
        wait_for(
            lambda: not server.is_running or server.log_text().count("event=ready") > ready, "it"
        )
        if not server.is_running:
            server.join()
    except server.module.ChasquidError:
        return False
    return True


def test_a_call_fails_at_the_start(tmp_path):
    server = Faulty(tmp_path / "server")
    with server, greeted(server) as wire:
        assert send(wire, content("one", 100), "far@here.example").startswith("250 ")
        assert send(wire, content("two", 300_000), "far@here.example").startswith("250 ")
    (server.data_dir / "queue" / "tmp" / "half").write_bytes(b"half of a message")
    (server.data_dir / "queue" / "m:go").write_text(
        'ID: "Go1"\nfrom: "x@far.example"\nTo: "far@here.example"\n'
        'data: "Subject: go\\n\\nend\\n"\n'
        'rcpt: { address: "eva@there.example" type: EMAIL status: PENDING }\n'
    )
    shutil.copytree(server.data_dir, tmp_path / "as it was")
    server.remote.state = "sent"
    refused = 0
    for call in itertools.count(1):
        server.remote.taken.clear()
        shutil.rmtree(server.data_dir)
        shutil.copytree(tmp_path / "as it was", server.data_dir)
        server.below.arm(call, Fault(ERRORS[call % 4], call % 2 == 0))
        runs = started(server)
        hit = server.below.hit
        server.below.arm(0, NO_FAULT)
        if not runs:
            refused += 1
            assert started(server), f"call {call}, {hit}, failed once, and still it does not start"
        chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all")
        wait_for(lambda: not server.queued("new", "cur"), f"the queue to be empty after {hit}")
        server.stop()
        subjects = {taken[taken.index(b"Subject: ") :][9:12] for taken in server.remote.taken}
        assert subjects == {b"one", b"two", b"go\r"}, hit
        if hit is None:
            break
    assert call > 10
    assert refused


def test_a_call_fails_as_a_user_is_added(tmp_path, capsys):
    server = Faulty(tmp_path)
    domain = server.config_dir / "domains" / "here.example"
    words = ["--config-dir", str(server.config_dir), "user-add", "new@here.example", "--password"]
    before = {path.name for path in domain.iterdir()}
    for call in itertools.count(1):
        for fault in faults(call, 1):
            old = (domain / "users").read_bytes()
            server.below.arm(call, fault)
            status = server.module.main([*words, f"password {call} {fault.done}"])
            hit = server.below.hit
            server.below.arm(0, NO_FAULT)
            assert hit is None or status == 0 or capsys.readouterr().err.startswith("chasquid: ")
            users = chasquid.load_users(str(domain))
            assert status or (domain / "users").read_bytes() != old
            assert set(users) >= {"ana", "ben"}, "what was there is there"
            left = {path.name for path in domain.iterdir()} - before
            assert not left or hit[0] in ("open", "unlink"), f"{hit} leaves {left}"
            for name in left:
                (domain / name).unlink()
        if hit is None:
            break
    assert call > 5
