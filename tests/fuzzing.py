# SPDX-License-Identifier: Apache-2.0
"""The parsers that read from the network or from a file, and hostile inputs for them.

    python -m tests.fuzzing [--seconds 600] [NAME …]

Each row of PARSERS says what takes the octets, and which exceptions may come of them; any other,
or more processor time than LIMIT for each kB, is a mistake. The inputs begin with those of
tests/data/corpus/NAME, which are cut, joined, repeated and mixed with TOKENS by Hypothesis, which
also makes the one that fails as small as it can. The command puts it into the corpus, from where
every later run of the tests takes it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import itertools
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import Inline, Server, Zone, certificate, run

import chasquid

CORPUS = Path(__file__).resolve().parent / "data" / "corpus"
LIMIT = 0.05  # seconds of processor time for each kB, and for an input of less
LARGEST = 40_000  # octets of an input
NOW = 1_700_000_000.0
DOMAIN = "there.example"
TOKENS = [
    *(bytes([octet]) for octet in b"\0\t\n\r \"#%&'()*+,-./0:;<=>?@[\\]^_`{|}~\x7f\x80\xc3\xff"),
    b"\r\n", b"\r\n.\r\n", b"\r\n\r\n", b"\r\n ", b"\n\n", b"..", b"<>", b"()", b'""', b"{}", b"[]",
    b"-1", b"9" * 30, b"0x", b"1e400", b"true", b"null", b"\\u0000", b"\\377", b"=?utf-8?b??=",
    b"xn--", b"\xc3\xa9", b"\xe2\x80\x8d", b"\xef\xbc\x8e", b"\xf0\x9f\x92\xa9", b"\xed\xa0\x80",
    b"\xc4\xb0", b"\xc2\xad", b"%{s}", b"%{d1r}", b"%%", b"+fwd_from=", b"IPv6:", b"a@b.example",
]  # fmt: skip


class Parser(NamedTuple):
    """What takes the octets, which exceptions may come of it, and what often stands in them."""

    call: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...] = ()
    tokens: tuple[bytes, ...] = ()


class Mistake(AssertionError):
    """A parser did with an input what it must not."""


def words(text: str) -> tuple[bytes, ...]:
    return tuple(text.encode().split())


def text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# --- SMTP ---


def command(data: bytes) -> None:
    _, argument = chasquid.parse_command(data)
    for keyword in ("FROM:", "TO:"):
        with contextlib.suppress(chasquid.Refused):
            path = chasquid.parse_path(argument, keyword)
            for name, value in path.parameters.items():
                with contextlib.suppress(chasquid.Refused):
                    chasquid.parse_notify(value)
                chasquid.from_xtext(chasquid.check_xtext(name, value, 500, utf8=True))
    chasquid.is_host_name(argument)


def address(data: bytes) -> None:
    for call in (
        chasquid.parse_address, chasquid.normalize_address, chasquid.domain_to_unicode,
        chasquid.domain_to_ascii, chasquid.normalize_user, chasquid.local_part_content,
        chasquid.address_from_person, lambda given: chasquid.host_and_port(given, 25),
    ):  # fmt: skip
        with contextlib.suppress(chasquid.Refused, chasquid.ChasquidError, ValueError):
            call(text(data))


def reply(data: bytes) -> None:
    code, _, said = chasquid.parse_reply_line(data)
    chasquid.Reply(code, *chasquid.parse_status(code, said)).encode()


def decoded(pieces: list[bytes]) -> tuple[bytes, bytes] | None:
    """What DATA yields, and what comes after it; None if it is broken off, or has no end."""
    decoder, content = chasquid.DataDecoder(), b""
    try:
        for number, piece in enumerate(pieces):
            content += decoder.feed(piece)
            if decoder.done:
                return content, decoder.rest + b"".join(pieces[number + 1 :])
    except chasquid.BareNewline:
        pass
    return None


def data_of_message(data: bytes) -> None:
    whole = decoded([data])
    assert decoded([data[at : at + 7] for at in range(0, len(data), 7)]) == whole
    assert whole is None or whole[0].count(b"\n") == whole[0].count(b"\r\n")
    encoder = chasquid.DataEncoder()
    sent = encoder.feed(data) + encoder.end()
    assert sent.endswith(b"\r\n.\r\n") or data == b""


# --- messages ---


def header(data: bytes) -> None:
    block = chasquid.header_block(data)
    fields = chasquid.check_header(
        lambda: chasquid.header_fields(data if block is None else block), 50, True
    )
    assert b"".join(field.raw for field in fields) == (data if block is None else block)
    chasquid.names_signed(fields)
    chasquid.is_automatic(data)
    for field in fields[:20]:
        author(field.value)


def author(data: bytes) -> None:
    assert len(chasquid.author_domains(data)) <= chasquid.AUTHORS_LIMIT + 1
    chasquid.author_addresses(data)


def message(data: bytes) -> None:
    read = chasquid.ReadMessage(data)
    for name in ("subject", "from", "to"):
        read.header(name)
        read.addresses(name)
    read.links()
    chasquid.html_warnings(read.html)
    chasquid.code_in(read.text)
    for part in (*read.attachments, *read.inlines):
        assert part.title


def search(data: bytes) -> None:
    chasquid.parse_search(text(data))


# --- what the DNS and other servers say ---


def checked(check: Callable[[chasquid.Names, Any], Any], record: bytes) -> Any:
    """What comes of a check whose records are `record` at each name that matters."""
    names = (DOMAIN, f"s._domainkey.{DOMAIN}", f"_dmarc.{DOMAIN}", "_dmarc.example")
    zone = Zone({(name, "TXT"): [record.decode("latin-1")] for name in names})

    async def main(loop: Any) -> Any:
        return await check(chasquid.Names(loop, zone.ask), loop)

    return run(main, workers=Inline())


def spf(data: bytes) -> None:
    def check(names: chasquid.Names, loop: Any) -> Any:
        return chasquid.check_spf(names, loop, "192.0.2.1", f"eva@{DOMAIN}", DOMAIN, "here.example")

    found = checked(check, data)
    line = chasquid.received_spf(found, "192.0.2.1", f"eva@{DOMAIN}", DOMAIN, "here.example")
    assert chasquid.header_fields(line)[0].raw == line and line.isascii()


def dkim(data: bytes) -> None:
    """A message, and in front of it a line with the record of its key."""
    record, _, letter = data.partition(b"\r\n")
    block = chasquid.header_block(letter) or letter
    body = letter[len(block) + 2 :]
    fields = chasquid.header_fields(block)
    for found in checked(
        lambda names, loop: chasquid.verify_signatures(names, loop, fields, lambda: [body]), record
    ):
        assert found.result in (
            "pass",
            "none",
            "neutral",
            "fail",
            "policy",
            "permerror",
            "temperror",
        )


def dmarc(data: bytes) -> None:
    checked(
        lambda names, loop: chasquid.check_dmarc(names, loop, [DOMAIN], chasquid.Spf("none"), []),
        data,
    )


def sts_policy(data: bytes) -> None:
    chasquid.parse_sts_policy(data, "1", NOW).allows("mx.there.example")


def tlsa(data: bytes) -> None:
    found = chasquid.parse_tlsa(text(data))
    if found is not None:
        found.matches(data)


def acme(data: bytes) -> None:
    """An answer of an authority: a line for Retry-After, and the body."""
    after, _, body = data.partition(b"\n")
    answer = chasquid.AcmeAnswer(429, {"retry-after": after.decode("latin-1")}, body)
    answer.pause(NOW)
    chasquid.acme_terms("https://authority.example", lambda *_: answer._replace(status=200))
    chasquid.acme_terms("https://authority.example", lambda *_: answer)


# --- files ---


def text_format(data: bytes) -> None:
    problems: list[chasquid.ConfigError] = []
    chasquid.parse_text_format(data, "file", problems)
    chasquid.parse_text_format(data, "file")
    assert not problems


@functools.cache
def place() -> Path:
    """A directory for files that are read by their names; it goes away with the process."""
    kept = tempfile.TemporaryDirectory(prefix="chasquid-fuzz-")
    _KEPT.append(kept)
    directory = Path(kept.name)
    (directory / "chasquid.conf").touch()
    return directory


_KEPT: list[Any] = []


def config(data: bytes) -> None:
    chasquid.load_config(str(place()), text(data))


def queue_file(data: bytes) -> None:
    """A line with the size in the file's name, and the file."""
    size, _, content = data.partition(b"\n")
    number = int(size[:9]) if size[:9].isdigit() else 0
    path = place() / f"abcdefghij,S={number}"
    path.write_bytes(content)
    try:
        item = chasquid.read_item(str(path))
        item.journal_line(NOW)
        chasquid.queue_line(item, NOW)
    finally:
        path.unlink()


