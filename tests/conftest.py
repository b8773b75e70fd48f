"""The fixtures. Whatever has a log shows it when the test fails; with CI=true nothing may be skipped."""

from __future__ import annotations

import itertools
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from tests.support.certificates import Authority, Pair
from tests.support.daemon import Setting, Willi
from tests.support.dns import DnsServer
from tests.support.examples import examples
from tests.support.loopback import HOST, need, steady_port
from tests.support.mariadb import Mariadb
from tests.support.postfix import Postfix
from tests.support.raw import RawUpstream
from tests.support.shared import SharedWillis
from tests.support.upstream import ScriptedUpstream

pytest_plugins = ("tests.runner.plugin",)

LOGS = pytest.StashKey[dict[str, Path]]()
SHOWN = 20_000  # characters of a log, from its end

StartWilli = Callable[..., Willi]
StartUpstream = Callable[..., ScriptedUpstream]
StartPostfix = Callable[..., Postfix]
TwoHosts = Callable[..., tuple[Willi, ScriptedUpstream, ScriptedUpstream, bytes]]
PAIRS = 60  # of hosts, more than the tests of a file that take one

# A loaded machine is no fault of the code; and a failure must come again at the next run.
hypothesis.settings.register_profile(
    "willi", deadline=None, derandomize=os.environ.get("CI") == "true", max_examples=examples(100)
)
hypothesis.settings.load_profile("willi")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """On failure add the logs that fixtures have named; with CI=true a skip is a failure."""
    report: pytest.TestReport = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, and with CI=true nothing may be: {report.longrepr}"
    if report.failed:
        for node in item.listchain():
            for title, path in node.stash.get(LOGS, {}).items():
                text = path.read_text(errors="backslashreplace") if path.exists() else "(gone)"
                report.sections.append((title, text[-SHOWN:]))
    return report


def show_on_failure(request: pytest.FixtureRequest, title: str, path: Path) -> None:
    """The file is printed if a test fails that this fixture serves."""
    request.node.stash.setdefault(LOGS, {})[f"{title} ({path.name})"] = path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """`ca`, `issue(*names)`, `expired(*names)`, `self_signed(*names)`."""
    need("openssl")
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start_upstream() -> Iterator[StartUpstream]:
    """Start scripted upstreams: start_upstream(port=0, tls=None, proxy=False).

    The first one of each test has the same port, and so on: see share_willi.
    """
    numbers = itertools.count(1)
    with ExitStack() as ends:

        def start(*arguments: object, **options: object) -> ScriptedUpstream:
            if not arguments and options.keys().isdisjoint(("port", "host")):
                options["port"] = steady_port(f"upstream {next(numbers)}")
            upstream = ScriptedUpstream(*arguments, **options)  # type: ignore[arg-type]
            ends.callback(upstream.stop)
            return upstream

        yield start


@pytest.fixture
def upstream(start_upstream: StartUpstream) -> ScriptedUpstream:
    """A scripted upstream in plain text."""
    return start_upstream()


@pytest.fixture
def other(start_upstream: StartUpstream) -> ScriptedUpstream:
    """A second one, of c.example in a table of `two_domains`."""
    return start_upstream()


@pytest.fixture
def raw() -> Iterator[RawUpstream]:
    """An upstream whose every octet the test itself sends."""
    upstream = RawUpstream(steady_port("raw"))
    yield upstream
    upstream.stop()


@pytest.fixture
def start_willi(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartWilli]:
    """Start the real willi.py with a configuration from the test, and hold it to its good manners at the end.

    server: a catch-all route; csv: the text of a CSV mapping, header included (willi.csv is its path);
    mappings: sections for [mappings], asked after the CSV and before `server`; dns: its only resolver;
    probe: whether to wait for its first 220 (not possible where everyone must send a PROXY header);
    environment: variables for it, besides ours; prefix: put before the command;
    options: of the command line.
    All else: settings of willi.conf.
    """
    numbers = itertools.count(1)
    ends = ExitStack()

    def start(
        server: str = "", csv: str = "", mappings: Mapping[str, Setting] | None = None,
        dns: DnsServer | None = None, probe: bool = True, environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (), options: Sequence[str] = (), **settings: Setting,
    ) -> Willi:  # fmt: skip
        directory = tmp_path / f"willi{next(numbers)}"
        directory.mkdir()
        show_on_failure(request, directory.name, directory / "willi.log")
        settings["mappings"] = write_mappings(directory, server, csv, mappings or {})
        willi = Willi(directory, settings, dns.prefix if dns else prefix, environment, options)
        ends.callback(willi.end)
        if probe:
            willi.probe()
        return willi

    with ends:
        yield start


def write_mappings(directory: Path, server: str, csv: str, others: Mapping[str, Setting]) -> dict[str, Setting]:
    """The sections: a CSV file in this directory, these others, and a catch-all."""
    sections: dict[str, Setting] = {}
    if csv:
        (directory / "upstream_servers.csv").write_text(csv, encoding="utf-8")
        sections["csv"] = {"type": "csv", "file": str(directory / "upstream_servers.csv")}
    sections.update(others)
    if server:
        sections["all"] = {"type": "static", "server": server, "tls_verify": False}
    return sections


