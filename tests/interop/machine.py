# SPDX-License-Identifier: Apache-2.0
"""A machine of its own for a test: systemd as PID 1, a copy of this system's files, no network.

It is a set of namespaces. The root is an overlay of that of this system, so whatever is changed
in it is gone with it, and nothing changes here.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from support import wait_for

from .tools import need_root, program, unavailable

_BOOT = r"""
set -e
top=$1 root=$1/root
mount -t tmpfs tmpfs "$top"
mkdir "$top/upper" "$top/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/upper,workdir=$top/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
else
    mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
    mkdir "$root/sys/fs/cgroup/unified" "$root/sys/fs/cgroup/systemd"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup/unified"
    mount -t cgroup -o none,name=systemd cgroup "$root/sys/fs/cgroup/systemd"
fi
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
rm -rf "$root/var/log/journal" "$root/etc/systemd/system"/*.wants
# whatever would act on this machine, or wait for hardware
for unit in systemd-udevd systemd-timesyncd systemd-sysctl systemd-modules-load \
    systemd-remount-fs systemd-random-seed systemd-logind; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
done
ln -sf /dev/null "$root/etc/systemd/system/tmp.mount"
printf '[Unit]\nDescription=A test\nRequires=basic.target\nAfter=basic.target\n' \
    >"$root/etc/systemd/system/test.target"
echo "$2" >"$root/etc/hostname"
ip link set lo up
shift 2
for address; do
    ip addr add "$address" dev lo
done
cd "$root"
mkdir old
pivot_root . old
umount -l /old
rmdir /old
export container=test
exec /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no
"""


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# Its own control groups, so that what systemd makes of them lies below and goes away with them.
_ENTER = """
set -e
for group in "${@:2:$1}"; do
    mkdir "$group"
    echo $$ >"$group/cgroup.procs"
done
exec "${@:$1 + 2}"
"""


class Done(NamedTuple):
    """What a person saw of some commands: the exit status, and all that stood in the terminal."""

    status: int
    text: str


class Machine:
    """A machine named `hostname` with `addresses` ("192.0.2.25/32"), up for a `with`."""

    name = "Machine"

    def __init__(self, directory: Path, hostname: str, *addresses: str) -> None:
        need_root()
        directory.mkdir(parents=True)
        self._top = directory / "machine"
        self._top.mkdir()
        self._output = directory / "output"
        self._words = [hostname, *addresses]
        self._pid = 0
        self._groups = [group / f"chasquid-{os.getpid()}-{id(self)}" for group in own_groups()]

    def __enter__(self) -> Machine:
        kinds = ("--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup")
        command = ["bash", "-c", _ENTER, "enter", str(len(self._groups)), *map(str, self._groups)]
        command += [program("unshare"), *kinds, "--fork", "--kill-child"]
        command += ["bash", "-c", _BOOT, "boot", str(self._top), *self._words]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            wait_for(self._is_up, "systemd")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            unavailable(f"no machine can be made here: {self.log()[-500:].strip()}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._pid = int((children.read_text().split() or ["0"])[0])
        # not the systemd of this system, which could be asked until the root is another
        ask = "test -e /etc/systemd/system/test.target && systemctl is-system-running"
        return bool(self._pid) and self.root(ask).text.strip() in ("running", "degraded")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._pid = 0
        for group in self._groups:
            wait_for(lambda group=group: _remove_group(group), f"the end of {group}")

    @property
    def pid(self) -> int:
        """Its systemd, as this system sees it."""
        return self._pid

    def log(self) -> str:
        """Return what systemd said at the boot, and the end of the journal."""
        said = self._output.read_text("utf-8", "replace")
        journal = "journalctl --no-pager | grep -v ' sudo[[]' | tail -n 60"
        return said + (self.root(journal).text if self._pid else "")

    def _inside(self, script: str) -> list[str]:
        enter = [program("nsenter"), "-t", str(self._pid), "-a", "-r", "-w"]
        return [*enter, "env", "-i", f"PATH={_PATH}", "bash", "-c", script]

    def root(self, script: str, check: bool = False, input: str | None = None) -> Done:
        """Run a script as root, without a terminal."""
        done = subprocess.run(
            self._inside(script), input=input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{script}\n{done.stdout}"
        return Done(done.returncode, done.stdout)

    def copy(self, source: Path, target: str, *without: str) -> None:
        """Copy a directory of this system into the machine."""
        pack = ["tar", "-C", str(source), *(f"--exclude={name}" for name in without), "-c", "."]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packing:
            unpack = self._inside(f"mkdir -p {target} && tar -x -C {target}")
            subprocess.run(unpack, stdin=packing.stdout, check=True)

    def type(
        self, user: str, script: str, answers: Mapping[str, str], *, seconds: float = 120.0
    ) -> Done:
        """Run a script as a user at a terminal, in the directory "chasquid".

        Where what is shown ends with something that a pattern of `answers` fits, its text is
        typed. Each line of the script must succeed.
        """
        self.root(f"cat > ~{user}/script && chown {user}: ~{user}/script", True, script)
        login = (
            f"cd ~{user}/chasquid && exec setsid --ctty --wait"
            f" setpriv --reuid={user} --regid={user} --init-groups"
            f" env HOME=~{user} USER={user} TERM=dumb SYSTEMD_PAGER=cat"
            f" PATH=/usr/local/bin:/usr/bin:/bin bash -eo pipefail ~{user}/script"
        )
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            self._inside(login), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        try:
            text = _converse(ours, answers, time.monotonic() + seconds)
            return Done(process.wait(20), text)
        finally:
            os.close(ours)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()


def _converse(terminal: int, answers: Mapping[str, str], end: float) -> str:
    """Read what is shown until nobody holds the terminal any more, and answer."""
    text, answered = "", 0
    while True:
        if not select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            raise AssertionError(f"it takes too long, or asks something:\n{text}")
        try:
            data = os.read(terminal, 65536)
        except OSError:  # EIO: the last one has gone
            data = b""
        if not data:
            return text.replace("\r\n", "\n")
        text += data.decode("utf-8", "replace")
        for pattern, answer in answers.items():
            if re.search(rf"(?:{pattern})\s*\Z", text[answered:], re.IGNORECASE):
                answered = len(text)
                if answer.endswith("\n"):  # a line, not a key
                    _wait_for_silence(terminal)
                os.write(terminal, answer.encode())
                break


def _wait_for_silence(terminal: int) -> None:
    """Wait until nothing is echoed, for a second: what is typed before that may be dropped."""
    end = time.monotonic() + 1
    while termios.tcgetattr(terminal)[3] & termios.ECHO and time.monotonic() < end:
        time.sleep(0.01)


def own_groups() -> list[Path]:
    """Return the control groups of this process that systemd looks at (cgroups(7))."""
    top = Path("/sys/fs/cgroup")
    unified = top if (top / "cgroup.procs").exists() else top / "unified"
    places = {"": unified, "name=systemd": top / "systemd"}
    entries = (
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    return [Path(f"{places[kind]}{path}") for kind, path in entries if kind in places]


def _remove_group(group: Path) -> bool:
    """Remove a control group and those below it; False while there are processes in it."""
    try:
        for directory, _, _ in os.walk(group, topdown=False):
            os.rmdir(directory)
    except OSError:
        return False
    return True
