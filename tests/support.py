# SPDX-License-Identifier: Apache-2.0
"""What the tests stand on; each helper is here once.

Server        a real server in a thread, with a configuration directory of its own
Wire          the client's end of a connection
greeted, …    connections of clients that have said EHLO, or logged in; messages that they send
play          holds a dialogue that is written as text
Peer          a server in a thread that follows such a text
CommandLine   a configuration directory, and commands that use it
FakeClock     a clock that stands until it is moved
RunningClock  the real clock, which can be moved ahead
Inline        workers that work at once, so that a test takes the same way every time
run           runs a coroutine on a loop
is_quick      tells whether a call takes little of the processor's time
Zone          the answers of the DNS, from a table
FakeCourier   keeps what it is to deliver, and says what came of it
searched      how the properties are searched
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import os
import re
import shutil
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import hypothesis
import pytest
from hypothesis import strategies as st

import chasquid

T = TypeVar("T")
Serve = Callable[..., "Server"]  # the fixture: it starts a server for a test

MODULE = Path(chasquid.__file__).resolve()
PROGRAM = (sys.executable, str(Path(__file__).resolve().parent / "program.py"))
SECONDS = 60.0  # after which a test has waited long enough for anything
HOST = "mail.here.example"
MESSAGE = b"Subject: hello\r\n\r\nIt works.\r\n"
LETTER = b"From: eva@there.example\r\n" + MESSAGE
PLACES = st.lists(st.integers(0, 10_000), max_size=8)  # for `cuts`
HOUR = 3600.0
MEGABYTE = 1024 * 1024
DOWN = chasquid.TemporaryFailure("the name servers are down", "4.4.3")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
USERS = {"here.example": {"ana": "secret", "ben": "secret"}}


#: How the properties are searched: without a limit of time, since the machine may be busy, and
#: for the same each time, so that a test that begins to fail tells of a change. With EXPLORE=1 in
#: the environment it is something new each time.
hypothesis.settings.register_profile(
    "chasquid",
    deadline=None,
    database=None,
    derandomize=not os.environ.get("EXPLORE"),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("chasquid")
searched = hypothesis.settings(max_examples=100)
searched_briefly = hypothesis.settings(searched, max_examples=30)


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """Cut `data` at `places`, taken modulo its length."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def wait_for(condition: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
    """Return the first true value of `condition`; fail if it stays false."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}; seen: {value!r}"
        time.sleep(0.002)
    return value


def is_quick(call: Callable[[], object], seconds: float) -> bool:
    """Tell whether a call takes less than so much processor time of this thread, once in thrice.

    What the machine, other threads and the collector do meanwhile says nothing of the call.
    `seconds` is far above what it takes, and far below what a square of its length would take.
    """
    for _ in range(3):
        began = time.thread_time()
        call()
        if time.thread_time() - began < seconds:
            return True
    return False


# --- files ---


def users_file(users: Mapping[str, str]) -> bytes:
    """Return a users file whose hashes cost next to nothing."""
    salt = b"salt"
    return chasquid.format_users(
        {
            name: chasquid.Scrypt(
                1, 1, 1, 16, salt,
                hashlib.scrypt(password.encode(), salt=salt, n=2, r=1, p=1, dklen=16),
            )
            for name, password in users.items()
        }
    )  # fmt: skip


@functools.cache
def certificate(*names: str) -> tuple[str, str]:
    """Return a certificate for `names` and its key."""
    return chasquid.self_signed_certificate(names, time.time())


def write_certificate(directory: Path, *names: str) -> Path:
    """Write a certificate for `names` into `directory`; return the path of the chain."""
    directory.mkdir(parents=True, exist_ok=True)
    chain, key = certificate(*names)
    (directory / "fullchain.pem").write_text(chain)
    (directory / "privkey.pem").write_text(key)
    return directory / "fullchain.pem"


class Issued(NamedTuple):
    """A certificate and its key."""

    chain: str
    key: str

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.chain)


def issue(directory: Path, name: str, issuer: Issued | None = None) -> Issued:
    """Make a certificate for `name`; an authority if there is no `issuer`."""
    place = Path(directory) / f"{len(list(directory.iterdir()))}-{name}"
    place.mkdir()
    (place / "extensions").write_text(
        f"subjectAltName=DNS:{name}\nbasicConstraints=CA:FALSE\n"
        if issuer
        else "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\n"
    )
    run_openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", place / "key")
    run_openssl("req", "-new", "-key", place / "key", "-subj", f"/CN={name}", "-out", place / "csr")
    signing: list[object] = ["-signkey", place / "key"]
    if issuer is not None:
        (place / "ca").write_text(issuer.chain)
        (place / "ca-key").write_text(issuer.key)
        signing = ["-CA", place / "ca", "-CAkey", place / "ca-key", "-CAcreateserial"]
    run_openssl("x509", "-req", "-in", place / "csr", *signing, "-days", "2", "-out", place / "crt",
                "-extfile", place / "extensions")  # fmt: skip
    return Issued((place / "crt").read_text(), (place / "key").read_text())


def run_openssl(*arguments: object) -> None:
    command = ["openssl", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)


def trust(monkeypatch: pytest.MonkeyPatch, directory: Path, *names: str) -> None:
    """Let a certificate for `names`, which is written below `directory`, be the valid one."""
    chain = write_certificate(directory / "authority", *names)
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))


def trusting(certificate_file: Path | None = None) -> ssl.SSLContext:
    """Return a client's context that trusts this certificate alone, or whatever comes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate_file is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = True
        context.load_verify_locations(certificate_file)
    return context


