"""Smoke test before any measurement: kernels that agree with torch, steps that are captured and replay to the same
tokens, no step that waits for the host, and a failed capture without damage.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.decoding.cuda_graphs import CaptureError, CudaCapture
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors.base import Predictor
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.lean_layers import LeanStack, runs_own_products
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from suite.shapes import NO_TOKENS, empty_model, random_predictor
from suite.sizes import Shape
from suite.work import Failed, Shared, Table, Work

SHAPE: Shape = {  # small, with head size and grouped heads of real models
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "ar": {},
    "firp": {"kind": "firp", "layer": 2, "steps": 3},
    "firp_plus": {"kind": "firp_plus", "layer": 2, "steps": 3, "coupling": {"form": "recurrent"}},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3]},
    "medusa": {"kind": "medusa", "steps": 3},
}
TREES = ("dynamic:8", "dynamic:8@3")
TOKENS, PROMPT = 32, 40
KERNEL_SHAPES = ((1, 128, 1, 700), (16, 64, 3, 300), (80, 128, 4, 1500))  # rows, head size, group, prefix
LEAST_SAME = 0.3  # a near tie early in a text changes all tokens after it
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def smoke(shared: Shared, work: Work) -> None:
    """Run all checks. Raises Failed naming those that fail."""
    checks = {
        "kernel": kernel,
        "graphs": graphs,
        "sampling": sampling,
        "products": products,
        "waiting": waiting,
        "capture": capture,
    }
    table = Table("Smoke", ["check", "seconds", ""])
    work.tables.append(table)
    wrong = []
    for name, check in checks.items():
        began = work.clock.spent()
        try:
            said = check(shared)
        except Exception as error:  # the other checks run too: one run lists all faults
            said = f"{type(error).__name__}: {error}"
            work.values[f"{name} traceback"] = traceback.format_exc().splitlines()[-12:]
        wrong += [f"{name}: {said}"] if said else []
        work.values[name] = said or "holds"
        table.cells.append([name, f"{work.clock.spent() - began:.1f}", said or "holds"])
        work.key = ", ".join(f"{cells[0]} {cells[2]}" for cells in table.cells)
        work.save()
    if wrong:
        raise Failed("; ".join(wrong))


def kernel(shared: Shared) -> str:
    """Compare the attention kernel with torch's, in fp32 and bf16; return the difference, or nothing."""
    if shared.device.type != "cuda":
        return ""
    from firp_cli.teacher.triton_attention import row_bits, tree_attention

    for dtype, allowed in TOLERANCE.items():
        for rows, size, group, prefix in KERNEL_SHAPES:
            torch.manual_seed(rows)
            slots = rows + prefix + 9
            queries = torch.randn(2, 2 * group, rows, size, device=shared.device, dtype=dtype)
            keys, values = (torch.randn(2, 2, slots, size, device=shared.device, dtype=dtype) for _ in range(2))
            seen = torch.ones(rows, rows, dtype=torch.bool, device=shared.device).tril().expand(2, rows, rows)
            lengths = torch.tensor([prefix, prefix // 3], device=shared.device)
            got = tree_attention(
                queries, keys, values, lengths, row_bits(seen), scratch=rows, scaling=size**-0.5, longest=prefix
            )
            difference = (got.double() - _dense(queries, keys, values, seen, lengths)).abs().max().item()
            if not difference <= allowed:
                return f"{rows} rows, head size {size}, {dtype}: off by {difference:.2g}"
    return ""


def _dense(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
    """Return the same attention in float64 under a dense mask."""
    rows, group = seen.shape[1], queries.shape[1] // keys.shape[1]
    places = torch.arange(keys.shape[2] - rows, device=keys.device)
    committed = (places < lengths[:, None])[:, None].expand(-1, rows, -1)
    mask = torch.cat([seen, committed], dim=2)[:, None]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (keys, values))
    return functional.scaled_dot_product_attention(queries.double(), keys, values, mask)


def _teacher(shared: Shared, dtype: torch.dtype = torch.float32) -> Teacher:
    with torch.inference_mode(False):
        teacher = wrap_model(empty_model(SHAPE | NO_TOKENS, shared.device, dtype), name="smoke")
    reason = use_lean_layers(teacher)
    if reason:
        raise Failed(reason)
    return teacher


def _predictor(teacher: Teacher, section: dict[str, Any]) -> Predictor | None:
    return random_predictor(teacher, section) if section else None


def _prompts(teacher: Teacher, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, teacher.vocab_size, (count, PROMPT), generator=generator).tolist()


def graphs(shared: Shared) -> str:
    """Compare answers of every kind in fp32, through graphs, with eager ones and those of `generate`; return the first
    that differs.
    """
    teacher = _teacher(shared)
    prompts = _prompts(teacher, 3)
    expected = [_generate(teacher, prompt) for prompt in prompts]
    for kind, section in SECTIONS.items():
        predictor = _predictor(teacher, section)
        for tree in TREES if predictor else TREES[:1]:
            spec = parse_tree(tree, predictor.steps) if predictor else None
            for batch in (1, 3):
                for captured in (False, True):
                    engine = Engine(teacher, predictor, spec, options=EngineOptions(graphs=captured))
                    for turn in range(2 if captured else 1):
                        got = [item.token_ids for item in engine.generate(prompts[:batch], TOKENS)]
                        if got != expected[:batch]:
                            return f"{kind} {tree} batch {batch} graphs {captured} turn {turn}: other tokens"
    return ""


def _generate(teacher: Teacher, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=teacher.device)
    written = teacher.model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return written[0, len(prompt) :].tolist()


def sampling(shared: Shared) -> str:
    """Check sampled answers: replays draw new numbers; on a CPU, without graphs, a seed repeats them."""
    teacher = _teacher(shared)
    predictor = _predictor(teacher, SECTIONS["firp"])
    texts = []
    for captured in (False, True):
        options = EngineOptions(graphs=captured)
        engine = Engine(teacher, predictor, temperature=1.0, top_p=0.9, seed=7, options=options)
        texts.append([tuple(engine.generate(_prompts(teacher, 1), TOKENS)[0].token_ids) for _ in range(3)])
    if len(set(texts[1])) < 3:
        return "replays draw the same numbers again"
    return "" if texts[0] == texts[1] or shared.device.type == "cuda" else "other tokens through graphs"


def products(shared: Shared) -> str:
    """Compare answers in the suite's dtype with torch's products and with the kernel of few rows, each through graphs
    against its own eager ones; report the share of equal `ar` tokens, which rounding alone keeps from 1.
    """
    teacher = _teacher(shared, shared.dtype)
    stack = teacher.stack
    if not isinstance(stack, LeanStack) or not runs_own_products(teacher.model.get_output_embeddings().weight):
        return ""
    prompts, plain = _prompts(teacher, 3), []
    for own in (False, True):
        stack.own_products = own
        for kind, section in SECTIONS.items():
            predictor = _predictor(teacher, section)
            spec = parse_tree(TREES[1], predictor.steps) if predictor else None
            texts = []
            for captured in (False, True):
                engine = Engine(teacher, predictor, spec, options=EngineOptions(graphs=captured))
                texts.append([item.token_ids for item in engine.generate(prompts, TOKENS)])
            if texts[0] != texts[1]:
                return f"{kind}, own products {own}: other tokens through graphs"
            if kind == "ar":
                plain.append([token for text in texts[0] for token in text])
    same = sum(one == other for one, other in zip(*plain, strict=True)) / len(plain[0])
    return "" if same > LEAST_SAME else f"{100 * same:.0f}% of the tokens are the same with either product"


def waiting(shared: Shared) -> str:
    """Check that no step of any kind waits for the device, in the suite's dtype."""
    if shared.device.type != "cuda":
        return ""
    teacher = _teacher(shared, shared.dtype)
    original, said = DecodeStep.step, ""

    def watched(*arguments: Any, **options: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    stack = teacher.stack
    own = isinstance(stack, LeanStack) and runs_own_products(teacher.model.get_output_embeddings().weight)
    for kind, section in SECTIONS.items():
        predictor = _predictor(teacher, section)
        for temperature in (0.0, 1.0):
            if own:  # both kinds of products in turn
                stack.own_products = temperature == 0
            spec = parse_tree(TREES[1], predictor.steps) if predictor else None
            engine = Engine(teacher, predictor, spec, temperature, options=EngineOptions(graphs=False))
            engine.generate(_prompts(teacher, 2), 4)  # creates constants
            DecodeStep.step = watched  # type: ignore[method-assign]
            try:
                engine.generate(_prompts(teacher, 2), TOKENS)
            except RuntimeError as error:
                said = f"{kind} at temperature {temperature:g}: {str(error).splitlines()[0]}"
            finally:
                DecodeStep.step = original  # type: ignore[method-assign]
    return said


def capture(shared: Shared) -> str:
    """Check the state after a failed capture."""
    if shared.device.type != "cuda":
        return ""
    values = torch.zeros(4, device=shared.device)

    def add() -> None:
        values.add_(1)

    def waits() -> None:
        values.add_(1)
        values.sum().item()

    capturing, stream = CudaCapture(shared.device), torch.cuda.current_stream()
    try:
        capturing(waits)
        return "a step that waits for the host is captured without an error"
    except CaptureError:
        pass
    if torch.cuda.current_stream() != stream:
        return "the stream is not restored"
    torch.empty(1 << 20, device=shared.device).normal_()
    torch.cuda.empty_cache()
    before = values.clone()
    capturing(add)()
    torch.cuda.synchronize()
    return "" if torch.equal(values, before + 1) else "a replay after it has no effect"
