# SPDX-License-Identifier: Apache-2.0
"""The wheel, in an environment that has nothing else: command, fixture, plugin and types."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import wait_for

import build_zipapp
import chasquid

from .tools import make_environment, run

TOP = build_zipapp.HERE
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
TOOLS = [
    need for need in PROJECT["optional-dependencies"]["test"] if need.startswith(("mypy", "pytest"))
]
MODULES = "import chasquid, json, sys; print(json.dumps([chasquid.__file__, *sys.modules]))"

USES = """\
import chasquid


def test_it(mail_server: chasquid.CaptureServer) -> None:
    mail_server.fault("RCPT", reply="451 4.2.1 busy", times=2)
    messages = mail_server.wait_for(1)
    reveal_type(messages)
    reveal_type(mail_server.wait_for(lambda message: message["Subject"] == "Welcome"))
    reveal_type(messages[0].rcpt_tos)
    reveal_type(mail_server.settings.size_limit)


async def test_others() -> None:
    async with chasquid.CaptureServer(tls="starttls") as server:
        reveal_type(server)
        reveal_type(await server.arrived(2))
        reveal_type(server.client_context())
"""
TYPES = [
    "list[chasquid.CapturedMessage]",
    "chasquid.CapturedMessage",
    "list[str]",
    "int",
    "chasquid.CaptureServer",
    "list[chasquid.CapturedMessage]",
    "ssl.SSLContext",
]
MISTAKEN = """\
import chasquid

server = chasquid.CaptureServer(port="smtp")
server.wait_fro(1)
"""
PLUGIN = """\
import smtplib


def test_it(mail_server):
    with smtplib.SMTP(*mail_server.address) as client:
        client.sendmail("a@x.example", ["b@x.example"], "Subject: Welcome\\n\\nhello\\n")
    assert mail_server.messages[0]["Subject"] == "Welcome"
"""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Nothing is imported from where these tests lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `python -m build` does it: the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / build_zipapp.build_sdist(str(folder))
    with tarfile.open(source) as packed:
        packed.extractall(folder, filter="data")
    python = make_environment(folder / "builder")
    unpacked = str(source).removesuffix(".tar.gz")
    run(str(python), "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), unpacked)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("fresh") / "venv", str(wheel), *TOOLS)


def test_pip_knows_what_it_needs(python):
    run(str(python), "-m", "pip", "check")
    told = run(str(python), "-m", "pip", "show", "-f", "chasquid").stdout
    assert f"Version: {chasquid.__version__}" in told
    [needs] = re.findall("Requires: (.*)", told)
    names = {need.partition("==")[0] for need in PROJECT["dependencies"]}
    assert set(needs.split(", ")) == names
    assert "chasquid/py.typed" in told


@pytest.mark.parametrize("command", [["bin/chasquid"], ["bin/python", "-m", "chasquid"]])
def test_the_command(python, command, tmp_path):
    program, *words = command
    words = [str(python.parents[1] / program), *words]
    done = run(*words, "--config-dir", str(tmp_path))
    assert chasquid.__version__ in done.stdout
    with subprocess.Popen([*words, "try", "--once"], stdout=subprocess.PIPE, cwd=tmp_path,
                          env=os.environ | {"HOME": str(tmp_path)}) as process:  # fmt: skip
        wait_for(lambda: process.poll() is not None, "the end of try --once")
    assert process.returncode == 0


def test_importing_it_loads_the_standard_library_alone(python, tmp_path):
    done = subprocess.run(
        [python, "-c", MODULES], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    file, *modules = json.loads(done.stdout)
    assert file.endswith("/chasquid/__init__.py")
    loaded = {name.partition(".")[0] for name in modules}
    assert not loaded & {"dns", "dkim", "spf", "idna", "precis_i18n", "asyncio", "pytest"}


def test_the_plugin(python, tmp_path):
    (tmp_path / "test_plugin.py").write_text(PLUGIN)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def check_types(python: Path, directory: Path, text: str) -> tuple[int, str]:
    (directory / "uses.py").write_text(text)
    done = subprocess.run(
        [python, "-m", "mypy", "--strict", "uses.py"],
        cwd=directory, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_mypy_sees_its_types(python, tmp_path):
    status, told = check_types(python, tmp_path, USES)
    assert status == 0, told
    assert re.findall('Revealed type is "(.*)"', told) == TYPES
    status, told = check_types(python, tmp_path, MISTAKEN)
    assert status == 1
    assert 'Argument "port" to "CaptureServer" has incompatible type' in told
    assert '"CaptureServer" has no attribute "wait_fro"' in told


def test_an_editable_one_is_imported_from_where_it_lies(tmp_path):
    python = make_environment(tmp_path / "venv")
    run(str(python), "-m", "pip", "install", "-q", "--no-deps", "-e", str(TOP))
    done = run(str(python), "-P", "-c", "import chasquid; print(chasquid.__file__)")
    assert Path(done.stdout.strip()) == TOP / "chasquid.py"
    run(str(tmp_path / "venv/bin/chasquid"), "--config-dir", str(tmp_path))
    run(str(python), "-m", "pip", "uninstall", "-q", "-y", "chasquid")
