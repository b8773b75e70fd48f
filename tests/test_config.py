"""The configuration file: whole fault lines, and every key at its bounds."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_network
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from willi_lib import config
from willi_lib.config import Address, Certificate, ConfigError, CsvSettings, MysqlSettings, StaticSettings, cpus
from willi_lib.config.cpus import cpu_quota, usable_cpus
from willi_lib.config.reader import EQUALS, MAX_FAULTS, NO_MAPPING, OLD_FILE, SECTIONS, Reader
from willi_lib.config.settings import QUOTE, TOP_KEYS
from willi_lib.routing.route import Policy, Server
from willi_lib.text import visible

MAPPING = "[mappings]\n[[all]]\ntype = static\nserver = mx.example\n"
CPUS = len(os.sched_getaffinity(0))
SECOND = 1.0
MINUTE = 60.0
HOUR = 3600.0


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """The tests say `willi.conf` in their own directory, so that whole lines can be compared."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(directory):
    def load(text: str, mapping: str = MAPPING) -> config.Settings:
        (directory / "willi.conf").write_text(text + mapping, encoding="utf-8")
        return config.load("willi.conf")

    return load


@pytest.fixture
def faults(load):
    def faults(text: str, mapping: str = MAPPING) -> list[str]:
        with pytest.raises(ConfigError) as error:
            load(text, mapping)
        assert str(error.value) == "\n".join(error.value.faults)
        return error.value.faults

    return faults


def mapping_of(load, text: str):
    (mapping,) = load("", f"[mappings]\n[[m]]\n{text}\n").mappings
    return mapping


# What a key may be


DEFAULTS = {
    "path": "willi.conf",
    "loglevel": "info",
    "log": "stdout",
    "listen": (Address("", 25),),
    "domain": socket.gethostname(),
    "user": "",
    "group": "",
    "workers": usable_cpus(),
    "tls_cert": (),
    "tls_key": (),
    "certificates": (),
    "tls_min_version": "1.2",
    "read_timeout": 5 * MINUTE,
    "write_timeout": 5 * MINUTE,
    "connect_timeout": 20 * SECOND,
    "upstream_timeout": 4 * MINUTE,
    "data_timeout": 10 * MINUTE,
    "dns_timeout": 3 * SECOND,
    "drain_timeout": 60 * SECOND,
    "max_message_bytes": 20 * 1024 * 1024,
    "max_recipients": 100,
    "max_connections": 5000,
    "max_connections_per_ip": 50,
    "max_connection_rate": 0,
    "max_errors": 20,
    "recipient_delimiter": "",
    "subdomains": False,
    "mixed_recipients": "first",
    "bare_newline": "normalize",
    "extensions": frozenset({"SMTPUTF8", "CHUNKING", "8BITMIME"}),
    "strict_8bitmime": False,
    "kept_upstreams": 4,
    "upstream_tls": "auto",
    "upstream_tls_ca": "",
    "xclient": "try",
    "send_proxy": "no",
    "server_order": "listed",
    "proxy_protocol_hosts": (),
    "xclient_hosts": (),
    "status_listen": None,
    "mappings": (StaticSettings("all", Policy(), (Server("mx.example"),), True),),
}


def test_a_file_with_a_mapping_alone_has_these_defaults(load):
    settings = load("")
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert TOP_KEYS.keys() < DEFAULTS.keys()


