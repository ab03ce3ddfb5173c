"""Every cell of the compose table does what it says."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import compose_subjects
from compose_subjects import (
    NO_GRADIENTS,
    backward_of_torch,
    gradients,
    in_a_fork,
    inputs,
    module,
    outcome,
)
from compose_table import COLUMNS, TABLE, markdown
from gdn_ops.backends.compile import Compile
from onnx_steps import Step, feed
from paths import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:backend .* emulates:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("traced_only", "one_thread"),
]
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace with torch.compile, but compile nothing, which takes seconds per shape."""
    monkeypatch.setattr(Compile, "compiler", "eager")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in model.named_parameters()}


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda weights, x: (functional_call(model, weights, (x,)) ** 2).sum()


def close(got: Any, right: Any) -> None:
    torch.testing.assert_close(got, right, **TOLERANCE)


# What a row does with a module; each compares numbers with plain eager ones.


def autocast(model: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = model(inputs())
    torch.testing.assert_close(y.float(), model(inputs()), rtol=0.05, atol=0.05)


def compiled(model: nn.Module) -> None:
    torch.compiler.reset()
    y = torch.compile(model, backend="eager", fullgraph=True)(inputs())
    close(y, model(inputs()))


def exported(model: nn.Module) -> None:
    program = torch.export.export(model, (inputs(),))
    close(program.module()(inputs()), model(inputs()))


def mapped(model: nn.Module) -> None:
    x = torch.stack([inputs(), -inputs()])
    with torch.no_grad():
        close(vmap(model)(x), torch.stack([model(y) for y in x]))


def differentiated(model: nn.Module) -> None:
    weights, loss = weights_of(model), loss_of(model)
    right = {
        n: g
        for (n, _), g in zip(
            weights.items(),
            torch.autograd.grad(
                loss(dict(model.named_parameters()), inputs()), list(model.parameters())
            ),
            strict=True,
        )
    }
    close(grad(loss)(weights, inputs()), right)
    value, pull = vjp(lambda w: loss(w, inputs()), weights)
    close(pull(torch.ones_like(value))[0], right)
    rows = torch.stack([inputs(), -inputs()])
    each = [grad(loss)(weights, x) for x in rows]
    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, rows)
    for name in weights:
        close(per_sample[name], torch.stack([one[name] for one in each]))


def pushed(model: nn.Module) -> None:
    weights, loss = weights_of(model), loss_of(model)
    v = {name: torch.ones_like(x) for name, x in weights.items()}
    _, tangent = jvp(lambda w: loss(w, inputs()), (weights,), (v,))
    close(tangent, torch.stack([x.sum() for x in grad(loss)(weights, inputs()).values()]).sum())


def bent(model: nn.Module) -> None:
    x = inputs()
    right = torch.autograd.functional.hessian(
        lambda b: (
            module("naive" if isinstance(model, compose_subjects.Mixer) else "layers")(b) ** 2
        ).sum(),
        x[:1, :2],
    )
    close(hessian(lambda b: (model(b) ** 2).sum())(x[:1, :2]), right)


def checkpointed(model: nn.Module) -> None:
    x = inputs().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False)
    (got,) = torch.autograd.grad((y**2).sum(), x)
    close(got, torch.autograd.grad((model(x) ** 2).sum(), x)[0])


def deep_copied(model: nn.Module) -> None:
    close(copy.deepcopy(model)(inputs()), model(inputs()))


def pickled(model: nn.Module) -> None:
    close(pickle.loads(pickle.dumps(model))(inputs()), model(inputs()))


def forked(model: nn.Module) -> None:
    y = model(inputs()).detach()  # Whatever is loaded or compiled before the fork.
    right = gradients(model, inputs())[0]

    def same() -> None:
        with torch.no_grad():
            close(model(inputs()), y)

    def same_gradients() -> None:
        model.zero_grad()
        close(gradients(model, inputs())[0], right)

    assert (got := in_a_fork(same)) == "works", got
    # Gradients are there wherever torch has them in forks.
    torch_says = in_a_fork(backward_of_torch)
    assert torch_says == "works" or torch_says.startswith(NO_GRADIENTS), torch_says
    assert (got := in_a_fork(same_gradients)) == torch_says, got


