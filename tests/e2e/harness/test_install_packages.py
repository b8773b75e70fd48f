"""tests/install-packages.sh in a Debian of its own, with stand-ins for what changes packages."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import show_on_failure
from tests.support.loopback import PATIENCE, ROOT, wait_until
from tests.support.machine import Layers, Machine, debian

STAND_INS = "/opt/stand-ins"
ENVIRONMENT = {"PATH": f"{STAND_INS}:/usr/sbin:/usr/bin:/sbin:/bin"}
POLICY = "/usr/sbin/policy-rc.d"
APT_GET = """\
#!/bin/sh
echo "$@" >>/root/asked
if [ -e /root/busy ]; then
    echo 'E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)' >&2
    exit 100
fi
if [ -e /root/broken ]; then
    echo 'E: Unable to locate package pear' >&2
    exit 100
fi
case $* in *install*) cp /usr/sbin/policy-rc.d /root/policy; touch /root/installed ;; esac
"""
DPKG_QUERY = "#!/bin/sh\n[ ! -e /root/installed ] || printf installed\n"
DEBCONF = "#!/bin/sh\ncat >>/root/answers\n"


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    layers = Layers()
    made = Machine(layers, [debian()], binds={ROOT / "tests": "/srv"})
    show_on_failure(request, "console", made.console)
    for name, text in (("apt-get", APT_GET), ("dpkg-query", DPKG_QUERY), ("debconf-set-selections", DEBCONF)):
        made.write(f"{STAND_INS}/{name}", text, 0o755)
    yield made
    made.stop()
    layers.remove()


def asked(machine: Machine) -> list[str]:
    path: Path = machine.path("/root/asked")
    return path.read_text().splitlines() if path.exists() else []


def test_two_at_the_same_time_wait_for_a_package_manager_and_install_once(machine: Machine):
    machine.write("/root/busy", "")
    machine.write(POLICY, "#!/bin/sh\nexit 0\n", 0o755)
    with ThreadPoolExecutor() as threads:
        both = [
            threads.submit(machine.ask, "/srv/install-packages.sh", "pear", environment=ENVIRONMENT) for _ in range(2)
        ]
        wait_until(lambda: len(asked(machine)) >= 2, "it has tried again")
        assert not any(done.done() for done in both)
        machine.path("/root/busy").unlink()
        results = [done.result(PATIENCE) for done in both]
    assert [done.returncode for done in results] == [0, 0], results
    assert len([line for line in asked(machine) if "install" in line]) == 1
    assert "exit 101" in machine.path("/root/policy").read_text(), "no service was started"
    assert machine.path(POLICY).read_text() == "#!/bin/sh\nexit 0\n", "as it was"


def test_an_error_that_is_no_lock_is_shown_at_once(machine: Machine):
    machine.write("/root/broken", "")
    done = machine.ask("/srv/install-packages.sh", "pear", environment=ENVIRONMENT)
    assert done.returncode != 0
    assert "Unable to locate package pear" in done.stderr
    assert len(asked(machine)) == 1
    assert not machine.path(POLICY).exists()
