#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build chasquid.pyz: the server and its packages in one file.

    python3 build_zipapp.py

That writes `chasquid.pyz` beside this file. It takes CPython 3.11 or later, and pip the
first time, to fetch five packages into `.cache/`; from then on no network.

The work has five steps, and this file tells them in this order.

1. *Fetch.* Every package is pinned to one version and one SHA-256, and its bytes are
   checked each time they are read. Nothing that is fetched is ever run here: modules are
   taken out of wheels and source distributions as plain files.
2. *Take.* Of each package come the modules that a mail server needs, a few lines of
   METADATA (so that `importlib.metadata` can name it) and its licence. Functions that
   nothing calls are cut out of them, and comments. Some of the modules are altered
   otherwise; each alteration says why, there and in the archive.
3. *List.* What is in the archive stands in it as SPDX 2.3, where PEP 770 has it: packages,
   versions, licences, and the hashes of all files. `version --sbom` prints it.
4. *Compile.* An archive cannot keep bytecode from one start to the next, so bytecode goes
   in: a folder that is named by the cache tag of its interpreter (`cpython-311/`), with one
   file for the rooms of the server, one for those above, and one for all packages. The
   source stays at the root, with what only a reader needs, and for any other Python. Only
   an interpreter can write its own bytecode: there is one folder, for the interpreter that
   runs this, or one for each version that is found on this machine (`--all-pythons`).
5. *Write.* The same input gives the same bytes: sorted names, one date
   (SOURCE_DATE_EPOCH, else 1980), fixed permissions.

To get somebody else's archive bit by bit, name the same interpreters with `--pythons`, or
none with `--no-bytecode`, on a Python whose zlib and liblzma compress alike.

pip and build find their hooks here too, so `pip install .` needs no other package to build
the one that it installs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import email
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info < (3, 11):  # noqa: UP036 - who runs it with an older one should read this
    sys.exit("build_zipapp: needs Python 3.11 or later; this is " + sys.version.split()[0])

HERE = Path(__file__).resolve().parent

Files = dict[str, bytes]
"""Names in the archive, and what they hold."""


class Unable(Exception):
    """The archive cannot be built; the text is one sentence that says what to do."""


# --- What is fetched, and what of it is taken ------------------------------------------


class Package(NamedTuple):
    """One pinned package.

    `take` is a list of patterns for the modules that go into the archive; as in a
    .gitignore, `!` leaves out and the last pattern that matches decides. `licence` is the
    file with its terms, below the root of a source distribution or the dist-info folder of
    a wheel; where that is one of the modules, the terms are its docstring. `spdx` names those
    terms in the SPDX licence list.
    """

    name: str
    version: str
    file: str
    sha256: str
    take: str
    licence: str
    spdx: str = "NOASSERTION"

    @property
    def is_source(self) -> bool:
        """Is it a source distribution, not a wheel?"""
        return self.file.endswith(".tar.gz")

    @property
    def dist_info(self) -> str:
        """The folder of its metadata, in a wheel and in the archive."""
        return f"{self.name.replace('-', '_')}-{self.version}.dist-info"


PACKAGES = (
    Package(
        "dnspython",
        "2.9.2",
        "dnspython-2.9.2-py3-none-any.whl",
        "af15f7d385a6ae2fb35a796fde2138004c8c42c7389090e2addc83e3b3340fd8",
        # Out go DNSSEC validation, zones, QUIC, Windows and the asynchronous libraries.
        # `update` stays, because any answer may claim to be one and is parsed by it. A
        # record type that is missing here is still read, as opaque bytes.
        """
        dns/*.py
        !dns/dnssec* !dns/quic/_[!_]*
        !dns/_trio_backend.py !dns/_asyncio_backend.py !dns/win32util.py !dns/_no_ssl.py
        !dns/zone* !dns/btree* !dns/node.py !dns/versioned.py !dns/namedict.py
        !dns/grange.py !dns/serial.py !dns/e164.py !dns/tsigkeyring.py
        !dns/rdtypes/*/* !dns/rdtypes/base64base.py !dns/rdtypes/euibase.py
        !dns/rdtypes/dnskeybase.py !dns/rdtypes/dsbase.py !dns/rdtypes/rrsigbase.py
        !dns/rdtypes/svcbbase.py dns/rdtypes/*/__init__.py !dns/rdtypes/CH/*
        dns/rdtypes/IN/A.py dns/rdtypes/IN/AAAA.py dns/rdtypes/IN/SRV.py
        dns/rdtypes/ANY/CNAME.py dns/rdtypes/ANY/DNAME.py dns/rdtypes/ANY/NS.py
        dns/rdtypes/ANY/MX.py dns/rdtypes/ANY/TXT.py dns/rdtypes/ANY/SPF.py
        dns/rdtypes/ANY/PTR.py dns/rdtypes/ANY/SOA.py dns/rdtypes/ANY/TLSA.py
        dns/rdtypes/ANY/CAA.py dns/rdtypes/ANY/OPT.py dns/rdtypes/ANY/TSIG.py
        """,
        "licenses/LICENSE",
        "ISC",
    ),
    Package(
        "dkimpy",
        "1.1.8",
        "dkimpy-1.1.8.tar.gz",
        "b5f60fb47bbf5d8d762f134bcea0c388eba6b498342a682a21f1686545094b77",
        # Out go the tests and the command line tools.
        """
        dkim/*.py !dkim/tests/*
        !dkim/__main__.py !dkim/arcsign.py !dkim/arcverify.py !dkim/asyncsupport.py
        !dkim/dkimsign.py !dkim/dkimverify.py !dkim/dknewkey.py
        """,
        "LICENSE",
        "Zlib",
    ),
    Package(
        "pyspf",
        "2.0.14",
        "pyspf-2.0.14.tar.gz",
        "57a7ef01bda090173aafb6af0106251686ed73f03db4e911fcd34c57fc347186",
        "spf.py",
        "spf.py",
        "Python-2.0",
    ),
    Package(
        "idna",
        "3.20",
        "idna-3.20-py3-none-any.whl",
        "ab7ae7122974553370f0bdb919e1a960b2cd1bc1ef0276416d896db81c14582c",
        "idna/*.py !idna/__main__.py !idna/cli.py !idna/codec.py !idna/compat.py",
        "licenses/LICENSE.md",
        "BSD-3-Clause",
    ),
    Package(
        "precis-i18n",
        "1.1.2",
        "precis_i18n-1.1.2-py3-none-any.whl",
        "8e6cce33bdd8cb6289b9e85cdd7be74c30a1111cadb9d759492349c8c10b0840",
        "precis_i18n/*.py !precis_i18n/codec.py",
        "licenses/LICENSE.txt",
        "MIT",
    ),
)