def threaded(model: nn.Module) -> None:
    xs = [inputs() * scale for scale in (1.0, 0.5, -1.0, 0.25)]
    right = [model(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for got in [list(pool.map(model, xs)) for _ in range(3)]:
            close(got, right)


MODULES: dict[str, Callable[[nn.Module], None]] = {
    "autocast": autocast,
    "torch.compile": compiled,
    "torch.export": exported,
    "vmap": mapped,
    "grad, vjp": differentiated,
    "jvp, forward mode": pushed,
    "hessian": bent,
    "checkpoint": checkpointed,
    "deepcopy": deep_copied,
    "pickle": pickled,
    "fork": forked,
    "threads": threaded,
}


# What a row does with a session.


def _numbers(session: Any) -> None:
    tokens, _ = Step(tokens=1).draw()
    other = Step().session()
    with torch.autocast("cpu", torch.bfloat16):
        o = session.step(**feed(tokens[0]))
    assert np.array_equal(o, other.step(**feed(tokens[0])))


def _tensors(run: Callable[[Callable[..., Any], Tensor], Any]) -> Callable[[Any], Any]:
    """Return a use of a session that gives a step a tensor in the place of its first array."""

    def use(session: Any) -> Any:
        tokens, _ = Step(tokens=1).draw()
        token = feed(tokens[0])
        name, array = next(iter(token.items()))
        return run(lambda x: session.step(**token | {name: x}), torch.from_numpy(array))

    return use


def _second_thread(session: Any) -> None:
    tokens, _ = Step(tokens=1).draw()
    with session._exclusive, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: session.step(**feed(tokens[0]))).result()


def _forked_session(session: Any) -> None:
    tokens, _ = Step(tokens=1).draw()
    text = in_a_fork(lambda: session.step(**feed(tokens[0])))
    if text != "works":
        raise RuntimeError(text)


def _parallel(session: Any) -> None:
    if not hasattr(session, "parameters"):
        raise TypeError("has no parameters: it is no torch module")


SESSIONS: dict[str, Callable[[Any], Any]] = {
    "autocast": _numbers,
    "torch.compile": _tensors(lambda step, x: torch.compile(step, backend="eager")(x)),
    "torch.export": _tensors(lambda step, x: step(x)),
    "vmap": _tensors(lambda step, x: vmap(step)(x)),
    "grad, vjp": _tensors(lambda step, x: grad(step)(x)),
    "jvp, forward mode": _tensors(lambda step, x: jvp(step, (x,), (x,))),
    "hessian": _tensors(lambda step, x: hessian(step)(x)),
    "checkpoint": _tensors(lambda step, x: checkpoint(step, x, use_reentrant=False)),
    "DDP": _parallel,
    "FSDP2": _parallel,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "fork": _forked_session,
    "spawn": pickle.dumps,
    "threads": _second_thread,
}


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Run DDP, FSDP2 or spawn for all columns in two processes; return outcomes by column."""
    context, done = multiprocessing.get_context("spawn"), {}
    columns = [c for c in COLUMNS if c != "DecodeSession"]

    def run(row: str) -> dict[str, str]:
        if row in done:
            return done[row]
        into = context.Queue()
        if row == "spawn":
            models = {column: module(column) for column in columns}
            workers = [
                context.Process(target=compose_subjects.spawned, args=(pickle.dumps(models), into))
            ]
        else:
            address = str(tmp_path_factory.mktemp("store") / "file")
            workers = [
                context.Process(
                    target=compose_subjects.distributed,
                    args=(rank, row, address, columns, into),
                )
                for rank in range(2)
            ]
        for worker in workers:
            worker.start()
        results = dict(into.get(timeout=240) for _ in columns)
        for worker in workers:
            worker.join(60)
        if row == "spawn":
            right = {c: gradients(module(c), inputs())[0].numpy() for c in columns}
            results = {
                c: outcome(lambda c=c, x=x: np.testing.assert_allclose(x, right[c], 2e-4, 2e-5))
                for c, x in results.items()
            }
        done[row] = results
        return results

    return run


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", TABLE)
def test_a_cell_does_what_it_says(
    row: str, column: str, in_processes: Callable[[str], dict[str, str]]
) -> None:
    if row == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    if column == "DecodeSession":
        session = Step().session()
        got = outcome(lambda: SESSIONS[row](session))
    elif row in MODULES:
        got = outcome(lambda: MODULES[row](module(column)))
    else:
        got = in_processes(row)[column]
    kind, _, reason = TABLE[row][column].partition(": ")
    assert got.startswith(kind) and reason in got, f"got {got}, should be {TABLE[row][column]}"


def test_no_cell_is_blank() -> None:
    for row, cells in TABLE.items():
        assert tuple(cells) == COLUMNS, f"{row} has {tuple(cells)}, should have {COLUMNS}"
        for text in cells.values():
            assert text == "works" or text.startswith("refused: "), f"{row} has {text!r}"


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    assert markdown() in page, f"docs/compose.md should have\n\n{markdown()}"


def test_every_row_is_tried_on_every_column() -> None:
    assert set(TABLE) == set(SESSIONS) == {*MODULES, "DDP", "FSDP2", "spawn"}
    assert Path(ROOT / "docs" / "compose.md").is_file()
