"""Run `gdn-ops bench paper`: check the models of a plan, then take its measurements in order.

Training is a forward and a backward without an optimizer, which would cost all models about the
same. All models and lengths take turns in every round, so that a machine that becomes slower meets
all of them alike.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.bench.device import Run, find_device
from gdn_ops.bench.paper import checks, memory
from gdn_ops.bench.paper.energy import find_counter
from gdn_ops.bench.paper.plan import STAGES, Plan
from gdn_ops.bench.paper.results import Cell, PaperResult, PaperRow, crossings_of, rows_of
from gdn_ops.bench.paper.skeletons import (
    ATTENTION,
    MIXERS,
    backend_of,
    build,
    count_parameters,
    full_cache,
    layer,
    state_behind,
)
from gdn_ops.bench.paper.timing import measure
from gdn_ops.bench.report import Log
from gdn_ops.bench.rows import describe_system
from gdn_ops.bench.verify import RefusedError
from gdn_ops.environment.devices import threads

DECODED = 8
"""Tokens in a sample of decode."""

LAYERS = ("gdn", ATTENTION)
"""The contenders of single layers."""


def run(plan: Plan, log: Log = lambda text: None) -> PaperResult:
    """Check the models of a plan, then take its measurements.

    Args:
        plan: what is measured.
        log: is told in a few words what starts now, once for each of STAGES.

    Raises:
        RefusedError: a model computes something else than its definition; nothing was timed.
    """
    return _Suite(plan, log).run()


def _system(plan: Plan) -> dict[str, Any]:
    setting = plan.setting
    made = {"device": setting.device, "dtype": setting.torch_dtype}
    return describe_system(
        device=setting.device,
        dtype=setting.dtype,
        threads=threads(),
        model={**asdict(plan.shape), "inner": plan.shape.inner, "heads": plan.shape.heads},
        tokens=plan.tokens,
        lengths=list(plan.lengths),
        contexts=list(plan.contexts),
        layers={
            "widths": list(plan.widths),
            "tokens": plan.width_tokens,
            "lengths": list(plan.width_lengths),
        },
        minutes=plan.minutes,
        mixers={name: MIXERS[name].text for name in plan.mixers},
        backends={n: backend_of(n, plan.shape, plan.backend, **made) for n in plan.mixers},
    )


def prefill(model: Any, tokens: Tensor) -> None:
    """Read texts and compute the logits of their next tokens."""
    with torch.no_grad():
        model(tokens, is_last_only=True)


def training(model: Any, tokens: Tensor) -> None:
    """Compute the loss of every next token and its gradients, and drop them."""
    logits, _ = model(tokens[:, :-1])
    functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def decode(model: Any, token: Tensor, state: Any) -> None:
    """Decode DECODED tokens, each of them behind the same text."""
    with torch.no_grad():
        for _ in range(DECODED):
            model(token, state)


def mix(module: Any, x: Tensor, d_y: Tensor | None) -> None:
    """Apply one layer; where the gradient of its result is given, backwards too."""
    if d_y is None:
        with torch.no_grad():
            module(x)
        return
    module(x)[0].backward(d_y)
    module.zero_grad(set_to_none=True)
    x.grad = None


class _Suite:
    """Take the measurements of one plan and collect its result."""

    def __init__(self, plan: Plan, log: Log) -> None:
        self.plan, self.log, self.result = plan, log, PaperResult(_system(plan))
        self.made: dict[str, Any] = {
            "device": plan.setting.device,
            "dtype": plan.setting.torch_dtype,
        }
        self.device = find_device(plan.setting.device)
        self.rows: list[PaperRow] = []
        found = find_counter(plan.setting.device)
        self.counter = None if isinstance(found, str) else found
        name, reason = (None, found) if isinstance(found, str) else (found.name, None)
        self.result.energy = {"counter": name, "reason": reason}
        if reason is not None:
            self.result.skipped.append(("energy", "all", reason))

    def run(self) -> PaperResult:
        result = self.result
        start, load = time.monotonic(), _load()
        parts: tuple[Callable[[], None], ...] = (
            self._check,
            self._memory,
            self._decode,
            functools.partial(self._steps, "prefill", prefill),
            functools.partial(self._steps, "training", training),
            self._widths,
        )
        for stage, part in zip(STAGES, parts, strict=True):
            self.log(stage)
            part()
        result.crossings = crossings_of([row for row in self.rows if row.what != "decode"])
        result.rows += self.rows
        result.system["seconds"] = round(time.monotonic() - start, 1)
        result.system["load"] = {"before": load, "after": _load()}
        return result

    def _check(self) -> None:
        counted = self.result.parameters
        for name in self.plan.mixers:
            self.result.checks += checks.check_model(name, self.plan)
            counted[name] = count_parameters(build(name, self.plan.shape, device="meta"))
        if len({count["others"] for count in counted.values()}) > 1:
            raise RefusedError(f"models differ in more than their mixers: {counted}")

    def _memory(self) -> None:
        plan = self.plan
        dtype = plan.setting.torch_dtype
        self.result.kept = memory.memory_of(plan.mixers, plan.shape, plan.contexts, dtype)

    def _decode(self) -> None:
        plan = self.plan
        actions: dict[Cell, Run] = {}
        for name, model in self._models():
            model.eval()
            cache = full_cache(model, max(plan.contexts))
            token = torch.zeros((1, 1), dtype=torch.int64, device=plan.setting.device)
            for context in plan.contexts:
                state = state_behind(model, context, cache)
                cell = Cell(name, plan.shape.width, context, 1)
                actions[cell] = functools.partial(decode, model, token, state)
        self._time("decode", "decode", actions, DECODED)

    def _steps(self, part: str, step: Callable[[Any, Tensor], None]) -> None:
        """Time prefill or training of all models at all lengths."""
        plan = self.plan
        generator = torch.Generator().manual_seed(1)
        # A training predicts one token less than it is given.
        extra = 1 if part == "training" else 0
        actions: dict[Cell, Run] = {}
        texts = {
            length: torch.randint(
                plan.shape.vocabulary,
                (plan.tokens // length, length + extra),
                generator=generator,
                device="cpu",
            ).to(plan.setting.device)
            for length in plan.lengths
        }
        for name, model in self._models():
            for length, tokens in texts.items():
                cell = Cell(name, plan.shape.width, length, plan.tokens // length)
                actions[cell] = functools.partial(step, model, tokens)
        self._time(part, part, actions)

    def _widths(self) -> None:
        """Time single layers of several widths."""
        plan = self.plan
        names = [name for name in LAYERS if name in plan.mixers]
        if len(names) < len(LAYERS):
            reason = f"single layers compare {' and '.join(LAYERS)}, which are not both asked for"
            self.result.skipped.append(("layer", "all", reason))
            return
        timed: dict[str, dict[Cell, Run]] = {"layer forward": {}, "layer forward+backward": {}}
        for width in plan.widths:
            layers = {n: layer(n, width, backend=plan.backend, **self.made) for n in names}
            for length in plan.width_lengths:
                shape = (plan.width_tokens // length, length, width)
                x, d_y = (torch.randn(shape, **self.made) for _ in range(2))
                for name, module in layers.items():
                    cell = Cell(name, width, length, shape[0])
                    both = x.clone().requires_grad_()
                    timed["layer forward"][cell] = functools.partial(mix, module, x, None)
                    backward = functools.partial(mix, module, both, d_y)
                    timed["layer forward+backward"][cell] = backward
        for i, (what, actions) in enumerate(timed.items()):
            # A backward takes about twice as long as its forward.
            self._time(what, "widths", actions, share=(0.25, 0.75)[i])

    def _models(self) -> list[tuple[str, Any]]:
        plan = self.plan
        return [(n, build(n, plan.shape, backend=plan.backend, **self.made)) for n in plan.mixers]

    def _time(
        self,
        what: str,
        part: str,
        actions: dict[Cell, Run],
        tokens: int | None = None,
        share: float = 1.0,
    ) -> None:
        """Time actions within the time of a part, and add their rows."""
        seconds = share * self.plan.seconds(part)
        named = {str(i): action for i, action in enumerate(actions.values())}
        cells = dict(zip(named, actions, strict=True))
        warm = None
        if not self.device.is_gpu:
            # A CPU needs no more than one call of each model; a GPU warms up at every shape.
            warm = {(cell.comparator, cell.width): name for name, cell in cells.items()}.values()
        spreads, left_out = measure(named, seconds, self.device, self.counter, warm=warm)
        by_cell = {cells[name]: x for name, x in spreads.items()}
        self.rows += rows_of(what, by_cell, self.plan.setting.dtype, tokens)
        self.result.skipped += [
            (f"{what}, {cells[n].batch}x{cells[n].length}, width {cells[n].width}",
             cells[n].comparator, why)
            for n, why in left_out.items()
        ]  # fmt: skip


def _load() -> list[float] | None:
    """Return the load averages of 1, 5 and 15 minutes; None where the system has none."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None
