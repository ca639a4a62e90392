# SPDX-License-Identifier: Apache-2.0
"""Room IMPORT: users, aliases and Maildirs of another server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import CommandLine

import chasquid

AT, ANA = "here.example", "ana@here.example"


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, capsys)


def imported(
    command: CommandLine, dry_run: bool = False, **texts: str
) -> tuple[dict[str, str], chasquid.ImportReport]:
    """Import files with these texts; return the aliases of here.example, and the report."""
    paths = {name: str(command.write(f"postfix/{name}", text)) for name, text in texts.items()}
    config = chasquid.load_config(str(command.config_dir))
    report = chasquid.import_postfix(config, chasquid.PostfixFiles(AT, **paths), dry_run)
    return aliases(command), report


def aliases(command: CommandLine, domain: str = AT) -> dict[str, str]:
    table = chasquid.load_aliases(str(command.config_dir / "domains" / domain), domain)
    return {name: ", ".join(map(chasquid.destination_text, right)) for name, right in table.items()}


# --- /etc/aliases ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("root: ana", {"root": ANA}),
        ("Team:\tana, eva@there.example,\n  ben", {"team": f"{ANA}, eva@there.example, ben@{AT}"}),
        ('"two words": ana', {}),
        ("info: ana@localhost, \\ben", {"info": f"{ANA}, ben@{AT}"}),
        ("trash: /dev/null", {"trash": "| /bin/true"}),
        ('tickets: "|/usr/bin/rt --queue mail"', {"tickets": "| /usr/bin/rt --queue mail"}),
        ('tickets: |"/usr/bin/rt -q"', {"tickets": "| /usr/bin/rt -q"}),
        ("tickets: |/usr/bin/rt", {"tickets": "| /usr/bin/rt"}),
        ('x: "|a > /tmp/x; b \\"c\\""', {"x": "| /bin/sh -c 'a > /tmp/x; b \"c\"'"}),
        ("list: ana, |/bin/log, |/bin/two", {
            "list": f"{ANA}, list-pipe@{AT}, list-pipe2@{AT}",
            "list-pipe": "| /bin/log", "list-pipe2": "| /bin/two",
        }),
        ("# comment: ana\n\n", {}),
        ("box: /var/mail/box", {}),
        ("both: ana, /var/mail/box", {"both": ANA}),
        ("odd: :fail: no such user", {}),
        ("no alias at all", {}),
        ("ben: ben", {}),
    ],
)  # fmt: skip
def test_aliases(command: CommandLine, line: str, expected: dict[str, str]) -> None:
    assert imported(command, aliases=line + "\n")[0] == expected


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("box: /var/mail/box", ":1: mail cannot go into the file /var/mail/box"),
        ("odd: :fail:", ":1: :fail: has no counterpart"),
        ("\n\nno alias", ":3: it is no alias"),
        ("list: :include:/nonexistent/list", "/nonexistent/list: it cannot be read"),
        ("tickets: |/usr/bin/rt", "runs as the server's user"),
        ("a b: ana", "a b"),
    ],
)
def test_what_has_no_counterpart_is_told_of(command: CommandLine, line: str, told: str) -> None:
    left = imported(command, aliases=line + "\n")[1].left
    assert any(told in text for text in left), left
    assert all(text.startswith(str(command.config_dir / "postfix/aliases:")) for text in left)


def test_a_file_that_is_included_is_read(command: CommandLine, tmp_path: Path) -> None:
    inner = tmp_path / "members"
    inner.write_text(f"ana, eva@there.example\n# nobody\n:include:{inner}\nben\n")
    found, report = imported(command, aliases=f"list: :include:{inner}\n")
    assert found["list"] == f"{ANA}, eva@there.example, ben@{AT}"
    assert "later changes there are not" in report.left[0]


def test_what_is_there_is_kept_and_a_second_run_changes_nothing(command: CommandLine) -> None:
    command.write("domains/here.example/aliases", "# mine\nroot: eva@there.example")
    text = "root: ana\npostmaster: root\n"
    found, report = imported(command, aliases=text)
    assert found == {"root": "eva@there.example", "postmaster": f"root@{AT}"}
    assert report.left == [f"root@{AT} is another alias here, and kept; not: {ANA}"]
    path = command.domain_dir / "aliases"
    before = path.read_text()
    assert before.startswith("# mine\nroot: eva@there.example\npostmaster: ")
    report = imported(command, aliases=text)[1]
    assert path.read_text() == before
    assert report.done == [f"postmaster@{AT}: kept as it was"]


def test_a_dry_run_writes_nothing(command: CommandLine) -> None:
    found, report = imported(command, True, aliases="root: ana\n", virtual="x@there.example ana\n")
    assert found == {}
    assert f"root@{AT}: {ANA}" in report.done
    assert not (command.config_dir / "domains/there.example").exists()


# --- maps and users ---


def test_a_virtual_alias_map(command: CommandLine) -> None:
    text = (
        "there.example  anything\n"
        "eva@there.example   ana\n"
        "@there.example\tben@here.example, ana\n"
        "@old.example @there.example\n"
        "ana@there.example ana@there.example\n"
        "plain  eva@there.example dora@dest.example\n"
        "/^all@/ ana\n"
    )
    found, report = imported(command, virtual=text)
    assert found == {"plain": "eva@there.example, dora@dest.example"}
    assert aliases(command, "there.example") == {"eva": ANA, "*": f"ben@{AT}, {ANA}"}
    assert aliases(command, "old.example") == {"*": "*@there.example"}
    assert "there.example: a domain of this server" in report.done
    assert any("patterns have no counterpart" in text for text in report.left)


def test_mailboxes_and_passwords(command: CommandLine) -> None:
    boxes = "ben@here.example here.example/ben/\neva@there.example  eva.mbox\n@there.example x/\n"
    hashes = (
        "ben:$6$salt$hash:19000:0:99999:7:::\nroot:*:1\nsync:!:1\nana:$y$x:1\n"
        "cyn@there.example:{PLAIN}secret::::::\nx:x:0:0::/:/bin/sh\n"
    )
    _, report = imported(command, mailboxes=boxes, passwords=hashes)
    here, there = command.users(), command.users("there.example")
    assert set(here) == {"ana", "ben"} and isinstance(here["ben"], chasquid.Denied)
    assert isinstance(here["ana"], chasquid.Scrypt)
    assert set(there) == {"eva", "cyn"}
    assert chasquid.check_password(there["cyn"], b"secret")
    told = "\n".join(report.left)
    assert "chasquid import maildir ben@here.example …/here.example/ben/" in told
    assert "eva.mbox is no Maildir" in told
    assert "chasquid user-add ben@here.example" in told
    assert "@there.example stands for a whole domain" in told
    assert f"ben@{AT}: a user, without a password" in report.done
    assert f"{ANA}: kept as it was" in report.done


# --- Maildirs ---


class Boxes:
    """A Maildir with a folder, to be imported for ana."""

    def __init__(self, command: CommandLine, top: Path) -> None:
        self.command = command
        self.source = top / "Maildir"
        self.target = command.data_dir / "mail" / AT / "ana"
        for folder in ("", ".Sent"):
            for place in ("cur", "new", "tmp"):
                (self.source / folder / place).mkdir(parents=True)
        self.put("cur/1.M1.old,S=4:2,RS", "one\n", 1000)
        self.put("new/2.M1.old", "two\n", 2000)
        self.put(".Sent/cur/3.M1.old:2,Sa", "three\n", 3000)
        self.put(".Sent/dovecot-keywords", "0 $Label1\n", 0)
        self.put("subscriptions", "Sent\n", 0)
        self.put("dovecot-uidlist", "3 V1 N3\n", 0)
        self.put("tmp/4.M1.old", "half", 0)

    def put(self, name: str, text: str, at: int) -> None:
        (self.source / name).write_text(text)
        os.utime(self.source / name, (at, at))

    def run(self) -> str:
        return self.command.run("import", "maildir", ANA, str(self.source)).out


@pytest.fixture
def boxes(command: CommandLine, tmp_path: Path) -> Boxes:
    return Boxes(command, tmp_path)


def test_a_maildir_is_copied_with_flags_times_and_folders(boxes: Boxes) -> None:
    assert boxes.run().startswith("3 messages copied, 0 were there already\n")
    for name, at in (
        ("cur/1.M1.old,S=4:2,RS", 1000), ("new/2.M1.old", 2000), (".Sent/cur/3.M1.old:2,Sa", 3000)
    ):  # fmt: skip
        copied = boxes.target / name
        assert copied.read_text() == (boxes.source / name).read_text()
        assert copied.stat().st_mtime == at
    assert (boxes.target / ".Sent/maildirfolder").exists()
    assert (boxes.target / ".Sent/dovecot-keywords").exists()
    assert (boxes.target / "subscriptions").exists()
    assert not (boxes.target / "dovecot-uidlist").exists()
    assert not list(boxes.target.rglob("tmp/*"))


def test_it_can_be_done_again_at_any_time(boxes: Boxes) -> None:
    boxes.run()
    (boxes.target / "new/2.M1.old").rename(boxes.target / "cur/2.M1.old:2,S")  # read meanwhile
    boxes.put("new/5.M1.old", "five\n", 5000)
    assert boxes.run().startswith("1 message copied, 3 were there already\n")
    assert len(list(boxes.target.rglob("*.M1.old*"))) == 4


def test_a_link_in_a_maildir_is_not_followed(boxes: Boxes) -> None:
    (boxes.source / "new/9.M1.old").symlink_to("/etc/passwd")
    os.mkfifo(boxes.source / "new/8.M1.old")
    assert boxes.run().startswith("3 messages copied")


def test_a_folder_that_is_no_maildir_plus_plus_is_told_of(boxes: Boxes) -> None:
    (boxes.source / "Archive/cur").mkdir(parents=True)
    assert f"{boxes.source}/Archive: a folder that is no Maildir++" in boxes.run()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["maildir", ANA], "expected: import maildir USER@DOMAIN DIR"),
        (["maildir", ANA, "/nonexistent"], "expected a Maildir"),
        (["maildir", f"nobody@{AT}", "/tmp"], "first: chasquid user-add"),
        (["postfix"], "expected --aliases"),
        (["postfix", "--aliases", "/nonexistent"], "cannot be read"),
    ],
)
def test_wrong_usage(command: CommandLine, words: list[str], told: str) -> None:
    assert told in command.fails("import", *words)


def test_mail_that_another_program_stores_is_left_to_it(boxes: Boxes) -> None:
    boxes.command.configure(lmtp_address="/run/dovecot/lmtp")
    assert "doveadm import" in boxes.command.fails("import", "maildir", ANA, str(boxes.source))


def test_the_command_shows_what_was_done_and_what_was_not(command: CommandLine) -> None:
    path = command.write("aliases", "root: ana\nbox: /var/mail/box\n")
    ended = command.run("import", "postfix", "--aliases", str(path))
    assert ended.status == 0
    assert ended.out.startswith(f"root@{AT}: {ANA}\n")
    assert "\nNot carried over, or changed:\n  " in ended.out
    assert "chasquid check-userdb" in ended.out
