"""The registered operators as functions of tensors, what they take, and the definition of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from gdn_ops import gated_delta, gated_delta_step
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.testing import Example
from gdn_ops.torch_ops import operators

OPERATORS = torch.ops.gdn_ops
PLAIN = ("naive", "torch", "compile")
KERNELS = ("triton", "tilelang")
ALL = (*PLAIN, "cpp", *KERNELS)

Function = Callable[..., Any]


def schema_values(spec: OpSpec, x: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """Return an operator's arguments, from q, k, v, alpha, beta and the state."""
    given = dict(zip(("q", "k", "v", "alpha", "beta"), x[:5], strict=True)) | options
    given["state" if spec is not GATED_DELTA else "initial_state"] = x[5]
    values = {name: default for name, default, _ in spec.parameters()} | given
    return [values[name] for name in operators.schema_names(spec)]


def sequence(backend: str, save: bool = False, **options: Any) -> Function:
    """Return the operator of a sequence as a function of six tensors."""
    options = options | {"backend": backend}
    return lambda *x: OPERATORS.gated_delta(*schema_values(GATED_DELTA, x, options), save)[:2]


def gradients(backend: str, **options: Any) -> Function:
    """Return the operator of gradients as a function of six tensors, d_o and d_state."""
    options = options | {"backend": backend}
    return lambda *x: tuple(
        OPERATORS.gated_delta_backward(*schema_values(GATED_DELTA, x, options), [], *x[6:])
    )


def step(backend: str, suffix: str = "", **options: Any) -> Function:
    operator, options = (
        getattr(OPERATORS, f"gated_delta_step{suffix}"),
        options | {"backend": backend},
    )
    return lambda *x: operator(*schema_values(GATED_DELTA_STEP, x, options))


def steps(backend: str, suffix: str = "", **options: Any) -> Function:
    operator, options = (
        getattr(OPERATORS, f"gated_delta_steps{suffix}"),
        options | {"backend": backend},
    )
    return lambda *x: operator(*schema_values(GATED_DELTA_STEPS, x, options))


def exact_sequence(**options: Any) -> Function:
    """Return the definition as a function of six tensors, by the public function."""
    return lambda *x: gated_delta(
        *(y.double() for y in x[:5]),
        initial_state=x[5].double(),
        return_state=True,
        backend="naive",
        **options,
    )


def exact_gradients(*x: Tensor) -> Any:
    return vjp(exact_sequence(), *x[:6])[1](tuple(y.double() for y in x[6:]))


def exact_step(*x: Tensor) -> Any:
    return gated_delta_step(*(y.double() for y in x), backend="naive")


def tensors(backend: str, rows: int | None = None, **sizes: Any) -> list[Tensor]:
    """Return inputs with gates of exactly 0 among them, and an axis of `rows` in front if given."""
    width = 16 if backend not in PLAIN else 3
    sizes = {"B": 2, "T": 5, "H": 1, "R": 2, "K": width, "V": width} | sizes
    drawn = []
    for seed in range(rows or 1):
        example = Example(initial_state=True, seed=seed, gate="extreme", dtype="float32", **sizes)
        arguments = example.arguments()
        names = ("q", "k", "v", "alpha", "beta", "initial_state")
        wide = torch.float32 if backend not in PLAIN else torch.float64
        drawn.append([arguments[name].to(wide) for name in names])
    drawn[0][3][:, 1:2] = 0
    return drawn[0] if rows is None else [torch.stack(x) for x in zip(*drawn, strict=True)]


def token(backend: str, rows: int | None = None) -> list[Tensor]:
    """Return the inputs of a step."""
    x = tensors(backend, rows)
    return [*(y.select(1 if rows is None else 2, 1) for y in x[:5]), x[5]]


def with_directions(x: list[Tensor], backend: str) -> list[Tensor]:
    """Return inputs, and gradients of the results of a sequence of them."""
    o, state = sequence(backend)(*x) if x[0].ndim == 4 else vmap(sequence(backend))(*x)
    return [*x, *directions([o, state])]


def directions(x: list[Tensor]) -> list[Tensor]:
    return [torch.cos(torch.arange(y.numel()) + 1.0).view_as(y).to(y) for y in x]


def total(function: Function) -> Callable[..., Tensor]:
    """Return the sum of the cubes of a function's results."""
    return lambda *x: torch.stack([(y**3).sum() for y in function(*x)]).sum()


def loop(function: Function, x: list[Tensor], rows: int = 2) -> list[Tensor]:
    """Return the results of each row, stacked."""
    results = [function(*(y[i] for y in x)) for i in range(rows)]
    return [torch.stack(y) for y in zip(*results, strict=True)]


def close(got: Any, right: Any, backend: str = "torch", times: float = 1.0) -> None:
    bound = times * (1e-9 if backend in PLAIN else 2e-5)
    cast = [y.double() if torch.is_tensor(y) else y for y in right]
    torch.testing.assert_close([y.double() for y in got], cast, rtol=bound, atol=bound)


CASES: dict[str, tuple[Function, Function]] = {
    "gated_delta": (sequence, tensors),
    "gated_delta_backward": (gradients, lambda b, n: with_directions(tensors(b, n), b)),
    "gated_delta_step": (step, token),
    "gated_delta_steps": (lambda b: steps(b, return_states=True), tensors),
}
"""Operators that can be mapped: as functions of tensors, and what they take with rows in front."""
