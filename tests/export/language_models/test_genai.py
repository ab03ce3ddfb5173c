"""onnxruntime-genai generates from the folder of flavour onnxruntime, as it lies."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exported_models
from exported_models import COUNT, FAMILIES, greedy, prompts
from gdn_ops import export
from onnx_needs import needs_genai, needs_ort_body

pytestmark = needs_ort_body

ONE_THREAD = {"intra_op_num_threads": 1}


def exported_with_end(family: str, to: Path) -> Path:
    """Export a model whose text ends with a token that it does not write here."""
    tiny = copy.deepcopy(exported_models.model(family))
    written = {token for row in greedy(family) for token in row}
    tiny.generation_config.eos_token_id = min(set(range(1, 97)) - written)
    return export.export_model(tiny, to, flavour="onnxruntime")


def genai_tokens(og: Any, folder: Path, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return what onnxruntime-genai adds to prompts, which it wants padded in front."""
    config = og.Config(str(folder))
    # Two threads that wait by spinning take each other's core where tests share one.
    config.overlay(json.dumps({"model": {"decoder": {"session_options": ONE_THREAD}}}))
    model = og.Model(config)
    T = max(map(len, rows))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=T + COUNT, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, parameters)
    ids, _ = exported_models.padded(rows)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(i)[T:].tolist() for i in range(len(rows))]


@needs_genai
# Lara-Mini with drawn weights repeats one token for ever.
@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_onnxruntime_genai_adds_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    folder = exported_with_end(family, tmp_path)
    expected = greedy(family)
    assert genai_tokens(og, folder, prompts()[:1]) == expected[:1]
    assert genai_tokens(og, folder, prompts()) == expected


def test_its_configuration_says_what_the_model_is() -> None:
    folder = exported_models.exported("olmo_hybrid-1:1", "onnxruntime")
    facts = json.loads((folder / "genai_config.json").read_text())
    assert facts["model"] == {
        "type": "qwen3_5_text",
        "context_length": 512,
        "vocab_size": 97,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "image_token_id": -1,
        "video_token_id": -1,
        "vision_start_token_id": -1,
        "decoder": {
            "session_options": {"provider_options": []},
            "filename": "model.onnx",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "head_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    }
    assert facts["search"] == {"do_sample": False, "past_present_share_buffer": True}
    portable = exported_models.exported("olmo_hybrid-1:1")
    assert not (portable / "genai_config.json").exists()
