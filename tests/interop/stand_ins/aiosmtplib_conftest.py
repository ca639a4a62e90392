# SPDX-License-Identifier: Apache-2.0
"""Fixtures for aiosmtplib's own tests, in front of theirs: the servers are CaptureServers.

It takes the place of their conftest.py, which is called theirs.py meanwhile. Their tests put
functions in the place of commands of aiosmtpd; these are run too, and what they say and do to
the connection becomes what the server answers.
"""

from __future__ import annotations

import asyncio
import email
import email.message
import re
import sys
import types
from types import SimpleNamespace

import pytest

import chasquid

COMMANDS = "HELO EHLO STARTTLS AUTH MAIL RCPT DATA RSET NOOP VRFY EXPN HELP QUIT".split()


class Controller:
    """As aiosmtpd.controller has it."""

    def __init__(self, handler, hostname, port):
        self.handler, self.hostname, self.port = handler, hostname, port
        self.server = chasquid.CaptureServer(hostname, port, magic=False)
        attend(self.server, handler)

    def start(self):
        self.server.start()

    def stop(self):
        self.server.stop()


class Message:
    """As aiosmtpd.handlers has it: a handler that parses what has come."""

    def __init__(self, message_class):
        self.message_class = message_class

    async def handle_DATA(self, server, session, envelope):
        message = email.message_from_bytes(envelope.content, self.message_class)
        message["X-MailFrom"] = envelope.mail_from
        message["X-RcptTo"] = ", ".join(envelope.rcpt_tos)
        self.handle_message(message)


SMTP = type("SMTP", (), {"_handle_client": None, **{f"smtp_{name}": None for name in COMMANDS}})

for name, content in {
    "aiosmtpd": {},
    "aiosmtpd.controller": {"Controller": Controller},
    "aiosmtpd.handlers": {"Message": Message},
    "aiosmtpd.smtp": dict.fromkeys(["MISSING", "Envelope", "Session", "_Missing"]) | {"SMTP": SMTP},
}.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

from .smtpd import TestSMTPD  # noqa: E402
from .theirs import *  # noqa: E402, F403


class Said:
    """What a function says and does that stands in for a command of aiosmtpd."""

    def __init__(self):
        self.session, self.event_handler = SimpleNamespace(), None
        self.transport = self._writer = self._reader = self.loop = self
        self._handler_coroutine = None
        self.octets = b""
        self.closed = self.has_read = False

    async def push(self, status):
        self.octets += str(status).replace("\n", "\r\n").encode() + b"\r\n"

    def write(self, data):
        self.octets += data

    async def drain(self):
        pass

    async def readline(self):
        self.has_read = True

    def close(self):
        self.closed = True

    write_eof = close

    def call_later(self, seconds, call):
        call()  # a little early

    def reply(self):
        """Return the reply as chasquid takes it, None if it is none, or not all."""
        lines = self.octets.decode("latin-1").split("\r\n")[:-1]
        if self.closed or not lines or not all(re.match("[2-5][0-9]{2}[ -]", x) for x in lines):
            return None
        if lines[-1][3] != " " or not self.octets.isascii():
            return None
        return "\n".join([lines[0].replace("-", " ", 1), *(line[4:] for line in lines[1:])])


def run(function, *arguments):
    said = Said()
    try:
        asyncio.run(function(said, *arguments))
    except TypeError as error:  # as aiosmtpd answers for a handler that breaks
        said.octets = f"500 Error: (TypeError) {error}\r\n".encode()
    return said


def inject(server, stage, said):
    """Have happen what was said and done at a stage."""
    raw = said.octets.decode("utf-8", "surrogateescape")
    rule = {"drop_after": 1} if said.has_read else {"raw": raw, "drop": said.closed}
    server.fault(stage, **{"times": 1, **rule})


def attend(server, handler, without=()):
    """Have the handler see commands and messages, and functions answer that stand in for them.

    EHLO does not offer the extensions `without`.
    """

    @server.on_command
    def command(verb, argument):
        handler.record_command(verb, *parsed(verb, argument))
        function = getattr(TestSMTPD, f"smtp_{verb}", None)
        if function is None or function.__qualname__.startswith("TestSMTPD."):
            if verb == "EHLO" and without:
                server.fault(verb, without=without, times=1)
            return None
        said = run(function, argument)
        if said.reply() is None:
            inject(server, verb, said)
        return said.reply()

    @server.on_message
    def message(captured):
        content = captured.raw.replace(b"\r\n", b"\n") if captured.raw.isascii() else captured.raw
        envelope = SimpleNamespace(
            content=content, mail_from=captured.mail_from, rcpt_tos=captured.rcpt_tos
        )
        return run(handler.handle_DATA, None, envelope).reply()


def parsed(verb, argument):
    """Return the arguments with which aiosmtpd calls a handler."""
    if verb not in ("MAIL", "RCPT"):
        return (argument,)
    path, *options = argument.partition(":")[2].split()
    return path.strip("<>"), [option.upper() for option in options]


@pytest.fixture
def make_server(request, bind_address, smtpd_factory, smtpd_handler, server_tls_context,
                auth_username, auth_password):  # fmt: skip
    """Make a server; their smtpd_factory has put functions in their places, and makes nothing."""
    marker = request.node.get_closest_marker("smtpd_options")
    options = {} if marker is None else marker.kwargs
    with_tls = options.get("starttls", True) or options.get("tls", False)
    settings = {"tls": "off"}
    if with_tls:
        way = "implicit" if options.get("tls") else "starttls"
        settings = {"tls": way, "tls_context": server_tls_context}
    without = [] if options.get("smtputf8") else ["SMTPUTF8"]
    without += ["8BITMIME"] if options.get("7bit") else []
    servers = []

    def make(**more):
        server = chasquid.CaptureServer(
            bind_address, magic=False, users={auth_username: auth_password}, lenient=True,
            **settings, **more,
        )  # fmt: skip
        if TestSMTPD._handle_client is not None:
            inject(server, "connect", run(TestSMTPD._handle_client))
        attend(server, smtpd_handler, without)
        servers.append(server.start())
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def smtpd_server(make_server):
    return make_server()


@pytest.fixture
def smtpd_server_port(smtpd_server):
    return smtpd_server.port


@pytest.fixture
def smtpd_server_socket_path(make_server, socket_path):
    return make_server(path=str(socket_path))
