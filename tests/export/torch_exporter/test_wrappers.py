"""A module inside a wrapper of torch is exported as itself, or the wrapper is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from errors import refusal
from gdn_ops import export
from onnx_layers import Layer, assert_same, layer_args, make_layer, run_engine

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def layer() -> Layer:
    torch.manual_seed(0)
    return make_layer()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Make this process a group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Around(nn.Module):
    """Pass everything on to a module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        return self.inner(x, *states)


def names_of(model: Any) -> list[list[str]]:
    graph = model.graph
    weights = [x.name for x in graph.initializer if not x.name.startswith("val_")]
    return [[x.name for x in values] for values in (graph.input, graph.output)] + [sorted(weights)]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": torch.compile,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "DistributedDataParallel": DistributedDataParallel,
    "two": lambda layer: torch.compile(DataParallel(layer)),  # type: ignore[dict-item, return-value]
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_wrapped_is_exported_as_itself(
    wrap: Callable[[nn.Module], nn.Module], layer: Layer
) -> None:
    args = layer_args(2)
    model = export.export_decode(wrap(layer), args)
    assert names_of(model) == names_of(export.export_decode(layer, args))
    assert_same(run_engine(model, args), layer(*args))


def test_a_wrapper_that_adds_something_keeps_it(layer: Layer) -> None:
    class Tripled(DataParallel):
        def forward(self, *given: Any, **named: Any) -> Any:
            o, *states = super().forward(*given, **named)
            return 3 * o, *states

    def halved(module: nn.Module, given: Any, result: Any) -> Any:
        return result[0] / 2, *result[1:]

    hooked = torch.compile(layer)
    hooked.register_forward_hook(halved)
    args = layer_args(2)
    o, *states = layer(*args)
    for module, factor in ((Tripled(layer), 3.0), (hooked, 0.5), (Around(layer), 1.0)):
        model = export.export_decode(module, args)
        assert_same(run_engine(model, args), (factor * o, *states))


CANNOT = "which torch.export cannot trace: "


def test_a_module_of_torch_jit_is_refused_by_name() -> None:
    script = torch.jit.script(nn.Linear(2, 2))
    cure = f"has type ScriptModule, {CANNOT}pass the module that it was made from"
    args = (torch.ones(2, 2),)
    assert refusal(export.export_decode, script, args) == f"export_decode: the module {cure}"
    expected = f"export_prefill: its part 'inner' {cure}"
    assert refusal(export.export_prefill, Around(script), (torch.ones(2, 3, 2),)) == expected


@pytest.mark.usefixtures("alone")
def test_a_parallel_part_and_sharded_weights_are_refused_by_name(layer: Layer) -> None:
    inside = Around(DistributedDataParallel(layer))
    assert refusal(export.export_decode, inside, layer_args(2)) == (
        "export_decode: its part 'inner' has type DistributedDataParallel, "
        f"{CANNOT}take its .module"
    )
    sharded = make_layer()
    torch.distributed.fsdp.fully_shard(sharded)
    assert refusal(export.export_decode, sharded, layer_args(2)) == (
        f"export_decode: the module has type FSDPModule, {CANNOT}load its full state_dict into a "
        "module that was never sharded and pass that"
    )
