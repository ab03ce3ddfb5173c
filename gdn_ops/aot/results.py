"""Hold the calls to compile ahead of time, and the kernels that were compiled for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from gdn_ops.aot.machine_code import Code, Counts
from gdn_ops.aot.model import Prediction
from gdn_ops.call.bind import Call


@dataclass(frozen=True, eq=False)
class Sample:
    """Hold a call of the public API on meta tensors, which have shapes but no memory.

    Attributes:
        label: what the call is, in words for a table.
        call: the bound call; with `needs_grad`, its gradients are meant too.
        is_reference: whether it must be fast without any option: bfloat16, K = V = 128, nothing
            but defaults.
    """

    label: str
    call: Call
    is_reference: bool


@dataclass(frozen=True)
class TimedLaunch:
    """Describe one launch of a compiled kernel, with its predicted time.

    Attributes:
        sample: label of the sample that makes it.
        direction: "forward", "backward" or "decode".
        order: its place among the launches of the sample in that direction.
        grid: how many programs it has along each axis.
        bytes: of the tensors that it reads, and of those that it writes; of all that it is given
            where that is not known.
        read, written: these bytes apart, or None.
        trips: of every loop of the code that counts, by its index, or None where not known.
        work: what a warp executes, or None.
        prediction: its time by `gdn_ops.aot.model`, or None.
    """

    sample: str
    direction: str
    order: int
    grid: tuple[int, ...]
    bytes: int
    read: int | None = None
    written: int | None = None
    trips: Mapping[int, int] | None = None
    work: Counts | None = None
    prediction: Prediction | None = None


@dataclass(frozen=True)
class CompiledKernel:
    """Describe a kernel that was compiled for a GPU.

    Attributes:
        kernel: its name.
        sample: label of the first sample that launches it so.
        target: the GPU.
        options: of the launch, like the number of warps, or what the kernel is made of.
        shared: bytes of shared memory of one program.
        registers: per thread.
        spills: instructions (NVIDIA) or registers (AMD) that move a register to memory.
        stack: bytes per thread.
        instructions: of matrix units, counted in the code by name.
        warps: of one program.
        copiers: of these, warps that only copy.
        programs: that one processor holds at a time.
        code: the instructions of its loops.
        launches: all launches of it that samples make.
        failures: what a target forbids and this code does; empty if it passes.
        note: why something that would fail is granted.
        seconds: that compiling took, or reading the result of an earlier compilation.
    """

    kernel: str
    sample: str
    target: str
    options: Mapping[str, int | bool | str] = field(default_factory=dict)
    shared: int = 0
    registers: int = 0
    spills: int = 0
    stack: int = 0
    instructions: Mapping[str, int] = field(default_factory=dict)
    warps: int = 0
    copiers: int = 0
    programs: int = 0
    code: Code = field(default_factory=Code)
    launches: tuple[TimedLaunch, ...] = ()
    failures: tuple[str, ...] = ()
    note: str = ""
    seconds: float = 0.0


@runtime_checkable
class CompilesAhead(Protocol):
    """Describe a backend whose kernels `gdn-ops compile` can compile.

    Attributes:
        targets: the GPUs that it compiles for, by name, like "sm_90".
    """

    targets: ClassVar[tuple[str, ...]]

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        """Compile the kernels that samples launch, for a GPU that this machine need not have.

        `gdn_ops.aot.sampling.run` makes the backend do what a sample asks for, on tensors without
        memory.

        Args:
            target: one of `targets`.
            samples: calls; those that the backend cannot run are left out.

        Yields:
            Every distinct kernel once, with what it does that its target forbids.
        """
