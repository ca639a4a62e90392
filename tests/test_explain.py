# SPDX-License-Identifier: Apache-2.0
"""Room COMMANDS: `explain`, the story of a message, from the mail log and the queue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import (
    Ended,
    Serve,
    Server,
    Zone,
    complaint,
    config_text,
    greeted,
    play,
    run_command,
    wait_for,
)
from test_notifications import ANA, BEN, EVA, LATER, PASSED_ON, REFUSED, Far, send

import chasquid

ID, OTHER = "abcdefghij234", "zzzzzzzzzz777"
CAME = (
    f"from=<{EVA}> to=<{ANA}> size=512 peer=192.0.2.7 port=smtp helo=client.example "
    'tls="TLSv1.3 TLS_AES_256_GCM_SHA384" spf=pass dkim=pass,fail dmarc=pass'
)


def line(event: str, id: str, fields: str = "") -> str:
    """Return what the mail log says of an event, after the time."""
    return f"event={event} id={id} {fields}".rstrip()


class Teller:
    """Runs the command on a configuration directory."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.log = directory / "mail.log"
        self._capsys = capsys

    def configure(self, **settings: object) -> None:
        defaults = {
            "hostname": "mail.here.example", "data_dir": self.directory / "data",
            "mail_log_path": self.log,
        }  # fmt: skip
        (self.directory / "chasquid.conf").write_text(config_text({**defaults, **settings}))

    def explain(self, what: str, config_dir: Path | None = None) -> Ended:
        return run_command(self._capsys, config_dir or self.directory, "explain", what)

    def story(self, what: str, config_dir: Path | None = None) -> str:
        """Return what is told of `what`, which must be known."""
        told = self.explain(what, config_dir)
        assert (told.status, told.err) == (0, "")
        return told.out

    def fails(self, what: str) -> str:
        """Return the sentence with which the command ends."""
        return complaint(self.explain(what))

    def write(self, *lines: str, name: str = "mail.log") -> None:
        """Write a log of these lines, a second apart."""
        text = "".join(
            f"2026-10-01 12:00:{second:02}.000 {line}\n" for second, line in enumerate(lines)
        )
        (self.directory / name).write_text(text)


@pytest.fixture
def teller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Teller:
    made = Teller(tmp_path, capsys)
    made.configure()
    return made


# --- with a server ---


def test_of_a_message_that_was_delivered_the_whole_story_is_told(
    serve: Serve, teller: Teller
) -> None:
    server = serve(ask=Zone({("there.example", "TXT"): ["v=spf1 ip4:127.0.0.1 -all"]}).ask)
    id = send(server, EVA, ANA)
    wait_for(lambda: f"event=done id={id}" in server.mail_log, "the delivery")
    story = teller.story(id, server.config_dir)
    head, came, went, done = story.splitlines()
    assert head == f"{id}:"
    assert "Came in by smtp from 127.0.0.1, which called itself client.example, without TLS" in came
    assert f"octets from <{EVA}> to {ANA}." in came
    assert came.endswith("SPF pass, DKIM none, DMARC none.")
    assert f"For {ANA}: delivered. stored as " in went
    assert done.endswith("Done after 1 attempt.")
    assert all(
        re.match(r"  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  ", x) for x in (came, went, done)
    )


def test_of_what_a_user_has_sent_the_user_is_named(serve: Serve, teller: Teller) -> None:
    server = serve(remote=Far({EVA: [PASSED_ON]}))
    id = send(server, ANA, EVA)
    wait_for(lambda: f"event=done id={id}" in server.mail_log, "the delivery")
    story = teller.story(id, server.config_dir)
    assert f"Came in by submission over TLS from user {ANA}, with TLSv1.3 " in story
    assert f"For {EVA}: delivered. mx.there.example says 250 2.0.0 got it" in story
    assert "SPF" not in story


def test_of_what_waits_the_reason_and_the_next_attempt_are_told(
    serve: Serve, teller: Teller
) -> None:
    server = serve(remote=Far({EVA: [LATER]}), random=lambda: 0.5)
    id = send(server, ANA, EVA, BEN)
    wait_for(  # it is in the log a moment before it is in the file
        lambda: "next attempt in" in teller.story(id, server.config_dir), "the first attempts"
    )
    lines = teller.story(id, server.config_dir).splitlines()
    assert any(f"For {EVA}: not yet delivered. mx.there.example says" in line for line in lines)
    assert lines[-3] == "  It is in the queue, next attempt in 1m:"
    assert lines[-2] == f"    {EVA}  deferred: mx.there.example says 450 later"
    assert lines[-1].startswith(f"    {BEN}  sent: stored as ")


