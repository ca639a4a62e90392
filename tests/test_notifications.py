# SPDX-License-Identifier: Apache-2.0
"""Room NOTIFICATIONS: what a sender may ask for (RFC 3461), where it is kept, what reports say."""

from __future__ import annotations

import email
import email.policy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.message import Message as Parsed
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    HOST,
    HOUR,
    FakeClock,
    Inline,
    Peer,
    Serve,
    Server,
    Zone,
    delivery,
    greeted,
    login,
    play,
    record,
    run,
    tls_policies,
    wait_for,
)
from support import address as destination
from test_queue import Bench

import chasquid
from chasquid import (
    Delivery,
    Destination,
    DsnParameters,
    Envelope,
    FinalRecipient,
    Item,
    Result,
    State,
)

ANA, BEN, EVA = "ana@here.example", "ben@here.example", "eva@there.example"
MESSAGE = b"From: ana@here.example\r\nSubject: hello\r\n\r\nIt works.\r\n"
MX = ("mx.there.example (192.0.2.1:25)", "250 2.0.0 got it")
RELAYED = Result(State.SENT, "2.0.0", "mx.there.example says 250 2.0.0 got it", *MX)
PASSED_ON = RELAYED._replace(passed_on=True)
REFUSED = Result(State.FAILED, "5.1.1", "mx.there.example says 550 no", MX[0], "550 5.1.1 no")
LATER = Result(State.DEFERRED, "4.2.1", "mx.there.example says 450 later", MX[0], "450 4.2.1 later")


class Far:
    """The servers elsewhere. `plan` has the next results of an address; else it is PASSED_ON.

    `came` holds what was handed over: the delivery, its content and its destinations.
    """

    def __init__(self, plan: Mapping[str, Sequence[Result]] | None = None) -> None:
        self.plan = {name: list(results) for name, results in (plan or {}).items()}
        self.came: list[tuple[Delivery, bytes, list[Destination]]] = []

    async def deliver(
        self, delivery: Delivery, destinations: Sequence[Destination]
    ) -> list[Result]:
        self.came.append((delivery, b"".join(delivery.message.chunks()), list(destinations)))
        return [self._next(destination.value) for destination in destinations]

    def _next(self, name: str) -> Result:
        results = self.plan.get(name)
        if not results:
            return PASSED_ON
        return results.pop(0) if len(results) > 1 else results[0]

    def reports(self) -> list[Report]:
        return reports(content for delivery, content, _ in self.came if not delivery.sender)


class Report(NamedTuple):
    """A notification, taken apart."""

    header: Parsed
    text: str
    message: Parsed  # the fields about the message
    recipients: list[Parsed]
    returned: Parsed

    @property
    def outcome(self) -> list[tuple[str, str]]:
        """The recipients and what was done, as in ("ben@here.example", "delivered")."""
        return [
            (recipient["Final-Recipient"].partition("; ")[2], recipient["Action"])
            for recipient in self.recipients
        ]


def reports(contents: Iterator[bytes] | Sequence[bytes]) -> list[Report]:
    """Return the reports among these messages."""
    found = []
    for content in contents:
        whole = email.message_from_bytes(content)
        if whole.get_content_type() != "multipart/report":
            continue
        text, status, returned = whole.get_payload()  # type: ignore[misc]
        message, *recipients = status.get_payload()  # type: ignore[union-attr]
        said = text.get_payload(decode=True).decode()  # type: ignore[union-attr]
        found.append(Report(whole, said, message, recipients, returned))  # type: ignore[arg-type]
    return found


def outcomes(found: Sequence[Report]) -> list[tuple[str, str]]:
    return sorted(pair for report in found for pair in report.outcome)


# --- what is asked for ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("dsn")) as server:
        yield server


HELLO = """
    S: 220 …
    C: EHLO client.example
    S: 250-…
    S: 250 STARTTLS
"""


def test_the_extension_is_announced(server: Server) -> None:
    with server.connect() as wire:
        wire.reply()
        assert "250-DSN" in wire.ask("EHLO client.example").split("\n")
        assert wire.ask("HELO client.example") == f"250 {HOST}"


@pytest.mark.parametrize(
    "parameters",
    [
        "RET=FULL",
        "RET=HDRS",
        "RET=hdrs",
        "ret=Full envid=QQ314159",
        "ENVID=a+20b+2B+3D",
        f"ENVID={'e' * 100}",
        "RET=HDRS ENVID=x SIZE=100 BODY=8BITMIME",
    ],
)
def test_a_sender_may_ask_for_the_header_alone_and_name_the_envelope(
    server: Server, parameters: str
) -> None:
    play(server, f"{HELLO}\nC: MAIL FROM:<{EVA}> {parameters}\nS: 250 2.1.0 …")


@pytest.mark.parametrize(
    "parameter",
    [
        "RET",
        "RET=BODY",
        "RET=FULL,HDRS",
        "RET=FULL RET=HDRS",
        "ENVID",
        f"ENVID={'e' * 101}",
        "ENVID=a+2",
        "ENVID=a+",
        "ENVID=a+2g",
        "ENVID=a+2b",
        "ENVID=a ENVID=b",
        "ENVID=a=b",
    ],
)
def test_what_is_malformed_behind_the_sender_is_refused(server: Server, parameter: str) -> None:
    play(server, f"{HELLO}\nC: MAIL FROM:<{EVA}> {parameter}\nS: 501 5.5.4 …\nC: RSET\nS: 250 …")