GOOD = [
    ("loglevel", "debug", "debug"),
    ("loglevel", "warning", "warn"),
    ("loglevel", "ERROR", "error"),
    ("log", "syslog", "syslog"),
    ("listen", "192.0.2.1:25", (Address("192.0.2.1", 25),)),
    ("listen", ":0", (Address("", 0),)),
    ("listen", ":25, 0.0.0.0:25", (Address("", 25), Address("0.0.0.0", 25))),
    ("listen", "0.0.0.0:25, [::1]:25", (Address("0.0.0.0", 25), Address("::1", 25))),
    ("listen", ":0, 127.0.0.1:0", (Address("", 0), Address("127.0.0.1", 0))),
    ("listen", ":65535", (Address("", 65535),)),
    ("listen", "192.0.2.1:25, [2001:DB8::1]:2525", (Address("192.0.2.1", 25), Address("2001:db8::1", 2525))),
    ("listen", '"192.0.2.1:25, :26"', (Address("192.0.2.1", 25), Address("", 26))),
    ("listen", ":25,", (Address("", 25),)),
    ("domain", "mx-1.example.org", "mx-1.example.org"),
    ("domain", "a" * 63, "a" * 63),
    ("user", "root", "root"),
    ("group", "root\nuser = root", "root"),
    ("workers", "1", 1),
    ("workers", "256", 256),
    ("workers", "Auto", usable_cpus()),
    ("tls_min_version", "1.0", "1.0"),
    ("tls_min_version", "1.3", "1.3"),
    ("read_timeout", "0.1s", 0.1),
    ("read_timeout", "90S", 90.0),
    ("read_timeout", "1 m", 60.0),
    ("read_timeout", "1h", HOUR),
    ("write_timeout", "60m", HOUR),
    ("connect_timeout", "3600s", HOUR),
    ("upstream_timeout", "1h", HOUR),
    ("data_timeout", "1h", HOUR),
    ("dns_timeout", "1h", HOUR),
    ("drain_timeout", "1h", HOUR),
    ("max_message_bytes", "1kB", 1000),
    ("max_message_bytes", "1000", 1000),
    ("max_message_bytes", "20mib", 20 * 1024 * 1024),
    ("max_message_bytes", "20MB", 20_000_000),
    ("max_message_bytes", "64 KiB", 65_536),
    ("max_message_bytes", "4096MiB", 4096 * 1024 * 1024),
    ("max_recipients", "1", 1),
    ("max_recipients", "100000", 100_000),
    ("max_connections", "1", 1),
    ("max_connections", "1000000", 1_000_000),
    ("max_connections_per_ip", "1", 1),
    ("max_connections_per_ip", "1000000", 1_000_000),
    ("max_connection_rate", "1000000", 1_000_000),
    ("max_errors", "1", 1),
    ("max_errors", "1000000", 1_000_000),
    ("recipient_delimiter", "+-", "+-"),
    ("recipient_delimiter", '"#"', "#"),
    ("subdomains", "yes", True),
    ("mixed_recipients", "defer", "defer"),
    ("bare_newline", "reject", "reject"),
    ("extensions", "", frozenset()),
    ("extensions", "chunking", frozenset({"CHUNKING"})),
    ("extensions", "8BITMIME, SMTPUTF8", frozenset({"8BITMIME", "SMTPUTF8"})),
    ("strict_8bitmime", "yes", True),
    ("strict_8bitmime", "True", True),
    ("strict_8bitmime", "off", False),
    ("kept_upstreams", "1", 1),
    ("kept_upstreams", "100", 100),
    ("upstream_tls", "always", "always"),
    ("upstream_tls", "require", "require"),
    ("upstream_tls", "never", "never"),
    ("xclient", "require", "require"),
    ("xclient", "no", "no"),
    ("server_order", "random", "random"),
    ("send_proxy", "v1", "v1"),
    ("send_proxy", "v2", "v2"),
    ("proxy_protocol_hosts", "192.0.2.1", (ip_network("192.0.2.1/32"),)),
    ("xclient_hosts", "192.0.2.0/24, 2001:db8::/32", (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))),
    # What is IPv4 and written as IPv6 is IPv4.
    ("proxy_protocol_hosts", "::ffff:192.0.2.1", (ip_network("192.0.2.1"),)),
    ("xclient_hosts", "::FFFF:c000:200/120, ::ffff:0:0/96", (ip_network("192.0.2.0/24"), ip_network("0.0.0.0/0"))),
    ("xclient_hosts", "::/64, ::fffe:0:0/96", (ip_network("::/64"), ip_network("::fffe:0:0/96"))),
    ("listen", "[::ffff:127.0.0.1]:25", (Address("127.0.0.1", 25),)),
    ("status_listen", "[::ffff:7f00:1]:8025", Address("127.0.0.1", 8025)),
    ("status_listen", "127.0.0.1:8025", Address("127.0.0.1", 8025)),
    ("status_listen", "", None),
    ("status_listen", ":8025 # for all", Address("", 8025)),
]


@pytest.mark.parametrize(("key", "written", "value"), GOOD)
def test_a_good_value_is_taken(load, key, written, value):
    assert getattr(load(f"{key} = {written}\n"), key) == value


TWICE = "and cannot be had twice: leave one of them out"
ADDRESS = "must be like :25, 192.0.2.1:25 or [2001:db8::1]:25"
TIME = "must be a number and s, m or h, as in 10s, 5m or 1h"
SIZE = "must be a number and kB, MB (1000), KiB or MiB (1024), as in 20MiB"
NETWORK = "must be like 192.0.2.1, 192.0.2.0/24 or 2001:db8::/32"
COMMA = 'has a comma, but is no list: quote the whole value, as in "a, b"'
HASH = "has a #, which begins a comment: quote the value, or put a blank before the #"
COMMENT = "is empty, since a # begins a comment: quote a value that begins with #"
ONE_HOUR = "must be more than 0s and at most 1h"

