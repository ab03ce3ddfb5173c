"""Define the commands of `gdn-ops`: each reads its arguments, calls the library and prints."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gdn_ops
from gdn_ops.bench import models, report, suite
from gdn_ops.bench import tune as tuning
from gdn_ops.bench.gpu import command as gpu_command
from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.verify import RefusedError
from gdn_ops.cli import bench_command, check_command, compile_command, export_command, info_command
from gdn_ops.cli.export_command import fail
from gdn_ops.demo import show
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.explain import device_status, runs_or_emulates_here
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.rules import FLOAT_DTYPES

app = typer.Typer(
    help="The gated delta rule: inspect, certify, measure and show the backends of gdn_ops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_LIMIT = 16384


def _names(text: str) -> tuple[str, ...]:
    """Split a comma-separated option into names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _without_none(text: str) -> tuple[str, ...]:
    return () if text == "none" else _names(text)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gdn_ops {gdn_ops.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Read the options before a command."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, threads, and what every backend can run here."""
    collected = info_command.collect()
    if as_json:
        print(json.dumps(collected, indent=2))
        return
    threads = collected["threads"]
    facts = [(name, version or "not installed") for name, version in collected["versions"].items()]
    facts += [("warning", text) for text in collected["warnings"]]
    if collected["driver"] is not None:
        facts.append(("driver", collected["driver"]))
    facts.append(("platform", collected["platform"]))
    facts += [(d["device"], f"{d['name']} {d['capability']}") for d in collected["devices"]]
    facts.append(("threads", f"{threads['torch']} of {threads['cores']} cores\n"))
    console = Console()
    for name, fact in facts:
        text = f"{name:<13} {escape(fact)}"
        console.print(text, highlight=False, soft_wrap=name == "warning")
    table = Table("backend", "version", "status", "can run", "check")
    certificates = {row["name"]: row["certificates"] for row in collected["backends"]}
    for backend in gdn_ops.list_backends():
        limits = info_command.limits_text(backend.limits)
        checks = "\n".join(map(": ".join, certificates[backend.name].items()))
        cells = (backend.name, backend.version or "-", backend.status, limits, checks or "-")
        table.add_row(*map(escape, cells))
    console.print(table)


def _checkable(name: str) -> list[str]:
    """Return the names of the backends to check, or exit with the reason why there is none."""
    if name != "all":
        try:
            backend = registry.get_backend(name)
        except SpecError as error:
            fail(str(error))
        if isinstance(backend, str):
            fail(f"backend {name!r} is not available: {backend}")
        if not runs_or_emulates_here(backend.limits):
            fail(f"backend {name!r} is not available: {device_status(backend.limits)}")
        return [name]
    return [i.name for i in gdn_ops.list_backends() if i.status == "available"]


@app.command()
def check(
    backend: Annotated[str, typer.Option(help='Name of a backend, or "all".')] = "all",
    seconds: Annotated[float, typer.Option(help="Time for each backend.", min=0.1)] = 60.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the same random calls.")] = None,
    device: Annotated[
        str, typer.Option(help="A torch device; the GPU without, where there is one.")
    ] = "",
) -> None:
    """Certify backends on this machine: random calls against the definition in float64."""
    if importlib.util.find_spec("hypothesis") is None:
        fail("check needs the testing extra: pip install 'gdn_ops[testing]'")
    try:
        torch.empty(0, dtype=torch.float32, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        fail(f"device {device!r} is not available: {str(error).splitlines()[0]}")
    console = Console()
    names = _checkable(backend)
    passed = [check_command.run(name, seconds, seed, device, console) for name in names]
    if not all(passed):
        raise typer.Exit(1)


@app.command()
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help='Named cases, "models", "decode", or "gpu"; the reference table without.'
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backends, comma-separated.")] = "",
    peer: Annotated[str | None, typer.Option(help='Peers, comma-separated, or "none".')] = None,
    what: Annotated[str, typer.Option(help="Measurements, comma-separated; all without.")] = "",
    threads: Annotated[int | None, typer.Option(help="Threads torch computes with.", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 7,
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and PNG.")] = None,
    tune: Annotated[str | None, typer.Option(help="Measure a backend's configurations.")] = None,
    seconds: Annotated[float, typer.Option(help='Time for "gpu".', min=1)] = gpu_command.SECONDS,
) -> None:
    """Measure backends against peers: checked, interleaved, in one process."""
    if dtype not in FLOAT_DTYPES:
        fail(f"unknown dtype {dtype!r}, known: {', '.join(FLOAT_DTYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if cases == ["gpu"]:
            peers = gpu_command.PEERS if peer is None else _without_none(peer)
            raise typer.Exit(gpu_command.show_run(_names(backend), peers, seconds, out, print))
        setting = Setting(dtype, device, repeats)
        if cases == ["decode"]:
            bench_command.run_decode(peer, setting, out)
            return
        if cases == ["models"]:
            result = models.run(_names(backend) or ("torch",), setting, print)
            report.publish(result, "models", out)
            return
        if tune is not None:
            for line in tuning.tune(tune, cases or [], setting):
                print(line, flush=True)
            return
        peers = ("transformers",) if peer is None else _without_none(peer)
        backends = _names(backend) or suite.default_backends()
        plan = suite.make_plan(cases or [], _names(what) or suite.WHAT, backends, peers, setting)
        bench_command.run_cases(plan, out)
    except RefusedError as error:
        fail(str(error), 1)
    except (ValueError, ModuleNotFoundError, gdn_ops.BackendUnsupportedError) as error:
        fail(str(error))


@app.command(name="compile")
def compile_(
    backend: Annotated[str, typer.Option(help="Name of a backend with kernels.")],
    cases: Annotated[
        list[str] | None, typer.Argument(help="Named cases of any op; all without.")
    ] = None,
    target: Annotated[str, typer.Option(help="GPUs, comma-separated; all without.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Also what is asked for beside the defaults.")
    ] = False,
    path: Annotated[Path | None, typer.Option("--json", help="A file for the table.")] = None,
) -> None:
    """Compile kernels for GPUs that this machine need not have, and judge the code."""
    try:
        passed = compile_command.run(
            backend, _names(target), cases or [], everything=everything, path=path
        )
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    if not passed:
        raise typer.Exit(1)


app.command()(export_command.export)


@app.command()
def demo(
    file: Annotated[
        Path | None,
        typer.Argument(help="A text; the one that ships without.", exists=True, dir_okay=False),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend for the reading.")] = "auto",
    limit: Annotated[int, typer.Option(help="Read at most so many bytes.")] = DEMO_LIMIT,
) -> None:
    """Read a text with an associative memory that was never trained, then continue it."""
    text = show.shipped_text() if file is None else file.read_bytes()
    try:
        show.run(text[:limit], Console(), backend)
    except (ValueError, gdn_ops.BackendUnsupportedError) as error:
        fail(str(error))