def test_a_failure_and_its_notification_are_linked_both_ways(serve: Serve, teller: Teller) -> None:
    server = serve(remote=Far({EVA: [REFUSED]}))
    id = send(server, ANA, EVA)
    wait_for(lambda: server.mail_log.count("event=done ") == 2, "the notification")
    story = teller.story(id, server.config_dir)
    assert f"For {EVA}: not delivered. mx.there.example says 550 no" in story
    match = re.search(r"The sender was written to about it: (\S{16})\.", story)
    assert match is not None
    told = teller.story(match[1], server.config_dir)
    assert f"Written here as a notification about {id}: " in told
    assert f"from <> to {ANA}." in told
    assert f"For {ANA}: delivered." in told
    assert "The sender was written to" not in told


def test_of_a_message_that_the_log_does_not_know_the_queue_tells(
    serve: Serve, teller: Teller
) -> None:
    server = serve(remote=Far({EVA: [LATER]}))
    id = send(server, ANA, EVA)
    server.wait_for_attempts()
    (server.directory / "mail.log").write_text("")
    for what in (id, EVA, ANA, EVA.upper()):
        story = teller.story(what, server.config_dir)
        assert story.startswith(f"{id}:\n  It is in the queue, ")
        assert f"{EVA}  deferred: mx.there.example says 450 later" in story


def test_of_an_address_all_its_messages_and_sessions_are_told(serve: Serve, teller: Teller) -> None:
    server = serve(remote=Far({EVA: [LATER]}))
    first, second = send(server, ANA, EVA), send(server, EVA, BEN)
    send(server, "max@else.example", BEN)
    server.wait_for_attempts()
    story = teller.story(EVA, server.config_dir)
    assert f"{first}:\n" in story and f"{second}:\n" in story
    assert "max@else.example" not in story


def test_of_an_address_that_was_refused_the_refusal_is_told(serve: Serve, teller: Teller) -> None:
    server = serve()
    play(
        server,
        f"""
        S: 220 …
        C: EHLO client.example
        S: 250-…
        S: 250 STARTTLS
        C: MAIL FROM:<{EVA}>
        S: 250 …
        C: RCPT TO:<nobody@here.example>
        S: 550 5.1.1 …
        """,
    )
    wait_for(lambda: "code=550 status=5.1.1" in server.mail_log, "the log")
    story = teller.story(EVA, server.config_dir)
    assert "127.0.0.1 was refused: 550 5.1.1 User unknown: " in story


def test_of_a_recipient_that_was_refused_the_refusal_is_told(serve: Serve, teller: Teller) -> None:
    server = serve()
    with greeted(server) as wire:
        assert wire.ask(f"MAIL FROM:<{EVA}>").startswith("250 ")
        assert wire.ask("RCPT TO:<max@else.example>").startswith("550 5.7.1 ")
    wait_for(lambda: "status=5.7.1" in server.mail_log, "the log")
    assert "Relaying denied" in teller.story("max@else.example", server.config_dir)


def test_where_the_server_does_not_run_the_story_is_the_same(
    tmp_path: Path, teller: Teller
) -> None:
    server = Server(tmp_path / "server", remote=Far({EVA: [LATER]}))
    with server:
        id = send(server, ANA, EVA)
        server.wait_for_attempts()
        running = teller.story(id, server.config_dir)
    assert teller.story(id, server.config_dir).splitlines()[:3] == running.splitlines()[:3]


# --- with a log that is written here ---


