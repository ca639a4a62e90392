# SPDX-License-Identifier: Apache-2.0
"""Rooms DAEMON, CONTROL, LISTENERS: wiring, reload, commands to it, certificates, start and end."""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import ssl
import stat
import time
from pathlib import Path

import pytest
from support import (
    HOST,
    SECONDS,
    USERS,
    FakeCourier,
    Peer,
    RunningClock,
    Serve,
    Server,
    Wire,
    Zone,
    certificate,
    greet,
    greeted,
    login,
    rcpt,
    started_by_systemd,
    trusting,
    users_file,
    wait_for,
    write_certificate,
)

import chasquid

EVE = "eva@there.example"


def send(server: Server, recipient: str = "ana@here.example") -> str:
    """Send a message; return its id."""
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{recipient}>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        return wire.ask("Subject: x\r\n\r\n.").split()[-1]


def login_to(server: Server, user: str, password: str) -> str:
    with greeted(server, "submission over TLS") as wire:
        return login(wire, user, password)


def certificate_of(server: Server, name: str = "", port: str = "submission over TLS") -> str:
    """Return the certificate that the server shows to who asks for `name`, as PEM."""
    with server.connect(port) as wire:
        wire.start_tls(trusting(), name=name)
        der = wire.socket.getpeercert(True)  # type: ignore[attr-defined]
    return ssl.DER_cert_to_PEM_cert(der)


def reload(server: Server) -> None:
    """Have the server read its files again, and wait until it has."""
    before = server.log.count("event=reloaded")
    server.daemon.reload()
    wait_for(lambda: server.log.count("event=reloaded") > before, "the files to be read again")


# --- what is read again ---


def test_new_users_are_known_after_a_reload(serve: Serve) -> None:
    server = serve()
    assert rcpt(server, "ida@here.example").startswith("550 ")
    server.write("domains/here.example/users", users_file({"ida": "geheim"}))
    reload(server)
    assert rcpt(server, "ida@here.example").startswith("250 ")
    assert rcpt(server, "ana@here.example").startswith("550 ")
    assert login_to(server, "ida@here.example", "geheim").startswith("235 ")


def test_a_new_domain_is_known_after_a_reload(serve: Serve) -> None:
    server = serve()
    assert rcpt(server, "ida@new.example").startswith("550 5.7.1 ")
    server.write("domains/new.example/users", users_file({"ida": "geheim"}))
    reload(server)
    assert rcpt(server, "ida@new.example").startswith("250 ")
    send(server, "ida@new.example")
    assert len(server.mail("ida", "new.example")) == 1


def test_where_no_process_can_be_forked_threads_write(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fork", fork)
    server = serve(alone=True)
    send(server)
    assert len(server.mail("ana")) == 1
    assert "which is slower: Resource temporarily unavailable" in server.log
    server.stop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_new_aliases_are_known_after_a_reload(serve: Serve) -> None:
    server = serve()
    server.write("domains/here.example/aliases", b"team: ana, ben\n")
    reload(server)
    send(server, "team@here.example")
    assert len(server.mail("ana")) == len(server.mail("ben")) == 1


def test_files_that_changed_are_read_again_without_being_told(serve: Serve) -> None:
    server = serve(reload_every="10ms")
    server.write("domains/here.example/users", users_file({"ida": "geheim"}))
    wait_for(lambda: "event=reloaded" in server.log, "the users to be read")
    assert rcpt(server, "ida@here.example").startswith("250 ")


def test_files_that_did_not_change_are_left_alone(serve: Serve) -> None:
    clock = RunningClock()
    server = serve(clock=clock, reload_every="30s")
    for _ in range(3):
        clock.advance(31)
        server.settle()
    assert "event=reloaded" not in server.log


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("domains/here.example/users", b"users: {\n  key: oops\n}\n", "users:"),
        ("domains/here.example/aliases", b"# fine\nno colon\n", "aliases:2:"),
        (f"certs/{HOST}/fullchain.pem", b"no certificate", "fullchain.pem"),
        (f"certs/{HOST}/privkey.pem", certificate("other.example")[1].encode(), "fullchain.pem"),
    ],
    ids=["users", "aliases", "certificate", "key"],
)
def test_a_bad_file_leaves_the_old_in_force(
    serve: Serve, name: str, data: bytes, where: str
) -> None:
    server = serve(aliases={"here.example": "team: ana\n"})
    server.write(name, data)
    server.write("domains/new.example/users", users_file({"ida": "geheim"}))
    reload(server)
    wait_for(lambda: "what was in force there before stays so" in server.log, "the complaint")
    assert where in server.log.partition("event=reloaded")[2]
    assert rcpt(server, "team@here.example").startswith("250 ")
    assert rcpt(server, "ida@new.example").startswith("250 ")  # one mistake stays where it is
    assert login_to(server, "ana@here.example", "secret").startswith("235 ")
    assert certificate_of(server) == certificate(HOST)[0]


