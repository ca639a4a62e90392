# SPDX-License-Identifier: Apache-2.0
"""Room RATE LIMITS: who may do how much, and what the server says to those who go over."""

from __future__ import annotations

import contextlib
import os
import select
import types
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    HOST,
    FakeClock,
    RunningClock,
    Server,
    Wire,
    greet,
    login,
    plain_secret,
    searched,
    trusting,
    wait_for,
)

import chasquid

ANA, BEN = "ana@here.example", "ben@here.example"
ONE, OTHER = "192.0.2.1", "192.0.2.2"


def limits(clock: FakeClock | None = None, **settings: Any) -> chasquid.Limits:
    config = chasquid.Config(config_dir="", hostname="mail.example.org", **settings)
    return chasquid.Limits(clock or FakeClock(), config)


# --- who is one client ---


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::1", "::/64"),
        ("local", "local"),
    ],
)
def test_a_client_is_an_address_or_the_first_half_of_one(peer, client):
    assert chasquid.client_of(peer) == client


@searched
@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_all_addresses_of_a_home_are_one_client(address, lower):
    neighbour = type(address)((int(address) >> 64 << 64) | lower)
    stranger = type(address)(int(address) ^ 1 << 64)
    assert chasquid.client_of(str(neighbour)) == chasquid.client_of(str(address))
    assert chasquid.client_of(str(stranger)) != chasquid.client_of(str(address))


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.10", "::1", "local"])
def test_this_machine_is_exempt_unless_it_is_said_otherwise(peer):
    assert limits().is_exempt(peer)
    assert not limits(limit_loopback=True).is_exempt(peer)


@pytest.mark.parametrize("peer", ["128.0.0.1", "12.7.0.1", "::2", "2001:db8::1", "::127.0.0.1"])
def test_other_machines_are_never_exempt(peer):
    assert not limits().is_exempt(peer)


# --- so many a minute ---


@searched
@given(
    st.integers(1, 20),
    st.lists(st.floats(0, 40, allow_nan=False), min_size=1, max_size=60),
)
def test_no_more_come_through_than_may_and_a_minute_of_rest_restores_all(per_minute, pauses):
    clock = FakeClock(0.0)
    meter = chasquid._Meter(clock, per_minute)
    taken = 0
    for pause in pauses:
        clock.now += pause
        taken += meter.takes("x")
        assert taken <= per_minute * (1 + clock.now / 60) + 1e-6
    clock.now += 60.001
    assert [meter.takes("x") for _ in range(per_minute + 1)] == [True] * per_minute + [False]


def test_many_may_come_at_once_and_then_one_after_the_other():
    clock = FakeClock()
    meter = chasquid._Meter(clock, 6)
    assert [meter.takes("x") for _ in range(8)] == [True] * 6 + [False] * 2
    clock.now += 9.9
    assert not meter.takes("x")
    clock.now += 0.2
    assert meter.takes("x")
    assert not meter.takes("x")
    assert meter.takes("y"), "keys do not share"


def test_what_is_refused_is_not_counted():
    clock = FakeClock()
    meter = chasquid._Meter(clock, 1)
    assert meter.takes("x")
    for _ in range(59):
        clock.now += 1
        assert not meter.takes("x")
    clock.now += 1.001
    assert meter.takes("x")


def test_zero_is_no_limit():
    meter = chasquid._Meter(FakeClock(), 0)
    assert all(meter.takes("x") for _ in range(1000))
    assert not meter._levels


def test_a_meter_forgets_the_idle_before_it_takes_too_much_memory():
    clock = FakeClock()
    meter = chasquid._Meter(clock, 1)
    for number in range(chasquid._METER_LIMIT - 1):
        assert meter.takes(f"idle {number}")
    clock.now += 50
    assert meter.takes("busy")
    clock.now += 11
    for number in range(100):
        assert meter.takes(f"new {number}")
        assert len(meter._levels) <= chasquid._METER_LIMIT
    assert not meter.takes("busy")


def test_a_meter_that_is_full_of_the_busy_is_lenient():
    meter = chasquid._Meter(FakeClock(), 1)
    for number in range(chasquid._METER_LIMIT + 10):
        assert meter.takes(str(number))
        assert len(meter._levels) <= chasquid._METER_LIMIT