@pytest.mark.parametrize(
    ("event", "fields", "sentence"),
    [
        (
            "queued",
            CAME,
            "Came in by smtp from 192.0.2.7, which called itself client.example, with TLSv1.3 "
            f"TLS_AES_256_GCM_SHA384: 512 octets from <{EVA}> to {ANA}. "
            "SPF pass, DKIM pass,fail, DMARC pass.",
        ),
        (
            "queued",
            f"from=<> to=<{ANA}>,<{BEN}> size=1 peer=2001:db8::1 port=smtp helo=[192.0.2.1] "
            "spf=none dkim=none dmarc=none",
            "Came in by smtp from 2001:db8::1, which called itself [192.0.2.1], without TLS: "
            f"1 octets from <> to {ANA}, {BEN}. SPF none, DKIM none, DMARC none.",
        ),
        (
            "queued",
            f"from=<{ANA}> to=<{EVA}> size=9 peer=192.0.2.7 port=submission helo=desk user={ANA} "
            'tls="TLSv1.2 X"',
            f"Came in by submission from user {ANA}, with TLSv1.2 X: 9 octets from <{ANA}> to "
            f"{EVA}.",
        ),
        (
            "delivered",
            rf'from="<\"a> to=b\"@there.example>" to=<{ANA}> status=2.0.0 text=stored',
            f"For {ANA}: delivered. stored",
        ),
        (
            "deferred",
            f'from=<{ANA}> to=<{EVA}> status=4.4.1 text="cannot connect"',
            f"For {EVA}: not yet delivered. cannot connect",
        ),
        ("next-attempt", 'pause="5m 3s"', "Next attempt in 5m 3s."),
        ("removed", "", "Removed by the operator."),
        ("login", f"peer=192.0.2.7 port=smtp user={ANA}", f"{ANA} logged in from 192.0.2.7."),
        ("of-the-future", "size=1", "event=of-the-future size=1"),
    ],
)
def test_a_line_of_the_log_becomes_a_sentence(
    teller: Teller, event: str, fields: str, sentence: str
) -> None:
    teller.write(line("found", OTHER, "from=<>"), line(event, ID, fields))
    assert teller.story(ID) == f"{ID}:\n  2026-10-01 12:00:01.000  {sentence}\n"


@pytest.mark.parametrize("event", sorted(chasquid.Events.BY_NAME.values()))
def test_every_event_of_the_mail_log_has_a_sentence(
    teller: Teller, event: chasquid.LogEvent
) -> None:
    names = list(event.fields.values())
    if not event.mail or event.name in ("fault", "captured"):
        assert not event.mail or "port" in names  # those of test servers, which keep no log
        return
    teller.write(line(event.name, ID, " ".join(f"{name}=7" for name in names if name != "id")))
    assert "event=" not in teller.story(ID)


@pytest.mark.parametrize("kind", ["failed", "delayed", "delivered", "relayed"])
def test_a_notification_of_any_kind_is_linked(teller: Teller, kind: str) -> None:
    told = f"from=<> to=<{EVA}> size=99 about={ID} kind={kind}"
    teller.write(line("queued", ID, CAME), line("queued", OTHER, told))
    assert f"The sender was written to about it: {OTHER}." in teller.story(ID)
    assert f"Written here as a notification about {ID}: 99 octets" in teller.story(OTHER)


def test_messages_are_told_in_the_order_in_which_they_came(teller: Teller) -> None:
    teller.write(
        line("queued", OTHER, CAME), line("queued", ID, CAME), line("done", OTHER, "attempts=1")
    )
    story = teller.story(ANA)
    assert re.findall(r"^(\S+):$", story, re.MULTILINE) == [OTHER, ID]
    assert len(story.splitlines()) == 5


def test_of_many_messages_the_last_five_are_told(teller: Teller) -> None:
    ids = [f"aaaaaaaaaaaa{letter}" for letter in "abcdefg"]
    teller.write(*(line("queued", id, CAME) for id in ids))
    story = teller.story(ANA)
    assert story.startswith("The last 5 of 7 messages and sessions:\n")
    assert re.findall(r"^(\w+):$", story, re.MULTILINE) == ids[2:]


@pytest.mark.parametrize(
    "address",
    ["a@here.example", "ana@here.exampl", "ana@here.example.org", "ana@here_example"],
)
def test_a_part_of_an_address_is_not_the_address(teller: Teller, address: str) -> None:
    teller.write(line("queued", ID, CAME))
    assert teller.fails(address).startswith(f"nothing is known of {address}")


def test_upper_and_lower_case_are_the_same(teller: Teller) -> None:
    teller.write(line("queued", ID, CAME))
    assert teller.story("ANA@Here.Example") == teller.story(ANA)


