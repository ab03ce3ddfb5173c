"""A graph that is written wrong is refused as it is exported, or adds other tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exported_models
from errors import refusal
from exported_models import COUNT, greedy, prompts
from gdn_ops import export
from gdn_ops.export.language_models.flavours import Flavour, Onnxruntime
from gdn_ops.export.language_models.layers import LayerWriter
from onnx_needs import needs_ort_body

Broken = Callable[[Any], Any]
NEXT, OLMO = "qwen3_next-2:1", "olmo_hybrid-1:1"


def _padding_is_read(right: Any) -> Any:
    def shared(self: Any, *arguments: Any) -> Any:
        everything = self.graph.constant(1, "float32")
        return dataclasses.replace(right(self, *arguments), is_token=everything)

    return shared


def _padding_is_seen(right: Any) -> Any:
    def bias(self: Any, is_there: str, *arguments: Any) -> Any:
        everything = self.graph("Or", is_there, self.graph("Not", is_there))
        return right(self, everything, *arguments)

    return bias


def _positions_begin_with_the_call(right: Any) -> Any:
    def shared(self: Any, *arguments: Any) -> Any:
        found, g = right(self, *arguments), self.graph
        first = g("Slice", found.positions, g.constant([0]), g.constant([1]), g.constant([1]))
        return dataclasses.replace(found, positions=g("Sub", found.positions, first))

    return shared


def _key_heads_in_another_order(right: Any) -> Any:
    def heads(self: Any, x: str, count: int, width: int) -> str:
        found: str = right(self, x, count, width)
        if count != 2:
            return found
        reversed_: str = self.graph("Gather", found, self.graph.constant([1, 0]), axis=2)
        return reversed_

    return heads


def _shares_do_not_add_up_to_one(right: Any) -> Any:
    def experts(self: Any, g: Any, d: Any, *arguments: Any) -> Any:
        return right(self, g, dataclasses.replace(d, normalises=False), *arguments)

    return experts


def _gates_up_to_one(right: Any) -> Any:
    def gates(self: Any, d: Any, *arguments: Any) -> Any:
        return right(self, dataclasses.replace(d, beta_scale=1.0), *arguments)

    return gates


def _states_are_written_a_call_late(right: Any) -> Any:
    def convolution(
        self: Any, g: Any, x: str, w: str, b: str, before: str, after: str, **more: Any
    ) -> str:
        found: str = right(self, g, x, w, b, before, g.local("dropped"), **more)
        g("Identity", before, outputs=[after])
        return found

    return convolution


SEEN: dict[str, tuple[str, str, Broken]] = {
    "positions begin with the call": (NEXT, "_shared", _positions_begin_with_the_call),
    "key heads in another order": (NEXT, "_heads", _key_heads_in_another_order),
    "shares do not add up to one": (NEXT, "experts", _shares_do_not_add_up_to_one),
    "beta up to one": (OLMO, "_gates", _gates_up_to_one),
    "states are written a call late": (OLMO, "convolution", _states_are_written_a_call_late),
}
"""Break parts of the writer that one row of seven tokens shows; with each, the family."""

UNSEEN: dict[str, tuple[str, str, Broken]] = {
    "padding is read by the rule": (NEXT, "_shared", _padding_is_read),
    "padding is seen by attention": (OLMO, "_bias", _padding_is_seen),
}
"""Break parts of the writer that only padded rows show."""


def break_(patch: pytest.MonkeyPatch, flavour: str, attribute: str, broken: Broken) -> None:
    """Break a part of the writer."""
    kinds = {"portable": Flavour, "onnxruntime": Onnxruntime}
    target = LayerWriter if attribute.startswith("_") else kinds[flavour]
    patch.setattr(target, attribute, broken(getattr(target, attribute)))


ALL_FLAVOURS = ("portable", pytest.param("onnxruntime", marks=needs_ort_body))


@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
@pytest.mark.parametrize("name", SEEN)
def test_a_graph_that_computes_something_else_is_not_kept(
    name: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, attribute, broken = SEEN[name]
    break_(monkeypatch, flavour, attribute, broken)
    tiny = exported_models.model(family)
    text = refusal(export.export_model, tiny, tmp_path / "new", flavour=flavour)
    kind = type(tiny).__name__
    found = re.fullmatch(
        rf"export_model: the graph of {kind} computes other logits than the model, off by (\S+) of "
        rf"the largest, should be within 0\.001: one of its parts is not what it looks like",
        text,
    )
    assert found, text
    assert float(found[1]) > 3e-3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
@pytest.mark.parametrize("name", UNSEEN)
def test_a_graph_that_reads_padding_adds_other_tokens(
    name: str, flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, attribute, broken = UNSEEN[name]
    break_(monkeypatch, flavour, attribute, broken)
    folder = export.export_model(exported_models.model(family), tmp_path, flavour=flavour)
    added = export.ModelSession(folder, threads=1).generate(prompts(), COUNT)
    expected = greedy(family)
    assert added[0] == expected[0]
    assert all(a != b for a, b in zip(added[1:], expected[1:], strict=True))


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=needs_ort_body)])
def test_a_graph_without_numbers_is_not_kept(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gates(self: Any, d: Any, *arguments: Any) -> Any:
        log_alpha, beta = right(self, d, *arguments)
        return log_alpha, self.graph("Mul", beta, self.graph.constant(float("nan"), "float32"))

    right = LayerWriter._gates
    monkeypatch.setattr(LayerWriter, "_gates", gates)
    flavour = "portable" if weights == "float32" else "onnxruntime"
    text = refusal(
        export.export_model, exported_models.model(OLMO), tmp_path / "new",
        flavour=flavour, weights=weights,
    )  # fmt: skip
    assert "computes other logits than the model, off by nan of the largest" in text
    assert list(tmp_path.iterdir()) == []
