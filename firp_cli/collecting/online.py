"""Hidden states computed during training: on every read (online), or on the first read and then kept on disk (hybrid).

Both read like a store. States pass through the store's dtype, so all three values of `data.mode` train on the same
numbers, up to the rounding of forwards with different batches.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firp_cli.collecting.corpus import Corpus
from firp_cli.collecting.teacher_states import capture
from firp_cli.errors import NumericsError, StoreError
from firp_cli.files import file_sha256, write_atomically
from firp_cli.provenance import fingerprint
from firp_cli.store.reader import StoredSequence, decode_states, encode_states, state_names
from firp_cli.store.shard_file import save_hashed
from firp_cli.teacher.teacher import Teacher

OFFSETS, NUMBERS = "sequence_offsets", "conversations"
HASH_DIGITS = 16  # of a cache file's sha256, in its name

States = dict[str, Tensor]  # as stored, by tensor name: (T, d), and (T, 1) for scales


class OnlineStates(Sequence[StoredSequence]):
    """Conversations of a corpus, with states that the teacher computes on every read.

    Several threads may read; one forward runs at a time.

    Args:
        layers: those whose states are returned beside the final state. dtype: of the store that this replaces.
        pack_tokens: most positions of a forward.
    """

    def __init__(self, teacher: Teacher, corpus: Corpus, layers: Sequence[int], dtype: str, pack_tokens: int) -> None:
        self.teacher, self.corpus, self.layers, self.dtype = teacher, corpus, tuple(layers), dtype
        self.lengths = corpus.lengths
        self._pack_tokens = pack_tokens
        self._forward = threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> StoredSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredSequence]: ...
    def __getitem__(self, index: int | slice) -> StoredSequence | list[StoredSequence]:
        if isinstance(index, slice):
            return self.fetch(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        return self.fetch([index % len(self)])[0]

    def fetch(self, indices: Sequence[int]) -> list[StoredSequence]:
        """Return several conversations, with as few forwards as `pack_tokens` allows.

        Raises NumericsError naming a conversation with states that are not finite.
        """
        return [self._sequence(index, states) for index, states in zip(indices, self._make(indices), strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return the description of the data for training.json."""
        counts = {"conversations": len(self), "tokens": sum(self.lengths)}
        settings = {"data_fingerprint": self.corpus.fingerprint()}
        record = {"mode": "online", "layers": list(self.layers), "dtype": self.dtype}
        return record | {"settings": settings, "counts": counts}

    def flush(self) -> None:
        """Do nothing: no state waits to be written."""

    def _make(self, indices: Sequence[int]) -> list[States]:
        """Compute the states of conversations, in the form of a store."""
        made: dict[int, States] = {}

        def sink(batch: list[int], states: dict[str, Tensor]) -> None:
            for name, rows in states.items():
                place = 0
                stored = encode_states(rows, self.dtype)
                for number in batch:
                    length = self.lengths[indices[number]]
                    for suffix, values in stored.items():
                        part = values[place : place + length]
                        made.setdefault(number, {})[name + suffix] = part.to("cpu", copy=True)
                    place += length

        with self._forward:
            sequences = [self.corpus.input_ids[index] for index in indices]
            capture(self.teacher, sequences, list(self.layers), self._pack_tokens, sink)
        for number, index in enumerate(indices):
            for name, values in made[number].items():
                if values.dtype.is_floating_point and not torch.isfinite(values.float()).all():
                    raise NumericsError(
                        f"NaN or infinity in {name} of conversation {index}\n"
                        "load the teacher in another dtype (teacher.dtype), or leave that conversation out"
                    )
        return [made[number] for number in range(len(indices))]

    def _sequence(self, index: int, states: States) -> StoredSequence:
        hidden: dict[int, Tensor] = {}
        for name, layer in state_names(self.layers).items():
            # cloned outside of the forward's inference mode: training saves the values for its backward pass
            values = decode_states(states[name].clone(), states.get(f"{name}.scale"))
            if layer is None:
                final = values
            else:
                hidden[layer] = values
        return StoredSequence(self.corpus.input_ids[index].long(), self.corpus.loss_mask[index], final, hidden)


