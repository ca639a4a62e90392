# SPDX-License-Identifier: Apache-2.0
"""The programs that serve, each as a context manager around one private instance."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from email.message import EmailMessage
from pathlib import Path
from types import TracebackType
from typing import Self

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from support import SECONDS, wait_for

from .tools import (
    LOOPBACK,
    accepts,
    free_port,
    make_certificate,
    need_root,
    program,
    read_maildir,
    run,
    wait_for_letters,
)

# Where `.ci/run` unpacks Exim, whose package cannot be installed beside Postfix.
EXIM_PLACE = os.environ.get("EXIM_PLACE", "/var/cache/chasquid-interop/exim/usr/sbin")

# Whom Postfix and Dovecot write mailboxes as.
MAIL_USER = "nobody"


class Peer:
    """A program that runs in a directory of its own for the length of a `with`.

    What it prints goes into the file `output`, and its logs are those that fit `logs`.
    """

    logs = "*.log"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    def log(self) -> str:
        """Return what the program has printed and logged."""
        paths = [*self.directory.glob("output"), *sorted(self.directory.glob(self.logs))]
        return "".join(path.read_text("utf-8", "replace") for path in paths)

    def wait_for_log(self, text: str, seconds: float = SECONDS) -> None:
        wait_for(lambda: text in self.log(), f"{text!r} in the log of {self.name}", seconds)

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """End the program, by force if it takes more than ten seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind

    def _run(self, command: Iterable[object], *ports: int, **options: object) -> None:
        """Start `command` and wait until it accepts connections on all `ports`."""
        with (self.directory / "output").open("ab") as output:
            self._process = process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **options,  # type: ignore[call-overload]
            )

        def ready() -> bool:
            status = process.poll()
            if status is not None:
                raise AssertionError(f"{self.name} ended with {status}:\n{self.log()}")
            return all(accepts(port) for port in ports)

        wait_for(ready, f"{self.name} to listen on {ports}")


class MailboxPeer(Peer):
    """A peer that delivers into Maildirs below `mail`, one for each local part."""

    def maildir(self, address: str) -> Path:
        return self.directory / "mail" / address.partition("@")[0]

    def letters(self, address: str) -> list[EmailMessage]:
        return read_maildir(self.maildir(address))

    def wait_for_letters(
        self, address: str, count: int = 1, seconds: float = SECONDS
    ) -> list[EmailMessage]:
        return wait_for_letters(self.maildir(address), count, seconds)

    def _make_mail_directory(self) -> None:
        directory = self.directory / "mail"
        directory.mkdir()
        shutil.chown(directory, MAIL_USER, pwd.getpwnam(MAIL_USER).pw_gid)


