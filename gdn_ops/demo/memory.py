"""Build and run the demo's memory: operands from bytes, one prefill, decoding from its state.

Token t of the operands stands for byte t of the text, x_t, with c_t the n bytes ending at t:

    k_t = φ(c_{t-1})    written with v_t = code(x_t): "after c_{t-1} came x_t"
    q_t = φ(c_t)        read after the write: "what comes after c_t?"

so that o_t, the prediction of x_{t+1}, has seen x_0..x_t and nothing else. Head h looks at
its own n; the heads' answers are added. φ is a product of random signs, one per (distance,
byte), divided by √K: of length one, and near-orthogonal for any two different contexts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_ops.ops import gated_delta, gated_delta_step
from gdn_ops.spec.ops import GATED_DELTA

CONTEXTS = (2, 3, 4, 6)
"""n of every head: how many of the last bytes are its key."""

KEY_WIDTH, VALUE_WIDTH = 512, 128
DECAY = 0.9998
"""alpha of the rules that have a gate: a write is at 1/e after 5000 bytes."""


@dataclass(frozen=True)
class Memory:
    """Hold the fixed random features of the demo's memory; nothing in it is trained.

    Attributes:
        contexts: n of every head, (H,).
        signs: (H, max n, 256, K) random ±1, one per head, distance back and byte.
        codes: (256, V) code of every byte, of length one.
    """

    contexts: tuple[int, ...]
    signs: Tensor
    codes: Tensor

    @property
    def heads(self) -> int:
        """Return the number of heads, one per context length."""
        return len(self.contexts)


@dataclass(frozen=True)
class Operands:
    """Hold the tensors that the op receives for a text of T bytes.

    Attributes:
        q, k: (1, T, H, K), rows of length one.
        v: (1, T, H, V).
        alpha: (1, T, H).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor


def make_memory(
    contexts: tuple[int, ...] = CONTEXTS,
    key_width: int = KEY_WIDTH,
    value_width: int = VALUE_WIDTH,
) -> Memory:
    """Draw the fixed random features of a memory.

    Args:
        contexts: n of every head.
        key_width: K, entries of a key.
        value_width: V, entries of a byte's code.
    """
    generator = torch.Generator().manual_seed(0)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator, device="cpu").float() * 2 - 1

    table = signs(len(contexts), max(contexts), 256, key_width)
    return Memory(contexts, table, signs(256, value_width) / value_width**0.5)


def to_bytes(text: bytes) -> Tensor:
    """Return a text as a tensor of byte values, (T,) int64."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def features(memory: Memory, x: Tensor) -> Tensor:
    """Return the features φ of the context that ends at every byte.

    Args:
        memory: the features.
        x: (T,) byte values; what lies before the first counts as zero bytes.

    Returns:
        (T, H, K), rows of length one.
    """
    heads = []
    for h, n in enumerate(memory.contexts):
        product = memory.signs[h, 0, x]
        for back in range(1, n):
            shifted = torch.cat((x.new_zeros(back), x))[: len(x)]
            product = product * memory.signs[h, back, shifted]
        heads.append(product)
    width = memory.signs.shape[-1]
    return torch.stack(heads, 1) / math.sqrt(width)


def operands(memory: Memory, x: Tensor, resets: tuple[int, ...] = ()) -> Operands:
    """Return q, k, v and alpha of a text.

    Args:
        memory: the features.
        x: (T,) byte values.
        resets: positions of bytes before which the memory is cleared, by alpha = 0.
    """
    # The empty context before the first byte is n zero bytes.
    phi = features(memory, torch.cat((x.new_zeros(1), x)))
    alpha = torch.full((1, len(x), memory.heads), DECAY, dtype=torch.float32, device="cpu")
    alpha[:, list(resets)] = 0.0
    v = memory.codes[x].unsqueeze(1).expand(-1, memory.heads, -1)
    return Operands(phi[None, 1:], phi[None, :-1], v[None].contiguous(), alpha)


def read_through(
    given: Operands, rule: str = "gated_delta", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Write and read a whole text in one prefill with β = 1.

    Returns:
        o (1, T, H, V) and the memory after the last byte (1, H, K, V).
    """
    alpha = given.alpha if GATED_DELTA.rule[rule].has_decay else None
    return gated_delta(
        given.q, given.k, given.v, alpha, rule=rule, scale=1.0, return_state=True, backend=backend
    )


def predict(memory: Memory, o: Tensor) -> Tensor:
    """Return the byte whose code matches the sum over heads best: (..., H, V) to (...)."""
    return (o.sum(-2).to(memory.codes.dtype) @ memory.codes.T).argmax(-1)


def continue_text(
    memory: Memory,
    x: Tensor,
    state: Tensor,
    first: int,
    count: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Continue a text after a prefill, one byte at a time: predict, write, read.

    Args:
        memory: the features.
        x: (T,) the bytes that were read.
        state: (1, H, K, V) the memory after them; updated in place.
        first: the byte predicted at T.
        count: bytes to add.
        backend: for `gated_delta_step`.

    Returns:
        The bytes that were added (count,), and o at each (1, count, H, V).
    """
    recent = x[-max(memory.contexts) - 1 :]
    added, outputs, byte = [], [], first
    alpha = torch.full((1, memory.heads), DECAY, dtype=torch.float32, device="cpu")
    for _ in range(count):
        recent = torch.cat((recent, recent.new_tensor([byte])))
        phi = features(memory, recent)
        token = phi[None, -1], phi[None, -2], memory.codes[byte].expand(1, memory.heads, -1), alpha
        o, _ = gated_delta_step(*token, state=state, scale=1.0, inplace=True, backend=backend)
        recent = recent[1:]
        added.append(byte)
        outputs.append(o)
        byte = int(predict(memory, o))
    return x.new_tensor(added), torch.stack(outputs, 1)
