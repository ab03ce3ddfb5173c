"""Run `gdn-ops export`: write, check and run a model, whole or of one node; or inspect a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn_ops.cli import exit_codes
from gdn_ops.cli.export_model import run_model
from gdn_ops.cli.parser import (
    Options,
    Parser,
    UsageError,
    add_command,
    integer,
    one_of,
    path,
    real,
    refuse_without_effect,
)
from gdn_ops.environment.files import whole
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.ops import RULES
from gdn_ops.spec.rules import FLOAT_DTYPES, WIDTHS
from gdn_ops.terminal.output import check_file, print_json
from gdn_ops.terminal.progress import Advance, progress
from gdn_ops.terminal.tables import table, wrapped

if TYPE_CHECKING:
    from onnx import ModelProto

    from gdn_ops.export.runtime.comparison import Comparison

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""

TOKENS = 64
"""Tokens over which bodies are compared with the definition."""

WRITING = (
    *("heads", "value_heads", "key_dim", "value_dim", "out", "rule", "scale", "qk_l2norm"),
    *("decay", "dtype", "state_dtype", "opset", "body", "prefill"),
)
"""Options that say what is written."""

NO_BODY = "none"

DECAYS = tuple(width for width in WIDTHS if width != "none")

FLAVOURS = ("portable", "onnxruntime")
WEIGHTS = ("float32", "int8", "int4")
"""List what `export_model` takes; a test compares them, since importing it takes seconds."""

MODEL = ("model", "flavour", "weights")
"""Options that say how a language model is written."""


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "export",
        run,
        "Write a language model or a decode step as ONNX, checked; or inspect a file.",
        more="A step passes onnx's full checker, and every function body that the installed "
        "onnxruntime runs is compared with the definition in float64. A language model is read "
        "from a folder of transformers, and its logits are compared with those of the graph.",
        examples=(
            "gdn-ops export --model Qwen3.5-0.8B --out exported --flavour onnxruntime",
            "gdn-ops export --heads 16 --value-heads 32 --key-dim 128 --out step.onnx",
            "gdn-ops export --inspect step.onnx",
        ),
    )
    _add_values(parser)
    parser.add_argument("--qk-l2norm", action="store_true", help="L2-normalise q and k per head")
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="export a prefill of T tokens instead of a one-token step",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_values(parser: Parser) -> None:
    """Add the options that have a value."""
    size, dtype = integer(1), one_of("dtype", FLOAT_DTYPES)
    rule = one_of("rule", [r.name for r in RULES])
    for name, kind, metavar, text in (
        ("--heads", size, "H", "query and key heads"),
        ("--value-heads", size, "HV", "value heads, a multiple of H (default: H)"),
        ("--key-dim", size, "K", "width of keys and queries"),
        ("--value-dim", size, "V", "width of values (default: K)"),
        ("--out", path, "PATH", "the file, or with --model the folder, to write"),
        ("--model", path, "DIR", "a folder of transformers: export the whole language model"),
        (
            "--flavour",
            one_of("flavour", FLAVOURS),
            "FLAVOUR",
            "with --model: portable, or onnxruntime for its own operators (default: portable)",
        ),
        (
            "--weights",
            one_of("weights", WEIGHTS),
            "DTYPE",
            "with --model: float32, int8 or int4 (default: float32)",
        ),
        ("--inspect", path, "FILE", "show the nodes, body and states of a file instead"),
        ("--rule", rule, "RULE", f"one of {', '.join(r.name for r in RULES)} (default: the first)"),
        (
            "--decay",
            one_of("decay", DECAYS),
            "WIDTH",
            "scalar for a decay of each head, channel for one of each key channel "
            "(default: scalar)",
        ),
        ("--scale", real(), "NUMBER", "factor on q (default: 1 over the square root of K)"),
        ("--dtype", dtype, "DTYPE", "dtype of q, k, v and o (default: float32)"),
        ("--state-dtype", dtype, "DTYPE", "dtype of the state (default: float32; float64 if q is)"),
        (
            "--opset",
            integer(1),
            "NUMBER",
            "opset of ai.onnx (default: 21, or the oldest the body allows)",
        ),
        (
            "--body",
            str,
            "BODY",
            'standard, ort, onnx, or "none" for no function (default: standard)',
        ),
    ):
        parser.add_argument(name, type=kind, metavar=metavar, help=text)


def run(options: Options) -> int:
    """Write a model and judge it, or inspect a file; return the exit code."""
    if options.inspect is not None:
        refuse_without_effect(options, (*WRITING, *MODEL), "with --inspect")
        inspect(options.inspect, as_json=options.json)
        return exit_codes.DONE
    if options.model is not None:
        single = [name for name in WRITING if name != "out"]
        refuse_without_effect(options, single, "with --model")
        return run_model(options)
    refuse_without_effect(options, MODEL, "without --model")
    missing = [
        f"--{name.replace('_', '-')}"
        for name in ("heads", "key_dim", "out")
        if getattr(options, name) is None
    ]
    if missing:
        raise UsageError(
            f"export needs --heads, --key-dim and --out, --model and --out, or --inspect FILE: "
            f"{', '.join(missing)} missing"
        )
    check_file("--out", options.out)
    with progress(None, "onnx") as advance:
        model = make(options)
        advance("checks")
        check(model)
        # A model that could not be run is not left behind.
        with whole(options.out) as file:
            file.write_bytes(model.SerializeToString())
            comparisons, left_out = judge(file, advance)
    size = options.out.stat().st_size
    if options.json:
        rows = [{**asdict(c), "passed": c.passed} for c in comparisons]
        head = {"schema": SCHEMA, "path": str(options.out), "bytes": size, "tokens": TOKENS}
        print_json({**head, "comparisons": rows, "left_out": left_out})
    else:
        show(options.out, size, comparisons, left_out)
    if not all(c.passed for c in comparisons):
        raise UsageError("the numbers are wrong", exit_codes.WRONG)
    return exit_codes.DONE


def make(options: Options) -> ModelProto:
    """Return the model that options describe.

    Raises:
        SpecError: a value is not allowed.
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    from gdn_ops.export import make_decode_model, make_prefill_model
    from gdn_ops.export.bodies.body import DEFAULT_OPSET
    from gdn_ops.export.bodies.table import BODIES
    from gdn_ops.export.runtime.sessions import onnxruntime
    from gdn_ops.spec.names import unknown

    onnxruntime()
    body = "standard" if options.body is None else options.body
    if body not in (*BODIES, NO_BODY):
        raise UsageError(unknown("body", body, (*BODIES, NO_BODY)))
    opset = options.opset
    if opset is None:
        opset = BODIES[body].opset if body in BODIES else DEFAULT_OPSET
    return (make_prefill_model if options.prefill else make_decode_model)(
        num_qk_heads=options.heads,
        num_v_heads=options.value_heads or options.heads,
        head_k_dim=options.key_dim,
        head_v_dim=options.value_dim or options.key_dim,
        dtype=options.dtype or "float32",
        state_dtype=options.state_dtype,
        rule=options.rule or RULES[0].name,
        decay=options.decay or DECAYS[0],
        scale=options.scale,
        qk_l2norm=options.qk_l2norm,
        opset=opset,
        body=None if body == NO_BODY else body,
    )