# Functions and classes that nothing in the archive calls: no remaining code has their names.
LEFT_OUT = {
    "dns/asyncquery.py": "inbound_xfr",
    "dns/asyncresolver.py": """
        Resolver.resolve_address Resolver.try_ddr resolve_address try_ddr zone_for_name
        make_resolver_at resolve_at
    """,
    "dns/edns.py": "option_from_wire register_type",
    "dns/message.py": """
        Message.get_rrset Message.section_count Message.set_opcode from_file CopyMode
        make_response
    """,
    "dns/name.py": """
        Name.is_wild Name.is_superdomain Name.to_unicode Name.predecessor Name.successor
        _pad_to_max_name _pad_to_max_label _absolute_predecessor _absolute_successor
        _handle_relativity_and_call
    """,
    "dns/nameserver.py": "DoTNameserver DoQNameserver",
    "dns/query.py": "_make_socket inbound_xfr",
    "dns/rdata.py": """
        _hexify _truncate_bitmap Rdata.extended_rdatatype Rdata._processing_order
        RdatatypeExists register_type
    """,
    "dns/rdataset.py": "Rdataset.processing_order ImmutableRdataset",
    "dns/rdatatype.py": "register_type",
    "dns/rdtypes/mxbase.py": """
        MXBase._processing_order
        UncompressedMX DecompressionOnlyDowncasingMX UncompressedDowncasingMX
    """,
    "dns/rdtypes/IN/SRV.py": "SRV._processing_order",
    "dns/rdtypes/util.py": """
        Gateway Bitmap priority_processing_order weighted_processing_order
        parse_formatted_hex
    """,
    "dns/renderer.py": """
        Renderer.add_rdataset Renderer.add_edns Renderer.add_tsig Renderer.add_multi_tsig
        Renderer._write_tsig
    """,
    "dns/resolver.py": """
        CacheStatistics CacheBase Cache LRUCacheNode LRUCache Resolver.resolve_address
        Resolver.try_ddr resolve_address try_ddr zone_for_name make_resolver_at resolve_at
        _getaddrinfo _getnameinfo _getfqdn _gethostbyname _gethostbyname_ex _gethostbyaddr
        override_system_resolver restore_system_resolver
    """,
    "dns/reversename.py": "to_address",
    "dns/set.py": "Set.issubset Set.issuperset Set.isdisjoint",
    "dns/tsig.py": "GSSTSigAdapter",
    "dkim/__init__.py": "hash_headers_ed25519 DomainSigner.add_frozen ARC arc_sign arc_verify",
    "dkim/dnsplug.py": "get_txt_Milter_dns",
    "spf.py": """
        check2 query.parse_header_ar query.parse_header_spf query.parse_header
        query.get_header query.get_header_comment quote_value
    """,
    "idna/intranges.py": "intranges_from_list",
}

# Pairs of before and after, each found exactly once. dkimpy's licence wants alterations marked.
ALTERED = {
    "dkim/__init__.py": (
        # With it, an aiodns that the host happens to have would pull in asyncio.
        ("USE_ASYNC = True\n", "USE_ASYNC = False  # Altered for chasquid.pyz: was True.\n"),
        # What it logs goes nowhere here, and logging takes 0.6 MB of memory.
        ("import logging\n", "# Altered for chasquid.pyz: logging is not loaded.\n"),
        ("isEnabledFor(logging.DEBUG)", "isEnabledFor(10)"),
    ),
    "dkim/util.py": (
        (
            """\
import logging
try:
    from logging import NullHandler
except ImportError:
    class NullHandler(logging.Handler):
        def emit(self, record):
            pass
""",
            "import types  # Altered for chasquid.pyz: logging is not loaded.\n",
        ),
        (
            """\
    logger = logging.getLogger('dkimpy')
    if not logger.handlers:
        logger.addHandler(NullHandler())
    return logger
""",
            """\
    def silent(*words):
        return None
    return types.SimpleNamespace(debug=silent, error=silent, isEnabledFor=silent)
""",
        ),
    ),
    # It is not used, and takes 1 MB of memory.
    "spf.py": (
        (
            """\
try:
    from email.message import Message
except ImportError:
    from email.Message import Message
""",
            "# Altered for chasquid.pyz: email is not loaded.\n",
        ),
    ),
}

