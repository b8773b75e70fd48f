"""Names and addresses, from a name server of our own on a loopback port."""

from __future__ import annotations

import gc
import ipaddress
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.nameserver
import gevent
import gevent.socket
import pytest

from tests.support.descriptors import Descriptors
from tests.support.dns import DnsServer, Fault
from tests.support.loopback import HOST, PATIENCE, ROOT, free_port
from willi_lib import files
from willi_lib.net import resolver as module
from willi_lib.net.resolver import MAX_ENTRIES, Cache, DnsFailed, Resolver
from willi_lib.smtp.xclient import TEMPUNAVAIL, UNAVAILABLE

CLIENT, CLIENT6 = "192.0.2.1", "2001:db8::1"
TIMEOUT = 1.0  # seconds, where no answer comes


@pytest.fixture
def server() -> Iterator[DnsServer]:
    server = DnsServer()
    yield server
    server.stop()


@pytest.fixture
def resolver(server: DnsServer) -> Resolver:
    return Resolver(PATIENCE, (server.address, server.port))


@pytest.fixture
def hasty(server: DnsServer) -> Resolver:
    return Resolver(TIMEOUT, (server.address, server.port))


def reverse(address: str) -> str:
    return ipaddress.ip_address(address).reverse_pointer


def questions(server: DnsServer, kind: str) -> list[str]:
    return [name for name, asked in server.queries if asked == kind]


def mx_hosts(resolver: Resolver, domain: str) -> list[str]:
    return [host for _, host in resolver.mx_of(domain)]


def test_the_record_types_that_are_read_are_loaded_at_the_start():
    """A worker without descriptors, or whose files an upgrade has replaced, could not load them later."""
    code = (
        "import sys; from willi_lib.net import resolver; from dns import rdata, rdataclass, rdatatype, rdtypes; "
        "rdtypes.__path__ = rdtypes.ANY.__path__ = []; "
        "print(*(rdata.get_rdata_class(rdataclass.IN, rdatatype.from_text(kind)).__name__ for kind in sys.argv[1:]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, "MX", "PTR", "CNAME", "SOA"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    assert said.stdout.split() == [b"MX", b"PTR", b"CNAME", b"SOA"]


# A client's name


@pytest.mark.parametrize("address", [CLIENT, CLIENT6])
def test_a_name_that_leads_back_to_the_address_is_the_clients(server, resolver, address):
    server.host("c.example", address)
    assert resolver.start_name_of(address)() == "c.example"


def test_names_that_are_asked_for_together_fail_together_if_nobody_listens_at_the_name_server(capfd):
    """c-ares then tells before its call returns: gevent would be woken from itself, complain, and wait for ever."""
    resolver = Resolver(TIMEOUT, (HOST, free_port()))
    asking = [gevent.spawn(resolver._ares.gethostbyaddr, f"192.0.2.{number}") for number in range(8)]
    gevent.joinall(asking, timeout=60)
    assert [type(asked.exception) for asked in asking] == [socket.herror] * 8
    assert "AssertionError" not in capfd.readouterr().err


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_the_addresses_of_this_host_are_found(resolver, host):
    assert {address for _, address in resolver.addresses_of(host)} <= {"127.0.0.1", "::1"} != set()


def test_a_name_is_told_in_lower_case(server, resolver):
    server.host("c.example", CLIENT)
    server.reverse(CLIENT, "C.Example")
    assert resolver.start_name_of(CLIENT)() == "c.example"


@pytest.mark.parametrize("forward", [
    {"A": ["192.0.2.2"]}, {"AAAA": [CLIENT6]}, {"TXT": ["no address"]}, {}, Fault.NXDOMAIN,
])  # fmt: skip
def test_a_name_that_leads_elsewhere_or_nowhere_is_not_the_clients(server, resolver, forward):
    server.reverse(CLIENT, "c.example")
    server.zone["c.example"] = forward
    assert resolver.start_name_of(CLIENT)() == UNAVAILABLE


@pytest.mark.parametrize("records", [Fault.NXDOMAIN, {}, {"TXT": ["no name"]}])
@pytest.mark.parametrize("address", [CLIENT, CLIENT6])
def test_an_address_without_a_name_has_none(server, resolver, address, records):
    server.zone[reverse(address)] = records
    assert resolver.start_name_of(address)() == UNAVAILABLE


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.REFUSED, Fault.SILENCE])
@pytest.mark.parametrize("address", [CLIENT, CLIENT6])
def test_a_server_that_fails_is_no_proof_that_there_is_no_name(server, hasty, address, fault):
    server.zone[reverse(address)] = fault
    assert hasty.start_name_of(address)() == TEMPUNAVAIL


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.REFUSED, Fault.SILENCE])
def test_nor_is_one_that_fails_when_the_name_is_to_be_confirmed(server, hasty, fault):
    server.reverse(CLIENT, "c.example")
    server.zone["c.example"] = fault
    assert hasty.start_name_of(CLIENT)() == TEMPUNAVAIL


