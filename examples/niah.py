"""Needle in a haystack in miniature, and two tasks that separate the rules. Minutes on a CPU.

    python examples/niah.py                              (4 rules, 3 seeds)
    python examples/niah.py --lessons 9 --steps 9 --seeds 1  (to see it run)

One layer, about 23 thousand parameters, first taught plain recall: 8 pairs, asked for each. Copies
of it go on to the three needle tasks together, to overwrite and to switch. Needles are taught at
one length and looked for at longer ones. Every rule sees the same data, learning rate and steps.

needle 1   repeated sentence as the haystack, the value is one token       (S-NIAH-1)
needle 2   fresh random tokens as the haystack, the value is one token     (S-NIAH-2)
needle 3   fresh random tokens as the haystack, the value is four tokens   (S-NIAH-3)
overwrite  8 keys are written twice; the answer is the second value
switch     8 pairs, a separator, 8 other pairs; asked for an old key the answer is "none"
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from plots import COLOURS, MARKERS, NAMES, STYLES, fit_width, moved, panels, save, titled
from tasks import NEEDLES, draw

from gdn_ops.bench.ablation import training
from gdn_ops.bench.ablation.tasks import PAIRS, SILENT, VOCABULARY
from gdn_ops.nn import HybridLM

RULES = ("linear", "gated", "delta", "gated_delta")
TRAININGS: tuple[tuple[str, ...], ...] = (NEEDLES, ("overwrite",), ("switch",))


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are those of the published table."""

    lessons: int = 400
    steps: int = 250
    seeds: int = 3
    batch: int = 32
    rows: int = 64
    length: int = 64
    stretches: tuple[int, ...] = (1, 4, 16, 32)
    learning_rate: float = 1e-2


def build(rule: str) -> HybridLM:
    """Return one layer without an MLP, so that the memory does the work."""
    sizes: dict[str, Any] = {"num_heads": 4, "head_dim": 8, "mlp_size": 0}
    return HybridLM("G", VOCABULARY, 64, rule=rule, **sizes)


def train(
    model: HybridLM, tasks: Sequence[str], steps: int, batch: int, random: torch.Generator
) -> None:
    """Train on the tasks in turn."""
    training.train(
        model,
        lambda step: draw(tasks[step % len(tasks)], batch, Settings.length, random),
        steps,
        Settings.learning_rate,
    )


@torch.no_grad()
def accuracy(model: HybridLM, task: str, rows: int, length: int) -> tuple[int, float]:
    """Return tokens per sequence and the share of right answers.

    Of a needle, all tokens of the value must be right.
    """
    random = torch.Generator().manual_seed(99)
    tokens, targets = draw(task, rows, length, random)
    right = model(tokens)[0].argmax(-1) == targets
    asked = targets != SILENT
    if task in NEEDLES:
        return length, float((right | ~asked).all(1).float().mean())
    return tokens.shape[1], float(right[asked].float().mean())