def go_queue_file(data: bytes) -> None:
    id, (size, parts) = chasquid.item_from_go(data, "file", NOW)
    path = place() / f"{id},S={size}"
    path.write_bytes(b"".join(parts))
    try:
        chasquid.read_item(str(path))  # whatever was taken over can be read
    finally:
        path.unlink()


def domain_info(data: bytes) -> None:
    path = place() / "domaininfo"
    path.write_bytes(data)
    chasquid.read_domain_info(str(path))


def certificate_file(data: bytes) -> None:
    for pem in (data, as_pem("CERTIFICATE", data)):
        chasquid.certificate_names(pem)
        for call in (chasquid.certificate_validity, chasquid.is_self_signed):
            with contextlib.suppress(ValueError):
                call(pem)
    for read in (chasquid.public_key_info, chasquid.rsa_public_numbers):
        with contextlib.suppress(ValueError, IndexError):
            read(data)


def private_key(data: bytes) -> None:
    forms = [data, *(as_pem(kind, data) for kind in ("PRIVATE KEY", "RSA PRIVATE KEY"))]
    for pem in (*forms, as_pem("EC PRIVATE KEY", data)):
        for read in (chasquid.parse_private_key, chasquid.parse_ec_key):
            with contextlib.suppress(chasquid.ConfigError):
                read(pem, "file")


