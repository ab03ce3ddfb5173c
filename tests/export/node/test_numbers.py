"""Numbers of numpy make the models and sessions that Python's make."""

from __future__ import annotations

import numpy as np

from errors import refusal
from gdn_ops import export

SIZES = {"num_qk_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 8}


def test_numbers_of_numpy_make_the_same_model() -> None:
    ours = export.make_decode_model(**SIZES, scale=0.5, qk_l2norm=True, opset=21)
    theirs = export.make_decode_model(
        **{name: np.int64(size) for name, size in SIZES.items()},
        scale=np.float32(0.5),
        qk_l2norm=np.bool_(True),
        has_beta=np.bool_(True),
        opset=np.int64(21),
    )
    assert theirs.SerializeToString() == ours.SerializeToString()


def test_numbers_of_numpy_make_a_session() -> None:
    model = export.make_decode_model(**SIZES)
    one, yes = np.int64(1), np.bool_(True)
    session = export.DecodeSession(model, batch=one, threads=one, in_place=yes)
    assert type(session.batch) is int and session.batch == 1
    assert refusal(export.DecodeSession, model, batch=np.float32(1)) == (
        "DecodeSession: batch has type float, should be an integer"
    )
    assert refusal(export.DecodeSession, model, batch=np.int64(-1)) == (
        "DecodeSession: batch is -1, should be at least 0"
    )
