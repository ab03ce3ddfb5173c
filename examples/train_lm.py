"""Train a small hybrid language model on the bytes of a text file; save, resume, sample.

    python examples/train_lm.py book.txt --pattern GA --out out/lm
    python examples/train_lm.py book.txt --out out/lm --resume      (after an interruption)
    python examples/train_lm.py book.txt --out out/lm --resume --sample 500

On several processes, by rows (DDP, or FSDP2 with --data-parallel fsdp) or by tokens, with the same
losses on any number of them; --resume goes on with another number:

    torchrun --nproc-per-node 4 examples/train_lm.py book.txt --out out/lm --context-parallel

Without a file it learns the text of `gdn-ops demo`. The pattern names the layers, bottom first: G
gated delta rule, M decay only, A attention in a window; "GA" and "MGA" are the paper's hybrids.
The recipe is the paper's: AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1, a warm-up
and a cosine down to a tenth.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import checkpoints
import torch
from mesh import Layout, Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from gdn_ops.environment.text import shipped_text
from gdn_ops.nn import HybridLM

BYTES = 256
HELD_OUT = 0.1
"""Share of the text, at its end, that is not trained on."""

FILE, FOLDER = "checkpoint.pt", "checkpoint"
"""Names of checkpoints of one process, and of several."""


@dataclass(frozen=True)
class Settings:
    """Describe a training; a checkpoint keeps it, so that resuming needs no other argument."""

    pattern: str = "GA"
    layers: int = 4
    width: int = 128
    heads: int = 4
    window: int = 64
    length: int = 128
    batch: int = 16
    steps: int = 400
    rate: float = 3e-3
    seed: int = 0


class Training:
    """A model, its optimizer, the step they are at, and the norm of the gradient before it.

    The batch of a step depends on nothing but seed and step: a training that is interrupted and
    resumed computes what it would have computed, and several processes what one would.

    Args:
        settings: what the training is.
        text: (T,) uint8.
        mesh: of the processes; of this one alone if None.
    """

    def __init__(self, settings: Settings, text: Tensor, mesh: Mesh | None = None) -> None:
        self.settings, self.mesh = settings, Mesh() if mesh is None else mesh
        cut = int(len(text) * (1 - HELD_OUT))
        self.text, self.held_out = text[:cut], text[cut:]
        shorter = min(len(self.text), len(self.held_out))
        if shorter <= settings.length + 1:
            raise SystemExit(
                f"the text has {len(text)} bytes, should have at least "
                f"{math.ceil((settings.length + 2) / HELD_OUT)} for --length {settings.length}"
            )
        if settings.batch < self.mesh.data:
            raise SystemExit(
                f"--batch is {settings.batch}, should be at least {self.mesh.data}: so many "
                f"processes take rows"
            )
        self.model = self.mesh.placed(made(settings))
        self.called = self.mesh.called(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(0.1), lr=settings.rate, betas=(0.9, 0.95)
        )
        self.step, self.norm = 0, math.nan

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interruption leaves the one before.

        Args:
            path: FILE, written by one process, or FOLDER, written by all.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"settings": asdict(self.settings), "step": self.step}
        if path.name == FOLDER:
            with self.mesh.together(f"the checkpoint of step {self.step}"):
                checkpoints.save(path, about, self.model, self.optimizer)
            return
        weights, moments = self.model.state_dict(), self.optimizer.state_dict()
        beside = path.with_suffix(".new")
        torch.save({**about, "model": weights, "optimizer": moments}, beside)
        os.replace(beside, path)

    @staticmethod
    def load(path: Path, text: Tensor, mesh: Mesh | None = None) -> Training:
        """Return the training that `save` wrote, on the processes that there are now."""
        if path.name == FOLDER:
            about = checkpoints.latest(path)
            assert about is not None
            training = Training(Settings(**about["settings"]), text, mesh)
            checkpoints.load(path, about["step"], training.model, training.optimizer)
        else:
            about = torch.load(path, weights_only=True)
            training = Training(Settings(**about["settings"]), text, mesh)
            training.model.load_state_dict(about["model"])
            training.optimizer.load_state_dict(about["optimizer"])
        training.step = about["step"]
        return training

    def batch_of(self, step: int) -> Tensor:
        """Return the (batch, length + 1) bytes of a step."""
        settings = self.settings
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        last = len(self.text) - settings.length
        starts = torch.randint(last, (settings.batch, 1), generator=random)
        return self.text[starts + torch.arange(settings.length + 1)].long()

    def rate(self) -> float:
        """Warm up over the first twentieth, then follow a cosine down to a tenth."""
        settings, warm = self.settings, max(1, self.settings.steps // 20)
        if self.step < warm:
            return settings.rate * (self.step + 1) / warm
        done = (self.step - warm) / max(1, settings.steps - warm)
        return settings.rate * (0.55 + 0.45 * math.cos(math.pi * done))

    def advance(self) -> float:
        """Take one step; return its loss in nats per byte."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with self.mesh.computing(f"step {self.step}", self.settings.length):
            share = self.share(self.batch_of(self.step))
            (share * self.mesh.backward_scale).backward()
            norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            # Of sharded gradients it is a sharded number.
            self.norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            return self.mesh.total(share)

    def share(self, tokens: Tensor) -> Tensor:
        """Return what this process adds to the loss of all tokens (B, T + 1).

        The loss is the mean cross entropy of each next byte.
        """
        inputs, labels = self.mesh.own(tokens)
        logits, _ = self.called(inputs)
        nats = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
        )
        return nats / tokens[:, 1:].numel()

    @torch.no_grad()
    def bits_held_out(self, rows: int = 16) -> float:
        """Return bits per byte on text that was not trained on."""
        length = self.settings.length
        starts = torch.linspace(0, len(self.held_out) - length - 1, rows).long()[:, None]
        tokens = self.held_out[starts + torch.arange(length + 1)].long()
        with self.mesh.computing("text that is held out", length):
            return self.mesh.total(self.share(tokens)) / math.log(2)


