# SPDX-License-Identifier: Apache-2.0
"""Room PYTEST: the plugin as pytest finds it, by an entry point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import MODULE

OPTIONS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # which cost time
SEND = """
    import smtplib

    def send(server, to="ana@here.example"):
        with smtplib.SMTP(*server.address, timeout=60) as smtp:
            smtp.sendmail("a@a.example", [to], "Subject: x\\r\\n\\r\\nx\\r\\n")
"""


class Project:
    """A directory with tests, at which pytest finds the plugin as if it were installed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        entry = tomllib.loads((MODULE.parent / "pyproject.toml").read_text())
        target = entry["project"]["entry-points"]["pytest11"]["chasquid"]
        info = directory / "site" / "chasquid_trial-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: chasquid-trial\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[pytest11]\nchasquid = {target}\n")
        (directory / "helper.py").write_text(textwrap.dedent(SEND))

    def begin(self, test: str, ini: str = "", *arguments: str) -> subprocess.Popen[str]:
        self.write(test, ini)
        return self._start("-m", "pytest", "-q", *OPTIONS, *arguments)

    def write(self, test: str, ini: str = "") -> None:
        (self.directory / "pytest.ini").write_text(f"[pytest]\n{textwrap.dedent(ini)}\n")
        code = "from helper import send\n\n" + textwrap.dedent(test)
        (self.directory / "test_it.py").write_text(code)

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        paths = [self.directory / "site", MODULE.parent, self.directory]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, test: str, ini: str = "", *arguments: str) -> tuple[int, str]:
        process = self.begin(test, ini, *arguments)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def run_each(self, *runs: Sequence[str]) -> list[tuple[int, str]]:
        """Run pytest several times in one process, whose start takes most of the time."""
        code = (
            "import pytest, sys\n"
            f"for arguments in {[[*OPTIONS, *run] for run in runs]!r}:\n"
            "    status = pytest.main(arguments)\n"
            "    print('STATUS', int(status), flush=True)\n"
        )
        output, _ = self._start("-c", code).communicate(timeout=60)
        ends = list(re.finditer(r"^STATUS (\d+)$", output, re.MULTILINE))
        starts = [0, *(end.end() for end in ends)]
        assert len(ends) == len(runs), output
        return [
            (int(end[1]), output[start : end.start()])
            for start, end in zip(starts, ends, strict=False)
        ]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_fixtures(project: Project) -> None:
    status, output = project.run(
        """
        import pytest, smtplib, threading

        @pytest.mark.parametrize("number", [1, 2])
        def test_each_test_has_its_own(mail_server, number):
            assert mail_server.messages == []
            send(mail_server)
            assert len(mail_server.wait_for(1)) == 1

        def test_two_in_one_test(mail_server, secure_mail_server):
            send(mail_server)
            assert secure_mail_server.messages == []
            with smtplib.SMTP(*secure_mail_server.address) as smtp:
                smtp.ehlo()
                assert smtp.mail("a@a")[0] == 530
                smtp.starttls(context=secure_mail_server.client_context())
                smtp.login(secure_mail_server.login, secure_mail_server.password)

        def test_servers_as_one_wants_them(mail_server_factory):
            one, two = mail_server_factory(size_limit=9), mail_server_factory(tls="starttls")
            assert one.settings.size_limit == 9 and one.port != two.port
            two.stop()

        def test_nothing_runs_any_more():
            names = [thread.name for thread in threading.enumerate()]
            assert not [name for name in names if name.startswith("chasquid")], names
        """,
        "",
        "-W",
        "error",
    )
    assert status == 0, output
    assert "5 passed" in output


def test_a_test_that_fails_shows_what_was_said(project: Project) -> None:
    status, output = project.run(
        """
        def test_good(mail_server):
            send(mail_server, "good@here.example")

        def test_bad(mail_server):
            send(mail_server, "bad@here.example")
            assert mail_server.messages == []
        """
    )
    assert status == 1
    assert "dialogue with <CaptureServer at 127.0.0.1:" in output
    assert "c: rcpt to:<bad@here.example>" in output.lower()  # smtplib differs by version
    assert "good@here.example" not in output


def test_the_options(project: Project) -> None:
    status, output = project.run(
        """
        import pytest, smtplib

        def test_it(mail_server, secure_mail_server):
            assert mail_server.hostname == "127.0.0.2"
            assert mail_server.settings.size_limit == 1234
            assert (secure_mail_server.login, secure_mail_server.password) == ("ana", "a:b")
            send(mail_server, "ana+450@here.example")
            with pytest.raises(AssertionError, match="waited 0.01 s in vain"):
                mail_server.wait_for(2)
        """,
        """
        mail_server_hostname = 127.0.0.2
        mail_server_login = ana:a:b
        mail_server_size_limit = 1234
        mail_server_timeout = 0.01
        mail_server_magic = no
        """,
    )
    assert status == 0, output


def test_the_options_are_listed(project: Project) -> None:
    project.write("def test_it(): pass")
    (_, options), (_, fixtures) = project.run_each(["--help"], ["-q", "--fixtures"])
    for name in ("hostname", "port", "login", "timeout", "size_limit", "magic"):
        assert f"mail_server_{name}" in options
    for name in ("mail_server", "secure_mail_server", "mail_server_factory"):
        assert f"\n{name} " in fixtures or f"\n{name}\n" in fixtures
    assert "no docstring available" not in fixtures.split("mail_server_factory")[1][:300]


MISTAKES = [
    "mail_server_port = many",
    "mail_server_timeout = soon",
    "mail_server_size_limit = 0",
    "mail_server_magic = perhaps",
    "mail_server_login = ana",
    "mail_server_hostname = 256.1.1.1",
]


def test_a_mistake_in_an_option_is_a_usage_error(project: Project) -> None:
    project.write("def test_it(mail_server): pass")
    runs = []
    for number, mistake in enumerate(MISTAKES):
        (project.directory / f"{number}.ini").write_text(f"[pytest]\n{mistake}\n")
        runs.append(["-q", "--tb=native", "-c", f"{number}.ini", "test_it.py"])
    for mistake, (status, output) in zip(MISTAKES, project.run_each(*runs), strict=True):
        assert status == 4, output
        assert mistake.split(" ")[0] in output and "Traceback" not in output


def test_processes_side_by_side(tmp_path: Path) -> None:
    test = """
        import pytest

        @pytest.mark.parametrize("number", range(10))
        def test_it(mail_server, number):
            send(mail_server)
            assert len(mail_server.wait_for(1)) == 1
    """
    processes = []
    for number in range(2):
        processes.append(Project(tmp_path / str(number)).begin(test))
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
