"""Models from the hub and to it, against a stand-in for its HTTP API; the library that asks is the real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer
from hub import READER, WRITER, Hub
from huggingface_hub import ModelCard, constants
from test_cli import check_mistake
from transformers import AutoModelForCausalLM

from cospadi import compress
from cospadi.format import verify

FREE = ["--metric", "weights", "--iterations", "1", "--ratio", "0.3"]


@pytest.fixture
def pushed(hub: Hub, compressed_folder: Path, run: Callable[..., Answer]) -> dict[str, Any]:
    """What `cospadi push --json` says of alice/small."""
    answer = run("push", compressed_folder, "small", "--json")
    assert answer.code == 0, answer.err
    told: dict[str, Any] = json.loads(answer.out)
    return told


def test_a_pushed_folder_is_at_the_hub_byte_for_byte_and_its_card_names_the_repository(
    hub: Hub, pushed: dict[str, Any], compressed_folder: Path
) -> None:
    assert pushed["repo"] == "alice/small"
    files = hub.repositories["alice/small"].files(pushed["commit"])
    assert files is not None
    local = {path.name: path.read_bytes() for path in compressed_folder.iterdir()}
    assert files.keys() == local.keys() | {".gitattributes"}
    assert all(files[name] == body for name, body in local.items() if name != "README.md")
    text = files["README.md"].decode()
    assert 'from_pretrained("alice/small")' in text
    assert "vllm serve alice/small" in text
    assert ModelCard(text).data.library_name == "transformers"
    assert "alice" not in local["README.md"].decode()


def test_every_command_reads_a_model_by_name_and_revision(
    hub: Hub, pushed: dict[str, Any], compressed_folder: Path, text_file: Path, run: Callable[..., Answer]
) -> None:
    name = f"alice/small@{pushed['commit']}"
    hub.repositories["alice/small"].commit({"config.json": b"damaged since"})
    for words in (["inspect"], ["verify"], ["generate", "12 squared", "--tokens", "4"]):
        from_hub = run(words[0], name, *words[1:])
        from_disk = run(words[0], compressed_folder, *words[1:])
        assert from_hub.code == 0, from_hub.err
        assert from_hub.out.replace(name, str(compressed_folder)) == from_disk.out
    both = run("eval", name, "--against", compressed_folder, "--text", text_file, "--length", "32", "--json")
    assert both.code == 0, both.err
    assert json.loads(both.out)["difference"] == 0
    check_mistake(run("eval", name, "--text", text_file, "--card"), "--card writes into a folder's README.md")
    check_mistake(run("verify", "alice/small@v9"), "alice/small@v9", "it has no revision v9")
    check_mistake(run("verify", "alice/small@"), "names no revision after its @")


def test_transformers_loads_it_by_revision_and_pushes_it_again_with_manifest_and_card(
    hub: Hub, pushed: dict[str, Any], compressed_folder: Path
) -> None:
    hub.repositories["alice/small"].commit({})
    model = AutoModelForCausalLM.from_pretrained("alice/small", revision=pushed["commit"])
    address = model.push_to_hub("again", tags=["mine"], private=True)
    repository = hub.repositories["alice/again"]
    assert repository.private
    assert address == f"{hub.endpoint}/alice/again/commit/{repository.branches['main']}"
    files = repository.files()
    assert files is not None
    for name in ("model.safetensors", "config.json", "cospadi.json"):
        assert files[name] == (compressed_folder / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.tags is not None
    assert {"cospadi", "mine"} <= set(card.data.tags)
    assert "## Size" in card.text
    assert 'from_pretrained("alice/' in card.text


def test_compress_pushes_what_it_wrote_and_names_the_hub_model_as_the_base(
    hub: Hub, dense_folder: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    card = "---\nlicense: llama3.2\nlanguage: [en, de]\ntags: [chat]\nbase_model: x/older\n---\n# Dense\n"
    files = {path.name: path.read_bytes() for path in dense_folder.iterdir()} | {"README.md": card.encode()}
    commit = hub.create("bob/dense").commit(files)
    output = tmp_path / "out"
    answer = run("compress", f"bob/dense@{commit}", *FREE, "-o", output, "--push", "alice/made", "--private", "--json")
    assert answer.code == 0, answer.err
    made = hub.repositories["alice/made"]
    assert json.loads(answer.out)["pushed"]["commit"] == made.branches["main"]
    assert made.private
    data = ModelCard((output / "README.md").read_text()).data.to_dict()
    assert data["base_model"] == "bob/dense"
    assert (data["license"], data["language"], data["tags"][0]) == ("llama3.2", ["en", "de"], "chat")
    assert f"cospadi compress bob/dense@{commit} --ratio 0.3" in (output / "README.md").read_text()
    assert json.loads((output / "cospadi.json").read_text())["source"]["model"] == "bob/dense"


@pytest.mark.parametrize(
    ("token", "repo", "mentioned"),
    [
        (None, "small", ["asks who you are, and there is no token", "hf auth login"]),
        ("hf_wrong", "small", ["does not know this token", "HF_TOKEN"]),
        (READER, "small", ["this token may not do that (You must use a write token)"]),
        (WRITER, "bob/theirs", ["this token may not do that", "Pull Request"]),
        (WRITER, "carol/new", ["this token may not do that", "namespace carol"]),
        (WRITER, "a/b/c", ["a/b/c cannot be written to on the hub"]),
    ],
)
def test_whether_it_may_write_is_found_out_before_the_job(
    token: str | None,
    repo: str,
    mentioned: list[str],
    hub: Hub,
    dense_folder: Path,
    compressed_folder: Path,
    tmp_path: Path,
    run: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    hub.create("bob/theirs")
    check_mistake(run("compress", dense_folder, *FREE, "-o", tmp_path / "out", "--push", repo), *mentioned)
    assert not (tmp_path / "out").exists()
    check_mistake(run("push", compressed_folder, repo), *mentioned)
    assert hub.count("POST", "commit") == 0


def test_an_upload_that_fails_loses_nothing_and_sends_only_what_is_missing_the_next_time(
    hub: Hub, dense_folder: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    output = tmp_path / "out"
    hub.refuse = lambda method, path: 503 if "/commit/" in path else None
    failed = run("compress", dense_folder, *FREE, "-o", output, "--push", "small", "--json")
    assert failed.code == 2
    assert json.loads(failed.out)["ratio_reached"] > 0
    assert (
        failed.err.strip()
        .splitlines()[-1]
        .startswith(f"error: {output} is not uploaded to alice/small: the hub answers 503")
    )
    assert f"{output} is whole: cospadi push {output} alice/small uploads it" in failed.err
    assert verify.verify(output) > 0
    assert hub.count("PUT", "/lfs/") == 1
    hub.refuse = lambda method, path: None
    assert run("push", output, "alice/small").code == 0
    assert hub.count("PUT", "/lfs/") == 1
    files = hub.repositories["alice/small"].files()
    assert files is not None
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()


def test_a_line_that_breaks_is_tried_again_and_told_of_at_last(
    hub: Hub, compressed_folder: Path, run: Callable[..., Answer]
) -> None:
    drops = iter([0, 0])
    hub.refuse = lambda method, path: next(drops, None) if path.startswith("/lfs/") else None
    assert run("push", compressed_folder, "small").code == 0
    assert hub.count("PUT", "/lfs/") == 3
    hub.blobs.clear()
    hub.create("alice/small")
    hub.refuse = lambda method, path: 0 if path.startswith("/lfs/") else None
    answer = run("push", compressed_folder, "small")
    assert answer.code == 2
    last = answer.err.strip().splitlines()[-1]
    assert f"is not uploaded to alice/small: {hub.endpoint} cannot be reached" in last
    assert "Traceback" not in answer.err


def test_weights_that_the_folder_has_not_are_deleted_and_other_files_kept(
    hub: Hub, compressed_folder: Path, run: Callable[..., Answer]
) -> None:
    old = dict.fromkeys(("model-00001-of-00002.safetensors", "model.safetensors.index.json"), b"old")
    kept = {"notes.txt": b"old", "onnx/model.safetensors": b"old"}
    hub.create("alice/small").commit(old | kept)
    answer = run("push", compressed_folder, "small", "--commit-message", "Fewer bits")
    assert answer.code == 0
    assert f"{', '.join(old)} of alice/small, which the folder has not, are deleted" in " ".join(answer.err.split())
    repository = hub.repositories["alice/small"]
    files = repository.files()
    assert files is not None
    assert kept.keys() <= files.keys()
    assert not old.keys() & files.keys()
    assert repository.messages[-1] == "Fewer bits"
    assert run("push", compressed_folder, "small", "--revision", "bits-3").code == 0
    assert repository.files("bits-3") is not None


def test_a_pull_request_to_somebody_elses_repository(
    hub: Hub, compressed_folder: Path, run: Callable[..., Answer]
) -> None:
    before = hub.create("bob/theirs").branches["main"]
    answer = run("push", compressed_folder, "bob/theirs", "--create-pr")
    assert answer.code == 0, answer.err
    assert f"Uploaded: {hub.endpoint}/bob/theirs/discussions/1" in answer.out
    repository = hub.repositories["bob/theirs"]
    assert repository.branches["main"] == before
    assert "cospadi.json" in (repository.files("refs/pr/1") or {})


def test_what_the_hub_will_not_have_is_told_in_its_words(
    hub: Hub, compressed_folder: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    hub.create("alice/open")
    check_mistake(run("push", compressed_folder, "open", "--private"), "alice/open is on the hub already, and public")
    folder = Path(shutil.copytree(compressed_folder, tmp_path / "out"))
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    answer = run("push", folder, "open")
    assert answer.code == 2
    assert '"license" must be one of [apache-2.0, ...]' in answer.err.splitlines()[-1]


def test_what_is_no_whole_checkpoint_is_not_pushed(
    hub: Hub, compressed_folder: Path, dense_folder: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    check_mistake(run("push", dense_folder, "small"), str(dense_folder))
    damaged = Path(shutil.copytree(compressed_folder, tmp_path / "damaged"))
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_mistake(run("push", damaged, "small"), "is not what was written")
    assert not hub.repositories


def test_models_that_cannot_be_read(hub: Hub, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("bob/private", private=True)
    hub.create("bob/gated", gated=True)
    for name in ("bob/private", "bob/absent"):
        check_mistake(run("plan", name), f"model {name} is neither", "or it is private. Check the name")
    check_mistake(run("plan", "bob/gated"), "it is gated. Ask for access at", "/bob/gated")
    check_mistake(run("plan", "bob/gated@a", "--revision", "b"), "name two revisions")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    check_mistake(run("plan", "bob/absent"), "the hub does not know this token")
    hub.refuse = lambda method, path: 500
    check_mistake(run("plan", "bob/absent"), "the hub answers 500", "Try again later")


def test_without_network_the_cache_serves(
    hub: Hub, pushed: dict[str, Any], run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("verify", "alice/small").code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("verify", "alice/small").code == 0
    check_mistake(run("verify", "alice/other"), "HF_HUB_OFFLINE switches the hub off")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run("verify", "alice/small").code == 0
    check_mistake(run("verify", "alice/other"), "http://127.0.0.1:9 cannot be reached", "Check the network")


def test_a_card_that_cannot_be_fetched_is_told_of(
    hub: Hub, dense_folder: Path, tmp_path: Path, run: Callable[..., Answer]
) -> None:
    files = {path.name: path.read_bytes() for path in dense_folder.iterdir()}
    hub.create("bob/dense").commit(files | {"README.md": b"---\nlicense: mit\n---\n"})
    hub.refuse = lambda method, path: 500 if path.endswith("README.md") else None
    answer = run("compress", "bob/dense", *FREE, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "README.md of bob/dense cannot be fetched, and is done without" in answer.err
    assert "license" not in (tmp_path / "out" / "README.md").read_text()


def test_a_download_goes_on_where_it_broke_off(hub: Hub, pushed: dict[str, Any], run: Callable[..., Answer]) -> None:
    breaks = iter([500])
    hub.refuse = lambda m, path: next(breaks, None) if m == "GET" and path.endswith("model.safetensors") else None
    failed = run("verify", "alice/small")
    before = hub.count("GET", "config.json")
    assert failed.code in (0, 2)
    assert run("verify", "alice/small").code == 0
    assert hub.count("GET", "resolve") >= before
    assert hub.count("GET", "/config.json") == 1  # what was there is not asked for again


def test_a_file_goes_on_where_the_line_broke(
    hub: Hub,
    pushed: dict[str, Any],
    compressed_folder: Path,
    run: Callable[..., Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = (compressed_folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut["model.safetensors"] = len(whole) // 2
    answer = run("verify", "alice/small")
    assert answer.code == 0, answer.err
    assert not hub.cut
    assert hub.count("GET", "model.safetensors") == 2
    [asked] = hub.ranges
    assert 0 < int(asked.removeprefix("bytes=").partition("-")[0]) <= len(whole) // 2
    [fetched] = Path(constants.HF_HUB_CACHE).glob("models--alice--small/snapshots/*/model.safetensors")
    assert fetched.read_bytes() == whole


def test_a_model_that_was_compressed_in_memory_keeps_its_card(dense_folder: Path, tmp_path: Path) -> None:
    result = compress(dense_folder, {"metric": "weights", "iterations": 1, "ratio": 0.3})
    model: Any = result.model
    model.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "these projections together" in text
    assert "whole checkpoint" not in text
