"""Draw docs/img/paper*.png, the paper's claims measured: `python benchmarks/paper_curves.py`.

A picture for each result of `gdn-ops bench paper` in results/, with the published curves beside it.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from gdn_ops.bench.paper import figure, pages

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "img"

COLORS = 96
"""Keep so many colors, which look the same in a third of the bytes."""


def main() -> None:
    """Write the pictures."""
    for data in pages.recorded(RESULTS):
        path = PICTURES / pages.picture_name(data)
        figure.draw(data, path)
        with Image.open(path) as drawn:
            smaller = drawn.convert("RGB").quantize(COLORS)
        smaller.save(path, optimize=True)


if __name__ == "__main__":
    main()
