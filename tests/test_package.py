"""What importing the package loads, and when: inference needs the format and the layers, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cospadi

ENGINES = ("cospadi.solvers", "cospadi.calibration", "cospadi.jobs", "cospadi.stages", "cospadi.compress")
ENGINES += ("cospadi.commands", "cospadi.recipe", "cospadi.cli", "cospadi.demo", "cospadi.model", "cospadi.budget.plan")
ENGINES += ("datasets", "ray", "typer")

INFERENCE = """
import json, sys
import cospadi
loaded = [list(sys.modules)]
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded.append(list(sys.modules))
layers = sum(isinstance(module, cospadi.CompressedLinear) for module in model.modules())
from cospadi.compress import measure_plan
import cospadi.compress
module = sys.modules["cospadi.compress"]
same = cospadi.compress is module.compress and cospadi.measure_plan is measure_plan
print(json.dumps([loaded, layers, same]))
"""

COMMAND = """
import json, sys
import cospadi_cli
sys.argv = ["cospadi", *sys.argv[1:]]
try:
    cospadi_cli.main()
except SystemExit as end:
    print(json.dumps([end.code, list(sys.modules)]))
"""


def in_new_process(script: str, *words: object) -> Any:
    """What a script prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_inference_loads_no_engine_and_compress_stays_the_function(compressed_folder: Path) -> None:
    loaded, layers, same = in_new_process(INFERENCE, compressed_folder)
    assert layers > 0
    for modules in loaded:
        assert "cospadi.runtime.layer" in modules
        assert [name for name in modules if name.startswith(ENGINES)] == []
    assert same  # though a module of that name was imported first


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_reads_only_files_waits_for_no_transformers(command: str, compressed_folder: Path) -> None:
    ended, modules = in_new_process(COMMAND, command, compressed_folder)
    assert ended == 0
    assert "cospadi.format.verify" in modules
    assert "transformers" not in modules


def test_the_command_registers_the_format(compressed_folder: Path, text_file: Path) -> None:
    ended, modules = in_new_process(COMMAND, "eval", compressed_folder, "--text", text_file, "--length", 64)
    assert ended == 0
    assert "cospadi.integrations.transformers" in modules
    assert "lm_eval" not in modules  # an extra, for --tasks alone


def test_every_public_name_is_there() -> None:
    for name in cospadi.__all__:
        assert getattr(cospadi, name) is not None
    assert set(cospadi.__all__) <= set(dir(cospadi))
    with pytest.raises(AttributeError, match="no attribute 'decompress'"):
        _ = cospadi.decompress  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["compress", "--help"], 0),
        (["plan", "MODEL", "--ratoi", "0.2"], 2),
        (["compress", "MODEL", "-o", "DIR", "--ratio", "2"], 2),
    ],
)
def test_help_and_mistakes_wait_for_no_library(words: list[str], code: int) -> None:
    ended, modules = in_new_process(COMMAND, *words)
    assert ended == code
    assert "cospadi.cli" in modules
    assert not {"torch", "transformers", "numpy"} & set(modules)
