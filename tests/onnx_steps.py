"""Draws and references of the ONNX tests: token after token, against the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from torch import Tensor

from gdn_ops import GATED_DELTA_STEP, export, gated_delta_step
from gdn_ops.export.bodies.body import DEFAULT_OPSET
from gdn_ops.export.bodies.table import BODIES
from gdn_ops.export.runtime.comparison import as_array, relative_error

RULES = tuple(GATED_DELTA_STEP.rule)
HEADS = ((1, 1), (2, 4), (2, 6), (16, 48))
SCALES = (1.0, 0.3, None)
DTYPES = (
    ("float32", "float32"),
    ("float16", "float32"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float64", "float64"),
)
"""Of q, k, v and of the state."""

Array = np.ndarray[Any, Any]


def opset_for(body: str | None) -> int:
    """Return an opset that a body can have."""
    return DEFAULT_OPSET if body is None else BODIES[body].opset


@dataclass(frozen=True)
class Step:
    """One node and the tokens that it is tried on."""

    rule: str = "gated_delta"
    dtype: str = "float32"
    state_dtype: str = "float32"
    H: int = 2
    HV: int = 4
    K: int = 8
    V: int = 6
    B: int = 2
    scale: float | None = None
    qk_l2norm: bool = False
    has_beta: bool = True
    tokens: int = 64
    seed: int = 0
    decay: str = "scalar"

    def model(self, body: str | None, opset: int | None = None) -> Any:
        """Return a model of one token, of an opset that the body has if none is given."""
        opset = opset or opset_for(body)
        return export.make_decode_model(**self.options(), opset=opset, body=body)

    def prefill_model(self, body: str | None, opset: int | None = None) -> Any:
        """Return a model of a prompt, as `model` does."""
        opset = opset or opset_for(body)
        return export.make_prefill_model(**self.options(), opset=opset, body=body)

    def session(self, **options: Any) -> export.DecodeSession:
        """Return a session of the model with the standard body."""
        return export.DecodeSession(self.model("standard"), **{"batch": self.B, **options})

    def options(self) -> dict[str, Any]:
        sizes = ("num_qk_heads", "num_v_heads", "head_k_dim", "head_v_dim")
        others = ("dtype", "state_dtype", "rule", "scale", "qk_l2norm", "has_beta", "decay")
        sizes_by_name = dict(zip(sizes, (self.H, self.HV, self.K, self.V), strict=True))
        return sizes_by_name | {name: getattr(self, name) for name in others}

    @property
    def has_decay(self) -> bool:
        return GATED_DELTA_STEP.rule[self.rule].has_decay

    @property
    def exact_scale(self) -> float:
        """The scale as the file has it: an attribute is float32."""
        return float(np.float32(self.K**-0.5 if self.scale is None else self.scale))

    def draw(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the tokens and the state before them, with exact resets and beta up to 2."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        low, gates = getattr(torch, self.dtype), self.gate_dtype
        tokens = []
        for t in range(self.tokens):
            k = normal(self.B, self.H, self.K)
            if not self.qk_l2norm:
                k = torch.nn.functional.normalize(k, dim=-1)
            token = {
                "q": normal(self.B, self.H, self.K).to(low),
                "k": k.to(low),
                "v": normal(self.B, self.HV, self.V).to(low),
            }
            if self.has_decay:
                gates_shape = (self.B, self.HV, *((self.K,) if self.decay == "channel" else ()))
                log_alpha = -0.3 * uniform(*gates_shape)
                log_alpha[uniform(*gates_shape) < 0.02] = -torch.inf
                if t % 8 == 3:
                    log_alpha.zero_()
                token["log_alpha"] = log_alpha.to(gates)
            if self.has_beta:
                beta = 2 * uniform(self.B, self.HV)
                token["beta"] = torch.where(beta < 0.1, 0.0, beta.where(beta < 1.9, 2.0)).to(gates)
            tokens.append(token)
        state = normal(self.B, self.HV, self.K, self.V).to(getattr(torch, self.state_dtype))
        return tokens, state

    @property
    def gate_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def run(
        self, tokens: list[dict[str, Tensor]], state: Tensor, wide: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Run the definition, in float64 if wide; return every o and the last state."""
        outputs = []
        cast = (lambda x: x.double()) if wide else (lambda x: x)
        state = cast(state)
        with torch.no_grad():
            for token in tokens:
                o, state = gated_delta_step(
                    **{name: cast(x) for name, x in token.items()},
                    state=state,
                    rule=self.rule,
                    scale=self.exact_scale,
                    qk_l2norm=self.qk_l2norm,
                    backend="naive",
                )
                outputs.append(o)
        return outputs, state


