"""Whatever a file or a flag holds: a result, or one sentence. Never a traceback, never a part of an output.

Documents are damaged where they have structure (a field gone, a number of another size, a list for a name) and as
bytes. Under each test the memory and the time of an example are bounded, so that a size that a file merely declares
is not believed.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import COMMAND, Answer
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cospadi
from cospadi import Recipe, UserError
from cospadi.budget.plan import check_plan, outlook, read_plan, read_plan_recipe, write_plan
from cospadi.calibration.text import token_sequences
from cospadi.format import verify
from cospadi.format.form import Form
from cospadi.recipe import METHODS
from cospadi.solvers import SOLVERS

PACKAGE = str(Path(cospadi.__file__).parent)
FREE = {"metric": "weights", "iterations": 1}
MEMORY = 2**31
"""Bytes that an example may take beside what the process has."""
SECONDS = 20
"""Of the processor. An example takes milliseconds; what takes so long believes a size that is not there."""


FUZZ = int(os.environ.get("COSPADI_FUZZ", "1"))


def examples(count: int) -> Callable[[Any], Any]:
    """The same `count` examples in every run, or COSPADI_FUZZ times as many. Folders are made anew for each, so that
    one a test is enough."""
    count *= FUZZ
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and little more memory than there is in use."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def in_time() -> Iterator[None]:
    """Stop what does not end."""

    def stop(*_: object) -> None:
        pytest.fail(f"not done after {SECONDS} seconds")  # no Exception, which might be caught

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 6 * SECONDS)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds, 1)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def check_sentence(error: BaseException | str) -> None:
    """One line of reasonable length that says something."""
    text = str(error)
    assert text.strip()
    assert len(text) < 10_000, text[:1000]
    assert not any(words in text for words in ("t allocate", "enough memory", "out of memory")), text


@contextmanager
def answered() -> Iterator[None]:
    """What runs in here comes to an end or is refused with a sentence."""
    try:
        with in_time():
            yield
    except UserError as error:
        check_sentence(error)


# What files and flags may hold

HUGE, DEEP = "@huge", "@deep"
"""In a JSON document: stand for a number of 5000 digits, and for 100,000 lists inside each other."""

NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324]
NUMBERS += [math.nan, math.inf, -math.inf]
STRINGS = ["", " ", ".", "..", "a\nb", "\0", "a\0b.txt", "\ud800", "\udcff", "\x1b[31m", "é\u2028😀", "nan", "inf"]
STRINGS += ["-1", "0", "1e999", "9" * 5000, "true", "none", "~nobody/x", "x" * 300, "*[", "no/such/name"]
STRINGS += ["model.safetensors"]

words = st.text(max_size=9)
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from([*NUMBERS, *STRINGS]), st.integers(), st.floats(), words)
odd = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
odd_in_json = st.one_of(odd, st.sampled_from([HUGE, DEEP]))


@st.composite
def mutated(draw: st.DrawFn, document: Any, changes: int = 2) -> Any:
    """A JSON document with one or a few places changed; those near its top as often as those deep in it."""
    whole = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, changes))):
        container: Any = whole
        key: Any = 0
        while isinstance(container[key], (dict, list)) and container[key] and draw(st.integers(0, 4)):
            container = container[key]
            key = draw(st.sampled_from(list(container) if isinstance(container, dict) else range(len(container))))
        value = container[key]
        kind = draw(st.sampled_from(["replace", "replace", "delete", "insert", "nudge", "neighbour"]))
        if kind == "nudge" and isinstance(value, (int, float)):
            near = [value + 1, value - 1, value * 2, -value, value + 0.0, str(value)]
            container[key] = draw(st.sampled_from(near) | st.sampled_from([*NUMBERS, HUGE]))
        elif kind == "neighbour" and container is not whole:
            others = list(container.values()) if isinstance(container, dict) else container
            container[key] = copy.deepcopy(draw(st.sampled_from(others)))
        elif kind == "insert" and isinstance(value, dict):
            value[draw(words | st.sampled_from([*STRINGS, "self", "__metadata__"]))] = draw(odd_in_json)
        elif kind == "insert" and isinstance(value, list):
            value.insert(draw(st.integers(0, len(value))), draw(odd_in_json))
        elif kind == "delete" and container is not whole:
            del container[key]
        else:
            container[key] = draw(odd_in_json)
    return whole[0]


def dumped(document: Any) -> bytes:
    """A document as JSON; lone surrogates stay escaped."""
    text = json.dumps(document).replace(f'"{HUGE}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5)
    return text.encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut short, flipped, taken out, put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(changed)) | st.integers(0, min(len(changed), 40)))
        kind = draw(st.sampled_from(["cut", "flip", "remove", "insert"]))
        if kind == "cut":
            del changed[at:]
        elif kind == "flip" and at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del changed[at : at + draw(st.integers(1, 30))]
        else:
            changed[at:at] = draw(st.binary(min_size=1, max_size=12) | st.just(b"\xef\xbb\xbf") | st.just(b"\0"))
    return bytes(changed)


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as its header and its data."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    """The file of a header and data."""
    text = dumped(header)
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def damaged_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with a header that lies, about its own length or about the tensors, or with other data."""
    header, data = split_file(content)
    kind = draw(st.sampled_from(["header", "header", "length", "tensor", "tensor", "bytes"]))
    if kind == "header":
        return joined(draw(mutated(header)), draw(st.sampled_from([data, data, data[:-1], data + b"\0"])))
    if kind == "length":
        size = len(content) - 8 - len(data)
        told = draw(st.sampled_from([0, 1, size - 1, size + 1, 2 * size, len(content), 10**8, 2**40, 2**63, 2**64 - 1]))
        return told.to_bytes(8, "little") + content[8:]
    if kind == "bytes":
        return draw(damaged(content))
    # A whole file, of tensors that are not those that were written.
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    name = draw(st.sampled_from(sorted(tensors)))
    entry = tensors[name]
    change = draw(st.sampled_from(["rename", "swap", "retype", "reshape", "flip"]))
    if change == "rename":
        header[draw(words | st.sampled_from(STRINGS))] = header.pop(name)
    elif change == "swap":
        other = draw(st.sampled_from(sorted(tensors)))
        header[name], header[other] = header[other], header[name]
    elif change == "retype":
        entry["dtype"] = draw(st.sampled_from(["F16", "I16", "U16", "U8", "F32", "F64", "F8_E4M3", "BOOL", "C64", "X"]))
        width = {"U8": 1, "F8_E4M3": 1, "BOOL": 1, "F32": 4, "F64": 8, "C64": 8}.get(entry["dtype"], 2)
        begin, end = entry["data_offsets"]
        entry["shape"] = [(end - begin) // width]
    elif change == "reshape":
        shape = entry["shape"]
        entry["shape"] = draw(st.sampled_from([shape[::-1], [math.prod(shape)], [1, *shape]]))
    elif entry["data_offsets"][0] < entry["data_offsets"][1]:
        at = draw(st.integers(entry["data_offsets"][0], entry["data_offsets"][1] - 1))
        data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    return joined(header, data)


# Recipes

PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "ratio": st.floats(0.01, 0.9) | st.just("0.3"),
    "solver": st.sampled_from([*SOLVERS]),
    "accounting": st.sampled_from(["exact", "eq10", "eq11"]),
    "value_bits": st.sampled_from([10, 12, 14, 16, None]),
    "rho": st.none() | st.floats(1, 1e9),
    "method": st.sampled_from([*METHODS]),
    "allocate": st.sampled_from(["pooled", "uniform", None]),
    "metric": st.sampled_from(["two-sided", "fisher", "output", "weights", None]),
    "refine": st.none() | st.integers(0, 2**31),
    "update": st.sampled_from(["power", "pca", "mod"]),
    "tolerance": st.floats(0, 0.99),
    "damping": st.floats(1e-300, 0.9),
    "seed": st.integers(0, 2**63 - 1),
    "share": st.sampled_from(["none", "input", "layers:2", "input,layers:99999999999999999999", " layers:3 , input "]),
    "include": st.lists(st.sampled_from(["*", "*.up_proj", "[", "*.?_proj"]), max_size=2),
    "exclude": st.sampled_from(["*.down_proj", [], ("*.up_proj",), " , "]),
    "target": st.sampled_from(["up,gate", "up", ["q", "k"], ""]),
    "calibration": st.text(max_size=9),
    "length": st.none() | st.integers(2, 10**9),
}
COUNTS = st.integers(1, 10**6) | st.sampled_from([3.0, "5", True])


