"""Run `gdn-ops plan`: predict what each split of a training step over devices takes, and choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import Options, Parser, UsageError, add_command, integer, one_of
from gdn_ops.parallel import planning
from gdn_ops.parallel.machines import DATED, LINKS, MACHINES, Machine
from gdn_ops.parallel.planning import MISSING, Model, Row
from gdn_ops.parallel.work import ELEMENTS
from gdn_ops.spec.language import Sizes
from gdn_ops.terminal.output import print_json
from gdn_ops.terminal.tables import table, wrapped


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plan",
        run,
        "Predict time, memory and exchange of a training step over many devices.",
        more="Every way to split it is a row: sequences by pipeline or gather, heads, data, and "
        "sequences together with data. The numbers are those of a model, not a measurement.",
        examples=(
            "gdn-ops plan --gpus 8 --tokens 131072",
            "gdn-ops plan --gpus 64 --tokens 1e6 --batch 8 --device h100",
        ),
    )
    parser.add_argument(
        "--gpus", type=count(1, 65536), required=True, metavar="N", help="devices, a rank on each"
    )
    parser.add_argument(
        "--tokens", type=count(1), required=True, metavar="T", help="tokens of a sequence"
    )
    _add_model(parser)
    _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_model(parser: Parser) -> None:
    for option, default, text in (
        ("--batch", 1, "sequences of a step"),
        ("--layers", 36, "layers"),
        ("--hidden", 2048, "width of the model"),
        ("--heads", 16, "key heads, H"),
        ("--value-heads", 32, "value heads, HV"),
        ("--head-dim", 128, "width of keys, K"),
    ):
        parser.add_argument(
            option, type=count(1), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--value-dim", type=count(1), metavar="N", help="width of values, V (default: K)"
    )
    parser.add_argument(
        "--mlp-size",
        type=integer(0),
        metavar="N",
        help="inner width of the SwiGLU, 0 for none (default: four times the width)",
    )
    parser.add_argument(
        "--dtype",
        type=one_of("dtype", ELEMENTS),
        default="bfloat16",
        metavar="DTYPE",
        help=f"one of {', '.join(ELEMENTS)} (default: bfloat16)",
    )
    parser.add_argument(
        "--checkpoint",
        action="store_true",
        help="keep the input of a layer only, and run its forward again in the backward",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="share parameters and Adam's moments out over all ranks, as FSDP2 does",
    )


def _add_machine(parser: Parser) -> None:
    parser.add_argument(
        "--device",
        type=one_of("device", MACHINES),
        default="h200",
        metavar="NAME",
        help=f"one of {', '.join(MACHINES)} (default: h200)",
    )
    parser.add_argument(
        "--link",
        type=one_of("link", LINKS),
        metavar="NAME",
        help=f"what connects the devices of a node: {', '.join(LINKS)} (default: the device's)",
    )


def count(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a type of argument: an integer within bounds, which may be written as 1e6."""
    inner = integer(least, most)

    def number(text: str) -> int:
        try:
            value = float(text)
        except ValueError:
            return inner(text)
        if value.is_integer() and abs(value) < 2**53:
            return inner(str(int(value)) if least <= value <= most else text)
        return inner(text)

    return number


def run(options: Options) -> int:
    """Predict and show; return the exit code.

    Raises:
        UsageError: value heads are no multiple of key heads.
    """
    if options.value_heads % options.heads:
        raise UsageError(
            f"--value-heads: is {options.value_heads}, should be a multiple of "
            f"--heads {options.heads}"
        )
    machine = MACHINES[options.device]
    if options.link is not None:
        machine = dataclasses.replace(machine, inside=LINKS[options.link])
    model = model_of(options)
    found = planning.rows(model, options.gpus, machine)
    if options.json:
        print_json(as_json(options, model, machine, found))
    else:
        show(options, model, machine, found)
    return exit_codes.DONE


def model_of(options: Options) -> Model:
    """Return the training step that options describe."""
    V = options.head_dim if options.value_dim is None else options.value_dim
    B = options.batch
    sizes = Sizes(B, options.tokens, options.heads, options.value_heads, options.head_dim, V, B)
    mlp = 4 * options.hidden if options.mlp_size is None else options.mlp_size
    return Model(
        sizes, options.layers, options.hidden, mlp, options.dtype, options.checkpoint, options.fsdp
    )


