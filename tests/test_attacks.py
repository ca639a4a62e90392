# SPDX-License-Identifier: Apache-2.0
"""Attacks on a whole server, by name; each says what an attacker wants, and sees that it fails.

Smuggling, injection before STARTTLS and other protocols have dialogues of their own
(`dialogues/`), downgrades of TLS are in test_tls_downgrade.py, and what breaks parsers is in
test_fuzzing.py.
"""

from __future__ import annotations

import base64
import email
import email.policy
import os
import re
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    HOST,
    MESSAGE,
    FakeCourier,
    Serve,
    Server,
    Zone,
    greeted,
    logged_in,
    rcpt,
    searched_briefly,
    users_file,
    wait_for,
)
from world import MailWorld

import chasquid

EVE = "eva@there.example"
TRACE = ["return-path", "delivered-to", "authentication-results", "received-spf", "received"]
# What a client can say in one line, and what a line that is forged would hold.
FORGED = (
    "event=login user=root peer=192.0.2.1", "peer=192.0.2.99", '" event=x', "\\", '\\"', "%0d%0a",
    "X-Forged: yes", "=?utf-8?q?=0d=0aX-Forged:_yes?=", "a;b", "(c", "c)", "\u2028X", "\u0085X",
    "() { :;}; echo", "$(id)", "`id`", "../../x", "-oX", "<x>", ",", "é",
)  # fmt: skip
pieces = st.lists(st.sampled_from(FORGED), min_size=1, max_size=4).map("".join)


FILTER = Path(__file__).parent.parent / "sample-config" / "fail2ban" / "chasquid.conf"
WHO = re.findall(r"^_who = (.*)$", FILTER.read_text(), re.MULTILINE)[0].replace("<HOST>", r"(\S+)")
BANNED = [
    re.compile(rf"^\s*{pattern.replace('%(_who)s', WHO)}")
    for pattern in re.findall(r"(event=\S+ %\(_who\)s.*)$", FILTER.read_text(), re.MULTILINE)
]


