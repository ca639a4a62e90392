# SPDX-License-Identifier: Apache-2.0
"""Rooms QUEUE, ITEMS: files, schedule, notifications, and what a crash leaves.

Time stands still in these tests and is moved by hand; what is written is written at once.
A crash is a copy of the directory at some moment, from which a new queue starts.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import errno
import itertools
import json
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support import HOST, HOUR, MESSAGE, SECONDS, FakeClock, Inline, address, record, run, unsigned

import chasquid
from chasquid import (
    Delivery,
    Destination,
    DsnParameters,
    Envelope,
    FinalRecipient,
    Item,
    Message,
    Notify,
    Result,
    State,
)

GIVE_UP = 20 * HOUR
OURS = "here.example"
LARGE = MESSAGE.replace(b"\r\n\r\n", b"\r\n\r\n" + b"a line\r\n" * 40_000, 1)  # not in memory


async def itself(name: str) -> list[Destination]:
    """Expand an address to itself."""
    return [address(name)]


class Script:
    """A courier that does as it is told: `plan` has for an address its next states.

    Without a plan it delivers. `deliveries` has id, address and state of all it did.
    """

    def __init__(self) -> None:
        self.plan: dict[str, list[str]] = {}
        self.deliveries: list[tuple[str, str, str]] = []
        self.messages: list[tuple[Delivery, list[str]]] = []
        self.contents: list[bytes] = []
        self.hold: list[chasquid.Event] = []
        self.fault: Exception | None = None

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        if self.fault is not None:
            raise self.fault
        for event in self.hold:
            await event.wait()
        self.messages.append((delivery, [destination.value for destination in destinations]))
        self.contents.append(b"".join(delivery.message.chunks()))
        return [self._result(delivery, destination) for destination in destinations]

    def _result(self, delivery: Delivery, destination: Destination) -> Result:
        states = self.plan.get(destination.value, [])
        state = states.pop(0) if states else State.SENT
        self.deliveries.append((delivery.id, destination.value, state))
        status = {State.SENT: "2.0.0", State.DEFERRED: "4.2.1", State.FAILED: "5.1.1"}[state]
        return Result(
            state,
            status,
            f"{destination.value} is {state}",
            "mx.there.example (192.0.2.1:25)",
            f"550 {status} no, {destination.value}",
        )


class Bench:
    """A queue on a loop, with couriers that are scripts."""

    def __init__(self, loop: chasquid.Loop, directory: Path, clock: FakeClock, **options: Any):
        self.loop = loop
        self.clock = clock
        self.directory = directory / "queue"
        self.local, self.remote, self.pipe = Script(), Script(), Script()
        self.results: list[tuple[str, str]] = []
        couriers = chasquid.Couriers(
            options.get("local", lambda loop: self.local)(loop), self.pipe,
            options.get("remote", self.remote), self.is_local,
            durable=options.get("durable", False),
        )  # fmt: skip
        settings = chasquid.QueueSettings(
            str(self.directory), HOST, GIVE_UP, options.get("limit", 200), "+"
        )
        self.queue = chasquid.Queue(
            loop, chasquid.Disk(loop), record(directory, clock), settings, couriers,
            options.get("expand", itself), self.is_local,
            options.get("random", lambda: 0.5), options.get("sign", unsigned),
            lambda item, recipient: self.results.append(
                (recipient.destination.value, recipient.state)
            ),
        )  # fmt: skip

    @staticmethod
    def is_local(domain: str) -> bool:
        return domain == OURS

    async def accept(
        self,
        *destinations: str | Destination | FinalRecipient,
        sender: str = "ana@here.example",
        data: bytes = MESSAGE,
        prefix: bytes = b"Received: by us\r\n",
        smtputf8: bool = False,
    ) -> Item:
        draft = self.queue.draft()
        await draft.add(data)
        draft.complete()
        final_recipients = []
        for destination in destinations:
            if isinstance(destination, str):
                destination = address(destination)
            final_recipients.append(
                destination
                if isinstance(destination, FinalRecipient)
                else FinalRecipient(destination, destination.value)
            )
        envelope = Envelope(
            draft.id, sender, tuple(final_recipients), self.clock.time(), prefix, smtputf8,
            draft.eight_bit,
        )  # fmt: skip
        return await self.queue.accept(draft, envelope, {"peer": "a test"})

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(2000):
            if condition():
                return
            await self.loop.turn()
        raise AssertionError("waited in vain")

    async def quiet(self) -> None:
        """Let everything happen that happens without time passing."""
        await self.until(lambda: self.queue.next_due() > float("-inf"))

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for _ in range(3):
            await self.loop.turn()
        await self.quiet()

    def files(self, *places: str) -> list[str]:
        return files(self.directory, *places)

    def path(self, item: Item) -> Path:
        (path,) = self.directory.glob(f"*/{item.id},S=*")
        return path

    def journal(self, item: Item) -> list[dict[str, Any]]:
        """Return the envelope and the journal of an item as they are in its file."""
        path = self.path(item)
        size = size_in_name(path)
        return [json.loads(line) for line in path.read_bytes()[size:].split(b"\n") if line]

    @property
    def mail_log(self) -> str:
        return (self.directory.parent / "mail.log").read_text()

    @property
    def log(self) -> str:
        return (self.directory.parent / "server.log").read_text()


def size_in_name(path: Path) -> int:
    return int(path.name.split(",")[1].removeprefix("S="))


def files(directory: Path, *places: str) -> list[str]:
    """Return the places and names of the files, as in "new/ID"."""
    return sorted(
        f"{place}/{path.name.partition(',')[0]}"
        for place in places or ("tmp", "new", "cur", "bad")
        for path in (directory / place).iterdir()
    )


def on_bench(
    directory: Path,
    test: Callable[[Bench], Coroutine[Any, Any, None]],
    clock: FakeClock | None = None,
    **options: Any,
) -> Bench:
    clock = clock or FakeClock()
    made: list[Bench] = []

    async def main(loop: chasquid.Loop) -> None:
        bench = Bench(loop, directory, clock, **options)
        made.append(bench)
        bench.queue.recover()
        await test(bench)

    run(main, clock=clock, workers=Inline())
    return made[0]


# --- the truth table of files ---


def test_an_accepted_message_is_in_new_with_its_envelope(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.local.hold.append(chasquid.Event(bench.loop))
        item = await bench.accept("ben@here.example")
        assert bench.files() == [f"new/{item.id}"]
        path = bench.path(item)
        assert path.name == f"{item.id},S={len(MESSAGE)}"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.read_bytes().startswith(MESSAGE)
        (envelope,) = bench.journal(item)
        assert (envelope["v"], envelope["reverse_path"]) == (1, "ana@here.example")
        bench.local.hold[0].set()

    on_bench(tmp_path, test)


def test_a_delivered_message_is_gone(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.accept("ben@here.example", "eva@there.example", Destination("pipe", "cat"))
        await bench.quiet()
        assert bench.files() == []
        assert bench.queue.count == 0
        assert bench.local.contents == bench.remote.contents == [b"Received: by us\r\n" + MESSAGE]
        assert bench.pipe.deliveries[0][1:] == ("cat", State.SENT)
        assert "attempts=1" in bench.mail_log

    on_bench(tmp_path, test)


def test_a_message_that_was_attempted_is_in_cur_with_a_line_for_the_attempt(
    tmp_path: Path,
) -> None:
    async def test(bench: Bench) -> None:
        bench.local.plan = {"ben@here.example": [State.DEFERRED]}
        item = await bench.accept("ana@here.example", "ben@here.example")
        await bench.quiet()
        assert bench.files() == [f"cur/{item.id}"]
        _, line = bench.journal(item)
        assert (line["v"], line["attempts"]) == (1, 1)
        assert line["next_attempt"] == bench.clock.time() + 60 + 30
        assert {result["recipient"]: result["state"] for result in line["results"]} == {
            0: State.SENT,
            1: State.DEFERRED,
        }

    on_bench(tmp_path, test)


def test_a_large_message_goes_to_tmp_as_it_comes(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        draft = bench.queue.draft()
        for _ in range(10):
            await draft.add(b"Subject: x\r\n\r\n" + b"a line\r\n" * 4096)
        (path,) = (bench.directory / "tmp").iterdir()
        assert path.stat().st_size >= 10 * 32768 - chasquid.MEMORY_LIMIT
        draft.discard()
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_large_message_is_delivered_whole(tmp_path: Path) -> None:
    data = b"Subject: x\r\n\r\n" + b"a line\r\n" * 50_000

    async def test(bench: Bench) -> None:
        await bench.accept("ben@here.example", data=data)
        await bench.quiet()
        assert bench.local.contents == [b"Received: by us\r\n" + data]

    on_bench(tmp_path, test)


# --- what is found at the start ---


def crashed(tmp_path: Path, make: Callable[[Path], None]) -> Bench:
    """Let `make` prepare a queue's directory, start a queue on it, and let it work."""
    directory = tmp_path / "queue"
    for place in ("tmp", "new", "cur", "bad"):
        (directory / place).mkdir(parents=True)
    make(directory)
    return on_bench(tmp_path, lambda bench: bench.quiet())


def envelope(*names: str, id: str = "abc", sender: str = "ana@here.example") -> Envelope:
    final_recipients = tuple(FinalRecipient(address(name), name) for name in names)
    return Envelope(id, sender, final_recipients, FakeClock().time(), b"A: b\r\n")


def item_file(*names: str, journal: bytes = b"", **fields: str) -> bytes:
    return MESSAGE + envelope(*names, **fields).to_line() + journal


def journal_line(*states: str, next_attempt: float = 0.0) -> bytes:
    item = Item(envelope(*(f"{n}@here.example" for n in range(len(states)))), None)  # type: ignore[arg-type]
    item.attempts, item.next_attempt = 1, next_attempt
    for recipient, state in zip(item.recipients, states, strict=True):
        recipient.result = Result(state, "2.0.0", "text")
        recipient.reported = state == State.FAILED
    return item.journal_line(FakeClock().time())


NAME = f"abc,S={len(MESSAGE)}"


def test_what_is_in_tmp_is_swept(tmp_path: Path) -> None:
    bench = crashed(
        tmp_path, lambda queue: (queue / "tmp" / "abc").write_bytes(item_file("b@here.example"))
    )
    assert bench.files() == []
    assert bench.local.deliveries == []


def test_what_is_in_new_is_delivered_to_all(tmp_path: Path) -> None:
    def make(queue: Path) -> None:
        (queue / "new" / NAME).write_bytes(item_file("a@here.example", "b@there.example"))

    bench = crashed(tmp_path, make)
    assert bench.local.deliveries == [("abc", "a@here.example", State.SENT)]
    assert bench.remote.deliveries == [("abc", "b@there.example", State.SENT)]
    assert bench.local.contents == [b"A: b\r\n" + MESSAGE]
    assert bench.files() == []


@pytest.mark.parametrize("place", ["new", "cur"])
def test_what_the_journal_says_is_done_is_not_done_again(tmp_path: Path, place: str) -> None:
    # in new: the crash came after the journal was written and before the file was moved
    def make(queue: Path) -> None:
        line = journal_line(State.SENT, State.DEFERRED, State.FAILED)
        names = (f"{n}@here.example" for n in range(3))
        (queue / place / NAME).write_bytes(item_file(*names, journal=line))

    bench = crashed(tmp_path, make)
    assert bench.local.deliveries == [("abc", "1@here.example", State.SENT)]
    # a failure is written down after its notification
    assert len(bench.local.messages) == 1
    assert bench.files() == []


