# SPDX-License-Identifier: Apache-2.0
"""Rooms STORAGE, JOURNAL, DISK, ITEMS, QUEUE: the power goes, between any two system calls.

A server runs on a copy of the module whose `os` is recorded. For each moment of the run, what
the disk may hold then is built anew, as `cut_disk` says, and looked at as the next start finds
it: whatever had got its 250 is in its mailbox, or in the queue for who has not got it, and
whole; nothing else is there in part. From some of these states a server is started, and
delivers what is left.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import select
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cut_disk import Model, Op, Recorder, State, Unsynced
from os_layer import copy_of_module
from support import SECONDS, RunningClock, Server, greeted, wait_for
from test_setup import FakeHost, quick_key

import chasquid

LARGE = 300_000
EMPTY_RECORD = 24  # octets
STARTS = 2  # of a server, for each way
RECOVERIES = 3  # which the power goes in as well
SAMPLED = 6  # states of each of these that are looked at
FINAL = {  # what each name at here.example stands for
    "ana": ["ana"], "team": ["ana", "ben"], "pipe": ["pipe"], "eva": ["eva"],
    "all": ["ana", "eva", "pipe"],
}  # fmt: skip


class Letter(NamedTuple):
    """A message to one of FINAL: "ana" and "ben" have mailboxes, "eva" is far away."""

    label: str
    to: str
    octets: int = 100
    sender: str = ""
    eva: str = "sent"  # what becomes of the copy for Eva; if it failed, the sender hears of it

    @property
    def data(self) -> bytes:
        filling = (self.label.encode() * 70)[:70] + b"\r\n"
        return (
            f"Subject: letter {self.label}.\r\n\r\n".encode()
            + filling * (self.octets // 72)
            + f"end of {self.label}\r\n".encode()
        )


def label_of(data: bytes) -> str:
    """Return which letter this is, or is about; "" for none."""
    return data.partition(b"Subject: letter ")[2].partition(b".")[0].decode()


class Way(NamedTuple):
    """What comes in: the letters of a round at once, one round after another.

    Other servers give `answers`, in turn. If it `settles`, time passes after each round, until
    what the journal vouches for is synced.
    """

    rounds: tuple[tuple[Letter, ...], ...]
    answers: tuple[str, ...] = ()
    settles: bool = False

    @property
    def letters(self) -> list[Letter]:
        """All of them."""
        return [letter for letters in self.rounds for letter in letters]


THREE = tuple(Letter(f"m{n}", "team") for n in range(3))
RETURNED = {"sender": "ana@here.example", "eva": "failed"}
WAYS = {
    "new mailboxes": Way(
        ((Letter("a", "ana"),), (Letter("b", "team"),), (Letter("c", "ana"),)), settles=True
    ),
    "several at once": Way((THREE, (Letter("n", "team"), Letter("o", "ana")))),
    "large": Way(((Letter("a", "ana", LARGE),), (Letter("b", "team", LARGE), Letter("c", "ana")))),
    "deferred": Way(((Letter("a", "eva"), Letter("b", "eva", LARGE)),), ("deferred", "deferred")),
    "all kinds": Way(
        ((Letter("a", "all"),), (Letter("b", "all", LARGE),), (Letter("c", "all"),)),
        ("deferred", "sent", "deferred"),
        settles=True,
    ),
    "a pipe": Way(((Letter("a", "pipe"),), (Letter("b", "pipe"),))),
    "returned": Way(
        ((Letter("a", "eva", **RETURNED), Letter("b", "eva", LARGE, **RETURNED)),),
        ("failed", "failed"),
    ),
}


class Remote:
    """Other servers: they give their answers in turn, and then take everything."""

    def __init__(self, server: OnLayer, answers: Sequence[str]) -> None:
        self._server = server
        self._answers = list(answers)

    async def deliver(self, delivery: Any, destinations: Sequence[Any]) -> list[Any]:
        module = self._server.module
        state = self._answers.pop(0) if self._answers else "sent"
        if state == "sent":
            label = label_of(b"".join(delivery.message.chunks()))
            self._server.told.extend(f"has {label} eva" for _ in destinations)
        status = {"sent": "2.0.0", "deferred": "4.0.0", "failed": "5.0.0"}[state]
        return [module.Result(module.State(state), status, "so it is")] * len(destinations)


class OnLayer(Server):
    """A server with a layer below it. `told` is what others have got: "has LABEL RECIPIENT"."""

    def __init__(self, directory: Path, layer: Any, answers: Sequence[str] = ()) -> None:
        self.layer = layer
        self.module = copy_of_module(layer)
        self.told: list[str] = []
        self._pipe = directory / "piped"
        self._pipe.touch()
        self._piped = self._pipe.stat().st_size
        self.clock = RunningClock(lambda: self.daemon.loop.post(lambda: None))
        super().__init__(
            directory,
            aliases={
                "here.example": "team: ana, ben\neva: eva@there.example\n"
                f"pipe: | tee -a {self._pipe}\nall: ana, eva, pipe\n"
            },
            data_dir=directory / "disk" / "data",
            remote=Remote(self, answers),
            clock=self.clock,
            segment_size=chasquid.CHUNK,  # so that it is full soon
        )
        (directory / "disk").mkdir(exist_ok=True)

    def make(self) -> Any:
        config = self.module.load_config(str(self.config_dir))
        return self.module.Daemon(config, **self._daemon_keywords)

    def news(self) -> list[str]:
        """Return what was not told before."""
        with self._pipe.open("rb") as file:
            file.seek(self._piped)
            data = file.read()
        ends = list(re.finditer(rb"\nend of (\w+)\r\n", data))
        self._piped += ends[-1].end() if ends else 0
        self.told.extend(f"has {end[1].decode()} pipe" for end in ends)
        told = list(self.told)
        del self.told[: len(told)]
        return told

    def let_settle(self) -> None:
        """Let time pass until what the journal vouches for, if there is one, is synced."""

        def has_settled() -> bool:
            self.clock.advance(1)
            return not is_vouched_for(self.layer.ops)

        wait_for(has_settled, "the journal to settle")

    def empty_queue(self) -> None:
        """Have everything attempted until nothing is left."""

        def is_empty() -> bool:
            if not self.queued("new", "cur"):
                return True
            with contextlib.suppress(chasquid.ChasquidError):
                chasquid.ask_running_server(str(self.data_dir), "queue-retry", "all")
            return False

        wait_for(is_empty, "the queue to be empty")


def is_vouched_for(ops: Sequence[Op]) -> bool:
    """Tell whether the journal has records of what was not synced since."""
    segments = {op.handle for op in ops if op.path.startswith("data/journal/")}
    for op in reversed(ops):
        if op == Op("sync all"):
            return False
        if op.kind == "write" and op.handle in segments and len(op.data) > EMPTY_RECORD:
            return True
    return False


class Post:
    """A client that sends letters; when the 250 is on the wire, the recorder notices."""

    def __init__(self, server: OnLayer) -> None:
        self._server = server
        self._wire = greeted(server)
        self._awaited: Letter | None = None
        server.layer.watches.append(self._news)

    def _news(self) -> list[str]:
        if self._awaited is None or not select.select([self._wire.socket], [], [], 0)[0]:
            return []
        reply = self._wire.socket.recv(4, socket.MSG_PEEK)
        letter, self._awaited = self._awaited, None
        return [f"accepted {letter.label}"] if reply.startswith(b"250") else []

    def begin(self, letter: Letter) -> None:
        """Send all of a letter but its end."""
        wire = self._wire
        assert wire.ask(f"MAIL FROM:<{letter.sender}>").startswith("250 ")
        assert wire.ask(f"RCPT TO:<{letter.to}@here.example>").startswith("250 ")
        assert wire.ask("DATA").startswith("354 ")
        wire.send(letter.data)
        self._awaited = letter

    def end(self) -> None:
        self._wire.send(b".\r\n")

    def result(self) -> None:
        select.select([self._wire.socket], [], [], SECONDS)
        self._server.layer.look()
        assert self._wire.reply().startswith("250 ")

    def close(self) -> None:
        self._server.layer.watches.remove(self._news)
        self._wire.close()


def run(way: Way, directory: Path) -> list[Op]:
    """Return what a server does that letters come to, from its first start to its end."""
    disk = directory / "disk"
    disk.mkdir()
    recorder = Recorder(str(disk))
    with OnLayer(directory, recorder, way.answers) as server:
        wait_for(lambda: "event=ready" in server.log, "the server to be ready")
        recorder.watches.append(server.news)
        for letters in way.rounds:
            posts = [Post(server) for _ in letters]
            for post, letter in zip(posts, letters, strict=True):
                post.begin(letter)
            for post in posts:
                post.end()
            for post in posts:
                post.result()
                post.close()
            if way.settles:
                server.let_settle()
        server.empty_queue()
    recorder.look()
    shutil.rmtree(disk)
    return recorder.ops


class Problems:
    """A log that keeps what is wrong."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def error(self, about: str, text: str) -> None:
        self.found.append(text)

    def event(self, event: Any, **fields: object) -> None:
        pass


