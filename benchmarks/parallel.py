"""Measure sequences split over processes: `python benchmarks/parallel.py`.

A sequence of 16384 tokens, 16 key and 32 value heads, K = V = 128 in float32, on 1, 2 and 4
processes of this machine with gloo, with two threads in all (one each for four processes), beside
what the cost model predicts. A time is that of the slowest process, from a barrier on; every round
measures all of them in turn. Outputs and final states are compared with those of one process.
`results/parallel.json` has the best and the median of each, the bytes that were sent, and what
sends and gathers reach. It should run on an idle machine: the load before each round is in the
result, and ratios are of the best times, which other work disturbs least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gdn_ops import gated_delta
from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.parallel import SequenceSplit, counting
from gdn_ops.parallel import gated_delta as split_gated_delta
from gdn_ops.parallel.cost import exchange_bytes, op_seconds
from gdn_ops.parallel.machines import MACHINES
from gdn_ops.spec.language import Sizes

RESULT = Path(__file__).parent / "results" / "parallel.json"
SIZES = Sizes(1, 16384, 16, 32, 128, 128, 1)
THREADS = 2
PROCESSES = (1, 2, 4)
STRATEGIES = ("pipeline", "gather")
WARM_UPS = 2
BLOCKS = 4
"""Runs that inputs are drawn in, each from a seed of its own: a process draws no others."""
ALLOWED = 1e-4
"""Largest difference from one process, relative to the largest number."""


def inputs(rank: int, processes: int) -> dict[str, Tensor]:
    """Draw the tokens of a process: gates of a layer at the start of its training, unit keys."""
    s, runs = SIZES, []
    for block in range(rank * BLOCKS // processes, (rank + 1) * BLOCKS // processes):
        torch.manual_seed(block)
        T = s.T // BLOCKS
        q, k = torch.randn(2, s.B, T, s.H, s.K).unbind(0)
        runs.append(
            {
                "q": q,
                "k": torch.nn.functional.normalize(k, dim=-1),
                "v": torch.randn(s.B, T, s.HV, s.V),
                "log_alpha": -0.1 * torch.rand(s.B, T, s.HV),
                "beta": torch.rand(s.B, T, s.HV),
            }
        )
    return {name: torch.cat([run[name] for run in runs], 1) for name in runs[0]}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a run from a barrier to the slowest process, and its result."""
    dist.barrier()
    start = time.perf_counter()
    result = run()
    own = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return own.item(), result


def worker(rank: int, processes: int, strategy: str, backend: str, repeats: int, out: str) -> None:
    """Measure one process; the first one writes what all have taken."""
    torch.set_num_threads(max(1, THREADS // processes))
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.store", rank=rank, world_size=processes
    )
    x = inputs(rank, processes)
    if processes == 1:

        def call() -> tuple[Tensor, Tensor]:
            return gated_delta(**x, return_state=True, backend=backend)
    else:
        split = SequenceSplit.contiguous(SIZES.T, dist.group.WORLD)

        def call() -> tuple[Tensor, Tensor]:
            return split_gated_delta(
                **x, split=split, strategy=strategy, return_state=True, backend=backend
            )

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return call()

    def both() -> None:
        for tensor in x.values():
            tensor.requires_grad_().grad = None
        o, _state = call()
        o.backward(d_o)

    torch.manual_seed(rank)
    o, state = forward()
    d_o = torch.randn_like(o)
    with counting() as traffic:
        both()
    # The states behind the last token go to all ranks only because they are asked for.
    own = [n for kind, n in traffic.bytes.items() if not kind.startswith("final states")]
    sent = torch.tensor(sum(own))
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    # Memory that a virtual machine has given back to its host takes long to come again, so that
    # runs of one kind follow one another, and the first are not counted.
    seconds = {}
    for what, kind in (("forward", forward), ("forward+backward", both)):
        samples = [timed(kind)[0] for _ in range(WARM_UPS + repeats)]
        seconds[what] = samples[WARM_UPS:]
    # Every 64th token is compared, and the state behind the last.
    seen = [torch.zeros_like(o[:, ::64]) for _ in range(processes)] if rank == 0 else None
    dist.gather(o[:, ::64].contiguous(), seen)
    dist.broadcast(state, processes - 1)
    if seen is not None:
        result = {"seconds": seconds, "o": torch.cat(seen, 1), "state": state, "sent": int(sent)}
        torch.save(result, out)
    dist.destroy_process_group()


def link_worker(rank: int, processes: int, out: str) -> None:
    """Measure a small send, a send and a gather of a summary between processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.store", rank=rank, world_size=processes
    )
    found = {}
    s = SIZES
    summary = exchange_bytes("gather", s, processes).given
    for name, nbytes in (("hop", 4), ("send", summary)):
        message, samples = torch.zeros(nbytes // 4), []
        for _ in range(50):
            dist.barrier()
            start = time.perf_counter()
            for sender in (0, 1):
                if rank == sender:
                    dist.send(message, 1 - sender)
                elif rank == 1 - sender:
                    dist.recv(message, sender)
            samples.append((time.perf_counter() - start) / 2)
        found[name] = statistics.median(samples)
    own = torch.zeros(summary // 4)
    parts = [torch.zeros_like(own) for _ in range(processes)]
    found["gather"] = statistics.median(
        timed(lambda: dist.all_gather(parts, own))[0] for _ in range(20)
    )
    if rank == 0:
        torch.save(found | {"bytes": summary}, out)
    dist.destroy_process_group()


def spawned(target: Callable[..., None], processes: int, *arguments: Any) -> dict[str, Any]:
    """Run processes and return what the first one has written."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.pt")
        mp.spawn(target, (processes, *arguments, out), processes)
        result: dict[str, Any] = torch.load(out)
        return result


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def predictions(strategy: str, processes: int) -> dict[str, float]:
    """Return the seconds that the model predicts, of processes that share the two cores."""
    machine = MACHINES["cpu"].shared(processes)
    name: Any = strategy if processes > 1 else "data"
    seconds = op_seconds(name, SIZES, processes, machine, "float32")
    return {**seconds._asdict(), "total": seconds.total}


