# SPDX-License-Identifier: Apache-2.0
"""systemd hands over the sockets, and is told when the server is ready."""

from __future__ import annotations

import os
import socket

import pytest

from .clients import swaks
from .server import USERS, Chasquid
from .tools import LOOPBACK, program


class Activated(Chasquid):
    """chasquid behind systemd-socket-activate, which starts it at the first connection."""

    def start(self) -> None:
        listen = [word for port in self.ports for word in ("-l", f"{LOOPBACK}:{port}")]
        activate = [program("systemd-socket-activate"), *listen]
        activate += ["--fdname=smtp:submission:submission_tls"]
        self._run([*activate, *self.serve_command], *self.ports)


class Notifying(Chasquid):
    """chasquid as a service of Type=notify; `told` is what it says of itself."""

    def start(self) -> None:
        path = self.directory / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(path))
        self._notify.settimeout(20)
        environment = {**os.environ, "NOTIFY_SOCKET": str(path)}
        self._run(self.serve_command, *self.ports, env=environment)

    def stop(self) -> None:
        super().stop()
        self._notify.close()

    def told(self) -> str:
        return self._notify.recv(1000).decode()


@pytest.fixture
def activated(start, names):
    return start(
        Activated,
        names,
        users=USERS,
        smtp_address="systemd",
        submission_address="systemd",
        submission_over_tls_address="systemd",
    )


def test_all_three_sockets_are_used_for_what_they_are(activated):
    letter = ("--from", "ana@here.example", "--to", "bob@here.example")
    login = ("--auth-user", "ana@here.example", "--auth-password", "secret")
    for number, (port, options) in enumerate(
        (
            (activated.smtp_port, ()),
            (activated.submission_port, ("--tls", "--auth", "PLAIN", *login)),
            (activated.tls_port, ("--tls-on-connect", "--auth", "PLAIN", *login)),
        ),
        1,
    ):
        session = swaks(port, *options, *letter)
        assert session.status == 0, session.text
        activated.wait_for_letters("bob@here.example", number)


def test_submission_by_an_inherited_socket_needs_a_login(activated):
    letter = ("--from", "ana@here.example", "--to", "bob@here.example")
    assert swaks(activated.submission_port, "--tls", *letter).refusals[0].startswith("5")


def test_it_ends_as_otherwise(activated):
    assert swaks(activated.smtp_port, "--quit-after", "EHLO").status == 0
    activated.terminate()
    assert activated.wait_for_end() == 0


def test_systemd_is_told_of_start_and_end(start, names):
    chasquid = start(Notifying, names, users=USERS)
    assert chasquid.told() == "READY=1"
    chasquid.terminate()
    assert chasquid.told() == "STOPPING=1"
    assert chasquid.wait_for_end() == 0
