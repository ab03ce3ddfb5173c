"""Generate with a language model, a token at a time or by speculation.

accept x ~ q with the chance min(1, p(x) / q(x)),   else x ~ (p − q)⁺ / Σ (p − q)⁺   ⇒   x ~ p
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn_ops.nn.drafts import Draft, PromptLookup, Proposals, proposed
from gdn_ops.nn.rollback import fork_state
from gdn_ops.nn.values import check_counts, check_logits, check_numbers, check_token_ids
from gdn_ops.spec.errors import SpecError, SpecTypeError

if TYPE_CHECKING:
    from gdn_ops.nn.hybrid import HybridLM, LayerState

OWNER = "HybridLM.generate"
DRAFT_TOKENS = 4
"""Bound the tokens that a draft proposes at a time, when a call does not say."""

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Lower ones act as this one does: the most likely token is drawn."""


class Options(NamedTuple):
    """Hold how a text is continued, as `HybridLM.generate` is told."""

    temperature: float
    generator: torch.Generator | None
    state: Sequence[LayerState] | None
    eos_token_id: int | None
    draft: HybridLM | Draft | None
    draft_tokens: int | None

    @property
    def most(self) -> int:
        """Return how many tokens are proposed at a time, 0 without speculation."""
        if self.draft_tokens is None:
            return 0 if self.draft is None else DRAFT_TOKENS
        return int(self.draft_tokens)


def generate(model: HybridLM, tokens: Tensor, count: int, options: Options) -> Tensor:
    """Continue prompts, as the method of the model says."""
    check_counts(OWNER, least=0, count=count)
    _check(options)
    check_token_ids("HybridLM", tokens, model.embedding)
    if tokens.shape[1] == 0:
        raise SpecError(
            f"HybridLM: tokens has shape {tuple(tokens.shape)}, should be (B, T) with T > 0"
        )
    # By a call of the model, not of its parts: what shards or compiles it notices calls alone.
    logits, state = model(tokens, options.state, is_last_only=True)
    _check_vocabulary(options, logits)
    if count == 0 or not len(tokens) or options.most == 0:
        return _one_at_a_time(model, tokens, count, options, logits, state)
    rows = _Rows(tokens, count, options.eos_token_id)
    draft = _ModelDraft(options.draft, options, tokens, logits) if is_model(options.draft) else None
    next_tokens = chosen(logits[:, -1], options)
    kept = rows.append(next_tokens, [1] * len(tokens))
    state = _kept_rows(state, kept, len(tokens))
    if draft is not None:
        draft.keep(kept, len(tokens))
    while rows.live:
        last, limits = rows.last(), [min(options.most, n - 1) for n in rows.room()]
        if draft is not None:
            proposals = draft.propose(last, limits)
        else:
            function: Any = options.draft or PromptLookup(options.most)
            size = logits.shape[-1]
            proposals = proposed(OWNER, function, rows.texts(), limits, options.most, size)
        read = torch.cat([last, proposals.tokens], 1)
        # Without proposals a plain step, which layers compute faster.
        call = {"return_states": True} if read.shape[1] > 1 else {}
        logits, states = model(read, state, **call)
        accepted, next_tokens = judge(logits, proposals, options)
        counts = [n + 1 for n in accepted.tolist()]
        kept = rows.append(_behind(proposals.tokens, accepted, next_tokens), counts)
        if kept:
            if call:
                states = states.after(_one_or_each(counts, last))
            state = _kept_rows(states, kept, len(counts))
            if draft is not None:
                draft.read(read, counts)
                draft.keep(kept, len(counts))
    return rows.text


def _one_at_a_time(
    model: HybridLM, tokens: Tensor, count: int, options: Options, logits: Tensor, state: Any
) -> Tensor:
    """Continue prompts a token at a time, from the logits behind them."""
    parts, eos = [tokens], options.eos_token_id
    has_ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    for place in range(count):
        token = chosen(logits[:, -1], options)
        if eos is not None:
            token = token.masked_fill(has_ended, eos)
            has_ended = token == eos
        parts.append(token)
        if eos is not None and bool(has_ended.all()):
            parts.append(token.expand(-1, count - place - 1))
            break
        if place + 1 < count:
            logits, state = model(token, state, is_last_only=True)
    return torch.cat(parts, 1)


