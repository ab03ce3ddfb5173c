"""A forked process computes with as many threads as its parent."""

from __future__ import annotations

import sys

import pytest

from processes import printed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is that of Linux")

HEAD = """
import os, signal, torch
{imports}
torch.set_num_threads(2)
x = torch.randn(1 << 20)
right = x.exp().sum()

def threads():
    return len(os.listdir("/proc/self/task"))

"""

FORK = (
    HEAD
    + """
child = os.fork()
if child == 0:
    signal.alarm(60)
    before = threads()
    got = x.exp().sum()
    print(torch.equal(got, right), torch.get_num_threads(), threads() - before, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], torch.equal(x.exp().sum(), right), torch.get_num_threads())
"""
)

END = (
    HEAD
    + """
from gdn_ops.dispatch.forks import end_openmp_threads

before = threads()
ended = end_openmp_threads()
x.exp()
print(len(ended), before - threads(), len(end_openmp_threads()), before - threads())
"""
)


def test_a_forked_process_computes_with_the_threads_of_its_parent() -> None:
    lines = printed(FORK.format(imports="import gdn_ops"), OMP_NUM_THREADS="2").splitlines()
    assert lines == ["True 2 1", "0 True 2"]


def test_threads_are_ended_and_come_again() -> None:
    words = printed(END.format(imports="import gdn_ops"), OMP_NUM_THREADS="2").split()
    libraries, again, same, ended = map(int, words)
    assert libraries == same >= 1
    assert (again, ended) == (0, 1)
