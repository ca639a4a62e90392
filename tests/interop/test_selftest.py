# SPDX-License-Identifier: Apache-2.0
"""`selftest` as a user runs it; and that it finds out a server that lies."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import wait_for

import chasquid

from .server import PROGRAM
from .tools import run

pytestmark = pytest.mark.interop

#: Ways to break the server: what stands in the module, and what takes its place.
LIES = {
    "250 before the file has its name": (
        "                os.fsync(fd)\n            os.rename(self.temporary, self.path)\n",
        "                os.fsync(fd)\n            if os.urandom(1)[0] > 40:\n"
        "                os.rename(self.temporary, self.path)\n",
    ),
    "a file cut short": (
        "            write_all(fd, self.data)\n            if synced:\n"
        "                os.fsync(fd)\n            os.rename",
        "            cut = -1 if os.urandom(1)[0] < 40 else None\n"
        "            write_all(fd, self.data[:cut])\n            if synced:\n"
        "                os.fsync(fd)\n            os.rename",
    ),
    "what waits is forgotten at the start": (
        "            pause = file.changed - today\n",
        "            os.unlink(file.path)\n            pause = 0.0\n",
    ),
}


def selftest(program: str | Path, place: Path, rounds: int) -> subprocess.CompletedProcess[str]:
    words = ["selftest", "--rounds", str(rounds), "--seconds", "1.5", "--dir", str(place)]
    return run(sys.executable, str(program), *words, check=False)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    found = re.findall(r"^ *(\d+)  (.+)$", done.stdout, re.MULTILINE)
    return {what: int(count) for count, what in found}


def test_nothing_is_lost_in_ten_rounds(tmp_path):
    done = selftest(PROGRAM, tmp_path, 10)
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures(done)
    assert found["messages accepted with 250"] > 50
    assert found["kills"] >= 10
    assert found["lost"] == found["damaged"] == 0
    for words in ("delivered whole", "still in the queue", "reported to the sender"):
        assert sum(count for what, count in found.items() if words in what) > 0, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_found_out(tmp_path, lie):
    text = Path(chasquid.__file__).read_text(encoding="utf-8")
    truth, falsehood = LIES[lie]
    assert text.count(truth) == 1, "the module has changed, and this test must too"
    liar = tmp_path / "chasquid.py"
    liar.write_text(text.replace(truth, falsehood), encoding="utf-8")
    place = tmp_path / "place"
    place.mkdir()
    done = selftest(liar, place, 4)
    assert done.returncode == 1, done.stdout + done.stderr
    assert figures(done)["lost"] + figures(done)["damaged"] > 0
    [kept] = place.iterdir()
    assert str(kept) in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whoever_ends_it_ends_its_servers_too(tmp_path, number):
    words = ["selftest", "--rounds", "1000", "--dir", str(tmp_path)]
    test = subprocess.Popen([sys.executable, str(PROGRAM), *words], start_new_session=True)
    try:
        wait_for(lambda: list(tmp_path.glob("*/here/data/mail/here.test/ana/new/*")), "a message")
        assert processes_below(tmp_path)
        test.send_signal(number)
        assert test.wait(30) != 0
    finally:
        test.kill()
    assert not processes_below(tmp_path)
    assert not list(tmp_path.iterdir())


def processes_below(place: Path) -> list[str]:
    """Return the command lines of the servers whose configuration lies below `place`."""
    listed = run("ps", "-A", "-ww", "-o", "args=").stdout.splitlines()
    return [line for line in listed if f"--config-dir {place}" in line]
