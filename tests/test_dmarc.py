# SPDX-License-Identifier: Apache-2.0
"""Room DMARC: the walk up the tree (RFC 9989), policies, alignment, what a server makes of it."""

from __future__ import annotations

import email
import re
import time
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from support import (
    DOWN,
    HOST,
    FakeClock,
    RunningClock,
    Serve,
    Server,
    Zone,
    greeted,
    is_quick,
    logged_in,
    run,
    send,
    turns,
)

import chasquid
from chasquid import Dmarc, Signature, Spf

Records = Mapping[Any, Any]

NO_SPF = Spf("none")


def table(records: Records) -> dict[tuple[str, str], Any]:
    """Return what a Zone takes; a name alone stands for the DMARC record there."""
    return {
        key if isinstance(key, tuple) else (f"_dmarc.{key}", "TXT"): (
            [value] if isinstance(value, str) else value
        )
        for key, value in records.items()
    }


def look(
    records: Records, authors: Sequence[str], spf: Spf, signatures: Sequence[Signature]
) -> tuple[Dmarc, list[tuple[str, str]]]:
    """Return the result and the questions."""
    zone = Zone(table(records))

    async def main(loop: chasquid.Loop) -> Dmarc:
        return await chasquid.check_dmarc(
            chasquid.Names(loop, zone.ask), loop, authors, spf, signatures
        )

    return run(main), zone.asked


def judge(
    records: Records, *authors: str, spf: Spf = NO_SPF, signatures: Sequence[Signature] = ()
) -> Dmarc:
    return look(records, authors or ["there.example"], spf, signatures)[0]


def asked(records: Records, author: str = "there.example") -> list[str]:
    """Return the names that are asked for a DMARC record, in order."""
    questions = look(records, [author], NO_SPF, ())[1]
    return [name.removeprefix("_dmarc.") for name, kind in questions if kind == "TXT"]


def policy(records: Records, author: str = "there.example") -> str:
    """Return what is asked for where nothing is aligned, or "" where there is no record."""
    found = judge(records, author)
    assert found.result == ("fail" if found.domain and found.result != "none" else "none")
    return found.policy if found.result == "fail" else ""


def mailfrom(domain: str, result: str = "pass") -> Spf:
    return Spf(result, "mailfrom", domain)


def signed(domain: str, result: str = "pass") -> Signature:
    return Signature(result, "", domain, "s", "abcdefgh")


def aligned(records: Records, author: str, domain: str) -> bool:
    """Tell whether SPF for `domain` speaks for `author`; a signature must do the same."""
    by_spf = judge(records, author, spf=mailfrom(domain)).result
    by_dkim = judge(records, author, signatures=[signed(domain)]).result
    assert by_spf == by_dkim
    assert by_spf in ("pass", "fail")
    return by_spf == "pass"


REJECT = "v=DMARC1; p=reject"

# --- the walk ---


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 40])
def test_at_most_eight_names_are_asked_on_the_way_up(count: int) -> None:
    labels = [f"l{number}" for number in range(count - 1)] + ["example"]
    author = ".".join(labels)
    rest = labels[1:] if count < 8 else labels[-7:]
    expected = [author] + [".".join(rest[start:]) for start in range(len(rest))]
    assert asked({}, author) == expected
    assert len(expected) == min(count, 8)


def test_a_record_alone_does_not_end_the_walk() -> None:
    records = {"mail.there.example": REJECT, "there.example": REJECT, "example": REJECT}
    assert asked(records, "mail.there.example") == [
        "mail.there.example", "there.example", "example",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("author", "record", "last"),
    [
        ("mail.there.example", "psd=n", "there.example"),
        ("mail.there.example", "psd=y", "there.example"),
        ("mail.there.example", "psd=u", "example"),
        ("there.example", "psd=n", "there.example"),
        ("there.example", "psd=y", "example"),
    ],
)
def test_psd_ends_the_walk(author: str, record: str, last: str) -> None:
    assert asked({"there.example": f"{REJECT}; {record}"}, author)[-1] == last