_ISC = b"# Copyright (C) Dnspython Contributors, see LICENSE for text of ISC license\n"
REPLACED = {
    "dns/_features.py": _ISC
    + b'''\
# Replaced for chasquid.pyz: idna is in the archive, and whatever else dnspython could make
# use of (trio, httpx, aioquic, cryptography) is left alone even where the host has it.

_known: dict[str, bool] = {"idna": True}


def have(feature: str) -> bool:
    """Is *feature* available?"""
    return _known.get(feature, False)


def force(feature: str, enabled: bool) -> None:
    """Force the status of *feature* to be *enabled*."""
    _known[feature] = enabled
''',
    # What is imported at every start, and called by nobody here, is a stub.
    "dns/_ddr.py": _ISC
    + b"# Replaced for chasquid.pyz: designated resolvers are not discovered.\n",
    "dns/transaction.py": _ISC
    + b'''\
# Replaced for chasquid.pyz: zones are neither kept nor transferred.


class TransactionManager:
    """Named by functions that transfer zones."""


class Transaction:
    """The same."""
''',
    "dns/xfr.py": _ISC
    + b'''\
# Replaced for chasquid.pyz: zones are neither kept nor transferred.

import dns.exception


class TransferError(dns.exception.DNSException):
    """Another name for it is made in dns.query."""
''',
}


# --- 1. Fetch --------------------------------------------------------------------------

# pip asks a source distribution for its metadata, even one that it only downloads, and
# would run its setup.py for that. Told not to isolate the build, it takes the setuptools
# that it can import, and this stand-in answers without a look at setup.py.
STAND_IN = """\
import email
import os


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        with open("PKG-INFO", encoding="utf-8") as stream:
            said = email.message_from_file(stream)
        folder = "%s-%s.dist-info" % (said["Name"], said["Version"])
        os.mkdir(os.path.join(metadata_directory, folder))
        path = os.path.join(metadata_directory, folder, "METADATA")
        with open(path, "w", encoding="utf-8") as stream:
            for field in ("Metadata-Version", "Name", "Version"):
                stream.write("%s: %s\\n" % (field, said[field]))
        return folder
"""


