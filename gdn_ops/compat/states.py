"""Convert states and gates between gdn_ops and the layouts of other libraries.

| layout | state | decay gate |
|---|---|---|
| gdn_ops | (N, HV, K, V), float32 | `alpha` = α or `log_alpha` = log α |
| `fla` | (N, HV, K, V) | g = log α |
| `fla_v_first` | (N, HV, V, K), with `state_v_first=True` | g = log α |
| `flashinfer` | (N, HV, V, K) | g = α |
| `onnx` | (N, HV, K, V), of `LinearAttention` | decay = log α |
| `ort_gated_delta_net` | (N, HV, V, K), of `com.microsoft::GatedDeltaNet` | g = log α |
| `paper` | (N, HV, V, K) | α |

States of Kimi Delta Attention lie the same, and its gates have a last axis K in every layout.
β is the same everywhere, and so is the order of heads: value head h reads key head h // (HV / H).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.nn.values import check_floats, has_values
from gdn_ops.spec.errors import SpecError, SpecTypeError

__all__ = ["gate_from", "gate_to", "state_from", "state_to"]


class Layout(NamedTuple):
    """Describe how another library lays out states and decay gates.

    Attributes:
        v_first: whether its states are (N, HV, V, K).
        log_gate: whether its decay gate is log α.
    """

    v_first: bool
    log_gate: bool


LAYOUTS = {
    "fla": Layout(v_first=False, log_gate=True),
    "fla_v_first": Layout(v_first=True, log_gate=True),
    "flashinfer": Layout(v_first=True, log_gate=False),
    "onnx": Layout(v_first=False, log_gate=True),
    "ort_gated_delta_net": Layout(v_first=True, log_gate=True),
    "paper": Layout(v_first=True, log_gate=False),
}


def state_from(layout: str, state: Tensor) -> Tensor:
    """Return a state of another library as `initial_state` of gdn_ops.

    Args:
        layout: a name out of LAYOUTS.
        state: (N, HV, K, V) or (N, HV, V, K), any float dtype.

    Returns:
        (N, HV, K, V), contiguous, in the same dtype; `state` itself if it is that already.

    Raises:
        SpecError: the layout is unknown, or the state has not four dimensions.
    """
    return _turned("state_from", layout, state)


def state_to(layout: str, state: Tensor) -> Tensor:
    """Return a state of gdn_ops in the layout of another library; `state_from` undoes it.

    Args:
        layout: a name out of LAYOUTS.
        state: (N, HV, K, V), any float dtype.

    Returns:
        (N, HV, K, V) or (N, HV, V, K), contiguous.

    Raises:
        SpecError: the layout is unknown, or the state has not four dimensions.
    """
    return _turned("state_to", layout, state)


def gate_from(layout: str, gate: Tensor) -> dict[str, Tensor]:
    """Return a decay gate of another library as the keyword of gdn_ops that takes it.

        gated_delta(q, k, v, beta=beta, **gate_from("flashinfer", g))

    Args:
        layout: a name out of LAYOUTS.
        gate: (...), α or log α, whichever that library uses.

    Returns:
        {"alpha": gate} or {"log_alpha": gate}.

    Raises:
        SpecError: the layout is unknown, or a CPU tensor holds the other kind of gate.
    """
    known = _layout("gate_from", layout)
    meaning = "log α; α goes in alpha=" if known.log_gate else "α; log α goes in log_alpha="
    why = f"the gate of layout {layout!r} is {meaning}"
    _check_gate("gate_from", "gate", gate, why, is_log=known.log_gate)
    return {"log_alpha" if known.log_gate else "alpha": gate}


def gate_to(layout: str, alpha: Tensor | None = None, *, log_alpha: Tensor | None = None) -> Tensor:
    """Return a decay gate of gdn_ops as another library takes it.

    Args:
        layout: a name out of LAYOUTS.
        alpha: (...), the gate in [0, 1].
        log_alpha: (...), the gate in [-inf, 0]; exactly one of the two.

    Returns:
        α or log α; log 0 is -inf.

    Raises:
        SpecError: the layout is unknown, not exactly one gate is given, or a CPU tensor holds the
            other kind of gate.
    """
    known = _layout("gate_to", layout)
    if alpha is not None and log_alpha is None:
        _check_gate("gate_to", "alpha", alpha, "log α goes in log_alpha=", is_log=False)
        return alpha.log() if known.log_gate else alpha
    if log_alpha is not None and alpha is None:
        _check_gate("gate_to", "log_alpha", log_alpha, "α goes in alpha=", is_log=True)
        return log_alpha if known.log_gate else log_alpha.exp()
    given = "both missing" if alpha is None else "both given"
    raise SpecError(f"gate_to: alpha and log_alpha are {given}, should be exactly one of them")


def check_state(op: str, name: str, state: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Refuse a state whose last two axes are swapped, naming the converter.

    Args:
        op: what the message starts with.
        name: of the argument.
        state: the state.
        shape: (N, HV, K, V). With K = V a swap cannot be seen.

    Raises:
        SpecError: the state is (N, HV, V, K).
    """
    n, heads, key_width, value_width = shape
    if key_width != value_width and tuple(state.shape) == (n, heads, value_width, key_width):
        raise SpecError(
            f"{op}: {name} has shape {tuple(state.shape)}, should be (N, HV, K, V) = {shape}; "
            f"gdn_ops.compat.states.state_from('fla_v_first', {name}) turns a V-first state"
        )


def _check_gate(function: str, name: str, gate: Tensor, why: str, *, is_log: bool) -> None:
    """Refuse what is no tensor of floats, and values of a CPU tensor that are not of its kind."""
    check_floats(function, **{name: gate})
    if not has_values(gate) or not gate.numel():
        return
    low, high = (float(x) for x in gate.detach().aminmax())
    smallest, largest = (-torch.inf, 0) if is_log else (0, 1)
    if low < smallest or high > largest:
        raise SpecError(
            f"{function}: {name} has values in [{low:.4g}, {high:.4g}], should be in "
            f"[{smallest}, {largest}]: {why}"
        )


def _layout(function: str, name: str) -> Layout:
    if not isinstance(name, str):
        raise SpecTypeError(
            f"{function}: layout has type {type(name).__name__}, should be one of "
            f"{', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS.get(name)
    if layout is None:
        raise SpecError(f"{function}: unknown layout {name!r}, known: {', '.join(LAYOUTS)}")
    return layout


def _turned(function: str, layout: str, state: Tensor) -> Tensor:
    known = _layout(function, layout)
    check_floats(function, state=state)
    if state.dim() != 4:
        raise SpecError(
            f"{function}: state has shape {tuple(state.shape)}, should have 4 dimensions: "
            f"sequences, heads, and K and V in the order of the layout"
        )
    return state.mT.contiguous() if known.v_first else state.contiguous()