BAD = [
    ("loglevel", "loud", "'loud': must be debug, info, warn or error"),
    ("loglevel", "", "'': must be debug, info, warn or error"),
    ("log", "file", "'file': must be stdout or syslog"),
    ("listen", "", "is empty"),
    ("listen", "25", f"'25': {ADDRESS}"),
    ("listen", ":25, 127.0.0.1:25", f"'127.0.0.1:25': is part of :25, {TWICE}"),
    ("listen", "127.0.0.1:25, :26, 0.0.0.0:25", f"'127.0.0.1:25': is part of 0.0.0.0:25, {TWICE}"),
    ("listen", "[::]:25, [2001:db8::1]:25", f"'[2001:db8::1]:25': is part of [::]:25, {TWICE}"),
    ("listen", "192.0.2.1", f"'192.0.2.1': {ADDRESS}"),
    ("listen", ":65536", f"':65536': {ADDRESS}"),
    ("listen", ":-1", f"':-1': {ADDRESS}"),
    ("listen", "2001:db8::1:25", f"'2001:db8::1:25': {ADDRESS}"),
    ("listen", "[2001:db8::1]", f"'[2001:db8::1]': {ADDRESS}"),
    ("listen", "mx.example:25", f"'mx.example:25': {ADDRESS}, an IP address, not a name"),
    ("listen", "localhost:25", f"'localhost:25': {ADDRESS}, an IP address, not a name"),
    ("listen", "localhost", f"'localhost': {ADDRESS}"),
    ("listen", ":25, x", f"'x': {ADDRESS}"),
    ("domain", "a_b.example", "'a_b.example': must be a host name"),
    ("domain", "mx.example.", "'mx.example.': must be a host name"),
    ("domain", "192.0.2.1", "'192.0.2.1': must be a host name"),
    ("domain", "münchen.example", "'münchen.example': must be a host name"),
    ("domain", "a" * 64, f"'{'a' * 64}': must be a host name"),
    ("user", "no-such-user", "'no-such-user': this system does not know that name"),
    ("group", "no-such-group", "'no-such-group': this system does not know that name"),
    ("workers", "0", "'0': must be a whole number from 1 to 256"),
    ("workers", "257", "'257': must be a whole number from 1 to 256"),
    ("tls_cert", "none.crt", "cannot read {directory}/none.crt: No such file or directory"),
    ("tls_cert", "/dev/null", "cannot read /dev/null: not a regular file"),
    ("tls_key", "/none.key", "cannot read /none.key: No such file or directory"),
    ("tls_key", "/dev/null", "cannot read /dev/null: not a regular file"),
    ("tls_min_version", "1.4", "'1.4': must be 1.0, 1.1, 1.2 or 1.3"),
    ("read_timeout", "10", f"'10': {TIME}"),
    ("read_timeout", "1d", f"'1d': {TIME}"),
    ("read_timeout", "-1s", f"'-1s': {TIME}"),
    ("read_timeout", "1m30s", f"'1m30s': {TIME}"),
    ("read_timeout", "0s", f"'0s': {ONE_HOUR}"),
    ("read_timeout", "3601s", f"'3601s': {ONE_HOUR}"),
    ("write_timeout", "61m", f"'61m': {ONE_HOUR}"),
    ("connect_timeout", "2h", f"'2h': {ONE_HOUR}"),
    ("upstream_timeout", "0s", f"'0s': {ONE_HOUR}"),
    ("data_timeout", "0m", f"'0m': {ONE_HOUR}"),
    ("dns_timeout", "0h", f"'0h': {ONE_HOUR}"),
    ("drain_timeout", "3600.1s", f"'3600.1s': {ONE_HOUR}"),
    ("max_message_bytes", "999", "'999': must be from 1kB to 4096MiB"),
    ("max_message_bytes", "4097MiB", "'4097MiB': must be from 1kB to 4096MiB"),
    ("max_message_bytes", "20M", f"'20M': {SIZE}"),
    ("max_message_bytes", "20s", f"'20s': {SIZE}"),
    ("max_message_bytes", "", f"'': {SIZE}"),
    ("max_recipients", "0", "'0': must be a whole number from 1 to 100000"),
    ("max_recipients", "100001", "'100001': must be a whole number from 1 to 100000"),
    ("max_recipients", "1e3", "'1e3': must be a whole number from 1 to 100000"),
    ("max_recipients", "٣", "'٣': must be a whole number from 1 to 100000"),
    ("max_connections", "0", "'0': must be a whole number from 1 to 1000000"),
    ("max_connections", "1000001", "'1000001': must be a whole number from 1 to 1000000"),
    ("max_connections_per_ip", "0", "'0': must be a whole number from 1 to 1000000"),
    ("max_connections_per_ip", "1000001", "'1000001': must be a whole number from 1 to 1000000"),
    ("max_connection_rate", "-1", "'-1': must be a whole number from 0 to 1000000"),
    ("max_connection_rate", "1000001", "'1000001': must be a whole number from 0 to 1000000"),
    ("max_errors", "0", "'0': must be a whole number from 1 to 1000000"),
    ("max_errors", "1000001", "'1000001': must be a whole number from 1 to 1000000"),
    ("recipient_delimiter", "@", "'@': must be ASCII characters without @, blanks and quotation marks"),
    ("recipient_delimiter", "+ -", "'+ -': must be ASCII characters without @, blanks and quotation marks"),
    ("recipient_delimiter", "§", "'§': must be ASCII characters without @, blanks and quotation marks"),
    ("subdomains", "maybe", "'maybe': must be yes or no"),
    ("mixed_recipients", "last", "'last': must be first or defer"),
    ("bare_newline", "accept", "'accept': must be normalize or reject"),
    ("extensions", "DSN", "'DSN': must be SMTPUTF8, CHUNKING or 8BITMIME"),
    ("extensions", "SMTPUTF8", "SMTPUTF8 cannot be offered without 8BITMIME (RFC 6531 §3.1)"),
    ("strict_8bitmime", "maybe", "'maybe': must be yes or no"),
    ("kept_upstreams", "0", "'0': must be a whole number from 1 to 100"),
    ("kept_upstreams", "101", "'101': must be a whole number from 1 to 100"),
    ("upstream_tls", "yes", "'yes': must be auto, always, require or never"),
    ("upstream_tls_ca", "none.pem", "cannot read {directory}/none.pem: No such file or directory"),
    ("upstream_tls_ca", "/", "cannot read /: Is a directory"),
    ("upstream_tls_ca", "/dev/null", "cannot read /dev/null: not a regular file"),
    ("xclient", "yes", "'yes': must be try, require or no"),
    ("send_proxy", "v3", "'v3': must be no, v1 or v2"),
    ("server_order", "first", "'first': must be listed or random"),
    ("proxy_protocol_hosts", "lb.example", f"'lb.example': {NETWORK}"),
    ("proxy_protocol_hosts", "192.0.2.0/33", f"'192.0.2.0/33': {NETWORK}"),
    ("xclient_hosts", "192.0.2.7/24", "'192.0.2.7/24': has bits behind its prefix; did you mean '192.0.2.0/24'?"),
    ("status_listen", "8025", f"'8025': {ADDRESS}"),
    ("status_listen", ":1, :2", COMMA),
    ("domain", "a.example, b.example", COMMA),
    ("domain", "a.example#x", HASH),
    ("domain", "#x", COMMENT),
    ("recipient_delimiter", "#", COMMENT),
    ("recipient_delimiter", " \t#+", COMMENT),
    ("listen", "# :25", COMMENT),
    ("domain", '"a.example', 'quote the whole value, as in "a, b"'),
]


