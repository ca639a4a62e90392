# SPDX-License-Identifier: Apache-2.0
"""world.py: servers that deliver to each other, without a network, by a clock that moves."""

from __future__ import annotations

import email.message
import os
import re
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import HOUR, Peer, RunningClock
from world import Activity, MailWorld, SubmissionRefused, WorldServer

import chasquid

ANA, EVA = "ana@here.example", "eva@there.example"


@pytest.fixture
def world() -> Iterator[MailWorld]:
    with MailWorld() as world:
        yield world


@pytest.fixture
def here(world: MailWorld) -> WorldServer:
    return world.server("here.example", users={"ana": "secret", "ben": "geheim"})


@pytest.fixture
def there(world: MailWorld) -> WorldServer:
    return world.server("there.example", users={"eva": "secret"})


def message(sender: str = ANA, subject: str = "hello") -> email.message.EmailMessage:
    text = email.message.EmailMessage()
    text["From"], text["To"], text["Subject"] = sender, EVA, subject
    text.set_content("It works.\n")
    return text


def send(server: WorldServer, recipient: str = EVA, subject: str = "hello") -> str:
    return server.submit(ANA, [recipient], message(subject=subject))


def subjects(server: WorldServer, address: str) -> list[str]:
    return [str(letter["Subject"]) for letter in server.mailbox(address)]


def state(server: WorldServer) -> str:
    """Return what became of the only recipient of the only message in the queue."""
    [queued] = server.queue()
    [(_, text)] = queued.recipients
    return text


# --- a delivery ---


def test_the_example_in_the_docstring_works() -> None:
    [example] = re.findall(r"\n\n( +with .*?)\n\n", MailWorld.__doc__ or "", re.DOTALL)
    assert "dkim=pass" in example
    exec(textwrap.dedent(example), {"MailWorld": MailWorld})


def test_a_message_arrives_signed_and_from_an_address_that_may_send_it(world: MailWorld) -> None:
    here = world.server(
        "here.example", users={"ana": "secret"}, dkim=True, spf="v=spf1 mx -all"
    )  # fmt: skip
    there = world.server("there.example", users={"eva": "secret"})
    id = send(here)
    world.settle()
    [arrived] = there.mailbox(EVA)
    assert isinstance(arrived, email.message.EmailMessage)
    results = arrived["Authentication-Results"]
    assert "spf=pass" in results and "dkim=pass header.d=here.example" in results
    assert here.address in arrived["Received-SPF"]
    assert arrived.get_content() == "It works.\n"
    assert here.queue() == []
    assert re.search(rf"event=delivered id={id} from=<{ANA}> to=<{EVA}>", here.log)


def test_a_key_of_rsa_is_made_where_it_is_asked_for(world: MailWorld) -> None:
    here = world.server("here.example", users={"ana": "secret"}, dkim="rsa2048")
    there = world.server("there.example", users={"eva": "secret"})
    assert "k=rsa" in world.dns["world._domainkey.here.example", "TXT"][0]
    send(here)
    world.settle()
    assert "dkim=pass" in there.mailbox(EVA)[0]["Authentication-Results"]


