"""Figures as inline SVG, drawn by matplotlib in colours that the page's style sheet names, so that they follow it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from markupsafe import Markup, escape

from cospadi.calibration.loss import ByToken
from cospadi.errors import UserError
from cospadi.format.sizes import UNITS, Part, size

INK, MUTED, RULE, FIRST, SECOND = COLOURS = ("#010203", "#020304", "#030405", "#040506", "#050607")
"""Stand for the style sheet's colours of these names, in lower case."""

WIDTH, HEIGHT = 4.6, 3.1
"""Inches of 72 points: about the pixels that a telephone has, so that its text is not made smaller there."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cospadi",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "legend.frameon": False,
}

EDGES = (-8.0, -4.0, -2.0, -1.0, -0.5, -0.2, -0.05, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Of differences of losses, in nats."""

CHANCES = (0.9, 0.5, 0.1, 0.01)
"""What the dense model gave a token: bounds of the groups that SURE names."""
SURE = ("over 90 %", "50 to 90 %", "10 to 50 %", "1 to 10 %", "under 1 %")


def check_library() -> None:
    """Refuse where there is nothing to draw with.

    Raises:
        UserError: it names the command that installs it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            "a report draws its figures with matplotlib, which is not installed. Install it: "
            "pip install 'cospadi[report]'"
        ) from None


def sizes_figure(parts: Sequence[Part]) -> Markup:
    """Bytes of each part before and after."""
    unit, name = next((unit, name) for unit, name in UNITS if max(part.after for part in parts) >= unit or unit == 1)
    with _drawing(max(1.6, 0.42 * len(parts) + 0.9)) as (figure, axes):
        places = range(len(parts))
        for offset, colour, label, sizes in (
            (-0.19, FIRST, "before", [part.before or 0 for part in parts]),
            (0.19, SECOND, "after", [part.after for part in parts]),
        ):
            axes.barh(
                [place + offset for place in places], [one / unit for one in sizes], 0.36, color=colour, label=label
            )
        axes.set_yticks(list(places), [part.kind for part in parts])
        axes.invert_yaxis()
        axes.set_xlabel(name)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        said = "; ".join(f"{part.kind} {size(part.before or 0)} to {size(part.after)}" for part in parts)
        return _svg(figure, "sizes", f"Bars of the size of each part before and after: {said}.")


def differences_figure(tokens: ByToken) -> Markup:
    """How many tokens cost the compressed model how much more than the dense one."""
    difference = tokens.differences.flatten()
    edges = torch.tensor(EDGES, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(difference, edges), minlength=len(EDGES) + 1).tolist()
    with _drawing(HEIGHT) as (figure, axes):
        percent = [100 * count / difference.numel() for count in counts]
        middle = len(EDGES) // 2
        colours = [FIRST if place < middle else MUTED if place == middle else SECOND for place in range(len(counts))]
        axes.bar([place - 0.5 for place in range(len(counts))], percent, 0.88, color=colours)
        axes.set_xticks(range(len(EDGES)), [f"{edge:g}".replace("-", "−") for edge in EDGES], rotation=45)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_xlabel("loss compressed − loss dense, nats")
        axes.set_ylabel("% of tokens")
        axes.grid(axis="y")
        better, worse = sum(percent[:middle]), sum(percent[middle + 1 :])
        return _svg(
            figure, "differences",
            f"Histogram of what tokens cost the compressed model more than the dense one: {better:.1f} % cost over "
            f"{EDGES[middle]:g} nats less, {percent[middle]:.1f} % the same to that much, {worse:.1f} % more.",
        )  # fmt: skip


def sureness_figure(tokens: ByToken) -> Markup:
    """What is lost on tokens that the dense model was sure of, and on those that it was not."""
    chances, difference = torch.exp(-tokens.losses[1].double()).flatten(), tokens.differences.flatten()
    place = torch.stack([chances <= chance for chance in CHANCES]).sum(0)
    means, labels = [], []
    for index, name in enumerate(SURE):
        some = place == index
        means.append(float(difference[some].mean()) if bool(some.any()) else 0.0)
        labels.append(f"{name}\n{100 * float(some.double().mean()):.0f} % of tokens")
    with _drawing(HEIGHT) as (figure, axes):
        bars = axes.barh(range(len(SURE)), means, 0.62, color=[SECOND if mean > 0 else FIRST for mean in means])
        axes.bar_label(bars, [f"{mean:+.3f}".replace("-", "−") for mean in means], padding=4)
        axes.set_yticks(range(len(SURE)), labels)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.locator_params(axis="x", nbins=5)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("mean of loss compressed − loss dense, nats")
        axes.grid(axis="x")
        said = "; ".join(f"{name} {mean:+.3f}" for name, mean in zip(SURE, means, strict=True))
        return _svg(
            figure, "sureness", f"Mean loss added, by the probability that the dense model gave the token: {said}."
        )


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, to be drawn inside this block."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Any, name: str, says: str) -> Markup:
    """A figure as an element of the page, with what it says for who does not see it."""
    stream, none = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=none)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", text)  # ids are the page's, too
    text = re.sub(r"<svg ([^>]*?)>", lambda found: _head(found[1], says), text, count=1)
    for colour, variable in zip(COLOURS, ("ink", "muted", "rule", "first", "second"), strict=True):
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)


def _head(attributes: str, says: str) -> str:
    """The element's start tag: its size is the page's to choose."""
    (box,) = re.findall(r'viewBox="[^"]*"', attributes)
    return f'<svg {box} role="img" aria-label="{escape(says)}">'
