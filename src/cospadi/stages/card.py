"""The model card that `compress` writes as README.md of its output: the same for the same job, on any machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi import files
from cospadi.budget.plan import Plan
from cospadi.errors import UserError
from cospadi.format import card, safetensors, sizes
from cospadi.format.card import PLACE
from cospadi.format.form import DENSE_BITS, Form, dense_bytes
from cospadi.format.sizes import Part
from cospadi.model import adapters, load
from cospadi.recipe import Recipe
from cospadi.stages.open import Job

PAPER = "2509.22075"
TAGS = ("cospadi", "compressed")


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
    parts = [_what(name, manifest, plan), LOADING, _sizes(job, plan, manifest, folder), _making(manifest, plan)]
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


def _what(name: str | None, manifest: Mapping[str, Any], plan: Plan) -> str:
    title = name.rpartition("/")[2] if name else "A language model"
    source = f"[{card.cell(name)}](https://huggingface.co/{name})" if name else "A language model"
    return f"""# {card.cell(title)}, compressed

{source} with {len(manifest["projections"])} of its linear projections stored in fewer bytes by CoSpaDi, as
{" or ".join(sorted({_in_words(group.stored) for group in plan.compressed}))}.
"""


def _in_words(form: Form) -> str:
    """What a projection is stored as."""
    if form.dictionary_kind.shape(1, 1) is not None:
        paper = f"a dictionary times sparse coefficients ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER}))"
        return paper if form.support_kind.chosen else "low-rank factors"
    if form.support_kind.chosen:
        return "sparse weights"
    return "levels in an entropy code" if form.codec.coded else "integers with scales and zeros"


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
    selected = {member.name: (dense_bytes(member.d1, member.d2), stored[member.name]) for member in plan.projections}
    kept, whole = [], None
    if folder is not None:
        before = safetensors.tensor_sizes(job.folder) if job.folder is not None else {}
        after = safetensors.tensor_sizes(folder)
        kept = sizes.kept_parts(selected, before, after)
        left_out = sum(before[name] for name in job.blocks.unknown) if job.recipe.text_only else 0
        whole = Part("whole checkpoint", len(after), sum(before.values()) - left_out or None, sum(after.values()))
    return f"## Size\n\n{size_table(sizes.selected_parts(selected), kept, whole)}"


def size_table(selected: Sequence[Part], kept: Sequence[Part], whole: Part | None, known: bool = True) -> str:
    """Parts of a checkpoint in Markdown, with what counts how.

    Args:
        kept: with `whole`; none where nothing was written.
        known: whether the dense checkpoint is, else `whole` has projections of 16 bits a weight before.
    """

    def line(part: Part, name: str) -> list[str]:
        return [name, "-" if part.before is None else sizes.size(part.before), sizes.size(part.after)]

    lines = [line(part, f"{part.kind}, {part.number} projections") for part in selected]
    lines.append(line(sizes.together(selected), "these projections together"))
    lines += [line(part, part.kind) for part in (*kept, whole) if part is not None]
    counted = "A dense projection counts 16 bits a weight"
    if whole is not None and known:
        counted += "; all else counts as it is stored, the whole checkpoint, too"
    elif whole is not None:
        counted += ", in the whole checkpoint, too; what was not compressed counts as it is stored now"
    return f"{card.table(['part', 'before', 'after'], lines)}\n{counted}.\n"


def _making(manifest: Mapping[str, Any], plan: Plan) -> str:
    return f"""## How it was made

```
{command(manifest)}
```

{card.table(["", ""], facts(manifest, plan.dense_bytes, plan.bytes))}
`cospadi inspect {PLACE}` lists every projection; `cospadi verify {PLACE}` checks every byte.
"""


def facts(manifest: Mapping[str, Any], dense: int, stored: int) -> list[list[str]]:
    """How a model was made, a name and a value each.

    Args:
        dense, stored: bytes of the selected projections, before and after.
    """
    recipe, text = manifest["recipe"], manifest.get("calibration")
    found = [["method", recipe["method"]], ["solver", recipe["solver"]]]
    if left := manifest.get("dense"):
        found.append(["projections left dense by the budget", str(len(left))])
    found += [
        ["ratio asked / reached", f"{recipe['ratio']:.4f} / {(dense - stored) / dense:.4f}"],
        ["bits a weight", f"{DENSE_BITS * stored / dense:.3f}"],
    ]
    errors = [entry["relative_error"] for entry in manifest["projections"].values() if "relative_error" in entry]
    if errors:
        found.append([card.ERROR, f"{sum(errors) / len(errors):.4f}"])
    return [
        *found,
        [
            "calibration text",
            f"{recipe['calibration']}, {text['sequences']} sequences of {text['length']} tokens"
            if text
            else "none (data-free)",
        ],
        *(["healed", _healed(record)] for record in manifest.get("healed", [])),
        ["made by", f"cospadi {manifest['package_version']}"],
    ]


def _healed(record: Mapping[str, Any]) -> str:
    """What `heal` has done once."""
    teacher, text = record["teacher"].get("model") or "the dense model", record["text"]
    before, after = record["divergence"]
    what = "KL divergence" if record["settings"]["top"] else "loss"
    return (
        f"{record['best_step']:,} steps towards {teacher} on {text['name']}, {text['sequences']:,} sequences of "
        f"{text['length']} tokens: {what} on {text['held_out']:,} others {before:.5f} before, {after:.5f} after"
    )


def command(manifest: Mapping[str, Any]) -> str:
    """The command that makes the same model, in one line without paths of this machine.

    Raises:
        UserError: the manifest is of a version that knows other options.
    """
    source = manifest["source"]
    name = "@".join(part for part in (source["model"] or "MODEL", source.get("revision")) if part)
    flags = Recipe.build(manifest["recipe"]).flags()
    return card.printable(shlex.join(["cospadi", "compress", name, *flags, "--output", "DIR"]))
