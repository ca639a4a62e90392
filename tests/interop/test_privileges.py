# SPDX-License-Identifier: Apache-2.0
"""Started by root, the server becomes its user for good, and works on."""

from __future__ import annotations

import base64
import os
import pwd
import shutil
from pathlib import Path

import pytest
from support import wait_for

from .clients import swaks
from .server import USERS, Chasquid
from .tools import make_certificate, need_root

ACCOUNT = pwd.getpwnam("daemon")  # every system has it
LETTER = ("--from", "ana@here.example", "--to", "bob@here.example")
LOGIN = ("--tls", "--auth", "PLAIN", "--auth-user", "ana@here.example")
SECRET = ("--auth-password", "secret")


@pytest.fixture
def server(start, names):
    """A server that root starts; who has a mailbox may be read by its user, the key may not."""
    need_root()

    class ByRoot(Chasquid):
        def start(self) -> None:
            for path in (self.directory, *(self.config_dir / "domains").rglob("*")):
                os.chown(path, ACCOUNT.pw_uid, ACCOUNT.pw_gid)
            self.directory.chmod(0o755)
            self.data_dir.mkdir(mode=0o700, exist_ok=True)
            super().start()
            self.wait_for_log("event=ready")  # the ports are open before

    return start(ByRoot, names, users=USERS, user=ACCOUNT.pw_name)


def test_no_thread_is_root_and_no_privilege_is_left(server):
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        assert lines["Uid"].split() == [str(ACCOUNT.pw_uid)] * 4
        assert lines["Gid"].split() == [str(ACCOUNT.pw_gid)] * 4
        assert "0" not in lines["Groups"].split()
        for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
            assert int(lines[kind], 16) == 0, kind
    assert f"now the user {ACCOUNT.pw_name} for good" in server.log()


def test_it_takes_mail_with_the_key_that_only_root_may_read(server):
    key = server.config_dir / "certs" / server.hostname / "privkey.pem"
    key.chmod(0o600)
    server.restart()
    session = swaks(server.submission_port, *LOGIN, *SECRET, *LETTER)
    assert session.status == 0, session.text
    server.wait_for_letters("bob@here.example")
    assert server.maildir("bob@here.example").stat().st_uid == ACCOUNT.pw_uid
    server.wait_for_log(f"{key}: it cannot be read: Permission denied; what was in force")


def test_a_reload_keeps_a_key_that_it_may_no_longer_read_and_takes_one_that_it_may(server):
    certs = server.config_dir / "certs" / server.hostname
    certs.joinpath("privkey.pem").chmod(0o600)
    server.restart()
    server.hang_up()
    server.wait_for_log("event=reloaded problems=1")
    session = swaks(server.submission_port, *LOGIN, *SECRET, *LETTER)
    assert session.status == 0, session.text
    shutil.rmtree(certs)
    made = make_certificate(certs, server.hostname)
    os.chown(made.privkey, 0, ACCOUNT.pw_gid)
    made.privkey.chmod(0o640)
    server.hang_up()
    server.wait_for_log("event=reloaded problems=0")


def test_a_data_dir_of_root_is_refused_with_what_mends_it(server):
    server.stop()
    (server.data_dir / "left").touch()
    os.chown(server.data_dir, 0, 0)
    ended = server.command("serve", check=False)
    assert ended.returncode == 1
    assert f"chown -R {ACCOUNT.pw_name}: {server.data_dir}" in ended.stderr


def test_a_log_is_not_opened_as_root(server):
    """Or a link that the user has left there would have root write anywhere."""
    server.stop()
    target = server.directory.parent / "only-for-root"
    target.touch(mode=0o600)
    log = server.directory / "mail.log"
    log.unlink(missing_ok=True)
    log.symlink_to(target)
    assert server.command("serve", check=False).returncode == 1
    assert target.read_bytes() == b""


def test_no_password_is_in_a_log_or_the_list_of_processes(server):
    words = ("--auth-password", "a-wrong-password")
    assert swaks(server.submission_port, *LOGIN, *words, *LETTER).status != 0
    assert swaks(server.submission_port, *LOGIN, *SECRET, *LETTER).status == 0
    log = wait_for(lambda: "event=login " in server.log() and server.log(), "the login")
    for password in (b"a-wrong-password", b"secret"):
        assert password.decode() not in log
        assert base64.b64encode(b"\0ana@here.example\0" + password).decode() not in log
    assert b"secret" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    limits = Path(f"/proc/{server.pid}/limits").read_text()
    assert "Max core file size        0                    0" in limits
