# SPDX-License-Identifier: Apache-2.0
"""Room ERRORS: failures, ids, the clock."""

from __future__ import annotations

import re
import time

import chasquid


def test_ids_are_sixteen_digits_and_never_the_same():
    ids = {chasquid.new_id() for _ in range(5000)}
    assert len(ids) == 5000
    assert all(re.fullmatch("[0-9a-f]{16}", ident) for ident in ids)


def test_a_config_error_names_file_and_line():
    error = chasquid.ConfigError("/etc/c.conf", 7, "expected a number")
    assert str(error) == "/etc/c.conf:7: expected a number"
    assert (error.path, error.line) == ("/etc/c.conf", 7)


def test_a_config_error_without_a_line_names_the_file_alone():
    assert str(chasquid.ConfigError("/etc/c.conf", 0, "no")) == "/etc/c.conf: no"


def test_failures_carry_a_status_of_their_class():
    assert chasquid.TemporaryFailure("later").status == "4.0.0"
    assert chasquid.PermanentFailure("never").status == "5.0.0"
    assert chasquid.PermanentFailure("never", "5.1.10").status == "5.1.10"


def test_every_failure_is_caught_as_one_kind():
    for kind in (chasquid.TemporaryFailure, chasquid.PermanentFailure, chasquid.ConfigError):
        assert issubclass(kind, chasquid.ChasquidError)


def test_the_clock_tells_wall_time_and_a_time_that_never_goes_back():
    clock = chasquid.Clock()
    assert abs(clock.time() - time.time()) < 60
    readings = [clock.monotonic() for _ in range(50)]
    assert readings == sorted(readings)


def test_the_reason_of_a_system_error_has_no_number_and_names_the_file():
    try:
        open("/nonexistent/file")  # noqa: SIM115
    except OSError as error:
        assert chasquid.reason(error) == "No such file or directory: /nonexistent/file"


def test_the_reason_of_an_error_without_text_is_its_kind():
    assert chasquid.reason(ValueError()) == "ValueError"
    assert chasquid.reason(ValueError("so")) == "so"
    assert chasquid.reason(OSError("only text")) == "only text"
