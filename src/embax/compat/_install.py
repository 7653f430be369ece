"""Makes `import jax_tpu_embedding` mean `embax.compat`."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_ALIAS = "jax_tpu_embedding"
_PACKAGE = "embax.compat"


class _Loader(importlib.abc.Loader):
    """Loads a module under its second name, by importing it under its first."""

    def __init__(self, name: str):
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__  # What imports this module writes its own one there.
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `jax_tpu_embedding` and what is below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != _ALIAS and not fullname.startswith(f"{_ALIAS}."):
            return None
        name = _PACKAGE + fullname.removeprefix(_ALIAS)
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise  # The module exists, and something that its package imports does not.
            return None
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, _Loader(name), is_package=is_package)


def install() -> None:
    """Makes `import jax_tpu_embedding`, and of modules below it, import those of `embax.compat`.

    Both names then give the same module objects. Installed once is installed for the process; a second call does nothing. An
    installed jax-tpu-embedding is not looked at any more.

    Raises:
        RuntimeError: jax-tpu-embedding itself has been imported already.

    Example:
        >>> embax.compat.install()  # doctest: +SKIP
        >>> from jax_tpu_embedding.sparsecore.lib.nn import embedding  # doctest: +SKIP
    """
    package = importlib.import_module(_PACKAGE)
    imported = sorted(name for name in sys.modules if name == _ALIAS or name.startswith(f"{_ALIAS}."))
    if imported and sys.modules.get(_ALIAS) is not package:
        raise RuntimeError(
            f"embax.compat.install: {imported[0]} has been imported from {getattr(sys.modules[imported[0]], '__file__', None)!r} "
            "already; call install() before anything imports jax_tpu_embedding."
        )
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
