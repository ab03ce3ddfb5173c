"""Build language models whose layers are named by a string, as the hybrids of the paper are.

x ← x + mixer(RMSNorm(x)),   x ← x + SwiGLU(RMSNorm(x)),   logits = RMSNorm(x) Eᵀ
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Never, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.call.scalars import as_python
from gdn_ops.nn import generation, letters
from gdn_ops.nn.attention import KeyValueRing, SlidingWindowAttention
from gdn_ops.nn.decay_groups import optimizer_groups, parameters_without_weight_decay
from gdn_ops.nn.drafts import Draft
from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.names import MODEL_INPUTS, MODEL_OPTIONS, own_options, refuse_input, refuse_option
from gdn_ops.nn.rollback import TokenStates
from gdn_ops.nn.shares import Splittable, entering, over_vocabulary
from gdn_ops.nn.state import State
from gdn_ops.nn.values import (
    check_counts,
    check_flags,
    check_floats,
    check_made,
    check_numbers,
    check_token_ids,
    check_weights,
)
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.ops import GATED_DELTA

LayerState = State | KeyValueRing
"""State that one layer keeps between calls."""

PAPER: dict[str, dict[str, Any]] = {
    name: {
        "pattern": pattern,
        "num_layers": layers,
        "vocab_size": 32000,
        "hidden_size": width,
        "num_heads": 9,
        "attention_heads": heads,
        "mlp_size": inner,
        "window": 2048,
    }
    for name, pattern, layers, width, heads, inner in (
        ("GDN 0.4B", "G", 11, 1536, 12, 6144),
        ("GDN-H1 0.4B", "GA", 12, 1536, 12, 6144),
        ("GDN 1.3B", "G", 16, 2400, 16, 5888),
        ("GDN-H1 1.3B", "GA", 18, 2304, 18, 6144),
    )
}
"""The published configurations, as arguments of HybridLM."""


class SwiGLU(Splittable):
    """Apply y = W_down (SiLU(W_gate x) ⊙ W_up x).

    Args:
        hidden_size: width of the input and output.
        inner_size: width in between.
        device, dtype: of the parameters.
    """

    columns, rows = ("gate_proj", "up_proj"), "down_proj"

    def __init__(self, hidden_size: int, inner_size: int, **made: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False, **made)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False, **made)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False, **made)

    def split_sizes(self) -> dict[str, int]:
        return {"inner_size": self.down_proj.in_features}

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., hidden_size) to the same shape."""
        x = entering(self, x)
        check_weights("SwiGLU", "x", x, gate_proj=self.gate_proj, up_proj=self.up_proj)
        inner = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        check_weights("SwiGLU", "the product", inner, down_proj=self.down_proj)
        y: Tensor = self.down_proj(inner)
        return y


class Block(Splittable):
    """Apply x ← x + mixer(RMSNorm(x)), then x ← x + mlp(RMSNorm(x)).

    Args:
        mixer: GatedDeltaNet or SlidingWindowAttention.
        mlp_size: inner width of the SwiGLU; 0 for none.
        norm_eps: of both norms.
        device, dtype: of the parameters.
    """

    whole = ("mixer_norm", "mlp_norm")

    def __init__(
        self,
        mixer: GatedDeltaNet | SlidingWindowAttention,
        mlp_size: int,
        norm_eps: float,
        **made: Any,
    ) -> None:
        super().__init__()
        width = mixer.hidden_size
        self.mixer_norm = nn.RMSNorm(width, norm_eps, **made)
        self.mixer = mixer
        self.mlp: SwiGLU | None = None
        if mlp_size:
            self.mlp_norm = nn.RMSNorm(width, norm_eps, **made)
            self.mlp = SwiGLU(width, mlp_size, **made)

    def forward(
        self, x: Tensor, state: LayerState | None = None, **options: bool
    ) -> tuple[Tensor, LayerState]:
        """Map x (B, T, hidden_size) to the same shape; return what the mixer does of its state."""
        mixed, new_state = self.mixer(self.mixer_norm(x), state, **options)
        x = x + mixed
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, new_state