@pytest.mark.parametrize(
    "parameters",
    [
        "NOTIFY=NEVER",
        "notify=never",
        "NOTIFY=SUCCESS",
        "NOTIFY=FAILURE,delay,SUCCESS",
        "ORCPT=rfc822;ana@here.example",
        "ORCPT=x400;/C=US+20or+2B/".replace("=US", "+3DUS"),
        f"ORCPT=rfc822;{'a' * 493}",
        "ORCPT=rfc822;a+40b NOTIFY=DELAY",
    ],
)
def test_a_sender_may_ask_for_reports_about_a_recipient(server: Server, parameters: str) -> None:
    play(
        server,
        f"{HELLO}\nC: MAIL FROM:<{EVA}>\nS: 250 …\nC: RCPT TO:<{ANA}> {parameters}\nS: 250 2.1.5 …",
    )


@pytest.mark.parametrize(
    "parameter",
    [
        "NOTIFY",
        "NOTIFY=NEVER,SUCCESS",
        "NOTIFY=FAILURE,NEVER",
        "NOTIFY=SUCCESS,,DELAY",
        "NOTIFY=SUCCESS,",
        "NOTIFY=ALWAYS",
        "NOTIFY=SUCCESS NOTIFY=DELAY",
        "ORCPT",
        "ORCPT=ana@here.example",
        "ORCPT=rfc822;a+2",
        "ORCPT=rfc822;a+zz",
        "ORCPT=rfc822;a+0d+0a",
        "ORCPT=rfc822;a=b",
        f"ORCPT=rfc822;{'a' * 494}",
    ],
)
def test_what_is_malformed_behind_a_recipient_is_refused(server: Server, parameter: str) -> None:
    play(
        server,
        f"{HELLO}\nC: MAIL FROM:<{EVA}>\nS: 250 …\nC: RCPT TO:<{ANA}> {parameter}\nS: 501 5.5.4 …"
        "\nC: DATA\nS: 503 …",  # and nobody became a recipient
    )


@pytest.mark.parametrize("parameter", ["ENVID=ñ", "ENVID=a+20ñ"])
@pytest.mark.parametrize("utf8", ["", " SMTPUTF8"])
def test_an_envelopes_id_is_ascii(server: Server, parameter: str, utf8: str) -> None:
    play(server, f"{HELLO}\nC: MAIL FROM:<{EVA}> {parameter}{utf8}\nS: 501 5.5.4 …")


def test_an_original_recipient_beyond_ascii_needs_smtputf8(server: Server) -> None:
    play(
        server,
        f"""{HELLO}
        C: MAIL FROM:<{EVA}>
        S: 250 …
        C: RCPT TO:<{ANA}> ORCPT=utf-8;ñ@here.example
        S: 5…
        C: RSET
        S: 250 …
        C: MAIL FROM:<{EVA}> SMTPUTF8
        S: 250 …
        C: RCPT TO:<{ANA}> ORCPT=utf-8;ñ@here.example
        S: 250 …
        """,
    )


@pytest.mark.parametrize("parameter", ["RET=FULL", "ENVID=a", "SIZE=5 RET=HDRS"])
def test_without_ehlo_a_sender_asks_for_nothing(server: Server, parameter: str) -> None:
    text = f"S: 220 …\nC: HELO client.example\nS: 250 …\nC: MAIL FROM:<{EVA}> {parameter}\nS: 555 …"
    play(server, text)


@pytest.mark.parametrize("parameter", ["NOTIFY=NEVER", "ORCPT=rfc822;a"])
def test_without_ehlo_nothing_is_asked_about_a_recipient(server: Server, parameter: str) -> None:
    play(
        server,
        f"""
        S: 220 …
        C: HELO client.example
        S: 250 …
        C: MAIL FROM:<{EVA}>
        S: 250 …
        C: RCPT TO:<{ANA}> {parameter}
        S: 555 …
        C: RCPT TO:<{ANA}>
        S: 250 …
        """,
    )


def to_xtext(text: str) -> str:
    """Encode as RFC 3461, 4 says, leaving alone what may be left alone."""
    return "".join(
        char if "!" <= char <= "~" and char not in "+=" else f"+{ord(char):02X}" for char in text
    )


@given(st.text(st.characters(max_codepoint=255), min_size=1, max_size=33))
def test_xtext_is_decoded_to_what_was_encoded(text: str) -> None:
    encoded = to_xtext(text)
    assert chasquid.check_xtext("ENVID", encoded, 100) == encoded
    assert chasquid.from_xtext(encoded) == text


@given(st.lists(st.sampled_from(["SUCCESS", "FAILURE", "DELAY"]), min_size=1, max_size=6))
def test_what_notify_says_twice_counts_once(words: list[str]) -> None:
    parsed = chasquid.parse_notify(",".join(words).lower())
    assert set(parsed) == set(words) and len(parsed) == len(set(words))


@pytest.mark.parametrize(
    ("notify", "wanted"),
    [
        ((), {"FAILURE", "DELAY"}),
        (("NEVER",), set()),
        (("SUCCESS",), {"SUCCESS"}),
        (("FAILURE",), {"FAILURE"}),
        (("DELAY", "SUCCESS"), {"DELAY", "SUCCESS"}),
    ],
)
def test_a_wish_means_what_it_says_and_without_one_what_is_usual(
    notify: tuple[str, ...], wanted: set[str]
) -> None:
    dsn = DsnParameters(notify)
    assert {event for event in ("SUCCESS", "FAILURE", "DELAY") if dsn.wants(event)} == wanted


# --- where it is kept ---


def send(
    server: Server, sender: str, *recipients: str, data: bytes = MESSAGE, parameters: str = ""
) -> str:
    """Send a message, logged in where the sender is Ana; return its id.

    A recipient may have parameters behind it.
    """
    with greeted(server, "submission over TLS" if sender == ANA else "smtp") as wire:
        if sender == ANA:
            assert login(wire).startswith("235 ")
        assert wire.ask(f"MAIL FROM:<{sender}> {parameters}".strip()).startswith("250 ")
        for recipient in recipients:
            name, _, dsn = recipient.partition(" ")
            assert wire.ask(f"RCPT TO:<{name}> {dsn}".strip()).startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(data + b".\r\n")
        reply = wire.reply()
        assert reply.startswith("250 2.0.0 "), reply
        return reply.split()[-1]


