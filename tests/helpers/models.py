"""Tiny teachers of every tested family, looped ones, and fake predictors that are always, never or sometimes right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from firp_cli.config import KINDS, LoopedSection, PredictorSection, SpeedConfig, TeacherConfig
from firp_cli.predictors.base import Predictor, SequenceBatch, TreePredictor
from firp_cli.predictors.draft import Children, Draft
from firp_cli.predictors.folder import build_predictor, load_predictor, predictor_folder
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import load_teacher, wrap_model
from firp_cli.teacher.looped_llama import LoopedLlamaConfig, LoopedLlamaForCausalLM
from firp_cli.teacher.masks import causal_allowed
from firp_cli.teacher.teacher import Teacher

VOCABULARY, HIDDEN, LAYERS = 97, 48, 4
ROOT = Path(__file__).resolve().parents[2]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "mistral-window": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
DESCRIBED: dict[str, tuple[str, LoopedSection]] = {
    "ouro": ("own", LoopedSection(block=2, loops=3, norm_each_loop=True)),
    "raven": ("own", LoopedSection(prelude=1, block=2, coda=1, loops=3)),
    "raven-norms": ("own", LoopedSection(prelude=1, block=1, coda=1, loops=4, norm_each_loop=True)),
    "llama": ("llama", LoopedSection(prelude=1, block=2, coda=1, loops=3)),
    "llama-norms": ("llama", LoopedSection(block=4, loops=2, norm_each_loop=True)),
    "mistral-window": ("mistral-window", LoopedSection(block=4, loops=2)),
    "qwen2-window": ("qwen2-window", LoopedSection(prelude=1, block=2, coda=1, loops=3)),
    "qwen3": ("qwen3", LoopedSection(block=3, coda=1, loops=2)),
}
described = pytest.mark.parametrize("name", list(DESCRIBED))


def made_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Cache what `make` returns. Models are made outside of inference mode, so that any test may train on them."""

    @lru_cache
    @wraps(make)
    def made(*arguments: Any, **options: Any) -> Any:
        with torch.inference_mode(False):
            return make(*arguments, **options)

    return made


@made_once
def tiny_model(family: str) -> Any:
    """Return a random causal LM. Its weights are large, so that greedy text varies instead of repeating one token."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SETTINGS | options))
    torch.manual_seed(sum(map(ord, family)))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@made_once
def tiny_teacher(family: str = "llama", lean: bool = False) -> Teacher:
    """Return a teacher on the library's layers or on lean layers."""
    teacher = wrap_model(tiny_model(family), name=f"tiny-{family}")
    if lean:
        assert use_lean_layers(teacher) is None
    return teacher


@made_once
def looped_model(unique: int, loops: int, **options: Any) -> Any:
    """Return a random parameter-shared Llama of `unique` layers that run `loops` times."""
    config = LoopedLlamaConfig(**(SETTINGS | options), unique_layers=unique, loops=loops)
    torch.manual_seed(10 * unique + loops)
    return LoopedLlamaForCausalLM(config).eval()


@made_once
def looped_teacher(unique: int, loops: int, lean: bool = True) -> Teacher:
    teacher = wrap_model(looped_model(unique, loops), name=f"looped-{unique}x{loops}")
    if lean:
        assert use_lean_layers(teacher) is None
    return teacher


class OwnLoopsDecoder(nn.Module):
    """Decoder of prelude, block x loops and coda in one forward; with `norm_each_loop` a norm ends every loop."""

    def __init__(self, config: LlamaConfig, shape: LoopedSection) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, number) for number in range(shape.unique))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = input_ids.shape[1]
        positions = torch.arange(rows)[None]
        mask = torch.full((rows, rows), torch.finfo(torch.float32).min).triu(1)[None, None]
        state = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(state, positions)
        prelude, block = self.shape.prelude, self.shape.block
        loop_states = []
        for layer in self.layers[:prelude]:
            state = layer(state, attention_mask=mask, position_embeddings=rotary)
        for _ in range(self.shape.loops):
            for layer in self.layers[prelude : prelude + block]:
                state = layer(state, attention_mask=mask, position_embeddings=rotary)
            if self.shape.norm_each_loop:
                state = self.norm(state)
            loop_states.append(state)
        for layer in self.layers[prelude + block :]:
            state = layer(state, attention_mask=mask, position_embeddings=rotary)
        normed = self.shape.norm_each_loop and not self.shape.coda
        return state if normed else self.norm(state), tuple(loop_states)


