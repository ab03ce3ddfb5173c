"""Draw docs/img/paper*.png, the paper's claims measured: `python benchmarks/paper_curves.py`.

A picture for each result of `gdn-ops bench paper` in results/, with the published curves beside it.
"""

from __future__ import annotations

from pathlib import Path

from gdn_ops.bench.paper import figure, pages

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "img"


def main() -> None:
    """Write the pictures."""
    for data in pages.recorded(RESULTS):
        figure.draw(data, PICTURES / pages.picture_name(data))


if __name__ == "__main__":
    main()
