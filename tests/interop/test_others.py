# SPDX-License-Identifier: Apache-2.0
"""Tests that others wrote, on the fixture: those of outgoing, aiosmtplib and smtpdfix.

They come in source distributions, of which nothing is kept here, and they are left as they are.
What they know as smtpdfix or aiosmtpd is a file of `stand_ins/`, with CaptureServer behind it.
`differ` says which tests of a suite fail, and why that is as it should be: a further one that
fails is found here, and one that passes after all is too. Those of Django are in test_django.py.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from .tools import make_environment, run, unavailable

TOP = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
README = (TOP / "README.md").read_text(encoding="utf-8")
TOOLS = ("pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-mock==3.17.0", "pytest-timeout==2.4.0",
         "hypothesis==6.170.17", "mailbits==0.2.3", "trustme==1.2.1", "django==5.2.19")  # fmt: skip


class Suite(NamedTuple):
    """The tests of a project, those that `options` choose.

    Of them `passing` pass, `skipped` are skipped by themselves, and `differ` fail, by their
    names with the reason.
    """

    name: str
    version: str
    sha256: str
    options: tuple[str, ...]
    passing: int
    skipped: int
    differ: Mapping[str, str]
    installed: bool = True


OUTGOING = Suite(
    "outgoing",
    "0.6.3",
    "b3700a6d2dc4429a7224089d1f7735e604e7a4f99e224638e420b7acd7256207",
    # addopts has them measure coverage; a warning of pytest-asyncio is an error to them
    ("-p", "smtpdfix", "-p", "no:asyncio", "-o", "addopts=", "test"),
    passing=207,
    skipped=1,
    differ={},
)

_TEXT = (
    "a reply has an enhanced status code (RFC 2034), and its text is another one than aiosmtpd's"
)
_HELP = "the text of HELP is another one than aiosmtpd's"
AIOSMTPLIB = Suite(
    "aiosmtplib",
    "5.1.3",
    "ac2b418d3260ba62d9cfd0fe7359726e9dc009a4e8e8d9909fdfae332f522a7c",
    # whether an address is refused before it is sent depends on Python's package email, and
    # before its repair these fail with any server
    ("-k", "not injection and not smuggle"),
    passing=375,
    skipped=0,
    differ={
        "test_rset_ok": _TEXT,
        "test_noop_ok": _TEXT,
        "test_mail_ok": _TEXT,
        "test_rcpt_ok": _TEXT,
        "test_data_ok": _TEXT,
        "test_help_ok": _HELP,
        "test_many_commands_with_gather": _HELP,
        "test_sendmail_with_rcpt_option": "NOTIFY is understood here (RFC 3461)",
    },
)

_PLAIN = "AUTH PLAIN has NUL between user and password (RFC 4616), not a blank"
_ORDER = "a command out of its order, or without its argument, is told just that, not 530"
SMTPDFIX = Suite(
    "smtpdfix",
    "0.5.3",
    "2ea49b22fe084c9cb92a52e56e8351c753c985eecf713c77f08516ec5e2e7fd0",
    # the others call methods of its own classes
    ("tests/test_fixture.py", "tests/test_smtpdfix.py", "tests/test_smtp.py",
     "-k", "not TestDefaultAuthenticator and not _socket and not starttls_"),
    passing=15,
    skipped=0,
    differ={
        "test_AUTH_PLAIN": _PLAIN,
        "test_AUTH_PLAIN_two_parts": _PLAIN,
        "test_AUTH_PLAIN_failure": _PLAIN,
        "test_AUTH_LOGIN_success": 'the prompt is "Password:", as in most servers, with the colon',
        "test_login_already_done": _TEXT,
        "test_mock_patch": _ORDER,
        "test_monkeypatch": _ORDER,
        "test_auth_first[DATA]": _ORDER,
        "test_auth_first[MAIL]": _ORDER,
        "test_auth_first[RCPT]": _ORDER,
    },
    installed=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("others") / "venv", *TOOLS)


def unpacked(suite: Suite, python: Path, place: Path) -> Path:
    """Fetch a source distribution, install it for its tests, and return its folder."""
    wishes = place / "requirements.txt"
    wishes.write_text(f"{suite.name}=={suite.version} --hash=sha256:{suite.sha256}\n")
    done = run(
        *[str(python), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"],
        *["--require-hashes", "-r", str(wishes), "-d", str(place)],
        check=False, seconds=300,
    )  # fmt: skip
    if done.returncode:
        unavailable(f"{suite.name} cannot be had: {done.stderr[-500:]}")
    root = f"{suite.name}-{suite.version}"
    with tarfile.open(place / f"{root}.tar.gz") as archive:
        archive.extractall(place, filter="data")
    if suite.installed:
        run(str(python), "-m", "pip", "install", "-q", str(place / root), seconds=300)
    else:
        for module in (place / root).glob(f"{suite.name}*"):
            shutil.rmtree(module)  # or it would come before what stands in for it
    return place / root


def run_tests(python: Path, source: Path, *options: str) -> tuple[str, dict[str, str]]:
    """Return what pytest printed, and how each test ended: passed, failed or skipped."""
    report = source / "report.xml"
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--timeout=60",
         f"--junitxml={report}", *options],
        cwd=source,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (STAND_INS, TOP)))},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert report.exists(), told[-4000:]
    endings = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        ending = kinds.pop() if kinds else "passed"
        endings[f"{case.get('classname')}::{case.get('name')}"] = ending
    return told, endings


FAILURES = ("failure", "error")


def check(suite: Suite, python: Path, source: Path) -> None:
    """The tests that differ fail, and all others pass."""
    told, endings = run_tests(python, source, *suite.options)
    failing = {name.rpartition("::")[2] for name, end in endings.items() if end in FAILURES}
    assert failing == set(suite.differ), told[-8000:]
    counts = collections.Counter(endings.values())
    assert (counts["passed"], counts["skipped"]) == (suite.passing, suite.skipped), told[-2000:]


@pytest.mark.parametrize("suite", [OUTGOING, SMTPDFIX], ids=lambda suite: suite.name)
def test_who_uses_smtpdfix(python, tmp_path, suite):
    check(suite, python, unpacked(suite, python, tmp_path))


def test_aiosmtplib_which_uses_aiosmtpd(python, tmp_path):
    source = unpacked(AIOSMTPLIB, python, tmp_path)
    (source / "tests/conftest.py").rename(source / "tests/theirs.py")
    shutil.copy(STAND_INS / "aiosmtplib_conftest.py", source / "tests/conftest.py")
    check(AIOSMTPLIB, python, source)


# --- the examples of README.md ---


def example(word: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return block


def test_the_example_with_aiosmtplib(python, tmp_path):
    run(str(python), "-m", "pip", "install", "-q", f"aiosmtplib=={AIOSMTPLIB.version}")
    (tmp_path / "test_example.py").write_text(example("aiosmtplib"))
    told, endings = run_tests(python, tmp_path)
    assert list(endings.values()) == ["passed"], told


def test_the_example_with_django(python, tmp_path):
    (tmp_path / "settings.py").write_text('SECRET_KEY = "x"\n')
    (tmp_path / "test_example.py").write_text(example("django"))
    done = subprocess.run(
        [python, "-m", "django", "test", "--settings=settings"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, TOP)))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Ran 1 test" in done.stderr and "OK" in done.stderr, done.stdout + done.stderr
