# SPDX-License-Identifier: Apache-2.0
"""Room ACME: an account, orders, challenges, renewals and failures, with an authority in a thread.

The authority checks each signature and each nonce, and fetches the answers to challenges from
where they are served. What it says otherwise is what a test puts into it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import http.server
import json
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import (
    HOST,
    HOUR,
    SECONDS,
    FakeClock,
    Serve,
    Server,
    Zone,
    certificate,
    run,
    trusting,
    users_file,
    wait_for,
    write_certificate,
)

import chasquid
from chasquid import HTTP_01, TLS_ALPN_01, AcmeFailed, Challenges, EcKey, Loop

DAY = 86400.0
MTA_STS = "mta-sts.here.example"
HERE = {(HOST, "A"): ["192.0.2.1"], (MTA_STS, "A"): ["192.0.2.1"]}
der = chasquid._der


class Calendar(FakeClock):
    """A calendar that stands until it is moved, and a clock that runs, and moves with it."""

    def monotonic(self) -> float:
        return time.monotonic() + self.now


# --- an authority ---


def octets(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def is_signature(x: int, y: int, data: bytes, signature: bytes) -> bool:
    """ECDSA on P-256 with SHA-256, the other way round; FIPS 186-5, 6.4.2."""
    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    inverse = pow(s, -1, chasquid._N)
    digest = int.from_bytes(hashlib.sha256(data).digest(), "big")
    first = chasquid._multiply(digest * inverse % chasquid._N, chasquid._G)
    second = chasquid._multiply(r * inverse % chasquid._N, (x, y))
    sum_x, _, sum_z = chasquid._add((*first, 1), (*second, 1))
    return int(sum_x * pow(sum_z, -2, chasquid._P) % chasquid._P % chasquid._N) == r


def issued(
    authority: EcKey, request: bytes, names: Sequence[str], span: tuple[float, float]
) -> str:
    """Return a certificate with the key in a request, in PEM."""
    _, body = next(chasquid._elements(chasquid._only(request, 0x30)))
    _, _, public, _ = chasquid._elements(body)
    common_name = der(0x30, chasquid._oid("2.5.4.3"), der(0x0C, b"authority"))
    inner = der(
        0x30,
        der(0xA0, chasquid._der_integer(2)),
        chasquid._der_integer(7),
        chasquid._ecdsa_algorithm(),
        der(0x30, der(0x31, common_name)),
        der(0x30, *map(chasquid._der_time, span)),
        der(0x30),
        der(*public),
        der(0xA3, der(0x30, chasquid._alternative_names(names))),
    )
    return chasquid._pem("CERTIFICATE", authority.signed(inner))


class Authority:
    """An ACME server on loopback HTTP.

    `problems` holds what is answered to the next requests for a kind of resource instead;
    `pending` how often an order or an authorization is not settled yet; `seen` the resources
    that were asked for; `offered` which challenges there are.
    """

    def __init__(self, clock: Calendar) -> None:
        self.clock = clock
        self.http_port = self.tls_port = 0
        self.problems: list[tuple[str, int, dict[str, str], Mapping[str, str]]] = []
        self.pending = 0
        self.lifetime = 90 * DAY
        self.offered = [HTTP_01, TLS_ALPN_01]
        self.seen: list[str] = []
        self.orders: list[dict[str, Any]] = []
        self.accounts: list[dict[str, str]] = []
        self.names: Callable[[str], list[str]] = lambda name: [name]
        self._key = chasquid.new_ec_key()
        self._nonces: set[str] = set()
        self._waits = 0
        handler = type("Handler", (_Handler,), {"authority": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def refuse(
        self, resource: str, kind: str, detail: str = "no", times: int = 1, status: int = 400,
        **headers: str,
    ) -> None:  # fmt: skip
        """Answer the next requests for a resource with a problem."""
        problem = {"type": f"urn:ietf:params:acme:error:{kind}", "detail": detail}
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.problems += [(resource, status, problem, fields)] * times

    def new_nonce(self) -> str:
        nonce = f"nonce{len(self._nonces)}-{time.monotonic_ns()}"
        self._nonces.add(nonce)
        return nonce

    def directory(self) -> dict[str, Any]:
        names = {"newNonce": "nonce", "newAccount": "account", "newOrder": "order"}
        return {
            **{key: f"{self.base}/{path}" for key, path in names.items()},
            "meta": {"termsOfService": "https://ca.example/terms"},
        }

    def obey(self, path: str, body: bytes) -> tuple[int, Mapping[str, str], object]:
        """Answer a signed request; an AssertionError is told to the client."""
        request = json.loads(body)
        header = json.loads(octets(request["protected"]))
        assert header["alg"] == "ES256" and header["url"] == self.base + path
        assert header["nonce"] in self._nonces, "the nonce is not mine, or was used"
        self._nonces.remove(header["nonce"])
        jwk = header.get("jwk") or self.accounts[int(header["kid"].rpartition("/")[2])]
        x, y = (int.from_bytes(octets(jwk[name]), "big") for name in "xy")
        data = f"{request['protected']}.{request['payload']}".encode()
        assert is_signature(x, y, data, octets(request["signature"])), "the signature is wrong"
        resource, _, number = path[1:].partition("/")
        assert ("jwk" in header) == (resource == "account")
        self.seen.append(resource)
        for index, (name, status, problem, headers) in enumerate(self.problems):
            if name == resource:
                del self.problems[index]
                return status, headers, problem
        payload = json.loads(octets(request["payload"])) if request["payload"] else None
        return getattr(self, f"_{resource}")(payload, int(number or -1), jwk)  # type: ignore[no-any-return]

    def _account(self, payload: Any, number: int, jwk: dict[str, str]) -> Any:
        assert payload == {"termsOfServiceAgreed": True}
        known = jwk in self.accounts
        self.accounts += [] if known else [jwk]
        place = {"Location": f"{self.base}/account/{self.accounts.index(jwk)}"}
        return 200 if known else 201, place, {"status": "valid"}

    def _order(self, payload: Any, number: int, jwk: dict[str, str]) -> Any:
        if payload is not None:
            number = len(self.orders)
            self.orders.append(
                {
                    "status": "pending",
                    "identifiers": payload["identifiers"],
                    "authorizations": [f"{self.base}/authorization/{number}"],
                    "finalize": f"{self.base}/finalize/{number}",
                    "challenges": [
                        {"type": kind, "url": f"{self.base}/challenge/{2 * number + index}",
                         "token": f"token{number}_{index}", "status": "pending"}
                        for index, kind in enumerate(self.offered)
                    ],
                }
            )  # fmt: skip
        order = self.orders[number]
        status = order["status"] if payload is not None else self._settled(order, "processing")
        place = {"Location": f"{self.base}/order/{number}", "Retry-After": "0"}
        return 201, place, {**order, "status": status}

    def _settled(self, what: dict[str, Any], otherwise: str) -> str:
        """Return the status, after it was something else a few times."""
        if self._waits < self.pending:
            self._waits += 1
            return otherwise
        self._waits = 0
        return str(what["status"])

    def _authorization(self, payload: Any, number: int, jwk: dict[str, str]) -> Any:
        order = self.orders[number]
        challenges = order["challenges"]
        tried = [challenge for challenge in challenges if challenge["status"] != "pending"]
        status = "pending"
        if tried:
            status = self._settled(tried[0], "pending")
        answer = {"status": status, "challenges": challenges, "identifier": order["identifiers"][0]}
        return 200, {"Retry-After": "0"}, answer

    def _challenge(self, payload: Any, number: int, jwk: dict[str, str]) -> Any:
        assert payload == {}
        order = self.orders[number // 2]
        challenge = order["challenges"][number % 2]
        canonical = json.dumps(jwk, sort_keys=True, separators=(",", ":")).encode()
        thumbprint = base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).decode()
        expected = f"{challenge['token']}.{thumbprint.rstrip('=')}"
        name = order["identifiers"][0]["value"]
        check = {HTTP_01: self._over_http, TLS_ALPN_01: self._over_tls}[challenge["type"]]
        try:
            check(name, challenge["token"], expected)
            challenge["status"] = "valid"
        except (OSError, AssertionError) as error:
            challenge["status"] = "invalid"
            kind = "urn:ietf:params:acme:error:connection"
            challenge["error"] = {"type": kind, "detail": f"{name} did not answer: {error}"}
        return 200, {}, challenge

    def _over_http(self, name: str, token: str, expected: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=SECONDS)
        path = f"/.well-known/acme-challenge/{token}"
        connection.request("GET", path, headers={"Host": name})
        answer = connection.getresponse()
        assert (answer.status, answer.read().decode()) == (200, expected)
        connection.close()

    def _over_tls(self, name: str, token: str, expected: str) -> None:
        context = trusting()
        context.set_alpn_protocols(["acme-tls/1"])
        with (
            socket.create_connection(("127.0.0.1", self.tls_port), SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=name) as tls,
        ):
            assert tls.selected_alpn_protocol() == "acme-tls/1"
            shown = tls.getpeercert(binary_form=True)
        assert shown and hashlib.sha256(expected.encode()).digest() in shown
        assert chasquid._oid("1.3.6.1.5.5.7.1.31") in shown

    def _finalize(self, payload: Any, number: int, jwk: dict[str, str]) -> Any:
        order = self.orders[number]
        assert "valid" in [challenge["status"] for challenge in order["challenges"]]
        request = octets(payload["csr"])
        name = order["identifiers"][0]["value"]
        assert chasquid.certificate_names(
            chasquid._pem("CERTIFICATE", request).encode()
        ) == {name}  # fmt: skip
        now = self.clock.time()
        order["chain"] = issued(
            self._key, request, self.names(name), (now - HOUR, now - HOUR + self.lifetime)
        )
        order |= {"status": "valid", "certificate": f"{self.base}/certificate/{number}"}
        return 200, {}, {**order, "status": "processing"}

    def _certificate(self, payload: Any, number: int, jwk: dict[str, str]) -> Any:
        assert payload is None
        return 200, {}, self.orders[number]["chain"]


class _Handler(http.server.BaseHTTPRequestHandler):
    authority: Authority

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, headers: Mapping[str, str], body: object) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (*headers.items(), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        if self.path != "/dir":
            self.send_header("Replay-Nonce", self.authority.new_nonce())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        assert self.path == "/dir"
        self._answer(200, {}, self.authority.directory())

    def do_HEAD(self) -> None:
        assert self.path == "/nonce"
        self._answer(200, {}, "")

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/jose+json"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self._answer(*self.authority.obey(self.path, body))
        except AssertionError as error:
            self._answer(500, {}, {"detail": f"wrong: {error}"})


# --- a host ---


class Host:
    """The names of a host, its files, and its log."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self.directory = directory
        self.authority = authority
        self.clock = authority.clock
        self.zone: dict[tuple[str, str], Sequence[str] | Exception] = dict(HERE)
        self.wanted = [HOST]
        self.has_web = True
        self.web_ports: frozenset[int] = frozenset((80, 443))
        self.renewals = 0

    async def ask(self, name: str, kind: str) -> chasquid.Answer:
        return await Zone(self.zone).ask(name, kind)

    def path(self, name: str = HOST, file: str = "fullchain.pem") -> Path:
        return self.directory / "acme" / "certs" / name / file

    def expiry(self, name: str = HOST) -> float:
        return chasquid.certificate_expiry(self.path(name).read_bytes())

    @property
    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def run(self, steps: Callable[[chasquid.Acme], Awaitable[Any]]) -> Any:
        """Run `steps` with an Acme that is made anew, as after a start."""

        async def main(loop: Loop) -> Any:
            log = chasquid.Log(*[chasquid.Sink(str(self.directory / "log"), loop.clock)] * 2)
            challenges = Challenges()
            [listener] = chasquid.listen("127.0.0.1", 0)
            self.authority.http_port = self.authority.tls_port = listener.getsockname()[1]
            web = chasquid.Web(loop, log, challenges)
            tasks = [loop.spawn(web.serve(listener), "web")] if self.has_web else []

            async def renewed() -> None:
                self.renewals += 1

            settings = chasquid.AcmeSettings(
                f"{self.authority.base}/dir",
                str(self.directory / "acme"),
                HOST,
                ports=self.web_ports if self.has_web else frozenset(),
                open_port=lambda: [listener],
            )
            acme = chasquid.Acme(
                loop,
                log,
                self.ask,
                settings,
                challenges=challenges,
                wanted=lambda: self.wanted,
                renewed=renewed,
            )
            try:
                return await steps(acme)
            finally:
                for task in tasks:
                    task.cancel()
                if listener.fileno() >= 0:
                    loop.forget(listener.fileno())
                    listener.close()
                assert not challenges.tokens and challenges.context is None
                log.close()

        return run(main, clock=self.clock)

    def round(self) -> float:
        """Do what is due; return the seconds until something is."""
        return float(self.run(lambda acme: acme.round()))


