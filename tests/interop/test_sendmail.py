# SPDX-License-Identifier: Apache-2.0
"""Programs of Debian hand their mail to us, as they do to any sendmail."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import chasquid as module

from .server import PROGRAM, Chasquid
from .tools import ANA, need_root, program, run

TOP = Path(__file__).resolve().parent.parent.parent


def mailer(server: Chasquid, command: str = f"{sys.executable} {PROGRAM}") -> str:
    """Return a program that is our sendmail, with the configuration of this server."""
    path = server.directory / "sendmail"
    path.write_text(f'#!/bin/sh\nexec {command} -C={server.config_dir} sendmail "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="session")
def archive() -> Iterator[Path]:
    """An archive that any user can read."""
    with tempfile.TemporaryDirectory(prefix="chasquid-") as name:
        Path(name).chmod(0o755)
        target = Path(name, "chasquid.pyz")
        python = program("python3", "/usr/bin")
        build = [sys.executable, str(TOP / "build_zipapp.py"), "--pythons", python]
        run(*build, "--output", str(target), seconds=300)
        yield target


@pytest.fixture
def public_mailer(server: Chasquid, archive: Path) -> str:
    """Our sendmail, as a program that any user can run."""
    return mailer(server, f"{program('python3', '/usr/bin')} {archive}")


def pipe(text: str, *command: str, user: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command, perhaps as another user, with `text` on its standard input."""
    words = list(command)
    if user:
        need_root()
        entry = pwd.getpwnam(user)
        words = [
            program("setpriv"), f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}",
            "--clear-groups", *words,
        ]  # fmt: skip
    return run(*words, input=text, check=False)


@pytest.fixture
def server(chasquid: Chasquid) -> Chasquid:
    (chasquid.config_dir / "domains/here.example/aliases").write_text("root: ana\n")
    chasquid.command("check-userdb")
    chasquid.hang_up()
    chasquid.wait_for_log("event=reloaded")
    return chasquid


