"""Quantise the weights of a graph, by onnxruntime's own tool."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import onnx

from gdn_ops.spec.errors import SpecError

BITS: Final = {"float32": 0, "int8": 8, "int4": 4}
"""Bits of a weight by what users call it; 0 for weights that are not quantised."""

BLOCK: Final = 32
"""Weights of a column that share a scale."""

ACCURACY: Final = 4
"""Let onnxruntime round activations to 8 bits, a scale for each block, and multiply integers.

Without, its CPU kernels for weights of 8 bits make them float32 again in every call, which takes a
token 30 times as long; with weights of 4 bits a token takes 0.6 of the time."""


def quantise(graph: Path, bits: int) -> None:
    """Quantise the matrices of a graph in place; embeddings, convolutions and experts stay as is.

    Args:
        graph: the file; its weights lie in one file beside it.
        bits: 4 or 8.

    Raises:
        SpecError: the installed onnxruntime cannot.
    """
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as tool
    except ImportError as error:
        raise SpecError(
            f"export_model: weights of {bits} bits need the tool matmul_nbits_quantizer of "
            f"onnxruntime: {error}"
        ) from error
    logging.getLogger(tool.__name__).setLevel(logging.WARNING)
    model = onnx.load(graph)
    config = tool.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK,
        is_symmetric=True,
        bits=bits,
        accuracy_level=ACCURACY,
        op_types_to_quantize=("MatMul",),
    )
    quantizer = tool.MatMulNBitsQuantizer(model, bits=bits, algo_config=config)
    quantizer.process()
    quantised = quantizer.model.model
    weights = graph.with_name(f"{graph.name}.data")
    weights.unlink()
    onnx.save_model(
        quantised, graph, save_as_external_data=True, location=weights.name, size_threshold=1024
    )
