"""Read a long prompt on several processes, and decode on the one that has its end.

    torchrun --nproc-per-node 4 examples/serve_split.py --prompt book.txt --model out/lm

Each process reads its part of the prompt. The states behind the whole of it, which do not grow with
it, come to all; that of the last tokens goes on with them alone, and the others are free. The model
is what examples/train_lm.py has saved, or one with drawn weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from mesh import Layout, Mesh
from torch import Tensor
from train_lm import Settings, made, trained

from gdn_ops.environment.text import shipped_text
from gdn_ops.nn import HybridLM
from gdn_ops.nn.hybrid import LayerState
from gdn_ops.parallel import SequenceSplit, sequence_parallel


@torch.no_grad()
def prefill(
    model: HybridLM, tokens: Tensor, split: SequenceSplit
) -> tuple[Tensor, tuple[LayerState, ...]]:
    """Read a prompt on all processes of a split.

    Args:
        model: the same on all.
        tokens: (B, T) of the whole prompt.
        split: which of them the processes hold.

    Returns:
        logits (B, 1, vocab_size) behind the last token of this process, and the states behind the
        whole prompt: where the process holds its last token, they belong together.
    """
    with sequence_parallel(split, return_state=True):
        logits, states = model(split.local(tokens), is_last_only=True)
    return logits, states


@torch.no_grad()
def decode(model: HybridLM, logits: Tensor, states: tuple[LayerState, ...], count: int) -> Tensor:
    """Return the most likely tokens behind a prompt, (B, count), given what `prefill` returned."""
    parts = []
    for _ in range(count):
        token = logits[:, -1].argmax(-1, keepdim=True)
        parts.append(token)
        logits, states = model(token, states)
    return torch.cat(parts, 1)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--prompt", type=Path, help="a file; the text of the demo if none")
    options.add_argument("--length", type=int, default=4096, help="bytes of it that are read")
    options.add_argument("--count", type=int, default=64, help="bytes to add to it")
    options.add_argument("--model", type=Path, help="folder of a checkpoint of train_lm.py")
    options.add_argument("--timeout", type=float, default=600.0, help="seconds of an exchange")
    return options


def main(arguments: list[str] | None = None) -> Tensor | None:
    """Return the bytes behind the prompt, (1, count), or None where another process has them."""
    given = parser().parse_args(arguments)
    mesh = Mesh(Layout(context_parallel=0, timeout=given.timeout))
    model = made(Settings()) if given.model is None else trained(given.model)
    model = model.to(mesh.device).eval()
    text = shipped_text() if given.prompt is None else given.prompt.read_bytes()
    tokens = torch.tensor([list(text[: given.length])], device=mesh.device)
    start = time.perf_counter()
    with mesh.together("the prompt"):
        logits, states = prefill(model, tokens, mesh.split(tokens.shape[1]))
    read = time.perf_counter() - start
    mesh.leave()
    if mesh.rank != mesh.count - 1:
        return None
    added = decode(model, logits, states, given.count)
    print(f"{tokens.shape[1]} bytes read by {mesh.count} processes in {read:.2f} s; then follow")
    print(repr(bytes(added[0].tolist())))
    return added


if __name__ == "__main__":
    main()
