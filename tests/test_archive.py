# SPDX-License-Identifier: Apache-2.0
"""chasquid.pyz and what builds it.

Most of these build small archives from packages made up here, and need neither network
nor the real packages. Those that look at the real ones take them from `.cache/`, which
`python3 build_zipapp.py` fills, and are skipped while it is empty.
"""

from __future__ import annotations

import ast
import builtins
import gc
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import json
import marshal
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("build_zipapp", HERE / "build_zipapp.py")
assert SPEC and SPEC.loader
builder = importlib.util.module_from_spec(SPEC)
sys.modules["build_zipapp"] = builder  # NamedTuple looks its module up
SPEC.loader.exec_module(builder)

STAND_IN = '''\
"""Stands in for the server: loads every package and tells what it saw."""
from __future__ import annotations

__version__ = "7.8.9"
# ROOM: SERVE


def serve_if_asked():
    return 5 if sys.argv[1:] == ["serve"] else None


import sys
# ROOM: COMMANDS
value: no_such_type = 8


def main():
    import importlib.metadata, json, os, sys
    import dkim, dns.asyncresolver, dns.name, dns.resolver, dns.update, idna, precis_i18n, spf
    import dns.query, dns.tsig
    os.chdir("/")  # what is loaded from here on is found all the same
    import idna.uts46data
    names = "chasquid dnspython dkimpy pyspf idna precis-i18n".split()
    json.dump({
        "arguments": sys.argv[1:],
        "files": {name: sys.modules[name].__file__
                  for name in ("chasquid", "dns.resolver", "dkim", "spf", "idna.uts46data")},
        "cached": sorted({sys.modules[name].__cached__ for name in ("chasquid", "dns", "spf")}),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "modules": sorted(sys.modules),
        "tlsa": dns.rdata.get_rdata_class(1, 52).__name__,
        "idna": dns.name.have_idna_2008,
        "value": value,
    }, sys.stdout)
    return 3
'''


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def checkout(folder: Path, source: str = STAND_IN) -> Path:
    """A folder with the builder and a module to build from; the builder's path."""
    folder.mkdir()
    (folder / "chasquid.py").write_text(source, encoding="utf-8")
    return Path(shutil.copy(HERE / "build_zipapp.py", folder))


# --- Packages made up for the purpose --------------------------------------------------

SETUP_PY = "open({marker!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='sweet')\n"


