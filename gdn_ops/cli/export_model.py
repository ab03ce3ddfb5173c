"""Run `gdn-ops export --model`: export a folder of transformers as a whole language model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdn_ops.cli import exit_codes
from gdn_ops.cli.parser import Options, UsageError
from gdn_ops.spec.errors import SpecError
from gdn_ops.terminal.output import check_folder, print_json
from gdn_ops.terminal.progress import progress
from gdn_ops.terminal.tables import wrapped

SCHEMA = 1
"""Version of the JSON layout; raised when a field changes its meaning."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""Files of which a folder with a tokenizer has one."""


def run_model(options: Options) -> int:
    """Load, export and compare a language model; return the exit code."""
    if options.out is None:
        raise UsageError("export --model needs --out: the folder to write")
    if options.weights not in (None, "float32") and options.flavour != "onnxruntime":
        raise UsageError(f"--weights {options.weights} needs --flavour onnxruntime")
    check_folder("--out", options.out if options.out.exists() else options.out.parent)
    with quiet(), progress(None, "export") as advance:
        advance("load")
        model, tokenizer = load(options.model)
        advance("write and compare")
        described = _export(model, tokenizer, options)
    size = sum(file.stat().st_size for file in options.out.iterdir() if file.is_file())
    if options.json:
        facts = {name: getattr(described, name) for name in _SHOWN}
        print_json({"schema": SCHEMA, "path": str(options.out), "bytes": size, **facts})
        return exit_codes.DONE
    print(options.out)
    print(
        wrapped(
            f"{described.architecture}, flavour {described.flavour}, weights {described.weights}, "
            f"{size / 1e6:.1f} MB{'' if tokenizer else ', without a tokenizer'}"
        )
    )
    print(wrapped(f"logits within {described.error:.2g} of the largest of the model's"))
    return exit_codes.DONE


_SHOWN = ("architecture", "flavour", "weights", "error", "states")


def _export(model: Any, tokenizer: Any, options: Options) -> Any:
    from gdn_ops.export import export_model
    from gdn_ops.export.model.folder import read_folder

    export_model(
        model,
        options.out,
        tokenizer=tokenizer,
        flavour=options.flavour or "portable",
        weights=options.weights or "float32",
    )
    return read_folder("export", options.out, checks_files=False)


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model of a folder of transformers in float32, and its tokenizer or None.

    Raises:
        SpecError: it is no such folder, or transformers cannot load it.
        ModuleNotFoundError: transformers is not installed.
    """
    with quiet() as transformers:
        return _loaded(transformers, folder)


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """Yield transformers, which neither warns nor shows progress until the end.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gdn-ops export --model needs transformers: pip install transformers", name=error.name
        ) from error
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _loaded(transformers: Any, folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise SpecError(
            f"--model is {str(folder)!r}, should be a folder of transformers, with a config.json"
        )
    # Its errors have no common base but Exception.
    try:
        json.loads((folder / "config.json").read_text())
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecError(
            f"--model is {str(folder)!r}, which transformers {transformers.__version__} cannot "
            f"load: {first}"
        ) from error
    return model.eval(), tokenizer
