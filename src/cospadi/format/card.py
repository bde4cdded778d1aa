"""A checkpoint's model card, `README.md`: what its source's card says, and what is put into it after it was written."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import UserError, first_line

log = logging.getLogger("cospadi")

CARD = "README.md"
PLACE = "PATH-OR-REPOSITORY"
"""Stands in a card for where the model is, until an upload knows: a card written on a disk names no place on it."""

CARRIED = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag", "base_model")
"""What is taken over from the source's card."""

REPOSITORY = re.compile(r"[a-zA-Z0-9][\w.-]{0,95}/[a-zA-Z0-9][\w.-]{0,95}", re.ASCII)
MEASURED = "## Measured"
ERROR = "mean relative error, whitened"
"""The fact of a model that no longer holds once its numbers have changed."""
PAGE = '<meta name="generator" content="cospadi report">'
"""By which a page that `cospadi report` has written is known."""
COMMAND = re.compile(r"^```\n(cospadi (?:eval|bench) .*)\n```\n", re.MULTILINE)


def is_page(path: Path) -> bool:
    """Whether this is a page that `cospadi report` has written."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return PAGE.encode() in stream.read(1000)


def read(path: Path) -> str:
    """A card's text, with its line ends as they are.

    Raises:
        UserError: it is no text that can be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}. Mend it, or move it away") from None


def metadata(path: Path) -> dict[str, Any]:
    """What a card says of licence, languages, data sets, tags, task and base model; warns of what it leaves out.

    Returns:
        Some of `CARRIED` -> a text, or a list of texts. Nothing where there is no card, or none with metadata.
    """
    if not path.is_file():
        return {}
    try:
        text = read(path)
        fields = _front_matter(text)
    except Exception as error:  # YAML's own errors, and what its values meet in the library
        log.warning("%s: its metadata cannot be read, and no licence is taken over (%s)", path, first_line(error))
        return {}
    found: dict[str, Any] = {}
    for name in CARRIED:
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            found[name] = value
        else:
            log.warning("%s: its %s is no text, and is not taken over", path, name)
    bases = [found["base_model"]] if isinstance(found.get("base_model"), str) else found.pop("base_model", [])
    if kept := [base for base in bases if is_repository(base)]:
        found["base_model"] = kept[0] if len(kept) == 1 else kept
    else:
        found.pop("base_model", None)
    return found


def _front_matter(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    text = text.removeprefix("\ufeff")
    if not text.lstrip().startswith("---"):  # of which the library would warn
        return {}
    data = ModelCard(text, ignore_metadata_errors=True).data
    return {name: data.get(name) for name in CARRIED}


def is_repository(name: str) -> bool:
    """Whether a name can be a repository's, OWNER/NAME, and is no path on this machine."""
    return REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def render(fields: Mapping[str, Any], body: str) -> str:
    """A card of metadata and Markdown; fields that are None are left out."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n\n{body}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: words left, the other columns right. Its cells are shown as they are, whatever is in them."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table as `table` writes it, its head first; no line for what is under the head."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.endswith(" |")]
    found = [[_uncelled(cell) for cell in line[2:-2].split(" | ")] for line in lines]  # in a cell it is escaped
    return [cells for cells in found if not all(re.fullmatch("-+:?", cell) for cell in cells)]


def _uncelled(text: str) -> str:
    return html.unescape(re.sub(r"\\([\\`*\[\]|])", r"\1", text)).strip()


def cell(text: str) -> str:
    """A text that Markdown shows as it is, in a table too."""
    shown = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", shown)


def printable(text: str) -> str:
    """A text in one line of characters that UTF-8 and a terminal know."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def tagged(text: str, tags: Sequence[str]) -> str:
    """A card with more tags in its metadata.

    Raises:
        UserError: its metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except Exception as error:  # as in `metadata`
        raise UserError(f"the card's metadata cannot be read: {first_line(error)}. Mend {CARD}") from None
    there = card.data.get("tags", [])
    card.data["tags"] = list(dict.fromkeys([*([there] if isinstance(there, str) else there), *tags]))
    return str(card.content)


def naming(text: str, repo: str) -> str:
    """A card that names the repository it goes to."""
    return text.replace(PLACE, repo)


def with_measured(text: str, command: str, found: str) -> str:
    """A card with what a command has measured, in place of what the same command had measured before.

    Args:
        command: `cospadi eval ...` or `cospadi bench ...`, in one line.
        found: Markdown without headings and fences.
    """
    start, inside, end = _measured(text)
    if not inside:
        start, inside = f"{start.rstrip()}\n\n".lstrip("\n"), f"{MEASURED}\n\n"
    heading = COMMAND.split(inside)[0]
    blocks = measured(inside) | {command: f"\n{found.strip()}\n\n"}
    whole = "".join(f"```\n{name}\n```\n{block}" for name, block in blocks.items())
    return f"{start}{heading}{whole}{end}".rstrip() + "\n"


def measured(text: str) -> dict[str, str]:
    """What a card says was measured: command -> Markdown."""
    _, *parts = COMMAND.split(_measured(text)[1])
    return dict(zip(parts[::2], parts[1::2], strict=True))


def without_measured(text: str) -> str:
    """A card without what was measured, for weights that have changed since."""
    start, inside, end = _measured(text)
    return f"{start}{end}".rstrip() + "\n" if inside else text


HEALED = """\
## Healed

Its stored numbers were trained towards the predictions of the dense model by `cospadi heal`, supports, codes and bytes
as they were: `cospadi.json` says on which text and how. How far its projections are from the dense ones is not known
any more.
"""


def healed(text: str) -> str:
    """A card that says so, without what was known of the numbers that have changed."""
    text = re.sub(rf"^\| {ERROR} \|.*\n", "", without_measured(text), flags=re.MULTILINE)
    return text if HEALED in text else f"{text.rstrip()}\n\n{HEALED}"


def _measured(text: str) -> tuple[str, str, str]:
    """What stands before the section of measurements, the section with its heading, and what stands after it."""
    found = re.search(rf"^{MEASURED}$.*?(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return (text, "", "") if found is None else (text[: found.start()], found[0], text[found.end() :])
