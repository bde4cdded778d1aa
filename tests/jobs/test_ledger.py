"""The job directory: pieces are whole or not there, damage is noticed, one process at a time, one job at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tasks import wait_for

from cospadi import UserError
from cospadi.calibration.spill import Spill
from cospadi.jobs import ledger
from cospadi.jobs.ledger import JobDirectory

IDENTITY: dict[str, Any] = {"recipe": {"ratio": 0.3, "seed": 1}, "weights": "a" * 64, "threads": 2}
TENSORS = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(4, dtype=torch.bfloat16)}


def begun(folder: Path, **options: Any) -> JobDirectory:
    job = JobDirectory(folder, **options)
    job.begin(IDENTITY, {"note": 1})
    return job


def filled(folder: Path, count: int = 3) -> None:
    job = begun(folder)
    for index in range(count):
        job.put(f"piece/{index}", {"number": index, "loss": float("inf")}, {"x": TENSORS["x"] + index})
    job.put("record", {"list": [1.5, 2**60, "é"]})
    job.close()


def piece_file(folder: Path, key: str) -> Path:
    return folder / ledger.PIECES / f"{key.replace('/', '%2F')}.safetensors"


def test_pieces_are_found_again_by_the_same_job(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out.work"
    job = JobDirectory(folder)
    assert job.begin(IDENTITY, {"note": [1, "a"]}) is False
    job.put("factors/0", {"error": 0.1}, TENSORS)
    job.put("curve", {"options": [[1, 0.25]]})
    job.close()

    again = JobDirectory(folder)
    assert again.note("note") == [1, "a"]
    assert again.begin(IDENTITY, {}) is True
    piece = again.get("factors/0")
    assert piece is not None
    assert piece.record["error"] == 0.1
    found = piece.tensors()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert again.get("curve") is not None
    assert again.get("nothing") is None
    again.drop("factors/")
    again.close()
    third = begun(folder)
    assert third.get("factors/0") is None
    assert third.get("curve") is not None
    assert [path.name for path in (folder / ledger.PIECES).iterdir()] == ["curve.safetensors"]
    third.remove()
    assert not folder.exists()
    third.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": {"ratio": 0.4, "seed": 1}}, "ratio 0.3, not 0.4"),
        ({"recipe": {"ratio": 0.3, "seed": None}}, "seed 1, not None"),
        ({"weights": "b" * 64}, "weights aaaaaaaaaaaa..., not bbbbbbbbbbbb..."),
        ({"threads": 4}, "threads 2, not 4"),
    ],
)
def test_another_job_in_the_same_place_is_refused_by_what_differs(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    filled(tmp_path / "work")
    job = JobDirectory(tmp_path / "work")
    with pytest.raises(UserError, match="work holds an unfinished job with " + told.replace(".", r"\.")):
        job.begin(IDENTITY | change, {})
    job.close()
    anew = JobDirectory(tmp_path / "work", resume=False)
    assert anew.begin(IDENTITY | change, {}) is False
    assert anew.get("piece/0") is None
    anew.close()


def test_nothing_is_left_where_nothing_was_finished(tmp_path: Path) -> None:
    job = begun(tmp_path / "new" / "deep" / "out.work")
    job.put("text", {}, TENSORS)
    job.close()
    assert not list(tmp_path.iterdir())


def test_somebody_elses_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("precious")
    for resume in (None, True, False):
        with pytest.raises(UserError, match=r"holds thesis\.tex, which is not of this program"):
            JobDirectory(tmp_path / "work", resume)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.tex"]


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    filled(tmp_path / "work")
    process = os.fork()
    if process == 0:
        try:
            JobDirectory(tmp_path / "work")
            (tmp_path / "held").touch()
            time.sleep(600)
        finally:
            os._exit(1)
    try:
        wait_for(tmp_path / "held")
        with pytest.raises(UserError, match="another cospadi is running in"):
            JobDirectory(tmp_path / "work")
    finally:
        os.kill(process, signal.SIGKILL)  # lets go of the lock without having a chance to
        os.waitpid(process, 0)
    job = begun(tmp_path / "work")
    assert job.get("piece/2") is not None
    job.close()


def test_a_damaged_piece_is_forgotten_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path / "work")
    job = begun(tmp_path / "work")
    piece = job.get("piece/1")
    assert piece is not None
    assert piece.path is not None
    job.close()
    content = bytearray(piece.path.read_bytes())
    content[-1] ^= 1
    piece.path.write_bytes(content)
    job = begun(tmp_path / "work")
    with caplog.at_level(logging.WARNING, "cospadi"):
        assert job.get("piece/1") is None
    assert f"{piece.path} is not as it was written: computed again" in caplog.text
    assert job.get("piece/0") is not None
    job.close()


def test_a_write_that_was_cut_short_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it is where a disk loses what was synced: a piece is renamed only when it is whole."""
    filled(tmp_path / "work")
    path = piece_file(tmp_path / "work", "piece/1")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        job = begun(tmp_path / "work")
        assert [job.get(f"piece/{index}") is not None for index in range(3)] == [True, False, True]
        os.close(job._lock)
    assert caplog.text.count("computed again") == len(whole)
    path.with_name(f"{path.name}.tmp").write_bytes(whole[:100])  # what kill -9 leaves
    job = begun(tmp_path / "work")
    assert job.get("piece/1") is None
    job.put("piece/1", {"number": 1})
    os.close(job._lock)
    piece = begun(tmp_path / "work").get("piece/1")
    assert piece is not None
    assert piece.record == {"number": 1}


