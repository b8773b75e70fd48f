"""Command lines: what is taken, what is refused, and that hostile lines cost no time."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from willi_lib.hosts import is_host_name
from willi_lib.smtp import reply as replies
from willi_lib.smtp import xclient
from willi_lib.smtp.reply import Rejected, Reply
from willi_lib.smtp.syntax import (
    MAX_COMMAND_LINE,
    MAX_HELO,
    Mail,
    Path,
    may_be_bdat,
    parse_bdat,
    parse_helo,
    parse_mail,
    parse_rcpt,
    split_command,
)

ALL = frozenset(("SMTPUTF8", "8BITMIME", "CHUNKING"))
NONE: frozenset[str] = frozenset()
MOST_SECONDS = 0.005  # for one line of any content


def refusal(function, *arguments) -> Reply:
    with pytest.raises(Rejected) as refused:
        function(*arguments)
    return refused.value.reply


# The command line


@pytest.mark.parametrize(("line", "parts"), [
    (b"QUIT", (b"QUIT", b"")),
    (b"quit", (b"QUIT", b"")),
    (b"rSeT  ", (b"RSET", b"")),
    (b"EHLO c.example", (b"EHLO", b"c.example")),
    (b"EHLO  c.example ", (b"EHLO", b"c.example")),
    (b"\tEHLO\t \tc.example\t", (b"EHLO", b"c.example")),
    (b"NOOP\t", (b"NOOP", b"")),
    (b'RCPT TO:<"a \t b"@c>', (b"RCPT", b'TO:<"a \t b"@c>')),
    (b"MAIL FROM:<a b@c>", (b"MAIL", b"FROM:<a b@c>")),
    (b"", (b"", b"")),
    (b" ", (b"", b"")),
    (b"\t ", (b"", b"")),
    (b" QUIT", (b"QUIT", b"")),
    (b"STARTTLSX", (b"STARTTLSX", b"")),
    (b"\xff\xfe \xff", (b"\xff\xfe", b"\xff")),
])  # fmt: skip
def test_a_command_is_a_verb_in_upper_case_and_an_argument(line, parts):
    assert split_command(line) == parts


@pytest.mark.parametrize("octet", [*range(9), *range(10, 32), 127])
@pytest.mark.parametrize("form", [b"%bQUIT", b"QU%bIT", b"QUIT%b", b'RCPT TO:<"a%bb"@c>', b"RCPT TO:<a@b>%bX"])
def test_control_octets_are_refused_wherever_they_are(octet, form):
    assert refusal(split_command, form % bytes([octet])) == replies.CONTROL_CHARACTER


@pytest.mark.parametrize(("line", "may_be"), [
    (b"BDAT 5 LAST", True), (b"bdat", True), (b" \tBdat 5", True), (b"BD", True), (b"  ", True), (b"BDX", False),
    (b"NOOP BDAT", False),
])  # fmt: skip
def test_a_line_that_may_be_bdat_is_known_by_its_beginning(line, may_be):
    assert may_be_bdat(line) == may_be


# HELO


@pytest.mark.parametrize("name", ["c.example", "[192.0.2.1]", "[IPv6:2001:db8::1]", "a_b", "!~", "x" * MAX_HELO, "+="])
def test_a_helo_name_is_any_word_of_printable_ascii(name):
    assert parse_helo(name.encode()) == name


@pytest.mark.parametrize("argument", [b"", b" c", b"a b", "bücher.example".encode(), b"a\0b", b"\x7f", b"x" * 256])
def test_a_helo_name_that_is_none_is_refused(argument):
    assert refusal(parse_helo, argument) == replies.BAD_HELO


# Paths

ADDRESSES = [
    # as sent, the domain in it
    (b"ann@a.example", "a.example"),
    (b"Ann@A.Example", "A.Example"),
    (b"a.n.n+x=y/z!%$&'*-_`{|}~^?#@a.example", "a.example"),
    (b".a..b.@a.example", "a.example"),
    (b'"ann"@a.example', "a.example"),
    (b'""@a.example', "a.example"),
    (b'"a b@c> SIZE=1"@a.example', "a.example"),
    (rb'"a\"b\\c\ d"@a.example', "a.example"),
    (b"ann@[192.0.2.1]", "[192.0.2.1]"),
    (b"ann@[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]"),
    (b"ann@[x-tag:abc]", "[x-tag:abc]"),
    (b"ann@_a-b.example", "_a-b.example"),
    (b"ann@" + b"d" * 500, "d" * 500),
]
NON_ASCII = [
    ("ünn@bücher.example", "bücher.example"), ('"ü b"@a.example', "a.example"), ("안@나.example", "나.example"),
    ("a@\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.example", "\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.example"),
    ("\u0936\u094d\u200d\u0930@a.example", "a.example"), ("\U0001f468\u200d\U0001f469@a.example", "a.example"),
    ("\U0001faea@\u1c89\U0001faea.example", "\u1c89\U0001faea.example"),  # letters of Unicode 16, two of no version yet
    ("\ue000\ufdd0@a.example", "a.example"), ("a\u00a0b@a.example", "a.example"), ("a\ufeff@\u00ad.org", "\u00ad.org"),
]  # fmt: skip
NEVER = "\x80\x85\x9f\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
NOT_ADDRESSES = [
    b"@", b"@a.example", b"ann@", b"ann@@a.example", b"a@b@c", b"a,b@c", b"a;b@c", b"a:b@c", b"a(b)@c",
    b"a\\b@c", b"<a@b>", b"a<b@c", b"a>b@c", b'a"b@c', b'"a"b@c', b'"a@c', b'"a\\"@c', b'"a\\', b'a@"c"',
    b"a@[b", b"a@b]", b"a@[]", b"a@[b]c", b"a@[[b]]", b"a@b,c", b"a@b:", b"a@b/c", b"a@b!c",
    b"@a.example:", b"@a.example@b.example", b"@:a@b", b"@a,b:c@d", b"@a,@b,:c@d", b"a@b:c@d", b"\xff@b", b"a@\xff",
    b"a\xed\xa0\x80@b", b"a\xc0\xaf@b", b"a@b\xf4\x90\x80\x80", b'"\\\xc3\xa9"@b',
    *(form % control.encode() for control in NEVER for form in (b"a%b@b", b"a@b%b", b'"%b"@b')),
]  # fmt: skip


@pytest.mark.parametrize(("address", "domain"), ADDRESSES)
@pytest.mark.parametrize("form", [b"TO:<%b>", b"to: <%b>", b"To:%b", b"TO: %b", b"TO:<@r1.example,@r2:%b>"])
def test_an_address_is_taken_as_it_was_sent_with_and_without_brackets_and_source_route(form, address, domain):
    path = parse_rcpt(form % address, smtputf8=False)
    assert path == Path(address.decode(), domain)
    assert path.octets == b"<%b>" % address


@pytest.mark.parametrize(("address", "domain"), NON_ASCII)
def test_a_non_ascii_address_needs_smtputf8(address, domain):
    argument = b"TO:<%b>" % address.encode()
    assert parse_rcpt(argument, smtputf8=True) == Path(address, domain)
    assert refusal(parse_rcpt, argument, False) == replies.NEEDS_SMTPUTF8
    sender = b"FROM:<%b>" % address.encode()
    assert parse_mail(sender + b" SMTPUTF8", ALL) == Mail(Path(address, domain), smtputf8=True)
    assert refusal(parse_mail, sender, ALL) == replies.NEEDS_SMTPUTF8


@pytest.mark.parametrize("address", NOT_ADDRESSES)
@pytest.mark.parametrize("form", [b"%b:<%b>", b"%b:<@r.example:%b>"])
def test_what_is_no_address_is_refused(form, address):
    assert refusal(parse_rcpt, form % (b"TO", address), True) == replies.BAD_RECIPIENT
    assert refusal(parse_mail, form % (b"FROM", address) + b" SMTPUTF8", ALL) == replies.BAD_SENDER


@pytest.mark.parametrize("address", [b"a b@c", b"a@b c", b"a@[a b]", b"a @b", b"a@ b", b"a\t@b", b'"a\tb"@c'])
def test_a_blank_in_an_address_is_refused(address):
    assert refusal(parse_rcpt, b"TO:<%b>" % address, True) == replies.BAD_RECIPIENT
    assert refusal(parse_rcpt, b"TO:%b <x@y>" % address, True) in (
        replies.BAD_RECIPIENT, replies.SYNTAX, replies.UNKNOWN_PARAMETER,
    )  # fmt: skip


def test_the_null_sender_is_a_sender_and_no_recipient():
    assert parse_mail(b"FROM:<>", NONE) == Mail(Path("", None))
    assert parse_mail(b"from: <> SIZE=5", NONE) == Mail(Path("", None), size=5)
    assert parse_mail(b"FROM:<>", NONE).path.octets == b"<>"
    assert refusal(parse_rcpt, b"TO:<>", False) == replies.BAD_RECIPIENT
    assert refusal(parse_rcpt, b"TO:", False) == replies.BAD_RECIPIENT
    assert refusal(parse_mail, b"FROM:", NONE) == replies.BAD_SENDER
    assert refusal(parse_mail, b"FROM: ", NONE) == replies.BAD_SENDER


@pytest.mark.parametrize("address", ["postmaster", "PostMaster"])
def test_only_postmaster_needs_no_domain(address):
    assert parse_rcpt(b"TO:<%b>" % address.encode(), False) == Path(address, None)


@pytest.mark.parametrize("address", [b"ann", b'"postmaster"', b'"a@b.example"', b"postmaster2"])
def test_a_recipient_without_a_domain_is_refused_and_a_sender_is_not(address):
    assert refusal(parse_rcpt, b"TO:<%b>" % address, False) == replies.NO_DOMAIN
    assert parse_mail(b"FROM:<%b>" % address, NONE) == Mail(Path(address.decode(), None))


@pytest.mark.parametrize("argument", [b"", b"<a@b>", b"TO<a@b>", b"TO :<a@b>", b"FROM:<a@b>", b" TO:<a@b>"])
def test_a_path_without_its_keyword_is_a_syntax_error(argument):
    assert refusal(parse_rcpt, argument, False) == replies.SYNTAX


@pytest.mark.parametrize("path", [b" <a@b>", b"  \t <a@b>", b"\ta@b", b"< a@b >", b"<\t@r.example:a@b \t>", b"   a@b"])
def test_blanks_around_a_path_count_for_nothing(path):
    assert parse_rcpt(b"TO:" + path, False) == Path("a@b", "b")
    assert parse_mail(b"FROM:" + path + b"\t SIZE=1 \tBODY=7BIT", ALL) == Mail(Path("a@b", "b"), 1, "7BIT")
    assert parse_mail(b"FROM:\t< >", NONE) == Mail(Path("", None))


@pytest.mark.parametrize("path", [b"\xc2\xa0<a@b>", b"<a@b>x", b"<a@b><c@d>", b"<a@b", b"a@b>", b"<a@b>,", b"a@b,c@d"])
def test_a_path_with_anything_around_it_is_refused(path):
    assert refusal(parse_rcpt, b"TO:" + path, False) == replies.BAD_RECIPIENT


# Parameters


@pytest.mark.parametrize(("parameters", "mail"), [
    (b"", Mail(Path("a@b", "b"))),
    (b" SIZE=0", Mail(Path("a@b", "b"), size=0)),
    (b" size=" + b"9" * 20, Mail(Path("a@b", "b"), size=10**20 - 1)),
    (b" BODY=7bit", Mail(Path("a@b", "b"), body="7BIT")),
    (b"  body=8BitMime   SmtpUtf8 SIZE=5", Mail(Path("a@b", "b"), 5, "8BITMIME", True)),
])  # fmt: skip
def test_parameters_of_mail_may_come_in_any_order_and_case(parameters, mail):
    assert parse_mail(b"FROM:<a@b>" + parameters, ALL) == mail
    assert parse_mail(b"FROM:a@b" + parameters, ALL) == mail


@pytest.mark.parametrize(("parameters", "reply"), [
    (b"SIZE", replies.SYNTAX), (b"SIZE=", replies.SYNTAX), (b"SIZE=x", replies.SYNTAX), (b"SIZE=-1", replies.SYNTAX),
    (b"SIZE=" + b"9" * 21, replies.SYNTAX), (b"SIZE=1 SIZE=1", replies.SYNTAX), (b"SIZE=1=2", replies.SYNTAX),
    (b"=1", replies.SYNTAX), (b"-A=1", replies.SYNTAX), (b"A_B=1", replies.SYNTAX), (b"A=\xc3\xa9", replies.SYNTAX),
    ("SIZE=²".encode(), replies.SYNTAX),
    (b"BODY=BINARYMIME", replies.UNKNOWN_PARAMETER), (b"BODY", replies.UNKNOWN_PARAMETER),
    (b"SMTPUTF8=1", replies.UNKNOWN_PARAMETER), (b"AUTH=<>", replies.UNKNOWN_PARAMETER),
    (b"RET=FULL", replies.UNKNOWN_PARAMETER), (b"REQUIRETLS", replies.UNKNOWN_PARAMETER),
    (b"x", replies.UNKNOWN_PARAMETER), (b"x=>SIZE", replies.UNKNOWN_PARAMETER),
])  # fmt: skip
def test_other_parameters_of_mail_are_refused(parameters, reply):
    assert refusal(parse_mail, b"FROM:<a@b> " + parameters, ALL) == reply


@pytest.mark.parametrize("parameter", [b"SMTPUTF8", b"BODY=8BITMIME", b"BODY=7BIT"])
def test_a_parameter_of_an_extension_that_is_not_offered_is_refused(parameter):
    assert refusal(parse_mail, b"FROM:<a@b> " + parameter, NONE) == replies.UNKNOWN_PARAMETER


def test_rcpt_has_no_parameters():
    assert refusal(parse_rcpt, b"TO:<a@b> NOTIFY=NEVER", False) == replies.UNKNOWN_PARAMETER
    assert refusal(parse_rcpt, b"TO:<a@b> !", False) == replies.SYNTAX


@pytest.mark.parametrize(("features", "line"), [
    ({}, b"MAIL FROM:<a@b> SMTPUTF8"),
    ({"SIZE": ""}, b"MAIL FROM:<a@b> SIZE=5 SMTPUTF8"),
    ({"SIZE": "", "8BITMIME": ""}, b"MAIL FROM:<a@b> SIZE=5 BODY=8BITMIME SMTPUTF8"),
])  # fmt: skip
def test_an_upstream_hears_those_parameters_that_it_knows(features, line):
    assert Mail(Path("a@b", "b"), 5, "8BITMIME", True).line(features) == line
    assert Mail(Path("", None)).line(features) == b"MAIL FROM:<>"


# What must hold for any octets


@given(st.binary(max_size=60).map(lambda octets: octets.translate(None, bytes([*range(32), 127]))))
@example(b"<a@b>\xc2\xa0SIZE=1")
def test_what_goes_upstream_is_one_command_with_one_path(octets):
    for form in (b"TO:%b", b"TO:<%b>", b"TO:<%b@b>", b'TO:<"%b"@b>', b"TO:<a@%b>"):
        try:
            path = parse_rcpt(form % octets, smtputf8=True)
        except Rejected:
            continue
        sent = path.octets
        assert sent in form % octets or sent[1:-1] in form % octets
        assert not re.search(rb"[\x00-\x1f\x7f]", sent)
        without_quoted = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", sent)
        assert re.fullmatch(rb'<[^\s<>"(),;:\\@]*(?:@(?:[^\s<>"(),;:\\@\[\]]+|\[[0-9A-Za-z.:-]+\]))?>', without_quoted)
        assert not set(sent.decode()) & set(NEVER)
        assert parse_rcpt(b"TO:" + sent, smtputf8=True) == path


N = MAX_COMMAND_LINE
HOSTILE = {
    "long atom": b"<" + b"a" * N,
    "long atom without brackets": b"a" * N + b"@",
    "open quote": b'<"' + b"a" * N,
    "open quote of escapes": b'<"' + b"\\a" * (N // 2),
    "escaped quotes": b'<"' + b'\\"' * (N // 2) + b"@",
    "many quotes": b"<" + b'""' * (N // 2),
    "long domain": b"<a@" + b"a." * (N // 2) + b"!",
    "many ats": b"<" + b"a@" * (N // 2),
    "long source route": b"<" + b"@a," * (N // 3),
    "source route without an address": b"<@a" + b",@a" * (N // 3) + b":",
    "source route of one domain": b"<@" + b"a" * N,
    "open literals": b"<@" + b"[a" * (N // 2),
    "long literal": b"<a@[" + b":" * N,
    "spaces": b" " * N,
    "spaces behind a bracket": b"<" + b" " * N,
    "spaces behind an address": b"<a@b" + b" " * N,
    "spaces before a parameter": b"<a@b>" + b" " * N + b"\xff",
    "many parameters": b"<a@b>" + b" a=b" * (N // 4),
    "one parameter many times": b"<a@b>" + b" a" * (N // 2),
    "long parameter": b"<a@b> " + b"a-" * (N // 2) + b"=",
    "high octets": b"<" + b"\xff" * N,
    "brackets": b"<" * N,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_line_takes_long(name):
    octets = HOSTILE[name][: N - len("MAIL FROM:")]
    work = [
        lambda: parse_rcpt(b"TO:" + octets, True), lambda: parse_mail(b"FROM:" + octets, ALL),
        lambda: parse_helo(octets), lambda: xclient.parse(octets), lambda: xclient.parse(b"HELO=" + b"+" * N),
        lambda: parse_bdat(octets),
        lambda: is_host_name(octets.decode("latin-1")), lambda: Reply(250, (b"", octets)).features,
        lambda: split_command(octets),
    ]  # fmt: skip
    assert max(map(seconds, work)) < MOST_SECONDS


def seconds(work) -> float:
    """Of this thread, whatever the machine has to do besides; the best of a few."""
    times = []
    for _ in range(3):
        began = time.thread_time()
        with suppress(Rejected):
            work()
        times.append(time.thread_time() - began)
    return min(times)


# BDAT


@pytest.mark.parametrize(("argument", "chunk"), [
    (b"0", (0, False)), (b"00", (0, False)), (b"0 LAST", (0, True)), (b"5 last", (5, True)), (b"1 \t LAST", (1, True)),
    (b"9" * 20, (10**20 - 1, False)),
])  # fmt: skip
def test_a_chunk_has_a_size_and_may_be_the_last(argument, chunk):
    assert parse_bdat(argument) == chunk


@pytest.mark.parametrize("argument", [
    b"", b"LAST", b"-1", b"+1", b"1.0", b"0x10", b"1_000", b"1 FIRST", b"1 LAST LAST", b"1LAST", b"1 2", b" ",
    b"9" * 21, "²".encode(), b"1\xa0LAST",
])  # fmt: skip
def test_a_chunk_whose_size_nobody_knows_is_refused(argument):
    assert refusal(parse_bdat, argument) == replies.BAD_BDAT


# EHLO's reply


def test_features_are_keywords_in_upper_case_with_their_parameters():
    lines = (b"mx.example greets c.example", b"PIPELINING", b"size 1000", b"AUTH=LOGIN PLAIN", b"Limits RCPTMAX=5 X=Y",
             b"XCLIENT  NAME ADDR ", b"", b"X-\xff\0 \xff", b"8BITMIME")  # fmt: skip
    assert Reply(250, lines).features == {
        "PIPELINING": "", "SIZE": "1000", "AUTH": "LOGIN PLAIN", "LIMITS": "RCPTMAX=5 X=Y", "XCLIENT": "NAME ADDR",
        "": "", "X-�\0": "�", "8BITMIME": "",
    }  # fmt: skip
    assert Reply(250, (b"PIPELINING",)).features == {}


def test_every_verb_of_a_path_is_read_octet_for_octet():
    for address, keyword in product((b"a@b", b"postmaster"), (b"TO:", b"to:", b"tO:")):
        assert parse_rcpt(keyword + b"<" + address + b">", False).octets == b"<" + address + b">"