@pytest.fixture
def authority() -> Iterator[Authority]:
    authority = Authority(Calendar(1_800_000_000.0))
    yield authority
    authority.close()


@pytest.fixture
def host(tmp_path: Path, authority: Authority) -> Host:
    return Host(tmp_path, authority)


# --- requests ---


def test_a_request_is_signed_as_the_rfc_shows() -> None:
    key = chasquid.new_ec_key()
    request = json.loads(chasquid.signed_request(key, {"nonce": "n", "url": "u"}, {"a": 1}))
    assert json.loads(octets(request["protected"])) == {"alg": "ES256", "nonce": "n", "url": "u"}
    assert json.loads(octets(request["payload"])) == {"a": 1}
    assert is_signature(
        key.x, key.y, f"{request['protected']}.{request['payload']}".encode(),
        octets(request["signature"]),
    )  # fmt: skip
    assert json.loads(chasquid.signed_request(key, {}, None))["payload"] == ""


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    # the key of RFC 7517, A.2
    key = EcKey(
        int.from_bytes(octets("870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE"), "big"),
        int.from_bytes(octets("MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4"), "big"),
        int.from_bytes(octets("4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"), "big"),
    )
    assert chasquid._ec_key(key.secret) == key
    assert chasquid.key_thumbprint(key) == "cn-I_WNMClehiVp51i_0VpOENW1upEerA8sEam5hn-s"