class HybridLM(Splittable):
    """Run a language model of recurrent and attention layers, its embedding tied to its output.

    Args:
        pattern: kinds of layers, bottom first, repeated until there are num_layers: G the
            gated delta rule, M the decay-only rule, K Kimi Delta Attention, E the same with erase
            and write gates, A attention in a window. "GA" is the paper's H1, "MGA" its H2.
        vocab_size: tokens.
        hidden_size: width.
        num_layers: layers; those of the pattern, once, when not given.
        num_heads: key heads of G, M, K and E.
        attention_heads: heads of A; num_heads when not given.
        window: tokens that attention sees.
        mlp_size: inner width of the SwiGLU behind every mixer; 4 hidden_size when not given, 0 for
            none.
        rule: of the layers G.
        norm_eps: of all norms.
        device, dtype: of the parameters.
        mixer: further arguments of GatedDeltaNet, such as head_dim or backend, of all layers but A.

    Raises:
        SpecError: the pattern has an unknown letter, an option is unknown or has a wrong value,
            or sizes do not fit.
    """

    whole, vocabulary = ("norm",), "embedding"

    def __init__(
        self,
        pattern: str,
        vocab_size: int,
        hidden_size: int,
        *,
        num_layers: int | None = None,
        num_heads: int,
        attention_heads: int | None = None,
        window: int = 2048,
        mlp_size: int | None = None,
        rule: str = "gated_delta",
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer: Any,
    ) -> None:
        super().__init__()
        letters.check_pattern(pattern)
        _check_options(rule, mixer)
        count = len(pattern) if num_layers is None else num_layers
        if isinstance(count, int) and count < 1:
            _fail(f"num_layers is {num_layers}, should be at least 1")
        heads = num_heads if attention_heads is None else attention_heads
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": count}
        check_counts("HybridLM", **sizes, num_heads=num_heads, attention_heads=heads, window=window)
        check_counts("HybridLM", least=0, mlp_size=mlp_size or 0)
        check_numbers("HybridLM", norm_eps=norm_eps)
        check_made("HybridLM", device, dtype)
        vocab_size, hidden_size, count = map(as_python, (vocab_size, hidden_size, count))
        norm_eps, mlp_size = as_python(norm_eps), as_python(mlp_size)
        self.hidden_size, self.pattern = hidden_size, (pattern * count)[:count]
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = 4 * hidden_size if mlp_size is None else mlp_size

        def mixer_of(letter: str) -> GatedDeltaNet | SlidingWindowAttention:
            if letter == "A":
                return SlidingWindowAttention(hidden_size, heads, window, **made)
            kind, own = letters.recurrent(letter, rule)
            options = {"norm_eps": norm_eps, **mixer, **own, **made}
            return kind(hidden_size, num_heads, **options)

        self.embedding = nn.Embedding(vocab_size, hidden_size, **made)
        self.blocks = nn.ModuleList(
            Block(mixer_of(letter), inner, norm_eps, **made) for letter in self.pattern
        )
        self.norm = nn.RMSNorm(hidden_size, norm_eps, **made)
        self._draw_matrices()

    def reset_weights(self) -> None:
        """Draw all parameters anew, for example behind `to_empty`.

        Linear layers and the embedding are drawn from N(0, 2 / (5 hidden_size)), smaller by
        sqrt(2 layers) where they write into the residual stream. Gates, convolutions and norms
        start as their layers make them.

        Raises:
            SpecError: a matrix is computed from others or is no float, so that it cannot be drawn.
        """
        for name, module in self._matrices():
            weight = module._parameters.get("weight")
            if weight is None or not weight.is_floating_point():
                _fail(
                    f"{name}.weight is no parameter of floats, should be one to be drawn anew: "
                    f"remove what computes it from others, or dequantise it, first"
                )
        for part in self.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
        self._draw_matrices()

    def _draw_matrices(self) -> None:
        """Draw the linear layers and the embedding."""
        std = math.sqrt(2 / (5 * self.hidden_size))
        for name, module in self._matrices():
            # A part of the name: what wraps a layer adds names behind that of the layer.
            writes = {"o_proj", "down_proj"} & set(name.split("."))
            shrink = math.sqrt(2 * len(self.blocks)) if writes else 1.0
            nn.init.normal_(module.weight, std=std / shrink)

    def _matrices(self) -> list[tuple[str, nn.Linear | nn.Embedding]]:
        """Return the linear layers and the embedding by name."""
        modules = self.named_modules()
        return [(name, m) for name, m in modules if isinstance(m, nn.Linear | nn.Embedding)]

    def forward(
        self,
        tokens: Tensor,
        state: Sequence[LayerState] | None = None,
        *,
        is_last_only: bool = False,
        return_states: bool = False,
        **unknown: Never,
    ) -> tuple[Tensor, tuple[LayerState, ...] | TokenStates]:
        """Read whole sequences, or continue them by any number of tokens.

        Args:
            tokens: (B, T) int64.
            state: what an earlier call returned, or None to start. It is not changed.
            is_last_only: whether logits are wanted behind the last token alone; T > 0 then.
            return_states: whether to keep what leads to the states after any of the tokens:
                `states.after(n)` is that after n of them. For a few tokens, without gradients.

        Returns:
            logits (B, T, vocab_size) of each next token, or (B, 1, vocab_size) of the one behind
            the last, and the state of every layer, or TokenStates with `return_states`.

        Raises:
            SpecError: an argument is of the wrong type, a shape does not fit, or a token is not
                in the vocabulary, which is looked at on the CPU only.
        """
        if unknown:
            known = ("tokens", "state", "is_last_only", "return_states")
            refuse_input("HybridLM", unknown, known, MODEL_INPUTS)
        check_flags("HybridLM", is_last_only=is_last_only, return_states=return_states)
        x, after = self._hidden(tokens, state, **({"return_states": True} if return_states else {}))
        x = x[:, -1:] if is_last_only else x
        return self.logits(x), TokenStates(after) if return_states else after

    def hidden(
        self, tokens: Tensor, state: Sequence[LayerState] | None = None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Return the hidden vectors that `logits` reads, and the states.

        Args:
            tokens: (B, T) integers.
            state: what an earlier call returned, or None to start.

        Returns:
            (B, T, hidden_size), and the state of every layer.

        Raises:
            SpecError: as of a call, or there are not as many states as layers.
        """
        return self._hidden(tokens, state)

    def _hidden(
        self, tokens: Tensor, state: Sequence[LayerState] | None, **options: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the hidden vectors and what the layers return of their states."""
        check_token_ids("HybridLM", tokens, self.embedding)
        if state is not None and not isinstance(state, Sequence):
            raise SpecTypeError(
                f"HybridLM: state has type {type(state).__name__}, should be the tuple that an "
                f"earlier call returned"
            )
        if state is not None and len(state) != len(self.blocks):
            _fail(f"state is of {len(state)} layers, should be of {len(self.blocks)}")
        x, after = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            x, new_state = block(x, None if state is None else state[i], **options)
            after.append(new_state)
        return self.norm(x), tuple(after)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of hidden vectors.

        Args:
            x: (..., hidden_size), as `hidden` returned it.

        Returns:
            (..., vocab_size).

        Raises:
            SpecError: x is no tensor of floats, or does not fit the embedding.
        """
        check_floats("HybridLM.logits", x=x)
        weight: Any = getattr(self.embedding, "weight", None)
        if not isinstance(weight, Tensor):
            _fail(
                f"embedding is a {type(self.embedding).__name__} without a weight tensor, should "
                f"be a torch.nn.Embedding: it is the output matrix too"
            )
        if x.shape[-1:] != weight.shape[1:]:
            _fail(
                f"x has shape {tuple(x.shape)}, should be (..., hidden_size) with hidden_size = "
                f"{weight.shape[1]}"
            )
        check_weights("HybridLM.logits", "x", x, embedding=self.embedding)
        return over_vocabulary(x, weight)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        state: Sequence[LayerState] | None = None,
        eos_token_id: int | None = None,
        draft: HybridLM | Draft | None = None,
        draft_tokens: int | None = None,
        **unknown: Never,
    ) -> Tensor:
        """Continue prompts, a token at a time or by speculation: the same tokens in fewer calls.

        A draft proposes tokens, one call reads them all, and each row keeps those that the model
        would have chosen. Results follow the same distribution as without a draft; with
        temperature 0 they are the same tokens, up to rounding.

        Args:
            tokens: (B, T) int64, the prompts, T > 0.
            count: how many tokens are added.
            temperature: logits are divided by it; 0 takes the most likely token.
            generator: of the draws.
            state: what the model returned of a text before `tokens`, which it continues. It is not
                changed.
            eos_token_id: a token after which a row ends: what follows in the row is that token.
            draft: a HybridLM of the same vocabulary, a function from the tokens of one row so far,
                (length,), to those that may follow, or None for `PromptLookup`.
            draft_tokens: how many are proposed at a time; 4 when only a draft is given. No
                speculation when neither is given.

        Returns:
            (B, T + count), the prompts and what follows.

        Raises:
            SpecError: an argument has a wrong value, the prompts are not (B, T) or empty, the draft
                has another vocabulary or proposes what is no token, or, on a CPU, logits have no
                finite maximum.

        Source:
            Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv
            2211.17192.

        Example:
            >>> import torch
            >>> from gdn_ops.nn import HybridLM
            >>> model = HybridLM("GA", 50, 16, num_heads=2, window=8).double()
            >>> prompt = torch.tensor([[3, 1, 4, 1, 5, 3, 1, 4]])
            >>> plain = model.generate(prompt, 9, temperature=0)
            >>> torch.equal(model.generate(prompt, 9, temperature=0, draft_tokens=3), plain)
            True
        """
        if unknown:
            known = tuple(generation.Options._fields)
            refuse_input("HybridLM.generate", unknown, ("tokens", "count", *known), MODEL_INPUTS)
        options = generation.Options(
            temperature, generator, state, eos_token_id, draft, draft_tokens
        )
        return generation.generate(self, tokens, count, options)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups: matrices with weight decay; norms, gates, embedding without."""
        return optimizer_groups(self, weight_decay)

    def parameters_without_weight_decay(self) -> list[str]:
        """Return the names of the parameters that take no weight decay."""
        return parameters_without_weight_decay(self)


def _check_options(rule: str, mixer: dict[str, Any]) -> None:
    """Check what only some layers take, whether there are such layers or not."""
    if rule not in tuple(GATED_DELTA.rule):
        _fail(f"rule is {rule!r}, should be one of {', '.join(GATED_DELTA.rule)}")
    taken = (*_OPTIONS, *own_options(GatedDeltaNet))
    unknown = [name for name in mixer if name not in taken]
    if unknown:
        refuse_option("HybridLM", unknown, dict.fromkeys(taken), MODEL_OPTIONS)


def _fail(message: str) -> NoReturn:
    raise SpecError(f"HybridLM: {message}")


_OPTIONS = own_options(HybridLM)
