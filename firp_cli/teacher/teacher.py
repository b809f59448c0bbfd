"""Frozen teacher model as a stack: embedding, decoder layers, final norm and head, each callable alone.

The layers are the library's own, or their lean twins. `firp_cli.teacher.load` makes teachers and checks them;
`firp_cli.teacher.check` has the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from firp_cli.config import LoopedSection
from firp_cli.errors import TeacherError
from firp_cli.teacher.layer_kinds import SUPPORTED, refused_kind, refused_positions
from firp_cli.teacher.lean_layers import LeanStack
from firp_cli.teacher.library_layers import (
    Cache,
    LibraryStack,
    MissingLayer,
    Stack,
    eos_token_ids,
    max_positions,
    part,
    placement_hook,
    windows,
)
from firp_cli.teacher.looped import LoopedLayers, loop_layers
from firp_cli.teacher.masks import AttentionMask, LayerMask, Mask, causal_allowed
from firp_cli.teacher.packed_linear import PackedLinear
from firp_cli.teacher.rotary_table import RotaryTable
from firp_cli.teacher.source import TeacherOrigin
from firp_cli.teacher.training_masks import AnchoredMask, CausalMask, DenseAnchoredMask
from firp_cli.teacher.weight_files import LoadedWeights, weights_fingerprint

LayerHook = Callable[[int, Tensor], None]
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # position embeddings that depend on the position alone
BOUNDED_ROPE = ("dynamic", "longrope")  # the same, as long as a sequence stays within the (original) context


def rounding(dtype: torch.dtype) -> float:
    """Return the relative difference that two orders of the same operations may make in a forward."""
    return {torch.float32: 1e-4, torch.float16: 5e-2}.get(dtype, 2e-1)


class Teacher:
    """A frozen causal LM whose layers run one by one. Shared layers count once for each time that they run.

    The constructor checks nothing: `firp_cli.teacher.load.wrap_model` compares the layers with the model's own forward.

    Args:
        looped: the layers that run several times, where the model's own class does not define them.

    Attributes: `num_layers` L, `hidden_size` d, `vocab_size` V, `kv_heads`, `head_size`, `max_positions`,
    `eos_token_ids`, `device`, `dtype`, `windows` (per layer: sliding window in positions, or None), `looped` (None:
    every layer runs once), `library` (the library's layers), `stack` (the layers that run: `library`, or their lean
    twins), `first` (the lowest layer that this process can run on from), `loaded_weights` (the part of the weights that
    this process holds), `peers` (None, or the collective of `any_has_work`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        name: str = "in-memory",
        looped: LoopedSection | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        config = model.config.get_text_config()
        base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        if refused := refused_kind(model, config) or refused_positions(model, base, config):
            raise TeacherError(f"{name}: {type(model).__name__} is not supported: {refused}; {SUPPORTED}")
        self.layers: nn.ModuleList = part(base, ("layers", "h"), name, "list of layers")
        if not len(self.layers):
            raise TeacherError(f"{name} has no layers: its config.json is wrong (num_hidden_layers)")
        self._embed: nn.Module = model.get_input_embeddings()
        self._norm: nn.Module = part(base, NORMS, name, "final norm")
        if looped is not None and not (isinstance(self.layers, LoopedLayers) and self.layers.shape == looped):
            self.layers = loop_layers(model, base, self.layers, self._norm, looped)
        self.looped = self.layers.shape if isinstance(self.layers, LoopedLayers) else None
        self._rotary: nn.Module = base.rotary_emb
        self._head: nn.Module = model.get_output_embeddings()
        self.library: Stack = LibraryStack(name, self.layers, self._norm, self._rotary, self._head, config)
        self.stack: Stack = self.library
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.num_layers = len(self.layers)
        self.hidden_size: int = config.hidden_size
        heads = int(getattr(config, "num_attention_heads", 1))
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.query_size = heads * self.head_size
        self.vocab_size: int = self._head.weight.shape[0]
        self.max_positions = max_positions(config, getattr(self._rotary, "rope_type", None))
        self.windows = windows(config, self.num_layers, self.looped)
        self.eos_token_ids = eos_token_ids(model, tokenizer, self.vocab_size)
        self._fingerprint: str | None = None
        # set by `firp_cli.teacher.check.inspect_attention`: the library's attention is exactly `attend` (False is
        # always right, and slower); what it is known to compute beyond that
        self.standard_attention = False
        self.own_scores: str | None = None
        self.first = 0
        self.origin: TeacherOrigin | None = None  # None: a model that was in memory
        self.peers: Callable[[bool], bool] | None = None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.loaded_weights = LoadedWeights("whole", self.num_layers, self.num_layers, self.weight_bytes)
        if self.device.type == "cuda":
            # torch prefers cuDNN's attention on recent devices, which takes tens of milliseconds to prepare each new
            # length; in decoding every step has a new length
            torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def own_masks(self) -> str | None:
        """The reason why these layers need written-out masks and the library's own attention; None: `attend` serves."""
        if self.standard_attention or isinstance(self.stack, LeanStack):
            return None
        return self.own_scores or "its layers take no structured masks"

    @property
    def device(self) -> torch.device:
        """Device of the callers' rows; layers on other devices fetch the rows and send them back."""
        placed = getattr(placement_hook(self._embed), "execution_device", None)
        return self._weights.weight.device if placed is None else torch.device(placed)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.weight.dtype  # type: ignore[return-value]

    @property
    def _weights(self) -> nn.Module:
        return self._head if isinstance(self._embed, MissingLayer) else self._embed

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return h^0 (B, R, d) of token ids (B, R)."""
        return self._embed(input_ids)

    def embedding_matrix(self) -> Tensor | None:
        """Return the matrix (V, d) whose rows `embed` returns, if there is one."""
        return self._embed.weight.detach() if type(self._embed) is nn.Embedding else None

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        """Return position embeddings of rows at `positions` (B, R), shared by all layers: (B, R, ..., D) each."""
        return self.stack.rotary(hidden, positions)

    def rotary_table(self, count: int) -> RotaryTable | None:
        """Return position embeddings of positions 0..count-1; None where they depend on more than the position.

        Where they change once a sequence passes the context, the table ends at the context: drafts may reach past it,
        answers do not.
        """
        kind = getattr(self._rotary, "rope_type", None)
        if kind in BOUNDED_ROPE:
            count = min(count, self.max_positions)
        elif kind not in STATIC_ROPE:
            return None
        like = torch.empty(1, 1, self.hidden_size, device=self.device, dtype=self.dtype)
        return RotaryTable(self.rotary(like, torch.arange(count, device=self.device)[None]))

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        """Return h^(index+1) of h^index (B, R, d). `mask` is additive (B, 1, R, S), or attends by itself; None is right
        only for one row that sees every slot.
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
        """Return h^stop of h^start (B, R, d), under a mask's first R rows."""
        rows = hidden.shape[1]
        masks = {window: None if mask is None else mask.at(window, rows) for window in set(self.windows[start:stop])}
        if isinstance(self.stack, LeanStack) and len(masks) == 1:
            output = self.stack.run_packed(start, stop, hidden, rotary, masks[self.windows[start]], cache)
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
        """Run layers start..stop-1 on h^start (B, R, d). `on_layer(l, h^l)` is called for each l in start..stop."""
        rotary = self.rotary(hidden, positions)
        if on_layer:
            on_layer(start, hidden)
        for index in range(start, self.num_layers if stop is None else stop):
            hidden = self.layer(index, hidden, rotary, positions, mask.additive(self.windows[index]), cache)
            if on_layer:
                on_layer(index + 1, hidden)
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        """Return the final norm of h^L: the state that the head reads (`hidden.final` in a store)."""
        return self.stack.norm(hidden)

    def head(self, normed: Tensor) -> Tensor:
        """Return the float32 logits (..., V) of normed states (..., d)."""
        return self.capped(self.stack.head(normed).float())

    def head_at(self, normed: Tensor, tokens: Tensor) -> Tensor:
        """Return the float32 logits (..., R, M) of normed states (..., R, d) for the tokens (..., M) alone."""
        return self.partial_head(tokens)(normed)

    def partial_head(self, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the head of the tokens (..., M) alone, on a copy of their rows: (..., R, d) to float32 (..., R, M)."""
        weight, bias, _ = self.head_parts()
        rows = functional.embedding(tokens, weight).float().transpose(-1, -2)
        chosen = None if bias is None else bias[tokens].float()[..., None, :]

        def head(normed: Tensor) -> Tensor:
            logits = normed.float() @ rows
            return self.capped(logits if chosen is None else logits + chosen)

        return head

    def draft_head(self, tokens: Tensor) -> PackedLinear:
        """Return the head of the tokens (S,) for drafts, not `capped`. Drafts decide no token, so it is rounded."""
        weight, bias, _ = self.head_parts()
        return PackedLinear(weight[tokens], None if bias is None else bias[tokens], wide=True, half=True)

    def capped(self, logits: Tensor) -> Tensor:
        """Return head products (..., V) within the bound that some teachers set."""
        return self._softcap * torch.tanh(logits / self._softcap) if self._softcap else logits

    def unnorm(self, normed: Tensor) -> Tensor:
        """Return a state y (..., d) with norm(y) = `normed`: the one of unit scale, since the norm removes the scale.

        Raises TeacherError where the final norm is not an RMS or layer norm with a weight.
        """
        weight, bias = getattr(self._norm, "weight", None), getattr(self._norm, "bias", None)
        if not isinstance(weight, Tensor) or weight.is_meta:
            raise TeacherError(f"{self.name}: its final norm has no weight to divide by: set training.init=identity")
        state = (normed if bias is None else normed - bias) / torch.where(weight.abs() < 1e-6, 1e-6, weight)
        difference = (self.norm(state[..., :1, :]) - normed[..., :1, :]).abs().max().item()
        if not difference <= rounding(self.dtype) * max(1.0, normed.abs().max().item()):
            raise TeacherError(f"{self.name}: its final norm cannot be undone: set training.init=identity")
        return state

    def release(self, kept: range) -> None:
        """Drop all layers but these, which other processes run. Shared layers stay, since every loop needs them."""
        self._fingerprint = self.fingerprint  # of the whole teacher, before its layers go
        if self.looped is None:
            for index in range(self.num_layers):
                if index not in kept:
                    self.layers[index] = MissingLayer()
            self.first = kept.start

    def drop_embedding(self) -> None:
        """Drop the embedding: training on a layer's states needs none."""
        self._embed = MissingLayer()

    def lean_stack(self, compiled: bool, kernels: bool) -> LeanStack:
        """Return lean twins of the library's layers, which share their weights.

        Raises UnsupportedLayersError for layers of another kind. Arguments: see `LeanStack`.
        """
        return LeanStack(self.layers, self._norm, self._rotary, self._head, compiled, kernels)

    def any_has_work(self, work: bool) -> bool:
        """Return True where a forward must run: this process has `work` or, of processes that hold the teacher
        together, any has.

        Such processes call this before each forward. One without work runs along, with a single token, until it returns
        False.
        """
        return work if self.peers is None else self.peers(work)

    def head_parts(self) -> tuple[Tensor, Tensor | None, float | None]:
        """Return the head's matrix (V, d), its bias (V,), and the bound that tanh brings its logits within."""
        return self.head_weight(), getattr(self._head, "bias", None), self._softcap

    def head_weight(self) -> Tensor:
        """Return the head's matrix (V, d). A collective where several processes hold the teacher together."""
        gathered = getattr(self.stack, "head_weight", None)
        weight: Any = self._head.weight if gathered is None else gathered()
        if weight.is_meta:
            raise TeacherError(f"{self.name}: teacher.device_map leaves its head on disk; give it a device")
        return weight

    def need_whole(self, work: str) -> None:
        """Raise TeacherError where this process does not hold the whole teacher on one device. `work` needs it."""
        if self.loaded_weights.kind != "whole":
            raise TeacherError(
                f"{work} needs all of {self.name} on one device: leave teacher.device_map and teacher.sharding out"
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters that have memory."""
        return sum(parameter.nbytes for parameter in self.model.parameters() if not parameter.is_meta)

    def boundaries(self, loops: int | None = None) -> tuple[int, ...]:
        """Return the number of layers that have run at the end of each loop; the last is all but the coda.

        A teacher without shared layers is cut into `loops` groups of layers, the longer ones first. Raises
        TeacherError where `loops` does not fit.
        """
        if self.looped is not None:
            if loops not in (None, self.looped.loops):
                raise TeacherError(
                    f"{self.name} runs its layers {self.looped.loops} times, predictor.loops is {loops}: leave it out"
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
        """Return the mask of a forward without cached prefix: `allowed` (B, M, M), `positions` (B, M)."""
        return AttentionMask(allowed, self.dtype, positions, positions)

    def causal_mask(self, rows: int) -> AttentionMask | CausalMask:
        """Return the mask of right-padded sequences of up to `rows` tokens, from position 0 on."""
        if self.standard_attention:
            return CausalMask()
        positions = torch.arange(rows, device=self.device)[None]
        return self.sequence_mask(causal_allowed(positions.new_full((1,), rows), rows), positions)

    def anchored_mask(
        self, lengths: Tensor, positions: Tensor, anchors: Tensor, steps: int, earlier: bool = True
    ) -> AnchoredMask:
        """Return the masks of sequences of `lengths` (B,) with pseudo states at `anchors` (B, A).

        Args:
            positions: (B, T + k*A) of the real rows, then of the pseudo states.
            earlier: pseudo states see those of earlier steps of their anchor.
        """
        rows = positions.shape[1] - steps * anchors.shape[1]
        if self.standard_attention:
            return AnchoredMask(anchors, rows, steps, earlier)
        return DenseAnchoredMask(causal_allowed(lengths, rows), positions, anchors, steps, self.dtype, earlier)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over parameter names, shapes and sampled values: equal weights have equal fingerprints."""
        if self._fingerprint is None:
            parameters = dict(self.model.named_parameters())

            def sample(name: str, places: Tensor) -> Tensor:
                flat = parameters[name].detach().flatten()
                return flat[places.to(flat.device)]

            self.compute_fingerprint(sample)
        assert self._fingerprint is not None
        return self._fingerprint

    def compute_fingerprint(self, sample: Callable[[str, Tensor], Tensor]) -> None:
        """Compute the whole teacher's fingerprint. `sample` returns a parameter's values at flat places (n,)."""
        extra = "" if self.looped is None else self.looped.model_dump_json()
        self._fingerprint = weights_fingerprint(self.model.named_parameters(), sample, extra)

    def describe(self) -> dict[str, Any]:
        """Return identity and size, for records and manifests."""
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
            **(self.origin.describe() if self.origin else {}),
        }
