"""Run the models of transformers on gdn_ops.

    from gdn_ops.compat.transformers import accelerate

    accelerate()

While it is active, the gated delta rule of Qwen3-Next, Qwen3.5 (dense and MoE) and OLMo-Hybrid
is computed by gdn_ops, in models that are loaded already and in those that are loaded later.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from types import ModuleType, TracebackType

from gdn_ops import registry
from gdn_ops.compat import modeling
from gdn_ops.compat.patch import Site
from gdn_ops.errors import SpecError

ARCHITECTURES = modeling.ARCHITECTURES

_active: list[Acceleration] = []


def accelerate(
    backend: str = "auto", *, architectures: Iterable[str] | None = None
) -> Acceleration:
    """Let transformers' models compute the gated delta rule with gdn_ops.

    It takes effect at once. Use the result as a context manager, or call its `undo`; `print` it
    to see what was replaced and which backend each call used. An inner use wins over an outer one.

    Args:
        backend: of gdn_ops; "auto" chooses for every call.
        architectures: names out of ARCHITECTURES; all of them when not given.

    Returns:
        The handle.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        SpecError: the backend or an architecture is unknown, or a modeling module does not look
            as it should; then nothing is replaced. A module that is loaded later raises this
            when it is imported.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "accelerate: package 'transformers' is not installed; pip install transformers",
            name="transformers",
        )
    if backend != "auto":
        found = registry.get_backend(backend)
        if isinstance(found, str):
            raise SpecError(f"accelerate: backend {backend!r} is not available: {found}")
    names = ARCHITECTURES if architectures is None else tuple(architectures)
    for name in names:
        if name not in ARCHITECTURES:
            raise SpecError(
                f"accelerate: unknown architecture {name!r}, known: {', '.join(ARCHITECTURES)}"
            )
    return Acceleration(backend, names)


class Acceleration:
    """What `accelerate` returns: the undo handle, and the account of what happened.

    Attributes:
        backend: as given.
        architectures: what it covers.
        calls: how often each (architecture, op, backend) ran. A call that is part of a graph of
            torch.compile is counted when the graph is made, its backend being chosen when it runs.
    """

    def __init__(self, backend: str, architectures: tuple[str, ...]) -> None:
        self.backend = backend
        self.architectures = architectures
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self._sites: list[Site] = []
        modules = {name: sys.modules.get(modeling.module_name(name)) for name in architectures}
        loaded = {name: module for name, module in modules.items() if module is not None}
        # All are checked before the first is touched.
        sites = [_site(name, module) for name, module in loaded.items()]
        for site in sites:
            self._use(site)
        if not _active:
            sys.meta_path.insert(0, _FINDER)
        _active.append(self)

    def undo(self) -> None:
        """Put the very objects back that were replaced. A second call does nothing."""
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
        """What is replaced at present, as `module.name`."""
        return tuple(name for site in self._sites for name in site.replaced())

    def _use(self, site: Site) -> None:
        site.add(self)
        self._sites.append(site)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        state = "active" if self in _active else "undone"
        lines = [f"accelerate(backend={self.backend!r}), {state}"]
        waiting = [n for n in self.architectures if n not in {s.architecture for s in self._sites}]
        for site in self._sites:
            short = (name.removeprefix("transformers.models.") for name in site.replaced())
            lines.append(f"  {site.architecture}: replaced {', '.join(short)}")
        if waiting and self in _active:
            lines.append(f"  not loaded yet: {', '.join(waiting)}")
        for (architecture, op, backend), count in sorted(self.calls.items()):
            lines.append(f"  {architecture}: {op} {backend} x {count}")
        if not self.calls:
            lines.append("  no call yet")
        return "\n".join(lines)


def _site(architecture: str, module: ModuleType) -> Site:
    """Return the site of a module, checked unless it is patched already.

    Raises:
        SpecError: the module does not look as it should.
    """
    site = Site.known.get(architecture)
    if site is not None and site.module is module and site.users:
        return site
    against = modeling.objections(module)
    if against:
        package = sys.modules.get("transformers")
        version = getattr(package, "__version__", "of unknown version")
        raise SpecError(
            f"accelerate: {module.__name__} of transformers {version} is not as it should be: "
            f"{'; '.join(against)}"
        )
    site = Site.known[architecture] = Site(architecture, module)
    return site


class _Finder:
    """An import hook that patches a modeling module as soon as it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the usual spec of a modeling module, whose loader patches at the end."""
        if not name.startswith("transformers.models."):
            return None
        architecture = next((a for a in ARCHITECTURES if modeling.module_name(a) == name), None)
        if architecture is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            users = [a for a in _active if architecture in a.architectures]
            site = _site(architecture, module) if users else None
            for user in users:
                user._use(site)  # type: ignore[arg-type]

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()