def check(model: ModelProto) -> None:
    """Run onnx's checks.

    Raises:
        SpecError: the model is invalid.
    """
    from gdn_ops.export.model.nodes import check_model

    # Its errors have no common base but Exception.
    try:
        check_model(model)
    except Exception as error:
        raise SpecError(f"onnx does not take the model: {error}") from error


def judge(where: Path, advance: Advance) -> tuple[list[Comparison], list[str]]:
    """Run a file with every body that onnxruntime has and the model allows.

    Returns:
        The comparisons, and what was left out with the reason.
    """
    from gdn_ops.export import available_bodies, bodies_of, load_model
    from gdn_ops.export.runtime.comparison import compare
    from gdn_ops.export.runtime.sessions import why_not

    model, comparisons = load_model(where), []
    left_out = [why_not(body) for body in bodies_of(model) if body not in available_bodies()]
    for body in available_bodies():
        advance(f"body {body}")
        try:
            comparisons.append(compare(model, body, tokens=TOKENS))
        except SpecError as error:
            left_out.append(f"body {body}: {error}")
    return comparisons, left_out


def show(where: Path, size: int, comparisons: list[Comparison], left_out: list[str]) -> None:
    """Print what was written, and the errors of every body beside what is allowed."""
    print(where)
    print(wrapped(f"{size} bytes, passes the full checker and strict shape inference"))
    for text in left_out:
        print(wrapped(f"left out: {text}", indent="  "))
    rows = [
        (c.body, *(f"{x:.2g}" for x in (c.o, c.allowed_o, c.state, c.allowed_state)), verdict(c))
        for c in comparisons
    ]
    head = ("body", "error of o", "allowed", "error of state", "allowed", "")
    print(wrapped(f"against the definition in float64, over {TOKENS} tokens:"))
    print(table(head, [("", rows)]))


def verdict(comparison: Comparison) -> str:
    """Return a word: whether a comparison passed."""
    return "pass" if comparison.passed else "FAIL"


def inspect(where: Path, *, as_json: bool) -> None:
    """Print the imports, bodies, nodes and states of a file.

    Raises:
        SpecError: it is no model of ours.
        ModuleNotFoundError: onnx is not installed.
    """
    from gdn_ops.export import bodies_of, load_model, nodes_of, states_of
    from gdn_ops.export.model.files import about_file

    model = load_model(where, label="--inspect")
    with about_file(where):
        bodies, nodes, states = bodies_of(model), nodes_of(model), states_of(model)
    imports = {o.domain or "ai.onnx": int(o.version) for o in model.opset_import}
    if as_json:
        rows = [
            {
                "operator": str(node.variant.operator),
                "name": str(node.proto.name),
                "H": node.num_qk_heads,
                "HV": node.num_v_heads,
                "rule": node.variant.rule,
                "decay": node.variant.decay,
                "scale": node.scale,
                "qk_l2norm": node.variant.qk_l2norm,
                "state": node.state,
            }
            for node in nodes
        ]
        head = {"schema": SCHEMA, "path": str(where), "imports": imports, "bodies": list(bodies)}
        print_json({**head, "nodes": rows, "states": states})
        return
    lines = [f"imports  {', '.join(f'{name} {number}' for name, number in imports.items())}"]
    lines.append(f"body     {', '.join(bodies) or 'none: a custom-op library brings the kernel'}")
    for node in nodes:
        norm = ", qk_l2norm" if node.variant.qk_l2norm else ""
        decay = ", a decay of each key channel" if node.variant.decay == "channel" else ""
        lines.append(
            f"node     {node.variant.operator} {node.proto.name}: H={node.num_qk_heads} "
            f"HV={node.num_v_heads}, rule {node.variant.rule}{decay}, "
            f"scale {node.scale:.6g}{norm}, reads {node.state}"
        )
    lines += [f"state    {old} -> {new}" for old, new in states.items()]
    print("\n".join(wrapped(line, indent=" " * 9) for line in lines))
