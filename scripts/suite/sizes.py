"""Sizes of the suite: in full, quick, and as a toy that runs on a CPU in a test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Shape = dict[str, Any]  # fields of a LlamaConfig

SHAPE_7B: Shape = {  # Mistral 7B's: 7.25 billion parameters
    "vocab_size": 32_768,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
SHAPE_1B: Shape = {  # Llama 3.2 1B's: 1.24 billion parameters
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
SHAPE_135M: Shape = {  # SmolLM2 135M's
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPE_TOY: Shape = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TRAINED: Shape = {  # with 12,288 tokens: 106 million parameters
    "hidden_size": 768,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TRAINED_TOY: Shape = TRAINED | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts. Tokens, unless another unit is named.

    Attributes:
        copy_bytes, matrix: bytes that a copy reads, and the order of the matrices. repeats: rounds of a timing.
        shapes: random teachers by name; the first one is the shape of the projection.
        context: of single steps. contexts, rows: of passes. prompts: of prefill. batches: of steps.
        new_tokens: of `ar` and `generate`. workers: processes of the tests.
        vocabulary, problems, code_bytes, tokenizer_bytes: of the corpus; the problems are a count.
        trained: the shape of the teacher. window, train_batch: of its training. train_steps: at most.
        answers, answer_tokens, question_tokens: number and length of the answers that the predictors are trained on.
        at_once: answers in a batch. real_prompts, real_answer_tokens, real_question_tokens: the same of a real
            teacher, whose prompts are counted by data set.
        anchors, conversations: of an optimizer step of the predictors. held_out, ridge_answers: answers to measure on,
            and for the ridge start, at most.
        bench_prompts, bench_tokens, bench_repeats: of the bench, prompts of each data set at most.
        exact_prompts, exact_tokens: of the fp32 comparison. tune_prompts: of `tune`, of each data set.
        tuned, tune_rows: predictors, and rows of a step, at most. tune_batches: batch sizes with a tree of their own.
            tune_seconds: of measuring passes, at most. tune_sittings: rounds of timing whole steps; None: the default
            of the device.
    """

    name: str
    shapes: dict[str, Shape]
    copy_bytes: int
    matrix: int
    repeats: int
    context: int
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    workers: int
    vocabulary: int
    problems: int
    code_bytes: int
    tokenizer_bytes: int
    trained: Shape
    window: int
    train_batch: int
    train_steps: int
    answers: int
    answer_tokens: int
    question_tokens: int
    at_once: int
    real_prompts: int
    real_answer_tokens: int
    real_question_tokens: int
    anchors: int
    conversations: int
    held_out: int
    ridge_answers: int
    bench_prompts: int
    bench_tokens: int
    bench_repeats: int
    exact_prompts: int
    exact_tokens: int
    tune_prompts: int
    tuned: int
    tune_rows: int
    tune_batches: tuple[int, ...]
    tune_seconds: float
    tune_sittings: int | None


FULL = Sizes(
    name="full",
    shapes={"7b": SHAPE_7B, "1b": SHAPE_1B, "135m": SHAPE_135M},
    copy_bytes=4 << 30,
    matrix=8192,
    repeats=7,
    context=512,
    contexts=(512, 4096),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    prompts=(512, 4096, 16_384),
    batches=(1, 2, 4, 8, 16, 32),
    new_tokens=128,
    workers=14,
    vocabulary=12_288,
    problems=40_000,
    code_bytes=24_000_000,
    tokenizer_bytes=8_000_000,
    trained=TRAINED,
    window=512,
    train_batch=64,
    train_steps=1 << 30,
    answers=768,
    answer_tokens=192,
    question_tokens=256,
    at_once=256,
    real_prompts=1 << 30,
    real_answer_tokens=256,
    real_question_tokens=350,
    anchors=64,
    conversations=32,
    held_out=256,
    ridge_answers=2048,
    bench_prompts=20,
    bench_tokens=128,
    bench_repeats=2,
    exact_prompts=6,
    exact_tokens=96,
    tune_prompts=8,
    tuned=8,
    tune_rows=256,
    tune_batches=(1,),
    tune_seconds=6.0,
    tune_sittings=None,
)
QUICK = replace(
    FULL,
    name="quick",
    rows=(1, 4, 16, 64, 256),
    prompts=(512, 4096),
    batches=(1, 4, 32),
    new_tokens=64,
    repeats=5,
    problems=20_000,
    code_bytes=10_000_000,
    answers=384,
    real_prompts=1000,
    bench_prompts=6,
    bench_tokens=96,
    bench_repeats=1,
    exact_prompts=3,
    tune_prompts=4,
)
TOY = Sizes(
    name="toy",
    shapes={
        "7b": SHAPE_TOY,
        "1b": SHAPE_TOY | {"num_hidden_layers": 2, "tie_word_embeddings": True},
        "135m": SHAPE_TOY | {"num_hidden_layers": 2},
    },
    copy_bytes=1 << 24,
    matrix=128,
    repeats=3,
    context=32,
    contexts=(32, 64),
    rows=(1, 4, 16),
    prompts=(32, 64),
    batches=(1, 2),
    new_tokens=8,
    workers=1,
    vocabulary=512,
    problems=400,
    code_bytes=60_000,
    tokenizer_bytes=60_000,
    trained=TRAINED_TOY,
    window=64,
    train_batch=16,
    train_steps=60,
    answers=12,
    answer_tokens=24,
    question_tokens=64,
    at_once=8,
    real_prompts=3,
    real_answer_tokens=16,
    real_question_tokens=160,
    anchors=8,
    conversations=4,
    held_out=4,
    ridge_answers=8,
    bench_prompts=2,
    bench_tokens=16,
    bench_repeats=1,
    exact_prompts=2,
    exact_tokens=16,
    tune_prompts=4,
    tuned=1,
    tune_rows=6,
    tune_batches=(1,),
    tune_seconds=1.0,
    tune_sittings=1,
)
