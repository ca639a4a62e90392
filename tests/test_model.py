# SPDX-License-Identifier: Apache-2.0
"""Rooms ITEMS, QUEUE, COURIERS, DISK, JOURNAL: what is owed is never lost, whenever it ends.

A state machine lets mail come in, succeed, wait and fail, lets time pass, lets operators retry,
bounce and remove, lets single system calls fail, stops in order, and kills: from some system call
on nothing reaches the disk any more, as if the process had died there. Then it starts again on
the same directory. The mailboxes, the queue's files and the journal are real; other servers and
programs are scripts that remember what they were given.

Against it stands a model: which message is owed to whom since its 250. After each step, all that
is owed has arrived whole, lies in the queue, or has failed and been reported; nothing arrives
twice unless a kill came between the delivery and its being written down; and the mail log tells of
each delivery once. `-m fuzz` tries many more orders of events.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support import HOST, HOUR, SECONDS, FakeClock, Inline, record, run, unsigned

import chasquid
from chasquid import (
    Delivery,
    Destination,
    DestinationKind,
    DsnParameters,
    Envelope,
    FinalRecipient,
    Notify,
    Result,
    State,
)

GIVE_UP = 20 * HOUR
OURS = "here.example"
PREFIX = b"Received: by us\r\n"
LOCAL = [f"{name}@{OURS}" for name in "abc"]
CROWD = [f"member{number}@{OURS}" for number in range(18)]  # too many to wait for before the 250
REMOTE = ["d@there.example", "e@elsewhere.example"]
PIPE = "tee -a file"
OUR_SENDER, OUTSIDER = f"ana@{OURS}", "eva@outside.example"
SEGMENT = 2 * chasquid.CHUNK  # small, so that they are changed often

# Many small files: where there is a file system in memory, take it.
_SHORT_LIVED = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Calls:
    """`os`, which carries out what changes files below `directory` until it is killed.

    `kill_after` and `fail_after` count such calls. One that fails may have been done all the same.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._paths: dict[int, str] = {}
        self.killed = False
        self.kill_after = self.fail_after = 0
        self.done = False
        self.on_kill: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR):
            fd = os.open(path, flags, mode)
        else:
            fd = self._do(path, lambda: os.open(path, flags, mode), undo=os.close)
        self._paths[fd] = os.fspath(path)
        return fd

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        os.close(fd)

    def write(self, fd: int, data: bytes) -> int:
        half = data[: len(data) // 2]
        return self._do(
            self._paths.get(fd, ""), lambda: os.write(fd, data), lambda: os.write(fd, half)
        )

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        half = data[: len(data) // 2]
        return self._do(
            self._paths.get(fd, ""),
            lambda: os.pwrite(fd, data, offset),
            lambda: os.pwrite(fd, half, offset),
        )

    def fsync(self, fd: int) -> None:
        self._do(self._paths.get(fd, ""), lambda: None)  # no power is cut here

    fdatasync = syncfs = fsync

    def load_syncfs(self) -> Callable[[int], None]:
        return self.syncfs

    def rename(self, old: str, new: str) -> None:
        self._do(old, lambda: os.rename(old, new))

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self._do(path, lambda: os.mkdir(path, mode))

    def unlink(self, path: str) -> None:
        self._do(path, lambda: os.unlink(path))

    def rmdir(self, path: str) -> None:
        self._do(path, lambda: os.rmdir(path))

    def utime(self, path: str, times: tuple[float, float]) -> None:
        self._do(path, lambda: os.utime(path, times))

    def _do(
        self,
        path: str,
        call: Callable[[], Any],
        instead: Callable[[], Any] = lambda: None,
        undo: Callable[[Any], Any] = lambda result: None,
    ) -> Any:
        if not path.startswith(self._directory):
            return call()
        if self.killed:
            raise OSError(errno.EIO, "this process is dead", path)
        self.kill_after -= 1
        self.fail_after -= 1
        if self.kill_after == 0:
            if self.done:
                instead()
            self.killed = True
            self.on_kill()
            raise OSError(errno.EIO, "this process is dead", path)
        if self.fail_after == 0:
            if self.done:
                undo(call())
            else:
                instead()
            raise OSError(errno.ENOSPC, "full", path)
        return call()


class ModelClock(FakeClock):
    """Stands until it is moved, but `runs` where a loop ends, which may wait for a moment."""

    runs = False

    def monotonic(self) -> float:
        self.now += 0.001 * self.runs
        return self.now


class Life(threading.Thread):
    """A server's queue from its start to its end, on a loop that obeys one command at a time."""

    def __init__(self, machine: Model) -> None:
        super().__init__(daemon=True)
        self._machine = machine
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.loop: chasquid.Loop
        self.disk: chasquid.Disk
        self.queue: chasquid.Queue

    def run(self) -> None:
        async def main(loop: chasquid.Loop) -> None:
            await self._machine.wire(self, loop)
            self._answers.put((None, None))
            while (command := self._commands.get()) is not None:
                try:
                    self._answers.put((await command(self), None))
                except BaseException as error:
                    self._answers.put((None, error))

        try:
            run(main, clock=self._machine.clock, workers=Inline())
        except BaseException as error:
            self._answers.put((None, error))
        else:
            self._answers.put((None, None))

    def begin(self) -> None:
        self.start()
        try:
            self._answer()
        except BaseException:
            self.join(SECONDS)
            raise

    def do(self, command: Callable[[Life], Coroutine[Any, Any, Any]]) -> Any:
        self._commands.put(command)
        return self._answer()

    def end(self) -> None:
        if self.is_alive():
            self._machine.clock.runs = True
            self._commands.put(None)
            self._answer()
            self.join(SECONDS)
            self._machine.clock.runs = False
        self._close()

    def _close(self) -> None:
        """Give back the journal's descriptors, as the end of a process would."""
        journal = self.disk._journal if hasattr(self, "disk") else None
        if isinstance(journal, chasquid.JournalThreads):
            self._machine.patch.setattr(chasquid, "os", os)
            journal.journal.close()

    def _answer(self) -> Any:
        value, error = self._answers.get(timeout=SECONDS)
        if error is not None:
            raise error
        return value

    async def turn(self, turns: int) -> None:
        for _ in range(turns):
            await self.loop.turn()


Debt = tuple[str, str]  # the id of a message, and who it is for


class Mail:
    """A message as the model knows it."""

    def __init__(self, id: str, sender: str, names: Sequence[str], data: bytes, success: bool):
        self.id = id
        self.sender = sender
        self.names = names
        self.data = data
        self.success = success  # whether its sender asked to hear of that
        self.state = "offered"  # then "accepted", "refused", or "cut": a kill came before that
        self.removed = False  # by the operator


class Written:
    """What a file of the queue says, read as its format is described and by nobody else."""

    def __init__(self, path: Path) -> None:
        self.id, _, size = path.name.partition(",S=")
        content = path.read_bytes()
        self.content = content[: int(size)]
        lines = [line for line in content[int(size) :].split(b"\n") if line]
        envelope = json.loads(lines[0])
        self.names = [recipient["destination"]["value"] for recipient in envelope["recipients"]]
        self.states = ["pending"] * len(self.names)
        for line in lines[1:]:
            try:
                results = json.loads(line)["results"]
            except ValueError:
                continue  # torn
            for result in results:
                self.states[result["recipient"]] = result["state"]


class Model(RuleBasedStateMachine):
    """Mail, couriers, operators, faults and ends in any order, and what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=_SHORT_LIVED))
        self.data_dir = self.home / "data"
        self.data_dir.mkdir()
        self.clock = ModelClock()
        self.plan: dict[str, list[State]] = collections.defaultdict(list)
        self.mail: dict[str, Mail] = {}
        self.arrived: collections.Counter[Debt] = collections.Counter()  # elsewhere
        self.allowed: collections.Counter[Debt] = collections.Counter()  # more than once
        self.failed: set[Debt] = set()
        self.reports: dict[str, set[Debt]] = collections.defaultdict(set)  # by action
        self.known: dict[Path, Debt | None] = {}  # files in mailboxes that were read
        self.told: collections.Counter[Debt] = collections.Counter()  # by the log
        self.untold: collections.Counter[Debt] = collections.Counter()  # as a kill came before
        self.wrong: list[str] = []
        self.patch = pytest.MonkeyPatch()
        self._kill_at_start = 0
        self._number = itertools.count()
        self._start()

    # --- lives ---

    def _start(self) -> None:
        while True:
            calls = self.calls = Calls(self.data_dir)
            calls.on_kill = self._killed
            self.patch.setattr(chasquid, "os", calls)
            self.patch.setattr(chasquid, "_load_syncfs", calls.load_syncfs)
            self.patch.setattr(chasquid, "_file_system_type", lambda path: "tmpfs")
            calls.kill_after, self._kill_at_start = self._kill_at_start, 0
            self.logs = self.home / f"logs{next(self._number)}"
            self.logs.mkdir()
            self.log_ends: int | None = None
            self.tasks: list[chasquid.Task] = []
            self.life = Life(self)
            try:
                self.life.begin()
            except chasquid.ChasquidError:
                if not self.calls.killed:
                    raise
            if not self.calls.killed:
                return
            self.life.end()

    async def wire(self, life: Life, loop: chasquid.Loop) -> None:
        """Do what DAEMON does at the start, as far as it concerns the queue."""
        journal = str(self.data_dir / "journal")
        chasquid.replay_journal(journal)
        log = record(self.logs, self.clock)
        life.loop, life.disk = loop, chasquid.Disk(loop, log)
        maildirs = chasquid.MaildirCourier(
            loop, life.disk, "%data_dir%/mail/%to_user%", str(self.data_dir), HOST, _everybody
        )
        couriers = chasquid.Couriers(
            Careful(self, maildirs), Elsewhere(self, life), Elsewhere(self, life), _is_local,
            durable=True,
        )  # fmt: skip
        life.queue = chasquid.Queue(
            loop, life.disk, log,
            chasquid.QueueSettings(str(self.data_dir / "queue"), HOST, GIVE_UP, 1000, "+"),
            couriers, _itself, _is_local, lambda: 0.5, unsigned,
        )  # fmt: skip
        await life.disk.open_journal(journal, SEGMENT)
        life.queue.recover()

    def _killed(self) -> None:
        """Note what is true at the moment of a kill."""
        self.log_ends = (self.logs / "mail.log").stat().st_size
        waiting = {
            (written.id, name)
            for written in self.files()
            for name, state in zip(written.names, written.states, strict=True)
            if state in ("pending", "deferred")
        }
        for mail in self.mail.values():
            for name in mail.names:
                debt = (mail.id, name)
                if mail.state == "offered" or debt in waiting:
                    self.allowed[debt] += 1
                    self.untold[debt] += 1
            if mail.state == "offered":
                mail.state = "cut"

    def go_on(self, turns: int) -> None:
        self.life.do(lambda life: life.turn(turns))
        self.look_after()

    def look_after(self) -> None:
        if self.calls.killed:
            self.life.end()
            self._read_log()
            self._start()

    # --- what happens ---

    @rule(
        names=st.lists(st.sampled_from([*LOCAL, *REMOTE, PIPE]), min_size=1, unique=True)
        | st.lists(st.sampled_from(LOCAL), min_size=1, unique=True)
        | st.just(CROWD),
        sender=st.sampled_from([OUR_SENDER, OUTSIDER, ""]),
        large=st.sampled_from([0, 0, 0, chasquid.MEMORY_LIMIT, 300_000]),
        success=st.sampled_from([False, False, True]),
        first=st.sampled_from([State.SENT, State.FAILED, State.DEFERRED]),
        turns=st.integers(0, 12),
    )
    def mail_comes_in(
        self, names: list[str], sender: str, large: int, success: bool, first: State, turns: int
    ) -> None:
        self.plan[names[0]].insert(0, first)

        async def offer(life: Life) -> None:
            draft = life.queue.draft()
            body = f"Subject: {draft.id}\r\n\r\n".encode() + b"0123456789abcd\r\n" * (large // 16)
            mail = Mail(draft.id, sender, names, body, success)
            self.mail[mail.id] = mail
            notify = (Notify.SUCCESS, Notify.FAILURE) if success else ()
            try:
                for start in range(0, len(body), 32_768):
                    await draft.add(body[start : start + 32_768])
                draft.complete()
                recipients = tuple(
                    FinalRecipient(_destination(name), name, DsnParameters(notify))
                    for name in names
                )
                envelope = Envelope(draft.id, sender, recipients, self.clock.time(), PREFIX)
                await life.queue.accept(draft, envelope, {"peer": "a test"})
            except (OSError, chasquid.QueueFull):
                draft.discard()
                answer = "refused"
            else:
                answer = "accepted"
            if mail.state == "offered" and not self.calls.killed:
                mail.state = answer

        async def begin(life: Life) -> None:
            self.tasks.append(life.loop.spawn(offer(life), "offer"))
            await life.turn(turns)

        self.life.do(begin)
        self.look_after()

    @rule(
        name=st.sampled_from([*LOCAL, *REMOTE, PIPE, CROWD[3], OUR_SENDER, OUTSIDER]),
        states=st.lists(st.sampled_from([State.DEFERRED, State.FAILED, State.SENT]), max_size=4),
    )
    def others_decide(self, name: str, states: list[State]) -> None:
        self.plan[name] = states

    @rule(turns=st.integers(1, 30))
    def all_goes_on(self, turns: int) -> None:
        self.go_on(turns)

    @rule(seconds=st.sampled_from([6.0, 70.0, 400.0, 2000.0, 4 * HOUR, GIVE_UP]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.go_on(3)

    @rule(number=st.integers(0, 5), verb=st.sampled_from(["retry", "remove", "bounce", "all"]))
    def the_operator_speaks(self, number: int, verb: str) -> None:
        async def speak(life: Life) -> None:
            if verb == "all":
                await life.queue.retry_all()
                return
            items = life.queue.look()
            if not items:
                return
            id = items[number % len(items)].id
            mail = self.mail.get(id)
            if verb == "remove" and mail is None:
                return  # it is a notification, and that would be lost
            if mail is not None:  # from now on, whether that succeeds or not
                mail.removed = mail.removed or verb == "remove"
                if verb == "bounce":
                    self.failed |= {(id, name) for name in mail.names}
            with contextlib.suppress(chasquid.ChasquidError):
                await getattr(life.queue, verb)(id)

        async def begin(life: Life) -> None:
            self.tasks.append(life.loop.spawn(speak(life), verb))
            await life.turn(3)

        self.life.do(begin)
        self.look_after()

    @rule(calls=st.integers(1, 40), done=st.booleans())
    def a_call_fails(self, calls: int, done: bool) -> None:
        self.calls.fail_after, self.calls.done = calls, done

    @rule(
        calls=st.integers(1, 25),
        torn=st.booleans(),
        again=st.sampled_from([0, 0, 1, 3, 6, 10, 20]),
    )
    def it_is_killed(self, calls: int, torn: bool, again: int) -> None:
        """After so many calls; and then at the start once more."""
        self.calls.kill_after, self.calls.done, self._kill_at_start = calls, torn, again

    @rule(turns=st.integers(0, 12))
    def it_is_killed_now(self, turns: int) -> None:
        self.go_on(turns)
        self.calls.killed = True
        self._killed()
        self.look_after()

    @rule()
    def it_is_stopped(self) -> None:
        async def close(life: Life) -> None:
            for task in self.tasks:
                await task.join()
            await life.queue.close()
            await life.disk.close()

        async def stop(life: Life) -> None:
            closing = life.loop.spawn(close(life), "close")
            while not closing.done and not self.calls.killed:  # what is dead waits for its disk
                self.clock.advance(0.01)
                await life.turn(1)

        self.life.do(stop)
        if not self.calls.killed:
            self.life.end()
            self._read_log()
            self._start()
        self.look_after()

    # --- what is there ---

    def files(self) -> list[Written]:
        directory = self.data_dir / "queue"
        return [Written(path) for place in ("new", "cur") for path in directory.glob(f"{place}/*")]

    def mailboxes(self) -> Iterator[Debt]:
        """Yield what lies in the Maildirs; notifications are taken as reports."""
        for path in self.data_dir.glob("mail/*/new/*"):
            if path not in self.known:
                self.known[path] = self._take(path.read_bytes(), f"{path.parts[-3]}@{OURS}")
            if (debt := self.known[path]) is not None:
                yield debt

    def _take(self, content: bytes, name: str) -> Debt | None:
        """Say which message this is, as it arrived in a mailbox."""
        head = f"Delivered-To: {name}\n".encode()
        path, _, rest = content.partition(head)
        for id, mail in self.mail.items():
            if rest == (PREFIX + mail.data).replace(b"\r\n", b"\n"):
                if path != f"Return-Path: <{mail.sender}>\n".encode():
                    self.wrong.append(f"{id} has another Return-Path: {path!r}")
                return id, name
        if not self._take_report(rest):
            self.wrong.append(f"in the mailbox of {name} is what nobody sent: {content[:300]!r}")
        return None

    def _take_report(self, content: bytes) -> bool:
        """Note what a notification reports; false if it is none."""
        lines = content.decode().splitlines()
        ids = [line.partition(": ")[2] for line in lines if line.startswith("X-Chasquid-Queue-ID")]
        if b"report-type=delivery-status" not in content or len(ids) != 1:
            return False
        name = ""
        for line in lines:
            if line.startswith("Final-Recipient: "):
                name = line.partition("; ")[2]
            elif line.startswith("Action: "):
                self.reports[line.partition(": ")[2]].add((ids[0], name))
        return True

    def _read_log(self) -> None:
        """Count what the log of a life says, up to a kill."""
        with open(self.logs / "mail.log", "rb") as file:
            for line in file.read(self.log_ends).decode().splitlines():
                _, fields = chasquid.parse_event(line)
                if fields["event"] == "delivered":
                    self.told[fields["id"], fields["to"][1:-1]] += 1
                if fields["event"] == "lost":
                    self.wrong.append(line)
        self.log_ends = 0  # each line once

    # --- what must hold ---

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert not self.wrong, self.wrong
        assert not list((self.data_dir / "queue" / "bad").iterdir())

    @invariant()
    def nothing_is_delivered_twice(self) -> None:
        for debt, count in (self.arrived + collections.Counter(self.mailboxes())).items():
            assert count <= 1 + self.allowed[debt], f"{debt} was delivered {count} times"

    @invariant()
    def nothing_owed_is_forgotten(self) -> None:
        there = set(self.mailboxes()) | set(self.arrived)
        reported = set(self.reports["failed"])
        waiting: set[Debt] = set()
        for written in self.files():
            if b"report-type=delivery-status" in written.content:
                before = set(self.reports["failed"])
                assert self._take_report(written.content)
                reported |= self.reports["failed"]
                self.reports["failed"] = before  # it may fail itself, and nobody is told then
            for name, state in zip(written.names, written.states, strict=True):
                if state in ("pending", "deferred", "sent"):
                    waiting.add((written.id, name))
        for mail in self.mail.values():
            if mail.state != "accepted" or mail.removed:
                continue
            for name in mail.names:
                debt = (mail.id, name)
                if debt not in there and debt not in waiting and debt not in reported:
                    assert self._may_be_silent(mail, debt), f"{debt} is forgotten"

    def _may_be_silent(self, mail: Mail, debt: Debt) -> bool:
        """Tell whether it may have failed with nobody to be told, or nobody who hears it."""
        too_late = self.clock.now - FakeClock().now >= GIVE_UP
        if debt not in self.failed and not too_late:
            return False
        return not mail.sender or ("report", mail.sender) in self.failed

    def teardown(self) -> None:
        """In the end all that is owed is delivered or reported, and the log tells of it."""
        try:
            self.calls.fail_after = self.calls.kill_after = self._kill_at_start = 0
            self.plan.clear()

            async def finish(life: Life) -> None:
                for _ in range(20):
                    self.clock.advance(2000)
                    await life.turn(5)
                    while life.queue.next_due() == float("-inf"):
                        self.clock.advance(0.01)  # some wait for their disk
                        await life.turn(1)

            self.life.do(finish)
            assert [written.id for written in self.files()] == []
            self.nothing_went_wrong()
            self.nothing_owed_is_forgotten()
            self.nothing_is_delivered_twice()
            self.it_is_stopped()
            assert not self.wrong, self.wrong
            self._events_are_true()
        finally:
            self.life.end()
            self.patch.undo()
            shutil.rmtree(self.home)

    def _events_are_true(self) -> None:
        copies = self.arrived + collections.Counter(self.mailboxes())
        for id, mail in self.mail.items():
            for name in mail.names:
                debt = (id, name)
                told, there = self.told[debt], copies[debt]
                assert told <= there, f"{debt}: {told} deliveries in the log, and {there} in fact"
                missing = there - told
                assert missing <= self.untold[debt], f"{debt}: {missing} deliveries are not logged"


class Careful:
    """The courier of the mailboxes here, who may be told to defer or to fail."""

    def __init__(self, model: Model, maildirs: chasquid.MaildirCourier) -> None:
        self._model = model
        self._maildirs = maildirs

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        results = {
            destination: result
            for destination in destinations
            if (result := _decision(self._model, delivery, destination)).state != State.SENT
        }
        rest = [destination for destination in destinations if destination not in results]
        stored = await self._maildirs.deliver(delivery, rest)
        for destination, result in zip(rest, stored, strict=True):  # the disk may refuse
            _note(self._model, delivery, destination.value, result.state)
            results[destination] = result
        return [results[destination] for destination in destinations]


class Elsewhere:
    """Other servers and programs: they remember what they have taken."""

    def __init__(self, model: Model, life: Life) -> None:
        self._model = model
        self._life = life

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        await self._life.loop.turn()
        results = [self._deliver(delivery, destination) for destination in destinations]
        await self._life.loop.turn()
        return results

    def _deliver(self, delivery: Delivery, destination: Destination) -> Result:
        model = self._model
        result = _decision(model, delivery, destination)
        if result.state != State.SENT or model.calls.killed:
            return result
        try:
            content = b"".join(delivery.message.chunks())
        except OSError as error:
            return Result(State.DEFERRED, "4.3.0", str(error))
        mail = model.mail.get(delivery.id)
        if mail is None:
            if not model._take_report(content):
                model.wrong.append(f"{destination.value} got what nobody sent: {content[:300]!r}")
        else:
            if content != PREFIX + mail.data:
                model.wrong.append(f"{destination.value} got {delivery.id} changed")
            model.arrived[delivery.id, destination.value] += 1
        return result


def _decision(model: Model, delivery: Delivery, destination: Destination) -> Result:
    """Return what is planned for this recipient; if nothing is, it succeeds."""
    name = destination.value
    states = model.plan[name]
    state = states.pop(0) if states else State.SENT
    _note(model, delivery, name, state)
    status = {State.SENT: "2.0.0", State.DEFERRED: "4.0.0", State.FAILED: "5.0.0"}[state]
    return Result(state, status, f"so it was decided: {state}")


def _note(model: Model, delivery: Delivery, name: str, state: State) -> None:
    """Note what fails, and which notifications must wait: they are given up in silence at last."""
    if not model.calls.killed:
        if delivery.id in model.mail and state == State.FAILED:
            model.failed.add((delivery.id, name))
        elif delivery.id not in model.mail and state != State.SENT:
            model.failed.add(("report", name))


def _destination(name: str) -> Destination:
    kind = DestinationKind.PIPE if name == PIPE else DestinationKind.ADDRESS
    return Destination(kind, name)


async def _itself(name: str) -> list[Destination]:
    return [_destination(name)]


async def _everybody(user: str, domain: str) -> bool:
    return True


def _is_local(domain: str) -> bool:
    return domain == OURS


PROFILE = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TestModel = Model.TestCase
TestModel.settings = PROFILE


@pytest.mark.fuzz
def test_the_model_at_length() -> None:
    examples = 10 * int(float(os.environ.get("FUZZ_SECONDS", "120")))
    profile = settings(PROFILE, max_examples=examples, derandomize=False)
    run_state_machine_as_test(Model, settings=profile)