def quoted_local_part(content: str) -> str:
    return '"' + content.replace("\\", "\\\\").replace('"', '\\"') + '"'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a hook, which keeps its environment."""
    top = tmp_path_factory.mktemp("attacked")
    made = Server(top, remote=FakeCourier(chasquid.State.SENT))
    hook = made.write("hooks/post-data", f"#!/bin/bash\nenv -0 > {top}/environment\n".encode())
    hook.chmod(0o755)
    with made:
        yield made


def submit(server: Server, hello: str, sender: str, message: bytes = MESSAGE) -> str:
    """Say what an attacker would, as far as the server lets it; return the last reply."""
    with greeted(server) as wire:
        if not wire.ask(f"EHLO {hello}").startswith("250"):
            assert wire.ask("EHLO client.example").startswith("250")
        for line in (f"MAIL FROM:<{sender}> SMTPUTF8", "RCPT TO:<ana@here.example>", "DATA"):
            reply = wire.ask(line)
            if reply[0] in "45":
                return reply
        wire.send(message + b".\r\n")
        return wire.reply()


# --- forging: what a client says becomes something else ---


@searched_briefly
@given(hello=pieces, local=pieces)
def test_no_greeting_and_no_sender_adds_a_header_field(server: Server, hello: str, local: str):
    before = len(server.mail("ana"))
    reply = submit(server, hello, f"{quoted_local_part(local)}@there.example")
    stored = server.mail("ana")[before:]
    assert len(stored) == reply.startswith("250")
    for message in stored:
        block = chasquid.header_block(message.replace(b"\n", b"\r\n"))
        assert block is not None
        names = [field.name for field in chasquid.header_fields(block)]
        assert names == [*TRACE, "subject"]


@searched_briefly
@given(hello=pieces, local=pieces)
def test_a_hook_gets_what_a_client_says_as_values_and_no_other_variable(
    server: Server, hello: str, local: str
):
    path = server.directory / "environment"
    path.unlink(missing_ok=True)
    if submit(server, hello, f"{quoted_local_part(local)}@there.example").startswith("250"):
        said = dict(part.split("=", 1) for part in path.read_text().split("\0") if part)
        assert set(said) <= {*os.environ, *HOOK_VARIABLES}
        assert re.fullmatch(r"[\w.:\[\]-]*", said["EHLO_DOMAIN"], re.ASCII)
        assert said["MAIL_FROM"].endswith("@there.example")


HOOK_VARIABLES = {
    "REMOTE_ADDR", "EHLO_DOMAIN", "EHLO_DOMAIN_RAW", "MAIL_FROM", "RCPT_TO", "AUTH_AS", "ON_TLS",
    "FROM_LOCAL_DOMAIN", "SPF_PASS", "SPF_RESULT", "DKIM_RESULTS", "DMARC_RESULT", "PWD", "SHLVL",
    "_", "OLDPWD",
}  # fmt: skip


@searched_briefly
@given(hello=pieces, local=pieces, user=pieces)
def test_no_value_makes_a_line_of_the_log_or_a_field_of_it(
    server: Server, hello: str, local: str, user: str
):
    path = server.directory / "mail.log"
    start = path.stat().st_size if path.exists() else 0
    submit(server, hello, f"{quoted_local_part(local)}@there.example")
    submit(server, hello, f"{local}@there.example")
    with greeted(server, "submission over TLS") as wire:
        secret = base64.b64encode(f"\0{user}\0wrong".encode()).decode()
        wire.say(f"AUTH PLAIN {secret}")
        server.settle()
    text = path.read_bytes()[start:].decode()
    assert text.endswith("\n") or not text
    for line in text.splitlines():
        before, fields = chasquid.parse_event(line)
        assert re.fullmatch(r"[\d: .-]+", before), line
        assert fields["event"] in chasquid.Events.BY_NAME and fields["event"] != "login", line
        assert fields.get("peer") in ("127.0.0.1", None), line
        banned = [match[1] for pattern in BANNED if (match := pattern.search(line[24:]))]
        assert set(banned) <= {"127.0.0.1"}, line


def test_the_filter_of_fail2ban_does_find_who_failed_to_log_in() -> None:
    line = "event=login-failed id=abc peer=192.0.2.7 port=submission user=ana@here.example"
    assert [match[1] for pattern in BANNED if (match := pattern.search(line))] == ["192.0.2.7"]
    assert len(BANNED) == 2


def test_a_reply_of_another_server_adds_nothing_to_a_notification(serve: Serve) -> None:
    """Neither a field, nor a part, nor a recipient."""

    class Hostile(FakeCourier):
        async def deliver(self, delivery, destinations):
            text = "no\r\nX-Forged: yes\r\n\r\n--=_b\r\nTo: all@here.example\r\n\x00\x1b[2J"
            return [chasquid.Result(chasquid.State.FAILED, "5.0.0", text)] * len(destinations)

    server = serve(remote=Hostile())
    with logged_in(server) as wire:
        assert wire.ask("MAIL FROM:<ana@here.example>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{EVE}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(b"From: ana@here.example\r\n" + MESSAGE + b".\r\n")
        assert wire.reply().startswith("250 ")
    [data] = wait_for(lambda: server.mail("ana"), "the notification")
    parsed = email.message_from_bytes(data, policy=email.policy.default)
    assert not any(part.defects for part in parsed.walk())
    assert len(list(parsed.iter_parts())) == 3
    for part in parsed.walk():
        assert "X-Forged" not in part
    assert b"\x1b" not in data and b"\0" not in data


# --- open relay: mail for elsewhere is taken from a stranger ---

ELSEWHERE = (
    "x@elsewhere.example", "x%elsewhere.example@here.example", "elsewhere.example!x@here.example",
    '"x@elsewhere.example"@here.example', '"x%elsewhere.example"@here.example',
    "@here.example:x@elsewhere.example", "@here.example,@there.example:x@elsewhere.example",
    "x@elsewhere.example@here.example", "x@here.example@elsewhere.example",
    "x%elsewhere.example", "elsewhere.example!x", '"x@elsewhere.example"', "x@[192.0.2.1]",
    "x@[127.0.0.1]", "x@[IPv6:::1]", "x@localhost", "x@127.0.0.1", "x@here.example.",
    "x@HERE.example.elsewhere.example", "x@elsewhere.example\t", "x@elsewhere.example.",
    "x%elsewhere.example@[127.0.0.1]", f"x%elsewhere.example@{HOST}", f"x@{HOST}.",
    "ana+fwd_from=x=elsewhere.example@elsewhere.example",
    "x+fwd_from=x=elsewhere.example@here.example", "*@here.example",
    "\uff58@elsewhere.example", "x@elsewhere\u3002example", "x@xn--elsewhere-.example",
    "x@elsewhere.example>,<ana@here.example", "ana@here.example> <x@elsewhere.example",
)  # fmt: skip


@pytest.mark.parametrize("recipient", ELSEWHERE)
@pytest.mark.parametrize("sender", ["", "ana@here.example", EVE, "x@elsewhere.example"])
def test_nobody_relays_without_a_login_in_whatever_disguise(
    relay: tuple[Server, FakeCourier], recipient: str, sender: str
) -> None:
    server, remote = relay
    for port in ("smtp", "submission", "submission over TLS"):
        with greeted(server, port) as wire:
            wire.ask(f"MAIL FROM:<{sender}> SMTPUTF8")
            for line in (f"RCPT TO:<{recipient}>", f"RCPT TO:{recipient}"):
                assert wire.ask(line)[0] in "45", line
    server.settle()
    assert remote.deliveries == []


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, FakeCourier]]:
    remote = FakeCourier(chasquid.State.SENT)
    with Server(tmp_path_factory.mktemp("relay"), remote=remote) as server:
        yield server, remote


# --- paths: a name leads out of the directory that it belongs into ---

NAMES = (
    "../x",
    "../../../../../../tmp/x",
    "..",
    ".",
    "a/../../x",
    "/etc/x",
    "x\\..\\y",
    "%2e%2e/x",
)


def tree(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", ["%data_dir%/mail/%to_domain%/%to_user%", "%data_dir%/%to%"])
def test_a_catch_all_for_users_of_any_name_writes_nowhere_else(
    serve: Serve, name: str, template: str
) -> None:
    """Even if the users file, or Dovecot, has such a name."""
    server = serve(users={"here.example": {"ana": "secret", name: "secret"}}, maildir=template)
    before = tree(server.directory)
    rcpt(server, f"{quoted_local_part(name)}@here.example")
    submit_to = f"{quoted_local_part(name)}@here.example"
    with greeted(server) as wire:
        wire.ask("MAIL FROM:<>")
        if wire.ask(f"RCPT TO:<{submit_to}>").startswith("250"):
            wire.ask("DATA")
            wire.send(MESSAGE + b".\r\n")
            wire.reply()
    server.settle()
    new = tree(server.directory) - before
    assert not {path for path in new if not path.startswith(("data", "mail.log", "server.log"))}
    inside = {path for path in new if path.startswith("data/mail/")}
    assert all(path.split("/")[2:3] in ([], ["here.example"]) for path in inside)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "command",
    [
        ["user-add", "{}@here.example", "--receive-only"], ["user-add", "x@{}", "--receive-only"],
        ["user-remove", "x@{}"], ["dkim-keygen", "here.example", "{}", "--algo", "ed25519"],
        ["dkim-keygen", "{}", "s", "--algo", "ed25519"], ["dkim-dns", "here.example", "{}"],
        ["domaininfo-remove", "{}"], ["queue", "show", "{}"], ["queue", "remove", "{}"],
        ["aliases-resolve", "{}@{}"],
    ],
)  # fmt: skip
def test_no_command_touches_what_a_name_leads_to(commands, name: str, command: list[str]) -> None:
    top = commands.config_dir.parent
    (top / "x").write_text("keep")
    commands.data_dir.mkdir(exist_ok=True)
    before = tree(top)
    commands.run(*(word.format(name, name) for word in command))
    new = tree(top) - before
    assert all(path.startswith(("config/domains/", "data/")) for path in new), new
    assert not any(".." in path or path.endswith("/x") for path in new), new
    assert (top / "x").read_text() == "keep"


@pytest.mark.parametrize("domain", ["..", "../x", "a/b.example", "x/../../y", ".", "a\0b"])
def test_a_domain_of_another_server_names_no_file(tmp_path, domain: str) -> None:
    with pytest.raises(ValueError):
        chasquid.domain_info_path(str(tmp_path), chasquid.domain_to_unicode(domain))


# --- backscatter: a forged sender gets our bounce ---


def refused(server: Server, recipient: str, message: bytes = MESSAGE, sender: str = EVE) -> str:
    with greeted(server) as wire:
        for line in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "DATA"):
            reply = wire.ask(line)
            if reply[0] in "45":
                return reply
        wire.send(message + b".\r\n")
        return wire.reply()


FORBIDDING = Zone({("forged.example", "TXT"): ["v=spf1 -all"]})
BIG = b"Subject: x\r\n\r\n" + b"x" * 70 + b"\r\n"


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"recipient": "nobody@here.example"}, "550 5.1.1"),
        ({"recipient": "gone@here.example"}, "550 5.1.1"),
        ({"recipient": "round@here.example"}, "451 4.3.5"),
        ({"recipient": "ben@elsewhere.example"}, "550 5.7.1"),
        ({"recipient": "ana%elsewhere.example@here.example"}, "550 5.1.1"),
        ({"sender": "ana@forged.example"}, "550 5.7.23"),
        ({"message": b"no header at all\r\n\r\nx\r\n"}, "554"),
        ({"message": b"Received: x\r\n" * 60 + MESSAGE}, "554 5.4.6"),
        ({"message": b"Subject: x\r\n\r\n" + (b"x" * 70 + b"\r\n") * 16000}, "552"),
        ({"message": b"Subject: refuse me\r\n\r\nx\r\n"}, "554"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_be_refused_is_refused_and_makes_no_bounce(serve: Serve, keys, code: str) -> None:
    remote = FakeCourier(chasquid.State.SENT)
    server = serve(
        remote=remote, ask=FORBIDDING.ask, max_data_size_mb=1,
        aliases={"here.example": "gone: nobody\nround: about\nabout: round\n"},
    )  # fmt: skip
    hook = server.write("hooks/post-data", b"#!/bin/sh\n! grep -q 'refuse me' || exit 20\n")
    hook.chmod(0o755)
    assert refused(server, **{"recipient": "ana@here.example", **keys}).startswith(code)
    server.settle()
    assert (server.queued(), remote.deliveries) == ([], [])
    assert server.mail("ana") == []


def test_mail_of_nobody_that_fails_makes_no_bounce(serve: Serve) -> None:
    class Failing(FakeCourier):
        async def deliver(self, delivery, destinations):
            await super().deliver(delivery, destinations)
            return [chasquid.Result(chasquid.State.FAILED, "5.1.1", "no")] * len(destinations)

    remote = Failing()
    server = serve(remote=remote, aliases={"here.example": "out: eva@elsewhere.example\n"})
    assert refused(server, "out@here.example", sender="").startswith("250 ")
    wait_for(lambda: remote.deliveries and not server.queued(), "the failure")
    server.settle()
    assert len(remote.deliveries) == 1


# --- loops ---


def test_two_forwarders_that_lead_to_each_other_end_and_do_not_multiply() -> None:
    """Each alias has two ways to the other server, so each round could double the mail."""
    with MailWorld() as world:
        here = world.server(
            "here.example", users={"ana": "secret"}, max_received_headers=6,
            aliases="ring: ring@there.example\nboth: ring, both@there.example\n",
        )  # fmt: skip
        there = world.server(
            "there.example", aliases="ring: ring@here.example\nboth: ring, both@here.example\n",
            max_received_headers=6,
        )  # fmt: skip
        text = email.message.EmailMessage()
        text["From"], text["Subject"] = "ana@here.example", "round and round"
        text.set_content("x\n")
        here.submit("ana@here.example", ["both@there.example"], text)
        world.settle()
        assert here.queue() == there.queue() == []
        taken = len(re.findall(r"event=queued ", here.log + there.log))
        assert taken < 100
        assert len(here.mailbox("ana@here.example")) <= 1


# --- slow senders ---


def test_thousands_of_slow_senders_keep_nobody_out(behind) -> None:
    """Two thousand connections that say a little and stop; then somebody has mail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 2000
    if hard < 3 * count:
        pytest.skip("too few descriptors may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = behind()
    slow: list[socket.socket] = []
    try:
        for number in range(count):
            address = f"198.51.{number // 250}.{number % 250 + 1}"
            connected = socket.create_connection(("127.0.0.1", server.port()), 20)
            connected.sendall(f"PROXY TCP4 {address} 192.0.2.1 9 25\r\n".encode())
            slow.append(connected)
        wait_for(lambda: server.daemon.session_count >= count, "all of them")
        for stage in (b"EHLO a\r\n", b"MAIL FROM:<>\r\n", b"RCPT TO:<ana@here.example>\r\nDA"):
            for connected in slow:
                connected.sendall(stage)
        began = time.monotonic()
        with server.connect() as wire:
            wire.send(b"PROXY TCP4 203.0.113.7 192.0.2.1 9 25\r\n")
            assert wire.reply().startswith("220 ")
            for line in ("EHLO b", "MAIL FROM:<>", "RCPT TO:<ben@here.example>", "DATA"):
                assert wire.ask(line)[0] in "23"
            wire.send(MESSAGE + b".\r\n")
            assert wire.reply().startswith("250 ")
        assert time.monotonic() - began < 20
        assert len(server.mail("ben")) == 1
    finally:
        for connected in slow:
            connected.close()
        wait_for(lambda: server.daemon.session_count == 0, "their ends")
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- guessing: the time that an answer takes says who exists ---


@pytest.mark.usefixtures("no_pause")
def test_a_failed_login_computes_as_much_for_whoever_also_if_a_login_is_remembered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of Ana's last login must not make a wrong password of hers quicker."""
    import hashlib

    computed: list[int] = []
    real = hashlib.scrypt

    def scrypt(*arguments, **keywords):
        computed.append(keywords["n"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    server = serve()
    server.write("domains/here.example/users", users_file({"ana": "secret", "ben": "secret"}))
    costs = {}
    for user, password in (
        ("ana", "secret"), ("ana", "secret"), ("ana", "wrong"), ("ben", "wrong"), ("eve", "wrong"),
        ("ana", "wrong"), ("eve", "wrong"),
    ):  # fmt: skip
        computed.clear()
        with greeted(server, "submission over TLS") as wire:
            secret = base64.b64encode(f"\0{user}@here.example\0{password}".encode()).decode()
            reply = wire.ask(f"AUTH PLAIN {secret}")
        assert reply.startswith("235" if password == "secret" else "535")
        costs.setdefault((user, password), []).append(list(computed))
    once = costs["ana", "secret"][0]
    assert len(once) == 1 and costs["ana", "secret"][1] == []  # so it is remembered
    for user in ("ana", "ben", "eve"):
        assert all(seen == once for seen in costs[user, "wrong"]), (user, costs)


@pytest.mark.usefixtures("no_pause")
def test_a_refused_login_says_the_same_of_whoever(serve: Serve) -> None:
    server = serve()
    replies = set()
    for user in ("ana@here.example", "eve@here.example", "x@elsewhere.example", "no address", "."):
        with greeted(server, "submission over TLS") as wire:
            secret = base64.b64encode(f"\0{user}\0wrong".encode()).decode()
            replies.add(wire.ask(f"AUTH PLAIN {secret}"))
    assert len(replies) == 1, replies
    assert HOST not in replies
