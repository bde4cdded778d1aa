"""The model card that `compress` writes as README.md of its output: the same for the same job, on any machine."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cospadi import files
from cospadi.budget.plan import Plan
from cospadi.errors import UserError
from cospadi.format import card, safetensors
from cospadi.format.card import PLACE
from cospadi.format.form import dense_bytes
from cospadi.model import adapters, load
from cospadi.stages.open import Job

PAPER = "2509.22075"
TAGS = ("cospadi", "compressed")
SMALL = 0.01
"""What is kept as it was and is less than this of the checkpoint has no line of its own."""


def model_card(job: Job, plan: Plan, manifest: Mapping[str, Any], folder: Path | None) -> str:
    """How to load it, how large its parts are, how it was made; licence and base model as the source tells them.

    Args:
        folder: holds the weights that were written; None where none were.
    """
    told = source_metadata(job)
    tags = dict.fromkeys([*_listed(told.pop("tags", None)), *TAGS, f"arxiv:{PAPER}"])
    fields = {
        **{name: told.get(name) for name in card.CARRIED if name not in ("tags", "pipeline_tag")},
        "base_model_relation": "quantized" if told.get("base_model") else None,
        "library_name": "transformers",
        "pipeline_tag": told.get("pipeline_tag", "text-generation"),
        "tags": list(tags),
    }
    name = job.hub_name if job.hub_name != load.DEMO else None
    parts = [_what(name, manifest), LOADING, _sizes(job, plan, manifest, folder), _making(job, plan, manifest)]
    return card.render(fields, "\n".join(parts))


def source_metadata(job: Job) -> dict[str, Any]:
    """What the source's card says, with the base model: the hub model that was compressed; of a local one what its card
    or its adapter's configuration names."""
    told = card.metadata(files.beside(job.source, card.CARD)) if job.source is not None else {}
    if job.hub_name not in (None, load.DEMO):
        told["base_model"] = job.hub_name
    elif "base_model" not in told and job.source is not None and adapters.has_adapter(job.source):
        try:
            base = str(adapters.base_of(job.source)[0])
        except UserError:
            base = ""
        if card.is_repository(base):
            told["base_model"] = base
    return told


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _what(name: str | None, manifest: Mapping[str, Any]) -> str:
    title = name.rpartition("/")[2] if name else "A language model"
    source = f"[{card.cell(name)}](https://huggingface.co/{name})" if name else "A language model"
    return f"""# {card.cell(title)}, compressed

{source} with {len(manifest["projections"])} of its linear projections stored in fewer bytes by CoSpaDi, as sparse
weights, as a dictionary times sparse coefficients ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), as low-rank
factors, as levels in an entropy code, or as integers with scales and zeros.
"""


LOADING = f"""## Load it

**With CoSpaDi, not with transformers alone:**

```python
import cospadi  # registers the format; without this line from_pretrained stops with a size mismatch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{PLACE}")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
```

Never pass `ignore_mismatched_sizes=True`: without `import cospadi` it would fill the compressed projections with random
numbers. `cospadi generate {PLACE} "Once upon a time"` tries it.

With vLLM:

```
pip install "cospadi[vllm]"
vllm serve {PLACE}
```
"""


def _sizes(job: Job, plan: Plan, manifest: Mapping[str, Any], folder: Path | None) -> str:
    """Bytes by kind of projection, of what was kept, and of the whole checkpoint."""
    stored = {name: sum(entry["bytes"].values()) for name, entry in manifest["projections"].items()}
    stored |= manifest.get("dense", {})
    kinds: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for member in plan.projections:
        kinds[_kind(member.name)].append((dense_bytes(member.d1, member.d2), stored[member.name]))
    lines = [
        [f"{kind}, {len(sizes)} projections", *(_megabytes(sum(one)) for one in zip(*sizes, strict=True))]
        for kind, sizes in kinds.items()
    ]
    lines.append(["these projections together", _megabytes(plan.dense_bytes), _megabytes(plan.bytes)])
    if folder is not None:
        lines += _kept(job, plan, folder)
    sizes = card.table(["part", "before", "after"], lines)
    return f"## Size\n\n{sizes}\nA dense projection counts 16 bits a weight; all else counts as it is stored.\n"


def _kept(job: Job, plan: Plan, folder: Path) -> list[list[str]]:
    """Lines for what is no projection of the plan, and for the whole checkpoint."""
    before = safetensors.tensor_sizes(job.folder) if job.folder is not None else {}
    after = safetensors.tensor_sizes(folder)
    whole, selected = sum(after.values()), {member.name for member in plan.projections}
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in after:
        module = name.rpartition(".")[0]
        if module not in selected:
            kinds[_kind(module)].append(name)
    small = [kind for kind, names in kinds.items() if sum(after[name] for name in names) < SMALL * whole]
    if rest := [name for kind in small for name in kinds.pop(kind)]:
        kinds["everything else"] = rest

    def line(kind: str, names: list[str]) -> list[str]:
        known = all(name in before for name in names)
        had = _megabytes(sum(before[name] for name in names)) if known else "-"
        return [kind, had, _megabytes(sum(after[name] for name in names))]

    lines = [line(kind, names) for kind, names in kinds.items()]
    left_out = sum(before[name] for name in job.blocks.unknown) if job.recipe.text_only else 0
    had = _megabytes(sum(before.values()) - left_out) if before else "-"
    return [*lines, ["whole checkpoint", had, _megabytes(whole)]]


def _kind(name: str) -> str:
    """What a module is, whatever block or expert it is of: the last part of its name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB" if nbytes >= 10_000 else f"{nbytes:,} bytes"


def _making(job: Job, plan: Plan, manifest: Mapping[str, Any]) -> str:
    recipe, errors = manifest["recipe"], [entry["relative_error"] for entry in manifest["projections"].values()]
    text, facts = manifest.get("calibration"), [["method", recipe["method"]], ["solver", recipe["solver"]]]
    if plan.left_dense:
        facts.append(["projections left dense by the budget", str(len(plan.left_dense))])
    facts += [
        ["ratio asked / reached", f"{recipe['ratio']:.4f} / {plan.ratio:.4f}"],
        ["bits a weight", f"{plan.bits:.3f}"],
        ["mean relative error, whitened", f"{sum(errors) / len(errors):.4f}"],
        [
            "calibration text",
            f"{recipe['calibration']}, {text['sequences']} sequences of {text['length']} tokens"
            if text
            else "none (data-free)",
        ],
        ["made by", f"cospadi {manifest['package_version']}"],
    ]
    return f"""## How it was made

```
{command(job, recipe)}
```

{card.table(["", ""], facts)}
`cospadi inspect {PLACE}` lists every projection; `cospadi verify {PLACE}` checks every byte.
"""


def command(job: Job, recipe: Mapping[str, Any]) -> str:
    """The command that makes the same model, in one line without paths of this machine."""
    asked = job.asked
    if asked.calibration is not None:
        asked = asked.model_copy(update={"calibration": recipe["calibration"]})
    source = "@".join(part for part in (job.hub_name or "MODEL", job.hub_revision) if part)
    return card.printable(shlex.join(["cospadi", "compress", source, *asked.flags(), "--output", "DIR"]))