@pytest.mark.parametrize(
    ("records", "author", "same", "other"),
    [
        pytest.param(
            {"there.example": REJECT},
            "a.there.example",
            ["a.there.example", "there.example", "b.there.example", "x.y.z.there.example"],
            ["example", "other.example", "nothere.example", "there.example.net"],
            id="the only name with a record",
        ),
        pytest.param(
            {"a.there.example": REJECT, "there.example": REJECT, "example": REJECT},
            "a.there.example",
            ["example", "other.example", "b.there.example"],
            ["example.net"],
            id="the shortest name with a record",
        ),
        pytest.param(
            {"there.example": f"{REJECT}; psd=n", "example": REJECT},
            "a.there.example",
            ["there.example", "b.there.example"],
            ["example", "other.example"],
            id="psd=n",
        ),
        pytest.param(
            {"a.there.example": f"{REJECT}; psd=n", "there.example": REJECT},
            "a.there.example",
            ["a.there.example", "x.a.there.example"],
            ["there.example", "b.there.example"],
            id="psd=n at the start",
        ),
        pytest.param(
            {"a.there.example": f"{REJECT}; psd=n", "there.example": REJECT},
            "there.example",
            ["there.example", "b.there.example"],
            ["a.there.example", "x.a.there.example"],
            id="psd=n below",
        ),
        pytest.param(
            {"example": f"{REJECT}; psd=y"},
            "a.there.example",
            ["there.example", "b.there.example"],
            ["example", "other.example", "a.other.example"],
            id="psd=y",
        ),
        pytest.param(
            {"there.example": REJECT, "co.example": f"{REJECT}; psd=y", "example": REJECT},
            "a.there.co.example",
            ["there.co.example", "b.there.co.example"],
            ["co.example", "other.co.example", "example", "there.example"],
            id="psd=y below a name with a record",
        ),
        pytest.param(
            {"co.example": f"{REJECT}; psd=y"},
            "co.example",
            ["co.example"],
            ["there.co.example", "example"],
            id="psd=y at the start",
        ),
        pytest.param(
            {"co.example": f"{REJECT}; psd=y", "example": REJECT},
            "co.example",
            ["co.example", "example", "other.example"],
            ["there.co.example"],
            id="psd=y at the start is passed over",
        ),
        pytest.param(
            {"c.d.e.f.g.h.example": f"{REJECT}; psd=y"},
            "a.b.c.d.e.f.g.h.example",
            ["b.c.d.e.f.g.h.example", "x.y.b.c.d.e.f.g.h.example"],
            ["c.d.e.f.g.h.example", "a.x.c.d.e.f.g.h.example"],
            id="psd=y seven labels up",
        ),
        pytest.param(
            {"b.c.d.e.f.g.h.example": REJECT, "a.b.c.d.e.f.g.h.example": REJECT},
            "a.b.c.d.e.f.g.h.example",
            ["a.b.c.d.e.f.g.h.example"],
            ["b.c.d.e.f.g.h.example", "x.b.c.d.e.f.g.h.example"],
            id="the name of eight labels is skipped",
        ),
    ],
)
def test_who_is_of_the_same_organisation(
    records: Records, author: str, same: list[str], other: list[str]
) -> None:
    found = {domain: aligned(records, author, domain) for domain in same + other}
    assert found == {**dict.fromkeys(same, True), **dict.fromkeys(other, False)}


def test_without_any_record_there_is_no_result() -> None:
    found = judge({}, spf=mailfrom("there.example"))
    assert found == Dmarc("none", "there.example", "none")


def test_without_an_author_there_is_no_result_and_no_question() -> None:
    assert look({}, [], mailfrom("there.example"), ()) == (Dmarc("none"), [])


# --- records ---


@pytest.mark.parametrize(
    "record",
    [
        "v=DMARC1;p=reject",
        "v=DMARC1;p=reject;",
        "v=DMARC1 ; p=reject ;",
        "v = DMARC1\t;\tp = reject ; ",
        "v=DMARC1; P=Reject",
        "v=DMARC1; p=REJECT",
        "v=DMARC1; sp=none; p=reject",
        "v=DMARC1; x=y; p=reject; hello; =; ;; ruf=mailto:a@there.example",
        "v=DMARC1; p=reject; pct=0; rf=afrf; ri=86400",
        "v=DMARC1; p=reject; t=n",
        "v=DMARC1; p=reject; t=",
        "v=DMARC1; p=reject; rua=mailto:dmarc@there.example!10m,mailto:x@other.example",
    ],
)
def test_a_record_however_it_is_written(record: str) -> None:
    assert policy({"there.example": record}) == "reject"


@pytest.mark.parametrize(
    "record",
    [
        "",
        "v=DMARC1",
        "v=DMARC1;",
        "v=dmarc1; p=reject",
        "v=DMARC2; p=reject",
        "v=DMARC10; p=reject",
        "v=DMARC1 p=reject",
        "v=DMARC1p=reject",
        " v=DMARC1; p=reject",
        "p=reject; v=DMARC1",
        "x=1; v=DMARC1; p=reject",
        "p=reject",
        "v=spf1 -all",
        "v=DMARC1; sp=reject",
        "v=DMARC1; p=refuse",
        "v=DMARC1; p=",
        "v=DMARC1; p",
        "v=DMARC1; p=reject now",
        "v=DMARC1; \xa0p=reject\u2003x",
    ],
)
def test_what_is_no_record(record: str) -> None:
    assert policy({"there.example": record}) == ""


