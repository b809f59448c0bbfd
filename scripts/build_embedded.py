"""Build what the package embeds: the two arithmetic teachers, their data set and their predictors.

Every stage is a subcommand with its own arguments, and is deterministic given its seed and its number of steps.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arithmetic_corpus import Problem, generate
from firp_cli.recipe import load_recipe
from firp_cli.teacher.looped_llama import LoopedLlamaConfig, LoopedLlamaForCausalLM, register

ROOT = Path(__file__).resolve().parents[1]
TEACHER_FOLDER = ROOT / "data" / "teachers" / "arithmetic"
LOOPED_FOLDER = ROOT / "data" / "teachers" / "arithmetic-looped"
DATASET_FOLDER = ROOT / "data" / "datasets" / "arithmetic"
PREDICTOR_FOLDER = ROOT / "data" / "predictors"
# Shipped predictors by recipe: their folder, and the tree that is written beside them (SPEED has none).
PREDICTORS: dict[str, dict[str, tuple[str, str | None]]] = {
    "arithmetic": {
        "arithmetic-firp-plus": ("firp_plus", "dynamic:8"),
        "arithmetic-firp": ("firp", "chain"),
        "arithmetic-hidden-transfer": ("hidden_transfer", "dynamic:8"),
        "arithmetic-medusa": ("medusa", "dynamic:8"),
        "arithmetic-speed": ("speed", None),
    },
    "smollm2": {
        "smollm2-firp-plus": ("smollm2-firp-plus", "dynamic:5/3@3"),
        **{name: (name, "dynamic:4/2") for name in ("smollm2-firp", "smollm2-hidden-transfer", "smollm2-medusa")},
    },
}

# Data sets of these recipes that the teacher writes itself: options of `firp prompts` by file.
OWN_PROMPTS = {
    "own.jsonl": ["--count", "500"],
    "code.jsonl": [
        *("--count", "350", "--system"),
        "You are an expert Python programmer. The user asks you to complete or write Python functions.",
    ],
}

PREDICTOR_FILE = "predictor.safetensors"

VOCABULARY_SIZE = 1024
TOKENIZER_PROBLEMS = 20_000
PAD, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHUNK_PROBLEMS = 4096
QUESTION_WEIGHT = 0.1
ANSWER_PATTERN = re.compile(r"#### (-?\d+)")


def split_stream(seed: int, held_out: bool) -> Iterator[Problem]:
    """Yield the problems of one split, without repeats of a question."""
    seen: set[str] = set()
    for problem in generate(seed):
        if problem.held_out == held_out and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Return the texts that the embedded tokenizer is trained on."""
    for problem in islice(split_stream(seed, held_out=False), TOKENIZER_PROBLEMS):
        yield f"{problem.question}\n{problem.answer}\n"


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit is a token of its own and any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=PAD,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def architecture(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Config fields that both teachers share: width 256, grouped queries, tied embeddings."""
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }


def build_teacher(tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Return an untrained teacher: 6 layers (3.8 M parameters), or `--unique-layers` layers looped `--loops` times."""
    if arguments.loops is None:
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **architecture(tokenizer)))
    config = LoopedLlamaConfig(unique_layers=arguments.unique_layers, loops=arguments.loops, **architecture(tokenizer))
    return LoopedLlamaForCausalLM(config)


