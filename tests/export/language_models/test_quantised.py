"""Weights of 8 and 4 bits make smaller files, whose error is measured and told."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import compat_models
import exported_models
from compat_models import transformers
from errors import refusal
from exported_models import exported, prompts
from gdn_ops import export
from onnx_needs import needs_ort_body

pytestmark = needs_ort_body

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@functools.cache
def wide() -> Any:
    """Return a model whose matrices are most of it."""
    if not hasattr(transformers, "Qwen3_5ForCausalLM"):
        pytest.skip("this transformers has no Qwen3_5ForCausalLM")
    torch.manual_seed(0)
    heads = compat_models.heads(2, 4, 32, 32)
    config = transformers.Qwen3_5TextConfig(
        **{**compat_models.COMMON, **WIDTHS, **heads, "head_dim": 32},
        layer_types=["linear_attention", "full_attention"],
    )
    return transformers.Qwen3_5ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export it with weights of every kind."""
    to = tmp_path_factory.mktemp("quantised")
    return {
        weights: export.export_model(wide(), to / weights, flavour="onnxruntime", weights=weights)
        for weights in ("float32", "int8", "int4")
    }


def off_by(folder: Path, ids: torch.Tensor) -> float:
    """Return how far logits are from the model's, relative to the largest."""
    (expected,) = compat_models.run(wide(), ids)[:, -1].numpy()
    session = export.ModelSession(folder, threads=1)
    (whole,), _ = session.read(ids[0].tolist())
    _, state = session.read(ids[0, :4].tolist())
    _, state = session.read(ids[0, 4:5].tolist(), state)
    (pieces,), _ = session.read(ids[0, 5:].tolist(), state)
    worst = max(np.abs(found - expected).max() for found in (whole, pieces))
    return float(worst / np.abs(expected).max())


def test_the_error_that_is_told_is_the_one_that_is_measured(folders: dict[str, Path]) -> None:
    ids = torch.randint(97, (1, 7), generator=torch.Generator().manual_seed(0))
    told = {name: export.ModelSession(path).folder.error for name, path in folders.items()}
    for name, path in folders.items():
        # Threads may add in another order.
        assert told[name] == pytest.approx(off_by(path, ids), rel=1e-2, abs=1e-6)
    assert 0 < told["float32"] < 1e-5 < told["int8"] < 0.03 < told["int4"] < 0.5
    # Other tokens are as far off.
    for name in ("int8", "int4"):
        others = [off_by(folders[name], compat_models.tokens(1, 7, seed)) for seed in range(3)]
        assert told[name] / 4 < np.median(others) < told[name] * 4


def test_each_halving_of_bits_makes_the_file_smaller(folders: dict[str, Path]) -> None:
    sizes = {name: (path / "model.onnx.data").stat().st_size for name, path in folders.items()}
    matrices = sum(
        module.weight.numel() for module in wide().modules() if isinstance(module, torch.nn.Linear)
    )
    # A scale of four bytes for 32 weights; the embedding stays as it is, and is the head too.
    per_weight = {"int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}
    for name, bytes_ in per_weight.items():
        assert sizes["float32"] - sizes[name] == pytest.approx((4 - bytes_) * matrices, rel=0.1)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_every_matrix_is_quantised_and_nothing_else(
    weights: str, bits: int, folders: dict[str, Path]
) -> None:
    nodes = onnx.load(folders[weights] / "model.onnx").graph.node
    before = onnx.load(folders["float32"] / "model.onnx").graph.node
    quantised = [node for node in nodes if node.op_type == "MatMulNBits"]
    attributes = [{a.name: a.i for a in node.attribute} for node in quantised]
    # Level 4 multiplies integers: without it weights of 8 bits are slower than float32.
    kinds = {(a["bits"], a["block_size"], a["accuracy_level"]) for a in attributes}
    assert kinds == {(bits, 32, 4)}
    # The head is a Gemm with the embedding where nothing is quantised, and a matrix here.
    assert len(quantised) == 1 + sum(node.op_type == "MatMul" for node in before)
    assert not any(node.op_type == "MatMul" for node in nodes)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_experts_stay_in_float32_beside_quantised_matrices(weights: str) -> None:
    session = exported_models.session("qwen3_next-2:1", "onnxruntime", weights=weights)
    assert session.folder.weights == weights
    added = session.generate(prompts(), 16)
    assert [len(row) for row in added] == [16] * 3
    (node,) = {
        tuple(n.input[2:5])
        for n in onnx.load(exported("qwen3_next-2:1", "onnxruntime") / "model.onnx").graph.node
        if n.op_type == "MoE" and n.name.startswith("layers.0/")
    }
    graph = onnx.load(exported("qwen3_next-2:1", "onnxruntime", weights=weights) / "model.onnx")
    kinds = {x.name: x.data_type for x in graph.graph.initializer}
    assert {kinds[name] for name in node if name} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_operators_of_ai_onnx_alone_are_not_quantised(weights: str, tmp_path: Path) -> None:
    assert refusal(export.export_model, wide(), tmp_path / "new", weights=weights) == (
        f"export_model: weights is {weights!r} and flavour 'portable', should be 'onnxruntime': "
        f"operators of ai.onnx alone do not multiply by them"
    )
    assert list(tmp_path.iterdir()) == []
