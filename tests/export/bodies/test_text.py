"""The text of a body guards shapes, is safe in place, and never copies a state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from gdn_ops.export.runtime.comparison import as_array
from onnx_needs import BODIES, WRITTEN_ONNX_BODY
from onnx_steps import RULES, STATE, Step, engine_of, feed


def wrong_shapes() -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (rule, input, shape) of steps whose other inputs have batch 3."""
    shapes = {"q": (2, 8), "k": (2, 8), "v": (4, 6), "log_alpha": (4,), "beta": (4,)}
    one_row = [
        (rule, name, (1, *rest))
        for rule in RULES
        for name, rest in {**shapes, STATE: (4, 8, 6)}.items()
        if name != "log_alpha" or Step(rule).has_decay
    ]
    others = {"q": (3, 4, 8), "k": (3, 2, 16), "v": (3, 2, 6), STATE: (3, 4, 6, 8), "beta": (3,)}
    return [*one_row, *(("gated_delta", name, shape) for name, shape in others.items())]


@pytest.mark.parametrize(("rule", "name", "shape"), wrong_shapes())
@pytest.mark.parametrize("body", BODIES)
def test_one_row_for_three_and_other_heads_and_widths_are_refused(
    body: str, rule: str, name: str, shape: tuple[int, ...]
) -> None:
    step = Step(rule, B=3, tokens=1)
    (token,), state = step.draw()
    feeds = {**feed(token), STATE: as_array(state)}
    model = step.model(body)
    engine = engine_of(model)
    assert engine.run(None, feeds)[0].shape == (3, 4, 6)
    feeds[name] = np.zeros(shape, np.float32)
    # onnxruntime itself compares shapes with those of the graph, in which the batch is open.
    text = "reshape|Reshape|dimension|shape" if shape[0] == 1 else "Got invalid dim|Invalid rank"
    with pytest.raises(Exception, match=text):
        engine.run(None, feeds)
    if body == "standard":
        with pytest.raises(Exception, match="reshape"):
            ReferenceEvaluator(model).run(None, feeds)


def test_the_new_state_is_written_after_all_reads_of_the_old_one() -> None:
    """This makes one buffer for both safe."""
    for rule, body in itertools.product(RULES, ("standard", "ort")):
        model = Step(rule).model(body)
        nodes = [n for n in model.functions[0].node if n.op_type != "Shape"]
        made_by = {name: i for i, node in enumerate(nodes) for name in node.output}
        writer = made_by["new_state"]
        ancestors, waiting = {writer}, [writer]
        while waiting:
            for name in nodes[waiting.pop()].input:
                if name in made_by and made_by[name] not in ancestors:
                    ancestors.add(made_by[name])
                    waiting.append(made_by[name])
        readers = {i for i, n in enumerate(nodes) if "state" in n.input and n.op_type != "CastLike"}
        assert readers and readers <= ancestors, (rule, body)


@pytest.mark.parametrize("body", ["standard", "ort", WRITTEN_ONNX_BODY])
def test_a_float32_state_is_never_copied_by_a_cast(body: str) -> None:
    for state_dtype, casts in (("float32", []), ("float16", ["Cast", "CastLike"])):
        step = Step(state_dtype=state_dtype)
        for model in (step.model(body), step.prefill_model(body)):
            nodes = model.functions[0].node
            readers = [n.op_type for n in nodes if "state" in n.input and "Cast" in n.op_type]
            assert readers == casts
