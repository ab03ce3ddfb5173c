"""Compile the launches of benchmark and check with Triton for a GPU that is not here.

`TRITON_CACHE_DIR=... python fill.py --share 0/2 [--tune CASE,CASE]` runs the launches of a call on
meta tensors up to where Triton would load the code: its own way from a launch to its cache, with a
driver that stands in for the GPU's. So a launch with the same cache compiles nothing there, which a
second run of this shows: it prints how many kernels were compiled and how many were found.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from gdn_ops.aot.results import Sample
from gdn_ops.aot.sampling import reasons_against, run
from gdn_ops.bench.gpu.conformance import CALLS
from gdn_ops.bench.gpu.rows import ROWS, GpuRow
from gdn_ops.bench.inputs import find_case, make_inputs
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.launches import Launch, recording
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.testing.example import Example

TARGET, CAPABILITY = "sm_90", 90


class Absent:
    """Stand in for the driver of a GPU, as far as a launch asks it before code is loaded."""

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", CAPABILITY, 32)


def drawn(draw: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments that a function draws, as tensors without memory and without numbers."""
    with FakeTensorMode():
        values = draw()
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if isinstance(x, torch.Tensor)
        else x
        for name, x in values.items()
    }


def arguments_of_row(row: GpuRow) -> dict[str, Any]:
    """Draw the arguments of a row as `gdn_ops.bench.contender` gives them."""
    x = row.draw("cpu")
    values = x.named()
    if row.what == "step":
        return {**values, "inplace": True}
    state = values.pop("state", None)
    return {**values, "initial_state": state, "cu_seqlens": x.cu_seqlens}


def row_calls() -> Iterator[tuple[str, Call]]:
    """Yield the calls of the rows of `bench gpu`."""
    for row in ROWS:
        values, spec = drawn(functools.partial(arguments_of_row, row)), GATED_DELTA
        if row.what == "step":
            spec = GATED_DELTA_STEP
        call = bind(spec, arguments_of(spec, values), check_values=False)
        yield row.name, replace(call, needs_grad=row.what == "backward")


def check_calls() -> Iterator[tuple[str, Call]]:
    """Yield the calls of the short check: with gradients, and single steps."""
    for _, example in CALLS:
        arguments = drawn(example.arguments)
        call = bind(GATED_DELTA, arguments_of(GATED_DELTA, arguments), check_values=False)
        for needs_grad in (False, True):
            yield f"check {example}", replace(call, needs_grad=needs_grad)
        yield from step_calls(example, arguments)


def step_calls(example: Example, arguments: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    """Yield the calls of a step on the first token of an example, in place and not."""
    if example.lengths is not None or example.dtype == "float32":
        return
    tokens = {
        n: arguments[n]
        for n in ("q", "k", "v", "alpha", "log_alpha", "beta")
        if arguments.get(n) is not None
    }
    first = {name: x[:, 0] for name, x in tokens.items()}
    s = example.sizes
    first["state"] = torch.empty(s.B, s.HV, s.K, s.V, dtype=torch.float32, device="meta")
    for inplace in (False, True):
        values = {**first, "inplace": inplace}
        call = bind(GATED_DELTA_STEP, arguments_of(GATED_DELTA_STEP, values), check_values=False)
        yield f"check step {example}", call


def tuned_calls(
    backend: Any, cases: list[str]
) -> Iterator[tuple[str, Call, Callable[[], AbstractContextManager[object]]]]:
    """Yield the calls of `bench --tune` on cases, each with the configuration that it runs in."""
    for name in cases:
        sizes = find_case(name).sizes
        values = drawn(lambda sizes=sizes: make_inputs(sizes, torch.bfloat16, "cpu").named())
        call = bind(GATED_DELTA, arguments_of(GATED_DELTA, values), check_values=False)
        with recording(TARGET):
            configurations = backend.tunables(call)
        for configuration in configurations:
            using = functools.partial(backend.using, configuration)
            for needs_grad in (False, True):
                yield f"tune {name}", replace(call, needs_grad=needs_grad), using


def launches(backend: Backend, cases: list[str]) -> Iterator[Launch]:
    """Yield the launches of every call that the backend can run."""
    plain = itertools.chain(row_calls(), check_calls())
    calls = itertools.chain(
        ((label, call, contextlib.nullcontext) for label, call in plain),
        tuned_calls(backend, cases),
    )
    for label, call, context in calls:
        sample = Sample(label, call, False)
        with recording(TARGET) as noted, context():
            if not reasons_against(backend, sample):
                run(backend, sample)
        yield from noted


def key(launch: Launch) -> str:
    """Return what launches of the same code have in common: dtypes, divisibility, constants."""

    def said(x: Any) -> str:
        if isinstance(x, torch.Tensor):
            return str(x.dtype)
        return f"{x == 1}{x % 16 == 0}{x >> 31}" if type(x) is int else repr(x)

    constants = ";".join(f"{n}={x!r}" for n, x in sorted(launch.kwargs.items()))
    return f"{launch.kernel.__name__}({';'.join(map(said, launch.args))};{constants})"


def main() -> int:
    """Compile a share of the launches; print as JSON what was compiled and what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", default="0/1", help="which of how many parts, as 0/2")
    parser.add_argument("--tune", default="", help="cases whose configurations are compiled too")
    parser.add_argument("--most", type=int, default=None, help="only so many launches")
    asked = parser.parse_args()
    backend = get_backend("triton")
    if isinstance(backend, str):
        print(f"triton is not available: {backend}", file=sys.stderr)
        return 2
    driver.set_active(Absent())
    counted: dict[str, Any] = {"launches": 0, "compiled": 0, "found": 0, "failed": [], "keys": []}

    def listen(*, metadata_group: dict[str, str], cache_hit: bool, **_: object) -> None:
        counted["found" if cache_hit else "compiled"] += 1
        folders = {Path(path).parent.name for path in metadata_group.values()}
        counted["keys"] += sorted(folders - set(counted["keys"]))

    triton.knobs.compilation.listener = listen
    share, shares = map(int, asked.share.split("/"))
    cases = asked.tune.split(",") if asked.tune else []
    noted = itertools.islice(launches(backend, cases), asked.most)
    unique = {key(launch): launch for launch in noted}
    for number, name in enumerate(sorted(unique)):
        if number % shares != share:
            continue
        launch = unique[name]
        counted["launches"] += 1
        try:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
        except Exception as error:
            counted["failed"].append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    print(json.dumps(counted))
    return 1 if counted["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
