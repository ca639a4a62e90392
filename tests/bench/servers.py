# SPDX-License-Identifier: Apache-2.0
"""The servers that `compare` sets side by side, each set up for the same.

Each receives for RECIPIENT from anybody, without a login, and puts it into a Maildir; and, where
it has logins, from USER over TLS. What is not said here is as its package has it.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

import chasquid
from tests.bench.start import built
from tests.interop.peers import MAIL_USER, DovecotDirectory, MailboxPeer, NameServer, Postfix
from tests.interop.server import Chasquid
from tests.interop.tools import LOOPBACK, free_port, make_certificate, run

RECIPIENT, USER, PASSWORD = "ana@here.example", "bob@here.example", "secret"
DOMAIN = "here.example"
# OpenSMTPD asks for the names of a client, and waits where there are none
RECORDS = {"localhost": {"A": [LOOPBACK]}, "1.0.0.127.in-addr.arpa": {"PTR": ["localhost."]}}
# where .ci/install-peers unpacks what cannot be installed beside Postfix
PLACE = Path(os.environ.get("BENCH_PLACE", "/var/cache/chasquid-interop"))
MAIL_MAILDIR = PLACE / "opensmtpd/usr/libexec/opensmtpd/mail.maildir"


class Server(Protocol):
    """What all have in common; `tls_port` is 0 where nobody can log in."""

    port: int
    tls_port: int

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def maildir(self, address: str) -> Path: ...

    def sessions(self, logins: bool) -> list[int]:
        """Return the process sessions of all that works, with what looks at logins or without."""
        ...


class Ours(Chasquid):
    def __init__(self, directory: Path, names: NameServer) -> None:
        super().__init__(directory, names, users={RECIPIENT: PASSWORD, USER: PASSWORD})
        # the tests' own hashes cost nothing
        hashed = {name: chasquid.new_password(PASSWORD.encode()) for name in ("ana", "bob")}
        users = self.config_dir / "domains" / DOMAIN / "users"
        users.write_bytes(chasquid.format_users(hashed))
        self.port = self.smtp_port

    @property
    def serve_command(self) -> list[str]:
        """Run the archive, as users do: to compile the module takes memory."""
        return [sys.executable, str(archive()), "--config-dir", str(self.config_dir), "serve"]

    def sessions(self, logins: bool) -> list[int]:
        return [self.pid]


@functools.cache
def archive() -> Path:
    """An archive of this checkout, until this program ends."""
    place = tempfile.TemporaryDirectory()
    atexit.register(place.cleanup)
    return built(Path(place.name))


class Passwords(DovecotDirectory):
    """What checks passwords for Postfix, hashed as `doveadm pw` does by default."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, users={USER: PASSWORD})
        hashed = run("doveadm", "pw", "-p", PASSWORD).stdout.strip()
        users = directory / "users"
        users.write_text(users.read_text().replace(f"{{PLAIN}}{PASSWORD}", hashed))


class PostfixWithLogins(Postfix):
    def __init__(self, directory: Path, names: NameServer) -> None:
        settings = {
            "message_size_limit": 50_000_000,
            "virtual_mailbox_limit": 0,
            "smtpd_sasl_type": "dovecot",
            "smtpd_sasl_path": directory / "dovecot/auth-client",
        }
        super().__init__(directory, domain=DOMAIN, mailboxes=("ana", "bob"), settings=settings)
        self.tls_port = free_port()
        self._passwords = Passwords(directory / "dovecot")
        with (self.config / "master.cf").open("a") as file:
            file.write(_SUBMISSIONS.format(port=self.tls_port))

    def start(self) -> None:
        self._passwords.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self._passwords.stop()

    def sessions(self, logins: bool) -> list[int]:
        # Postfix starts its master by a detour
        master = int((self.directory / "queue/pid/master.pid").read_text())
        return [os.getsid(master)] + [self._passwords.pid] * logins


_SUBMISSIONS = """\
127.0.0.1:{port} inet n - n - - smtpd
  -o smtpd_tls_wrappermode=yes
  -o smtpd_sasl_auth_enable=yes
  -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
"""


class Single(MailboxPeer):
    """A server all of whose processes descend from the one that is started."""

    def __init__(self, directory: Path, names: NameServer) -> None:
        super().__init__(directory)
        self.port, self.tls_port = free_port(), free_port()
        self._make_mail_directory()

    def sessions(self, logins: bool) -> list[int]:
        return [self.pid]


