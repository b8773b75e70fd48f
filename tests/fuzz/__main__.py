"""`make fuzz INPUTS=1000000 SEED=7`: as many inputs as somebody has time for."""

from __future__ import annotations

import argparse
import random
import sys

from tests.fuzz.inputs import targets
from tests.fuzz.runner import run

SHARES = {"syntax": 25, "body": 20, "reply": 15, "proxy_protocol": 15, "session": 25}  # percent of the inputs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="printed, if not given")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(SHARES)}; all of them if none is named")
    given = parser.parse_args()
    chosen = given.targets or list(SHARES)
    print(f"seed {given.seed}", flush=True)
    whole = sum(SHARES[name] for name in chosen)
    total = 0
    for name in chosen:
        count = run(targets()[name], given.inputs * SHARES[name] // whole, given.seed)
        total += count.inputs
        print(
            f"{name:15} {count.inputs:9} inputs, CPU {count.seconds:7.1f} s, {count.inputs / count.seconds:7.0f}/s,"
            f" descriptors left over: {count.descriptors}",
            flush=True,
        )
    print(f"{'sum':15} {total:9} inputs, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
