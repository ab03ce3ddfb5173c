"""Check calls while torch.onnx.export runs, and say what the export needs.

A step that torch.compile traces through must stay one operator here, for it becomes one node.
"""

from __future__ import annotations

import sys

from gdn_ops.spec.errors import SpecError

_has_table = False


def is_exporting() -> bool:
    """Return whether torch.onnx.export is running."""
    # torch loads it on first use, and it takes long.
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def note_table() -> None:
    """Note that a translation table was made, without which torch.onnx.export would fail."""
    global _has_table
    _has_table = True


def check_call(op: str, inplace: bool) -> None:
    """Check that a call can be exported, if torch.onnx.export is running.

    Raises:
        SpecError: the call cannot be exported; the text says the cure.
    """
    if not is_exporting():
        return
    if not _has_table:
        raise SpecError(
            f"{op}: torch.onnx.export was given no translation of it, should be given "
            f"custom_translation_table=gdn_ops.export.translation_table()"
        )
    if inplace:
        raise SpecError(
            f"{op}: inplace is True, should be False in an export to ONNX: the module "
            f"returns the new state, and a DecodeSession binds both to one buffer"
        )


# Do as torch.compiler.assume_constant_result does, see `registry.traceable_step`.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
check_call._dynamo_marked_constant = True  # type: ignore[attr-defined]