def test_the_servers_trust_each_others_certificates(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    send(here)
    world.settle()
    assert "there.example is now PLAIN and TLS_SECURE" in here.log
    late = world.server("late.example", users={"eva": "secret"})
    send(here, "eva@late.example")
    world.settle()
    assert len(late.mailbox("eva@late.example")) == 1
    assert "late.example is now PLAIN and TLS_SECURE" in here.log


def test_spf_refuses_an_address_that_the_record_does_not_name(
    world: MailWorld, there: WorldServer
) -> None:
    forger = world.server(
        "here.example", users={"ana": "secret"}, spf="v=spf1 ip4:198.51.100.7 -all"
    )  # fmt: skip
    send(forger)
    world.settle()
    assert there.mailbox(EVA) == []
    assert "code=550 status=5.7.23" in there.log + forger.log
    assert f"does not let {forger.address} send its mail" in forger.log
    [bounce] = forger.mailbox(ANA)
    assert "5.7.23" in bounce.as_string()


def test_an_alias_forwards_by_way_of_a_third_server(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    middle = world.server(
        "middle.example", users={"ida": "secret"}, aliases=f"team: ida, {EVA}\n",
        spf="v=spf1 mx -all",
    )  # fmt: skip
    world.dns["here.example", "TXT"] = ["v=spf1 mx -all"]
    send(here, "team@middle.example")
    world.settle()
    assert subjects(middle, "ida@middle.example") == ["hello"]
    [arrived] = there.mailbox(EVA)
    assert middle.host in arrived["Received"]
    assert "spf=pass" in arrived["Authentication-Results"]
    assert arrived["Return-Path"] == "<team+fwd_from=ana=here.example@middle.example>"


def test_to_settle_is_to_wait_for_the_whole_way(world: MailWorld, here: WorldServer) -> None:
    count = 5
    for number in range(count):
        onward = f"team@s{number + 1}.example" if number + 1 < count else "ida"
        world.server(f"s{number}.example", users={"ida": "secret"}, aliases=f"team: {onward}\n")
    for number in range(4):
        send(here, "team@s0.example", subject=str(number))
        world.settle()
        assert len(world.servers[-1].mailbox(f"ida@s{count - 1}.example")) == number + 1


def test_who_began_something_while_others_were_asked_is_asked_again(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    found, begun = here.activity, []

    def activity() -> Activity:
        begun.append(min(len(begun), 3))  # it rests whenever it is asked, but was busy between
        return found()._replace(begun=begun[-1])

    here.activity = activity  # type: ignore[method-assign]
    world.settle()
    assert begun == [0, 1, 2, 3, 3]


def test_mail_in_a_circle_ends(world: MailWorld) -> None:
    here = world.server(
        "here.example", users={"ana": "secret"}, aliases="ring: ring@back.example\n",
        max_received_headers=12,
    )  # fmt: skip
    world.server("back.example", aliases="ring: ring@here.example\n")
    here.submit(ANA, ["ring@back.example"], message())
    world.settle()
    assert all(server.queue() == [] for server in world.servers)
    assert "status=5.4.6" in here.log
    assert here.mailbox(ANA) == []  # each has put itself in the sender's place


def test_mail_that_is_junk_is_in_its_folder(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    world.dns["_dmarc.here.example", "TXT"] = ["v=DMARC1; p=quarantine"]
    send(here)
    world.settle()
    assert there.mailbox(EVA) == []
    assert [letter["Subject"] for letter in there.mailbox(EVA, folder="Junk")] == ["hello"]


def test_a_mailbox_holds_what_was_read_too_and_in_order(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    for subject in ("one", "two", "three"):
        send(here, subject=subject)
        world.settle()
    maildir = Path(there.daemon.config.data_dir, "mail", "there.example", "eva")
    read = next(path for path in maildir.glob("new/*") if b"Subject: two" in path.read_bytes())
    (maildir / "cur").mkdir(exist_ok=True)
    read.rename(maildir / "cur" / f"{read.name}:2,S")
    assert subjects(there, EVA) == ["one", "two", "three"]


def test_what_is_submitted_may_be_text_or_octets(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    here.submit(ANA, [EVA], "Subject: text\n\n.\nüber\n")
    here.submit(ANA, EVA, b"Subject: octets\r\n\r\nx\r\n")
    world.settle()
    assert sorted(subjects(there, EVA)) == ["octets", "text"]
    first = next(letter for letter in there.mailbox(EVA) if letter["Subject"] == "text")
    assert first.get_payload(decode=True) == ".\nüber\n".encode()


def test_a_program_submits_by_itself(here: WorldServer) -> None:
    with here.client(465, "me.invalid") as client:
        client.login(ANA, "secret")
        client.send_message(message(), ANA, ["ben@here.example"])
    with here.client(25, "me.invalid") as client:
        client.sendmail("", ["ana@here.example"], b"Subject: from nobody\r\n\r\n")
    assert "peer=127.0.0.1 port=smtp helo=me.invalid" in here.log


# --- retries ---


def test_a_server_that_stays_away_is_given_up_after_twenty_hours(
    world: MailWorld,
    here: WorldServer,
    there: WorldServer,
    record_property: Callable[[str, object], None],
) -> None:
    there.stop_listening()
    id, start, real = send(here), world.now, time.monotonic()
    pauses: list[float] = []
    notices: list[tuple[float, str]] = []

    def bounced() -> bool:
        for queued in here.queue():
            if queued.id == id and queued.attempts > len(pauses):
                pauses.append(queued.next_attempt - world.now)
        for subject in subjects(here, ANA)[len(notices) :]:
            notices.append((world.now - start, subject))
        return len(notices) == 2

    assert world.run_until(bounced, hours=30)
    record_property("seconds", time.monotonic() - real)
    print(f"twenty hours took {time.monotonic() - real:.2f} seconds")
    assert pauses[:4] == pytest.approx([60, 300, 600, 1200], abs=5)
    assert pauses[4:] == pytest.approx([1200] * (len(pauses) - 4), abs=5)
    assert len(pauses) == pytest.approx(63, abs=1)
    (delay, delayed), (end, failed) = notices
    assert (delayed, failed) == (
        "Mail delivery is taking longer", "Mail delivery failed: returning message to sender",
    )  # fmt: skip
    assert 4 * HOUR <= delay <= 4 * HOUR + 1300
    assert 20 * HOUR <= end <= 20 * HOUR + 1300
    assert there.mailbox(EVA) == [] and here.queue() == []
    bounce = here.mailbox(ANA)[-1]
    assert "not delivered within 20h" in bounce.as_string()
    assert "[192.0.2.2]:25: Connection refused" in bounce.as_string()


def test_a_server_that_comes_back_gets_its_mail(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    there.stop_listening()
    send(here)
    world.advance(hours=1)
    assert state(here).startswith("deferred: ") and "Connection refused" in state(here)
    there.listen_again()
    there.listen_again()  # does no harm
    world.settle()
    assert there.mailbox(EVA) == []  # the clock has not moved
    [arrived] = world.run_until(lambda: there.mailbox(EVA), hours=1)
    assert arrived["Subject"] == "hello"
    world.advance(hours=40)
    assert here.mailbox(ANA) == [] and here.queue() == []


def test_who_does_not_listen_refuses_programs_too(here: WorldServer) -> None:
    here.stop_listening()
    here.stop_listening()  # does no harm
    with pytest.raises(ConnectionRefusedError):
        here.client(25)
    with pytest.raises(chasquid.ChasquidError, match="here.example cannot be talked to"):
        send(here)
    here.listen_again()
    send(here)


def test_the_clock_stops_at_every_attempt_on_the_way(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    there.stop_listening()
    send(here)
    world.settle()
    start = world.now
    world.advance(minutes=16, seconds=30)
    assert world.now - start == pytest.approx(16.5 * 60, abs=5)
    [queued] = here.queue()
    assert queued.attempts == 4  # at once, and after 1, 6 and 16 minutes
    assert queued.next_attempt - world.now == pytest.approx(1200 - 30, abs=5)


def test_a_dns_that_fails_is_asked_again(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    world.dns.fail("there.example")
    send(here)
    world.settle()
    assert "no name server answers for there.example MX" in state(here)
    world.dns.mend("there.example")
    assert world.run_until(lambda: there.mailbox(EVA), minutes=5)


def test_a_table_that_changes_holds_at_once(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    other = world.server("other.example", users={"eva": "secret"})
    send(here)
    world.settle()
    assert len(there.mailbox(EVA)) == 1
    world.dns["there.example", "MX"] = ["10 mx.other.example."]
    send(here)
    world.settle()
    assert "status=5.7.1" in here.log and other.address in here.log
    assert len(there.mailbox(EVA)) == 1
    del world.dns["there.example", "MX"]
    world.dns["there.example", "CNAME"] = ["there.invalid."]
    send(here)
    world.settle()
    assert "the domain there.example does not exist" in here.log


def test_a_null_mx_fails_at_once(world: MailWorld, here: WorldServer, there: WorldServer) -> None:
    world.dns["there.example", "MX"] = ["0 ."]
    send(here)
    world.settle()
    [bounce] = here.mailbox(ANA)
    assert "accepts no mail (null MX)" in bounce.as_string()


def test_exchangers_are_tried_in_turn(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    world.dns["mx.dead.example", "A"] = ["192.0.2.200"]
    world.dns["there.example", "MX"] = ["20 mx.there.example.", "10 mx.dead.example."]
    send(here)
    world.settle()
    assert subjects(there, EVA) == ["hello"]


def test_a_policy_of_mta_sts_is_fetched_and_obeyed(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    world.dns["_mta-sts.there.example", "TXT"] = ["v=STSv1; id=1;"]
    world.policies["there.example"] = (
        "version: STSv1\nmode: enforce\nmx: mx.elsewhere.example\nmax_age: 86400\n"
    )
    send(here)
    world.settle()
    assert there.mailbox(EVA) == [] and "MTA-STS" in state(here)
    world.dns["_mta-sts.there.example", "TXT"] = ["v=STSv1; id=2;"]
    world.policies["there.example"] = (
        "version: STSv1\nmode: enforce\nmx: *.there.example\nmax_age: 86400\n"
    )
    assert world.run_until(lambda: there.mailbox(EVA), minutes=5)


def test_signed_names_and_a_tlsa_record_make_dane(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    world.dns.sign("there.example")
    world.dns["_25._tcp.mx.there.example", "TLSA"] = ["3 1 1 " + "00" * 32]
    send(here)
    world.settle()
    assert "the certificate matches no TLSA record" in state(here)
    del world.dns["_25._tcp.mx.there.example", "TLSA"]
    assert world.run_until(lambda: there.mailbox(EVA), minutes=5)


def test_a_server_of_the_test_stands_in(world: MailWorld, here: WorldServer) -> None:
    script = """
        S: 220 odd.example
        C: EHLO mx.here.example
        S: 250 odd.example
        C: MAIL FROM:…
        S: 250 yes
        C: RCPT TO:<eva@odd.example>
        S: 451 4.7.1 not so fast
        C: …
        S: 250 well
        * close
    """
    with Peer(script) as peer:
        address = world.stand_in("mx.odd.example", peer.port)
        world.dns.add("odd.example MX 10 mx.odd.example.")
        send(here, "eva@odd.example")
        world.settle()
    assert "451 4.7.1 not so fast" in state(here)
    assert f"mx.odd.example ({address}:25)" in here.log


def test_a_smarthost_takes_all_that_leaves(world: MailWorld, there: WorldServer) -> None:
    smart = world.server("smart.example", users={"us": "word"})
    password = Path(smart.config_dir, "password-of-here")
    password.write_text("word\n")
    here = world.server(
        "here.example", users={"ana": "secret"}, smarthost="mx.smart.example:587",
        smarthost_user="us@smart.example", smarthost_password_file=str(password),
    )  # fmt: skip
    send(here)
    world.settle()
    assert subjects(there, EVA) == ["hello"]
    assert f"peer={smart.address} port=smtp helo=mx.smart.example" in there.log
    assert "user=us@smart.example" in smart.log


# --- the walls of the world ---


@pytest.mark.parametrize("place", ["203.0.113.9", "127.0.0.1", "192.0.2.77"])
def test_what_is_outside_refuses_connections(
    world: MailWorld, here: WorldServer, place: str
) -> None:
    send(here, f"eva@[{place}]")
    world.settle()
    assert f"cannot connect to [{place}]:25: Connection refused" in state(here)


def test_two_worlds_know_nothing_of_each_other(world: MailWorld, here: WorldServer) -> None:
    with MailWorld() as other:
        same = other.server("here.example", users={"ana": "other"})
        eva = other.server("there.example", users={"eva": "secret"})
        other.advance(hours=100)
        send(here)
        send(same)
        world.settle()
        other.settle()
        assert same.address == here.address
        assert other.now - world.now == pytest.approx(100 * HOUR, abs=60)
        assert subjects(eva, EVA) == ["hello"]
    [bounce] = here.mailbox(ANA)
    assert "the domain there.example does not exist" in bounce.as_string()


def test_nothing_is_left_behind() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def once() -> WorldServer:
        with MailWorld() as world:
            here = world.server("here.example", users={"ana": "secret"})
            there = world.server("there.example", users={"eva": "secret"})
            send(here)
            there.stop_listening()
            world.settle()
            send(here)
            assert os.path.isdir(here.config_dir)
        return here

    once()  # what is loaded once may stay
    threads, files = set(threading.enumerate()), open_files()
    here = once()
    assert set(threading.enumerate()) == threads
    assert open_files() == files
    top = Path(here.config_dir).parent.parent
    assert not top.exists()


# --- mistakes ---


def test_a_domain_has_one_server(world: MailWorld, here: WorldServer) -> None:
    with pytest.raises(chasquid.ChasquidError, match=r"has a server for here\.example already"):
        world.server("HERE.example")


def test_a_setting_that_is_unknown_is_refused_and_the_world_goes_on(world: MailWorld) -> None:
    with pytest.raises(chasquid.ConfigError, match="'max_queue_item'; is it 'max_queue_items'"):
        world.server("here.example", max_queue_item=3)
    with pytest.raises(chasquid.ChasquidError, match="data_dir is not to be set"):
        world.server("here.example", data_dir="/tmp")
    with pytest.raises(chasquid.ChasquidError, match="expected \"ed25519\", or .* not 'dsa'"):
        world.server("here.example", dkim="dsa")
    here = world.server("here.example", users={"ana": "secret"}, max_queue_items=3)
    assert here.daemon.config.max_queue_items == 3
    world.settle()


def test_a_mailbox_is_that_of_a_user(here: WorldServer) -> None:
    assert here.mailbox(ANA) == [] and here.mailbox("ANA@here.example") == []
    for address in ("eve@here.example", EVA, "ana"):
        with pytest.raises(chasquid.ChasquidError, match=f"here.example has no user {address}"):
            here.mailbox(address)


@pytest.mark.usefixtures("no_pause")
def test_what_a_server_refuses_is_told(here: WorldServer) -> None:
    with pytest.raises(SubmissionRefused) as refused:
        send(here, "nobody@here.example")
    assert refused.value.reply.startswith("550 5.1.1 ")
    with pytest.raises(SubmissionRefused, match="535 5.7.8"):
        here.submit(ANA, [EVA], message(), login=(ANA, "wrong"))
    with pytest.raises(chasquid.ChasquidError, match="has no user eve@here.example: say with"):
        here.submit("eve@here.example", [EVA], message())


def test_the_clock_does_not_go_back(world: MailWorld, here: WorldServer) -> None:
    for move in (
        lambda: world.advance(hours=-1),
        lambda: world.run_until(lambda: True, seconds=-5),
        lambda: world.clock.advance(-1),
        lambda: world.advance(hours=float("nan")),
        lambda: world.advance(hours=float("inf")),
    ):
        with pytest.raises(chasquid.ChasquidError, match="the clock cannot be moved back"):
            move()


def test_what_does_not_come_is_told_with_the_queues_and_the_logs(
    world: MailWorld, here: WorldServer, there: WorldServer
) -> None:
    there.stop_listening()
    id = send(here)
    start = world.now
    with pytest.raises(chasquid.ChasquidError) as failed:
        world.run_until(lambda: there.mailbox(EVA), hours=2)
    text = str(failed.value)
    assert "did not come within 2h 0m of the world's time" in text
    assert "here.example: 1 message in the queue" in text
    assert f"{id} from <{ANA}>, 2h 0m old, next attempt in " in text
    assert "Connection refused" in text
    assert world.now - start == pytest.approx(2 * HOUR, abs=5)


def test_a_session_that_stays_open_is_told(here: WorldServer) -> None:
    with MailWorld(patience=0.3) as world:
        server = world.server("busy.example")
        with (
            server.client(25),
            pytest.raises(chasquid.ChasquidError, match="come to rest .*, with 1 session open"),
        ):
            world.settle()


def test_after_the_end_nothing_works() -> None:
    world = MailWorld()
    here = world.server("here.example", users={"ana": "secret"})
    world.close()
    world.close()  # does no harm
    for use in (
        lambda: world.server("there.example"),
        world.settle,
        lambda: world.advance(hours=1),
        lambda: world.run_until(lambda: True),
        world.report,
        world.__enter__,
    ):
        with pytest.raises(chasquid.ChasquidError, match="this world has ended"):
            use()
    for ask in (here.queue, lambda: send(here), here.stop_listening):
        with pytest.raises(chasquid.ChasquidError, match=r"here\.example runs no more"):
            ask()


def test_a_crash_within_a_server_is_told_at_the_end() -> None:
    world = MailWorld()
    here = world.server("here.example", users={"ana": "secret"})
    here.on_loop(lambda: here.daemon.log.crash("a test", ValueError("of a test")))
    with pytest.raises(chasquid.ChasquidError, match="errors that nobody foresaw"):
        world.close()


def test_an_assertion_that_fails_has_the_logs_with_it() -> None:
    with pytest.raises(AssertionError) as failed, MailWorld() as world:
        here = world.server("here.example", users={"ana": "secret"})
        id = send(here, ANA)
        world.settle()
        assert not here.mailbox(ANA)
    assert f"event=done id={id}" in failed.value.__notes__[0]


def test_a_table_wants_lists_and_whole_lines(world: MailWorld) -> None:
    with pytest.raises(chasquid.ChasquidError, match=r"expected a list of records for a\.example"):
        world.dns["a.example", "A"] = "192.0.2.7"
    with pytest.raises(chasquid.ChasquidError, match="expected name, kind and a record, found"):
        world.dns.add("a.example A")
    with pytest.raises(KeyError):
        del world.dns["a.example", "A"]
    world.dns.add("a.example A 192.0.2.7\n\n  a.example A 192.0.2.8\n")
    assert world.dns["A.example.", "a"] == ["192.0.2.7", "192.0.2.8"]


# --- the clock ---


def test_the_clock_runs_and_is_moved() -> None:
    clock = RunningClock()
    assert clock.time() == pytest.approx(time.time(), abs=5)
    before = clock.monotonic()
    threads = [threading.Thread(target=lambda: clock.advance(10)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.monotonic() - before == pytest.approx(100, abs=5)
    assert clock.time() == pytest.approx(time.time() + 100, abs=5)