@pytest.mark.parametrize("p", ["", "; p=", "; p=refuse"])
def test_who_asks_for_reports_without_a_policy_that_is_one_has_the_policy_none(p: str) -> None:
    record = f"v=DMARC1{p}; sp=quarantine; rua=mailto:dmarc@there.example"
    assert policy({"there.example": record}) == "none"
    assert policy({"there.example": record}, "a.there.example") == "quarantine"


def test_a_record_that_does_not_count_leaves_the_next_name_to_decide() -> None:
    records = {"a.there.example": "v=DMARC1; p=refuse", "there.example": f"{REJECT}; sp=none"}
    assert policy(records, "a.there.example") == "none"


@pytest.mark.parametrize("other", [REJECT, "v=DMARC1; p=none", "v=DMARC1; p=refuse", "v=DMARC1"])
def test_several_records_are_none(other: str) -> None:
    assert policy({"there.example": [REJECT, other]}) == ""
    assert policy({"there.example": [other, REJECT]}) == ""


def test_other_texts_beside_a_record_do_no_harm() -> None:
    assert policy({"there.example": ["v=spf1 -all", REJECT, "x" * 5000, ""]}) == "reject"


@pytest.mark.parametrize(("size", "expected"), [(4096, "reject"), (4097, "")])
def test_a_record_of_4_kb_is_read_and_a_longer_one_is_not(size: int, expected: str) -> None:
    record = f"{REJECT}; x="
    assert policy({"there.example": record + "x" * (size - len(record))}) == expected


def test_a_record_that_would_take_long_takes_no_time() -> None:
    records = {"there.example": ["v" + " " * 60_000, "v=DMARC1" + " ;" * 30_000]}
    assert policy(records) == ""
    assert is_quick(lambda: policy(records), 0.5)


# --- policies ---


@pytest.mark.parametrize(
    ("record", "at_the_name", "below"),
    [
        ("p=none", "none", "none"),
        ("p=quarantine", "quarantine", "quarantine"),
        ("p=reject", "reject", "reject"),
        ("p=reject; sp=quarantine", "reject", "quarantine"),
        ("p=none; sp=reject", "none", "reject"),
        ("p=reject; t=y", "quarantine", "quarantine"),
        ("p=quarantine; t=y", "none", "none"),
        ("p=none; t=y", "none", "none"),
        ("p=none; sp=reject; t=Y", "none", "quarantine"),
        ("p=reject; t=yes", "reject", "reject"),
    ],
)
def test_the_policy_for_a_name_and_for_those_below(
    record: str, at_the_name: str, below: str
) -> None:
    records = {"there.example": f"v=DMARC1; {record}", ("a.there.example", "A"): "192.0.2.1"}
    assert policy(records, "there.example") == at_the_name
    assert policy(records, "a.there.example") == below
    assert policy(records, "b.a.there.example") == below


@pytest.mark.parametrize(
    ("record", "missing", "existing"),
    [
        ("p=none; np=reject", "reject", "none"),
        ("p=reject; sp=quarantine; np=none", "none", "quarantine"),
        ("p=none; sp=reject; np=quarantine; t=y", "none", "quarantine"),
        ("p=none; sp=quarantine", "quarantine", "quarantine"),
        ("p=none; sp=quarantine; np=refuse", "quarantine", "quarantine"),
    ],
)
@pytest.mark.parametrize("kind", ["A", "AAAA", "MX", "CAA"])
def test_np_is_for_names_that_do_not_exist(
    record: str, missing: str, existing: str, kind: str
) -> None:
    records = {"there.example": f"v=DMARC1; {record}", ("a.there.example", kind): "something"}
    assert policy(records, "a.there.example") == existing
    assert policy(records, "b.there.example") == missing


def test_np_is_not_for_a_name_with_a_record_of_its_own() -> None:
    assert policy({"there.example": "v=DMARC1; p=none; np=reject"}) == "none"


@pytest.mark.parametrize(
    ("record", "author"),
    [
        ("p=none; np=reject", "there.example"),
        ("p=none; sp=reject", "a.there.example"),
        ("p=none; sp=reject; np=reject", "a.there.example"),
        ("p=reject; np=reject", "a.there.example"),
    ],
)
def test_whether_a_name_exists_is_asked_only_where_it_matters(record: str, author: str) -> None:
    questions = look({"there.example": f"v=DMARC1; {record}"}, [author], NO_SPF, ())[1]
    assert {kind for _, kind in questions} == {"TXT"}


def test_the_record_of_the_organisation_counts_and_not_that_of_a_name_between() -> None:
    records = {"b.there.example": "v=DMARC1; p=none", "there.example": REJECT}
    assert policy(records, "a.b.there.example") == "reject"


