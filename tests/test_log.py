# SPDX-License-Identifier: Apache-2.0
"""Room LOG: the logs and the counters."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MODULE, FakeClock, searched

import chasquid


def logs(directory) -> tuple[chasquid.Log, list]:
    paths = [directory / "log", directory / "mail_log"]
    for path in paths:
        path.unlink(missing_ok=True)
    clock = FakeClock(1_700_000_000.25)
    record = chasquid.Log(*(chasquid.Sink(str(path), clock) for path in paths))
    return record, paths


def test_each_kind_of_line_says_its_source_and_its_weight(tmp_path):
    record, (log, mail_log) = logs(tmp_path)
    record.info("queue", "one")
    record.warning("queue", "two")
    record.error("queue", "three")
    record.mail("id1", "accepted")
    lines = log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "queue: one",
        "queue: warning: two",
        "queue: error: three",
    ]
    assert mail_log.read_text().endswith(" id1 accepted\n")


def test_a_line_begins_with_the_time_to_the_millisecond(tmp_path):
    record, (log, _) = logs(tmp_path)
    record.info("a", "b")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.250 a: b\n", log.read_text())


@searched
@given(st.text(st.characters(codec=None)))
def test_whatever_comes_in_makes_exactly_one_line(tmp_path_factory, text):
    record, (log, mail_log) = logs(tmp_path_factory.getbasetemp())
    record.info("source", text)
    record.mail("id", text)
    for path in (log, mail_log):
        lines = path.read_bytes().decode().split("\n")
        assert len(lines) == 2 and lines[1] == ""
        assert len(lines[0].splitlines()) == 1


def test_a_crash_is_one_line_with_the_places_and_is_counted(tmp_path):
    record, (log, _) = logs(tmp_path)

    def deep() -> None:
        raise KeyError("bad\nnews")

    try:
        deep()
    except KeyError as error:
        record.crash("session", error)
    text = log.read_text()
    assert text.count("\n") == 1
    assert re.search(r"session: error: KeyError: .*bad.*news.* \(at .*deep:\d+\)", text)
    assert record.counters["crashes",] == 1


def test_counters_count_by_name_and_label(tmp_path):
    record, _ = logs(tmp_path)
    for name in (("a",), ("a", "x"), ("a", "x")):
        record.count(*name)
    assert record.counters["a",] == 1
    assert record.counters["a", "x"] == 2


def test_after_a_rotation_lines_go_into_the_new_file(tmp_path):
    record, (log, _) = logs(tmp_path)
    record.info("a", "before")
    log.rename(tmp_path / "log.1")
    record.info("a", "between")
    record.reopen()
    record.info("a", "after")
    assert "after" in log.read_text()
    assert "before" in (tmp_path / "log.1").read_text()
    assert "between" in (tmp_path / "log.1").read_text()


def test_a_log_that_cannot_be_opened_is_told(tmp_path):
    with pytest.raises(chasquid.ConfigError, match="the log cannot be opened"):
        chasquid.Sink(str(tmp_path), chasquid.Clock())  # a directory


def test_a_log_that_cannot_be_opened_any_more_goes_on_in_the_old_file(tmp_path):
    (tmp_path / "logs").mkdir()
    sink = chasquid.Sink(str(tmp_path / "logs" / "log"), chasquid.Clock())
    (tmp_path / "logs").rename(tmp_path / "moved")
    (tmp_path / "logs" / "log").mkdir(parents=True)  # in the way
    with pytest.raises(chasquid.ConfigError):
        sink.reopen()
    sink.write("still here")
    assert "still here" in (tmp_path / "moved" / "log").read_text()


def test_a_full_disk_stops_nothing():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    chasquid.Sink("/dev/full", chasquid.Clock()).write("lost")


def in_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\nsys.path.insert(0, sys.argv[1])\n{code}",
            MODULE.parent,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_lines_go_to_the_standard_streams_at_once(name):
    done = in_process(
        "import chasquid, os\n"
        f"chasquid.Sink('<{name}>', chasquid.Clock()).write('hello')\n"
        "os._exit(0)"  # no buffer is flushed
    )
    assert getattr(done, name).endswith(" hello\n")


def test_the_journal_adds_the_time_itself():
    done = in_process(
        "import chasquid, os\n"
        "status = os.fstat(2)\n"
        "os.environ['JOURNAL_STREAM'] = f'{status.st_dev}:{status.st_ino}'\n"
        "chasquid.Sink('<stderr>', chasquid.Clock()).write('hello')"
    )
    assert done.stderr == "hello\n"


def test_a_stream_that_cannot_hold_a_character_stops_nothing():
    done = in_process(
        "import chasquid\n"
        "sink = chasquid.Sink('<stdout>', chasquid.Clock())\n"
        "sink.write('\\u00f1')\nsink.write('after')"
    )
    assert done.returncode == 0
    assert done.stdout.endswith(" after\n")


def test_a_stream_that_is_closed_stops_nothing():
    done = in_process(
        "import chasquid\n"
        "sink = chasquid.Sink('<stdout>', chasquid.Clock())\n"
        "sys.stdout.close()\nsink.write('lost')\nprint('on', file=sys.stderr)"
    )
    assert done.stderr == "on\n"


def test_the_system_log_or_standard_error_takes_the_line():
    done = in_process("import chasquid\nchasquid.Sink('<syslog>', chasquid.Clock()).write('hello')")
    assert done.returncode == 0
    if not any(os.path.exists(path) for path in ("/dev/log", "/var/run/syslog")):
        assert done.stderr.endswith(" hello\n")
