#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""chasquid: a complete mail server in one file.

It receives mail over SMTP, keeps it in a queue on disk, expands aliases, and delivers
into Maildirs, to programs, over LMTP, or over SMTP to other servers. It reads the
configuration directory of chasquid, the Go server, and follows its message flows.

The module is a row of rooms. A room uses only rooms above it, so the file can be read
from the ground up; ``grep -n '^# ROOM'`` lists them with their lines.

    ERRORS         failures as sentences, ids, the clock
    TEXT           addresses, IDNA and PRECIS, dates, text made safe; pure functions
    CONFIG         the key/value text format, Config, domain directories
    LOG            events and metrics: each is declared here once
    LOOP           tasks on one selector, timers, worker threads, child processes
    STORAGE        durable writes, directories that are synced
    STREAM         buffered sockets, TLS, deadlines
    DNS            look-ups on the loop, with a cache
    USERS          the users file, passwords
    ALIASES        the aliases file and its expansion
    MESSAGE        the header block, trace fields, a stored message
    HOOKS          the operator's programs: alias-resolve, post-data
    KEYS           DER and PEM, RSA and Ed25519, certificates
    SPF            whether a client may send for a domain (RFC 7208)
    DKIM           signatures: verifying those of others, making ours (RFC 6376)
    DMARC          the policy of the author's domain (RFC 9989), results as header fields
    TLS POLICY     DANE, MTA-STS, security levels
    SMTP SYNTAX    replies, commands, parameters, transparency; no input or output
    SMTP CLIENT    the client's side of SMTP and LMTP
    COURIERS       Maildir, delivery agent, pipe, LMTP, SMTP by MX, via and smarthost
    ITEMS          a message in the queue: its envelope, journal and file, and how it comes in
    NOTIFICATIONS  delivery status notifications as messages (RFC 3464)
    QUEUE          the schedule: attempts, pauses, the end
    RATE LIMITS    how much a client or a user may do
    SESSION        the dialogue: connection, transaction, command table
    RECEPTION      the receiver of the mail server: who may send what to whom
    HTTP           requests and responses, for pages and programs
    MONITORING     the status page, the metrics
    LISTENERS      sockets of our own or systemd's, accepting, certificates by name
    WEB            challenges, MTA-STS policies and autoconfig over HTTP and HTTPS
    ACME           certificates from an authority, and their renewal (RFC 8555)
    CONTROL        the lock on data_dir, and the socket for commands to the running server
    PRIVILEGES     from root to a user of its own, and whether secrets lie open
    DAEMON         the wiring diagram, reload, the end
    PUBLISHING     the DNS records that a domain needs
    FAULTS         fault injection, by a script
    READER         what a person reads in a message: text, files, links, codes
    CAPTURE        a server that keeps what it is sent, for tests
    PYTEST         fixtures with such servers
    CAPTURE API    what was captured, over HTTP: Mailpit's interface, and a page
    COMMANDS       the command line

The way of a message, and what each room hands to the next:

      a client
        | octets                       LISTENERS accept, STREAM reads lines
      SESSION                          the dialogue, in terms of SMTP SYNTAX
        | commands                     Receiver: one question for each step
      RECEPTION                        says yes or no
        | MAIL: reverse-path           SPF, TLS POLICY
        | RCPT: final recipients       ALIASES, USERS, HOOKS
        | DATA: header and body        DKIM, DMARC; or a signature; HOOKS
      QUEUE                            a few mailboxes here: delivered at once, then 250
      ITEMS                            all else: envelope and message, a file in new, then 250
        | an item                      STORAGE makes it durable
      QUEUE                            attempts and pauses, results written down
        | a delivery                   a copy for each route
      COURIERS                         a Maildir, a program, or SMTP CLIENT
        | results                      sent, deferred, failed
      NOTIFICATIONS                    what failed goes back, through the queue

Read SESSION, QUEUE and COURIERS first: they say what the server does; the rest says how.
"""

from __future__ import annotations

import base64
import binascii
import collections
import contextlib
import enum
import errno
import functools
import heapq
import itertools
import json
import os
import queue as thread_queue
import re
import select
import selectors
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import types
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)

TYPE_CHECKING = False  # typing is for those who check types: loading it would slow each start
if TYPE_CHECKING:
    import argparse
    import subprocess
    from email.message import EmailMessage
    from typing import IO, Any, NamedTuple, NoReturn, Protocol, TypeVar, overload

    T = TypeVar("T")
else:
    Any = Protocol = object

    class _NamedTupleType(type):
        """Makes of a class statement what typing.NamedTuple does, without its checks of types."""

        def __new__(cls, name, bases, body):
            if not bases:
                return super().__new__(cls, name, bases, body)
            fields = body.get("__annotations__", {})
            defaults = [body.pop(field) for field in fields if field in body]
            made = collections.namedtuple(
                name, fields, defaults=defaults, module=body["__module__"]
            )
            for key, value in body.items():
                setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_NamedTupleType):
        """The base of values: tuples whose items have names, defaults and methods."""


__version__ = "0.1.0"
__all__ = [
    "CaptureServer",
    "Captured",
    "CapturedMessage",
    "ChasquidError",
    "Config",
    "ConfigError",
    "Daemon",
    "Fault",
    "FaultError",
    "NotArrived",
    "NotFound",
    "Unexpected",
    "load_config",
    "main",
]

# ======================================================================================
# ROOM: ERRORS
#
# What everything else stands on: the ways in which something may fail, names that are never
# given twice, and the clock.
#
# A failure is a sentence. Whoever raises one has said what went wrong, where, and what to
# do; whoever catches one passes the sentence on and adds nothing. Its class says whether it
# is temporary or permanent, and its enhanced status code (RFC 3463) says more.
#
# A limit or a time-out stands in the room that means it, not here.
# ======================================================================================


class ChasquidError(Exception):
    """A failure told in one sentence that a person can act on."""


class ConfigError(ChasquidError):
    """Something in the configuration directory is not as it must be.

    `path` and `line` (0 if there is none) say where; the text says what was expected.
    """

    def __init__(self, path: str, line: int, text: str) -> None:
        super().__init__(f"{path}:{line}: {text}" if line else f"{path}: {text}")
        self.path = path
        self.line = line


class TemporaryFailure(ChasquidError):
    """Something failed that may work later. `status` is an RFC 3463 code, 4.X.X."""

    def __init__(self, text: str, status: str = "4.0.0") -> None:
        super().__init__(text)
        self.status = status


class PermanentFailure(ChasquidError):
    """Something failed that will fail again. `status` is an RFC 3463 code, 5.X.X."""

    def __init__(self, text: str, status: str = "5.0.0") -> None:
        super().__init__(text)
        self.status = status


def new_id() -> str:
    """Return 16 hexadecimal digits, random enough to be never given twice."""
    return os.urandom(8).hex()


def load_modules(names: Iterable[str]) -> None:
    """Import modules now that would be imported when they are first used.

    A server does so before it says that it is ready: from then on the archive that it was
    started from may be replaced, and a module that is read from it later would be missing,
    or of another version. Raises ChasquidError.
    """
    import importlib

    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a damaged archive raises EOFError, zlib.error and others
            text = f"the library {name} cannot be loaded: {type(error).__name__}: {error}"
            raise ChasquidError(f"{text}; is the installation complete?") from error


class Clock:
    """Wall time for what people read, monotonic time for what waits; both in seconds."""

    monotonic = staticmethod(time.monotonic)  # on a clock that nobody sets
    time = staticmethod(time.time)  # since 1970


def reason(error: BaseException) -> str:
    """Return what `error` says, without the numbers that mean nothing to a person."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__


# ======================================================================================
# ROOM: TEXT
#
# Addresses and the text of headers, as pure functions: nothing here looks anything up.
#
# An address is a `str`, "local-part@domain", its domain in Unicode, or "" for the null
# reverse-path. A local-part is kept as it came; whether two of them are the same is
# decided by `normalize_address` alone (PRECIS, RFC 8265; IDNA 2008, RFC 5891).
# ======================================================================================

LOCAL_PART_LIMIT = 64  # octets; RFC 5321, 4.5.3.1.1
_DOMAINS_KNOWN = 1000  # whose other form is remembered: a message names the same ones again
_ASCII_USER = re.compile(r"[!-~]+")
ASCII_DOMAIN = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def split_address(address: str) -> tuple[str, str]:
    """Return local-part and domain; the domain is "" if there is no "@"."""
    local, at, domain = address.rpartition("@")
    return (local, domain) if at else (address, "")


@functools.lru_cache(_DOMAINS_KNOWN)
def domain_to_unicode(domain: str) -> str:
    """Return `domain` in lower case and with its A-labels turned into U-labels.

    Raises ValueError if it is no valid internationalised domain name (RFC 5891).
    An address literal ("[192.0.2.1]") is returned as it is.
    """
    if domain.startswith("["):
        return domain
    if ASCII_DOMAIN.fullmatch(domain) and "xn--" not in domain.lower():
        return domain.lower()
    import idna  # rarely needed: most domains are ASCII

    try:
        return idna.decode(idna.encode(domain, uts46=True))
    except (idna.IDNAError, UnicodeError) as error:
        raise ValueError(f"{printable(domain, 80)} is no valid domain name: {error}") from error


@functools.lru_cache(_DOMAINS_KNOWN)
def domain_to_ascii(domain: str) -> str:
    """Return `domain` with its U-labels turned into A-labels. Raises ValueError."""
    if domain.isascii():
        return domain.lower()
    import idna  # rarely needed: most domains are ASCII

    try:
        return idna.encode(domain, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError) as error:
        raise ValueError(f"{printable(domain, 80)} is no valid domain name: {error}") from error


def address_to_ascii(address: str) -> str:
    """Return `address` with its domain in A-labels; the local-part stays as it is."""
    local, domain = split_address(address)
    return f"{local}@{domain_to_ascii(domain)}" if domain else address


def normalize_user(user: str) -> str:
    """Return the form in which `user` is compared (UsernameCaseMapped, RFC 8265, 3.3).

    Raises ValueError if the profile forbids the name.
    """
    if _ASCII_USER.fullmatch(user):
        return user.lower()
    import precis_i18n.profile  # rarely needed: most names are ASCII

    try:
        return str(precis_i18n.get_profile("UsernameCaseMapped").enforce(user))
    except UnicodeError as error:
        raise ValueError(f"{printable(user, 80)!r} is no valid user name") from error


def normalize_address(address: str) -> str:
    """Return the form in which `address` is compared. Raises ValueError."""
    local, domain = split_address(address)
    return f"{normalize_user(local)}@{domain_to_unicode(domain)}"


def printable(text: str, limit: int = 500) -> str:
    """Return `text` on one line, without control characters, at most `limit` long."""
    text = UNPRINTABLE.sub(" ", text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def short_hash(text: str) -> str:
    """Return 16 characters, always the same for the same text, that hold 64 bits of SHA-256."""
    import hashlib  # loads OpenSSL's hashes, and is rarely needed

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plural(count: int, noun: str) -> str:
    """Return "1 message", "2 messages"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; is it 'x'?" for the one of `known` that is nearest to `word`, or ""."""
    import difflib  # only for a mistake

    near = difflib.get_close_matches(word, list(known), 1)
    return f"; is it {near[0]!r}?" if near else ""


def rfc5322_date(seconds: float) -> str:
    """Return a date-time in UTC as RFC 5322, 3.3 writes it."""
    return _date_text(int(seconds))


@functools.lru_cache(8)  # many messages come within a second
def _date_text(second: int) -> str:
    t = time.gmtime(second)
    clock = f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02} +0000"
    return f"{_DAYS[t.tm_wday]}, {t.tm_mday} {_MONTHS[t.tm_mon - 1]} {t.tm_year} {clock}"


def duration_text(seconds: float) -> str:
    """Return a duration as a person says it: "45s", "12m", "3h 5m", "2d 4h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def is_ip_address(text: str) -> bool:
    """Tell whether `text` is an IPv4 or IPv6 address, without brackets."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return True
    return False


def host_and_port(text: str, default_port: int) -> tuple[str, int]:
    """Split "host", "host:port", "[::1]:port" or ":port". Raises ValueError.

    The host is "" if none is named. A bare IPv6 address needs no brackets.
    """
    match = re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::(\d+))?|([^:\[\]]*)(?::(\d+))?", text)
    if match is None:
        if is_ip_address(text):
            return text, default_port
        raise ValueError(f"{text!r} is no host:port")
    port = int(match[2] or match[4] or default_port)
    if port > 65535:
        raise ValueError(f"{text!r}: the port must be at most 65535")
    return match[1] or match[3] or "", port


_EXPLANATION_LIMIT = 200


def in_ascii(text: str) -> str:
    """Return `text` for replies and fields: on one line, short, and in ASCII."""
    text = printable(text.encode("ascii", "replace").decode(), len(text))
    return text if len(text) <= _EXPLANATION_LIMIT else text[: _EXPLANATION_LIMIT - 3] + "..."


# ======================================================================================
# ROOM: CONFIG
#
# The configuration directory: the text format of its files, the keys of chasquid.conf,
# and which domains there are. What is inside a domain's files belongs to the rooms
# that use them.
#
# A new key is one row in Config: its name and type, what it may hold, its default, and a
# sentence of help. Reading, printing and defaults come from the row. Tests compare it with
# the sample configuration and the README, which say the same sentence.
#
# The format is the text format of protocol buffers, as far as configuration needs it:
#
#     file    = { entry }
#     entry   = key ( ":" value | [ ":" ] message ) [ "," | ";" ]
#     value   = string { string } | word | "[" [ value { "," value } ] "]"
#     message = "{" { entry } "}" | "<" { entry } ">"
#     string  = '"' … '"' | "'" … "'"       with C's escapes; raw UTF-8 is fine
#     word    = letters, digits, "_", ".", "+", "-"
#
# and "#" begins a comment. A string is `bytes` until a key says that it is text.
#
# A configuration is right or it is refused: an unknown key, a value of the wrong kind
# or a file that cannot be read is a ConfigError with file, line and what was expected.
# Who wants to hear of all mistakes, and not of the first alone, passes a list for them.
# ======================================================================================


class Word(str):
    """A bare word of the text format: a number, true, false, a name."""


class Entry(NamedTuple):
    """One `key: value` with the line it begins on."""

    key: str
    value: Value
    line: int


Value = bytes | Word | tuple["Entry", ...]

_TOKEN = re.compile(
    rb"""
      (?P<space>   [ \t\r\f\v]+ | \#[^\n]* )
    | (?P<newline> \n )
    | (?P<string>  "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' )
    | (?P<word>    [A-Za-z0-9_.+-]+ )
    | (?P<mark>    [:{}<>\[\],;] )
    | (?P<wrong>   [^\n]+ )
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(
    rb"\\(?:([0-7]{1,3})|[xX]([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))",
    re.DOTALL,
)
_SIMPLE_ESCAPES = {
    b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v",
    b"\\": b"\\", b'"': b'"', b"'": b"'", b"?": b"?",
}  # fmt: skip


@contextlib.contextmanager
def collected(problems: list[ConfigError] | None) -> Iterator[None]:
    """Add a ConfigError to `problems`; if that is None, let it be raised."""
    try:
        yield
    except ConfigError as error:
        if problems is None:
            raise
        problems.append(error)


def parse_text_format(
    data: bytes, path: str, problems: list[ConfigError] | None = None
) -> list[Entry]:
    """Parse the text format; `path` is for the messages. Raises ConfigError.

    With `problems`, a mistake is added to it instead, and reading goes on behind its line and
    the message that it is in.
    """
    parser = _TextParser(_tokens(data), path)
    entries: list[Entry] = []
    while True:
        with collected(problems):
            for entry in parser.entries(closing=""):
                entries.append(entry)  # one by one: those before a mistake count
            return entries
        parser.skip_mistake()


def quote(value: str | bytes) -> str:
    """Return `value` as a string of the text format, in ASCII but for UTF-8 text."""
    if isinstance(value, str):
        text = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\{ord(m[0]):03o}", text) + '"'
    return '"' + "".join(
        chr(octet) if 32 <= octet < 127 and octet not in b'"\\' else f"\\{octet:03o}"
        for octet in value
    ) + '"'  # fmt: skip


class _Token(NamedTuple):
    kind: str  # "string", "word", "mark", "end", or "wrong": the rest of a line
    text: bytes
    line: int


def _tokens(data: bytes) -> list[_Token]:
    tokens, line = [], 1
    for match in _TOKEN.finditer(data):
        kind = match.lastgroup or ""
        if kind == "newline":
            line += 1
        elif kind != "space":
            tokens.append(_Token(kind, match[0], line))
    tokens.append(_Token("end", b"the end of the file", line))
    return tokens


_NESTING_LIMIT = 30


class _TextParser:
    def __init__(self, tokens: list[_Token], path: str) -> None:
        self._tokens = tokens
        self._next = 0
        self._path = path
        self._depth = 0
        self._failed_line = 0

    def skip_mistake(self) -> None:
        """Go on behind the line of the last failure, and the message that it was in."""
        depth = self._depth
        while (token := self._peek()).kind != "end":
            if token.line > self._failed_line and depth <= 0:
                break
            if token.kind == "mark":
                depth += (token.text in b"{<") - (token.text in b"}>")
            self._take()
        self._depth = 0

    def entries(self, closing: str) -> Iterator[Entry]:
        """Yield entries up to the mark `closing`, or to the end of the file for ""."""
        while True:
            token = self._take()
            if token.kind == "mark" and token.text.decode() == closing:
                return
            if token.kind == "end" and not closing:
                return
            if token.kind != "word":
                self._fail(token, f"expected a key{f' or {closing!r}' if closing else ''}")
            yield from self._entry(token)
            if self._peek().text in (b",", b";"):
                self._take()

    def _entry(self, key: _Token) -> Iterator[Entry]:
        name = key.text.decode("ascii")
        token = self._peek()
        if token.text == b":":
            self._take()
            token = self._peek()
        elif token.text not in (b"{", b"<"):
            self._fail(token, f"expected ':' after {name!r}")
        if token.text == b"[":
            self._take()
            for value in self._list():
                yield Entry(name, value, key.line)
        else:
            yield Entry(name, self._value(), key.line)

    def _list(self) -> Iterator[Value]:
        if self._peek().text == b"]":
            self._take()
            return
        while True:
            yield self._value()
            token = self._take()
            if token.text == b"]":
                return
            if token.text != b",":
                self._fail(token, "expected ',' or ']'")

    def _value(self) -> Value:
        token = self._take()
        if token.text in (b"{", b"<") and token.kind == "mark":
            if self._depth == _NESTING_LIMIT:
                self._fail(token, f"expected at most {_NESTING_LIMIT} messages in one another")
            self._depth += 1
            entries = tuple(self.entries("}" if token.text == b"{" else ">"))
            self._depth -= 1
            return entries
        if token.kind == "word":
            return Word(token.text.decode("ascii"))
        if token.kind != "string":
            self._fail(token, "expected a value")
        value = self._unescape(token)
        while self._peek().kind == "string":
            value += self._unescape(self._take())
        return value

    def _unescape(self, token: _Token) -> bytes:
        def replace(match: re.Match[bytes]) -> bytes:
            octal, hexadecimal, short, long, other = match.groups()
            if octal:
                return bytes([int(octal, 8) & 0xFF])
            if hexadecimal:
                return bytes([int(hexadecimal, 16)])
            if short or long:
                code = int(short or long, 16)
                if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                    self._fail(token, "expected a Unicode character after '\\u'")
                return chr(code).encode()
            if other not in _SIMPLE_ESCAPES:
                self._fail(token, "expected one of C's escapes after '\\'")
            return _SIMPLE_ESCAPES[other]

        return _ESCAPE.sub(replace, token.text[1:-1])

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token

    def _fail(self, token: _Token, expected: str) -> NoReturn:
        self._failed_line = token.line
        if self._tokens[self._next - 1] is token:
            self._next -= 1  # it may be the end of a message
        found = printable(token.text.decode("utf-8", "replace"), 40)
        if token.kind == "wrong":
            expected = "expected a key or a value"
            is_open = token.text[:1] in (b'"', b"'")
            found = "a string that is not closed" if is_open else repr(printable(found, 20))
        raise ConfigError(self._path, token.line, f"{expected}, found {found}")


class _WrongValue(ValueError):
    """Its text says what was expected."""


class _Relative(str):
    """A path below the configuration directory; in overrides, below the current one."""


# --- What a key may hold: each function returns the value, or raises _WrongValue. ---


def _text(value: Value) -> str:
    if not isinstance(value, bytes):
        raise _WrongValue("expected a string in quotes")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _WrongValue("expected a string in UTF-8") from None


def _flag(value: Value) -> bool:
    if value not in (Word("true"), Word("false")):
        raise _WrongValue("expected true or false")
    return value == "true"


def _count(value: Value) -> int:
    try:
        number = int(value, 0) if isinstance(value, Word) else -1
    except ValueError:
        number = -1
    if number < 1:
        raise _WrongValue("expected a whole number of at least 1, without quotes")
    return number


def _limit(value: Value) -> int:
    """A count that may be 0, for none."""
    return 0 if value == Word("0") else _count(value)


def _port(value: Value) -> int:
    number = _count(value)
    if number > 65535:
        raise _WrongValue("expected a port, 1 to 65535")
    return number


def _duration(value: Value) -> float:
    """A Go duration in seconds: numbers with units, as in "1h30m" or "1.5s"."""
    text = _text(value)
    part = r"(\d+\.?\d*|\.\d+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)"  # micro sign, Greek mu
    if not re.fullmatch(f"({part})+", text):
        raise _WrongValue('expected a duration such as "20h", "1h30m" or "30s"')
    units = {"ns": 1e-9, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    seconds = sum(float(number) * units.get(unit, 1e-6) for number, unit in re.findall(part, text))
    if seconds <= 0:
        raise _WrongValue("expected a duration of more than nothing")
    return seconds


def _hostname(value: Value) -> str:
    text = _text(value)
    try:
        domain_to_ascii(text)
    except ValueError:
        text = ""
    if not text or UNPRINTABLE.search(text) or re.search(r"[\s/\[\]@]", text):
        raise _WrongValue('expected a host name such as "mail.example.com"')
    return text


def _split(text: str, default_port: int) -> tuple[str, int]:
    """Return host and port as host_and_port does, but ("", -1) if `text` is wrong."""
    try:
        return host_and_port(text, default_port)
    except ValueError:
        return "", -1


def _listen_address(value: Value) -> str:
    text = _text(value)
    if text != "systemd" and _split(text, -1)[1] < 0:
        raise _WrongValue('expected "systemd", "host:port" or ":port"')
    return text


def _monitoring_address(value: Value) -> str:
    return _listen_address(value) if _text(value) else ""


def _acme_url(value: Value) -> str:
    text = _text(value)
    if not re.fullmatch(r"https://[^\s/?#]+(/[!-~]*)?", text):
        raise _WrongValue('expected an address that begins with "https://"')
    return text


def _name_server(value: Value) -> str:
    text = _text(value)
    if not is_ip_address(_split(text, 53)[0]):
        raise _WrongValue('expected the address of a name server, "ip" or "ip:port"')
    return text


def _smarthost(value: Value) -> str:
    text = _text(value)
    if text and not all(_split(text, 0)):
        raise _WrongValue('expected "host:port", such as "smtp.example.com:587"')
    return text


def _network(value: Value) -> str:
    import ipaddress  # only if the key is set

    text = _text(value)
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        told = 'expected an address, or a network such as "192.0.2.0/24"'
        raise _WrongValue(told) from None


def _dmarc_policy(value: Value) -> str:
    text = _text(value)
    if text not in ("enforce", "report"):
        raise _WrongValue('expected "enforce" or "report"')
    return text


def _path(value: Value) -> str:
    text = _text(value)
    return text if not text or text.startswith("/") else _Relative(text)


def _directory(value: Value) -> str:
    text = _path(value)
    if not text or "\0" in text:
        raise _WrongValue("expected the path of a directory")
    return text


def _program(value: Value) -> str:
    text = _text(value)
    return _path(value) if "/" in text else text  # a name alone is looked for in PATH


def _lmtp_address(value: Value) -> str:
    text = _text(value)
    if not text or "/" in text:
        return _path(value)
    if not all(_split(text, 0)):
        raise _WrongValue('expected the path of a socket or "host:port"')
    return text


def _log_path(value: Value) -> str:
    text = _text(value)
    if not text.startswith("<"):
        return _path(value)
    if text not in ("<syslog>", "<stdout>", "<stderr>"):
        raise _WrongValue('expected a path, "<syslog>", "<stdout>" or "<stderr>"')
    return text


def _maildir(value: Value) -> str:
    text = _text(value)
    if set(re.findall(r"%\w*%", text)) - {"%data_dir%", "%to_domain%", "%to_user%", "%to%"}:
        raise _WrongValue("expected only %data_dir%, %to_domain%, %to_user% or %to% in it")
    if not text.startswith(("/", "%data_dir%")):
        raise _WrongValue("expected an absolute path")
    if "%to%" not in text and "%to_user%" not in text:
        raise _WrongValue("expected %to_user% in it, or all users would share one Maildir")
    return text


# --- Reading and writing ---


def load_config(
    config_dir: str, overrides: str = "", problems: list[ConfigError] | None = None
) -> Config:
    """Read chasquid.conf in `config_dir`, then `overrides`, text of the same format.

    A key in `overrides` replaces what the file says, even if it may be repeated. Raises
    ConfigError. With `problems`, what is wrong is added to it instead, and the default holds;
    a file that cannot be read is raised all the same.
    """
    path = os.path.join(config_dir, "chasquid.conf")
    found: list[ConfigError] = []
    settings = {
        **_read_keys(read_file(path), path, config_dir, found),
        **_read_keys(os.fsencode(overrides), "--config-overrides", os.getcwd(), found),
    }
    values = {name: setting.value for name, setting in settings.items()}
    values.setdefault("hostname", socket.gethostname())
    config = Config(config_dir=os.path.abspath(config_dir), **values)
    if config.mail_delivery_agent_bin and config.lmtp_address:
        _, path, line = settings["lmtp_address"]
        told = "expected mail_delivery_agent_bin or lmtp_address, not both"
        found.append(ConfigError(path, line, told))
    if problems is None and found:
        raise found[0]
    if problems is not None:
        problems += found
    return config


class _Setting(NamedTuple):
    value: Any
    path: str
    line: int


def _read_keys(
    data: bytes, path: str, base: str, problems: list[ConfigError]
) -> dict[str, _Setting]:
    """Return what each key is set to; `base` is the directory of relative paths.

    Mistakes are added to `problems`, in the order of lines.
    """
    settings: dict[str, _Setting] = {}
    wrong: list[ConfigError] = []
    for entry in parse_text_format(data, path, wrong):
        try:
            value = _read_value(entry, base, settings.get(entry.key))
        except _WrongValue as error:
            wrong.append(ConfigError(path, entry.line, str(error)))
        else:
            settings[entry.key] = _Setting(value, path, entry.line)
    problems += sorted(wrong, key=lambda problem: problem.line)
    return settings


def _read_value(entry: Entry, base: str, before: _Setting | None) -> object:
    """Return the value of `entry`; if its key is repeated, all values up to this one.

    Raises _WrongValue with the name of the key, what was expected, and what was found.
    """
    if entry.key not in _KEYS:
        hint = did_you_mean(entry.key, _KEYS)
        raise _WrongValue(f"expected a known key, found {entry.key!r}{hint}")
    key = _KEYS[entry.key]
    try:
        value = key.read(entry.value)
    except _WrongValue as error:
        raise _WrongValue(f"{entry.key}: {error}, found {_shown(entry.value)}") from None
    if isinstance(value, _Relative):
        value = os.path.abspath(os.path.join(base, value))
    if key.repeated:
        return (*(before.value if before else ()), value)
    if before:
        raise _WrongValue(f"{entry.key}: expected once, found again after line {before.line}")
    return value


def _shown(value: Value) -> str:
    """Return what stood in the file, for a person and on one line."""
    if isinstance(value, tuple):
        return "a message"
    text = value if isinstance(value, Word) else quote(value.decode("utf-8", "replace"))
    return printable(text, 80)


def config_text(config: Config, explained: bool = False) -> str:
    """Return `config` in the text format, every key with the value that is in force.

    With `explained`, a comment above each key says what it means.
    """
    lines = []
    for name, key in _KEYS.items():
        if explained:
            lines.append(f"# {key.help}")
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        lines += [f"{name}: {_written(value)}" for value in values]
    return "\n".join(lines) + "\n"


def _written(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # a duration in seconds
        return f'"{value:.9f}'.rstrip("0").rstrip(".") + 's"'
    return quote(value) if isinstance(value, str) else str(value)


def changed_keys(config: Config) -> list[str]:
    """Return the names of the keys whose values are not the defaults."""
    return [name for name, key in _KEYS.items() if getattr(config, name) != key.default]


def read_file(path: str, missing: bytes | None = None) -> bytes:
    """Return what `path` holds; if there is no such file, `missing` unless it is None.

    Raises ConfigError.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            return missing
        raise ConfigError(path, 0, f"it cannot be read: {error.strerror}") from error


def domain_directories(
    config_dir: str, problems: list[ConfigError] | None = None
) -> dict[str, str]:
    """Return the domains that are served, in Unicode, each with its directory.

    Raises ConfigError; with `problems`, a name that is no domain's is added to it instead.
    """
    top = os.path.join(config_dir, "domains")
    domains: dict[str, str] = {}
    try:
        names = sorted(os.listdir(top))
    except FileNotFoundError:
        return domains
    except OSError as error:
        raise ConfigError(top, 0, f"it cannot be read: {error.strerror}") from error
    for name in names:
        directory = os.path.join(top, name)
        if name.startswith(".") or not os.path.isdir(directory):
            continue
        with collected(problems):
            try:
                domains[domain_to_unicode(name)] = directory
            except ValueError as error:
                raise ConfigError(directory, 0, f"expected a domain name: {error}") from error
    return domains


# --- The keys ---


class _Row(NamedTuple):
    """What Config says of a key; the name of its field is that of the key."""

    read: Callable[[Value], object]
    default: object
    repeated: bool
    help: str


_ROWS: list[_Row] = []


def _key(read: Callable[[Value], T], default: T, help: str) -> T:
    """Add a row, and return the default."""
    _ROWS.append(_Row(read, default, False, help))
    return default


def _repeated(read: Callable[[Value], T], default: tuple[T, ...], help: str) -> tuple[T, ...]:
    """Add the row of a key that may be repeated, and return the default."""
    _ROWS.append(_Row(read, default, True, help))
    return default


# fmt: off
class Config(NamedTuple):
    """What chasquid.conf says: the table of its keys, in the order in which they are printed.

    Durations are in seconds, sizes in MB of 1024 * 1024 octets; "" and 0 stand for none.
    `config_dir`, the absolute path of the configuration directory, is no key.
    """

    config_dir: str
    hostname: str = _key(_hostname, "",
        "The name of this host in greetings and Received fields.")
    max_data_size_mb: int = _key(_count, 50,
        "The largest message, in MB of 1024 * 1024 octets.")
    smtp_address: tuple[str, ...] = _repeated(_listen_address, ("systemd",),
        'Where to listen for mail from other servers: "systemd", "host:port" or ":port".')
    submission_address: tuple[str, ...] = _repeated(_listen_address, ("systemd",),
        'Where to listen for mail from users, with STARTTLS: "systemd", "host:port" or ":port".')
    submission_over_tls_address: tuple[str, ...] = _repeated(_listen_address, ("systemd",),
        "Where to listen for mail from users, with TLS from the first octet, likewise.")
    mail_delivery_agent_bin: str = _key(_program, "",
        "The program that delivers mail for local users: a path, or a name to be found in PATH.")
    mail_delivery_agent_args: tuple[str, ...] = _repeated(_text, (),
        "The arguments of that program; without any, they are -f %from% -d %to_user%.")
    lmtp_address: str = _key(_lmtp_address, "",
        'Where mail for local users is delivered over LMTP: the path of a socket, or "host:port".')
    maildir: str = _key(_maildir, "%data_dir%/mail/%to_domain%/%to_user%",
        "The Maildir of a user, if neither a program nor LMTP takes the mail; %to% is the address.")
    data_dir: str = _key(_directory, "/var/lib/chasquid",
        "Where the queue, the Maildirs, and what is known of other domains are.")
    user: str = _key(_text, "chasquid",
        "Whom a server that root has started becomes once its ports are open; if empty, nobody.")
    suffix_separators: str = _key(_text, "+",
        "What follows one of these characters in a local part is ignored: ana+shop@ is ana@.")
    drop_characters: str = _key(_text, ".",
        "These characters in a local part are ignored: a.na@ is ana@.")
    mail_log_path: str = _key(_log_path, "<syslog>",
        'The log of what happens to messages: a path, "<syslog>", "<stdout>" or "<stderr>".')
    log_path: str = _key(_log_path, "<stderr>",
        "The log of what the server does and what is wrong with it, likewise.")
    dns_server: tuple[str, ...] = _repeated(_name_server, (),
        'The name servers to ask, "ip" or "ip:port"; without any, those of /etc/resolv.conf.')
    dns_trust_ad: bool = _key(_flag, False,
        "Whether name servers on other machines are believed that an answer is signed (DNSSEC).")
    dmarc_policy: str = _key(_dmarc_policy, "enforce",
        'What to do if DMARC fails: "enforce" the policy of the domain, or only "report" it.')
    outgoing_smtp_port: int = _key(_port, 25,
        "The port of other servers that mail is sent to; only tests need another one.")
    max_received_headers: int = _key(_count, 50,
        "A message with more Received fields than this is taken to be in a loop.")
    max_queue_items: int = _key(_count, 200,
        "With this many messages in the queue, new ones are refused for the time being.")
    give_up_send_after: float = _key(_duration, 20 * 3600.0,
        "A message that could not be delivered for this long goes back to its sender.")
    reload_every: float = _key(_duration, 30.0,
        "How often to look whether users, aliases, DKIM keys or certificates have changed.")
    monitoring_address: str = _key(_monitoring_address, "",
        'Where to serve the page and the metrics over HTTP: "systemd", "host:port" or ":port".')
    acme: bool = _key(_flag, False,
        "Whether certificates are fetched by ACME; true accepts the terms of the authority.")
    acme_url: str = _key(_acme_url, "https://acme-v02.api.letsencrypt.org/directory",
        "The directory of that authority, as it tells it; by default Let's Encrypt.")
    web_address: tuple[str, ...] = _repeated(_listen_address, (),
        'Where to serve ACME, MTA-STS and autoconfig, HTTP and HTTPS on one port, likewise.')
    dovecot_auth: bool = _key(_flag, False,
        "Whether Dovecot is asked too who has a mailbox and whose password is right.")
    dovecot_userdb_path: str = _key(_path, "",
        "Dovecot's socket that knows who has a mailbox; if empty, where Dovecot usually has it.")
    dovecot_client_path: str = _key(_path, "",
        "Dovecot's socket that checks passwords, likewise.")
    haproxy_incoming: bool = _key(_flag, False,
        "Whether connections come from a proxy that says whose they are (PROXY protocol, 1 or 2).")
    trusted_relay: tuple[str, ...] = _repeated(_network, (),
        "Addresses or networks that pass mail on to this host; SPF, DMARC and limits skip them.")
    smarthost: str = _key(_smarthost, "",
        'The server that mail for other servers goes through, "host:port".')
    smarthost_user: str = _key(_text, "",
        "The user to log in to the smarthost as; it needs smarthost_password_file.")
    smarthost_password_file: str = _key(_path, "",
        "The file that holds the password of that user, and nothing else.")
    smarthost_after: int = _key(_limit, 0,
        "How often a message is first tried without the smarthost.")
    sender_must_match: bool = _key(_flag, False,
        "Whether users can send only from their own address, or from an alias that leads to them.")
    limit_loopback: bool = _key(_flag, False,
        "Whether the limits on clients, users and logins hold on this machine too.")
    max_connections: int = _key(_limit, 0,
        "How many connections there may be; 0: as many as the limit on open files allows.")
    max_connections_per_address: int = _key(_limit, 50,
        "How many connections one client may have at a time.")
    max_connections_per_minute: int = _key(_limit, 300,
        "How many connections one client may open in a minute.")
    max_messages_per_minute: int = _key(_limit, 100,
        "How many messages one client may begin in a minute, without a login.")
    max_recipients_per_minute: int = _key(_limit, 500,
        "How many recipients one client may name in a minute, without a login.")
    max_user_messages_per_minute: int = _key(_limit, 60,
        "How many messages a user who has logged in may begin in a minute, from wherever.")
    max_user_recipients_per_minute: int = _key(_limit, 300,
        "How many recipients a user who has logged in may name in a minute, from wherever.")
    max_failed_logins: int = _key(_limit, 10,
        "With so many failed logins within an hour, a client cannot log in.")
    min_octets_per_second: int = _key(_limit, 100,
        "A message that comes in more slowly than this, after its first minute, is broken off.")
    min_free_disk_mb: int = _key(_limit, 50,
        "Mail is refused unless so many MB, or a tenth of the disk, are free for data_dir.")
# fmt: on


_KEYS = dict(zip(Config._fields[1:], _ROWS, strict=True))


# ======================================================================================
# ROOM: LOG
#
# What the server tells people and programs. The server log says what it does and what is
# wrong with it; the mail log has a line for each thing that happens to a message or in a
# session, with its id, so that a search for the id tells its story. Metrics count.
#
# - A line is an event with fields, "event=delivered id=… to=<…> status=2.0.0". Each event and
#   each metric is declared once, in `Events` and `Metrics`; the page, `explain`, the filter for
#   fail2ban and the README's table follow from that. No program reads the sentences in `text`.
# - A line is one line, and a value cannot look like another field: whatever came from
#   outside is made printable, and quoted if there is a blank in it.
# - A log that cannot be written never stops the mail.
# ======================================================================================


class Sink:
    """Where lines go: "<stdout>", "<stderr>", "<syslog>" or a file, made when it is missing.

    Raises ConfigError if the file cannot be opened.
    """

    def __init__(self, target: str, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._file: IO[str] | None = None
        self._syslog: socket.socket | None = None
        self._lock = threading.Lock()
        self._second = -1  # the second that was last written, and its text
        self._second_text = ""
        self._is_pipe = False
        self._journal = False  # systemd's journal adds the time itself
        self.reopen()

    def reopen(self) -> None:
        """Open the file anew, as after a rotation; nothing if it is no file."""
        self._open()
        self._is_pipe = self._file is not None and self._writes_to_pipe(self._file)

    @staticmethod
    def _writes_to_pipe(file: IO[str]) -> bool:
        try:
            mode = os.fstat(file.fileno()).st_mode
        except (OSError, ValueError):
            return False
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)

    def _open(self) -> None:
        if self._target == "<stdout>":
            self._file = sys.stdout
        elif self._target == "<stderr>":
            self._file = sys.stderr
            self._journal = self._is_journal()
        elif self._target == "<syslog>":
            self._open_syslog()
        else:
            try:
                os.makedirs(os.path.dirname(self._target) or ".", exist_ok=True)
                file = open(self._target, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
            except OSError as error:
                text = f"the log cannot be opened: {error.strerror}"
                raise ConfigError(self._target, 0, text) from error
            if self._file is not None:
                self._file.close()
            self._file = file

    def close(self) -> None:
        """Close the file; the standard streams stay open."""
        with self._lock:
            if self._syslog is not None:
                self._syslog.close()
            elif self._file is not None and not self._target.startswith("<"):
                self._file.close()
            self._syslog = self._file = None

    def write(self, text: str) -> None:
        """Write one line, with the time in front; a failure to write is swallowed."""
        now = self._clock.time()
        with self._lock:
            try:
                if self._syslog is not None:
                    self._send_to_syslog(text)
                elif self._file is not None:
                    stamp = "" if self._journal else f"{self._stamp(now)} "
                    self._write_line(f"{stamp}{text}\n")
            except (OSError, ValueError):
                pass  # the mail goes on when its log cannot

    @staticmethod
    def _is_journal() -> bool:
        """Tell whether standard error goes to the journal; see systemd.exec(5)."""
        try:
            status = os.fstat(2)
        except OSError:
            return False
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"

    def _stamp(self, now: float) -> str:
        if int(now) != self._second:
            self._second = int(now)
            self._second_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return f"{self._second_text}.{int(now % 1 * 1000):03}"

    def _write_line(self, line: str) -> None:
        """Write a line, unless it goes to a pipe that nobody empties.

        A pipe that can be written at all takes PIPE_BUF octets without blocking.
        """
        assert self._file is not None
        if self._is_pipe:
            if not select.select([], [self._file], [], 0)[1]:
                return
            line = line.encode("utf-8", "replace")[: select.PIPE_BUF - 1].decode("utf-8", "ignore")
            line = line.rstrip("\n") + "\n"
        self._file.write(line)
        self._file.flush()

    def _send_to_syslog(self, text: str) -> None:
        # RFC 3164: facility mail (2), severity info (6)
        line = f"<22>chasquid[{os.getpid()}]: {text}".encode()
        try:
            assert self._syslog is not None
            self._syslog.send(line)
        except (ConnectionError, FileNotFoundError):  # syslogd was started anew
            self._open_syslog()
            if self._syslog is not None:
                self._syslog.send(line)

    def _open_syslog(self) -> None:
        if self._syslog is not None:
            self._syslog.close()
            self._syslog = None
        for path in ("/dev/log", "/var/run/syslog"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            connection.setblocking(False)
            try:
                connection.connect(path)
            except OSError:
                connection.close()
            else:
                self._syslog = connection
                return
        self._file = sys.stderr


_DIALOGUE_COUNT = 50  # recent sessions that are kept for people
DIALOGUE_LINES = 100  # of each
_DIALOGUE_LINE = 300  # characters


class Dialogue:
    """What was said in a session, for people: lines that begin with "C: " or "S: "."""

    def __init__(self, port: str, peer: str, began: float, limit: int = DIALOGUE_LINES) -> None:
        self.port = port
        self.peer = peer
        self.began = began
        self._limit = limit
        self.open = True
        self.client_spoke = False
        self.sender = ""  # of the last transaction, with "<" and ">"
        self.recipients: list[str] = []
        self.outcome = ""  # of the last transaction, or why the last command was refused
        self._said: list[tuple[str, object]] = []

    def add(self, who: str, said: object) -> None:
        """Note a line of `who`, "C" or "S" ("*" for a remark), unless there are enough already."""
        self.client_spoke = self.client_spoke or who == "C"
        if len(self._said) < self._limit:
            short = said[: _DIALOGUE_LINE + 1] if isinstance(said, str) else said
            self._said.append((who, short))

    @property
    def lines(self) -> list[str]:
        """The lines, made printable only now: most are never looked at."""
        return [f"{who}: {printable(str(said), _DIALOGUE_LINE)}" for who, said in list(self._said)]


class LogEvent(NamedTuple):
    """A kind of line in a log: its name, its fields in their order, and what it tells.

    Those of `mail` go to the mail log, others to the server log. A field that is a word of
    Python's has "_" behind it when it is passed.
    """

    name: str
    fields: Mapping[str, str]  # as it is passed, and as it is written
    mail: bool
    help: str


def _event(name: str, fields: str, help: str, mail: bool = True) -> LogEvent:
    return LogEvent(name, {field: field.rstrip("_") for field in fields.split()}, mail, help)


# A value without blanks, quotes and backslashes stands bare; `_quoted` has any other.
_VALUE_LIMIT = 1500  # characters
_BARE = re.compile(rf"[!#-\[\]-~]{{1,{_VALUE_LIMIT}}}")
_LOGGED_FIELD = re.compile(r'([a-z][a-z-]*)=(?:"((?:[^"\\]|\\.)*)"|(\S*))(?: |$)')


def _addresses(value: object) -> str:
    """Return one address, or several, as they stand in a field."""
    if isinstance(value, str):
        return f"<{value}>"
    assert isinstance(value, Iterable)
    return ",".join([f"<{address}>" for address in value])


def addresses_in(value: str) -> list[str]:
    """Return the addresses in a field; "" for the null reverse-path."""
    return [part.strip("<>") for part in value.split(",")]


def _quoted(text: str) -> str:
    """Return a value that is not bare."""
    text = printable(text, _VALUE_LIMIT)
    if re.search(r'[\s"\\]', text) or not text:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def parse_event(line: str) -> tuple[str, dict[str, str]]:
    """Return what stands before the event in a line of a log (the time), and its fields.

    The fields are empty if there is no event in the line. No value can look like a field: one
    with a blank in it is quoted.
    """
    start = line.find("event=")
    fields: dict[str, str] = {}
    place = start
    while start >= 0 and (match := _LOGGED_FIELD.match(line, place)) is not None:
        name, quoted, bare = match.groups()
        fields[name] = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        place = match.end()
    return (line[:start], fields) if fields.get("event") else (line, {})


class Metric(NamedTuple):
    """A counter, as `log.count` knows it and MONITORING shows it.

    `known` are the values of its labels that are shown from the start, as 0.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()


class Events:
    """All events that there are: a new kind of line is one row here."""

    # The server log. What a person reads and no program has a field of its own yet is a sentence.
    INFO = _event("info", "source text", "something to know", mail=False)
    WARNING = _event("warning", "source text", "something that is probably not meant", mail=False)
    ERROR = _event("error", "source text", "something that has failed", mail=False)
    CRASH = _event("crash", "source text at", "a fault of chasquid itself; report it", mail=False)
    STARTING = _event("starting", "version host", "the server starts", mail=False)
    LISTENING = _event("listening", "port address", "connections are taken here", mail=False)
    READY = _event("ready", "", "all is loaded; systemd hears of it too", mail=False)
    RELOADED = _event("reloaded", "problems", "the files were read again", mail=False)
    STOPPING = _event("stopping", "", "the server was told to end", mail=False)
    STOPPED = _event("stopped", "", "it has ended", mail=False)

    # The mail log: what clients did, then what became of messages.
    LOGIN = _event("login", "id peer port user", "a user has logged in")
    LOGIN_FAILED = _event("login-failed", "id peer port user", "user or password was wrong")
    REJECTED = _event(
        "rejected",
        "id peer port limit code status from_ to spf dkim dmarc text",
        "a command or a message was refused; with `limit`, for going too far",
    )
    SENT_AWAY = _event("sent-away", "id peer port errors", "too many errors ended the connection")
    ENDED_EARLY = _event("ended-early", "id peer port text", "a connection broke")
    FAULT = _event("fault", "id peer port stage", "a fault was injected, by a test server")
    CAPTURED = _event("captured", "id peer port from_", "a test server has a message")
    QUEUED = _event(
        "queued",
        "id from_ to size peer port helo user tls spf dkim dmarc about kind",
        "a message was accepted; with `about`, a notification about that one",
    )
    FOUND = _event("found", "id from_", "a message was in the queue at the start")
    TAKEN_OVER = _event("taken-over", "id file", "a message came from the queue of chasquid in Go")
    DELIVERED = _event("delivered", "id from_ to route status text", "a recipient has it")
    DEFERRED = _event("deferred", "id from_ to route status text", "an attempt failed for now")
    FAILED = _event("failed", "id from_ to route status text", "an attempt failed for good")
    GIVEN_UP = _event("given-up", "id to status text", "there are no more attempts for a recipient")
    NOT_NOTIFIED = _event("not-notified", "id text", "nobody hears of a failure")
    NEXT_ATTEMPT = _event("next-attempt", "id pause", "what is left waits")
    DONE = _event("done", "id attempts", "a message has left the queue")
    REMOVED = _event("removed", "id", "the operator has removed a message")
    LOST = _event("lost", "id text", "the file of a message is gone from the queue")

    BY_NAME = {event.name: event for event in list(vars().values()) if isinstance(event, LogEvent)}


def _each(*values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


_CHECK_RESULTS = ("pass", "fail", "softfail", "neutral", "none", "temperror", "permerror")


class Metrics:
    """All counters that there are; gauges are MONITORING's."""

    CONNECTIONS = Metric(
        "connections", "Connections that came in.", ("port",),
        _each("smtp", "submission", "submission over TLS", "refused"),
    )  # fmt: skip
    COMMANDS = Metric(
        "commands", "Commands of clients.", ("verb",),
        _each("HELO", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BDAT", "RSET", "NOOP",
              "VRFY", "EXPN", "HELP", "QUIT"),
    )  # fmt: skip
    REJECTIONS = Metric(
        "rejections", "Replies that refused something.", ("code",),
        _each("421", "450", "451", "452", "454", "500", "501", "502", "503", "504", "521", "530",
              "535", "538", "550", "552", "553", "554", "555"),
    )  # fmt: skip
    LOGINS = Metric("logins", "Logins.", ("result",), _each("succeeded", "failed", "not checked"))
    LIMITS = Metric(
        "limits", "Refusals because of a limit.", ("limit",), _each("connections", "rate")
    )
    MESSAGES = Metric("messages", "Messages accepted.", ("state",), _each("queued"))
    DELIVERIES = Metric(
        "deliveries", "Attempts, for each recipient.", ("route", "result"),
        tuple(itertools.product(
            ("local", "pipe", "mx", "via", "smarthost"), ("sent", "deferred", "failed")
        )),
    )  # fmt: skip
    NOTIFICATIONS = Metric(
        "notifications", "Notifications sent.", ("kind",),
        _each("failed", "delayed", "delivered", "relayed"),
    )  # fmt: skip
    SPF = Metric("spf", "Results of SPF.", ("result",), _each(*_CHECK_RESULTS))
    DKIM = Metric(
        "dkim", "Results of DKIM, for each signature.", ("result",),
        _each("pass", "fail", "policy", "neutral", "none", "temperror", "permerror"),
    )  # fmt: skip
    DKIM_SIGNATURES = Metric("dkim_signatures", "Messages signed.", ("state",), _each("made"))
    DMARC = Metric(
        "dmarc", "Results of DMARC.", ("result",),
        _each("pass", "fail", "none", "temperror", "permerror"),
    )  # fmt: skip
    SECURITY_LEVELS = Metric(
        "security_levels", "Levels seen, and refused downgrades.", ("direction", "level"),
        (("in", "PLAIN"), ("in", "TLS_CLIENT"), ("out", "PLAIN"), ("out", "TLS_INSECURE"),
         ("out", "TLS_SECURE"), ("refused", "in"), ("refused", "out")),
    )  # fmt: skip
    MTA_STS = Metric("mta_sts", "MTA-STS policies.", ("result",), _each("fetched", "failed"))
    POST_DATA = Metric(
        "post_data", "Runs of the post-data hook.", ("status",), _each("0", "1", "20")
    )
    CRASHES = Metric("crashes", "Errors that nobody foresaw; see the log.")

    BY_NAME = {row.name: row for row in list(vars().values()) if isinstance(row, Metric)}


class Log:
    """The two logs and the metrics of one server, and its recent sessions."""

    def __init__(self, log: Sink, mail_log: Sink) -> None:
        self._log = log
        self._mail_log = mail_log
        self.dialogues: collections.deque[Dialogue] = collections.deque(maxlen=_DIALOGUE_COUNT)
        self.counters: collections.Counter[tuple[str, ...]] = collections.Counter()

    def event(self, event: LogEvent, **values: object) -> None:
        """Write a line; fields that are "" or None are left out.

        `from_` and `to` are addresses, one or several. Raises TypeError for a field that the
        event has not.
        """
        line = f"event={event.name}"
        for key, name in event.fields.items():
            if key not in values:
                continue
            value = values[key]
            if value is not None and name in ("from", "to"):
                value = _addresses(value)
            if value is not None and value != "":
                text = value if type(value) is str else str(value)
                line += f" {name}={text if _BARE.fullmatch(text) else _quoted(text)}"
        if not values.keys() <= event.fields.keys():
            raise TypeError(f"{event.name} has no {', '.join(values.keys() - event.fields.keys())}")
        (self._mail_log if event.mail else self._log).write(line)

    def info(self, source: str, text: str) -> None:
        """Write something to know to the server log; `source` names the part that says it."""
        self.event(Events.INFO, source=source, text=text)

    def warning(self, source: str, text: str) -> None:
        """Write what is probably not meant to the server log."""
        self.event(Events.WARNING, source=source, text=text)

    def error(self, source: str, text: str) -> None:
        """Write what has failed to the server log, with what to do, if that is known."""
        self.event(Events.ERROR, source=source, text=text)

    def crash(self, source: str, error: BaseException) -> None:
        """Log an error that nobody foresaw, with the places it came through, on one line."""
        places = []
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            places.append(f"{code.co_name}:{trace.tb_lineno}")
            trace = trace.tb_next
        self.count(Metrics.CRASHES)
        text = f"{type(error).__name__}: {error}"
        self.event(Events.CRASH, source=source, text=text, at=",".join(places[-6:]))

    def count(self, metric: Metric, *values: str) -> None:
        """Add one to a metric, with the values of its labels."""
        key = (metric.name, *values)
        assert key in self.counters or len(values) == len(metric.labels), metric.name
        self.counters[key] += 1

    def reopen(self) -> None:
        """Open both logs anew, as after a rotation. Raises ConfigError."""
        self._log.reopen()
        self._mail_log.reopen()

    def close(self) -> None:
        """Close both logs; what is written then is lost."""
        self._log.close()
        self._mail_log.close()


# ======================================================================================
# ROOM: LOOP
#
# One thread runs every dialogue, as coroutines on one selector. A coroutine gives the
# thread up only by awaiting one of the waits below; what lies between two waits
# happens at once, so no locks are needed.
#
# - A task has one deadline, the nearest of those it is inside (`Loop.deadline`). When it
#   passes, `Expired` is raised at the wait. Most deadlines never pass, so setting one
#   only writes a number; the heap learns of it when the task next sleeps, and an entry
#   that comes up too early is put back. The entries of tasks that have ended are taken out
#   once they are half of the heap, so what has ended holds no memory.
# - A job in a worker thread cannot be taken back. Expiry and cancellation wait for it.
# - A descriptor stays registered when nobody waits for it, and is taken off only when it
#   becomes ready to nobody: so a dialogue costs one registration, not one per line.
# - A task that fails harms no other: its error goes to whoever joins it, else to the log.
#
# Why it is not asyncio: that takes 142 ms to import cold, 4 to 5 MB more, and is no faster
# for dialogues; here a deadline costs one number, and a server for tests starts in a
# millisecond.
#
# The room knows nothing of sockets' contents, nor of why anybody waits.
# ======================================================================================

PROGRAM_OUTPUT_LIMIT = 64 * 1024  # octets kept of what a program prints


_IN_MEMORY = 1024 * 1024  # octets of a program's input that are not written to a disk
_SYSTEMD_VARIABLES = {"LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET"}
_STALE_TIMERS = 64  # so few are not worth a new heap
_ROUNDS = 4  # steps of a task in one turn, at most


class Workers:
    """A few threads for what blocks or computes.

    A job is called in one of them, and then `done` in the same thread with the result
    or the error; nothing is said about the order of jobs.
    """

    def __init__(self, count: int, name: str = "worker") -> None:
        self._jobs: thread_queue.SimpleQueue[
            tuple[Callable[[], object], Callable[[object, BaseException | None], None]] | None
        ] = thread_queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._count = count
        self._name = name

    def submit(
        self, job: Callable[[], object], done: Callable[[object, BaseException | None], None]
    ) -> None:
        """Have `job` called in a thread; threads start when they are first needed.

        Raises ChasquidError if there is no thread and none can be started.
        """
        if len(self._threads) < self._count:
            self._start_thread()
        self._jobs.put((job, done))

    def _start_thread(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise ChasquidError(f"no worker thread can be started: {error}") from error
        else:
            self._threads.append(thread)

    def close(self) -> None:
        """Let the jobs under way finish and end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                result = job[0]()
            except BaseException as error:
                job[1](None, error)
            else:
                job[1](result, None)
            job = None  # a thread that waits must not keep the last message alive


class Expired(ChasquidError):
    """A deadline passed while a task was waiting."""


class Cancelled(BaseException):
    """The task was told to end. Catch it only to clean up, and raise it again."""


@types.coroutine
def _pause() -> Generator[None, Any, Any]:
    return (yield)


class Task:
    """A running coroutine: its state, its deadline, and who waits for its end."""

    __slots__ = (
        "begun", "cancelled", "coroutine", "deadline", "done", "error", "joiners", "loop", "name",
        "result", "shielded", "timer", "timers", "waiting", "waits",
    )  # fmt: skip

    def __init__(self, loop: Loop, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        self.loop = loop
        self.coroutine = coroutine
        self.name = name
        self.begun = False
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.joiners: list[Task] = []
        self.deadline = float("inf")
        self.timer = float("inf")  # when the heap will next look at this task
        self.timers = 0  # its entries in the heap
        self.waits = 0  # tells one wait of the task from the next
        self.waiting = False
        self.shielded = False
        self.cancelled = False

    async def join(self) -> Any:
        """Wait for the end of this task; return its result or raise its error."""
        if not self.done:
            task = self.loop.current
            self.joiners.append(task)
            try:
                await _pause()
            finally:
                if task in self.joiners:
                    self.joiners.remove(task)
        if self.error is not None:
            raise self.error
        return self.result

    def cancel(self) -> None:
        """Raise `Cancelled` if the task waits: now, or when a worker gives it back."""
        if self.waiting and not self.shielded:
            self.loop.wake(self, None, Cancelled())
        elif not self.done:
            self.cancelled = True


class _Watch:
    __slots__ = ("events", "reader", "writer")

    def __init__(self) -> None:
        self.events = 0
        self.reader: Task | None = None
        self.writer: Task | None = None


class _Deadline:
    __slots__ = ("_loop", "_outer", "_when")

    def __init__(self, loop: Loop, when: float) -> None:
        self._loop = loop
        self._when = when

    def __enter__(self) -> None:
        task = self._loop.current
        self._outer = task.deadline
        if self._when < task.deadline:
            task.deadline = self._when

    def __exit__(self, *_: object) -> None:
        self._loop.current.deadline = self._outer


class Loop:
    """Runs tasks. Belongs to the thread that calls `run`; only `post` is for others.

    `on_crash` is told of a task that failed while nobody waited for it.
    """

    current: Task

    def __init__(
        self, clock: Clock, workers: Workers, on_crash: Callable[[str, BaseException], None]
    ) -> None:
        self.clock = clock
        self._workers = workers
        self._on_crash = on_crash
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, _Watch] = {}
        self._ready: collections.deque[tuple[Task, Any, BaseException | None]] = collections.deque()
        self._timers: list[tuple[float, int, Task, int]] = []
        self._timer_number = 0
        self._stale_timers = 0  # entries of tasks that have ended
        self._tasks: set[Task] = set()
        self._posted: collections.deque[Callable[[], object]] = collections.deque()
        self._asleep = False
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, None)

    @property
    def wakeup_fd(self) -> int:
        """The descriptor for `signal.set_wakeup_fd`, so that a signal ends the sleep."""
        return self._wake_sender.fileno()

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run until `main` ends, then cancel what is left; return what `main` returned."""
        task = self.spawn(main, "main")
        task.joiners.append(task)  # so that its error is raised here, not reported as a crash
        try:
            while not task.done:
                self._turn()
        finally:
            self._end()
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[no-any-return]

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> Task:
        """Start a task; it takes its first step in the next turn of the loop."""
        task = Task(self, coroutine, name)
        self._tasks.add(task)
        self._ready.append((task, None, None))
        return task

    def post(self, call: Callable[[], object]) -> None:
        """Have `call` called by the loop soon. May be used from any thread."""
        self._posted.append(call)
        if self._asleep:
            with contextlib.suppress(OSError):  # a full pipe wakes the loop as well
                self._wake_sender.send(b"\0")

    def wake(self, task: Task, value: Any = None, error: BaseException | None = None) -> None:
        """Let a waiting task go on with `value`, or have `error` raised in it."""
        if task.waiting:
            task.waiting = False
            self._ready.append((task, value, error))

    def deadline(self, seconds: float) -> _Deadline:
        """Return a context in which waits raise `Expired` after `seconds` from now."""
        return _Deadline(self, self.clock.monotonic() + seconds)

    async def sleep(self, seconds: float) -> None:
        """Wait so many seconds. Raises Expired, Cancelled."""
        task = self.current
        self._add_timer(self.clock.monotonic() + seconds, task, task.waits)
        try:
            await _pause()
        finally:
            task.waits += 1

    async def turn(self) -> None:
        """Let the other tasks go on for a turn."""
        await self.sleep(0.0)

    async def readable(self, fd: int) -> None:
        """Wait until `fd` can be read. One task at a time may wait for that."""
        watch = self._watch(fd, selectors.EVENT_READ)
        watch.reader = self.current
        try:
            await _pause()
        finally:
            watch.reader = None

    async def writable(self, fd: int) -> None:
        """Wait until `fd` can be written. One task at a time may wait for that."""
        watch = self._watch(fd, selectors.EVENT_WRITE)
        watch.writer = self.current
        try:
            await _pause()
        finally:
            watch.writer = None

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; must be called before it is closed."""
        watch = self._watches.pop(fd, None)
        if watch is not None and watch.events:
            self._selector.unregister(fd)

    async def work(self, job: Callable[[], T]) -> T:
        """Have `job` called in a worker thread and return its result."""
        results: list[T] = []
        await self.work_together(lambda: results.append(job()), 1)
        return results[0]

    async def work_together(self, job: Callable[[], object], count: int) -> None:
        """Have `count` worker threads call `job`, which shares the work out itself.

        The task goes on when all have ended; the first error of any is raised.
        """
        task = self.current
        ended = itertools.count(1)
        errors: list[BaseException] = []

        def done(result: object, error: BaseException | None) -> None:
            if error is not None:
                errors.append(error)
            if next(ended) == count:
                self.post(lambda: self.wake(task, None, errors[0] if errors else None))

        task.shielded = True
        try:
            for _ in range(count):
                self._workers.submit(job, done)
            await _pause()
        finally:
            task.shielded = False

    def _turn(self) -> None:
        self._asleep = True
        timeout = 0.0 if self._ready or self._posted else self._until_timer()
        events = self._selector.select(timeout)
        self._asleep = False
        self._fire_timers()  # first, or who is always ready would never be late
        for key, mask in events:
            if key.data is None:
                self._drain_wakeups()
            else:
                self._dispatch(key.fd, key.data, mask)
        for _ in range(_ROUNDS):  # what one task wakes goes on before the selector is asked
            while self._posted:
                self._posted.popleft()()
            for _ in range(len(self._ready)):
                self._step(*self._ready.popleft())
            if not self._ready:
                break

    def _until_timer(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - self.clock.monotonic())

    def _drain_wakeups(self) -> None:
        try:
            while self._wake_receiver.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _watch(self, fd: int, event: int) -> _Watch:
        watch = self._watches.get(fd)
        if watch is None:
            watch = self._watches[fd] = _Watch()
        if not watch.events & event:
            self._register(fd, watch, watch.events | event)
        return watch

    def _register(self, fd: int, watch: _Watch, events: int) -> None:
        if not watch.events:
            self._selector.register(fd, events, watch)
        elif events:
            self._selector.modify(fd, events, watch)
        else:
            self._selector.unregister(fd)
        watch.events = events

    def _dispatch(self, fd: int, watch: _Watch, mask: int) -> None:
        unwanted = 0
        if mask & selectors.EVENT_READ:
            if watch.reader is not None:
                self.wake(watch.reader)
            else:
                unwanted |= selectors.EVENT_READ
        if mask & selectors.EVENT_WRITE:
            if watch.writer is not None:
                self.wake(watch.writer)
            else:
                unwanted |= selectors.EVENT_WRITE
        if unwanted:
            self._register(fd, watch, watch.events & ~unwanted)

    def _add_timer(self, when: float, task: Task, wait: int) -> None:
        self._timer_number += 1
        task.timers += 1
        heapq.heappush(self._timers, (when, self._timer_number, task, wait))

    def _fire_timers(self) -> None:
        if not self._timers:
            return
        now = self.clock.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, task, wait = heapq.heappop(self._timers)
            if task.done:
                self._stale_timers -= 1
                continue
            task.timers -= 1
            if wait >= 0:
                if task.waits == wait:
                    self.wake(task)
                continue
            task.timer = float("inf")
            if not task.waiting or task.shielded:
                continue  # the task arms its timer again when it next pauses
            if task.deadline <= now:
                self.wake(task, None, Expired("the time limit has passed"))
            else:
                self._arm(task)

    def _arm(self, task: Task) -> None:
        if task.deadline < task.timer:
            task.timer = task.deadline
            self._add_timer(task.deadline, task, -1)

    def _step(self, task: Task, value: Any, error: BaseException | None) -> None:
        self.current = task
        if task.cancelled and task.begun and not task.shielded:
            task.cancelled = False
            error = Cancelled()
        task.begun = True  # a task that was cancelled before still comes to its first wait
        try:
            if error is None:
                task.coroutine.send(value)
            else:
                task.coroutine.throw(error)
        except StopIteration as stop:
            self._finish(task, stop.value, None)
        except (KeyboardInterrupt, SystemExit) as end:
            self._finish(task, None, end)
            raise
        except BaseException as failure:
            self._finish(task, None, failure)
        else:
            task.waiting = True
            if task.cancelled and not task.shielded:
                task.cancelled = False
                self.wake(task, None, Cancelled())
            elif task.deadline < task.timer:
                self._arm(task)

    def _finish(self, task: Task, result: Any, error: BaseException | None) -> None:
        task.done, task.result, task.error = True, result, error
        self._tasks.discard(task)
        self._stale_timers += task.timers
        if self._stale_timers > max(_STALE_TIMERS, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if not entry[2].done]
            heapq.heapify(self._timers)
            self._stale_timers = 0
        if isinstance(error, Exception) and not task.joiners:
            self._on_crash(task.name, error)
        for joiner in task.joiners:
            self.wake(joiner)

    def _end(self) -> None:
        told: set[Task] = set()
        while self._tasks:
            for task in self._tasks - told:
                task.cancel()
                told.add(task)
            self._turn()

    def close(self) -> None:
        """Give back the loop's own descriptors, when nothing runs any more."""
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()


class Event:
    """Something that happens once, or again after `clear`; tasks wait for it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: set[Task] = set()
        self.is_set = False

    def set(self) -> None:
        """Let those go on who wait, and who will."""
        self.is_set = True
        for task in self._waiting:
            self._loop.wake(task)

    def clear(self) -> None:
        """Have those wait who come from now on."""
        self.is_set = False

    async def wait(self) -> None:
        """Return as soon as it is set. Raises Expired, Cancelled."""
        task = self._loop.current
        self._waiting.add(task)
        try:
            while not self.is_set:
                await _pause()
        finally:
            self._waiting.discard(task)


async def ended(task: Task) -> None:
    """Wait for the end of a task, which may have been cancelled. Raises its error."""
    try:
        await task.join()
    except Cancelled:
        if not task.done:
            raise


async def together(loop: Loop, waits: Sequence[Coroutine[Any, Any, Any]]) -> None:
    """Run all of `waits` at the same time, and wait for their end.

    What one of them raises is raised here when all have ended. Where the wait itself is
    cut short, they are cancelled.
    """
    if len(waits) == 1:
        await waits[0]
        return
    errors = []

    async def guarded(wait: Coroutine[Any, Any, Any]) -> None:
        try:
            await wait
        except Exception as error:
            errors.append(error)

    tasks = [loop.spawn(guarded(wait), loop.current.name) for wait in waits]
    try:
        for task in tasks:
            await task.join()
    finally:
        for task in tasks:
            if not task.done:
                task.cancel()
    if errors:
        raise errors[0]


class Slots:
    """At most `count` tasks at a time are inside `async with slots:`, in order of coming."""

    def __init__(self, loop: Loop, count: int) -> None:
        self._loop = loop
        self._free = count
        self._queue: collections.deque[Task] = collections.deque()
        self._granted: set[Task] = set()

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        task = self._loop.current
        self._queue.append(task)
        try:
            await _pause()
        except BaseException:
            if task in self._granted:
                self._granted.discard(task)
                self._release()
            else:
                self._queue.remove(task)
            raise
        self._granted.discard(task)

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._queue:
            task = self._queue.popleft()
            self._granted.add(task)
            self._loop.wake(task)
        else:
            self._free += 1


class Spawn(Protocol):
    """How a child process is started: `subprocess.Popen`, or what a test puts there.

    `stdin` is a descriptor of a file that the program reads from its beginning.
    """

    def __call__(
        self, argv: Sequence[str], *, stdin: int, env: Mapping[str, str], cwd: str | None
    ) -> subprocess.Popen[bytes]: ...


class Outcome(NamedTuple):
    """How a program ended: its exit status (negative: the signal), and what it printed."""

    status: int
    output: bytes
    errors: bytes


def spawn_program(
    argv: Sequence[str], *, stdin: int, env: Mapping[str, str], cwd: str | None
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, with pipes from it. Raises OSError."""
    import subprocess  # 12 ms; many servers never start a program

    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, stdin=stdin, stdout=pipe, stderr=pipe, env=env, cwd=cwd, start_new_session=True
    )


def inherited_environment() -> dict[str, str]:
    """Return our environment for a program, without what systemd tells us alone."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        **{key: value for key, value in os.environ.items() if key not in _SYSTEMD_VARIABLES},
    }


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to `fd`. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _nameless_file(chunks: Iterable[bytes]) -> int:
    """Return a descriptor of a file without a name that holds `chunks`. Blocks; raises OSError.

    What is small stays in memory; the rest lies where temporary files do.
    """
    import tempfile  # only for programs; it loads random

    rest = iter(chunks)
    held: list[bytes] = []
    while sum(map(len, held)) < _IN_MEMORY and (chunk := next(rest, None)) is not None:
        held.append(chunk)
    small = sum(map(len, held)) < _IN_MEMORY and hasattr(os, "memfd_create")
    with contextlib.ExitStack() as stack:
        if small:
            fd = os.memfd_create("message")
        else:
            fd = os.dup(stack.enter_context(tempfile.TemporaryFile()).fileno())
        try:
            for chunk in itertools.chain(held, rest):
                write_all(fd, chunk)
            os.lseek(fd, 0, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return fd


class Programs:
    """Runs programs on the loop, each with a time limit and a limit to what it prints."""

    def __init__(self, loop: Loop, spawn: Spawn = spawn_program) -> None:
        self._loop = loop
        self._spawn = spawn

    async def run(
        self,
        argv: Sequence[str],
        input: Iterable[bytes],
        seconds: float,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> Outcome:
        """Run a program that reads `input`, and wait until it ends.

        Its standard input is a file that is complete before the program starts: through a
        pipe, it would take the half that came before our death for the whole. Without `env`
        it has our environment. Raises OSError if it cannot be started and `Expired` if it
        takes longer than `seconds`; it and its children are killed then.
        """
        files: list[int] = []
        try:
            await self._loop.work(lambda: files.append(_nameless_file(input)))
            env = inherited_environment() if env is None else env
            process = self._spawn(argv, stdin=files[0], env=env, cwd=cwd)
        finally:
            for fd in files:
                os.close(fd)
        assert process.stdout and process.stderr
        pipes: tuple[IO[bytes], ...] = (process.stdout, process.stderr)
        for pipe in pipes:
            os.set_blocking(pipe.fileno(), False)
        output, errors = bytearray(), bytearray()
        readers = [
            self._loop.spawn(self._collect(process.stdout, output), "program output"),
            self._loop.spawn(self._collect(process.stderr, errors), "program errors"),
        ]
        try:
            with self._loop.deadline(seconds):
                status = await self._exit_status(process)
            await self._grace(readers)
        finally:
            for task in readers:
                task.cancel()
            if process.returncode is None:
                self._kill(process)
            for pipe in pipes:
                self._close(pipe)
        return Outcome(status, bytes(output), bytes(errors))

    async def _collect(self, pipe: IO[bytes], into: bytearray) -> None:
        while True:
            try:
                data = os.read(pipe.fileno(), 8192)
            except BlockingIOError:
                await self._loop.readable(pipe.fileno())
                continue
            if not data:
                return
            into += data[: PROGRAM_OUTPUT_LIMIT - len(into)]

    async def _exit_status(self, process: subprocess.Popen[bytes]) -> int:
        try:
            fd = os.pidfd_open(process.pid)
        except (AttributeError, OSError):
            return await self._poll_exit_status(process)
        try:
            await self._loop.readable(fd)
        finally:
            self._loop.forget(fd)
            os.close(fd)
        return process.wait()

    async def _poll_exit_status(self, process: subprocess.Popen[bytes]) -> int:
        """Look now and then, if there are no process descriptors (macOS)."""
        pause = 0.002
        while (status := process.poll()) is None:
            await self._loop.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        return status

    async def _grace(self, readers: list[Task]) -> None:
        """Read what the program left in its pipes, but do not wait for its children."""
        try:
            with self._loop.deadline(0.5):
                for reader in readers:
                    await reader.join()
        except Expired:
            pass

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.wait()

    def _close(self, pipe: IO[bytes]) -> None:
        if not pipe.closed:
            self._loop.forget(pipe.fileno())
            pipe.close()


# ======================================================================================
# ROOM: STORAGE
#
# Every write that must outlive a power cut goes through this room. A file counts as
# written when its data is synced and then the directory that names it; before that,
# nobody is told that it exists.
#
# The functions block, and are for commands and worker threads. `Disk` is for the loop.
# What comes at the same time is one batch: all files are written and synced, all are renamed,
# each directory is synced once, and what is done with is removed. So the device is asked
# less often, and the loop and the threads change places less often, which costs more than
# most system calls.
# ======================================================================================

CHUNK = 64 * 1024  # octets read or written at a time


def sync_directory(path: str) -> None:
    """Make the entries of the directory `path` durable. Raises OSError."""
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# A directory that is not ours to sync, or on a file system that does not know how.
_CANNOT_SYNC = {
    errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS, errno.ENOSYS, errno.ENOTSUP,
}  # fmt: skip


def make_directory(path: str, mode: int = 0o700) -> None:
    """Make the directory `path` and those above it, durably. Raises OSError.

    A directory that is there may have been made by somebody who died before its name was
    durable, so those above are synced in any case.
    """
    path = os.path.abspath(path)
    parent = os.path.dirname(path)
    if os.path.isdir(path):
        while path != parent:
            try:
                sync_directory(parent)
            except OSError as error:
                if error.errno not in _CANNOT_SYNC:
                    raise
            path, parent = parent, os.path.dirname(parent)
        return
    make_directory(parent, mode)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    if os.geteuid() == 0:
        os.chown(path, *owner_above(path), follow_symlinks=False)
    sync_directory(parent)


def owner_above(path: str) -> tuple[int, int]:
    """Return user and group of the directory that `path` is in.

    What root makes is given to them, or the server could not read it. Raises OSError.
    """
    above = os.stat(os.path.dirname(path) or ".")
    return above.st_uid, above.st_gid


def create_synced(
    path: str, chunks: Iterable[bytes], mode: int = 0o600, owner: tuple[int, int] | None = None
) -> None:
    """Create `path`, which must not exist, and sync its data; its name is not synced yet.

    Nothing is left behind if that fails. Raises OSError.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for chunk in chunks:
            write_all(fd, chunk)
        if mode != 0o600:
            os.fchmod(fd, mode)
        if owner is not None:
            os.fchown(fd, *owner)
        os.fsync(fd)
    except BaseException:
        discard_names(path)
        raise
    finally:
        os.close(fd)


def move_synced(source: str, target: str) -> None:
    """Rename `source` to `target` and make the new name durable. Raises OSError."""
    os.rename(source, target)
    sync_directory(os.path.dirname(target))


def close_written(fd: int) -> None:
    """Close a descriptor whose data was synced, or is not wanted: what fails now loses nothing."""
    with contextlib.suppress(OSError):
        os.close(fd)


def discard_names(*paths: str) -> None:
    """Remove files that were not written to their end, as durably as that can be had.

    What cannot be removed stays: it is found for what it is at the next start.
    """
    for path in filter(None, paths):
        try:
            os.unlink(path)
            sync_directory(os.path.dirname(path))
        except OSError:
            pass


def create_durably(temporary: str, chunks: Iterable[bytes], path: Callable[[int], str]) -> str:
    """Write `chunks` to a file by way of `temporary`; return its name, when that is durable.

    `path` gets the size in octets. Neither name is left if that fails. Raises OSError.
    """
    size, name = 0, ""

    def counted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            size += len(chunk)
            yield chunk

    create_synced(temporary, counted())
    try:
        name = path(size)
        move_synced(temporary, name)
    except BaseException:
        discard_names(temporary, name)
        raise
    return name


def append_synced(path: str, data: bytes) -> None:
    """Append `data` to the file at `path` and sync it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_durably(path: str, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new one.

    The mode and the owner of an existing file are kept. Raises OSError.
    """
    path = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), f".{new_id()}.tmp")
    owner = owner_above(path)
    if os.path.exists(path):
        old = os.stat(path)
        mode, owner = stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid)
    create_synced(temporary, [data], mode, owner if os.geteuid() == 0 else None)
    try:
        move_synced(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


_DISK_THREADS = 8  # at most
_QUICK_SYNC = 0.005  # seconds; a device that is no slower is served best by one thread


class _Commit:
    """A file on its way to its name: to be written, synced, renamed, its directory synced.

    `fd` is where `data` goes, -1 for a file that is to be made as `temporary`. `name` is
    what it is called now, if anything. `safe` is set when all is done; `error` says why it
    will not be.
    """

    __slots__ = ("data", "error", "fd", "name", "path", "safe", "temporary")

    def __init__(self, fd: int, data: bytes, temporary: str, path: str) -> None:
        self.fd = fd
        self.data = data
        self.temporary = temporary
        self.path = path
        self.name = temporary if fd >= 0 else ""
        self.safe = False
        self.error: BaseException | None = None

    def write(self) -> None:
        """Write and sync. Raises OSError."""
        if self.fd >= 0:
            write_all(self.fd, self.data)
            os.fsync(self.fd)
        else:
            create_synced(self.temporary, [self.data])
            self.name = self.temporary

    def rename(self) -> None:
        """Raises OSError."""
        os.rename(self.temporary, self.path)
        self.name = self.path


class _Batch:
    """What is done together, by worker threads, and who waits for it."""

    def __init__(self, loop: Loop) -> None:
        self.commits: list[_Commit] = []
        self.removals: dict[str, OSError | None] = {}
        self.done = Event(loop)
        self.failure: OSError | None = None  # if the batch was not even begun
        self._unwritten: list[_Commit] = []

    def add(self, commit: _Commit) -> None:
        self.commits.append(commit)
        self._unwritten.append(commit)

    def write(self) -> None:
        """Write and sync the files that are left; several threads may do so at a time."""
        while True:
            try:
                commit = self._unwritten.pop()
            except IndexError:
                return
            try:
                commit.write()
            except BaseException as error:
                commit.error = error

    def finish(self) -> None:
        """Write what is left, rename, sync each directory once, and remove."""
        self.write()
        directories: dict[str, list[_Commit]] = {}
        for commit in self.commits:
            try:
                if commit.error is None:
                    commit.rename()
                    directories.setdefault(os.path.dirname(commit.path), []).append(commit)
            except BaseException as error:
                commit.error = error
        for directory, commits in directories.items():
            self._finish_directory(directory, commits)
        for path in self.removals:
            try:
                os.unlink(path)
            except OSError as error:
                self.removals[path] = error

    @staticmethod
    def _finish_directory(directory: str, commits: list[_Commit]) -> None:
        error: BaseException | None = None
        try:
            sync_directory(directory)
        except BaseException as failure:
            error = failure
        for commit in commits:
            commit.safe, commit.error = error is None, error


class Disk:
    """Durable writes on the loop. All of it raises OSError.

    What is asked for while a batch is under way goes into the next one: a sync that has
    begun may have missed what was just written.

    A file system joins what several threads sync at the same time, which pays on a slow
    device; on a quick one the threads would lose more by waiting for the interpreter. So
    their number follows the time that a batch takes. The queue and the Maildirs have a
    `Disk` each, so that what comes in and what is delivered do not wait for one another.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._next: _Batch | None = None
        self._busy = False
        self._usual = 0.0  # seconds that one file takes, averaged over the last batches

    async def create(self, temporary: str, data: bytes, path: str) -> None:
        """Make a file with `data` durable under the name `path`, by way of `temporary`.

        Neither name is left if that fails.
        """
        await self._commit(_Commit(-1, data, temporary, path))

    async def commit(self, fd: int, data: bytes, temporary: str, path: str) -> None:
        """Write `data` to the end of the file behind `fd`, then as `create`."""
        await self._commit(_Commit(fd, data, temporary, path))

    async def _commit(self, commit: _Commit) -> None:
        batch = self._batch()
        batch.add(commit)
        await self._end_of(batch)
        if not commit.safe:
            discard_names(commit.name)
            error = commit.error or batch.failure
            if isinstance(error, OSError):
                raise error
            raise OSError(errno.EIO, f"the file was not written: {error}") from error

    async def remove(self, path: str) -> None:
        """Remove a file, if it is there; that this is durable is not promised."""
        batch = self._batch()
        batch.removals[path] = None
        await self._end_of(batch)
        error = batch.removals[path] or batch.failure
        if error is not None and not isinstance(error, FileNotFoundError):
            raise error

    def _batch(self) -> _Batch:
        """Return the batch that begins next."""
        if self._next is None:
            self._next = _Batch(self._loop)
            if not self._busy:
                self._busy = True
                self._loop.spawn(self._work(), "disk")
        return self._next

    async def _end_of(self, batch: _Batch) -> None:
        task = self._loop.current
        task.shielded = True  # the job cannot be taken back
        try:
            await batch.done.wait()
        finally:
            task.shielded = False

    async def _work(self) -> None:
        try:
            while (batch := self._next) is not None:
                self._next = None
                await self._do(batch)
        finally:
            self._busy = False

    async def _do(self, batch: _Batch) -> None:
        count = max(1, len(batch.commits))
        threads = min(count, _DISK_THREADS, 1 + int(self._usual / _QUICK_SYNC))
        start = self._loop.clock.monotonic()
        try:
            if threads > 1:
                await self._loop.work_together(batch.write, threads)
            await self._loop.work(batch.finish)
        except ChasquidError as error:  # there is no thread
            batch.failure = OSError(errno.EAGAIN, f"the disk was not reached: {error}")
        finally:
            batch.done.set()
        seconds = (self._loop.clock.monotonic() - start) * threads / count
        self._usual += (seconds - self._usual) / 8


# ======================================================================================
# ROOM: STREAM
#
# A connection as both sides of the protocol see it: lines and pieces in, bytes out, with
# or without TLS. The same class serves the server and the couriers.
#
# - What is written is sent when the reader has to wait, so the replies to a group of
#   pipelined commands leave together (RFC 2920, 3.2).
# - A line ends with CRLF. A CR or LF by itself is never taken for one: two programs that
#   disagree about the end of a line can be made to see different messages.
# - Starting TLS discards what was received before it (RFC 3207, 4.2 and 6).
#
# The room knows no commands. Whoever uses it sets the deadlines.
# ======================================================================================

COMMAND_LINE_LIMIT = 1000  # octets with CRLF; RFC 5321, 4.5.3.1.4 asks for 512 at least


class Disconnected(ChasquidError):
    """The other side is gone, or the connection broke."""


class LineTooLong(ChasquidError):
    """A line longer than the limit came in; it was read to its end and thrown away."""


class BareNewline(ChasquidError):
    """A CR or LF came in that was not part of a CRLF."""


class TLSFailed(ChasquidError):
    """The TLS handshake failed; `unverified` is true if only the certificate was bad."""

    def __init__(self, text: str, unverified: bool = False) -> None:
        super().__init__(text)
        self.unverified = unverified


_DER = 2  # _ssl.ENCODING_DER


class Stream:
    """A non-blocking connection, buffered both ways."""

    _STREAK = 16  # pieces read without waiting before the other tasks get a turn

    __slots__ = ("_in", "_loop", "_out", "_socket", "_streak", "tls")

    def __init__(self, loop: Loop, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._loop = loop
        self._socket = connected
        self._in = bytearray()
        self._out = bytearray()
        self._streak = 0
        self.tls: ssl.SSLSocket | None = None

    async def read_line(self, limit: int = COMMAND_LINE_LIMIT) -> bytes:
        """Return the next line without its CRLF.

        Raises LineTooLong above `limit` octets, BareNewline, Disconnected, Expired.
        """
        searched, too_long = 0, False
        while (end := self._in.find(b"\n", searched)) < 0:
            searched = len(self._in)
            if searched > limit:
                too_long = True
                self._in.clear()
                searched = 0
            await self._fill()
        line = bytes(self._in[: end + 1])
        del self._in[: end + 1]
        if too_long or len(line) > limit:
            raise LineTooLong(f"the line is longer than {limit} octets")
        if line[-2:] != b"\r\n" or line.find(b"\r", 0, -2) >= 0:
            raise BareNewline("a line must end with CRLF, and hold no other CR or LF")
        return line[:-2]

    async def read_until(self, mark: bytes, limit: int) -> bytes:
        """Return what comes up to `mark`, with it.

        Raises ValueError above `limit` octets, Disconnected, Expired.
        """
        while (end := self._in.find(mark)) < 0:
            if len(self._in) > limit:
                raise ValueError(f"more than {limit} octets without an end")
            await self._fill()
        data = bytes(self._in[: end + len(mark)])
        del self._in[: end + len(mark)]
        return data

    async def read_some(self, limit: int = CHUNK) -> bytes:
        """Return at least one and at most `limit` octets. Raises Disconnected, Expired."""
        if not self._in:
            await self._fill()
        data = bytes(self._in[:limit])
        del self._in[:limit]
        return data

    async def be_fair(self) -> None:
        """Give the other tasks a turn now and then, however much is there to be read.

        Also send what was written when it becomes much. Raises Disconnected, Expired.
        """
        if len(self._out) >= CHUNK:
            await self.flush()
        self._streak += 1
        if self._streak > self._STREAK:
            self._streak = 0
            await self._loop.turn()

    def unread(self, data: bytes) -> None:
        """Put `data` back in front of what is read next."""
        self._in[:0] = data

    def write(self, data: bytes) -> None:
        """Add `data` to what is sent with the next `flush` or wait for input."""
        self._out += data

    async def send(self, data: bytes) -> None:
        """Write `data`, waiting if the other side is slow. Raises Disconnected, Expired."""
        self._out += data
        if len(self._out) >= CHUNK:
            await self.flush()

    async def flush(self) -> None:
        """Send what was written. Raises Disconnected, Expired."""
        while self._out:
            try:
                sent = self._socket.send(self._out)
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self._loop.writable(self._socket.fileno())
            except ssl.SSLWantReadError:
                await self._loop.readable(self._socket.fileno())
            except OSError as error:
                raise Disconnected(f"the connection broke: {reason(error)}") from error
            else:
                del self._out[:sent]

    async def start_tls(
        self, context: ssl.SSLContext, server_side: bool, hostname: str | None = None
    ) -> None:
        """Do the TLS handshake; what was received in the clear is discarded.

        Raises TLSFailed, Disconnected, Expired.
        """
        await self.flush()
        self._in.clear()
        plain = self._socket
        self._loop.forget(plain.fileno())
        try:
            self._socket = self.tls = context.wrap_socket(
                plain, server_side=server_side, do_handshake_on_connect=False,
                server_hostname=hostname,
            )  # fmt: skip
            await self._shake_hands(self.tls)
            acknowledge_at_once(self.tls)
        except ssl.SSLCertVerificationError as error:
            text = f"the certificate is not valid: {error.verify_message}"
            raise TLSFailed(text, unverified=True) from error
        except ssl.SSLError as error:
            raise TLSFailed(f"the TLS handshake failed: {error.reason or error}") from error
        except (OSError, ValueError) as error:
            raise Disconnected(f"the connection broke: {reason(error)}") from error

    async def _shake_hands(self, tls: ssl.SSLSocket) -> None:
        while True:
            try:
                tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                await self._loop.readable(tls.fileno())
            except ssl.SSLWantWriteError:
                await self._loop.writable(tls.fileno())

    @property
    def certificates(self) -> list[bytes]:
        """The chain that the other side has shown, its own first, in DER."""
        inner = getattr(self.tls, "_sslobj", None)  # public only from Python 3.13 on
        chain = inner.get_unverified_chain() if inner is not None else None
        return [link.public_bytes(_DER) for link in chain or ()]

    @property
    def tls_text(self) -> str:
        """The version and the cipher, as in "TLSv1.3 TLS_AES_256_GCM_SHA384", or ""."""
        if self.tls is None:
            return ""
        cipher = self.tls.cipher()
        return f"{self.tls.version()} {cipher[0] if cipher else ''}"

    async def finish(self) -> None:
        """Send what was written, then close so that the other side still gets it.

        A socket that is closed with input unread is reset, and the reset can overtake
        our last reply; so what still comes is read for a moment.
        """
        try:
            with self._loop.deadline(2.0):
                await self.flush()
                self._say_goodbye()
                self._socket.shutdown(socket.SHUT_WR)  # with TLS, what comes then is not read
                for _ in range(64):
                    await self._fill()
                    self._in.clear()
        except (Disconnected, Expired, OSError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection at once."""
        if self._socket.fileno() < 0:
            return
        self._loop.forget(self._socket.fileno())
        self._say_goodbye()
        self._socket.close()

    def _say_goodbye(self) -> None:
        """End TLS, so that the other side knows that nothing was cut off; RFC 8446, 6.1."""
        if self.tls is not None:
            with contextlib.suppress(OSError, ValueError):
                self.tls.unwrap()  # it need not be answered

    async def _fill(self) -> None:
        """Send what was written, then wait for more input. Raises Disconnected, Expired."""
        answered = bool(self._out)
        await self.flush()
        if answered and not (self.tls is not None and self.tls.pending()):
            # who gets an answer has not said more yet, most often
            self._streak = 0
            await self._loop.readable(self._socket.fileno())
        else:
            await self.be_fair()
        data = await self._receive()
        if not data:
            raise Disconnected("the other side closed the connection")
        self._in += data

    async def _receive(self) -> bytes:
        while True:
            try:
                return self._socket.recv(CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._streak = 0
                await self._loop.readable(self._socket.fileno())
            except ssl.SSLWantWriteError:
                await self._loop.writable(self._socket.fileno())
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return b""
            except OSError as error:
                raise Disconnected(f"the connection broke: {reason(error)}") from error


_PROXY_SECONDS = 5.0
_PROXY_LIMIT = 536  # octets; a header of version 2 could be longer, with what nobody needs
_PROXY_2 = b"\r\n\r\n\0\r\nQUIT\n"


async def proxied_peer(loop: Loop, raw: socket.socket) -> str:
    """Read the PROXY header (versions 1 and 2) that a proxy puts before all else.

    Return the address of the client, or "" if the proxy speaks for itself. What comes
    after the header is left in the socket. Raises Disconnected, Expired.
    """
    with loop.deadline(_PROXY_SECONDS):
        while True:
            await loop.readable(raw.fileno())
            try:
                seen = raw.recv(_PROXY_LIMIT, socket.MSG_PEEK)
                found = parse_proxy_header(seen)
                if found is not None:
                    length, peer = found
                    raw.recv(length)
                    return peer
            except BlockingIOError:
                continue
            except (OSError, ValueError) as error:
                raise Disconnected(f"expected a PROXY header: {reason(error)}") from error
            if not seen or len(seen) >= _PROXY_LIMIT:
                raise Disconnected("expected a PROXY header, and found none")
            await loop.sleep(0.01)  # what was peeked at would wake us at once


def parse_proxy_header(data: bytes) -> tuple[int, str] | None:
    """Return the length of the PROXY header in `data`, and the address of the client.

    None if it is not complete yet. Raises ValueError if it is none. See "The PROXY
    protocol", 2.1 and 2.2, in HAProxy's documentation.
    """
    if data[:12] == _PROXY_2[: len(data)]:
        return _parse_proxy_2(data)
    if not data.startswith(b"PROXY "[: len(data)]):
        raise ValueError("the connection does not begin with one")
    line, newline, _ = data.partition(b"\r\n")
    if not newline:
        if len(data) > 107:
            raise ValueError("its line has no end")
        return None
    words = line.decode("ascii", "replace").split(" ")
    if len(line) > 105:
        raise ValueError("its line is too long")
    if words[1:2] == ["UNKNOWN"]:
        return len(line) + 2, ""
    kind = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}.get(words[1] if words[1:] else "")
    try:
        if kind is None or len(words) != 6:
            raise ValueError
        client, _ = (socket.inet_pton(kind, word) for word in words[2:4])
        if not all(word.isascii() and word.isdigit() and int(word) < 65536 for word in words[4:]):
            raise ValueError
    except (OSError, ValueError):
        raise ValueError(f"{printable(' '.join(words), 120)!r} is malformed") from None
    return len(line) + 2, socket.inet_ntop(kind, client)


def _parse_proxy_2(data: bytes) -> tuple[int, str] | None:
    if len(data) < 16:
        return None
    command, family = data[12], data[13]
    length = 16 + int.from_bytes(data[14:16], "big")
    if command >> 4 != 2 or length > _PROXY_LIMIT:
        raise ValueError("its version or its length is not one that we know")
    if len(data) < length:
        return None
    if command & 0xF == 0:  # LOCAL: a health check of the proxy
        return length, ""
    if command & 0xF != 1:
        raise ValueError("its command is not one that we know")
    size = {0x11: 4, 0x21: 16}.get(family)
    if size is None:
        return length, ""
    if length < 16 + 2 * size + 4:
        raise ValueError("its addresses are cut short")
    kind = socket.AF_INET if size == 4 else socket.AF_INET6
    return length, socket.inet_ntop(kind, data[16 : 16 + size])


def send_at_once(connected: socket.socket) -> None:
    """Have the system send what we write without waiting for more."""
    if connected.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # macOS says so of a connection that is gone already
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def acknowledge_at_once(connected: socket.socket) -> None:
    """Have the system acknowledge what came, if it can be told to.

    A client whose handshake ends with its own message would wait for that before it sends
    its first command: 40 ms.
    """
    if connected.family != socket.AF_UNIX and hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


async def connect(loop: Loop, host: str, port: int) -> Stream:
    """Connect to an IP address and port, or to a socket if `host` is a path.

    Raises Disconnected with what the system said, Expired.
    """
    if host.startswith("/"):
        family, target, place = socket.AF_UNIX, host, host
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        target, place = (host, port), f"[{host}]:{port}"  # type: ignore[assignment]
    raw = socket.socket(family, socket.SOCK_STREAM)
    raw.setblocking(False)
    try:
        code = raw.connect_ex(target)
        while code == errno.EAGAIN and family == socket.AF_UNIX:  # its backlog is full
            await loop.sleep(0.05)
            code = raw.connect_ex(target)
        if code == errno.EINPROGRESS:
            await loop.writable(raw.fileno())
            code = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except BaseException as error:
        loop.forget(raw.fileno())
        raw.close()
        if isinstance(error, OSError):
            raise Disconnected(f"cannot connect to {place}: {reason(error)}") from error
        raise
    if code:
        loop.forget(raw.fileno())
        raw.close()
        raise Disconnected(f"cannot connect to {place}: {os.strerror(code)}")
    send_at_once(raw)
    return Stream(loop, raw)


Connect = Callable[[Loop, str, int], Awaitable[Stream]]  # as `connect`


def server_tls_context(fullchain: str, privkey: str) -> ssl.SSLContext:
    """Return a context for the server side. Raises ConfigError.

    Session tickets are off: some large senders fail on them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    for path in (fullchain, privkey):
        read_file(path)
    try:
        context.load_cert_chain(fullchain, privkey)
    except (ssl.SSLError, OSError, ValueError) as error:
        text = f"expected a certificate chain that fits the key in {privkey}: {reason(error)}"
        raise ConfigError(fullchain, 0, text) from error
    return context


def anchored_tls_context(authority: bytes) -> ssl.SSLContext:
    """Return a context for the client side that trusts one certificate, in DER, alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be a root
    context.load_verify_locations(cadata=authority)
    return context


def client_tls_context(verify: bool, authorities: str | None = None) -> ssl.SSLContext:
    """Return a context for the client side; `authorities` is a file beyond the system's.

    With `verify`, the certificate must be valid for the name that is connected to.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if verify:
        context.load_default_certs()
        if authorities:
            context.load_verify_locations(authorities)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# ======================================================================================
# ROOM: DNS
#
# DNS, on the loop: what a name has of a kind of record, kept for as long as its TTL says.
#
# Three things are kept apart all the way up: the name does not exist, the name has no
# such record, and nobody could say (`TemporaryFailure`). Two tasks that ask the same
# question share one query, which has a task of its own: whoever is in a hurry stops
# waiting, and the answer still serves the next.
#
# `Names` knows nothing of packets: an `Ask` brings the answers, dnspython's resolver in
# a server, a table in a test.
# ======================================================================================

DNS_SECONDS = 15.0  # for one question, over all servers
_ANSWER_LIMIT = 12 * 1024  # octets; a thousand records take long to parse, and nobody has them
_QUESTION_SLOTS = 100  # asked at a time; each holds a descriptor
_CACHE_LIMIT = 10_000  # answers
_CACHE_OCTETS = 16 * 1024 * 1024
_TTL_LIMITS = (1.0, 86400.0)
_FAILURE_SECONDS = 5.0  # a failure is remembered this long; RFC 2308, 7.1 allows 5 minutes


class Answer(NamedTuple):
    """What is known of a name: `exists` is false for NXDOMAIN, `ttl` is in seconds.

    A record is in presentation form; TXT is its strings joined, an octet a character.
    `authentic`: a server that we trust in this has checked the signatures (DNSSEC).
    `canonical` is the name at the end of the aliases, if there are any.
    """

    exists: bool
    records: tuple[str, ...]
    ttl: float
    authentic: bool = False
    canonical: str = ""


Ask = Callable[[str, str], Awaitable[Answer]]


class _Failure(NamedTuple):
    """That nobody could say. Not an exception, which would collect the places of all askers."""

    text: str
    status: str


class Names:
    """Answers from the cache, or by asking. Names are ASCII (A-labels)."""

    def __init__(self, loop: Loop, ask: Ask) -> None:
        self._loop = loop
        self._ask = ask
        self._slots = Slots(loop, _QUESTION_SLOTS)
        self._cache: dict[tuple[str, str], tuple[float, Answer | _Failure]] = {}
        self._octets = 0  # in the cache, roughly
        self._under_way: dict[tuple[str, str], Task] = {}

    async def query(self, name: str, kind: str) -> Answer:
        """Return what `name` has of `kind` ("MX", "A", "TXT", …). Raises TemporaryFailure."""
        key = (name.lower().rstrip("."), kind)
        expires, known = self._cache.get(key, (0.0, None))
        if known is None or expires <= self._loop.clock.monotonic():
            if key not in self._under_way:
                self._under_way[key] = self._loop.spawn(self._fetch(key), f"DNS {kind} {name}")
            known = await self._under_way[key].join()
        if isinstance(known, _Failure):
            raise TemporaryFailure(*known)
        return known

    async def mail_exchangers(self, domain: str) -> list[tuple[int, str]]:
        """Return preference and host of each exchanger; RFC 5321, 5.1.

        A domain without MX that has an address is its own exchanger. Raises
        TemporaryFailure, and PermanentFailure for a domain that does not exist, has no
        address either, or accepts no mail at all (null MX, RFC 7505).
        """
        answer = await self.query(domain, "MX")
        if not answer.exists:
            raise PermanentFailure(f"the domain {domain} does not exist", "5.1.2")
        exchangers = []
        for record in answer.records:
            preference, _, host = record.partition(" ")
            exchangers.append((int(preference), host.rstrip(".").lower()))
        if exchangers and not any(host for _, host in exchangers):
            raise PermanentFailure(f"the domain {domain} accepts no mail (null MX)", "5.1.10")
        if exchangers:
            return sorted(pair for pair in exchangers if pair[1])
        if not await self.addresses(domain):
            raise PermanentFailure(f"the domain {domain} has no mail server", "5.1.2")
        return [(0, domain)]

    async def addresses(self, host: str) -> list[str]:
        """Return the IPv6 and IPv4 addresses of `host`. Raises TemporaryFailure."""
        if host == "localhost":
            return ["127.0.0.1", "::1"]
        if is_ip_address(host):
            return [host]
        found: list[str] = []
        failure = None
        for kind in ("AAAA", "A"):
            try:
                found += (await self.query(host, kind)).records
            except TemporaryFailure as error:
                failure = error
        if failure is not None and not found:
            raise failure
        return found

    async def _fetch(self, key: tuple[str, str]) -> Answer | _Failure:
        result: Answer | _Failure
        try:
            async with self._slots:
                with self._loop.deadline(DNS_SECONDS):
                    result = await self._ask(*key)
            ttl = max(_TTL_LIMITS[0], min(result.ttl, _TTL_LIMITS[1]))
        except TemporaryFailure as error:
            result, ttl = _Failure(str(error), error.status), _FAILURE_SECONDS
        except Expired:
            text = f"no name server answered for {key[0]} {key[1]} in time"
            result, ttl = _Failure(text, "4.4.3"), _FAILURE_SECONDS
        finally:
            del self._under_way[key]
        self._forget(key)
        if len(self._cache) >= _CACHE_LIMIT or self._octets >= _CACHE_OCTETS:
            self._shrink()
        self._cache[key] = (self._loop.clock.monotonic() + ttl, result)
        self._octets += self._size(result)
        return result

    @staticmethod
    def _size(known: Answer | _Failure) -> int:
        records = known.records if isinstance(known, Answer) else ()
        return 300 + sum(60 + len(record) for record in records)

    def _forget(self, key: tuple[str, str]) -> None:
        known = self._cache.pop(key, None)
        if known is not None:
            self._octets -= self._size(known[1])

    def _shrink(self) -> None:
        """Make room: what has expired goes first, then what was asked for longest ago."""
        now = self._loop.clock.monotonic()
        for key in [key for key, (expires, _) in self._cache.items() if expires <= now]:
            self._forget(key)
        for key in list(self._cache):
            fits = self._octets <= _CACHE_OCTETS * 9 // 10
            if fits and len(self._cache) <= _CACHE_LIMIT * 9 // 10:
                break
            self._forget(key)


class DnsClient:
    """Asks name servers through dnspython, its sockets on our loop.

    `servers` are "ip" or "ip:port"; without any, those of the system. That an answer is
    authentic is believed of servers on this machine, or of all with `trust_ad`: on the
    way from any other, the bit that says so could be changed (RFC 4035, 4.9.3).
    """

    def __init__(self, loop: Loop, servers: Sequence[str], trust_ad: bool = False) -> None:
        self._loop = loop
        self._servers = servers
        self._trust_ad = trust_ad
        self._resolver: Any = None
        self._plain_resolver: Any = None  # without EDNS
        self._backend: Any = None

    async def ask(self, name: str, kind: str) -> Answer:
        """Return the answer of the first server that has one. Raises TemporaryFailure."""
        if self._resolver is None:
            self.set_up()
        import dns.exception
        import dns.resolver

        try:
            found = await self._resolve(name.rstrip(".") + ".", kind)
        except dns.resolver.NXDOMAIN as error:
            responses: Any = error.kwargs["responses"]
            ttls = [response.resolve_chaining().minimum_ttl for response in responses.values()]
            return Answer(False, (), min(ttls))  # nothing rests on whether this is authentic
        except dns.exception.Timeout:
            text = f"no name server answered for {name} {kind} in time"
            raise TemporaryFailure(text, "4.4.3") from None
        except dns.resolver.NoNameservers:
            text = f"no name server could answer for {name} {kind}"
            raise TemporaryFailure(text, "4.4.3") from None
        except dns.exception.DNSException as error:
            if isinstance(error, dns.resolver.YXDOMAIN):
                raise TemporaryFailure(f"the DNS name {name} is too long", "4.4.3") from None
            return Answer(False, (), _TTL_LIMITS[0])  # the name itself is malformed
        authentic = self._is_authentic(found)
        canonical = str(found.canonical_name).rstrip(".").lower()
        return Answer(
            True, self._records(found), found.chaining_result.minimum_ttl, authentic=authentic,
            canonical="" if canonical == name.rstrip(".").lower() else canonical,
        )  # fmt: skip

    async def _resolve(self, name: str, kind: str) -> Any:
        """Ask, and if a server does not understand EDNS, ask without (RFC 6891, 7)."""
        import dns.rcode
        import dns.resolver

        async def ask(resolver: Any) -> Any:
            return await resolver.resolve(
                name, kind, raise_on_no_answer=False, search=False, lifetime=DNS_SECONDS,
                backend=self._backend,
            )  # fmt: skip

        try:
            return await ask(self._resolver)
        except dns.resolver.NoNameservers as error:
            responses = [kwarg[4] for kwarg in error.kwargs["errors"]]
            codes = [response.rcode() for response in responses if response is not None]
            if dns.rcode.FORMERR not in codes:
                raise
        return await ask(self._plain_resolver)

    def _is_authentic(self, found: Any) -> bool:
        import dns.flags

        server = str(found.nameserver)
        trusted = self._trust_ad or server == "::1" or server.startswith("127.")
        return trusted and bool(found.response.flags & dns.flags.AD)

    def _records(self, found: Any) -> tuple[str, ...]:
        if found.rrset is None:
            return ()
        if found.rrset.rdtype.name == "TXT":
            return tuple(b"".join(record.strings).decode("latin-1") for record in found.rrset)
        return tuple(record.to_text() for record in found.rrset)

    def set_up(self) -> None:
        """Load dnspython and read which name servers there are. Raises TemporaryFailure."""
        import dns._features  # 70 ms, and not before the first question

        for feature in ("dnssec", "doh", "doq", "trio", "wmi"):
            dns._features.force(feature, False)
        dns._features.force("idna", True)
        import dns.rdata

        # or the code of a type would be loaded when it is first met, in anybody's answer
        load_all_types: Any = dns.rdata.load_all_types
        load_all_types()
        self._resolver, self._plain_resolver = self._new_resolver(0), self._new_resolver(-1)
        self._backend = _dns_backend(self._loop)

    def _new_resolver(self, edns: int) -> Any:
        """Return a resolver of dnspython's; `edns` is the version, -1 for none."""
        import dns.asyncresolver
        import dns.flags
        import dns.nameserver
        import dns.resolver

        try:
            resolver = dns.asyncresolver.Resolver(configure=not self._servers)
        except dns.resolver.NoResolverConfiguration:
            text = "no name server is known: set dns_server, or name one in /etc/resolv.conf"
            raise TemporaryFailure(text, "4.4.3") from None
        if self._servers:
            places = [host_and_port(server, 53) for server in self._servers]
            resolver.nameservers = [
                dns.nameserver.Do53Nameserver(host, port) for host, port in places
            ]
        resolver.set_flags(dns.flags.RD | dns.flags.AD)  # AD asks for AD; RFC 6840, 5.7
        resolver.use_edns(edns, 0, 1232)
        return resolver


def _dns_backend(loop: Loop) -> Any:
    """Return a backend for dnspython's asynchronous resolver that waits on `loop`."""
    import dns._asyncbackend
    import dns.exception

    async def within(seconds: float | None, call: Coroutine[Any, Any, T]) -> T:
        if seconds is None:
            return await call
        try:
            with loop.deadline(seconds):
                return await call
        except Expired:
            timed_out: Any = dns.exception.Timeout
            raise timed_out(timeout=seconds) from None

    class Datagrams(dns._asyncbackend.DatagramSocket):
        def __init__(self, raw: socket.socket) -> None:
            super().__init__(raw.family, socket.SOCK_DGRAM)
            self._raw = raw

        async def sendto(self, what: bytes, destination: Any, timeout: float | None) -> int:
            # connected, it hears at once that nobody listens there (ICMP), instead of waiting
            self._raw.connect(destination)
            return self._raw.send(what)

        async def recvfrom(self, size: int, timeout: float | None) -> Any:
            return await within(timeout, self._receive(size))

        async def _receive(self, size: int) -> Any:
            while True:
                try:
                    return self._raw.recvfrom(size)
                except BlockingIOError:
                    await loop.readable(self._raw.fileno())

        async def close(self) -> None:
            loop.forget(self._raw.fileno())
            self._raw.close()

    class Connection(dns._asyncbackend.StreamSocket):
        def __init__(self, stream: Stream, family: int) -> None:
            super().__init__(family, socket.SOCK_STREAM)
            self._stream = stream

        async def sendall(self, what: bytes, timeout: float | None) -> None:
            self._stream.write(what)
            await within(timeout, self._stream.flush())

        async def recv(self, size: int, timeout: float | None) -> bytes:
            if size > _ANSWER_LIMIT:
                raise OSError(f"the answer is larger than {_ANSWER_LIMIT} octets")
            try:
                return await within(timeout, self._stream.read_some(size))
            except Disconnected:
                return b""

        async def close(self) -> None:
            self._stream.close()

    class Backend(dns._asyncbackend.Backend):
        def name(self) -> str:
            return "chasquid"

        async def make_socket(
            self, af: int, socktype: int, proto: int = 0, source: Any = None,
            destination: Any = None, timeout: float | None = None, *_: Any,
        ) -> Any:  # fmt: skip
            if socktype == socket.SOCK_DGRAM:
                raw = socket.socket(af, socktype, proto)
                raw.setblocking(False)
                return Datagrams(raw)
            try:
                return Connection(await within(timeout, connect(loop, *destination[:2])), af)
            except Disconnected as error:
                raise OSError(str(error)) from error

        async def sleep(self, interval: float) -> None:
            await loop.sleep(interval)

    return Backend()


# ======================================================================================
# ROOM: USERS
#
# Who may log in, and who has a mailbox: domains/DOMAIN/users, in the text format:
#
#     users: { key: "NAME" value: { scrypt: { logN: 14 r: 8 p: 1 keyLen: 32
#                                             salt: "…" encrypted: "…" } } }
#     users: { key: "NAME" value: { plain: { password: "…" } } }
#     users: { key: "NAME" value: { denied: {} } }
#
# A `denied` user has a mailbox and never logs in. Names are normalised (TEXT).
#
# Beside the files, Dovecot can know users and check their passwords, over its sockets.
#
# Whether a user exists must not show in how long an answer takes: every check of a
# password computes one scrypt with the costs that this domain uses. That blocks for tens
# of milliseconds, so it belongs into a worker thread.
#
# Programs log in for each message. So a login that has succeeded is known for a while
# (`Logins`): as a hash under a key that is made at the start and never on a disk, until the
# users change. One that has failed never is.
# ======================================================================================


class Scrypt(NamedTuple):
    """A salted hash; N is 2 ** log_n (RFC 7914)."""

    log_n: int
    r: int
    p: int
    key_length: int
    salt: bytes
    encrypted: bytes


class Plain(NamedTuple):
    password: bytes


class Denied(NamedTuple):
    pass


Password = Scrypt | Plain | Denied

_SCRYPT_MEMORY = 512 * 1024 * 1024  # octets one check may need; above, the file is refused


def new_password(password: bytes) -> Scrypt:
    """Return a fresh hash of `password`. Blocks for tens of milliseconds."""
    costs = Scrypt(14, 8, 1, key_length=32, salt=os.urandom(16), encrypted=b"")
    return costs._replace(encrypted=_derive(costs, _composed(password)))


def _composed(password: bytes) -> bytes:
    """Return a password in NFC: keyboards send the same letter in several forms (RFC 8265, 4.2)."""
    if password.isascii():
        return password
    import unicodedata  # rarely needed

    try:
        return unicodedata.normalize("NFC", password.decode()).encode()
    except UnicodeDecodeError:
        return password


def check_password(known: Password, password: bytes) -> bool:
    """Tell whether `password` is the one behind `known`. Blocks if it is a hash."""
    # as it came too: a hash of another tool may be of that form
    forms = dict.fromkeys((_composed(password), password))
    return any(_is_password(known, form) for form in forms)


def _is_password(known: Password, password: bytes) -> bool:
    import hmac  # loads OpenSSL's hashes; only for logins

    if isinstance(known, Scrypt):
        return hmac.compare_digest(_derive(known, password), known.encrypted)
    return isinstance(known, Plain) and hmac.compare_digest(_composed(known.password), password)


def _derive(costs: Scrypt, password: bytes) -> bytes:
    import hashlib  # loads OpenSSL's hashes; only for logins

    n = 1 << costs.log_n
    return hashlib.scrypt(
        password, salt=costs.salt, n=n, r=costs.r, p=costs.p, dklen=costs.key_length,
        maxmem=128 * costs.r * (n + costs.p + 2) + 1024 * 1024,
    )  # fmt: skip


def parse_users(
    data: bytes, path: str, problems: list[ConfigError] | None = None
) -> dict[str, Password]:
    """Parse a users file; `path` is for the messages.

    Raises ConfigError; with `problems`, mistakes are added to it instead.
    """
    users: dict[str, Password] = {}
    for entry in parse_text_format(data, path, problems):
        with collected(problems):
            name, password = _parse_user(entry, path)
            users[name] = password
    return users


def _parse_user(entry: Entry, path: str) -> tuple[str, Password]:
    if entry.key != "users":
        raise ConfigError(path, entry.line, f"expected 'users', found {entry.key!r}")
    fields = _message(entry, path, {"key", "value"})
    if not isinstance(fields["key"].value, bytes):
        raise ConfigError(path, fields["key"].line, "expected a user name in quotes")
    try:
        name = normalize_user(fields["key"].value.decode())
    except ValueError as error:
        raise ConfigError(path, entry.line, f"expected a user name: {error}") from None
    return name, _parse_password(fields["value"], path)


def _message(entry: Entry, path: str, required: set[str]) -> dict[str, Entry]:
    if not isinstance(entry.value, tuple):
        raise ConfigError(path, entry.line, f"expected '{{' after {entry.key!r}")
    fields = {field.key: field for field in entry.value}
    for key in required ^ fields.keys():
        problem = "expected" if key in required else "did not expect"
        raise ConfigError(path, entry.line, f"{problem} {key!r} in {entry.key!r}")
    return fields


def _parse_password(entry: Entry, path: str) -> Password:
    kinds = entry.value if isinstance(entry.value, tuple) else ()
    if len(kinds) != 1 or kinds[0].key not in ("scrypt", "plain", "denied"):
        text = "expected one of 'scrypt', 'plain' and 'denied' for a user"
        raise ConfigError(path, entry.line, text)
    kind = kinds[0]
    if kind.key == "denied":
        return Denied()
    if kind.key == "plain":
        return Plain(_octets(_message(kind, path, {"password"})["password"], path))
    fields = _message(kind, path, {"logN", "r", "p", "keyLen", "salt", "encrypted"})
    log_n, r, p, length = (_number(fields[key], path) for key in ("logN", "r", "p", "keyLen"))
    fits = log_n < min(40, 16 * r) and 128 * r * ((1 << log_n) + p + 2) <= _SCRYPT_MEMORY
    if not (fits and p <= 64 and length <= 1024):  # N < 2 ** (128 * r / 8): RFC 7914, 2
        text = "expected costs of scrypt that fit into 512 MB, p up to 64, keyLen up to 1024"
        raise ConfigError(path, kind.line, text)
    return Scrypt(
        log_n,
        r,
        p,
        key_length=length,
        salt=_octets(fields["salt"], path),
        encrypted=_octets(fields["encrypted"], path),
    )


def _octets(entry: Entry, path: str) -> bytes:
    if not isinstance(entry.value, bytes):
        raise ConfigError(path, entry.line, f"{entry.key}: expected a string in quotes")
    return entry.value


def _number(entry: Entry, path: str) -> int:
    if isinstance(entry.value, Word) and re.fullmatch(r"0*[1-9]\d{0,8}", entry.value):
        return int(entry.value)
    raise ConfigError(path, entry.line, f"{entry.key}: expected a whole number of at least 1")


def format_users(users: Mapping[str, Password]) -> bytes:
    """Return `users` as a users file."""
    lines = []
    for name, password in sorted(users.items()):
        if isinstance(password, Scrypt):
            scheme = (
                f"scrypt: {{ logN: {password.log_n} r: {password.r} p: {password.p} "
                f"keyLen: {password.key_length} salt: {quote(password.salt)} "
                f"encrypted: {quote(password.encrypted)} }}"
            )
        elif isinstance(password, Plain):
            scheme = f"plain: {{ password: {quote(password.password)} }}"
        else:
            scheme = "denied: {}"
        lines.append(f"users: {{ key: {quote(name)} value: {{ {scheme} }} }}\n")
    return "".join(lines).encode()


def load_users(directory: str, problems: list[ConfigError] | None = None) -> dict[str, Password]:
    """Read the users file of a domain's directory; without one there are no users.

    Raises ConfigError; with `problems`, mistakes are added to it instead.
    """
    path = os.path.join(directory, "users")
    with collected(problems):
        return parse_users(read_file(path, missing=b""), path, problems)
    return {}


def broken_domain(domain: str) -> TemporaryFailure:
    """Return the failure of whatever needs the files of a domain that cannot be read."""
    return TemporaryFailure(f"the configuration of {domain} has a mistake", "4.3.5")


class Accounts:
    """The users of all domains."""

    def __init__(
        self, domains: Mapping[str, Mapping[str, Password]], broken: Iterable[str] = ()
    ) -> None:
        self._domains = domains
        self._broken = frozenset(broken)  # domains whose files cannot be read
        self._costs = {domain: self._usual_costs(users) for domain, users in domains.items()}
        self._default_costs = Scrypt(
            14, 8, 1, key_length=32, salt=os.urandom(16), encrypted=os.urandom(32)
        )

    @property
    def domains(self) -> list[str]:
        """The domains that have a directory, in Unicode."""
        return list(self._domains)

    def exists(self, user: str, domain: str) -> bool:
        """Tell whether the normalised `user` has a mailbox in `domain`."""
        return user in self._domains.get(domain, ())

    def authenticate(self, login: str, password: bytes) -> str | None:
        """Return the normalised address behind `login` if `password` fits, else None.

        Takes as long for a user who does not exist. Blocks; for a worker thread. Raises
        TemporaryFailure if the files of the domain cannot be read.
        """
        try:
            address = normalize_address(login)
        except ValueError:
            address = ""
        user, domain = split_address(address)
        if domain in self._broken:
            raise broken_domain(domain)
        known = self._domains.get(domain, {}).get(user)
        if not isinstance(known, Scrypt):
            check_password(self._costs.get(domain) or self._default_costs, password)
        if known is not None and check_password(known, password):
            return address
        return None

    @staticmethod
    def _usual_costs(users: Mapping[str, Password]) -> Scrypt | None:
        costs = collections.Counter(
            (known.log_n, known.r, known.p, known.key_length)
            for known in users.values()
            if isinstance(known, Scrypt)
        )
        if not costs:
            return None
        ((usual, _),) = costs.most_common(1)
        return Scrypt(*usual, os.urandom(16), os.urandom(usual[3]))


_LOGINS_KNOWN = 10_000  # at most


class Logins:
    """Logins that have succeeded lately, and those that are being checked."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._key = os.urandom(32)
        self._known: dict[bytes, tuple[float, str]] = {}  # until when, and the address
        self._checks: dict[bytes, Event] = {}  # that are under way, with their ends

    def forget(self) -> None:
        """Forget them all, also what comes of the checks under way: the users have changed."""
        self._known = {}

    async def find(
        self, login: str, password: bytes, check: Callable[[], Awaitable[tuple[str | None, float]]]
    ) -> str | None:
        """Return the address of a login, as it is known or as `check` says, else None.

        `check` also says for how many seconds a login that succeeds is good. It is not asked
        by two who come with the same login at the same time.
        """
        digest = self._digest(login, password)
        while digest in self._checks:
            await self._checks[digest].wait()
        known = self._known
        until, address = known.get(digest, (0.0, ""))
        if self._loop.clock.monotonic() < until:
            return address
        ended = self._checks[digest] = Event(self._loop)
        try:
            found, seconds = await check()
        finally:
            del self._checks[digest]
            ended.set()
        if found is not None:
            self._remember(known, digest, found, seconds)
        return found

    def _remember(
        self, known: dict[bytes, tuple[float, str]], digest: bytes, address: str, seconds: float
    ) -> None:
        now = self._loop.clock.monotonic()
        for old in [old for old, (until, _) in known.items() if until <= now]:
            del known[old]
        if len(known) < _LOGINS_KNOWN:
            known[digest] = now + seconds, address

    def _digest(self, login: str, password: bytes) -> bytes:
        import hashlib  # loads OpenSSL's hashes; only for logins

        user = login.encode("utf-8", "surrogatepass")
        said = len(user).to_bytes(4, "big") + user + password
        return hashlib.blake2b(said, key=self._key, digest_size=32).digest()


_DOVECOT_SECONDS = 20.0
_DOVECOT_LINE_LIMIT = 8192
_DOVECOT_PLACES = ("/run/dovecot", "/var/run/dovecot")
_DOVECOT_SOCKETS = {
    "userdb": ("auth-chasquid-userdb", "auth-userdb"),
    "client": ("auth-chasquid-client", "auth-client"),
}


class Dovecot:
    """Asks Dovecot who exists and whose password is right, over its auth protocol, 1.1.

    `userdb` and `client` are the paths of its sockets; if one is "", it is looked for
    where Dovecot usually has it. See "Authentication Protocol" in Dovecot's manual.
    """

    def __init__(self, loop: Loop, log: Log, userdb: str, client: str) -> None:
        self._loop = loop
        self._log = log
        self._paths = {"userdb": userdb, "client": client}
        self._number = 0

    async def exists(self, address: str) -> bool:
        """Tell whether `address` has a mailbox. Raises TemporaryFailure."""
        answer = await self._ask("userdb", "USER", f"{address}\tservice=smtp")
        if answer[0] not in ("USER", "NOTFOUND"):
            raise TemporaryFailure(f"Dovecot cannot look {address} up now", "4.3.0")
        return answer[0] == "USER"

    async def authenticate(self, address: str, password: bytes) -> bool:
        """Tell whether `password` is that of `address`. Raises TemporaryFailure."""
        secret = base64.b64encode(b"\0" + address.encode() + b"\0" + password).decode("ascii")
        parameters = f"PLAIN\tservice=smtp\tsecured\tno-penalty\tnologin\tresp={secret}"
        answer = await self._ask("client", "AUTH", parameters)
        failed_for_now = {"temp", "code=temp_fail"} & set(answer[2:])
        if failed_for_now or answer[0] not in ("OK", "FAIL"):
            raise TemporaryFailure("Dovecot cannot check the password now", "4.3.0")
        return answer[0] == "OK"

    async def _ask(self, kind: str, verb: str, parameters: str) -> list[str]:
        """Return the parts of the answer; its first two are a word and our number."""
        if any(mark in parameters.replace("\t", "") for mark in "\r\n\0\1"):
            return ["FAIL"] if verb == "AUTH" else ["NOTFOUND"]
        self._number += 1
        number = str(self._number)
        path = self._path(kind)
        stream = None
        try:
            with self._loop.deadline(_DOVECOT_SECONDS):
                stream = await connect(self._loop, path, 0)
                process = f"CPID\t{os.getpid()}\n" if kind == "client" else ""
                stream.write(f"VERSION\t1\t1\n{process}".encode())
                await self._greeting(stream, "DONE" if kind == "client" else "SPID")
                stream.write(f"{verb}\t{number}\t{parameters}\n".encode())
                while True:
                    parts = await self._parts(stream)
                    if parts[1:2] == [number]:
                        return parts
        except (Disconnected, Expired, ValueError) as error:
            self._log.error("dovecot", f"{path}: {reason(error)}")
            raise TemporaryFailure("Dovecot cannot be asked now", "4.3.0") from error
        finally:
            if stream is not None:
                stream.close()

    def _path(self, kind: str) -> str:
        if self._paths[kind]:
            return self._paths[kind]
        for place in _DOVECOT_PLACES:
            for name in _DOVECOT_SOCKETS[kind]:
                path = os.path.join(place, name)
                if os.path.exists(path):
                    return path
        names = " or ".join(_DOVECOT_SOCKETS[kind])
        text = f"no socket {names} in {_DOVECOT_PLACES[0]}; see dovecot_{kind}_path"
        self._log.error("dovecot", text)
        raise TemporaryFailure("Dovecot cannot be asked now", "4.3.0")

    async def _greeting(self, stream: Stream, last: str) -> None:
        """Read what Dovecot says first, up to the word `last`."""
        while (parts := await self._parts(stream))[0] != last:
            if parts[0] == "VERSION" and parts[1:2] != ["1"]:
                raise ValueError(f"expected version 1 of its protocol, found {parts[1:2]}")

    async def _parts(self, stream: Stream) -> list[str]:
        line = await stream.read_until(b"\n", _DOVECOT_LINE_LIMIT)
        return line[:-1].decode("utf-8", "replace").split("\t")


# ======================================================================================
# ROOM: ALIASES
#
# Which final recipients an address of ours stands for: domains/DOMAIN/aliases.
#
#     # a comment
#     NAME: address, address, …      an address without "@" is of this domain
#     NAME: address via HOST/HOST    delivered through these servers, not by MX
#     NAME: | program argument …     the message goes to the program's standard input
#     *: …                           whoever is neither user nor alias
#     …: *@elsewhere                 "*" on the right is the name that was asked for
#
# Names of aliases are compared without drop characters, which count in a suffix only, and
# with their suffix, then without it ("a.b+c.d" is looked up as "ab+c.d" and "ab"). Users are
# looked up as the address came, then without its suffix and its drop characters, then without
# its suffix alone ("a.b+c", "ab", "a.b"). Aliases win over users, and users over "*". A name
# that stands on its own right side means the mailbox of that name. A later line overrides an
# earlier one. Expansion goes ten steps deep at most.
#
# An alias must lead somewhere: unknown users among its destinations are left out and told of, and
# if there is nobody else, the alias is unknown itself. "localhost" is always ours.
#
# The program hooks/alias-resolve adds to the right side of any address: it is asked with the
# address as it came, then, if neither file nor hook knew that, without suffix and drop
# characters, and for "*" if nobody else is found. Dovecot may know users that are in no file.
# Expansion itself asks neither: it is a function of what they have said, and if something is
# missing, that is fetched and it is done again.
#
# The room knows which domains and users there are, and nothing of how mail is delivered.
# ======================================================================================

ALIAS_DEPTH_LIMIT = 10
_EXPANSIONS_KNOWN = 1000  # addresses whose expansion is remembered


class DestinationKind(enum.StrEnum):
    """What the value of a destination is."""

    ADDRESS = "address"
    PIPE = "pipe"  # a command line


class Destination(NamedTuple):
    """One final recipient: an address, perhaps through `via`, or a pipe's command line."""

    kind: DestinationKind
    value: str
    via: tuple[str, ...] = ()


class AliasLoop(ChasquidError):
    """An alias leads back to itself, or further than ten steps."""


class NoSuchUser(ChasquidError):
    """An address of ours is neither user nor alias, or an alias of nobody.

    Then `unknown` has the addresses that it leads to. The text, which strangers get to see,
    does not name them.
    """

    def __init__(self, address: str, unknown: Sequence[str] = ()) -> None:
        shown = printable(address, 200)
        nobody = f"there is no user or alias {shown}"
        super().__init__(f"the alias {shown} leads to nobody" if unknown else nobody)
        self.unknown = unknown

    def for_owner(self) -> ChasquidError:
        """Return the same failure for who may know whom the alias names."""
        names = printable(", ".join(self.unknown))
        named = f"{self}: there is no user or alias {names}"
        return ChasquidError(named) if self.unknown else self


def parse_aliases(
    data: bytes, path: str, domain: str, problems: list[ConfigError] | None = None
) -> dict[str, tuple[Destination, ...]]:
    """Parse an aliases file into normalised names and their destinations.

    Raises ConfigError; with `problems`, mistakes are added to it instead.
    """
    aliases: dict[str, tuple[Destination, ...]] = {}
    for number, raw in enumerate(data.split(b"\n"), 1):
        try:
            line = raw.decode().strip()
            if not line or line.startswith("#"):
                continue
            key, destinations = _parse_alias(line, domain)
        except ValueError as error:
            text = "expected UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            with collected(problems):
                raise ConfigError(path, number, text) from None
            continue
        aliases.pop(key, None)  # the order is that of the lines that count
        aliases[key] = destinations
    return aliases


def _parse_alias(line: str, domain: str) -> tuple[str, tuple[Destination, ...]]:
    """Return the normalised name and the destinations. Raises ValueError."""
    name, colon, right = (part.strip() for part in line.partition(":"))
    if not colon or not name or not right:
        raise ValueError(f"expected 'name: address, …', found {line!r}")
    if "@" in name:
        raise ValueError(f"expected a name without '@' before the colon, found {name!r}")
    key = name if name == "*" else normalize_user(name)
    return key, parse_destinations(right, domain)


def parse_destinations(right: str, domain: str) -> tuple[Destination, ...]:
    """Parse the right side of an alias of `domain`. Raises ValueError."""
    if right.startswith("|"):
        command = right[1:].strip()
        if not command:
            raise ValueError("expected a program after '|'")
        return (Destination(DestinationKind.PIPE, command),)
    destinations = []
    for part in filter(None, map(str.strip, right.split(","))):
        address, *rest = part.split(None, 2)
        via: tuple[str, ...] = ()
        if rest:
            if len(rest) != 2 or rest[0] != "via":
                raise ValueError(f"expected 'address via host/host', found {part!r}")
            via = tuple(host.strip() for host in rest[1].split("/"))
            if not all(host and not re.search(r"\s", host) for host in via):
                raise ValueError(f"expected hosts with '/' between them, found {rest[1]!r}")
            if not all(host_and_port(host, 25)[0] for host in via):
                raise ValueError(f"expected hosts after 'via', found {rest[1]!r}")
        local, of = split_address(address)
        if not local or address.endswith("@"):
            raise ValueError(f"expected an address, found {part!r}")
        destinations.append(
            Destination(DestinationKind.ADDRESS, f"{local}@{domain_to_unicode(of or domain)}", via)
        )
    if not destinations:
        raise ValueError("expected an address")
    return tuple(destinations)


def load_aliases(
    directory: str, domain: str, problems: list[ConfigError] | None = None
) -> dict[str, tuple[Destination, ...]]:
    """Read the aliases file of a domain's directory, if there is one.

    Raises ConfigError; with `problems`, mistakes are added to it instead.
    """
    path = os.path.join(directory, "aliases")
    with collected(problems):
        return parse_aliases(read_file(path, missing=b""), path, domain, problems)
    return {}


class _Lookup(enum.Enum):
    """What may be asked beyond the files."""

    ALIAS = enum.auto()
    USER = enum.auto()


class _Question(NamedTuple):
    """What only the outside knows."""

    lookup: _Lookup
    address: str


class ExternalLookups:
    """Who is asked beyond the files: the alias hook, another directory of users, or nobody.

    `hook` returns the right side of an address, `user` whether it has a mailbox; both raise
    TemporaryFailure. What they have said is kept for the length of one expansion; for what
    is not known yet the answer is None, and the question is noted.
    """

    def __init__(
        self,
        hook: Callable[[str], Awaitable[tuple[Destination, ...]]] | None = None,
        user: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self._hook = hook
        self._user = user
        self._known: dict[_Question, Any] = {}
        self.unanswered: dict[_Question, None] = {}  # in the order in which they came up

    def fresh(self) -> ExternalLookups:
        """Return the same without what was said so far."""
        return ExternalLookups(self._hook, self._user)

    def destinations(self, address: str) -> tuple[Destination, ...] | None:
        """Return what the hook adds to `address`; None while it has not been asked."""
        return self._said(_Question(_Lookup.ALIAS, address)) if self._hook else ()

    def has_user(self, address: str) -> bool | None:
        """Tell whether `address` has a mailbox elsewhere; None while nobody has been asked."""
        return self._said(_Question(_Lookup.USER, address)) if self._user else False

    def _said(self, question: _Question) -> Any:
        if question not in self._known:
            self.unanswered[question] = None
        return self._known.get(question)

    async def answer(self) -> None:
        """Find out what is not known yet. Raises TemporaryFailure."""
        for question in self.unanswered:
            ask = self._hook if question.lookup is _Lookup.ALIAS else self._user
            assert ask is not None
            self._known[question] = await ask(question.address)
        self.unanswered.clear()


NOBODY = ExternalLookups()


class AliasFinding(NamedTuple):
    """A sentence about an alias; `wrong` if it must be mended, or mail does not arrive."""

    text: str
    wrong: bool


def _pipe_problem(command: str) -> str:
    """Return what keeps a pipe from being run, "" if nothing does."""
    import shlex  # only for pipes
    import shutil

    try:
        program = shlex.split(command)[0]
    except (ValueError, IndexError) as error:
        return f"the pipe {command!r} is malformed: {error}"
    return "" if shutil.which(program) else f"the program {program} is not there, or not executable"


class _Expansion(NamedTuple):
    """An expansion under way: who is found, and which addresses of ours lead nowhere.

    `done` holds what was expanded to its end, and whether it led somewhere, so many ways to it
    cost no more than a single way.
    """

    lookups: ExternalLookups
    found: dict[Destination, None]
    done: dict[Destination, bool]
    dead: dict[str, None]


class Aliases:
    """Expands addresses; `tables` holds the aliases of each domain that is ours."""

    def __init__(
        self,
        tables: Mapping[str, Mapping[str, tuple[Destination, ...]]],
        user_exists: Callable[[str, str], bool],
        suffix_separators: str,
        drop_characters: str,
        broken: Iterable[str] = (),
    ) -> None:
        self._broken = frozenset(broken)  # domains of ours whose files cannot be read
        self._expansions: dict[str, tuple[list[Destination], list[str]]] = {}
        self._user_exists = user_exists
        self._separators = suffix_separators
        self._drops = drop_characters
        self._tables = {
            domain: {
                name if name == "*" else self._compared(name): destinations
                for name, destinations in table.items()
            }
            for domain, table in tables.items()
        }

    async def expand_with(
        self, lookups: ExternalLookups, address: str, unknown: list[str] | None = None
    ) -> list[Destination]:
        """As `expand`, asking `lookups` if that is needed. Raises also TemporaryFailure."""
        if lookups is NOBODY:
            return self._remembered(address, [] if unknown is None else unknown)
        lookups = lookups.fresh()
        while True:
            dead: list[str] = []
            try:
                found = self.expand(address, lookups, dead)
                if not lookups.unanswered:
                    if unknown is not None:
                        unknown += dead
                    return found
            except (NoSuchUser, AliasLoop):
                if not lookups.unanswered:
                    raise
            await lookups.answer()

    def _remembered(self, address: str, unknown: list[str]) -> list[Destination]:
        """As `expand`, which says the same as long as the files do: then there is another of us."""
        if address not in self._expansions:
            dead: list[str] = []
            found = self.expand(address, NOBODY, dead)
            if len(self._expansions) >= _EXPANSIONS_KNOWN:
                self._expansions.clear()
            self._expansions[address] = found, dead
        found, dead = self._expansions[address]
        unknown += dead
        return list(found)

    def _compared(self, name: str) -> str:
        """Return the normalised `name` of an alias as it is compared; its suffix stays."""
        return self.clean(name) + name[len(self._without_suffix(name)) :]

    def is_local(self, domain: str) -> bool:
        """Tell whether `domain` (in Unicode, lower case) is served here."""
        return domain in self._tables or domain in self._broken or domain == "localhost"

    def postmaster_domain(self, hostname: str) -> str:
        """Return the domain whose postmaster is the one of `hostname` (RFC 5321, 4.5.1).

        That is the host itself if it is a domain of ours, else the first that has one.
        """
        for domain in (hostname, *sorted(self._tables)):
            if self.is_local(domain) and any(self._look_up("postmaster", domain)):
                return domain
        return hostname if self.is_local(hostname) else next(iter(sorted(self._tables)), hostname)

    def clean(self, user: str) -> str:
        """Return `user` without suffix and without drop characters."""
        return "".join(letter for letter in self._without_suffix(user) if letter not in self._drops)

    def _without_suffix(self, user: str) -> str:
        for separator in self._separators:
            user = user.partition(separator)[0]
        return user

    def expand(
        self, address: str, lookups: ExternalLookups = NOBODY, unknown: list[str] | None = None
    ) -> list[Destination]:
        """Return the final recipients of `address`, each once.

        To `unknown` are added the addresses of ours on the way that are neither user nor
        alias, nor lead anywhere. Raises NoSuchUser if `address` itself is one of them,
        AliasLoop, and TemporaryFailure for a domain whose files cannot be read. None of this
        counts while `lookups` has unanswered questions.
        """
        expansion = _Expansion(lookups, found={}, done={}, dead={})
        if not self._expand(Destination(DestinationKind.ADDRESS, address), (), expansion):
            raise NoSuchUser(address, [other for other in expansion.dead if other != address])
        if unknown is not None:
            unknown += expansion.dead
        return list(expansion.found)

    def _expand(
        self, destination: Destination, path: tuple[tuple[str, str], ...], expansion: _Expansion
    ) -> bool:
        """Add what `destination` stands for to what is found; false if that is nobody.

        `path` has the names, with their domains, that led here; "" is the catch-all.
        """
        if len(path) > ALIAS_DEPTH_LIMIT:
            far = f"in a circle, or deeper than {ALIAS_DEPTH_LIMIT} steps"
            raise AliasLoop(f"the aliases behind {destination.value} lead {far}")
        lookups, found, done, dead = expansion
        user, domain = split_address(destination.value)
        if destination.kind == DestinationKind.PIPE or destination.via or not self.is_local(domain):
            found[destination] = None
            return True
        if domain in self._broken:
            raise broken_domain(domain)
        name, next_destinations = self._look_up(user, domain, lookups)
        if name and not next_destinations:
            found[Destination(DestinationKind.ADDRESS, f"{name}@{domain}")] = None
            return True
        if not name and ("", domain) in path:
            next_destinations = ()  # the catch-all leads to nobody that it would not catch again
        path = (*path, (name, domain))
        leads_somewhere = False
        for pattern in next_destinations:
            following = self._fill_in(pattern, user)
            if self._names_itself(following, name, domain, lookups):
                own = normalize_user(split_address(following.value)[0])
                mailbox = self._user_of(own, domain, lookups)
                if mailbox:
                    found[Destination(DestinationKind.ADDRESS, f"{mailbox}@{domain}")] = None
                else:
                    dead[following.value] = None
                done[following] = bool(mailbox)
            elif following not in done:
                done[following] = self._expand(following, path, expansion)
            leads_somewhere = leads_somewhere or done[following]
        if not leads_somewhere:
            dead[destination.value] = None
        return leads_somewhere

    def _names_itself(
        self, destination: Destination, name: str, domain: str, lookups: ExternalLookups
    ) -> bool:
        """Tell whether the alias `name` has `destination`, its own mailbox, on its right side."""
        user, of = split_address(destination.value)
        if destination.kind == DestinationKind.PIPE or destination.via or of != domain or not name:
            return False
        return self._look_up(user, domain, lookups)[0] == name

    def _look_up(
        self, user: str, domain: str, lookups: ExternalLookups = NOBODY
    ) -> tuple[str, tuple[Destination, ...]]:
        """Return the name that was found and its destinations; a user has no destinations.

        The name is "" for what only "*" answers to, or nobody, and while an answer is missing.
        """
        table = self._tables.get(domain, {})
        try:
            normal = normalize_user(user)
        except ValueError:
            return "", ()
        clean = self.clean(normal)
        for asked, name in {user: self._compared(normal), clean: clean}.items():
            told = lookups.destinations(f"{asked}@{domain}")
            if told is None:
                return "", ()
            destinations = (() if name == "*" else table.get(name, ())) + told
            if name and destinations:
                return name, destinations
        mailbox = self._user_of(normal, domain, lookups)
        if mailbox is None or mailbox:
            return mailbox or "", ()
        return "", table.get("*", ()) + (lookups.destinations(f"*@{domain}") or ())

    def _user_of(self, user: str, domain: str, lookups: ExternalLookups) -> str | None:
        """Return the user whose mailbox that is, as the users are named; "" for nobody.

        It is None while an answer is missing.
        """
        names = dict.fromkeys((user, self.clean(user), self._without_suffix(user)))
        for name in names:
            if self._user_exists(name, domain):
                return name
        for name in names:
            known = lookups.has_user(f"{name}@{domain}")
            if known is None or known:
                return name if known else None
        return ""

    def findings(
        self, domain: str, users: Iterable[str], everybody: bool
    ) -> Iterator[AliasFinding]:
        """Yield what the owner of `domain` should know of its aliases.

        `users` are the names of its users. Unless they are `everybody`, as a hook or Dovecot
        may know others, nothing is said of users that are unknown.
        """
        for name, destinations in self._tables.get(domain, {}).items():
            address = f"{name}@{domain}"
            for destination in destinations:
                if destination.kind == DestinationKind.PIPE and (
                    problem := _pipe_problem(destination.value)
                ):
                    yield AliasFinding(f"{address}: {problem}", True)
            for asked in self._asked_for(address, destinations):
                for text in self._dead_ends(address, asked, everybody):
                    yield AliasFinding(text, True)
        for user in users:
            address = f"{user}@{domain}"
            with contextlib.suppress(NoSuchUser, AliasLoop):  # said above
                if Destination(DestinationKind.ADDRESS, address) not in self.expand(address):
                    text = f"{address}: an alias hides this user, who can log in but gets no mail"
                    yield AliasFinding(text, False)

    @staticmethod
    def _asked_for(address: str, destinations: Sequence[Destination]) -> list[str]:
        """Return what to expand to check an alias; for "*", what it names on its right side."""
        if not address.startswith("*@"):
            return [address]
        return [
            destination.value
            for destination in destinations
            if destination.kind == DestinationKind.ADDRESS
            and not destination.via
            and not destination.value.startswith("*@")
        ]

    def _dead_ends(self, alias: str, address: str, everybody: bool) -> Iterator[str]:
        unknown: list[str] = []
        try:
            self.expand(address, NOBODY, unknown)
        except AliasLoop as error:
            yield f"{alias}: {error}"
        except NoSuchUser as error:
            if everybody:
                names = ", ".join(error.unknown or [address])
                yield f"{alias} leads to nobody: there is no user or alias {names}"
        for other in unknown if everybody else ():
            yield f"{alias}: there is no user or alias {other}; the others get its mail"

    @staticmethod
    def _fill_in(destination: Destination, user: str) -> Destination:
        local, domain = split_address(destination.value)
        if destination.kind == DestinationKind.ADDRESS and local == "*":
            return destination._replace(value=f"{user}@{domain}")
        return destination


def destination_text(destination: Destination) -> str:
    """Return a final recipient as the aliases file writes it."""
    if destination.kind == DestinationKind.PIPE:
        return f"| {destination.value}"
    return destination.value + (f" via {'/'.join(destination.via)}" if destination.via else "")


# ======================================================================================
# ROOM: MESSAGE
#
# What is in a message: its header block and its body, as octets with CRLF.
#
# The fields that we add are known only when the message is complete, and by then the
# message is on the disk. So they are kept apart (`prefix`) and put in front whenever the
# message is read; nothing is copied to make room for them.
# ======================================================================================

HEADER_LIMIT = 256 * 1024  # octets of a header block

# RFC 5322, 3.6.8: field-name = 1*ftext, printable ASCII but ":"; 4.5.8 lets white space
# stand before the colon, and some programs put it there.
_FIELD = re.compile(rb"(([!-9;-~]+)[ \t]*:(?:[^\r]+|\r(?!\n)|\r\n(?=[ \t]))*(?:\r\n|\Z))")
# The start of a line that is neither a field nor the continuation of one.
_NO_FIELD = re.compile(rb"(?:\A(?=[ \t])|(?:\A|\r\n)(?![ \t]|[!-9;-~]+[ \t]*:|\Z))")


_FIELD_LIMIT = 1000  # fields of a header
_CLAIM_LIMIT = 1000  # octets of Authentication-Results that say whose they are


def header_block(data: bytes) -> bytes | None:
    """Return the header block at the start of `data`, its empty line left out.

    None if the header does not end in `data`; the whole of a message that has no
    empty line is its header (RFC 5322, 3.5), which only its reader can know.
    """
    if data.startswith(b"\r\n"):
        return b""
    end = data.find(b"\r\n\r\n")
    return None if end < 0 else data[: end + 2]


class Field(NamedTuple):
    """A header field: its name in lower case, and all of it as it came, with its CRLFs."""

    name: str
    raw: bytes

    @property
    def value(self) -> bytes:
        """What stands after the colon, CRLFs included."""
        return self.raw.partition(b":")[2]


def header_fields(block: bytes) -> list[Field]:
    """Return the fields of a header block. Raises ValueError with a bad line."""
    bad = _NO_FIELD.search(block)
    if bad is not None:
        line = block[bad.end() : bad.end() + 200].partition(b"\r\n")[0]
        raise ValueError(printable(line.decode("utf-8", "replace"), 60))
    found = _FIELD.findall(block)
    if len(found) > _FIELD_LIMIT:
        raise ValueError(f"more than {_FIELD_LIMIT} fields")
    return [Field(str(name, "ascii").lower(), raw) for raw, name in found]


# RFC 5322, 3.2.4 and 3.2.2, without the structure of comments, which nest.
_OUTSIDE_COMMENT = re.compile(
    r'(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<open>\()|[^"()\\]+|\\.', re.DOTALL
)
_INSIDE_COMMENT = re.compile(r"(?P<open>\()|(?P<close>\))|[^()\\]+|\\.", re.DOTALL)


def without_comments(text: str, quoted: str | None = None) -> str:
    """Return the text of a structured field without its comments.

    Where `quoted` is given, it stands for each quoted string. Raises ValueError if a
    comment or a quoted string is not closed.
    """
    kept, depth, position = [], 0, 0
    while position < len(text):
        pattern = _INSIDE_COMMENT if depth else _OUTSIDE_COMMENT
        match = pattern.match(text, position)
        if match is None:
            raise ValueError("a quoted string or a comment is not closed")
        position = match.end()
        if match.lastgroup == "open":
            depth += 1
            kept.append(" ")
        elif match.lastgroup == "close":
            depth -= 1
        elif not depth:
            kept.append(quoted if quoted and match.lastgroup == "quoted" else match[0])
    if depth:
        raise ValueError("a comment is not closed")
    return "".join(kept)


_ANGLE_ADDRESS = re.compile(r"[^<>]*<(?:@[^<>:]*:)?[^<>@]+@([^<>@]+)>\s*")
_BARE_ADDRESS = re.compile(r"[^<>@]+@([^<>@]+)")
# What most fields are, and can be read in one way only: "Name <local@domain>", "local@domain".
_ORDINARY_FROM = re.compile(
    rb"(?:[\w .'-]*<[\w.+=-]+@([\w-]+(?:\.[\w-]+)*)>| ?[\w.+=-]+@([\w-]+(?:\.[\w-]+)*))(?:\r\n)?"
)
_AFTER_AT = re.compile(r"@[\s\"'\[(<]*([\w.-]+)")
AUTHORS_LIMIT = 10  # domains in From; above, the field is not read to its end


def author_addresses(value: bytes) -> list[str]:
    """Return the addresses in a From field; one that cannot be read is returned as it is."""
    text = value.decode("utf-8", "replace")
    try:
        parts = re.split(r"[,;]", without_comments(text, quoted='""'))
    except ValueError:
        return [text.strip()]
    found = []
    for part in filter(None, (text.strip() for text in parts)):
        match = re.fullmatch(r"[^<>\\]*<([^<>]*)>", part)
        if match is None and re.search(r"[<>\\]", part):
            return [text.strip()]  # who knows whom a reader would see in it
        found.append(re.sub(r"\s+", "", match[1] if match else part.rpartition(":")[2]))
    return found


def author_domains(value: bytes) -> list[str]:
    """Return the domains of the addresses in a From field, as A-labels, each once.

    From a field that is malformed, every domain that a reader might take for one is
    returned, but never more than one above AUTHORS_LIMIT. (RFC 5322, 3.6.2 and 3.4)
    """
    ordinary = _ORDINARY_FROM.fullmatch(value)
    if ordinary is not None:
        return [domain_to_ascii(str(ordinary[1] or ordinary[2], "ascii"))]
    text = value.decode("utf-8", "replace")
    try:
        plain = without_comments(text, quoted='"')
        parts = re.split(r"[,;]", re.sub(r"(^|[,;])[^<>@,;:]*:", r"\1", plain))
        return _first_domains(_domain_of(part) for part in parts if part.strip())
    except ValueError:
        return _first_domains(filter(None, map(_possible_domain, _AFTER_AT.findall(text))))


def _first_domains(found: Iterable[str]) -> list[str]:
    domains: dict[str, None] = {}
    for domain in found:
        domains[domain] = None
        if len(domains) > AUTHORS_LIMIT:
            break
    return list(domains)


def _domain_of(part: str) -> str:
    """Return the domain of one address. Raises ValueError if it has none that is well-formed."""
    match = _ANGLE_ADDRESS.fullmatch(part) or _BARE_ADDRESS.fullmatch(part)
    if match is None:
        raise ValueError("the address is malformed")
    domain = re.sub(r"\s*\.\s*", ".", match[1].strip())
    if domain.startswith("[") and domain.endswith("]") and is_ip_address(domain[1:-1]):
        return domain
    domain = domain_to_ascii(domain).rstrip(".")
    if not ASCII_DOMAIN.fullmatch(domain):
        raise ValueError("the domain is malformed")
    return domain


def _possible_domain(text: str) -> str:
    with contextlib.suppress(ValueError):
        domain = domain_to_ascii(text.strip(".-"))
        return domain if ASCII_DOMAIN.fullmatch(domain) else ""
    return ""


def claims_results_of(field: Field, hostname: str) -> bool:
    """Tell whether `field` is an Authentication-Results field in the name of `hostname`.

    One whose server cannot be read counts, for who reads it later may read it so.
    (RFC 8601, 2.2 and 5)
    """
    if field.name != "authentication-results":
        return False
    value = field.value[:_CLAIM_LIMIT].partition(b";")[0]
    try:
        text = without_comments(value.decode("utf-8", "replace")).strip()
        if text.startswith('"'):
            text = re.sub(r"\\(.)", r"\1", text[1:])
        match = re.match(r"[\w.-]+", re.sub(r"\s*\.\s*", ".", text))
        return match is None or domain_to_ascii(match[0].rstrip(".")) == hostname
    except ValueError:
        return True


class BodyHash:
    """The SHA-256 of a body in a canonical form of DKIM (RFC 6376, 3.4.3 and 3.4.4).

    The body comes in pieces, split anywhere, with CRLF; what it needs of memory does not
    grow with it. What may turn out to be the end of a line or of the body is only counted.
    """

    def __init__(self, relaxed: bool) -> None:
        import hashlib  # loads OpenSSL's hashes; only for signatures

        self.length = 0  # octets of the canonical form so far
        self._relaxed = relaxed
        self._hash = hashlib.sha256()
        self._held = b""  # a CR at the end of a piece
        self._lines = 0  # ends of lines since the last content
        self._space = False  # white space since the last content, on the same line

    def feed(self, piece: bytes) -> None:
        """Take the next octets of the body, however they are cut."""
        data = self._held + piece
        self._held = b"\r" if data.endswith(b"\r") else b""
        data = data[: len(data) - len(self._held)]
        blanks = b" \t\r\n" if self._relaxed else b"\r\n"
        content = data.lstrip(blanks)
        self._count(data[: len(data) - len(content)])
        if content:
            core = content.rstrip(blanks)
            self._emit_counted()
            self._emit(self._canonical(core))
            self._count(content[len(core) :])

    def digest(self) -> bytes:
        """End the body and return its hash."""
        if self._space:
            self._emit_counted()
        if self.length or not self._relaxed:
            self._emit(b"\r\n")
        return self._hash.digest()

    def _count(self, blanks: bytes) -> None:
        lines = blanks.count(b"\n")
        self._lines += lines
        last = blanks[blanks.rfind(b"\n") + 1 :]
        self._space = bool(last) or (self._space and not lines)

    def _emit_counted(self) -> None:
        while self._lines:
            count = min(self._lines, CHUNK)
            self._emit(b"\r\n" * count)
            self._lines -= count
        if self._space:
            self._emit(b" ")
        self._space = False

    def _emit(self, data: bytes) -> None:
        self.length += len(data)
        self._hash.update(data)

    def _canonical(self, core: bytes) -> bytes:
        if not self._relaxed:
            return core
        core = core.replace(b"\t", b" ")
        while b"  " in core:  # quicker than a pattern, and each round halves the longest run
            core = core.replace(b"  ", b" ")
        return core.replace(b" \r\n", b"\r\n")


class Message(NamedTuple):
    """A message on the disk, the fields in front of it, and where its octets are.

    `data` holds the message while it is small and was just received; otherwise it is
    read from the first `size` octets of `path`.
    """

    prefix: bytes
    path: str
    size: int
    data: bytes | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the message in pieces, with CRLF. Raises OSError."""
        yield self.prefix
        if self.data is not None:
            yield self.data
            return
        with open(self.path, "rb", buffering=0) as file:
            left = self.size
            while left:
                chunk = file.read(min(CHUNK, left))
                if not chunk:
                    raise OSError(errno.EIO, "the file is shorter than its name says", self.path)
                left -= len(chunk)
                yield chunk

    def header(self) -> bytes:
        """Return the header block, what we put in front included. Raises OSError."""
        block = b""
        for chunk in self.chunks():
            block += chunk
            found = header_block(block)
            if found is not None:
                return found
            if len(block) > HEADER_LIMIT + len(self.prefix):
                break
        return block


def with_lf(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield `chunks` with each CRLF turned into LF, wherever it is split."""
    held = b""
    for chunk in chunks:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        yield chunk[: len(chunk) - len(held)].replace(b"\r\n", b"\n")
    if held:
        yield held


_FOLD = "\r\n\t"


def fold(name: str, *parts: str) -> bytes:
    """Return a header field, each of `parts` on a line of its own but the first."""
    return f"{name}: {_FOLD.join(parts)}\r\n".encode()


TOKEN_TEXT = re.compile(r"[A-Za-z0-9!#$%&'*+^_`{|}~.-]+")


def field_value(text: str) -> str:
    """RFC 2045, 5.1: a token, or a quoted-string."""
    if TOKEN_TEXT.fullmatch(text):
        return text
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def field_comment(text: str) -> str:
    """Return `text` as it may stand within a comment of a field (RFC 5322, 3.2.2)."""
    return re.sub(r"[()\\]", " ", in_ascii(text))


# ======================================================================================
# ROOM: HOOKS
#
# The operator's own programs, in config_dir/hooks; each is used if it is there and may
# be run, from one message to the next.
#
#     alias-resolve ADDRESS   prints what the right side of an alias would be, or nothing
#     post-data               reads a message before it is accepted; see `Hooks.post_data`
#
# A program that fails, or takes too long, is a temporary failure, and its last line goes
# to who is waiting. What it prints is taken only if it is what it should be.
# ======================================================================================

_ALIAS_HOOK_SECONDS = 5.0
_POST_DATA_SECONDS = 60.0
_HOOK_VARIABLES = ("USER", "SHELL", "PATH", "LANG")  # of ours that post-data gets
_HOOK_REFUSES = 20  # the exit status of post-data that means "never"
_HOOKS = ("alias-resolve", "post-data")


def hook_warnings(config_dir: str) -> Iterator[str]:
    """Yield which hooks are there, but are left out."""
    for name in _HOOKS:
        path = os.path.join(config_dir, "hooks", name)
        if os.path.lexists(path) and not hook_path(config_dir, name):
            yield f"{path} is left out: it is no file that may be run"


def hook_path(config_dir: str, name: str) -> str:
    """Return the path of a hook, "" if it is not there or may not be run."""
    path = f"{config_dir}/hooks/{name}"
    return path if os.access(path, os.X_OK) and os.path.isfile(path) else ""


class Hooks:
    """Runs the programs in `config_dir`/hooks."""

    def __init__(self, programs: Programs, log: Log, config_dir: str) -> None:
        self._programs = programs
        self._log = log
        self._config_dir = config_dir

    def has(self, name: str) -> bool:
        """Tell whether there is a hook of this name now."""
        return bool(hook_path(self._config_dir, name))

    async def alias_destinations(self, address: str) -> tuple[Destination, ...]:
        """Return what alias-resolve says of `address`. Raises TemporaryFailure."""
        path = self._path("alias-resolve")
        if not path:
            return ()
        outcome = await self._run([path, address], [], _ALIAS_HOOK_SECONDS, inherited_environment())
        if outcome.status:
            raise self._failed("alias-resolve", outcome, outcome.errors, outcome.output)
        try:
            if len(outcome.output) >= PROGRAM_OUTPUT_LIMIT:
                raise ValueError("it prints more than is read, and a part will not do")
            printed = outcome.output.decode().strip()
            if UNPRINTABLE.search(printed.replace("\t", " ")):
                raise ValueError("expected one line of text")
            domain = split_address(address)[1]
            return parse_destinations(printed, domain) if printed else ()
        except ValueError as error:
            self._log.error("hooks", f"{path} {address}: {error}")
            raise TemporaryFailure("the aliases of this address cannot be told", "4.3.5") from None

    async def post_data(self, environment: Mapping[str, str], message: Iterable[bytes]) -> bytes:
        """Show `message` to post-data; return the header fields that it wants on top.

        Exit status 0: accepted, and standard output is header fields, or nothing. 20:
        refused for good (PermanentFailure). Any other: refused for now (TemporaryFailure).
        The text of a failure is the last line that was printed.
        """
        path = self._path("post-data")
        if not path:
            return b""
        ours = {key: os.environ[key] for key in _HOOK_VARIABLES if key in os.environ}
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PWD": self._config_dir,
                       **ours, **environment}  # fmt: skip
        outcome = await self._run([path], message, _POST_DATA_SECONDS, environment)
        self._log.count(Metrics.POST_DATA, str(outcome.status))
        if outcome.status == _HOOK_REFUSES:
            said = self._last_line(outcome.output, outcome.errors)
            raise PermanentFailure(said or "refused by a filter", "5.7.1")
        if outcome.status:
            raise self._failed("post-data", outcome, outcome.output, outcome.errors)
        return self._fields(path, outcome.output)

    def _path(self, name: str) -> str:
        return hook_path(self._config_dir, name)

    async def _run(
        self,
        argv: Sequence[str],
        input: Iterable[bytes],
        seconds: float,
        environment: Mapping[str, str],
    ) -> Outcome:
        name = os.path.basename(argv[0])
        try:
            return await self._programs.run(
                argv, input, seconds, env=environment, cwd=self._config_dir
            )
        except Expired:
            self._log.error("hooks", f"{argv[0]} took more than {seconds:g}s")
            raise TemporaryFailure(f"{name} took too long", "4.3.0") from None
        except (OSError, ValueError) as error:
            self._log.error("hooks", f"{argv[0]} cannot be run: {reason(error)}")
            raise TemporaryFailure(f"{name} cannot be run", "4.3.0") from None

    def _failed(self, name: str, outcome: Outcome, *printed: bytes) -> TemporaryFailure:
        said = self._last_line(*printed)
        how = f"exit status {outcome.status}" if outcome.status > 0 else "killed by a signal"
        errors = printable(outcome.errors[-500:].decode("utf-8", "replace"))
        self._log.error("hooks", f"{name} failed, {how}: {said} {errors}")
        return TemporaryFailure(said or f"{name} failed", "4.3.0")

    @staticmethod
    def _last_line(*printed: bytes) -> str:
        """Return the last line of the first of `printed` that has any."""
        for text in printed:
            lines = [line.strip() for line in text.decode("utf-8", "replace").split("\n")]
            if any(lines):
                return printable([line for line in lines if line][-1], 200)
        return ""

    def _fields(self, path: str, output: bytes) -> bytes:
        if len(output) >= PROGRAM_OUTPUT_LIMIT:
            self._log.error("hooks", f"{path} prints more than a header may have, left out")
            return b""
        block = re.sub(rb"\r?\n", b"\r\n", output.strip(b"\r\n"))
        if not block:
            return b""
        block += b"\r\n"
        try:
            if b"\r\n\r\n" in block or b"\r" in block.replace(b"\r\n", b"") or b"\0" in block:
                raise ValueError("an empty line")
            header_fields(block)
        except ValueError as error:
            self._log.error("hooks", f"{path} prints what is no header, left out: {error}")
            return b""
        return block


# ======================================================================================
# ROOM: KEYS
#
# Keys and certificates, from arithmetic alone, so that no compiled package and no openssl
# is needed: DER and PEM (X.690, RFC 7468), RSA and Ed25519 keys as DKIM uses them, what
# DANE reads in a certificate, requests for certificates, and self-signed ones.
#
# - RSA: keys are made and read here; signatures are dkimpy's business.
# - Ed25519 (RFC 8032): keys and signatures, in a millisecond or two each.
# - P-256 (SEC 2, 2.4.2): keys, and signatures by ECDSA with SHA-256 (FIPS 186-5), for requests
#   to an authority and for certificates, X.509 version 3 (RFC 5280).
#
# The arithmetic does not run in constant time: who can measure this process to the
# microsecond, on this machine, may learn about its keys.
# ======================================================================================

_RSA_OID = "1.2.840.113549.1.1.1"
_ED25519_OID = "1.3.101.112"
_RSA_EXPONENT = 65537
_RSA_LIMITS = (1024, 8192)  # bits of a modulus; RFC 8301, 3.2 asks for 1024 at least


class RsaKey(NamedTuple):
    """An RSA private key; the fields of RFC 8017, A.1.2."""

    modulus: int
    exponent: int
    private_exponent: int
    prime1: int
    prime2: int
    exponent1: int
    exponent2: int
    coefficient: int

    @property
    def public(self) -> bytes:
        """The SubjectPublicKeyInfo in DER."""
        return rsa_public_info(self.modulus, self.exponent)

    def to_pem(self) -> str:
        """Return the key as PKCS#8 (RFC 5958)."""
        numbers = _der(0x30, _der_integer(0), *map(_der_integer, self))
        algorithm = _der(0x30, _oid(_RSA_OID), _der(0x05))
        return _pem("PRIVATE KEY", _der(0x30, _der_integer(0), algorithm, _der(0x04, numbers)))


class Ed25519Key(NamedTuple):
    """An Ed25519 private key; `seed` has 32 octets (RFC 8032, 5.1.5)."""

    seed: bytes

    @property
    def public(self) -> bytes:
        """The public key, 32 octets."""
        return _ed_encode(_ed_multiply(self._expanded()[0], _ED_BASE))

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 octets; RFC 8032, 5.1.6."""
        secret, prefix = self._expanded()
        public = self.public
        nonce = _ed_hash(prefix, message) % _ED_ORDER
        commitment = _ed_encode(_ed_multiply(nonce, _ED_BASE))
        challenge = _ed_hash(commitment, public, message)
        return commitment + ((nonce + challenge * secret) % _ED_ORDER).to_bytes(32, "little")

    def to_pem(self) -> str:
        """Return the key as PKCS#8 (RFC 8410, 7)."""
        algorithm = _der(0x30, _oid(_ED25519_OID))
        seed = _der(0x04, _der(0x04, self.seed))
        return _pem("PRIVATE KEY", _der(0x30, _der_integer(0), algorithm, seed))

    def _expanded(self) -> tuple[int, bytes]:
        import hashlib  # loads OpenSSL's hashes; only for signatures

        digest = hashlib.sha512(self.seed).digest()
        secret = int.from_bytes(digest[:32], "little")
        return secret & ((1 << 254) - 8) | (1 << 254), digest[32:]


PrivateKey = RsaKey | Ed25519Key


def new_key(algorithm: str) -> PrivateKey:
    """Return a fresh key: "ed25519", or "rsa" and its bits, as in "rsa2048".

    An RSA key takes up to half a minute.
    """
    if algorithm == "ed25519":
        return Ed25519Key(os.urandom(32))
    bits = int(algorithm.removeprefix("rsa"))
    while True:
        p, q = _random_prime(bits // 2), _random_prime(bits // 2)
        if p != q:
            return _rsa_key(p, q)


def parse_private_key(pem: bytes, path: str) -> PrivateKey:
    """Return the RSA (PKCS#1 or PKCS#8) or Ed25519 (PKCS#8) key in `pem`.

    `path` is for the message of the ConfigError that says what is wrong.
    """
    match = re.search(rb"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", pem, re.DOTALL)
    if match is None:
        raise ConfigError(path, 0, "expected a private key in PEM")
    kind = match[1].decode()
    is_encrypted = "ENCRYPTED" in kind or b"Proc-Type" in match[2]
    try:
        data = b"" if is_encrypted else base64.b64decode(match[2])
        if kind == "RSA PRIVATE KEY" and not is_encrypted:
            return _parse_rsa_key(data)
        if kind == "PRIVATE KEY":
            return _parse_pkcs8(data)
    except (ValueError, IndexError, TypeError) as error:
        raise ConfigError(path, 0, f"expected a key that can be used: {error}") from None
    hint = "; decrypt it with 'openssl pkey'" if is_encrypted else ""
    raise ConfigError(path, 0, f"expected an RSA or Ed25519 key, found {kind}{hint}")


def _parse_pkcs8(data: bytes) -> PrivateKey:
    """RFC 5958, 2: SEQUENCE of version, algorithm and the key in an OCTET STRING."""
    _, (_, algorithm), (_, key), *_ = _elements(_only(data, 0x30))
    _, oid = next(_elements(algorithm), (0, b""))
    if oid == _only(_oid(_RSA_OID), 0x06):
        return _parse_rsa_key(key)
    if oid == _only(_oid(_ED25519_OID), 0x06):
        seed = _only(key, 0x04)
        if len(seed) != 32:
            raise ValueError("an Ed25519 key has 32 octets")
        return Ed25519Key(seed)
    raise ValueError("the algorithm is neither RSA nor Ed25519")


def _parse_rsa_key(data: bytes) -> RsaKey:
    """RFC 8017, A.1.2: nine INTEGERs, the first of them the version."""
    numbers = [_integer(content) for tag, content in _elements(_only(data, 0x30)) if tag == 0x02]
    if len(numbers) != 9:
        raise ValueError("an RSA key has nine numbers")
    key = RsaKey(*numbers[1:])
    p, q, d = key.prime1, key.prime2, key.private_exponent
    if min(p, q) < 3 or key != _rsa_key_of(p, q, key.exponent, d):
        raise ValueError("the numbers of the RSA key do not fit together")
    if any(key.exponent * d % (prime - 1) != 1 for prime in (p, q)):
        raise ValueError("the numbers of the RSA key do not fit together")
    least, most = _RSA_LIMITS
    if not least <= key.modulus.bit_length() <= most:
        raise ValueError(f"an RSA key must have {least} to {most} bits")
    return key


def rsa_public_info(modulus: int, exponent: int) -> bytes:
    """Return the SubjectPublicKeyInfo of an RSA key in DER; RFC 5280, 4.1, RFC 8017, A.1.1."""
    algorithm = _der(0x30, _oid(_RSA_OID), _der(0x05))
    numbers = _der(0x30, _der_integer(modulus), _der_integer(exponent))
    return _der(0x30, algorithm, _der(0x03, b"\0", numbers))


def rsa_public_numbers(data: bytes) -> tuple[int, int]:
    """Return modulus and exponent of a SubjectPublicKeyInfo or RSAPublicKey in DER.

    Raises ValueError if they are none that a signature should be checked with.
    """
    parts = list(_elements(_only(data, 0x30)))
    if parts and parts[0][0] == 0x30:  # an algorithm comes first: SubjectPublicKeyInfo
        parts = list(_elements(_only(parts[-1][1][1:], 0x30)))
    if [tag for tag, _ in parts] != [0x02, 0x02]:
        raise ValueError("the public key is no RSA key in DER")
    modulus, exponent = (_integer(content) for _, content in parts)
    if modulus < 0:
        raise ValueError("the modulus of the RSA key is negative")
    if not _RSA_LIMITS[0] <= modulus.bit_length() <= _RSA_LIMITS[1]:
        raise ValueError(f"an RSA key of {modulus.bit_length()} bits is not acceptable")
    if not 2 < exponent < 1 << 32 or exponent % 2 == 0:
        raise ValueError("the exponent of the RSA key is not acceptable")
    return modulus, exponent


def ed25519_verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether `signature` is valid; RFC 8032, 5.1.7."""
    point = _ed_decode(public)
    s = int.from_bytes(signature[32:], "little")
    if len(signature) != 64 or point is None or s >= _ED_ORDER:
        return False
    challenge = _ed_hash(signature[:32], public, message) % _ED_ORDER
    x, y, z, t = point
    return _ed_encode(_ed_multiply(s, _ED_BASE, challenge, (-x, y, z, -t))) == signature[:32]


_ED_PRIME = (1 << 255) - 19
_ED_ORDER = (1 << 252) + 27742317777372353535851937790883648493
_ED_D = -121665 * pow(121666, -1, _ED_PRIME) % _ED_PRIME

_EdPoint = tuple[int, int, int, int]  # extended homogeneous coordinates; RFC 8032, 5.1.4
_ED_ZERO: _EdPoint = (0, 1, 1, 0)


def _ed_hash(*parts: bytes) -> int:
    import hashlib  # loads OpenSSL's hashes; only for signatures

    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little")


def _ed_add(one: _EdPoint, other: _EdPoint) -> _EdPoint:
    """RFC 8032, 5.1.4."""
    (x1, y1, z1, t1), (x2, y2, z2, t2) = one, other
    a, b = (y1 - x1) * (y2 - x2) % _ED_PRIME, (y1 + x1) * (y2 + x2) % _ED_PRIME
    c, d = 2 * t1 * t2 * _ED_D % _ED_PRIME, 2 * z1 * z2 % _ED_PRIME
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _ED_PRIME, g * h % _ED_PRIME, f * g % _ED_PRIME, e * h % _ED_PRIME


def _ed_multiply(one: int, point: _EdPoint, two: int = 0, other: _EdPoint = _ED_ZERO) -> _EdPoint:
    """Return `one` times `point` plus `two` times `other`, in one pass over the bits."""
    table = (_ED_ZERO, point, other, _ed_add(point, other))
    result = _ED_ZERO
    for bit in range(max(one, two).bit_length() - 1, -1, -1):
        result = _ed_add(result, result)
        chosen = (one >> bit & 1) | (two >> bit & 1) << 1
        if chosen:
            result = _ed_add(result, table[chosen])
    return result


def _ed_encode(point: _EdPoint) -> bytes:
    """RFC 8032, 5.1.2."""
    x, y, z, _ = point
    inverse = pow(z, -1, _ED_PRIME)
    x, y = x * inverse % _ED_PRIME, y * inverse % _ED_PRIME
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _ed_decode(octets: bytes) -> _EdPoint | None:
    """RFC 8032, 5.1.3; None if no point is encoded so."""
    if len(octets) != 32:
        return None
    y = int.from_bytes(octets, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    u, v = y * y - 1, _ED_D * y * y + 1
    x = u * pow(v, 3, _ED_PRIME) * pow(u * pow(v, 7, _ED_PRIME), (_ED_PRIME - 5) // 8, _ED_PRIME)
    if (v * x * x + u) % _ED_PRIME == 0:
        x *= pow(2, (_ED_PRIME - 1) // 4, _ED_PRIME)
    x %= _ED_PRIME
    if y >= _ED_PRIME or (v * x * x - u) % _ED_PRIME or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = _ED_PRIME - x
    return x, y, 1, x * y % _ED_PRIME


_ED_BASE: _EdPoint = (
    0x216936D3CD6E53FEC0A4E231FDD6DC5C692CC7609525A7B2C9562D608F25D51A,
    0x6666666666666666666666666666666666666666666666666666666666666658,
    1,
    0x67875F0FD78B766566EA4E8E64ABE37D20F09F80775152F56DDE8AB3A5B7DDA3,
)


def _rsa_key(p: int, q: int) -> RsaKey:
    """Return the key with the primes `p` and `q`; RFC 8017, 3.2."""
    p, q = max(p, q), min(p, q)
    return _rsa_key_of(p, q, _RSA_EXPONENT, pow(_RSA_EXPONENT, -1, (p - 1) * (q - 1)))


def _rsa_key_of(p: int, q: int, e: int, d: int) -> RsaKey:
    """Return the key with these numbers, the rest computed. Raises ValueError if p is q."""
    return RsaKey(
        p * q,
        e,
        private_exponent=d,
        prime1=p,
        prime2=q,
        exponent1=d % (p - 1),
        exponent2=d % (q - 1),
        coefficient=pow(q, -1, p),
    )


@functools.cache
def _small_primes() -> tuple[int, ...]:
    limit = 8192
    sieve = bytearray([1]) * limit
    for number in range(3, 91, 2):
        sieve[number * number :: number] = bytes(len(range(number * number, limit, number)))
    return tuple(number for number in range(3, limit, 2) if sieve[number])


def _random_prime(bits: int) -> int:
    """Return a prime with its two highest bits set, that fits the public exponent.

    From a random place upwards, what small primes divide is passed over.
    """
    while True:
        start = int.from_bytes(os.urandom(bits // 8), "big") | 3 << (bits - 2) | 1
        remainders = [(prime, start % prime) for prime in _small_primes()]
        for step in range(0, 4096, 2):
            if any((rest + step) % prime == 0 for prime, rest in remainders):
                continue
            number = start + step
            if (number - 1) % _RSA_EXPONENT and _is_prime(number):
                return number


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test (FIPS 186-5, B.3.1), twenty rounds."""
    if pow(2, number - 1, number) != 1:
        return False
    twos = (number - 1 & -(number - 1)).bit_length() - 1
    odd = number - 1 >> twos
    for _ in range(20):
        base = int.from_bytes(os.urandom(number.bit_length() // 8), "big") % (number - 3) + 2
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def public_key_info(certificate: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo of a certificate, both in DER; RFC 5280, 4.1.

    Raises ValueError.
    """
    return _der(*_certificate_parts(certificate)[5])


def is_self_signed(pem: bytes) -> bool:
    """Tell whether the first certificate in `pem` names itself as its issuer. Raises ValueError."""
    parts = _certificate_parts(_first_certificate(pem))
    return parts[2] == parts[4]


def _certificate_parts(certificate: bytes) -> list[tuple[int, bytes]]:
    """Return serial number, signature, issuer, validity, subject, public key, and what follows."""
    body = next(_elements(_only(certificate, 0x30)), (0, b""))[1]
    parts = [part for part in _elements(body) if part[0] != 0xA0]  # [0]: the version
    if len(parts) < 6:
        raise ValueError("the certificate is cut short")
    return parts


_P = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
_CURVE_OID = "1.2.840.10045.3.1.7"
_KEY_OID = "1.2.840.10045.2.1"
_SIGNATURE_OID = "1.2.840.10045.4.3.2"
_COMMON_NAME_OID = "2.5.4.3"
_ALTERNATIVE_NAMES_OID = "2.5.29.17"
_CONSTRAINTS_OID = "2.5.29.19"
_EXTENSION_REQUEST_OID = "1.2.840.113549.1.9.14"
_ACME_IDENTIFIER_OID = "1.3.6.1.5.5.7.1.31"
_TRUE = b"\x01\x01\xff"  # as BOOLEAN
_CERTIFICATE_SECONDS = 10 * 365 * 86400


class EcKey(NamedTuple):
    """A private key on the curve P-256; `x` and `y` are the public point."""

    secret: int
    x: int
    y: int

    @property
    def public(self) -> bytes:
        """The SubjectPublicKeyInfo in DER; RFC 5480, 2."""
        algorithm = _der(0x30, _oid(_KEY_OID), _oid(_CURVE_OID))
        return _der(0x30, algorithm, self._point())

    def sign(self, data: bytes) -> tuple[int, int]:
        """Return r and s of a signature with SHA-256; FIPS 186-5, 6.4."""
        import hashlib  # loads OpenSSL's hashes; only for signatures

        digest = int.from_bytes(hashlib.sha256(data).digest(), "big")
        while True:
            nonce = _random_below(_N)
            r = _multiply(nonce, _G)[0] % _N
            s = pow(nonce, -1, _N) * (digest + r * self.secret) % _N
            if r and s:
                return r, s

    def to_pem(self) -> str:
        """Return the key as ECPrivateKey; RFC 5915, 3."""
        secret = _der(0x04, self.secret.to_bytes(32, "big"))
        curve, point = _der(0xA0, _oid(_CURVE_OID)), _der(0xA1, self._point())
        return _pem("EC PRIVATE KEY", _der(0x30, _der_integer(1), secret, curve, point))

    def _point(self) -> bytes:
        """The public point as a BIT STRING, uncompressed; SEC 1, 2.3.3."""
        return _der(0x03, b"\0\x04", self.x.to_bytes(32, "big"), self.y.to_bytes(32, "big"))

    def signed(self, body: bytes) -> bytes:
        """Return `body`, in DER, with its algorithm and signature; RFC 5280, 4.1.1."""
        signature = _der(0x30, *map(_der_integer, self.sign(body)))
        return _der(0x30, body, _ecdsa_algorithm(), _der(0x03, b"\0", signature))


def new_ec_key() -> EcKey:
    """Return a fresh key."""
    return _ec_key(_random_below(_N))


def parse_ec_key(pem: bytes, path: str) -> EcKey:
    """Return the key that `EcKey.to_pem` wrote; `path` is for the message of the ConfigError."""
    match = re.search(rb"-----BEGIN EC PRIVATE KEY-----(.*?)-----END", pem, re.DOTALL)
    try:
        _, (_, secret), *rest = _elements(_only(base64.b64decode(match[1] if match else b""), 0x30))
        number = int.from_bytes(secret, "big")
        if len(secret) != 32 or not 0 < number < _N or (0xA0, _oid(_CURVE_OID)) not in rest:
            raise ValueError
    except ValueError:
        raise ConfigError(path, 0, "expected an EC PRIVATE KEY on the curve P-256") from None
    return _ec_key(number)


def _ec_key(secret: int) -> EcKey:
    return EcKey(secret, *_multiply(secret, _G))


def _ecdsa_algorithm() -> bytes:
    return _der(0x30, _oid(_SIGNATURE_OID))


def self_signed_certificate(names: Sequence[str], now: float) -> tuple[str, str]:
    """Return a certificate for `names` (hosts and addresses) and its key, both as PEM.

    It is valid for ten years from a day before `now`, seconds since 1970.
    """
    return _self_signed(names, now, _no_authority())


def challenge_certificate(name: str, digest: bytes, now: float) -> tuple[str, str]:
    """Return what answers the challenge tls-alpn-01 for `name`, and its key, both as PEM.

    `digest` is the SHA-256 of the key authorization; RFC 8737, 3.
    """
    value = _der(0x04, _der(0x04, digest))
    return _self_signed([name], now, _der(0x30, _oid(_ACME_IDENTIFIER_OID), _TRUE, value))


def certificate_request(key: EcKey, name: str) -> bytes:
    """Return a PKCS#10 request of a certificate for the host `name`, in DER; RFC 2986, 4."""
    extensions = _der(0x31, _der(0x30, _alternative_names([name])))
    attributes = _der(0xA0, _der(0x30, _oid(_EXTENSION_REQUEST_OID), extensions))
    return key.signed(_der(0x30, _der_integer(0), _der(0x30), key.public, attributes))


def _self_signed(names: Sequence[str], now: float, extension: bytes) -> tuple[str, str]:
    key = new_ec_key()
    common_name = _der(0x30, _oid(_COMMON_NAME_OID), _der(0x0C, names[0].encode()))
    name = _der(0x30, _der(0x31, common_name))
    validity = _der(0x30, _der_time(now - 86400), _der_time(now + _CERTIFICATE_SECONDS))
    body = _der(
        0x30,
        _der(0xA0, _der_integer(2)),
        _der_integer(_random_below(1 << 127)),
        _ecdsa_algorithm(),
        name,
        validity,
        name,
        key.public,
        _der(0xA3, _der(0x30, _alternative_names(names), extension)),
    )
    return _pem("CERTIFICATE", key.signed(body)), key.to_pem()


def certificate_names(pem: bytes) -> set[str]:
    """Return the host names that the first certificate in `pem` is for, in lower case.

    They stand as [2] IA5String in the extension subjectAltName; RFC 5280, 4.2.1.6.
    """
    der = _first_certificate(pem)
    position = der.find(_oid(_ALTERNATIVE_NAMES_OID))
    if position < 0:
        return set()
    position += len(_oid(_ALTERNATIVE_NAMES_OID))
    value = next((content for tag, content in _elements(der[position:]) if tag == 0x04), b"")
    names = next((content for tag, content in _elements(value) if tag == 0x30), b"")
    return {
        content.decode("ascii", "replace").lower()
        for tag, content in _elements(names)
        if tag == 0x82
    }


def _first_certificate(pem: bytes) -> bytes:
    match = re.search(rb"-----BEGIN CERTIFICATE-----(.*?)-----END", pem, re.DOTALL)
    try:
        return base64.b64decode(match[1]) if match else b""
    except binascii.Error:
        return b""


def certificate_expiry(pem: bytes) -> float:
    """Return when the first certificate in `pem` expires, in seconds since 1970.

    Raises ValueError if that cannot be read.
    """
    return certificate_validity(pem)[1]


def certificate_validity(pem: bytes) -> tuple[float, float]:
    """Return from when to when the first certificate in `pem` is valid, in seconds since 1970.

    Raises ValueError if that cannot be read. RFC 5280, 4.1.2.5: validity is the first SEQUENCE
    of two times (UTCTime or GeneralizedTime) in the TBSCertificate.
    """
    whole = next((content for _, content in _elements(_first_certificate(pem))), b"")
    body = next((content for _, content in _elements(whole)), b"")
    for tag, content in _elements(body):
        times = [(kind, text) for kind, text in _elements(content) if kind in (0x17, 0x18)]
        if tag == 0x30 and len(times) == 2:
            return _moment(*times[0]), _moment(*times[1])
    raise ValueError("the certificate says no time of its end")


def _moment(tag: int, text: bytes) -> float:
    """Return a UTCTime or GeneralizedTime in seconds since 1970. Raises ValueError.

    RFC 5280, 4.1.2.5.1: of a year in two digits, 50 and more are of the last century.
    """
    match = re.fullmatch(rb"(\d\d\d\d|\d\d)(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)Z", text)
    if match is None or len(match[1]) != (2 if tag == 0x17 else 4):
        raise ValueError(f"{text!r} is no time in a certificate")
    year, month, day, hour, minute, second = map(int, match.groups())
    if tag == 0x17:
        year += 1900 if year >= 50 else 2000
    # days since 1 March of the year 0, so that a leap day is the last of a year
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1
    return (days - 719468) * 86400.0 + hour * 3600 + minute * 60 + second


def _only(der: bytes, tag: int) -> bytes:
    """Return the content of the element that `der` begins with. Raises ValueError."""
    found = next(_elements(der), (0, b""))
    if found[0] != tag:
        raise ValueError("the DER is not what was expected")
    return found[1]


def _integer(content: bytes) -> int:
    return int.from_bytes(content, "big", signed=True)


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of the elements in `der`; stop if it is cut short."""
    while len(der) >= 2:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start], "big")
        yield tag, der[start : start + length]
        der = der[start + length :]


def _der(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _der_integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _der_time(seconds: float) -> bytes:
    """RFC 5280, 4.1.2.5: UTCTime up to 2049, GeneralizedTime from then on."""
    t = time.gmtime(seconds)
    tag, form = (0x17, "%y%m%d%H%M%SZ") if t.tm_year < 2050 else (0x18, "%Y%m%d%H%M%SZ")
    return _der(tag, time.strftime(form, t).encode())


def _oid(dotted: str) -> bytes:
    first, second, *rest = (int(part) for part in dotted.split("."))
    octets = bytearray([first * 40 + second])
    for number in rest:
        group = [number & 0x7F]
        while number := number >> 7:
            group.append(number & 0x7F | 0x80)
        octets += bytes(reversed(group))
    return _der(0x06, bytes(octets))


def _alternative_names(names: Sequence[str]) -> bytes:
    content = b""
    for name in names:
        if is_ip_address(name):
            family = socket.AF_INET6 if ":" in name else socket.AF_INET
            content += _der(0x87, socket.inet_pton(family, name))
        else:
            content += _der(0x82, domain_to_ascii(name).encode())
    return _der(0x30, _oid(_ALTERNATIVE_NAMES_OID), _der(0x04, _der(0x30, content)))


def _no_authority() -> bytes:
    """The critical extension basicConstraints, with cA left at false."""
    return _der(0x30, _oid(_CONSTRAINTS_OID), _TRUE, _der(0x04, _der(0x30)))


def _pem(kind: str, der: bytes) -> str:
    text = base64.b64encode(der).decode("ascii")
    lines = "\n".join(text[start : start + 64] for start in range(0, len(text), 64))
    return f"-----BEGIN {kind}-----\n{lines}\n-----END {kind}-----\n"


def _random_below(limit: int) -> int:
    """Return a random number from 1 to `limit` - 1."""
    return int.from_bytes(os.urandom(48), "big") % (limit - 1) + 1


# Points are (x, y, z) with x/z² and y/z³ for the usual x and y, so that only the last step
# divides. The formulas are those of Jacobian coordinates with a = -3.


def _multiply(factor: int, point: tuple[int, int]) -> tuple[int, int]:
    """Return `factor` times `point`, by doubling and adding from the top bit."""
    start = (*point, 1)
    result = start
    for bit in bin(factor)[3:]:
        result = _double(result)
        if bit == "1":
            result = _add(result, start)
    x, y, z = result
    inverse = pow(z, -1, _P)
    return x * inverse * inverse % _P, y * inverse**3 % _P


def _double(point: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, z = point
    zz, yy = z * z % _P, y * y % _P
    beta = x * yy % _P
    slope = 3 * (x - zz) * (x + zz) % _P
    x3 = (slope * slope - 8 * beta) % _P
    return x3, (slope * (4 * beta - x3) - 8 * yy * yy) % _P, 2 * y * z % _P


def _add(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    """Add two points that are neither the same nor inverse (that never comes up here).

    The `z` of `other` is 1.
    """
    (x1, y1, z1), (x2, y2, _) = one, other
    zz = z1 * z1 % _P
    h = (x2 * zz - x1) % _P
    r = (y2 * zz * z1 - y1) % _P
    hh = h * h % _P
    hhh, v = h * hh % _P, x1 * hh % _P
    x3 = (r * r - hhh - 2 * v) % _P
    return x3, (r * (v - x3) - y1 * hhh) % _P, z1 * h % _P


# ======================================================================================
# ROOM: SPF
#
# Whether the client at an address may use a reverse-path or a HELO name, by the records that
# its domain publishes (RFC 7208).
#
# - pyspf judges; our resolver answers it. It asks a table instead of the DNS: what is missing
#   there is noted, fetched for all terms at once, and the check is run again. So pyspf needs
#   neither a thread nor its own sockets, and a check has one deadline.
# - Records are anybody's text. Their size, their macros and the names behind them are limited
#   before pyspf sees them, for some of its patterns take time by the square of their input.
# - What is wrong with a record is a result (permerror); what is wrong here is raised, and
#   whoever asked answers 451. Nothing is let in because a check has broken.
#
# What follows from a result belongs to RECEPTION, and how it is aligned with From to DMARC.
# ======================================================================================

_SPF_SECONDS = 20.0  # RFC 7208, 4.6.4
_SPF_ROUNDS = 64
_SPF_RECORDS = 50  # addresses of a name; each takes time to compare
_SPF_AT_A_TIME = 4  # questions of one session that are asked at once
_SPF_ADDRESSES = 10  # of mail exchangers, or of names of an address; RFC 7208, 4.6.4
TXT_LIMIT = 4096  # octets of a record
_SPF_TERM_LIMIT = 256  # octets; pyspf's patterns take time by the square of it
_SPF_MACRO_LIMIT = 200  # macros in one term or one explanation
_SPF_TOTAL_LIMIT = 16 * 1024  # octets of all the records of one check
_NAME_LIMIT = 253  # octets; RFC 1035, 2.3.4


class Spf(NamedTuple):
    """A result of SPF; `identity` is "mailfrom" or "helo", `domain` the one that was asked."""

    result: str
    identity: str = ""
    domain: str = ""
    explanation: str = ""


class _Unknown(BaseException):
    """pyspf asks what is not known yet. No Exception, for it catches those."""


_SPF_VERSION = re.compile(r"v=spf1(?: |$)", re.IGNORECASE)
_SpfAnswers = dict[tuple[str, str], "Answer | TemporaryFailure"]


class _Spec(str):
    """A macro-string. pyspf searches all of it once for each label, so there is but one."""

    def split(self, *_: Any) -> list[str]:
        return [self]


@functools.cache
def _spf_query() -> Any:
    """Return pyspf's query, made to look into a table instead of the DNS."""
    import spf  # 60 ms, with dnspython and what it loads; not before the first check

    class Query(spf.query):  # type: ignore[misc]
        def __init__(
            self, ip: str, sender: str, hello: str, receiver: str, answers: _SpfAnswers,
            validated: dict[Any, Any],
        ) -> None:  # fmt: skip
            super().__init__(i=ip, s=sender, h=hello, receiver=receiver)
            self.set_default_explanation("")  # only what the domain itself explains
            self.missing: set[tuple[str, str]] = set()
            self._answers = answers
            self._validated = validated  # kept from run to run, for it takes the most time

        def _once(self, key: Any, work: Callable[[], Any]) -> Any:
            if key not in self._validated:
                self._validated[key] = work()
            return self._validated[key]

        def validate_mechanism(self, mech: str) -> Any:
            if len(mech) > _SPF_TERM_LIMIT:
                raise spf.PermError(f"a term is longer than {_SPF_TERM_LIMIT} octets")
            work = super().validate_mechanism
            return self._once((mech, self.d), lambda: work(mech))

        def expand_domain(self, arg: str) -> Any:
            if len(arg) > _SPF_TERM_LIMIT:
                raise spf.PermError(f"a name is longer than {_SPF_TERM_LIMIT} octets")
            return super().expand_domain(arg)

        def expand(self, s: str, stripdot: bool = True) -> Any:
            if s.count("%") > _SPF_MACRO_LIMIT:
                raise spf.PermError(f"a text has more than {_SPF_MACRO_LIMIT} macros")
            work = super().expand
            return self._once((s, stripdot, self.d), lambda: work(_Spec(s), stripdot))

        def cidrmatch(self, ipaddrs: Any, n: int) -> Any:
            work = super().cidrmatch
            return self._once((tuple(ipaddrs), n), lambda: work(ipaddrs, n))

        def dns(self, name: Any, qtype: str, cnames: Any = None, ignore_void: bool = False) -> Any:
            """Count void look-ups as pyspf does; aliases are followed by the resolver."""
            key = (str(name).lower().removesuffix("."), qtype)
            labels = key[0].split(".")
            if len(key[0]) > _NAME_LIMIT or not all(0 < len(label) < 64 for label in labels):
                return []
            if not key[0].isascii():
                return []  # RFC 8616, 4: does not match
            values = self._values(key)
            if not values and not ignore_void:
                self.void_lookups += 1
                if self.void_lookups > spf.MAX_VOID_LOOKUPS:
                    raise spf.PermError("more names without records than are allowed")
            return values

        def validated_ptrs(self) -> list[str]:
            """RFC 7208, 5.5: without an answer nothing matches, or a name is skipped."""
            try:
                names = self.dns_ptr(self.i)
            except spf.TempError:
                return []
            return [name for name in names[:_SPF_ADDRESSES] if self._is_name_of_client(name)]

        def _is_name_of_client(self, name: str) -> bool:
            try:
                return bool(self.cidrmatch(self.dns_a(name, self.A), self.cidrmax))
            except spf.TempError:
                return False

        def _values(self, key: tuple[str, str]) -> list[Any]:
            if key not in self._answers:
                self.missing.add(key)
                raise _Unknown
            answer = self._answers[key]
            if isinstance(answer, TemporaryFailure):
                raise spf.TempError(str(answer))
            if key[1] == "MX":
                pairs = (record.partition(" ") for record in answer.records)
                return [(int(preference), host) for preference, _, host in pairs]
            if key[1] != "TXT":
                if len(answer.records) > _SPF_RECORDS:
                    raise spf.PermError(f"{key[0]} has more than {_SPF_RECORDS} addresses")
                return [record.rstrip(".") for record in answer.records]
            texts = [record.encode("latin-1") for record in answer.records]
            if any(len(text) > TXT_LIMIT and spf.RE_SPF.match(text) for text in texts):
                raise spf.PermError(f"a record is longer than {TXT_LIMIT} octets")
            return [(text,) for text in texts if len(text) <= TXT_LIMIT]

    return Query


def load_spf() -> None:
    """Load the library for SPF. Takes 60 ms, for a worker thread."""
    _spf_query()


async def check_spf(names: Names, loop: Loop, ip: str, sender: str, hello: str, host: str) -> Spf:
    """Return what SPF says of a client at `ip` that gave the reverse-path `sender`.

    For the null reverse-path the identity is `hello` (RFC 7208, 2.4). `host` is our name.
    """
    local, domain = split_address(sender)
    identity = "mailfrom" if sender else "helo"
    try:
        domain = domain_to_ascii(domain if sender else hello.rstrip("."))
    except ValueError:
        return Spf("none", identity)
    is_name = ASCII_DOMAIN.fullmatch(domain) and "." in domain and not is_ip_address(domain)
    ip = ip.partition("%")[0]
    if not is_name or not is_ip_address(ip):
        return Spf("none", identity, domain if is_name else "")
    local = local.replace("@", "_") or "postmaster"  # pyspf splits at the first "@"
    answers: _SpfAnswers = {}
    validated: dict[Any, Any] = {}
    try:
        with loop.deadline(_SPF_SECONDS):
            await _fetch(names, loop, [(domain, "TXT")], six=False, answers=answers)
            if not _has_spf(answers[domain, "TXT"]):
                return Spf("none", identity, domain)
            make_query = await load_library(loop, _spf_query)
            for _ in range(_SPF_ROUNDS):
                query = make_query(ip, f"{local}@{domain}", hello, host, answers, validated)
                result, explanation = _run_spf(query)
                if not query.missing:
                    return Spf(result, identity, domain, explanation)
                await _fetch(names, loop, query.missing, six=":" in ip, answers=answers)
                if _octets_of_spf(answers) > _SPF_TOTAL_LIMIT:
                    return Spf("permerror", identity, domain, "the records are too long")
    except Expired:
        return Spf("temperror", identity, domain, "the name servers took too long")
    return Spf("permerror", identity, domain, "the records lead too far")


def _octets_of_spf(answers: _SpfAnswers) -> int:
    known = [answer for answer in answers.values() if isinstance(answer, Answer)]
    return sum(len(text) for answer in known for text in answer.records if _SPF_VERSION.match(text))


def _has_spf(answer: Answer | TemporaryFailure) -> bool:
    """Tell whether pyspf is needed at all (RFC 7208, 4.5); most often it is not."""
    if isinstance(answer, TemporaryFailure):
        return True
    return any(_SPF_VERSION.match(record) for record in answer.records)


def _run_spf(query: Any) -> tuple[str, str]:
    """Run pyspf once; its result counts if nothing is missing.

    It makes a result of all that is wrong with a record: what it raises is a fault of ours.
    """
    try:
        result, _, explanation = query.check()
    except _Unknown:
        return "", ""
    return str(result), in_ascii(str(explanation))


async def _fetch(
    names: Names, loop: Loop, keys: Iterable[tuple[str, str]], six: bool, answers: _SpfAnswers
) -> None:
    """Get the answers to `keys`, and to what will surely be asked next, all at once."""

    async def get(name: str, kind: str) -> None:
        try:
            answers[name, kind] = answer = await names.query(name, kind)
        except TemporaryFailure as failure:
            answers[name, kind] = failure
            return
        if kind in ("MX", "PTR"):
            hosts = {record.split(" ")[-1].rstrip(".").lower() for record in answer.records}
            if len(hosts) <= _SPF_ADDRESSES:
                wanted = {(host, "AAAA" if six else "A") for host in hosts if host}
                await ask(wanted - answers.keys())

    async def ask(keys: Iterable[tuple[str, str]]) -> None:
        left = list(keys)
        while left:
            await together(loop, [get(*key) for key in left[:_SPF_AT_A_TIME]])
            del left[:_SPF_AT_A_TIME]

    await ask(keys)


def received_spf(spf: Spf, ip: str, sender: str, hello: str, host: str) -> bytes:
    """Return the trace field of RFC 7208, 9.1."""
    said = {
        "pass": f"{spf.domain} lets {ip} send its mail",
        "fail": f"{spf.domain} does not let {ip} send its mail",
        "softfail": f"{spf.domain} would rather not have {ip} send its mail",
        "neutral": f"{spf.domain} says nothing of {ip}",
        "none": spf.explanation
        or "there is no SPF record" + (f" of {spf.domain}" if spf.domain else ""),
    }.get(spf.result, spf.explanation or "the check came to no end")
    parts = [f"{spf.result} ({field_comment(f'{host}: {said}')})"]
    values = {"client-ip": ip, "envelope-from": sender, "helo": hello, "receiver": host,
              "identity": spf.identity}  # fmt: skip
    parts += [f"{key}={field_value(value)};" for key, value in values.items() if value]
    return fold("Received-SPF", *parts)


async def load_library(loop: Loop, library: functools._lru_cache_wrapper[Any]) -> Any:
    """Import a library in a worker thread, the first time: it takes a while."""
    if not library.cache_info().currsize:
        await loop.work(library)
    return library()


# ======================================================================================
# ROOM: DKIM
#
# Signatures of messages (RFC 6376): those that come with a message are verified, and what our
# users send is signed with every key of its domain, RSA and Ed25519 (RFC 8463).
#
# - dkimpy canonicalises the header and does the arithmetic of RSA. What it does not check is
#   checked here first: h= must have From, l= must be all of the body, SHA-1 is over, the key
#   must be for mail, for SHA-256 and for this algorithm (RFC 6376, 3.6.1 and 6.1).
# - The body is hashed once for all signatures, in pieces, in a worker thread.
# - Five signatures are looked at, those of the author's domain before those of forwarders.
# - dkimpy lets slip kinds of errors that it does not mean to; those are results. What is wrong
#   here is raised.
#
# The room knows nothing of the session, and not what follows from a result.
# ======================================================================================

_DKIM_SECONDS = 20.0
_SIGNATURE_COUNT_LIMIT = 5  # signatures of a message that are looked at
_SIGNATURE_SIZE_LIMIT = 16 * 1024  # octets of one signature field
_SIGNED_NAMES_LIMIT = 200  # names in h=
_CLOCK_SLOP = 300.0  # seconds by which clocks may differ


class Signature(NamedTuple):
    """What became of a DKIM signature: a result of RFC 8601, 2.7.1, and why.

    `domain`, `selector` and `b` (its first characters, RFC 6008) are "" if the
    signature does not say them in a form that can be repeated.
    """

    result: str
    reason: str = ""
    domain: str = ""
    selector: str = ""
    b: str = ""


def load_dkim() -> None:
    """Load the library for DKIM. Takes 70 ms, for a worker thread."""
    _dkim()


# --- verifying ---


class _Unacceptable(Exception):
    """A signature that ends with `signature` before anything was computed."""

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(reason)
        self.result = result


class _Key(NamedTuple):
    """A key as the shortest record that says it; `testing` is t=y of RFC 6376, 3.6.1."""

    record: bytes
    testing: bool


class _Claim(NamedTuple):
    """A signature field whose form is right: its tags, and the names in h= in lower case."""

    field: Field
    tags: dict[bytes, bytes]
    names: list[str]
    signature: Signature  # what is known of it so far

    @property
    def relaxed_body(self) -> bool:
        return self.tags.get(b"c", b"").endswith(b"/relaxed")

    @property
    def key_name(self) -> str:
        return f"{self.signature.selector}._domainkey.{self.signature.domain}"


_LONG_SPACE = re.compile(rb"\s{101}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
# RFC 1035, 2.3.4: labels of 63 octets at most, names of 253
_KEY_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_CANONICAL_FORMS = {
    b"simple", b"relaxed", b"simple/simple", b"simple/relaxed", b"relaxed/simple",
    b"relaxed/relaxed",
}  # fmt: skip


@functools.cache
def _dkim() -> Any:
    """Return a dkimpy of our own, with our Ed25519 in the place of PyNaCl.

    Others in the process may use dkimpy too, and theirs stays as it is.
    """
    import importlib.util

    import dkim.util  # 70 ms, with dnspython; not before the first signature

    spec = dkim.__spec__
    own: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    own.util = dkim.util

    class BadSignature(Exception):
        pass

    class VerifyKey:
        def __init__(self, text: bytes, encoder: object) -> None:
            self._key = base64.b64decode(text)
            if len(self._key) != 32:
                raise ValueError("an Ed25519 key has 32 octets")

        def verify(self, message: bytes, signature: bytes) -> None:
            if not ed25519_verify(self._key, message, signature):
                raise BadSignature

    own.nacl = types.SimpleNamespace(
        signing=types.SimpleNamespace(VerifyKey=VerifyKey),
        encoding=types.SimpleNamespace(Base64Encoder=None),
        exceptions=types.SimpleNamespace(ValueError=ValueError, BadSignatureError=BadSignature),
    )
    return own


_SIGNED_TAG = re.compile(rb"(?:\A|;)\s*h\s*=([^;]*)")
_DOMAIN_TAG = re.compile(rb"(?:\A|;)\s*d\s*=([^;]*)")


def choose_signatures(fields: Sequence[Field], authors: Sequence[str]) -> tuple[list[Field], bool]:
    """Return the signatures to check, from the top, and whether one that matters is left out.

    Those that may be aligned with one of the domains `authors` are taken first, so that
    forwarders on the way do not hide the signature of the author (RFC 6376, 6.1, leaves the
    choice to us).
    """
    found = [field for field in fields if field.name == "dkim-signature"]
    if len(found) <= _SIGNATURE_COUNT_LIMIT:
        return found, False
    aligned = [_may_be_aligned(field, authors) for field in found]
    order = sorted(range(len(found)), key=lambda place: (not aligned[place], place))
    chosen = sorted(order[:_SIGNATURE_COUNT_LIMIT])
    left_out = any(aligned[place] for place in order[_SIGNATURE_COUNT_LIMIT:])
    return [found[place] for place in chosen], left_out


def _may_be_aligned(field: Field, authors: Sequence[str]) -> bool:
    """Tell whether d= has the last two labels of an author's domain, without asking the DNS."""
    match = _DOMAIN_TAG.search(field.value[:_SIGNATURE_SIZE_LIMIT])
    try:
        domain = domain_to_ascii(re.sub(rb"\s+", b"", match[1]).decode()) if match else ""
    except ValueError:
        return False
    return domain.split(".")[-2:] in [author.split(".")[-2:] for author in authors]


async def verify_signatures(
    names: Names,
    loop: Loop,
    fields: Sequence[Field],
    body: Callable[[], Iterable[bytes]],
    authors: Sequence[str] = (),
) -> list[Signature]:
    """Return what becomes of each DKIM signature that `choose_signatures` takes, from the top.

    `body` returns the octets after the header's empty line; it is called in a worker
    thread, if a signature makes that necessary, and may raise OSError.
    """
    found, _ = choose_signatures(fields, authors)
    results: list[Signature] = []
    claims: dict[int, tuple[_Claim, _Key]] = {}  # by place in `results`
    now = loop.clock.time()

    async def prepare(place: int, field: Field) -> None:
        try:
            claim = _read_signature(field)
            results[place] = claim.signature
            _check_claim(claim)
            _check_times(claim.tags, now)
            claims[place] = claim, await _key_record(names, claim)
        except _Unacceptable as refused:
            results[place] = results[place]._replace(result=refused.result, reason=str(refused))

    results += [Signature("neutral")] * len(found)
    if found:
        await load_library(loop, _dkim)
    try:
        with loop.deadline(_DKIM_SECONDS):
            await together(loop, [prepare(n, found[n]) for n in range(len(results))])
    except Expired:
        late = "the name servers took too long"
        for n, result in enumerate(results):
            if n not in claims and not result.reason:
                results[n] = result._replace(result="temperror", reason=late)
    if claims:
        checked = await loop.work(lambda: _check_claims(list(claims.values()), fields, body(), now))
        for place, signature in zip(claims, checked, strict=True):
            results[place] = signature
    return results


def _is_our_fault(error: Exception) -> bool:
    """Tell whether `error` shows that something is wrong here, not with the message.

    dkimpy stumbles over what is malformed with errors of several kinds that it does not mean
    to raise; this module means ValueError alone.
    """
    if isinstance(error, (ImportError, EOFError, OSError, MemoryError, NameError)):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is not None and trace.tb_frame.f_globals is globals()
    return ours and not isinstance(error, ValueError)


def _read_signature(field: Field) -> _Claim:
    """Raises _Unacceptable."""
    if len(field.raw) > _SIGNATURE_SIZE_LIMIT or _LONG_SPACE.search(field.raw):
        raise _Unacceptable("policy", "the field is too long, or holds too much white space")
    dkim = _dkim()
    try:
        raw = dkim.util.parse_tag_value(field.value.replace(b"\r\n", b""))
        _turn_into_a_labels(raw)
        dkim.validate_signature_fields({**raw, b"t": b"1", b"x": b"9999999999"})
        tags = {name: re.sub(rb"\s+", b"", value) for name, value in raw.items()}
        names = [name.lower() for name in tags[b"h"].decode("ascii").split(":")]
        signature = _identified(tags)
    except Exception as error:
        if _is_our_fault(error):
            raise
        raise _Unacceptable("neutral", "the field is malformed") from None
    return _Claim(field, tags, names, signature)


def _turn_into_a_labels(tags: dict[bytes, bytes]) -> None:
    """Write the names in d=, s= and i= in A-labels (RFC 8616, 5). Raises ValueError."""
    for tag in (b"d", b"s", b"i"):
        if tag in tags and not tags[tag].isascii():
            local, at, domain = re.sub(rb"\s+", b"", tags[tag]).rpartition(b"@")
            tags[tag] = local + at + domain_to_ascii(domain.decode()).encode()


def _identified(tags: Mapping[bytes, bytes]) -> Signature:
    """Return domain, selector and the beginning of b=. Raises ValueError, KeyError."""
    domain, selector = tags[b"d"].decode("ascii").lower(), tags[b"s"].decode("ascii").lower()
    if not _KEY_NAME.fullmatch(f"{selector}._domainkey.{domain}"):
        raise ValueError("d= or s= is no name")
    if not (_BASE64.fullmatch(tags[b"b"]) and _BASE64.fullmatch(tags[b"bh"])):
        raise ValueError("b= or bh= is no base64")
    return Signature("neutral", "", domain, selector=selector, b=tags[b"b"][:8].decode("ascii"))


def _check_claim(claim: _Claim) -> None:
    """Check what a signature says of itself (RFC 6376, 6.1.1). Raises _Unacceptable."""
    tags = claim.tags
    if tags[b"a"] == b"rsa-sha1":
        raise _Unacceptable("policy", "SHA-1 proves nothing any more")  # RFC 8301, 3.1
    if tags[b"a"] not in (b"rsa-sha256", b"ed25519-sha256"):
        raise _Unacceptable("neutral", "the algorithm is unknown")
    if tags.get(b"c", b"simple") not in _CANONICAL_FORMS:
        raise _Unacceptable("neutral", "the canonical form is unknown")
    if "from" not in claim.names:
        raise _Unacceptable("permerror", "From is not signed")
    if len(claim.names) > _SIGNED_NAMES_LIMIT:
        raise _Unacceptable("policy", "h= names too many fields")
    identity = tags.get(b"i", b"@" + tags[b"d"]).decode("latin-1").lower().rpartition("@")[2]
    if identity != claim.signature.domain and not identity.endswith(f".{claim.signature.domain}"):
        raise _Unacceptable("permerror", "i= is not within d=")


def _check_times(tags: Mapping[bytes, bytes], now: float) -> None:
    """RFC 6376, 3.5. Raises _Unacceptable."""
    times = {}
    for tag in (b"t", b"x"):
        text = tags.get(tag, b"")
        if tag in tags and not re.fullmatch(rb"\d{1,12}", text):
            raise _Unacceptable("neutral", f"{tag.decode()}= is no time")
        times[tag] = int(text or 0)
    if times[b"x"] and times[b"x"] <= times[b"t"]:
        raise _Unacceptable("neutral", "x= is before t=")
    if times[b"x"] and now > times[b"x"] + _CLOCK_SLOP:
        raise _Unacceptable("policy", "the signature has expired")


def names_signed(fields: Iterable[Field]) -> set[str]:
    """Return the names, in lower case, of all fields that some DKIM-Signature signs.

    Also those that are not there: adding one would break the signature (RFC 6376, 5.4.2).
    """
    names: set[str] = set()
    for field in fields:
        if field.name == "dkim-signature":
            for match in _SIGNED_TAG.finditer(field.value[:_SIGNATURE_SIZE_LIMIT]):
                words = match[1].decode("latin-1").lower().split(":")
                names.update(word.strip() for word in words)
    return names


async def _key_record(names: Names, claim: _Claim) -> _Key:
    """Return the key of a signature. Raises _Unacceptable."""
    try:
        answer = await names.query(claim.key_name, "TXT")
    except TemporaryFailure as failure:
        raise _Unacceptable("temperror", str(failure)) from None
    if not answer.records:
        raise _Unacceptable("permerror", "there is no key")
    refused = _Unacceptable("permerror", "there is no key")
    for record in answer.records[:_SIGNATURE_COUNT_LIMIT]:
        try:
            return _key_of_record(record, claim.tags)
        except _Unacceptable as error:
            refused = error
    raise refused


def _key_of_record(record: str, tags: Mapping[bytes, bytes]) -> _Key:
    """Return the key in a record, checked against a signature's `tags`.

    RFC 6376, 3.6.1 and 6.1.2. Raises _Unacceptable.
    """
    if len(record) > TXT_LIMIT:
        raise _Unacceptable("permerror", f"the key record is longer than {TXT_LIMIT} octets")
    try:
        text = ";".join(filter(str.strip, record.split(";")))  # empty tags do no harm
        raw = _dkim().util.parse_tag_value(text.encode("latin-1"))
    except Exception as error:
        if _is_our_fault(error):
            raise
        raise _Unacceptable("permerror", "the key record is malformed") from None
    key = {name: re.sub(rb"\s+", b"", value) for name, value in raw.items()}
    testing = b"y" in key.get(b"t", b"").split(b":")
    try:
        return _Key(_checked_key(key, tags), testing)
    except _Unacceptable as refused:
        raise _as_unsigned(refused) if testing else refused from None


def _as_unsigned(refused: _Unacceptable) -> _Unacceptable:
    """RFC 6376, 3.6.1: what fails with a key that is being tested is like unsigned mail."""
    return _Unacceptable("none", f"{refused}; the key is being tested")


def _checked_key(key: Mapping[bytes, bytes], tags: Mapping[bytes, bytes]) -> bytes:
    """Return the record with its key alone. Raises _Unacceptable."""
    kind, public = key.get(b"k", b"rsa"), key.get(b"p", b"")
    flags = key.get(b"t", b"").split(b":")
    if key.get(b"v", b"DKIM1") != b"DKIM1" or b"p" not in key:
        raise _Unacceptable("permerror", "the record is no DKIM key")
    if not public:
        raise _Unacceptable("permerror", "the key is revoked")
    if kind != tags[b"a"].partition(b"-")[0]:
        raise _Unacceptable("permerror", "the key is for another algorithm")
    if b"h" in key and b"sha256" not in key[b"h"].split(b":"):
        raise _Unacceptable("permerror", "the key is not for SHA-256")
    if not {b"*", b"email"} & set(key.get(b"s", b"*").split(b":")):
        raise _Unacceptable("permerror", "the key is not for mail")
    identity = tags.get(b"i", b"@" + tags[b"d"]).rpartition(b"@")[2]
    if b"s" in flags and identity.lower() != tags[b"d"].lower():
        raise _Unacceptable("permerror", "the key is not for subdomains")
    try:
        decoded = base64.b64decode(public, validate=True)
        if kind == b"rsa":  # said anew, so that dkimpy cannot read another key in it
            public = base64.b64encode(rsa_public_info(*rsa_public_numbers(decoded)))
        elif len(decoded) != 32:
            raise ValueError("an Ed25519 key has 32 octets")
    except (ValueError, IndexError) as error:
        raise _Unacceptable("policy", f"the key cannot be used: {error}") from None
    return b"v=DKIM1; k=" + kind + b"; p=" + public


def _check_claims(
    claims: Sequence[tuple[_Claim, _Key]], fields: Sequence[Field], body: Iterable[bytes],
    now: float,
) -> list[Signature]:  # fmt: skip
    """Hash the body once for all signatures, then check each. Computes; for a worker."""
    hashes = {claim.relaxed_body: BodyHash(claim.relaxed_body) for claim, _ in claims}
    for piece in body:
        for hashed in hashes.values():
            hashed.feed(piece)
    digests = {form: (hashed.digest(), hashed.length) for form, hashed in hashes.items()}
    results = []
    for claim, key in claims:
        digest, length = digests[claim.relaxed_body]
        try:
            _check_body(claim, digest, length)
            if not _is_valid(claim, key.record, fields):
                raise _Unacceptable("fail", "the signature does not fit")
            outcome = ("pass", "")
            if int(claim.tags.get(b"t", b"0")) > now + _CLOCK_SLOP:
                # whoever has the key signed it, so it may be our clock that is wrong
                outcome = ("temperror", "the signature is from the future")
        except _Unacceptable as refused:
            refused = _as_unsigned(refused) if key.testing else refused
            outcome = (refused.result, str(refused))
        except Exception as error:
            if _is_our_fault(error):
                raise
            outcome = ("neutral", "the signature cannot be processed")
        results.append(claim.signature._replace(result=outcome[0], reason=outcome[1]))
    return results


def _check_body(claim: _Claim, digest: bytes, length: int) -> None:
    said = claim.tags.get(b"l")
    if said is not None and (not said.isdigit() or int(said) != length):
        # RFC 6376, 8.2: whatever was added behind the signed part would seem signed
        raise _Unacceptable("policy", "only a part of the body is signed")
    if base64.b64decode(claim.tags[b"bh"]) != digest:
        raise _Unacceptable("fail", "the body was changed")


class _FieldName(bytes):
    """A name as it came: white space behind it is signed, but it is the same name."""

    def lower(self) -> bytes:
        return bytes(self).lower().rstrip()


def _is_valid(claim: _Claim, record: bytes, fields: Sequence[Field]) -> bool:
    """Have dkimpy check the header and the signature.

    It takes fields from the bottom, and one From more than h= has: so only these are given.
    """
    wanted = collections.Counter(claim.names)
    wanted["from"] += 1
    given = []
    for field in reversed(fields):
        if wanted[field.name] > 0:
            wanted[field.name] -= 1
            given.append([_FieldName(field.raw.partition(b":")[0]), field.value])
    verifier = _dkim().DKIM()
    verifier.headers = given[::-1]
    tags = {name: value for name, value in claim.tags.items() if name not in (b"bh", b"l")}
    name, _, value = claim.field.raw.partition(b":")
    return bool(
        verifier.verify_sig(
            tags, [name.encode() for name in claim.names], (name, value),
            lambda name, timeout=0: record,
        )
    )  # fmt: skip


# --- signing ---

# What is signed if it is there, and, for the first group, signed once more than it is
# there, so that none can be added (RFC 6376, 5.4 and 8.15). Lists add to the second group.
_SIGNED_AND_CLOSED = (
    "from", "to", "cc", "subject", "date", "message-id", "reply-to", "in-reply-to", "references",
    "mime-version", "content-type", "content-transfer-encoding",
)  # fmt: skip
_SIGNED = (
    "sender", "content-disposition", "content-description", "content-id", "resent-date",
    "resent-from", "resent-sender", "resent-to", "resent-cc", "resent-message-id", "list-id",
    "list-help", "list-unsubscribe", "list-unsubscribe-post", "list-subscribe", "list-post",
    "list-owner", "list-archive", "autocrypt", "openpgp",
)  # fmt: skip
_SIGNED_TWICE_LIMIT = 20  # of one name: a header full of "To" must not make h= endless


class DkimKey(NamedTuple):
    """A key of a domain: what is in domains/DOMAIN/dkim:SELECTOR.pem. Names are A-labels."""

    domain: str
    selector: str
    key: PrivateKey

    @property
    def name(self) -> str:
        """Where the DNS record stands."""
        return f"{self.selector}._domainkey.{self.domain}"

    @property
    def record(self) -> str:
        """The text of the DNS record; RFC 6376, 3.6.1, and RFC 8463, 4."""
        kind = "ed25519" if isinstance(self.key, Ed25519Key) else "rsa"
        return f"v=DKIM1; k={kind}; p={base64.b64encode(self.key.public).decode('ascii')}"


def load_dkim_keys(
    directory: str, domain: str, problems: list[ConfigError] | None = None
) -> tuple[DkimKey, ...]:
    """Read the keys in a domain's directory, in the order of their selectors.

    Raises ConfigError; with `problems`, mistakes are added to it instead.
    """
    found = []
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
        if name.startswith("dkim:") and name.endswith(".pem"):
            with collected(problems):
                found.append(load_dkim_key(os.path.join(directory, name), domain, name[5:-4]))
    return tuple(found)


def load_dkim_key(path: str, domain: str, selector: str) -> DkimKey:
    """Read one key. Raises ConfigError."""
    if not is_selector(selector):
        raise ConfigError(path, 0, "expected a selector after 'dkim:', such as 'dkim:mail.pem'")
    names = domain_to_ascii(domain), domain_to_ascii(selector)
    return DkimKey(*names, parse_private_key(read_file(path), path))


def is_selector(text: str) -> bool:
    """Tell whether `text` can stand in front of "._domainkey"; RFC 6376, 3.1."""
    try:
        return ASCII_DOMAIN.fullmatch(domain_to_ascii(text)) is not None
    except ValueError:
        return False


class Signer:
    """Signs what our users send; `keys` are by domain, in Unicode, and may be replaced."""

    def __init__(self, loop: Loop, log: Log, keys: Mapping[str, Sequence[DkimKey]]) -> None:
        self._loop = loop
        self._log = log
        self.keys = keys
        self.broken: frozenset[str] = frozenset()  # domains whose keys cannot be read

    async def sign(self, domain: str, header: bytes, body: Callable[[], Iterable[bytes]]) -> bytes:
        """Return a field for each key of `domain`; b"" if it has none.

        `header` is all that will stand above the body. Raises TemporaryFailure.
        """
        if domain in self.broken:
            raise broken_domain(domain)
        keys = self.keys.get(domain, ())
        if not keys:
            return b""
        now = self._loop.clock.time()
        try:
            signed = await self._loop.work(lambda: sign(keys, header, body(), now))
        except Exception as error:  # whatever it is, the message must not leave without
            self._log.crash(f"signing for {domain}", error)
            raise TemporaryFailure("the message cannot be signed now", "4.3.0") from error
        self._log.count(Metrics.DKIM_SIGNATURES, "made")
        return signed

    async def sign_for_host(
        self, host: str, header: bytes, body: Callable[[], Iterable[bytes]]
    ) -> bytes:
        """As `sign`, with the keys of `host`, or of the nearest domain above it that has some."""
        domain = host
        while domain and not self.keys.get(domain):
            domain = domain.partition(".")[2]
        return await self.sign(domain, header, body)


def sign(keys: Sequence[DkimKey], header: bytes, body: Iterable[bytes], now: float) -> bytes:
    """Return a DKIM-Signature field for each key. Computes; for a worker thread.

    Raises ValueError if the header is malformed, OSError if `body` does.
    """
    fields = header_fields(header)
    hashed = BodyHash(relaxed=True)
    for piece in body:
        hashed.feed(piece)
    digest = base64.b64encode(hashed.digest())
    return b"".join(_sign_with(key, fields, digest, now) for key in keys)


def _sign_with(key: DkimKey, fields: Sequence[Field], digest: bytes, now: float) -> bytes:
    dkim = _dkim()
    algorithm = b"ed25519-sha256" if isinstance(key.key, Ed25519Key) else b"rsa-sha256"
    signer = dkim.DKIM(signature_algorithm=algorithm)
    signer.hasher = dkim.HASH_ALGORITHMS[algorithm]
    signer.headers = [[field.raw.partition(b":")[0].rstrip(), field.value] for field in fields]
    names = [name.encode() for name in _names_to_sign(fields)]
    tags = [
        (b"v", b"1"),
        (b"a", algorithm),
        (b"c", b"relaxed/relaxed"),
        (b"\r\n d", key.domain.encode()),  # on lines of their own, whatever their length
        (b"\r\n s", key.selector.encode()),
        (b"t", str(int(now)).encode()),
        (b"\r\n h", b" : ".join(names)),  # the spaces are where it may be folded
        (b"bh", digest),
        (b"b", b"0" * 60),  # longer than a line, so that it is folded before it is known
    ]
    policy = dkim.CanonicalizationPolicy.from_c_value(b"relaxed/relaxed")
    secret = _DkimpyKey(key.key) if isinstance(key.key, Ed25519Key) else _rsa_for_dkimpy(key.key)
    value = signer.gen_header(tags, names, policy, b"DKIM-Signature", secret)
    return b"DKIM-Signature: " + bytes(value)


def _names_to_sign(fields: Sequence[Field]) -> list[str]:
    there = collections.Counter(field.name for field in fields)
    names = []
    for name in _SIGNED_AND_CLOSED:
        names += [name] * (min(there[name], _SIGNED_TWICE_LIMIT) + 1)
    for name in _SIGNED:
        names += [name] * min(there[name], _SIGNED_TWICE_LIMIT)
    return names


class _DkimpyKey:
    """An Ed25519 key with the manners of PyNaCl."""

    def __init__(self, key: Ed25519Key) -> None:
        self._key = key

    def sign(self, message: bytes) -> types.SimpleNamespace:
        return types.SimpleNamespace(signature=self._key.sign(message))


def _rsa_for_dkimpy(key: RsaKey) -> dict[str, int]:
    names = (
        "modulus", "publicExponent", "privateExponent", "prime1", "prime2", "exponent1",
        "exponent2", "coefficient",
    )  # fmt: skip
    return dict(zip(names, key, strict=True))


# ======================================================================================
# ROOM: DMARC
#
# What the owner of the domain in From asks for, if neither SPF nor a signature shows that a
# message is its own (RFC 9989), and the field that tells all results (RFC 8601).
#
# - The organisational domain is found by a walk up the DNS tree, not by a list of suffixes.
# - A domain whose records cannot be had now is in doubt, not guilty: temperror.
#
# Whether a policy is obeyed belongs to RECEPTION.
# ======================================================================================

_DMARC_SECONDS = 20.0
_DMARC_WALK = 8  # names asked on the way up; RFC 9989


class Dmarc(NamedTuple):
    """A result of DMARC for the From domain `domain`, and what its owner asks for.

    `policy` is "none", "quarantine" or "reject", and of interest if the result is "fail".
    """

    result: str
    domain: str = ""
    policy: str = "none"


_DmarcRecord = dict[str, str]  # a tag's name, and its value in lower case
_DMARC_STEPS = {"reject": "quarantine", "quarantine": "none", "none": "none"}


async def check_dmarc(
    names: Names, loop: Loop, authors: Sequence[str], spf: Spf, signatures: Sequence[Signature]
) -> Dmarc:
    """Return what DMARC (RFC 9989) says of a message whose From has the domains `authors`.

    Where there are several, the strictest result counts.
    """
    if not authors:
        return Dmarc("none")
    results: list[Dmarc] = []

    async def judge(author: str) -> None:
        try:
            with loop.deadline(_DMARC_SECONDS):
                results.append(await _check_author(names, author, spf, signatures))
        except (TemporaryFailure, Expired):
            results.append(Dmarc("temperror", author))

    await together(loop, [judge(author) for author in authors])
    return max(results, key=_severity)


def _severity(dmarc: Dmarc) -> tuple[int, int]:
    results, policies = ("pass", "none", "temperror", "fail"), ("none", "quarantine", "reject")
    return results.index(dmarc.result), policies.index(dmarc.policy)


async def _check_author(
    names: Names, author: str, spf: Spf, signatures: Sequence[Signature]
) -> Dmarc:
    """Raises TemporaryFailure if that keeps us from a result."""
    found = await _walk(names, author)
    top = _organisational_domain(author, found)
    records = dict(found)
    record = records.get(author) or records.get(top) or (found[-1][1] if found else None)
    if record is None:
        return Dmarc("none", author)
    policy = await _policy(names, author, author in records, record)
    doubtful = False
    for domain, result, mode in [(spf.domain, spf.result, record.get("aspf"))] + [
        (signature.domain, signature.result, record.get("adkim")) for signature in signatures
    ]:
        if result not in ("pass", "temperror"):
            continue
        try:
            aligned = domain == author or (
                mode != "s" and await _same_organisation(names, top, domain)
            )
        except TemporaryFailure:
            aligned, result = True, "temperror"
        if aligned and result == "pass":
            return Dmarc("pass", author, policy)
        doubtful = doubtful or aligned
    return Dmarc("temperror" if doubtful else "fail", author, policy)


async def _same_organisation(names: Names, top: str, domain: str) -> bool:
    if domain != top and not domain.endswith(f".{top}"):
        return False  # whatever a walk from there would find, or fail at
    return _organisational_domain(domain, await _walk(names, domain)) == top


async def _policy(names: Names, author: str, own: bool, record: _DmarcRecord) -> str:
    """Return what the record asks for; `own`: it stands at the author's domain itself."""
    policy = record["p"]
    if not own:
        subdomains = record.get("sp", policy)
        absent = record.get("np", subdomains)
        exists = absent == subdomains or (await names.query(author, "A")).exists
        policy = subdomains if exists else absent
    return _DMARC_STEPS[policy] if record.get("t") == "y" else policy


async def _walk(names: Names, domain: str) -> list[tuple[str, _DmarcRecord]]:
    """Return the DMARC records at `domain` and above, the longest name first."""
    labels = domain.split(".")
    if len(labels) >= _DMARC_WALK:
        places = [labels, *(labels[-count:] for count in range(_DMARC_WALK - 1, 0, -1))]
    else:
        places = [labels[start:] for start in range(len(labels))]
    found = []
    for place in places:
        name = ".".join(place)
        record = _dmarc_record((await names.query(f"_dmarc.{name}", "TXT")).records)
        if record is not None:
            found.append((name, record))
            if record.get("psd") == "n" or (record.get("psd") == "y" and name != domain):
                break
    return found


def _dmarc_record(texts: Sequence[str]) -> _DmarcRecord | None:
    """Return the one valid record among `texts`; None if there is none, or several."""
    records = []
    for text in texts:
        if len(text) > TXT_LIMIT or not re.match(r"v\s*=\s*DMARC1\s*(;|$)", text):
            continue
        pairs = (part.partition("=") for part in text.split(";"))
        records.append({key.strip().lower(): value.strip().lower() for key, _, value in pairs})
    if len(records) != 1:
        return None
    (record,) = records
    for key in ("p", "sp", "np"):
        if record.get(key) not in _DMARC_STEPS:
            record.pop(key, None)
    if "p" not in record:
        if not record.get("rua") and "psd" not in record:
            return None
        record["p"] = "none"  # who asks for reports, or ends the walk, means something by it
    return record


def _organisational_domain(domain: str, found: Sequence[tuple[str, _DmarcRecord]]) -> str:
    for name, record in found:
        if record.get("psd") == "n":
            return name
        if record.get("psd") == "y" and name != domain:
            return ".".join(domain.split(".")[-(name.count(".") + 2) :])
    return found[-1][0] if found else domain


def authentication_results(
    host: str, spf: Spf, sender: str, signatures: Sequence[Signature], dmarc: Dmarc
) -> bytes:
    """Return our Authentication-Results field; RFC 8601, 2.2."""
    local = split_address(sender)[0]
    who = f"{local}@{spf.domain}" if TOKEN_TEXT.fullmatch(local) else spf.domain
    parts = [f"spf={spf.result}"]
    if spf.domain:
        parts[0] += f" smtp.mailfrom={who}" if spf.identity == "mailfrom" else f" smtp.helo={who}"
    for signature in signatures:
        why = f" ({field_comment(signature.reason)})" if signature.reason else ""
        text = f"dkim={signature.result}{why}"
        values = {
            "header.d": signature.domain,
            "header.s": signature.selector,
            "header.b": signature.b,
        }
        parts.append(text + "".join(f" {k}={field_value(v)}" for k, v in values.items() if v))
    if not signatures:
        parts.append("dkim=none")
    text = f"dmarc={dmarc.result}"
    if dmarc.result not in ("none", "permerror"):
        text += f" (p={dmarc.policy})"
    parts.append(text + (f" header.from={field_value(dmarc.domain)}" if dmarc.domain else ""))
    return fold(
        "Authentication-Results", f"{host};", *(f"{part};" for part in parts[:-1]), parts[-1]
    )


# ======================================================================================
# ROOM: TLS POLICY
#
# How safe a connection must be. SMTP's TLS gives way to anybody who stands in between and
# takes "STARTTLS" out of a reply; what holds against that is what is known beforehand:
#
# - DANE (RFC 7672): the domain's signed DNS says what certificate its server has.
# - MTA-STS (RFC 8461): a policy, fetched over HTTPS and kept, says that there must be TLS
#   with a valid certificate, and by which names the servers go. DANE wins over it.
# - Security levels, as chasquid keeps them: a domain that has once shown TLS, or TLS with a
#   valid certificate, must do so again. One file a domain, in data_dir/domaininfo:
#
#       name: "example.com"
#       incoming_sec_level: TLS_CLIENT          or PLAIN
#       outgoing_sec_level: TLS_SECURE          or TLS_INSECURE, PLAIN
#
# - What cannot be found out now (a name server that fails, if the domain is signed) is
#   no reason to be content with less: it is a temporary failure.
#
# The room says what must be; COURIERS and RECEPTION see to it that it is.
# ======================================================================================

PLAIN, TLS_CLIENT, TLS_INSECURE, TLS_SECURE = LEVELS = (
    "PLAIN", "TLS_CLIENT", "TLS_INSECURE", "TLS_SECURE",
)  # fmt: skip
_DOMAIN_INFO_LIMIT = 10_000  # domains kept in memory
_TLSA_LIMIT = 20  # records of one host that are looked at
_STS_SECONDS = 60.0  # RFC 8461, 3.3
_STS_SIZE_LIMIT = 10 * 1024  # octets of a policy
_HTTP_HEADER_LIMIT = 32 * 1024
_STS_AGE_LIMIT = 31_557_600  # seconds; RFC 8461, 3.2
_STS_PAUSE = 300.0  # after a policy that could not be had; RFC 8461, 3.3
_STS_REFRESH = 6 * 3600.0
_STS_FRESH = 20 * 3600.0  # a policy younger than this need not be fetched again


class DomainInfo(NamedTuple):
    """The best that was seen of a domain, as levels; see LEVELS, which ascend."""

    incoming: str = PLAIN
    outgoing: str = PLAIN


class SecurityLevels:
    """What was seen of each domain, in memory and below `directory`."""

    def __init__(self, loop: Loop, log: Log, directory: str) -> None:
        self._loop = loop
        self._log = log
        self._directory = directory
        self._known: dict[str, DomainInfo] = {}
        self._writing = Slots(loop, 1)

    async def accepts(self, domain: str, tls: bool) -> bool:
        """Tell whether mail from `domain` may come in with or without `tls`.

        Raises TemporaryFailure as `of` does, with TLS too: what came in could not be remembered.
        """
        info = await self.of(domain)
        return tls or info.incoming == PLAIN

    async def saw_incoming(self, domain: str, tls: bool) -> None:
        """Remember that a message of `domain`, with an SPF pass, came in so."""
        level = TLS_CLIENT if tls else PLAIN
        info = await self.of(domain)
        self._log.count(Metrics.SECURITY_LEVELS, "in", level)
        if LEVELS.index(level) > LEVELS.index(info.incoming):
            await self._keep(domain, info._replace(incoming=level))

    async def saw_outgoing(self, domain: str, level: str) -> None:
        """Remember that a server of `domain` has offered `level`."""
        info = await self.of(domain)
        self._log.count(Metrics.SECURITY_LEVELS, "out", level)
        if LEVELS.index(level) > LEVELS.index(info.outgoing):
            await self._keep(domain, info._replace(outgoing=level))

    async def of(self, domain: str) -> DomainInfo:
        """Return what is known of `domain`, in Unicode.

        Raises TemporaryFailure if its file cannot be read or understood: to go on without
        would give up what was promised to hold.
        """
        if domain not in self._known:
            path = self._path(domain)
            try:
                info = await self._loop.work(lambda: read_domain_info(path))
            except ConfigError as error:
                remedy = (
                    "mail from and to it waits until that is mended or domaininfo-remove was run"
                )
                self._log.error("security levels", f"{error}; {remedy}")
                text = f"what was seen of {domain} cannot be read"
                raise TemporaryFailure(text, "4.3.0") from error
            if len(self._known) >= _DOMAIN_INFO_LIMIT:
                self._known.clear()
            self._known.setdefault(domain, info)  # something better may have been seen meanwhile
        return self._known[domain]

    async def forget(self, domain: str) -> bool:
        """Forget what was seen of `domain`; false if that was nothing. Raises OSError."""
        try:
            known = await self.of(domain) != DomainInfo()
        except TemporaryFailure:
            known = True
        self._known.pop(domain, None)
        path = self._path(domain)
        removed = await self._loop.work(lambda: remove_domain_info(path))
        return known or removed

    def _path(self, domain: str) -> str:
        return domain_info_path(self._directory, domain)

    async def _keep(self, domain: str, info: DomainInfo) -> None:
        self._known[domain] = info
        self._log.info("security levels", f"{domain} is now {' and '.join(info)}")
        path = self._path(domain)

        def write() -> None:
            make_directory(os.path.dirname(path))
            replace_durably(path, domain_info_text(domain, self._known.get(domain, info)))

        try:
            async with self._writing:  # or an older level could end up on the disk
                await self._loop.work(write)
        except OSError as error:
            self._log.error("security levels", f"{path} cannot be written: {reason(error)}")


def domain_info_path(directory: str, domain: str) -> str:
    """Return the file of `domain`: "s:" and the name, escaped as in a URL's query."""
    escaped = re.sub(rb"[^A-Za-z0-9_.~-]", lambda match: b"%%%02X" % match[0][0], domain.encode())
    name = f"s:{escaped.decode('ascii')}"
    return os.path.join(directory, name if len(name) < 256 else f"s:{domain_to_ascii(domain)}")


def domain_info_text(domain: str, info: DomainInfo) -> bytes:
    """Return the content of a file of domaininfo."""
    lines = (
        f"name: {quote(domain)}",
        f"incoming_sec_level: {info.incoming}",
        f"outgoing_sec_level: {info.outgoing}",
    )
    return "".join(f"{line}\n" for line in lines).encode()


def read_domain_info(path: str) -> DomainInfo:
    """Read a file of domaininfo; nothing was seen if there is none. Raises ConfigError."""
    values = {}
    for entry in parse_text_format(read_file(path, missing=b""), path):
        if entry.key in ("incoming_sec_level", "outgoing_sec_level"):
            if entry.value not in LEVELS:
                raise ConfigError(path, entry.line, f"expected one of {', '.join(LEVELS)}")
            values[entry.key.partition("_")[0]] = str(entry.value)
    return DomainInfo(**values)


def remove_domain_info(path: str) -> bool:
    """Remove a file of domaininfo; false if there is none. Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


# --- DANE ---


class Tlsa(NamedTuple):
    """A TLSA record that can be used with SMTP (RFC 6698, 2.1; RFC 7672, 3.1).

    Usage 2 names an authority in the server's chain, usage 3 the server's own certificate.
    """

    usage: int
    selector: int
    matching: int
    data: bytes

    def matches(self, certificate: bytes) -> bool:
        """Tell whether the record is about `certificate`, in DER."""
        import hashlib  # loads OpenSSL's hashes; only for DANE

        try:
            content = public_key_info(certificate) if self.selector else certificate
        except (ValueError, IndexError):
            return False
        if self.matching:
            content = (hashlib.sha256, hashlib.sha512)[self.matching - 1](content).digest()
        return content == self.data


def parse_tlsa(record: str) -> Tlsa | None:
    """Return a record in presentation form; None if it cannot be used."""
    try:
        usage, selector, matching, *data = record.split()
        tlsa = Tlsa(int(usage), int(selector), int(matching), bytes.fromhex("".join(data)))
    except ValueError:
        return None
    usable = tlsa.usage in (2, 3) and tlsa.selector in (0, 1) and tlsa.matching in (0, 1, 2)
    return tlsa if usable and tlsa.data else None


# --- MTA-STS ---


class StsPolicy(NamedTuple):
    """A policy (RFC 8461, 3.2), the id under which it was announced, and when it was had."""

    id: str
    mode: str
    mx: tuple[str, ...]
    max_age: int
    fetched: float

    def allows(self, host: str) -> bool:
        """Tell whether a mail exchanger is among those that the policy names; 4.1."""
        return host in self.mx or f"*.{host.partition('.')[2]}" in self.mx


def parse_sts_policy(text: bytes, id: str, now: float) -> StsPolicy:
    """Parse a policy. Raises ValueError with what was expected."""
    values: dict[str, list[str]] = {}
    for line in text.decode("utf-8", "replace").replace("\r\n", "\n").split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key.strip(), []).append(value.strip())
    (version,), (mode,), (age,) = (values.get(key, [""])[:1] for key in _STS_KEYS)
    if version != "STSv1":
        raise ValueError("expected version: STSv1")
    if mode not in ("enforce", "testing", "none"):
        raise ValueError("expected mode: enforce, testing or none")
    if not re.fullmatch(r"\d{1,10}", age):
        raise ValueError("expected max_age: seconds")
    mx = tuple(name.lower().rstrip(".") for name in values.get("mx", ()) if name)
    if not mx and mode != "none":
        raise ValueError("expected mx: a name")
    return StsPolicy(id, mode, mx, max_age=min(int(age), _STS_AGE_LIMIT), fetched=now)


_STS_KEYS = ("version", "mode", "max_age")
FetchPolicy = Callable[[str], Awaitable[bytes]]


class StsPolicies:
    """The policies that are in force, each in a file of `directory`.

    `fetch` gets the text of a domain's policy, and raises ChasquidError.
    """

    def __init__(
        self, loop: Loop, log: Log, names: Names, fetch: FetchPolicy, directory: str
    ) -> None:
        self._loop = loop
        self._log = log
        self._names = names
        self._fetch = fetch
        self._directory = directory
        self._not_before: dict[str, float] = {}  # domains whose policy could not be had
        self._policies: dict[str, StsPolicy] = {}
        self._under_way: dict[str, Task] = {}

    def load(self) -> None:
        """Read what is kept on the disk. Blocks; for the start."""
        for name in os.listdir(self._directory) if os.path.isdir(self._directory) else []:
            try:
                with open(os.path.join(self._directory, name), "rb") as file:
                    value = json.load(file)
                text = "\n".join("mx: " + host for host in value["mx"])
                text += f"\nversion: STSv1\nmode: {value['mode']}\nmax_age: {value['max_age']:d}"
                fetched = float(value["fetched"])
                self._policies[name] = parse_sts_policy(text.encode(), value["id"], fetched)
            except (OSError, ValueError, TypeError, KeyError):
                continue  # it is fetched again when it is needed

    async def policy(self, domain: str) -> StsPolicy | None:
        """Return the policy of `domain`, in A-labels, if there is one; RFC 8461, 3.3."""
        known = self._known(domain)
        id = await self._announced(domain)
        if id and (known is None or known.id != id):
            await self._renew(domain, id)
            known = self._known(domain)
        return known

    async def refresh_forever(self) -> None:
        """Fetch again, now and then, what would one day be too old."""
        while True:
            await self._loop.sleep(_STS_REFRESH)
            now = self._loop.clock.time()
            for domain, policy in list(self._policies.items()):
                if now > policy.fetched + policy.max_age:
                    await self._drop(domain)
                elif now > policy.fetched + min(_STS_FRESH, policy.max_age / 2):
                    id = await self._announced(domain)
                    if id:
                        await self._renew(domain, id)

    def _known(self, domain: str) -> StsPolicy | None:
        policy = self._policies.get(domain)
        if policy is None or self._loop.clock.time() > policy.fetched + policy.max_age:
            return None
        return policy

    async def _announced(self, domain: str) -> str:
        """Return the id in the TXT record (3.1), or "" if none can be had."""
        try:
            answer = await self._names.query(f"_mta-sts.{domain}", "TXT")
        except TemporaryFailure:
            return ""
        texts = [text for text in answer.records if re.match(r"v=STSv1\s*;", text)]
        ids = re.findall(r";\s*id\s*=\s*([A-Za-z0-9]{1,32})\s*(?:;|$)", texts[0]) if texts else []
        return str(ids[0]) if len(texts) == 1 and ids else ""

    async def _renew(self, domain: str, id: str) -> None:
        """Fetch a policy, once for all who wait for it; the old one stays if that fails."""
        if self._loop.clock.monotonic() < self._not_before.get(domain, 0.0):
            return
        if domain not in self._under_way:
            self._under_way[domain] = self._loop.spawn(
                self._try_to_fetch(domain, id), f"MTA-STS policy of {domain}"
            )
        await self._under_way[domain].join()

    async def _try_to_fetch(self, domain: str, id: str) -> None:
        try:
            with self._loop.deadline(_STS_SECONDS):
                text = await self._fetch(domain)
            policy = parse_sts_policy(text, id, self._loop.clock.time())
        except (ChasquidError, ValueError, OSError) as error:
            self._not_before[domain] = self._loop.clock.monotonic() + _STS_PAUSE
            self._log.count(Metrics.MTA_STS, "failed")
            self._log.info("mta-sts", f"the policy of {domain} cannot be had: {reason(error)}")
            return
        finally:
            del self._under_way[domain]
        self._not_before.pop(domain, None)
        self._policies[domain] = policy
        self._log.count(Metrics.MTA_STS, "fetched")
        self._log.info("mta-sts", f"{domain} has the policy {policy.mode}, {', '.join(policy.mx)}")
        await self._write(domain, policy)

    async def _write(self, domain: str, policy: StsPolicy) -> None:
        path = os.path.join(self._directory, domain)

        def write() -> None:
            make_directory(self._directory)
            replace_durably(path, json.dumps(policy._asdict()).encode() + b"\n")

        try:
            await self._loop.work(write)
        except OSError as error:
            self._log.error("mta-sts", f"{path} cannot be written: {reason(error)}")

    async def _drop(self, domain: str) -> None:
        del self._policies[domain]
        path = os.path.join(self._directory, domain)
        with contextlib.suppress(OSError):
            await self._loop.work(lambda: os.unlink(path))


class HttpsPolicies:
    """Fetches policies over HTTPS: "https://mta-sts.DOMAIN/.well-known/mta-sts.txt".

    Redirects are not followed, and only a text/plain counts (RFC 8461, 3.3).
    """

    def __init__(
        self, loop: Loop, names: Names, context: Callable[[], ssl.SSLContext], port: int = 443
    ) -> None:
        self._loop = loop
        self._names = names
        self._context = context
        self._port = port

    async def fetch(self, domain: str) -> bytes:
        """Raises ChasquidError."""
        host = f"mta-sts.{domain}"
        failure: ChasquidError = Disconnected(f"{host} has no address")
        for ip in await self._names.addresses(host):
            try:
                return self._policy_in(await self._get(host, ip))
            except (Disconnected, TLSFailed) as error:
                failure = error
        raise failure

    async def _get(self, host: str, ip: str) -> bytes:
        """Return the whole response."""
        stream = await connect(self._loop, ip, self._port)
        try:
            await stream.start_tls(self._context(), False, host)
            stream.write(
                f"GET /.well-known/mta-sts.txt HTTP/1.1\r\nHost: {host}\r\n"
                f"User-Agent: chasquid/{__version__}\r\nConnection: close\r\n\r\n".encode()
            )
            received = b""
            with contextlib.suppress(Disconnected):  # the end
                while len(received) <= _HTTP_HEADER_LIMIT + 2 * _STS_SIZE_LIMIT:
                    received += await stream.read_some()
            return received
        finally:
            stream.close()

    @staticmethod
    def _policy_in(response: bytes) -> bytes:
        import http.client  # 22 ms, and only for domains with a policy
        import io

        class Connection:
            def makefile(self, mode: str) -> io.BytesIO:
                return io.BytesIO(response)

        parsed = http.client.HTTPResponse(Connection())  # type: ignore[arg-type]
        try:
            parsed.begin()
            body = parsed.read(_STS_SIZE_LIMIT + 1)
            complete = parsed.isclosed() or parsed.length in (0, None)
        except (http.client.HTTPException, ValueError, OSError) as error:
            raise ChasquidError(f"the answer is no HTTP: {reason(error)}") from None
        if parsed.status != 200:
            raise ChasquidError(f"the web server answers with status {parsed.status}")
        kind = (parsed.headers.get("content-type") or "").partition(";")[0]
        if kind.strip().lower() != "text/plain":
            raise ChasquidError("the policy is not text/plain")
        if len(body) > _STS_SIZE_LIMIT:
            raise ChasquidError(f"the policy is larger than {_STS_SIZE_LIMIT // 1024} kB")
        if not complete:
            raise ChasquidError("the policy was cut short")
        return body


# --- both, and the levels ---


class TlsRequirement(NamedTuple):
    """What a connection to a server must at least be, and who says so.

    With `tlsa`, the certificate must match one of these records. `authenticated` is true if
    DNSSEC or MTA-STS say that the host is the domain's (RFC 8689, 4.2.1).
    """

    level: str = PLAIN
    tlsa: tuple[Tlsa, ...] = ()
    why: str = ""
    authenticated: bool = False

    def allows(self, level: str) -> bool:
        """Tell whether a connection of this level is safe enough."""
        return LEVELS.index(level) >= LEVELS.index(self.level)


class TlsPolicies:
    """Finds out how safe the connection to a server of a domain must be."""

    def __init__(self, names: Names, levels: SecurityLevels, sts: StsPolicies) -> None:
        self._names = names
        self._sts = sts
        self.levels = levels

    async def requirement(self, domain: str, host: str, port: int, by_mx: bool) -> TlsRequirement:
        """Return what is demanded of `host`, in A-labels, for mail to `domain`, in Unicode.

        `by_mx`: the host is there because of the domain's DNS, not because somebody here
        named it. Raises TemporaryFailure if the host must not be used.
        """
        seen = (await self.levels.of(domain)).outgoing
        requirement = (
            TlsRequirement(seen, why=f"it was {seen} before") if seen != PLAIN else TlsRequirement()
        )
        if is_ip_address(host):
            return requirement
        mx_authentic = True
        policy = None
        if by_mx:
            ascii = domain_to_ascii(domain)
            mx_authentic = (await self._names.query(ascii, "MX")).authentic
            policy = await self._sts.policy(ascii)
        names = await self._signed_names(host) if mx_authentic else []
        signed = bool(names)
        for name in names:
            tlsa = await self._tlsa(name, port)
            usable = tuple(filter(None, map(parse_tlsa, tlsa)))[:_TLSA_LIMIT]
            if usable:
                return TlsRequirement(TLS_SECURE, usable, "DANE", authenticated=True)
            if tlsa:  # RFC 7672, 2.2: records that cannot be used still promise TLS
                requirement = max(
                    requirement, TlsRequirement(TLS_INSECURE, (), "DANE"), key=_strictness
                )
                break
        requirement = requirement._replace(authenticated=signed and by_mx)
        if policy is not None and policy.mode == "enforce":
            if not policy.allows(host):
                text = f"{host} is none of the servers in the MTA-STS policy of {domain}"
                raise TemporaryFailure(text, "4.7.5")
            return TlsRequirement(TLS_SECURE, (), "MTA-STS", authenticated=True)
        return requirement

    async def _signed_names(self, host: str) -> list[str]:
        """Return where TLSA records of `host` may stand, if its addresses are authentic.

        Where it is an alias, what it stands for comes first; RFC 7672, 2.2.2.
        """
        for kind in ("A", "AAAA"):
            answer = await self._names.query(host, kind)
            if answer.records:
                names = [answer.canonical, host] if answer.canonical else [host]
                return names if answer.authentic else []
        return []

    async def _tlsa(self, host: str, port: int) -> tuple[str, ...]:
        answer = await self._names.query(f"_{port}._tcp.{host}", "TLSA")
        return answer.records if answer.authentic else ()


def _strictness(requirement: TlsRequirement) -> int:
    return LEVELS.index(requirement.level)


# ======================================================================================
# ROOM: SMTP SYNTAX
#
# The protocol as values: replies, commands, paths, parameters, transparency. Octets go
# in and values come out; nothing here waits, and nothing knows a session.
#
# What a parser refuses it raises as `Refused`, with the reply that the client gets.
# ======================================================================================

RECIPIENT_LIMIT = 100  # per transaction; RFC 5321, 4.5.3.1.8
TRANSFER_SECONDS = 3 * 60.0  # between two pieces of a message; RFC 5321, 4.5.3.2.5


_REPLY_LINE_LIMIT = 512  # octets with CRLF


class Reply(NamedTuple):
    """A reply (RFC 5321, 4.2). `status` is the enhanced code (RFC 3463), "" for none.

    A text of several lines becomes a multiline reply. With `close`, the connection ends.
    """

    code: int
    status: str
    text: str
    close: bool = False

    def encode(self) -> bytes:
        """Return the lines, none longer than RFC 5321, 4.5.3.1.5 allows."""
        status = f"{self.status} " if self.status else ""
        if self.text.isprintable() and self.text.isascii() and len(self.text) < 400:  # most often
            return f"{self.code} {status}{self.text}\r\n".encode()
        room = _REPLY_LINE_LIMIT - len(f"{self.code} {status}\r\n")
        texts = [_shortened(printable(line), room) for line in self.text.split("\n")]
        last = len(texts) - 1
        return b"".join(
            f"{self.code}{' ' if number == last else '-'}{status}".encode() + text + b"\r\n"
            for number, text in enumerate(texts)
        )

    @property
    def is_error(self) -> bool:
        """Whether it refuses something, for now (4XX) or for good (5XX); RFC 5321, 4.2.1."""
        return self.code >= 400

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.code), self.status, self.text.replace("\n", " "))))


def _shortened(text: str, limit: int) -> bytes:
    """Return `text` in UTF-8, cut between characters to at most `limit` octets."""
    data = text.encode()
    return data if len(data) <= limit else data[:limit].decode("utf-8", "ignore").encode()


class Refused(Exception):
    """What the client asked for is refused with `reply`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


def _refuse(code: int, status: str, text: str) -> NoReturn:
    raise Refused(Reply(code, status, text))


def parse_command(line: bytes) -> tuple[str, str]:
    """Split a command line into the verb, in upper case, and its argument.

    Raises Refused if it is no UTF-8 (RFC 6531, 3.3) or holds a control character.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError:
        if line[:5].upper() not in (b"EHLO ", b"HELO "):
            _refuse(500, "5.5.2", "the command is no valid UTF-8")
        # the name of a computer at home, which proves nothing, in whatever encoding
        text = line.decode(errors="replace")
    if not text.isprintable() and UNPRINTABLE.search(text.replace("\t", " ")):
        _refuse(500, "5.5.2", "the command holds a control character")
    verb, _, argument = text.strip(" \t").partition(" ")
    # letters elsewhere may become ASCII in upper case: "\u017f" is "S" then
    return verb.upper() if verb.isascii() else verb, argument.strip(" \t")


class Path(NamedTuple):
    """A reverse-path or forward-path: the address ("" for "<>") and the parameters.

    `written` is the address as it came.
    """

    address: str
    parameters: dict[str, str]
    written: str


# RFC 5321, 4.1.2, with the UTF-8 of RFC 6531, 3.3:
#
#   Path          = "<" [ A-d-l ":" ] Mailbox ">"
#   A-d-l         = At-domain *( "," At-domain )         accepted and ignored
#   Mailbox       = Local-part "@" ( Domain / address-literal )
#   Local-part    = Dot-string / Quoted-string
#   Dot-string    = Atom *("." Atom)
#   Quoted-string = DQUOTE *QcontentSMTP DQUOTE
#
# Practice deviates: white space after the colon, paths without brackets, dots where a
# Dot-string has none ("a..b@", ".a@"), and "_" in domains. These are let in.
_PATH = re.compile(
    r"""
    (?: < (?: @ [^:<>\s]* : )? (?P<path> (?: "(?:[^"\\]|\\.)*" | [^<>"\s] )* ) >
      | (?P<bare> [^<>"\s]+ ) )
    (?: [ \t]+ (?P<parameters> .* ) )?
    """,
    re.VERBOSE,
)
# Said by what is left out: a range up to the end of Unicode takes 3 ms to compile.
_DOT_STRING = re.compile(r'[^\x00-\x20"(),:;<>@\[\\\]\x7f]+')
_QUOTED_STRING = re.compile(r'"((?:[^"\\\x00-\x1f\x7f]|\\[ -~])*)"')
ADDRESS_LITERAL = re.compile(r"\[(?:IPv6:([0-9A-Fa-f:.]+)|([0-9.]+))\]", re.IGNORECASE)
# RFC 5321, 4.1.2: esmtp-param = esmtp-keyword ["=" esmtp-value]
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")
_ADDRESS_LIMIT = 320  # octets: 64 for the local-part, 255 for the domain
_PATH_LIMIT = 256  # octets, with "<" and ">"; RFC 5321, 4.5.3.1.3


def parse_path(argument: str, keyword: str) -> Path:
    """Parse what follows MAIL or RCPT; `keyword` is "FROM:" or "TO:". Raises Refused."""
    if argument[: len(keyword)].upper() != keyword:
        _refuse(501, "5.5.4", f"expected {keyword}<address>")
    match = _PATH.fullmatch(argument[len(keyword) :].strip(" \t"))
    if match is None:
        _refuse(501, "5.1.7" if keyword == "FROM:" else "5.1.3", f"expected {keyword}<address>")
    path = match["bare"] if match["path"] is None else match["path"]
    status = "5.1.7" if keyword == "FROM:" else "5.1.3"
    if len(path.encode()) + 2 > _PATH_LIMIT:
        _refuse(501, status, f"the path is longer than {_PATH_LIMIT} octets")
    address = parse_address(path, status) if path else ""
    return Path(address, _parse_parameters(match["parameters"]), path)


def parse_address(text: str, status: str = "5.1.3") -> str:
    """Return a mailbox with its domain in Unicode and needless quotes taken off.

    A name without a domain ("postmaster", RFC 5321, 4.1.1.3) is returned as it is.
    Raises Refused with the enhanced code `status`.
    """
    if UNPRINTABLE.search(text):
        _refuse(501, status, "the address holds a control character")
    if len(text.encode()) > _ADDRESS_LIMIT:
        _refuse(501, status, f"the address is longer than {_ADDRESS_LIMIT} octets")
    local, domain = split_address(text)
    if _QUOTED_STRING.fullmatch(local):
        local = local_part(local_part_content(local))
    elif not _DOT_STRING.fullmatch(local):
        _refuse(501, status, "the local-part of the address is malformed")
    if not domain:
        if "@" in text:
            _refuse(501, status, "the address has no domain")
        return local
    try:
        return f"{local}@{_parse_domain(domain)}"
    except ValueError:
        _refuse(501, status, "the domain of the address is malformed")


def address_from_person(text: str) -> str:
    """As `parse_address`, for what a person typed. Raises ChasquidError."""
    try:
        return parse_address(text)
    except Refused as refused:
        raise ChasquidError(f"{printable(text, 100)!r}: {refused.reply.text}") from None


def local_part_content(local: str) -> str:
    """Return what a local-part says, without quotes and backslashes."""
    quoted = _QUOTED_STRING.fullmatch(local)
    return re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else local


def local_part(content: str) -> str:
    """Return the local-part that says `content`: quoted if it is no Dot-string."""
    if _DOT_STRING.fullmatch(content) and "" not in content.split("."):
        return content
    escaped = content.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@functools.lru_cache(1000)  # a sender says the same ones again
def _parse_domain(domain: str) -> str:
    literal = ADDRESS_LITERAL.fullmatch(domain)
    if literal is not None:
        if not is_ip_address(literal[1] or literal[2]) or bool(literal[1]) != (":" in domain[6:]):
            raise ValueError(domain)
        return domain
    unicode = domain_to_unicode(domain)
    malformed = unicode.isascii() and not ASCII_DOMAIN.fullmatch(unicode)
    labels = domain_to_ascii(unicode).split(".")  # RFC 1035, 2.3.4
    too_long = len(".".join(labels)) > 253 or any(len(label) > 63 for label in labels)
    if malformed or too_long or unicode.startswith("[") or unicode.endswith("."):
        raise ValueError(domain)
    return unicode


def _parse_parameters(text: str | None) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in (text or "").split():
        match = _PARAMETER.fullmatch(part)
        if match is None:
            _refuse(501, "5.5.4", f"the parameter {printable(part, 60)!r} is malformed")
        name = match[1].upper()
        if name in parameters:
            _refuse(501, "5.5.4", f"the parameter {name} is there twice")
        parameters[name] = match[2] or ""
    return parameters


def is_host_name(text: str) -> bool:
    """Tell whether HELO may name the client so.

    RFC 5321, 4.1.1.1 wants a domain or an address literal. Too many clients say something
    else, and nothing is decided by it (4.1.4), so it need only be harmless in Received.
    """
    return re.fullmatch(r"""[^\s()<>@,;"\\]{1,255}""", text) is not None


class DataDecoder:
    """Undoes the transparency of DATA (RFC 5321, 4.5.2), however the octets are split.

    Only <CRLF>.<CRLF> ends the message. A CR or LF outside CRLF raises BareNewline.
    """

    _END = b"\r\n.\r\n"

    def __init__(self) -> None:
        self._held = b"\r\n"  # DATA begins at the start of a line
        self._skip = 2
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the octets of the message in `data`, as far as they are certain.

        When the end was seen, `done` is true and `rest` holds what came after it.
        """
        data = self._held + data
        end = data.find(self._END)
        if end >= 0:
            piece, rest = data[: end + 2], data[end + len(self._END) :]
        else:
            held = next((n for n in (4, 3, 2, 1) if data.endswith(self._END[:n])), 0)
            piece, rest = data[: len(data) - held], b""
            self._held = data[len(data) - held :]
        check_newlines(piece)
        self.done, self.rest = end >= 0, rest
        skip = min(self._skip, len(piece))
        self._skip -= skip
        return piece.replace(b"\r\n.", b"\r\n")[skip:]


def check_newlines(piece: bytes) -> None:
    """Raise BareNewline if `piece`, which splits no CRLF, has a CR or LF outside CRLF."""
    pairs = piece.count(b"\r\n")
    if piece.count(b"\n") != pairs or piece.count(b"\r") != pairs:
        raise BareNewline("a line must end with CRLF, and hold no other CR or LF")


class DataEncoder:
    """Makes a message transparent for DATA (RFC 5321, 4.5.2), however it is split."""

    def __init__(self) -> None:
        self._last = b"\r\n"

    def feed(self, chunk: bytes) -> bytes:
        """Return the next octets of the message as they are sent."""
        encoded = chunk.replace(b"\r\n.", b"\r\n..")
        if self._last == b"\r\n" and chunk.startswith(b"."):
            encoded = b"." + encoded
        elif self._last.endswith(b"\r") and chunk.startswith(b"\n."):
            encoded = b"\n.." + encoded[2:]
        self._last = (self._last + chunk)[-2:]
        return encoded

    def end(self) -> bytes:
        """Return what ends the message."""
        return b".\r\n" if self._last == b"\r\n" else b"\r\n.\r\n"


# RFC 3461, 4: xtext = *( xchar / hexchar ), hexchar = "+" and two hexadecimal digits
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")


class Notify(enum.StrEnum):
    """What a sender may ask to be told of a recipient (RFC 3461, 4.1); NEVER stands alone."""

    NEVER = "NEVER"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    DELAY = "DELAY"


class Ret(enum.StrEnum):
    """What of a message a sender wants back if it fails (RFC 3461, 4.3)."""

    FULL = "FULL"
    HDRS = "HDRS"


def from_xtext(text: str) -> str:
    """Return what `text` stands for; RFC 3461, 4."""
    return re.sub(r"\+([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), text)


def parse_notify(value: str) -> tuple[Notify, ...]:
    """Return the words of NOTIFY (RFC 3461, 4.1). Raises Refused."""
    with contextlib.suppress(ValueError):
        words = tuple(map(Notify, dict.fromkeys(value.upper().split(","))))
        if words == (Notify.NEVER,) or Notify.NEVER not in words:
            return words
    _refuse(501, "5.5.4", "expected NOTIFY=NEVER, or some of SUCCESS,FAILURE,DELAY")


def check_xtext(name: str, value: str, limit: int, utf8: bool = False) -> str:
    """Return the value of ENVID or ORCPT (RFC 3461, 4.2 and 4.4). Raises Refused.

    With `utf8` it may go beyond ASCII, as only ORCPT may (RFC 6533, 3).
    """
    fits = _XTEXT.fullmatch(value) or (utf8 and not value.isascii())
    if not value or len(value.encode()) > limit or not fits:
        _refuse(501, "5.5.4", f"the parameter {name} is malformed")
    return value


def parse_reply_line(line: bytes) -> tuple[int, bool, str]:
    """Return the code of a reply line, whether more lines follow, and its text.

    Raises ValueError.
    """
    if len(line) < 3 or not line[:3].isdigit() or line[3:4] not in (b"", b" ", b"-"):
        raise ValueError(f"{printable(line.decode('utf-8', 'replace'), 80)!r} is no reply")
    return int(line[:3]), line[3:4] == b"-", line[4:].decode("utf-8", "replace")


def parse_status(code: int, text: str) -> tuple[str, str]:
    """Split the enhanced code off the text of a reply; if it has none, make it X.0.0."""
    match = re.match(r"([245]\.\d{1,3}\.\d{1,3})(?:\s+|$)", text)
    if match is not None and int(match[1][0]) == code // 100:
        return match[1], text[match.end() :]
    return f"{code // 100}.0.0", text


# ======================================================================================
# ROOM: SMTP CLIENT
#
# One connection to another server, from its greeting to QUIT, over SMTP or LMTP (RFC 5321,
# RFC 2033), and what its replies mean for each recipient.
#
# - What travels is a `Delivery`; what became of each recipient is a `Result`: sent, deferred
#   (it may work later) or failed.
# - With PIPELINING the envelope goes in one piece (RFC 2920). Every wait has the time limit of
#   RFC 5321, 4.5.3.2.
# - If the connection breaks behind the final dot, nobody knows what became of the message: it
#   is deferred, and not tried with another server at once.
#
# Which server, with what TLS, and when, belongs to COURIERS; the room knows no queue.
# ======================================================================================


class State(enum.StrEnum):
    """What became of a message for one recipient, so far."""

    PENDING = "pending"  # not attempted yet
    DEFERRED = "deferred"  # it may work later
    SENT = "sent"
    FAILED = "failed"  # for good


class Result(NamedTuple):
    """What became of one recipient, for people in `text`.

    `status` is the enhanced status code (RFC 3463), "" while pending. `remote_mta` names the
    server that was reached, and `reply` is what it said, if it did.
    """

    state: State
    status: str
    text: str
    remote_mta: str = ""
    reply: str = ""
    passed_on: bool = False  # the next server tells the sender of its success


class DsnParameters(NamedTuple):
    """Of what a sender wants to hear about a recipient (RFC 3461, 4.1 and 4.2).

    An empty `notify` means what is usual: to be told of failures and delays. `orcpt` is as it
    came.
    """

    notify: tuple[Notify, ...] = ()
    orcpt: str = ""

    def wants(self, what: Notify) -> bool:
        """Tell whether the sender is to be told of `what`."""
        return what in self.notify if self.notify else what != Notify.SUCCESS


class Delivery(NamedTuple):
    """A message to deliver, with its reverse-path and what its content demands."""

    id: str
    sender: str
    message: Message
    smtputf8: bool = False
    eight_bit: bool = False
    junk: bool = False  # for the folder of what is probably junk
    require_tls: bool = False  # RFC 8689, 2
    tls_optional: bool = False  # RFC 8689, 3: "TLS-Required: No"
    ret: str = ""  # RFC 3461, 4.3 and 4.4
    envid: str = ""
    dsn_parameters: Mapping[Destination, DsnParameters] = types.MappingProxyType({})


_GREETING_SECONDS = 5 * 60.0
_REPLY_SECONDS = 5 * 60.0
_DATA_SECONDS = 2 * 60.0
_FINAL_SECONDS = 10 * 60.0
_TLS_SECONDS = 60.0
_REPLY_LINES_LIMIT = 100


class Client:
    """The client's side of one SMTP or LMTP connection.

    Raises Disconnected, Expired; and TemporaryFailure for what is not a reply.
    """

    def __init__(self, loop: Loop, stream: Stream, place: str, lmtp: bool = False) -> None:
        self._loop = loop
        self._stream = stream
        self._lmtp = lmtp
        self.place = place
        self.extensions: dict[str, str] = {}

    @property
    def tls_text(self) -> str:
        """What TLS there is, for people; "" without."""
        return self._stream.tls_text

    @property
    def certificates(self) -> list[bytes]:
        """The certificates that the server has shown, in DER, its own first."""
        return self._stream.certificates

    async def greet(self, hostname: str) -> None:
        """Read the greeting and say EHLO (HELO if the server knows no EHLO) or LHLO.

        Raises TemporaryFailure or PermanentFailure if the server does not want us.
        """
        self._expect(await self._reply(_GREETING_SECONDS), "greets with")
        await self.hello(hostname)

    async def hello(self, hostname: str) -> None:
        """Say EHLO, HELO or LHLO, and learn `extensions` (RFC 5321, 4.1.1.1).

        Raises TemporaryFailure or PermanentFailure if the server does not want us.
        """
        reply = await self._command(f"{'LHLO' if self._lmtp else 'EHLO'} {hostname}")
        if reply.code in (500, 501, 502, 504) and not self._lmtp:
            reply = await self._command(f"HELO {hostname}")
            self.extensions = {}
        else:
            self.extensions = {}
            for line in reply.text.split("\n")[1:]:
                keyword, _, rest = line.partition(" ")
                self.extensions[keyword.upper()] = rest
        self._expect(reply, "answers EHLO with")

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Say STARTTLS and do the handshake (RFC 3207). Raises TLSFailed."""
        reply = await self._command("STARTTLS")
        if reply.code != 220:
            raise TLSFailed(f"{self.place} answers STARTTLS with {reply}")
        try:
            with self._loop.deadline(_TLS_SECONDS):
                await self._stream.start_tls(context, False, hostname)
        except Expired as error:
            raise TLSFailed(f"{self.place} did not finish the TLS handshake in time") from error

    async def authenticate(self, user: str, password: str) -> None:
        """Log in by a mechanism that EHLO offers, PLAIN before LOGIN (RFC 4954, 4).

        What the challenges of LOGIN say is up to the server, and not looked at. Raises
        TemporaryFailure; PermanentFailure too if the server offers neither mechanism.
        """
        offered = self._mechanisms()
        if "PLAIN" in offered:  # RFC 4616
            lines = [f"AUTH PLAIN {_in_base64(f'{chr(0)}{user}{chr(0)}{password}')}"]
        elif "LOGIN" in offered:
            lines = ["AUTH LOGIN", _in_base64(user), _in_base64(password)]
        else:
            found = f"only {' '.join(offered)}" if offered else "no login (AUTH) at all"
            text = f"{self.place} offers {found}; expected PLAIN or LOGIN"
            raise PermanentFailure(text, "5.7.4")
        for line in lines:
            reply = await self._command(line)
            if reply.code != 334:
                break
        self._expect(reply, "answers AUTH with")

    def _mechanisms(self) -> list[str]:
        """Return the names after AUTH in EHLO's answer; "AUTH=" is how old servers wrote it."""
        return [
            name
            for keyword, rest in self.extensions.items()
            if keyword == "AUTH" or keyword.startswith("AUTH=")
            for name in f"{keyword[5:]} {rest.upper()}".split()
        ]

    def lacks(self, delivery: Delivery) -> Result | None:
        """Return the failure of all recipients if the server lacks what the message needs.

        That is SMTPUTF8 (RFC 6531, 3.2) or REQUIRETLS (RFC 8689, 4.2.1); None if it has it.
        """
        for needed, extension, status in (
            (delivery.smtputf8, "SMTPUTF8", "5.6.7"),
            (delivery.require_tls, "REQUIRETLS", "5.7.30"),
        ):
            if needed and extension not in self.extensions:
                text = f"{self.place} does not have {extension}, which the message needs"
                return Result(State.FAILED, status, text, self.place)
        return None

    async def transfer(
        self, delivery: Delivery, recipients: Sequence[str], destinations: Sequence[Destination]
    ) -> list[Result]:
        """Send the message to `recipients` in one transaction; RFC 5321, 3.3.

        They are `destinations` in the form in which a server is told. Returns a result for each,
        in their order.
        """
        commands = [self._mail_command(delivery)]
        commands += [
            f"RCPT TO:<{address}>{self._rcpt_parameters(delivery, destination)}"
            for address, destination in zip(recipients, destinations, strict=True)
        ]
        commands.append("DATA")
        mail, *rcpts, data = await self._group(commands)
        if mail.code // 100 != 2:
            rcpts = [mail] * len(recipients)
        results = self._rcpt_results(rcpts)
        accepted = [number for number, result in enumerate(results) if result.state == State.SENT]
        if data.code != 354:
            failure = mail if mail.code // 100 != 2 else data
            for number in accepted:
                results[number] = self._result(failure, "answers DATA with", wanted=3)
        elif not accepted:
            await self._send_nothing()
        else:
            await self._send(delivery.message)
            final = await self._final_replies(len(accepted))
            passed_on = "DSN" in self.extensions and not self._lmtp
            for number, reply in zip(accepted, final, strict=True):
                results[number] = self._result(reply)._replace(passed_on=passed_on)
        return results

    def _rcpt_results(self, replies: Sequence[Reply]) -> list[Result]:
        """Return what the answers to RCPT mean.

        Once a recipient was accepted, 552 says "too many" and is temporary, for servers that
        follow RFC 821 (RFC 5321, 4.5.3.1.10).
        """
        results: list[Result] = []
        some_accepted = False
        for reply in replies:
            result = self._result(reply)
            if reply.code == 552 and some_accepted:
                result = result._replace(state=State.DEFERRED, status="4.5.3")
            some_accepted = some_accepted or result.state == State.SENT
            results.append(result)
        return results

    async def quit(self) -> None:
        """Say QUIT (RFC 5321, 4.1.1.10), without waiting long for the answer, and close."""
        try:
            with self._loop.deadline(2.0):
                await self._command("QUIT")
        except (Disconnected, Expired, TemporaryFailure):
            pass
        self._stream.close()

    def close(self) -> None:
        """Close the connection, without a word."""
        self._stream.close()

    def _mail_command(self, delivery: Delivery) -> str:
        parts = [f"MAIL FROM:<{delivery.sender}>"]
        if "SIZE" in self.extensions:
            parts.append(f"SIZE={len(delivery.message.prefix) + delivery.message.size}")
        if delivery.eight_bit and "8BITMIME" in self.extensions:
            parts.append("BODY=8BITMIME")
        if delivery.smtputf8 and "SMTPUTF8" in self.extensions:
            parts.append("SMTPUTF8")
        if delivery.require_tls and "REQUIRETLS" in self.extensions:
            parts.append("REQUIRETLS")
        if "DSN" in self.extensions and not self._lmtp:
            parts += [f"RET={delivery.ret}"] if delivery.ret else []
            parts += [f"ENVID={delivery.envid}"] if delivery.envid else []
        return " ".join(parts)

    def _rcpt_parameters(self, delivery: Delivery, destination: Destination) -> str:
        """What the sender has asked for this recipient (RFC 3461, 5.2.1)."""
        dsn = delivery.dsn_parameters.get(destination)
        if dsn is None or "DSN" not in self.extensions or self._lmtp:
            return ""
        notify = f" NOTIFY={','.join(dsn.notify)}" if dsn.notify else ""
        return notify + (f" ORCPT={dsn.orcpt}" if dsn.orcpt else "")

    async def _group(self, commands: Sequence[str]) -> list[Reply]:
        """Send MAIL, RCPTs and DATA, in one piece if the server has PIPELINING."""
        if "PIPELINING" in self.extensions:
            for command in commands:
                self._stream.write(f"{command}\r\n".encode())
            return [await self._reply(_REPLY_SECONDS) for _ in commands]
        replies = [await self._command(commands[0])]
        for command in commands[1:-1]:
            replies.append(replies[0] if replies[0].is_error else await self._command(command))
        if all(reply.is_error for reply in replies[1:]):
            return [*replies, Reply(503, "5.5.1", "no recipient was accepted")]
        return [*replies, await self._command(commands[-1], _DATA_SECONDS)]

    async def _send(self, message: Message) -> None:
        encoder = DataEncoder()
        for chunk in message.chunks():
            with self._loop.deadline(TRANSFER_SECONDS):
                await self._stream.send(encoder.feed(chunk))
        self._stream.write(encoder.end())

    async def _send_nothing(self) -> None:
        """End a DATA that was accepted although no recipient was; RFC 2920, 3.1."""
        self._stream.write(b".\r\n")
        await self._reply(_FINAL_SECONDS)

    async def _final_replies(self, count: int) -> list[Reply]:
        """Read one reply for all, or with LMTP one for each; RFC 2033, 4.2.

        If the connection breaks now, nobody knows what became of the message; it must not be
        sent to another server at once, but later.
        """
        replies: list[Reply] = []
        try:
            while len(replies) < (count if self._lmtp else 1):
                replies.append(await self._reply(_FINAL_SECONDS))
        except (Disconnected, Expired, TemporaryFailure) as error:
            lost = Reply(451, "4.4.2", f"nothing after the message was sent: {error}")
            return replies + [lost] * (count - len(replies))
        return replies if self._lmtp else replies * count

    async def _command(self, line: str, seconds: float = _REPLY_SECONDS) -> Reply:
        self._stream.write(f"{line}\r\n".encode())
        return await self._reply(seconds)

    async def _reply(self, seconds: float) -> Reply:
        lines: list[str] = []
        more = True
        try:
            with self._loop.deadline(seconds):
                while more:
                    line = await self._stream.read_line(COMMAND_LINE_LIMIT * 8)
                    code, more, text = parse_reply_line(line)
                    lines.append(text[:COMMAND_LINE_LIMIT])
                    if len(lines) > _REPLY_LINES_LIMIT:
                        raise ValueError(f"a reply of more than {_REPLY_LINES_LIMIT} lines")
        except (ValueError, LineTooLong, BareNewline) as error:
            raise TemporaryFailure(f"{self.place} does not speak SMTP: {error}", "4.5.0") from error
        status, rest = parse_status(code, lines[0])
        if rest == lines[0]:
            status = ""  # the server has given none
        return Reply(code, status, "\n".join([rest, *lines[1:]]))

    def _expect(self, reply: Reply, doing: str) -> None:
        if reply.code // 100 != 2:
            failure = PermanentFailure if reply.code >= 500 else TemporaryFailure
            raise failure(f"{self.place} {doing} {printable(str(reply))}", self._status(reply))

    @staticmethod
    def _status(reply: Reply) -> str:
        return reply.status or f"{reply.code // 100}.0.0"

    def _result(self, reply: Reply, doing: str = "says", wanted: int = 2) -> Result:
        """Turn a reply into a result; `wanted` is the first digit that means success."""
        said = printable(str(reply), 400)
        state = State.DEFERRED
        if reply.code // 100 == wanted == 2:
            state = State.SENT
        elif reply.code >= 500:
            state = State.FAILED
        # an answer to no question of ours has no status that means anything
        status = self._status(reply) if state != State.DEFERRED or reply.code >= 400 else "4.5.0"
        text = f"{self.place} {doing} {said}"
        return Result(state, status, text, remote_mta=self.place, reply=said)


def _in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")


# ======================================================================================
# ROOM: COURIERS
#
# How a message reaches its final recipients: a Maildir, a delivery agent, LMTP, a pipe, or
# SMTP to another server. A courier makes one attempt for one message and some recipients,
# and says of each what became of it: sent, deferred (it may work later) or failed.
#
# A courier never raises for what the outside does: it says it in a `Result`. It knows
# nothing of the queue, of retries or of notifications.
# ======================================================================================

PROGRAM_SECONDS = 30.0  # a delivery agent, a pipe
HOST_LIMIT = 5  # mail exchangers tried in one attempt
JUNK_FOLDER = ".Junk"
STORED_TOGETHER = 16  # Maildirs that a message is written into at a time


class Courier(Protocol):
    """Makes one attempt for some recipients of a message."""

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Return as many results as there are destinations, in their order.

        It raises for nothing that the outside does.
        """
        ...


class MaildirCourier:
    """Delivers into Maildirs, made when they are missing; what Dovecot and mutt read.

    A message is written into tmp, synced, renamed into new, and the directory synced.
    Lines end with LF; Return-Path and Delivered-To stand on top.
    """

    def __init__(
        self,
        loop: Loop,
        disk: Disk,
        template: str,
        data_dir: str,
        hostname: str,
        user_exists: Callable[[str, str], Awaitable[bool]],
    ) -> None:
        self._loop = loop
        self._disk = disk
        self._template = template.replace("%data_dir%", data_dir)
        self._host = hostname.replace("/", r"\057").replace(":", r"\072")
        self._user_exists = user_exists
        self._number = 0
        self._made: set[str] = set()  # Maildirs whose directories are known to be durable

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Store the message in the Maildir of each destination, or in its folder for junk.

        What is stored together is synced together. Who is SENT has it durably.
        """
        results: dict[Destination, Result] = {}

        async def store(destination: Destination) -> None:
            results[destination] = await self._deliver(delivery, destination.value)

        for start in range(0, len(destinations), STORED_TOGETHER):
            some = destinations[start : start + STORED_TOGETHER]
            if len(some) == 1:
                await store(some[0])
            else:
                await together(self._loop, [store(destination) for destination in some])
        return [results[destination] for destination in destinations]

    async def _deliver(self, delivery: Delivery, address: str) -> Result:
        user, domain = split_address(address)
        try:
            if not await self._user_exists(user, domain):
                return Result(State.FAILED, "5.1.1", f"there is no user {address}")
            path = await self._store(self._folder(address, delivery), delivery, address)
        except TemporaryFailure as error:
            return Result(State.DEFERRED, error.status, str(error))
        except ValueError as error:
            return Result(State.FAILED, "5.1.3", str(error))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            text = f"the message cannot be written into the Maildir: {reason(error)}"
            return Result(State.DEFERRED, "4.2.2" if full else "4.3.0", text)
        return Result(State.SENT, "2.0.0", f"stored as {path}")

    def _folder(self, address: str, delivery: Delivery) -> str:
        """Return the Maildir, or its subfolder in Maildir++. Raises ValueError."""
        directory = self.directory(address)
        return os.path.join(directory, JUNK_FOLDER) if delivery.junk else directory

    def directory(self, address: str) -> str:
        """Return the Maildir of `address`. Raises ValueError if it would lie elsewhere."""
        return maildir_path(self._template, address)

    async def _store(self, directory: str, delivery: Delivery, address: str) -> str:
        now = self._loop.clock.time()
        self._number += 1
        name = f"{int(now)}.M{int(now % 1 * 1e6)}P{os.getpid()}Q{self._number}.{self._host}"
        if directory not in self._made:
            await self._make(directory, delivery.junk)
        try:
            return await self._write(directory, name, delivery=delivery, address=address)
        except FileNotFoundError:  # somebody has removed a Maildir that was there
            await self._make(directory, delivery.junk)
            return await self._write(directory, name, delivery=delivery, address=address)

    async def _make(self, directory: str, junk: bool) -> None:
        for part in ("tmp", "new", "cur"):
            await self._loop.work(functools.partial(make_directory, f"{directory}/{part}"))
        self._made.add(directory)
        if junk:  # by which tools know a subfolder in Maildir++
            marker = os.path.join(directory, "maildirfolder")
            await self._loop.work(lambda: replace_durably(marker, b""))

    async def _write(self, directory: str, name: str, delivery: Delivery, address: str) -> str:
        head = f"Return-Path: <{delivery.sender}>\nDelivered-To: {address}\n".encode()
        temporary, new = f"{directory}/tmp/{name}", f"{directory}/new/{name}"
        if delivery.message.data is not None:
            whole = delivery.message.prefix + delivery.message.data
            data = head + whole.replace(b"\r\n", b"\n")
            path = f"{new},S={len(data)}"
            await self._disk.create(temporary, data, path)
        else:
            content = itertools.chain([head], with_lf(delivery.message.chunks()))
            path = await self._loop.work(
                lambda: create_durably(temporary, content, lambda size: f"{new},S={size}")
            )
        return path


def maildir_path(template: str, address: str) -> str:
    """Return the Maildir of `address`, as `maildir` says, %data_dir% being filled in already.

    Raises ValueError if it would lie elsewhere.
    """
    user, domain = split_address(address)
    for part in (user, domain):
        if "/" in part or "\0" in part or part in ("", ".", ".."):
            raise ValueError(f"{printable(address)} cannot be the name of a Maildir")
    path = template.replace("%to_user%", user).replace("%to_domain%", domain)
    return path.replace("%to%", address)


class _ProgramCourier:
    """What the delivery agent and the pipe have in common: a program gets the message."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    async def _run(self, argv: Sequence[str], delivery: Delivery, address: str) -> Result:
        environment = {
            **inherited_environment(), "SENDER": delivery.sender, "RECIPIENT": address
        }  # fmt: skip
        program = os.path.basename(argv[0])
        try:
            outcome = await self._programs.run(
                argv, delivery.message.chunks(), PROGRAM_SECONDS, environment
            )
        except (OSError, ValueError) as error:
            return Result(State.DEFERRED, "4.3.0", f"{program} cannot be started: {reason(error)}")
        except Expired:
            return Result(State.DEFERRED, "4.3.0", f"{program} took more than {PROGRAM_SECONDS:g}s")
        if outcome.status == 0:
            return Result(State.SENT, "2.0.0", f"{program} took it")
        printed = (outcome.errors or outcome.output).decode("utf-8", "replace").strip()
        said = f": {printable(printed.splitlines()[-1], 200)}" if printed else ""
        how = f"exit status {outcome.status}" if outcome.status > 0 else "killed by a signal"
        if outcome.status in (75, 126, 127) or outcome.status < 0:  # sysexits' EX_TEMPFAIL
            return Result(State.DEFERRED, "4.3.0", f"{program} failed for now, {how}{said}")
        return Result(State.FAILED, "5.3.0", f"{program} failed, {how}{said}")


class AgentCourier(_ProgramCourier):
    """Hands each local message to a mail delivery agent, one run for each recipient.

    %from%, %from_user%, %from_domain%, %to%, %to_user% and %to_domain% in its arguments
    are filled in, without the characters that mean something to a shell, and without a "-" in
    front, so that none is taken for an option.
    """

    DEFAULT_ARGUMENTS = ("-f", "%from%", "-d", "%to_user%")
    _UNSAFE = re.compile(r"[\s\x00-\x1f\x7f/;\"'\\|*&$%()\[\]{}`!<>]")

    def __init__(self, programs: Programs, program: str, arguments: Sequence[str]) -> None:
        super().__init__(programs)
        self._program = program
        self._arguments = arguments or self.DEFAULT_ARGUMENTS

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Run the agent once for each destination; its exit status 75 defers (EX_TEMPFAIL)."""
        results = []
        for destination in destinations:
            argv = [self._program, *self._fill_in(delivery.sender, destination.value)]
            results.append(await self._run(argv, delivery, destination.value))
        return results

    def _fill_in(self, sender: str, address: str) -> list[str]:
        values: dict[str, str] = {}
        for name, whole in (("from", sender), ("to", address)):
            parts = (whole, *split_address(whole))
            keys = (f"%{name}%", f"%{name}_user%", f"%{name}_domain%")
            safe = (self._UNSAFE.sub("", part).lstrip("-") for part in parts)
            values.update(zip(keys, safe, strict=True))
        return [
            re.sub(r"%\w+%", lambda match: values.get(match[0], match[0]), argument)
            for argument in self._arguments
        ]


class PipeCourier(_ProgramCourier):
    """Runs the program of a pipe alias; no shell is involved."""

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Run the command line of each destination; its exit status 75 defers (EX_TEMPFAIL)."""
        return [await self._pipe(delivery, destination.value) for destination in destinations]

    async def _pipe(self, delivery: Delivery, command: str) -> Result:
        import shlex  # only for pipes

        try:
            argv = shlex.split(command)
        except ValueError as error:
            return Result(State.FAILED, "5.3.5", f"the pipe {command!r} is malformed: {error}")
        return await self._run(argv, delivery, "")


# How long a client waits for a reply, in seconds; RFC 5321, 4.5.3.2.
_CONNECT_SECONDS = 30.0
_ATTEMPT_SECONDS = 60 * 60.0  # for all of it, or a server that drips holds a slot for ever
_CHAIN_LIMIT = 10  # certificates that a server shows
_ANCHOR_LIMIT = 2  # of them that are tried as the authority that DANE names
_ADDRESS_COUNT_LIMIT = 4  # addresses of one host that are tried in one attempt


async def _connect_to_any(loop: Loop, connect: Connect, ips: Sequence[str], port: int) -> Stream:
    """Connect to the first of `ips` that takes a connection. Raises Disconnected."""
    failure = Disconnected("it has no address")
    for ip in ips:
        try:
            return await connect(loop, ip, port)
        except Disconnected as error:
            failure = error
    raise failure


class LmtpCourier:
    """Delivers local messages over LMTP (RFC 2033), all recipients in one transaction."""

    def __init__(
        self,
        loop: Loop,
        names: Names,
        address: str,
        hostname: str,
        connect: Connect = connect,
    ) -> None:
        self._loop = loop
        self._names = names
        self._address = address
        self._hostname = hostname
        self._connect = connect

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Deliver to all in one transaction; the server answers for each (RFC 2033, 4.2)."""
        client = None
        try:
            with self._loop.deadline(_CONNECT_SECONDS):
                stream = await self._reach()
            client = Client(self._loop, stream, f"LMTP at {self._address}", lmtp=True)
            await client.greet(self._hostname)
            addresses = [destination.value for destination in destinations]
            results = await client.transfer(delivery, addresses, destinations)
            await client.quit()
            return results
        except (Disconnected, Expired, TemporaryFailure, PermanentFailure, OSError) as error:
            # the server is ours: whatever keeps it from working will be mended
            text = f"LMTP at {self._address}: {reason(error)}"
            return [Result(State.DEFERRED, "4.4.1", text)] * len(destinations)
        finally:
            if client is not None:
                client.close()

    async def _reach(self) -> Stream:
        if self._address.startswith("/"):
            return await self._connect(self._loop, self._address, 0)
        host, port = host_and_port(self._address, 24)
        ips = await self._names.addresses(host)
        return await _connect_to_any(self._loop, self._connect, ips, port)


def presentable(
    delivery: Delivery, destinations: Sequence[Destination]
) -> tuple[Delivery, list[str]]:
    """Turn domains into A-labels, and find out whether SMTPUTF8 is needed at all.

    Raises ValueError for what is not a domain.
    """
    sender = address_to_ascii(delivery.sender)
    addresses = [address_to_ascii(destination.value) for destination in destinations]
    needed = not all(address.isascii() for address in (sender, *addresses))
    if not needed and delivery.smtputf8:
        needed = not delivery.message.header().isascii()
    return delivery._replace(sender=sender, smtputf8=needed), addresses


class _Server(NamedTuple):
    """One address of a server, and what a connection there must be."""

    host: str
    ip: str
    port: int
    requirement: TlsRequirement

    @property
    def place(self) -> str:
        return f"{self.host} ({self.ip}:{self.port})"


class SmtpCourier:
    """Delivers to other servers: by MX, or through the servers that `via` names.

    TLS is opportunistic (RFC 7435): with a certificate that is valid, else with any, else
    without; but never less than TLS POLICY demands. All recipients of a destination share
    a transaction.
    """

    def __init__(
        self,
        loop: Loop,
        names: Names,
        log: Log,
        policies: TlsPolicies,
        hostname: str,
        port: int,
        random: Callable[[], float],
        connect: Connect = connect,
    ) -> None:
        self._loop = loop
        self._names = names
        self._log = log
        self._policies = policies
        self._hostname = hostname
        self._port = port
        self._random = random
        self._connect = connect
        self._contexts: dict[bool, ssl.SSLContext] = {}

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Deliver to `destinations`, which share their domain or their `via`."""
        try:
            delivery, _ = presentable(delivery, destinations)
            hosts = await self._hosts(destinations[0])
        except ValueError as error:
            return [Result(State.FAILED, "5.1.3", str(error))] * len(destinations)
        except TemporaryFailure as error:
            return [Result(State.DEFERRED, error.status, str(error))] * len(destinations)
        except PermanentFailure as error:
            return [Result(State.FAILED, error.status, str(error))] * len(destinations)
        results: list[Result] = []
        for start in range(0, len(destinations), RECIPIENT_LIMIT):
            results += await self._deliver(
                delivery, destinations[start : start + RECIPIENT_LIMIT], hosts
            )
        return results

    async def _hosts(self, destination: Destination) -> list[tuple[str, int]]:
        """Return hosts and ports to try, in order. Raises TemporaryFailure, PermanentFailure."""
        if destination.via:
            return [host_and_port(host, self._port) for host in destination.via][:HOST_LIMIT]
        domain = split_address(destination.value)[1]
        literal = ADDRESS_LITERAL.fullmatch(domain)
        if literal is not None:
            return [(literal[1] or literal[2], self._port)]
        exchangers = await self._names.mail_exchangers(domain_to_ascii(domain))
        ours = self._hostname
        own = [preference for preference, host in exchangers if host == ours]
        if own:  # RFC 5321, 5.1: only those that are nearer to the destination than we are
            exchangers = [pair for pair in exchangers if pair[0] < own[0]]
            if not exchangers:
                text = f"mail for {domain} would come back to us: we are its mail exchanger"
                raise PermanentFailure(f"{text}, but do not serve it", "5.4.6")
        shuffled = sorted(exchangers, key=lambda pair: (pair[0], self._random()))
        return [(host, self._port) for _, host in shuffled][:HOST_LIMIT]

    async def _deliver(
        self,
        delivery: Delivery,
        destinations: Sequence[Destination],
        hosts: Sequence[tuple[str, int]],
    ) -> list[Result]:
        """Try the hosts in turn; the first that talks to us decides."""
        destination = destinations[0]
        failures: list[Result] = []
        for host, port in hosts:
            try:
                domain = host if destination.via else split_address(destination.value)[1]
                name = domain_to_ascii(host)
                requirement = await self._requirement(
                    delivery, domain, host=name, port=port, by_mx=not destination.via
                )
                ips = await self._names.addresses(name)
            except (TemporaryFailure, PermanentFailure) as error:
                state = State.FAILED if isinstance(error, PermanentFailure) else State.DEFERRED
                failures.append(Result(state, error.status, str(error)))
                continue
            except ValueError as error:
                failures.append(Result(State.DEFERRED, "4.4.3", str(error)))
                continue
            if not ips:
                failures.append(
                    Result(State.DEFERRED, "4.4.1", f"the server {host} has no address")
                )
            for ip in ips[:_ADDRESS_COUNT_LIMIT]:
                server = _Server(name, ip, port, requirement)
                outcome = await self._try_server(delivery, destinations, server, domain)
                if isinstance(outcome, list):
                    return outcome
                failures.append(outcome)
        # what only one server refuses for good may still work with another
        lasting = all(failure.state == State.FAILED for failure in failures)
        chosen = failures[0] if lasting else next(f for f in failures if f.state == State.DEFERRED)
        return [chosen] * len(destinations)

    async def _requirement(
        self, delivery: Delivery, domain: str, host: str, port: int, by_mx: bool
    ) -> TlsRequirement:
        """Raises TemporaryFailure, and PermanentFailure if REQUIRETLS cannot be had."""
        if delivery.tls_optional and not delivery.require_tls:
            return TlsRequirement()
        requirement = await self._policies.requirement(domain, host, port, by_mx)
        if not delivery.require_tls:
            return requirement
        if by_mx and not requirement.authenticated:
            text = f"neither DNSSEC nor MTA-STS says that {host} is a server of {domain}"
            raise PermanentFailure(f"{text}, and REQUIRETLS needs that", "5.7.30")
        if requirement.tlsa:
            return requirement
        return requirement._replace(level=TLS_SECURE, why="REQUIRETLS")

    async def _try_server(
        self, delivery: Delivery, destinations: Sequence[Destination], server: _Server, domain: str
    ) -> list[Result] | Result:
        """Return a result for each address, or one for a server that we cannot talk to."""
        place = server.place
        try:
            with self._loop.deadline(_ATTEMPT_SECONDS):
                return await self._deliver_to(delivery, destinations, server, domain)
        except Expired:
            return Result(State.DEFERRED, "4.4.2", f"{place} did not answer in time", place)
        except PermanentFailure as error:
            return Result(State.FAILED, error.status, str(error), place)
        except (Disconnected, TLSFailed, TemporaryFailure) as error:
            status = error.status if isinstance(error, TemporaryFailure) else "4.4.1"
            return Result(State.DEFERRED, status, f"{place}: {error}", place)

    async def _deliver_to(
        self, delivery: Delivery, destinations: Sequence[Destination], server: _Server, domain: str
    ) -> list[Result]:
        client, level = await self._open(server)
        try:
            if not delivery.tls_optional:
                await self._policies.levels.saw_outgoing(domain, level)
            lacking = client.lacks(delivery)
            if lacking is not None:
                return [lacking] * len(destinations)
            addresses = [address_to_ascii(destination.value) for destination in destinations]
            results = await client.transfer(delivery, addresses, destinations)
            await client.quit()
            return results
        finally:
            client.close()

    async def _open(self, server: _Server) -> tuple[Client, str]:
        """Connect with as much security as the server has; return also the level reached.

        Raises as `Client` does, and TemporaryFailure if that is not enough.
        """
        if server.requirement.tlsa:
            # to be held to a certificate that others would call valid, it must show one
            return await self._open_with_dane(server), TLS_INSECURE
        failure = TLSFailed("")
        for verify, level in ((True, TLS_SECURE), (False, TLS_INSECURE)):
            if not server.requirement.allows(level):
                break
            client = await self._greet(server)
            if "STARTTLS" not in client.extensions:
                if server.requirement.allows(PLAIN):
                    return client, PLAIN
                client.close()
                raise self._too_little(server, "it does not offer TLS")
            failed = await self._try_tls(client, self._context(verify), server)
            if failed is None:
                return client, level
            failure = failed
            if not failure.unverified:
                break
        if not server.requirement.allows(PLAIN):
            raise self._too_little(server, str(failure))
        return await self._greet(server), PLAIN

    async def _try_tls(
        self, client: Client, context: ssl.SSLContext, server: _Server
    ) -> TLSFailed | None:
        """Return None, or, with the client closed, why there is no TLS."""
        try:
            await client.start_tls(context, server.host)
            await client.hello(self._hostname)
            return None
        except (TLSFailed, Disconnected) as error:
            client.close()
            self._log.info("smtp client", f"{server.place}: {error}")
            return error if isinstance(error, TLSFailed) else TLSFailed(str(error))
        except BaseException:
            client.close()
            raise

    async def _open_with_dane(self, server: _Server) -> Client:
        """Connect to a server whose certificate is in the DNS; RFC 7672, 3.1.

        If the record names an authority (usage 2), its certificate is known only from
        the handshake; so a second connection is made that trusts it alone.
        """
        client = await self._greet_for_dane(server)
        failure = await self._try_tls(client, self._context(False), server)
        if failure is not None:
            raise self._too_little(server, str(failure))
        chain, tlsa = client.certificates[:_CHAIN_LIMIT], server.requirement.tlsa
        if any(record.usage == 3 and record.matches(own) for record in tlsa for own in chain[:1]):
            return client
        client.close()
        failure = TLSFailed("the certificate matches no TLSA record")
        anchors = [
            shown
            for shown in chain
            if any(record.usage == 2 and record.matches(shown) for record in tlsa)
        ]
        for authority in anchors[:_ANCHOR_LIMIT]:
            try:
                context = anchored_tls_context(authority)
            except (ssl.SSLError, ValueError) as error:
                failure = TLSFailed(f"its authority's certificate cannot be used: {error}")
                continue
            client = await self._greet_for_dane(server)
            failure = await self._try_tls(client, context, server)
            if failure is None:
                return client
        raise self._too_little(server, str(failure))

    async def _greet_for_dane(self, server: _Server) -> Client:
        client = await self._greet(server)
        if "STARTTLS" not in client.extensions:
            client.close()
            raise self._too_little(server, "it does not offer TLS")
        return client

    def _too_little(self, server: _Server, why: str) -> TemporaryFailure:
        self._log.count(Metrics.SECURITY_LEVELS, "refused", "out")
        said = server.requirement.why or server.requirement.level
        return TemporaryFailure(f"{why}; less is not safe ({said})", "4.7.5")

    async def _greet(self, server: _Server) -> Client:
        with self._loop.deadline(_CONNECT_SECONDS):
            stream = await self._connect(self._loop, server.ip, server.port)
        client = Client(self._loop, stream, server.place)
        try:
            await client.greet(self._hostname)
        except BaseException:
            client.close()
            raise
        return client

    def _context(self, verify: bool) -> ssl.SSLContext:
        if verify not in self._contexts:
            self._contexts[verify] = client_tls_context(verify)
        return self._contexts[verify]


class SmarthostCourier:
    """Hands what is for other servers to one that sends it on, with a user and a password.

    The connection is one with TLS and a valid certificate, from the start on port 465,
    else by STARTTLS; unless it need not be `safe`, then TLS is used if it is offered.
    What the server itself refuses is our configuration's fault, or its own, so it is only
    deferred.
    """

    def __init__(
        self,
        loop: Loop,
        names: Names,
        hostname: str,
        address: str,
        login: tuple[str, str] | None,
        safe: bool = True,
        connect: Connect = connect,
    ) -> None:
        self._safe = safe
        self._loop = loop
        self._names = names
        self._hostname = hostname
        self._host, self._port = host_and_port(address, 587)
        self._login = login
        self._connect = connect
        self._context = functools.cache(lambda: client_tls_context(verify=safe))

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        """Hand the message over on one connection, to RECIPIENT_LIMIT destinations at a time."""
        place = f"{self._host} (the smarthost, port {self._port})"
        client = None
        results: list[Result] = []
        try:
            delivery, addresses = presentable(delivery, destinations)
            with self._loop.deadline(_ATTEMPT_SECONDS):
                client = await self._open(place)
                for start in range(0, len(addresses), RECIPIENT_LIMIT):
                    batch = addresses[start : start + RECIPIENT_LIMIT]
                    lacking = client.lacks(delivery)
                    results += (
                        [lacking] * len(batch)
                        if lacking
                        else await client.transfer(
                            delivery, batch, destinations[start : start + RECIPIENT_LIMIT]
                        )
                    )
                await client.quit()
        except ValueError as error:
            return [Result(State.FAILED, "5.1.3", str(error))] * len(destinations)
        except (Disconnected, Expired, TLSFailed, TemporaryFailure, PermanentFailure) as error:
            text = str(error) if str(error).startswith(place) else f"{place}: {error}"
            left = len(destinations) - len(results)
            results += [Result(State.DEFERRED, "4.4.1", text, place)] * left
        finally:
            if client is not None:
                client.close()
        return list(map(self._ours, results))

    @staticmethod
    def _ours(result: Result) -> Result:
        """Defer what is refused because we have not logged in (RFC 4954, 6)."""
        if result.state == State.FAILED and result.reply.startswith("530"):
            return result._replace(state=State.DEFERRED, status="4.7.0")
        return result

    async def _open(self, place: str) -> Client:
        with self._loop.deadline(_CONNECT_SECONDS):
            stream = await self._reach()
        client = Client(self._loop, stream, place)
        try:
            if self._port == 465:
                await stream.start_tls(self._context(), False, self._host)
            await client.greet(self._hostname)
            if self._port != 465 and (self._safe or "STARTTLS" in client.extensions):
                if "STARTTLS" not in client.extensions:
                    raise TLSFailed("it does not offer STARTTLS, and without TLS nothing is sent")
                await client.start_tls(self._context(), self._host)
                await client.hello(self._hostname)
            if self._login is not None:
                await client.authenticate(*self._login)
            return client
        except BaseException:
            client.close()
            raise

    async def _reach(self) -> Stream:
        try:
            name = domain_to_ascii(self._host)
        except ValueError as error:
            raise TemporaryFailure(str(error)) from error
        ips = await self._names.addresses(name)
        return await _connect_to_any(self._loop, self._connect, ips, self._port)


class Smarthost(NamedTuple):
    """When mail goes through a smarthost: after so many attempts to send it directly.

    `address` is "host:port"; an alias `via` it goes there as well.
    """

    courier: Courier
    address: str
    after: int


class RouteKind(enum.StrEnum):
    """How a message leaves the queue, as the metrics have it."""

    LOCAL = "local"
    PIPE = "pipe"
    MX = "mx"
    VIA = "via"
    SMARTHOST = "smarthost"


class Route(NamedTuple):
    """Which courier takes a destination; destinations with the same key travel together.

    `program`: the courier runs one, which may take as long as it likes. `durable`: what it says
    is sent survives a power cut, and takes no longer than to write it.
    """

    courier: Courier
    key: tuple[RouteKind, *tuple[str, ...]]
    local: bool
    program: bool = False
    durable: bool = False


class Couriers:
    """Chooses the courier of a destination. The local one is `durable` if it is as in `Route`."""

    def __init__(
        self,
        local: Courier,
        pipe: Courier,
        remote: Courier,
        is_local: Callable[[str], bool],
        smarthost: Smarthost | None = None,
        durable: bool = False,
    ) -> None:
        self._durable = durable
        self._local = local
        self._pipe = pipe
        self._remote = remote
        self._is_local = is_local
        self._smarthost = smarthost

    def route(self, destination: Destination, attempts: int = 0) -> Route:
        """Return the route of `destination` after so many attempts."""
        if destination.kind == DestinationKind.PIPE:
            return Route(self._pipe, (RouteKind.PIPE, destination.value), True, True)
        domain = split_address(destination.value)[1]
        smarthost = self._smarthost
        if destination.via:
            if smarthost is not None and destination.via == (smarthost.address,):
                return Route(smarthost.courier, (RouteKind.SMARTHOST,), False)
            return Route(self._remote, (RouteKind.VIA, *destination.via), False)
        if self._is_local(domain):
            agent = isinstance(self._local, AgentCourier)
            return Route(self._local, (RouteKind.LOCAL,), True, agent, durable=self._durable)
        if smarthost is not None and attempts >= smarthost.after:
            return Route(smarthost.courier, (RouteKind.SMARTHOST,), False)
        return Route(self._remote, (RouteKind.MX, domain), False)


# ======================================================================================
# ROOM: ITEMS
#
# A message of the queue as a file, and what can be read from it: the message as received
# (CRLF), then JSON lines: the envelope, and one whenever something is done or put off while
# more is left to do. The size of the message stands in the name ("ID,S=1234", as Maildir++
# has it), so the journal is found without reading it. Which directory a file lies in, and
# what a crash leaves there, is a table in QUEUE.
#
# - A journal line counts when it is synced. A torn line is ignored: each line begins with
#   the newline that ends what a crash may have left before it.
# - The last line about a recipient counts; whoever is in no line is pending.
# - Each line says which version of the format it is written in, and has all fields of that
#   version and no other: what we do not know may matter. Files of older versions are read.
#   What a newer program has written, before a downgrade, is left where it is.
# - Types and states are checked when a file is read: what says what cannot be is set aside,
#   not guessed at.
# - A message that waits in the queue of chasquid in Go can be read too, to be taken over.
#
# When an item is attempted, and what becomes of it, belongs to QUEUE.
# ======================================================================================

MEMORY_LIMIT = 64 * 1024  # octets of one message held in memory
_CLAIMS_LIMIT = 100  # fields with results of others that are kept


class Place(enum.StrEnum):
    """A directory of the queue; QUEUE says what a file in it means."""

    TMP = "tmp"
    NEW = "new"
    CUR = "cur"
    BAD = "bad"


class UnreadableItem(ChasquidError):
    """A file of the queue is not as it must be."""


class NewerItem(ChasquidError):
    """A file of the queue is in a format that only a newer program knows."""


class FinalRecipient(NamedTuple):
    """A final recipient, and the address of the envelope that it was expanded from."""

    destination: Destination
    original: str
    dsn: DsnParameters = DsnParameters()


class Envelope(NamedTuple):
    """What came with a message and is kept with it; `_ENVELOPE` says more of each field.

    `sender` is the reverse-path, without angle brackets, "" for the null reverse-path.
    `received` is in seconds since 1970. `prefix` holds the header fields that we put in front
    of the message.
    """

    id: str
    sender: str
    final_recipients: tuple[FinalRecipient, ...]
    received: float
    prefix: bytes
    smtputf8: bool = False
    eight_bit: bool = False
    junk: bool = False
    require_tls: bool = False
    tls_optional: bool = False
    ret: str = ""
    envid: str = ""

    def to_line(self) -> bytes:
        """Return the line behind the message, with the fields of `_ENVELOPE`."""
        fields = self._asdict()
        fields["reverse_path"] = fields.pop("sender")
        fields["prefix"] = self.prefix.decode("latin-1")
        fields["recipients"] = [
            {
                "destination": recipient.destination._asdict(),
                "original_recipient": recipient.original,
                **recipient.dsn._asdict(),
            }
            for recipient in fields.pop("final_recipients")
        ]
        return _json_line(fields)

    @classmethod
    def from_line(cls, line: bytes) -> Envelope:
        """Read what `to_line` wrote, in this version or an older.

        Raises NewerItem, and ValueError, TypeError or KeyError if the line is no envelope.
        """
        fields = _line_fields(json.loads(line), _ENVELOPE, _envelope_from_version_0)
        return cls(
            sender=fields.pop("reverse_path"), final_recipients=fields.pop("recipients"), **fields
        )


class Recipient:
    """A final recipient and what became of it. `reported`: the sender was told of the end."""

    __slots__ = ("destination", "dsn", "original", "reported", "result")

    def __init__(self, final_recipient: FinalRecipient) -> None:
        self.destination, self.original, self.dsn = final_recipient
        self.result = Result(State.PENDING, "", "")
        self.reported = False

    @property
    def state(self) -> State:
        """The state of the last result."""
        return self.result.state

    @property
    def is_open(self) -> bool:
        """Whether there is still something to attempt."""
        return self.result.state in (State.PENDING, State.DEFERRED)


class Item:
    """A message in the queue.

    `next_attempt` is for people, in seconds since 1970. What decides is `due`, on the
    monotonic clock, and `waited`: the seconds that the message had been in a running
    queue at the time `since`. A small host may find out at any moment that it is 2026.
    """

    __slots__ = (
        "again", "attempts", "delay_reported", "due", "envelope", "message", "next_attempt",
        "nudge", "recipients", "removed", "since", "task", "waited",
    )  # fmt: skip

    def __init__(self, envelope: Envelope, message: Message) -> None:
        self.envelope = envelope
        self.message = message
        self.recipients = [
            Recipient(final_recipient) for final_recipient in envelope.final_recipients
        ]
        self.attempts = 0
        self.delay_reported = False
        self.next_attempt = 0.0
        self.due = 0.0
        self.waited = 0.0
        self.since = 0.0
        self.removed = False
        self.nudge: Event | None = None
        self.again = False  # to be attempted once more when the attempt under way has ended
        self.task: Task | None = None

    @property
    def id(self) -> str:
        """The id of the message, as in its file's name and the logs."""
        return self.envelope.id

    def journal_line(self, at: float) -> bytes:
        """Return what is to be written down, with the fields of `_JOURNAL`.

        `at` is the time, in seconds since 1970. A failure that was not reported yet is left
        out: after a crash it must be found again.
        """
        fields = {
            "at": at,
            "attempts": self.attempts,
            "next_attempt": self.next_attempt,
            "waited": self.waited,
            "delay_reported": self.delay_reported,
            "results": [
                {"recipient": number, "reported": recipient.reported, **recipient.result._asdict()}
                for number, recipient in enumerate(self.recipients)
                if recipient.state in (State.SENT, State.DEFERRED) or recipient.reported
            ],
        }
        return b"\n" + _json_line(fields)

    def apply(self, line: bytes) -> None:
        """Take over a line of the journal. What is not JSON was torn, and changes nothing.

        Raises NewerItem, and ValueError, TypeError, KeyError, IndexError or AttributeError if
        it says what cannot be.
        """
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not isinstance(value, dict) or not value.keys() & {"v", "results"}:
            return
        fields = _line_fields(value, _JOURNAL, _journal_from_version_0)
        self.attempts, self.next_attempt = fields["attempts"], fields["next_attempt"]
        self.waited, self.delay_reported = fields["waited"], fields["delay_reported"]
        for result in fields["results"]:
            recipient = self.recipients[result.pop("recipient")]
            recipient.reported = result.pop("reported")
            recipient.result = Result(**result)


# --- the lines of a file: version 1 ---

_VERSION = 1


def _json_line(fields: Mapping[str, object]) -> bytes:
    line = json.dumps({"v": _VERSION, **fields}, separators=(",", ":"))
    return line.encode() + b"\n"


_Readers = Mapping[str, Callable[[Any], Any]]  # what reads and checks the value of each field


def _line_fields(
    value: object, known: _Readers, from_version_0: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return the fields of a line. Raises NewerItem, and as `_checked`.

    "v" is the version of the format, in every version to come. Lines of version 0 have none.
    """
    if not isinstance(value, dict):
        raise ValueError("the line is no JSON object")
    version = _as_count(value.pop("v", 0))
    if version > _VERSION:
        text = f"it is written in version {version} of the format, and this program knows"
        raise NewerItem(f"{text} version {_VERSION}: a newer chasquid must deliver it")
    return _checked(value if version else from_version_0(value), known)


def _checked(value: object, known: _Readers) -> dict[str, Any]:
    """Return the fields of a JSON object. Raises ValueError, TypeError."""
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]} is no JSON object")
    if value.keys() != known.keys():
        names = ", ".join(sorted(value.keys() ^ known.keys()))
        raise ValueError(f"{printable(names, 80)}: missing, or not known")
    return {name: read(value[name]) for name, read in known.items()}


def _as_string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} is no string")
    value.encode()  # half a character, which JSON can say, can be written nowhere
    return value


def _as_octets(value: object) -> bytes:
    return _as_string(value).encode("latin-1")  # each octet is a character


def _as_list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]} is no list")
    return value


def _as_strings(value: object) -> tuple[str, ...]:
    return tuple(map(_as_string, _as_list(value)))


def _as_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]} is neither true nor false")
    return value


def _as_number(value: object) -> float:
    number = float(value) if isinstance(value, (int, float)) else float("nan")
    if not abs(number) < 1e18:
        raise ValueError(f"{str(value)[:40]} is no number")
    return number


def _as_count(value: object) -> int:
    if type(value) is not int or value < 0:  # True is an int too
        raise ValueError(f"{str(value)[:40]} is no count")
    return value


def _as_time(value: object) -> float:
    number = _as_number(value)
    if not 0 <= number < 253402300800:  # 1970 to 9999
        raise ValueError(f"{number:g} is no time")
    return number


def _as_recipients(value: object) -> tuple[FinalRecipient, ...]:
    found = [_checked(recipient, _RECIPIENT) for recipient in _as_list(value)]
    if not found:
        raise ValueError("it has no recipients")
    return tuple(
        FinalRecipient(
            Destination(**fields["destination"]),
            fields["original_recipient"],
            DsnParameters(fields["notify"], fields["orcpt"]),
        )
        for fields in found
    )


_DESTINATION: _Readers = {
    "kind": DestinationKind,  # "address" or "pipe"
    "value": _as_string,  # the address, or the command line
    "via": _as_strings,  # HOST or HOST:PORT, the servers to deliver through; empty: by MX
}

_RECIPIENT: _Readers = {
    "destination": lambda value: _checked(value, _DESTINATION),
    "original_recipient": _as_string,  # the address in RCPT, which stands for the destination
    "notify": lambda value: tuple(map(Notify, _as_strings(value))),  # NOTIFY (RFC 3461, 4.1)
    "orcpt": _as_string,  # ORCPT (RFC 3461, 4.2), in xtext; "": not given
}

_ENVELOPE: _Readers = {
    "id": _as_string,  # of the message; the same as in the file's name
    "reverse_path": _as_string,  # RFC 5321, 4.1.1.2, without <>; "": the null reverse-path
    "recipients": _as_recipients,  # a list of objects with the fields of _RECIPIENT
    "received": _as_time,  # when it came, in seconds since 1970
    "prefix": _as_octets,  # the header fields that we put in front
    "smtputf8": _as_boolean,  # SMTPUTF8 (RFC 6531)
    "eight_bit": _as_boolean,  # it needs BODY=8BITMIME (RFC 6152)
    "junk": _as_boolean,  # for the folder of what is probably junk
    "require_tls": _as_boolean,  # REQUIRETLS (RFC 8689, 2)
    "tls_optional": _as_boolean,  # TLS-Required: No (RFC 8689, 3)
    "ret": _as_string,  # RET (RFC 3461, 4.3): "FULL", "HDRS"; "": not given
    "envid": _as_string,  # ENVID (RFC 3461, 4.4), in xtext; "": not given
}

_RESULT: _Readers = {
    "recipient": _as_count,  # its place in the envelope's list, from 0
    "state": State,  # "deferred", "sent" or "failed"; who is pending is not listed
    "status": _as_string,  # the enhanced status code (RFC 3463)
    "text": _as_string,  # what happened, for people
    "remote_mta": _as_string,  # the server that was reached (RFC 3464, 2.3.5), and its address
    "reply": _as_string,  # what it said
    "passed_on": _as_boolean,  # it will tell the sender of its success (RFC 3461, 5.2.2)
    "reported": _as_boolean,  # the sender was told of the end by us
}

_JOURNAL: _Readers = {
    "at": _as_number,  # when the line was written, in seconds since 1970
    "attempts": _as_count,  # how many have ended
    "next_attempt": _as_number,  # in seconds since 1970; 0: now
    "waited": _as_number,  # seconds in a running queue so far
    "delay_reported": _as_boolean,  # the sender was told that it takes longer
    "results": lambda value: [_checked(result, _RESULT) for result in _as_list(value)],
}


# --- version 0: no "v", and lists whose places have a meaning ---


def _envelope_from_version_0(old: dict[str, Any]) -> dict[str, Any]:
    value = {**Envelope._field_defaults, **old}
    value["reverse_path"] = value.pop("sender")
    value["recipients"] = [
        _recipient_from_version_0(*recipient) for recipient in value.pop("addressees")
    ]
    return value


def _recipient_from_version_0(
    destination: Sequence[object], original: object, dsn: Sequence[object] = ([], "")
) -> dict[str, object]:
    kind, value, via = destination
    notify, orcpt = dsn
    return {
        "destination": {"kind": kind, "value": value, "via": via},
        "original_recipient": original,
        "notify": notify,
        "orcpt": orcpt,
    }


def _journal_from_version_0(old: dict[str, Any]) -> dict[str, Any]:
    names = ("state", "status", "text", "remote_mta", "reply", "passed_on")
    reported = old.get("told", [])  # of those to whom it was sent; a failure always is
    results = []
    for key, texts in old["results"].items():
        defaults = ("", "", False)[len(texts) - 3 :]
        result = dict(zip(names, [*texts, *defaults], strict=True))
        number = int(key)
        was_reported = result["state"] == State.FAILED or number in reported
        results.append({"recipient": number, "reported": was_reported, **result})
    return {
        "at": old["at"],
        "attempts": old["attempt"],
        "next_attempt": old["next"],
        "waited": old["waited"],
        "delay_reported": old.get("delay_told", False),
        "results": results,
    }


def read_item(path: str) -> Item:
    """Read a file of the queue, whose name is ID,S=SIZE, in octets of the message.

    Raises NewerItem, UnreadableItem, OSError.
    """
    match = re.fullmatch(r"([a-z0-9]+),S=(\d+)", os.path.basename(path))
    if match is None:
        raise UnreadableItem(f"{path}: expected a name like ID,S=SIZE")
    size = int(match[2])
    try:
        with open(path, "rb") as file:
            file.seek(size)
            lines = file.read().split(b"\n")
        envelope = Envelope.from_line(lines[0])
        if envelope.id != match[1]:
            raise ValueError("its name is not the id of its envelope")
        item = Item(envelope, Message(envelope.prefix, path, size))
        for line in filter(None, lines[1:]):
            item.apply(line)
    except NewerItem as error:
        raise NewerItem(f"{path}: {error}") from None
    except (
        ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        text = f"{path}: expected a message of {size} octets and its envelope: {error}"
        raise UnreadableItem(text) from error
    return item


_GO_KINDS = {
    "EMAIL": DestinationKind.ADDRESS,
    "FORWARD": DestinationKind.ADDRESS,
    "PIPE": DestinationKind.PIPE,
}


class _GoFields:
    """The fields of a protocol buffer in text form. Raises ConfigError with their lines."""

    def __init__(self, entries: Iterable[Entry], path: str) -> None:
        self._path = path
        self._fields: dict[str, list[Entry]] = {}
        for entry in entries:
            self._fields.setdefault(entry.key, []).append(entry)

    def all(self, key: str) -> list[Entry]:
        return self._fields.get(key, [])

    def word(self, key: str, default: str) -> str:
        """Return a value that stands without quotes: a number, or a name."""
        found = self.all(key)
        return str(found[-1].value) if found else default

    def octets(self, key: str) -> bytes:
        return self._string(self.all(key)[-1]) if key in self._fields else b""

    def text(self, key: str) -> str:
        return self._decoded(self.all(key)[-1]) if key in self._fields else ""

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(map(self._decoded, self.all(key)))

    def _string(self, entry: Entry) -> bytes:
        if not isinstance(entry.value, bytes):
            raise ConfigError(self._path, entry.line, f"{entry.key}: expected a string in quotes")
        return entry.value

    def _decoded(self, entry: Entry) -> str:
        try:
            return self._string(entry).decode()
        except UnicodeDecodeError:
            raise ConfigError(self._path, entry.line, f"{entry.key}: expected UTF-8") from None


def item_from_go(data: bytes, path: str, now: float) -> tuple[str, tuple[int, list[bytes]]]:
    """Return the id, size and file of a message in the queue of chasquid in Go.

    That is a protocol buffer in text form: ID, from, To, rcpt (address, type EMAIL, PIPE or
    FORWARD, status PENDING, SENT or FAILED, original_address, via, last_failure_message),
    data, created_at_ts in nanoseconds since 1970. The id follows from theirs, so whoever is
    taken over twice gets the same name. Recipients that have failed are tried once more, and
    then reported. `now` is in seconds since 1970. Raises ConfigError.
    """
    import hashlib  # loads OpenSSL's hashes; only for such files

    fields = _GoFields(parse_text_format(data, path), path)
    recipients = [_recipient_from_go(entry, path) for entry in fields.all("rcpt")]
    if not recipients or not fields.all("data") or not fields.text("ID"):
        raise ConfigError(path, 0, "expected ID, rcpt and data")
    created = fields.word("created_at_ts", "")
    age = 0.0
    if re.fullmatch(r"\d{1,20}", created):
        age = max(0.0, now - int(created) / (1e9 if len(created) > 12 else 1))
    id = f"g{hashlib.sha256(fields.text('ID').encode()).hexdigest()[:15]}"
    message = re.sub(rb"\r?\n", b"\r\n", fields.octets("data"))
    envelope = Envelope(
        id,
        sender=fields.text("from").removeprefix("<").removesuffix(">"),
        final_recipients=tuple(final_recipient for final_recipient, _ in recipients),
        received=now - age,
        prefix=b"",
        eight_bit=not message.isascii(),
    )
    item = Item(envelope, Message(b"", "", len(message)))
    item.waited = age
    for recipient, (_, is_sent) in zip(item.recipients, recipients, strict=True):
        if is_sent:
            recipient.result = Result(State.SENT, "2.0.0", "sent by chasquid in Go")
            recipient.reported = True
    return id, (len(message), [message, envelope.to_line(), item.journal_line(now)])


def _recipient_from_go(entry: Entry, path: str) -> tuple[FinalRecipient, bool]:
    """Return a recipient, and whether it has got the message. Raises ConfigError."""
    if not isinstance(entry.value, tuple):
        raise ConfigError(path, entry.line, "expected '{' after 'rcpt'")
    fields = _GoFields(entry.value, path)
    kind = _GO_KINDS.get(fields.word("type", "EMAIL"))
    status = fields.word("status", "PENDING")
    address = fields.text("address")
    if kind is None or status not in ("PENDING", "SENT", "FAILED") or not address:
        raise ConfigError(path, entry.line, "expected a recipient with address, type, status")
    destination = Destination(kind, address, fields.texts("via"))
    return FinalRecipient(destination, fields.text("original_address") or address), status == "SENT"


class QueueContents(NamedTuple):
    """The items of a queue, and the paths of its other files, with reasons."""

    items: list[Item]
    unreadable: list[tuple[str, str]]  # they are no items
    unread: list[tuple[str, str]]  # they could not be read now, but may be later
    newer: list[tuple[str, str]]  # only a newer program knows what they say


def read_queue(directory: str) -> QueueContents:
    """Read the queue below `directory`. Raises ChasquidError."""
    contents = QueueContents([], [], [], [])
    for place in (Place.NEW, Place.CUR):
        try:
            names = sorted(os.listdir(os.path.join(directory, place)))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ChasquidError(f"the queue cannot be read: {reason(error)}") from error
        for name in names:
            path = os.path.join(directory, place, name)
            try:
                contents.items.append(read_item(path))
            except UnreadableItem as error:
                contents.unreadable.append((path, str(error)))
            except NewerItem as error:
                contents.newer.append((path, str(error)))
            except FileNotFoundError:
                pass  # delivered meanwhile
            except OSError as error:
                contents.unread.append((path, reason(error)))
    return contents


class Draft:
    """A message on its way in: in memory while it is small, then in tmp.

    Of its header, fields that claim to be results of `hostname` are left out (none, if
    that is None); the header is held back for that until it is whole. Up to `memory`
    octets are not written to the disk. Once `add` has failed, the draft is discarded and
    stays so.
    """

    def __init__(
        self,
        loop: Loop,
        disk: Disk,
        directory: str,
        hostname: str | None,
        memory: int = MEMORY_LIMIT,
    ) -> None:
        self.id = new_id()
        self._memory = memory  # octets
        self.size = 0
        self.eight_bit = False
        self._hostname = hostname
        self._body_at = 0  # where the body begins in what is stored
        self._loop = loop
        self._disk = disk
        self._directory = directory
        self._path = f"{directory}/{Place.TMP}/{self.id}"
        self._fd = -1
        self._pieces: list[bytes] = []
        self._held = 0  # octets in _pieces
        self._head = bytearray()
        self._header: bytes | None = None
        self._fields: list[Field] | None = None  # of the header, once it was parsed

    async def add(self, piece: bytes) -> None:
        """Take the next octets of the message.

        Raises PermanentFailure if the header is too large, OSError if the disk is full.
        """
        self.size += len(piece)
        self.eight_bit = self.eight_bit or not piece.isascii()
        if self._header is None:
            self._look_for_header(piece)
        else:
            self._hold(piece)
        if self._held > self._memory:
            await self._spill()

    def complete(self) -> bytes:
        """Take the message as complete; return its header block as it came."""
        if self._header is None:  # all of it is header
            self._take_header(len(self._head))
        assert self._header is not None
        return self._header

    def fields(self) -> list[Field]:
        """Return the fields of the complete header as it came. Raises ValueError."""
        if self._fields is None:
            self._fields = header_fields(self.complete())
        return self._fields

    def body(self) -> Iterator[bytes]:
        """Yield what is stored after the header's empty line. Raises OSError."""
        skip = self._body_at
        for chunk in self.stored():
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))

    def stored(self) -> Iterator[bytes]:
        """Yield the message as it is stored. Raises OSError."""
        if self._fd >= 0:
            with open(self._path, "rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        yield from self._pieces

    def _hold(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._held += len(piece)

    @property
    def in_memory(self) -> bool:
        """Whether all that has come is in memory, and no file."""
        return self._fd < 0

    def message(self, prefix: bytes) -> Message:
        """Return the message that is `in_memory`, with the fields `prefix` in front."""
        return Message(prefix, "", self.size, b"".join(self._pieces))

    async def store(self, envelope: Envelope, journal: bytes = b"") -> Message:
        """Write the rest, envelope and journal, and move it all into new. Raises OSError.

        When this returns, file and directory are synced.
        """
        data = b"".join(self._pieces)
        target = f"{self._directory}/{Place.NEW}/{self.id},S={self.size}"
        tail = data + envelope.to_line() + journal
        if self._fd < 0:
            await self._disk.create(self._path, tail, target)
        else:
            await self._loop.work(lambda: os.fsync(self._fd))  # nobody else should wait for it
            fd, self._fd = self._fd, -1
            try:
                await self._disk.commit(fd, tail, self._path, target)
            finally:
                close_written(fd)
        small = self.size == len(data)
        return Message(envelope.prefix, target, self.size, data if small else None)

    def discard(self) -> None:
        """Forget the message, unless it was stored."""
        self._pieces.clear()
        if self._fd >= 0:
            close_written(self._fd)
            self._fd = -1
            discard_names(self._path)

    def _look_for_header(self, piece: bytes) -> None:
        start = max(0, len(self._head) - 3)
        self._head += piece
        end = 0 if self._head.startswith(b"\r\n") else self._head.find(b"\r\n\r\n", start)
        if (end if end >= 0 else len(self._head)) > HEADER_LIMIT:
            text = f"the header of the message is larger than {HEADER_LIMIT // 1024} kB"
            raise PermanentFailure(text, "5.3.4")
        if end >= 0:
            self._take_header(end + 2 if end else 0)

    def _take_header(self, end: int) -> None:
        """Split what was held back at `end`, at which the empty line begins."""
        self._header = bytes(self._head[:end])
        kept = self._without_false_traces(self._header)
        self.size -= end - len(kept)
        self._body_at = len(kept) + 2
        self._hold(kept)
        self._hold(bytes(self._head[end:]))
        self._head.clear()

    def _without_false_traces(self, header: bytes) -> bytes:
        """Leave out what only we may say: results of ours, and where mail is from.

        Return-Path is written at the final delivery, and stands there once (RFC 5321, 4.4).
        """
        hostname = self._hostname
        if hostname is None:
            return header
        try:
            fields = self._fields = header_fields(header)
        except ValueError:
            return header  # it is refused later
        claims = [field for field in fields if field.name == "authentication-results"]
        false = {field for field in claims[:_CLAIMS_LIMIT] if claims_results_of(field, hostname)}
        false |= set(claims[_CLAIMS_LIMIT:])
        false |= {field for field in fields if field.name == "return-path"}
        return b"".join(field.raw for field in fields if field not in false) if false else header

    async def _spill(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        await self._loop.work(lambda: self._append(data))

    def _append(self, data: bytes) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        write_all(self._fd, data)


class QueueSettings(NamedTuple):
    """What a queue needs to know of its server; times in seconds."""

    directory: str
    hostname: str
    give_up_after: float
    limit: int
    suffix_separator: str
    min_free_disk: int = 0  # octets


# ======================================================================================
# ROOM: NOTIFICATIONS
#
# What a sender hears of a message: that it failed, waits, was delivered, or was passed on to a
# server that will not tell. A notification is a multipart/report (RFC 6522) with words for
# people, fields for programs (RFC 3464), and what was sent, or its header.
#
# - It names the message that it is about (In-Reply-To, References), so that mail programs show
#   it there, and who did not get it (X-Failed-Recipients).
# - Where a Maildir lies, and which programs there are, is nobody's business.
# - International addresses make it a message/global-delivery-status (RFC 6533).
#
# Who is told, and when, belongs to QUEUE.
# ======================================================================================

NOTIFICATION_ORIGINAL_LIMIT = 256 * 1024  # octets of the original in a notification


def is_automatic(header: bytes) -> bool:
    """Tell by its header block whether a program wrote a message, or a list sent it on.

    RFC 3834, 5; what cannot be read counts as automatic, as it must not be answered.
    """
    try:
        fields = {field.name: field.value.strip().lower() for field in header_fields(header)}
    except ValueError:
        return True
    precedence = fields.get("precedence", b"")
    submitted = re.split(rb"[;(]", fields.get("auto-submitted", b"no"), maxsplit=1)[0].strip()
    return submitted != b"no" or precedence in (b"bulk", b"list", b"junk")


class Action(enum.StrEnum):
    """What a notification tells of its recipients (RFC 3464, 2.3.3)."""

    FAILED = "failed"
    DELAYED = "delayed"
    DELIVERED = "delivered"
    RELAYED = "relayed"  # to a server that will not tell


class _Words(NamedTuple):
    """What a notification says to people; `{}` is "this recipient" or so."""

    subject: str
    text: str


_WORDS = {
    Action.FAILED: _Words(
        "Mail delivery failed: returning message to sender",
        "Your message could not be delivered to {}:",
    ),
    Action.DELAYED: _Words(
        "Mail delivery is taking longer",
        "Your message has not yet been delivered to {}. You need not send it again:",
    ),
    Action.DELIVERED: _Words(
        "Mail delivered", "As you asked to be told: your message has reached {}:"
    ),
    Action.RELAYED: _Words(
        "Mail passed on",
        "As you asked to be told: your message was taken over by the next server, which may "
        "send no further report, for {}:",
    ),
}


_MESSAGE_ID = re.compile(rb"<[!-;=?-~]{1,200}>")
_REFERENCES_LIMIT = 10  # ids of earlier messages that are repeated


def notification(
    item: Item, action: Action, recipients: Sequence[Recipient], settings: QueueSettings, now: float
) -> tuple[bytes, bool]:
    """Return a delivery status notification (RFC 3464, 6533), and if it needs SMTPUTF8.

    It tells the sender of `item` what became of `recipients`; `now` is in seconds since 1970.
    """
    sender = _ascii_if_possible(item.envelope.sender)
    names = [sender]
    for recipient in recipients:
        names += [_ascii_if_possible(recipient.original), _final_recipient(recipient)]
    utf8 = not all(name.isascii() for name in names)
    if item.envelope.smtputf8 and not utf8:
        utf8 = not item.message.header().isascii()
    boundary = f"=_{new_id()}"
    status = "global-delivery-status" if utf8 else "delivery-status"
    parts = [
        _part("text/plain; charset=utf-8", _explanation(item, action, recipients, settings)),
        _part(
            f"message/{status}",
            _delivery_status(item, action, recipients, settings=settings, utf8=utf8),
        ),
        _returned_content(item, action, utf8),
    ]
    header = (
        f"From: Mail Delivery System <postmaster@{settings.hostname}>\r\n"
        f"To: <{sender}>\r\n"
        f"Subject: {_WORDS[action].subject}\r\n"
        f"Message-ID: <{new_id()}@{settings.hostname}>\r\n"
        f"Date: {rfc5322_date(now)}\r\n"
        f"{_thread_fields(item.message.header())}"
        f"{_failed_recipients(recipients) if action == Action.FAILED else ''}"
        "Auto-Submitted: auto-replied\r\n"
        "MIME-Version: 1.0\r\n"
        f"Content-Transfer-Encoding: {_encoding(b''.join(parts))}\r\n"
        "Content-Type: multipart/report; report-type=delivery-status;\r\n"
        f'\tboundary="{boundary}"\r\n\r\n'
    ).encode()
    delimiter = f"--{boundary}\r\n".encode()
    body = b"".join(delimiter + part + b"\r\n" for part in parts)
    return header + body + f"--{boundary}--\r\n".encode(), utf8


def _encoding(content: bytes) -> str:
    """RFC 2045, 6.4: what holds an 8bit part is 8bit itself."""
    return "7bit" if content.isascii() else "8bit"


def _part(kind: str, content: bytes) -> bytes:
    head = f"Content-Type: {kind}\r\nContent-Transfer-Encoding: {_encoding(content)}\r\n\r\n"
    return head.encode() + content


def _thread_fields(header: bytes) -> str:
    """Return In-Reply-To and References, by which mail programs show it with the original.

    RFC 5322, 3.6.4; nothing if the message has no Message-ID that can be repeated.
    """
    try:
        fields = {field.name: field.value for field in header_fields(header)}
    except ValueError:
        return ""
    ids = _MESSAGE_ID.findall(fields.get("message-id", b""))
    if not ids:
        return ""
    thread = [*_MESSAGE_ID.findall(fields.get("references", b""))[-_REFERENCES_LIMIT:], ids[0]]
    references = [id.decode("ascii") for id in thread]
    return (fold("In-Reply-To", references[-1]) + fold("References", *references)).decode()


def _failed_recipients(recipients: Sequence[Recipient]) -> str:
    names = dict.fromkeys(_ascii_if_possible(recipient.original) for recipient in recipients)
    *others, last = names
    return fold("X-Failed-Recipients", *(f"{name}," for name in others), last).decode()


def _ascii_if_possible(address: str) -> str:
    """Return `address` with its domain in A-labels, so that fewer servers are asked too much."""
    try:
        return address_to_ascii(address)
    except ValueError:
        return address


def _final_recipient(recipient: Recipient) -> str:
    destination = recipient.destination
    return _ascii_if_possible(
        destination.value if destination.kind == DestinationKind.ADDRESS else recipient.original
    )


def _explanation(
    item: Item, action: Action, recipients: Sequence[Recipient], settings: QueueSettings
) -> bytes:
    who = "this recipient" if len(recipients) == 1 else "these recipients"
    lines = [
        f"This is the mail server at {settings.hostname}.",
        "",
        _WORDS[action].text.format(who),
        "",
    ]
    for recipient in recipients:
        address, why = printable(recipient.original, 400), printable(recipient.result.text, 800)
        # where mail lies here is nobody's business
        lines += [f"  {address}", "" if action == Action.DELIVERED else f"    {why}", ""]
    if action == Action.DELAYED:
        left = duration_text(settings.give_up_after - item.waited)
        lines += [f"It will be tried again for {left} more.", ""]
    elif any(recipient.is_open for recipient in item.recipients):
        lines += ["Delivery to the other recipients is still being tried.", ""]
    lines += ["What was sent is attached, or its header if it is large.", ""]
    return "\r\n".join(lines).encode()


def _delivery_status(
    item: Item, action: Action, recipients: Sequence[Recipient], settings: QueueSettings, utf8: bool
) -> bytes:
    """The machine's part: RFC 3464, 2.2 for the message and 2.3 for each recipient."""
    form = "utf-8" if utf8 else "rfc822"
    groups = [
        [
            f"Reporting-MTA: dns; {settings.hostname}",
            f"X-Chasquid-Queue-ID: {item.id}",
            f"Arrival-Date: {rfc5322_date(item.envelope.received)}",
        ]
    ]
    if item.envelope.envid:
        envid = printable(from_xtext(item.envelope.envid))
        groups[0].insert(0, f"Original-Envelope-Id: {envid}")
    for recipient in recipients:
        result = recipient.result
        original = f"{form}; {_ascii_if_possible(recipient.original)}"
        if recipient.dsn.orcpt:
            original = printable("; ".join(from_xtext(recipient.dsn.orcpt).split(";", 1)))
        group = [
            f"Original-Recipient: {original}",
            f"Final-Recipient: {form}; {_final_recipient(recipient)}",
            f"Action: {action}",
            f"Status: {result.status}",
        ]
        if result.remote_mta:
            group.append(f"Remote-MTA: dns; {result.remote_mta.partition(' ')[0]}")
        diagnosis = f"smtp; {result.reply}" if result.reply else f"X-chasquid; {result.text}"
        if action != Action.DELIVERED:
            group.append(f"Diagnostic-Code: {printable(diagnosis, 800)}")
        groups.append(group)
    text = "\r\n\r\n".join("\r\n".join(group) for group in groups) + "\r\n"
    return text.encode() if utf8 else text.encode("ascii", "replace")


def _returned_content(item: Item, action: Action, utf8: bool) -> bytes:
    """The message if it is small, its header otherwise (RFC 6522, RFC 6533)."""
    message = item.message
    small = len(message.prefix) + message.size <= NOTIFICATION_ORIGINAL_LIMIT
    # RFC 3461, 4.3: the whole only of what failed; RFC 8689, 5: no body of what needs TLS
    whole = (
        action == Action.FAILED and item.envelope.ret != Ret.HDRS and not item.envelope.require_tls
    )
    if small and whole:
        kind = "message/global" if utf8 else "message/rfc822"
        content = b"".join(message.chunks())
    else:
        kind = "message/global-headers" if utf8 else "text/rfc822-headers"
        content = message.header()[:NOTIFICATION_ORIGINAL_LIMIT]
    return _part(kind, content)


# ======================================================================================
# ROOM: QUEUE
#
# Mail that we answer for: from the 250 to the last delivery or the notification. One file
# for a message (ITEMS), below data_dir/queue:
#
#     place     means                          a crash here leaves
#     --------  -----------------------------  ---------------------------------------
#     tmp/ID    being received or written      nothing owed, no 250 was sent; swept
#     new/ID    accepted, no attempt has       its journal says what is done; without one,
#               ended                          all recipients are pending
#     cur/ID    attempted at least once        its journal says what is done
#     bad/ID    cannot be read, reported       for the operator to look at
#     m:ID      left by chasquid in Go         taken over at the start, each once
#
# A file moves from tmp to new when it is whole and synced, and from new to cur after its
# journal is; that move is not synced, as the journal counts in either. Files in new and cur
# that a newer version wrote are reported and left alone.
#
# - 250 means that file and directory are synced.
# - Mail for a few mailboxes here has no file here: it is written straight into them before its
#   250, if the courier makes that durable (a Maildir), it is small, and nobody asked to hear of
#   success. For one recipient as for several, a crash before all is synced leaves none, some or
#   all of them with it, and a client without its 250, which sends it again; later, nothing is
#   owed. If some cannot have it, it goes into new with a journal of who has it, in one write,
#   and the rest is attempted from there; if that fails too, it is refused for now, and comes
#   again. So after a crash or a refusal it may arrive twice; after a 250 it is never lost.
# - A notification is in the queue, or delivered, before the failure that it reports is written
#   down, and a file is removed only when nothing in it is owed any more. So after a crash a
#   message may be delivered, or a failure reported, twice; never not at all.
# - The null reverse-path gets no notifications (RFC 5321, 4.5.5).
# - Mailboxes, each program and each destination have places of their own, so that nobody
#   waits for somebody else's slow server or program.
#
# The room knows that there are routes, and nothing of what couriers do.
# ======================================================================================

_PAUSES = (60.0, 300.0, 600.0, 1200.0)  # seconds after the 1st, 2nd, 3rd, any later attempt
_JITTER = 60.0
_LOCAL_SLOTS = 16  # attempts at a time, each kind for itself: slow servers elsewhere must
_REMOTE_SLOTS = 100  # not hold up mail that is delivered here
_PIPE_SLOTS = 4  # runs of one command at a time; of the delivery agent, as many as local ones
_LOCAL_BACKLOG = 64  # deliveries here that may wait before their senders are slowed down,
_CATCH_UP_SECONDS = 2.0  # at most by this for each message
_CATCH_UP_STEPS = 100
_DIRECT_RECIPIENTS = 16  # who get a message before its 250; for more that would take too long
_DISK_SECONDS = 2.0  # how long what was seen of the disk is good enough
_DELAY_NOTICE_SECONDS = 4 * 3600.0  # after which a sender hears that it takes longer
_DESTINATION_SLOTS = 5  # attempts at a time for one destination elsewhere
_SLOTS = {RouteKind.LOCAL: _LOCAL_SLOTS, RouteKind.PIPE: _PIPE_SLOTS}


_RESULT_EVENTS = {
    State.SENT: Events.DELIVERED,
    State.DEFERRED: Events.DEFERRED,
    State.FAILED: Events.FAILED,
}


class QueueFull(TemporaryFailure):
    """There is no room for another message, by number or on the disk."""


def _always(path: str, size: int) -> str:
    return path


Sign = Callable[[bytes, Callable[[], Iterable[bytes]]], Awaitable[bytes]]


class Queue:
    """The messages that we answer for, and the tasks that deliver them.

    `is_local` tells whether a domain is served here, `expand` what an address stands for.
    `sign` returns the fields to put in front of a notification's header, given that and the
    body. `on_result` is told of each recipient's result, as it happens.
    """

    def __init__(
        self,
        loop: Loop,
        disk: Disk,
        log: Log,
        settings: QueueSettings,
        couriers: Couriers,
        expand: Callable[[str], Awaitable[list[Destination]]],
        is_local: Callable[[str], bool],
        random: Callable[[], float],
        sign: Sign,
        on_result: Callable[[Item, Recipient], None] = lambda item, recipient: None,
    ) -> None:
        self._loop = loop
        self._disk = disk
        self._log = log
        self._sign = sign
        self._settings = settings
        self._couriers = couriers
        self._is_local = is_local
        self._random = random
        self._on_result = on_result
        self._remote_slots = Slots(loop, _REMOTE_SLOTS)
        self._destinations: dict[tuple[str, ...], Slots] = {}
        # by route, deliveries that wait for a place or are being made
        self._under_way: collections.Counter[tuple[str, ...]] = collections.Counter()
        self._closing = False
        self._disk_seen = float("-inf")
        self._has_room = True
        self.expand = expand
        self.items: dict[str, Item] = {}

    def recover(self) -> None:
        """Make the directories, sweep tmp, and take up what is in new and cur.

        Raises ConfigError if the directory cannot be used.
        """
        directory = self._settings.directory
        try:
            for place in Place:
                make_directory(os.path.join(directory, place))
            for name in os.listdir(os.path.join(directory, Place.TMP)):
                self._sweep(os.path.join(directory, Place.TMP, name))
            self._take_over(directory)
        except OSError as error:
            text = f"the queue cannot be written: {error.strerror}"
            raise ConfigError(error.filename or directory, 0, text) from error
        contents = read_queue(directory)
        for path, why in contents.unreadable:
            self._set_aside(path, why)
        for _, why in contents.newer:
            self._leave(why)
        for path, why in contents.unread:
            self._log.error("queue", f"{why}; reading it again in a minute")
            self._loop.spawn(self._read_later(path), f"reading of {path}")
        for item in contents.items:
            self._take_up(item)

    def _set_aside(self, path: str, why: str) -> None:
        self._log.error("queue", f"set aside in bad: {why}")
        target = os.path.join(self._settings.directory, Place.BAD, os.path.basename(path))
        try:
            os.rename(path, target)
        except OSError as error:
            self._log.error("queue", f"{path} stays where it is: {reason(error)}")

    def _leave(self, why: str) -> None:
        self._log.error("queue", f"left where it is, and not delivered: {why}")

    def _sweep(self, path: str) -> None:
        try:
            os.unlink(path)
        except OSError as error:
            self._log.error("queue", f"{path} cannot be removed: {reason(error)}")

    def _take_over(self, directory: str) -> None:
        """Make items of the messages that chasquid in Go has left; each once, or it stays.

        Raises OSError if one cannot be written.
        """
        now = self._loop.clock.time()
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            if not name.startswith("m:") or not os.path.isfile(path):
                continue
            try:
                id, (size, chunks) = item_from_go(read_file(path), path, now)
            except ConfigError as error:
                self._log.error("queue", f"not taken over from chasquid in Go: {error}")
                continue
            places = {place: os.path.join(directory, place, f"{id},S={size}") for place in Place}
            if not any(map(os.path.exists, places.values())):  # or we died before it was removed
                path_for = functools.partial(_always, places[Place.CUR])
                create_durably(os.path.join(directory, Place.TMP, id), chunks, path_for)
            os.unlink(path)
            sync_directory(directory)
            self._log.event(Events.TAKEN_OVER, id=id, file=name)

    def _take_up(self, item: Item) -> None:
        self._log.event(Events.FOUND, id=item.id, from_=item.envelope.sender)
        self._start(item)

    async def _read_later(self, path: str) -> None:
        while True:
            await self._loop.sleep(_PAUSES[0])
            try:
                self._take_up(read_item(path))
                return
            except UnreadableItem as error:
                self._set_aside(path, str(error))
                return
            except NewerItem as error:
                self._leave(str(error))
                return
            except OSError as error:
                self._log.error("queue", f"{reason(error)}; reading it again in a minute")

    def draft(self) -> Draft:
        """Return a message to be filled. Raises QueueFull."""
        self.check_room()
        return self._new_draft()

    def _new_draft(self) -> Draft:
        settings = self._settings
        return Draft(self._loop, self._disk, settings.directory, settings.hostname)

    def check_room(self) -> None:
        """Raise QueueFull if the queue takes no more messages from outside."""
        if len(self.items) >= self._settings.limit:
            raise QueueFull(f"the queue is full ({self._settings.limit} messages)", "4.3.1")
        if self._settings.min_free_disk and not self._disk_has_room():
            raise QueueFull("the disk is nearly full", "4.3.1")

    def _disk_has_room(self) -> bool:
        """Tell whether enough was free within the last seconds; a tenth of a disk is enough."""
        now = self._loop.clock.monotonic()
        if now >= self._disk_seen + _DISK_SECONDS:
            try:
                status = os.statvfs(self._settings.directory)
            except OSError:
                return True  # what is wrong shows when something is written
            enough = min(self._settings.min_free_disk, status.f_blocks * status.f_frsize // 10)
            self._disk_seen, self._has_room = now, status.f_bavail * status.f_frsize >= enough
        return self._has_room

    async def accept(self, draft: Draft, envelope: Envelope, trace: Mapping[str, str]) -> Item:
        """Store a message durably and start to deliver it, or deliver it. Raises QueueFull.

        `trace` says where it came from: fields of `Events.QUEUED`.
        """
        routes = {
            self._couriers.route(recipient.destination) for recipient in envelope.final_recipients
        }
        direct = draft.in_memory and self._is_direct(routes, envelope)
        item = Item(envelope, draft.message(envelope.prefix) if direct else Message(b"", "", 0))
        try:
            self._check_programs(routes)
            sent = await self._deliver_directly(item) if direct else []
            if len(sent) < len(item.recipients):
                journal = item.journal_line(self._loop.clock.time()) if sent else b""
                item.message = await draft.store(envelope, journal)
        except OSError as error:
            draft.discard()
            self._log.error("queue", f"a message cannot be stored: {reason(error)}")
            raise QueueFull("the message cannot be stored now", "4.3.1") from error
        except BaseException:
            draft.discard()
            raise
        originals = dict.fromkeys(recipient.original for recipient in envelope.final_recipients)
        self._log.count(Metrics.MESSAGES, "queued")
        self._log.event(
            Events.QUEUED,
            id=item.id,
            from_=envelope.sender,
            to=originals,
            size=item.message.size,
            **trace,
        )
        for recipient in sent:
            self._tell(item, recipient, RouteKind.LOCAL, envelope.sender)
        if len(sent) == len(item.recipients):
            draft.discard()
            self._log.event(Events.DONE, id=item.id, attempts=1)
        else:
            self._start(item)
            await self._let_deliveries_catch_up(routes)
        return item

    @staticmethod
    def _is_direct(routes: Iterable[Route], envelope: Envelope) -> bool:
        """Tell whether all recipients are a few mailboxes, and nobody is to hear of success."""
        recipients = envelope.final_recipients
        if len(recipients) > _DIRECT_RECIPIENTS or not all(route.durable for route in routes):
            return False
        return not any(recipient.dsn.wants(Notify.SUCCESS) for recipient in recipients)

    async def _deliver_directly(self, item: Item) -> list[Recipient]:
        """Deliver to mailboxes here, before the message is in the queue; return who has it."""
        route = self._couriers.route(item.recipients[0].destination)
        delivery = self._delivery(item, item.recipients, item.envelope.sender)
        found = await self._results(item, route.courier, delivery)
        sent = []
        for recipient in item.recipients:
            result = found[recipient.destination]
            if result.state == State.SENT:  # any other is found out anew by the queue
                recipient.result = result
                sent.append(recipient)
        return sent

    def _check_programs(self, routes: Iterable[Route]) -> None:
        """Raise QueueFull while half of the queue waits for a program that is asked for."""
        for route in routes:
            if route.program and self._under_way[route.key] > self._settings.limit // 2:
                raise QueueFull("too much mail is waiting for a program here", "4.3.2")

    async def _let_deliveries_catch_up(self, routes: Iterable[Route]) -> None:
        """Slow senders down a little if their mail comes in faster than it is delivered here.

        Otherwise a quick sender would fill the queue, and be sent away.
        """
        most = min(_LOCAL_BACKLOG, self._settings.limit)
        for _ in range(_CATCH_UP_STEPS):
            if all(self._under_way[route.key] < most for route in routes if route.local):
                return
            await self._loop.sleep(_CATCH_UP_SECONDS / _CATCH_UP_STEPS)

    def retry(self, item: Item) -> None:
        """Attempt `item` now instead of when it is due."""
        item.next_attempt = item.due = 0.0
        if item.nudge is not None:
            item.nudge.set()
        else:
            item.again = True  # an attempt is under way, and would put it off at its end

    async def retry_as_asked(self, item: Item) -> None:
        """As `retry`, and let the file say so too, which is what people are shown."""
        item.next_attempt = 0.0
        await self._write_progress(item)
        self.retry(item)

    async def bounce(self, item: Item) -> None:
        """Give `item` up now: its sender is told, as if its time had passed.

        Returns when that is done, or put off.
        """
        self._give_up(item, "given up by the operator", "5.0.0")
        self.retry(item)
        if item.task is not None:
            await item.task.join()

    async def remove(self, item: Item) -> None:
        """Take `item` out of the queue, delivered or not; the sender is not told.

        Raises ChasquidError if its file cannot be removed; then it stays.
        """
        item.removed = True
        self.retry(item)
        if item.task is not None:
            await item.task.join()
        try:
            await self._disk.remove(item.message.path)
        except OSError as error:
            item.removed = False
            if any(recipient.is_open for recipient in item.recipients):
                self._start(item)  # it is still there, and would be delivered after a restart
            raise ChasquidError(f"{item.id} cannot be removed: {reason(error)}") from error
        self._log.event(Events.REMOVED, id=item.id)

    def begin_closing(self) -> None:
        """Begin no more attempts."""
        self._closing = True
        for item in self.items.values():
            if item.nudge is not None:
                item.nudge.set()

    async def close(self) -> None:
        """Let attempts under way end; what is left stays on the disk."""
        self.begin_closing()
        for item in list(self.items.values()):
            if item.task is not None:
                await item.task.join()

    def _start(self, item: Item) -> None:
        self.items[item.id] = item
        item.since = self._loop.clock.monotonic()
        pause = item.next_attempt - self._loop.clock.time()
        item.due = item.since + min(max(0.0, pause), _PAUSES[-1] + _JITTER)
        item.task = self._loop.spawn(self._deliver_all(item), f"queue {item.id}")

    async def _deliver_all(self, item: Item) -> None:
        """Attempt until nothing is pending, pausing in between."""
        try:
            while not item.removed and not self._closing:
                if item.due <= self._loop.clock.monotonic():
                    item.again = False
                    await self._attempt(item)
                    if await self._settle(item):
                        return
                else:
                    await self._wait(item)
        finally:
            del self.items[item.id]

    async def _wait(self, item: Item) -> None:
        item.nudge = Event(self._loop)
        try:
            with self._loop.deadline(item.due - self._loop.clock.monotonic()):
                await item.nudge.wait()
        except Expired:
            pass
        item.nudge = None

    async def _attempt(self, item: Item) -> None:
        """Try each open recipient once; those that travel together in one go.

        If some are done while others still wait for a slow server, that is written down.
        """
        groups: dict[tuple[str, ...], list[Recipient]] = {}
        for recipient in item.recipients:
            if recipient.is_open:
                key = self._couriers.route(recipient.destination, item.attempts).key
                groups.setdefault((*key, self._sender_for(item, recipient)), []).append(recipient)
        if not groups:
            return  # all that is left is to report
        first, *others = groups.values()
        under_way = 1 + len(others)

        async def deliver(group: list[Recipient]) -> None:
            nonlocal under_way
            await self._deliver(item, group)
            under_way -= 1
            if under_way:
                await self._write_progress(item)

        tasks = [
            self._loop.spawn(deliver(group), f"delivery of {item.id}") for group in others
        ]  # fmt: skip
        await deliver(first)
        for task in tasks:
            await task.join()
        item.attempts += 1

    async def _write_progress(self, item: Item) -> None:
        path, line = item.message.path, item.journal_line(self._loop.clock.time())
        try:
            await self._loop.work(lambda: append_synced(path, line))
        except OSError as error:
            self._log.error("queue", f"{item.id} cannot be written: {reason(error)}")

    async def _deliver(self, item: Item, group: list[Recipient]) -> None:
        route = self._couriers.route(group[0].destination, item.attempts)
        sender = self._sender_for(item, group[0])
        delivery = self._delivery(item, group, sender)
        async with self._places(route):
            found = await self._results(item, route.courier, delivery)
        for recipient in group:
            result = found[recipient.destination]
            if sender != item.envelope.sender:  # who stands in for the sender would hear of it
                result = result._replace(passed_on=False)
            recipient.result = result
            self._tell(item, recipient, route.key[0], sender)

    def _delivery(self, item: Item, group: Sequence[Recipient], sender: str) -> Delivery:
        envelope = item.envelope
        return Delivery(
            item.id,
            sender,
            item.message,
            smtputf8=envelope.smtputf8,
            eight_bit=envelope.eight_bit,
            junk=envelope.junk,
            require_tls=envelope.require_tls,
            tls_optional=envelope.tls_optional,
            ret=envelope.ret,
            envid=envelope.envid,
            dsn_parameters=self._dsn_by_destination(group, sender == envelope.sender),
        )

    async def _results(
        self, item: Item, courier: Courier, delivery: Delivery
    ) -> dict[Destination, Result]:
        """Return what became of each destination of a delivery."""
        destinations = list(delivery.dsn_parameters)
        try:
            results = await courier.deliver(delivery, destinations)
        except Exception as error:  # a fault of ours must not lose the message
            self._log.crash(f"delivery of {item.id}", error)
            failure = Result(State.DEFERRED, "4.3.0", "an internal error; the log has more")
            results = [failure] * len(destinations)
        return dict(zip(destinations, results, strict=True))

    def _tell(self, item: Item, recipient: Recipient, kind: RouteKind, sender: str) -> None:
        """Count and log what became of a recipient, and pass it on."""
        result = recipient.result
        self._log.count(Metrics.DELIVERIES, kind, result.state)
        self._log.event(
            _RESULT_EVENTS[result.state],
            id=item.id,
            from_=sender,
            to=recipient.destination.value,
            route=kind,
            status=result.status,
            text=result.text,
        )
        self._on_result(item, recipient)

    @staticmethod
    def _dsn_by_destination(
        group: Sequence[Recipient], with_success: bool
    ) -> dict[Destination, DsnParameters]:
        """Return what was asked for each destination: all that any of those who meet there want."""
        dsn_parameters: dict[Destination, DsnParameters] = {}
        for recipient in group:
            dsn = recipient.dsn
            other = dsn_parameters.get(recipient.destination)
            if other is not None and other != dsn:
                words = tuple(
                    word
                    for word in (Notify.SUCCESS, Notify.FAILURE, Notify.DELAY)
                    if dsn.wants(word) or other.wants(word)
                )
                dsn = DsnParameters(words or (Notify.NEVER,), other.orcpt or dsn.orcpt)
            dsn_parameters[recipient.destination] = dsn
        if with_success:
            return dsn_parameters
        return {
            destination: dsn._replace(
                notify=tuple(word for word in dsn.notify if word != Notify.SUCCESS)
                or (Notify.NEVER,)
            )
            if dsn.notify
            else dsn
            for destination, dsn in dsn_parameters.items()
        }

    @contextlib.asynccontextmanager
    async def _places(self, route: Route) -> AsyncIterator[None]:
        """Hold one of the few places of a destination, and one of those for all elsewhere.

        Mailboxes and each program have places of their own, so that nobody waits for them.
        """
        few = _SLOTS.get(route.key[0], _DESTINATION_SLOTS)
        slots = self._destinations.setdefault(route.key, Slots(self._loop, few))
        self._under_way[route.key] += 1
        try:
            async with slots, contextlib.nullcontext() if route.local else self._remote_slots:
                yield
        finally:
            self._under_way[route.key] -= 1
            if not self._under_way[route.key]:
                del self._under_way[route.key], self._destinations[route.key]

    async def _settle(self, item: Item) -> bool:
        """Report failures, then write down what is left, or remove; true when it is over.

        What waits too long fails (RFC 5321, 4.5.4.1).
        If the disk refuses, nothing is forgotten: it is tried again in a minute.
        """
        self._count_wait(item)
        if item.waited >= self._settings.give_up_after:
            after = duration_text(self._settings.give_up_after)
            self._give_up(item, f"not delivered within {after}", "4.4.7")
        try:
            await self._report(item)
            if not any(recipient.is_open for recipient in item.recipients):
                await self._remove_file(item)
                self._log.event(Events.DONE, id=item.id, attempts=item.attempts)
                return True
            if item.waited >= _DELAY_NOTICE_SECONDS and not item.delay_reported:
                await self._report_delay(item)
            self._postpone(item, self._pause(item.attempts))
            await self._write_down(item)
        except OSError as error:
            self._log.error("queue", f"{item.id} cannot be written: {reason(error)}")
            self._postpone(item, _PAUSES[0])
            if not os.path.exists(item.message.path):
                self._log.event(Events.LOST, id=item.id, text="its file is gone from the queue")
                return True
        return False

    async def _remove_file(self, item: Item) -> None:
        """Remove the file of a message that is done with. Raises OSError.

        If that fails, the results are written down, or it would be delivered again at the
        next start.
        """
        try:
            await self._disk.remove(item.message.path)
        except OSError:
            await self._write_progress(item)
            raise

    def _count_wait(self, item: Item) -> None:
        now = self._loop.clock.monotonic()
        item.waited += now - item.since
        item.since = now

    def _postpone(self, item: Item, seconds: float) -> None:
        if item.again:
            item.again, seconds = False, 0.0
        item.next_attempt = self._loop.clock.time() + seconds
        item.due = self._loop.clock.monotonic() + seconds
        self._log.event(Events.NEXT_ATTEMPT, id=item.id, pause=duration_text(seconds))

    def _pause(self, attempts: int) -> float:
        return _PAUSES[min(attempts, len(_PAUSES)) - 1] + self._random() * _JITTER

    def _give_up(self, item: Item, why: str, status: str) -> None:
        for recipient in item.recipients:
            if recipient.is_open:
                text = f"{why}; the last attempt: {recipient.result.text}"
                recipient.result = recipient.result._replace(
                    state=State.FAILED, status=status, text=text
                )  # fmt: skip
                to = recipient.destination.value
                self._log.event(Events.GIVEN_UP, id=item.id, to=to, status=status, text=why)
                self._on_result(item, recipient)

    async def _write_down(self, item: Item) -> None:
        path, line = item.message.path, item.journal_line(self._loop.clock.time())
        target = os.path.join(self._settings.directory, Place.CUR, os.path.basename(path))

        def write() -> None:
            append_synced(path, line)
            if path != target:
                os.rename(path, target)  # need not be synced: the journal is in the file

        await self._loop.work(write)
        # a message that waits is read from the disk again, not kept in memory
        item.message = item.message._replace(path=target, data=None)

    def _sender_for(self, item: Item, recipient: Recipient) -> str:
        """Return the reverse-path, rewritten if we forward for somebody else.

        A server elsewhere would take mail from us under a foreign name for a forgery
        (SPF, RFC 7208), so the name becomes one of ours that still holds the old one.
        """
        sender = item.envelope.sender
        local, domain = split_address(sender)
        user, own_domain = split_address(recipient.original)
        if recipient.destination.via and recipient.destination.value == recipient.original:
            return sender  # only on its way to the host that has the mailbox
        foreign = sender and not self._is_local(domain)
        leaves = not self._couriers.route(recipient.destination).local
        if not (foreign and leaves and self._is_local(own_domain)):
            return sender
        separator = self._settings.suffix_separator
        old = f"{local_part_content(local)}={domain}"
        begin = f"{local_part_content(user)}{separator}fwd_from="
        # RFC 5321, 4.5.3.1.1: what is too long becomes a hash, and without room for one
        # the alias itself; a notification to it finds its way by the alias in any case
        for content in (begin + old, begin + short_hash(old), local_part_content(user)):
            rewritten = local_part(content)
            if len(rewritten.encode()) <= LOCAL_PART_LIMIT:
                break
        return f"{rewritten}@{own_domain}"

    async def _report(self, item: Item) -> None:
        """Tell the sender of failures, and of successes if that was asked for.

        Raises OSError.
        """
        ended = [
            recipient
            for recipient in item.recipients
            if not recipient.is_open and not recipient.reported
        ]
        failed = [recipient for recipient in ended if recipient.state == State.FAILED]
        wanted = [recipient for recipient in failed if recipient.dsn.wants(Notify.FAILURE)]
        await self._notify(item, Action.FAILED, wanted)
        for recipient in failed:  # or they are told again if the next report fails
            recipient.reported = True
        if failed and not item.envelope.sender:
            self._log.event(Events.NOT_NOTIFIED, id=item.id, text="the sender is <>")
        sent = [
            recipient
            for recipient in ended
            if recipient.state == State.SENT
            and not recipient.result.passed_on
            and recipient.dsn.wants(Notify.SUCCESS)
        ]
        for action, local in ((Action.DELIVERED, True), (Action.RELAYED, False)):
            told = [
                recipient
                for recipient in sent
                if self._couriers.route(recipient.destination, item.attempts).local == local
            ]
            await self._notify(item, action, told)
            for recipient in told:
                recipient.reported = True

    async def _report_delay(self, item: Item) -> None:
        """Tell the sender once that some recipients must wait. Raises OSError."""
        waiting = [
            recipient
            for recipient in item.recipients
            if recipient.is_open and recipient.dsn.wants(Notify.DELAY)
        ]
        if waiting and not await self._loop.work(lambda: is_automatic(item.message.header())):
            await self._notify(item, Action.DELAYED, waiting)
        item.delay_reported = True

    async def _notify(self, item: Item, action: Action, recipients: Sequence[Recipient]) -> None:
        """Queue a notification about `recipients`, if there are any. Raises OSError."""
        if not recipients or not item.envelope.sender:
            return
        now = self._loop.clock.time()
        data, utf8 = notification(item, action, recipients, settings=self._settings, now=now)
        header, _, body = data.partition(b"\r\n\r\n")
        prefix = await self._sign(header + b"\r\n", lambda: [body])
        try:
            final_recipients = await self._final_recipients_of(item.envelope.sender)
        except TemporaryFailure as error:  # it is tried again with the item
            raise OSError(errno.EAGAIN, f"the notification must wait: {error}") from error
        draft = self._new_draft()
        try:
            await draft.add(data)
            draft.complete()
        except BaseException:
            draft.discard()
            raise
        envelope = Envelope(
            draft.id,
            sender="",  # RFC 3464, 2
            final_recipients=final_recipients,
            received=now,
            prefix=prefix,
            smtputf8=utf8,
            eight_bit=draft.eight_bit,
            require_tls=item.envelope.require_tls,
        )
        self._log.count(Metrics.NOTIFICATIONS, action)
        try:
            await self.accept(draft, envelope, {"about": item.id, "kind": action})
        except QueueFull as error:
            raise OSError(errno.ENOSPC, "the notification cannot be stored") from error

    async def _final_recipients_of(self, address: str) -> tuple[FinalRecipient, ...]:
        try:
            return tuple(
                FinalRecipient(destination, address) for destination in await self.expand(address)
            )
        except (NoSuchUser, AliasLoop):
            # it fails in its delivery, where the mail log says why
            return (FinalRecipient(Destination(DestinationKind.ADDRESS, address), address),)


# ======================================================================================
# ROOM: RATE LIMITS
#
# How much one client, or one user, may ask for in a minute or at a time, so that nobody
# uses us up and a password that was found out does little harm before it is noticed.
#
# - A client is an IPv4 address, or the first 64 bits of an IPv6 address: that much anybody
#   at home has to himself.
# - Over a limit the answer is a temporary one, so a server that is only busy loses nothing.
# - Clients on this machine are exempt, unless the configuration says otherwise.
# - A login that fails is answered later and later, by address and by user; an address that
#   has failed too often in an hour is sent away. A user is never locked out by others.
# ======================================================================================

_METER_LIMIT = 20_000  # keys of one meter
_LOGIN_MEMORY = 3600.0  # seconds a failed login is remembered
_LOGIN_DELAY_LIMIT = 20.0


def client_of(peer: str) -> str:
    """Return what counts as one client: an IPv4 address, or a /64 of IPv6."""
    if ":" not in peer:
        return peer
    packed = socket.inet_pton(socket.AF_INET6, peer)
    return socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8)) + "/64"


def is_loopback(peer: str) -> bool:
    """Tell whether `peer`, an IP address or "local", is on this machine."""
    return peer in ("local", "::1") or peer.startswith("127.")


class RateExceeded(TemporaryFailure):
    """A client or a user has gone over `limit`, and may go on later (RFC 3463, 4.7.0)."""

    def __init__(self, text: str, limit: str) -> None:
        super().__init__(text, "4.7.0")
        self.limit = limit


class _Meter:
    """Lets through so many a minute for each key, evenly; at first that many at once."""

    def __init__(self, clock: Clock, per_minute: int) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._levels: dict[str, tuple[float, float]] = {}  # what was taken, and when

    def takes(self, key: str) -> bool:
        """Count one more of `key`; false if that is too many."""
        if not self._per_minute:
            return True
        now = self._clock.monotonic()
        level, since = self._levels.get(key, (0.0, now))
        level = max(0.0, level - (now - since) * self._per_minute / 60.0)
        if level + 1 > self._per_minute:
            return False
        if len(self._levels) >= _METER_LIMIT:
            self._forget_idle(now)
        self._levels[key] = (level + 1, now)
        return True

    def _forget_idle(self, now: float) -> None:
        self._levels = {k: v for k, v in self._levels.items() if now - v[1] < 60.0}
        if len(self._levels) >= _METER_LIMIT:
            self._levels.clear()  # better too lenient than out of memory


class _Failures:
    """How often something has failed for each key within the last hour."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: dict[str, list[float]] = {}

    def add(self, key: str) -> None:
        if len(self._times) >= _METER_LIMIT:
            self._times.clear()
        times = self._times.setdefault(key, [])
        times.append(self._clock.monotonic())
        del times[:-100]

    def count(self, key: str) -> int:
        since = self._clock.monotonic() - _LOGIN_MEMORY
        times = [time for time in self._times.get(key, ()) if time > since]
        if times:
            self._times[key] = times
        else:
            self._times.pop(key, None)
        return len(times)

    def forget(self, key: str) -> None:
        self._times.pop(key, None)


class Limits:
    """Counts what clients and users do. A refusal is a TemporaryFailure with its reason."""

    def __init__(self, clock: Clock, config: Config) -> None:
        self._config = config
        self._connections: collections.Counter[str] = collections.Counter()
        self._connection_rate = _Meter(clock, config.max_connections_per_minute)
        self._failed_logins = _Failures(clock)
        self._messages = _Meter(clock, config.max_messages_per_minute)
        self._recipients = _Meter(clock, config.max_recipients_per_minute)
        self._user_messages = _Meter(clock, config.max_user_messages_per_minute)
        self._user_recipients = _Meter(clock, config.max_user_recipients_per_minute)

    def is_exempt(self, peer: str) -> bool:
        """Tell whether `peer`, an IP address, is under no limit."""
        trusted = is_loopback(peer) and not self._config.limit_loopback
        return trusted or self.is_relay(peer)

    def is_relay(self, peer: str) -> bool:
        """Tell whether `peer` is a host of the operator that passes mail on to us."""
        if not self._config.trusted_relay or not is_ip_address(peer):
            return False
        import ipaddress  # only if it is set

        address = ipaddress.ip_address(peer)
        networks = map(ipaddress.ip_network, self._config.trusted_relay)
        return any(address in network for network in networks)

    @contextlib.contextmanager
    def connection(self, peer: str) -> Iterator[None]:
        """Count a connection for as long as it lasts. Raises RateExceeded."""
        client, limit = client_of(peer), self._config.max_connections_per_address
        if not self.is_exempt(peer):
            if limit and self._connections[client] >= limit:
                raise RateExceeded(f"more than {limit} connections from {client}", "connections")
            if not self._connection_rate.takes(client):
                raise RateExceeded(f"too many connections a minute from {client}", "connections")
        self._connections[client] += 1
        try:
            yield
        finally:
            self._connections[client] -= 1
            if not self._connections[client]:
                del self._connections[client]

    def is_connected(self, peer: str) -> bool:
        """Tell whether the client has a connection already."""
        return self._connections[client_of(peer)] > 0

    def message(self, peer: str, user: str) -> None:
        """Count a message. Raises RateExceeded."""
        self._take(peer, user, self._messages, self._user_messages, what="messages")

    def recipient(self, peer: str, user: str) -> None:
        """Count a recipient. Raises RateExceeded."""
        self._take(peer, user, self._recipients, self._user_recipients, what="recipients")

    def _take(self, peer: str, user: str, of_client: _Meter, of_user: _Meter, what: str) -> None:
        if self.is_exempt(peer):
            return
        if user:
            if not of_user.takes(user):
                raise RateExceeded(f"too many {what} a minute for {user}", what)
        elif not of_client.takes(client_of(peer)):
            raise RateExceeded(f"too many {what} a minute from {client_of(peer)}", what)

    def check_login(self, peer: str) -> None:
        """Raises RateExceeded if the address has failed too often."""
        limit = self._config.max_failed_logins
        failed = self._failed_logins.count(client_of(peer))
        if limit and failed >= limit and not self.is_exempt(peer):
            text = "too many failed logins from your address; wait an hour"
            raise RateExceeded(text, "logins")

    def login_failed(self, peer: str, user: str, known: bool = True) -> float:
        """Count a failed login; return how many seconds the answer should be late.

        If `user` is not `known`, it does not bring the client nearer to being sent away: the
        user may have been added a moment ago. The answer is late all the same.
        """
        if self.is_exempt(peer):
            return 0.0
        keys = (f"client {client_of(peer)}", self._user_key(user))
        for key in (*keys, client_of(peer)) if known else keys:
            self._failed_logins.add(key)
        worst = max(map(self._failed_logins.count, keys))
        return min(0.5 * 2.0 ** min(worst - 1, 10), _LOGIN_DELAY_LIMIT)

    def login_succeeded(self, user: str) -> None:
        """Forget the failures of a user."""
        self._failed_logins.forget(self._user_key(user))

    @staticmethod
    def _user_key(user: str) -> str:
        """Return the same for all the ways to write a user's name."""
        try:
            return f"user {normalize_address(user)[:100]}"
        except ValueError:
            return f"user {user[:100]}"


# ======================================================================================
# ROOM: SESSION
#
# The server's side of a connection: the dialogue, and nothing of what becomes of mail. That
# a `Receiver` decides, one object with few methods, which the session asks; a third kind of
# server is a third receiver.
#
# - A session lives as long as the connection, a transaction as long as one message; RSET,
#   EHLO and STARTTLS throw the transaction away.
# - Where the dialogue stands is derived from the facts (`Phase`), not kept beside them.
# - The command table at the end says in which phases a command may come. An action returns
#   its reply or raises; `Session._reply_to` alone turns failures into replies, and
#   `Session.say` alone writes them.
# - A message is answered with 250 only when its receiver has it, safe.
# - A message that is refused while it comes in is still read to its end, or its rest
#   would be taken for commands.
#
# Who may send what to whom belongs to RECEPTION; what a command looks like, to SMTP SYNTAX.
# ======================================================================================

ERROR_LIMIT = 3  # error replies before the connection is closed
RECIPIENT_ERROR_LIMIT = 20  # unknown recipients before that
CONNECTION_SECONDS = 20 * 60.0
COMMAND_SECONDS = 60.0

_MAIL_PARAMETERS = {"SIZE", "BODY", "SMTPUTF8", "AUTH", "REQUIRETLS", "RET", "ENVID"}
_NEEDS_TLS = "Encryption required for requested authentication mechanism: say STARTTLS first"
_ENVID_LIMIT = 100  # octets; RFC 3461, 4.4
_ORCPT_LIMIT = 500  # octets; RFC 3461, 4.2
_PACE_SECONDS = 60.0  # so long, a sender may be as slow as it likes
_CHALLENGE_LIMIT = 12_288  # octets of an AUTH answer; RFC 4954, 4
_DIALOGUE_RECIPIENTS = 10  # of a transaction, that the status page shows
_SHUTTING_DOWN = Reply(
    421, "4.3.2", "The server is shutting down, closing connection; try again later", close=True
)
_HTTP_VERBS = frozenset(
    ("GET", "POST", "PUT", "HEAD", "CONNECT", "OPTIONS", "DELETE", "PATCH", "TRACE")
)


class Port(NamedTuple):
    """A kind of port. On submission ports (RFC 6409) nobody sends without logging in."""

    name: str
    submission: bool
    implicit_tls: bool


SMTP_PORT = Port("smtp", submission=False, implicit_tls=False)
SUBMISSION_PORT = Port("submission", submission=True, implicit_tls=False)
SUBMISSION_TLS_PORT = Port("submission over TLS", submission=True, implicit_tls=True)


class ServerContext:
    """What all sessions of a server share. The daemon replaces `tls_context` and `closing`.

    `size_limit` is in octets. A message may come in as slowly as `min_octets_per_second`;
    0 means as slowly as it likes.
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        limits: Limits,
        *,
        hostname: str,
        size_limit: int,
        tls_context: ssl.SSLContext | None,
        min_octets_per_second: int = 0,
        dialogue_lines: int = DIALOGUE_LINES,
    ) -> None:
        self.loop = loop
        self.log = log
        self.limits = limits
        self.hostname = hostname
        self.size_limit = size_limit
        self.tls_context = tls_context
        self.min_octets_per_second = min_octets_per_second
        self.dialogue_lines = dialogue_lines
        self.closing = False

    def new_dialogue(self, port: Port, peer: str) -> Dialogue:
        """Return the notes of a session, which `record` shows from now on."""
        now = self.loop.clock.time()
        dialogue = Dialogue(port.name, peer, now, self.dialogue_lines)
        self.log.dialogues.append(dialogue)
        return dialogue

    def too_big(self) -> PermanentFailure:
        """Return what says that a message is above the limit (RFC 1870, 6.1)."""
        size = self.size_limit
        mega = f"{size // 1024**2} MB" if size % 1024**2 == 0 else f"{size} octets"
        return PermanentFailure(f"Message size exceeds fixed limit: {mega}", "5.3.4")


class ClientInfo(NamedTuple):
    """Who is at the other end, as far as is known by now.

    `user` is the address of who has logged in, `tls` names version and cipher; each is "" if
    there is none. `hello` is what HELO or EHLO (then it is `extended`) has said.
    """

    dialogue: Dialogue
    port: Port
    peer: str
    hello: str
    extended: bool
    user: str
    tls: str

    def check_login(self) -> None:
        """Raises Refused on a submission port (RFC 6409, 4.3) if nobody has logged in."""
        if self.port.submission and not self.user:
            raise Refused(
                Reply(530, "5.7.0", "Authentication required: this port is for our users")
            )


class Transaction:
    """One message on its way in: its envelope so far, and what was received of it."""

    def __init__(self, path: Path, spf: Spf) -> None:
        parameters = path.parameters
        self.path = path
        self.sender = path.address
        self.smtputf8 = "SMTPUTF8" in parameters
        self.require_tls = "REQUIRETLS" in parameters
        self.ret = parameters.get("RET", "").upper()
        self.envid = parameters.get("ENVID", "")
        self.spf = spf
        self.recipients: list[str] = []  # as they were written, one for each RCPT
        self.final_recipients: dict[tuple[Destination, str], FinalRecipient] = {}
        self.incoming: Incoming | None = None
        self.failure: Exception | None = None  # why the message is only read to be thrown away
        self.held = b""  # a CR at the end of a chunk, which may belong to a CRLF
        self.results: dict[str, str] = {}  # of the checks, as fields of the mail log

    def add(self, path: Path, recipients: Iterable[FinalRecipient]) -> None:
        """Add what RCPT has named."""
        self.recipients.append(path.written)
        for recipient in recipients:
            self.final_recipients[recipient.destination, recipient.original] = recipient

    def fail(self, failure: Exception) -> None:
        """Forget what came of the message; what still comes is read and thrown away."""
        self.failure = failure
        self.discard()
        self.incoming = None

    def discard(self) -> None:
        """Forget what has come of the message."""
        if self.incoming is not None:
            self.incoming.discard()

    def originals(self) -> list[str]:
        """Return the addresses of the recipients before aliases, each once."""
        return list(dict.fromkeys(original for _, original in self.final_recipients))

    def fields(self) -> dict[str, object]:
        """Return the envelope and the results, as fields of the mail log."""
        return {"from_": self.sender, "to": self.originals(), **self.results}


class Incoming(Protocol):
    """Where the octets of a message go as they arrive."""

    size: int

    async def add(self, piece: bytes) -> None:
        """Take the next octets. Raises PermanentFailure, TemporaryFailure."""

    def discard(self) -> None:
        """Forget them all; nothing if the message was accepted."""


class Login(NamedTuple):
    """The address of who logs in, or None; and how many seconds the answer takes at least.

    The time must not tell whether there is such a user.
    """

    address: str | None
    seconds: float = 0.0


class Receiver(Protocol):
    """What a server does with mail. Methods refuse by Refused or one of our failures."""

    def extensions(self, client: ClientInfo) -> list[str]:
        """Return what EHLO offers beyond what the dialogue itself can do."""

    async def authenticate(self, client: ClientInfo, login: str, password: bytes) -> Login:
        """Tell who logs in. A TemporaryFailure ends the connection."""

    async def check_sender(self, client: ClientInfo, path: Path) -> Spf:
        """Return what is known of the sender that MAIL names."""

    async def resolve(
        self, client: ClientInfo, path: Path, dsn: DsnParameters
    ) -> Sequence[FinalRecipient]:
        """Return the final recipients of what RCPT names."""

    def incoming(self, transaction: Transaction) -> Incoming:
        """Return where the octets of the message are to go."""

    async def accept(self, client: ClientInfo, transaction: Transaction) -> Reply:
        """Take over the complete message. Once this has returned, it is safe."""


class Phase(enum.Enum):
    """Where a dialogue stands; the value answers a command that comes too early."""

    CONNECTED = "say EHLO first"
    GREETED = "say MAIL first"
    MAIL = "say RCPT first, and have a recipient accepted"
    RECIPIENTS = "a transaction is under way"
    CHUNKS = "finish the message with BDAT … LAST, or say RSET"

    @property
    def refusal(self) -> Refused:
        """What refuses a command in this phase (RFC 5321, 4.2.4)."""
        return Refused(Reply(503, "5.5.1", f"Bad sequence of commands: {self.value}"))


class _LoginDialogue:
    """Gets user and password from a client that said AUTH (RFC 4954). Raises Refused."""

    def __init__(self, ask: Callable[[str], Awaitable[bytes]]) -> None:
        self._ask = ask

    async def plain(self, initial: str) -> tuple[str, bytes]:
        """RFC 4616: [authzid] NUL authcid NUL passwd."""
        answer = self._decode(initial) if initial else await self._challenge("")
        parts = answer.split(b"\0")
        if len(parts) != 3:
            raise Refused(Reply(501, "5.5.2", "expected identity, user and password"))
        identity, user, password = parts
        if identity not in (b"", user):
            raise Refused(Reply(535, "5.7.8", "nobody may log in here for somebody else"))
        return self._user_name(user), password

    async def login(self, initial: str) -> tuple[str, bytes]:
        """An old mechanism that Outlook and others still use: two prompts, in base64."""
        user = self._decode(initial) if initial else await self._challenge("VXNlcm5hbWU6")
        return self._user_name(user), await self._challenge("UGFzc3dvcmQ6")

    async def _challenge(self, text: str) -> bytes:
        answer = await self._ask(text)
        if answer == b"*":
            raise Refused(Reply(501, "5.7.0", "Authentication cancelled"))
        return self._decode(answer.decode("latin-1"))

    @staticmethod
    def _decode(text: str) -> bytes:
        try:
            return b"" if text == "=" else base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise Refused(Reply(501, "5.5.2", "expected base64")) from None

    @staticmethod
    def _user_name(octets: bytes) -> str:
        try:
            return octets.decode()
        except UnicodeDecodeError:
            raise Refused(Reply(501, "5.5.2", "expected a user name in UTF-8")) from None


class _Pace:
    """Raises Expired if a message comes in more slowly than so many octets a second."""

    def __init__(self, clock: Clock, least: int) -> None:
        self._clock = clock
        self._least = least
        self._start = clock.monotonic()
        self._octets = 0

    def check(self, octets: int) -> None:
        self._octets += octets
        elapsed = self._clock.monotonic() - self._start
        if elapsed > _PACE_SECONDS and self._octets < self._least * elapsed:
            raise Expired("the message comes in too slowly")


class _MessageReader:
    """Reads a message off the wire, to where its receiver wants it."""

    def __init__(self, context: ServerContext, receiver: Receiver, stream: Stream) -> None:
        self._context = context
        self._receiver = receiver
        self._stream = stream
        self.reading = False  # what comes next is no command

    def open(self, transaction: Transaction) -> None:
        """Have a place for the message, unless it has failed already. Raises as `incoming`."""
        if transaction.incoming is None and transaction.failure is None:
            transaction.incoming = self._receiver.incoming(transaction)

    async def read_data(self, transaction: Transaction) -> None:
        """Read up to the final dot. Raises Disconnected, Expired, BareNewline."""
        decoder = DataDecoder()
        pace = self._pace()
        self.reading = True
        while not decoder.done:
            piece = await self._piece(CHUNK)
            pace.check(len(piece))
            await self._take(transaction, decoder.feed(piece))
        self.reading = False
        self._stream.unread(decoder.rest)

    async def read_chunk(self, left: int, transaction: Transaction | None) -> None:
        """Read so many octets (RFC 3030); without a transaction, only to be rid of them."""
        pace = self._pace()
        self.reading = True
        while left:
            piece = await self._piece(min(CHUNK, left))
            pace.check(len(piece))
            left -= len(piece)
            if transaction is not None:
                piece = transaction.held + piece
                transaction.held = b"\r" if piece.endswith(b"\r") else b""
                piece = piece[: len(piece) - len(transaction.held)]
                check_newlines(piece)
                await self._take(transaction, piece)
        self.reading = False

    async def _piece(self, limit: int) -> bytes:
        with self._context.loop.deadline(TRANSFER_SECONDS):
            return await self._stream.read_some(limit)

    def _pace(self) -> _Pace:
        return _Pace(self._context.loop.clock, self._context.min_octets_per_second)

    async def _take(self, transaction: Transaction, piece: bytes) -> None:
        """Pass the octets on; once that has failed, throw away what still comes."""
        incoming = transaction.incoming
        if incoming is None:
            return
        try:
            if incoming.size + len(piece) > self._context.size_limit:
                raise self._context.too_big()
            await incoming.add(piece)
        except (PermanentFailure, TemporaryFailure) as error:
            transaction.fail(error)
        except OSError as error:
            self._context.log.error("queue", f"a message cannot be stored: {reason(error)}")
            transaction.fail(Refused(Reply(452, "4.3.1", "the message cannot be stored now")))


_Act = Callable[[], Awaitable[Reply | None]]


class Hook(Protocol):
    """Stands between a client and a session, for fault injection.

    It is called at each `stage`: "connect", a verb with its argument, or "message", when that
    is complete. `act` does what is to be done there; a hook calls it, or does otherwise. It
    returns the reply, or None if it has been said.
    """

    async def __call__(
        self, session: Session, stage: str, argument: str, act: _Act
    ) -> Reply | None: ...


class Session:
    """One connection, from the greeting to its end."""

    def __init__(
        self,
        context: ServerContext,
        receiver: Receiver,
        stream: Stream,
        *,
        port: Port,
        peer: str,
        hook: Hook | None = None,
    ) -> None:
        self.id = new_id()
        self.peer = peer
        self.idle = False  # waiting for a command, so it may be ended at any time
        self.context = context
        self.loop = context.loop
        self.stream = stream
        self.port = port
        self.tls_context = context.tls_context
        self.dialogue = Dialogue("", "", 0.0)
        self.transaction: Transaction | None = None
        self._receiver = receiver
        self._hook = hook
        self._reader = _MessageReader(context, receiver, stream)
        self._hello = ""
        self._extended = False
        self._user = ""  # who has logged in, as an address
        self._client: ClientInfo | None = None  # all that, until it changes
        self._verb = ""
        self._closing = False
        self._errors = 0
        self._unknown_recipients = 0
        self._about: dict[str, object] = {}  # the envelope, for the log when it is refused
        self._limit = ""  # which the command has gone over

    async def run(self) -> None:
        """Hold the dialogue; returns when the connection is closed."""
        self.context.log.count(Metrics.CONNECTIONS, self.port.name)
        self.dialogue = self.context.new_dialogue(self.port, self.peer)
        try:
            await self._converse()
        except (Disconnected, TLSFailed) as error:
            if self.transaction is not None or isinstance(error, TLSFailed):
                self.event(Events.ENDED_EARLY, text=error)
        except RateExceeded as error:  # before the greeting; later ones answer a command
            self.context.log.count(Metrics.LIMITS, "connections")
            self.event(
                Events.REJECTED, limit=error.limit, code=421, status=error.status, text=error
            )
            self.say(Reply(421, error.status, f"{error}; try again later", close=True))
        except Cancelled:
            self.say(_SHUTTING_DOWN)
            raise
        except Exception as error:
            reply = self._reply_to(error)
            self.say(reply._replace(code=421, close=True))
        finally:
            self._reset()
            self.dialogue.open = False
            if not self.dialogue.client_spoke:  # a health check, most often
                with contextlib.suppress(ValueError):
                    self.context.log.dialogues.remove(self.dialogue)
            await self.stream.finish()

    @property
    def client(self) -> ClientInfo:
        """Who is at the other end, as far as is known now."""
        if self._client is None:
            self._client = ClientInfo(
                self.dialogue,
                self.port,
                peer=self.peer,
                hello=self._hello,
                extended=self._extended,
                user=self._user,
                tls=self.stream.tls_text,
            )
        return self._client

    @property
    def phase(self) -> Phase:
        """Where the dialogue stands now."""
        if not self._hello:
            return Phase.CONNECTED
        transaction = self.transaction
        if transaction is None:
            return Phase.GREETED
        if transaction.incoming is not None or transaction.failure is not None:
            return Phase.CHUNKS
        return Phase.RECIPIENTS if transaction.recipients else Phase.MAIL

    # --- the dialogue ---

    async def _converse(self) -> None:
        """Raises Disconnected, TLSFailed, Expired; and what says that there are too many."""
        limits = self.context.limits
        with self.loop.deadline(CONNECTION_SECONDS), limits.connection(self.peer):
            greeting = await self._staged("connect", "", self._greet)
            if greeting is not None:
                self.say(greeting)
            while not self._closing:
                reply = await self._next_reply()
                if reply is not None:
                    self.say(self._count_error(reply))
                await self.stream.be_fair()
                if self.context.closing and not self._closing:
                    self.say(_SHUTTING_DOWN)

    async def _greet(self) -> Reply:
        if self.port.implicit_tls:
            if self.tls_context is None:
                raise TLSFailed("there is no certificate, so no TLS on this port")
            await self._start_tls(self.tls_context)
        return Reply(220, "", f"{self.context.hostname} ESMTP chasquid")

    async def _next_reply(self) -> Reply | None:
        """Obey one command; None if it has been answered. Raises Disconnected, TLSFailed."""
        self._verb = self._limit = ""
        try:
            self.idle = True
            with self.loop.deadline(COMMAND_SECONDS):
                line = await self.stream.read_line()
            self.idle = False
            return await self._execute(line)
        except (Disconnected, TLSFailed, Expired):
            raise
        except Exception as error:
            return self._reply_to(error)
        finally:
            self.idle = False

    async def _execute(self, line: bytes) -> Reply | None:
        verb, argument = parse_command(line)
        self._verb = verb
        said = "…"  # what is no command may be a password, or a line of a message
        if verb in _COMMANDS:
            said = "AUTH …" if verb == "AUTH" else f"{verb} {argument}"
        self.dialogue.add("C", said)
        if verb in _HTTP_VERBS:
            text = "this is a mail server and speaks no HTTP"
            raise Refused(Reply(502, "5.7.0", text, close=True))
        command = _COMMANDS.get(verb)
        if command is None:
            raise Refused(Reply(500, "5.5.1", "Command not recognized"))
        self.context.log.count(Metrics.COMMANDS, verb)
        if self.phase not in command.phases:
            too_late = self.phase is Phase.MAIL and Phase.GREETED in command.phases  # MAIL, AUTH
            raise (Phase.RECIPIENTS if too_late else self.phase).refusal
        if command.argument == "none" and argument:
            raise Refused(Reply(501, "5.5.4", f"{verb} takes no argument"))
        if command.argument == "required" and not argument:
            raise Refused(Reply(501, "5.5.4", f"expected {command.help}"))
        return await self._staged(verb, argument, lambda: command.action(self, argument))

    def _staged(self, stage: str, argument: str, act: _Act) -> Awaitable[Reply | None]:
        """Return what `act` does at this stage, or what stands between us and the client."""
        return act() if self._hook is None else self._hook(self, stage, argument, act)

    def _reply_to(self, error: Exception) -> Reply:
        """Return the reply that a failure becomes (RFC 5321, 4.2 and 4.3.2).

        A fault of ours is logged and counted. The client may try again; but not in this
        connection if it broke amid a message, for then we do not know where a command begins.
        """
        if isinstance(error, Refused):
            return error.reply
        if isinstance(error, LineTooLong):
            return Reply(500, "5.5.2", str(error))
        if isinstance(error, BareNewline):
            return Reply(521, "5.5.2", f"{error}; closing the connection", close=True)
        if isinstance(error, Expired):
            return Reply(421, "4.4.2", "Timeout exceeded, closing connection", close=True)
        if isinstance(error, RateExceeded):
            self._limit = error.limit
        if isinstance(error, TemporaryFailure) and self._verb == "AUTH":
            return Reply(454, error.status, str(error), close=True)  # RFC 4954, 4
        if isinstance(error, RateExceeded):
            return Reply(450, error.status, str(error))
        if isinstance(error, TemporaryFailure):
            return Reply(451, error.status, str(error))
        if isinstance(error, PermanentFailure):
            code = 552 if error.status == "5.3.4" else 554  # RFC 3463, 3.4: too big
            return Reply(code, error.status, str(error))
        self.context.log.crash(f"{self._verb or 'the start'} in session {self.id}", error)
        text = "Local error in processing: a check has failed by a fault of ours"
        return Reply(451, "4.3.0", text, close=self._reader.reading)

    def _count_error(self, reply: Reply) -> Reply:
        """Close the connection after some errors; a client of another protocol makes many.

        Unknown recipients count apart, and those above the limit not at all: a server that
        sends to a list with some dead addresses must get to its DATA.
        """
        if not reply.is_error:
            return reply
        self.context.log.count(Metrics.REJECTIONS, str(reply.code))
        self.dialogue.outcome = f"refused: {reply}"
        about = self._about if self._verb in ("MAIL", "RCPT", "DATA", "BDAT") else {}
        self.event(
            Events.REJECTED,
            limit=self._limit,
            code=reply.code,
            status=reply.status,
            text=reply.text,
            **about,
        )
        if reply.close or reply.status == "4.5.3" or (self._verb == "RCPT" and reply.code == 450):
            return reply  # who sends much must still get to DATA with what was accepted
        if self._verb == "RCPT" and reply.status == "5.1.1":
            self._unknown_recipients += 1
        else:
            self._errors += 1
        if self._errors < ERROR_LIMIT and self._unknown_recipients < RECIPIENT_ERROR_LIMIT:
            return reply
        self.event(Events.SENT_AWAY, errors=self._errors + self._unknown_recipients)
        text = f"Too many errors, closing connection; the last one: {reply.text}"
        return Reply(421, "4.7.0", text, close=True)

    def say(self, reply: Reply) -> None:
        """Write a reply, which is sent with the next wait for input, and note it."""
        self._closing = self._closing or reply.close
        self.dialogue.add("S", reply)
        self.stream.write(reply.encode())

    async def discard_chunk(self, size: int) -> None:
        """Read so many octets, which are no command, to be rid of them."""
        await self._reader.read_chunk(size, None)

    def event(self, event: LogEvent, **fields: object) -> None:
        """Write a line to the mail log, with who is at the other end."""
        self.context.log.event(event, id=self.id, peer=self.peer, port=self.port.name, **fields)

    def _reset(self) -> None:
        if self.transaction is not None:
            self.transaction.discard()
            self.transaction = None

    # --- HELO, EHLO, STARTTLS ---

    async def _helo(self, argument: str) -> Reply:
        self._greeted(argument, extended=False)
        return Reply(250, "", self.context.hostname)

    async def _ehlo(self, argument: str) -> Reply:
        self._greeted(argument, extended=True)
        lines = [f"{self.context.hostname} greets {self._hello}", *self._keywords()]
        return Reply(250, "", "\n".join(lines))

    def _keywords(self) -> list[str]:
        """Return what we offer now, each with its parameters; RFC 5321, 4.1.1.1."""
        keywords = [
            "PIPELINING",
            "8BITMIME",
            "SMTPUTF8",
            f"SIZE {self.context.size_limit}",
            "ENHANCEDSTATUSCODES",
            "CHUNKING",
            f"LIMITS RCPTMAX={RECIPIENT_LIMIT}",
            "HELP",
            *self._receiver.extensions(self.client),
        ]
        if self.stream.tls is None and self.tls_context is not None:
            keywords.append("STARTTLS")
        return keywords

    def _greeted(self, argument: str, extended: bool) -> None:
        name = argument.split(" ")[0]
        if not is_host_name(name):
            text = "expected the name of your host, or its address in brackets"
            raise Refused(Reply(501, "5.5.2", text))
        self._reset()
        self._hello = name
        self._extended = extended
        self._client = None

    async def _starttls(self, argument: str) -> None:
        if self.stream.tls is not None:
            raise Refused(Reply(503, "5.5.1", "Bad sequence of commands: TLS is on already"))
        if self.tls_context is None:
            text = "TLS not available: there is no certificate"
            raise Refused(Reply(454, "4.7.0", text))
        self.say(Reply(220, "2.0.0", "Ready to start TLS"))
        await self._start_tls(self.tls_context)

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        """Do the handshake and forget what was said before it (RFC 3207, 4.2)."""
        with self.loop.deadline(COMMAND_SECONDS):
            await self.stream.start_tls(context, server_side=True)
        self._reset()
        self._hello = ""
        self._extended = False
        self._client = None

    # --- AUTH ---

    async def _auth(self, argument: str) -> Reply:
        offered = [keyword.split(" ")[0] for keyword in self._receiver.extensions(self.client)]
        if "AUTH" not in offered:
            raise Refused(Reply(538, "5.7.11", _NEEDS_TLS))
        if self._user:
            raise Refused(Reply(503, "5.5.1", "Bad sequence of commands: you have logged in"))
        mechanism, _, initial = argument.partition(" ")
        dialogue = _LoginDialogue(self._challenge)
        if mechanism.upper() == "PLAIN":
            user, password = await dialogue.plain(initial)
        elif mechanism.upper() == "LOGIN":
            user, password = await dialogue.login(initial)
        else:
            raise Refused(
                Reply(
                    504, "5.5.4", "Unrecognized authentication mechanism: expected PLAIN or LOGIN"
                )
            )
        return await self._check_login(user, password)

    async def _challenge(self, text: str) -> bytes:
        self.say(Reply(334, "", text))
        with self.loop.deadline(COMMAND_SECONDS):
            return await self.stream.read_line(_CHALLENGE_LIMIT)

    async def _check_login(self, user: str, password: bytes) -> Reply:
        start = self.loop.clock.monotonic()
        try:
            login = await self._receiver.authenticate(self.client, user, password)
        except TemporaryFailure:
            self.context.log.count(Metrics.LOGINS, "not checked")
            raise
        if login.address is None:
            self.context.log.count(Metrics.LOGINS, "failed")
            self.event(Events.LOGIN_FAILED, user=printable(user, 100))
            elapsed = self.loop.clock.monotonic() - start
            self.idle = True  # this wait is for the client's sake, not the message's
            await self.loop.sleep(max(0.0, login.seconds - elapsed))
            self.idle = False
            raise Refused(Reply(535, "5.7.8", "Authentication credentials invalid"))
        self.context.log.count(Metrics.LOGINS, "succeeded")
        self.event(Events.LOGIN, user=login.address)
        self._user = login.address
        self._client = None
        return Reply(235, "2.7.0", "Authentication succeeded")

    # --- MAIL and RCPT ---

    async def _mail(self, argument: str) -> Reply:
        path = parse_path(argument, "FROM:")
        self._about = {"from_": path.address}
        self._check_parameters(path.parameters)
        self._check_utf8(path.address, "SMTPUTF8" in path.parameters)
        spf = await self._receiver.check_sender(self.client, path)
        self.transaction = Transaction(path, spf)
        self.dialogue.sender, self.dialogue.recipients = f"<{path.address}>", []
        self.dialogue.outcome = ""
        return Reply(250, "2.1.0", "Sender OK")

    def _check_parameters(self, parameters: Mapping[str, str]) -> None:
        """Check MAIL's parameters. Raises Refused, PermanentFailure."""
        for name, value in parameters.items():
            if name not in _MAIL_PARAMETERS or not self._extended:
                raise Refused(Reply(555, "5.5.4", f"Parameter {name} not recognized"))
            if name == "SIZE" and not value.isdecimal():
                raise Refused(Reply(501, "5.5.4", "expected SIZE=octets"))
            if name == "BODY" and value.upper() not in ("7BIT", "8BITMIME"):
                raise Refused(Reply(501, "5.5.4", "expected BODY=7BIT or BODY=8BITMIME"))
            if name in ("SMTPUTF8", "REQUIRETLS") and value:
                raise Refused(Reply(501, "5.5.4", f"{name} takes no value"))
            if name == "RET" and value.upper() not in tuple(Ret):
                raise Refused(Reply(501, "5.5.4", "expected RET=FULL or RET=HDRS"))
            if name == "ENVID":
                check_xtext(name, value, _ENVID_LIMIT)
            if name == "REQUIRETLS" and self.stream.tls is None:
                raise Refused(Reply(530, "5.7.10", "REQUIRETLS needs TLS: say STARTTLS first"))
        if int(parameters.get("SIZE", "0")) > self.context.size_limit:
            raise self.context.too_big()

    @staticmethod
    def _check_utf8(address: str, smtputf8: bool) -> None:
        if not (smtputf8 or address.isascii() or split_address(address)[0].isascii()):
            text = "an internationalised address needs the parameter SMTPUTF8 of MAIL"
            raise Refused(Reply(553, "5.6.7", text))

    async def _rcpt(self, argument: str) -> Reply:
        transaction = self.transaction
        assert transaction is not None
        path = parse_path(argument, "TO:")
        dsn = self._dsn_parameters(path.parameters, transaction.smtputf8)
        if not path.address:
            raise Refused(Reply(501, "5.1.3", "expected a recipient, not <>"))
        self._about = {"from_": transaction.sender, "to": path.address}
        self._check_utf8(path.address, transaction.smtputf8)
        if len(transaction.recipients) >= RECIPIENT_LIMIT:
            raise Refused(Reply(452, "4.5.3", "Too many recipients; send the rest later"))
        transaction.add(path, await self._receiver.resolve(self.client, path, dsn))
        if len(self.dialogue.recipients) < _DIALOGUE_RECIPIENTS:
            self.dialogue.recipients.append(path.address)
        return Reply(250, "2.1.5", "Recipient OK")

    def _dsn_parameters(self, parameters: Mapping[str, str], utf8: bool) -> DsnParameters:
        """Return what RCPT's parameters ask for. Raises Refused."""
        for name in parameters:
            if name not in ("NOTIFY", "ORCPT") or not self._extended:
                raise Refused(Reply(555, "5.5.4", f"Parameter {name} not recognized"))
        orcpt = parameters.get("ORCPT", "")
        notify = parse_notify(parameters["NOTIFY"]) if "NOTIFY" in parameters else ()
        if "ORCPT" in parameters and ";" not in check_xtext("ORCPT", orcpt, _ORCPT_LIMIT, utf8):
            raise Refused(Reply(501, "5.5.4", "expected ORCPT=type;address"))
        return DsnParameters(notify, orcpt)

    # --- DATA and BDAT ---

    async def _data(self, argument: str) -> Reply | None:
        transaction = self.transaction
        assert transaction is not None
        self._reader.open(transaction)
        self.say(Reply(354, "", "End data with <CR><LF>.<CR><LF>"))
        await self._reader.read_data(transaction)
        return await self._finish_message(transaction)

    async def _bdat(self, argument: str) -> Reply | None:
        """RFC 3030: a chunk is read also if it is refused."""
        match = re.fullmatch(r"(\d{1,12})(?: +(LAST))?", argument, re.IGNORECASE)
        if match is None:
            text = "expected BDAT octets [LAST]; closing"
            raise Refused(Reply(501, "5.5.4", text, close=True))
        size, last = int(match[1]), bool(match[2])
        if self.phase not in (Phase.RECIPIENTS, Phase.CHUNKS):
            await self.discard_chunk(size)
            raise self.phase.refusal
        transaction = self.transaction
        assert transaction is not None
        try:
            self._reader.open(transaction)
        except (Refused, ChasquidError) as error:
            transaction.fail(error)  # or the next chunk would begin a message
        await self._reader.read_chunk(size, transaction)
        if last:
            if transaction.held and transaction.failure is None:
                raise BareNewline("a line must end with CRLF, and hold no other CR or LF")
            return await self._finish_message(transaction)
        if transaction.failure is not None:
            raise transaction.failure
        return Reply(250, "2.0.0", f"{size} octets received")

    async def _finish_message(self, transaction: Transaction) -> Reply | None:
        """Answer for the complete message. Raises what says why not."""
        try:
            if transaction.failure is not None:
                raise transaction.failure
            accept = functools.partial(self._receiver.accept, self.client, transaction)
            reply = await self._staged("message", "", accept)
            if reply is not None:
                self.dialogue.outcome = reply.text
            return reply
        except Exception:
            self._about = transaction.fields()
            raise
        finally:
            self._reset()

    # --- the rest ---

    async def _rset(self, argument: str) -> Reply:
        self._reset()
        return Reply(250, "2.0.0", "OK")

    async def _noop(self, argument: str) -> Reply:
        return Reply(250, "2.0.0", "OK")

    async def _vrfy(self, argument: str) -> Reply:
        return Reply(252, "2.5.2", "Cannot VRFY user; RCPT tells")

    async def _expn(self, argument: str) -> Reply:
        raise Refused(Reply(502, "5.5.1", "Command not implemented"))

    async def _quit(self, argument: str) -> Reply:
        return Reply(221, "2.0.0", f"{self.context.hostname} closing connection", close=True)

    async def _help(self, argument: str) -> Reply:
        command = _COMMANDS.get(argument.upper())
        if command is not None:
            return Reply(214, "2.0.0", command.help)
        lines = [row.help for row in _COMMANDS.values()]
        return Reply(214, "2.0.0", "\n".join(["the commands here:", *lines]))


class _Command(NamedTuple):
    """A row of the command table; `argument` is "none", "optional" or "required"."""

    action: Callable[[Session, str], Awaitable[Reply | None]]
    phases: tuple[Phase, ...]
    argument: str
    help: str


_ANY = tuple(Phase)
_GREETED = (Phase.GREETED,)
_NOT_IN_CHUNKS = (Phase.GREETED, Phase.MAIL, Phase.RECIPIENTS)
_COMMANDS: dict[str, _Command] = {
    "HELO": _Command(Session._helo, _ANY, "required", "HELO host"),
    "EHLO": _Command(Session._ehlo, _ANY, "required", "EHLO host"),
    "STARTTLS": _Command(Session._starttls, _NOT_IN_CHUNKS, "none", "STARTTLS"),
    "AUTH": _Command(Session._auth, _GREETED, "required", "AUTH PLAIN|LOGIN [initial response]"),
    "MAIL": _Command(
        Session._mail, _GREETED, "required",
        "MAIL FROM:<address> [SIZE=n] [BODY=7BIT|8BITMIME] [SMTPUTF8] [REQUIRETLS] "
        "[RET=FULL|HDRS] [ENVID=id]",
    ),
    "RCPT": _Command(
        Session._rcpt, (Phase.MAIL, Phase.RECIPIENTS), "required",
        "RCPT TO:<address> [NOTIFY=NEVER|SUCCESS,FAILURE,DELAY] [ORCPT=type;address]",
    ),
    "DATA": _Command(Session._data, (Phase.RECIPIENTS,), "none", "DATA"),
    "BDAT": _Command(Session._bdat, _ANY, "required", "BDAT octets [LAST]"),
    "RSET": _Command(Session._rset, _ANY, "none", "RSET"),
    "NOOP": _Command(Session._noop, _ANY, "optional", "NOOP"),
    "VRFY": _Command(Session._vrfy, _ANY, "required", "VRFY name"),
    "EXPN": _Command(Session._expn, _ANY, "required", "EXPN list"),
    "HELP": _Command(Session._help, _ANY, "optional", "HELP [command]"),
    "QUIT": _Command(Session._quit, _ANY, "none", "QUIT"),
}  # fmt: skip


# ======================================================================================
# ROOM: RECEPTION
#
# The `Receiver` of the mail server: who may send what to whom, and what a message has to
# pass before it is ours.
#
# - Our users log in, and what they send is signed. What comes from elsewhere is for our own
#   domains, its sender is checked, and its signatures are verified.
# - A check that breaks refuses for now (4XX): mail is never let in unchecked.
# - A message is accepted only by `Queue.accept`, when it is safe on the disk.
#
# How the dialogue goes belongs to SESSION; how a check is made, to SPF, DKIM, DMARC and TLS
# POLICY; where mail goes then, to ALIASES and QUEUE.
# ======================================================================================

_FROM_LIMIT = 8192  # octets of a From field
_AUTH_SECONDS = 0.5  # a login that fails takes at least this long
_PASSWORD_SLOTS = 2  # passwords checked at a time; each takes a processor
_LOGIN_KNOWN_SECONDS = 600.0  # for which a login that succeeded is known: with our users,
_DOVECOT_KNOWN_SECONDS = 60.0  # and with Dovecot's, of whose changes nobody tells us


class MailReceiver:
    """What the mail server does with mail."""

    def __init__(
        self,
        config: Config,
        *,
        loop: Loop,
        log: Log,
        accounts: Accounts,
        aliases: Aliases,
        queue: Queue,
        names: Names,
        signer: Signer,
        levels: SecurityLevels,
        hooks: Hooks,
        dovecot: Dovecot | None,
        limits: Limits,
    ) -> None:
        self.config = config
        self.hostname = domain_to_ascii(config.hostname)
        self.loop = loop
        self.log = log
        self.accounts = accounts
        self.aliases = aliases
        self.names = names
        self.signer = signer
        self.hooks = hooks
        self.limits = limits
        self._own_domain = domain_to_unicode(self.hostname)
        self._queue = queue
        self._levels = levels
        self._dovecot = dovecot
        self._password_slots = Slots(loop, _PASSWORD_SLOTS)
        self._logins = Logins(loop)

    def take_over(self, accounts: Accounts, aliases: Aliases) -> None:
        """From now on, know these users and aliases."""
        self.accounts, self.aliases = accounts, aliases
        self._logins.forget()

    def extensions(self, client: ClientInfo) -> list[str]:
        """See `Receiver`. Logins need TLS (RFC 4954, 4; RFC 8314, 3.3)."""
        return ["DSN", *(("REQUIRETLS", "AUTH PLAIN LOGIN") if client.tls else ())]

    # --- logins ---

    async def authenticate(self, client: ClientInfo, login: str, password: bytes) -> Login:
        """See `Receiver`. Raises RateExceeded, TemporaryFailure."""
        limits = self.limits
        limits.check_login(client.peer)
        address = await self._logins.find(
            login, password, lambda: self._find_user(client, login, password)
        )
        if address is not None:
            limits.login_succeeded(address)
            return Login(address)
        name = self._complete_login(login)
        late = limits.login_failed(client.peer, name, self._may_know(name))
        return Login(None, max(_AUTH_SECONDS, late))

    async def _find_user(
        self, client: ClientInfo, given: str, password: bytes
    ) -> tuple[str | None, float]:
        """Return the address behind a login if `password` fits, else None; and for how long.

        The users of the files come first, then Dovecot. Raises TemporaryFailure.
        """
        accounts, login = self.accounts, self._complete_login(given)
        async with self._password_slots:
            self.limits.check_login(client.peer)  # others may have failed while we waited
            address = await self.loop.work(lambda: accounts.authenticate(login, password))
        if address is not None or self._dovecot is None:
            return address, _LOGIN_KNOWN_SECONDS
        try:
            address = normalize_address(login)
        except ValueError:
            return None, 0.0
        user, domain = split_address(address)
        full = "@" in given  # or the domain is the host's own, perhaps, served or not
        if accounts.exists(user, domain) or (full and not self.aliases.is_local(domain)):
            return None, 0.0  # of whom the files know, they have the last word
        name = address if full else given
        if not await self._dovecot.authenticate(name, password):
            return None, 0.0
        return address, _DOVECOT_KNOWN_SECONDS

    def _may_know(self, login: str) -> bool:
        """Tell whether there may be a user of that name: Dovecot is not asked."""
        try:
            known = self.accounts.exists(*split_address(normalize_address(login)))
        except ValueError:
            return False
        return known or self._dovecot is not None

    def _complete_login(self, login: str) -> str:
        """Return `login` with a domain: the only one served here, or else the host's own."""
        if "@" in login:
            return login
        domains = self.accounts.domains
        return f"{login}@{domains[0] if len(domains) == 1 else self._own_domain}"

    # --- senders ---

    async def check_sender(self, client: ClientInfo, path: Path) -> Spf:
        """See `Receiver`. Raises Refused, RateExceeded, QueueFull, TemporaryFailure."""
        client.check_login()
        sender = path.address
        if sender and not split_address(sender)[1]:
            raise Refused(Reply(501, "5.1.7", "the sender's address needs a domain"))
        self._queue.check_room()
        if client.user and sender and not await self.may_send_as(client.user, sender):
            text = f"{client.user} may not send as {sender}: it is no address of that user"
            raise Refused(Reply(550, "5.7.1", text))
        self._count(self.limits.message, client)
        return Spf("none") if client.user else await self._check_stranger(client, sender)

    def _count(self, count: Callable[[str, str], None], client: ClientInfo) -> None:
        """Raises RateExceeded."""
        try:
            count(client.peer, client.user)
        except RateExceeded:
            self.log.count(Metrics.LIMITS, "rate")
            raise

    async def _check_stranger(self, client: ClientInfo, sender: str) -> Spf:
        """Judge a sender who has not logged in. Raises Refused, TemporaryFailure."""
        if self.limits.is_relay(client.peer):
            return Spf("none", "mailfrom", "", "the client is a relay of ours")
        spf = await check_spf(
            self.names,
            self.loop,
            client.peer,
            sender=sender,
            hello=client.hello,
            host=self.hostname,
        )
        self.log.count(Metrics.SPF, spf.result)
        if spf.result == "fail":
            text = f"{spf.domain} does not let {client.peer} send its mail"
            explanation = f": {spf.explanation}" if spf.explanation else ""
            raise Refused(Reply(550, "5.7.23", f"SPF: {text}{explanation}"))
        domain = split_address(sender)[1]
        if not domain or spf.result != "pass":
            return spf  # anybody could set the level of somebody else's domain
        if not await self._levels.accepts(domain, bool(client.tls)):
            self.log.count(Metrics.SECURITY_LEVELS, "refused", "in")
            text = f"{domain} has sent its mail with TLS before: say STARTTLS"
            raise Refused(Reply(550, "5.7.3", text))
        return spf

    async def may_send_as(self, user: str, sender: str) -> bool:
        """Tell whether `sender` is an address of `user`, or everybody may send as anyone.

        Raises TemporaryFailure.
        """
        if not self.config.sender_must_match:
            return True
        try:
            address = normalize_address(sender)
        except ValueError:
            return False
        if address == user:
            return True
        try:
            destinations = await self._queue.expand(address)
        except (NoSuchUser, AliasLoop):
            return False
        return any(
            destination.kind == DestinationKind.ADDRESS and destination.value == user
            for destination in destinations
        )

    # --- recipients ---

    async def resolve(
        self, client: ClientInfo, path: Path, dsn: DsnParameters
    ) -> Sequence[FinalRecipient]:
        """See `Receiver`. Raises Refused, RateExceeded, TemporaryFailure."""
        address = self._with_domain(path.address)
        self._count(self.limits.recipient, client)
        if not client.user and not self.aliases.is_local(split_address(address)[1]):
            text = "Relaying denied: log in, or send to our own domains"
            raise Refused(Reply(550, "5.7.1", text))
        try:
            destinations = await self._queue.expand(address)
        except NoSuchUser as error:
            raise Refused(Reply(550, "5.1.1", f"User unknown: {error}")) from error
        except AliasLoop as error:
            self.log.error("aliases", str(error))
            text = "the aliases of this address lead nowhere"
            raise TemporaryFailure(text, "4.3.5") from None
        return [FinalRecipient(destination, address, dsn) for destination in destinations]

    def _with_domain(self, address: str) -> str:
        """Complete "postmaster", which needs no domain (RFC 5321, 4.1.1.3).

        It is also at our hostname, from where notifications come, served or not. Raises Refused.
        """
        local, domain = split_address(address)
        if local.lower() == "postmaster" and domain in ("", self._own_domain):
            return f"{local}@{self.aliases.postmaster_domain(self._own_domain)}"
        if not domain:
            raise Refused(Reply(501, "5.1.3", "the recipient's address needs a domain"))
        return address

    # --- messages ---

    def incoming(self, transaction: Transaction) -> Draft:
        """See `Receiver`. Raises QueueFull."""
        return self._queue.draft()

    async def accept(self, client: ClientInfo, transaction: Transaction) -> Reply:
        """See `Receiver`. Raises Refused, PermanentFailure, TemporaryFailure, QueueFull."""
        draft = transaction.incoming
        assert isinstance(draft, Draft)
        if not draft.size:
            raise Refused(Reply(554, "5.6.0", "the message is empty"))
        envelope, trace = await _Judgement(self, client, transaction, draft).judge()
        transaction.incoming = None  # from here on the queue answers for it
        await self._queue.accept(draft, envelope, trace)
        domain = split_address(transaction.sender)[1]
        if domain and transaction.spf.result == "pass":
            try:
                await self._levels.saw_incoming(domain, bool(client.tls))
            except Exception as error:  # the message is ours, whatever comes of this
                self.log.crash(f"security level of {domain}", error)
        return Reply(250, "2.0.0", f"OK: queued as {draft.id}")


def check_header(
    parse: Callable[[], list[Field]], max_received: int, one_author: bool
) -> list[Field]:
    """Return the fields of a header, as `parse` returns them. Raises Refused if it is not sane.

    That is a line which is no field (RFC 5322, 2.2), more than `max_received` hops (RFC 5321,
    6.3), or, if `one_author`, a second From field (RFC 5322, 3.6): which of them a reader shows
    is anybody's guess.
    """
    try:
        fields = parse()
    except ValueError as error:
        text = f"the header holds a line that is no field: {error}"
        raise Refused(Reply(554, "5.6.0", text)) from None
    names = [field.name for field in fields]
    if names.count("received") > max_received:
        text = "Too many hops: the message may be in a loop"
        raise Refused(Reply(554, "5.4.6", text))
    if names.count("from") > 1 and one_author:
        raise Refused(Reply(554, "5.6.0", "the header has more than one From field"))
    return fields


class _Judgement:
    """Judges a complete message, and finds the fields to put in front of it."""

    def __init__(
        self, receiver: MailReceiver, client: ClientInfo, transaction: Transaction, draft: Draft
    ) -> None:
        self._receiver = receiver
        self._client = client
        self._transaction = transaction
        self._draft = draft
        self._dkim: list[str] = []
        self._dmarc = "none"
        config = receiver.config
        self._header = draft.complete()
        self._fields = check_header(draft.fields, config.max_received_headers, not client.user)

    async def judge(self) -> tuple[Envelope, dict[str, str]]:
        """Return the envelope, and where the message came from, for the log. Raises Refused."""
        transaction, draft, fields = self._transaction, self._draft, self._fields
        await self._check_authors()
        received = self._received()
        junk = False
        if self._client.user:
            prefix = await self._sign(received)
        else:
            prefix, junk = await self._verify()
            prefix += received
        if self._receiver.hooks.has("post-data"):
            added = await self._show_to_hook(prefix)
            prefix = added + prefix
            junk = junk or any(
                field.name == "x-spam-flag" and field.value.strip().upper() == b"YES"
                for field in header_fields(added)
            )
        required = [field.value.strip().lower() for field in fields if field.name == "tls-required"]
        envelope = Envelope(
            draft.id,
            transaction.sender,
            tuple(transaction.final_recipients.values()),
            self._receiver.loop.clock.time(),
            prefix=prefix,
            smtputf8=transaction.smtputf8,
            eight_bit=draft.eight_bit or not prefix.isascii(),
            junk=junk,
            require_tls=transaction.require_tls,
            tls_optional=required == [b"no"],
            ret=transaction.ret,
            envid=transaction.envid,
        )
        return envelope, self._trace()

    async def _show_to_hook(self, prefix: bytes) -> bytes:
        """Return the fields that post-data wants on top. Raises PermanentFailure."""
        message = itertools.chain([prefix], self._draft.stored())
        return await self._receiver.hooks.post_data(self._environment(), message)

    def _environment(self) -> dict[str, str]:
        """What post-data is told, as chasquid names it, and the results of our checks."""
        client, transaction = self._client, self._transaction
        local = self._receiver.aliases.is_local(split_address(transaction.sender)[1])
        return {
            "REMOTE_ADDR": client.peer,
            "EHLO_DOMAIN": re.sub(r"[^A-Za-z0-9\[\].:-]", "", client.hello),
            "EHLO_DOMAIN_RAW": client.hello,
            "MAIL_FROM": transaction.sender,
            "RCPT_TO": " ".join(transaction.originals()),
            "AUTH_AS": client.user,
            "ON_TLS": "1" if client.tls else "0",
            "FROM_LOCAL_DOMAIN": "1" if local else "0",
            "SPF_PASS": "1" if transaction.spf.result == "pass" else "0",
            "SPF_RESULT": transaction.spf.result,
            "DKIM_RESULTS": " ".join(self._dkim),
            "DMARC_RESULT": self._dmarc,
        }

    async def _check_authors(self) -> None:
        """If users may write only as themselves, From must be theirs. Raises Refused."""
        user = self._client.user
        if not user or not self._receiver.config.sender_must_match:
            return
        for field in self._fields:
            for author in author_addresses(field.value) if field.name == "from" else ():
                if not await self._receiver.may_send_as(user, author):
                    text = f"{user} may not write as {printable(author, 200)} in From"
                    raise Refused(Reply(554, "5.7.1", text))

    async def _sign(self, received: bytes) -> bytes:
        """Return signatures, the trace, and what our user left out (RFC 6409, 8).

        Raises TemporaryFailure.
        """
        receiver, draft = self._receiver, self._draft
        names = {field.name for field in self._fields}
        names |= names_signed(self._fields)
        prefix = received
        if "date" not in names:
            prefix += fold("Date", rfc5322_date(receiver.loop.clock.time()))
        if "message-id" not in names:
            prefix += fold("Message-ID", f"<{draft.id}@{receiver.hostname}>")
        domain = split_address(self._transaction.sender)[1]
        signatures = await receiver.signer.sign(domain, prefix + self._header, draft.body)
        return signatures + prefix

    async def _verify(self) -> tuple[bytes, bool]:
        """Return trace fields, and whether it is junk. Raises Refused."""
        receiver, transaction = self._receiver, self._transaction
        peer, hostname = self._client.peer, receiver.hostname
        spf, sender = transaction.spf, transaction.sender
        signatures, dmarc = await self._check_author()
        self._dkim, self._dmarc = [signature.result for signature in signatures], dmarc.result
        for signature in signatures:
            receiver.log.count(Metrics.DKIM, signature.result)
        receiver.log.count(Metrics.DMARC, dmarc.result)
        dkim = ",".join(self._dkim) or "none"
        transaction.results = {"spf": spf.result, "dkim": dkim, "dmarc": dmarc.result}
        # what a relay of ours passes on comes from its address, which proves nothing of others
        enforced = receiver.config.dmarc_policy == "enforce" and not receiver.limits.is_relay(peer)
        junk = enforced and self._is_junk(dmarc)
        trace = authentication_results(hostname, spf, sender, signatures=signatures, dmarc=dmarc)
        hello, sender = self._said()
        return trace + received_spf(spf, peer, sender, hello=hello, host=hostname), junk

    def _is_junk(self, dmarc: Dmarc) -> bool:
        """Do what the owner of the From domain asks for. Raises Refused."""
        if dmarc.result == "permerror":  # programs that report, from <>, write what they like
            return bool(self._transaction.sender)
        if dmarc.result == "fail" and dmarc.policy == "reject":
            text = f"{dmarc.domain} asks to reject mail that cannot be shown to be its own"
            raise Refused(Reply(550, "5.7.1", f"DMARC: {text}"))
        return dmarc.result == "fail" and dmarc.policy == "quarantine"

    def _authors(self) -> list[str] | None:
        """Return the domains in From; None if it names none that can be read.

        Raises Refused if there are more than we judge.
        """
        found = [field for field in self._fields if field.name == "from"]
        if not found:
            return []
        too_long = len(found[0].raw) > _FROM_LIMIT
        authors = [] if too_long else author_domains(found[0].value)
        if too_long or len(authors) > AUTHORS_LIMIT:
            raise Refused(Reply(554, "5.6.0", "the From field names too many authors"))
        return authors or None

    async def _check_author(self) -> tuple[list[Signature], Dmarc]:
        """Return the results of DKIM and DMARC. Raises Refused."""
        names, loop = self._receiver.names, self._receiver.loop
        fields, authors = self._fields, self._authors()
        signatures = await verify_signatures(
            names, loop, fields, body=self._draft.body, authors=authors or ()
        )
        if authors is None:
            return signatures, Dmarc("permerror")
        dmarc = await check_dmarc(
            names, loop, authors, spf=self._transaction.spf, signatures=signatures
        )
        if dmarc.policy == "reject" and choose_signatures(fields, authors)[1]:
            # an author's signature that was not looked at may be a good one
            dmarc = dmarc._replace(policy="quarantine")
        return signatures, dmarc

    def _said(self) -> tuple[str, str]:
        """Return HELO's name and the sender, in ASCII if the message must be."""
        hello, sender = self._client.hello, self._transaction.sender
        if self._transaction.smtputf8:
            return hello, sender
        return hello.encode("ascii", "replace").decode("ascii"), address_to_ascii(sender)

    def _received(self) -> bytes:
        """RFC 5321, 4.4; where our users are is nobody's business."""
        client, transaction = self._client, self._transaction
        literal = f"[IPv6:{client.peer}]" if ":" in client.peer else f"[{client.peer}]"
        hello, sender = self._said()
        protocol = "ESMTP" if client.extended else "SMTP"
        if transaction.smtputf8:
            protocol = "UTF8SMTP"  # RFC 6531, 4.3
        protocol += ("S" if client.tls else "") + ("A" if client.user else "")
        tls = f", {client.tls}" if client.tls else ""
        return fold(
            "Received",
            f"from {hello}" + ("" if client.user else f" ({literal})"),
            f"by {self._receiver.hostname} (chasquid) with {protocol} id {self._draft.id}",
            f"(over {client.port.name}{tls}, envelope from <{sender}>)",
            f"; {rfc5322_date(self._receiver.loop.clock.time())}",
        )

    def _trace(self) -> dict[str, str]:
        client = self._client
        return {
            "port": client.port.name,
            "peer": client.peer,
            "helo": client.hello,
            "user": client.user,
            "tls": client.tls,
            **self._transaction.results,
        }


# ======================================================================================
# ROOM: HTTP
#
# The server's side of HTTP/1.1 on a `Stream`, as little of it as a page for people and an
# interface for programs need: one request a connection, then it is closed (RFC 9112).
#
# - A body comes with its length, or it does not come. What is not understood is refused,
#   so two programs cannot disagree about where it ends.
# - Every answer tells a browser to load nothing, to guess no types and to keep no copy,
#   unless its maker says otherwise (`policy`).
# - A browser may be told by a page elsewhere to ask us something. Such a page cannot
#   choose our name (`is_our_name`), and cannot hide that it asks (`is_from_a_page`).
#
# What is answered to whom belongs to MONITORING and INBOX.
# ======================================================================================

HTTP_SECONDS = 10.0  # for a request to come in
STRICT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HTTP_LINE_LIMIT = 8192  # octets
_HTTP_LINES_LIMIT = 100
_HTTP_SINGLE = frozenset(("host", "content-length", "transfer-encoding", "origin"))
_HTTP_REASONS = {
    200: "OK", 201: "Created", 303: "See Other", 400: "Bad Request", 401: "Unauthorized",
    403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 411: "Length Required",
    413: "Content Too Large", 415: "Unsupported Media Type", 421: "Misdirected Request",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


class HttpRefused(ChasquidError):
    """A request that is answered with an error: its status, a sentence, further headers."""

    def __init__(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


class HttpRequest(NamedTuple):
    """A request without its body: the path is still encoded, header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


async def read_request(stream: Stream) -> HttpRequest:
    """Return the next request, up to its body.

    Raises ValueError if there is none, and what `Stream.read_line` does.
    """
    words = (await stream.read_line(_HTTP_LINE_LIMIT)).decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise ValueError("no request")
    path, _, query = words[1].partition("?")
    headers: dict[str, str] = {}
    for _ in range(_HTTP_LINES_LIMIT):
        line = (await stream.read_line(_HTTP_LINE_LIMIT)).decode("latin-1")
        if not line:
            return HttpRequest(words[0], path, query, headers)
        name, _, value = line.partition(":")
        name = name.strip().lower()
        if name in headers and name in _HTTP_SINGLE:
            raise ValueError(f"{name} stands there twice")  # which counts, servers differ on
        headers[name] = value.strip()
    raise ValueError("too many headers")


async def read_body(stream: Stream, request: HttpRequest, limit: int) -> bytes:
    """Return the body of `request`, b"" if there is none.

    Raises HttpRefused if it has no plain length or more than `limit` octets,
    Disconnected, Expired.
    """
    if "transfer-encoding" in request.headers:
        raise HttpRefused(411, "a body must come with a Content-Length, and in one piece")
    length = request.headers.get("content-length", "0")
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise HttpRefused(400, "Content-Length must be a number")
    if int(length) > limit:
        raise HttpRefused(413, f"a body may have {limit} octets, and this one has {int(length)}")
    if length != "0" and request.headers.get("expect", "").lower() == "100-continue":
        stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    while len(body) < int(length):
        body += await stream.read_some(int(length) - len(body))
    return bytes(body)


def http_head(
    status: int, kind: str, length: int | None, policy: str = STRICT_POLICY,
    headers: Iterable[tuple[str, str]] = (),
) -> bytes:  # fmt: skip
    """Return all of a response before its body.

    `length` is in octets, or None if the body lasts until the connection is closed.
    `policy` is a Content-Security-Policy (W3C, CSP Level 3).
    """
    lines = [f"HTTP/1.1 {status} {_HTTP_REASONS[status]}", f"Content-Type: {kind}"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [
        f"Content-Security-Policy: {policy}", "X-Content-Type-Options: nosniff",
        "Cache-Control: no-store", "Connection: close",
    ]  # fmt: skip
    lines += [f"{name}: {UNPRINTABLE.sub(' ', value)}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace")


def http_response(
    status: int, kind: str, body: str | bytes, policy: str = STRICT_POLICY,
    headers: Iterable[tuple[str, str]] = (),
) -> bytes:  # fmt: skip
    """Return a response, its text in UTF-8."""
    data = body.encode("utf-8", "replace") if isinstance(body, str) else body
    return http_head(status, kind, len(data), policy=policy, headers=headers) + data


def without_body(response: bytes) -> bytes:
    """Return what answers HEAD if `response` answers GET."""
    return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def host_name(host: str) -> str:
    """Return the name in a Host header, in lower case. Raises ValueError."""
    return host_and_port(host, 80)[0].lower()


def is_our_name(host: str, *names: str) -> bool:
    """Tell whether `host` is no name that a page elsewhere could have pointed at us.

    A stranger's DNS may give our address to a name of theirs ("DNS rebinding"), but no
    address literal, nor "localhost", nor one of `names`.
    """
    try:
        name = host_name(host)
    except ValueError:
        return False
    return name in ("", "localhost", *map(str.lower, names)) or is_ip_address(name)


def is_from_a_page(headers: Mapping[str, str]) -> bool:
    """Tell whether a web page made a request, be it ours or another's."""
    return "origin" in headers or headers.get("sec-fetch-site", "none") != "none"


def is_from_a_foreign_page(headers: Mapping[str, str]) -> bool:
    """Tell whether a web page made a request that does not come from where it went to.

    The Host must have been found to be ours before.
    """
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return True
    host = headers.get("host", "").lower()
    origin = headers.get("origin")
    return origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}")


def html_text(text: str) -> str:
    """Return `text` so that it is nothing but text in HTML, also within an attribute."""
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(mark, entity)
    return text.replace("'", "&#39;")


# ======================================================================================
# ROOM: MONITORING
#
# What the server shows of itself over HTTP, at `monitoring_address`: a page for people,
# /metrics for Prometheus, /health for whoever watches, and POST /exit.
#
# - It is meant for this machine, or a network of trust: nobody logs in, and the page shows
#   who writes to whom. It never shows a password, nor the content of a message.
# - Whatever came from outside is escaped; the page runs no script and loads nothing.
# - A web page elsewhere cannot have a browser end the server: a request that a page made
#   says so (Origin), and is refused.
#
# The room is told what to show (`Status`); it looks nothing up.
# ======================================================================================

_OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_PLAIN_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class CertificateLine(NamedTuple):
    """A certificate, for people and alarms: its directory, names, and end (since 1970)."""

    directory: str
    names: tuple[str, ...]
    expires: float


class DomainLine(NamedTuple):
    """A domain, for people: how many users it has, and the selectors of its DKIM keys."""

    name: str
    users: int
    selectors: tuple[str, ...]


class QueueLine(NamedTuple):
    """A message in the queue, for people."""

    id: str
    sender: str
    age: str
    next_attempt: str
    recipients: tuple[tuple[str, str], ...]  # address, and what became of it


class Status(NamedTuple):
    """What there is to show. Times are in seconds since 1970."""

    hostname: str
    now: float
    started: float
    sessions: int
    listening: tuple[str, ...]
    queue: tuple[QueueLine, ...]
    queue_limit: int
    counters: Mapping[tuple[str, ...], int]
    dialogues: tuple[Dialogue, ...]
    config: str
    queued: int = 0  # messages in the queue, of which `queue` need not have all
    oldest: float = 0.0  # seconds that the oldest message in the queue has waited
    reloaded: tuple[float, bool] = (0.0, True)  # when files were last read, and if all were good
    problems: tuple[str, ...] = ()
    certificates: tuple[CertificateLine, ...] = ()
    domains: tuple[DomainLine, ...] = ()


class Monitor:
    """Answers HTTP requests, one a connection."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        hostname: str,
        status: Callable[[], Status],
        stop: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._log = log
        self._hostname = hostname
        self._status = status
        self._stop = stop

    async def answer(self, stream: Stream) -> None:
        """Read one request, answer it, and close."""
        try:
            with self._loop.deadline(HTTP_SECONDS):
                request = await read_request(stream)
                stream.write(self._respond(request.method, request.path, request.headers))
                await stream.flush()
        except (Disconnected, Expired, LineTooLong, BareNewline, ValueError):
            pass
        except Exception as error:
            self._log.crash("monitoring", error)
        finally:
            await stream.finish()

    def _respond(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        if method == "POST":
            return self._exit(path, headers)
        if method not in ("GET", "HEAD"):
            return http_response(405, "text/plain", "GET, HEAD or POST\n")
        if path == "/" and not is_our_name(headers.get("host", ""), self._hostname):
            found = http_response(421, "text/plain", "not by this name\n")
        elif path == "/":
            found = http_response(200, "text/html; charset=utf-8", page(self._status()))
        elif path == "/metrics":
            open_metrics = "application/openmetrics-text" in headers.get("accept", "")
            kind = _OPEN_METRICS if open_metrics else _PLAIN_METRICS
            found = http_response(200, kind, metrics(self._status(), open_metrics))
        elif path == "/health":
            found = http_response(200, "text/plain", "ok\n")
        else:
            found = http_response(404, "text/plain", "there is /, /metrics and /health\n")
        return found if method == "GET" else without_body(found)

    def _exit(self, path: str, headers: Mapping[str, str]) -> bytes:
        if path != "/exit":
            return http_response(404, "text/plain", "POST goes to /exit\n")
        if is_from_a_page(headers):
            return http_response(403, "text/plain", "not from a web page\n")
        self._log.info("monitoring", "asked to exit")
        self._stop()
        return http_response(200, "text/plain", "stopping\n")


def metrics(status: Status, open_metrics: bool) -> str:
    """Return the counters in OpenMetrics 1.0, or in Prometheus' older text format."""
    lines: list[str] = []

    def tell(
        metric: Metric,
        kind: str,
        samples: Iterable[tuple[tuple[str, ...], float]],
        prefix: str = "chasquid_",
    ) -> None:
        name = f"{prefix}{metric.name}"
        full = f"{name}_total" if kind == "counter" else name
        family = name if open_metrics else full
        lines.extend([f"# TYPE {family} {kind}", f"# HELP {family} {metric.help}"])
        for values, value in samples:
            labels = ",".join(
                f'{label}="{_label(text)}"'
                for label, text in zip(metric.labels, values)  # noqa: B905
            )
            lines.append(f"{full}{{{labels}}} {value:.16g}" if labels else f"{full} {value:.16g}")

    by_name: dict[str, dict[tuple[str, ...], float]] = {
        name: dict.fromkeys(metric.known, 0.0) for name, metric in Metrics.BY_NAME.items()
    }
    for (name, *values), count in status.counters.items():
        by_name[name][tuple(values)] = count
    for name, found in by_name.items():
        metric = Metrics.BY_NAME[name]
        samples = sorted(found.items()) or ([((), 0.0)] if not metric.labels else [])
        tell(metric, "counter", samples)
    tell(Metric("sessions", "Connections that are open now."), "gauge", [((), status.sessions)])
    tell(
        Metric("queue_messages", "Messages in the queue now."),
        "gauge",
        [((), max(status.queued, len(status.queue)))],
    )
    reloaded, good = status.reloaded
    for name, help, value in (
        ("queue_oldest_seconds", "How long the oldest message has waited.", status.oldest),
        ("start_time_seconds", "When the server started, since 1970.", status.started),
        ("reload_time_seconds", "When files were last read again, since 1970.", reloaded),
        ("reload_success", "Whether all that was read was good.", float(good)),
        ("configuration_problems", "Domains and certificates with a mistake; see the log.",
         len(status.problems)),
    ):  # fmt: skip
        tell(Metric(name, help), "gauge", [((), value)])
    tell(
        Metric("certificate_expiry_seconds", "When a certificate expires, since 1970.", ("name",)),
        "gauge",
        [((line.directory,), line.expires) for line in status.certificates],
    )
    for name, kind, help, value in _process_metrics():
        tell(Metric(name, help), kind, [((), value)], prefix="")
    version = Metric("build_info", "The version of the server.", ("version", "python"))
    tell(version, "gauge", [((__version__, sys.version.split()[0]), 1)])
    return "\n".join(lines) + "\n" + ("# EOF\n" if open_metrics else "")


def _process_metrics() -> Iterator[tuple[str, str, str, float]]:
    """Yield what Prometheus' own clients tell of a process: name, kind, help, value."""
    import resource

    open_files, memory = 0, 0
    with contextlib.suppress(OSError):
        open_files = len(os.listdir("/dev/fd"))
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open("/proc/self/statm", encoding="ascii") as file,
    ):
        memory = int(file.read().split()[1]) * resource.getpagesize()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield "process_resident_memory_bytes", "gauge", "Memory in use.", memory
    yield "process_open_fds", "gauge", "Open descriptors.", open_files
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield "process_max_fds", "gauge", "How many descriptors there may be.", most
    yield "process_cpu_seconds", "counter", "Processor time.", usage.ru_utime + usage.ru_stime


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


_STYLE = """
:root { color-scheme: light dark; --edge: #8885; --soft: #8881; --bad: #b3261e; --good: #1b7a36;
  --wait: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --bad: #ff8a80; --good: #81c995; --wait: #f2c063; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .soft { opacity: .75; }
.tiles { display: grid; gap: .6rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); }
.tile { border: 1px solid var(--edge); border-radius: .5rem; padding: .5rem .8rem;
  font-size: .9rem; line-height: 1.3; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.bad { color: var(--bad); } .good { color: var(--good); } .wait { color: var(--wait); }
article, details { border: 1px solid var(--edge); border-radius: .5rem; margin: .5rem 0;
  padding: .5rem .8rem; overflow-wrap: anywhere; }
article p { border-left: 3px solid var(--edge); padding-left: .6rem; }
summary { cursor: pointer; } code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { white-space: pre-wrap; margin: .5rem 0 .2rem; }
pre span { display: block; padding-left: 3ch; text-indent: -3ch; }
table { border-collapse: collapse; width: 100%; max-width: 30rem; }
tr + tr { border-top: 1px solid var(--edge); } td { padding: .2rem 0; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
"""


def page(status: Status) -> str:
    """Return the page for people, in HTML."""
    up = duration_text(status.now - status.started)
    title = f"chasquid at {html_text(status.hostname)}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
        f"<p class=soft>version {__version__}, up {up}, "
        f"as of {html_text(rfc5322_date(status.now))}</p>",
        _tiles(status),
        "<h2>Queue</h2>",
        *(map(_queue_line, status.queue) if status.queue else ["<p>It is empty.</p>"]),
        "<h2>Recent sessions</h2>",
        *(map(_dialogue, reversed(status.dialogues)) if status.dialogues else ["<p>None.</p>"]),
        "<h2>Counters</h2>",
        _counters(status),
        "<h2>Domains</h2>",
        *(map(_domain, status.domains) if status.domains else ["<p>None.</p>"]),
        "<h2>Certificates</h2>",
        *(
            (_certificate(line, status.now) for line in status.certificates)
            if status.certificates
            else ["<p>None: TLS is off, and nobody can log in.</p>"]
        ),
        "<h2>Server</h2>",
        f"<p>files last read {_clock_text(status.reloaded[0])}</p>",
        *(f"<p class=bad>{html_text(problem)}</p>" for problem in status.problems),
        *(f"<p>listening for {html_text(place)}</p>" for place in status.listening),
        f"<details><summary>Configuration</summary><pre>{html_text(status.config)}</pre></details>",
        "<p class=soft><a href=metrics>metrics</a> · <a href=health>health</a></p></html>",
    ]
    return "\n".join(parts)


def _clock_text(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def _domain(line: DomainLine) -> str:
    keys = ", ".join(line.selectors)
    signed = f"signed with {html_text(keys)}" if keys else "<span class=wait>not signed</span>"
    return f"<p><b>{html_text(line.name)}</b> {plural(line.users, 'user')}, {signed}</p>"


def _certificate(line: CertificateLine, now: float) -> str:
    days = (line.expires - now) / 86400
    kind = "bad" if days < 0 else "wait" if days < 14 else "good"
    until = time.strftime("%Y-%m-%d", time.gmtime(line.expires))
    names = ", ".join(line.names)
    return (
        f"<p><b>{html_text(line.directory)}</b> for {html_text(names)}, "
        f"<span class={kind}>{'expired on' if days < 0 else 'until'} {until}</span></p>"
    )


def _tiles(status: Status) -> str:
    def total(*names: str) -> int:
        return sum(
            count for key, count in status.counters.items()
            if key[0] == names[0] and (len(names) == 1 or names[1] in key[1:])
        )  # fmt: skip

    tiles = (
        (total("messages", "queued"), "accepted", ""),
        (total("deliveries", State.SENT), "delivered", "good"),
        (
            max(status.queued, len(status.queue)),
            f"queued, of {status.queue_limit}",
            "wait",
        ),
        (total("deliveries", State.FAILED), "failed", "bad"),
        (total("rejections"), "rejected", ""),
        (status.sessions, "sessions now", ""),
        *([(total("crashes"), "crashes: see the log", "bad")] if total("crashes") else []),
    )
    return "<div class=tiles>" + "".join(
        f"<div class=tile><b class='{kind if count else ''}'>{count}</b>{html_text(text)}</div>"
        for count, text, kind in tiles
    ) + "</div>"  # fmt: skip


def _queue_line(line: QueueLine) -> str:
    rows = "".join(
        f"<p><b>{html_text(address)}</b><br>{_state(what)}</p>" for address, what in line.recipients
    )
    return (
        f"<article><code>{html_text(line.id)}</code> from &lt;{html_text(line.sender)}&gt;, "
        f"{html_text(line.age)} old, {html_text(line.next_attempt)}{rows}</article>"
    )


def _state(what: str) -> str:
    """Return what became of a recipient, its first word in the colour that it deserves."""
    word, rest = re.match(r"(\w*)(.*)", what, re.DOTALL).groups()  # type: ignore[union-attr]
    kind = "good" if word == State.SENT else "bad" if word == State.FAILED else "wait"
    return f"<span class={kind}>{html_text(word)}</span>{html_text(rest)}"


def _dialogue(dialogue: Dialogue) -> str:
    lines = "".join(
        f"<span{' class=bad' if re.match('S: [45]', line) else ''}>{html_text(line)}</span>"
        for line in dialogue.lines
    )
    how = "under way, " if dialogue.open else ""
    began = time.strftime("%H:%M:%S UTC", time.gmtime(dialogue.began))
    envelope = dialogue.sender
    if dialogue.recipients:
        envelope += f" to {', '.join(dialogue.recipients)}"
    kind = "bad" if dialogue.outcome.startswith("refused") else "good"
    return (
        f"<details><summary>{began} {html_text(dialogue.port)} {html_text(dialogue.peer)} "
        f"{html_text(envelope)} <span class={kind}>{html_text(dialogue.outcome)}</span> "
        f"<span class=soft>{how}{plural(len(dialogue.lines), 'line')}</span></summary>"
        f"<pre>{lines}</pre></details>"
    )


def _counters(status: Status) -> str:
    rows = "".join(
        f"<tr><td>{html_text(' '.join(key))}<td>{count}"
        for key, count in sorted(status.counters.items())
    )
    return f"<table>{rows}</table>" if rows else "<p>Nothing has happened yet.</p>"


_SHOWN_RECIPIENTS = 10  # of each


def queue_line(item: Item, now: float) -> QueueLine:
    """Return what MONITORING shows of a message."""
    shown = [
        (destination_text(recipient.destination), recipient_text(recipient))
        for recipient in item.recipients[:_SHOWN_RECIPIENTS]
    ]
    if len(item.recipients) > len(shown):
        shown.append(("…", f"and {len(item.recipients) - len(shown)} more"))
    age = duration_text(now - item.envelope.received)
    due = next_attempt_text(item, now)
    return QueueLine(item.id, item.envelope.sender, age, next_attempt=due, recipients=tuple(shown))


def next_attempt_text(item: Item, now: float) -> str:
    """Say when a message is attempted next."""
    if item.next_attempt <= now:
        return "being attempted" if item.attempts == 0 else "due now"
    return f"next attempt in {duration_text(item.next_attempt - now)}"


def recipient_text(recipient: Recipient) -> str:
    """Say what became of a recipient so far."""
    text = f": {recipient.result.text}" if recipient.result.text else ""
    return printable(f"{recipient.state}{text}", 300)


# ======================================================================================
# ROOM: LISTENERS
#
# How connections come in: the listening sockets, bound here or passed by systemd, and the
# certificates that are shown, chosen by the name that a client asks for.
#
# - Without descriptors, accepting pauses instead of failing.
# - Each certificate is loaded by itself. One that cannot be used is told of, and stays as it
#   was if it was there before.
#
# What is done with a connection belongs to DAEMON and CAPTURE.
# ======================================================================================

_ACCEPT_PAUSE = 1.0  # when there are no descriptors left
_BACKLOG = 1024
_FETCHED = "acme/certs"  # below data_dir; where ACME puts certificates
_EXPIRY_DAYS = 14  # before its end, that of a certificate is warned of
_SPARE_DESCRIPTORS = 300  # a message that comes in, a delivery, a name look-up: one each


def clean_peer(peer: str) -> str:
    """Return an address without what the socket adds: a mapped form, a scope."""
    peer = peer.partition("%")[0]
    mapped = peer.removeprefix("::ffff:")
    return peer if ":" in mapped else mapped


def session_limit() -> int:
    """Return how many connections leave descriptors for the queue and the couriers."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 100_000 if soft == resource.RLIM_INFINITY else soft
    return max(limit // 2, limit - _SPARE_DESCRIPTORS)


async def connections(
    loop: Loop, log: Log, name: str, listener: socket.socket
) -> AsyncIterator[tuple[socket.socket, Any]]:
    """Yield each connection with its peer; without descriptors, pause instead of failing."""
    while True:
        try:
            yield listener.accept()
        except BlockingIOError:
            await loop.readable(listener.fileno())
        except ConnectionAbortedError:
            continue
        except OSError as error:
            log.error("listener", f"cannot accept for {name}: {reason(error)}; pausing")
            await loop.sleep(_ACCEPT_PAUSE)


def listen(host: str, port: int, *, once: bool = False) -> list[socket.socket]:
    """Return sockets that listen at `host`, one for each of its addresses.

    "" means all addresses of this machine, 0 any port that is free; with `once`, the first
    address is enough. Raises ChasquidError.
    """
    place = f"{host}:{port}"
    if type(port) is not int or not 0 <= port <= 65535:
        text = "the port must be a number from 0 to 65535"
        raise ChasquidError(f"{place} is no address to listen at: {text}")
    name = host.encode() if host.isascii() else host  # for any str, Python loads its IDNA codec
    try:
        found: list[Any] = socket.getaddrinfo(
            name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, ValueError) as error:
        raise ChasquidError(f"{place} is no address to listen at: {reason(error)}") from error
    six = [entry for entry in found if entry[0] == socket.AF_INET6]
    if not host and six:
        found = six  # one socket serves IPv4 as well, through mapped addresses
    with contextlib.ExitStack() as undo:
        sockets = []
        for entry in found[:1] if once else found:
            sockets.append(_listen_at(place, entry, both_families=not host))
            undo.callback(sockets[-1].close)
        undo.pop_all()
    return sockets


def _listen_at(place: str, entry: Any, both_families: bool) -> socket.socket:
    """Return a socket for what getaddrinfo has said. Raises ChasquidError."""
    try:
        raw = socket.socket(*entry[:3])
    except OSError as error:
        raise ChasquidError(f"cannot listen on {place}: {reason(error)}") from error
    try:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if entry[0] == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both_families else 1)
        raw.bind(entry[4])
        raw.listen(_BACKLOG)
        raw.setblocking(False)
    except OSError as error:
        raw.close()
        text = f"cannot listen on {place}: {error.strerror}"
        if error.errno == errno.EACCES:
            text += "; ports below 1024 are for root, systemd's sockets or setcap"
        raise ChasquidError(text) from error
    return raw


class Certificate(NamedTuple):
    """A certificate: its directory, its names, when it expires (since 1970).

    `directory` is the name of one in config_dir/certs, or that of one of data_dir/acme/certs
    with "acme/certs/" before it. `proven` is false if it is its own issuer.
    """

    directory: str
    names: frozenset[str]
    expires: float
    context: ssl.SSLContext
    proven: bool = True

    @property
    def is_fetched(self) -> bool:
        """Whether it came by ACME, and is renewed without anybody's doing."""
        return self.directory.startswith(f"{_FETCHED}/")

    def covers(self, host: str) -> bool:
        """Tell whether it is for `host`, perhaps by a wildcard (RFC 6125, 6.4.3)."""
        return host in self.names or "*." + host.partition(".")[2] in self.names


class Certificates:
    """The certificates that there are, one directory each, chosen by SNI (RFC 6066).

    Those of config_dir/certs win over those that ACME has fetched, and a self-signed one loses
    to any other. Each is loaded by itself. One that cannot be used is among the `problems`, and
    stays as it was in `before`, if it was there.
    """

    def __init__(
        self, config: Config, before: Certificates | None = None, *, fetched: bool = True
    ) -> None:
        self.problems: list[str] = []
        self.loaded: dict[str, Certificate] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._load_below(config.config_dir, "certs", before)
        if fetched:
            self._load_below(config.data_dir, _FETCHED, before)
        for certificate in sorted(self.loaded.values(), key=lambda found: not found.proven):
            for host in certificate.names | {os.path.basename(certificate.directory).lower()}:
                self._contexts.setdefault(host, certificate.context)
        first = next((certificate.context for certificate in self.loaded.values()), None)
        self.default = self._find(domain_to_ascii(config.hostname)) or first

    def _load_below(self, base: str, top: str, before: Certificates | None) -> None:
        directory = os.path.join(base, top)
        try:
            names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        except OSError as error:
            self.problems.append(f"{directory}: it cannot be read: {error.strerror}")
            names = [
                os.path.basename(certificate.directory)
                for certificate in (before.loaded.values() if before else ())
                if certificate.is_fetched == (top == _FETCHED)
            ]
        for name in names:
            known = name if top != _FETCHED else f"{top}/{name}"
            certificate = self._load(known, os.path.join(directory, name))
            if certificate is None and before is not None:
                certificate = before.loaded.get(known)
            if certificate is not None:
                self.loaded[known] = certificate

    def _load(self, name: str, directory: str) -> Certificate | None:
        """Load one; None, and a problem, if it cannot be used."""
        try:
            chain, key = _certificate_files(directory)
            missing = [path for path in (chain, key) if not os.path.exists(path)]
            if len(missing) == 1:
                self.problems.append(f"{missing[0]} is missing, so the directory is left out")
            if missing:
                return None
            context = server_tls_context(chain, key)
            pem = read_file(chain)
            context.sni_callback = self._choose
            return Certificate(
                name,
                frozenset(certificate_names(pem)),
                certificate_expiry(pem),
                context,
                proven=not is_self_signed(pem),
            )
        except (ConfigError, ValueError) as error:
            self.problems.append(str(error))
            return None

    def warnings(self, now: float, hosts: Iterable[str]) -> Iterator[str]:
        """Yield what will not work, or soon no more, for clients that ask for `hosts`."""
        for certificate in self.loaded.values():
            if certificate.is_fetched and all(
                self.is_proven(name, fetched=False) for name in certificate.names
            ):
                continue
            days = (certificate.expires - now) / 86400.0
            what, remedy = f"the certificate in certs/{certificate.directory}", "renew it"
            if certificate.is_fetched:
                what = f"the certificate in {certificate.directory}"
                remedy = "the log says why; remove it if it is of no use"
            if days < 0:
                yield f"{what} has expired, on {rfc5322_date(certificate.expires)}: {remedy}"
            elif days < _EXPIRY_DAYS:
                yield f"{what} expires in {plural(int(days), 'day')}: {remedy}"
        for host in hosts:
            if self.loaded and not self.cover(host):
                yield f"no certificate in certs is for {host}"

    def is_proven(self, host: str, fetched: bool = True) -> bool:
        """Tell whether there is one for `host` that an authority has issued.

        Without `fetched`, those of ACME do not count.
        """
        return any(
            certificate.proven
            and certificate.covers(host)
            and (fetched or not certificate.is_fetched)
            for certificate in self.loaded.values()
        )

    def cover(self, host: str) -> bool:
        """Tell whether one of them is for `host`."""
        return any(certificate.covers(host) for certificate in self.loaded.values())

    def _find(self, host: str) -> ssl.SSLContext | None:
        wildcard = "*." + host.partition(".")[2]
        return self._contexts.get(host) or self._contexts.get(wildcard)

    def _choose(self, tls: Any, host: str | None, context: ssl.SSLContext) -> None:
        found = self._find(host.lower()) if host else None
        if found is not None:
            tls.context = found


def _certificate_files(directory: str) -> tuple[str, str]:
    """Return where the chain and the key are: as certbot names them, or acme.sh.

    acme.sh has fullchain.cer, and one key, NAME.key. Raises ConfigError for what cannot be
    looked into: a link that leads nowhere, or to where only root may go.
    """
    chain, key = (os.path.join(directory, file) for file in ("fullchain.pem", "privkey.pem"))
    if os.path.isdir(directory) or os.path.islink(directory):
        try:
            files = os.listdir(directory)
            for path in (chain, key):
                if os.path.basename(path) in files:
                    os.stat(path)  # it may be a link too
        except OSError as error:
            text = f"the certificate cannot be read: {error.strerror}"
            raise ConfigError(error.filename or directory, 0, text) from error
        keys = [name for name in files if name.endswith(".key")]
        if "fullchain.cer" in files and "fullchain.pem" not in files and len(keys) == 1:
            chain, key = (os.path.join(directory, name) for name in ("fullchain.cer", keys[0]))
    return chain, key


class Listeners:
    """The listening sockets, ours or systemd's. Raises ConfigError.

    systemd passes its sockets with names ("FileDescriptorName=" in the socket unit): smtp,
    submission, submission_tls, monitoring, web; see sd_listen_fds(3).
    """

    def __init__(self, config: Config) -> None:
        self.sockets: list[tuple[Port, socket.socket]] = []
        inherited = self._inherited()
        kinds = (
            (SMTP_PORT, "smtp", "smtp_address", config.smtp_address),
            (SUBMISSION_PORT, "submission", "submission_address", config.submission_address),
            (
                SUBMISSION_TLS_PORT, "submission_tls", "submission_over_tls_address",
                config.submission_over_tls_address,
            ),
        )  # fmt: skip
        for port, name, key, addresses in kinds:
            for address in addresses:
                if address == "systemd":
                    self.sockets += [(port, raw) for raw in inherited.get(name, [])]
                else:
                    self.sockets += [(port, raw) for raw in self._bind(address, config, key)]
        self.web: list[socket.socket] = []
        # with ACME, port 80 as systemd passes it serves even if nothing else does
        for address in config.web_address or (("systemd",) if config.acme else ()):
            if address == "systemd":
                self.web += inherited.get("web", [])
            else:
                self.web += self._bind(address, config, "web_address")
        self.monitoring: list[socket.socket] = []
        address = config.monitoring_address
        if address == "systemd":
            self.monitoring += inherited.get("monitoring", [])
        elif address:
            self.monitoring += self._bind(address, config, "monitoring_address")
        if not self.sockets:
            path = os.path.join(config.config_dir, "chasquid.conf")
            text = "expected smtp_address or another address to listen on, or systemd's sockets"
            raise ConfigError(path, 0, text)

    def close(self, loop: Loop | None = None) -> None:
        """Close all sockets, which `loop` may wait for; connections that were accepted stay."""
        for raw in [*self.web, *self.monitoring, *(raw for _, raw in self.sockets)]:
            if loop is not None and raw.fileno() >= 0:
                loop.forget(raw.fileno())
            raw.close()

    @staticmethod
    def _inherited() -> dict[str, list[socket.socket]]:
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return {}
        found: dict[str, list[socket.socket]] = {}
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        for number in range(int(os.environ.get("LISTEN_FDS", "0"))):
            raw = socket.socket(fileno=3 + number)
            raw.setblocking(False)
            name = names[number] if number < len(names) else "unknown"
            found.setdefault(name, []).append(raw)
        return found

    @staticmethod
    def _bind(address: str, config: Config, key: str) -> list[socket.socket]:
        try:
            return listen(*host_and_port(address, 0))
        except ChasquidError as error:
            path = os.path.join(config.config_dir, "chasquid.conf")
            raise ConfigError(path, 0, f"{key}: {error}") from error


# ======================================================================================
# ROOM: WEB
#
# The few pages that a mail server owes to the world, over HTTP and HTTPS on the same ports
# (`web_address`): the first octet of a connection tells which it is.
#
# - What an authority asks for before it issues a certificate (`Challenges`): HTTP-01 (RFC
#   8555, 8.3) and TLS-ALPN-01 (RFC 8737).
# - The MTA-STS policy of a domain of ours, at mta-sts.DOMAIN (RFC 8461, 3.2).
# - How a mail program is set up for a domain: Thunderbird's autoconfig, and Outlook's
#   autodiscover. Both say the same: this host, IMAP on 993, submission on 465 and 587.
# - All else is not found. There are no files, so no path leads to one.
#
# Anybody may come: a client has a few connections at a time, and each has ten seconds. What it
# sent comes back only as text in XML, and only if it is an address of a domain of ours.
# ======================================================================================

_CHALLENGE_PATH = "/.well-known/acme-challenge/"
_WEB_CONNECTIONS = 100  # at a time; they share the spare descriptors
_WEB_CONNECTIONS_EACH = 10  # of one client
_WEB_BODY_LIMIT = 10 * 1024  # octets
_TLS_HANDSHAKE = 0x16  # the first octet of a TLS connection; RFC 8446, 5.1
_TLS_RECORD_LIMIT = 5 + 16384  # octets
_STS_MAX_AGE = 604_800  # seconds; RFC 8461, 3.2 suggests weeks
_ACME_PROTOCOL = "acme-tls/1"  # RFC 8737, 4


class Challenges:
    """What shows an authority that a name is ours, as long as it may ask.

    `tokens` holds key authorizations by token (HTTP-01).
    """

    def __init__(self) -> None:
        self.tokens: dict[str, str] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}

    def add(self, name: str, context: ssl.SSLContext) -> None:
        """Have TLS done with `context` for an authority that asks for `name` (TLS-ALPN-01)."""
        context.set_alpn_protocols([_ACME_PROTOCOL])
        context.sni_callback = self._choose
        self._contexts[name] = context

    def remove(self, name: str) -> None:
        """Forget what `add` was told."""
        del self._contexts[name]

    @property
    def context(self) -> ssl.SSLContext | None:
        """What begins TLS with an authority; the name that it asks for decides then."""
        return next(iter(self._contexts.values()), None)

    def _choose(self, tls: Any, host: str | None, context: ssl.SSLContext) -> int | None:
        chosen = self._contexts.get((host or "").lower())
        if chosen is None:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        tls.context = chosen
        return None


class WebSite(NamedTuple):
    """What is served: the host, its domains, and their policy, all in A-labels."""

    hostname: str = ""
    domains: frozenset[str] = frozenset()
    sts_policy: str = ""


def sts_policy_text(hosts: Sequence[str], mode: str = "enforce") -> str:
    """Return the MTA-STS policy of a domain whose mail exchangers are `hosts`; RFC 8461, 3.2."""
    mx = "".join(f"mx: {host}\n" for host in hosts)
    return f"version: STSv1\nmode: {mode}\n{mx}max_age: {_STS_MAX_AGE}\n"


def sts_policy_id(policy: str) -> str:
    """Return the id under which the TXT record announces `policy`; RFC 8461, 3.1."""
    return short_hash(policy)


class Web:
    """Answers HTTP and HTTPS requests, one a connection.

    `site` says what is served now; `context` is what TLS is done with, None if there is no
    certificate.
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        challenges: Challenges,
        site: Callable[[], WebSite] = WebSite,
        context: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._log = log
        self._challenges = challenges
        self._site = site
        self._context = context
        self._open: collections.Counter[str] = collections.Counter()

    async def serve(self, listener: socket.socket) -> None:
        """Answer what comes to a listening socket, until the task is cancelled."""
        async for raw, peer in connections(self._loop, self._log, "web", listener):
            client = clean_peer(str(peer[0])) if peer else "local"
            if (
                self._open[client] >= _WEB_CONNECTIONS_EACH
                or self._open.total() >= _WEB_CONNECTIONS
            ):
                raw.close()
                continue
            self._open[client] += 1
            self._loop.spawn(self._answer(raw, client), "web request")

    async def _answer(self, raw: socket.socket, client: str) -> None:
        stream = Stream(self._loop, raw)
        try:
            with self._loop.deadline(HTTP_SECONDS):
                if await self._begin(stream, raw):
                    stream.write(await self._respond(stream))
                    await stream.flush()
        except (Disconnected, Expired, LineTooLong, BareNewline, TLSFailed, ValueError):
            pass  # whoever asked is gone, or speaks something else
        except Exception as error:
            self._log.crash("web", error)
        finally:
            self._open -= collections.Counter([client])
            await stream.finish()

    async def _begin(self, stream: Stream, raw: socket.socket) -> bool:
        """Start TLS if the client does; tell whether a request follows."""
        first = await peek_at_hello(self._loop, raw)
        if not first.startswith(bytes([_TLS_HANDSHAKE])):
            return True
        is_challenge = offers_acme_protocol(first)
        context = self._challenges.context if is_challenge else self._context()
        if context is None:
            raise TLSFailed("there is no certificate")
        await stream.start_tls(context, server_side=True)
        return not is_challenge  # RFC 8737, 3: nothing is sent but the certificate

    async def _respond(self, stream: Stream) -> bytes:
        request = await read_request(stream)
        try:
            body = await read_body(stream, request, _WEB_BODY_LIMIT)
        except HttpRefused as error:
            return http_response(error.status, "text/plain", f"{error}\n")
        return self.respond(request, body)

    def respond(self, request: HttpRequest, body: bytes = b"") -> bytes:
        """Return the response to a request."""
        status, kind, text = 404, "text/plain", "there is nothing here\n"
        if request.method in ("GET", "HEAD"):
            found = self._page(request)
        else:
            found = self._autodiscover(request, body) if request.method == "POST" else None
        if found is not None:
            status, (kind, text) = 200, found
        response = http_response(status, kind, text)
        return response if request.method != "HEAD" else without_body(response)

    def _page(self, request: HttpRequest) -> tuple[str, str] | None:
        """Return kind and text of what a GET asks for; None if there is no such page."""
        token = request.path.removeprefix(_CHALLENGE_PATH)
        if token != request.path:
            text = self._challenges.tokens.get(token)
            return None if text is None else ("application/octet-stream", text)
        site = self._site()
        kind, domain = _split_host(request)
        if domain not in site.domains:
            return None
        if (kind, request.path) == ("mta-sts", "/.well-known/mta-sts.txt") and site.sts_policy:
            return "text/plain", site.sts_policy
        if request.path in _AUTOCONFIG_PATHS[kind]:
            return "text/xml; charset=utf-8", autoconfig_text(domain, site.hostname)
        return None

    def _autodiscover(self, request: HttpRequest, body: bytes) -> tuple[str, str] | None:
        """Answer Outlook, which sends an address in XML (MS-OXDSCLI, 2.2.3)."""
        if request.path.lower() != "/autodiscover/autodiscover.xml":
            return None
        text = body.decode("utf-8", "replace")
        match = re.search(r"<EMailAddress>\s*([^<>\s]{3,320})\s*</EMailAddress>", text)
        address = _xml_decoded(match[1]) if match else ""
        site = self._site()
        try:
            if domain_to_ascii(split_address(address)[1]) not in site.domains:
                return None
        except ValueError:
            return None
        return "text/xml; charset=utf-8", autodiscover_text(address, site.hostname)


async def peek_at_hello(loop: Loop, raw: socket.socket) -> bytes:
    """Return what a client sends first, and leave it in the socket.

    Of TLS it is the whole first record (RFC 8446, 5.1). Raises Disconnected, Expired.
    """
    while True:
        await loop.readable(raw.fileno())
        try:
            seen = raw.recv(_TLS_RECORD_LIMIT, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        except OSError as error:
            raise Disconnected(f"the connection broke: {reason(error)}") from error
        if not seen:
            raise Disconnected("the other side closed the connection")
        if seen[0] != _TLS_HANDSHAKE or (
            len(seen) >= min(5 + int.from_bytes(seen[3:5], "big"), _TLS_RECORD_LIMIT)
        ):
            return seen
        await loop.sleep(0.01)  # what was peeked at would wake us at once


def offers_acme_protocol(hello: bytes) -> bool:
    """Tell whether a ClientHello offers "acme-tls/1" (RFC 7301, 3.1): so does an authority alone.

    It is searched for, not parsed: who has the name elsewhere in it gets an answer of no use.
    """
    return bytes([len(_ACME_PROTOCOL)]) + _ACME_PROTOCOL.encode() in hello


# Where Thunderbird looks, on autoconfig.DOMAIN and on DOMAIN itself.
_AUTOCONFIG_PATHS = {
    "autoconfig": ("/mail/config-v1.1.xml", "/.well-known/autoconfig/mail/config-v1.1.xml"),
    "": ("/.well-known/autoconfig/mail/config-v1.1.xml",),
    "mta-sts": (),
}


def _split_host(request: HttpRequest) -> tuple[str, str]:
    """Return which of a domain's names was asked, and the domain."""
    try:
        host = host_name(request.headers.get("host", "")).rstrip(".")
    except ValueError:
        return "", ""
    for kind in filter(None, _AUTOCONFIG_PATHS):
        if host.startswith(f"{kind}."):
            return kind, host.removeprefix(f"{kind}.")
    return "", host


def _xml_decoded(text: str) -> str:
    """Return `text` without the entities that every XML has."""
    for name, mark in (("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"), ("amp", "&")):
        text = text.replace(f"&{name};", mark)
    return text


# Each with its port, the words of Thunderbird for its kind and its security, those of Outlook.
_MAIL_SERVICES = (
    ("incoming", "imap", 993, "SSL", "IMAP", "SSL"),
    ("outgoing", "smtp", 465, "SSL", "SMTP", "SSL"),
    ("outgoing", "smtp", 587, "STARTTLS", "SMTP", "TLS"),
)


def autoconfig_text(domain: str, host: str) -> str:
    """Return how Thunderbird sets itself up for `domain` (config-v1.1.xml)."""
    domain, host = html_text(domain), html_text(host)
    servers = "".join(
        f'<{way}Server type="{kind}"><hostname>{host}</hostname><port>{port}</port>'
        f"<socketType>{security}</socketType><authentication>password-cleartext</authentication>"
        f"<username>%EMAILADDRESS%</username></{way}Server>\n"
        for way, kind, port, security, _, _ in _MAIL_SERVICES
    )
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<clientConfig version="1.1">\n'
        f'<emailProvider id="{domain}"><domain>{domain}</domain>'
        f"<displayName>{domain}</displayName><displayShortName>{domain}</displayShortName>\n"
        f"{servers}</emailProvider>\n</clientConfig>\n"
    )


def autodiscover_text(address: str, host: str) -> str:
    """Return how Outlook sets itself up for `address` (MS-OXDSCLI, 2.2.4)."""
    login, host = html_text(address), html_text(host)
    protocols = "".join(
        f"<Protocol><Type>{kind}</Type><Server>{host}</Server><Port>{port}</Port>"
        f"<LoginName>{login}</LoginName><SPA>off</SPA><SSL>on</SSL>"
        f"<Encryption>{security}</Encryption><AuthRequired>on</AuthRequired></Protocol>\n"
        for _, _, port, _, kind, security in _MAIL_SERVICES[:2]
    )
    schema = "http://schemas.microsoft.com/exchange/autodiscover"
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n'
        f'<Autodiscover xmlns="{schema}/responseschema/2006">\n'
        f'<Response xmlns="{schema}/outlook/responseschema/2006a">\n'
        f"<Account><AccountType>email</AccountType><Action>settings</Action>\n"
        f"{protocols}</Account></Response></Autodiscover>\n"
    )


# ======================================================================================
# ROOM: ACME
#
# Certificates from an authority that issues them to programs (RFC 8555), such as Let's
# Encrypt, and their renewal.
#
# - Each name has a certificate of its own, so that one that fails keeps no other waiting:
#   data_dir/acme/certs/NAME/{fullchain,privkey}.pem. The account's key is in
#   data_dir/acme/account.pem. A renewal keeps the key, so that a TLSA record goes on to fit.
# - It is renewed from 30 days before its end, or in the last third of its life if that is
#   shorter. A failure is warned of from the first on, with what the authority said. The next
#   attempt is after five minutes, then twice as long each time, up to a day; later if the
#   authority asks for it.
# - A name is asked for only if the DNS has it lead here. Two challenges can show that: HTTP-01
#   on port 80 and TLS-ALPN-01 on port 443. If one fails, the other is tried at once. Without a
#   web listener, port 80 is listened on as long as an order runs, and for challenges alone.
# - Requests block, so each is a job for a worker thread; what waits in between is a task.
#
# Which names there are, and what becomes of a new certificate, is for DAEMON to say.
# ======================================================================================

_ACME_CALL_SECONDS = 10.0  # for each step of a request
_ACME_ANSWER_LIMIT = 256 * 1024  # octets
_ACME_ORDER_SECONDS = 300.0  # for an order, or for a challenge
_ACME_POLL_SECONDS = (0.1, 3.0, 60.0)  # at least, if the authority does not say, at most
_ACME_NONCE_TRIES = 10
_ACME_PAUSES = (300.0, 86400.0)  # after a failure: the first, and the longest of our own
_HOST_PAUSE = 3600.0  # the longest as long as the host's own name is not in the DNS
_ACME_LONGEST_PAUSE = 7 * 86400.0  # that an authority is followed in
_RENEWAL_SECONDS = 30 * 86400.0  # before the end
_ROUND_SECONDS = 86400.0  # from one look at all certificates to the next, at most
HTTP_01, TLS_ALPN_01 = "http-01", "tls-alpn-01"


class AcmeFailed(ChasquidError):
    """An authority did not do what it was asked for.

    `kind` is the last part of its error's type (RFC 8555, 6.7), or ""; `pause` the seconds
    after which it is to be asked again, 0 if it did not say.
    """

    def __init__(self, text: str, kind: str = "", pause: float = 0.0) -> None:
        super().__init__(text)
        self.kind = kind
        self.pause = pause


class AcmeAnswer(NamedTuple):
    """The response of an authority; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def document(self) -> dict[str, Any]:
        """Return the JSON object in it. Raises AcmeFailed."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):  # of what is nested deeply
            value = None
        if not isinstance(value, dict):
            raise AcmeFailed("the authority answers with what is no JSON object")
        return value

    def pause(self, now: float) -> float:
        """Return the seconds that Retry-After asks for (RFC 9110, 10.2.3), or -1."""
        from email.utils import mktime_tz, parsedate_tz  # http.client has loaded it

        value = self.headers.get("retry-after", "")
        if re.fullmatch(r"[0-9]{1,9}", value):
            return float(value)
        try:
            date = parsedate_tz(value)
            return max(0.0, mktime_tz(date) - now) if date else -1.0
        except (ValueError, OverflowError):  # of a year or a number that there is not
            return -1.0


AcmeCall = Callable[[str, str, bytes], AcmeAnswer]  # method, URL, body; blocks


def acme_caller() -> AcmeCall:
    """Return what sends a request to an authority, whose certificate the system must know."""
    import http.client  # 22 ms, and only if certificates are fetched
    from urllib.parse import urlsplit

    context = client_tls_context(verify=True)

    def connection_to(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        if scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=_ACME_CALL_SECONDS, context=context
            )
        if scheme == "http" and is_loopback(host):  # only tests have such an authority
            return http.client.HTTPConnection(host, port, timeout=_ACME_CALL_SECONDS)
        raise ValueError("expected an address that begins with https://")

    def call(method: str, url: str, body: bytes) -> AcmeAnswer:
        headers = {"User-Agent": f"chasquid/{__version__}"}
        if body:
            headers["Content-Type"] = "application/jose+json"
        try:
            place = urlsplit(url)
            target = (place.path or "/") + (f"?{place.query}" if place.query else "")
            connection = connection_to(place.scheme, place.hostname or "", place.port)
            with contextlib.closing(connection):
                connection.request(method, target, body or None, headers)
                response = connection.getresponse()
                data = response.read(_ACME_ANSWER_LIMIT)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AcmeFailed(f"{printable(url, 200)} cannot be asked: {reason(error)}") from error
        fields = {name.lower(): value for name, value in response.getheaders()}
        return AcmeAnswer(response.status, fields, data)

    return call


def acme_terms(url: str, call: AcmeCall | None = None) -> str:
    """Return where the terms of the authority are whose directory is `url`; "" if it has none.

    Blocks. Raises ChasquidError.
    """
    document = _unless_error((call or acme_caller())("GET", url, b""), time.time()).document()
    meta = document.get("meta")
    terms = meta.get("termsOfService") if isinstance(meta, dict) else None
    return printable(terms) if isinstance(terms, str) else ""


def _unless_error(answer: AcmeAnswer, now: float) -> AcmeAnswer:
    """Return an answer that is no error; raise AcmeFailed for one that is (RFC 7807)."""
    if answer.status < 300:
        return answer
    try:
        problem = answer.document()
    except AcmeFailed:
        problem = {}
    pause = max(0.0, answer.pause(now))
    raise _failure_of(problem, f"status {answer.status}", pause)


def _failure_of(problem: object, otherwise: str, pause: float = 0.0) -> AcmeFailed:
    """Return what a problem document says as an error; RFC 8555, 6.7."""
    fields = problem if isinstance(problem, dict) else {}
    kind = str(fields.get("type", "")).rpartition(":")[2]
    text = str(fields.get("detail", "")) or otherwise
    return AcmeFailed(f"the authority says: {printable(text, 300)}", printable(kind, 40), pause)


def _text_in(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise AcmeFailed(f"the authority's answer has no {key!r}")
    return value


def _list_in(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise AcmeFailed(f"the authority's answer has no list {key!r}")
    return value


def _base64url(data: bytes) -> str:
    """RFC 7515, 2."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _json_octets(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _public_jwk(key: EcKey) -> dict[str, str]:
    """Return the public key, its members in the order of RFC 7638, 3.2."""
    x, y = (_base64url(number.to_bytes(32, "big")) for number in (key.x, key.y))
    return {"crv": "P-256", "kty": "EC", "x": x, "y": y}


def key_thumbprint(key: EcKey) -> str:
    """Return what stands for an account's key in a key authorization; RFC 8555, 8.1."""
    import hashlib  # loads OpenSSL's hashes; only for challenges

    return _base64url(hashlib.sha256(_json_octets(_public_jwk(key))).digest())


def signed_request(key: EcKey, header: Mapping[str, object], payload: object) -> bytes:
    """Return a request signed with ES256 (RFC 7515, 7.2.2; RFC 7518, 3.4).

    The payload is empty if it is None, as RFC 8555, 6.3 wants it.
    """
    protected = _base64url(_json_octets({"alg": "ES256", **header}))
    body = "" if payload is None else _base64url(_json_octets(payload))
    r, s = key.sign(f"{protected}.{body}".encode())
    signature = _base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big"))
    return _json_octets({"protected": protected, "payload": body, "signature": signature})


class AcmeClient:
    """Speaks to one authority for one account; raises AcmeFailed, Expired, OSError."""

    def __init__(
        self, loop: Loop, call: AcmeCall, url: str, key: EcKey, challenges: Challenges
    ) -> None:
        self._loop = loop
        self._call = call
        self._url = url
        self._key = key
        self._challenges = challenges
        self._directory: dict[str, Any] = {}
        self._nonce = ""
        self._account = ""

    async def certificate(self, name: str, key: EcKey, kind: str) -> bytes:
        """Return a chain for `name` in PEM, having met a challenge of this kind.

        The failure of a challenge has the kind "challenge".
        """
        await self._open()
        with self._loop.deadline(_ACME_ORDER_SECONDS):
            identifiers = {"identifiers": [{"type": "dns", "value": name}]}
            answer = await self._post(_text_in(self._directory, "newOrder"), identifiers)
            place, order = answer.headers.get("location", ""), answer.document()
            for url in _list_in(order, "authorizations"):
                await self._authorize(name, str(url), kind)
            request = await self._loop.work(lambda: certificate_request(key, name))
            finalization = {"csr": _base64url(request)}
            await self._post(_text_in(order, "finalize"), finalization)
            order = await self._settled(place, "pending", "ready", "processing")
            if order.get("status") != "valid":
                raise _failure_of(order.get("error"), "the order has failed")
            return (await self._post(_text_in(order, "certificate"), None)).body

    async def _open(self) -> None:
        """Have an account; the same key has the same one (RFC 8555, 7.3.1)."""
        if self._account:
            return
        answer = await self._loop.work(lambda: self._call("GET", self._url, b""))
        self._directory = _unless_error(answer, self._loop.clock.time()).document()
        url = _text_in(self._directory, "newAccount")
        answer = await self._post(url, {"termsOfServiceAgreed": True})
        self._account = _text_in(answer.headers, "location")

    async def _authorize(self, name: str, url: str, kind: str) -> None:
        """Show that `name` is ours; RFC 8555, 7.5."""
        authorization = (await self._post(url, None)).document()
        if authorization.get("status") == "valid":
            return
        offered = {
            challenge.get("type"): challenge
            for challenge in _list_in(authorization, "challenges")
            if isinstance(challenge, dict)
        }
        if kind not in offered:
            raise AcmeFailed(f"the authority offers no challenge {kind} for {name}", "challenge")
        token = _text_in(offered[kind], "token")
        async with self._answering(kind, name, token):
            await self._post(_text_in(offered[kind], "url"), {})
            authorization = await self._settled(url, "pending")
        if authorization.get("status") != "valid":
            failures = [
                challenge.get("error")
                for challenge in _list_in(authorization, "challenges")
                if isinstance(challenge, dict) and challenge.get("error")
            ]
            failure = _failure_of(failures[0] if failures else None, "the challenge has failed")
            raise AcmeFailed(f"{failure} ({kind})", "challenge")

    @contextlib.asynccontextmanager
    async def _answering(self, kind: str, name: str, token: str) -> AsyncIterator[None]:
        """Have the web listener answer the challenge meanwhile; RFC 8555, 8.3, RFC 8737, 3."""
        authorization = f"{token}.{key_thumbprint(self._key)}"
        if kind == HTTP_01:
            self._challenges.tokens[token] = authorization
            try:
                yield
            finally:
                del self._challenges.tokens[token]
            return
        now = self._loop.clock.time()
        context = await self._loop.work(lambda: _challenge_context(name, authorization, now))
        self._challenges.add(name, context)
        try:
            yield
        finally:
            self._challenges.remove(name)

    async def _settled(self, url: str, *waiting: str) -> dict[str, Any]:
        """Return an order or an authorization when its status is none of `waiting`."""
        least, usual, most = _ACME_POLL_SECONDS
        while True:
            answer = await self._post(url, None)
            document = answer.document()
            if document.get("status") not in waiting:
                return document
            pause = answer.pause(self._loop.clock.time())
            await self._loop.sleep(usual if pause < 0 else min(max(pause, least), most))

    async def _post(self, url: str, payload: object) -> AcmeAnswer:
        """Send a signed request, anew with another nonce if this one was too old (6.5)."""
        for _ in range(_ACME_NONCE_TRIES):
            header = {"nonce": await self._next_nonce(), "url": url}
            answer = await self._loop.work(functools.partial(self._send, header, payload))
            self._nonce = answer.headers.get("replay-nonce", "")
            try:
                return _unless_error(answer, self._loop.clock.time())
            except AcmeFailed as error:
                if error.kind != "badNonce":
                    raise
        raise AcmeFailed("the authority takes none of its own nonces")

    def _send(self, header: Mapping[str, object], payload: object) -> AcmeAnswer:
        who = {"kid": self._account} if self._account else {"jwk": _public_jwk(self._key)}
        return self._call(
            "POST", str(header["url"]), signed_request(self._key, {**header, **who}, payload)
        )

    async def _next_nonce(self) -> str:
        if not self._nonce:
            url = _text_in(self._directory, "newNonce")
            answer = await self._loop.work(lambda: self._call("HEAD", url, b""))
            self._nonce = _text_in(
                _unless_error(answer, self._loop.clock.time()).headers, "replay-nonce"
            )
        nonce, self._nonce = self._nonce, ""
        return nonce


def _challenge_context(name: str, authorization: str, now: float) -> ssl.SSLContext:
    """Return what answers TLS-ALPN-01. The module ssl reads certificates from files alone."""
    import hashlib
    import tempfile

    digest = hashlib.sha256(authorization.encode()).digest()
    chain, key = challenge_certificate(name, digest, now)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "both.pem")
        create_synced(path, [chain.encode(), key.encode()])
        return server_tls_context(path, path)


# --- the files ---


def acme_account_key(directory: str) -> EcKey:
    """Return the account's key; it is made if there is none. Raises ConfigError, OSError."""
    path = os.path.join(directory, "account.pem")
    pem = read_file(path, missing=b"")
    if pem:
        return parse_ec_key(pem, path)
    key = new_ec_key()
    make_directory(directory)
    replace_durably(path, key.to_pem().encode())
    return key


class FetchedCertificate(NamedTuple):
    """The directory of one name."""

    directory: str

    @property
    def chain(self) -> str:
        """Its path."""
        return os.path.join(self.directory, "fullchain.pem")

    @property
    def private_key(self) -> str:
        """Its path."""
        return os.path.join(self.directory, "privkey.pem")

    def renewal(self) -> tuple[float, float]:
        """Return from when it is to be renewed, and when it ends; (0, 0) if there is none."""
        try:
            pem = read_file(self.chain, missing=b"")
            began, ends = certificate_validity(pem)
            if is_self_signed(pem):
                return 0.0, 0.0
            server_tls_context(self.chain, self.private_key)
        except (ConfigError, ValueError):  # it cannot be used
            return 0.0, 0.0
        return ends - min(_RENEWAL_SECONDS, (ends - began) / 3), ends

    def key(self) -> EcKey:
        """Return the key that it has, or a new one. Raises ConfigError."""
        pem = read_file(self.private_key, missing=b"")
        try:
            return parse_ec_key(pem, self.private_key)
        except ConfigError:
            return new_ec_key()

    def store(self, name: str, key: EcKey, chain: bytes) -> None:
        """Keep what was issued, if it fits: the key first. Raises AcmeFailed, OSError."""
        if name not in certificate_names(chain):
            raise AcmeFailed(f"the authority has issued a certificate that is not for {name}")
        make_directory(self.directory)
        temporary = f"{self.chain}.{new_id()}"
        try:
            create_synced(temporary, [chain, b"\n", key.to_pem().encode()])
            server_tls_context(temporary, temporary)
        finally:
            discard_names(temporary)
        replace_durably(self.private_key, key.to_pem().encode())
        replace_durably(self.chain, chain)


# --- the certificates of this host ---


class _Progress:
    """How far a name has come: failures in a row, and not before when it is tried again."""

    __slots__ = ("failures", "not_before", "problem", "unresolved")

    def __init__(self, not_before: float = 0.0) -> None:
        self.failures = 0
        self.not_before = not_before
        self.problem = ""
        self.unresolved = False


def _listen_for_challenges(port: int = 80) -> list[socket.socket]:
    try:
        return listen("", port)
    except ChasquidError as error:
        text = "the authority must reach port 80; enable chasquid-web.socket, or set web_address"
        raise ChasquidError(f"{error}; {text}") from error


class AcmeSettings(NamedTuple):
    """What DAEMON decides: whom to ask, where the files are, and what this host is.

    `ports` are those of the web listener; if there are none, `open_port` gives sockets for the
    time of an order.
    """

    url: str
    directory: str
    hostname: str
    ports: frozenset[int]
    open_port: Callable[[], list[socket.socket]] = _listen_for_challenges


class Acme:
    """Has a certificate for each name, and renews it in time.

    `wanted` says which names there are, that of this host among them; `renewed` is called when
    there is a new certificate.
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        ask: Ask,
        settings: AcmeSettings,
        challenges: Challenges,
        wanted: Callable[[], Iterable[str]],
        renewed: Callable[[], Awaitable[object]],
        caller: Callable[[], AcmeCall] = acme_caller,
    ) -> None:
        self._loop = loop
        self._log = log
        self._ask = ask
        self._names = Names(loop, ask)
        self._settings = settings
        self._challenges = challenges
        self._wanted = wanted
        self._renewed = renewed
        self._caller = caller
        self._client: AcmeClient | None = None
        self._progress: dict[str, _Progress] = {}
        self._look_now = Event(loop)
        self._looking = False
        kinds = [HTTP_01, TLS_ALPN_01] if settings.ports else [HTTP_01]
        if 443 in settings.ports and 80 not in settings.ports:
            kinds.reverse()
        self._kinds = kinds

    @property
    def problems(self) -> list[str]:
        """What is wrong with names that need a certificate, as sentences."""
        return [progress.problem for progress in self._progress.values() if progress.problem]

    def look(self) -> None:
        """Look at all names soon: there may be new ones, or the DNS may have them lead here."""
        if not self._looking:
            for progress in self._progress.values():
                if progress.unresolved:
                    progress.not_before = 0.0
        self._look_now.set()

    async def run(self) -> None:
        """Fetch and renew until the task is cancelled."""
        while True:
            pause = _ACME_PAUSES[0]
            try:
                pause = await self.round()
            except Exception as error:  # or nothing would ever be renewed again
                self._log.crash("acme", error)
            with contextlib.suppress(Expired), self._loop.deadline(pause):
                await self._look_now.wait()
            self._look_now.clear()

    async def round(self) -> float:
        """Fetch what is due; return the seconds until something will be."""
        self._client = None  # what is known of the authority may be old, and so may the DNS
        self._names = Names(self._loop, self._ask)
        nearest = _ROUND_SECONDS
        self._looking = True
        try:
            wanted = list(dict.fromkeys(self._wanted()))
            self._progress = {name: self._progress.get(name) or _Progress() for name in wanted}
            for name in wanted:
                due = await self._attempt_if_due(name)
                nearest = min(nearest, due - self._loop.clock.time())
        finally:
            self._looking = False
        return max(nearest, 1.0)

    async def _attempt_if_due(self, name: str) -> float:
        """Return when there is something to do for `name`, which may be what has failed now."""
        files = FetchedCertificate(os.path.join(self._settings.directory, "certs", name))
        ends = 0.0
        try:
            due, ends = await self._loop.work(files.renewal)
            due = max(due, self._progress[name].not_before)
            if due > self._loop.clock.time():
                return due
            unresolved = await self._unresolved(name)
            if unresolved and not ends:
                return self._skip(name, unresolved)
            if unresolved:
                raise AcmeFailed(unresolved)
            await self._fetch(name, files)
            due, ends = await self._loop.work(files.renewal)
        except (ChasquidError, OSError) as error:
            return self._fail(name, ends, error)
        until = rfc5322_date(ends)
        self._log.info("acme", f"a certificate for {name} has come; it is valid until {until}")
        now = self._loop.clock.time()
        due = due if due > now else now + _ROUND_SECONDS  # whatever the authority means by that
        self._progress[name] = _Progress(due)
        return due

    async def _unresolved(self, name: str) -> str:
        """Say why `name` cannot be shown to be ours, as far as the DNS tells; "" if it can."""
        host = self._settings.hostname
        try:
            ours = set(await self._names.addresses(host))
            found = set(await self._names.addresses(name))
        except TemporaryFailure as error:
            return "" if name == host else str(error)  # what the authority finds counts
        if not found:
            return f"the DNS has no address of {name}"
        strange = found - ours
        if strange:
            return f"the DNS has {name} lead to {', '.join(sorted(strange))}, which is not {host}"
        return ""

    def _skip(self, name: str, why: str) -> float:
        """Wait for a name to lead here: only the host itself must have a certificate."""
        is_host = name == self._settings.hostname
        due = self._pause(name, longest=_HOST_PAUSE if is_host else _ACME_PAUSES[1])
        text = f"no certificate for {name} yet: {why}"
        self._progress[name].unresolved = True
        self._progress[name].problem = text if is_host else ""
        tell = self._log.warning if is_host else self._log.info
        tell("acme", f"{text}; {self._next(due)}")
        return due

    def _fail(self, name: str, ends: float, error: Exception) -> float:
        due = self._pause(name, asked=error.pause if isinstance(error, AcmeFailed) else 0.0)
        text = f"no certificate for {name}"
        if ends:
            left = ends - self._loop.clock.time()
            when = f"expires in {duration_text(left)}" if left > 0 else "has expired"
            text = f"the certificate for {name} {when} and could not be renewed"
        text = f"{text}: {reason(error)}"
        self._progress[name].problem = text
        self._log.warning("acme", f"{text}; {self._next(due)}")
        return due

    def _pause(self, name: str, asked: float = 0.0, longest: float = _ACME_PAUSES[1]) -> float:
        """Return when `name` is tried again; `asked` is what the authority has asked for."""
        progress = self._progress[name]
        pause = min(_ACME_PAUSES[0] * 2 ** min(progress.failures, 20), longest)
        progress.failures += 1
        progress.unresolved = False
        pause = max(pause, min(asked, _ACME_LONGEST_PAUSE))
        progress.not_before = self._loop.clock.time() + pause
        return progress.not_before

    def _next(self, due: float) -> str:
        return f"next attempt in {duration_text(due - self._loop.clock.time())}"

    async def _fetch(self, name: str, files: FetchedCertificate) -> None:
        """Have a certificate issued and keep it; by one challenge, or else by the other."""
        if self._client is None:
            self._client = await self._new_client()
        key = await self._loop.work(files.key)
        failures: list[AcmeFailed] = []
        async with self._reachable():
            for kind in list(self._kinds):
                try:
                    chain = await self._client.certificate(name, key, kind)
                    break
                except Expired:
                    text = f"it took more than {duration_text(_ACME_ORDER_SECONDS)}"
                    raise AcmeFailed(text) from None
                except AcmeFailed as error:
                    if error.kind != "challenge":
                        raise
                    failures.append(error)
            else:
                raise AcmeFailed("; ".join(map(str, failures)))
        self._kinds.sort(key=lambda other: other != kind)  # what has worked comes first
        await self._loop.work(lambda: files.store(name, key, chain))
        await self._renewed()

    async def _new_client(self) -> AcmeClient:
        directory = self._settings.directory
        call, key = await self._loop.work(lambda: (self._caller(), acme_account_key(directory)))
        return AcmeClient(
            self._loop, call, self._settings.url, key=key, challenges=self._challenges
        )

    @contextlib.asynccontextmanager
    async def _reachable(self) -> AsyncIterator[None]:
        """See to it that somebody listens while an order runs."""
        sockets = [] if self._settings.ports else self._settings.open_port()
        web = Web(self._loop, self._log, self._challenges)
        tasks = [self._loop.spawn(web.serve(raw), "challenges") for raw in sockets]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for raw in sockets:
                self._loop.forget(raw.fileno())
                raw.close()


# ======================================================================================
# ROOM: CONTROL
#
# How another process reaches the server of a data_dir: the lock says whether there is one, and
# a socket there, for its owner alone, takes requests.
#
# A request is one line of JSON, [command, argument]; the answer is one too, either
# {"lines": […]} or {"error": "…"}. A request that is not understood is answered so, for the
# program that asks may be of another version.
#
# What the commands do belongs to DAEMON.
# ======================================================================================

_CONTROL_LIMIT = 64 * 1024  # octets of a request to the control socket
_CONTROL_SECONDS = 30.0
_UNIX_PATH_LIMIT = 100  # a little less than what sun_path holds


class DataDirectory:
    """The lock on data_dir: two servers must not deliver from one queue."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1

    def take(self) -> None:
        """Make the directory and lock it. Raises ConfigError if another server has it."""
        import fcntl

        try:
            make_directory(self.path)
            path = os.path.join(self.path, "lock")
            existed = os.path.exists(path)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if not existed and os.geteuid() == 0:
                os.fchown(self._fd, *owner_above(path))
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            self._fd = -1
            raise ConfigError(self.path, 0, "another server is using this data_dir") from None
        except OSError as error:
            text = f"data_dir cannot be used: {error.strerror}"
            raise ConfigError(error.filename or self.path, 0, text) from error

    def release(self) -> None:
        """Give the lock back; nothing if it was not taken."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _ControlPath:
    """A path short enough for a socket's address, however deep data_dir lies.

    Linux lets a directory be named by a descriptor of it.
    """

    def __init__(self, data_dir: str) -> None:
        self.real = os.path.join(data_dir, "control")
        self._fd = -1
        self.short = self.real
        if len(self.real.encode()) > _UNIX_PATH_LIMIT:
            self._fd = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY)
            self.short = f"/proc/self/fd/{self._fd}/control"

    def __enter__(self) -> str:
        return self.short

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class Control:
    """The socket for commands to the running server: data_dir/control, mode 0600.

    `commands` are what may be asked for, by name; each gets the argument, and returns lines
    or raises ChasquidError.
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        data_dir: str,
        commands: Mapping[str, Callable[[str], Awaitable[list[str]]]],
    ) -> None:
        self._loop = loop
        self._log = log
        self._data_dir = data_dir
        self._commands = commands
        self._socket: socket.socket | None = None
        self._path = os.path.join(data_dir, "control")

    def open(self) -> None:
        """Raises ConfigError."""
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if os.path.exists(self._path):
                os.unlink(self._path)  # the lock says that nobody is behind it
            with _ControlPath(self._data_dir) as path:
                raw.bind(path)
            os.chmod(self._path, 0o600)
            raw.listen(16)
        except OSError as error:
            raw.close()
            text = f"the control socket cannot be made: {error.strerror}"
            raise ConfigError(self._path, 0, text) from error
        raw.setblocking(False)
        self._socket = raw

    def close(self) -> None:
        """Take no more requests, and remove the socket."""
        if self._socket is not None:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    async def serve(self) -> None:
        """Answer requests until the task is cancelled."""
        assert self._socket is not None
        async for raw, _ in connections(self._loop, self._log, "control", self._socket):
            self._loop.spawn(self._answer(Stream(self._loop, raw)), "control request")

    async def _answer(self, stream: Stream) -> None:
        try:
            with self._loop.deadline(_CONTROL_SECONDS):
                line = await stream.read_line(_CONTROL_LIMIT)
                stream.write(json.dumps(await self._obey(line)).encode() + b"\r\n")
                await stream.flush()
        except (Disconnected, Expired, LineTooLong, BareNewline):
            pass  # whoever asked is gone, or is none of ours
        finally:
            stream.close()

    async def _obey(self, line: bytes) -> dict[str, Any]:
        try:
            command, argument = json.loads(line)
            if not isinstance(argument, str):
                raise TypeError("the argument is no string")
            return {"lines": await self._commands[command](argument)}
        except (ValueError, TypeError, KeyError):
            return {"error": "the request is not understood; is the server another version?"}
        except ChasquidError as error:
            return {"error": str(error)}
        except Exception as error:
            self._log.crash("control", error)
            return {"error": f"the server failed at that: {reason(error)}; its log has more"}


def ask_running_server(data_dir: str, command: str, argument: str) -> list[str] | None:
    """Have the server of `data_dir` do something; None if none is running.

    Raises ChasquidError with what the server, or the system, says.
    """
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(_CONTROL_SECONDS)
    try:
        with _ControlPath(data_dir) as path:
            raw.connect(path)
        raw.sendall(json.dumps([command, argument]).encode() + b"\r\n")
        with raw.makefile("rb") as file:
            answer = json.loads(file.readline() or b"{}")
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, ValueError) as error:
        text = f"{os.path.join(data_dir, 'control')}: the server cannot be asked: {reason(error)}"
        raise ChasquidError(text) from error
    finally:
        raw.close()
    answer = answer if isinstance(answer, dict) else {}
    if not isinstance(answer.get("lines"), list):
        raise ChasquidError(answer.get("error") or "the server gave no answer that is one")
    return [str(line) for line in answer["lines"]]


# ======================================================================================
# ROOM: PRIVILEGES
#
# What the server may do on this machine, and who else may see its secrets or change what it
# runs.
#
# - Started by root, it opens its ports, reads the certificates with their keys, and becomes
#   another user for good. All that comes later is done as that user: logs are opened, users
#   and DKIM keys are read, octets of strangers are parsed, programs are run.
# - As root it opens nothing in a directory of that user, who could lead it elsewhere by a
#   symbolic link; but for the lock, which is never opened through one.
# - A secret that lies open is a warning with the command that mends it. A group may read, for
#   so the certificates of others come to the server.
#
# These are the only functions that change the whole process, so they are called by DAEMON for
# a command that says so, and by nobody else.
# ======================================================================================


class Account(NamedTuple):
    """A user of this machine."""

    name: str
    uid: int
    gid: int
    home: str


def account_of_server(config: Config) -> Account | None:
    """Return whom a server that root starts becomes; None if it stays root.

    Only the user of the default need not exist. Raises ConfigError.
    """
    import pwd  # only here

    if not config.user:
        return None
    try:
        found = pwd.getpwnam(config.user)
    except (KeyError, ValueError):
        if "user" not in changed_keys(config):
            return None
        path = os.path.join(config.config_dir, "chasquid.conf")
        text = f"user: expected a user of this machine, found {printable(config.user, 40)}"
        raise ConfigError(path, 0, text) from None
    return Account(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir)


def give_directory(path: str, account: Account) -> None:
    """Make the directory `path` for `account`, if it is missing or empty. Raises ConfigError.

    Of one that holds something, nothing is given away: it must be theirs.
    """
    try:
        make_directory(path)
        if not os.listdir(path):
            os.chown(path, account.uid, account.gid)
        owner = os.stat(path).st_uid
    except OSError as error:
        text = f"data_dir cannot be used: {error.strerror}"
        raise ConfigError(error.filename or path, 0, text) from error
    if owner != account.uid:
        told = f"data_dir belongs to another user than {account.name}, whom the server becomes"
        remedy = f"chown -R {account.name}: {_word(path)}, or set the key user"
        raise ConfigError(path, 0, f"{told}: {remedy}")


def become(account: Account, system: Any = os) -> None:
    """Become another user, for good; `system` is the module os. Raises ChasquidError.

    Groups go first, for later there is no right to. That root cannot be had back is tried.
    """
    uid, gid = account.uid, account.gid
    try:
        system.initgroups(account.name, gid)
        system.setgid(gid)
        system.setuid(uid)
    except OSError as error:
        text = f"the server cannot become the user {account.name}: {error.strerror}"
        raise ChasquidError(text) from error
    if uid:
        with contextlib.suppress(OSError):
            system.setuid(0)
    now = (system.getuid(), system.geteuid(), system.getgid(), system.getegid())
    if now != (uid, uid, gid, gid):
        raise ChasquidError(f"the server did not become the user {account.name} for good")
    system.environ.update(HOME=account.home, USER=account.name, LOGNAME=account.name)


def write_no_core() -> None:
    """Have a crash of this process leave no core file: passwords and keys would be in it."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def exposure_warnings(config: Config) -> Iterator[str]:
    """Yield which secrets everybody on this machine can read, and what everybody can change."""
    told = set()
    for path in _secret_paths(config):
        if _is_open(path, stat.S_IROTH | stat.S_IWOTH):
            told.add(path)
            yield f"{path} is secret, and everybody can read it: chmod o= {_word(path)}"
    for path in (config.config_dir, *_governing_paths(config)):
        if path not in told and _is_open(path, stat.S_IWOTH):
            yield f"{path} can be changed by everybody: chmod o-w {_word(path)}"


def _word(path: str) -> str:
    """Return `path` as a person can give it to a shell."""
    import shlex  # only for warnings

    return shlex.quote(path)


def _secret_paths(config: Config) -> Iterator[str]:
    """Yield the files that hold passwords and private keys, and data_dir with all the mail."""
    yield config.data_dir
    if config.smarthost_password_file:
        yield config.smarthost_password_file
    for top, _, files in _files_below(config, "domains"):
        for name in files:
            if name == "users" or name.startswith("dkim:"):
                yield os.path.join(top, name)
    for top, _, files in _files_below(config, "certs"):
        for name in files:
            if name == "privkey.pem" or name.endswith(".key"):
                yield os.path.join(top, name)


def _governing_paths(config: Config) -> Iterator[str]:
    """Yield what says who has a mailbox here, where mail goes, and what is run."""
    yield os.path.join(config.config_dir, "chasquid.conf")
    for directory in ("domains", "certs", "hooks"):
        for top, _, files in _files_below(config, directory):
            yield top
            for name in files:
                yield os.path.join(top, name)


def _files_below(config: Config, name: str) -> Iterator[tuple[str, list[str], list[str]]]:
    return os.walk(os.path.join(config.config_dir, name), followlinks=True)


def _is_open(path: str, bits: int) -> bool:
    """Tell whether others than owner and group have one of `bits`, and can get there."""
    try:
        path = os.path.realpath(path)
        if not os.stat(path).st_mode & bits:
            return False
        while path != (above := os.path.dirname(path)):
            if not os.stat(above).st_mode & stat.S_IXOTH:
                return False
            path = above
    except OSError:
        return False
    return True


# ======================================================================================
# ROOM: DAEMON
#
# One complete server, put together. `Daemon.__init__` is the wiring diagram: who gets
# whom. Beyond that the room holds what belongs to a running process: listeners, what is
# read again while it runs, the control socket, and the end.
#
# - Nothing here is alone in the process: several daemons may run side by side, each in a
#   thread of its own. Signals are the command line's business.
# - What is read again replaces the old whole, or not at all: a mistake in a file is
#   logged, and the server goes on with what it had.
# - The end: no new connections, 421 to who is idle, ten seconds for what is under way.
#   What is not delivered by then is on the disk.
# ======================================================================================

_SHOWN_MESSAGES = 50  # of the queue, on the page; rendering must not hold up the loop
_SHOWN_PROBLEMS = 20  # of a domain; the log gets them at each look
_WORKER_COUNT = 8
_STOP_SECONDS = 10.0
_DAY = 86400.0
# Everything that is imported when it is first used; see `load_modules`.
_LATE_MODULES = (
    "base64", "difflib", "dns.asyncresolver", "dns.rcode", "encodings.ascii", "encodings.idna",
    "fcntl", "hashlib", "hmac", "http.client", "idna", "idna.uts46data", "io", "ipaddress",
    "precis_i18n.profile", "resource", "shlex", "shutil", "subprocess", "tempfile", "unicodedata",
)  # fmt: skip
DOMAIN_INFO_DIRECTORY = "domaininfo"  # below data_dir
DOMAIN_FORGOTTEN = "what was seen of {} is forgotten"
DOMAIN_UNKNOWN = "nothing was known of {}"


def load_libraries() -> None:
    """Load the libraries, and have them read their tables. Raises ChasquidError."""
    load_modules(_LATE_MODULES)
    try:
        load_spf()
        load_dkim()
        domain_to_ascii("bücher.example")  # idna and precis-i18n read tables at first
        normalize_user("É")
    except Exception as error:
        text = f"a library cannot be loaded: {type(error).__name__}: {error}"
        raise ChasquidError(f"{text}; is the installation complete?") from error


def random_fraction() -> float:
    """Return a random number from 0 up to, but not including, 1."""
    return int.from_bytes(os.urandom(6), "big") / (1 << 48)


def smarthost_login(config: Config) -> tuple[str, str] | None:
    """Return user and password for the smarthost, if it wants them. Raises ConfigError."""
    if bool(config.smarthost_user) != bool(config.smarthost_password_file):
        path = os.path.join(config.config_dir, "chasquid.conf")
        text = "expected smarthost_user and smarthost_password_file together, or neither"
        raise ConfigError(path, 0, text)
    if not config.smarthost_user:
        return None
    password = read_file(config.smarthost_password_file).decode("utf-8", "replace")
    return config.smarthost_user, password.strip("\r\n")


def setting_warnings(config: Config) -> Iterator[str]:
    """Yield what is allowed, but probably not meant."""
    agent = config.mail_delivery_agent_bin
    if agent:
        import shutil  # only for agents

        if not shutil.which(agent, path=inherited_environment()["PATH"]):
            text = f"{agent} is not there, or not executable; mail will wait"
            yield f"mail_delivery_agent_bin: {text}"
    lmtp = config.lmtp_address
    if lmtp.startswith("/") and not os.path.exists(lmtp):
        yield f"lmtp_address: there is no socket {lmtp}; mail will wait until there is"
    address = config.monitoring_address
    host = host_and_port(address, 0)[0]
    if address and address != "systemd" and host != "localhost" and not is_loopback(host):
        yield f"monitoring_address: {address} can be seen from other hosts, without a login"
    if "." not in config.hostname:
        yield f"the hostname {config.hostname} has no domain; see hostname"
    yield from hook_warnings(config.config_dir)
    yield from exposure_warnings(config)


class Domain(NamedTuple):
    """What the directory of a domain says."""

    users: Mapping[str, Password]
    aliases: Mapping[str, tuple[Destination, ...]]
    keys: Sequence[DkimKey]


class Domains(NamedTuple):
    """What the directories of the domains say, and what is wrong with some, as sentences."""

    accounts: Accounts
    aliases: Aliases
    keys: Mapping[str, Sequence[DkimKey]]
    each: Mapping[str, Domain]
    broken: frozenset[str]
    problems: tuple[str, ...]


def load_domains(config: Config, before: Mapping[str, Domain] | None = None) -> Domains:
    """Read users, aliases and keys of all domains, each by itself.

    A domain with a mistake in its files stays as it was in `before`; without that it is
    broken: it is ours, and what concerns it must wait. Raises ConfigError if not even the
    names of the domains can be read.
    """
    before = before or {}
    each: dict[str, Domain] = {}
    problems: list[str] = []
    misnamed: list[ConfigError] = []
    directories = domain_directories(config.config_dir, misnamed)
    problems += map(str, misnamed)
    for name, path in directories.items():
        domain, wrong = _load_domain(name, path, before.get(name))
        problems += wrong
        if domain is not None:
            each[name] = domain
    for name in before.keys() - directories.keys():
        if before[name].users:
            text = f"{config.config_dir}/domains/{name}: the directory is gone"
            problems.append(f"{text}; if that is meant, start the server anew")
            each[name] = before[name]
    broken = frozenset(directories.keys() - each.keys())
    accounts = Accounts({name: domain.users for name, domain in each.items()}, broken)
    aliases = Aliases(
        {name: domain.aliases for name, domain in each.items()},
        accounts.exists,
        config.suffix_separators,
        drop_characters=config.drop_characters,
        broken=broken,
    )
    keys = {name: domain.keys for name, domain in each.items()}
    return Domains(accounts, aliases, keys, each=each, broken=broken, problems=tuple(problems))


def _load_domain(name: str, path: str, known: Domain | None) -> tuple[Domain | None, list[str]]:
    """Read what is in the directory of a domain; return also what is wrong with it.

    If anything is, the domain is as it was `known`.
    """
    found: list[ConfigError] = []
    domain = known
    try:
        domain = Domain(
            load_users(path, found), load_aliases(path, name, found),
            load_dkim_keys(path, name, found),
        )  # fmt: skip
        if not found and known is not None and known.users and not domain.users:
            # a file that was cut short must not turn mail away
            text = "all users are gone; if that is meant, start the server anew"
            found.append(ConfigError(os.path.join(path, "users"), 0, text))
    except OSError as error:
        found.append(ConfigError(path, 0, f"it cannot be read: {error.strerror}"))
    wrong = [str(problem) for problem in found[:_SHOWN_PROBLEMS]]
    if len(found) > len(wrong):
        wrong.append(f"{path}: {plural(len(found) - len(wrong), 'mistake')} more")
    return known if wrong else domain, wrong


def file_signature(config_dir: str) -> tuple[tuple[str, int, int, int], ...]:
    """Return what changes when a file of the domains or a certificate changes."""
    found = []
    for top in ("domains", "certs"):
        for directory, _, files in os.walk(os.path.join(config_dir, top), followlinks=True):
            for name in (".", *files):
                path = os.path.join(directory, name)
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                # of a change of the mode, which may mend a file, only ctime tells
                found.append((path, status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(sorted(found))


class Daemon:
    """One server: made from a configuration, run by `run`, ended by `stop`.

    Sockets are bound when it is made, so that their numbers are known; then the process becomes
    `account`, if there is one. Raises ConfigError.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock | None = None,
        ask: Ask | None = None,
        spawn: Spawn = spawn_program,
        random: Callable[[], float] = random_fraction,
        remote: Courier | None = None,
        fetch_policy: FetchPolicy | None = None,
        on_result: Callable[[Item, Recipient], None] = lambda item, recipient: None,
        connect: Connect = connect,
        account: Account | None = None,
    ) -> None:
        self.config = config
        self._connect = connect
        self._account = account
        with contextlib.ExitStack() as undo:  # if the start fails, nothing is left behind
            self._assemble(
                undo,
                clock or Clock(),
                ask=ask,
                spawn=spawn,
                random=random,
                remote=remote,
                fetch_policy=fetch_policy,
                on_result=on_result,
            )
            self._resources = undo.pop_all()

    def _assemble(
        self,
        undo: contextlib.ExitStack,
        clock: Clock,
        ask: Ask | None,
        spawn: Spawn,
        random: Callable[[], float],
        remote: Courier | None,
        fetch_policy: FetchPolicy | None,
        on_result: Callable[[Item, Recipient], None],
    ) -> None:
        """Put the parts together; `undo` gets what is to be given back at the end."""
        config = self.config
        self._hostname = domain_to_ascii(config.hostname)
        self._own_domain = domain_to_unicode(self._hostname)
        lock = DataDirectory(config.data_dir)
        undo.callback(lock.release)
        self._certificates = certificates = self._take_as_root(undo, lock)
        self.log = Log(Sink(config.log_path, clock), Sink(config.mail_log_path, clock))
        undo.callback(self.log.close)
        workers = Workers(_WORKER_COUNT)
        undo.callback(workers.close)
        self.loop = loop = Loop(clock, workers, self.log.crash)
        undo.callback(loop.close)
        self._domains = load_domains(config)
        self._loading = Slots(loop, 1)
        self._reloaded = (clock.time(), not self.problems)
        self._signature = file_signature(config.config_dir)
        self._dns = client = DnsClient(loop, config.dns_server, config.dns_trust_ad)
        self._names = Names(loop, ask or client.ask)
        # strangers' questions must not keep our own mail waiting
        self._names_out = Names(loop, ask or client.ask)
        self._signer = Signer(loop, self.log, self._domains.keys)
        self._signer.broken = self._domains.broken
        self.levels = SecurityLevels(
            loop, self.log, os.path.join(config.data_dir, DOMAIN_INFO_DIRECTORY)
        )
        self._sts = self._sts_policies(fetch_policy)
        programs = Programs(loop, spawn)
        hooks = Hooks(programs, self.log, config.config_dir)
        self._dovecot = self._ask_dovecot()
        self._hooks = hooks
        self._lookups = ExternalLookups(
            hooks.alias_destinations, self._dovecot.exists if self._dovecot else None
        )
        local = self._local_courier(programs)
        couriers = Couriers(
            local,
            PipeCourier(programs),
            remote or self._smtp_courier(random),
            is_local=self._is_local,
            smarthost=None if remote else self._smarthost(),
            durable=isinstance(local, MaildirCourier),
        )
        self.queue = Queue(
            loop,
            Disk(loop),
            log=self.log,
            settings=self._queue_settings(),
            couriers=couriers,
            expand=self._expand,
            is_local=self._is_local,
            random=random,
            sign=self._sign_notification,
            on_result=on_result,
        )
        self._limits = Limits(clock, config)
        self._context = ServerContext(
            loop,
            self.log,
            self._limits,
            hostname=self._hostname,
            size_limit=config.max_data_size_mb * 1024 * 1024,
            tls_context=certificates.default,
            min_octets_per_second=config.min_octets_per_second,
        )
        self._receiver = MailReceiver(
            config,
            loop=loop,
            log=self.log,
            accounts=self._domains.accounts,
            aliases=self._domains.aliases,
            queue=self.queue,
            names=self._names,
            signer=self._signer,
            levels=self.levels,
            hooks=hooks,
            dovecot=self._dovecot,
            limits=self._limits,
        )
        self._started = clock.time()
        self._monitor = Monitor(
            loop, self.log, config.hostname, status=self._status, stop=self._stop_from_inside
        )
        challenges = Challenges()
        self._web = Web(
            loop, self.log, challenges, self._web_site, context=lambda: self._context.tls_context
        )
        self._acme = (
            self._fetch_certificates(ask or client.ask, challenges) if config.acme else None
        )
        self._control = Control(loop, self.log, config.data_dir, _Requests(self).table)
        undo.callback(self._control.close)
        self._control.open()
        self._sessions: dict[Session, Task] = {}
        self._session_limit = min(config.max_connections or sys.maxsize, session_limit())
        self._stopping = Event(loop)
        self._reload_now = Event(loop)
        self._reopen_logs = False
        self._report_start(certificates)
        self._report_settings()

    def _take_as_root(self, undo: contextlib.ExitStack, lock: DataDirectory) -> Certificates:
        """Take what only root may have, if it is root who runs this, and give root up."""
        config, account = self.config, self._account
        if account is not None:
            give_directory(config.data_dir, account)
        lock.take()
        self._listeners = Listeners(config)
        undo.callback(self._listeners.close)
        if account is None:
            return Certificates(config)
        certificates = Certificates(config, fetched=False)
        load_libraries()  # the user may not be able to read them, or the archive
        become(account)
        return Certificates(config, certificates)  # what cannot be read again stays as it is

    def _stop_from_inside(self) -> None:
        self._stopping.set()

    def _status(self) -> Status:
        """Return what MONITORING shows."""
        now = self.loop.clock.time()
        return Status(
            self.config.hostname,
            now,
            started=self._started,
            sessions=self.session_count,
            listening=tuple(
                f"{port.name} on [{host}]:{number}" for port, host, number in self.addresses
            ),
            queue=tuple(
                queue_line(item, now)
                for item in itertools.islice(self.queue.items.values(), _SHOWN_MESSAGES)
            ),
            queue_limit=self.config.max_queue_items,
            counters=self.log.counters,
            dialogues=tuple(self.log.dialogues),
            config=config_text(self.config),
            queued=len(self.queue.items),
            oldest=max(
                (now - item.envelope.received for item in self.queue.items.values()), default=0.0
            ),
            reloaded=self._reloaded,
            problems=(*self.problems, *(self._acme.problems if self._acme else ())),
            certificates=tuple(
                CertificateLine(name, tuple(sorted(certificate.names)), certificate.expires)
                for name, certificate in self._certificates.loaded.items()
            ),
            domains=tuple(
                DomainLine(name, len(domain.users), tuple(key.selector for key in domain.keys))
                for name, domain in self._domains.each.items()
            ),
        )

    def _queue_settings(self) -> QueueSettings:
        config = self.config
        return QueueSettings(
            os.path.join(config.data_dir, "queue"),
            self._hostname,
            config.give_up_send_after,
            limit=config.max_queue_items,
            suffix_separator=config.suffix_separators[:1] or "+",
            min_free_disk=config.min_free_disk_mb * 1024 * 1024,
        )

    @property
    def addresses(self) -> list[tuple[Port, str, int]]:
        """Return kind, host and port of each listening socket."""
        return [(port, *raw.getsockname()[:2]) for port, raw in self._listeners.sockets]

    @property
    def session_count(self) -> int:
        """How many connections there are to the ports for mail."""
        return len(self._sessions)

    def run(self, on_ready: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop` is called. Raises ChasquidError.

        `on_ready` is called when connections are taken and nothing more need be loaded.
        """
        with self._resources:
            self.loop.run(self._main(on_ready))

    def at_end(self, call: Callable[[], object]) -> None:
        """Have `call` called when the server has ended, before its loop is closed."""
        self._resources.callback(call)

    def stop(self) -> None:
        """End the server. May be called from a signal handler or another thread."""
        self.loop.post(self._stopping.set)

    def reload(self) -> None:
        """Read users, aliases and certificates again, and open the logs anew."""

        def now() -> None:
            self._reopen_logs = True
            self._reload_now.set()

        self.loop.post(now)

    async def resolve(self, address: str) -> list[Destination]:
        """Return the final recipients of `address`. Raises ChasquidError."""
        try:
            return await self._expand(address_from_person(address))
        except NoSuchUser as error:
            raise error.for_owner() from None

    # --- its parts ---

    def _local_courier(self, programs: Programs) -> Courier:
        config = self.config
        if config.mail_delivery_agent_bin:
            return AgentCourier(
                programs, config.mail_delivery_agent_bin, config.mail_delivery_agent_args
            )
        if config.lmtp_address:
            return LmtpCourier(
                self.loop,
                self._names_out,
                config.lmtp_address,
                hostname=self._hostname,
                connect=self._connect,
            )
        return MaildirCourier(
            self.loop,
            Disk(self.loop),
            config.maildir,
            data_dir=config.data_dir,
            hostname=config.hostname,
            user_exists=self._user_exists,
        )

    def _ask_dovecot(self) -> Dovecot | None:
        config = self.config
        if not config.dovecot_auth:
            return None
        return Dovecot(self.loop, self.log, config.dovecot_userdb_path, config.dovecot_client_path)

    async def _user_exists(self, user: str, domain: str) -> bool:
        if self._domains.accounts.exists(user, domain):
            return True
        return self._dovecot is not None and await self._dovecot.exists(f"{user}@{domain}")

    def _smtp_courier(self, random: Callable[[], float]) -> Courier:
        config = self.config
        policies = TlsPolicies(self._names_out, self.levels, self._sts)
        return SmtpCourier(
            self.loop,
            self._names_out,
            log=self.log,
            policies=policies,
            hostname=self._hostname,
            port=config.outgoing_smtp_port,
            random=random,
            connect=self._connect,
        )

    def _smarthost(self) -> Smarthost | None:
        config = self.config
        if not config.smarthost:
            return None
        courier = SmarthostCourier(
            self.loop,
            self._names_out,
            self._hostname,
            address=config.smarthost,
            login=smarthost_login(config),
            connect=self._connect,
        )
        return Smarthost(courier, config.smarthost, config.smarthost_after)

    def _sts_policies(self, fetch: FetchPolicy | None) -> StsPolicies:
        context = functools.cache(lambda: client_tls_context(verify=True))
        fetch = fetch or HttpsPolicies(self.loop, self._names_out, context).fetch
        directory = os.path.join(self.config.data_dir, "sts-cache")
        return StsPolicies(self.loop, self.log, self._names_out, fetch=fetch, directory=directory)

    def _web_site(self) -> WebSite:
        mode = "enforce" if self._certificates.is_proven(self._hostname) else "testing"
        domains = frozenset(map(domain_to_ascii, self._domains.each))
        return WebSite(self._hostname, domains, sts_policy_text([self._hostname], mode))

    def _fetch_certificates(self, ask: Ask, challenges: Challenges) -> Acme:
        ports = frozenset(raw.getsockname()[1] for raw in self._listeners.web)
        directory = os.path.join(self.config.data_dir, "acme")
        settings = AcmeSettings(self.config.acme_url, directory, self._hostname, ports)
        return Acme(
            self.loop,
            self.log,
            ask,
            settings,
            challenges=challenges,
            wanted=self._names_without_certificate,
            renewed=self.read_again,
        )

    def _names_without_certificate(self) -> Iterator[str]:
        """Yield the names of this host for which config_dir/certs has nothing."""
        names = [self._hostname]
        for domain, found in self._domains.each.items() if self._listeners.web else ():
            if found.users or domain != self._own_domain:
                ascii = domain_to_ascii(domain)
                names += [f"mta-sts.{ascii}", f"autoconfig.{ascii}"]
        for name in names:
            if not self._certificates.is_proven(name, fetched=False):
                yield name

    async def _sign_notification(self, header: bytes, body: Callable[[], Iterable[bytes]]) -> bytes:
        """Sign with the keys of our host; better unsigned than never."""
        try:
            return await self._signer.sign_for_host(self._own_domain, header, body)
        except TemporaryFailure:
            return b""

    def _is_local(self, domain: str) -> bool:
        return self._domains.aliases.is_local(domain)

    async def _expand(self, address: str) -> list[Destination]:
        """Return the final recipients of `address`; the log names those that are nobody's."""
        unknown: list[str] = []
        elsewhere = self._dovecot is not None or self._hooks.has("alias-resolve")
        lookups = self._lookups if elsewhere else NOBODY
        try:
            return await self._domains.aliases.expand_with(lookups, address, unknown)
        except NoSuchUser as error:
            unknown += error.unknown
            raise
        finally:
            if unknown:
                text = f"{address} leads to {', '.join(unknown)}, who is no user here"
                self.log.warning("aliases", text)

    def _report_start(self, certificates: Certificates) -> None:
        log, config = self.log, self.config
        log.event(Events.STARTING, version=__version__, host=config.hostname)
        self._report_problems()
        if certificates.default is None:
            top = os.path.join(config.config_dir, "certs")
            when = " until one is fetched" if config.acme else ""
            text = f"no certificate in {top}/NAME/: TLS is off, and nobody can log in{when}"
            log.warning("daemon", text)
        else:
            log.info("daemon", f"certificates: {', '.join(certificates.loaded)}")
        if self._domains.keys:
            log.info("daemon", f"domains: {', '.join(sorted(self._domains.keys))}")
            self._report_keys()
        elif not self._domains.broken:
            top = os.path.join(config.config_dir, "domains")
            log.warning("daemon", f"no domain in {top}: all mail for here is refused")

    def _report_settings(self) -> None:
        log, config = self.log, self.config
        if self._account is not None:
            log.info("daemon", f"started by root, and now the user {self._account.name} for good")
        elif os.geteuid() == 0:
            text = "running as root; a user of its own is safer: see the key user"
            log.warning("daemon", text)
        for warning in setting_warnings(config):
            log.warning("daemon", warning)
        if config.smarthost:
            after = f" after {plural(config.smarthost_after, 'attempt')}"
            when = after if config.smarthost_after else ""
            log.info("daemon", f"mail for elsewhere goes through {config.smarthost}{when}")
        if config.haproxy_incoming:
            log.info("daemon", "every connection must begin with a PROXY header")
        for raw in self._listeners.monitoring:
            host, port = raw.getsockname()[:2]
            log.info("daemon", f"monitoring at http://{host}:{port}/")
        for raw in self._listeners.web:
            host, port = raw.getsockname()[:2]
            log.info("daemon", f"web pages at [{host}]:{port}, HTTP and HTTPS")

    def _report_keys(self) -> None:
        for domain, keys in sorted(self._domains.keys.items()):
            if keys:
                selectors = ", ".join(key.selector for key in keys)
                self.log.info("daemon", f"mail of {domain} is signed with {selectors}")
            else:
                text = f"mail of {domain} leaves unsigned: it has no DKIM key; see dkim-keygen"
                self.log.info("daemon", text)

    # --- running ---

    async def _main(self, on_ready: Callable[[], object]) -> None:
        self._sts.load()
        self.queue.recover()
        tasks = [
            self.loop.spawn(self._accept(port, raw), f"listener {port.name}")
            for port, raw in self._listeners.sockets
        ]
        tasks += [
            self.loop.spawn(self._accept_monitoring(raw), "monitoring")
            for raw in self._listeners.monitoring
        ]
        tasks += [self.loop.spawn(self._web.serve(raw), "web") for raw in self._listeners.web]
        tasks += [
            self.loop.spawn(self._control.serve(), "control"),
            self.loop.spawn(self._reload_forever(), "reload"),
            self.loop.spawn(self._watch_certificates(), "certificates"),
            self.loop.spawn(self._sts.refresh_forever(), "MTA-STS policies"),
        ]
        for port, host, number in self.addresses:
            self.log.event(Events.LISTENING, port=port.name, address=f"[{host}]:{number}")
        await self.loop.work(self._load_libraries)
        if self._acme is not None:
            tasks.append(self.loop.spawn(self._acme.run(), "ACME"))
        on_ready()
        self.log.event(Events.READY)
        notify_systemd("READY=1")
        await self._stopping.wait()
        notify_systemd("STOPPING=1")
        self.log.event(Events.STOPPING)
        for task in tasks:
            task.cancel()
        self._listeners.close(self.loop)
        self._control.close()
        await self._wind_up()
        self.log.event(Events.STOPPED)

    def _load_libraries(self) -> None:
        """Load all that may be needed later. Computes; raises ChasquidError."""
        load_libraries()
        with contextlib.suppress(TemporaryFailure):  # no name server is known, or not yet
            self._dns.set_up()

    async def _wind_up(self) -> None:
        self._context.closing = True
        self.queue.begin_closing()
        for session, task in self._sessions.items():
            if session.idle:
                task.cancel()
        try:
            with self.loop.deadline(_STOP_SECONDS):
                for task in list(self._sessions.values()):
                    await ended(task)
                await self.queue.close()
        except Expired:
            text = f"not everything ended within {_STOP_SECONDS:g}s; the queue keeps what is left"
            self.log.warning("daemon", text)

    async def _accept(self, port: Port, listener: socket.socket) -> None:
        async for raw, peer in connections(self.loop, self.log, port.name, listener):
            self._begin(port, raw, str(peer[0]) if peer else "local")

    async def _accept_monitoring(self, listener: socket.socket) -> None:
        async for raw, _ in connections(self.loop, self.log, "monitoring", listener):
            self.loop.spawn(self._monitor.answer(Stream(self.loop, raw)), "monitoring request")

    def _has_place(self, peer: str) -> bool:
        """Tell whether a client may have another connection.

        The last tenth of the places is for clients that have none yet, so that a few busy or
        hostile ones leave room for the others.
        """
        left = self._session_limit - self.session_count
        kept = self._session_limit // 10
        if self.config.haproxy_incoming:  # who the client is, is not known yet
            kept = 0
        return left > (kept if self._limits.is_connected(clean_peer(peer)) else 0)

    def _begin(self, port: Port, raw: socket.socket, peer: str) -> None:
        if not self._has_place(peer):
            self.log.count(Metrics.CONNECTIONS, "refused")
            with contextlib.suppress(OSError):
                raw.setblocking(False)
                raw.send(b"421 4.3.2 too many connections; try again later\r\n")
            raw.close()
            return
        send_at_once(raw)
        stream = Stream(self.loop, raw)
        session = Session(self._context, self._receiver, stream, port=port, peer=clean_peer(peer))

        async def run() -> None:
            try:
                if self.config.haproxy_incoming:
                    session.peer = clean_peer(await proxied_peer(self.loop, raw) or session.peer)
                await session.run()
            except (Disconnected, Expired) as error:  # before the session began
                self.log.warning("haproxy", f"{peer}: {error}")
                self.loop.forget(raw.fileno())
                raw.close()
            finally:
                del self._sessions[session]

        self._sessions[session] = self.loop.spawn(run(), f"session {session.id}")

    async def _reload_forever(self) -> None:
        while True:
            try:
                with self.loop.deadline(self.config.reload_every):
                    await self._reload_now.wait()
            except Expired:
                pass
            asked = self._reload_now.is_set
            self._reload_now.clear()
            if self._reopen_logs:
                self._reopen_logs = False
                self._reopen()
            if asked:
                await self.read_again()
            elif not await self.look_again():
                self._report_problems()  # as long as they last

    def _reopen(self) -> None:
        try:
            self.log.reopen()
        except ConfigError as error:
            self.log.error("daemon", f"a log is not opened anew: {error}")

    @property
    def problems(self) -> list[str]:
        """What is wrong with the files of domains and with certificates, as sentences."""
        return [*self._domains.problems, *self._certificates.problems]

    def _report_problems(self) -> None:
        for problem in self.problems:
            self.log.error("daemon", f"{problem}; what was in force there before stays so")

    async def look_again(self) -> bool:
        """Read the files of domains and certificates again if they have changed."""
        signature = await self.loop.work(lambda: file_signature(self.config.config_dir))
        if signature == self._signature:
            return False
        await self.read_again()
        return True

    async def read_again(self) -> list[str]:
        """Read the files of domains and certificates again; return the problems found."""
        config = self.config
        async with self._loading:  # or what was read first might come into force last
            domains, certificates = self._domains, self._certificates
            try:
                self._signature = await self.loop.work(lambda: file_signature(config.config_dir))
                domains, certificates = await self.loop.work(
                    lambda: (
                        load_domains(config, self._domains.each),
                        Certificates(config, self._certificates),
                    )
                )
            except (ChasquidError, OSError) as error:
                self._reloaded = (self.loop.clock.time(), False)
                text = f"not read again, the old stays in force: {reason(error)}"
                self.log.error("daemon", text)
                return [reason(error)]
            self._take_over(domains, certificates)
        if self._acme is not None:
            self._acme.look()
        return self.problems

    def _take_over(self, domains: Domains, certificates: Certificates) -> None:
        self._domains, self._certificates = domains, certificates
        self._receiver.take_over(domains.accounts, domains.aliases)
        self._signer.keys, self._signer.broken = domains.keys, domains.broken
        if certificates.default is not None:
            self._context.tls_context = certificates.default
        self._reloaded = (self.loop.clock.time(), not self.problems)
        self.log.event(Events.RELOADED, problems=len(self.problems))
        self._report_problems()

    async def _watch_certificates(self) -> None:
        """Warn each day of certificates that expire, or are not for the names of this host."""
        while True:
            hosts = dict.fromkeys([self._hostname, *await self._mail_exchangers_of_ours()])
            now = self.loop.clock.time()
            for warning in self._certificates.warnings(now, hosts):
                self.log.warning("certificates", warning)
            await self.loop.sleep(_DAY)

    async def _mail_exchangers_of_ours(self) -> list[str]:
        """Return the names under which this host is the mail exchanger of a domain of ours.

        Which of several that is, is not known; so they count only if none has a certificate.
        """
        names: list[str] = []
        for domain in self._domains.each:
            try:
                answer = await self._names_out.query(domain_to_ascii(domain), "MX")
            except (TemporaryFailure, ValueError):
                continue
            hosts = [record.split(" ")[-1].rstrip(".").lower() for record in answer.records]
            hosts = [host for host in hosts if host]
            covered = any(map(self._certificates.cover, hosts))
            names += [] if covered else hosts[:1]
        return names


class _Requests:
    """What commands ask of the running server."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.table: dict[str, Callable[[str], Awaitable[list[str]]]] = {
            "aliases-resolve": self._aliases_resolve,
            "queue-retry": self._queue_retry,
            "queue-remove": self._queue_remove,
            "queue-bounce": self._queue_bounce,
            "domaininfo-remove": self._domaininfo_remove,
            "reload": self._reload,
        }

    async def _reload(self, about: str) -> list[str]:
        """Return what is wrong with the files, as lines; none if all is in force."""
        return await self._daemon.read_again()

    async def _aliases_resolve(self, address: str) -> list[str]:
        await self._daemon.look_again()  # or the answer would be that of a moment ago
        return [
            destination_text(destination) for destination in await self._daemon.resolve(address)
        ]

    async def _queue_retry(self, id: str) -> list[str]:
        items = list(self._daemon.queue.items.values()) if id == "all" else [self._item(id)]
        for item in items:
            await self._daemon.queue.retry_as_asked(item)
        return [f"{plural(len(items), 'message')} will be attempted now"]

    async def _queue_bounce(self, id: str) -> list[str]:
        item = self._item(id)
        if item.nudge is None:
            raise ChasquidError(f"{item.id} is being attempted; try again in a moment")
        await self._daemon.queue.bounce(item)
        return [f"{item.id} went back to {item.envelope.sender or 'nobody: its sender is <>'}"]

    async def _queue_remove(self, id: str) -> list[str]:
        item = self._item(id)
        await self._daemon.queue.remove(item)
        return [f"{item.id} is removed"]

    async def _domaininfo_remove(self, domain: str) -> list[str]:
        try:
            known = await self._daemon.levels.forget(domain_to_unicode(domain))
        except (ValueError, OSError) as error:
            raise ChasquidError(reason(error)) from None
        if not known:
            raise ChasquidError(DOMAIN_UNKNOWN.format(domain))
        return [DOMAIN_FORGOTTEN.format(domain)]

    def _item(self, id: str) -> Item:
        item = self._daemon.queue.items.get(id)
        if item is None:
            raise ChasquidError(f"there is no message {printable(id, 40)} in the queue")
        return item


def notify_systemd(state: str) -> None:
    """Tell systemd, if it waits to hear; see sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as raw:
        try:
            raw.connect("\0" + path[1:] if path.startswith("@") else path)
            raw.send(state.encode())
        except OSError:
            pass  # systemd notices by itself that it heard nothing


# ======================================================================================
# ROOM: PUBLISHING
#
# The records of the DNS that a domain of ours needs, and the forms in which a person or
# another program takes them: a table for a web form, a zone file.
#
# - There is one list of what is needed (`domain_records`), whoever asks: what a set-up
#   shows, what is published, and what is checked cannot differ.
# - What a record says follows from the configuration and the keys alone, so that asking
#   again gives the same; of the host's own addresses only those are known that it has
#   itself, and behind NAT there are none.
#
# Whether records are in the DNS, and whether other ones serve as well, is not known here.
# ======================================================================================

_TXT_STRING = 255  # octets of a string in a TXT record; RFC 1035, 3.3.14
_ZONE_TTL = 3600  # seconds
_DOCUMENTATION = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # RFC 5737, 3849
_ADDRESS_TO_FILL_IN = {"A": "(your public IPv4 address)", "AAAA": "(your public IPv6 address)"}


class DnsRecord(NamedTuple):
    """A record that a domain of ours needs.

    Names are A-labels, absolute, without the final dot. A TXT value is the whole string,
    without quotes; that of an A record is "" if the host does not know its public address.
    """

    name: str
    kind: str
    value: str
    purpose: str
    optional: bool = False

    @property
    def zone_line(self) -> str:
        """The record as a zone file has it, long texts in several strings; RFC 1035, 5.1."""
        value = self.value or _ADDRESS_TO_FILL_IN[self.kind]
        if self.kind == "TXT":
            value = _quoted_strings(self.value)
        elif self.kind in ("MX", "SRV", "CNAME"):
            value += "."
        comment = "" if self.value else "; "
        return f"{comment}{self.name}.\tIN {self.kind}\t{value}"


def _quoted_strings(text: str) -> str:
    strings = [text[start : start + _TXT_STRING] for start in range(0, len(text), _TXT_STRING)]
    if len(strings) == 1:
        return f'"{text}"'
    lines = "\n".join(f'\t"{string}"' for string in strings)
    return f"(\n{lines} )"


class DnsNeeds(NamedTuple):
    """What decides which records a domain needs. Domain and host are A-labels.

    `addresses` are the host's public ones; `sts_id` names the MTA-STS policy that our own
    web listener serves, and is "" if it serves none.
    """

    domain: str
    host: str
    addresses: Sequence[str]
    keys: Sequence[DkimKey]
    smarthost: str = ""
    sts_id: str = ""


def domain_records(needs: DnsNeeds) -> list[DnsRecord]:
    """Return the records that a domain needs, and after them those that are optional."""
    domain, host = needs.domain, needs.host
    return [
        DnsRecord(domain, "MX", f"10 {host}", "MX"),
        *_address_records(host, needs.addresses),
        DnsRecord(domain, "TXT", _sender_policy(needs.smarthost), "SPF"),
        *(DnsRecord(key.name, "TXT", key.record, "DKIM") for key in needs.keys),
        DnsRecord(f"_dmarc.{domain}", "TXT", "v=DMARC1; p=quarantine", "DMARC"),
        *_optional_records(needs),
    ]


def _address_records(host: str, addresses: Sequence[str]) -> list[DnsRecord]:
    if not addresses:
        return [DnsRecord(host, "A", "", "address")]
    kinds = [("AAAA" if ":" in address else "A", address) for address in addresses]
    return [DnsRecord(host, kind, address, "address") for kind, address in kinds]


def _sender_policy(smarthost: str) -> str:
    """Return the SPF record: neutral on others if a smarthost sends for us (RFC 7208, 2.6.2)."""
    return "v=spf1 mx ?all" if smarthost else "v=spf1 mx ~all"


def _optional_records(needs: DnsNeeds) -> Iterator[DnsRecord]:
    """Yield what helps some of those who write or read mail; RFC 8460, 8461, 8314 and 6186."""
    domain, host = needs.domain, needs.host
    if host != domain:
        yield DnsRecord(host, "TXT", "v=spf1 a -all", "SPF", optional=True)
    report = f"v=TLSRPTv1; rua=mailto:postmaster@{domain}"
    yield DnsRecord(f"_smtp._tls.{domain}", "TXT", report, "TLSRPT", optional=True)
    for service, port in (("_submissions", 465), ("_submission", 587), ("_imaps", 993)):
        name = f"{service}._tcp.{domain}"
        yield DnsRecord(name, "SRV", f"0 1 {port} {host}", "SRV", optional=True)
    if needs.sts_id:
        policy = f"v=STSv1; id={needs.sts_id}"
        yield DnsRecord(f"_mta-sts.{domain}", "TXT", policy, "MTA-STS", optional=True)
        yield DnsRecord(f"mta-sts.{domain}", "CNAME", host, "MTA-STS", optional=True)
        yield DnsRecord(f"autoconfig.{domain}", "CNAME", host, "autoconfig", optional=True)


def record_table(records: Sequence[DnsRecord], domain: str) -> list[str]:
    """Return a line for each record as web forms want it: name, type, value.

    The name stands without the domain, "@" is the domain itself, and a text is one string. A
    name outside the domain is whole, with a final dot.
    """
    rows = [(_name_below(record.name, domain), record.kind, record.value) for record in records]
    width = max((len(name) for name, _, _ in rows), default=0)
    return [
        f"{name:{width}}  {kind:5}  {value or _ADDRESS_TO_FILL_IN[kind]}"
        for name, kind, value in rows
    ]


def _name_below(name: str, domain: str) -> str:
    if name == domain:
        return "@"
    below = name.removesuffix(f".{domain}")
    return below if below != name else f"{name}."


def zone_file(records: Sequence[DnsRecord]) -> str:
    """Return the records as a part of a zone file; RFC 1035, 5."""
    lines = [f"$TTL {_ZONE_TTL}", *(record.zone_line for record in records)]
    return "".join(f"{line}\n" for line in lines)


def public_addresses() -> list[str]:
    """Return the public addresses that this host sends from, IPv4 first; none behind NAT.

    Nothing is sent: a datagram socket that is connected has the address that the routes say.
    """
    found = []
    for family, elsewhere in _DOCUMENTATION.items():
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as raw:
            raw.connect((elsewhere, 53))
            address = str(raw.getsockname()[0])
            if is_public_address(address):
                found.append(address)
    return found


def is_public_address(address: str) -> bool:
    """Tell whether an address of a host can be reached from elsewhere; RFC 6890."""
    import ipaddress  # only here

    return ipaddress.ip_address(address.partition("%")[0]).is_global


# ======================================================================================
# ROOM: FAULTS
#
# Failures on purpose, for tests of what has to live with them: a script of rules, each
# with where it applies and what it does there. The same dialogue meets the same failures
# every time, since a rule counts what it sees and nothing is left to chance.
#
# - Rules are asked in their order; the first that applies at a place is the one that acts.
#   `nth` counts what matches a rule, whether or not it acts; `times`, how often it has.
# - A rule that could never act is refused when it is added, with the reason.
# - A recipient can carry its failure in its own name ("ana+450@here.example"), for tests
#   that cannot reach the server otherwise.
#
# A script is asked what happens at a place, and says it; `FaultInjection` is the hook of a
# session that has it happen.
# ======================================================================================

STAGES = ("connect", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "message")
CERTIFICATE_FAULTS = ("expired", "wrong-name", "untrusted", "broken")
_ADDRESSED_STAGES = frozenset(("MAIL", "RCPT", "DATA", "message"))
_EXTENSIONS = frozenset((
    "PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE", "ENHANCEDSTATUSCODES", "CHUNKING", "LIMITS",
    "DSN", "HELP", "REQUIRETLS", "AUTH", "STARTTLS",
))  # fmt: skip
_LONGEST = 3600.0  # seconds
_DRIP_SECONDS = 0.1  # after each octet, for a recipient that asks for it


class FaultError(ChasquidError, ValueError):
    """A rule that says nothing sensible, or could never act."""


class Fault(NamedTuple):
    """What fails, where, and when; times are in seconds.

    `stage` is one of `STAGES`: the greeting, a command, or "message", which is after the
    final dot. `address` is a pattern ("*@here.example") for the sender at MAIL, for the
    recipient at RCPT, and for any recipient at DATA and "message". Of the times that this
    matches, `nth` picks one (from 1); with `times` the rule acts so many times, and then
    leaves it to the next; neither means each time.

    What happens: a `reply` ("451 4.2.1 busy") instead of doing what was asked for; a
    `delay` before the answer; the answer octet by octet, with `drip` between two; the
    connection is dropped (`drop`), or dropped once so many octets of the message have come
    (`drop_after`, at DATA); no answer at all (`hang`); a `certificate` of
    `CERTIFICATE_FAULTS`; extensions that EHLO does not offer (`without`). With `per_second`
    the rule acts only on what comes beyond so many a second, with 421 where no reply is given;
    with `probability`, in so many percent of the cases.

    A `reply` of 2xx or 3xx is given for what has been done, "\\n" in it begins a further line,
    and at "connect" it is the greeting; `raw` are octets that are sent instead of a reply.
    """

    stage: str
    reply: str = ""
    address: str = "*"
    nth: int = 0
    times: int = 0
    delay: float = 0.0
    drip: float = 0.0
    drop: bool = False
    drop_after: int = 0
    hang: bool = False
    certificate: str = ""
    without: tuple[str, ...] = ()
    per_second: int = 0
    probability: int = 100
    raw: str = ""

    @property
    def always_ends_it(self) -> bool:
        """Whether nothing that comes after this rule could act on what it matches."""
        return not (self.nth or self.times or self.per_second) and self.probability == 100


class Effect(NamedTuple):
    """What is to happen now; `reply` is None if the command takes its course."""

    fault: Fault
    reply: Reply | None


class _Rule:
    __slots__ = ("_matches", "_recent", "acted", "effect", "seen")

    def __init__(self, effect: Effect) -> None:
        import fnmatch  # only if there are rules

        self.effect = effect
        self.seen = 0
        self.acted = 0
        self._matches = re.compile(fnmatch.translate(effect.fault.address.lower())).match
        self._recent: collections.deque[float] = collections.deque()

    def forget(self) -> None:
        self.seen = self.acted = 0
        self._recent.clear()

    def applies(self, stage: str, addresses: Sequence[str], now: float) -> bool:
        """Count what matches; tell whether the rule acts on it."""
        fault = self.effect.fault
        if fault.stage != stage:
            return False
        matching = (self._matches(address.lower()) for address in addresses)
        if stage in _ADDRESSED_STAGES and not any(matching):
            return False
        self.seen += 1
        if fault.per_second:
            return self._is_too_fast(now)
        if fault.nth:
            return self.seen == fault.nth
        return not fault.times or self.acted < fault.times

    def _is_too_fast(self, now: float) -> bool:
        while self._recent and self._recent[0] <= now - 1.0:
            self._recent.popleft()
        if len(self._recent) >= self.effect.fault.per_second:
            return True
        self._recent.append(now)
        return False


class Script:
    """The rules of one server, which any thread may change.

    `stages` are those that come up there, and `handshake` is the one with the TLS
    handshake, "" if there is none. With `magic`, recipients may name a failure.
    """

    def __init__(
        self,
        clock: Clock,
        stages: Sequence[str],
        handshake: str,
        magic: bool = True,
        random: Callable[[], float] = random_fraction,
    ) -> None:
        self.on_command: Callable[[str, str], str | None] | None = None
        self._random = random
        self._clock = clock
        self._stages = stages
        self._handshake = handshake
        self._magic = magic
        self._rules: dict[str, _Rule] = {}
        self._number = itertools.count(1)
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> str:
        """Add a rule behind the others; return its id. Raises FaultError."""
        reply: Any = fault.reply
        if type(reply) is int:
            fault = fault._replace(reply=str(reply))
        stages = {stage.lower(): stage for stage in STAGES}
        fault = fault._replace(stage=stages.get(str(fault.stage).lower(), fault.stage))
        if isinstance(fault.without, (str, list)):
            words = [fault.without] if isinstance(fault.without, str) else fault.without
            fault = fault._replace(without=tuple(words))
        _check_kinds(fault._asdict())
        rule = _Rule(Effect(fault, self._check(fault)))
        with self._lock:
            for id, other in self._rules.items():
                earlier = other.effect.fault
                covers = earlier.address in ("*", fault.address)
                taken = other.seen == 0 and 0 < fault.nth <= earlier.times
                hides = earlier.always_ends_it or taken
                if earlier.stage == fault.stage and covers and hides:
                    text = (
                        f"the rule can never act: rule {id} for {earlier.stage} always comes first"
                    )
                    raise FaultError(text)
            id = str(next(self._number))
            self._rules[id] = rule
        return id

    def add_rule(self, rule: Mapping[str, Any]) -> str:
        """Add a rule that came as JSON; return its id. Raises FaultError."""
        for name in rule:
            if name not in Fault._fields:
                expected = ", ".join(Fault._fields)
                raise FaultError(f"a rule has no {printable(name, 40)!r}; it may have {expected}")
        if "stage" not in rule:
            raise FaultError(f"a rule needs a stage: {', '.join(STAGES)}")
        for name in ("nth", "times"):
            if name in rule and rule[name] == 0:
                raise FaultError(f"{name}: expected a number from 1, found {rule[name]!r}")
        return self.add(Fault(**rule))

    def remove_rule(self, id: str) -> bool:
        """Forget a rule; false if there is none."""
        with self._lock:
            return self._rules.pop(id, None) is not None

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()

    def rewind(self) -> None:
        """Let all rules count from the beginning."""
        with self._lock:
            for rule in self._rules.values():
                rule.forget()

    def describe(self) -> list[dict[str, Any]]:
        """Return the rules as JSON has them: what differs from the defaults, and how often
        each has matched and acted."""
        with self._lock:
            return [
                {"id": id, **_differences(rule.effect.fault),
                 "matched": rule.seen, "acted": rule.acted}
                for id, rule in self._rules.items()
            ]  # fmt: skip

    def effect(self, stage: str, addresses: Sequence[str] = ()) -> Effect | None:
        """Return what happens at `stage` now, with these addresses; None for nothing."""
        found = None
        with self._lock:
            now = self._clock.monotonic()
            for rule in self._rules.values():
                if rule.applies(stage, addresses, now) and found is None:
                    chance = rule.effect.fault.probability
                    if chance < 100 and self._random() * 100 >= chance:
                        continue
                    rule.acted += 1
                    found = rule.effect
        if found is None and self._magic and stage in ("RCPT", "message"):
            effects = (_magic_effect(stage, address) for address in addresses)
            found = next(filter(None, effects), None)
        return found

    def _check(self, fault: Fault) -> Reply | None:
        """Return the reply. Raises FaultError if the rule could never act."""
        stage = fault.stage
        if stage not in STAGES:
            raise FaultError(
                f"{printable(str(stage), 40)!r} is no stage; expected one of {', '.join(STAGES)}"
            )
        if stage not in self._stages:
            how = 'tls="starttls"' if stage == "STARTTLS" else "TLS, or login_in_the_clear=True"
            raise FaultError(f"{stage} never comes up at this server: make it with {how}")
        if fault.address != "*" and stage not in _ADDRESSED_STAGES:
            raise FaultError(f"the rule can never match: there is no address at {stage}")
        if not re.search(r"[@*?\[]", fault.address) and fault.address:
            raise FaultError(
                f"the rule can never match: {fault.address!r} is no address; "
                f"write {fault.address + '@*'!r} for any domain"
            )
        if min(fault.nth, fault.times, fault.per_second, fault.drop_after) < 0:
            raise FaultError("a rule counts from 1: expected no number below")
        if not 1 <= fault.probability <= 100:
            raise FaultError("probability: expected a number of percent from 1 to 100")
        if sum(1 for number in (fault.nth, fault.times, fault.per_second) if number) > 1:
            raise FaultError("expected one of nth, times and per_second")
        if not all(0 <= seconds <= _LONGEST for seconds in (fault.delay, fault.drip)):
            raise FaultError(f"expected a time of 0 to {_LONGEST:g} seconds")
        instead = (fault.reply, fault.raw, fault.drop, fault.hang, fault.drop_after)
        if sum(map(bool, instead)) > 1:
            raise FaultError("expected one of reply, raw, drop, drop_after and hang")
        self._check_place(fault)
        return _reply_of(fault)

    def _check_place(self, fault: Fault) -> None:
        """Raise FaultError if the stage has no such thing."""
        if fault.certificate:
            if fault.certificate not in CERTIFICATE_FAULTS:
                raise FaultError(f"certificate: expected one of {', '.join(CERTIFICATE_FAULTS)}")
            if not self._handshake:
                raise FaultError("the rule can never act: this server does no TLS")
            if fault.stage != self._handshake:
                text = f"the handshake is at {self._handshake}, not at {fault.stage}"
                raise FaultError(f"the rule can never act: {text}")
        unknown = sorted(set(fault.without) - _EXTENSIONS)
        if unknown:
            known = ", ".join(sorted(_EXTENSIONS))
            raise FaultError(f"EHLO never offers {unknown[0]!r}; it may offer {known}")
        for name in ("STARTTLS", "AUTH"):
            if name in fault.without and name not in self._stages:
                raise FaultError(f"the rule can never act: this server does not offer {name}")
        if fault.without and fault.stage != "EHLO":
            raise FaultError(
                f"the rule can never act: extensions are offered at EHLO, not at {fault.stage}"
            )
        if fault.drop_after and fault.stage != "DATA":
            raise FaultError(
                "the rule can never act: drop_after counts octets of a message, at DATA"
            )


def _check_kinds(rule: Mapping[str, Any]) -> None:
    """Raise FaultError if a value is of the wrong kind."""
    for name, value in rule.items():
        kind = type(Fault._field_defaults.get(name, ""))
        wanted = (int, float) if kind is float else kind
        right = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
        if kind is tuple:
            right = right and all(isinstance(text, str) for text in value)
        if not right:
            raise FaultError(f"{name} of a rule: expected {_RULE_VALUES[kind]}")


_RULE_VALUES: dict[type, str] = {
    str: "text",
    int: "a number",
    float: "seconds",
    bool: "true or false",
    tuple: "a list",
}


def _differences(fault: Fault) -> dict[str, Any]:
    defaults = Fault._field_defaults
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in fault._asdict().items()
        if name not in defaults or value != defaults[name]
    }


def _reply_of(fault: Fault) -> Reply | None:
    """Return the reply that `fault` names, None if it names none. Raises FaultError."""
    if not fault.reply:
        if fault.per_second:
            text = f"more than {fault.per_second} a second; try again later"
            return Reply(421, "4.7.0", text, close=True)
        if not _differences(fault).keys() - {"stage", "address", "nth", "times", "probability"}:
            raise FaultError("the rule does nothing: give it a reply, a delay, a drop, …")
        return None
    reply = parse_scripted(fault.reply)
    ends = fault.stage == "connect" and reply.is_error
    return reply._replace(close=reply.close or ends)


def parse_scripted(text: str) -> Reply:
    """Return the reply that a test wrote, as "451 4.2.1 busy" or "550". Raises FaultError.

    "\\n" begins a further line. Without an enhanced code, that of a refusal is X.0.0.
    """
    match = re.fullmatch(
        r"([2-5][0-9]{2})(?: ([245]\.[0-9]{1,3}\.[0-9]{1,3}))?(?: (.+))?", text, re.DOTALL
    )
    if match is None:
        raise FaultError(
            f"expected a reply, like '451' or '550 5.1.1 no such user'; "
            f"found {printable(text, 80)!r}"
        )
    code, status, words = match.groups()
    if status and status[0] != code[0]:
        raise FaultError(f"{code} and {status} do not fit: both begin with the same digit")
    if code[0] in "45":
        status = status or f"{code[0]}.0.0"
    usual = "a failure on purpose" if code[0] in "45" else "OK"
    return Reply(int(code), status or "", words or usual, close=code in ("421", "521"))


# The last part of the local part, after a "+":
#
#   450            that reply to RCPT, of all that begin with 4 or 5
#   dot450         that reply to the message, after the final dot
#   timeout        no answer to RCPT
#   drop           the connection is dropped at RCPT
#   slow           the answer to RCPT comes octet by octet
#   delay3         the answer to RCPT comes after so many seconds


def _magic_effect(stage: str, address: str) -> Effect | None:
    """Return what the address of a recipient asks for at `stage`."""
    _, plus, word = split_address(address)[0].rpartition("+")
    match = re.fullmatch(r"(dot)?([45]\d\d)|(timeout|drop|slow)|delay(\d{1,3})", word.lower())
    if not plus or match is None:
        return None
    dot, code, word, seconds = match.groups()
    if (stage == "message") != bool(dot):
        return None
    fault = Fault(stage, reply=code or "", delay=float(seconds or 0), hang=word == "timeout",
                  drop=word == "drop", drip=_DRIP_SECONDS if word == "slow" else 0.0)  # fmt: skip
    return Effect(fault, _reply_of(fault) if code else None)


_TRUST = "does the client trust `certificate`, or use `client_context()`?"
_VERBS_OF = {"STARTTLS": "STARTTLS", "AUTH": "AUTH", "CHUNKING": "BDAT"}
_PARAMETERS_OF = {
    "SIZE": ("SIZE",), "8BITMIME": ("BODY",), "SMTPUTF8": ("SMTPUTF8",),
    "REQUIRETLS": ("REQUIRETLS",), "DSN": ("RET", "ENVID", "NOTIFY", "ORCPT"),
}  # fmt: skip


class Dropped(Disconnected):
    """The connection is to be dropped on purpose."""

    def __init__(self) -> None:
        super().__init__("the connection was dropped on purpose")


class _Answered(Exception):
    """The client has its answer; nothing more is to be said."""


class FaultyStream(Stream):
    """A stream that can write slowly, and break amid a message.

    With `drip`, the next reply is sent octet by octet, so many seconds apart. With `drop_after`,
    `read_some` raises Dropped once so many octets have been read by it.
    """

    __slots__ = ("_slow", "drip", "drop_after")

    def __init__(self, loop: Loop, connected: socket.socket) -> None:
        super().__init__(loop, connected)
        self._slow: list[tuple[bytes, float]] = []
        self.drip = 0.0
        self.drop_after = 0

    def write(self, data: bytes) -> None:
        """As `Stream.write`; slowly if `drip` is set."""
        if self.drip or self._slow:
            self._slow.append((data, self.drip))
            self.drip = 0.0
        else:
            super().write(data)

    async def flush(self) -> None:
        """As `Stream.flush`. Raises Disconnected, Expired."""
        while self._slow:
            data, drip = self._slow.pop(0)
            for piece in (data[at : at + 1] for at in range(len(data))) if drip else (data,):
                super().write(piece)
                await super().flush()
                await self._loop.sleep(drip)
        await super().flush()

    async def read_some(self, limit: int = CHUNK) -> bytes:
        """As `Stream.read_some`. Raises Dropped, Disconnected, Expired."""
        if not self.drop_after:
            return await super().read_some(limit)
        data = await super().read_some(min(limit, self.drop_after))
        self.drop_after -= len(data)
        if not self.drop_after:
            raise Dropped
        return data


class FaultInjection:
    """The hook of one session, which has happen there what a script says.

    `tls_context_of` returns what TLS is done with for one of `CERTIFICATE_FAULTS`.
    """

    def __init__(
        self,
        script: Script,
        stream: FaultyStream,
        tls_context_of: Callable[[str], ssl.SSLContext],
    ) -> None:
        self._script = script
        self._stream = stream
        self._tls_context_of = tls_context_of
        self._without: frozenset[str] = frozenset()

    async def __call__(
        self,
        session: Session,
        stage: str,
        argument: str,
        act: Callable[[], Awaitable[Reply | None]],
    ) -> Reply | None:
        """See `Hook`. Raises Dropped, and what `act` raises."""
        await self._check_offered(session, stage, argument)
        name = {"HELO": "EHLO", "BDAT": "DATA"}.get(stage, stage)
        if name == "EHLO":
            self._without = frozenset()
        elif name == "MAIL":
            self._stream.drop_after = 0  # it was about the message before
        scripted = self._asked(stage, argument)
        if scripted is None and name in STAGES and self._is_begun(session, stage):
            addresses = self._addresses(session, stage, argument)
            try:
                scripted = await self._inject(session, name, addresses)
            except _Answered:
                return None
        if scripted is not None and not scripted.is_error and stage not in ("DATA", "STARTTLS"):
            reply = await act()
            return reply if reply is None or reply.is_error else scripted
        if scripted is not None and stage not in ("connect", "BDAT"):
            session.say(scripted)  # what is not returned is no error of the client
            return None
        try:
            if scripted is not None and session.transaction is not None:
                session.transaction.failure = Refused(scripted)  # the chunk is read all the same
            reply = await act()
        except Refused as refused:
            if scripted is not None and refused.reply is scripted:
                session.say(scripted)
                return None
            raise
        except (TLSFailed, Disconnected) as error:
            if stage in ("connect", "STARTTLS") and not isinstance(error, Dropped):
                session.dialogue.client_spoke = True
                session.dialogue.add("*", f"no TLS came about: {error}; {_TRUST}")
            raise
        if stage == "connect" and scripted is not None:
            return scripted
        return self._offered(reply) if stage == "EHLO" and reply is not None else reply

    def _asked(self, stage: str, argument: str) -> Reply | None:
        """Return what the test's own function answers. Raises FaultError."""
        ask = self._script.on_command
        text = ask(stage, argument) if ask and stage not in ("connect", "message") else None
        return None if text is None else parse_scripted(str(text))

    @staticmethod
    def _is_begun(session: Session, stage: str) -> bool:
        """Whether this is the place of its stage: of a message in chunks, the first."""
        return stage != "BDAT" or session.phase is Phase.RECIPIENTS

    async def _inject(self, session: Session, stage: str, addresses: Sequence[str]) -> Reply | None:
        """Have happen what the script has for this place; return its reply.

        Raises Dropped, _Answered.
        """
        effect = self._script.effect(stage, addresses)
        if effect is None:
            return None
        fault, reply = effect
        session.event(Events.FAULT, stage=stage)
        if fault.delay:
            await session.loop.sleep(fault.delay)
        while fault.hang:
            await self._stream.read_some()
        if fault.drop:
            raise Dropped
        if fault.certificate:
            await self._spoil_handshake(session, fault.certificate)
        self._stream.drip = fault.drip
        self._stream.drop_after = fault.drop_after
        self._without |= frozenset(fault.without)
        if fault.raw:
            session.dialogue.add("S", fault.raw)
            self._stream.write(fault.raw.encode("utf-8", "surrogateescape"))
            raise _Answered
        return reply

    async def _spoil_handshake(self, session: Session, certificate: str) -> None:
        """Raises Dropped if it is to be broken altogether."""
        if certificate != "broken":
            session.tls_context = self._tls_context_of(certificate)
            return
        if not session.port.implicit_tls:
            session.say(Reply(220, "2.0.0", "Ready to start TLS"))
        self._stream.write(b"\x16\x03\x03\x00\x05 oops")
        raise Dropped

    def _offered(self, reply: Reply) -> Reply:
        """Return the reply to EHLO without what is not to be offered."""
        first, *keywords = reply.text.split("\n")
        kept = [keyword for keyword in keywords if keyword.split(" ")[0] not in self._without]
        return reply._replace(text="\n".join([first, *kept]))

    @staticmethod
    def _addresses(session: Session, stage: str, argument: str) -> Sequence[str]:
        try:
            if stage == "MAIL":
                return [parse_path(argument, "FROM:").written]
            if stage == "RCPT":
                return [parse_path(argument, "TO:").written]
        except Refused:
            return []  # the command is refused when it is obeyed
        return session.transaction.recipients if session.transaction is not None else []

    async def _check_offered(self, session: Session, stage: str, argument: str) -> None:
        """Refuse what EHLO was not to offer. Raises Refused."""
        for extension in self._without:
            if _VERBS_OF.get(extension) == stage:
                if stage == "BDAT" and (size := re.match(r"\d{1,12}", argument)):
                    await session.discard_chunk(int(size[0]))
                raise Refused(Reply(502, "5.5.1", "Command not recognized"))
            for name in _PARAMETERS_OF.get(extension, ()):
                if stage in ("MAIL", "RCPT") and re.search(rf"(?i) {name}(=|\s|$)", argument):
                    raise Refused(Reply(555, "5.5.4", f"Parameter {name} not recognized"))


# ======================================================================================
# ROOM: READER
#
# What a person reads in a message: its header fields, text, HTML and attached files, and the
# links and codes in them. There is one reader, for Python, for the page and for programs.
#
# - Whatever a message is made of, something comes of it, in a time that grows with its
#   length alone. Nothing here is refused; who may send such a message is not known here.
# - Practice deviates from the standards, and what mail programs make sense of, this does
#   too: labels of charsets as browsers know them, encoded words where none may stand, file
#   names as raw octets, multipart messages without parts.
# - The octets of an attached file, or of an attached message, are those that were sent.
# ======================================================================================

_PART_LIMIT = 1000  # parts of a message that are looked into
_DEPTH_LIMIT = 30  # of parts within parts
_PARAMETERS_LIMIT = 16 * 1024  # octets of a field that holds them
_TEXT_LIMIT = 2 * 1024 * 1024  # characters of a text that are shown
_META_LIMIT = 2048  # octets of HTML in which its charset is looked for

# Labels as mail uses them, and the codec that practice means: WHATWG Encoding Standard, 4.2.
_CODECS = {
    label: codec
    for codec, labels in {
        "cp1252": "iso-8859-1 iso8859-1 iso88591 iso_8859-1 latin1 latin-1 l1 windows-1252 ibm819",
        "cp1254": "iso-8859-9 iso8859-9 iso88599 iso_8859-9 latin5 l5 windows-1254",
        "cp874": "iso-8859-11 iso8859-11 tis-620 windows-874 dos-874",
        "iso8859_8": "iso-8859-8-i iso-8859-8-e logical visual csiso88598i csiso88598e",
        "gb18030": "gb2312 gb_2312 gb_2312-80 gbk chinese csgb2312 x-gbk cp936 euc-cn",
        "cp932": "shift_jis shift-jis sjis ms_kanji csshiftjis windows-31j x-sjis",
        "cp949": "euc-kr korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949",
        "big5hkscs": "big5 big5-hkscs cn-big5 csbig5 x-x-big5",
        "euc_jp": "x-euc-jp cseucpkdfmtjapanese",
        "koi8_r": "koi koi8",
        "koi8_u": "koi8-ru",
        "mac_roman": "macintosh mac csmacintosh x-mac-roman",
        "mac_cyrillic": "x-mac-cyrillic x-mac-ukrainian",
        "utf_7": "unicode-1-1-utf-7",
        "utf_8": "utf-8 utf8 unicode-1-1-utf-8 x-unicode20utf8",
    }.items()
    for label in labels.split()
}
_GUESSED = {"", "us-ascii", "ascii", "ansi_x3.4-1968", "unknown-8bit", "x-unknown", "default"}
_NO_CHARSETS = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"}


def decode_text(data: bytes, label: str) -> str:
    """Return the text of `data` in a charset, by the label that mail gives it.

    Without a label, or with one that nobody knows or that says ASCII, it is UTF-8 if it can be,
    else windows-1252.
    """
    label = label.strip(" \t\"'").lower()
    codec = _CODECS.get(label) or _CODECS.get(label.replace("_", "-")) or label
    if label not in _GUESSED:
        for name in (codec, codec.removeprefix("x-")):
            try:
                if name.replace("-", "_") not in _NO_CHARSETS:
                    text = data.decode(name, "replace")
                    return text.encode("utf-8", "replace").decode()  # without surrogates
            except (LookupError, ValueError):
                pass
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


# --- header fields ---

# RFC 2047, 2, with a language (RFC 2231, 5); within it also blanks and raw octets
_ENCODED_WORD = re.compile(r"=\?([^?*\s]{1,60})(?:\*[^?\s]{0,60})?\?([BbQq])\?([^?]*)\?=")
_QUOTED_OCTET = re.compile(rb"=([0-9A-Fa-f]{2})")


def _raw_text(value: bytes) -> str:
    """Return a field's octets on one line, raw ones as UTF-8 if they can be (RFC 6532)."""
    return decode_text(value.replace(b"\r", b"").replace(b"\n", b""), "")


def decode_words(text: str) -> str:
    """Return a text with its encoded words decoded; RFC 2047, 6.

    Blanks between two of them go, and the octets of two in one charset are joined, since a
    character may be split among them.
    """
    if "=?" not in text:
        return text
    pieces: list[str] = []
    octets, charset, end = b"", "", 0
    for match in _ENCODED_WORD.finditer(text):
        between, label = text[end : match.start()], match[1].lower()
        if between.strip() or not end:
            pieces += [decode_text(octets, charset) if octets else "", between]
            octets = b""
        elif label != charset:
            pieces.append(decode_text(octets, charset))
            octets = b""
        octets += _decode_word(match[2], match[3])
        charset, end = label, match.end()
    if octets:
        pieces.append(decode_text(octets, charset))
    return "".join(pieces) + text[end:]


def _decode_word(encoding: str, text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    if encoding in "Bb":
        return decode_base64(data)
    octets = data.replace(b"_", b" ")
    return _QUOTED_OCTET.sub(lambda found: bytes([int(found[1], 16)]), octets)


def decode_base64(data: bytes) -> bytes:
    """Return what base64 says, whatever else stands between; RFC 2045, 6.8."""
    blocks = (re.sub(rb"[^A-Za-z0-9+/]", b"", block) for block in data.split(b"="))
    return b"".join(
        base64.b64decode(block[:-1] if len(block) % 4 == 1 else block + b"=" * (-len(block) % 4))
        for block in blocks
    )


def _header_text(value: bytes) -> str:
    """Return a field as people read it: on one line, its encoded words decoded."""
    return UNPRINTABLE.sub(" ", decode_words(_raw_text(value))).strip()


_END_OF_HEADER = re.compile(rb"\r?\n\r?\n")
_START_OF_FIELD = re.compile(rb"\r?\n(?![ \t])")


def _split_header(raw: bytes) -> tuple[list[tuple[str, bytes]], bytes]:
    """Return the fields in front, with their values, and the body. A line that is none is left out.

    A message whose first line is no field has no header.
    """
    first = raw[:1000].partition(b"\n")[0]
    if not re.match(rb"[!-9;-~]+[ \t]*:", first):
        return [], raw[2:] if raw.startswith(b"\r\n") else raw.removeprefix(b"\n")
    end = _END_OF_HEADER.search(raw)
    block, body = (raw[: end.start()], raw[end.end() :]) if end else (raw, b"")
    fields = []
    for line in _START_OF_FIELD.split(block):
        name, colon, value = line.partition(b":")
        if colon and name.strip():
            fields.append((printable(name.decode("latin-1").strip(), 200), value.strip(b" \t")))
    return fields, body


class _Structured(NamedTuple):
    """A field such as Content-Type: its value in lower case, and its parameters."""

    value: str
    parameters: Mapping[str, str]


# a quoted string, or whatever stands up to the next semicolon
_FIELD_PARAMETER = re.compile(
    r";\s*([^\s=;\"]{1,100})\s*=\s*(\"(?:[^\"\\]|\\.)*\"|[^;]*)", re.DOTALL
)
_EXTENDED = re.compile(r"([^*]+)(?:\*(\d{1,3}))?(\*)?")  # RFC 2231, 7


def _parse_structured(field: bytes) -> _Structured:
    """Take a field apart; RFC 2045, 5.1, and RFC 2231, also if it is not quite like that."""
    text = _raw_text(field[:_PARAMETERS_LIMIT])
    with contextlib.suppress(ValueError):
        text = without_comments(text) if "(" in text else text
    plain: dict[str, str] = {}
    extended: dict[str, list[tuple[int, bool, str]]] = {}
    for name, value in _FIELD_PARAMETER.findall(text):
        value = value.strip()
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value.strip('"'))
        match = _EXTENDED.fullmatch(name.lower())
        if match is None or not (match[2] or match[3]):
            plain.setdefault(name.lower(), decode_words(value))
        else:
            section = (int(match[2] or 0), bool(match[3]), value)
            extended.setdefault(match[1], []).append(section)
    joined = {name: _join_sections(sections) for name, sections in extended.items()}
    return _Structured(text.partition(";")[0].strip().lower(), {**plain, **joined})


def _join_sections(sections: list[tuple[int, bool, str]]) -> str:
    """Return the value of an extended or continued parameter; RFC 2231, 3 and 4."""
    from urllib.parse import unquote_to_bytes  # 5 ms; only for such names

    octets, charset = b"", ""
    for number, encoded, value in sorted(sections):
        if encoded and number == 0 and value.count("'") >= 2:
            charset, _, value = value.split("'", 2)
        octets += unquote_to_bytes(value) if encoded else value.encode()
    return decode_text(octets, charset)


# --- parts ---


class Part(NamedTuple):
    """A part of a message that has no parts of its own; an attached message is one.

    `data` are its octets, without their transfer encoding. `text` is None if it is a file
    rather than something to read.
    """

    number: int  # from 1
    content_type: str
    filename: str
    content_id: str
    disposition: str
    data: bytes
    text: str | None

    @property
    def title(self) -> str:
        """The name of the file, or one made up."""
        return self.filename or f"part-{self.number}"


class ReadMessage:
    """A message as it is read. Texts have LF; `html` and `text` are "" if there is none.

    `parts` are those that have no parts of their own, in the order of the message.
    """

    def __init__(self, raw: bytes) -> None:
        fields, body = _split_header(raw)
        self.headers = [(name, _header_text(value)) for name, value in fields]
        self.parts = list(_read_parts(fields, body))
        readable = [part for part in self.parts if part.text is not None]
        html = [part for part in readable if part.content_type == "text/html"]
        self.html = (html[0].text or "")[:_TEXT_LIMIT] if html else ""
        texts = [part.text for part in readable if part not in html]
        self.text = "\n".join(text for text in texts if text)[:_TEXT_LIMIT]
        self._ids = {_unquoted(id) for id in CID.findall(self.html)}

    def header(self, name: str) -> str:
        """Return the first header field of this name, on one line, or ""."""
        found = (value for key, value in self.headers if key.lower() == name.lower())
        return printable(next(found, ""), 1000)

    def addresses(self, name: str) -> list[tuple[str, str]]:
        """Return name and address of each mailbox in the fields of this name."""
        from email.utils import getaddresses  # only who looks into a message needs it

        values = [value for key, value in self.headers if key.lower() == name.lower()]
        try:
            found = getaddresses(values)
        except RecursionError:  # of groups in groups, which no field may hold
            found = [("", value) for value in values]
        return [(who, address) for who, address in found if address or who]

    def is_inline(self, part: Part) -> bool:
        """Tell whether the HTML shows a part, as an image of its own."""
        return bool(part.content_id) and part.content_id in self._ids

    @property
    def attachments(self) -> list[Part]:
        """What is neither text to be read nor an image within it."""
        return [part for part in self.parts if part.text is None and not self.is_inline(part)]

    @property
    def inlines(self) -> list[Part]:
        """The images that the HTML shows."""
        return [part for part in self.parts if part.text is None and self.is_inline(part)]

    @property
    def shown_text(self) -> str:
        """The plain text, or that of the HTML if there is none."""
        return self.text if self.text.strip() else text_of_html(self.html)

    def links(self) -> list[str]:
        """Return the links to web pages, and of mail, in HTML and text, each once."""
        return links_in(self.html, self.text)


CID = re.compile(r"cid:([^\s\"'<>()]{1,998})", re.IGNORECASE)  # RFC 2392


def _unquoted(text: str) -> str:
    from urllib.parse import unquote  # 5 ms; only who looks into a message needs it

    return unquote(text)


def _read_parts(fields: list[tuple[str, bytes]], body: bytes) -> Iterator[Part]:
    """Yield the parts that have none themselves, in their order."""
    rest = [(fields, body, 0)]
    number = 0
    while rest and number < _PART_LIMIT:
        fields, body, depth = rest.pop()
        named = {name.lower(): value for name, value in reversed(fields)}
        kind = _parse_structured(named.get("content-type", b""))
        inner = []
        if kind.value.startswith("multipart/") and depth < _DEPTH_LIMIT:
            inner = _split_parts(body, kind.parameters.get("boundary", ""))
        if inner:
            rest += [(*_split_header(part), depth + 1) for part in reversed(inner)]
        else:
            number += 1
            yield _read_part(number, kind, named, body)


def _split_parts(body: bytes, boundary: str) -> list[bytes]:
    """Return the octets between the lines of a boundary; RFC 2046, 5.1.1."""
    if not boundary:
        return []
    line = re.escape(boundary.encode("utf-8", "replace"))
    delimiter = re.compile(rb"(?:\A|\r?\n)--" + line + rb"(--)?[ \t]*(?=\r?\n|\Z)")
    parts, start = [], -1
    for match in delimiter.finditer(body):
        if start >= 0:
            parts.append(_after_newline(body[start : match.start()]))
        start = match.end()
        if match[1] or len(parts) >= _PART_LIMIT:
            return parts
    if start >= 0:  # the end is missing
        parts.append(_after_newline(body[start:]))
    return parts


def _after_newline(part: bytes) -> bytes:
    return part[2:] if part.startswith(b"\r\n") else part.removeprefix(b"\n")


def _read_part(number: int, kind: _Structured, fields: Mapping[str, bytes], body: bytes) -> Part:
    content_type = kind.value if re.fullmatch(r"[^\s/]+/[^\s/]+", kind.value) else "text/plain"
    if content_type.startswith("multipart/"):  # it says so, but has no parts
        content_type = "text/plain"
    disposition = _parse_structured(fields.get("content-disposition", b""))
    filename = disposition.parameters.get("filename") or kind.parameters.get("name", "")
    data = _decode_body(body, _parse_structured(fields.get("content-transfer-encoding", b"")).value)
    text = None
    is_text = content_type in ("text/plain", "text/html")
    if is_text and disposition.value != "attachment" and not filename:
        text = _text_of(data, content_type, kind.parameters)
    return Part(
        number,
        printable(content_type, 100),
        filename=printable(filename, 255),
        content_id=_header_text(fields.get("content-id", b"")).strip("<> "),
        disposition=printable(disposition.value, 40),
        data=data,
        text=text,
    )


def _decode_body(body: bytes, encoding: str) -> bytes:
    if encoding == "base64":
        return decode_base64(body)
    if encoding == "quoted-printable":
        return binascii.a2b_qp(body)
    return body


_META_CHARSET = re.compile(rb"<meta[^>]{1,300}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I)


def _text_of(data: bytes, content_type: str, parameters: Mapping[str, str]) -> str:
    charset = parameters.get("charset", "")
    if content_type == "text/html" and charset.lower() in _GUESSED:
        found = _META_CHARSET.search(data[:_META_LIMIT])
        charset = found[1].decode("ascii") if found else charset
    text = decode_text(data, charset).removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\0", "\ufffd")
    if parameters.get("format", "").lower() == "flowed":
        text = _without_flow(text, parameters.get("delsp", "").lower() == "yes")
    return text


def _without_flow(text: str, delete_space: bool) -> str:
    """Return a text in which lines that flow are joined; RFC 3676, 4."""
    lines: list[str] = []
    flows, quotes = False, 0
    for line in text.split("\n"):
        content = line.lstrip(">")
        depth = len(line) - len(content)
        content = content.removeprefix(" ")
        if flows and depth == quotes and content != "-- ":
            lines[-1] += content
        else:
            lines.append(f"{'>' * depth} {content}" if depth else content)
        flows, quotes = content.endswith(" ") and content != "-- ", depth
        if flows and delete_space:
            lines[-1] = lines[-1][:-1]
    return "\n".join(lines)


# --- HTML, links and codes ---

# a character reference that names no character; html.unescape fails on the longest of them
_HUGE_REFERENCE = re.compile(r"&#(?:\d{8,}|[xX][0-9A-Fa-f]{7,});?")
_HREF = re.compile(
    r"href\s*=\s*(?:\"([^\"]{1,2000})\"|'([^']{1,2000})'|([^\s>\"']{1,2000}))", re.IGNORECASE
)
_URL = re.compile(r"https?://[^\s<>\"']{1,2000}", re.IGNORECASE)
_BRACKETED_URL = re.compile(r"<\s*((?:https?://|mailto:)[^<>\"']{1,2000})>", re.IGNORECASE)
_INLINE_TAGS = frozenset(
    ("a", "abbr", "b", "code", "em", "font", "i", "mark", "s", "small", "span", "strong", "sub",
     "sup", "tt", "u", "wbr")
)  # fmt: skip


def _unescape(html: str) -> str:
    from html import unescape  # 3 ms; only who looks into a message needs it

    return unescape(_HUGE_REFERENCE.sub("\ufffd", html))


def _without_html_comments(html: str) -> str:
    first, *rest = html.split("<!--")
    return first + "".join(piece.partition("-->")[2] for piece in rest)


def text_of_html(html: str) -> str:
    """Return the text of `html`, roughly, in a time that grows with its length alone.

    The cells of a row of a table stand beside each other.
    """
    first, *pieces = _without_html_comments(html).split("<")
    words, skipped = [first], ""
    for piece in pieces:
        tag, closed, text = piece.partition(">")
        name = tag.split(None, 1)[0].lower() if tag.strip() else ""
        if skipped:
            skipped = "" if name == f"/{skipped}" else skipped
        elif name in ("script", "style", "title"):
            skipped = name
        if skipped or not closed:
            continue
        if name in ("td", "th", "/td", "/th"):
            words += [" " if name[0] != "/" else "", text if text.strip() else ""]
        else:
            words += ["" if name.strip("/") in _INLINE_TAGS else "\n", text]
    return _unescape("".join(words)).strip()


def _without_punctuation(link: str) -> str:
    """Return `link` without what ends the sentence around it."""
    while link and link[-1] in ".,;:!?)]}":
        opening = {")": "(", "]": "[", "}": "{"}.get(link[-1])
        if opening is not None and link.count(opening) >= link.count(link[-1]):
            break
        link = link[:-1]
    return link


def links_in(html: str, text: str) -> list[str]:
    """Return the links in the HTML and the text of a message, each once.

    In a text, one in angle brackets may go over several lines; RFC 3986, appendix C.
    """
    found = ["".join(groups) for groups in _HREF.findall(_without_html_comments(html))]
    links = [_unescape(link).strip() for link in found]
    text = _BRACKETED_URL.sub(lambda match: f"<{''.join(match[1].split())}>", text)
    links += [_without_punctuation(link) for link in _URL.findall(text)]
    wanted = (link for link in links if link.lower().startswith(("http://", "https://", "mailto:")))
    return list(dict.fromkeys(wanted))


_NUMBER = r"(?:(?<=\b[A-Z]-)|(?<![\w.,/:#=&+-]))(%s)(?![\w/-]|[.,:]\d)"
_ANY_DIGITS = _NUMBER % "\\d(?:[ \xa0\u202f-]?\\d){3,9}"
_SIX_DIGITS = _NUMBER % "\\d{3}[ \xa0\u202f-]?\\d{3}"
_CELL_DIGITS = _NUMBER % "\\d(?: \\d){3,9}"  # a digit in each cell of a table
_CODE_WORD = r"\b(?:\w*code|pin|otp|token|\w*passwor[dt])\b"
_CODES = (
    rf"(?i){_CODE_WORD}(?:(?!\n\s*\n|©)\D){{0,60}}?{_ANY_DIGITS}",
    rf"(?i){_ANY_DIGITS}(?:(?!\n\s*\n|©)\D){{0,40}}?{_CODE_WORD}",
    _SIX_DIGITS,
    _CELL_DIGITS,
)


def code_in(text: str, pattern: str = "") -> str | None:
    """Return the one-time code in a text, without spaces or hyphens; None if there is none.

    That is a number of four to ten digits after a word like "code", else before one, else
    one of six digits; or what `pattern`, a regular expression, finds (its first group, if it
    has one).
    """
    searched = text if pattern else _URL.sub(" ", text)
    for expression in (pattern,) if pattern else _CODES:
        match = re.search(expression, searched)
        if match is not None:
            code = match[1] if match.re.groups else match[0]
            return code if pattern else re.sub(r"\D", "", code)
    return None


# What mail programs do not show, or not all of them, as caniemail.com has it.
_HTML_WARNINGS = (
    (r"<script\b", "scripts never run in mail"),
    (r"<form\b|<input\b", "forms do not work in most mail programs"),
    (r"<(?:iframe|object|embed)\b", "embedded documents are not shown"),
    (r"<(?:video|audio)\b", "video and audio play in Apple Mail alone"),
    (r"<link\b[^>]{0,500}stylesheet", "style sheets elsewhere are not loaded; put styles inline"),
    (r"<svg\b|\.svg[\"'?)]", "Gmail and Outlook do not show SVG images"),
    (r"\.webp[\"'?)]", "Outlook for Windows does not show WebP images"),
    (r"src\s*=\s*[\"']?data:", "Gmail and Outlook do not show images in data: addresses"),
    (r"display\s*:\s*(?:flex|grid|inline-flex)", "Outlook for Windows lays out with tables alone"),
    (r"position\s*:\s*(?:absolute|fixed|sticky)", "position is taken out by Gmail and Outlook"),
    (r"background(?:-image)?\s*:[^;\"']{0,200}url\(", "Outlook shows no background images"),
    (r"@font-face", "web fonts are loaded by Apple Mail alone; name a common font behind them"),
    (r"<img\b(?![^>]{0,2000}\balt\s*=)", "an image has no alt text, which is all that many see"),
)
_CLIPPED = 102 * 1024  # octets, above which Gmail cuts


def html_warnings(html: str) -> list[str]:
    """Return what some mail programs will not show of HTML, as sentences."""
    html = _without_html_comments(html)
    found = [text for pattern, text in _HTML_WARNINGS if re.search(pattern, html, re.IGNORECASE)]
    if len(html.encode("utf-8", "replace")) > _CLIPPED:
        found.append("Gmail cuts a message that has more than 102 kB of HTML")
    return found


# ======================================================================================
# ROOM: CAPTURE
#
# A real server that keeps what it is sent instead of delivering it, for tests of whatever
# sends mail:
#
#     with chasquid.CaptureServer() as server:
#         send_newsletter(server.hostname, server.port)
#         [message] = server.wait_for(1)
#         assert message.rcpt_tos == ["ana@here.example"]
#
# - The dialogue is the one of SESSION: the same replies, TLS and limits. What becomes of
#   mail a receiver of our own decides: no DNS is asked, no sender is judged, every recipient
#   is known, and no message is written to the disk. Faults come in by the session's hook.
# - A server runs in a thread of its own, on a port that the system chose; any number run
#   side by side. Whoever uses one may do so from any thread.
# - Bad use is told at once, in a sentence: a port that is taken, a rule that can never
#   act, waiting for mail at a server that is stopped.
# ======================================================================================

_TRANSCRIPTS = 1000  # sessions whose dialogue is kept
_TRANSCRIPT_LINES = 10_000  # of each
_STOP_WAIT = 0.02  # seconds for sessions to say goodbye; their clients may not care
_JOIN_SECONDS = 10.0
_CAPTURE_WORKERS = 4
_SHOWN = 10  # messages in an error
CAPTURE_SIZE = 50 * 1024 * 1024
_USUAL_USERS = {"user": "password"}
_CERTIFICATE_NAMES = ("localhost", "127.0.0.1", "::1")


class NotArrived(ChasquidError, AssertionError):
    """What a test waited for did not come; the text shows what did."""


class Unexpected(ChasquidError, AssertionError):
    """Something came where nothing was to come; the text shows it."""


class NotFound(ChasquidError, AssertionError):
    """A message has no such link or code; the text shows what it has."""


class Captured:
    """A message as it came in: its envelope, its octets, and what was said."""

    def __init__(
        self, id: str, received: float, mail_from: str, rcpt_tos: Sequence[str], raw: bytes, *,
        peer: str, port: str, hello: str, tls: str, login: str, smtputf8: bool, dialogue: Dialogue,
    ) -> None:  # fmt: skip
        self.id = id
        self.received = received  # seconds since 1970
        self.mail_from = mail_from  # as it was written, "" for <>
        self.rcpt_tos = tuple(rcpt_tos)  # as they were written
        self.raw = raw  # with CRLF, as it came
        self.peer = peer
        self.port = port
        self.hello = hello
        self.tls = tls  # version and cipher, "" without TLS
        self.login = login  # "" if nobody logged in
        self.smtputf8 = smtputf8
        self._dialogue = dialogue
        self._message: Any = None

    @property
    def transcript(self) -> str:
        """The session up to now: lines that begin with "C: " or "S: "."""
        return "\n".join(list(self._dialogue.lines))

    @functools.cached_property
    def content(self) -> ReadMessage:
        """The message as a person reads it, read when it is first asked for."""
        return ReadMessage(self.raw)

    @property
    def message(self) -> CapturedMessage:
        """The message, parsed when it is first asked for, its lines ended by LF."""
        if self._message is None:
            from email.parser import BytesParser  # 25 ms; who only counts needs none of it

            kind, policy = _message_kind()
            message = BytesParser(policy=policy).parsebytes(self.raw.replace(b"\r\n", b"\n"))
            message.__class__ = kind  # its parts are not captured themselves
            message.captured = self
            self._message = message
        return self._message  # type: ignore[no-any-return]


class MessageDetails:
    """What a captured message has beyond `email.message.EmailMessage`."""

    captured: Captured

    @property
    def mail_from(self) -> str:
        """The reverse-path as it was written, "" for <>."""
        return self.captured.mail_from

    @property
    def rcpt_tos(self) -> list[str]:
        """The recipients of the envelope, as they were written."""
        return list(self.captured.rcpt_tos)

    @property
    def peer(self) -> str:
        """The IP address of the client."""
        return self.captured.peer

    @property
    def hello(self) -> str:
        """What the client called itself."""
        return self.captured.hello

    @property
    def tls(self) -> str:
        """Version and cipher, as in "TLSv1.3 TLS_AES_256_GCM_SHA384"; "" without TLS."""
        return self.captured.tls

    @property
    def login(self) -> str:
        """The user who had logged in, "" for nobody."""
        return self.captured.login

    @property
    def smtputf8(self) -> bool:
        """Whether MAIL said SMTPUTF8 (RFC 6531)."""
        return self.captured.smtputf8

    @property
    def raw(self) -> bytes:
        """The octets as they came, with CRLF."""
        return self.captured.raw

    @property
    def transcript(self) -> str:
        """The session up to now: lines that begin with "C: " or "S: "."""
        return self.captured.transcript

    @property
    def content(self) -> ReadMessage:
        """The message as a person reads it: header, text, HTML, attachments."""
        return self.captured.content

    @property
    def text(self) -> str:
        """What a reader sees: the plain text, or that of the HTML if there is none."""
        return self.content.shown_text

    @property
    def html(self) -> str:
        """The HTML, "" if there is none."""
        return self.content.html

    def links(self, pattern: str = "") -> list[str]:
        """Return the addresses of web pages in text and HTML, each once, in their order.

        With `pattern`, a regular expression, only those in which it is found.
        """
        links = [link for link in self.content.links() if link[:4].lower() == "http"]
        return [link for link in links if re.search(pattern, link)]

    def link(self, pattern: str = "") -> str:
        """Return the first of `links`. Raises NotFound."""
        __tracebackhide__ = True
        links = self.links(pattern)
        if not links:
            there = ", ".join(self.links()) or "none"
            raise NotFound(f"no link in the message fits {pattern!r}; it has: {there}")
        return links[0]

    def code(self, pattern: str = "") -> str:
        """Return the one-time code in the text (see `code_in`). Raises NotFound."""
        __tracebackhide__ = True
        code = code_in(self.text, pattern)
        if code is None:
            wanted = f"fits {pattern!r}" if pattern else "looks like one"
            text = printable(self.text, 500)
            raise NotFound(f"no code in the message {wanted}; its text is: {text!r}")
        return code


if TYPE_CHECKING:

    class CapturedMessage(MessageDetails, EmailMessage):
        """A message that was captured, with its envelope."""


@functools.cache
def _message_kind() -> tuple[type[CapturedMessage], Any]:
    """Return the class of captured messages, and the policy that reads them."""
    from email.message import EmailMessage
    from email.policy import EmailPolicy

    class Policy(EmailPolicy):
        """Takes UTF-8 in header fields for what it is (RFC 6532)."""

        def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
            name, value = super().header_source_parse(sourcelines)
            octets = value.encode("utf-8", "surrogateescape")
            return name, octets.decode("utf-8", "surrogateescape")

        def header_fetch_parse(self, name: str, value: str) -> Any:
            try:
                return super().header_fetch_parse(name, value)
            except Exception:  # the parser has faults of its own, and a test is not about them
                return printable(value)

    kind = type("CapturedMessage", (MessageDetails, EmailMessage), {"__module__": __name__})
    return kind, Policy(utf8=True)


def __getattr__(name: str) -> Any:
    """Make `CapturedMessage` when it is asked for: it needs the package email (PEP 562)."""
    if name == "CapturedMessage":
        return _message_kind()[0]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Mailbox:
    """What a server has captured, oldest first. Any thread may use it.

    Beyond `keep` messages, or `keep_octets` of them (0: there is no such limit), the oldest
    go, but never the last.
    """

    def __init__(self, keep: int = 0, keep_octets: int = 0) -> None:
        self._keep = keep or sys.maxsize
        self._keep_octets = keep_octets or sys.maxsize
        self._octets = 0
        self._messages: dict[str, Captured] = {}
        self._changed = threading.Condition()
        self._watchers: list[Callable[[], None]] = []

    def add(self, captured: Captured) -> None:
        """Keep a message, and let the oldest go beyond what may be kept."""
        with self._changed:
            self._messages[captured.id] = captured
            self._octets += len(captured.raw)
            while len(self._messages) > 1 and (
                len(self._messages) > self._keep or self._octets > self._keep_octets
            ):
                oldest = self._messages.pop(next(iter(self._messages)))
                self._octets -= len(oldest.raw)
        self._tell()

    def limit(self, keep: int, keep_octets: int) -> None:
        """Keep no more than so much from the next message on."""
        with self._changed:
            self._keep, self._keep_octets = keep or sys.maxsize, keep_octets or sys.maxsize

    def all(self) -> list[Captured]:
        """Return what is kept, the oldest first."""
        with self._changed:
            return list(self._messages.values())

    def get(self, id: str) -> Captured | None:
        """Return a message by its id; None if it is not kept."""
        with self._changed:
            return self._messages.get(id)

    def remove(self, id: str) -> bool:
        """Forget a message; false if there is none."""
        with self._changed:
            removed = self._messages.pop(id, None)
            self._octets -= len(removed.raw) if removed is not None else 0
        if removed is not None:
            self._tell()
        return removed is not None

    def clear(self) -> None:
        """Forget all messages."""
        with self._changed:
            self._messages.clear()
            self._octets = 0
        self._tell()

    def watch(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have `call` called after each change, in the thread that made it.

        Returns what ends that.
        """
        with self._changed:
            self._watchers.append(call)

        def end() -> None:
            with self._changed, contextlib.suppress(ValueError):
                self._watchers.remove(call)

        return end

    def wait(
        self,
        look: Callable[[list[Captured]], T | None],
        seconds: float,
        is_over: Callable[[], bool],
    ) -> T | None:
        """Return what `look` makes of the messages as soon as that is something.

        None if it is nothing after so many seconds, or nothing more can come.
        """
        end = time.monotonic() + seconds
        while True:
            with self._changed:
                seen = list(self._messages.values())
            found = look(seen)
            if found is not None:
                return found
            with self._changed:
                if list(self._messages.values()) != seen:
                    continue  # more has come while we looked
                left = end - time.monotonic()
                if left <= 0 or is_over():
                    return None
                self._changed.wait(left)

    def wake(self) -> None:
        """Have those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def _tell(self) -> None:
        self.wake()
        for call in list(self._watchers):
            call()


def _first(
    condition: Callable[[CapturedMessage], object], seen: list[Captured]
) -> CapturedMessage | None:
    return next((captured.message for captured in seen if condition(captured.message)), None)


def _at_least(count: int, seen: list[Captured]) -> list[CapturedMessage] | None:
    return [captured.message for captured in seen] if len(seen) >= count else None


class _Lines(Sink):
    """Keeps the log in memory."""

    def __init__(self) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=1000)

    def write(self, text: str) -> None:
        self.lines.append(text)

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass


class CaptureSettings(NamedTuple):
    """How a server that captures behaves. `size_limit` is in octets, `name` what it calls itself.

    Of `keep` messages or `keep_octets` of them, whichever is less, the oldest go (0: all stay).
    `tls_context` replaces the certificate made for tests, and with `client_ca`, the path of a PEM
    file, clients need a certificate of that authority. `path` is of a Unix socket to listen at
    instead of a port. `lenient` takes messages whose header is none.

    `tls` is "off", "starttls" or "implicit". `users` are names and passwords, or tells
    whether a password is right; None is {"user": "password"}.
    """

    name: str = "localhost"
    tls: str = "off"
    users: Mapping[str, str] | Callable[[str, str], bool] | None = None
    login_required: bool = False
    login_in_the_clear: bool = False
    tls_required: bool = False
    size_limit: int = CAPTURE_SIZE
    keep: int = 0
    keep_octets: int = 0
    tls_context: ssl.SSLContext | None = None
    client_ca: str = ""
    path: str = ""
    lenient: bool = False

    @property
    def port(self) -> Port:
        """What a session knows of the port that it came by."""
        return Port("smtp", self.login_required, self.tls == "implicit")


_FIXED_SETTINGS = ("tls", "tls_context", "client_ca", "path", "name")  # while a server runs
Command = collections.namedtuple("Command", "verb argument reply")


class _Arrived:
    """The octets of a message, in memory."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    async def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._pieces.append(piece)

    def discard(self) -> None:
        self._pieces.clear()

    def octets(self) -> bytes:
        return b"".join(self._pieces)


class _CaptureReceiver:
    """The receiver of a server that captures: every sender and recipient is known."""

    def __init__(self, loop: Loop, server: CaptureServer) -> None:
        self._loop = loop
        self._server = server
        self._max_received = Config("", "localhost").max_received_headers

    @property
    def _settings(self) -> CaptureSettings:
        return self._server.settings

    def extensions(self, client: ClientInfo) -> list[str]:
        login = client.tls or self._settings.login_in_the_clear
        return ["DSN", *(["REQUIRETLS"] if client.tls else []),
                *(["AUTH PLAIN LOGIN"] if login else [])]  # fmt: skip

    async def authenticate(self, client: ClientInfo, login: str, password: bytes) -> Login:
        users = _USUAL_USERS if self._settings.users is None else self._settings.users
        try:
            said = password.decode()
        except UnicodeDecodeError:
            return Login(None)
        right = users(login, said) if callable(users) else users.get(login) == said
        return Login(login if right else None)

    async def check_sender(self, client: ClientInfo, path: Path) -> Spf:
        if self._settings.tls_required and not client.tls:
            raise Refused(Reply(530, "5.7.0", "Must issue a STARTTLS command first"))
        client.check_login()
        return Spf("none")

    async def resolve(
        self, client: ClientInfo, path: Path, dsn: DsnParameters
    ) -> Sequence[FinalRecipient]:
        return [
            FinalRecipient(Destination(DestinationKind.ADDRESS, path.written), path.written, dsn)
        ]

    def incoming(self, transaction: Transaction) -> _Arrived:
        return _Arrived()

    async def accept(self, client: ClientInfo, transaction: Transaction) -> Reply:
        content = transaction.incoming
        assert isinstance(content, _Arrived)
        raw = content.octets()
        header = header_block(raw)
        block = raw if header is None else header
        if not self._settings.lenient:
            check_header(lambda: header_fields(block), self._max_received, not client.user)
        captured = Captured(
            new_id(),
            self._loop.clock.time(),
            transaction.path.written,
            rcpt_tos=transaction.recipients,
            raw=raw,
            peer=client.peer,
            port=client.port.name,
            hello=client.hello,
            tls=client.tls,
            login=client.user,
            smtputf8=transaction.smtputf8,
            dialogue=client.dialogue,
        )
        answer = self._server.ask_about(captured)
        if answer is not None and answer.is_error:
            raise Refused(answer)
        self._server.server_log.event(
            Events.CAPTURED,
            id=captured.id,
            peer=client.peer,
            port=client.port.name,
            from_=captured.mail_from,
        )
        self._server.mailbox.add(captured)
        return answer or Reply(250, "2.0.0", f"OK: queued as {captured.id}")


_MAKING_CERTIFICATES = threading.Lock()


def _certificates() -> tuple[str, dict[str, str]]:
    """Return a file of certificates to trust, and the paths of all, by kind.

    They are made once in a process. A key stands behind its certificate. Raises ChasquidError.
    """
    with _MAKING_CERTIFICATES:
        try:
            return _make_certificates()
        except OSError as error:
            text = f"the certificates of the tests cannot be written: {reason(error)}"
            raise ChasquidError(text) from error


@functools.cache
def _make_certificates() -> tuple[str, dict[str, str]]:
    import atexit
    import shutil
    import tempfile

    directory = tempfile.mkdtemp(prefix="chasquid-")
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a fork of this process has no right to it
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    now = time.time()
    kinds: dict[str, tuple[tuple[str, ...], float]] = {
        "good": (_CERTIFICATE_NAMES, now),
        # issuers are found by their names, so each has its own
        "expired": (("expired.invalid", *_CERTIFICATE_NAMES), now - 11 * 365 * 86400),
        "wrong-name": (("wrong.invalid",), now),
        "untrusted": (("untrusted.invalid", *_CERTIFICATE_NAMES), now),
    }
    paths, trusted = {}, ""
    for kind, (names, at) in kinds.items():
        chain, key = self_signed_certificate(names, at)
        paths[kind] = os.path.join(directory, f"{kind}.pem")
        with open(os.open(paths[kind], os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(chain + key)
        trusted += "" if kind == "untrusted" else chain
    bundle = os.path.join(directory, "trusted.pem")
    with open(bundle, "w") as file:
        file.write(trusted)
    return bundle, paths


@functools.cache
def tls_context_of(kind: str) -> ssl.SSLContext:
    """Return the server's side of TLS with a certificate: "good", or of `CERTIFICATE_FAULTS`."""
    path = _certificates()[1][kind]
    return server_tls_context(path, path)


class Releaser:
    """Sends captured messages on, to the real server at `address` ("host:port").

    With a `login`, user and password, only over TLS with a valid certificate; without one,
    TLS is used if it is offered.
    """

    def __init__(
        self, loop: Loop, address: str, login: tuple[str, str] | None = None, hostname: str = ""
    ) -> None:
        self.address = address
        names = Names(loop, DnsClient(loop, ()).ask)
        name = hostname or domain_to_ascii(socket.gethostname())
        safe = login is not None
        self._courier = SmarthostCourier(loop, names, name, address=address, login=login, safe=safe)

    async def __call__(self, captured: Captured, to: Sequence[str]) -> str:
        """Send a message to these recipients; return what became of it.

        Raises ChasquidError if any of them did not get it.
        """
        raw = captured.raw
        delivery = Delivery(
            captured.id, captured.mail_from, Message(b"", "", len(raw), raw),
            smtputf8=captured.smtputf8, eight_bit=not raw.isascii(),
        )  # fmt: skip
        destinations = [
            Destination(DestinationKind.ADDRESS, address) for address in dict.fromkeys(to)
        ]
        results = await self._courier.deliver(delivery, destinations)
        told = [
            f"{destination.value}: {result.state}: {result.text}"
            for destination, result in zip(destinations, results, strict=True)
        ]
        if any(result.state != State.SENT for result in results):
            raise ChasquidError("; ".join(told))
        return "; ".join(told)


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raise ChasquidError if there is no such setting."""
    unknown = sorted(set(settings) - set(CaptureSettings._fields))
    if unknown:
        known = ", ".join(("host", "port", "faults", "magic", "timeout", *CaptureSettings._fields))
        raise ChasquidError(f"there is no setting {unknown[0]!r}; there are {known}")


class CaptureServer:
    """A real SMTP server for tests: it takes mail in, and shows it.

    `port` 0 lets the system choose. The keywords are those of `CaptureSettings`; `faults`
    are rules that are there from the start, `magic` lets recipients name a failure
    ("ana+450@here.example"), and `timeout` is how many seconds `wait_for` waits.

    Raises ChasquidError if the port is taken or the settings make no sense.
    """

    __test__ = False  # it is not a test, whatever its user calls it

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        faults: Iterable[Fault | Mapping[str, Any]] | Fault = (),
        magic: bool = True,
        timeout: float = 5.0,
        **settings: Any,
    ) -> None:
        _check_names(settings)
        if settings.get("tls_context") is not None:
            settings.setdefault("tls", "starttls")
        self.settings = CaptureSettings(**settings)
        self.hostname = host
        self._wanted_port = port
        self._timeout = timeout
        self._magic = magic
        self._log = _Lines()
        self.server_log = Log(self._log, self._log)
        self.server_log.dialogues = collections.deque(maxlen=_TRANSCRIPTS)
        stages, handshake = self._check_settings()
        self.mailbox = Mailbox(self.settings.keep, self.settings.keep_octets)
        self._faults = (faults,) if isinstance(faults, (Fault, str, Mapping)) else tuple(faults)
        self.script = Script(Clock(), stages, handshake, magic)
        self._add_faults()
        self._on_message: Callable[[CapturedMessage], str | None] | None = None
        self._run: _CaptureRun | None = None
        self._was_started = False
        self._changing = threading.Lock()

    def __enter__(self) -> CaptureServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> CaptureServer:
        return self.start()

    async def __aexit__(self, *_: object) -> None:
        import asyncio

        await asyncio.to_thread(self.stop)

    def __repr__(self) -> str:
        state = f"at {self.hostname}:{self._run.port}" if self._run else "stopped"
        return f"<CaptureServer {state}, {plural(len(self.mailbox.all()), 'message')}>"

    # --- running ---

    def start(self) -> CaptureServer:
        """Listen, and serve in a thread. Raises ChasquidError if the port is taken."""
        with self._changing:
            if self._run is not None:
                raise ChasquidError(f"the server is running already, at port {self._run.port}")
            self._run = _CaptureRun(self)
            self._was_started = True
        return self

    def stop(self) -> None:
        """End the server; what was captured stays. Nothing if it is stopped already."""
        run = self._run
        if run is not None and run.is_own_thread():
            raise ChasquidError("the server cannot be stopped from its own thread")
        with self._changing:
            if self._run is not None:
                self._run.stop()
                self._run = None
        self.mailbox.wake()

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._run is not None

    @property
    def port(self) -> int:
        """The number of the port. Raises ChasquidError if the server is not running."""
        return self.run.port

    @property
    def address(self) -> Any:
        """Host and port, as `socket` and others want them; of a Unix socket its path."""
        return self.settings.path or (self.hostname, self.port)

    def configure(self, **changes: Any) -> None:
        """Change settings while the server runs, for sessions from now on. Raises ChasquidError."""
        fixed = sorted(set(changes) & set(_FIXED_SETTINGS))
        if fixed:
            raise ChasquidError(f"{fixed[0]} is decided when the server is made")
        _check_names(changes)
        before, self.settings = self.settings, self.settings._replace(**changes)
        try:
            self._check_settings()
        except ChasquidError:
            self.settings = before
            raise
        self.mailbox.limit(self.settings.keep, self.settings.keep_octets)
        if self._run is not None:
            self._run.take_settings(self.settings)

    @property
    def run(self) -> _CaptureRun:
        """What belongs to the running server. Raises ChasquidError if there is none."""
        if self._run is None:
            raise ChasquidError("the server is not running: start it, or use it in a with block")
        return self._run

    # --- TLS and logins ---

    @property
    def certificate(self) -> str:
        """The path of a PEM file with what a client has to trust."""
        if self.settings.tls == "off":
            raise ChasquidError('the server does no TLS: make it with tls="starttls" or "implicit"')
        return _certificates()[0]

    def client_context(self) -> ssl.SSLContext:
        """Return a context for the client side that trusts the server and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.certificate)
        return context

    @property
    def login(self) -> str:
        """The first of the users that may log in."""
        return self._user[0]

    @property
    def password(self) -> str:
        """The password of `login`."""
        return self._user[1]

    @property
    def _user(self) -> tuple[str, str]:
        users = _USUAL_USERS if self.settings.users is None else self.settings.users
        if callable(users) or not users:
            raise ChasquidError("the server was given no list of users, so there is no first one")
        return next(iter(users.items()))

    # --- what was captured ---

    @property
    def messages(self) -> list[CapturedMessage]:
        """What was captured, oldest first."""
        return [captured.message for captured in self.mailbox.all()]

    outbox = messages

    @property
    def transcripts(self) -> list[str]:
        """The last 1000 sessions: lines that begin with "C: " or "S: "."""
        return ["\n".join(list(dialogue.lines)) for dialogue in list(self.server_log.dialogues)]

    @property
    def log(self) -> list[str]:
        """What the server has noted down, a line each."""
        return list(self._log.lines)

    @property
    def commands(self) -> list[Command]:
        """What clients said, in its order: verb, argument, and the last reply to it."""
        found: list[Command] = []
        for transcript in self.transcripts:
            for line in transcript.split("\n"):
                if line.startswith("C: "):
                    verb, _, argument = line[3:].partition(" ")
                    found.append(Command(verb, argument, ""))
                elif line.startswith("S: ") and found:
                    found[-1] = found[-1]._replace(reply=line[3:])
        return found

    def inbox(self, address: str) -> list[CapturedMessage]:
        """Return the messages with this recipient, oldest first."""
        wanted = address.lower()
        return [message for message in self.messages if wanted in map(str.lower, message.rcpt_tos)]

    # --- a test's own functions ---

    def on_message(self, call: Callable[[CapturedMessage], str | None]) -> Any:
        """Have `call` asked about each message before the reply to it; return it.

        It may return a reply: one that refuses ("451 4.3.0 busy") means that the message is
        not kept. It is called in the server's thread.
        """
        self._on_message = call
        return call

    def on_command(self, call: Callable[[str, str], str | None]) -> Any:
        """Have `call` asked about each command, its verb and argument; return it.

        It may return a reply, which means the same as that of a `Fault`. It is called in the
        server's thread.
        """
        self.script.on_command = call
        return call

    def ask_about(self, captured: Captured) -> Reply | None:
        """Return what the test's own function answers to a message. Raises FaultError."""
        text = self._on_message(captured.message) if self._on_message else None
        return None if text is None else parse_scripted(str(text))

    # --- waiting ---

    if TYPE_CHECKING:

        @overload
        def wait_for(
            self, what: int = 1, timeout: float | None = None
        ) -> list[CapturedMessage]: ...
        @overload
        def wait_for(
            self, what: Callable[[CapturedMessage], object], timeout: float | None = None
        ) -> CapturedMessage: ...

    def wait_for(
        self, what: int | Callable[[CapturedMessage], object] = 1, timeout: float | None = None
    ) -> list[CapturedMessage] | CapturedMessage:
        """Wait for a number of messages, or for one that `what` is true of.

        Returns all messages as soon as there are so many, or that one. Raises NotArrived
        after `timeout` seconds with what did arrive, and ChasquidError if the server is
        stopped, so that nothing more can.
        """
        __tracebackhide__ = True
        look = self._look_for(what)
        seconds = self._timeout if timeout is None else timeout
        found: list[CapturedMessage] | CapturedMessage | None = look(self.mailbox.all())
        if found is None and _is_in_event_loop():
            text = "wait_for would block the event loop: say await server.arrived(…) instead"
            raise ChasquidError(text)
        found = self.mailbox.wait(look, seconds, self._is_over) if found is None else found
        if found is None:
            self._miss(what, seconds)
        return found

    async def arrived(
        self, what: int | Callable[[CapturedMessage], object] = 1, timeout: float | None = None
    ) -> Any:
        """Wait as `wait_for` does, without holding up asyncio's event loop."""
        import asyncio

        __tracebackhide__ = True
        look = self._look_for(what)
        seconds = self._timeout if timeout is None else timeout
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(changed.set)

        end = self.mailbox.watch(tell)
        try:
            async with asyncio.timeout(seconds):
                while (found := look(self.mailbox.all())) is None and not self._is_over():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            found = look(self.mailbox.all())
        finally:
            end()
        if found is None:
            self._miss(what, seconds)
        return found

    def expect_nothing(self, seconds: float = 0.5) -> None:
        """Wait so long; raise Unexpected if a message comes, or had come since `reset`."""
        __tracebackhide__ = True
        if self.mailbox.wait(functools.partial(_at_least, 1), seconds, self._is_over):
            raise Unexpected(self._not_arrived(1, "nothing was to arrive; looked"))

    def _look_for(self, what: Any) -> Callable[[list[Captured]], Any]:
        if callable(what):
            return functools.partial(_first, what)
        if type(what) is not int or what < 1:
            raise ChasquidError(
                f"expected a number of messages from 1, or a condition; found {what!r}. "
                "That nothing arrives is what expect_nothing() is for"
            )
        return functools.partial(_at_least, what)

    def _miss(self, what: Any, seconds: float) -> NoReturn:
        """Raise what says that something did not arrive."""
        __tracebackhide__ = True
        if self._run is None:
            begin = "not started: call start(), or use it in a with block"
            state = "stopped" if self._was_started else begin
            raise ChasquidError(
                self._not_arrived(what, f"the server is {state}; it is vain to wait")
            )
        raise NotArrived(self._not_arrived(what, f"waited {seconds:g} s in vain"))

    def _is_over(self) -> bool:
        return self._run is None

    def reset(self) -> None:
        """Forget messages and transcripts, and rules and functions added since the start."""
        self._on_message = self.script.on_command = None
        self.mailbox.clear()
        self.server_log.dialogues.clear()
        self._log.lines.clear()
        self.script.clear()
        self._add_faults()

    def fault(self, stage: str, **rule: Any) -> str:
        """Add a rule (`Fault`) to the script; return its id. Raises FaultError.

        `server.fault("RCPT", reply="451 4.2.1 busy", times=2)` refuses the first two
        recipients, and accepts them from then on.
        """
        return self.script.add_rule({**rule, "stage": stage})

    # --- behind it ---

    def _add_faults(self) -> None:
        for fault in self._faults:
            if isinstance(fault, Fault):
                self.script.add(fault)
            elif isinstance(fault, Mapping):
                self.script.add_rule(fault)
            else:
                raise FaultError(f"faults: expected chasquid.Fault objects, found {fault!r}")

    def _not_arrived(self, what: object, how: str) -> str:
        if callable(what):
            wanted = f"a message that {getattr(what, '__name__', 'the condition')} is true of"
        else:
            wanted = plural(what, "message")  # type: ignore[arg-type]
        seen = self.mailbox.all()
        lines = [f"{how} for {wanted}; arrived: {plural(len(seen), 'message')}"]
        for number, captured in enumerate(seen[-_SHOWN:], max(1, len(seen) - _SHOWN + 1)):
            subject = printable(str(captured.message.get("Subject", "")), 100)
            lines.append(
                f"  {number}. from <{captured.mail_from}> "
                f"to {', '.join(captured.rcpt_tos)}: {subject!r}"
            )
        transcripts = self.transcripts[-3:]
        lines += ["the last sessions:"] if transcripts else ["nobody has connected"]
        for transcript in transcripts:
            lines += ["  " + line for line in transcript.split("\n")[-40:]] + ["  --"]
        serious = (Events.ERROR.name, Events.CRASH.name)
        crashes = [line for line in self.log if parse_event(line)[1].get("event") in serious]
        return "\n".join(lines + crashes)

    def _check_settings(self) -> tuple[list[str], str]:
        """Return the stages that come up, and which has the handshake. Raises ChasquidError."""
        settings = self.settings
        users = settings.users
        if not (users is None or callable(users) or isinstance(users, Mapping)):
            raise ChasquidError(
                "users: expected names and passwords ({'ana': 'secret'}) or a function"
            )
        if not isinstance(settings.name, str) or not is_host_name(settings.name):
            raise ChasquidError(f"name: expected the name of a host, found {settings.name!r}")
        for key, least in (("size_limit", 1), ("keep", 0), ("keep_octets", 0)):
            value = getattr(settings, key)
            if type(value) is not int or value < least:
                raise ChasquidError(f"{key}: expected a number from {least}, found {value!r}")
        if not isinstance(self._timeout, (int, float)) or not self._timeout >= 0:
            raise ChasquidError(f"timeout: expected seconds, found {self._timeout!r}")
        if not isinstance(self._magic, bool):
            raise ChasquidError(f"magic: expected True or False, found {self._magic!r}")
        if settings.tls not in ("off", "starttls", "implicit"):
            raise ChasquidError(
                f'tls: expected "off", "starttls" or "implicit", found {settings.tls!r}'
            )
        if settings.client_ca and settings.tls == "off":
            raise ChasquidError('client_ca needs tls="starttls" or "implicit"')
        if settings.tls_context is not None and settings.tls == "off":
            raise ChasquidError('tls_context needs tls="starttls" or "implicit"')
        login = settings.tls != "off" or settings.login_in_the_clear
        if settings.login_required and not login:
            raise ChasquidError(
                'login_required: nobody logs in without TLS; add tls="starttls" or '
                "login_in_the_clear=True"
            )
        if settings.tls_required and settings.tls == "off":
            raise ChasquidError('tls_required needs tls="starttls" or "implicit"')
        without = set()
        if settings.tls != "starttls":
            without.add("STARTTLS")
        if not login:
            without.add("AUTH")
        handshake = {"off": "", "starttls": "STARTTLS", "implicit": "connect"}[settings.tls]
        return [stage for stage in STAGES if stage not in without], handshake

    def make_listeners(self) -> list[socket.socket]:
        """Return listening sockets, for a name those of all its addresses. Raises ChasquidError."""
        if self.settings.path:
            return [_listen_at_path(self.settings.path)]
        host = self.hostname or "0.0.0.0"
        if self._wanted_port:
            with contextlib.suppress(ChasquidError):  # one of the families may be missing
                return listen(host, self._wanted_port)
        return listen(host, self._wanted_port, once=True)

    def server_context(self) -> ssl.SSLContext | None:
        """Return what TLS is done with; None without TLS. Raises ChasquidError."""
        settings = self.settings
        if settings.tls == "off":
            return None
        context = settings.tls_context or tls_context_of("good")
        if settings.client_ca:
            if settings.tls_context is None:
                path = _certificates()[1]["good"]
                context = server_tls_context(path, path)  # the usual one is shared
            try:
                context.load_verify_locations(settings.client_ca)
            except (OSError, ssl.SSLError) as error:
                text = f"client_ca: {settings.client_ca} cannot be used: {reason(error)}"
                raise ChasquidError(text) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _listen_at_path(path: str) -> socket.socket:
    """Return a listening Unix socket; raises ChasquidError if its path is taken."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        raw.bind(path)
        raw.listen(128)
    except OSError as error:
        raw.close()
        raise ChasquidError(f"cannot listen on {path}: {reason(error)}") from error
    raw.setblocking(False)
    return raw


def _is_in_event_loop() -> bool:
    """Tell whether asyncio runs in this thread."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is not None
    return False


class _CaptureRun:
    """One run of a server, from its start to its end: the thread, and what lives in it."""

    def __init__(self, server: CaptureServer) -> None:
        self._server = server
        self._sessions: dict[Session, Task] = {}
        self._others: list[socket.socket] = []
        with contextlib.ExitStack() as undo:  # if the start fails, nothing is left behind
            tls_context = server.server_context()
            self._listeners = server.make_listeners()
            undo.callback(self._close_listeners)
            self.port: int = 0 if server.settings.path else self._listeners[0].getsockname()[1]
            self._workers = Workers(_CAPTURE_WORKERS, f"chasquid-{self.port}-worker")
            self.loop = Loop(Clock(), self._workers, server.server_log.crash)
            undo.callback(self.loop.close)
            settings = server.settings
            self._script = server.script
            self._context = ServerContext(
                self.loop,
                server.server_log,
                Limits(self.loop.clock, Config("", settings.name)),
                hostname=settings.name,
                size_limit=settings.size_limit,
                tls_context=tls_context,
                dialogue_lines=_TRANSCRIPT_LINES,
            )
            self._receiver = _CaptureReceiver(self.loop, server)
            self._stopping = Event(self.loop)
            self._thread = threading.Thread(
                target=self._serve, name=f"chasquid-{self.port}", daemon=True
            )
            self._thread.start()
            undo.pop_all()

    def stop(self) -> None:
        """End it and wait until it has ended. Raises ChasquidError if it does not end."""
        self.loop.post(self._stopping.set)
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            raise ChasquidError(f"the server did not end within {_JOIN_SECONDS:g} s")

    def take_settings(self, settings: CaptureSettings) -> None:
        self._context.size_limit = settings.size_limit

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        if self._server.settings.path:
            with contextlib.suppress(OSError):
                os.unlink(self._server.settings.path)

    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def also_listen(
        self, host: str, port: int, answer: Callable[[Stream], Coroutine[Any, Any, None]]
    ) -> int:
        """Have `answer` called for connections at another port too; return its number.

        Raises ChasquidError if it is taken, or the server has ended.
        """
        if not self._thread.is_alive():
            raise ChasquidError("the server is not running any more")
        [listener] = listen(host or "0.0.0.0", port, once=True)
        self._others.append(listener)

        async def accept() -> None:
            async for raw, _ in connections(self.loop, self._server.server_log, "http", listener):
                self.loop.spawn(answer(Stream(self.loop, raw)), "http request")

        self.loop.post(lambda: self.loop.spawn(accept(), "http listener"))
        return int(listener.getsockname()[1])

    def _serve(self) -> None:
        try:
            self.loop.run(self._main())
        finally:
            for listener in self._others:
                listener.close()
            self._close_listeners()
            self.loop.close()
            self._workers.close()

    async def _main(self) -> None:
        accepting = [
            self.loop.spawn(self._accept(listener), "listener") for listener in self._listeners
        ]
        await self._stopping.wait()
        for task in accepting:
            task.cancel()
            await ended(task)
        for listener in self._listeners:
            self.loop.forget(listener.fileno())
        self._close_listeners()
        self._context.closing = True
        tasks = list(self._sessions.values())
        for task in tasks:
            task.cancel()
        try:
            with self.loop.deadline(_STOP_WAIT):
                for task in tasks:
                    await ended(task)
        except Expired:
            pass  # a client that does not go; its connection is closed with the loop

    async def _accept(self, listener: socket.socket) -> None:
        async for raw, peer in connections(self.loop, self._server.server_log, "smtp", listener):
            if raw.family != socket.AF_UNIX:
                send_at_once(raw)
            stream = FaultyStream(self.loop, raw)
            session = Session(
                self._context,
                self._receiver,
                stream,
                port=self._server.settings.port,
                peer=clean_peer(str(peer[0])) if peer else "local",
                hook=FaultInjection(self._script, stream, tls_context_of),
            )
            self._sessions[session] = self.loop.spawn(self._hold(session), f"session {session.id}")

    async def _hold(self, session: Session) -> None:
        try:
            await session.run()
        finally:
            del self._sessions[session]


# ======================================================================================
# ROOM: PYTEST
#
# The plugin for pytest, found by its entry point: fixtures that give each test a server of
# its own, already running, and stop it afterwards. A test that fails shows what was said.
#
# - Nothing here is done before a test asks for a fixture, and pytest itself is imported
#   only when it has loaded us.
# - The options stand in pytest's own configuration; a mistake in one is a usage error of
#   pytest, not a traceback.
# ======================================================================================

_PYTEST_OPTIONS = {
    "mail_server_hostname": ("127.0.0.1", "where the servers of the tests listen"),
    "mail_server_port": ("0", "their port; 0 lets the system choose, a port for each"),
    "mail_server_login": ("user:password", "who may log in at secure_mail_server"),
    "mail_server_timeout": ("5", "seconds that wait_for waits"),
    "mail_server_size_limit": (str(CAPTURE_SIZE), "octets of the largest message"),
    "mail_server_magic": ("true", "whether recipients may name a failure (ana+450@…)"),
}


class _PytestPlugin:
    """What pytest registers: options, fixtures, and a report of what was said."""

    def pytest_addoption(self, parser: Any) -> None:
        for name, (default, help) in _PYTEST_OPTIONS.items():
            parser.addini(name, f"{help} (default: {default})", default=default)

    def pytest_configure(self, config: Any) -> None:
        import pytest

        try:
            CaptureServer(**_pytest_settings(config))
        except ChasquidError as error:
            raise pytest.UsageError(f"mail_server_{error}") from None  # it begins with the key
        config.pluginmanager.register(_pytest_fixtures(), "chasquid-fixtures")

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is None or call.when != "call":
            return
        for server in getattr(item, "chasquid_servers", ()):
            for transcript in server.transcripts[-3:]:
                item.add_report_section("call", f"dialogue with {server!r}", transcript)


def _pytest_settings(config: Any) -> dict[str, Any]:
    """Return what the configuration of pytest says of servers. Raises pytest's UsageError."""
    import pytest

    def read(name: str, kind: Callable[[str], Any], expected: str) -> Any:
        value = str(config.getini(name)).strip()
        try:
            return kind(value)
        except (ValueError, KeyError, OSError):
            text = f"{name}: expected {expected}, found {value!r}"
            raise pytest.UsageError(text) from None

    login = read("mail_server_login", _parse_login, "user:password")
    return {
        "host": read("mail_server_hostname", _resolved, "an address of this host"),
        "port": read("mail_server_port", int, "a number"),
        "users": {login[0]: login[1]},
        "timeout": read("mail_server_timeout", float, "seconds"),
        "size_limit": read("mail_server_size_limit", int, "a number of octets"),
        "magic": read("mail_server_magic", lambda word: _SWITCH[word.lower()], "true or false"),
    }


def _resolved(host: str) -> str:
    socket.getaddrinfo(host, 0)
    return host


def _parse_login(text: str) -> tuple[str, str]:
    user, _, password = text.partition(":")
    if not user or not password:
        raise ValueError
    return user, password


_SWITCH = {"true": True, "yes": True, "on": True, "1": True,
           "false": False, "no": False, "off": False, "0": False}  # fmt: skip


def _pytest_fixtures() -> Any:
    """Return an object with the fixtures."""
    import pytest

    class Fixtures:
        @pytest.fixture
        def mail_server_factory(
            self, request: pytest.FixtureRequest
        ) -> Iterator[Callable[..., CaptureServer]]:
            """Make servers: `server = mail_server_factory(tls="starttls", size_limit=1000)`.

            Takes what chasquid.CaptureServer takes. They are stopped after the test.
            """
            servers: list[CaptureServer] = []
            request.node.chasquid_servers = servers

            def make(**settings: Any) -> CaptureServer:
                server = CaptureServer(**{**_pytest_settings(request.config), **settings})
                server.start()
                servers.append(server)
                return server

            yield make
            for server in servers:
                server.stop()

        @pytest.fixture
        def mail_server(self, mail_server_factory: Callable[..., CaptureServer]) -> CaptureServer:
            """A mail server (chasquid.CaptureServer) without TLS, for one test."""
            return mail_server_factory()

        @pytest.fixture
        def secure_mail_server(
            self, mail_server_factory: Callable[..., CaptureServer]
        ) -> CaptureServer:
            """A mail server with STARTTLS at which one has to log in, for one test."""
            return mail_server_factory(tls="starttls", login_required=True)

    return Fixtures()


pytest_plugin = _PytestPlugin()
# for "pytest -p chasquid", if the module is not installed but can be imported
pytest_addoption = pytest_plugin.pytest_addoption
pytest_configure = pytest_plugin.pytest_configure
pytest_runtest_makereport = pytest_plugin.pytest_runtest_makereport


# ======================================================================================
# ROOM: CAPTURE API
#
# What a capturing server received, over HTTP: at /api/v1 the interface of Mailpit, which test
# tools speak, and at / a page for people. What Mailpit has not stands beside it: waiting,
# events, faults, the dialogue, links and codes of a message.
#
# - Mail comes from anybody and may be hostile. The page makes text of it, never HTML. A
#   mail's own HTML is a document apart, in a frame and under a policy that let it run no
#   script, send no form and load nothing; whoever wants its remote images asks for them.
# - Mail may be large. It is read in a worker thread, and of each message a `_Summary` is
#   kept, for lists and searches.
# - The page is made here; its script only brings news and keys, and it works without.
# - A page elsewhere can neither read nor delete: see HTTP. Beyond the loopback address
#   whoever asks has to log in.
#
# How mail comes in, and how long it is kept, belongs to CAPTURE; what a message says, to READER.
# ======================================================================================

Release = Callable[[Captured, Sequence[str]], Awaitable[str]]

_API_BODY_LIMIT = 32 * 1024 * 1024  # octets of a request, which may be a message to send
_API_SEND_SECONDS = 30.0  # for each piece
_API_RELEASE_SECONDS = 120.0
_API_WAIT_SECONDS = 60.0  # the most that a client may wait
_API_ALIVE_SECONDS = 15.0  # between two signs of life of a stream of events
_API_LISTENERS = 100  # each holds a descriptor
_API_LIST_LIMIT = 1000  # entries of a list
_SEARCHED_LIMIT = 64 * 1024  # characters of a text that are searched
_SNIPPET_LIMIT = 250  # characters
_LINK_LIMIT = 500
_FORM_LIMIT = 16 * 1024  # octets of a form of the page
_SOURCE_LIMIT = 1024 * 1024  # octets of a source that the page shows
_INLINE_LIMIT = 16 * 1024 * 1024  # octets of images put into a page
_KEPT_CONTENTS = 4  # messages that are kept as they were read …
_KEPT_OCTETS = 64 * 1024 * 1024  # … of at most this size together
_BASE_HEADERS = (
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"
_FILE_POLICY = "sandbox; default-src 'none'; frame-ancestors 'none'"
_SAFE_KINDS = {
    "application/gzip", "application/json", "application/msword", "application/pdf",
    "application/pgp-signature", "application/vnd.ms-excel", "application/zip", "audio/mpeg",
    "audio/ogg", "audio/wav", "image/avif", "image/bmp", "image/gif", "image/jpeg", "image/png",
    "image/webp", "text/calendar", "text/csv", "text/plain", "video/mp4", "video/webm",
}  # fmt: skip
_REMOTE = re.compile(
    r"(?:src|srcset|background|poster|data)\s*=\s*(?:[\"']\s*)?(?:https?:)?//"
    r"|url\(\s*(?:[\"']\s*)?(?:https?:)?//|@import",
    re.IGNORECASE,
)
# These act on a page from within its text, and some do so before any policy applies.
_ACTING_TAGS = re.compile(r"<(?=(?:base|link|meta)\b)", re.IGNORECASE)


def iso_time(seconds: float) -> str:
    """Return a time as RFC 3339 writes it, in UTC, with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03}Z"


def _people(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"Name": name, "Address": address} for name, address in pairs]


class _Summary:
    """What lists and searches need to know of a message."""

    __slots__ = ("entry", "fields")

    def __init__(self, captured: Captured, content: ReadMessage) -> None:
        to, cc = content.addresses("to"), content.addresses("cc")
        named = {address.lower() for _, address in (*to, *cc)}
        hidden = [("", path) for path in captured.rcpt_tos if path.lower() not in named]
        sender = (content.addresses("from") or [("", captured.mail_from)])[0]
        text = f"{content.text} {text_of_html(content.html[: 4 * _SEARCHED_LIMIT])}"
        text = text[:_SEARCHED_LIMIT]
        self.entry: dict[str, Any] = {
            "ID": captured.id,
            "MessageID": content.header("message-id").strip("<> "),
            "From": _people([sender])[0],
            "To": _people(to),
            "Cc": _people(cc),
            "Bcc": _people(hidden),
            "ReplyTo": _people(content.addresses("reply-to")),
            "Subject": content.header("subject"),
            "Created": iso_time(captured.received),
            "Tags": [],
            "Size": len(captured.raw),
            "Attachments": len(content.attachments),
            "Snippet": printable(" ".join(content.shown_text[:2000].split()), _SNIPPET_LIMIT),
            "Username": captured.login,
        }
        fields = {
            "from": [captured.mail_from, *sender],
            "to": [*captured.rcpt_tos, *itertools.chain(*to)],
            "cc": itertools.chain(*cc),
            "bcc": itertools.chain(*hidden),
            "reply-to": itertools.chain(*content.addresses("reply-to")),
            "subject": [self.entry["Subject"]],
            "message-id": [self.entry["MessageID"]],
            "": [text],
        }
        self.fields = {name: "\n".join(texts).casefold() for name, texts in fields.items()}


class _Seen(NamedTuple):
    """A message that a search looks at."""

    captured: Captured
    summary: _Summary
    read: bool

    def says(self, field: str, word: str) -> bool:
        """Tell whether a word is in a field, or in any if it is ""."""
        fields = self.summary.fields
        return word in fields[field] if field else any(word in text for text in fields.values())


_Condition = Callable[[_Seen], bool]
_WORD = re.compile(r"([-!]?)(?:([a-z-]+):)?(?:\"([^\"]*)\"|(\S+))")
_SIZE_UNITS = {"": 1, "b": 1, "k": 1024, "kb": 1024, "m": 1024**2, "mb": 1024**2}


def parse_search(text: str, zone: str = "") -> list[_Condition]:
    """Return the conditions of a search in Mailpit's form, all of which must be met.

    Words, "phrases", from:, to:, cc:, bcc:, reply-to:, subject:, message-id:, has:attachment,
    is:read, is:unread, before: and after: a day in `zone`, larger: and smaller: (1024, 10KB, 2MB);
    "-" or "!" before one means that it is not so. Raises HttpRefused.
    """
    found = []
    for no, field, phrase, word in _WORD.findall(text.casefold()[:1000]):
        condition = _condition(field, phrase or word, zone)
        found.append((lambda seen, wanted=condition: not wanted(seen)) if no else condition)
    return found


def _condition(field: str, word: str, zone: str) -> _Condition:
    if field in ("from", "to", "cc", "bcc", "reply-to", "subject", "message-id"):
        return lambda seen: seen.says(field, word)
    if field == "is" and word in ("read", "unread"):
        return lambda seen: seen.read == (word == "read")
    if field == "has" and word in ("attachment", "attachments"):
        return lambda seen: seen.summary.entry["Attachments"] > 0
    if field in ("before", "after"):
        day = _day(word, zone)
        return lambda seen: (seen.captured.received < day) == (field == "before")
    if field in ("larger", "smaller"):
        size = _size(word)
        return lambda seen: (len(seen.captured.raw) > size) == (field == "larger")
    if field == "tag":
        return lambda seen: False
    return lambda seen: seen.says("", f"{field}:{word}" if field else word)


def _day(text: str, zone: str) -> float:
    """Return the beginning of a day in seconds since 1970. Raises HttpRefused."""
    import datetime  # only for such searches
    import zoneinfo

    try:
        day = datetime.datetime.strptime(text.replace("/", "-"), "%Y-%m-%d")
        known = zoneinfo.ZoneInfo(zone) if zone else datetime.UTC
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise HttpRefused(400, f"expected a day such as 2026-01-31, found {text!r}") from None
    return day.replace(tzinfo=known).timestamp()


def _size(text: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,3})?)([kmb]{0,2})", text)
    if match is None or match[2] not in _SIZE_UNITS:
        raise HttpRefused(400, f"expected a size such as 10KB or 2MB, found {text!r}")
    return float(match[1]) * _SIZE_UNITS[match[2]]


class _Contents:
    """The messages last looked at, as they were read. Used by worker threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[int, ReadMessage]] = {}

    def get(self, captured: Captured) -> ReadMessage:
        with self._lock:
            found = self._kept.pop(captured.id, None)
        size, content = found or (len(captured.raw), ReadMessage(captured.raw))
        with self._lock:
            self._kept[captured.id] = size, content
            while len(self._kept) > 1 and (
                len(self._kept) > _KEPT_CONTENTS
                or sum(size for size, _ in self._kept.values()) > _KEPT_OCTETS
            ):
                del self._kept[next(iter(self._kept))]
        return content

    def forget(self, ids: Iterable[str]) -> None:
        with self._lock:
            for id in ids:
                self._kept.pop(id, None)


class _Changes:
    """Tells one connection of changes to the mailbox, for as long as its client is there."""

    def __init__(self, loop: Loop, mailbox: Mailbox, stream: Stream) -> None:
        self._loop = loop
        self._mailbox = mailbox
        self._stream = stream
        self._something = Event(loop)
        self._gone = False

    async def __aenter__(self) -> _Changes:
        self._end = self._mailbox.watch(lambda: self._loop.post(self._something.set))
        self._listener = self._loop.spawn(self._listen(), "http client")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()
        self._listener.cancel()
        await self._loop.turn()  # let it stop listening before others listen

    async def _listen(self) -> None:
        with contextlib.suppress(Disconnected):
            await self._stream.read_some()  # nothing more is to come: what comes is the end
        self._gone = True
        self._something.set()

    async def next(self, seconds: float) -> bool:
        """Wait for a change; False if there was none. Raises Disconnected."""
        try:
            with self._loop.deadline(seconds):
                await self._something.wait()
        except Expired:
            return False
        if self._gone:
            raise Disconnected("the client is gone")
        self._something.clear()
        return True


class Inbox:
    """Shows what a server captured over HTTP, one request a connection.

    `release` sends a message on, to `release_to`, or is None if that is not possible. `smtp` is
    where mail is to be sent, for people ("smtp://127.0.0.1:1025"). With a `login`, user and
    password, whoever asks has to give them (RFC 7617).
    """

    def __init__(
        self,
        loop: Loop,
        log: Log,
        mailbox: Mailbox,
        faults: Script,
        *,
        release: Release | None = None,
        release_to: str = "",
        smtp: str = "",
        login: tuple[str, str] | None = None,
    ) -> None:
        self._loop = loop
        self._log = log
        self._mailbox = mailbox
        self._faults = faults
        self._release = release
        self._release_to = release_to
        self._smtp = smtp
        self._login = login
        self._summaries: dict[str, _Summary] = {}
        self._read: set[str] = set()
        self._contents = _Contents()
        self._listening = 0  # pages that are told of changes
        self._deleted = 0
        self._began = loop.clock.monotonic()
        self._chaos: dict[str, str] = {}  # the rules behind Mailpit's chaos, by its names

    # --- a request ---

    async def answer(self, stream: Stream) -> None:
        """Read one request, answer it, and close."""
        try:
            with self._loop.deadline(HTTP_SECONDS):
                request = await read_request(stream)
                answer = await self._admit(stream, request)
            if not isinstance(answer, bytes):
                answer = await self._guarded(answer(stream))
            await self._send(stream, without_body(answer) if request.method == "HEAD" else answer)
        except Cancelled:
            stream.close()
            raise
        except (Disconnected, Expired, LineTooLong, BareNewline, ValueError):
            pass
        except Exception as error:
            self._log.crash("capture API", error)
        finally:
            await stream.finish()

    async def _send(self, stream: Stream, answer: bytes) -> None:
        for start in range(0, len(answer), CHUNK):
            with self._loop.deadline(_API_SEND_SECONDS):
                stream.write(answer[start : start + CHUNK])
                await stream.be_fair()
        with self._loop.deadline(_API_SEND_SECONDS):
            await stream.flush()

    async def _guarded(self, answer: Awaitable[bytes]) -> bytes:
        """Return what is answered; if that fails, an answer that says so."""
        try:
            return await answer
        except HttpRefused as refused:
            return _refusal(refused)
        except (Disconnected, Expired):
            raise
        except Exception as error:
            self._log.crash("capture API", error)
            return _refusal(
                HttpRefused(500, "something went wrong here; the server's log says what")
            )

    async def _admit(
        self, stream: Stream, request: HttpRequest
    ) -> bytes | Callable[[Stream], Awaitable[bytes]]:
        """Find who answers `request`, or refuse it."""
        try:
            self._check_host(request.headers.get("host", ""))
            method = "GET" if request.method == "HEAD" else request.method
            action, values = _route(method, request.path)
            if action is not Inbox._alive:
                self._check_login(request.headers.get("authorization", ""))
            if request.method == "HEAD" and action is Inbox._events:
                raise HttpRefused(405, "it has no end, and so nothing to be looked at beforehand")
            private = method != "GET" or request.path.startswith("/api/")
            if private and is_from_a_foreign_page(request.headers):  # even the time tells it much
                raise HttpRefused(403, "a web page from elsewhere may neither look nor change")
            body = await read_body(stream, request, _API_BODY_LIMIT)
        except HttpRefused as refused:
            return _refusal(refused)
        asked = _Asked(values, _parameters(request.query), body)
        return lambda stream: action(self, asked, stream)

    def _check_host(self, host: str) -> None:
        """Let through a name that no stranger's DNS could have given to our address.

        A name without a dot, as containers have, is nobody's on the Internet. Raises HttpRefused.
        """
        if self._login is not None or is_our_name(host):  # a stranger's page has no password
            return
        with contextlib.suppress(ValueError):
            if re.fullmatch(r"[a-z0-9_-]+", host_name(host)):
                return
        shown = printable(host, 100)
        raise HttpRefused(421, f"this server has no name {shown!r}; ask localhost or an IP address")

    def _check_login(self, authorization: str) -> None:
        """Raises HttpRefused if a login is needed, and this is none."""
        if self._login is None:
            return
        import hmac

        scheme, _, given = authorization.partition(" ")
        wanted = base64.b64encode(":".join(self._login).encode())
        if scheme.lower() != "basic" or not hmac.compare_digest(given.strip().encode(), wanted):
            challenge = ("WWW-Authenticate", 'Basic realm="chasquid", charset="UTF-8"')
            raise HttpRefused(401, "a login is needed", challenge)

    # --- messages ---

    def _find(self, conditions: Sequence[_Condition]) -> list[Captured]:
        """Return the messages that meet all conditions, the newest first. Called in a worker."""
        found, known = [], {}
        for captured in reversed(self._mailbox.all()):
            id = captured.id
            known[id] = self._summaries.get(id) or _Summary(captured, self._contents.get(captured))
            seen = _Seen(captured, known[id], id in self._read)
            if all(condition(seen) for condition in conditions):
                found.append(captured)
        self._summaries = known  # without what is gone
        return found

    def _entry(self, captured: Captured) -> dict[str, Any]:
        summary = self._summaries.get(captured.id)
        if summary is None:
            summary = _Summary(captured, self._contents.get(captured))
        return {**summary.entry, "Read": captured.id in self._read}

    def _unread(self) -> int:
        return sum(1 for captured in self._mailbox.all() if captured.id not in self._read)

    def _listed(self, found: Sequence[Captured], start: int, limit: int) -> dict[str, Any]:
        unread = sum(1 for captured in found if captured.id not in self._read)
        return {
            "total": len(self._mailbox.all()),
            "unread": self._unread(),
            "messages_count": len(found),
            "messages_unread": unread,
            "start": start,
            "tags": [],
            "messages": [self._entry(captured) for captured in found[start : start + limit]],
        }

    async def _list(self, asked: _Asked, stream: Stream) -> bytes:
        start = asked.number("start", 0, 10**9)
        limit = asked.number("limit", 50, _API_LIST_LIMIT)
        conditions = asked.search()
        make = functools.partial(self._find, conditions)
        return await self._loop.work(lambda: _json(self._listed(make(), start, limit)))

    def _captured(self, id: str) -> Captured:
        """Return a message by its id, or "latest". Raises HttpRefused."""
        captured = self._mailbox.get(id)
        if captured is None and id == "latest":
            captured = next(reversed(self._mailbox.all()), None)
        if captured is None:
            raise HttpRefused(404, "there is no such message; it may have been deleted")
        return captured

    async def _show(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        self._read.add(captured.id)
        return await self._loop.work(lambda: _json(self._details(captured)))

    def _details(self, captured: Captured) -> dict[str, Any]:
        content = self._contents.get(captured)
        entry = self._entry(captured)
        for name in ("Created", "Snippet", "Read"):
            del entry[name]
        return {
            **entry,
            "Date": _date_of(content, captured.received),
            "ReturnPath": captured.mail_from,
            "ListUnsubscribe": _unsubscribing(content),
            "Text": content.text,
            "HTML": content.html,
            "Attachments": [_file_entry(part) for part in content.attachments],
            "Inline": [_file_entry(part) for part in content.inlines],
            "Envelope": {"From": captured.mail_from, "To": list(captured.rcpt_tos)},
            "Session": {"Peer": captured.peer, "Hello": captured.hello, "TLS": captured.tls},
            "Links": content.links()[:_LINK_LIMIT],
            "Code": code_in(content.shown_text) or "",
        }

    async def _headers(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        content = await self._loop.work(lambda: self._contents.get(captured))
        headers: dict[str, list[str]] = {}
        for name, value in content.headers:
            headers.setdefault(name, []).append(value)
        return _json(headers)

    async def _dialogue(self, asked: _Asked, stream: Stream) -> bytes:
        return http_response(
            200, _TEXT, self._captured(asked.values[0]).transcript, headers=_BASE_HEADERS
        )

    async def _raw(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        inline = asked.query.get("dl", "0") in ("", "0")
        return _file(_TEXT if inline else "message/rfc822", f"{captured.id}.eml", captured.raw)

    async def _part(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        content = await self._loop.work(lambda: self._contents.get(captured))
        index = int(asked.values[1])
        if not 1 <= index <= len(content.parts):
            raise HttpRefused(404, f"the message has no part {index}")
        part = content.parts[index - 1]
        kind = part.content_type if part.content_type in _SAFE_KINDS else "application/octet-stream"
        return _file(kind, part.title, part.data)

    async def _html(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        remote = asked.query.get("remote") == "1"

        def make() -> bytes:
            content = self._contents.get(captured)
            if not content.html:
                raise HttpRefused(404, "the message has no HTML")
            return _framed(content, remote)

        return await self._loop.work(make)

    async def _text(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        content = await self._loop.work(lambda: self._contents.get(captured))
        return http_response(200, _TEXT, content.text, headers=_BASE_HEADERS)

    def _remove(self, ids: Iterable[str]) -> None:
        ids = list(ids)
        self._contents.forget(ids)
        self._read.difference_update(ids)
        self._deleted += sum(self._mailbox.remove(id) for id in ids)

    async def _delete(self, asked: _Asked, stream: Stream) -> bytes:
        """Delete the messages that are named, or all; Mailpit's form."""
        ids = asked.ids()
        self._remove(ids or [captured.id for captured in self._mailbox.all()])
        return _OK

    async def _delete_found(self, asked: _Asked, stream: Stream) -> bytes:
        conditions = asked.search()
        if not conditions:
            raise HttpRefused(400, "expected a query, of what is to be deleted")
        found = await self._loop.work(lambda: self._find(conditions))
        self._remove(captured.id for captured in found)
        return _OK

    async def _mark(self, asked: _Asked, stream: Stream) -> bytes:
        ids = asked.ids() or [captured.id for captured in self._mailbox.all()]
        if asked.json().get("Read", False):
            self._read.update(ids)
        else:
            self._read.difference_update(ids)
        return _OK

    async def _release_message(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        to = asked.json().get("To")
        if not isinstance(to, list) or not to or not all(map(_is_address, to)):
            raise HttpRefused(400, 'expected {"To": ["user@domain", …]}')
        await self._release_to_others(captured, to)
        return _OK

    async def _release_to_others(self, captured: Captured, to: Sequence[str]) -> str:
        """Send a message on; return what became of it. Raises HttpRefused."""
        if self._release is None:
            raise HttpRefused(400, "this server sends nothing on: it was started without --release")
        try:
            with self._loop.deadline(_API_RELEASE_SECONDS):
                return await self._release(captured, to)
        except Expired:
            raise HttpRefused(504, "the other server did not answer in time") from None
        except ChasquidError as error:
            raise HttpRefused(502, str(error)) from error

    async def _send_message(self, asked: _Asked, stream: Stream) -> bytes:
        """Take in a message that is described in JSON, as if it had come by SMTP."""
        described = asked.json()
        now = self._loop.clock.time()
        sender, to, raw = await self._loop.work(lambda: message_of_json(described, now))
        dialogue = Dialogue("api", "", now)
        captured = Captured(
            new_id(), now, sender, rcpt_tos=to, raw=raw, peer="", port="api", hello="", tls="",
            login="", smtputf8=not raw.isascii(), dialogue=dialogue,
        )  # fmt: skip
        self._mailbox.add(captured)
        return _json({"ID": captured.id})

    # --- the server ---

    async def _alive(self, asked: _Asked, stream: Stream) -> bytes:
        return _OK

    async def _info(self, asked: _Asked, stream: Stream) -> bytes:
        messages = self._mailbox.all()
        size = sum(len(captured.raw) for captured in messages)
        return _json({
            "Version": f"chasquid {__version__}",
            "LatestVersion": "",
            "Database": "memory",
            "DatabaseSize": size,
            "Messages": len(messages),
            "Unread": self._unread(),
            "Tags": {},
            "RuntimeStats": {
                "Uptime": int(self._loop.clock.monotonic() - self._began),
                "Memory": 0,
                "MessagesDeleted": self._deleted,
                "SMTPAccepted": len(messages) + self._deleted,
                "SMTPAcceptedSize": size,
                "SMTPRejected": 0,
                "SMTPIgnored": 0,
            },
        })  # fmt: skip

    async def _tags(self, asked: _Asked, stream: Stream) -> bytes:
        return _json([])

    async def _webui(self, asked: _Asked, stream: Stream) -> bytes:
        return _json({
            "Label": "",
            "MessageRelay": {"Enabled": self._release is not None, "SMTPServer": self._release_to},
            "SpamAssassin": False,
            "ChaosEnabled": True,
            "DuplicatesIgnored": False,
        })  # fmt: skip

    async def _wait(self, asked: _Asked, stream: Stream) -> bytes:
        count = asked.number("count", 1, 10**6)
        seconds = asked.seconds("timeout", 10.0, _API_WAIT_SECONDS)
        end = self._loop.clock.monotonic() + seconds
        find = functools.partial(self._find, asked.search())
        async with _Changes(self._loop, self._mailbox, stream) as changes:
            while True:
                found = await self._loop.work(find)
                if len(found) >= count:
                    return _json(self._listed(found, 0, _API_LIST_LIMIT))
                if not await changes.next(end - self._loop.clock.monotonic()):
                    break
        came = f"{len(found)} of {plural(count, 'message')} came within {seconds:g} s"
        error = f"{came}; {len(self._mailbox.all())} are there in all"
        return _json({"Error": error, **self._listed(found, 0, _API_LIST_LIMIT)}, 408)

    async def _events(self, asked: _Asked, stream: Stream) -> bytes:
        """Send an event at once and after each change; WHATWG HTML, 9.2."""
        if self._listening >= _API_LISTENERS:
            raise HttpRefused(503, "too many pages are open here already")
        self._listening += 1
        try:
            await self._tell_events(stream)
        finally:
            self._listening -= 1
        return b""

    async def _tell_events(self, stream: Stream) -> None:
        stream.write(http_head(200, "text/event-stream", None, headers=_BASE_HEADERS))
        stream.write(b"retry: 2000\n\n")
        changed = True
        async with _Changes(self._loop, self._mailbox, stream) as changes:
            while True:
                data = json.dumps({"total": len(self._mailbox.all())})
                event = f"event: change\ndata: {data}\n\n" if changed else ": nothing new\n\n"
                stream.write(event.encode())
                with self._loop.deadline(_API_SEND_SECONDS):
                    await stream.flush()
                await self._loop.sleep(0.1)  # many changes at once are one event
                changed = await changes.next(_API_ALIVE_SECONDS)

    # --- faults ---

    async def _show_chaos(self, asked: _Asked, stream: Stream) -> bytes:
        rules = {rule["id"]: rule for rule in self._faults.describe()}
        return _json({name: _trigger(rules.get(self._chaos.get(name, ""))) for name in _TRIGGERS})

    async def _set_chaos(self, asked: _Asked, stream: Stream) -> bytes:
        """Replace the rules of Mailpit's chaos; a trigger that is not named is off."""
        given = asked.json()
        wanted = {name: _parse_trigger(name, given.get(name)) for name in _TRIGGERS}
        for id in self._chaos.values():
            self._faults.remove_rule(id)
        self._chaos.clear()
        for name, (code, probability) in wanted.items():
            if probability:
                with _told_as_refused():
                    fault = Fault(_TRIGGERS[name], reply=str(code), probability=probability)
                    self._chaos[name] = self._faults.add(fault)
        return await self._show_chaos(asked, stream)

    async def _list_faults(self, asked: _Asked, stream: Stream) -> bytes:
        return _json({"faults": self._faults.describe()})

    async def _add_fault(self, asked: _Asked, stream: Stream) -> bytes:
        rule = asked.json()
        with _told_as_refused():
            return _json({"id": self._faults.add_rule(rule)}, 201)

    async def _delete_fault(self, asked: _Asked, stream: Stream) -> bytes:
        if not self._faults.remove_rule(asked.values[0]):
            raise HttpRefused(404, "there is no such rule; it may have been deleted")
        return _OK

    async def _delete_faults(self, asked: _Asked, stream: Stream) -> bytes:
        self._faults.clear()
        return _OK

    # --- the page ---

    async def _page(self, asked: _Asked, stream: Stream) -> bytes:
        """The list, and beside it the message that the path names."""
        id = asked.values[0] if asked.values else ""
        captured = self._captured(id) if id else None
        if captured is not None:
            self._read.add(captured.id)
        conditions = asked.search()
        return await self._loop.work(lambda: self._made_page(asked, captured, conditions))

    def _made_page(
        self, asked: _Asked, captured: Captured | None, conditions: Sequence[_Condition]
    ) -> bytes:
        nonce = new_id()
        found = self._find(conditions)
        start = asked.number("start", 0, 10**9)
        entries = [self._entry(each) for each in found[start : start + _PAGE_ENTRIES]]
        query = asked.query.get("query", "")
        more = start + _PAGE_ENTRIES if len(found) > start + _PAGE_ENTRIES else 0
        current = captured.id if captured else ""
        body = page_list(entries, query, current=current, smtp=self._smtp, more=more)
        if captured is not None:
            content = self._contents.get(captured)
            entry = self._entry(captured)
            can_release = self._release is not None
            body += page_message(captured, content, entry, asked, can_release=can_release)
        unread = f"({count}) " if (count := self._unread()) else ""
        text = _PAGE.format(
            nonce=nonce, style=_PAGE_STYLE, script=_PAGE_SCRIPT, title=f"{unread}chasquid inbox",
            kind="reading" if captured else "listing", total=len(self._mailbox.all()),
            query=html_text(query), body=body,
        )  # fmt: skip
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; frame-src 'self'; img-src 'self' data:; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        headers = (
            ("Referrer-Policy", "same-origin"),
            *_BASE_HEADERS[1:],
        )  # or a form has no Origin
        return http_response(200, _HTML, text, policy=policy, headers=headers)

    async def _page_delete(self, asked: _Asked, stream: Stream) -> bytes:
        """Delete a message, and go to the one after it; or delete all."""
        everything = [captured.id for captured in reversed(self._mailbox.all())]
        if not asked.values:
            self._remove(everything)
            return _redirect("/")
        id = self._captured(asked.values[0]).id
        place = everything.index(id) if id in everything else 0
        rest = [other for other in everything if other != id]
        self._remove([id])
        return _redirect(f"/message/{rest[min(place, len(rest) - 1)]}" if rest else "/")

    async def _page_release(self, asked: _Asked, stream: Stream) -> bytes:
        captured = self._captured(asked.values[0])
        to = [each.strip() for each in asked.form().get("to", "").split(",") if each.strip()]
        if not to or not all(map(_is_address, to)):
            raise HttpRefused(400, "expected addresses, with commas between them")
        said = await self._release_to_others(captured, to)
        return http_response(200, _TEXT, f"{said}\n", headers=_BASE_HEADERS)


class _Asked(NamedTuple):
    """What a request asks for: what stands in its path, its parameters, its body."""

    values: tuple[str, ...]
    query: Mapping[str, str]
    body: bytes

    def number(self, name: str, default: int, most: int) -> int:
        text = self.query.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,10}", text):
            raise HttpRefused(400, f"{name} must be a number from 0 to {most}")
        return min(int(text), most)

    def seconds(self, name: str, default: float, most: float) -> float:
        text = self.query.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
            raise HttpRefused(400, f"{name} must be a number of seconds up to {most:g}")
        return min(float(text), most)

    def search(self) -> list[_Condition]:
        return parse_search(self.query.get("query", ""), self.query.get("tz", ""))

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise HttpRefused(400, f"the body is no JSON: {printable(str(error), 200)}") from error
        if not isinstance(value, dict):
            raise HttpRefused(400, "the body must be a JSON object")
        return value

    def ids(self) -> list[str]:
        """Return what Mailpit's clients name messages by; none means all."""
        ids = self.json().get("IDs") or [] if self.body.strip() else []
        if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            raise HttpRefused(400, 'expected {"IDs": ["ID", …]}')
        return ids

    def form(self) -> dict[str, str]:
        return _parameters(self.body[:_FORM_LIMIT].decode("utf-8", "replace"))


def _parameters(query: str) -> dict[str, str]:
    from urllib.parse import parse_qsl

    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=50))
    except ValueError:
        return {}


_OK = http_response(200, "text/plain", "ok", headers=_BASE_HEADERS)


def _json(value: object, status: int = 200) -> bytes:
    return http_response(status, _JSON, json.dumps(value) + "\n", headers=_BASE_HEADERS)


def _refusal(refused: HttpRefused) -> bytes:
    headers = (*_BASE_HEADERS, *refused.headers)
    return http_response(refused.status, _TEXT, f"{refused}\n", headers=headers)


def _redirect(path: str) -> bytes:
    return http_response(303, _TEXT, "", headers=(("Location", path), *_BASE_HEADERS))


@contextlib.contextmanager
def _told_as_refused() -> Iterator[None]:
    """Have a mistake in a rule answered as one of the request. Raises HttpRefused."""
    try:
        yield
    except FaultError as error:
        raise HttpRefused(400, str(error)) from error


def _is_address(value: object) -> bool:
    if not isinstance(value, str) or re.search(r"[\s<>]", value) or UNPRINTABLE.search(value):
        return False
    return all(split_address(value)) and len(value) <= 500


def _date_of(content: ReadMessage, received: float) -> str:
    """Return the time in the Date field, else that of the arrival."""
    from email.utils import parsedate_to_datetime

    try:
        return iso_time(parsedate_to_datetime(content.header("date")).timestamp())
    except (ValueError, TypeError, OverflowError, IndexError):
        return iso_time(received)


def _unsubscribing(content: ReadMessage) -> dict[str, Any]:
    """Return what List-Unsubscribe says; RFC 2369 and RFC 8058."""
    header = content.header("list-unsubscribe")
    return {
        "Header": header,
        "Links": re.findall(r"<\s*((?:https?|mailto):[^<>\s]{1,2000})\s*>", header),
        "Errors": "",
        "HeaderPost": content.header("list-unsubscribe-post"),
    }


def _file_entry(part: Part) -> dict[str, Any]:
    import hashlib

    sums = {name: hashlib.new(name, part.data).hexdigest() for name in ("md5", "sha1", "sha256")}
    return {
        "PartID": str(part.number),
        "FileName": part.title,
        "ContentType": part.content_type,
        "ContentID": part.content_id,
        "Size": len(part.data),
        "Checksums": {name.upper(): value for name, value in sums.items()},
    }


_TRIGGERS = {"Authentication": "AUTH", "Recipient": "RCPT", "Sender": "MAIL"}


def _trigger(rule: Mapping[str, Any] | None) -> dict[str, int]:
    if rule is None:
        return {"ErrorCode": 451, "Probability": 0}
    return {"ErrorCode": int(rule["reply"]), "Probability": rule.get("probability", 100)}


def _parse_trigger(name: str, given: object) -> tuple[int, int]:
    """Return code and probability in percent. Raises HttpRefused."""
    trigger = given if isinstance(given, dict) else {}
    code, probability = trigger.get("ErrorCode", 451), trigger.get("Probability", 0)
    if type(code) is not int or not 400 <= code <= 599:
        raise HttpRefused(400, f"{name}: expected an ErrorCode from 400 to 599")
    if type(probability) is not int or not 0 <= probability <= 100:
        raise HttpRefused(400, f"{name}: expected a Probability from 0 to 100")
    return code, probability


def message_of_json(described: Mapping[str, Any], now: float) -> tuple[str, list[str], bytes]:
    """Return sender, recipients and octets of a message described as Mailpit's clients do.

    Raises HttpRefused.
    """
    from email.headerregistry import Address
    from email.message import EmailMessage
    from email.policy import SMTP

    def people(name: str) -> list[tuple[str, str]]:
        given = described.get(name) or []
        found = [each if isinstance(each, dict) else {"Email": each} for each in given]
        pairs = [(str(each.get("Name") or ""), str(each.get("Email") or "")) for each in found]
        if not all(_is_address(address) for _, address in pairs):
            raise HttpRefused(400, f"{name}: expected addresses")
        return pairs

    sender = described.get("From")
    if not isinstance(sender, dict) or not _is_address(sender.get("Email")):
        raise HttpRefused(400, 'From: expected {"Email": "user@domain", "Name": "…"}')
    message = EmailMessage(policy=SMTP.clone(utf8=False))
    try:
        message["From"] = Address(str(sender.get("Name") or ""), addr_spec=sender["Email"])
        for field, name in (("To", "To"), ("Cc", "Cc"), ("Reply-To", "ReplyTo")):
            if pairs := people(name):
                message[field] = [Address(who, addr_spec=address) for who, address in pairs]
        message["Subject"] = str(described.get("Subject") or "")
        message["Date"] = rfc5322_date(now)
        message["Message-ID"] = f"<{new_id()}@localhost>"
        for name, value in (described.get("Headers") or {}).items():
            message[str(name)] = str(value)
        message.set_content(str(described.get("Text") or ""))
        if described.get("HTML"):
            message.add_alternative(str(described["HTML"]), subtype="html")
        for file in described.get("Attachments") or []:
            kind = str(file.get("ContentType") or "application/octet-stream")
            maintype, _, subtype = kind.partition("/")
            cid = f"<{file['ContentID']}>" if file.get("ContentID") else None
            data = base64.b64decode(file["Content"], validate=True)
            message.add_attachment(
                data, maintype=maintype, subtype=subtype,
                filename=str(file.get("Filename") or "unnamed"), cid=cid,
            )  # fmt: skip
        raw = message.as_bytes()
    except HttpRefused:
        raise
    except Exception as error:
        raise HttpRefused(
            400, f"no message comes of it: {printable(reason(error), 200)}"
        ) from error
    everybody = (*people("To"), *people("Cc"), *people("Bcc"))
    return sender["Email"], [address for _, address in everybody], raw


def _file(kind: str, name: str, data: bytes) -> bytes:
    """Return a response that a browser stores under a name which is nothing but a name."""
    from urllib.parse import quote

    name = re.split(r"[/\\]", name)[-1].replace('"', "'").replace("\n", " ").replace("\r", " ")
    name = UNPRINTABLE.sub(" ", name).strip(" .")[:150] or "unnamed"
    plain = "".join(c if c.isascii() and c not in "%;" else "_" for c in name)
    how = "inline" if kind == _TEXT else "attachment"
    said = f"{how}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"  # RFC 6266
    headers = (("Content-Disposition", said), *_BASE_HEADERS)
    return http_response(200, kind, data, policy=_FILE_POLICY, headers=headers)


_FRAME_HEAD = (
    "<!doctype html><meta charset=utf-8><base target=_blank>"
    '<meta name=viewport content="width=device-width"><style>'
    "html{color-scheme:light;background:#fff;color:#111}"
    "body{font:15px/1.5 system-ui,sans-serif;margin:12px;overflow-wrap:anywhere}"
    "img{max-width:100%}</style>\n"
)


def _framed(content: ReadMessage, remote: bool) -> bytes:
    """Return the HTML of a mail as a document that can do nothing but be looked at.

    In the sandbox its origin is nobody's, and 'self' would stand for that: so the images
    that came with the mail are put into the page itself. `<base>` of ours is the first,
    so links open in a tab of their own.
    """
    images = "data: http: https:" if remote else "data:"
    policy = (
        "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; "
        f"style-src 'unsafe-inline'; img-src {images}; font-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    html = _ACTING_TAGS.sub("<!", content.html)  # a comment, up to the next ">"
    by_id = {part.content_id: part for part in content.parts if part.content_id}
    left = _INLINE_LIMIT

    def image(match: re.Match[str]) -> str:
        nonlocal left
        from urllib.parse import unquote

        part = by_id.get(unquote(match[1]))
        if part is None or not re.fullmatch(r"image/[a-z0-9.+-]+", part.content_type):
            return match[0]
        left -= len(part.data)
        if left < 0:
            return match[0]
        return f"data:{part.content_type};base64,{base64.b64encode(part.data).decode()}"

    headers = (*_BASE_HEADERS, ("X-DNS-Prefetch-Control", "off"))
    text = _FRAME_HEAD + CID.sub(image, html)
    return http_response(200, _HTML, text, policy=policy, headers=headers)


# --- what the page says ---

_PAGE_ENTRIES = 50  # of the list
_VIEWS = {"html": "HTML", "text": "Text", "headers": "Headers", "source": "Source",
          "files": "Attachments", "checks": "Checks", "dialogue": "Dialogue"}  # fmt: skip


def page_list(
    entries: Sequence[Mapping[str, Any]], query: str, current: str, smtp: str, more: int
) -> str:
    """Return the list of messages as HTML; `more` is where the next part of it begins, or 0."""
    from urllib.parse import urlencode

    search = f"?{urlencode({'query': query})}" if query else ""
    rows = "".join(_page_row(entry, current, search) for entry in entries)
    if not entries:
        text = (
            "No message has these words."
            if query
            else f"Send some to <code>{html_text(smtp)}</code>."
        )
        rows = f"<li class=empty>{text}</li>"
    link = urlencode({"query": query, "start": more})
    tail = f'<a class=button href="/?{html_text(link)}">Older</a>' if more else ""
    return f'<nav id=side aria-label="Messages"><ol id=list>{rows}</ol>{tail}</nav>'


def _page_row(entry: Mapping[str, Any], current: str, search: str) -> str:
    sender = entry["From"]["Name"] or entry["From"]["Address"] or "<>"
    to = ", ".join(person["Address"] for key in ("To", "Cc", "Bcc") for person in entry[key])
    classes = "" if entry["Read"] else " class=new"
    here = ' aria-current="page"' if entry["ID"] == current else ""
    files = f"<small>{plural(entry['Attachments'], 'file')}</small>" if entry["Attachments"] else ""
    when = entry["Created"]
    return (
        f'<li{classes}><a href="/message/{entry["ID"]}{html_text(search)}"{here}>'
        f"<span><b>{html_text(sender)}</b><time datetime={when}>{when[11:19]}</time></span>"
        f"<span><strong>{html_text(entry['Subject'] or '(no subject)')}</strong>{files}</span>"
        f"<span class=soft>to {html_text(to)} — {html_text(entry['Snippet'])}</span></a></li>"
    )


def page_message(
    captured: Captured, content: ReadMessage, entry: Mapping[str, Any], asked: _Asked,
    can_release: bool,
) -> str:  # fmt: skip
    """Return a message as HTML, in the view that was asked for."""
    path = f"/message/{captured.id}"
    views = [view for view in _VIEWS if (view != "html" or content.html)
             and (view != "files" or content.attachments or content.inlines)]  # fmt: skip
    view = asked.query.get("view", "")
    view = view if view in views else ("html" if content.html else "text")
    count = len(content.attachments) + len(content.inlines)
    labels = {**_VIEWS, "files": f"{_VIEWS['files']} ({count})"}
    tabs = "".join(
        f'<a href="{path}?view={name}"{" aria-current=page" if name == view else ""}>'
        f"{labels[name]}</a>"
        for name in views
    )
    to = ", ".join(f"<{recipient}>" for recipient in captured.rcpt_tos)
    how = captured.tls.split(" ")[0] or "without TLS"
    who = f" as {captured.login}" if captured.login else ""
    facts = {
        "From": content.header("from"),
        "To": content.header("to"),
        "Cc": content.header("cc"),
        "Envelope": f"<{captured.mail_from}> → {to}",
        "Received": f"{entry['Created']} from {captured.peer or 'the API'} {how}{who}, "
        f"{entry['Size']} octets",
    }
    shown = "".join(
        f"<dt>{name}</dt><dd>{html_text(value)}</dd>" for name, value in facts.items() if value
    )
    addresses = html_text(", ".join(captured.rcpt_tos))
    release = (
        f'<form method=post action="{path}/release"><input name=to value="{addresses}" '
        "aria-label=Recipients><button>Release</button></form>"
    )
    return (
        f'<article id=view><div class=bar><a class=button id=back href="/">← Messages</a>'
        f'<a class=button href="/api/v1/message/{captured.id}/raw?dl=1" download>Download</a>'
        f'<form method=post action="{path}/delete"><button id=remove>Delete</button></form>'
        f"{release if can_release else ''}</div>"
        f"<h2>{html_text(entry['Subject'] or '(no subject)')}</h2><dl>{shown}</dl>"
        f'<nav id=tabs aria-label="Views">{tabs}</nav>'
        f"<div id=panel>{_PANELS[view](captured, content, asked)}</div></article>"
    )


def _html_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    note, remote = "", asked.query.get("remote") == "1"
    if _REMOTE.search(content.html):
        load = f'<a id=remote href="/message/{captured.id}?view=html&amp;remote=1">Load images</a>'
        note = "Remote images are loaded." if remote else f"Remote content is blocked. {load}"
        note = f"<p class=note role=status>{note}</p>"
    query = "?remote=1" if remote else ""
    return (
        f'{note}<iframe title="The message" referrerpolicy=no-referrer '
        f'sandbox="allow-popups allow-popups-to-escape-sandbox" '
        f'src="/view/{captured.id}.html{query}"></iframe>'
    )


def _text_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    pieces = re.split(r"(https?://[^\s<>\"']+[^\s<>\"'.,;:!?)\]])", content.text)
    text = "".join(
        f'<a href="{piece}" target=_blank rel="noopener noreferrer">{piece}</a>'
        if number % 2
        else piece
        for number, piece in enumerate(map(html_text, pieces))
    )
    return f"<pre>{text or 'This message has no text.'}</pre>"


def _headers_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    rows = "".join(
        f"<tr><th scope=row>{html_text(name)}</th><td>{html_text(value)}</td></tr>"
        for name, value in content.headers
    )
    return f"<table>{rows}</table>"


def _source_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    cut = "\n… (Download has all of it)" if len(captured.raw) > _SOURCE_LIMIT else ""
    return f"<pre>{html_text(captured.raw[:_SOURCE_LIMIT].decode('utf-8', 'replace'))}{cut}</pre>"


def _files_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    rows = "".join(
        f'<li><a href="/api/v1/message/{captured.id}/part/{part.number}" download>'
        f"{html_text(part.title)}</a> <span class=soft>{html_text(part.content_type)}, "
        f"{plural(len(part.data), 'octet')}</span></li>"
        for part in (*content.attachments, *content.inlines)
    )
    return f"<ul>{rows}</ul>"


def _checks_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    warnings = html_warnings(content.html) if content.html else ["the message has no HTML"]
    found = "".join(f"<li>{html_text(text)}</li>" for text in warnings or ["nothing to warn of"])
    links = "".join(f"<li>{html_text(link)}</li>" for link in content.links()[:_LINK_LIMIT])
    code = code_in(content.shown_text)
    return (
        f"<h3>HTML</h3><ul>{found}</ul><h3>Links</h3><ul>{links or '<li>none</li>'}</ul>"
        f"<h3>Code</h3><p>{html_text(code or 'none')}</p>"
    )


def _dialogue_panel(captured: Captured, content: ReadMessage, asked: _Asked) -> str:
    return f"<pre>{html_text(captured.transcript or 'Nothing was kept.')}</pre>"


_PANELS = {
    "html": _html_panel, "text": _text_panel, "headers": _headers_panel, "source": _source_panel,
    "files": _files_panel, "checks": _checks_panel, "dialogue": _dialogue_panel,
}  # fmt: skip

_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark"><title>{title}</title>
<link rel=icon href="data:,"><style nonce={nonce}>{style}</style></head>
<body class={kind}>
<header><h1><a href="/">chasquid</a></h1><span id=count>{total}</span>
<form role=search action="/"><input id=search name=query type=search value="{query}"
 placeholder="Search   /" aria-label="Search the messages"
 title="words; from: to: subject: has:attachment is:unread before: larger:"></form>
<form method=post action="/delete"><button id=clear>Delete all</button></form>
<span id=state role=status></span></header>
<main>{body}</main>
<script nonce={nonce}>{script}</script></body></html>
"""

_PAGE_STYLE = """
:root { color-scheme: light dark; --back: #fff; --side: #f6f7f9; --text: #1b1f24; --soft: #59636e;
  --edge: #d8dee4; --pick: #dcebff; --main: #0b5cad; --note: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --side: #1b1f25; --text: #e6e9ed;
  --soft: #9aa4b0; --edge: #323942; --pick: #20395a; --main: #7ab7ff; --note: #3a3014; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100vh; display: flex; flex-direction: column;
  font: 15px/1.45 system-ui, sans-serif; background: var(--back); color: var(--text); }
header { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; padding: .5rem .9rem;
  border-bottom: 1px solid var(--edge); }
h1 { font-size: 1.05rem; margin: 0; } h1 a { color: inherit; text-decoration: none; }
h2 { font-size: 1.25rem; margin: .6rem 0; overflow-wrap: anywhere; } h3 { font-size: 1rem; }
[role=search] { flex: 1; max-width: 32rem; } #search { width: 100%; }
input, button, .button { font: inherit; color: inherit; background: var(--back); cursor: pointer;
  border: 1px solid var(--edge); border-radius: .45rem; padding: .35rem .75rem;
  text-decoration: none; } a { color: var(--main); } .soft, small, time { color: var(--soft); }
button:hover, .button:hover { border-color: var(--main); }
:focus-visible { outline: 2px solid var(--main); outline-offset: 1px; }
main { flex: 1; min-height: 0; display: grid; grid-template-columns: minmax(19rem, 25rem) 1fr; }
#side { overflow-y: auto; background: var(--side); border-right: 1px solid var(--edge); }
#side > .button { display: block; margin: .7rem; text-align: center; }
#list { list-style: none; margin: 0; padding: 0; }
.empty { padding: 3rem 1rem; text-align: center; }
#list a { display: block; padding: .6rem .9rem; color: inherit; text-decoration: none;
  border-bottom: 1px solid var(--edge); } #list b, #list strong { font-weight: 400; }
#list .new b, #list .new strong { font-weight: 650; }
#list a:hover, #list a[aria-current] { background: var(--pick); }
#list span { display: flex; gap: .5rem; justify-content: space-between; overflow: hidden; }
#list .soft { display: block; white-space: nowrap; text-overflow: ellipsis; font-size: .85rem; }
#list b, #list strong { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#view { min-width: 0; overflow-y: auto; padding: .7rem 1.1rem; display: flex;
  flex-direction: column; } .bar, .bar form { display: flex; flex-wrap: wrap; gap: .5rem; }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .1rem .8rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } #back { display: none; }
#tabs { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--edge); margin-top: .6rem; }
#tabs a { padding: .4rem .7rem; color: var(--soft); text-decoration: none; }
#tabs a[aria-current] { color: var(--text); border-bottom: 2px solid var(--main); }
#panel { flex: 1; display: flex; flex-direction: column; padding-top: .7rem; }
iframe { border: 1px solid var(--edge); width: 100%; flex: 1; min-height: 60vh;
  background: #fff; }
.note { background: var(--note); padding: .4rem .8rem; margin: 0 0 .5rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/1.5 monospace; }
li { overflow-wrap: anywhere; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--edge); overflow-wrap: anywhere; } th { color: var(--soft); }
@media (max-width: 760px) { main { display: block; overflow-y: auto; } #side { border: 0; }
  .reading #side { display: none; } #back { display: inline-block; } [role=search] { order: 9;
  flex-basis: 100%; max-width: none; } #view { overflow: visible; } th { width: 7rem; } }
"""

# The page is whole without it: it brings news, and keys.
_PAGE_SCRIPT = """
"use strict";
const $ = id => document.getElementById(id);
async function renew() {
  try {
    const page = await (await fetch(location.href)).text();
    const fresh = new DOMParser().parseFromString(page, "text/html");
    for (const id of ["side", "count"]) $(id).replaceWith(fresh.getElementById(id));
    document.title = fresh.title; $("state").textContent = "";
  } catch { $("state").textContent = "The server does not answer."; }
}
function step(by) {
  const links = [...document.querySelectorAll("#list a")];
  const at = links.findIndex(link => link.hasAttribute("aria-current"));
  const next = links[at < 0 ? 0 : at + by];
  if (next) next.click();
}
const keys = { j: () => step(1), k: () => step(-1), "/": () => $("search").focus(),
  Escape: () => $("back")?.click(), Delete: () => $("remove")?.click() };
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
$("clear").addEventListener("click", event => {
  if (!confirm("Delete all messages? They cannot be brought back.")) event.preventDefault();
});
const events = new EventSource("/api/v1/events");
let first = true;
events.addEventListener("change", event => {
  if (!first || JSON.parse(event.data).total != $("count").textContent) renew();
  first = false;
});
events.onerror = () => { $("state").textContent = "The server does not answer."; };
"""

_Action = Callable[[Inbox, _Asked, Stream], Awaitable[bytes]]

_ROUTES: tuple[tuple[str, dict[str, _Action]], ...] = (
    (r"/", {"GET": Inbox._page}),
    (r"/delete", {"POST": Inbox._page_delete}),
    (r"/message/(\w{1,40})", {"GET": Inbox._page}),
    (r"/message/(\w{1,40})/delete", {"POST": Inbox._page_delete}),
    (r"/message/(\w{1,40})/release", {"POST": Inbox._page_release}),
    (r"/view/(\w{1,40})\.html", {"GET": Inbox._html}),
    (r"/view/(\w{1,40})\.txt", {"GET": Inbox._text}),
    (r"/(?:livez|readyz|health)", {"GET": Inbox._alive}),
    (r"/api/v1/messages", {"GET": Inbox._list, "DELETE": Inbox._delete, "PUT": Inbox._mark}),
    (r"/api/v1/search", {"GET": Inbox._list, "DELETE": Inbox._delete_found}),
    (r"/api/v1/message/(\w{1,40})", {"GET": Inbox._show}),
    (r"/api/v1/message/(\w{1,40})/headers", {"GET": Inbox._headers}),
    (r"/api/v1/message/(\w{1,40})/raw", {"GET": Inbox._raw}),
    (r"/api/v1/message/(\w{1,40})/dialogue", {"GET": Inbox._dialogue}),
    (r"/api/v1/message/(\w{1,40})/part/([0-9]{1,6})", {"GET": Inbox._part}),
    (r"/api/v1/message/(\w{1,40})/release", {"POST": Inbox._release_message}),
    (r"/api/v1/send", {"POST": Inbox._send_message}),
    (r"/api/v1/chaos", {"GET": Inbox._show_chaos, "PUT": Inbox._set_chaos}),
    (r"/api/v1/info", {"GET": Inbox._info}),
    (r"/api/v1/tags", {"GET": Inbox._tags}),
    (r"/api/v1/webui", {"GET": Inbox._webui}),
    (r"/api/v1/wait", {"GET": Inbox._wait}),
    (r"/api/v1/events", {"GET": Inbox._events}),
    (
        r"/api/v1/faults",
        {"GET": Inbox._list_faults, "POST": Inbox._add_fault, "DELETE": Inbox._delete_faults},
    ),
    (r"/api/v1/faults/([\w.-]{1,40})", {"DELETE": Inbox._delete_fault}),
)


def _route(method: str, path: str) -> tuple[_Action, tuple[str, ...]]:
    """Return who answers, and what stands in the path. Raises HttpRefused."""
    for pattern, actions in _ROUTES:
        match = re.fullmatch(pattern, path, re.ASCII)
        if match is None:
            continue
        if method not in actions:
            allowed = ", ".join(actions)
            text = f"{printable(path, 100)} allows {allowed}"
            raise HttpRefused(405, text, ("Allow", allowed))
        return actions[method], match.groups()
    raise HttpRefused(
        404, "there is nothing here; the page is /, and messages are /api/v1/messages"
    )


# ======================================================================================
# ROOM: COMMANDS
#
# The command line. Exit status 0; 1 for "no" or failed, with one line on standard error;
# 2 for wrong usage. A command does one thing and prints what a person wants to know.
#
# Only here are there signal handlers, arguments, and text for the terminal.
# ======================================================================================

_CONFIG_DIR = "/etc/chasquid"
_TRY_DOMAIN = "try.test"
_TRY_USER = f"you@{_TRY_DOMAIN}"
_TRY_PORTS = (2525, 2587, 2465)
_TRY_SECONDS = 30.0

_BEGIN = """\
chasquid {version}: a mail server in one file. Three ways to begin:

  {program} try                        a throwaway server, here and now
  {program} --config-dir DIR serve     the server, with the configuration in DIR
  {program} capture                    a server for tests, which shows all mail
  {program} --help                     all commands

Without a command, the server starts if DIR (now {config_dir})
holds a chasquid.conf.
"""

_TRY_WELCOME = """\
chasquid {version}, for trying things out in {directory}

  smtp                 127.0.0.1:{smtp}   mail for anybody @{domain}
  submission           127.0.0.1:{submission}   STARTTLS, then log in
  submission over TLS  127.0.0.1:{tls}   log in

  user         {user}
  password     {password}
  certificate  {certificate}
  Maildir      {maildir}

Nothing is sent to other servers. Send a message:

  printf 'Subject: hello\\n\\nIt works.\\n' | curl --crlf -sS -T - \\
    --url smtps://localhost:{tls} --cacert '{certificate}' \\
    --user '{user}:{password}' --mail-from {user} --mail-rcpt {user}

Each delivery is shown below; Ctrl-C ends.
"""

_CAPTURE_WELCOME = """\
chasquid {version} shows what it is sent, and delivers nothing

  mail goes to   {smtp}
  and is shown   http://{host}:{port}/{login}

Ctrl-C ends, and all is forgotten.
"""


# What `capture` imports when it is first used; see `load_modules`.
_CAPTURE_MODULES = (
    "_strptime", "datetime", "dns.asyncresolver", "email.generator", "email.headerregistry",
    "email.message", "email.parser", "email.policy", "email.utils", "encodings.idna", "fnmatch",
    "hashlib", "hmac", "html", "idna", "idna.uts46data", "ipaddress", "precis_i18n.profile",
    "shutil", "tempfile", "urllib.parse", "zoneinfo",
)  # fmt: skip


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class _NowhereCourier:
    """Takes what is for other servers, and fails it."""

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        text = "this server is for trying things out, and sends nothing to other servers"
        return [Result(State.FAILED, "5.7.1", text)] * len(destinations)


def _return_memory_at_once() -> None:
    """Have glibc give large blocks back to the system as soon as they are free.

    By itself it keeps what was freed, for each thread: after some logins, which take 16 MB
    each, that would be 16 MB for every worker thread, for ever. See mallopt(3).
    """
    try:
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
    except (ImportError, OSError, AttributeError):
        return  # another C library, which does not keep them
    mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)
    mallopt(_M_TRIM_THRESHOLD, 1024 * 1024)


def run_daemon(daemon: Daemon, on_ready: Callable[[], object] = lambda: None) -> None:
    """Run until SIGTERM or SIGINT; SIGHUP reads the files again. Raises ChasquidError.

    Signals are minded before `on_ready` is called.
    """
    sys.setswitchinterval(0.0005)  # a finished fsync is noticed sooner while we compute
    signal.set_wakeup_fd(daemon.loop.wakeup_fd, warn_on_full_buffer=False)
    daemon.at_end(lambda: signal.set_wakeup_fd(-1))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    signal.signal(signal.SIGHUP, lambda *_: daemon.reload())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])

    def ready() -> None:
        _return_memory_at_once()  # loads ctypes, which a client that waits need not wait for
        on_ready()

    daemon.run(ready)


def _load(arguments: argparse.Namespace) -> Config:
    return load_config(arguments.config_dir, arguments.config_overrides)


def _serve(arguments: argparse.Namespace) -> int:
    # whoever sees the ports open may ask for a reload, which would end us before it is minded
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    config = _load(arguments)
    write_no_core()
    account = account_of_server(config) if os.geteuid() == 0 else None
    run_daemon(Daemon(config, account=account))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Print everything that is wrong with the configuration, and what is doubtful."""
    problems: list[ConfigError] = []
    config = load_config(arguments.config_dir, arguments.config_overrides, problems)
    with collected(problems):
        smarthost_login(config)
    with collected(problems):
        account_of_server(config)
    domains, certificates = load_domains(config), Certificates(config)
    wrong = [str(problem) for problem in problems]
    wrong += [*domains.problems, *certificates.problems]
    doubtful = [*setting_warnings(config)]
    everybody = not (config.dovecot_auth or hook_path(config.config_dir, "alias-resolve"))
    for name, domain in domains.each.items():
        for finding in domains.aliases.findings(name, domain.users, everybody):
            (wrong if finding.wrong else doubtful).append(finding.text)
    doubtful += certificates.warnings(time.time(), [domain_to_ascii(config.hostname)])
    if not domains.each and not domains.broken:
        doubtful.append(f"no domain in {config.config_dir}/domains: all mail for here is refused")
    if not certificates.loaded:
        top = f"{config.config_dir}/certs/NAME/"
        doubtful.append(f"no certificate in {top}: TLS is off, and nobody can log in")
    for text in wrong:
        print(text)
    for text in doubtful:
        print(f"warning: {text}")
    if not wrong:
        served = ", ".join(domains.each) or "no domain"
        print(f"The configuration in {config.config_dir} can be used; it serves {served}.")
    return 1 if wrong else 0


# --- try ---


class _TryOut:
    """The directory of `try`: made once, then kept and used again."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self.certificate = self._path("certs", "localhost", "fullchain.pem")
        self.password = ""

    def _path(self, *parts: str) -> str:
        return os.path.join(self.directory, *parts)

    def prepare(self) -> Config:
        """Make what is missing; return the configuration. Raises ChasquidError."""
        try:
            make_directory(self.directory)
            self._make_certificate()
            self._make_user()
            self._make_config()
        except OSError as error:
            raise ChasquidError(f"{self.directory} cannot be used: {reason(error)}") from error
        addresses = zip(
            ("smtp_address", "submission_address", "submission_over_tls_address"),
            _TRY_PORTS, strict=True,
        )  # fmt: skip
        overrides = "".join(f'{key}: "127.0.0.1:{_free_port(port)}"\n' for key, port in addresses)
        return load_config(self.directory, overrides)

    def _make_certificate(self) -> None:
        if os.path.exists(self.certificate):
            return
        chain, key = self_signed_certificate(["localhost", "127.0.0.1", "::1"], time.time())
        make_directory(os.path.dirname(self.certificate))
        replace_durably(self._path("certs", "localhost", "privkey.pem"), key.encode())
        replace_durably(self.certificate, chain.encode(), 0o644)

    def _make_user(self) -> None:
        secret = self._path("password")
        users = self._path("domains", _TRY_DOMAIN, "users")
        if os.path.exists(secret) and os.path.exists(users):
            self.password = read_file(secret).decode().strip()
            return
        self.password = new_id()
        make_directory(os.path.dirname(users))
        name = split_address(_TRY_USER)[0]
        replace_durably(users, format_users({name: new_password(self.password.encode())}))
        replace_durably(secret, f"{self.password}\n".encode())
        aliases = f"# everybody else in this domain is you\n*: {name}\n"
        replace_durably(self._path("domains", _TRY_DOMAIN, "aliases"), aliases.encode())

    def _make_config(self) -> None:
        path = self._path("chasquid.conf")
        if os.path.exists(path):
            return
        text = (
            '# Made by "chasquid try", which sets the addresses to listen on itself.\n'
            'hostname: "localhost"\n'
            f"data_dir: {quote(self._path('data'))}\n"
            f"mail_log_path: {quote(self._path('mail.log'))}\n"
            f"log_path: {quote(self._path('server.log'))}\n"
            'reload_every: "2s"\n'
        )
        replace_durably(path, text.encode(), 0o644)

    @property
    def maildir(self) -> str:
        return self._path("data", "mail", _TRY_DOMAIN, split_address(_TRY_USER)[0])


def _free_port(wanted: int) -> int:
    """Return `wanted`, or if that is taken, a port of the system's choice."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            raw.bind(("127.0.0.1", wanted))
        except OSError:
            return 0
    return wanted


def _try(arguments: argparse.Namespace) -> int:
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    place = _TryOut(arguments.dir or os.path.join(home, "chasquid-try"))
    config = place.prepare()
    stored: list[str] = []

    def show(item: Item, recipient: Recipient) -> None:
        envelope, result = item.envelope, recipient.result
        if not arguments.once:
            sender = envelope.sender or "<>"
            print(f"{result.state}: from {sender} to {recipient.original}: {result.text}")
        elif result.state == State.SENT:
            stored.append(result.text.removeprefix("stored as "))

    async def know_nothing(name: str, kind: str) -> Answer:
        return Answer(False, (), 3600.0)  # so that it works the same without a network

    daemon = Daemon(config, ask=know_nothing, remote=_NowhereCourier(), on_result=show)
    ports = {port: number for port, _, number in daemon.addresses}

    def begin() -> None:
        if arguments.once:
            sending = _send_once(daemon, place, ports[SUBMISSION_PORT], stored)
            daemon.loop.spawn(sending, "try --once")
            return
        print(_TRY_WELCOME.format(
            version=__version__, directory=place.directory, domain=_TRY_DOMAIN, user=_TRY_USER,
            smtp=ports[SMTP_PORT], submission=ports[SUBMISSION_PORT],
            tls=ports[SUBMISSION_TLS_PORT], password=place.password,
            certificate=place.certificate, maildir=place.maildir,
        ), flush=True)  # fmt: skip
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    run_daemon(daemon, begin)
    if arguments.once:
        return _show_once(stored)
    return 0


async def _send_once(daemon: Daemon, place: _TryOut, port: int, stored: list[str]) -> None:
    """Send a message as a mail program would, and stop when it is in the Maildir."""
    loop = daemon.loop
    now = loop.clock.time()
    text = (
        f"From: <{_TRY_USER}>\r\nTo: <{_TRY_USER}>\r\nSubject: chasquid {__version__} works\r\n"
        f"Date: {rfc5322_date(now)}\r\n\r\n"
        "This came by submission, with TLS and a login, through the queue into your Maildir.\r\n"
    ).encode()
    delivery = Delivery(
        "", _TRY_USER, Message(b"", "", len(text), text), smtputf8=False, eight_bit=False
    )
    try:
        with loop.deadline(_TRY_SECONDS):
            client = Client(loop, await connect(loop, "127.0.0.1", port), "localhost")
            await client.greet("localhost")
            await client.start_tls(client_tls_context(True, place.certificate), "localhost")
            await client.hello("localhost")
            await client.authenticate(_TRY_USER, place.password)
            destination = Destination(DestinationKind.ADDRESS, _TRY_USER)
            (result,) = await client.transfer(delivery, [_TRY_USER], [destination])
            print(f"sent by submission ({client.tls_text}): {result.text}")
            await client.quit()
            while result.state == State.SENT and not stored:
                await loop.sleep(0.01)
    except ChasquidError as error:
        print(f"chasquid: the message could not be sent: {reason(error)}", file=sys.stderr)
    finally:
        daemon.stop()


def _show_once(stored: list[str]) -> int:
    if not stored:
        print("chasquid: the message did not reach the Maildir", file=sys.stderr)
        return 1
    print(f"stored as {stored[0]}:\n")
    print(read_file(stored[0]).decode())
    return 0


# --- capture ---


def _capture(arguments: argparse.Namespace) -> int:
    """Show what is sent, until SIGTERM or SIGINT."""
    host, port = _place(arguments.smtp, "--smtp")
    users = _capture_users(arguments)
    server = CaptureServer(
        host, port, tls=arguments.tls, users=users, login_in_the_clear=users is not None,
        size_limit=arguments.size_limit_mb * 1024 * 1024, keep=arguments.keep,
        keep_octets=arguments.keep_mb * 1024 * 1024,
        magic=not arguments.no_magic,
    )  # fmt: skip
    for rule in arguments.fault:
        server.script.add_rule(_rule(rule))
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with server:
        run = server.run
        release = _release(arguments, run.loop)
        web_host, web_port = _place(arguments.web, "--web")
        shown = f"[{host}]" if ":" in host else host or "127.0.0.1"
        smtp = f"smtp://{shown}:{server.port}"
        login = _web_login(arguments, web_host)
        inbox = Inbox(
            run.loop,
            server.server_log,
            server.mailbox,
            server.script,
            release=release,
            release_to=arguments.release or "",
            smtp=smtp,
            login=login,
        )
        web_port = run.also_listen(web_host, web_port, inbox.answer)
        shown = f"[{web_host}]" if ":" in web_host else web_host or "127.0.0.1"
        load_modules(_CAPTURE_MODULES)
        if release is not None:
            with contextlib.suppress(TemporaryFailure):  # it is said when it is needed
                DnsClient(run.loop, ()).set_up()
        who = f"\n  login          {login[0]}, password {login[1]}" if login else ""
        welcome = {"smtp": smtp, "host": shown, "port": web_port, "login": who}
        print(_CAPTURE_WELCOME.format(version=__version__, **welcome))
        if server.settings.tls != "off":
            print(f"  certificate  {server.certificate}\n")
        sys.stdout.flush()
        ended.wait()
    return 0


def _web_login(arguments: argparse.Namespace, host: str) -> tuple[str, str] | None:
    """Return who may see the page: anybody at the loopback address, else who has a password.

    Raises ChasquidError.
    """
    given = arguments.web_login
    if given == "off" or (given is None and (host == "localhost" or is_loopback(host))):
        return None
    if given is None:
        return "chasquid", new_id()
    user, colon, password = given.partition(":")
    if not user or not colon or not password:
        raise ChasquidError(f"--web-login: expected USER:PASSWORD or off, found {given!r}")
    return user, password


def _place(text: str, option: str) -> tuple[str, int]:
    """Return host and port of "host:port", ":port" or "port". Raises ChasquidError."""
    if text.isdecimal():
        text = f"127.0.0.1:{text}"
    try:
        host, port = host_and_port(text, 0)
    except ValueError as error:
        raise ChasquidError(f"{option}: {error}") from error
    return host, port


def _capture_users(
    arguments: argparse.Namespace,
) -> dict[str, str] | Callable[[str, str], bool] | None:
    if arguments.any_login and arguments.login:
        raise ChasquidError("expected one of --login and --any-login")
    if arguments.any_login:
        return lambda user, password: True
    for login in arguments.login:
        if not re.fullmatch(r"[^:]+:.+", login):
            raise ChasquidError(f"--login: expected USER:PASSWORD, found {printable(login, 100)!r}")
    users = dict(login.partition(":")[::2] for login in arguments.login)
    return users or None


def _rule(text: str) -> dict[str, Any]:
    """Return a rule that stands in JSON, or as "RCPT 451 4.2.1 busy". Raises ChasquidError."""
    if not text.lstrip().startswith("{"):
        stage, _, reply = text.partition(" ")
        return {"stage": stage, "reply": reply}
    try:
        rule = json.loads(text)
    except ValueError as error:
        raise ChasquidError(f"--fault: {text!r} is no JSON: {error}") from error
    return dict(rule)


def _release(arguments: argparse.Namespace, loop: Loop) -> Releaser | None:
    if not arguments.release and (arguments.release_user or arguments.release_password_file):
        raise ChasquidError("expected --release HOST[:PORT] with the user and the password for it")
    if not arguments.release:
        return None
    if bool(arguments.release_user) != bool(arguments.release_password_file):
        raise ChasquidError("expected --release-user and --release-password-file together")
    login = None
    if arguments.release_user:
        password = read_file(arguments.release_password_file).decode("utf-8", "replace")
        login = arguments.release_user, password.strip("\r\n")
    host, port = _place(arguments.release, "--release")
    port = port or (587 if login else 25)
    return Releaser(loop, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", login)


# --- users ---


def _parse_domain_name(text: str) -> str:
    """Return `text` as a domain in Unicode. Raises ChasquidError."""
    try:
        return domain_to_unicode(text)
    except ValueError as error:
        raise ChasquidError(str(error)) from None


def _split_user(text: str) -> tuple[str, str]:
    """Return user and domain, both normalised. Raises ChasquidError."""
    try:
        user, domain = split_address(normalize_address(address_from_person(text)))
    except ValueError as error:
        raise ChasquidError(str(error)) from None
    if not domain or domain.startswith("[") or "/" in user or user in (".", ".."):
        raise ChasquidError(f"expected USER@DOMAIN, found {printable(text, 100)!r}")
    return user, domain


def _domain_directory(config: Config, domain: str) -> str:
    """Return the directory of `domain`, whether it exists or not."""
    known = domain_directories(config.config_dir, []).get(domain)
    return known or os.path.join(config.config_dir, "domains", domain)


_SHORT_PASSWORD = 8


def _ask_password(arguments: argparse.Namespace, twice: bool) -> bytes:
    """Take the password from the arguments, the terminal or standard input.

    Raises ChasquidError.
    """
    if arguments.password is not None:
        text = "warning: --password can be seen in the list of processes; without it you are asked"
        print(f"chasquid: {text}", file=sys.stderr)
        password = os.fsencode(arguments.password)
    elif sys.stdin.isatty():
        import getpass  # only for a terminal

        password = os.fsencode(getpass.getpass("Password: "))
        if twice and password != os.fsencode(getpass.getpass("Once more: ")):
            raise ChasquidError("the two passwords differ; nothing was changed")
    else:
        password = sys.stdin.buffer.readline().rstrip(b"\r\n")
    if not password:
        raise ChasquidError(
            f"the password is empty; {'nothing was changed' if twice else 'nobody may log in so'}"
        )
    if twice and len(password) < _SHORT_PASSWORD:
        text = f"warning: a password of fewer than {_SHORT_PASSWORD} characters is soon guessed"
        print(f"chasquid: {text}", file=sys.stderr)
    return password


def _write_users(directory: str, users: Mapping[str, Password]) -> None:
    try:
        make_directory(directory, 0o755)
        replace_durably(os.path.join(directory, "users"), format_users(users), 0o600)
    except OSError as error:
        path = os.path.join(directory, "users")
        raise ChasquidError(f"{path} cannot be written: {error.strerror}") from error


def _user_add(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    user, domain = _split_user(arguments.user)
    directory = _domain_directory(config, domain)
    is_new = not os.path.isdir(directory)
    users = load_users(directory)
    password: Password = Denied()
    if arguments.receive_only and arguments.password is not None:
        raise ChasquidError("expected --receive-only or --password, not both")
    if not arguments.receive_only:
        password = new_password(_ask_password(arguments, twice=True))
    existed = user in users
    _write_users(directory, {**users, user: password})
    print(f"{user}@{domain} {'has a new password' if existed else 'is added'}")
    _tell_of_new_domain(domain, is_new)
    _put_in_force(config, domain)
    return 0


def _put_in_force(config: Config, domain: str, file: IO[str] | None = None) -> None:
    """Have the running server read the files again, and say to `file` whether that took."""
    try:
        problems = ask_running_server(config.data_dir, "reload", "")
    except ChasquidError as error:
        text = "the running server cannot be told, and will see it by itself"
        print(f"{text}: {error}", file=file)
        return
    if problems is None:
        print("no server is running; it will be in force at its start", file=file)
        return
    ours = _problems_of(domain, config, problems)
    for problem in ours:
        print(f"chasquid: not in force: {problem}", file=sys.stderr)
    if not ours:
        print("the running server has taken it over", file=file)


def _problems_of(domain: str, config: Config, problems: Sequence[str]) -> list[str]:
    """Return those of `problems` that are about the files of `domain`."""
    place = f"/domains/{os.path.basename(_domain_directory(config, domain))}"
    return [problem for problem in problems if f"{place}/" in problem or f"{place}:" in problem]


def _tell_of_new_domain(domain: str, is_new: bool) -> None:
    if is_new:
        print(f"{domain} is now a domain of this server: all its mail is taken to be for here")


def _user_remove(arguments: argparse.Namespace) -> int:
    user, domain = _split_user(arguments.user)
    config = _load(arguments)
    directory = _domain_directory(config, domain)
    users = load_users(directory)
    if user not in users:
        raise ChasquidError(f"{directory}/users: there is no user {user!r}")
    del users[user]
    _write_users(directory, users)
    print(f"{user}@{domain} is removed; the mail in the Maildir is kept")
    _put_in_force(config, domain)
    return 0


def _authenticate(arguments: argparse.Namespace) -> int:
    user, domain = _split_user(arguments.user)
    known = load_users(_domain_directory(_load(arguments), domain)).get(user, Denied())
    if check_password(known, _ask_password(arguments, twice=False)):
        print(f"{user}@{domain} may log in with this password")
        return 0
    raise ChasquidError(f"{user}@{domain} may not log in with this password")


def _check_userdb(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    domains = load_domains(config)
    names = [*domains.each, *domains.broken]
    problems: Sequence[str] = domains.problems
    if arguments.domain:
        wanted = _parse_domain_name(arguments.domain)
        if wanted not in names:
            raise ChasquidError(f"there is no domain {wanted}")
        names = [wanted]
        problems = _problems_of(wanted, config, problems)
    everybody = not (config.dovecot_auth or hook_path(config.config_dir, "alias-resolve"))
    for problem in problems:
        print(f"chasquid: {problem}", file=sys.stderr)
    wrong = bool(problems)
    for name in sorted(set(names) - domains.broken):
        users, own, keys = domains.each[name]
        print(f"{name}: {plural(len(users), 'user')}, {len(own)} names in aliases, "
              f"{plural(len(keys), 'DKIM key')}")  # fmt: skip
        for finding in domains.aliases.findings(name, users, everybody):
            wrong = wrong or finding.wrong
            print(f"  {finding.text}")
    if not everybody:
        text = "unknown users behind aliases are not reported: Dovecot or a hook may know them"
        print(f"chasquid: {text}", file=sys.stderr)
    return 1 if wrong else 0


# --- the running server and the queue ---


def _aliases_resolve(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    lines = ask_running_server(config.data_dir, "aliases-resolve", arguments.address)
    if lines is None:
        print("chasquid: no server is running; these are the files' words", file=sys.stderr)
        address = address_from_person(arguments.address)
        domains = load_domains(config)
        if split_address(address)[1] in domains.broken:
            raise ChasquidError(domains.problems[0])
        try:
            lines = [
                destination_text(destination) for destination in domains.aliases.expand(address)
            ]
        except NoSuchUser as error:
            raise error.for_owner() from None
    print("\n".join(lines))
    return 0


def _print_config(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    lines = config_text(config, explained=not arguments.changed).splitlines()
    if arguments.changed:
        changed = changed_keys(config)
        lines = [line for line in lines if line.partition(":")[0] in changed]
    print("\n".join(lines))
    return 0


def _domaininfo_remove(arguments: argparse.Namespace) -> int:
    config, domain = _load(arguments), _parse_domain_name(arguments.domain)
    path = domain_info_path(os.path.join(config.data_dir, DOMAIN_INFO_DIRECTORY), domain)

    def offline() -> None:
        if not remove_domain_info(path):
            raise ChasquidError(DOMAIN_UNKNOWN.format(domain))

    text = [DOMAIN_FORGOTTEN.format(domain)]
    return _change(config, "domaininfo-remove", domain, offline=offline, done=text)


# --- DKIM ---

_DKIM_ALGORITHMS = ("rsa2048", "rsa3072", "rsa4096", "ed25519")


def _dkim_keygen(arguments: argparse.Namespace) -> int:
    domain = _parse_domain_name(arguments.domain)
    selector = arguments.selector or time.strftime("%Y%m%d", time.gmtime())
    path = _dkim_path(arguments, domain, selector)
    if os.path.exists(path):
        raise ChasquidError(f"{path} exists already; choose another selector, or remove it")
    if not arguments.key and not os.path.isdir(os.path.dirname(path)):
        text = f"{domain} is not served here: there is no {os.path.dirname(path)}"
        raise ChasquidError(f"{text}; add a user first, or name a file for the key")
    key = new_key(arguments.algo)
    try:
        make_directory(os.path.dirname(path), 0o755)
        replace_durably(path, key.to_pem().encode(), 0o600)
    except OSError as error:
        raise ChasquidError(f"{path} cannot be written: {error.strerror}") from error
    print(f"The key is in {path}. Publish its record now:", file=sys.stderr)
    print(_dns_record(load_dkim_key(path, domain, selector)), flush=True)
    if not arguments.key:
        _put_in_force(_load(arguments), domain, sys.stderr)
    return 0


def _dkim_path(arguments: argparse.Namespace, domain: str, selector: str) -> str:
    if not is_selector(selector):
        raise ChasquidError(f"expected a selector, found {printable(selector, 80)!r}")
    if arguments.key:
        return os.path.abspath(str(arguments.key))
    return os.path.join(_domain_directory(_load(arguments), domain), f"dkim:{selector}.pem")


def _dkim_keys(arguments: argparse.Namespace) -> tuple[DkimKey, ...]:
    """Return the keys that the arguments mean, at least one. Raises ChasquidError."""
    domain = _parse_domain_name(arguments.domain)
    if arguments.selector:
        path = _dkim_path(arguments, domain, arguments.selector)
        return (load_dkim_key(path, domain, arguments.selector),)
    directory = _domain_directory(_load(arguments), domain)
    keys = load_dkim_keys(directory, domain)
    if not keys:
        text = f"there is no dkim:SELECTOR.pem in {directory}; make one with dkim-keygen"
        raise ChasquidError(text)
    return keys


def _dns_record(key: DkimKey) -> str:
    """Return the record of a key as a zone file has it."""
    return DnsRecord(key.name, "TXT", key.record, "DKIM").zone_line


def _dkim_dns(arguments: argparse.Namespace) -> int:
    for key in _dkim_keys(arguments):
        print(_dns_record(key))
    return 0


def _read_message() -> tuple[bytes, bytes]:
    """Return header and body of the message on standard input, its lines ended by CRLF."""
    data = re.sub(rb"\r?\n", b"\r\n", sys.stdin.buffer.read())
    header = header_block(data)
    if header is None:
        return data, b""
    return header, data[len(header) + 2 :]


def _author_of(header: bytes) -> str:
    """Return the domain of the first author in From. Raises ChasquidError."""
    with contextlib.suppress(ValueError):
        for field in header_fields(header):
            for domain in author_domains(field.value) if field.name == "from" else ():
                return domain
    raise ChasquidError("the message has no From with a domain; name the domain to sign for")


def _dkim_sign(arguments: argparse.Namespace) -> int:
    header, body = _read_message()
    if arguments.domain is None:
        arguments.domain = _author_of(header)
    keys = _dkim_keys(arguments)
    try:
        signed = sign(keys, header, [body], time.time())
    except ValueError as error:
        raise ChasquidError(f"the header holds a line that is no field: {error}") from None
    sys.stdout.buffer.write(signed.replace(b"\r\n", b"\n"))
    return 0


def _dkim_verify(arguments: argparse.Namespace) -> int:
    header, body = _read_message()
    try:
        fields = header_fields(header)
    except ValueError as error:
        raise ChasquidError(f"the header holds a line that is no field: {error}") from None
    found = _with_names(arguments, lambda names, loop: verify_signatures(
        names, loop, fields, lambda: [body]
    ))  # fmt: skip
    if not found:
        raise ChasquidError("the message has no DKIM-Signature")
    for signature in found:
        why = f": {signature.reason}" if signature.reason else ""
        domain, selector = signature.domain or "?", signature.selector or "?"
        print(f"{signature.result}  {domain}, selector {selector}{why}")
    return 0 if any(signature.result == "pass" for signature in found) else 1


def _with_names(
    arguments: argparse.Namespace, use: Callable[[Names, Loop], Coroutine[Any, Any, T]]
) -> T:
    """Run something that asks the DNS, or is told what is there by --txt."""

    async def tell(name: str, kind: str) -> Answer:
        strings = re.findall(r'"([^"]*)"', arguments.txt)  # as dkim-dns and zone files have it
        return Answer(True, ("".join(strings) or arguments.txt,), 60.0)

    def on_crash(name: str, error: BaseException) -> None:
        raise error

    workers = Workers(1)
    loop = Loop(Clock(), workers, on_crash)
    try:
        servers: tuple[str, ...] = ()
        if os.path.exists(os.path.join(arguments.config_dir, "chasquid.conf")):
            servers = _load(arguments).dns_server
        names = Names(loop, tell if arguments.txt else DnsClient(loop, servers).ask)
        return loop.run(use(names, loop))
    finally:
        loop.close()
        workers.close()


def _queue_directory(config: Config) -> str:
    return os.path.join(config.data_dir, "queue")


def _queue_items(config: Config) -> list[Item]:
    contents = read_queue(_queue_directory(config))
    for _, why in contents.unreadable + contents.unread + contents.newer:
        print(f"chasquid: {why}", file=sys.stderr)
    return sorted(contents.items, key=lambda item: item.envelope.received)


def _queue_list(config: Config, arguments: argparse.Namespace) -> int:
    now = time.time()
    if arguments.domain is not None:
        arguments.domain = _parse_domain_name(arguments.domain)
    items = [item for item in _queue_items(config) if _is_wanted(item, arguments)]
    if arguments.json:
        print(json.dumps([_item_in_json(item) for item in items], indent=2))
        return 0
    for item in items:
        age = duration_text(now - item.envelope.received)
        print(f"{item.id}  {age} old, {item.message.size} octets, from <{item.envelope.sender}>, "
              f"{plural(item.attempts, 'attempt')}, {next_attempt_text(item, now)}")  # fmt: skip
        for recipient in item.recipients:
            print(f"    {destination_text(recipient.destination)}  {recipient_text(recipient)}")
    print(plural(len(items), "message"))
    return 0


def _is_wanted(item: Item, arguments: argparse.Namespace) -> bool:
    """Tell whether a message is one of --sender and --domain, if they are given."""
    sender, domain = arguments.sender, arguments.domain
    if sender is not None and item.envelope.sender.lower() != sender.strip("<>").lower():
        return False
    domains = {split_address(recipient.destination.value)[1] for recipient in item.recipients}
    return domain is None or domain in domains


def _item_in_json(item: Item) -> dict[str, Any]:
    """Return what `queue list --json` says of a message; times in seconds since 1970."""
    return {
        "id": item.id,
        "sender": item.envelope.sender,
        "size": item.message.size,
        "received": item.envelope.received,
        "attempts": item.attempts,
        "next_attempt": item.next_attempt,
        "recipients": [
            {
                "recipient": destination_text(recipient.destination),
                "original": recipient.original,
                "state": recipient.state,
                "status": recipient.result.status,
                "text": recipient.result.text,
            }
            for recipient in item.recipients
        ],
    }


def _queue_item(config: Config, id: str) -> Item:
    for item in _queue_items(config):
        if item.id == id:
            return item
    raise ChasquidError(f"there is no message {printable(id, 40)} in {_queue_directory(config)}")


def _queue_show(config: Config, arguments: argparse.Namespace) -> int:
    item, now = _queue_item(config, arguments.id), time.time()
    print(f"file      {item.message.path}")
    print(f"received  {rfc5322_date(item.envelope.received)}")
    print(f"from      <{item.envelope.sender}>")
    print(f"size      {item.message.size} octets")
    print(f"attempts  {item.attempts}; {next_attempt_text(item, now)}")
    for recipient in item.recipients:
        print(f"to        {destination_text(recipient.destination)} (for {recipient.original})")
        print(f"          {recipient_text(recipient)}")
    print("\n" + item.message.header().decode("utf-8", "replace").replace("\r\n", "\n"), end="")
    return 0


def _change(
    config: Config,
    command: str,
    argument: str,
    offline: Callable[[], None],
    done: Sequence[str] = ("done; no server is running",),
) -> int:
    """Have the running server do it; if none is running, do it to the files."""
    lines: Sequence[str] | None = ask_running_server(config.data_dir, command, argument)
    if lines is None:
        lock = DataDirectory(config.data_dir)
        lock.take()  # so that no server starts meanwhile
        try:
            offline()
        except OSError as error:
            raise ChasquidError(f"data_dir cannot be written: {reason(error)}") from error
        finally:
            lock.release()
        lines = done
    print("\n".join(lines))
    return 0


def _queue_retry(config: Config, arguments: argparse.Namespace) -> int:
    id = arguments.id

    def offline() -> None:
        for item in _queue_items(config) if id == "all" else [_queue_item(config, id)]:
            item.next_attempt = 0.0
            append_synced(item.message.path, item.journal_line(time.time()))

    return _change(config, "queue-retry", id, offline)


def _queue_bounce(config: Config, arguments: argparse.Namespace) -> int:
    def offline() -> None:
        raise ChasquidError("no server is running, and only one can write to the sender")

    return _change(config, "queue-bounce", arguments.id, offline)


def _queue_remove(config: Config, arguments: argparse.Namespace) -> int:
    id = arguments.id

    def offline() -> None:
        os.unlink(_queue_item(config, id).message.path)

    return _change(config, "queue-remove", id, offline)


def _queue(arguments: argparse.Namespace) -> int:
    if arguments.action != "list" and not arguments.id:
        text = f"expected an id after 'queue {arguments.action}'"
        _argument_parser()[1]["queue"].error(text)
    return _QUEUE_ACTIONS[arguments.action](_load(arguments), arguments)


_QUEUE_ACTIONS: dict[str, Callable[[Config, argparse.Namespace], int]] = {
    "list": _queue_list,
    "show": _queue_show,
    "retry": _queue_retry,
    "remove": _queue_remove,
    "bounce": _queue_bounce,
}


# --- explain ---

_WENT = {
    Events.DELIVERED.name: "delivered",
    Events.DEFERRED.name: "not yet delivered",
    Events.FAILED.name: "not delivered",
}
_SENTENCES = {
    Events.LOGIN.name: "{user} logged in from {peer}.",
    Events.LOGIN_FAILED.name: "A login of {user} failed, from {peer}.",
    Events.REJECTED.name: "{peer} was refused: {code} {status} {text}.",
    Events.SENT_AWAY.name: "{peer} was sent away after {errors} errors.",
    Events.ENDED_EARLY.name: "The connection of {peer} broke: {text}.",
    Events.FOUND.name: "Found in the queue at the start.",
    Events.TAKEN_OVER.name: "Taken over from chasquid in Go, where it was {file}.",
    Events.GIVEN_UP.name: "For {to}: given up. {text}.",
    Events.NOT_NOTIFIED.name: "Nobody was written to: {text}.",
    Events.NEXT_ATTEMPT.name: "Next attempt in {pause}.",
    Events.REMOVED.name: "Removed by the operator.",
    Events.LOST.name: "{text}.",
}
_ADDRESS_FIELDS = ("from", "to", "user")
_EXPLAINED_LIMIT = 5  # messages of an address


class _Told(NamedTuple):
    """A line of the mail log: when, and the fields of an event."""

    time: str
    fields: dict[str, str]

    @property
    def id(self) -> str:
        return self.fields.get("id", "")

    def concerns(self, address: str) -> bool:
        """Tell whether a field names `address`, which is in lower case."""
        values = (self.fields.get(name, "").lower() for name in _ADDRESS_FIELDS)
        return any(address in addresses_in(value) for value in values)


def _explain(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    log = list(_mail_events(config))
    wanted = arguments.what
    ids = [wanted]
    if "@" in wanted:
        messages = {told.id for told in log if told.fields["event"] == Events.QUEUED.name}
        ids = list(dict.fromkeys(told.id for told in log if told.concerns(wanted.lower())))
        # logins and refusals only if there is room: a mail program logs in all day
        ids = [id for id in ids if id not in messages] + [id for id in ids if id in messages]
        if len(ids) > _EXPLAINED_LIMIT:
            print(f"The last {_EXPLAINED_LIMIT} of {len(ids)} messages and sessions:\n")
    items = {item.id: item for item in _queue_items(config)}
    ids += [id for id, item in items.items() if id not in ids and _concerns(item, wanted)]
    stories = [(id, list(_story(id, log, items.get(id)))) for id in ids[-_EXPLAINED_LIMIT:]]
    stories = [(id, lines) for id, lines in stories if lines]
    if not stories:
        text = f"nothing is known of {printable(wanted, 100)}"
        raise ChasquidError(f"{text}, neither in {_log_name(config)} nor in the queue")
    for id, lines in stories:
        print("\n".join([f"{id}:", *(f"  {line}" for line in lines)]))
    return 0


def _concerns(item: Item, address: str) -> bool:
    addresses = [item.envelope.sender]
    for recipient in item.recipients:
        addresses += [recipient.original, recipient.destination.value]
    return address.lower() in (known.lower() for known in addresses)


def _log_name(config: Config) -> str:
    return "the journal" if config.mail_log_path == "<syslog>" else config.mail_log_path


def _mail_events(config: Config) -> Iterator[_Told]:
    """Yield what the mail log says, the oldest first. Raises ChasquidError."""
    for line in _log_lines(config):
        time, fields = parse_event(line)
        if fields.get("id"):
            yield _Told(time.strip(), fields)


def _log_lines(config: Config) -> Iterator[str]:
    path = config.mail_log_path
    if path == "<syslog>":
        yield from _journal()
    elif path.startswith("<"):
        text = f"the mail log goes to {path}; set mail_log_path to a file, or to <syslog>"
        raise ChasquidError(text)
    else:
        for name in (f"{path}.1", path):  # the one before the last rotation, if it is there
            if name == path or os.path.exists(name):
                yield from read_file(name, missing=b"").decode("utf-8", "replace").splitlines()


def _journal() -> list[str]:
    import subprocess  # only here

    command = ["journalctl", "--quiet", "--no-pager", "-o", "short-iso", "-t", "chasquid"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        text = "the mail log is in syslog, and journalctl cannot read it"
        raise ChasquidError(f"{text}: {reason(error)}") from None
    return done.stdout.decode("utf-8", "replace").splitlines()


def _story(id: str, log: Sequence[_Told], item: Item | None) -> Iterator[str]:
    """Tell what happened to a message, in sentences."""
    for told in log:
        if told.id == id:
            yield f"{told.time}  {_sentence(told.fields)}".strip()
        elif told.fields.get("about") == id:
            yield f"{told.time}  The sender was written to about it: {told.id}.".strip()
    if item is None:
        return
    now = time.time()
    yield f"It is in the queue, {next_attempt_text(item, now)}:"
    for recipient in item.recipients:
        yield f"  {destination_text(recipient.destination)}  {recipient_text(recipient)}"


def _sentence(fields: Mapping[str, str]) -> str:
    known = collections.defaultdict(str, fields)
    event = known["event"]
    if event in _WENT:
        to = ", ".join(addresses_in(known["to"]))
        return f"For {to}: {_WENT[event]}. {known['text']}"
    if event == Events.DONE.name:
        return f"Done after {plural(int(known['attempts'] or 0), 'attempt')}."
    if event == Events.QUEUED.name:
        return _arrival(known)
    if event in _SENTENCES:
        return _SENTENCES[event].format_map(known)
    return " ".join(f"{name}={value}" for name, value in fields.items() if name != "id")


def _arrival(queued: Mapping[str, str]) -> str:
    to = ", ".join(addresses_in(queued["to"]))
    envelope = f"{queued['size']} octets from {queued['from']} to {to}"
    if queued["about"]:
        return f"Written here as a notification about {queued['about']}: {envelope}."
    who = f"{queued['peer']}, which called itself {queued['helo']}"
    if queued["user"]:
        who = f"user {queued['user']}"
    how = f"with {queued['tls']}" if queued["tls"] else "without TLS"
    sentence = f"Came in by {queued['port']} from {who}, {how}: {envelope}."
    if queued["spf"]:
        sentence += f" SPF {queued['spf']}, DKIM {queued['dkim']}, DMARC {queued['dmarc']}."
    return sentence


def _version(arguments: argparse.Namespace) -> int:
    import importlib.metadata  # only here

    if getattr(arguments, "sbom", False):
        return _print_sbom()
    print(f"chasquid {__version__}")
    print(f"Python {sys.version.split()[0]} ({sys.executable or 'unknown'})")
    for package in ("dnspython", "dkimpy", "pyspf", "idna", "precis-i18n"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    return 0


def _print_sbom() -> int:
    """Print the list that build_zipapp.py has put into the archive (SPDX 2.3; PEP 770)."""
    import importlib.metadata  # only here

    text = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        text = importlib.metadata.distribution("chasquid").read_text("sboms/chasquid.spdx.json")
    if text is None:
        raise ChasquidError("only an archive that build_zipapp.py has made holds such a list")
    print(text, end="")
    return 0


class _Verb(NamedTuple):
    """A row of the table of commands: what it does, its arguments, its help."""

    action: Callable[[argparse.Namespace], int]
    arguments: tuple[tuple[str, dict[str, Any]], ...]
    help: str


_PASSWORD = ("--password", {"help": "instead of being asked for it"})
_USER = ("user", {"metavar": "USER@DOMAIN"})
_DOMAIN = ("domain", {"metavar": "DOMAIN"})
_DKIM_KEY = (
    _DOMAIN,
    ("selector", {"nargs": "?", "metavar": "SELECTOR"}),
    ("key", {"nargs": "?", "metavar": "KEY.pem", "help": "instead of the domain's directory"}),
)
_VERBS: dict[str, _Verb] = {
    "serve": _Verb(_serve, (), "run the server"),
    "try": _Verb(
        _try,
        (
            ("--once", {"action": "store_true", "help": "send one message, show it, and end"}),
            ("--dir", {"metavar": "DIR", "help": "where to keep it"}),
        ),
        "run a throwaway server on this machine",
    ),
    "capture": _Verb(
        _capture,
        (
            ("--smtp", {"metavar": "HOST:PORT", "default": "127.0.0.1:1025"}),
            ("--web", {"metavar": "HOST:PORT", "default": "127.0.0.1:8025"}),
            (
                "--web-login",
                {
                    "metavar": "USER:PASSWORD",
                    "help": "who may see the page; 'off' for anybody. Beyond the loopback address "
                    "a password is made up if none is given",
                },
            ),
            (
                "--keep",
                {
                    "type": int,
                    "default": 1000,
                    "metavar": "N",
                    "help": "so many messages; the oldest go (default 1000, 0: all)",
                },
            ),
            (
                "--keep-mb",
                {
                    "type": int,
                    "default": 1000,
                    "metavar": "MB",
                    "help": "so much of them (default 1000, 0: all)",
                },
            ),
            ("--tls", {"choices": ("off", "starttls", "implicit"), "default": "off"}),
            (
                "--login",
                {
                    "action": "append",
                    "default": [],
                    "metavar": "USER:PASSWORD",
                    "help": "offer AUTH, also without TLS, for this user; may be repeated",
                },
            ),
            ("--any-login", {"action": "store_true", "help": "accept any user and password"}),
            ("--size-limit-mb", {"type": int, "default": 50, "metavar": "MB"}),
            (
                "--fault",
                {
                    "action": "append",
                    "default": [],
                    "metavar": "RULE",
                    "help": "fail on purpose: 'RCPT 451 4.2.1 busy', or a rule in JSON",
                },
            ),
            (
                "--no-magic",
                {
                    "action": "store_true",
                    "help": "recipients like ana+450@… do not fail on purpose",
                },
            ),
            (
                "--release",
                {
                    "metavar": "HOST[:PORT]",
                    "help": "a real server, to which a message can be sent on (port 25; with "
                    "--release-user 587)",
                },
            ),
            ("--release-user", {"metavar": "USER"}),
            ("--release-password-file", {"metavar": "FILE"}),
        ),
        "accept any mail and show it in a web page, deliver nothing",
    ),
    "user-add": _Verb(
        _user_add,
        (
            _USER,
            _PASSWORD,
            ("--receive-only", {"action": "store_true", "help": "a mailbox without a login"}),
        ),
        "add a user, or give one a new password",
    ),
    "user-remove": _Verb(_user_remove, (_USER,), "remove a user"),
    "authenticate": _Verb(_authenticate, (_USER, _PASSWORD), "check a user's password"),
    "check-userdb": _Verb(
        _check_userdb, (("domain", {"nargs": "?"}),), "check the users and aliases files"
    ),
    "aliases-resolve": _Verb(
        _aliases_resolve, (("address", {}),), "show the final recipients of an address"
    ),
    "domaininfo-remove": _Verb(
        _domaininfo_remove, (_DOMAIN,), "forget the security level that a domain has shown"
    ),
    "dkim-keygen": _Verb(
        _dkim_keygen,
        (
            *_DKIM_KEY,
            ("--algo", {"choices": _DKIM_ALGORITHMS, "default": "rsa2048"}),
        ),
        "make a key that signs a domain's mail",
    ),
    "dkim-dns": _Verb(_dkim_dns, _DKIM_KEY, "show the DNS records of a domain's keys"),
    "dkim-sign": _Verb(
        _dkim_sign,
        (
            ("domain", {"nargs": "?", "metavar": "DOMAIN", "help": "default: that of From"}),
            *_DKIM_KEY[1:],
        ),
        "print the signature of the message on standard input",
    ),
    "dkim-verify": _Verb(
        _dkim_verify,
        (("--txt", {"metavar": "RECORD", "help": "the key's record, instead of the DNS"}),),
        "check the signatures of the message on standard input",
    ),
    "check": _Verb(_check, (), "check the whole configuration, and show all mistakes at once"),
    "print-config": _Verb(
        _print_config,
        (("--changed", {"action": "store_true", "help": "only what is not the default"}),),
        "show the configuration that is in force",
    ),
    "queue": _Verb(
        _queue,
        (
            ("action", {"choices": list(_QUEUE_ACTIONS)}),
            ("id", {"nargs": "?", "help": "of a message; for retry also 'all'"}),
            ("--json", {"action": "store_true", "help": "list for programs"}),
            ("--sender", {"metavar": "ADDRESS", "help": "list only mail of that sender"}),
            ("--domain", {"metavar": "DOMAIN", "help": "list only mail for that domain"}),
        ),
        "look at the queue; retry, remove or return a message",
    ),
    "explain": _Verb(
        _explain,
        (("what", {"metavar": "ID|ADDRESS"}),),
        "tell the story of a message, or of the last ones of an address",
    ),
    "version": _Verb(
        _version,
        (
            (
                "--sbom",
                {"action": "store_true", "help": "all files with hashes and licences (SPDX)"},
            ),
        ),
        "show the version and what is bundled",
    ),
}


# Options that stand before or after the command, and how many words follow each.
_GLOBAL_OPTIONS = {"--config-dir": 1, "--config-overrides": 1, "--verbose": 0, "--version": 0}
# As Go's flag package writes options, for the server and for chasquid-util.
_GO_OPTIONS = {
    "-C": "--config-dir", "-v": "--verbose", "-version": "--version", "-help": "--help",
    "-config_dir": "--config-dir", "-config-dir": "--config-dir",
    "-config_overrides": "--config-overrides", "-config-overrides": "--config-overrides",
}  # fmt: skip


def _argument_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and those of the commands."""
    import argparse  # 7 ms, and no business of those who import the module

    parser = argparse.ArgumentParser(prog="chasquid", description="A mail server in one file.")
    parser.add_argument(
        "--config-dir", default=_CONFIG_DIR, metavar="DIR",
        help="where chasquid.conf is (default: %(default)s); also -C DIR",
    )  # fmt: skip
    parser.add_argument(
        "--config-overrides", default="", metavar='"key: value …"',
        help="keys that replace those of chasquid.conf",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help="as the command version")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND")
    subs = {}
    for name, verb in _VERBS.items():
        subs[name] = sub = verbs.add_parser(name, help=verb.help, description=verb.help)
        for argument, options in verb.arguments:
            sub.add_argument(argument, **options)
    sub = verbs.add_parser("help", help="show the options of a command")
    sub.add_argument("command", nargs="?", metavar="COMMAND")
    return parser, subs


def _in_our_spelling(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options for all commands, and the rest, with Go's spelling undone.

    Raises ValueError if an option lacks its value.
    """
    first: list[str] = []
    rest: list[str] = []
    queue = collections.deque(words)
    while queue:
        word = queue.popleft()
        if word == "--":
            rest += [word, *queue]
            break
        name, equals, value = word.partition("=")
        name = _GO_OPTIONS.get(name, name)
        if name.startswith("--"):
            name = name.replace("_", "-")
        follow = _GLOBAL_OPTIONS.get(name)
        if follow is None:
            rest.append(name + equals + value if word.startswith("-") else word)
        elif not follow:
            first.append(name)  # "-v=1" too
        elif equals or queue:
            first.append(f"{name}={value if equals else queue.popleft()}")
        else:
            raise ValueError(f"expected a value after {word}")
    return first, rest


def _plain_serve(words: Sequence[str]) -> Any:
    """Parse what starts the server, without argparse, which would take as long as the start.

    The value is None for anything else, mistakes too.
    """
    try:
        first, rest = _in_our_spelling(words)
    except ValueError:
        return None
    options = dict(word.partition("=")[::2] for word in first)
    if rest not in ([], ["serve"]) or "--version" in options:
        return None
    return types.SimpleNamespace(
        verb="serve" if rest else None,
        config_dir=options.get("--config-dir", _CONFIG_DIR),
        config_overrides=options.get("--config-overrides", ""),
    )


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse arguments. Raises SystemExit with status 2 after a word on what is wrong."""
    parser, subs = _argument_parser()
    try:
        first, rest = _in_our_spelling(words)
    except ValueError as error:
        parser.error(str(error))
    position = next((at for at, word in enumerate(rest) if not word.startswith("-")), None)
    if position is not None:
        command, options = rest[position], rest[:position]
        if command not in (*_VERBS, "help"):
            if options:
                _unknown(parser, "option", options[0].partition("=")[0], _GLOBAL_OPTIONS)
            _unknown(parser, "command", command, _VERBS)
        rest = [command, *options, *rest[position + 1 :]]
    arguments, unknown = parser.parse_known_args(first + rest)
    if unknown:
        subs.get(arguments.verb, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.verb == "help":
        if arguments.command not in (None, *subs):
            _unknown(parser, "command", arguments.command, _VERBS)
        subs.get(arguments.command, parser).print_help()
        sys.exit(0)
    if arguments.version:
        arguments.verb = "version"
    return arguments


def _unknown(
    parser: argparse.ArgumentParser, what: str, word: str, known: Iterable[str]
) -> NoReturn:
    hint = did_you_mean(word, known) or "; see --help"
    parser.error(f"there is no {what} {printable(word, 40)!r}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _plain_serve(words) or _parse(words)
    config_dir = arguments.config_dir
    if arguments.verb is None:
        if not os.path.exists(os.path.join(config_dir, "chasquid.conf")):
            program = sys.argv[0] if sys.argv[0].endswith((".py", ".pyz")) else ""
            begin = f"python3 {program}" if program else "chasquid"
            print(_BEGIN.format(version=__version__, program=begin, config_dir=config_dir), end="")
            return 0
        arguments.verb = "serve"
    try:
        return _VERBS[arguments.verb].action(arguments)
    except ChasquidError as error:
        print(f"chasquid: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has seen enough
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