@pytest.mark.parametrize(("address", "forward"), [
    (CLIENT, {"A": Fault.SERVFAIL, "AAAA": [CLIENT6]}), (CLIENT6, {"AAAA": Fault.SERVFAIL, "A": [CLIENT]}),
])  # fmt: skip
def test_nor_is_one_that_fails_for_the_clients_kind_of_address_only(server, hasty, address, forward):
    """The host has both kinds, and the other one leads elsewhere."""
    server.reverse(address, "c.example")
    server.zone["c.example"] = forward
    assert hasty.start_name_of(address)() == TEMPUNAVAIL


def test_nor_is_a_server_that_does_not_run():
    assert Resolver(TIMEOUT, (HOST, free_port())).start_name_of(CLIENT)() == TEMPUNAVAIL


def test_the_time_counts_from_the_beginning(server, hasty):
    server.zone[reverse(CLIENT)] = Fault.SILENCE
    another, name = hasty.start_name_of(CLIENT), hasty.start_name_of(CLIENT)
    assert another() == TEMPUNAVAIL
    waiting = gevent.spawn(name)
    for _ in range(20):  # turns of the loop, which take no time
        gevent.sleep(0)
    assert waiting.ready() and waiting.get() == TEMPUNAVAIL


@pytest.mark.parametrize("name", [
    "-bad.example", "bad-.example", "b!d.example", r"b\032d.example", r"b\010d.example", r"\255.example",
    r"b\.d@.example",
    "192.0.2.1", "1", "x" * 63 + ".x=y", "*.example",
])  # fmt: skip
def test_a_name_that_no_host_can_have_is_none(server, resolver, name):
    server.reverse(CLIENT, name)
    server.zone[name] = {"A": [CLIENT]}
    assert resolver.start_name_of(CLIENT)() == UNAVAILABLE


def test_of_several_names_one_that_leads_back_is_the_clients(server, resolver):
    server.host("c.example", CLIENT)
    server.zone[reverse(CLIENT)] = {"PTR": ["a.example.", "b!.example.", "c.example.", "d.example."]}
    assert resolver.start_name_of(CLIENT)() == "c.example"


def test_an_address_with_very_many_names_does_not_make_us_ask_for_all_of_them(server, resolver):
    server.zone[reverse(CLIENT)] = {"PTR": [f"{number}.c.example." for number in range(15)]}
    assert resolver.start_name_of(CLIENT)() == UNAVAILABLE
    assert len(questions(server, "A")) == module.MAX_NAMES


def test_a_hundred_sessions_at_once_ask_one_question(server, resolver):
    server.host("c.example", CLIENT)
    names = [resolver.start_name_of(CLIENT) for _ in range(100)]
    sessions = [gevent.spawn(name) for name in names]
    assert {session.get() for session in sessions} == {"c.example"}
    assert resolver.start_name_of(CLIENT)() == "c.example"
    assert questions(server, "PTR") == [reverse(CLIENT)]
    assert resolver._asking == {}


def test_a_failure_is_not_asked_again_by_the_next_session(server, hasty):
    server.zone[reverse(CLIENT)] = Fault.SILENCE
    assert hasty.start_name_of(CLIENT)() == TEMPUNAVAIL
    gevent.idle()  # the first question has ended, too
    server.host("c.example", CLIENT)  # it would answer now; and counting queries would count late repetitions
    assert hasty.start_name_of(CLIENT)() == TEMPUNAVAIL


def test_a_failure_does_not_keep_its_session_alive(resolver):
    """An exception that a frame of its traceback keeps would: only the garbage collector ends such a cycle."""

    class Session:
        pass

    def fails(look: Callable[[str], object]) -> weakref.ref[Session]:
        session = Session()
        with pytest.raises(DnsFailed):
            look("none.example")
        return weakref.ref(session)

    gc.disable()
    try:
        sessions = [fails(look) for look in (resolver.addresses_of, resolver.mx_of)]
        gevent.sleep(0)  # gevent's callback, in which we are, holds the failure
        assert [session() for session in sessions] == [None, None]
    finally:
        gc.enable()


