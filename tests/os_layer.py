# SPDX-License-Identifier: Apache-2.0
"""A layer between a copy of the module and the operating system.

The copy has a `Layer` for its `os`. Its classes decide what the calls do that concern files below
a directory: they fail, or are written down. All other calls are the real ones.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from typing import Any

from support import MODULE


class Layer:
    """`os`, but for files below `directory`. `_paths` are those of open files, by descriptor."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def syncfs(self, fd: int) -> None:
        """Sync nothing. The module `os` does not have it, so the module looks for it elsewhere."""

    def _is_ours(self, path: str) -> bool:
        return os.fspath(path).startswith(self._directory)


@functools.cache
def _code() -> types.CodeType:
    return compile(MODULE.read_bytes(), MODULE, "exec")


def copy_of_module(layer: Layer) -> Any:
    """Return the module, made anew, with `layer` for its `os`."""
    module = types.ModuleType("chasquid_on_a_layer")
    module.__file__ = str(MODULE)
    sys.modules[module.__name__] = module  # where a class is defined, its module is looked for
    try:
        exec(_code(), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    module.__dict__["os"] = layer
    module.__dict__["_load_syncfs"] = lambda: layer.syncfs
    return module