class OwnLoops(PreTrainedModel):
    """Model whose code loops, like Ouro (a norm ends every loop) or Raven (prelude and coda).

    It returns one state per loop, as such models do, and has no cache.
    """

    config_class = LlamaConfig
    base_model_prefix = "model"

    def __init__(self, config: LlamaConfig, shape: LoopedSection) -> None:
        super().__init__(config)
        self.model = OwnLoopsDecoder(config, shape)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        state, loop_states = self.model(input_ids)
        return CausalLMOutputWithPast(logits=self.lm_head(state), hidden_states=loop_states)


def described_model(name: str) -> Any:
    """Return a new model of DESCRIBED: one whose code loops, or an ordinary checkpoint whose layers a recipe loops."""
    family, shape = DESCRIBED[name]
    if family != "own":
        return copy.deepcopy(tiny_model(family))
    torch.manual_seed(sum(map(ord, name)))
    model = OwnLoops(LlamaConfig(**(SETTINGS | {"num_hidden_layers": shape.unique})), shape).eval()
    with torch.no_grad():  # a norm too many or too few then changes the output
        model.model.norm.weight.uniform_(0.5, 2.0)
    return model


@made_once
def described_teacher(name: str, lean: bool = True) -> Teacher:
    """Return a teacher whose loops a recipe describes; `raven-norms` keeps library layers: norms magnify rounding."""
    teacher = wrap_model(described_model(name), name=f"described-{name}", looped=DESCRIBED[name][1])
    if lean:
        assert use_lean_layers(teacher) is None or name == "raven-norms"
    return teacher


def pipe_teacher(name: str, lean: bool = True) -> tuple[Teacher, int | None]:
    """Return a teacher and its `predictor.loops`: "2x3" is a looped one, "llama/3" an unshared one in three groups."""
    if name in DESCRIBED:
        return described_teacher(name, lean), None
    if "/" in name:
        return tiny_teacher(name.split("/")[0], lean), int(name.split("/")[1])
    return looped_teacher(*map(int, name.split("x")), lean), None


@made_once
def embedded_teacher() -> Teacher:
    """Return the embedded teacher on lean layers. Its embedded predictors draft well, unlike random ones."""
    teacher = load_teacher(TeacherConfig(model="arithmetic"), "cpu")
    assert use_lean_layers(teacher) is None
    return teacher


@made_once
def embedded_predictor(kind: str) -> Predictor:
    return load_predictor(predictor_folder(kind), embedded_teacher()).eval()


