"""Tell what memory the structs mean that Python hands to the kernels.

`DOORS` names the structs of every function of the library. Each is described as its header declares
it, to the last byte: under a sanitizer a kernel may touch nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable

from gdn_ops.backends.cpp import build, calls, layers

_BYTES = {0: 4, 1: 2, 2: 2, 3: 8}
"""Bytes of an element, by the numbers of `GdnType`."""

_ARRAY = ("data", "row", "token", "head", "type")
"""Fields of `GdnArray`."""

REPEATED = (
    *("q.data", "k.data", "v.data", "decay.data", "beta.data", "slots", "o.data"),
    *("state", "new_state", "states", "A_log", "dt_bias"),
)
"""Fields of `GdnSteps`, in the order in which `gdn_decode_repeated` takes them."""

Region = tuple[int, int]
"""An address and a number of bytes."""


@functools.cache
def fields(name: str) -> dict[str, int]:
    """Return the numbers of the fields of a struct, each of eight bytes, by the headers."""
    headers = [build.SOURCES / header for header in ("interface.h", "interface_layers.h")]
    text = re.sub(r"//.*", "", "".join(header.read_text() for header in headers))
    found = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
    assert found is not None, name
    fields: dict[str, int] = {}
    count = 0
    for declared in found[1].split(";"):
        kind, *names = re.findall(r"\w+", declared.replace("const", "")) or ("",)
        for field in names:
            for part in [f"{field}.{part}" for part in _ARRAY] if kind == "GdnArray" else [field]:
                fields[part] = count
                count += 1
    return fields


class Packed:
    """Hold the bytes of a struct, and the regions of memory that its pointers mean."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self.numbers = name, data, fields(name)
        self.regions: dict[int, Region] = {}

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("=q", self.data, 8 * self.numbers[name])[0])

    def add(self, name: str, size: int) -> None:
        """Note the bytes behind a pointer, if it is one."""
        if self[name]:
            self.regions[self.numbers[name]] = (self[name], size)

    def add_array(self, name: str, *sizes: int) -> None:
        """Note the bytes of an array (rows, tokens, heads, width)."""
        strides = [self[f"{name}.{axis}"] for axis in _ARRAY[1:4]]
        last = [(n - 1) * stride for n, stride in zip(sizes, strides, strict=False)]
        # Of no tokens there is nothing.
        count = sum(last) + sizes[-1] if all(sizes) else 0
        self.add(f"{name}.data", count * _BYTES[self[f"{name}.type"]])

    def add_tokens(self, rows: int) -> None:
        """Note the arrays of q, k, v and o, and of gates."""
        T, H, HV, K, V = (self[name] for name in ("T", "H", "HV", "K", "V"))
        for name, heads, width in (("q", H, K), ("k", H, K), ("v", HV, V), ("o", HV, V)):
            self.add_array(name, rows, T, heads, width)
        self.add_array("decay", rows, T, HV, K if self["decay_of_channels"] else 1)
        self.add_array("beta", rows, T, HV, 1)
        self.add_array("erase", rows, T, HV, K if self["erase_of_channels"] else 1)
        self.add_array("write", rows, T, HV, V if self["write_of_channels"] else 1)


def _rows(p: Packed) -> int:
    """Return the rows of a call of sequences."""
    return 1 if p["starts"] else p["N"]


def _state(p: Packed) -> int:
    """Return the numbers of a state."""
    return p["HV"] * p["K"] * p["V"]


