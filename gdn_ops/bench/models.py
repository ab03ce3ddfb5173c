"""Measure whole models of transformers, with their own delta rule and with gdn_ops, in turns.

One random Qwen3.5 in float32 or bfloat16: hidden 1024, four layers of which three are linear
attention, 16 key heads and 32 value heads of 128. Both ways run the same model object in the same
process, after their logits and loss were compared. Prefill and decode take turns in a process that
does nothing else, as one that serves: after a training step the C library's heap behaves
differently. In float32 the files that the model is exported to take turns there with it. A model
of a tenth of its weights is served, too: large ones are bound by reading their weights, small
ones by what surrounds the products. Peak memory is measured in a process of its own for each way.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gdn_ops.bench import exported, suite
from gdn_ops.bench.child import call
from gdn_ops.bench.device import Peak, find_device
from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.measures import memory_rows
from gdn_ops.bench.report import Log
from gdn_ops.bench.rows import Result, Target, timed_rows, with_target
from gdn_ops.bench.turns import REST, Timing, interleave
from gdn_ops.bench.verify import Check, RefusedError
from gdn_ops.compat.transformers import accelerate
from gdn_ops.dispatch import registry

PEER = "transformers"
ALLOWED = 1e-4
"""Largest relative difference of logits and loss that is the same model in float32."""

DTYPES = ("float32", "bfloat16")

ROUNDED = 1.5
"""The allowance of a bfloat16 model: its distance from the float32 model over that of transformers'
own, beyond the rounding of a result."""

STAGES = 5
"""Lines that `run` logs."""

DECODED = 8
"""Tokens per timed decode."""

DECODES = 8
"""Timed decodes for one prefill: they are shorter, and easier disturbed."""


@dataclass(frozen=True)
class Shape:
    """Describe a random Qwen3.5 and the number of tokens it reads.

    Attributes:
        tokens: of the prompt and of the training step.
        hidden, intermediate, layers, vocabulary: of the model; every fourth layer attends fully.
        key_heads, value_heads, width: of linear attention, K = V = width.
    """

    tokens: int = 2048
    hidden: int = 1024
    intermediate: int = 3584
    layers: int = 4
    vocabulary: int = 4096
    key_heads: int = 16
    value_heads: int = 32
    width: int = 128

    @property
    def case(self) -> str:
        """Return the name of the case."""
        return f"qwen3.5-{self.hidden}x{self.layers}-T{self.tokens}"


SMALL = Shape(hidden=256, intermediate=896, layers=8, key_heads=2, value_heads=4)
"""Describe the model whose decoding is bound by what surrounds its products."""

TARGETS = tuple(
    Target(what, shape.case, name, bound, at_least, True, text)
    for shape, name, what, bound, at_least, text in (
        (Shape(), "cpp", "prefill", 2.2, True, ">= 2.2x faster"),
        (Shape(), "cpp", "training step", 2.6, True, ">= 2.6x faster"),
        (Shape(), "torch", "prefill", 1.4, True, ">= 1.4x faster"),
        (Shape(), "torch", "training step", 2.0, True, ">= 2x faster"),
        (Shape(), "torch", "decode", 1.0, True, "not slower"),
        (Shape(), "onnxruntime", "decode", 2.0, True, ">= 2x faster"),
        (Shape(), "onnxruntime int8", "decode", 2.0, True, ">= 2x faster"),
        (SMALL, "onnx", "decode", 2.0, True, ">= 2x faster"),
        (SMALL, "onnxruntime", "decode", 2.0, True, ">= 2x faster"),
        (Shape(), "torch", "memory", 0.5, False, "<= 1/2"),
    )
)
"""On CPUs, those of "torch" for float32; memory is that of a training step."""


def build(shape: Shape, dtype: str = "float32") -> Any:
    """Return a random Qwen3.5 of a shape in a dtype, in eval mode.

    Raises:
        ValueError: transformers is not usable.
    """
    try:
        import transformers
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
    except ImportError as error:
        raise ValueError(f"bench models needs transformers with Qwen3.5: {error}") from error
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.hidden // 128 or 1,
        num_key_value_heads=max(1, shape.hidden // 512),
        head_dim=min(128, shape.hidden),
        linear_num_key_heads=shape.key_heads,
        linear_num_value_heads=shape.value_heads,
        linear_key_head_dim=shape.width,
        linear_value_head_dim=shape.width,
        pad_token_id=0,
    )
    return Qwen3_5ForCausalLM(config).eval().to(getattr(torch, dtype))


def prompt(shape: Shape) -> Tensor:
    """Return the tokens of the prompt, (1, T)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, shape.vocabulary, (1, shape.tokens), generator=generator, device="cpu")


def way(name: str) -> AbstractContextManager[Any]:
    """Return the context in which a model computes as the comparator of that name."""
    return contextlib.nullcontext() if name == PEER else accelerate(name)


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """Fill a cache and return the logits of the next token."""
    logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits


def training_step(model: Any, ids: Tensor) -> Tensor:
    """Compute the loss and its gradients; drop the gradients and return the loss."""
    loss: Tensor = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


