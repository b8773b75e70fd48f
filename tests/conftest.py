"""The fixtures. Whatever has a log shows it when the test fails; with CI=true nothing may be skipped."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from tests.support.certificates import Authority, Pair
from tests.support.daemon import Setting, Willi
from tests.support.dns import DnsServer
from tests.support.examples import examples
from tests.support.loopback import need
from tests.support.mariadb import Mariadb
from tests.support.postfix import Postfix
from tests.support.raw import RawUpstream
from tests.support.upstream import ScriptedUpstream

pytest_plugins = ("tests.runner.plugin",)

LOGS = pytest.StashKey[dict[str, Path]]()
SHOWN = 20_000  # characters of a log, from its end

StartWilli = Callable[..., Willi]
StartUpstream = Callable[..., ScriptedUpstream]
StartPostfix = Callable[..., Postfix]

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
    """Start scripted upstreams: start_upstream(port=0, tls=None, proxy=False)."""
    with ExitStack() as ends:

        def start(*arguments: object, **options: object) -> ScriptedUpstream:
            upstream = ScriptedUpstream(*arguments, **options)  # type: ignore[arg-type]
            ends.callback(upstream.stop)
            return upstream

        yield start


@pytest.fixture
def upstream(start_upstream: StartUpstream) -> ScriptedUpstream:
    """A scripted upstream in plain text."""
    return start_upstream()


@pytest.fixture
def raw() -> Iterator[RawUpstream]:
    """An upstream whose every octet the test itself sends."""
    upstream = RawUpstream()
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
        sections: dict[str, Setting] = {}
        if csv:
            (directory / "upstream_servers.csv").write_text(csv, encoding="utf-8")
            sections["csv"] = {"type": "csv", "file": str(directory / "upstream_servers.csv")}
        sections.update(mappings or {})
        if server:
            sections["all"] = {"type": "static", "server": server, "tls_verify": False}
        show_on_failure(request, directory.name, directory / "willi.log")
        settings["mappings"] = sections
        willi = Willi(directory, settings, dns.prefix if dns else prefix, environment, options)
        ends.callback(willi.end)
        if probe:
            willi.probe()
        return willi

    with ends:
        yield start


@pytest.fixture
def willi(start_willi: StartWilli, upstream: ScriptedUpstream) -> Willi:
    """A Willi that sends everything to `upstream`."""
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
