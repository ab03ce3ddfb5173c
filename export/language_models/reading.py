"""Read the description of a language model from a model of transformers.

Families are told apart by what their layers have, not by their names: a layer is a gated delta net
where it has A_log and dt_bias, an attention where it has q_proj, k_proj and v_proj. What is read is
checked in two ways: every parameter has to be used, and the exported graph is compared with the
model (`writing`).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.export.language_models.plan import (
    Attention,
    Decay,
    Dense,
    Experts,
    GatedDelta,
    LanguageModel,
    Layer,
    Linear,
    Norm,
)
from gdn_ops.spec.errors import SpecError, SpecTypeError

LABEL = "export_model"

_CHANNEL_GATES = ("forget_gate", "f_a_proj", "f_proj")
"""Names of what makes a decay of every key channel, in layers of Kimi Delta Attention."""

_STILL = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies do not depend on the length of the text."""


def read_model(model: Any) -> LanguageModel:
    """Return the description of a causal language model of transformers.

    Args:
        model: such as Qwen3_5ForCausalLM or OlmoHybridForCausalLM, with its weights.

    Raises:
        SpecTypeError: it is no torch module.
        SpecError: a part has no ONNX form; the text names it.
    """
    if not isinstance(model, nn.Module):
        raise SpecTypeError(
            f"{LABEL}: model has type {type(model).__name__}, should be a causal language model of "
            f"transformers"
        )
    return _Reader(model).read()


def _fail(message: str) -> NoReturn:
    raise SpecError(f"{LABEL}: {message}")


