"""Parse arguments: what is wrong with one is said in a line, with the nearest name."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gdn_ops.cli import exit_codes
from gdn_ops.dispatch.registry import known_backends
from gdn_ops.spec.names import nearest, unknown

Options = argparse.Namespace

ALL = ("all",)
"""The result of `names` for the word that means every name."""


class UsageError(Exception):
    """Report in words for the user why a command cannot do what is asked, with an exit code."""

    def __init__(self, text: str, code: int = exit_codes.NOT_POSSIBLE) -> None:
        super().__init__(text)
        self.code = code


class Parser(argparse.ArgumentParser):
    """Parse the arguments of a command; what is wrong ends in a UsageError."""

    def __init__(self, **options: Any) -> None:
        # A command that loses a letter of an option should not become another one some day.
        super().__init__(**options, allow_abbrev=False, formatter_class=_Formatter)
        # argparse before Python 3.14 takes -1e-3 and -inf for options.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)")
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} ({self.prog} --help tells more)")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse itself keeps silent where help cannot be written.
        print(message, end="", file=file)

    def option_names(self) -> list[str]:
        """Return the long options of the command."""
        actions = self._actions
        return [name for a in actions for name in a.option_strings if name.startswith("--")]

    def commands(self) -> dict[str, Parser]:
        """Return the commands below this one, by name."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


class _Once(argparse._StoreAction):
    """Store the value of an option, which cannot be given again: the first would be lost."""

    def __call__(self, parser: Any, namespace: Options, values: Any, option: Any = None) -> None:
        given = namespace.__dict__.setdefault("given", set())
        if self.option_strings and self.dest in given:
            raise argparse.ArgumentError(self, "is given twice, should be given once")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Format help in at most 80 columns, an option beside its text."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=28, **options)


def add_commands(parser: Parser, title: str = "commands") -> Any:
    """Return what commands are added to, below a parser."""
    return parser.add_subparsers(title=title, metavar="COMMAND", parser_class=Parser)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[Options], int],
    summary: str,
    *,
    more: str = "",
    examples: Sequence[str] = (),
) -> Parser:
    """Add a command and return its parser.

    Args:
        commands: what `add_commands` returned.
        name: as it is typed.
        run: carries out the parsed options and returns the exit code.
        summary: one line that says what it does.
        more: sentences below the summary in its own help.
        examples: command lines.
    """
    description = "\n\n".join(filter(None, [summary, textwrap.fill(more, 78)]))
    shown = "".join(f"  {line}\n" for line in examples)
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{shown}" if shown else None,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> Options:
    """Parse the arguments after the name of the program.

    Raises:
        UsageError: one of them is wrong.
    """
    _check_names(parser, arguments)
    options, extras = parser.parse_known_args(arguments)
    if extras:
        command: Parser = getattr(options, "parser", parser)
        raise UsageError(_unexpected(command, extras[0]))
    return options


def _check_names(parser: Parser, arguments: Sequence[str]) -> None:
    """Refuse a name where a command is meant that is none."""
    for word in arguments:
        commands = parser.commands()
        if not commands or word.startswith("-"):
            return
        if word == "help":
            raise UsageError(f"there is no command help: {parser.prog} --help tells more")
        if word not in commands:
            raise UsageError(unknown("command", word, commands))
        parser = commands[word]


def _unexpected(parser: Parser, word: str) -> str:
    name = word.partition("=")[0]
    if not word.startswith("-"):
        takes_backend = "--backend" in parser.option_names() and word in known_backends()
        hint = f", did you mean --backend {word}?" if takes_backend else ""
        return f"{parser.prog.removeprefix('gdn-ops ')}: {word!r} is one argument too many{hint}"
    near = nearest(name, parser.option_names())
    hint = f", did you mean {near}?" if near else ""
    return f"{parser.prog.removeprefix('gdn-ops ')} has no option {name}{hint}"


def names(text: str, alone: Sequence[str] = ("all",)) -> tuple[str, ...]:
    """Return the names in a list with commas, each once; ALL where it is "all".

    Args:
        text: as it was typed.
        alone: words that mean a whole list and stand beside no name.
    """
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"is {text!r}, should be names with commas, and no spaces, between"
        )
    for name in found:
        word = name.casefold()
        if word in alone and len(found) > 1:
            raise argparse.ArgumentTypeError(
                f"is {text!r}: {word!r} stands alone, without other names"
            )
        if word in alone and word != name:
            raise argparse.ArgumentTypeError(f"is {text!r}, did you mean {word!r}?")
    return found


def names_or_none(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas, none for "none", ALL for "all"."""
    found = names(text, ("all", "none"))
    return () if found == ("none",) else found


def one_name(text: str) -> str:
    """Return the one name that a text holds."""
    name = text.strip()
    if not name or "," in name:
        raise argparse.ArgumentTypeError(f"is {text!r}, should be one name")
    return name


def one_of(kind: str, known: Iterable[str]) -> Callable[[str], str]:
    """Return a type of argument: one of some names."""

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(unknown(kind, text, known))
        return text

    return name


def some_of(kind: str, known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a type of argument: some of some names, with commas between."""

    def several(text: str) -> tuple[str, ...]:
        return tuple(map(one_of(kind, known), names(text, ())))

    return several


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a type of argument: an integer within bounds."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            bounds = f"from {least}" + (f" to {most}" if most < 2**31 - 1 else "")
            raise argparse.ArgumentTypeError(f"is {text!r}, should be an integer {bounds}")
        return value

    return number


def real(least: float = -math.inf) -> Callable[[str], float]:
    """Return a type of argument: a finite number of at least some size."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            bound = f" of at least {least:g}" if math.isfinite(least) else ""
            raise argparse.ArgumentTypeError(f"is {text!r}, should be a finite number{bound}")
        return value

    return number


def path(text: str) -> Path:
    """Return a path; an empty text is none."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"is {text!r}, should be a path")
    return Path(text)


def refuse_without_effect(options: Options, given: Iterable[str], beside: str) -> None:
    """Refuse options that do nothing beside another one.

    Args:
        options: the parsed ones; None is an option that was not given.
        given: names of options that do nothing, with underscores.
        beside: the other option, or what it is that makes them useless.

    Raises:
        UsageError: one of them was given.
    """
    useless = [
        f"--{name.replace('_', '-')}"
        for name in given
        if getattr(options, name) is not None and getattr(options, name) is not False
    ]
    if useless:
        have = "has" if len(useless) == 1 else "have"
        them = "it" if len(useless) == 1 else "them"
        raise UsageError(f"{', '.join(useless)} {have} no effect {beside}: leave {them} out")
