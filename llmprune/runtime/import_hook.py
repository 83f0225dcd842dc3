"""Do something as soon as a module has been imported, without importing it.

`import llmprune` takes milliseconds and must stay so, but afterwards transformers has to know our packed checkpoints,
whichever of the two a program imports first. If the module is loaded already, the action runs at once; else a finder
waits on `sys.meta_path`, lets the others find the module, and steps in after its code has run. It then takes itself
off, so nothing is left behind.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run `action` once module `name` is loaded: now, or right after its first import that succeeds.

    `action` has to bear being called twice: another thread may load the module while this runs. Asking again for the
    same name takes the place of an older request that is still waiting, as a reloaded caller wants it.
    """
    for waiting in [finder for finder in sys.meta_path if isinstance(finder, _Waiting) and finder.name == name]:
        _withdraw(waiting)
    finder = _Waiting(name, action)
    # First wait, then look: a module that another thread is loading just now is met by one of the two.
    sys.meta_path.insert(0, finder)
    if name in sys.modules:
        importlib.import_module(name)  # returns when a half-loaded module is complete
        finder.fire()


class _Waiting(MetaPathFinder):
    """Finds one module by asking the other finders, and has its loader call back."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that tells us when it is done."""
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Waiting) or not hasattr(finder, "find_spec"):
                continue
            if (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Telling(spec.loader, self.fire)
                return spec
        return None

    def fire(self) -> None:
        """Leave, and act."""
        _withdraw(self)
        self.action()


def _withdraw(finder: _Waiting) -> None:
    # A new list in one step: another thread may be walking over the old one.
    sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]


class _Telling(Loader):
    """A module's own loader, for the time of one import."""

    def __init__(self, loader: Any, done: Callable[[], None]) -> None:
        self.loader, self.done = loader, done

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's loader does."""
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """Hand the module back to its own loader, run its code, and tell."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.done()
