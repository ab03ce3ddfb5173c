"""The kit makes every tensor on the device under test, and the code of a failure names it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gdn_ops.testing import conformance, oracle
from gdn_ops.testing.example import Example
from gdn_ops.testing.runs import installed


class Elsewhere(FakeTensorMode):
    """Tensors without values on a device that is not there; mixing devices raises."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item"):
            return {torch.bool: False, torch.int64: 0}.get(args[0].dtype, 0.0)
        if name == "equal":
            return True
        return super().dispatch(func, types, args, kwargs or {})


PACKED = Example(rule="delta", H=2, R=2, T=5, initial_state=True, strided=True, lengths=(2, 0, 3))
EXAMPLES = (
    Example(H=2, R=2, T=5, initial_state=True, keys="parallel", gate="extreme"),
    Example(T=4, log_gate=True, dtype="float64", keys="repeated"),
)


def test_the_kit_keeps_every_tensor_on_the_device_under_test() -> None:
    # Laws of decoding look at the values of slots, which tensors without values do not have.
    laws = [
        s for s in conformance.subjects(installed("torch")) if not dict(s.options).get("decode")
    ]
    subjects = [s for s in laws if s.judge.__module__ != "gdn_ops.testing.derivatives"]
    pairs = [(subject, PACKED) for subject in subjects] + [(subjects[0], e) for e in EXAMPLES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for subject, example in pairs:
            oracle.judgement.cache_clear()
            with Elsewhere(allow_non_fake_inputs=True):
                subject.judge("torch", replace(example, device="lazy"))
    oracle.judgement.cache_clear()


def test_a_failure_on_a_device_is_repeated_by_code_that_names_it() -> None:
    subject = conformance.subjects(installed("torch"))[0]
    assert "device" not in subject.code("torch", Example(T=3))
    code = subject.code("torch", Example(T=3, device="cuda"))
    assert code.splitlines()[-1] == "print(judge(Example(T=3, device='cuda'), 'torch'))"


def test_a_check_on_a_device_makes_every_example_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def look(backend: str, example: Example) -> oracle.Verdict:
        seen.append(example.device)
        with Elsewhere(allow_non_fake_inputs=True):
            assert {x.device.type for x in example.cotangents()} == {"lazy"}
        return oracle.Verdict(2.0, "o", 2.0, 1.0)

    subject = conformance.Subject("looks", look)
    monkeypatch.setattr(conformance, "subjects", lambda backend: (subject,))
    report = conformance.check("torch", 0.0, seed=0, device="lazy")
    assert seen and set(seen) == {"lazy"}
    assert report.rows[0].failure is not None and "device='lazy'" in report.rows[0].failure
