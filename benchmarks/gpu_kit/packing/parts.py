"""List the parts of the kit in the order of their worth: each goes in if it still fits."""

from __future__ import annotations

from dataclasses import dataclass

PYTHON, TORCH = "3.12", "2.11"
"""Versions of the GPU machine, which `make versions CELL=python-3.12` installs here."""

PLATFORMS = tuple(
    f"manylinux{name}_x86_64" for name in ("_2_34", "_2_31", "_2_28", "_2_27", "_2_17", "2014", "1")
)


@dataclass(frozen=True)
class Part:
    """Describe one part.

    Attributes:
        name: of the part.
        folder: where it is unpacked; stages find packages in it.
        wheels: requirements, each installed without what it depends on.
        without: beginnings of paths that are left out of the wheels.
        unless: modules; where the machine has all of them, the part stays packed.
        variable: of the environment, which names the folder.
        is_required: whether a kit without it is an error.
    """

    name: str
    folder: str
    wheels: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    variable: str = ""
    is_required: bool = False


TREE = Part("tree", "tree", is_required=True)
TRITON_CACHE = Part("triton-cache", "triton-cache", variable="TRITON_CACHE_DIR")
TILELANG_CACHE = Part("tilelang-cache", "tilelang-cache", variable="TILELANG_CACHE_DIR")

PARTS = (
    TREE,
    Part(
        "testing",
        "site-testing",
        wheels=(
            *("pytest", "iniconfig", "pluggy", "packaging", "pygments"),
            *("hypothesis", "sortedcontainers"),
        ),
        unless=("pytest", "hypothesis"),
        is_required=True,
    ),
    TRITON_CACHE,
    Part("fla", "site-fla", wheels=("fla-core==0.6.0", "einops==0.8.1")),
    # Its own range of TileLang is >= 0.1.12, so it needs no other TileLang than the backend.
    Part("flash-qla", "site-flash-qla", wheels=("flash-qla==0.1.3",)),
    Part(
        "tilelang",
        "site-tilelang",
        wheels=("tilelang", "apache-tvm-ffi", "z3-solver"),
        without=("z3/include/", "z3_solver-", "build_backend.py"),
    ),
    TILELANG_CACHE,
    Part("flashinfer", "site-flashinfer", wheels=("flashinfer-python==0.7.4",)),
)
"""A requirement without a version has that of constraints.txt."""