def test_the_terms_of_an_authority_can_be_asked_for(authority: Authority) -> None:
    assert chasquid.acme_terms(f"{authority.base}/dir") == "https://ca.example/terms"
    with pytest.raises(AcmeFailed, match=r"http://127.0.0.1:1/dir cannot be asked: "):
        chasquid.acme_terms("http://127.0.0.1:1/dir")


@pytest.mark.parametrize("url", ["http://192.0.2.1/dir", "ftp://127.0.0.1/", "x", "https://[x/"])
def test_only_https_is_spoken_with_others(url: str) -> None:
    with pytest.raises(AcmeFailed, match="cannot be asked: "):
        chasquid.acme_terms(url)


@pytest.mark.parametrize(
    ("value", "pause"),
    [
        ("120", 120.0),
        ("0", 0.0),
        ("Fri, 15 Jan 2027 08:01:00 GMT", 60.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
        ("soon", -1.0),
        ("-5", -1.0),
        ("", -1.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, pause: float) -> None:
    answer = chasquid.AcmeAnswer(429, {"retry-after": value}, b"")
    assert answer.pause(1_800_000_000.0) == pause


# --- certificates ---


@pytest.mark.parametrize("kind", [HTTP_01, TLS_ALPN_01])
def test_a_certificate_is_issued_and_kept(host: Host, kind: str) -> None:
    host.authority.offered = [kind]
    host.authority.pending = 2
    assert host.round() == DAY
    assert chasquid.certificate_names(host.path().read_bytes()) == {HOST}
    assert host.expiry() == host.clock.now - HOUR + 90 * DAY
    chasquid.server_tls_context(str(host.path()), str(host.path(file="privkey.pem")))
    assert host.renewals == 1
    kept = sorted((host.directory / "acme").rglob("*"))
    assert [str(path.relative_to(host.directory / "acme")) for path in kept] == [
        "account.pem",
        "certs",
        f"certs/{HOST}",
        f"certs/{HOST}/fullchain.pem",
        f"certs/{HOST}/privkey.pem",
    ]
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600, 0o700}


def test_without_a_web_listener_a_port_is_open_as_long_as_an_order_runs(host: Host) -> None:
    host.has_web = False
    host.round()
    assert host.path().exists()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", host.authority.http_port), 1)


def test_a_port_that_cannot_be_had_is_told_of() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(chasquid.ChasquidError, match=r"^cannot listen on .*set web_address$"),
    ):
        chasquid._listen_for_challenges(taken.getsockname()[1])


def test_a_nonce_that_is_refused_is_replaced(host: Host) -> None:
    host.authority.refuse("order", "badNonce", times=3)
    host.round()
    assert host.path().exists()
    assert host.authority.seen.count("order") == 5


def test_an_authority_that_refuses_all_nonces_is_given_up(host: Host) -> None:
    host.authority.refuse("account", "badNonce", times=100)
    assert host.round() == 300
    assert host.authority.seen.count("account") == 10
    assert "takes none of its own nonces" in host.log[-1]


def test_each_name_has_a_certificate_of_its_own(host: Host) -> None:
    host.wanted.append(MTA_STS)
    host.authority.refuse("order", "rejectedIdentifier", "not this one")
    host.round()
    assert not host.path().exists() and host.path(MTA_STS).exists()
    assert len(host.authority.accounts) == 1
    assert host.authority.seen.count("account") == 1


def test_the_account_stays_the_same(host: Host) -> None:
    host.round()
    host.clock.advance(61 * DAY)
    host.round()
    assert len(host.authority.orders) == 2
    assert len(host.authority.accounts) == 1


@pytest.mark.parametrize(
    ("kind", "other"), [(HTTP_01, TLS_ALPN_01), (TLS_ALPN_01, HTTP_01)], ids=["http", "tls"]
)
def test_if_a_challenge_fails_the_other_is_tried_at_once(host: Host, kind: str, other: str) -> None:
    host.wanted.append(MTA_STS)
    host.web_ports = frozenset((443,)) if kind == TLS_ALPN_01 else frozenset((80, 443))

    async def steps(acme: chasquid.Acme) -> None:
        attribute = "http_port" if kind == HTTP_01 else "tls_port"
        setattr(host.authority, attribute, 1)  # nobody is there
        await acme.round()

    host.run(steps)
    tried = [
        (order["identifiers"][0]["value"], challenge["type"], challenge["status"])
        for order in host.authority.orders
        for challenge in order["challenges"]
        if challenge["status"] != "pending"
    ]
    assert tried == [
        (HOST, kind, "invalid"),
        (HOST, other, "valid"),
        (MTA_STS, other, "valid"),  # what has worked comes first
    ]


def test_an_authorization_that_is_valid_still_needs_no_challenge(host: Host) -> None:
    real = host.authority._authorization

    def valid(payload: Any, number: int, jwk: dict[str, str]) -> Any:
        host.authority.orders[number]["challenges"][0]["status"] = "valid"
        return real(payload, number, jwk)

    host.authority._authorization = valid  # type: ignore[method-assign]
    host.round()
    assert host.path().exists()
    assert "challenge" not in host.authority.seen


# --- renewal ---


@pytest.mark.parametrize(
    ("lifetime", "renewed_after"), [(90, 60), (398, 368), (45, 30), (6, 4)], ids=str
)
def test_a_certificate_is_renewed_in_time(host: Host, lifetime: int, renewed_after: int) -> None:
    host.authority.lifetime = lifetime * DAY
    host.round()
    issued = host.clock.now - HOUR
    host.clock.now = issued + renewed_after * DAY - 60
    assert 59 <= host.round() <= 61
    assert len(host.authority.orders) == 1
    host.clock.advance(61)
    host.round()
    assert len(host.authority.orders) == 2
    assert host.expiry() == host.clock.now - HOUR + lifetime * DAY
    assert host.renewals == 2


def test_a_renewal_keeps_the_key(host: Host) -> None:
    host.round()
    first = host.path().read_bytes(), host.path(file="privkey.pem").read_bytes()
    host.clock.advance(61 * DAY)
    host.round()
    assert host.path().read_bytes() != first[0]
    assert host.path(file="privkey.pem").read_bytes() == first[1]


def test_a_certificate_that_is_old_when_it_comes_is_not_asked_for_again_at_once(host: Host) -> None:
    host.authority.lifetime = HOUR / 2

    async def steps(acme: chasquid.Acme) -> list[float]:
        return [await acme.round() for _ in range(3)]

    assert host.run(steps) == pytest.approx([DAY] * 3, abs=60)
    assert len(host.authority.orders) == 1


def test_a_self_signed_certificate_is_replaced(host: Host) -> None:
    write_certificate(host.path().parent, HOST)
    host.round()
    assert not chasquid.is_self_signed(host.path().read_bytes())
    assert host.path(file="privkey.pem").read_text() == certificate(HOST)[1]


@pytest.mark.parametrize("file", ["fullchain.pem", "privkey.pem"])
def test_files_that_cannot_be_used_are_replaced(host: Host, file: str) -> None:
    host.round()
    host.path(file=file).write_text("rubbish")
    host.round()
    host.path(file=file).unlink()
    host.round()
    chasquid.server_tls_context(str(host.path()), str(host.path(file="privkey.pem")))
    assert len(host.authority.orders) == 3


def test_it_goes_on_by_itself(host: Host) -> None:
    async def steps(acme: chasquid.Acme) -> None:
        task = acme._loop.spawn(acme.run(), "ACME")
        while not host.path().exists():
            await acme._loop.sleep(0.01)
        host.wanted.append(MTA_STS)
        acme.look()
        while not host.path(MTA_STS).exists():
            await acme._loop.sleep(0.01)
        task.cancel()
        await chasquid.ended(task)

    host.run(steps)
    assert host.renewals == 2


def test_an_order_under_way_ends_with_the_server(host: Host) -> None:
    host.authority.pending = 1_000_000

    async def steps(acme: chasquid.Acme) -> float:
        task = acme._loop.spawn(acme.run(), "ACME")
        while host.authority.seen.count("authorization") < 3:
            await acme._loop.sleep(0.01)
        begun = time.monotonic()
        task.cancel()
        await chasquid.ended(task)
        return time.monotonic() - begun

    assert host.run(steps) < 5
    assert not host.path().exists()


# --- failures ---


def pauses(host: Host, count: int) -> list[float]:
    """Return how long it waits after each of so many rounds, the clock moved on by as much."""

    async def steps(acme: chasquid.Acme) -> list[float]:
        found = []
        for _ in range(count):
            found.append(await acme.round())
            host.clock.advance(found[-1])
        return found

    return list(host.run(steps))


def test_a_failure_is_warned_of_and_tried_again_less_and_less_often(host: Host) -> None:
    host.authority.refuse("order", "serverInternal", "busy", times=100, status=500)
    waits = pauses(host, 12)
    assert waits[:10] == [300.0 * 2**number for number in range(9)] + [DAY]
    assert waits[10:] == [DAY, DAY]
    assert len(host.log) == 12
    assert host.log[0].partition(" event=")[2] == (
        f'warning source=acme text="no certificate for {HOST}: the authority says: busy; '
        'next attempt in 5m"'
    )


def test_the_authority_says_when_to_come_back(host: Host) -> None:
    host.authority.refuse("order", "rateLimited", "too many", status=429, retry_after="7200")
    assert host.round() == 7200
    host.authority.refuse("order", "rateLimited", "too many", status=429, retry_after="1")
    assert host.round() == 300  # no sooner than we would by ourselves
    host.authority.refuse("order", "rateLimited", "too many", status=429, retry_after="99999999")

    async def steps(acme: chasquid.Acme) -> float:
        await acme.round()
        return acme._progress[HOST].not_before - host.clock.monotonic()

    assert host.run(steps) == pytest.approx(7 * DAY, abs=60)


@pytest.mark.parametrize("wrong", [-50, 0.3, 70], ids=["1970", "hours ahead", "decades ahead"])
def test_what_failed_while_the_clock_was_wrong_is_tried_soon(host: Host, wrong: float) -> None:
    host.round()
    host.clock.advance(61 * DAY)

    async def steps(acme: chasquid.Acme) -> tuple[int, int]:
        host.clock.jumped = wrong * 365 * DAY
        host.authority.refuse("order", "serverInternal", "down", status=500)
        await acme.round()
        before, host.clock.jumped = host.renewals, 0.0
        for _ in range(3):  # if the clock was far behind, none was due before
            await acme.round()
            host.clock.advance(400)
        return before, host.renewals

    before, after = host.run(steps)
    assert after == before + 1


def test_a_renewal_that_fails_is_a_problem_from_the_first_day(host: Host) -> None:
    host.round()
    host.clock.advance(61 * DAY)
    host.authority.refuse("order", "serverInternal", "down", status=500)

    async def steps(acme: chasquid.Acme) -> tuple[list[str], list[str]]:
        await acme.round()
        before = acme.problems
        host.clock.advance(400)
        await acme.round()
        return before, acme.problems

    [problem], after = host.run(steps)
    assert problem == (
        f"the certificate for {HOST} expires in 28d 23h and could not be renewed: "
        "the authority says: down"
    )
    assert after == []
    assert any("event=warning" in line and problem in line for line in host.log)


def test_why_a_challenge_failed_is_told(host: Host) -> None:
    async def steps(acme: chasquid.Acme) -> None:
        host.authority.http_port = host.authority.tls_port = 1
        await acme.round()

    host.run(steps)
    assert f"{HOST} did not answer: [Errno " in host.log[0]
    assert "Connection refused (http-01); the authority says: " in host.log[0]
    assert "Connection refused (tls-alpn-01)" in host.log[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: setattr(a, "offered", ["dns-01"]), "offers no challenge http-01"),
        (lambda a: setattr(a, "names", lambda name: ["x.example"]), f"is not for {HOST}"),
        (lambda a: setattr(a, "directory", dict), "the authority's answer has no 'newAccount'"),
        (lambda a: setattr(a, "directory", list), "is no JSON object"),
        (lambda a: a.refuse("certificate", "x", "", status=503), "the authority says: status 503"),
        (lambda a: a.problems.append(("finalize", 302, {}, {})), "status 302"),
        (lambda a: a.refuse("account", "externalAccountRequired", "bind it"), "bind it"),
        (lambda a: a.close(), "cannot be asked: Connection refused"),
    ],
)
def test_an_authority_that_does_not_do_its_part(
    host: Host, change: Callable[[Authority], object], told: str
) -> None:
    change(host.authority)
    assert host.round() == 300
    assert told in host.log[-1]
    assert not host.path().exists() and host.renewals == 0


