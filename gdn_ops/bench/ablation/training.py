"""Train the model of one row with one seed on every task, and say what it answers.

x ← x + mixer(RMSNorm(x)) once, between an embedding and the same matrix as output: no MLP, so that
the memory does the work. A row starts from the parameters of the full row of the same seed, where
name and shape are the same, and sees the same sequences in the same order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from gdn_ops.bench.ablation.table import FULL, TASKS, TEXT, VARIANTS, WIDTH, Settings
from gdn_ops.bench.ablation.tasks import BYTES, PAIRS, SILENT, VALUES, VOCABULARY, Batch, Text
from gdn_ops.nn import HybridLM

COUNTS = {"recall": 24, "overwrite": 12, "switch": 12}
"""Keys of the tasks of keys and values."""

LESSON = 8
"""Pairs of the recall that comes before these tasks: without it few models leave chance."""

EVALUATION = 2**40
"""Seed of the sequences that are answered at the end."""

PIECE = 128
"""Bytes of a sequence of the text that is held out."""


def build(name: str, seed: int, vocabulary: int) -> HybridLM:
    """Return the model of a row, on the CPU in float32, before any step.

    Args:
        name: of the row.
        seed: of the parameters of the full row, which it shares.
        vocabulary: number of tokens.
    """
    model = _drawn(name, seed, vocabulary)
    if name != FULL:
        own, full = model.state_dict(), _drawn(FULL, seed, vocabulary).state_dict()
        shared = {key: x for key, x in full.items() if key in own and own[key].shape == x.shape}
        model.load_state_dict({**own, **shared})
    return model


def _drawn(name: str, seed: int, vocabulary: int) -> HybridLM:
    options = VARIANTS[name].arguments
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return HybridLM(
            "G", vocabulary, WIDTH, mlp_size=0, device="cpu", dtype=torch.float32, **options
        )


def train(model: HybridLM, draw: Callable[[int], Batch], steps: int, rate: float) -> float:
    """Train by AdamW with one cycle of the learning rate.

    Args:
        model: it.
        draw: returns tokens and targets of a step.
        steps: how many.
        rate: the highest learning rate.

    Returns:
        The last loss, in nats per target; of a loss that is not finite, after which training stops.
    """
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    nats = math.nan
    for step in range(steps):
        tokens, targets = draw(step)
        hidden, _ = model.hidden(tokens)
        asked = targets != SILENT
        loss = functional.cross_entropy(model.logits(hidden[asked]), targets[asked])
        nats = loss.item()
        if not math.isfinite(nats):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return nats


@torch.no_grad()
def accuracy(model: HybridLM, batch: Batch) -> float:
    """Return the share of targets that are the most likely token."""
    tokens, targets = batch
    asked = targets != SILENT
    return float((model(tokens)[0].argmax(-1) == targets)[asked].float().mean())


@torch.no_grad()
def bits(model: HybridLM, batch: Batch) -> float:
    """Return the mean bits per target, all of which count."""
    tokens, targets = batch
    logits = model(tokens)[0].flatten(0, 1)
    return float(functional.cross_entropy(logits, targets.flatten())) / math.log(2)


def run(
    name: str, seed: int, tasks: Sequence[str], settings: Settings
) -> Iterator[tuple[str, float | None]]:
    """Train the model of a row on tasks; yield each with what it came to, in the task's unit.

    None stands for a training whose loss was not finite. Results depend on nothing but the
    arguments, and on the number of threads, which should be one.
    """
    pairs, text = [task for task in tasks if task != TEXT], Text()
    taught: HybridLM | None = None
    if pairs:
        random = _random(seed, "lesson")
        taught = build(name, seed, VOCABULARY)
        rows, draw = 2 * settings.batch, PAIRS["recall"]
        taught = _trained(taught, lambda _: draw(rows, random, LESSON), settings, 2)
    for task in pairs:
        yield task, None if taught is None else _pairs(taught, seed, task, settings)
    if TEXT in tasks:
        random = _random(seed, TEXT)
        model = build(name, seed, BYTES)
        draw_text = text.draw
        trained = _trained(
            model, lambda _: draw_text(settings.batch, settings.length, random), settings
        )
        yield TEXT, None if trained is None else bits(trained, text.held_out_pieces(PIECE))


def _pairs(taught: HybridLM, seed: int, task: str, settings: Settings) -> float | None:
    """Return the accuracy of a copy of a model after training on a task of keys and values."""
    random, draw, count = _random(seed, task), PAIRS[task], COUNTS[task]
    model = copy.deepcopy(taught)
    trained = _trained(model, lambda _: draw(settings.batch, random, count), settings)
    if trained is None:
        return None
    return accuracy(trained, draw(settings.evaluated, _random(EVALUATION, task), count))


def _trained(
    model: HybridLM, draw: Callable[[int], Batch], settings: Settings, times: int = 1
) -> HybridLM | None:
    """Return a model after `times` the steps of a task, None if its loss was not finite."""
    nats = train(model, draw, times * settings.steps, settings.rate)
    return model if math.isfinite(nats) else None


def _random(seed: int, task: str) -> torch.Generator:
    """Return a source of numbers that is the same for every row."""
    places = ("lesson", *TASKS)
    return torch.Generator().manual_seed(len(places) * seed + places.index(task))


def chances(tasks: Sequence[str]) -> dict[str, float]:
    """Return what no memory at all comes to: the best guess, or bytes by their frequency."""
    known = {"recall": 1 / VALUES, "overwrite": 1 / VALUES, "switch": 1 / 2}
    return {t: Text().bits_by_frequency() if t == TEXT else known[t] for t in tasks}
