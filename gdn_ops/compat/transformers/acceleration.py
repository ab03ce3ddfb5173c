"""Accelerate the loaded models of transformers, and those that are loaded later."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from gdn_ops.compat.transformers.discovery import (
    architecture_of,
    functions_of,
    known_architectures,
    loaded_modules,
)
from gdn_ops.compat.transformers.examine import examine
from gdn_ops.compat.transformers.site import Site
from gdn_ops.dispatch import registry
from gdn_ops.nn.values import check_flags
from gdn_ops.spec.errors import SpecError, SpecTypeError

logger = logging.getLogger("gdn_ops")

_active: list[Acceleration] = []


def accelerate(
    backend: str = "auto", *, architectures: Iterable[str] | None = None, strict: bool = False
) -> Acceleration:
    """Let transformers' models compute the gated delta rule with gdn_ops.

    It takes effect at once. Use the result as a context manager, or call its `undo`; `print` it
    to see what was replaced, what was left to transformers and why, and which backend each call
    used. An inner use wins over an outer one.

    Args:
        backend: of gdn_ops; "auto" chooses for every call.
        architectures: model folders of transformers, out of `known_architectures()`; all of them
            when not given.
        strict: whether a module, or a part of one, that does not look or compute as it should is
            an error; it is left to transformers with a warning otherwise.

    Returns:
        The handle.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        SpecError: the backend or an architecture is unknown; with `strict`, a module does not
            fit, and then nothing is replaced. A module that is loaded later raises this when it
            is imported.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "accelerate: package 'transformers' is not installed; pip install transformers",
            name="transformers",
        )
    _check_kinds(backend, architectures, strict)
    if backend != "auto":
        reason = registry.get_backend(backend)
        if isinstance(reason, str):
            raise SpecError(f"accelerate: backend {backend!r} is not available: {reason}")
    names = None if architectures is None else tuple(architectures)
    known = known_architectures() if names else ()
    for name in names or ():
        if name not in known:
            raise SpecError(f"accelerate: unknown architecture {name!r}, known: {', '.join(known)}")
    return Acceleration(backend, names, strict)


def _check_kinds(backend: Any, architectures: Any, strict: Any) -> None:
    """Check that the arguments of `accelerate` are of the right kind."""
    check_flags("accelerate", strict=strict)
    if not isinstance(backend, str):
        text = f"backend has type {type(backend).__name__}, should be the name of one"
        raise SpecTypeError(f"accelerate: {text}")
    is_list = isinstance(architectures, Iterable) and not isinstance(architectures, str)
    if architectures is not None and not is_list:
        raise SpecTypeError(
            f"accelerate: architectures has type {type(architectures).__name__}, should be a list "
            f"of names"
        )


