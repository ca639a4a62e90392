# SPDX-License-Identifier: Apache-2.0
"""Rooms COMMANDS, SERVE: each command, what it prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import (
    HOST,
    MODULE,
    PROGRAM,
    SECONDS,
    CommandLine,
    Ended,
    FakeCourier,
    Peer,
    Serve,
    Server,
    Wire,
    run_command,
    trusting,
    wait_for,
)

import chasquid


def program(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the module as a program."""
    options = {"capture_output": True, "text": True, "timeout": SECONDS, **options}
    words = [*PROGRAM, *(str(argument) for argument in arguments)]
    return subprocess.run(words, **options)  # type: ignore[call-overload, no-any-return]


def has_wrong_usage(ended: Ended) -> bool:
    """Tell whether a command ended with its usage, and no traceback."""
    assert "Traceback" not in ended.err
    return ended.status == 2 and ended.out == "" and ended.err.startswith("usage: chasquid ")


# --- as a program ---


def test_without_a_command_and_a_configuration_it_says_how_to_begin(tmp_path: Path) -> None:
    words = [sys.executable, str(MODULE), "--config-dir", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0
    assert f"python3 {MODULE} try" in ended.stdout
    assert str(tmp_path) in ended.stdout
    assert ended.stderr == ""


def test_without_a_command_but_a_configuration_it_serves(tmp_path: Path) -> None:
    server = Server(tmp_path)
    words = [*PROGRAM, "--config-dir", str(server.config_dir)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        log = tmp_path / "server.log"
        line = "event=ready"
        wait_for(lambda: log.exists() and line in log.read_text(), "the server to listen")
        text = log.read_text().partition("event=listening port=smtp address=[127.0.0.1]:")[2]
        with Wire.to("127.0.0.1", int(text.split()[0])) as wire:
            assert wire.reply().startswith(f"220 {HOST} ")
            assert wire.ask("QUIT").startswith("221 ")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "event=reloaded" in log.read_text(), "the files to be read again")
        process.terminate()
        assert process.communicate(timeout=SECONDS) == (b"", b"")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "arguments",
    [
        ["user-add"],
        ["queue"],
        ["queue", "burn"],
        ["--config-dir"],
        ["version", "now"],
        ["try", "--twice"],
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(
    commands: CommandLine, arguments: Sequence[str]
) -> None:
    assert has_wrong_usage(commands.run(*arguments))


def test_wrong_usage_of_the_program_ends_with_2_and_no_traceback() -> None:
    ended = program("no-such-command")
    assert has_wrong_usage(Ended(ended.returncode, ended.stdout, ended.stderr))


@pytest.mark.parametrize("action", ["show", "retry", "remove"])
def test_an_id_that_is_missing_is_wrong_usage(commands: CommandLine, action: str) -> None:
    ended = commands.run("queue", action)
    assert ended.status == 2
    assert "id" in ended.err


def test_help_names_every_command() -> None:
    ended = program("--help")
    assert ended.returncode == 0
    for name in ("serve", "try", "user-add", "user-remove", "authenticate", "check-userdb",
                 "aliases-resolve", "print-config", "queue", "version"):  # fmt: skip
        assert f"\n    {name} " in ended.stdout


def test_version_names_what_is_bundled(commands: CommandLine) -> None:
    ended = commands.run("version")
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert lines[0] == f"chasquid {chasquid.__version__}"
    assert [line.split()[0] for line in lines[1:]] == [
        "Python", "dnspython", "dkimpy", "pyspf", "idna", "precis-i18n"
    ]  # fmt: skip


def test_an_error_is_one_line_and_the_status_1(tmp_path: Path) -> None:
    ended = program("--config-dir", tmp_path / "none", "print-config")
    path = tmp_path / "none" / "chasquid.conf"
    assert ended.returncode == 1
    assert ended.stderr == f"chasquid: {path}: it cannot be read: No such file or directory\n"


def test_output_that_nobody_reads_is_no_traceback(tmp_path: Path) -> None:
    server = Server(tmp_path)
    words = [*PROGRAM, "--config-dir", str(server.config_dir), "print-config"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in process.communicate(timeout=SECONDS)[1]


# --- what keeps every command from working ---


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ('hostname: "x"\nno_such_key: 1\n', 2, "expected a known key, found 'no_such_key'"),
        ('hostnme: "x"\n', 1, "found 'hostnme'; is it 'hostname'?"),
        ("hostname: x\n", 1, "hostname: expected a string in quotes"),
        ('\n\nmax_data_size_mb: "50"\n', 3, "max_data_size_mb: expected a whole number"),
        ('hostname: "x"\nhostname: "y"\n', 2, "hostname: expected once, found again"),
        ('hostname: "x', 1, "a string that is not closed"),
        ('hostname\n"x"', 2, "expected ':' after 'hostname'"),
        ('give_up_send_after: "soon"', 1, "expected a duration such as"),
        ("\xff", 1, "expected a key or a value"),
    ],
)
def test_a_mistake_in_the_configuration_is_told_with_file_and_line(
    commands: CommandLine, text: str, line: int, expected: str
) -> None:
    path = commands.write("chasquid.conf", text)
    for command in (["serve"], ["print-config"], ["queue", "list"], ["check-userdb"]):
        error = commands.fails(*command)
        assert error.startswith(f"{path}:{line}: ")
        assert expected in error


def test_an_override_that_is_wrong_is_told(commands: CommandLine) -> None:
    error = commands.fails("--config-overrides", "no_such_key: 1", "print-config")
    assert error.startswith("--config-overrides:1: ")


def test_a_certificate_that_does_not_fit_is_told(commands: CommandLine) -> None:
    path = commands.write("certs/x/fullchain.pem", "no certificate")
    commands.write("certs/x/privkey.pem", "no key")
    commands.configure(smtp_address="127.0.0.1:0", log_path=str(commands.config_dir / "server.log"))
    ended = commands.run("check")
    assert ended.status == 1
    assert ended.out.startswith(f"{path}: expected a certificate chain")


def test_check_tells_of_all_mistakes_at_once(commands: CommandLine, tmp_path: Path) -> None:
    config = commands.write("chasquid.conf", 'hostname: "x"\nmax_data: 1\nmax_queue_items: "7"\n')
    users = commands.write("domains/bad.example/users", "hello")
    commands.write("domains/here.example/aliases", "sales: nobody\np: | /no/such/thing\n")
    ended = commands.run("--config-overrides", f'data_dir: "{tmp_path}/d"', "check")
    assert ended.status == 1
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"{config}:2: expected a known key, found 'max_data'")
    assert lines[1].startswith(f"{config}:3: max_queue_items: expected ")
    assert lines[2].startswith(f"{users}:1: ")
    assert lines[3].startswith("sales@here.example leads to nobody")
    assert "/no/such/thing" in lines[4]
    assert [line for line in lines if line.startswith("warning: the hostname x has no domain")]