class Held(NamedTuple):
    """What there is of the letters: for whom in mailboxes, in the queue, and in part."""

    mailboxes: Counter[tuple[str, str]]  # label, recipient
    queued: Counter[tuple[str, str]]  # the same, for those who have not got it
    returned: Counter[str]  # notifications, by the label of what they are about
    wrong: list[str]


def recover(module: Any, data_dir: Path) -> list[str]:
    """Do what a start does with the disk; return what it complains of."""
    problems = Problems()
    module.replay_journal(str(data_dir / "journal"))
    module.recover_queue(str(data_dir / "queue"), problems, time.time())
    return problems.found


def held(module: Any, data_dir: Path, letters: Sequence[Letter]) -> Held:
    """Look for letters, in mailboxes and in the queue."""
    known = {letter.label: letter for letter in letters}
    found = Held(Counter(), Counter(), Counter(), [])
    for user in ("ana", "ben"):
        maildir = data_dir / "mail" / "here.example" / user
        for path in (*maildir.glob("new/*"), *maildir.glob("cur/*")):
            data = path.read_bytes()
            letter = known.get(label_of(data))
            if letter and data.endswith(b"\n" + letter.data.replace(b"\r\n", b"\n")):
                found.mailboxes[letter.label, user] += 1
            elif letter and b"\nAuto-Submitted: auto-replied\n" in data and b"--\n" in data[-5:]:
                found.returned[letter.label] += 1
            else:
                found.wrong.append(f"{path} is in part: {len(data)} octets")
    contents = module.read_queue(str(data_dir / "queue"))
    found.wrong.extend(str(why) for why in (contents.unreadable, contents.unread) if why)
    for item in contents.items:
        data = b"".join(item.message.chunks())
        letter = known.get(label_of(data))
        for recipient in item.recipients:
            user = recipient.destination.value.partition("@")[0]
            user = "pipe" if user.startswith("tee ") else user
            if letter is None or not (data.endswith(letter.data) or not item.envelope.sender):
                found.wrong.append(f"{item.message.path} is in part: {len(data)} octets")
            elif recipient.is_open and data.endswith(letter.data):
                found.queued[letter.label, user] += 1
            elif recipient.is_open:
                found.returned[letter.label] += 1
    return found


