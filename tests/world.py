# SPDX-License-Identifier: Apache-2.0
"""
Several complete servers in one process, for tests of software and of mail flows: with
a DNS that is a table, addresses that exist nowhere (192.0.2.0/24, RFC 5737), and a clock
that is moved on. So what takes twenty hours of retries is seen within a second.

- A server here is the `Daemon` that serves elsewhere, in a thread of its own, with files,
  sockets and TLS. Only its clock, its chance, its DNS and its `connect` are others. Who
  connects says by a PROXY header where from, so every server has `haproxy_incoming`.
- Nothing reaches the real network, nor a server on this machine that is none of the
  world's: an address that the world does not know refuses the connection.
- The clock runs, and is moved ahead only while every server rests: no session is open,
  and the queues are empty or wait. To see that, each is asked on its own loop, twice: who
  rests both times, and has begun nothing in between, has rested at the same moment.
- The end gives back everything: threads, sockets, files.

What a server does belongs to chasquid; the world only watches.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import smtplib
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from support import RunningClock

from chasquid import (
    SMTP_PORT,
    SUBMISSION_PORT,
    SUBMISSION_TLS_PORT,
    Answer,
    ChasquidError,
    Daemon,
    Disconnected,
    DkimKey,
    Item,
    Loop,
    Password,
    PrivateKey,
    QueueLine,
    Scrypt,
    Stream,
    TemporaryFailure,
    connect,
    destination_text,
    domain_to_ascii,
    domain_to_unicode,
    duration_text,
    format_users,
    load_config,
    load_dkim_keys,
    maildir_path,
    make_directory,
    new_key,
    normalize_address,
    plural,
    printable,
    queue_line,
    quote,
    read_file,
    reason,
    recipient_text,
    rfc5322_date,
    self_signed_certificate,
    send_at_once,
)

T = TypeVar("T")

_WORLD_PATIENCE = 30.0
_WORLD_ROOM = 254  # addresses in 192.0.2.0/24
_WORLD_LOG_LINES = 12  # of each server, in an error
_ALIAS_CHAIN_LIMIT = 8
_A_MOMENT = 0.001  # seconds beyond what is due, so that it is
_ANSWER_SECONDS = 1.0  # for which room DNS keeps an answer at least,
_FAILURE_SECONDS = 5.0  # and a failure
_PORT_NUMBERS = {SMTP_PORT: 25, SUBMISSION_PORT: 587, SUBMISSION_TLS_PORT: 465}
_WORLD_KEYS = {
    "smtp_address", "submission_address", "submission_over_tls_address", "data_dir",
    "log_path", "mail_log_path", "haproxy_incoming",
}  # fmt: skip


class WorldDns:
    """The DNS of a world: a table that is changed like a dictionary, from any thread.

        dns["there.example", "MX"] = ["10 mx.there.example."]
        del dns["there.example", "TXT"]

    Records are in presentation form, one string each; TXT without quotes. A CNAME is
    followed. A name that neither has records nor any below it does not exist. What is
    changed holds at once: if a server has asked since the last change, the clock is moved by
    the second for which it keeps the answer, after `mend` by the five for which it keeps a
    failure.
    """

    def __init__(self, clock: RunningClock) -> None:
        self._clock = clock
        self._asked = False  # since the last change
        self._table: dict[tuple[str, str], tuple[str, ...]] = {}  # replaced, never changed
        self._failing: frozenset[str] = frozenset()
        self._signed: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def __getitem__(self, key: tuple[str, str]) -> list[str]:
        return list(self._table[self._key(*key)])

    def __contains__(self, key: tuple[str, str]) -> bool:
        return self._key(*key) in self._table

    def __setitem__(self, key: tuple[str, str], records: Sequence[str]) -> None:
        if isinstance(records, str):
            raise ChasquidError(f"expected a list of records for {key[0]}, found {records!r}")
        with self._lock:
            self._table = {**self._table, self._key(*key): tuple(records)}
        self._changed()

    def __delitem__(self, key: tuple[str, str]) -> None:
        with self._lock:
            table = dict(self._table)
            del table[self._key(*key)]
            self._table = table
        self._changed()

    def add(self, text: str) -> None:
        """Add records, one a line: name, kind, and what it says.

        dns.add('''
            odd.example        MX   0 .
            old.there.example  A    192.0.2.77
        ''')
        """
        for line in filter(None, map(str.strip, text.splitlines())):
            words = line.split(None, 2)
            if len(words) != 3:
                raise ChasquidError(f"expected name, kind and a record, found {line!r}")
            name, kind, record = words
            self[name, kind] = [*self._table.get(self._key(name, kind), ()), record]

    def fail(self, name: str) -> None:
        """Let questions for `name`, and for all names below it, fail for the time being."""
        with self._lock:
            self._failing |= {self._key(name, "")[0]}
        self._changed()

    def mend(self, name: str) -> None:
        """Let questions for `name` be answered again, after `fail`."""
        with self._lock:
            self._failing -= {self._key(name, "")[0]}
        self._changed(_FAILURE_SECONDS)

    def sign(self, name: str) -> None:
        """Let what `name`, and the names below it, have be authentic (DNSSEC)."""
        with self._lock:
            self._signed |= {self._key(name, "")[0]}
        self._changed()

    def _changed(self, kept: float = _ANSWER_SECONDS) -> None:
        if self._asked:
            self._asked = False
            self._clock.advance(kept + _A_MOMENT)

    async def ask(self, name: str, kind: str) -> Answer:
        """Answer a question of room DNS. Raises TemporaryFailure."""
        self._asked = True  # before the table is looked at, or a change might be missed
        table, (asked, kind) = self._table, self._key(name, kind)
        authentic = True
        for name in self._chain(table, asked, kind):
            if self._is_below(name, self._failing):
                text = f"no name server answers for {name} {kind}: the world lets it fail"
                raise TemporaryFailure(text, "4.4.3")
            authentic = authentic and self._is_below(name, self._signed)
        exists = any(self._is_below(known, {name}) for known, _ in table)
        canonical = name if name != asked else ""
        return Answer(exists, table.get((name, kind), ()), _ANSWER_SECONDS, authentic, canonical)

    @staticmethod
    def _chain(
        table: Mapping[tuple[str, str], tuple[str, ...]], name: str, kind: str
    ) -> Iterator[str]:
        """Yield `name`, and what the aliases make of it."""
        for _ in range(_ALIAS_CHAIN_LIMIT):
            yield name
            alias = table.get((name, "CNAME"), ())
            if kind == "CNAME" or not alias:
                return
            name = alias[0].rstrip(".").lower()

    @staticmethod
    def _is_below(name: str, tops: Iterable[str]) -> bool:
        return any(name == top or name.endswith(f".{top}") for top in tops)

    @staticmethod
    def _key(name: str, kind: str) -> tuple[str, str]:
        try:
            return domain_to_ascii(name.rstrip(".")).lower(), kind.upper()
        except ValueError as error:
            raise ChasquidError(str(error)) from error


class _House(NamedTuple):
    """What is behind a virtual address and port: a server of the world, or of the test's own."""

    host: str
    port: int
    server: WorldServer | None


