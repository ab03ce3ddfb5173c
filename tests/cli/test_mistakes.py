"""A user's mistake, at any command, is a line on stderr and a documented exit code.

Commands and options are read from the parser, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from command_line import Result, run
from gdn_ops.cli import exit_codes
from gdn_ops.cli.commands import make_parser
from gdn_ops.cli.parser import Parser
from gdn_ops.dispatch import explain
from paths import ROOT
from processes import python

pytestmark = pytest.mark.usefixtures("given_rates")


def walk(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """Yield every command below a parser, as it is typed."""
    for name, command in parser.commands().items():
        yield (*words, name), command
        yield from walk(command, (*words, name))


COMMANDS = dict(walk(make_parser()))
LEAVES = {words: parser for words, parser in COMMANDS.items() if not parser.commands()}
NEEDED = {
    ("compile",): ("--backend", "triton"),
    ("plan",): ("--gpus", "2", "--tokens", "8"),
    ("export",): ("--heads", "1", "--key-dim", "2", "--out", "{folder}/x.onnx"),
    ("generate",): ("{folder}", "--tokens", "1"),
    ("completion",): (),
}
"""What a command cannot do without, so that its other arguments are looked at."""

VALUES = ("", "\0", "nope", "-1", "0", "1e999", "nan", "é", "9" * 30, "a,b", ",")
"""Given to every option that takes a value; each is a mistake wherever it is not in `FINE`."""

FINE = {
    # A text that nothing can be wrong with until the command has begun.
    "--seed": {"0"},
    "--scale": {"-1", "0", "9" * 30},
    "--seconds": {"9" * 30},
    "--minutes": {"0", "9" * 30},
    "--mlp-size": {"0"},
    "--out": {"nope", "-1", "0", "1e999", "nan", "é", "9" * 30, "a,b", ","},
}


def is_one_line(result: Result) -> bool:
    """Return whether a command failed as it should."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gdn-ops: "), line
    assert "Traceback" not in result.output and "fault of gdn_ops" not in line
    return result.exit_code in (exit_codes.WRONG, exit_codes.NOT_POSSIBLE)


