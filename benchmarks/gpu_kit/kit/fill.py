"""Compile the launches of benchmark and check for a GPU that is not here.

`TRITON_CACHE_DIR=... python fill.py triton bench --share 0/2` takes each launch of a process, here
the one of `bench gpu`, as far as a GPU's driver would load its code: its own way to the cache, with
nothing of the machine in it. So a launch with the same cache compiles nothing there, which a second
run of this shows: it prints how many kernels were compiled and how many were found. The same with
`tilelang` and TILELANG_CACHE_DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import launchers
import torch
from recorded import HISTORIES
from recorded import launches as launches_of

from gdn_ops.dispatch.registry import get_backend
from gdn_ops.kernel_support.launches import Launch


@dataclass
class Counts:
    """Hold how many launches were tried, and whether their kernels were compiled or found.

    Attributes:
        launches: that differ for the compiler, or nearly so.
        compiled, found: kernels.
        failed: an error for each that does not compile.
    """

    launches: int = 0
    compiled: int = 0
    found: int = 0
    failed: list[str] = field(default_factory=list)


class Absent:
    """Stand in for the driver of a GPU, as far as a launch asks it before code is loaded."""

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Triton:
    """Compile launches by Triton."""

    target = "sm_90"

    def __init__(self, counts: Counts, with_launchers: bool) -> None:
        if with_launchers:
            launchers.stand_in()
        import triton
        from triton.runtime.driver import driver

        self.counts, self.with_launchers = counts, with_launchers
        driver.set_active(Absent())
        if with_launchers:
            launchers.compile_utilities()
        triton.knobs.compilation.listener = self.listen

    def listen(self, *, cache_hit: bool, **_: object) -> None:
        """Count a kernel that Triton has compiled or found."""
        if cache_hit:
            self.counts.found += 1
        else:
            self.counts.compiled += 1

    def look_at(self, launch: Launch) -> None:
        """Let Triton form the keys of all kernels, as a launch does on a GPU."""
        from gdn_ops.backends.triton.kernels import settle_keys

        settle_keys()

    def key(self, launch: Launch) -> str:
        """Return what launches of the same code share: dtypes, divisibility, constants."""

        def said(x: Any) -> str:
            if isinstance(x, torch.Tensor):
                return str(x.dtype)
            return f"{x == 1}{x % 16 == 0}{x >> 31}" if type(x) is int else repr(x)

        return f"{';'.join(map(said, launch.args))};{constants(launch)}"

    def compile(self, launch: Launch) -> None:
        """Take a launch up to where its code would be loaded."""
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
        if self.with_launchers:
            launchers.compile_launcher(kernel)


class TileLang:
    """Compile launches by TileLang."""

    target = "sm_90a"

    def __init__(self, counts: Counts, _: bool) -> None:
        self.counts = counts

    def look_at(self, launch: Launch) -> None:
        """Do nothing: a kernel of TileLang does not depend on others."""

    def key(self, launch: Launch) -> str:
        """Return what shapes the code: the constants alone."""
        return constants(launch)

    def compile(self, launch: Launch) -> None:
        """Compile a kernel, or find it in the cache."""
        from gdn_ops.backends.tilelang.host.launcher import _compiled

        _, origin = _compiled(launch.kernel, launch.kwargs, self.target)
        if origin == "compiled":
            self.counts.compiled += 1
        else:
            self.counts.found += 1


COMPILERS = {"triton": Triton, "tilelang": TileLang}


def constants(launch: Launch) -> str:
    """Return the named arguments and options of a launch as text."""
    return ";".join(f"{name}={x!r}" for name, x in sorted(launch.kwargs.items()))


def main() -> int:
    """Compile a share of the launches; print as JSON what was compiled and what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backend", choices=COMPILERS)
    parser.add_argument("history", choices=HISTORIES, help="whose launches")
    parser.add_argument("--share", default="0/1", help="which of how many parts, as 0/2")
    parser.add_argument("--tune", default="", help="cases whose configurations are compiled too")
    parser.add_argument("--most", type=int, default=None, help="only so many launches")
    parser.add_argument(
        "--launchers", action="store_true", help="also what Triton writes in C to launch them"
    )
    asked = parser.parse_args()
    backend = get_backend(asked.backend)
    if isinstance(backend, str):
        print(f"{asked.backend} is not available: {backend}", file=sys.stderr)
        return 2
    counts = Counts()
    compiler = COMPILERS[asked.backend](counts, asked.launchers)
    share, shares = map(int, asked.share.split("/"))
    cases = asked.tune.split(",") if asked.tune else []
    noted = launches_of(asked.history, backend, compiler.target, cases)
    unique: dict[str, Launch] = {}
    for launch in itertools.islice(noted, asked.most):
        compiler.look_at(launch)
        unique.setdefault(f"{launch.kernel.__name__}({compiler.key(launch)})", launch)
    for number, (name, launch) in enumerate(unique.items()):
        if number % shares != share:
            continue
        counts.launches += 1
        try:
            compiler.compile(launch)
        except Exception as error:
            counts.failed.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    print(json.dumps(asdict(counts)))
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
