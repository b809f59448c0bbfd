#!/usr/bin/env python3
"""Answer prompts: tokens per second of continuous batching, of fixed batches, and of transformers' `generate`.

All three get the same prompts by length, the same batch size and limit, and count the same tokens: those of the
answers, EOS included. Repeats are interleaved; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.collecting.corpus import build_corpus, load_messages
from firp_cli.config import DataConfig, TeacherConfig
from firp_cli.decoding.continuous import ContinuousBatcher
from firp_cli.decoding.engine import Engine
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher

Texts = list[list[int]]


def refilled(teacher: Teacher, prompts: Texts, limit: int, batch: int) -> Texts:
    found = ContinuousBatcher(teacher).decode(prompts, [limit] * len(prompts), batch)
    return [item.token_ids for item in sorted(found, key=lambda item: item.number)]


def in_batches(method: Engine | HuggingFaceGenerate, prompts: Texts, limit: int, batch: int) -> Texts:
    texts: Texts = []
    for start in range(0, len(prompts), batch):
        texts += [answer.token_ids for answer in method.generate(prompts[start : start + batch], limit)]
    return texts


def measure(methods: dict[str, Callable[[], Texts]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Texts]]:
    """Return tokens per second of each repeat, and the answers."""
    rates: dict[str, list[float]] = {name: [] for name in methods}
    answers: dict[str, Texts] = {}
    for turn in range(repeats + 1):
        for name, method in methods.items():
            began = time.perf_counter()
            answers[name] = method()
            seconds = time.perf_counter() - began
            if turn:  # the first round warms up
                rates[name].append(sum(map(len, answers[name])) / seconds)
    return rates, answers


def main() -> None:
    """Print the table, then the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=DEFAULT_TEACHER)
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--data-dir")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int, default=256, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    teacher = load_teacher(TeacherConfig(model=arguments.teacher))
    use_lean_layers(teacher)
    settings = {"dataset": arguments.dataset, "data_dir": arguments.data_dir, "split": arguments.split}
    data = DataConfig.model_validate({**settings, "limit": arguments.limit, "regenerate": True})
    prompts = sorted((ids.tolist() for ids in build_corpus(load_messages(data), teacher, data).input_ids), key=len)
    limit, batch = arguments.max_new_tokens, arguments.batch_size
    plain, library = Engine(teacher), HuggingFaceGenerate(teacher)
    rates, answers = measure(
        {
            "refilled": lambda: refilled(teacher, prompts[::-1], limit, batch)[::-1],
            "plain batches": lambda: in_batches(plain, prompts, limit, batch),
            "generate": lambda: in_batches(library, prompts, limit, batch),
        },
        arguments.repeats,
    )
    reference = answers["generate"]
    rows = {
        name: {
            "tokens_per_second": round(statistics.median(values), 1),
            "of_generate": round(statistics.median(a / b for a, b in zip(values, rates["generate"], strict=True)), 3),
            "identical": sum(mine == theirs for mine, theirs in zip(answers[name], reference, strict=True)),
        }
        for name, values in rates.items()
    }
    print(f"{len(prompts)} prompts, batches of {batch}, {sum(map(len, reference))} tokens of answers, {teacher.device}")
    for name, row in rows.items():
        print(
            f"{name:14} {row['tokens_per_second']:10,.1f} tokens/s  {row['of_generate']:6.2f} x generate  "
            f"{row['identical']} of {len(prompts)} answers identical"
        )
    print(json.dumps({"rows": rows, "rates": rates, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