def config_text(settings: Mapping[str, Any]) -> str:
    lines = []
    for key, value in settings.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            lines.append(f"{key}: {item if isinstance(item, int) else chasquid.quote(str(item))}")
    return "\n".join(lines) + "\n"


# --- commands ---


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def run_command(
    capsys: pytest.CaptureFixture[str], config_dir: Path, *arguments: str, data: bytes = b""
) -> Ended:
    """Run a command in this process, with `data` as its standard input."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            status = chasquid.main(["--config-dir", str(config_dir), *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    return Ended(status, *capsys.readouterr())


def complaint(ended: Ended) -> str:
    """Return the one line with which a command has failed; warnings may stand before it."""
    assert (ended.status, ended.out) == (1, ""), ended
    text = re.sub(r"^chasquid: warning: .*\n", "", ended.err, flags=re.MULTILINE)
    assert text.startswith("chasquid: ")
    assert text.count("\n") == 1 and text.endswith("\n")
    return text.removeprefix("chasquid: ").strip()


class CommandLine:
    """A configuration directory, and commands that use it."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config_dir = directory / "config"
        self.domain_dir = self.config_dir / "domains" / "here.example"
        self.data_dir = directory / "data"
        self._capsys = capsys
        self.configure()
        self.write("domains/here.example/users", users_file({"ana": "secret"}).decode())

    def configure(self, **settings: object) -> None:
        log = str(self.config_dir / "log")
        defaults = {"hostname": HOST, "data_dir": self.data_dir, "mail_log_path": log}
        self.write("chasquid.conf", config_text({**defaults, **settings}))

    def write(self, name: str, text: str) -> Path:
        path = self.config_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, *arguments: str, data: bytes = b"") -> Ended:
        return run_command(self._capsys, self.config_dir, *arguments, data=data)

    def fails(self, *arguments: str, data: bytes = b"") -> str:
        """Run a command that must fail with one line; return the line."""
        return complaint(self.run(*arguments, data=data))

    def users(self, domain: str = "here.example") -> dict[str, chasquid.Password]:
        return chasquid.load_users(str(self.config_dir / "domains" / domain))


# --- DNS ---