def fetch(packages: Sequence[Package], cache: Path) -> None:
    """Bring what `cache` lacks into it, by way of pip and the index that pip is set to."""
    wanted = [package for package in packages if cached(package, cache) is None]
    if not wanted:
        return
    if importlib.util.find_spec("pip") is None:
        names = ", ".join(package.file for package in wanted)
        raise Unable(
            f"{sys.executable} has no pip to fetch packages with: install pip for it, run this"
            f" with the Python of a virtual environment, or put {names} into {cache}"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        download(wanted, Path(folder))
        for package in wanted:
            if cached(package, Path(folder)) is None:
                raise Unable(f"pip fetched something else than the pinned {package.file}")
            os.replace(Path(folder, package.file), cache / package.file)


def cached(package: Package, cache: Path) -> bytes | None:
    """The bytes of the package, or None where they are not there or not the pinned ones."""
    try:
        data = (cache / package.file).read_bytes()
    except FileNotFoundError:
        return None
    return data if hashlib.sha256(data).hexdigest() == package.sha256 else None


def download(packages: Sequence[Package], folder: Path) -> None:
    """Let pip download the packages, hash by hash, into `folder`."""
    (folder / "setuptools").mkdir()
    (folder / "setuptools" / "__init__.py").touch()
    (folder / "setuptools" / "build_meta.py").write_text(STAND_IN, encoding="utf-8")
    wishes = folder / "requirements.txt"
    wishes.write_text("\n".join(requirements(packages)), encoding="utf-8")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    # pip 23 has to be told not to call setup.py itself, and later ones lose that option; as
    # a variable it is ignored where it is unknown.
    settings = {"PIP_USE_PEP517": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(wishes), "--dest", str(folder)]
    print(f"build_zipapp: fetching {len(packages)} packages", file=sys.stderr)
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise Unable(
            f"pip could not fetch the packages ({reason(done.stderr)}): see that the network"
            f" and pip's index can be reached, or put the files into {folder.parent}"
        )


def requirements(packages: Sequence[Package]) -> Iterator[str]:
    """The lines of a requirements file that only the pinned files can satisfy."""
    for package in packages:
        yield ("--no-binary " if package.is_source else "--only-binary ") + package.name
    for package in packages:
        yield f"{package.name}=={package.version} --hash=sha256:{package.sha256}"


def reason(text: str) -> str:
    """Why a program says that it gave up: its last ERROR line, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it gave no reason"])[-1]


# --- 2. Take ---------------------------------------------------------------------------

NOTICE = """\
chasquid.pyz, a mail server.

SPDX-License-Identifier: Apache-2.0

Licensed under the Apache License, Version 2.0 (the "License"); you may not use it except
in compliance with the License. You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the
License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND,
either express or implied. See the License for the specific language governing permissions
and limitations under the License.

The packages that travel in this archive have licences of their own: each lies in the
folder NAME-VERSION.dist-info/licenses of its package.
"""

METADATA_FIELDS = (
    "Metadata-Version",
    "Name",
    "Version",
    "Summary",
    "Home-page",
    "Author",
    "Author-email",
    "License",
    "License-Expression",
    "Requires-Python",
)


def taken(packages: Sequence[Package], cache: Path) -> dict[Package, Files]:
    """Modules, metadata and licence of each package."""
    files: dict[Package, Files] = {}
    for package in packages:
        data = cached(package, cache)
        if data is None:
            raise Unable(f"{cache / package.file} is missing or has changed: run this once more")
        try:
            files[package] = taken_from(package, unpacked(package, data))
        except KeyError as missing:
            raise Unable(f"{package.file} holds no {missing}: adapt its entry") from None
    return files


def unpacked(package: Package, data: bytes) -> Files:
    """All the files of a wheel, or those below the one root of a source distribution."""
    if not package.is_source:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name[-1] != "/"}
    files: Files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            if stream is not None:
                files[member.name.partition("/")[2]] = stream.read()
    return files


def taken_from(package: Package, files: Files) -> Files:
    """What of one unpacked package goes into the archive."""
    kept = {name: altered(name, data) for name, data in files.items() if wants(package.take, name)}
    about = "" if package.is_source else package.dist_info + "/"
    metadata = files[about + ("PKG-INFO" if package.is_source else "METADATA")]
    if package.licence in kept:
        terms, name = first_text(kept[package.licence]), "LICENSE"
    else:
        terms, name = files[about + package.licence], Path(package.licence).name
    return kept | {
        f"{package.dist_info}/METADATA": shortened(metadata),
        f"{package.dist_info}/licenses/{name}": terms,
    }


def first_text(module: bytes) -> bytes:
    """The first string that stands by itself in a module: its docstring, as people see it."""
    for node in ast.parse(module).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return inspect.cleandoc(str(node.value.value)).encode() + b"\n"
    raise KeyError("docstring")


def wants(patterns: str, name: str) -> bool:
    """Does the last of the patterns that match say yes? (`*` crosses slashes here.)"""
    verdict = False
    for pattern in patterns.split():
        if fnmatchcase(name, pattern.removeprefix("!")):
            verdict = not pattern.startswith("!")
    return verdict


def altered(name: str, data: bytes) -> bytes:
    """The module as it goes into the archive."""
    if name in REPLACED:
        return REPLACED[name]
    if name.endswith(".py"):
        data = undocumented(data)
    for before, after in ALTERED.get(name, ()):
        if data.count(before.encode()) != 1:
            raise Unable(f"{name} is not the one that ALTERED was written for: adapt the entry")
        data = data.replace(before.encode(), after.encode())
    return without(data, LEFT_OUT[name].split()) if name in LEFT_OUT else data


SHORTENED = b"# Altered for chasquid.pyz: without what is not called.\n"


def without(module: bytes, names: Sequence[str]) -> bytes:
    """A module of a package without these functions and classes ("Class.method" too).

    Every line that stays keeps its number.
    """
    found: dict[str, ast.stmt] = {}

    def note(body: Sequence[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                note(node.body, f"{prefix}{node.name}.")

    with warnings.catch_warnings(action="ignore"):  # of a backslash in one of pyspf's
        note(ast.parse(module).body, "")
    lines = module.split(b"\n")
    for name in names:
        node: Any = found[name]
        first = min(part.lineno for part in (node, *node.decorator_list)) - 1
        lines[first : node.end_lineno] = [b""] * (node.end_lineno - first)
    return b"\n".join(lines) + SHORTENED


UNDOCUMENTED = b"# Altered for chasquid.pyz: without comments and the docstrings of functions.\n"


def undocumented(module: bytes) -> bytes:
    """A module of a package without comments and its functions' docstrings, a third of its source.

    Every line keeps its number. What may be terms stays: the module's own docstring, and the
    comments above the code, but of those that refer to LICENSE only who holds the copyright.
    """
    with warnings.catch_warnings(action="ignore"):  # of a backslash in one of pyspf's
        tree = ast.parse(module)
    lines = module.split(b"\n")
    for row, column in comments(module):
        lines[row] = lines[row][:column].rstrip()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0]
        first, last = text.lineno - 1, (text.end_lineno or 0) - 1
        rest = lines[last][text.end_col_offset :]
        lines[first] = lines[first][: text.col_offset] + b'""' + rest
        lines[first + 1 : last + 1] = [b""] * (last - first)
    short = b"\n".join(lines)
    return short if short == module else short + UNDOCUMENTED


def comments(module: bytes) -> Iterator[tuple[int, int]]:
    """Where comments begin that can go: line, and octet in it, both from 0."""
    in_code, referred = False, b"see LICENSE for text" in module
    for token in tokenize.tokenize(io.BytesIO(module).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            if in_code or (referred and "Copyright" not in token.string):
                yield row - 1, len(token.line[:column].encode())
        elif token.type not in (tokenize.ENCODING, tokenize.NL):
            in_code = True


def shortened(metadata: bytes) -> bytes:
    """The header of a METADATA file: the readme below it would only take room."""
    said = email.message_from_bytes(metadata)
    lines = [f"{field}: {said[field]}\n" for field in METADATA_FIELDS if said[field]]
    return "".join(lines).encode()


def own_files(source: Path) -> Files:
    """The server itself, the sample configuration, its metadata and its notice."""
    try:
        data = source.read_bytes()
        version = checked_version(source.name, ast.parse(data))
    except FileNotFoundError:
        raise Unable(f"there is no {source}: build_zipapp.py belongs beside it") from None
    except SyntaxError as error:
        raise Unable(f"{source.name}:{error.lineno}: {error.msg}") from None
    about = f"chasquid-{version}.dist-info"
    samples = source.parent / "sample-config"
    templates = {
        path.relative_to(source.parent).as_posix(): path.read_bytes()
        for path in samples.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    metadata = (
        f"Metadata-Version: 2.4\nName: chasquid\nVersion: {version}\n"
        "Summary: A mail server in one file\nLicense-Expression: Apache-2.0\n"
        "Requires-Python: >=3.11\n"
    )
    return templates | {
        "chasquid.py": data,
        f"{about}/METADATA": metadata.encode(),
        f"{about}/licenses/NOTICE": NOTICE.encode(),
    }


def checked_version(name: str, module: ast.Module) -> str:
    """The version that the module states, given that it has what the archive calls too."""
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    for function in ("serve_if_asked", "main"):
        if function not in functions:
            raise Unable(f"{name} has no function {function}() for the archive to call: define one")
    for node in module.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if [ast.unparse(target) for target in targets] == ["__version__"]:
                return str(node.value.value)
    raise Unable(f'{name} does not state its version: add a line __version__ = "…"')


# --- 3. List ---------------------------------------------------------------------------

OF_TREES = (
    "The folders cpython-* hold the modules once more, compiled by the interpreters that they are"
    " named after, and __main__.py loads them from there. They depend on who builds, and this list"
    " does not."
)


class Part(NamedTuple):
    """A package as the list names it: `about` is the start of its identifiers."""

    about: str
    name: str
    version: str
    spdx: str
    files: Files
    extra: dict[str, object]


def sbom(own: Files, packages: Mapping[Package, Files], date: float) -> Files:
    """The list of what is in the archive, as a file of it: SPDX 2.3 in JSON.

    Nothing in it depends on the Python that builds.
    """
    about = next(name for name in own if name.endswith("/METADATA")).partition("/")[0]
    version = about.removeprefix("chasquid-").removesuffix(".dist-info")
    parts = [Part("chasquid", "chasquid", version, "Apache-2.0", own, {})]
    for package, files in packages.items():
        extra: dict[str, object] = {
            "checksums": [{"algorithm": "SHA256", "checksumValue": package.sha256}],
            "packageFileName": package.file,
            "comment": f"Part of {package.file}, whose hash this is; its modules are altered,"
            " and say so at their end or beginning.",
            "externalRefs": [
                {
                    "referenceCategory": "PACKAGE-MANAGER",
                    "referenceType": "purl",
                    "referenceLocator": f"pkg:pypi/{package.name}@{package.version}",
                }
            ],
        }
        parts.append(Part(package.name, package.name, package.version, package.spdx, files, extra))
    listed = [listed_file(part, name) for part in parts for name in sorted(part.files)]
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"chasquid.pyz-{version}",
        "documentNamespace": f"urn:sha256:{digest}",
        "comment": OF_TREES,
        "creationInfo": {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(date)),
            "creators": ["Tool: build_zipapp.py"],
        },
        "packages": [listed_package(part) for part in parts],
        "files": listed,
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": "SPDXRef-chasquid",
            },
            *(
                {
                    "spdxElementId": "SPDXRef-chasquid",
                    "relationshipType": "CONTAINS",
                    "relatedSpdxElement": f"SPDXRef-{part.about}",
                }
                for part in parts[1:]
            ),
        ],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    return {f"{about}/sboms/chasquid.spdx.json": text.encode()}


def file_id(part: Part, name: str) -> str:
    """The identifier of a file, of letters, digits, "." and "-"."""
    return f"SPDXRef-{part.about}-{re.sub('[^A-Za-z0-9.-]', '-', name)}"


def listed_file(part: Part, name: str) -> dict[str, object]:
    """A file with its hashes; SPDX 2.3 asks for SHA-1, those who check will take SHA-256."""
    data = part.files[name]
    return {
        "SPDXID": file_id(part, name),
        "fileName": f"./{name}",
        "checksums": [
            {"algorithm": "SHA1", "checksumValue": hashlib.sha1(data).hexdigest()},
            {"algorithm": "SHA256", "checksumValue": hashlib.sha256(data).hexdigest()},
        ],
        "licenseConcluded": part.spdx,
        "copyrightText": "NOASSERTION",
    }


def listed_package(part: Part) -> dict[str, object]:
    """A package with its files."""
    digests = sorted(hashlib.sha1(data).hexdigest() for data in part.files.values())
    return {
        "SPDXID": f"SPDXRef-{part.about}",
        "name": part.name,
        "versionInfo": part.version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": True,
        "packageVerificationCode": {
            "packageVerificationCodeValue": hashlib.sha1("".join(digests).encode()).hexdigest()
        },
        "licenseConcluded": part.spdx,
        "licenseDeclared": part.spdx,
        "copyrightText": "NOASSERTION",
        "hasFiles": [file_id(part, name) for name in sorted(part.files)],
        **part.extra,
    }


# --- 4. Compile ------------------------------------------------------------------------

PROBE = """\
import importlib.util, sys
print(sys.implementation.cache_tag, importlib.util.MAGIC_NUMBER.hex(), sys.version.split()[0])
"""

# -I and -S keep the environment out, so that asserts, which dkimpy relies on, are always
# compiled in. What only a reader needs stays in the source: bytecode has no docstrings
# (dnspython's exceptions excepted, whose messages they are), no annotations of functions, and,
# by COMPILE_OPTIONS, no columns for the carets in a traceback. Line numbers are there, and
# PYTHONPATH=chasquid.pyz reads the source, for help() and for who imports the module.
#
# The rooms of chasquid.py that a server needs are a file of their own, which is read at each
# start. The rooms above are run in the same module when one of their names is asked for: no
# room names a higher one, so the server never does. They, and all the packages, are compressed
# as one piece each, and better, by an interpreter that has lzma.
COMPILE_OPTIONS = ("-X", "no_debug_ranges")
LAST_ROOM_OF_SERVER = "SERVE"
COMPILER = """\
import ast, base64, json, marshal, sys
functions = (ast.FunctionDef, ast.AsyncFunctionDef)

def strip(node, documented):
    if isinstance(node, documented) and ast.get_docstring(node, False):
        node.body[0].value.value = ""
    if isinstance(node, functions):
        node.returns = None
    if isinstance(node, ast.arg):
        node.annotation = None

def parsed(name, source):
    tree = ast.parse(source)
    documented = (ast.Module, *functions)
    if not name.startswith("dns/"):
        documented += (ast.ClassDef,)
    for node in ast.walk(tree):
        strip(node, documented)
    return tree

def compiled(name, tree):
    return compile(tree, "chasquid.pyz/" + name, "exec", dont_inherit=True)

def without_rooms(tree, is_left_out):
    keep = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 0
            and node.module == "__future__" or not is_left_out(node)]
    return ast.Module(keep, [])