ALL_OF_IT = f"{EVA} NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;eve+40old.example"


def test_what_was_asked_for_is_in_the_queues_file(serve: Serve) -> None:
    server = serve(remote=Far({EVA: [LATER]}))
    send(server, ANA, ALL_OF_IT, parameters="RET=hdrs ENVID=QQ+20314")
    server.wait_for_attempts()
    (path,) = (server.data_dir / "queue" / "cur").iterdir()
    lines = path.read_bytes()[int(path.name.split(",")[1].removeprefix("S=")) :].split(b"\n")
    envelope = json.loads(lines[0])
    assert (envelope["ret"], envelope["envid"]) == ("HDRS", "QQ+20314")
    assert envelope["recipients"] == [
        {
            "destination": {"kind": "address", "value": EVA, "via": []},
            "original_recipient": EVA,
            "notify": ["SUCCESS", "FAILURE"],
            "orcpt": "rfc822;eve+40old.example",
        }
    ]
    item = chasquid.read_item(str(path))
    assert item.recipients[0].dsn == DsnParameters(
        ("SUCCESS", "FAILURE"), "rfc822;eve+40old.example"
    )


def test_what_was_asked_for_survives_a_restart(tmp_path: Path) -> None:
    far = Far({EVA: [LATER, PASSED_ON]})
    server = Server(tmp_path, remote=far)
    with server:
        send(server, ANA, ALL_OF_IT, parameters="RET=HDRS ENVID=QQ314")
        server.wait_for_attempts()
    with server:
        chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all")
        wait_for(lambda: not server.queued(), "the second attempt")
    before, after = (delivery for delivery, *_ in far.came)
    assert (after.ret, after.envid) == (before.ret, before.envid) == ("HDRS", "QQ314")
    assert dict(after.dsn_parameters) == dict(before.dsn_parameters)
    assert after.dsn_parameters[destination(EVA)].notify == ("SUCCESS", "FAILURE")


def old_file(*names: str, journal: bytes = b"") -> tuple[str, bytes]:
    """Return the name and content of a queue's file from before there were dsn_parameters."""
    envelope = {
        "id": "abc", "sender": ANA, "received": 1_700_000_000.0, "prefix": "A: b\r\n",
        "addressees": [[["address", name, []], name] for name in names],
        "smtputf8": False, "eight_bit": False,
    }  # fmt: skip
    line = json.dumps(envelope).encode() + b"\n"
    return f"abc,S={len(MESSAGE)}", MESSAGE + line + journal


def test_a_file_from_before_there_were_wishes_is_read(tmp_path: Path) -> None:
    results = {
        "0": [State.SENT, "2.0.0", "fine", "", ""],
        "1": [State.DEFERRED, "4.0.0", "not yet", "", ""],
    }
    line = {"at": 1.0, "attempt": 3, "next": 99.0, "waited": 50.0, "results": results}
    name, data = old_file(BEN, EVA, journal=b"\n" + json.dumps(line).encode() + b"\n")
    (tmp_path / name).write_bytes(data)
    item = chasquid.read_item(str(tmp_path / name))
    assert (item.attempts, item.next_attempt, item.waited, item.delay_reported) == (
        3,
        99,
        50,
        False,
    )
    assert [recipient.state for recipient in item.recipients] == [State.SENT, State.DEFERRED]
    assert [recipient.dsn for recipient in item.recipients] == [DsnParameters(), DsnParameters()]
    assert not any(
        recipient.reported or recipient.result.passed_on for recipient in item.recipients
    )
    assert (item.envelope.ret, item.envelope.envid) == ("", "")


def test_a_file_from_before_there_were_wishes_is_delivered_as_usual(tmp_path: Path) -> None:
    far = Far({EVA: [REFUSED]})
    server = Server(tmp_path, remote=far)
    name, data = old_file(BEN, EVA)
    (server.data_dir / "queue" / "new").mkdir(parents=True)
    (server.data_dir / "queue" / "new" / name).write_bytes(data)
    with server:
        assert outcomes(reports(server.mail("ana"))) == [(EVA, "failed")]
        assert len(server.mail("ben")) == 1


# --- whom it is passed on to ---

TO_EVA, TO_EVE = destination(EVA), destination("eve@there.example")
WISHES = {
    TO_EVA: DsnParameters(("SUCCESS", "DELAY"), "rfc822;old+40here.example"),
    TO_EVE: DsnParameters(),
}


def smtp_attempt(
    tmp_path: Path, keywords: Sequence[str], commands: str, **fields: object
) -> list[Result]:
    """Have the SMTP courier deliver to Eva and Eve at a server with these keywords."""
    lines = [f"mx.there.example{''}", *keywords]
    hello = "\n".join(f"S: 250{'-' if n < len(lines) else ' '}{x}" for n, x in enumerate(lines, 1))
    script = f"""
        S: 220 mx.there.example
        C: EHLO {HOST}
        {hello}
        {commands}
        S: 250 fine
        C: QUIT
        S: 221 bye
    """
    zone = Zone({("there.example", "MX"): ["10 mx.there.example"],
                 ("mx.there.example", "A"): ["127.0.0.1"]})  # fmt: skip
    load = delivery(
        **{"sender": ANA, "ret": "HDRS", "envid": "QQ+20", "dsn_parameters": WISHES, **fields}
    )
    with Peer(script) as peer:

        async def main(loop: chasquid.Loop) -> list[Result]:
            names, log = chasquid.Names(loop, zone.ask), record(tmp_path)
            policies = tls_policies(loop, names, log, tmp_path)
            courier = chasquid.SmtpCourier(
                loop, names, log, policies, HOST, peer.port, lambda: 0.5
            )  # fmt: skip
            return await courier.deliver(load, [TO_EVA, TO_EVE])

        return run(main)


