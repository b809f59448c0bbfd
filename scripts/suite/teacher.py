"""A teacher trained by the suite: a Llama of about 100 million parameters, for a limited time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from build_embedded import build_tokenizer
from torch import Tensor
from torch.nn import functional

from firp_cli.training.deepspeed_engine import ADAM_BETAS, learning_rate_factor
from suite.corpus import Corpus, gather, render, sample
from suite.shapes import empty_model
from suite.work import Shared, Table, Work

PEAK_RATE = 1.5e-3
DECAY = 0.1
WARMUP = 0.05
HELD_OUT = 0.01  # share of the tokens for the reported loss
HELD_OUT_BATCHES = 8
LEFT_OVER = 0.06  # share of the part's time after training
SCHEDULE = 10_000  # points of the learning rate's schedule
LOGGED = 20  # losses that are kept


def train_teacher(shared: Shared, work: Work) -> None:
    """Gather text, train tokenizer and teacher, measure the held-out loss; later parts read `state` (the weights in the
    suite's dtype), `config`, `tokenizer` and `corpus`.
    """
    sizes, clock = shared.sizes, work.clock
    questions = max(sizes.bench_prompts, sizes.exact_prompts, sizes.tune_prompts)
    corpus = gather(sizes.problems, sizes.code_bytes, 2 * questions, shared.data_dir)
    texts = [render(conversation) for conversation in corpus.mixed()]
    tokenizer = build_tokenizer(sample(texts, sizes.tokenizer_bytes), sizes.vocabulary)
    stream = encode_all(tokenizer, texts)
    work.values["corpus"] = {
        "conversations": {source: len(found) for source, found in corpus.conversations.items()},
        "tokens": len(stream),
        "vocabulary": len(tokenizer),
        "seconds": clock.spent(),
    }
    shape = sizes.trained | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    with torch.inference_mode(False):
        model = empty_model(shape, shared.device, torch.float32)
        work.values |= fit(model, stream, shared, work)
    work.values["parameters"] = sum(value.numel() for value in model.parameters())
    state = {name: value.detach().to(shared.dtype) for name, value in model.state_dict().items()}
    shared.found |= {"state": state, "shape": shape, "tokenizer": tokenizer, "corpus": corpus}
    work.key = (
        f"{work.values['parameters'] / 1e6:.1f} M parameters, {work.values['tokens'] / 1e6:.2f} M tokens, "
        f"held-out loss {work.values['held_out_loss']:.2f}"
    )
    work.tables.append(_table(work.values, corpus))
    del model
    shared.free()


def _table(values: dict[str, Any], corpus: Corpus) -> Table:
    headers = ["parameters", "text", "tokens seen", "tokens/s", "steps", "loss", "held-out loss"]
    sources = ", ".join(f"{len(found)} {source}" for source, found in corpus.conversations.items())
    cells = [
        f"{values['parameters'] / 1e6:.1f} M",
        f"{values['corpus']['tokens'] / 1e6:.2f} M tokens: {sources}",
        f"{values['tokens'] / 1e6:.2f} M",
        f"{values['tokens_per_second']:.0f}",
        str(values["steps"]),
        f"{values['losses'][-1]['loss']:.2f}",
        f"{values['held_out_loss']:.2f}",
    ]
    return Table("The teacher trained on the spot", headers, [cells])


def encode_all(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return all texts one after another (tokens,)."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for item in encoded for token in item.ids], dtype=torch.int32)


def windows(stream: Tensor, batch: int, length: int, device: torch.device) -> Iterator[Tensor]:
    """Yield endless batches (batch, length + 1) from random places of the stream, which is on the device."""
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.arange(length + 1, device=device)
    while True:
        places = torch.randint(0, len(stream) - length - 1, (batch, 1), device=device, generator=generator)
        yield stream[places + numbers].long()


def fit(model: Any, stream: Tensor, shared: Shared, work: Work) -> dict[str, Any]:
    """Train until the part's time is nearly over, in bf16 autocast on CUDA devices."""
    sizes, device, clock = shared.sizes, shared.device, work.clock
    cut = len(stream) - max(sizes.window + 2, int(HELD_OUT * len(stream)))
    stream = stream.to(device)
    optimizer = make_optimizer(model)
    batches = windows(stream[:cut], sizes.train_batch, sizes.window, device)
    model.train()
    began, seconds = time.perf_counter(), clock.left() * (1 - LEFT_OVER)
    losses: list[dict[str, float]] = []
    step = 0
    while step < sizes.train_steps and (spent := time.perf_counter() - began) < seconds:
        place = max(spent / seconds, step / sizes.train_steps)
        rate = learning_rate_factor(int(SCHEDULE * place), SCHEDULE, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        loss = next_token_loss(model, next(batches), device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if place * LOGGED >= len(losses):
            losses.append(
                {"step": step, "loss": loss.item()}
            )  # synchronises, so that the clock includes the device's work
            work.values["losses"] = losses
            work.save()
    losses.append({"step": step, "loss": loss.item()})
    spent, tokens = time.perf_counter() - began, step * sizes.train_batch * sizes.window
    model.eval()
    held_out = windows(stream[cut:], sizes.train_batch, sizes.window, device)
    with torch.no_grad():
        measured = [next_token_loss(model, next(held_out), device).item() for _ in range(HELD_OUT_BATCHES)]
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": spent,
        "tokens_per_second": tokens / spent,
        "losses": losses,
        "held_out_loss": math.fsum(measured) / len(measured),
    }


def make_optimizer(model: Any) -> torch.optim.AdamW:
    """Return AdamW that decays the matrices but not the norms' scales."""
    groups = [
        {"params": [value for value in model.parameters() if value.dim() > 1], "weight_decay": DECAY},
        {"params": [value for value in model.parameters() if value.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=ADAM_BETAS, fused=True)


def next_token_loss(model: Any, ids: Tensor, device: torch.device) -> Tensor:
    """Return the mean cross-entropy of (B, T + 1) tokens."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