def made(settings: Settings) -> HybridLM:
    """Return the model of a training at its start."""
    torch.manual_seed(settings.seed)
    return HybridLM(
        settings.pattern,
        BYTES,
        settings.width,
        num_layers=settings.layers,
        num_heads=settings.heads,
        window=settings.window,
        head_dim=settings.width // settings.heads,
    )


def run(training: Training, path: Path, until: int, every: int, losses: Path | None = None) -> None:
    """Train up to a step, with a bar; save every so often, at the end and when interrupted.

    Args:
        training: it.
        path: of the checkpoint.
        until: the step.
        every: steps between checkpoints.
        losses: a file to which each step adds a line of JSON.
    """
    is_first, is_alone = training.mesh.rank == 0, training.mesh.count == 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not is_first) as progress:
        bar = progress.add_task("training", total=until, completed=training.step)
        try:
            while training.step < until:
                nats = training.advance()
                description = f"{nats / math.log(2):.3f} bits per byte"
                progress.update(bar, advance=1, description=description)
                if losses is not None and is_first:
                    add_line(losses, {"step": training.step, "nats": nats, "norm": training.norm})
                if training.step % every == 0:
                    training.save(path)
                    held_out = training.bits_held_out()
                    if is_first:
                        progress.print(
                            f"step {training.step}: {held_out:.3f} bits per byte, held out"
                        )
        except KeyboardInterrupt:
            # Several processes stop at different steps: what they saved last counts.
            if not is_alone:
                raise
            progress.print("interrupted; --resume goes on from here")
        training.save(path)


