# SPDX-License-Identifier: Apache-2.0
"""systemd itself finds nothing wrong with the units of the sample configuration."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from .tools import program, run

UNITS = Path(__file__).resolve().parent.parent.parent / "sample-config" / "systemd"


@pytest.fixture
def units(place):
    """The units, with a program that is there: systemd looks for it."""
    copy = place / "units"
    shutil.copytree(UNITS, copy)
    service = copy / "chasquid.service"
    text = service.read_text()
    assert text.count("/usr/bin/python3 ") == 1
    service.write_text(text.replace("/usr/bin/python3 ", "/bin/sh "))
    return copy


def verify(units):
    """Return what systemd says of the units; of others on this machine it may say more."""
    paths = sorted(map(str, units.iterdir()))
    done = run(program("systemd-analyze"), "verify", "--man=no", *paths, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "chasquid" in line]
    return done.returncode, said


def test_it_has_nothing_to_say_of_them(units):
    assert verify(units) == (0, [])


@pytest.mark.parametrize(
    ("unit", "right", "wrong"),
    [
        ("chasquid.service", "ProtectSystem=", "ProtectSytem="),
        ("chasquid.service", "Type=notify", "Type=notified"),
        ("chasquid-smtp.socket", "ListenStream=25", "ListenStream=smtp port"),
    ],
)
def test_it_would_tell_of_a_mistake(units, unit, right, wrong):
    path = units / unit
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    assert verify(units)[1]


def test_it_finds_the_service_well_confined(units):
    command = [program("systemd-analyze"), "security", "--offline=yes"]
    text = run(*command, str(units / "chasquid.service")).stdout
    [exposure] = re.findall(r"Overall exposure level for chasquid.service: ([\d.]+)", text)
    assert float(exposure) <= 1.5