class _Streets:
    """What is where in the world, and whom all trust."""

    def __init__(self) -> None:
        self.houses: dict[tuple[str, int], _House] = {}
        self.tls_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls_context.minimum_version = ssl.TLSVersion.TLSv1_2

    def trust(self, certificate: str) -> None:
        """Let all servers trust a certificate, in PEM."""
        self.tls_context.load_verify_locations(cadata=certificate)

    async def connect(self, address: str, loop: Loop, host: str, port: int) -> Stream:
        """As the function `connect`, for the server at `address`. Raises Disconnected."""
        if host.startswith("/"):
            return await connect(loop, host, port)
        try:
            raw = self._enter(address, host, port)
        except OSError as error:
            raise Disconnected(f"cannot connect to [{host}]:{port}: {reason(error)}") from error
        return _WorldStream(loop, raw, self.tls_context)

    def _enter(self, address: str, host: str, port: int) -> socket.socket:
        """Connect, on loopback, where that takes no time. Raises OSError."""
        house = self.houses.get((host, port))
        if house is None:
            raise _refused()
        if house.server is None:
            return _dial(house.host, house.port)
        house.server.check_door()
        return _dial(house.host, house.port, f"TCP4 {address} {host} 1024 {port}")


def _refused() -> OSError:
    return OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _dial(host: str, port: int, header: str = "") -> socket.socket:
    """Connect, and say where from, if there is a PROXY header to be sent. Raises OSError."""
    raw = socket.create_connection((host, port))
    send_at_once(raw)
    if header:
        raw.sendall(f"PROXY {header}\r\n".encode())
    return raw