class Account(NamedTuple):
    """What is owed at one moment: letters that have got their 250, and who has one already."""

    accepted: tuple[Letter, ...] = ()
    had: frozenset[tuple[str, str]] = frozenset()  # label, recipient: outside of this disk

    def noting(self, text: str, letters: Sequence[Letter]) -> Account:
        """Return it after a mark."""
        kind, label, *rest = text.split()
        if kind == "has":
            return self._replace(had=self.had | {(label, rest[0])})
        return self._replace(
            accepted=(*self.accepted, *(letter for letter in letters if letter.label == label))
        )

    def copies(self, found: Held) -> Counter[tuple[str, str]]:
        """Return how often who is owed a letter has it, or will have it."""
        copies: Counter[tuple[str, str]] = Counter()
        for letter in self.accepted:
            for recipient in FINAL[letter.to]:
                copy = letter.label, recipient
                copies[copy] = found.mailboxes[copy] + found.queued[copy] + (copy in self.had)
                if recipient == "eva" and letter.eva == "failed":
                    copies[copy] += found.returned[letter.label]
        return copies

    def missing(self, found: Held) -> list[str]:
        """Return what is wrong with what was found."""
        lost = [copy for copy, count in self.copies(found).items() if not count]
        return [
            *found.wrong,
            *(f"{label} got its 250, and {who} has it not" for label, who in lost),
        ]


