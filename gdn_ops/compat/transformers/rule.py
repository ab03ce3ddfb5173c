"""Replace the two functions of the delta rule, after trying the replacements on examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdn_ops.compat.transformers import packing, padding
from gdn_ops.compat.transformers.delta_rule import Note, delta_rule
from gdn_ops.compat.transformers.discovery import CHUNK, RECURRENT
from gdn_ops.compat.transformers.signatures import (
    definition,
    further_defaults,
    leading_objection,
)
from gdn_ops.compat.transformers.trial import Draw, difference, difference_from, plain_torch

_TENSORS = ("query", "key", "value", "g", "beta")
_OPTIONS = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
PARAMETERS = {CHUNK: (*_TENSORS, "chunk_size", *_OPTIONS), RECURRENT: (*_TENSORS, *_OPTIONS)}
"""What the parameters of each function begin with, in order; others may follow."""

_PACKING = ("cu_seqlens", "seq_idx")

LEFT = "transformers"
"""Noted instead of a backend when the original ran."""

ORIGINAL = "_gdn_ops_original"
"""Attribute of a replacement: the original that it replaces."""

Function = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Rule:
    """Hold one of the two functions of the delta rule, as a module has it.

    Attributes:
        name: of the function.
        original: the object in the module.
        definition: the function inside its decorators, which says what it computes.
        further: parameters that gdn_ops does not know, with their defaults.
    """

    name: str
    original: Any
    definition: Function
    further: dict[str, Any]

    def replacement(self, backend: Callable[[], str], note: Note) -> Function:
        """Return the replacement of the function, which runs on gdn_ops.

        Args:
            backend: says which backend to run on, at every call.
            note: told the op and the backend of every call.
        """
        run = self._caller(backend, note)

        def chunk(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            chunk_size: int | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            *more: Any,
            **options: Any,
        ) -> tuple[Tensor, Tensor | None]:
            state = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
            return run((query, key, value, g, beta), chunk_size, state, more, options)

        def recurrent(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            g: Tensor,
            beta: Tensor,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            *more: Any,
            **options: Any,
        ) -> tuple[Tensor, Tensor | None]:
            state = (initial_state, output_final_state, use_qk_l2norm_in_kernel)
            return run((query, key, value, g, beta), None, state, more, options)

        new = chunk if self.name == CHUNK else recurrent
        setattr(new, ORIGINAL, self.original)
        return new

    def _caller(self, backend: Callable[[], str], note: Note) -> Function:
        """Return the function that runs a call, given its arguments sorted by kind."""
        further = self.further

        def run(
            tensors: tuple[Tensor, ...],
            chunk_size: int | None,
            state: tuple[Tensor | None, bool, bool],
            more: tuple[Any, ...],
            options: dict[str, Any],
        ) -> tuple[Tensor, Tensor | None]:
            for name, value in zip(further, more, strict=False):
                options[name] = value
            for name, default in further.items():
                if options.get(name, default) is not default:
                    note("gated_delta", LEFT)
                    known: dict[str, Any] = dict(zip(_OPTIONS, state, strict=True))
                    if chunk_size is not None:
                        known["chunk_size"] = chunk_size
                    return self.original(*tensors, **known, **options)  # type: ignore[no-any-return]
            query = tensors[0]
            sequences = options.get("seq_idx")
            sequences = padding.sequences() if sequences is None else sequences
            rows, tokens = query.shape[:2]
            return delta_rule(
                *tensors,
                initial_state=state[0],
                output_final_state=state[1],
                use_qk_l2norm_in_kernel=state[2],
                mask=padding.mask_for(query),
                cu_seqlens=packing.boundaries(options.get("cu_seqlens"), sequences, rows, tokens),
                chunk_size=chunk_size,
                backend=backend(),
                note=note,
            )

        return run


def original_of(function: Any) -> Any:
    """Return the original of a replacement taken from another module, else the function."""
    return getattr(function, ORIGINAL, function)


def examine_rule(name: str, function: Any) -> Rule | str:
    """Return the rule of one of the two functions, or why that function cannot be replaced."""
    if not callable(function):
        return f"it has no function {name}"
    original = original_of(function)
    found = definition(original, PARAMETERS[name])
    if found is None:
        return leading_objection(name, original, PARAMETERS[name])
    further = further_defaults(found, (*PARAMETERS[name], *_PACKING))
    rule = Rule(name, original, found, further)
    objection = _tried(rule)
    return rule if objection is None else f"{name} {objection}"


def _tried(rule: Rule) -> str | None:
    """Try the replacement on examples; return how it differs from the original, or None."""
    new = rule.replacement(lambda: "torch", lambda op, backend: None)
    with plain_torch():
        for tensors, options in _examples(rule.name):
            found = difference(
                lambda: rule.definition(*tensors, **options),  # noqa: B023
                lambda: new(*tensors, **options),  # noqa: B023
            )
            if found is not None:
                return found
        tensors, options = _grouped(rule.name)
        try:
            # Older releases repeat the key heads before the call, and cannot do this.
            expected = rule.definition(*tensors, **options)
        except Exception:
            return None
        return difference_from(expected, lambda: new(*tensors, **options))


Example = tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]


def _example(tokens: int, key_heads: int, value_heads: int, has_state: bool) -> Example:
    draw, rows, key_width, value_width = Draw(), 2, 4, 3
    query, key = (draw.normal(rows, tokens, key_heads, key_width) for _ in range(2))
    value = draw.normal(rows, tokens, value_heads, value_width)
    state = draw.normal(rows, value_heads, key_width, value_width)
    return (query, key, value), {
        "g": -2 * draw.uniform(rows, tokens, value_heads),
        "beta": draw.uniform(rows, tokens, value_heads),
        "initial_state": state if has_state else None,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": has_state,
    }


def _examples(name: str) -> Iterator[Example]:
    """Yield example calls as layers make them, without an initial state and with one."""
    tokens = 9 if name == CHUNK else 1
    for has_state in (False, True):
        yield _example(tokens, 2, 2, has_state)


def _grouped(name: str) -> Example:
    """Return an example call with fewer key heads than value heads."""
    return _example(9 if name == CHUNK else 1, 2, 4, True)
