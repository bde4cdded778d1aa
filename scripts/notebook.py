"""examples/quickstart.ipynb, made of examples/quickstart.py and run.

    python scripts/notebook.py

Cells of the script begin with `# %%`; those of text are marked `[markdown]` there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT, NOTEBOOK = EXAMPLES / "quickstart.py", EXAMPLES / "quickstart.ipynb"
TEXT = " [markdown]\n"


def cells(script: str) -> list[Any]:
    """The cells of a script, but what stands before the first of them."""
    made = []
    for number, part in enumerate(script.split("\n# %%")[1:]):
        if part.startswith(TEXT):
            lines = [line[1:].removeprefix(" ") for line in part[len(TEXT) :].strip().splitlines()]
            cell = nbformat.v4.new_markdown_cell("\n".join(lines))
        else:
            cell = nbformat.v4.new_code_cell(part.strip())
        cell.id = f"cell-{number}"
        made.append(cell)
    return made


def executed(folder: Path) -> Any:
    """The notebook with what its cells print, run in a folder.

    Raises:
        CellExecutionError: a cell failed.
    """
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = cells(SCRIPT.read_text(encoding="utf-8"))
    notebook = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, resources=where, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": kernel}
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), NOTEBOOK)


if __name__ == "__main__":
    main()
