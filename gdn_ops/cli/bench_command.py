"""Run the benchmarks of `gdn-ops bench`, and show and write their results."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gdn_ops.bench.gpu import command as gpu
from gdn_ops.cli import ablation_command, bench_paper, exit_codes
from gdn_ops.cli.parser import (
    ALL,
    Options,
    Parser,
    UsageError,
    add_command,
    add_commands,
    integer,
    names,
    names_or_none,
    one_name,
    one_of,
    path,
    real,
    refuse_without_effect,
    some_of,
)
from gdn_ops.dispatch.registry import known_backends
from gdn_ops.environment.devices import check_device
from gdn_ops.spec.rules import FLOAT_DTYPES
from gdn_ops.terminal.output import check_file, check_folder, print_json
from gdn_ops.terminal.progress import progress

if TYPE_CHECKING:
    from gdn_ops.bench.inputs import Setting
    from gdn_ops.bench.rows import Result

DEFAULT = "cases"
"""The command that runs where `gdn-ops bench` is followed by none."""

KINDS = (DEFAULT, "models", "decode", "gpu", "paper", "ablation")
PLOTS = (".png", ".svg", ".pdf")
MOST_THREADS = 1024
REPEATS = 7

_TUNING = ("backend", "peer", "what", "out", "plot")


def with_default(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which the command after `bench` is named."""
    if list(arguments[:1]) != ["bench"] or arguments[1:2] in (["-h"], ["--help"]):
        return list(arguments)
    if arguments[1:] and arguments[1] in KINDS:
        return list(arguments)
    return ["bench", DEFAULT, *arguments[1:]]


def add_to(commands: Any) -> None:
    """Add the command and those below it."""
    bench: Parser = commands.add_parser(
        "bench",
        help="Measure backends against peers: checked, in turns, in one process.",
        description="Measure backends against peers: checked, in turns, in one process.\n\n"
        f"Without a command, `{DEFAULT}` runs: gdn-ops bench tiny is gdn-ops bench {DEFAULT} tiny.",
        epilog="examples:\n  gdn-ops bench\n  gdn-ops bench tiny --backend torch --peer none\n"
        "  gdn-ops bench decode --help\n",
    )
    bench.set_defaults(parser=bench)
    below = add_commands(bench)
    _add_cases(below)
    _add_models(below)
    _add_decode(below)
    _add_gpu(below)
    _add_paper(below)
    ablation_command.add_to(below)


