"""Jobs that die and go on: the same bytes in the end, whatever happened in between."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killed import hashes
from safetensors import SafetensorError

import cospadi
from cospadi.format import safetensors
from cospadi.jobs.ledger import JobDirectory
from cospadi.stages import costs, measure, refine

KILLS = 12 * int(os.environ.get("COSPADI_FUZZ", "1"))


def test_killed_at_random_moments_gives_the_same_bytes(
    make_llama: Callable[..., Path], recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"include": ["*q_proj", "*down_proj"]}))
    script = Path(__file__).parents[1] / "helpers" / "killed.py"
    words = [sys.executable, script, make_llama(), tmp_path / "recipe.json", tmp_path, KILLS]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=40 * KILLS)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert not told["wrong"]
    moments = Counter(told["moments"])
    assert sum(moments.values()) >= KILLS
    assert len(moments) >= 5, moments  # they did hit different stages
    assert {"gradients", "factors", "refined"} <= set(moments)


@pytest.fixture(scope="module")
def recipe(text_file: Path) -> dict[str, Any]:
    """All stages of the default recipe, each as short as it can be."""
    fields: dict[str, Any] = {"ratio": 0.3, "iterations": 2, "gradient_sequences": 1, "refine": 2}
    return fields | {"calibration": str(text_file), "sequences": 4, "length": 32}


@pytest.fixture(scope="module")
def unfinished(
    dense_folder: Path, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """A job directory that was left before writing, and the hashes that its output must have in the end."""
    folder = tmp_path_factory.mktemp("unfinished")
    cospadi.compress(dense_folder, recipe, folder / "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense_folder, recipe, folder / "out")
    return folder / "out.work", hashes(folder / "reference")


@pytest.fixture
def interrupted(unfinished: tuple[Path, dict[str, str]], tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The name of an output whose job directory lies beside it, and the hashes that it must have in the end."""
    shutil.copytree(unfinished[0], tmp_path / "out.work")
    return tmp_path / "out", unfinished[1]


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_nothing_finished_is_computed_again(
    interrupted: tuple[Path, dict[str, str]],
    dense_folder: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, wanted = interrupted
    for module, names in (
        (sys.modules["cospadi.compress"], ("factorize",)),
        (measure.walk, ("paired_grams", "grams")),
        (costs, ("gradient_grams_by_blocks",)),
        (refine, ("refine_block",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, stop)
    cospadi.compress(dense_folder, recipe, output, resume=True)
    assert hashes(output) == wanted
    assert not output.with_name("out.work").exists()


@pytest.mark.parametrize("metric", ["output", "weights"])
def test_a_job_that_does_not_walk_goes_on_from_its_last_piece(
    metric: str, dense_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    fields = quick | {"metric": metric}
    cospadi.compress(dense_folder, fields, tmp_path / "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "write_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            cospadi.compress(dense_folder, fields, tmp_path / "out")
    cospadi.compress(dense_folder, fields, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_pieces_damaged_between_runs_are_computed_again_and_said(
    interrupted: tuple[Path, dict[str, str]],
    dense_folder: Path,
    recipe: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output, wanted = interrupted
    pieces = sorted(output.with_name("out.work").glob("pieces/*.safetensors"))
    assert len(pieces) >= 8  # the text, gradients of each block, groups' factors, refined blocks
    damaged = 0
    for number, piece in enumerate(pieces):
        content = bytearray(piece.read_bytes())
        content[(3, -1)[number % 2]] ^= 4  # in the header, in the tensors
        piece.write_bytes(content[: len(content) // 2] if number % 4 == 2 else content)
        if number % 4 == 3:
            piece.unlink()
        else:
            damaged += 1
    with caplog.at_level(logging.WARNING, "cospadi"):
        cospadi.compress(dense_folder, recipe, output)
    assert hashes(output) == wanted
    assert caplog.text.count("is not as it was written: computed again") == damaged


@pytest.mark.parametrize(
    "key",
    ["text", "gradients", "gradients/0000", "gradients/0001", "factors/*.0.*down*", "refined/0000", "refined/0001"],
)
def test_a_piece_that_is_lost_is_made_again(
    key: str, interrupted: tuple[Path, dict[str, str]], dense_folder: Path, recipe: dict[str, Any]
) -> None:
    output, wanted = interrupted
    (lost,) = output.with_name("out.work").glob(f"pieces/{key.replace('/', '%2F')}.safetensors")
    lost.unlink()
    cospadi.compress(dense_folder, recipe, output, resume=True)
    assert hashes(output) == wanted


def test_no_resume_begins_anew(
    interrupted: tuple[Path, dict[str, str]], dense_folder: Path, recipe: dict[str, Any]
) -> None:
    output, wanted = interrupted
    other = recipe | {"ratio": 0.4}
    with pytest.raises(cospadi.UserError, match=r"unfinished job with ratio 0\.3, not 0\.4"):
        cospadi.compress(dense_folder, other, output)
    assert any(output.with_name("out.work").glob("pieces/*"))
    cospadi.compress(dense_folder, other, output, resume=False)
    assert hashes(output) != wanted
    assert not output.with_name("out.work").exists()


def test_another_model_or_text_is_refused(
    interrupted: tuple[Path, dict[str, str]],
    make_llama: Callable[..., Path],
    dense_folder: Path,
    recipe: dict[str, Any],
    text_file: Path,
) -> None:
    output, wanted = interrupted
    with pytest.raises(cospadi.UserError, match="unfinished job with weights"):
        cospadi.compress(make_llama(num_hidden_layers=3), recipe, output)
    before = text_file.read_text()
    try:
        text_file.write_text(before.replace("squared", "doubled"))
        with pytest.raises(cospadi.UserError, match=r"words\.txt is not the one that the unfinished job"):
            cospadi.compress(dense_folder, recipe, output)
    finally:
        text_file.write_text(before)
    cospadi.compress(dense_folder, recipe, output)
    assert hashes(output) == wanted


def test_two_runs_at_once_in_one_place(
    interrupted: tuple[Path, dict[str, str]], dense_folder: Path, recipe: dict[str, Any]
) -> None:
    output, wanted = interrupted
    other = JobDirectory(output.with_name("out.work"))
    with pytest.raises(cospadi.UserError, match="another cospadi is running in"):
        cospadi.compress(dense_folder, recipe, output)
    other.close()
    cospadi.compress(dense_folder, recipe, output)
    assert hashes(output) == wanted


@pytest.mark.parametrize("moment", ["after the rename", "between the renames", "before the renames"])
def test_stopped_while_the_output_takes_its_place(
    moment: str, dense_folder: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, recipe = tmp_path / "out", recipe | {"refine": 0}
    cospadi.compress(dense_folder, recipe, tmp_path / "reference")
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "precious.txt").write_text("old")
    rename = Path.rename

    def renamed(self: Path, target: Path) -> Path:
        moved = self.name if self.name == "output" else "old" if self == output else "other"
        if (moment, moved) in {("before the renames", "old"), ("between the renames", "output")}:
            os._exit(9)
        result = rename(self, target)
        if (moment, moved) == ("after the rename", "output"):
            os._exit(9)
        return result

    process = os.fork()
    if process == 0:
        monkeypatch.setattr(Path, "rename", renamed)
        try:
            cospadi.compress(dense_folder, recipe, output, overwrite=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    if moment == "after the rename":
        assert hashes(output) == hashes(tmp_path / "reference")
        cospadi.compress(dense_folder, recipe, output)  # needs no --overwrite: what is there is its own
    else:
        with pytest.raises(cospadi.UserError, match="is not empty"):
            cospadi.compress(dense_folder, recipe, output)
        assert (output / "precious.txt").read_text() == "old"
        cospadi.compress(dense_folder, recipe, output, overwrite=True)
    assert hashes(output) == hashes(tmp_path / "reference")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "reference"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int, str], Path]]:
    """Mount a file system of so many bytes: small_disk(size, options)."""
    mounted: list[Path] = []

    def mount(size: int, options: str = "rw") -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no right to mount a small file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_stops_the_job_which_goes_on_when_there_is_room(
    dense_folder: Path, recipe: dict[str, Any], unfinished: tuple[Path, dict[str, str]], small_disk: Callable[..., Path]
) -> None:
    needed = sum(path.stat().st_size for path in unfinished[0].with_name("reference").iterdir())
    disk = small_disk(9 * needed)
    ballast, outcomes = disk / "ballast", []
    for tenths in range(2, 80, 2):  # room for so much of what the output takes
        ballast.write_bytes(b"x" * int((9 - tenths / 10) * needed))
        try:
            cospadi.compress(dense_folder, recipe, disk / "out")
        except (OSError, SafetensorError, cospadi.UserError) as error:
            outcomes.append(str(error))
        ballast.unlink()
        if (disk / "out").exists():
            break
    assert all(any(word in told for word in ("MB are free", "No space", "os error 28")) for told in outcomes), outcomes
    assert any("MB are free" in outcome for outcome in outcomes)
    assert any("MB are free" not in outcome for outcome in outcomes)
    assert hashes(disk / "out") == unfinished[1]
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_refused_at_once(dense_folder: Path, small_disk: Callable[..., Path]) -> None:
    disk = small_disk(2**20, "ro")
    with pytest.raises(cospadi.UserError, match=r"Read-only file system|no permission"):
        cospadi.compress(dense_folder, {"metric": "weights"}, disk / "out")