def test_what_is_not_due_waits(tmp_path: Path) -> None:
    def make(queue: Path) -> None:
        line = journal_line(State.DEFERRED, next_attempt=FakeClock().time() + 100)
        (queue / "cur" / NAME).write_bytes(item_file("0@here.example", journal=line))

    directory = tmp_path / "queue"
    for place in ("tmp", "new", "cur", "bad"):
        (directory / place).mkdir(parents=True)
    make(directory)

    async def test(bench: Bench) -> None:
        await bench.advance(99)
        assert bench.local.deliveries == []
        await bench.advance(2)
        assert bench.local.deliveries == [("abc", "0@here.example", State.SENT)]

    on_bench(tmp_path, test)


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_torn_last_line_counts_as_not_written(tmp_path: Path, cut: int) -> None:
    def make(queue: Path) -> None:
        lines = (
            journal_line(State.DEFERRED, State.DEFERRED)
            + journal_line(State.SENT, State.DEFERRED)[:-cut]
        )
        names = ("0@here.example", "1@here.example")
        (queue / "cur" / NAME).write_bytes(item_file(*names, journal=lines))

    bench = crashed(tmp_path, make)
    delivered = {name for _, name, _ in bench.local.deliveries}
    # without its last newline alone, a line is whole
    assert delivered == ({"1@here.example"} if cut == 1 else {"0@here.example", "1@here.example"})
    assert bench.files() == []


def test_a_line_behind_a_torn_one_counts(tmp_path: Path) -> None:
    def make(queue: Path) -> None:
        lines = journal_line(State.DEFERRED, State.DEFERRED)[:-20] + journal_line(
            State.SENT, State.DEFERRED
        )
        names = ("0@here.example", "1@here.example")
        (queue / "cur" / NAME).write_bytes(item_file(*names, journal=lines))

    bench = crashed(tmp_path, make)
    assert bench.local.deliveries == [("abc", "1@here.example", State.SENT)]


def test_a_message_whose_text_looks_like_a_journal_is_a_message(tmp_path: Path) -> None:
    data = MESSAGE + journal_line(State.SENT)

    async def test(bench: Bench) -> None:
        bench.local.plan = {"0@here.example": [State.DEFERRED]}
        item = await bench.accept("0@here.example", data=data)
        await bench.quiet()
        found = chasquid.read_item(str(bench.path(item)))
        assert [recipient.state for recipient in found.recipients] == [State.DEFERRED]

    on_bench(tmp_path, test)


GARBAGE = {
    "a name that is none": ("hello", item_file("a@here.example")),
    "a name without a size": ("abc", item_file("a@here.example")),
    "an empty file": (NAME, b""),
    "a message without an envelope": (NAME, MESSAGE),
    "half an envelope": (NAME, item_file("a@here.example")[:-30]),
    "no JSON": (NAME, MESSAGE + b"hello\n"),
    "a number": (NAME, MESSAGE + b"0\n"),
    "a size beyond any file": ("abc,S=" + "9" * 30, item_file("a@here.example")),
    "JSON that is no envelope": (NAME, MESSAGE + b"[1, 2]\n"),
    "an envelope without a sender": (NAME, MESSAGE + b'{"v":1,"id":"abc","recipients":[]}\n'),
    "an old envelope without a sender": (NAME, MESSAGE + b'{"id":"abc","addressees":[]}\n'),
    "an envelope that says more": (
        NAME,
        item_file("a@here.example").replace(b'"id"', b'"colour":"red","id"'),
    ),
    "another id": (NAME, item_file("a@here.example", id="abd")),
    "another size": ("abc,S=7", item_file("a@here.example")),
    "a size beyond the end": ("abc,S=99999", item_file("a@here.example")),
    "octets": (NAME, MESSAGE + bytes(range(256))),
    "a journal for somebody else": (
        NAME,
        item_file("0@here.example", journal=journal_line(State.SENT, State.SENT)),
    ),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_cannot_be_read_is_set_aside_and_the_rest_delivered(tmp_path: Path, kind: str) -> None:
    name, data = GARBAGE[kind]

    def make(queue: Path) -> None:
        (queue / "new" / name).write_bytes(data)
        good = item_file("good@here.example", id="good")
        (queue / "new" / f"good,S={len(MESSAGE)}").write_bytes(good)

    bench = crashed(tmp_path, make)
    assert bench.local.deliveries == [("good", "good@here.example", State.SENT)]
    assert [path.read_bytes() for path in (bench.directory / "bad").iterdir()] == [data]
    assert "set aside in bad" in bench.log


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_reading_an_item_never_fails_in_another_way(data: bytes, size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = os.path.join(name, f"abc,S={size}")
        Path(path).write_bytes(data)
        with pytest.raises(chasquid.UnreadableItem):
            chasquid.read_item(path)


@settings(max_examples=200)
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_garbage_behind_the_envelope_loses_nothing(before: bytes, behind: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = os.path.join(name, NAME)
        journal = before + journal_line(State.SENT, State.DEFERRED) + behind
        Path(path).write_bytes(item_file("0@here.example", "1@here.example", journal=journal))
        item = chasquid.read_item(path)
    assert [recipient.state for recipient in item.recipients] == [State.SENT, State.DEFERRED]


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
destinations = st.builds(
    Destination,
    st.sampled_from(["address", "pipe"]),
    names,
    st.lists(names, max_size=3).map(tuple),
)
dsn = st.builds(DsnParameters, st.lists(st.sampled_from(Notify), max_size=3).map(tuple), names)
envelopes = st.builds(
    Envelope,
    id=st.just("abc"),
    sender=names,
    final_recipients=st.lists(
        st.builds(FinalRecipient, destinations, names, dsn), min_size=1, max_size=4
    ).map(tuple),
    received=st.floats(0, 2e9),
    prefix=st.binary(max_size=100),
    smtputf8=st.booleans(),
    eight_bit=st.booleans(),
    junk=st.booleans(),
    require_tls=st.booleans(),
    tls_optional=st.booleans(),
    ret=names,
    envid=names,
)


@given(envelopes)
def test_an_envelope_is_read_as_it_was_written(value: Envelope) -> None:
    line = value.to_line()
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert Envelope.from_line(line) == value


@given(
    envelopes,
    st.lists(
        st.sampled_from([State.SENT, State.DEFERRED, State.FAILED, State.PENDING]),
        min_size=4,
        max_size=4,
    ),
    names,
    st.integers(0, 1000),
    st.floats(0, 2e9),
)
def test_a_journal_is_read_as_it_was_written(
    value: Envelope, states: list[str], text: str, attempts: int, next_attempt: float
) -> None:
    written, read = (Item(value, Message(b"", "", 0)) for _ in range(2))
    written.attempts, written.next_attempt = attempts, next_attempt
    for recipient, state in zip(written.recipients, states, strict=False):
        recipient.result = Result(state, "4.0.0" if state != "pending" else "", text)
        recipient.reported = state == State.FAILED
        if state == State.PENDING:
            recipient.result = Result(state, "", "")
    line = written.journal_line(1.0)
    assert line.startswith(b"\n") and line.endswith(b"\n") and line.count(b"\n") == 2
    read.apply(line)
    assert (read.attempts, read.next_attempt) == (attempts, next_attempt)
    assert [each.result for each in read.recipients] == [each.result for each in written.recipients]


def test_a_queue_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "queue").write_bytes(b"")
    with pytest.raises(chasquid.ConfigError, match="queue"):
        on_bench(tmp_path, lambda bench: bench.quiet())


@pytest.mark.parametrize("place", ["tmp", "new", "cur"])
def test_a_queue_with_a_file_for_a_directory_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / place).write_bytes(b"")
    with pytest.raises(chasquid.ConfigError):
        on_bench(tmp_path, lambda bench: bench.quiet())


def test_a_directory_in_new_does_not_keep_the_queue_from_starting(tmp_path: Path) -> None:
    (tmp_path / "queue" / "new" / "a-directory").mkdir(parents=True)
    on_bench(tmp_path, lambda bench: bench.quiet())


# --- the schedule ---


def test_the_pauses_are_1_5_10_and_20_minutes_with_jitter(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED] * 6}
        await bench.accept("eva@there.example")
        await bench.quiet()
        for count, pause in enumerate([60, 300, 600, 1200, 1200, 1200], 1):
            assert len(bench.remote.deliveries) == count
            await bench.advance(pause + 14)
            assert len(bench.remote.deliveries) == count
            await bench.advance(2)
        assert [state for _, _, state in bench.remote.deliveries] == [State.DEFERRED] * 6 + [
            State.SENT
        ]
        assert bench.files() == []

    on_bench(tmp_path, test, random=lambda: 0.25)


def test_what_cannot_be_delivered_is_given_up_and_reported(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED] * 1000}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        await bench.advance(GIVE_UP - 1)
        assert bench.files() == [f"cur/{item.id}"]
        (notice,) = bench.local.contents
        assert b"\r\nAction: delayed\r\n" in notice
        await bench.advance(1300)
        assert bench.files() == []
        _, report = bench.local.contents
        assert b"not delivered within 20h 0m" in report
        assert b"Status: 4.4.7" in report
        assert ("eva@there.example", State.FAILED) in bench.results

    on_bench(tmp_path, test)


def test_a_last_attempt_is_made_before_giving_up(tmp_path: Path) -> None:
    def make(queue: Path) -> None:
        line = envelope("a@there.example")._replace(received=1.0).to_line()
        (queue / "cur" / NAME).write_bytes(MESSAGE + line)

    bench = crashed(tmp_path, make)
    assert bench.remote.deliveries == [("abc", "a@there.example", State.SENT)]
    assert bench.local.messages == []


