"""CoSpaDi: make large language models smaller after training, by calibration-guided sparse dictionary learning.

Importing this package registers its checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads what `compress` wrote. What else it has loads when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cospadi.__about__ import __version__
from cospadi.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from cospadi.commands.compare import compare
    from cospadi.compress import Compressed, compress, measure_plan
    from cospadi.heal import Healed, heal
    from cospadi.model.load import load
    from cospadi.recipe import Healing, Recipe
    from cospadi.runtime.layer import CompressedLinear

__all__ = [
    "CheckpointError",
    "Compressed",
    "CompressedLinear",
    "Healed",
    "Healing",
    "Recipe",
    "UserError",
    "__version__",
    "compare",
    "compress",
    "heal",
    "load",
    "measure_plan",
]

_WHERE = {
    "Compressed": "cospadi.compress",
    "CompressedLinear": "cospadi.runtime.layer",
    "Healed": "cospadi.heal",
    "Healing": "cospadi.recipe",
    "Recipe": "cospadi.recipe",
    "compare": "cospadi.commands.compare",
    "compress": "cospadi.compress",
    "heal": "cospadi.heal",
    "load": "cospadi.model.load",
    "measure_plan": "cospadi.compress",
}
"""Public name -> the module that it is loaded from on first use."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Has `cospadi.compress` the function, whoever imported the module of that name first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not getattr(sys.modules.get("cospadi_cli"), "is_command", False):
    importlib.import_module("cospadi.integrations.transformers")
