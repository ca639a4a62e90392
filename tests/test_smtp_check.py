# SPDX-License-Identifier: Apache-2.0
"""Room SMTP CHECK: how the servers of another domain look, and a message that is sent to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dns.message
import pytest
from support import Ended, Serve, Server, Zone, run_command, trust
from test_dns import answering, serving

THERE, MX = "there.example", "mx.there.example"
RECORDS = {
    (THERE, "MX"): ("10 mx.there.example.",),
    (MX, "A"): ("127.0.0.1",),
}
Check = Callable[..., Ended]


@pytest.fixture
def there(serve: Serve) -> Server:
    return serve(users={THERE: {"eva": "secret"}}, certificates=(MX,), hostname=MX)


@pytest.fixture
def check(serve: Serve, there: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Check:
    """Run smtp-check on a host whose resolver has some records, and the port of `there`."""

    def check(
        *words: str, records: dict[tuple[str, str], tuple[str, ...]] = RECORDS, port: int = 0
    ) -> Ended:
        def respond(query: dns.message.Message, via: str) -> dns.message.Message | None:
            name = query.question[0].name.to_text(omit_final_dot=True)
            kind = query.question[0].rdtype.name
            found = records.get((name, kind), ())
            known = any(name == each for each, _ in records)
            lines = [f"{name}. 60 {kind} {record}" for record in found]
            return answering(*lines, rcode="NOERROR" if known else "NXDOMAIN")(query, via)

        with serving(respond) as [names]:
            here = serve(
                dns_server=names.place,
                outgoing_smtp_port=port or there.port(),
                ask=Zone(records).ask,
            )
            return run_command(capsys, here.config_dir, "smtp-check", *words)

    return check


def test_a_server_with_a_certificate_that_nobody_trusts(check: Check) -> None:
    ended = check(THERE)
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert lines[:2] == ["MTA-STS: none", f"MX 10 {MX}: any"]
    assert lines[2].startswith("  127.0.0.1: TLS_INSECURE, TLSv1.3 ")
    assert "the certificate is not valid: self-signed certificate" in lines[2]
    assert lines[3:] == [f"mail to {THERE} would go there with TLS_INSECURE"]


def test_a_server_with_a_valid_certificate(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trust(monkeypatch, tmp_path, MX)
    lines = check(f"eva@{THERE}").out.splitlines()
    assert lines[2].startswith("  127.0.0.1: TLS_SECURE, TLSv1.3 ")
    assert "not valid" not in lines[2]
    assert lines[3] == f"mail to {THERE} would go there with TLS_SECURE"


def test_nothing_is_remembered(check: Check, tmp_path: Path) -> None:
    check(THERE)
    assert not list(tmp_path.glob("server-*/data/domaininfo/*"))
    assert not list(tmp_path.glob("server-*/data/sts-cache/*"))


def test_records_of_dane_that_are_not_signed_are_not_heeded(check: Check) -> None:
    name = (f"_25._tcp.{MX}", "TLSA")
    lines = check(THERE, records={**RECORDS, name: ("3 1 1 " + "5a" * 32,)}).out.splitlines()
    assert lines[1] == f"MX 10 {MX}: any"


def test_a_policy_that_is_announced_but_cannot_be_had(check: Check) -> None:
    name = (f"_mta-sts.{THERE}", "TXT")
    lines = check(THERE, records={**RECORDS, name: ('"v=STSv1; id=7"',)}).out.splitlines()
    assert lines[0].startswith(f"MTA-STS: none: the policy of {THERE} cannot be had: ")


def test_nobody_answers(check: Check) -> None:
    ended = check(THERE, port=1)
    assert ended.status == 1
    assert "Connection refused" in ended.out
    assert ended.out.splitlines()[-1] == f"no server of {THERE} would get mail from here"


def test_a_domain_without_servers(check: Check) -> None:
    ended = check("nowhere.example")
    assert (ended.status, ended.out) == (1, "")
    assert "the domain nowhere.example does not exist" in ended.err


def test_a_message_is_sent_and_its_story_told(check: Check, there: Server) -> None:
    ended = check("--send", f"eva@{THERE}")
    assert ended.status == 0, ended
    assert f"For eva@{THERE}: delivered." in ended.out
    assert ended.out.rstrip().endswith("Done after 1 attempt.")
    [mail] = there.mail("eva", THERE)
    assert b"From: <postmaster@here.example>" in mail
    assert b"\nDate: " in mail


def test_the_story_of_a_message_that_is_refused(check: Check) -> None:
    ended = check("--send", f"nobody@{THERE}")
    assert ended.status == 1
    assert f"For nobody@{THERE}: not delivered." in ended.out