@pytest.mark.parametrize(
    ("name", "data"),
    [("users", b"oops\n"), ("aliases", b"no colon\n"), ("dkim:a.pem", b"no key\n")],
)
def test_at_the_start_a_broken_domain_waits_and_the_others_are_served(
    tmp_path: Path, name: str, data: bytes
) -> None:
    users = {"here.example": {"ana": "secret"}, "bad.example": {"eva": "secret"}}
    server = Server(tmp_path, users=users, reload_every="20ms")
    path = server.write(f"domains/bad.example/{name}", data)
    old = users_file({"eva": "secret"}) if name == "users" else b""
    with server:
        assert f"{path}:" in server.log
        assert server.daemon.problems == [
            line for line in server.daemon.problems if str(path) in line
        ]
        assert rcpt(server, "ana@here.example").startswith("250 ")
        said = "the configuration of bad.example has a mistake"
        assert rcpt(server, "eva@bad.example") == f"451 4.3.5 {said}"
        assert login_to(server, "eva@bad.example", "secret") == f"454 4.3.5 {said}"
        wait_for(lambda: server.log.count(f"{path}:") > 3, "a complaint at each look")
        if name.startswith("dkim"):
            path.unlink()
        else:
            path.write_bytes(old)
        wait_for(lambda: not server.daemon.problems, "the mended file to be read")
        assert rcpt(server, "eva@bad.example").startswith("250 ")


def test_a_directory_with_a_name_that_is_no_domains_is_left_out(tmp_path: Path) -> None:
    server = Server(tmp_path)
    path = server.write("domains/no..domain/aliases", b"").parent
    with server:
        assert f"{path}: expected a domain name" in server.log
        assert rcpt(server, "ana@here.example").startswith("250 ")
        server.write("domains/new.example/users", users_file({"ida": "geheim"}))
        reload(server)
        wait_for(lambda: "new.example" in server.daemon._domains.each, "the new domain")


def test_a_file_full_of_mistakes_does_not_fill_the_log(tmp_path: Path) -> None:
    server = Server(tmp_path)
    path = server.write("domains/bad.example/aliases", b"oops\n" * 1000)
    with server:
        assert server.log.count(f"{path}:") == 20
        assert f"{path.parent}: 980 mistakes more" in server.log
        assert "no domain in" not in server.log


def test_a_delivery_agent_is_looked_for_in_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, mail_delivery_agent_bin="agent")
    agent = server.write("bin/agent", b'#!/bin/sh\nexec cat > "${0%/*}/mail"\n')
    agent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{agent.parent}:{os.environ['PATH']}")
    with server:
        with greeted(server) as wire:
            for line in ("MAIL FROM:<>", "RCPT TO:<ana@here.example>"):
                assert wire.ask(line).startswith("250 ")
            assert wire.ask("DATA").startswith("354 ")
            assert wire.ask("Subject: x\r\n\r\nhello\r\n.").startswith("250 ")
        wait_for(lambda: not server.queued(), "the delivery")
        assert b"\nhello" in (agent.parent / "mail").read_bytes()
        assert "mail_delivery_agent_bin" not in server.log