class Zone:
    """The answers to DNS questions, from a table of (name, kind) to records.

    A name that is not in the table does not exist; an exception in it is raised. `asked`
    holds the questions in the order in which they came. If the zone is `signed`, answers are
    authentic, but for the questions in `unsigned`. `aliases` says what some names stand for.
    """

    def __init__(
        self,
        table: Mapping[tuple[str, str], Sequence[str] | Exception],
        *,
        signed: bool = False,
        unsigned: Sequence[tuple[str, str]] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._table = table
        self._signed = signed
        self._unsigned = unsigned
        self._aliases = aliases or {}
        self.asked: list[tuple[str, str]] = []

    async def ask(self, name: str, kind: str) -> chasquid.Answer:
        self.asked.append((name, kind))
        found = self._table.get((name, kind))
        if isinstance(found, Exception):
            raise found
        return chasquid.Answer(
            any(known == name for known, _ in self._table),
            tuple(found or ()),
            300.0,
            authentic=self._signed and (name, kind) not in self._unsigned,
            canonical=self._aliases.get(name, "") if found else "",
        )


# --- a server ---


class Server:
    """A server in a thread, with a configuration directory below `directory`.

    `users` and `aliases` are by domain, `certificates` are names of hosts. Keywords that
    `Daemon` takes go there, all others into chasquid.conf.
    """

    _FOR_DAEMON = frozenset(
        "alone ask clock examine on_result random remote segment_size spawn".split()
    )

    def __init__(
        self,
        directory: Path,
        *,
        users: Mapping[str, Mapping[str, str]] = USERS,
        aliases: Mapping[str, str] | None = None,
        certificates: Iterable[str] = (HOST,),
        **keywords: Any,
    ) -> None:
        self.directory = directory
        self.config_dir = directory / "config"
        certificates = list(certificates)
        settings = {
            "hostname": HOST,
            "smtp_address": "127.0.0.1:0",
            "submission_address": "127.0.0.1:0",
            "submission_over_tls_address": "127.0.0.1:0",
            "data_dir": directory / "data",
            "mail_log_path": directory / "mail.log",
            "log_path": directory / "server.log",
            "reload_every": "1h",
        }
        self._daemon_keywords = {k: v for k, v in keywords.items() if k in self._FOR_DAEMON}
        self._daemon_keywords.setdefault("ask", Zone({}).ask)
        self._daemon_keywords.setdefault("segment_size", 128 * 1024)  # which is made sooner
        settings |= {k: v for k, v in keywords.items() if k not in self._FOR_DAEMON}
        for domain, names in users.items():
            self.write(f"domains/{domain}/users", users_file(names))
        for domain, text in (aliases or {}).items():
            self.write(f"domains/{domain}/aliases", text.encode())
        for name in certificates:
            write_certificate(self.config_dir / "certs" / name, name)
        self.write("chasquid.conf", config_text(settings).encode())
        self.data_dir = Path(str(settings["data_dir"]))
        self.daemon: chasquid.Daemon
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, name: str, data: bytes) -> Path:
        """Write a file of the configuration directory."""
        path = self.config_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def make(self) -> chasquid.Daemon:
        config = chasquid.load_config(str(self.config_dir))
        return chasquid.Daemon(config, **self._daemon_keywords)

    def start(self) -> None:
        path = self.directory / "server.log"
        self._log_start = len(self.log) if path.exists() else 0  # where that of this run begins
        self.daemon = self.make()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        turned = self._turns()
        wait_for(lambda: turned.is_set() or self._error, "the server to start")

    def _turns(self) -> threading.Event:
        """Return what is set when the loop has dealt with what it knows of now."""
        loop, turned = self.daemon.loop, threading.Event()

        async def turn() -> None:
            for _ in range(3):
                await loop.turn()
            turned.set()

        loop.post(lambda: loop.spawn(turn(), "turns"))
        return turned

    def wait_until_ready(self) -> None:
        """Wait until all is open that a server keeps open; mail is taken before."""
        wait_for(lambda: "event=ready" in self.log[self._log_start :], "the server to be ready")

    def stop(self) -> None:
        """Stop the server, and wait until it is down."""
        if self._thread is not None:
            self.daemon.stop()
            self.join()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the server did not stop"
        self._thread = None
        if self._error is not None:
            raise self._error

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.daemon.run()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert not self.daemon.log.counters["crashes",], self.log

    def settle(self) -> None:
        """Wait until the loop has dealt with what it was sent before."""
        assert self._turns().wait(SECONDS), "the loop does not turn"

    def port(self, name: str = "smtp") -> int:
        return next(number for port, _, number in self.daemon.addresses if port.name == name)

    def connect(self, port: str = "smtp") -> Wire:
        return Wire.to("127.0.0.1", self.port(port))

    def maildir(self, user: str, domain: str = "here.example") -> Path:
        return self.data_dir / "mail" / domain / user

    def mail(self, user: str, domain: str = "here.example") -> list[bytes]:
        """Return what is in the Maildir of a user, when the queue has become empty."""
        wait_for(lambda: not self.queued(), "the queue to become empty")
        new = self.maildir(user, domain).glob("new/*")
        paths = sorted(new, key=lambda path: path.stat().st_mtime_ns)
        return [path.read_bytes() for path in paths]

    def junk(self, user: str = "ana") -> list[bytes]:
        """Return what is in the folder Junk of a user, when the queue has become empty."""
        self.mail(user)
        return [path.read_bytes() for path in self.maildir(user).glob(".Junk/new/*")]

    def queued(self, *places: str) -> list[str]:
        """Return the files of the queue, as "new/NAME", each where it was seen last."""
        queue = self.data_dir / "queue"
        # in this order, so that a file that moves meanwhile is seen
        found = {
            path.name: f"{place}/{path.name}"
            for place in places or ("tmp", "new", "cur", "bad")
            for path in sorted((queue / place).iterdir())
        }
        return list(found.values())

    def wait_for_attempts(self, count: int = 1) -> None:
        """Wait until so many attempts are over after which a message goes on waiting.

        Then it is all written down, in the queue and in the log.
        """
        wait_for(lambda: self.mail_log.count("event=next-attempt ") >= count, "the attempts")

    @property
    def log(self) -> str:
        return (self.directory / "server.log").read_text()

    @property
    def mail_log(self) -> str:
        return (self.directory / "mail.log").read_text()


