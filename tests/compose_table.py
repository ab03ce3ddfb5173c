"""Say what composes with what: the table of docs/compose.md, each cell of which is a test."""

from __future__ import annotations

OPS = ("naive", "torch", "compile", "cpp", "triton", "tilelang")
COLUMNS = (*OPS, "layers", "DecodeSession")
KERNELS = ("triton", "tilelang")

WORKS = "works"
NO_TENSOR = "refused: should be a numpy.ndarray"
NOT_COPIED = "refused: is copied or pickled"
NO_MODULE = "refused: has no parameters"


def _row(session: str, **cells: str) -> dict[str, str]:
    """Return a row where every column works but those that are named."""
    return {column: cells.get(column, WORKS) for column in COLUMNS} | {"DecodeSession": session}


TABLE: dict[str, dict[str, str]] = {
    "autocast": _row(WORKS),
    "torch.compile": _row(NO_TENSOR),
    "torch.export": _row(NO_TENSOR),
    "vmap": _row(NO_TENSOR),
    "grad, vjp": _row(NO_TENSOR),
    "jvp, forward mode": _row(
        NO_TENSOR, **dict.fromkeys(KERNELS, "refused: forward-mode tangents")
    ),
    "hessian": _row(NO_TENSOR, **dict.fromkeys(KERNELS, "refused: forward-mode tangents")),
    "checkpoint": _row(NO_TENSOR),
    "DDP": _row(NO_MODULE),
    "FSDP2": _row(NO_MODULE),
    "deepcopy": _row(NOT_COPIED),
    "pickle": _row(NOT_COPIED),
    "fork": _row("refused: is used in a forked process"),
    "spawn": _row(NOT_COPIED),
    "threads": _row("refused: is used by two threads at once"),
}
"""What a feature does with a column: "works", or "refused: " and words of the error."""


def markdown() -> str:
    """Return the table as it stands in docs/compose.md."""
    lines = ["| | " + " | ".join(f"`{c}`" if c != "layers" else c for c in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for name, cells in TABLE.items():
        lines.append(f"| {name} | " + " | ".join(cells[c] for c in COLUMNS) + " |")
    return "\n".join(lines)
