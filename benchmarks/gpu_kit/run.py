"""Run a plan of stages on a GPU machine: `python run.py first`, offline, from the unpacked kit.

The plans are `first`, `second` and `third`, or a JSON file of stages. Each stage writes a file
into the output folder, and `results.json` is written anew after each of them, so that whatever ends
the run leaves what was found until then. At the end it prints rows to paste into the tables of
configurations.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kit.plans import PLANS, UnknownPlanError, choose, read_plan
from kit.schedule import Run
from kit.unpack import NoTreeError, unpack

HERE = Path(__file__).resolve().parent
SECONDS = 570.0


def main(arguments: list[str] | None = None) -> int:
    """Unpack the kit and run a plan; return 1 if a stage failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help=f"{', '.join(PLANS)}, or a JSON file of stages")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--out", type=Path, help="the output folder (default: $OUT, or out)")
    parser.add_argument("--only", help="names of stages, with commas between")
    parser.add_argument("--unpacked", type=Path, help="where to unpack (default: beside run.py)")
    asked = parser.parse_args(arguments)
    run = Run(
        out=(asked.out or Path(os.environ.get("OUT") or "out")).resolve(),
        unpacked=(asked.unpacked or HERE / "unpacked").resolve(),
        seconds=asked.seconds,
    )
    try:
        stages = choose(read_plan(asked.plan), asked.only)
        kit = unpack(HERE, run.unpacked)
    except (UnknownPlanError, NoTreeError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    return run.carry_out(Path(asked.plan).stem, stages, kit)


if __name__ == "__main__":
    sys.exit(main())
