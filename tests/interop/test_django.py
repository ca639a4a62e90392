# SPDX-License-Identifier: Apache-2.0
"""Django's own tests of sending mail, with CaptureServer in the place of their server.

Django runs a Controller of aiosmtpd and looks at what its handler was given. The tests are
left as they are: a module that is called aiosmtpd comes first on the path, and its
Controller is a CaptureServer that hands the handler each message before it is accepted.

The tests come in the source distribution of Django, and nothing of it is kept here.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

import build_zipapp

from .tools import unavailable

HERE = Path(__file__).resolve().parents[2]
SECONDS = 300.0

DJANGO = build_zipapp.Package(
    "django",
    "5.2.19",
    "django-5.2.19.tar.gz",
    "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
    "",
    "LICENSE",
)
NEEDED = (
    build_zipapp.Package(
        "asgiref",
        "3.13.0",
        "asgiref-3.13.0-py3-none-any.whl",
        "f9596a2434512686473d50f96ff6207fbba49ae1a785dfac614df4aeb085674d",
        "",
        "LICENSE",
    ),
    build_zipapp.Package(
        "sqlparse",
        "0.6.1",
        "sqlparse-0.6.1-py3-none-any.whl",
        "3be5a72d04c873d690d7c6dedd33d6fae2ef82759881ceec02fc2efd0cba564f",
        "",
        "LICENSE",
    ),
)

# How many tests of this version need a server.
EXPECTED = {"SMTPBackendTests": 50, "SMTPBackendStoppedServerTests": 2}
ALL = 210  # with those of the other ways to send
SESSIONS, MESSAGES = 25, 19  # at least, in SMTPBackendTests

# Stands in for aiosmtpd.controller. FAULT is the reply to every message, if there is one.
STAND_IN = '''\
import json
import os
from types import SimpleNamespace

import chasquid


class Controller:
    def __init__(self, handler, hostname, port):
        self.handler, self.hostname, self.port = handler, hostname, port
        self.refused = []
        self.server = chasquid.CaptureServer(hostname, port, magic=False)
        if os.environ.get("FAULT"):
            self.server.fault("message", reply=os.environ["FAULT"])
        self.server.on_message(self.hand_over)

    def start(self):
        self.server.start()

    def stop(self):
        self.server.stop()
        said = {
            "sessions": len(self.server.transcripts),
            "messages": len(self.server.messages),
            "refused": self.refused,
            "log": [line for line in self.server.log if "error" in line],
        }
        with open(os.environ["REPORT"], "a") as report:
            report.write(json.dumps(said) + "\\n")

    def hand_over(self, message):
        """Give the handler what came, in the thread that is about to accept it."""
        envelope = SimpleNamespace(
            content=message.raw, mail_from=message.mail_from, rcpt_tos=message.rcpt_tos
        )
        handling = self.handler.handle_DATA(None, None, envelope)
        try:
            handling.send(None)
        except StopIteration as said:
            if said.value != "250 OK":
                self.refused.append(said.value)
'''


class Outcome(NamedTuple):
    """What Django's tests printed, how each one ended, and what each server said at its end."""

    text: str
    endings: dict[tuple[str, str], str]  # by class and test
    servers: list[dict[str, Any]]

    @property
    def failing(self) -> set[str]:
        return {name for (_, name), ending in self.endings.items() if ending != "ok"}


@functools.cache
def fetched() -> Path:
    """Return the folder with the packages. Raises build_zipapp.Unable without a network."""
    cache = build_zipapp.HERE / ".cache"
    # Django names its way to be built otherwise than the packages of the archive do.
    names = "\nprepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel\n"
    with mock.patch.object(build_zipapp, "STAND_IN", build_zipapp.STAND_IN + names):
        build_zipapp.fetch([DJANGO, *NEEDED], cache)
    return cache


@pytest.fixture(scope="module")
def django(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, without its documentation."""
    try:
        cache = fetched()
    except build_zipapp.Unable as error:
        unavailable(f"Django cannot be had: {error}")
    directory = tmp_path_factory.mktemp("django")
    root = f"{DJANGO.name}-{DJANGO.version}"
    wanted = (f"{root}/django/", f"{root}/tests/")
    with tarfile.open(cache / DJANGO.file) as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(directory, members, filter="data")
    stand_in = directory / "stand-in/aiosmtpd"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "controller.py").write_text(STAND_IN)
    return directory


def run_tests(django: Path, *labels: str, fault: str = "") -> Outcome:
    """Run tests of Django in a process of their own."""
    source = django / f"{DJANGO.name}-{DJANGO.version}"
    path = [django / "stand-in", HERE, source, *(fetched() / each.file for each in NEEDED)]
    report = django / "report"
    report.write_text("")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("DJANGO")},
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "REPORT": str(report),
        "FAULT": fault,
    }
    done = subprocess.run(
        [sys.executable, "runtests.py", "--parallel=1", "-v", "2", "--noinput", *labels],
        cwd=source / "tests",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    found = re.findall(
        r"^(test_\w+) \(mail\.tests\.(\w+)\.\1\)(?:\n[^\n]*?)?? \.\.\. (ok|FAIL|ERROR|skipped)",
        done.stdout,
        re.MULTILINE,
    )
    endings = {(kind, name): ending for name, kind, ending in found}
    servers = [json.loads(line) for line in report.read_text().splitlines()]
    return Outcome(done.stdout, endings, servers)


def test_djangos_tests_of_mail_pass(django):
    outcome = run_tests(django, "mail")
    assert f"Ran {ALL} tests in" in outcome.text, outcome.text[-4000:]
    assert "skipped" not in outcome.text
    ran = Counter(kind for kind, _ in outcome.endings)
    assert {kind: ran[kind] for kind in EXPECTED} == EXPECTED
    assert outcome.failing == set(), outcome.text[-8000:]
    assert outcome.text.rstrip().endswith("OK")


def test_their_messages_have_come_through_this_server(django):
    outcome = run_tests(django, "mail.tests.SMTPBackendTests")
    [server] = outcome.servers
    assert server["log"] == []
    assert server["sessions"] >= SESSIONS
    assert server["messages"] >= MESSAGES
    assert server["refused"] == []


def test_they_fail_where_the_server_refuses_the_messages(django):
    outcome = run_tests(django, "mail.tests.SMTPBackendTests", fault="554 5.6.0 no")
    assert "test_send" in outcome.failing, outcome.text[-4000:]
    assert "554, b'5.6.0 no'" in outcome.text
    [server] = outcome.servers
    assert server["messages"] == 0
