"""Read listings of NVIDIA machine code, as `cuobjdump -sass` prints them."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from gdn_ops.aot.machine_code import Counts, Line

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_GUARD = re.compile(r"@!?U?P(\d|T)\s+")
_MATRIX = re.compile(r"(HGMMA|HMMA|QGMMA|IGMMA|IMMA|DMMA|UTC\w*MMA)\b")
_GROUP_SHAPE = re.compile(r"GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)\.")
_REGISTER_A = re.compile(r"R\d+(?:\.\w+)*, R\d+(?:\.\w+)*, gdesc")
_TARGET = re.compile(r"\b0x([0-9a-f]+)$")

_WARP_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32}
"""Multiply-adds of a product of one warp, by the digits of its shape in an opcode."""

_WARPS_OF_GROUP = 4

_POLLS = ("NANOSLEEP", "SYNCS.PHASECHK", "USETMAXREG.TRY_ALLOC", "BRA.U.ANY")
"""Opcodes of loops that only wait, and of those that go on for lanes whose register differs, where
the kernels have no such lanes."""

_KINDS = {
    "LDS": "shared_loads",
    "LDSM": "shared_loads",
    "STS": "shared_stores",
    "STSM": "shared_stores",
    "SHFL": "shuffles",
    "LDL": "spills",
    "STL": "spills",
    "MUFU": "special",
    "CALL": "calls",
}
"""Field of `Counts` by the first word of an opcode."""


class _Instruction(NamedTuple):
    """Hold an instruction as its parts."""

    address: int
    opcode: str
    operands: str
    is_guarded: bool

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]


def read_sass(text: str) -> list[Line]:
    """Return the instructions of a listing, in order.

    Raises:
        ValueError: the listing is of more than one function, or jumps to an address that it lacks.
    """
    functions = re.findall(r"^\s*Function\s*:\s*(\S+)", text, re.MULTILINE)
    if len(functions) > 1:
        raise ValueError(f"the listing is of {', '.join(functions)}, should be of one function")
    code = [_instruction(*parts) for parts in _LINE.findall(text)]
    places = {one.address: i for i, one in enumerate(code)}
    meeting: dict[str, int] = {}
    lines, called = [], {}
    for i, one in enumerate(code):
        targets, goes_on, is_irregular = _flow(one, meeting)
        unknown = [target for target in targets if target not in places]
        if unknown:
            raise ValueError(f"the listing jumps to {unknown[0]:#x}, which it lacks")
        at = tuple(places[target] for target in targets)
        if one.base == "CALL":
            called[i], at = at, ()
        polls = one.opcode.startswith(_POLLS)
        lines.append(Line(_counts(one), at, goes_on, polls, is_irregular))
    returns = {i for i, one in enumerate(code) if one.base == "RET"}
    for i, at in called.items():
        if not any(_reaches(lines, first, returns) for first in at):
            # Take a call that never returns as a jump: code of sm_80 leaves loops so.
            counts = replace(lines[i].counts, calls=0)
            lines[i] = Line(counts, at, code[i].is_guarded, is_irregular=not at)
    return lines


def _reaches(lines: Sequence[Line], first: int, wanted: Set[int]) -> bool:
    """Return whether the flow from a line comes to one of those wanted."""
    seen, waiting = {first}, [first]
    while waiting:
        i = waiting.pop()
        if i in wanted:
            return True
        following = {*lines[i].targets, *([i + 1] if lines[i].goes_on else [])} - seen
        seen |= following
        waiting += (j for j in following if j < len(lines))
    return False


def _instruction(address: str, text: str) -> _Instruction:
    guard = _GUARD.match(text)
    plain = text[guard.end() :] if guard else text
    opcode, _, operands = plain.partition(" ")
    return _Instruction(int(address, 16), opcode, operands.strip(), guard is not None)


def _flow(one: _Instruction, meeting: dict[str, int]) -> tuple[list[int], bool, bool]:
    """Return where an instruction may jump, whether it may go on, and whether it is irregular.

    Args:
        one: the instruction.
        meeting: where the lanes of a warp meet again, by the register that BSSY sets, and where
            BMOV moves it; kept here.
    """
    found = _TARGET.search(one.operands)
    target = [int(found[1], 16)] if found else []
    if one.base == "BSSY":
        meeting[one.operands.partition(",")[0]] = target[0]
        return [], True, False
    if one.base == "BMOV":
        # Follow one that is kept in a register where there are not enough of them.
        to, _, kept = one.operands.partition(", ")
        if kept in meeting:
            meeting[to] = meeting[kept]
        return [], True, False
    if one.base == "BSYNC" and one.operands in meeting:
        return [meeting[one.operands]], True, False
    if one.base in ("BRA", "JMP"):
        # A condition may stand in front of the target too: BRA.U !UP1, 0x2290.
        is_conditional = one.is_guarded or "," in one.operands
        return target, is_conditional, not target
    if one.base in ("BRX", "JMX"):
        return [], one.is_guarded, True
    if one.base == "CALL":
        return target, True, False
    if one.base in ("EXIT", "RET"):
        return [], one.is_guarded, False
    return [], True, False


def _counts(one: _Instruction) -> Counts:
    """Return the counts of one instruction."""
    kinds: dict[str, int] = {"instructions": 1}
    if one.base in _KINDS:
        kinds[_KINDS[one.base]] = 1
    elif one.base == "BAR" and ".ARV" not in one.opcode:
        kinds["barriers"] = 1
    elif one.opcode.startswith("WARPGROUP.DEPBAR"):
        kinds["waits"] = 1
    elif one.opcode.startswith("SYNCS.PHASECHK"):
        kinds["phase_waits"] = 1
    elif _MATRIX.match(one.opcode):
        kinds["matrix"] = 1
        kinds["multiply_adds"] = _multiply_adds(one.opcode)
        if one.base == "HGMMA":
            kinds["hgmma"] = 1
            kinds["register_a"] = int(bool(_REGISTER_A.match(one.operands)))
    return Counts(**kinds)


def _multiply_adds(opcode: str) -> int:
    """Return a warp's share of a product, counted twice where it is in TF32; 0 if not known."""
    group = _GROUP_SHAPE.search(opcode)
    if group:
        m, n, k = map(int, group.groups())
        size = m * n * k // _WARPS_OF_GROUP
    else:
        size = next((_WARP_SHAPES[x] for x in opcode.split(".") if x in _WARP_SHAPES), 0)
    return size * 2 if ".TF32" in opcode else size
