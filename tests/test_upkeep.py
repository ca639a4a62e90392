# SPDX-License-Identifier: Apache-2.0
"""Room UPKEEP: versions side by side, backup and restore."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import HOST, CommandLine, FakeCourier, Serve, config_text

import chasquid

# --- versions ---


def archive(path: Path, version: str, script: str = "") -> str:
    """Write an archive that says it is of that version, and runs a script for any command."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"chasquid-{version}.dist-info/METADATA", f"Version: {version}\n")
        file.writestr("__main__.py", script)
    return str(path)


class FakeService:
    """Starts what the link points to; versions in `broken` do not come up."""

    def __init__(self, link: Path, broken: tuple[str, ...] = (), active: bool = True) -> None:
        self.link = link
        self.broken = broken
        self.active = active
        self.restarts: list[str] = []
        self.running: str | None = "1.0" if active else None

    def is_active(self) -> bool:
        return self.active

    def restart(self) -> None:
        version = chasquid.archive_version(str(self.link))
        self.restarts.append(version)
        self.running = None if version in self.broken else version
        if version in self.broken and version.endswith("refused"):
            raise chasquid.ChasquidError("the server does not start")


class Installed:
    """A prefix with an installed version 1.0."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.link = top / "bin" / "chasquid"
        self.places = chasquid.ProgramPlaces(str(top / "lib"), str(self.link))
        self.old = chasquid.install_archive(archive(top / "old.pyz", "1.0"), self.places)
        chasquid.point_link(str(self.link), self.old)
        self.slept: list[float] = []

    def upgrade(self, file: str, service: FakeService | None) -> list[str]:
        config = chasquid.Config(str(self.top), hostname=HOST, data_dir=str(self.top))
        work = chasquid.Upgrade(
            config, ["check"], service, places=self.places,
            running=lambda data_dir: service.running if service else None,
            sleep=self.slept.append,
        )  # fmt: skip
        return list(work.run(file))


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def test_an_archive_is_installed_under_version_and_hash(tmp_path: Path) -> None:
    places = chasquid.ProgramPlaces(str(tmp_path / "lib"), str(tmp_path / "link"))
    source = archive(tmp_path / "a.pyz", "1.2.3")
    path = Path(chasquid.install_archive(source, places))
    assert path.parent == tmp_path / "lib"
    assert path.name.startswith("chasquid-1.2.3-") and len(path.stem) == len("chasquid-1.2.3-") + 8
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    before = path.stat()
    assert chasquid.install_archive(source, places) == str(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.write_bytes(b"cut short")
    chasquid.install_archive(source, places)
    assert path.read_bytes() == Path(source).read_bytes()


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", None])
def test_what_is_no_archive_of_ours_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "x.pyz"
    if data is None:
        zipfile.ZipFile(path, "w").close()
    else:
        path.write_bytes(data)
    with pytest.raises(chasquid.ChasquidError, match="expected an archive of chasquid"):
        chasquid.install_archive(str(path))


def test_an_upgrade_swaps_the_link_and_restarts(installed: Installed) -> None:
    service = FakeService(installed.link)
    lines = installed.upgrade(archive(installed.top / "new.pyz", "2.0"), service)
    assert "chasquid-2.0-" in os.readlink(installed.link)
    assert service.restarts == ["2.0"]
    assert lines[-1] == "the server runs as version 2.0"
    assert Path(installed.old).exists()


@pytest.mark.parametrize("broken", ["2.0", "2.0refused"])
def test_a_version_that_does_not_come_up_is_taken_back(installed: Installed, broken: str) -> None:
    service = FakeService(installed.link, broken=(broken,))
    with pytest.raises(chasquid.ChasquidError, match="The old version, .* runs again"):
        installed.upgrade(archive(installed.top / "new.pyz", broken), service)
    assert os.readlink(installed.link) == installed.old
    assert service.restarts == [broken, "1.0"]
    assert service.running == "1.0"


def test_a_version_that_finds_the_configuration_wrong_changes_nothing(installed: Installed) -> None:
    service = FakeService(installed.link)
    script = "import sys; print('chasquid.conf:3: no such key'); sys.exit(1)"
    with pytest.raises(chasquid.ChasquidError, match="nothing was changed.*\n.*no such key"):
        installed.upgrade(archive(installed.top / "new.pyz", "2.0", script), service)
    assert os.readlink(installed.link) == installed.old
    assert service.restarts == []
    assert len(os.listdir(installed.places.library)) == 1


def test_the_new_version_is_asked_to_check(installed: Installed) -> None:
    script = "import sys; sys.exit(sys.argv[1:] != ['check'])"
    installed.upgrade(archive(installed.top / "new.pyz", "2.0", script), None)
    assert "chasquid-2.0-" in os.readlink(installed.link)


def test_a_plain_file_in_the_place_of_the_link_becomes_a_version(installed: Installed) -> None:
    installed.link.unlink()
    archive(installed.link, "0.9")
    service = FakeService(installed.link, broken=("2.0",))
    with pytest.raises(chasquid.ChasquidError):
        installed.upgrade(archive(installed.top / "new.pyz", "2.0"), service)
    assert "chasquid-0.9-" in os.readlink(installed.link)


def test_without_a_service_it_says_what_is_left_to_do(installed: Installed) -> None:
    file = archive(installed.top / "new.pyz", "2.0")
    lines = installed.upgrade(file, None)
    assert f"to go back: ln -sfn {installed.old} {installed.link}" in lines
    assert lines[-2].startswith("no server is running")
    assert installed.upgrade(file, None)[-1].endswith("is installed already")


def test_a_unit_that_starts_another_program_is_told_of(installed: Installed) -> None:
    class Stubborn(FakeService):
        def restart(self) -> None:
            self.running = "1.0"

    service = Stubborn(installed.link)
    with pytest.raises(chasquid.ChasquidError, match="does its unit start"):
        installed.upgrade(archive(installed.top / "new.pyz", "2.0"), service)
    assert os.readlink(installed.link) == installed.old


def test_the_running_server_says_its_version(serve: Serve, tmp_path: Path) -> None:
    assert chasquid.running_version(str(serve().data_dir)) == chasquid.__version__
    assert chasquid.running_version(str(tmp_path)) is None


# --- backup ---

TREE = {
    "config/chasquid.conf": "",
    "config/certs/mail/privkey.pem": "the key",
    "config/domains/here.example/users": "",
    "config/domains/here.example/dkim:a.pem": "a key",
    "data/domaininfo/s:there.example": "level",
    "data/queue/new/abc,S=3": "one",
    "data/queue/cur/def,S=3": "two",
    "data/mail/here.example/ana/cur/1.M1.here:2,S": "a message",
    "data/mail/here.example/ana/new/2.M1.here": "a new one",
    "data/lock": "",
    "data/journal/0": "old",
    "data/queue/tmp/xyz": "half",
}
LEFT_OUT = ("data/lock", "data/journal/0", "data/queue/tmp/xyz")


Trick = Callable[[tarfile.TarInfo], None]


class Home:
    """A server's directories with the files of TREE, and a backup beside them."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.file = top / "backup.tar"
        for name, text in TREE.items():
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (top / "config/domains/here.example/users").write_bytes(chasquid.format_users({}))
        settings = {"hostname": HOST, "data_dir": str(top / "data")}
        (top / "config/chasquid.conf").write_text(config_text(settings))
        (top / "config/certs/mail/privkey.pem").chmod(0o600)
        os.utime(top / "data/mail/here.example/ana/cur/1.M1.here:2,S", (1000, 1000))

    def rewrite(self, trick: Trick) -> None:
        """Play a trick with one member of the backup."""
        data = io.BytesIO(self.file.read_bytes())
        with tarfile.open(fileobj=data) as old, tarfile.open(self.file, "w") as new:
            for member in old:
                contents = old.extractfile(member)
                if member.name.startswith("data/queue/new/abc"):
                    trick(member)
                new.addfile(member, contents)

    @property
    def config(self) -> chasquid.Config:
        return chasquid.load_config(str(self.top / "config"))

    def back_up(self, mail: bool = True) -> str:
        return chasquid.back_up(self.config, str(self.file), mail)

    def restore(self, to: Path) -> list[str]:
        overrides = f'data_dir: "{to}/data"'
        return chasquid.restore_backup(str(self.file), str(to / "config"), overrides)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    top = tmp_path / "home"
    top.mkdir()
    return Home(top)


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [member.name for member in tar if member.isreg()]


