# SPDX-License-Identifier: Apache-2.0
"""Room CHANGES: what a command changes on a system, and how it is taken back."""

from __future__ import annotations

import os
import stat
import sys

import pytest

import chasquid


@pytest.fixture
def host(tmp_path):
    return chasquid.Host(str(tmp_path))


@pytest.fixture
def changes(host):
    return chasquid.Changes(host)


def tree(directory):
    """Return every path below, with its mode and what it holds."""
    found = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[path] = mode, path.read_bytes()
        else:
            found[path] = mode, os.readlink(path) if path.is_symlink() else b""
    return found


def test_all_is_taken_back(host, changes, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "old").write_text("old")
    (tmp_path / "etc" / "old").chmod(0o640)
    before = tree(tmp_path)
    changes.directory("/etc/a/b", 0o750)
    changes.write("/etc/a/b/new", b"new", 0o600)
    changes.write("/etc/old", b"changed")
    changes.link("/etc/link", "/etc/old")
    changes.adjust("/etc/old", 0o2711, (os.geteuid(), os.getegid()))
    assert stat.S_IMODE((tmp_path / "etc/old").stat().st_mode) == 0o2711
    changes.run("true", undo=["touch", str(tmp_path / "undone")])
    assert stat.S_IMODE((tmp_path / "etc/a/b").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "etc/a/b/new").stat().st_mode) == 0o600
    assert (tmp_path / "etc/link").read_bytes() == b"changed"
    assert changes.take_back() == []
    (tmp_path / "undone").unlink()
    assert tree(tmp_path) == before


def test_a_directory_that_holds_something_stays_and_is_told_of(changes, tmp_path):
    changes.directory("/data", 0o700)
    (tmp_path / "data" / "mail").touch()
    assert changes.take_back() == [f"the directory {tmp_path}/data"]
    assert (tmp_path / "data" / "mail").exists()


def test_a_directory_that_is_there_is_left_as_it_is(changes, tmp_path):
    (tmp_path / "there").mkdir(mode=0o711)
    changes.directory("/there", 0o700)
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o711
    changes.take_back()
    assert (tmp_path / "there").is_dir()


def test_a_link_is_not_written_through(changes, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "users").symlink_to(tmp_path / "secret")
    with pytest.raises(chasquid.ChasquidError, match="is a link"):
        changes.write("/users", b"mine")
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_program_that_fails_is_told_of_with_its_last_line(changes, tmp_path):
    mark = tmp_path / "undone"
    script = "echo one >&2; echo 'no such thing' >&2; exit 3"
    with pytest.raises(chasquid.ChasquidError, match="has failed: no such thing"):
        changes.run("sh", "-c", script, undo=["touch", str(mark)])
    changes.take_back()
    assert mark.exists()  # it may have done some of its work


def test_a_program_that_is_missing(host):
    assert host.run("no-such-program-here").status == 127


def test_the_names_of_a_host_are_its_own_and_those_in_the_file(host, tmp_path):
    import socket

    name = socket.gethostname()
    (tmp_path / "etc").mkdir()
    text = f"127.0.0.1 localhost\n127.0.1.1 {name}.example.com {name}  # here\n192.0.2.1 other\n"
    (tmp_path / "etc" / "hosts").write_text(text)
    assert set(host.names()) == {name, f"{name}.example.com"}


def test_a_path_is_below_the_prefix_once(host, tmp_path):
    assert host.path("/etc/x") == f"{tmp_path}/etc/x"
    assert host.path(host.path("/etc/x")) == f"{tmp_path}/etc/x"
    assert chasquid.Host().path("/etc/x") == "/etc/x"


def test_templates_are_those_of_the_sample_configuration(host):
    assert host.archive() == ""
    assert b"ListenStream=25\n" in host.template("systemd/chasquid-smtp.socket")
    with pytest.raises(chasquid.ChasquidError, match="not complete"):
        host.template("systemd/none")


def test_a_port_that_is_taken_is_not_free(host):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as raw:
        assert not host.port_is_free(raw.getsockname()[1])


def test_who_is_a_user_of_the_system(host):
    assert host.ids("root") == (0, 0) or sys.platform == "darwin"
    assert host.ids("nobody-of-that-name") is None
