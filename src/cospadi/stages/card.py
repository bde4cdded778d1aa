"""The model card that `compress` writes as README.md of its output."""

from __future__ import annotations

from typing import Any

from cospadi.budget.plan import Plan


def model_card(plan: Plan, manifest: dict[str, Any]) -> str:
    """Markdown: how to load it first, then what it is."""
    recipe = manifest["recipe"]
    errors = [entry["relative_error"] for entry in manifest["projections"].values()]
    calibration = manifest.get("calibration")
    text = (
        f"{recipe['calibration']}, {calibration['sequences']} sequences of {calibration['length']} tokens"
        if calibration
        else "none (data-free)"
    )
    left = f"| projections left dense by the budget | {len(plan.left_dense)} |\n" if plan.left_dense else ""
    return f"""---
library_name: transformers
tags: [cospadi, compressed, sparse-dictionary]
---

**Load it with CoSpaDi, not with transformers alone:**

```python
import cospadi  # registers the format; without this line from_pretrained stops with a size mismatch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Never pass `ignore_mismatched_sizes=True`: without `import cospadi` it would fill the compressed projections with random
numbers.

# What this is

A language model whose {len(errors)} projections are stored in fewer bytes by CoSpaDi: as sparse weights, as a
dictionary times sparse coefficients (arXiv 2509.22075), as low-rank factors, as levels in an entropy code, or as
integers with scales and zeros.

| | |
|---|---|
| solver | {recipe["solver"]} |
{left}| projections, dense at 16 bits | {plan.dense_bytes / 1e6:.2f} MB |
| projections, compressed | {plan.bytes / 1e6:.2f} MB |
| ratio asked / reached | {recipe["ratio"]:.4f} / {plan.ratio:.4f} |
| bits a weight | {plan.bits:.3f} |
| mean relative error, whitened | {sum(errors) / len(errors):.4f} |
| calibration text | {text} |
| made by | cospadi {manifest["package_version"]} |

`cospadi inspect PATH` lists every projection; `cospadi verify PATH` checks every byte.
"""
