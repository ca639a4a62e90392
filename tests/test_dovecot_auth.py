# SPDX-License-Identifier: Apache-2.0
"""Room USERS: Dovecot as a directory of users, its protocol, and what the server makes of it."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    RunningClock,
    Server,
    cuts,
    greeted,
    login,
    plain_secret,
    rcpt,
    record,
    run,
    searched_briefly,
    users_file,
)

import chasquid

pytestmark = pytest.mark.usefixtures("no_pause")

DOV = "dov@here.example"
USERDB = b"VERSION\t1\t1\nSPID\t123\n"
CLIENT = (
    b"VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nMECH\tLOGIN\tplaintext\n"
    b"SPID\t123\nCUID\t1\nCOOKIE\t0123456789abcdef\nDONE\n"
)


class Auth:
    """Dovecot's end of a socket: says `greeting`, then `answer` for each question.

    `{n}` in an answer is the number of the question; None is silence, "" hangs up. `asked`
    holds the questions, without their numbers. What is sent is cut at `places`.
    """

    def __init__(self, path: Path, greeting: bytes, answer: str | None = "") -> None:
        self.path = path
        self.greeting = greeting
        self.answer = answer
        self.answers: dict[str, str] = {}  # by what stands in the question
        self.places: list[int] = []
        self.said: list[str] = []  # what comes before the questions
        self.asked: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(100)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Auth:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, as Dovecot does: the socket is gone."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._send(connection, self.greeting)
            with connection.makefile("rb") as lines:
                for raw in lines:
                    line = raw.decode().rstrip("\n")
                    if line.split("\t")[0] not in ("USER", "AUTH"):
                        self.said.append(line)
                        continue
                    verb, number, rest = line.split("\t", 2)
                    self.asked.append(f"{verb}\t{rest}")
                    answer = self._answer(rest)
                    if answer == "":
                        connection.shutdown(socket.SHUT_RDWR)
                        return
                    if answer is not None:
                        self._send(connection, answer.replace("{n}", number).encode("latin-1"))

    def _answer(self, question: str) -> str | None:
        return next((a for part, a in self.answers.items() if part in question), self.answer)

    def _send(self, connection: socket.socket, data: bytes) -> None:
        for piece in cuts(data, self.places):
            connection.sendall(piece)


@pytest.fixture
def userdb(tmp_path: Path) -> Iterator[Auth]:
    with Auth(tmp_path / "auth-userdb", USERDB, "NOTFOUND\t{n}\n") as auth:
        yield auth


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Auth]:
    with Auth(tmp_path / "auth-client", CLIENT, "FAIL\t{n}\tuser=x\n") as auth:
        yield auth


class Directory:
    """Asks Dovecot at these paths; `log` is what the server log says afterwards."""

    def __init__(self, directory: Path, userdb: Any = "", client: Any = "") -> None:
        self._place = directory
        self._paths = [str(getattr(each, "path", each)) for each in (userdb, client)]

    def dovecot(self, loop: Any, clock: chasquid.Clock | None = None) -> chasquid.Dovecot:
        return chasquid.Dovecot(loop, record(self._place, clock), *self._paths)

    def exists(self, address: str = DOV) -> bool:
        return run(lambda loop: self.dovecot(loop).exists(address))

    def fits(self, address: str = DOV, password: bytes = b"pass") -> bool:
        return run(lambda loop: self.dovecot(loop).authenticate(address, password))

    @property
    def log(self) -> str:
        return (self._place / "server.log").read_text()


@pytest.fixture
def known(tmp_path: Path, userdb: Auth, client: Auth) -> Directory:
    return Directory(tmp_path, userdb, client)


both_questions = pytest.mark.parametrize("ask", [Directory.exists, Directory.fits])


# --- the protocol ---


@pytest.mark.parametrize(
    ("answer", "is_there"),
    [
        ("USER\t{n}\tdov@here.example\tuid=8\tgid=8\thome=/var/mail\n", True),
        ("USER\t{n}\n", True),
        ("NOTFOUND\t{n}\n", False),
        ("NOTFOUND\t999\nUSER\t999\nUSER\t{n}\tdov\n", True),  # numbers of nobody's questions
        ("NOISE\n\nUSER\nUSER\t{n}\tdov\n", True),
    ],
)
def test_dovecot_tells_who_has_a_mailbox(
    known: Directory, userdb: Auth, answer: str, is_there: bool
) -> None:
    userdb.answer = answer
    assert known.exists() is is_there
    assert userdb.said == ["VERSION\t1\t1"]
    assert userdb.asked == ["USER\tdov@here.example\tservice=smtp"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("OK\t{n}\tuser=dov@here.example\n", True),
        ("OK\t{n}\n", True),
        ("FAIL\t{n}\tuser=dov@here.example\n", False),
        ("FAIL\t{n}\tuser=dov@here.example\tcode=user_disabled\n", False),
        ("FAIL\t{n}\tuser=temp\treason=temp\n", False),
        ("FAIL\t{n}9\tuser=x\nOK\t{n}\tuser=dov@here.example\n", True),
    ],
)
def test_dovecot_tells_whose_password_is_right(
    known: Directory, client: Auth, answer: str, right: bool
) -> None:
    client.answer = answer
    assert known.fits(password="päss wörd\t".encode()) is right
    assert client.said == ["VERSION\t1\t1", f"CPID\t{os.getpid()}"]
    (question,) = client.asked
    verb, mechanism, *parameters, response = question.split("\t")
    assert (verb, mechanism) == ("AUTH", "PLAIN")
    assert {"service=smtp", "secured"} <= set(parameters)
    assert response.startswith("resp=")
    decoded = base64.b64decode(response.removeprefix("resp="))
    assert decoded.decode() == "\0dov@here.example\0päss wörd\t"


@pytest.mark.parametrize(
    "answer",
    [
        "FAIL\t{n}\treason=the database is down\n",
        "CONT\t{n}\teHl6\n",
        "OK\t{n}\n",
        "NONSENSE\t{n}\n",
        "",
        "x" * 10_000,
        "x" * 100_000 + "\n",
    ],
    ids=lambda answer: answer[:20],
)
def test_any_other_answer_about_a_mailbox_is_no_answer(
    known: Directory, userdb: Auth, answer: str
) -> None:
    userdb.answer = answer
    with pytest.raises(chasquid.TemporaryFailure, match="Dovecot") as caught:
        known.exists()
    assert caught.value.status == "4.3.0"


@pytest.mark.parametrize(
    "answer",
    [
        "FAIL\t{n}\tuser=dov@here.example\ttemp\n",
        pytest.param(
            "FAIL\t{n}\tuser=dov@here.example\tcode=temp_fail\n",
        ),
        "CONT\t{n}\t\n",
        "USER\t{n}\n",
        "\0\377\t{n}\n",
        "",
        "x" * 10_000,
    ],
    ids=lambda answer: answer[:20],
)
def test_any_other_answer_about_a_password_is_no_answer(
    known: Directory, client: Auth, answer: str
) -> None:
    client.answer = answer
    with pytest.raises(chasquid.TemporaryFailure, match="Dovecot") as caught:
        known.fits()
    assert caught.value.status == "4.3.0"


@pytest.mark.parametrize(
    "greeting",
    [
        b"VERSION\t2\t0\nSPID\t1\nDONE\n",
        b"VERSION\nSPID\t1\nDONE\n",
        b"220 mail.example.org ESMTP\r\n" * 1000,
        b"\0" * 20_000,
        b"VERSION\t1\t1\nSPID" + b"x" * 9000,
    ],
    ids=lambda greeting: repr(greeting[:20]),
)
@both_questions
def test_what_is_not_dovecots_greeting_is_refused(
    tmp_path: Path, ask: Callable[[Directory], bool], greeting: bytes
) -> None:
    with Auth(tmp_path / "auth", greeting) as auth:
        if greeting.startswith(b"220"):
            auth.greeting += b"x" * 9000
        directory = Directory(tmp_path, auth, auth)
        with pytest.raises(chasquid.TemporaryFailure, match="^Dovecot cannot be asked now$"):
            ask(directory)
        assert f'source=dovecot text="{auth.path}: ' in directory.log
        assert not auth.asked, "a password is told to nobody else"


@pytest.mark.parametrize("greeting", [b"", USERDB[:5], USERDB])
def test_silence_is_not_waited_for_without_end(tmp_path: Path, greeting: bytes) -> None:
    clock = RunningClock()

    async def main(loop: Any) -> float:
        def advance() -> None:
            clock.advance(20)
            loop.post(lambda: None)

        threading.Timer(0.1, advance).start()
        began = clock.monotonic()
        with pytest.raises(chasquid.TemporaryFailure, match="^Dovecot cannot be asked now$"):
            await directory.dovecot(loop).exists(DOV)
        return clock.monotonic() - began

    with Auth(tmp_path / "auth", greeting, None) as auth:
        directory = Directory(tmp_path, auth)
        assert 20 <= run(main, clock) < 39
    assert "the time limit has passed" in directory.log


@both_questions
def test_a_socket_that_is_not_there_or_that_nobody_serves_is_logged(
    tmp_path: Path, ask: Callable[[Directory], bool]
) -> None:
    path = tmp_path / "auth"
    for where, why in (
        (path, "No such file or directory"),
        (path, "Connection refused"),
        (f"/{'x' * 200}", "too long"),
    ):
        directory = Directory(tmp_path, where, where)
        with pytest.raises(chasquid.TemporaryFailure, match="^Dovecot cannot be asked now$"):
            ask(directory)
        assert why in directory.log.splitlines()[-1]
        if not path.exists():
            with socket.socket(socket.AF_UNIX) as left_behind:
                left_behind.bind(str(path))


@pytest.mark.skipif(os.path.exists("/run/dovecot"), reason="Dovecot is at home here")
def test_without_paths_and_without_dovecot_it_is_said_what_to_set(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for ask, kind in ((directory.exists, "userdb"), (directory.fits, "client")):
        with pytest.raises(chasquid.TemporaryFailure, match="^Dovecot cannot be asked now$"):
            ask()
        assert f"auth-{kind} in /run/dovecot; see dovecot_{kind}_path" in directory.log


@settings(searched_briefly, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 300), max_size=12))
def test_answers_do_not_depend_on_how_they_are_cut(
    known: Directory, userdb: Auth, client: Auth, places: list[int]
) -> None:
    userdb.places = client.places = places
    userdb.answer, client.answer = "USER\t{n}\tdov\n", "OK\t{n}\tuser=dov\n"
    assert known.exists()
    assert known.fits()


@pytest.mark.parametrize("address", ["a\nb@here.example", "a\rb@x", "a\0b@x", "a\1b@x"])
def test_an_address_that_would_be_more_than_one_word_is_unknown(
    known: Directory, userdb: Auth, address: str
) -> None:
    userdb.answer = "USER\t{n}\tdov\n"
    assert not known.exists(address)
    assert not userdb.asked


def test_many_may_ask_at_once(known: Directory, client: Auth) -> None:
    client.answers = {plain_secret(f"u{number}@x", "p"): "OK\t{n}\n" for number in range(0, 40, 2)}

    async def main(loop: Any) -> list[bool]:
        dovecot = known.dovecot(loop)
        tasks = [
            loop.spawn(dovecot.authenticate(f"u{number}@x", b"p"), "login") for number in range(40)
        ]
        return [await task.join() for task in tasks]

    assert run(main) == [True, False] * 20


# --- a server that asks Dovecot ---


@pytest.fixture
def asking(tmp_path: Path, userdb: Auth, client: Auth) -> Iterator[Callable[..., Server]]:
    """Start a server; Dovecot knows dov@here.example, whose password is "pass"."""
    userdb.answers = {f"{DOV}\t": "USER\t{n}\tdov\n"}
    secret = plain_secret(DOV, "pass")
    client.answers = {f"resp={secret}": "OK\t{n}\tuser=dov@here.example\n"}
    with contextlib.ExitStack() as stack:

        def asking(*flags: str, before: Callable[[Server], Any] = id, **keywords: Any) -> Server:
            server = Server(
                tmp_path / "server",
                dovecot_userdb_path=userdb.path,
                dovecot_client_path=client.path,
                **keywords,
            )
            with (server.config_dir / "chasquid.conf").open("a") as file:
                file.write("".join(f"{flag}: true\n" for flag in ("dovecot_auth", *flags)))
            before(server)
            return stack.enter_context(server)

        yield asking


def test_a_user_whom_only_dovecot_knows_logs_in_and_sends(asking) -> None:
    server = asking()
    with greeted(server, "submission over TLS") as wire:
        assert login(wire, "Dov@HERE.example", "pass").startswith("235 ")
        assert wire.ask(f"MAIL FROM:<{DOV}>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
    assert "event=login " in server.mail_log and f"user={DOV}" in server.mail_log


def test_a_wrong_password_is_refused_like_an_unknown_user(asking, client: Auth) -> None:
    server = asking()
    replies = set()
    with greeted(server, "submission over TLS") as wire:
        replies.add(login(wire, DOV, "wrong"))
        replies.add(login(wire, "nobody@here.example", "pass"))
    assert replies == {"535 5.7.8 Authentication credentials invalid"}
    assert len(client.asked) == 2


@pytest.mark.parametrize("user", ["eve@far.example", "a b@here.example", "", "@here.example"])
def test_dovecot_is_not_asked_about_who_cannot_be_ours(asking, client: Auth, user: str) -> None:
    client.answer = "OK\t{n}\tuser=x\n"
    with greeted(asking(), "submission over TLS") as wire:
        assert login(wire, user, "pass").startswith("535 ")
    assert not client.asked


def test_a_name_without_a_domain_is_given_to_dovecot_as_it_is(asking, client: Auth) -> None:
    client.answer = "OK\t{n}\tuser=x\n"
    server = asking()
    with greeted(server, "submission over TLS") as wire:
        assert login(wire, "dov", "pass").startswith("235 ")
        assert wire.ask("MAIL FROM:<dov@here.example>").startswith("250 ")
    [asked] = client.asked
    secret = asked.rpartition("resp=")[2].strip()
    assert base64.b64decode(secret) == b"\0dov\0pass"
    assert "user=dov@here.example" in server.mail_log


def test_a_name_without_a_domain_is_dovecots_also_if_the_host_is_no_domain(
    asking, client: Auth
) -> None:
    client.answer = "OK\t{n}\tuser=x\n"
    server = asking(users={"here.example": {"ana": "secret"}, "there.example": {}})
    with greeted(server, "submission over TLS") as wire:
        assert login(wire, "dov", "pass").startswith("235 ")
    assert "user=dov@mail.here.example" in server.mail_log
    assert len(client.asked) == 1


def test_of_a_name_without_a_domain_the_files_have_the_last_word(asking, client: Auth) -> None:
    client.answer = "OK\t{n}\tuser=x\n"
    with greeted(asking(), "submission over TLS") as wire:
        assert login(wire, "ana", "wrong").startswith("535 ")
        assert login(wire, "ana", "secret").startswith("235 ")
    assert not client.asked


def test_the_users_of_the_files_do_not_need_dovecot(asking, client: Auth, userdb: Auth) -> None:
    server = asking()
    for auth in (client, userdb):
        auth.close()
    with greeted(server, "submission over TLS") as wire:
        assert login(wire, "ana@here.example", "secret").startswith("235 ")
        assert wire.ask("MAIL FROM:<ana@here.example>").startswith("250 ")
        assert wire.ask("RCPT TO:<ben@here.example>").startswith("250 ")


def test_a_login_that_dovecot_cannot_check_is_for_later(asking, client: Auth) -> None:
    server = asking()
    client.close()
    with greeted(server, "submission over TLS") as wire:
        assert login(wire, DOV, "pass").startswith("454 4.3.0 Dovecot ")
        assert wire.is_closed()
    assert "event=login-failed" not in server.mail_log
    assert server.daemon.log.counters["logins", "not checked"] == 1


def test_a_recipient_whom_only_dovecot_knows_gets_mail(asking, userdb: Auth) -> None:
    server = asking()
    assert rcpt(server, "nobody@here.example").startswith("550 5.1.1 ")
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        for address in (DOV, "D.o.v+lists@Here.Example"):
            assert wire.ask(f"RCPT TO:<{address}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        assert wire.ask("Subject: x\r\n\r\n.").startswith("250 ")
    assert server.mail("dov")
    assert not server.queued()


def test_dovecot_is_not_asked_about_users_and_aliases_of_the_files(asking, userdb: Auth) -> None:
    server = asking(aliases={"here.example": "team: ana\n"})
    for address in ("ana@here.example", "team@here.example"):
        assert rcpt(server, address).startswith("250 ")
    assert rcpt(server, "eva@far.example").startswith("550 ")
    assert not userdb.asked


def test_a_user_of_the_files_with_a_suffix_does_not_need_dovecot(asking, userdb: Auth) -> None:
    server = asking()
    userdb.close()
    assert rcpt(server, "a.na+x@here.example").startswith("250 ")


def test_the_catch_all_is_for_whom_dovecot_does_not_know(asking) -> None:
    server = asking(aliases={"here.example": "*: ana\n"})
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{DOV}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        assert wire.ask("Subject: x\r\n\r\n.").startswith("250 ")
    assert len(server.mail("dov")) == 1
    assert not server.mail("ana")


def test_an_alias_may_lead_to_whom_only_dovecot_knows(asking, userdb: Auth) -> None:
    server = asking(aliases={"here.example": "team: ana, dov, ghost\n"})
    assert rcpt(server, "team@here.example").startswith("250 ")
    asked = {question.split("\t")[1] for question in userdb.asked}
    assert asked == {DOV, "ghost@here.example"}


@pytest.mark.parametrize("answer", ["FAIL\t{n}\n", ""])
def test_a_recipient_whom_dovecot_cannot_look_up_is_for_later(
    asking, userdb: Auth, answer: str
) -> None:
    userdb.answer = answer
    server = asking()
    assert rcpt(server, "nobody@here.example").startswith("451 4.3.0 Dovecot ")
    assert rcpt(server, DOV).startswith("250 ")


def test_a_user_who_is_denied_never_logs_in(asking) -> None:
    def deny(server: Server) -> None:
        denied = b'users: { key: "dov" value: { denied: {} } }\n'
        server.write("domains/here.example/users", users_file({"ana": "secret"}) + denied)

    with greeted(asking(before=deny), "submission over TLS") as wire:
        assert login(wire, DOV, "pass").startswith("535 ")


def may_send(server: Server, sender: str) -> bool:
    with greeted(server, "submission over TLS") as wire:
        assert login(wire, DOV, "pass").startswith("235 ")
        return wire.ask(f"MAIL FROM:<{sender}>").startswith("250 ")


def test_a_user_of_dovecot_may_send_as_itself_alone(asking) -> None:
    server = asking("sender_must_match", aliases={"here.example": "team: ana, dov\n"})
    assert may_send(server, DOV)
    assert may_send(server, "team@here.example")
    assert not may_send(server, "ana@here.example")
    assert not may_send(server, "nobody@here.example")


@pytest.mark.parametrize(
    ("aliases", "sender"), [("", "dov+lists@here.example"), ("*: ana\n", "dov@here.example")]
)
def test_a_user_of_dovecot_may_send_as_others_may(asking, aliases: str, sender: str) -> None:
    assert may_send(asking("sender_must_match", aliases={"here.example": aliases}), sender)