def test_a_certificate_for_another_key_is_not_kept(host: Host) -> None:
    host.round()
    first = host.path().read_bytes()
    other = chasquid.new_ec_key()
    real = host.authority._finalize

    def finalize(payload: Any, number: int, jwk: dict[str, str]) -> Any:
        request = chasquid.certificate_request(other, HOST)
        return real({"csr": chasquid._base64url(request)}, number, jwk)

    host.authority._finalize = finalize  # type: ignore[method-assign]
    host.clock.advance(61 * DAY)
    host.round()
    assert host.path().read_bytes() == first
    assert "could not be renewed" in host.log[-1] and "fits the key" in host.log[-1]
    assert sorted(path.name for path in host.path().parent.iterdir()) == [
        "fullchain.pem",
        "privkey.pem",
    ]


def test_an_account_key_that_cannot_be_read_is_told_of_by_its_path(host: Host) -> None:
    path = host.directory / "acme" / "account.pem"
    path.parent.mkdir()
    path.write_text("rubbish")
    host.round()
    assert f"{path}: expected an EC PRIVATE KEY on the curve P-256" in host.log[-1]
    assert path.read_text() == "rubbish"


def test_a_directory_that_cannot_be_written_is_told_of(host: Host) -> None:
    (host.directory / "acme").write_text("a file")
    assert host.round() == 300
    assert "Not a directory" in host.log[-1]


