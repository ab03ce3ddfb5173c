"""Say of which backends compiling makes new calls slow, and which few calls the kit draws of them.

A backend that is not named here is asked everything that its limits allow; on a GPU one of kernels
is asked few widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.rules import Limits

__all__ = ["COMPILED", "per_shape", "per_width"]

ShapeClass = Mapping[str, Any]
"""Fields of an example that are not drawn."""

_PLAIN: ShapeClass = {"channels": False, "apart": None}
_SHAPE: ShapeClass = {"B": 1, "H": 2, "R": 2, "K": 8, "V": 16, "scale": None, "chunk_size": None}

SHAPES: tuple[ShapeClass, ...] = (
    {**_SHAPE, **_PLAIN},
    {**_SHAPE, **_PLAIN, "B": 2, "H": 1, "R": 3, "K": 16, "V": 5, "scale": 1.0},
    {**_SHAPE, "channels": True, "apart": None},
    {**_SHAPE, "channels": False, "apart": "channels"},
)
"""Few shapes, for every length and every value."""

WIDTHS: tuple[ShapeClass, ...] = (
    {"K": 16, "V": 48, "chunk_size": None, "dtype": "float32"},
    {"K": 48, "V": 80, "chunk_size": None, "dtype": "bfloat16"},
    {"K": 80, "V": 16, "chunk_size": 32, "dtype": "float16"},
)
"""K below V and above it, narrower than a tile of 64 and wider, no power of two; for every batch,
number of heads and length, and every value."""


def per_shape(limits: Limits) -> dict[str, Any]:
    """Return what to draw from where any new shape costs seconds: few shapes in float32."""
    return {"shape_classes": SHAPES, "dtypes": ("float32",)}


def per_width(limits: Limits) -> dict[str, Any]:
    """Return what to draw from where new head dims, chunk sizes and dtypes cost seconds.

    Lengths and numbers of heads cost nothing. If the limits allow none of WIDTHS, all is drawn.
    """
    dims, sizes = limits.head_dims, limits.chunk_sizes

    def is_allowed(width: ShapeClass) -> bool:
        heads = (width["K"], width["V"])
        return (
            width["dtype"] in limits.dtypes
            and (sizes is None or width["chunk_size"] in (None, *sizes))
            and all(d % limits.head_dim_multiple == 0 for d in heads)
            and (dims is None or all(d in dims for d in heads))
        )

    return {"shape_classes": tuple(width for width in WIDTHS if is_allowed(width)) or None}


COMPILED: dict[str, Callable[[Limits], dict[str, Any]]] = {
    "compile": per_shape,
    "tilelang": per_width,
}
"""Functions from limits to options of `strategies.calls`, by the name of a backend.

A backend of another distribution adds its own row: `COMPILED["mine"] = per_shape`.
"""


def few_calls(backend: Backend, device: str) -> dict[str, Any]:
    """Return options of `strategies.calls` for a backend on a torch device.

    A backend of kernels that has no row in COMPILED compiles them for a GPU, and not to be emulated
    on a CPU.
    """
    own = COMPILED.get(backend.name)
    if own is None and backend.kernels and device.partition(":")[0] == "cuda":
        own = per_width
    return {} if own is None else own(backend.limits)
