"""Time one decode step in onnxruntime, in place and not, against torch and the floor.

The floor is one pass over the state in place, read and written, in the same turns. A sample is
the mean of a few steps in a row, as a layer of a small model sees them. Ways that are
compared in microseconds work on the same memory, far apart in a round; every other way has tensors
of its own. Every body is compared with the definition before it is timed.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto

from gdn_ops import ops
from gdn_ops.bench import suite
from gdn_ops.bench.decode_rows import decode_rows
from gdn_ops.bench.inputs import Inputs, Setting, make_step_inputs
from gdn_ops.bench.report import Log
from gdn_ops.bench.rows import Result
from gdn_ops.bench.turns import Timing, interleave
from gdn_ops.bench.verify import Check, RefusedError
from gdn_ops.export import DecodeSession, available_bodies, make_decode_model, set_body
from gdn_ops.export.bodies.standard import STANDARD
from gdn_ops.export.bodies.table import BODIES
from gdn_ops.export.runtime.comparison import compare
from gdn_ops.export.runtime.sessions import open_session, why_not
from gdn_ops.spec.language import Sizes

Array = np.ndarray[Any, Any]

WIDTH = 128
SHAPES = ((1, 16), (1, 32), (8, 16), (8, 32))
"""(batch rows, heads): states of 1, 2, 8 and 16 MiB."""

STEPS_AT_1_MIB = 80
"""Steps in a sample; fewer for larger states. The first of them finds its state out of cache."""

ROUNDS_PER_REPEAT = 12
"""Microseconds are easily disturbed: more rounds than for milliseconds."""

# Without a guard: shapes are made from the operands, so a batch of one would be broadcast.
_PLAIN = """<domain: "gdn_ops", opset_import: ["": {opset}, "com.microsoft": 1]>
GatedDeltaStep <num_qk_heads, num_v_heads, scale, rule, qk_l2norm>
(q, k, v, log_alpha, beta, state) => (o, new_state) {{
  token = Constant <value_ints = [1]> ()
  q_flat = Flatten (q)
  q_p = Unsqueeze (q_flat, token)
  k_flat = Flatten (k)
  k_p = Unsqueeze (k_flat, token)
  v_flat = Flatten (v)
  v_p = Unsqueeze (v_flat, token)
  decay = Unsqueeze (log_alpha, token)
  strength = Unsqueeze (beta, token)
  o_p, new_state = com.microsoft.LinearAttention <q_num_heads: int = @num_qk_heads,
    kv_num_heads: int = @num_v_heads, scale: float = @scale, update_rule = "gated_delta">
    (q_p, k_p, v_p, state, decay, strength)
  o_to = Shape (v)
  o = Reshape (o_p, o_to)
}}"""


class _Clock:
    """Run an onnxruntime session and keep the duration of its last run, in seconds."""

    def __init__(self, session: Any) -> None:
        self.seconds, self._session = 0.0, session

    def run_with_iobinding(self, binding: Any) -> None:
        """Run the session on what is bound."""
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        self.seconds = time.perf_counter() - start


@dataclass(frozen=True)
class Way:
    """Hold one way to run a decode step.

    Attributes:
        added: of every step, the seconds outside of onnxruntime's run; None if not known.
    """

    name: str
    step: Callable[[], object]
    added: list[float] | None = None


def unguarded(model: ModelProto) -> ModelProto:
    """Return a copy of a model of body "ort" without its guards, to see what the guards cost."""
    plain = copy.deepcopy(model)
    opset = next(o.version for o in plain.opset_import if not o.domain)
    del plain.functions[:]
    plain.functions.append(onnx.parser.parse_function(_PLAIN.format(opset=opset)))
    return plain


class _Bare:
    """Run the bound buffers of a session directly, without the checks and copies of its step()."""

    def __init__(self, session: DecodeSession, ort: Any = None) -> None:
        # A binding does not keep the buffers that it binds.
        self.session = session
        self.ort, self.turn = session._ort, 0
        self.bindings = session._results[0].bindings
        if ort is not None:
            # A binding belongs to the onnxruntime session that made it.
            own, session._ort = session._ort, ort
            turns = range(len(self.bindings))
            self.bindings = [session._bind(turn, session._results[0]) for turn in turns]
            self.ort, session._ort = ort, own

    def step(self) -> None:
        bindings = self.bindings
        self.ort.run_with_iobinding(bindings[self.turn])
        self.turn = (self.turn + 1) % len(bindings)


def _session(
    model: ModelProto, batch: int, feeds: list[Array], body: str, **options: Any
) -> DecodeSession:
    """Return a session of one thread with filled buffers, ready to run without step()."""
    made = DecodeSession(model, batch=batch, body=body, threads=1, **options)
    made.step(*feeds)
    return made


def _bodies() -> list[str]:
    """Return the bodies that run here, of those that body "auto" of a session may take."""
    automatic = [body.name for body in BODIES.values() if body.is_preferred or body is STANDARD]
    return [name for name in automatic if name in available_bodies()]


def _own_ways(model: ModelProto, batch: int, feeds: list[Array], library: str | None) -> list[Way]:
    """Return the ways in onnxruntime that have buffers of their own."""
    start = functools.partial(_session, model, batch, feeds)
    ways = []
    for body in _bodies():
        if body != "ort":
            ways.append(Way(f"{body} in place", functools.partial(start(body).step, *feeds)))
            ways.append(Way(f"{body} in place, bare", _Bare(start(body)).step))
        ways.append(Way(f"{body} two buffers", _Bare(start(body, in_place=False)).step))
    if library is not None:
        own, copied = (start("custom", custom_op_library=library) for _ in range(2))
        ways.append(Way("custom in place", functools.partial(copied.step, *feeds)))
        buffers = functools.partial(own.step, *own.buffers.values())
        ways.append(Way("custom in place, own buffers", buffers))
    return ways


def _shared_ways(model: ModelProto, batch: int, feeds: list[Array]) -> list[Way]:
    """Return the in-place ways of body "ort" and their floor, all on the same memory."""
    session = _session(model, batch, feeds, "ort")
    plain = open_session(unguarded(set_body(model, "ort")), None, 1, None)
    bare, unguarded_run = _Bare(session), _Bare(session, plain)
    (state,) = session._states.values()
    session._ort = _Clock(session._ort)
    return [
        _floor(state[0].array),
        _watched("ort in place", session, feeds),
        Way("ort in place, bare", bare.step),
        _watched("ort in place, own buffers", session, [*session.buffers.values()]),
        Way("ort in place, bare, no guards", unguarded_run.step),
    ]


def _watched(name: str, session: DecodeSession, feeds: list[Array]) -> Way:
    """Return a way that runs step() and notes its seconds outside of onnxruntime's run."""
    added: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        session.step(*feeds)
        added.append(time.perf_counter() - start - session._ort.seconds)

    return Way(name, step, added)