def test_a_fault_of_ours_does_not_end_renewals(host: Host) -> None:
    async def steps(acme: chasquid.Acme) -> None:
        task = acme._loop.spawn(acme.run(), "ACME")
        while not host.log:
            await acme._loop.sleep(0.01)
        host.wanted = [HOST]
        acme.look()
        while not host.path().exists():
            await acme._loop.sleep(0.01)
        task.cancel()
        await chasquid.ended(task)

    host.wanted = None  # type: ignore[assignment]
    host.run(steps)
    assert "event=crash source=acme" in host.log[0]


# --- names ---


@pytest.mark.parametrize(
    ("zone", "why"),
    [
        ({(HOST, "A"): ["192.0.2.1"]}, f"the DNS has no address of {MTA_STS}"),
        (
            {**HERE, (MTA_STS, "AAAA"): ["2001:db8::9"]},
            f"the DNS has {MTA_STS} lead to 2001:db8::9, which is not {HOST}",
        ),
        (
            {**HERE, (MTA_STS, "A"): chasquid.TemporaryFailure("the name server is down")},
            "the name server is down",
        ),
    ],
)
def test_a_name_that_does_not_lead_here_is_left_out(
    host: Host, zone: dict[tuple[str, str], Any], why: str
) -> None:
    host.wanted.append(MTA_STS)
    host.zone = zone

    async def steps(acme: chasquid.Acme) -> list[str]:
        await acme.round()
        return acme.problems

    assert host.run(steps) == []
    assert host.path().exists() and not host.path(MTA_STS).exists()
    text = f"no certificate for {MTA_STS} yet: {why}; next attempt in 5m"
    assert f'event=info source=acme text="{text}"' in host.log[-1]


