# SPDX-License-Identifier: Apache-2.0
"""What several hosts need together: one configuration for all of them, and HAProxy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .peers import NameServer, Peer
from .server import PROGRAM, Chasquid, write_users
from .tools import LOOPBACK, free_port, make_certificate, program, run


def write_shared_configuration(
    directory: Path,
    names: NameServer,
    *,
    users: Mapping[str, str],
    settings: Sequence[str],
    certificate_names: Sequence[str],
) -> Path:
    """Make a configuration directory for several hosts, who each say the rest themselves.

    `settings` are lines of chasquid.conf.
    """
    lines = [f'dns_server: "{names.address}"', *settings]
    make_certificate(directory / "certs" / certificate_names[0], *certificate_names)
    (directory / "chasquid.conf").write_text("\n".join(lines) + "\n")
    write_users(directory, users)
    return directory


class Host(Chasquid):
    """One of several servers that share the configuration directory `config_dir`.

    Its name, its data_dir and its addresses are overrides. Beside the ports that every
    server in a test has, it is the server for SMTP at `place`, an "ip:port".
    """

    def __init__(
        self,
        directory: Path,
        config_dir: Path,
        hostname: str,
        *,
        users: Mapping[str, str],
        place: str = "",
    ) -> None:
        Peer.__init__(self, directory)
        self.hostname = hostname
        self.smtp_port, self.submission_port, self.tls_port = free_port(), free_port(), free_port()
        self.config_dir = config_dir
        self.data_dir = directory / "data"
        self.users = dict(users)
        [self.certificate] = config_dir.glob("certs/*/fullchain.pem")
        smtp = [f"{LOOPBACK}:{self.smtp_port}", *([place] if place else [])]
        self.overrides = " ".join(
            [
                f'hostname: "{hostname}" data_dir: "{self.data_dir}"',
                *(f'smtp_address: "{address}"' for address in smtp),
                f'submission_address: "{LOOPBACK}:{self.submission_port}"',
                f'submission_over_tls_address: "{LOOPBACK}:{self.tls_port}"',
                f'mail_log_path: "{directory}/mail.log"',
            ]
        )

    @property
    def serve_command(self) -> list[str]:
        return [*self._prefix, "serve"]

    @property
    def _prefix(self) -> list[str]:
        options = ["--config-dir", str(self.config_dir), "--config-overrides", self.overrides]
        return [sys.executable, PROGRAM, *options]

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self._prefix, *words, check=check)


class HaProxy(Peer):
    """HAProxy at one port, in front of `servers`, which are ports of 127.0.0.1.

    It says by the PROXY protocol who the client is, and looks whether the servers are there.
    """

    def __init__(self, directory: Path, *servers: int) -> None:
        super().__init__(directory)
        self._haproxy = program("haproxy")
        self.port = free_port()
        lines = [
            f"server host{number} {LOOPBACK}:{port} send-proxy-v2 check inter 200ms rise 1 fall 1"
            for number, port in enumerate(servers, 1)
        ]
        text = _HAPROXY_CFG.format(port=self.port, servers="\n    ".join(lines))
        (directory / "haproxy.cfg").write_text(text)

    def start(self) -> None:
        self._run([self._haproxy, "-db", "-f", self.directory / "haproxy.cfg"], self.port)


_HAPROXY_CFG = """\
global
    log stdout format raw local0
defaults
    mode tcp
    log global
    option tcplog
    timeout connect 2s
    timeout client 60s
    timeout server 60s
listen submission
    bind 127.0.0.1:{port}
    balance roundrobin
    option redispatch
    {servers}
"""
