# SPDX-License-Identifier: Apache-2.0
"""Starts what a test needs, stops it, and shows the logs of all of it where a test fails."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from .peers import NameServer
from .server import Chasquid

P = TypeVar("P")

_RUNNING = pytest.StashKey[list[Any]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for peer in item.stash.get(_RUNNING, []):
            report.sections.append((f"log of {peer.name}", peer.log()[-8000:]))
    return report


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that programs under other users may enter, with a short name."""
    with tempfile.TemporaryDirectory(prefix="chasquid-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def start(request: pytest.FixtureRequest, place: Path) -> Iterator[Callable[..., Any]]:
    """Start a peer for this test: `postfix = start(Postfix, relay_port=2525)`."""
    running = request.node.stash.setdefault(_RUNNING, [])
    with contextlib.ExitStack() as stack:

        def start(kind: Callable[..., P], *arguments: object, **keywords: object) -> P:
            directory = place / f"{kind.__name__.lower()}-{len(running) + 1}"
            peer = kind(directory, *arguments, **keywords)
            running.append(peer)
            return stack.enter_context(peer)  # type: ignore[arg-type]

        yield start


@pytest.fixture
def names(request: pytest.FixtureRequest) -> Iterator[NameServer]:
    """The name server that chasquid asks; it knows nothing but what a test writes."""
    with NameServer() as server:
        request.node.stash.setdefault(_RUNNING, []).append(server)
        yield server


@pytest.fixture
def chasquid(start: Callable[..., Any], names: NameServer) -> Chasquid:
    """A server for here.example with the users ana and bob, as it comes by default."""
    users = {"ana@here.example": "secret", "bob@here.example": "hidden"}
    return start(Chasquid, names, users=users)
