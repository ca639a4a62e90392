# SPDX-License-Identifier: Apache-2.0
"""Chromium shows captured mail, and hostile mail does nothing in it."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import wait_for
from test_capture_api import LETTER, RICH, Running

from .tools import free_port, program

DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9Q"
    "DwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver, 11


class Browser:
    """A session of chromedriver, spoken to in plain WebDriver."""

    def __init__(self, place: Path, *options: str) -> None:
        port = free_port()
        self._process = subprocess.Popen(
            [program("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL
        )
        self._base = f"http://127.0.0.1:{port}"
        wait_for(lambda: self._answers("/status"), "chromedriver")
        words = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        words += ["--hide-scrollbars", f"--user-data-dir={place}/chromium-{port}", *options]
        if os.geteuid() == 0:
            words.append("--no-sandbox")
        chrome = {"binary": program("chromium"), "args": words}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": chrome}}}
        self._base += "/session/" + self.call("/session", wanted)["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("", method="DELETE")
        finally:
            self._process.terminate()
            self._process.wait(20)

    def _answers(self, path: str) -> bool:
        try:
            return bool(self.call(path, method="GET"))
        except OSError:
            return False

    def call(self, path: str, body: object = None, method: str = "POST"):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script: str):
        return self.call("/execute/sync", {"script": script, "args": []})

    def shows(self, condition: str) -> None:
        wait_for(lambda: self.run(f"return {condition}"), condition)

    def press(self, key: str) -> None:
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def click(self, css: str) -> None:
        """Click what is there; the page may just be making it anew, so more than once is tried."""

        def clicked() -> bool:
            try:
                found = self.call("/element", {"using": "css selector", "value": css})
                self.call(f"/element/{found[ELEMENT]}/click")
            except urllib.error.HTTPError as error:
                if error.code == 404:  # not there, or not any more
                    return False
                raise
            return True

        wait_for(clicked, f"a click on {css}")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.call("/goog/cdp/execute", command)

    def dark(self) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        self.call("/goog/cdp/execute", command)

    def picture(self, name: str) -> None:
        data = base64.b64decode(self.call("/screenshot", method="GET"))
        assert data.startswith(b"\x89PNG")
        if pictures := os.environ.get("PICTURES"):
            Path(pictures).mkdir(parents=True, exist_ok=True)
            Path(pictures, f"{name}.png").write_bytes(data)


@pytest.fixture
def inbox(tmp_path):
    with Running(tmp_path) as running:
        yield running


@pytest.fixture
def browser(place, inbox):
    with Browser(place) as browser:
        browser.size(1280, 800)
        browser.call("/url", {"url": f"http://127.0.0.1:{inbox.port}/"})
        yield browser


@pytest.fixture
def asked():
    """The paths that were asked for at a web server elsewhere, whose port is the first."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(base64.b64decode(DOT))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        seen.append(server.server_port)
        yield seen
        server.shutdown()


HOSTILE = """<html><head><meta http-equiv=refresh content='0;url=http://{there}/refresh'>
<base href=http://{there}/><link rel=stylesheet href=http://{there}/style.css>
<link rel=preconnect href=http://{there}><style>@import 'http://{there}/import.css';
h1 {{ background: url(http://{there}/css.png) }}</style></head>
<body onload="fetch('http://{there}/onload')"><script>parent.document.title = 'owned';
new Image().src = 'http://{there}/script'</script><h1>Welcome aboard</h1>
<p>Your account is ready. <a href="http://{there}/link">Take a look</a></p>
<img id=dot src="cid:dot@x" width=40 height=40><img src="http://{there}/tracker.png">
<svg onload="top.location='http://{there}/svg'"><image href="http://{there}/svg.png"/></svg>
<iframe src=http://{there}/frame></iframe><object data=http://{there}/object></object>
<form action=http://{there}/form><input name=password autofocus></form></body></html>"""


def hostile(port: int) -> bytes:
    html = HOSTILE.format(there=f"127.0.0.1:{port}").encode()
    return (RICH % html).replace(b"iVBORw0KGgo=", DOT.encode())


ITEMS = "document.querySelectorAll('#list a').length"
HEADING = "document.querySelector('h2')?.textContent"


