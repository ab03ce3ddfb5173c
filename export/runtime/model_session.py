"""Generate text with an exported language model, by onnxruntime and numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdn_ops.export.bodies.table import BODIES
from gdn_ops.export.model.conversion import with_body
from gdn_ops.export.model.files import load_model
from gdn_ops.export.model.folder import GRAPH, Folder, read_folder
from gdn_ops.export.model.nodes import nodes_of, opset_of, own_nodes
from gdn_ops.export.node.arguments import check_flag, check_integer, check_name, check_type
from gdn_ops.export.runtime.decode_session import MOST_THREADS
from gdn_ops.export.runtime.sampling import Sampling
from gdn_ops.export.runtime.sessions import choose_body, open_session
from gdn_ops.export.runtime.text_generation import TextGeneration
from gdn_ops.export.runtime.text_pieces import TextPieces
from gdn_ops.export.runtime.text_run import TextRun, check_state, empty_state
from gdn_ops.export.runtime.text_state import TextState
from gdn_ops.export.runtime.tokenizer import Tokenizer, find_tokenizer
from gdn_ops.spec.errors import SpecError, SpecTypeError

Array = np.ndarray[Any, Any]

Prompt = str | Sequence[int]
"""A text, where there is a tokenizer, or its tokens."""

CHUNK = 512
"""Tokens of a prompt that are read in one call, where nothing else is asked for."""


class ModelSession:
    """Generate with a folder that `export_model` has written.

    Args:
        path: the folder.
        threads: that one operator computes with; onnxruntime's choice when not given.
        body: the function body of our nodes: "auto" takes the fastest that the installed
            onnxruntime has.
        checks_files: whether the checksums of the files are compared, which reads them whole.
        prompt_chunk: how many tokens of a prompt one call reads: memory and time of a call grow
            with them.

    Raises:
        SpecError: it is no such folder, a file is missing or has changed, or the installed
            onnxruntime does not take the graph.
        ModuleNotFoundError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        body: str = "auto",
        checks_files: bool = True,
        prompt_chunk: int = CHUNK,
    ) -> None:
        label = "ModelSession"
        check_integer(label, "prompt_chunk", prompt_chunk, 1)
        self.prompt_chunk = prompt_chunk
        check_flag(label, "checks_files", checks_files)
        if threads is not None:
            check_integer(label, "threads", threads, 1, MOST_THREADS)
        check_name(label, "body", body, ("auto", *BODIES))
        self.folder: Folder = read_folder(label, path, checks_files=checks_files)
        model = load_model(Path(path) / GRAPH, label=f"{label}: path")
        self.body: str | None = None
        if any(own_nodes(model.graph.node)):
            nodes, opset = nodes_of(model), opset_of(model)
            chosen = choose_body(nodes, body, has_library=False, opset=opset, label=label)
            self.body = None if chosen is None else chosen.name
            model = with_body(model, self.body, label)
        self._session = open_session(model, Path(path).absolute(), threads, None)
        self.tokenizer: Tokenizer | None = find_tokenizer(label, Path(path))

    def read(
        self, prompts: Prompt | Sequence[Prompt], state: TextState | None = None
    ) -> tuple[Array, TextState]:
        """Read texts to their ends.

        Args:
            prompts: one, or several: those that are shorter are padded in front, which changes
                nothing for them. With a state all of them have as many tokens.
            state: of an earlier call, whose texts go on; None to begin.

        Returns:
            logits (B, vocabulary) of what follows, or (B, T, vocabulary) where the graph has those
            behind all tokens, and the state behind the last token.

        Raises:
            SpecError: there is no token, one is not in the vocabulary, they are more than the
                model has positions for, or rows do not fit.
        """
        ids, mask, lengths = self._rows("ModelSession.read", prompts, state)
        self._check_length("ModelSession.read", "tokens of state and prompts", max(lengths), state)
        run, logits = self._begin("ModelSession.read", ids, mask, state)
        return logits, run.state()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int,
        *,
        state: TextState | None = None,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Continue prompts.

        Args:
            prompts: one text or several, or their tokens. Shorter ones are padded in front, which
                changes nothing for them.
            max_new_tokens: how many tokens are added at most.
            state: of an earlier call, whose texts the prompts continue; it is not changed.
            stop: tokens that end a text, beside those of the model; they are not returned.
            temperature: logits are divided by it; 0 takes the most likely token.
            top_k: how many of the most likely tokens are drawn from; 0 for all.
            top_p: the smallest set of most likely tokens with this probability is drawn from.
            seed: of the draws.

        Returns:
            What is added, as the prompts were given: a text or tokens, or a list of them.

        Raises:
            SpecError: an argument is wrong.
        """
        steps = self.stream(
            prompts, max_new_tokens, state=state, stop=stop,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
        given, is_text, is_one = _as_list(prompts)
        added: list[list[int]] = [[] for _ in given]
        for tokens in steps:
            for row, token in zip(added, tokens, strict=True):
                if token is not None:
                    row.append(token)
        found: list[Any] = [self._decoded(row) for row in added] if is_text else added
        return found[0] if is_one else found

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int,
        *,
        state: TextState | None = None,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int | None]]:
        """Yield the tokens that `generate` adds as they come: one a row, None where a text ended.

        Arguments and errors are those of `generate`; they are checked before the first token.
        """
        generation = self.begin(
            prompts, max_new_tokens, state=state, stop=stop,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
        return iter(generation)

    def begin(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int,
        *,
        state: TextState | None = None,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> TextGeneration:
        """Return what adds the tokens of `generate` by one call of the graph at a time.

        A thread that answers several users advances each of their generations in turn. Arguments
        and errors are those of `generate`; nothing is run yet.
        """
        label = "ModelSession.generate"
        check_integer(label, "max_new_tokens", max_new_tokens, 0)
        sampling = Sampling(temperature, top_k, top_p, seed)
        sampling.check(label)
        ends = {*self.folder.eos, *_as_tokens(label, "stop", stop)}
        ids, mask, lengths = self._rows(label, prompts, state)
        tokens = max(lengths) + max_new_tokens
        self._check_length(label, "prompt and new tokens", tokens, state)
        make = self._run_maker(label, state, len(ids), ids.shape[1] + max_new_tokens)
        return TextGeneration(make, ids, mask, max_new_tokens, sampling, ends, self.prompt_chunk)

    def stream_text(self, prompt: str, max_new_tokens: int, **options: Any) -> Iterator[str]:
        """Yield what `generate` adds to one text as pieces of text, each when it is complete.

        Arguments and errors are those of `generate`.
        """
        given: Any = prompt
        if not isinstance(given, str):
            kind = type(given).__name__
            raise SpecTypeError(f"ModelSession.stream_text: prompt has type {kind}, should be str")
        return self._pieces(self.stream(prompt, max_new_tokens, **options))

    def _pieces(self, steps: Iterator[list[int | None]]) -> Iterator[str]:
        assert self.tokenizer is not None
        pieces = TextPieces(self.tokenizer)
        for step in steps:
            for piece in (pieces.add(token) for token in step if token is not None):
                if piece:
                    yield piece
        if rest := pieces.finish():
            yield rest

    def _run_maker(
        self, label: str, state: TextState | None, rows: int, more: int
    ) -> Callable[[], TextRun]:
        """Check a state, and return what makes a run of it with room for more tokens."""
        if state is not None:
            check_state(label, self._session, self.folder, state)
        return lambda: TextRun(
            self._session,
            self.folder,
            empty_state(self._session, self.folder, rows) if state is None else state,
            more,
        )

    def _begin(
        self, label: str, ids: Array, mask: Array, state: TextState | None
    ) -> tuple[TextRun, Array]:
        """Read prompts in chunks; return the run and the logits behind the last token, or all."""
        run = self._run_maker(label, state, len(ids), ids.shape[1])()
        chunk = self.prompt_chunk
        found = [
            run.read(ids[:, start : start + chunk], mask[:, start : start + chunk])
            for start in range(0, ids.shape[1], chunk)
        ]
        if self.folder.logits == "all":
            return run, np.concatenate(found, 1)
        return run, found[-1][:, -1]

    def _rows(
        self, label: str, prompts: Any, state: TextState | None
    ) -> tuple[Array, Array, list[int]]:
        """Return prompts as tokens (B, T), padded in front, the mask, and their lengths."""
        given, is_text, _ = _as_list(prompts)
        if state is not None:
            check_type(label, "state", state, TextState, "a TextState")
        if is_text and self.tokenizer is None:
            raise SpecError(
                f"{label}: prompts are text, should be tokens: the folder has no tokenizer.json, "
                f"or the package tokenizers is not installed"
            )
        rows = [self._tokens(label, prompt) for prompt in given]
        if not rows:
            raise SpecError(f"{label}: prompts has no text, should have one or more")
        lengths = [len(row) for row in rows]
        if min(lengths) < 1:
            raise SpecError(f"{label}: a prompt has no token, should have one or more")
        if state is not None and (len(rows) != state.rows or len(set(lengths)) > 1):
            raise SpecError(
                f"{label}: prompts are {len(rows)} of {min(lengths)} to {max(lengths)} tokens, "
                f"should be {state.rows} of one length: they continue the rows of a state"
            )
        T = max(lengths)
        fill = self.folder.pad if self.folder.pad is not None else 0
        ids, mask = np.full((len(rows), T), fill, np.int64), np.zeros((len(rows), T), np.int64)
        for i, row in enumerate(rows):
            ids[i, T - len(row) :], mask[i, T - len(row) :] = row, 1
        return ids, mask, lengths

    def _tokens(self, label: str, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            return self.tokenizer.encode(prompt)
        tokens = _as_tokens(label, "a prompt", prompt)
        for token in tokens:
            if not 0 <= token < self.folder.vocabulary:
                raise SpecError(
                    f"{label}: a prompt has token {token}, should have tokens in "
                    f"[0, {self.folder.vocabulary - 1}]"
                )
        return tokens

    def _check_length(self, label: str, what: str, tokens: int, state: TextState | None) -> None:
        tokens += 0 if state is None else state.tokens
        if self.folder.longest and tokens > self.folder.longest:
            raise SpecError(
                f"{label}: {what} are {tokens}, should be at most {self.folder.longest}, the "
                f"positions that the model is made for"
            )

    def _decoded(self, tokens: list[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(tokens)

    def __repr__(self) -> str:
        f = self.folder
        return f"ModelSession({f.architecture}, {f.flavour}, body={self.body!r})"


def _as_tokens(label: str, name: str, tokens: Any) -> list[int]:
    """Return tokens as numbers of Python.

    Raises:
        SpecTypeError: they are no sequence, or hold something else than integers.
    """
    if isinstance(tokens, np.ndarray):
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        kind = type(tokens).__name__
        raise SpecTypeError(f"{label}: {name} has type {kind}, should be a list of tokens")
    for token in tokens:
        check_type(label, f"a token of {name}", token, int, "an integer")
    return [int(token) for token in tokens]


def _as_list(prompts: Any) -> tuple[list[Any], bool, bool]:
    """Return prompts as a list, whether they are text, and whether one was given alone."""
    if isinstance(prompts, str):
        return [prompts], True, True
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        kind = type(prompts).__name__
        raise SpecTypeError(
            f"ModelSession: prompts have type {kind}, should be a text, tokens, or a list of them"
        )
    items = list(prompts)
    if items and all(isinstance(item, str) for item in items):
        return items, True, False
    if items and all(isinstance(item, int | np.integer) for item in items):
        return [items], False, True
    for item in items:
        if isinstance(item, str) or not isinstance(item, Sequence | np.ndarray):
            raise SpecTypeError(
                f"ModelSession: prompts hold a {type(item).__name__}, should be all texts or all "
                f"lists of tokens"
            )
    return items, False, False