def chances_of(logits: Tensor, temperature: float) -> Tensor:
    """Return the chance of every token in float32, given logits (..., vocab_size)."""
    # The largest is 0, so that no division by a small number overflows upwards.
    below = logits.float() - logits.float().amax(-1, keepdim=True)
    return (below / max(temperature, SMALLEST_TEMPERATURE)).softmax(-1)


def chosen(logits: Tensor, options: Options) -> Tensor:
    """Return the next token of every row, (B, 1), given logits (B, vocab_size)."""
    check_logits(OWNER, logits)
    if options.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    chances = chances_of(logits, options.temperature)
    return torch.multinomial(chances, 1, generator=options.generator)


def judge(logits: Tensor, proposals: Proposals, options: Options) -> tuple[Tensor, Tensor]:
    """Return how many proposals of each row are kept, (B,), and the token behind these, (B, 1).

    Args:
        logits: (B, n + 1, vocab_size), behind the last token and behind every proposal.
        proposals: n of each row.
        options: of the call.
    """
    tokens, n = proposals.tokens, proposals.tokens.shape[1]
    for place in range(n + 1):
        check_logits(OWNER, logits[:, place])
    counts = torch.tensor(proposals.counts, dtype=torch.int64, device=tokens.device)
    is_proposed = torch.arange(n, device=tokens.device) < counts[:, None]
    every = torch.arange(len(tokens), device=tokens.device)
    if options.temperature == 0:
        choices = logits.argmax(-1)
        is_kept = (choices[:, :n] == tokens) & is_proposed
        accepted = is_kept.long().cumprod(1).sum(1)
        return accepted, choices[every, accepted, None]
    chances = chances_of(logits, options.temperature)
    drawn = proposals.chances
    if drawn is None:
        drawn = nn.functional.one_hot(tokens, chances.shape[-1]).to(chances.dtype)
    p, q = (x[:, :n].gather(2, tokens[..., None])[..., 0] for x in (chances, drawn))
    u = torch.rand(p.shape, generator=options.generator, dtype=p.dtype, device=p.device)
    accepted = ((u * q < p) & is_proposed).long().cumprod(1).sum(1)
    # Nothing is proposed behind the last proposal: the rest is the whole distribution there.
    drawn = torch.cat([drawn * is_proposed[..., None], torch.zeros_like(chances[:, :1])], 1)
    rest = remainder(chances[every, accepted], drawn[every, accepted])
    return accepted, torch.multinomial(rest, 1, generator=options.generator)


def remainder(p: Tensor, q: Tensor) -> Tensor:
    """Return (p − q)⁺ (B, vocab_size), not normalised: what a rejected token is drawn from anew."""
    rest = (p - q).clamp(min=0)
    # Of equal distributions nothing is left, where rounding rejected a token all the same.
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def is_model(draft: Any) -> bool:
    """Return whether a draft is a language model, not a function."""
    return isinstance(draft, nn.Module) and hasattr(draft, "embedding")


class _ModelDraft:
    """Propose tokens by a smaller model, whose state follows that of the large one."""

    def __init__(self, model: Any, options: Options, tokens: Tensor, logits: Tensor) -> None:
        self.model, self.options = model, options
        own, self.state = self.model(tokens, is_last_only=True)
        _same_vocabulary(own.shape[-1], logits.shape[-1])

    def propose(self, last: Tensor, limits: list[int]) -> Proposals:
        """Return tokens behind the last ones (B, 1); the state stays before these."""
        token, state, options = last, self.state, self.options
        tokens, chances = [last[:, :0]], []
        for _ in range(max(limits)):
            logits, state = self.model(token, state, is_last_only=True)
            token = chosen(logits[:, -1], options)
            tokens.append(token)
            if options.temperature:
                chances.append(chances_of(logits, options.temperature))
        return Proposals(torch.cat(tokens, 1), limits, torch.cat(chances, 1) if chances else None)

    def read(self, tokens: Tensor, counts: list[int]) -> None:
        """Read the first tokens of each row."""
        _, states = self.model(tokens, self.state, return_states=True)
        self.state = states.after(_one_or_each(counts, tokens))

    def keep(self, rows: list[int], count: int) -> None:
        """Keep the states of some rows, out of so many."""
        self.state = _kept_rows(self.state, rows, count)


