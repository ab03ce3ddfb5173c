"""State the laws of docs/math.md §8, exact in real arithmetic: one function per law.

A law takes a backend's name and an example and returns a `Verdict`. Two runs that should be
equal may differ by the allowances of both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import Tokens
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.spec.rules import Limits
from gdn_ops.testing.decode_laws import (
    a_pool_equals_separate_states,
    an_in_place_step_equals_a_step,
    an_overlapping_state_is_refused,
    single_steps_equal_one_prefill,
    steps_equal_one_step_after_another,
)
from gdn_ops.testing.example import Example, run
from gdn_ops.testing.option_laws import (
    results_lie_where_the_caller_wants,
    some_sequences_start_from_nothing,
)
from gdn_ops.testing.oracle import (
    Verdict,
    inner_product,
    judgement,
    judgement_of,
    norms,
    unit_roundoff,
)
from gdn_ops.testing.runs import Law, compare, forward, token_slice

_OF_UNIT_KEYS: dict[str, Any] = {
    "lengths": None,
    "rule": "gated_delta",
    "qk_l2norm": False,
    "apart": None,
}
"""Change an example to rows of `gated_delta` with beta whose keys stay as they are drawn."""


def _with_unit_keys(example: Example, **changes: Any) -> Example:
    """Return a changed example of `gated_delta` whose keys have norm 1."""
    if example.magnitude in ("large_gradients", "tiny_keys"):
        changes["magnitude"] = "unit"
    return replace(example, **_OF_UNIT_KEYS, **changes)


def two_segments_equal_one_run(backend: str, example: Example) -> Verdict:
    """Law 1: running [0, t) and then [t, T) through the state equals one run."""
    example = replace(example, lengths=None)
    arguments, cut = example.arguments(), example.T // 3
    first = forward(token_slice(arguments, slice(0, cut)), backend)
    rest = token_slice(arguments, slice(cut, None)) | {"initial_state": first["final_state"]}
    second = forward(rest, backend)
    got = second | {"o": torch.cat((first["o"], second["o"]), 1)}
    return compare(example, got, example.run(backend, gradients=False), 3.0)


def packing_equals_separate_calls(backend: str, example: Example) -> Verdict:
    """Law 2: `cu_seqlens` equals separate calls."""
    if example.lengths is None:
        lengths = (example.T // 4, 0, example.T - example.T // 4)
        example = replace(example, B=1, lengths=lengths)
    arguments = example.arguments()
    whole = forward(arguments, backend)
    del arguments["cu_seqlens"]
    parts, start = [], 0
    for n, length in enumerate(example.lengths or ()):
        part = token_slice(arguments, slice(start, start + length))
        if example.initial_state:
            part["initial_state"] = arguments["initial_state"][n : n + 1]
        parts.append(forward(part, backend))
        start += length
    if not parts:
        return compare(example, whole, whole)
    o, states = ([part[name] for part in parts] for name in ("o", "final_state"))
    return compare(example, whole, {"o": torch.cat(o, 1), "final_state": torch.cat(states)})


def padding_changes_nothing(backend: str, example: Example) -> Verdict:
    """Law 2: appended tokens with alpha = 1, beta = 0 change nothing."""
    example = replace(example, lengths=None)
    arguments = example.arguments()
    padded = dict(arguments)
    padding = 7
    rule = GATED_DELTA.rule[example.rule]
    for name in ("beta",) if example.apart is None else ("erase", "write"):
        if name not in arguments:
            ones = arguments["v"].new_ones(*arguments["v"].shape[:3], dtype=torch.float32)
            padded[name] = ones
    fill = {"alpha": 1.0, "log_alpha": 0.0, "beta": 0.0, "erase": 0.0, "write": 0.0}
    for name in Tokens._fields:
        x = padded.get(name)
        if x is not None and (rule.has_decay or name not in ("alpha", "log_alpha")):
            extra = x.new_full((x.shape[0], padding, *x.shape[2:]), fill.get(name, 0.5))
            padded[name] = torch.cat((x, extra), 1)
    got = forward(padded, backend)
    got["o"] = got["o"][:, : example.T]
    return compare(example, got, example.run(backend, gradients=False))


def later_tokens_change_nothing_before(backend: str, example: Example) -> Verdict:
    """Law 4: changing tokens after t leaves o up to t unchanged."""
    example = replace(example, lengths=None)
    cut = example.T // 2
    arguments = example.arguments()
    changed = dict(arguments)
    for name in ("q", "k", "v"):
        changed[name] = arguments[name].clone()
        changed[name][:, cut:] = changed[name][:, cut:].flip(-1) * 0.5
    before, after = (forward(given, backend)["o"] for given in (arguments, changed))
    before[:, cut:], after[:, cut:] = 0, 0
    return compare(example, {"o": after}, {"o": before})


def a_reset_forgets_the_past(backend: str, example: Example) -> Verdict:
    """Law 5: with alpha_t = 0, o from t on and S_T, and all their gradients, ignore the past."""
    example = replace(
        example, lengths=None, rule="gated_delta", initial_state=True, T=max(example.T, 2)
    )
    cut = example.T // 2
    gate = "log_alpha" if example.log_gate else "alpha"
    arguments = example.arguments()
    arguments[gate][:, cut] = float("-inf") if example.log_gate else 0.0
    d_o, d_state = example.cotangents()
    d_o[:, :cut] = 0
    results = run(arguments, backend, (d_o, d_state))
    for name in ("q", "k", "v"):
        if bool(results[f"d_{name}"][:, :cut].any()):
            return Verdict.exact(False, f"d_{name} before the reset is not 0")
    if bool(results["d_initial_state"].any()):
        return Verdict.exact(False, "d_initial_state is not 0")
    forgotten = token_slice(arguments, slice(cut, None))
    forgotten["initial_state"] = torch.zeros_like(arguments["initial_state"])
    same = forward(forgotten, backend)
    results["o"][:, :cut] = 0
    same["o"] = torch.cat((results["o"][:, :cut], same["o"]), 1)
    return judgement_of(arguments, None, example).compare(results, same, 2.0)


def alpha_one_beta_zero_leaves_the_state(backend: str, example: Example) -> Verdict:
    """Law 6: alpha = 1, beta = 0 leaves S as it was, to the last bit."""
    example = replace(example, lengths=None, gate="one", initial_state=True, beta="unit")
    arguments = example.arguments()
    if example.apart in ("erase", "write"):
        arguments |= {
            n: arguments["v"].new_zeros(example.B, example.T, example.sizes.HV).float()
            for n in ("erase", "write")
        }
    for name in ("beta", "erase", "write"):
        if name in arguments:
            arguments[name] = torch.zeros_like(arguments[name])
    state = forward(arguments, backend)["final_state"]
    is_equal = torch.equal(state, arguments["initial_state"].to(state.dtype))
    return Verdict.exact(is_equal, "final_state")


def a_full_write_is_recalled_exactly(backend: str, example: Example) -> Verdict:
    """Law 7: with a key of norm 1 and beta = 1, S^T k = v."""
    example = _with_unit_keys(example, scale=1.0, beta="unit", T=max(example.T, 1))
    arguments = example.arguments()
    arguments["beta"] = torch.ones_like(arguments["beta"])
    arguments["q"] = arguments["k"]
    o = forward(arguments, backend)["o"]
    judgement = judgement_of(arguments, None, example)
    # A key has norm 1 only up to its rounding: the definition says how much that changes.
    missed = norms(judgement.reference["o"] - arguments["v"].double(), "o", example)
    allowance = {"o": judgement.allowance["o"] + missed}
    return replace(judgement, reference={"o": arguments["v"]}, allowance=allowance).judge({"o": o})


def a_reflection_keeps_the_norm(backend: str, example: Example) -> Verdict:
    """Law 8: beta = 2, v = 0, alpha = 1, ||k|| = 1 keeps the Frobenius norm of S."""
    example = _with_unit_keys(example, gate="one", beta="unit", initial_state=True)
    arguments = example.arguments()
    arguments["beta"] = torch.full_like(arguments["beta"], 2.0)
    arguments["v"] = torch.zeros_like(arguments["v"])
    state = forward(arguments, backend)["final_state"]
    judgement = judgement_of(arguments, None, example)
    before, after, exact = (
        norms(x, "final_state", example)
        for x in (arguments["initial_state"], state, judgement.reference["final_state"])
    )
    # A key has norm 1 only up to its rounding: the definition says how much that changes. And
    # the state is a sum of T writes, each of at most twice its norm.
    rounding = inner_product(state.dtype, example) + unit_roundoff(arguments["k"].dtype)
    writes = 2 * example.T * rounding * before
    allowed = judgement.allowance["final_state"] + (exact - before).abs() + writes
    ratio = float(((after - before).abs() / allowed).max()) if before.numel() else 0.0
    return Verdict(ratio, "norm of final_state / its allowance", ratio, 1.0)


def a_rotation_changes_no_output(backend: str, example: Example) -> Verdict:
    """Law 9: for orthogonal Omega, (Omega q, Omega k, Omega S_0) gives the same o."""
    apart = "scalars" if example.apart else None
    changes: dict[str, Any] = {"initial_state": True, "channels": False, "apart": apart}
    example = replace(example, dtype=_wide(example), lengths=None, **changes)
    arguments = example.arguments()
    generator = torch.Generator().manual_seed(example.seed)
    square = torch.randn(
        example.K, example.K, generator=generator, dtype=torch.float64, device="cpu"
    )
    omega = torch.linalg.qr(square)[0].to(arguments["q"])
    turned = dict(arguments)
    for name in ("q", "k"):
        turned[name] = arguments[name] @ omega.mT
    turned["initial_state"] = omega @ arguments["initial_state"]
    got = forward(turned, backend)
    got["final_state"] = omega.mT @ got["final_state"]
    # Rotating rounds every operand once more than the allowance knows.
    return compare(example, got, example.run(backend, gradients=False), 4.0)


def _wide(example: Example) -> str:
    return "float64" if example.dtype == "float64" else "float32"


def the_output_is_linear_in_values_and_state(backend: str, example: Example) -> Verdict:
    """Law 10: (o, S_T) is linear in (v, S_0): doubling both doubles both, to the last bit."""
    example = replace(example, lengths=None, initial_state=True)
    arguments = example.arguments()
    doubled = arguments | {name: arguments[name] * 2 for name in ("v", "initial_state")}
    halved = {name: x / 2 for name, x in forward(doubled, backend).items()}
    return compare(example, halved, example.run(backend, gradients=False))


def grouping_equals_repeated_heads(backend: str, example: Example) -> Verdict:
    """Law 11: R value heads per key head equal repeated q and k; d_q and d_k are the sums."""
    arguments = example.arguments()
    repeated = dict(arguments)
    for name in ("q", "k"):
        repeated[name] = arguments[name].repeat_interleave(example.R, 2)
    results = run(repeated, backend, example.cotangents())
    for name in ("d_q", "d_k"):
        parts = results[name].double().unflatten(2, (example.H, example.R))
        results[name] = parts.sum(3)
    # Summing R rounded gradients rounds R times.
    return compare(example, results, example.run(backend), 2.0 * example.R)


def rows_of_a_batch_do_not_meet(backend: str, example: Example) -> Verdict:
    """Law 12: a row alone equals the row in a batch."""
    example = replace(example, lengths=None, B=max(example.B, 1))
    arguments = example.arguments()
    last = {n: x[-1:] if isinstance(x, Tensor) else x for n, x in arguments.items()}
    alone, whole = forward(last, backend), forward(arguments, backend)
    results = {name: torch.cat((x[:-1], alone[name])) for name, x in whole.items()}
    return compare(example, results, whole)


def one_scalar_checks_a_whole_backward(backend: str, example: Example) -> Verdict:
    """Law 13 (Euler): <dS_0, S_0> = <dS_T, S_T> + sum(do o - dv v), per head."""
    example = replace(example, initial_state=True, dtype="float64")
    arguments = example.arguments()
    d_o, d_state = example.cotangents()
    r = run(arguments, backend, (d_o, d_state))
    d_o = d_o.to(r["o"].dtype)

    def heads(x: Tensor, y: Tensor, states: bool = False) -> Tensor:
        product = (x * y).double()
        return product.sum((0, 2, 3)) if states else product.sum((0, 1, 3))

    terms = [
        heads(r["d_initial_state"], arguments["initial_state"], True),
        -heads(d_state, r["final_state"], True),
        -heads(d_o, r["o"]),
        heads(r["d_v"], arguments["v"]),
    ]
    total = torch.stack(terms)
    size = total.abs().sum(0).clamp(min=1e-30)
    error = total.sum(0).abs() / size
    allowed = 1e-10
    return Verdict(float(error.max()) / allowed, "Euler identity", float(error.max()), allowed)


def delta_is_one_step_of_gradient_descent(backend: str, example: Example) -> Verdict:
    """Law 14: `delta` is an SGD step with rate beta on 0.5 ||S^T k - v||^2, from alpha S."""
    changes: dict[str, Any] = {"T": 1, "initial_state": True, "beta": "unit", "log_gate": False}
    example = replace(example, **_OF_UNIT_KEYS, **changes)
    arguments = example.arguments()
    alpha = (
        arguments["alpha"][:, 0, :, :, None]
        if example.channels
        else (arguments["alpha"][:, 0, :, None, None])
    )
    start = (arguments["initial_state"].double() * alpha.double()).requires_grad_()
    k = arguments["k"][:, 0].double().repeat_interleave(example.R, 1)
    v = arguments["v"][:, 0].double()
    with torch.enable_grad():
        loss = 0.5 * ((start * k.unsqueeze(-1)).sum(-2) - v).square().sum()
    (gradient,) = torch.autograd.grad(loss, start)
    descended = start.detach() - arguments["beta"][:, 0, :, None, None].double() * gradient
    got = forward(arguments, backend)
    return judgement(example, False).compare(got, {"final_state": descended}, 1.0)


def delta_is_gated_delta_without_decay(backend: str, example: Example) -> Verdict:
    """Law 15: `delta` is `gated_delta` at alpha = 1."""
    example = replace(example, rule="gated_delta", gate="one", log_gate=False)
    arguments = example.arguments()
    whole = run(arguments, backend, example.cotangents())
    without = run(arguments | {"rule": "delta", "alpha": None}, backend, example.cotangents())
    return compare(example, without, {name: whole[name] for name in without})


def orthogonal_keys_need_no_correction(backend: str, example: Example) -> Verdict:
    """Law 15: with orthogonal keys and S_0 = 0, `gated` equals `gated_delta`."""
    tokens = min(example.T, example.K)
    changes: dict[str, Any] = {"T": tokens, "initial_state": False, "dtype": _wide(example)}
    example = replace(example, **_OF_UNIT_KEYS, **changes)
    arguments = example.arguments()
    keys = torch.eye(example.K, dtype=torch.float32, device="cpu")[:tokens, None].expand(
        example.B, tokens, example.H, example.K
    )
    arguments["k"] = keys.to(arguments["k"])
    rules = ("gated_delta", "gated")
    with_erase, without = (forward(arguments | {"rule": rule}, backend) for rule in rules)
    return judgement_of(arguments, None, example).compare(with_erase, without, 2.0)


def a_constant_vector_decays_like_a_scalar(backend: str, example: Example) -> Verdict:
    """Law 16: equal decays of all channels are the decay of the head; their gradients add up."""
    example = replace(example, channels=False, rule="gated_delta")
    arguments = example.arguments()
    name = "log_alpha" if example.log_gate else "alpha"
    gate = arguments[name]
    arguments[name] = gate.unsqueeze(-1).expand(*gate.shape, example.K).contiguous()
    results = run(arguments, backend, example.cotangents())
    results[f"d_{name}"] = results[f"d_{name}"].double().sum(-1)
    # Summing rounds once more for every channel.
    return compare(example, results, example.run("naive"), 2.0)


def a_reset_channel_forgets_its_past(backend: str, example: Example) -> Verdict:
    """Law 17: with alpha_1 = 0 in channel c, row c of S_0 changes nothing, and has no gradient."""
    changes: dict[str, Any] = {"lengths": None, "initial_state": True, "rule": "gated_delta"}
    example = replace(example, channels=True, T=max(example.T, 1), **changes)
    arguments = example.arguments()
    channel = example.seed % example.K
    gate = "log_alpha" if example.log_gate else "alpha"
    arguments[gate][:, 0, :, channel] = float("-inf") if example.log_gate else 0.0
    results = run(arguments, backend, example.cotangents())
    if bool(results["d_initial_state"][:, :, channel].any()):
        return Verdict.exact(False, f"d_initial_state of channel {channel} is not 0")
    changed = dict(arguments)
    changed["initial_state"] = arguments["initial_state"].clone()
    changed["initial_state"][:, :, channel] *= -3
    # With gradients too, for a forward alone may take another way.
    other = run(changed, backend, example.cotangents())
    are_equal = all(torch.equal(other[name], results[name]) for name in ("o", "final_state"))
    return Verdict.exact(are_equal, f"a result depends on what channel {channel} held")


def equal_strengths_are_beta(backend: str, example: Example) -> Verdict:
    """Law 18: erase = write = beta is beta, of heads or of channels; their gradients add up."""
    rule = example.rule if GATED_DELTA.rule[example.rule].has_erase else "gated_delta"
    drawn = "unit" if example.beta == "none" else example.beta
    example = replace(example, apart=None, rule=rule, beta=drawn)
    arguments = example.arguments()
    beta = arguments.pop("beta")
    # Channels where the seed is odd.
    widths = (example.K, example.V) if example.seed % 2 else (None, None)
    for name, width in zip(("erase", "write"), widths, strict=True):
        wide = beta if width is None else beta.unsqueeze(-1).expand(*beta.shape, width)
        arguments[name] = wide.contiguous()
    results = run(arguments, backend, example.cotangents())
    parts = [results.pop(f"d_{name}").double() for name in ("erase", "write")]
    d_erase, d_write = (x.sum(-1) if x.dim() == 4 else x for x in parts)
    results["d_beta"] = d_erase + d_write
    # Summing rounds once more for every channel.
    return compare(example, results, example.run("naive"), 2.0)


def _takes_strengths(limits: Limits) -> bool:
    is_wide = "channel" in limits.erases and "channel" in limits.writes
    return limits.apart and is_wide and limits.grad


def _has_channels(limits: Limits) -> bool:
    return "channel" in limits.decays and limits.grad


def _has_grad(limits: Limits) -> bool:
    return limits.grad


def _has_varlen(limits: Limits) -> bool:
    return limits.varlen


def _has_wide_grad(limits: Limits) -> bool:
    return limits.grad and "float64" in limits.dtypes


LAWS: tuple[Law, ...] = (
    Law(two_segments_equal_one_run),
    Law(packing_equals_separate_calls, needs=_has_varlen),
    Law(padding_changes_nothing),
    Law(single_steps_equal_one_prefill, op=GATED_DELTA_STEP),
    Law(an_in_place_step_equals_a_step, op=GATED_DELTA_STEP, draws_decode=True),
    Law(an_overlapping_state_is_refused, op=GATED_DELTA_STEPS, draws_decode=True),
    Law(a_pool_equals_separate_states, op=GATED_DELTA_STEP, draws_decode=True),
    Law(steps_equal_one_step_after_another, op=GATED_DELTA_STEPS, draws_decode=True),
    Law(later_tokens_change_nothing_before),
    Law(a_reset_forgets_the_past, rules=("gated_delta",), needs=_has_grad),
    Law(alpha_one_beta_zero_leaves_the_state),
    Law(a_full_write_is_recalled_exactly, rules=("gated_delta",)),
    Law(a_reflection_keeps_the_norm, rules=("gated_delta",)),
    Law(a_rotation_changes_no_output),
    Law(the_output_is_linear_in_values_and_state),
    Law(grouping_equals_repeated_heads, needs=_has_grad),
    Law(rows_of_a_batch_do_not_meet),
    Law(one_scalar_checks_a_whole_backward, needs=_has_wide_grad),
    Law(delta_is_one_step_of_gradient_descent, rules=("gated_delta",)),
    Law(delta_is_gated_delta_without_decay, rules=("gated_delta", "delta"), needs=_has_grad),
    Law(orthogonal_keys_need_no_correction, rules=("gated_delta", "gated")),
    Law(a_constant_vector_decays_like_a_scalar, rules=("gated_delta",), needs=_has_channels),
    Law(a_reset_channel_forgets_its_past, rules=("gated_delta",), needs=_has_channels),
    Law(equal_strengths_are_beta, rules=("gated_delta", "delta"), needs=_takes_strengths),
    Law(some_sequences_start_from_nothing, needs=_has_grad),
    Law(results_lie_where_the_caller_wants),
)
"""Every law of docs/math.md §8."""