@pytest.mark.parametrize(("key", "written", "why"), BAD)
def test_a_bad_value_is_named_with_its_file_line_and_key(faults, directory, key, written, why):
    separator = "" if written.startswith("#") else " "
    expected = [f"willi.conf:2: {key}: {why.format(directory=directory)}"]
    assert [line for line in faults(f"\n{key} ={separator}{written}\n") if "as many" not in line] == expected


def test_every_key_has_a_good_and_a_bad_value_here():
    read_from_files = {"tls_cert", "tls_key", "upstream_tls_ca"}  # below
    assert {key for key, _, _ in GOOD} | read_from_files == TOP_KEYS.keys()
    assert {key for key, _, _ in BAD} == TOP_KEYS.keys()


def test_certificates_are_pairs_with_names_relative_to_the_file(load, directory):
    for name in ("a.crt", "a.key", "b.crt", "b.key"):
        (directory / name).touch()
    settings = load(f"tls_cert = a.crt, {directory}/b.crt\ntls_key = a.key, b.key\nupstream_tls_ca = a.crt\n")
    assert settings.certificates == (
        Certificate(f"{directory}/a.crt", f"{directory}/a.key"),
        Certificate(f"{directory}/b.crt", f"{directory}/b.key"),
    )
    assert settings.mappings[0].policy == Policy(upstream_tls_ca=f"{directory}/a.crt")


def test_relative_names_do_not_depend_on_the_working_directory(load, directory, monkeypatch):
    load("", "[mappings]\n[[m]]\ntype = csv\nfile = map.csv\n")
    monkeypatch.chdir("/")
    (mapping,) = config.load(str(directory / "willi.conf")).mappings
    assert mapping == CsvSettings("m", Policy(), f"{directory}/willi.conf:4", f"{directory}/map.csv")


@pytest.mark.parametrize(
    ("text", "line", "numbers"),
    [
        ("tls_cert = a, a\ntls_key = a\n", 2, "1, not 2"),
        ("tls_key = a\n", 1, "1, not 0"),
        ("tls_cert = a\n", 1, "0, not 1"),
    ],
)
def test_each_certificate_needs_a_key(faults, directory, text, line, numbers):
    (directory / "a").touch()
    assert faults(text) == [f"willi.conf:{line}: tls_key: must be as many files as tls_cert: {numbers}"]


def test_a_certificate_that_is_not_there_is_one_fault_and_not_two(faults, directory):
    (directory / "a").touch()
    assert faults("tls_cert = a, b\ntls_key = a\n") == [
        f"willi.conf:1: tls_cert: cannot read {directory}/b: No such file or directory"
    ]


@pytest.mark.parametrize("user", ["", "user =\n"])
def test_a_group_without_a_user_would_be_ignored_and_is_a_fault(faults, user):
    assert faults(f"group = root\n{user}") == [
        "willi.conf:1: group: needs user as well: without it the workers keep the user of the master"
    ]


# Mappings


def test_mappings_keep_the_order_of_the_file_and_may_have_the_same_keys(load):
    settings = load(
        "",
        """
        [mappings]
            [[second town]]   # a comment
            type = static
            server = a.example:26
            [[first]]
            type = static
            server = "b.example, [2001:db8::1]:27, mx:c.example"
            tls_verify = no
        """,
    )
    assert settings.mappings == (
        StaticSettings("second town", Policy(), (Server("a.example", 26),), True),
        StaticSettings(
            "first", Policy(), (Server("b.example"), Server("2001:db8::1", 27), Server("c.example", mx=True)), False
        ),
    )


def test_a_mapping_overrides_what_it_says_and_keeps_the_rest(load):
    settings = load(
        "upstream_tls = always\nsend_proxy = v1\n",
        "[mappings]\n[[a]]\ntype = csv\nfile = /x\nxclient = require\nsend_proxy = no\n[[b]]\ntype = csv\nfile = /x\n",
    )
    assert [mapping.policy for mapping in settings.mappings] == [
        Policy("always", "", "require", "no"),
        Policy("always", "", "try", "v1"),
    ]


