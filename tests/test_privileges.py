# SPDX-License-Identifier: Apache-2.0
"""Room PRIVILEGES: whom root becomes, and whether secrets lie open to everybody."""

from __future__ import annotations

import errno
import os
import pwd
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from support import HOST, write_certificate

import chasquid

ME = pwd.getpwuid(os.getuid())
ACCOUNT = chasquid.Account("mail", 1234, 5678, "/var/mail")


def config(tmp_path, **keys):
    return chasquid.Config(
        config_dir=str(tmp_path), hostname="mail.here.example", data_dir=f"{tmp_path}/data"
    )._replace(**keys)


# --- whom the server becomes ---


def test_a_user_is_found_with_ids_and_home(tmp_path):
    account = chasquid.account_of_server(config(tmp_path, user=ME.pw_name))
    assert account == (ME.pw_name, ME.pw_uid, ME.pw_gid, ME.pw_dir)


def test_if_the_key_is_empty_the_server_stays_who_it_is(tmp_path):
    assert chasquid.account_of_server(config(tmp_path, user="")) is None


@pytest.mark.parametrize("name", ["nobody-of-that-name", "a\0b"])
def test_a_user_who_is_named_must_exist(tmp_path, name):
    with pytest.raises(chasquid.ConfigError, match="expected a user of this machine, found"):
        chasquid.account_of_server(config(tmp_path, user=name))


def test_the_user_of_the_default_need_not_exist(tmp_path):
    try:
        pwd.getpwnam("chasquid")
    except KeyError:
        assert chasquid.account_of_server(config(tmp_path)) is None
    else:
        assert chasquid.account_of_server(config(tmp_path)).name == "chasquid"


class System:
    """The calls of the system that change who a process is; `fails` is one that is refused."""

    def __init__(self, fails="", saved=0):
        self.environ = {"HOME": "/root"}
        self.calls = []
        self._fails = fails
        self._saved = saved  # the uid that can be had back
        self._uid = self._gid = 0

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self._fails:
            raise OSError(errno.EPERM, "Operation not permitted")

    def initgroups(self, name, gid):
        self._call("initgroups", name, gid)

    def setgid(self, gid):
        self._call("setgid", gid)
        self._gid = gid

    def setuid(self, uid):
        self._call("setuid", uid)
        if self._uid and uid != self._saved:
            raise OSError(errno.EPERM, "Operation not permitted")
        self._uid = uid

    getuid = geteuid = lambda self: self._uid
    getgid = getegid = lambda self: self._gid


def test_groups_are_given_up_before_the_user_and_root_is_tried_again():
    system = System(saved=1234)
    chasquid.become(ACCOUNT, system)
    assert system.calls == [
        ("initgroups", "mail", 5678), ("setgid", 5678), ("setuid", 1234), ("setuid", 0),
    ]  # fmt: skip
    assert system.environ == {"HOME": "/var/mail", "USER": "mail", "LOGNAME": "mail"}


def test_if_root_can_be_had_back_the_server_does_not_start():
    with pytest.raises(chasquid.ChasquidError, match="did not become the user mail for good"):
        chasquid.become(ACCOUNT, System(saved=0))


@pytest.mark.parametrize("call", ["initgroups", "setgid", "setuid"])
def test_if_a_call_is_refused_the_server_does_not_start(call):
    with pytest.raises(chasquid.ChasquidError, match="cannot become the user mail: Operation"):
        chasquid.become(ACCOUNT, System(fails=call))


