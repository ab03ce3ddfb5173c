"""Point from an argument that an op does not have to the one that is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import NoReturn

from gdn_ops.spec.errors import SpecTypeError
from gdn_ops.spec.language import OpSpec

_FLA = "gdn_ops.compat.fla has FLA's names and layouts"
_NUMBERS = "cu_seqlens, the boundaries of sequences packed along T: 0, ..., T"
_STATE = "state, or initial_state of gated_delta"
_SLOTS = "state_indices of a decode op"
_RETURN = "return_state of gated_delta"
_CHUNK = "chunk_size"
_BOUNDARIES_ONLY = "left out: cu_seqlens alone is needed"
_GATE = "alpha, in [0, 1], or log_alpha"
_INSIDE = f"computed before the call, for example by a gate of gdn_ops.gates; {_FLA}"

MEANT: dict[str, str] = {
    # flash-linear-attention
    "g": f"log_alpha, which is FLA's g; {_FLA}",
    "gk": f"log_alpha with a last axis K, a decay of every key channel; {_FLA}",
    "gv": "log_alpha, of heads or of key channels: a decay per value channel is not supported",
    "output_final_state": f"{_RETURN}; {_FLA}",
    "use_qk_l2norm_in_kernel": f"qk_l2norm; {_FLA}",
    "use_qk_l2norm": "qk_l2norm",
    "use_gate_in_kernel": f"log_alpha, {_INSIDE}",
    "use_beta_sigmoid_in_kernel": f"beta, {_INSIDE}",
    "allow_neg_eigval": "beta in [0, 2], 2 sigmoid of the logits",
    "head_first": "left out: tokens come before heads, (B, T, H, K); q.transpose(1, 2) turns "
    "(B, H, T, K)",
    "initial_states": _STATE,
    "h0": _STATE,
    "offsets": _NUMBERS,
    "cp_context": "left out: a call runs on one device",
    "state_v_first": "left out: states are (N, HV, K, V); "
    "gdn_ops.compat.states.state_from('fla_v_first', state) turns them",
    "BT": _CHUNK,
    "cu_seqlens_cpu": _BOUNDARIES_ONLY,
    "chunk_indices": _BOUNDARIES_ONLY,
    # transformers
    "query": "q",
    "key": "k",
    "value": "v",
    "attention_mask": "alpha = 1 and beta = 0 at the padding; gdn_ops.nn.GatedDeltaNet takes mask=",
    "seq_idx": _NUMBERS,
    "position_ids": _NUMBERS,
    "cu_seq_lens_q": _NUMBERS,
    "lengths": _NUMBERS,
    "recurrent_state": _STATE,
    "past_key_values": _STATE,
    "cache": _STATE,
    # Mamba
    "dt": f"log_alpha, {_INSIDE}",
    "A": f"log_alpha, {_INSIDE}",
    "A_log": f"log_alpha, {_INSIDE}",
    "dt_bias": f"log_alpha, {_INSIDE}",
    "ssm_state": _STATE,
    "dt_softplus": f"log_alpha, {_INSIDE}",
    "state_batch_indices": _SLOTS,
    "return_final_states": _RETURN,
    # FlashInfer, SGLang, vLLM
    "a": f"log_alpha, {_INSIDE}",
    "b": f"beta, {_INSIDE}",
    "softplus_beta": f"log_alpha, {_INSIDE}",
    "softplus_threshold": f"log_alpha, {_INSIDE}",
    "query_start_loc": _NUMBERS,
    "seq_lens": _NUMBERS,
    "initial_state_source": _STATE,
    "initial_state_indices": _SLOTS,
    "cache_indices": _SLOTS,
    "pad_slot_id": "left out: a row whose slot in state_indices is -1 is skipped",
    "disable_state_update": "left out: without inplace the given state stays as it is",
    "intermediate_states_buffer": "return_states of gated_delta_steps",
    "num_accepted_tokens": "left out: states[:, n - 1] of gated_delta_steps is the state after "
    "n tokens",
    "output": "left out: o is returned",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "ssm_state_indices": _SLOTS,
    "inplace_final_state": "inplace of a decode op",
    "decay": _GATE,
    "gate": _GATE,
    # ONNX
    "past_state": _STATE,
    "update_rule": "rule",
}
MEANT |= {
    "mask": MEANT["attention_mask"],
    "transpose_state_layout": MEANT["state_v_first"],
    "cu_seq_lens": _NUMBERS,
    "cu_seqlens_q": _NUMBERS,
    "a_log": MEANT["A_log"],
    "gates": _GATE,
    "forget_gate": _GATE,
    "log_decay": "log_alpha",
    "return_final_state": _RETURN,
    "past_key_value": _STATE,
    "past_recurrent_state": _STATE,
    "last_recurrent_state": _STATE,
    "cache_params": _STATE,
}
"""Explain arguments of other libraries, and of other ops of this one."""


def refuse_unknown(spec: OpSpec, unknown: Iterable[str]) -> NoReturn:
    """Refuse arguments that an op does not have.

    Args:
        spec: the op.
        unknown: their names.

    Raises:
        SpecTypeError: always; it says what is meant by the first of them.
    """
    name = next(iter(unknown))
    known = [arg.name for arg in spec.args]
    raise SpecTypeError(
        f"{spec.name}: got an unknown argument {name!r}, {_cure(name, known, _own(spec))}"
    )


def unknown_option(owner: str, name: str, known: Iterable[str], meant: Mapping[str, str]) -> str:
    """Return the text of an error about an option that `owner` does not have."""
    return f"{owner}: got an unknown argument {name!r}, {_cure(name, list(known), meant)}"


def _own(spec: OpSpec) -> Mapping[str, str]:
    """Return what is meant in calls of one op, its own names of things before those of others."""
    is_sequence = any(arg.name == "return_state" for arg in spec.args)
    state = "initial_state" if is_sequence else "state"
    always = "left out: the new state is always returned"
    own = {name: state for name, text in MEANT.items() if text == _STATE}
    if is_sequence:
        decoding = "left out: it is an argument of gated_delta_step and gated_delta_steps"
        own |= {"state": state, "state_indices": decoding, "inplace": decoding}
        own |= {name: "return_state" for name, text in MEANT.items() if text == _RETURN}
        own |= {"output_final_state": f"return_state; {_FLA}"}
        own |= {"return_states": "return_state; gated_delta_steps returns the state of every token"}
    else:
        own |= {"initial_state": state, "return_state": always}
        own |= {name: always for name, text in MEANT.items() if text == _RETURN}
        own |= {"output_final_state": f"{always}; {_FLA}"}
        own |= {"cu_seqlens": "a row per sequence; gated_delta takes packed sequences"}
        packed = (_NUMBERS, _BOUNDARIES_ONLY)
        own |= {n: own["cu_seqlens"] for n, text in MEANT.items() if text in packed}
        own |= {name: "state_indices" for name, text in MEANT.items() if text == _SLOTS}
        own |= {"inplace_final_state": "inplace", "chunk_size": "left out: a step has no chunks"}
        own |= {"BT": own["chunk_size"]}
    return MEANT | own


def _cure(name: str, known: list[str], meant: Mapping[str, str]) -> str:
    if name in meant:
        return f"should be {meant[name]}"
    close = difflib.get_close_matches(name, known, 1, 0.75)
    if close:
        return f"should be {close[0]!r}?"
    return f"should be one of {', '.join(known)}"