class Acceleration:
    """Hold the patches of one `accelerate`: undo them, and keep account of what happened.

    Attributes:
        backend, architectures, strict: as given.
        calls: how often each (architecture, op, backend) ran. A call that is part of a graph of
            torch.compile is counted when the graph is made, its backend being chosen when it
            runs. The backend is "transformers" where a call used what gdn_ops does not know.
        left: what was left to transformers, as (architecture, reason).
    """

    def __init__(self, backend: str, architectures: tuple[str, ...] | None, strict: bool) -> None:
        self.backend = backend
        self.architectures = architectures
        self.strict = strict
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.left: list[tuple[str, str]] = []
        self._sites: list[Site] = []
        # All are examined before the first is touched.
        examined = [(module, _site(module)) for module in loaded_modules() if self._covers(module)]
        for module, site in examined:
            text = self._judge(module, site)
            if text is not None:
                warnings.warn(text, stacklevel=3)
        for _, site in examined:
            if isinstance(site, Site):
                self._use(site)
        if not _active:
            sys.meta_path.insert(0, _FINDER)
        _active.append(self)

    def undo(self) -> None:
        """Put the replaced objects themselves back; a second call does nothing."""
        if self not in _active:
            return
        _active.remove(self)
        if not _active:
            sys.meta_path.remove(_FINDER)
        for site in self._sites:
            site.remove(self)
        self._sites.clear()

    @property
    def replaced(self) -> tuple[str, ...]:
        """Return the names of the objects replaced at present, as `module.name`."""
        return tuple(name for site in self._sites for name in site.replaced())

    def _covers(self, module: ModuleType) -> bool:
        return self.architectures is None or architecture_of(module.__name__) in self.architectures

    def _judge(self, module: ModuleType, site: Site | list[str]) -> str | None:
        """Note the parts of a module left to transformers; return them as a text, or None.

        Raises:
            SpecError: a part does not fit, and this use is strict.
        """
        plan = site.plan if isinstance(site, Site) else None
        reasons = site.plan.left if isinstance(site, Site) else site
        architecture = architecture_of(module.__name__) or module.__name__
        text = None
        if reasons:
            version = getattr(sys.modules.get("transformers"), "__version__", "of unknown version")
            text = (
                f"accelerate: {module.__name__} of transformers {version} is not as it should be: "
                f"{'; '.join(reasons)}"
            )
            if self.strict:
                raise SpecError(text)
            text = f"{text}; {'all of it' if plan is None else 'that'} is left to transformers"
        absent = [] if plan is None else plan.absent
        self.left += [(architecture, reason) for reason in (*reasons, *absent)]
        return text

    def _use(self, site: Site) -> None:
        site.add(self)
        self._sites.append(site)

    def _meet(self, module: ModuleType) -> None:
        """Patch a module that was just loaded; only a strict use may stop its import."""
        try:
            site = _site(module)
            text = self._judge(module, site)
            if isinstance(site, Site):
                self._use(site)
        except Exception as error:
            if self.strict:
                raise
            reason = f"{type(error).__name__}: {error}"
            self.left.append((architecture_of(module.__name__) or module.__name__, reason))
            text = f"accelerate: {module.__name__} is left to transformers: {reason}"
        if text is not None:
            try:
                warnings.warn(text, stacklevel=2)
            except Warning:  # warnings are errors here, and a model must load all the same
                logger.warning(text)

    def __enter__(self) -> Acceleration:
        if self not in _active:
            raise SpecError("accelerate: this use was undone, should be a new one: accelerate(...)")
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __str__(self) -> str:
        is_active = self in _active
        lines = [f"accelerate(backend={self.backend!r}), {'active' if is_active else 'undone'}"]
        for site in self._sites:
            short = (name.removeprefix("transformers.models.") for name in site.replaced())
            lines.append(f"  {site.architecture}: replaced {', '.join(short)}")
        lines += [f"  {name}: left to transformers: {reason}" for name, reason in self.left]
        if is_active:
            met = {site.architecture for site in self._sites} | {name for name, _ in self.left}
            wanted = known_architectures() if self.architectures is None else self.architectures
            waiting = [name for name in wanted if name not in met]
            if waiting:
                lines.append(f"  not loaded yet: {', '.join(waiting)}")
        for (architecture, op, backend), count in sorted(self.calls.items()):
            lines.append(f"  {architecture}: {op} {backend} x {count}")
        if not self.calls:
            lines.append("  no call yet")
        return "\n".join(lines)


def _site(module: ModuleType) -> Site | list[str]:
    """Return the site of a module, examined unless patched already, or why it does not fit."""
    site = Site.known.get(module.__name__)
    if site is not None and site.module is module and site.users:
        return site
    plan = examine(module)
    return plan if isinstance(plan, list) else Site(module, plan)


class _Finder:
    """Patch modeling modules as soon as they are loaded, as an import hook."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the usual spec of a modeling module, its loader patching the module at the end."""
        if architecture_of(name) is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            if functions_of(module):
                for user in [user for user in _active if user._covers(module)]:
                    user._meet(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()
