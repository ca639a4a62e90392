# SPDX-License-Identifier: Apache-2.0
"""The archive is replaced under a running server, which must not notice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import smtplib
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from support import wait_for

from .server import Chasquid
from .tools import ANA, BOB, DORA, LOOPBACK, free_port, letter, subjects

TOP = Path(__file__).resolve().parent.parent.parent
ALIASES = "list: ana, dora@dest.example\nlog: | tee -a {}\naway: nobody@dest.example\n"

# Runs an archive as `python3 ARCHIVE …` does; SIGUSR1 writes down which modules are loaded.
RUN = """
import json, runpy, signal, sys
archive, noted = sys.argv[1:3]
def note(*_):
    with open(noted, "a") as file:
        file.write(json.dumps(sorted(sys.modules)) + "\\n")
signal.signal(signal.SIGUSR1, note)
sys.argv[:3] = [archive]
runpy.run_path(archive, run_name="__main__")
"""


def garbage(archive: Path) -> None:
    """Write over the file in its place, as `cp` does."""
    size = archive.stat().st_size
    with archive.open("r+b") as file:
        file.write(os.urandom(size))


def another_build(archive: Path) -> None:
    """Put another version in its place, as `install` does."""
    source = archive.with_name("other")
    source.mkdir()
    for name in ("chasquid.py", "build_zipapp.py", "pyproject.toml"):
        shutil.copy(TOP / name, source)
    text = (source / "chasquid.py").read_text()
    text = text.replace('__version__ = "', '__version__ = "9.').replace("import spf", "import spg")
    (source / "chasquid.py").write_text(text)
    build(source, archive.with_name("new.pyz"))
    archive.unlink()
    archive.with_name("new.pyz").rename(archive)


def gone(archive: Path) -> None:
    archive.unlink()


def build(source: Path, target: Path) -> None:
    subprocess.run(
        [sys.executable, str(source / "build_zipapp.py")], cwd=source, check=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    shutil.copy(source / "chasquid.pyz", target)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("build")
    for name in ("chasquid.py", "build_zipapp.py", "pyproject.toml"):
        shutil.copy(TOP / name, copy)
    target = copy / "built.pyz"
    build(copy, target)
    return target


class FromArchive(Chasquid):
    """A server that runs from an archive of its own, and tells which modules it has loaded."""

    archive = Path()

    def prepare(self, built: Path) -> None:
        self.archive = self.directory / "chasquid.pyz"
        shutil.copy(built, self.archive)

    @property
    def serve_command(self) -> list[str]:
        arguments = [str(self.archive), str(self.noted), "--config-dir", str(self.config_dir)]
        return [sys.executable, "-I", "-S", "-c", RUN, *arguments, "serve"]

    @property
    def noted(self) -> Path:
        return self.directory / "modules"

    def start(self) -> None:
        super().start()
        wait_for(lambda: "event=ready" in self.log(), "the server to be ready")

    def modules(self) -> set[str]:
        """Return the names of all modules that the server has loaded by now."""
        before = self.noted.read_text() if self.noted.exists() else ""
        os.kill(self.pid, signal.SIGUSR1)
        wait_for(lambda: self.noted.exists() and self.noted.read_text() != before, "the modules")
        return set(json.loads(self.noted.read_text().splitlines()[-1]))


@pytest.mark.parametrize("replace", [garbage, another_build, gone])
def test_a_server_goes_on_when_its_archive_is_replaced(
    place: Path, names, start, built: Path, replace: Callable[[Path], None]
) -> None:
    there = start(Chasquid, names, users={DORA: "secret"}, hostname="mx.dest.example")
    web = free_port()
    piped = place / "piped"
    here = FromArchive(
        place / "here", names, users={ANA: "secret", BOB: "hidden"},
        aliases={"here.example": ALIASES.format(piped)}, outgoing_smtp_port=there.smtp_port,
        monitoring_address=f"{LOOPBACK}:{web}",
    )  # fmt: skip
    here.prepare(built)
    record = here.command("dkim-keygen", "here.example", "sel").stdout
    key = record[record.index("v=DKIM1") :].replace('"', "").split("\n")[0]
    names.records |= {
        "dest.example": {"MX": ["10 mx.dest.example."], "TXT": ['"v=spf1 ip4:127.0.0.1 -all"']},
        "mx.dest.example": {"A": [LOOPBACK]},
        "_dmarc.dest.example": {"TXT": ['"v=DMARC1; p=reject"']},
        "bank.example": {"TXT": ['"v=spf1 -all"']},
        "_dmarc.bank.example": {"TXT": ['"v=DMARC1; p=reject"']},
        "sel._domainkey.bank.example": {"TXT": ['"v=DKIM1; p=' + key.partition("p=")[2] + '"']},
    }
    with here:
        before = here.modules()
        replace(here.archive)

        # from our users: signed, to elsewhere, to a list, to a pipe, and back as a bounce
        here.submit(ANA, [DORA], letter("signed", ANA, DORA))
        [signed] = there.wait_for_letters(DORA)
        assert signed["DKIM-Signature"] and "s=sel" in signed["DKIM-Signature"]
        here.submit(ANA, ["list@here.example"], letter("to the list", ANA, "list@here.example"))
        here.submit(ANA, ["log@here.example"], letter("to a pipe", ANA, "log@here.example"))
        here.submit(ANA, ["away@here.example"], letter("bounces", ANA, "away@here.example"))
        here.submit(ANA, ["bob@here.example"], letter("große Grüße", ANA, BOB))
        wait_for(lambda: piped.exists() and "to a pipe" in piped.read_text(), "the pipe")
        here.wait_for_letters(BOB)
        letters = here.wait_for_letters(ANA, 2)
        assert "Mail delivery failed: returning message to sender" in subjects(letters)

        # from elsewhere: SPF, DMARC, and a signature that does not fit
        with here.smtp() as client:
            client.ehlo()
            client.sendmail(DORA, [BOB], letter("passes", DORA, BOB).as_bytes())
            code, text = client.mail("eva@bank.example")
            assert code == 550 and b"5.7.23" in text
            forged = letter("forged", "eva@bank.example", BOB)
            forged["DKIM-Signature"] = (
                "v=1; a=rsa-sha256; c=relaxed/relaxed; d=bank.example; s=sel; "
                "h=from; bh=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=; b=AAAA"
            )
            with pytest.raises(smtplib.SMTPDataError) as refused:
                client.sendmail(DORA, [BOB], forged.as_bytes())
            assert refused.value.smtp_code == 550 and b"DMARC" in refused.value.smtp_error
        passed = here.wait_for_letters(BOB, 2)
        assert any("spf=pass" in str(each["Authentication-Results"]) for each in passed)

        # the operator
        for path, said in (("/", b"here.example"), ("/metrics", b"chasquid_messages_total")):
            with urllib.request.urlopen(f"http://{LOOPBACK}:{web}{path}", timeout=60) as page:
                assert said in page.read()
        resolved = subprocess.run(
            [sys.executable, str(TOP / "chasquid.py"), "--config-dir", str(here.config_dir),
             "aliases-resolve", "list@here.example"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert "dora@dest.example" in resolved.stdout
        here.hang_up()
        wait_for(lambda: "event=reloaded" in here.log(), "a reload")

        assert here.modules() - before == set()
        assert "event=error " not in here.log()


@pytest.mark.parametrize("replace", [garbage, gone])
def test_capture_goes_on_when_its_archive_is_replaced(
    place: Path, built: Path, replace: Callable[[Path], None]
) -> None:
    archive, noted = place / "chasquid.pyz", place / "modules"
    shutil.copy(built, archive)
    ports = ["--smtp", f"{LOOPBACK}:{free_port()}", "--web", f"{LOOPBACK}:{free_port()}"]
    command = [sys.executable, "-I", "-S", "-c", RUN, str(archive), str(noted), "capture", *ports]

    def modules() -> set[str]:
        before = noted.read_text() if noted.exists() else ""
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: noted.exists() and noted.read_text() != before, "the modules")
        return set(json.loads(noted.read_text().splitlines()[-1]))

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "Ctrl-C ends" not in process.stdout.readline():
            pass
        try:
            before = modules()
            replace(archive)
            message = letter("große Grüße", ANA, "eva@münchen.example")
            message.add_alternative("<p>Hello <a href='https://a.example'>here</a></p>", "html")
            message.add_attachment(b"hello", "text", "plain", filename="größe.txt")
            with smtplib.SMTP(LOOPBACK, int(ports[1].rpartition(":")[2]), timeout=60) as client:
                client.ehlo()
                client.sendmail(
                    ANA, ["eva@münchen.example"], message.as_bytes(), ["SMTPUTF8", "BODY=8BITMIME"]
                )
            top = f"http://{ports[3]}/"
            with urllib.request.urlopen(
                f"{top}api/v1/search?query=gro%20before:2100-01-01", timeout=20
            ) as page:
                [listed] = json.load(page)["messages"]
            page_path = f"message/{listed['ID']}?view=checks"
            for path in ("", page_path, f"api/v1/message/{listed['ID']}"):
                with urllib.request.urlopen(top + path, timeout=60) as page:
                    assert page.read()
            later = modules() - before
            # the codecs of charsets are Python's own, and there are a hundred of them
            assert {name for name in later if not name.startswith("encodings.")} == set()
        finally:
            process.terminate()
            assert process.wait(20) == 0