class _WorldStream(Stream):
    """Verifies certificates by what the world trusts, instead of by what the system does.

    A context that trusts a part of a chain is one of DANE, and stays.
    """

    __slots__ = ("_trusting",)

    def __init__(self, loop: Loop, connected: socket.socket, trusting: ssl.SSLContext) -> None:
        super().__init__(loop, connected)
        self._trusting = trusting

    async def start_tls(
        self, context: ssl.SSLContext, server_side: bool, hostname: str | None = None
    ) -> None:
        dane = context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        if context.verify_mode == ssl.CERT_REQUIRED and not dane:
            context = self._trusting
        await super().start_tls(context, server_side, hostname)


class _Client(smtplib.SMTP):
    """A client of the test's own, whose PROXY header names nobody: so it is 127.0.0.1."""

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = super()._get_socket(host, port, timeout)
        connected.sendall(b"PROXY UNKNOWN\r\n")
        return connected


class _TlsClient(smtplib.SMTP_SSL, _Client):
    """As `_Client`, with TLS after the header."""


class SubmissionRefused(ChasquidError):
    """A server did not take a message from its user; `reply` is what it said."""

    def __init__(self, text: str, reply: str) -> None:
        super().__init__(text)
        self.reply = reply


class Activity(NamedTuple):
    """What a server is doing.

    sessions    how many are open
    begun       what has been counted since the start: sessions, deliveries and all else
    next_due    when the queue goes on, on the monotonic clock: infinity if it is empty, minus
                infinity while something is being attempted
    """

    sessions: int
    begun: int
    next_due: float


class Queued(NamedTuple):
    """A message in the queue of a server; times are in seconds since 1970.

    `recipients` are the addresses that are owed to somebody, or were in this message, each
    with what became of it: "pending", "deferred: …", "sent: …" or "failed: …".
    """

    id: str
    sender: str
    attempts: int
    received: float
    next_attempt: float
    recipients: tuple[tuple[str, str], ...]


