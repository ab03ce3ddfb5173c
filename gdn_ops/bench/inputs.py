"""Draw the tensors of a benchmark case, and hold the setting they are made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.spec.language import Case, Sizes
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP


@dataclass(frozen=True)
class Setting:
    """Hold the setting of a run: dtype, device and repeats.

    Attributes:
        dtype: name of the dtype of q, k and v.
        device: torch device.
        repeats: interleaved rounds of the long measurements.
    """

    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 5

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype as a torch.dtype."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def judged(self) -> bool:
        """Return whether targets apply: they are for float32 on CPUs."""
        return self.dtype == "float32" and self.device == "cpu"


class Inputs(NamedTuple):
    """Hold the operands of one call of rule gated_delta.

    Attributes:
        q, k: (B, T, H, K); the rows of k have length one.
        v: (B, T, HV, V).
        log_alpha: (B, T, HV) float32, the natural logarithm of the decay, in (-0.1, 0].
        beta: (B, T, HV) float32, in (0, 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_alpha: Tensor
    beta: Tensor


def find_case(name: str, tokens: int | None = None) -> Case:
    """Return the case of a name; a family's name, `qwen-16-32`, gives its shortest sequence.

    Args:
        name: of a case, sequence or step, or the beginning of a family's names.
        tokens: T instead of the case's own.

    Raises:
        ValueError: no case has that name.
    """
    cases = {**GATED_DELTA.case, **GATED_DELTA_STEP.case}
    family = [n for n in GATED_DELTA.case if n.rpartition("-")[0] == name]
    found = cases.get(name) or (cases[family[0]] if family else None)
    if found is None:
        raise ValueError(f"unknown case {name!r}, known: {', '.join(cases)}")
    if tokens is None or tokens == found.sizes.T:
        return found
    stem = found.name.removesuffix(f"-{found.sizes.T}")
    return replace(found, name=f"{stem}-{tokens}", sizes=replace(found.sizes, T=tokens))


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Draw the operands of a call: normal q and v, unit keys, mild decay.

    Args:
        sizes: the axes.
        dtype: of q, k and v.
        device: where they are made.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform() -> Tensor:
        shape = (sizes.B, sizes.T, sizes.HV)
        return torch.rand(shape, generator=generator, device=device)

    q = normal(sizes.B, sizes.T, sizes.H, sizes.K)
    k = functional.normalize(normal(sizes.B, sizes.T, sizes.H, sizes.K), dim=-1)
    v = normal(sizes.B, sizes.T, sizes.HV, sizes.V)
    log_alpha = -0.1 * uniform()
    beta = uniform().clamp(0.01, 0.99)
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), log_alpha, beta)


def make_output_gradient(sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Draw the gradient of o, (B, T, HV, V)."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (sizes.B, sizes.T, sizes.HV, sizes.V)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def with_grad(inputs: Inputs) -> Inputs:
    """Return the same operands as leaves that need gradients."""
    return Inputs(*(x.detach().requires_grad_() for x in inputs))
