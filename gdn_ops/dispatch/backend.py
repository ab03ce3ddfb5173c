"""Define the base class of backends, its results and descriptions, and load backends."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gdn_ops._version import __version__
from gdn_ops.call.bind import Arguments, Call
from gdn_ops.dispatch.decode_fallbacks import one_by_one, through_rows
from gdn_ops.dispatch.results import Forward as Forward
from gdn_ops.dispatch.results import Grads as Grads
from gdn_ops.dispatch.results import Summarised as Summarised
from gdn_ops.dispatch.results import checked_step
from gdn_ops.spec.rules import Limits

Prepared = Callable[[Arguments], Any]
"""A function that runs calls of one signature."""

PreparedRaw = Callable[[Tensor | None, Tensor | None, Arguments], Any]
"""The same of calls whose gates are raw, given A_log and dt_bias."""


class RawGates(NamedTuple):
    """Say what is made of the raw gates of a step.

    Attributes:
        lower_bound: log α = lower_bound sigmoid(exp(A_log) (g + dt_bias)); or None, for
            −exp(A_log) softplus(g + dt_bias).
        beta_factor: β = beta_factor sigmoid(b).
    """

    lower_bound: float | None
    beta_factor: float


class Backend:
    """Implement the ops. Subclasses set the class data and define the methods.

    Attributes:
        name: what users pass as `backend=`.
        limits: what it can run.
        requires: import names of the packages it needs besides torch.
        distribution: the installed distribution that gives its version.
        differentiable: whether `forward` and `decode_one` are plain differentiable torch code, so
            that autograd sees through them in eager mode.
        traceable_step: whether `decode_one` may be traced through by torch.compile.
        kernels: whether it brings kernels of its own that a compiler turns into device code,
            so that GDN_OPS_REQUIRE_CERTIFIED=1 applies to it.
        has_stages: whether it runs a part of a sequence in two stages, where the state before it
            becomes known in between: `summarise` and `resume`, `summarise_gradients` and
            `resume_gradients`. A second stage repeats little of what the first one has done.
        has_walks: whether it forms the final state alone, and the gradient of the initial state
            alone, in less time than all results: `walk` and `walk_back`.
    """

    name: ClassVar[str]
    limits: ClassVar[Limits]
    requires: ClassVar[tuple[str, ...]] = ()
    distribution: ClassVar[str] = "gdn_ops"
    differentiable: ClassVar[bool] = False
    traceable_step: ClassVar[bool] = False
    kernels: ClassVar[bool] = False
    has_stages: ClassVar[bool] = False
    has_walks: ClassVar[bool] = False

    def absence(self) -> str | None:
        """Return why it can run no call at all in this process, or None."""
        return None

    def reasons(self, call: Call) -> list[str]:
        """Return the reasons against running a call, beyond those that `limits` gives."""
        return []

    def remarks(self, call: Call) -> list[str]:
        """Return what makes a call that it can run slower than it need be, for `explain`."""
        return []

    @classmethod
    def tools(cls, device: str) -> dict[str, str]:
        """Return the versions, by name, of further tools that make its code for a torch device.

        A certificate counts for these versions only, and for those of torch, `requires`, the
        driver and the backend's own source.
        """
        return {}

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        """Return empty tensors like those that `forward` saves for `backward`.

        It is called with fake tensors while a graph is traced.
        """
        return ()

    def forward(self, call: Call) -> Forward:
        """Run `gated_delta`."""
        raise _undefined(self, "forward", "ops")

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        """Return the gradients of `gated_delta`.

        Args:
            call: the call, on the tensors that the gradients are for.
            saved: the tensors that `forward` saved, or None: then form them anew from `call`, and
                differentiably where gradients are enabled (second derivatives).
            d_o: (B, T, HV, V) gradient of the output.
            d_state: (N, HV, K, V) gradient of the final state.

        Raises:
            NotImplementedError: the backend has none; its limits say `grad=False`.
        """
        raise _undefined(self, "backward", "grad")

    def summarise(self, call: Call) -> Summarised:
        """Run what `gated_delta` needs no initial state for: the first stage of a forward.

        Args:
            call: without an initial state.

        Raises:
            NotImplementedError: the backend has no stages.
        """
        raise _without_stage(self, "summarise")

    def resume(self, call: Call, kept: tuple[Tensor, ...]) -> Forward:
        """Run the rest, the second stage: return what `forward` would.

        Args:
            call: that of the first stage, with its initial state.
            kept: what `summarise` kept, shaped as in its result; it may be written to.

        Raises:
            NotImplementedError: the backend has no stages.
        """
        raise _without_stage(self, "resume")

    def summarise_gradients(
        self, call: Call, saved: tuple[Tensor, ...], d_o: Tensor, d_state: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the gradient of the initial state: the first stage of a backward.

        Args:
            call: that of `resume`.
            saved: the tensors that `resume` saved, shaped as in its result.
            d_o: (B, T, HV, V) gradient of the output.
            d_state: (N, HV, K, V) gradient of the final state; zeros where it is not known yet.

        Returns:
            That gradient (N, HV, K, V) in the compute dtype, and what `resume_gradients` reads.

        Raises:
            NotImplementedError: the backend has no stages.
        """
        raise _without_stage(self, "summarise_gradients")

    def resume_gradients(
        self, call: Call, saved: tuple[Tensor, ...], kept: tuple[Tensor, ...], d_o: Tensor,
        d_state: Tensor,
    ) -> Grads:  # fmt: skip
        """Return all gradients, the second stage: those that `backward` would.

        Args:
            call, saved, d_o: as in `summarise_gradients`.
            kept: what that one kept, shaped as it likes.
            d_state: (N, HV, K, V) gradient of the final state, known now.

        Raises:
            NotImplementedError: the backend has no stages.
        """
        raise _without_stage(self, "resume_gradients")

    def walk(self, call: Call) -> Tensor:
        """Return the final state of `gated_delta` alone, (N, HV, K, V) in the compute dtype.

        Raises:
            NotImplementedError: the backend has no walks.
        """
        raise _without_stage(self, "walk", "has_walks")

    def walk_back(self, call: Call, d_o: Tensor, d_state: Tensor) -> Tensor:
        """Return the gradient of the initial state alone, which does not depend on that state.

        Args:
            call: with or without an initial state.
            d_o: (B, T, HV, V) gradient of the output.
            d_state: (N, HV, K, V) gradient of the final state.

        Returns:
            That gradient (N, HV, K, V) in the compute dtype.

        Raises:
            NotImplementedError: the backend has no walks.
        """
        raise _without_stage(self, "walk_back", "has_walks")

    def pure(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run `gated_delta` so that every transform of torch.func sees through.

        A backend with `limits.forward_mode` has it. Nothing is written in place, and no value of a
        tensor is read except those of `call.cu_seqlens`.

        Returns:
            o (B, T, HV, V) in the dtype of v, final state (N, HV, K, V) in the compute dtype.
        """
        raise _undefined(self, "pure", "forward_mode")

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run `gated_delta_step`.

        Returns:
            o (B, HV, V) in the dtype of v, and the new state in the dtype of the given one (in
            the compute dtype if none was given); if in place it is `call.state` itself.

        With `limits.pools`, `call.state` may be a pool that `call.state_indices` points into;
        such a call is always in place, and o is 0 in rows that are skipped. Without, no call
        has `state_indices`.
        """
        raise _undefined(self, "decode_one", "ops")

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run `gated_delta_steps`, here by one `decode_one` after another.

        Returns:
            o (B, T, HV, V), the new state as from `decode_one`, and with `call.return_states` the
            states (B, T, HV, K, V) after every token, in the dtype of the state. Between the
            tokens of a call a state stays in the compute dtype.

        `call.state_indices` are as in `decode_one`; `states` is 0 in rows that are skipped.
        """
        if call.state_indices is not None:
            return through_rows(call, self.decode_many)
        return one_by_one(call, lambda one: checked_step(self, one, self.decode_one(one)))

    def prepared(self, call: Call) -> Prepared | None:
        """Return a function that runs calls like this one, or None where there is no shorter way.

        Args:
            call: a call without gradients and transforms, on tensors without memory. Every call of
                the function has tensors of the same shapes, strides and dtypes.

        Returns:
            A function from the arguments of a call to what `decode_one` or `decode_many` returns
            for it, or to (o, final_state). What the checks of a call find is already found, and no
            input lies in a state that is updated in place. Its results are not checked. It may
            return None as long as it has written nothing: the call then goes the long way.
        """
        return None

    def prepared_raw(self, call: Call, gates: RawGates) -> PreparedRaw | None:
        """Return a function that runs steps like this one, whose gates are raw, or None.

        Args:
            call: of `gated_delta_step`, as `prepared` takes it; log_alpha and beta are raw.
            gates: what is made of them.

        Returns:
            A function from A_log and dt_bias, float32 and contiguous or None, and the arguments of
            a call to what `decode_one` returns. It may return None as that of `prepared`.
        """
        return None


def _undefined(backend: Backend, method: str, limit: str) -> NotImplementedError:
    """Return the error of a backend whose limits allow what it has no method for."""
    return NotImplementedError(
        f"backend {backend.name!r} has no method {method!r}, which its limits promise: {limit}="
    )


def _without_stage(
    backend: Backend, method: str, promise: str = "has_stages"
) -> NotImplementedError:
    """Return the error of a backend that says it has stages or walks, and lacks one."""
    text = f"backend {backend.name!r} has no method {method!r}, which {promise}=True promises"
    return NotImplementedError(text)


def without_tokens(call: Call, saved: tuple[Tensor, ...]) -> Forward:
    """Return the results of a call without tokens: an empty o, and the initial state in float32."""
    s = call.sizes
    o = torch.empty((s.B, s.T, s.HV, s.V), dtype=call.tokens.v.dtype, device=call.device)
    if call.state is None:
        shape = (s.N, s.HV, s.K, s.V)
        return Forward(o, torch.zeros(shape, dtype=torch.float32, device=call.device), saved)
    return Forward(o, call.state.to(torch.float32, copy=True), saved)


def gradients_without_tokens(call: Call, d_state: Tensor) -> Grads:
    """Return the gradients of a call without tokens."""
    zeros = [None if x is None else torch.zeros_like(x) for x in (*call.tokens, call.state)]
    if call.state is None:
        return Grads(*zeros)
    return Grads(*zeros)._replace(state=d_state.to(call.state.dtype, copy=True))


@functools.cache
def is_missing(package: str) -> bool:
    """Return whether a package is missing, so that no import can find it."""
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


_MOVED = {
    "gdn_ops.backend": "gdn_ops.dispatch.backend",
    "gdn_ops.bind": "gdn_ops.call.bind",
    "gdn_ops.decoding": "gdn_ops.dispatch.decode_fallbacks",
    "gdn_ops.errors": "gdn_ops.spec.errors",
    "gdn_ops.gated_delta": "gdn_ops.spec.ops",
    "gdn_ops.numerics": "gdn_ops.call.numerics",
    "gdn_ops.registry": "gdn_ops.dispatch.registry",
    "gdn_ops.spec": "gdn_ops.spec.language",
}
"""New names of moved modules that a backend of another distribution may still import."""


def load(source: str) -> type[Backend] | str:
    """Load the backend class in `module` or `module:Class`, or say which package it lacks."""
    module_name, _, attribute = source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if error.name in _MOVED:
            text = f"{source} imports {error.name}, which is now {_MOVED[error.name]}"
            raise ImportError(text, name=error.name) from error
        if not isinstance(error, ModuleNotFoundError):
            raise
        package = (error.name or "").partition(".")[0]
        own = package in ("", "gdn_ops", module_name.partition(".")[0])
        if own or not is_missing(package):
            raise
        return f"package {package!r} is not installed"
    if attribute:
        cls: Any = getattr(module, attribute)
    else:
        cls = module.BACKEND
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise TypeError(f"{source} is not a subclass of gdn_ops.Backend")
    return cls


_MOVED_MEMBERS = {
    "step": "named decode_one",
    "steps": "named decode_many",
    "compiles_per_shape": "a row of gdn_ops.testing.compiled.COMPILED",
    "compiles_per_width": "a row of gdn_ops.testing.compiled.COMPILED",
}
"""Name what replaced members that a class of another distribution may still define."""


def check_members(cls: type[Backend]) -> None:
    """Check that a backend class has what every call reads of it, and nothing that none reads.

    Raises:
        TypeError: a member is missing, of a wrong type, or not read any more.
        ValueError: its name is one that means something else, or cannot stand in a list.
    """
    kinds = {"name": str, "limits": Limits, "requires": (tuple, list), "distribution": str}
    for member, kind in kinds.items():
        if not hasattr(cls, member):
            raise TypeError(f"{cls.__name__} has no class attribute {member!r}")
        value = getattr(cls, member)
        if not isinstance(value, kind):  # type: ignore[arg-type]
            should = {"limits": "a gdn_ops.Limits", "requires": "a tuple of names"}
            text = (
                f"{cls.__name__}.{member} is {value!r}, should be {should.get(member, 'a string')}"
            )
            raise TypeError(text)
    if cls.name in _RESERVED:
        raise ValueError(f"backend name {cls.name!r} is reserved")
    if not re.fullmatch(r"\w[\w.-]*", cls.name):
        text = "should be of letters, digits, '_', '-' and '.', and begin with none of the last two"
        raise ValueError(f"backend name is {cls.name!r}, {text}")
    for old, new in _MOVED_MEMBERS.items():
        if hasattr(cls, old):
            raise TypeError(f"{cls.__module__}.{cls.__qualname__}.{old} is now {new}")


_RESERVED = ("auto", "all", "none")
"""Names that `backend=` and `gdn-ops --backend` give another meaning."""


def announces(source: type[Backend] | str, cls: type[Backend]) -> bool:
    """Return whether `source` is the not yet loaded entry of the package that defines `cls`."""
    own = cls.__module__.partition(".")[0]
    return isinstance(source, str) and source.partition(":")[0].partition(".")[0] == own


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None; gdn_ops always has a version."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "gdn_ops":
            return None
    return __version__