def test_check_goes_on_after_each_mistake(commands: CommandLine) -> None:
    config = commands.write(
        "chasquid.conf", 'hostname "x"\nsmarthost_user: "u"\nsmarthost_password_file: "none"\n'
    )
    (commands.config_dir / "domains" / "no..domain").mkdir()
    users = commands.write("domains/here.example/users", "hello\nusers: 1\n")
    aliases = commands.write("domains/here.example/aliases", "a b\nfine: ana\nc: |\n")
    key = commands.write("domains/here.example/dkim:a.pem", "no key")
    chain = commands.write("certs/x/fullchain.pem", "no certificate")
    commands.write("certs/x/privkey.pem", "no key")
    hook = commands.write("hooks/post-data", "nobody may run it")
    ended = commands.run("check")
    assert ended.status == 1
    wrong = [line for line in ended.out.splitlines() if not line.startswith("warning: ")]
    expected = [
        f"{config}:1: expected ':'", f"{commands.config_dir}/none: it cannot be read",
        f"{commands.config_dir}/domains/no..domain: expected a domain name", f"{users}:2: expected",
        f"{aliases}:1: expected", f"{aliases}:3: expected a program", f"{key}: expected",
        f"{chain}: expected",
    ]  # fmt: skip
    assert [line.startswith(begin) for line, begin in zip(wrong, expected, strict=True)] == (
        [True] * len(expected)
    ), wrong
    assert f"warning: {hook} is left out" in ended.out


