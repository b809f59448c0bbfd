"""Small hidden-state stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.store.reader import encode_states
from firp_cli.store.writer import ShardPlan, StoreWriter

HIDDEN, LAYERS = 8, (1, 3)
LENGTHS = [5, 3, 9, 4, 7, 2]
FINGERPRINTS = {"teacher": "t1", "tokenizer": "k1", "chat template": "c1"}
SETTINGS = {"dataset": "made", "limit": None, "shard_tokens": 10}


def states(index: int, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * index + layer)
    return torch.randn(LENGTHS[index], HIDDEN, generator=generator)


def shard(plan: ShardPlan, dtype: str) -> dict[str, Tensor]:
    chosen = range(plan.first, plan.next)
    tensors = {
        "input_ids": torch.cat([torch.arange(LENGTHS[index], dtype=torch.int32) + 10 * index for index in chosen]),
        "loss_mask": torch.cat([torch.arange(LENGTHS[index]) >= 1 for index in chosen]),
        "sequence_offsets": torch.tensor([0, *(LENGTHS[index] for index in chosen)]).cumsum(0),
    }
    for name, layer in (("hidden.1", 1), ("hidden.3", 3), ("hidden.final", 9)):
        for suffix, stored in encode_states(torch.cat([states(index, layer) for index in chosen]), dtype).items():
            tensors[name + suffix] = stored
    return tensors


def writer(folder: Path, dtype: str = "float32", resume: bool = False, **changes: Any) -> StoreWriter:
    options: dict[str, Any] = {
        "teacher": {"name": "tiny", "hidden_size": HIDDEN},
        "fingerprints": FINGERPRINTS,
        "layers": list(LAYERS),
        "settings": SETTINGS,
    }
    return StoreWriter(folder, dtype=dtype, resume=resume, **(options | changes))


def fill(folder: Path, dtype: str = "float32", resume: bool = False) -> list[ShardPlan]:
    with writer(folder, dtype, resume) as store:
        pending = store.plan(LENGTHS, {"conversations": len(LENGTHS)})
        for plan in pending:
            store.write(plan, shard(plan, dtype))
    return pending


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}
