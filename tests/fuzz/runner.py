"""Runs any number of inputs, and makes a failing one as small as it can."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.fuzz.inputs import MOST_GENES, Genes, Target


class Failure(Exception):
    """An input that breaks a promise. The text has all that is needed to see it again."""


@dataclass
class Count:
    """What was done to a target."""

    inputs: int = 0
    seconds: float = 0.0  # of CPU
    descriptors: int = 0  # more than before


def run_seeds(target: Target) -> int:
    """How many there were. Raises AssertionError."""
    for seed in target.seeds:
        target.check(seed)
    return len(target.seeds)


def run(target: Target, inputs: int, seed: int) -> Count:
    """So many inputs, the seeds among them. Raises Failure, or AssertionError for a seed."""
    draw = random.Random(f"{seed} {target.name}")
    began = time.process_time()
    count = Count(run_seeds(target))
    descriptors = _descriptors()  # now that the event loop has its own
    while count.inputs < inputs:
        genes = draw.randbytes(draw.randrange(4, MOST_GENES))
        count.inputs += 1
        if _fault(target, genes):
            least = shrunk(target, genes)
            what = f"{target.name}, genes {least.hex()}: {target.make(Genes(least))!r}"
            raise Failure(what) from _fault(target, least)
    count.seconds = time.process_time() - began
    count.descriptors = _descriptors() - descriptors
    return count


def _fault(target: Target, genes: bytes) -> Exception | None:
    try:
        target.check(target.make(Genes(genes)))
    except Exception as fault:  # noqa: BLE001 -- whatever it is, it should not be
        return fault
    return None


def shrunk(target: Target, genes: bytes, seconds: float = 30.0) -> bytes:
    """Fewer and smaller genes that fail as well."""
    deadline = time.monotonic() + seconds
    smaller = True
    while smaller and time.monotonic() < deadline:
        smaller = False
        for fewer in _simpler(genes):
            if time.monotonic() < deadline and _fault(target, fewer):
                genes, smaller = fewer, True
                break
    return genes


def _simpler(genes: bytes) -> Iterator[bytes]:
    for length in (16, 8, 4, 2, 1):
        for at in range(0, len(genes) - length + 1):
            yield genes[:at] + genes[at + length :]
    for at, gene in enumerate(genes):
        if gene:
            yield genes[:at] + b"\0" + genes[at + 1 :]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- no more than a count