def source_package(folder: Path, marker: Path, **changed: str) -> builder.Package:
    """A source distribution whose setup.py would leave a mark."""
    files = {
        "sweet-1.5/PKG-INFO": "Metadata-Version: 1.1\nName: sweet\nVersion: 1.5\nLicense: MIT\n"
        "Requires: bitter\n\nA long readme.\n",
        "sweet-1.5/setup.py": SETUP_PY.format(marker=str(marker)),
        "sweet-1.5/LICENSE": "Be kind.\n",
        "sweet-1.5/sweet/__init__.py": "taste = 'sweet'\n",
        "sweet-1.5/sweet/test_it.py": "",
        "sweet-1.5/sweet/_fast.so": "ELF",
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    (folder / "sweet-1.5.tar.gz").write_bytes(stream.getvalue())
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    package = builder.Package(
        "sweet", "1.5", "sweet-1.5.tar.gz", digest, "sweet/*.py !sweet/test_*", "LICENSE"
    )
    return package._replace(**changed)


def wheel_package(folder: Path) -> builder.Package:
    """A wheel of one module, whose licence is its docstring."""
    name = "sour_cream-2-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("sour.py", "#!x\nfrom __future__ import annotations\n'''Be\n  fair.'''\n")
        wheel.writestr(
            "sour_cream-2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: sour-cream\nVersion: 2\n\n",
        )
        wheel.writestr("sour_cream-2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return builder.Package("sour-cream", "2", name, digest, "sour.py", "sour.py")


@pytest.fixture
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


# --- Fetching --------------------------------------------------------------------------


def test_packages_are_fetched_once_and_no_setup_py_is_run(own_index: Path, tmp_path: Path) -> None:
    cache, marker = tmp_path / "cache", tmp_path / "setup.py was run"
    packages = [source_package(own_index, marker), wheel_package(own_index)]
    builder.fetch(packages, cache)
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        package.file for package in packages
    )
    assert not marker.exists()
    shutil.rmtree(own_index)
    builder.fetch(packages, cache)  # from here on there is nowhere to fetch from


def test_a_damaged_copy_is_fetched_anew(own_index: Path, tmp_path: Path) -> None:
    package = wheel_package(own_index)
    (tmp_path / package.file).write_bytes(b"damaged")
    with pytest.raises(builder.Unable, match="missing or has changed"):
        builder.taken([package], tmp_path)
    builder.fetch([package], tmp_path)
    assert builder.cached(package, tmp_path)


def test_another_file_than_the_pinned_one_is_refused(own_index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "setup.py was run"
    package = source_package(own_index, marker, sha256="0" * 64)
    with pytest.raises(
        builder.Unable,
        match="pip could not fetch the packages .*DO NOT MATCH THE HASHES.*: see that",
    ):
        builder.fetch([package], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not marker.exists()


def test_without_pip_one_sentence_says_what_to_do(tmp_path: Path) -> None:
    script = checkout(tmp_path / "checkout")
    done = run(sys.executable, "-I", "-S", script, "--no-bytecode")  # -S hides pip too
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no pip to fetch packages with: install pip" in done.stderr


# --- Taking ----------------------------------------------------------------------------


def test_of_a_package_come_modules_metadata_and_licence(tmp_path: Path) -> None:
    packages = [source_package(tmp_path, tmp_path / "marker"), wheel_package(tmp_path)]
    sweet, sour = builder.taken(packages, tmp_path).values()
    files = sweet | sour
    assert files["sweet-1.5.dist-info/METADATA"] == (
        b"Metadata-Version: 1.1\nName: sweet\nVersion: 1.5\nLicense: MIT\n"
    )
    assert files["sweet-1.5.dist-info/licenses/LICENSE"] == b"Be kind.\n"
    assert files["sour_cream-2.dist-info/licenses/LICENSE"] == b"Be\nfair.\n"
    assert {name for name in files if ".dist-info/" not in name} == {"sweet/__init__.py", "sour.py"}


def test_a_licence_that_is_not_where_it_was_ends_the_build(tmp_path: Path) -> None:
    package = source_package(tmp_path, tmp_path / "marker", licence="COPYING")
    with pytest.raises(builder.Unable, match="holds no 'COPYING': adapt its entry"):
        builder.taken([package], tmp_path)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("a/b.py", True),
        ("a/b/c.py", True),
        ("a/b/d.py", False),
        ("a/b/_e.py", False),
        ("a/b/__init__.py", True),
        ("a/b.so", False),
        ("other.py", False),
    ],
)
def test_the_last_pattern_that_matches_decides(name: str, verdict: bool) -> None:
    assert builder.wants("a/*.py !a/b/_[!_]* !a/b/* a/b/__init__.py a/b/c.py", name) is verdict


def test_an_alteration_that_does_not_fit_ends_the_build() -> None:
    with pytest.raises(builder.Unable, match=r"__init__\.py is not the one"):
        builder.altered("dkim/__init__.py", b"USE_ASYNC = None\n")


FUNCTIONS = """\
# ROOM: SERVE
def serve_if_asked(): pass
# ROOM: COMMANDS
def main(): return 'a' in {'b', 'c'}
"""


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("__version__ = '1'\n", "no function serve_if_asked"),
        ("__version__ = '1'\ndef serve_if_asked(): pass\n", "no function main"),
        (FUNCTIONS, "does not state its version"),
        (f"__version__ = version()\n{FUNCTIONS}", "does not state its version"),
        ("def main()\n", r"chasquid\.py:1: "),
    ],
)
def test_a_module_that_cannot_be_built_from(tmp_path: Path, source: str, complaint: str) -> None:
    (tmp_path / "chasquid.py").write_text(source)
    with pytest.raises(builder.Unable, match=complaint):
        builder.own_files(tmp_path / "chasquid.py")


def test_the_version_may_be_annotated(tmp_path: Path) -> None:
    (tmp_path / "chasquid.py").write_text(f"__version__: str = '4.5'\n{FUNCTIONS}")
    files = builder.own_files(tmp_path / "chasquid.py")
    assert b"\nVersion: 4.5\n" in files["chasquid-4.5.dist-info/METADATA"]
    notice = files["chasquid-4.5.dist-info/licenses/NOTICE"].decode()
    assert "SPDX-License-Identifier: Apache-2.0\n" in notice


# --- Compiling and writing -------------------------------------------------------------


def small_archive(tmp_path: Path) -> bytes:
    own = {"chasquid.py": FUNCTIONS.encode()}
    python = builder.probed(sys.executable)
    return builder.archived(builder.contents(own, {}, [python]), builder.date_of_entries())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert small_archive(tmp_path) == small_archive(tmp_path)


def test_entries_are_sorted_and_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")
    with zipfile.ZipFile(io.BytesIO(small_archive(tmp_path))) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {entry.date_time for entry in entries} == {(2025, 6, 15, 15, 6, 40)}
    assert {(entry.create_system, entry.external_attr >> 16) for entry in entries} == {
        (3, 0o100644)
    }


