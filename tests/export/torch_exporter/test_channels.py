"""A torch module whose decays are of every key channel becomes a model that computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gdn_ops import export, gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.export.model.conversion import with_body
from gdn_ops.export.runtime.comparison import relative_error
from onnx_layers import HV, H, K, V, assert_same, run_engine, shapes_of
from onnx_steps import NEW_STATE, STATE


class Tokens(nn.Module):
    """Nothing but an op; its decay is `gate`, alpha or log_alpha."""

    def __init__(self, op: str, gate: str) -> None:
        super().__init__()
        self.op, self.gate = op, gate

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Any:
        gates = {self.gate: a, "beta": b}
        if self.op == "gated_delta":
            return gated_delta(q, k, v, initial_state=s, return_state=True, **gates)
        op = gated_delta_step if self.op == "gated_delta_step" else gated_delta_steps
        return op(q, k, v, state=s, **gates)


def draw(tokens: int | None, gate: str, batch: int = 2) -> tuple[Tensor, ...]:
    """Return q, k, v, a decay with exact zeros, beta and a state; of one token for None."""
    generator = torch.Generator().manual_seed(0)
    axes = (batch,) if tokens is None else (batch, tokens)
    q, k, v = (torch.randn(*axes, *own, generator=generator) for own in ((H, K), (H, K), (HV, V)))
    alpha = torch.rand(*axes, HV, K, generator=generator)
    alpha[alpha < 0.1] = 0.0
    decay = alpha if gate == "alpha" else alpha.log()
    beta = 2 * torch.rand(*axes, HV, generator=generator)
    state = torch.randn(batch, HV, K, V, generator=generator)
    return q, nn.functional.normalize(k, dim=-1), v, decay, beta, state


@pytest.mark.parametrize("gate", ["alpha", "log_alpha"])
@pytest.mark.parametrize("op", ["gated_delta_step", "gated_delta", "gated_delta_steps"])
def test_every_op_is_exported_with_every_body(op: str, gate: str) -> None:
    module = Tokens(op, gate).eval()
    is_step = op == "gated_delta_step"
    args = draw(None if is_step else 5, gate)
    make = export.export_decode if is_step else export.export_prefill
    model = make(module, args)
    tokens = [] if is_step else ["sequence"]
    assert [*shapes_of(model.graph.input).values()][3] == ["batch", *tokens, HV, K]
    (node,) = export.nodes_of(model)
    assert node.variant.decay == "channel"
    # Other rows, and for a prompt other tokens, than those of the export.
    args = draw(None if is_step else 9, gate, batch=3)
    expected = module(*args)
    assert torch.isfinite(expected[1]).all()
    for body in export.available_bodies():
        assert_same(run_engine(with_body(model, body, "test"), args), expected)


def test_a_session_decodes_behind_a_prompt() -> None:
    q, k, v, a, b, s = draw(9, "log_alpha")
    expected = gated_delta(
        q, k, v, beta=b, log_alpha=a, initial_state=s, return_state=True, backend="naive"
    )
    prompt = export.export_prefill(Tokens("gated_delta", "log_alpha").eval(), draw(5, "log_alpha"))
    step = Tokens("gated_delta_step", "log_alpha").eval()
    decode = export.export_decode(step, draw(None, "log_alpha"))
    for body in export.available_bodies():
        first = [x[:, :5] for x in (q, k, v, a, b)]
        read, after = run_engine(with_body(prompt, body, "test"), [*first, s])
        session = export.DecodeSession(decode, batch=2, body=body, threads=1)
        session.state = after
        rest = [session.step(*(x[:, t].numpy() for x in (q, k, v, a, b))) for t in range(5, 9)]
        found = np.concatenate([read, np.stack(rest, 1)], 1), session.state[STATE]
        assert_same(found, expected)


def test_a_prompt_begins_with_a_state_of_16_bits() -> None:
    args = [x.half() for x in draw(5, "log_alpha")]
    module = Tokens("gated_delta", "log_alpha").eval()
    model = export.export_prefill(module, tuple(args))
    exact = module(*(x.double() for x in args))
    for body in export.available_bodies():
        o, state = run_engine(with_body(model, body, "test"), args)
        assert (o.dtype, state.dtype) == (np.float16, np.float32)
        assert relative_error(o, exact[0]) < 1e-3
        assert relative_error(state, exact[1]) < 1e-6


class Both(nn.Module):
    """A step with a decay of every channel, and one with a decay of each head."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *s: Tensor) -> Any:
        o, first = gated_delta_step(q, k, v, log_alpha=a, beta=b, state=s[0])
        o, second = gated_delta_step(q, k, o, log_alpha=a[..., 0], beta=b, state=s[1])
        return o, first, second


def test_a_file_holds_both_decays() -> None:
    args = draw(None, "log_alpha")
    args = (*args, -args[-1])
    model = export.export_decode(Both().eval(), args)
    assert [node.variant.decay for node in export.nodes_of(model)] == ["channel", "scalar"]
    assert [function.overload for function in model.functions] == ["", "gated_delta_beta_float"]
    expected = Both()(*args)
    for body in export.available_bodies():
        session = export.DecodeSession(model, batch=2, body=body, threads=1)
        session.state = dict(zip(session.state, (x.numpy() for x in args[5:]), strict=True))
        o = session.step(*(x.numpy() for x in args[:5]))
        assert_same([o, *session.state.values()], expected)


def test_a_table_of_translations_writes_such_a_node() -> None:
    args = draw(None, "alpha")
    program = torch.onnx.export(
        Tokens("gated_delta_step", "alpha").eval(),
        args,
        dynamo=True,
        verbose=False,
        custom_translation_table=export.translation_table(),
    )
    assert program is not None
    (node,) = export.nodes_of(program.model_proto)
    assert node.variant.decay == "channel"
    model = export.set_body(program.model_proto, "standard")
    assert_same(run_engine(model, args), Tokens("gated_delta_step", "alpha")(*args))
    assert NEW_STATE not in shapes_of(model.graph.output)
