"""vLLM's server over models side by side: tokens a second and time to first token, by the number of users.

    python benchmarks/serve.py DENSE COMPRESSED
    python benchmarks/serve.py DENSE COMPRESSED --users 1 --users 16 --prompt 512 --tokens 128 --json serve.json

Runs where vLLM is installed. For each model in turn, a server is started on loopback with vLLM's defaults, and users
ask it for completions, each its next as soon as it has one: a prompt of random tokens, no two alike, and as many new
tokens, greedily, streamed. One round of all users goes before, untimed. Exits with 1 where a request failed.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cospadi.commands.tables import new_table

USERS = [1, 4, 8, 16]
STARTS = 600
"""Seconds that a server may take to start."""


@dataclass(frozen=True)
class Answer:
    """One request: seconds to its first token and in all, and the tokens that came. `failed` says why none did."""

    first: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Row:
    """One model under one load.

    Attributes:
        rate: tokens a second of all users together.
        first, worst: seconds to the first token, the median and the longest.
        failed: requests.
    """

    model: str
    users: int
    rate: float
    first: float
    worst: float
    failed: int


@contextmanager
def server(folder: Path, options: list[str]) -> Iterator[int]:
    """The port of a server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "4", **os.environ, "NO_COLOR": "1"}  # GiB
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + STARTS
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.stderr.write(log.read())
                    raise SystemExit(f"the server of {folder} did not start")
                time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(port: int, prompt: list[int], tokens: int) -> Answer:
    """One completion, streamed."""
    body: dict[str, Any] = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=STARTS)
    begun, first, made = time.perf_counter(), 0.0, 0
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Answer(failed=f"{response.status} {response.read()[:200].decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[len(b"data: ") :])
                first = first or time.perf_counter() - begun
                made = (event.get("usage") or {}).get("completion_tokens", made)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(failed=f"{type(error).__name__} {error}")
    finally:
        connection.close()
    if made != tokens:
        return Answer(failed=f"{made} tokens came, {tokens} were asked")
    return Answer(first, time.perf_counter() - begun, made)


def load(port: int, users: int, rounds: int, prompts: Iterator[list[int]], tokens: int) -> tuple[float, list[Answer]]:
    """Seconds that all took, and what each got."""
    asked = [[next(prompts) for _ in range(rounds)] for _ in range(users)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        each = pool.map(lambda mine: [ask(port, prompt, tokens) for prompt in mine], asked)
        answers = [answer for mine in each for answer in mine]
    return time.perf_counter() - begun, answers


def random_prompts(vocabulary: int, length: int) -> Iterator[list[int]]:
    rng = random.Random(0)
    while True:
        yield [rng.randrange(3, vocabulary) for _ in range(length)]


def measure(folder: Path, users: list[int], rounds: int, length: int, tokens: int, options: list[str]) -> list[Row]:
    """A row for each number of users."""
    config = json.loads((folder / "config.json").read_text())
    prompts, rows = random_prompts(config["vocab_size"], length), []
    with server(folder, options) as port:
        load(port, max(users), 1, prompts, tokens)
        for count in users:
            seconds, answers = load(port, count, rounds, prompts, tokens)
            for failed in {answer.failed for answer in answers if answer.failed}:
                print(f"{folder.name}, {count} users: {failed}", file=sys.stderr)
            firsts = [answer.first for answer in answers if not answer.failed] or [float("nan")]
            rate = sum(answer.tokens for answer in answers) / seconds
            failures = sum(bool(answer.failed) for answer in answers)
            rows.append(Row(folder.name, count, rate, statistics.median(firsts), max(firsts), failures))
    return rows


def main(
    models: Annotated[list[Path], typer.Argument(help="model folders, the one to compare with first")],
    users: Annotated[list[int], typer.Option(help="numbers of users")] = USERS,
    rounds: Annotated[int, typer.Option(help="completions that each user asks for")] = 2,
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 128,
    tokens: Annotated[int, typer.Option(help="new tokens of a completion")] = 64,
    option: Annotated[list[str], typer.Option(help="option of vLLM's server, as --option=--dtype=bfloat16")] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option("--json", help="file to write the rows to")] = None,
) -> None:
    rows = [row for folder in models for row in measure(folder, users, rounds, prompt, tokens, option)]
    table = new_table("model", "users", "tokens/s", "of the first model's", "first token, s", "longest, s", "failed")
    base = {row.users: row.rate for row in rows if row.model == models[0].name}
    for row in rows:
        ratio = f"{row.rate / base[row.users]:.2f}x"
        times = f"{row.first:.2f}", f"{row.worst:.2f}"
        table.add_row(row.model, str(row.users), f"{row.rate:.1f}", ratio, *times, str(row.failed))
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if any(row.failed for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
