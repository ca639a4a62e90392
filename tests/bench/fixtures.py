# SPDX-License-Identifier: Apache-2.0
"""CaptureServer as a test fixture next to those of aiosmtpd and smtpdfix, in turn: time.

    python -m tests.bench.fixtures [--tests 100] [--rounds 5]

A test starts a server, sends one message with smtplib, looks at its subject, and stops the
server. Each measurement has a process of its own, and each peer is used as its manual says:

    chasquid   CaptureServer, and the fixture mail_server
    aiosmtpd   Controller with a handler that collects messages, and six lines of fixture
    smtpdfix   SMTPDFix, and the fixture smtpd

With STARTTLS, clients log in. aiosmtpd is handed a context with a certificate, once;
smtpdfix makes a certificate before the clock starts, as its fixture does once in a process;
chasquid makes its own at the first server. How many messages a second are captured, a client
in a process of its own finds out, over a plain socket, with ten times as many messages as
there are tests; to look at all their subjects counts too, for some parse a message only then.
A whole process of pytest counts with all of that, and "without a server" is what pytest takes
for as many empty tests. Only the ratios mean anything: a machine is never as quiet as it seems.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import py_compile
import smtplib
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
PEERS = ("chasquid", "aiosmtpd", "smtpdfix")
HOST = "127.0.0.1"
SUBJECT = "Your order"
MESSAGE = (
    f"From: shop@here.example\r\nTo: ana@here.example\r\nSubject: {SUBJECT}\r\n\r\nThanks.\r\n"
)

# A fixture gives the address of its server, and how to get at the messages.
Fixture = AbstractContextManager[tuple[str, int, Callable[[], Any]]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# --- the three, each as a test would have it ---


def chasquid_fixture(tls: bool, certificate: Path) -> Callable[[], Fixture]:
    import chasquid

    settings: dict[str, Any] = {"tls": "starttls", "login_required": True} if tls else {}

    @contextmanager
    def fixture() -> Any:
        with chasquid.CaptureServer(**settings) as server:
            yield server.hostname, server.port, lambda: server.messages

    if tls:
        with chasquid.CaptureServer(**settings) as server:
            certificate.write_bytes(Path(server.certificate).read_bytes())
    return fixture


def aiosmtpd_fixture(tls: bool, certificate: Path) -> Callable[[], Fixture]:
    from email import message_from_bytes
    from email.policy import default

    from aiosmtpd.controller import Controller
    from aiosmtpd.smtp import AuthResult

    class Collector:
        def __init__(self) -> None:
            self.messages: list[Any] = []

        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            self.messages.append(message_from_bytes(envelope.content, policy=default))
            return "250 OK"

    def check(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=(data.login, data.password) == (b"user", b"password"))

    settings: dict[str, Any] = {}
    if tls:
        make_certificate(certificate)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        settings.update(tls_context=context, require_starttls=True)
        settings.update(authenticator=check, auth_required=True)

    @contextmanager
    def fixture() -> Any:
        handler = Collector()
        controller = Controller(handler, hostname=HOST, port=free_port(), **settings)
        controller.start()
        try:
            yield HOST, controller.port, lambda: handler.messages
        finally:
            controller.stop()

    return fixture


def make_certificate(path: Path) -> None:
    import chasquid

    path.write_text("".join(chasquid.self_signed_certificate(["localhost", HOST], time.time())))


def smtpdfix_fixture(tls: bool, certificate: Path) -> Callable[[], Fixture]:
    from smtpdfix import SMTPDFix
    from smtpdfix.certs import _generate_certs

    if tls:
        made, _ = _generate_certs(certificate.parent)
        made.rename(certificate)
        os.environ["SMTPD_SSL_CERTIFICATE_FILE"] = str(certificate)
        os.environ["SMTPD_USE_STARTTLS"] = os.environ["SMTPD_ENFORCE_AUTH"] = "true"

    @contextmanager
    def fixture() -> Any:
        with SMTPDFix(hostname=HOST) as server:
            yield server.hostname, server.port, lambda: server.messages

    return fixture


FIXTURES = {
    "chasquid": chasquid_fixture,
    "aiosmtpd": aiosmtpd_fixture,
    "smtpdfix": smtpdfix_fixture,
}


# --- what is measured, each in a process of its own ---


class Client:
    """The least that a client does: one command, one reply."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), 20)
        self._file = self._socket.makefile("rb")
        self._read("220")
        self.say("EHLO client.example", "250")

    def say(self, line: str, code: str) -> None:
        self._socket.sendall(f"{line}\r\n".encode())
        self._read(code)

    def _read(self, code: str) -> None:
        line = self._file.readline()
        while line[3:4] == b"-":
            line = self._file.readline()
        if line[:3] != code.encode():
            sys.exit(f"expected {code}, and the server said: {line!r}")

    def send(self) -> None:
        self.say("MAIL FROM:<shop@here.example>", "250")
        self.say("RCPT TO:<ana@here.example>", "250")
        self.say("DATA", "354")
        self.say(f"{MESSAGE}.", "250")

    def quit(self) -> None:
        self.say("QUIT", "221")
        self._file.close()
        self._socket.close()