def test_a_certificate_of_which_half_is_missing_is_left_out(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.write("certs/half.example/fullchain.pem", certificate("half.example")[0].encode())
    with server:
        assert "certs/half.example/privkey.pem is missing" in server.log
        assert login_to(server, "ana@here.example", "secret").startswith("235 ")


def test_the_directory_of_acme_sh_works_by_a_link(tmp_path: Path) -> None:
    server = Server(tmp_path, certificates=())
    directory = tmp_path / ".acme.sh" / f"{HOST}_ecc"
    chain, key = certificate(HOST)
    directory.mkdir(parents=True)
    for name, text in (("fullchain.cer", chain), (f"{HOST}.key", key), (f"{HOST}.conf", "x")):
        (directory / name).write_text(text)
    (server.config_dir / "certs").mkdir()
    (server.config_dir / "certs" / HOST).symlink_to(directory)
    with server:
        assert certificate_of(server) == chain
        renewed, key = certificate(HOST, "new.example")
        (directory / "fullchain.cer").write_text(renewed)
        (directory / f"{HOST}.key").write_text(key)
        reload(server)
        assert certificate_of(server) == renewed


@pytest.mark.parametrize("link", ["directory", "file"])
def test_a_link_that_leads_nowhere_is_told_of(tmp_path: Path, link: str) -> None:
    server = Server(tmp_path)
    place = server.config_dir / "certs" / "gone.example"
    if link == "file":
        place.mkdir()
        place /= "privkey.pem"
    place.symlink_to(tmp_path / "nowhere")
    with server:
        assert f"{place}: the certificate cannot be read: No such file" in server.log
        assert certificate_of(server) == certificate(HOST)[0]


@pytest.mark.parametrize(
    ("days", "said"),
    [(-1, "has expired, on "), (5, "expires in 4 days: renew it"), (20, "")],
)
def test_the_end_of_a_certificate_is_told_of_before_it_comes(
    tmp_path: Path, days: int, said: str
) -> None:
    made = time.time() + days * 86400 - chasquid._CERTIFICATE_SECONDS
    chain, key = chasquid.self_signed_certificate([HOST], made)
    assert abs(chasquid.certificate_expiry(chain.encode()) - time.time() - days * 86400) < 90000
    server = Server(tmp_path)
    server.write(f"certs/{HOST}/fullchain.pem", chain.encode())
    server.write(f"certs/{HOST}/privkey.pem", key.encode())
    with server:
        server.settle()
        text = f'source=certificates text="the certificate in certs/{HOST} {said}'
        if said:
            wait_for(lambda: text in server.log, "the warning")
        else:
            wait_for(lambda: "ready" in server.log, "the start")
            assert "source=certificates" not in server.log


def test_a_name_without_a_certificate_is_told_of(tmp_path: Path) -> None:
    chain, key = certificate("other.example")
    zone = Zone({("here.example", "MX"): ["10 mx.here.example"]})
    server = Server(tmp_path, ask=zone.ask)
    server.write(f"certs/{HOST}/fullchain.pem", chain.encode())
    server.write(f"certs/{HOST}/privkey.pem", key.encode())
    with server:
        for host in (HOST, "mx.here.example"):
            wait_for(lambda host=host: f"no certificate in certs is for {host}" in server.log, host)


def test_a_new_certificate_is_shown_after_a_reload(serve: Serve) -> None:
    server = serve()
    assert certificate_of(server) == certificate(HOST)[0]
    write_certificate(server.config_dir / "certs" / HOST, HOST, "new.example")
    reload(server)
    assert certificate_of(server) == certificate(HOST, "new.example")[0]


def test_a_first_certificate_turns_starttls_on(serve: Serve) -> None:
    server = serve(certificates=())
    write_certificate(server.config_dir / "certs" / HOST, HOST)
    reload(server)
    with greeted(server) as wire:
        assert wire.ask("STARTTLS").startswith("220 ")
        wire.start_tls(trusting())
        assert wire.ask("EHLO client.example").endswith("250 AUTH PLAIN LOGIN")
    assert login_to(server, "ana@here.example", "secret").startswith("235 ")


def test_a_certificate_that_goes_away_stays_in_force(serve: Serve) -> None:
    server = serve()
    (server.config_dir / "certs" / HOST / "fullchain.pem").unlink()
    reload(server)
    assert certificate_of(server) == certificate(HOST)[0]


def test_a_reload_opens_the_logs_anew(serve: Serve) -> None:
    server = serve()
    for name in ("server.log", "mail.log"):
        (server.directory / name).rename(server.directory / f"{name}.1")
    server.daemon.reload()
    wait_for(lambda: (server.directory / "mail.log").exists(), "the log")
    wait_for(lambda: "event=reloaded" in server.log, "the line in the log")
    id = send(server)
    server.mail("ana")
    assert id in server.mail_log


# --- certificates ---


def test_each_name_gets_its_certificate(serve: Serve) -> None:
    server = serve(certificates=("a.example", HOST, "z.example"))
    for name in (HOST, "a.example", "z.example"):
        assert certificate_of(server, name) == certificate(name)[0]
    assert certificate_of(server, "Z.Example") == certificate("z.example")[0]
    assert certificate_of(server, "unknown.example") == certificate(HOST)[0]
    assert certificate_of(server) == certificate(HOST)[0]


class Resuming:
    """A mail program that comes again, with the TLS session that it had."""

    def __init__(self, server: Server, version: str = "TLSv1_3", port: str = "submission") -> None:
        self._context = trusting()
        self._context.minimum_version = ssl.TLSVersion[version]
        self._context.maximum_version = ssl.TLSVersion[version]
        self._server, self._port = server, port
        self._session: ssl.SSLSession | None = None
        self.certificate = b""

    def resumes(self, name: str = HOST) -> bool:
        """Connect, and tell whether the session of before was taken up."""
        with self._server.connect(self._port) as wire:
            if self._port != "submission over TLS":
                greet(wire)
                assert wire.ask("STARTTLS").startswith("220 ")
            tls = wire.socket = self._context.wrap_socket(
                wire.socket, server_hostname=name, session=self._session
            )
            assert wire.ask("NOOP").startswith("2")  # by then a ticket has come, if there is one
            self._session = tls.session
            self.certificate = tls.getpeercert(True) or b""
            return bool(tls.session_reused)


@pytest.mark.parametrize("port", ["submission", "submission over TLS"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_mail_program_resumes_its_tls_session(serve: Serve, version: str, port: str) -> None:
    server = serve(certificates=(HOST, "a.example"))
    for name in (HOST, "a.example"):
        program = Resuming(server, version, port)
        assert [program.resumes(name) for _ in range(3)] == [False, True, True]
        assert program.certificate == certificate_in_der(name)


def test_other_servers_get_no_ticket(serve: Serve) -> None:
    program = Resuming(serve(), port="smtp")
    assert [program.resumes() for _ in range(2)] == [False, False]


def test_a_ticket_of_before_the_keys_were_renewed_is_worth_nothing(serve: Serve) -> None:
    clock = RunningClock()
    server = serve(clock=clock)
    program = Resuming(server)
    assert [program.resumes() for _ in range(2)] == [False, True]
    before = server.daemon._context.resuming_tls_context
    clock.advance(12 * 3600 + 1)
    server.settle()
    wait_for(lambda: server.daemon._context.resuming_tls_context is not before, "new keys")
    assert [program.resumes() for _ in range(2)] == [False, True]


def test_a_resumed_session_is_never_one_with_an_old_certificate(serve: Serve) -> None:
    server = serve()
    program = Resuming(server)
    assert [program.resumes() for _ in range(2)] == [False, True]
    write_certificate(server.config_dir / "certs" / HOST, HOST, "new.example")
    reload(server)
    assert not program.resumes()
    assert program.certificate == certificate_in_der(HOST, "new.example")


def test_without_its_files_a_certificate_stays_and_tickets_end(serve: Serve) -> None:
    server = serve()
    (server.config_dir / "certs" / HOST / "privkey.pem").write_text("none")
    server.daemon._certificates.renew_ticket_keys()
    reload(server)
    program = Resuming(server)
    assert [program.resumes() for _ in range(2)] == [False, False]
    assert program.certificate == certificate_in_der(HOST)


def certificate_in_der(*names: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate(*names)[0])


def test_a_wildcard_is_for_one_label(serve: Serve) -> None:
    server = serve()
    write_certificate(server.config_dir / "certs" / "wild", "*.wild.example")
    reload(server)
    wild = certificate("*.wild.example")[0]
    assert certificate_of(server, "mail.wild.example") == wild
    assert certificate_of(server, "a.mail.wild.example") == certificate(HOST)[0]


def test_the_certificate_is_verified_by_who_trusts_it(serve: Serve) -> None:
    server = serve()
    chain = server.config_dir / "certs" / HOST / "fullchain.pem"
    with server.connect("submission over TLS") as wire:
        wire.start_tls(trusting(chain), name=HOST)
        assert wire.reply().startswith("220 ")


def test_without_a_certificate_tls_and_logins_are_off(serve: Serve) -> None:
    server = serve(certificates=())
    assert "TLS is off, and nobody can log in" in server.log
    with server.connect() as wire:
        wire.reply()
        hello = wire.ask("EHLO client.example")
        assert "STARTTLS" not in hello and "AUTH" not in hello
        assert wire.ask("STARTTLS").startswith("454 4.7.0 ")
        assert wire.ask("AUTH PLAIN AGFuYUBoZXJlLmV4YW1wbGUAc2VjcmV0").startswith("538 ")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
    with server.connect("submission over TLS") as wire:
        assert wire.is_closed()


# --- the control socket ---


def ask(server: Server, *request: object) -> dict[str, object]:
    """Send a request as it is and return the answer."""
    return ask_raw(server, json.dumps(request).encode() + b"\r\n")


def ask_raw(server: Server, data: bytes) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(SECONDS)
        raw.connect(str(server.data_dir / "control"))
        raw.sendall(data)
        answer = b""
        while piece := raw.recv(4096):
            answer += piece
    return json.loads(answer)  # type: ignore[no-any-return]


def test_the_control_socket_is_for_its_owner_alone(serve: Serve) -> None:
    path = serve().data_dir / "control"
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_address_is_resolved(serve: Serve) -> None:
    aliases = "team: ana, eva@there.example via relay.example\nprogram: | cat -n\n"
    server = serve(aliases={"here.example": aliases})
    assert ask(server, "aliases-resolve", "team@here.example") == {
        "lines": ["ana@here.example", "eva@there.example via relay.example"]
    }
    assert ask(server, "aliases-resolve", "program@here.example") == {"lines": ["| cat -n"]}
    assert ask(server, "aliases-resolve", "eva@else.example") == {"lines": ["eva@else.example"]}
    assert ask(server, "aliases-resolve", "nobody@here.example") == {
        "error": "there is no user or alias nobody@here.example"
    }
    assert "error" in ask(server, "aliases-resolve", "a b@here.example")


def test_messages_are_attempted_again(serve: Serve) -> None:
    courier = FakeCourier()
    server = serve(remote=courier, aliases={"here.example": f"out: {EVE}\n"})
    ids = [send(server, "out@here.example") for _ in range(2)]
    server.wait_for_attempts(2)
    assert ask(server, "queue-retry", ids[0]) == {"lines": ["1 message will be attempted now"]}
    wait_for(lambda: len(courier.deliveries) == 3, "another attempt")
    assert ask(server, "queue-retry", "all") == {"lines": ["2 messages will be attempted now"]}
    wait_for(lambda: len(courier.deliveries) == 5, "two more attempts")


def test_a_message_is_removed(serve: Serve) -> None:
    server = serve(remote=FakeCourier(), aliases={"here.example": f"out: {EVE}\n"})
    id = send(server, "out@here.example")
    server.wait_for_attempts()
    assert ask(server, "queue-remove", id) == {"lines": [f"{id} is removed"]}
    assert server.queued() == []
    assert "error" in ask(server, "queue-remove", id)
    assert "error" in ask(server, "queue-retry", id)


def test_a_message_whose_file_is_gone_can_be_removed(serve: Serve) -> None:
    server = serve(remote=FakeCourier(), aliases={"here.example": f"out: {EVE}\n"})
    id = send(server, "out@here.example")
    server.wait_for_attempts()
    (name,) = server.queued("cur")
    (server.data_dir / "queue" / name).unlink()
    assert ask(server, "queue-remove", id) == {"lines": [f"{id} is removed"]}
    assert "error" in ask(server, "queue-remove", id)


@pytest.mark.parametrize(
    "data",
    [b"hello\r\n", b"[]\r\n", b"7\r\n", b'["queue-retry"]\r\n', b'["no-such", "x"]\r\n',
     b'["queue-retry", 7]\r\n', b'["queue-retry", null]\r\n', b'["queue-remove", []]\r\n',
     b'[["x"], "y"]\r\n', b'["aliases-resolve", ""]\r\n',
     b"\xff\xfe\r\n", b'["aliases-resolve", "\\ud800@here.example"]\r\n'],
)  # fmt: skip
def test_what_is_no_request_gets_an_error(serve: Serve, data: bytes) -> None:
    assert "error" in ask_raw(serve(), data)


def test_a_request_that_is_no_line_ends_that_connection_alone(serve: Serve) -> None:
    server = serve()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(SECONDS)
        raw.connect(str(server.data_dir / "control"))
        raw.sendall(b"x" * 100_000 + b"\n")
        with pytest.raises((ConnectionResetError, BrokenPipeError, AssertionError)):
            assert raw.recv(100)
    assert "lines" in ask(server, "queue-retry", "all")


def test_a_deep_data_dir_has_a_control_socket_as_well(serve: Serve, tmp_path: Path) -> None:
    data_dir = tmp_path.joinpath(*["a-directory-with-a-long-name"] * 6)
    server = serve(data_dir=data_dir)
    assert len(str(data_dir)) > 108
    lines = chasquid.ask_running_server(str(data_dir), "aliases-resolve", "ana@here.example")
    assert lines == ["ana@here.example"]
    server.stop()
    assert not (data_dir / "control").exists()


def test_a_control_socket_that_a_crash_left_is_no_server(serve: Serve) -> None:
    server = serve()
    server.stop()
    path = server.data_dir / "control"
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(str(path))
    assert chasquid.ask_running_server(str(server.data_dir), "queue-retry", "all") is None
    server.start()
    assert "lines" in ask(server, "queue-retry", "all")


def test_a_server_whose_control_socket_was_removed_still_stops(serve: Serve) -> None:
    server = serve()
    (server.data_dir / "control").unlink()
    id = send(server)
    server.stop()
    assert "stopped" in server.log
    assert id in server.mail_log


# --- several servers ---


def test_two_servers_in_one_process_send_mail_to_each_other(serve: Serve) -> None:
    there = serve(users={"there.example": {"eva": "secret"}}, hostname="mail.there.example")
    aliases = {"here.example": f"out: eva@there.example via 127.0.0.1:{there.port()}\n"}
    here = serve(aliases=aliases)
    send(here, "out@here.example")
    here.mail("ana")
    (message,) = there.mail("eva", "there.example")
    assert message.count(b"\nReceived: from ") == 2
    assert b"with ESMTPS id" in message


def test_a_second_server_on_the_same_data_dir_is_refused(serve: Serve) -> None:
    server = serve()
    with pytest.raises(chasquid.ConfigError, match="another server is using this data_dir"):
        server.make()
    assert rcpt(server, "ana@here.example").startswith("250 ")


def test_the_data_dir_is_free_again_after_the_end(serve: Serve) -> None:
    server = serve()
    server.stop()
    server.start()
    assert rcpt(server, "ana@here.example").startswith("250 ")


def test_the_data_dir_is_free_again_after_a_start_that_failed(tmp_path: Path) -> None:
    server = Server(tmp_path)
    name = "chasquid.conf"
    old = (server.config_dir / name).read_bytes()
    server.write(name, old + b'smarthost: "smart.example:587"\nsmarthost_user: "ana"\n')
    with pytest.raises(chasquid.ConfigError):
        server.make()
    server.write(name, old)
    with server:
        assert rcpt(server, "ana@here.example").startswith("250 ")


# --- start ---


def test_a_port_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"127.0.0.1:{other.getsockname()[1]}"
        server = Server(tmp_path, submission_address=place)
        with pytest.raises(chasquid.ConfigError) as caught:
            server.make()
    assert caught.value.path == str(server.config_dir / "chasquid.conf")
    expected = f"submission_address: cannot listen on {place}: Address already in use"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"smtp_address": "192.0.2.1:0"}, "smtp_address: cannot listen on 192.0.2.1:0"),
        (
            {"smtp_address": "no.such.host.invalid:0"},
            "smtp_address: no.such.host.invalid:0 is no address",
        ),
        (
            {
                "smtp_address": "systemd",
                "submission_address": "systemd",
                "submission_over_tls_address": "systemd",
            },
            "expected smtp_address or another address to listen on",
        ),
        ({"data_dir": "/dev/null/data"}, "/dev/null"),
        ({"log_path": "/dev/null/log"}, "/dev/null/log: the log cannot be opened"),
    ],
    ids=["not our address", "no address", "nowhere", "data_dir", "log"],
)
def test_what_keeps_a_server_from_starting_is_a_sentence(
    tmp_path: Path, settings: dict[str, str], text: str
) -> None:
    server = Server(tmp_path, **settings)
    with pytest.raises(chasquid.ConfigError) as caught:
        server.make()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_without_domains_starts_and_says_so(serve: Serve) -> None:
    server = serve(users={})
    assert "all mail for here is refused" in server.log
    assert rcpt(server, "ana@here.example").startswith("550 5.7.1 ")


