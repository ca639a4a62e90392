# SPDX-License-Identifier: Apache-2.0
"""Good and hostile traffic, mixed, at twice what the server takes.

    python -m tests.load [--seconds 600] [--times 2]

The server runs in a process of its own, with few places for connections and a small queue; the
other server that it sends to is slow. First it is measured how many sessions of the mix it
takes when each waits for the one before. Then sessions come at so many times that rate, whether
the server keeps up or not. Who brings good mail comes again later if the server sends him away,
as mail servers do; who is hostile ends in one of the ways of `HOSTILE`.

What must hold, or the exit status is 1:

- the server sheds with 421 and 451, and does not fail
- each good message arrives; a second time only if the connection broke before the reply came
- the memory does not grow, from the second third of the time to the last
- in the end no session, descriptor or thread is left
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interop.peers import NameServer
from interop.server import PROGRAM, Chasquid, Setting
from interop.tools import LOOPBACK
from support import trusting, wait_for

PATIENCE = 30.0  # seconds, for one reply
SILENCE = 2.0  # seconds for which the server waits here for who says nothing
HERE, FAR = "ana@here.example", "dora@dest.example"
_AT_A_TIME = 4000  # sessions of ours; each takes a descriptor
_WORKERS = 8  # threads of the server, which come when they are needed
_TROUBLE = (OSError, EOFError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.TimeoutError)

# Sets constants of the module, and runs its command line; says at SIGUSR1 what is in use. How
# much memory the process has does not tell: what was free before is used first.
_HURRIED = """
import ctypes, gc, json, os, signal, sys
place, report, *arguments = sys.argv[1:]
sys.path.insert(0, place)
import chasquid

