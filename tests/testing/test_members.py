"""The table of the family says what is so: a yes runs and is right, a no raises with its reason."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_ops import (
    Backend,
    BackendUnsupportedError,
    Limits,
    gated_delta,
    gated_delta_product,
    gated_delta_step,
    gated_delta_steps,
)
from gdn_ops.dispatch.registry import get_backend
from gdn_ops.testing import members
from gdn_ops.testing.members import MEMBERS, USES, Member

pytestmark = pytest.mark.usefixtures("one_thread")

T, HEADS, WIDTHS = 3, (1, 2), (16, 16)


def drawn(member: Member, tokens: int) -> dict[str, Tensor]:
    """Return the tensors of a small call over micro-steps, with numbers."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    tensors = members.tensors_of(member, tokens, HEADS, WIDTHS, **options)
    return {
        name: (torch.randn if name in ("q", "k", "v") else torch.rand)(x.shape) / 2
        for name, x in tensors.items()
    }


def run(member: Member, use: str, backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Run a member by the public functions, with gradients where they are asked for."""
    x = {name: y.to(dtype) for name, y in drawn(member, 1 if use == "decode" else T).items()}
    options: dict[str, Any] = {"rule": member.rule, "backend": backend}
    state = torch.full((1, HEADS[1], *WIDTHS), 0.1, dtype=dtype)
    if use == "decode" and member.factors > 1:
        return list(gated_delta_steps(**x, **options, state=state)[:2])
    if use == "decode":
        token = {name: y.squeeze(1) for name, y in x.items()}
        return list(gated_delta_step(**token, **options, state=state))
    function: Any = gated_delta
    if member.factors > 1:
        function, options["num_householder"] = gated_delta_product, member.factors
        for name, place in (("q", member.factors - 1), ("alpha", 0)):
            if name in x:
                x[name] = x[name][:, place :: member.factors]
    if use == "backward":
        x = {name: y.requires_grad_() for name, y in x.items()}
    results = list(function(**x, **options, initial_state=state, return_state=True))
    if use == "backward":
        loss = sum(y.square().sum() for y in results)
        results = list(torch.autograd.grad(loss, list(x.values())))
    return results


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
@pytest.mark.parametrize("name", ["cpp", "torch", "naive"])
def test_a_yes_runs_and_is_right_and_a_no_is_the_reason(name: str, member: Member) -> None:
    if get_backend(name).absence():  # type: ignore[union-attr]
        pytest.skip(f"backend {name!r} is not built")
    backend = members.without_machine(name)
    for use in USES:
        against = members.reasons_against(backend, member, use)
        if against:
            with pytest.raises(BackendUnsupportedError) as caught:
                run(member, use, name)
            assert f"{name}: {'; '.join(against)}" in str(caught.value)
            continue
        expected = run(member, use, "naive", torch.float64)
        computed = run(member, use, name)
        for got, wanted in zip(computed, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_table_has_a_cell_for_everything() -> None:
    rows = members.support_table().splitlines()
    assert len(rows) == len(MEMBERS) + 2
    for row in rows:
        cells = row.split(" | ")
        assert len(cells) == (1 if "---" in row else len(members.backend_names()) + 2)
        assert all(cell.strip("| ") for cell in cells)
    for row, member in itertools.product(rows[2:], MEMBERS):
        if row.startswith(f"| {member.name} |"):
            assert " yes |" in row


def test_a_cell_gives_every_reason() -> None:
    class Narrow(Backend):
        name = "narrow"
        limits = Limits(devices=("cuda",), rules=("delta", "gated_delta"), grad=False)

    by_name = {member.name: member for member in MEMBERS}
    wide = [
        "channel decay (supported: none, scalar)",
        "channel erase (supported: none, scalar)",
        "channel write (supported: scalar)",
        "erase and write (supported: beta)",
    ]
    no_gradients = "gradients needed (supported: forward only)"
    expected = {
        ("Gated DeltaNet", "forward"): [],
        ("Gated DeltaProduct", "backward"): [no_gradients],
        ("GDN-2", "decode"): wide,
        ("GDN-2", "backward"): [*wide, no_gradients],
        ("linear attention", "decode"): ["rule linear (supported: delta, gated_delta)"],
    }
    for (name, use), against in expected.items():
        assert members.reasons_against(Narrow(), by_name[name], use) == against
    yes = members.cells_of(by_name["Gated DeltaNet"])
    assert set(yes.values()) == {"yes", "`standard`, `ort`, `onnx`: yes"}
    assert members.onnx_cell(by_name["GDN-2"]) == (
        "no: gdn_ops::GatedDelta has one strength, beta, and no erase or write"
    )


def test_what_a_machine_lacks_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(device: str) -> tuple[str, ...]:
        return ("no compiler",)

    for name in ("triton", "tilelang"):
        cls = type(get_backend(name))
        monkeypatch.setattr(cls, "tool_reasons", staticmethod(lacking))
        backend = members.without_machine(name)
        assert members.reasons_against(backend, MEMBERS[0], "forward") == []
