# SPDX-License-Identifier: Apache-2.0
"""An upgrade under systemd, also to versions that do not run; a backup of a busy server."""

from __future__ import annotations

import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import wait_for

from .machine import Machine
from .peers import NameServer
from .server import PROGRAM, WORLD, Chasquid
from .tools import ANA, DORA, letter, program, run, subjects

TOP = Path(__file__).resolve().parent.parent.parent

INSTALL = """
set -e
useradd --system --user-group --home-dir /var/lib/chasquid --shell /usr/sbin/nologin chasquid
install -m 755 /root/files/old.pyz /usr/local/bin/chasquid
install -d -o chasquid -g chasquid /etc/chasquid /etc/chasquid/domains
printf 'hostname: "mail.example.com"\\n' > /etc/chasquid/chasquid.conf
runuser -u chasquid -- chasquid user-add root@example.com --password secret-1
install -m 644 /root/files/systemd/* /etc/systemd/system/
systemctl daemon-reload
systemctl start chasquid-smtp.socket chasquid-submission.socket \
    chasquid-submission_tls.socket chasquid.service
"""


def build(directory: Path, name: str, *changes: tuple[str, str]) -> None:
    """Build an archive of the module with some of its text replaced."""
    source = directory / f"source-{name}"
    source.mkdir()
    for file in ("chasquid.py", "build_zipapp.py", "pyproject.toml"):
        shutil.copy(TOP / file, source)
    shutil.copytree(TOP / "sample-config", source / "sample-config")
    text = (source / "chasquid.py").read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (source / "chasquid.py").write_text(text)
    command = [sys.executable, str(source / "build_zipapp.py"), "--cache", str(TOP / ".cache")]
    command += ["--pythons", program("python3", "/usr/bin")]
    run(*command, "--output", str(directory / f"{name}.pyz"), seconds=300)


VERSION = ('__version__ = "', '__version__ = "9.')
START = "def serve(arguments: argparse.Namespace) -> int:\n"
CHECK = "def _check(arguments: argparse.Namespace) -> int:\n"


@pytest.fixture
def machine(start: Callable[..., Machine], tmp_path: Path) -> Machine:
    files = tmp_path / "files"
    files.mkdir()
    shutil.copytree(TOP / "sample-config" / "systemd", files / "systemd")
    build(files, "old")
    build(files, "new", VERSION)
    build(files, "fails", VERSION, (START, START + '    raise ChasquidError("I do not start")\n'))
    build(files, "silent", VERSION, (START, START + "    return 0\n"))
    build(
        files, "refuses", VERSION, (CHECK, CHECK + '    print("a.conf:7: bad key")\n    return 1\n')
    )
    for source in files.glob("source-*"):
        shutil.rmtree(source)
    machine = start(Machine, "mail")
    machine.copy(files, "/root/files")
    machine.root(INSTALL, True)
    return machine


def test_an_upgrade_that_runs_and_others_that_do_not(machine: Machine) -> None:
    def runs() -> str:
        assert machine.root("systemctl is-active chasquid").text == "active\n"
        sent = machine.root("echo hello | chasquid sendmail -v root")
        assert sent.text.startswith("OK: queued as "), sent
        return machine.root("chasquid version | head -n 1", True).text.split()[-1]

    first = runs()
    done = machine.root("chasquid upgrade /root/files/new.pyz")
    assert done.status == 0, done.text
    assert done.text.endswith(f"the server runs as version 9.{first}\n")
    assert runs() == f"9.{first}"
    assert len(machine.root("ls /usr/local/lib/chasquid", True).text.split()) == 2
    link = machine.root("readlink /usr/local/bin/chasquid", True).text

    done = machine.root("chasquid upgrade /root/files/refuses.pyz")
    assert done.status == 1
    assert "nothing was changed" in done.text and "a.conf:7: bad key" in done.text
    for name in ("fails", "silent"):
        done = machine.root(f"chasquid upgrade /root/files/{name}.pyz")
        assert done.status == 1 and "runs again" in done.text, done.text
        assert machine.root("readlink /usr/local/bin/chasquid", True).text == link
        assert runs() == f"9.{first}"


class Moving(Chasquid):
    """A server that runs on other directories once it has `moved`."""

    moved: Sequence[str] = ()

    @property
    def serve_command(self) -> list[str]:
        return [*self.moved, "serve"] if self.moved else super().serve_command


def test_a_backup_of_a_busy_server_is_delivered_elsewhere(
    start: Callable[..., Chasquid], names: NameServer, place: Path
) -> None:
    names.records |= WORLD
    there = start(Chasquid, names, users={DORA: "secret"}, hostname="mx.dest.example")
    here = start(Moving, names, outgoing_smtp_port=there.smtp_port, max_queue_items=100_000)
    there.stop()  # so that all waits
    file, ended, accepted = place / "backup.tar", threading.Event(), []

    def submit() -> None:
        number = 0
        with here.submission(ANA) as client:
            while not ended.is_set() and number < 55:
                number += 1
                subject = f"message {number}"
                client.send_message(letter(subject, ANA, DORA, ANA), ANA, [DORA, ANA])
                accepted.append(subject)
                ended.wait(0.05)

    busy = threading.Thread(target=submit)
    busy.start()
    wait_for(lambda: len(accepted) > 15, "some messages")
    before = list(accepted)
    said = here.command("backup", str(file), "--mail").stdout
    ended.set()
    busy.join()
    assert " of mail" in said and file.stat().st_mode & 0o777 == 0o600
    here.stop()
    with tarfile.open(file) as tar:
        assert tar.getnames()[-1] == "complete"

    again = place / "again"
    override = f'data_dir: "{again}/data"'
    options = [sys.executable, PROGRAM, "-C", str(again / "config"), "--config-overrides", override]
    run(*options, "backup", "--restore", str(file))
    inbox = [path for part in ("new", "cur") for path in
             (again / "data/mail/here.example/ana" / part).glob("*")]  # fmt: skip
    assert len(inbox) >= len(before) - 2  # what was on its way into the Maildir is in the queue
    there.start()
    run(*options, "queue", "retry", "all")
    here.moved = options
    here.start()
    wait_for(lambda: set(before) <= set(subjects(there.letters(DORA))), "all messages")
