"""Make calls on meta tensors, so that a backend can show its launches without a GPU.

`samples` makes them from the named cases of the specs; `run` makes the backend do what the public
API would. A backend that notes its launches meanwhile can compile them (`CompilesAhead`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from gdn_ops.aot.results import Sample
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import reasons
from gdn_ops.spec.language import Case, OpSpec, Sizes, TensorArg
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS, OPS

REFERENCE = "qwen-16-32-8192"
"""The case that the variations of `everything` start from."""

HEAD_DIMS = ((16, 16), (24, 40), (64, 64), (80, 80), (96, 192), (128, 256), (256, 256))
"""Widths (K, V) that `everything` tries beside (128, 128)."""

SEQUENCES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rule delta", {"rule": "delta"}),
    ("rule gated", {"rule": "gated"}),
    ("rule linear", {"rule": "linear"}),
    ("log_alpha", {"gate": "log_alpha"}),
    ("channels", {"channels": True}),
    ("rule gated channels", {"rule": "gated", "channels": True}),
    ("qk_l2norm log_alpha channels", {"qk_l2norm": True, "gate": "log_alpha", "channels": True}),
    ("float32 channels", {"dtype": "float32", "channels": True}),
    ("erase and write", {"channels": True, "apart": True}),
    ("qk_l2norm float32 erase", {"qk_l2norm": True, "dtype": "float32", "apart": True}),
    ("without beta", {"beta": False}),
    ("qk_l2norm", {"qk_l2norm": True}),
    ("initial state", {"state": torch.float32}),
    ("cu_seqlens", {"N": 7}),
    ("T=1000", {"T": 1000}),
    ("HV=H", {"HV": 16}),
    ("HV=3H", {"HV": 48}),
    *((f"chunk_size={n}", {"chunk_size": n}) for n in (16, 32, 64)),
    *((f"float32 chunk_size={n}", {"dtype": "float32", "chunk_size": n}) for n in (16, 32, 64)),
    ("float16", {"dtype": "float16"}),
    *((f"K={k} V={v}", {"K": k, "V": v}) for k, v in HEAD_DIMS),
    *((f"float32 K={k} V={v}", {"dtype": "float32", "K": k, "V": v}) for k, v in HEAD_DIMS),
)
"""Variations of a call of `gated_delta`, one at a time: a label and what is changed."""

DECODING: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"rule {rule}", {"rule": rule}) for rule in ("delta", "gated", "linear")),
    ("log_alpha", {"gate": "log_alpha"}),
    ("channels", {"channels": True}),
    ("erase and write", {"apart": True}),
    ("erase and write channels", {"channels": True, "apart": True}),
    ("qk_l2norm", {"qk_l2norm": True}),
    ("without state", {"state": None}),
    ("bfloat16 state", {"state": torch.bfloat16}),
    ("in place", {"inplace": True}),
    ("pool", {"pool": 64, "inplace": True}),
    ("bfloat16 pool", {"pool": 64, "inplace": True, "state": torch.bfloat16}),
    ("B=512", {"B": 512, "N": 512}),
    ("float16", {"dtype": "float16"}),
    ("float32", {"dtype": "float32"}),
    *((f"K={k} V={v}", {"K": k, "V": v}) for k, v in HEAD_DIMS),
)
"""Variations of a call of a decode op, one at a time: a label and what is changed."""


def samples(cases: Sequence[Case], *, everything: bool = False) -> Iterator[Sample]:
    """Make samples from named cases: inference and training of sequences, and decoding.

    Args:
        cases: named cases of any op.
        everything: also what the public API allows beside the defaults, one thing at a time.
    """
    for case in cases:
        yield from _of(spec_of(case), case, case.name, {})
    if everything:
        for label, choice in SEQUENCES:
            yield from _of(GATED_DELTA, GATED_DELTA.case[REFERENCE], label, choice)
        for spec in (GATED_DELTA_STEP, GATED_DELTA_STEPS):
            # The second is the first that is no smoke test.
            for label, choice in DECODING:
                yield from _of(spec, spec.cases[1], f"{spec.name} {label}", choice)
        yield from _of(spec, spec.cases[1], "return_states", {"return_states": True})


def spec_of(case: Case) -> OpSpec:
    """Return the spec of the op that a named case belongs to: `gated_delta` where it is no op's."""
    return next((op for op in OPS if case in op.cases), GATED_DELTA)


