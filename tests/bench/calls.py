# SPDX-License-Identifier: Apache-2.0
"""How many functions a server calls for a message: a measure that no other load disturbs.

    python -m tests.bench.calls [--messages 20] [--functions 40]

A message of 5 kB comes from outside into a Maildir, or from a user who has logged in to
another one here, over a session that stays open; the server is warm. What counts is each call
that the interpreter makes, of Python's functions and of C's, by the thread of the loop, whose
time is what limits a server, and by the threads that work for it. `tests/test_calls.py` holds
the counts.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it

from support import Server, Wire, greeted, logged_in, wait_for

WARM = 5  # messages before the count
BODY = ("x" * 76 + "\r\n") * 62
HEADER = (
    "From: {sender}\r\nTo: {recipient}\r\nDate: Fri, 27 Nov 2026 08:00:00 +0000\r\n"
    "Message-Id: <1.2.3@client.example>\r\nSubject: hello\r\n\r\n"
)


class Calls(NamedTuple):
    """The calls for each message: by the loop's thread, by the others, and of what."""

    python: float  # functions of Python's, by the loop's thread
    all: float  # the same with those of C's
    others: float  # all by other threads
    functions: collections.Counter[str]  # all by the loop's thread, of all messages


class Counter:
    """Counts the calls of threads that start within its context, while it is told to."""

    def __init__(self) -> None:
        self.counting = False
        self.others = 0
        self.functions: collections.Counter[tuple[str, str]] = collections.Counter()

    def __enter__(self) -> Counter:
        threading.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)  # type: ignore[arg-type]

    def _note(self, frame: types.FrameType, event: str, called: object) -> None:
        if not self.counting or event not in ("call", "c_call"):
            return
        if threading.current_thread().name != "server":
            self.others += 1
            return
        code = frame.f_code
        place = f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"
        name = getattr(called, "__qualname__", "")
        self.functions[event, place if event == "call" else f"    {name}, by {place}"] += 1


def send(wire: Wire, sender: str, recipient: str) -> None:
    """Send one message over a session that is past EHLO."""
    for line in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>"):
        assert wire.ask(line).startswith("250 ")
    assert wire.ask("DATA").startswith("354 ")
    data = HEADER.format(sender=sender, recipient=recipient) + BODY
    wire.send(data.encode() + b".\r\n")
    assert wire.reply().startswith("250 ")


def measure(
    directory: Path, session: Callable[[Server], Wire], sender: str, messages: int = 20
) -> Calls:
    """Return the calls for messages from `sender`, over what `session` opens."""
    with Counter() as counter, Server(directory) as server:
        new = server.maildir("ben") / "new"
        wait_for(lambda: "event=ready" in server.log, "all to be loaded")
        with session(server) as wire:
            for number in range(messages + WARM):
                counter.counting = number >= WARM
                send(wire, sender, "ben@here.example")
                wait_for(lambda: not server.queued(), "the queue to become empty")
            server.settle()
            counter.counting = False
            assert len(list(new.iterdir())) == messages + WARM
    python = sum(count for (event, _), count in counter.functions.items() if event == "call")
    functions: collections.Counter[str] = collections.Counter()
    for (_, place), count in counter.functions.items():
        functions[place] += count
    return Calls(
        python / messages, functions.total() / messages, counter.others / messages, functions
    )


def from_outside(directory: Path, messages: int = 20) -> Calls:
    """Return the calls for messages from elsewhere."""
    return measure(directory, greeted, "eva@there.example", messages)


def submission(directory: Path, messages: int = 20) -> Calls:
    """Return the calls for messages of a user."""
    return measure(directory, logged_in, "ana@here.example", messages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20)
    parser.add_argument("--functions", type=int, default=0, help="show so many functions")
    arguments = parser.parse_args()
    for what in (from_outside, submission):
        with tempfile.TemporaryDirectory() as directory:
            calls = what(Path(directory), arguments.messages)
        all = f"{calls.python:.0f} of Python's functions, {calls.all:.0f} with those of C's"
        print(f"{what.__name__:13} {all}, by the loop; {calls.others:.0f} by other threads")
        for place, count in calls.functions.most_common(arguments.functions):
            print(f"{count / arguments.messages:8.1f}  {place}")


if __name__ == "__main__":
    main()
