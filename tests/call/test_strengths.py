"""Erase and write strengths in place of beta: what is wrong with them is said by its exact text."""

from __future__ import annotations

import pytest
import torch

import gdn_ops
from errors import message_of
from gdn_ops import SpecError
from good_calls import ints, sequence, zeros

BAD = {
    "erase and beta are both given, should be one of them: beta is erase and write in one": (
        sequence(erase=zeros(2, 8, 8))
    ),
    "write and beta are both given, should be one of them: beta is erase and write in one": (
        sequence(write=zeros(2, 8, 8, 6))
    ),
    "erase is given, should be None: rule 'gated' has no error term, and beta is its write "
    "strength": sequence(rule="gated", beta=None, erase=zeros(2, 8, 8)),
    "write is given, should be None: rule 'linear' has no error term, and beta is its write "
    "strength": sequence(rule="linear", alpha=None, write=zeros(2, 8, 8)),
    "erase has shape (2, 8), should be (B, T, HV) or (B, T, HV, K)": sequence(
        beta=None, erase=zeros(2, 8)
    ),
    "write has shape (2, 8, 8, 7), should be (B, T, HV, V) = (2, 8, 8, 6); V is fixed by v": (
        sequence(beta=None, write=zeros(2, 8, 8, 7))
    ),
    "erase has shape (2, 8, 4), should be (B, T, HV) = (2, 8, 8); HV is fixed by v": sequence(
        beta=None, erase=zeros(2, 8, 4)
    ),
    "erase has dtype int64, should be one of float64, float32, bfloat16, float16": sequence(
        beta=None, erase=ints(1)
    ),
    "erase has values in [2.5, 2.5], should be in [0, 2]": sequence(
        beta=None, erase=torch.full((2, 8, 8, 16), 2.5)
    ),
    "beta has shape (2, 8, 8, 16), should be (B, T, HV): 3 dimensions, not 4; strengths of "
    "channels are given as erase and write": sequence(beta=torch.full((2, 8, 8, 16), 0.5)),
    "write has values in [-0.5, -0.5], should be in [0, 2]": sequence(
        beta=None, write=torch.full((2, 8, 8), -0.5)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_strengths_say_what_is_wrong(message: str) -> None:
    call = BAD[message]
    assert message_of(SpecError, gdn_ops.gated_delta, **call) == f"gated_delta: {message}"
