# SPDX-License-Identifier: Apache-2.0
"""More than one host: equal mail exchangers, a secondary one, and HAProxy in front of two."""

from __future__ import annotations

import base64
import collections
import re
import smtplib
import ssl
import threading

import pytest
from support import wait_for

from .outgrowing import HaProxy, Host, write_shared_configuration
from .peers import Dovecot
from .server import USERS, Chasquid
from .tools import ANA, LOOPBACK, free_port, letter, subjects

SVEN = "sven@sender.example"


class Sender(Chasquid):
    """The server of somebody elsewhere."""

    hostname = "mail.sender.example"


def retry(*servers):
    for server in servers:
        server.command("queue", "retry", "all", check=False)


class TestTwoEqualMailExchangers:
    """They share the configuration and the mailboxes; each has a queue of its own."""

    @pytest.fixture
    def port(self, names):
        names.records["here.example"] = {
            "MX": ["10 mx1.here.example.", "10 mx2.here.example."],
        }
        names.records["mx1.here.example"] = {"A": ["127.0.0.11"]}
        names.records["mx2.here.example"] = {"A": ["127.0.0.12"]}
        return free_port()

    @pytest.fixture
    def dovecot(self, start):
        return start(Dovecot, users=USERS)

    @pytest.fixture
    def exchangers(self, start, place, names, port, dovecot):
        config_dir = write_shared_configuration(
            place / "shared",
            names,
            users=USERS,
            settings=[f'lmtp_address: "{LOOPBACK}:{dovecot.lmtp_port}"'],
            certificate_names=["mx1.here.example", "mx2.here.example", "localhost"],
        )
        return [
            start(Host, config_dir, f"mx{number}.here.example", users=USERS,
                  place=f"127.0.0.1{number}:{port}")
            for number in (1, 2)
        ]  # fmt: skip

    @pytest.fixture
    def sender(self, start, names, port, exchangers):
        return start(Sender, names, users={SVEN: "skerry"}, outgoing_smtp_port=port,
                     max_queue_items=1000)  # fmt: skip

    def test_no_message_is_lost_when_one_is_killed_in_the_middle_of_a_stream(
        self, dovecot, exchangers, sender
    ):
        first, second = exchangers
        accepted = []

        def submit_all():
            with sender.submission(SVEN) as client:
                for number in range(150):
                    subject = f"number {number:03}"
                    client.send_message(letter(subject, SVEN, ANA), SVEN, [ANA])
                    accepted.append(subject)

        submitting = threading.Thread(target=submit_all)
        submitting.start()
        dovecot.wait_for_letters(ANA, 20)
        first.kill()
        at_the_kill = len(accepted)
        submitting.join()
        assert 0 < at_the_kill < len(accepted) == 150
        retry(sender)
        wait_for(lambda: not sender.queue_ids(), "an empty queue of the sender")
        wait_for(lambda: not second.queue_ids(), "an empty queue of the second")
        first.start()
        retry(first)
        wait_for(lambda: not first.queue_ids(), "an empty queue of the first")
        arrived = dovecot.letters(ANA)
        assert sorted(set(subjects(arrived))) == accepted
        took = collections.Counter(self.exchanger(message) for message in arrived)
        assert took["mx2.here.example"] > took["mx1.here.example"] > 0

    def test_what_the_killed_one_had_accepted_waits_for_its_return(
        self, dovecot, exchangers, sender
    ):
        first, second = exchangers
        expected = [f"number {number:02}" for number in range(20)]
        dovecot.stop()
        with sender.submission(SVEN) as client:
            for subject in expected:
                client.send_message(letter(subject, SVEN, ANA), SVEN, [ANA])
        wait_for(lambda: not sender.queue_ids(), "an empty queue of the sender")
        in_first, in_second = len(first.queue_ids()), len(second.queue_ids())
        assert in_first + in_second == 20
        assert in_first
        assert in_second
        first.kill()
        dovecot.start()
        retry(second)
        assert len(dovecot.wait_for_letters(ANA, in_second)) == in_second
        wait_for(lambda: not second.queue_ids(), "an empty queue")
        first.start()
        retry(first)
        assert subjects(dovecot.wait_for_letters(ANA, 20)) == expected

    def test_a_user_logs_in_at_either(self, dovecot, exchangers):
        for exchanger in exchangers:
            exchanger.submit(ANA, ["bob@here.example"], letter("one of two", ANA, "bob"))
        arrived = dovecot.wait_for_letters("bob@here.example", 2)
        assert {self.exchanger(message) for message in arrived} == {
            "mx1.here.example",
            "mx2.here.example",
        }

    @staticmethod
    def exchanger(message):
        """Return who brought a message to Dovecot; the topmost field is Dovecot's own."""
        return message.get_all("Received")[1].partition("by ")[2].split()[0]