@pytest.mark.parametrize("text", ["", "0", "315532800"])
def test_no_date_is_before_what_a_zip_file_can_tell(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    assert builder.date_of_entries() == 315532800


@pytest.mark.parametrize("text", ["yesterday", "-1", "1.5", "99999999999"])
def test_a_date_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(builder.Unable, match="seconds since 1970"):
        builder.date_of_entries()


def compiled(files: dict[str, str]) -> dict[str, Any]:
    """What the files of a tree hold, for this Python: code, and for packages a dictionary."""
    python = builder.probed(sys.executable)
    sources = {name: text.encode() for name, text in files.items()}
    tree = builder.bytecode(python, {"chasquid.py": FUNCTIONS.encode()} | sources)
    names = ["server", "others", "packages"]
    assert list(tree.files) == [f"{sys.implementation.cache_tag}/{name}" for name in names]
    data = dict(zip(names, tree.files.values(), strict=True))
    if tree.method:
        module = importlib.import_module(tree.method)
        data |= {name: module.decompress(data[name]) for name in ("others", "packages")}
    return {name: marshal.loads(text) for name, text in data.items()}


def test_each_module_has_its_name_and_its_source() -> None:
    found = compiled({"a/__init__.py": "", "a/b.py": "", "c.py": "", "a/x.txt": ""})
    assert {name: row[:2] for name, row in found["packages"].items()} == {
        "a": (True, "a/__init__.py"), "a.b": (False, "a/b.py"), "c": (False, "c.py"),
    }  # fmt: skip
    assert found["packages"]["a.b"][2].co_filename == "chasquid.pyz/a/b.py"


def test_the_rooms_of_the_server_stand_apart() -> None:
    found = compiled({"chasquid.py": f"from __future__ import annotations\nx = 1\n{FUNCTIONS}"})
    assert set(found["server"].co_names) >= {"x", "serve_if_asked", "__getattr__"}
    assert found["others"].co_names == ("__future__", "annotations", "main")
    functions = [code for code in found["others"].co_consts if isinstance(code, types.CodeType)]
    assert [code.co_firstlineno for code in functions] == [6]


@pytest.mark.parametrize("source", ["def main(): 0", "# ROOM: A\n# ROOM: SERVE\n"])
def test_a_module_without_the_two_parts_cannot_be_built_from(source: str) -> None:
    with pytest.raises(builder.Unable, match="no room SERVE"):
        builder.first_line_of_others(source)


def test_bytecode_holds_what_runs_and_not_what_is_read() -> None:
    source = '''"""Module."""
from __future__ import annotations
class Value:
    """A class."""
    size: int = 3
    def grow(self, by: int) -> int:
        """A method."""
        def inner(): "Only this."
        return self.size + by + (inner() or missing)
'''
    packages = compiled({"a.py": source, "dns/a.py": source})["packages"]
    for name, described in (("a", ""), ("dns.a", "A class.")):
        space: dict[str, Any] = {"__name__": "a"}
        exec(packages[name][2], space)
        value = space["Value"]
        assert (space["__doc__"], value.__doc__, value.grow.__doc__) == ("", described, "")
        assert value.__annotations__ == {"size": "int"}
        assert value.grow.__annotations__ == {}
        with pytest.raises(NameError) as error:
            value().grow(1)
        assert error.traceback[-1].lineno + 1 == 9  # pytest counts from 0
        columns = {place[2:] for place in value.grow.__code__.co_positions()}
        assert columns == {(None, None)}


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(builder.Unable, match="does not run"):
        builder.named([str(tmp_path / "python3.99")])
    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\necho not installed >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(builder.Unable, match="failed: not installed"):
        builder.named([str(broken)])
    with pytest.raises(builder.Unable, match="of the same version"):
        builder.named([sys.executable, sys.executable])


# --- __main__ --------------------------------------------------------------------------


def main_source(trees: str = "{}") -> str:
    return str(builder.MAIN.replace("{TREES}", trees).replace("{PACKAGES}", "[]"))


def run_main(source: str, **seen: object) -> tuple[int, str]:
    """Run __main__ with a `sys` of our making; its exit status and what it complained of."""
    said = io.StringIO()
    fake = types.SimpleNamespace(
        **{
            "version_info": (3, 11, 0, "final", 0),
            "executable": "/opt/bin/python3",
            "flags": types.SimpleNamespace(optimize=0),
            "implementation": sys.implementation,
            "path": ["chasquid.pyz"],
            "meta_path": [],
            "stderr": said,
            "exit": sys.exit,
            **seen,
        }
    )
    unread = types.SimpleNamespace(get_data=None)
    modules = {
        "sys": fake,
        "gc": gc,
        "marshal": marshal,
        "threading": threading,
        "importlib.machinery": importlib.machinery,
        "importlib.util": importlib.util,
        "zipimport": types.SimpleNamespace(zipimporter=lambda archive: unread),
        "chasquid": types.SimpleNamespace(
            serve_if_asked=lambda: None, main=lambda: [tree.folder for tree in fake.meta_path]
        ),
    }
    known = {"__import__": lambda name, *_: modules[name], "tuple": tuple}
    known["__build_class__"] = builtins.__build_class__
    names = {"__builtins__": known, "__name__": "__main__"}
    with pytest.raises(SystemExit) as stop:
        exec(compile(source, "__main__.py", "exec"), names)
    return stop.value.code, said.getvalue()


@pytest.mark.parametrize("version", [(2, 7, 18, "final", 0), (3, 10, 13, "final", 0)])
def test_an_old_python_is_told_so_in_one_line(version: tuple[object, ...]) -> None:
    status, said = run_main(main_source(), version_info=version)
    number = ".".join(map(str, version[:3]))
    assert (status, said) == (
        1,
        f"chasquid.pyz needs Python 3.11 or later; this is {number} (/opt/bin/python3)\n",
    )


def test_main_is_written_for_old_parsers() -> None:
    tree = ast.parse(main_source(), feature_version=(3, 7))
    new = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match, ast.AsyncFunctionDef)
    assert not [node for node in ast.walk(tree) if isinstance(node, new)]
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    checks = [node for node in tree.body if isinstance(node, ast.If)]
    assert imports[0].lineno < checks[0].lineno < imports[1].lineno