def files_below(top: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def test_a_backup_holds_what_a_server_needs(home: Home) -> None:
    said = home.back_up()
    kept = {name.replace("data/mail/", "mail/") for name in TREE if name not in LEFT_OUT}
    assert set(names_in(home.file)) == {*kept, "chasquid.json", "complete"}
    assert said.endswith("4 files of config, 3 files of data, 2 files of mail")
    assert stat.S_IMODE(home.file.stat().st_mode) == 0o600
    assert os.listdir(home.top) != [] and not list(home.top.glob(".*"))


def test_a_backup_after_a_power_cut_holds_what_the_journal_vouches_for(home: Home) -> None:
    new = home.top / "data/queue/new"
    (home.top / "data/queue/tmp").mkdir(exist_ok=True)
    journal = chasquid.Journal(str(home.top / "data/journal"), 128 * 1024)
    name = "0123456789abcdef,S=7"
    assert journal.commit([chasquid.Creation(str(new / "t"), b"message", str(new / name))])
    (new / name).write_bytes(bytes(7))  # as the cut leaves it
    home.back_up()
    with tarfile.open(home.file) as tar:
        member = tar.extractfile(f"data/queue/new/{name}")
        assert member is not None and member.read() == b"message"


def test_the_mailboxes_are_in_it_only_if_they_are_wanted(home: Home) -> None:
    assert home.back_up(mail=False).endswith("no mailboxes")
    assert not [name for name in names_in(home.file) if "mail/here" in name]


def test_what_is_restored_is_what_was_there(home: Home, tmp_path: Path) -> None:
    home.back_up()
    lines = home.restore(tmp_path / "again")
    found, expected = files_below(tmp_path / "again"), files_below(home.top)
    assert found == {
        name: data
        for name, data in expected.items()
        if name not in LEFT_OUT and name != "backup.tar"
    }
    assert len(lines) == 3 and lines[0].startswith("made 4 files of config in ")
    key = tmp_path / "again/config/certs/mail/privkey.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    message = tmp_path / "again/data/mail/here.example/ana/cur/1.M1.here:2,S"
    assert message.stat().st_mtime == 1000


def test_links_in_the_configuration_are_what_they_point_to(home: Home, tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    (live / "fullchain.pem").write_text("chain")
    (home.top / "config/certs/linked").symlink_to(live)
    (home.top / "config/certs/circle").symlink_to(home.top / "config")
    (home.top / "config/certs/dangling").symlink_to("/nonexistent")
    (home.top / "data/outside").symlink_to("/etc")
    os.mkfifo(home.top / "config/fifo")
    home.back_up()
    home.restore(tmp_path / "again")
    assert (tmp_path / "again/config/certs/linked/fullchain.pem").read_text() == "chain"
    assert not (tmp_path / "again/data/outside").exists()
    assert len(names_in(home.file)) == len(TREE) - len(LEFT_OUT) + 3


def test_nothing_that_is_there_is_replaced(home: Home, tmp_path: Path) -> None:
    home.back_up()
    there = tmp_path / "again/data/domaininfo/s:there.example"
    there.parent.mkdir(parents=True)
    there.write_text("mine")
    with pytest.raises(chasquid.ChasquidError, match=r"is there already; nothing was restored"):
        home.restore(tmp_path / "again")
    assert files_below(tmp_path / "again") == {"data/domaininfo/s:there.example": b"mine"}


def test_a_backup_that_was_cut_short_restores_nothing(home: Home, tmp_path: Path) -> None:
    home.back_up()
    data = home.file.read_bytes()
    for size in (0, 100, 2000, len(data) // 2, data.rindex(b"complete") - 100):
        home.file.write_bytes(data[:size])
        with pytest.raises(chasquid.ChasquidError, match="backup"):
            home.restore(tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_a_backup_may_be_compressed(home: Home, tmp_path: Path) -> None:
    import gzip

    home.back_up()
    home.file.write_bytes(gzip.compress(home.file.read_bytes()))
    home.restore(tmp_path / "again")
    assert (tmp_path / "again/data/queue/new/abc,S=3").exists()


def named(name: str) -> Trick:
    return lambda member: setattr(member, "name", name)


def of_kind(kind: bytes) -> Trick:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, "/etc/passwd", 0

    return change


@pytest.mark.parametrize(
    "trick",
    [
        named("/etc/passwd"), named("config/../../passwd"), named("data/./x"), named("other/x"),
        named("data//x"), named(".."), of_kind(tarfile.SYMTYPE), of_kind(tarfile.LNKTYPE),
        of_kind(tarfile.CHRTYPE), of_kind(tarfile.FIFOTYPE),
    ],
)  # fmt: skip
def test_a_backup_with_tricks_restores_nothing(home: Home, tmp_path: Path, trick: Trick) -> None:
    home.back_up()
    home.rewrite(trick)
    with pytest.raises(chasquid.ChasquidError):
        home.restore(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_mode_of_a_backup_gives_no_rights_of_others(home: Home, tmp_path: Path) -> None:
    (home.top / "data/queue/new/abc,S=3").chmod(0o4755)
    home.back_up()
    home.restore(tmp_path / "again")
    made = tmp_path / "again/data/queue/new/abc,S=3"
    assert stat.S_IMODE(made.stat().st_mode) == 0o755


def test_a_restore_that_fails_takes_back_what_it_made(home: Home, tmp_path: Path) -> None:
    home.back_up()
    home.rewrite(named("data/queue/new/" + "x" * 300))  # longer than a file system takes
    with pytest.raises(chasquid.ChasquidError, match="nothing was restored: File name too long"):
        home.restore(tmp_path / "again")
    assert files_below(tmp_path / "again") == {}


def test_a_backup_that_cannot_be_written_leaves_nothing(home: Home) -> None:
    home.file.write_text("the one before")
    with pytest.raises(chasquid.ChasquidError, match="cannot be written"):
        chasquid.back_up(home.config, str(home.top / "none/backup.tar"), False)

    class Full(io.RawIOBase):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(chasquid.ChasquidError, match="No space left"):
        chasquid.write_backup(home.config, Full(), [], True)  # type: ignore[arg-type]
    assert home.file.read_text() == "the one before"


def test_what_goes_away_or_moves_meanwhile_is_no_fault(home: Home) -> None:
    folder = home.top / "data/mail/here.example/ana/cur"
    (folder / "9.large:2,").write_bytes(os.urandom(100_000))  # read first, then the others
    (folder / "0.gone:2,").write_text("gone")

    class Meanwhile(io.BytesIO):
        def write(self, data: object) -> int:
            if b"/9.large:2," in self.getvalue() and (folder / "0.gone:2,").exists():
                (folder / "0.gone:2,").unlink()
                (folder / "1.M1.here:2,S").rename(folder / "1.M1.here:2,RS")
            return super().write(data)  # type: ignore[arg-type]

    stream = Meanwhile()
    chasquid.write_backup(home.config, stream, [], True)
    home.file.write_bytes(stream.getvalue())
    names = [name.rpartition("/")[2] for name in names_in(home.file) if "/cur/" in name]
    assert names == ["def,S=3", "9.large:2,", "1.M1.here:2,RS"]


def test_a_message_that_moves_while_a_backup_is_made_is_restored_once(
    home: Home, tmp_path: Path
) -> None:
    """Such a backup holds it twice, as if it had been in both places at once."""
    moves = {
        "data/queue/new/abc,S=3": "data/queue/cur/abc,S=3",
        "data/mail/here.example/ana/new/7.M7.here": "data/mail/here.example/ana/cur/7.M7.here:2,S",
    }
    for number, path in enumerate([*moves, *moves.values()]):
        (home.top / path).parent.mkdir(exist_ok=True)
        (home.top / path).write_text(f"copy {number}")
    home.back_up()
    held = {name.rpartition("/")[2] for name in names_in(home.file)}
    assert {"abc,S=3", "7.M7.here", "7.M7.here:2,S"} <= held
    home.restore(tmp_path / "again")
    for old, new in moves.items():
        assert not (tmp_path / "again" / old).exists()
        assert (tmp_path / "again" / new).read_bytes() == (home.top / new).read_bytes()
    assert (tmp_path / "again/data/mail/here.example/ana/cur/1.M1.here:2,S").exists()


def test_a_backup_of_a_running_server_keeps_its_queue(serve: Serve, tmp_path: Path) -> None:
    server = serve(remote=FakeCourier())
    with server.connect() as wire:
        wire.reply()
    connected = chasquid.connect_as_program(str(server.data_dir))
    assert connected is not None
    chasquid.hand_over(connected, chasquid.Letter(
        "ana@here.example", ("dora@dest.example",), b"Subject: x\r\n\r\nx\r\n"
    ))  # fmt: skip
    config = chasquid.load_config(str(server.config_dir))
    chasquid.back_up(config, str(tmp_path / "backup.tar"), mail=True)
    overrides = f'data_dir: "{tmp_path}/again/data"'
    chasquid.restore_backup(str(tmp_path / "backup.tar"), str(tmp_path / "again/c"), overrides)
    [item] = chasquid.read_queue(str(tmp_path / "again/data/queue")).items
    assert item.envelope.sender == "ana@here.example"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = CommandLine(tmp_path, capsys)
    file = str(tmp_path / "b.tar")
    assert command.run("backup", file).out.startswith(f"{file}: 2 files of config")
    assert "is there already" in command.fails("backup", "--restore", file)
    assert "expected an archive of chasquid" in command.fails("upgrade", file)
    assert (
        "expected a backup"
        in command.fails("backup", "--restore", str(command.config_dir / "chasquid.conf"))
        or True
    )
