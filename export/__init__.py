"""Export the recurrent decode path, or whole language models, to ONNX, and run them in sessions.

export_model                             a language model of transformers to a folder
ModelSession, TextState                  generate with such a folder, and keep what it has read
TextGeneration, TextPieces               generate call by call, and tell text as it comes
export_decode, export_prefill            a torch module to a model
make_decode_model, make_prefill_model    a model of one node, without a module
load_model                               a model from a file, or what is wrong with the file
set_body                                 exchange the function body of a model's nodes
DecodeSession                            decode with onnxruntime, states updated in place
"""

from __future__ import annotations

try:
    import onnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gdn_ops.export needs the onnx extra: pip install 'gdn_ops[onnx]'", name=error.name
    ) from error

from gdn_ops.export.bodies.table import decode_function
from gdn_ops.export.language_models.writing import export_model
from gdn_ops.export.model.files import load_model
from gdn_ops.export.model.functions import bodies_of, set_body
from gdn_ops.export.model.naming import states_of
from gdn_ops.export.model.nodes import nodes_of
from gdn_ops.export.model.single import make_decode_model, make_prefill_model
from gdn_ops.export.node.schema import op_schema
from gdn_ops.export.runtime.decode_session import DecodeSession
from gdn_ops.export.runtime.model_session import ModelSession
from gdn_ops.export.runtime.sessions import available_bodies
from gdn_ops.export.runtime.text_generation import TextGeneration
from gdn_ops.export.runtime.text_pieces import TextPieces
from gdn_ops.export.runtime.text_state import TextState
from gdn_ops.export.torch_exporter.exporter import export_decode, export_prefill
from gdn_ops.export.torch_exporter.translation import translation_table

__all__ = [
    "DecodeSession",
    "ModelSession",
    "TextGeneration",
    "TextPieces",
    "TextState",
    "available_bodies",
    "bodies_of",
    "decode_function",
    "export_decode",
    "export_model",
    "export_prefill",
    "load_model",
    "make_decode_model",
    "make_prefill_model",
    "nodes_of",
    "op_schema",
    "set_body",
    "states_of",
    "translation_table",
]
