"""Run `gdn-ops completion`: print a script that completes commands and options in a shell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gdn_ops.cli.bench_command import DEFAULT
from gdn_ops.cli.parser import Options, Parser, add_command, one_of

SHELLS = ("bash", "zsh", "fish")

_BASH = """# Completion of gdn-ops for bash: eval "$(gdn-ops completion bash)"
_gdn_ops() {
  local word=${COMP_WORDS[COMP_CWORD]} key= i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$key ${COMP_WORDS[i]}" in
%(steps)s
    esac
  done
  case $key in
%(words)s
  esac
}
complete -o default -F _gdn_ops gdn-ops
"""

_ZSH = """#compdef gdn-ops
# Completion of gdn-ops for zsh: eval "$(gdn-ops completion zsh)"
autoload -U +X bashcompinit && bashcompinit
"""


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "completion",
        run,
        "Print a script that completes commands and options in a shell.",
        more="The script needs no Python while you type. Evaluate it where the shell starts.",
        examples=(
            "echo 'eval \"$(gdn-ops completion bash)\"' >> ~/.bashrc",
            "gdn-ops completion fish > ~/.config/fish/completions/gdn-ops.fish",
        ),
    )
    parser.add_argument(
        "shell", type=one_of("shell", SHELLS), metavar="SHELL", help=", ".join(SHELLS)
    )


def run(options: Options) -> int:
    """Print the script of a shell; return the exit code."""
    # Import late: what lists the commands imports this module.
    from gdn_ops.cli.commands import make_parser

    print(script(options.shell, make_parser()), end="")
    return 0


def script(shell: str, parser: Parser) -> str:
    """Return the script of a shell for the commands of a parser."""
    if shell == "fish":
        return "\n".join(_fish(parser)) + "\n"
    steps, words = [], []
    for key, command in _walk(parser):
        below = command.commands()
        steps += [f"      '{key} {name}') key={_joined(key, name)} ;;" for name in below]
        # Offer the options of what runs where no command is named.
        implied = below[DEFAULT].option_names() if DEFAULT in below else []
        offered = " ".join(dict.fromkeys([*below, *command.option_names(), *implied]))
        words.append(f"    '{key}') COMPREPLY=($(compgen -W '{offered}' -- \"$word\")) ;;")
    bash = _BASH % {"steps": "\n".join(steps), "words": "\n".join(words)}
    return bash if shell == "bash" else _ZSH + bash.partition("\n")[2]


def _walk(parser: Parser, key: str = "") -> Iterator[tuple[str, Parser]]:
    """Yield every command with its key: the names that lead to it, with slashes between."""
    yield key, parser
    for name, command in parser.commands().items():
        yield from _walk(command, _joined(key, name))


def _joined(key: str, name: str) -> str:
    return f"{key}/{name}" if key else name


def _fish(parser: Parser) -> Iterator[str]:
    """Yield the lines of the script for fish."""
    yield "# Completion of gdn-ops for fish"
    for key, command in _walk(parser):
        names, below = key.split("/") if key else [], command.commands()
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in names)
        none_yet = f"not __fish_seen_subcommand_from {' '.join(below)}" if below else ""
        condition = "; and ".join(filter(None, [seen, none_yet])) or "true"
        for name in below:
            yield f"complete -c gdn-ops -n '{condition}' -a {name}"
        for option in command.option_names():
            yield f"complete -c gdn-ops -n '{seen or none_yet}' -l {option[2:]}"