def test_a_name_that_leads_nowhere_is_looked_up_daily_in_the_end(host: Host) -> None:
    host.wanted.append(MTA_STS)
    del host.zone[MTA_STS, "A"]
    assert pauses(host, 12)[-2:] == [DAY, DAY]


def test_the_host_itself_is_waited_for_hourly_and_is_a_problem(host: Host) -> None:
    host.zone = {}

    async def steps(acme: chasquid.Acme) -> list[str]:
        for _ in range(6):
            host.clock.advance(await acme.round())
        return acme.problems

    assert host.run(steps) == [f"no certificate for {HOST} yet: the DNS has no address of {HOST}"]
    assert host.log[-1].endswith('next attempt in 1h 0m"')
    assert host.authority.seen == []


def test_a_resolver_that_fails_does_not_keep_the_host_from_a_certificate(host: Host) -> None:
    host.zone = {(HOST, kind): chasquid.TemporaryFailure("down") for kind in ("A", "AAAA")}
    host.round()
    assert host.path().exists()


def test_a_name_that_leads_elsewhere_by_now_is_warned_of_as_long_as_it_had_one(host: Host) -> None:
    host.wanted = [MTA_STS]
    host.round()
    host.zone[MTA_STS, "A"] = ["192.0.2.99"]
    host.clock.advance(61 * DAY)
    host.round()
    why = f"the DNS has {MTA_STS} lead to 192.0.2.99, which is not {HOST}"
    assert "event=warning" in host.log[-1]
    assert f"expires in 28d 23h and could not be renewed: {why}" in host.log[-1]


