# SPDX-License-Identifier: Apache-2.0
"""How much a server has grown after many logins, right ones and wrong ones.

    python -m tests.bench.logins [--logins 1000]

The server runs in a process of its own, as `chasquid serve`. What counts is what it holds in
memory (VmRSS), before the first login, after twenty, and after all of them.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import contextlib
import smtplib
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import chasquid

MODULE = Path(chasquid.__file__).resolve()
CLIENTS = 8


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as raw:
        return int(raw.getsockname()[1])


def make_config(directory: Path, port: int) -> None:
    certificates = directory / "certs" / "mail.here.example"
    domain = directory / "domains" / "here.example"
    for path in (certificates, domain):
        path.mkdir(parents=True)
    chain, key = chasquid.self_signed_certificate(["mail.here.example"], time.time())
    (certificates / "fullchain.pem").write_text(chain)
    (certificates / "privkey.pem").write_text(key)
    users = {"ana": chasquid.new_password(b"secret")}
    (domain / "users").write_bytes(chasquid.format_users(users))
    (directory / "chasquid.conf").write_text(
        'hostname: "mail.here.example"\n'
        f'data_dir: "{directory}/data"\nlog_path: "{directory}/log"\n'
        f'mail_log_path: "{directory}/log"\nsubmission_over_tls_address: "127.0.0.1:{port}"\n'
    )


@contextlib.contextmanager
def server(directory: Path) -> Iterator[int]:
    """Run a server; the value is its process id."""
    command = [sys.executable, str(MODULE), "--config-dir", str(directory), "serve"]
    with subprocess.Popen(command) as process:
        log = directory / "log"
        while not (log.exists() and "event=ready" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        try:
            yield process.pid
        finally:
            process.terminate()


def memory(pid: int) -> float:
    """Return what a process holds, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the process has ended")


def log_in(port: int, password: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with smtplib.SMTP_SSL("127.0.0.1", port, "bench.example", context=context) as client:
        client.ehlo()
        secret = base64.b64encode(f"\0ana@here.example\0{password}".encode()).decode()
        return client.docmd("AUTH", f"PLAIN {secret}")[0] == 235


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logins", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        make_config(Path(name), port)
        with server(Path(name)) as pid, concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            before = memory(pid)
            passwords = ["secret" if number % 2 else "wrong" for number in range(arguments.logins)]
            few = list(pool.map(lambda one: log_in(port, one), passwords[:20]))
            after_few = memory(pid)
            rest = list(pool.map(lambda one: log_in(port, one), passwords[20:]))
            after = memory(pid)
    right = sum(few + rest)
    print(f"{right} logins right, {len(passwords) - right} wrong, {CLIENTS} at a time")
    print(f"memory in MB: before {before:.1f}, after 20 {after_few:.1f}, after all {after:.1f}")
    print(f"grown by {after - before:.1f} MB, of which after the first 20 {after - after_few:.1f}")


if __name__ == "__main__":
    main()
