"""Describe the folder of an exported language model, and read it again.

model.onnx         the graph
model.onnx.data    its weights
gdn_ops.json       what both are: sizes, states, special tokens, and checksums of the files
tokenizer.json     and what else belongs to the tokenizer, if there was one
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from gdn_ops.spec.errors import SpecError, SpecTypeError

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
DESCRIPTION = "gdn_ops.json"

TOKEN_IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"
"""Names of what a graph reads and returns beside its states."""

PAST, TOTAL, CAPACITY = "past_sequence", "total_sequence", "key_capacity"
"""Names of symbolic sizes: tokens before a call, behind it, and those a buffer has room for."""

SCHEMA = 1
"""Version of the description; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Folder:
    """Hold what the description of an exported model says.

    Attributes:
        architecture: of the model that was exported.
        flavour: "portable" or "onnxruntime".
        weights: "float32", "int8" or "int4".
        logits: "last" or "all", behind which tokens there are logits.
        vocabulary: how many tokens there are.
        longest: positions that the model is made for; 0 where it does not say.
        shares_keys: whether keys and values are written into the buffers that they are read from.
        states: the output that is the next value of each state input.
        eos, bos, pad: tokens that end a text, begin it, and fill rows.
        digests: the SHA-256 of each file by its name.
        error: largest difference between the logits of the graph and the model's, on seven random
            tokens, relative to the largest logit.
    """

    architecture: str
    flavour: str
    weights: str
    logits: str
    vocabulary: int
    longest: int
    shares_keys: bool
    states: dict[str, str]
    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    digests: dict[str, str]
    error: float = 0.0


def write_description(path: Path, folder: Folder) -> None:
    """Write the description of a folder to a file."""
    path.write_text(json.dumps({"schema": SCHEMA, **asdict(folder)}, indent=2) + "\n")


def read_folder(label: str, path: Any, *, checks_files: bool = True) -> Folder:
    """Read the description of an exported model.

    Args:
        label: who asks, for errors.
        path: the folder.
        checks_files: whether the checksums of its files are compared, which reads them whole.

    Raises:
        SpecError: it is no such folder, or a file is missing or has changed; the text names it.
    """
    if not isinstance(path, str | os.PathLike):
        raise SpecTypeError(f"{label}: path has type {type(path).__name__}, should be a path")
    folder = Path(path)
    where = f"{label}: path is {str(folder)!r},"
    try:
        text = (folder / DESCRIPTION).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{where} should be a folder with a {DESCRIPTION}, as `gdn-ops export --model` "
            f"writes it"
        ) from error
    read = _parsed(f"{where} whose {DESCRIPTION}", text)
    for name, digest in read.digests.items():
        _check_file(where, folder / name, digest if checks_files else None)
    return read


def _parsed(where: str, text: str) -> Folder:
    """Return what the text of a description says."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{where} is no JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        schema = facts.get("schema") if isinstance(facts, dict) else None
        raise SpecError(
            f"{where} has schema {schema!r}, should have {SCHEMA}, which this release of gdn_ops "
            f"reads: export the model again"
        )
    del facts["schema"]
    _check_facts(where, facts)
    return Folder(**{**facts, "eos": tuple(facts["eos"])})


def _check_facts(where: str, facts: dict[str, Any]) -> None:
    """Check that a description has what it should have, and that each fact has its type."""
    known = {field.name for field in fields(Folder)}
    for what, names in (("no", known - {*facts}), ("an unknown", {*facts} - known)):
        if names:
            raise SpecError(f"{where} has {what} {min(names)!r}: export the model again")
    for name, kind in get_type_hints(Folder).items():
        own = {"eos": list, "states": dict, "digests": dict}.get(name, kind)
        if not isinstance(facts[name], own):
            raise SpecError(
                f"{where} has {name} {facts[name]!r}, which is of another kind than it should be: "
                f"export the model again"
            )


def _check_file(where: str, file: Path, digest: str | None) -> None:
    """Check that a file is there and, given a checksum, that it has not changed."""
    if not file.is_file():
        raise SpecError(f"{where} where {file.name} is missing; export the model again")
    if digest is not None and digest_of(file) != digest:
        raise SpecError(
            f"{where} where {file.name} has changed since it was exported: its SHA-256 is another "
            f"one than {DESCRIPTION} says; export the model again"
        )


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
