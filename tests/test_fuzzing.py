# SPDX-License-Identifier: Apache-2.0
"""No parser fails otherwise than it says, or takes long, whatever it is given."""

from __future__ import annotations

import os

import fuzzing
import pytest
from support import FakeClock


@pytest.fixture(scope="module", autouse=True)
def loaded():
    fuzzing.load()
    yield
    fuzzing.server().stop()
    fuzzing.server.cache_clear()


@pytest.mark.parametrize("name", fuzzing.PARSERS)
def test_every_input_of_the_corpus(name):
    inputs = fuzzing.corpus(name)
    assert len(inputs) > 1, f"tests/data/corpus/{name} is empty"
    for data in inputs:
        fuzzing.attempt(name, data)


@pytest.mark.parametrize("name", fuzzing.PARSERS)
def test_a_few_inputs_that_are_made_of_it(name):
    assert fuzzing.attempt_many(name, 25, seed=1) > 10


@pytest.mark.fuzz
@pytest.mark.parametrize("name", fuzzing.PARSERS)
def test_many_inputs(name):
    seconds = float(os.environ.get("FUZZ_SECONDS", "120")) / len(fuzzing.PARSERS)
    for _, tried in fuzzing.attempt_for(seconds, [name]):
        print(f"{name}: {tried} inputs")


@pytest.mark.parametrize("name", sorted(os.listdir(fuzzing.CORPUS)))
def test_each_corpus_has_a_parser(name):
    assert name in fuzzing.PARSERS


def test_a_parser_that_raises_something_else_is_found():
    broken = fuzzing.Parser(lambda data: data.index(b"@"), (KeyError,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fuzzing.PARSERS, "address", broken)
        with pytest.raises(fuzzing.Mistake, match="address raises ValueError"):
            fuzzing.attempt_many("address", 50, seed=1)


def test_a_parser_that_takes_its_square_is_found():
    clock = FakeClock()
    slow = fuzzing.Parser(lambda data: clock.advance(len(data) ** 2 * 1e-7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fuzzing.PARSERS, "address", slow)
        fuzzing.attempt("address", b"a" * 400, clock.monotonic)
        with pytest.raises(fuzzing.Mistake, match="address takes 6.400 s for 8000 octets"):
            fuzzing.attempt("address", b"a" * 8000, clock.monotonic)


def test_a_parser_is_forgiven_what_the_machine_takes_once_or_twice():
    clock = FakeClock()
    pauses = [1.0, 1.0, 0.0]
    with pytest.MonkeyPatch.context() as patch:
        parser = fuzzing.Parser(lambda data: clock.advance(pauses.pop(0)))
        patch.setitem(fuzzing.PARSERS, "address", parser)
        fuzzing.attempt("address", b"a", clock.monotonic)
    assert not pauses
