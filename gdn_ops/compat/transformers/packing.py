"""Keep packed sequences apart in both parts of a layer, as transformers does, or refuse them.

A layer is told of packed sequences twice: `cu_seqlens`, the boundaries, for the delta rule, and
`seq_idx`, the number of every token's sequence, for the short convolution in front of it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from gdn_ops.nn.values import has_values
from gdn_ops.spec.errors import SpecError

WITHOUT_NUMBERS = (
    "cu_seqlens is given without seq_idx, should be given with it: the short convolution in "
    "front would mix the packed sequences"
)
WITHOUT_CONVOLUTION = (
    "packed sequences are given, should be one sequence per row: the convolution of {layer} "
    "would mix them; install causal-conv1d or a transformers whose module has a function "
    "causal_conv1d_fn"
)
WITHOUT_PACKAGE = (
    "packed sequences are given where causal_conv1d_fn cannot keep them apart: it can for one row "
    "of seq_idx on a CPU, outside of compiled graphs, and on GPUs with the package causal-conv1d"
)

_PACKAGES = ("causal_conv1d", "kernels")
"""Packages whose convolution, on GPUs, is told of packed sequences."""


def check_package(device_type: str) -> None:
    """Check that transformers' own convolution keeps packed sequences apart on a device.

    Some releases check it themselves, others compute something else.

    Raises:
        SpecError: it does not.
    """
    if device_type == "cpu" or not _has_package():
        raise SpecError(f"accelerate: {WITHOUT_PACKAGE}")


def _has_package() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in _PACKAGES)


# Do as torch.compiler.assume_constant_result does: run while tracing, leave no code in a graph.
_has_package._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_arguments(named: dict[str, Any], cache: Any) -> None:
    """Check what a layer is told of packed sequences, as far as it shows outside of graphs.

    Raises:
        SpecError: a list where a tensor belongs, boundaries of the keys alone or other ones than
            of the queries, or a cache, which has one state per row, on a CPU.
    """
    for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"):
        value = named.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise SpecError(
                f"accelerate: {name} has type {type(value).__name__}, should be a torch.Tensor"
            )
    numbers, queries, keys = (
        named.get(name) for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
    )
    if keys is not None and numbers is None and queries is None:
        raise SpecError(
            "accelerate: cu_seq_lens_k is given without seq_idx, should be given with it: linear "
            "attention would mix the packed sequences"
        )
    if (
        queries is not None
        and keys is not None
        and has_values(queries)
        and has_values(keys)
        and queries.tolist() != keys.tolist()
    ):
        raise SpecError(
            f"accelerate: cu_seq_lens_k has boundaries {keys.tolist()}, should be those of "
            f"cu_seq_lens_q, {queries.tolist()}: attention layers go by both"
        )
    if numbers is None or cache is None or not has_values(numbers):
        return
    if numbers.dim() == 2 and numbers.diff().ne(0).any():
        raise SpecError(
            "accelerate: packed sequences are given with a cache, should be without: a cache has "
            "one state per row, and attention layers would mix them; pass use_cache=False"
        )


def is_packed(options: dict[str, Any]) -> bool:
    """Return whether the keywords of a layer describe packed sequences."""
    names = ("seq_idx", "cu_seq_lens_q", "cu_seqlens")
    return any(options.get(name) is not None for name in names)


def boundaries(
    cu_seqlens: Tensor | None, seq_idx: Tensor | None, rows: int, tokens: int
) -> Tensor | None:
    """Return the boundaries of the packed sequences of a call.

    Args:
        cu_seqlens: (N+1,) boundaries, or None.
        seq_idx: (1, T) the number of the sequence of every token, or None.
        rows, tokens: B and T.

    Returns:
        (N+1,), or None where every row is one sequence.

    Raises:
        SpecError: the convolution was not told of the sequences, or of others.
    """
    if seq_idx is None:
        if cu_seqlens is not None:
            raise SpecError(f"accelerate: {WITHOUT_NUMBERS}")
        return None
    if tuple(seq_idx.shape) != (1, tokens) or rows != 1:
        raise SpecError(
            f"accelerate: seq_idx has shape {tuple(seq_idx.shape)} for {rows} rows of {tokens} "
            f"tokens, should be (1, {tokens}) for one row: pack all sequences into it"
        )
    if torch.compiler.is_compiling() or seq_idx.is_meta:
        if cu_seqlens is None:
            raise SpecError(
                "accelerate: seq_idx is given without cu_seq_lens_q, should be given with it in "
                "a compiled graph: the number of sequences is not known there"
            )
        return cu_seqlens
    if cu_seqlens is None:
        return _starts(seq_idx, tokens)
    # A look at values costs a wait for a GPU: there the caller's word is taken.
    if seq_idx.device.type == "cpu":
        _check_agreement(cu_seqlens, _starts(seq_idx, tokens))
    return cu_seqlens


def _starts(seq_idx: Tensor, tokens: int) -> Tensor:
    """Return the boundaries of sequences: the tokens at which `seq_idx` changes."""
    inside = seq_idx[0].diff().nonzero().flatten() + 1
    return torch.cat([inside.new_zeros(1), inside, inside.new_full((1,), tokens)]).int()


def _check_agreement(cu_seqlens: Tensor, starts: Tensor) -> None:
    """Check that `cu_seqlens` has the boundaries of `seq_idx`, empty sequences aside."""
    given, numbered = (torch.unique_consecutive(x).tolist() for x in (cu_seqlens, starts))
    if given != numbered:
        raise SpecError(
            f"accelerate: cu_seqlens has boundaries {given}, should be those of seq_idx, "
            f"{numbered}: the delta rule would keep other sequences apart than the short "
            f"convolution"
        )
