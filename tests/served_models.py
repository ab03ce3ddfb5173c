"""Export a tiny model with drawn weights whose tokens are bytes, and serve it by a process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import compat_models
from gdn_ops.export.language_models.writing import export_model
from paths import ROOT

TOKENS = 257
"""The bytes, and one that marks an end, at which the model does not stop: answers are as long as
they are asked to be."""

SECONDS = 60.0
"""After which a test gives up waiting for a process."""


def export_tiny(folder: Path) -> Path:
    """Export a tiny model of bytes with its tokenizer into a folder."""
    config_name, more = compat_models.FAMILIES[compat_models.SMALL]
    sizes = {"vocab_size": TOKENS, "max_position_embeddings": 2**20, "eos_token_id": None}
    options = {**compat_models.COMMON, **more, **sizes}
    config = getattr(compat_models.transformers, config_name)(**options)
    torch.manual_seed(0)
    tiny = type(compat_models.model(compat_models.SMALL))(config).eval()
    with torch.no_grad():
        # As built, all tokens are about as likely, whatever the prompt.
        for parameter in tiny.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    export_model(tiny, folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are bytes, written as GPT-2 writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Those that print as themselves, the others from U+0100 on.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in letters]
    written = {byte: chr(byte) for byte in letters}
    written |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    made = Tokenizer(models.BPE({written[byte]: byte for byte in range(256)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


class Served:
    """Run the server of examples/serve_onnx on a free port.

    Args:
        folder: of the model.
        options: of its command line.
    """

    def __init__(self, folder: Path, *options: object) -> None:
        command = [sys.executable, "examples/serve_onnx", folder, "--port", 0, "--threads", 1]
        self.process = subprocess.Popen(
            list(map(str, (*command, *options))),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0
        self.first_line = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def wait(self) -> Served:
        """Wait until the server listens."""
        self.first_line = self._lines.get(timeout=SECONDS)
        assert self.first_line.startswith("serving "), self.first_line + self.rest()
        self.port = int(self.first_line.rsplit(":", 1)[1])
        return self

    def rest(self) -> str:
        """Wait for the end of the process, and return what it has printed since it listens."""
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return "".join(self._lines.queue)

    def kill(self) -> None:
        self.process.kill()
        self.rest()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def send(self, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
        """Send a request: a body of bytes, or of JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data)
        return connection

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return the status of an answer, and its JSON."""
        with contextlib.closing(self.send(method, path, body)) as connection:
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def complete(self, **fields: Any) -> tuple[int, Any]:
        return self.ask("POST", "/v1/completions", fields)

    def refusal(self, body: Any) -> tuple[int, str]:
        """Return the status and the text of a completion that is refused."""
        status, answer = self.ask("POST", "/v1/completions", body)
        assert answer["error"]["code"] == status
        return status, answer["error"]["message"]

    def open_stream(self, **fields: Any) -> http.client.HTTPConnection:
        return self.send("POST", "/v1/completions", {**fields, "stream": True})

    def counts(self) -> tuple[int, int]:
        """Return how many requests run, and how many wait."""
        status, health = self.ask("GET", "/health")
        assert status == 200
        return health["running"], health["waiting"]

    def resident(self) -> int:
        """Return the bytes of memory that the process has."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def events(answer: http.client.HTTPResponse) -> Iterator[Any]:
    """Yield the JSON of server-sent events, and the text [DONE]."""
    for line in answer:
        if line.strip():
            head, _, data = line.decode().strip().partition(": ")
            assert head == "data"
            yield data if data == "[DONE]" else json.loads(data)


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.01)