@pytest.mark.parametrize(
    "command", ["python2", "python3.6", "python3.8", "python3.9", "python3.10"]
)
def test_an_old_python_where_there_is_one(command: str, tmp_path: Path) -> None:
    python = shutil.which(command)
    if python is None or run(python, "-c", "").returncode:
        pytest.skip(f"no {command} here")
    path = tmp_path / "chasquid.pyz"
    path.write_bytes(small_archive(tmp_path))
    done = run(python, path)
    assert done.returncode == 1
    assert done.stderr.startswith("chasquid.pyz needs Python 3.11 or later; this is ")
    assert done.stderr.count("\n") == 1


def test_optimised_away_checks_are_not_run_without() -> None:
    status, said = run_main(main_source(), flags=types.SimpleNamespace(optimize=1))
    assert status == 1
    assert said.startswith("chasquid.pyz must run without -O")


def test_a_tree_is_used_only_by_the_python_that_it_is_for() -> None:
    tag, magic = sys.implementation.cache_tag, importlib.util.MAGIC_NUMBER.hex()

    def used(**trees: tuple[str, str]) -> object:
        return run_main(main_source(repr(trees)))[0]

    assert used(**{tag: (magic, "")}) == [f"chasquid.pyz/{tag}/"]
    assert used(**{tag: (magic, "zlib")}) == [f"chasquid.pyz/{tag}/"]
    assert used(**{tag: (magic, "no_such_module")}) == []
    assert used(**{tag: ("00000000", "")}) == []
    assert used(**{"cpython-300": (magic, "")}) == []


# --- The real packages -----------------------------------------------------------------


@pytest.fixture(scope="module")
def cache() -> Path:
    folder: Path = HERE / ".cache"
    if any(builder.cached(package, folder) is None for package in builder.PACKAGES):
        pytest.skip("the packages are not in .cache: python3 build_zipapp.py fetches them")
    return folder