def send_many(host: str, port: int, count: int, in_one_session: bool) -> float:
    """Return the seconds that it takes to send so many messages."""
    start = time.perf_counter()
    sessions, messages = (1, count) if in_one_session else (count, 1)
    for _ in range(sessions):
        client = Client(host, port)
        for _ in range(messages):
            client.send()
        client.quit()
    return time.perf_counter() - start


def capture_many(fixture: Callable[[], Fixture], count: int, kind: str) -> float:
    """Return the seconds that a message takes, of so many."""
    with fixture() as (host, port, messages):
        command = [sys.executable, "-m", "tests.bench.fixtures", "--send", kind, host, str(port)]
        seconds = float(run([*command, str(count)], HERE))
        start = time.perf_counter()
        subjects = [message["Subject"] for message in messages()]
        seconds += time.perf_counter() - start
    assert subjects == [SUBJECT] * count
    return seconds / count


def send(host: str, port: int, context: ssl.SSLContext | None) -> None:
    with smtplib.SMTP(host, port, timeout=20) as client:
        if context is not None:
            client.starttls(context=context)
            client.login("user", "password")
        client.sendmail("shop@here.example", ["ana@here.example"], MESSAGE)


def measure_here(kind: str, name: str, tests: int, directory: Path) -> float:
    """Return the seconds that one test takes."""
    tls = kind == "starttls"
    certificate = directory / "trusted.pem"
    begin = time.perf_counter()
    fixture = FIXTURES[name](tls, certificate)
    if kind in _RATES:
        return capture_many(fixture, 10 * tests, kind)
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(certificate)

    def test() -> None:
        with fixture() as (host, port, messages):
            if kind != "idle":
                send(host, port, context)
                [message] = messages()
                assert message["Subject"] == SUBJECT

    if kind == "first":
        test()
        return time.perf_counter() - begin
    test()  # loads what is needed, so that it counts for none
    start = time.perf_counter()
    for _ in range(tests):
        test()
    return (time.perf_counter() - start) / tests