def _describe_sequences(p: Packed, _: Packed) -> None:
    """Note the memory of `GdnSequences`."""
    p.add_tokens(_rows(p))
    p.add("initial", 4 * p["N"] * _state(p))
    p.add("final", 4 * p["N"] * _state(p))
    p.add("states", 4 * _rows(p) * (p["T"] // (calls.CHUNK * p["chunks_per_state"])) * _state(p))
    p.add("starts", 8 * (p["N"] + 1))


def _describe_gradients(p: Packed, of: Packed) -> None:
    """Note the memory of `GdnGradients` of sequences."""
    T, H, HV, K, V = (of[name] for name in ("T", "H", "HV", "K", "V"))
    for name, heads, width in (("d_o", HV, V), ("d_q", H, K), ("d_k", H, K), ("d_v", HV, V)):
        p.add_array(name, _rows(of), T, heads, width)
    p.add_array("d_decay", _rows(of), T, HV, K if of["decay_of_channels"] else 1)
    p.add_array("d_beta", _rows(of), T, HV, 1)
    p.add_array("d_erase", _rows(of), T, HV, K if of["erase_of_channels"] else 1)
    p.add_array("d_write", _rows(of), T, HV, V if of["write_of_channels"] else 1)
    for name in ("d_final", "d_initial"):
        p.add(name, 4 * of["N"] * _state(of))


def _describe_steps(p: Packed, _: Packed) -> None:
    """Note the memory of `GdnSteps`."""
    B, T, HV, element = p["B"], p["T"], p["HV"], _BYTES[p["state_type"]]
    p.add_tokens(B)
    p.add("slots", 8 * B)
    rows = B
    if p["slots"]:
        rows = 1 + max(struct.unpack(f"={B}q", ctypes.string_at(p["slots"], 8 * B)))
    for name in ("state", "new_state"):
        last = (rows - 1) * p[f"{name}_row"] + (HV - 1) * p[f"{name}_head"]
        p.add(name, element * (last + p["K"] * p["V"] if rows else 0))
    p.add("states", element * B * T * _state(p))
    p.add("A_log", 4 * HV)
    p.add("dt_bias", 4 * HV * (p["K"] if p["decay_of_channels"] else 1))


def _describe_convolution(p: Packed, _: Packed) -> None:
    """Note the memory of `GdnConvolution`; its arrays end with channels."""
    B, N, T, D = (p[name] for name in ("B", "N", "T", "D"))
    for name, *sizes in (("x", B, T, D), ("y", B, T, D), ("weight", 1, p["taps"], D)):
        p.add_array(name, *sizes, 1)
    p.add_array("bias", 1, 1, D, 1)
    for name in ("state", "final"):
        p.add_array(name, N, p["kept"], D, 1)
    p.add("starts", 8 * (N + 1))
    p.add("lengths", 8 * N)


def _describe_convolution_gradients(p: Packed, of: Packed) -> None:
    """Note the memory of `GdnConvolutionGradients` of a convolution."""
    B, N, T, D, taps = (of[name] for name in ("B", "N", "T", "D", "taps"))
    for name in ("d_y", "d_x"):
        p.add_array(name, B, T, D, 1)
    for name in ("d_final", "d_state"):
        p.add_array(name, N, taps - 1, D, 1)
    p.add("d_weight", 4 * D * taps)
    p.add("d_bias", 4 * D)


def _describe_norm(p: Packed, _: Packed) -> None:
    """Note the memory of `GdnNorm`."""
    for name in ("x", "z", "y"):
        p.add_array(name, p["B"], p["T"], p["H"], p["width"])
    p.add_array("weight", 1, 1, p["width"], 1)


def _describe_norm_gradients(p: Packed, of: Packed) -> None:
    """Note the memory of `GdnNormGradients` of a norm."""
    for name in ("d_y", "d_x", "d_z"):
        p.add_array(name, of["B"], of["T"], of["H"], of["width"])
    p.add("partials", 4 * layers.PARTIALS * of["width"])
    p.add("d_weight", 4 * of["width"])


def _describe_token(p: Packed, _: Packed) -> None:
    """Note the memory of `GdnToken`."""
    B, H, R, K, V = (p[name] for name in ("B", "H", "R", "K", "V"))
    channels, element = 2 * H * K + H * R * V, _BYTES[p["state_type"]]
    for name, values, width in (("q", 1, K), ("k", 1, K), ("v", R, V), ("z", R, V), ("o", R, V)):
        p.add_array(name, B, H, values, width)
    decay = K if p["decay_of_channels"] else 1
    p.add_array("a", B, H, R, decay)
    p.add_array("b", B, H, R, 1)
    counts = {"A_log": H * R, "dt_bias": H * R * decay, "bias": channels, "norm": V}
    for name, count in counts.items():
        p.add_array(name, 1, 1, count, 1)
    p.add_array("weight", 1, p["taps"], channels, 1)
    for name in ("past", "kept"):
        p.add_array(name, B, p["inputs"], channels, 1)
    for name in ("state", "new_state"):
        last = (B - 1) * p[f"{name}_row"] + (H * R - 1) * p[f"{name}_head"]
        p.add(name, element * (last + K * V))


_SEQUENCES = ("GdnSequences", _describe_sequences)
_STEPS = ("GdnSteps", _describe_steps)
_CONVOLUTION = ("GdnConvolution", _describe_convolution)
_NORM = ("GdnNorm", _describe_norm)

DOORS: dict[str, tuple[tuple[str, Callable[[Packed, Packed], None]], ...]] = {
    "gdn_forward": (_SEQUENCES,),
    "gdn_backward": (_SEQUENCES, ("GdnGradients", _describe_gradients)),
    "gdn_decode": (_STEPS,),
    # The fields behind the steps are no pointers.
    "gdn_decode_repeated": (_STEPS,),
    "gdn_convolution": (_CONVOLUTION,),
    "gdn_convolution_backward": (
        _CONVOLUTION,
        ("GdnConvolutionGradients", _describe_convolution_gradients),
    ),
    "gdn_norm": (_NORM,),
    "gdn_norm_backward": (_NORM, ("GdnNormGradients", _describe_norm_gradients)),
    "gdn_token": (("GdnToken", _describe_token),),
}
"""The structs of every function, and what notes their memory from them and the first one.

Their order is that of the numbers in `driver.cc`.
"""