DATABASE = "type = mysql\nquery = SELECT server FROM t WHERE pattern = ?\n"


def test_a_database_has_these_defaults(load):
    assert mapping_of(load, DATABASE) == MysqlSettings(
        name="m", policy=Policy(), host=(Address("localhost", 0),), port=3306, unix_socket="", user="", password="",
        password_file="", database="", tls_ca="", pool_size=5, timeout=5.0,
        query="SELECT server FROM t WHERE pattern = ?", cache_ttl=60.0, cache_size=100_000, stale_ttl=HOUR,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("written", "attribute", "value"),
    [
        ("host = a, b:3307", "hosts", (Address("a", 3306), Address("b", 3307))),
        ("host = a, [2001:db8::1]\nport = 3308", "hosts", (Address("a", 3308), Address("2001:db8::1", 3308))),
        ("", "hosts", (Address("localhost", 3306),)),
        ("host = my_db", "hosts", (Address("my_db", 3306),)),
        ("host = db.example.", "hosts", (Address("db.example.", 3306),)),
        ("host = db1.example", "hosts", (Address("db1.example", 3306),)),
        ("host = 192.0.2.1:1", "hosts", (Address("192.0.2.1", 1),)),
        ("port = 65535", "port", 65535),
        ("unix_socket = /run/mysqld.sock", "unix_socket", "/run/mysqld.sock"),
        ("user = willi", "user", "willi"),
        ('password = "a,b#c"', "password", "a,b#c"),
        ('password = "#secret"', "password", "#secret"),
        ('password = "" # none', "password", ""),
        ("password = %(home)s$x", "password", "%(home)s$x"),
        ("password_file = /etc/passwd", "password_file", "/etc/passwd"),
        ("database = mail", "database", "mail"),
        ("tls_ca = /etc/passwd", "tls_ca", "/etc/passwd"),
        ("pool_size = 1", "pool_size", 1),
        ("pool_size = 1000", "pool_size", 1000),
        ("timeout = 0.5s", "timeout", 0.5),
        ("cache_ttl = 0s", "cache_ttl", 0.0),
        ("cache_ttl = 24h", "cache_ttl", 24 * HOUR),
        ("cache_size = 1", "cache_size", 1),
        ("cache_size = 10000000", "cache_size", 10_000_000),
        ("stale_ttl = 0s", "stale_ttl", 0.0),
        ("stale_ttl = 168h", "stale_ttl", 168 * HOUR),
    ],
)
def test_a_good_value_of_a_database_is_taken(load, written, attribute, value):
    assert getattr(mapping_of(load, DATABASE + written), attribute) == value


def test_a_query_may_have_commas_in_quotation_marks_and_several_lines(load):
    text = '"""SELECT server,  # all of them\n\'true\' AS tls_verify\n[FROM] t WHERE pattern = ?"""'
    mapping = mapping_of(load, f"type = sql\nquery = {text}\nuser = willi")
    assert mapping.query == text.strip('"')
    assert mapping.user == "willi"


def test_a_password_is_not_shown_with_the_settings(load):
    assert "geheim" not in repr(mapping_of(load, f"{DATABASE}password = geheim"))


