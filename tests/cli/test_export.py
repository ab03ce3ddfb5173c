"""`gdn-ops export` writes, judges and shows; `gdn-ops bench decode` checks before it times."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from command_line import run  # noqa: E402
from gdn_ops import export  # noqa: E402
from gdn_ops.bench import decode  # noqa: E402
from gdn_ops.bench.inputs import Setting  # noqa: E402
from gdn_ops.bench.rows import Result  # noqa: E402
from gdn_ops.bench.verify import RefusedError  # noqa: E402
from gdn_ops.export.runtime import comparison, sessions  # noqa: E402
from onnx_needs import at_opset, needs_onnx_body, needs_ort_body  # noqa: E402
from onnx_steps import STATE, Step  # noqa: E402

SIZES = ("--heads", 2, "--value-heads", 4, "--key-dim", 16, "--value-dim", 8)


def write(path: Path, *options: object) -> str:
    """Write a model, which should go well, and return what is printed."""
    result = run("export", *SIZES, "--out", path, *options)
    assert result.exit_code == 0, result.output
    return str(result.output)


def test_export_writes_a_checked_file_and_prints_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    exported = write(path, "--qk-l2norm", "--scale", 0.3)
    assert f"{path.stat().st_size} bytes, passes the full checker" in exported
    rows = re.findall(r"(?m)^(standard|ort|onnx) +(\S+) +(\S+) +(\S+) +(\S+) +pass$", exported)
    assert tuple(row[0] for row in rows) == export.available_bodies()
    for _, o, allowed_o, state, allowed_state in rows:
        assert 0 < float(o) <= float(allowed_o) < 1e-6
        assert 0 < float(state) <= float(allowed_state) < 1e-6
    (node,) = export.nodes_of(onnx.load(path))
    assert (node.num_qk_heads, node.num_v_heads, node.variant.qk_l2norm) == (2, 4, True)
    assert node.scale == pytest.approx(0.3)


@needs_onnx_body
@pytest.mark.parametrize("options", [(), at_opset(("--opset", 28), opset=28), ("--prefill",)])
def test_export_writes_the_onnx_body_at_an_opset_that_has_it(
    options: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "step.onnx"
    exported = write(path, "--body", "onnx", *options)
    assert len(re.findall(r"(?m)  pass$", exported)) == len(export.available_bodies())
    model = onnx.load(path)
    assert export.bodies_of(model) == ("onnx",)
    assert model.opset_import[0].version == (28 if "--opset" in options else 27)
    lines = run("export", "--inspect", path).output.splitlines()
    assert lines[0].startswith(f"imports  ai.onnx {model.opset_import[0].version}, gdn_ops 1")
    assert lines[1] == "body     onnx"


def test_export_says_why_the_body_that_it_wrote_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "available_bodies", lambda: ("standard",))
    monkeypatch.setattr(sessions, "available_bodies", lambda: ("standard",))
    monkeypatch.setattr(ort, "__version__", "1.24.4")
    path = tmp_path / "step.onnx"
    assert (
        "left out: body 'ort' needs com.microsoft::LinearAttention, which onnxruntime has from "
        "1.25 on; this is onnxruntime 1.24.4\n"
    ) in write(path, "--body", "ort")
    assert export.bodies_of(onnx.load(path)) == ("ort",)


def test_export_writes_a_prompt_reader_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "prefill.onnx"
    exported = write(path, "--prefill", "--dtype", "float64")
    (node,) = export.nodes_of(onnx.load(path))
    assert node.proto.op_type == "GatedDelta"
    if "ort" in export.available_bodies():
        assert "left out: body ort: gdn_ops::GatedDelta: the state is float64" in exported


def test_export_writes_a_decay_of_every_key_channel(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    exported = write(path, "--decay", "channel", "--rule", "gated")
    assert len(re.findall(r"(?m)  pass$", exported)) == len(export.available_bodies())
    (node,) = export.nodes_of(onnx.load(path))
    assert (node.variant.decay, node.variant.rule) == ("channel", "gated")
    result = run("export", "--inspect", path)
    line = "HV=4, rule gated, a decay of each key channel, scale 0.25"
    assert line in " ".join(result.output.split())
    (described,) = json.loads(run("export", "--inspect", path, "--json").output)["nodes"]
    assert described["decay"] == "channel"


def test_inspect_lists_nodes_bodies_and_states(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    step = Step("delta", HV=6, K=4, V=4)
    onnx.save(step.model("ort"), path)
    result = run("export", "--inspect", path)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "imports  ai.onnx 21, gdn_ops 1, com.microsoft 1",
        "body     ort",
        "node     gdn_ops::GatedDeltaStep GatedDeltaStep: H=2 HV=6, rule delta, scale 0.5, "
        "reads past_key_values.0.recurrent_state",
        "state    past_key_values.0.recurrent_state -> present.0.recurrent_state",
    ]
    onnx.save(step.model(None), path)
    assert (
        "body     none: a custom-op library brings the kernel"
        in run("export", "--inspect", path).output
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            (),
            "gdn-ops: export needs --heads, --key-dim and --out, --model and --out, or "
            "--inspect FILE: --heads, "
            "--key-dim, --out missing\n",
        ),
        (
            ("--heads", 3, "--value-heads", 4, "--key-dim", 8, "--out", "x.onnx"),
            "gdn-ops: gdn_ops::GatedDeltaStep: num_v_heads is 4, should be a multiple of "
            "num_qk_heads=3\n",
        ),
        (
            ("--heads", 2, "--key-dim", 8, "--out", "x.onnx", "--body", "onnx", "--opset", 21),
            "gdn-ops: gdn_ops::GatedDeltaStep: the model has opset 21, body 'onnx' should have 27 "
            "or newer; export with opset=27, or take body='standard'\n",
        ),
        (
            (
                "--heads",
                2,
                "--key-dim",
                8,
                "--out",
                "x.onnx",
                "--rule",
                "delta",
                "--decay",
                "channel",
            ),
            "gdn-ops: gdn_ops::GatedDeltaStep: decay is 'channel', should be left out: rule "
            "'delta' has no decay\n",
        ),
        (
            ("--inspect", "no-such.onnx"),
            "gdn-ops: --inspect is 'no-such.onnx', should be an existing file\n",
        ),
        (
            ("--inspect", __file__),
            f"gdn-ops: --inspect is {__file__!r}, a text, should be an ONNX file\n",
        ),
        (
            ("--inspect", "x.onnx", "--heads", 3, "--qk-l2norm"),
            "gdn-ops: --heads, --qk-l2norm have no effect with --inspect: leave them out\n",
        ),
    ],
)
def test_a_wrong_command_ends_with_two_and_the_reason(
    arguments: tuple[object, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", *arguments)
    assert result.exit_code == 2
    assert result.stderr == text
    assert not list(tmp_path.iterdir())


def break_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every session return an o that is off by one part in a thousand."""
    right = comparison._decode

    def wrong(*arguments: Any) -> Any:
        o, state = right(*arguments)
        return o * np.float32(1.001), state

    monkeypatch.setattr(comparison, "_decode", wrong)