class Malloc(ctypes.Structure):  # see mallinfo(3)
    _fields_ = [(f"field{{number}}", ctypes.c_size_t) for number in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Malloc

def tell(*_):
    gc.collect()
    tasks = sum(isinstance(found, chasquid.Task) and not found.done for found in gc.get_objects())
    info = mallinfo()
    found = [sys.getallocatedblocks(), info.field4 + info.field7, tasks]
    with open(report + ".new", "w") as file:
        json.dump(found, file)
    os.rename(report + ".new", report)

signal.signal(signal.SIGUSR1, tell)
chasquid.COMMAND_SECONDS = chasquid.TRANSFER_SECONDS = {silence}
sys.exit(chasquid.main(arguments))
"""


class Hurried(Chasquid):
    """A server that waits only for a moment for each command; limits hold on this machine too."""

    def __init__(self, directory: Path, names: NameServer, **settings: Setting) -> None:
        super().__init__(directory, names, **settings)  # type: ignore[arg-type]

    def write_settings(self) -> None:
        super().write_settings()
        with (self.config_dir / "chasquid.conf").open("a") as file:
            file.write("limit_loopback: true\n")

    @property
    def _report(self) -> Path:
        return self.directory / "in-use"

    def in_use(self) -> InUse:
        """Return what is in use in the process."""
        self._report.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        return InUse(*json.loads(wait_for(self._told, "the process to tell")))

    def _told(self) -> str:
        return self._report.read_text() if self._report.exists() else ""

    @property
    def serve_command(self) -> list[str]:
        program = Path(PROGRAM)
        place = program if program.suffix == ".pyz" else program.parent
        return [
            *[sys.executable, "-c", _HURRIED.format(silence=SILENCE)],
            *[str(place), str(self._report), "--config-dir", str(self.config_dir), "serve"],
        ]


class InUse(NamedTuple):
    """What a server has in use: Python's small objects, octets of all else, tasks."""

    objects: int
    octets: int
    tasks: int


class Held(NamedTuple):
    """What a process holds; memory in MB."""

    descriptors: int
    threads: int
    memory: float


def held(pid: int) -> Held:
    """Return what a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Held(descriptors, int(found["Threads"]), int(found["VmRSS"]) / 1024)


# --- a client ---


class Talk:
    """A client's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def reply(self) -> str:
        """Return the next reply. Raises EOFError if there is none."""
        text = ""
        while True:
            line = await asyncio.wait_for(self._reader.readline(), PATIENCE)
            if not line.endswith(b"\n"):
                raise EOFError(f"closed after {text + line.decode('latin-1')!r}")
            text += line.decode("utf-8", "replace")
            if line[3:4] != b"-":
                return text

    async def ask(self, line: str) -> str:
        self.say(line.encode() + b"\r\n")
        return await self.reply()

    def say(self, data: bytes) -> None:
        if self._writer.transport.is_closing():
            raise EOFError("closed before all was said")
        self._writer.write(data)

    async def drain(self) -> None:
        await asyncio.wait_for(self._writer.drain(), PATIENCE)

    async def start_tls(self, context: ssl.SSLContext) -> None:
        await asyncio.wait_for(self._writer.start_tls(context), PATIENCE)

    async def until_closed(self) -> None:
        """Read until the server has closed the connection."""
        while await asyncio.wait_for(self._reader.read(65536), PATIENCE):
            pass

    def half_close(self) -> None:
        self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """End the connection with RST."""
        raw = self._writer.get_extra_info("socket")
        if raw is None:  # the server was faster
            return
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    @property
    def rest(self) -> asyncio.StreamReader:
        return self._reader


async def talk_to(port: int, address: str, context: ssl.SSLContext | None = None) -> Talk:
    """Connect from `address`, one of those of this machine."""
    call = asyncio.open_connection(
        LOOPBACK, port, ssl=context, local_addr=(address, 0), limit=1024 * 1024
    )
    return Talk(*await asyncio.wait_for(call, PATIENCE))


# --- who is hostile: how a session ends ---

Act = Callable[[Talk], Awaitable[object]]
_STAGES = (
    "EHLO bad.example",
    "MAIL FROM:<eve@bad.example>",
    f"RCPT TO:<{HERE}>",
    "DATA",
    "Subject: half",
    ".",
)
_JUNK = random.Random(1).randbytes(3000)


def _leaving(stage: int, end: Act) -> Act:
    """Return what goes so far in a transaction, and then ends; 0 is before the greeting."""

    async def act(talk: Talk) -> None:
        if stage:
            await talk.reply()
        for line in _STAGES[: max(0, stage - 1)]:
            talk.say(f"{line}\r\n".encode())
            if line != "Subject: half" and (line != "." or end is not _reset):
                await talk.reply()
        await end(talk)

    return act


async def _close(talk: Talk) -> None:
    talk.close()


async def _reset(talk: Talk) -> None:
    talk.reset()


async def _half_close(talk: Talk) -> None:
    talk.half_close()
    await talk.until_closed()


async def _wait(talk: Talk) -> None:
    await talk.until_closed()


def _saying(data: bytes, *lines: str) -> Act:
    """Return what says `lines`, then `data`, and reads until the server has closed."""

    async def act(talk: Talk) -> None:
        await talk.reply()
        for line in lines:
            await talk.ask(line)
        talk.say(data)
        await talk.drain()
        talk.half_close()
        await talk.until_closed()

    return act


async def _tls_that_fails(talk: Talk) -> None:
    await talk.reply()
    await talk.ask("EHLO bad.example")
    await talk.ask("STARTTLS")
    await talk.start_tls(ssl.create_default_context())  # which trusts no such certificate


async def _tls_that_ends_early(talk: Talk) -> None:
    await talk.reply()
    await talk.ask("EHLO bad.example")
    await talk.ask("STARTTLS")
    await talk.start_tls(trusting())
    await talk.ask("EHLO bad.example")
    talk.reset()


async def _wrong_password(talk: Talk) -> None:
    await talk.reply()
    await talk.ask("EHLO bad.example")
    await talk.ask("STARTTLS")
    await talk.start_tls(trusting())
    await talk.ask("EHLO bad.example")
    secret = base64.b64encode(f"\0{HERE}\0{random.random()}".encode()).decode()
    await talk.ask(f"AUTH PLAIN {secret}")


async def _deaf(talk: Talk) -> None:
    """Ask without end, and read nothing: the server must not keep the replies."""
    await talk.reply()
    talk.rest._transport.pause_reading()  # type: ignore[attr-defined]
    with contextlib.suppress(asyncio.TimeoutError):
        for _ in range(1000):  # more than the system keeps of it
            talk.say(b"EHLO bad.example\r\n" * 1000)
            await asyncio.wait_for(talk.drain(), SILENCE)
    talk.reset()


async def _drip(talk: Talk) -> None:
    """Say one octet at a time, for some seconds."""
    await talk.reply()
    for octet in b"EHLO bad.e":
        talk.say(bytes([octet]))
        await asyncio.sleep(0.2)
    talk.close()


_BEGUN = ("EHLO bad.example", "MAIL FROM:<eve@bad.example>", f"RCPT TO:<{HERE}>", "DATA")
QUICK: dict[str, Act] = {
    **{
        f"{end.__name__.strip('_')} at stage {stage}": _leaving(stage, end)
        for stage in range(len(_STAGES) + 2)
        for end in (_close, _reset, _half_close)
    },
    "octets of no protocol": _saying(_JUNK),
    "HTTP": _saying(b"GET / HTTP/1.1\r\nHost: here.example\r\n\r\n"),
    "a ClientHello in the clear": _saying(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _JUNK),
    "a line without an end": _saying(b"EHLO " + b"x" * 100_000),
    "a header without an end": _saying(b"x: " + b"y" * 400_000 + b"\r\n.\r\n", *_BEGUN),
    "a lone LF": _saying(b"Subject: x\n.\nMAIL FROM:<>\r\n", *_BEGUN),
    "commands ahead of STARTTLS": _saying(b"STARTTLS\r\nNOOP\r\n", "EHLO bad.example"),
    "octets instead of TLS": _saying(_JUNK, "EHLO bad.example", "STARTTLS"),
    "half a BDAT": _saying(b"BDAT 5000\r\nhello", *_BEGUN[:3]),
    "unknown recipients": _saying(b"RCPT TO:<nobody@here.example>\r\n" * 40, *_BEGUN[:2]),
    "a relay": _saying(b"RCPT TO:<eva@there.example>\r\n" * 5, *_BEGUN[:2]),
    "no base64": _saying(b"AUTH PLAIN !!!\r\n" * 5, "EHLO bad.example"),
    "a certificate that is not trusted": _tls_that_fails,
    "TLS that is reset": _tls_that_ends_early,
}  # fmt: skip
SLOW: dict[str, Act] = {
    "a wrong password": _wrong_password,
    **{f"silence at stage {stage}": _leaving(stage, _wait) for stage in range(1, len(_STAGES) + 1)},
    "silence instead of TLS": _leaving(0, _wait),
    "drips": _drip,
    "deaf": _deaf,
}
HOSTILE = {**QUICK, **SLOW}


# --- who is good ---


class Letter:
    """A good message, on its way until it is accepted; `unsure` counts replies that were lost."""

    def __init__(self, number: int, octets: int, far: bool) -> None:
        self.subject = f"good-{number}"
        self.far = far
        self.data = (
            f"From: <{HERE if far else 'carl@client.example'}>\r\nSubject: {self.subject}\r\n\r\n"
            + ("x" * 78 + "\r\n") * (octets // 80)
        ).encode() + b"end\r\n"
        self.attempts = self.unsure = 0
        self.accepted = False


class Traffic:
    """Clients of a server, good ones and hostile ones.

    `codes` counts how the server has refused good mail, `failed` what it must never say.
    """

    def __init__(self, server: Chasquid, seed: int = 1) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self.letters: list[Letter] = []
        self.codes: collections.Counter[str] = collections.Counter()
        self.ends: collections.Counter[str] = collections.Counter()
        self.begun = 0
        self._secret = base64.b64encode(f"\0{HERE}\0{server.users[HERE]}".encode()).decode()

    def new_letter(self, far: bool = False) -> Letter:
        octets = self._random.choice((200, 1000, 4000, 20_000))
        letter = Letter(next(self._numbers), octets, far)
        self.letters.append(letter)
        return letter

    async def be_hostile(self, kind: str) -> None:
        """Hold one session of `kind`; how the server takes it is of no interest here."""
        self.begun += 1
        self.ends[kind] += 1
        few = self._random.random() < 0.5  # some have one address for many sessions
        host = self._random.randrange(1, 5 if few else 255)
        port = self._server.tls_port if kind == "silence instead of TLS" else self._server.smtp_port
        talk = None
        with contextlib.suppress(*_TROUBLE):
            talk = await talk_to(port, f"127.{3 if few else 2}.0.{host}")
            await HOSTILE[kind](talk)
        if talk is not None:
            talk.close()

    async def deliver(self, letter: Letter) -> None:
        """Bring a message until it is accepted, with pauses."""
        pause = 0.5
        while not await self._attempt(letter):
            await asyncio.sleep(pause * (0.5 + self._random.random()))
            pause = min(pause * 1.5, 5.0)

    async def _attempt(self, letter: Letter) -> bool:
        self.begun += 1
        letter.attempts += 1
        address = f"127.1.0.{self._random.randrange(1, 255)}"
        talk, sent = None, False
        try:
            tls = trusting() if letter.far else None
            port = self._server.tls_port if letter.far else self._server.smtp_port
            talk = await talk_to(port, address, tls)
            replies = [await talk.reply()]
            sender, recipient = (HERE, FAR) if letter.far else ("carl@client.example", HERE)
            commands = [
                "EHLO client.example", *([f"AUTH PLAIN {self._secret}"] if letter.far else []),
                f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "DATA",
            ]  # fmt: skip
            for command in commands:
                if replies[-1][0] in "45":
                    break
                replies.append(await talk.ask(command))
            if replies[-1].startswith("354"):
                sent = True
                talk.say(letter.data + b".\r\n")
                replies.append(await talk.reply())
                letter.accepted = replies[-1].startswith("250")
            if not letter.accepted:
                self.codes[replies[-1][:3]] += 1
            else:
                talk.say(b"QUIT\r\n")
        except _TROUBLE as error:
            letter.unsure += sent
            self.codes[type(error).__name__] += 1
        finally:
            if talk is not None:
                talk.close()
        return letter.accepted

    def one(self, waiting: bool = True) -> Coroutine[Any, Any, None]:
        """Return one session of the mix: half of them bring good mail.

        Of those that are hostile, four in ten have the server wait, unless none may.
        """
        if self._random.random() < 0.5:
            return self.deliver(self.new_letter(far=self._random.random() < 0.2))
        quick = not waiting or self._random.random() < 0.6
        return self.be_hostile(self._random.choice(list(QUICK if quick else SLOW)))


class Far:
    """The server of dest.example: it takes everything, each message after `pause` seconds."""

    def __init__(self) -> None:
        self.pause = 0.0
        self.taken: collections.Counter[str] = collections.Counter()

    @contextlib.asynccontextmanager
    async def running(self, port: int) -> Any:
        server = await asyncio.start_server(self._serve, LOOPBACK, port, limit=1024 * 1024)
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(*_TROUBLE):
            writer.write(b"220 mx.dest.example\r\n")
            while line := await reader.readline():
                verb = line[:4].upper()
                if verb == b"DATA":
                    writer.write(b"354 go on\r\n")
                    data = await reader.readuntil(b"\r\n.\r\n")
                    await asyncio.sleep(self.pause)
                    self.taken[subject(data)] += 1
                writer.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 fine\r\n")
                if verb == b"QUIT":
                    break
        writer.close()


def subject(message: bytes) -> str:
    """Return the subject of a message, or "" if it is not one of the good ones."""
    found = re.search(rb"^Subject: (good-\d+)\r?$", message, re.MULTILINE)
    return found[1].decode() if found else ""


def arrived(server: Chasquid) -> collections.Counter[str]:
    """Return how often each of the good messages is in the Maildir of Ana; all must be whole."""
    found: collections.Counter[str] = collections.Counter()
    for path in (server.maildir(HERE) / "new").glob("*"):
        message = path.read_bytes()
        if name := subject(message):
            assert message.endswith(b"end\n"), f"{path} is cut short"
            found[name] += 1
    return found


def misdelivered(letters: list[Letter], found: collections.Counter[str]) -> list[str]:
    """Say which messages did not arrive as they must."""
    wrong = []
    for letter in letters:
        count = found[letter.subject]
        if not letter.accepted or not 1 <= count <= 1 + letter.unsure:
            wrong.append(
                f"{letter.subject}: accepted: {letter.accepted}, arrived {count} times, "
                f"{letter.unsure} of {letter.attempts} replies were lost"
            )
    return wrong


# --- so much, and twice as much ---


class Outcome(NamedTuple):
    """What was seen; rates are in sessions a second, memory in MB, once a second."""

    capacity: float
    offered: float
    letters: int
    attempts: int
    codes: dict[str, int]
    shed: int  # connections that were sent away at once
    memory: list[float]
    before: Held
    after: Held
    tasks: tuple[int, int]  # before and after
    wrong: list[str]  # what did not hold


async def _capacity(traffic: Traffic, seconds: float) -> float:
    """Return how many sessions of the mix are done in a second, if each waits for another."""
    begun, start = traffic.begun, time.monotonic()

    async def repeat() -> None:
        while time.monotonic() < start + seconds:
            await traffic.one(waiting=False)

    await asyncio.gather(*(repeat() for _ in range(30)))
    return (traffic.begun - begun) / (time.monotonic() - start)


async def _offer(traffic: Traffic, rate: float, seconds: float) -> set[asyncio.Task[None]]:
    """Begin `rate` sessions a second, whatever becomes of them; return those that go on."""
    tasks: set[asyncio.Task[None]] = set()
    start = time.monotonic()
    for count in itertools.count(1):
        now = time.monotonic()
        if now >= start + seconds:
            return tasks
        if len(tasks) < _AT_A_TIME:
            task = asyncio.create_task(traffic.one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0.0, start + count / rate - now))
    raise AssertionError("unreachable")


async def _watch(pid: int, memory: list[float]) -> None:
    while True:
        memory.append(held(pid).memory)
        await asyncio.sleep(1.0)


async def _quiet(server: Chasquid, before: Held) -> Held:
    """Wait until the server has as few descriptors as before; return what it holds."""
    end = time.monotonic() + PATIENCE
    while True:
        after = held(server.pid)
        if after.descriptors <= before.descriptors or time.monotonic() > end:
            return after
        await asyncio.sleep(0.1)


async def overload(server: Hurried, far: Far, seconds: float, times: float) -> Outcome:
    """Offer `times` what the server takes for so many seconds, and see what becomes of it."""
    traffic = Traffic(server)
    await traffic.deliver(traffic.new_letter())  # the Maildir is made
    await traffic.deliver(traffic.new_letter(far=True))
    before, tasks_before = held(server.pid), server.in_use().tasks
    capacity = await _capacity(traffic, max(3.0, seconds / 10))
    memory: list[float] = []
    watch = asyncio.create_task(_watch(server.pid, memory))
    begun, start = traffic.begun, time.monotonic()
    far.pause = 0.5
    tasks = await _offer(traffic, capacity * times, seconds)
    offered = (traffic.begun - begun) / (time.monotonic() - start)
    watch.cancel()
    far.pause = 0.0  # the rush is over
    done, left = await asyncio.wait(tasks, timeout=60 + seconds) if tasks else (set(), set())
    for task in left:
        task.cancel()
    while (
        any(server.data_dir.glob("queue/[nc]*/*")) and time.monotonic() < start + 3 * seconds + 120
    ):
        await asyncio.sleep(0.5)
    after, tasks_after = await _quiet(server, before), server.in_use().tasks
    wrong = [f"failed here: {task.exception()!r}" for task in done if task.exception()]
    wrong += misdelivered(traffic.letters, arrived(server) + far.taken)
    log = server.log()
    if "event=crash" in log or "Traceback" in log:
        wrong.append("the server's log tells of a fault of its own")
    third = len(memory) // 3
    middle, last = (statistics.median(part) for part in (memory[third:-third], memory[-third:]))
    if last > middle * 1.05:
        wrong.append(f"the memory grows, from {middle:.1f} to {last:.1f} MB")
    if after.descriptors > before.descriptors or after.threads > before.threads + _WORKERS:
        wrong.append(f"something is left: before {before}, after {after}")
    if tasks_after > tasks_before + 1:  # the queue has one that reads what is due
        wrong.append(f"tasks are left: {tasks_before} before, {tasks_after} after")
    shed = refused_connections(server)
    if not (shed or traffic.codes["421"]) or not traffic.codes["451"]:
        wrong.append(f"nothing was shed with 421, or with 451: {dict(traffic.codes)}")
    return Outcome(
        capacity, offered, len(traffic.letters), sum(one.attempts for one in traffic.letters),
        dict(traffic.codes), shed, memory, before, after, (tasks_before, tasks_after), wrong,
    )  # fmt: skip


def refused_connections(server: Chasquid) -> int:
    """Return how many connections the server has sent away at once, by its metrics."""
    import urllib.request

    url = f"http://{server.settings['monitoring_address']}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        text = answer.read().decode()
    return sum(
        int(float(count))
        for count in re.findall(r"^chasquid\S*connections\S*refused\S* (\S+)$", text, re.MULTILINE)
    )


@contextlib.contextmanager
def busy_server(directory: Path, far_port: int, monitoring_port: int) -> Iterator[Hurried]:
    """Run a server that is easily overloaded."""
    records = {
        "dest.example": {"MX": ["10 mx.dest.example."]}, "mx.dest.example": {"A": [LOOPBACK]},
    }  # fmt: skip
    with NameServer(records) as names:
        server = Hurried(
            directory, names, outgoing_smtp_port=far_port, max_connections=150,
            max_queue_items=100, max_user_messages_per_minute=100_000,
            max_user_recipients_per_minute=100_000,
            monitoring_address=f"{LOOPBACK}:{monitoring_port}",
        )  # fmt: skip
        with server:
            yield server


def report(outcome: Outcome) -> str:
    memory = outcome.memory
    lines = [
        f"taken one after another   {outcome.capacity:8.0f} sessions/s",
        f"offered                   {outcome.offered:8.0f} sessions/s",
        f"good messages             {outcome.letters:8}, in {outcome.attempts} attempts",
        f"refused or broken         {outcome.codes}",
        f"sent away at once         {outcome.shed:8} connections",
        f"memory                    {memory[0]:8.1f} MB at first, {max(memory):.1f} at most, "
        f"{memory[-1]:.1f} at last",
        f"before                    {outcome.before}",
        f"after                     {outcome.after}",
        f"tasks before and after    {outcome.tasks}",
        *outcome.wrong[:20],
    ]
    return "\n".join(lines)


def main() -> int:
    from interop.tools import free_port

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--times", type=float, default=2.0)
    arguments = parser.parse_args()

    async def all_of_it(server: Hurried, far_port: int) -> Outcome:
        far = Far()
        async with far.running(far_port):
            return await overload(server, far, arguments.seconds, arguments.times)

    with tempfile.TemporaryDirectory() as name:
        far_port = free_port()
        with busy_server(Path(name) / "server", far_port, free_port()) as server:
            outcome = asyncio.run(all_of_it(server, far_port))
    print(report(outcome))
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(main())
