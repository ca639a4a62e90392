# SPDX-License-Identifier: Apache-2.0
"""Programs that get mail: a mail delivery agent like procmail, and pipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import wait_for

from .server import USERS, Chasquid
from .tools import letter

# Called like procmail or maildrop: -f SENDER -d USER, the message on standard input.
AGENT = """\
#!/bin/sh
while getopts f:d: option; do
    case $option in
        f) sender=$OPTARG ;;
        d) user=$OPTARG ;;
        *) exit 64 ;;
    esac
done
[ -e {place}/fail ] && {{ echo "the agent has no mood" >&2; exit "$(cat {place}/fail)"; }}
{{ echo "From $sender"; cat; }} > {place}/$user.part
mv {place}/$user.part {place}/$user
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def agent(place):
    return executable(place / "agent", AGENT.format(place=place))


def send(chasquid, subject, recipient="ana@here.example"):
    with chasquid.smtp() as client:
        message = letter(subject, "carl@client.example", recipient, body="one\n.two\nthree\n")
        client.send_message(message, "carl@client.example", [recipient])


def received(path: Path) -> bytes:
    wait_for(path.exists, f"{path}")
    return path.read_bytes()


class TestDeliveryAgent:
    def start(self, start, names, agent, **settings):
        return start(Chasquid, names, users=USERS, mail_delivery_agent_bin=str(agent), **settings)

    def test_it_gets_sender_user_and_message(self, start, names, agent):
        chasquid = self.start(start, names, agent)
        send(chasquid, "by agent")
        first, _, message = received(agent.parent / "ana").partition(b"\n")
        assert first == b"From carl@client.example"
        assert b"Subject: by agent\r\n" in message
        assert message.endswith(b"one\r\n.two\r\nthree\r\n")
        assert b"\n" not in message.replace(b"\r\n", b"")
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
        assert not chasquid.letters("ana@here.example")

    def test_its_arguments_can_be_chosen(self, start, names, agent):
        arguments = ["-f", "%from_user%.at.%from_domain%", "-d", "%to_user%.%to_domain%"]
        chasquid = self.start(start, names, agent, mail_delivery_agent_args=arguments)
        send(chasquid, "with arguments")
        message = received(agent.parent / "ana.here.example")
        assert message.startswith(b"From carl.at.client.example\n")

    def test_exit_status_75_is_for_now(self, start, names, agent):
        chasquid = self.start(start, names, agent)
        failure = agent.parent / "fail"
        failure.write_text("75")
        send(chasquid, "later")
        chasquid.wait_for_log("event=next-attempt")
        failure.unlink()
        chasquid.command("queue", "retry", "all")
        assert b"Subject: later" in received(agent.parent / "ana")

    def test_another_exit_status_is_for_good(self, start, names, agent):
        chasquid = self.start(start, names, agent)
        failure = agent.parent / "fail"
        failure.write_text("67")  # EX_NOUSER
        message = letter("refused", "bob@here.example", "ana@here.example")
        with chasquid.submission("bob@here.example") as client:
            client.send_message(message, "bob@here.example", ["ana@here.example"])
        wait_for(lambda: "exit status 67" in chasquid.log(), "a failure")
        wait_for(lambda: not chasquid.queue_ids(), "an end")
        assert "about=" in chasquid.log()
        assert not (agent.parent / "ana").exists()

    def test_a_program_that_is_not_there_is_for_now(self, start, names, agent):
        chasquid = self.start(start, names, agent)
        hidden = agent.rename(agent.with_name("hidden"))
        send(chasquid, "no program")
        chasquid.wait_for_log("event=next-attempt")
        hidden.rename(agent)
        chasquid.command("queue", "retry", "all")
        received(agent.parent / "ana")


class TestPipe:
    @pytest.fixture
    def chasquid(self, start, names, place):
        executable(place / "pipe", f'#!/bin/sh\ncat > {place}/$1.part; mv {place}/$1.part "$2"\n')
        executable(place / "refuse", "#!/bin/sh\ncat > /dev/null; echo 'not today' >&2; exit 1\n")
        executable(place / "deaf", f"#!/bin/sh\necho heard nothing > {place}/deaf-was-here\n")
        aliases = (
            f"robot: | {place}/pipe robot {place}/for-robot\n"
            "both: robot, bob\n"
            f"broken: | {place}/refuse\n"
            f"deaf: | {place}/deaf\n"
        )
        return start(Chasquid, names, users=USERS, aliases={"here.example": aliases})

    def test_its_program_gets_the_message(self, chasquid, place):
        send(chasquid, "to a robot", "robot@here.example")
        message = received(place / "for-robot")
        assert b"Subject: to a robot\r\n" in message
        assert message.endswith(b"one\r\n.two\r\nthree\r\n")

    def test_the_other_recipients_of_the_alias_get_it_too(self, chasquid, place):
        send(chasquid, "to both", "both@here.example")
        received(place / "for-robot")
        [arrived] = chasquid.wait_for_letters("bob@here.example")
        assert arrived["Subject"] == "to both"

    def test_a_program_that_fails_gives_a_notification(self, chasquid):
        message = letter("to nobody", "ana@here.example", "broken@here.example")
        chasquid.submit("ana@here.example", ["broken@here.example"], message)
        [report] = chasquid.wait_for_letters("ana@here.example")
        _, for_machines, _ = report.iter_parts()
        of_recipient = for_machines.get_payload()[1]
        assert of_recipient["Action"] == "failed"
        assert "not today" in of_recipient["Diagnostic-Code"]
        assert "refuse" not in of_recipient["Final-Recipient"], "the program is nobody's business"

    def test_a_program_that_does_not_read_has_had_its_message(self, chasquid, place):
        body = "a long message\n" * 50_000
        with chasquid.smtp() as client:
            message = letter("unread", "carl@client.example", "deaf@here.example", body=body)
            client.send_message(message, "carl@client.example", ["deaf@here.example"])
        received(place / "deaf-was-here")
        wait_for(lambda: not chasquid.queue_ids(), "an empty queue")
