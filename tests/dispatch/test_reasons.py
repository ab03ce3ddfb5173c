"""A limit that a call exceeds is a reason, and reasons are the text that users read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from constant_backends import arguments, bound, bound_step, make_backend, step_arguments
from errors import message_of
from gdn_ops import BackendUnsupportedError, gated_delta, gated_delta_step, register_backend
from gdn_ops.call.bind import Call
from gdn_ops.dispatch import registry

pytestmark = pytest.mark.usefixtures("registry_as_found")


@pytest.mark.parametrize(
    ("limits", "call", "reason"),
    [
        ({"devices": ("cuda",)}, {}, "device cpu (supported: cuda)"),
        ({"devices": ("cuda", "xpu")}, {}, "device cpu (supported: cuda, xpu)"),
        ({"dtypes": ("bfloat16",)}, {}, "dtype float32 (supported: bfloat16)"),
        (
            {"state_dtypes": ("float32", "float64")},
            {"initial_state": torch.zeros(1, 4, 8, 6, dtype=torch.bfloat16)},
            "state dtype bfloat16 (supported: float32, float64)",
        ),
        ({"rules": ("delta", "linear")}, {}, "rule gated_delta (supported: delta, linear)"),
        ({"ops": ("gated_delta_step",)}, {}, "op gated_delta (supported: gated_delta_step)"),
        (
            {"grad": False},
            {"v": torch.zeros(1, 4, 4, 6, requires_grad=True)},
            "gradients needed (supported: forward only)",
        ),
        ({"varlen": False}, {"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is not supported"),
        ({"chunk_sizes": (32, 64)}, {"chunk_size": 16}, "chunk_size=16 (supported: 32, 64)"),
    ],
)
def test_a_limit_becomes_one_reason(
    limits: dict[str, Any], call: dict[str, Any], reason: str
) -> None:
    assert registry.reasons(make_backend("fake", **limits)(), bound(**call)) == [reason]
    assert registry.reasons(make_backend("fake")(), bound(**call)) == []


WIDE: dict[str, Any] = {
    "alpha": torch.ones(1, 4, 4, 8),
    "beta": None,
    "erase": torch.ones(1, 4, 4, 8),
    "write": torch.ones(1, 4, 4, 6),
}
"""Gates of channels, for `bound`."""

OF_DECODE: dict[str, Any] = {
    "decode_decays": ("none", "scalar", "channel"),
    "decode_erases": ("scalar", "channel"),
    "decode_writes": ("scalar", "channel"),
    "decode_apart": True,
}


def test_gates_become_a_reason_for_each_that_is_too_wide() -> None:
    assert registry.reasons(make_backend("fake")(), bound(**WIDE)) == [
        "channel decay (supported: none, scalar)",
        "channel erase (supported: none, scalar)",
        "channel write (supported: scalar)",
        "erase and write (supported: beta)",
    ]
    both = {name: x for name, x in WIDE.items() if name != "alpha"}
    heads = both | {name: torch.ones(1, 4, 4) for name in ("erase", "write")}
    assert registry.reasons(make_backend("fake")(), bound(**heads)) == [
        "erase and write (supported: beta)"
    ]


def test_gates_that_only_decode_ops_take_name_the_op_in_reasons() -> None:
    step = {name: None if x is None else x[:, 0] for name, x in WIDE.items()}
    decoder = make_backend("fake", **OF_DECODE)()
    assert registry.reasons(decoder, bound_step(**step)) == []
    assert registry.reasons(decoder, bound(**WIDE)) == [
        "channel decay in gated_delta (supported: none, scalar)",
        "channel erase in gated_delta (supported: none, scalar)",
        "channel write in gated_delta (supported: scalar)",
        "erase and write in gated_delta (supported: beta)",
    ]


def test_gates_that_only_sequences_take_name_the_op_in_reasons_too() -> None:
    widths = ("none", "scalar", "channel")
    taken = {"decays": widths, "erases": widths, "writes": widths, "apart": True}
    narrow = {f"decode_{name}": ("scalar",) if name == "writes" else ("none",) for name in taken}
    backend = make_backend("fake", **taken, **narrow | {"decode_apart": False})()
    step = {name: None if x is None else x[:, 0] for name, x in WIDE.items()}
    assert registry.reasons(backend, bound(**WIDE)) == []
    assert registry.reasons(backend, bound_step(**step)) == [
        "channel decay in gated_delta_step (supported: none)",
        "channel erase in gated_delta_step (supported: none)",
        "channel write in gated_delta_step (supported: scalar)",
        "erase and write in gated_delta_step (supported: beta)",
    ]


def test_a_limit_of_decode_ops_alone_leaves_the_others_as_they_are() -> None:
    backend = make_backend("fake", decode_decays=OF_DECODE["decode_decays"])()
    step = {name: None if x is None else x[:, 0] for name, x in WIDE.items()}
    assert registry.reasons(backend, bound_step(**step)) == [
        "channel erase (supported: none, scalar)",
        "channel write (supported: scalar)",
        "erase and write (supported: beta)",
    ]


def test_a_pinned_backend_that_decodes_such_gates_alone_says_so_for_a_sequence() -> None:
    register_backend(make_backend("decoder", **OF_DECODE))
    text = message_of(BackendUnsupportedError, gated_delta, **arguments(**WIDE), backend="decoder")
    assert text == (
        "backend 'decoder' cannot run gated_delta on these inputs\n"
        "  q float32 (1, 4, 2, 8) cpu, v (1, 4, 4, 6), rule gated_delta\n"
        "  decoder: channel decay in gated_delta (supported: none, scalar); "
        "channel erase in gated_delta (supported: none, scalar); "
        "channel write in gated_delta (supported: scalar); "
        "erase and write in gated_delta (supported: beta)\n"
        '  try backend="cpp"'
    )


def test_head_dims_become_a_reason_for_each_axis() -> None:
    def of(**limits: Any) -> list[str]:
        return registry.reasons(make_backend("fake", **limits)(), bound())

    assert of(head_dims=(64, 128)) == ["K=8 (supported: 64, 128)", "V=6 (supported: 64, 128)"]
    assert of(head_dims=range(8, 257)) == ["V=6 (supported: 8 to 256)"]
    assert of(head_dim_multiple=4) == ["V=6 (supported: multiples of 4)"]
    assert of(head_dims=(6, 8), head_dim_multiple=2) == []


def test_all_reasons_are_given_and_those_of_the_backend_come_last() -> None:
    class Picky(make_backend("picky", dtypes=("float16",), grad=False)):  # type: ignore[misc]
        def reasons(self, call: Call) -> list[str]:
            return [f"T={call.sizes.T} is not my day"]

    assert registry.reasons(Picky(), bound(q=arguments()["q"].requires_grad_())) == [
        "dtype float32 (supported: float16)",
        "gradients needed (supported: forward only)",
        "T=4 is not my day",
    ]


def test_a_step_has_reasons_of_its_own() -> None:
    limits = {"ops": ("gated_delta",), "state_dtypes": ("float32",)}
    call = bound_step(state=torch.zeros(1, 4, 8, 6, dtype=torch.float16))
    assert registry.reasons(make_backend("fake", **limits)(), call) == [
        "op gated_delta_step (supported: gated_delta)",
        "state dtype float16 (supported: float32)",
    ]


def test_a_pinned_backend_that_cannot_run_raises_and_never_falls_back() -> None:
    register_backend(make_backend("narrow", dtypes=("float16",), head_dims=(128,)))
    reasons = "dtype float32 (supported: float16); K=8 (supported: 128); V=6 (supported: 128)"
    linear = step_arguments(rule="linear", alpha=None)
    for op, call, shown in (
        (gated_delta, arguments(), "(1, 4, 2, 8) cpu, v (1, 4, 4, 6), rule gated_delta"),
        (gated_delta_step, linear, "(1, 2, 8) cpu, v (1, 4, 6), rule linear"),
    ):
        assert message_of(BackendUnsupportedError, op, **call, backend="narrow") == (
            f"backend 'narrow' cannot run {op.__name__} on these inputs\n"
            f"  q float32 {shown}\n"
            f"  narrow: {reasons}\n"
            '  try backend="cpp"'
        )


def test_auto_without_any_that_can_gives_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("narrow", "plain"))
    register_backend(make_backend("narrow", head_dims=(128,)))
    register_backend(make_backend("plain", varlen=False, grad=False))
    packed = arguments(
        v=torch.zeros(1, 4, 4, 6, requires_grad=True), cu_seqlens=torch.tensor([0, 1, 4])
    )
    assert message_of(BackendUnsupportedError, gated_delta, **packed) == (
        "no backend can run gated_delta on these inputs\n"
        "  q float32 (1, 4, 2, 8) cpu, v (1, 4, 4, 6), rule gated_delta, "
        "cu_seqlens of 2 sequences, gradients needed\n"
        "  narrow: K=8 (supported: 128); V=6 (supported: 128)\n"
        "  plain: gradients needed (supported: forward only); cu_seqlens is not supported\n"
        f'  try backend="{registry.known_backends()[2]}"'
    )
    assert registry.known_backends()[2] in ("compile", "naive")


def test_without_a_cure_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._backends.clear()
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("narrow", "plain"))
    register_backend(make_backend("narrow", head_dims=(128,)))
    register_backend(make_backend("plain", dtypes=("float16",)))
    text = message_of(BackendUnsupportedError, gated_delta, **arguments())
    assert text.splitlines()[-1] == "  no other backend can run it either"