def test_a_server_with_the_extension_is_told_what_was_asked_for(tmp_path: Path) -> None:
    results = smtp_attempt(
        tmp_path,
        ["DSN"],
        """
        C: MAIL FROM:<ana@here.example> RET=HDRS ENVID=QQ+20
        S: 250 fine
        C: RCPT TO:<eva@there.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;old+40here.example
        S: 250 fine
        C: RCPT TO:<eve@there.example>
        S: 250 fine
        C: DATA
        S: 354 go on
        C.
        """,
    )
    assert [(result.state, result.passed_on) for result in results] == [(State.SENT, True)] * 2


WITHOUT_DSN = """
    C: MAIL FROM:<ana@here.example>
    S: 250 fine
    C: RCPT TO:<eva@there.example>
    S: 250 fine
    C: RCPT TO:<eve@there.example>
    S: 250 fine
    C: DATA
    S: 354 go on
    C.
    """


def test_a_server_without_the_extension_is_told_nothing(tmp_path: Path) -> None:
    results = smtp_attempt(
        tmp_path,
        ["8BITMIME"],
        WITHOUT_DSN,
    )
    assert [(result.state, result.passed_on) for result in results] == [(State.SENT, False)] * 2


def test_where_nothing_was_asked_for_a_server_with_the_extension_is_told_nothing(
    tmp_path: Path,
) -> None:
    smtp_attempt(
        tmp_path,
        ["DSN"],
        WITHOUT_DSN,
        ret="",
        envid="",
        dsn_parameters={},
    )


def test_what_was_refused_was_not_passed_on(tmp_path: Path) -> None:
    refused, taken = smtp_attempt(
        tmp_path,
        ["DSN"],
        """
        C: MAIL FROM:<…
        S: 250 fine
        C: RCPT TO:<eva@there.example> NOTIFY=…
        S: 550 5.1.1 who?
        C: RCPT TO:<eve@there.example>
        S: 250 fine
        C: DATA
        S: 354 go on
        C.
        """,
    )
    assert (refused.state, refused.passed_on) == (State.FAILED, False)
    assert (taken.state, taken.passed_on) == (State.SENT, True)


def test_over_lmtp_nothing_is_passed_on_even_to_a_server_that_has_the_extension(
    tmp_path: Path,
) -> None:
    script = f"""
        S: 220 dovecot
        C: LHLO {HOST}
        S: 250-dovecot
        S: 250 DSN
        C: MAIL FROM:<ana@here.example>
        S: 250 fine
        C: RCPT TO:<eva@there.example>
        S: 250 fine
        C: RCPT TO:<eve@there.example>
        S: 250 fine
        C: DATA
        S: 354 go on
        C.
        S: 250 fine
        S: 250 fine
        C: QUIT
        S: 221 bye
    """
    path = str(tmp_path / "lmtp")
    load = delivery(sender=ANA, ret="FULL", envid="QQ", dsn_parameters=WISHES)
    with Peer(script, path=path):

        async def main(loop: chasquid.Loop) -> list[Result]:
            courier = chasquid.LmtpCourier(loop, chasquid.Names(loop, Zone({}).ask), path, HOST)
            return await courier.deliver(load, [TO_EVA, TO_EVE])

        results = run(main)
    assert [(result.state, result.passed_on) for result in results] == [(State.SENT, False)] * 2


# --- what the sender hears ---


def heard(
    serve: Serve,
    *recipients: str,
    plan: Mapping[str, Sequence[Result]] | None = None,
    aliases: str = "",
    **keywords: object,
) -> list[Report]:
    """Let Ana send to `recipients`; return the reports when the queue is empty."""
    server = serve(remote=Far(plan), aliases={"here.example": aliases} if aliases else None)
    send(server, ANA, *recipients, **keywords)  # type: ignore[arg-type]
    return reports(server.mail("ana"))


def test_where_nothing_was_asked_for_success_is_not_reported(serve: Serve) -> None:
    assert heard(serve, BEN, EVA, plan={EVA: [RELAYED]}) == []


def test_where_nothing_was_asked_for_failure_is_reported(serve: Serve) -> None:
    (report,) = heard(serve, BEN, EVA, plan={EVA: [REFUSED]})
    assert report.outcome == [(EVA, "failed")]


def test_who_never_wants_to_hear_does_not_hear_of_a_failure(serve: Serve) -> None:
    assert heard(serve, f"{EVA} NOTIFY=NEVER", plan={EVA: [REFUSED]}) == []


def test_who_wants_to_hear_of_success_alone_does_not_hear_of_a_failure(serve: Serve) -> None:
    dsn_parameters = [f"{EVA} NOTIFY=SUCCESS", f"{BEN} NOTIFY=SUCCESS"]
    (report,) = heard(serve, *dsn_parameters, plan={EVA: [REFUSED]})
    assert report.outcome == [(BEN, "delivered")]


def test_who_wants_to_hear_of_failure_alone_does_not_hear_of_success(serve: Serve) -> None:
    dsn_parameters = [f"{name} NOTIFY=FAILURE" for name in (BEN, EVA, "eve@there.example")]
    (report,) = heard(serve, *dsn_parameters, plan={EVA: [REFUSED], "eve@there.example": [RELAYED]})
    assert report.outcome == [(EVA, "failed")]


def test_what_is_stored_here_is_reported_as_delivered(serve: Serve) -> None:
    (report,) = heard(serve, f"{BEN} NOTIFY=SUCCESS")
    assert report.header["Subject"] == "Mail delivered"
    (fields,) = report.recipients
    assert fields["Action"] == "delivered"
    assert fields["Status"].startswith("2.")
    assert fields["Final-Recipient"] == f"rfc822; {BEN}"
    assert "Remote-MTA" not in fields
    assert BEN in report.text


