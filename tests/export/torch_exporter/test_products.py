"""A module that takes several micro-steps for a token becomes a model that decodes one token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from errors import refusal
from gdn_ops import export, gated_delta, gated_delta_product, gated_delta_steps
from gdn_ops.export.runtime.comparison import relative_error
from onnx_layers import HV, H, K, V, run_engine, shapes_of
from onnx_needs import ALL_BODIES, BODIES
from onnx_steps import STATE

TOKENS, ROWS = 6, 2


class Token(nn.Module):
    """One token of a product, (B, H, K) and (B, n, H, K), from a state to the next one."""

    def __init__(self, factors: int, rule: str = "gated_delta", is_normed: bool = False) -> None:
        super().__init__()
        self.factors, self.rule, self.is_normed = factors, rule, is_normed

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_alpha: Any = None
    ) -> tuple[Tensor, Tensor]:
        decay = None if log_alpha is None else log_alpha.unsqueeze(1)
        o, state = self.product(q.unsqueeze(1), k, v, beta, state, decay)
        return o.squeeze(1), state

    def product(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_alpha: Any,
        backend: str = "auto",
    ) -> Any:  # fmt: skip
        return gated_delta_product(
            q, k, v, beta=beta, log_alpha=log_alpha, num_householder=self.factors, rule=self.rule,
            qk_l2norm=self.is_normed, initial_state=state, return_state=True, backend=backend,
        )  # fmt: skip


def draw(factors: int, decay: str) -> dict[str, Tensor]:
    """Return tokens (B, T, ...) with exact resets, the writes of each on an axis of their own."""
    generator = torch.Generator().manual_seed(0)
    tokens = ROWS, TOKENS
    q = torch.randn(*tokens, H, K, generator=generator)
    k = torch.randn(*tokens, factors, H, K, generator=generator)
    v = torch.randn(*tokens, factors, HV, V, generator=generator)
    beta = 2 * torch.rand(*tokens, factors, HV, generator=generator)
    drawn = {"q": q, "k": nn.functional.normalize(k, dim=-1), "v": v, "beta": beta}
    if decay == "none":
        return drawn
    alpha = torch.rand(*tokens, HV, *([K] if decay == "channel" else []), generator=generator)
    return drawn | {"log_alpha": alpha.masked_fill(alpha < 0.2, 0.0).log()}


@pytest.mark.parametrize("body", ALL_BODIES)
@pytest.mark.parametrize("is_in_place", [True, False])
@pytest.mark.parametrize(
    ("factors", "decay", "is_normed"),
    [(1, "scalar", False), (2, "channel", True), (3, "scalar", True), (3, "none", False)],
)
def test_tokens_are_decoded_one_by_one(
    factors: int, decay: str, is_normed: bool, is_in_place: bool, body: str
) -> None:
    module = Token(factors, "delta" if decay == "none" else "gated_delta", is_normed)
    drawn = draw(factors, decay)
    state = torch.randn(ROWS, HV, K, V, generator=torch.Generator().manual_seed(1))
    first = {name: x[:, 0] for name, x in drawn.items()}
    gates = [first["log_alpha"]] if "log_alpha" in first else []
    args = (*(first[name] for name in ("q", "k", "v", "beta")), state, *gates)
    model = export.export_decode(module, args)
    shapes = shapes_of(model.graph.input)
    assert shapes["k"] == ["batch", factors, H, K] and shapes[STATE] == ["batch", HV, K, V]
    session = export.DecodeSession(model, batch=ROWS, body=body, in_place=is_in_place)
    session.state = state.numpy()
    made = [
        session.step(**{name: x[:, t].numpy() for name, x in drawn.items()}).copy()
        for t in range(TOKENS)
    ]
    flat = [x if name in ("q", "log_alpha") else x.flatten(1, 2) for name, x in drawn.items()]
    q, k, v, beta, *decays = (x.double() for x in flat)
    log_alpha = decays[0] if decays else None
    o, after = module.product(q, k, v, beta, state.double(), log_alpha, backend="naive")
    assert relative_error(torch.from_numpy(np.stack(made, 1)), o) < 1e-5
    assert relative_error(torch.from_numpy(session.state[STATE]), after) < 1e-5


class Prompt(Token):
    """Any number of tokens, (B, T, H, K) and (B, T, n, H, K)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, log_alpha: Any = None
    ) -> Any:
        return self.product(q, *(x.flatten(1, 2) for x in (k, v, beta)), state, log_alpha)


@pytest.mark.parametrize("body", BODIES)
def test_a_prompt_of_any_length_is_read(body: str) -> None:
    module, drawn = Prompt(3), draw(3, "scalar")
    state = torch.zeros(ROWS, HV, K, V)
    names = ("q", "k", "v", "beta", "state", "log_alpha")
    args = [drawn.get(name, state) for name in names]
    model = export.set_body(export.export_prefill(module, tuple(args)), body)
    assert shapes_of(model.graph.input)["k"] == ["batch", "sequence", 3, H, K]
    o, after = module(*args)
    outputs = []
    for part in (slice(0, 4), slice(4, 5), slice(5, TOKENS)):
        fed = [x if name == "state" else x[:, part] for name, x in zip(names, args, strict=True)]
        fed[4] = state
        y, state = map(torch.from_numpy, run_engine(model, fed))
        outputs.append(y)
    assert relative_error(torch.cat(outputs, 1), o.double()) < 1e-5
    assert relative_error(state, after.double()) < 1e-5


class Draft(nn.Module):
    """Four tokens a call, by gated_delta_steps."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Any:
        return gated_delta_steps(q, k, v, beta=beta, state=state, rule="delta")


def test_a_fixed_number_of_tokens_is_decoded_too() -> None:
    drawn = draw(1, "none")
    q, k, v, beta = (x if name == "q" else x.squeeze(2) for name, x in drawn.items())
    state = torch.zeros(ROWS, HV, K, V)
    four = [x[:, :4] for x in (q, k, v, beta)]
    model = export.export_decode(Draft(), (*four, state))
    assert shapes_of(model.graph.input)["q"] == ["batch", 4, H, K]
    session = export.DecodeSession(model, batch=ROWS)
    o = torch.from_numpy(session.step(*(x.numpy() for x in four)))
    expected, after = Draft()(*four, state)
    assert relative_error(o, expected.double()) < 1e-5
    assert relative_error(torch.from_numpy(session.state[STATE]), after.double()) < 1e-5


class Forgetful(nn.Module):
    """Read a state, and return none."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Any:
        return gated_delta(q, k, v, beta=beta, rule="delta", initial_state=state)


def test_a_sequence_whose_state_is_not_returned_is_for_the_other_exporter() -> None:
    drawn = draw(1, "none")
    args = [x if name == "q" else x.squeeze(2) for name, x in drawn.items()]
    text = refusal(export.export_decode, Forgetful(), (*args, torch.zeros(ROWS, HV, K, V)))
    assert text == (
        "export_decode: the module calls no gated_delta_step, should call it: there are only "
        "nodes gdn_ops::GatedDelta; the other exporter is for them"
    )