class Alone(Single):
    """A server in a mount namespace, where it sees files of its own in places that are fixed.

    It asks the system's name servers, and is given one as the others have.
    """

    def __init__(self, directory: Path, names: NameServer) -> None:
        super().__init__(directory, names)
        (directory / "resolv.conf").write_text(f"nameserver {LOOPBACK}\n")
        self._seen = {Path("/etc/resolv.conf"): directory / "resolv.conf"}
        self._names = NameServer(RECORDS)
        self._names.port = 53

    def _run_alone(self, command: Iterable[object], *ports: int) -> None:
        self._names.__enter__()
        mounts = [f"mount --bind {ours} {place}" for place, ours in self._seen.items()]
        script = " && ".join([*mounts, 'exec "$@"'])
        self._run(["unshare", "--mount", "sh", "-c", script, "sh", *command], *ports)

    def stop(self) -> None:
        super().stop()
        self._names.__exit__()


class Go(Alone):
    """chasquid, the server in Go, with OpenSMTPD's program that delivers into a Maildir."""

    def __init__(self, directory: Path, names: NameServer) -> None:
        super().__init__(directory, names)
        programs = PLACE / "chasquid-go/usr/bin"
        self._config = directory / "config"
        make_certificate(self._config / "certs/mail.here.example", "mail.here.example")
        (self._config / "domains" / DOMAIN).mkdir(parents=True)
        settings = {
            "hostname": "mail.here.example",
            "smtp_address": f"{LOOPBACK}:{self.port}",
            "submission_address": f"{LOOPBACK}:{free_port()}",
            "submission_over_tls_address": f"{LOOPBACK}:{self.tls_port}",
            "mail_delivery_agent_bin": MAIL_MAILDIR,
            "mail_delivery_agent_args": f"{directory}/mail/%to_user%",
            "data_dir": directory / "data",
            "mail_log_path": directory / "mail.log",
        }
        lines = [f'{key}: "{value}"\n' for key, value in settings.items()]
        (self._config / "chasquid.conf").write_text("".join(lines))
        util = [str(programs / "chasquid-util"), f"--configdir={self._config}"]
        for address in (RECIPIENT, USER):
            run(*util, "user-add", address, f"--password={PASSWORD}")
        # it delivers as who it is, which may not be root
        user = pwd.getpwnam(MAIL_USER)
        for path in (directory, *directory.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._command = ["setpriv", *ids, programs / "chasquid", f"--config_dir={self._config}"]

    def start(self) -> None:
        self._run_alone(self._command, self.port, self.tls_port)


class OpenSmtpd(Alone):
    """OpenSMTPD, without logins: that of Debian 12 fails in TLS, by its OpenSSL 3."""

    def __init__(self, directory: Path, names: NameServer) -> None:
        super().__init__(directory, names)
        self.tls_port = 0
        self._config = directory / "smtpd.conf"
        self._config.write_text(
            _OPENSMTPD_CONF.format(
                directory=directory,
                port=self.port,
                domain=DOMAIN,
                maildir=MAIL_MAILDIR,
                user=MAIL_USER,
            )
        )
        self._config.chmod(0o600)
        for name in ("spool", "run"):
            (directory / name).mkdir()
            (directory / name).chmod(0o711)
        self._seen |= {
            Path("/var/spool/smtpd"): directory / "spool",
            Path("/run"): directory / "run",
            Path("/usr/libexec"): PLACE / "opensmtpd/usr/libexec",
        }

    def start(self) -> None:
        program = PLACE / "opensmtpd/usr/sbin/smtpd"
        self._run_alone([program, "-d", "-f", self._config], self.port)


_OPENSMTPD_CONF = """\
table names {{ "@" = "{user}" }}
smtp max-message-size "50M"
smtp limit max-mails 100000
queue ttl 1d
listen on {LOOPBACK} port {port}
action "deliver" mda "{maildir} {directory}/mail/%{{dest.user}}" virtual <names>
match from any for domain "{domain}" action "deliver"
""".replace("{LOOPBACK}", LOOPBACK)


class Aiosmtpd(Single):
    """aiosmtpd with the handler of its own that writes into a Maildir."""

    def __init__(self, directory: Path, names: NameServer) -> None:
        super().__init__(directory, names)
        self.tls_port = 0

    def start(self) -> None:
        handler = ["-c", "aiosmtpd.handlers.Mailbox", self.maildir(RECIPIENT)]
        listen = ["-n", "-l", f"{LOOPBACK}:{self.port}"]
        self._run([sys.executable, "-m", "aiosmtpd", *listen, *handler], self.port)


def installed() -> dict[str, type[Ours | PostfixWithLogins | Single]]:
    """Return those that are there, by their names; ours and Postfix must be."""
    found: dict[str, type[Ours | PostfixWithLogins | Single]] = {
        "chasquid.pyz": Ours,
        "Postfix": PostfixWithLogins,
    }
    has_maildir = MAIL_MAILDIR.exists() and shutil.which("unshare")
    if has_maildir and (PLACE / "chasquid-go/usr/bin/chasquid").exists():
        found["chasquid (Go)"] = Go
    if has_maildir:
        found["OpenSMTPD"] = OpenSmtpd
    if importlib.util.find_spec("aiosmtpd"):
        found["aiosmtpd"] = Aiosmtpd
    return found
