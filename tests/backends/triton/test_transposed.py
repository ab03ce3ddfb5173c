"""No product takes a transposed product: on Hopper that is wrong before Triton 3.7.1."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from gdn_ops.backends.triton import Triton  # noqa: E402
from gdn_ops.backends.triton.aot.compiler import TARGETS, specialised  # noqa: E402
from gdn_ops.kernel_support.launches import Launch, recording  # noqa: E402
from kernel_backends import SIZES, meta_call  # noqa: E402
from triton_kernels import bad  # noqa: E402

ENDS_A_CHAIN = ("tt.load", "tt.descriptor_load", "tt.reduce", "tt.dot", "tt.addptr", "tt.trans")
"""Operations whose result is not formed of the entries of their operands one by one."""


def transposed_products(ttir: str) -> list[str]:
    """Return the products of two dimensions with an operand that is a transposed product.

    Values are followed through what computes entry by entry, and through loops and branches.
    """
    products: set[str] = set()
    turned: set[str] = set()
    found: list[str] = []
    for _ in range(4):
        found, regions = [], []
        for line in map(str.strip, ttir.splitlines()):
            names = [name.replace("#", ":") for name in re.findall(r"%[\w#]+", line)]
            made = re.match(r"(%\w+)(?::(\d+))? = (?:\")?([\w.]+)", line)
            if made and made[3] in ("scf.for", "scf.if", "scf.while"):
                count = int(made[2] or 1)
                own = [f"{made[1]}:{i}" if made[2] else made[1] for i in range(count)]
                given = re.findall(r"(%\w+) = (%[\w#]+)", line.partition("iter_args")[2])
                regions.append((own, [to for to, _ in given]))
                for to, start in given:
                    for kind in (products, turned):
                        if start.replace("#", ":") in kind:
                            kind.add(to)
            elif line.endswith("{") and not line.startswith("}"):
                regions.append(([], []))
            elif line.startswith("scf.yield"):
                for i, name in enumerate(names):
                    for kind in (products, turned):
                        if name in kind:
                            kind.update(x[i] for x in regions[-1] if i < len(x))
            elif line.startswith("}") and not line.startswith("} else"):
                regions.pop()
            elif made:
                used = names[1:]
                is_square = re.search(r"-> tensor<\d+x\d+x[a-z]", line) is not None
                if made[3] == "tt.dot" and is_square:
                    if turned & set(used[:2]):
                        found.append(line)
                    products.add(made[1])
                elif made[3] == "tt.trans" and products & set(used):
                    turned.add(made[1])
                elif made[3] not in ENDS_A_CHAIN:
                    for kind in (products, turned):
                        if kind & set(used):
                            kind.add(made[1])
    return found


def source_of(launch: Launch) -> str:
    """Return Triton's representation of a launch on Hopper."""
    source, options, _ = specialised(launch, "sm_90")
    compiled = triton.compile(source, target=TARGETS["sm_90"], options=options.__dict__)
    return str(compiled.asm["ttir"])


@pytest.mark.parametrize("kernel", [bad.transposed_product, bad.transposed_sum_of_products])
def test_a_transposed_product_is_found(kernel: Any) -> None:
    tensors = (torch.empty(64, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    launch = Launch(
        kernel, (1,), (*tensors, 3), {"N": 64, "num_warps": 4, "enable_fp_fusion": True}
    )
    assert transposed_products(source_of(launch))


@pytest.mark.parametrize("qk_l2norm", [False, True])
@pytest.mark.parametrize("segments", ["cut", "whole"])
def test_no_kernel_multiplies_with_a_transposed_product(segments: str, qk_l2norm: bool) -> None:
    backend = Triton()
    call = replace(
        meta_call(True, **SIZES | {"B": 1 if segments == "cut" else 4}), qk_l2norm=qk_l2norm
    )
    with torch.no_grad(), recording("sm_90") as launches:
        out = backend.forward(call)
        backend.backward(
            call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state)
        )
    for launch in launches:
        assert transposed_products(source_of(launch)) == [], launch.kernel.__name__
