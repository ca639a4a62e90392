# SPDX-License-Identifier: Apache-2.0
"""smtpdfix, as far as those see it who use its fixture; behind it is a CaptureServer.

What a test sets in `config` counts from when it next asks for the port.
"""

from __future__ import annotations

import sys

import pytest

import chasquid


class Config:
    """The settings that tests change."""

    port = 0
    use_ssl = use_starttls = False
    enforce_auth = False
    auth_require_tls = True
    login_username, login_password = "user", "password"

    def wanted(self):
        """Return the same for CaptureServer."""
        starttls = "starttls" if self.use_starttls or self.enforce_auth else "off"
        return {
            "port": self.port,
            "tls": "implicit" if self.use_ssl else starttls,
            "users": {self.login_username: self.login_password},
            "login_required": self.enforce_auth,
            "login_in_the_clear": not self.auth_require_tls,
        }


class AuthController:
    """A server that is made anew when its settings have changed."""

    hostname = "127.0.0.1"

    def __init__(self):
        self.config = Config()
        self.server = None
        self.settings = {}

    @property
    def port(self):
        if self.settings != self.config.wanted():
            self.stop()
            self.settings = self.config.wanted()
            self.server = chasquid.CaptureServer(self.hostname, **self.settings).start()
        return self.server.port

    @property
    def messages(self):
        return self.server.messages if self.server else []

    def stop(self):
        if self.server:
            self.server.stop()


class SMTPDFix:
    """As a context manager."""

    def __enter__(self):
        self.controller = AuthController()
        return self.controller

    def __exit__(self, *_):
        self.controller.stop()


@pytest.fixture
def smtpd():
    with SMTPDFix() as controller:
        yield controller


def _Authenticator(config):
    """Stand in for a class that is no part of the fixture; its own tests are left out."""


sys.modules |= dict.fromkeys(["smtpdfix.controller", "smtpdfix.fixture"], sys.modules[__name__])
