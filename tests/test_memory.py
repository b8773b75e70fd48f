"""Whether there is memory for one more connection: asked in a process of its own, whose memory is limited."""

from __future__ import annotations

import subprocess
import sys

from tests.support.loopback import ROOT

HEAD = """
import re, resource
from willi_lib.processes.memory import EVERY, HEADROOM, Memory
def leave(octets):
    used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + octets, resource.RLIM_INFINITY))
memory = Memory()
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_a_limit_there_is_room():
    run("assert all(memory.allows(number) for number in range(10_000)) and not memory.is_short")


def test_with_less_than_the_headroom_nobody_is_let_in():
    run("""
leave(HEADROOM // 2)
assert not memory.allows(EVERY)
assert memory.is_short
assert not memory.allows(EVERY + 1), "nor is the next one, without waiting for a look"
leave(HEADROOM * 2)
assert memory.allows(EVERY + 1) and not memory.is_short
""")


def test_when_a_quarter_of_the_connections_have_gone_their_memory_may_be_used_again():
    run("""
leave(HEADROOM // 2)
assert [memory.allows(number) for number in (160, 121, 120, 119, 100, 119, 120)] == [False] * 3 + [True] * 3 + [False]
""")


def test_where_there_is_never_enough_a_few_are_let_in_all_the_same():
    run("""
leave(HEADROOM // 2)
assert not memory.allows(EVERY) and memory.is_short
assert all(memory.allows(number) for number in range(EVERY)) and memory.is_short
""")


def test_few_connections_cost_a_look_at_the_memory():
    """At most EVERY of them come in before it is seen that there is none."""
    run("""
leave(HEADROOM // 2)
assert not all(memory.allows(number) for number in range(EVERY + 1))
""")


def test_a_job_that_has_no_memory_goes_on_later():
    run("""
from willi_lib import log
from willi_lib.net import jobs
jobs.PAUSE = 0.01
log.silence()
turns = []
def job():
    turns.append(0)
    if len(turns) < 3:
        raise MemoryError
jobs.keep_going(job)
assert len(turns) == 3
""")
