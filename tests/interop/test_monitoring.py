# SPDX-License-Identifier: Apache-2.0
"""Prometheus reads the metrics, and Chromium shows the page."""

from __future__ import annotations

import html
import os
import shutil
import urllib.request
from pathlib import Path

import pytest
from support import wait_for

from .peers import Prometheus
from .server import USERS, Chasquid
from .tools import LOOPBACK, free_port, letter, program, run

EVIL = "<script>document.title='owned'</script>"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def chasquid(start, names):
    """A server with a message that was delivered, and one that waits."""
    address = f"{LOOPBACK}:{free_port()}"
    chasquid = start(Chasquid, names, users=USERS, monitoring_address=address)
    names.records["slow.example"] = "SERVFAIL"
    for recipient in ("bob@here.example", "eva@slow.example"):
        message = letter("private matters", "ana@here.example", recipient, body="Hush, hush.\n")
        chasquid.submit("ana@here.example", [recipient], message)
    with chasquid.smtp() as client:
        client.docmd("EHLO", EVIL)
        client.docmd("EHLO", "client.example")
    chasquid.wait_for_letters("bob@here.example")
    log = chasquid.directory / "mail.log"
    wait_for(lambda: "event=next-attempt" in log.read_text(), "the first attempt")
    return chasquid


def url(chasquid, path=""):
    return f"http://{chasquid.settings['monitoring_address']}/{path}"


def get(chasquid, path, accept=""):
    request = urllib.request.Request(url(chasquid, path), headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_promtool_finds_nothing_wrong_with_the_metrics(chasquid):
    kind, text = get(chasquid, "metrics")
    assert kind.startswith("text/plain; version=0.0.4")
    done = run(program("promtool"), "check", "metrics", input=text, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_prometheus_reads_the_metrics(start, chasquid):
    prometheus = start(Prometheus, chasquid.settings["monitoring_address"])
    wait_for(lambda: list(prometheus.query("up").values()) == [1.0], "a look at us")
    assert list(prometheus.query('chasquid_messages_total{state="queued"}').values()) == [2]
    assert list(prometheus.query("chasquid_queue_messages").values()) == [1]
    [labels] = prometheus.query("chasquid_build_info")
    assert any(label.startswith("version=") for label in labels)
    sent = 'chasquid_deliveries_total{route="local",result="sent"}'
    message = letter("one more", "ana@here.example", "bob@here.example")
    chasquid.submit("ana@here.example", ["bob@here.example"], message)
    wait_for(lambda: list(prometheus.query(sent).values()) == [2], "the counter to count")


def chromium(place, chasquid, *options):
    """Let Chromium load the page."""
    command = [program("chromium"), "--headless=new", "--disable-gpu", "--no-first-run"]
    command += ["--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={place}/chromium"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")
    return run(*command, *options, url(chasquid)).stdout


def test_chromium_shows_what_waits_and_runs_nothing(place, chasquid):
    dom = html.unescape(chromium(place, chasquid, "--dump-dom"))
    [id] = chasquid.queue_ids()
    assert f"<code>{id}</code> from <ana@here.example>" in dom
    assert "eva@slow.example" in dom and "deferred</span>: " in dom
    assert "<title>chasquid at mail.here.example</title>" in dom
    assert "owned" in dom.partition("EHLO <script>")[2][:40]
    for secret in ("private matters", "Hush, hush", "hidden", '"secret"'):
        assert secret not in dom


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("desktop-light", ["--window-size=1200,900"]),
        ("desktop-dark", ["--window-size=1200,900", "--blink-settings=preferredColorScheme=0"]),
        ("phone-light", ["--window-size=390,844"]),
        ("phone-dark", ["--window-size=390,844", "--blink-settings=preferredColorScheme=0"]),
    ],
)
def test_chromium_takes_a_picture_of_the_page(place, chasquid, name, options):
    picture = place / f"{name}.png"
    chromium(place, chasquid, f"--screenshot={picture}", *options)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000, "an empty page is smaller"
    if pictures := os.environ.get("PICTURES"):
        Path(pictures).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, pictures)