# A dictionary of 1 MB, about the size of the data, takes no more memory than that.
try:
    import lzma
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20}]
    method = "lzma"
except ImportError:
    method = ""

def pressed(data):
    return lzma.compress(data, filters=filters) if method else data

request = json.load(sys.stdin)
sources = {name: base64.b64decode(text) for name, text in request["sources"].items()}
own = parsed("chasquid.py", sources.pop("chasquid.py"))
first = request["first line of other rooms"]
server = without_rooms(own, lambda node: node.lineno >= first)
server.body += ast.parse(request["getattr"]).body
others = without_rooms(own, lambda node: node.lineno < first)
packages = {}
for path, source in sources.items():
    name, _, last = path.removesuffix(".py").replace("/", ".").rpartition(".")
    is_package = last == "__init__"
    name = name if is_package else (name + "." if name else "") + last
    packages[name] = (is_package, path, compiled(path, parsed(path, source)))
done = {
    "server": marshal.dumps(compiled("chasquid.py", server)),
    "others": pressed(marshal.dumps(compiled("chasquid.py", others))),
    "packages": pressed(marshal.dumps(packages)),
}
files = {name: base64.b64encode(data).decode() for name, data in done.items()}
json.dump({"method": method, "files": files}, sys.stdout)
"""

# Ends the rooms of the server in an archive (PEP 562).
GETATTR = """\
def __getattr__(name):
    if not (name.startswith("__") and name.endswith("__")):
        __loader__.add_others(globals())
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
"""


class Interpreter(NamedTuple):
    """A CPython that runs."""

    path: str
    tag: str  # of its bytecode, and so the name of its tree
    magic: bytes  # before releases one tag may have several kinds of bytecode
    version: str


def run_python(path: str, script: str, text: str = "", options: Sequence[str] = ()) -> str:
    """What a script prints that is given `text`, with no environment or site in its way."""
    command = [path, "-I", "-S", "-W", "ignore", *options, "-c", script]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=600)
    except OSError as error:
        raise Unable(f"{path} does not run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise Unable(f"{path} took more than ten minutes") from None
    if done.returncode:
        raise Unable(f"{path} failed: {reason(done.stderr)}")
    return done.stdout


def probed(path: str) -> Interpreter:
    """What kind of Python this is; Unable where it is none that can be used."""
    words = run_python(path, PROBE).split()
    if len(words) != 3 or not re.fullmatch(r"cpython-3(1[1-9]|[2-9]\d)", words[0]):
        raise Unable(f"{path} is not CPython 3.11 or later")
    return Interpreter(path, words[0], bytes.fromhex(words[1]), words[2])


def named(paths: Sequence[str]) -> list[Interpreter]:
    """The interpreters that were asked for: all of them, and each kind once."""
    found = [probed(path) for path in paths]
    if len({python.tag for python in found}) < len(found):
        raise Unable("--pythons names two interpreters of the same version: leave one out")
    return found


def at_hand() -> list[Interpreter]:
    """This interpreter, then one of each other version that the machine has."""
    found: dict[str, Interpreter] = {}
    for path in [sys.executable, *candidates()]:
        try:
            python = probed(path)
        except Unable:
            print(
                f"build_zipapp: skipped {path}, no working CPython 3.11 or later", file=sys.stderr
            )
        else:
            found.setdefault(python.tag, python)
    return list(found.values())


def candidates() -> Iterator[str]:
    """Where other interpreters may be: the search path, then those that pyenv keeps."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    folders = [Path(name) for name in os.get_exec_path() if name]
    folders += sorted(versions.glob("*/bin"), reverse=True)
    for folder in folders:
        for path in sorted(folder.glob("python3.*")):
            if re.fullmatch(r"python3\.(1[1-9]|[2-9]\d)", path.name):
                yield str(path)


