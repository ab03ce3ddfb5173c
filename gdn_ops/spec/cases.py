"""Count the least cost of the ops, and name the workloads of tests, benchmarks and tuning."""

from __future__ import annotations

from gdn_ops.spec.language import Case, Sizes


def forward_flops(s: Sizes, chunk: int, *, channels: bool = False) -> float:
    """Return the flops of the chunkwise form (docs/math.md §3), a multiply-add counted as two.

    Per token and value head: K S, Q S and K^T U cost 6 K V; T (.) and P U cost 2 C V each,
    half of them above the diagonal and not needed, so 2 C V together. Per token and key
    head: K K^T and Q K^T, likewise halved, 2 C K together. The solve costs C² / 3 a row. With
    decays of channels (§9) K K^T and Q K^T are those of a value head, and its rows of q, k (twice)
    and of the state are multiplied by theirs: 4 K.
    """
    per_value_head = 6 * s.K * s.V + 2 * chunk * s.V + chunk * chunk / 3
    per_key_head = 2 * chunk * s.K
    if channels:
        return float(s.B * s.T * s.HV * (per_value_head + per_key_head + 4 * s.K))
    return float(s.B * s.T * (s.HV * per_value_head + s.H * per_key_head))


def forward_bytes(s: Sizes, element: int, *, channels: bool = False) -> float:
    """Return the least memory traffic in bytes: q, k, v, o once, float32 gates, the states."""
    activations = element * s.B * s.T * (2 * s.H * s.K + 2 * s.HV * s.V)
    gates = 4 * (1 + (s.K if channels else 1)) * s.B * s.T * s.HV
    return float(activations + gates + state_bytes(s))


def state_bytes(s: Sizes) -> float:
    """Return the size of the float32 states in bytes."""
    return float(4 * s.N * s.HV * s.K * s.V)


def step_flops(s: Sizes, chunk: int, *, channels: bool = False) -> float:
    """Return the flops of the recurrence: 7 K V per token and value head.

    The decay costs K V; S^T k, k u^T and S^T q cost 2 K V each.
    """
    return float(s.B * s.T * s.HV * 7 * s.K * s.V)


def step_bytes(s: Sizes, element: int, *, channels: bool = False) -> float:
    """Return a step's memory traffic in bytes: the float32 state in and out, and the tokens."""
    activations = element * s.B * s.T * (2 * s.H * s.K + 2 * s.HV * s.V)
    gates = 4 * (1 + (s.K if channels else 1)) * s.B * s.T * s.HV
    return float(2 * state_bytes(s) + activations + gates)


def _case(
    name: str, b: int, t: int, h: int, hv: int, k: int, v: int, source: str, dtype: str = "bfloat16"
) -> Case:
    return Case(name, Sizes(b, t, h, hv, k, v, b), source, dtype)


def _of_channels(name: str, b: int, t: int, heads: int, source: str) -> Case:
    """Return a case of Kimi Delta Attention, whose heads are as wide in every model."""
    sizes = Sizes(b, t, heads, heads, 128, 128, b)
    return Case(name, sizes, source, channels=True)


_KIMI = "Kimi Linear or Ling-3.0-Flash KDA layer"
_GLM = "GLM-5.3-Flash KDA layer"
_QWEN = "Qwen3.5 / Qwen3-Next linear-attention layer"
CASES = (
    _case("tiny", 2, 100, 2, 4, 32, 48, "smoke tests", "float32"),
    *(_case(f"qwen-16-32-{t}", 1, t, 16, 32, 128, 128, _QWEN) for t in (2048, 4096, 8192, 16384)),
    *(_case(f"qwen-16-48-{t}", 1, t, 16, 48, 128, 128, _QWEN) for t in (2048, 8192)),
    *(_case(f"qwen-16-64-{t}", 1, t, 16, 64, 128, 128, _QWEN) for t in (2048, 8192, 32768)),
    _case("olmo-hybrid-2048", 1, 2048, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
    _case("olmo-hybrid-8192", 1, 8192, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
    _case("paper-400m-2048", 1, 2048, 9, 9, 128, 256, "Gated DeltaNet 0.4B of the paper"),
    *(_of_channels(f"kimi-32-{t}", 1, t, 32, _KIMI) for t in (2048, 8192)),
    _of_channels("glm-64-2048", 1, 2048, 64, _GLM),
)

STEP_CASES = (
    _case("tiny-step", 2, 1, 2, 4, 32, 48, "smoke tests", "float32"),
    *(_case(f"qwen-16-32-step-b{b}", b, 1, 16, 32, 128, 128, _QWEN) for b in (1, 8)),
    _case("olmo-hybrid-step", 1, 1, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
    *(_of_channels(f"kimi-32-step-b{b}", b, 1, 32, _KIMI) for b in (1, 8)),
)

STEPS_CASES = (
    _case("tiny-steps", 2, 3, 2, 4, 32, 48, "smoke tests", "float32"),
    *(_case(f"qwen-16-32-steps4-b{b}", b, 4, 16, 32, 128, 128, _QWEN) for b in (1, 8)),
    _case("olmo-hybrid-steps4", 1, 4, 30, 30, 96, 192, "OLMo-Hybrid linear-attention layer"),
)
"""Drafts of a few tokens that speculative decoding verifies in one call."""


GPU_CASES = (
    *(_case(f"qwen-16-{hv}-8192x4", 4, 8192, 16, hv, 128, 128, _QWEN) for hv in (32, 64)),
    _case("qwen-2-8-32768", 1, 32768, 2, 8, 128, 128, f"{_QWEN}, one of eight GPUs"),
)
"""Long sequences, several or of few heads, for kernels that are compiled and not run."""

PROMPT_CASES = (_case("qwen-16-32-prompt-256", 1, 256, 16, 32, 128, 128, _QWEN),)
"""Short prompts, for benchmarks."""

KDA_CASES = (_of_channels("kimi-8-8-1024", 1, 1024, 8, "a quarter of a Kimi Linear KDA layer"),)
"""A decay of every key channel, for benchmarks: few heads, since peers need gigabytes for each."""


def _packed(name: str, sequences: int, lengths: tuple[int, ...], source: str) -> Case:
    """Return a case of sequences whose lengths take turns, with heads so small that states fit."""
    tokens = sum(lengths[n % len(lengths)] for n in range(sequences))
    sizes = Sizes(1, tokens, 1, 1, 16, 16, sequences)
    return Case(name, sizes, source, "float32", lengths)


PACKED_CASES = (
    _packed("packed-8192x1", 8192, (1,), "one draft token for each of many users"),
    _packed("packed-2048x4-8", 2048, (4, 5, 6, 7, 8), "short drafts and documents"),
)
"""Many short sequences in one row, by cu_seqlens: what a sequence costs besides its tokens."""