def as_pem(kind: str, der: bytes) -> bytes:
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (
        kind.encode(), base64.encodebytes(der), kind.encode(),
    )  # fmt: skip


def log_line(data: bytes) -> None:
    _, fields = chasquid.parse_event(text(data))
    for value in fields.values():
        chasquid.addresses_in(value)


def postfix(data: bytes) -> None:
    """The file in the place of each of those that are read."""
    path = place() / "postfix"
    path.write_bytes(data.replace(b"/", b"."))  # it may name others to be read
    for kind in ("aliases", "virtual", "mailboxes", "passwords"):
        with contextlib.suppress(chasquid.ChasquidError):
            files = chasquid.PostfixFiles("here.example", **{kind: str(path)})
            chasquid.import_postfix(chasquid.load_config(str(place())), files, dry_run=True)


def letter(data: bytes) -> None:
    """Words for the command sendmail, one a line, and below an empty line the message."""
    said, _, message = data.partition(b"\n\n")
    options = chasquid.parse_sendmail_options(text(said).split("\n"))
    chasquid.make_letter(message, options, "ana", "here.example")


def backup(data: bytes) -> None:
    path, top = place() / "backup.tar", place() / "restored"
    path.write_bytes(data)
    kept = f'data_dir: "{top}/data"\nmaildir: "{top}/mail/%to%"\n'
    try:
        chasquid.restore_backup(str(path), str(top / "config"), kept)
    finally:
        shutil.rmtree(top, ignore_errors=True)


# --- whole servers ---


@functools.cache
def server() -> Server:
    """A server that runs until the process ends."""
    started = Server(place() / "server", monitoring_address="127.0.0.1:0")
    started.start()
    return started


