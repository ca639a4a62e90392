# SPDX-License-Identifier: Apache-2.0
"""The sample configuration is complete, and the server takes it as it is."""

from __future__ import annotations

import configparser
import re
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

import chasquid

SAMPLE = Path(__file__).resolve().parent.parent / "sample-config"
CONF = (SAMPLE / "chasquid.conf").read_text(encoding="utf-8")

# The file shows examples of these, because their defaults are empty.
EXAMPLES = {
    "mail_delivery_agent_bin",
    "mail_delivery_agent_args",
    "lmtp_address",
    "dns_server",
    "monitoring_address",
    "web_address",
    "trusted_relay",
    "smarthost",
    "smarthost_user",
    "smarthost_password_file",
}


def settings(pattern: str) -> list[tuple[str, object]]:
    """Return the keys and values of the lines that `pattern` finds the text of."""
    found = []
    for line in re.findall(pattern, CONF, re.MULTILINE):
        for entry in chasquid.parse_text_format(line.encode(), "chasquid.conf"):
            found.append((entry.key, chasquid._KEYS[entry.key].read(entry.value)))
    return found


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(SAMPLE / "systemd" / name, encoding="utf-8")
    return parser


@pytest.fixture
def config_dir(tmp_path):
    """A copy whose data_dir lies in it."""
    place = tmp_path / "etc"
    shutil.copytree(SAMPLE, place)
    text = CONF.replace("#data_dir:", "data_dir:").replace("/var/lib/chasquid", f"{tmp_path}/data")
    (place / "chasquid.conf").write_text(text, encoding="utf-8")
    return place


def test_every_key_is_in_the_sample_and_no_other():
    assert set(re.findall(r"^#?([a-z_]+):", CONF, re.MULTILINE)) == set(chasquid._KEYS)


def test_the_comment_above_a_key_begins_with_its_help():
    above = {}
    for comment, name in re.findall(r"^((?:# .*\n)+)#?([a-z_]+): ", CONF, re.MULTILINE):
        above[name] = re.sub(r"^# |\n# ?", " ", comment).strip() + " "
    assert above.keys() == chasquid._KEYS.keys()
    for name, key in chasquid._KEYS.items():
        assert above[name].startswith(f"{key.help} ")


def test_settings_that_are_commented_out_show_the_default():
    shown = dict(settings(r"^#([a-z_]+: .*)$"))
    assert shown.keys() >= EXAMPLES
    for key in shown.keys() - EXAMPLES:
        assert shown[key] == chasquid._KEYS[key].default


def test_the_example_of_arguments_is_what_the_agent_gets_by_default():
    shown = settings(r"^#(mail_delivery_agent_args: .*)$")
    assert tuple(value for _, value in shown) == chasquid.AgentCourier.DEFAULT_ARGUMENTS


def test_the_sample_loads(config_dir, tmp_path):
    config = chasquid.load_config(str(config_dir))
    assert config.hostname == "mail.example.com"
    assert config.data_dir == f"{tmp_path}/data"
    others = config._asdict().keys() - {"config_dir", "hostname", "data_dir"}
    for key in others:
        assert getattr(config, key) == chasquid._KEYS[key].default


def test_every_line_that_is_commented_out_can_be_put_in_force(config_dir):
    text = re.sub(r"^#([a-z_]+: )", r"\1", CONF, flags=re.MULTILINE)
    text = re.sub(r"^lmtp_address:.*\n", "", text, flags=re.MULTILINE)  # excludes an agent
    (config_dir / "chasquid.conf").write_text(text, encoding="utf-8")
    config = chasquid.load_config(str(config_dir))
    assert config.mail_delivery_agent_bin
    assert config.dns_server


def test_sample_users_and_aliases_load(config_dir):
    domains = chasquid.load_domains(chasquid.load_config(str(config_dir)))
    assert domains.accounts.exists("info", "example.com")
    [destination] = domains.aliases.expand("abuse@example.com")
    assert destination.value == "info@example.com"


def test_nobody_can_log_in_with_the_sample_users():
    users = chasquid.load_users(str(SAMPLE / "domains" / "example.com"))
    assert set(users.values()) == {chasquid.Denied()}


def test_aliases_that_are_commented_out_parse():
    text = (SAMPLE / "domains" / "example.com" / "aliases").read_text(encoding="utf-8")
    text = re.sub(r"^#(\S+: )", r"\1", text, flags=re.MULTILINE)
    table = chasquid.parse_aliases(text.encode(), "aliases", "example.com")
    assert {"partner", "tickets", "info", "*"} <= table.keys()


def test_the_sample_has_no_certificate():
    assert sorted(path.name for path in (SAMPLE / "certs").iterdir()) == ["README"]


def test_the_server_takes_the_sockets_by_the_names_in_the_units(config_dir):
    ports = {"smtp": 25, "submission": 587, "submission_tls": 465}
    names = {}
    for name, number in ports.items():
        section = unit(f"chasquid-{name}.socket")["Socket"]
        assert section["Service"] == "chasquid.service"
        assert section["ListenStream"] == str(number)
        names[section["FileDescriptorName"]] = number
    config = chasquid.load_config(str(config_dir), 'log_path: "<stdout>" mail_log_path: "<stdout>"')
    with ExitStack() as stack:
        raws = {name: stack.enter_context(socket.socket()) for name in names}

        class FromSystemd(chasquid.Listeners):
            @staticmethod
            def _inherited():
                return {name: [raw] for name, raw in raws.items()}

        taken = FromSystemd(config).sockets
        assert {port: names[name] for port, raw in taken for name in raws if raws[name] is raw} == {
            chasquid.SMTP_PORT: 25,
            chasquid.SUBMISSION_PORT: 587,
            chasquid.SUBMISSION_TLS_PORT: 465,
        }


def test_the_service_knows_its_sockets_and_waits_to_be_told():
    service = unit("chasquid.service")["Service"]
    assert set(service["Sockets"].split()) == {
        path.name for path in (SAMPLE / "systemd").glob("*.socket")
    } - {"chasquid-web.socket"}  # the service would start it
    assert service["Type"] == "notify"
    assert service["User"] == "chasquid"
    assert f"/var/lib/{service['StateDirectory']}" == chasquid.Config("").data_dir


def test_dovecot_reads_the_maildir_that_is_the_default():
    text = (SAMPLE / "dovecot-local.conf").read_text(encoding="utf-8")
    defaults = chasquid.Config("")
    maildir = defaults.maildir.replace("%data_dir%", defaults.data_dir)
    maildir = maildir.replace("%to_domain%", "%d").replace("%to_user%", "%n")
    assert f"mail_location = maildir:{maildir}\n" in text


def test_the_deploy_hook_is_executable():
    assert (SAMPLE / "certbot-deploy-hook").stat().st_mode & 0o111