# As these programs of Debian call it; %s is our sendmail.
CALLS = {
    "cron": (
        "From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@here> date\n"
        "MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nX-Cron-Env: <SHELL=/bin/sh>"
        "\n\nFri\n",
        "%s -i -FCronDaemon -B8BITMIME -oem root",
    ),
    "php": ("To: ana@here.example\nSubject: a form\n\nhello\n", "%s -t -i"),
    "php as WordPress": ("To: Ana <ana@here.example>\nSubject: x\n\nx\n", "%s -t -i -fw@x.de"),
    "unattended-upgrades": ("To: root\nSubject: x\nFrom: root\n\nhi\n", "%s -oi -t"),
    "smartd, mdadm": ("From: mdadm\nTo: root\nSubject: x\n\nhi\n", "%s -t"),
    "at": ("Subject: Output from your job        1\nTo: root\n\nhi\n", "%s -i root"),
    "logwatch": ("To: root\nFrom: root\nSubject: x\n\nhi\n", "%s -t"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_program_that_calls_sendmail(server: Chasquid, name: str) -> None:
    text, line = CALLS[name]
    done = pipe(text, *(line % mailer(server)).split())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [message] = server.wait_for_letters(ANA)
    assert message["Date"] and message["Message-ID"]
    assert "@" in message["From"]


def test_bsd_mailx(server: Chasquid) -> None:
    rc = server.directory / "mailrc"
    rc.write_text(f"set sendmail={mailer(server)}\n")
    command = [program("bsd-mailx"), "-s", "of mailx", "-c", "bob@here.example", "root"]
    done = subprocess.run(
        command, input="hello\n", text=True, capture_output=True, timeout=60,
        env={**os.environ, "MAILRC": str(rc)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    [message] = server.wait_for_letters(ANA)
    assert message["Subject"] == "of mailx"
    server.wait_for_letters("bob@here.example")


def test_s_nail(server: Chasquid) -> None:
    command = [program("s-nail"), "-n", "-Smta=" + mailer(server), "-s", "of s-nail"]
    done = pipe("hello\n", *command, "-r", "bob@here.example", ANA)
    assert (done.returncode, done.stderr) == (0, "")
    [message] = server.wait_for_letters(ANA)
    assert message["Subject"] == "of s-nail" and message["Return-Path"] == "<bob@here.example>"


def test_git_send_email(server: Chasquid) -> None:
    git = program("git")
    if not Path(run(git, "--exec-path").stdout.strip(), "git-send-email").exists():
        program("git-send-email")
    repository = server.directory / "repository"
    options = ["-C", str(repository), "-c", "user.name=Bob", "-c", "user.email=bob@here.example"]
    run(git, "init", "-q", str(repository))
    run(git, *options, "commit", "-q", "--allow-empty", "-m", "one")
    (repository / "file").write_text(".\n.\n")
    run(git, *options, "add", "file")
    run(git, *options, "commit", "-q", "-m", "two")
    sending = ["send-email", "-1", "--quiet", "--confirm=never", f"--smtp-server={mailer(server)}"]
    run(git, *options, *sending, "--to", ANA, "--cc", "dora@here.example", check=False)
    assert server.letters(ANA) == []  # one recipient is unknown, so nobody has got it
    run(git, *options, *sending, "--to", ANA, "--cc", "bob@here.example")
    [message] = server.wait_for_letters(ANA)
    assert message["Subject"] == "[PATCH] two"
    assert "+.\n+.\n" in message.get_content()


def test_users_of_the_host_send_to_our_domains_only(server: Chasquid, public_mailer: str) -> None:
    text = "Subject: hello\n\nhello\n"
    done = pipe(text, public_mailer, ANA, user="nobody")
    assert (done.returncode, done.stderr) == (0, "")
    [message] = server.wait_for_letters(ANA)
    assert message["Return-Path"] == "<nobody@here.example>"
    done = pipe(text, public_mailer, "dora@dest.example", user="nobody")
    assert done.returncode == os.EX_NOPERM
    assert "dora@dest.example: Relaying denied: programs of nobody: log in" in done.stderr


def test_without_a_server_only_its_user_reaches_the_queue(
    server: Chasquid, public_mailer: str
) -> None:
    server.stop()
    text = "Subject: hello\n\nhello\n"
    done = pipe(text, public_mailer, ANA, user="nobody")
    assert done.returncode == os.EX_TEMPFAIL and "no server is running" in done.stderr
    assert pipe(text, public_mailer, ANA).returncode == 0
    server.start()
    server.wait_for_letters(ANA)


def test_what_root_puts_into_the_queue_belongs_to_the_user_of_the_server(
    server: Chasquid, public_mailer: str
) -> None:
    need_root()
    server.stop()
    run("chown", "-R", "nobody:", str(server.directory))
    assert pipe("Subject: x\n\nx\n", public_mailer, ANA, "dora@dest.example").returncode == 0
    [queued] = (server.data_dir / "queue/new").iterdir()
    assert queued.owner() == "nobody"


def test_several_programs_at_a_time_without_a_server(server: Chasquid) -> None:
    server.stop()
    command = [mailer(server), "-i", ANA]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)
    ]
    assert [process.communicate(b"\nhello\n", 60)[1] for process in running] == [b""] * 4
    assert [process.returncode for process in running] == [0] * 4
    server.start()
    server.wait_for_letters(ANA, 4)


SQUATTER = """
import os, socket, sys
raw = socket.socket(socket.AF_UNIX)
raw.bind(bytes.fromhex(sys.argv[1]))
raw.listen()
print("listens", flush=True)
connected, _ = raw.accept()
try:
    print(connected.recv(1000), flush=True)
except ConnectionResetError:
    print(b"", flush=True)
"""


def test_nobody_else_gets_mail_by_taking_the_name_of_the_socket(server: Chasquid) -> None:
    need_root()
    server.stop()
    name = module._program_address(str(server.data_dir)).encode().hex()
    other = pwd.getpwnam("nobody")
    words = [program("setpriv"), f"--reuid={other.pw_uid}", "--clear-groups", sys.executable]
    with subprocess.Popen(
        [*words, "-I", "-S", "-c", SQUATTER, name], stdout=subprocess.PIPE, text=True
    ) as squatter:
        assert squatter.stdout is not None and squatter.stdout.readline() == "listens\n"
        done = pipe("Subject: secret\n\nx\n", mailer(server), ANA)
        assert done.returncode == os.EX_TEMPFAIL
        assert "another user has taken the place of the server" in done.stderr
        assert squatter.stdout.readline() == "b''\n"
    server.start()  # and without it the server would do its work all the same


def test_a_server_whose_socket_is_taken_does_all_else(server: Chasquid) -> None:
    server.stop()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(module._program_address(str(server.data_dir)))
        taken.listen()
        server.start()
        server.wait_for_log("programs of this host cannot send mail")
        with server.smtp() as client:
            assert client.ehlo()[0] == 250


def test_a_large_message(server: Chasquid) -> None:
    line = "x" * 99 + "\n"
    assert pipe("Subject: large\n\n" + line * 100_000, mailer(server), ANA).returncode == 0
    [message] = server.wait_for_letters(ANA)
    assert len(message.get_content()) == 10_000_000


def test_the_link_to_an_archive(server: Chasquid, archive: Path) -> None:
    need_root()
    link = server.directory / "bin" / "sendmail"
    link.parent.mkdir()
    link.symlink_to(archive)
    script = (
        "mkdir -p $1/etc && mount -t tmpfs tmpfs $1/etc && cp -a /etc/passwd /etc/group"
        " /etc/nsswitch.conf $1/etc && mount --bind $1/etc /etc && mkdir /etc/chasquid &&"
        " mount --bind $2 /etc/chasquid && PATH=$3:$PATH && exec $1/bin/sendmail root"
    )
    done = pipe(
        "Subject: by a link\n\nx\n", program("unshare"), "-m", "sh", "-c", script, "sh",
        str(server.directory), str(server.config_dir), os.path.dirname(sys.executable),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    server.wait_for_letters(ANA)
