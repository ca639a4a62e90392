# SPDX-License-Identifier: Apache-2.0
"""What a disk may hold after a power cut: the calls of a run, and the states that they allow.

A `Recorder` is an `os` that writes down each call that changes something below a directory. A
`Model` is a disk on which these calls are made, one by one; between two of them it says what
might be found there if the power went now. Its rules are those of POSIX, so they are harder
than any file system:

- What was written to a file since its last sync is there wholly, or not at all, or up to any
  octet, or in some blocks and not in others; a file that grew may hold zeros there (as on
  ext4, which may write the size before the data).
- To sync a file says nothing of its name. A name that was made, changed or removed since its
  directory's last sync is as it was at any time since then, each for itself.
- A rename that shows its removal shows its new name too, as every file system with a journal
  has it; but both names may be there.
- A directory whose own name is not there is gone, with all that is in it.
- Times of modification count only when the file is synced.

Modes and owners are taken as they are set.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from os_layer import Layer

BLOCK = 512  # octets that a device writes wholly or not at all
_ENUMERATED = 9  # states of one moment that are all looked at; of more, some
_SAMPLES = 3
_PREFIXES = 1


class Op(NamedTuple):
    """A call that was made. Paths are relative to the directory; `handle` is an open file."""

    kind: str
    path: str = ""
    other: str = ""  # the second path, the target of a link, or what a mark says
    handle: int = 0
    offset: int = 0  # or the size, or the time
    data: bytes = b""


# What the module asks the system without changing anything on a disk.
_HARMLESS = frozenset(
    """
    access chdir cpu_count dup dup2 environ execv fork fsdecode fsencode fspath fstat get_blocking
    getcwd geteuid getegid getgroups getloadavg getlogin getpgid getpid getppid getuid isatty kill
    killpg listdir lseek lstat major minor name path pipe pread read readlink register_at_fork
    scandir sched_getaffinity sched_yield set_blocking set_inheritable setgid setgroups setpgid
    setsid setuid stat statvfs strerror sysconf sysconf_names umask uname urandom waitpid walk
    waitstatus_to_exitcode sep linesep devnull pathsep pidfd_open eventfd get_terminal_size
    getenv putenv unsetenv times initgroups memfd_create WNOHANG posix_fadvise
    """.split()
)


class Recorder(Layer):
    """`os` that writes down in `ops` what is changed below `directory`; nothing is synced.

    The calls come one after another. Before each of them, `watches` are asked what has happened
    outside since the last one; that is written down as marks.
    """

    def __init__(self, directory: str) -> None:
        super().__init__(os.path.realpath(directory))
        self.ops: list[Op] = []
        self.watches: list[Callable[[], Iterable[str]]] = []
        self._lock = threading.RLock()
        self._handles: dict[int, int] = {}  # by descriptor
        self._appending: set[int] = set()
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        if name in _HARMLESS or name[:1].isupper() or name[:2] in ("O_", "EX"):
            return value
        raise NotImplementedError(f"os.{name} is not recorded")

    def look(self) -> None:
        """Ask the watches now."""
        with self._lock:
            for watch in self.watches:
                self.ops.extend(Op("mark", other=text) for text in watch())

    def mark(self, text: str) -> None:
        """Write down that something has happened."""
        with self._lock:
            self.look()
            self.ops.append(Op("mark", other=text))

    def _relative(self, path: str) -> str:
        path = os.path.abspath(os.fspath(path))
        parent = os.path.realpath(os.path.dirname(path))
        return os.path.relpath(os.path.join(parent, os.path.basename(path)), self._directory)

    def _is_ours(self, path: str) -> bool:
        return not self._relative(path).startswith("..")

    def _do(self, name: str, path: str, call: Callable[[], Any], **fields: Any) -> Any:
        with self._lock:
            self.look()
            if not self._is_ours(path):
                return call()
            result = call()
            self.ops.append(Op(name, self._relative(path), **fields))
            return result

    # --- open files ---

    def open(self, path: str, flags: int, mode: int = 0o777, **keywords: Any) -> int:
        with self._lock:
            self.look()
            made = not os.path.lexists(path)
            fd = os.open(path, flags, mode, **keywords)
            if keywords or not self._is_ours(path):
                return fd
            number = self._handles[fd] = next(self._numbers)
            if flags & os.O_APPEND:
                self._appending.add(fd)
            kind = "create" if made else "open"
            self.ops.append(Op(kind, self._relative(path), handle=number))
            if flags & os.O_TRUNC and not made:
                self.ops.append(Op("truncate", handle=number))
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            self._handles.pop(fd, None)
            self._appending.discard(fd)
            os.close(fd)

    def write(self, fd: int, data: bytes) -> int:
        with self._lock:
            if fd not in self._handles:
                return os.write(fd, data)
            self.look()
            at_end = fd in self._appending
            offset = os.fstat(fd).st_size if at_end else os.lseek(fd, 0, os.SEEK_CUR)
            count = os.write(fd, data)
            self._on(fd, "write", offset, bytes(data[:count]))
            return count

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        with self._lock:
            self.look()
            count = os.pwrite(fd, data, offset)
            self._on(fd, "write", offset, bytes(data[:count]))
            return count

    def ftruncate(self, fd: int, length: int) -> None:
        with self._lock:
            self.look()
            os.ftruncate(fd, length)
            self._on(fd, "truncate", length)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            self.look()
            os.posix_fallocate(fd, offset, length)
            self._on(fd, "truncate", max(os.fstat(fd).st_size, offset + length))

    def fsync(self, fd: int) -> None:
        with self._lock:
            self.look()
            os.fstat(fd)  # it is open
            self._on(fd, "sync")

    fdatasync = fsync

    def fchmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)
        self._on(fd, "mode")

    def fchown(self, fd: int, user: int, group: int) -> None:
        os.fchown(fd, user, group)
        self._on(fd, "mode")

    def syncfs(self, fd: int) -> None:
        with self._lock:
            self.look()
            self.ops.append(Op("sync all"))

    def _on(self, fd: int, kind: str, offset: int = 0, data: bytes = b"") -> None:
        if fd in self._handles:
            self.ops.append(Op(kind, handle=self._handles[fd], offset=offset, data=data))

    # --- names ---

    def rename(self, old: str, new: str) -> None:
        other = self._relative(new)
        self._do("rename", old, lambda: os.rename(old, new), other=other)

    replace = rename

    def link(self, old: str, new: str) -> None:
        other = self._relative(new)
        self._do("link", old, lambda: os.link(old, new), other=other)

    def symlink(self, target: str, path: str) -> None:
        self._do("symlink", path, lambda: os.symlink(target, path), other=target)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self._do("mkdir", path, lambda: os.mkdir(path, mode))

    def rmdir(self, path: str) -> None:
        self._do("rmdir", path, lambda: os.rmdir(path))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: os.unlink(path))

    remove = unlink

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        if self._is_ours(path) and not os.path.isdir(path):
            raise NotImplementedError("os.makedirs makes directories that are not recorded")
        os.makedirs(path, mode, exist_ok)

    def utime(self, path: str, times: tuple[float, float]) -> None:
        at = int(times[1] * 1e9)
        self._do("times", path, lambda: os.utime(path, times), offset=at)

    def chmod(self, path: str, mode: int) -> None:
        self._do("mode", path, lambda: os.chmod(path, mode))

    def chown(self, path: str, user: int, group: int, *, follow_symlinks: bool = True) -> None:
        def call() -> None:
            os.chown(path, user, group, follow_symlinks=follow_symlinks)

        self._do("mode", path, call)


class Unsynced(Layer):
    """`os` that syncs nothing: for what is to be looked at, and not to last."""

    def fsync(self, fd: int) -> None:
        os.fstat(fd)

    fdatasync = fsync


# --- the model ---


class _Node:
    """A file, a directory or a symbolic link, whatever its names are."""

    def __init__(self, kind: str, content: bytes = b"", time: int | None = None) -> None:
        self.kind = kind
        self.durable = content  # of a symbolic link, its target
        self.entries: dict[str, _Node] = {}  # of a directory: those that are durable
        self.seen: dict[str, _Node] = {}  # and those of the running system
        self.pending: list[Op] = []  # what was changed since the last sync
        self.time = time
        self.durable_time = time
        self._contents: dict[str, bytes] = {}

    def write(self, op: Op) -> None:
        self.pending.append(op)
        self._contents.clear()

    def sync(self) -> None:
        self.durable = self.content("new")
        self.durable_time = self.time
        self.pending.clear()
        self._contents.clear()

    def content(self, how: str) -> bytes:
        """Return what the file may hold: all that is "new", or nothing; its first "half"; zeros."""
        if not self.pending or how == "old":
            return self.durable
        if how not in self._contents:
            self._contents[how] = self._made(how)
        return self._contents[how]

    def _made(self, how: str) -> bytes:
        new = _applied(self.durable, self.pending)
        if how == "new":
            return new
        if how == "half":
            return self.up_to(sum(len(op.data) + 1 for op in self.pending) // 2)
        return self.durable[: len(new)] + bytes(max(0, len(new) - len(self.durable)))

    def up_to(self, octets: int) -> bytes:
        """Return what is there if only the first octets were written; a truncation counts one."""
        done = []
        for op in self.pending:
            cost = len(op.data) + 1
            if octets < cost:
                if op.kind == "write" and octets:
                    done.append(op._replace(data=op.data[:octets]))
                break
            done.append(op)
            octets -= cost
        return _applied(self.durable, done)

    def in_blocks(self, chance: random.Random) -> bytes:
        """Return what is there if some blocks were written, and the size was."""
        new = self.content("new")
        old = self.durable[: len(new)].ljust(len(new), b"\0")
        starts = range(0, len(new), BLOCK)
        return b"".join(chance.choice((old, new))[at : at + BLOCK] for at in starts)


def _applied(data: bytes, ops: Iterable[Op]) -> bytes:
    content = bytearray(data)
    for op in ops:
        if op.kind == "times":
            continue
        end = op.offset + len(op.data)
        if len(content) < end:
            content += bytes(end - len(content))
        if op.kind == "truncate":
            del content[op.offset :]
        else:
            content[op.offset : end] = op.data
    return bytes(content)


class _Edit:
    """A name that came, went or changed; `needs` is what cannot be missing then."""

    def __init__(
        self, directory: _Node, name: str, node: _Node | None, needs: _Edit | None = None
    ) -> None:
        self.directory, self.name, self.node, self.needs = directory, name, node, needs


_Choice = tuple[dict[_Node, dict[str, _Node | None]], dict[_Node, bytes], dict[_Node, str]]


class State(NamedTuple):
    """What is found: files with their content, directories as None, symbolic links as text.

    `times` are of those whose time was set, `names` second names of the same file.
    """

    files: dict[str, bytes | str | None]
    times: dict[str, int]
    names: dict[str, str]

    @property
    def fingerprint(self) -> int:
        """The same for the same files."""
        return hash(tuple(frozenset(part.items()) for part in self))

    def write(self, directory: Path) -> None:
        """Make it below `directory`, which must not exist."""
        directory.mkdir(parents=True)
        for name, content in self.files.items():
            path = os.path.join(directory, name)
            if content is None:
                os.mkdir(path, 0o700)
            elif isinstance(content, str):
                os.symlink(content, path)
            else:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(fd, content)
                os.close(fd)
        for name, first in self.names.items():
            os.link(os.path.join(directory, first), os.path.join(directory, name))
        for name, at in self.times.items():
            os.utime(os.path.join(directory, name), ns=(at, at))


class Model:
    """A disk that begins as `directory` is, all of it durable."""

    def __init__(self, directory: str | Path) -> None:
        self._root = _as_it_is(str(directory))
        self._edits: list[_Edit] = []  # that are not durable, in their order
        self._files: dict[_Node, None] = {}  # that have writes which are not
        self._handles: dict[int, _Node] = {}

    # --- calls ---

    def apply(self, op: Op) -> None:
        """Make a call."""
        if op.kind in ("write", "truncate"):
            node = self._handles[op.handle]
            node.write(op)
            self._files[node] = None
        elif op.kind == "sync":
            self._sync(self._handles[op.handle])
        elif op.kind == "sync all":
            for edit in list(self._edits):
                self._make_durable(edit)
            for node in list(self._files):
                self._sync(node)
        elif op.kind == "times":
            if found := self._find(op.path):
                found.time = op.offset
                found.write(op)
                self._files[found] = None
        elif op.kind in ("create", "open"):
            self._handles[op.handle] = self._open(op)
        elif op.kind == "rename":
            self._rename(op.path, op.other)
        elif op.kind == "link":
            self._set(op.other, self._find(op.path))
        elif op.kind in ("unlink", "rmdir"):
            self._set(op.path, None)
        elif op.kind == "mkdir":
            self._set(op.path, _Node("directory"))
        elif op.kind == "symlink":
            self._set(op.path, _Node("link", op.other.encode()))
        else:
            assert op.kind in ("mark", "mode"), op

    def _open(self, op: Op) -> _Node:
        if op.kind == "create":
            node = _Node("file")
            self._set(op.path, node)
            return node
        found = self._find(op.path)
        assert found is not None, f"{op.path} was made by no call that was recorded"
        return found

    def _rename(self, old: str, new: str) -> None:
        node = self._find(old)
        assert node is not None, old
        made = self._set(new, node)
        self._set(old, None, made)

    def _set(self, path: str, node: _Node | None, needs: _Edit | None = None) -> _Edit | None:
        parent = self._find(os.path.dirname(path))
        name = os.path.basename(path)
        assert parent is not None, path
        if node is None and name not in parent.seen:
            return None  # a socket, which the system made
        edit = _Edit(parent, name, node, needs)
        self._edits.append(edit)
        if node is None:
            del parent.seen[name]
        else:
            parent.seen[name] = node
        return edit

    def _find(self, path: str) -> _Node | None:
        node: _Node | None = self._root
        for part in filter(None, path.split("/")):
            if part != "." and node is not None:
                node = node.seen.get(part)
        return node

    def _sync(self, node: _Node) -> None:
        if node.kind == "directory":
            for edit in [edit for edit in self._edits if edit.directory is node]:
                self._make_durable(edit)
        else:
            node.sync()
            self._files.pop(node, None)

    def _make_durable(self, last: _Edit) -> None:
        """Make an edit durable, those of the same name before it, and what they need."""
        for edit in list(self._edits):
            if (edit.directory, edit.name) == (last.directory, last.name):
                if edit not in self._edits:
                    continue
                self._edits.remove(edit)
                if edit.needs in self._edits:
                    assert edit.needs is not None
                    self._make_durable(edit.needs)
                if edit.node is None:
                    edit.directory.entries.pop(edit.name, None)
                else:
                    edit.directory.entries[edit.name] = edit.node
            if edit is last:
                return

    # --- states ---

    def running(self) -> dict[str, bytes | str]:
        """Return the files and symbolic links that the running system sees."""
        found: dict[str, bytes | str] = {}

        def collect(path: str, directory: _Node) -> None:
            for name, node in directory.seen.items():
                if node.kind == "directory":
                    collect(f"{path}{name}/", node)
                elif node.kind == "link":
                    found[path + name] = node.durable.decode()
                else:
                    found[path + name] = node.content("new")

        collect("", self._root)
        return found

    def states(self, chance: random.Random) -> Iterator[State]:
        """Yield what may be found if the power goes now: the extremes, and a sample."""
        edits, files = list(self._edits), list(self._files)
        counts = {0, len(edits), *(chance.randint(0, len(edits)) for _ in range(_PREFIXES))}
        for count in sorted(counts):  # as a journal has it: all up to some moment
            for how in ("new", "old"):
                yield self._state(edits[:count], {file: file.content(how) for file in files})
        for how in ("zeros", "half"):
            for some in ([], edits):
                yield self._state(some, {file: file.content(how) for file in files})
        by_name: dict[tuple[_Node, str], list[_Edit]] = {}
        for edit in edits:
            by_name.setdefault((edit.directory, edit.name), []).append(edit)
        ways = 4 ** len(files)
        for sequence in by_name.values():
            ways *= len(sequence) + 1
        if 1 < ways <= _ENUMERATED:
            yield from self._all_states(list(by_name.values()), files)
        elif ways > 1:
            for _ in range(_SAMPLES):
                yield self._some_state(list(by_name.values()), files, chance)

    def _all_states(self, names: list[list[_Edit]], files: list[_Node]) -> Iterator[State]:
        kinds = itertools.product(("old", "new", "zeros", "half"), repeat=len(files))
        counts = itertools.product(*(range(len(sequence) + 1) for sequence in names))
        for chosen, hows in itertools.product(list(counts), list(kinds)):
            edits = _first(names, chosen)
            contents = {file: file.content(how) for file, how in zip(files, hows, strict=True)}
            yield self._state(edits, contents)

    def _some_state(
        self, names: list[list[_Edit]], files: list[_Node], chance: random.Random
    ) -> State:
        chosen = [chance.randint(0, len(sequence)) for sequence in names]
        contents = {}
        for file in files:
            how = chance.choice(("old", "new", "zeros", "part", "blocks"))
            if how == "part":
                total = sum(len(op.data) + 1 for op in file.pending)
                contents[file] = file.up_to(chance.randint(0, total))
            elif how == "blocks":
                contents[file] = file.in_blocks(chance)
            else:
                contents[file] = file.content(how)
        return self._state(_first(names, chosen), contents)

    def _state(self, edits: Iterable[_Edit], contents: dict[_Node, bytes]) -> State:
        chosen: dict[_Edit, None] = dict.fromkeys(edits)
        for edit in list(chosen):  # and what cannot be missing then
            while edit.needs is not None and edit.needs in self._edits:
                edit = edit.needs
                chosen[edit] = None
        entries: dict[_Node, dict[str, _Node | None]] = {}
        for edit in self._edits:
            if edit in chosen:
                entries.setdefault(edit.directory, {})[edit.name] = edit.node
        state = State({}, {}, {})
        self._collect("", self._root, (entries, contents, {}), state)
        return state

    def _collect(
        self,
        path: str,
        directory: _Node,
        choice: _Choice,
        state: State,
    ) -> None:
        entries, contents, names = choice
        for name, node in {**directory.entries, **entries.get(directory, {})}.items():
            where = f"{path}{name}"
            if node is None:
                continue
            if node.kind == "directory":
                state.files[where] = None
                self._collect(f"{where}/", node, choice, state)
            elif node.kind == "link":
                state.files[where] = node.durable.decode()
            elif node in names:
                state.names[where] = names[node]
            else:
                names[node] = where
                content = contents.get(node, node.durable)
                state.files[where] = content
                at = node.durable_time if content is node.durable else node.time
                if at is not None:
                    state.times[where] = at


def _first(names: list[list[_Edit]], counts: Iterable[int]) -> list[_Edit]:
    pairs = zip(names, counts, strict=True)
    return [edit for sequence, count in pairs for edit in sequence[:count]]


def _as_it_is(path: str) -> _Node:
    node = _Node("directory")
    for name in os.listdir(path):
        below = os.path.join(path, name)
        status = os.lstat(below)
        if stat.S_ISDIR(status.st_mode):
            node.entries[name] = _as_it_is(below)
        elif stat.S_ISLNK(status.st_mode):
            node.entries[name] = _Node("link", os.readlink(below).encode())
        elif stat.S_ISREG(status.st_mode):
            node.entries[name] = _Node("file", Path(below).read_bytes())
    node.seen = dict(node.entries)
    return node