def test_several_addresses_are_listened_on(serve: Serve) -> None:
    server = serve(smtp_address=["127.0.0.1:0", "127.0.0.1:0"])
    ports = [number for port, _, number in server.daemon.addresses if port.name == "smtp"]
    assert len(set(ports)) == 2
    for port in ports:
        with Wire.to("127.0.0.1", port) as wire:
            assert wire.reply().startswith("220 ")


def test_mail_for_here_goes_to_the_agent_where_one_is_named(serve: Serve, tmp_path: Path) -> None:
    server = serve(
        mail_delivery_agent_bin="/bin/sh",
        mail_delivery_agent_args=["-c", f'cat > "{tmp_path}/$0"', "%to_user%.got"],
    )
    send(server)
    server.mail("ana")
    assert b"Subject: x\r\n\r\n" in (tmp_path / "ana.got").read_bytes()


def test_mail_for_here_goes_by_lmtp_where_it_is_named(serve: Serve) -> None:
    script = f"""
        S: 220 dovecot
        C: LHLO {HOST}
        S: 250 dovecot
        C: MAIL FROM:<>
        S: 250 fine
        C: RCPT TO:<ana@here.example>
        S: 250 fine
        C: DATA
        S: 354 go on
        C.
        S: 250 2.0.0 in the box
        C: QUIT
        S: 221 bye
    """
    with Peer(script) as peer:
        server = serve(lmtp_address=f"127.0.0.1:{peer.port}")
        send(server)
        server.mail("ana")
    assert b"\r\nSubject: x\r\n" in peer.messages[0]