def test_a_look_tries_names_again_that_did_not_lead_here(host: Host) -> None:
    host.wanted.append(MTA_STS)
    del host.zone[MTA_STS, "A"]

    async def steps(acme: chasquid.Acme) -> None:
        await acme.round()
        host.zone[MTA_STS, "A"] = ["192.0.2.1"]
        await acme.round()
        assert not host.path(MTA_STS).exists()
        acme.look()
        await acme.round()

    host.run(steps)
    assert host.path(MTA_STS).exists()


# --- in a server ---


def certificate_shown(server: Server, name: str) -> bytes | None:
    with (
        socket.create_connection(("127.0.0.1", server.port("submission over TLS")), SECONDS) as raw,
        trusting().wrap_socket(raw, server_hostname=name) as tls,
    ):
        return tls.getpeercert(binary_form=True)


def fetched(server: Server, name: str, **span: float) -> str:
    """Put a certificate where ACME puts them; return it."""
    now = time.time()
    key = chasquid.new_ec_key()
    request = chasquid.certificate_request(key, name)
    ends = now + span.get("days", 80) * DAY
    chain = issued(chasquid.new_ec_key(), request, [name], (ends - 90 * DAY, ends))
    directory = server.data_dir / "acme" / "certs" / name
    directory.mkdir(parents=True)
    (directory / "fullchain.pem").write_text(chain)
    (directory / "privkey.pem").write_text(key.to_pem())
    return chain