class Tree(NamedTuple):
    """The folder of an interpreter; `method` is the module that its larger files need, or ""."""

    python: Interpreter
    method: str
    files: Files


def bytecode(python: Interpreter, files: Files) -> Tree:
    """Every module of `files`, compiled by `python`."""
    sources = {name: data for name, data in sorted(files.items()) if name.endswith(".py")}
    request = {
        "sources": {name: base64.b64encode(data).decode() for name, data in sources.items()},
        "first line of other rooms": first_line_of_others(files["chasquid.py"].decode()),
        "getattr": GETATTR,
    }
    answer = json.loads(run_python(python.path, COMPILER, json.dumps(request), COMPILE_OPTIONS))
    folder = {
        f"{python.tag}/{name}": base64.b64decode(text) for name, text in answer["files"].items()
    }
    return Tree(python, answer["method"], folder)


def first_line_of_others(source: str) -> int:
    """Where the rooms begin that a server does without: below the last one that it needs."""
    rooms = [
        (line.removeprefix("# ROOM: "), number)
        for number, line in enumerate(source.splitlines(), 1)
        if line.startswith("# ROOM: ")
    ]
    names = [name for name, _ in rooms]
    if LAST_ROOM_OF_SERVER not in names[:-1]:
        raise Unable(f"chasquid.py has no room {LAST_ROOM_OF_SERVER} with others above: adapt it")
    return rooms[names.index(LAST_ROOM_OF_SERVER) + 1][1]


