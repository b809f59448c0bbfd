"""The frozen teacher as a stack: embed, layers i..j, final norm, head, each callable alone.

Works on the library's own decoder layers, or on their lean twins. At load the stack's logits are compared layer by
layer with the model's own forward, so an architecture that does more between its layers than this file knows is refused
instead of being wrong; the lean layers are taken when their logits equal the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firp_cli.config import LoopedSection
from firp_cli.errors import TeacherError
from firp_cli.teacher.check import attends_plainly
from firp_cli.teacher.lean_layers import LeanStack, UnsupportedLayersError
from firp_cli.teacher.library_layers import Cache, LibraryStack, Stack
from firp_cli.teacher.looped import LoopedLayers, loop_layers
from firp_cli.teacher.masks import AttentionMask, LayerMask, Mask, causal_allowed
from firp_cli.teacher.model_parts import eos_token_ids, original_positions, part, windows
from firp_cli.teacher.training_masks import AnchoredMask, CausalMask, DenseAnchoredMask
from firp_cli.teacher.weight_files import LoadedWeights, weights_fingerprint

LayerHook = Callable[[int, Tensor], None]
CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# Of the logits' size. Other dtypes round each operation, and on CUDA devices joined matrices take other products, whose
# sums run in another order: CHECK_TOLERANCE.
FUSED_TOLERANCE = {("cpu", torch.float32): 1e-5}
CHECK_TOKENS = 24
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # position embeddings that depend on the position alone
BOUNDED_ROPE = ("dynamic", "longrope")  # the same, as long as a sequence stays within the (original) context


class MissingLayer(nn.Identity):
    """Stands for a layer that this process does not hold. Raises TeacherError when it is run."""

    passing = False  # while the model's own forward is compared, states go through

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        if not MissingLayer.passing:
            raise TeacherError("this process does not hold all of the teacher's layers; load the whole teacher")
        return input


class Teacher:
    """A frozen causal LM whose layers run one by one. Layers that run several times count each time.

    Args:
        looped: which layers run several times, where the model's own class does not say.

    Attributes: `num_layers` L, `hidden_size` d, `vocab_size` V, `kv_heads`, `head_size`, `max_positions`,
    `eos_token_ids`, `device`, `dtype`, `windows` (per layer: sliding window in positions, or None), `looped` (None:
    every layer runs once), `stack` (the layers that run: the library's, or their lean twins after `use_lean_layers`), `first` (the
    lowest layer that this process can run on from), `loaded_weights` (what of the weights it holds).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        name: str = "in-memory",
        check: bool = True,
        looped: LoopedSection | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        config = model.config.get_text_config()
        base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.layers: nn.ModuleList = part(base, ("layers", "h"), name)
        self._embed: nn.Module = model.get_input_embeddings()
        self._norm: nn.Module = part(base, ("norm", "final_layernorm", "final_layer_norm", "ln_f"), name)
        if looped is not None and not (isinstance(self.layers, LoopedLayers) and self.layers.shape == looped):
            self.layers = loop_layers(model, base, self.layers, self._norm, looped)
        self.looped = self.layers.shape if isinstance(self.layers, LoopedLayers) else None
        self._rotary: nn.Module = part(base, ("rotary_emb",), name)
        self._head: nn.Module = model.get_output_embeddings()
        self._library: Stack = LibraryStack(name, self.layers, self._norm, self._rotary, self._head, config)
        self.stack: Stack = self._library
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.num_layers = len(self.layers)
        self.hidden_size: int = config.hidden_size
        heads = int(getattr(config, "num_attention_heads", 1))
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.query_size = heads * self.head_size
        self.vocab_size: int = self._head.weight.shape[0]
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 30)
        if getattr(self._rotary, "rope_type", None) == "longrope":  # other factors for all positions beyond
            self.max_positions = min(self.max_positions, original_positions(config, self.max_positions))
        self.windows = windows(config, self.num_layers, self.looped)
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self._fingerprint: str | None = None
        self._plain_attention: bool | None = None
        self.first = 0
        self.peers: Callable[[bool], bool] | None = None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.loaded_weights = LoadedWeights("whole", self.num_layers, self.num_layers, self.weight_bytes)
        if self.device.type == "cuda":
            # torch prefers cuDNN's attention on recent devices, which builds a plan for every new length: tens of
            # milliseconds, again and again, where lengths grow by a token a step
            torch.backends.cuda.enable_cudnn_sdp(False)
        if check:
            self.check()

    @property
    def device(self) -> torch.device:
        """Where callers put their rows; layers elsewhere fetch them and send them back."""
        placed = getattr(getattr(self._embed, "_hf_hook", None), "execution_device", None)
        return self._weights.weight.device if placed is None else torch.device(placed)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.weight.dtype  # type: ignore[return-value]

    @property
    def _weights(self) -> nn.Module:
        return self._head if isinstance(self._embed, MissingLayer) else self._embed

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, R) token ids to h^0 (B, R, d)."""
        return self._embed(input_ids)

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        """Position embeddings of rows at `positions` (B, R), shared by all layers: (B, R, ..., D) each."""
        return self.stack.rotary(hidden, positions)

    def rotary_table(self, count: int) -> list[Tensor] | None:
        """Position embeddings of positions 0..count-1, (count, ..., D) each, for callers that look them up; None where
        they depend on more than the position.

        Where they change once a sequence passes the context, the table ends there: drafts may look past it, answers do
        not.
        """
        kind = getattr(self._rotary, "rope_type", None)
        if kind in BOUNDED_ROPE:
            count = min(count, self.max_positions)
        elif kind not in STATIC_ROPE:
            return None
        like = torch.empty(1, 1, self.hidden_size, device=self.device, dtype=self.dtype)
        return [part[0].contiguous() for part in self.rotary(like, torch.arange(count, device=self.device)[None])]

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        """h^index (B, R, d) to h^(index+1). `mask` is additive (B, 1, R, S), or attends by itself; None is right only
        for one row that sees every slot.
        """
        return self.stack.layer(index, hidden, rotary, positions, mask, cache)

    def layers_between(
        self,
        start: int,
        stop: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: Mask | None,
        cache: Cache | None,
    ) -> Tensor:
        """h^start (B, R, d) to h^stop, for the first R rows of a mask."""
        rows = hidden.shape[1]
        masks = {window: None if mask is None else mask.at(window, rows) for window in set(self.windows[start:stop])}
        together = getattr(self.stack, "run_packed", None)
        if together is not None and len(masks) == 1:
            output = together(start, stop, hidden, rotary, *masks.values(), cache)
            if output is not None:
                return output
        for number in range(start, stop):
            hidden = self.layer(number, hidden, rotary, positions, masks[self.windows[number]], cache)
        return hidden

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        mask: AttentionMask | CausalMask,
        start: int = 0,
        stop: int | None = None,
        cache: Cache | None = None,
        on_layer: LayerHook | None = None,
    ) -> Tensor:
        """h^start (B, R, d) through layers start..stop-1. `on_layer(l, h^l)` is called for each l in start..stop."""
        rotary = self.rotary(hidden, positions)
        if on_layer:
            on_layer(start, hidden)
        for index in range(start, self.num_layers if stop is None else stop):
            hidden = self.layer(index, hidden, rotary, positions, mask.additive(self.windows[index]), cache)
            if on_layer:
                on_layer(index + 1, hidden)
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        """Final norm: h^L to the state that the head reads (`hidden.final` in a store)."""
        return self.stack.norm(hidden)

    def head(self, normed: Tensor) -> Tensor:
        """Normed states (..., d) to float32 logits (..., V)."""
        logits = self.stack.head(normed).float()
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def unnorm(self, normed: Tensor) -> Tensor:
        """A state y (..., d) with norm(y) = `normed`, the one of unit scale: the norm forgets an input's length.

        Raises TeacherError where the final norm is not an RMS or layer norm with a plain weight.
        """
        weight, bias = getattr(self._norm, "weight", None), getattr(self._norm, "bias", None)
        if not isinstance(weight, Tensor) or weight.is_meta:
            raise TeacherError(f"{self.name}: its final norm has no weight to undo: set training.init=identity")
        state = (normed if bias is None else normed - bias) / torch.where(weight.abs() < 1e-6, 1e-6, weight)
        difference = (self.norm(state[..., :1, :]) - normed[..., :1, :]).abs().max().item()
        if not difference <= CHECK_TOLERANCE.get(self.dtype, 2e-1) * max(1.0, normed.abs().max().item()):
            raise TeacherError(f"{self.name}: its final norm cannot be undone: set training.init=identity")
        return state

    def release(self, kept: range) -> None:
        """Drop all layers but these: another process runs them. Shared layers stay, since every loop needs them."""
        self._fingerprint = self.fingerprint  # the whole teacher's, while it is whole
        if self.looped is None:
            for index in range(self.num_layers):
                if index not in kept:
                    self.layers[index] = MissingLayer()
            self.first = kept.start

    def wrap_library(self, wrap: Callable[[Any], Stack]) -> None:
        """Run the library's layers through what `wrap` makes of their stack, from now on."""
        self._library = self.stack = wrap(self._library)

    def together(self, work: bool) -> bool:
        """Whether a forward is to be run: where several processes hold the teacher together each asks before each of
        its forwards; those without work (False) run along with one of a single token until nobody has any left.
        """
        return work if self.peers is None else self.peers(work)

    def head_weight(self) -> Tensor:
        """The head's matrix (V, d). A collective where several processes hold the teacher together."""
        gathered = getattr(self.stack, "head_weight", None)
        weight: Any = self._head.weight if gathered is None else gathered()
        if weight.is_meta:
            raise TeacherError(f"{self.name}: teacher.device_map leaves its head on the disk; give it a device")
        return weight

    def need_whole(self, work: str) -> None:
        """Raise TeacherError where this process does not hold the whole teacher on one device, as `work` needs it."""
        if self.loaded_weights.kind != "whole":
            raise TeacherError(
                f"{work} needs all of {self.name} on one device: leave teacher.device_map and teacher.sharding out"
            )

    def drop_embedding(self) -> None:
        """Hold no embedding: whoever has states of a layer needs none."""
        self._embed = MissingLayer()

    def keep_fingerprint(self, fingerprint: str) -> None:
        """Take the whole teacher's fingerprint, where this process does not hold all values that it looks at."""
        self._fingerprint = fingerprint

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters, without those that have no memory behind them."""
        held = [parameter for parameter in self.model.parameters() if not parameter.is_meta]
        return sum(parameter.numel() * parameter.element_size() for parameter in held)

    def boundaries(self, loops: int | None = None) -> tuple[int, ...]:
        """Layers that have run at the end of each loop, the last being all but the coda.

        A teacher without sharing has its layers cut into `loops` groups, the longer ones first. Raises TeacherError.
        """
        if self.looped is not None:
            if loops not in (None, self.looped.loops):
                raise TeacherError(
                    f"{self.name} runs its layers {self.looped.loops} times, predictor.loops says {loops}: leave it out"
                )
            return self.looped.boundaries
        if loops is None or not 1 <= loops <= self.num_layers:
            raise TeacherError(
                f"{self.name} runs each of its {self.num_layers} layers once: set predictor.loops to the groups that "
                f"they form (1 to {self.num_layers}), or describe its loops in teacher.looped"
            )
        length, longer = divmod(self.num_layers, loops)
        return tuple(length * group + min(group, longer) for group in range(1, loops + 1))

    def sequence_mask(self, allowed: Tensor, positions: Tensor) -> AttentionMask:
        """Mask of a forward without cached prefix: `allowed` (B, M, M), `positions` (B, M)."""
        return AttentionMask(allowed, self.dtype, positions, positions)

    def causal_mask(self, rows: int) -> AttentionMask | CausalMask:
        """Mask of right-padded sequences of up to `rows` tokens, from position 0 on."""
        if self.plain_attention:
            return CausalMask()
        positions = torch.arange(rows, device=self.device)[None]
        return self.sequence_mask(causal_allowed(positions.new_full((1,), rows), rows), positions)

    def anchored_mask(self, lengths: Tensor, positions: Tensor, anchors: Tensor, steps: int) -> AnchoredMask:
        """Masks of sequences of `lengths` (B,) with pseudo states at `anchors` (B, A); `positions` (B, T + k*A)."""
        rows = positions.shape[1] - steps * anchors.shape[1]
        if self.plain_attention:
            return AnchoredMask(anchors, rows, steps)
        return DenseAnchoredMask(causal_allowed(lengths, rows), positions, anchors, steps, self.dtype)

    @property
    def plain_attention(self) -> bool:
        """Whether layers do to scores what `attend` does, found by trying one of each window."""
        if self._plain_attention is None:
            present = [i for i, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)]
            tried = {self.windows[index]: index for index in reversed(present)}
            self._plain_attention = all(attends_plainly(self, index) for index in tried.values())
        return self._plain_attention

    def use_lean_layers(self, compiled: bool = False) -> str | None:
        """Run the lean layers from now on if they give the library's logits; returns why not, or None.

        The library's parameters become views into joined matrices. Call it again after moving the model.
        """
        if self.peers is not None:
            return f"{type(self.model).__name__} keeps the library's layers: its weights are shared over ranks"
        tolerance = FUSED_TOLERANCE.get((self.device.type, self.dtype), CHECK_TOLERANCE.get(self.dtype, 2e-1))
        self.stack = self._library
        difference = 0.0
        try:
            for short in (True, False):  # the shortest norms round otherwise than the library's, the next like it
                lean = LeanStack(self.layers, self._norm, self._rotary, self._head, compiled, short)
                whole = not any(isinstance(layer, nn.Identity) for layer in self.layers)
                difference = self._difference(lean) if whole else 0.0  # a part was compared when it was whole
                if difference <= tolerance:
                    self.stack = lean
                    return None
        except (UnsupportedLayersError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            return f"{type(self.model).__name__} keeps the library's layers: {error}"
        return f"{type(self.model).__name__} keeps the library's layers: lean ones differ by {difference:.2g}"

    @torch.inference_mode()
    def _difference(self, other: Stack) -> float:
        """Greatest difference of another stack's logits from the present one's, relative to their size."""
        ids = self._check_ids()
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        mask = self.sequence_mask(
            causal_allowed(torch.full((1,), ids.shape[1], device=self.device), ids.shape[1]), positions
        )
        present, logits = self.stack, []
        try:
            for self.stack in (present, other):
                logits.append(self.head(self.norm(self.run(self.embed(ids), positions, mask))))
        finally:
            self.stack = present
        return ((logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1.0)).item()

    def _check_ids(self) -> Tensor:
        """(1, T) random tokens, enough to pass short sliding windows."""
        windows = [window for window in self.windows if window]
        tokens = max([CHECK_TOKENS, *(window + 8 for window in windows if window <= 256)])
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocab_size, (1, tokens), generator=generator).to(self.device)

    def _check_inputs(self) -> tuple[dict[str, Tensor], Tensor]:
        """What the model's own forward takes, and the states (1, T, d) that it makes of it for the first layer held."""
        ids = self._check_ids()
        if not isinstance(self._embed, MissingLayer) and self.first == 0:
            return {"input_ids": ids}, self.embed(ids)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, ids.shape[1], self.hidden_size, generator=generator).to(self.device, self.dtype)
        return {"inputs_embeds": states}, states

    @torch.no_grad()
    def check(self) -> None:
        """Compare the states behind each layer held and the logits with the model's own forward. Raises TeacherError on
        a difference.
        """
        inputs, start = self._check_inputs()
        tokens = start.shape[1]
        try:
            with _passing():
                own = self.model(**inputs, output_hidden_states=True, use_cache=False)
            mine: list[Tensor] = []
            positions = torch.arange(tokens, device=self.device)[None]
            allowed = causal_allowed(torch.full((1,), tokens, device=self.device), tokens)
            mask = self.sequence_mask(allowed, positions)
            last = self.run(start, positions, mask, self.first, on_layer=lambda _, hidden: mine.append(hidden))
            logits = self.head(self.norm(last))
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            raise TeacherError(
                f"{self.name}: the layers of {type(self.model).__name__} cannot be run one by one ({error}); "
                "supported: Llama, Mistral, Qwen2, Qwen3 and architectures with the same layer interface"
            ) from error
        tolerance = CHECK_TOLERANCE.get(self.dtype, 2e-1)
        # a looped model of its own code may report one state per loop, or none, and the library reports a layer's state
        # before a norm that ends its loop: then the logits alone must agree
        comparable = not (self.looped and self.looped.norm_each_loop) and len(own.hidden_states or ()) == len(mine)
        states = own.hidden_states[:-1] if comparable else ()
        pairs = [*enumerate(zip(states, mine, strict=False)), ("logits", (own.logits.float(), logits))]
        for where, (expected, got) in pairs:
            difference = (expected.float() - got.float()).abs().max().item()
            scale = max(1.0, expected.float().abs().max().item())
            if not difference <= tolerance * scale:
                place = where if where == "logits" else f"layer {where}"
                raise TeacherError(
                    f"{self.name}: {type(self.model).__name__} is not supported: run layer by layer, its states differ "
                    f"from its own forward at {place} by {difference:.2g}; use a Llama, Mistral, Qwen2 or Qwen3 model"
                )

    @property
    def fingerprint(self) -> str:
        """16 hex digits over parameter names, shapes and sampled values: same weights, same fingerprint."""
        if self._fingerprint is None:
            parameters = dict(self.model.named_parameters())
            shapes = [(name, parameter.shape) for name, parameter in parameters.items()]
            extra = "" if self.looped is None else self.looped.model_dump_json()

            def sample(name: str, places: Tensor) -> Tensor:
                flat = parameters[name].detach().flatten()
                return flat[places.to(flat.device)]

            self._fingerprint = weights_fingerprint(shapes, sample, extra)
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """Identity and size for records and manifests."""
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "fingerprint": self.fingerprint,
            "layers": self.num_layers,
            **({"looped": self.looped.model_dump()} if self.looped else {}),
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "parameters": self.parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }


@contextmanager
def _passing() -> Iterator[None]:
    """Let states through the layers that are not held, as if these did nothing."""
    MissingLayer.passing = True
    try:
        yield
    finally:
        MissingLayer.passing = False