def add_line(path: Path, content: dict[str, float]) -> None:
    """Add a line of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(content)}\n")


def sample(training: Training, prompt: str, count: int, temperature: float) -> str:
    """Continue a prompt by bytes."""
    device = training.mesh.device
    random = torch.Generator(device).manual_seed(training.settings.seed)
    tokens = torch.tensor([list(prompt.encode() or b"\n")], device=device)
    continued = training.model.generate(tokens, count, temperature=temperature, generator=random)
    return bytes(continued[0].tolist()).decode(errors="replace")


def read(path: Path | None) -> Tensor:
    """Return the bytes of a text, (T,) uint8."""
    content = shipped_text() if path is None else path.read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("text", type=Path, nargs="?", help="a file; the text of the demo if none")
    options.add_argument(
        "--out", type=Path, default=Path("out/lm"), help="folder of the checkpoint"
    )
    options.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options.add_argument("--until", type=int, help="stop at this step; --resume goes on")
    options.add_argument("--save-every", type=int, default=100)
    options.add_argument("--prompt", default="The ")
    options.add_argument("--sample", type=int, default=300, help="bytes to add to the prompt")
    options.add_argument("--temperature", type=float, default=0.7)
    options.add_argument("--losses", type=Path, help="file that gets a line of JSON per step")
    for field in fields(Settings):
        options.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    several = options.add_argument_group("several processes, started by torchrun")
    several.add_argument("--data-parallel", choices=("ddp", "fsdp"), help="ddp if not given")
    several.add_argument(
        "--context-parallel",
        type=int,
        nargs="?",
        const=0,
        default=1,
        metavar="N",
        help="share the tokens of a row over N processes, or over all",
    )
    several.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 (fsdp)")
    several.add_argument("--recompute", action="store_true", help="keep no activations of blocks")
    several.add_argument("--timeout", type=float, default=600.0, help="seconds of an exchange")
    return options


def saved_in(out: Path) -> Path | None:
    """Return the checkpoint in a folder: that of several processes, else of one, else None."""
    file, folder = out / FILE, out / FOLDER
    if checkpoints.latest(folder) is not None:
        return folder
    return file if file.exists() else None


def trained(out: Path) -> HybridLM:
    """Return the model of the checkpoint in a folder."""
    path = saved_in(out)
    if path is None:
        raise SystemExit(f"{out} has no checkpoint")
    about = checkpoints.latest(path) if path.name == FOLDER else torch.load(path, weights_only=True)
    model = made(Settings(**about["settings"]))
    if path.name == FOLDER:
        checkpoints.load_model(path, about["step"], model)
    else:
        model.load_state_dict(about["model"])
    return model


def start(given: argparse.Namespace, mesh: Mesh) -> tuple[Training, Path]:
    """Return the training that is asked for, new or resumed, and where it is saved."""
    text, found = read(given.text), saved_in(given.out)
    is_shared = mesh.is_launched or (found is not None and found.name == FOLDER)
    path = given.out / (FOLDER if is_shared else FILE)
    if not given.resume:
        if found is not None:
            raise SystemExit(f"{found} exists; --resume goes on from it, another --out starts anew")
        kept = {field.name: getattr(given, field.name) for field in fields(Settings)}
        return Training(Settings(**kept), text, mesh), path
    if found is None:
        raise SystemExit(f"{given.out} has no checkpoint; without --resume a training starts")
    if found.name == FILE and mesh.layout.data_parallel == "fsdp":
        raise SystemExit(f"{found} is of one process, should be of several for fsdp")
    return Training.load(found, text, mesh), path


def main(arguments: list[str] | None = None) -> Training:
    given = parser().parse_args(arguments)
    names = {field.name for field in fields(Layout)}
    mesh = Mesh(Layout(**{name: value for name, value in vars(given).items() if name in names}))
    training, path = start(given, mesh)
    steps = training.settings.steps
    until = steps if given.until is None else min(given.until, steps)
    run(training, path, until, given.save_every, given.losses)
    held_out = training.bits_held_out()
    continued = sample(training, given.prompt, given.sample, given.temperature)
    if mesh.rank == 0:
        print(f"step {training.step}: {held_out:.3f} bits per byte, held out")
        print(continued)
    mesh.leave()
    return training


if __name__ == "__main__":
    main()
