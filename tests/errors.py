"""Read what an error says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gdn_ops import SpecError


def message_of(
    error: type[BaseException], call: Callable[..., Any], /, *arguments: Any, **options: Any
) -> str:
    """Make a call that should raise an error, and return the error's text."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def refusal(call: Callable[..., Any], /, *arguments: Any, **options: Any) -> str:
    """Make a call that the library should refuse with a SpecError, and return the reason."""
    return message_of(SpecError, call, *arguments, **options)
