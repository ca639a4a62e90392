# SPDX-License-Identifier: Apache-2.0
"""What was written for Mailpit works with `capture`: the npm package mailpit-api."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
from support import MODULE

from .tools import program

CLIENT = "mailpit-api@2.1.0"
SCRIPT = """
const { MailpitClient } = await import("mailpit-api");
const client = new MailpitClient(process.argv[2]);
const told = {};
const person = { Email: "ana@here.example", Name: "Ana" };
const sent = await client.sendMessage({ From: { Email: "shop@x.example" }, To: [person],
  Subject: "Welcome", Text: "hello", HTML: "<p>hello</p>",
  Attachments: [{ Content: "aGk=", Filename: "hi.txt", ContentType: "text/plain" }] });
told.id = typeof sent.ID;
told.list = (await client.listMessages()).messages.map(message => message.Subject);
told.found = (await client.searchMessages({ query: "subject:welcome" })).messages_count;
told.summary = (await client.getMessageSummary("latest")).To[0].Address;
told.headers = (await client.getMessageHeaders(sent.ID)).Subject;
told.source = (await client.getMessageSource(sent.ID)).includes("Subject: Welcome");
const file = await client.getMessageAttachment(sent.ID, "3");
told.file = await file.text();
told.html = await client.renderMessageHTML(sent.ID);
told.text = await client.renderMessageText(sent.ID);
told.waited = (await client.waitForMessage({ query: "welcome" })).Subject;
told.read = await client.setReadStatus({ IDs: [sent.ID], Read: false });
told.info = (await client.getInfo()).Messages;
told.webui = (await client.getConfiguration()).ChaosEnabled;
told.tags = await client.getTags();
told.chaos = await client.setChaosTriggers({ Sender: { ErrorCode: 550, Probability: 100 } });
told.off = (await client.setChaosTriggers({})).Sender.Probability;
told.deleted = await client.deleteMessages({ IDs: [sent.ID] });
told.left = (await client.listMessages()).total;
console.log(JSON.stringify(told));
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    place = tmp_path_factory.mktemp("npm")
    npm = [program("npm"), "install", "--no-audit", "--no-fund", "--silent", CLIENT]
    subprocess.run(npm, cwd=place, check=True, timeout=300)
    (place / "script.mjs").write_text(SCRIPT)
    return place


def test_the_npm_client_of_mailpit(client):
    command = [
        sys.executable,
        str(MODULE),
        "capture",
        "--smtp",
        "127.0.0.1:0",
        "--web",
        "127.0.0.1:0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            told = ""
            while "Ctrl-C" not in told:
                told += process.stdout.readline()
            url = re.search(r"http://[\d.:]+", told)[0]
            words = [program("node"), "script.mjs", url]
            done = subprocess.run(words, cwd=client, capture_output=True, text=True, timeout=60)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(20)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    off = {"ErrorCode": 451, "Probability": 0}
    assert "<p>hello</p>" in answers.pop("html")
    assert answers == {
        "id": "string",
        "list": ["Welcome"],
        "found": 1,
        "summary": "ana@here.example",
        "headers": ["Welcome"],
        "source": True,
        "file": "hi",
        "text": "hello\n",
        "waited": "Welcome",
        "read": "ok",
        "info": 1,
        "webui": True,
        "tags": [],
        "chaos": {"Authentication": off, "Recipient": off,
                  "Sender": {"ErrorCode": 550, "Probability": 100}},
        "off": 0,
        "deleted": "ok",
        "left": 0,
    }  # fmt: skip