@pytest.fixture(scope="module")
def built(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the stand-in, with bytecode of this Python."""
    script = checkout(tmp_path_factory.mktemp("built") / "checkout")
    done = run(sys.executable, script, "--cache", cache, "--pythons", sys.executable)
    assert done.returncode == 0, done.stderr
    path = script.with_name("chasquid.pyz")
    assert done.stdout == (
        f"{path}: {path.stat().st_size:,} bytes, bytecode of CPython {sys.version.split()[0]}\n"
    )
    return path


@pytest.fixture(scope="module")
def entries(built: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(built) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_another_folder_another_umask_another_hour(
    built: Path, cache: Path, tmp_path: Path
) -> None:
    script = checkout(tmp_path / "elsewhere")
    os.utime(script.with_name("chasquid.py"), (1, 1))
    output = tmp_path / "other.pyz"
    command = [script, "--cache", cache, "--pythons", sys.executable, "--output", output]
    done = run(sys.executable, *command, cwd="/", umask=0o077)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == built.read_bytes()
    assert output.stat().st_mode & 0o777 == built.stat().st_mode & 0o777 == 0o755


def test_what_is_in_the_archive(built: Path, entries: dict[str, bytes]) -> None:
    tree = f"{sys.implementation.cache_tag}/"
    modules = {name for name in entries if name.endswith(".py")}
    folder = {f"{tree}{name}" for name in ("server", "others", "packages")}
    assert {name for name in entries if name.startswith(tree)} == folder
    assert {"chasquid.py", "spf.py", "dkim/__init__.py", "dns/update.py"} < modules
    rest = set(entries) - modules - folder
    assert {name.partition("/")[0] for name in rest} == {
        "chasquid-7.8.9.dist-info",
        *(package.dist_info for package in builder.PACKAGES),
    }
    assert built.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_every_package_brings_its_terms(entries: dict[str, bytes]) -> None:
    for package, words in {
        "dnspython-2.9.2": b"ISC License",
        "dkimpy-1.1.8": b"Altered source versions must be plainly marked",
        "pyspf-2.0.14": b"under the same terms as Python itself",
        "idna-3.20": b"BSD 3-Clause License",
        "precis_i18n-1.1.2": b"Permission is hereby granted",
    }.items():
        texts = [
            data
            for name, data in entries.items()
            if name.startswith(f"{package}.dist-info/licenses/")
        ]
        assert [words in text for text in texts] == [True], package


class WithoutDocstrings(ast.NodeTransformer):
    """Empties the docstrings of functions, and drops those that are left out."""

    def __init__(self, left_out: str) -> None:
        self._left_out = left_out.split()
        self._above = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST | None:
        above, self._above = self._above, f"{self._above}{node.name}."
        self.generic_visit(node)
        self._above = above
        return None if above + node.name in self._left_out else node

    def visit_FunctionDef(self, node: Any) -> ast.AST | None:
        if self._above + node.name in self._left_out:
            return None
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


@pytest.mark.filterwarnings("ignore")  # of the escapes in a docstring of pyspf's
@pytest.mark.parametrize("package", builder.PACKAGES, ids=lambda package: package.name)
def test_packages_are_altered_in_docstrings_and_comments_alone(
    package: builder.Package, entries: dict[str, bytes], cache: Path
) -> None:
    original = builder.unpacked(package, builder.cached(package, cache))
    names = {name for name in original if name in entries and name.endswith(".py")}
    assert names
    for name in names - set(builder.ALTERED) - set(builder.REPLACED):
        expected = WithoutDocstrings(builder.LEFT_OUT.get(name, "")).visit(
            ast.parse(original[name])
        )
        assert ast.dump(ast.parse(entries[name])) == ast.dump(expected), name
        lines = original[name].count(b"\n") + entries[name].count(b"\n# Altered for chasquid.pyz")
        assert entries[name].count(b"\n") == lines, name


def test_a_docstring_is_cut_out_and_nothing_else() -> None:
    source = (
        'def a():\n    """Was\n\n    is."""; return 1\ndef b(): "é"; x = "ü"\nclass C:\n    "C."\n'
    )
    short = 'def a():\n    ""; return 1\n\n\ndef b(): ""; x = "ü"\nclass C:\n    "C."\n'
    assert builder.undocumented(source.encode()) == short.encode() + builder.UNDOCUMENTED
    assert builder.undocumented(b"x = 1\n") == b"x = 1\n"


def test_comments_are_cut_out_and_terms_are_not() -> None:
    source = '# Copyright\n# terms\n\nx = "ü#"  # of é\n  # y\nz = """#"""  # noqa\n'
    short = '# Copyright\n# terms\n\nx = "ü#"\n\nz = """#"""\n'
    assert builder.undocumented(source.encode()) == short.encode() + builder.UNDOCUMENTED
    referring = source.replace("Copyright", "Copyright, see LICENSE for text of it").encode()
    short = short.replace("Copyright", "Copyright, see LICENSE for text of it")
    short = short.replace("# terms", "")
    assert builder.undocumented(referring) == short.encode() + builder.UNDOCUMENTED


def test_alterations_are_marked(entries: dict[str, bytes]) -> None:
    for name, pairs in builder.ALTERED.items():
        assert "Altered for chasquid.pyz: " in pairs[0][1]
        for _, text in pairs:
            assert text.encode() in entries[name]
    for name in builder.REPLACED:
        assert entries[name].count(b" Replaced for chasquid.pyz: ") == 1


@pytest.mark.filterwarnings("error")
def test_no_module_warns_when_it_is_compiled(entries: dict[str, bytes]) -> None:
    for name, data in entries.items():
        if name.endswith(".py"):
            compile(data, name, "exec", dont_inherit=True)


def test_whatever_dnspython_imports_is_there(entries: dict[str, bytes]) -> None:
    """Imports that are left open are those of features that are off, or of Windows."""
    is_open = {"dns._asyncio_backend", "dns._no_ssl", "dns._trio_backend", "dns.win32util"}
    for name, data in entries.items():
        if not name.startswith("dns/") or name == "dns/quic/__init__.py":
            continue
        for node in ast.walk(ast.parse(data)):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module]
            for module in wanted:
                path = module.replace(".", "/")
                if module.startswith("dns.") and module not in is_open:
                    assert f"{path}.py" in entries or f"{path}/__init__.py" in entries, name


