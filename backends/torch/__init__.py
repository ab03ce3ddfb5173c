"""Run the chunkwise form in plain torch ops: fast on a CPU, right on any device torch has.

Map: `chunk_forward` holds the equations of one segment (docs/math.md §3, §4), `chunk_backward`
those of its gradients (§5); `segments` cuts sequences into segments, `spans` says where the tokens
of one lie, `loading` loads them, and `backend` runs them and keeps what a backward needs; `decode`
runs single tokens (§2). Gates, solve and state are float32 (float64 for float64 inputs); cumulative
log sums are float64.
"""

from gdn_ops.backends.torch.backend import CHUNKING as CHUNKING
from gdn_ops.backends.torch.backend import Torch as Torch

BACKEND = Torch