def takers() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield every option that takes a value, with every wrong value."""
    for words, parser in LEAVES.items():
        for action in parser._actions:
            name = (action.option_strings or [""])[-1]
            if name.startswith("--") and action.nargs != 0:
                for value in VALUES:
                    if value not in FINE.get(name, ()):
                        yield words, name, value


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_wrong_value_of_every_option_is_a_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = [word.format(folder=tmp_path) for word in NEEDED.get(words, ())]
    tried = 0
    for command, name, value in takers():
        if command == words:
            at = needed.index(name) if name in needed else len(needed)
            rest = needed[:at] + needed[at + 2 :]
            result = run(*words, *rest, name, value, columns=80)
            assert is_one_line(result), (name, value, result)
            assert result.stdout == ""
            tried += 1
    mistakes = [
        "--nope",
        "--bakend=torch",
        "-x",
        "--js",
        "one too many",
        "\0",
        "é",
        "--",
        "--json=1",
    ]
    for mistake in mistakes:
        if words == ("info",) and mistake == "--":
            continue
        given = ["nope", mistake] if mistake == "--" else [mistake]
        result = run(*words, *needed, *given, columns=80)
        assert is_one_line(result), (mistake, result)
        tried += 1
    assert tried >= 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_help_fits_80_columns_and_shows_an_example(words: tuple[str, ...]) -> None:
    result = run(*words, "--help", columns=80)
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not any(sign in result.stdout for sign in "…│╭\x1b")
    if words:
        assert re.search(rf"\n  .*gdn-ops {words[0]}", result.stdout.partition("examples:")[2])
    for line in result.stdout.splitlines():
        assert not line.rstrip(" .)").endswith(" without"), line


EXPORT = "export --out {folder}/x.onnx"


@pytest.mark.parametrize(
    ("command", "text"),
    {
        "chek": "unknown command 'chek', known: info, check, bench, build, compile, plan, "
        "export, generate, demo, completion; did you mean 'check'?",
        "help": "there is no command help: gdn-ops --help tells more",
        "help check": "there is no command help: gdn-ops --help tells more",
        "check torch": "check: 'torch' is one argument too many, did you mean --backend torch?",
        "bench gpu tiny": "bench gpu: 'tiny' is one argument too many",
        "bench tiny gpu": "'gpu' is a command of its own and stands first: gdn-ops bench gpu",
        "bench tiny --device cuda": "device 'cuda' is not available: torch sees cpu",
        "check --device cuda:3": "device 'cuda:3' is not available: torch sees cpu",
        "check --device meta": "device 'meta' is not available: torch sees cpu",
        "bench torch": "'torch' is a backend, not a case: --backend torch",
        "bench tinny": "; did you mean 'tiny'?",
        "bench --backend trch": "; did you mean 'torch'?",
        "bench --peer transformer": "; did you mean 'transformers'?",
        "bench --what forwards": "; did you mean 'forward'?",
        "bench --dtype flaot32": "; did you mean 'float32'?",
        "bench tiny --bakend torch": "bench cases has no option --bakend, did you mean --backend?",
        "compile --backend triton --target sm90": "; did you mean 'sm_90'?",
        "compile --backend triton --target H100": "target 'H100' is the name of a GPU: use sm_90, ",
        "compile --backend triton --target mi300x": "use gfx942, its architecture",
        "compile --backend triton --target a6000": "unknown target 'a6000', known: sm_80, sm_90, ",
        "compile --backend torch": "backend 'torch' compiles nothing ahead of time",
        "compile tiny": "the following arguments are required: --backend",
        "export --heads 1 --key-dim 2 --out x --body standart": "; did you mean 'standard'?",
        "export --heads 1 --key-dim 2 --out x --value-heads 0": "--value-heads: is '0', should be "
        "an integer from 1",
        f"{EXPORT} --heads 1 --key-dim 2 --scale -1e39": "scale is -1e+39, should be a finite ",
        f"{EXPORT} --heads 1 --key-dim 2 --scale -inf": "--scale: is '-inf', should be a finite ",
        f"{EXPORT} --heads 1 --key-dim 1000000000": "there is not enough memory: ",
        f"{EXPORT} --heads 2147483647 --key-dim 2147483647": "there is not enough "
        "memory: Storage size calculation overflowed",
        "export --heads 1 --key-dim 2 --out /proc/x.onnx": "--out: '/proc' cannot be written: No "
        "such file or directory, should be writable",
        "bench tiny --plot /proc/x.svg": "--plot: '/proc' cannot be written: No such file or ",
        "bench tiny --out /proc": "--out: '/proc' cannot be written: No such file or directory",
        "export --rule delt": "--rule: unknown rule 'delt', known: gated_delta, delta, gated, "
        "linear; did you mean 'delta'?",
        "demo --limit -5": "--limit: is '-5', should be an integer from 64",
        "demo --limit 10": "--limit: is '10', should be an integer from 64",
        "demo {folder}": "'{folder}' is a folder, should be a text file",
        "demo {folder}/no": "'{folder}/no': No such file or directory",
        "demo --backend torhc": "; did you mean 'torch'?",
        "completion bsh": "SHELL: unknown shell 'bsh', known: bash, zsh, fish; did you mean 'bash",
        "bench --out {file}": "--out: '{file}' is a file, should be a folder",
        "bench --out {file}/x": "--out: '{file}/x' cannot be made: Not a directory, should be",
        "bench --plot {folder}/x.jpg": "--plot: '{folder}/x.jpg' should end in .png, .svg or .pdf",
        "bench --plot {folder}.png": "--plot: '{folder}.png' is a folder, should be a file",
        "bench models --out {file}": "--out: '{file}' is a file, should be a folder",
        "bench decode --library no": "--library: 'no' should be an existing file",
        "bench decode --library {file}": "custom_op_library '{file}' cannot be loaded by",
        "export --heads 1 --key-dim 2 --out {folder}": "--out: '{folder}' is a folder, should be",
        "export --heads 1 --key-dim 2 --out {pipe}": "--out: '{pipe}' is a device or a pipe, ",
        "bench tiny --plot {pipe}.png": "--plot: '{pipe}.png' is a device or a pipe, should be a f",
        "export --inspect {folder}": "--inspect is '{folder}', a folder, should be an ONNX file",
        "export --inspect {file}": "--inspect is '{file}', a text, should be an ONNX file",
        # Where an option has no effect, it is refused.
        "export --inspect {file} --heads 3": "--heads has no effect with --inspect: leave it out",
        "bench tiny --tune torch --peer none": "--peer has no effect with --tune: leave it out",
        "bench --what import --repeats 2": "--repeats has no effect on import: leave it out",
        "bench --what scaling --peer none": "--peer has no effect on scaling: leave it out",
        "bench --tune torch --dtype float32,bfloat16": "--dtype should be one dtype with --tune",
        "bench tiny --what step": "case 'tiny' is a sequence, which --what step does not measure",
        "bench tiny-step --what forward": "case 'tiny-step' is a case of one token, which --what",
        "bench tiny --what forward,step": "--what step needs a case of one token, got tiny",
    }.items(),
)
def test_a_mistake_is_told_with_what_to_do(command: str, text: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "cuda" in command:
        pytest.skip("there is a GPU")
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (tmp_path / "folder.png").mkdir()
    file.write_text("some text\n" * 20, encoding="utf-8")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    os.mkfifo(tmp_path / "pipe.png")
    names = {"folder": folder, "file": file, "pipe": pipe}
    result = run(*(word.format(**names) for word in command.split()), columns=80)
    assert is_one_line(result)
    assert result.exit_code == exit_codes.NOT_POSSIBLE
    assert text.format(**names) in result.stderr
    assert not list(folder.iterdir())
    assert pipe.is_fifo()


def test_export_makes_the_folder_of_its_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "a" / "b" / "step.onnx"
    assert run("export", "--heads", 1, "--key-dim", 2, "--out", path).exit_code == 0
    assert [x.name for x in path.parent.iterdir()] == ["step.onnx"]


TABLES = (
    "info",
    "check --backend naive --seconds 0.1 --seed 1",
    "bench tiny tiny-step --backend torch --repeats 1 --what forward,step,overhead",
    "export --heads 2 --key-dim 8 --out {folder}/x.onnx",
    "export --inspect {folder}/x.onnx",
    "demo {folder}/text --limit 200",
)


@pytest.mark.filterwarnings("ignore")
def test_every_table_fits_80_columns_and_is_json_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    # Others compile for seconds.
    kept = tuple(info for info in explain.list_backends() if info.name in ("torch", "naive"))
    monkeypatch.setattr(explain, "list_backends", lambda: kept)
    (tmp_path / "text").write_bytes(b"one memory, two memories, three memories. " * 6)
    for line in TABLES:
        words = line.format(folder=tmp_path).split()
        result = run(*words, columns=80)
        assert (result.exit_code, result.stderr) == (0, ""), result
        for shown in result.stdout.splitlines():
            # A path is told whole.
            assert len(shown) <= 80 or " " not in shown.strip(), shown
            assert not any(sign in shown for sign in "…│━\x1b")
        assert isinstance(json.loads(run(*words, "--json").stdout), dict)


def test_every_table_is_whole_where_there_is_no_room() -> None:
    wide = run("info", columns=200).stdout
    narrow = run("info", columns=30).stdout
    # The name of the first column stands over nothing where rows are blocks.
    assert set(narrow.split()) >= {word for word in wide.split() if word.isalpha()} - {"backend"}


def test_json_is_offered_wherever_something_is_reported() -> None:
    without = {words for words, parser in LEAVES.items() if "--json" not in parser.option_names()}
    assert without == {("completion",)}


# Terminals, pipes and signals.


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_text_fails_to_be_printed(encoding: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("grüße, Ωmega, 記憶 und … mehr davon, mehr davon\n" * 8, encoding="utf-8")
    code = "from gdn_ops.cli import main; from gdn_ops.dispatch import explain as e; "
    code += "a = e.list_backends; e.list_backends = lambda: a()[:1]; main()"
    done = python("-c", code, "demo", text, "--limit", 300, PYTHONIOENCODING=encoding, NO_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "next byte right" in done.stdout


def test_without_a_home_or_a_cache_nothing_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    done = python("-m", "gdn_ops", "info", HOME=str(file), XDG_CACHE_HOME="", GDN_OPS_CACHE="")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines() or [""]
    assert "Traceback" not in line
    check = ("check", "--backend", "naive", "--seconds", "0.1")
    done = python("-m", "gdn_ops", *check, GDN_OPS_CACHE=str(file / "x"))
    assert done.returncode == 0
    assert "could not be recorded: " in " ".join(done.stdout.split())


def test_a_closed_pipe_ends_quietly() -> None:
    line = f"{sys.executable} -m gdn_ops info --json; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({line}) | true"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.split() == [str(exit_codes.CLOSED_PIPE)]


def test_a_full_disk_under_the_output_is_a_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    line = f"{sys.executable} -m gdn_ops --help > /dev/full"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == exit_codes.NOT_POSSIBLE
    assert done.stderr == "gdn-ops: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("x"),
        RuntimeError("can't allocate memory: 9 bytes\nmore"),
        OSError(28, "No space left", "f"),
        KeyError(),
    ],
)
def test_what_goes_wrong_inside_is_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("gdn_ops.cli.info_command.collect", fail)
    result = run("info")
    texts = {
        MemoryError: (2, "gdn-ops: there is not enough memory: x\n"),
        RuntimeError: (2, "gdn-ops: there is not enough memory: can't allocate memory: 9 bytes\n"),
        OSError: (2, "gdn-ops: 'f': No space left\n"),
        KeyError: (3, "gdn-ops: KeyError: (a fault of gdn_ops; GDN_OPS_TRACEBACK=1 shows where, "
                      "please report it)\n"),
    }  # fmt: skip
    assert (result.exit_code, result.stderr) == texts[type(error)]
    monkeypatch.setenv("GDN_OPS_TRACEBACK", "1")
    assert ("Traceback" in run("info").stderr) == isinstance(error, KeyError)


# Completion.


@pytest.mark.parametrize(
    ("typed", "offered"),
    {
        "gdn-ops ": {"info", "check", "bench", "--version"},
        "gdn-ops bench ": {"gpu", "decode", "--what", "--tune"},
        "gdn-ops bench gpu --": {"--seconds", "--plot"},
        "gdn-ops export --he": {"--heads", "--help"},
    }.items(),
)
def test_bash_completes(typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    code = (
        f"{run('completion', 'bash').stdout}\nCOMP_WORDS=({' '.join(words[:-1])} '{words[-1]}')\n"
        f"COMP_CWORD={len(words) - 1}\n_gdn_ops\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert set(done.stdout.split()) >= offered
    assert all(word.startswith(words[-1]) for word in done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_knows_every_command_and_option(shell: str) -> None:
    script = run("completion", shell).stdout
    dashes = "-l " if shell == "fish" else "--"
    for words, parser in COMMANDS.items():
        assert words[-1] in script
        for name in parser.option_names():
            assert f"{dashes}{name[2:]}" in script
