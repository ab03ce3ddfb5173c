"""List the members of the family as calls, and say which backend and which ONNX body runs each.

docs/family.md has the table that is made here. Reasons are those of `gdn_ops.dispatch.registry`, as
`explain` prints them, without what only this machine lacks: a GPU, a compiler, a built library.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.registry import AUTO_ORDER, Backend, backend_class, reasons
from gdn_ops.kernel_support.backend import KernelBackend
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.spec.rules import Width

USES = ("forward", "backward", "decode")
"""What is asked of a backend: a sequence, a sequence with gradients, and the next token."""


@dataclass(frozen=True)
class Member:
    """Describe a member of the family by the call that computes it.

    Attributes:
        name: in the literature.
        rule: of `gated_delta`.
        gates: the gates that it is called with, each with its width.
        factors: writes per token; from 2 on it is a call of `gated_delta_product`.
    """

    name: str
    rule: str = "gated_delta"
    gates: Mapping[str, Width] = field(default_factory=dict)
    factors: int = 1

    @property
    def decay(self) -> Width:
        """Return the width of its decay."""
        return self.gates.get("alpha", "none")

    @property
    def is_apart(self) -> bool:
        """Return whether it has erase and write in place of beta."""
        return "erase" in self.gates


_HEAD: dict[str, Width] = {"alpha": "scalar", "beta": "scalar"}
_STRENGTH: dict[str, Width] = {"beta": "scalar"}
_VECTORS: dict[str, Width] = {"alpha": "channel", "erase": "channel", "write": "channel"}

MEMBERS = (
    Member("Gated DeltaNet", gates=_HEAD),
    Member("Kimi Delta Attention", gates={**_HEAD, "alpha": "channel"}),
    Member("GDN-2", gates=_VECTORS),
    Member("Gated DeltaProduct", gates=_HEAD, factors=2),
    Member("DeltaProduct", "delta", _STRENGTH, factors=2),
    Member("DeltaNet", "delta", _STRENGTH),
    Member("GLA", "gated", {"alpha": "channel"}),
    Member("Mamba2, simple GLA", "gated", {"alpha": "scalar"}),
    Member("linear attention", "linear"),
)
"""The members, by what they are known as."""


def tensors_of(
    member: Member,
    tokens: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor]:
    """Return empty tensors of a member's call of `gated_delta`, over its micro-steps.

    Args:
        member: the member.
        tokens: T.
        heads: H and HV.
        widths: K and V.
        dtype: of q, k and v; gates are float32.
        device: of all of them.

    Returns:
        q, k, v and the gates, by name, (1, n T, ...) with n factors.
    """
    (H, HV), (K, V) = heads, widths
    steps = (1, member.factors * tokens)
    found = {}
    for name, shape in {"q": (H, K), "k": (H, K), "v": (HV, V)}.items():
        found[name] = torch.empty((*steps, *shape), dtype=dtype, device=device)
    for name, width in member.gates.items():
        channels = (V if name == "write" else K,) if width == "channel" else ()
        found[name] = torch.empty((*steps, HV, *channels), dtype=torch.float32, device=device)
    return found


def call_of(member: Member, use: str) -> Call:
    """Return a member's call bound to its op, on tensors without memory.

    q, k and v are bfloat16 and K = V = 128, as in the models. A token of a product is decoded as
    `gated_delta_steps` over its factors.

    Args:
        member: the member.
        use: one of `USES`.
    """
    is_decode = use == "decode"
    sizes = (1 if is_decode else 64, (16, 32), (128, 128))
    tensors = tensors_of(member, *sizes, dtype=torch.bfloat16, device="meta")
    spec = GATED_DELTA
    if is_decode:
        spec = GATED_DELTA_STEPS if member.factors > 1 else GATED_DELTA_STEP
    if spec is GATED_DELTA_STEP:
        tensors = {name: x.squeeze(1) for name, x in tensors.items()}
    given: dict[str, Any] = dict.fromkeys(arg.name for arg in spec.tensors)
    given |= {attr.name: attr.default for attr in spec.attrs} | tensors | {"rule": member.rule}
    call = bind(spec, arguments_of(spec, given), check_values=False)
    return replace(call, needs_grad=use == "backward")


def backend_names() -> list[str]:
    """Return the names of the backends in this package, as "auto" tries them, then the rest."""
    folder = importlib.import_module("gdn_ops.backends")
    here = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    order = dict.fromkeys(name for names in AUTO_ORDER.values() for name in names)
    return [name for name in order if name in here] + [name for name in here if name not in order]


def without_machine(name: str) -> Backend:
    """Return a backend that does not ask what this machine has to build its kernels with.

    Raises:
        ModuleNotFoundError: a package is missing without which its module cannot be imported.
    """
    cls = backend_class(name)
    if cls is None:
        raise ModuleNotFoundError(f"backend {name!r} cannot be imported here")
    if issubclass(cls, KernelBackend):
        cls = type(cls.__name__, (cls,), {"tool_reasons": staticmethod(lambda device: ())})
    return cls()


def reasons_against(backend: Backend, member: Member, use: str) -> list[str]:
    """Return every reason why a backend cannot run a member, on a machine that has what it needs.

    Args:
        backend: as `without_machine` returns it.
        member: the member.
        use: one of `USES`.
    """
    against = reasons(backend, call_of(member, use), on_any_device=True)
    return [reason for reason in against if reason != backend.absence()]


def onnx_cell(member: Member) -> str:
    """Return which bodies of ONNX nodes compute a member, or why none does."""
    from gdn_ops.export.bodies.table import BODIES, decode_function
    from gdn_ops.export.node.attributes import Variant, why_beta
    from gdn_ops.export.node.schema import SEQUENCE, STEP

    if member.is_apart:
        return f"no: {why_beta(SEQUENCE)}"
    operators = {"prefill": SEQUENCE, "decode": STEP if member.factors == 1 else SEQUENCE}
    cells: dict[str, list[str]] = {}
    for name, body in BODIES.items():
        refused = {}
        for use, operator in operators.items():
            options = (member.rule, False, "beta" in member.gates, "float", True, member.decay)
            variant = Variant(operator, *options)
            refused[use] = [reason] if (reason := body.refuses(variant, 1.0)) else []
            if not reason:
                # Writing it is the proof: a body raises where it cannot.
                decode_function(name, variant, body.opset)
        cells.setdefault(_said(refused), []).append(f"`{name}`")
    return "<br>".join(f"{', '.join(bodies)}: {text}" for text, bodies in cells.items())


def _said(against: Mapping[str, list[str]]) -> str:
    """Return the reasons against some uses as a cell: "yes" where there is none."""
    texts: dict[str, list[str]] = {}
    for use, found in against.items():
        texts.setdefault("no: " + "; ".join(found) if found else "yes", []).append(use)
    if len(texts) == 1:
        return next(iter(texts))
    return "<br>".join(f"{', '.join(uses)} {text}" for text, uses in texts.items())


def cells_of(member: Member) -> dict[str, str]:
    """Return the cells of a member's row in the table, by backend, and its ONNX cell as "onnx"."""
    cells = {}
    for name in backend_names():
        backend = without_machine(name)
        cells[name] = _said({use: reasons_against(backend, member, use) for use in USES})
    return {**cells, "onnx": onnx_cell(member)}


def support_table() -> str:
    """Return the Markdown table of members, backends and ONNX bodies."""
    names = [*backend_names(), "onnx"]
    header = [f"`{name}`" if name != "onnx" else "ONNX bodies" for name in names]
    rows = [f"| member | {' | '.join(header)} |", "|---" * (len(names) + 1) + "|"]
    for member in MEMBERS:
        cells = cells_of(member)
        rows.append(f"| {member.name} | {' | '.join(cells[name] for name in names)} |")
    return "\n".join(rows)