def test_the_record_of_the_organisation_counts_before_that_of_the_public_suffix() -> None:
    suffix = "v=DMARC1; p=none; sp=quarantine; psd=y"
    assert policy({"there.example": REJECT, "example": suffix}, "a.there.example") == "reject"
    assert policy({"there.example": REJECT, "example": suffix}) == "reject"


def test_the_record_of_the_public_suffix_counts_where_there_is_no_other() -> None:
    records = {"example": "v=DMARC1; p=none; sp=quarantine; np=reject; psd=y",
               ("there.example", "MX"): "10 mx.there.example."}  # fmt: skip
    assert policy(records) == "quarantine"
    assert policy(records, "missing.example") == "reject"
    assert policy(records, "example") == "none"


# --- alignment ---


@pytest.mark.parametrize(
    ("modes", "by_spf", "by_dkim"),
    [
        ("", "pass", "pass"),
        ("; aspf=r; adkim=r", "pass", "pass"),
        ("; aspf=x; adkim=", "pass", "pass"),
        ("; aspf=s", "fail", "pass"),
        ("; adkim=s", "pass", "fail"),
        ("; aspf=S; ADKIM=s", "fail", "fail"),
    ],
)
def test_strict_is_the_same_name_and_relaxed_the_same_organisation(
    modes: str, by_spf: str, by_dkim: str
) -> None:
    records = {"there.example": REJECT + modes}
    for domain, spf, dkim in (
        ("mail.there.example", by_spf, by_dkim),
        ("there.example", "pass", "pass"),
    ):
        assert judge(records, spf=mailfrom(domain)).result == spf
        assert judge(records, signatures=[signed(domain)]).result == dkim


def test_the_mode_stands_in_the_record_that_counts() -> None:
    records = {"a.there.example": REJECT, "there.example": f"{REJECT}; aspf=s"}
    assert judge(records, "a.there.example", spf=mailfrom("there.example")).result == "pass"
    assert judge(records, "b.there.example", spf=mailfrom("there.example")).result == "fail"


@pytest.mark.parametrize("result", ["fail", "softfail", "neutral", "none", "permerror"])
def test_only_a_pass_of_spf_counts(result: str) -> None:
    assert judge({"there.example": REJECT}, spf=mailfrom("there.example", result)) == Dmarc(
        "fail", "there.example", "reject"
    )


@pytest.mark.parametrize("result", ["fail", "neutral", "policy", "none", "permerror"])
def test_only_a_pass_of_a_signature_counts(result: str) -> None:
    signatures = [signed("there.example", result)]
    assert judge({"there.example": REJECT}, signatures=signatures).result == "fail"


def test_one_signature_of_several_is_enough() -> None:
    signatures = [signed("other.example"), signed("there.example", "fail"), signed("there.example")]
    records = {"there.example": REJECT}
    assert judge(records, signatures=signatures) == Dmarc("pass", "there.example", "reject")
    assert judge(records, signatures=signatures[:2]).result == "fail"


def test_the_identity_of_helo_counts_as_that_of_mail_from_does() -> None:
    spf = Spf("pass", "helo", "mx.there.example")
    assert judge({"there.example": REJECT}, spf=spf).result == "pass"
    assert judge({"there.example": f"{REJECT}; aspf=s"}, spf=spf).result == "fail"


def test_without_an_identity_nothing_is_aligned() -> None:
    assert judge({"there.example": REJECT}, spf=Spf("pass", "mailfrom", "")).result == "fail"
    assert judge({"there.example": REJECT}, signatures=[Signature("pass")]).result == "fail"


# --- several authors ---


@pytest.mark.parametrize("turn", [1, -1])
def test_of_several_authors_the_strictest_result_counts(turn: int) -> None:
    records = {
        "reject.example": REJECT,
        "junk.example": "v=DMARC1; p=quarantine",
        "none.example": "v=DMARC1; p=none",
    }
    spf = mailfrom("reject.example")
    for authors, expected in (
        (["junk.example", "none.example"], Dmarc("fail", "junk.example", "quarantine")),
        (["junk.example", "other.example"], Dmarc("fail", "junk.example", "quarantine")),
        (["reject.example", "none.example"], Dmarc("fail", "none.example", "none")),
        (["reject.example", "junk.example"], Dmarc("fail", "junk.example", "quarantine")),
        (["none.example", "other.example"], Dmarc("fail", "none.example", "none")),
    ):
        assert judge(records, *authors[::turn], spf=spf) == expected
    both = ["reject.example", "junk.example"]
    assert judge(records, *both[::turn]) == Dmarc("fail", "reject.example", "reject")


def test_each_author_needs_an_identity_of_its_own() -> None:
    records = {"there.example": REJECT, "other.example": REJECT}
    authors = ["there.example", "other.example"]
    one = [signed("there.example")]
    assert judge(records, *authors, signatures=one).result == "fail"
    assert judge(records, *authors, signatures=[*one, signed("other.example")]).result == "pass"


