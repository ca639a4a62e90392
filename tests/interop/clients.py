# SPDX-License-Identifier: Apache-2.0
"""The programs that send: swaks, msmtp and Postfix's smtp-source."""

from __future__ import annotations

import re
from email.message import EmailMessage
from pathlib import Path
from typing import NamedTuple

from .tools import LOOPBACK, program, run


class Transcript(NamedTuple):
    """A session as swaks saw it: its exit status, and the dialogue without the letter."""

    status: int
    text: str

    @property
    def commands(self) -> list[str]:
        return re.findall(r"^ (?:->|~>) (.*)$", self.text, re.MULTILINE)

    @property
    def replies(self) -> list[str]:
        """All lines of all replies, also those inside TLS."""
        return re.findall(r"^<(?:-|~|\*\*|~\*) +(.*)$", self.text, re.MULTILINE)

    @property
    def refusals(self) -> list[str]:
        """The replies that swaks had not hoped for."""
        return re.findall(r"^<(?:\*\*|~\*) +(.*)$", self.text, re.MULTILINE)


def swaks(port: int, *options: str) -> Transcript:
    """Run swaks against a port of 127.0.0.1."""
    done = run(
        *[program("swaks"), "--server", LOOPBACK, "--port", str(port)],
        *["--helo", "client.example", "--timeout", "20", "--suppress-data", *options],
        check=False,
    )
    return Transcript(done.returncode, done.stdout + done.stderr)


class Msmtp:
    """msmtp with a configuration of its own, for one server and one user.

    `tls` is "starttls" or "on-connect"; the server must show the certificate `trust`. The
    envelope's sender is the user, unless `sender` says otherwise.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int,
        user: str,
        password: str,
        tls: str,
        trust: Path,
        sender: str = "",
    ) -> None:
        directory.mkdir(parents=True)
        self._program = program("msmtp")
        self._config = directory / "msmtprc"
        self._log = directory / "log"
        settings = {
            "host": "localhost",
            "port": port,
            "tls": "on",
            "tls_starttls": "on" if tls == "starttls" else "off",
            "tls_trust_file": trust,
            "auth": "on",
            "user": user,
            "password": password,
            "from": sender or user,
            "logfile": self._log,
            "timeout": 20,
        }
        lines = [f"{key} {value}\n" for key, value in settings.items()]
        self._config.write_text("account default\n" + "".join(lines))
        self._config.chmod(0o600)

    def send(self, recipients: list[str], message: EmailMessage) -> None:
        """Send a message, which must succeed."""
        done = self.try_to_send(recipients, message)
        assert done.status == 0, done.text

    def try_to_send(self, recipients: list[str], message: EmailMessage) -> Transcript:
        done = run(
            *[self._program, f"--file={self._config}", "--debug", "--", *recipients],
            input=message.as_bytes().decode().replace("\r\n", "\n"),
            check=False,
        )
        return Transcript(done.returncode, done.stdout + done.stderr)

    def server_info(self) -> str:
        """Return what msmtp says of the server, its certificate and its extensions."""
        return run(self._program, f"--file={self._config}", "--serverinfo").stdout


def smtp_source(
    port: int,
    *,
    sender: str,
    recipient: str,
    messages: int,
    sessions: int,
    octets: int = 2000,
    recipients_each: int = 1,
    options: tuple[str, ...] = (),
    seconds: float = 60.0,
) -> None:
    """Send many messages at once, in parallel `sessions`; all must be accepted.

    With more than one recipient each, smtp-source puts numbers in front of the address.
    """
    run(
        *[program("smtp-source"), "-4", "-s", str(sessions), "-m", str(messages)],
        *["-l", str(octets), "-r", str(recipients_each), "-f", sender, "-t", recipient],
        *[*options, f"{LOOPBACK}:{port}"],
        seconds=seconds,
    )
