"""Read listings of AMD machine code, as LLVM writes them."""

from __future__ import annotations

import re

from gdn_ops.aot.machine_code import Counts, Line

_LABEL = re.compile(r"^([.\w$]+):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)(?:\s+([^;]*?))?\s*(?:;(.*))?$")
_MATRIX = re.compile(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)_?(\w*)")
_SHUFFLE = re.compile(r"ds_b?permute|ds_swizzle|v_\w+_dpp\b|v_permlane")
_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_(legacy_)?f(16|32|64)")
_SCRATCH = re.compile(r"scratch_(load|store)")
_JUMP = re.compile(r"s_(c?)branch\w*")

_COSTS = {"f32": 8, "xf32": 2, "f64": 16}
"""Times that a product of these takes, in those of one in 16 bits. Source: peak rates of the
MI300X data sheet, 1307.4 TFLOP/s in 16 bits, 653.7 in xf32, 163.4 in float32 and in float64."""


def read_amd(text: str) -> list[Line]:
    """Return the instructions of an assembly, up to the end of its function, in order.

    Raises:
        ValueError: it jumps to a label that it lacks.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            if label[1].startswith(".Lfunc_end"):
                break
            labels[label[1]] = len(found)
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction:
            found.append((instruction[1], instruction[2] or "", instruction[3] or ""))
    lines = []
    for opcode, operands, comment in found:
        jump = _JUMP.fullmatch(opcode)
        if jump and operands not in labels:
            raise ValueError(f"the listing jumps to {operands!r}, which it lacks")
        lines.append(
            Line(
                _counts(opcode, operands, comment),
                (labels[operands],) if jump else (),
                bool(jump[1]) if jump else opcode not in ("s_endpgm", "s_setpc_b64"),
                opcode == "s_sleep",
                opcode == "s_setpc_b64",
            )
        )
    return lines


def _counts(opcode: str, operands: str, comment: str) -> Counts:
    """Return the counts of one instruction."""
    kinds: dict[str, int] = {"instructions": 1}
    matrix = _MATRIX.match(opcode)
    if matrix:
        m, n, k = map(int, matrix.groups()[:3])
        own = matrix[4].removeprefix("4b_").removeprefix("2b_")
        kinds |= {"matrix": 1, "multiply_adds": m * n * k * _COSTS.get(own, 1)}
    elif _SCRATCH.match(opcode) or "Folded" in comment:
        kinds["spills"] = 1
    elif opcode == "s_barrier":
        kinds["barriers"] = 1
    elif _SHUFFLE.match(opcode) or re.search(r"\b(row_\w+|quad_perm):", operands):
        kinds["shuffles"] = 1
    elif opcode.startswith(("ds_read", "ds_load")):
        kinds["shared_loads"] = 1
    elif opcode.startswith(("ds_write", "ds_store")):
        kinds["shared_stores"] = 1
    elif _SPECIAL.match(opcode):
        kinds["special"] = 1
    elif opcode == "s_swappc_b64":
        kinds["calls"] = 1
    return Counts(**kinds)
