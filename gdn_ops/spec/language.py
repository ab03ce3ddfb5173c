"""Define the values that specify an op: they are frozen, and check and print themselves.

An `OpSpec` is data. Argument checks, the torch.library schema, hypothesis strategies, the
public docstring, the documentation page and the capability check are all derived from it,
so that a fact about the op stands in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from gdn_ops.spec.rules import FLOAT_DTYPES, Rule, require


@dataclass(frozen=True)
class Axis:
    """Describe one named tensor dimension, e.g. `T`, the number of tokens; with its least size."""

    name: str
    meaning: str
    minimum: int = 0

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"axis name {self.name!r} is not an identifier")
        require(bool(self.meaning), f"axis {self.name} has no meaning")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Interval:
    """Describe a closed interval of allowed values; infinite ends are allowed."""

    low: float
    high: float

    def __post_init__(self) -> None:
        require(self.low < self.high, f"interval [{self.low}, {self.high}] is empty")

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


def printed_shape(axes: tuple[str, ...]) -> str:
    """Return axes as a printed shape: `(B, T, H, K)`, `(N+1,)`."""
    return "(" + ", ".join(axes) + ("," if len(axes) == 1 else "") + ")"


@dataclass(frozen=True)
class Shape:
    """Describe one shape that a tensor argument may have.

    Attributes:
        axes: names of its dimensions, in order; "N+1" is one more than the axis N.
        given: name of an optional argument. The shape is the one, and only then, where that
            argument is given.
    """

    axes: tuple[str, ...]
    given: str | None = None

    def __str__(self) -> str:
        return printed_shape(self.axes) + (f" with {self.given}" if self.given else "")


def shapes(*texts: str) -> tuple[Shape, ...]:
    """Return shapes written as text: "B T HV", "P HV K V with state_indices"."""
    parts = (text.partition(" with ") for text in texts)
    return tuple(Shape(tuple(axes.split()), given or None) for axes, _, given in parts)


@dataclass(frozen=True)
class TensorArg:
    """Describe one tensor argument.

    Attributes:
        name: argument name in the public signature.
        shapes: the allowed shapes, the usual one first. Shapes under one condition differ in
            their number of dimensions.
        meaning: one line for the documentation.
        dtypes: names of the allowed torch dtypes.
        domain: allowed values, or None for every float.
        optional: whether None is allowed.
        differentiable: whether it has a gradient.
        same_dtype_as: name of the argument whose dtype it must share, or None.
        gate: whether it is a gate, that is, read in the compute dtype whatever it is stored in.
        stands_for: what the library calls it where ops name it differently: "state" for every
            argument that is the state before the first token; None for its own name.
        field: that name, under which a call of any op holds it.
    """

    name: str
    shapes: tuple[Shape, ...]
    meaning: str
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    domain: Interval | None = None
    optional: bool = False
    differentiable: bool = True
    same_dtype_as: str | None = None
    gate: bool = False
    stands_for: str | None = None
    field: str = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", self.stands_for or self.name)
        require(self.name.isidentifier(), f"argument name {self.name!r} is not an identifier")
        require(bool(self.shapes), f"{self.name} allows no shape")
        for shape in self.shapes:
            require(len(set(shape.axes)) == len(shape.axes), f"{self.name} repeats an axis")
        kinds = [(shape.given, len(shape.axes)) for shape in self.shapes]
        require(len(set(kinds)) == len(kinds), f"{self.name} has two shapes that look alike")
        require(bool(self.dtypes), f"{self.name} allows no dtype")
        require(bool(self.meaning), f"{self.name} has no meaning")

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the axes of its usual shape."""
        return self.shapes[0].axes

    @property
    def shape(self) -> str:
        """Return its usual shape as text: `(B, T, H, K)`, `(N+1,)`."""
        return printed_shape(self.axes)

    def __str__(self) -> str:
        domain = f" in {self.domain}" if self.domain else ""
        return f"{self.name} {self.shape}{domain}{' optional' if self.optional else ''}"


