"""Generate with a model of transformers by speculation, its linear attention included.

transformers refuses assisted generation for stateful models: it crops caches, and a recurrent
state cannot be cropped. Here the cache is forked before tokens are read that may be wrong, and set
back where some were. What was right is read again in the same call as the next proposals, so that
a rejected token costs no call of its own: a call reads all weights once, however few tokens it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gdn_ops.compat.transformers.cache_forks import CacheFork
from gdn_ops.nn.drafts import Draft, PromptLookup, Proposals, proposed
from gdn_ops.nn.values import check_counts, check_tensor, has_values
from gdn_ops.spec.errors import SpecError, SpecTypeError

OWNER = "speculative_generate"

MOST_READ_AGAIN = 8
"""Tokens that are read again with the next proposals; behind more a call goes without a draft."""

PLAIN = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
}
"""Settings of a generation_config with which the most likely token is the next one."""


@torch.no_grad()
def speculative_generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    draft: nn.Module | Draft | None = None,
    num_draft_tokens: int = 4,
    eos_token_id: int | Sequence[int] | None = None,
    cache: Any = None,
) -> Tensor:
    """Continue prompts by the most likely tokens, several a call where a draft is right.

    The tokens are those of `model.generate(input_ids, do_sample=False)`, up to rounding, with and
    without `accelerate`. The rows of a batch go on together, by the one that agrees least.

    Args:
        model: of transformers, a decoder with a language modelling head: Qwen3-Next, Qwen3.5,
            OLMo-Hybrid and every other whose cache has known layers.
        input_ids: (B, T) int64, the prompts, without padding.
        max_new_tokens: how many tokens are added at most.
        draft: another model with the same vocabulary, a function from the tokens of one row,
            (length,), to those that may follow, or None for `gdn_ops.nn.PromptLookup`.
        num_draft_tokens: how many are proposed at a time.
        eos_token_id: tokens that end a row, which is then padded; those of the model's
            `generation_config` when not given, none when empty.
        cache: what the model made of the first tokens, which are not read again. It is advanced:
            `copy.deepcopy(cache)` continues a prefix many times.

    Returns:
        (B, T + n), n at most max_new_tokens: less where every row has ended.

    Raises:
        SpecError: an argument has a wrong value, the draft has another vocabulary or proposes what
            is no token, the cache has a layer of an unknown class, or the generation_config asks
            for more than the most likely token.

    Source:
        Leviathan et al., arXiv 2211.17192.

    Example:
        >>> import torch
        >>> from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
        >>> from gdn_ops.compat.transformers import speculative_generate
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
        >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        >>> config = Qwen3_5TextConfig(vocab_size=50, pad_token_id=0, **sizes, **heads)
        >>> model = Qwen3_5ForCausalLM(config).eval()
        >>> ids = torch.tensor([[7, 3, 9, 7, 3]])
        >>> speculative_generate(model, ids, max_new_tokens=6).shape
        torch.Size([1, 11])
    """
    size = _check(model, input_ids, max_new_tokens, num_draft_tokens, draft)
    reader, ends = _Reader(model, cache), _Ends.of(model, eos_token_id)
    propose = _proposer(draft, num_draft_tokens, size)
    return _generate(reader, ends, propose, input_ids, max_new_tokens, num_draft_tokens)


def _generate(
    reader: _Reader,
    ends: _Ends,
    propose: Callable[[Tensor, list[int]], Proposals],
    text: Tensor,
    max_new_tokens: int,
    num_draft_tokens: int,
) -> Tensor:
    """Continue texts (B, T); the cache holds the first `read` tokens between two calls."""
    goal, read = text.shape[1] + max_new_tokens, reader.tokens()
    if not 0 <= read < text.shape[1]:
        _fail(f"cache holds {read} tokens, should hold fewer than T = {text.shape[1]}")
    lives = torch.ones(len(text), dtype=torch.bool, device=text.device)
    proposals = Proposals(text[:, :0], [0] * len(text))
    while True:
        logits = reader.read(torch.cat([text[:, read:], proposals.tokens], 1), proposals)
        new, is_right = _agreed(logits.argmax(-1), proposals, lives)
        if is_right:
            read = text.shape[1] + new.shape[1] - 1
            reader.fork = None
        else:
            reader.restore()
        new, lives = ends.end(new, lives)
        text = torch.cat([text, new], 1)
        if text.shape[1] == goal or not bool(lives.any()):
            return text
        count = goal - text.shape[1] - 1
        if text.shape[1] - read > MOST_READ_AGAIN or count == 0:
            proposals = Proposals(text[:, :0], [0] * len(text))
        else:
            limits = [min(num_draft_tokens, count) if is_live else 0 for is_live in lives.tolist()]
            proposals = propose(text, limits)


class _Reader:
    """Read tokens with a model and its cache, which can be set back."""

    def __init__(self, model: nn.Module, cache: Any) -> None:
        self.model: Any = model
        self.cache = cache
        self.fork: CacheFork | None = None if cache is None else CacheFork(OWNER, cache)
        parameters = inspect.signature(self.model.forward).parameters
        self.name = "cache" if "cache" in parameters else "past_key_values"
        self.has_keep = "logits_to_keep" in parameters

    def read(self, tokens: Tensor, proposals: Proposals | None = None) -> Tensor:
        """Return the logits behind the last token, and behind every proposal at the end of these.

        Args:
            tokens: (B, n).
            proposals: the last ones of them; the cache is forked before those are read.
        """
        count = 0 if proposals is None else proposals.tokens.shape[1]
        if count and self.fork is None:
            self.fork = CacheFork(OWNER, self.cache)
        options: dict[str, Any] = {self.name: self.cache, "use_cache": True}
        if self.has_keep:
            options["logits_to_keep"] = count + 1
        output = self.model(tokens, **options)
        if self.cache is None:
            self.cache = getattr(output, self.name)
            # Refused before anything is generated.
            CacheFork(OWNER, self.cache)
        logits: Tensor = output.logits[:, -count - 1 :]
        return logits

    def tokens(self) -> int:
        """Return how many tokens the cache holds."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def restore(self) -> None:
        """Set the cache back to its fork."""
        if self.fork is not None:
            self.fork.restore()


