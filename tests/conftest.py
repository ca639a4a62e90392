# SPDX-License-Identifier: Apache-2.0
"""Makes the module importable from the tests, and starts servers for them."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import CommandLine, Server  # it imports the module

import chasquid

# Each program that a test starts would compile the module for itself, which takes longer than the
# rest of its start; and each process of the tests would compile all tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even read a directory of tests none of which is asked for."""
    words = config.option.markexpr.split(" and ")
    return f"not {collection_path.name}" in words or None


def pytest_collection_finish() -> None:
    """Spare the collector what stays until the end, or it would walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_synced() -> Iterator[None]:
    """Have the calls that sync do nothing but look at their file: no power is cut here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: os.fstat(fd) and None)
        patch.setattr(os, "sync", lambda: None)
        yield


@pytest.fixture
def cheap_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have new passwords cost next to nothing, where the costs are not what a test is about."""

    def new_password(password: bytes) -> chasquid.Scrypt:
        salt = os.urandom(11).hex().encode()
        costs = chasquid.Scrypt(1, 8, 1, key_length=32, salt=salt, encrypted=b"")
        encrypted = chasquid._derive(costs, chasquid._composed(password))
        return costs._replace(encrypted=encrypted)

    monkeypatch.setattr(chasquid, "new_password", new_password)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server for this test: `server = serve(max_queue_items=1)`."""
    with contextlib.ExitStack() as stack:
        count = 0

        def serve(**keywords: Any) -> Server:
            nonlocal count
            count += 1
            return stack.enter_context(Server(tmp_path / f"server-{count}", **keywords))

        yield serve


@pytest.fixture
def commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start a server behind a proxy: it expects the PROXY header. `flags` are set to true."""
    with contextlib.ExitStack() as stack:

        def behind(*flags: str, **keywords: Any) -> Server:
            server = Server(tmp_path / "behind", **keywords)
            with (server.config_dir / "chasquid.conf").open("a") as file:
                for flag in ("haproxy_incoming", *flags):
                    file.write(f"{flag}: true\n")
            return stack.enter_context(server)

        yield behind


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a failed login answered at once, where the pause is not what a test is about."""
    monkeypatch.setattr(chasquid, "_AUTH_SECONDS", 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the probes wait for a short time only, where nobody will answer."""
    monkeypatch.setattr(chasquid, "_PROBE_TRIES", (0.1, 0.2))
    monkeypatch.setattr(chasquid, "_TALK_SECONDS", 0.2)


@pytest.fixture
def untrusting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no certificate be valid, whatever this machine trusts, if a test does not say so."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