@pytest.mark.parametrize("place", [0, 1])
def test_an_author_whose_name_servers_are_down_hides_no_other(place: int) -> None:
    authors = ["there.example"]
    authors.insert(place, "down.example")
    found = judge({"there.example": REJECT, "down.example": DOWN}, *authors)
    assert (found.result, found.domain) == ("fail", "there.example")


def test_one_author_who_passes_does_not_hide_that_nobody_could_say_of_another() -> None:
    records = {"there.example": REJECT, "down.example": DOWN}
    authors = ["there.example", "down.example"]
    assert judge(records, *authors, spf=mailfrom("there.example")).result == "temperror"


def test_no_author_hides_behind_many_others() -> None:
    crowd = [f"n{number}.example" for number in range(10)]
    assert judge({"there.example": REJECT}, *crowd, "there.example").result == "fail"


def test_slow_name_servers_of_one_author_do_not_use_up_the_time_of_the_others() -> None:
    found, _ = judged_slowly({"there.example": REJECT}, ["slow.example", "there.example"])
    assert (found.result, found.domain) == ("fail", "there.example")


# --- failures that may pass ---


@pytest.mark.parametrize("place", ["a.there.example", "there.example", "example"])
def test_where_the_author_s_records_cannot_be_had_nobody_can_say(place: str) -> None:
    records = {"there.example": REJECT, place: DOWN}
    assert judge(records, "a.there.example").result == "temperror"


def test_beyond_the_end_of_the_walk_nothing_can_fail() -> None:
    records = {"there.example": f"{REJECT}; psd=n", "example": DOWN}
    assert judge(records, "a.there.example").result == "fail"


def test_where_nobody_can_say_whether_the_author_exists_nothing_is_rejected() -> None:
    records = {"there.example": "v=DMARC1; p=none; np=reject", ("a.there.example", "A"): DOWN}
    assert judge(records, "a.there.example").result == "temperror"


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("there.example", "temperror"),
        ("mail.there.example", "temperror"),
        ("other.example", "fail"),
        ("there.example.net", "fail"),
    ],
)
def test_a_check_that_failed_for_now_counts_only_where_it_would_be_aligned(
    domain: str, expected: str
) -> None:
    records = {"there.example": REJECT}
    spf, signatures = mailfrom(domain, "temperror"), [signed(domain, "temperror")]
    assert judge(records, spf=spf).result == expected
    assert judge(records, signatures=signatures).result == expected
    assert judge(records, signatures=[signed("x.example"), *signatures]).result == expected


def test_a_check_that_failed_for_now_is_strictly_aligned_or_not() -> None:
    records = {"there.example": f"{REJECT}; aspf=s"}
    assert judge(records, spf=mailfrom("a.there.example", "temperror")).result == "fail"
    assert judge(records, spf=mailfrom("there.example", "temperror")).result == "temperror"


def test_a_pass_is_a_pass_whatever_else_failed_for_now() -> None:
    spf, signatures = mailfrom("there.example", "temperror"), [signed("there.example")]
    assert judge({"there.example": REJECT}, spf=spf, signatures=signatures).result == "pass"


def test_what_is_of_the_same_name_needs_no_walk_that_could_fail() -> None:
    records = {"there.example": f"{REJECT}; psd=n", "example": DOWN}
    assert judge(records, spf=mailfrom("there.example")).result == "pass"


@pytest.mark.parametrize("domain", ["other.example", "mail.other.example", "nothere.example"])
def test_the_name_servers_of_a_foreign_domain_save_nobody_from_a_rejection(domain: str) -> None:
    records = {"there.example": REJECT, domain: DOWN}
    spf, signatures = mailfrom(domain), [signed(domain)]
    assert judge(records, spf=spf).result == "fail"
    assert judge(records, signatures=signatures).result == "fail"


def test_where_nobody_can_say_of_which_organisation_an_identity_is_another_may_pass() -> None:
    records = {"there.example": REJECT, "mail.there.example": DOWN}
    signatures = [signed("mail.there.example")]
    assert judge(records, signatures=signatures).result == "temperror"
    assert judge(records, signatures=[*signatures, signed("there.example")]).result == "pass"


def judged_slowly(
    records: Records, authors: Sequence[str], pause: float = 10**6
) -> tuple[Dmarc, float]:
    """Judge where questions about a name with "slow" in it take `pause` seconds each.

    Return also how long it took.
    """
    zone = Zone(table(records))

    async def main(loop: chasquid.Loop) -> tuple[Dmarc, float]:
        async def ask(name: str, kind: str) -> chasquid.Answer:
            if "slow" in name:
                await loop.sleep(pause)
            return await zone.ask(name, kind)

        names = chasquid.Names(loop, ask)
        start = loop.clock.monotonic()
        task = loop.spawn(chasquid.check_dmarc(names, loop, authors, NO_SPF, []), "dmarc")
        while not task.done:
            await turns(loop)
            loop.clock.now += 0.5  # type: ignore[attr-defined]
        return await task.join(), loop.clock.monotonic() - start

    return run(main, clock=FakeClock())


