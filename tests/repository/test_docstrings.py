"""What `help` shows of a public function ends with an example, and the example runs."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator

import pytest

import gdn_ops
from gdn_ops.dispatch.registry import unregister_backend

FUNCTIONS = [name for name in gdn_ops.__all__ if name.islower()]


@pytest.fixture(autouse=True)
def _own_backends() -> Iterator[None]:
    """Forget the backend that an example adds."""
    yield
    unregister_backend("mine")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_of_a_public_function_ends_with_an_example_that_runs(name: str) -> None:
    docstring = inspect.getdoc(getattr(gdn_ops, name)) or ""
    _, heading, example = docstring.rpartition("Example:\n")
    assert heading, "there is no example"
    assert "\n\n" not in example.strip(), "something follows the example"
    test = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert test.examples[-1].want, "the example prints nothing"
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
