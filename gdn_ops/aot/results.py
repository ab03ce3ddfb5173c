"""Hold calls to compile ahead of time, and what each kernel became, for GPUs that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from gdn_ops.call.bind import Call


@dataclass(frozen=True, eq=False)
class Sample:
    """A call of the public API on meta tensors, which have shapes but no memory.

    Attributes:
        label: what it is, in words for a table.
        call: the bound call; with `needs_grad`, its gradients are meant too.
        is_reference: whether it is one that must be fast as it comes: bfloat16, K = V = 128,
            nothing but defaults.
    """

    label: str
    call: Call
    is_reference: bool


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as a GPU would run it.

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
        seconds: that compiling took, or reading the result of an earlier time.
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
    """A backend that `gdn-ops compile` shows.

    Attributes:
        targets: the GPUs that it compiles for, by name, like "sm_90".
    """

    targets: ClassVar[tuple[str, ...]]

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        """Compile what samples launch for a GPU that need not be there.

        `gdn_ops.aot.sampling.run` makes the backend do what a sample asks for, on tensors without
        memory.

        Args:
            target: one of `targets`.
            samples: calls; those that the backend cannot run are left out.

        Yields:
            Every distinct kernel once, with what its target forbids.
        """
