"""Compress a model again and again, killed at random moments, and compare what comes out in the end.

    python tests/helpers/killed.py MODEL RECIPE.json FOLDER KILLS

A process of its own, so that it can fork: children start at once, with everything imported and no thread yet.
Prints, as JSON, what each killed one had finished, and what was wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama

import cospadi
from cospadi.format import verify

STAGES = ("start", "text", "gradients", "factors", "refined", "output", "written")
"""What a job has finished when it is killed, in its order; "output" is while the output is written."""


def child(model: str, recipe: dict[str, object], output: Path) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            cospadi.compress(model, recipe, output)
            code = 0
        finally:
            os._exit(code)
    return process


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def finished(output: Path) -> str:
    """How far an interrupted job has come."""
    work = output.with_name(f"{output.name}.work")
    if output.exists():
        return "everything"
    stages = {path.stem.partition("%2F")[0] for path in work.glob("pieces/*.safetensors")}
    stages |= {"output"} if (work / "output").exists() else set()
    return max(stages & set(STAGES), key=STAGES.index, default="nothing")


def killed(process: int, output: Path, stage: str, chance: random.Random) -> bool:
    """Kill a child a moment after it has come to a stage; False if it ended before."""
    while True:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        staging = output.with_name(f"{output.name}.work") / "output"
        if (stage == "output" and staging.exists()) or stage in ("start", finished(output)):
            break
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.4 if stage == "start" else 0.03))
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def main(model: str, recipe_file: str, folder: str, kills: str) -> None:
    torch.set_num_threads(1)
    assert transformers.models.llama.modeling_llama
    recipe, root = json.loads(Path(recipe_file).read_text()), Path(folder)
    for name in ("first", "second"):
        assert os.waitpid(child(model, recipe, root / name), 0)[1] == 0
    wanted = hashes(root / "first")
    wrong = [] if hashes(root / "second") == wanted else ["two undisturbed runs differ"]
    chance, moments, number = random.Random(7), [], 0
    while len(moments) < int(kills):
        place = root / f"round-{number}"
        place.mkdir()
        output, number = place / "out", number + 1
        for stage in sorted(chance.sample(range(len(STAGES)), 4)):
            if not killed(child(model, recipe, output), output, STAGES[stage], chance):
                break
            moments.append(finished(output))
            if output.exists() and hashes(output) != wanted:
                wrong.append(f"round {number}: half an output under the final name")
            if not {path.name for path in place.iterdir()} <= {"out", "out.work"}:
                wrong.append(f"round {number}: left {[path.name for path in place.iterdir()]}")
        if not output.exists() or output.with_name("out.work").exists():
            _, status = os.waitpid(child(model, recipe, output), 0)
            if status != 0:
                wrong.append(f"round {number}: the last run failed")
        if not output.exists() or hashes(output) != wanted:
            wrong.append(f"round {number}: other bytes")
        elif [path.name for path in place.iterdir()] != ["out"]:
            wrong.append(f"round {number}: left {[path.name for path in place.iterdir()]} at the end")
        else:
            verify.verify(output)
        shutil.rmtree(place)
    print(json.dumps({"moments": moments, "wrong": wrong}))


if __name__ == "__main__":
    main(*sys.argv[1:])
