"""Find which tensors a kernel reads and which it writes, in Triton's own representation of it."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from gdn_ops.kernel_support.launches import Launch

_FUNCTION = re.compile(r"tt\.func public @\w+\((.*)\)")
_PARAMETER = re.compile(r"%(\w+): (?:!tt\.ptr|!tt\.tensordesc)")
_RESULT = re.compile(r"^\s*%(\w+)(?::\d+)? = ")
_NAME = re.compile(r"%(\w+)")
_READ = re.compile(r"tt\.(?:descriptor_)?(?:load|gather) %(\w+)")
_WRITTEN = re.compile(r"tt\.(?:descriptor_)?(?:store|scatter) %(\w+)")
_BOTH = re.compile(r"tt\.(?:descriptor_reduce|atomic_rmw|atomic_cas)\b[^%]*%(\w+)")
_POINTERS = ("!tt.ptr", "!tt.tensordesc", "tt.make_tensor_descriptor")


class Accesses(NamedTuple):
    """Hold the names of the parameters whose memory a kernel reads, and writes."""

    read: frozenset[str]
    written: frozenset[str]


def accesses(ttir: str) -> Accesses | None:
    """Return what a kernel reads and writes, or None where a pointer cannot be followed."""
    of: dict[str, set[str]] = {}
    read: set[str] = set()
    written: set[str] = set()
    for line in ttir.splitlines():
        function = _FUNCTION.search(line)
        if function:
            names = _PARAMETER.findall(function[1])
            of |= {name: {name} for name in names}
            continue
        for pattern, found in ((_READ, (read,)), (_WRITTEN, (written,)), (_BOTH, (read, written))):
            access = pattern.search(line)
            if access is None:
                continue
            if not of.get(access[1]):
                return None
            for way in found:
                way |= of[access[1]]
        result = _RESULT.match(line)
        if result and any(kind in line for kind in _POINTERS) and not _READ.search(line):
            used = _NAME.findall(line)[1:]
            of[result[1]] = set().union(*(of.get(name, set()) for name in used))
            # The arguments of a loop's body are named in its head.
            for name in re.findall(r"%(\w+) = %", line[result.end() :]):
                of[name] = of[result[1]]
    return Accesses(frozenset(read), frozenset(written))


def moved(launch: Launch, found: Accesses | None) -> tuple[int, int] | None:
    """Return the bytes of the tensors that a launch reads, and of those that it writes.

    Args:
        launch: the launch.
        found: what its kernel reads and writes; nothing is returned where that is not known.
    """
    if found is None:
        return None
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    sizes = {
        name: x.numel() * x.element_size()
        for name, x in given.items()
        if isinstance(x, torch.Tensor)
    }
    return sum(sizes[name] for name in found.read), sum(sizes[name] for name in found.written)