@pytest.mark.parametrize("pause", [4, 9, 10**6])
def test_after_20_seconds_it_is_given_up(pause: int) -> None:
    author = "a.b.c.d.e.f.slow.example"
    found, seconds = judged_slowly({author: REJECT}, [author], pause)
    assert found == Dmarc("temperror", author)
    assert 14 <= seconds <= 22


# --- the server ---

SPF_PASS = ["v=spf1 ip4:127.0.0.1 -all"]
LETTER = b"From: Eva <eva@there.example>\r\nSubject: hello\r\n\r\nIt works.\r\n"
SENDER = "bounces@mailer.example"  # whose domain has nothing to do with the author's


def ask(records: Records) -> Callable[[str, str], Any]:
    return Zone(table(records)).ask


def verdict(message: bytes) -> tuple[str, str, str]:
    """Return result, policy and domain that our only Authentication-Results says (RFC 8601)."""
    [field] = parsed(message).get_all("Authentication-Results", [])
    server, *infos = re.split(r";\s*", field)
    assert server == HOST
    [info] = [info for info in infos if info.startswith("dmarc=")]
    match = re.fullmatch(r"dmarc=([a-z]+)( \(p=([a-z]+)\))?( header\.from=([a-z0-9.-]+))?", info)
    assert match, info
    return match[1], match[3] or "", match[5] or ""


def parsed(message: bytes) -> Message:
    return email.message_from_bytes(message)


@pytest.mark.parametrize("settings", [{}, {"dmarc_policy": "enforce"}])
def test_reject_refuses_the_message_in_one_line(serve: Serve, settings: dict[str, str]) -> None:
    server = serve(ask=ask({"there.example": REJECT}), **settings)
    with greeted(server) as wire:
        reply = send(wire, LETTER, sender=SENDER)
        assert reply.startswith("550 5.7.1 ")
        assert "DMARC" in reply and "there.example" in reply
        assert "\n" not in reply
        assert wire.ask("RCPT TO:<ana@here.example>").startswith("503 ")
        assert wire.ask("MAIL FROM:<>").startswith("250 ")
    assert server.mail("ana") == []
    assert not server.maildir("ana").exists()
    assert server.daemon.log.counters["dmarc", "fail"] == 1
    assert "spf=none dkim=none dmarc=fail" in server.mail_log


def test_quarantine_goes_into_a_subfolder_that_is_a_maildir(serve: Serve) -> None:
    server = serve(ask=ask({"there.example": "v=DMARC1; p=quarantine"}))
    with greeted(server) as wire:
        assert send(wire, LETTER, sender=SENDER).startswith("250 ")
    [message] = server.junk()
    assert verdict(message) == ("fail", "quarantine", "there.example")
    assert message.endswith(b"It works.\n")
    folder = server.maildir("ana") / ".Junk"
    assert {"cur", "new", "tmp"} <= {path.name for path in folder.iterdir() if path.is_dir()}
    assert list((folder / "tmp").iterdir()) == []
    files = {path for path in server.maildir("ana").rglob("*") if path.is_file()}
    assert files == {folder / "maildirfolder", *(folder / "new").iterdir()}
    assert server.daemon.log.counters["dmarc", "fail"] == 1


def test_a_large_message_goes_there_too(serve: Serve) -> None:
    server = serve(ask=ask({"there.example": "v=DMARC1; p=quarantine"}))
    data = LETTER + b"All of it.\r\n" * 20_000
    with greeted(server) as wire:
        assert send(wire, data, sender=SENDER).startswith("250 ")
    [message] = server.junk()
    assert message.endswith(LETTER.replace(b"\r", b"") + b"All of it.\n" * 20_000)


def test_what_follows_into_the_inbox_is_not_junk(serve: Serve) -> None:
    server = serve(ask=ask({"there.example": "v=DMARC1; p=quarantine"}))
    with greeted(server) as wire:
        assert send(wire, LETTER, sender=SENDER).startswith("250 ")
        other = LETTER.replace(b"there", b"other")
        assert send(wire, other, sender=SENDER).startswith("250 ")
    assert len(server.junk()) == 1
    [message] = server.mail("ana")
    assert verdict(message) == ("none", "", "other.example")