def test_it_runs_on_the_archive_alone(built: Path) -> None:
    done = run(sys.executable, "-I", "-S", built, "hello", "--world")
    assert done.returncode == 3, done.stderr  # what main() gave back
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["arguments"] == ["hello", "--world"]
    assert said["cached"] == [f"{built}/{sys.implementation.cache_tag}/"]
    with zipfile.ZipFile(built) as archive:
        assert {path.removeprefix(f"{built}/") for path in said["files"].values()} <= set(
            archive.namelist()
        )
    assert said["value"] == 8
    assert said["tlsa"] == "TLSA"
    assert said["idna"] is True
    assert said["versions"] == {
        "chasquid": "7.8.9",
        **{package.name: package.version for package in builder.PACKAGES},
    }
    unwelcome = {"asyncio", "trio", "httpx", "httpx2", "aioquic", "aiodns", "cryptography"}
    assert not unwelcome & set(said["modules"])


READ = """\
import collections, runpy, sys, zipimport
read, get_data = collections.Counter(), zipimport.zipimporter.get_data
def counted(self, path):
    read[path.rpartition("/")[2]] += 1
    return get_data(self, path)
zipimport.zipimporter.get_data = counted
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("", stop.code, *read.elements())
"""


SERVE = """\
import runpy, sys, zipimport
get_data = zipimport.zipimporter.get_data
def told(self, path):
    print(path.rpartition("/")[2], flush=True)
    return get_data(self, path)
zipimport.zipimporter.get_data = told
sys.argv = {words!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("loaded", *sys.modules)
"""

# Each takes about 1 MB of memory with what it loads; a server can do without.
HEAVY = {"argparse", "asyncio", "email", "http", "logging", "zipfile"}


def test_a_file_of_a_tree_is_read_once_and_only_if_it_is_needed(built: Path) -> None:
    def read(*words: str) -> list[str]:
        done = run(sys.executable, "-I", "-S", "-c", READ, built, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].rpartition("}")[2].split()

    assert read("serve") == ["5", "server"]
    assert sorted(read("hello")) == ["3", "others", "packages", "server"]


def test_what_the_host_has_is_left_alone(built: Path, tmp_path: Path) -> None:
    """Even where newer packages wait on the path, none is loaded."""
    for name in ("trio", "httpx2", "httpcore2", "h2", "aioquic", "aiodns", "cryptography", "wmi"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__name__} was loaded')\n")
        about = tmp_path / f"{name}-999.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 999\n")
    done = run(sys.executable, built, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3, done.stderr


def test_without_bytecode_it_runs_as_well(cache: Path, tmp_path: Path) -> None:
    script = checkout(tmp_path / "checkout")
    done = run(sys.executable, script, "--cache", cache, "--no-bytecode")
    assert done.stdout.endswith(" bytes, no bytecode\n"), done.stderr
    done = run(sys.executable, "-I", "-S", "-W", "error", script.with_name("chasquid.pyz"))
    assert done.returncode == 3, done.stderr
    assert {Path(path).suffix for path in json.loads(done.stdout)["files"].values()} == {".py"}


def test_an_answer_of_any_kind_can_be_read(built: Path, tmp_path: Path) -> None:
    """A name server may send what it likes; none of it meets a module that was left out."""
    reader = tmp_path / "reader.py"
    reader.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import dns.exception, dns.message\n"
        "for opcode in range(16):\n"
        "    for kind in range(300):\n"
        "        wire = bytes([0, 1, 0x80 | opcode << 3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0])\n"
        "        wire += bytes([kind >> 8, kind & 255, 0, 1, 0, 0, 0, 0, 0, 2, 7, 7])\n"
        "        try:\n"
        "            dns.message.from_wire(wire)\n"
        "        except dns.exception.DNSException:\n"
        "            pass\n"
        "print('read')\n"
    )
    done = run(sys.executable, "-I", "-S", reader, built)
    assert done.stdout == "read\n", done.stderr


