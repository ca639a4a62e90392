# SPDX-License-Identifier: Apache-2.0
"""chasquid itself, as a process of its own that can be stopped, killed and restarted."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import smtplib
import ssl
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.message import EmailMessage
from pathlib import Path

import support

from .peers import NameServer, Peer
from .tools import LOOPBACK, free_port, make_certificate, read_maildir, run, wait_for_letters

# The program under test: the module, or an archive built from it.
PROGRAM = os.environ.get("CHASQUID", support.PROGRAM[1])

USERS = {"ana@here.example": "secret", "bob@here.example": "hidden"}

# What the DNS knows: dest.example receives at mx.dest.example, which is this machine.
WORLD = {
    "dest.example": {"MX": ["10 mx.dest.example."]},
    "mx.dest.example": {"A": ["127.0.0.1"]},
}

Setting = str | int | Sequence[str]


def write_users(config_dir: Path, users: Mapping[str, str]) -> None:
    """Write the users of all domains, by address and with their passwords."""
    for domain in {address.partition("@")[2] for address in users}:
        directory = config_dir / "domains" / domain
        directory.mkdir(parents=True, exist_ok=True)
        theirs = {
            address.partition("@")[0]: password
            for address, password in users.items()
            if address.partition("@")[2] == domain
        }
        (directory / "users").write_bytes(support.users_file(theirs))
        (directory / "users").chmod(0o600)


class Chasquid(Peer):
    """A server for the domains of `users`, with ports, certificate and data of its own.

    `users` are addresses with their passwords; `aliases` gives for a domain what its
    aliases file says. Further keywords are keys of chasquid.conf.
    """

    hostname = "mail.here.example"

    def __init__(
        self,
        directory: Path,
        names: NameServer,
        *,
        users: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
        **settings: Setting,
    ) -> None:
        super().__init__(directory)
        self.smtp_port, self.submission_port, self.tls_port = free_port(), free_port(), free_port()
        self.config_dir = directory / "config"
        self.data_dir = Path(str(settings.get("data_dir", directory / "data")))
        self.users = {"ana@here.example": "secret"} if users is None else dict(users)
        self.certificate = make_certificate(
            self.config_dir / "certs" / self.hostname, self.hostname, "localhost"
        ).fullchain
        self.settings: dict[str, Setting] = {
            "hostname": self.hostname,
            "smtp_address": f"{LOOPBACK}:{self.smtp_port}",
            "submission_address": f"{LOOPBACK}:{self.submission_port}",
            "submission_over_tls_address": f"{LOOPBACK}:{self.tls_port}",
            "data_dir": str(self.data_dir),
            "mail_log_path": str(directory / "mail.log"),
            "dns_server": names.address,
            **settings,
        }
        self.write_settings()
        write_users(self.config_dir, self.users)
        for domain, text in (aliases or {}).items():
            (self.config_dir / "domains" / domain).mkdir(parents=True, exist_ok=True)
            (self.config_dir / "domains" / domain / "aliases").write_text(text)

    def write_settings(self) -> None:
        """Write chasquid.conf."""
        lines = []
        for key, setting in self.settings.items():
            several = isinstance(setting, Sequence) and not isinstance(setting, str)
            for value in setting if several else [setting]:
                lines.append(f"{key}: {value if isinstance(value, int) else _quoted(value)}\n")
        self.config_dir.mkdir(parents=True, exist_ok=True)
        (self.config_dir / "chasquid.conf").write_text("".join(lines))

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.smtp_port, self.submission_port, self.tls_port

    @property
    def serve_command(self) -> list[str]:
        return [sys.executable, PROGRAM, "--config-dir", str(self.config_dir), "serve"]

    def start(self) -> None:
        self._run(self.serve_command, *self.ports)

    def kill(self) -> None:
        """End the process at once, as a power cut would."""
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        process.wait()

    def terminate(self) -> None:
        """Ask the process to end, and return at once."""
        os.kill(self.pid, signal.SIGTERM)

    def wait_for_end(self, seconds: float = support.SECONDS) -> int:
        """Return the exit status."""
        assert self._process is not None
        return self._process.wait(seconds)

    def hang_up(self) -> None:
        """Have the configuration read again."""
        os.kill(self.pid, signal.SIGHUP)

    def restart(self) -> None:
        self.stop()
        self.start()

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run another command of chasquid on the same configuration."""
        prefix = [sys.executable, PROGRAM, "--config-dir", str(self.config_dir)]
        return run(*prefix, *words, check=check)

    def maildir(self, address: str) -> Path:
        user, _, domain = address.partition("@")
        return self.data_dir / "mail" / domain / user

    def letters(self, address: str) -> list[EmailMessage]:
        return read_maildir(self.maildir(address))

    def wait_for_letters(
        self, address: str, count: int = 1, seconds: float = support.SECONDS
    ) -> list[EmailMessage]:
        return wait_for_letters(self.maildir(address), count, seconds)

    def queue_ids(self) -> list[str]:
        """Return the ids of the messages that the queue command lists."""
        lines = self.command("queue", "list").stdout.splitlines()
        files = [path for part in ("new", "cur") for path in self._queue_files(part)]
        ids = [path.name.partition(",")[0] for path in files]
        return [ident for ident in ids if any(ident in line for line in lines)]

    def _queue_files(self, part: str) -> list[Path]:
        return sorted((self.data_dir / "queue" / part).glob("*"))

    def tls_context(self) -> ssl.SSLContext:
        """Return a context that trusts this server's certificate and no other."""
        return ssl.create_default_context(cafile=str(self.certificate))

    @contextlib.contextmanager
    def smtp(self) -> Iterator[smtplib.SMTP]:
        """Connect as another server would."""
        with smtplib.SMTP(LOOPBACK, self.smtp_port, "client.example", timeout=60) as client:
            yield client

    @contextlib.contextmanager
    def submission(self, address: str = "ana@here.example") -> Iterator[smtplib.SMTP]:
        """Connect and log in as a user would."""
        with smtplib.SMTP("localhost", self.submission_port, "desk.example", timeout=60) as client:
            client.starttls(context=self.tls_context())
            client.ehlo()
            # smtplib's own login knows only ASCII
            secret = f"\0{address}\0{self.users[address]}".encode()
            code, text = client.docmd("AUTH PLAIN", base64.b64encode(secret).decode())
            assert code == 235, text
            yield client

    def submit(
        self, sender: str, recipients: Iterable[str], message: EmailMessage, **options: object
    ) -> None:
        """Send a message as one of the users; every recipient must be accepted."""
        with self.submission(sender) as client:
            refused = client.send_message(message, sender, list(recipients), **options)
            assert not refused


class There(Chasquid):
    hostname = "mail.there.example"


class Behind(Chasquid):
    """chasquid that expects the PROXY header; `flags` are settings that are true."""

    flags: tuple[str, ...] = ("haproxy_incoming",)

    def write_settings(self) -> None:
        super().write_settings()
        with (self.config_dir / "chasquid.conf").open("a") as file:
            file.write("".join(f"{flag}: true\n" for flag in self.flags))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
