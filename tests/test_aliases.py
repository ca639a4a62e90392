# SPDX-License-Identifier: Apache-2.0
"""Room ALIASES: the file and what an address stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import searched

import chasquid

Destination = chasquid.Destination
HERE = "here.example"


def to(address: str, *via: str) -> chasquid.Destination:
    return Destination("address", address, via)


def parse(text: str | bytes) -> dict[str, tuple[chasquid.Destination, ...]]:
    data = text.encode() if isinstance(text, str) else text
    return chasquid.parse_aliases(data, "aliases", HERE)


def aliases(
    text: str, users: str = "", separators: str = "+", drops: str = ".", **others: str
) -> chasquid.Aliases:
    """Aliases of here.example, and of other domains: `there="…"` is there.example."""
    tables = {HERE: parse(text)}
    for name, other in others.items():
        domain = f"{name}.example"
        tables[domain] = chasquid.parse_aliases(other.encode(), "aliases", domain)
    known = {tuple(user.split("@")) if "@" in user else (user, HERE) for user in users.split()}
    return chasquid.Aliases(tables, lambda user, at: (user, at) in known, separators, drops)


def expand(table: chasquid.Aliases, address: str) -> list[str]:
    return [destination.value for destination in table.expand(address)]


# --- The file -------------------------------------------------------------------------------


def test_a_line_names_its_destinations():
    assert parse(
        "# comment\r\n"
        "\n"
        "pepe: jose\n"
        "  JOSE : a@X.example ,b@y.example,\n"
        "ñandú: c@xn--aca-6ma.example\n"
        "pipe: | /bin/cat -n, x\n"
        "far: d@z.example via mx1.z.example/[2001:db8::1]:2525/192.0.2.1:24\n"
        "*: postmaster\n"
        "both: e via m, f\n"
    ) == {
        "pepe": (to("jose@here.example"),),
        "jose": (to("a@x.example"), to("b@y.example")),
        "ñandú": (to("c@ñaca.example"),),
        "pipe": (Destination("pipe", "/bin/cat -n, x"),),
        "far": (to("d@z.example", "mx1.z.example", "[2001:db8::1]:2525", "192.0.2.1:24"),),
        "*": (to("postmaster@here.example"),),
        "both": (to("e@here.example", "m"), to("f@here.example")),
    }


def test_a_later_line_overrides_an_earlier_one():
    assert parse("a: b\nA: c") == {"a": (to("c@here.example"),)}


@pytest.mark.parametrize(
    "line",
    [
        "alone", "a:", ": b", "a: ,", "a@here.example: b", "a: |", "a: b c", "a: b via",
        "a: b via c d", "a: b via c:x", "a: b@", "a: @b", "a: b@ñ..x", "a b: c", "a: b via /",
        b"\xff: a",
    ],
)  # fmt: skip
def test_a_malformed_line_is_refused_with_its_number(line):
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(chasquid.ConfigError, match=r"^aliases:3: ") as caught:
        parse(b"# comment\n\n" + raw + b"\nfine: x\n")
    assert "\n" not in str(caught.value)


@searched
@given(st.binary(max_size=60))
def test_any_octets_are_read_or_refused(data):
    try:
        table = parse(data)
    except chasquid.ConfigError as error:
        assert 1 <= error.line <= data.count(b"\n") + 1
        return
    assert all(table.values())


LOCALS = st.sampled_from(["ann", "bob", "c.d", "e+f", "ñandú", "*"])
HOSTS = st.sampled_from(["mx.example", "192.0.2.1:25", "[2001:db8::1]:26"])
DESTINATIONS = st.builds(
    lambda local, domain, via: to(f"{local}@{domain}", *via),
    LOCALS,
    st.sampled_from([HERE, "away.example", "ñaca.example"]),
    st.lists(HOSTS, max_size=2),
)
RIGHTS = st.lists(DESTINATIONS, min_size=1, max_size=3).map(tuple) | st.sampled_from(
    [(Destination("pipe", "/bin/cat"),), (Destination("pipe", "/bin/sh -c 'a, b: c'"),)]
)


def written(destinations: tuple[chasquid.Destination, ...]) -> str:
    return ", ".join(
        f"| {destination.value}"
        if destination.kind == "pipe"
        else destination.value + (f" via {'/'.join(destination.via)}" if destination.via else "")
        for destination in destinations
    )


@searched
@given(st.dictionaries(LOCALS, RIGHTS, max_size=5))
def test_what_is_written_is_read_back(table):
    lines = [f"{name}: {written(destinations)}" for name, destinations in table.items()]
    assert parse("\n".join(lines)) == table


def test_aliases_are_read_from_their_directory(tmp_path):
    assert chasquid.load_aliases(str(tmp_path), HERE) == {}
    (tmp_path / "aliases").write_text("a: b")
    assert chasquid.load_aliases(str(tmp_path), HERE) == {"a": (to("b@here.example"),)}
    (tmp_path / "aliases").write_text("a b")
    with pytest.raises(chasquid.ConfigError) as caught:
        chasquid.load_aliases(str(tmp_path), HERE)
    assert (caught.value.path, caught.value.line) == (str(tmp_path / "aliases"), 1)


# --- Expansion ------------------------------------------------------------------------------


def test_an_address_that_is_not_ours_stands_for_itself():
    assert expand(aliases("a: b"), "A.b+c@Away.example") == ["A.b+c@Away.example"]


def test_a_user_stands_for_the_mailbox_without_suffix_drops_and_case():
    table = aliases("", users="ab")
    for address in ("ab", "AB", "a.b", "a.b+c", "ab+c+d", ".a.b.+x"):
        assert expand(table, f"{address}@here.example") == ["ab@here.example"]


def test_names_of_aliases_are_compared_without_drops_and_with_their_suffix_first():
    table = aliases(
        "a.b: dotted\na.b+c: suffixed\nab: plain\nre.cu-zzz: eve",
        users="dotted suffixed plain eve", separators="+-",
    )  # fmt: skip
    assert expand(table, "a.b@here.example") == ["plain@here.example"]  # the later line
    assert expand(table, "a.b+c@here.example") == ["suffixed@here.example"]
    assert expand(table, "ab+c@here.example") == ["suffixed@here.example"]
    assert expand(table, "a.b+d@here.example") == ["plain@here.example"]
    assert expand(table, "r.ecu-zzz@here.example") == ["eve@here.example"]
    with pytest.raises(chasquid.NoSuchUser):  # drop characters count in a suffix
        table.expand("recu-zz.z@here.example")


@pytest.mark.parametrize(
    ("text", "wins"),
    [("p.q: a\npq: b", "b"), ("pq: b\np.q: a", "a"), ("pq: b\np.q: a\npq: c", "c")],
)
def test_of_names_that_are_the_same_the_later_line_wins(text, wins):
    table = aliases(text, users="a b c")
    assert expand(table, "p.q@here.example") == [f"{wins}@here.example"]
    assert expand(table, "pq@here.example") == [f"{wins}@here.example"]


def test_several_separators_and_no_drop_characters():
    table = aliases("", users="a.b ab", separators="+-", drops="")
    assert expand(table, "a.b-x+y@here.example") == ["a.b@here.example"]
    assert expand(table, "ab+x-y@here.example") == ["ab@here.example"]


def test_aliases_win_over_users_and_users_over_the_catch_all():
    table = aliases("ann: bob\n*: eve", users="ann bob eve")
    assert expand(table, "ann@here.example") == ["bob@here.example"]
    assert expand(table, "eve@here.example") == ["eve@here.example"]
    assert expand(table, "who@here.example") == ["eve@here.example"]


def test_the_name_of_the_catch_all_is_no_address():
    with pytest.raises(chasquid.NoSuchUser):
        aliases("ann: bob", users="ann").expand("*@here.example")


def test_an_unknown_user_is_told_as_such():
    with pytest.raises(chasquid.NoSuchUser, match="who@here.example"):
        aliases("a: b").expand("who@here.example")


@pytest.mark.parametrize("user", ["", "a b", "\u2028ñ", "ñ\x00"])
def test_a_name_that_cannot_be_a_user_is_unknown(user):
    with pytest.raises(chasquid.NoSuchUser):
        aliases("*: ann", users="ann").expand(f"{user}@here.example")


def test_aliases_lead_on_through_aliases_and_domains():
    table = aliases("a: b, c@there.example", users="b d", there="c: d@here.example, e@away.example")
    assert expand(table, "a@here.example") == [
        "b@here.example",
        "d@here.example",
        "e@away.example",
    ]


def test_each_final_recipient_comes_once():
    table = aliases("all: x, y, x\nx: z@away.example\ny: z@away.example, w@away.example")
    assert expand(table, "all@here.example") == ["z@away.example", "w@away.example"]


@pytest.mark.parametrize("target", ["ann", "Ann", "ANN@Here.Example", "a.nn", "ann+box"])
def test_an_alias_that_names_its_own_mailbox_keeps_a_copy_there(target):
    table = aliases(f"ann: {target}, copy@away.example", users="ann")
    assert expand(table, "ann@here.example") == ["ann@here.example", "copy@away.example"]


def test_an_alias_that_names_its_own_mailbox_does_so_under_each_spelling():
    table = aliases("ann: ann, copy@away.example", users="ann")
    assert expand(table, "A.nn+x@here.example") == ["ann@here.example", "copy@away.example"]


def test_pipes_and_addresses_through_servers_are_final():
    table = aliases("a: | /bin/cat\nb: a via mx.example\nc: a, b", users="a")
    assert table.expand("c@here.example") == [
        Destination("pipe", "/bin/cat"),
        to("a@here.example", "mx.example"),
    ]


def test_unknown_users_behind_an_alias_are_left_out_and_named():
    unknown = []
    table = aliases("a: gone, b\nc: gone, lost\nd: c, a", users="b")
    assert table.expand("a@here.example", unknown=unknown) == [to("b@here.example")]
    assert unknown == ["gone@here.example"]
    unknown.clear()
    assert table.expand("d@here.example", unknown=unknown) == [to("b@here.example")]
    assert unknown == ["gone@here.example", "lost@here.example", "c@here.example"]


@pytest.mark.parametrize("text", ["a: gone", "a: gone, lost", "a: c\nc: gone", "a: a", "*: gone"])
def test_an_alias_that_leads_to_nobody_is_unknown(text):
    with pytest.raises(chasquid.NoSuchUser, match="leads to nobody$|no user or alias a@") as caught:
        aliases(text, users="b").expand("a@here.example")
    assert "gone" not in str(caught.value), "strangers do not hear whom it names"
    assert caught.value.unknown or text == "a: a"


@pytest.mark.parametrize("asked", ["p.q", "pq", "P.q+x", "pq+x"])
def test_a_user_whose_name_has_a_drop_character_keeps_a_copy_however_asked_for(asked):
    table = aliases("p.q: p.q, copy@away.example", users="p.q")
    assert expand(table, f"{asked}@here.example") == ["p.q@here.example", "copy@away.example"]


def test_a_name_on_its_own_right_side_that_is_no_user_is_named():
    unknown = []
    aliases("ann: ann, b", users="b").expand("ann@here.example", unknown=unknown)
    assert unknown == ["ann@here.example"]


def test_localhost_is_always_ours():
    with pytest.raises(chasquid.NoSuchUser):
        aliases("a: b", users="b").expand("b@localhost")


def test_what_is_wrong_with_aliases_is_found():
    text = (
        "dead: gone\nsome: gone, b\nhidden: b\nkept: kept, b\nl1: l2\nl2: l1\n"
        "p: | /no/such/program x\nq: | cat\nr: | 'x\nh.2: b\n"
    )
    users = ["b", "hidden", "kept", "h.2", "free"]
    table = aliases(text, users=" ".join(users))
    assert [tuple(finding) for finding in table.findings(HERE, users, everybody=True)] == [
        ("dead@here.example leads to nobody: there is no user or alias gone@here.example", True),
        ("some@here.example: there is no user or alias gone@here.example; the others get its mail",
         True),
        ("l1@here.example: the aliases behind l2@here.example lead in a circle, or deeper than "
         "10 steps", True),
        ("l2@here.example: the aliases behind l1@here.example lead in a circle, or deeper than "
         "10 steps", True),
        ("p@here.example: the program /no/such/program is not there, or not executable", True),
        ('r@here.example: the pipe "\'x" is malformed: No closing quotation', True),
        ("hidden@here.example: an alias hides this user, who can log in but gets no mail", False),
        ("h.2@here.example: an alias hides this user, who can log in but gets no mail", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("*: gone", " leads to nobody: there is no user or alias gone@here.example"),
        ("*: gone, *@away.example",
         ": there is no user or alias gone@here.example; the others get its mail"),
        ("*: | /no/such", ": the program /no/such is not there, or not executable"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_catch_all_is_found(text, finding):
    found = list(aliases(text).findings(HERE, [], everybody=True))
    assert found == [(f"*@here.example{finding}", True)]
    assert not list(aliases("*: *@away.example, b", users="b").findings(HERE, ["b"], True))


def test_whom_others_may_know_is_not_reported():
    table = aliases("dead: gone\nsome: gone, b\nl1: l1x\nl1x: l1\n*: gone", users="b")
    found = list(table.findings(HERE, ["b"], everybody=False))
    assert [each.text.partition(":")[0] for each in found] == [
        "l1@here.example",
        "l1x@here.example",
    ]


@pytest.mark.parametrize(
    ("right", "via"),
    [("b@x via h1 / h2", ("h1", "h2")), ("b@x  via  h1/h2 /h3:26", ("h1", "h2", "h3:26"))],
)
def test_blanks_around_the_slash_of_via_mean_nothing(right, via):
    assert chasquid.parse_destinations(right, HERE) == (to("b@x", *via),)


@pytest.mark.parametrize("right", ["b@x via h1//h2", "b@x via /h", "b@x via h1 h2", "b@x via h1/ "])
def test_an_empty_host_behind_via_is_refused(right):
    with pytest.raises(ValueError, match="expected "):
        chasquid.parse_destinations(right, HERE)


def test_a_star_on_the_right_is_the_name_that_was_asked_for():
    table = aliases("*: *@away.example\nann: *@there.example", there="*: *@far.example")
    assert expand(table, "who@here.example") == ["who@away.example"]
    assert expand(table, "ann@here.example") == ["ann@far.example"]


def test_the_postmaster_of_the_host_is_that_of_a_domain_that_has_one():
    none = aliases("a: b", there="c: d")
    assert none.postmaster_domain("mx.example") == HERE
    assert none.postmaster_domain("there.example") == "there.example"
    one = aliases("a: b", there="postmaster: d")
    assert one.postmaster_domain("mx.example") == "there.example"
    both = aliases("", users="postmaster", there="postmaster: d")
    assert both.postmaster_domain("there.example") == "there.example"
    assert both.postmaster_domain("mx.example") == HERE
    assert aliases("*: a", there="b: c").postmaster_domain("mx.example") == HERE


@pytest.mark.parametrize("text", ["a: b\nb: a", "a: b\nb: c\nc: d\nd: b, x@away.example"])
def test_aliases_that_go_in_a_circle_are_refused_or_end(text):
    with pytest.raises(chasquid.AliasLoop):
        aliases(text).expand("a@here.example")


def test_a_catch_all_that_leads_to_nobody_is_refused():
    with pytest.raises(chasquid.NoSuchUser):
        aliases("*: x\na: y\n").expand("a@here.example")


def test_a_catch_all_between_two_domains_that_never_ends_is_refused():
    with pytest.raises(chasquid.NoSuchUser):
        aliases("*: *@there.example", there="*: *@here.example").expand("who@here.example")


def chain(steps: int) -> str:
    return "".join(f"n{number}: n{number + 1}\n" for number in range(steps))


def test_ten_steps_are_taken_and_eleven_refused():
    limit = chasquid.ALIAS_DEPTH_LIMIT
    assert expand(aliases(chain(limit), users=f"n{limit}"), "n0@here.example") == [
        f"n{limit}@here.example"
    ]
    with pytest.raises(chasquid.AliasLoop):
        aliases(chain(limit + 1), users=f"n{limit + 1}").expand("n0@here.example")


def test_aliases_that_meet_again_and_again_are_expanded_once():
    """Ten names on each of four steps: ten thousand ways to ten mailboxes."""
    rows = [
        f"s{step}x{one}: " + ", ".join(f"s{step + 1}x{next}" for next in range(10))
        for step in range(4)
        for one in range(10)
    ]
    looked_up = []

    def exists(user: str, domain: str) -> bool:
        looked_up.append(user)
        assert len(looked_up) < 2000, "each name is expanded once, whatever leads to it"
        return user.startswith("s4")

    table = chasquid.Aliases({HERE: parse("\n".join(rows))}, exists, "+", ".")
    assert expand(table, "s0x0@here.example") == [f"s4x{n}@here.example" for n in range(10)]


def names_that_lead_somewhere(table, users) -> set[str]:
    """By another way than the module's: what leads to a user, again and again."""
    alive = {name for name in users if name not in table}
    while True:
        more = set()
        for name in "abcdef":
            right = table.get(name, [] if name in users else table.get("*", []))
            for target in right:
                target = name if target == "*" else target
                if target in alive or (target == name and name in users):
                    more.add(name)
        if more <= alive:
            return alive
        alive |= more


@searched
@given(
    st.dictionaries(
        st.sampled_from("abcd*"), st.lists(st.sampled_from("abcdef*"), min_size=1, max_size=3)
    ),
    st.sets(st.sampled_from("abcdef")),
    st.sampled_from("abcdef"),
)
def test_every_expansion_ends_and_names_each_recipient_once(table, users, user):
    text = "\n".join(f"{name}: {', '.join(right)}" for name, right in table.items())
    try:
        found = aliases(text, users=" ".join(users)).expand(f"{user}@here.example")
    except chasquid.NoSuchUser:
        assert user not in names_that_lead_somewhere(table, users)
        return
    except chasquid.AliasLoop:
        return
    assert found
    assert len(found) == len(set(found))
