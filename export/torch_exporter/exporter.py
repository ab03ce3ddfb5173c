"""Export a torch module to an ONNX model whose recurrent layers are nodes of this library."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor
from torch.utils import _pytree as pytree

from gdn_ops.export.node.model import NoNodeError, check_model, nodes_of, set_body
from gdn_ops.export.node.naming import Names, name_values
from gdn_ops.export.node.opsets import with_opset
from gdn_ops.export.node.schema import SEQUENCE, STEP, Operator
from gdn_ops.export.node.single import BATCH, TOKENS
from gdn_ops.export.node.variants import (
    BODIES,
    DEFAULT_OPSET,
    ONNX_OPSET,
    STANDARD_OPSET,
    check_opset,
)
from gdn_ops.export.torch_exporter.translation import translation_table
from gdn_ops.spec.errors import SpecError

TORCH_OPSET = 25
"""The newest opset that torch.onnx.export writes; models of newer ones are converted."""

_INLINE_BYTES = 1 << 30
"""Weights above this size are written into a file beside the model."""

Shapes = Callable[[Tensor], dict[int, Any] | None]


def export_decode(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
    dynamic_batch: bool = True,
    names: Names | None = None,
) -> ModelProto:
    """Export a module that decodes one token, with `gated_delta_step` inside.

    The module takes every state as an argument and returns its next value. A state that goes
    from an argument into `gated_delta_step` is called past_key_values.{i}.recurrent_state, and its
    next value present.{i}.recurrent_state, i counting the calls. Arguments with conv_state in
    their name are called past_key_values.{i}.conv_state, in order, if there are as many results
    of such a shape.

    Args:
        module: what is exported.
        args: example arguments; the first size of every tensor is the batch.
        path: where the model is written; weights beyond 1 GiB go into a file beside it.
        opset: of ai.onnx: 18 to 25, or 27 for body "onnx".
        body: of our nodes, see `set_body`.
        dynamic_batch: whether the batch is symbolic.
        names: names of all inputs and all outputs, in order, None for those that are
            named as said above.

    Returns:
        The model, checked.

    Raises:
        SpecError: the module or an argument cannot be exported; the text says the cure.
        ModuleNotFoundError: onnxscript is not installed.
    """
    tensors = _tensors("export_decode", args)
    batch = torch.export.Dim(BATCH) if dynamic_batch else None
    rows = tensors[0].shape[0]

    def shapes(x: Tensor) -> dict[int, Any] | None:
        return {0: batch} if batch is not None and x.dim() and x.shape[0] == rows else None

    if dynamic_batch:
        args = _with_two_rows(args, rows)
        rows = max(rows, 2)
    return _export("export_decode", STEP, module, args, shapes, path, opset, body, names)


def export_prefill(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None = None,
    *,
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
    dynamic_batch: bool = True,
    names: Names | None = None,
) -> ModelProto:
    """Export a module that reads a prompt of T tokens, with `gated_delta` inside.

    Its states have the names and shapes of those of `export_decode`, so that what it
    returns is what decoding starts from. T is symbolic: every tensor whose second size is that of
    the first tensor, (B, T, ...), has its tokens there, so take a T that is no other size.

    Args:
        module, args, path, opset, body, dynamic_batch, names: as in `export_decode`.

    Returns:
        The model, checked.

    Raises:
        SpecError: the module or an argument cannot be exported; the text says the cure.
        ModuleNotFoundError: onnxscript is not installed.
    """
    label = "export_prefill"
    tensors = _tensors(label, args)
    if tensors[0].dim() < 2 or tensors[0].shape[1] < 2:
        raise SpecError(
            f"{label}: the first tensor of args has shape {tuple(tensors[0].shape)}, should be "
            f"(B, T, ...) with at least two tokens"
        )
    batch = torch.export.Dim(BATCH) if dynamic_batch else None
    tokens = torch.export.Dim(TOKENS)
    rows, length = tensors[0].shape[:2]
    if dynamic_batch:
        args = _with_two_rows(args, rows)
        rows = max(rows, 2)

    def shapes(x: Tensor) -> dict[int, Any] | None:
        if not x.dim() or x.shape[0] != rows:
            return None
        found = {0: batch} if batch is not None else {}
        return found | ({1: tokens} if x.dim() > 1 and x.shape[1] == length else {})

    return _export(label, SEQUENCE, module, args, shapes, path, opset, body, names)


def _tensors(label: str, args: Any) -> list[Tensor]:
    """Return the tensors among the arguments."""
    if not isinstance(args, tuple):
        raise SpecError(f"{label}: args has type {type(args).__name__}, should be a tuple")
    found = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    if not found or not found[0].dim():
        raise SpecError(f"{label}: args hold no tensor with a batch, should hold at least one")
    return found


def _with_two_rows(args: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """Repeat a batch of one: torch.export takes a size of 0 or 1 to be fixed."""
    if rows >= 2:
        return args

    def repeat(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != rows:
            return x
        return x.repeat(2, *(1 for _ in x.shape[1:])) if rows else x.new_zeros(2, *x.shape[1:])

    return pytree.tree_map(repeat, args)  # type: ignore[no-any-return]


def _check_options(label: str, opset: int, body: str | None) -> None:
    if body is not None and body not in BODIES:
        known = ", ".join(BODIES)
        raise SpecError(f"{label}: body is {body!r}, should be one of {known}, or None for none")
    if not (STANDARD_OPSET <= opset <= TORCH_OPSET or opset >= ONNX_OPSET):
        raise SpecError(
            f"{label}: opset is {opset}, should be {STANDARD_OPSET} to {TORCH_OPSET}, or "
            f"{ONNX_OPSET} for body 'onnx'"
        )
    if body == "onnx" and opset < ONNX_OPSET:
        raise SpecError(
            f"{label}: opset is {opset}, should be {ONNX_OPSET} for body 'onnx'; or take "
            f"body='standard'"
        )
    check_opset(label, opset, body)


def _export(
    label: str,
    operator: Operator,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    shapes: Shapes,
    path: str | os.PathLike[str] | None,
    opset: int,
    body: str | None,
    names: Names | None,
) -> ModelProto:
    _check_options(label, opset, body)
    model = _run_torch(module, args, shapes, min(opset, TORCH_OPSET))
    found = {node.variant.operator for node in _nodes(label, operator, model)}
    if operator not in found:
        raise SpecError(
            f"{label}: the module calls no {operator.spec.name}, should call it: there are only "
            f"nodes {', '.join(map(str, found))}; the other exporter is for them"
        )
    if opset > TORCH_OPSET:
        model = with_opset(model, opset, label, f"export with opset={DEFAULT_OPSET}")
    name_values(label, model, names)
    model = set_body(model, body)
    if path is None:
        check_model(model)
    else:
        _write(model, Path(path))
    return model


def _nodes(label: str, operator: Operator, model: ModelProto) -> Sequence[Any]:
    try:
        return nodes_of(model)
    except NoNodeError:
        raise SpecError(
            f"{label}: the module calls no {operator.spec.name}, should call it; pass the module "
            f"itself: a program that torch.export made before holds the step in pieces"
        ) from None


def _run_torch(
    module: torch.nn.Module, args: tuple[Any, ...], shapes: Shapes, opset: int
) -> ModelProto:
    """Run torch.onnx.export; raise an error of ours inside it as it is."""
    table = translation_table()
    # torch merges two arguments that are one tensor, as the zeros of two layers may be.
    args = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
    dynamic = pytree.tree_map(lambda x: shapes(x) if isinstance(x, Tensor) else None, args)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # torch warns of its own internals.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=dynamic,
                custom_translation_table=table,
            )
    except Exception as error:
        own = _own_cause(error)
        if own is None:
            raise
        raise own from error
    assert program is not None
    return program.model_proto


def _own_cause(error: BaseException) -> SpecError | None:
    """Return the error of ours that made torch fail, without the text that torch appended."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SpecError):
            return SpecError(str(cause).partition("\n\nWhile executing")[0])
        cause = cause.__cause__ or cause.__context__
    return None


def _write(model: ModelProto, path: Path) -> None:
    """Write and check a model; large weights go into a file beside it."""
    beside = model.ByteSize() > _INLINE_BYTES
    onnx.save_model(
        model, path, save_as_external_data=beside, location=f"{path.name}.data" if beside else None
    )
    if not beside:
        check_model(model)
        return
    # A model of more than 2 GiB can be checked on disk alone.
    onnx.checker.check_model(path, full_check=True)