def test_what_a_program_took_is_reported_as_delivered(serve: Serve) -> None:
    (report,) = heard(serve, "robot@here.example NOTIFY=SUCCESS", aliases="robot: | /bin/cat\n")
    assert report.outcome == [("robot@here.example", "delivered")]


def test_what_a_server_without_the_extension_took_is_reported_as_relayed(serve: Serve) -> None:
    (report,) = heard(serve, f"{EVA} NOTIFY=SUCCESS", plan={EVA: [RELAYED]})
    assert report.header["Subject"] == "Mail passed on"
    (fields,) = report.recipients
    assert fields["Action"] == "relayed"
    assert fields["Remote-MTA"] == "dns; mx.there.example"
    assert fields["Diagnostic-Code"] == "smtp; 250 2.0.0 got it"


def test_what_was_passed_on_with_its_wish_is_not_reported(serve: Serve) -> None:
    assert heard(serve, f"{EVA} NOTIFY=SUCCESS", plan={EVA: [PASSED_ON]}) == []


def test_recipients_with_different_wishes_get_what_they_asked_for(serve: Serve) -> None:
    names = [f"{n}@there.example" for n in ("never", "failure", "success", "usual", "both")]
    never, failure, success, usual, both = names
    found = heard(
        serve,
        f"{BEN} NOTIFY=SUCCESS",
        f"{never} NOTIFY=NEVER",
        f"{failure} NOTIFY=FAILURE",
        f"{success} NOTIFY=SUCCESS",
        usual,
        f"{both} NOTIFY=SUCCESS,FAILURE",
        plan={never: [REFUSED], failure: [REFUSED], success: [RELAYED], usual: [REFUSED],
              both: [REFUSED]},
    )  # fmt: skip
    assert outcomes(found) == sorted([
        (BEN, "delivered"), (failure, "failed"), (success, "relayed"), (usual, "failed"),
        (both, "failed"),
    ])  # fmt: skip
    assert sorted(len(report.recipients) for report in found) == [1, 1, 3]  # one of each kind


def test_the_recipient_is_named_as_the_sender_knows_it(serve: Serve) -> None:
    dsn = "NOTIFY=SUCCESS ORCPT=rfc822;Ben+2Bold@old.example"
    (report,) = heard(serve, f"{BEN} {dsn}", parameters="ENVID=QQ+20314+2B")
    assert report.message["Original-Envelope-Id"] == "QQ 314+"
    (fields,) = report.recipients
    assert fields["Original-Recipient"] == "rfc822; Ben+old@old.example"
    assert fields["Final-Recipient"] == f"rfc822; {BEN}"


def test_without_an_envelopes_id_the_report_has_none(serve: Serve) -> None:
    (report,) = heard(serve, f"{BEN} NOTIFY=SUCCESS")
    assert "Original-Envelope-Id" not in report.message


@pytest.mark.parametrize("hidden", ["+0D+0ABcc:+20x@y", "+0A+0A", "+00+1B[2J", "+7F+80+85"])
def test_what_a_sender_hides_in_xtext_adds_no_line_to_a_report(serve: Serve, hidden: str) -> None:
    dsn = f"NOTIFY=SUCCESS ORCPT=rfc822;ben{hidden}"
    server = serve(remote=Far())
    send(server, ANA, f"{BEN} {dsn}", parameters=f"ENVID=QQ{hidden}")
    (content,) = server.mail("ana")
    (report,) = reports([content])
    assert "Bcc" not in report.message and "Bcc" not in report.recipients[0]
    assert list(report.message) == [
        "Original-Envelope-Id", "Reporting-MTA", "X-Chasquid-Queue-ID", "Arrival-Date"
    ]  # fmt: skip
    assert report.outcome == [(BEN, "delivered")]
    said = content.partition(b"message/delivery-status")[2].partition(b"\n--=_")[0]
    assert not set(said) & set(b"\0\r\x1b\x7f\x80\x85")


def test_a_report_of_success_holds_the_header_and_never_the_content(serve: Serve) -> None:
    for parameters in ("", "RET=FULL", "RET=HDRS"):
        (report,) = heard(serve, f"{BEN} NOTIFY=SUCCESS", parameters=parameters)
        assert report.returned.get_content_type() == "text/rfc822-headers"
        assert "Subject: hello" in report.returned.get_payload()
        assert "It works." not in report.header.as_string()


@pytest.mark.parametrize(
    ("parameters", "whole"),
    [("", True), ("RET=FULL", True), ("RET=HDRS", False), ("RET=hdrs", False)],
)
def test_a_report_of_a_failure_holds_as_much_as_was_asked_for(
    serve: Serve, parameters: str, whole: bool
) -> None:
    (report,) = heard(serve, EVA, plan={EVA: [REFUSED]}, parameters=parameters)
    kind = "message/rfc822" if whole else "text/rfc822-headers"
    assert report.returned.get_content_type() == kind
    assert ("It works." in report.header.as_string()) == whole
    assert "Subject: hello" in report.header.as_string()


def test_a_report_is_marked_as_automatic_and_has_the_null_reverse_path(serve: Serve) -> None:
    far = Far()
    server = serve(remote=far)
    send(server, EVA, f"{BEN} NOTIFY=SUCCESS")
    wait_for(lambda: not server.queued(), "the queue to become empty")
    ((delivery, _, destinations),) = far.came
    assert delivery.sender == ""
    assert destinations == [destination(EVA)]
    (report,) = far.reports()
    assert report.header["Auto-Submitted"] == "auto-replied"
    assert report.header["From"] == f"Mail Delivery System <postmaster@{HOST}>"
    assert report.header["To"] == f"<{EVA}>"
    assert delivery.dsn_parameters[destination(EVA)] == DsnParameters()