class Moment(NamedTuple):
    """What may be found on the disk, and what is owed, when the power goes after a call."""

    number: int
    state: State
    account: Account


def states(ops: Iterable[Op], model: Model, chance: random.Random) -> Iterator[tuple[int, State]]:
    """Yield what may be found after each call, with its number."""
    for number, op in enumerate(ops):
        model.apply(op)
        if op.kind not in ("open", "mode"):
            for state in model.states(chance):
                yield number, state


def moments(
    ops: Sequence[Op], model: Model, letters: Sequence[Letter], chance: random.Random
) -> Iterator[Moment]:
    """Yield each state once, as long as the same is owed."""
    account, noted = Account(), 0
    seen: set[object] = set()
    for number, state in states(ops, model, chance):
        for op in ops[noted : number + 1]:
            account = account.noting(op.other, letters) if op.kind == "mark" else account
        noted = number + 1
        key = state.fingerprint, account
        if key not in seen:
            seen.add(key)
            yield Moment(number, state, account)


class Examiner:
    """Looks at moments below `directory`, and counts."""

    def __init__(self, directory: Path, letters: Sequence[Letter]) -> None:
        self._letters = letters
        self._directory = directory
        self._disk = directory / "disk"
        self._module = copy_of_module(Unsynced(str(self._disk)))
        self.figures: Counter[str] = Counter()

    def look(self, moment: Moment, ops: Sequence[Op]) -> None:
        """Recover what is there, and see whether all that is owed is."""
        moment.state.write(self._disk)
        wrong = recover(self._module, self._disk / "data")
        found = held(self._module, self._disk / "data", self._letters)
        wrong += moment.account.missing(found)
        assert not wrong, explained(moment, ops, wrong)
        self._count(moment, found)
        shutil.rmtree(self._disk)

    def look_again(self, moment: Moment, ops: Sequence[Op], chance: random.Random) -> None:
        """Have the power go once more, while what is there is recovered."""
        moment.state.write(self._disk)
        model, recorder = Model(self._disk), Recorder(str(self._disk))
        recover(copy_of_module(recorder), self._disk / "data")
        shutil.rmtree(self._disk)
        found = {state.fingerprint: (number, state)
                 for number, state in states(recorder.ops, model, chance)}  # fmt: skip
        for number, state in chance.sample(list(found.values()), min(len(found), SAMPLED)):
            later = [*ops[: moment.number + 1], *recorder.ops]
            self.look(Moment(moment.number + 1 + number, state, moment.account), later)
        self.figures["recoveries"] += 1

    def _count(self, moment: Moment, found: Held) -> None:
        copies = moment.account.copies(found)
        self.figures["states"] += 1
        self.figures["letters"] += len(moment.account.accepted)
        self.figures["copies"] += sum(count > 1 for count in copies.values())

    def start(self, moment: Moment, ops: Sequence[Op]) -> None:
        """Start a server, have it deliver everything, and see whether it all came."""
        moment.state.write(self._disk)
        server = OnLayer(self._directory, Unsynced(str(self._disk)))
        with server:
            server.empty_queue()
        account = moment.account
        for text in server.news():
            account = account.noting(text, self._letters)
        found = held(server.module, server.data_dir, self._letters)
        wrong = account.missing(found)
        wrong += [f"{place} is in the queue" for place in server.queued()]
        assert not wrong, explained(moment, ops, wrong)
        self.figures["starts"] += 1
        shutil.rmtree(self._disk)