def warm_start(model: LlamaForCausalLM, source: LlamaForCausalLM) -> None:
    """Start a looped model from a trained one without loops: its embedding and norm, and layers spread over its
    depth."""
    model.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(source.model.norm.state_dict())
    unique = model.model.layers.unique
    for number, layer in enumerate(unique):
        depth = round(number * (len(source.model.layers) - 1) / max(1, len(unique) - 1))
        layer.load_state_dict(source.model.layers[depth].state_dict())


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return the text that asks `question` and opens the assistant's turn."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def training_batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, tokens_per_batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless batches of (ids, loss weights), each [batch, length], right-padded.

    A chunk of problems is sorted by length and cut into batches, so padding is small. Right padding under a causal mask
    needs no attention mask: no real token sees a pad.
    """
    rng = random.Random(seed)
    stream = (problem for problem in generate(seed) if not problem.held_out)
    while True:
        chunk = list(islice(stream, CHUNK_PROBLEMS))
        prompts = tokenizer([chat_prompt(tokenizer, problem.question) for problem in chunk])["input_ids"]
        answers = tokenizer([f"{problem.answer}{END}\n" for problem in chunk])["input_ids"]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        batches: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(batches[-1]) + 1) * (len(row[0]) + len(row[1])) > tokens_per_batch:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        for batch in batches:
            length = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids_BT = torch.full((len(batch), length), tokenizer.pad_token_id)
            weights_BT = torch.zeros(len(batch), length)
            for index, (prompt, answer) in enumerate(batch):
                end = len(prompt) + len(answer)
                ids_BT[index, :end] = torch.tensor(prompt + answer)
                weights_BT[index, : len(prompt)] = QUESTION_WEIGHT
                weights_BT[index, len(prompt) : end] = 1.0
            yield ids_BT, weights_BT


def weighted_loss(
    model: LlamaForCausalLM,
    ids_BT: torch.Tensor,
    weights_BT: torch.Tensor,
    guide: LlamaForCausalLM | None,
    exit_weight: float,
) -> torch.Tensor:
    """Next-token cross entropy, averaged with the weight of the predicted token.

    With a `guide` the target is half the text's token and half the guide's distribution. A looped model is also trained
    to predict after every earlier loop, through the same norm and head, with `exit_weight` each.
    """
    weights_N = weights_BT[:, 1:].flatten()
    chosen_N = weights_N > 0
    targets_NV = functional.one_hot(ids_BT[:, 1:].flatten()[chosen_N], model.config.vocab_size).float()
    if guide is not None:
        with torch.no_grad():
            guide_BTV = guide(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        targets_NV = 0.5 * targets_NV + 0.5 * guide_BTV.flatten(0, 1)[chosen_N].float().softmax(-1)
    loops = getattr(model.config, "loops", 1)
    output = model.model(input_ids=ids_BT, use_cache=False, output_hidden_states=loops > 1)
    states = [(output.last_hidden_state, 1.0)]
    for loop in range(1, loops if exit_weight else 1):
        states.append((model.model.norm(output.hidden_states[loop * model.config.unique_layers]), exit_weight))
    total = torch.zeros((), device=ids_BT.device)
    for state_BTd, share in states:
        logits_NV = model.lm_head(state_BTd[:, :-1].flatten(0, 1)[chosen_N]).float()
        losses_N = functional.cross_entropy(logits_NV, targets_NV, reduction="none")
        total = total + share * (losses_N * weights_N[chosen_N]).sum() / weights_N.sum()
    return total


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Return the rate of a linear warm-up, then of a cosine to zero at the last step."""
    warm_up = min(1.0, (step + 1) / arguments.warm_up)
    return arguments.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays the matrices but not the norms' scales."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    scales = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> int:
    """Train `model` in place and return the number of tokens seen, padding not counted."""
    optimizer = make_optimizer(model)
    batches = training_batches(tokenizer, arguments.seed, arguments.tokens_per_batch)
    # For rows this short, eager attention trains faster on a CPU than the fused kernel (3391 against 2122 tokens/s).
    model.set_attn_implementation("eager")
    guide = None
    if arguments.guide:
        guide = AutoModelForCausalLM.from_pretrained(arguments.guide).to(arguments.device).eval()
        warm_start(model, guide)
    start = saved = time.monotonic()
    tokens, running = 0, None
    model.train()
    for step, (ids_BT, weights_BT) in enumerate(islice(batches, arguments.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        with torch.autocast(arguments.device, torch.bfloat16):
            ids_BT, weights_BT = ids_BT.to(arguments.device), weights_BT.to(arguments.device)
            loss = weighted_loss(model, ids_BT, weights_BT, guide, arguments.exit_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((weights_BT > 0).sum())
        if step % 40 == 0:
            value = loss.item()
            running = value if running is None else 0.8 * running + 0.2 * value
            elapsed = time.monotonic() - start
            eta = elapsed / (step + 1) * (arguments.steps - step - 1) / 60
            print(
                f"step {step} loss {running:.4f} tokens {tokens} tokens/s {tokens / elapsed:.0f} ETA {eta:.1f} min",
                flush=True,
            )
        if arguments.checkpoint and time.monotonic() - saved > 60 * arguments.checkpoint_minutes:
            save_teacher(model, tokenizer, arguments.checkpoint)
            print(f"step {step}: saved an intermediate copy in {arguments.checkpoint}", flush=True)
            print_accuracy(evaluate(arguments.checkpoint, 50, arguments.device))
            saved = time.monotonic()
    return tokens


def save_teacher(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the teacher with half-precision storage.

    The config names float32, so `from_pretrained` without options computes in fp32 with exactly the stored values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    generation = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generation.save_pretrained(folder)
    weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def evaluate(folder: Path, count: int, device: str) -> list[tuple[Problem, str, bool]]:
    """Answer `count` held-out problems greedily; return each with its text and whether the result is right."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    problems = list(islice(split_stream(seed=1_000_003, held_out=True), count))
    results = []
    for first in range(0, count, 50):
        part = problems[first : first + 50]
        prompts = [chat_prompt(tokenizer, problem.question) for problem in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
        output = model.generate(**inputs, max_new_tokens=192)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for problem, text in zip(part, texts, strict=True):
            found = ANSWER_PATTERN.search(text)
            results.append((problem, text, found is not None and int(found.group(1)) == problem.result))
    return results


def print_accuracy(results: list[tuple[Problem, str, bool]]) -> dict[str, float]:
    """Print and return the accuracy overall and by number of operations."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for problem, _, right in results:
        groups[f"{problem.operations} operations"].append(right)
        groups["overall"].append(right)
    accuracy = {name: sum(marks) / len(marks) for name, marks in sorted(groups.items())}
    print("accuracy", {name: f"{value:.3f} of {len(groups[name])}" for name, value in accuracy.items()}, flush=True)
    return accuracy


def run_teacher(arguments: argparse.Namespace) -> None:
    """Train the teacher from scratch, write it and evaluate the written files."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(tokenizer_texts(arguments.seed), VOCABULARY_SIZE)
    model = build_teacher(tokenizer, arguments).to(arguments.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    start = time.monotonic()
    tokens = train(model, tokenizer, arguments)
    seconds = time.monotonic() - start
    save_teacher(model, tokenizer, arguments.output)
    results = evaluate(arguments.output, arguments.evaluate, arguments.device)
    for problem, text, right in results[:5]:
        print(f"--- {'right' if right else 'WRONG'}\n{problem.question}\n{text}")
    record = {
        "argv": sys.argv[1:],
        "parameters": parameters,
        "tokens_trained": tokens,
        "train_seconds": round(seconds),
        "accuracy": print_accuracy(results),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{sum(file.stat().st_size for file in arguments.output.iterdir())} bytes in {arguments.output}")


def run_dataset(arguments: argparse.Namespace) -> None:
    """Write train.jsonl and test.jsonl with the fields question and answer."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", arguments.train, False), ("test", arguments.test, True)):
        problems = islice(split_stream(arguments.seed, held_out), count)
        rows = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]
        (arguments.output / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{len(rows)} problems in {arguments.output / name}.jsonl")


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the stage `teacher`: a decoder without loops, trained on the text alone."""
    add_training_arguments(parser)
    parser.set_defaults(loops=None, guide=None, exit_weight=0.0)


def add_looped_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the stage `looped-teacher`."""
    add_training_arguments(parser)
    parser.set_defaults(output=LOOPED_FOLDER, steps=2600)
    parser.add_argument("--unique-layers", type=int, default=3, help="layers with parameters of their own")
    parser.add_argument("--loops", type=int, default=4, help="how many times these layers run")
    parser.add_argument(
        "--guide", type=Path, default=TEACHER_FOLDER, help="trained teacher: start values and training targets"
    )
    parser.add_argument("--exit-weight", type=float, default=0.2, help="loss weight of the state after each early loop")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both teachers' stages."""
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3900, help="optimizer steps (3,000 tokens a second on one core)")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="tokens in a batch, padding included")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--warm-up", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="torch device type: cpu or cuda")
    parser.add_argument("--output", type=Path, default=TEACHER_FOLDER, help="folder to write the teacher to")
    parser.add_argument("--checkpoint", type=Path, help="folder for intermediate copies (default: none)")
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0, help="minutes between intermediate copies")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out problems to answer at the end")


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the stage `dataset`."""
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--train", type=int, default=4000, help="training problems")
    parser.add_argument("--test", type=int, default=500, help="held-out problems")
    parser.add_argument("--output", type=Path, default=DATASET_FOLDER, help="folder to write the files to")


def add_predictors_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the stage `predictors`."""
    parser.add_argument("--teacher", choices=list(PREDICTORS), default="arithmetic", help="whose predictors")
    parser.add_argument("--tree", default=None, help="tree written beside each predictor, in place of the usual one")
    parser.add_argument("--output", type=Path, default=PREDICTOR_FOLDER, help="folder to write the predictors to")