def test_a_report_that_cannot_be_delivered_is_not_reported(serve: Serve) -> None:
    far = Far({EVA: [REFUSED]})
    server = serve(remote=far)
    send(server, EVA, f"{BEN} NOTIFY=SUCCESS")
    wait_for(lambda: not server.queued(), "the queue to become empty")
    assert len(far.came) == 1
    assert "event=not-notified " in server.mail_log
    assert len(server.mail("ben")) == 1


@pytest.mark.parametrize("recipient", [BEN, EVA])
def test_the_null_sender_is_told_nothing_whatever_it_asks_for(serve: Serve, recipient: str) -> None:
    far = Far({EVA: [REFUSED]})
    server = serve(remote=far, aliases={"here.example": f"out: {EVA}\n"})
    name = BEN if recipient == BEN else "out@here.example"
    send(server, "", f"{name} NOTIFY=SUCCESS,FAILURE,DELAY")
    wait_for(lambda: not server.queued(), "the queue to become empty")
    assert far.reports() == []
    assert server.mail_log.count("event=queued ") == 1


def test_each_destination_of_an_alias_is_reported_for_the_address_that_was_written_to(
    serve: Serve,
) -> None:
    found = heard(
        serve,
        "team@here.example NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;everybody@old.example",
        plan={EVA: [RELAYED], "eve@there.example": [REFUSED]},
        aliases=f"team: ben, {EVA}, eve@there.example\n",
    )
    assert outcomes(found) == sorted([
        (BEN, "delivered"), (EVA, "relayed"), ("eve@there.example", "failed")
    ])  # fmt: skip
    originals = {
        recipient["Original-Recipient"] for report in found for recipient in report.recipients
    }
    assert originals == {"rfc822; everybody@old.example"}


def test_a_destination_of_an_alias_is_passed_on_with_the_wish(serve: Serve) -> None:
    far = Far()
    server = serve(remote=far, aliases={"here.example": f"team: ben, {EVA}\n"})
    send(server, ANA, "team@here.example NOTIFY=SUCCESS,FAILURE")
    (report,) = reports(server.mail("ana"))
    assert report.outcome == [(BEN, "delivered")]
    ((delivery, *_),) = far.came
    assert delivery.dsn_parameters[destination(EVA)].notify == ("SUCCESS", "FAILURE")


@pytest.mark.parametrize(
    "dsn_parameters",
    [("NOTIFY=NEVER", "NOTIFY=SUCCESS"), ("NOTIFY=SUCCESS", ""), ("", "ORCPT=rfc822;x")],
)
def test_a_recipient_that_is_named_twice_is_delivered_to_once(
    serve: Serve, dsn_parameters: tuple[str, str]
) -> None:
    far = Far({EVA: [RELAYED]})
    server = serve(remote=far)
    send(server, ANA, *(f"{name} {dsn}".strip() for dsn in dsn_parameters for name in (BEN, EVA)))
    assert len(server.mail("ben")) == 1
    assert [destinations for delivery, _, destinations in far.came if delivery.sender] == [
        [destination(EVA)]
    ]
    assert len(outcomes(reports(server.mail("ana")))) <= 2


def test_a_sender_hears_of_success_where_mail_goes_on_under_another_name(serve: Serve) -> None:
    far = Far()
    server = serve(remote=far, aliases={"here.example": "out: max@else.example\n"})
    send(server, EVA, "out@here.example NOTIFY=SUCCESS")
    wait_for(lambda: not server.queued(), "the queue to become empty")
    delivery, _, destinations = far.came[0]
    assert delivery.sender == "out+fwd_from=eva=there.example@here.example"
    assert not delivery.dsn_parameters[destinations[0]].wants("SUCCESS"), (
        "nobody would read that report"
    )
    assert outcomes(far.reports()) == [("max@else.example", "relayed")]


def test_who_is_named_directly_and_by_an_alias_loses_no_wish(serve: Serve) -> None:
    far = Far()
    server = serve(remote=far, aliases={"here.example": f"team: {EVA}\n"})
    send(server, ANA, "team@here.example NOTIFY=SUCCESS,FAILURE", EVA)
    wait_for(lambda: not server.queued(), "the queue to become empty")
    dsn_parameters = [
        delivery.dsn_parameters[destination]
        for delivery, _, destinations in far.came
        for destination in destinations
    ]
    assert any(dsn.wants("SUCCESS") for dsn in dsn_parameters)


def test_a_report_of_success_does_not_say_where_mail_lies_here(serve: Serve) -> None:
    far = Far()
    server = serve(remote=far, aliases={"here.example": "robot: | /bin/cat /dev/null\n"})
    send(server, EVA, f"{BEN} NOTIFY=SUCCESS", "robot@here.example NOTIFY=SUCCESS")
    wait_for(lambda: not server.queued(), "the queue to become empty")
    said = "".join(report.header.as_string() for report in far.reports())
    assert BEN in said and "robot@here.example" in said
    assert str(server.data_dir) not in said
    assert "/dev/null" not in said


# --- delay ---


async def accept(
    bench: Bench, *final_recipients: FinalRecipient, data: bytes = MESSAGE, **fields: object
) -> Item:
    return await accept_with(bench.queue.draft(), bench, *final_recipients, data=data, **fields)


async def accept_with(
    draft: chasquid.Draft,
    bench: Bench,
    *final_recipients: FinalRecipient,
    data: bytes = MESSAGE,
    **fields: object,
) -> Item:
    await draft.add(data)
    draft.complete()
    values = {"sender": ANA, "received": bench.clock.time(), "prefix": b"Received: by us\r\n"}
    envelope = Envelope(
        id=draft.id,
        final_recipients=final_recipients,
        eight_bit=draft.eight_bit,
        **{**values, **fields},
    )  # type: ignore[arg-type]
    return await bench.queue.accept(draft, envelope, {"peer": "a test"})


