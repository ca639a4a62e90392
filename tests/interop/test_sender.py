# SPDX-License-Identifier: Apache-2.0
"""Mail that claims too much, and TLS that is taken away, as Postfix and others see it."""

from __future__ import annotations

import pytest
from support import wait_for

from .peers import Postfix
from .server import Chasquid, There
from .tools import ANA, DORA, letter, subjects

US = {"TXT": ['"v=spf1 ip4:127.0.0.1 -all"']}
NOT_US = {"TXT": ['"v=spf1 ip4:192.0.2.1 -all"']}

# Results of SPF that refuse nothing, and what a domain must publish for each.
RESULTS = [
    ("pass", US),
    ("pass", {"TXT": ['"v=spf1 mx -all"'], "MX": ["0 mx.dest.example."]}),
    ("pass", {"TXT": ['"v=spf1 include:spf.client.example -all"']}),
    ("pass", {"TXT": ['"v=spf1 exists:%{l}.%{i}.spf.client.example -all"']}),
    ("softfail", {"TXT": ['"v=spf1 ~all"']}),
    ("neutral", {"TXT": ['"v=spf1 ?all"']}),
    ("permerror", {"TXT": ['"v=spf1 all:all"']}),
    ("temperror", "SERVFAIL"),
    ("none", {}),
]


@pytest.fixture
def postfix(start, chasquid) -> Postfix:
    return start(Postfix, relay_port=chasquid.smtp_port)


class TestSpf:
    def test_postfix_is_refused_where_the_sender_does_not_allow_it(self, names, chasquid, postfix):
        names.records["dest.example"] = NOT_US
        postfix.send(DORA, [ANA], letter("forged", DORA, ANA))
        postfix.wait_for_log("said: 550 5.7.23 SPF:")
        [bounce] = postfix.wait_for_letters(DORA)
        assert "does not let 127.0.0.1 send its mail" in bounce.as_string()
        assert not chasquid.letters(ANA)

    def test_the_explanation_of_the_sender_is_passed_on(self, names, postfix):
        names.records["dest.example"] = {"TXT": ['"v=spf1 -all exp=why.dest.example"']}
        names.records["why.dest.example"] = {"TXT": ['"ask %{d} about %{i}"']}
        postfix.send(DORA, [ANA], letter("forged", DORA, ANA))
        postfix.wait_for_log("ask dest.example about 127.0.0.1")

    def test_any_other_result_is_only_written_down(self, names, chasquid, postfix):
        names.records |= {
            "mx.dest.example": {"A": ["127.0.0.1"]},
            "spf.client.example": US,
            "dora.127.0.0.1.spf.client.example": {"A": ["127.0.0.2"]},
        }
        senders = {}
        for number, (result, record) in enumerate(RESULTS):
            names.records[f"number{number}.example"] = record
            senders[f"dora@number{number}.example"] = result
        for sender in senders:
            postfix.send(sender, [ANA], letter("said and done", sender, ANA))
        for arrived in chasquid.wait_for_letters(ANA, len(senders)):
            sender = arrived["Return-Path"].strip("<>")
            result = senders.pop(sender)
            assert f"spf={result} smtp.mailfrom={sender};" in arrived["Authentication-Results"]
            assert arrived["Received-SPF"].startswith(f"{result} ")
        assert not senders

    def test_the_host_answers_for_a_null_sender(self, names, chasquid, postfix):
        names.records["mx.dest.example"] = NOT_US
        postfix.send("", [ANA], letter("a notification", DORA, ANA))
        postfix.wait_for_log("said: 550 5.7.23")
        assert not chasquid.letters(ANA)


class TestDmarc:
    def send(self, names, postfix, policy):
        """Send in the name of a bank, from a domain whose SPF passes."""
        names.records["dest.example"] = US
        names.records["_dmarc.bank.example"] = {"TXT": [f'"v=DMARC1; p={policy}"']}
        postfix.send(DORA, [ANA], letter("your account", "service@bank.example", ANA))

    def test_postfix_is_refused_where_the_author_asks_for_it(self, names, chasquid, postfix):
        self.send(names, postfix, "reject")
        postfix.wait_for_log("said: 550 5.7.1 DMARC:")
        assert "in reply to end of DATA command" in postfix.log()
        postfix.wait_for_letters(DORA)
        assert not chasquid.letters(ANA)

    def test_a_subdomain_is_covered_too(self, names, chasquid, postfix):
        names.records["_dmarc.bank.example"] = {"TXT": ['"v=DMARC1; p=none; sp=reject"']}
        message = letter("your account", "service@new.bank.example", ANA)
        postfix.send(DORA, [ANA], message)
        postfix.wait_for_log("said: 550 5.7.1 DMARC:")

    # t=y asks for one step less (RFC 9989)
    @pytest.mark.parametrize("policy", ["quarantine", "reject; t=y"])
    def test_quarantine_is_the_folder_for_junk(self, names, chasquid, postfix, policy):
        self.send(names, postfix, policy)
        junk = chasquid.maildir(ANA) / ".Junk" / "new"
        [path] = wait_for(lambda: list(junk.glob("*")), "a letter in the folder for junk")
        assert "dmarc=fail (p=quarantine) header.from=bank.example" in path.read_text()
        assert not chasquid.letters(ANA)

    @pytest.mark.parametrize("policy", ["none", "quarantine; t=y"])
    def test_who_only_looks_on_gets_the_mail_through(self, names, chasquid, postfix, policy):
        self.send(names, postfix, policy)
        [arrived] = chasquid.wait_for_letters(ANA)
        assert "dmarc=fail (p=none)" in arrived["Authentication-Results"]

    def test_the_authors_own_server_passes(self, names, chasquid, postfix):
        names.records["dest.example"] = US
        names.records["_dmarc.dest.example"] = {"TXT": ['"v=DMARC1; p=reject; aspf=s"']}
        postfix.send(DORA, [ANA], letter("my own", DORA, ANA))
        [arrived] = chasquid.wait_for_letters(ANA)
        assert "dmarc=pass (p=reject)" in arrived["Authentication-Results"]