def test_that_it_is_junk_survives_a_restart_of_the_queue(tmp_path: Path) -> None:
    clock = RunningClock()
    server = Server(tmp_path, ask=ask({"there.example": "v=DMARC1; p=quarantine"}), clock=clock)
    obstacle = server.data_dir / "mail"
    server.data_dir.mkdir()
    obstacle.write_text("in the way")
    with server:
        with greeted(server) as wire:
            assert send(wire, LETTER, sender=SENDER).startswith("250 ")
        server.wait_for_attempts()
    obstacle.unlink()
    with server:
        clock.advance(300)
        server.settle()
        assert len(server.junk()) == 1
        assert server.mail("ana") == []


@pytest.mark.parametrize("policy", ["reject", "quarantine"])
def test_a_policy_that_is_only_reported_keeps_nothing_out_of_the_inbox(
    serve: Serve, policy: str
) -> None:
    record = f"v=DMARC1; p={policy}"
    server = serve(ask=ask({"there.example": record}), dmarc_policy="report")
    with greeted(server) as wire:
        assert send(wire, LETTER, sender=SENDER).startswith("250 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("fail", policy, "there.example")
    assert not (server.maildir("ana") / ".Junk").exists()
    assert server.daemon.log.counters["dmarc", "fail"] == 1


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("v=DMARC1; p=none", ("fail", "none", "there.example")),
        ("v=DMARC1; p=quarantine; t=y", ("fail", "none", "there.example")),
        ("v=spf1 -all", ("none", "", "there.example")),
        (DOWN, ("temperror", "none", "there.example")),
    ],
)
def test_all_else_goes_into_the_inbox(
    serve: Serve, record: Any, expected: tuple[str, str, str]
) -> None:
    server = serve(ask=ask({"there.example": record}))
    with greeted(server) as wire:
        assert send(wire, LETTER, sender=SENDER).startswith("250 ")
    [message] = server.mail("ana")
    assert verdict(message) == expected
    assert server.daemon.log.counters["dmarc", expected[0]] == 1
    assert f"dmarc={expected[0]}" in server.mail_log