def test_messages_and_recipients_are_counted_apart_by_client_or_by_user():
    clock = FakeClock()
    of = limits(
        clock,
        max_messages_per_minute=1,
        max_recipients_per_minute=2,
        max_user_messages_per_minute=3,
        max_user_recipients_per_minute=4,
    )
    for call, peer, user, count, text in (
        (of.message, "2001:db8::1", "", 1, "messages a minute from 2001:db8::/64"),
        (of.recipient, "2001:db8::2", "", 2, "recipients a minute from 2001:db8::/64"),
        (of.message, ONE, ANA, 3, f"messages a minute for {ANA}"),
        (of.recipient, ONE, ANA, 4, f"recipients a minute for {ANA}"),
    ):
        for _ in range(count):
            call(peer, user)
        with pytest.raises(chasquid.TemporaryFailure, match=f"^too many {text}$") as caught:
            call(peer, user)
        assert caught.value.status == "4.7.0"
    of.message("2001:db8:0:1::1", "")
    of.message(ONE, "")
    of.message(ONE, BEN)
    with pytest.raises(chasquid.TemporaryFailure):
        of.message(OTHER, ANA)
    with pytest.raises(chasquid.TemporaryFailure):
        of.message("2001:db8::ffff", "")


def test_nothing_is_counted_on_this_machine():
    of = limits(max_messages_per_minute=1, max_user_recipients_per_minute=1)
    for _ in range(5):
        of.message("127.0.0.1", "")
        of.recipient("::1", ANA)
    strict = limits(max_messages_per_minute=1, limit_loopback=True)
    strict.message("127.0.0.1", "")
    with pytest.raises(chasquid.TemporaryFailure):
        strict.message("127.0.0.1", "")


# --- connections ---


def test_connections_are_counted_for_as_long_as_they_last():
    of = limits(max_connections_per_address=2)
    with of.connection(ONE), contextlib.ExitStack() as stack:
        stack.enter_context(of.connection(ONE))
        text = f"^more than 2 connections from {ONE}$"
        with pytest.raises(chasquid.TemporaryFailure, match=text), of.connection(ONE):
            pass
        with of.connection(OTHER):
            stack.close()
        with of.connection(ONE):
            pass
    assert not of._connections


def test_the_rate_of_connections_is_bounded_as_their_number_is():
    of = limits(max_connections_per_minute=3)
    for _ in range(3):
        with of.connection(ONE):
            pass
    text = f"^too many connections a minute from {ONE}$"
    with pytest.raises(chasquid.TemporaryFailure, match=text), of.connection(ONE):
        pass
    with of.connection(OTHER):
        pass


def test_a_connection_that_ends_in_an_error_is_over_too():
    of = limits(max_connections_per_address=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), of.connection(ONE):
            raise ZeroDivisionError
    assert not of._connections


# --- failed logins ---


def failed(of: chasquid.Limits, peer: str, user: str) -> float:
    of.check_login(peer)
    return of.login_failed(peer, user)


def test_each_failed_login_is_answered_later_than_the_one_before():
    of = limits(max_failed_logins=0)
    waits = [failed(of, ONE, ANA) for _ in range(9)]
    assert waits == [0.5, 1, 2, 4, 8, 16, 20, 20, 20]


def test_failures_add_up_by_user_over_many_addresses_and_by_address_over_many_users():
    of = limits(max_failed_logins=100)
    waits = [failed(of, f"192.0.2.{number}", ANA) for number in range(4)]
    assert waits == [0.5, 1, 2, 4]
    waits = [failed(of, f"2001:db8::{number}", f"user{number}") for number in range(4)]
    assert waits == [0.5, 1, 2, 4]


def test_an_address_that_fails_too_often_is_sent_away_for_an_hour():
    clock = FakeClock()
    of = limits(clock, max_failed_logins=3)
    for _ in range(3):
        failed(of, "2001:db8::1", ANA)
        clock.now += 10
    with pytest.raises(chasquid.TemporaryFailure, match="too many failed logins") as caught:
        of.check_login("2001:db8::2")
    assert caught.value.status == "4.7.0"
    of.check_login("2001:db8:0:1::1")  # the user is locked out nowhere else
    clock.now += 3600 - 31
    with pytest.raises(chasquid.TemporaryFailure):
        of.check_login("2001:db8::1")
    clock.now += 2
    of.check_login("2001:db8::1")
    assert failed(of, "2001:db8:0:2::1", "somebody") == 0.5