def measure(kind: str, name: str, tests: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        if kind in ("pytest", "pytest -n 2"):
            return run_pytest(kind, name, tests, Path(directory))
        if kind == "import":
            module = {"chasquid": "chasquid", "aiosmtpd": "aiosmtpd.controller"}.get(name, name)
            code = f"import time; start = time.perf_counter(); import {module}; "
            command = [sys.executable, "-c", code + "print(time.perf_counter() - start)"]
        else:
            command = [sys.executable, "-m", "tests.bench.fixtures", "--tests", str(tests)]
            command += ["--measure", kind, name, directory]
        return float(run(command, Path(directory)))


def run(command: list[str], directory: Path, **environment: str) -> str:
    path = os.pathsep.join([str(HERE), str(directory), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=HERE if "tests.bench.fixtures" in command else directory,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# --- pytest ---

_TEST = """\
import smtplib

import pytest


@pytest.mark.parametrize("number", range({tests}))
def test_message({fixture}, number):
    with smtplib.SMTP({fixture}.hostname, {fixture}.port, timeout=20) as client:
        client.sendmail("shop@here.example", ["ana@here.example"], {message!r})
    [message] = {fixture}.messages
    assert message["Subject"] == {subject!r}
"""

_EMPTY_TEST = """\
import pytest


@pytest.mark.parametrize("number", range({tests}))
def test_nothing(number):
    pass
"""

# Has the plugin of the working tree loaded, installed or not.
_CHASQUID_PLUGIN = """\
from chasquid import pytest_plugin

for name in dir(pytest_plugin):
    if name.startswith("pytest_"):
        globals()[name] = getattr(pytest_plugin, name)
"""

_AIOSMTPD_PLUGIN = """\
import socket
from email import message_from_bytes
from email.policy import default

import pytest
from aiosmtpd.controller import Controller


class Collector:
    def __init__(self):
        self.messages = []

    async def handle_DATA(self, server, session, envelope):
        self.messages.append(message_from_bytes(envelope.content, policy=default))
        return "250 OK"


@pytest.fixture
def smtp_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    controller = Controller(Collector(), hostname="127.0.0.1", port=port)
    controller.messages = controller.handler.messages
    controller.start()
    yield controller
    controller.stop()
"""

_PLUGINS = {
    "chasquid": ("mail_server", "fixture_plugin", _CHASQUID_PLUGIN),
    "aiosmtpd": ("smtp_server", "fixture_plugin", _AIOSMTPD_PLUGIN),
    "smtpdfix": ("smtpd", "smtpdfix.fixture", ""),
}


def run_pytest(kind: str, name: str, tests: int, directory: Path) -> float:
    """Return the seconds of the whole process."""
    fixture, plugin, code = _PLUGINS.get(name, ("", "", ""))
    text = _TEST if fixture else _EMPTY_TEST
    told = {"tests": tests, "fixture": fixture, "message": MESSAGE, "subject": SUBJECT}
    (directory / "test_messages.py").write_text(text.format(**told))
    (directory / "fixture_plugin.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", plugin] if plugin else []
    command += ["-p", "xdist", "-n", "2"] if kind == "pytest -n 2" else []
    start = time.perf_counter()
    output = run(command, directory, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    seconds = time.perf_counter() - start
    if f"{tests} passed" not in output:
        sys.exit(f"pytest with {name} printed: {output}")
    return seconds


# --- in turn ---

_RATES = ("session", "sessions")
_ROWS = {
    "session": ("messages captured, all in one session", 0, "a second"),
    "sessions": ("messages captured, each in a session of its own", 0, "a second"),
    "import": ("import, in a new interpreter", 1000, "ms"),
    "first": ("import and a first test, where smtplib is loaded", 1000, "ms"),
    "idle": ("start and stop", 1000, "ms"),
    "plain": ("test without TLS", 1000, "ms"),
    "starttls": ("test with STARTTLS and login", 1000, "ms"),
    "pytest": ("pytest, whole process", 1, "s"),
    "pytest -n 2": ("pytest -n 2, whole process", 1, "s"),
}


def compare(tests: int, rounds: int, wanted: list[str]) -> None:
    names = [name for name in PEERS if is_there(name)]
    kinds = [kind for kind in wanted if kind != "pytest -n 2" or is_there("xdist")]
    times: dict[tuple[str, str], list[float]] = {}
    py_compile.compile(str(HERE / "chasquid.py"))  # as pip does with what it installs
    for number in range(rounds):
        for kind in kinds:
            all_names = [*names, ""] if kind.startswith("pytest") else names
            if number % 2:
                all_names = all_names[::-1]  # nobody is always the first
            for name in all_names:
                times.setdefault((kind, name), []).append(measure(kind, name, tests))
        print(f"round {number + 1} of {rounds} is done", file=sys.stderr, flush=True)
    print(
        f"{tests} tests, {rounds} rounds; median (range), and the ratio of the time to chasquid's\n"
    )
    for kind in kinds:
        title, factor, unit = _ROWS[kind]
        print(f"{title}:")
        for name in (*names, ""):
            if taken := times.get((kind, name)):
                own = times[kind, "chasquid"]
                ratios = [theirs / ours for theirs, ours in zip(taken, own, strict=True)]
                shown = spread([each * factor if factor else 1 / each for each in taken], unit)
                ratio = "" if name == "chasquid" else f"   {spread(ratios, 'times')}"
                print(f"  {name or 'without a server':16} {shown:32}{ratio}")


def is_there(name: str) -> bool:
    if importlib.util.find_spec(name) is not None:
        return True
    package = {"xdist": "pytest-xdist"}.get(name, name)
    print(f"{package} is not installed in {sys.prefix}, so it is left out: pip install {package}")
    return False


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=_ROWS, help="measure no more than these")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--send", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, name, directory = arguments.measure
        print(measure_here(kind, name, arguments.tests, Path(directory)))
    elif arguments.send:
        kind, host, port, count = arguments.send
        print(send_many(host, int(port), int(count), kind == "session"))
    else:
        compare(arguments.tests, arguments.rounds, arguments.only or list(_ROWS))