BRACKETS = "an IPv6 address needs brackets, as in [2001:db8::1] or [2001:db8::1]:25"
QUERY = "has no ?, which stands for the address or domain to look up"
QUOTED = "has quotation marks around the ?, which make it a plain question mark: leave them out"
CONNECTION = "is now written as host, port, user, password, database and tls_ca"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("type = csv", "2: file: is missing in [[m]]"),
        ("type = static", "2: server: is missing in [[m]]"),
        ("type = mysql", "2: query: is missing in [[m]]"),
        ("type = sqlite\nquery = SELECT server FROM t WHERE p = ?", "2: file: is missing in [[m]]"),
        ("type = sqlite\nfile = x.db", "2: query: is missing in [[m]]"),
        ("type = csv\nfile =", "4: file: is empty"),
        ("type = csv\nfile = a\0b", "4: file: has a NUL"),
        ("type = sqlite\nfile = x.db\nquery = SELECT server FROM t", f"5: query: {QUERY}"),
        ("file = x.csv", "2: type: is missing; must be static, csv, sqlite or mysql"),
        ("type =", "3: type: '': must be static, csv, sqlite or mysql"),
        ("type = ldap", "3: type: 'ldap': must be static, csv, sqlite or mysql"),
        ("type = csv, static", f"3: type: {COMMA}"),
        ("type = static\nserver = a, b", f"4: server: {COMMA}"),
        ("type = static\nserver = a:0", "4: server: 'a:0': the port must be 1 to 65535"),
        ("type = static\nserver = a\ntls_verify = maybe", "5: tls_verify: 'maybe': tls_verify must be true or false"),
        ("type = csv\nfile = a\nserver = b", "5: server: only for type = static"),
        ("type = csv\nfile = a\nxclient = yes", "5: xclient: 'yes': must be try, require or no"),
        ("type = csv\nfile = a\n[[[x]]]", f"5: [[[x]]]: {SECTIONS}"),
        ("type = csv\nfile = a\ntype = csv", "5: type: is in line 3 already"),
        ("type = csv\nfile = a\nlisten = :25", "5: listen: belongs to the top of the file, above [mappings]"),
        ("type = csv\nfle = a\nfile = b", "4: fle: unknown key; did you mean 'file'?"),
        ("type = csv\nfile = b\nread_timeot = 5m", "5: read_timeot: unknown key; did you mean 'read_timeout'?"),
        (f"{DATABASE}connection = x", f"5: connection: {CONNECTION}"),
        (f"{DATABASE}host =", "5: host: is empty"),
        (f"{DATABASE}host = :3306", "5: host: ':3306': not a host name"),
        (f"{DATABASE}host = a:65536", "5: host: 'a:65536': the port must be 1 to 65535"),
        (f"{DATABASE}host = 2001:db8::1", f"5: host: '2001:db8::1': {BRACKETS}"),
        (f"{DATABASE}host = db.example,a/b", "5: host: 'a/b': not a host name"),
        (f"{DATABASE}host = [db", "5: host: '[db': must be host, host:port or [IPv6 address]:port"),
        (f"{DATABASE}port = 0", "5: port: '0': must be a whole number from 1 to 65535"),
        (f"{DATABASE}port = 65536", "5: port: '65536': must be a whole number from 1 to 65535"),
        (f"{DATABASE}host = a\nunix_socket = /x", "6: unix_socket: cannot be used together with host"),
        (
            f"{DATABASE}password = a\npassword_file = /etc/passwd",
            "6: password_file: cannot be used together with password",
        ),
        (f"{DATABASE}password_file = /none", "5: password_file: cannot read /none: No such file or directory"),
        (f"{DATABASE}password = abc#def", f"5: password: {HASH}"),
        (f"{DATABASE}password = #secret", f"5: password: {COMMENT}"),
        (f"{DATABASE}password =#secret", f"5: password: {COMMENT}"),
        (f"{DATABASE}tls_ca = /none", "5: tls_ca: cannot read /none: No such file or directory"),
        (f"{DATABASE}pool_size = 0", "5: pool_size: '0': must be a whole number from 1 to 1000"),
        (f"{DATABASE}pool_size = 1001", "5: pool_size: '1001': must be a whole number from 1 to 1000"),
        (f"{DATABASE}timeout = 0s", f"5: timeout: '0s': {ONE_HOUR}"),
        (f"{DATABASE}cache_ttl = 1441m", "5: cache_ttl: '1441m': must be at most 24h"),
        (f"{DATABASE}cache_size = 0", "5: cache_size: '0': must be a whole number from 1 to 10000000"),
        (f"{DATABASE}cache_size = 10000001", "5: cache_size: '10000001': must be a whole number from 1 to 10000000"),
        (f"{DATABASE}stale_ttl = 169h", "5: stale_ttl: '169h': must be at most 168h"),
        ("type = mysql\nquery = SELECT server FROM t", f"4: query: {QUERY}"),
        ("type = mysql\nquery = \"SELECT a FROM t WHERE p = '?'\"", f"4: query: {QUOTED}"),
        ("type = mysql\nquery = SELECT a, b FROM t WHERE p = ?", f"4: query: {COMMA}"),
        ("type = mysql\nquery = SELECT a, 'true' FROM t WHERE p = ?", f"4: query: {QUOTE}"),
    ],
)
def test_a_fault_in_a_mapping_is_one_line(faults, text, fault):
    assert faults("", f"[mappings]\n[[m]]\n{text}\n") == [f"willi.conf:{fault}"]


# The file as a whole


def test_all_faults_are_told_at_once_in_the_order_of_the_file(faults):
    text = """\
loglevl = info
listen = :25, 26
listen = :27
read_timeout = 10
file = a.csv
something else
log: syslog
xyzzy = 1
[mapping]
[mappings]
type = csv
[[a]]
type = csv
server = mx.example
file = a.csv
[[b]]
type = mysql
password = geheim
query = SELECT a, 'b' FROM geheim WHERE p = ?
domain = mx.example
[[a]]
type = static
"""
    assert faults(text, "") == [
        "willi.conf:1: loglevl: unknown key; did you mean 'loglevel'?",
        f"willi.conf:2: listen: '26': {ADDRESS}",
        "willi.conf:3: listen: is in line 2 already",
        f"willi.conf:4: read_timeout: '10': {TIME}",
        "willi.conf:5: file: belongs to a mapping, below its line [[name]]",
        "willi.conf:6: something: must be written as key = value",
        "willi.conf:7: log: must be written as key = value",
        "willi.conf:8: xyzzy: unknown key",
        f"willi.conf:9: [mapping]: {SECTIONS}",
        "willi.conf:11: type: belongs to a mapping, below its line [[name]]",
        "willi.conf:14: server: only for type = static",
        f"willi.conf:19: query: {QUOTE}",
        "willi.conf:20: domain: belongs to the top of the file, above [mappings]",
        "willi.conf:21: [[a]]: is in line 12 already",
    ]