def test_a_login_that_succeeds_clears_the_user_and_not_the_address():
    of = limits(max_failed_logins=3)
    for _ in range(2):
        failed(of, ONE, ANA)
    of.login_succeeded(ANA)
    assert failed(of, OTHER, ANA) == 0.5
    assert failed(of, ONE, BEN) == 2
    with pytest.raises(chasquid.TemporaryFailure):
        of.check_login(ONE)


def test_on_this_machine_failed_logins_are_not_held_against_anybody():
    of = limits(max_failed_logins=1)
    assert [failed(of, "127.0.0.1", ANA) for _ in range(5)] == [0.0] * 5
    assert failed(of, ONE, ANA) == 0.5


def test_failures_take_no_more_memory_than_they_may():
    clock = FakeClock()
    failures = chasquid._Failures(clock)
    for _ in range(300):
        failures.add("one")
    assert failures.count("one") == 100
    for number in range(chasquid._METER_LIMIT + 10):
        failures.add(f"user {number}")
        assert len(failures._times) <= chasquid._METER_LIMIT
    clock.now += 3601
    assert failures.count("user 20005") == 0
    assert "user 20005" not in failures._times


# --- the pace ---


@pytest.mark.parametrize(
    ("pieces", "slow"),
    [
        ([(59, 1)], False),  # within the first minute it may be as slow as it likes
        ([(60, 1)], False),
        ([(61, 1)], True),
        ([(61, 6100)], False),
        ([(61, 6099)], True),
        ([(30, 100_000), (600, 1)], False),
        ([(30, 100_000), (1000, 1)], True),
        ([(50, 5000), (50, 4999)], True),
    ],
)
def test_a_message_that_comes_too_slowly_is_given_up(pieces, slow):
    clock = FakeClock()
    pace = chasquid._Pace(clock, 100)
    with pytest.raises(chasquid.Expired) if slow else contextlib.nullcontext():
        for seconds, octets in pieces:
            clock.now += seconds
            pace.check(octets)


def test_without_a_least_pace_none_is_too_slow():
    clock = FakeClock()
    pace = chasquid._Pace(clock, 0)
    clock.now += 100_000
    pace.check(1)


# --- over the wire: clients with addresses of their own ---


def client(server: Server, address: str = ONE, port: str = "smtp") -> Wire:
    wire = server.connect(port)
    kind = "TCP6" if ":" in address else "TCP4"
    wire.send(f"PROXY {kind} {address} {address} 4321 25\r\n".encode())
    if port == "submission over TLS":
        wire.start_tls(trusting())
    return wire


def greeted_from(server: Server, address: str = ONE, port: str = "smtp") -> Wire:
    return greet(client(server, address, port))


def logged_in_from(server: Server, user: str = ANA, address: str = ONE) -> Wire:
    wire = greeted_from(server, address, "submission over TLS")
    assert login(wire, user).startswith("235 ")
    return wire


def counted(server: Server, *name: str) -> int:
    return server.daemon.log.counters[name]


def test_the_connections_of_one_client_are_limited(behind) -> None:
    server = behind(max_connections_per_address=2)
    with greeted_from(server, "2001:db8::1") as first, greeted_from(server, "2001:db8::2"):
        with client(server, "2001:db8::3") as third:
            reply = third.reply()
            assert reply.startswith("421 4.7.0 more than 2 connections from 2001:db8::/64")
            assert third.is_closed()
        with greeted_from(server, "2001:db8:0:1::1"), greeted_from(server, ONE):
            assert first.ask("QUIT").startswith("221 ")
            first.close()
        wait_for(lambda: server.daemon._status().sessions == 1, "the others to end")
        with greeted_from(server, "2001:db8::3"):
            pass
    assert counted(server, "limits", "connections") == 1
    assert (
        'peer=2001:db8::3 port=smtp limit=connections code=421 status=4.7.0 text="more than 2 '
        in server.mail_log
    )


