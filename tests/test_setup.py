# SPDX-License-Identifier: Apache-2.0
"""Room SETUP: what `init` makes, keeps and takes back, and what it says is left to do.

The system is a directory, and the programs that would change one are recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import stat
import time
import zipfile
from pathlib import Path

import pytest
from support import DOWN, Zone, issue, run_command, write_certificate
from support import run as run_on_loop

import chasquid

pytestmark = pytest.mark.usefixtures("cheap_passwords")

ANA = "ana@example.com"
IDS = (1234, 1235)
DOVECOT_IDS = (200, 201)
UNITS = (
    "chasquid-smtp.socket",
    "chasquid-submission.socket",
    "chasquid-submission_tls.socket",
    "chasquid.service",
)


class FakeHost(chasquid.Host):
    """A system of which nothing is real but its files; `log` is what was done to it."""

    def __init__(self, prefix: Path, *, is_root: bool = True, has_systemd: bool = True) -> None:
        super().__init__(str(prefix))
        self.is_root, self.has_systemd = is_root, has_systemd
        self.log: list[str] = []
        self.owners: dict[str, tuple[int, int]] = {}
        self.users: dict[str, tuple[int, int]] = {}
        self.running: set[str] = set()
        self.enabled: set[str] = set()
        self.answers: dict[str, chasquid.Outcome] = {}
        self.public = ["192.0.2.25"]
        self.own_names = ["box"]
        self.taken: set[int] = set()
        self.fails_at = -1
        self.failure: BaseException = OSError(28, "No space left on device")
        self.count = 0
        self.from_source = False
        self._archive = prefix / "download" / "chasquid.pyz"
        self._archive.parent.mkdir(parents=True, exist_ok=True)
        if not self._archive.exists():
            with zipfile.ZipFile(self._archive, "w") as archive:
                archive.writestr(f"chasquid-{chasquid.__version__}.dist-info/METADATA", "")
        (prefix / "usr/local/bin").mkdir(parents=True, exist_ok=True)
        (prefix / "etc/systemd/system").mkdir(parents=True, exist_ok=True)

    def may_fail(self) -> None:
        self.count += 1
        if self.count == self.fails_at:
            raise self.failure

    def run(self, *argv):
        line = " ".join(argv)
        for beginning, outcome in self.answers.items():
            if line.startswith(beginning):
                return outcome
        if argv[:2] == ("systemctl", "is-active"):
            return self._states(argv[2:], self.running, "active", "inactive")
        if argv[:2] == ("systemctl", "is-enabled"):
            return self._states(argv[2:], self.enabled, "enabled", "disabled")
        if argv[0] in ("dovecot", "dpkg-query"):
            return chasquid.Outcome(127, b"", b"not installed")
        self.log.append(line)
        self.may_fail()
        self._obey(argv)
        return chasquid.Outcome(0, b"", b"")

    def _states(self, units, known, yes, no):
        text = "".join(f"{yes if unit in known else no}\n" for unit in units)
        return chasquid.Outcome(0, text.encode(), b"")

    def _obey(self, argv):
        if argv[0] == "useradd":
            self.users[argv[-1]] = IDS
        elif argv[0] == "userdel":
            self.users.pop(argv[-1], None)
        elif argv[:2] == ("systemctl", "enable"):
            units = {word for word in argv[2:] if word != "--now"}
            self.enabled |= units
            if "--now" in argv:
                self.running |= units
        elif argv[:2] == ("systemctl", "disable"):
            self.enabled -= set(argv)
            self.running -= set(argv)
        elif argv[:2] == ("systemctl", "restart"):
            self.running |= set(argv[2:])
        elif argv[:2] == ("systemctl", "stop"):
            self.running -= set(argv[2:])
        elif argv[:2] == ("systemctl", "start"):
            self.running |= set(argv[2:])

    def ids(self, user):
        return self.users.get(user)

    def chown(self, path, owner):
        self.may_fail()
        self.owners[path.removeprefix(self.prefix)] = owner

    def names(self):
        return self.own_names

    def addresses(self):
        return self.public

    def port_is_free(self, port):
        return port not in self.taken

    def archive(self):
        return "" if self.from_source else str(self._archive)

    def template(self, name):
        self.may_fail()
        sample = Path(chasquid.__file__).parent / "sample-config"
        return (sample / name).read_bytes()


@dataclasses.dataclass
class Ran:
    """What came of one run."""

    setup: chasquid.Setup
    told: list[tuple[str, str]]

    @property
    def made(self) -> list[str]:
        return [what for state, what in self.told if state == "made"]


def init(host, /, address=ANA, *, dry_run=False, **request):
    """Carry the steps out, as `init` does."""
    user, _, domain = address.partition("@")
    request.setdefault("config_dir", "/etc/chasquid")
    wanted = chasquid.SetupRequest(user, domain, **request)
    setup = chasquid.Setup(host, wanted, time.time(), quick_key)
    ran = Ran(setup, [])
    chasquid.carry_out(setup, host, lambda *told: ran.told.append(told), dry_run)
    return ran


@functools.cache
def rsa_key():
    return chasquid.new_key("rsa1024")


def quick_key(algorithm):
    """RSA keys take their time."""
    return rsa_key() if algorithm == "rsa2048" else chasquid.new_key(algorithm)


@pytest.fixture
def host(tmp_path):
    return FakeHost(tmp_path)


def tree(directory):
    """Return every path below, with its mode and what it holds."""
    found = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path)] = mode, path.read_bytes() if stat.S_ISREG(mode) else b""
    return found


def mode_of(host, path):
    return stat.S_IMODE(os.lstat(host.path(path)).st_mode)


def with_dovecot(host, version="2.3.19.1 (9b53102964)"):
    """Have Dovecot installed, as Debian brings it."""
    host.users["dovecot"] = DOVECOT_IDS
    conf = Path(host.path("/etc/dovecot/dovecot.conf"))
    conf.parent.mkdir()
    conf.write_text("!include conf.d/*.conf\n")
    known = hashlib.md5(conf.read_bytes()).hexdigest()
    part_name = "/etc/dovecot/conf.d/10-mail.conf"
    part = Path(host.path(part_name))
    part.parent.mkdir()
    part.write_text("# mail\n")
    sums = Path(host.path("/var/lib/ucf/hashfile"))
    sums.parent.mkdir(parents=True)
    sums.write_text(f"{hashlib.md5(part.read_bytes()).hexdigest()}  {part_name}\n")
    text = f" /etc/default/dovecot {'0' * 32}\n /etc/dovecot/dovecot.conf {known}\n"
    host.answers["dovecot --version"] = chasquid.Outcome(0, f"{version}\n".encode(), b"")
    host.answers["dpkg-query"] = chasquid.Outcome(0, text.encode(), b"")
    return conf


# --- on an empty host with systemd ---


def test_an_empty_host_gets_everything(host):
    ran = init(host)
    assert {state for state, _ in ran.told} == {"made"}
    config = chasquid.load_config(host.path("/etc/chasquid"))
    assert chasquid.changed_keys(config) == ["hostname"]
    assert config.hostname == "mail.example.com"
    domains = chasquid.load_domains(config)
    assert domains.problems == ()
    assert domains.accounts.authenticate(ANA, ran.setup.new_password.encode()) == ANA
    for address in (
        "postmaster@example.com",
        "abuse@example.com",
        "root@mail.example.com",
        "ana@mail.example.com",
    ):
        [destination] = domains.aliases.expand(address)
        assert destination.value == ANA
    with pytest.raises(chasquid.NoSuchUser):
        domains.aliases.expand("nobody@mail.example.com")
    kinds = [type(key.key).__name__ for key in domains.keys["example.com"]]
    assert sorted(kinds) == ["Ed25519Key", "RsaKey"]
    certificates = chasquid.Certificates(config)
    assert certificates.problems == [] and certificates.loaded["mail.example.com"]
    assert host.running >= set(UNITS) and host.enabled >= set(UNITS)


def test_the_configuration_is_of_one_line(host):
    init(host)
    text = Path(host.path("/etc/chasquid/chasquid.conf")).read_text()
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'hostname: "mail.example.com"'
    ]


def test_the_archive_is_installed_under_its_version_with_a_link(host):
    init(host)
    link = Path(host.path("/usr/local/bin/chasquid"))
    installed = link.resolve()
    assert link.is_symlink() and installed.read_bytes() == Path(host.archive()).read_bytes()
    assert installed.parent == Path(host.path("/usr/local/lib/chasquid"))
    assert installed.name.startswith(f"chasquid-{chasquid.__version__}-")
    assert mode_of(host, str(installed)) == 0o755


def test_owners_and_modes_are_those_of_a_server_that_is_not_root(host):
    init(host)
    year = time.gmtime().tm_year
    wanted = {
        "/etc/chasquid": (0o755, None),
        "/etc/chasquid/chasquid.conf": (0o644, None),
        "/etc/chasquid/certs": (0o750, (0, IDS[1])),
        "/etc/chasquid/certs/mail.example.com": (0o750, (0, IDS[1])),
        "/etc/chasquid/certs/mail.example.com/privkey.pem": (0o640, (0, IDS[1])),
        "/etc/chasquid/domains": (0o755, IDS),
        "/etc/chasquid/domains/example.com": (0o755, IDS),
        "/etc/chasquid/domains/example.com/users": (0o600, IDS),
        "/etc/chasquid/domains/example.com/aliases": (0o644, IDS),
        f"/etc/chasquid/domains/example.com/dkim:r{year}.pem": (0o600, IDS),
        f"/etc/chasquid/domains/example.com/dkim:e{year}.pem": (0o600, IDS),
        "/var/lib/chasquid": (0o700, IDS),
        "/var/lib/chasquid/dkim-unseen": (0o700, IDS),
    }
    found = {path: (mode_of(host, path), host.owners.get(path)) for path in wanted}
    assert found == wanted


def test_a_new_key_has_a_mark_until_its_record_is_seen(host):
    ran = init(host)
    marks = os.listdir(host.path("/var/lib/chasquid/dkim-unseen"))
    assert sorted(marks) == sorted(key.name for key in ran.setup.dkim_keys())
    assert len(marks) == 2


def test_the_password_is_nowhere_in_clear(host, tmp_path):
    password = init(host).setup.new_password
    assert len(password) == 19
    for path, (_, data) in tree(tmp_path).items():
        assert password.encode() not in data, path


def test_a_second_run_keeps_everything(host, tmp_path):
    first = init(host)
    before, log = tree(tmp_path), list(host.log)
    second = init(host)
    assert [what for _, what in second.told] == [what for _, what in first.told]
    assert {state for state, _ in second.told} == {"kept"}
    assert (tree(tmp_path), host.log, second.setup.new_password) == (before, log, "")


def test_a_dry_run_changes_nothing(host, tmp_path):
    before = tree(tmp_path)
    dry = init(host, dry_run=True)
    assert {state for state, _ in dry.told} == {"would make"}
    assert (tree(tmp_path), host.log, host.owners) == (before, [], {})
    assert [what for _, what in dry.told] == init(host).made


def test_what_is_missing_alone_is_made(host):
    init(host)
    key = Path(host.path(f"/etc/chasquid/domains/example.com/dkim:e{time.gmtime().tm_year}.pem"))
    key.unlink()
    [made] = init(host).made
    assert "Ed25519" in made and key.exists()


def test_a_second_domain_has_the_same_host(host):
    init(host)
    ran = init(host, "ben@other.example")
    assert ran.setup.hostname == "mail.example.com"
    assert [what for what in ran.made if "other.example" not in what] == []
    domains = chasquid.load_domains(chasquid.load_config(host.path("/etc/chasquid")))
    [root] = domains.aliases.expand("root@mail.example.com")
    assert root.value == ANA


def test_a_second_user_leaves_the_aliases_to_the_first(host):
    init(host)
    assert init(host, "ben@example.com").made == ["user ben@example.com"]


def test_the_running_server_is_started_anew_for_what_it_reads_at_its_start(host):
    init(host)
    ran = init(host, smarthost="smtp.provider.example:587")
    assert ran.made == ['key smarthost: "smtp.provider.example:587"', "the running server"]
    assert host.log[-1] == "systemctl restart chasquid.service"
    assert any("smarthost_user" in note for note in ran.setup.notes())


# --- all that fails is taken back ---


@pytest.mark.parametrize("dovecot", [False, True], ids=["alone", "with Dovecot"])
def test_every_failure_is_taken_back(tmp_path, dovecot):
    number = 0
    while True:
        number += 1
        place = tmp_path / str(number)
        host = FakeHost(place)
        if dovecot:
            with_dovecot(host)
        before, users = tree(place), dict(host.users)
        host.fails_at = number
        try:
            init(host)
        except chasquid.ChasquidError as error:
            assert "No space left on device" in str(error)
        else:
            break
        assert tree(place) == before, f"after failure {number}"
        assert (host.users, host.running, host.enabled) == (users, set(), set())
    assert number > 20
    assert host.count < number  # the last run had no failure


def test_a_sentence_says_what_failed_and_that_all_is_taken_back(host):
    host.answers["systemctl enable"] = chasquid.Outcome(1, b"", b"Job for chasquid failed.\n")
    with pytest.raises(chasquid.ChasquidError) as raised:
        init(host)
    assert str(raised.value) == (
        f"the running server: systemctl enable --now {' '.join(UNITS)} has failed: "
        "Job for chasquid failed.; what was made before is taken back"
    )


def test_a_run_that_is_broken_off_is_taken_back(host, tmp_path):
    before = tree(tmp_path)
    host.fails_at, host.failure = 12, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        init(host)
    assert tree(tmp_path) == before


def test_what_was_there_before_is_put_back(host):
    init(host)
    before = tree(Path(host.prefix))
    host.answers["systemctl restart"] = chasquid.Outcome(1, b"", b"no\n")
    with pytest.raises(chasquid.ChasquidError):
        init(host, "ben@example.com", smarthost="smtp.provider.example:587")
    assert tree(Path(host.prefix)) == before


# --- what stands in the way ---


def test_a_port_that_is_taken_is_told_of_before_anything_is_made(host, tmp_path):
    before = tree(tmp_path)
    host.taken = {25}
    with pytest.raises(chasquid.ChasquidError, match="port 25 is taken by another program"):
        init(host)
    assert tree(tmp_path) == before
    host.taken = set()
    init(host)
    host.taken = {25, 465, 587}  # by ourselves
    assert init(host).made == []


def test_another_program_of_the_name_is_not_replaced(host):
    Path(host.path("/usr/local/bin/chasquid")).write_bytes(b"\x7fELF")
    with pytest.raises(chasquid.ChasquidError, match="is another program; move it away"):
        init(host)


def test_without_an_archive_there_is_nothing_to_install(host):
    host.from_source = True
    with pytest.raises(chasquid.ChasquidError, match=r"make one with build_zipapp\.py"):
        init(host)


def test_another_name_for_the_host_than_in_the_configuration(host):
    init(host)
    assert init(host, host="mail.example.com").made == []
    with pytest.raises(chasquid.ConfigError, match="hostname is 'mail.example.com', not 'mx"):
        init(host, host="mx.example.com")


def test_a_key_that_is_set_to_something_else_is_not_changed(host):
    init(host, smarthost="smtp.provider.example:587")
    with pytest.raises(chasquid.ChasquidError, match="smarthost is 'smtp.provider"):
        init(host, smarthost="other.example:587")


def test_a_value_that_is_wrong_is_not_written(host):
    init(host)
    before = tree(Path(host.prefix))
    with pytest.raises(chasquid.ChasquidError, match=r"expected \"host:port\""):
        init(host, smarthost="nonsense")
    assert tree(Path(host.prefix)) == before


def test_a_mistake_in_the_configuration_is_told_of(host):
    init(host)
    path = Path(host.path("/etc/chasquid/chasquid.conf"))
    path.write_text("hostnam: 3\n")
    with pytest.raises(chasquid.ConfigError, match="is it 'hostname'"):
        init(host)


# --- names ---


@pytest.mark.parametrize(
    ("names", "wanted", "hostname"),
    [
        (["box"], "", "mail.example.com"),
        (["box", "BOX.example.com"], "", "box.example.com"),
        (["example.com"], "", "mail.example.com"),
        (["box.elsewhere.example"], "", "mail.example.com"),
        (["box.example.com"], "mx.elsewhere.example", "mx.elsewhere.example"),
        (["box"], "example.com", "example.com"),
    ],
)
def test_the_name_of_the_host(host, names, wanted, hostname):
    host.own_names = names
    ran = init(host, host=wanted)
    assert ran.setup.hostname == hostname
    assert len([what for what in ran.made if what.startswith("aliases ")]) == (
        1 if hostname == "example.com" else 2
    )


def test_an_internationalised_address(host):
    ran = init(host, "jürgen@münchen.example")
    config = chasquid.load_config(host.path("/etc/chasquid"))
    assert config.hostname == "mail.münchen.example"
    domains = chasquid.load_domains(config)
    [destination] = domains.aliases.expand("root@mail.münchen.example")
    assert destination.value == "jürgen@münchen.example"
    needs = ran.setup.needs()
    assert (needs.domain, needs.host) == ("xn--mnchen-3ya.example", "mail.xn--mnchen-3ya.example")
    assert chasquid.Certificates(config).loaded[needs.host].covers(needs.host)
    marks = os.listdir(host.path("/var/lib/chasquid/dkim-unseen"))
    assert sorted(marks) == sorted(key.name for key in needs.keys)
    assert init(host, "jürgen@münchen.example").made == []


def test_a_host_with_users_of_its_own_gets_no_catch_all(host):
    init(host, "ben@mail.example.com", host="mail.example.com")
    init(host)
    domains = chasquid.load_domains(chasquid.load_config(host.path("/etc/chasquid")))
    [root] = domains.aliases.expand("root@mail.example.com")
    assert root.value == "ben@mail.example.com"
    with pytest.raises(chasquid.NoSuchUser):
        domains.aliases.expand("ana@mail.example.com")


def test_a_catch_all_needs_no_more_aliases(host):
    directory = Path(host.path("/etc/chasquid/domains/example.com"))
    directory.mkdir(parents=True)
    (directory / "aliases").write_text("*: ana\n")
    init(host)
    assert (directory / "aliases").read_text() == "*: ana\n"


def test_an_alias_that_is_there_is_kept_and_the_last_line_may_lack_its_end(host):
    directory = Path(host.path("/etc/chasquid/domains/example.com"))
    directory.mkdir(parents=True)
    (directory / "aliases").write_text("abuse: eva@elsewhere.example")
    init(host)
    text = (directory / "aliases").read_text()
    assert text == "abuse: eva@elsewhere.example\npostmaster: ana\nroot: ana\n"


def test_a_password_of_ones_own(host):
    ran = init(host, password="correct horse")
    users = chasquid.load_users(host.path("/etc/chasquid/domains/example.com"))
    assert chasquid.check_password(users["ana"], b"correct horse")
    assert ran.setup.new_password == ""


# --- Dovecot ---


def test_dovecot_gets_a_configuration_and_the_users(host):
    conf = with_dovecot(host)
    ran = init(host)
    assert 'init" for Dovecot 2.3' in conf.read_text()
    assert Path(f"{conf}.orig").read_text() == "!include conf.d/*.conf\n"
    place = host.path("/etc/chasquid/dovecot")
    assert mode_of(host, place) == 0o2750
    assert host.owners["/etc/chasquid/dovecot"] == (IDS[0], DOVECOT_IDS[1])
    assert mode_of(host, f"{place}/users") == 0o640
    assert Path(place, "users").read_text().startswith(f"{ANA}:{{CRYPT}}$7$")
    assert {"dovecot.service", "chasquid-dovecot.path"} <= host.running
    path = Path(host.path("/etc/systemd/system/chasquid-dovecot.path")).read_text()
    assert f"PathChanged={ran.setup.certificate}/fullchain.pem\n" in path
    assert init(host).made == []


def test_the_directory_of_dovecots_users_hands_its_group_on(host):
    with_dovecot(host)
    init(host)
    place = host.path("/etc/chasquid/dovecot")
    os.chmod(place, 0o750)  # as after a restored backup
    assert init(host).made == [f"{place}/users"]
    assert mode_of(host, place) == 0o2750


def test_a_user_more_is_known_to_dovecot(host):
    with_dovecot(host)
    init(host)
    made = init(host, "ben@example.com").made
    assert made == ["user ben@example.com", host.path("/etc/chasquid/dovecot/users")]


@pytest.mark.parametrize("name", ["dovecot.conf", "conf.d/10-mail.conf", "local.conf"])
def test_a_configuration_of_dovecot_that_somebody_changed_is_kept(host, name):
    conf = with_dovecot(host)
    conf.parent.joinpath(name).write_text("protocols = imap\n")
    before = conf.read_text()
    ran = init(host)
    assert conf.read_text() == before
    assert os.path.exists(host.path("/etc/chasquid/dovecot/users"))  # of use for any
    assert any("move /etc/dovecot/dovecot.conf away" in note for note in ran.setup.notes())
    conf.unlink()
    assert "/etc/dovecot/dovecot.conf" in init(host).made


def test_without_dovecot_it_is_said_how_to_have_it(host):
    notes = " ".join(init(host).setup.notes())
    assert "apt install dovecot-imapd" in notes and f"sudo chasquid init {ANA}" in notes


def test_dovecot_of_debian_13_gets_its_own_form(host):
    conf = with_dovecot(host, "2.4.1-4 (7d8c0e5759)")
    init(host)
    assert conf.read_text().startswith("dovecot_config_version")


def test_a_configuration_that_dovecot_refuses_is_taken_back(host):
    conf = with_dovecot(host)
    before = tree(Path(host.prefix))
    host.answers["doveconf"] = chasquid.Outcome(89, b"", b"doveconf: Fatal: no\n")
    with pytest.raises(chasquid.ChasquidError, match="doveconf: Fatal: no"):
        init(host)
    assert tree(Path(host.prefix)) == before and "include" in conf.read_text()
    assert "systemctl try-restart dovecot.service" in host.log


def test_a_user_whose_hash_dovecot_cannot_read_is_told_of(host):
    with_dovecot(host)
    init(host)
    users = Path(host.path("/etc/chasquid/domains/example.com/users"))
    old = chasquid.new_password(b"x")._replace(salt=b"\0")
    users.write_bytes(chasquid.format_users({"ana": old}))
    assert any(f"user-add {ANA}" in note for note in init(host).setup.notes())


def test_the_login_over_imap_is_tried_with_the_password(host):
    with_dovecot(host)
    tried = []

    def log_in(address, password):
        tried.append((address, password))
        return "" if len(tried) == 1 else "no"

    setup = init(host).setup
    assert "can log in" in setup.try_imap(log_in)
    assert tried == [(ANA, setup.new_password)]
    assert "cannot log in: no" in setup.try_imap(log_in)
    assert init(host).setup.try_imap(log_in) == ""  # nobody knows the password any more
    assert len(tried) == 2


# --- from a backup ---


def test_a_backup_is_restored_before_the_rest(host, tmp_path):
    password = init(host).setup.new_password
    before = Path(host.path("/etc/chasquid/domains/example.com/users")).read_bytes()
    config = chasquid.load_config(host.path("/etc/chasquid"))
    config = config._replace(data_dir=host.path(config.data_dir))
    kept = str(tmp_path / "backup.tar")
    chasquid.back_up(config, kept, False)

    other = FakeHost(tmp_path / "other")
    ran = init(other, backup=kept)
    assert ran.told[:2] == [("made", "user chasquid of the system"), ("made", f"what {kept} holds")]
    assert Path(other.path("/etc/chasquid/domains/example.com/users")).read_bytes() == before
    assert ran.setup.hostname == "mail.example.com" and ran.setup.new_password == ""
    assert "user ana@example.com" not in ran.made and password
    marks = other.path("/var/lib/chasquid/dkim-unseen")
    assert len(os.listdir(marks)) == 2
    assert init(other, backup=kept).made == []

    third = FakeHost(tmp_path / "third")
    Path(third.path("/var/lib")).mkdir(parents=True)
    third.answers["systemctl enable"] = chasquid.Outcome(1, b"", b"no\n")
    clean = tree(tmp_path / "third")
    with pytest.raises(chasquid.ChasquidError, match="taken back"):
        init(third, backup=kept)
    assert tree(tmp_path / "third") == clean


def test_a_backup_that_is_none_is_told_of(host, tmp_path):
    (tmp_path / "backup.tar").write_bytes(b"nonsense")
    with pytest.raises(chasquid.ChasquidError, match=r"backup\.tar"):
        init(host, backup=str(tmp_path / "backup.tar"))


# --- certificates by ACME ---

FETCHED = "/var/lib/chasquid/acme/certs/mail.example.com"


def test_with_the_agreement_the_server_fetches_certificates(host):
    with_dovecot(host)
    ran = init(host, acme=True, acme_url="https://ca.example/directory")
    config = chasquid.load_config(host.path("/etc/chasquid"))
    assert (config.acme, config.acme_url) == (True, "https://ca.example/directory")
    assert config.web_address == ("systemd",)
    assert "chasquid-web.socket" in host.running & host.enabled
    # one that nobody trusts is where the other will be, and the server may replace it
    assert ran.setup.certificate == host.path(FETCHED)
    for path in ("/var/lib/chasquid/acme", "/var/lib/chasquid/acme/certs", FETCHED):
        assert host.owners[path] == IDS
    assert host.owners[f"{FETCHED}/privkey.pem"] == IDS
    assert mode_of(host, f"{FETCHED}/privkey.pem") == 0o600
    assert f"ssl_key = <{host.path(FETCHED)}/privkey.pem\n" in dovecot_conf(host)
    assert os.listdir(host.path("/etc/chasquid/certs")) == []
    assert {record.purpose for record in chasquid.domain_records(ran.setup.needs())} > {"MTA-STS"}
    assert any("port 80 can be reached" in note for note in ran.setup.notes())
    assert init(host, acme=True, acme_url="https://ca.example/directory").made == []
    assert init(host).made == []


def dovecot_conf(host):
    return Path(host.path("/etc/dovecot/dovecot.conf")).read_text()


def test_the_agreement_may_come_later(host):
    with_dovecot(host)
    before = init(host)
    assert any("--acme-agree" in note for note in before.setup.notes())
    number = len(host.log)
    made = init(host, acme=True).made
    assert made == [
        "key acme: true",
        'key web_address: "systemd"',
        "certificate for mail.example.com",
        "/etc/dovecot/dovecot.conf",
        "units that tell Dovecot of a new certificate",
        "the running Dovecot",
        "units of systemd",
        "the running server",
    ]
    assert host.log[number:][-3:] == [
        "systemctl stop chasquid.service",
        "systemctl enable --now chasquid-web.socket",
        "systemctl restart chasquid.service",
    ]
    assert f"<{host.path(FETCHED)}/" in dovecot_conf(host)
    unit = Path(host.path("/etc/systemd/system/chasquid-dovecot.path")).read_text()
    assert f"PathChanged={host.path(FETCHED)}/fullchain.pem\n" in unit
    assert init(host).made == []


def test_a_certificate_of_ones_own_is_used_beside_acme(host, tmp_path):
    setup = init(host).setup
    (tmp_path / "ca").mkdir()
    issued = issue(tmp_path / "ca", "mail.example.com", issue(tmp_path / "ca", "authority"))
    Path(setup.certificate, "fullchain.pem").write_text(issued.chain)
    Path(setup.certificate, "privkey.pem").write_text(issued.key)
    ran = init(host, acme=True)
    assert ran.setup.certificate == setup.certificate
    assert not os.path.exists(host.path(FETCHED))


def test_a_web_server_on_port_80_stands_in_the_way_of_the_web_listener_alone(host):
    host.taken = {80}
    with pytest.raises(chasquid.ChasquidError, match="port 80 is taken"):
        init(host, acme=True)
    assert init(host).made


def test_a_certificate_for_the_host_under_another_name_is_used(host):
    directory = Path(host.path("/etc/chasquid/certs/all"))
    write_certificate(directory, "*.example.com")
    ran = init(host)
    assert ran.setup.certificate == str(directory)
    assert [what for state, what in ran.told if state == "kept"] == [
        str(directory.parent.parent),
        str(directory.parent),
        "certificate for mail.example.com",
    ]


# --- without systemd, or not as root ---


def test_without_root_all_is_below_the_directory(tmp_path):
    host = FakeHost(tmp_path, is_root=False)
    there = str(tmp_path / "mine")
    before = {path for path in tree(tmp_path) if not path.startswith(there)}
    ran = init(host, config_dir=there)
    assert {path for path in tree(tmp_path) if not path.startswith(there)} == before
    assert host.log == [] and host.owners == {}
    config = chasquid.load_config(there)
    assert config.data_dir == f"{there}/data"
    assert config.smtp_address == (":25",)
    notes = " ".join(ran.setup.notes())
    assert f"--config-dir {there} serve" in notes
    assert init(host, config_dir=there).made == []


def test_root_without_systemd_has_the_usual_places(tmp_path):
    host = FakeHost(tmp_path, has_systemd=False)
    ran = init(host)
    config = chasquid.load_config(host.path("/etc/chasquid"))
    assert config.data_dir == "/var/lib/chasquid"
    assert config.submission_over_tls_address == (":465",)
    assert host.log == []
    assert os.listdir(host.path("/var/lib/chasquid/dkim-unseen"))
    assert any("pyz serve'" in note for note in ran.setup.notes())


def test_the_server_starts_with_what_was_made(tmp_path, capsys):
    host = FakeHost(tmp_path, is_root=False)
    there = str(tmp_path / "mine")
    init(host, config_dir=there)
    overrides = "".join(
        f'{key}: "127.0.0.1:0"\n'
        for key in ("smtp_address", "submission_address", "submission_over_tls_address")
    )
    config = chasquid.load_config(there, overrides + 'mail_log_path: "<stderr>"')
    daemon = chasquid.Daemon(config, ask=Zone({}).ask)
    daemon.run(daemon.stop)
    said = capsys.readouterr().err
    assert "event=ready" in said and "event=error" not in said


# --- what is still to be done ---

HOST_RECORDS = {
    ("example.com", "MX"): ["10 mail.example.com."],
    ("mail.example.com", "A"): ["192.0.2.25"],
    ("_dmarc.example.com", "TXT"): ["v=DMARC1;p=reject"],
    ("25.2.0.192.in-addr.arpa", "PTR"): ["mail.example.com."],
}


def seen(setup, table, **options):
    needs = setup.needs()
    zone = Zone(table, **options)

    async def look(loop):
        return await chasquid.look_records_up(chasquid.Names(loop, zone.ask), loop, needs)

    return needs, run_on_loop(look)


def names(records):
    return [(record.purpose, record.name) for record in records if not record.optional]


def test_only_what_is_missing_is_left(host):
    setup = init(host).setup
    rsa = next(key for key in setup.dkim_keys() if isinstance(key.key, chasquid.RsaKey))
    strange = rsa.record.replace("; ", ";").replace("p=MII", "p=M II") + ";"
    table = {**HOST_RECORDS, (rsa.name, "TXT"): [strange]}
    table["example.com", "TXT"] = ["google-site-verification=1", "v=spf1 include:x.example mx -all"]
    needs, there = seen(setup, table)
    [record] = [one for one in chasquid.remaining_records(needs, there) if not one.optional]
    assert record.name.startswith(f"e{time.gmtime().tm_year}._domainkey")
    assert (there.nameless, there.other_policy, there.failure) == ((), False, "")


def test_other_records_are_not_taken_for_ours(host):
    setup = init(host).setup
    table = {
        ("example.com", "MX"): ["10 mx.provider.example."],
        ("mail.example.com", "A"): ["198.51.100.1"],
        ("example.com", "TXT"): ["v=spf1 include:provider.example -all"],
        (setup.dkim_keys()[0].name, "TXT"): ["v=DKIM1; k=rsa; p=MIIB"],
        ("25.2.0.192.in-addr.arpa", "PTR"): ["192-0-2-25.provider.example."],
    }
    needs, there = seen(setup, table)
    left = chasquid.remaining_records(needs, there)
    assert names(left) == names(chasquid.domain_records(needs))
    notes = " ".join(chasquid.remaining_notes(setup, needs, there))
    assert "Ask whoever provides 192.0.2.25 for its PTR record: mail.example.com" in notes
    assert "example.com has an SPF record, and may have only one" in notes


def test_a_resolver_that_fails_is_told_of_and_all_is_shown(host):
    setup = init(host).setup
    records = {
        (record.name, record.kind): DOWN for record in chasquid.domain_records(setup.needs())
    }
    needs, there = seen(setup, records)
    assert names(chasquid.remaining_records(needs, there)) == names(chasquid.domain_records(needs))
    note = next(chasquid.remaining_notes(setup, needs, there))
    assert "could not be asked (the name servers are down)" in note


def test_what_was_published_just_now_is_not_left(host):
    setup = init(host).setup
    needs, there = seen(setup, {})
    records = chasquid.domain_records(needs)
    lines = ["made example.com MX 10 mail.example.com", "changed example.com TXT v=spf1 mx ~all"]
    lines += ["kept _dmarc.example.com TXT: not made by chasquid", "failed x: refused"]
    left = chasquid.remaining_records(needs, there.with_published(records, lines))
    purposes = {record.purpose for record in left if not record.optional}
    assert purposes == {"address", "DKIM", "DMARC"}


def test_behind_nat_the_ports_are_named(host):
    host.public = []
    setup = init(host).setup
    needs, there = seen(setup, {})
    notes = " ".join(chasquid.remaining_notes(setup, needs, there))
    assert "25, 465, 587 and 993" in notes and "PTR" not in notes


def test_the_text_has_optional_records_apart(host):
    setup = init(host).setup
    needs, there = seen(setup, {})
    records = chasquid.remaining_records(needs, there)
    text = chasquid.remaining_text(records, ["A note."], needs.domain, "chasquid doctor --wait")
    joined = "\n".join(text)
    assert "  @                 MX     10 mail.example.com" in text
    assert joined.index("_dmarc") < joined.index("Optional") < joined.index("_submissions._tcp")
    assert text[-3:] == ["- A note.", "", "This tells when all is well:  chasquid doctor --wait"]
    nothing = chasquid.remaining_text([], [], needs.domain, "chasquid doctor --wait")
    assert nothing == ["", "This tells when all is well:  chasquid doctor --wait"]


def test_the_certificate_that_nobody_trusts_is_told_of_until_there_is_another(host, tmp_path):
    setup = init(host).setup
    assert any("Nobody else trusts" in note for note in setup.notes())
    (tmp_path / "ca").mkdir()
    authority = issue(tmp_path / "ca", "authority")
    issued = issue(tmp_path / "ca", "mail.example.com", authority)
    Path(setup.certificate, "fullchain.pem").write_text(issued.chain)
    assert not any("Nobody else trusts" in note for note in setup.notes())


# --- the command ---


def test_the_command_makes_it_and_says_the_password_once(tmp_path, capsys):
    there = tmp_path / "mine"
    (there).mkdir()
    done = run_command(capsys, there, "init", ANA, "--host", "mx.elsewhere.example")
    assert done.status == 0 and "made  user ana@example.com\n" in done.out
    [line] = [line for line in done.out.splitlines() if "password of" in line]
    login = run_command(capsys, there, "authenticate", ANA, "--password", line.split()[-1])
    assert login.status == 0
    assert done.out.rstrip().endswith("doctor --wait")
    again = run_command(capsys, there, "init", ANA)
    assert "made" not in again.out and "password of" not in again.out
    checked = run_command(capsys, there, "check")
    assert checked.status == 0, checked.out


def test_the_command_for_programs(tmp_path, capsys):
    done = run_command(capsys, tmp_path, "init", ANA, "--json")
    told = json.loads(done.out)
    assert {step["state"] for step in told["steps"]} == {"made"}
    assert told["address"] == ANA and len(told["password"]) == 19
    assert {"MX", "SPF", "DKIM", "DMARC"} <= {record["purpose"] for record in told["records"]}
    assert "made" in done.err
    assert told["published"] == []


def test_a_key_for_the_dns_that_is_none_spoils_nothing(tmp_path, capsys):
    (tmp_path / "key").write_text("nonsense")
    there = tmp_path / "mine"
    done = run_command(capsys, there, "init", ANA, "--dns-key", str(tmp_path / "key"))
    assert done.status == 0
    assert "failed to publish: " in done.out and "expected one key" in done.out
    assert "_dmarc" in done.out


def test_the_command_shows_a_zone_file_alone_on_standard_output(tmp_path, capsys):
    done = run_command(capsys, tmp_path, "init", ANA, "--zone")
    assert done.out.startswith("$TTL ")
    assert "example.com.\tIN MX\t10 mail.example.com.\n" in done.out
    assert "password" not in done.out and "password of" in done.err


def test_the_command_only_says_what_it_would_do(tmp_path, capsys):
    done = run_command(capsys, tmp_path, "init", ANA, "--dry-run")
    assert "would make  user ana@example.com\n" in done.out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("address", ["ana", "ana@", "ana@[192.0.2.1]", "a/b@example.com"])
def test_an_address_must_be_one(tmp_path, capsys, address):
    done = run_command(capsys, tmp_path, "init", address)
    assert done.status == 1 and done.err.startswith("chasquid: ")


def test_a_backup_that_is_none_makes_nothing(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, is_root=False, has_systemd=False)
    (tmp_path / "backup.tar").write_bytes(b"no tar")
    with pytest.raises(chasquid.ChasquidError, match="is no whole backup"):
        init(host, config_dir="/srv/mail", backup=str(tmp_path / "backup.tar"))
    assert not (tmp_path / "srv").exists()
