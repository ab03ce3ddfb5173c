"""Replace the functions of the delta rule, after trying the replacements on examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdn_ops.compat.transformers import packing, padding
from gdn_ops.compat.transformers.delta_rule import Note, delta_rule, split_delta_rule
from gdn_ops.compat.transformers.discovery import (
    CHUNK,
    KDA_CHUNK,
    KDA_FUNCTIONS,
    KDA_RECURRENT,
    RECURRENT,
)
from gdn_ops.compat.transformers.signatures import (
    definition,
    further_defaults,
    mismatch_of_parameters,
)
from gdn_ops.compat.transformers.split_calls import refuse
from gdn_ops.compat.transformers.trial import difference, difference_from, drawn, plain_torch
from gdn_ops.parallel.context import active

_TENSORS = ("query", "key", "value", "g", "beta")
_OPTIONS = ("initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
PARAMETERS = {
    CHUNK: (*_TENSORS, "chunk_size", *_OPTIONS),
    RECURRENT: (*_TENSORS, *_OPTIONS),
    KDA_CHUNK: (*_TENSORS, "chunk_size", *_OPTIONS),
    KDA_RECURRENT: (*_TENSORS, *_OPTIONS),
}
"""List the first parameters of each function, in order; others may follow."""

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
        further, names = self.further, (*PARAMETERS[self.name], *self.further)
        takes_any = any(
            p.kind is inspect.Parameter.VAR_KEYWORD
            for p in inspect.signature(self.definition).parameters.values()
        )

        def replacement(*positional: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
            # torch.compile of torch 2.8 cannot trace `strict=False`, which is the default.
            given = dict(zip(names, positional)) | keywords  # noqa: B905
            if not _binds(names, positional, keywords, given, takes_any):
                # The original says what is wrong, as it always does.
                return self.original(*positional, **keywords)  # type: ignore[no-any-return]
            split = active()
            if split is not None:
                _check_split(given, further)
                return split_delta_rule(split, given, backend=backend(), note=note)
            for name, default in further.items():
                if given.get(name, default) is not default:
                    note("gated_delta", LEFT)
                    return self.original(*positional, **keywords)  # type: ignore[no-any-return]
            query, numbers = given["query"], given.get("seq_idx")
            numbers = padding.sequences() if numbers is None else numbers
            # Layers rename it, or pass it on as the model is given it.
            cuts = given.get("cu_seqlens")
            cuts = given.get("cu_seq_lens_q") if cuts is None else cuts
            cu_seqlens = packing.boundaries(cuts, numbers, *query.shape[:2])
            return delta_rule(
                *(given[name] for name in _TENSORS),
                initial_state=given.get("initial_state"),
                output_final_state=given.get("output_final_state", False),
                use_qk_l2norm_in_kernel=given.get("use_qk_l2norm_in_kernel", False),
                mask=padding.mask_for(query),
                cu_seqlens=cu_seqlens,
                chunk_size=given.get("chunk_size"),
                backend=backend(),
                note=note,
            )

        setattr(replacement, ORIGINAL, self.original)
        return replacement


def _binds(
    names: tuple[str, ...],
    positional: tuple[Any, ...],
    keywords: dict[str, Any],
    given: dict[str, Any],
    takes_any: bool,
) -> bool:
    """Return whether a function with parameters of these names can be called like that."""
    is_once_each = len(given) == len(positional) + len(keywords)
    is_known = takes_any or all(name in names or name in _PACKING for name in keywords)
    return is_once_each and is_known and all(name in given for name in _TENSORS)


def _check_split(given: dict[str, Any], further: dict[str, Any]) -> None:
    """Check that a call of one of the functions has nothing beside its tokens."""
    defaults = {"initial_state": None, "output_final_state": False, **dict.fromkeys(_PACKING)}
    for name, default in (defaults | further).items():
        if given.get(name, default) is not default:
            refuse(f"{name} of the rule is given, should be {default} under sequence_parallel")


def original_of(function: Any) -> Any:
    """Return the original of a replacement taken from another module, else the function."""
    return getattr(function, ORIGINAL, function)


def examine_rule(name: str, function: Any) -> Rule | str:
    """Return the rule of one of the two functions, or why that function cannot be replaced."""
    if not callable(function):
        return f"it has no function {name}"
    original = original_of(function)
    inner = definition(original, PARAMETERS[name])
    if inner is None:
        return mismatch_of_parameters(name, original, PARAMETERS[name])
    further = further_defaults(inner, (*PARAMETERS[name], *_PACKING))
    rule = Rule(name, original, inner, further)
    incompatibility = _tried(rule)
    return rule if incompatibility is None else f"{name} {incompatibility}"


def _tried(rule: Rule) -> str | None:
    """Try the replacement on examples; return how it differs from the original, or None."""
    new = rule.replacement(lambda: "torch", lambda op, backend: None)
    tokens = 9 if rule.name in (CHUNK, KDA_CHUNK) else 1
    channels = rule.name in KDA_FUNCTIONS
    with plain_torch():
        for has_state in (False, True):
            options = _example(tokens, 2, 2, has_state, channels)
            reason = difference(
                lambda: rule.definition(**options),  # noqa: B023
                lambda: new(**options),  # noqa: B023
            )
            if reason is not None:
                return reason
        options = _example(tokens, 2, 4, True, channels)
        try:
            # Older releases repeat the key heads before the call, and cannot do this.
            expected = rule.definition(**options)
        except Exception:
            return None
        return difference_from(expected, lambda: new(**options))


def _example(
    tokens: int, key_heads: int, value_heads: int, has_state: bool, channels: bool
) -> dict[str, Any]:
    """Return the arguments of a call as layers make it, without an initial state or with one."""
    keys, values = (2, tokens, key_heads, 4), (2, tokens, value_heads, 3)
    decays = (*values[:-1], 4) if channels else values[:-1]
    shapes = (keys, keys, values, (2, value_heads, 4, 3), decays, values[:-1])
    query, key, value, state, decay, strength = drawn(*shapes)
    return {
        "query": query,
        "key": key,
        "value": value,
        "g": -2 * decay.sigmoid(),
        "beta": strength.sigmoid(),
        "initial_state": state if has_state else None,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": has_state,
    }