def conversation(port: int, data: bytes) -> bytes:
    """Send all of `data`, end, and return what comes back."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
    assert not server().daemon.log.counters["crashes",], server().log[-3000:]
    return received


def smtp(data: bytes) -> None:
    for line in conversation(server().port(), data).split(b"\r\n")[:-1]:
        chasquid.parse_reply_line(line)


def http(data: bytes) -> None:
    [raw] = server().daemon._listeners.monitoring
    answer = conversation(raw.getsockname()[1], data)
    assert not answer or answer.startswith(b"HTTP/1.")


def load() -> None:
    """Have all libraries loaded, so that no input is charged for that."""
    chasquid.load_libraries()
    server()


SMTP_WORDS = words(
    "EHLO HELO MAIL FROM: RCPT TO: DATA BDAT LAST RSET QUIT AUTH PLAIN LOGIN STARTTLS VRFY NOOP"
    " SIZE= BODY=8BITMIME SMTPUTF8 NOTIFY=NEVER ORCPT=rfc822; RET=HDRS ENVID= postmaster"
    " ana@here.example"
)
MAIL_WORDS = words(
    "From: To: Received: Subject: Content-Type: multipart/mixed; text/html charset= boundary="
    " name*0*= filename*=utf-8'' Content-Transfer-Encoding: base64 quoted-printable =3D --b --b--"
    " <!-- --> <a href=' &#x &amp; </style> <style> DKIM-Signature: Auto-Submitted: format=flowed"
)
DKIM_WORDS = words(
    "v=1; a=rsa-sha256; a=ed25519-sha256; c=relaxed/relaxed; d=there.example; s=s; h=from:from;"
    " bh= b= l=0; t= x= i=@ q=dns/txt; z= v=DKIM1; k=rsa; p= g= n= h=sha256; t=y:s;"
)
PARSERS = {
    "acme": Parser(acme, (chasquid.AcmeFailed,), words('{" "type": "detail": "meta": [ ] {')),
    "address": Parser(address),
    "aliases": Parser(
        lambda data: chasquid.parse_aliases(data, "file", "here.example"),
        (chasquid.ConfigError,),
        words("via | , : # * ana ben@there.example / mx:25"),
    ),
    "author": Parser(author, (), MAIL_WORDS),
    "backup": Parser(backup, (chasquid.ChasquidError,), (b"config/", b"data/", b"ustar\x0000")),
    "certificate": Parser(certificate_file),
    "command": Parser(command, (chasquid.Refused,), SMTP_WORDS),
    "config": Parser(config, (chasquid.ConfigError,), words("hostname: data_dir: \" { } < > [ ]")),
    "data": Parser(data_of_message),
    "dkim": Parser(dkim, (ValueError,), MAIL_WORDS + DKIM_WORDS),
    "dmarc": Parser(
        dmarc, (), words("v=DMARC1; p=reject; sp=none np= adkim=s aspf=r rua= psd=y t=y")
    ),
    "domaininfo": Parser(domain_info, (chasquid.ConfigError,), words("incoming_sec_level: PLAIN")),
    "go-queue": Parser(
        go_queue_file,
        (chasquid.ConfigError,),
        words("ID: from: rcpt < address: type: PIPE status: SENT > data: created_at_ts: via:"),
    ),
    "header": Parser(header, (ValueError, chasquid.Refused), MAIL_WORDS),
    "http": Parser(http, (), words("GET POST /metrics HTTP/1.1 Content-Length: Host: Expect:")),
    "letter": Parser(
        letter, (chasquid.NotSent,), MAIL_WORDS + words("-t -i -f -F -bm -- Bcc: Cc: Resent-To:")
    ),
    "log": Parser(log_line, (), words('event= id= text=" to=<a@b> \\" \\\\ "')),
    "message": Parser(message, (), MAIL_WORDS),
    "postfix": Parser(
        postfix, (), words("ana: ben, @there.example :include: | {SCRYPT} {CRYPT} :")
    ),
    "private-key": Parser(private_key),
    "proxy": Parser(
        chasquid.parse_proxy_header,
        (ValueError,),
        (b"PROXY ", b"TCP4 ", b"UNKNOWN", b"\r\n\r\n\0\r\nQUIT\n", b"\x21\x11\x00\x0c"),
    ),
    "queue": Parser(
        queue_file,
        (chasquid.UnreadableItem, chasquid.NewerItem),
        words('{" "version": "id": "recipients": "sender": [] "received": 1e400 NaN -1'),
    ),
    "reply": Parser(reply, (ValueError,), words("250 250- 550 5.1.1 2.0.0 999 000")),
    "search": Parser(search, (chasquid.HttpRefused,), words("from: before: larger: has: is: 10KB")),
    "smtp": Parser(smtp, (), SMTP_WORDS + tuple(word + b"\r\n" for word in SMTP_WORDS)),
    "spf": Parser(
        spf,
        (),
        words("v=spf1 include: redirect= exp= a mx ptr ip4: ip6: exists: -all ?all /24 //64 %{ir}"),
    ),
    "sts-policy": Parser(
        sts_policy, (ValueError,), words("version: STSv1 mode: enforce mx: max_age: *.")
    ),
    "text-format": Parser(text_format, (chasquid.ConfigError,)),
    "tlsa": Parser(tlsa, (), words("3 1 1 2 0 00 ab")),
    "users": Parser(
        lambda data: chasquid.parse_users(data, "file"),
        (chasquid.ConfigError,),
        words('users: { key: value: scrypt: logN: r: p: keyLen: salt: encrypted: plain: denied: }'),
    ),
}  # fmt: skip


def corpus(name: str) -> list[bytes]:
    """The inputs that are kept for a parser, and an empty one."""
    made = [b""]
    if name in ("certificate", "private-key"):
        made += [part.encode() for part in certificate("mail.here.example")]
        made += [base64.b64decode("".join(part.decode().split("\n")[1:-2])) for part in made[1:]]
    return made + [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


@st.composite
def inputs(draw: Callable[[Any], Any], name: str) -> bytes:
    """Inputs of the corpus, changed."""
    seeds, tokens = corpus(name), [*PARSERS[name].tokens, *TOKENS]
    data = draw(st.sampled_from(seeds))
    piece = st.one_of(st.sampled_from(tokens), st.binary(max_size=8))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from([0, 0, 1, 2, 8, 64, len(data)]))
        new = draw(st.one_of(piece, st.just(b""), st.just(data[at:end])))
        times = draw(st.sampled_from([1, 1, 1, 2, 10, 300, 3000]))
        data = (data[:at] + new * times + data[end:])[:LARGEST]
    return data


def attempt(
    name: str, data: bytes, processor_time: Callable[[], float] = time.process_time
) -> None:
    """Have a parser take `data`. Raises Mistake."""
    limit = LIMIT * max(1.0, len(data) / 1000)
    for last in (False, False, True):  # whatever else the machine does may cost time too
        began = processor_time()
        try:
            PARSERS[name].call(data)
        except PARSERS[name].allowed:
            pass
        except Exception as error:
            raise Mistake(f"{name} raises {type(error).__name__}: {error}") from error
        used = processor_time() - began
        if used <= limit:
            return
        if last:
            raise Mistake(f"{name} takes {used:.3f} s for {len(data)} octets")


def attempt_many(name: str, count: int, seed: int, before: float = 1e18) -> int:
    """Try `count` inputs, or fewer if time.monotonic() is beyond `before`. Raises Mistake."""
    tried = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(inputs(name))
    def search(data: bytes) -> None:
        nonlocal tried
        if time.monotonic() < before:
            tried += 1
            failed.data = data
            try:
                attempt(name, data)
            except Mistake as mistake:
                if not failed.told:
                    print(f"{mistake}; it is made smaller now", file=sys.stderr, flush=True)
                failed.told = True
                raise

    failed.data, failed.told = b"", False
    search()
    return tried


class _Failed:
    data = b""
    told = False


failed = _Failed()  # what was tried last: if a search has failed, the smallest input that fails


def attempt_for(seconds: float, names: list[str]) -> Iterator[tuple[str, int]]:
    """Share out `seconds` among parsers; yield how many inputs each has taken. Raises Mistake."""
    for number, name in enumerate(names):
        end, tried = time.monotonic() + seconds / len(names), 0
        for seed in itertools.count(int(NOW) + number):
            tried += attempt_many(name, 200, seed ^ int(time.time()), before=end)
            if time.monotonic() >= end:
                break
        yield name, tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PARSERS))
    arguments = parser.parse_args()
    load()
    status = 0
    names = arguments.names or list(PARSERS)
    for name in names:
        try:
            for _, tried in attempt_for(arguments.seconds / len(names), [name]):
                print(f"{name}: {tried} inputs", flush=True)
        except Exception as mistake:  # a Mistake, or that one does not come each time
            status = 1
            kept = CORPUS / name / hashlib.sha256(failed.data).hexdigest()[:12]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(failed.data)
            print(f"{mistake}\n  for {failed.data[:200]!r}, kept as {kept}", flush=True)
    server().stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
