# SPDX-License-Identifier: Apache-2.0
"""What was answered with 250 is delivered, whatever happens to the server or its disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import smtplib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import wait_for

from .peers import Postfix
from .server import USERS, Chasquid
from .tools import letter, need_root, subjects, unavailable

ROUNDS = int(os.environ.get("KILL_ROUNDS", "20"))


def begin_letter(client: smtplib.SMTP, *recipients: str, options: str = "") -> None:
    """Go as far as the 354."""
    client.ehlo()
    sender = "" if options else "carl@client.example"  # who is to hear of nothing
    assert client.docmd(f"MAIL FROM:<{sender}>")[0] == 250
    for recipient in recipients or ("ana@here.example",):
        assert client.docmd(f"RCPT TO:<{recipient}>{options}")[0] == 250
    assert client.docmd("DATA")[0] == 354


def end_letter(client: smtplib.SMTP, subject: str, octets: int = 1000) -> tuple[int, bytes]:
    body = ("x" * 78 + "\r\n") * (octets // 80)
    client.send(f"Subject: {subject}\r\n\r\n{body}.\r\n")
    return client.getreply()


def send_letter(
    client: smtplib.SMTP,
    subject: str,
    recipient: str = "ana@here.example",
    octets: int = 1000,
    options: str = "",
) -> tuple[int, bytes]:
    begin_letter(client, recipient, options=options)
    return end_letter(client, subject, octets)


class Impatient(Chasquid):
    """A server that waits three seconds at its end for a disk that hangs."""

    @property
    def serve_command(self) -> list[str]:
        code = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); import chasquid\n"
            "chasquid._HUNG_SECONDS = 3; sys.exit(chasquid.main())"
        )
        top = str(Path(__file__).parents[2])
        return [sys.executable, "-c", code, top, "--config-dir", str(self.config_dir), "serve"]


def test_it_ends_although_the_disk_hangs_and_nothing_is_lost(place, names):
    with Impatient(place / "impatient", names) as server:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        server.wait_for_log("event=ready")
        with server.smtp() as client:
            assert send_letter(client, "answered")[0] == 250
            (storage_process,) = map(int, children.read_text().split())
            os.kill(storage_process, signal.SIGSTOP)
            begin_letter(client)
            client.send("Subject: not answered\r\n\r\nHello.\r\n.\r\n")
            server.terminate()
            assert server.wait_for_end() == 1
            with pytest.raises(smtplib.SMTPServerDisconnected):
                client.getreply()
        assert "the disk has not answered for 3 seconds; ended without it" in server.log()
        wait_for(lambda: not Path(f"/proc/{storage_process}/exe").exists(), "its process to end")
        server.restart()
        with server.smtp() as client:
            assert send_letter(client, "afterwards")[0] == 250
        server.wait_for_letters("ana@here.example", 2)
        assert {"answered", "afterwards"} == set(subjects(server.letters("ana@here.example")))


class TestKill:
    @pytest.mark.parametrize(
        ("octets", "options"),
        [(1000, ""), (300_000, ""), (1000, " NOTIFY=SUCCESS"), (300_000, " NOTIFY=SUCCESS")],
        ids=["straight", "large", "by way of the queue", "large, by way of the queue"],
    )
    def test_after_250_nothing_is_lost(self, chasquid, octets, options):
        for number in range(ROUNDS):
            with chasquid.smtp() as client:
                subject = f"round {number:02}"
                assert send_letter(client, subject, octets=octets, options=options)[0] == 250
                time.sleep(number % 4 * 0.002)  # so that each step of a delivery is hit
                chasquid.kill()
                client.close()
            chasquid.start()
        sent = {f"round {number:02}" for number in range(ROUNDS)}
        wait_for(lambda: sent == set(subjects(chasquid.letters("ana@here.example"))), "all letters")
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")

    def test_with_several_under_way_those_answered_with_250_arrive(self, chasquid):
        accepted = set()
        for number in range(max(1, ROUNDS // 4)):
            clients = [smtplib.SMTP("127.0.0.1", chasquid.smtp_port, timeout=60) for _ in range(4)]
            for client in clients:
                begin_letter(client, "ana@here.example", "bob@here.example")
            for index, client in enumerate(clients):
                client.send(f"Subject: {number}-{index}\r\n\r\nHello.\r\n.\r\n")
            assert clients[0].getreply()[0] == 250
            chasquid.kill()
            accepted.add(f"{number}-0")
            for index, client in enumerate(clients[1:], 1):
                try:
                    if client.getreply()[0] == 250:
                        accepted.add(f"{number}-{index}")
                except (smtplib.SMTPServerDisconnected, OSError):
                    pass
                finally:
                    client.close()
            clients[0].close()
            chasquid.start()
        for name in ("ana@here.example", "bob@here.example"):
            wait_for(
                lambda name=name: accepted <= set(subjects(chasquid.letters(name))),
                "all accepted letters",
            )

    def test_while_waiting_for_another_server_nothing_is_lost(self, start, names):
        names.records["dest.example"] = {"MX": ["10 mx.dest.example."]}
        names.records["mx.dest.example"] = {"A": ["127.0.0.1"]}
        postfix = start(Postfix)
        chasquid = start(Chasquid, names, users=USERS, outgoing_smtp_port=postfix.port)
        postfix.stop()
        recipients = ["bob@here.example", "dora@dest.example"]
        message = letter("survivor", "ana@here.example", *recipients)
        chasquid.submit("ana@here.example", recipients, message)
        chasquid.wait_for_letters("bob@here.example")
        chasquid.wait_for_log("event=next-attempt")
        chasquid.kill()
        postfix.start()
        chasquid.start()
        chasquid.command("queue", "retry", "all")
        assert subjects(postfix.wait_for_letters("dora@dest.example")) == ["survivor"]
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
        assert len(chasquid.letters("bob@here.example")) == 1, "what was done was written down"

    def test_in_the_middle_of_a_letter_nothing_is_owed(self, chasquid):
        with chasquid.smtp() as client:
            begin_letter(client)
            client.send("Subject: half\r\n\r\n" + ("y" * 78 + "\r\n") * 10_000)
            wait_for(lambda: list((chasquid.data_dir / "queue" / "tmp").iterdir()), "a file")
            chasquid.kill()
            client.close()
        chasquid.start()
        # the ports accept before the queue is looked through, which is before any greeting
        tmp = chasquid.data_dir / "queue" / "tmp"
        wait_for(lambda: not list(tmp.iterdir()), "an empty tmp")
        assert not chasquid.queue_ids()
        with chasquid.smtp() as client:
            assert send_letter(client, "whole")[0] == 250
        assert subjects(chasquid.wait_for_letters("ana@here.example")) == ["whole"]


class TestTerm:
    def test_who_is_idle_hears_421(self, chasquid):
        with chasquid.smtp() as client:
            client.ehlo()
            chasquid.terminate()
            code, text = client.getreply()
            assert code == 421
            assert text.startswith(b"4.3.2")
            client.close()
        assert chasquid.wait_for_end() == 0

    def test_a_letter_under_way_may_be_finished(self, chasquid):
        with chasquid.smtp() as client:
            begin_letter(client)
            client.send("Subject: in time\r\n\r\n")
            chasquid.terminate()
            chasquid.wait_for_log("stopping")
            client.send("Hello.\r\n.\r\n")
            assert client.getreply()[0] == 250
            assert client.getreply()[0] == 421
            client.close()
        assert chasquid.wait_for_end() == 0
        chasquid.start()
        assert subjects(chasquid.wait_for_letters("ana@here.example")) == ["in time"]

    def test_a_client_that_dawdles_does_not_hold_it_up(self, chasquid):
        with chasquid.smtp() as client:
            begin_letter(client)
            client.send("Subject: never\r\n\r\n")
            chasquid.terminate()
            assert chasquid.wait_for_end(20) == 0
            client.close()
        chasquid.start()
        assert not chasquid.queue_ids()
        assert not chasquid.letters("ana@here.example")

    def test_the_ports_are_free_again_at_once(self, chasquid):
        with chasquid.smtp() as client:
            assert send_letter(client, "before")[0] == 250
            chasquid.terminate()
            assert chasquid.wait_for_end() == 0
            chasquid.start()
            client.close()
        with chasquid.smtp() as client:
            assert send_letter(client, "after")[0] == 250
        assert subjects(chasquid.wait_for_letters("ana@here.example", 2)) == ["after", "before"]


class TestHup:
    def test_a_new_user_is_known(self, chasquid):
        chasquid.command("user-add", "new@here.example", "--password", "fresh")
        chasquid.hang_up()
        chasquid.wait_for_log("event=reloaded")
        with chasquid.smtp() as client:
            assert send_letter(client, "welcome", "new@here.example")[0] == 250
        chasquid.wait_for_letters("new@here.example")

    def test_it_may_come_as_soon_as_the_ports_are_open(self, chasquid):
        for _ in range(5):
            chasquid.restart()
            chasquid.hang_up()
            chasquid.wait_for_log("event=ready")
            with chasquid.smtp() as client:
                assert client.noop()[0] == 250

    def test_a_mistake_leaves_the_old_in_force(self, chasquid):
        chasquid.wait_for_log("event=ready")  # the ports are open before the files are read
        aliases = chasquid.config_dir / "domains" / "here.example" / "aliases"
        aliases.write_text("this is no alias\n")
        chasquid.hang_up()
        chasquid.wait_for_log(f"{aliases}:1")
        with chasquid.smtp() as client:
            assert send_letter(client, "still here")[0] == 250
        chasquid.wait_for_letters("ana@here.example")


@pytest.fixture
def small_disk(place):
    """A file system of four megabytes."""
    need_root()
    path = place / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0755", "tmpfs", str(path)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        unavailable(f"a file system cannot be mounted: {mounted.stderr.strip()}")
    yield path
    wait_for(
        lambda: subprocess.run(["umount", str(path)], capture_output=True).returncode == 0,
        "the disk to be unmounted",
    )


def fill(disk: Path) -> Path:
    """Use up all space; return the file to remove."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


