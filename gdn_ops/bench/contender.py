"""Wrap one implementation of the rule, ours or another library's, so that all are measured alike.

A contender turns `Inputs` into a `Prepared`: a function that runs once more and a function that
reads its result in our layouts. Conversions of gates and states are done before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.device import Run
from gdn_ops.bench.inputs import Inputs
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import installed_version


@dataclass(frozen=True)
class Prepared:
    """Hold one call, ready to run again and again.

    Attributes:
        run: does the work that is timed.
        read: turns the result of `run` into (o, final state (N, HV, K, V)), or (o,) for inputs
            without a state.
    """

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]] = tuple

    def results(self) -> tuple[Tensor, ...]:
        """Run once and read the result."""
        return self.read(self.run())


def read_output(o: Tensor) -> tuple[Tensor, ...]:
    """Read the result of a sequence without a state."""
    return (o,)


def _no_step(x: Inputs) -> Prepared:
    raise NotImplementedError("has no step")


@dataclass(frozen=True)
class Contender:
    """Hold one implementation under measurement.

    Attributes:
        name: of the backend or the peer, as printed.
        sequence: prepares a forward, with the final state if there is an initial one;
            differentiable if the operands are.
        step: prepares a step; one that works in place updates the state of the inputs itself.
        version: of the package that brings it.
        is_peer: whether it is another library's.
        lacks: why it cannot run a direction: forward, backward or step.
        dtypes: of q, k and v that it computes in or more precisely; empty for all.
        channels: whether a peer takes a decay of every key channel.
        context: entered around a run and around the backward of what it returned.
    """

    name: str
    sequence: Callable[[Inputs], Prepared]
    step: Callable[[Inputs], Prepared] = _no_step
    version: str = ""
    is_peer: bool = False
    lacks: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    channels: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext

    def output(self, x: Inputs) -> Tensor:
        """Return o of a sequence."""
        return self.sequence(x).results()[0]

    def run(self, what: str, x: Inputs, d_o: Tensor) -> Run:
        """Return a sequence to time: "forward", or forward and backward of o's gradient d_o."""
        if what == "forward":
            return self.sequence(x).run
        leaves = x.with_grad()
        ready, operands = self.sequence(leaves), leaves.operands()
        return lambda: torch.autograd.grad(ready.results()[0], operands, d_o)

    def reasons(self, x: Inputs, what: str) -> list[str]:
        """Return why it cannot run inputs, as far as is known without running it."""
        if self.is_peer:
            dtype = str(x.q.dtype).removeprefix("torch.")
            if self.dtypes and dtype not in self.dtypes:
                return [f"does not compute in {dtype}, only in {', '.join(self.dtypes)}"]
            if x.has_channels and not self.channels:
                return ["takes no decay of every key channel here"]
            return [self.lacks[what]] if what in self.lacks else []
        given: dict[str, Any] = {"log_alpha": x.log_alpha, "beta": x.beta, "backend": self.name}
        if what == "step":
            given |= {"state": x.state, "inplace": True, "op": "gated_delta_step"}
        else:
            given |= {"initial_state": x.state, "cu_seqlens": x.cu_seqlens}
        answer = ops.explain(x.q, x.k, x.v, **given)
        return list(dict(answer.reasons)[self.name])


def our_contender(name: str) -> Contender | str:
    """Return a backend of this library as a contender, or why it cannot run here.

    Raises:
        SpecError: no backend has that name.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        return backend

    def sequence(x: Inputs) -> Prepared:
        given: dict[str, Any] = {"log_alpha": x.log_alpha, "beta": x.beta, "backend": name}
        if x.state is None:
            return Prepared(lambda: ops.gated_delta(x.q, x.k, x.v, **given), read_output)
        given |= {"initial_state": x.state, "return_state": True, "cu_seqlens": x.cu_seqlens}
        return Prepared(lambda: ops.gated_delta(x.q, x.k, x.v, **given))

    def step(x: Inputs) -> Prepared:
        given: dict[str, Any] = {"log_alpha": x.log_alpha, "inplace": True, "backend": name}
        operands = (x.q, x.k, x.v, None, x.beta, x.state)
        return Prepared(lambda: ops.gated_delta_step(*operands, **given))

    return Contender(name, sequence, step, installed_version("gdn_ops") or "unknown")


def error_line(error: BaseException) -> str:
    """Return an error as a reason, in one line: its type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
