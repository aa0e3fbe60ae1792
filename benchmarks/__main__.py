"""What do the figures say on this machine, now? Runs every benchmark and keeps what it printed.

    python -m benchmarks [NAME ...]

Each benchmark is a module with `run() -> list[Figure]`. Figures are ratios within one run with the sides
alternated: absolute times mean little on a shared machine.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.figure import Figure
from diffing.provenance import installed_versions, utc_now

BENCHMARKS = (
    "overhead",
    "capture",
    "store",
    "crosscoder",
    "planted",
    "sparsity",
    "attribution",
    "quantised",
    "timeline",
    "push",
    "budget",
    "index",
    "steering",
    "alarms",
    "recovery",
    "forecast",
    "screening",
    "canary",
)
RESULTS = Path(__file__).parent / "results"


def main(names: list[str]) -> int:
    """Runs the named benchmarks, or all of them; a missed target is reported, not hidden: exit code 1."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"Expected benchmarks among {', '.join(BENCHMARKS)}; got {', '.join(unknown)}.")
        return 2
    RESULTS.mkdir(exist_ok=True)
    missed = 0
    for name in names or BENCHMARKS:
        print(f"\n== {name}")
        started = time.perf_counter()
        figures: list[Figure] = importlib.import_module(f"benchmarks.{name}").run()
        for figure in figures:
            print(f"  {figure}")
            missed += figure.met is False
        record = {
            "benchmark": name,
            "at": utc_now(),
            "seconds": round(time.perf_counter() - started, 1),
            "versions": installed_versions(),
            "figures": [asdict(figure) for figure in figures],
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{missed} target(s) missed." if missed else "\nEvery target met.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
