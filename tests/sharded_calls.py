"""Run drawn calls on DTensors; ranks import this module, and tests draw and judge with it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
)
from torch.utils.checkpoint import checkpoint

import gdn_ops
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, OPS_BY_NAME
from gdn_ops.testing.example import Example, Results
from gdn_ops.torch_ops import sharding

Axes = tuple[str, ...]

SPLITS = {
    "none": (),
    "batch": ("B", "N"),
    "heads": ("H", "HV"),
    "columns": ("V",),
}
"""The axes that may be sharded together."""


@dataclass(frozen=True)
class Layout:
    """Describe how the arguments of a call lie on a mesh.

    Attributes:
        shape: of the mesh.
        splits: per dimension of the mesh, a key of SPLITS.
        others: (argument, dimension of the mesh, placement) of what lies otherwise: an axis, "sum"
            for shares of a sum, "whole" for copies.
    """

    shape: tuple[int, ...]
    splits: tuple[str, ...]
    others: tuple[tuple[str, int, str], ...] = ()

    def mesh(self) -> DeviceMesh:
        """Return the mesh."""
        names = ("data", "model")[: len(self.shape)]
        return _mesh(self.shape, names)

    def distributed(self, name: str, x: Tensor, axes: Axes) -> DTensor:
        """Return a tensor, of which every rank has a copy, as a DTensor that lies so."""
        mesh, placements = self.mesh(), []
        for split in self.splits:
            shards = [i for i, axis in enumerate(axes) if axis in SPLITS[split]]
            placements.append(Shard(shards[0]) if shards else Replicate())
        copies = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        result = copies.redistribute(placements=placements)
        for named, dim, how in self.others:
            if named == name:
                placements[dim] = _placement(how, axes)
        if not any(isinstance(p, Partial) for p in placements):
            return result.redistribute(placements=placements)
        whole = [Replicate() if isinstance(p, Partial) else p for p in placements]
        local = result.redistribute(placements=whole).to_local()
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        # One rank has all of the sum.
        for dim, placement in enumerate(placements):
            if isinstance(placement, Partial) and coordinate[dim] != 0:
                local = torch.zeros_like(local)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
        )


@functools.cache
def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _placement(how: str, axes: Axes) -> Placement:
    if how in axes:
        return Shard(axes.index(how))
    return Partial() if how == "sum" else Replicate()


def axes_in(spec: OpSpec, name: str, arguments: Mapping[str, Any]) -> Axes:
    """Return the axes of an argument in a call."""
    allowed = spec.tensor[name].shapes
    given = [s for s in allowed if s.given and arguments.get(s.given) is not None]
    fitting = [s for s in (*given, *allowed) if len(s.axes) == arguments[name].dim()]
    return fitting[0].axes


def distributed(
    spec: OpSpec, arguments: Mapping[str, Any], layout: Layout, grad: bool = False
) -> dict[str, Any]:
    """Return the arguments of a call as DTensors; with `grad`, as leaves where it has gradients."""
    given: dict[str, Any] = {}
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            x = layout.distributed(name, x.contiguous(), axes_in(spec, name, arguments))
            if grad and spec.tensor[name].differentiable:
                x = x.detach().requires_grad_()
        given[name] = x
    return given


Function = Callable[..., tuple[Tensor, Tensor]]


def sequence(
    example: Example, backend: str, layout: Layout, function: Function | None = None
) -> Results:
    """Run a call of `gated_delta` on DTensors, and return whole results and gradients.

    Args:
        example: the call.
        backend: its name.
        layout: how the arguments lie, and the gradients of the results.
        function: takes the arguments instead, and returns o and the final state.
    """
    given = distributed(GATED_DELTA, example.arguments(), layout, grad=True)
    if function is None:
        o, state = gdn_ops.gated_delta(**given, return_state=True, backend=backend)
    else:
        o, state = function(**given)
    d_o, d_state = cotangents(example, layout, o, state)
    leaves = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad([o, state], list(leaves.values()), [d_o, d_state])
    return whole(o, state, leaves, grads)


def cotangents(example: Example, layout: Layout, o: Tensor, state: Tensor) -> list[DTensor]:
    """Return the gradients of the results as DTensors."""
    d_o, d_state = example.cotangents()
    return [
        layout.distributed("d_o", d_o.to(o.dtype), ("B", "T", "HV", "V")),
        layout.distributed("d_state", d_state.to(state.dtype), ("N", "HV", "K", "V")),
    ]


def whole(o: Any, state: Any, leaves: Mapping[str, Tensor], grads: Sequence[Any]) -> Results:
    """Return results and gradients as every rank sees them."""
    results = {"o": gathered(o), "final_state": gathered(state)}
    for name, grad in zip(leaves, grads, strict=True):
        assert isinstance(grad, DTensor) and grad.shape == leaves[name].shape
        results[f"d_{name}"] = gathered(grad)
    return results


def gathered(x: Any) -> Tensor:
    """Return a DTensor as a plain tensor; torch 2.8 cannot gather one without elements."""
    if not x.numel():
        return torch.zeros(x.shape, dtype=x.dtype)
    result: Tensor = x.detach().full_tensor()
    return result


def with_mutant(mutant: str, example: Example, layout: Layout) -> Results:
    """Run a call with a planted fault."""
    splits, gradients = dict(sharding.SPLITS), sharding.Plan.gradient_placements
    try:
        if mutant == "shares of a gradient are called copies":
            sharding.Plan.gradient_placements = sharding.Plan.placements  # type: ignore[method-assign]
        elif mutant == "key heads stay whole":
            sharding.SPLITS["heads"] = ("HV",)
        return sequence(example, "torch", layout)
    finally:
        sharding.SPLITS.update(splits)
        sharding.Plan.gradient_placements = gradients  # type: ignore[method-assign]


def decode(op: str, arguments: dict[str, Any], layout: Layout) -> tuple[Any, ...]:
    """Run a decode op on DTensors; return its results and the state that was given, all whole."""
    spec = OPS_BY_NAME[op]
    # What is sent to ranks lies in memory that they share.
    arguments = arguments | {"state": arguments["state"].clone()}
    given = distributed(spec, arguments, layout)
    results = getattr(gdn_ops, op)(**given)
    return tuple(gathered(x) for x in (*results, given["state"]))


def placements(example: Example, layout: Layout) -> tuple[list[str], dict[str, list[str]]]:
    """Return where o and the gradients of a call lie, as text: S(0), R, P(sum)."""
    given = distributed(GATED_DELTA, example.arguments(), layout, grad=True)
    o: Any = gdn_ops.gated_delta(**given)
    o.sum().backward()
    leaves = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    return _shown(o), {name: _shown(x.grad) for name, x in leaves.items()}


def _shown(x: Any) -> list[str]:
    return [
        f"S({p.dim})" if isinstance(p, Shard) else "P(sum)" if isinstance(p, Partial) else "R"
        for p in x.placements
    ]


def mixed(function: str, example: Example, plain: tuple[str, ...]) -> None:
    """Run a call of which some arguments are plain tensors."""
    arguments = example.arguments()
    given = distributed(GATED_DELTA, arguments, Layout((2,), ("heads",)))
    given |= {name: arguments[name] for name in plain}
    if function == "operator":
        operator(given, False)
    elif function == "backward":
        values, (o, state, saved) = operator(given, True)
        torch.ops.gdn_ops.gated_delta_backward(*values, saved, o, state.to_local())
    elif function == "compiled":
        torch.compile(gdn_ops.gated_delta, backend="eager")(**given)
    else:
        gdn_ops.gated_delta(**given)


def on_two_meshes(example: Example) -> None:
    """Run a call whose values lie on another mesh than the rest."""
    arguments = example.arguments()
    given = distributed(GATED_DELTA, arguments, Layout((2,), ("heads",)))
    given["v"] = Layout((1, 2), ("none", "none")).distributed("v", arguments["v"], ("B",))
    gdn_ops.gated_delta(**given)


def with_a_bad_gate(example: Example) -> None:
    """Run a call with a decay above 1 in its last row."""
    arguments = example.arguments()
    arguments["alpha"][-1] = 2.0
    gdn_ops.gated_delta(**distributed(GATED_DELTA, arguments, Layout((2,), ("batch",))))


def explained(example: Example, layout: Layout) -> str:
    """Return what explain says of a call."""
    return str(gdn_ops.explain(**distributed(GATED_DELTA, example.arguments(), layout)))


def step_gradients(example: Example, layout: Layout) -> Results:
    """Run the first token of an example as a step, and return whole results and gradients."""
    example = replace(example, T=1)
    arguments = example.arguments()
    arguments.pop("chunk_size")
    arguments["state"] = arguments.pop("initial_state")
    for name in ("q", "k", "v", "alpha", "beta"):
        arguments[name] = arguments[name][:, 0]
    given = distributed(GATED_DELTA_STEP, arguments, layout, grad=True)
    o, state = gdn_ops.gated_delta_step(**given)
    d_o, d_state = cotangents(example, layout, o, state)
    leaves = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    grads = torch.autograd.grad([o, state], list(leaves.values()), [d_o.squeeze(1), d_state])
    results = whole(o, state, leaves, grads)
    return results | {"d_initial_state": results.pop("d_state")}


def compiled(example: Example, layout: Layout) -> Results:
    """Run a call as one graph."""

    def call(**given: Any) -> tuple[Tensor, Tensor]:
        return gdn_ops.gated_delta(**given, return_state=True)

    torch._dynamo.reset()
    return sequence(
        example, "auto", layout, torch.compile(call, backend="aot_eager", fullgraph=True)
    )


def operator(given: Mapping[str, Any], save: bool) -> Any:
    """Call the operator of the sequence op, which may be the first call with DTensors."""
    importlib.import_module("gdn_ops.torch_ops.sharded")
    values = [given.get(arg.name) for arg in GATED_DELTA.tensors]
    *tokens, state, cu_seqlens = values
    options = ("gated_delta", given["scale"], given["qk_l2norm"])
    rest = (state, cu_seqlens, given["chunk_size"], "auto")
    values = [*tokens, *options, *rest]
    return values, torch.ops.gdn_ops.gated_delta(*values, save)


def by_operators(example: Example, layout: Layout, saves: bool) -> Results:
    """Run a call and its backward by their operators; without `saves` it is computed twice."""
    given = distributed(GATED_DELTA, example.arguments(), layout)
    values, (o, state, saved) = operator(given, saves)
    assert bool(saved) is saves
    grads = torch.ops.gdn_ops.gated_delta_backward(
        *values, saved, *cotangents(example, layout, o, state)
    )
    leaves = {name: given[name] for name in ("q", "k", "v", "alpha", "beta", "initial_state")}
    return whole(o, state, leaves, grads)


def checkpointed(example: Example, layout: Layout) -> Results:
    """Run a call under activation checkpointing."""

    def call(**given: Any) -> Any:
        run = functools.partial(gdn_ops.gated_delta, return_state=True)
        return checkpoint(run, use_reentrant=False, **given)

    return sequence(example, "auto", layout, call)