def show(options: Options, model: Model, machine: Machine, found: list[Row]) -> None:
    """Print a row for each split, then which one to take, then what the numbers rest on."""
    print(wrapped(f"{options.gpus} x {machine.name}: {described(model)}"), end="\n\n")
    able = [row for row in found if row.refusal is None]
    if able:
        head = ("split", "layer ms", "step s", "memory GB", "exchange GB", "efficiency", "op alone")
        print(table(head, [("", [cells(row, machine) for row in able])]), end="\n\n")
    texts = [f"{x.split}: not possible: {x.refusal}" for x in found if x.refusal is not None]
    if any(row.split.strategy in MISSING for row in able):
        texts.append("heads: what others do by two all-to-alls; gdn_ops does not have it.")
    for text in (*texts, advice(found, model, options.gpus, machine), *conditions(machine, model)):
        print(wrapped(text, indent="  "))


def described(model: Model) -> str:
    """Return a training step in words."""
    s = model.sizes
    return (
        f"{s.B} x {s.T} tokens; {model.layers} layers of width {model.hidden}, {s.H} key and "
        f"{s.HV} value heads, K={s.K}, V={s.V}, SwiGLU {model.mlp_size}, {model.dtype}; "
        f"{model.parameters / 1e9:.2f} billion parameters"
    )


def cells(row: Row, machine: Machine) -> list[str]:
    """Return a row of the table."""
    return [
        str(row.split),
        f"{1e3 * row.layer:.3g}",
        f"{row.step:.3g}",
        f"{row.memory / 1e9:.3g}{'' if row.memory <= machine.memory else ' (too much)'}",
        f"{row.exchanged / 1e9:.3g}",
        f"{100 * row.efficiency:.0f} %",
        f"{100 * row.op_efficiency:.0f} %",
    ]


def advice(found: list[Row], model: Model, ranks: int, machine: Machine) -> str:
    """Return which split to take, and why."""
    best = planning.choice(found, machine)
    if best is not None:
        return (
            f"Take {best.split}: of the splits that gdn_ops has and that fit in "
            f"{machine.memory / 1e9:.3g} GB, it has the shortest step, at "
            f"{100 * best.efficiency:.0f} % efficiency."
        )
    if all(row.refusal is not None or row.split.strategy in MISSING for row in found):
        return "Take none: no split that gdn_ops has is possible."
    for checkpoint, fsdp in ((True, False), (False, True), (True, True)):
        other = dataclasses.replace(model, checkpoint=checkpoint, fsdp=fsdp)
        fitting = planning.choice(planning.rows(other, ranks, machine), machine)
        if fitting is not None:
            names = " ".join(["--checkpoint"] * checkpoint + ["--fsdp"] * fsdp)
            return (
                f"Take none as it is: none fits in {machine.memory / 1e9:.3g} GB. With {names}, "
                f"{fitting.split} fits: {fitting.memory / 1e9:.3g} GB, {fitting.step:.3g} s a step."
            )
    return (
        f"Take none: none fits in {machine.memory / 1e9:.3g} GB, not even with --checkpoint and "
        "--fsdp. Take more devices, or shorter sequences."
    )


def conditions(machine: Machine, model: Model) -> list[str]:
    """Return the sentences that say what the numbers are, and what they rest on."""
    where = "shared out over all ranks" if model.fsdp else "on every rank"
    return [
        f"This is a model with the parameters of {DATED}, not a measurement: "
        "docs/parallel-plan.md says what it counts.",
        f"Each device: {machine.products[model.dtype] / 1e12:.3g} TFLOP/s, "
        f"{machine.bandwidth / 1e12:.3g} TB/s, {machine.memory / 1e9:.3g} GB; "
        f"{machine.devices} a node, {machine.inside.bandwidth / 1e9:.3g} GB/s inside, "
        f"{machine.between.bandwidth / 1e9:.3g} GB/s a device between nodes.",
        "Efficiency is the time of one device over the sum of all; exchanges of the op overlap "
        f"with nothing; parameters and Adam's moments are {where}.",
    ]


def as_json(options: Options, model: Model, machine: Machine, found: list[Row]) -> dict[str, Any]:
    """Return everything as plain data; seconds and bytes."""
    best = planning.choice(found, machine)
    rows = []
    for row in found:
        plain = dataclasses.asdict(row) | dataclasses.asdict(row.split) | {"split": str(row.split)}
        plain["fits"] = row.refusal is None and row.memory <= machine.memory
        plain["in_gdn_ops"] = row.split.strategy not in MISSING
        rows.append(plain)
    return {
        "schema": 1,
        "is_model": True,
        "date": DATED,
        "gpus": options.gpus,
        "device": options.device,
        "machine": dataclasses.asdict(machine),
        "model": dataclasses.asdict(model) | {"parameters": model.parameters},
        "rows": rows,
        "take": None if best is None else str(best.split),
        "why": advice(found, model, options.gpus, machine),
    }
