"""lm-evaluation-harness's model type `cospadi`: its `hf`, in a process that knows the format.

lm-eval finds it by the entry point `lm_eval.models`; versions that do not look for one (0.4.13) know it in a process
that has imported this module, as `cospadi lm-eval` does.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import cospadi.integrations.transformers  # noqa: F401  registers the format
from cospadi.errors import UserError, first_line
from cospadi.model import load

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError:
    raise UserError("lm-eval is not installed: pip install 'cospadi[eval]'") from None


@register_model("cospadi")
class CospadiLM(HFLM):
    """lm-eval's `hf`, whose arguments it takes, with three defaults of `cospadi eval`: log-likelihoods are summed in
    float32, the device is a GPU where there is one, and the model is a folder, a hub name, NAME@REVISION or `demo`.

    Raises:
        UserError: no such model.
    """

    def __init__(
        self,
        pretrained: Any,
        revision: str | None = None,
        device: str | None = None,
        softmax_dtype: Any = "float32",
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            pretrained = str(load.resolve(pretrained, revision))
        device = device or str(load.pick_device("auto"))
        super().__init__(pretrained, device=device, softmax_dtype=softmax_dtype, **options)


def main(words: Sequence[str]) -> None:
    """Run lm-eval's own command line on some words.

    Raises:
        UserError: lm-eval stopped with an error.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *words]
    # Its processes are forked, and ended by a SIGTERM that must not raise an exception wherever they are: they would
    # stay where they hold a lock.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        cli_evaluate()
    except UserError:
        raise
    except Exception as error:  # whatever a task, a model or an argument of lm-eval's may raise
        if os.environ.get("COSPADI_TRACEBACK") == "1":
            raise
        told = f"lm-eval stops with {type(error).__name__}: {first_line(error)}"
        raise UserError(f"{told}. COSPADI_TRACEBACK=1 shows where") from None
