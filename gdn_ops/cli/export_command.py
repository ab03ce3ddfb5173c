"""Run `gdn-ops export`: write, check and run a model of one node, or inspect a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from gdn_ops.spec.errors import BackendUnsupportedError, SpecError

if TYPE_CHECKING:
    from onnx import ModelProto

    from gdn_ops.export.runtime.comparison import Comparison


def fail(message: str, code: int = 2) -> NoReturn:
    """End a command with a reason and an exit code."""
    print(f"gdn-ops: {message}", file=sys.stderr)
    raise typer.Exit(code)


def export(
    heads: Annotated[int | None, typer.Option(help="H, query/key heads.")] = None,
    value_heads: Annotated[int | None, typer.Option(help="HV; H without.")] = None,
    key_dim: Annotated[int | None, typer.Option(help="K, key and query width.")] = None,
    value_dim: Annotated[int | None, typer.Option(help="V, value width; K without.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write.", dir_okay=False)] = None,
    inspect: Annotated[
        Path | None, typer.Option(help="Show what a file holds instead.", dir_okay=False)
    ] = None,
    rule: Annotated[str, typer.Option(help="Member of the family.")] = "gated_delta",
    scale: Annotated[float | None, typer.Option(help="Factor on q; K ** -0.5 without.")] = None,
    qk_l2norm: Annotated[bool, typer.Option("--qk-l2norm", help="Normalise q and k.")] = False,
    dtype: Annotated[str, typer.Option(help="Of q, k, v and o.")] = "float32",
    state_dtype: Annotated[
        str | None, typer.Option(help="Of the state; float32 without, float64 for float64.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="Of ai.onnx; 21 without, or the oldest that the body has.")
    ] = None,
    body: Annotated[str, typer.Option(help='standard, ort, onnx, or "none".')] = "standard",
    prefill: Annotated[bool, typer.Option("--prefill", help="Read T tokens, not one.")] = False,
) -> None:
    """Write the op as an ONNX model, checked and run against the definition; or inspect a file."""
    try:
        if inspect is not None:
            _inspect(inspect)
            return
        if heads is None or key_dim is None or out is None:
            fail("export needs --heads, --key-dim and --out, or --inspect FILE")
        from gdn_ops.export import make_decode_model, make_prefill_model
        from gdn_ops.export.bodies.body import DEFAULT_OPSET
        from gdn_ops.export.bodies.table import BODIES

        if opset is None:
            opset = BODIES[body].opset if body in BODIES else DEFAULT_OPSET
        model = (make_prefill_model if prefill else make_decode_model)(
            num_qk_heads=heads,
            num_v_heads=value_heads or heads,
            head_k_dim=key_dim,
            head_v_dim=value_dim or key_dim,
            dtype=dtype,
            state_dtype=state_dtype,
            rule=rule,
            scale=scale,
            qk_l2norm=qk_l2norm,
            opset=opset,
            body=None if body == "none" else body,
        )
        _write(model, out)
        comparisons = _run_bodies(out)
    except (SpecError, BackendUnsupportedError, ModuleNotFoundError) as error:
        fail(str(error))
    if not all(c.passed for c in comparisons):
        fail("the numbers are wrong", 1)


def _write(model: ModelProto, path: Path) -> None:
    """Check a model and write it."""
    import onnx

    from gdn_ops.export.model.nodes import check_model

    check_model(model)
    onnx.save(model, path)
    typer.echo(
        f"{path}: {path.stat().st_size} bytes, passes the full checker and strict shape inference"
    )


def _run_bodies(path: Path) -> list[Comparison]:
    """Run a model with every body that onnxruntime has and the model allows."""
    import onnx

    from gdn_ops.export import available_bodies, bodies_of
    from gdn_ops.export.runtime.comparison import compare
    from gdn_ops.export.runtime.sessions import why_not

    model, comparisons = onnx.load(path), []
    for body in bodies_of(model):
        if body not in available_bodies():
            typer.echo(f"left out: {why_not(body)}")
    for body in available_bodies():
        try:
            comparisons.append(compare(model, body))
        except SpecError as error:
            typer.echo(f"left out: body {body}: {error}")
    table = Table("body", "error of o", "allowed", "error of state", "allowed", "")
    for c in comparisons:
        verdict = "[green]pass[/green]" if c.passed else "[red]FAIL[/red]"
        numbers = (c.o, c.allowed_o, c.state, c.allowed_state)
        table.add_row(c.body, *(f"{number:.2g}" for number in numbers), verdict)
    typer.echo("against the definition in float64, over 64 tokens:")
    Console().print(table)
    return comparisons


def _inspect(path: Path) -> None:
    """Print the nodes, bodies and states of a file."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from gdn_ops.export import bodies_of, nodes_of, states_of

    if not path.is_file():
        fail(f"{str(path)!r} is no file")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        fail(f"{str(path)!r} is no ONNX model")
    imports = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    typer.echo(f"imports  {imports}")
    bodies = ", ".join(bodies_of(model)) or "none: a custom-op library must bring the kernel"
    typer.echo(f"body     {bodies}")
    for node in nodes_of(model):
        norm = ", qk_l2norm" if node.variant.qk_l2norm else ""
        typer.echo(
            f"node     {node.variant.operator} {node.proto.name}: H={node.num_qk_heads} "
            f"HV={node.num_v_heads}, rule {node.variant.rule}, scale {node.scale:.6g}{norm}, "
            f"reads {node.state}"
        )
    for old, new in states_of(model).items():
        typer.echo(f"state    {old} -> {new}")
