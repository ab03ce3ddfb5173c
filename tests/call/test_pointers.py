"""A call with another library's names or layouts is told what is meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import message_of
from gdn_ops import (
    GATED_DELTA,
    SpecError,
    SpecTypeError,
    explain,
    gated_delta,
    gated_delta_step,
    gated_delta_steps,
)
from gdn_ops.call.pointers import MEANT

FLA = "gdn_ops.compat.fla has FLA's names and layouts"

UNKNOWN = {
    (gated_delta, "g"): f"log_alpha, which is FLA's g; {FLA}",
    (gated_delta, "gk"): f"log_alpha with a last axis K, a decay of every key channel; {FLA}",
    (gated_delta, "output_final_state"): f"return_state; {FLA}",
    (gated_delta, "use_qk_l2norm_in_kernel"): f"qk_l2norm; {FLA}",
    (gated_delta, "head_first"): "left out: tokens come before heads, (B, T, H, K); "
    "q.transpose(1, 2) turns (B, H, T, K)",
    (gated_delta, "initial_states"): "initial_state",
    (gated_delta, "state"): "initial_state",
    (gated_delta, "dt"): "log_alpha, computed before the call, for example by a gate of "
    f"gdn_ops.gates; {FLA}",
    (gated_delta, "A"): "log_alpha, computed before the call, for example by a gate of "
    f"gdn_ops.gates; {FLA}",
    (gated_delta, "seq_idx"): "cu_seqlens, the boundaries of sequences packed along T: 0, ..., T",
    (gated_delta, "inplace"): "left out: it is an argument of gated_delta_step and "
    "gated_delta_steps",
    (gated_delta, "value"): "v",
    (gated_delta, "a_log"): "log_alpha, computed before the call, for example by a gate of "
    f"gdn_ops.gates; {FLA}",
    (gated_delta, "cu_seqlens_cpu"): "left out: cu_seqlens alone is needed",
    (gated_delta, "initial_state_indices"): "state_indices of a decode op",
    (gated_delta, "past_state"): "initial_state",
    (gated_delta, "return_final_states"): "return_state",
    (gated_delta, "seqlens"): "'cu_seqlens'?",
    (
        gated_delta,
        "varlen",
    ): "one of q, k, v, alpha, beta, log_alpha, erase, write, rule, scale, qk_l2norm, "
    "initial_state, has_initial_state, return_state, cu_seqlens, chunk_size, out, backend",
    (gated_delta, "log_aplha"): "'log_alpha'?",
    (gated_delta, "return_sate"): "'return_state'?",
    (
        gated_delta,
        "dropout",
    ): "one of q, k, v, alpha, beta, log_alpha, erase, write, rule, scale, qk_l2norm, "
    "initial_state, has_initial_state, return_state, cu_seqlens, chunk_size, out, backend",
    (gated_delta_step, "initial_state"): "state",
    (gated_delta_step, "return_state"): "left out: the new state is always returned",
    (gated_delta_step, "output_final_state"): f"left out: the new state is always returned; {FLA}",
    (gated_delta_step, "cu_seqlens"): "a row per sequence; gated_delta takes packed sequences",
    (gated_delta_step, "chunk_size"): "left out: a step has no chunks",
    (gated_delta_step, "ssm_state_indices"): "state_indices",
    (gated_delta_step, "cache_indices"): "state_indices",
    (gated_delta_step, "cu_seqlens_cpu"): "a row per sequence; gated_delta takes packed sequences",
    (gated_delta_step, "return_final_states"): "left out: the new state is always returned",
    (gated_delta_step, "BT"): "left out: a step has no chunks",
    (gated_delta_step, "inplce"): "'inplace'?",
    (gated_delta_steps, "g"): f"log_alpha, which is FLA's g; {FLA}",
    (gated_delta_steps, "attention_mask"): "alpha = 1 and beta = 0 at the padding; "
    "gdn_ops.nn.GatedDeltaNet takes mask=",
}
"""What is meant by an argument that a function does not have."""

OPS = (gated_delta, gated_delta_step, gated_delta_steps)

B, T, H, HV, K, V = 2, 9, 3, 6, 4, 5


def tensors() -> list[Tensor]:
    return [torch.zeros(B, T, heads, width) for heads, width in ((H, K), (H, K), (HV, V))]


@pytest.mark.parametrize(("function", "name"), UNKNOWN)
def test_an_unknown_argument_is_told_the_one_that_is_meant(
    function: Callable[..., Any], name: str
) -> None:
    expected = f"{function.__name__}: got an unknown argument {name!r}, should be "
    expected += UNKNOWN[function, name]
    x = tensors()
    assert message_of(SpecTypeError, function, *x, **{name: 1}) == expected
    explained = message_of(SpecTypeError, explain, function, *x, **{name: 1})
    assert explained == f"explain: {expected}; op= says which op is called"


@pytest.mark.parametrize("function", OPS)
def test_every_name_of_another_library_is_refused_with_a_pointer(
    function: Callable[..., Any],
) -> None:
    own = set(inspect.signature(function).parameters)
    for name in MEANT.keys() - own:
        text = message_of(SpecTypeError, function, *tensors(), **{name: None})
        assert text.startswith(f"{function.__name__}: got an unknown argument {name!r}, should be ")
        assert "one of" not in text


@pytest.mark.parametrize("function", OPS)
def test_what_is_missing_by_our_name_is_found_by_the_other(function: Callable[..., Any]) -> None:
    q, k, v = tensors()
    named = {"query": q, "key": k, "value": v}
    name = function.__name__
    text = message_of(SpecTypeError, function, **named)
    assert text == f"{name}: got an unknown argument 'query', should be q"
    text = message_of(SpecTypeError, function, q, v=v)
    assert text == f"{name}: k is None, should be a torch.Tensor"


@pytest.mark.parametrize("function", OPS)
def test_signatures_show_only_the_arguments_of_the_op(function: Callable[..., Any]) -> None:
    spec = getattr(gdn_ops, function.__name__.upper())
    assert list(inspect.signature(function).parameters) == [arg.name for arg in spec.args]


# Axes in another order.


def turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def call(
    of_q: Callable[[Tensor], Tensor] = lambda x: x,
    of_v: Callable[[Tensor], Tensor] | None = None,
    of_gates: Callable[[Tensor], Tensor] = lambda x: x,
    of_state: Callable[[Tensor], Tensor] | None = None,
    heads: int = H,
) -> dict[str, Tensor]:
    """Return a call whose tensors are turned by these functions."""
    q, value_heads = torch.zeros(B, T, heads, K), heads * (HV // H if heads == H else 1)
    v, gate = torch.zeros(B, T, value_heads, V), torch.ones(B, T, value_heads)
    tensors = {"q": of_q(q), "k": of_q(q), "v": (of_v or of_q)(v)}
    tensors |= {"alpha": of_gates(gate), "beta": of_gates(gate)}
    if of_state is not None:
        tensors["initial_state"] = of_state(torch.zeros(B, value_heads, K, V))
    return tensors


def same(x: Tensor) -> Tensor:
    return x


def rows_last(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


TOKENS_TURNED = "q and k look like (B, H, T, K), v like (B, HV, T, V)"
GATES_TURNED = "alpha and beta look like (B, HV, T): transpose(1, 2) turns them"

LAYOUTS: dict[str, dict[str, Tensor]] = {
    "v has shape (2, 6, 9, 5), should be (B, T, HV, V) = (2, 9, 9, 5); T is fixed by q; v looks "
    "like (B, HV, T, V): v.transpose(1, 2) turns it": call(of_v=turned),
    "v has shape (2, 9, 6, 5), should be (B, T, HV, V) = (2, 3, 6, 5); T is fixed by q; q and k "
    "look like (B, H, T, K): transpose(1, 2) turns them": call(turned, same),
    f"v has shape (2, 6, 9, 5), should be (B, T, HV, V) = (2, 3, 9, 5); T is fixed by q; "
    f"{TOKENS_TURNED}: transpose(1, 2) turns them": call(turned),
    f"alpha has shape (2, 6, 9), should be (B, T, HV) = (2, 9, 6); T is fixed by q, HV is fixed by "
    f"v; {GATES_TURNED}": call(of_gates=turned),
    f"v has shape (2, 6, 9, 5), should be (B, T, HV, V) = (2, 3, 9, 5); T is fixed by q; "
    f"{TOKENS_TURNED}, alpha and beta like (B, HV, T): transpose(1, 2) turns them": call(
        turned, of_gates=turned
    ),
    # With H = HV either of them may be wrong.
    f"alpha has shape (2, 9, 4), should be (B, T, HV) = (2, 4, 9); T is fixed by q, HV is fixed by "
    f"v; {TOKENS_TURNED}: transpose(1, 2) turns them, or {GATES_TURNED}": call(turned, heads=4),
    # All of them agree, and only the state tells.
    f"initial_state has shape (2, 4, 4, 5), should be (N, HV, K, V) = (2, 9, 4, 5); HV is fixed by "
    f"v; {TOKENS_TURNED}, alpha and beta like (B, HV, T): transpose(1, 2) turns them": call(
        turned, of_gates=turned, of_state=same, heads=4
    ),
    "initial_state has shape (2, 6, 4, 5), should be (N, HV, K, V) = (9, 6, 4, 5); N is fixed by "
    "q; q and k look like (T, B, H, K), v like (T, B, HV, V), alpha and beta like (T, B, HV): "
    "transpose(0, 1) turns them": call(rows_last, of_gates=rows_last, of_state=same),
    "initial_state has shape (2, 6, 5, 4), should be (N, HV, K, V) = (2, 6, 4, 5); K is fixed by "
    "q, V is fixed by v; initial_state looks like (N, HV, V, K): initial_state.transpose(-1, -2) "
    "turns it": call(of_state=lambda x: x.mT),
    # No order of axes fits: nothing is guessed.
    "v has shape (2, 8, 6, 5), should be (B, T, HV, V) = (2, 9, 6, 5); T is fixed by q": call(
        of_v=lambda x: x[:, 1:]
    ),
}
"""Calls with axes in another order, by the error."""


@pytest.mark.parametrize(("message", "arguments"), LAYOUTS.items())
def test_sizes_betray_axes_in_another_order(message: str, arguments: dict[str, Tensor]) -> None:
    assert message_of(SpecError, gated_delta, **arguments) == f"gated_delta: {message}"


def test_boundaries_betray_axes_in_another_order() -> None:
    cuts, q = torch.tensor([0, 4, 9]), torch.zeros(1, 9, 4, 4)
    heads_first = turned(q)
    assert message_of(
        SpecError, gated_delta, *[heads_first] * 3, rule="linear", cu_seqlens=cuts
    ) == (
        "gated_delta: cu_seqlens ends with 9, should end with T = 4; q looks like (B, H, T, K): "
        "q.transpose(1, 2) turns it"
    )
    tokens_first = q.transpose(0, 1)
    assert message_of(
        SpecError, gated_delta, *[tokens_first] * 3, rule="linear", cu_seqlens=cuts
    ) == (
        "gated_delta: q has B=9 rows, should be 1 when cu_seqlens is given; q and k look like "
        "(T, B, H, K), v like (T, B, HV, V): transpose(0, 1) turns them"
    )


def test_a_step_with_heads_before_rows_is_told_so() -> None:
    q, v, gate = torch.zeros(H, B, K), torch.zeros(HV, B, V), torch.ones(B, HV)
    assert message_of(SpecError, gated_delta_step, q, q, v, gate, gate) == (
        "gated_delta_step: v has shape (6, 2, 5), should be (B, HV, V) = (3, 2, 5); B is fixed by "
        "q; q and k look like (H, B, K), v like (HV, B, V): transpose(0, 1) turns them"
    )


@pytest.mark.parametrize(
    ("shape", "notes"),
    {
        (1, 16, 4096, 8): (
            "q has T=16 tokens and H=4096 heads; if it is (B, H, T, K), pass q.transpose(1, 2), "
            "and likewise k, v and the gates",
        ),
        (4096, 2, 4, 8): (
            "q has B=4096 rows of T=2 tokens; if it is (T, B, H, K), pass q.transpose(0, 1), and "
            "likewise k, v and the gates",
        ),
        # A verified draft, a decode batch, a prompt: nothing to note.
        (64, 4, 64, 8): (),
        (4096, 1, 16, 8): (),
        (1, 256, 16, 8): (),
    }.items(),
)
def test_explain_notes_sizes_that_look_like_another_order(
    shape: tuple[int, ...], notes: tuple[str, ...]
) -> None:
    q = torch.zeros(shape, device="meta")
    explanation = explain(q, q, q, rule="linear")
    assert explanation.notes == notes
    assert str(explanation).count("note: ") == len(notes)


def test_no_op_has_an_argument_of_that_name() -> None:
    assert not MEANT.keys() & {arg.name for arg in GATED_DELTA.args}
