"""Refuse models of transformers that would mix the tokens of one rank alone.

They know nothing of `sequence_parallel`: inside of it their attention would see what one rank
holds, in silence. `gdn_ops.compat.transformers` marks the forwards that compute on split tokens.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

from gdn_ops.spec.errors import SpecError

SEES_SPLIT: Final = "_gdn_ops_sees_split"
"""Attribute of the forwards that compute on tokens which are split over ranks."""

_MODULE: Final = "transformers.modeling_utils"
_MODEL: Final = "PreTrainedModel"
_CALL: Final = "__call__"


@contextmanager
def refused() -> Iterator[None]:
    """Refuse calls of models of transformers that are not marked, also of those loaded inside.

    Raises:
        SpecError: a model that does not see the split is called.
    """
    if _watching:
        yield
        return
    watch, module = _Watch(), sys.modules.get(_MODULE)
    _watching.append(watch)
    if module is None:
        sys.meta_path.insert(0, watch)
    else:
        watch.guard(module)
    try:
        yield
    finally:
        _watching.clear()
        if watch in sys.meta_path:
            sys.meta_path.remove(watch)
        watch.release()


class _Watch:
    """Guard the class of all models of transformers, once it is there, until it is released."""

    def __init__(self) -> None:
        self.model: Any = None

    def guard(self, module: ModuleType) -> None:
        """Let calls of models be checked."""
        model = vars(module).get(_MODEL)
        if model is None or _CALL in vars(model):
            return
        original = getattr(model, _CALL)

        def checked(self: Any, *arguments: Any, **keywords: Any) -> Any:
            if not getattr(type(self).forward, SEES_SPLIT, False):
                raise SpecError(
                    f"sequence_parallel: {type(self).__name__} of transformers does not compute "
                    f"on tokens that are split over ranks, should be a language model that does, "
                    f"while gdn_ops.compat.transformers.accelerate() is active"
                )
            return original(self, *arguments, **keywords)

        setattr(model, _CALL, checked)
        self.model = model

    def release(self) -> None:
        """Let calls be what they were."""
        if self.model is not None:
            delattr(self.model, _CALL)
            self.model = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the usual spec of the module, its loader guarding the class at the end."""
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            # An import in another thread may end behind the context.
            if self in _watching:
                self.guard(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_watching: list[_Watch] = []
"""That of the outermost context."""
