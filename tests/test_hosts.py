"""What a host name is, an address, and `host:port`."""

from __future__ import annotations

import pytest

from willi_lib.hosts import Address, canonical, is_host_name, parse_ip, parse_port, split_host_port


@pytest.mark.parametrize("name", [
    "c.example", "a", "a_b.example", "1.2.3.4.example", "x" * 63 + ".example", "xn--bcher-kva.x", "3com.example",
    ".".join(["x" * 49] * 5) + ".xyz",
])  # fmt: skip
def test_a_host_name_is_one(name):
    assert is_host_name(name)


@pytest.mark.parametrize("name", [
    "", ".", "a.", ".a", "a..b", "-a", "a-", "a.-b", "a-.b", "x" * 64, "1.2.3.4", "12", "a b", "a\n", "a\0", "bücher.x",
    "a/b", "a.1", "192.0.2", "\u212a.example", "[UNAVAILABLE]", "a=b", "*.a", ".".join(["x" * 49] * 5) + ".xyzx", "a:b",
    "٣.example",
])  # fmt: skip
def test_what_has_not_the_form_of_a_host_name_is_none(name):
    assert not is_host_name(name)


@pytest.mark.parametrize(("text", "parts"), [
    ("a", ("a", None)), ("a:25", ("a", "25")), ("a:", ("a", "")), (":25", ("", "25")), ("", ("", None)),
    ("[::1]", ("::1", None)), ("[::1]:25", ("::1", "25")), ("[a]:x", ("a", "x")),
])  # fmt: skip
def test_host_and_port_are_told_apart(text, parts):
    assert split_host_port(text) == parts


@pytest.mark.parametrize("text", ["::1", "::1:25", "[::1", "[::1]25", "[]:25", "a[b]", "a]"])
def test_what_cannot_be_told_apart_is_refused(text):
    with pytest.raises(ValueError):
        split_host_port(text)


def test_a_port_is_a_number_up_to_65535():
    assert (parse_port("1"), parse_port("65535"), parse_port("0", least=0)) == (1, 65535, 0)
    for text in ("", "0", "65536", "-1", "+1", "000025", "1 ", "1\n", "x", "\u0663"):
        with pytest.raises(ValueError, match="the port must be 1 to 65535"):
            parse_port(text)


def test_an_address_with_its_port_has_brackets_if_it_is_ipv6():
    assert (str(Address("192.0.2.1", 25)), str(Address("::1", 25)), str(Address("", 25))) == (
        "192.0.2.1:25", "[::1]:25", ":25",
    )  # fmt: skip


def test_an_ipv4_address_written_as_ipv6_is_ipv4():
    assert str(canonical("::ffff:192.0.2.1")) == str(canonical("::FFFF:c000:201")) == "192.0.2.1"
    assert str(canonical(bytes(10) + b"\xff\xff\xc0\0\2\1")) == "192.0.2.1"
    assert parse_ip("2001:DB8:0::1") == "2001:db8::1"
    assert [parse_ip(text) for text in ("a", "db1", "192.0.2", "::g", "")] == [None] * 5
