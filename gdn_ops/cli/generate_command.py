"""Run `gdn-ops generate`: continue a text with an exported language model."""

from __future__ import annotations

import argparse
import time
from typing import Any

from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import (
    Options,
    UsageError,
    add_command,
    integer,
    path,
    real,
    refuse_without_effect,
)
from gdn_ops.terminal.output import print_json

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""

LENGTH = 64
"""Tokens that are added when nothing is said."""


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "generate",
        run,
        "Continue a text with a language model that export --model has written.",
        more="onnxruntime runs it. The text goes on as it comes.",
        examples=(
            'gdn-ops generate exported --prompt "The gated delta rule"',
            "gdn-ops generate exported --tokens 12,7,99 --max-new-tokens 16 --json",
        ),
    )
    parser.add_argument("folder", type=path, metavar="DIR", help="the exported model")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    parser.add_argument("--tokens", type=tokens, metavar="IDS", help="or its tokens, with commas")
    for name, kind, metavar, text in (
        ("--max-new-tokens", integer(1), "N", f"tokens to add at most (default: {LENGTH})"),
        ("--temperature", real(), "NUMBER", "draw from logits divided by it (default: 0, greedy)"),
        ("--top-k", integer(0), "N", "draw from the most likely tokens only (default: 0, all)"),
        ("--top-p", real(), "NUMBER", "draw from the most likely mass only (default: 1)"),
        ("--seed", integer(0), "N", "seed of the draws (default: 0)"),
        ("--threads", integer(1), "N", "threads of an operator (default: onnxruntime's choice)"),
    ):
        parser.add_argument(name, type=kind, metavar=metavar, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON when all is there")


def tokens(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(
            f"is {text!r}, should be numbers of 0 and more with commas between"
        )
    return found


def run(options: Options) -> int:
    """Generate, and print what comes; return the exit code."""
    if (options.prompt is None) == (options.tokens is None):
        raise UsageError("generate needs --prompt or --tokens, one of them")
    if not options.temperature:
        greedy = "without a --temperature above 0"
        refuse_without_effect(options, ("top_k", "top_p", "seed"), greedy)
    from gdn_ops.export import ModelSession

    session = ModelSession(options.folder, threads=options.threads)
    given = options.tokens if options.prompt is None else options.prompt
    drawing = {
        name: value
        for name in ("temperature", "top_k", "top_p", "seed")
        if (value := getattr(options, name)) is not None
    }
    count = options.max_new_tokens or LENGTH
    if options.json:
        start = time.perf_counter()
        added = session.generate(given, count, **drawing)
        seconds = time.perf_counter() - start
        print_json(
            {"schema": SCHEMA, "prompt": given, "added": added, "seconds": seconds,
             "body": session.body}
        )  # fmt: skip
        return exit_codes.DONE
    if options.prompt is not None:
        pieces = session.stream_text(given, count, **drawing)
        print(given, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return exit_codes.DONE
    print(",".join(map(str, session.generate(given, count, **drawing))))
    return exit_codes.DONE