START_WITH_SOCKETS = """
import os, socket, sys
names = sys.argv[1].split(":")
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
print(*(socket.getsockname()[1] for socket in sockets), flush=True)
held = [os.dup2(socket.fileno(), 20 + number) for number, socket in enumerate(sockets)]
for number, fd in enumerate(held):
    os.dup2(fd, 3 + number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(names))
os.environ["LISTEN_FDNAMES"] = ":".join(names)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@contextlib.contextmanager
def started_by_systemd(
    server: Server, *names: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a process with sockets of these names, as systemd does; give it and their ports."""
    words = [sys.executable, "-c", START_WITH_SOCKETS, ":".join(names)]
    process = subprocess.Popen(
        [*words, *PROGRAM[1:], "--config-dir", server.config_dir, "serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        yield process, [int(word) for word in process.stdout.readline().split()]
    finally:
        process.kill()
        process.communicate()


# --- the client's end ---


class Wire:
    """The client's end of a connection, blocking. What was said is kept in `said`."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(SECONDS)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.said: list[str] = []
        self._in = b""

    @classmethod
    def to(cls, host: str, port: int) -> Wire:
        return cls(socket.create_connection((host, port), SECONDS))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.said.append(f"C= {data[:200]!r}")
        self.socket.sendall(data)

    def say(self, line: str) -> None:
        self.said.append(f"C: {line[:200]}")
        self.socket.sendall(line.encode() + b"\r\n")

    def line(self) -> str:
        """Return the next line; "" if the other side has closed."""
        while b"\r\n" not in self._in:
            data = self._receive()
            if not data:
                assert not self._in, f"half a line before the end: {self._in!r}"
                self.said.append("(closed)")
                return ""
            self._in += data
        line, _, self._in = self._in.partition(b"\r\n")
        self.said.append(f"S: {line.decode()}")
        return line.decode()

    def continues(self, line: str) -> bool:
        """Tell whether the line after `line` stands in the middle of the same reply."""
        while b"\r\n" not in self._in and (data := self._receive()):
            self._in += data
        return line[3:4] == "-" and self._in[3:4] == b"-"

    def reply(self) -> str:
        """Return the next reply, its lines joined by newlines."""
        lines = [self.line()]
        while lines[-1][3:4] == "-":
            lines.append(self.line())
        return "\n".join(lines)

    def ask(self, line: str) -> str:
        self.say(line)
        return self.reply()

    def is_closed(self) -> bool:
        """Tell whether the other side closes now, without another word."""
        return not self._in and not self._receive()

    def has_more(self) -> bool:
        """Tell whether something has come already that was not read."""
        self.socket.setblocking(False)
        try:
            return bool(self._in or self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self.socket.settimeout(SECONDS)

    def read_message(self) -> bytes:
        """Read what DATA transfers, up to the final dot, as it is on the wire."""
        data = bytearray()
        while not data.endswith(b"\r\n.\r\n") and data != b".\r\n":
            if not self._in:
                self._in = self._receive()
                assert self._in, f"closed within a message: {bytes(data[-80:])!r}"
            line, newline, self._in = self._in.partition(b"\n")
            data += line + newline
        return bytes(data)

    def start_tls(self, context: ssl.SSLContext, server_side: bool = False, name: str = "") -> None:
        assert not self._in, f"came before TLS: {self._in!r}"
        self.said.append("(TLS)")
        self.socket = context.wrap_socket(
            self.socket, server_side=server_side, server_hostname=name or None
        )

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            return b""


def greet(wire: Wire, hello: str = "client.example") -> Wire:
    """Read the greeting and say EHLO."""
    assert wire.reply().startswith("220 ")
    assert wire.ask(f"EHLO {hello}").startswith("250-")
    return wire


def greeted(server: Server, port: str = "smtp", hello: str = "client.example") -> Wire:
    """Return a connection that is past EHLO, with TLS on the port that has it from the start."""
    wire = server.connect(port)
    if port == "submission over TLS":
        wire.start_tls(trusting())
    return greet(wire, hello)


def greeted_with_tls(server: Server) -> Wire:
    """Return a connection to the port smtp that is past STARTTLS and EHLO."""
    wire = greeted(server)
    assert wire.ask("STARTTLS").startswith("220 ")
    wire.start_tls(trusting())
    assert wire.ask("EHLO client.example").startswith("250-")
    return wire


def plain_secret(user: str, password: str) -> str:
    """Return what AUTH PLAIN sends, in base64 (RFC 4616)."""
    return base64.b64encode(f"\0{user}\0{password}".encode()).decode()


def login(wire: Wire, user: str = "ana@here.example", password: str = "secret") -> str:
    """Return the reply to AUTH PLAIN."""
    return wire.ask(f"AUTH PLAIN {plain_secret(user, password)}")


def logged_in(server: Server, hello: str = "client.example") -> Wire:
    """Return a connection on which Ana has logged in."""
    wire = greeted(server, "submission over TLS", hello)
    assert login(wire).startswith("235 ")
    return wire


def send(wire: Wire, data: bytes, recipient: str = "ana@here.example", sender: str = "") -> str:
    """Send a message, transparent already; return the last reply."""
    assert wire.ask(f"MAIL FROM:<{sender}>").startswith("250 ")
    assert wire.ask(f"RCPT TO:<{recipient}>").startswith("250 ")
    assert wire.ask("DATA").startswith("354 ")
    wire.send(data + b".\r\n")
    return wire.reply()


def rcpt(server: Server, address: str) -> str:
    """Return the reply to this recipient."""
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        return wire.ask(f"RCPT TO:<{address}>")


def smtp_client(server: chasquid.CaptureServer) -> smtplib.SMTP:
    """Return a client of the standard library that has said EHLO."""
    client = smtplib.SMTP(*server.address, timeout=SECONDS)
    client.ehlo("client.example")
    return client


# --- dialogues ---


def _fill_in(text: str) -> str:
    """Put base64 where the text says {b64:…}, with Python's escapes."""

    def encoded(match: re.Match[str]) -> str:
        octets = match[1].encode("latin-1", "backslashreplace").decode("unicode_escape")
        return base64.b64encode(octets.encode("latin-1")).decode()

    return re.sub(r"\{b64:(.*?)\}", encoded, text)


def matches(pattern: str, text: str) -> bool:
    """Tell whether `text` is as `pattern` says, where "…" stands for anything."""
    parts = (re.escape(part) for part in pattern.split("…"))
    return re.fullmatch(".*".join(parts), text, re.DOTALL) is not None


def _octets(text: str) -> bytes:
    return text.encode().decode("unicode_escape").encode("latin-1")


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        line = line.strip()
        if line and not line.startswith("#"):
            kind, _, rest = line.partition(" ")
            yield kind, rest


def play(server: Server, text: str, port: str = "smtp") -> None:
    """Hold a dialogue with `server`.

    # a comment
    C: a line that we send            {b64:\\0ana\\0secret} is sent as base64
    C= octets\\r\\nwith escapes       sent as they are
    C×1000 a line that we send 1000 times, without a wait
    S: 250 a line that must come      "…" stands for anything
    S: 250-…                          any number of lines, none of them the last
    * TLS                             do the handshake
    * closed                          the server closes the connection
    * hang up                         we do, and the server notices
    * again                           a new connection, if the old one is over
    * port submission                 … to that port
    * mail for ana: 2                 so many messages are in the Maildir in the end
    * mail for ana holds: text        the last of them has this in it
    * mail for ana lacks: text        none of them has this in it
    * nothing is left                 the queue is empty, and was so all the time
    """
    steps = list(_lines(text))
    while steps and steps[0][0] == "*" and steps[0][1].startswith("port "):
        port = steps.pop(0)[1].removeprefix("port ")
    wire = server.connect(port)
    try:
        for kind, rest in steps:
            if kind == "*" and rest == "again":
                wire.close()
                said, wire = wire.said, server.connect(port)
                wire.said = said
            else:
                _step(server, wire, kind, rest)
    finally:
        wire.close()


def _step(server: Server, wire: Wire, kind: str, rest: str) -> None:
    seen = "\n".join(wire.said[-12:])
    if kind == "C:":
        wire.say(_fill_in(rest))
    elif kind == "C=":
        wire.send(_octets(rest))
    elif kind.startswith("C×"):
        wire.send(f"{rest}\r\n".encode() * int(kind[2:]))
    elif kind == "S:":
        line = wire.line()
        while rest[3:] == "-…" and wire.continues(line):
            line = wire.line()
        assert matches(rest, line), f"expected {rest!r}, found {line!r} after\n{seen}"
    elif kind == "*":
        _direct(server, wire, rest, seen)
    else:
        raise AssertionError(f"a dialogue has no {kind!r}")


def _direct(server: Server, wire: Wire, what: str, seen: str) -> None:
    if what == "TLS":
        wire.start_tls(trusting())
    elif what == "closed":
        assert wire.is_closed(), f"not closed after\n{seen}"
    elif what == "hang up":
        wire.close()
        wait_for(lambda: "event=ended-early" in server.mail_log, "the server to notice")
    elif match := re.fullmatch(r"mail for (\S+): (\d+)", what):
        found = server.mail(match[1])
        assert len(found) == int(match[2]), (found, seen)
    elif match := re.fullmatch(r"mail for (\S+) holds: (.*)", what):
        assert _octets(match[2]) in server.mail(match[1])[-1], (server.mail(match[1]), seen)
    elif match := re.fullmatch(r"mail for (\S+) lacks: (.*)", what):
        assert not any(_octets(match[2]) in message for message in server.mail(match[1])), seen
    elif what == "nothing is left":
        wait_for(lambda: not server.queued(), "the queue to become empty")
        assert "event=queued " not in server.mail_log
    else:
        raise AssertionError(f"a dialogue has no {what!r}")


# --- a server that follows a text ---


class Peer:
    """A server in a thread, on loopback or at a path; each script is one connection.

    S: a line that it sends           C: a line that must come, "…" for anything
    C. a message is read, up to the final dot; it is kept in `messages`
    S= octets\\r\\nwith escapes       sent as they are
    * TLS                             do the handshake
    * nothing more                    nothing has come yet beyond what was read
    * close                           close the connection here
    * closed                          the client closes the connection
    """

    def __init__(
        self,
        *scripts: str,
        names: Sequence[str] = (),
        path: str = "",
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._scripts = scripts
        self._context = context or _server_context(tuple(names) or (HOST,))
        self.problems: list[str] = []
        self.messages: list[bytes] = []
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen(8)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port: int = self._listener.getsockname()[1]
        self._listener.settimeout(SECONDS)
        self._thread = threading.Thread(target=self._run, name="peer", daemon=True)

    def __enter__(self) -> Peer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._thread.join(SECONDS * 1.5)
        self._listener.close()
        assert not self.problems, "\n".join(self.problems)

    def _run(self) -> None:
        for number, script in enumerate(self._scripts, 1):
            last = number == len(self._scripts)
            try:
                raw, _ = self._listener.accept()
            except OSError:
                self.problems.append(f"connection {number} did not come")
                return
            if last:
                self._listener.close()  # no further connection is expected
            wire = Wire(raw)
            try:
                for kind, rest in _lines(script):
                    if (kind, rest) == ("*", "close"):
                        break
                    self._step(wire, kind, rest)
            except (AssertionError, OSError) as error:
                self.problems.append(f"connection {number}: {error!r} after {wire.said}")
            finally:
                wire.close()

    def _step(self, wire: Wire, kind: str, rest: str) -> None:
        if kind in ("S:", "S="):
            # a client may close before it has heard everything; a later step will tell
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                wire.say(rest) if kind == "S:" else wire.send(_octets(rest))
        elif kind == "C:":
            line = wire.line()
            assert matches(rest, line), f"expected {rest!r}, found {line!r}"
        elif kind == "C.":
            self.messages.append(wire.read_message())
        elif (kind, rest) == ("*", "nothing more"):
            assert not wire.has_more(), "more has come than may have"
        elif (kind, rest) == ("*", "closed"):
            assert wire.is_closed(), "the client has not closed"
        elif (kind, rest) == ("*", "TLS"):
            with contextlib.suppress(ssl.SSLError):  # a client may refuse the certificate
                wire.start_tls(self._context, server_side=True)
        else:
            raise AssertionError(f"a script has no {kind} {rest}")


# What a server at mx.there.example says and hears; scripts are put together from these.

MX = {
    ("there.example", "MX"): ("10 mx.there.example.",),
    ("mx.there.example", "A"): ("127.0.0.1",),
}
EVA = [chasquid.Destination("address", "eva@there.example", ())]
GREETING = f"""
    S: 220 mx.there.example ESMTP
    C: EHLO {HOST}
    S: 250 mx.there.example
"""
ENVELOPE = """
    C: MAIL FROM:<eva@there.example>
    S: 250 2.1.0 fine
    C: RCPT TO:<eva@there.example>
    S: 250 2.1.5 fine
"""
CONTENT = """
    C: DATA
    S: 354 go on
    C.
    S: 250 2.6.0 got it
    C: QUIT
    S: 221 bye
"""
STARTTLS = f"""
    S: 220 mx.there.example ESMTP
    C: EHLO {HOST}
    S: 250-mx.there.example
    S: 250 STARTTLS
    C: STARTTLS
"""
SECURE = f"""
    S: 220 go on
    * TLS
    C: EHLO {HOST}
    S: 250 mx.there.example
"""


@functools.cache
def _server_context(names: tuple[str, ...]) -> ssl.SSLContext:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        chain = write_certificate(Path(name), *names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, chain.parent / "privkey.pem")
    return context


# --- a loop ---


class FakeClock(chasquid.Clock):
    """A clock that stands until it is moved; `jumped` is how far its wall time was set ahead."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now
        self.jumped = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def time(self) -> float:
        return self.now + self.jumped

    def monotonic(self) -> float:
        return self.now


class RunningClock(chasquid.Clock):
    """The real clock, and what `advance` has put on top of it. For any thread.

    `moved` is called after each move: a loop that sleeps must look at its timers again.
    `jumped` is how far the wall time was set ahead, as anybody may who sets a clock.
    """

    def __init__(self, moved: Callable[[], object] = lambda: None) -> None:
        self._moved = moved
        self.jumped = 0.0
        self._ahead = 0.0
        self._lock = threading.Lock()

    def advance(self, seconds: float) -> None:
        """Move the clock ahead. Raises ChasquidError if that would be back."""
        if not 0 <= seconds < float("inf"):
            text = f"the clock cannot be moved back or for ever: {seconds:g} seconds"
            raise chasquid.ChasquidError(text)
        with self._lock:
            self._ahead += seconds
        self._moved()

    def time(self) -> float:
        return time.time() + self._ahead + self.jumped

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead


class Inline(chasquid.Workers):
    """Workers that do a job when they get it, in the thread of who gave it."""

    def __init__(self) -> None:
        super().__init__(0)

    def submit(
        self,
        job: Callable[[], object],
        done: Callable[[object, BaseException | None], None],
    ) -> None:
        try:
            result = job()
        except BaseException as error:
            done(None, error)
        else:
            done(result, None)


def run(
    main: Callable[[Any], Coroutine[Any, Any, T]],
    clock: chasquid.Clock | None = None,
    crashes: list[tuple[str, BaseException]] | None = None,
    *,
    workers: chasquid.Workers | None = None,
    threads: int = 2,
) -> T:
    """Run `main(loop)` on a loop of its own; no task may crash, unless into `crashes`."""
    seen = [] if crashes is None else crashes
    workers = workers or chasquid.Workers(threads)
    loop = chasquid.Loop(
        clock or chasquid.Clock(), workers, lambda name, error: seen.append((name, error))
    )

    async def limited() -> T:
        with loop.deadline(SECONDS):
            return await main(loop)

    try:
        return loop.run(limited() if clock is None else main(loop))
    finally:
        workers.close()
        loop.close()
        assert crashes is not None or not seen, seen


async def turns(loop: chasquid.Loop, count: int = 5) -> None:
    """Let everything that can go on go on; the clock does not move."""
    for _ in range(count):
        await loop.turn()


@contextlib.contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class FakeCourier:
    """A courier that keeps what it gets, and says of every destination the same."""

    def __init__(self, state: str = chasquid.State.DEFERRED) -> None:
        self.state = state
        self.deliveries: list[chasquid.Delivery] = []
        self.destinations: list[chasquid.Destination] = []

    async def deliver(
        self, delivery: chasquid.Delivery, destinations: Sequence[chasquid.Destination]
    ) -> list[chasquid.Result]:
        self.deliveries.append(delivery)
        self.destinations += destinations
        said = ("2.0.0", "done") if self.state == chasquid.State.SENT else ("4.0.0", "not today")
        return [chasquid.Result(self.state, *said)] * len(destinations)


def delivery(
    data: bytes = MESSAGE,
    sender: str = "eva@there.example",
    **fields: Any,
) -> chasquid.Delivery:
    """Return a delivery of a small message."""
    message = chasquid.Message(fields.pop("prefix", b""), "", len(data), data)
    values = {"smtputf8": False, "eight_bit": not data.isascii(), **fields}
    return chasquid.Delivery("abc", sender, message, **values)


def address(value: str, *via: str) -> chasquid.Destination:
    return chasquid.Destination("address", value, via)


async def unsigned(header: bytes, body: Callable[[], Iterable[bytes]]) -> bytes:
    """Sign nothing."""
    return b""


async def no_policy(domain: str) -> bytes:
    raise chasquid.ChasquidError("there is no web server here")


def tls_policies(
    loop: chasquid.Loop,
    names: chasquid.Names,
    log: chasquid.Log,
    directory: Path,
    fetch: chasquid.FetchPolicy = no_policy,
) -> chasquid.TlsPolicies:
    """Return what an SMTP courier asks, with its files below `directory`."""
    levels = chasquid.SecurityLevels(loop, log, str(directory / "domaininfo"))
    sts = chasquid.StsPolicies(loop, log, names, fetch, str(directory / "sts-cache"))
    return chasquid.TlsPolicies(names, levels, sts)


def record(directory: Path, clock: chasquid.Clock | None = None) -> chasquid.Log:
    """Return a record that writes server.log and mail.log into `directory`."""
    clock = clock or chasquid.Clock()
    log, mail_log = (
        chasquid.Sink(os.path.join(directory, name), clock) for name in ("server.log", "mail.log")
    )
    return chasquid.Log(log, mail_log)
