# SPDX-License-Identifier: Apache-2.0
"""Room USERS: the users file, passwords, and what the time of an answer gives away."""

from __future__ import annotations

import hashlib
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FakeClock, Serve, greeted, logged_in, login, run, searched, users_file, wait_for

import chasquid

Accounts, Denied, Plain, Scrypt = (
    chasquid.Accounts,
    chasquid.Denied,
    chasquid.Plain,
    chasquid.Scrypt,
)


def cheap(password: bytes, log_n: int = 1, r: int = 1) -> chasquid.Scrypt:
    """A hash that takes no time."""
    salt = b"salt of sixteen!"
    encrypted = hashlib.scrypt(password, salt=salt, n=1 << log_n, r=r, p=1, dklen=32)
    return Scrypt(log_n, r, 1, 32, salt, encrypted)


def parse(text: str) -> dict[str, chasquid.Password]:
    return chasquid.parse_users(text.encode(), "users")


# --- The file -------------------------------------------------------------------------------

# As the Go server writes it, for the password "secreto".
GO_USERS = """
users: {
  key: "Ñandú"
  value: {
    scrypt: {
      logN: 14
      r: 8
      p: 1
      keyLen: 32
      salt: "%s"
      encrypted: "%s"
    }
  }
}
users:{key:"otra" value:{plain:{password:"abc\\n\\377"}}}
users: { key: "nobody" value: { denied: {} } }
"""


def octal(data: bytes) -> str:
    return "".join(f"\\{char:03o}" for char in data)


def test_a_file_of_the_go_server_is_read():
    salt = bytes(range(16))
    encrypted = hashlib.scrypt(b"secreto", salt=salt, n=1 << 14, r=8, p=1, dklen=32)
    users = parse(GO_USERS % (octal(salt), octal(encrypted)))
    assert users == {
        "ñandú": Scrypt(14, 8, 1, 32, salt, encrypted),
        "otra": Plain(b"abc\n\xff"),
        "nobody": Denied(),
    }
    assert chasquid.check_password(users["ñandú"], b"secreto")
    assert not chasquid.check_password(users["ñandú"], b"Secreto")


def test_scrypt_is_that_of_its_standard():
    # RFC 7914, 12: the vector with N = 1024, r = 8, p = 16
    derived = bytes.fromhex(
        "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"
        "2eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"
    )
    known = Scrypt(10, 8, 16, 64, b"NaCl", derived)
    assert chasquid.check_password(known, b"password")
    assert not chasquid.check_password(known, b"passworD")


def test_a_new_password_has_the_costs_of_the_go_server_and_a_salt_of_its_own():
    one, other = chasquid.new_password(b"x"), chasquid.new_password(b"x")
    assert one[:4] == (14, 8, 1, 32)
    assert (len(one.salt), len(one.encrypted)) == (22, 32)
    assert one.salt != other.salt and one.encrypted != other.encrypted
    assert chasquid.check_password(one, b"x")
    assert not chasquid.check_password(one, b"y")


def test_a_denied_user_has_no_password_at_all():
    assert not chasquid.check_password(Denied(), b"")


def test_a_plain_password_is_compared_as_octets():
    assert chasquid.check_password(Plain(b"\xff\x00"), b"\xff\x00")
    assert not chasquid.check_password(Plain(b"\xff"), b"\xff\x00")


VALUES = st.one_of(
    st.builds(
        Scrypt,
        st.integers(1, 20),
        st.integers(1, 32),
        st.integers(1, 16),
        st.integers(1, 64),
        st.binary(max_size=20),
        st.binary(max_size=40),
    ),
    st.builds(Plain, st.binary(max_size=30)),
    st.just(Denied()),
)
NAMES = st.one_of(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12).map(
        str.lower
    ),
    st.sampled_from(["ñandú", "σίσυφος", "ünal"]),
)


@searched
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_what_is_written_is_read_back(users):
    try:
        assert chasquid.parse_users(chasquid.format_users(users), "users") == users
    except chasquid.ConfigError as error:
        # Costs that no OpenSSL would compute are refused.
        assert "scrypt" in str(error) or "keyLen" in str(error)
        assert any(isinstance(user, Scrypt) for user in users.values())


SCRYPT = 'scrypt: { logN: 14 r: 8 p: 1 keyLen: 32 salt: "s" encrypted: "e" }'


