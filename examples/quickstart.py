"""Compress the built-in model, evaluate it, serve it, ask it: in a minute or two, without a network.

    pip install 'transformers[serving]'                            # or vLLM, which then serves
    python examples/quickstart.py                                  # writes ./demo-small

The same as a notebook: examples/quickstart.ipynb, which `python scripts/notebook.py` makes of this file and runs.
"""

# %% [markdown]
# # Compress, evaluate, serve, ask
#
# On the model of 3.4M parameters that comes with the package, `demo`, which was trained on Python code. Everything here
# works in the same way with a model of yours.

# %%
import atexit
import json
import math
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cospadi
from cospadi.demo import model_path, stdlib_documents

# %% [markdown]
# ## Compress
#
# Three tenths of the projections' bytes go. The recipe is a short one: with `ratio` alone the default takes more text
# and tunes each block afterwards, which takes longer and loses less.

# %%
SHORT = {"calibration": "builtin", "sequences": 8, "length": 256, "iterations": 4, "metric": "output", "refine": 0}
result = cospadi.compress("demo", {"ratio": 0.3} | SHORT, "demo-small", overwrite=True)
print(f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after, embeddings included")

# %% [markdown]
# ## Evaluate
#
# Perplexity, compressed and dense, on sources that neither the model nor the compression has seen. From here on it is
# plain transformers: `import cospadi` has registered the format.


# %%
def perplexity(folder: Path | str, windows: int = 4, length: int = 512) -> float:
    """exp of the mean negative log-likelihood a token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = "\n".join(stdlib_documents("heldout"))[: 8 * windows * length]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : windows * length].view(windows, length)
    with torch.inference_mode():
        return math.exp(model(input_ids=tokens, labels=tokens).loss)


print(f"perplexity {perplexity(model_path()):.2f} dense, {perplexity('demo-small'):.2f} compressed")

# %% [markdown]
# ## Serve
#
# By vLLM where it is installed, else by `transformers serve`, in a process that knows the format. Both speak the OpenAI
# API.

# %%
if find_spec("vllm"):
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", "demo-small"]
else:
    words = ["-c", "import cospadi; from transformers.cli.transformers import app; app()", "serve", "demo-small"]
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
with Path("server.log").open("wb") as log:
    command = [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ  # GiB; else vLLM wants nearly all memory on a CPU
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
atexit.register(server.kill)


def ask(path: str, **body: Any) -> bytes:
    """What the server answers."""
    data = json.dumps(body).encode() if body else None
    request = Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        told: bytes = answer.read()
    return told


while True:
    try:
        ask("/health")
        break
    except URLError:
        assert server.poll() is None, Path("server.log").read_text(encoding="utf-8")
        time.sleep(0.2)

# %% [markdown]
# ## Ask

# %%
prompt = "for i in range("
answer = json.loads(ask("/v1/completions", model="demo-small", prompt=prompt, max_tokens=24, temperature=0.0))
print(prompt + answer["choices"][0]["text"])

server.terminate()
ended = server.wait()