def sent_bytes(strategy: str, processes: int) -> int:
    """Return the bytes that the model counts for a rank: what goes to several, once for each."""
    if processes == 1:
        return 0
    name: Any = strategy
    given = exchange_bytes(name, SIZES, processes).given
    # Between two processes the first gives forward only, and the second backward only.
    if strategy == "pipeline":
        return given * min(processes - 1, 2)
    return 2 * given * (processes - 1)


def measure(backend: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each strategy, number of processes and direction."""
    kinds = [(1, "none")] + [(n, way) for way in STRATEGIES for n in PROCESSES if n > 1]
    samples: dict[Any, list[float]] = {}
    loads, reference = [], None
    last: dict[Any, dict[str, Any]] = {}
    for turn in range(rounds):
        loads.append(os.getloadavg()[0])
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            result = spawned(worker, kind[0], kind[1], backend, repeats)
            for what, seconds in result["seconds"].items():
                samples.setdefault((*kind, what), []).extend(seconds)
            if kind[0] == 1:
                reference = result
            last[kind] = result
        print(f"round {turn + 1} of {rounds}, load {loads[-1]:.2f}", flush=True)
    assert reference is not None
    rows = []
    for (processes, strategy, what), seconds in samples.items():
        best, one = min(seconds), min(samples[1, "none", what])
        result = last[processes, strategy]
        error = max(difference(result[name], reference[name]) for name in ("o", "state"))
        assert error <= ALLOWED, f"{strategy} x{processes} is {error} from one process"
        row = {
            "processes": processes, "strategy": strategy, "what": what, "best": best,
            "median": statistics.median(seconds), "samples": seconds, "over_one": best / one,
            "error": error,
        }  # fmt: skip
        if what == "forward+backward":
            predicted = predictions(strategy, processes)
            row |= {
                "predicted": predicted,
                "predicted_over_one": predicted["total"] / predictions("data", 1)["total"],
                "sent": result["sent"],
                "predicted_sent": sent_bytes(strategy, processes),
            }
        rows.append(row)
    return [{"loads": loads}, *rows]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpp", help="of the op (default: cpp)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    loads, *rows = measure(given.backend, given.rounds, given.repeats)
    links = {str(n): spawned(link_worker, n) for n in PROCESSES if n > 1}
    for row in rows:
        print(row["processes"], row["strategy"], row["what"], f"{row['best']:.3f} s",
              f"{row['over_one']:.3f}", f"{row.get('predicted_over_one', 0):.3f}")  # fmt: skip
    system = describe_system(backend=given.backend, threads=THREADS, sizes=vars(SIZES), **loads)
    write_json({"schema": 1, "system": system, "rows": rows, "links": links}, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
