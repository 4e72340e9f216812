"""Replacing attributes for a while, or for good, and putting back exactly what stood there.

    patch = Patch([(module, "function", replacement), ...])    # from here on, in every thread
    patch.undo()                                               # or: with Patch([...]): ...

Patches nest and overlap in any order, from any thread. The last one that still stands is in force. When the
last is undone, the attribute is again the very object, or the absence, that the first one found.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

_MISSING = object()  # the owner has no such attribute of its own; a class may inherit one
_lock = threading.RLock()
_sites: dict[tuple[int, str], _Site] = {}  # only attributes that some patch has replaced

# If another thread held the lock at a fork, nobody would release the child's copy of it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _Site:
    """One attribute, what stood there, and what was put there by which patch; the last entry is in force."""

    def __init__(self, owner: Any, name: str):
        self.owner, self.name = owner, name
        self.original = vars(owner).get(name, _MISSING)
        self.values: list[tuple[Patch, Any]] = []

    @property
    def current(self) -> Any:
        return self.values[-1][1] if self.values else self.original

    def store(self) -> None:
        if self.current is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.current)


def _where(owner: Any, name: str) -> str:
    owner = owner if isinstance(owner, (type, ModuleType)) else type(owner)
    return f"{getattr(owner, '__qualname__', owner.__name__)}.{name}"


class Patch:
    """Attributes replaced from construction until `undo()`, or the end of a `with` block.

    Args:
        replacements: (module, class or other object, attribute name, new value). The attribute must exist; it
            may be inherited.
        package: name of a package. A module of it that is imported while the patch stands may copy a
            replacement (`from .utils import function`); `undo` gives those copies back the original too.

    Raises:
        AttributeError: an attribute to replace does not exist; nothing has been replaced then.
    """

    def __init__(self, replacements: Iterable[tuple[Any, str, Any]], *, package: str | None = None):
        replacements = list(replacements)
        for owner, name, _ in replacements:
            if not hasattr(owner, name):
                raise AttributeError(f"{_where(owner, name)} does not exist, so it cannot be replaced")
        self._package, self._stands = package, True
        self._replaced: list[tuple[_Site, Any]] = []
        try:
            self.extend(replacements)
        except BaseException:
            self.undo()
            raise

    def extend(self, replacements: Iterable[tuple[Any, str, Any]]) -> None:
        """Replaces more, until the same `undo`; nothing once that was called. For what is imported later."""
        with _lock:
            for owner, name, value in replacements if self._stands else ():
                site = _sites.get((id(owner), name)) or _Site(owner, name)
                site.values.append((self, value))
                try:
                    site.store()
                except BaseException:
                    site.values.pop()
                    raise
                _sites[id(owner), name] = site
                self._replaced.append((site, value))

    @classmethod
    def everywhere(cls, package: str, replacements: Iterable[tuple[Any, str, Any]]) -> Patch:
        """As the constructor, and wherever else in the package's loaded modules the same object is bound.

        No other thread patches while the bindings are found and replaced.
        """
        with _lock:
            found = [(holders(package, getattr(owner, name)), new) for owner, name, new in replacements]
            return cls([(module, bound, new) for sites, new in found for module, bound in sites], package=package)

    def undo(self) -> None:
        """Takes this patch back; does nothing the second time.

        What somebody else has put over it meanwhile stays, with a RuntimeWarning.
        """
        with _lock:
            self._stands = False
            successors: dict[int, Any] = {}  # id of a replacement -> what now stands in its place
            for site, value in reversed(self._replaced):
                untouched = vars(site.owner).get(site.name, _MISSING) is site.current
                site.values.remove((self, value))
                if untouched:
                    site.store()
                else:
                    changed = f"{_where(site.owner, site.name)} was changed by others while it was patched"
                    warnings.warn(f"{changed}, and is left as they made it", RuntimeWarning, stacklevel=2)
                if not site.values:
                    _sites.pop((id(site.owner), site.name), None)
                successors[id(value)] = site.current
            self._replaced.clear()
            if self._package is None or not successors:
                return
            for module in loaded_modules(self._package):
                for name, value in list(vars(module).items()):
                    if id(value) in successors and (id(module), name) not in _sites:
                        setattr(module, name, successors[id(value)])

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.undo()


def loaded_modules(package: str) -> list[ModuleType]:
    """The package and those of its modules that have been imported."""
    names = [n for n in list(sys.modules) if n == package or n.startswith(package + ".")]
    return [m for n in names if isinstance(m := sys.modules.get(n), ModuleType)]


def holders(package: str, value: Any) -> list[tuple[ModuleType, str]]:
    """(module, name) of every binding to this very object in a loaded module of the package."""
    return [(m, name) for m in loaded_modules(package) for name, v in list(vars(m).items()) if v is value]