def with_acme(directory: Path, **keywords: Any) -> Server:
    """Return a server that fetches certificates, from nowhere."""
    server = Server(directory, acme_url="https://127.0.0.1:1/dir", **keywords)
    with (server.config_dir / "chasquid.conf").open("a") as file:
        file.write("acme: true\n")
    return server


def test_a_fetched_certificate_wins_over_a_self_signed_one(tmp_path: Path) -> None:
    server = with_acme(tmp_path, web_address="127.0.0.1:0")
    chain = fetched(server, HOST)
    with server:
        assert certificate_shown(server, HOST) == ssl.PEM_cert_to_DER_cert(chain)
        assert certificate_shown(server, "unknown.example") == ssl.PEM_cert_to_DER_cert(chain)
        assert "mode: enforce" in server.daemon._web_site().sts_policy


def test_a_certificate_of_the_operator_wins_over_a_fetched_one(tmp_path: Path) -> None:
    server = with_acme(tmp_path, certificates=())
    fetched(server, HOST)
    other = Server(tmp_path / "other")
    ours = fetched(other, HOST)
    (server.config_dir / "certs").symlink_to(other.data_dir / "acme" / "certs")
    with server:
        assert certificate_shown(server, HOST) == ssl.PEM_cert_to_DER_cert(ours)
        assert list(server.daemon._names_without_certificate()) == []


def test_the_names_that_are_fetched(tmp_path: Path) -> None:
    users = {"here.example": {"ana": "x"}, "ñandú.example": {"ana": "x"}}
    server = with_acme(tmp_path, users=users, web_address="127.0.0.1:0")
    server.write(f"domains/{HOST}/aliases", b"root: ana@here.example\n")
    with server:
        assert list(server.daemon._names_without_certificate()) == [
            HOST,
            "mta-sts.here.example",
            "autoconfig.here.example",
            "mta-sts.xn--and-6ma2c.example",
            "autoconfig.xn--and-6ma2c.example",
        ]
    server = with_acme(tmp_path / "without")
    with server:
        assert list(server.daemon._names_without_certificate()) == [HOST]


def test_a_problem_is_on_the_page(tmp_path: Path) -> None:
    server = with_acme(tmp_path, ask=Zone(HERE).ask, web_address="127.0.0.1:0")
    with server:
        wait_for(lambda: "source=acme" in server.log, "the attempt")
        wait_for(lambda: server.daemon._status().problems, "the problem")
        problem = server.daemon._status().problems[0]
        assert re.match(f"no certificate for {HOST}: https://127.0.0.1:1/dir cannot be", problem)


def test_a_reload_looks_at_the_names_again(tmp_path: Path) -> None:
    server = with_acme(tmp_path, web_address="127.0.0.1:0")

    def told(name: str) -> int:
        return server.log.count(f"no certificate for {name} yet: the DNS has no address of {name}")

    with server:
        wait_for(lambda: told("autoconfig.here.example") == 1, "the first look")
        server.write("domains/new.example/aliases", b"x: ana@here.example")
        server.write("domains/new.example/users", users_file({"ana": "x"}))
        server.daemon.reload()
        wait_for(lambda: told(HOST) == 2 and told("mta-sts.new.example") == 1, "the second")


def test_a_server_without_acme_asks_nobody(serve: Serve) -> None:
    assert serve(web_address="127.0.0.1:0").daemon._acme is None


def test_an_old_certificate_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = with_acme(tmp_path, certificates=())
    fetched(server, HOST, days=5)
    assert chasquid.main(["--config-dir", str(server.config_dir), "check"]) == 0
    said = capsys.readouterr().out
    assert f"the certificate in acme/certs/{HOST} expires in 4 days: the log says why" in said
    own = fetched(Server(tmp_path / "other"), HOST)
    directory = server.config_dir / "certs" / HOST
    shutil.copytree(tmp_path / "other" / "data" / "acme" / "certs" / HOST, directory)
    assert (directory / "fullchain.pem").read_text() == own
    assert chasquid.main(["--config-dir", str(server.config_dir), "check"]) == 0
    assert "expires" not in capsys.readouterr().out