def test_of_another_file_not_every_line_is_told(faults):
    *told, rest = faults("pattern;server\n" * (MAX_FAULTS + 7), "")
    assert told == [f"willi.conf:{n}: pattern;server: {EQUALS}" for n in range(1, MAX_FAULTS + 1)]
    assert rest == "willi.conf: and 8 more: is it another file?"  # one is that there is no mapping


def test_a_section_line_that_cannot_be_placed_hides_what_is_below_it(faults):
    text = "loglevel: info\n[[a]]\ntype = csv\nfile = a\nlog = file\n"
    assert faults(text, "") == [
        "willi.conf:1: loglevel: must be written as key = value",
        f"willi.conf:2: [[a]]: {SECTIONS}",
    ]


@pytest.mark.parametrize("line", ["[mappings", "[[x]", "[[a=b]]", "[]", "[[b] # was = c"])
def test_a_malformed_section_line_is_a_fault(faults, line):
    assert faults(f"{line}\n", "") == [f"willi.conf:1: {line}: {SECTIONS}"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("domain = mx.example\n[domain]\nx = y\n[mappings]\n[[b]]\n", f"2: [domain]: {SECTIONS}"),
        (f"{MAPPING}[[[server]]]\nx = y\n[[b]]\ntype = csv\nfile = b\n", f"5: [[[server]]]: {SECTIONS}"),
    ],
)
def test_a_section_with_the_name_of_a_key_is_a_fault_and_hides_no_mapping(faults, text, fault):
    assert faults(text, "") == [f"willi.conf:{fault}"]


def test_a_key_that_begins_like_a_section_is_told_how_one_is_written(faults):
    assert faults("[b = 1\n") == [f"willi.conf:1: [b: {SECTIONS}"]


def test_a_mapping_that_is_there_twice_hides_what_is_below_it_and_nothing_above(faults):
    text = "log = file\n[mappings]\n[[a]]\ntype = csv\n[[a]]\nserver = b\ntype = static\n[[c]]\nx = y\n"
    assert faults(text, "") == [
        "willi.conf:1: log: 'file': must be stdout or syslog",
        "willi.conf:5: [[a]]: is in line 3 already",
    ]


def test_the_line_of_a_key_is_right_below_a_value_of_several_lines(faults):
    query = 'query = """SELECT server\n[[x]]\npool_size = 7\nFROM t WHERE pattern = ?"""'
    text = f"[mappings] # all\n  [[ a ]]\n  type = mysql\n  {query}\n  'pool_size' = 0\n  query = b\n"
    assert faults("# pool_size = 0\n", text) == [
        "willi.conf:9: pool_size: '0': must be a whole number from 1 to 1000",
        "willi.conf:10: query: is in line 5 already",
    ]


def test_quotation_marks_that_are_never_closed_are_told_where_they_open(faults):
    text = '[mappings]\n[[m]]\ntype = mysql\nquery = """SELECT\nuser = x\n'
    assert faults(text, "") == [f"willi.conf:4: query: {QUOTE}"]


def test_mappings_may_be_opened_once(faults):
    assert faults(MAPPING, "[mappings]\n[[b]]\ntype = csv\nfile = a\n") == [
        "willi.conf:5: [mappings]: is in line 1 already"
    ]


@pytest.mark.parametrize(("text", "line"), [("", 1), ("log = stdout\n\n", 1), ("log = stdout\n[mappings]\n\n", 2)])
def test_a_file_without_a_mapping_is_told_what_to_add(faults, text, line):
    assert faults(text, "") == [f"willi.conf:{line}: [mappings]: {NO_MAPPING}"]


def test_mappings_as_a_key_is_told_to_be_a_section(faults):
    assert faults("mappings = csv\n") == ["willi.conf:1: mappings: is a section: write [mappings]"]


def test_a_file_of_the_go_program_is_recognised(faults):
    text = """\
loglevel: info
read_timeout: 10s
mappings: [
    {
        type: sql
        connection: root:password@tcp(mysqlserver:3306)/mail?tls=true
        query: SELECT server, 'true' AS tls_verify FROM mx_external_servers WHERE pattern = ?
    },
]
"""
    assert faults(text, "") == [f"willi.conf:3: mappings: {OLD_FILE}"]


def test_a_key_in_capitals_is_unknown_and_its_neighbour_is_named(faults):
    assert faults("LogLevel = info\n") == ["willi.conf:1: LogLevel: unknown key; did you mean 'loglevel'?"]


def test_a_missing_file_is_a_fault():
    with pytest.raises(ConfigError) as error:
        config.load("none.conf")
    assert error.value.faults == ["none.conf: cannot read it: No such file or directory"]


def test_a_directory_is_a_fault():
    with pytest.raises(ConfigError) as error:
        config.load(".")
    assert error.value.faults == [".: cannot read it: Is a directory"]


def test_a_pipe_or_device_is_a_fault_at_once():
    """Opening one could keep a master that reloads waiting, it is empty the next time, and no file lies beside it."""
    ours, theirs = os.pipe()
    os.write(theirs, MAPPING.encode())
    os.close(theirs)
    for path in (f"/dev/fd/{ours}", "/dev/null"):
        with pytest.raises(ConfigError) as error:
            config.load(path)
        assert str(error.value) == f"{path}: cannot read it: not a regular file"
    os.close(ours)