@lru_cache
def embedded_prompts(count: int) -> list[list[int]]:
    """Return the first held-out questions, rendered by the chat template."""
    lines = (ROOT / "data/datasets/arithmetic/test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    chats = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    tokenizer = embedded_teacher().tokenizer
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def make_predictor(teacher: Teacher, seed: int = 0, **section: Any) -> Predictor:
    """Return a predictor with random weights near the identity."""
    config = KINDS[section["kind"]].model_validate(section)
    predictor = build_predictor(config, teacher)
    torch.manual_seed(seed)
    predictor.initialise("identity", teacher)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return predictor.eval().requires_grad_(False)


def generate_reference(model: Any, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    """Return the tokens of transformers' greedy `generate` after one prompt, EOS included."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0} | options
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def random_prompts(count: int, seed: int = 0, low: int = 1, high: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def sequence_batch(
    teacher: Teacher, sequences: list[list[int]], responses: list[int], layers: list[int]
) -> SequenceBatch:
    """Return teacher-forced states of whole sequences; the response of sequence b starts at `responses[b]`."""
    length = max(map(len, sequences))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in sequences])
    lengths = torch.tensor([len(row) for row in sequences])
    positions = torch.arange(length).expand(len(sequences), length)
    states: dict[int, Tensor] = {}
    mask = teacher.sequence_mask(causal_allowed(lengths, length), positions)
    last = teacher.run(
        teacher.embed(ids), positions, mask, on_layer=lambda layer, hidden: states.update({layer: hidden})
    )
    place = torch.arange(length)[None]
    loss_mask = (place >= torch.tensor(responses)[:, None]) & (place < lengths[:, None])
    return SequenceBatch(ids, lengths, loss_mask, teacher.norm(last), {layer: states[layer] for layer in layers})


class FakePredictor(TreePredictor):
    """Predictor that knows the continuations: it finds the position of a state in them and drafts the next tokens.

    The draft of a step is the true token if `right(position, step)`, else token+1. Other candidates fill the breadth
    with lower probability.
    """

    def __init__(
        self, teacher: Teacher, sequences: list[list[int]], steps: int, right: Callable[[int, int], bool]
    ) -> None:
        super().__init__(PredictorSection(), steps)
        self.right = right
        batch = sequence_batch(teacher, sequences, [1] * len(sequences), [])
        rows = [(batch.final[b, n], b, n) for b in range(len(sequences)) for n in range(len(sequences[b]))]
        self.states = torch.stack([row[0] for row in rows])
        self.places = [(b, n) for _, b, n in rows]
        self.sequences = sequences

    @property
    def parent_dependent(self) -> bool:
        return False

    def _truncate(self, steps: int) -> None:
        pass

    def draft_states(self, *_: Any, **__: Any) -> Tensor:
        raise NotImplementedError

    def draft_hidden(self, teacher: Teacher, node_final: Tensor, pseudo: Tensor | None) -> Tensor:
        return node_final[:, None].expand(-1, self.steps, -1)

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        distance = torch.cdist(states.float(), self.states.to(states.device).float())
        logits = torch.zeros(states.shape[0], teacher.vocab_size, device=states.device)
        for row, place in enumerate(distance.argmin(1).tolist()):
            b, n = self.places[place]
            sequence = self.sequences[b]
            token = sequence[n + step + 1] if n + step + 1 < len(sequence) else 5
            if not self.right(n, step):
                token = (token + 1) % teacher.vocab_size
                logits[row, sequence[min(n + step + 1, len(sequence) - 1)]] = -9.0
            logits[row, token] = 6.0
        return logits

    def initialise(self, init: str, teacher: Teacher) -> None:
        pass


class ParentPredictor(FakePredictor):
    """Predictor whose candidates depend on the parent's token: the true successor only follows the true parent."""

    @property
    def parent_dependent(self) -> bool:
        return True

    def child_candidates(
        self, draft: Draft, depth: int, parents: Tensor, breadth: int, states: Tensor | None = None
    ) -> Children:
        tokens, log_probs, _ = super().child_candidates(draft, depth, parents, breadth)
        shift = (parents % 2)[:, :, None]
        return Children((tokens + shift) % VOCABULARY, log_probs - 0.1 * shift)


class FakeExits(SpeedPredictor):
    """Early exits that know the continuations: an exit finds the position of its state in them and ranks first the true
    next token if `right(position, loop)`, else the token after it in the vocabulary.
    """

    def __init__(
        self, teacher: Teacher, sequences: list[list[int]], right: Callable[[int, int], bool], **section: Any
    ) -> None:
        super().__init__(SpeedConfig(kind="speed", **section), teacher)
        self.initialise("identity", teacher)
        self.eval().requires_grad_(False)
        batch = sequence_batch(teacher, sequences, [1] * len(sequences), list(self.required_layers))
        rows = [(b, n) for b, sequence in enumerate(sequences) for n in range(len(sequence) - 1)]
        self.known = [torch.stack([batch.hidden[layer][row] for row in rows]) for layer in self.required_layers]
        self.answers = torch.zeros(len(self.exits), len(rows), teacher.vocab_size)
        for place, loop in enumerate(self.exits):
            for row, (b, n) in enumerate(rows):
                token = sequences[b][n + 1] + (not right(n, loop))
                self.answers[place, row, token % teacher.vocab_size] = 6.0

    def pipeline_logits(
        self, teacher: Teacher, exits: Mapping[int, Tensor], final: Tensor | None, normed: bool = False
    ) -> Tensor:
        logits = super().pipeline_logits(teacher, exits, final, normed)
        for row, (place, states) in enumerate(exits.items()):
            nearest = torch.cdist(states.float(), self.known[place].float()).argmin(1)
            logits[row] = self.answers[place][nearest]
        return logits