@st.composite
def recipe_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a recipe, most of them possible."""
    fields = {}
    for name in draw(st.lists(st.sampled_from([*Recipe.model_fields]), max_size=5, unique=True)):
        fields[name] = draw(PLAUSIBLE.get(name, COUNTS) if draw(st.integers(0, 4)) else odd)
    if not draw(st.integers(0, 9)):
        fields[draw(words | st.sampled_from(STRINGS))] = draw(odd)
    return fields


def check_recipe(given: Any, folder: Path, scratch: Path) -> None:
    """Refused; or written and read again the same, and able to plan."""
    with answered():
        recipe = Recipe.build(given)
        path = scratch / "again.yaml"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        again = Recipe.build(path)
        assert again == recipe
        assert again.to_yaml() == recipe.to_yaml()
        outlook(folder, recipe)


@examples(60)
@given(fields=recipe_fields())
@example(fields={"seed": 1 << 20_000})
@example(fields={"include": [[["*"] * 50] * 50] * 50})
@example(fields={1: 2, None: "x"})
@example(fields={"ratio": 5e-324})
@example(fields={"rho": 10**400})
def test_recipe_of_any_fields(fields: dict[str, Any], dense_folder: Path, tmp_path: Path) -> None:
    check_recipe(fields, dense_folder, tmp_path)


@st.composite
def yaml_text(draw: st.DrawFn) -> bytes:
    """Lines that look like a recipe's, or like YAML, or are only bytes."""
    lines = st.one_of(
        st.builds("{}: {}".format, st.sampled_from([*Recipe.model_fields]), words),
        st.text(alphabet="abc01:-?[]{},&*!|>'\"%@`#= \n\t.~<", max_size=20),
        st.sampled_from(["a: &a [*a]", "<<: *x", "!!python/object:os.system {}", "!!bool x", "ratio: 2001-99-99"]),
    )
    if draw(st.booleans()):
        return draw(damaged("\n".join(draw(st.lists(lines, max_size=4))).encode()))
    return draw(st.binary(max_size=40))


