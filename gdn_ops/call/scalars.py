"""Take numbers of other libraries, as numpy's scalars, for the Python numbers that they equal."""

from __future__ import annotations

import numbers
import operator
import sys
from typing import Any

_PLAIN = (bool, int, float, str, type(None))


def as_python(value: Any) -> Any:
    """Return a number of another library as a bool, an int or a float; other values unchanged.

    An integer stays one, so that `np.float32(64.0)` is no integer. Symbolic sizes are unchanged.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return value
    numpy = sys.modules.get("numpy")
    return bool(value) if numpy is not None and isinstance(value, numpy.bool_) else value
