# SPDX-License-Identifier: Apache-2.0
"""What the tests with other software stand on; it knows none of that software."""

from __future__ import annotations

import email.parser
import email.policy
import os
import random
import shutil
import socket
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from support import SECONDS, wait_for

LOOPBACK = "127.0.0.1"
ANA, BOB, DORA = "ana@here.example", "bob@here.example", "dora@dest.example"


def unavailable(why: str) -> NoReturn:
    """Skip the test that runs; fail it where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{why}, and in CI nothing may be missing", pytrace=False)
    pytest.skip(why)


def program(name: str, *places: str | Path) -> str:
    """Return the path of a program, from `places` or else from PATH; see unavailable()."""
    search = os.pathsep.join([*map(str, places), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=search)
    return found or unavailable(f"{name} is not installed")


def need_root() -> None:
    if os.geteuid() != 0:
        unavailable("this needs root")


def need_disks() -> None:
    """Ask for what `disks` needs."""
    need_root()
    for name in ("mkfs.ext4", "mount", "umount"):
        program(name)
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(path, os.R_OK | os.W_OK):
            unavailable(f"{path} is missing, or not ours to use")


# Below the range from which the system takes the ports of outgoing connections.
_PORTS = range(20000, 32000)
_given: set[int] = set()


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free for UDP and TCP; never the same twice."""
    for port in random.sample(_PORTS, 200):
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    raise AssertionError("no port is free")


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                return False
    return True


def accepts(port: int) -> bool:
    """Tell if something listens on a port of 127.0.0.1."""
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


class Certificate(NamedTuple):
    """Two PEM files; the certificate is self-signed, so it is its own authority."""

    fullchain: Path
    privkey: Path


def make_certificate(directory: Path, *names: str) -> Certificate:
    """Make a certificate for `names` with the openssl program."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Certificate(directory / "fullchain.pem", directory / "privkey.pem")
    run(
        *[program("openssl"), "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"],
        *["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", f"/CN={names[0]}"],
        *["-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)],
        *["-keyout", str(made.privkey), "-out", str(made.fullchain)],
    )
    return made


def run(
    *command: str, input: str | None = None, check: bool = True, seconds: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; unless `check` is off it must succeed."""
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=seconds)
    if check and done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done


def make_environment(directory: Path, *packages: str) -> Path:
    """Make a virtual environment with packages from pip's index; return its Python."""
    run(sys.executable, "-m", "venv", str(directory), seconds=120)
    python = directory / "bin/python"
    if packages:
        done = run(str(python), "-m", "pip", "install", "-q", *packages, check=False, seconds=300)
        if done.returncode:
            unavailable(f"pip cannot install {', '.join(packages)}: {done.stderr[-500:]}")
    return python


def letter(subject: str, sender: str, *recipients: str, body: str = "Hello.\n") -> EmailMessage:
    """Return a small message that is easily told from the others by its subject."""
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    message["Subject"] = subject
    message["Date"] = "Thu, 01 Oct 2026 12:00:00 +0000"
    message["Message-ID"] = f"<{abs(hash(subject))}@test.invalid>"
    message.set_content(body)
    return message


def read_maildir(directory: Path) -> list[EmailMessage]:
    """Return the messages in new and cur, the oldest first."""
    paths = [path for part in ("new", "cur") for path in (directory / part).glob("*")]
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    parse = email.parser.BytesParser(policy=email.policy.default).parsebytes
    return [parse(path.read_bytes()) for path in paths]


def wait_for_letters(
    directory: Path, count: int = 1, seconds: float = SECONDS
) -> list[EmailMessage]:
    """Return the messages of a Maildir as soon as there are at least `count`."""
    what = f"{count} message(s) in {directory}"
    wait_for(lambda: len(read_maildir(directory)) >= count, what, seconds)
    return read_maildir(directory)


def subjects(messages: list[EmailMessage]) -> list[str]:
    return sorted(message["Subject"] for message in messages)