# --- 5. Write --------------------------------------------------------------------------

# The first lines must make sense to any Python that might be called python3, or even
# python, so they are written for 2.7. What is imported later is not: hence no import of
# chasquid above the check. A tree is used only where its bytecode is exactly this
# interpreter's, and where this interpreter can read it.
MAIN = """\
# SPDX-License-Identifier: Apache-2.0
import sys

if sys.version_info < (3, 11):
    sys.stderr.write(
        "chasquid.pyz needs Python 3.11 or later; this is %d.%d.%d (%s)\\n"
        % (tuple(sys.version_info[:3]) + (sys.executable,))
    )
    sys.exit(1)
if sys.flags.optimize:
    sys.stderr.write(
        "chasquid.pyz must run without -O and PYTHONOPTIMIZE: they drop checks of signatures\\n"
    )
    sys.exit(1)

import gc
import marshal
import threading
from importlib.machinery import ModuleSpec
from importlib.util import MAGIC_NUMBER, find_spec
from zipimport import zipimporter

TREES = {TREES}
PACKAGES = {PACKAGES}


# Finds modules as bytecode, and loads them; an archive that lies in sys.path has the source.
class Tree:
    def __init__(self, archive, tag, method):
        self.archive = archive
        self.folder = archive + "/" + tag + "/"
        self.method = method
        self.get_data = zipimporter(archive).get_data
        self.packages = None
        self.lock = threading.Lock()
        self.complete = False

    def read(self, name, method=""):
        data = self.get_data(self.folder + name)
        return marshal.loads(__import__(method).decompress(data) if method else data)

    def find_spec(self, name, path=None, target=None):
        if name == "chasquid":
            return self.spec(name, False, "chasquid.py")
        if name.partition(".")[0] in PACKAGES:
            if self.packages is None:
                self.packages = self.read("packages", self.method)
            if name in self.packages:
                return self.spec(name, *self.packages[name][:2])

    def spec(self, name, is_package, path):
        path = self.archive + "/" + path
        spec = ModuleSpec(name, self, origin=path, is_package=is_package)
        spec.has_location = True
        spec.cached = self.folder
        if is_package:
            spec.submodule_search_locations.append(path.rpartition("/")[0])
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        if module.__name__ == "chasquid":
            self.run(self.read("server"), vars(module))
        else:
            self.run(self.packages[module.__name__][2], vars(module))

    def add_others(self, names):
        with self.lock:
            if not self.complete:
                self.run(self.read("others", self.method), names)
                self.complete = True

    def run(self, code, names):
        enabled = gc.isenabled()
        gc.disable()  # nothing of what is loaded is garbage
        try:
            exec(code, names)
        finally:
            if enabled:
                gc.enable()


magic, method = TREES.get(sys.implementation.cache_tag, ("", ""))
if magic == MAGIC_NUMBER.hex() and (not method or find_spec(method)):
    sys.meta_path.insert(0, Tree(sys.path[0], sys.implementation.cache_tag, method))

import chasquid

status = chasquid.serve_if_asked()
sys.exit(chasquid.main() if status is None else status)
"""

SHEBANG = b"#!/usr/bin/env python3\n"


def contents(own: Files, packages: Files, pythons: Sequence[Interpreter]) -> Files:
    """Everything that goes into the archive."""
    files = own | packages
    trees = [bytecode(python, files) for python in pythons]
    kinds = {tree.python.tag: (tree.python.magic.hex(), tree.method) for tree in trees}
    tops = {name.partition("/")[0].removesuffix(".py") for name in packages if ".py" in name}
    main = MAIN.replace("{TREES}", repr(dict(sorted(kinds.items()))))
    main = main.replace("{PACKAGES}", repr(sorted(tops)))
    for tree in trees:
        files |= tree.files
    return files | {"__main__.py": main.encode()}


def archived(files: Files, date: float, start: bytes = SHEBANG) -> bytes:
    """The bytes of the archive, which depend on nothing but the arguments."""
    stream = io.BytesIO()
    stream.write(start)
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, time.gmtime(date)[:6])
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, on whichever system this runs
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name], compresslevel=9)
    return stream.getvalue()


def date_of_entries() -> float:
    """SOURCE_DATE_EPOCH, or else the first moment that a zip file can tell."""
    earliest, latest = 315532800, 4354819198  # 1980 and the end of 2107
    text = os.environ.get("SOURCE_DATE_EPOCH") or str(earliest)
    if not text.isascii() or not text.isdigit() or int(text) > latest:
        raise Unable(f"SOURCE_DATE_EPOCH is {text!r}: make it seconds since 1970, or unset it")
    return max(int(text), earliest)


def write(path: Path, data: bytes) -> None:
    """Put the archive in place, executable, whole or not at all."""
    if not path.parent.is_dir():
        raise Unable(f"there is no folder {path.parent} to write into: make it first")
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        fresh.chmod(0o755)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


# --- The package -----------------------------------------------------------------------