def feed(token: dict[str, Tensor]) -> dict[str, Array]:
    return {name: as_array(x) for name, x in token.items()}


def prompt_feed(tokens: list[dict[str, Tensor]]) -> dict[str, Array]:
    """Return tokens as a prompt: (B, T, ...)."""
    return {name: np.stack([feed(token)[name] for token in tokens], 1) for name in tokens[0]}


def rounding(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps / 2


def assert_right(step: Step, tokens: list[dict[str, Tensor]], start: Tensor, run: Any) -> None:
    """Compare a run, from (tokens, state) to (every o, last state), with the definition.

    It may be off by twice what the definition itself is at the same dtypes, and a few roundings.
    """
    exact_o, exact_state = step.run(tokens, start, wide=True)
    own_o, own_state = step.run(tokens, start, wide=False)
    found_o, found_state = run(tokens, start)
    band = 4 * rounding(step.dtype)
    if step.dtype == "float64":
        # The definition has the same precision: sums over K in another order.
        band += step.K * rounding("float64")

    def check(name: str, computed: Any, exact: Tensor, allowed: float) -> None:
        assert computed.shape == tuple(exact.shape)
        got = relative_error(computed, exact)
        assert got <= allowed, f"{name}: got {got:.3g}, but should be <= {allowed:.3g}"

    for t, (o, own, exact) in enumerate(zip(found_o, own_o, exact_o, strict=True)):
        check(f"o of token {t}", o, exact, 2 * relative_error(own, exact) + band)
    allowed = {"float32": 1e-6, "float64": 1e-14}.get(step.state_dtype)
    if allowed is None:
        allowed = 2 * relative_error(own_state, exact_state) + rounding(step.state_dtype)
    check("state", found_state, exact_state, allowed)


STATE = "past_key_values.0.recurrent_state"
NEW_STATE = "present.0.recurrent_state"


def in_session(model: Any, body: str, **options: Any) -> Any:
    """Return a run of a DecodeSession."""

    def run(tokens: list[dict[str, Tensor]], start: Tensor) -> tuple[list[Array], Array]:
        session = export.DecodeSession(model, batch=start.shape[0], body=body, threads=1, **options)
        assert session.body == body
        session.state = as_array(start)
        outputs = [session.step(**feed(token)) for token in tokens]
        return outputs, session.state[STATE]

    return run


def engine_of(model: Any) -> Any:
    """Return an onnxruntime session of a model, or of the path of one, that prints no errors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString() if isinstance(model, ModelProto) else model, options
    )


def in_engine(engine: Any) -> Any:
    """Return a run of anything with `run(names, feeds)`: a session of onnxruntime or onnx."""

    def run(tokens: list[dict[str, Tensor]], start: Tensor) -> tuple[list[Array], Array]:
        outputs, state = [], as_array(start)
        for token in tokens:
            o, state = engine.run(None, {**feed(token), STATE: state})
            outputs.append(o)
        return outputs, state

    return run


def as_prompt(engine: Any) -> Any:
    """Return a run of a model that reads the tokens as one prompt."""

    def run(tokens: list[dict[str, Tensor]], start: Tensor) -> tuple[Array, Array]:
        o, state = engine.run(None, {**prompt_feed(tokens), STATE: as_array(start)})
        return o.swapaxes(0, 1), state

    return run


def varied(step: Step, i: int) -> Step:
    """Return a step with heads, sizes and scale that go round with i."""
    H, HV = HEADS[i % len(HEADS)]
    K, V = ((8, 6), (5, 12))[i % 2]
    return replace(step, H=H, HV=HV, K=K, V=V, scale=SCALES[i % len(SCALES)])
