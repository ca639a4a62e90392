# SPDX-License-Identifier: Apache-2.0
"""Room PYTEST: the plugin as pytest finds it, by an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import chasquid

MODULE = Path(chasquid.__file__).resolve()
OPTIONS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # which cost time
SEND = """
    import smtplib

    def send(server, to="ana@here.example"):
        with smtplib.SMTP(*server.address, timeout=20) as smtp:
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
        (self.directory / "pytest.ini").write_text(f"[pytest]\n{textwrap.dedent(ini)}\n")
        code = "from helper import send\n\n" + textwrap.dedent(test)
        (self.directory / "test_it.py").write_text(code)
        paths = [self.directory / "site", MODULE.parent, self.directory]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        command = [sys.executable, "-m", "pytest", "-q", *OPTIONS, *arguments]
        return subprocess.Popen(
            command, cwd=self.directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, test: str, ini: str = "", *arguments: str) -> tuple[int, str]:
        process = self.begin(test, ini, *arguments)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


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
    _, output = project.run("def test_it(): pass", "", "--help")
    for name in ("hostname", "port", "login", "timeout", "size_limit", "magic"):
        assert f"mail_server_{name}" in output
    _, output = project.run("def test_it(): pass", "", "--fixtures")
    for name in ("mail_server", "secure_mail_server", "mail_server_factory"):
        assert f"\n{name} " in output or f"\n{name}\n" in output
    assert "no docstring available" not in output.split("mail_server_factory")[1][:300]


MISTAKES = [
    "mail_server_port = many",
    "mail_server_timeout = soon",
    "mail_server_size_limit = 0",
    "mail_server_magic = perhaps",
    "mail_server_login = ana",
    "mail_server_hostname = 256.1.1.1",
]


def test_a_mistake_in_an_option_is_a_usage_error(tmp_path: Path) -> None:
    """All of them are tried at once, since each takes a process."""
    processes = []
    for number, ini in enumerate(MISTAKES):
        project = Project(tmp_path / str(number))
        processes.append((ini, project.begin("def test_it(mail_server): pass", ini, "--tb=native")))
    outputs = [(ini, process.communicate(timeout=60)[0]) for ini, process in processes]
    for (ini, output), (_, process) in zip(outputs, processes, strict=True):
        assert process.returncode == 4, output
        assert ini.split(" ")[0] in output and "Traceback" not in output


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