class WorldServer:
    """One server of a world, made by `MailWorld.server`.

    domain, host, address    "here.example", "mx.here.example", "192.0.2.1"
    places                   host and port on loopback, for each of the ports 25, 465 and 587
    certificate              the path of its certificate, for `host` and 127.0.0.1
    config_dir               where its files are; `daemon.reload()` has them read again
    daemon                   the server itself
    """

    def __init__(
        self,
        domain: str,
        host: str,
        address: str,
        directory: str,
        passwords: Mapping[str, str],
        daemon: Daemon,
        patience: float,
    ) -> None:
        self.domain = domain
        self.host = host
        self.address = address
        self.config_dir = os.path.join(directory, "config")
        self.certificate = os.path.join(self.config_dir, "certs", host, "fullchain.pem")
        self.daemon = daemon
        self.places = {
            _PORT_NUMBERS[port]: (place, number) for port, place, number in daemon.addresses
        }
        self._is_open = True
        self._ready = threading.Event()
        self._log = os.path.join(directory, "log")
        self._passwords = passwords
        self._patience = patience
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"server of {domain}", daemon=True)

    def __repr__(self) -> str:
        return f"<server of {self.domain}, {self.host} ({self.address})>"

    # --- for tests ---

    def client(self, port: int, hostname: str = "client.invalid") -> smtplib.SMTP:
        """Return a client of the test's own, connected from 127.0.0.1 to port 25, 465 or 587.

        Raises OSError, smtplib.SMTPException.

            with here.client(465) as client:
                client.login("ana@here.example", "secret")
        """
        self.check_door()
        host, number = self.places[port]
        if port != 465:
            return _Client(host, number, hostname, _WORLD_PATIENCE)
        return _TlsClient(host, number, hostname, timeout=_WORLD_PATIENCE, context=self._context())

    def submit(
        self,
        sender: str,
        recipients: Sequence[str],
        message: Any,
        login: tuple[str, str] | None = None,
        *,
        mail_options: Sequence[str] = (),
        rcpt_options: Sequence[str] = (),
    ) -> str:
        """Send a message as a mail program does: submission port, STARTTLS, AUTH.

        `message` is an `email.message.Message`, text or octets; ends of lines become CRLF.
        `login` is user and password, of the sender where there is none. Return the id of the
        message. Raises SubmissionRefused with the reply, ChasquidError.

            id = here.submit("ana@here.example", ["eva@there.example"], message)
            assert id in here.log
        """
        self.check()
        recipients = [recipients] if isinstance(recipients, str) else list(recipients)
        login = login or self._login_of(sender)
        utf8 = not "".join([sender, *recipients]).isascii()
        data = _octets_of(message, utf8)
        options = [*mail_options, *(["BODY=8BITMIME"] if not data.isascii() else [])]
        options += ["SMTPUTF8"] if utf8 else []
        try:
            with self.client(587) as client:
                client.starttls(context=self._context())
                client.login(*login)
                self._check_reply(client.mail(sender, options))
                for recipient in recipients:
                    self._check_reply(client.rcpt(recipient, rcpt_options))
                said = self._check_reply(client.data(data))
        except smtplib.SMTPResponseException as error:
            self._check_reply((error.smtp_code, error.smtp_error))
            raise
        except (smtplib.SMTPException, OSError) as error:
            text = f"{self.domain} cannot be talked to at its submission port: {reason(error)}"
            raise ChasquidError(text) from error
        return said.rpartition(" ")[2]

    def mailbox(self, address: str, folder: str = "") -> list[Any]:
        """Return the messages in the Maildir of a user, as EmailMessage, the oldest first.

        `folder` is one in Maildir++, such as "Junk". What is still on its way is not waited
        for: say `world.settle()` before. Raises ChasquidError for a user who is not here.

            [message] = there.mailbox("eva@there.example")
            assert message["Subject"] == "hello"
        """
        directory = os.path.join(self._maildir(address), f".{folder}" if folder else "")
        paths = [
            os.path.join(directory, place, name)
            for place in ("new", "cur")
            if os.path.isdir(os.path.join(directory, place))
            for name in os.listdir(os.path.join(directory, place))
        ]
        return [
            email.message_from_bytes(read_file(path), policy=email.policy.default)
            for path in sorted(paths, key=_order_of_delivery)
        ]

    def queue(self) -> list[Queued]:
        """Return what is in the queue, the oldest first."""

        def look() -> list[Queued]:
            return [
                Queued(
                    item.id, item.envelope.sender, item.attempts, item.envelope.received,
                    item.next_attempt, states(item),
                )
                for item in self.daemon.queue.look()
            ]  # fmt: skip

        def states(item: Item) -> tuple[tuple[str, str], ...]:
            return tuple(
                (destination_text(recipient.destination), recipient_text(recipient))
                for recipient in item.recipients
            )

        return sorted(self.on_loop(look), key=lambda one: one.received)

    @property
    def log(self) -> str:
        """The server log and the mail log, in one."""
        return read_file(self._log, missing=b"").decode("utf-8", "replace")

    def stop_listening(self) -> None:
        """Let connections be refused until `listen_again`; what is in the queue goes on."""
        self.check()
        self._is_open = False

    def listen_again(self) -> None:
        """Take connections again, at the same ports."""
        self.check()
        self._is_open = True

    # --- for the world ---

    def start(self) -> None:
        """Start the thread, and wait until the server is ready."""
        self._thread.start()
        if not self._ready.wait(_WORLD_PATIENCE):
            raise ChasquidError(f"{self.domain} does not start:\n{self.report()}")
        self.check()

    def end(self) -> str:
        """Stop the server; return what went wrong with it, or ""."""
        self.daemon.stop()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            return f"{self.domain} did not stop within {self._patience:g} seconds"
        if self._error is not None:
            return f"{self.domain} ended with an error: {self._error!r}"
        if self.daemon.log.counters["crashes",]:
            lines = "\n".join(self.log.splitlines()[-40:])
            return f"{self.domain} had errors that nobody foresaw:\n{lines}"
        return ""

    def check(self) -> None:
        """Raise ChasquidError where the server runs no more."""
        if self._error is not None or not self._thread.is_alive():
            why = f", because of {self._error!r}" if self._error is not None else ""
            raise ChasquidError(f"{self.domain} runs no more{why}")

    def check_door(self) -> None:
        """Raise OSError where connections are refused."""
        if not self._is_open:
            raise _refused()

    def activity(self) -> Activity:
        """Return what is under way; to be called on the server's loop."""
        daemon = self.daemon
        begun = sum(daemon.log.counters.values())
        return Activity(daemon.session_count, begun, daemon.queue.next_due())

    def on_loop(self, call: Callable[[], T]) -> T:
        """Have `call` called on the server's loop; return or raise what it did."""
        return self.ask(call)()

    def ask(self, call: Callable[[], T]) -> Callable[[], T]:
        """As `on_loop`, but go on; what is returned waits for the result.

        Raises ChasquidError where the server runs no more.
        """
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def now() -> None:
            try:
                results.append(call())
            except Exception as error:
                errors.append(error)
            done.set()

        def wait() -> T:
            if not done.wait(self._patience):
                self.check()
                text = f"{self.domain} has not answered for {self._patience:g} seconds"
                raise ChasquidError(text)
            if errors:
                raise errors[0]
            return results[0]

        self.check()
        self.daemon.loop.post(now)
        return wait

    def report(self) -> str:
        """Return what the queue holds, and the last lines of the log."""

        def look() -> list[QueueLine]:
            now = self.daemon.loop.clock.time()
            return [queue_line(item, now) for item in self.daemon.queue.look()]

        lines = []
        queue = self.on_loop(look) if self._thread.is_alive() else []
        lines.append(f"{self.domain}: {plural(len(queue), 'message')} in the queue")
        for line in queue:
            lines.append(f"  {line.id} from <{line.sender}>, {line.age} old, {line.next_attempt}")
            lines += [f"    {address} {state}" for address, state in line.recipients]
        lines += [f"  | {line}" for line in self.log.splitlines()[-_WORLD_LOG_LINES:]]
        return "\n".join(lines)

    def _run(self) -> None:
        try:
            self.daemon.run(self._ready.set)
        except BaseException as error:
            self._error = error
            self._ready.set()

    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.certificate)

    def _login_of(self, sender: str) -> tuple[str, str]:
        password = self._passwords.get(sender.lower())
        if password is None:
            text = f"{self.domain} has no user {printable(sender, 100)}"
            raise ChasquidError(f"{text}: say with login=(user, password) who submits")
        return sender, password

    def _check_reply(self, reply: tuple[int, bytes | str]) -> str:
        code, said = reply
        text = said if isinstance(said, str) else said.decode("utf-8", "replace")
        whole = f"{code} {text}"
        if not 200 <= code < 300:
            raise SubmissionRefused(f"{self.domain} refused a submission: {whole}", whole)
        return text

    def _maildir(self, address: str) -> str:
        config = self.daemon.config
        if config.mail_delivery_agent_bin or config.lmtp_address:
            raise ChasquidError(f"{self.domain} does not deliver into Maildirs")
        template = config.maildir.replace("%data_dir%", config.data_dir)
        with contextlib.suppress(ValueError):
            known = normalize_address(address)
            if known in self._passwords:
                return maildir_path(template, known)
        users = ", ".join(sorted(self._passwords)) or "nobody"
        text = f"{self.domain} has no user {printable(address, 100)}"
        raise ChasquidError(f"{text} with a Maildir; here are {users}")


