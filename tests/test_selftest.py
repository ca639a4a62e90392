# SPDX-License-Identifier: Apache-2.0
"""Room SELFTEST: what was accepted is looked for everywhere, and what is wrong is found."""

from __future__ import annotations

import os

import pytest

import chasquid
from chasquid import Found

ANA, BOB, GONE = "ana@here.test", "bob@here.test", "gone@here.test"
ID, OTHER = "0123456789abcdef", "fedcba9876543210"
BODY = b"first\r\n.second\r\n\r\nlast\r\n"
MESSAGE = chasquid.selftest_message(ID, BODY)
NOTIFICATION = (
    b"Content-Type: message/delivery-status\n\nFinal-Recipient: rfc822; gone@here.test\n"
    b"Action: failed\n\nX-Selftest: " + ID.encode() + b" " + b"0" * 64 + b"\n"
)
LOST = f"lost: {ID} for {ANA}"


@pytest.fixture
def ledger() -> chasquid.Ledger:
    """A ledger in which Ana is owed a message."""
    ledger = chasquid.Ledger()
    ledger.owe(ID, [ANA])
    return ledger


def figure(ledger: chasquid.Ledger, words: str) -> int:
    """Return the figure whose text has these words."""
    [count] = [count for what, count in ledger.report(1, 1).figures.items() if words in what]
    return count


def test_what_is_nowhere_is_lost(ledger):
    report = ledger.report(3, 5)
    assert report.wrong == (LOST,)
    assert report.figures["lost"] == 1
    assert (report.figures["rounds"], report.figures["kills"]) == (3, 5)
    assert report.text.splitlines()[0] == "       3  rounds"
    assert report.text.splitlines()[-1] == LOST


def test_what_somebody_else_has_is_lost(ledger):
    ledger.find(MESSAGE, BOB, Found.DELIVERED, "bob's")
    assert ledger.report(1, 1).wrong == (LOST,)
    ledger.find(MESSAGE, ANA, Found.DELIVERED, "ana's")
    assert not ledger.report(1, 1).wrong


@pytest.mark.parametrize("added", [b"", b"Return-Path: <a@b>\nReceived: x\n\ty\n"])
@pytest.mark.parametrize("newline", [b"\r\n", b"\n"])
def test_a_message_is_known_with_lines_in_front_and_any_newlines(ledger, added, newline):
    data = (added + MESSAGE.replace(b"\r\n", b"\n")).replace(b"\n", newline)
    ledger.find(data, ANA, Found.DELIVERED, "there")
    assert not ledger.report(1, 1).wrong
    assert figure(ledger, "delivered whole") == 1


@pytest.mark.parametrize(
    "data",
    [MESSAGE[:-1], MESSAGE[:-2], MESSAGE + b"x", MESSAGE.replace(b"second", b"zecond"),
     MESSAGE[:40], b"", b"\0" * len(MESSAGE), MESSAGE.replace(b"\r\n.", b"\r\n..")],
    ids=["an octet less", "a line's end less", "longer", "altered", "cut in its first line",
         "empty", "zeros", "a dot too many"],
)  # fmt: skip
def test_what_is_not_whole_is_damaged_and_does_not_count(ledger, data):
    ledger.find(data, ANA, Found.DELIVERED, "its place")
    lost, damaged = ledger.report(1, 1).wrong
    assert lost == LOST
    assert damaged.startswith("its place: ")


def test_what_nobody_is_owed_must_be_whole_all_the_same(ledger):
    ledger.find(MESSAGE, ANA, Found.DELIVERED, "ana's")
    ledger.find(chasquid.selftest_message(OTHER, BODY), ANA, Found.DELIVERED, "ana's")
    assert not ledger.report(1, 1).wrong
    ledger.find(chasquid.selftest_message(OTHER, BODY)[:-9], ANA, Found.DELIVERED, "ana's")
    assert ledger.report(1, 1).wrong


def test_twice_is_counted_and_no_failure(ledger):
    for _ in range(3):
        ledger.find(MESSAGE, ANA, Found.DELIVERED, "ana's")
    ledger.find(MESSAGE, ANA, Found.QUEUED, "queue")
    assert not ledger.report(1, 1).wrong
    assert figure(ledger, "delivered whole") == 1
    assert figure(ledger, "in the queue") == 0
    assert figure(ledger, "twice") == 2


def test_a_notification_accounts_for_those_it_names(ledger):
    ledger.owe(ID, [GONE])
    ledger.find_notification(NOTIFICATION, "sender's")
    assert figure(ledger, "reported") == 1
    assert ledger.report(1, 1).wrong == (LOST,)
    ledger.find_notification(NOTIFICATION.replace(b"X-Selftest", b"X-Other"), "sender's")
    assert figure(ledger, "damaged") == 1


def test_of_a_run_in_which_nothing_was_accepted_that_can_be_told():
    assert chasquid.Ledger().report(3, 3).accepted == 0


def test_the_program_is_the_module_itself():
    command, place = chasquid.own_program()
    assert os.path.samefile(os.path.join(place, f"{command[-1]}.py"), chasquid.__file__)


def test_a_short_run_passes_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    place = tmp_path / "a place"
    place.mkdir()
    monkeypatch.chdir(tmp_path)
    assert chasquid.main(["selftest", "--rounds", "1", "--seconds", "1", "--dir", "a place"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("       1  rounds\n")
    assert said.endswith("Nothing that was accepted is lost.\n")
    assert "\r" not in said, "progress is for a terminal"
    assert not list(place.iterdir())


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--seconds", "-1"], ["--dir", "/nowhere/x"]])
def test_what_cannot_be_run_is_told_in_a_sentence(words, capsys):
    assert chasquid.main(["selftest", *words]) == 1
    assert capsys.readouterr().err.startswith("chasquid: ")
