"""What belongs to a model beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from cospadi.format.manifest import MANIFEST

COMPANIONS = (
    *("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "additional_chat_templates/*"),
)
"""What belongs to a model beside its weights: configuration, tokenizer, chat templates, generation config, licence."""

NOT_COPIED = {"config.json", "adapter_config.json", MANIFEST}

TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.spm", "*.tiktoken", "additional_chat_templates/*"),
)
"""Which of the companions are a tokenizer's: those of two do not mix."""


def copy_companions(source: Path, destination: Path) -> None:
    """Copy a model's companions, but for its config and the index of its shards."""
    for path in sorted(path for pattern in COMPANIONS for path in source.glob(pattern)):
        if path.is_file() and path.name not in NOT_COPIED and not path.name.endswith(".index.json"):
            copy = destination / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def lay_over(source: Path, destination: Path) -> None:
    """Put another folder's companions in place of those that are there; of its tokenizer all or nothing."""
    if (source / "tokenizer_config.json").is_file():
        for path in [path for pattern in TOKENIZER for path in destination.glob(pattern)]:
            path.unlink(missing_ok=True)
    copy_companions(source, destination)