def test_wrong_numbers_end_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_bodies(monkeypatch)
    result = run("export", *SIZES, "--out", tmp_path / "step.onnx")
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert result.stderr == "gdn-ops: the numbers are wrong\n"


def test_export_without_onnxruntime_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.available_bodies.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("export", *SIZES, "--out", tmp_path / "step.onnx")
    export.available_bodies.cache_clear()
    assert result.exit_code == 2
    assert result.stderr == (
        "gdn-ops: DecodeSession needs onnxruntime: pip install 'gdn_ops[onnx]'\n"
    )


def small(setting: Setting) -> Result:
    return decode.run(setting, shapes=((1, 2),), width=16)


@pytest.mark.filterwarnings("ignore")
def test_bench_decode_times_every_way_and_judges_it() -> None:
    result = small(Setting(repeats=1))
    rows = {row.comparator: row for row in result.rows}
    assert set(rows) >= {"floor", "standard in place", "torch", "compile", "torch in place"}
    assert all(row.median > 0 for row in rows.values() if row.against == "floor")
    assert {check.comparator for check in result.checks} >= {"standard"}
    if "ort" not in export.available_bodies():
        return
    judged = {name: row.target for name, row in rows.items() if row.target}
    assert judged == {
        "ort, bare / floor": "<= 4x",
        "standard in place / ort": ">= 3x",
        "torch / ort": ">= 3x",
        "compile / ort": ">= 2x",
        "cost of guards": "<= 15 us",
        "step() adds, own buffers": "<= 25 us",
        "step() adds, token copied in": "<= 25 us",
    }
    own, bare, floor = (rows[name] for name in ("ort in place", "ort in place, bare", "floor"))
    assert rows["ort, bare / floor"].median == pytest.approx(bare.median / floor.median)
    assert rows["torch / ort"].median == pytest.approx(rows["torch"].median / own.median)
    added = rows["step() adds, token copied in"]
    assert 0 < added.best <= added.median < own.median
    guards = rows["ort in place, bare, no guards"]
    assert rows["cost of guards"].best == pytest.approx(bare.best - guards.best)
    assert json.dumps(result.to_json())


def test_bench_decode_refuses_a_body_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_bodies(monkeypatch)
    text = r"^standard on 0\.00195 MiB, B=1 H=2: o off by 0\.001, above"
    with pytest.raises(RefusedError, match=text):
        small(Setting(repeats=1))


def test_bench_decode_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = mock.Mock(return_value=decode.run(Setting(repeats=1), shapes=()))
    monkeypatch.setattr(decode, "run", command)
    library = tmp_path / "lib.so"
    library.touch()
    result = run("bench", "decode", "--library", library, "--repeats", 3, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    command.assert_called_once_with(Setting(repeats=3), str(library), mock.ANY)
    assert f"onnxruntime {ort.__version__}, one thread\n" in result.output
    written = json.loads((tmp_path / "decode-cpu-float32.json").read_text())
    assert written["system"]["dtype"] == "float32"


@needs_ort_body
def test_the_form_without_guards_computes_the_same() -> None:
    model = Step(HV=2, V=8).model("ort")
    feeds = comparison._draw(model, 1, 1)
    state = feeds.pop("state").numpy()
    arrays = {name: x.squeeze(1).numpy() for name, x in feeds.items()}
    arrays[STATE] = state
    results = [
        ort.InferenceSession(m.SerializeToString()).run(None, arrays)
        for m in (model, decode.unguarded(model))
    ]
    for x, y in zip(*results, strict=True):
        assert np.array_equal(x, y)