def test_without_a_descriptor_a_failure_is_not_kept_and_called_what_it_is(server, resolver):
    server.host("c.example", CLIENT)
    server.zone["b.example"] = {"MX": ["10 c.example."]}
    with Descriptors():
        assert resolver.start_name_of(CLIENT)() == TEMPUNAVAIL
        for look in (resolver.addresses_of, resolver.mx_of):
            with pytest.raises(DnsFailed, match=r"^no (address|MX) for b\.example: .*Too many open files$") as failure:
                look("b.example")
            assert failure.value.own_lack
    assert resolver.start_name_of(CLIENT)() == "c.example"


def test_sessions_do_not_wait_for_each_others_names(server):
    server.zone[reverse("192.0.2.9")] = Fault.SILENCE
    server.host("c.example", CLIENT)
    resolver = Resolver(6 * TIMEOUT, (server.address, server.port))
    slow = gevent.spawn(resolver.start_name_of("192.0.2.9"))
    gevent.idle()
    assert resolver.start_name_of(CLIENT)() == "c.example"
    assert not slow.ready()
    assert slow.get() == TEMPUNAVAIL


# Addresses of a host


def test_a_host_has_all_its_addresses_once(server, resolver):
    server.zone["mx.example"] = {"A": ["192.0.2.1", "192.0.2.2"], "AAAA": [CLIENT6]}
    found = resolver.addresses_of("mx.example")
    assert sorted(found) == [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "192.0.2.2"), (socket.AF_INET6, CLIENT6)]


@pytest.mark.parametrize(("address", "family"), [("192.0.2.1", socket.AF_INET), (CLIENT6, socket.AF_INET6)])
def test_an_address_is_its_own_address_and_needs_no_question(server, resolver, address, family):
    assert resolver.addresses_of(address) == [(family, address)]
    assert server.queries == []


def test_addresses_are_kept_for_a_while(server, resolver, monkeypatch):
    server.zone["mx.example"] = {"A": ["192.0.2.1"]}
    assert resolver.addresses_of("mx.example") == resolver.addresses_of("mx.example")
    assert questions(server, "A") == ["mx.example"]
    now = time.monotonic()
    monkeypatch.setattr(module, "monotonic", lambda: now + module.ADDRESS_TTL + 1)
    assert resolver._addresses.get("mx.example") is None


@pytest.mark.parametrize("host", ["mx.example", "x" * 64 + ".example", "a..example", "\udc80.example", ""])
def test_a_host_without_an_address_is_a_failure_that_says_which(server, resolver, host):
    with pytest.raises(DnsFailed, match=f"no address for {host}: "):
        resolver.addresses_of(host)


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.REFUSED])
def test_a_failure_to_find_an_address_is_not_kept(server, resolver, fault):
    server.zone["mx.example"] = fault
    with pytest.raises(DnsFailed, match=r"no address for mx\.example: "):
        resolver.addresses_of("mx.example")
    server.zone["mx.example"] = {"A": ["192.0.2.1"]}
    assert resolver.addresses_of("mx.example") == [(socket.AF_INET, "192.0.2.1")]


# The search list


@pytest.fixture
def with_search_list(server, tmp_path, monkeypatch) -> Resolver:
    """The resolver of a host whose resolv.conf says `search corp.example`, where every name exists."""
    monkeypatch.setenv("LOCALDOMAIN", "corp.example")  # which the C library and c-ares put in place of it
    for name in ("mx.example", "mail", "one.two.three"):
        server.zone[f"{name}.corp.example"] = {"A": ["192.0.2.66"], "MX": ["10 wrong.example."]}
    return Resolver(PATIENCE, (server.address, server.port))


@pytest.mark.parametrize("host", ["mx.example", "mx.example.", "one.two.three", "mail."])
def test_a_host_with_a_dot_is_never_looked_for_in_the_search_list(server, with_search_list, host):
    with pytest.raises(DnsFailed, match="no address for "):
        with_search_list.addresses_of(host)
    assert not [name for name, _ in server.queries if name.endswith("corp.example")]


