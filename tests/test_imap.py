# SPDX-License-Identifier: Apache-2.0
"""Room IMAP: Dovecot's configuration and its users, which follow from ours."""

from __future__ import annotations

import base64
import ctypes
import ctypes.util
import os
import socket
import stat

import pytest
from support import CommandLine, users_file

import chasquid

DOVECOT = "dovecot/users"


def crypt(password: str, setting: str) -> str:
    """What crypt(3) of this system says."""
    path = ctypes.util.find_library("crypt")
    if path is None:
        pytest.skip("there is no libcrypt")
    function = ctypes.CDLL(path).crypt
    function.restype = ctypes.c_char_p
    return (function(password.encode(), setting.encode()) or b"").decode()


@pytest.fixture
def shell(tmp_path, capsys):
    """A command line whose Dovecot is served."""
    shell = CommandLine(tmp_path, capsys)
    (shell.config_dir / "dovecot").mkdir()
    return shell


def lines(shell):
    return (shell.config_dir / DOVECOT).read_text().splitlines()


def test_a_hash_is_the_one_that_crypt_makes():
    known = chasquid.crypt_hash(chasquid.new_password("päss word".encode()))
    assert known.startswith("$7$C6..../....")
    made = crypt("päss word", known)
    if made.startswith("*") or not made:
        pytest.skip("this libcrypt knows no scrypt")
    assert made == known
    assert crypt("other", known) != known


@pytest.mark.parametrize(
    "changed", [{"salt": b"\0" * 16}, {"salt": b""}, {"salt": b"a$b"}, {"key_length": 16}]
)
def test_a_hash_that_crypt_cannot_write_is_none(changed):
    assert chasquid.crypt_hash(chasquid.new_password(b"x")._replace(**changed)) == ""


def test_the_file_follows_when_users_are_added_and_removed(shell):
    shell.run("user-remove", "ana@here.example")
    assert lines(shell) == []
    shell.run("user-add", "ben@here.example", "--password", "a good one")
    [ben] = lines(shell)
    address, known, *rest = ben.split(":")
    assert address == "ben@here.example" and rest == [""] * 6
    users = chasquid.load_users(str(shell.domain_dir))
    assert known == "{CRYPT}" + chasquid.crypt_hash(users["ben"])
    mode = os.stat(shell.config_dir / DOVECOT).st_mode
    assert stat.S_IMODE(mode) == 0o640
    shell.run("user-add", "ben@here.example", "--password", "another one")
    assert lines(shell) != [ben] and len(lines(shell)) == 1


def test_without_its_directory_there_is_no_file(tmp_path, capsys):
    shell = CommandLine(tmp_path, capsys)
    shell.run("user-add", "ben@here.example", "--password", "a good one")
    assert not (shell.config_dir / "dovecot").exists()


def test_who_has_no_hash_that_dovecot_could_read_is_told(shell):
    binary = chasquid.new_password(b"x")._replace(salt=b"\0\1")
    users = {"old": binary, "out": chasquid.Denied(), "plain": chasquid.Plain(b"a:b\n")}
    shell.write("domains/here.example/users", chasquid.format_users(users).decode())
    assert chasquid.write_dovecot_users(str(shell.config_dir)) == ["old@here.example"]
    old, out, plain = lines(shell)
    secret = base64.b64encode(b"a:b\n").decode()
    assert plain == f"plain@here.example:{{PLAIN.b64}}{secret}::::::"
    nobody = "{CRYPT}$7$C6..../....none$" + "." * 43  # they get mail, and cannot log in
    assert (old, out) == (f"old@here.example:{nobody}::::::", f"out@here.example:{nobody}::::::")
    made = crypt("", nobody.removeprefix("{CRYPT}"))
    assert made != nobody.removeprefix("{CRYPT}")


def test_an_internationalised_address_has_both_forms(shell):
    known = chasquid.new_password(b"x")
    users = chasquid.format_users({"jürgen": known}).decode()
    shell.write("domains/münchen.example/users", users)
    shell.write("domains/here.example/users", users_file({}).decode())
    chasquid.write_dovecot_users(str(shell.config_dir))
    hashed = "{CRYPT}" + chasquid.crypt_hash(known)
    assert lines(shell) == [
        f"jürgen@münchen.example:{hashed}::::::",
        f"jürgen@xn--mnchen-3ya.example:{hashed}::::::user=jürgen@münchen.example",
    ]


def test_a_file_that_cannot_be_written(shell):
    (shell.config_dir / DOVECOT).mkdir()
    with pytest.raises(chasquid.ChasquidError, match="dovecot/users cannot be written"):
        chasquid.write_dovecot_users(str(shell.config_dir))


@pytest.mark.parametrize(
    ("version", "maildir", "key"),
    [
        ("2.3.19.1", "mail_location = maildir:/d/mail/%d/%n\n", "ssl_key = </c/privkey.pem\n"),
        (
            "2.4.1",
            "mail_path = /d/mail/%{user | domain}/%{user | username}\n",
            "ssl_server_key_file = /c/privkey.pem\n",
        ),
    ],
)
def test_a_configuration_is_of_the_version(version, maildir, key):
    config = chasquid.Config("/etc/chasquid", data_dir="/d")
    text = chasquid.dovecot_configuration(version, config, "/c")
    assert maildir in text and key in text
    assert "/etc/chasquid/dovecot/users\n" in text
    assert text.count("{") == text.count("}")
    assert f'# Made by "chasquid init" for Dovecot {version[:3]};' in text
    if version.startswith("2.4"):
        assert text.startswith("dovecot_config_version = ")


def test_a_maildir_of_ones_own_is_where_dovecot_looks():
    config = chasquid.Config("/etc/chasquid", maildir="/mail/%to%")
    assert "mail_location = maildir:/mail/%u\n" in chasquid.dovecot_configuration(
        "2.3", config, "/c"
    )


def test_without_a_server_the_login_says_so():
    with socket.create_server(("127.0.0.1", 0)) as raw:
        port = raw.getsockname()[1]
    why = chasquid.imap_login("ana@here.example", "secret", port, seconds=0.1)
    assert "refused" in why


def test_a_server_that_is_no_imap_server_is_told_of():
    with socket.create_server(("127.0.0.1", 0)) as raw:
        port = raw.getsockname()[1]
        why = chasquid.imap_login("ana@here.example", "secret", port, seconds=0.2)
    assert "timed out" in why
