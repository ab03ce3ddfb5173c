"""Read the weights of another library's layer, all of them, or say what cannot be read."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gdn_ops.spec.errors import SpecError


class Source:
    """Read a layer's tensors by their names, and notice which of them were never read.

    Args:
        function: what messages start with.
        layer: the layer.
    """

    def __init__(self, function: str, layer: nn.Module) -> None:
        self.function, self.layer = function, layer
        self._read: set[str] = set()

    def tensor(self, name: str) -> Tensor:
        """Return a parameter of the layer, detached.

        Raises:
            SpecError: it is no ordinary tensor of floats.
        """
        self._read.add(name)
        owner, _, last = name.rpartition(".")
        value = getattr(self.layer.get_submodule(owner), last, None)
        if not isinstance(value, Tensor):
            self._refuse(f"{name} is a {type(value).__name__}, should be a parameter")
        if value.is_meta:
            self._refuse(
                f"{name} is on the device meta, should be loaded: weights that are offloaded or "
                f"not loaded yet have no values"
            )
        if not value.is_floating_point() or value.element_size() < 2:
            dtype = str(value.dtype).removeprefix("torch.")
            self._refuse(f"{name} has dtype {dtype}, should be a float: dequantise the model first")
        if type(value) not in (Tensor, nn.Parameter):
            self._refuse(
                f"{name} is a {type(value).__name__}, should be a torch.Tensor: gather a sharded "
                f"model, or dequantise it, first"
            )
        return value.detach()

    def linear(self, name: str) -> tuple[Tensor, ...]:
        """Return the weight of a linear layer, and its bias if it has one, as they act.

        Parametrisations are applied.

        Raises:
            SpecError: it is something else, for example an adapter around a linear layer.
        """
        return self._affine(name, nn.Linear)

    def convolution(self, name: str) -> tuple[Tensor, ...]:
        """Return the weight (D, k) of a depthwise convolution along T, and its bias if it has one.

        Raises:
            SpecError: it is something else.
        """
        weight, *bias = self._affine(name, nn.Conv1d)
        if weight.dim() != 3 or weight.shape[1] != 1:
            self._refuse(
                f"{name}.weight has shape {tuple(weight.shape)}, should be (D, 1, k): depthwise"
            )
        return weight.squeeze(1), *bias

    def norm_eps(self, name: str) -> float:
        """Return what an RMS norm adds to the mean of squares.

        Raises:
            SpecError: it is no RMS norm, has hooks, or tells no number.
        """
        norm = self.layer.get_submodule(name)
        self._refuse_hooks(name, norm)
        if isinstance(norm, nn.LayerNorm | nn.GroupNorm):
            self._refuse(f"{name} is a {type(norm).__name__}, should be an RMS norm")
        for attribute in ("variance_epsilon", "eps"):
            eps = getattr(norm, attribute, None)
            if isinstance(eps, int | float):
                return float(eps)
        self._refuse(f"{name}.eps is None, should be a number")

    def output_gate(self, name: str) -> str:
        """Return the activation of the gate of a gated norm, SiLU where it names none.

        Raises:
            SpecError: it is another one.
        """
        activation = getattr(self.layer.get_submodule(name), "activation", "silu")
        known = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}
        if not isinstance(activation, str) or activation not in known:
            self._refuse(
                f"{name}.activation is {activation!r}, should be one of {', '.join(known)}"
            )
        return known[activation]

    def _refuse_hooks(self, name: str, module: nn.Module) -> None:
        """Refuse a module with hooks of its forward: what they do would be lost."""
        if module._forward_hooks or module._forward_pre_hooks:
            self._refuse(
                f"{name} has forward hooks, should have none: what they do would be lost; remove "
                f"them first"
            )

    def _affine(self, name: str, kind: type[nn.Module]) -> tuple[Tensor, ...]:
        module = self.layer.get_submodule(name)
        if type(module).forward is not kind.forward:
            self._refuse(
                f"{name} is a {type(module).__name__}, should be a torch.nn.{kind.__name__}: merge "
                f"adapters into the model first, with peft model.merge_and_unload(), and "
                f"dequantise it"
            )
        if "forward" in vars(module):
            self._refuse(
                f"{name} has a forward of its own, should be a torch.nn.{kind.__name__} without "
                f"hooks: undo its offloading first, with accelerate remove_hook_from_submodules"
            )
        for part in ("weight", "bias"):
            if part not in module._parameters and not parametrize.is_parametrized(module, part):
                self._refuse(
                    f"{name}.{part} is no parameter, should be one: remove what computes it from "
                    f"others first, with torch.nn.utils.remove_weight_norm or remove_spectral_norm"
                )
        self._refuse_hooks(name, module)
        if parametrize.is_parametrized(module):
            self._read |= {
                f"{name}.{n}" for n, _ in module.named_parameters() if n[:16] == "parametrizations"
            }
        parts = ["weight"] if getattr(module, "bias", None) is None else ["weight", "bias"]
        return tuple(self.tensor(f"{name}.{part}") for part in parts)

    def unread(self) -> list[str]:
        """Return the names of the parameters that were not read."""
        return [name for name, _ in self.layer.named_parameters() if name not in self._read]

    def check_all_read(self) -> None:
        """Check that every parameter of the layer was read, and that nothing is done around it.

        Raises:
            SpecError: some were not, or there are hooks, and would be lost.
        """
        self._refuse_hooks("layer", self.layer)
        if "forward" in vars(self.layer):
            self._refuse(
                "layer has a forward of its own, should have that of its class: what it does would "
                "be lost"
            )
        names = self.unread()
        if names:
            self._refuse(
                f"layer has the parameters {', '.join(names)}, should have none besides those of "
                f"the table in docs/layer.md: they would be lost"
            )

    def check_sizes(self, layer: nn.Module, weights: dict[str, Tensor]) -> None:
        """Check that weights have the shapes of a new layer's parameters.

        Raises:
            SpecError: one has another shape, or the layer has no such parameter.
        """
        for name, weight in weights.items():
            shape = tuple(layer.get_parameter(name).shape)
            if tuple(weight.shape) != shape:
                self._refuse(
                    f"layer has the shape {tuple(weight.shape)} for {name} of the new layer, "
                    f"should have {shape}: that is what its sizes say"
                )

    def _refuse(self, message: str) -> NoReturn:
        raise SpecError(f"{self.function}: {message}")


def split(tensors: tuple[Tensor, ...], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """Split the rows of a weight, and of its bias if there is one."""
    return list(zip(*(x.split(sizes) for x in tensors), strict=True))


def split_by_head(
    tensors: tuple[Tensor, ...], heads: int, sizes: list[int]
) -> list[tuple[Tensor, ...]]:
    """Split rows that are interleaved by head, of a weight and of its bias if there is one."""
    parts = (x.unflatten(0, (heads, -1)).split(sizes, 1) for x in tensors)
    return list(zip(*([x.flatten(0, 1) for x in part] for part in parts), strict=True))


def named(name: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return a weight, and its bias if there is one, by their names in a state dict."""
    return dict(zip((f"{name}.weight", f"{name}.bias"), tensors, strict=False))


def with_biases(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the linear layers of a layer the biases that are among some weights."""
    for name, value in weights.items():
        owner, _, last = name.rpartition(".")
        module = layer.get_submodule(owner)
        if last == "bias" and isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.empty_like(value, device="meta"))
