"""Export tiny models of every family, each once, and say what transformers makes of them."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import compat_models
from gdn_ops import export

FAMILIES = (
    "qwen3_next-2:1",
    "qwen3_next-3:1",
    "qwen3_5-3:1",
    "qwen3_5_moe-2:1",
    "olmo_hybrid-1:1",
    "lara_mini-2:1",
)
"""Those whose every layer has an ONNX form."""

FLAVOURS = ("portable", "onnxruntime")

COUNT = 64
"""Tokens that are added where tokens are compared."""

LENGTHS = (9, 5, 2)
"""Of prompts that are read together: the shorter ones are padded in front."""


@functools.cache
def model(family: str) -> Any:
    """Return the model of a family; what fills rows is embedded like any other token."""
    # As built, it is embedded as zeros, which most layers let pass without a trace.
    tiny = copy.deepcopy(compat_models.model(family))
    embedding = tiny.get_input_embeddings().weight
    with torch.no_grad():
        embedding[0] = embedding[1:6].sum(0)
    return tiny


@functools.cache
def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="gdn_ops-exported-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def exported(family: str, flavour: str = "portable", **options: Any) -> Path:
    """Return the folder of a family; tests that change one copy it."""
    name = "-".join((family.replace(":", "_"), flavour, *map(str, options.values())))
    folder: Path = export.export_model(model(family), _made() / name, flavour=flavour, **options)
    return folder


@functools.cache
def session(
    family: str, flavour: str = "portable", body: str = "auto", **options: Any
) -> export.ModelSession:
    """Return a session with the folder of a family; no call changes it."""
    return export.ModelSession(exported(family, flavour, **options), threads=1, body=body)


CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,é€😀"
"""What the tokenizer of `speaking` has bytes for."""


@functools.cache
def tokenizer() -> Any:
    """Return a tokenizer whose tokens are bytes, so that some characters are several."""
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    used = {*"".join(piece for piece, _ in split.pre_tokenize_str(CHARACTERS))}
    rest = sorted({*split.alphabet()} - used)
    names = ["<pad>", "<eos>", *sorted(used), *rest][: compat_models.COMMON["vocab_size"]]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[])
    )
    inner.pre_tokenizer, inner.decoder = split, tokenizers.decoders.ByteLevel()
    return compat_models.transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )


@functools.cache
def speaking(flavour: str = "portable") -> Path:
    """Return the folder of a small model with a tokenizer; it ends with token 1."""
    tiny = copy.deepcopy(model(compat_models.SMALL))
    tiny.generation_config.eos_token_id = 1
    folder: Path = export.export_model(
        tiny, _made() / f"speaking-{flavour}", flavour=flavour, tokenizer=tokenizer()
    )
    return folder


@functools.cache
def prompts(lengths: Sequence[int] = LENGTHS) -> tuple[tuple[int, ...], ...]:
    """Return prompts of some lengths."""
    return tuple(
        tuple(compat_models.tokens(1, length, seed=length)[0].tolist()) for length in lengths
    )


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as one tensor (B, T), padded in front, and their mask."""
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T).long()
    for i, row in enumerate(rows):
        ids[i, T - len(row) :], mask[i, T - len(row) :] = torch.tensor(row), 1
    return ids, mask


@functools.cache
def greedy(family: str, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Return what transformers adds to prompts of some lengths."""
    ids, mask = padded(prompts(lengths))
    found = model(family).generate(
        ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    added: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return added