def test_a_delivery_agent_may_be_in_path(
    commands: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = commands.write("bin/agent", "#!/bin/sh\n")
    commands.configure(mail_delivery_agent_bin="agent")
    assert "mail_delivery_agent_bin: agent is not there" in commands.run("check").out
    agent.chmod(0o755)
    monkeypatch.setenv("PATH", str(agent.parent))
    assert "mail_delivery_agent_bin" not in commands.run("check").out


def test_check_says_that_all_is_well(commands: CommandLine) -> None:
    ended = commands.run("check")
    assert ended.status == 0
    assert "can be used; it serves here.example." in ended.out
    commands.configure(mail_delivery_agent_bin="/no/agent", monitoring_address=":1099")
    ended = commands.run("check")
    assert ended.status == 0
    assert "warning: mail_delivery_agent_bin: /no/agent is not there" in ended.out
    assert "warning: monitoring_address: :1099 can be seen" in ended.out


@pytest.mark.parametrize(
    "words",
    [
        ["-C={}", "print-config"], ["-C", "{}", "print-config"], ["print-config", "-C={}"],
        ["--config_dir={}", "print-config"], ["print-config", "--config_dir", "{}"],
        ["-config_dir={}", "print-config"], ["-config_dir", "{}", "-v", "print-config"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_may_be_spelt_as_in_go_and_stand_anywhere(
    commands: CommandLine, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    overrides = ["--config_overrides", "max_queue_items: 7"]
    words = [word.format(commands.config_dir) for word in words] + overrides
    assert chasquid.main(words) == 0
    assert "max_queue_items: 7\n" in capsys.readouterr().out


def test_options_of_a_command_may_stand_before_it(commands: CommandLine) -> None:
    words = ["-v=1", "--password=long enough", "user-add", "new@here.example"]
    assert commands.run(*words).status == 0
    assert commands.run("authenticate", "new@here.example", "--password", "long enough").status == 0


def test_only_what_was_changed_is_shown(commands: CommandLine) -> None:
    ended = commands.run("print-config", "--changed")
    keys = {line.partition(":")[0] for line in ended.out.splitlines()}
    assert keys == {"hostname", "data_dir", "mail_log_path"}


@pytest.mark.parametrize("words", [["--version"], ["-version"], ["version"]])
def test_the_version_is_shown(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert chasquid.main(words) == 0
    assert capsys.readouterr().out.startswith(f"chasquid {chasquid.__version__}\n")


def test_help_and_mistakes_in_words_are_answered_with_what_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, status, out, err in (
        (["help"], 0, "(default: /etc/chasquid)", ""),
        (["help", "user-add"], 0, "usage: chasquid user-add", ""),
        (["user-ad", "x@y"], 2, "", "there is no command 'user-ad'; is it 'user-add'?"),
        (["user-add", "x@y", "--nonsense"], 2, "", "usage: chasquid user-add"),
        (["queue", "list", "--jsn"], 2, "", "usage: chasquid queue"),
        (["queue", "show"], 2, "", "usage: chasquid queue"),
        (["help", "user-ad"], 2, "", "there is no command 'user-ad'; is it 'user-add'?"),
        ([""], 2, "", "there is no command ''; see --help"),
        (["--config-dri", "x", "serve"], 2, "", "no option '--config-dri'; is it '--config-dir'?"),
        (["print-config", "-C"], 2, "", "expected a value after -C"),
    ):
        with pytest.raises(SystemExit) as ended:
            chasquid.main(words)
        said = capsys.readouterr()
        assert (ended.value.code, out in said.out, err in said.err) == (status, True, True), said


def test_a_short_password_is_warned_of_and_an_empty_one_explained(commands: CommandLine) -> None:
    ended = commands.run("user-add", "x@here.example", "--password", "a")
    assert "fewer than 8 characters" in ended.err
    said = commands.fails("authenticate", "ana@here.example", "--password", "")
    assert said.startswith("the password is empty; nobody may log in so")
    said = commands.fails("user-add", "y@here.example", "--receive-only", "--password", "x")
    assert said.startswith("expected --receive-only or --password, not both")


def test_a_running_server_takes_over_what_a_command_writes(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    command = ["--config-dir", str(server.config_dir)]
    assert (
        chasquid.main([*command, "user-add", "new@here.example", "--password", "long enough"]) == 0
    )
    assert capsys.readouterr().out.endswith("the running server has taken it over\n")
    with server.connect() as wire:
        assert wire.reply().startswith("220 ")
        assert wire.ask("EHLO client.example").startswith("250-")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
        assert wire.ask("RCPT TO:<new@here.example>").startswith("250 ")
    path = server.write("domains/here.example/aliases", b"no colon\n")
    assert chasquid.main([*command, "user-remove", "new@here.example"]) == 0
    said = capsys.readouterr()
    assert f"chasquid: not in force: {path}:1: " in said.err
    path.unlink()
    path = server.write("domains/xn--bcher-kva.example/aliases", b"no colon\n")
    new = [*command, "user-add", "ana@bücher.example", "--password", "long enough"]
    assert chasquid.main(new) == 0
    said = capsys.readouterr()
    assert f"chasquid: not in force: {path}:1: " in said.err
    path.unlink()
    assert chasquid.main([*command, "dkim-keygen", "here.example", "sel", "--algo", "ed25519"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("sel._domainkey.here.example.\tIN TXT\t")
    assert said.out.count("\n") == 1
    assert said.err.endswith("the running server has taken it over\n")
    assert "sel" in [key.selector for key in server.daemon._signer.keys["here.example"]]


def test_a_key_for_a_domain_that_is_not_served_needs_a_file(
    commands: CommandLine, tmp_path: Path
) -> None:
    said = commands.fails("dkim-keygen", "new.example", "sel")
    assert said.startswith("new.example is not served here: ")
    assert not (commands.config_dir / "domains" / "new.example").exists()
    path = tmp_path / "key.pem"
    words = ["dkim-keygen", "new.example", "sel", str(path), "--algo", "ed25519"]
    assert chasquid.main(["--config-dir", str(tmp_path / "nowhere"), *words]) == 0
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("users", "users: { key: 7 }"), ("users", "hello"), ("aliases", "no colon\n")],
)
def test_a_mistake_in_a_domain_is_told_with_file_and_line(
    commands: CommandLine, name: str, text: str
) -> None:
    path = commands.write(f"domains/here.example/{name}", text)
    assert commands.fails("check-userdb").startswith(f"{path}:1: ")
    ended = commands.run("aliases-resolve", "ana@here.example")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.splitlines()[-1].startswith(f"chasquid: {path}:1: ")
    ended = commands.run("check")
    assert (ended.status, ended.err) == (1, "")
    assert ended.out.startswith(f"{path}:1: ")


def test_a_mistake_in_a_domain_hides_no_other_domain(commands: CommandLine) -> None:
    users = commands.write("domains/bad.example/users", "users: 1\nusers: 2\n")
    (commands.config_dir / "domains" / "no..domain").mkdir()
    ended = commands.run("check-userdb")
    assert ended.status == 1
    assert "here.example: 1 user" in ended.out
    assert f"{users}:1: " in ended.err and f"{users}:2: " in ended.err
    ended = commands.run("check-userdb", "here.example")
    assert (ended.status, ended.err) == (0, "")
    assert commands.run("user-add", "b@here.example", "--password", "long enough").status == 0


# --- users ---


def test_a_user_is_added_with_a_password_that_works(commands: CommandLine) -> None:
    ended = commands.run("user-add", "Ben@Here.Example", "--password", "geheim")
    told = "no server is running; it will be in force at its start\n"
    assert ended[:2] == (0, f"ben@here.example is added\n{told}")
    assert set(commands.users()) == {"ana", "ben"}
    assert isinstance(commands.users()["ben"], chasquid.Scrypt)
    assert commands.run("authenticate", "ben@here.example", data=b"geheim\n") == (
        0, "ben@here.example may log in with this password\n", ""
    )  # fmt: skip
    error = commands.fails("authenticate", "ben@here.example", "--password", "Geheim")
    assert error == "ben@here.example may not log in with this password"


def test_the_password_may_come_from_standard_input(tmp_path: Path) -> None:
    server = Server(tmp_path)
    words = ("--config-dir", server.config_dir)
    ended = program(*words, "user-add", "ben@here.example", input="sehr geheim\n")
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = program(*words, "authenticate", "ben@here.example", input="sehr geheim\n")
    assert ended.returncode == 0
    ended = program(*words, "authenticate", "ben@here.example", input="\n")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)


def test_a_password_is_changed(commands: CommandLine) -> None:
    ended = commands.run("user-add", "ana@here.example", "--password", "new")
    told = "no server is running; it will be in force at its start\n"
    assert ended[:2] == (0, f"ana@here.example has a new password\n{told}")
    assert chasquid.check_password(commands.users()["ana"], b"new")


def test_a_user_who_only_receives_never_logs_in(commands: CommandLine) -> None:
    assert commands.run("user-add", "box@here.example", "--receive-only").status == 0
    assert commands.users()["box"] == chasquid.Denied()
    commands.fails("authenticate", "box@here.example", "--password", "x")


def test_the_first_user_of_a_domain_makes_the_domain(commands: CommandLine) -> None:
    assert commands.run("user-add", "ida@bücher.example", "--password", "x").status == 0
    assert list(commands.users("bücher.example")) == ["ida"]
    path = commands.config_dir / "domains" / "bücher.example" / "users"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_domain_directory_in_a_labels_is_used(commands: CommandLine) -> None:
    commands.write("domains/xn--bcher-kva.example/aliases", "")
    assert commands.run("user-add", "ida@bücher.example", "--password", "x").status == 0
    assert list(commands.users("xn--bcher-kva.example")) == ["ida"]


@pytest.mark.parametrize(
    "name", ["ida", "ida@", "@here.example", "i da@here.example", "ida@a..b", "ida@[/x]",
             "ida@[/../../../x", "", "ida@../x", "\udcff@here.example"]
)  # fmt: skip
def test_what_is_no_address_is_no_user(commands: CommandLine, name: str) -> None:
    before = sorted((commands.config_dir / "domains").rglob("*"))
    commands.fails("user-add", name, "--password", "x")
    assert sorted((commands.config_dir / "domains").rglob("*")) == before


def test_an_empty_password_is_refused(commands: CommandLine) -> None:
    assert "empty" in commands.fails("user-add", "ben@here.example", "--password", "")
    assert "ben" not in commands.users()


def test_a_password_that_is_no_utf8_is_no_traceback(commands: CommandLine) -> None:
    ended = commands.run("user-add", "ben@here.example", "--password", "\udcff")
    assert ended.status in (0, 1)


def test_a_user_is_removed(commands: CommandLine) -> None:
    assert commands.run("user-remove", "ANA@here.example").status == 0
    assert commands.users() == {}
    error = commands.fails("user-remove", "ana@here.example")
    assert error.endswith("users: there is no user 'ana'")


def test_a_users_file_that_cannot_be_written_is_told(commands: CommandLine) -> None:
    (commands.config_dir / "domains" / "new.example").write_text("a file")
    error = commands.fails("user-add", "ida@new.example", "--password", "x")
    assert "new.example" in error


def test_users_are_counted(commands: CommandLine) -> None:
    commands.write("domains/here.example/aliases", "team: ana\nall: team\n")
    commands.write("domains/there.example/users", "")
    ended = commands.run("check-userdb")
    assert ended == (
        0,
        "here.example: 1 user, 2 names in aliases, 0 DKIM keys\n"
        "there.example: 0 users, 0 names in aliases, 0 DKIM keys\n",
        "",
    )
    assert commands.run("check-userdb", "HERE.example").out.startswith("here.example: 1 user")
    assert "no domain" in commands.fails("check-userdb", "else.example")


def test_aliases_that_lose_mail_end_the_check_with_1(commands: CommandLine) -> None:
    commands.write("domains/here.example/aliases", "sales: anna\nteam: ana\n")
    ended = commands.run("check-userdb")
    assert (ended.status, ended.err) == (1, "")
    assert ended.out == (
        "here.example: 1 user, 2 names in aliases, 0 DKIM keys\n"
        "  sales@here.example leads to nobody: there is no user or alias anna@here.example\n"
    )


def test_a_user_behind_an_alias_is_told_and_no_mistake(commands: CommandLine) -> None:
    commands.write("domains/here.example/aliases", "ana: ana@far.example\n")
    ended = commands.run("check-userdb")
    assert (ended.status, ended.err) == (0, "")
    assert "  ana@here.example: an alias hides this user" in ended.out


@pytest.mark.parametrize("other", ["dovecot", "hook"])
def test_whom_dovecot_or_a_hook_may_know_is_not_called_unknown(
    commands: CommandLine, other: str
) -> None:
    commands.write("domains/here.example/aliases", "sales: anna\n")
    if other == "dovecot":
        text = (commands.config_dir / "chasquid.conf").read_text()
        commands.write("chasquid.conf", f"{text}dovecot_auth: true\n")
    else:
        commands.write("hooks/alias-resolve", "#!/bin/sh\n").chmod(0o755)
    ended = commands.run("check-userdb")
    assert (ended.status, ended.out.count("\n")) == (0, 1)
    assert "are not reported: Dovecot or a hook may know them" in ended.err
    commands.write("domains/here.example/aliases", "sales: | /no/such\n")
    assert commands.run("check-userdb").status == 1


@pytest.mark.parametrize("name", ["a..b", "a b", "-", "\udcff", "xn--0"])
def test_a_domain_that_is_none_is_told(commands: CommandLine, name: str) -> None:
    commands.fails("check-userdb", name)


# --- configuration ---


def test_the_configuration_is_printed_as_it_can_be_read(commands: CommandLine) -> None:
    commands.configure(
        smtp_address=["127.0.0.1:25", "systemd"],
        give_up_send_after="400h30m0.25s",
        reload_every="1500ms",
        suffix_separators="+-",
        mail_delivery_agent_bin="/bin/agent",
        mail_delivery_agent_args=["-f", '%from% "quoted" \\ žofie\n'],
        max_queue_items=7,
        dns_server=["192.0.2.1", "[2001:db8::1]:53"],
    )
    before = chasquid.load_config(str(commands.config_dir))
    ended = commands.run("print-config")
    assert ended.status == 0
    commands.write("chasquid.conf", ended.out)
    assert chasquid.load_config(str(commands.config_dir)) == before
    assert commands.run("print-config").out == ended.out


def test_overrides_replace_what_the_file_says(commands: CommandLine) -> None:
    commands.configure(smtp_address=["127.0.0.1:25", "127.0.0.1:26"])
    override = 'smtp_address: "127.0.0.1:27" max_queue_items: 3'
    out = commands.run("--config-overrides", override, "print-config").out
    assert [line for line in out.splitlines() if line.startswith("smtp_address")] == [
        'smtp_address: "127.0.0.1:27"'
    ]
    assert "max_queue_items: 3\n" in out


# --- aliases ---


def test_aliases_are_resolved_from_the_files_without_a_server(commands: CommandLine) -> None:
    commands.write(
        "domains/here.example/aliases",
        "team: ana, eva@there.example via a.example/b.example\nrun: | cat -n\nround: round2\n"
        "round2: round\n",
    )
    ended = commands.run("aliases-resolve", "TEAM+x@here.example")
    assert ended.status == 0
    assert ended.out == "ana@here.example\neva@there.example via a.example/b.example\n"
    assert commands.run("aliases-resolve", "run@here.example").out == "| cat -n\n"
    assert commands.run("aliases-resolve", "eva@else.example").out == "eva@else.example\n"
    for name, text in (("no@here.example", "no user"), ("round@here.example", "deeper than")):
        ended = commands.run("aliases-resolve", name)
        assert (ended.status, ended.out) == (1, "")
        assert text in ended.err.splitlines()[-1]


@pytest.mark.parametrize("running", [True, False])
def test_an_alias_of_nobody_is_resolved_with_the_names_it_leads_to(
    serve: Callable[..., Server], capsys: pytest.CaptureFixture[str], running: bool
) -> None:
    server = serve(aliases={"here.example": "sales: anna, hugo\n"})
    if not running:
        server.stop()
    arguments = ["--config-dir", str(server.config_dir), "aliases-resolve", "sales@here.example"]
    assert chasquid.main(arguments) == 1
    error = capsys.readouterr().err
    names = "anna@here.example, hugo@here.example"
    text = f"leads to nobody: there is no user or alias {names}"
    assert f"the alias sales@here.example {text}" in error


@pytest.mark.parametrize("name", ["a b@here.example", "ana@", "", "<ana@x>", "\udcff@here.example"])
def test_what_is_no_address_is_not_resolved(commands: CommandLine, name: str) -> None:
    ended = commands.run("aliases-resolve", name)
    assert (ended.status, ended.out) == (1, "")
    assert "Traceback" not in ended.err


def test_aliases_are_resolved_by_the_server_that_runs(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(aliases={"here.example": "team: ana\n"})
    server.write("domains/here.example/aliases", b"team: ben\n")
    command = ["--config-dir", str(server.config_dir), "aliases-resolve"]
    assert chasquid.main([*command, "team@here.example"]) == 0
    assert capsys.readouterr() == ("ben@here.example\n", "")  # read again before it answers
    assert chasquid.main([*command, "nobody@here.example"]) == 1
    assert capsys.readouterr().err == ("chasquid: there is no user or alias nobody@here.example\n")


# --- the queue ---


class Waiting:
    """A server with messages that wait, and commands on it."""

    def __init__(self, server: Server, courier: FakeCourier, capsys: pytest.CaptureFixture[str]):
        self.server = server
        self.courier = courier
        self._capsys = capsys

    def send(self, subject: str = "hello") -> str:
        """Leave a message in the queue; return its id."""
        before = self.server.mail_log.count("event=next-attempt ")
        with self.server.connect() as wire:
            wire.reply()
            wire.ask("EHLO client.example")
            wire.ask("MAIL FROM:<eva@there.example>")
            assert wire.ask("RCPT TO:<out@here.example>").startswith("250 ")
            wire.ask("DATA")
            id = wire.ask(f"Subject: {subject}\r\n\r\nbody\r\n.").split()[-1]
        self.server.wait_for_attempts(before + 1)
        return id

    def run(self, *arguments: str) -> Ended:
        return run_command(self._capsys, self.server.config_dir, "queue", *arguments)


@pytest.fixture
def waiting(serve: Serve, capsys: pytest.CaptureFixture[str]) -> Waiting:
    courier = FakeCourier()
    aliases = {"here.example": "out: ida@far.example\n"}
    server = serve(remote=courier, aliases=aliases, random=lambda: 0.5)  # pauses without chance
    return Waiting(server, courier, capsys)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_the_queue_is_listed_and_shown(waiting: Waiting, running: bool) -> None:
    id = waiting.send("žofie")
    if not running:
        waiting.server.stop()
    ended = waiting.run("list")
    assert (ended.status, ended.err) == (0, "")
    first, second, last = ended.out.splitlines()
    assert first.startswith(f"{id}  ")
    assert "from <eva@there.example>, 1 attempt, next attempt in 1m" in first
    assert second == "    ida@far.example  deferred: not today"
    assert last == "1 message"
    ended = waiting.run("show", id)
    assert ended.status == 0
    assert "from      <eva@there.example>\n" in ended.out
    assert "to        ida@far.example (for out@here.example)\n" in ended.out
    assert "\nReceived: from client.example" in ended.out
    assert ended.out.endswith("\nSubject: žofie\n")
    assert "body" not in ended.out


def test_a_running_server_retries_and_removes(waiting: Waiting) -> None:
    first, second = waiting.send(), waiting.send()
    assert waiting.run("retry", first) == (0, "1 message will be attempted now\n", "")
    wait_for(lambda: len(waiting.courier.deliveries) == 3, "another attempt")
    assert waiting.run("retry", "all").out == "2 messages will be attempted now\n"
    wait_for(lambda: len(waiting.courier.deliveries) == 5, "more attempts")
    assert waiting.run("remove", first) == (0, f"{first} is removed\n", "")
    assert waiting.run("list").out.endswith("\n1 message\n")
    assert waiting.run("remove", second).status == 0
    assert waiting.run("list").out == "0 messages\n"
    assert waiting.server.queued() == []


def test_a_stopped_server_is_retried_and_removed_from_by_its_files(waiting: Waiting) -> None:
    first, second = waiting.send(), waiting.send()
    waiting.server.stop()
    assert waiting.run("retry", first) == (0, "done; no server is running\n", "")
    states = {line.split()[0]: line for line in waiting.run("list").out.splitlines()}
    assert states[first].endswith("due now")
    assert "next attempt in" in states[second]
    assert waiting.run("retry", "all").status == 0
    assert waiting.run("list").out.count("due now") == 2
    assert waiting.run("remove", second) == (0, "done; no server is running\n", "")
    waiting.server.start()
    wait_for(lambda: len(waiting.courier.deliveries) == 3, "the attempt that was asked for")


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("action", ["show", "retry", "remove"])
@pytest.mark.parametrize("id", ["abc", "../../x", "*", "\udcff"])
def test_a_message_that_is_not_there_is_told(
    waiting: Waiting, running: bool, action: str, id: str
) -> None:
    if not running:
        waiting.server.stop()
    ended = waiting.run(action, id)
    assert (ended.status, ended.out) == (1, "")
    assert "there is no message " in ended.err
    assert ended.err.count("\n") == 1


def test_a_file_that_is_none_of_the_queues_is_told_and_the_rest_listed(waiting: Waiting) -> None:
    id = waiting.send()
    (waiting.server.data_dir / "queue" / "new" / "hello").write_text("hello")
    ended = waiting.run("list")
    assert ended.status == 0
    assert ended.out.startswith(id)
    assert "hello: expected a name like ID,S=SIZE" in ended.err
    (waiting.server.data_dir / "queue" / "new" / "hello").unlink()


def test_a_file_of_a_newer_version_is_told_and_the_rest_listed(waiting: Waiting) -> None:
    id = waiting.send()
    path = waiting.server.data_dir / "queue" / "new" / "abc,S=0"
    path.write_text('{"v": 2}\n')
    ended = waiting.run("list")
    assert ended.status == 0
    assert ended.out.startswith(id)
    assert f"{path}: it is written in version 2 of the format" in ended.err
    path.unlink()


def test_a_queue_that_does_not_exist_is_empty(commands: CommandLine) -> None:
    assert commands.run("queue", "list") == (0, "0 messages\n", "")
    assert not commands.data_dir.exists()


def test_a_queue_that_cannot_be_read_is_told(commands: CommandLine) -> None:
    (commands.data_dir / "queue").mkdir(parents=True)
    (commands.data_dir / "queue" / "new").write_text("")
    for arguments in (["list"], ["show", "abc"], ["retry", "all"], ["remove", "abc"]):
        commands.fails("queue", *arguments)


@pytest.mark.parametrize(
    "answer", ["* close", "S: hello", "S: 7", "S: []", 'S: {"lines": 7}', "S= half\n* close"]
)
def test_an_answer_that_is_none_is_told(commands: CommandLine, tmp_path: Path, answer: str) -> None:
    commands.data_dir.mkdir()
    with Peer(f"C: …\n{answer}", path=str(commands.data_dir / "control")):
        commands.fails("queue", "retry", "all")


def test_a_queue_that_is_locked_is_not_touched(commands: CommandLine) -> None:
    lock = chasquid.DataDirectory(str(commands.data_dir))
    lock.take()
    try:
        assert "another server is using" in commands.fails("queue", "retry", "all")
    finally:
        lock.release()


# --- try ---


def test_try_once_sends_a_message_into_a_maildir(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "try"
    for _ in range(2):  # the second time it is all there
        ended = program("try", "--once", "--dir", directory)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "sent by submission (TLSv1.3 " in ended.stdout
        path = ended.stdout.partition("\nstored as ")[2].partition(":\n")[0]
        assert Path(path).is_file()
        assert Path(path).read_text() in ended.stdout
    assert len(list(directory.glob("data/mail/try.test/you/new/*"))) == 2
    for name in ("password", "certs/localhost/privkey.pem", "domains/try.test/users"):
        assert (directory / name).stat().st_mode & 0o077 == 0


def test_try_shows_what_comes_in(tmp_path: Path) -> None:
    words = [*PROGRAM, "try", "--dir", str(tmp_path / "try")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while not lines[-1].startswith("Each delivery is shown below"):
            assert lines[-1], process.communicate()
            lines.append(process.stdout.readline())
        port = next(line.split()[1] for line in lines if line.startswith("  smtp "))
        with Wire.to("127.0.0.1", int(port.rpartition(":")[2])) as wire:
            wire.reply()
            wire.ask("EHLO client.example")
            wire.ask("MAIL FROM:<eva@there.example>")
            assert wire.ask("RCPT TO:<anybody@try.test>").startswith("250 ")
            wire.ask("DATA")
            assert wire.ask("Subject: x\r\n\r\n.").startswith("250 ")
        assert process.stdout.readline() == "\n"
        shown = "sent: from eva@there.example to anybody@try.test: stored as "
        assert process.stdout.readline().startswith(shown)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_try_in_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = program("try", "--once", "--dir", tmp_path / "file" / "try")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "cannot be used" in ended.stderr


def test_the_queue_is_listed_for_programs_and_by_sender_and_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(tmp_path, remote=FakeCourier()) as server:
        with server.connect("submission over TLS") as wire:
            wire.start_tls(trusting())
            assert wire.reply().startswith("220 ")
            assert wire.ask("EHLO client.example").startswith("250-")
            assert wire.ask("AUTH PLAIN AGFuYUBoZXJlLmV4YW1wbGUAc2VjcmV0").startswith("235 ")
            for recipient in ("eva@there.example", "ida@far.example"):
                assert wire.ask("MAIL FROM:<ana@here.example>").startswith("250 ")
                assert wire.ask(f"RCPT TO:<{recipient}>").startswith("250 ")
                assert wire.ask("DATA").startswith("354 ")
                wire.send(b"Subject: x\r\n\r\nx\r\n.\r\n")
                assert wire.reply().startswith("250 ")
        server.wait_for_attempts(2)
    command = ["--config-dir", str(server.config_dir), "queue", "list", "--json"]

    def listed(*more: str) -> list[str]:
        assert chasquid.main([*command, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return sorted(entry["recipients"][0]["recipient"] for entry in found)

    assert listed() == ["eva@there.example", "ida@far.example"]
    assert listed("--domain", "far.example") == ["ida@far.example"]
    assert listed("--sender", "nobody@x.example") == []
    assert len(listed("--sender", "ana@here.example")) == 2


@pytest.mark.parametrize(
    "words",
    [
        "",
        "serve",
        "--config-dir DIR serve",
        "serve -C DIR",
        "-config_dir=DIR --config-overrides x:1 -v",
        "--config-dir A --config-dir= serve",
    ],
)
def test_a_plain_start_is_parsed_as_any_other(words: str) -> None:
    plain, full = chasquid._plain_serve(words.split()), chasquid._parse(words.split())
    assert plain is not None
    assert vars(plain).items() <= vars(full).items()


@pytest.mark.parametrize(
    "words",
    ["--help", "serve --help", "serve x", "srve", "try", "--version serve", "-C", "--unknown"],
)
def test_whatever_else_is_parsed_in_full(words: str) -> None:
    assert chasquid._plain_serve(words.split()) is None


# --- the server's daily check, which is a command of its own ---


def test_doctor_tells_the_server_what_it_finds(commands: CommandLine) -> None:
    commands.configure(dns_server="127.0.0.1:1", no_such_key="x")
    shutil.rmtree(commands.config_dir / "domains")
    config = chasquid.Config(str(commands.config_dir))
    files = chasquid.examined_by_doctor(config, "")[0]
    assert (files.check, files.level, files.domain) == ("files", chasquid.Level.MEND, "")
    assert isinstance(files.level, chasquid.Level)
    assert "chasquid.conf:" in files.text
    assert "no_such_key" in files.text


def test_a_doctor_that_fails_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(chasquid.ChasquidError, match=r"doctor says chasquid: .*cannot be read"):
        chasquid.examined_by_doctor(chasquid.Config(str(tmp_path)), "")