# --- the end ---


def test_a_server_stops_at_once_where_nothing_is_under_way(serve: Serve) -> None:
    server = serve()
    port = server.port()
    with greeted(server) as idle:
        server.daemon.stop()
        assert idle.reply().startswith("421 4.3.2 ")
        assert idle.is_closed()
    server.join()
    with pytest.raises(ConnectionRefusedError):
        Wire.to("127.0.0.1", port)


def test_a_message_under_way_is_let_in_before_the_end(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        server.daemon.stop()
        server.settle()
        assert wire.ask("Subject: x\r\n\r\n.").startswith("250 ")
        assert wire.reply().startswith("421 4.3.2 ")
        assert wire.is_closed()
    server.join()
    server.start()
    assert len(server.mail("ana")) == 1


def test_a_message_that_takes_too_long_does_not_hold_up_the_end(serve: Serve) -> None:
    clock = RunningClock()
    server = serve(clock=clock)
    with greeted(server) as wire:
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        server.daemon.stop()
        wait_for(lambda: "stopping" in server.log, "the server to stop")
        server.settle()
        assert server.is_running
        clock.advance(11)
        server.daemon.loop.post(lambda: None)
        assert wire.reply().startswith("421 4.3.2 ")
        wire.close()
        server.join()
    assert server.queued() == []


def test_what_is_not_delivered_is_kept_over_the_end(serve: Serve) -> None:
    courier = FakeCourier()
    server = serve(remote=courier, aliases={"here.example": f"out: {EVE}\n"})
    id = send(server, "out@here.example")
    server.wait_for_attempts()
    server.stop()
    assert [name.partition(",")[0] for name in server.queued()] == [f"cur/{id}"]
    server.start()
    assert "lines" in ask(server, "queue-retry", id)
    wait_for(lambda: len(courier.deliveries) == 2, "another attempt")


def test_a_server_can_be_stopped_before_it_runs(tmp_path: Path) -> None:
    server = Server(tmp_path)
    daemon = server.make()
    daemon.stop()
    daemon.run()
    assert "stopped" in server.log


def test_nothing_is_left_open_after_the_end(tmp_path: Path) -> None:
    def descriptors() -> int:
        gc.collect()  # a server's logs are open until it is forgotten
        return len(os.listdir("/dev/fd"))

    with Server(tmp_path / "first") as server:
        send(server)
        server.mail("ana")
    before = descriptors()
    for number in range(3):
        with Server(tmp_path / str(number)) as server:
            send(server)
            server.mail("ana")
    assert descriptors() == before


# --- systemd ---


def test_sockets_of_systemd_are_served_and_systemd_is_told(tmp_path: Path) -> None:
    server = Server(
        tmp_path, users=USERS, smtp_address="systemd", submission_address="systemd",
        submission_over_tls_address="systemd",
    )  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(SECONDS)
        notify = str(tmp_path / "notify")
        with started_by_systemd(
            server, "smtp", "submission", NOTIFY_SOCKET=notify
        ) as (process, (smtp, submission)):  # fmt: skip
            assert notices.recv(100) == b"READY=1"
            with Wire.to("127.0.0.1", smtp) as wire:
                assert wire.reply().startswith(f"220 {HOST} ")
                assert wire.ask("EHLO client.example").startswith("250-")
                assert wire.ask("MAIL FROM:<>").startswith("250 ")
            with Wire.to("127.0.0.1", submission) as wire:
                assert wire.reply().startswith(f"220 {HOST} ")
                assert wire.ask("EHLO client.example").startswith("250-")
                assert wire.ask("MAIL FROM:<>").startswith("530 ")
            process.terminate()
            assert notices.recv(100) == b"STOPPING=1"
            assert process.wait(SECONDS) == 0
            assert process.stdout is not None and process.stderr is not None
            assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_a_change_of_the_mode_alone_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "domains" / "here.example" / "aliases"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    file.chmod(0o000)
    before = chasquid.file_signature(str(tmp_path))
    assert chasquid.file_signature(str(tmp_path)) == before
    wait_for(lambda: file.chmod(0o644) or chasquid.file_signature(str(tmp_path)) != before, "it")