def to(name: str, *notify: str, original: str = "", orcpt: str = "") -> FinalRecipient:
    return FinalRecipient(destination(name), original or name, DsnParameters(notify, orcpt))


def on_bench(
    directory: Path, test: Callable[[Bench], object], clock: FakeClock | None = None,
    far: Far | None = None, workers: Inline | None = None,
) -> Bench:  # fmt: skip
    clock, far = clock or FakeClock(), far or Far({EVA: [LATER]})
    made: list[Bench] = []

    async def main(loop: chasquid.Loop) -> None:
        made.append(Bench(loop, directory, clock, remote=far))
        made[0].queue.recover()
        await test(made[0])  # type: ignore[misc]

    run(main, clock=clock, workers=workers or Inline())
    return made[0]


async def wait(bench: Bench, seconds: float) -> None:
    """Let time pass, in steps in which attempts are made."""
    while seconds > 0:
        step = min(seconds, 1300.0)
        await bench.advance(step)
        seconds -= step


def test_after_four_hours_a_sender_hears_once_that_it_takes_longer(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await accept(bench, to(EVA))
        await wait(bench, 4 * HOUR - 60)
        assert bench.local.contents == []
        await wait(bench, 1300)
        (report,) = reports(bench.local.contents)
        assert report.header["Subject"] == "Mail delivery is taking longer"
        assert report.outcome == [(EVA, "delayed")]
        assert report.recipients[0]["Status"] == "4.2.1"
        assert "You need not send it again" in report.text
        assert "450 later" in report.text
        assert "It will be tried again for 15h" in report.text
        assert report.returned.get_content_type() == "text/rfc822-headers"
        await wait(bench, 15 * HOUR)
        assert len(bench.local.contents) == 1
        await wait(bench, 2 * HOUR)
        assert outcomes(reports(bench.local.contents)) == [(EVA, "delayed"), (EVA, "failed")]

    on_bench(tmp_path, test)


def test_the_notice_of_delay_is_not_repeated_after_a_restart(tmp_path: Path) -> None:
    clock, far = FakeClock(), Far({EVA: [LATER]})

    async def first(bench: Bench) -> None:
        await accept(bench, to(EVA))
        await wait(bench, 5 * HOUR)
        assert len(bench.local.contents) == 1

    async def second(bench: Bench) -> None:
        await bench.quiet()
        (item,) = bench.queue.look()
        assert item.delay_reported
        await wait(bench, 5 * HOUR)
        assert len(far.came) > 20
        assert bench.local.contents == []

    on_bench(tmp_path, first, clock, far)
    on_bench(tmp_path, second, clock, far)


def test_the_four_hours_go_on_where_a_restart_interrupted_them(tmp_path: Path) -> None:
    clock, far = FakeClock(), Far({EVA: [LATER]})

    async def first(bench: Bench) -> None:
        await accept(bench, to(EVA))
        await wait(bench, 3.5 * HOUR)

    async def second(bench: Bench) -> None:
        await wait(bench, 1.2 * HOUR)
        assert outcomes(reports(bench.local.contents)) == [(EVA, "delayed")]

    on_bench(tmp_path, first, clock, far)
    on_bench(tmp_path, second, clock, far)


@pytest.mark.parametrize(
    ("notify", "count"),
    [((), 1), (("NEVER",), 0), (("FAILURE",), 0), (("SUCCESS",), 0), (("DELAY",), 1),
     (("SUCCESS", "DELAY"), 1)],
)  # fmt: skip
def test_delay_is_reported_to_whom_did_not_ask_otherwise(
    tmp_path: Path, notify: tuple[str, ...], count: int
) -> None:
    async def test(bench: Bench) -> None:
        await accept(bench, to(EVA, *notify))
        await wait(bench, 6 * HOUR)
        assert outcomes(reports(bench.local.contents)) == [(EVA, "delayed")] * count

    on_bench(tmp_path, test)


def test_who_asked_for_delay_alone_does_not_hear_that_it_failed(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await accept(bench, to(EVA, "DELAY"))
        await wait(bench, 21 * HOUR)
        assert bench.files() == []
        assert outcomes(reports(bench.local.contents)) == [(EVA, "delayed")]

    on_bench(tmp_path, test)


def test_the_notice_of_delay_names_only_those_who_wait_and_wanted_it(tmp_path: Path) -> None:
    far = Far({"a@there.example": [LATER], "b@there.example": [LATER], EVA: [RELAYED]})

    async def test(bench: Bench) -> None:
        await accept(
            bench, to("a@there.example"), to("b@there.example", "FAILURE"), to(EVA), to(BEN)
        )
        await wait(bench, 6 * HOUR)
        found = reports(content for content in bench.local.contents)
        assert outcomes(found) == [("a@there.example", "delayed")]

    on_bench(tmp_path, test, far=far)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("Auto-Submitted: auto-replied", False),
        ("auto-submitted: AUTO-GENERATED; by=cron", False),
        ("Precedence: bulk", False),
        ("precedence: List", False),
        ("Precedence: junk", False),
        ("Auto-Submitted: no", True),
        ("Auto-Submitted: NO", True),
        pytest.param("Auto-Submitted: no (a person wrote this)", True),
        pytest.param("Auto-Submitted: no; by=a.person", True),
        ("Precedence: first-class", True),
        ("X-Auto-Submitted: auto-replied", True),
    ],
)
def test_what_a_program_or_a_list_has_sent_is_delayed_in_silence(
    tmp_path: Path, field: str, told: bool
) -> None:
    async def test(bench: Bench) -> None:
        await accept(bench, to(EVA), data=f"{field}\r\n".encode() + MESSAGE)
        await wait(bench, 6 * HOUR)
        assert len(reports(bench.local.contents)) == told

    on_bench(tmp_path, test)


