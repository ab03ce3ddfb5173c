"""`gdn-ops` prints what the library says and ends with the exit code that it means."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

import gdn_ops
from command_line import run
from gdn_ops.bench import suite
from gdn_ops.bench.verify import RefusedError
from gdn_ops.dispatch import explain, registry
from gdn_ops.environment import versions
from paths import ROOT
from processes import python

pytestmark = pytest.mark.usefixtures("given_rates")


def test_python_dash_m_ends_with_the_exit_code() -> None:
    done = python("-m", "gdn_ops", "check", "--backend", "nope")
    assert done.returncode == 2
    assert "gdn-ops: unknown backend 'nope', known: cpp, torch" in done.stderr


def test_the_command_needs_nothing_but_torch() -> None:
    code = "import sys; sys.modules['rich'] = None; from gdn_ops.cli import main; main(['info'])"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "available" in done.stdout


@pytest.mark.parametrize(
    ("command", "package", "text"),
    [
        ("bench decode", "onnx", "pip install 'gdn_ops[onnx]'"),
        ("export --heads 1 --key-dim 2 --out x.onnx", "onnx", "pip install 'gdn_ops[onnx]'"),
        ("export --inspect x.onnx", "onnx", "pip install 'gdn_ops[onnx]'"),
        ("bench models", "transformers", "bench models needs transformers with Qwen3.5"),
        ("bench tiny --plot x.png", "matplotlib", "pip install 'gdn_ops[cli]'"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(
    command: str, package: str, text: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from gdn_ops.cli import main; main()"
    done = python("-c", code, *command.split(), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gdn-ops: ") and text in line
    assert not list(tmp_path.iterdir())


def test_version_prints_the_version_of_the_package() -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"gdn_ops {gdn_ops.__version__}\n")


def test_info_lists_versions_and_every_backend() -> None:
    result = run("info")
    assert result.exit_code == 0
    assert re.search(rf"gdn_ops +{re.escape(gdn_ops.__version__)}", result.output)
    for backend in gdn_ops.list_backends():
        assert backend.name in result.output
    assert "any device; float64, float32, bfloat16, float16; second gradients" in result.output


def test_info_warns_of_a_version_that_was_never_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {"numpy": ("0.1", "0.2"), "torch": ("0.1", "99"), "python": ("3.90", "3.91")}
    monkeypatch.setattr(versions, "tested_ranges", lambda: ranges)
    numpy, python = importlib.metadata.version("numpy"), "{}.{}".format(*sys.version_info)
    expected = [
        f"numpy {numpy} is newer than 0.2, the newest that was tested: docs/versions.md",
        f"python {python} is older than 3.90, the oldest that was tested: docs/versions.md",
    ]
    assert re.findall(r"(?m)^warning +(.*)$", run("info").output) == expected
    assert json.loads(run("info", "--json").output)["warnings"] == expected
    monkeypatch.setattr(versions, "tested_ranges", dict)
    assert "warning" not in run("info").output


def test_info_as_json_has_the_limits_as_data() -> None:
    result = run("info", "--json")
    info = json.loads(result.output)
    assert info["versions"]["gdn_ops"] == gdn_ops.__version__
    assert info["devices"][0]["device"] == "cpu"
    by_name = {row["name"]: row for row in info["backends"]}
    assert by_name["torch"]["status"] == "available"
    assert by_name["torch"]["limits"]["devices"] == ["*"]


def test_check_says_why_a_backend_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get_backend", lambda name: "package 'x' is missing")
    result = run("check", "--backend", "torch")
    assert result.exit_code == 2
    assert "backend 'torch' is not available: package 'x' is missing" in result.stderr


def test_check_without_hypothesis_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in [name for name in sys.modules if name.startswith("gdn_ops.testing")]:
        monkeypatch.delitem(sys.modules, name)
    result = run("check", "--backend", "torch")
    assert result.exit_code == 2
    assert "pip install 'gdn_ops[testing]'" in result.stderr


BENCH = ("--backend", "torch", "--peer", "none", "--what", "forward", "--repeats", "1")


def test_bench_writes_its_result(tmp_path: Path) -> None:
    result = run("bench", "tiny", *BENCH, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "cpu-float32.json").read_text())
    assert [(row["what"], row["case"]) for row in data["rows"]] == [("forward", "tiny")]
    assert "conformance: torch on tiny" in result.output


def test_bench_that_measures_nothing_is_a_mistake() -> None:
    pytest.importorskip("triton")
    given = ("--backend", "triton", "--dtype", "float64", *BENCH[2:])
    result = run("bench", "tiny", *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "gdn-ops: nothing was measured: triton (tiny): dtype float64 (supported: bfloat16, "
        "float16, float32)\n"
    )


def test_bench_refuses_wrong_numbers_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = RefusedError("no times are shown, the numbers are wrong: x")
    monkeypatch.setattr(suite, "verify", mock.Mock(side_effect=refusal))
    result = run("bench", "tiny", *BENCH)
    assert result.exit_code == 1
    assert "no times are shown" in result.stderr
    assert "median" not in result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    {
        "bench nope": "unknown case 'nope', known: tiny, qwen",
        "bench --what speed": "unknown measurement 'speed', known: forward",
        "bench --backend nope": "unknown backend 'nope'",
        "bench --peer nope": "unknown peer 'nope', known: transformers",
        "bench --dtype int8": "--dtype: unknown dtype 'int8', known: float64",
        "bench --tune naive": "backend 'naive' exposes no configurations to tune",
        "check --backend naive --device nowhere": "device 'nowhere' is not available: ",
        "compile --backend nope": "unknown backend 'nope', known: ",
        "compile --backend naive": "backend 'naive' compiles nothing ahead of time",
        "demo {short}": "the text has 5 bytes, should have at least 64",
    }.items(),
)
def test_a_command_names_what_it_does_not_know(command: str, message: str, tmp_path: Path) -> None:
    short = tmp_path / "text.txt"
    short.write_bytes(b"short")
    result = run(*command.format(short=short).split())
    assert result.exit_code == 2
    assert f"gdn-ops: {message}" in result.stderr


def test_demo_reads_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes seconds, and warns of torch's own deprecations.
    kept = tuple(i for i in gdn_ops.list_backends() if i.name in ("torch", "naive"))
    monkeypatch.setattr(explain, "list_backends", lambda: kept)
    text = tmp_path / "text.txt"
    text.write_bytes(b"one memory, two memories, three memories. " * 6)
    result = run("demo", str(text), "--limit", "160")
    assert result.exit_code == 0, result.output
    assert "reads 160 bytes once" in result.output
    assert "exactly nothing of the past is left" in result.output
    # The prefix is the whole text, which is timed once.
    head = "backend  160 tokens  time over torch's  first calls cost  worst head's error\n"
    assert f"in turns, each warmed up before\n{head}" in result.output
    data = json.loads(run("demo", str(text), "--limit", "160", "--json").output)
    assert [row["whole"] for row in data["backends"]] == [None, None]
