"""Answers that the teacher writes, with its states: the training data of the predictors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from firp_cli.collecting.teacher_states import capture
from firp_cli.config import KINDS
from firp_cli.data.chat import encode_prompt
from firp_cli.decoding.engine import Engine
from firp_cli.machine import free_bytes
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import build_predictor
from firp_cli.store.reader import FINAL
from firp_cli.teacher.teacher import Teacher
from suite.subject import TEMPERATURES, Subject, subject
from suite.work import Shared, Table, Work

PACK_TOKENS = 16_384  # tokens of a forward that captures states
BATCHES = 8  # batches cut at once from prompts sorted by length: together a fair mix
ROOMY = 0.25  # share of a GPU's free memory that states may take; beyond it they go to host memory
SLACK = 1.3  # times the duration of the last batch
CAPTURED_A_SECOND = 50_000  # tokens, until it is measured


@dataclass
class OutputSequence:
    """An answer of the teacher with its states: the fields of a store's sequence that training reads."""

    input_ids: Tensor
    loss_mask: Tensor
    final: Tensor
    hidden: dict[int, Tensor]


@dataclass
class Account:
    """Counts and times of the answers; `captured`: tokens of prompts and answers whose states are captured."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    captured: int = 0
    capture_seconds: float = 0.0
    passes: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds_to_capture(self) -> float:
        """Seconds to capture one token."""
        return self.capture_seconds / self.captured if self.captured else 1 / CAPTURED_A_SECOND

    def plain(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "number": self.answers,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "captured_tokens": self.captured,
            "capture_seconds": self.capture_seconds,
            "passes": self.passes,
        }


def write_answers(shared: Shared, work: Work) -> None:
    """Answer all training prompts greedily, those of a real teacher then also by sampling, until there are enough
    tokens or the time is over; later parts read `sequences`.
    """
    own, began = subject(shared), time.perf_counter()
    teacher = own.teacher()
    work.values["loading_seconds"] = time.perf_counter() - began
    made = predictors_for(own, teacher)
    layers = sorted({layer for predictor in made.values() for layer in predictor.required_layers})
    del made
    prompts = fitting(shared, own, teacher)
    account, found = Account(), shared.found.setdefault("sequences", [])
    work.values |= {"layers": layers, "prompts": len(prompts), "preparing_seconds": time.perf_counter() - began}
    keeps = on_device(teacher, own, prompts, layers)
    work.values["states_on"] = teacher.device.type if keeps else "cpu"
    for temperature, seed in passes(own):
        engine = Engine(teacher, temperature=temperature, seed=seed)
        account.passes.append({"temperature": temperature, "seed": seed, "answers": 0})
        for mixed in mixtures(prompts, shared.sizes.at_once):
            pending, going = answer(engine, mixed, own, work, account)
            found += with_states(teacher, pending, layers, keeps, account)
            report(work, account)
            if not going:
                return
        del engine
        shared.free()


def passes(own: Subject) -> Iterator[tuple[float, int]]:
    """Yield temperature and seed of every pass over the prompts; one greedy pass if no number of tokens is given."""
    yield 0.0, 0
    number = 0
    while own.tokens is not None:
        yield TEMPERATURES[number % len(TEMPERATURES)], number + 1
        number += 1


def fitting(shared: Shared, own: Subject, teacher: Teacher) -> list[list[int]]:
    """Return token ids of the training prompts that are short enough; of a trained teacher as many as the sizes
    allow."""
    encoded = (encode_prompt(messages, teacher.tokenizer) for messages in own.asked())
    short = (ids for ids in encoded if len(ids) <= own.question_tokens)
    return list(short if own.tokens is not None else islice(short, shared.sizes.answers))


def mixtures(prompts: Sequence[list[int]], at_once: int) -> Iterator[list[list[list[int]]]]:
    """Yield batches of prompts of similar length, BATCHES at a time: batches of one group are a fair mix of all."""
    start, size = 0, at_once  # one batch first: it measures the memory of its states
    while start < len(prompts):
        part = sorted(prompts[start : start + size], key=len)
        yield [part[first : first + at_once] for first in range(0, len(part), at_once)]
        start, size = start + size, BATCHES * at_once


def answer(
    engine: Engine, batches: Sequence[Sequence[list[int]]], own: Subject, work: Work, account: Account
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Answer batch after batch; return prompts with answers, and whether time and need remain."""
    pending: list[tuple[list[int], list[int]]] = []
    last = 0.0
    for batch in batches:
        waiting = sum(len(prompt) + len(text) for prompt, text in pending)
        waiting += sum(len(prompt) + own.answer_tokens for prompt in batch)
        needed = SLACK * (last + waiting * account.seconds_to_capture)
        if own.tokens is not None and account.tokens >= own.tokens:
            return pending, False
        if account.answers and not work.clock.allows(needed, f"answers after {account.answers}"):
            return pending, False
        began = time.perf_counter()
        for prompt, made in zip(batch, engine.generate(batch, own.answer_tokens), strict=True):
            pending.append((prompt, made.token_ids))
            account.tokens += len(made.token_ids)
        last = time.perf_counter() - began
        account.seconds += last
        account.answers += len(batch)
        account.passes[-1]["answers"] += len(batch)
        report(work, account)
    return pending, True