def _apart(shared: list[Way], others: list[Way]) -> list[Way]:
    """Return all ways, the shared ones spread out: in between, their memory leaves the caches."""
    ways = []
    for i, way in enumerate(shared):
        start, stop = (len(others) * j // len(shared) for j in (i, i + 1))
        ways += [way, *others[start:stop]]
    return ways


def _torch_ways(x: Inputs, state: torch.Tensor) -> list[Way]:
    """Return the steps of torch and compile, each with new states and in place."""
    alpha = x.log_alpha.exp()

    def way(backend: str, inplace: bool) -> Way:
        kept = state.clone()

        def step() -> object:
            nonlocal kept
            o, kept = ops.gated_delta_step(
                x.q, x.k, x.v, alpha, x.beta, kept, inplace=inplace, backend=backend
            )
            return o

        return Way(f"{backend} in place" if inplace else backend, step)

    return [way(backend, inplace) for backend in ("torch", "compile") for inplace in (False, True)]


def _floor(state: Array) -> Way:
    return Way("floor", lambda: np.multiply(state, 1.0, out=state))


def _check(model: ModelProto, case: str, batch: int, library: str | None) -> list[Check]:
    """Compare every body with the definition.

    Raises:
        RefusedError: one of them computes something else.
    """
    checks = []
    for body in (*_bodies(), *(["custom"] if library is not None else [])):
        path = library if body == "custom" else None
        comparison = compare(model, body, batch=batch, tokens=2, custom_op_library=path)
        pairs = (
            ("o", comparison.o, comparison.allowed_o),
            ("state", comparison.state, comparison.allowed_state),
        )
        checks += [Check(body, case, what, error, allowed) for what, error, allowed in pairs]
    for check in checks:
        if not check.passed:
            raise RefusedError(str(check))
    return checks


def measure(
    batch: int, heads: int, width: int, rounds: int, library: str | None, result: Result
) -> None:
    """Check and time one shape; add its rows and checks to the result.

    Raises:
        RefusedError: a body computes something else.
    """
    mib = 4 * batch * heads * width * width / 2**20
    case = f"{mib:.3g} MiB, B={batch} H={heads}"
    model = make_decode_model(
        num_qk_heads=heads, num_v_heads=heads, head_k_dim=width, head_v_dim=width
    )
    result.checks += _check(model, case, batch, library)
    sizes = Sizes(batch, 1, heads, heads, width, width, batch)
    x = make_step_inputs(sizes, torch.float32).map(torch.Tensor.contiguous)
    generator = torch.Generator().manual_seed(2)
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    state = torch.randn(batch, heads, width, width, generator=generator, **made)
    feeds = [y.numpy() for y in x.operands()]
    others = [*_own_ways(model, batch, feeds, library), *_torch_ways(x, state)]
    if "ort" in _bodies():
        shared = _shared_ways(model, batch, feeds)
    else:
        shared = [_floor(state.numpy().copy())]
    ways = _apart(shared, others)
    count = max(2, round(STEPS_AT_1_MIB / max(mib, 1)))

    def sample(way: Way) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                way.step()

        return run

    with torch.no_grad():
        actions = {way.name: sample(way) for way in ways}
        timing = interleave(actions, rounds, warmups=2, collect=False)
    per_step = {
        name: Timing(tuple(seconds / count for seconds in t.samples)) for name, t in timing.items()
    }
    added = {
        way.name: Timing(tuple(np.reshape(way.added, (-1, count)).mean(1)[-rounds:].tolist()))
        for way in ways
        if way.added is not None
    }
    result.rows += decode_rows(case, mib, per_step, added)


def run(
    setting: Setting,
    library: str | None = None,
    log: Log = lambda text: None,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    width: int = WIDTH,
) -> Result:
    """Measure every shape, (batch rows, heads) with K = V = width, with one thread.

    A custom-op library is given by its path. The setting is for its rounds: it is float32 on the
    CPU here.

    Raises:
        RefusedError: a body computes something else.
        SpecError: the library cannot be loaded.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = Result(suite.system(replace(setting, dtype="float32", device="cpu")))
        if "ort" not in available_bodies():
            result.skipped.append(("decode", "ort", why_not("ort")))
        rounds = ROUNDS_PER_REPEAT * setting.repeats
        for batch, heads in shapes:
            log(f"B={batch} H={heads}")
            measure(batch, heads, width, rounds, library, result)
        return result
    finally:
        torch.set_num_threads(before)
