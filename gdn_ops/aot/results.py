"""Hold the calls to compile ahead of time, and the kernels that were compiled for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

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