def test_a_piece_is_of_its_key_and_of_its_job(tmp_path: Path) -> None:
    """Whatever names files have got."""
    filled(tmp_path / "work")
    piece_file(tmp_path / "work", "piece/1").rename(piece_file(tmp_path / "work", "piece/9"))
    other = JobDirectory(tmp_path / "other")
    other.begin(IDENTITY | {"threads": 4}, {})
    other.put("piece/0", {"number": 0, "loss": float("inf")}, {"x": TENSORS["x"]})
    piece_file(tmp_path / "other", "piece/0").rename(piece_file(tmp_path / "work", "piece/0"))
    other.close()
    job = begun(tmp_path / "work")
    found = [index for index in range(10) if job.get(f"piece/{index}") is not None]
    assert found == [2]
    job.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some pieces; never changed."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    filled(folder)
    return folder


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_ledger_never_makes_up_a_piece(
    data: st.DataObject, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("job") / "work")
    path = data.draw(st.sampled_from(sorted(folder.rglob("*.safetensors"))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    try:
        job = JobDirectory(folder)
    except UserError:
        with pytest.raises(UserError, match="Pass --no-resume to restart"):
            JobDirectory(folder)
        return
    try:
        job.begin(IDENTITY, {})
        for index in range(3):
            piece = job.get(f"piece/{index}")
            assert piece is None or (piece.record["number"], piece.record["loss"]) == (index, float("inf"))
            assert piece is None or torch.equal(piece.tensors()["x"], TENSORS["x"] + index)
        record = job.get("record")
        assert record is None or record.record == {"list": [1.5, 2**60, "é"]}
    finally:
        os.close(job._lock)


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "work")
    before = {path.name: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = begun(tmp_path / "work")
    for module, name, tensors in (
        (ledger, "save_file", TENSORS),
        (ledger, "sync_folder", TENSORS),
        (os, "fsync", None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space"):
                job.put("more", {}, tensors)
    job.close()
    after = {path.name: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert begun(tmp_path / "work").get("more") is None


@pytest.mark.parametrize("what", ["save_file", "fsync"])
def test_a_full_disk_keeps_the_piece_that_was_to_be_replaced(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begun(tmp_path / "work")
    job.put("state", {"steps": 1}, TENSORS)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if what == "fsync" else ledger, what, full)
        with pytest.raises(OSError, match="No space"):
            job.put("state", {"steps": 2}, TENSORS)
    job.close()
    kept = begun(tmp_path / "work").get("state")
    assert kept is not None
    assert kept.record == {"steps": 1}


def test_clocks_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "work")
    for path in (tmp_path / "work").rglob("*"):
        os.utime(path, (2**33, 2**33))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    job = begun(tmp_path / "work")
    assert all(job.get(f"piece/{index}") is not None for index in range(3))
    for path in (tmp_path / "work").rglob("*.safetensors"):
        assert not any(word in path.read_bytes() for word in (b"time", b"date"))
    job.close()


def test_records_are_json(tmp_path: Path) -> None:
    job = begun(tmp_path / "work")
    assert job.put("a", {"tuple": (1, 2)}).record == {"tuple": [1, 2]}
    with safe_open(piece_file(tmp_path / "work", "a"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["key"] == "a"
    assert json.loads(metadata["record"]) == {"tuple": [1, 2]}
    job.close()


@pytest.mark.parametrize("limit", [0, 30, 1000])
def test_spill_gives_back_what_it_was_given(limit: int, tmp_path: Path) -> None:
    spill, device = Spill(limit, tmp_path / "spill"), torch.device("cpu")
    items = [spill.put(torch.full((2, 3), float(n)).to(torch.bfloat16)) for n in range(5)]
    assert spill.used == min(limit // 12, 5) * 12
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5 - min(limit // 12, 5)
    for n, item in enumerate(items):
        tensor = spill.get(item, device)
        assert tensor.dtype == torch.bfloat16
        assert (tensor == n).all()
        spill.drop(item)
    assert spill.used == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    spill.close()
    assert not list(tmp_path.iterdir())


def test_a_job_that_was_killed_while_its_folder_was_deleted_is_known_to_have_ended(tmp_path: Path) -> None:
    """Whatever is left of the folder: its lock alone, pieces without the job, the job without pieces, or both."""
    folder = tmp_path / "out.work"
    for left in ((), ("pieces",), ("job.safetensors",), ("pieces", "job.safetensors")):
        ledger = JobDirectory(folder)
        ledger.begin({"ratio": 0.3}, {"weights": 1})
        ledger.put("written", {"manifest": "abc"})
        ledger.put("text", {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rmdir", _killed)
            patch.setattr(Path, "unlink", _killed)
            patch.setattr(JobDirectory, "_clear", lambda _ledger: None)
            with pytest.raises(KeyboardInterrupt):
                ledger.remove()
        os.close(ledger._lock)
        for path in folder.iterdir():
            if path.name not in ("lock", *left):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / "pieces" / "written.safetensors").unlink(missing_ok=True)
        again = JobDirectory(folder)
        piece = again.get("written")
        assert piece is not None
        assert piece.record == {"manifest": "abc"}
        assert again.get("text") is None
        with pytest.raises(UserError, match=r"unfinished job with ratio 0\.3, not 0\.4"):
            again.begin({"ratio": 0.4}, {})
        assert again.begin({"ratio": 0.3}, {})
        again.remove()
        again.close()
        assert not folder.exists()
    new = JobDirectory(folder, resume=False)
    assert new.get("written") is None
    new.close()


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_can_never_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /proc, where making one fails as if its parent were not there."""

    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"the job directory .*out\.work cannot be written: No such file"):
        JobDirectory(tmp_path / "out.work")
