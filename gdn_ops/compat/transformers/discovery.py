"""Find the modeling modules of transformers that have the gated delta rule, without a list."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

CHUNK = "torch_chunk_gated_delta_rule"
RECURRENT = "torch_recurrent_gated_delta_rule"
FUNCTIONS = (CHUNK, RECURRENT)
"""The functions that are replaced: of many tokens, and of one."""

KDA_CHUNK = "chunk_kimi_delta_attention"
KDA_RECURRENT = "recurrent_kimi_delta_attention"
KDA_FUNCTIONS = (KDA_CHUNK, KDA_RECURRENT)
"""The same of models whose decay is one of every key channel."""

PAIRS = (FUNCTIONS, KDA_FUNCTIONS)
"""The pairs of functions; a module has one of them."""

_MODELS = "transformers.models."


def architecture_of(name: str) -> str | None:
    """Return the model folder that a module's name belongs to; None if it is no modeling module."""
    if not name.startswith(_MODELS):
        return None
    folder, _, module = name.removeprefix(_MODELS).partition(".")
    return folder if module.startswith("modeling_") and "." not in module else None


def functions_of(module: ModuleType) -> tuple[str, ...]:
    """Return the names of the delta rule's functions, out of PAIRS, that a module has."""
    # Not by getattr: it would make the lazy modules of transformers import things.
    return tuple(name for pair in PAIRS for name in pair if vars(module).get(name) is not None)


def pair_of(module: ModuleType) -> tuple[str, str]:
    """Return the pair of functions that a module has, or has the most of; else the first pair."""
    found = functions_of(module)
    return max(PAIRS, key=lambda pair: sum(name in found for name in pair))


def loaded_modules() -> list[ModuleType]:
    """Return the loaded modeling modules that have at least one of the functions."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if architecture_of(name) is not None
        and isinstance(module, ModuleType)
        and functions_of(module)
    ]


def known_architectures() -> tuple[str, ...]:
    """Return the model folders of the installed transformers that have the gated delta rule.

    Its source files are searched and nothing is imported. Modules that are loaded already count,
    wherever they come from.
    """
    spec = importlib.util.find_spec("transformers")
    folders = () if spec is None else tuple(spec.submodule_search_locations or ())
    loaded = (m.__name__ for m in loaded_modules() if set(pair_of(m)) <= set(functions_of(m)))
    architectures = {architecture_of(name) for name in loaded} | set(_architectures_in(folders))
    return tuple(sorted(name for name in architectures if name is not None))


@functools.cache
def _architectures_in(folders: tuple[str, ...]) -> frozenset[str]:
    """Return the model folders whose modeling files name both functions of a pair."""
    files = [p for folder in folders for p in Path(folder, "models").glob("*/modeling_*.py")]
    sources = ((path.parent.name, path.read_bytes()) for path in files)
    pairs = [[name.encode() for name in pair] for pair in PAIRS]
    return frozenset(
        folder
        for folder, source in sources
        if any(all(name in source for name in pair) for pair in pairs)
    )
