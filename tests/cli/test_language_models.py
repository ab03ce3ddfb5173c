"""From a folder of transformers to tokens: `gdn-ops export --model` and `gdn-ops generate`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import compat_models
import exported_models
from command_line import run
from compat_models import transformers
from exported_models import prompts, tokenizer
from gdn_ops.cli import exit_codes, export_command
from gdn_ops.export import ModelSession
from gdn_ops.export.language_models import flavours, quantising
from onnx_needs import needs_ort_body
from processes import python

TEXT = "one 😀"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model and its tokenizer as transformers does."""
    folder = tmp_path_factory.mktemp("saved")
    tiny = copy.deepcopy(exported_models.model(compat_models.SMALL))
    tiny.generation_config.eos_token_id = 1
    tiny.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speaking() -> Path:
    return exported_models.speaking()


def expected(text: str, count: int) -> str:
    """Return what transformers adds to a text."""
    ids = tokenizer()(text, return_tensors="pt")["input_ids"]
    tiny = exported_models.model(compat_models.SMALL)
    found = tiny.generate(
        ids, max_new_tokens=count, do_sample=False, eos_token_id=1, pad_token_id=0
    )
    added: str = tokenizer().decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return added


@needs_ort_body
def test_one_command_exports_and_one_generates_in_processes_of_their_own(
    saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    words = ("--model", saved, "--out", out, "--flavour", "onnxruntime")
    done = python("-m", "gdn_ops", "export", *words, COLUMNS="80")
    # Neither bars nor what transformers has to say of kernels.
    assert (done.returncode, done.stderr) == (0, "")
    path, what, error = done.stdout.splitlines()
    assert path == str(out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    architecture = exported_models.model(compat_models.SMALL).config.model_type
    assert what == f"{architecture}, flavour onnxruntime, weights float32, {size:.1f} MB"
    told = ModelSession(out).folder.error
    assert error == f"logits within {told:.2g} of the largest of the model's"
    assert 0 < told < 1e-5
    done = python("-m", "gdn_ops", "generate", out, "--prompt", TEXT, "--max-new-tokens", 24)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{TEXT}{expected(TEXT, 24)}\n"


def test_the_same_as_json_and_without_a_tokenizer(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "saved")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    out = tmp_path / "a" / "exported"
    result = run("export", "--model", folder, "--out", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "MB, without a tokenizer\n" in result.stdout
    result = run("export", "--model", folder, "--out", out, "--json")
    facts = json.loads(result.stdout)
    described = ModelSession(out).folder
    assert facts == {
        "schema": 1,
        "path": str(out),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "architecture": described.architecture,
        "flavour": "portable",
        "weights": "float32",
        "error": described.error,
        "states": described.states,
    }
    text = "ModelSession.generate: prompts are text, should be tokens: the folder has no "
    refused(("generate", out, "--prompt", "a"), f"{text}tokenizer.json, or the package tokenizers "
            f"is not installed")  # fmt: skip


def test_tokens_and_json_are_what_a_session_generates(speaking: Path) -> None:
    tokens, words = list(prompts()[1]), ",".join(map(str, prompts()[1]))
    added = ModelSession(speaking).generate(tokens, 12)
    shown = run("generate", speaking, "--tokens", words, "--max-new-tokens", 12, "--threads", 1)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout == ",".join(map(str, added)) + "\n"
    facts = json.loads(
        run("generate", speaking, "--tokens", words, "--max-new-tokens", 12, "--json").stdout
    )
    assert facts.pop("seconds") > 0
    assert facts == {
        "schema": 1, "prompt": tokens, "added": added, "body": ModelSession(speaking).body,
    }  # fmt: skip
    # Without a number, 64 are added.
    (line,) = run("generate", speaking, "--tokens", words).stdout.splitlines()
    assert line == ",".join(map(str, ModelSession(speaking).generate(tokens, 64)))


def test_draws_are_those_of_a_session(speaking: Path) -> None:
    drawing: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}
    added = ModelSession(speaking).generate(TEXT, 16, **drawing)
    words = [x for k, v in drawing.items() for x in (f"--{k.replace('_', '-')}", v)]
    call = ("generate", speaking, "--prompt", TEXT, "--max-new-tokens", 16, *words)
    assert run(*call).stdout == f"{TEXT}{added}\n"
    assert json.loads(run(*call, "--json").stdout)["added"] == added
    assert added != expected(TEXT, 16)


def refused(words: tuple[object, ...], text: str) -> None:
    """Check that a command ends with a line and the code of what is not possible."""
    result = run(*words)
    assert (result.stdout, result.stderr) == ("", f"gdn-ops: {text}\n")
    assert result.exit_code == exit_codes.NOT_POSSIBLE


@pytest.mark.parametrize(
    ("words", "text"),
    {
        "export --model {saved}": "export --model needs --out: the folder to write",
        "export --model {out} --out {out}/new": "--model is '{out}', should be a folder of "
        "transformers, with a config.json",
        "export --model {saved} --out {file}": "--out: '{file}' is a file, should be a folder",
        "export --model {saved} --out {file}/new": "--out: '{file}' is a file, should be a folder",
        "export --model {saved} --out /proc/new": "--out: '/proc' cannot be written: No such file "
        "or directory, should be writable",
        "export --model {saved} --out {out}/new --weights int8": "--weights int8 needs --flavour "
        "onnxruntime",
        "export --model {saved} --out {out}/new --heads 2 --qk-l2norm": "--heads, --qk-l2norm have "
        "no effect with --model: leave them out",
        "export --heads 2 --key-dim 4 --out {out}/new --flavour portable": "--flavour has no "
        "effect without --model: leave it out",
        "export --inspect {file} --weights int8": "--weights has no effect with --inspect: leave "
        "it out",
        "export --model {saved} --out {out}/new --flavour ort": "--flavour: unknown flavour 'ort', "
        "known: portable, onnxruntime (gdn-ops export --help tells more)",
        "generate {speaking}": "generate needs --prompt or --tokens, one of them",
        "generate {speaking} --prompt a --tokens 3": "generate needs --prompt or --tokens, one of "
        "them",
        "generate {out} --tokens 3": "ModelSession: path is '{out}', should be a folder with a "
        "gdn_ops.json, as `gdn-ops export --model` writes it",
        "generate {speaking} --tokens 3,97": "ModelSession.generate: a prompt has token 97, should "
        "have tokens in [0, 96]",
        "generate {speaking} --tokens 3,,4": "--tokens: is '3,,4', should be numbers of 0 and more "
        "with commas between (gdn-ops generate --help tells more)",
        "generate {speaking} --tokens 3 --max-new-tokens 512": "ModelSession.generate: prompt and "
        "new tokens are 513, should be at most 512, the positions that the model is made for",
        "generate {speaking} --tokens 3 --temperature -1": "ModelSession.generate: temperature is "
        "-1.0, should be 0 or more",
        "generate {speaking} --tokens 3 --temperature 1 --top-p 0": "ModelSession.generate: top_p "
        "is 0.0, should be above 0 and at most 1",
        "generate {speaking} --tokens 3 --top-k 4 --seed 2": "--top-k, --seed have no effect "
        "without a --temperature above 0: leave them out",
        "generate {speaking} --tokens 3 --temperature 0 --seed 2": "--seed has no effect without a "
        "--temperature above 0: leave it out",
    }.items(),
)
def test_a_mistake_is_told_with_what_to_do(
    words: str, text: str, saved: Path, speaking: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    out.mkdir()
    file.write_text("mine")
    names = {"saved": saved, "speaking": speaking, "out": out, "file": file}
    refused(tuple(word.format(**names) for word in words.split()), text.format(**names))
    assert list(out.iterdir()) == []
    assert file.read_text() == "mine"


def test_an_empty_prompt_is_refused(speaking: Path) -> None:
    refused(
        ("generate", speaking, "--prompt", ""),
        "ModelSession.generate: a prompt has no token, should have one or more",
    )


def test_what_transformers_cannot_load_is_told(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "saved")
    start = (
        f"gdn-ops: --model is {str(folder)!r}, which transformers {transformers.__version__} "
        f"cannot load: "
    )

    def said() -> str:
        result = run("export", "--model", folder, "--out", tmp_path / "new")
        assert (result.exit_code, result.stdout) == (exit_codes.NOT_POSSIBLE, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith(start)
        return line.removeprefix(start)

    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in said()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    assert "`nothing`" in said()
    (folder / "config.json").write_text("{")
    assert said() == "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert not (tmp_path / "new").exists()


def test_a_layer_without_onnx_form_is_told(tmp_path: Path) -> None:
    compat_models.model("qwen4_exp-2:1").save_pretrained(tmp_path / "saved")
    refused(
        ("export", "--model", tmp_path / "saved", "--out", tmp_path / "new"),
        "export_model: Qwen4ExpForCausalLM has no model.norm: it has no ONNX form",
    )
    assert not (tmp_path / "new").exists()


def test_transformers_speaks_again_when_it_was_loaded(saved: Path, tmp_path: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        assert run("export", "--model", saved, "--out", tmp_path / "new").stderr == ""
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


def test_the_command_knows_the_flavours_and_weights_of_the_exporter() -> None:
    assert tuple(flavours.FLAVOURS) == export_command.FLAVOURS
    assert tuple(quantising.BITS) == export_command.WEIGHTS