@examples(60)
@given(content=yaml_text())
@example(content=b"[" * 10**5)
@example(content=b"ratio: " + b"{a: " * 3000)
@example(content=b"seed: 0x" + b"f" * 5000)
@example(content=b"seed: " + b"9" * 5000)
@example(content=b"include: &a [*a, *a]")
@example(content=b"ratio: 2001-99-99")
@example(content=b"calibration: !!timestamp 2001-99-99")
@example(content=b"? [a]\n: b")
@example(content=b"\xef\xbb\xbfratio: 0.3")
@example(content=b'a\\nb: "\\0"\n"a\\nb": 1')
@example(content=b"a0: &a0 x\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b"*a%d, " % (n - 1) * 9) for n in range(1, 10)))
def test_recipe_file_of_any_bytes(content: bytes, dense_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    check_recipe(path, dense_folder, tmp_path)


# Plans


@pytest.fixture(scope="module")
def saved_plans(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Plans of runs that take a moment: D = I, supports that are free, that are not, low rank, integers."""
    found = []
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    for solver in ("htp", "mod-htp", "ksvd", "svd", "rtn"):
        fields = {"solver": solver, "include": ["*.q_proj", "*.k_proj", "*.up_proj"], "ratio": 0.3}
        recipe = Recipe.build(FREE | fields)
        write_plan(outlook(dense_folder, recipe).plan, recipe, path)
        found.append(path.read_bytes())
    return found


KINDS = {
    "sparse-dictionary": ("stored", "mask"),
    "identity mask": ("identity", "mask"),
    "low-rank": ("stored", "full"),
    "identity full": ("identity", "full"),
}
"""Of layouts: dictionary and support."""


@st.composite
def plausible_plan(draw: st.DrawFn, plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with other sizes in one group, whose bytes follow from them, as far as that is possible."""
    changed = copy.deepcopy(plan)
    group = draw(st.sampled_from(changed["groups"]))
    d2_sum = {"q_proj": 72, "up_proj": 80}[group["members"][0].rpartition(".")[2]]
    what = draw(st.sampled_from(["k", "nonzeros", "nonzeros", "values", "layout", "members"]))
    if what == "k":
        group["k"] -= draw(st.integers(0, 3) | st.integers(0, group["k"]))
        group["nonzeros"] = min(group["nonzeros"], group["k"] // 2 * d2_sum)
    elif what == "nonzeros":
        group["nonzeros"] -= draw(st.integers(0, 5) | st.integers(0, group["nonzeros"]) | st.just(group["nonzeros"]))
        group["k"] = draw(st.sampled_from([group["k"], group["k"] // 2, max(1, group["nonzeros"] // d2_sum)]))
    elif what == "values":
        group["values"] = draw(st.sampled_from(["bf16", "f14", "int4", "int2g64"]))
        group["k"] -= draw(st.sampled_from([0, 2]))
    elif what == "layout":
        group["layout"] = draw(st.sampled_from([*KINDS, "dense"]))
    else:
        group["members"] = draw(st.sampled_from([group["members"][::-1], group["members"] * 2]))
    d1, d2s = 48, [{"q_proj": 48, "k_proj": 24, "up_proj": 80}[name.rpartition(".")[2]] for name in group["members"]]
    k, nonzeros = group["k"], group["nonzeros"]
    form = Form(*KINDS.get(group["layout"], ("stored", "mask")), group["values"])
    even = [nonzeros // sum(d2s) * d2 for d2 in d2s]
    counts = [nonzeros] if form.support_kind.chosen and draw(st.booleans()) else even
    if form.possible:
        group["bytes"] = form.nbytes(d1, d2s, k, counts).total
    return changed


@examples(100)
@given(data=st.data())
def test_plan_file_of_any_content(
    data: st.DataObject, saved_plans: list[bytes], dense_folder: Path, tmp_path: Path
) -> None:
    """A plan that is accepted is one that `compress` carries out, to the byte."""
    saved_plan = data.draw(st.sampled_from(saved_plans))
    whole = json.loads(saved_plan)
    path = tmp_path / "plan.json"
    kinds = [mutated(whole, 3).map(dumped), damaged(saved_plan), *[plausible_plan(whole).map(dumped)] * 3]
    path.write_bytes(data.draw(st.one_of(kinds)))
    with answered():
        recipe = read_plan_recipe(path)
        uniform = outlook(dense_folder, recipe).plan
        plan = read_plan(path, uniform.projections, recipe)
        check_plan(plan, uniform, recipe)
        if plan != uniform:
            result = cospadi.compress(dense_folder, recipe.model_copy(update={"iterations": 1}), plan=plan)
            stored = result.manifest["projections"].values()
            assert result.plan == plan
            assert sum(nbytes for entry in stored for nbytes in entry["bytes"].values()) == plan.bytes - sum(
                group.parts.total for group in plan.groups if group.layout == "dense"
            )


# Checkpoints


@pytest.fixture(scope="module")
def sharded(compressed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files with an index; never changed."""
    output = tmp_path_factory.mktemp("sharded") / "out"
    AutoModelForCausalLM.from_pretrained(compressed_folder).save_pretrained(output, max_shard_size="30KB")
    assert len(list(output.glob("*.safetensors"))) > 1
    return output


def fresh(folder: Path, parent: Path) -> Path:
    """A copy to damage, in place of the one before it."""
    shutil.rmtree(parent / "case", ignore_errors=True)
    return Path(shutil.copytree(folder, parent / "case"))


def refuses(call: Callable[[], object]) -> bool:
    """Whether a call is refused, with a sentence."""
    try:
        with in_time():
            call()
    except UserError as error:
        check_sentence(error)
        return True
    return False


def check_checkpoint(folder: Path, ours: bool = True) -> bool:
    """Every way to read a checkpoint answers; returns whether `verify` accepts it.

    Args:
        ours: only what `verify` looks at is damaged, so that what it accepts loads. (What transformers makes of a
            damaged config of its own, if it is called without us, is its own.)
    """
    accepted = not refuses(lambda: verify.verify(folder))
    readable = not refuses(lambda: verify.read_checkpoint(folder))
    assert readable or not accepted
    loads = not refuses(lambda: cospadi.load(folder, device="cpu"))
    if not ours:
        return accepted
    assert loads or not accepted
    try:
        with in_time():
            AutoModelForCausalLM.from_pretrained(folder)
    except UserError as error:
        check_sentence(error)
    except Exception as error:  # transformers' own refusal, in which no part of ours took part
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.filename.startswith(PACKAGE) for frame in frames):
            raise
    return accepted


@examples(60)
@given(data=st.data())
def test_checkpoint_with_any_config(data: st.DataObject, compressed_folder: Path, tmp_path: Path) -> None:
    folder = fresh(compressed_folder, tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    ours = config["quantization_config"]
    part = data.draw(st.sampled_from(["an entry", "a field", "a field", "ours", "whole", "bytes"]))
    if part == "an entry":
        name = data.draw(st.sampled_from(sorted(ours["projections"])))
        ours["projections"][name] = data.draw(mutated(ours["projections"][name]))
    elif part == "a field":
        # The same in every projection with that dictionary, so that they agree.
        owner = data.draw(st.sampled_from(sorted(entry["dictionary"] for entry in ours["projections"].values())))
        field = data.draw(st.sampled_from(["d1", "d2", "k", "nnz", "value_bits", "layout", "bias"]))
        value = data.draw(st.sampled_from([*NUMBERS, HUGE, "low-rank", True, None]))
        for entry in ours["projections"].values():
            entry.update({field: value} if entry["dictionary"] == owner else {})
    elif part == "ours":
        config["quantization_config"] = data.draw(mutated(ours))
    elif part == "whole":
        config = data.draw(mutated(config))
    path.write_bytes(data.draw(damaged(path.read_bytes())) if part == "bytes" else dumped(config))
    check_checkpoint(folder, part not in ("whole", "bytes"))


@examples(60)
@given(data=st.data())
def test_checkpoint_with_any_manifest(
    data: st.DataObject, compressed_folder: Path, run: Callable[..., Answer], tmp_path: Path
) -> None:
    folder = fresh(compressed_folder, tmp_path)
    path = folder / "cospadi.json"
    whole = path.read_bytes()
    path.write_bytes(data.draw(mutated(json.loads(whole)).map(dumped) | damaged(whole)))
    check_checkpoint(folder)
    check_answer(run("inspect", folder))


@examples(80)
@given(data=st.data())
def test_checkpoint_with_any_weights(
    data: st.DataObject, compressed_folder: Path, sharded: Path, tmp_path: Path
) -> None:
    """Whatever differs from the bytes that were written, `verify` says so."""
    folder = fresh(data.draw(st.sampled_from([compressed_folder, sharded])), tmp_path)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    whole = path.read_bytes()
    changed = data.draw(damaged_file(whole))
    path.write_bytes(changed)
    if not data.draw(st.integers(0, 3)):
        (folder / "cospadi.json").unlink()  # the other checks stand alone
    accepted = check_checkpoint(folder)
    assert accepted == (changed == whole and (folder / "cospadi.json").exists())


@examples(30)
@given(data=st.data())
def test_checkpoint_with_any_index(data: st.DataObject, sharded: Path, tmp_path: Path) -> None:
    folder = fresh(sharded, tmp_path)
    path = folder / "model.safetensors.index.json"
    whole = path.read_bytes()
    path.write_bytes(data.draw(mutated(json.loads(whole)).map(dumped) | damaged(whole)))
    check_checkpoint(folder, ours=False)


# The dense model


def check_answer(answer: Answer) -> None:
    """Done, or one sentence and nothing on stdout."""
    assert answer.code in (0, 2), answer.err
    assert "Traceback" not in answer.err, answer.err
    assert "fault of cospadi" not in answer.err, answer.err
    if answer.code == 2:
        assert answer.out == "", answer.out
        last = answer.err.strip().splitlines()[-1]
        assert last.startswith(("error: ", "Error: ")), answer.err
        check_sentence(last)
        assert answer.err.count("rror: ") == 1, answer.err


def check_left(answer: Answer, folder: Path, before: set[Path]) -> None:
    """Where a command was refused, the folder is as it was."""
    if answer.code:
        assert set(folder.rglob("*")) == before, sorted(set(folder.rglob("*")) ^ before)


@pytest.fixture(scope="module")
def smallest(make_llama: Callable[..., Path]) -> Path:
    """A dense model of one block; never changed."""
    return make_llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def smallest_sharded(smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "out"
    shutil.copytree(smallest, output)
    (output / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(smallest).save_pretrained(output, max_shard_size="30KB")
    assert (output / "model.safetensors.index.json").exists()
    return output


@examples(40)
@given(data=st.data())
def test_dense_model_of_any_content(
    data: st.DataObject,
    smallest: Path,
    smallest_sharded: Path,
    text_file: Path,
    run: Callable[..., Answer],
    tmp_path: Path,
) -> None:
    folder = fresh(data.draw(st.sampled_from([smallest, smallest, smallest_sharded])), tmp_path)
    weights = sorted(folder.glob("*.safetensors"))
    path = data.draw(st.sampled_from([*[folder / "config.json"] * 3, *weights[:3], *sorted(folder.glob("*.json"))]))
    whole = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.draw(mutated(json.loads(whole)).map(dumped) | damaged(whole)))
    else:
        path.write_bytes(data.draw(damaged_file(whole)))
    before = set(tmp_path.rglob("*"))
    with in_time():
        check_answer(run("plan", folder, "--metric", "weights"))
        check_answer(run("eval", folder, "--text", text_file))
        text = ["--calibration", text_file, "--sequences", 2, "--length", 8, "--metric", "output", "--target", "q"]
        text += ["--refine", 1]
        # A tokenizer of another vocabulary is told by `eval` only, so far.
        free = ["--metric", "weights"]
        flags = free if path.name == "tokenizer.json" else data.draw(st.sampled_from([free, text]))
        answer = run("compress", folder, "-o", tmp_path / "out", "--iterations", 1, *flags)
    check_answer(answer)
    check_left(answer, tmp_path, before)
    if answer.code == 0:
        verify.verify(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


# Calibration text

ROW = {"text": "some words of a row", "content": "more of them", "id": 5}
CHAT = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"from": "gpt", "value": "b"}]}
rows = st.lists(st.one_of(st.just(ROW), mutated(ROW), mutated(CHAT), odd_in_json), max_size=5)
LINE = "a long line " * 2000


@st.composite
def calibration_file(draw: st.DrawFn) -> tuple[str, bytes]:
    """A suffix, and what such a file may hold."""
    suffix = draw(st.sampled_from(["txt", "jsonl", "json", "parquet"]))
    if suffix == "txt" or not draw(st.integers(0, 3)):
        texts = ["", " \n", "\ufeff" + "words " * 40, "a\0b " * 40, LINE, "é" * 99]
        text = draw(st.sampled_from(texts) | st.text(max_size=200))
        encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-16", "latin1"]))
        return suffix, draw(st.just(text.encode(encoding, "ignore")) | st.binary())
    if suffix == "parquet":
        content = draw(parquet())
    elif suffix == "jsonl":
        content = b"\n".join(map(dumped, draw(rows)))
    else:
        content = dumped(draw(rows | odd_in_json))
    return suffix, content if draw(st.booleans()) else draw(damaged(content))


@st.composite
def parquet(draw: st.DrawFn) -> bytes:
    """A table whose columns may be anything that Arrow has."""
    names = st.sampled_from(["text", "content", "id", "a\nb", ""])
    cells = st.sampled_from(["some words", None, 1, b"\xff", ["a"], [], {"a": 1}, "", LINE, 0.5])
    columns = draw(st.dictionaries(names, cells, max_size=3))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: [cell] * 4 for name, cell in columns.items()}), sink)
    return bytes(sink.getvalue())


@examples(120)
@given(
    file=calibration_file(),
    name=st.sampled_from(["text", "a b", "[1]", "a*", "é", "a::b", ".x", "a?", "%41"]),
    field=st.sampled_from([None, None, None, "text", "id", "a\nb", "", "\ud800"]),
)
def test_calibration_file_of_any_content(
    file: tuple[str, bytes],
    name: str,
    field: str | None,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% endfor %}"
    suffix, content = file
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(content)
    recipe = Recipe(calibration=str(path), sequences=3, length=8)
    recipe = recipe.model_copy(update={"calibration_field": field})
    try:
        with answered():
            found = token_sequences(tokenizer, recipe, 64)
            assert found.dtype == torch.int64
            assert found.shape[1] == 8
            assert 1 <= len(found) <= 3
    finally:
        path.unlink()


# Flags

COMMANDS: dict[str, Any] = dict(COMMAND.commands)  # type: ignore[attr-defined]
CHEAP = {
    "compress": ["--iterations", "1", "--target", "q"],
    "plan": ["--iterations", "1", "--target", "q"],
    "generate": ["--tokens", "2"],
    "compare": [
        "--methods",
        "wanda",
        "--ratios",
        "0.3",
        "--sequences",
        "2",
        "--length",
        "8",
        "--calibration",
        "words.txt",
    ],
    "heal": ["--steps", "1", "--length", "8"],
    "doctor": ["--no-timing"],
}
TEXT = ["--sequences", "2", "--length", "8", "--gradient-sequences", "1", "--refine", "1"]
TEXT += ["--calibration", "words.txt"]
UNIFORM = ["--allocate", "uniform", "--metric", "output", "--compensate"]
DIGITS = ["0", "-0", "1", "2", "3.5", "-5", "1e-320", "1e999", "nan", "-inf", "", "16", "many", "9" * 5000]
ENDLESS = [str(2**31), str(2**63), str(2**64), str(10**30)]
DIGITS += ENDLESS
WORDS = [*STRINGS, "cpu", "cuda:99", "cuda:256", "meta", "input", "layers:2", "*", "*.q_proj", "up,,", "eq10", "eq11"]
WORDS += ["output", "uniform", "pooled", "fisher", "svd", "ksvd", "paper", "wanda", "builtin", "dense"]
PLACES = ["FILE", "FOLDER", "MODEL", "COMPRESSED", "PLAN", "words.txt", "FILE/below", "new/below", "new", "n" * 250]
NAMED = {"model": "MODEL", "folder": "COMPRESSED", "prompt": "12", "output": "out", "text": "words.txt"}
NAMED |= {"repo": "nobody/model"}
"""What a parameter that must be given gets, where it is not the one that is odd."""


def is_number(command: str, parameter: str) -> bool:
    """Whether a parameter of a command is one."""
    hint = str(inspect.signature(COMMANDS[command].callback).parameters[parameter].annotation)
    return "int" in hint or "float" in hint


@st.composite
def command_line(draw: st.DrawFn) -> list[str]:
    """A command with one or two odd words among good ones."""
    name, first = draw(st.sampled_from([(name, one) for name in sorted(COMMANDS) for one in COMMANDS[name].params]))
    parameters = COMMANDS[name].params
    odd_ones = [first, *draw(st.lists(st.sampled_from(parameters), max_size=1))]
    words, arguments = [*CHEAP.get(name, [])], []
    if name in ("compress", "plan"):
        words += draw(st.sampled_from([["--metric", "weights"], [*TEXT, *UNIFORM], TEXT]))
    for parameter in parameters:
        words_for_it = DIGITS if is_number(name, parameter.name) else [*WORDS, *PLACES]
        word = draw(st.sampled_from(words_for_it) | st.text(max_size=5)) if parameter in odd_ones else None
        assume(parameter.name not in ("iterations", "refine") or word not in ENDLESS)
        if parameter.param_type_name == "argument":
            arguments.append(NAMED[parameter.name] if word is None else word)
        elif word is not None or parameter.required:
            words.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
            words += [] if parameter.is_flag else [NAMED[parameter.name] if word is None else word]
    return [name, *words, "--", *arguments]


@pytest.fixture(scope="module")
def desk(
    dense_folder: Path,
    compressed_folder: Path,
    text_file: Path,
    saved_plans: list[bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with one of each kind of thing that a flag may name; never changed."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(dense_folder, folder / "MODEL")
    shutil.copytree(compressed_folder, folder / "COMPRESSED")
    shutil.copy(text_file, folder / "words.txt")
    (folder / "FOLDER").mkdir()
    (folder / "FILE").write_text("a file\n")
    (folder / "PLAN").write_bytes(saved_plans[0])
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file in a folder with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def is_row(line: list[str], path: Path, outer: Path) -> bool:
    """Whether a file or folder is of the rows that a comparison finished before it was stopped, which stay, whole."""
    named = [value for flag, value in pairwise(line) if flag in ("-o", "--output")]
    if line[0] != "compare" or not named or not path.is_relative_to(outer / "case" / named[-1]):
        return False
    within = path.relative_to(outer / "case" / named[-1]).parts
    if within[:1] == ("rows",) and path.is_file():
        assert "seconds" in json.loads(path.read_text())
    return not within or within[0] in ("rows", "work")


@examples(80)
@given(line=command_line())
def test_any_flag(
    line: list[str], desk: Path, run: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("every flag is right, and the work is too much for here")

    monkeypatch.setattr("cospadi.commands.bench._in_new_process", refuse)
    monkeypatch.setattr("cospadi.commands.demo.run_demo", refuse)
    monkeypatch.setattr("cospadi.jobs.ray.cluster", refuse)
    for of_the_hub in ("claim", "upload"):
        monkeypatch.setattr(f"cospadi.model.hub.{of_the_hub}", lambda *_, **__: refuse())
    monkeypatch.setattr("cospadi.jobs.pool._Worker", refuse)
    if find_spec("lm_eval"):  # whose own tasks are thousands of files, read in ten seconds
        few_tasks = partial(importlib.import_module("lm_eval.tasks").TaskManager, include_defaults=False)
        monkeypatch.setattr("cospadi.commands.accuracy.TaskManager", few_tasks)
    monkeypatch.chdir(tmp_path)
    outer = tmp_path / "outer"  # what `..` names
    outer.mkdir(exist_ok=True)
    monkeypatch.chdir(fresh(desk, outer))
    before = contents(outer)
    with in_time():
        answer = run(*line)
    torch.set_num_threads(1)
    check_answer(answer)
    if answer.code:
        assert {path: content for path, content in contents(outer).items() if not is_row(line, path, outer)} == before
