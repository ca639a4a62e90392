# SPDX-License-Identifier: Apache-2.0
"""What the tests of the lower rooms share: the module, a loop to run in, a clock by hand."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "chasquid.py"
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

import chasquid  # noqa: E402

T = TypeVar("T")

#: How the properties are searched: no limit of time, since the machine may be busy.
searched = settings(
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
searched_briefly = settings(searched, max_examples=30)


class HandClock(chasquid.Clock):
    """A clock that stands still until somebody moves it."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def run(
    main: Callable[[Any], Coroutine[Any, Any, T]],
    clock: chasquid.Clock | None = None,
    crashes: list[tuple[str, BaseException]] | None = None,
    threads: int = 2,
) -> T:
    """Run `main(loop)` on a loop of its own; no task may fail unseen without `crashes`."""
    seen = [] if crashes is None else crashes
    workers = chasquid.Workers(threads)
    loop = chasquid.Loop(
        clock or chasquid.Clock(), workers, lambda name, error: seen.append((name, error))
    )
    try:
        return loop.run(main(loop))
    finally:
        workers.close()
        assert crashes is not None or seen == []


async def turns(loop: Any, count: int = 5) -> None:
    """Let everything that can go on go on; the clock does not move."""
    for _ in range(count):
        await loop.turn()


@contextlib.contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """Cut `data` at `places`, taken modulo its length."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in zip(edges, edges[1:], strict=False)]