class Load:
    """Four clients that send without pause, messages of all sizes, until the end.

    `accepted` has the subjects of what got its 250. A body says how long it is.
    """

    def __init__(self, chasquid: Chasquid) -> None:
        self._chasquid = chasquid
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(n,)) for n in range(4)]
        self.accepted: set[str] = set()
        self.refused = 0

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _send(self, client_number: int) -> None:
        numbers = itertools.count()
        while not self._ended.is_set():
            with (
                contextlib.suppress(OSError, smtplib.SMTPException),
                self._chasquid.smtp() as client,
            ):
                while not self._ended.is_set():
                    octets = (1000, 4000, 20_000, 300_000)[next(numbers) % 4]
                    self._send_one(client, f"{client_number}-{next(numbers)}-{octets}", octets)

    def _send_one(self, client: smtplib.SMTP, subject: str, octets: int) -> None:
        recipient = ("ana@here.example", "bob@here.example")[octets % 3 == 1]
        try:
            client.sendmail("carl@client.example", [recipient], self._text(subject, octets))
        except smtplib.SMTPResponseException as error:
            self.refused += error.smtp_code // 100 == 4
            raise
        self.accepted.add(subject)

    @staticmethod
    def _text(subject: str, octets: int) -> str:
        return f"Subject: {subject}\n\n" + ("x" * 79 + "\n") * (octets // 80) + "end\n"

    def subject(self, message: bytes) -> str:
        """Return the subject of a message, which must be whole."""
        match = re.search(rb"^Subject: (\S+-(\d+))$", message, re.MULTILINE)
        assert match, message[:500]
        subject = match[1].decode()
        assert message.endswith(self._text(subject, int(match[2])).encode()), subject
        return subject


class TestFullDisk:
    # the disk stands before `start`, so that it outlives what is started on it
    @pytest.mark.parametrize("octets", [1000, 300_000], ids=["small", "large"])
    def test_mail_is_refused_for_now_until_there_is_space(self, small_disk, start, names, octets):
        chasquid = start(
            Chasquid, names, users=USERS, data_dir=str(small_disk / "data"), min_free_disk_mb=0
        )
        filler = fill(small_disk)
        with chasquid.smtp() as client:
            code, text = send_letter(client, "no space", octets=octets)
            assert code in (451, 452), text
            assert text.startswith(b"4.3.1")
            assert client.noop()[0] == 250
            assert not chasquid.queue_ids()
            filler.unlink()
            assert send_letter(client, "space", octets=octets)[0] == 250
        assert subjects(chasquid.wait_for_letters("ana@here.example")) == ["space"]
        assert not list((small_disk / "data/queue/tmp").iterdir())

    def test_a_letter_larger_than_the_space_left_is_refused_for_now(self, small_disk, start, names):
        chasquid = start(
            Chasquid, names, users=USERS, data_dir=str(small_disk / "data"), min_free_disk_mb=0
        )
        with chasquid.smtp() as client:
            code, text = send_letter(client, "too much", octets=8_000_000)
            assert code in (451, 452), text
            assert send_letter(client, "enough")[0] == 250
        assert subjects(chasquid.wait_for_letters("ana@here.example")) == ["enough"]
        assert not list((small_disk / "data/queue/tmp").iterdir())

    def test_an_accepted_letter_waits_for_space_in_the_maildir(self, small_disk, start, names):
        maildir = f"{small_disk}/%to_domain%/%to_user%"
        chasquid = start(Chasquid, names, users=USERS, maildir=maildir)
        filler = fill(small_disk)
        with chasquid.smtp() as client:
            assert send_letter(client, "accepted")[0] == 250
        chasquid.wait_for_log("event=next-attempt")
        filler.unlink()
        chasquid.command("queue", "retry", "all")
        new = small_disk / "here.example" / "ana" / "new"
        [path] = wait_for(lambda: new.exists() and list(new.iterdir()), "the letter")
        assert b"Subject: accepted\n" in path.read_bytes()
        assert not list((new.parent / "tmp").iterdir())
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")

    def test_it_fills_up_under_load_is_emptied_and_nothing_is_lost(self, small_disk, start, names):
        chasquid = start(
            Chasquid, names, users=USERS, data_dir=str(small_disk / "data"), min_free_disk_mb=0
        )
        load = Load(chasquid)
        found: list[str] = []

        def empty() -> None:
            for path in small_disk.glob("data/mail/here.example/*/new/*"):
                found.append(load.subject(path.read_bytes()))
                path.unlink()

        with load:
            for _ in range(3):
                refused = load.refused
                wait_for(lambda refused=refused: load.refused >= refused + 8, "a full disk")
                chasquid.kill()
                chasquid.start()  # it must be able to on a full disk, too
                empty()
                accepted = len(load.accepted)
                wait_for(
                    lambda accepted=accepted: len(load.accepted) >= accepted + 20, "space again"
                )
        empty()
        chasquid.command("queue", "retry", "all")
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
        empty()
        assert load.accepted <= set(found), "what was accepted is lost"
        assert len(load.accepted) > 100
        assert not list(small_disk.glob("data/queue/*/*"))
        # at each kill one may have been half written; mail readers remove such after a time
        assert len(list(small_disk.glob("data/mail/here.example/*/tmp/*"))) <= 3

    def test_a_disk_that_fills_between_attempts_loses_nothing(self, small_disk, start, names):
        names.records["dest.example"] = {"A": ["127.0.0.1"]}
        postfix = start(Postfix)
        chasquid = start(
            Chasquid,
            names,
            users=USERS,
            data_dir=str(small_disk / "data"),
            min_free_disk_mb=0,
            outgoing_smtp_port=postfix.port,
        )
        postfix.stop()
        message = letter("patient", "ana@here.example", "dora@dest.example")
        chasquid.submit("ana@here.example", ["dora@dest.example"], message)
        chasquid.wait_for_log("event=next-attempt")
        filler = fill(small_disk)
        before = chasquid.log()
        chasquid.command("queue", "retry", "all")
        wait_for(lambda: len(chasquid.log()) > len(before), "another attempt")
        time.sleep(0.5)  # for what follows the attempt
        filler.unlink()
        chasquid.restart()
        postfix.start()
        chasquid.command("queue", "retry", "all")
        assert subjects(postfix.wait_for_letters("dora@dest.example")) == ["patient"]
