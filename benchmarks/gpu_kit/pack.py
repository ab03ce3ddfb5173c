"""Pack one archive for a machine with a GPU and without a network: `make gpu-kit`.

It holds the committed tree, packages that the machine lacks, kernels that were compiled here, and
the script that runs there. What does not fit or cannot be had is named in its manifest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from packing.archive import LIMIT, KitTooLargeError, pack
from packing.build import ROOT, Builder, NotMadeError, mib
from packing.parts import PYTHON, TORCH

FOLDER = ROOT / "build" / "gpu-kit"
ARCHIVE = ROOT / "dist" / "gpu-kit.tar"
CELL = ROOT / ".versions" / f"python-{PYTHON}-torch-{TORCH}" / "bin" / "python"


def main(arguments: list[str] | None = None) -> int:
    """Pack the kit; return 1 if it is too large or cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="the archive")
    parser.add_argument("--limit", type=float, default=LIMIT / 2**20, help="its most MiB")
    parser.add_argument(
        "--python", type=Path, default=CELL, help="with the machine's torch and Triton"
    )
    parser.add_argument("--tune", default="", help="cases whose configurations are compiled too")
    asked = parser.parse_args(arguments)
    python = asked.python if asked.python.exists() else None
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        manifest = pack(Builder(FOLDER, python, asked.tune), asked.out, int(asked.limit * 2**20))
    except (KitTooLargeError, NotMadeError) as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    for part in manifest["parts"]:
        print(f"{part['name']:<16} {mib(part['bytes']):>9}")
    for part in manifest["left_out"]:
        print(f"{part['name']:<16} left out: {part['reason']}")
    print(f"{asked.out}: {mib(asked.out.stat().st_size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
