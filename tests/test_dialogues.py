# SPDX-License-Identifier: Apache-2.0
"""Rooms SESSION, SMTP SYNTAX: the dialogues of `dialogues/*.txt`, each with a server of its own.

A file is a suite; "== name" begins a dialogue. `support.play` says how one is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import HOST, USERS, Server, play

ALIASES = {
    "here.example": (
        "team: ana, ben\nround: about\nabout: round\nout: eva@there.example\npostmaster: ana\n"
    ),
    HOST: "postmaster: ana@here.example\n",
}


def dialogues() -> Iterator[object]:
    for path in sorted((Path(__file__).parent / "dialogues").glob("*.txt")):
        _, *parts = path.read_text().split("\n== ")
        assert parts, f"{path}: expected a dialogue"
        for part in parts:
            name, _, text = part.partition("\n")
            yield pytest.param(text, id=f"{path.stem}: {name}")


@pytest.mark.parametrize("text", list(dialogues()))
@pytest.mark.usefixtures("no_pause")
def test_the_dialogue_goes_as_written(text: str, serve: Callable[..., Server]) -> None:
    play(serve(users={**USERS, HOST: {}}, aliases=ALIASES, max_data_size_mb=1), text)
