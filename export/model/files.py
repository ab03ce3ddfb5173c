"""Load a model from a file, or say what is wrong with the file.

Everything that reads files reads them here. What a file holds is looked at before anything is made
of it: a foreign file is named by what it is, and a broken one is refused with the first thing that
is wrong in it, so that what is loaded can be read without surprises.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto

from gdn_ops.export.model.nodes import all_nodes, subgraphs
from gdn_ops.spec.errors import SpecError, SpecTypeError

MOST_BYTES = 2**31 - 1
"""Protobuf's limit for one message; the weights of larger models lie in other files."""

_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80": "a pickle, as torch.save once wrote it",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x7fELF": "a compiled library or program",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it",
    b"ORTM": "a model of onnxruntime's own format: keep the .onnx file it was made of",
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull fetches the file",
}
"""Names a kind of file by its first bytes."""

_ORT_MAGIC = slice(4, 8)

_TAGS = frozenset(b"\x08\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca")
"""The first bytes of the fields of a ModelProto: one of them begins the file."""

_LARGE = 2**20
"""Bytes above which a file is looked at before it is read."""


def load_model(
    path: str | os.PathLike[str], *, with_weights: bool = False, label: str = "load_model: path"
) -> ModelProto:
    """Load an ONNX model from a file.

    Args:
        path: of the file.
        with_weights: whether weights that lie in other files are loaded too; they are looked for
            beside the file in either case.
        label: who asks, and for which argument; errors begin with it.

    Raises:
        SpecError: there is no such file, it cannot be read, it is no ONNX model, it is cut off or
            damaged, or a file with its weights is missing. The text names the file.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise SpecTypeError(f"{label} has type {type(path).__name__}, should be a path")
    where = f"{label} is {os.fspath(path)!r},"
    data = _read(where, Path(path))
    model = _parsed(where, data, Path(path))
    check_sound(where, model)
    folder = Path(path).absolute().parent
    _check_weights(where, model, folder)
    if with_weights:
        # Its errors have no common base but Exception.
        try:
            onnx.load_external_data_for_model(model, str(folder))
        except Exception as error:
            raise SpecError(f"{where} whose weights cannot be loaded: {error}") from error
    return model


@contextlib.contextmanager
def about_file(path: object) -> Iterator[None]:
    """Begin errors about a model with the path that it was loaded from, if it is one."""
    try:
        yield
    except SpecError as error:
        if not isinstance(path, (str, os.PathLike)):
            raise
        raise type(error)(f"{os.fspath(path)!r}: {error}") from error


def _read(where: str, path: Path) -> bytes:
    """Return the bytes of a file that may be a model."""
    try:
        if path.is_dir():
            raise SpecError(f"{where} a folder, should be an ONNX file")
        if not path.is_file():
            raise SpecError(f"{where} should be an existing file")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
            kind = _foreign(head, size)
            if kind is not None:
                raise SpecError(f"{where} {kind}, should be an ONNX file")
            if size > _LARGE and head[0] not in _TAGS and not _is_text(head):
                raise SpecError(f"{where} a foreign file, should be an ONNX file")
            if size > MOST_BYTES:
                raise SpecError(
                    f"{where} which has {size} bytes, should have at most {MOST_BYTES}, protobuf's "
                    f"limit: save the model with save_as_external_data=True"
                )
            return head + file.read(MOST_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        # A null byte in a path is a ValueError.
        raise SpecError(f"{where} which cannot be read: {error}") from error


def _foreign(head: bytes, size: int) -> str | None:
    """Return what a file is by its first bytes, None where it may be a model."""
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic) or head[_ORT_MAGIC] == magic:
            return kind
    if size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file"
    return None


def _parsed(where: str, data: bytes, path: Path) -> ModelProto:
    """Return the model that bytes hold, in the format that the name of the file says."""
    if not data.strip(b"\0 \t\r\n"):
        raise SpecError(f"{where} an empty file, should be an ONNX file")
    kind = onnx.serialization.registry.get_format_from_file_extension(path.suffix)
    # Parsers' errors have no common base but Exception.
    try:
        model = onnx.load_model_from_string(data, format=kind or "protobuf")
    except Exception as error:
        kind = "a text" if _is_text(data) else "a foreign, cut off or damaged file"
        raise SpecError(f"{where} {kind}, should be an ONNX file") from error
    return model


def _is_text(data: bytes) -> bool:
    """Return whether bytes begin as a text does."""
    try:
        start = data[:256].decode()
    except UnicodeDecodeError:
        return False
    return all(x.isprintable() or x in "\t\r\n" for x in start)


def check_sound(where: str, model: ModelProto) -> None:
    """Check that a model can be read: that it is one, and that its names are texts.

    Raises:
        SpecError: it is none, or damaged; the text begins with `where`.
    """
    if not _is_readable(model):
        raise SpecError(f"{where} a damaged file: a name in it is no UTF-8 text")
    lacks = {
        "IR version": model.ir_version > 0,
        "opset": bool(model.opset_import),
        "nodes in its graph": bool(model.graph.node),
    }
    for what, is_there in lacks.items():
        if not is_there:
            raise SpecError(
                f"{where} a foreign, cut off or damaged file: as an ONNX model it has no {what}"
            )


def _is_readable(message: Message) -> bool:
    """Return whether every text in a message is one; numbers of weights are not looked at."""
    # Some releases of protobuf raise for a text that is no UTF-8, others return it as bytes.
    try:
        if isinstance(message, TensorProto):
            # Its numbers may be gigabytes.
            return isinstance(message.name, str) and all(map(_is_readable, message.external_data))
        fields = message.ListFields()
    except UnicodeDecodeError:
        return False
    for field, value in fields:
        values = [value] if isinstance(value, (str, bytes, Message)) else value
        if field.type == field.TYPE_STRING and not all(isinstance(x, str) for x in values):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_readable, values)):
            return False
    return True


def _check_weights(where: str, model: ModelProto, folder: Path) -> None:
    """Check that the files with a model's weights are there and long enough."""
    for tensor in _initializers(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        what = f"{where} whose weight {tensor.name!r} lies in {location!r}"
        try:
            start, length = (int(entry.get(key, "0")) for key in ("offset", "length"))
            have = (folder / location).stat().st_size if location else -1
        except (OSError, ValueError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            why = "a missing file" if is_missing else f"which cannot be read: {error}"
            raise SpecError(f"{what}, {why}: keep the files of a model together") from error
        if not location or start < 0 or length < 0 or start + length > have:
            raise SpecError(f"{what}, which has {max(have, 0)} bytes, should have {start + length}")


def _initializers(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in all_nodes(graph.node):
        for inner in subgraphs(node):
            yield from inner.initializer
