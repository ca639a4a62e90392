# SPDX-License-Identifier: Apache-2.0
"""Starts the module as the archive does, from what is compiled already; a script never is."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import chasquid  # noqa: E402

if __name__ == "__main__":
    sys.exit(chasquid.main())
