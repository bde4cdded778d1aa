"""What the dense model predicts on the text: its likeliest tokens, on disk, so that it runs once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.distance import Predictions, likeliest, the_text_itself
from cospadi.calibration.loss import total_loss
from cospadi.errors import UserError
from cospadi.experts import parameter_of
from cospadi.jobs.ledger import Ledger, Piece
from cospadi.jobs.ranks import Ranks
from cospadi.runtime.swap import quantizer_of
from cospadi.stages.clock import Clock

log = logging.getLogger("cospadi")

PIECE_TOKENS = 2**14
"""Tokens of the text whose predictions one piece of the ledger holds, or one sequence."""

HELD_OUT = 8
"""One in so many sequences is set aside, from the end of the text."""

MOST_HELD = 2**14
"""Tokens that are set aside at most, or one sequence."""

LOGITS = 2**27
"""Logits that are in memory at a time, or those of one sequence."""


def check_teacher(teacher: nn.Module, student: Any, name: str) -> None:
    """Refuse a dense model that a compressed one was not made of: every tensor that was not compressed has to be the
    same in both, and projections have to have the same shapes.

    Args:
        name: of the teacher, for messages.

    Raises:
        UserError: it is another model.
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    entries = quantizer_of(student).quantization_config.parsed()
    for layer, entry in entries.items():
        weight = theirs.get(f"{layer}.weight")
        shape = None if weight is None else list(weight.shape)
        if shape != [entry.d2, entry.d1] and (weight is not None or parameter_of(layer) is None):
            has = "lacks it" if shape is None else f"has {shape[1]} x {shape[0]}"
            raise UserError(
                f"{name} is not the model that the folder was made of: {layer} is {entry.d1} x {entry.d2} there, and "
                f"the teacher {has}. Name that model with --teacher"
            )
    for tensor, own in ours.items():
        if tensor.rpartition(".")[0] in entries or parameter_of(tensor) is not None:
            continue
        their = theirs.get(tensor)
        if their is None or their.shape != own.shape or not torch.equal(their.to(own), own):
            has = "lacks it" if their is None else "holds something else in it"
            raise UserError(
                f"{name} is not the model that the folder was made of: tensor {tensor} was not compressed, and the "
                f"teacher {has}. Name that model with --teacher"
            )


def split(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences to train on, in an order set by the seed, and those that are set aside.

    Raises:
        UserError: there are not two.
    """
    count, length = windows.shape
    if count < 2:
        raise UserError(
            f"the text has {count} sequence of {length} tokens: one to train on and one to set aside are needed. Give "
            "a longer text or a smaller --length"
        )
    held = max(1, min(count // HELD_OUT, MOST_HELD // length))
    order = torch.randperm(count - held, generator=torch.Generator().manual_seed(seed))
    return windows[: count - held][order], windows[count - held :]


def rows_at_once(length: int, vocabulary: int) -> int:
    """Sequences in one forward pass."""
    return max(1, LOGITS // (length * vocabulary))


@dataclass(frozen=True)
class Targets:
    """Sequences that are ready to be learned: tokens, and what the dense model predicts for them, in pieces."""

    pieces: Sequence[Piece]
    rows: int

    def __len__(self) -> int:
        return sum(piece.record["sequences"] for piece in self.pieces)

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Predictions]:
        """Tokens (rows, length) and predictions of these sequences, on the CPU."""
        found = [self._row(*divmod(index, self.rows)) for index in indices]
        tokens, likely, logs = (torch.stack(part) for part in zip(*found, strict=True))
        return tokens.long(), Predictions(likely, logs)

    def _row(self, piece: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        held = self.pieces[piece]
        return held.row("tokens", row), held.row("likely", row), held.row("logs", row)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Predictions]]:
        """All sequences in their order."""
        for start in range(0, len(self), rows):
            yield self[range(start, min(start + rows, len(self)))]


@torch.inference_mode()
def teach(
    teacher: Callable[[], Any],
    sequences: Tensor,
    key: str,
    top: int,
    ledger: Ledger,
    ranks: Ranks,
    clock: Clock,
    goes_on: Callable[[], bool],
    on_rows: Callable[[int], None],
) -> Targets:
    """Have the dense model predict sequences, int64 (n, length), as many as it has time for; what an earlier run of the
    job has left is taken.

    Args:
        teacher: gives the model; called where something is missing.
        key: of the pieces in the ledger.
        top: likeliest tokens that are kept; 0 takes the text itself in their place.
        goes_on: whether there is time for more.
        on_rows: called with the number of sequences just done.
    """
    length = sequences.shape[1]
    rows = max(1, PIECE_TOKENS // length)
    pieces: list[Piece] = []
    for number, start in enumerate(range(0, len(sequences), rows)):
        name = f"{key}/{number:05}"
        piece = ledger.get(name) if ranks.first else None
        there = ranks.agreed(piece is not None)
        if not there:
            if not ranks.agreed(start == 0 or goes_on()):
                break
            part = sequences[start : start + rows]
            record, tensors = _predicted(teacher(), part, top, ranks)
            piece = ledger.put(name, record, tensors) if ranks.first else None
            ledger.put("spent", {"spent": clock.spent})
        if ranks.count > 1:
            piece = ranks.agreed(piece and Piece(piece.record, None, piece.path))
        assert piece is not None
        pieces.append(piece)
        on_rows(piece.record["sequences"])
    return Targets(pieces, rows)


def _predicted(model: Any, tokens: Tensor, top: int, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A piece of these sequences, each process doing its part of them."""
    at_once = rows_at_once(tokens.shape[1], model.config.get_text_config(decoder=True).vocab_size)
    share = -(-len(tokens) // ranks.count)
    loss, found = 0.0, []
    mine = tokens[ranks.rank * share : (ranks.rank + 1) * share]
    for batch in mine.split(at_once) if len(mine) else ():  # type: ignore[no-untyped-call]
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        loss += total_loss(logits, batch.to(model.device))
        kept = likeliest(logits, top) if top else the_text_itself(batch)
        found.append((kept.tokens.cpu(), kept.logs.cpu()))
    every = ranks.gathered([(loss, found)])
    likely, logs = (torch.cat([pair[i] for _, pairs in every for pair in pairs]) for i in (0, 1))
    record = {"sequences": len(tokens), "loss": sum(one for one, _ in every)}
    return record, {"tokens": tokens.to(torch.int32), "likely": likely, "logs": logs}
