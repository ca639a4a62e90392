# SPDX-License-Identifier: Apache-2.0
"""Postfix sends to chasquid, and chasquid to Postfix."""

from __future__ import annotations

import time

from support import wait_for

from .clients import smtp_source
from .peers import Postfix
from .server import USERS, WORLD, Chasquid
from .tools import letter, subjects


def start_both(start, names, *, users=None, aliases=None, **postfix_options):
    """Start a Postfix for dest.example, and a chasquid that sends to it."""
    names.records.update(WORLD)
    postfix = start(Postfix, **postfix_options)
    chasquid = start(
        Chasquid,
        names,
        users=users or USERS,
        aliases=aliases,
        outgoing_smtp_port=postfix.port,
    )
    return postfix, chasquid


class TestFromPostfix:
    def test_a_message_arrives_over_tls(self, start, chasquid):
        postfix = start(Postfix, relay_port=chasquid.smtp_port)
        message = letter("relayed in", "dora@dest.example", "ana@here.example")
        postfix.send("dora@dest.example", ["ana@here.example"], message)
        [arrived] = chasquid.wait_for_letters("ana@here.example")
        assert arrived["Subject"] == "relayed in"
        assert arrived["Return-Path"] == "<dora@dest.example>"
        assert arrived["Delivered-To"] == "ana@here.example"
        assert "with ESMTPS" in arrived["Received"]
        postfix.wait_for_log("status=sent (250 2.0.0")
        assert "TLS connection established" in postfix.log()

    def test_two_recipients_come_in_one_transaction(self, start, chasquid):
        postfix = start(Postfix, relay_port=chasquid.smtp_port)
        recipients = ["ana@here.example", "bob@here.example"]
        postfix.send("dora@dest.example", recipients, letter("both", "dora", *recipients))
        [first] = chasquid.wait_for_letters("ana@here.example")
        [second] = chasquid.wait_for_letters("bob@here.example")
        assert first["Received"] == second["Received"]

    def test_an_unknown_recipient_is_refused_and_the_other_served(self, start, chasquid):
        postfix = start(Postfix, relay_port=chasquid.smtp_port)
        recipients = ["ana@here.example", "nobody@here.example"]
        postfix.send("dora@dest.example", recipients, letter("half", "dora", *recipients))
        assert subjects(chasquid.wait_for_letters("ana@here.example")) == ["half"]
        postfix.wait_for_log("said: 550 5.1.1")
        [bounce] = postfix.wait_for_letters("dora@dest.example")
        assert bounce.get_content_type() == "multipart/report"

    def test_a_letter_of_dots_and_long_lines_arrives_as_it_was(self, start, chasquid):
        postfix = start(Postfix, relay_port=chasquid.smtp_port)
        body = ".\n..\n.a dot\n" + "x" * 900 + "\n\n.\n" + "a line\n" * 50_000 + "."
        message = letter("dots", "dora@dest.example", "ana@here.example", body=body + "\n")
        postfix.send("dora@dest.example", ["ana@here.example"], message)
        [arrived] = chasquid.wait_for_letters("ana@here.example")
        assert arrived.get_content() == message.get_content().replace("\r\n", "\n")

    def test_internationalized_addresses(self, start, names):
        users = {"ñandú@here.example": "secret", "δοκιμή@παράδειγμα.example": "secret"}
        chasquid = start(Chasquid, names, users=users)
        postfix = start(Postfix, relay_port=chasquid.smtp_port)
        for address in users:
            message = letter("grüße", "übung@dest.example", address)
            postfix.send("übung@dest.example", [address], message)
            [arrived] = chasquid.wait_for_letters(address)
            assert arrived["Subject"] == "grüße"
            assert arrived["Return-Path"] == "<übung@dest.example>"
            assert "with UTF8SMTPS" in arrived["Received"]

    def test_many_messages_at_once(self, chasquid):
        smtp_source(
            chasquid.smtp_port,
            sender="load@client.example",
            recipient="ana@here.example",
            messages=100,
            sessions=10,
        )
        arrived = chasquid.wait_for_letters("ana@here.example", 100)
        assert len({message["Message-Id"] for message in arrived}) == len(arrived) == 100

    def test_many_recipients_of_one_message(self, start, names):
        users = {f"{number}user@here.example": "x" for number in ("", 2, 3, 4, 5)}
        chasquid = start(Chasquid, names, users=users)
        smtp_source(
            chasquid.smtp_port,
            sender="load@client.example",
            recipient="user@here.example",
            messages=4,
            sessions=2,
            recipients_each=5,
        )
        for address in users:
            chasquid.wait_for_letters(address, 4)