def test_this_machine_may_have_many_connections_unless_it_is_limited_too(behind) -> None:
    server = behind(max_connections_per_address=1)
    with (
        greeted_from(server, "127.0.0.1"),
        greeted_from(server, "::1"),
        greeted_from(server, "127.0.0.1"),
    ):
        pass
    server.stop()
    server = behind("limit_loopback", max_connections_per_address=1)
    with greeted_from(server, "127.0.0.1"), client(server, "127.0.0.1") as second:
        assert second.reply().startswith("421 4.7.0 ")


def test_the_last_places_are_kept_for_clients_that_have_none(behind) -> None:
    server = behind(max_connections=10)
    with contextlib.ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(greeted_from(server, "127.0.0.1"))
        if server.daemon.config.haproxy_incoming:
            server.daemon.config = server.daemon.config._replace(haproxy_incoming=False)
        assert not server.daemon._has_place("127.0.0.1")
        assert server.daemon._has_place(OTHER)


def test_all_connections_together_are_limited(behind) -> None:
    server = behind(max_connections=2)
    with greeted_from(server, "127.0.0.1") as first, greeted_from(server, OTHER):
        with client(server, "192.0.2.3") as third:
            assert third.reply().startswith("421 4.3.2 too many connections")
            assert third.is_closed()
        first.close()
        wait_for(lambda: server.daemon._status().sessions == 1, "the first to end")
        with greeted_from(server, "192.0.2.3"):
            pass
    assert counted(server, "connections", "refused") == 1


def test_the_messages_of_one_client_are_limited(behind) -> None:
    clock = RunningClock()
    server = behind(clock=clock, max_messages_per_minute=2)
    with greeted_from(server) as wire:
        for _ in range(2):
            assert wire.ask("MAIL FROM:<>").startswith("250 ")
            assert wire.ask("RSET").startswith("250 ")
        refusal = f"450 4.7.0 too many messages a minute from {ONE}"
        assert wire.ask("MAIL FROM:<>") == refusal
        with greeted_from(server) as again, greeted_from(server, OTHER) as other:
            assert again.ask("MAIL FROM:<>") == refusal
            assert other.ask("MAIL FROM:<>").startswith("250 ")
        clock.advance(31)
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
    assert counted(server, "limits", "rate") == 2
    fields = f"peer={ONE} port=smtp limit=messages code=450 status=4.7.0 from=<> text="
    assert fields in server.mail_log


