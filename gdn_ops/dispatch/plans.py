"""Run a call as an earlier one with the same signature ran, without asking everything again.

A decode loop makes one call after another that differ in values and addresses only. What follows
from the rest, the signature of a call, is found once: that its structure is right, which backend
runs it, and how that backend has prepared itself. Everything else is asked each time: values,
memory that inputs share with the state, gradients, modes, transforms, the registry. Where an answer
is unusual there is no short way: the call goes the long one, which finds the words for it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from gdn_ops.call import transforms
from gdn_ops.call.bind import Arguments, Call, Signature, requires_grad
from gdn_ops.call.memory import is_frozen
from gdn_ops.call.structure import is_narrow
from gdn_ops.call.values import are_readable, check_integers
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend, Prepared
from gdn_ops.spec.errors import SpecError

MOST_PLANS = 1024
"""Forget the oldest plan when there are more."""


class Plan(NamedTuple):
    """Hold what was found of a call.

    Attributes:
        call: the call, on tensors without memory.
        name: what it named as its backend.
        backend: the backend that runs it.
        run: the function that the backend has prepared.
    """

    call: Call
    name: str
    backend: Backend
    run: Prepared

    def repeated(self, arguments: Arguments) -> Any | None:
        """Run a call by the plan of an earlier one with the same signature.

        Args:
            arguments: those of the call.

        Returns:
            What `decode_one` or `decode_many` of the backend would return, or (o, final_state); or
            None: then nothing is done yet, and the call is to go the long way.
        """
        call, state = self.call, arguments.state
        if not is_ordinary() or (torch.is_grad_enabled() and requires_grad(arguments)):
            return None
        if not registry.is_first(self.backend, call, self.name):
            return None
        if not (arguments.state_indices is None is arguments.cu_seqlens or self._fits(arguments)):
            return None
        if not call.inplace or state is None:
            return self.run(arguments)
        results = None if is_frozen(state) else self.run(arguments)
        if results is not None:
            increment_version(state)
        return results

    def _fits(self, arguments: Arguments) -> bool:
        """Return whether the integers of a call are right, or are not looked at."""
        try:
            if are_readable(self.call.device):
                check_integers(self.call.op, arguments, self.call.sizes)
        except SpecError:
            return False
        return True


_plans: OrderedDict[Signature, Plan | None] = OrderedDict()
"""The plans by signature; None where a backend has no shorter way."""


def find(key: Signature | None) -> Plan | None:
    """Return the plan for the calls of a signature, if there is one."""
    return _plans.get(key) if key is not None else None


def keep(key: Signature | None, arguments: Arguments, call: Call, backend: Backend) -> None:
    """Keep the plan of a call for others like it, if its backend has a shorter way for them.

    Args:
        key: the signature of the call.
        arguments: those of the call, from which the signature is.
        call: the call that they were bound to.
        backend: the backend that was selected for it.
    """
    if key is None or key in _plans or type(backend).prepared is Backend.prepared:
        return
    is_emulated = call.device.type in backend.limits.emulated_devices
    # Every call with a narrow alpha is warned of.
    if call.needs_grad or is_emulated or is_narrow(arguments.tokens.alpha):
        return
    name = arguments.backend
    if not is_ordinary() or not registry.is_first(backend, call, name):
        return
    call = call.without_memory()
    run = backend.prepared(call)
    _plans[key] = None if run is None else Plan(call, name, backend, run)
    if len(_plans) > MOST_PLANS:
        _plans.popitem(last=False)


def is_ordinary() -> bool:
    """Return whether nothing is active that sees, records or changes what is done to tensors."""
    return not (
        torch.compiler.is_compiling()
        or transforms.any_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
    )