class _ModelDraft:
    """Propose the most likely tokens of another model."""

    def __init__(self, model: nn.Module, size: int) -> None:
        own = _vocabulary(model, "draft")
        if own != size:
            _fail(f"draft has vocab_size = {own}, should have {size}, that of the model")
        self.reader, self.has_read = _Reader(model, None), 0

    def __call__(self, text: Tensor, limits: list[int]) -> Proposals:
        """Return what follows texts (B, T); the cache stays behind these."""
        token = self.reader.read(text[:, self.has_read :]).argmax(-1)
        self.has_read, tokens = text.shape[1], [token]
        fork = CacheFork(OWNER, self.reader.cache)
        for _ in range(max(limits) - 1):
            token = self.reader.read(token).argmax(-1)
            tokens.append(token)
        fork.restore()
        return Proposals(torch.cat(tokens, 1), limits)


def _proposer(draft: Any, most: int, size: int) -> Callable[[Tensor, list[int]], Proposals]:
    """Return what maps texts (B, T) and the room in each to proposals."""
    if isinstance(draft, nn.Module):
        return _ModelDraft(draft, size)
    function: Draft = PromptLookup(most) if draft is None else draft
    return lambda text, limits: proposed(OWNER, function, [*text], limits, most, size)


def _agreed(choices: Tensor, proposals: Proposals, lives: Tensor) -> tuple[Tensor, bool]:
    """Return the next tokens (B, m + 1) of all rows, and whether all that was read is right.

    Args:
        choices: (B, n + 1), the most likely tokens behind the last one and behind every proposal.
        proposals: n of each row.
        lives: (B,), whether each row has not ended.
    """
    n = proposals.tokens.shape[1]
    counts = torch.tensor(proposals.counts, dtype=torch.int64, device=choices.device)
    is_proposed = torch.arange(n, device=choices.device) < counts[:, None]
    is_kept = (choices[:, :n] == proposals.tokens) & is_proposed
    accepted = is_kept.long().cumprod(1).sum(1).masked_fill(~lives, n)
    least = int(accepted.min())
    return choices[:, : least + 1], least == n


class _Ends(NamedTuple):
    """Hold the tokens that end a row, and the one that fills it."""

    tokens: list[int]
    padding: int

    @classmethod
    def of(cls, model: Any, eos_token_id: int | Sequence[int] | None) -> _Ends:
        """Return what a call and the generation_config of a model say."""
        config = getattr(model, "generation_config", None)
        given = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        tokens = [] if given is None else [given] if isinstance(given, int) else list(given)
        for token in tokens:
            check_counts(OWNER, least=0, eos_token_id=token)
        padding = getattr(config, "pad_token_id", None)
        return cls(tokens, next(iter(tokens), 0) if padding is None else int(padding))

    def end(self, new: Tensor, lives: Tensor) -> tuple[Tensor, Tensor]:
        """Return new tokens (B, n) with rows filled behind their end, and which rows go on."""
        if not self.tokens:
            return new, lives
        columns = []
        tokens = torch.tensor(self.tokens, dtype=torch.int64, device=new.device)
        for column in new.unbind(1):
            column = column.masked_fill(~lives, self.padding)
            columns.append(column)
            ended = torch.isin(column, tokens)
            lives = lives & ~ended
            if not bool(lives.any()):
                break
        return torch.stack(columns, 1), lives


def _check(model: Any, input_ids: Any, count: Any, most: Any, draft: Any) -> int:
    """Check the arguments of a call; return the size of the vocabulary."""
    check_counts(OWNER, max_new_tokens=count, num_draft_tokens=most)
    size = _vocabulary(model, "model")
    if getattr(model.config, "is_encoder_decoder", False):
        _fail(f"model is the {type(model).__name__}, should be a decoder without an encoder")
    check_tensor(OWNER, "input_ids", input_ids)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        _fail(f"input_ids has shape {tuple(input_ids.shape)}, should be (B, T), both above 0")
    if input_ids.dtype != torch.int64:
        dtype = str(input_ids.dtype).removeprefix("torch.")
        _fail(f"input_ids has dtype {dtype}, should be int64")
    if has_values(input_ids):
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= size:
            _fail(
                f"input_ids has values in [{low}, {high}], should be in [0, vocab_size - 1] = "
                f"[0, {size - 1}]"
            )
    if draft is not None and not callable(draft):
        raise SpecTypeError(
            f"{OWNER}: draft has type {type(draft).__name__}, should be a model of transformers, "
            f"a function from tokens to tokens, or None"
        )
    config = getattr(model, "generation_config", None)
    for name, value in PLAIN.items():
        given = getattr(config, name, None)
        if given is not None and given != value:
            _fail(
                f"generation_config.{name} is {given!r}, should be {value!r}: only the most likely "
                f"token is taken"
            )
    return size


def _vocabulary(model: Any, name: str) -> int:
    """Return the size of the vocabulary of a model of transformers."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        kind = type(model).__name__
        raise SpecTypeError(f"{OWNER}: {name} has type {kind}, should be a model of transformers")
    return int(config.get_text_config().vocab_size)


def _fail(text: str) -> NoReturn:
    raise SpecError(f"{OWNER}: {text}")
