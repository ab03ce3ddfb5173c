"""Export a torch module to an ONNX model whose recurrent layers are nodes of this library."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor
from torch.utils import _pytree as pytree

from gdn_ops.environment.files import whole
from gdn_ops.export.bodies.body import DEFAULT_OPSET, MIN_OPSET
from gdn_ops.export.bodies.table import BODIES, check_opset, find_body
from gdn_ops.export.model.conversion import with_opset
from gdn_ops.export.model.functions import set_body
from gdn_ops.export.model.naming import Names, carries_states, check_names, name_values
from gdn_ops.export.model.nodes import NoNodeError, check_model, nodes_of
from gdn_ops.export.model.single import BATCH, TOKENS
from gdn_ops.export.node.arguments import check_flag, check_target, check_type
from gdn_ops.export.node.schema import SEQUENCE, STEP, Operator
from gdn_ops.export.torch_exporter.translation import translation_table
from gdn_ops.export.torch_exporter.wrappers import sizes_as_gathered, unwrapped
from gdn_ops.spec.errors import SpecError

TORCH_OPSET = 25
"""The newest opset that torch.onnx.export writes; models of newer ones are converted."""

_INLINE_BYTES = 1 << 30
"""Weights above this size are written into a file beside the model."""


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
    next value present.{i}.recurrent_state, i counting the calls. The same holds for `gated_delta`,
    `gated_delta_product` and `gated_delta_steps` over as many tokens as the example has, such as
    the writes of one token of a product. Arguments with conv_state in
    their name are called past_key_values.{i}.conv_state, in order, if there are as many results
    of such a shape.

    Args:
        module: what is exported; torch.compile, DataParallel, DistributedDataParallel and
            AveragedModel around it are taken off.
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
        OSError: the file cannot be written; what was there is left as it was.
        ModuleNotFoundError: onnxscript is not installed.
    """
    export = _Export("export_decode", STEP, opset, body, names)
    return export.run(module, args, dynamic_batch, path)


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

    Returns and raises what `export_decode` does.
    """
    export = _Export("export_prefill", SEQUENCE, opset, body, names)
    return export.run(module, args, dynamic_batch, path)


@dataclass(frozen=True)
class _Export:
    """Run an export for a public function, the label, whose operator the module should call."""

    label: str
    operator: Operator
    opset: int
    body: str | None
    names: Names | None

    def run(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        dynamic_batch: bool,
        path: str | os.PathLike[str] | None,
    ) -> ModelProto:
        """Export a module, and write the model if there is a path."""
        self._check_given(module, dynamic_batch, path)
        module = unwrapped(self.label, module)
        first = self._first_tensor(args)
        rows, length = first.shape[0], self._length(first)
        self._check_options()
        if dynamic_batch and rows < 2:
            # torch.export takes a size of 0 or 1 to be fixed.
            args, rows = _with_two_rows(args, rows), 2
        sizes = {0: torch.export.Dim(BATCH)} if dynamic_batch else {}
        tokens = torch.export.Dim(TOKENS)

        def dynamic_sizes(x: Any) -> dict[int, Any] | None:
            if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != rows:
                return None
            is_long = length is not None and x.dim() > 1 and x.shape[1] == length
            return sizes | ({1: tokens} if is_long else {}) or None

        dynamic = sizes_as_gathered(module, pytree.tree_map(dynamic_sizes, args))
        model = _run_torch(self.label, module, args, dynamic, min(self.opset, TORCH_OPSET))
        self._check_nodes(model)
        if self.opset > TORCH_OPSET:
            cure = f"export with opset={DEFAULT_OPSET}"
            model = with_opset(model, self.opset, self.label, cure)
        name_values(self.label, model, self.names)
        model = set_body(model, self.body)
        if path is None:
            check_model(model)
        else:
            _write(model, Path(path))
        return model

    def _check_given(self, module: Any, dynamic_batch: Any, path: Any) -> None:
        """Check arguments that torch would not, or only after minutes."""
        check_type(self.label, "module", module, torch.nn.Module, "a torch.nn.Module")
        check_flag(self.label, "dynamic_batch", dynamic_batch)
        check_type(self.label, "opset", self.opset, int, "an integer")
        check_names(self.label, self.names)
        if path is not None:
            check_target(self.label, path)

    def _first_tensor(self, args: Any) -> Tensor:
        """Return the tensor whose first size is the batch."""
        if not isinstance(args, tuple):
            kind = type(args).__name__
            raise SpecError(f"{self.label}: args has type {kind}, should be a tuple")
        tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
        if not tensors or not tensors[0].dim():
            raise SpecError(
                f"{self.label}: args hold no tensor with a batch, should hold at least one"
            )
        return tensors[0]

    def _length(self, first: Tensor) -> int | None:
        """Return the number of tokens that the first tensor has, None for a step."""
        if self.operator is STEP:
            return None
        if first.dim() < 2 or first.shape[1] < 2:
            raise SpecError(
                f"{self.label}: the first tensor of args has shape {tuple(first.shape)}, should "
                f"be (B, T, ...) with at least two tokens"
            )
        return first.shape[1]

    def _check_options(self) -> None:
        """Check the opset and the body, before torch runs."""
        label, opset, body = self.label, self.opset, find_body(self.label, self.body)
        beyond = [other for other in BODIES.values() if other.min_opset > TORCH_OPSET]
        if not (MIN_OPSET <= opset <= TORCH_OPSET or any(opset >= b.min_opset for b in beyond)):
            others = "".join(f", or {b.min_opset} for body {b.name!r}" for b in beyond)
            raise SpecError(
                f"{label}: opset is {opset}, should be {MIN_OPSET} to {TORCH_OPSET}{others}"
            )
        if body is not None and opset < body.min_opset:
            raise SpecError(
                f"{label}: opset is {opset}, should be {body.min_opset} for body {body.name!r}; "
                f"or take body='standard'"
            )
        check_opset(label, opset, self.body)

    def _check_nodes(self, model: ModelProto) -> None:
        """Check that the module called the op of the operator."""
        expected = f"{self.label}: the module calls no {self.operator.spec.name}, should call it"
        try:
            operators = {node.variant.operator for node in nodes_of(model)}
        except NoNodeError:
            raise SpecError(
                f"{expected}; pass the module itself: a program that torch.export made before "
                f"holds the step in pieces"
            ) from None
        if self.operator in operators:
            return
        if self.operator is STEP and carries_states(model):
            # So many tokens a call, such as the factors of one token of a product.
            return
        raise SpecError(
            f"{expected}: there are only nodes {', '.join(map(str, operators))}; the other "
            f"exporter is for them"
        )


def _with_two_rows(args: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """Return arguments of two rows, given those of one or none."""

    def repeat(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != rows:
            return x
        return x.repeat(2, *(1 for _ in x.shape[1:])) if rows else x.new_zeros(2, *x.shape[1:])

    return pytree.tree_map(repeat, args)  # type: ignore[no-any-return]


def _run_torch(
    label: str,
    module: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any,
    opset: int,
) -> ModelProto:
    """Run torch.onnx.export; raise an error of ours inside it as it is, another with its cause."""
    table = translation_table()
    # torch merges two arguments that are one tensor, as the zeros of two layers may be.
    args = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
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
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=table,
            )
    except Exception as error:
        raise _own_cause(error) or _foreign_cause(label, error) from error
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


def _foreign_cause(label: str, error: BaseException) -> SpecError:
    """Return an error that says why torch failed: in the first line of its first cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return SpecError(f"{label}: torch.onnx.export does not take the module: {text}")


def _write(model: ModelProto, path: Path) -> None:
    """Write and check a model; large weights go into a file beside it."""
    beside = model.ByteSize() > _INLINE_BYTES
    location = f"{path.name}.data" if beside else None
    with whole(path) as file:
        onnx.save_model(model, file, save_as_external_data=beside, location=location)
        if beside:
            # A model of more than 2 GiB can be checked on disk alone.
            onnx.checker.check_model(file, full_check=True)
        else:
            check_model(model)