def _octets_of(message: Any, utf8: bool) -> bytes:
    """Return a message as octets, with CRLF."""
    if isinstance(message, str):
        message = message.encode()
    elif not isinstance(message, (bytes, bytearray)):
        message = message.as_bytes(policy=email.policy.SMTPUTF8 if utf8 else email.policy.SMTP)
    return re.sub(rb"\r\n|\r|\n", b"\r\n", bytes(message))


def _order_of_delivery(path: str) -> tuple[int, ...]:
    """Return what sorts the files of a Maildir as MaildirCourier wrote them."""
    match = re.match(r"(\d+)\.M(\d+)P\d+Q(\d+)", os.path.basename(path))
    return tuple(map(int, match.groups())) if match else (int(os.stat(path).st_mtime),)


class MailWorld:
    """Several servers, connected with each other and with nothing else.

        with MailWorld() as world:
            here = world.server("here.example", users={"ana": "secret"}, dkim=True)
            there = world.server("there.example", users={"eva": "secret"})
            here.submit("ana@here.example", ["eva@there.example"], "Subject: hello\\n\\nhello\\n")
            world.settle()
            [arrived] = there.mailbox("eva@there.example")
            assert "dkim=pass" in arrived["Authentication-Results"]

    Time passes as it does lookups, and is moved ahead by `run_until` and `advance`. Chance
    is left out: a first retry comes after exactly a minute, and of mail exchangers with the
    same preference the first by name is tried first. The limits of chasquid.conf hold between
    the servers, and not for clients from 127.0.0.1. `patience` is how many real seconds the
    servers may take to come to rest. `dns` is a `WorldDns`; `policies` are the texts of
    MTA-STS policies, by domain, for those that announce one in the DNS.

    Whatever goes wrong is a ChasquidError, at the end also a crash within a server. An
    assertion that fails inside has the ends of the logs in its notes.
    """

    def __init__(self, patience: float = _WORLD_PATIENCE) -> None:
        self.clock = RunningClock(self._wake)
        self.dns = WorldDns(self.clock)
        self.policies: dict[str, str] = {}
        self.servers: list[WorldServer] = []
        self._patience = patience
        self._streets = _Streets()
        self._addresses = (f"192.0.2.{number}" for number in range(1, _WORLD_ROOM + 1))
        self._numbers = itertools.count(1)
        self._ended = False
        self._directory = tempfile.mkdtemp(prefix="chasquid-world-")

    def __enter__(self) -> MailWorld:
        self._check()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, AssertionError) and not self._ended:
            with contextlib.suppress(ChasquidError):
                error.add_note(self.report())
        problems = self._end()
        if problems and error is None:
            raise ChasquidError("\n".join(problems))

    def close(self) -> None:
        """End the world, where it is not used in a with statement. Raises ChasquidError."""
        self.__exit__(None, None)

    # --- what is in it ---

    def server(
        self,
        domain: str,
        *,
        users: Mapping[str, str] | None = None,
        aliases: str = "",
        dkim: bool | str = False,
        spf: str = "",
        **settings: Any,
    ) -> WorldServer:
        """Start a server for `domain`, and put it into the DNS: MX, A, PTR, SPF, DKIM.

        `users` are names and passwords, `aliases` the text of the aliases file. `dkim` makes
        a key, Ed25519 unless it says "rsa2048", with the selector "world"; `spf` is the text of
        the record. `settings` are keys of chasquid.conf. Its host is mx.DOMAIN, or what the
        setting `hostname` says. Raises ChasquidError, ConfigError.

            world.server("here.example", users={"ana": "secret"}, aliases="team: ana\\n",
                         dkim="rsa2048", spf="v=spf1 mx -all", give_up_send_after="1h")
        """
        self._check()
        domain, ascii_domain = self._new_domain(domain)
        host = str(settings.setdefault("hostname", f"mx.{ascii_domain}"))
        mine = sorted(_WORLD_KEYS & settings.keys())
        if mine:
            raise ChasquidError(f"{mine[0]} is not to be set: the world chooses it itself")
        directory = os.path.join(self._directory, f"{next(self._numbers)}-{ascii_domain}")
        config_dir = os.path.join(directory, "config")
        own = os.path.join(config_dir, "domains", ascii_domain)
        chain = self._write_certificate(config_dir, host)
        users = users or {}
        _write(os.path.join(own, "users"), format_users(_cheap_passwords(users)))
        _write(os.path.join(own, "aliases"), aliases.encode())
        if dkim:
            key = _new_dkim_key("ed25519" if dkim is True else dkim)
            _write(os.path.join(own, "dkim:world.pem"), key.to_pem().encode())
        text = _settings_text(directory, settings)
        _write(os.path.join(config_dir, "chasquid.conf"), text.encode())
        address = self._next_address()
        daemon = Daemon(
            load_config(config_dir), clock=self.clock, ask=self.dns.ask, random=lambda: 0.0,
            fetch_policy=self._fetch_policy,
            connect=functools.partial(self._streets.connect, address),
        )  # fmt: skip
        passwords = {f"{name}@{domain}".lower(): word for name, word in users.items()}
        server = WorldServer(domain, host, address, directory, passwords, daemon, self._patience)
        self._streets.trust(chain)
        for number, place in server.places.items():
            self._streets.houses[address, number] = _House(*place, server)
        self._publish(server, ascii_domain, spf, load_dkim_keys(own, domain))
        self.servers.append(server)
        server.start()
        return server

    def stand_in(self, host: str, port: int) -> str:
        """Let a server of the test's own, on 127.0.0.1 and `port`, be `host` for the world.

        It is reached at port 25 of the address that is returned, and of `host`; an MX record
        is still to be added.

            world.stand_in("mx.odd.example", port)
            world.dns["odd.example", "MX"] = ["10 mx.odd.example."]
        """
        self._check()
        address = self._next_address()
        self._streets.houses[address, 25] = _House("127.0.0.1", port, None)
        self.dns[host, "A"] = [address]
        return address

    # --- time ---

    @property
    def now(self) -> float:
        """The time in the world, in seconds since 1970."""
        return self.clock.time()

    def settle(self) -> None:
        """Wait until nothing can happen any more without the clock being moved on.

        Then the queues are empty, or what is in them waits for its next attempt. Raises
        ChasquidError where the servers do not come to rest.
        """
        self._rest()

    def advance(self, *, hours: float = 0.0, minutes: float = 0.0, seconds: float = 0.0) -> None:
        """Move the clock on, from one attempt of the queues to the next, and settle.

            world.advance(hours=4, minutes=30)

        Raises ChasquidError, also where the clock would be moved back.
        """
        end = self.clock.monotonic() + self._length(hours, minutes, seconds)
        due = self._rest()
        while self.clock.monotonic() < end:
            due = self._move_to(min(due, end))

    def run_until(
        self,
        condition: Callable[[], T],
        *,
        hours: float = 0.0,
        minutes: float = 0.0,
        seconds: float = 0.0,
    ) -> T:
        """Move the clock from attempt to attempt until `condition` is true; return its value.

        It is asked whenever the servers rest. Raises ChasquidError, with the queues and the
        ends of the logs, where it is not true within the time given: without one, two days.

            [bounce] = world.run_until(lambda: here.mailbox("ana@here.example"), hours=30)
        """
        length = self._length(hours, minutes, seconds) or 48 * 3600.0
        end = self.clock.monotonic() + length
        due = self._rest()
        while not (value := condition()):
            if self.clock.monotonic() >= end:
                text = f"what was waited for did not come within {duration_text(length)}"
                raise ChasquidError(f"{text} of the world's time:\n{self.report()}")
            due = self._move_to(min(due, end))
        return value

    def report(self) -> str:
        """Return what the queues hold, and the last lines of the logs, for people."""
        self._check()
        time_text = rfc5322_date(self.now)
        return "\n".join([f"It is {time_text}.", *(server.report() for server in self.servers)])

    # --- within ---

    def _length(self, hours: float, minutes: float, seconds: float) -> float:
        self._check()
        length = hours * 3600.0 + minutes * 60.0 + seconds
        if not 0 <= length < float("inf"):
            raise ChasquidError(f"the clock cannot be moved back or for ever: {length:g} seconds")
        return length

    def _rest(self) -> float:
        """Wait until all servers rest; return when the first goes on, on the monotonic clock.

        Raises ChasquidError.
        """
        self._check()
        end, pause = time.monotonic() + self._patience, 0.0002
        before: list[int] = []
        while True:
            asked = [server.ask(server.activity) for server in self.servers]
            seen = [wait() for wait in asked]
            due = min((each.next_due for each in seen), default=float("inf"))
            rests = due > self.clock.monotonic() and not any(each.sessions for each in seen)
            begun = [each.begun for each in seen]
            if rests and before == begun:
                return due
            before = begun if rests else []
            if rests:
                continue
            if time.monotonic() > end:
                count = sum(each.sessions for each in seen)
                text = f"the servers did not come to rest within {self._patience:g} seconds"
                text += f", with {plural(count, 'session')} open"
                raise ChasquidError(f"{text}:\n{self.report()}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.005)

    def _move_to(self, when: float) -> float:
        """Move the clock to `when`, monotonic, and a moment further; then as `_rest`."""
        self.clock.advance(max(0.0, when + _A_MOMENT - self.clock.monotonic()))
        return self._rest()

    def _wake(self) -> None:
        for server in self.servers:
            server.daemon.loop.post(lambda: None)

    def _check(self) -> None:
        if self._ended:
            raise ChasquidError("this world has ended; what is asked of it must be asked before")

    def _new_domain(self, domain: str) -> tuple[str, str]:
        try:
            domain, ascii_domain = domain_to_unicode(domain), domain_to_ascii(domain)
        except ValueError as error:
            raise ChasquidError(str(error)) from error
        if any(server.domain == domain for server in self.servers):
            raise ChasquidError(f"this world has a server for {domain} already")
        return domain, ascii_domain

    def _next_address(self) -> str:
        address = next(self._addresses, "")
        if not address:
            raise ChasquidError(f"a world has room for {_WORLD_ROOM} servers, and it is full")
        return address

    @staticmethod
    def _write_certificate(config_dir: str, host: str) -> str:
        names = [domain_to_ascii(host), "127.0.0.1"]
        chain, key = self_signed_certificate(names, time.time())
        directory = os.path.join(config_dir, "certs", host)
        _write(os.path.join(directory, "fullchain.pem"), chain.encode())
        _write(os.path.join(directory, "privkey.pem"), key.encode())
        return chain

    def _publish(self, server: WorldServer, domain: str, spf: str, keys: Sequence[DkimKey]) -> None:
        self.dns[domain, "MX"] = [f"10 {domain_to_ascii(server.host)}."]
        self.dns[server.host, "A"] = [server.address]
        reverse = ".".join(reversed(server.address.split(".")))
        self.dns[f"{reverse}.in-addr.arpa", "PTR"] = [f"{domain_to_ascii(server.host)}."]
        if spf:
            self.dns[domain, "TXT"] = [spf]
        for key in keys:
            self.dns[key.name, "TXT"] = [key.record]

    async def _fetch_policy(self, domain: str) -> bytes:
        text = self.policies.get(domain)
        if text is None:
            raise ChasquidError(f"this world has no MTA-STS policy of {domain}")
        return text.encode()

    def _end(self) -> list[str]:
        """Stop all servers and remove their files; return what went wrong."""
        if self._ended:
            return []
        self._ended = True
        for server in self.servers:
            server.daemon.stop()
        problems = [problem for server in self.servers if (problem := server.end())]
        shutil.rmtree(self._directory, ignore_errors=True)
        return problems


def _cheap_passwords(users: Mapping[str, str]) -> dict[str, Password]:
    """Return the passwords with hashes that cost next to nothing, as tests want them."""
    salt = os.urandom(8)
    return {
        name: Scrypt(
            1, 1, 1, 16, salt,
            hashlib.scrypt(password.encode(), salt=salt, n=2, r=1, p=1, dklen=16),
        )
        for name, password in users.items()
    }  # fmt: skip


def _settings_text(directory: str, settings: Mapping[str, Any]) -> str:
    """Return chasquid.conf; a list is a key that is repeated."""
    lines = []
    ours: dict[str, Any] = {
        "smtp_address": "127.0.0.1:0",
        "submission_address": "127.0.0.1:0",
        "submission_over_tls_address": "127.0.0.1:0",
        "data_dir": os.path.join(directory, "data"),
        "log_path": os.path.join(directory, "log"),
        "mail_log_path": os.path.join(directory, "log"),
        "haproxy_incoming": True,
        "reload_every": "24h",
    }
    for key, value in {**ours, **settings}.items():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            text = str(each).lower() if isinstance(each, (bool, int)) else quote(str(each))
            lines.append(f"{key}: {text}")
    return "\n".join(lines) + "\n"


def _new_dkim_key(algorithm: str) -> PrivateKey:
    if not re.fullmatch("ed25519|rsa[0-9]{4}", algorithm):
        raise ChasquidError(f'expected "ed25519", or "rsa2048" and the like, not {algorithm!r}')
    return new_key(algorithm)


def _write(path: str, data: bytes) -> None:
    make_directory(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(data)
