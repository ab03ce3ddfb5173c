"""Judge derivatives of derivatives, forward mode, and vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gdn_ops
from gdn_ops.testing.example import Example
from gdn_ops.testing.oracle import Verdict
from gdn_ops.testing.runs import compare

_ROUNDINGS = 1e-9
"""Relative error that is granted in float64, where cancellation over a few tokens is small."""


def second_derivatives(backend: str, example: Example) -> Verdict:
    """Compare gradients of gradients with finite differences (torch.autograd.gradgradcheck)."""
    arguments = example.arguments()
    names = [n for n, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()]
    if "log_alpha" in names or example.T == 0 or example.B == 0 or example.sizes.N == 0:
        return Verdict(0.0, "nothing to differentiate", 0.0, 0.0)
    # Finite differences need room on both sides: gates stay off the ends of their domains.
    strengths = ((name, 0.2, 1.8) for name in ("beta", "erase", "write"))
    for name, low, high in (("alpha", 0.2, 0.9), *strengths):
        if name in arguments and arguments[name] is not None:
            arguments[name] = arguments[name].clamp(low, high)
    inputs = [arguments[n].detach().requires_grad_() for n in names]

    def function(*tensors: torch.Tensor) -> Any:
        changed = arguments | dict(zip(names, tensors, strict=True))
        return gdn_ops.gated_delta(**changed, return_state=True, backend=backend)

    # fast_mode compares one random direction per pair, which bounds the time.
    passed = torch.autograd.gradgradcheck(
        function, inputs, raise_exception=False, fast_mode=True
    ) and torch.autograd.gradcheck(function, inputs, raise_exception=False, fast_mode=True)
    return Verdict.exact(passed, "gradgradcheck")


def second_derivatives_at_the_ends(backend: str, example: Example) -> Verdict:
    """Compare a product with the Hessian with the definition's, gates of exactly 0 among them."""
    function, inputs = differentiable(example, backend)
    exact, _ = differentiable(example, "naive")
    if not all(x.numel() for x in inputs):
        return Verdict(0.0, "nothing to differentiate", 0.0, 0.0)
    directions = tuple(torch.cos(_counted(x)) for x in inputs)

    def product(of: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        def loss(*tensors: Tensor) -> Tensor:
            return torch.stack([(x**3).sum() for x in of(*tensors)]).sum()

        _, products = torch.autograd.functional.hvp(loss, inputs, directions)
        return _flat(products)

    return _equal(product(function), product(exact), "a product with the Hessian")


def tangents(backend: str, example: Example) -> Verdict:
    """Judge that <u, J v> = <J^T u, v>, and that J v is the definition's."""
    function, inputs = differentiable(example, backend)
    exact, _ = differentiable(example, "naive")
    directions = tuple(torch.cos(_counted(x)) for x in inputs)
    pushed = torch.func.jvp(function, inputs, directions)[1]
    right = torch.func.jvp(exact, inputs, directions)[1]
    pull = torch.func.vjp(function, *inputs)[1]
    cotangents = tuple(torch.sin(_counted(x)) for x in pushed)
    pairs = ((cotangents, pushed), (pull(cotangents), directions))
    terms = [_flat(one) * _flat(other) for one, other in pairs]
    size = max(float(x.abs().sum()) for x in terms) or 1.0
    error = abs(float(terms[0].sum() - terms[1].sum())) / size
    adjoint = Verdict(error / _ROUNDINGS, "<u, J v> = <J^T u, v>", error, _ROUNDINGS)
    same = _equal(_flat(pushed), _flat(right), "the tangent")
    return adjoint if adjoint.worst >= same.worst else same


def vmap_equals_a_loop(backend: str, example: Example) -> Verdict:
    """Judge that vmap, with an axis of its own in every other tensor, is one call per row."""
    arguments = example.arguments()
    names = [n for n, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()]
    rows = 2
    mapped = {n: torch.stack([arguments[n], arguments[n] * 0.5]) for n in names[::2]}
    for name in ("alpha", "log_alpha"):
        mapped.pop(name, None)

    def function(changed: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return gdn_ops.gated_delta(**arguments | changed, return_state=True, backend=backend)

    o, state = torch.func.vmap(function)(mapped)
    each = [function({n: x[row] for n, x in mapped.items()}) for row in range(rows)]
    verdicts = [
        compare(
            example,
            {"o": o[row], "final_state": state[row]},
            dict(zip(("o", "final_state"), each[row], strict=True)),
        )
        for row in range(rows)
    ]
    return max(verdicts, key=lambda verdict: verdict.worst)


def differentiable(
    example: Example, backend: str
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return the call of an example as a function of its float tensors, and these."""
    arguments = example.arguments()
    names = [n for n, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()]
    inputs = tuple(arguments[n].detach().double() for n in names)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed: dict[str, Any] = arguments | dict(zip(names, tensors, strict=True))
        return gdn_ops.gated_delta(**changed, return_state=True, backend=backend)

    return function, inputs


def _counted(x: Tensor) -> Tensor:
    """Return 1, 2, 3, ... in the shape, dtype and device of a tensor."""
    return torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device).view_as(x)


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _equal(got: Tensor, exact: Tensor, what: str) -> Verdict:
    """Judge a vector by the norm of its error; NaN does not pass."""
    error = float((got - exact).norm()) / (float(exact.norm()) or 1.0)
    # NaN would compare as no error at all.
    error = error if error == error else float("inf")
    return Verdict(error / _ROUNDINGS, what, error, _ROUNDINGS)