class HybridStates(OnlineStates):
    """Online states that are kept on disk: the first epoch writes files that later epochs read.

    Every rank writes its own files, `cache-<identity>-<rank>-<number>-<hash>.safetensors`, and reads those of all
    ranks. The identity covers teacher, corpus, layers and dtype; files of another identity are ignored. The hash is
    that of the file's bytes: a damaged file is detected when the folder is opened, and its states are computed again.

    Args:
        folder: where the files are.
        shard_tokens: least tokens of a file. rank: number of this process.

    Raises StoreError when a file cannot be written; earlier files stay.
    """

    def __init__(
        self,
        teacher: Teacher,
        corpus: Corpus,
        layers: Sequence[int],
        dtype: str,
        pack_tokens: int,
        folder: Path,
        shard_tokens: int,
        rank: int = 0,
    ) -> None:
        super().__init__(teacher, corpus, layers, dtype, pack_tokens)
        self.folder, self.rank, self._shard_tokens = folder, rank, shard_tokens
        identity = [teacher.fingerprint, corpus.fingerprint(), sorted(self.layers), dtype]
        self._stem = f"cache-{fingerprint(identity)[:8]}"
        self._guard = threading.RLock()
        self._places: dict[int, tuple[Any, int, int]] = {}  # open file, first row, end
        self._known: set[str] = set()
        self._waiting: dict[int, States] = {}
        self.made = 0  # conversations whose states this process computed
        folder.mkdir(parents=True, exist_ok=True)
        self._scan(check=True)

    def fetch(self, indices: Sequence[int]) -> list[StoredSequence]:
        with self._guard:
            absent = [index for index in dict.fromkeys(indices) if not self._has(index)]
            if absent and self._scan(check=False):  # another rank may have written them in the meantime
                absent = [index for index in absent if not self._has(index)]
        fresh = dict(zip(absent, self._make(absent), strict=True)) if absent else {}
        with self._guard:
            self.made += len(fresh)
            self._waiting |= {index: states for index, states in fresh.items() if not self._has(index)}
            if sum(self.lengths[index] for index in self._waiting) >= self._shard_tokens:
                self.flush()
            states = [fresh.get(index) or self._read(index) for index in indices]
        return [self._sequence(index, part) for index, part in zip(indices, states, strict=True)]

    def flush(self) -> None:
        """Write the states that are not on disk yet. Raises StoreError."""
        with self._guard:
            if not self._waiting:
                return
            numbers = sorted(self._waiting)
            names = list(self._waiting[numbers[0]])
            tensors = {name: torch.cat([self._waiting[number][name] for number in numbers]) for name in names}
            lengths = torch.tensor([0, *(self.lengths[number] for number in numbers)])
            tensors |= {NUMBERS: torch.tensor(numbers), OFFSETS: lengths.cumsum(0)}
            mine = sum(1 for name in self._known if name.startswith(f"{self._stem}-{self.rank:05d}-"))
            draft = self.folder / f"{self._stem}-{self.rank:05d}-{mine:05d}.draft"
            sums: list[str] = []
            try:
                write_atomically(draft, lambda temporary: sums.append(save_hashed(tensors, temporary)))
                path = draft.with_name(f"{draft.stem}-{sums[0][:HASH_DIGITS]}.safetensors")
                draft.replace(path)
            except (OSError, SafetensorError) as error:
                raise StoreError(
                    f"cannot keep states in {self.folder}: {error}\n"
                    "make room and run again with --resume, or keep no states: data.mode=online"
                ) from error
            self._enter(path)
            self._waiting.clear()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"mode": "hybrid", "folder": str(self.folder)}

    def _has(self, index: int) -> bool:
        return index in self._places or index in self._waiting

    def _read(self, index: int) -> States:
        if index in self._waiting:
            return self._waiting[index]
        handle, start, end = self._places[index]
        names = [name for name in handle.keys() if name not in (NUMBERS, OFFSETS)]  # noqa: SIM118 (a file, no dict)
        return {name: handle.get_slice(name)[start:end] for name in names}

    def _scan(self, check: bool) -> bool:
        """Open files that are not known yet and return True if there were any.

        With `check` compare each file's bytes with its hash first, and remove damaged files.
        """
        opened = False
        for path in sorted(self.folder.glob(f"{self._stem}-*.safetensors")):
            if path.name in self._known:
                continue
            digits = path.stem.rsplit("-", 1)[1]
            if check and file_sha256(path)[:HASH_DIGITS] != digits:
                path.unlink(missing_ok=True)
                continue
            self._enter(path)
            opened = True
        return opened

    def _enter(self, path: Path) -> None:
        handle = safe_open(path, framework="pt")
        offsets = handle.get_tensor(OFFSETS).tolist()
        for place, number in enumerate(handle.get_tensor(NUMBERS).tolist()):
            self._places[number] = (handle, offsets[place], offsets[place + 1])
        self._known.add(path.name)