def test_what_was_rotated_away_is_told_first(teller: Teller) -> None:
    teller.write(line("queued", ID, CAME), name="mail.log.1")
    teller.write(line("done", ID, "attempts=2"))
    came, done = teller.story(ID).splitlines()[1:]
    assert "Came in by smtp" in came and "Done after 2 attempts." in done


def test_a_log_that_was_only_just_rotated_is_not_needed(teller: Teller) -> None:
    teller.write(line("queued", ID, CAME), name="mail.log.1")
    assert "Came in by smtp" in teller.story(ID)


# --- what is not known ---


@pytest.mark.parametrize("what", [ID, ANA, "", "x" * 500, "a\x1b[2Jb", "*", "("])
def test_what_is_unknown_is_said_to_be_so(teller: Teller, what: str) -> None:
    teller.write(line("queued", OTHER, f"from=<> to=<{BEN}>"))
    said = teller.fails(what)
    assert said.startswith("nothing is known of ")
    assert said.endswith(f"neither in {teller.log} nor in the queue")
    assert "\x1b" not in said and len(said) < 400


def test_without_a_log_nothing_is_known(teller: Teller) -> None:
    assert teller.fails(ID).startswith("nothing is known of ")


def test_a_log_that_cannot_be_read_is_named(teller: Teller) -> None:
    teller.log.mkdir()
    assert teller.fails(ID).startswith(f"{teller.log}: it cannot be read: ")


@pytest.mark.parametrize("path", ["<stdout>", "<stderr>"])
def test_a_log_that_is_not_kept_is_said_to_be_so(teller: Teller, path: str) -> None:
    teller.configure(mail_log_path=path)
    said = teller.fails(ID)
    assert said == f"the mail log goes to {path}; set mail_log_path to a file, or to <syslog>"


def test_lines_that_are_none_are_passed_over(teller: Teller) -> None:
    teller.log.write_bytes(
        b"\xff\xfe\n\n"
        + f"{ID}\n{ID} \nevent=\n2026-10-01 12:00:00.000 event=done id={ID}\n".encode()
        + b"\0" * 100
    )
    assert "Done after " in teller.story(ID)


# --- the journal ---

JOURNALCTL = """#!/bin/sh
echo "$*" > "{asked}"
cat "{log}"
exit {status}
"""


def journal(
    teller: Teller, monkeypatch: pytest.MonkeyPatch, lines: Sequence[str] = (), status: int = 0,
    host: str = "mail",
) -> Path:  # fmt: skip
    """Put a journalctl in the way that shows these lines; return where its arguments are."""
    bin, asked, log = (teller.directory / name for name in ("bin", "asked", "journal"))
    bin.mkdir()
    prefix = f"2026-10-01T12:00:00+0000 {host} chasquid[42]: "
    log.write_text("".join(f"{prefix}{line}\n" for line in lines))
    program = bin / "journalctl"
    program.write_text(JOURNALCTL.format(asked=asked, log=log, status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    teller.configure(mail_log_path="<syslog>")
    return asked


def test_what_is_in_the_journal_is_told(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = journal(
        teller, monkeypatch, [line("queued", ID, CAME), line("done", OTHER, "attempts=1")]
    )
    story = teller.story(ID)
    assert "2026-10-01T12:00:00+0000" in story
    assert "Came in by smtp from 192.0.2.7" in story
    assert OTHER not in story
    assert "-t chasquid" in asked.read_text()


def test_the_name_of_the_host_is_not_taken_for_an_id(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal(teller, monkeypatch, [line("queued", ID, CAME)], host="mailserverone")
    assert "Came in by smtp" in teller.story(ID)


def test_what_is_not_in_the_journal_is_unknown(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal(teller, monkeypatch)
    assert "neither in the journal nor in the queue" in teller.fails(ID)


def test_a_journal_that_cannot_be_read_is_said_to_be_so(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal(teller, monkeypatch, status=1)
    assert teller.fails(ID).startswith("the mail log is in syslog, and journalctl cannot read it")


def test_a_machine_without_a_journal_is_said_to_have_none(
    teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    teller.configure(mail_log_path="<syslog>")
    monkeypatch.setenv("PATH", str(teller.directory))
    said = teller.fails(ID)
    assert said.startswith("the mail log is in syslog, and journalctl cannot read it: No such file")
