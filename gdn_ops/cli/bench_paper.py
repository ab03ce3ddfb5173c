"""Read the arguments of `gdn-ops bench paper`, and show and write its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import (
    ALL,
    Options,
    Parser,
    add_command,
    integer,
    names,
    one_name,
    one_of,
    real,
)
from gdn_ops.terminal.output import print_json

if TYPE_CHECKING:
    from gdn_ops.bench.paper.plan import Plan
    from gdn_ops.bench.paper.results import PaperResult

DTYPES = ("float32", "bfloat16", "float16")


def add(below: Any, run: Callable[[Options], int]) -> Parser:
    """Add the command and return its parser."""
    parser = add_command(
        below,
        "paper",
        run,
        "Measure what the paper on Gated DeltaNet claims: speed, memory, latency.",
        more="One model with seven token mixers, checked first, then in turns: training and "
        "prefill by length, where the curves cross attention's, what is remembered of a text, a "
        "decoded token behind long texts, and energy where it is counted. The page on the paper's "
        "figures has the published numbers beside them.",
        examples=(
            "gdn-ops bench paper --out results",
            "gdn-ops bench paper --mixers gdn,attention --lengths 2048,8192 --minutes 5",
        ),
    )
    parser.add_argument(
        "--quick", action="store_true", help="a round of something small: it says nothing of speed"
    )
    parser.add_argument(
        "--minutes",
        type=real(0),
        metavar="MINUTES",
        help="no round is begun after them, but for a first one of everything (default: 25)",
    )
    parser.add_argument(
        "--mixers",
        type=names,
        metavar="NAMES",
        help="any of gdn, deltanet, mamba2, linear, attention, h1, h2, with commas (default: all)",
    )
    parser.add_argument(
        "--lengths",
        type=lengths,
        metavar="NUMBERS",
        help="tokens of a sequence, with commas (default: 1024,2048,4096,8192,16384)",
    )
    for option, text in (
        ("--tokens", "tokens of a batch, at every length (default: 16384)"),
        ("--width", "width of the models, a multiple of 128 (default: 256, on a GPU 1024)"),
    ):
        parser.add_argument(option, type=integer(1), metavar="NUMBER", help=text)
    parser.add_argument(
        "--backend", type=one_name, metavar="NAME", help="of the recurrent layers (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        type=one_of("dtype", DTYPES),
        metavar="DTYPE",
        help="of the models (default: float32, on a GPU bfloat16)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="a torch device (default: cpu)")
    return parser


def lengths(text: str) -> tuple[int, ...]:
    """Return the positive integers in a list with commas."""
    return tuple(integer(1)(word) for word in names(text, ()))


def plan_of(options: Options) -> Plan:
    """Return the plan that options ask for.

    Raises:
        SpecError: they are not possible.
    """
    from gdn_ops.bench.paper.plan import make_plan

    return make_plan(
        is_quick=options.quick,
        mixers=() if options.mixers in (None, ALL) else options.mixers,
        lengths=options.lengths or (),
        tokens=options.tokens,
        width=options.width,
        device="cpu" if options.device is None else options.device,
        dtype=options.dtype,
        minutes=options.minutes,
        backend=options.backend or "auto",
    )


def publish(result: PaperResult, options: Options) -> int:
    """Show a result, and write what is asked for; return the exit code."""
    from gdn_ops.bench import report
    from gdn_ops.bench.paper import figure, show
    from gdn_ops.bench.rows import write_json

    data = result.to_json()
    if options.json:
        print_json(data)
    else:
        print(show.text(data))
    written: list[Path | str] = []
    if options.out is not None:
        system = data["system"]
        to_write, plot = report.files(options.out, system["device"], system["dtype"], "paper")
        written += [write_json(data, to_write), *figure.draw(data, plot)]
    if options.plot is not None:
        written += figure.draw(data, options.plot)
    for file in written if not options.json else ():
        print(file)
    return exit_codes.DONE