class Decoder:
    """Decode tokens on and on, from a cache of its own."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model = model
        with torch.no_grad():
            self.cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self.token = ids[:, -1:]

    @torch.no_grad()
    def run(self) -> Tensor:
        """Decode DECODED tokens; return the logits of the last."""
        for _ in range(DECODED):
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
            self.token = out.logits.argmax(-1)
        logits: Tensor = out.logits
        return logits


def check(backends: Sequence[str]) -> None:
    """Refuse backends that do not run here, before minutes are spent.

    Raises:
        SpecError: the name of one is unknown.
        ValueError: one is not available.
    """
    for name in backends:
        backend = registry.get_backend(name)
        if isinstance(backend, str):
            raise ValueError(f"backend {name!r} is not available: {backend}")


def run(
    backends: Sequence[str],
    setting: Setting,
    log: Log,
    shape: Shape | None = None,
    small: Shape = SMALL,
) -> Result:
    """Compare the model under every backend with transformers' own, then measure.

    Args:
        backends: names of those that `accelerate` is given.
        setting: dtype, device and repeats.
        log: is told what starts now, in STAGES lines.
        shape: of the model; that of the full size when not given.
        small: a second model, of which prefill and decode are measured.

    Raises:
        RefusedError: a backend computes another model; nothing was timed.
        ValueError: a backend is unknown, transformers not usable, or the setting not float32 or
            bfloat16 on a CPU.
    """
    shape = shape or Shape()
    if setting.dtype not in DTYPES or setting.device != "cpu":
        known = " and ".join(DTYPES)
        raise ValueError(
            f"bench models measures {known} on cpu, not {setting.dtype} on {setting.device}"
        )
    check(backends)
    result, names = Result(suite.system(setting)), (PEER, *backends)
    result.system["model"], result.system["small"] = asdict(shape), asdict(small)
    _train(names, setting, log, shape, result)
    log("prefill and decode")
    _add_serving_rows(names, setting, shape, result)
    log("prefill and decode of a small model")
    _add_serving_rows(names, setting, small, result)
    log("memory of a training step")
    weigh = functools.partial(call, _weigh, shape=shape, dtype=setting.dtype)
    memory_rows(shape.case, names, PEER, weigh, result)
    is_exact = setting.dtype == "float32"
    targets = TARGETS if is_exact else [t for t in TARGETS if t.comparator == "cpp"]
    result.rows = [with_target(row, targets) for row in result.rows]
    return result


def _train(names: Sequence[str], setting: Setting, log: Log, shape: Shape, result: Result) -> None:
    """Compare logits and loss and time training steps, with a model that is freed afterwards."""
    log("logits and loss")
    model, ids = build(shape, setting.dtype), prompt(shape)
    result.checks += _verify(model, ids, names, shape.case)
    log("training step")
    actions = {name: functools.partial(_under, name, training_step, model, ids) for name in names}
    timing = interleave(actions, setting.repeats)
    result.rows += timed_rows("training step", shape.case, "ms", timing, PEER)


def _under(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    with way(name):
        return function(*arguments)


def _add_serving_rows(names: Sequence[str], setting: Setting, shape: Shape, result: Result) -> None:
    """Add the rows of prefill and decode, timed in a process of their own."""
    timings = call(_serve, names, setting.repeats, shape, setting.dtype)
    if isinstance(timings, str):
        result.skipped += [
            (f"{what}, {shape.case}", "all", timings) for what in ("prefill", "decode")
        ]
        return
    for what, per in (("prefill", 1), ("decode", DECODED)):
        result.rows += timed_rows(what, shape.case, "ms", timings[what], PEER, per=per)


def _serve(
    names: Sequence[str], repeats: int, shape: Shape, dtype: str
) -> dict[str, dict[str, Timing]]:
    """Time prefill and decode; return the timing by measurement and by comparator."""
    model, ids = build(shape, dtype), prompt(shape)
    actions: dict[str, Callable[[], Any]] = {
        name: functools.partial(_under, name, prefill, model, ids) for name in names
    }
    decodes = repeats * DECODES
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        if dtype == "float32" and not exported.why_not():
            files = stack.enter_context(exported.exported(model))
        # The threads of onnxruntime go on for a while, and would take those of torch their cores.
        rest = REST if files else 0.0
        actions |= {name: exported.prefill(session, ids) for name, session in files.items()}
        timings = {"prefill": interleave(actions, repeats, rest=rest)}
        for name in names:
            decoder = _under(name, Decoder, model, ids[:, :128])
            actions[name] = functools.partial(_under, name, decoder.run)
        for name, session in files.items():
            actions[name] = exported.decoder(session, ids[:, :128], DECODED, decodes + 2)
        return {**timings, "decode": interleave(actions, decodes, rest=rest)}


def _verify(model: Any, ids: Tensor, names: Sequence[str], case: str) -> list[Check]:
    """Compare logits and loss with those of transformers, rounded ones by what is exact."""
    results = {name: _results(name, model, ids) for name in names}
    exact, is_rounded = results[PEER], model.dtype != torch.float32
    if is_rounded:
        exact = _results(PEER, copy.deepcopy(model).float(), ids)
    checks = []
    for name in names[1:]:
        for i, what in enumerate(("logits", "loss")):
            allowed = ALLOWED
            if is_rounded:
                rounding = torch.finfo(model.dtype).eps
                allowed = ROUNDED * _error(results[PEER][i], exact[i]) + rounding
            against = "float32" if is_rounded else PEER
            error = _error(results[name][i], exact[i])
            check = Check(name, case, f"{what} against {against}", error, allowed)
            if not check.passed:
                raise RefusedError(str(check))
            checks.append(check)
    return checks


def _results(name: str, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a prefill and the loss, as a comparator computes them."""
    with way(name):
        return prefill(model, ids), training_step(model, ids)


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.float() - exact).norm() / exact.norm())


def _weigh(name: str, shape: Shape, dtype: str) -> Peak:
    """Return the peak memory of one training step, after one on a few tokens."""
    model, ids = build(shape, dtype), prompt(shape)
    with way(name):
        training_step(model, ids[:, :256])
        return find_device("cpu").peak(lambda: training_step(model, ids))
