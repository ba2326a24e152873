"""Two import rules for a process that runs the host: absent companions of torch, and the pack under one short name."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

COMPANIONS = ("torchvision", "torchaudio")


class StandIn(types.ModuleType):
    """Any name of a module that is not there. Importing it is allowed, calling it is an error that says why."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        package = self.__name__.split(".")[0]
        raise RuntimeError(f"{self.__name__} was called, but {package} is not installed beside this torch. "
                           f"Install a {package} that matches torch to use this node.")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def stand_in_for_missing():
    """Core node files import torchvision and torchaudio at the top; where those fail, stand-ins take their place."""
    missing = []
    for name in COMPANIONS:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):  # absent; or built for another torch, which shows in many ways
            for module in [m for m in sys.modules if m.split(".")[0] == name]:
                del sys.modules[module]
            missing.append(name)
    if missing:
        sys.meta_path.insert(0, StandIns(missing))
    return missing


class Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`steer.x.y` is the very module that the host loaded as `<path of the pack>.x.y`."""

    def __init__(self, alias, name):
        self.alias, self.name = alias, name
        self.specs = {}

    def real(self, fullname):
        return self.name + fullname[len(self.alias):]

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] != self.alias:
            return None
        real = self.real(fullname)
        if real not in sys.modules and importlib.util.find_spec(real) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec):
        module = importlib.import_module(self.real(spec.name))
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module):
        # The import system has just written the alias's spec into the module; relative imports need its own.
        module.__spec__ = self.specs.pop(module.__spec__.name)