class TestToPostfix:
    def test_a_message_goes_out_over_tls(self, start, names):
        postfix, chasquid = start_both(start, names)
        message = letter("going out", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        [arrived] = postfix.wait_for_letters("dora@dest.example")
        assert arrived["Subject"] == "going out"
        assert arrived["Return-Path"] == "<ana@here.example>"
        by_postfix, by_chasquid = arrived.get_all("Received")
        assert "using TLSv1.3" in by_postfix
        assert "with ESMTPSA" in by_chasquid
        assert "127.0.0.1" not in by_chasquid, "where our users are is nobody's business"
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")

    def test_recipients_of_one_domain_travel_together(self, start, names):
        postfix, chasquid = start_both(start, names)
        recipients = ["dora@dest.example", "diego@dest.example"]
        message = letter("together", "ana@here.example", *recipients)
        chasquid.submit("ana@here.example", recipients, message)
        [first] = postfix.wait_for_letters("dora@dest.example")
        [second] = postfix.wait_for_letters("diego@dest.example")
        assert first.get_all("Received")[0].split() == second.get_all("Received")[0].split()
        postfix.wait_for_log("nrcpt=2")

    def test_a_server_without_starttls_is_served_all_the_same(self, start, names):
        settings = {"smtpd_tls_security_level": "none"}
        postfix, chasquid = start_both(start, names, settings=settings)
        message = letter("in the clear", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        [arrived] = postfix.wait_for_letters("dora@dest.example")
        assert "TLS" not in arrived.get_all("Received")[0]

    def test_a_server_that_demands_starttls_is_served(self, start, names):
        settings = {"smtpd_tls_security_level": "encrypt"}
        postfix, chasquid = start_both(start, names, settings=settings)
        message = letter("encrypted", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        postfix.wait_for_letters("dora@dest.example")

    def test_a_server_whose_tls_is_broken_is_served_in_the_clear(self, start, names):
        settings = {"smtpd_tls_cert_file": "/dev/null", "smtpd_tls_ciphers": "null"}
        settings["smtpd_tls_protocols"] = ">=TLSv1.3, <=TLSv1.2"  # leaves none
        postfix, chasquid = start_both(start, names, settings=settings)
        message = letter("no handshake", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        [arrived] = postfix.wait_for_letters("dora@dest.example")
        assert "TLS" not in arrived.get_all("Received")[0]
        assert "starttls=" in postfix.log(), "it was not tried"

    def test_a_refused_recipient_gives_a_notification(self, start, names):
        postfix, chasquid = start_both(start, names)
        recipients = ["dora@dest.example", "nobody@dest.example"]
        message = letter("half of it", "ana@here.example", *recipients)
        chasquid.submit("ana@here.example", recipients, message)
        postfix.wait_for_letters("dora@dest.example")
        [report] = chasquid.wait_for_letters("ana@here.example")
        assert report["Return-Path"] == "<>"
        assert report["To"].addresses[0].addr_spec == "ana@here.example"
        assert report["Auto-Submitted"].startswith("auto-")
        assert report["Message-ID"] and report["Date"] and report["From"]
        assert report.get_content_type() == "multipart/report"
        assert report.get_param("report-type") == "delivery-status"
        for_people, for_machines, original = report.iter_parts()
        assert "nobody@dest.example" in for_people.get_content()
        assert "dora@dest.example" not in for_people.get_content()
        assert for_machines.get_content_type() == "message/delivery-status"
        of_message, of_recipient = for_machines.get_payload()
        assert of_message["Reporting-MTA"] == "dns; mail.here.example"
        assert of_message["Arrival-Date"]
        assert of_recipient["Final-Recipient"] == "rfc822; nobody@dest.example"
        assert of_recipient["Action"] == "failed"
        assert of_recipient["Status"] == "5.1.1"
        assert of_recipient["Diagnostic-Code"].startswith("smtp; 550 5.1.1")
        assert "mx.dest.example" in of_recipient["Remote-MTA"]
        assert original.get_content_type() == "message/rfc822"
        assert original.get_content()["Subject"] == "half of it"
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")

    def test_the_second_mx_is_asked_when_the_first_is_down(self, start, names):
        postfix, chasquid = start_both(start, names)
        names.records["dest.example"] = {"MX": ["20 mx.dest.example.", "10 down.dest.example."]}
        names.records["down.dest.example"] = {"A": ["127.0.0.2"]}
        message = letter("a detour", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        postfix.wait_for_letters("dora@dest.example")
        assert "down.dest.example A" in names.questions

    def test_without_mx_the_address_of_the_domain_serves(self, start, names):
        postfix, chasquid = start_both(start, names)
        names.records["dest.example"] = {"A": ["127.0.0.1"]}
        message = letter("no mx", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        postfix.wait_for_letters("dora@dest.example")

    def test_a_domain_that_does_not_exist_gives_a_notification(self, start, names):
        chasquid = start(Chasquid, names, users=USERS)
        message = letter("nowhere", "ana@here.example", "dora@nowhere.example")
        chasquid.submit("ana@here.example", ["dora@nowhere.example"], message)
        [report] = chasquid.wait_for_letters("ana@here.example")
        _, for_machines, _ = report.iter_parts()
        assert for_machines.get_payload()[1]["Status"].startswith("5.1.")

    def test_a_server_that_is_down_is_tried_again(self, start, names):
        postfix, chasquid = start_both(start, names)
        postfix.stop()
        message = letter("patience", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        [id] = wait_for(chasquid.queue_ids, "a message in the queue")
        chasquid.wait_for_log("event=next-attempt")
        assert "dora@dest.example" in chasquid.command("queue", "show", id).stdout
        postfix.start()
        chasquid.command("queue", "retry", id)
        assert subjects(postfix.wait_for_letters("dora@dest.example")) == ["patience"]
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")

    def test_a_name_server_that_fails_defers(self, start, names):
        postfix, chasquid = start_both(start, names)
        names.records["dest.example"] = "SERVFAIL"
        message = letter("no names", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        chasquid.wait_for_log("event=next-attempt")
        names.records.update(WORLD)
        time.sleep(5.5)  # a failure may be remembered for a while (RFC 2308, 7.1)
        chasquid.command("queue", "retry", "all")
        postfix.wait_for_letters("dora@dest.example")

    def test_internationalized_addresses(self, start, names):
        users = {"ñandú@here.example": "secret"}
        postfix, chasquid = start_both(start, names, users=users, mailboxes=["δοκιμή"])
        message = letter("grüße", "ñandú@here.example", "δοκιμή@dest.example")
        chasquid.submit("ñandú@here.example", ["δοκιμή@dest.example"], message)
        [arrived] = postfix.wait_for_letters("δοκιμή@dest.example")
        assert arrived["Subject"] == "grüße"
        assert arrived["Return-Path"] == "<ñandú@here.example>"

    def test_a_server_without_smtputf8_gives_a_notification(self, start, names):
        users = {"ñandú@here.example": "secret"}
        settings = {"smtputf8_enable": "no"}
        postfix, chasquid = start_both(start, names, users=users, settings=settings)
        message = letter("grüße", "ñandú@here.example", "dora@dest.example")
        chasquid.submit("ñandú@here.example", ["dora@dest.example"], message)
        [report] = chasquid.wait_for_letters("ñandú@here.example")
        _, for_machines, original = report.iter_parts()
        assert for_machines.get_content_type() == "message/global-delivery-status"
        assert original.get_content_type() == "message/global"
        assert "6.7" in for_machines.get_content().decode()
        assert not postfix.letters("dora@dest.example")

    def test_an_alias_elsewhere_is_sent_on_under_our_name(self, start, names):
        aliases = {"here.example": "far: dora@dest.example\n"}
        postfix, chasquid = start_both(start, names, aliases=aliases)
        with chasquid.smtp() as client:
            message = letter("sent on", "carl@client.example", "far@here.example")
            client.send_message(message, "carl@client.example", ["far@here.example"])
        [arrived] = postfix.wait_for_letters("dora@dest.example")
        assert arrived["Return-Path"] == "<far+fwd_from=carl=client.example@here.example>"

    def test_many_messages_sent_on_at_once(self, start, names):
        aliases = {"here.example": "far: dora@dest.example\n"}
        postfix, chasquid = start_both(start, names, aliases=aliases)
        smtp_source(
            chasquid.smtp_port,
            sender="load@client.example",
            recipient="far@here.example",
            messages=50,
            sessions=5,
        )
        arrived = postfix.wait_for_letters("dora@dest.example", 50)
        assert len({message["Message-Id"] for message in arrived}) == len(arrived) == 50
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")

    def test_a_letter_of_many_megabytes(self, start, names):
        settings = {"message_size_limit": 20_000_000}
        postfix, chasquid = start_both(start, names, settings=settings)
        body = "".join(f"{number:08d} and so on\n" for number in range(300_000))
        message = letter("big", "ana@here.example", "dora@dest.example", body=body)
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        [arrived] = postfix.wait_for_letters("dora@dest.example")
        assert arrived.get_content() == body