def test_automatic_mail_that_fails_is_reported_all_the_same(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await accept(bench, to(EVA), data=b"Precedence: bulk\r\n" + MESSAGE)
        await wait(bench, 21 * HOUR)
        assert outcomes(reports(bench.local.contents)) == [(EVA, "failed")]

    on_bench(tmp_path, test)


def test_a_notification_that_is_delayed_is_not_reported(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        await accept(bench, to(EVA, "DELAY"), sender="")
        await wait(bench, 21 * HOUR)
        assert bench.files() == []
        assert bench.local.contents == []
        assert "notification" not in bench.mail_log.replace("no notification", "")

    on_bench(tmp_path, test)


# --- crashes ---


class Watching(Inline):
    """Workers that look around before and after each job; only they write to the disk."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def submit(
        self,
        job: Callable[[], object],
        done: Callable[[object, BaseException | None], None],
    ) -> None:
        self._look()
        super().submit(job, done)
        self._look()


def crash_everywhere(
    tmp_path: Path,
    far_plan: Mapping[str, Sequence[Result]],
    test: Callable[[Bench], object],
    after: Callable[[Bench], object],
) -> list[list[Report]]:
    """Return, for a crash at each moment of `test`, what the sender heard in both lives."""
    clock, far = FakeClock(), Far(far_plan)
    moments: list[tuple[Path, float, list[Report], Far]] = []
    benches: list[Bench] = []

    def look() -> None:
        place = tmp_path / f"moment-{len(moments)}"
        if (tmp_path / "first" / "queue" / "bad").exists() and benches:
            shutil.copytree(tmp_path / "first" / "queue", place / "queue")
            heard = reports(benches[0].local.contents)
            moments.append((place, clock.now, heard, Far(far.plan)))

    async def first(bench: Bench) -> None:
        benches.append(bench)
        await test(bench)  # type: ignore[misc]

    (tmp_path / "first").mkdir()
    on_bench(tmp_path / "first", first, clock, far, Watching(look))
    assert len(moments) > 10
    told = []
    for place, now, heard, then in moments:
        bench = on_bench(place, after, FakeClock(now), then)  # type: ignore[arg-type]
        assert bench.files() == []
        told.append(heard + reports(bench.local.contents))
    return told


def distinct(found: Sequence[Report], pair: tuple[str, str]) -> int:
    """Count the reports that say this; one that was handed over twice counts once."""
    return len({each.header["Message-ID"] for each in found if pair in each.outcome})


def test_wherever_a_crash_comes_success_is_reported_once_or_twice(tmp_path: Path) -> None:
    plan = {EVA: [LATER, RELAYED]}

    async def test(bench: Bench) -> None:
        await accept(bench, to(BEN, "SUCCESS"), to(EVA, "SUCCESS"))
        await bench.quiet()
        await bench.advance(100)
        assert bench.files() == []

    async def after(bench: Bench) -> None:
        await bench.quiet()
        await wait(bench, 2000)

    counts = []
    for found in crash_everywhere(tmp_path, plan, test, after):
        if not found:
            continue  # it came before the message was accepted
        counts.append((distinct(found, (BEN, "delivered")), distinct(found, (EVA, "relayed"))))
    assert len(counts) > 10
    assert {count for pair in counts for count in pair} <= {1, 2}
    assert counts[-1] == (1, 1)


def test_wherever_a_crash_comes_the_notice_of_delay_comes_once_or_twice(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        item = await accept(bench, to(EVA))
        item.waited = 3.9 * HOUR
        await wait(bench, 0.5 * HOUR)

    async def after(bench: Bench) -> None:
        await wait(bench, 21 * HOUR)

    plan = {EVA: [LATER]}
    counts = [
        distinct(found, (EVA, "delayed"))
        for found in crash_everywhere(tmp_path, plan, test, after)
        if found
    ]
    assert set(counts) <= {1, 2}
    assert counts[-1] == 1


def test_a_success_that_was_reported_is_not_reported_again_after_a_restart(
    tmp_path: Path,
) -> None:
    clock, far = FakeClock(), Far({EVA: [LATER, RELAYED]})

    async def first(bench: Bench) -> None:
        await accept(bench, to(BEN, "SUCCESS"), to(EVA, "SUCCESS"))
        await bench.quiet()
        assert outcomes(reports(bench.local.contents)) == [(BEN, "delivered")]

    async def second(bench: Bench) -> None:
        await bench.advance(100)
        assert bench.files() == []
        assert outcomes(reports(bench.local.contents)) == [(EVA, "relayed")]

    on_bench(tmp_path, first, clock, far)
    on_bench(tmp_path, second, clock, far)


def test_a_failure_is_reported_once_where_the_report_of_a_success_cannot_be_stored(
    tmp_path: Path,
) -> None:
    async def test(bench: Bench) -> None:
        store, count = bench.queue._new_draft, 0

        def sometimes() -> chasquid.Draft:
            nonlocal count
            count += 1
            if count == 2:
                raise OSError(28, "No space left on device")
            return store()

        bench.queue._new_draft = sometimes  # type: ignore[method-assign]
        item = await accept_with(store(), bench, to(EVA), to(BEN, "SUCCESS"))
        await bench.quiet()
        await bench.queue.retry(item.id)
        await wait(bench, 2000)
        assert bench.files() == []
        found = outcomes(reports(bench.local.contents))
        assert found == [(BEN, "delivered"), (EVA, "failed")]

    on_bench(tmp_path, test, far=Far({EVA: [REFUSED]}))