STRANGER = "carl@client.example"
STRANGERS_ADDRESS = "127.0.0.7"  # where client.example sends from
RELAYS_ADDRESS = LOOPBACK  # where every connection of ours comes from


class Primary(Chasquid):
    hostname = "mx1.here.example"


class Secondary(Chasquid):
    hostname = "mx2.here.example"


class Stranger(Chasquid):
    hostname = "mx.client.example"


class TestASecondaryMailExchanger:
    """It knows the domain only by aliases that lead to the primary one."""

    ALIASES = "*: *@here.example via mx1.here.example:{port}\n"

    @pytest.fixture
    def primary(self, start, names):
        names.records["here.example"] = {
            "MX": ["10 mx1.here.example.", "20 mx2.here.example."],
            "TXT": ['"v=spf1 mx -all"'],
        }
        names.records["mx1.here.example"] = {"A": [LOOPBACK]}
        names.records["mx2.here.example"] = {"A": [RELAYS_ADDRESS]}
        names.records["client.example"] = {"TXT": [f'"v=spf1 ip4:{STRANGERS_ADDRESS} -all"']}
        return start(Primary, names, users=USERS, trusted_relay=RELAYS_ADDRESS)

    @pytest.fixture
    def secondary(self, start, names, primary):
        aliases = self.ALIASES.format(port=primary.smtp_port)
        return start(Secondary, names, users={}, aliases={"here.example": aliases})

    @staticmethod
    def send(server, subject, recipient=ANA, sender=STRANGER):
        source = (STRANGERS_ADDRESS, 0)
        with smtplib.SMTP(LOOPBACK, server.smtp_port, "client.example", 20, source) as client:
            client.send_message(letter(subject, STRANGER, recipient), sender, [recipient])

    def test_it_keeps_the_mail_while_the_primary_is_down(self, primary, secondary):
        primary.stop()
        self.send(secondary, "while it was down")
        secondary.wait_for_log("event=next-attempt")
        assert len(secondary.queue_ids()) == 1
        primary.start()
        retry(secondary)
        [arrived] = primary.wait_for_letters(ANA)
        assert arrived["Subject"] == "while it was down"
        wait_for(lambda: not secondary.queue_ids(), "an empty queue")

    def test_a_trusted_relay_passes_the_sender_on_as_it_was(self, primary, secondary):
        self.send(primary, "straight")
        self.send(secondary, "round about")
        arrived = {letter["Subject"]: letter for letter in primary.wait_for_letters(ANA, 2)}
        straight, round_about = arrived["straight"], arrived["round about"]
        assert straight["Return-Path"] == f"<{STRANGER}>"
        assert straight["Received-SPF"].startswith("pass")
        first, second = round_about.get_all("Received-SPF")
        assert first.startswith("none (mx1.here.example: the client is a relay of ours)")
        assert f"client-ip={RELAYS_ADDRESS}" in first
        assert second.startswith("pass")
        assert f"client-ip={STRANGERS_ADDRESS}" in second
        assert round_about["Return-Path"] == f"<{STRANGER}>"

    def test_mail_without_a_sender_comes_through(self, primary, secondary, names):
        names.records["mx2.here.example"]["TXT"] = ['"v=spf1 a -all"']
        self.send(secondary, "a report", sender="")
        [arrived] = primary.wait_for_letters(ANA)
        assert arrived["Return-Path"] == "<>"

    def test_aliases_for_each_name_let_it_refuse_whom_nobody_knows(self, start, names, primary):
        via = f"via mx1.here.example:{primary.smtp_port}"
        aliases = "".join(f"{name}: {name}@here.example {via}\n" for name in ("ana", "bob"))
        secondary = start(Secondary, names, users={}, aliases={"here.example": aliases})
        with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
            self.send(secondary, "to nobody", "nobody@here.example")
        [(code, _)] = caught.value.recipients.values()
        assert code == 550
        self.send(secondary, "to bob", "bob+shop@here.example")
        [arrived] = primary.wait_for_letters("bob@here.example")
        assert arrived["Subject"] == "to bob"

    def test_mail_that_only_its_way_vouches_for_comes_through(self, primary, secondary, names):
        names.records["_dmarc.client.example"] = {"TXT": ['"v=DMARC1; p=reject"']}
        self.send(primary, "straight")
        self.send(secondary, "round about")
        wait_for(lambda: not secondary.queue_ids(), "an empty queue of the secondary")
        wait_for(lambda: not primary.queue_ids(), "an empty queue of the primary")
        assert subjects(primary.letters(ANA)) == ["round about", "straight"]

    def test_such_mail_comes_through_where_the_primary_only_writes_dmarc_down(
        self, primary, secondary, names
    ):
        names.records["_dmarc.client.example"] = {"TXT": ['"v=DMARC1; p=reject"']}
        primary.settings["dmarc_policy"] = "report"
        primary.write_settings()
        primary.restart()
        self.send(secondary, "round about")
        [arrived] = primary.wait_for_letters(ANA)
        by_primary, by_secondary = arrived.get_all("Authentication-Results")
        assert by_primary.startswith("mx1.here.example;")
        assert "dmarc=fail" in by_primary
        assert by_secondary.startswith("mx2.here.example;")
        assert "dmarc=pass" in by_secondary

    def test_the_sender_hears_of_a_failure_of_the_primary(self, start, names, primary, secondary):
        names.records["client.example"]["MX"] = ["10 mx.client.example."]
        names.records["mx.client.example"] = {"A": [LOOPBACK]}
        stranger = start(Stranger, names, users={STRANGER: "crab"})
        aliases = primary.config_dir / "domains" / "here.example" / "aliases"
        aliases.write_text("broken: | /bin/false\n")
        primary.settings["outgoing_smtp_port"] = stranger.smtp_port
        primary.write_settings()
        primary.restart()
        self.send(primary, "straight", "broken@here.example")
        assert len(stranger.wait_for_letters(STRANGER)) == 1
        self.send(secondary, "round about", "broken@here.example")
        wait_for(lambda: primary.log().count("event=done ") >= 4, "an end")
        assert len(stranger.letters(STRANGER)) == 2