class _Rows:
    """Hold the texts of all rows, and which of them are not at their end."""

    def __init__(self, tokens: Tensor, count: int, eos_token_id: int | None) -> None:
        eos = 0 if eos_token_id is None else eos_token_id
        filler = tokens.new_full((len(tokens), count), eos)
        self.text = torch.cat([tokens, filler], 1).long()
        self.lengths = [tokens.shape[1]] * len(tokens)
        self.live = list(range(len(tokens)))
        self.eos_token_id = eos_token_id

    def append(self, tokens: Tensor, counts: list[int]) -> list[int]:
        """Append the first tokens of every live row, up to the end of its text.

        Args:
            tokens: (live rows, n).
            counts: how many of each row.

        Returns:
            Which of these rows go on, as places among them.
        """
        kept = []
        for place, (row, new, count) in enumerate(zip(self.live, tokens, counts, strict=True)):
            first, new = self.lengths[row], new[:count]
            ends = new == self.eos_token_id if self.eos_token_id is not None else new[:0]
            if bool(ends.any()):
                new = new[: int(ends.nonzero()[0]) + 1]
            self.text[row, first : first + len(new)] = new
            self.lengths[row] += len(new)
            if not bool(ends.any()) and self.lengths[row] < self.text.shape[1]:
                kept.append(place)
        self.live = [self.live[place] for place in kept]
        return kept

    def last(self) -> Tensor:
        """Return the last token of every live row, (B, 1)."""
        return torch.stack([self.text[row, self.lengths[row] - 1, None] for row in self.live])

    def texts(self) -> list[Tensor]:
        """Return the tokens of every live row."""
        return [self.text[row, : self.lengths[row]] for row in self.live]

    def room(self) -> list[int]:
        """Return how many tokens every live row still takes."""
        return [self.text.shape[1] - self.lengths[row] for row in self.live]


def _behind(tokens: Tensor, accepted: Tensor, next_tokens: Tensor) -> Tensor:
    """Return tokens (B, n + 1) with the next token of each row behind its accepted ones."""
    return torch.cat([tokens, next_tokens], 1).scatter(1, accepted[:, None], next_tokens)


def _one_or_each(counts: list[int], like: Tensor) -> int | Tensor:
    """Return one count of all rows where they agree, which costs less, or that of each."""
    if len(set(counts)) == 1:
        return counts[0]
    return torch.tensor(counts, dtype=torch.int64, device=like.device)


def _kept_rows(state: Any, rows: list[int], count: int) -> Any:
    return state if len(rows) in (0, count) else fork_state(state, rows)


def _check(options: Options) -> None:
    """Check the options of a call."""
    check_numbers(OWNER, temperature=options.temperature)
    generator, draft, eos = options.generator, options.draft, options.eos_token_id
    if generator is not None and not isinstance(generator, torch.Generator):
        raise SpecTypeError(
            f"{OWNER}: generator has type {type(generator).__name__}, should be a torch.Generator"
        )
    if eos is not None:
        check_counts(OWNER, least=0, eos_token_id=eos)
    if options.draft_tokens is not None:
        check_counts(OWNER, draft_tokens=options.draft_tokens)
    if draft is not None and not callable(draft):
        raise SpecTypeError(
            f"{OWNER}: draft has type {type(draft).__name__}, should be a HybridLM, a function "
            f"from tokens to tokens, or None"
        )


def _check_vocabulary(options: Options, logits: Tensor) -> None:
    """Check what has to fit the logits: device and sizes."""
    generator, eos, size = options.generator, options.eos_token_id, logits.shape[-1]
    if generator is not None and generator.device.type != logits.device.type:
        raise SpecError(
            f"HybridLM: generator is on {generator.device}, should be on {logits.device}, the "
            f"device of the logits"
        )
    if eos is not None and eos >= size:
        raise SpecError(f"{OWNER}: eos_token_id is {eos}, should be below vocab_size = {size}")
    if is_model(options.draft):
        _same_vocabulary(getattr(options.draft.embedding, "num_embeddings", size), size)  # type: ignore[union-attr]


def _same_vocabulary(own: int, size: int) -> None:
    if own != size:
        raise SpecError(
            f"{OWNER}: draft has vocab_size = {own}, should have {size}, that of the model"
        )