def test_the_recipients_of_one_client_are_limited_and_what_was_accepted_goes_on(behind) -> None:
    server = behind(max_recipients_per_minute=2)
    with greeted_from(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        for name in ("ana", "ben"):
            assert wire.ask(f"RCPT TO:<{name}@here.example>").startswith("250 ")
        reply = wire.ask("RCPT TO:<ana+x@here.example>")
        assert reply == f"450 4.7.0 too many recipients a minute from {ONE}"
        assert wire.ask("DATA").startswith("354 ")
        assert wire.ask("Subject: x\r\n\r\n.").startswith("250 ")
    assert len(server.mail("ana")) == len(server.mail("ben")) == 1


def test_recipients_above_the_limit_do_not_keep_a_message_from_the_others(behind) -> None:
    server = behind(max_recipients_per_minute=1)
    with greeted_from(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        for _ in range(5):
            assert wire.ask("RCPT TO:<ben@here.example>").startswith("450 4.7.0 ")
        assert wire.ask("DATA").startswith("354 ")


def test_unknown_recipients_count_too(behind) -> None:
    server = behind(max_recipients_per_minute=2)
    with greeted_from(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        replies = [wire.ask(f"RCPT TO:<guess{n}@here.example>")[:4] for n in range(3)]
    assert replies == ["550 ", "550 ", "450 "]


def test_users_have_limits_of_their_own_wherever_they_are(behind) -> None:
    server = behind(
        max_messages_per_minute=1, max_user_messages_per_minute=2, max_user_recipients_per_minute=1
    )
    with logged_in_from(server) as wire, logged_in_from(server, address=OTHER) as elsewhere:
        assert wire.ask(f"MAIL FROM:<{ANA}>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{BEN}>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{ANA}>") == f"450 4.7.0 too many recipients a minute for {ANA}"
        assert elsewhere.ask(f"MAIL FROM:<{ANA}>").startswith("250 ")
        assert elsewhere.ask("RSET").startswith("250 ")
        reply = elsewhere.ask(f"MAIL FROM:<{ANA}>")
        assert reply == f"450 4.7.0 too many messages a minute for {ANA}"
    with logged_in_from(server, BEN) as wire:
        assert wire.ask(f"MAIL FROM:<{BEN}>").startswith("250 ")


def test_on_this_machine_messages_are_not_counted(behind) -> None:
    server = behind(max_messages_per_minute=1, max_recipients_per_minute=1)
    with greeted_from(server, "127.0.0.1") as wire:
        for _ in range(3):
            assert wire.ask("MAIL FROM:<>").startswith("250 ")
            assert wire.ask(f"RCPT TO:<{ANA}>").startswith("250 ")
            assert wire.ask("RSET").startswith("250 ")


class Patient(RunningClock):
    """A clock that stands but for what it is moved by hand."""

    def monotonic(self) -> float:
        return 1000.0 + self._ahead


def try_login(
    server: Server, clock: Patient, address: str, user: str = ANA, password: str = "wrong"
) -> tuple[str, float]:
    """Log in; return the reply, and how many seconds it was late, on the server's clock."""
    before = server.mail_log.count("event=login-failed")
    with greeted_from(server, address, "submission over TLS") as wire:
        wire.say(f"AUTH PLAIN {plain_secret(user, password)}")
        wait_for(lambda: server.mail_log.count("event=login-failed") > before, "the login to fail")
        late = 0.0
        server.settle()
        while not select.select([wire.socket], [], [], 0)[0]:
            assert late < 30, "the reply is later than it may be"
            clock.advance(0.25)
            late += 0.25
            server.settle()
        return wire.reply(), late


def test_who_guesses_passwords_waits_longer_and_longer_and_is_sent_away(behind) -> None:
    clock = Patient()
    server = behind(clock=clock, max_failed_logins=4)
    lates = []
    for number in range(4):
        reply, late = try_login(server, clock, f"2001:db8::{number}")
        assert reply.startswith("535 5.7.8 ")
        lates.append(late)
    assert [round(late) for late in lates] == [0, 1, 2, 4]
    with greeted_from(server, "2001:db8::9", "submission over TLS") as wire:
        reply = wire.ask(f"AUTH PLAIN {plain_secret(ANA, 'secret')}")
        assert reply.startswith("454 4.7.0 too many failed logins from your address")
        assert wire.is_closed()
    assert "limit=logins code=454 status=4.7.0 " in server.mail_log
    assert server.mail_log.count(f"user={ANA}") == 4
    assert counted(server, "logins", "failed") == 4
    assert counted(server, "logins", "not checked") == 1
    with logged_in_from(server, ANA, ONE):
        pass  # others cannot lock her out
    clock.advance(3600)
    with logged_in_from(server, ANA, "2001:db8::9"):
        pass


def test_another_way_to_write_a_user_does_not_start_anew(behind) -> None:
    clock = Patient()
    server = behind(clock=clock)
    lates = []
    for number, user in enumerate((ANA, "ANA@here.example", "Ana@HERE.example")):
        lates.append(try_login(server, clock, f"192.0.2.{number}", user)[1])
    assert [round(late) for late in lates] == [0, 1, 2]


def test_on_this_machine_a_failed_login_takes_as_long_as_ever(behind) -> None:
    clock = Patient()
    server = behind(clock=clock, max_failed_logins=1)
    for _ in range(4):
        reply, late = try_login(server, clock, "127.0.0.1")
        assert reply.startswith("535 ")
        assert late == 0.5


@pytest.mark.parametrize("command", ["DATA", "BDAT 100000"])
def test_a_sender_that_is_too_slow_is_sent_away(behind, command) -> None:
    clock = RunningClock()
    server = behind(clock=clock, min_octets_per_second=100)
    with greeted_from(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{ANA}>").startswith("250 ")
        wire.say(command)
        if command == "DATA":
            assert wire.reply().startswith("354 ")
        wire.send(b"Subject: x\r\n\r\n")
        for _ in range(2):
            server.settle()
            clock.advance(35)
            wire.send(b"x\r\n")
        assert wire.reply().startswith("421 4.4.2 Timeout exceeded")
        assert wire.is_closed()
    wait_for(lambda: not server.queued(), "the draft to be thrown away")


def test_a_sender_that_is_slow_enough_gets_through(behind) -> None:
    clock = RunningClock()
    server = behind(clock=clock, min_octets_per_second=1)
    with greeted_from(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{ANA}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        for _ in range(4):
            server.settle()
            clock.advance(35)
            wire.send(b"X-Line: " + b"x" * 50 + b"\r\n")
        assert wire.ask(".").startswith("250 ")
    assert len(server.mail("ana")) == 1


# --- the disk ---


def test_a_disk_that_is_nearly_full_is_said_at_mail(behind, monkeypatch) -> None:
    disk = types.SimpleNamespace(f_bavail=99, f_blocks=1000, f_frsize=1024)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    server = behind(min_free_disk_mb=10**9)
    with greeted_from(server) as wire:
        assert wire.ask("MAIL FROM:<>") == "451 4.3.1 the disk is nearly full"
    with logged_in_from(server) as wire:
        assert wire.ask(f"MAIL FROM:<{ANA}>").startswith("451 4.3.1 ")


def test_a_disk_that_fills_up_meanwhile_is_said_at_data(behind, monkeypatch) -> None:
    disk = types.SimpleNamespace(f_bavail=100 * 1024, f_blocks=1024**2, f_frsize=1024)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    clock = RunningClock()
    server = behind(clock=clock)
    with greeted_from(server) as wire:
        for free, reply in ((50 * 1024 - 1, "451 4.3.1 "), (50 * 1024, "354 ")):
            disk.f_bavail = 100 * 1024
            clock.advance(3)
            assert wire.ask("RSET").startswith("250 ")
            assert wire.ask("MAIL FROM:<>").startswith("250 ")
            assert wire.ask(f"RCPT TO:<{ANA}>").startswith("250 ")
            disk.f_bavail = free
            clock.advance(3)
            assert wire.ask("DATA").startswith(reply)
        assert wire.ask("Subject: x\r\n\r\n.").startswith("250 ")
    assert len(server.mail("ana")) == 1


def test_a_tenth_of_a_small_disk_is_enough(behind, monkeypatch) -> None:
    disk = types.SimpleNamespace(f_bavail=100, f_blocks=1000, f_frsize=1024)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with greeted_from(behind()) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")


def test_without_a_least_room_a_disk_may_be_filled(behind, monkeypatch) -> None:
    none = types.SimpleNamespace(f_bavail=0, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: none)
    with greeted_from(behind(min_free_disk_mb=0)) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")


# --- users write as themselves ---

ALIASES = {
    "here.example": (
        "info: ana, ben\n"
        "sales: info\n"
        "ben: ben@far.example\n"
        "robot: | /bin/cat\n"
        "far: ana@far.example\n"
    ),
    "also.example": "*: *@here.example\n",
}


@pytest.fixture
def strict(behind) -> Server:
    return behind("sender_must_match", aliases=ALIASES)


def write(server: Server, *fields: str, sender: str = ANA, user: str = ANA) -> str:
    """Submit a message with these fields; return the last reply."""
    with logged_in_from(server, user) as wire:
        reply = wire.ask(f"MAIL FROM:<{sender}>")
        if reply.startswith("250 "):
            assert wire.ask(f"RCPT TO:<{ANA}>").startswith("250 ")
            assert wire.ask("DATA").startswith("354 ")
            wire.send("".join(f"{field}\r\n" for field in fields).encode("latin-1"))
            reply = wire.ask("Subject: x\r\n\r\n.")
        return reply


OWN = [ANA, "ANA@Here.Example", "ana+lists@here.example", "a.n.a@here.example",
       "info@here.example", "sales@here.example", "ana@also.example"]  # fmt: skip
FOREIGN = [BEN, "robot@here.example", "far@here.example", "nobody@here.example", "eve@far.example",
           "ana@far.example", "ben@also.example", "ana@here.example.far.example"]  # fmt: skip


@pytest.mark.parametrize("sender", ["", *OWN])
def test_a_user_may_send_as_itself_and_as_its_aliases(strict: Server, sender: str) -> None:
    assert write(strict, f"From: {ANA}", sender=sender).startswith("250 ")


@pytest.mark.parametrize("sender", FOREIGN)
def test_a_user_may_not_send_as_somebody_else(strict: Server, sender: str) -> None:
    reply = write(strict, f"From: {ANA}", sender=sender)
    assert reply.startswith(f"550 5.7.1 {ANA} may not send as {sender}: ")


@pytest.mark.parametrize(
    "fields",
    [
        *([f"From: {address}"] for address in OWN),
        [f"From: Ana <{ANA}>"],
        [f'From: "eve@far.example" <{ANA}>'],
        [f"From: {ANA} (eve@far.example)"],
        [f"From: {ANA}, Info <info@here.example>"],
        [f"From:\r\n\t<{ANA}>\r\n\t"],
        [f"From : {ANA}"],
        [f"From: {ANA}", "From: info@here.example"],
        [f"From: {ANA}", "Sender: eve@far.example", "Reply-To: eve@far.example"],
        ["To: eve@far.example"],
    ],
    ids=str,
)
def test_a_user_may_write_as_itself_and_as_its_aliases(strict: Server, fields: list[str]) -> None:
    assert write(strict, *fields).startswith("250 ")


@pytest.mark.parametrize(
    "fields",
    [
        *([f"From: {address}"] for address in FOREIGN),
        [f'From: "{ANA}" <{BEN}>'],
        [f"From: {BEN} ({ANA})"],
        [f"From: {ANA}, {BEN}"],
        [f"From: {BEN}, {ANA}"],
        [f"From: Group: {ANA}, {BEN};"],
        [f"From: {ANA}", f"From: {BEN}"],
        [f"fRoM:\r\n {BEN}"],
        [f"From: {BEN} {ANA}"],
        [f"From: <{ANA}> {BEN}"],
        [f"From: <{BEN}> (<{ANA}>)"],
        [f"From: {ANA}@far.example"],
    ],
    ids=str,
)
def test_a_user_may_not_write_as_somebody_else(strict: Server, fields: list[str]) -> None:
    assert write(strict, *fields).startswith(f"554 5.7.1 {ANA} may not write as ")
    assert not strict.mail("ana")


@pytest.mark.parametrize(
    "field",
    [
        f"From: {ANA} (not closed",
        f'From: "not closed <{ANA}>',
        "From: undisclosed:;",
        f"From: {ANA}, <>",
        "From: ana",
        "From: ana@here..example",
        "From: \xff@here.example",
        f"From: {BEN}\\, <{ANA}>",
    ],
)
def test_an_author_that_cannot_be_read_is_nobodys(behind, field: str) -> None:
    server = behind("sender_must_match")
    reply = write(server, field)
    server.daemon.log.counters.pop(("crashes",), None)  # the reply tells of it
    assert reply.startswith("554 5.7.1 ")


@pytest.mark.parametrize(
    "field",
    [f"From: <{BEN}> <{ANA}>", f"From: <{BEN} <{ANA}>", f'From: {BEN}\\" <{ANA}>'],
)
def test_a_second_address_in_brackets_is_not_overlooked(strict: Server, field: str) -> None:
    assert write(strict, field).startswith("554 5.7.1 ")


def test_a_user_who_has_all_mail_sent_on_may_still_send(strict: Server) -> None:
    assert write(strict, f"From: {BEN}", sender=BEN, user=BEN).startswith("250 ")


def test_who_has_not_logged_in_may_write_as_anybody(strict: Server) -> None:
    with greeted_from(strict) as wire:
        assert wire.ask(f"MAIL FROM:<{BEN}>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{ANA}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        assert wire.ask(f"From: {BEN}\r\nSubject: x\r\n\r\n.").startswith("250 ")


def test_unless_it_is_asked_for_users_may_write_as_anybody(behind) -> None:
    server = behind()
    assert write(server, "From: eve@far.example", sender="eve@far.example").startswith("250 ")
    assert HOST in server.mail("ana")[0].decode()


def test_many_guesses_at_once_are_not_more_guesses(behind: Callable[..., Server]) -> None:
    server = behind(max_failed_logins=5)
    guess = f"AUTH PLAIN {plain_secret(ANA, 'wrong')}"
    with contextlib.ExitStack() as stack:
        wires = [
            stack.enter_context(greeted_from(server, ONE, "submission over TLS")) for _ in range(20)
        ]
        for wire in wires:
            wire.say(guess)
        wait_for(lambda: counted(server, "logins", "not checked") >= 10, "guesses to be refused")
    assert counted(server, "logins", "failed") <= 7  # two may be under way when the fifth fails