# What pyproject.toml names as its build-backend (PEP 517, PEP 660). A type checker looks for
# the types of an installed package, never of a single module (PEP 561), so a wheel holds
# the module as the one file of a package, and py.typed beside it.
START = b"""\
# SPDX-License-Identifier: Apache-2.0
import sys

from chasquid import main

sys.exit(main())
"""
TAG = "py3-none-any"


def build_wheel(
    wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None
) -> str:
    """Write a wheel into a folder (PEP 517); its name."""
    module = (HERE / "chasquid.py").read_bytes()
    files = {"__init__.py": module, "__main__.py": START, "py.typed": b""}
    package = {f"chasquid/{name}": data for name, data in files.items()}
    return write_wheel(Path(wheel_directory), package)


def build_editable(
    wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None
) -> str:
    """Write a wheel that has the module imported from where it lies (PEP 660); its name."""
    return write_wheel(Path(wheel_directory), {"chasquid.pth": f"{HERE}\n".encode()})


def build_sdist(sdist_directory: str, config_settings: object = None) -> str:
    """Write a source distribution, what a wheel is built from (PEP 517); its name."""
    about, files = package_metadata()
    root, date = about.removesuffix(".dist-info"), int(date_of_entries())
    names = ("README.md", "build_zipapp.py", "chasquid.py", "pyproject.toml")
    sources = {name: (HERE / name).read_bytes() for name in names}
    sources["PKG-INFO"] = files["METADATA"]
    stream = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=stream, mtime=date) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in sorted(sources.items()):
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size, entry.mtime = len(data), date
            tar.addfile(entry, io.BytesIO(data))
    (Path(sdist_directory) / f"{root}.tar.gz").write_bytes(stream.getvalue())
    return f"{root}.tar.gz"


def write_wheel(folder: Path, package: Files) -> str:
    """Write a wheel with these files and our metadata; its name."""
    about, files = package_metadata()
    wheel = f"Wheel-Version: 1.0\nGenerator: build_zipapp\nRoot-Is-Purelib: true\nTag: {TAG}\n"
    files["WHEEL"] = wheel.encode()
    package = package | {f"{about}/{name}": data for name, data in files.items()}
    record = "".join(map(recorded, package, package.values())) + f"{about}/RECORD,,\n"
    package[f"{about}/RECORD"] = record.encode()
    name = f"{about.removesuffix('.dist-info')}-{TAG}.whl"
    (folder / name).write_bytes(archived(package, date_of_entries(), b""))
    return name


def recorded(name: str, data: bytes) -> str:
    """The line of a file in RECORD, by which pip checks and removes what it has installed."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def package_metadata() -> tuple[str, Files]:
    """The name of the dist-info folder, and its files but WHEEL and RECORD."""
    import tomllib  # older Pythons lack it, and have been told above

    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = own_files(HERE / "chasquid.py")
    [about] = {name.partition("/")[0] for name in own if ".dist-info/" in name}
    needs = [f"Requires-Dist: {need}\n" for need in project["dependencies"]]
    for extra, more in project["optional-dependencies"].items():
        needs.append(f"Provides-Extra: {extra}\n")
        needs += [f"Requires-Dist: {need}; extra == '{extra}'\n" for need in more]
    kind = "Description-Content-Type: text/markdown\nLicense-File: NOTICE\n\n"
    readme = (HERE / project["readme"]).read_bytes()
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    points = [
        f"[{group}]\n" + "".join(f"{name} = {what}\n" for name, what in rows.items())
        for group, rows in groups.items()
    ]
    return about, {
        "METADATA": own[f"{about}/METADATA"] + ("".join(needs) + kind).encode() + readme,
        "entry_points.txt": "\n".join(points).encode(),
        "licenses/NOTICE": NOTICE.encode(),
    }


# --- The command -----------------------------------------------------------------------


def build(output: Path, cache: Path, pythons: Sequence[Interpreter]) -> str:
    """Build the archive; a line that says what came of it."""
    date = date_of_entries()
    own = own_files(HERE / "chasquid.py")
    fetch(PACKAGES, cache)
    packages = taken(PACKAGES, cache)
    files = {name: data for part in packages.values() for name, data in part.items()}
    data = archived(contents(own | sbom(own, packages, date), files, pythons), date)
    write(output, data)
    versions = ", ".join(python.version for python in pythons)
    what = f"bytecode of CPython {versions}" if versions else "no bytecode"
    return f"{output}: {len(data):,} bytes, {what}"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description="Build chasquid.pyz.")
    parser.add_argument("--output", type=Path, default=HERE / "chasquid.pyz", metavar="FILE")
    parser.add_argument(
        "--cache",
        type=Path,
        default=HERE / ".cache",
        metavar="DIR",
        help="where fetched packages are kept (default: .cache beside this file)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--pythons",
        metavar="LIST",
        help="interpreters to compile with, such as"
        " python3.11,python3.13 (default: the one that runs this)",
    )
    which.add_argument(
        "--all-pythons", action="store_true", help="compile with each version on this machine"
    )
    which.add_argument(
        "--no-bytecode", action="store_true", help="source only: smaller, and slower to start"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Build what the command line asks for; 0, or 1 and a sentence on standard error."""
    asked = arguments(words)
    try:
        if asked.no_bytecode:
            pythons = []
        elif asked.all_pythons:
            pythons = at_hand()
        else:
            names = asked.pythons or sys.executable
            pythons = named([name.strip() for name in names.split(",") if name.strip()])
        print(build(asked.output, asked.cache.resolve(), pythons))
    except Unable as sentence:
        print(f"build_zipapp: {sentence}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"build_zipapp: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_zipapp: stopped before the archive was written", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
