"""Summarise runs of tokens as affine maps of the state, and compose them (docs/math.md §6).

A run of tokens makes S_T = M S_0 + R of any state S_0. Whoever knows M and R of every part of a
sequence knows the state at every cut, exactly and without another look at the tokens.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from gdn_ops.call.bind import Arguments, Call, Tokens, bind
from gdn_ops.call.transforms import any_active, modes
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.registry import select
from gdn_ops.dispatch.results import checked_walk
from gdn_ops.ops import gated_delta
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.ops import GATED_DELTA


class Summary(NamedTuple):
    """Hold what a run of tokens makes of a state: S_T = M S_0 + R.

    Attributes:
        M: (N, HV, K, K), or (N, HV, 1, 1) for rules without an error term: a number, the product
            of the decays. float32; float64 where the tokens are.
        R: (N, HV, K, V) in the same dtype: the state after the run when it is zero before.
    """

    M: Tensor
    R: Tensor

    def final_state(self, initial_state: Tensor) -> Tensor:
        """Return the state after the run, (N, HV, K, V), given that before it.

        Args:
            initial_state: (N, HV, K, V), any float dtype.

        Raises:
            SpecError: the shape is not that of R.

        Example:
            >>> import torch
            >>> from gdn_ops.parallel import gated_delta_summary
            >>> k, v = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 5)
            >>> run = gated_delta_summary(k, v, torch.full((1, 3, 2), 0.5))
            >>> run.final_state(torch.ones(1, 2, 4, 5)).unique()
            tensor([0.1250])
        """
        if initial_state.shape != self.R.shape:
            raise SpecError(
                f"final_state: initial_state has shape {tuple(initial_state.shape)}, "
                f"should be {tuple(self.R.shape)}"
            )
        return _mapped(self.M, initial_state.to(self.R.dtype)) + self.R


def compose(first: Summary, second: Summary) -> Summary:
    """Return the summary of two runs one after the other: M = M₂ M₁, R = M₂ R₁ + R₂.

    Args:
        first: of the earlier run.
        second: of the later one: the same sequences, heads, widths and dtype. Where one rule has an
            error term and the other has none, M is a matrix.

    Raises:
        SpecTypeError: an argument is no Summary.
        SpecError: the two do not fit each other.

    Example:
        >>> import torch
        >>> from gdn_ops.parallel import compose, gated_delta_summary
        >>> k, v = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 5)
        >>> parts = [gated_delta_summary(k[:, t], v[:, t], rule="delta")
        ...          for t in (slice(0, 3), slice(3, 8))]
        >>> whole = gated_delta_summary(k, v, rule="delta")
        >>> torch.allclose(compose(*parts).R, whole.R, atol=1e-4)
        True
    """
    for name, summary in (("first", first), ("second", second)):
        if not isinstance(summary, Summary):
            raise SpecTypeError(
                f"compose: {name} is a {type(summary).__name__}, should be a Summary"
            )
    if first.R.shape != second.R.shape:
        raise SpecError(
            f"compose: second.R has shape {tuple(second.R.shape)}, "
            f"should be that of first.R, {tuple(first.R.shape)}"
        )
    if first.R.dtype != second.R.dtype:
        raise SpecError(
            f"compose: second.R is {second.R.dtype}, should be that of first.R, {first.R.dtype}"
        )
    return Summary(_mapped(second.M, first.M), _mapped(second.M, first.R) + second.R)


def gated_delta_summary(
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    rule: str = "gated_delta",
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Summary:
    """Return what a run of tokens makes of any state, by one call of `gated_delta`.

    That call has K columns of values more, zeros, whose state is the identity before the run and M
    after it: it takes what a forward with V + K columns does, on any backend, and less on those
    that form a state alone (`Backend.has_walks`) where no gradient is needed. An α of exactly 0
    makes M exactly 0. Differentiable, as often as the backend is.

    Args:
        k: (B, T, H, K), keys.
        v: (B, T, HV, V), values, dtype of k.
        alpha, beta, log_alpha: (B, T, HV), gates as in `gated_delta`, whose decay may be one of
            every key channel, (B, T, HV, K).
        erase, write: in place of beta, as in `gated_delta`.
        rule: member of the family.
        qk_l2norm: whether to divide k by its norm first.
        cu_seqlens: (N+1,), boundaries of N sequences packed along T: a summary of each.
        chunk_size: tokens per chunk; the backend's choice when not given.
        backend: its name, or "auto" for the first that can.

    Returns:
        M and R; N is B, or len(cu_seqlens) - 1.

    Raises:
        SpecError: the call breaks the specification of `gated_delta`.
        BackendUnsupportedError: the backend cannot run it.

    Source:
        docs/math.md §6

    Example:
        >>> import torch
        >>> from gdn_ops.parallel import gated_delta_summary
        >>> k, v = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 5)
        >>> M, R = gated_delta_summary(k, v, torch.rand(1, 8, 2), torch.rand(1, 8, 2))
        >>> M.shape, R.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 2, 4, 5]))
    """
    call = _checked(
        Arguments(
            Tokens(k, k, v, alpha, log_alpha, beta, erase, write), None, cu_seqlens,
            rule=rule, qk_l2norm=qk_l2norm, chunk_size=chunk_size, backend=backend,
        )
    )  # fmt: skip
    return summary_of(call, backend)


def summary_of(call: Call, backend: str) -> Summary:
    """Return the summary of the pieces of a bound call, by the backend of that name."""
    _q, _k, _v, alpha, log_alpha, beta, erase, write = call.tokens
    options: dict[str, Any] = {
        "alpha": alpha, "log_alpha": log_alpha, "rule": str(call.rule),
        "cu_seqlens": call.cu_seqlens, "chunk_size": call.chunk_size, "backend": backend,
        "return_state": True,
    }  # fmt: skip
    of_keys = {"beta": beta, "erase": erase, "write": write, "qk_l2norm": call.qk_l2norm}
    return _summarised(call, options, options | of_keys)


def _summarised(call: Call, options: dict[str, Any], of_keys: dict[str, Any]) -> Summary:
    """Summarise a call, given its arguments beside q, k and v: without those of keys, and with."""
    s, (_q, k, v, *_gates) = call.sizes, call.tokens
    if not call.rule.has_erase:
        _o, R = gated_delta(k.detach(), k, v, **of_keys)
        return Summary(_decay(call, options), R)
    before = torch.zeros(s.N, s.HV, s.K, s.V + s.K, dtype=call.compute_dtype, device=k.device)
    before[..., s.V :] = torch.eye(s.K, dtype=before.dtype, device=k.device)
    padded = torch.cat((v, v.new_zeros(*v.shape[:3], s.K)), -1)
    if call.widths.write == "channel":
        write = of_keys["write"]
        of_keys = of_keys | {"write": torch.cat((write, write.new_zeros(*v.shape[:3], s.K)), -1)}
    after = _walked(k, padded, before, of_keys) if _is_plain(call) else None
    if after is None:
        _o, after = gated_delta(k.detach(), k, padded, initial_state=before, **of_keys)
    return Summary(after[..., s.V :], after[..., : s.V])


def _is_plain(call: Call) -> bool:
    """Return whether nothing but values is asked of a call: no gradient, graph or transform."""
    tokens = [x for x in call.tokens if x is not None]
    return (
        all(type(x) in (Tensor, Parameter) for x in tokens)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tokens))
        and not (any_active() or modes() or forward_ad._current_level >= 0)
        and not (torch.compiler.is_compiling() or torch.is_autocast_enabled(call.device.type))
    )


def _walked(k: Tensor, v: Tensor, before: Tensor, options: dict[str, Any]) -> Tensor | None:
    """Return the state behind a run alone, or None where the backend has no walks."""
    given = dict(options)
    gates = (given.pop(name, None) for name in Tokens._fields[3:])
    call = bind(
        GATED_DELTA, Arguments(Tokens(k, k, v, *gates), before, **given), check_values=False
    )
    backend = select(call, registry.resolve(given["backend"]))
    return checked_walk(backend, "walk", call, backend.walk(call)) if backend.has_walks else None


def _checked(arguments: Arguments) -> Call:
    """Check a call in which the keys stand for queries too, and name them as its caller does."""
    try:
        return bind(GATED_DELTA, arguments)
    except SpecError as error:
        text = re.sub(r"\bq\b", "k", str(error)).removeprefix("gated_delta: ")
        raise type(error)(f"gated_delta_summary: {text}") from None


def _decay(call: Call, options: dict[str, Any]) -> Tensor:
    """Return the product of the decays of every sequence: what a state becomes with no keys.

    It is a number, (N, HV, 1, 1), or a diagonal matrix (N, HV, K, K) of the decays of channels.
    """
    s, k = call.sizes, call.tokens.k
    width = s.K if call.widths.decay == "channel" else 1
    one = torch.eye(width, dtype=call.compute_dtype, device=k.device)
    one = one.expand(s.N, s.HV, width, width)
    if not call.rule.has_decay:
        return one
    nothing = k.new_zeros(s.B, s.T, 1, width)
    values = k.new_zeros(s.B, s.T, s.HV, width)
    M: Tensor
    _o, M = gated_delta(nothing, nothing, values, initial_state=one, **options)
    return M


def _mapped(M: Tensor, x: Tensor) -> Tensor:
    """Return M x, where M is (K, K) or a number (1, 1); under autocast too in its dtype."""
    if M.shape[-1] == 1 or x.shape[-2:] == (1, 1):
        return M * x
    with torch.autocast(M.device.type, enabled=False):
        return torch.matmul(M, x)