def test_a_directory_that_is_missing_is_made(tmp_path):
    path = tmp_path / "new" / "data"
    chasquid.give_directory(str(path), chasquid.Account(*ME[:1], ME.pw_uid, ME.pw_gid, "/"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert path.stat().st_uid == ME.pw_uid


def test_a_directory_that_holds_something_is_given_to_nobody(tmp_path):
    (tmp_path / "queue").mkdir()
    with pytest.raises(chasquid.ConfigError) as caught:
        chasquid.give_directory(str(tmp_path), chasquid.Account("mail", ME.pw_uid + 1, 1, "/"))
    assert f"chown -R mail: {tmp_path}, or set the key user" in str(caught.value)
    assert tmp_path.stat().st_uid == ME.pw_uid


def test_the_lock_is_not_opened_through_a_symbolic_link(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(chasquid.ConfigError, match="data_dir cannot be used"):
        chasquid.DataDirectory(str(tmp_path)).take()
    assert not (tmp_path / "elsewhere").exists()


# --- what lies open ---


@pytest.fixture
def place():
    """A configuration in a directory that everybody can enter, with nothing open in it."""
    with tempfile.TemporaryDirectory(prefix="chasquid-", dir="/tmp") as name:
        top = Path(name)
        domain = top / "domains" / "here.example"
        domain.mkdir(parents=True)
        write_certificate(top / "certs" / "mail.here.example", "mail.here.example")
        for path in ("users", "aliases", "dkim:one.pem"):
            (domain / path).write_text("")
        (top / "data").mkdir()
        (top / "hooks").mkdir()
        for path in ("chasquid.conf", "password", "hooks/post-data"):
            (top / path).write_text("")
        for path in (top, *top.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for path in SECRETS:
            (top / path).chmod(0o640)
        (top / "data").chmod(0o750)
        yield top


SECRETS = (
    "domains/here.example/users",
    "domains/here.example/dkim:one.pem",
    "certs/mail.here.example/privkey.pem",
    "password",
)
GOVERNING = (
    "chasquid.conf",
    "domains/here.example/aliases",
    "domains/here.example",
    "certs/mail.here.example/fullchain.pem",
    "hooks",
    "hooks/post-data",
)


def warnings(top):
    return list(
        chasquid.exposure_warnings(config(top, smarthost_password_file=str(top / "password")))
    )


def warnings_after(place, command):
    subprocess.run(shlex.split(command), check=True)
    return warnings(place)


def test_nothing_is_said_if_secrets_are_for_owner_and_group(place):
    assert warnings(place) == []


@pytest.mark.parametrize("name", [*SECRETS, "data"])
def test_a_secret_that_everybody_can_read_is_told_of_once_with_what_mends_it(place, name):
    path = place / name
    path.chmod(path.stat().st_mode | 0o006)
    [warning] = warnings(place)
    assert warning == f"{path} is secret, and everybody can read it: chmod o= {path}"
    assert warnings_after(place, warning.rpartition(": ")[2]) == []


@pytest.mark.parametrize("name", GOVERNING)
def test_what_governs_the_server_must_not_be_writable_for_everybody(place, name):
    path = place / name
    path.chmod(path.stat().st_mode | 0o002)
    [warning] = warnings(place)
    assert warning == f"{path} can be changed by everybody: chmod o-w {path}"
    assert warnings_after(place, warning.rpartition(": ")[2]) == []


def test_a_directory_that_nobody_else_can_enter_protects_what_is_in_it(place):
    (place / SECRETS[0]).chmod(0o644)
    (place / "domains").chmod(0o750)
    assert warnings(place) == []


def test_a_link_is_as_open_as_what_it_leads_to(place):
    key = place / "certs" / "mail.here.example" / "privkey.pem"
    (place / "archive").mkdir(mode=0o700)
    key.rename(place / "archive" / "key.pem")
    key.symlink_to(place / "archive" / "key.pem")
    assert warnings(place) == []
    (place / "archive").chmod(0o755)
    (place / "archive" / "key.pem").chmod(0o644)
    [warning] = warnings(place)
    assert warning.startswith(f"{key} is secret")


def test_a_name_with_blanks_and_quotes_is_one_word_in_the_command(place):
    path = place / "domains" / "here.example" / "dkim:it's one.pem"
    path.write_text("")
    path.chmod(0o644)
    [warning] = warnings(place)
    assert shlex.split(warning.rpartition(": ")[2]) == ["chmod", "o=", str(path)]


# --- the command line ---


def test_check_tells_of_it(place, capsys):
    (place / "chasquid.conf").write_text(f'hostname: "{HOST}"\ndata_dir: "{place}/data"\n')
    (place / "domains" / "here.example" / "users").chmod(0o644)
    chasquid.main(["--config-dir", str(place), "check"])
    [warning] = warnings(place)
    assert f"warning: {warning}" in capsys.readouterr().out.splitlines()


def test_check_tells_of_a_user_who_does_not_exist(commands):
    commands.configure(user="nobody-of-that-name")
    assert "expected a user of this machine" in commands.run("check").out


@pytest.mark.parametrize("words", [["user-add"], ["authenticate"]])
def test_a_password_on_the_command_line_is_warned_of_once(commands, words):
    ended = commands.run(*words, "ana@here.example", "--password", "a new password")
    assert ended.err.count("warning: --password can be seen in the list of processes") == 1
