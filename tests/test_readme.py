# SPDX-License-Identifier: Apache-2.0
"""What README.md says of keys, defaults, commands and files is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chasquid

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")

# There is none in the table: the first stands for the system's, the others for "none".
WITHOUT_VALUE = {
    "hostname": "the system's name",
    "mail_delivery_agent_args": "none",
    "dns_server": "none",
    "trusted_relay": "none",
    "web_address": "none",
}


def table(heading: str) -> list[list[str]]:
    """Return the rows of the table below `| heading |`, as lists of cells."""
    lines = README.split(f"\n| {heading} |", 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("| "):
            break
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        rows.append([cell.strip().replace(r"\|", "|") for cell in cells])
    return rows


def keys() -> dict[str, list[str]]:
    """Return the row of each key in the table of the configuration."""
    return {re.findall(r"`(\w+)`", row[0])[0]: row for row in table("key")}


def commands() -> dict[str, str]:
    """Return what the table says after the name of each command."""
    found = {}
    for row in table("command"):
        name, _, rest = row[0].strip("`").partition(" ")
        found[name] = rest
    return found


def test_every_key_is_in_the_table_and_no_other():
    assert set(keys()) == set(chasquid._KEYS)
    assert len(keys()) == len(table("key"))


def test_keys_that_may_be_repeated_are_marked():
    marked = {key: row[0].endswith(" *") for key, row in keys().items()}
    assert marked == {name: key.repeated for name, key in chasquid._KEYS.items()}


@pytest.mark.parametrize("key", chasquid._KEYS)
def test_the_meaning_in_the_table_is_the_help_of_the_key(key):
    assert keys()[key][2].replace("`", "") == chasquid._KEYS[key].help


@pytest.mark.parametrize("key", chasquid._KEYS)
def test_the_default_in_the_table_is_the_default(key):
    stated = keys()[key][1]
    if key in WITHOUT_VALUE:
        assert stated == WITHOUT_VALUE[key]
        assert chasquid._KEYS[key].default in ("", ())
        return
    [entry] = chasquid.parse_text_format(f"{key}: {stated.strip('`')}".encode(), "README.md")
    row = chasquid._KEYS[key]
    value = row.read(entry.value)
    assert row.default == ((value,) if row.repeated else value)


def test_every_command_is_in_the_table_and_no_other():
    assert set(commands()) == set(chasquid._VERBS)
    assert len(commands()) == len(table("command"))


@pytest.mark.parametrize("name", chasquid._VERBS)
def test_options_and_arguments_of_a_command_are_in_its_row(name):
    row = commands()[name]
    options = {word for word, _ in chasquid._VERBS[name].arguments if word.startswith("--")}
    assert set(re.findall(r"--[a-z-]+", row)) == options
    arguments = [word for word, _ in chasquid._VERBS[name].arguments if word[0] != "-"]
    assert bool(re.sub(r"\[--[^]]*\]", "", row).strip()) == bool(arguments)


def test_the_actions_of_queue_are_in_its_row():
    assert commands()["queue"].split()[0].split("|") == list(chasquid._QUEUE_ACTIONS)


def test_the_two_commands_stand_in_one_line_each():
    lines = README.splitlines()
    assert lines.count("python3 build_zipapp.py && python3 chasquid.pyz try") == 1
    test = (
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest -n auto"
    )
    assert lines.count(test) == 1


def test_files_that_are_named_exist():
    named = set(re.findall(r"sample-config/[\w./-]*\w", README))
    assert named
    for name in named:
        assert (TOP / name).exists(), name


def test_users_and_aliases_in_the_examples_parse():
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fences if not language]
    [users] = [block for block in blocks if block.startswith("users:")]
    assert set(chasquid.parse_users(users.encode(), "README.md")) == {"ana", "info", "printer"}
    [aliases] = [block for block in blocks if "\nteam:" in block]
    table = chasquid.parse_aliases(aliases.encode(), "README.md", "example.com")
    assert set(table) == {"team", "partner", "tickets", "*"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("At most 100 recipients", chasquid.RECIPIENT_LIMIT),
        ("The third error ends", {3: "third"}.get(chasquid.ERROR_LIMIT)),
        ("60 seconds\nfor each command", chasquid.COMMAND_SECONDS),
        ("3 minutes between two pieces", chasquid.TRANSFER_SECONDS / 60),
        ("20 minutes in all", chasquid.CONNECTION_SECONDS / 60),
        ("may have about 256 kB", chasquid.HEADER_LIMIT / 1024),
        ("larger than 64 kB is", chasquid.MEMORY_LIMIT / 1024),
        ("larger than 256 kB", (chasquid.MEMORY_LIMIT + chasquid._BORROWED) / 1024),
        ("or a pipe has 30 seconds", chasquid.PROGRAM_SECONDS),
        ("go 10 steps deep", chasquid.ALIAS_DEPTH_LIMIT),
        ("5 mail servers are tried", chasquid.HOST_LIMIT),
    ],
)
def test_the_limits_are_those_of_the_module(text, value):
    assert text in README
    wanted = f"{value:g}" if isinstance(value, (int, float)) else value
    assert wanted in text


def test_the_examples_of_the_fixture_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    blocks = [block for block in blocks if not re.search("django|aiosmtplib", block)]
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"test_{number}.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "chasquid"]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_the_table_of_events_is_that_of_the_module():
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z ]*) \| (.+) \|$", README, re.MULTILINE)
    events = {
        (event.name, " ".join(name for name in event.fields.values()), event.help)
        for event in chasquid.Events.BY_NAME.values()
        if event not in (chasquid.Events.FAULT, chasquid.Events.CAPTURED)  # of test servers
    }
    assert len(events) > 20
    assert {row for row in rows if row[0] in chasquid.Events.BY_NAME} == events


@pytest.mark.parametrize("row", table("promise"), ids=lambda row: row[0][:40])
def test_what_shows_a_promise_is_there(row):
    names = re.findall(r"`([\w/.]+)`(?: \(([\w ,-]+)\))?", row[1])
    assert names
    for name, suites in names:
        path = TOP / "tests" / name
        assert path.exists(), name
        texts = [path.read_text()] if path.is_file() else sorted(os.listdir(path))
        for suite in filter(None, suites.split(", ")):
            assert any(f"# --- {suite}" in text or text == f"{suite}.txt" for text in texts), suite
