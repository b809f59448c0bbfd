"""`--regenerate`: the teacher answers the prompts itself, greedily, for a predictor must match the teacher's own text.

Prompts of similar length are answered together, padded on the left. Every finished batch is appended to
`responses.jsonl` in the store's folder, so a resumed run does not answer again; the batches are the same in both cases,
and so are the answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from firp_cli.collecting.corpus import Corpus, Progress, no_progress
from firp_cli.data.conversations import EncodedConversation
from firp_cli.errors import DatasetError, StoreError
from firp_cli.recipe import DataConfig
from firp_cli.teacher.stack import Teacher

RESPONSES = "responses.jsonl"


def respond(
    teacher: Teacher, prompts: Corpus, data: DataConfig, longest: int, folder: Path, progress: Progress = no_progress
) -> Corpus:
    """Prompts with the teacher's greedy answers behind them, in the order of the prompts; the mask is on the answers.

    The ids are the prompt's followed by those generated, never tokenized again; EOS is kept, what follows it is not.
    Answers that are EOS at once are left out and counted as skipped; those cut by `max_new_tokens`, or by `longest`
    tokens of prompt and answer together, are kept and counted as `cut`.

    Raises DatasetError when every answer is empty, StoreError when the answers cannot be kept.
    """
    answers = _Answers(folder / RESPONSES)
    batches = plan_prompts(prompts.lengths, data.batch_size)
    done = 0
    try:
        for batch in batches:
            if not all(index in answers.tokens for index in batch):
                rows = [prompts.input_ids[index] for index in batch]
                written = greedy(teacher, rows, min(data.max_new_tokens, longest - max(map(len, rows))))
                answers.append(batch, written)
            done += len(batch)
            progress(done, len(prompts.input_ids))
    except OSError as error:
        raise StoreError(f"cannot write {answers.path}: {error}; make room and run again with --resume") from error
    return _join(teacher, prompts, answers.tokens)


def plan_prompts(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the prompts of each batch, by length."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.inference_mode()
def greedy(teacher: Teacher, prompts: Sequence[Tensor], max_new_tokens: int) -> list[list[int]]:
    """What transformers' own greedy `generate` writes after each prompt (T,), EOS included."""
    width = max(map(len, prompts))
    stops = list(teacher.eos_token_ids)
    padding = stops[0] if stops else 0
    ids = torch.full((len(prompts), width), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    out = teacher.model.generate(
        ids.to(teacher.device),
        attention_mask=mask.to(teacher.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=padding,
    )
    return [_until_stop(row, stops) for row in out[:, width:].tolist()]


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens


def _join(teacher: Teacher, prompts: Corpus, answers: dict[int, list[int]]) -> Corpus:
    corpus = Corpus(skipped=prompts.skipped.copy())
    for index, prompt in enumerate(prompts.input_ids):
        answer = answers[index]
        stopped = bool(answer) and answer[-1] in teacher.eos_token_ids
        if len(answer) - stopped == 0:
            corpus.skipped["empty answer"] += 1
            continue
        corpus.cut += not stopped
        ids = prompt.tolist() + answer
        corpus.add(EncodedConversation(ids, [False] * len(prompt) + [True] * len(answer)))
    if not corpus.input_ids:
        raise DatasetError(f"{teacher.name} ended every answer at once; check its chat template and EOS tokens")
    return corpus


class _Answers:
    """Answers kept on disk, one JSON object per line: prompt number and token ids. A torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[int, list[int]] = {}
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None:
                    break
                self.tokens[entry["prompt"]] = entry["token_ids"]
                whole += len(line)
            with path.open("rb+") as stream:
                stream.truncate(whole)

    def append(self, batch: list[int], written: list[list[int]]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            for index, tokens in zip(batch, written, strict=True):
                if index not in self.tokens:
                    stream.write(json.dumps({"prompt": index, "token_ids": tokens}) + "\n")
                    self.tokens[index] = tokens
            stream.flush()
            os.fsync(stream.fileno())
