"""Keys, patterns, servers and the order of the search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.mapping import InMemory
from willi_lib.config import StaticSettings
from willi_lib.mappings.open import Static
from willi_lib.routing.keys import fold_pattern, keys_of
from willi_lib.routing.route import (
    Answer,
    LookupFailed,
    Mapping,
    NoRoute,
    Policy,
    Route,
    Server,
    parse_servers,
    parse_tls_verify,
)
from willi_lib.routing.search import Step, find_route


class Table(InMemory):
    """A mapping that remembers what it was asked."""

    def __init__(self, name: str, routes: dict[str, Route]) -> None:
        self.name = name
        self.routes = routes
        self.asked: list[str] = []

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        for key in keys:
            self.asked.append(key)
            yield Answer(self.routes.get(key))


class Broken(InMemory):
    """A mapping that cannot answer."""

    name = "mysql:broken"

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        yield from ()
        raise LookupFailed("no connection", logged=True)


def to(server: str) -> Route:
    return Route(parse_servers(server))


REST = StaticSettings("rest", Policy(), parse_servers("mx"))


def steps_of(mappings: Sequence[Mapping], recipient: str, delimiter: str = "") -> list[Step]:
    """What an observer of the search sees."""
    steps: list[Step] = []
    with suppress(NoRoute, LookupFailed):
        find_route(mappings, recipient, delimiter, steps.append)
    return steps


# The search


def test_an_address_beats_its_domain_within_one_mapping():
    table = Table("t", {"ann@b.example": to("mx1"), "b.example": to("mx2")})
    assert find_route([table], "ann@b.example") == to("mx1")
    assert find_route([table], "bob@b.example") == to("mx2")


def test_an_earlier_mappings_domain_beats_a_later_ones_address():
    first = Table("first", {"b.example": to("mx1")})
    second = Table("second", {"ann@b.example": to("mx2")})
    assert find_route([first, second], "ann@b.example") == to("mx1")
    assert second.asked == []


def test_all_keys_are_asked_in_order_before_the_next_mapping_is():
    first, second = Table("first", {}), Table("second", {"b.example": to("mx")})
    assert steps_of([first, second], "Ann+X@B.example", "+") == [
        Step("first", "ann+x@b.example", False, None),
        Step("first", "ann@b.example", False, None),
        Step("first", "b.example", True, None),
        Step("second", "ann+x@b.example", False, None),
        Step("second", "ann@b.example", False, None),
        Step("second", "b.example", True, to("mx")),
    ]


def test_nothing_is_asked_after_the_first_hit():
    table = Table("t", {"ann@b.example": to("mx")})
    assert steps_of([table, Broken()], "ann@b.example") == [Step("t", "ann@b.example", True, to("mx"))]


def test_a_failed_mapping_ends_the_search_before_the_catch_all():
    mappings: list[Mapping] = [Table("t", {}), Broken(), Static(REST)]
    with pytest.raises(LookupFailed) as failure:
        find_route(mappings, "ann@b.example")
    assert str(failure.value) == "mysql:broken: no connection"
    assert failure.value.logged
    (last,) = steps_of(mappings, "ann@b.example")[2:]
    assert (last.mapping, last.key, last.route, str(last.failure)) == (
        "mysql:broken", "ann@b.example", None, "no connection",
    )  # fmt: skip


def test_a_failure_without_a_text_is_a_failure_all_the_same():
    class Mute(Broken):
        def find(self, keys: Sequence[str]) -> Iterator[Answer]:
            yield from ()
            raise LookupFailed

    with pytest.raises(LookupFailed):
        find_route([Mute(), Static(REST)], "ann@b.example")


def test_a_hit_before_a_broken_mapping_counts():
    assert find_route([Table("t", {"b.example": to("mx")}), Broken()], "ann@b.example") == to("mx")


@pytest.mark.parametrize("mappings", [[], [Table("t", {"a.example": to("mx")})]])
def test_no_match_anywhere_is_no_route(mappings):
    with pytest.raises(NoRoute):
        find_route(mappings, "ann@b.example")


@pytest.mark.parametrize("recipient", ["ann@b.example", "postmaster", '"a b"@[192.0.2.1]', ""])
def test_a_static_mapping_matches_everything_and_signs_its_route(recipient):
    route = find_route([Static(REST)], recipient)
    assert route == to("mx")
    assert route.mapping == "static:rest"


# Keys


@pytest.mark.parametrize(
    ("recipient", "keys"),
    [
        ("ann@b.example", ("ann@b.example", "b.example")),
        ("Ann@B.EXAMPLE", ("ann@b.example", "b.example")),
        ("ann@b.example.", ("ann@b.example", "b.example")),
        ("postmaster", ("postmaster",)),
        ("Postmaster", ("postmaster",)),
        # A capital sigma is one letter wherever it stands; a small final one is another.
        ("ann@ΟΔΟΣ", ("ann@xn--pxavbq", "xn--pxavbq")),
        ("ann@Οδοσ", ("ann@xn--pxavbq", "xn--pxavbq")),
        ("ann@mx.ΟΔΟΣ.ΟΔΟΣ.", ("ann@mx.xn--pxavbq.xn--pxavbq", "mx.xn--pxavbq.xn--pxavbq")),
        ("ann@οδος", ("ann@xn--pxavbm", "xn--pxavbm")),
        # Joiners, and letters that this Python may not know yet
        ("ann@\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.ir", ("ann@xn--mgba3gch31f060k.ir", "xn--mgba3gch31f060k.ir")),
        ("\u0936\u094d\u200d\u0930@\U0001faea.in", ("\u0936\u094d\u200d\u0930@xn--c39h.in", "xn--c39h.in")),
        ("ann@", ("ann@",)),
        ("ann@.", ("ann@.",)),
        ("ÄNN@b.example", ("änn@b.example", "b.example")),
        ("a\u0308nn@b.example", ("änn@b.example", "b.example")),
        ("a..b.@b.example", ("a..b.@b.example", "b.example")),
        ("ann@[192.0.2.1]", ("ann@[192.0.2.1]", "[192.0.2.1]")),
        ("ann@[IPv6:2001:DB8::1]", ("ann@[ipv6:2001:db8::1]", "[ipv6:2001:db8::1]")),
    ],
)
def test_keys_are_folded(recipient, keys):
    assert keys_of(recipient) == keys
    assert keys_of(recipient, "+-") == keys


@pytest.mark.parametrize(
    ("recipient", "keys"),
    [
        ('"bob"@b.example', ("bob@b.example", "b.example")),
        ('"B.ob"@b.example', ("b.ob@b.example", "b.example")),
        (r'"b\ob"@b.example', ("bob@b.example", "b.example")),
        ('"a b"@b.example', ('"a b"@b.example', "b.example")),
        ('"A@b"@c.example', ('"a@b"@c.example', "c.example")),
        (r'"a\@b"@c.example', ('"a@b"@c.example', "c.example")),
        (r'"a\"b\\c"@b.example', (r'"a\"b\\c"@b.example', "b.example")),
        ('"bob."@b.example', ('"bob."@b.example', "b.example")),
        ('""@b.example', ('""@b.example', "b.example")),
        ('"a@b"', ('"a@b"',)),
        ('"Postmaster"', ("postmaster",)),
    ],
)
def test_quotes_stay_only_where_they_mean_something(recipient, keys):
    assert keys_of(recipient) == keys


@pytest.mark.parametrize(
    ("recipient", "delimiter", "user"),
    [
        ("bob+x@b.example", "+", "bob"),
        ("bob+x+y@b.example", "+", "bob"),
        ("bob-x+y@b.example", "+-", "bob"),
        ("bob+x-y@b.example", "+-", "bob"),
        ("bob+x-y@b.example", "-", "bob+x"),
        ("bob+@b.example", "+", "bob"),
        ("Bob+X@b.example", "+", "bob"),
        ("a-b@my-host.example", "-", "a"),
        ('"bob+x"@b.example', "+", "bob"),
        ("bob+x@b.example", "", None),
        ("bob+x@b.example", "-", None),
        ("+bob@b.example", "+", None),
        ("+bob+x@b.example", "+", None),
        ("-bob+x@b.example", "+-", None),
        ("bob@my-host.example", "-", None),
        ('"bob +x"@b.example', "+", None),
        ('"a+x@y"@b.example', "+", None),
    ],
)
def test_the_local_part_is_cut_at_the_first_delimiter_but_never_to_nothing(recipient, delimiter, user):
    whole, *shortened, domain = keys_of(recipient, delimiter)
    assert shortened == ([] if user is None else [f"{user}@{domain}"])
    assert [whole, domain] == list(keys_of(recipient))


def test_parent_domains_come_last_and_the_longest_first():
    assert keys_of("ann+x@a.b.example", "+", subdomains=True) == (
        "ann+x@a.b.example", "ann@a.b.example", "a.b.example", ".b.example", ".example",
    )  # fmt: skip
    for single in ("ann@[192.0.2.1]", "ann@example", "ann", "ann@a..example"):
        assert keys_of(single, subdomains=True) == keys_of(single)


@pytest.mark.parametrize(("labels", "label"), [(127, "xn--tda"), (128, "ü")])
def test_a_name_longer_than_any_has_no_a_labels(labels: int, label: str):
    """No such domain is there, and to make them takes 0.2 s for 2,000 octets, in which nobody else has a turn."""
    assert keys_of("ann@" + ".".join(["ü"] * labels))[-1] == ".".join([label] * labels)


def test_an_address_without_a_domain_is_not_cut():
    assert keys_of("bob+x", "+") == ("bob+x",)


@pytest.mark.parametrize(
    ("domain", "key"),
    [
        ("münchen.example", "xn--mnchen-3ya.example"),
        ("MÜNCHEN.Example", "xn--mnchen-3ya.example"),
        ("mu\u0308nchen.example", "xn--mnchen-3ya.example"),
        ("XN--MNCHEN-3YA.example", "xn--mnchen-3ya.example"),
        ("straße.example", "xn--strae-oqa.example"),
        ("例え\u3002テスト", "xn--r8jz45g.xn--zckzah"),
        ("例え.テスト\u3002", "xn--r8jz45g.xn--zckzah"),
        ("ｂ.example", "b.example"),
        ("ü" * 64 + ".Example", "ü" * 64 + ".example"),
        ("Ü..example", "ü..example"),
        ("a/Ü.example", "a/ü.example"),
        ("a＠b.example", "a＠b.example"),
    ],
)
def test_a_domain_becomes_its_a_label_or_stays_as_it_is(domain, key):
    assert keys_of(f"ann@{domain}") == (f"ann@{key}", key)


@given(st.text(max_size=300), st.text(max_size=3))
@example("ann@\ud800", "+")
@example("İ@İ", "")
@example("@b.example", "+")
def test_keys_of_anything_are_one_two_or_three_and_lower_case(recipient, delimiter):
    keys = keys_of(recipient, delimiter)
    assert 1 <= len(keys) <= 3
    assert keys_of(recipient, delimiter, subdomains=True)[: len(keys)] == keys
    assert all(key == key.lower() for key in keys)
    assert all(keys) or not recipient
    assert len(set(keys)) == len(keys)


# Patterns

NAMES = st.from_regex(r"[a-z0-9ü]([a-z0-9ü-]{0,10}[a-z0-9ü])?", fullmatch=True)
DOMAINS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)
LOCAL_PARTS = st.from_regex(r"[a-zA-Z0-9ßÄ!#$%&'*+/=?^_`{|}~-]+(\.[a-z0-9]+)*", fullmatch=True)
QUOTED = st.from_regex(r'"([ !#-\[\]-~À-ÿ]|\\[ -~])*"', fullmatch=True)
# `*@domain` as a pattern is refused, since it is meant for a whole domain; "*"@domain has the same key.
ADDRESSES = st.builds("{}@{}".format, LOCAL_PARTS | QUOTED, DOMAINS | DOMAINS.map(str.upper)).filter(
    lambda address: not keys_of(address)[0].startswith("*@")
)


@given(ADDRESSES)
def test_a_pattern_folds_to_the_key_that_the_same_recipient_has(address):
    whole, domain = keys_of(address)
    assert fold_pattern(address) == whole
    assert fold_pattern(address.rpartition("@")[2]) == domain
    assert fold_pattern(whole) == whole
    assert fold_pattern(domain) == domain


@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        ("b.example", "b.example"),
        ("Bob@EXAMPLE.org", "bob@example.org"),
        ("b.example.", "b.example"),
        ("bob@München.example", "bob@xn--mnchen-3ya.example"),
        ("München.example", "xn--mnchen-3ya.example"),
        ("postmaster", "postmaster"),
        ("my_host.example", "my_host.example"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("ann@[IPv6:2001:DB8::1]", "ann@[ipv6:2001:db8::1]"),
        ('"a@b"@c.example', '"a@b"@c.example'),
        ('"bob"@b.example', "bob@b.example"),
    ],
)
def test_a_pattern_is_folded_as_a_recipient_is(pattern, key):
    assert fold_pattern(pattern) == key


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        ".",
        "b..example",
        "b .example",
        "b.example\n",
        "-b.example",
        "b-.example",
        "a" * 64 + ".example",
        "ü" * 64 + ".example",
        "bob@",
        "a b@c.example",
        "a@b@c.example",
        '"a"b"@c.example',
        '"a@c.example',
        "<bob@b.example>",
        "b\\ob@b.example",
        "bob@[192.0.2.1",
        "b.example,c.example",
    ],
)
def test_a_pattern_that_can_never_match_is_refused(pattern):
    with pytest.raises(ValueError) as fault:
        fold_pattern(pattern)
    assert str(fault.value) == f"{pattern!r}: neither an address nor a domain"


INVISIBLE = {
    "\u200b": "U+200B ZERO WIDTH SPACE",
    "\u200c": "U+200C ZERO WIDTH NON-JOINER",
    "\u200d": "U+200D ZERO WIDTH JOINER",
    "\u200e": "U+200E LEFT-TO-RIGHT MARK",
    "\u2028": "U+2028 LINE SEPARATOR",
    "\u202e": "U+202E RIGHT-TO-LEFT OVERRIDE",
    "\u2060": "U+2060 WORD JOINER",
    "\u2064": "U+2064 INVISIBLE PLUS",
    "\u00a0": "U+00A0 NO-BREAK SPACE",
    "\u00ad": "U+00AD SOFT HYPHEN",
    "\u034f": "U+034F COMBINING GRAPHEME JOINER",
    "\u0085": "U+0085",
    "\u3164": "U+3164 HANGUL FILLER",
    "\ufe0f": "U+FE0F VARIATION SELECTOR-16",
    "\ufeff": "U+FEFF ZERO WIDTH NO-BREAK SPACE",
    "\U000e0020": "U+E0020 TAG SPACE",
}


@pytest.mark.parametrize(("character", "named"), INVISIBLE.items())
@pytest.mark.parametrize("text", ["{}b.example", "b{}.example", "b.example{}", "a{}nn@b.example", "bücher{}.example"])
@pytest.mark.parametrize("parse", [fold_pattern, parse_servers])
def test_an_invisible_character_is_refused_and_named(character, named, text, parse):
    written = text.format(character)
    with pytest.raises(ValueError) as fault:
        parse(written)
    assert str(fault.value) == f"{written!r}: has the invisible character {named}: delete it"


@pytest.mark.parametrize("pattern", ["نامه\u200cای.example", "ශ්\u200dරී.example", "👩\u200d💻@b.example"])
def test_a_joiner_between_letters_that_need_it_is_a_letter(pattern):
    assert fold_pattern(pattern) in keys_of(pattern if "@" in pattern else f"ann@{pattern}")


@pytest.mark.parametrize("pattern", ["*", "bob@*", "bob@.b.example", "*b.example", "..b.example", "*.*.b.example"])
def test_a_pattern_with_a_wildcard_is_refused_with_advice(pattern):
    with pytest.raises(ValueError) as fault:
        fold_pattern(pattern)
    why = "neither an address nor a domain; there are no wildcards: one line for each domain"
    assert str(fault.value) == f"{pattern!r}: {why}"


@pytest.mark.parametrize(
    ("pattern", "subdomains"), [(".München.example", False), ("*.München.example", False), ("*.München.example", True)]
)
def test_a_pattern_for_the_names_below_is_refused_with_the_way_to_write_it(pattern, subdomains):
    with pytest.raises(ValueError) as fault:
        fold_pattern(pattern, subdomains)
    advice = "for all names below xn--mnchen-3ya.example write .xn--mnchen-3ya.example and set subdomains = yes"
    assert str(fault.value) == f"{pattern!r}: neither an address nor a domain; {advice}"


@pytest.mark.parametrize("domain", ["B.example", "Sub.München.example", "example", ".".join("abcdefghi") + ".example"])
def test_a_pattern_with_a_dot_before_it_is_a_key_of_all_names_below(domain):
    key = fold_pattern(f".{domain}", subdomains=True)
    for below in ("x", "x.y", "x.ü.z"):
        assert key in keys_of(f"ann@{below}.{domain}", subdomains=True)
        assert key not in keys_of(f"ann@{below}.{domain}")
    assert key not in keys_of(f"ann@{domain}", subdomains=True)


def test_a_pattern_with_a_dot_before_it_has_at_most_ten_labels():
    """A recipient with 127 labels would be as many queries."""
    labels = ".".join(["a"] * 11)
    with pytest.raises(ValueError, match="behind a dot it may have 10 labels"):
        fold_pattern(f".{labels}", subdomains=True)
    assert keys_of(f"ann@{labels}", subdomains=True)[2:] == tuple("." + labels[at:] for at in range(2, 22, 2))
    deep = ".".join(["a"] * 127)
    assert keys_of(f"ann@{deep}", subdomains=True)[2:] == tuple("." + deep[at:] for at in range(234, 254, 2))


def test_a_pattern_in_postfix_style_is_refused_with_advice():
    with pytest.raises(ValueError) as fault:
        fold_pattern("@b.example")
    assert str(fault.value) == "'@b.example': a whole domain is written without @"


# Servers


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("mx.b.example", (Server("mx.b.example", 25),)),
        (" MX.B.example. ", (Server("mx.b.example", 25),)),
        ("mx.b.example:1", (Server("mx.b.example", 1),)),
        ("mx.b.example:65535", (Server("mx.b.example", 65535),)),
        ("mx", (Server("mx", 25),)),
        ("mx:2525", (Server("mx", 2525),)),
        ("smtp:2525", (Server("smtp", 2525),)),
        ("mail_1:025", (Server("mail_1", 25),)),
        ("mx.münchen.example", (Server("mx.xn--mnchen-3ya.example", 25),)),
        ("192.0.2.1", (Server("192.0.2.1", 25),)),
        ("192.0.2.1:26", (Server("192.0.2.1", 26),)),
        ("[192.0.2.1]:26", (Server("192.0.2.1", 26),)),
        ("[mx.b.example]", (Server("mx.b.example", 25),)),
        ("[2001:DB8:0::1]", (Server("2001:db8::1", 25),)),
        ("[2001:db8::1]:26", (Server("2001:db8::1", 26),)),
        ("[::ffff:192.0.2.1]:26", (Server("192.0.2.1", 26),)),
        ("[::FFFF:c000:201]", (Server("192.0.2.1", 25),)),
        ("mx:B.example", (Server("b.example", mx=True),)),
        ("MX:münchen.example", (Server("xn--mnchen-3ya.example", mx=True),)),
        (
            "mx1.b.example, [2001:db8::1]:26 ,mx:b.example",
            (Server("mx1.b.example", 25), Server("2001:db8::1", 26), Server("b.example", mx=True)),
        ),
        (".".join(["a" * 63] * 3 + ["b" * 61]), (Server(".".join(["a" * 63] * 3 + ["b" * 61]), 25),)),
    ],
)
def test_servers_are_understood(text, servers):
    assert parse_servers(text) == servers


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'': a server is missing"),
        ("mx1,,mx2", "'mx1,,mx2': a server is missing"),
        ("mx1, ", "'mx1, ': a server is missing"),
        ("mx1:0", "'mx1:0': the port must be 1 to 65535"),
        ("mx1:65536", "'mx1:65536': the port must be 1 to 65535"),
        ("mx1:", "'mx1:': the port must be 1 to 65535"),
        ("mx1:-1", "'mx1:-1': the port must be 1 to 65535"),
        ("smtp:", "'smtp:': the port must be 1 to 65535"),
        ("smtp:[mx.b.example]", "'smtp:[mx.b.example]': write the host alone, without smtp:"),
        ("SMTP:mx.b.example:25", "'SMTP:mx.b.example:25': write the host alone, without smtp:"),
        ("smtp://mx.b.example", "'smtp://mx.b.example': write the host alone, without smtp:"),
        ("mx1:smtp", "'mx1:smtp': the port must be 1 to 65535"),
        ("mx1:２５", "'mx1:２５': the port must be 1 to 65535"),
        ("ok,mx1:0", "'mx1:0': the port must be 1 to 65535"),
        ("2001:db8::1", "'2001:db8::1': an IPv6 address needs brackets, as in [2001:db8::1] or [2001:db8::1]:25"),
        ("::1", "'::1': an IPv6 address needs brackets, as in [2001:db8::1] or [2001:db8::1]:25"),
        ("[::1]:25:25", "'[::1]:25:25': the port must be 1 to 65535"),
        ("[2001:db8::1", "'[2001:db8::1': must be host, host:port or [IPv6 address]:port"),
        ("[::1]25", "'[::1]25': must be host, host:port or [IPv6 address]:port"),
        ("[]:25", "'[]:25': must be host, host:port or [IPv6 address]:port"),
        ("[2001:db8::g]", "'[2001:db8::g]': not a host name"),
        ("mx 1", "'mx 1': not a host name"),
        ("mx1;25", "'mx1;25': not a host name"),
        ("-mx1", "'-mx1': not a host name"),
        ("mx1..b.example", "'mx1..b.example': not a host name"),
        ("a" * 64, f"'{'a' * 64}': not a host name"),
        (".".join(["a" * 63] * 3 + ["b" * 62]), f"'{'.'.join(['a' * 63] * 3)[:80]}': not a host name"),
        ("192.0.2", "'192.0.2': not a host name, nor a whole IPv4 address"),
        ("192.0.2.256", "'192.0.2.256': not a host name, nor a whole IPv4 address"),
        ("mx:", "'mx:': not a host name"),
        ("mx:b.example:25", "'mx:b.example:25': not a host name"),
        ("mx:192.0.2.1", "'mx:192.0.2.1': not a host name, nor a whole IPv4 address"),
    ],
)
def test_a_bad_server_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError) as fault:
        parse_servers(text)
    assert str(fault.value) == why


@given(st.text())
def test_any_text_is_servers_or_a_short_reason(text):
    try:
        servers = parse_servers(text)
    except ValueError as fault:
        reason = str(fault)
    else:
        assert parse_servers(",".join(map(str, servers))) == servers
        reason = ""
    assert len(reason) < 1000


@pytest.mark.parametrize(
    ("words", "truth"),
    [("true TRUE t T yes Yes 1", True), ("false False f F no NO 0", False)],
)
def test_tls_verify_is_true_or_false_in_many_words(words, truth):
    assert {parse_tls_verify(f" {word} ") for word in words.split()} == {truth}


@pytest.mark.parametrize("text", ["", "maybe", "2", "mx2.b.example"])
def test_tls_verify_is_nothing_else(text):
    with pytest.raises(ValueError) as fault:
        parse_tls_verify(text)
    assert str(fault.value) == f"{text!r}: tls_verify must be true or false"
