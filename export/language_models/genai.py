"""Describe an exported model to onnxruntime-genai: its genai_config.json.

Names of states are those that it looks for by itself. The type names a way to make positions and
masks, not an architecture: that of Qwen3.5's text model passes positions from which padding can be
told, which its other types do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from gdn_ops.export.language_models.plan import Attention, LanguageModel
from gdn_ops.export.model.folder import GRAPH
from gdn_ops.export.runtime.tokenizer import TOKENIZER_CONFIG

CONFIG: Final = "genai_config.json"
"""The file that onnxruntime-genai reads first."""

TYPE: Final = "qwen3_5_text"

_NO_LIMIT: Final = 131072
"""Positions of a model that does not say how many it is made for."""

TOKENIZERS: Final = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "LlamaTokenizer",
)
"""Classes of tokenizers that it reads; the file of the tokenizer is what counts."""


def write_config(folder: Path, plan: LanguageModel) -> None:
    """Write the configuration beside a graph of the flavour onnxruntime."""
    attention = next((x.mixer for x in plan.layers if isinstance(x.mixer, Attention)), None)
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": GRAPH,
        "hidden_size": plan.hidden,
        "num_hidden_layers": len(plan.layers),
    }
    if attention is not None:
        decoder |= {
            "head_size": attention.width,
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.key_heads,
        }
    else:
        decoder["head_size"] = 1
    eos = list(plan.eos) or [plan.vocabulary - 1]
    model: dict[str, Any] = {
        "type": TYPE,
        "context_length": plan.longest or _NO_LIMIT,
        "vocab_size": plan.vocabulary,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": eos[0] if plan.pad is None else plan.pad,
        # Tokens of pictures, which would else be token 0.
        "image_token_id": -1,
        "video_token_id": -1,
        "vision_start_token_id": -1,
        "decoder": decoder,
    }
    if plan.bos is not None:
        model["bos_token_id"] = plan.bos
    search = {"do_sample": False, "past_present_share_buffer": True}
    text = json.dumps({"model": model, "search": search}, indent=2)
    (folder / CONFIG).write_text(text + "\n")


def readable_tokenizer(folder: Path) -> None:
    """Name a class of tokenizers that onnxruntime-genai reads, where another one is named."""
    file = folder / TOKENIZER_CONFIG
    if not file.is_file():
        return
    facts = json.loads(file.read_text())
    if facts.get("tokenizer_class") not in (None, *TOKENIZERS):
        facts["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