def _of(spec: OpSpec, case: Case, label: str, choice: dict[str, Any]) -> Iterator[Sample]:
    """Make the samples of one case with one variation."""
    axes = {axis.name for axis in fields(Sizes)}
    sizes = replace(case.sizes, **{k: v for k, v in choice.items() if k in axes})
    choice = {"dtype": case.dtype, "channels": case.channels, **choice}
    arguments = arguments_of(spec, _arguments(spec, sizes, choice))
    call = bind(spec, arguments, check_values=False)
    is_reference = sizes.K == sizes.V == 128 and choice == {"dtype": "bfloat16", "channels": False}
    if spec is not GATED_DELTA:
        yield Sample(label, call, is_reference)
        return
    yield Sample(f"{label} inference", call, is_reference)
    yield Sample(f"{label} training", replace(call, needs_grad=True), is_reference)


def _arguments(spec: OpSpec, sizes: Sizes, choice: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call; tensors are on the meta device."""
    given: dict[str, Any] = {attr.name: attr.default for attr in spec.attrs}
    given |= {name: choice[name] for name in given if name in choice}
    rule = spec.rule[given["rule"]]
    low = getattr(torch, choice["dtype"])
    state = choice.get("state", None if spec is GATED_DELTA else torch.float32)
    gate = choice.get("gate", "alpha") if rule.has_decay else None
    pool, is_apart = choice.get("pool"), choice.get("apart", False)
    dtypes: dict[str, torch.dtype | None] = {
        **dict.fromkeys(("q", "k", "v"), low),
        "alpha": torch.float32 if gate == "alpha" else None,
        "log_alpha": torch.float32 if gate == "log_alpha" else None,
        "beta": torch.float32 if choice.get("beta", not is_apart) else None,
        **dict.fromkeys(("erase", "write"), torch.float32 if is_apart else None),
        "initial_state": state,
        "state": state,
        "cu_seqlens": torch.int32 if sizes.N != sizes.B else None,
        "state_indices": torch.int32 if pool else None,
    }
    for arg in spec.tensors:
        has_width = arg.name in ("alpha", "log_alpha", "erase", "write")
        of_channels = has_width and choice.get("channels", False)
        axes = arg.shapes[-1 if of_channels else 0].axes
        given[arg.name] = _meta(arg, axes, sizes, dtypes[arg.name], pool)
    return given


def _meta(
    arg: TensorArg, axes: tuple[str, ...], sizes: Sizes, dtype: torch.dtype | None, pool: int | None
) -> Any:
    if dtype is None:
        return None
    lengths = {**asdict(sizes), "N+1": sizes.N + 1}
    shape = [lengths[axis] for axis in axes]
    if pool and arg.name == "state":
        shape[0] = pool
    return torch.empty(shape, dtype=dtype, device="meta")


def reasons_against(backend: Backend, sample: Sample) -> list[str]:
    """Return why a backend cannot run a sample, other than that its tensors are on meta."""
    return reasons(backend, sample.call, on_any_device=True)


def run(backend: Backend, sample: Sample) -> None:
    """Run a sample on a backend as the public API would, its backward too if it needs one."""
    for _ in directions(backend, sample):
        pass


def directions(backend: Backend, sample: Sample) -> Iterator[str]:
    """Run a sample as `run` does, and yield "forward", "backward" or "decode" after each."""
    call = sample.call
    if call.op is not GATED_DELTA:
        with torch.no_grad():
            (backend.decode_one if call.op is GATED_DELTA_STEP else backend.decode_many)(call)
        yield "decode"
        return
    with torch.no_grad():
        out = backend.forward(call)
    yield "forward"
    if call.needs_grad:
        cotangents = torch.empty_like(out.o), torch.empty_like(out.final_state)
        with torch.no_grad():
            backend.backward(call, out.saved, *cotangents)
        yield "backward"