class NameServer:
    """A name server over UDP and TCP that knows what `records` says.

    `records` has a name (without the last dot) and a type for each list of values, all as
    in a zone file: `{"dest.example": {"MX": ["10 mx.dest.example."]}}`. Any other name does
    not exist. Instead of the types, `"SERVFAIL"` (or another code) may stand for a name.
    The records may be changed at any time.
    """

    name = "NameServer"

    def __init__(self, records: Mapping[str, Mapping[str, list[str]] | str] | None = None) -> None:
        self.records = dict(records or {})
        self.port = free_port()
        self.address = f"{LOOPBACK}:{self.port}"
        self.questions: list[str] = []
        self._servers: list[socketserver.BaseServer] = []

    def __enter__(self) -> NameServer:
        for kind, handler in (
            (socketserver.ThreadingUDPServer, _UdpQuestion),
            (socketserver.ThreadingTCPServer, _TcpQuestion),
        ):
            server = kind((LOOPBACK, self.port), handler)
            server.daemon_threads = True
            server.answer = self.answer  # type: ignore[union-attr]
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def log(self) -> str:
        return "\n".join(self.questions) + "\n"

    def answer(self, question: bytes, limit: int) -> bytes:
        """Return the answer in wire format, truncated to `limit` octets."""
        query = dns.message.from_wire(question)
        response = dns.message.make_response(query, recursion_available=True)
        asked = query.question[0]
        name = asked.name.to_unicode(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(asked.rdtype)
        self.questions.append(f"{name} {kind}")
        known = self.records.get(name)
        if isinstance(known, str):
            response.set_rcode(dns.rcode.from_text(known))
        elif known is not None:
            if values := known.get(kind):
                rrset = dns.rrset.from_text_list(asked.name, 60, "IN", kind, values)
                response.answer.append(rrset)
        elif not any(other.endswith(f".{name}") for other in self.records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        try:
            return response.to_wire(max_size=limit)
        except dns.exception.TooBig:
            response.answer.clear()
            response.flags |= dns.flags.TC
            return response.to_wire()


class _UdpQuestion(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        question, socket_ = self.request
        socket_.sendto(self.server.answer(question, 1232), self.client_address)


class _TcpQuestion(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while size := int.from_bytes(self.rfile.read(2), "big"):
            answer = self.server.answer(self.rfile.read(size), 65535)
            self.wfile.write(len(answer).to_bytes(2, "big") + answer)


class Postfix(MailboxPeer):
    """Postfix with queues, processes and configuration of its own.

    It receives mail for the `mailboxes` of `domain`, with STARTTLS, and sends all else to
    `relay_port` of this machine. `settings` go into main.cf as they are.
    """

    hostname = "mx.dest.example"

    def __init__(
        self,
        directory: Path,
        *,
        domain: str = "dest.example",
        mailboxes: Iterable[str] = ("dora", "diego"),
        relay_port: int = 0,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        need_root()
        super().__init__(directory)
        self._postfix = program("postfix")
        self.port = free_port()
        self.config = directory / "config"
        self.config.mkdir()
        (directory / "queue").mkdir()
        self._make_mail_directory()
        certificate = make_certificate(directory / "certs", self.hostname)
        self.certificate = certificate.fullchain
        user = pwd.getpwnam(MAIL_USER)
        known = "".join(f"{name}@{domain} {name}/\n" for name in mailboxes)
        (self.config / "mailboxes").write_text(known)
        self._settings: dict[str, object] = {
            "compatibility_level": "3.6",
            "config_directory": self.config,
            "queue_directory": directory / "queue",
            "data_directory": directory / "data",
            "maillog_file": directory / "postfix.log",
            "maillog_file_prefixes": directory,
            "mail_owner": "postfix",
            "setgid_group": "postdrop",
            "inet_interfaces": LOOPBACK,
            "inet_protocols": "ipv4",
            "myhostname": self.hostname,
            "mydestination": "",
            "mynetworks": "127.0.0.0/8",
            "alias_maps": "",
            "alias_database": "",
            "local_recipient_maps": "",
            "biff": "no",
            "smtputf8_enable": "yes",
            "relayhost": f"[{LOOPBACK}]:{relay_port}" if relay_port else "",
            "default_transport": "smtp" if relay_port else "error: nothing leaves this machine",
            "virtual_mailbox_domains": domain,
            "virtual_mailbox_base": directory / "mail",
            "virtual_mailbox_maps": f"texthash:{self.config}/mailboxes",
            "virtual_uid_maps": f"static:{user.pw_uid}",
            "virtual_gid_maps": f"static:{user.pw_gid}",
            "smtpd_tls_security_level": "may",
            "smtpd_tls_cert_file": certificate.fullchain,
            "smtpd_tls_key_file": certificate.privkey,
            "smtpd_tls_received_header": "yes",
            "smtpd_tls_loglevel": "1",
            "smtpd_peername_lookup": "no",
            "smtp_tls_security_level": "may",
            "smtp_tls_loglevel": "1",
            "smtp_host_lookup": "native",
            "smtp_dns_support_level": "disabled",
            **(settings or {}),
        }
        self._write_settings()
        (self.config / "master.cf").write_text(_MASTER_CF.format(port=self.port))

    def start(self) -> None:
        # A child of a master that has ended may still accept at the port: the log tells
        # that this master has begun.
        started = self.log().count("daemon started")
        self._run([self._postfix, "-c", self.config, "start-fg"], self.port)
        wait_for(lambda: self.log().count("daemon started") > started, "Postfix's master")

    def stop(self) -> None:
        """End Postfix through its master, which is not the process that was started."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self.directory / "queue/pid/master.pid").read_text()), signal.SIGTERM)
            if self._process is not None:
                self._process.wait(10)
        super().stop()

    def change(self, **settings: object) -> None:
        """Start again with other settings in main.cf."""
        self.stop()
        self._settings |= settings
        self._write_settings()
        self.start()

    def _write_settings(self) -> None:
        # Each key once: of a second one Postfix's logger tells itself, as each of its programs
        # does, and hangs when its own socket is full of that.
        lines = [f"{key} = {value}\n" for key, value in self._settings.items()]
        (self.config / "main.cf").write_text("".join(lines))

    def send(self, sender: str, recipients: Iterable[str], message: EmailMessage) -> None:
        """Hand in a message with Postfix's own sendmail."""
        sendmail = program("sendmail", "/usr/sbin")
        command = [sendmail, "-C", str(self.config), "-i", "-f", sender, "--", *recipients]
        run(*command, input=message.as_bytes().decode().replace("\r\n", "\n"))

    def queue(self) -> str:
        return run(program("postqueue"), "-c", str(self.config), "-p").stdout


_MASTER_CF = """\
127.0.0.1:{port} inet n - n - - smtpd
pickup    unix  n - n 60  1 pickup
cleanup   unix  n - n -   0 cleanup
qmgr      unix  n - n 300 1 qmgr
tlsmgr    unix  - - n 300 1 tlsmgr
rewrite   unix  - - n -   - trivial-rewrite
bounce    unix  - - n -   0 bounce
defer     unix  - - n -   0 bounce
trace     unix  - - n -   0 bounce
verify    unix  - - n -   1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n -   - proxymap
smtp      unix  - - n -   - smtp
relay     unix  - - n -   - smtp
showq     unix  n - n -   - showq
error     unix  - - n -   - error
retry     unix  - - n -   - error
discard   unix  - - n -   - discard
virtual   unix  - n n -   - virtual
anvil     unix  - - n -   1 anvil
scache    unix  - - n -   1 scache
postlog   unix-dgram n - n - 1 postlogd
"""


class Exim(MailboxPeer):
    """Exim as a daemon that receives for the `mailboxes` of `domain`, with STARTTLS.

    What it is handed for other domains it sends to `relay_port` of this machine.
    """

    hostname = "mx.exim.example"
    logs = "log/*"
    user = "Debian-exim"  # built into the program

    def __init__(
        self,
        directory: Path,
        *,
        domain: str = "exim.example",
        mailboxes: Iterable[str] = ("elsa", "emil"),
        relay_port: int = 0,
    ) -> None:
        need_root()
        super().__init__(directory)
        self._exim = program("exim4", EXIM_PLACE)
        self.port = free_port()
        self.config = directory / "exim.conf"
        certificate = make_certificate(directory / "certs", self.hostname)
        self.certificate = certificate.fullchain
        self.config.write_text(
            _EXIM_CONF.format(
                exim=self._exim,
                hostname=self.hostname,
                directory=directory,
                port=self.port,
                domain=domain,
                mailboxes=":".join(mailboxes),
                relay_port=relay_port or 9,
                certificate=certificate,
            )
        )
        for name in ("spool", "log", "mail"):
            (directory / name).mkdir()
            shutil.chown(directory / name, self.user, self.user)
        shutil.chown(certificate.privkey, self.user)

    def start(self) -> None:
        self._run([self._exim, "-C", self.config, "-bdf", "-q1m"], self.port)

    def send(self, sender: str, recipients: Iterable[str], message: EmailMessage) -> None:
        command = [self._exim, "-C", str(self.config), "-i", "-f", sender, "--", *recipients]
        run(*command, input=message.as_bytes().decode().replace("\r\n", "\n"))


_EXIM_CONF = """\
exim_path = {exim}
primary_hostname = {hostname}
spool_directory = {directory}/spool
log_file_path = {directory}/log/%slog
pid_file_path = {directory}/spool/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
disable_ipv6
keep_environment =
host_lookup =
rfc1413_query_timeout = 0s
never_users =
deliver_drop_privilege
smtputf8_advertise_hosts = *
tls_advertise_hosts = *
tls_certificate = {certificate.fullchain}
tls_privatekey = {certificate.privkey}
acl_smtp_rcpt = recipient
log_selector = +tls_cipher +received_recipients +smtp_protocol_error +pipelining
qualify_domain = {domain}

begin acl
recipient:
  accept domains = {domain}
         verify = recipient
  deny   domains = {domain}
         message = no such mailbox here
  deny   message = relay not permitted

begin routers
mailbox:
  driver = accept
  domains = {domain}
  local_parts = {mailboxes}
  transport = maildir
elsewhere:
  driver = manualroute
  domains = ! {domain}
  route_list = * 127.0.0.1
  self = send
  transport = relay

begin transports
maildir:
  driver = appendfile
  maildir_format
  directory = {directory}/mail/$local_part_data
  create_directory
  delivery_date_add
  envelope_to_add
  return_path_add
relay:
  driver = smtp
  port = {relay_port}
  allow_localhost
  tls_verify_certificates =
  tls_try_verify_hosts =

begin retry
* * F,1m,1s
"""


class Dovecot(MailboxPeer):
    """Dovecot with LMTP on a socket and a port, and IMAP without TLS on another port.

    `users` are addresses with their passwords; those in `full` have no room left.
    """

    def __init__(
        self, directory: Path, *, users: Mapping[str, str], full: Iterable[str] = ()
    ) -> None:
        need_root()
        super().__init__(directory)
        self._dovecot = program("dovecot")
        self.lmtp_socket = directory / "lmtp"
        self.lmtp_port = free_port()
        self.imap_port = free_port()
        self._make_mail_directory()
        self.user = pwd.getpwnam(MAIL_USER)
        lines = []
        for address, password in users.items():
            quota = "userdb_quota_rule=*:bytes=1" if address in full else ""
            home = self.maildir(address)
            ids = f"{self.user.pw_uid}:{self.user.pw_gid}"
            lines.append(f"{address}:{{PLAIN}}{password}:{ids}::{home}::{quota}\n")
        (directory / "users").write_text("".join(lines))
        (directory / "dovecot.conf").write_text(
            _DOVECOT_CONF.format(
                directory=directory,
                lmtp_socket=self.lmtp_socket,
                lmtp_port=self.lmtp_port,
                imap_port=self.imap_port,
                user=self.user,
            )
        )

    def start(self) -> None:
        command = [self._dovecot, "-F", "-c", self.directory / "dovecot.conf"]
        self._run(command, self.lmtp_port, self.imap_port)

    def adopt(self, address: str, maildir: Path) -> None:
        """Let `address` see a Maildir that somebody else has written, by a move."""
        shutil.copytree(maildir, self.maildir(address), dirs_exist_ok=True)
        for path in (self.maildir(address), *self.maildir(address).rglob("*")):
            os.chown(path, self.user.pw_uid, self.user.pw_gid)


_DOVECOT_CONF = """\
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/dovecot.log
instance_name = {directory.name}
listen = 127.0.0.1
protocols = imap lmtp
ssl = no
disable_plaintext_auth = no
auth_username_format = %Lu
first_valid_uid = {user.pw_uid}
first_valid_gid = {user.pw_gid}
mail_location = maildir:~
mail_plugins = quota
plugin {{
  quota = count:User
  quota_vsizes = yes
}}
passdb {{
  driver = passwd-file
  args = {directory}/users
}}
userdb {{
  driver = passwd-file
  args = {directory}/users
}}
service lmtp {{
  unix_listener {lmtp_socket} {{
    mode = 0666
  }}
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {lmtp_port}
  }}
}}
service imap-login {{
  inet_listener imap {{
    port = {imap_port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""


class SmtpSink(Peer):
    """Postfix's smtp-sink, which takes any mail; `options` make it worse at that.

    `mail` has a file for each message, with the envelope on top.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        need_root()
        super().__init__(directory)
        self._options = options
        self.port = free_port()
        self.mail = directory / "mail"
        self.mail.mkdir()
        shutil.chown(self.mail, "postfix")

    def start(self) -> None:
        command = [program("smtp-sink"), "-4", "-v", *self._options, "-u", "postfix"]
        command += ["-d", f"{self.mail}/%M.", f"{LOOPBACK}:{self.port}", "100"]
        self._run(command, self.port)

    def letters(self) -> list[str]:
        """Return what has come in, the envelope as X-Mail-Args and X-Rcpt-Args on top."""
        texts = [path.read_text("utf-8", "replace") for path in sorted(self.mail.iterdir())]
        return [text for text in texts if "X-Rcpt-Args" in text]

    def wait_for_letters(self, count: int = 1, seconds: float = SECONDS) -> list[str]:
        what = f"{count} message(s) in smtp-sink"
        wait_for(lambda: len(self.letters()) >= count, what, seconds)
        return self.letters()


class OpenDkim(Peer):
    """opendkim as a milter for Postfix: `start(Postfix, settings=opendkim.for_postfix)`.

    It verifies what comes in, and says so under the name `authserv`; with `settings`
    such as KeyFile it may sign instead. Keys are what `names` knows.
    """

    authserv = "opendkim.example"

    def __init__(
        self, directory: Path, names: NameServer, settings: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(directory)
        self._opendkim = program("opendkim")
        self.port = free_port()
        self.config = directory / "opendkim.conf"
        (directory / "resolver.conf").write_text(_OPENDKIM_RESOLVER.format(port=names.port))
        lines = {
            "Socket": f"inet:{self.port}@{LOOPBACK}",
            "Mode": "v",
            "AuthservID": self.authserv,
            "AlwaysAddARHeader": "yes",
            "ResolverConfiguration": directory / "resolver.conf",
            "InternalHosts": "192.0.2.1",  # whose mail it would not verify
            "TemporaryDirectory": directory,
            "RequireSafeKeys": "no",
            "Syslog": "no",
            **(settings or {}),
        }
        self.config.write_text("".join(f"{key} {value}\n" for key, value in lines.items()))

    def start(self) -> None:
        self._run([self._opendkim, "-f", "-x", self.config], self.port)

    def stop(self) -> None:
        """End it at once: on a polite request it thinks for five seconds."""
        if self._process is not None:
            self._process.kill()
        super().stop()

    @property
    def for_postfix(self) -> dict[str, object]:
        """Return what a Postfix needs in main.cf to ask this milter for all its mail."""
        milter = f"inet:{LOOPBACK}:{self.port}"
        return {
            "smtpd_milters": milter,
            "non_smtpd_milters": milter,
            "milter_default_action": "tempfail",
        }


_OPENDKIM_RESOLVER = """\
server:
  module-config: "iterator"
  do-not-query-localhost: no
forward-zone:
  name: "."
  forward-addr: 127.0.0.1@{port}
"""


class Rspamd(Peer):
    """rspamd with nothing but its check of DKIM signatures; keys are what `names` knows."""

    user = "_rspamd"

    def __init__(self, directory: Path, names: NameServer) -> None:
        need_root()
        super().__init__(directory)
        self._rspamd = program("rspamd")
        self.port = free_port()
        self._config = directory / "rspamd.conf"
        self._config.write_text(
            _RSPAMD_CONF.format(directory=directory, port=self.port, names=names)
        )
        (directory / "rspamd.lua").touch()
        (directory / "suffixes").write_text("example\n")  # the real list takes seconds to load
        shutil.chown(directory, self.user, self.user)

    def start(self) -> None:
        user = ["-u", self.user, "-g", self.user]
        self._run([self._rspamd, "-f", *user, "-c", self._config], self.port)

    def check(self, message: bytes) -> dict[str, list[str]]:
        """Return rspamd's symbols for a message, such as R_DKIM_ALLOW, each with its options."""
        url = f"http://{LOOPBACK}:{self.port}/checkv2"
        with urllib.request.urlopen(url, message, timeout=60) as response:
            symbols = json.load(response)["symbols"]
        return {name: symbol.get("options", []) for name, symbol in symbols.items()}


_RSPAMD_CONF = """\
options {{
  filters = "dkim";
  local_addrs = [];
  pidfile = "{directory}/rspamd.pid";
  control_socket = "{directory}/control mode=0600";
  tempdir = "{directory}";
  hs_cache_dir = "{directory}";
  url_tld = "{directory}/suffixes";
  lua = "{directory}/rspamd.lua";
  dns {{
    nameserver = "{names.address}";
    timeout = 5s;
  }}
}}
logging {{
  type = "console";
  color = false;
}}
worker "normal" {{
  bind_socket = "127.0.0.1:{port}";
  count = 1;
}}
dkim {{
  check_local = true;
}}
"""


class Nsd(Peer):
    """NSD, which serves zones that ldns-signzone has signed.

    `zones` has for the name of each zone its records as in a zone file; SOA and NS are
    added. A zone in `unsigned` is served as it is, and its parent says so; the signatures
    of a zone in `expired` were good once. `anchors` is a file with the key of the topmost
    zones, those whose parent is not served here.
    """

    def __init__(
        self,
        directory: Path,
        zones: Mapping[str, str],
        *,
        unsigned: Iterable[str] = (),
        expired: Iterable[str] = (),
        port: int = 0,
    ) -> None:
        super().__init__(directory)
        self._nsd = program("nsd")
        self.port = port or free_port()
        self.zones = list(zones)
        self.anchors = directory / "anchors"
        self.anchors.touch()
        records = dict(zones)
        files = {}
        for zone in sorted(zones, key=lambda name: -name.count(".")):  # children first
            above = (zone.split(".", count)[-1] for count in range(1, zone.count(".") + 1))
            parent = next((name for name in above if name in zones), None)
            delegation = f"{zone}. NS ns.{zone}.\n"
            files[zone] = path = directory / f"{zone}.zone"
            path.write_text(_ZONE.format(zone=zone) + records[zone])
            if zone not in unsigned:
                key = self._sign(zone, path, zone in expired)
                files[zone] = directory / f"{zone}.zone.signed"
                if parent is not None:
                    delegation += key.with_suffix(".ds").read_text()
                else:
                    with self.anchors.open("a") as anchors:
                        anchors.write(key.with_suffix(".key").read_text())
            if parent is not None:
                records[parent] += delegation + f"ns.{zone}. A 127.0.0.1\n"
        conf = _NSD_CONF.format(directory=directory, port=self.port)
        for zone, path in files.items():
            conf += f'zone:\n  name: "{zone}"\n  zonefile: "{path}"\n'
        (directory / "nsd.conf").write_text(conf)

    def _sign(self, zone: str, path: Path, expired: bool) -> Path:
        """Sign a zone file, and return the file of the public key."""
        keys = self.directory / "keys" / zone
        keys.mkdir(parents=True)
        make = [program("ldns-keygen"), "-k", "-a", "ECDSAP256SHA256", "-r", "/dev/urandom", zone]
        subprocess.run(make, cwd=keys, check=True, capture_output=True)
        [key] = keys.glob("*.key")
        times = ["-i", "20200101", "-e", "20200201"] if expired else []
        run(program("ldns-signzone"), *times, "-o", f"{zone}.", str(path), str(key)[:-4])
        return key

    def start(self) -> None:
        self._run([self._nsd, "-d", "-c", self.directory / "nsd.conf"], self.port)


_ZONE = """\
$TTL 60
$ORIGIN {zone}.
@ SOA ns postmaster 1 3600 600 86400 60
@ NS ns
ns A 127.0.0.1
"""

_NSD_CONF = """\
server:
  ip-address: 127.0.0.1@{port}
  port: {port}
  username: ""
  chroot: ""
  server-count: 1
  zonesdir: "{directory}"
  database: ""
  pidfile: "{directory}/nsd.pid"
  xfrdfile: "{directory}/xfrd.state"
  xfrdir: "{directory}"
  zonelistfile: "{directory}/zone.list"
  cookie-secret-file: "{directory}/cookies"
remote-control:
  control-enable: no
"""


class Unbound(Peer):
    """Unbound, which validates what `nsd` has signed; all other names it asks of `names`."""

    def __init__(self, directory: Path, nsd: Nsd, names: NameServer) -> None:
        super().__init__(directory)
        self._unbound = program("unbound")
        self.port = free_port()
        self.address = f"{LOOPBACK}:{self.port}"
        conf = _UNBOUND_CONF.format(directory=directory, port=self.port, nsd=nsd, names=names)
        for zone in nsd.zones:
            conf += f'stub-zone:\n  name: "{zone}"\n  stub-addr: 127.0.0.1@{nsd.port}\n'
        (directory / "unbound.conf").write_text(conf)

    def start(self) -> None:
        self._run([self._unbound, "-d", "-p", "-c", self.directory / "unbound.conf"], self.port)


_UNBOUND_CONF = """\
server:
  interface: 127.0.0.1@{port}
  port: {port}
  do-ip6: no
  username: ""
  chroot: ""
  directory: "{directory}"
  use-syslog: no
  verbosity: 1
  val-log-level: 2
  num-threads: 1
  so-reuseport: no
  module-config: "validator iterator"
  trust-anchor-file: "{nsd.anchors}"
  do-not-query-localhost: no
remote-control:
  control-enable: no
forward-zone:
  name: "."
  forward-addr: 127.0.0.1@{names.port}
"""


class SaslAuth(Peer):
    """Dovecot that does nothing but check passwords, for a Postfix with SASL.

    `users` are names with their passwords.
    """

    def __init__(self, directory: Path, *, users: Mapping[str, str]) -> None:
        need_root()
        super().__init__(directory)
        self._dovecot = program("dovecot")
        self.port = free_port()
        lines = [f"{user}:{{PLAIN}}{password}\n" for user, password in users.items()]
        (directory / "users").write_text("".join(lines))
        (directory / "dovecot.conf").write_text(
            _SASL_AUTH_CONF.format(directory=directory, port=self.port)
        )

    def start(self) -> None:
        self._run([self._dovecot, "-F", "-c", self.directory / "dovecot.conf"], self.port)


_SASL_AUTH_CONF = """\
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/dovecot.log
instance_name = {directory.name}
protocols = none
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain login
passdb {{
  driver = passwd-file
  args = {directory}/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home=/nonexistent
}}
service auth {{
  inet_listener {{
    address = 127.0.0.1
    port = {port}
  }}
}}
"""


class Smarthost(Postfix):
    """A Postfix that takes mail only from who logs in, as `auth` says, and only with TLS.

    At `port` that is STARTTLS; TLS from the start is at port 465 of `tls_address`.
    """

    def __init__(
        self, directory: Path, auth: SaslAuth, settings: Mapping[str, object] | None = None
    ) -> None:
        sasl = {
            "mynetworks": "192.0.2.1",
            "smtpd_sasl_auth_enable": "yes",
            "smtpd_sasl_type": "dovecot",
            "smtpd_sasl_path": f"inet:{LOOPBACK}:{auth.port}",
            "smtpd_sasl_authenticated_header": "yes",
            "smtpd_tls_auth_only": "yes",
            "smtpd_relay_restrictions": "permit_sasl_authenticated, reject",
            "smtpd_recipient_restrictions": "permit_sasl_authenticated, reject",
            **(settings or {}),
        }
        super().__init__(directory, settings=sasl)
        self.tls_address = f"127.{os.getpid() % 250 + 1}.{self.port // 250}.{self.port % 250 + 1}"
        with (self.config / "master.cf").open("a") as file:
            file.write(f"{self.tls_address}:465 inet n - n - - smtpd\n")
            file.write("  -o smtpd_tls_wrappermode=yes\n")


class Prometheus(Peer):
    """Prometheus, which looks at `target` ("host:port") every half second."""

    def __init__(self, directory: Path, target: str) -> None:
        super().__init__(directory)
        self._prometheus = program("prometheus")
        self.port = free_port()
        (directory / "prometheus.yml").write_text(_PROMETHEUS_YML.format(target=target))

    def start(self) -> None:
        options = [
            f"--config.file={self.directory}/prometheus.yml",
            f"--storage.tsdb.path={self.directory}/data",
            f"--web.listen-address={LOOPBACK}:{self.port}",
        ]
        self._run([self._prometheus, *options], self.port)
        self.wait_for_log("Server is ready to receive web requests")

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Return the values of an expression now, each with its labels ("name=value")."""
        query = urllib.parse.urlencode({"query": expression})
        url = f"http://{LOOPBACK}:{self.port}/api/v1/query?{query}"
        with urllib.request.urlopen(url, timeout=60) as response:
            found = json.load(response)["data"]["result"]
        return {
            tuple(sorted(f"{name}={value}" for name, value in each["metric"].items())): float(
                each["value"][1]
            )
            for each in found
        }


_PROMETHEUS_YML = """\
global:
  scrape_interval: 500ms
  scrape_timeout: 500ms
scrape_configs:
  - job_name: chasquid
    static_configs:
      - targets: ["{target}"]
"""


def unix_socket_accepts(path: Path) -> bool:
    """Tell if something listens on a socket of the file system."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class DovecotDirectory(Dovecot):
    """Dovecot that tells others of its users, over `userdb_socket` and `client_socket`."""

    def __init__(self, directory: Path, *, users: Mapping[str, str]) -> None:
        super().__init__(directory, users=users)
        self.userdb_socket = directory / "auth-userdb"
        self.client_socket = directory / "auth-client"
        sockets = "".join(
            f"  unix_listener {path} {{\n    mode = 0666\n  }}\n"
            for path in (self.userdb_socket, self.client_socket)
        )
        with (directory / "dovecot.conf").open("a") as file:
            file.write(f"service auth {{\n{sockets}}}\n")

    def break_passwords(self) -> None:
        """Have every check of a password fail for reasons that are no fault of the user."""
        script = self.directory / "check"
        script.write_text("#!/bin/sh\nexit 111\n")
        script.chmod(0o755)
        config = self.directory / "dovecot.conf"
        passdb = f"passdb {{\n  driver = checkpassword\n  args = {script}\n"
        start = f"passdb {{\n  driver = passwd-file\n  args = {self.directory}/users\n"
        config.write_text(config.read_text().replace(start, passdb))
        self.stop()
        self.start()


class Haproxy(Peer):
    """HAProxy that passes connections on to ports of 127.0.0.1, each with a "send-proxy".

    `ports` are those that it listens on, on ::1 as well, in the order of `ways`.
    """

    def __init__(self, directory: Path, ways: Iterable[tuple[int, str]]) -> None:
        super().__init__(directory)
        self._haproxy = program("haproxy")
        self.ports: list[int] = []
        lines = ["defaults", "mode tcp", "timeout connect 5s", "timeout client 60s"]
        lines.append("timeout server 60s")
        for port, send in ways:
            own = free_port()
            self.ports.append(own)
            lines += [f"listen {own}", f"bind {LOOPBACK}:{own}", f"bind ::1:{own}"]
            lines.append(f"server chasquid {LOOPBACK}:{port} {send}")
        (directory / "haproxy.cfg").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        self._run([self._haproxy, "-db", "-f", self.directory / "haproxy.cfg"], *self.ports)


class UpdatedNames(Peer):
    """A name server whose zones may be changed with the key in the file `key`.

    `zones` has for the name of each zone its records as in a zone file; SOA and NS are added.
    Those in `closed` are served, but not changed with that key.
    """

    def __init__(
        self, directory: Path, zones: Mapping[str, str], *, closed: Iterable[str] = ()
    ) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.zones, self.closed = dict(zones), set(closed)
        for zone, records in zones.items():
            (directory / f"{zone}.zone").write_text(_ZONE.format(zone=zone) + records)
        self.key = directory / "update.key"
        made = self._make_key()
        self.key.write_text(f"{made}\n# server {LOOPBACK}:{self.port}\n")
        self._configure(made)

    def _make_key(self) -> str:
        raise NotImplementedError

    def _configure(self, key: str) -> None:
        raise NotImplementedError

    def ask(self, name: str, kind: str) -> list[str]:
        """Return what the server has, each record as in a zone file."""
        query = dns.message.make_query(name, kind)
        answer = dns.query.tcp(query, LOOPBACK, timeout=60, port=self.port).answer
        return sorted(record.to_text() for rrset in answer for record in rrset)


class Bind(UpdatedNames):
    """BIND, which takes changes as its update-policy says."""

    policy = "grant update zonesub ANY;"

    def _make_key(self) -> str:
        return run(program("tsig-keygen"), "update").stdout

    def _configure(self, key: str) -> None:
        conf = _NAMED_CONF.format(directory=self.directory, port=self.port) + key
        for zone in self.zones:
            policy = "" if zone in self.closed else f"update-policy {{ {self.policy} }};"
            file = self.directory / f"{zone}.zone"
            conf += f'zone "{zone}" {{ type primary; file "{file}"; {policy} }};\n'
        (self.directory / "named.conf").write_text(conf)

    def start(self) -> None:
        conf = self.directory / "named.conf"
        self._run([program("named"), "-g", "-n", "1", "-c", conf], self.port)


_NAMED_CONF = """\
options {{
  directory "{directory}";
  pid-file none;
  session-keyfile none;
  lock-file none;
  listen-on port {port} {{ 127.0.0.1; }};
  listen-on-v6 {{ none; }};
  recursion no;
  dnssec-validation no;
  notify no;
}};
controls {{ }};
"""


class Knot(UpdatedNames):
    """Knot, which takes changes as its acl says."""

    def _make_key(self) -> str:
        return run(program("keymgr"), "-t", "update", "hmac-sha512").stdout

    def _configure(self, key: str) -> None:
        (self.directory / "db").mkdir()
        conf = _KNOT_CONF.format(directory=self.directory, port=self.port, key=key)
        for zone in self.zones:
            acl = "" if zone in self.closed else "    acl: update\n"
            conf += f"  - domain: {zone}\n    file: {zone}.zone\n{acl}"
        (self.directory / "knot.conf").write_text(conf)

    def start(self) -> None:
        self._run([program("knotd"), "-c", self.directory / "knot.conf"], self.port)


_KNOT_CONF = """\
server:
  rundir: {directory}
  listen: 127.0.0.1@{port}
  udp-workers: 1
  tcp-workers: 1
  background-workers: 1
log:
  - target: stderr
    any: info
database:
  storage: {directory}/db
{key}
acl:
  - id: update
    key: update
    action: update
template:
  - id: default
    storage: {directory}
    zonefile-sync: -1
    journal-content: changes
zone:
"""


class Pebble(Peer):
    """Let's Encrypt's small ACME server for tests; it validates at ports of its own.

    `http_port` and `tls_port` are where it looks for answers to challenges. A fifth of all nonces
    are refused. `issued_for` is how long its certificates are valid, in seconds.
    """

    def __init__(
        self,
        directory: Path,
        names: NameServer,
        http_port: int,
        tls_port: int,
        issued_for: int = 90 * 86400,
    ) -> None:
        super().__init__(directory)
        self.port, self._management = free_port(), free_port()
        self.url = f"https://localhost:{self.port}/dir"
        self.certificate = make_certificate(directory / "own", "localhost").fullchain
        self._names = names
        settings = {
            "listenAddress": f"{LOOPBACK}:{self.port}",
            "managementListenAddress": f"{LOOPBACK}:{self._management}",
            "certificate": str(self.certificate),
            "privateKey": str(self.certificate.parent / "privkey.pem"),
            "httpPort": http_port,
            "tlsPort": tls_port,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": False,
            "certificateValidityPeriod": issued_for,
        }
        (directory / "pebble.json").write_text(json.dumps({"pebble": settings}))

    def start(self) -> None:
        command = [program("pebble"), "-config", self.directory / "pebble.json"]
        surroundings = {
            **os.environ,
            "PEBBLE_VA_NOSLEEP": "1",
            "PEBBLE_WFE_NONCEREJECT": "20",
            "PEBBLE_AUTHZREUSE": "0",
        }
        dns = ["-dnsserver", self._names.address]
        self._run([*command, *dns], self.port, self._management, env=surroundings)

    def root(self) -> str:
        """Return the certificate that all of its own lead to."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        url = f"https://localhost:{self._management}/roots/0"
        with urllib.request.urlopen(url, timeout=60, context=context) as answer:
            return str(answer.read().decode())
