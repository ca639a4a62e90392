# SPDX-License-Identifier: Apache-2.0
"""Rooms SESSION, RECEPTION: how many functions are called for a message; see `bench/calls.py`.

The counts hardly depend on what else the machine does. Who needs more of them says why, here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.calls import Calls, from_outside, submission


@pytest.mark.parametrize(("what", "most"), [(from_outside, 970), (submission, 890)])
def test_a_message_costs_few_calls(
    tmp_path: Path, what: Callable[[Path], Calls], most: int
) -> None:
    calls = what(tmp_path)
    dearest = "\n".join(f"{n / 20:5.1f} {place}" for place, n in calls.functions.most_common(40))
    assert most / 2 < calls.all <= most, f"{calls.all} calls for a message:\n{dearest}"
    assert calls.others < 90