def run_predictors(arguments: argparse.Namespace) -> None:
    """Collect and train with the shipped recipes, and keep the files that decoding needs. Finished parts are not
    redone.
    """
    firp = [sys.executable, "-m", "firp_cli"]
    collected = set()
    for name, (folder_name, tree) in PREDICTORS[arguments.teacher].items():
        recipe = load_recipe(name)
        for dataset in recipe.data.dataset.split(","):
            if dataset in OWN_PROMPTS and not Path(dataset).is_file():
                prompts = [*firp, "prompts", recipe.teacher.model, "--output", dataset, *OWN_PROMPTS[dataset]]
                subprocess.run(prompts, check=True)
        if recipe.store not in collected:
            subprocess.run([*firp, "collect", name, "--resume"], check=True)
            collected.add(recipe.store)
        run = Path(str(recipe.output))
        if not (run / "config.json").is_file():
            subprocess.run([*firp, "train", name], check=True)
        keep_predictor(run, arguments.output / folder_name, arguments.tree or tree)


def keep_predictor(run: Path, folder: Path, tree: str | None) -> None:
    """Copy the files of a run that decoding and provenance need. Weights are stored in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "recipe.yaml", "training.json"):
        shutil.copyfile(run / name, folder / name)
    weights = load_file(run / "predictor.safetensors")
    stored = {key: value.bfloat16() if value.is_floating_point() else value for key, value in weights.items()}
    save_file(stored, folder / PREDICTOR_FILE)
    (folder / PREDICTOR_FILE).chmod(0o644)
    if tree is not None:
        (folder / "tree.json").write_text(json.dumps({"tree": tree}) + "\n", encoding="utf-8")
    print(f"{folder.name}: {sum(file.stat().st_size for file in folder.iterdir())} bytes in {folder}")


# One entry per stage: its help text, its arguments, its function.
STAGES = {
    "teacher": (
        "train, write and evaluate the teacher (45 minutes on one busy CPU core)",
        add_teacher_arguments,
        run_teacher,
    ),
    "looped-teacher": (
        "train, write and evaluate the parameter-shared teacher (57 minutes on one busy CPU core)",
        add_looped_arguments,
        run_teacher,
    ),
    "predictors": (
        "collect, train and keep the embedded predictors (35 minutes on two CPU cores)",
        add_predictors_arguments,
        run_predictors,
    ),
    "dataset": ("write train.jsonl and test.jsonl (3 seconds)", add_dataset_arguments, run_dataset),
}


def main() -> None:
    """Run the stage named on the command line."""
    register()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)
    for name, (text, add_arguments, run) in STAGES.items():
        stage = subparsers.add_parser(name, help=text, description=text)
        add_arguments(stage)
        stage.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