class TestHaProxy:
    """It stands in front of two hosts, and users know only it."""

    CLIENT = "127.0.0.7"

    @pytest.fixture
    def hosts(self, start, place, names):
        config_dir = write_shared_configuration(
            place / "shared",
            names,
            users=USERS,
            settings=["haproxy_incoming: true", "limit_loopback: true", "max_failed_logins: 2"],
            certificate_names=["submit.here.example", "localhost"],
        )
        return [start(Host, config_dir, f"host{number}.here.example", users=USERS)
                for number in (1, 2)]  # fmt: skip

    @pytest.fixture
    def haproxy(self, start, hosts):
        return start(HaProxy, *(host.submission_port for host in hosts))

    def log_in(self, haproxy, hosts, password="secret", source=CLIENT):
        """Log in through HAProxy, and return the reply."""
        context = ssl.create_default_context(cafile=str(hosts[0].certificate))
        with smtplib.SMTP("localhost", haproxy.port, "desk.example", 20, (source, 0)) as client:
            client.starttls(context=context)
            client.ehlo()
            secret = base64.b64encode(f"\0{ANA}\0{password}".encode()).decode()
            return client.docmd("AUTH PLAIN", secret)

    def logins(self, host, source=CLIENT):
        return len(re.findall(rf"event=login id=\S+ peer={source} .*user={ANA}", host.log()))

    def test_both_hosts_get_logins_and_know_the_clients_address(self, haproxy, hosts):
        for _ in range(4):
            code, text = self.log_in(haproxy, hosts)
            assert code == 235, text
        # whose turn it is after its own checks is HAProxy's affair
        logins = [self.logins(host) for host in hosts]
        assert sum(logins) == 4
        assert min(logins) >= 1

    def test_logins_go_on_when_a_host_is_stopped_and_when_it_comes_back(self, haproxy, hosts):
        first, second = hosts
        assert {self.log_in(haproxy, hosts)[0] for _ in range(2)} == {235}
        before = self.logins(second)
        first.stop()
        assert {self.log_in(haproxy, hosts)[0] for _ in range(3)} == {235}
        assert self.logins(second) == before + 3
        haproxy.wait_for_log("host1 is DOWN")
        first.start()
        haproxy.wait_for_log("host1 is UP")
        before = self.logins(first)
        second.stop()
        assert {self.log_in(haproxy, hosts)[0] for _ in range(2)} == {235}
        assert self.logins(first) == before + 2

    def test_who_guesses_passwords_shuts_out_nobody_else(self, start, hosts):
        haproxy = start(HaProxy, hosts[0].submission_port)
        for _ in range(2):
            assert self.log_in(haproxy, hosts, "guessed", source="127.0.0.8")[0] == 535
        assert self.log_in(haproxy, hosts, "secret", source="127.0.0.8")[0] == 454
        code, text = self.log_in(haproxy, hosts)
        assert code == 235, text