@pytest.mark.parametrize(
    "text",
    [
        'user: { key: "a" value: { denied: {} } }',
        'users: "a"',
        'users: { key: "a" }',
        'users: { value: { denied: {} } }',
        'users: { key: "a" value: { denied: {} } more: 1 }',
        "users: { key: a value: { denied: {} } }",
        'users: { key: "" value: { denied: {} } }',
        'users: { key: "a b" value: { denied: {} } }',
        'users: { key: "\\377" value: { denied: {} } }',
        'users: { key: "a" value: {} }',
        'users: { key: "a" value: 1 }',
        'users: { key: "a" value: { denied: {} plain: { password: "x" } } }',
        'users: { key: "a" value: { bcrypt: {} } }',
        'users: { key: "a" value: { plain: {} } }',
        'users: { key: "a" value: { plain: { password: x } } }',
        *(
            f'users: {{ key: "a" value: {{ {SCRYPT.replace(*change)} }} }}'
            for change in (
                ("logN: 14", ""), ("logN: 14", "logN: 0"), ("logN: 14", "logN: 40"),
                ("logN: 14", 'logN: "14"'), ("logN: 14", "logN: 24"), ("r: 8", "r: 0"),
                ("r: 8", "r: 2147483648"), ("r: 8", "r: 100000"), ("p: 1", "p: 99999999"),
                ("p: 1", "p: " + "9" * 5000), ("keyLen: 32", "keyLen: 2000000000"),
                ('salt: "s"', "salt: s"), ('encrypted: "e"', "encrypted: 1"),
                ("logN: 14 r: 8", "logN: 16 r: 1"),  # RFC 7914, 2: N is below 2^(128 * r / 8)
            )
        ),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_with_its_line(text):
    with pytest.raises(chasquid.ConfigError, match=r"^users:2: ") as caught:
        parse(f"# users\n{text}")
    assert len(str(caught.value)) < 500


def test_names_are_compared_without_case():
    assert set(parse('users: { key: "BoB" value: { denied: {} } }')) == {"bob"}


def test_users_are_read_from_their_directory(tmp_path):
    assert chasquid.load_users(str(tmp_path)) == {}
    users = {"a": Plain(b"x")}
    (tmp_path / "users").write_bytes(chasquid.format_users(users))
    assert chasquid.load_users(str(tmp_path)) == users
    (tmp_path / "users").write_bytes(b"users: 1")
    with pytest.raises(chasquid.ConfigError) as caught:
        chasquid.load_users(str(tmp_path))
    assert caught.value.path == str(tmp_path / "users")


# --- Accounts -------------------------------------------------------------------------------

DOMAINS = {
    "example.org": {"bob": cheap(b"secret"), "eve": Plain(b"plain"), "box": Denied()},
    "ñaca.example": {"ñoño": cheap(b"geheim", log_n=2)},
    "plain.example": {"ann": Plain(b"plain")},
    "empty.example": {},
}


def test_only_users_of_the_domain_exist():
    accounts = Accounts(DOMAINS)
    assert accounts.exists("bob", "example.org")
    assert accounts.exists("box", "example.org")
    assert not accounts.exists("bob", "empty.example")
    assert not accounts.exists("bob", "unknown.example")


@pytest.mark.parametrize(
    ("login", "password", "address"),
    [
        ("bob@example.org", b"secret", "bob@example.org"),
        ("BOB@Example.ORG", b"secret", "bob@example.org"),
        ("eve@example.org", b"plain", "eve@example.org"),
        ("ÑOÑO@xn--aca-6ma.example", b"geheim", "ñoño@ñaca.example"),
        ("bob@example.org", b"Secret", None),
        ("bob@example.org", b"", None),
        ("box@example.org", b"", None),
        ("nobody@example.org", b"secret", None),
        ("bob@other.example", b"secret", None),
        ("bob@empty.example", b"secret", None),
        ("bob", b"secret", None),
        ("@example.org", b"secret", None),
        ("", b"", None),
        ("bob@", b"secret", None),
        ("bob\x00@example.org", b"secret", None),
        ("bob@exa mple.org", b"secret", None),
        ("\ud800@example.org", b"secret", None),
    ],
)
def test_a_login_is_an_address_and_its_password(login, password, address):
    assert Accounts(DOMAINS).authenticate(login, password) == address


def costs_of(accounts: chasquid.Accounts, login: str, password: bytes) -> list[tuple[int, ...]]:
    """The costs of each scrypt that one log-in computes, seen by the interpreter itself."""
    seen = []

    def profile(frame, event, function):
        if event == "c_call" and function is hashlib.scrypt:
            costs = frame.f_locals["costs"]
            seen.append((costs.log_n, costs.r, costs.p, costs.key_length))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        accounts.authenticate(login, password)
    finally:
        sys.setprofile(before)
    return seen


@pytest.mark.parametrize(
    ("login", "costs"),
    [
        ("bob@example.org", (1, 1, 1, 32)),
        ("nobody@example.org", (1, 1, 1, 32)),
        ("eve@example.org", (1, 1, 1, 32)),
        ("box@example.org", (1, 1, 1, 32)),
        ("ñoño@ñaca.example", (2, 1, 1, 32)),
        ("nobody@ñaca.example", (2, 1, 1, 32)),
        ("ann@plain.example", (14, 8, 1, 32)),
        ("nobody@plain.example", (14, 8, 1, 32)),
        ("nobody@empty.example", (14, 8, 1, 32)),
        ("nobody@unknown.example", (14, 8, 1, 32)),
        ("no address", (14, 8, 1, 32)),
    ],
)
@pytest.mark.parametrize("password", [b"secret", b"wrong"])
def test_every_login_costs_one_scrypt_with_the_costs_of_its_domain(login, costs, password):
    assert costs_of(Accounts(DOMAINS), login, password) == [costs]


def test_the_usual_costs_of_a_domain_are_those_of_most_of_its_users():
    users = {"a": cheap(b"", 2), "b": cheap(b"", 3), "c": cheap(b"", 3)}
    assert costs_of(Accounts({"x.example": users}), "nobody@x.example", b"") == [(3, 1, 1, 32)]


def test_the_comparison_of_hashes_does_not_depend_on_its_luck():
    # A hash of another length is wrong, and no error.
    short = cheap(b"secret")._replace(encrypted=b"")
    assert not chasquid.check_password(short, b"secret")


def test_passwords_are_compared_in_nfc():
    """RFC 8265, 4.2"""
    composed, decomposed = "caf\u00e9".encode(), "cafe\u0301".encode()
    for known in (chasquid.new_password(composed), chasquid.new_password(decomposed)):
        assert chasquid.check_password(known, composed)
        assert chasquid.check_password(known, decomposed)
        assert not chasquid.check_password(known, b"cafe")
    for plain in (chasquid.Plain(decomposed), chasquid.Plain(composed)):  # of another tool
        assert chasquid.check_password(plain, decomposed)
        assert chasquid.check_password(plain, composed)
        assert not chasquid.check_password(plain, b"\xff")
    assert chasquid.check_password(cheap(decomposed), decomposed)  # likewise


def test_an_unknown_user_costs_as_much_however_the_password_is_spelled(monkeypatch):
    costs = []
    scrypt = hashlib.scrypt
    monkeypatch.setattr(hashlib, "scrypt", lambda *a, **k: costs.append(k["n"]) or scrypt(*a, **k))
    accounts = Accounts({"d.example": {"ana": cheap(b"x")}})
    for typed in (b"ascii", "caf\u00e9".encode(), "cafe\u0301".encode()):
        costs.clear()
        accounts.authenticate("ana@d.example", typed)
        known = len(costs)
        accounts.authenticate("bob@d.example", typed)
        assert len(costs) == 2 * known


# --- Logins that are known ------------------------------------------------------------------


class Checks:
    """Checks passwords, slowly; `seen` are those that were asked for."""

    def __init__(self, loop: Any, seconds: float = 60.0) -> None:
        self.loop = loop
        self.logins = chasquid.Logins(loop)
        self.seconds = seconds
        self.passwords = {"ana@x": b"secret"}
        self.seen: list[tuple[str, bytes]] = []

    async def log_in(self, login: str, password: bytes) -> str | None:
        async def check() -> tuple[str | None, float]:
            right = self.passwords.get(login) == password
            self.seen.append((login, password))
            await self.loop.turn()
            return (login if right else None), self.seconds

        return await self.logins.find(login, password, check)


def with_checks(use: Any) -> None:
    clock = FakeClock()
    run(lambda loop: use(Checks(loop), clock), clock)


def test_a_login_that_succeeded_is_known_for_its_time():
    async def use(checks: Checks, clock: FakeClock) -> None:
        for _ in range(3):
            assert await checks.log_in("ana@x", b"secret") == "ana@x"
        assert len(checks.seen) == 1
        clock.advance(59.9)
        assert await checks.log_in("ana@x", b"secret") == "ana@x"
        assert len(checks.seen) == 1
        clock.advance(0.1)
        assert await checks.log_in("ana@x", b"secret") == "ana@x"
        assert len(checks.seen) == 2

    with_checks(use)


def test_neither_a_failure_nor_another_password_or_user_is_known():
    async def use(checks: Checks, clock: FakeClock) -> None:
        assert await checks.log_in("ana@x", b"secret") == "ana@x"
        for user, password in (
            ("ana@x", b"secre"), ("ana@x", b"secret "), ("ana@x", b""), ("ana@", b"xsecret"),
            ("ana@xs", b"ecret"), ("Ana@x", b"secret"), ("", b"ana@xsecret"), ("\ud800", b"secret"),
        ):  # fmt: skip
            assert await checks.log_in(user, password) is None
            assert await checks.log_in(user, password) is None
        assert len(checks.seen) == 17

    with_checks(use)


def test_what_is_known_is_forgotten_when_the_users_change_also_what_is_being_checked():
    async def use(checks: Checks, clock: FakeClock) -> None:
        assert await checks.log_in("ana@x", b"secret") == "ana@x"
        checks.logins.forget()
        task = checks.loop.spawn(checks.log_in("ana@x", b"secret"), "login")
        await checks.loop.turn()
        assert len(checks.seen) == 2
        checks.passwords["ana@x"] = b"new"
        checks.logins.forget()
        assert await task.join() == "ana@x"
        assert await checks.log_in("ana@x", b"secret") is None

    with_checks(use)


@pytest.mark.parametrize(("password", "count"), [(b"secret", 1), (b"wrong", 5)])
def test_the_same_login_at_the_same_time_is_checked_once_at_a_time(password, count):
    async def use(checks: Checks, clock: FakeClock) -> None:
        tasks = [checks.loop.spawn(checks.log_in("ana@x", password), "login") for _ in range(5)]
        await checks.loop.turn()
        assert len(checks.seen) == 1
        found = {await task.join() for task in tasks}
        assert found == {"ana@x" if password == b"secret" else None}
        assert len(checks.seen) == count

    with_checks(use)


def test_a_check_that_breaks_is_not_known_and_holds_up_nobody():
    async def use(checks: Checks, clock: FakeClock) -> None:
        async def broken() -> tuple[str | None, float]:
            await checks.loop.turn()
            raise chasquid.TemporaryFailure("no answer")

        with pytest.raises(chasquid.TemporaryFailure):
            await checks.logins.find("ana@x", b"secret", broken)
        assert await checks.log_in("ana@x", b"secret") == "ana@x"

    with_checks(use)


def test_what_is_remembered_is_bounded_and_holds_no_password():
    async def use(checks: Checks, clock: FakeClock) -> None:
        known = checks.logins._known
        until = clock.monotonic() + 60.0
        known.update((b"%032d" % number, (until, f"v{number}@x")) for number in range(9950))
        for number in range(100):
            checks.passwords[f"u{number}@x"] = b"my secret"
            assert await checks.log_in(f"u{number}@x", b"my secret")
        assert len(known) == 10_000
        assert not any(b"my secret" in digest for digest in known)
        clock.advance(61.0)
        assert await checks.log_in("ana@x", b"secret") == "ana@x"
        assert len(known) == 1

    with_checks(use)


def test_a_server_computes_one_scrypt_for_many_logins_of_a_user(serve: Serve) -> None:
    seen = []

    def profile(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function is hashlib.scrypt:
            seen.append(function)

    threading.setprofile(profile)  # of the workers, which start when they are first needed
    try:
        server = serve()
        for _ in range(3):
            logged_in(server).close()
    finally:
        threading.setprofile(None)
    assert len(seen) == 1


def test_a_password_that_was_changed_counts_at_once(serve: Serve) -> None:
    server = serve()
    logged_in(server).close()
    server.write("domains/here.example/users", users_file({"ana": "another", "ben": "secret"}))
    server.daemon.reload()
    wait_for(lambda: "event=reloaded" in server.log, "the reload")
    with greeted(server, "submission over TLS") as wire:
        assert login(wire).startswith("535 ")
        assert login(wire, password="another").startswith("235 ")