@dataclass(frozen=True)
class Attr:
    """Describe one argument that is not a tensor.

    Attributes:
        name: argument name in the public signature.
        type: the annotation, as text: "str", "bool", "float | None", "int | None".
        default: the default value.
        meaning: one line for the documentation.
        choices: the allowed values, or an empty tuple for any of the type.
        schema: its type in a torch.library schema, or None where it is not part of the
            operator (it then only shapes what the Python function does).
    """

    name: str
    type: str
    default: object
    meaning: str
    choices: tuple[object, ...] = ()
    schema: str | None = None

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"attribute name {self.name!r} is not an identifier")
        require(bool(self.meaning), f"{self.name} has no meaning")
        require(
            not self.choices or self.default in self.choices,
            f"default of {self.name} is {self.default!r}, not one of {self.choices}",
        )

    @property
    def field(self) -> str:
        """Return the name under which a call of any op holds it."""
        return self.name

    def __str__(self) -> str:
        return f"{self.name}={self.default!r}"


@dataclass(frozen=True)
class FrontAttr(Attr):
    """Describe an argument that the public function handles itself: no bound call has it."""


@dataclass(frozen=True)
class Output:
    """Describe one result of an op.

    Attributes:
        name: its name in schema and documentation.
        axes: names of its dimensions.
        dtype: "like:NAME" for the dtype of an argument, "compute" for float32 (float64
            when q is float64).
        meaning: one line for the documentation.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.axes)})"


@dataclass(frozen=True)
class Sizes:
    """Hold the size of every axis in one call. N is the number of sequences."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int

    @property
    def R(self) -> int:
        """Return the number of value heads per key head."""
        return self.HV // self.H if self.H else 1


@dataclass(frozen=True)
class Multiple:
    """Describe the constraint that one axis is a multiple of another.

    Attributes:
        axis: the axis that must be a multiple.
        of: the axis that must divide it.
        holder: the argument that an error names.
        meaning: what `axis` counts, for the error text.
    """

    axis: str
    of: str
    holder: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.axis} is a multiple of {self.of}"


@dataclass(frozen=True)
class Case:
    """Describe a named real workload for tests, benchmarks and tuning.

    Attributes:
        name: as the command line knows it.
        sizes: with B = 1 and the N of cu_seqlens where sequences are packed.
        source: whose workload it is.
        dtype: of q, k and v.
        lengths: tokens of the packed sequences, in turns; empty where none are packed.
        channels: whether every key channel has a decay.
    """

    name: str
    sizes: Sizes
    source: str
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = ()
    channels: bool = False

    def __str__(self) -> str:
        s = self.sizes
        decays = ", a decay per channel" if self.channels else ""
        return f"{self.name}: B={s.B} T={s.T} H/HV={s.H}/{s.HV} K={s.K} V={s.V}{decays}"


@dataclass(frozen=True)
class CostModel:
    """Hold the least cost of a call, as functions of its sizes.

    Attributes:
        flops: floating-point operations of the chunkwise forward, from sizes, chunk length, and
            `channels=`: whether every key channel has a decay.
        bytes: unavoidable memory traffic of the forward, from sizes, bytes per element, and
            `channels=`.
        state_bytes: size of the float32 state.
    """

    flops: Callable[..., float]
    bytes: Callable[..., float]
    state_bytes: Callable[[Sizes], float]