def test_octets_that_are_not_utf8_are_told_with_their_line(directory):
    (directory / "willi.conf").write_bytes(b"log = stdout\n# M\xfcnchen\n")
    with pytest.raises(ConfigError) as error:
        config.load("willi.conf")
    assert error.value.faults == ["willi.conf:2: must be UTF-8"]


def test_a_byte_order_mark_and_crlf_change_nothing(load, directory):
    expected = load("log = syslog\n")
    (directory / "willi.conf").write_bytes(b"\xef\xbb\xbf" + f"log = syslog\n{MAPPING}".replace("\n", "\r\n").encode())
    assert config.load("willi.conf") == expected


LINES = st.one_of(
    st.sampled_from(
        [*MAPPING.splitlines(), "listen = :25", 'query = """SELECT', '?"""', "[[b]]", "# c", "log = a, 'b"]
    ),
    st.text(alphabet="[]=\"'#@:, \tab\r\0é\u2028%\\", max_size=12),
)


@given(st.lists(LINES, max_size=12))
def test_any_text_is_settings_or_faults_of_one_line_each(lines):
    faults: list[str] = []
    try:
        Reader("willi.conf", "\n".join(lines)).settings()
    except ConfigError as error:
        faults = error.faults or ["none"]
    assert all(fault.startswith("willi.conf:") and "\n" not in fault for fault in faults)


# CPUs


@pytest.mark.parametrize(("groups", "files", "quota"), [
    # any level may have one, the smallest counts
    ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 1.5),
    ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000"}, 0.5),
    ("0::/a", {"a/cpu.max": "max 100000", "b/cpu.max": "1 100000"}, inf),
    # in a container, which does not see what is above its own group
    ("0::/", {"cpu.max": "200000 100000"}, 2),
    ("0::/../x", {"cpu.max": "200000 100000"}, 2),
    ("0::/docker/1", {"cpu.max": "200000 100000"}, 2),
    # nonsense and nothing
    ("0::/a", {}, inf),
    ("nonsense", {"cpu.max": "1 100000"}, inf),
    ("4:cpu,cpuacct:/a\n3:memory:/b", {"cpu.max": "1 100000"}, inf),
    ("0::/a", {"a/cpu.max": "nonsense"}, inf),
    ("0::/a", {"a/cpu.max": "0 0"}, inf),
])  # fmt: skip
def test_a_quota_of_cpus_is_that_of_the_control_groups(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float
):
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text + "\n")
    (tmp_path / "groups").write_text(groups + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "mounted") == quota


def test_without_proc_there_is_no_quota(tmp_path: Path):
    assert cpu_quota(tmp_path / "none", tmp_path) == inf


@pytest.mark.parametrize(("quota", "workers"), [(0.01, 1), (1.0, 1), (1.5, min(2, CPUS)), (inf, CPUS)])
def test_auto_is_no_more_workers_than_the_quota_rounded_up(load, monkeypatch, quota: float, workers: int):
    monkeypatch.setattr(cpus, "cpu_quota", lambda *_: quota)
    assert load("workers = auto\n").workers == workers


# What is quoted from the file


@pytest.mark.parametrize(("line", "shown"), [
    ("dom\u200bain = mx.example", r"dom\u200bain: unknown key; did you mean 'domain'?"),
    ("domain\u3164 = mx.example", r"domain\u3164: unknown key; did you mean 'domain'?"),
    ("dom\x1b[2Jain = x", r"dom\x1b[2Jain: unknown key"),
    ("loglevel = \u202egubed", r"loglevel: '\u202egubed': has the invisible"),
    ("loglevel = in\u115ffo", r"loglevel: 'in\u115ffo': has the invisible"),
    ("[map\u00adpings]", r"[map\u00adpings]"),
    ("tls_cert = no\u2028where.pem", r"tls_cert: 'no\u2028where.pem': has the invisible"),
])  # fmt: skip
def test_what_cannot_be_seen_in_the_file_can_be_seen_in_its_faults(faults, line: str, shown: str):
    found = faults(f"{line}\n")
    assert any(fault.startswith(f"willi.conf:1: {shown}") for fault in found), found
    assert all(fault == visible(fault) and len(fault.splitlines()) == 1 for fault in found)


@pytest.mark.parametrize("key", ["domain", "user", "listen", "tls_min_version", "xclient_hosts"])
def test_an_invisible_character_in_a_value_is_named_with_its_line(faults, key):
    (fault,) = faults(f"read_timeout = 5m\n{key} = mx.ex\u200bample\n")
    why = "has the invisible character U+200B ZERO WIDTH SPACE: delete it"
    assert fault == f"willi.conf:2: {key}: 'mx.ex\\u200bample': {why}"


def test_an_invisible_character_in_a_mapping_is_named_but_a_password_may_have_one(faults, load):
    section = "[mappings]\n[[m]]\ntype = mysql\nquery = SELECT server FROM t{} WHERE p = ?\npassword = a\u00a0b\n"
    (fault,) = faults("", section.format("\u00a0"))
    assert ": query: 'SELECT server FROM t\\xa0 WHERE p = ?': has the invisible character U+00A0" in f": {fault}"
    (mapping,) = load("", section.format("")).mappings
    assert mapping.password == "a\u00a0b"