def _add_results(parser: Parser, what: str = "for the result as JSON and PNG") -> None:
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help=f"a folder {what}; created if missing"
    )
    parser.add_argument(
        "--plot", type=path, metavar="FILE", help="draw the result: a .png, .svg or .pdf file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_repeats(parser: Parser) -> None:
    parser.add_argument(
        "--repeats",
        type=integer(1, 10**6),
        metavar="ROUNDS",
        help=f"timed rounds, in each of which every contender runs (default: {REPEATS})",
    )


def _add_threads(parser: Parser) -> None:
    parser.add_argument(
        "--threads",
        type=integer(1, MOST_THREADS),
        metavar="NUMBER",
        help="number of CPU threads (default: torch's choice)",
    )


def _add_cases(below: Any) -> None:
    parser = add_command(
        below,
        DEFAULT,
        _run_cases,
        "Measure named workloads, by default those of the reference table.",
        more="Whatever is timed is first compared with the definition on the same operands. "
        "The pages of the ops list the workloads; packed-8192x1 and packed-2048x4-8 are many short "
        "sequences packed in one row, compared with the same sequences as a padded batch.",
        examples=(
            "gdn-ops bench",
            "gdn-ops bench tiny olmo-hybrid-2048 --plot speed.png",
            "gdn-ops bench qwen-16-32-2048 --what forward --backend torch --threads 1",
            "gdn-ops bench packed-8192x1 --what packed --backend torch",
            "gdn-ops bench tiny --tune triton",
        ),
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of workloads")
    for name, kind, metavar, text in (
        (
            "--backend",
            names,
            "NAMES",
            'backends, with commas, or "all" (default: cpp,torch,compile)',
        ),
        (
            "--peer",
            names_or_none,
            "NAMES",
            'other libraries, with commas, or "none" (default: all)',
        ),
        ("--what", names, "NAMES", "measurements, with commas (default: all)"),
        (
            "--dtype",
            some_of("dtype", FLOAT_DTYPES),
            "NAMES",
            "dtypes of q, k and v, with commas (default: float32, for the reference table on a CPU "
            "also bfloat16)",
        ),
        ("--device", str, "DEVICE", "a torch device (default: cpu)"),
        ("--tune", one_name, "NAME", "time the configurations of this backend instead"),
    ):
        parser.add_argument(name, type=kind, metavar=metavar, help=text)
    _add_threads(parser)
    _add_repeats(parser)
    _add_results(parser)


def _add_models(below: Any) -> None:
    parser = add_command(
        below,
        "models",
        _run_models,
        "Measure a whole model of transformers, with its own delta rule and with ours.",
        more="One random Qwen3.5 on the CPU: prefill, decode, a training step and its memory, "
        "after logits and loss were compared.",
        examples=("gdn-ops bench models --backend torch,compile --plot models.png",),
    )
    parser.add_argument(
        "--backend",
        type=names,
        metavar="NAMES",
        help='backends, with commas, or "all" (default: cpp)',
    )
    parser.add_argument(
        "--dtype",
        type=one_of("dtype", ("float32", "bfloat16")),
        metavar="DTYPE",
        help="dtype of the model, float32 or bfloat16 (default: float32)",
    )
    _add_threads(parser)
    _add_repeats(parser)
    _add_results(parser, "for the result as JSON")


def _add_decode(below: Any) -> None:
    parser = add_command(
        below,
        "decode",
        _run_decode,
        "Measure a decode step in onnxruntime, in place and not, with one thread.",
        more="Against the steps of torch and compile, for states of 1 to 16 MiB. The floor is one "
        "pass over the state, read and written in place.",
        examples=("gdn-ops bench decode --repeats 3 --plot decode.svg",),
    )
    parser.add_argument(
        "--library",
        "--peer",
        dest="library",
        type=path,
        metavar="FILE",
        help="a custom-op library whose kernel is measured too",
    )
    _add_repeats(parser)
    _add_results(parser, "for the result as JSON")


def _add_gpu(below: Any) -> None:
    parser = add_command(
        below,
        "gpu",
        _run_gpu,
        "Measure our backends and other libraries on one GPU, unattended.",
        more="Sequences, packed sequences and steps, the most important row first; the result is "
        "written after every row. It ends within the time that is given.",
        examples=(
            "gdn-ops bench gpu",
            "gdn-ops bench gpu --backend triton,torch --peer fla --out results",
        ),
    )
    parser.add_argument(
        "--backend", type=names, metavar="NAMES", help="backends, with commas (default: all)"
    )
    parser.add_argument(
        "--peer",
        type=names_or_none,
        metavar="NAMES",
        help=f'any of {", ".join(gpu.PEERS)}, with commas, or "none" (default: all)',
    )
    parser.add_argument(
        "--seconds",
        type=real(1),
        metavar="SECONDS",
        default=gpu.SECONDS,
        help=f"time limit for the whole run (default: {gpu.SECONDS:g})",
    )
    _add_results(parser)


def _add_paper(below: Any) -> None:
    parser = bench_paper.add(below, _run_paper)
    _add_threads(parser)
    _add_results(parser)


def _prepare(options: Options, settings: Sequence[Setting] = (), kind: str = "") -> None:
    """Check what results are written to, and set the threads, before minutes are spent.

    Args:
        options: the parsed ones.
        settings: of the result; none where its files are not named after any.
        kind: of the result, as in `report.files`.
    """
    from gdn_ops.bench import report

    if options.plot is not None:
        if options.plot.suffix.lower() not in PLOTS:
            raise UsageError(
                f"--plot: {str(options.plot)!r} should end in {', '.join(PLOTS[:-1])} or "
                f"{PLOTS[-1]}"
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--plot needs the cli extra: pip install 'gdn_ops[cli]'")
    check_folder("--out", options.out)
    check_file("--plot", options.plot)
    if options.out is not None and settings:
        dtypes = ",".join(setting.dtype for setting in settings)
        for file in report.files(options.out, settings[0].device, dtypes, kind):
            check_file("--out", file)
    if getattr(options, "threads", None) is not None:
        torch.set_num_threads(options.threads)


def _publish(result: Result, options: Options, kind: str = "") -> int:
    """Show a result, and write what is asked for; return the exit code."""
    from gdn_ops.bench import report

    if options.json:
        print_json(result.to_json())
    else:
        print(report.text(result))
    written: list[Path | str] = []
    if options.out is not None:
        written += report.write(result, options.out, kind)
    if options.plot is not None:
        written += report.write_plot(result, options.plot)
    for file in written if not options.json else ():
        print(file)
    return exit_codes.DONE


def _run_cases(options: Options) -> int:
    from gdn_ops.bench import suite
    from gdn_ops.bench.inputs import Setting

    for name in options.cases:
        if name in KINDS:
            raise UsageError(
                f"{name!r} is a command of its own and stands first: gdn-ops bench {name}"
            )
        if name in known_backends():
            raise UsageError(f"{name!r} is a backend, not a case: --backend {name}")
    device = "cpu" if options.device is None else options.device
    check_device(device)
    is_reference = not options.cases and device == "cpu"
    dtypes = options.dtype or (("float32", "bfloat16") if is_reference else ("float32",))
    settings = [Setting(dtype, device, options.repeats or REPEATS) for dtype in dtypes]
    if options.tune is not None:
        refuse_without_effect(options, _TUNING, "with --tune")
        return _tune(options, settings)
    what = suite.WHAT if options.what in (None, ALL) else options.what
    plan = suite.make_plan(
        options.cases,
        what,
        suite.every_backend(device)
        if options.backend == ALL
        else options.backend or suite.default_backends(),
        suite.default_peers(device) if options.peer in (None, ALL) else options.peer,
        *settings,
    )
    for name, uses in suite.USES.items():
        if not set(uses) & set(what):
            refuse_without_effect(options, [name], f"on {', '.join(what)}")
    if options.what not in (None, ALL):
        suite.check_effect(options.cases, what)
    _prepare(options, settings)
    # A thread that refreshes it would disturb what is timed.
    with progress(plan.count() + 1, "starting", is_quiet=True) as log:
        result = suite.run(plan, log)
    if not result.rows:
        reasons = "; ".join(f"{name} ({what}): {why}" for what, name, why in result.skipped)
        raise UsageError(f"nothing was measured: {reasons}")
    return _publish(result, options)


def _tune(options: Options, settings: Sequence[Setting]) -> int:
    from gdn_ops.bench import tune

    setting, *others = settings
    if others and options.dtype is not None:
        raise UsageError("--dtype should be one dtype with --tune")
    _prepare(options)
    lines, measured = [], tune.tune(options.tune, options.cases, setting)
    with progress(None, f"configurations of {options.tune}", is_quiet=True) as log:
        for line in measured:
            lines.append(line)
            log(line)
            if not options.json:
                print(line, flush=True)
    if options.json:
        print_json({"schema": 1, "backend": options.tune, "lines": lines})
    return exit_codes.DONE


def _run_models(options: Options) -> int:
    from gdn_ops.bench import models, suite
    from gdn_ops.bench.inputs import Setting

    every = options.backend == ALL
    backends = suite.every_backend("cpu") if every else options.backend or ("cpp",)
    models.check(backends)
    setting = Setting(options.dtype or "float32", repeats=options.repeats or REPEATS)
    _prepare(options, [setting], "models")
    with progress(models.STAGES, "starting", is_quiet=True) as log:
        result = models.run(backends, setting, log)
    return _publish(result, options, "models")


def _run_decode(options: Options) -> int:
    from gdn_ops.bench import decode
    from gdn_ops.bench.inputs import Setting

    library = None if options.library is None else str(options.library)
    if library is not None and not options.library.is_file():
        raise UsageError(f"--library: {library!r} should be an existing file")
    setting = Setting(repeats=options.repeats or REPEATS)
    _prepare(options, [setting], "decode")
    with progress(len(decode.SHAPES), "starting", is_quiet=True) as log:
        result = decode.run(setting, library, log)
    if not options.json:
        print(f"onnxruntime {result.system['versions']['onnxruntime']}, one thread")
    return _publish(result, options, "decode")


def _run_gpu(options: Options) -> int:
    backends = () if options.backend in (None, ALL) else options.backend
    peers = gpu.PEERS if options.peer in (None, ALL) else options.peer
    # Refuse mistakes in them before a folder is made.
    gpu.make_plan(backends, peers, options.seconds)
    gpu.system(options.seconds)
    _prepare(options)
    return gpu.show_run(
        backends,
        peers,
        options.seconds,
        options.out,
        plot=options.plot,
        as_json=options.json,
    )


def _run_paper(options: Options) -> int:
    plan = bench_paper.plan_of(options)
    _prepare(options, [plan.setting], "paper")
    from gdn_ops.bench.paper import suite
    from gdn_ops.bench.paper.plan import STAGES

    with progress(len(STAGES), "starting", is_quiet=True) as log:
        result = suite.run(plan, log)
    return bench_paper.publish(result, options)
