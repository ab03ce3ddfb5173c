"""Export a whole language model: one graph for prompts and for decoding, its weights beside it."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from gdn_ops.export.bodies.body import DEFAULT_OPSET
from gdn_ops.export.bodies.table import check_opset
from gdn_ops.export.language_models.flavours import FLAVOURS, Flavour
from gdn_ops.export.language_models.genai import CONFIG, readable_tokenizer, write_config
from gdn_ops.export.language_models.graph import Graph, WeightFile
from gdn_ops.export.language_models.layers import LayerWriter
from gdn_ops.export.language_models.plan import LanguageModel
from gdn_ops.export.language_models.quantising import BITS, quantise
from gdn_ops.export.language_models.reading import LABEL, read_model
from gdn_ops.export.language_models.reading_hybrid import hybrid_of, read_hybrid
from gdn_ops.export.model.folder import (
    DESCRIPTION,
    GRAPH,
    WEIGHTS,
    Folder,
    digest_of,
    write_description,
)
from gdn_ops.export.model.functions import set_body
from gdn_ops.export.model.naming import write_states
from gdn_ops.export.model.nodes import ir_version
from gdn_ops.export.node.arguments import check_name
from gdn_ops.export.node.schema import DOMAIN, VERSION
from gdn_ops.export.runtime.model_session import ModelSession
from gdn_ops.export.runtime.sessions import onnxruntime
from gdn_ops.export.runtime.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from gdn_ops.spec.errors import SpecError

LOGITS_BEHIND = ("last", "all")
"""Behind which tokens of a call there are logits."""

OLDEST = 18
"""The first opset of ai.onnx that has all operators in the forms that graphs are written with."""

ALLOWED = 1e-3
"""Largest difference between the logits of the graph and those of a float32 model, relative to the
largest of them: above it the graph computes something else."""

ROUNDINGS = 16
"""Roundings of its dtype that the logits of a shorter model may be off by."""


def export_model(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    flavour: str = "portable",
    weights: str = "float32",
    logits: str = "last",
    opset: int = DEFAULT_OPSET,
) -> Path:
    """Export a causal language model of transformers, or of gdn_ops.nn, to ONNX.

    One graph reads prompts and decodes: `input_ids` (B, T) and `attention_mask` (B, past + T),
    1 for tokens and 0 for padding before them, and the states of every layer, which it returns
    again: `past_key_values.{i}.conv_state`, `.recurrent_state`, `.key` and `.value`, zeros and
    empty at the start. Before the folder is there, the graph is run, and its logits are compared
    with the model's. `ModelSession` generates with the folder, and onnxruntime-genai with that of
    flavour "onnxruntime".

    Args:
        model: Qwen3-Next, Qwen3.5 (dense and mixture of experts), OLMo-Hybrid, or another one whose
            parts are theirs; or a gdn_ops.nn.HybridLM.
        folder: it is made, or its files are replaced.
        tokenizer: of transformers, saved into the folder; None for none.
        flavour: "portable" for operators of ai.onnx alone, "onnxruntime" for those of com.microsoft
            where they are faster.
        weights: "float32"; or "int8" and "int4" for the matrices of linear layers, in blocks of 32
            with a scale each, by onnxruntime's tool and with its flavour only.
        logits: "last" for those behind the last token of a call, "all" for all.
        opset: of ai.onnx.

    Returns:
        The folder.

    Raises:
        SpecError: a part of the model has no ONNX form, or the graph computes something else; the
            text names it.
        OSError: the folder cannot be written.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    _check_options(flavour, weights, logits, opset)
    onnxruntime()
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise SpecError(f"{LABEL}: folder is {str(target)!r}, which is a file")
    plan = _read(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gdn_ops-", dir=target.parent) as made:
        _write(plan, Path(made), FLAVOURS[flavour], logits, opset, weights)
        _compare(model, Path(made), weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
            readable_tokenizer(Path(made))
        _move(Path(made), target)
    return target


def _check_options(flavour: str, weights: str, logits: str, opset: int) -> None:
    """Check how a model is to be written, before it is read."""
    check_name(LABEL, "flavour", flavour, FLAVOURS)
    check_name(LABEL, "weights", weights, BITS)
    check_name(LABEL, "logits", logits, LOGITS_BEHIND)
    if BITS[weights] and not FLAVOURS[flavour].imports:
        raise SpecError(
            f"{LABEL}: weights is {weights!r} and flavour {flavour!r}, should be 'onnxruntime': "
            f"operators of ai.onnx alone do not multiply by them"
        )
    check_opset(LABEL, opset, FLAVOURS[flavour].body)
    if opset < OLDEST:
        raise SpecError(f"{LABEL}: opset is {opset}, should be at least {OLDEST}")


def _move(made: Path, target: Path) -> None:
    """Move files into a folder, the description last: without it the folder is no model.

    What describes an earlier model to a runtime, or is its tokenizer, goes with it.
    """
    target.mkdir(exist_ok=True)
    for name in (DESCRIPTION, CONFIG, TOKENIZER, TOKENIZER_CONFIG):
        (target / name).unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda file: file.name == DESCRIPTION):
        os.replace(file, target / file.name)


def _write(
    plan: LanguageModel, folder: Path, flavour: Flavour, logits: str, opset: int, dtype: str
) -> None:
    """Write the files of a model into a folder."""
    with WeightFile(folder / WEIGHTS) as weights:
        graph = Graph(weights)
        writer = LayerWriter(graph, flavour, splits_head=bool(BITS[dtype]))
        writer.write(plan, all_logits=logits == "all")
        opsets = [
            helper.make_opsetid(domain, version)
            for domain, version in (("", opset), (DOMAIN, VERSION), *flavour.imports)
        ]
        model = helper.make_model(
            graph.finished(plan.architecture), opset_imports=opsets, ir_version=ir_version(opsets)
        )
    write_states(model, writer.states)
    if any(node.domain == DOMAIN for node in model.graph.node):
        model = set_body(model, flavour.body)
    onnx.save_model(model, folder / GRAPH)
    onnx.checker.check_model(folder / GRAPH, full_check=not flavour.imports)
    if BITS[dtype]:
        quantise(folder / GRAPH, BITS[dtype])
    if flavour.has_positions:
        write_config(folder, plan)
    described = Folder(
        plan.architecture, flavour.name, dtype, logits, plan.vocabulary, plan.longest,
        flavour.shares_keys, writer.states, plan.eos, plan.bos, plan.pad,
        {name: digest_of(folder / name) for name in (GRAPH, WEIGHTS)},
    )  # fmt: skip
    write_description(folder / DESCRIPTION, described)


def _read(model: Any) -> LanguageModel:
    """Return the description of a model, of either library."""
    hybrid = hybrid_of(model)
    return read_model(model) if hybrid is None else read_hybrid(hybrid)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, vocabulary) of a model itself, given tokens (B, T)."""
    hybrid = hybrid_of(model)
    logits: torch.Tensor = model(ids, use_cache=False).logits if hybrid is None else hybrid(ids)[0]
    return logits


def _compare(model: Any, folder: Path, weights: str) -> None:
    """Check that a graph computes the logits of its model, at once and piece by piece.

    With quantised weights they differ, and how much is written into the description.
    """
    session = ModelSession(folder, checks_files=False)
    described = session.folder
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(described.vocabulary, (1, 7), generator=generator, device="cpu")
    was_training, device = model.training, next(model.parameters()).device
    with torch.no_grad():
        expected = _logits(model.eval(), ids.to(device))[0, -1].float().cpu().numpy()
    model.train(was_training)
    largest, error = np.abs(expected).max() or 1.0, 0.0
    for cuts in ((7,), (4, 1, 2)):
        state, start = None, 0
        for count in cuts:
            found, state = session.read(ids[0, start : start + count].tolist(), state)
            start += count
        last = found.reshape(-1, described.vocabulary)[-1]
        # Unlike max, it keeps NaN.
        error = float(np.maximum(error, np.abs(last - expected).max() / largest))
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    allowed = float(np.finfo(np.float32).max) if BITS[weights] else max(ALLOWED, ROUNDINGS * eps)
    if not error <= allowed:
        raise SpecError(
            f"{LABEL}: the graph of {type(model).__name__} computes other logits than the "
            f"model, off by {error:.2g} of the largest, should be within {allowed:g}: one of "
            f"its parts is not what it looks like"
        )
    write_description(folder / DESCRIPTION, dataclasses.replace(described, error=error))