def test_only_those_who_are_left_are_attempted_again(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.local.plan = {
            "a@here.example": [State.DEFERRED],
            "b@here.example": [State.SENT],
            "c@here.example": [State.FAILED],
        }
        await bench.accept(*bench.local.plan)
        await bench.quiet()
        await bench.advance(100)
        assert [name for name, *_ in bench.results].count("b@here.example") == 1
        states = [(name, state) for _, name, state in bench.local.deliveries]
        assert states == [
            ("a@here.example", State.DEFERRED), ("b@here.example", State.SENT),
            ("c@here.example", State.FAILED), ("ana@here.example", State.SENT),
            ("a@here.example", State.SENT),
        ]  # fmt: skip

    on_bench(tmp_path, test)


def test_those_who_share_a_way_go_in_one_attempt(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.accept("a@there.example", "b@there.example", "c@else.example")
        await bench.quiet()
        groups = sorted(names for _, names in bench.remote.messages)
        assert groups == [["a@there.example", "b@there.example"], ["c@else.example"]]

    on_bench(tmp_path, test)


def test_a_slow_destination_does_not_hold_up_another(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        slow = chasquid.Event(bench.loop)
        bench.remote.hold.append(slow)
        await bench.accept("eva@there.example", "ben@here.example")
        await bench.until(lambda: bench.local.deliveries)
        assert bench.remote.deliveries == []
        slow.set()
        await bench.quiet()
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_fault_of_a_courier_loses_nothing(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.fault = ZeroDivisionError("oops")
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        assert bench.files() == [f"cur/{item.id}"]
        assert "ZeroDivisionError: oops" in bench.log
        bench.remote.fault = None
        await bench.advance(100)
        assert bench.files() == []
        assert [state for _, _, state in bench.remote.deliveries] == [State.SENT]

    on_bench(tmp_path, test)


def test_an_item_is_retried_when_the_operator_says_so(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        await bench.queue.retry(item.id)
        await bench.until(lambda: len(bench.remote.deliveries) == 2)
        await bench.quiet()
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_an_item_is_removed_when_the_operator_says_so(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        await bench.queue.remove(item.id)
        assert bench.files() == []
        assert bench.queue.count == 0
        assert len(bench.remote.deliveries) == 1
        assert bench.local.messages == []

    on_bench(tmp_path, test)


def test_an_item_is_removed_when_its_attempt_has_ended(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        slow = chasquid.Event(bench.loop)
        bench.remote.hold.append(slow)
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        removal = bench.loop.spawn(bench.queue.remove(item.id), "removal")
        for _ in range(5):
            await bench.loop.turn()
        slow.set()
        await removal.join()
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_full_queue_takes_no_more(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        await bench.accept("eva@there.example")
        with pytest.raises(chasquid.QueueFull) as caught:
            bench.queue.draft()
        assert caught.value.status == "4.3.1"
        await bench.quiet()
        await bench.advance(100)
        bench.queue.draft()

    on_bench(tmp_path, test, limit=1)


def test_a_full_queue_still_takes_notifications(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED]}
        await bench.accept("eva@there.example")
        await bench.quiet()
        assert [name for _, name, _ in bench.local.deliveries] == ["ana@here.example"]

    on_bench(tmp_path, test, limit=1)


def test_a_queue_that_closes_keeps_what_is_left(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        await bench.queue.close()
        assert bench.files() == [f"cur/{item.id}"]

    async def again(bench: Bench) -> None:
        await bench.quiet()
        assert bench.queue.count == 1
        await bench.advance(100)
        assert bench.files() == []

    clock = FakeClock()
    on_bench(tmp_path, test, clock)
    on_bench(tmp_path, again, clock)


@pytest.mark.parametrize("turns", range(12))
def test_the_end_does_not_wait_for_what_was_accepted_last(tmp_path: Path, turns: int) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        bench.loop.spawn(bench.accept("eva@there.example"), "accept")
        for _ in range(turns):
            await bench.loop.turn()

    thread = threading.Thread(target=on_bench, args=(tmp_path, test), daemon=True)
    thread.start()
    thread.join(SECONDS / 4)
    assert not thread.is_alive(), "the loop does not end"
    # it was accepted or not, but it is not half of either
    assert files(tmp_path / "queue", "tmp", "bad") == []


# --- what waits ---


def waiting_file(tmp_path: Path, content: bytes, *, changed: float, name: str = NAME) -> Path:
    """Put a file into cur that was last changed so many seconds after the start."""
    path = tmp_path / "queue" / "cur" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    time = FakeClock().time() + changed
    os.utime(path, (time, time))
    return path


def test_the_time_of_a_file_says_when_it_is_due(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        due = bench.path(item).stat().st_mtime
        assert due == pytest.approx(bench.clock.time() + 90, abs=0.001)

    on_bench(tmp_path, test)


def test_what_waits_is_read_when_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = chasquid.read_item, []

    def counted(path: str) -> Item:
        reads.append(os.path.basename(path)[:3])
        return read(path)

    monkeypatch.setattr(chasquid, "read_item", counted)
    for number, changed in enumerate([100.0, 1000.0, -1.0]):
        line = journal_line(State.DEFERRED, next_attempt=FakeClock().time() + changed)
        content = item_file("0@here.example", id=f"{number:03}", journal=line)
        waiting_file(
            tmp_path, content, changed=changed, name=f"{number:03},S={len(MESSAGE)}"
        )  # fmt: skip

    async def test(bench: Bench) -> None:
        assert bench.queue.count == 3  # at once, as for the 250 it counts
        await bench.quiet()
        assert reads == ["002"]
        await bench.advance(101)
        assert reads == ["002", "000"]
        assert [id for id, _, _ in bench.local.deliveries] == ["002", "000"]

    on_bench(tmp_path, test)


def test_the_oldest_message_is_known_after_the_start(tmp_path: Path) -> None:
    async def before(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED, State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        received = item.envelope.received
        await bench.quiet()
        await bench.advance(100)
        assert bench.queue.oldest() == received < bench.clock.time()
        assert bench.path(item).stat().st_atime == received

    async def after(bench: Bench) -> None:
        await bench.quiet()
        assert bench.remote.messages == [], "its file was not read"
        assert bench.queue.oldest() == FakeClock().time() - 5

    on_bench(tmp_path, before)
    (path,) = (tmp_path / "queue/cur").iterdir()
    os.utime(path, (FakeClock().time() - 5, path.stat().st_mtime))  # it was read at its end
    on_bench(tmp_path, after)


@pytest.mark.parametrize("changed", [-1000, 5, 1e7], ids=["early", "late", "no pause is so long"])
def test_what_the_journal_says_decides_when_it_is_attempted(tmp_path: Path, changed: float) -> None:
    line = journal_line(State.DEFERRED, next_attempt=FakeClock().time() + 100)
    waiting_file(tmp_path, item_file("0@here.example", journal=line), changed=changed)

    async def test(bench: Bench) -> None:
        await bench.advance(99)
        assert bench.local.deliveries == []
        await bench.advance(2)
        assert bench.local.deliveries == [("abc", "0@here.example", State.SENT)]
        assert bench.mail_log.count("event=found") == 1

    on_bench(tmp_path, test)


def test_a_clock_that_is_set_while_a_message_waits_does_not_put_it_off(tmp_path: Path) -> None:
    class Set(FakeClock):
        behind = 0.0

        def time(self) -> float:
            return super().time() - self.behind

    clock = Set()

    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        await bench.accept("eva@there.example")
        await bench.quiet()
        clock.behind = 1e8
        await bench.advance(91)
        assert len(bench.remote.deliveries) == 2

    on_bench(tmp_path, test, clock)


def test_the_time_that_a_message_waited_counts_until_it_is_given_up(tmp_path: Path) -> None:
    line = journal_line(State.DEFERRED).replace(b'"waited":0.0', b'"waited":71000.0')
    waiting_file(tmp_path, item_file("a@there.example", journal=line), changed=1100)

    async def test(bench: Bench) -> None:
        bench.remote.plan = {"a@there.example": [State.DEFERRED]}
        await bench.advance(1101)
        assert "event=given-up" in bench.mail_log  # 71,000 and 1,101 of 72,000

    on_bench(tmp_path, test)


def test_a_message_whose_file_is_gone_is_told_of(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        bench.path(item).unlink()
        await bench.advance(100)
        assert f"event=lost id={item.id}" in bench.mail_log
        assert bench.queue.count == 0

    on_bench(tmp_path, test)


MANY = 100


async def burst(bench: Bench) -> list[str]:
    """Accept many messages for a slow destination; return their ids."""
    sent = []
    for _ in range(MANY):
        bench.clock.advance(0.01)
        sent.append((await bench.accept("eva@slow.example")).id)
    return sent


def test_of_many_messages_for_a_slow_destination_few_are_in_memory(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.hold.append(chasquid.Event(bench.loop))
        sent = await burst(bench)
        for _ in range(20):
            await bench.loop.turn()
        assert bench.queue.count == MANY
        assert len(bench.queue._active) == 20  # four for each of the five places
        assert bench.remote.messages == []
        # nobody else waits for them
        await bench.accept("ben@here.example")
        await bench.until(lambda: bench.local.deliveries)
        bench.remote.hold[0].set()
        await bench.quiet()
        delivered = [id for id, _, _ in bench.remote.deliveries]
        assert sorted(delivered[:5]) == sorted(sent[:5])  # those that were held, in any order
        assert delivered[5:] == sent[5:]
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_message_for_two_is_delivered_to_the_one_that_has_a_place(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.hold.append(chasquid.Event(bench.loop))
        await burst(bench)
        await bench.accept("eva@slow.example", "ben@here.example")
        await bench.until(lambda: bench.local.deliveries)
        bench.remote.hold[0].set()
        await bench.quiet()
        assert len(bench.remote.deliveries) == MANY + 1 and len(bench.local.deliveries) == 1
        assert bench.files() == []

    on_bench(tmp_path, test)


@pytest.mark.parametrize("action", ["retry", "remove", "bounce"])
def test_what_waits_for_a_place_is_at_hand_for_the_operator(tmp_path: Path, action: str) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.hold.append(chasquid.Event(bench.loop))
        sent = await burst(bench)
        await getattr(bench.queue, action)(sent[-1])
        assert bench.queue.count == MANY - (action != "retry")
        bench.remote.hold[0].set()
        await bench.quiet()
        delivered = [id for id, _, _ in bench.remote.deliveries]
        assert sorted(delivered) == sorted(sent if action == "retry" else sent[:-1])
        assert len(bench.local.contents) == (action == "bounce")
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_many_that_are_found_at_the_start_are_attempted_in_turn(tmp_path: Path) -> None:
    for number in range(MANY):
        content = item_file("a@there.example", id=f"{number:03}")
        waiting_file(tmp_path, content, changed=-number, name=f"{number:03},S={len(MESSAGE)}")
    most = 0

    async def test(bench: Bench) -> None:
        deliver = bench.remote.deliver

        async def counted(*arguments: Any) -> Any:
            nonlocal most
            most = max(most, len(bench.queue._active))
            await bench.loop.turn()
            return await deliver(*arguments)

        bench.remote.deliver = counted  # type: ignore[method-assign]
        await bench.quiet()
        delivered = [id for id, _, _ in bench.remote.deliveries]
        # what has waited longest comes first
        assert delivered == [f"{number:03}" for number in reversed(range(MANY))]
        assert 5 <= most < 60
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_what_is_read_while_the_queue_closes_is_not_attempted(tmp_path: Path) -> None:
    waiting_file(tmp_path, item_file("a@there.example"), changed=-1)

    async def test(bench: Bench) -> None:
        bench.loop.spawn(bench.queue.close(), "end")
        for _ in range(20):
            await bench.loop.turn()
        assert bench.remote.messages == []
        await bench.accept("b@there.example")
        for _ in range(20):
            await bench.loop.turn()
        assert bench.remote.messages == []
        assert len(bench.files("new", "cur")) == 2

    on_bench(tmp_path, test)


# --- forwarding ---


def test_the_sender_is_rewritten_where_we_forward_for_others(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        forwarded = FinalRecipient(address("eva@there.example"), "ana@here.example")
        await bench.accept(forwarded, sender="boss@far.example")
        await bench.quiet()
        ((delivery, _),) = bench.remote.messages
        assert delivery.sender == "ana+fwd_from=boss=far.example@here.example"

    on_bench(tmp_path, test)


@pytest.mark.parametrize(
    ("user", "sender", "expected"),
    [
        ("ana", "x" * 37 + "@far.example", "ana+fwd_from=" + "x" * 37 + "=far.example"),  # 61
        ("ana", "x" * 41 + "@far.example", "ana+fwd_from=" + chasquid.short_hash(
            "x" * 41 + "=far.example")),
        ("a" * 60, "x@far.example", "a" * 60),
    ],
    ids=["fits", "hash", "no room"],
)  # fmt: skip
def test_a_rewritten_sender_has_at_most_64_octets_before_the_at(
    tmp_path: Path, user: str, sender: str, expected: str
) -> None:
    """RFC 5321, 4.5.3.1.1"""

    async def test(bench: Bench) -> None:
        forwarded = FinalRecipient(address("eva@there.example"), f"{user}@here.example")
        await bench.accept(forwarded, sender=sender)
        await bench.quiet()
        ((delivery, _),) = bench.remote.messages
        assert delivery.sender == f"{expected}@here.example"
        assert len(expected) <= 64

    on_bench(tmp_path, test)


@pytest.mark.parametrize(
    ("sender", "destination", "original"),
    [
        ("ben@here.example", "eva@there.example", "ana@here.example"),
        ("", "eva@there.example", "ana@here.example"),
        ("boss@far.example", "ben@here.example", "ana@here.example"),
        ("boss@far.example", "eva@there.example", "eva@there.example"),
    ],
    ids=["from us", "a notification", "to us", "not forwarded"],
)
def test_the_sender_is_kept_elsewhere(
    tmp_path: Path, sender: str, destination: str, original: str
) -> None:
    async def test(bench: Bench) -> None:
        await bench.accept(FinalRecipient(address(destination), original), sender=sender)
        await bench.quiet()
        ((delivery, _),) = bench.remote.messages + bench.local.messages
        assert delivery.sender == sender

    on_bench(tmp_path, test)


def test_forwarded_and_direct_mail_to_one_server_go_separately(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        forwarded = FinalRecipient(address("eva@there.example"), "ana@here.example")
        await bench.accept(forwarded, "ida@there.example", sender="boss@far.example")
        await bench.quiet()
        assert sorted((one.sender, names) for one, names in bench.remote.messages) == [
            ("ana+fwd_from=boss=far.example@here.example", ["eva@there.example"]),
            ("boss@far.example", ["ida@there.example"]),
        ]

    on_bench(tmp_path, test)


# --- notifications ---


def report(
    tmp_path: Path,
    *destinations: str | FinalRecipient,
    sender: str = "ana@here.example",
    data: bytes = MESSAGE,
    plan: dict[str, list[str]] | None = None,
    smtputf8: bool = False,
) -> tuple[EmailMessage, Bench]:
    """Have a message fail, and return the notification, without what a parser mends."""

    async def test(bench: Bench) -> None:
        default = {
            destination if isinstance(destination, str) else destination.destination.value: [
                State.FAILED
            ]
            for destination in destinations
        }
        bench.remote.plan = plan or default
        await bench.accept(*destinations, sender=sender, data=data, smtputf8=smtputf8)
        await bench.quiet()

    bench = on_bench(tmp_path, test)
    (content,) = bench.local.contents
    parsed = email.message_from_bytes(content, policy=email.policy.SMTPUTF8)
    assert not parsed.defects and not any(part.defects for part in parsed.walk())
    return cast(EmailMessage, parsed), bench


def parts(parsed: EmailMessage) -> list[EmailMessage]:
    found = list(parsed.iter_parts())
    assert len(found) == 3
    return cast("list[EmailMessage]", found)


def test_a_notification_is_a_report(tmp_path: Path) -> None:
    parsed, bench = report(tmp_path, "eva@there.example")
    assert parsed.get_content_type() == "multipart/report"
    assert parsed.get_param("report-type") == "delivery-status"
    assert parsed["From"] == f"Mail Delivery System <postmaster@{HOST}>"
    assert parsed["To"].addresses[0].addr_spec == "ana@here.example"
    assert parsed["Auto-Submitted"] == "auto-replied"
    assert parsed["Date"].datetime.timestamp() == int(bench.clock.time())
    assert parsed["Message-ID"].endswith(f"@{HOST}>")
    ((delivery, names),) = bench.local.messages
    assert (delivery.sender, names) == ("", ["ana@here.example"])


def test_a_notification_explains_in_words(tmp_path: Path) -> None:
    parsed, _ = report(tmp_path, "eva@there.example")
    text = parts(parsed)[0].get_content()
    assert parts(parsed)[0].get_content_type() == "text/plain"
    assert "could not be delivered to this recipient:" in text
    assert "eva@there.example is failed" in text


def test_a_notification_has_the_fields_of_rfc_3464(tmp_path: Path) -> None:
    forwarded = FinalRecipient(address("eva@there.example"), "out@here.example")
    parsed, bench = report(tmp_path, forwarded, "ida@there.example")
    status = parts(parsed)[1]
    assert status.get_content_type() == "message/delivery-status"
    message, *recipients = cast("list[EmailMessage]", status.get_payload())
    assert message["Reporting-MTA"] == f"dns; {HOST}"
    assert message["Arrival-Date"]
    assert len(recipients) == 2
    first = recipients[0]
    assert first["Original-Recipient"] == "rfc822; out@here.example"
    assert first["Final-Recipient"] == "rfc822; eva@there.example"
    assert first["Action"] == "failed"
    assert first["Status"] == "5.1.1"
    assert first["Remote-MTA"] == "dns; mx.there.example"
    assert first["Diagnostic-Code"] == "smtp; 550 5.1.1 no, eva@there.example"


def test_a_notification_returns_the_message(tmp_path: Path) -> None:
    parsed, _ = report(tmp_path, "eva@there.example")
    returned = parts(parsed)[2]
    assert returned.get_content_type() == "message/rfc822"
    (original,) = cast("list[EmailMessage]", returned.get_payload())
    assert original["Subject"] == "hello"
    assert original["Received"] == "by us"
    assert original.get_payload() == "It works.\r\n"


def test_a_notification_returns_the_header_alone_of_what_is_large(tmp_path: Path) -> None:
    parsed, bench = report(tmp_path, "eva@there.example", data=MESSAGE + b"a line\r\n" * 40_000)
    returned = parts(parsed)[2]
    assert returned.get_content_type() == "text/rfc822-headers"
    assert returned.get_content() == "Received: by us\r\nSubject: hello\r\n"
    assert len(bench.local.contents[0]) < 5000


def test_a_notification_is_never_much_larger_than_256_kb(tmp_path: Path) -> None:
    data = b"X-A: b\r\n" * 31_000 + b"\r\n" + b"a line\r\n" * 40_000
    _, bench = report(tmp_path, "eva@there.example", data=data)
    assert len(bench.local.contents[0]) < 256 * 1024 + 4096


def test_a_notification_is_international_where_an_address_is(tmp_path: Path) -> None:
    parsed, bench = report(
        tmp_path, "žofie@there.example", data="Subject: žofie\r\n\r\n".encode(), smtputf8=True
    )
    _, status, returned = parts(parsed)
    assert status.get_content_type() == "message/global-delivery-status"
    assert returned.get_content_type() == "message/global"
    text = bench.local.contents[0].decode()
    assert "Final-Recipient: utf-8; žofie@there.example\r\n" in text
    assert bench.local.messages[0][0].smtputf8


def part_of(content: bytes, kind: bytes) -> bytes:
    """Return the body part of this kind, with its header."""
    return next(part for part in content.split(b"\r\n--=_") if b"Content-Type: " + kind in part)


def test_the_delivery_status_is_ascii_where_it_is_not_the_international_one(
    tmp_path: Path,
) -> None:
    # RFC 3464, 2.1: message/delivery-status is 7bit; the server's text is not ours
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED]}

        class Speaking(Script):
            def _result(self, delivery: Delivery, destination: Destination) -> Result:
                return Result(
                    State.FAILED, "5.1.1", "mx says: žofie není doma " + "x" * 900, "mx (::1)"
                )

        bench.queue = chasquid.Queue(
            bench.loop, chasquid.Disk(bench.loop), record(tmp_path, bench.clock),
            chasquid.QueueSettings(str(bench.directory), HOST, GIVE_UP, 10, "+"),
            chasquid.Couriers(bench.local, bench.pipe, Speaking(), bench.is_local),
            itself, bench.is_local, lambda: 0.5, unsigned,
        )  # fmt: skip
        await bench.accept("eva@there.example")
        await bench.quiet()

    bench = on_bench(tmp_path, test)
    (content,) = bench.local.contents
    assert part_of(content, b"message/delivery-status").isascii()


def test_the_delivery_status_is_international_where_a_final_recipient_is(tmp_path: Path) -> None:
    forwarded = FinalRecipient(address("žofie@there.example"), "out@here.example")
    _, bench = report(tmp_path, forwarded)
    (content,) = bench.local.contents
    assert b"message/global-delivery-status" in content or content.isascii()


def test_several_failures_of_an_attempt_share_a_notification(tmp_path: Path) -> None:
    names = [f"{name}@there.example" for name in "abc"]
    parsed, _ = report(
        tmp_path,
        *names,
        plan={names[0]: [State.FAILED], names[1]: [State.SENT], names[2]: [State.FAILED]},
    )
    _, *recipients = cast("list[EmailMessage]", parts(parsed)[1].get_payload())
    assert [recipient["Final-Recipient"] for recipient in recipients] == [
        f"rfc822; {names[0]}", f"rfc822; {names[2]}"
    ]  # fmt: skip


def test_a_report_belongs_to_the_thread_of_the_message_and_names_who_failed(
    tmp_path: Path,
) -> None:
    names = [f"{name}@there.example" for name in "ab"]
    data = b"Message-ID: <3@x>\r\nReferences: <1@x>\r\n <2@x>\r\nSubject: x\r\n\r\nhello\r\n"
    parsed, _ = report(tmp_path, *names, plan={name: [State.FAILED] for name in names}, data=data)
    assert parsed["In-Reply-To"] == "<3@x>"
    assert parsed["References"].split() == ["<1@x>", "<2@x>", "<3@x>"]
    assert parsed["X-Failed-Recipients"].split() == [f"{names[0]},", names[1]]


@pytest.mark.parametrize("field", [b"", b"Message-ID: none\r\n", b"Message-ID: <\xff@x>\r\n"])
def test_a_message_without_an_id_that_can_be_repeated_has_no_thread(
    tmp_path: Path, field: bytes
) -> None:
    data = field + b"Subject: x\r\n\r\nhello\r\n"
    parsed, _ = report(
        tmp_path, "a@there.example", plan={"a@there.example": [State.FAILED]}, data=data
    )
    assert parsed["In-Reply-To"] is None and parsed["References"] is None


@pytest.mark.parametrize("body", [b"hello\r\n", b"h\xc3\xa9llo\r\n"])
def test_an_8bit_part_is_never_inside_one_that_is_7bit(tmp_path: Path, body: bytes) -> None:
    """RFC 2045, 6.4"""
    parsed, _ = report(
        tmp_path, "a@there.example", plan={"a@there.example": [State.FAILED]},
        data=b"Subject: x\r\n\r\n" + body,
    )  # fmt: skip
    encodings = [part["Content-Transfer-Encoding"] for part in parts(parsed)]
    whole = "8bit" if "8bit" in encodings else "7bit"
    assert parsed["Content-Transfer-Encoding"] == whole == ("7bit" if body.isascii() else "8bit")
    assert encodings[0] == "7bit"


def test_each_failure_is_reported_once(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {
            "a@there.example": [State.FAILED],
            "b@there.example": [State.DEFERRED] * 2,
        }
        await bench.accept("a@there.example", "b@there.example")
        await bench.quiet()
        assert b"still being tried" in bench.local.contents[0]
        await bench.advance(100)
        await bench.advance(400)
        assert len(bench.local.contents) == 1
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_nobody_is_told_of_what_the_null_sender_sent(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED]}
        await bench.accept("eva@there.example", sender="")
        await bench.quiet()
        assert bench.local.messages == []
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_notification_that_fails_makes_no_other(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED], "eve@far.example": [State.FAILED]}
        await bench.accept("eva@there.example", sender="eve@far.example")
        await bench.quiet()
        assert [name for _, name, _ in bench.remote.deliveries] == [
            "eva@there.example",
            "eve@far.example",
        ]
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_notification_for_a_sender_behind_an_alias_is_expanded(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED]}
        await bench.accept("eva@there.example", sender="team@here.example")
        await bench.quiet()
        delivered = sorted(name for _, name, _ in bench.local.deliveries)
        assert delivered == ["ana@here.example", "ben@here.example"]

    async def expand(name: str) -> list[Destination]:
        return [address("ana@here.example"), address("ben@here.example")]

    on_bench(tmp_path, test, expand=expand)


def test_a_sender_who_is_gone_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    async def expand(name: str) -> list[Destination]:
        raise chasquid.NoSuchUser(f"there is no {name}")

    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED]}
        bench.local.plan = {"ana@here.example": [State.FAILED]}
        await bench.accept("eva@there.example")
        await bench.quiet()
        assert bench.files() == []

    on_bench(tmp_path, test, expand=expand)


# --- a disk that refuses ---


def broken(place: Path) -> Callable[[], None]:
    """Put a file in the place of a directory; return what puts the directory back."""
    away = place.with_name(f"{place.name}-away")
    place.rename(away)
    place.write_bytes(b"")

    def mend() -> None:
        place.unlink()
        away.rename(place)

    return mend


@pytest.mark.parametrize("place", ["tmp", "new"])
def test_a_message_that_cannot_be_stored_is_refused(tmp_path: Path, place: str) -> None:
    async def test(bench: Bench) -> None:
        mend = broken(bench.directory / place)
        with pytest.raises(chasquid.QueueFull):
            await bench.accept("ben@here.example")
        mend()
        assert bench.files() == []
        assert bench.queue.count == 0
        await bench.accept("ben@here.example")
        await bench.quiet()
        assert len(bench.local.deliveries) == 1

    on_bench(tmp_path, test)


@pytest.mark.parametrize("place", ["tmp", "new"])
def test_a_notification_that_cannot_be_stored_is_tried_again(tmp_path: Path, place: str) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.FAILED]}
        event = chasquid.Event(bench.loop)
        bench.remote.hold.append(event)
        item = await bench.accept("eva@there.example")
        os.rename(bench.path(item), bench.directory / "cur" / bench.path(item).name)
        item.message = item.message._replace(path=str(bench.path(item)), data=None)
        mend = broken(bench.directory / place)
        event.set()
        await bench.quiet()
        assert bench.local.deliveries == []
        mend()
        assert bench.files() == [f"cur/{item.id}"]
        await bench.advance(61)
        await bench.quiet()
        assert len(bench.local.deliveries) == 1
        assert len(bench.remote.deliveries) == 1
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_result_that_cannot_be_written_down_is_not_forgotten(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.local.plan = {"a@here.example": [State.SENT], "b@here.example": [State.DEFERRED]}
        event = chasquid.Event(bench.loop)
        bench.local.hold.append(event)
        item = await bench.accept("a@here.example", "b@here.example")
        mend = broken(bench.directory / "cur")
        event.set()
        await bench.quiet()
        assert "cannot be written" in bench.log
        assert bench.files("new") == [f"new/{item.id}"]
        mend()
        await bench.advance(61)
        states = [(name, state) for _, name, state in bench.local.deliveries]
        assert states == [
            ("a@here.example", State.SENT), ("b@here.example", State.DEFERRED),
            ("b@here.example", State.SENT),
        ]  # fmt: skip
        assert bench.files() == []

    on_bench(tmp_path, test)


# --- any order of events, and crashes ---


class Life(threading.Thread):
    """A queue from its start to a crash, on a loop that obeys one command at a time."""

    def __init__(self, directory: Path, clock: FakeClock, couriers: Callable[[Bench], None]):
        super().__init__(daemon=True)
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._directory = directory
        self._clock = clock
        self._couriers = couriers
        self.bench: Bench

    def run(self) -> None:
        async def main(loop: chasquid.Loop) -> None:
            self.bench = Bench(loop, self._directory, self._clock)
            self._couriers(self.bench)
            self.bench.queue.recover()
            self._answers.put((None, None))
            while (command := self._commands.get()) is not None:
                try:
                    self._answers.put((await command(self.bench), None))
                except BaseException as error:
                    self._answers.put((None, error))

        try:
            run(main, clock=self._clock, workers=Inline())
        except BaseException as error:
            self._answers.put((None, error))
        else:
            self._answers.put((None, None))

    def begin(self) -> None:
        self.start()
        self._answer()

    def do(self, command: Callable[[Bench], Coroutine[Any, Any, Any]]) -> Any:
        self._commands.put(command)
        return self._answer()

    def end(self) -> None:
        self._commands.put(None)
        self._answer()
        self.join(SECONDS)

    def _answer(self) -> Any:
        value, error = self._answers.get(timeout=SECONDS)
        if error is not None:
            raise error
        return value


Debt = tuple[str, str]
PEOPLE = ["a@here.example", "b@here.example", "c@there.example", "d@there.example"]
SENDER = "ana@here.example"


class QueueMachine(RuleBasedStateMachine):
    """Accepts, delivers, lets time pass and crashes, in any order.

    After each step, what is owed must be on the disk, or have been delivered, or have
    failed with a notification that is itself on the disk or was handed over.
    """

    durable = False  # the courier of the mailboxes here

    def __init__(self) -> None:
        super().__init__()
        self._home = Path(tempfile.mkdtemp(dir=_SHORT_LIVED))
        self._numbers = itertools.count()
        self._directory = self._home / str(next(self._numbers))
        self._directory.mkdir()
        self.clock = FakeClock()
        self.plan: dict[str, list[str]] = {name: [] for name in PEOPLE}
        self.owed: dict[Debt, str] = {}  # and the sender
        self.delivered: set[Debt] = set()
        self.failed: set[Debt] = set()
        self.notified: set[Debt] = set()  # notifications that were handed over
        self.journaled: set[Debt] = set()  # successes that the disk knows
        self.this_life: set[Debt] = set()
        self.wrong: list[str] = []
        self.life = self._new_life()

    def _new_life(self) -> Life:
        life = Life(self._directory, self.clock, self._wire)
        life.begin()
        return life

    def _wire(self, bench: Bench) -> None:
        machine = self

        class Courier(Script):
            async def deliver(
                self, delivery: Delivery, destinations: Sequence[Destination]
            ) -> list[Result]:
                await bench.loop.turn()
                results = [machine.attempt(delivery, destination) for destination in destinations]
                await bench.loop.turn()
                return results

        bench.queue = chasquid.Queue(
            bench.loop, self.disk(bench.loop), record(self._directory, self.clock),
            chasquid.QueueSettings(str(bench.directory), HOST, GIVE_UP, 1000, "+"),
            chasquid.Couriers(
                Courier(), Courier(), Courier(), bench.is_local, durable=self.durable
            ),
            itself, bench.is_local, lambda: 0.5, unsigned,
        )  # fmt: skip

    def disk(self, loop: chasquid.Loop) -> chasquid.Disk:
        return chasquid.Disk(loop)

    def attempt(self, delivery: Delivery, destination: Destination) -> Result:
        """Be the courier: on the thread of the loop, while the machine waits."""
        if destination.value == SENDER:
            self.notified |= _reported(b"".join(delivery.message.chunks()))
            return Result(State.SENT, "2.0.0", "told")
        debt = (delivery.id, destination.value)
        if debt in self.journaled:
            self.wrong.append(f"{debt} was delivered after its success was written down")
        if debt in self.this_life:
            self.wrong.append(f"{debt} was delivered twice without a crash")
        states = self.plan[destination.value]
        state = states.pop(0) if states else State.SENT
        if state == State.SENT:
            self.delivered.add(debt)
            self.this_life.add(debt)
        elif state == State.FAILED:
            self.failed.add(debt)
        return Result(
            state,
            {State.SENT: "2.0.0", State.DEFERRED: "4.0.0", State.FAILED: "5.0.0"}[state],
            state,
        )

    # --- what happens ---

    @rule(
        names=st.lists(st.sampled_from(PEOPLE), min_size=1, unique=True),
        sender=st.sampled_from([SENDER, ""]),
        turns=st.integers(0, 12),
    )
    def accept(self, names: list[str], sender: str, turns: int) -> None:
        async def begin(bench: Bench) -> chasquid.Task:
            task = bench.loop.spawn(bench.accept(*names, sender=sender), "accept")
            for _ in range(turns):
                await bench.loop.turn()
            return task

        task = self.life.do(begin)
        if task.done:  # that is when the client gets its 250
            self.owed |= {(task.result.id, name): sender for name in names}

    @rule(
        name=st.sampled_from(PEOPLE),
        states=st.lists(st.sampled_from([State.DEFERRED, State.FAILED, State.SENT]), max_size=4),
    )
    def decide(self, name: str, states: list[str]) -> None:
        self.plan[name] = states

    @rule(turns=st.integers(1, 30))
    def turn(self, turns: int) -> None:
        self.go_on(turns)

    def go_on(self, turns: int) -> None:
        async def turn(bench: Bench) -> None:
            for _ in range(turns):
                await bench.loop.turn()

        self.life.do(turn)

    @rule(seconds=st.sampled_from([1.0, 70.0, 400.0, 2000.0, GIVE_UP]))
    def let_time_pass(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(
        turns=st.integers(0, 12),
        cut=st.integers(0, 40),
        tear=st.booleans(),
        changed=st.sampled_from([None, -1000.0, 500.0, 1e8]),
    )
    def crash_anywhere(self, turns: int, cut: int, tear: bool, changed: float | None) -> None:
        self.crash(turns, cut, tear, changed)

    def crash(
        self,
        turns: int,
        cut: int,
        tear: bool,
        changed: float | None,
        damage: Callable[[Path], object] = lambda place: None,
    ) -> None:
        self.go_on(turns)
        old, new = self._directory, self._home / str(next(self._numbers))
        shutil.copytree(old, new)
        if self.life.do(_is_quiet):
            # who waits for the next attempt has written down what became of the last
            self.journaled |= self.this_life
        self.life.end()
        shutil.rmtree(old)
        damage(new)
        if tear:
            self._tear(new / "queue", cut)
        if changed is not None:  # the times of files are hints, and no more
            time = self.clock.time() + changed
            for path in _paths(new / "queue"):
                os.utime(path, (time, time))
        self._directory = new
        self.this_life.clear()
        self.life = self._new_life()

    def _tear(self, directory: Path, cut: int) -> None:
        """Cut off the end of each file's last line, as if a crash had come within it.

        Where something was done since that relies on the line, it was synced.
        """
        for path in _paths(directory):
            written = Written(path)
            known = {(written.id, name) for name in written.states} & self.journaled
            if written.lines > 1 and not known:
                data = path.read_bytes()
                path.write_bytes(data[: -1 - min(cut, len(data.rstrip().rpartition(b"\n")[2]))])

    # --- what must hold ---

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert not self.wrong, self.wrong
        assert not list((self._directory / "queue" / "bad").iterdir())

    @invariant()
    def nothing_owed_is_forgotten(self) -> None:
        waiting, told = set(), set(self.notified)
        for path in _paths(self._directory / "queue"):
            written = Written(path)
            waiting |= {
                (written.id, name)
                for name, state in written.states.items()
                if state != State.FAILED
            }
            told |= _reported(path.read_bytes())
        for debt, sender in self.owed.items():
            if debt in self.delivered or debt in waiting or debt in told:
                continue
            assert not sender and self._may_have_failed(debt), f"{debt} is forgotten"

    def _may_have_failed(self, debt: Debt) -> bool:
        return debt in self.failed or self.clock.time() - FakeClock().time() >= GIVE_UP

    def teardown(self) -> None:
        """In the end, everything that is owed is delivered or reported."""
        try:
            self.plan = {name: [] for name in PEOPLE}

            async def finish(bench: Bench) -> None:
                for _ in range(20):
                    if not files(self._directory / "queue"):
                        break
                    self.clock.advance(2000)
                    for _ in range(60):
                        await bench.loop.turn()

            self.life.do(finish)
            assert files(self._directory / "queue") == []
            for debt, sender in self.owed.items():
                done = debt in self.delivered or debt in self.notified
                assert done or (not sender and self._may_have_failed(debt)), debt
            assert not self.wrong
        finally:
            self.life.end()
            shutil.rmtree(self._home)


class Written:
    """What a file of the queue says, read as its format is described and by nobody else."""

    def __init__(self, path: Path) -> None:
        self.id = path.name.partition(",")[0]
        lines = [line for line in path.read_bytes()[size_in_name(path) :].split(b"\n") if line]
        recipients = json.loads(lines[0])["recipients"]
        names = [recipient["destination"]["value"] for recipient in recipients]
        self.lines = len(lines)
        self.states = dict.fromkeys(names, "pending")
        for line in lines[1:]:
            with contextlib.suppress(ValueError):
                for result in json.loads(line)["results"]:
                    self.states[names[result["recipient"]]] = result["state"]


def _paths(directory: Path) -> list[Path]:
    return [*directory.glob("new/*"), *directory.glob("cur/*")]


async def _is_quiet(bench: Bench) -> bool:
    return bench.queue.next_due() > float("-inf")


def _reported(content: bytes) -> set[Debt]:
    """Return the failures that a notification is about."""
    if b"report-type=delivery-status" not in content:
        return set()
    lines = content.decode().split("\r\n")
    (id,) = (line.partition(": ")[2] for line in lines if line.startswith("X-Chasquid-Queue-ID"))
    return {(id, line.partition("; ")[2]) for line in lines if line.startswith("Final-Recipient: ")}


# Many small files that are synced: where there is a file system in memory, take it.
_SHORT_LIVED = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class DirectMachine(QueueMachine):
    """The same with mailboxes into which mail is written before it is accepted."""

    durable = True


TestDirectMachine = DirectMachine.TestCase
TestDirectMachine.settings = TestQueueMachine.settings


class JournalMachine(QueueMachine):
    """The same with a journal, and crashes that are power cuts.

    What was written since all was last synced may be gone, be as it was, hold zeros, or be cut
    short, and what was removed since may be back: each as it falls.
    """

    def __init__(self) -> None:
        self.synced: dict[str, bytes] = {}
        self._journal: chasquid.Journal | None = None
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        self._close()

    def _close(self) -> None:
        """Give back the descriptors, as the end of a process would."""
        if self._journal is not None:
            self._journal.close()

    def disk(self, loop: chasquid.Loop) -> chasquid.Disk:
        self._close()
        directory = str(self._directory / "journal")
        chasquid.replay_journal(directory)
        journal = self._journal = chasquid.Journal(directory, 2 * chasquid.CHUNK)
        settle = journal.settle

        def settled() -> None:
            self.synced = self._content()
            settle()

        journal.settle = settled  # type: ignore[method-assign]
        self.synced = self._content()
        disk = chasquid.Disk(loop)
        disk._journal = chasquid.JournalThreads(loop, journal)
        return disk

    def _content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in _paths(self._directory / "queue")}

    @rule(
        turns=st.integers(0, 12),
        losses=st.lists(st.sampled_from(["", "gone", "old", "zeros", "short"]), min_size=1),
    )
    def cut_power(self, turns: int, losses: list[str]) -> None:
        self.go_on(turns)
        synced, loss = self.synced, itertools.cycle(losses)
        self.crash(turns=0, cut=0, tear=False, changed=None, damage=lambda place: [
            _lose(path, next(loss), synced) for path in sorted(_paths(place / "queue"))
        ])  # fmt: skip


def _lose(path: Path, loss: str, synced: Mapping[str, bytes]) -> None:
    """Take from a file what a power cut may take."""
    old, new = synced.get(path.name, b""), path.read_bytes()
    if loss == "gone" and path.name not in synced:
        path.unlink()
    elif loss == "old" and path.name in synced:
        path.write_bytes(old)
    elif loss == "zeros":
        path.write_bytes(old + bytes(len(new) - len(old)))
    elif loss == "short":
        path.write_bytes(new[: (len(old) + len(new)) // 2])


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = TestQueueMachine.settings


# --- straight into the mailboxes ---

BOTH = ("ana@here.example", "ben@here.example")
CAROL, DORA = "carol@here.example", "dora@here.example"


def lines(bench: Bench, id: str) -> list[str]:
    """Return the events of a message, with their recipients."""
    found = [chasquid.parse_event(line)[1] for line in bench.mail_log.splitlines()]
    return [
        f"{fields['event']} {fields.get('to', '')}".strip() for fields in found
        if fields["id"] == id
    ]  # fmt: skip


def test_what_is_for_mailboxes_here_is_delivered_when_it_is_accepted(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        item = await bench.accept(*BOTH)
        assert bench.files() == [] and not bench.queue.count
        assert [called for _, called in bench.local.messages] == [list(BOTH)]
        assert bench.local.contents == [b"Received: by us\r\n" + MESSAGE]
        assert bench.results == [(name, State.SENT) for name in BOTH]
        assert lines(bench, item.id) == [
            "queued <ana@here.example>,<ben@here.example>", "delivered <ana@here.example>",
            "delivered <ben@here.example>", "done",
        ]  # fmt: skip
        assert f"event=done id={item.id} attempts=1" in bench.mail_log
        await bench.quiet()
        assert len(bench.local.messages) == 1

    on_bench(tmp_path, test, durable=True)


def test_one_that_is_not_in_memory_is_delivered_when_it_is_accepted(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        item = await bench.accept(*BOTH, data=LARGE)
        assert bench.files() == files(tmp_path / "queue", "tmp") == []
        assert bench.local.contents == [b"Received: by us\r\n" + LARGE]
        assert [line.split()[0] for line in lines(bench, item.id)] == [
            "queued", "delivered", "delivered", "done",
        ]  # fmt: skip
        assert f" size={len(LARGE)} " in bench.mail_log

    on_bench(tmp_path, test, durable=True)


@pytest.mark.parametrize("end", ["delivered", "queued", "refused", "dropped", "larger"])
def test_the_memory_that_large_messages_share_is_given_back(tmp_path: Path, end: str) -> None:
    async def test(bench: Bench) -> None:
        spare, piece = bench.queue._spare, b"x" * 50_000
        whole = spare.left
        drafts = []
        for _ in range(12):
            draft = bench.queue.draft()
            for part in (b"Subject: x\r\n\r\n", piece, piece):
                await draft.add(part)
            drafts.append(draft)
        assert spare.left < whole - 9 * 150_000
        assert len(files(tmp_path / "queue", "tmp")) == 2, "those that had to go to the disk"
        if end == "refused":
            bench.local.plan = {"ana@here.example": [State.DEFERRED] * 12}
            (bench.directory / "new").rmdir()
        for draft in drafts if end == "larger" else ():
            for _ in range(4):
                await draft.add(piece)
        assert (spare.left == whole) == (end == "larger")
        for draft in drafts:
            if end in ("dropped", "larger"):
                draft.discard()
                continue
            draft.complete()
            to = FinalRecipient(address("eva@far.example" if end == "queued" else BOTH[0]), "x")
            envelope = Envelope(draft.id, "", (to,), bench.clock.time(), b"A: b\r\n")
            with contextlib.suppress(chasquid.QueueFull):
                await bench.queue.accept(draft, envelope, {})
        assert spare.left == whole
        await bench.quiet()

    on_bench(tmp_path, test, durable=True)


def test_who_meets_in_one_mailbox_gets_it_once(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        ben = address("ben@here.example")
        item = await bench.accept(FinalRecipient(ben, "a@here.example"), FinalRecipient(ben, "b@x"))
        assert [called for _, called in bench.local.messages] == [["ben@here.example"]]
        assert bench.files() == []
        assert lines(bench, item.id)[1:] == ["delivered <ben@here.example>"] * 2 + ["done"]

    on_bench(tmp_path, test, durable=True)


SUCCESS = FinalRecipient(address(DORA), DORA, DsnParameters((Notify.SUCCESS,)))


@pytest.mark.parametrize(
    ("recipients", "size"),
    [
        ([f"u{number}@here.example" for number in range(17)], 100),
        (["ana@here.example", "eva@there.example"], 100),
        (["ana@here.example", Destination("pipe", "cat")], 100),
        (["ana@here.example", Destination("address", "x@here.example", ("mx",))], 100),
        (["ana@here.example", SUCCESS], 100),
        ([f"u{number}@here.example" for number in range(16)], 4_200_000),
    ],
)
def test_all_else_goes_into_the_queue_first(
    tmp_path: Path, recipients: list[Any], size: int
) -> None:
    async def test(bench: Bench) -> None:
        for courier in (bench.local, bench.remote, bench.pipe):
            courier.hold.append(chasquid.Event(bench.loop))
        item = await bench.accept(*recipients, data=MESSAGE + b"x" * size)
        assert bench.files() == [f"new/{item.id}"]
        assert len(bench.journal(item)) == 1
        for courier in (bench.local, bench.remote, bench.pipe):
            courier.hold[0].set()
        await bench.quiet()
        assert len(bench.results) >= len(recipients)  # with the report of a success

    on_bench(tmp_path, test, durable=True)


def test_sixteen_mailboxes_are_few_enough(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await bench.accept(*[f"u{number}@here.example" for number in range(16)])
        assert len(bench.results) == 16 and bench.files() == []

    on_bench(tmp_path, test, durable=True)


@pytest.mark.parametrize("data", [MESSAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("state", [State.DEFERRED, State.FAILED])
def test_who_cannot_have_it_now_stays_in_the_queue_and_nobody_else(
    tmp_path: Path, state: str, data: bytes
) -> None:
    snapshot = tmp_path / "crash"

    async def test(bench: Bench) -> None:
        bench.local.plan = {CAROL: [state, State.SENT]}
        item = await bench.accept("ana@here.example", CAROL, "ben@here.example", data=data)
        shutil.copytree(tmp_path / "queue", snapshot / "queue")
        assert bench.files() == [f"new/{item.id}"]
        envelope, journal = bench.journal(item)
        assert [row["recipient"] for row in journal["results"]] == [0, 2]
        assert {row["state"] for row in journal["results"]} == {State.SENT}
        await bench.quiet()
        assert bench.files() == []
        assert [called for _, called in bench.local.messages[1:]] == [[CAROL]]
        assert lines(bench, item.id) == [
            f"queued <ana@here.example>,<{CAROL}>,<ben@here.example>",
            "delivered <ana@here.example>", "delivered <ben@here.example>",
            f"delivered <{CAROL}>", "done",
        ]  # fmt: skip

    on_bench(tmp_path, test, durable=True)

    async def after(bench: Bench) -> None:  # a crash right after the 250
        await bench.quiet()
        assert [called for _, called in bench.local.messages] == [[CAROL]]
        assert bench.local.contents == [b"Received: by us\r\n" + data]
        assert bench.files() == []

    on_bench(snapshot, after, durable=True)


def test_a_fault_of_the_courier_leaves_it_to_the_queue(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.local.fault = ValueError("a bug")
        item = await bench.accept("ana@here.example")
        assert bench.files() == [f"new/{item.id}"]
        bench.local.fault = None
        await bench.quiet()
        assert bench.files() == [] and len(bench.local.messages) == 1
        assert "a bug" in bench.log

    on_bench(tmp_path, test, durable=True)


def test_what_can_be_neither_delivered_nor_stored_is_refused(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.local.plan = {"ana@here.example": [State.DEFERRED]}
        (bench.directory / "new").rmdir()
        with pytest.raises(chasquid.QueueFull):
            await bench.accept(*BOTH)
        assert not bench.queue.count and bench.results == [("ben@here.example", State.SENT)]
        delivered = [line for line in bench.mail_log.splitlines() if "event=delivered" in line]
        assert len(delivered) == 1 and "to=<ben@here.example>" in delivered[0]
        assert "event=queued" not in bench.mail_log

    on_bench(tmp_path, test, durable=True)


class Unsteady(chasquid.Disk):
    """Keeps a copy of the disk before and after each file; the writes in `broken` fail."""

    def __init__(self, loop: chasquid.Loop, directory: Path, broken: Sequence[int]) -> None:
        super().__init__(loop)
        self._directory = directory
        self._broken = broken
        self._count = itertools.count()
        self._copies = directory.parent / "copies"

    async def create(self, temporary: str, data: bytes, path: str) -> None:
        number = next(self._count)
        shutil.copytree(self._directory, self._copies / f"{number}-before")
        if number in self._broken:
            raise OSError(errno.ENOSPC, "no space left")
        await super().create(temporary, data, path)
        shutil.copytree(self._directory, self._copies / f"{number}-after")

    async def move(self, source: str, path: str) -> None:
        number = next(self._count)
        shutil.copytree(self._directory, self._copies / f"{number}-before")
        if number in self._broken:
            chasquid.discard_names(source)
            raise OSError(errno.ENOSPC, "no space left")
        await super().move(source, path)
        shutil.copytree(self._directory, self._copies / f"{number}-after")


@pytest.mark.parametrize("data", [MESSAGE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("names", [(DORA,), (*BOTH, DORA)])
@pytest.mark.parametrize("broken", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_a_crash_at_any_time_loses_nothing_that_was_accepted(
    tmp_path: Path, names: tuple[str, ...], broken: Sequence[int], data: bytes
) -> None:
    disk_dir = tmp_path / "disk"
    disk_dir.mkdir()

    async def known(user: str, domain: str) -> bool:
        return True

    def courier(directory: Path, broken: Sequence[int]) -> Callable[[Any], chasquid.MaildirCourier]:
        return lambda loop: chasquid.MaildirCourier(
            loop, Unsteady(loop, directory, broken),
            "%data_dir%/mail/%to_user%", data_dir=str(directory), hostname=HOST, user_exists=known,
        )  # fmt: skip

    def holders(directory: Path) -> list[str]:
        found = []
        for path in directory.glob("mail/*/new/*"):
            assert path.read_bytes().endswith(b"\n" + data.replace(b"\r\n", b"\n"))
            found.append(f"{path.parts[-3]}@here.example")
        return sorted(found)

    async def accept(bench: Bench) -> None:
        await bench.accept(*names, data=data)
        shutil.copytree(disk_dir, tmp_path / "accepted")  # from here on it is owed
        await bench.quiet()

    clock = FakeClock()
    on_bench(disk_dir, accept, clock, local=courier(disk_dir, broken), durable=True)
    still = len(names) - len(holders(disk_dir))  # who waits for the next attempt
    assert still <= len(broken)
    for copy in [*(tmp_path / "copies").iterdir(), tmp_path / "accepted"]:

        async def recover(bench: Bench) -> None:
            await bench.advance(100.0)

        shutil.rmtree(tmp_path / "life", ignore_errors=True)
        (tmp_path / "life").mkdir()
        shutil.move(copy, tmp_path / "life" / "disk")
        again = tmp_path / "life" / "disk"
        on_bench(again, recover, FakeClock(clock.now), local=courier(again, ()), durable=True)
        if copy.name == "accepted":
            assert holders(again) == sorted(names)  # each once
        assert set(holders(again)) <= set(names)
        assert files(again / "queue") == []


# --- files that are not as they must be ---

GOOD = {
    "v": 1, "id": "abc", "reverse_path": "a@b", "received": 1.0, "prefix": "", "smtputf8": False,
    "eight_bit": False, "junk": False, "require_tls": False, "tls_optional": False, "ret": "",
    "envid": "", "recipients": [
        {
            "destination": {"kind": "address", "value": "c@d", "via": []},
            "original_recipient": "c@d", "notify": [], "orcpt": "",
        },
    ],
}  # fmt: skip
GOOD_0 = {
    "id": "abc", "sender": "a@b", "addressees": [[["address", "c@d", []], "c@d"]],
    "received": 1.0, "prefix": "", "smtputf8": False, "eight_bit": False,
}  # fmt: skip


def queue_file(directory: Path, envelope: bytes, journal: bytes = b"", place: str = "new") -> Path:
    path = directory / "queue" / place / "abc,S=3"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x\r\n" + envelope + b"\n" + journal)
    return path


def destined(**change: object) -> dict[str, object]:
    """Return a change of the envelope, which changes the destination of its recipient."""
    return recipient(destination={"kind": "address", "value": "c@d", "via": [], **change})


def recipient(**change: object) -> dict[str, object]:
    usual = {"original_recipient": "c@d", "notify": [], "orcpt": ""}
    usual["destination"] = {"kind": "address", "value": "c@d", "via": []}
    return {"recipients": [{**usual, **change}]}


CHANGES = [
    {"prefix": 7}, {"prefix": "€"}, {"reverse_path": 7}, {"reverse_path": "\ud800@x.example"},
    {"recipients": []}, {"recipients": 1}, {"recipients": [1]}, {"recipients": {}},
    {"received": "x"}, {"received": 1e999}, {"received": 9e17}, {"received": -1}, {"id": None},
    {"smtputf8": "yes"}, {"junk": 1}, {"ret": []}, {"envid": 1}, {"more": 1}, {"sender": "a@b"},
    {"v": "1"}, {"v": True}, {"v": -1}, {"v": 1.5}, {"v": None}, {"v": 0},
    destined(kind="fax"), destined(value=1), destined(via="via"), destined(value="\ud800@d"),
    destined(more=1), recipient(notify=["SOMETIMES"]), recipient(notify="NEVER"),
    recipient(orcpt=None), recipient(more=1), recipient(original_recipient=None),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_envelope_that_says_what_cannot_be_is_unreadable(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = queue_file(tmp_path, json.dumps(GOOD).encode())
    assert chasquid.read_item(str(path)).recipients[0].destination == address("c@d")
    queue_file(tmp_path, json.dumps({**GOOD, **change}).encode())
    with pytest.raises(chasquid.UnreadableItem):
        chasquid.read_item(str(path))


@pytest.mark.parametrize("field", [*GOOD])
def test_an_envelope_that_lacks_a_field_is_unreadable(tmp_path: Path, field: str) -> None:
    line = {key: value for key, value in GOOD.items() if key != field}
    path = queue_file(tmp_path, json.dumps(line).encode())
    with pytest.raises(chasquid.UnreadableItem):
        chasquid.read_item(str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"state": "gone"}, {"state": []}, {"recipient": 7}, {"recipient": -1}, {"recipient": "0"},
        {"status": 2}, {"text": None}, {"reported": "yes"}, {"passed_on": 0}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_that_says_what_cannot_be_is_unreadable(
    tmp_path: Path, change: dict[str, object]
) -> None:
    def line(**change: object) -> bytes:
        result = {
            "recipient": 0, "state": "sent", "status": "2.0.0", "text": "x", "remote_mta": "",
            "reply": "", "passed_on": False, "reported": False, **change,
        }  # fmt: skip
        attempt = {"v": 1, "at": 1, "attempts": 1, "next_attempt": 0, "waited": 0}
        attempt.update(delay_reported=False, results=[result])
        return json.dumps(attempt).encode() + b"\n"

    path = queue_file(tmp_path, json.dumps(GOOD).encode(), line())
    assert chasquid.read_item(str(path)).recipients[0].state == State.SENT
    queue_file(tmp_path, json.dumps(GOOD).encode(), line(**change))
    with pytest.raises(chasquid.UnreadableItem):
        chasquid.read_item(str(path))


# --- files of another version ---

NEWER = [
    (json.dumps({**GOOD, "v": 2}).encode(), b""),
    (b'{"v": 2, "all": "is different"}', b""),
    (json.dumps(GOOD).encode(), b'{"v": 2, "all": "is different"}\n'),
]


@pytest.mark.parametrize(("envelope", "journal"), NEWER)
@pytest.mark.parametrize("place", ["new", "cur"])
def test_what_a_newer_program_wrote_is_left_alone_and_reported(
    tmp_path: Path, envelope: bytes, journal: bytes, place: str
) -> None:
    path = queue_file(tmp_path, envelope, journal, place)
    before = path.read_bytes()

    async def test(bench: Bench) -> None:
        await bench.accept("eva@there.example")
        await bench.quiet()
        await bench.advance(GIVE_UP + 1)
        assert [name for _, name, _ in bench.remote.deliveries] == ["eva@there.example"]
        assert bench.local.messages == []
        assert bench.files() == [f"{place}/abc"]
        assert path.read_bytes() == before
        assert f"left where it is, and not delivered: {path}: it is written in ver" in bench.log

    on_bench(tmp_path, test)


def test_what_turns_out_to_be_newer_when_it_can_be_read_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = queue_file(tmp_path, *NEWER[0])
    read_item = chasquid.read_item

    def read_once_in_vain(path: str) -> Item:
        monkeypatch.setattr(chasquid, "read_item", read_item)
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(chasquid, "read_item", read_once_in_vain)

    async def test(bench: Bench) -> None:
        await bench.quiet()
        assert "reading it again in a minute" in bench.log
        await bench.advance(61)
        assert f"left where it is, and not delivered: {path}" in bench.log
        assert bench.files() == ["new/abc"]

    on_bench(tmp_path, test)


# What the program wrote before there were versions, by its own hand: one message that was
# accepted, one after two attempts, one of whose delay its sender was told.
OLD = Path(__file__).parent / "data" / "queue-version-0"


def test_a_file_of_version_0_is_read() -> None:
    contents = chasquid.read_queue(str(OLD))
    assert not contents.unreadable + contents.unread + contents.newer
    accepted, attempted, late = contents.items
    assert accepted.envelope == Envelope(
        accepted.id, "", (FinalRecipient(address("ben@here.example"), "ben@here.example"),),
        1700016400.0, b"Received: by us\r\n",
    )  # fmt: skip
    assert [recipient.state for recipient in accepted.recipients] == [State.PENDING]

    expected = (
        FinalRecipient(
            address("ben@here.example"),
            "ben@here.example",
            DsnParameters((Notify.SUCCESS, Notify.FAILURE), "rfc822;b+2Bn@old.example"),
        ),
        FinalRecipient(
            address("eva@there.example"), "team@here.example", DsnParameters((Notify.NEVER,))
        ),
        FinalRecipient(address("max@there.example"), "max@there.example"),
        FinalRecipient(Destination("pipe", "/usr/bin/filter -x"), "filter@here.example"),
        FinalRecipient(
            address("žofie@there.example", "mx1.example", "mx2.example:26"), "žofie@here.example"
        ),
    )
    assert attempted.envelope == Envelope(
        attempted.id, "ana@here.example", expected, 1700016300.0, "Received: žus\r\n".encode(),
        smtputf8=True, eight_bit=True, junk=True, require_tls=False, tls_optional=True,
        ret="HDRS", envid="QQ+20314",
    )  # fmt: skip
    assert (attempted.attempts, attempted.next_attempt, attempted.waited) == (2, 1700016730.0, 100)
    assert [(recipient.state, recipient.reported) for recipient in attempted.recipients] == [
        (State.SENT, True), (State.DEFERRED, False), (State.FAILED, True),
        (State.DEFERRED, False), (State.DEFERRED, False),
    ]  # fmt: skip
    assert attempted.recipients[2].result == Result(
        State.FAILED, "5.1.1", "max@there.example is failed", "mx.there.example (192.0.2.1:25)",
        "550 5.1.1 no, max@there.example",
    )  # fmt: skip
    assert (late.attempts, late.waited, late.delay_reported) == (3, 16300.0, True)
    assert not attempted.delay_reported


def test_a_file_of_version_0_is_attempted_and_goes_on_in_version_1(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "queue")
    clock = FakeClock()
    clock.advance(20_000)

    async def attempt(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        await bench.quiet()
        assert [name for _, name, _ in bench.local.deliveries] == ["ben@here.example"]
        assert {name for _, name, _ in bench.remote.deliveries} == {
            "eva@there.example", "žofie@there.example", "late@there.example"
        }  # fmt: skip
        assert [name for _, name, _ in bench.pipe.deliveries] == ["/usr/bin/filter -x"]
        (item,) = bench.queue.look()
        assert bench.journal(item)[-1]["v"] == 1 and "v" not in bench.journal(item)[0]

    async def finish(bench: Bench) -> None:
        await bench.advance(700)
        assert [name for _, name, _ in bench.remote.deliveries] == ["eva@there.example"]
        assert bench.local.deliveries + bench.pipe.deliveries == []
        assert bench.files() == []

    on_bench(tmp_path, attempt, clock)
    on_bench(tmp_path, finish, clock)


@pytest.mark.parametrize(
    "change",
    [
        {"prefix": 7}, {"sender": 7}, {"addressees": []}, {"addressees": 1}, {"received": "x"},
        {"addressees": [[["fax", "c@d", []], "c@d"]]}, {"addressees": [[["address", 1, []], "c"]]},
        {"addressees": [[["address", "c@d", "via"], "c@d"]]}, {"smtputf8": "yes"}, {"ret": []},
        {"envid": 1}, {"id": None}, {"received": 1e999}, {"more": 1}, {"received": 9e17},
        {"sender": "\ud800@x.example"}, {"addressees": [[["address", "\ud800@d", []], "c@d"]]},
    ],
    ids=str,
)  # fmt: skip
def test_an_envelope_of_version_0_with_a_wrong_type_is_set_aside(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = queue_file(tmp_path, json.dumps({**GOOD_0, **change}).encode())

    async def test(bench: Bench) -> None:
        await bench.quiet()
        assert not path.exists()
        assert (tmp_path / "queue" / "bad" / path.name).exists()
        assert bench.local.messages + bench.remote.messages == []

    on_bench(tmp_path, test)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000, b'{"results": ' + b"[" * 100_000, b'{"a":' * 100_000,
    ],
    ids=["envelope", "journal", "objects"],
)  # fmt: skip
def test_json_that_is_nested_deeply_ends_nothing(tmp_path: Path, line: bytes) -> None:
    if line.startswith(b'{"results"'):
        path = queue_file(tmp_path, json.dumps(GOOD).encode(), line + b"\n")
    else:
        path = queue_file(tmp_path, line)
    contents = chasquid.read_queue(str(tmp_path / "queue"))
    assert [found for found, _ in contents.unreadable] == [str(path)] and not contents.items


@pytest.mark.parametrize(
    "results",
    [
        {"0": ["gone", "2.0.0", "x"]}, {"7": ["sent", "2.0.0", "x"]},
        {"-1": ["sent", "2.0.0", "x"]},
        {"0": ["sent", 2, "x"]}, {"0": ["sent"]}, [], {"x": ["sent", "2.0.0", "x"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_journal_of_version_0_that_says_what_cannot_be_is_set_aside(
    tmp_path: Path, results: object
) -> None:
    line = {"at": 1, "attempt": 1, "next": 0, "waited": 0, "results": results}
    queue_file(tmp_path, json.dumps(GOOD_0).encode(), json.dumps(line).encode() + b"\n")
    contents = chasquid.read_queue(str(tmp_path / "queue"))
    assert len(contents.unreadable) == 1 and not contents.items


@pytest.mark.parametrize("attempt", [-100, 1.5, "1", None])
def test_a_number_of_attempts_that_is_none_is_set_aside(tmp_path: Path, attempt: object) -> None:
    old = {"at": 1, "attempt": attempt, "next": 0, "waited": 0, "results": {}}
    new = {"v": 1, "at": 1, "attempts": attempt, "next_attempt": 0, "waited": 0}
    new.update(delay_reported=False, results=[])
    for line in (old, new):
        queue_file(tmp_path, json.dumps(GOOD).encode(), json.dumps(line).encode() + b"\n")
        contents = chasquid.read_queue(str(tmp_path / "queue"))
        assert len(contents.unreadable) == 1 and not contents.items


def test_what_cannot_be_set_aside_stays_and_is_told_of(tmp_path: Path) -> None:
    path = queue_file(tmp_path, b"oops")
    (tmp_path / "queue" / "bad").mkdir()
    (tmp_path / "queue" / "bad" / path.name).mkdir()  # so that it cannot be moved there

    async def test(bench: Bench) -> None:
        await bench.quiet()
        assert path.exists()
        await bench.accept("eva@there.example")
        await bench.quiet()
        assert len(bench.remote.messages) == 1

    on_bench(tmp_path, test)
    assert f"{path} stays where it is" in (tmp_path / "server.log").read_text()


# --- what fails leaves nothing behind ---


def test_a_file_that_cannot_be_removed_is_not_delivered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: chasquid.Disk, path: str) -> None:
        raise OSError(errno.EIO, "no")

    async def deliver(bench: Bench) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(chasquid.Disk, "remove", refuse)
            await bench.accept("eva@there.example")
            await bench.until(lambda: bench.remote.messages)
            for _ in range(20):
                await bench.loop.turn()
        assert len(bench.remote.messages) == 1

    async def start_again(bench: Bench) -> None:
        await bench.quiet()
        assert bench.remote.messages == []
        assert bench.files() == []

    on_bench(tmp_path, deliver)
    on_bench(tmp_path, start_again)


@pytest.mark.parametrize("broken", ["rename", "fsync of the directory"])
def test_a_file_that_fails_leaves_neither_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    (tmp_path / "tmp").mkdir()
    (tmp_path / "new").mkdir()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no"):
        if broken == "rename":
            patched.setattr(os, "rename", fail)
        else:
            patched.setattr(chasquid, "sync_directory", fail)
        chasquid.create_durably(
            str(tmp_path / "tmp" / "x"), [b"a"], lambda size: str(tmp_path / "new" / f"x,S={size}")
        )
    assert os.listdir(tmp_path / "tmp") == os.listdir(tmp_path / "new") == []


def test_a_draft_that_cannot_be_removed_ends_nothing(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        draft = bench.queue.draft()
        await draft.add(b"Subject: x\r\n\r\n" + b"x" * 300_000)
        for path in (tmp_path / "queue" / "tmp").iterdir():
            path.unlink()
        draft.discard()

    on_bench(tmp_path, test)


# --- messages of chasquid in Go ---

GO = """\
ID: "QWERTY12"
from: "boss@far.example"
To: "team@here.example"
rcpt: {
  address: "eva@there.example"
  type: EMAIL
  status: PENDING
  original_address: "team@here.example"
}
rcpt {
  address: "done@there.example" type: EMAIL status: SENT original_address: "team@here.example"
}
rcpt: <
  address: "ida@via.example" type: FORWARD original_address: "x@here.example"
  via: "mx1" via: "mx2"
>
rcpt: { address: "cat" type: PIPE status: FAILED last_failure_message: "no" }
data: "Subject: caf\\303\\251\\r\\n\\r\\nIt \\"works\\".\\n"
created_at_ts: %d
"""


def test_messages_of_chasquid_in_go_are_taken_over_once(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    (queue / "m:QWERTY12").write_text(GO % (int(FakeClock().time() - 3600) * 10**9))
    (queue / "m:BROKEN").write_text("ID: 7")
    (queue / "other").write_text("not ours")

    async def test(bench: Bench) -> None:
        await bench.quiet()
        sent = {names[0]: delivery for delivery, names in bench.remote.messages}
        assert set(sent) == {"eva@there.example", "ida@via.example"}
        assert sent["eva@there.example"].sender == "team+fwd_from=boss=far.example@here.example"
        [(_, piped)] = bench.pipe.messages
        assert piped == ["cat"]
        assert b'Subject: caf\xc3\xa9\r\n\r\nIt "works".\r\n' in bench.pipe.contents
        assert bench.files() == []

    on_bench(tmp_path, test)
    assert sorted(path.name for path in queue.iterdir() if path.is_file()) == ["m:BROKEN", "other"]
    log = (tmp_path / "server.log").read_text()
    assert "m:BROKEN" in log and "not taken over from chasquid in Go" in log


def test_a_message_that_was_taken_over_before_a_crash_is_not_taken_twice(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    text = GO % 0

    async def end_at_once(bench: Bench) -> None:
        bench.queue.begin_closing()

    (queue / "m:QWERTY12").write_text(text)
    on_bench(tmp_path, end_at_once)
    (queue / "m:QWERTY12").write_text(text)  # as if we had died before it was removed
    on_bench(tmp_path, end_at_once)
    assert len([path for place in ("new", "cur") for path in (queue / place).iterdir()]) == 1


# --- what the operator asks for ---


def test_a_message_that_is_given_up_by_the_operator_goes_back(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED] * 9}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        await bench.queue.bounce(item.id)
        await bench.quiet()
        [content] = bench.local.contents
        assert b"eva@there.example" in content and b"Mail delivery failed" in content
        assert b"given up by the operator; the last attempt: " in content
        assert b"Status: 5.0.0" in content
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_after_a_retry_the_file_says_that_it_is_due(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED] * 9}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        assert chasquid.read_item(item.message.path).next_attempt > bench.clock.time()
        await bench.queue.retry(item.id)
        assert chasquid.read_item(item.message.path).next_attempt == 0.0

    on_bench(tmp_path, test)


def test_a_retry_during_an_attempt_is_not_lost_and_makes_one_more(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED, State.DEFERRED, State.DEFERRED]}
        deliver = bench.remote.deliver

        async def retried_meanwhile(*arguments: Any) -> Any:
            if not bench.remote.messages:
                for item in bench.queue.look():
                    await bench.queue.retry(item.id)
            return await deliver(*arguments)

        bench.remote.deliver = retried_meanwhile  # type: ignore[method-assign]
        await bench.accept("eva@there.example")
        await bench.quiet()
        assert len(bench.remote.messages) == 2

    on_bench(tmp_path, test)


def test_a_message_whose_file_cannot_be_removed_stays_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: chasquid.Disk, path: str) -> None:
        raise OSError(errno.EIO, "no")

    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED] * 9}
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        with monkeypatch.context() as patched:
            patched.setattr(chasquid.Disk, "remove", refuse)
            with pytest.raises(chasquid.ChasquidError, match=f"{item.id} cannot be removed"):
                await bench.queue.remove(item.id)
        assert [found.id for found in bench.queue.look()] == [item.id]
        await bench.queue.remove(item.id)
        assert bench.files() == []

    on_bench(tmp_path, test)


def test_a_file_that_cannot_be_closed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def broken(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "no")

    async def test(bench: Bench) -> None:
        draft = bench.queue.draft()
        await draft.add(b"Subject: x\r\n\r\n" + b"x" * 300_000)
        with monkeypatch.context() as patched:
            patched.setattr(os, "close", broken)
            draft.discard()
        assert files(tmp_path / "queue", "tmp") == []

    on_bench(tmp_path, test)


def test_a_file_that_is_gone_although_its_removal_failed_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def unlink(path: str) -> None:
        real(path)
        raise OSError(errno.EIO, "broken", path)

    async def test(bench: Bench) -> None:
        monkeypatch.setattr(os, "unlink", unlink)
        item = await bench.accept("eva@there.example")
        await bench.quiet()
        monkeypatch.undo()
        assert bench.files() == []
        assert lines(bench, item.id)[-1] == "done" and "lost" not in bench.mail_log

    on_bench(tmp_path, test)


def test_all_that_is_retried_is_written_down_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = chasquid.make_durably
    batches = []

    def make_durably(changes: Sequence[chasquid.Change]) -> None:
        batches.append(len(changes))
        real(changes)

    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED] * 5}
        items = [await bench.accept("eva@there.example") for _ in range(5)]
        await bench.quiet()
        os.unlink(bench.path(items[0]))
        monkeypatch.setattr(chasquid, "make_durably", make_durably)
        assert await bench.queue.retry_all() == 4
        assert batches == [4]
        assert [bench.journal(item)[-1]["next_attempt"] for item in items[1:]] == [0.0] * 4
        await bench.quiet()
        assert len(bench.remote.deliveries) == 5 + 4

    on_bench(tmp_path, test)


def test_what_cannot_be_removed_is_delivered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(bench: Bench) -> None:
        bench.remote.plan = {"eva@there.example": [State.DEFERRED]}
        item = await bench.accept("eva@there.example")
        await bench.quiet()

        def unlink(path: str) -> None:
            raise OSError(errno.EIO, "broken", path)

        monkeypatch.setattr(os, "unlink", unlink)
        with pytest.raises(chasquid.ChasquidError, match="cannot be removed"):
            await bench.queue.remove(item.id)
        monkeypatch.undo()
        await bench.advance(200)
        states = [state for _, _, state in bench.remote.deliveries]
        assert states == [State.DEFERRED, State.SENT]
        assert bench.files() == []

    on_bench(tmp_path, test)