def test_mail_appears_by_itself_is_found_and_deleted(inbox, browser):
    browser.shows("document.querySelector('.empty').textContent.includes('smtp://127.0.0.1:1025')")
    browser.picture("empty")
    browser.run("window.same = true")
    evil = b"<img src=x onerror=document.title='owned'>"
    inbox.add(LETTER % (evil, evil))
    inbox.add(LETTER % (b"pears", b"pear"))
    browser.shows(f"{ITEMS} == 2 && window.same")
    browser.shows("document.title == '(2) chasquid inbox'")
    browser.press("j")
    browser.shows(f"{HEADING} == 'pears'")
    browser.press("j")
    browser.shows(f"{HEADING}?.startsWith('<img src=x')")
    browser.press("/")
    for letter in "pears\ue007":  # and Enter
        browser.press(letter)
    browser.shows(f"{ITEMS} == 1")
    browser.click("#list a")
    browser.shows(f"{HEADING} == 'pears'")
    for view, text in (("headers", "eva@there.example"), ("source", "Subject: pears"),
                       ("dialogue", "C: EHLO"), ("checks", "the message has no HTML"),
                       ("text", "The pear is here.")):  # fmt: skip
        browser.click(f"#tabs a[href$='view={view}']")
        browser.shows(f"document.getElementById('panel')?.textContent.includes('{text}')")
    browser.press("\ue017")  # Delete
    wait_for(lambda: len(inbox.mailbox.all()) == 1, "the message to go")
    browser.shows(f"{ITEMS} == 1")
    browser.run("window.confirm = () => false; document.getElementById('clear').click()")
    assert len(inbox.mailbox.all()) == 1, "it asks first"
    browser.run("window.confirm = () => true; document.getElementById('clear').click()")
    wait_for(lambda: not inbox.mailbox.all(), "the mailbox to be empty")
    browser.shows("document.querySelector('.empty') !== null")
    assert browser.run("return document.title") == "chasquid inbox"


def test_a_hostile_mail_runs_nothing_and_loads_only_images_that_were_asked_for(
    inbox, browser, asked
):
    inbox.add(hostile(asked[0]))
    browser.shows(f"{ITEMS} == 1")
    browser.click("#list a")
    browser.shows("document.querySelector('iframe')")
    frame = browser.call("/element", {"using": "css selector", "value": "iframe"})
    browser.call("/frame", {"id": frame})
    browser.shows("document.getElementById('dot')?.naturalWidth === 1")
    browser.call("/frame", {"id": None})
    browser.run("return new Promise(done => setTimeout(done, 1500))")  # for a refresh, a script
    assert asked[1:] == []
    browser.click("#remote")
    wait_for(lambda: "/tracker.png" in asked, "the image")
    browser.run("return new Promise(done => setTimeout(done, 1000))")
    assert set(asked[1:]) <= {"/tracker.png", "/css.png", "/svg.png"}
    assert browser.run("return document.title") == "chasquid inbox"
    assert browser.run("return location.pathname").startswith("/message/")


def test_it_looks_well_at_every_size_and_in_the_dark(inbox, browser, asked):
    for word in (b"Your receipt", b"Password reset", b"A very long subject " * 12, b"Weekly news"):
        inbox.add(LETTER % (word, word), received=time.time() - 400)
    inbox.add(hostile(asked[0]), received=time.time() - 30)
    browser.shows(f"{ITEMS} == 5")
    overflow = "return document.documentElement.scrollWidth - innerWidth"
    browser.click("#list a")
    browser.shows("document.querySelector('iframe')")
    light = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.picture("desktop-light")
    browser.dark()
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != light
    browser.click("#tabs a[href$='view=headers']")
    browser.shows("document.querySelector('#panel table')")
    browser.picture("desktop-dark")
    browser.size(390, 844)
    assert browser.run(overflow) <= 0
    tabs = "[...document.querySelectorAll('#tabs a')]"
    assert browser.run(f"return {tabs}.every(e => e.getBoundingClientRect().right <= innerWidth)")
    facts = "document.querySelector('dl')"
    assert browser.run(f"return {facts}.scrollHeight - {facts}.clientHeight") <= 0
    browser.picture("phone-message")
    browser.click("#back")
    browser.shows("document.getElementById('list')?.checkVisibility()")
    assert browser.run(overflow) <= 0
    browser.picture("phone-list")