def run(rule: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """Teach one model and its copies; look at every task and length."""
    torch.manual_seed(seed)
    taught, random = build(rule), torch.Generator().manual_seed(seed)
    train(taught, ["recall"], settings.lessons, 2 * settings.batch, random)
    results = {("recall", 1): accuracy(taught, "recall", 4 * settings.rows, 0)}
    for tasks in TRAININGS:
        model = copy.deepcopy(taught)
        train(model, tasks, settings.steps, settings.batch, random)
        for task in tasks:
            for stretch in settings.stretches if task in NEEDLES else (1,):
                rows = settings.rows if task in NEEDLES else 4 * settings.rows
                length = stretch * settings.length
                results[task, stretch] = accuracy(model, task, rows, length)
    return [
        {"rule": rule, "task": task, "length": length, "seed": seed, "accuracy": round(share, 4)}
        for (task, _), (length, share) in results.items()
    ]


def run_all(settings: Settings, processes: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of every run, as they come."""
    jobs = [(rule, seed) for seed in range(settings.seeds) for rule in RULES]
    if processes == 1:
        yield from (run(*job, settings) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(run, *job, settings) for job in jobs]):
            yield done.result()


def cells(rows: list[dict[str, Any]], rule: str, task: str, length: int | None) -> list[float]:
    """Return the accuracies of the seeds in one cell of the table."""
    fits = [r for r in rows if r["rule"] == rule and r["task"] == task]
    return [r["accuracy"] for r in fits if length in (None, r["length"])]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds, with the lowest and the highest, in Markdown."""
    lengths = sorted({r["length"] for r in rows if r["task"] in NEEDLES})
    columns = [(task, length) for task in NEEDLES for length in lengths]
    columns += [(task, None) for task in PAIRS]
    lines = ["| task, tokens | " + " | ".join(RULES) + " |", "|---" * (len(RULES) + 1) + "|"]
    for task, length in columns:
        shown = []
        for rule in RULES:
            accuracies = [100 * x for x in cells(rows, rule, task, length)]
            mean = statistics.mean(accuracies)
            shown.append(f"{mean:.0f} ({min(accuracies):.0f}–{max(accuracies):.0f})")
        name = task if length is None else f"{task}, {length}"
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = panels(4, 3.4)
    titles = ("1: repeated haystack", "2: fresh haystack", "3: fresh, long value")
    lengths = sorted({r["length"] for r in rows if r["task"] in NEEDLES})
    for axis, task, title in zip(axes, NEEDLES, titles, strict=False):
        for i, rule in enumerate(RULES):
            accuracies = [cells(rows, rule, task, length) for length in lengths]
            mean = [statistics.mean(x) for x in accuracies]
            # From the worst to the best seed.
            spread = (
                [m - min(x) for m, x in zip(mean, accuracies, strict=True)],
                [max(x) - m for m, x in zip(mean, accuracies, strict=True)],
            )
            axis.errorbar(
                lengths,
                mean,
                spread,
                fmt=MARKERS[i],
                linestyle=STYLES[i],
                ms=4.5,
                lw=1.2,
                elinewidth=0.7,
                capsize=2,
                mfc="white",
                color=COLOURS[rule],
                label=NAMES[rule],
                transform=moved(axis, i, len(RULES)),
            )
        axis.axvline(lengths[0], color="black", linewidth=0.6, linestyle=":")
        axis.set_xscale("log", base=2)
        fit_width(axis, lengths)
        axis.set_ylim(-0.05, 1.07)
        titled(axis, title, "tokens (trained at the dotted line)", "share of needles found")
    axes[0].legend(fontsize=7, frameon=False, loc="lower left")
    for place, task in enumerate(PAIRS):
        for shift, rule in enumerate(RULES):
            accuracies, x = cells(rows, rule, task, None), place + 0.2 * shift - 0.3
            axes[3].bar(x, statistics.mean(accuracies), 0.18, color=COLOURS[rule], alpha=0.6)
            axes[3].plot([x] * len(accuracies), accuracies, "k_", ms=6)
    axes[3].set_xticks(range(len(PAIRS)), list(PAIRS))
    axes[3].set_ylim(0, 1.03)
    titled(axes[3], "recall, overwrite, switch", "task", "share of right answers (a mark per seed)")
    save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lessons", type=int, default=Settings.lessons, help="steps of recall")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of every task")
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--rows", type=int, default=Settings.rows, help="sequences per accuracy")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of table and plot")
    given = parser.parse_args(arguments)
    settings = Settings(given.lessons, given.steps, given.seeds, rows=given.rows)
    # A second thread would only wait for the first on tensors of this size.
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    start, runs = time.perf_counter(), len(RULES) * settings.seeds
    for i, of_run in enumerate(run_all(settings, given.processes), 1):
        rows += of_run
        seconds = time.perf_counter() - start
        name = f"{of_run[0]['rule']}, seed {of_run[0]['seed']}"
        shown = ", ".join(f"{r['task']} {r['length']}: {r['accuracy']:.2f}" for r in of_run)
        print(f"[{i}/{runs}, {seconds:.0f} s] {name}: {shown}", flush=True)
    rows.sort(key=lambda r: (RULES.index(r["rule"]), r["task"], r["length"], r["seed"]))
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"settings": asdict(settings), "torch": torch.__version__, "rows": rows}
    lines = json.dumps(record).replace('{"rule"', '\n{"rule"')
    (given.out / "niah.json").write_text(f"{lines}\n", encoding="utf-8")
    plot(rows, given.out / "niah.png")
    print(f"\n{table(rows)}\n\n{given.out / 'niah.png'}, {given.out / 'niah.json'}")


if __name__ == "__main__":
    main()
