# SPDX-License-Identifier: Apache-2.0
"""Room LOOP: tasks, deadlines, cancellation, worker threads, child processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import MODULE, FakeClock, run, searched, socket_pair, turns

import chasquid

Cancelled, Expired = chasquid.Cancelled, chasquid.Expired


async def outcome(task: chasquid.Task) -> object:
    """What became of `task`: its result, or the error that ended it."""
    try:
        return await task.join()
    except BaseException as error:
        return error


async def until(loop: chasquid.Loop, condition) -> None:
    """Wait for what threads or the system will do soon."""
    with loop.deadline(60.0):
        while not condition():
            await loop.sleep(0.001)


# --- Tasks -----------------------------------------------------------------------------


def test_run_returns_what_the_main_coroutine_returned():
    async def main(loop):
        return 42

    assert run(main) == 42


def test_run_raises_what_the_main_coroutine_raised():
    async def main(loop):
        await loop.turn()
        raise KeyError("main")

    crashes = []
    with pytest.raises(KeyError, match="main"):
        run(main, crashes=crashes)
    assert crashes == []


def test_join_returns_the_result_or_raises_the_error():
    async def value():
        return "value"

    async def failing(loop):
        await loop.turn()
        raise KeyError("failed")

    async def main(loop):
        assert await loop.spawn(value(), "value").join() == "value"
        done = loop.spawn(value(), "value")
        await turns(loop)
        assert await done.join() == "value"  # it had ended before
        with pytest.raises(KeyError, match="failed"):
            await loop.spawn(failing(loop), "failing").join()

    run(main)


def test_a_task_that_fails_unseen_is_reported_and_harms_no_other():
    async def failing():
        raise KeyError("unseen")

    async def main(loop):
        loop.spawn(failing(), "the failing one")
        await turns(loop)
        return "well"

    crashes = []
    assert run(main, crashes=crashes) == "well"
    assert [(name, str(error)) for name, error in crashes] == [("the failing one", "'unseen'")]


def test_several_tasks_may_join_one():
    async def slow(loop):
        await turns(loop)
        return 7

    async def main(loop):
        task = loop.spawn(slow(loop), "slow")

        async def joiner():
            return await task.join()

        joiners = [loop.spawn(joiner(), "joiner") for _ in range(3)]
        return [await one.join() for one in joiners]

    assert run(main) == [7, 7, 7]


def test_a_joiner_that_is_cancelled_leaves_the_task_and_the_other_joiners_alone():
    async def slow(loop):
        await loop.sleep(5)
        return 7

    async def main(loop):
        task = loop.spawn(slow(loop), "slow")

        async def joiner():
            return await task.join()

        one, other = loop.spawn(joiner(), "one"), loop.spawn(joiner(), "other")
        await turns(loop)
        one.cancel()
        await turns(loop)
        assert isinstance(one.error, Cancelled)
        assert not task.done
        loop.clock.now += 6
        return await other.join()

    assert run(main, FakeClock()) == 7


def test_main_ends_the_tasks_that_are_left():
    ended = []

    async def forever(loop, name):
        try:
            await loop.sleep(10_000)
        finally:
            ended.append(name)

    async def main(loop):
        for name in "abc":
            loop.spawn(forever(loop, name), name)
        await turns(loop)

    run(main)
    assert sorted(ended) == ["a", "b", "c"]


def test_a_task_may_still_wait_while_it_is_ended():
    said = []

    async def polite(loop):
        try:
            await loop.sleep(10_000)
        finally:
            await loop.sleep(0.001)
            said.append("goodbye")

    async def main(loop):
        loop.spawn(polite(loop), "polite")
        await turns(loop)

    run(main)
    assert said == ["goodbye"]


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize("where", ["main", "another"])
def test_an_interrupt_inside_a_task_ends_the_loop(kind, where):
    code = f"""if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import chasquid
        workers = chasquid.Workers(1)
        loop = chasquid.Loop(chasquid.Clock(), workers, print)
        ended = []
        async def interrupted():
            await loop.turn()
            raise {kind}
        async def other():
            try:
                await loop.sleep(10_000)
            finally:
                ended.append(1)
        async def main():
            loop.spawn(other(), "other")
            if {where == "main"}:
                await interrupted()
            loop.spawn(interrupted(), "interrupted")
            await loop.sleep(10_000)
        try:
            loop.run(main())
        except {kind}:
            print("ended", ended)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(MODULE.parent)], stdout=subprocess.PIPE
    )
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        output = b"it hung"
    finally:
        process.kill()
        process.communicate()
    assert output == b"ended [1]\n"