@pytest.fixture(scope="module")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive as it is built without options."""
    path = tmp_path_factory.mktemp("server") / "chasquid.pyz"
    done = run(sys.executable, HERE / "build_zipapp.py", "--cache", cache, "--output", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f" bytes, bytecode of CPython {sys.version.split()[0]}\n")
    return path


def test_the_server_tells_its_version(server: Path) -> None:
    done = run(sys.executable, "-I", "-S", server, "version")
    assert done.returncode == 0, done.stderr
    for package in builder.PACKAGES:
        assert package.name in done.stdout
        assert package.version in done.stdout


def test_the_server_starts_and_has_then_loaded_all(server: Path, tmp_path: Path) -> None:
    """It is ready without the rooms of other commands, and without the archive from then on."""
    archive = Path(shutil.copy(server, tmp_path))
    config = f'smtp_address: "127.0.0.1:0"\ndata_dir: "{tmp_path}/data"\nhostname: "mail.example"\n'
    (tmp_path / "chasquid.conf").write_text(config + f'log_path: "{tmp_path}/log"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        code = SERVE.format(words=[str(archive), "--config-dir", str(tmp_path), "serve"])
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert systemd.recv(100) == b"READY=1"
        archive.write_bytes(b"")
        process.terminate()
        read, loaded = process.communicate(timeout=60)[0].split("loaded ")
    assert read.split() == ["server", "packages"]
    assert {name.partition(".")[0] for name in loaded.split()} & HEAVY == set()
    assert "event=stopped" in (tmp_path / "log").read_text()


def test_the_server_lists_what_is_in_its_archive(server: Path) -> None:
    done = run(sys.executable, "-I", "-S", server, "version", "--sbom")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["spdxVersion"], said["dataLicense"]) == ("SPDX-2.3", "CC0-1.0")
    packages = {package["name"]: package for package in said["packages"]}
    assert {name: package["versionInfo"] for name, package in packages.items()} == {
        "chasquid": chasquid_version(),
        **{package.name: package.version for package in builder.PACKAGES},
    }
    assert "NOASSERTION" not in {package["licenseDeclared"] for package in said["packages"]}
    for package in builder.PACKAGES:
        [checksum] = packages[package.name]["checksums"]
        assert checksum == {"algorithm": "SHA256", "checksumValue": package.sha256}
    ids = [file["SPDXID"] for file in said["files"]]
    assert len(set(ids)) == len(ids)
    assert ids == [name for package in said["packages"] for name in package["hasFiles"]]


def chasquid_version() -> str:
    tree = ast.parse((HERE / "chasquid.py").read_text(encoding="utf-8"))
    return str(builder.checked_version("chasquid.py", tree))


def test_the_list_has_the_hash_of_each_file(server: Path) -> None:
    with zipfile.ZipFile(server) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    [listing] = [name for name in files if name.endswith(".spdx.json")]
    said = json.loads(files[listing])
    hashes = {
        file["fileName"].removeprefix("./"): dict(map(dict.values, file["checksums"]))
        for file in said["files"]
    }
    left_out = {name for name in files if name.startswith("cpython-")} | {"__main__.py", listing}
    assert set(hashes) == set(files) - left_out
    for name, checksums in hashes.items():
        for kind in ("sha1", "sha256"):
            assert checksums[kind.upper()] == hashlib.new(kind, files[name]).hexdigest(), name


@pytest.mark.parametrize("command", ["python3.11", "python3.12", "python3.13"])
def test_each_python_makes_the_same_list(command: str, server: Path, cache: Path) -> None:
    found = [path for path in builder.candidates() if Path(path).name == command]
    if not found:
        pytest.skip(f"there is no {command}")
    path = server.with_name(f"{command}.pyz")
    builds = [HERE / "build_zipapp.py", "--cache", cache, "--no-bytecode", "--output", path]
    done = run(found[-1], *builds)
    assert done.returncode == 0, done.stderr
    lists = []
    for archive in (server, path):
        with zipfile.ZipFile(archive) as opened:
            [name] = [name for name in opened.namelist() if name.endswith(".spdx.json")]
            lists.append(opened.read(name))
    assert lists[0] == lists[1]


def test_without_an_archive_there_is_no_list() -> None:
    done = run(sys.executable, HERE / "chasquid.py", "version", "--sbom")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "chasquid: only an archive that build_zipapp.py has made holds such a list\n"
    )


def test_the_archive_is_small(server: Path) -> None:
    assert server.stat().st_size <= 1_200_000  # a thousand lines of the module are 25 kB


class WithoutAll(ast.NodeTransformer):
    """Drops __all__, which matters to `import *` alone, and makes sure that there is none."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if ast.unparse(node.targets[0]) == "__all__" else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        assert node.names[0].name != "*"
        return node


