# SPDX-License-Identifier: Apache-2.0
"""Room WAITING: what waits for its time, or for a place on a route, and how it is found."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FakeClock, Inline, record, run

import chasquid
from chasquid import Waiting, WaitingMessage

SLOW, QUICK = ("mx", "slow.example"), ("mx", "quick.example")
PLACES = 4


def message(id: str, due: float = 0.0) -> WaitingMessage:
    return WaitingMessage(due, id, f"/queue/cur/{id},S=1", 2.0, since=0.0)


def waiting(*messages: WaitingMessage) -> Waiting:
    made = Waiting(lambda route: PLACES)
    for each in messages:
        made.add(each)
    return made


def ids(messages: list[WaitingMessage]) -> list[str]:
    return [each.id for each in messages]


# --- the heap ---


def test_what_is_due_comes_in_order_and_what_is_not_stays() -> None:
    queue = waiting(message("c", 30), message("a", 10), message("b", 20), message("d", 31))
    assert queue.next_due() == 10
    assert ids(queue.due(30, 2)) == ["a", "b"]
    assert ids(queue.due(30, 9)) == ["c"]
    assert queue.due(30, 9) == []
    assert queue.next_due() == 31
    assert len(queue) == 4  # until they are removed


def test_what_was_replaced_or_removed_is_passed_over() -> None:
    queue = waiting(message("a", 10), message("b", 20), message("c", 30))
    queue.add(message("a", 40))
    queue.remove("b")
    assert queue.next_due() == 30
    assert ids(queue.due(99, 9)) == ["c", "a"]
    assert queue.remove("b") is None


def test_of_nothing_nothing_is_due() -> None:
    assert waiting().next_due() == float("inf")


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9) | st.none())))
def test_the_next_that_is_due_is_what_a_search_would_find(
    steps: list[tuple[str, int | None]],
) -> None:
    queue, known = waiting(), dict[str, int]()
    for id, due in steps:
        if due is None:
            queue.remove(id)
            known.pop(id, None)
        else:
            queue.add(message(id, due))
            known[id] = due
        assert queue.next_due() == min(known.values(), default=float("inf"))
        assert {each.id for each in queue} == set(known)
    assert sorted(ids(queue.due(4, 99))) == sorted(id for id, due in known.items() if due <= 4)


# --- lines ---


def test_who_waits_for_a_place_goes_on_when_half_of_them_are_free() -> None:
    queue = waiting()
    for _ in range(PLACES):
        queue.begin([SLOW])
    assert queue.must_wait(SLOW, message("z")) and not queue.must_wait(QUICK, message("z"))
    for id in "abc":
        queue.line_up(message(id), [SLOW])
    assert queue.length(SLOW) == PLACES + 3
    assert queue.due(0, 9) == []
    assert not queue.end([SLOW])
    assert queue.due(0, 9) == []
    assert queue.end([SLOW])
    assert ids(queue.due(0, 9)) == ["a", "b"]  # as many as there are places
    assert queue.length(SLOW) == PLACES - 2 + 1
    assert not queue.must_wait(SLOW, message("b"))  # but who comes after "c" must
    assert queue.must_wait(SLOW, message("d"))
    queue.remove("c")
    assert not queue.must_wait(SLOW, message("d"))


def test_a_line_is_in_the_order_in_which_its_messages_became_due() -> None:
    queue = waiting()
    queue.begin([SLOW] * PLACES)
    for id, due in (("b", 2), ("a", 1), ("c", 3)):
        queue.line_up(message(id, due), [SLOW])
    queue.end([SLOW] * PLACES)
    assert ids(queue.due(9, 9)) == ["a", "b", "c"]
    assert queue.length(SLOW) == 0


def test_who_waits_for_either_of_two_routes_goes_on_once() -> None:
    queue = waiting()
    queue.begin([SLOW, QUICK] * PLACES)
    queue.line_up(message("a"), [SLOW, QUICK])
    assert queue.end([QUICK] * PLACES)
    assert ids(queue.due(0, 9)) == ["a"]
    queue.remove("a")
    queue.end([SLOW] * PLACES)
    assert queue.due(0, 9) == []
    assert len(queue) == 0


def test_who_lines_up_again_is_not_in_line_twice() -> None:
    queue = waiting()
    for _ in range(3):
        queue.begin([SLOW, QUICK] * PLACES)
        queue.line_up(queue.get("a") or message("a"), [SLOW, QUICK])
        queue.end([SLOW, QUICK] * PLACES)
        assert ids(queue.due(0, 9)) == ["a"]


# --- what is found on the disk ---


def test_files_are_listed_with_what_their_names_and_times_say(tmp_path: Path) -> None:
    (tmp_path / "cur").mkdir()
    for name in ("a,S=3", "b,S=4", "hello", "c,S=x"):
        (tmp_path / "cur" / name).write_bytes(b"never read")
        os.utime(tmp_path / "cur" / name, (1, 1700000090))
    files = chasquid.list_queue(str(tmp_path), chasquid.Place.CUR)
    assert sorted((file.id, file.changed) for file in files.found) == [
        ("a", 1700000090.0), ("b", 1700000090.0)
    ]  # fmt: skip
    assert sorted(os.path.basename(path) for path, _ in files.unreadable) == ["c,S=x", "hello"]
    assert chasquid.list_queue(str(tmp_path), chasquid.Place.NEW).found == []


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer has objects of its own")
def test_a_message_that_waits_takes_less_than_a_kilobyte() -> None:
    count = 10_000
    tracemalloc.start()
    try:
        queue = waiting()
        for number in range(count):
            id = f"{number:013d}"
            path = f"/var/lib/chasquid/queue/cur/{id},S=12345"
            queue.add(WaitingMessage(1.0 + number, id, path, 1e9 + number, since=0.5))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(queue) == count
    assert size / count < 700


# --- the schedule ---


class Opened:
    """A schedule on a loop, and what it has opened: ids, or names of errors."""

    def __init__(self, loop: chasquid.Loop, directory: Path, clock: FakeClock) -> None:
        self.loop, self.clock = loop, clock
        self.waiting = waiting()
        self.seen: list[str] = []
        self.fault: Exception | None = None
        self.schedule = chasquid.Schedule(
            loop, record(directory, clock), self.waiting, self._opened
        )

    def _opened(self, message: WaitingMessage, item: chasquid.Item | Exception) -> None:
        self.seen.append(f"{message.id}: {type(item).__name__}")
        if self.fault is not None:
            raise self.fault
        self.waiting.remove(message.id)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for _ in range(5):
            await self.loop.turn()


def test_a_file_is_opened_when_it_is_due_and_not_before(tmp_path: Path) -> None:
    clock = FakeClock()

    async def main(loop: chasquid.Loop) -> None:
        opened = Opened(loop, tmp_path, clock)
        start = clock.monotonic()
        opened.waiting.add(message("late", start + 100))
        opened.schedule.go_on()
        await opened.advance(50)
        assert opened.seen == []
        opened.waiting.add(message("early", start + 60))
        opened.schedule.go_on()
        await opened.advance(20)
        assert opened.seen == ["early: FileNotFoundError"]
        await opened.advance(31)
        assert opened.seen[1:] == ["late: FileNotFoundError"]
        assert opened.waiting.next_due() == float("inf")

    run(main, clock=clock, workers=Inline())


def test_a_fault_of_ours_holds_up_one_message_and_not_for_ever(tmp_path: Path) -> None:
    clock = FakeClock()

    async def main(loop: chasquid.Loop) -> None:
        opened = Opened(loop, tmp_path, clock)
        opened.fault = ZeroDivisionError("oops")
        opened.waiting.add(message("a", clock.monotonic()))
        opened.schedule.go_on()
        await opened.advance(0)
        opened.fault = None
        opened.waiting.add(message("b", clock.monotonic()))
        opened.schedule.go_on()
        await opened.advance(0)
        assert [each[0] for each in opened.seen] == ["a", "b"]
        await opened.advance(1201)
        assert [each[0] for each in opened.seen] == ["a", "b", "a"]

    run(main, clock=clock, workers=Inline())
    assert "ZeroDivisionError: oops" in (tmp_path / "server.log").read_text()


def test_no_more_is_read_while_many_results_wait_for_the_disk(tmp_path: Path) -> None:
    clock = FakeClock()

    async def main(loop: chasquid.Loop) -> None:
        opened = Opened(loop, tmp_path, clock)
        for _ in range(64):
            opened.schedule.hold()
        opened.waiting.add(message("a", clock.monotonic()))
        opened.schedule.go_on()
        await opened.advance(10)
        assert opened.seen == []
        opened.schedule.release()
        await opened.advance(0)
        assert len(opened.seen) == 1

    run(main, clock=clock, workers=Inline())


def test_a_schedule_that_is_closed_reads_no_more(tmp_path: Path) -> None:
    clock = FakeClock()

    async def main(loop: chasquid.Loop) -> None:
        opened = Opened(loop, tmp_path, clock)
        opened.waiting.add(message("a", clock.monotonic() + 10))
        opened.schedule.go_on()
        await opened.advance(0)
        opened.schedule.close()
        await opened.advance(20)
        assert opened.seen == []

    run(main, clock=clock, workers=Inline())