# --- Sleep, deadlines, cancellation -------------------------------------------------------


def test_sleepers_wake_in_the_order_of_their_times():
    order = []

    async def sleeper(loop, seconds):
        await loop.sleep(seconds)
        order.append(seconds)

    async def main(loop):
        for seconds in (3, 1, 2):
            loop.spawn(sleeper(loop, seconds), "sleeper")
        await turns(loop)
        assert order == []
        for _ in range(3):
            loop.clock.now += 1
            await turns(loop)

    run(main, FakeClock())
    assert order == [1, 2, 3]


def test_a_deadline_ends_a_wait_and_not_what_follows():
    async def main(loop):
        async def waits():
            with pytest.raises(Expired), loop.deadline(5):
                await loop.sleep(100)
            await loop.sleep(100)
            return "later"

        task = loop.spawn(waits(), "waits")
        await turns(loop)
        loop.clock.now += 6
        await turns(loop)
        assert not task.done
        loop.clock.now += 101
        return await task.join()

    assert run(main, FakeClock()) == "later"


def test_the_nearest_of_nested_deadlines_counts():
    async def main(loop):
        async def waits(outer, inner):
            began = loop.clock.now
            try:
                with loop.deadline(outer), loop.deadline(inner):
                    await loop.sleep(100)
            except Expired:
                return loop.clock.now - began

        one = loop.spawn(waits(3, 8), "one")
        other = loop.spawn(waits(8, 3), "other")
        for _ in range(10):
            await turns(loop)
            loop.clock.now += 1
        return await one.join(), await other.join()

    first, second = run(main, FakeClock())
    assert 3 <= first <= 4
    assert 3 <= second <= 4


def test_an_inner_deadline_that_is_over_leaves_the_outer_one_in_force():
    async def main(loop):
        async def waits():
            with loop.deadline(50):
                with contextlib.suppress(Expired), loop.deadline(1):
                    await loop.sleep(100)
                await loop.sleep(1000)

        task = loop.spawn(waits(), "waits")
        await turns(loop)
        loop.clock.now += 2
        await turns(loop)
        assert not task.done
        loop.clock.now += 50
        return await outcome(task)

    assert isinstance(run(main, FakeClock()), Expired)


def test_a_deadline_ends_a_task_whose_descriptor_is_always_ready():
    async def main(loop):
        with socket_pair() as (one, other):
            other.send(b"never read")
            waits = 0
            with contextlib.suppress(Expired), loop.deadline(5):
                while waits < 1000:
                    await loop.readable(one.fileno())
                    waits += 1
                    loop.clock.now += 1
            loop.forget(one.fileno())
            return waits

    assert run(main, FakeClock()) < 100


def test_a_deadline_is_in_force_after_a_job_that_outlived_it():
    async def main(loop):
        gate = threading.Event()

        async def works():
            with loop.deadline(5):
                assert await loop.work(lambda: gate.wait(60) and "done") == "done"
                await loop.sleep(1000)

        task = loop.spawn(works(), "works")
        await turns(loop)
        loop.clock.now += 6
        await turns(loop)
        assert not task.done  # a job cannot be taken back
        gate.set()
        await loop.work(lambda: None)
        while not task.done:
            await loop.turn()
        return task.error

    crashes = []
    assert isinstance(run(main, FakeClock(), crashes), Expired)


def test_cancelling_raises_where_the_task_waits():
    async def main(loop):
        task = loop.spawn(loop.sleep(100), "sleeper")
        await turns(loop)
        task.cancel()
        return await outcome(task)

    assert isinstance(run(main), Cancelled)


def test_a_task_cancelled_before_its_first_step_waits_for_nothing():
    async def main(loop):
        task = loop.spawn(loop.sleep(100), "sleeper")
        task.cancel()
        return await outcome(task)

    assert isinstance(run(main), Cancelled)