def explained(moment: Moment, ops: Sequence[Op], wrong: Sequence[str]) -> str:
    """Say what was found after which calls."""
    number, state, _ = moment
    last = [op._replace(data=op.data[:40]) for op in ops[max(0, number - 25) : number + 1]]
    files = {
        name: content if isinstance(content, str) else f"{len(content)} octets"
        for name, content in state.files.items()
        if content is not None
    }
    lines = [*map(str, last), *(f"{name}: {what}" for name, what in files.items()), *wrong]
    return f"after call {number}:\n" + "\n".join(lines)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory, if there is one."""
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=in_memory) as name:
        yield Path(name)


def without_syncs(ops: Sequence[Op], of_directories: bool) -> list[Op]:
    """Leave out what makes files durable, or names."""
    directories = {".", *(op.path for op in ops if op.kind == "mkdir")}
    opened = {op.handle for op in ops if op.handle and op.path in directories}
    return [op for op in ops if op.kind != "sync" or (op.handle in opened) != of_directories]


@pytest.mark.parametrize("of_directories", [False, True])
def test_what_is_not_synced_is_missed(of_directories, scratch):
    way = WAYS["new mailboxes"]
    ops = without_syncs(run(way, scratch), of_directories)
    (scratch / "empty").mkdir()
    examiner = Examiner(scratch, way.letters)
    with pytest.raises(AssertionError, match="is in part|has it not"):
        for moment in moments(ops, Model(scratch / "empty"), way.letters, random.Random(1)):
            examiner.look(moment, ops)


@pytest.mark.parametrize("name", WAYS)
def test_the_power_goes_on_the_way_of_a_message(name, scratch):
    letters, chance = WAYS[name].letters, random.Random(name)
    ops = run(WAYS[name], scratch)
    examiner = Examiner(scratch, letters)
    (scratch / "empty").mkdir()
    found = list(moments(ops, Model(scratch / "empty"), letters, chance))
    for moment in found:
        examiner.look(moment, ops)
    assert {letter.label for letter in found[-1].account.accepted} == {
        letter.label for letter in letters
    }
    for moment in chance.sample(found, RECOVERIES):
        examiner.look_again(moment, ops, chance)
    for moment in chance.sample(found, STARTS):
        examiner.start(moment, ops)
    print(f"{len(ops)} calls, {dict(examiner.figures)}")


# --- what commands write ---


def look_at_edits(
    before: Path, ops: Sequence[Op], look: Callable[[State], None] = lambda state: None
) -> int:
    """Look at what a command leaves that is cut: each file as it was, or as it became, never half.

    When it has ended, all is durable. `look` is asked about each state as well. Returns how many
    there were.
    """
    chance, model = random.Random(1), Model(before)
    began = model.running()
    whole: dict[str, set[bytes | str]] = {name: {content} for name, content in began.items()}
    for op in ops:  # a file counts when it gets the name that it is read by
        model.apply(op)
        after = model.running()
        for name in {op.path, op.other} & after.keys() if op.kind != "create" else ():
            whole.setdefault(name, set()).add(after[name])
    seen = set()
    for number, state in states(ops, Model(before), chance):
        if state.fingerprint in seen:
            continue
        seen.add(state.fingerprint)
        there = {name: content for name, content in state.files.items() if content is not None}
        for name, content in there.items():
            is_temporary = name not in after and name not in began
            text = f"after call {number}, {ops[number]}: {name} is in part"
            assert is_temporary or content in whole.get(name, ()), text
        lost = began.keys() & after.keys() - there.keys()
        assert not lost, f"after call {number}, {ops[number]}: {lost} is lost"
        look(state)
    for state in model.states(chance):
        durable = {name: content for name, content in state.files.items() if content is not None}
        assert durable == after, f"not durable: {durable.keys() ^ after.keys()}"
    return len(seen)


def copied(directory: Path, copy: Path) -> Path:
    shutil.copytree(directory, copy, symlinks=True)
    return copy


@pytest.mark.parametrize("domain", ["here.example", "new.example"])
def test_the_power_goes_as_a_user_is_added(domain, commands, scratch):
    before = copied(commands.config_dir, scratch / "before")
    recorder = Recorder(str(commands.config_dir))
    words = ["--config-dir", str(commands.config_dir), "user-add", f"new@{domain}"]
    assert copy_of_module(recorder).main([*words, "--password", "a long password"]) == 0

    def look(state: State) -> None:
        state.write(scratch / "state")
        users = chasquid.load_users(str(scratch / "state" / "domains" / "here.example"))
        assert "ana" in users
        shutil.rmtree(scratch / "state")

    assert look_at_edits(before, recorder.ops, look) > 3


def test_the_power_goes_as_a_domain_is_set_up(scratch):
    def init(host: FakeHost, module: Any) -> None:
        wanted = module.SetupRequest("ana", "example.com", config_dir="/etc/chasquid")
        setup = module.Setup(host, wanted, time.time(), quick_key)
        module.carry_out(setup, host, lambda *told: None, False)

    system = scratch / "system"
    host = FakeHost(system)
    before = copied(system, scratch / "before")
    recorder = Recorder(str(system))
    init(host, copy_of_module(recorder))
    assert look_at_edits(before, recorder.ops) > 20


def test_the_power_goes_as_a_certificate_is_stored(scratch):
    name, certs = "mail.here.example", scratch / "certs"
    certs.mkdir()
    before = copied(certs, scratch / "before")
    recorder = Recorder(str(certs))
    module = copy_of_module(recorder)
    chain, key = module.self_signed_certificate([name], time.time())
    files = module.FetchedCertificate(str(certs / name))
    files.store(name, module.parse_ec_key(key.encode(), "key"), chain.encode())

    def look(state: State) -> None:
        state.write(scratch / "state")
        there = chasquid.FetchedCertificate(str(scratch / "state" / name))
        if os.path.exists(there.chain):  # without one, another is asked for
            chasquid.server_tls_context(there.chain, there.private_key)
        shutil.rmtree(scratch / "state")

    assert look_at_edits(before, recorder.ops, look) > 10


def test_the_power_goes_as_a_message_is_submitted_without_a_server(scratch, monkeypatch):
    (scratch / "disk").mkdir()
    with OnLayer(scratch, Recorder(str(scratch / "disk"))):
        pass
    recorder = Recorder(str(scratch / "disk"))
    before = copied(scratch / "disk", scratch / "before")
    letter = Letter("a", "all", 300_000)  # not in memory alone
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(letter.data)))
    words = ["--config-dir", str(scratch / "config"), "sendmail", "-i", "all@here.example"]
    assert copy_of_module(recorder).main(words) == 0
    recorder.mark("accepted a")
    shutil.rmtree(scratch / "disk")
    examiner = Examiner(scratch, [letter])
    for moment in moments(recorder.ops, Model(before), [letter], random.Random(1)):
        examiner.look(moment, recorder.ops)
    assert examiner.figures["letters"]


def test_the_power_goes_as_a_message_is_removed_without_a_server(scratch, monkeypatch):
    (scratch / "disk").mkdir()
    with OnLayer(scratch, Recorder(str(scratch / "disk"))):
        pass
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Subject: x\n\nx\n")))
    command = ["--config-dir", str(scratch / "config")]
    assert chasquid.main([*command, "sendmail", "eva@there.example"]) == 0
    (path,) = (scratch / "disk").glob("**/queue/new/*")
    before = copied(scratch / "disk", scratch / "before")
    recorder = Recorder(str(scratch / "disk"))
    words = [*command, "queue", "remove", path.name.partition(",")[0]]
    assert copy_of_module(recorder).main(words) == 0
    assert not path.exists()
    assert look_at_edits(before, recorder.ops) > 1
