# SPDX-License-Identifier: Apache-2.0
"""The order of the rooms: read from the syntax tree of the module, not from its author."""

from __future__ import annotations

import ast
import bisect
import collections
import inspect
import pickle
import re
import subprocess
import symtable
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from support import MODULE

import chasquid

TEXT = MODULE.read_text(encoding="utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
RULER = "# " + "=" * 86
MAP = "MAP"


class Banner(NamedTuple):
    name: str
    line: int  # of "# ROOM: NAME", counted from 1
    essay: tuple[str, ...]


def banners() -> list[Banner]:
    found = []
    for number, line in enumerate(LINES, 1):
        if match := re.fullmatch(r"# ROOM: (.+)", line):
            essay = []
            for below in LINES[number:]:
                if below == RULER or not below.startswith("#"):
                    break
                essay.append(below[1:].strip())
            found.append(Banner(match[1], number, tuple(filter(None, essay))))
    return found


def rooms_tested() -> dict[str, list[str]]:
    """Which rooms each test file says that it covers: "Room X: …" or "Rooms X, Y: …"."""
    found = {}
    for path in MODULE.parent.glob("tests/test_*.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        match = re.match(r"Rooms? ([A-Z ]+(?:, [A-Z ]+)*)\b", text)
        found[path.stem.removeprefix("test_")] = match[1].strip().split(", ") if match else []
    return found


BANNERS = banners()
ROOMS = [MAP] + [banner.name for banner in BANNERS]
STARTS = [banner.line for banner in BANNERS]


def room_of(line: int) -> int:
    """The number of the room that `line` is in; 0 is the map."""
    return bisect.bisect_right(STARTS, line)


def module_names() -> dict[str, int]:
    """Each name that the module defines, with its room; imports belong to the map."""
    names: dict[str, int] = {}
    for node in TREE.body:
        bound: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound = [node.name]
        else:
            bound = [
                child.id
                for child in ast.walk(node)
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            ]
        for name in bound:
            names.setdefault(name, room_of(node.lineno))
    return names


NAMES = module_names()


class Use(NamedTuple):
    name: str
    line: int
    room: int
    annotation: bool


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from scopes(child)


def uses_in_scopes() -> Iterator[Use]:
    """Names of the module that functions, classes and comprehensions mention."""
    for scope in scopes(symtable.symtable(TEXT, "chasquid.py", "exec")):
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                line = scope.get_lineno()
                yield Use(symbol.get_name(), line, room_of(line), False)


class ModuleLevel(ast.NodeVisitor):
    """Finds what is evaluated while the module is loaded, outside classes and functions."""

    def __init__(self) -> None:
        self.found: list[Use] = []

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found.append(Use(node.id, node.lineno, room_of(node.lineno), False))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        pass  # its body has a scope of its own

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        defaults = [default for default in node.args.kw_defaults if default is not None]
        for child in (*node.decorator_list, *node.args.defaults, *defaults):
            self.visit(child)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(child)


def uses_at_module_level() -> list[Use]:
    visitor = ModuleLevel()
    visitor.visit(TREE)
    return visitor.found


def annotations() -> Iterator[ast.expr]:
    for node in ast.walk(TREE):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def names_in(expression: ast.expr, line: int) -> Iterator[tuple[str, int]]:
    for node in ast.walk(expression):
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                inner = ast.parse(node.value, mode="eval").body
            except SyntaxError:
                continue
            yield from names_in(inner, line)


def uses_in_annotations() -> Iterator[Use]:
    quoted = [
        child
        for node in TREE.body
        if isinstance(node, ast.Assign)
        for child in ast.walk(node.value)
        if isinstance(child, ast.Subscript)
    ]
    for expression in (*annotations(), *quoted):
        for name, line in names_in(expression, expression.lineno):
            yield Use(name, line, room_of(line), True)


USES = sorted({*uses_in_scopes(), *uses_at_module_level(), *uses_in_annotations()})


def told(use: Use) -> str:
    where = "an annotation in " if use.annotation else ""
    here, there = ROOMS[use.room], ROOMS[NAMES[use.name]]
    return f"line {use.line}: {where}{here} names {use.name}, which is of {there}"


def test_the_module_has_rooms_and_the_search_for_uses_finds_them():
    assert len(BANNERS) > 10
    found = {(use.name, ROOMS[use.room], use.annotation) for use in USES}
    assert ("ConfigError", "CONFIG", False) in found
    assert ("Clock", "LOOP", True) in found
    assert ("COMMAND_LINE_LIMIT", "STREAM", False) in found  # the default of a parameter
    assert ("Entry", "CONFIG", True) in found  # inside a quoted annotation


def test_no_room_names_a_higher_one_when_it_runs():
    wrong = [use for use in USES if not use.annotation and NAMES.get(use.name, 0) > use.room]
    assert [told(use) for use in wrong] == []


def test_no_room_names_a_higher_one_in_its_annotations():
    wrong = [use for use in USES if use.annotation and NAMES.get(use.name, 0) > use.room]
    assert [told(use) for use in wrong] == []


def test_no_private_name_crosses_the_wall_of_its_room():
    wrong = [
        use
        for use in USES
        if use.name.startswith("_")
        and not use.name.startswith("__")
        and NAMES.get(use.name, use.room) != use.room
    ]
    assert [told(use) for use in wrong] == []


def test_a_name_is_defined_in_one_room_only():
    places: dict[str, set[str]] = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            places.setdefault(node.name, set()).add(f"{ROOMS[room_of(node.lineno)]}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_map_in_the_docstring_lists_the_banners_in_order():
    docstring = ast.get_docstring(TREE) or ""
    rows = re.findall(r"^    ([A-Z][A-Z ]*?)  +\S", docstring, re.MULTILINE)
    assert rows == [banner.name for banner in BANNERS]


def test_the_rooms_to_read_first_exist():
    docstring = ast.get_docstring(TREE) or ""
    sentence = re.search(r"Read (.+?) first", docstring)
    assert sentence
    named = re.findall(r"[A-Z]{3,}", sentence[1])
    assert len(named) == 3
    assert set(named) <= set(ROOMS)


@pytest.mark.parametrize("banner", BANNERS, ids=lambda banner: banner.name)
def test_a_banner_has_rulers_and_an_essay(banner):
    assert LINES[banner.line - 2] == RULER
    assert LINES[banner.line] == "#"
    assert len(banner.essay) >= 2
    assert len(" ".join(banner.essay)) > 150
    below = LINES[banner.line :]
    end = next(number for number, line in enumerate(below) if not line.startswith("#"))
    assert below[end - 1] == RULER
    assert RULER not in below[: end - 1]


def test_what_the_module_exports_exists():
    assert [name for name in chasquid.__all__ if not hasattr(chasquid, name)] == []


#: What the module imports, and what CPython 3.11 to 3.13 load for that and for themselves. A
#: start pays for each: what is needed later is imported where it is needed.
LOADED = set(
    "chasquid abc array base64 binascii codecs collections contextlib copyreg encodings enum"
    " errno functools gc genericpath heapq io itertools json keyword linecache marshal math"
    " operator os posix posixpath queue re reprlib select selectors signal socket ssl stat struct"
    " threading time types warnings zipimport".split()
)


def test_importing_the_module_loads_nothing_that_is_rarely_needed():
    code = f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import chasquid"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    loaded = {name.partition(".")[0] for name in rows if name != "imported package"}
    assert "chasquid" in loaded
    assert {name for name in loaded if not name.startswith("_")} - LOADED == set()


def test_a_value_is_what_typing_would_make_of_it():
    class Ours(chasquid.NamedTuple):
        """A value."""

        name: str
        size: int = 3

        @property
        def double(self) -> int:
            return 2 * self.size

    class Theirs(NamedTuple):
        """A value."""

        name: str
        size: int = 3

        @property
        def double(self) -> int:
            return 2 * self.size

    assert Ours("a") == ("a", 3) == Theirs("a")
    assert Ours("a", size=4).double == 8
    assert repr(Ours("a")._replace(size=1)) == "Ours(name='a', size=1)"
    assert isinstance(Ours("a"), tuple)
    assert str(inspect.signature(Ours)) == "(name, size=3)"
    for name in ("_fields", "_field_defaults", "__doc__", "__module__", "__match_args__"):
        assert getattr(Ours, name) == getattr(Theirs, name)
    assert Ours.__qualname__.endswith("<locals>.Ours")
    with pytest.raises(TypeError, match="missing 1 required"):
        Ours()
    with pytest.raises(AttributeError):
        Ours("a").size = 4
    assert pickle.loads(pickle.dumps(chasquid.Entry("a", b"b", 3))) == ("a", b"b", 3)


def test_importing_the_module_touches_nothing_of_the_process():
    code = (
        "import sys, signal, threading, socket; sys.path.insert(0, sys.argv[1])\n"
        "before = [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "interval = sys.getswitchinterval()\n"
        "import chasquid\n"
        "assert before == [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "assert interval == sys.getswitchinterval()\n"
        "assert threading.active_count() == 1 and socket.getdefaulttimeout() is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(MODULE.parent)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# --- the tests ---

ABOUT_OTHER_FILES = {"archive", "attacks", "fuzzing", "map", "readme", "sample_config", "world"}


def test_each_test_file_says_which_rooms_it_covers_and_no_room_is_left_out() -> None:
    tested = rooms_tested()
    assert {name for name, rooms in tested.items() if not rooms} == ABOUT_OTHER_FILES
    covered = [room for rooms in tested.values() for room in rooms]
    assert set(covered) == set(ROOMS) - {MAP}


def test_a_file_with_the_name_of_a_room_is_about_that_room() -> None:
    tested = rooms_tested()
    named = {room for room in ROOMS if room.lower().replace(" ", "_") in tested} - {MAP}
    assert len(named) > 25
    for room in named:
        assert room in tested[room.lower().replace(" ", "_")]


#: Rooms larger than 700 lines, each with the reason and its bound.
LARGE_ROOMS = {
    "CONFIG": 750,  # the table of all keys
    "LOOP": 800,  # one kernel: tasks, timers, workers and children share its state
    "COURIERS": 800,  # five couriers that share results, and the choice of a server
    "ITEMS": 750,  # a format and the table of its fields stand together
    "QUEUE": 800,  # from the 250 to the report, with what a crash leaves at each step
    "SESSION": 950,  # the command table, and an action for each row of it
    "DAEMON": 1000,  # the wiring diagram, what root opens, and the files that are read again
    "CAPTURE": 1050,  # the fixture: what a test sees of a message, and of a server
    "CAPTURE API": 1200,  # an interface as wide as Mailpit's, and a page
    "COMMANDS": 2000,  # forty commands, a few lines each
}


def test_rooms_are_of_a_size_that_a_newcomer_can_hold():
    ends = [*(banner.line for banner in BANNERS[1:]), len(LINES)]
    sizes = {banner.name: end - banner.line for banner, end in zip(BANNERS, ends, strict=True)}
    assert set(LARGE_ROOMS) <= set(sizes)
    too_large = {name: size for name, size in sizes.items() if size > LARGE_ROOMS.get(name, 700)}
    assert too_large == {}


def test_no_name_of_the_module_is_given_twice():
    """The later one would be meant everywhere, in rooms above it too."""
    names = collections.Counter()
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] += 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_call_with_more_than_four_arguments_names_them():
    """But for those that take any number of the same kind, and those of libraries."""
    any_number = {"_der", "_each", "fold", "signer.gen_header", "make_query"}
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and len(node.args) > 4]
    assert [
        f"line {call.lineno}: {ast.unparse(call.func)} with {len(call.args)} arguments by place"
        for call in calls
        if ast.unparse(call.func) not in any_number
    ] == []


def test_each_public_function_says_what_it_does():
    silent = []
    for node in TREE.body:
        named = [node]
        if isinstance(node, ast.ClassDef):
            named = [] if node.name.startswith("_") else node.body
        for function in named:
            if (
                isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
                and not function.name.startswith("_")
                and ast.get_docstring(function) is None
                and "overload" not in map(ast.unparse, function.decorator_list)
                and ast.unparse(function.body[-1]) != "..."  # of a protocol, which says it itself
            ):
                silent.append(f"line {function.lineno}: {function.name}")
    assert silent == []


def test_essays_name_rooms_that_exist():
    words = {word for banner in BANNERS for line in banner.essay for word in line.split()}
    gone = {"SERVER", "RECORD", "GROUND", "NAMES", "SENDER", "DISK", "WORLD"} - set(ROOMS)
    assert words & gone == set()