@dataclass(frozen=True)
class OpSpec:
    """Describe one op: everything that the rest of the library derives its behaviour from.

    Attributes:
        name: the op's name, in Python and in torch.library.
        summary: first line of the docstring.
        axes: every axis that an argument or output names.
        args: every argument, tensors and attributes, in the order of the public signature.
        outputs: the results.
        keyword_only_from: the name of the first keyword-only argument.
        rules: the rules that `rule=` chooses from.
        constraints: relations between axes.
        equations: the recurrence, a line each.
        sources: where it comes from.
        cost: flops, bytes and state bytes.
        cases: named workloads.
    """

    name: str
    summary: str
    axes: tuple[Axis, ...]
    args: tuple[TensorArg | Attr, ...]
    outputs: tuple[Output, ...]
    keyword_only_from: str
    rules: tuple[Rule, ...]
    constraints: tuple[Multiple, ...]
    equations: tuple[str, ...]
    sources: tuple[str, ...]
    cost: CostModel
    cases: tuple[Case, ...] = ()

    def __post_init__(self) -> None:
        names = [arg.name for arg in self.args]
        require(len(set(names)) == len(names), f"{self.name} names an argument twice: {names}")
        known = {axis.name for axis in self.axes}
        used = [(arg.name, shape.axes) for arg in self.tensors for shape in arg.shapes]
        for name, axes in (*used, *((output.name, output.axes) for output in self.outputs)):
            unknown = {axis.removesuffix("+1") for axis in axes} - known
            require(not unknown, f"{self.name}: {name} uses unknown axes {sorted(unknown)}")
        for arg in self.tensors:
            require(
                arg.same_dtype_as is None or arg.same_dtype_as in names,
                f"{self.name}: {arg.name} takes its dtype from unknown {arg.same_dtype_as}",
            )
            for shape in arg.shapes:
                require(
                    shape.given is None or shape.given in names,
                    f"{self.name}: {arg.name} is indexed by unknown {shape.given}",
                )
        for constraint in self.constraints:
            unknown = {constraint.axis, constraint.of} - known
            require(not unknown, f"{self.name}: {constraint} uses unknown axes {sorted(unknown)}")
        for output in self.outputs:
            kind, _, source = output.dtype.partition(":")
            require(
                kind == "compute" or (kind == "like" and source in names),
                f"{self.name}: output {output.name} has unknown dtype {output.dtype!r}",
            )
        require(
            self.keyword_only_from in names,
            f"{self.name}: keyword_only_from={self.keyword_only_from!r} is no argument",
        )
        require(bool(self.rules), f"{self.name} has no rule")
        # Filled now: torch.compile cannot trace the lock that fills a cached property.
        _ = (
            self.attrs,
            self.bound,
            self.tensor,
            self.rule,
            self.case,
            self.binding_order,
            self.bounded,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what copies and pickles it: its fields; an op of this library stays the one."""
        return _restored, (tuple(getattr(self, f.name) for f in dataclasses.fields(self)),)

    @cached_property
    def tensors(self) -> tuple[TensorArg, ...]:
        """Return the tensor arguments, in public order."""
        return tuple(arg for arg in self.args if isinstance(arg, TensorArg))

    @cached_property
    def binding_order(self) -> tuple[TensorArg, ...]:
        """Return the tensor arguments, those that define an axis before those that only use it."""
        return tuple(sorted(self.tensors, key=lambda arg: arg.axes[0] == "N"))

    @cached_property
    def bounded(self) -> tuple[tuple[TensorArg, Interval], ...]:
        """Return each tensor argument whose values have a domain, with the domain."""
        return tuple((arg, arg.domain) for arg in self.tensors if arg.domain is not None)

    @cached_property
    def attrs(self) -> tuple[Attr, ...]:
        """Return the arguments of a bound call that are not tensors, in public order."""
        return tuple(
            arg for arg in self.args if isinstance(arg, Attr) and not isinstance(arg, FrontAttr)
        )

    @cached_property
    def bound(self) -> tuple[TensorArg | Attr, ...]:
        """Return the arguments that a bound call has, in public order."""
        return tuple(arg for arg in self.args if not isinstance(arg, FrontAttr))

    @cached_property
    def tensor(self) -> Mapping[str, TensorArg]:
        """Return the tensor arguments by name."""
        return MappingProxyType({arg.name: arg for arg in self.tensors})

    @cached_property
    def rule(self) -> Mapping[str, Rule]:
        """Return the rules by name."""
        return MappingProxyType({rule.name: rule for rule in self.rules})

    @cached_property
    def case(self) -> Mapping[str, Case]:
        """Return the named workloads by name."""
        return MappingProxyType({case.name: case for case in self.cases})

    def parameters(self) -> tuple[tuple[str, object, bool], ...]:
        """Return (name, default, keyword-only) of every argument, in public order.

        A required argument has the default `...`.
        """
        first = [arg.name for arg in self.args].index(self.keyword_only_from)
        return tuple((arg.name, _default(arg), i >= first) for i, arg in enumerate(self.args))

    def printed_parameters(self) -> list[str]:
        """Return the parts of the signature: "q", "alpha=None", "*" before the first by name."""
        parts: list[str] = []
        for name, default, keyword_only in self.parameters():
            if keyword_only and "*" not in parts:
                parts.append("*")
            parts.append(name if default is ... else f"{name}={default!r}")
        return parts

    def __str__(self) -> str:
        outputs = ", ".join(str(output) for output in self.outputs)
        return f"{self.name}({', '.join(self.printed_parameters())}) -> {outputs}"


OPS_BY_NAME: dict[str, OpSpec] = {}
"""The ops of this library, which the module `ops` enters: code compares them by identity."""


def _restored(values: tuple[Any, ...]) -> OpSpec:
    spec = OpSpec(*values)
    known = OPS_BY_NAME.get(spec.name)
    return known if known == spec and known is not None else spec


def _default(arg: TensorArg | Attr) -> object:
    if isinstance(arg, Attr):
        return arg.default
    return None if arg.optional else ...