def test_cancelling_a_task_that_has_ended_does_nothing():
    async def main(loop):
        task = loop.spawn(loop.turn(), "short")
        await turns(loop)
        task.cancel()
        return await task.join()

    assert run(main) is None


def test_cancelling_waits_for_a_job_in_a_worker():
    ran = []

    async def main(loop):
        gate = threading.Event()

        def job():
            gate.wait(60)
            ran.append("job")

        async def works():
            await loop.work(job)
            ran.append("after")
            await loop.turn()
            ran.append("too late")

        task = loop.spawn(works(), "works")
        await turns(loop)
        task.cancel()
        await turns(loop)
        assert not task.done
        gate.set()
        return await outcome(task)

    assert isinstance(run(main), Cancelled)
    assert ran == ["job", "after"]


# --- Descriptors --------------------------------------------------------------------------


def test_a_descriptor_wakes_its_reader_and_its_writer_apart():
    async def main(loop):
        with socket_pair() as (one, other):
            one.setblocking(False)

            async def reader():
                await loop.readable(one.fileno())
                return one.recv(10)

            task = loop.spawn(reader(), "reader")
            await loop.writable(one.fileno())
            assert not task.done
            other.send(b"hello")
            result = await task.join()
            loop.forget(one.fileno())
            return result

    assert run(main) == b"hello"


def test_input_that_nobody_waits_for_does_not_keep_the_loop_busy():
    async def main(loop):
        with socket_pair() as (one, other):
            other.send(b"a")
            await loop.readable(one.fileno())
            other.send(b"b")
            began = time.thread_time()
            await loop.sleep(0.3)
            used = time.thread_time() - began
            await loop.readable(one.fileno())  # it can still be waited for
            loop.forget(one.fileno())
            return used

    assert run(main) < 0.2


def test_a_number_that_is_used_again_after_forget_is_watched_anew():
    async def main(loop):
        for _ in range(5):
            one, other = socket.socketpair()
            other.send(b"x")
            await loop.readable(one.fileno())
            loop.forget(one.fileno())
            one.close()
            other.close()
        return True

    assert run(main)


def test_a_peer_that_goes_away_wakes_the_reader():
    async def main(loop):
        with socket_pair() as (one, other):
            other.close()
            await loop.readable(one.fileno())
            loop.forget(one.fileno())
            return one.recv(1)

    assert run(main) == b""


def test_forgetting_what_was_never_watched_is_no_error():
    async def main(loop):
        with socket_pair() as (one, _):
            loop.forget(one.fileno())
        return True

    assert run(main)


# --- Posts and jobs -----------------------------------------------------------------------


def test_calls_from_other_threads_end_the_sleep_of_the_loop_and_none_is_lost():
    async def main(loop):
        seen, everything = [], chasquid.Event(loop)

        def call(number):
            seen.append(number)
            if len(seen) == 2000:
                everything.set()

        def post(first):
            for number in range(first, first + 500):
                loop.post(lambda number=number: call(number))

        threads = [threading.Thread(target=post, args=(n * 500,)) for n in range(4)]
        for thread in threads:
            thread.start()
        with loop.deadline(60):
            await everything.wait()
        for thread in threads:
            thread.join()
        return seen

    assert sorted(run(main)) == list(range(2000))


def test_a_post_after_the_end_harms_nobody():
    loops = []

    async def main(loop):
        loops.append(loop)

    run(main)
    loops[0].post(lambda: None)


