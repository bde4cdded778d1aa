"""The page, and its summary in Markdown."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cospadi.format import card as cards
from cospadi.format import sizes
from cospadi.report import figures, tokens
from cospadi.report.content import Content, left, not_selected, stays_dense
from cospadi.report.maps import heat_maps
from cospadi.stages import card


def render(content: Content) -> str:
    """The page: one file that needs no other, no network and no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": sizes.size, "signed": _signed, "quoted": shlex.quote}
    measured, parts = content.measured, [*content.selected, *content.kept]
    drawn = {"sizes": figures.sizes_figure(parts)}
    if measured is not None:
        drawn["differences"] = figures.differences_figure(measured.tokens)
        drawn["sureness"] = figures.sureness_figure(measured.tokens)
    return environment.get_template("page.html").render(
        content=content,
        measured=measured,
        log_ratio=None if measured is None else _log_ratio(measured.perplexities),
        maps=heat_maps(content.projections, "calibration" not in (content.manifest or {}), not_selected(content)),
        refined=content.refined,
        knows_errors=any(item["relative_error"] is not None for item in content.projections.values()),
        knows_losses=any(item["loss"] is not None for item in content.projections.values()),
        healed=bool((content.manifest or {}).get("healed")),
        shares=len({item["dictionary"] for item in content.projections.values()}) < len(content.projections),
        source=((content.manifest or {}).get("source") or {}).get("model"),
        left=left(content),
        stays_dense=stays_dense(content),
        figures=drawn,
        windows=[] if measured is None else list(tokens.windows(measured)),
        parted=[] if measured is None else tokens.parted(measured),
        fractions=None if measured is None else tokens.fractions(measured.tokens),
        same_choice=None if measured is None else tokens.same_choice(measured.tokens),
        generator=cards.PAGE,
    )


def markdown(content: Content) -> str:
    """A summary for a model card: size, quality where it was measured, how it was made."""
    parts = [f"## {cards.cell(content.name)}\n", f"{says(content)}\n"]
    table = card.size_table(content.selected, content.kept, content.whole, known=content.before is not None)
    parts.append(f"### Size\n\n{table}")
    if (measured := content.measured) is not None:
        count, length = measured.tokens.windows.shape
        ours, dense = measured.perplexities
        rows: list[Sequence[str]] = [
            [f"perplexity on {measured.text}, {count:,} windows of {length} tokens", f"{ours:.4f}", f"{dense:.4f}"],
            ["KL divergence from it, nats a token", f"{measured.divergence:.5f}", ""],
        ]
        parts.append(f"### Quality\n\n{cards.table(['', 'this model', measured.against], rows)}")
    if content.command is not None:
        parts.append(f"### How it was made\n\n```\n{content.command}\n```\n")
    if content.facts:
        parts.append(cards.table(["", ""], content.facts))
    return "\n".join(parts)


def says(content: Content) -> str:
    """The report in a sentence."""
    whole = content.whole
    return (
        f"{len(content.projections)} linear projections take {content.bits:.2f} bits a weight in place of 16; the "
        f"whole checkpoint {sizes.size(whole.after)} in place of {sizes.size(whole.before or 0)}."
    )


def _log_ratio(perplexities: tuple[float, float]) -> float:
    ours, dense = perplexities
    return math.log(ours / dense) if min(ours, dense) > 0 and math.isfinite(max(ours, dense)) else math.inf


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
