# SPDX-License-Identifier: Apache-2.0
"""Room LOG: the logs, events and metrics."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import MODULE, FakeClock, searched

import chasquid


def logs(directory) -> tuple[chasquid.Log, list]:
    paths = [directory / "log", directory / "mail_log"]
    for path in paths:
        path.unlink(missing_ok=True)
    clock = FakeClock(1_700_000_000.25)
    made = chasquid.Log(*(chasquid.Sink(str(path), clock) for path in paths))
    return made, paths


def test_each_kind_of_line_says_its_source_and_its_weight(tmp_path):
    made, (log, mail_log) = logs(tmp_path)
    made.info("queue", "one")
    made.warning("queue", "two")
    made.error("queue", "three")
    made.event(chasquid.Events.DONE, id="id1", attempts=2)
    lines = log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "event=info source=queue text=one",
        "event=warning source=queue text=two",
        "event=error source=queue text=three",
    ]
    assert mail_log.read_text().endswith(" event=done id=id1 attempts=2\n")


def test_a_line_begins_with_the_time_to_the_millisecond(tmp_path):
    made, (log, _) = logs(tmp_path)
    made.info("a", "b")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.250 event=info source=a text=b\n", log.read_text()
    )


@searched
@given(st.text(st.characters(codec=None)))
@example("two\nlines")
@example("two\nevent=lines")
def test_whatever_comes_in_makes_exactly_one_line(tmp_path_factory, text):
    made, (log, mail_log) = logs(tmp_path_factory.getbasetemp())
    made.info("source", text)
    made.event(chasquid.Events.REMOVED, id=text)
    for path in (log, mail_log):
        lines = path.read_bytes().decode().split("\n")
        assert len(lines) == 2 and lines[1] == ""
        assert len(lines[0].splitlines()) == 1


def test_a_crash_is_one_line_with_the_places_and_is_counted(tmp_path):
    made, (log, _) = logs(tmp_path)

    def deep() -> None:
        raise KeyError("bad\nnews")

    try:
        deep()
    except KeyError as error:
        made.crash("session", error)
    text = log.read_text()
    assert text.count("\n") == 1
    assert re.search(
        r'event=crash source=session text="KeyError: .*bad.*news.*" at=.*deep:\d+$', text
    )
    assert made.counters["crashes",] == 1


def test_counters_count_by_name_and_label(tmp_path):
    made, _ = logs(tmp_path)
    metrics = chasquid.Metrics
    for metric, *values in ((metrics.CRASHES,), (metrics.SPF, "pass"), (metrics.SPF, "pass")):
        made.count(metric, *values)
    assert made.counters["crashes",] == 1
    assert made.counters["spf", "pass"] == 2


def test_a_field_that_the_event_has_not_is_a_fault_of_ours(tmp_path):
    made, _ = logs(tmp_path)
    with pytest.raises(TypeError, match="done has no sise"):
        made.event(chasquid.Events.DONE, id="id1", sise=1)


@searched
@given(st.text(max_size=200), st.text(max_size=200))
def test_what_is_written_is_read_again_and_no_value_looks_like_a_field(
    tmp_path_factory, sender, reason
):
    made, (_, mail_log) = logs(tmp_path_factory.getbasetemp())
    made.event(chasquid.Events.DEFERRED, id="id1", from_=sender, text=reason)
    time, fields = chasquid.parse_event(mail_log.read_text(encoding="utf-8").rstrip("\n"))
    assert re.fullmatch(r"[\d: .-]+", time)
    wanted = {"event": "deferred", "id": "id1", "from": chasquid.printable(f"<{sender}>", 1500)}
    if reason:
        wanted["text"] = chasquid.printable(reason, 1500)
    assert fields == wanted


@pytest.mark.parametrize("line", ["", "event=", "an old line: with a sentence", "id=x"])
def test_a_line_without_an_event_has_no_fields(line):
    assert chasquid.parse_event(line) == (line, {})


def test_names_of_events_fields_and_metrics_are_words():
    for event in chasquid.Events.BY_NAME.values():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", event.name) and event.help
        assert all(re.fullmatch(r"[a-z]+", name) for name in event.fields.values())
        assert not event.mail or next(iter(event.fields)) == "id"
    for metric in chasquid.Metrics.BY_NAME.values():
        assert all(len(values) == len(metric.labels) for values in metric.known)


def test_after_a_rotation_lines_go_into_the_new_file(tmp_path):
    made, (log, _) = logs(tmp_path)
    made.info("a", "before")
    log.rename(tmp_path / "log.1")
    made.info("a", "between")
    made.reopen()
    made.info("a", "after")
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
