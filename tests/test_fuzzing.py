# SPDX-License-Identifier: Apache-2.0
"""No parser fails otherwise than it says, or takes long, whatever it is given."""

from __future__ import annotations

import os

import fuzzing
import pytest


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
    slow = fuzzing.Parser(lambda data: sum(1 for _ in data for _ in data * 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fuzzing.PARSERS, "address", slow)
        with pytest.raises(fuzzing.Mistake, match="address takes"):
            fuzzing.attempt("address", b"a" * 8000)