def with_states(
    teacher: Teacher,
    pending: Sequence[tuple[list[int], list[int]]],
    layers: Sequence[int],
    keeps: bool,
    account: Account,
) -> list[OutputSequence]:
    """Return the answers with the states of all their positions. `keeps`: on the teacher's device."""
    began = time.perf_counter()
    sequences = [torch.tensor([*prompt, *text]) for prompt, text in pending]
    masks = [torch.arange(len(prompt) + len(text)) >= len(prompt) for prompt, text in pending]
    states = captured_states(teacher, sequences, layers, keeps)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize(teacher.device)
    account.capture_seconds += time.perf_counter() - began
    account.captured += sum(map(len, sequences))
    return [
        OutputSequence(ids, mask, own[FINAL], {layer: own[f"hidden.{layer}"] for layer in layers})
        for ids, mask, own in zip(sequences, masks, states, strict=True)
    ]


def captured_states(
    teacher: Teacher, sequences: Sequence[Tensor], layers: Sequence[int], keeps: bool = False
) -> list[dict[str, Tensor]]:
    """Return the states of every sequence: views of the tensors of one forward, without another copy."""
    found: list[dict[str, Tensor]] = [{} for _ in sequences]

    def sink(indices: list[int], states: dict[str, Tensor]) -> None:
        lengths = [len(sequences[index]) for index in indices]
        for name, rows in states.items():
            for index, part in zip(indices, (rows if keeps else rows.cpu()).split(lengths), strict=True):
                found[index][name] = part

    capture(teacher, sequences, list(layers), PACK_TOKENS, sink)
    return found


def on_device(teacher: Teacher, own: Subject, prompts: Sequence[list[int]], layers: Sequence[int]) -> bool:
    """Return True if a GPU has ample room for the states of all answers."""
    free = free_bytes(teacher.device)
    if teacher.device.type != "cuda" or free is None:
        return False
    mean = sum(map(len, prompts)) / max(1, len(prompts))
    answers = own.answer_tokens * len(prompts) if own.tokens is None else own.tokens
    rows = answers * (1 + 2 * mean / own.answer_tokens)  # answers have about half of their largest length
    return rows * (1 + len(layers)) * teacher.hidden_size * teacher.dtype.itemsize < ROOMY * free


def predictors_for(own: Subject, teacher: Teacher) -> dict[str, Predictor]:
    """Return untrained predictors of every kind."""
    with torch.inference_mode(False):
        return {
            kind: build_predictor(KINDS[kind].model_validate(section), teacher)
            for kind, section in own.sections(teacher.num_layers).items()
        }


def stored(sequences: Sequence[OutputSequence], predictor: Predictor) -> list[OutputSequence]:
    """Return the answers as this predictor's store contains them: without states that it does not read."""
    layers = predictor.required_layers
    return [replace(item, hidden={layer: item.hidden[layer] for layer in layers}) for item in sequences]


def report(work: Work, account: Account) -> None:
    """Report the results so far."""
    work.values |= account.plain()
    rate = account.tokens / max(1e-9, account.seconds)
    work.key = f"{account.answers} answers, {account.tokens / 1e6:.3f} M tokens, {rate:.0f} tokens/s"
    headers = ["answers", "tokens", "tokens/s", "states of tokens", "s writing", "s capturing", "passes"]
    line = [
        str(account.answers),
        f"{account.tokens / 1e6:.3f} M",
        f"{rate:.0f}",
        f"{account.captured / 1e6:.3f} M",
        f"{account.seconds:.1f}",
        f"{account.capture_seconds:.1f}",
        ", ".join(f"{item['answers']} at temperature {item['temperature']:g}" for item in account.passes),
    ]
    work.tables[:] = [Table("Answers of the teacher", headers, [line])]
    work.save()