def words_in(module: bytes) -> set[str]:
    """Each name in a module that may be that of a function or class, in strings too."""
    found: set[str] = set()
    for node in ast.walk(WithoutAll().visit(ast.parse(module))):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.alias(name=name):
                found.update(name.split("."))
            case ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Constant(value=str(text)):
                found.add(text)  # if it is a name
    return found


def test_nothing_that_is_called_is_left_out_of_the_packages(server: Path) -> None:
    with zipfile.ZipFile(server) as archive:
        modules = {name: archive.read(name) for name in archive.namelist() if name[-3:] == ".py"}
    named = set().union(*map(words_in, modules.values()))
    assert {"Do53Nameserver", "from_wire_parser", "main"} <= named
    for module, names in builder.LEFT_OUT.items():
        gone = {name.rpartition(".")[2] for name in names.split()}
        assert gone & named == set(), module


LOAD_ALL = """\
import sys; sys.path.insert(0, sys.argv[1])
import chasquid, contextlib
chasquid.load_modules([*chasquid._LATE_MODULES, *chasquid._CAPTURE_MODULES])
chasquid.load_modules(sys.argv[2:])
chasquid.load_dkim()
chasquid.load_spf()
chasquid.DnsClient(None, ["127.0.0.1"]).set_up()
chasquid.domain_to_ascii("bücher.example")
chasquid.normalize_user("É")
print(*[module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)])
"""

# Loaded by what some message of the DNS may be.
ON_DEMAND = ["dns.update"]


def test_each_module_of_the_packages_is_one_that_the_server_loads(server: Path) -> None:
    """Whatever else is in them is left out by `take`, or is a stub of REPLACED."""
    done = run(sys.executable, "-I", "-S", "-c", LOAD_ALL, server, *ON_DEMAND)
    assert done.returncode == 0, done.stderr
    loaded = {path.removeprefix(f"{server}/") for path in done.stdout.split()}
    with zipfile.ZipFile(server) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
    assert modules - loaded == {"__main__.py"}


def test_all_pythons_of_the_machine(cache: Path, tmp_path: Path) -> None:
    """This one, and what stands in the search path, if it is a Python that runs."""
    broken = tmp_path / "bin" / "python3.12"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    script = checkout(tmp_path / "checkout")
    path = {"PATH": str(broken.parent), "PYENV_ROOT": str(tmp_path)}
    done = run(
        sys.executable, script, "--cache", cache, "--all-pythons", env={**os.environ, **path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f" bytes, bytecode of CPython {sys.version.split()[0]}\n")
    assert done.stderr == (f"build_zipapp: skipped {broken}, no working CPython 3.11 or later\n")


def test_pip_installs_the_same_packages() -> None:
    """pyproject.toml pins what the archive holds."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(project["dependencies"]) == sorted(
        f"{package.name}=={package.version}" for package in builder.PACKAGES
    )


def test_a_wheel_has_the_module_as_a_package_with_types(tmp_path: Path) -> None:
    name = builder.build_wheel(str(tmp_path))
    version = builder.checked_version("", ast.parse((HERE / "chasquid.py").read_text()))
    assert name == f"chasquid-{version}-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    about = f"chasquid-{version}.dist-info"
    assert files["chasquid/__init__.py"] == (HERE / "chasquid.py").read_bytes()
    assert files["chasquid/py.typed"] == b""
    assert b"chasquid = chasquid:main\n" in files[f"{about}/entry_points.txt"]
    assert b"[pytest11]\nchasquid = chasquid:pytest_plugin\n" in files[f"{about}/entry_points.txt"]
    recorded = {line.split(",")[0] for line in files[f"{about}/RECORD"].decode().splitlines()}
    assert recorded == set(files)


def test_a_wheel_of_the_source_distribution_is_the_same(tmp_path: Path) -> None:
    name = builder.build_wheel(str(tmp_path))
    source = builder.build_sdist(str(tmp_path))
    root = source.removesuffix(".tar.gz")
    with tarfile.open(tmp_path / source) as packed:
        packed.extractall(tmp_path, filter="data")
    script = "import build_zipapp; build_zipapp.build_wheel('.')"
    done = run(sys.executable, "-c", script, cwd=tmp_path / root)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / root / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.interop
def test_the_pinned_packages_can_be_fetched(tmp_path: Path) -> None:
    script = checkout(tmp_path / "checkout")
    done = run(sys.executable, script, "--pythons", sys.executable)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (script.parent / ".cache").iterdir()) == sorted(
        package.file for package in builder.PACKAGES
    )
    done = run(sys.executable, "-I", "-S", script.with_name("chasquid.pyz"))
    assert done.returncode == 3, done.stderr