class _Reader:
    """Read a model, and note which of its parameters have been used."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kind = type(model).__name__
        self.names = {id(module): name for name, module in model.named_modules()}
        self.used: set[int] = set()
        self.rotary: Any = None
        self.rotated: set[int] = set()

    def read(self) -> LanguageModel:
        """Return the description."""
        config: Any = getattr(self.model, "config", None)
        body: Any = getattr(self.model, "model", None)
        head = getattr(self.model, "lm_head", None)
        layers: Any = getattr(body, "layers", None)
        if not (isinstance(layers, nn.ModuleList) and isinstance(head, nn.Linear)):
            _fail(
                f"{self.kind} has no model.layers and lm_head, should be a causal language model "
                f"of transformers"
            )
        bias: Any = head.bias
        if bias is not None:
            _fail("lm_head has a bias, should have none")
        self.rotary = getattr(body, "rotary_emb", None)
        self.rotated = _given_positions(self.model)
        embedding = self._own(body.embed_tokens.weight)
        read = LanguageModel(
            str(config.model_type),
            embedding,
            tuple(self._layer(layer) for layer in layers),
            self._norm(getattr(body, "norm", None)),
            self._own(head.weight),
            int(getattr(config, "max_position_embeddings", 0)),
            self._tokens("eos_token_id", len(embedding)),
            next(iter(self._tokens("bos_token_id", len(embedding))), None),
            next(iter(self._tokens("pad_token_id", len(embedding))), None),
        )
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in self.used:
                _fail(
                    f"nothing in the graph would read {name} of {self.kind}: the part that it "
                    f"belongs to has no ONNX form"
                )
        return read

    def _tokens(self, name: str, vocabulary: int) -> tuple[int, ...]:
        """Return the tokens of a setting of generation, or else of the configuration.

        Configurations that were made by hand may name tokens that a small vocabulary has not.
        """
        own = getattr(getattr(self.model, "generation_config", None), name, None)
        value = getattr(self.model.config, name, None) if own is None else own
        tokens = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(int(token) for token in tokens if 0 <= int(token) < vocabulary)

    def _own(self, x: Tensor) -> Tensor:
        self.used.add(id(x))
        return x.detach()

    def _name(self, module: nn.Module) -> str:
        return f"{self.names.get(id(module), '')} ({type(module).__name__})"

    def _layer(self, layer: Any) -> Layer:
        """Read a layer: norms before its parts where it has an input_layernorm, else behind."""
        mixer: Any = getattr(layer, "linear_attn", None) or getattr(layer, "self_attn", None)
        if mixer is None:
            _fail(f"{self._name(layer)} has no linear_attn and no self_attn: it has no ONNX form")
        self._check_decay(mixer)
        read = self._gated_delta(mixer) if hasattr(mixer, "A_log") else self._attention(mixer)
        mlp = self._mlp(layer.mlp)
        norms = [
            None if norm is None else self._norm(norm)
            for norm in (
                getattr(layer, name, None)
                for name in ("input_layernorm", "post_attention_layernorm",
                             "pre_feedforward_layernorm", "post_feedforward_layernorm")
            )
        ]  # fmt: skip
        first, second, third, last = norms
        if first is not None and third is None and last is None:
            return Layer(read, mlp, first, None, second, None)
        return Layer(read, mlp, first, second, third, last)

    def _norm(self, module: Any) -> Norm:
        """Read an RMS norm: its weight, or 1 + weight, by what it makes of ones."""
        if module is None:
            _fail(f"{self.kind} has no model.norm: it has no ONNX form")
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        weight = getattr(module, "weight", None)
        if eps is None or weight is None or weight.dim() != 1:
            _fail(f"{self._name(module)} is no RMS norm with a weight: it has no ONNX form")
        own = self._own(weight).float()
        with torch.no_grad():
            made = module(torch.ones_like(own)).float() * (1 + eps) ** 0.5
        for scale in (own, own + 1):
            if torch.allclose(made, scale, rtol=1e-2, atol=1e-3):
                return Norm(scale, float(eps))
        _fail(f"{self._name(module)} is no RMS norm: it has no ONNX form")

    def _linear(self, module: Any) -> Linear:
        if not isinstance(module, nn.Linear):
            _fail(f"{self._name(module)} should be a torch.nn.Linear: it has no ONNX form")
        bias = None if module.bias is None else self._own(module.bias)
        return Linear(self._own(module.weight), bias)

    def _check_silu(self, module: nn.Module, activation: Any) -> None:
        x = torch.linspace(-3, 3, 7, dtype=torch.float32, device="cpu")
        if activation == "silu" or (callable(activation) and _is_silu(activation, x)):
            return
        _fail(f"{self._name(module)} has the activation {activation}, should have silu")

    def _check_decay(self, module: nn.Module) -> None:
        """Refuse a layer with a decay of every key channel, which has the parts of an attention."""
        gate = next((name for name in _CHANNEL_GATES if hasattr(module, name)), None)
        if gate is not None:
            _fail(
                f"{self._name(module)} has {gate}, a decay of every key channel: a whole model "
                f"of transformers with it has no ONNX form; gdn_ops.nn.HybridLM has one, and "
                f"export_decode takes a module that passes such a decay to gated_delta_step"
            )

    def _gated_delta(self, module: Any) -> GatedDelta:
        """Read a gated delta net of any family."""
        heads, value_heads = int(module.num_k_heads), int(module.num_v_heads)
        K, V = int(module.head_k_dim), int(module.head_v_dim)
        weight, bias = self._convolution(module)
        norm = getattr(module, "norm", None) or module.o_norm
        self._check_silu(norm, getattr(norm, "activation", "silu"))
        output = getattr(module, "out_proj", None) or module.o_proj
        return GatedDelta(
            heads, value_heads, K, V,
            self._delta_inputs(module, heads, value_heads, K, V),
            weight,
            bias,
            Decay(self._own(module.A_log).float().exp(), self._own(module.dt_bias).float()),
            2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
            Norm(self._own(norm.weight).float(), float(norm.variance_epsilon)),
            "silu",
            self._linear(output),
        )  # fmt: skip

    def _convolution(self, module: Any) -> tuple[Tensor, Tensor | None]:
        """Return the weight (D, kernel) and bias (D,) of a convolution of q, k and v, or of three.

        OLMo-Hybrid has three before transformers 5.15.
        """
        if hasattr(module, "conv1d"):
            self._check_silu(module, module.activation)
            parts = [module.conv1d]
        else:
            parts = [getattr(module, f"{name}_conv1d", None) for name in "qkv"]
            if None in parts:
                _fail(f"{self._name(module)} has no conv1d: it has no ONNX form")
            for conv in parts:
                self._check_silu(conv, getattr(conv, "act_fn", None))
        weights = [self._own(conv.weight)[:, 0] for conv in parts]
        biases = [None if conv.bias is None else self._own(conv.bias) for conv in parts]
        joined = Linear.stacked(*(Linear(*both) for both in zip(weights, biases, strict=True)))
        return joined.weight, joined.bias

    def _delta_inputs(self, module: Any, H: int, HV: int, K: int, V: int) -> Linear:
        """Return the rows of q, k, v, z, b and a."""
        if hasattr(module, "in_proj_qkvz"):
            return self._interleaved(module, H, HV // H, K, V)
        names: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        if not hasattr(module, names[0]):
            names = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
        for name in names:
            if not hasattr(module, name):
                _fail(f"{self._name(module)} has no {name}: it has no ONNX form")
        return Linear.stacked(*(self._linear(getattr(module, name)) for name in names))

    def _interleaved(self, module: Any, H: int, R: int, K: int, V: int) -> Linear:
        """Sort rows that stand by key head: q, k, R times v and R times z; then b and a."""
        qkvz, ba = self._linear(module.in_proj_qkvz), self._linear(module.in_proj_ba)
        by_head = qkvz.weight.unflatten(0, (H, -1)).split((K, K, R * V, R * V), 1)
        gates = ba.weight.unflatten(0, (H, -1)).split((R, R), 1)
        return Linear(torch.cat([x.flatten(0, 1) for x in (*by_head, *gates)]))

    def _attention(self, module: Any) -> Attention:
        """Read an attention layer of any family."""
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling"):
            if not hasattr(module, name):
                _fail(f"{self._name(module)} has no {name}: it has no ONNX form")
        width = int(module.head_dim)
        q, k, v = (self._linear(getattr(module, f"{name}_proj")) for name in "qkv")
        output = self._linear(module.o_proj)
        heads, key_heads = output.weight.shape[1] // width, len(k.weight) // width
        is_gated = len(q.weight) == 2 * heads * width
        rows = [q, k, v]
        if is_gated:
            own, gate = (
                None if x is None else x.unflatten(0, (heads, 2, width)).unbind(1)
                for x in (q.weight, q.bias)
            )
            assert own is not None
            biases = (None, None) if gate is None else tuple(x.flatten(0, 1) for x in gate)
            q_rows, gate_rows = (
                Linear(w.flatten(0, 1), b) for w, b in zip(own, biases, strict=True)
            )
            rows = [q_rows, k, v, gate_rows]
        q_norm, k_norm = (
            None if (norm := getattr(module, name, None)) is None else self._norm(norm)
            for name in ("q_norm", "k_norm")
        )
        frequencies, rotary_scale = self._frequencies(module, width)
        window = getattr(module, "sliding_window", None)
        return Attention(
            heads, key_heads, width, Linear.stacked(*rows), is_gated, q_norm, k_norm,
            frequencies, rotary_scale, float(module.scaling), window, output,
        )  # fmt: skip

    def _frequencies(self, module: nn.Module, width: int) -> tuple[Tensor | None, float]:
        """Return the rotary frequencies of a layer, and the factor on cosines and sines."""
        if self.rotary is None or id(module) not in self.rotated:
            return None, 1.0
        kind = getattr(self.rotary, "rope_type", "default")
        if kind not in _STILL:
            _fail(
                f"{self._name(self.rotary)} has rope_type {kind!r}, should be one of "
                f"{', '.join(_STILL)}: others depend on the length of the text"
            )
        frequencies: Tensor = self.rotary.inv_freq.detach().float()
        if 2 * len(frequencies) > width:
            _fail(f"{self._name(self.rotary)} rotates more than the {width} channels of a head")
        return frequencies, float(getattr(self.rotary, "attention_scaling", 1.0))

    def _mlp(self, module: Any) -> Dense | Experts:
        if not hasattr(module, "experts"):
            return self._dense(module)
        # Older versions of transformers have these with the block, and experts as a list of MLPs.
        router = module.gate if hasattr(module.gate, "top_k") else module
        gate_up, down = self._expert_matrices(module.experts)
        shared = getattr(module, "shared_expert", None)
        gate = getattr(module, "shared_expert_gate", None)
        return Experts(
            self._own(module.gate.weight),
            int(router.top_k),
            bool(getattr(router, "norm_topk_prob", True)),
            gate_up,
            down,
            None if shared is None else self._dense(shared),
            None if gate is None else self._linear(gate).weight,
        )

    def _expert_matrices(self, experts: Any) -> tuple[Tensor, Tensor]:
        """Return (experts, 2 inner, hidden) and (experts, hidden, inner) of a mixture."""
        if not isinstance(experts, nn.ModuleList):
            if not hasattr(experts, "gate_up_proj"):
                _fail(f"{self._name(experts)} has no gate_up_proj: it has no ONNX form")
            self._check_silu(experts, experts.act_fn)
            return self._own(experts.gate_up_proj), self._own(experts.down_proj)
        read = [self._dense(expert) for expert in experts]
        for expert, one in zip(experts, read, strict=True):
            if one.gate_up.bias is not None or one.down.bias is not None:
                _fail(f"{self._name(expert)} has a bias, should have none: it has no ONNX form")
        return (
            torch.stack([one.gate_up.weight for one in read]),
            torch.stack([one.down.weight for one in read]),
        )

    def _dense(self, module: Any) -> Dense:
        for name in ("gate_proj", "up_proj", "down_proj"):
            if not hasattr(module, name):
                _fail(f"{self._name(module)} has no {name}: it has no ONNX form")
        self._check_silu(module, module.act_fn)
        both = Linear.stacked(self._linear(module.gate_proj), self._linear(module.up_proj))
        return Dense(both, self._linear(module.down_proj))


def _given_positions(model: nn.Module) -> set[int]:
    """Return the parts that are given rotary embeddings, seen by running a model on two tokens."""
    given: set[int] = set()

    def note(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        if options.get("position_embeddings") is not None:
            given.add(id(module))

    device = next(model.parameters()).device
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _is_silu(activation: Any, x: Tensor) -> bool:
    return bool(torch.equal(activation(x), functional.silu(x)))
