"""Make the gates of the rule from what a layer is given: its decay, and β or erase and write.

log α = gate(W x)        β = sigmoid(W x)        or  erase = sigmoid(W x), write = sigmoid(W x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gdn_ops.gates import write_strength
from gdn_ops.nn.padding import Padding

if TYPE_CHECKING:
    from gdn_ops.nn.gated_delta_net import GatedDeltaNet


def projection(width: int, rank: int | None, rows: int, **made: Any) -> nn.Module:
    """Return a projection of one matrix, or of two with a narrow width in between.

    Args:
        width: of the input.
        rank: the width in between, or None for one matrix.
        rows: of the output.
        made: device and dtype.
    """
    if rank is None:
        return nn.Linear(width, rows, bias=False, **made)
    inner = nn.Linear(width, rank, bias=False, **made)
    return nn.Sequential(inner, nn.Linear(rank, rows, bias=False, **made))


def gates_of(layer: GatedDeltaNet, x: Tensor, padding: Padding | None) -> dict[str, Tensor]:
    """Return the gates of a layer by their names in `gated_delta`.

    Args:
        layer: the layer.
        x: (B, T, hidden_size), its tokens in front where there is padding.
        padding: what follows them, or None.

    Returns:
        log_alpha, (B, T, HV) or (B, T, HV, K), where the rule decays; beta, (B, T, HV), or erase,
        (B, T, HV, K), and write, (B, T, HV, V); in float32 at least.
    """
    strength = write_strength(layer.b_proj(x), layer.allow_neg_eigval)
    gates = {"beta": strength}
    if layer.erase_write:
        write = write_strength(layer.w_proj(x), False).unflatten(-1, (-1, layer.value_dim))
        gates = {"erase": strength.unflatten(-1, (-1, layer.head_dim)), "write": write}
    if layer.decay is not None:
        gates["log_alpha"] = layer.decay(layer.a_proj(x))
    if padding is not None:
        # A padded token is the identity: α = 1, and nothing is erased or written.
        behind = padding.behind()
        gates = {
            name: gate.masked_fill(behind if gate.dim() == 3 else behind.unsqueeze(-1), 0.0)
            for name, gate in gates.items()
        }
    return gates