def test_a_job_runs_in_another_thread_and_brings_its_result_or_its_error():
    async def main(loop):
        here = threading.get_ident()
        assert await loop.work(threading.get_ident) != here
        with pytest.raises(ZeroDivisionError):
            await loop.work(lambda: 1 // 0)
        return "on"

    assert run(main) == "on"


def test_a_job_that_no_thread_can_be_started_for_leaves_its_task_whole():
    code = """if True:
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        import chasquid
        workers = chasquid.Workers(1)
        loop = chasquid.Loop(chasquid.Clock(), workers, print)
        async def tries():
            try:
                await loop.work(lambda: None)
            except (RuntimeError, chasquid.ChasquidError):
                pass
            await loop.sleep(10_000)
        async def main():
            threading.stack_size(1 << 46)  # more than there is: no thread can start
            task = loop.spawn(tries(), "tries")
            for _ in range(5):
                await loop.turn()
            task.cancel()
            for _ in range(5):
                await loop.turn()
            print("done" if task.done else "it cannot be cancelled", flush=True)
            import os
            os._exit(0)
        loop.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODULE.parent)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr[-300:]) == ("done\n", "")


@searched
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_a_job_is_neither_lost_nor_abandoned_when_its_task_is_cancelled(plan, threads):
    began: list[int] = []
    ran: list[int] = []

    async def main(loop):
        ended = {}

        async def works(number):
            began.append(number)
            try:
                await loop.work(lambda: ran.append(number))
                await loop.turn()
            finally:
                ended[number] = number in ran  # no task goes on while its job is under way

        tasks = [loop.spawn(works(number), "works") for number in range(len(plan))]
        for now in range(7):
            for task, (when, cancelled) in zip(tasks, plan, strict=True):
                if cancelled and when == now:
                    task.cancel()
            await loop.turn()
        results = [await outcome(task) for task in tasks]
        assert all(result is None or isinstance(result, Cancelled) for result in results)
        return ended

    ended = run(main, threads=threads)
    assert sorted(ran) == sorted(began)
    assert ended == dict.fromkeys(began, True)
    assert all(number in began for number, (_, cancelled) in enumerate(plan) if not cancelled)


# --- Events and slots ---------------------------------------------------------------------


def test_an_event_lets_all_go_on_who_wait_and_those_who_come_later():
    async def main(loop):
        event = chasquid.Event(loop)
        tasks = [loop.spawn(event.wait(), "waits") for _ in range(3)]
        await turns(loop)
        assert not any(task.done for task in tasks)
        event.set()
        await event.wait()
        for task in tasks:
            await task.join()
        event.clear()
        late = loop.spawn(event.wait(), "late")
        await turns(loop)
        assert not late.done
        event.set()
        await late.join()
        return True

    assert run(main)


def test_slots_are_given_in_the_order_of_coming():
    async def main(loop):
        slots, order = chasquid.Slots(loop, 1), []

        async def enters(number):
            async with slots:
                order.append(number)
                await turns(loop, 2)

        for task in [loop.spawn(enters(number), "enters") for number in range(6)]:
            await task.join()
        return order

    assert run(main) == [0, 1, 2, 3, 4, 5]


async def enter_all(loop, slots, count):
    """Enter `count` slots at the same time; tell how many got in."""
    inside, leave = [], chasquid.Event(loop)

    async def enters():
        async with slots:
            inside.append(1)
            await leave.wait()

    tasks = [loop.spawn(enters(), "enters") for _ in range(count)]
    await turns(loop)
    got_in = len(inside)
    leave.set()
    for task in tasks:
        await task.join()
    return got_in


GUEST = st.tuples(
    st.integers(0, 5),  # comes
    st.integers(0, 4),  # stays so many turns
    st.sampled_from(["calm", "cancelled", "expires", "fails"]),
    st.integers(0, 9),  # and when that happens
)


@searched
@given(st.integers(1, 3), st.lists(GUEST, min_size=1, max_size=10))
@example(1, [(0, 2, "calm", 0), (0, 0, "cancelled", 2), (0, 0, "cancelled", 3)])
@example(1, [(0, 3, "calm", 0), (0, 0, "expires", 3), (0, 0, "calm", 0)])
def test_no_slot_is_lost_or_doubled_however_tasks_end(count, guests):
    async def main(loop):
        slots = chasquid.Slots(loop, count)
        inside = 0
        most = 0

        async def guest(comes, stays, fate, when):
            nonlocal inside, most
            for _ in range(comes):
                await loop.turn()
            with loop.deadline(when if fate == "expires" else 10_000):
                async with slots:
                    inside += 1
                    most = max(most, inside)
                    try:
                        for _ in range(stays):
                            await loop.turn()
                        if fate == "fails":
                            raise KeyError("failed inside")
                    finally:
                        inside -= 1

        tasks = [loop.spawn(guest(*one), "guest") for one in guests]
        for now in range(12):
            for task, (_, _, fate, when) in zip(tasks, guests, strict=True):
                if fate == "cancelled" and when == now:
                    task.cancel()
            loop.clock.now += 1
            await loop.turn()
        for task in tasks:
            assert isinstance(await outcome(task), (type(None), Cancelled, Expired, KeyError))
        assert most <= count
        assert await enter_all(loop, slots, count + 1) == count

    run(main, FakeClock(), crashes=[])


# --- Every wait at once -------------------------------------------------------------------

STEP = st.tuples(
    st.sampled_from(["sleep", "readable", "event", "work", "join", "slots", "turn"]),
    st.integers(0, 4),  # how long, or which one
    st.none() | st.integers(1, 6),  # a deadline around it
)


@searched
@given(
    st.lists(st.lists(STEP, max_size=5), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 4)), max_size=4),
    st.lists(st.integers(0, 3), min_size=20, max_size=20),
)
def test_no_wait_ends_before_its_time_and_each_one_ends(programs, cancellations, pace):
    """A wait that returns had its reason; `Expired` comes after the deadline only."""

    async def main(loop):
        clock = loop.clock
        event, slots = chasquid.Event(loop), chasquid.Slots(loop, 2)
        helpers = [loop.spawn(loop.sleep(3 * n), "helper") for n in range(5)]

        async def step(kind, number, ends):
            if kind == "sleep":
                wakes = clock.now + number
                await loop.sleep(number)
                assert clock.now >= wakes
            elif kind == "readable":
                with socket_pair() as (one, other):
                    one.setblocking(False)
                    loop.spawn(send(other.dup(), number), "sends")
                    try:
                        await loop.readable(one.fileno())
                        assert one.recv(1) == b"x"
                    finally:
                        loop.forget(one.fileno())
            elif kind == "event":
                await event.wait()
                assert event.is_set
            elif kind == "work":
                assert await loop.work(lambda: number * 2) == number * 2
            elif kind == "join":
                await helpers[number].join()
                assert helpers[number].done
            elif kind == "slots":
                async with slots:
                    await loop.sleep(number)
            else:
                await loop.turn()

        async def send(other, number):
            with other:
                await loop.sleep(number)
                with contextlib.suppress(OSError):
                    other.send(b"x")

        async def follow(program):
            for kind, number, seconds in program:
                if seconds is None:
                    await step(kind, number, None)
                    continue
                ends = clock.now + seconds
                try:
                    with loop.deadline(seconds):
                        await step(kind, number, ends)
                except Expired:
                    assert clock.now >= ends
            return "ended"

        tasks = [loop.spawn(follow(program), "follows") for program in programs]
        for now in range(20):
            for when, which in cancellations:
                if when == now and which < len(tasks):
                    tasks[which].cancel()
            clock.now += pace[now]
            await loop.turn()
        event.set()
        for _ in range(20_000):
            if all(task.done for task in tasks):
                break
            clock.now += 1
            time.sleep(0.0001)  # for the threads
            await loop.turn()
        for task in tasks:
            result = await outcome(task)
            assert result == "ended" or isinstance(result, Cancelled), result
        assert await enter_all(loop, slots, 3) == 2

    run(main, FakeClock())


# --- Programs -----------------------------------------------------------------------------

PYTHON = sys.executable


def in_programs(call, crashes=None):
    async def main(loop):
        return await call(loop, chasquid.Programs(loop))

    return run(main, crashes=crashes)


def test_a_program_gets_its_input_and_tells_its_output_and_status():
    async def call(loop, programs):
        return await programs.run(["sh", "-c", "cat; echo bad >&2; exit 3"], [b"a", b"b"], 20)

    assert in_programs(call) == chasquid.Outcome(3, b"ab", b"bad\n")


def test_a_program_may_get_more_than_a_pipe_holds_and_print_as_it_reads():
    data = os.urandom(300_000)

    async def call(loop, programs):
        return await programs.run(["sh", "-c", "cat | wc -c"], [data] * 3, 20)

    assert in_programs(call).output.split() == [b"900000"]


def test_a_program_need_not_read_its_input():
    async def call(loop, programs):
        return await programs.run(["true"], [b"x" * 1_000_000], 20)

    assert in_programs(call).status == 0


def test_a_signal_is_a_negative_status():
    async def call(loop, programs):
        return await programs.run(["sh", "-c", "kill -9 $$"], [], 20)

    assert in_programs(call).status == -signal.SIGKILL


def test_what_is_kept_of_the_output_is_limited_and_the_program_not_blocked():
    async def call(loop, programs):
        return await programs.run(["head", "-c", "1000000", "/dev/zero"], [], 20)

    done = in_programs(call)
    assert done.status == 0
    assert len(done.output) == chasquid.PROGRAM_OUTPUT_LIMIT


def test_the_environment_and_the_directory_are_what_was_given(tmp_path):
    async def call(loop, programs):
        return await programs.run(
            ["/bin/sh", "-c", "pwd; echo $COLOUR"], [], 20, {"COLOUR": "red"}, str(tmp_path)
        )

    assert in_programs(call).output.decode().split() == [str(tmp_path), "red"]


def test_a_program_that_does_not_exist_is_an_error_of_the_system():
    async def call(loop, programs):
        with pytest.raises(FileNotFoundError):
            await programs.run(["/nonexistent/program"], [], 20)
        return True

    assert in_programs(call)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_program_over_its_time_is_killed_with_its_children(tmp_path):
    async def main(loop):
        pids = tmp_path / "pids"
        script = f"sleep 600 & echo $$ $! > {pids}; wait"
        programs = chasquid.Programs(loop)
        task = loop.spawn(programs.run(["sh", "-c", script], [], 30), "runs")
        while not (pids.exists() and pids.read_text().endswith("\n")):
            time.sleep(0.001)
            await loop.turn()
        assert not task.done
        loop.clock.now += 31
        assert isinstance(await outcome(task), Expired)
        return [int(pid) for pid in pids.read_text().split()]

    numbers = run(main, FakeClock())
    assert len(numbers) == 2
    for _ in range(3000):
        if all(gone(pid) for pid in numbers):
            return
        time.sleep(0.01)
    raise AssertionError("a child is still there")


def test_a_program_is_killed_when_its_task_is_cancelled(tmp_path):
    async def call(loop, programs):
        pids = tmp_path / "pids"
        task = loop.spawn(
            programs.run(["sh", "-c", f"echo $$ > {pids}; exec sleep 600"], [], 60), "runs"
        )
        await until(loop, lambda: pids.exists() and pids.read_text().endswith("\n"))
        task.cancel()
        assert isinstance(await outcome(task), Cancelled)
        return gone(int(pids.read_text()))

    assert in_programs(call)


def test_cancelling_in_the_middle_of_output_and_input_is_no_crash():
    async def call(loop, programs):
        for _ in range(5):
            chunks = [b"y\n" * 1000] * 1000
            task = loop.spawn(programs.run(["sh", "-c", "cat; exec sleep 60"], chunks, 60), "runs")
            await loop.sleep(0.02)
            task.cancel()
            assert isinstance(await outcome(task), Cancelled)
            await turns(loop)

    crashes = []
    in_programs(call, crashes)
    assert crashes == []


@pytest.mark.parametrize("octets", [0, 140_000, 3_000_000])
def test_a_program_reads_a_file_that_is_complete(octets):
    """So that it never takes a half for the whole, if we die while it reads."""
    script = "import os, stat, sys; s = os.fstat(0); print(stat.S_ISREG(s.st_mode), s.st_size)"

    async def call(loop, programs):
        chunks = [b"x" * 1000] * (octets // 1000)
        return await programs.run([sys.executable, "-I", "-S", "-c", script], chunks, 25)

    assert in_programs(call) == chasquid.Outcome(0, f"True {octets}\n".encode(), b"")


def test_the_timers_of_tasks_that_have_ended_hold_no_memory():
    async def main(loop):
        async def short():
            with loop.deadline(3600):
                await loop.sleep(0)

        for _ in range(20):
            tasks = [loop.spawn(short(), "short") for _ in range(100)]
            for task in tasks:
                await task.join()
        return len(loop._timers)

    assert run(main, FakeClock()) < 300


def test_timers_of_others_fire_when_the_heap_was_made_anew():
    async def main(loop):
        async def ends():
            with loop.deadline(3600):
                await loop.sleep(0)

        async def late():
            try:
                with loop.deadline(5):
                    await chasquid.Event(loop).wait()
            except Expired:
                return loop.clock.now

        waiting = [loop.spawn(late(), "late") for _ in range(10)]
        for _ in range(1000):
            await loop.spawn(ends(), "ends").join()
        loop.clock.now += 6
        return [await task.join() for task in waiting]

    assert len(run(main, FakeClock())) == 10


def test_a_child_that_keeps_the_pipes_open_does_not_hold_up_the_end():
    async def call(loop, programs):
        began = time.monotonic()
        done = await programs.run(["sh", "-c", "echo out; sleep 30 & exit 0"], [], 25)
        assert time.monotonic() - began < 20
        return done

    assert in_programs(call) == chasquid.Outcome(0, b"out\n", b"")


def test_programs_leave_no_descriptor_open():
    async def call(loop, programs):
        await programs.run(["true"], [], 20)
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            await programs.run(["echo", "x"], [b"y"], 20)
            with pytest.raises(FileNotFoundError):
                await programs.run(["/nonexistent/program"], [], 20)
        return before, len(os.listdir("/dev/fd"))

    before, after = in_programs(call)
    assert before == after


# --- Workers ------------------------------------------------------------------------------


class Results:
    """Collects what workers report; `wait` blocks until so many came."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, BaseException | None, str]] = []
        self._came = threading.Semaphore(0)

    def done(self, result: object, error: BaseException | None) -> None:
        self.seen.append((result, error, threading.current_thread().name))
        self._came.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self._came.acquire(timeout=60)


def test_each_job_is_done_once_and_reported_once():
    workers, results = chasquid.Workers(4), Results()
    for number in range(500):
        workers.submit(lambda number=number: number * 2, results.done)
    results.wait(500)
    workers.close()
    assert sorted(result for result, _, _ in results.seen) == [n * 2 for n in range(500)]


def test_a_job_that_fails_reports_its_error_and_costs_no_thread():
    workers, results = chasquid.Workers(1), Results()

    def fail() -> None:
        raise SystemExit("no")

    workers.submit(fail, results.done)
    workers.submit(lambda: "after", results.done)
    results.wait(2)
    workers.close()
    assert isinstance(results.seen[0][1], SystemExit)
    assert results.seen[1][:2] == ("after", None)


def test_there_are_never_more_threads_than_agreed_and_none_before_the_first_job():
    before = threading.active_count()
    workers, results = chasquid.Workers(3, "few"), Results()
    assert threading.active_count() == before
    barrier = threading.Barrier(3)
    for _ in range(3):
        workers.submit(lambda: barrier.wait(60), results.done)  # all three at the same time
    for _ in range(30):
        workers.submit(lambda: None, results.done)
    results.wait(33)
    assert {name for _, _, name in results.seen} == {"few-0", "few-1", "few-2"}
    workers.close()
    assert threading.active_count() == before


def test_closing_waits_for_what_was_submitted():
    workers, results = chasquid.Workers(2), Results()
    gate = threading.Event()
    for number in range(20):
        workers.submit(lambda number=number: gate.wait(60) and number, results.done)
    threading.Timer(0.02, gate.set).start()
    workers.close()
    assert sorted(result for result, _, _ in results.seen) == list(range(20))


def test_a_thread_that_waits_keeps_nothing_of_its_last_job_alive():
    class Message:
        pass

    workers, results = chasquid.Workers(1), Results()
    message = Message()
    watched = weakref.ref(message)
    workers.submit(lambda message=message: None, results.done)
    del message
    workers.submit(lambda: None, results.done)  # begins only when the first job is over
    results.wait(2)
    workers.close()
    assert watched() is None


def test_a_thread_that_cannot_be_started_is_told_and_the_rest_goes_on():
    code = """if True:
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        import chasquid
        workers, came = chasquid.Workers(2), threading.Semaphore(0)
        done = lambda result, error: came.release()
        workers.submit(lambda: 1, done)
        assert came.acquire(timeout=60)
        threading.stack_size(1 << 46)  # more than there is: the next thread cannot start
        workers.submit(lambda: 2, done)  # one thread is there, and does it
        assert came.acquire(timeout=60)
        workers.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODULE.parent)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr.decode()[-300:]) == (0, "")
