"""Train a small hybrid language model on the bytes of a text file; save, resume, sample.

    python examples/train_lm.py book.txt --pattern GA --out out/lm
    python examples/train_lm.py book.txt --out out/lm --resume      (after an interruption)
    python examples/train_lm.py book.txt --out out/lm --resume --sample 500

Without a file it learns the text of `gdn-ops demo`. The pattern names the layers, bottom first: G
gated delta rule, M decay only, A attention in a window; "GA" and "MGA" are the paper's hybrids.
The recipe is the paper's: AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1, a warm-up
and a cosine down to a tenth.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from gdn_ops.demo.show import shipped_text
from gdn_ops.nn import HybridLM

BYTES = 256
HELD_OUT = 0.1
"""Share of the text, at its end, that is not trained on."""


@dataclass(frozen=True)
class Settings:
    """What a training is; a checkpoint keeps it, so that resuming needs no other argument."""

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
    """A model, its optimizer and the step they are at.

    The batch of a step depends on nothing but seed and step: a training that is interrupted and
    resumed computes what it would have computed.
    """

    def __init__(self, settings: Settings, text: Tensor) -> None:
        self.settings = settings
        cut = int(len(text) * (1 - HELD_OUT))
        self.text, self.held_out = text[:cut], text[cut:]
        shorter = min(len(self.text), len(self.held_out))
        if shorter <= settings.length + 1:
            raise SystemExit(
                f"the text has {len(text)} bytes, should have at least "
                f"{math.ceil((settings.length + 2) / HELD_OUT)} for --length {settings.length}"
            )
        torch.manual_seed(settings.seed)
        self.model = HybridLM(
            settings.pattern,
            BYTES,
            settings.width,
            num_layers=settings.layers,
            num_heads=settings.heads,
            window=settings.window,
            head_dim=settings.width // settings.heads,
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(0.1), lr=settings.rate, betas=(0.9, 0.95)
        )
        self.step = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interruption leaves the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        beside = path.with_suffix(".new")
        torch.save(content, beside)
        os.replace(beside, path)

    @staticmethod
    def load(path: Path, text: Tensor) -> Training:
        content = torch.load(path, weights_only=True)
        training = Training(Settings(**content["settings"]), text)
        training.model.load_state_dict(content["model"])
        training.optimizer.load_state_dict(content["optimizer"])
        training.step = content["step"]
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
        nats = loss(self.model, self.batch_of(self.step))
        nats.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(nats.detach())

    @torch.no_grad()
    def bits_held_out(self, rows: int = 16) -> float:
        """Return bits per byte on text that was not trained on."""
        length = self.settings.length
        starts = torch.linspace(0, len(self.held_out) - length - 1, rows).long()[:, None]
        tokens = self.held_out[starts + torch.arange(length + 1)].long()
        return float(loss(self.model, tokens)) / math.log(2)


def loss(model: HybridLM, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of each next byte, tokens (B, T + 1)."""
    logits, _ = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def run(training: Training, path: Path, until: int, every: int) -> None:
    """Train up to a step, with a bar; save every so often, at the end and when interrupted."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("training", total=until, completed=training.step)
        try:
            while training.step < until:
                bits = training.advance() / math.log(2)
                progress.update(bar, advance=1, description=f"{bits:.3f} bits per byte")
                if training.step % every == 0:
                    training.save(path)
                    held_out = training.bits_held_out()
                    progress.print(f"step {training.step}: {held_out:.3f} bits per byte, held out")
        except KeyboardInterrupt:
            progress.print("interrupted; --resume goes on from here")
        finally:
            training.save(path)


def sample(training: Training, prompt: str, count: int, temperature: float) -> str:
    """Continue a prompt by bytes."""
    random = torch.Generator().manual_seed(training.settings.seed)
    tokens = torch.tensor([list(prompt.encode() or b"\n")])
    continued = training.model.generate(tokens, count, temperature=temperature, generator=random)
    return bytes(continued[0].tolist()).decode(errors="replace")


def read(path: Path | None) -> Tensor:
    """Return the bytes of a text, (T,) uint8."""
    content = shipped_text() if path is None else path.read_bytes()
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("text", type=Path, nargs="?", help="a file; the text of the demo if none")
    made.add_argument("--out", type=Path, default=Path("out/lm"), help="folder of the checkpoint")
    made.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    made.add_argument("--until", type=int, help="stop at this step; --resume goes on")
    made.add_argument("--save-every", type=int, default=100)
    made.add_argument("--prompt", default="The ")
    made.add_argument("--sample", type=int, default=300, help="bytes to add to the prompt")
    made.add_argument("--temperature", type=float, default=0.7)
    for field in fields(Settings):
        made.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return made


def main(arguments: list[str] | None = None) -> Training:
    given = parser().parse_args(arguments)
    path, text = given.out / "checkpoint.pt", read(given.text)
    if given.resume:
        training = Training.load(path, text)
    elif path.exists():
        raise SystemExit(f"{path} exists; --resume goes on from it, another --out starts anew")
    else:
        kept = {field.name: getattr(given, field.name) for field in fields(Settings)}
        training = Training(Settings(**kept), text)
    steps = training.settings.steps
    until = steps if given.until is None else min(given.until, steps)
    run(training, path, until, given.save_every)
    print(f"step {training.step}: {training.bits_held_out():.3f} bits per byte, held out")
    print(sample(training, given.prompt, given.sample, given.temperature))
    return training


if __name__ == "__main__":
    main()