class TestTlsThatWasSeenOnce:
    def test_a_sender_who_had_it_may_not_come_without(self, start, names, chasquid, postfix):
        names.records["dest.example"] = US
        postfix.send(DORA, [ANA], letter("with TLS", DORA, ANA))
        chasquid.wait_for_letters(ANA)
        chasquid.wait_for_log("dest.example is now TLS_CLIENT and PLAIN")
        bare = {"smtp_tls_security_level": "none"}
        attacker = start(Postfix, relay_port=chasquid.smtp_port, settings=bare)
        attacker.send(DORA, [ANA], letter("without", DORA, ANA))
        attacker.wait_for_log("said: 550 5.7.3")
        chasquid.restart()
        attacker.send(DORA, [ANA], letter("still without", DORA, ANA))
        wait_for(lambda: attacker.log().count("said: 550 5.7.3") >= 2, "another refusal")
        chasquid.command("domaininfo-remove", "dest.example")
        attacker.send(DORA, [ANA], letter("forgotten", DORA, ANA))
        arrived = chasquid.wait_for_letters(ANA, 2)
        assert subjects(arrived) == ["forgotten", "with TLS"]

    def test_a_sender_who_never_had_it_may(self, start, names, chasquid):
        names.records["dest.example"] = US
        bare = {"smtp_tls_security_level": "none"}
        postfix = start(Postfix, relay_port=chasquid.smtp_port, settings=bare)
        postfix.send(DORA, [ANA], letter("first", DORA, ANA))
        chasquid.wait_for_letters(ANA)
        postfix.send(DORA, [ANA], letter("second", DORA, ANA))
        chasquid.wait_for_letters(ANA, 2)

    def test_nobody_sets_the_level_of_somebody_elses_domain(self, start, names, chasquid, postfix):
        postfix.send(DORA, [ANA], letter("with TLS", DORA, ANA))
        chasquid.wait_for_letters(ANA)
        bare = {"smtp_tls_security_level": "none"}
        other = start(Postfix, relay_port=chasquid.smtp_port, settings=bare)
        other.send(DORA, [ANA], letter("without", DORA, ANA))
        chasquid.wait_for_letters(ANA, 2)

    def test_a_server_that_had_it_gets_nothing_without(self, start, names):
        names.records["dest.example"] = {"MX": ["0 mx.dest.example."]}
        names.records["mx.dest.example"] = {"A": ["127.0.0.1"]}
        postfix = start(Postfix)
        chasquid = start(Chasquid, names, outgoing_smtp_port=postfix.port)
        chasquid.submit(ANA, [DORA], letter("with TLS", ANA, DORA))
        postfix.wait_for_letters(DORA)
        chasquid.wait_for_log("dest.example is now PLAIN and TLS_INSECURE")
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
        postfix.change(smtpd_tls_security_level="none")
        chasquid.restart()
        chasquid.submit(ANA, [DORA], letter("without", ANA, DORA))
        chasquid.wait_for_log("it does not offer TLS; less is not safe")
        assert "4.7.5" in chasquid.log()
        [id] = chasquid.queue_ids()
        assert subjects(postfix.letters(DORA)) == ["with TLS"]
        chasquid.command("domaininfo-remove", "dest.example")
        chasquid.command("queue", "retry", id)
        assert subjects(postfix.wait_for_letters(DORA, 2)) == ["with TLS", "without"]


class TestTwoServersOfOurKind:
    def start_both(self, start, names):
        for domain in ("here.example", "there.example"):
            names.records[domain] = {"MX": [f"0 mail.{domain}."], "TXT": US["TXT"]}
            names.records[f"mail.{domain}"] = {"A": ["127.0.0.1"]}
            names.records[f"_dmarc.{domain}"] = {"TXT": ['"v=DMARC1; p=reject"']}
        there = start(There, names, users={"tom@there.example": "x"})
        here = start(Chasquid, names, outgoing_smtp_port=there.smtp_port)
        there.settings["outgoing_smtp_port"] = here.smtp_port
        there.write_settings()
        there.restart()
        return here, there

    def test_each_finds_the_other_in_order(self, start, names):
        here, there = self.start_both(start, names)
        here.submit(ANA, ["tom@there.example"], letter("there", ANA, "tom@there.example"))
        [arrived] = there.wait_for_letters("tom@there.example")
        assert "spf=pass" in arrived["Authentication-Results"]
        assert "dmarc=pass" in arrived["Authentication-Results"]
        there.submit("tom@there.example", [ANA], letter("back", "tom@there.example", ANA))
        [arrived] = here.wait_for_letters(ANA)
        assert "dmarc=pass" in arrived["Authentication-Results"]
        here.wait_for_log("there.example is now TLS_CLIENT and TLS_INSECURE")
        there.wait_for_log("here.example is now TLS_CLIENT and TLS_INSECURE")

    def test_one_refuses_what_the_other_may_not_say(self, start, names):
        here, there = self.start_both(start, names)
        names.records["here.example"]["TXT"] = NOT_US["TXT"]
        here.submit(ANA, ["tom@there.example"], letter("there", ANA, "tom@there.example"))
        [report] = here.wait_for_letters(ANA)
        _, for_machines, _ = report.iter_parts()
        assert for_machines.get_payload()[1]["Status"] == "5.7.23"
        assert not there.letters("tom@there.example")