def test_spf_of_the_same_organisation_lets_a_message_pass(serve: Serve) -> None:
    server = serve(ask=ask({"there.example": REJECT, ("mail.there.example", "TXT"): SPF_PASS}))
    with greeted(server) as wire:
        assert send(wire, LETTER, sender="bounces@mail.there.example").startswith("250 ")
        assert send(wire, LETTER, sender=SENDER).startswith("550 5.7.1 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("pass", "reject", "there.example")
    assert server.daemon.log.counters["dmarc", "pass"] == 1
    assert server.daemon.log.counters["dmarc", "fail"] == 1


def test_a_signature_of_the_same_organisation_lets_a_message_pass(serve: Serve) -> None:
    key = chasquid.DkimKey("mail.there.example", "s", chasquid.new_key("ed25519"))
    server = serve(ask=ask({"there.example": REJECT, (key.name, "TXT"): key.record}))
    header, _, body = LETTER.partition(b"\r\n\r\n")
    signature = chasquid.sign([key], header + b"\r\n", [body], time.time())
    with greeted(server) as wire:
        assert send(wire, signature + LETTER, sender=SENDER).startswith("250 ")
        changed = signature + LETTER.replace(b"works", b"fails")
        assert send(wire, changed, sender=SENDER).startswith("550 5.7.1 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("pass", "reject", "there.example")


def test_for_a_notification_the_name_in_helo_speaks(serve: Serve) -> None:
    server = serve(ask=ask({"client.example": REJECT, ("client.example", "TXT"): SPF_PASS}))
    letter = LETTER.replace(b"there.example", b"client.example")
    with greeted(server) as wire:  # it says EHLO client.example
        assert send(wire, letter, sender="").startswith("250 ")
        assert send(wire, letter, sender=SENDER).startswith("550 5.7.1 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("pass", "reject", "client.example")


def test_what_our_users_send_is_not_judged(serve: Serve) -> None:
    zone = Zone(table({"there.example": REJECT}))
    server = serve(ask=zone.ask)
    with logged_in(server) as wire:
        assert send(wire, LETTER, sender="ana@here.example").startswith("250 ")
        twice = b"From: eva@there.example\r\n" + LETTER
        assert send(wire, twice, sender="ana@here.example").startswith("250 ")
    for message in server.mail("ana"):
        assert "Authentication-Results" not in parsed(message)
    assert len(server.mail("ana")) == 2
    # which certificates it needs is asked for at the start
    assert set(zone.asked) <= {("here.example", "MX")}
    assert not any(name[0] == "dmarc" for name in server.daemon.log.counters)


def test_a_second_from_field_is_refused(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        for second in (b"From: ben@other.example\r\n", b"fRoM : ben@other.example\r\n"):
            assert send(wire, second + LETTER, sender=SENDER).startswith("554 5.6.0 ")
    assert server.mail("ana") == []


def test_without_a_from_field_there_is_no_author_to_ask_about(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        assert send(wire, b"Subject: hello\r\n\r\nIt works.\r\n", sender=SENDER).startswith("250 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("none", "", "")


@pytest.mark.parametrize(
    "field",
    [
        "From: eva@THERE.Example",
        "From: eva@there.example.",
        "FROM: (a comment) eva (another)@there.example",
        "From: ben@other.example, Eva <eva@there.example>",
        "From: ben@other.example,\r\n\tEva <eva@there.example>",
        "From: friends: ben@other.example, eva@there.example;",
        "From: <ben@other.example> <eva@there.example>",
        "From: <eva@there.example> <ben@other.example>",
        'From: "ben@other.example" <eva@there.example>',
        "From: (ben@other.example <eva@there.example>",
        'From: "ben@other.example <eva@there.example>',
        "From: eva@there.example\r\n ",
        'From: "eva@there.example"',
        "From: =?utf-8?q?Eva?= <eva@there.example>",
    ],
)
def test_however_from_is_written_its_author_is_found(serve: Serve, field: str) -> None:
    server = serve(ask=ask({"there.example": REJECT}))
    with greeted(server) as wire:
        data = f"{field}\r\nSubject: hello\r\n\r\nIt works.\r\n".encode()
        assert send(wire, data, sender=SENDER).startswith("550 5.7.1 ")
    assert server.mail("ana") == []


@pytest.mark.parametrize("domain", ["bücher.example", "xn--bcher-kva.example", "BÜCHER.example"])
def test_an_international_author_is_asked_about_in_a_labels(serve: Serve, domain: str) -> None:
    server = serve(ask=ask({"xn--bcher-kva.example": REJECT}), dmarc_policy="report")
    with greeted(server) as wire:
        data = f"From: eva@{domain}\r\n\r\nIt works.\r\n".encode()
        assert send(wire, data, sender=SENDER).startswith("250 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("fail", "reject", "xn--bcher-kva.example")


@pytest.mark.parametrize(
    "author",
    ["eva", "eva@", "@", "", "eva@a..b", "<>", "eva@..", "friends:;"],
)
def test_a_message_whose_author_cannot_be_read_is_junk(serve: Serve, author: str) -> None:
    server = serve()
    with greeted(server) as wire:
        data = f"From: {author}\r\n\r\nIt works.\r\n".encode()
        assert send(wire, data, sender=SENDER).startswith("250 ")
    [message] = server.junk()
    assert verdict(message) == ("permerror", "", "")
    assert server.daemon.log.counters["dmarc", "permerror"] == 1


def test_a_notification_whose_author_cannot_be_read_is_no_junk(serve: Serve) -> None:
    server = serve()
    with greeted(server) as wire:
        data = b"From: Mail Delivery System\r\n\r\nIt failed.\r\n"
        assert send(wire, data, sender="").startswith("250 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("permerror", "", "")


def test_that_it_cannot_be_read_is_only_reported_where_that_is_set(serve: Serve) -> None:
    server = serve(dmarc_policy="report")
    with greeted(server) as wire:
        assert send(wire, b"From: eva\r\n\r\nIt works.\r\n", sender=SENDER).startswith("250 ")
    [message] = server.mail("ana")
    assert verdict(message) == ("permerror", "", "")


@pytest.mark.parametrize(
    ("count", "padding", "reply"),
    [
        (10, 0, "250 2.0.0 "),
        (11, 0, "554 5.6.0 "),
        (1, 8000, "250 2.0.0 "),
        (1, 9000, "554 5.6.0 "),
    ],
)
def test_a_from_field_without_end_is_refused(
    serve: Serve, count: int, padding: int, reply: str
) -> None:
    server = serve()
    authors = ",\r\n ".join(f"eva@n{number}.example" for number in range(count))
    data = f"From: {'x' * padding} <a@n0.example>, {authors}\r\n\r\nIt works.\r\n".encode()
    with greeted(server) as wire:
        assert send(wire, data, sender=SENDER).startswith(reply)
    assert len(server.mail("ana")) == (reply[0] == "2")


def test_a_check_that_breaks_by_a_fault_of_ours_lets_nothing_in(tmp_path: Path) -> None:
    server = Server(tmp_path, ask=ask({"there.example": ZeroDivisionError("a fault")}))
    server.start()
    try:
        with greeted(server) as wire:
            reply = "451 4.3.0 Local error in processing: a check has failed by a fault of ours"
            assert send(wire, LETTER, sender=SENDER) == reply
            assert wire.ask("NOOP").startswith("250 ")
        assert server.mail("ana") == []
        assert "ZeroDivisionError: a fault" in server.log
        assert server.daemon.log.counters["crashes",] == 1
    finally:
        server.stop()