def test_a_host_of_one_label_in_willi_conf_is(with_search_list):
    assert with_search_list.addresses_of("mail") == [(socket.AF_INET, "192.0.2.66")]


def test_an_mx_host_of_one_label_is_not(server, with_search_list):
    server.zone["b.example"] = {"MX": ["10 mail."]}
    server.zone["bare"] = {"A": ["192.0.2.1"]}
    assert mx_hosts(with_search_list, "b.example") == ["mail."]
    assert mx_hosts(with_search_list, "bare") == ["bare."]
    with pytest.raises(DnsFailed):
        with_search_list.addresses_of("mail.")


@pytest.mark.parametrize("name", ["mail", "mx.example"])
def test_the_name_of_a_client_is_not(server, with_search_list, name):
    server.reverse("192.0.2.66", name)
    assert with_search_list.start_name_of("192.0.2.66")() == UNAVAILABLE


def test_mx_is_not(with_search_list):
    with pytest.raises(DnsFailed, match=r"no MX for mx\.example: "):
        mx_hosts(with_search_list, "mx.example")


def test_other_sockets_of_the_process_keep_to_the_same_rules(server, with_search_list):
    hub = gevent.get_hub()
    before = hub.resolver
    try:
        with_search_list.serve_all_sockets()
        server.zone["db.example"] = {"A": [HOST]}
        with gevent.socket.create_server((HOST, 0)) as listener:
            gevent.socket.create_connection(("db.example", listener.getsockname()[1])).close()
        with pytest.raises(socket.gaierror):
            gevent.socket.create_connection(("mx.example", 1))
    finally:
        hub.resolver = before


# resolv.conf


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 192.0.2.1\nnameserver 2001:db8::1\nnameserver\tfe80::1%lo\n",
         ["192.0.2.1", "2001:db8::1", "fe80::1%lo"]),
        ("nameserver 192.0.2.1, 192.0.2.2\nnameserver 192.0.2.3 # ours\n", ["192.0.2.3"]),
        ("nameserver ns.example\nnameserver 192.0.2.1:53\nnameserver\nnameservers 192.0.2.4\n nameserver 192.0.2.5\n",
         []),
        ("search a..b\noptions timeout:x\nsortlist ?\n\0\ufffd\n", []),
        ("", []),
    ],
)  # fmt: skip
def test_a_line_of_resolv_conf_that_cannot_be_used_is_passed_over(text, servers):
    assert module.name_servers(text) == servers


@pytest.fixture
def resolv_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that dnspython's side follows; c-ares's reads the machine's own."""
    file = tmp_path / "resolv.conf"
    monkeypatch.setattr(module, "RESOLV_CONF", file)
    monkeypatch.setattr(module, "RESOLV_CONF_INTERVAL", 0.01)
    monkeypatch.setattr(files, "CALM", 0.05)
    return file


def until(condition: Callable[[], bool]) -> bool:
    with gevent.Timeout(PATIENCE):
        while not condition():
            gevent.sleep(0.01)
    return True


@pytest.mark.parametrize("before", [None, "", "nameserver 192.0.2.1\n"])
def test_a_changed_resolv_conf_is_read_again_and_old_answers_are_forgotten(resolv_conf, before):
    if before is not None:
        resolv_conf.write_text(before)
    resolver = Resolver(TIMEOUT)
    assert resolver._dnspython.nameservers == (["192.0.2.1"] if before else ["127.0.0.1"])
    resolver._mx.put("b.example", [(10, "mx.b.example")], 60)
    channel = resolver._ares.cares
    watcher = gevent.spawn(resolver.follow_resolv_conf)
    resolv_conf.write_text("nameserver 192.0.2.2\nnameserver odd\n")
    assert until(lambda: resolver._dnspython.nameservers == ["192.0.2.2"])
    assert resolver._mx.get("b.example") is None and resolver._ares.cares is not channel
    watcher.kill()


@pytest.mark.parametrize("text", [None, "", "# nothing yet\n"])
def test_a_resolv_conf_without_a_server_changes_nothing(resolv_conf, text, capfd):
    resolv_conf.write_text("nameserver 192.0.2.1\n")
    resolver = Resolver(TIMEOUT)
    watcher = gevent.spawn(resolver.follow_resolv_conf)
    resolv_conf.unlink() if text is None else resolv_conf.write_text(text)
    gevent.sleep(0.1)  # some looks
    assert resolver._dnspython.nameservers == ["192.0.2.1"] and not watcher.ready()
    resolv_conf.write_text("nameserver 192.0.2.2\n")
    assert until(lambda: resolver._dnspython.nameservers == ["192.0.2.2"])
    watcher.kill()