@pytest.fixture(scope="module")
def shared_willis() -> Iterator[SharedWillis]:
    """For share_willi."""
    willis = SharedWillis()
    yield willis
    willis.end()


@pytest.fixture
def share_willi(
    request: pytest.FixtureRequest, shared_willis: SharedWillis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartWilli]:
    """As start_willi, but the Willi may be one that earlier tests of the file had: see tests/README.md.

    It takes `server`, `csv` and settings. The upstreams are those of `start_upstream` or `raw`, which keep their ports,
    one for each route; a `csv` may name several for a route if each test has its own.
    """
    with ExitStack() as ends:

        def share(server: str = "", csv: str = "", **settings: Setting) -> Willi:
            assert "," not in server, "of several hosts one may be down from the test before"

            def start() -> Willi:
                directory = tmp_path_factory.mktemp("shared")
                return Willi(directory, {**settings, "mappings": write_mappings(directory, server, csv, {})})

            kind = repr((server, csv, sorted(settings.items())))
            willi = shared_willis.take(kind, start)
            ends.callback(shared_willis.give_back, kind, willi)
            show_on_failure(request, willi.directory.name, willi.log_file)
            return willi

        yield share


@pytest.fixture(scope="module")
def pairs() -> Iterator[int]:
    """Of the pairs that no test has had."""
    return iter(range(PAIRS))


@pytest.fixture
def two_hosts(share_willi: StartWilli, start_upstream: StartUpstream, pairs: Iterator[int]) -> TwoHosts:
    """A Willi with a route of two hosts that no test had before, and a RCPT that takes it.

    Tests of a file share it: what it remembers of hosts is of others. tls, proxy: the hosts'; all else: settings.
    """

    def ports(pair: int) -> list[int]:
        return [steady_port(f"host {number} of {pair}") for number in (1, 2)]

    def start(
        tls: ssl.SSLContext | None = None, proxy: bool = False, **settings: Setting
    ) -> tuple[Willi, ScriptedUpstream, ScriptedUpstream, bytes]:
        mine = next(pairs)
        first, second = (start_upstream(port=port, tls=tls, proxy=proxy) for port in ports(mine))
        routes = [",".join(f"{HOST}:{port}" for port in ports(pair)) for pair in range(PAIRS)]
        lines = [f"{pair}.example;{hosts};false\n" for pair, hosts in enumerate(routes)]
        willi = share_willi(csv=f"pattern;server;tls_verify\n{''.join(lines)}", **settings)
        return willi, first, second, b"RCPT TO:<bob@%d.example>" % mine

    return start


@pytest.fixture
def willi(share_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    """A Willi that sends everything to `upstream`. Its log begins with the test, Willi itself may have begun before."""
    return share_willi(server=upstream.server)


@pytest.fixture
def fresh_willi(start_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    """The same, and no test had it before."""
    return start_willi(server=upstream.server)


@pytest.fixture
def start_postfix(request: pytest.FixtureRequest) -> Iterator[StartPostfix]:
    """Start private Postfixes: start_postfix(name, domains=("b.example",), tls=pair, settings={"relayhost": ...})."""
    need("postfix", root=True)
    with ExitStack() as ends:

        def start(*arguments: object, **options: object) -> Postfix:
            postfix = Postfix(*arguments, **options)  # type: ignore[arg-type]
            ends.callback(postfix.stop)
            show_on_failure(request, f"Postfix on port {postfix.port}", postfix.log_file)
            return postfix

        yield start


@pytest.fixture(scope="session")
def postfix_certificate(certificates: Authority) -> Pair:
    """Of the shared Postfix: names mx.example, localhost and 127.0.0.1."""
    return certificates.issue("mx.example", "localhost", "127.0.0.1")


@pytest.fixture(scope="session")
def postfix(request: pytest.FixtureRequest, postfix_certificate: Pair) -> Iterator[Postfix]:
    """One Postfix for all tests (use recipients of your own): mailbox for b.example and its like, STARTTLS, XCLIENT."""
    need("postfix", root=True)
    domains = ("b.example", "c.example", "xn--bcher-kva.example", "bücher.example")
    instance = Postfix("mx.example", domains, postfix_certificate)
    show_on_failure(request, "Postfix", instance.log_file)
    yield instance
    instance.stop()


@pytest.fixture
def dns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DnsServer]:
    """A DNS server with an empty zone: start_willi(dns=dns) knows no other."""
    need("unshare", "mount", root=True)
    server = DnsServer(tmp_path_factory.mktemp("dns"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mariadb(request: pytest.FixtureRequest, certificates: Authority) -> Iterator[Mariadb]:
    """One MariaDB for all tests, on a socket and a TCP port, with TLS for localhost and 127.0.0.1."""
    need("mariadbd", "mariadb-install-db")
    server = Mariadb(certificates.issue("localhost", "127.0.0.1"))
    show_on_failure(request, "MariaDB", server.log_file)
    yield server
    server.remove()
