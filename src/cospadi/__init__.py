"""CoSpaDi: make large language models smaller after training, by calibration-guided sparse dictionary learning.

Importing this package registers its checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads what `compress` wrote.
"""

from cospadi.__about__ import __version__
from cospadi.compress import Compressed, compress, measure_plan
from cospadi.errors import CheckpointError, UserError
from cospadi.integrations import transformers as _registered  # noqa: F401 its format, with transformers
from cospadi.model.load import load
from cospadi.recipe import Recipe
from cospadi.runtime.layer import CompressedLinear

__all__ = [
    "CheckpointError",
    "Compressed",
    "CompressedLinear",
    "Recipe",
    "UserError",
    "__version__",
    "compress",
    "load",
    "measure_plan",
]