# MX hosts


def test_mx_works_while_two_of_three_name_servers_are_silent(server):
    """The resolver's time is shared among the servers, so that each is asked."""
    silent = [DnsServer(), DnsServer()]
    server.zone["b.example"] = {"MX": ["10 mx.b.example."]}
    for other in silent:
        other.zone["b.example"] = Fault.SILENCE
    resolver = Resolver(6 * TIMEOUT, (server.address, server.port))
    resolver._take_name_servers([HOST] * 3)
    ports = [*(other.port for other in silent), server.port]
    servers = [dns.nameserver.Do53Nameserver(HOST, port) for port in ports]
    resolver._dnspython.nameservers = servers
    assert mx_hosts(resolver, "b.example") == ["mx.b.example"]
    assert [len(other.queries) for other in silent] == [1, 1]
    for other in silent:
        other.stop()


def test_mx_hosts_come_in_the_order_of_their_preference_and_in_lower_case(server, resolver):
    server.zone["b.example"] = {"MX": ["20 mx2.b.example.", "5 MX0.b.example.", "10 mx1.b.example."]}
    assert mx_hosts(resolver, "b.example") == ["mx0.b.example", "mx1.b.example", "mx2.b.example"]


def test_mx_hosts_of_one_preference_share_the_load_also_while_they_are_kept(server, resolver):
    server.zone["b.example"] = {"MX": ["10 mx1.b.example.", "10 mx2.b.example.", "20 mx3.b.example."]}
    seen = {tuple(mx_hosts(resolver, "b.example")) for _ in range(50)}
    assert questions(server, "MX") == ["b.example"]
    assert {hosts[:2] for hosts in seen} == {("mx1.b.example", "mx2.b.example"), ("mx2.b.example", "mx1.b.example")}
    assert {hosts[2:] for hosts in seen} == {("mx3.b.example",)}


def test_a_domain_without_mx_is_its_own_host(server, resolver):
    server.zone["b.example"] = {"A": ["192.0.2.1"]}
    assert mx_hosts(resolver, "b.example") == ["b.example"]


def test_a_domain_with_a_null_mx_takes_no_mail(server, resolver):
    server.zone["b.example"] = {"MX": ["0 ."]}
    with pytest.raises(DnsFailed, match=r"b\.example takes no mail \(null MX\)"):
        mx_hosts(resolver, "b.example")


@pytest.mark.parametrize("fault", Fault)
def test_a_domain_that_does_not_exist_or_cannot_be_asked_for_is_a_failure(server, hasty, fault):
    server.zone["b.example"] = fault
    began = time.monotonic()
    with pytest.raises(DnsFailed, match=r"no MX for b\.example: "):
        mx_hosts(hasty, "b.example")
    assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("domain", ["x" * 64 + ".example", "a..example", ".".join(["x" * 60] * 5)])
def test_a_domain_that_dns_cannot_hold_is_a_failure(server, resolver, domain):
    with pytest.raises(DnsFailed, match="no MX for "):
        mx_hosts(resolver, domain)


def test_mx_hosts_are_kept_for_a_while(server, resolver):
    server.zone["b.example"] = {"MX": ["10 mx.b.example."]}
    assert mx_hosts(resolver, "b.example") == mx_hosts(resolver, "b.example")
    assert questions(server, "MX") == ["b.example"]


# The cache


def test_what_is_kept_too_long_is_not_told(monkeypatch):
    cache = Cache[str]()
    now = time.monotonic()
    monkeypatch.setattr(module, "monotonic", lambda: now)
    assert cache.put("key", "value", 10) == "value"
    assert cache.get("key") == "value"
    now += 10
    assert cache.get("key") is None


def test_the_cache_is_bounded_and_the_oldest_goes_first():
    cache = Cache[int]()
    for number in range(MAX_ENTRIES):
        cache.put(str(number), number, 60)
    cache.put("0", 0, 60)  # anew, so that 1 is the oldest
    assert cache.get("1") == 1
    cache.put("one more", 1, 60)
    assert [cache.get("0"), cache.get("1"), cache.get("2")] == [0, None, 2]
    assert len(cache._entries) == MAX_ENTRIES
