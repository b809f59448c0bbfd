"""Lean twin of a Llama-like decoder: the same numbers with a third of the library's operations.

Query, key and value matrices are joined, gate and up matrices too, and only the operations that a decoding step needs
are dispatched. It serves Llama, Mistral, Qwen2, Qwen3 and other models with layers of that kind (biases, norms on
queries and keys, grouped heads, shared layers, any rotary variant). A model whose logits differ from its library's by
more than rounding keeps the library's layers. The joined matrices replace the library's own, whose parameters become
views into them: both stacks run on one copy of the weights. On a CPU there is a second copy, for
teacher/cpu_kernels.py. Lean layers see changed weights only after they are built again.

Shapes: B sequences, R rows, d hidden size, Hq query heads, Hk key/value heads, D head size, f feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from firp_cli.teacher.attention import attend, choose_backend
from firp_cli.teacher.cpu_kernels import PackedLayer, PackedLayers, takes
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.library_layers import Cache, MissingLayer, placement_hook
from firp_cli.teacher.looped import LayerPass
from firp_cli.teacher.masks import LayerMask, TreeRows
from firp_cli.teacher.packed_linear import PackedLinear

if TYPE_CHECKING:
    from firp_cli.teacher.triton_products import Prepared

OWN_ROWS = 64  # most rows of a decoding step that takes the products of teacher/triton_products.py
HOPPER = (9, 0)
# With it the compiler writes products of one row as kernels of its own, joined with the operations around them, which
# read a matrix at the memory's rate. Without it these products stay calls of cuBLAS.
COMPILE_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


def runs_own_products(weight: Any) -> bool:
    """Return True where teacher/triton_products.py serves matrices like this one: bfloat16, on a CUDA device with
    Triton. In float16, rows that are multiplied by a norm's weight before they are normalised may overflow.
    """
    return (
        isinstance(weight, Tensor)
        and weight.is_cuda
        and weight.dtype == torch.bfloat16
        and choose_backend("auto", weight.device) == "triton"
    )


def prefers_own_products(head: Any) -> bool:
    """Return True where decoding steps are faster with them than with torch's products (head: the matrix (V, d)).

    On an H100 they were at d 576, 2048 and 4096 (scripts/NOTES.md, GPU). Older devices are not measured.
    """
    return runs_own_products(head) and torch.cuda.get_device_capability(head.device) >= HOPPER


class UnsupportedLayersError(Exception):
    """Reason why a model's layers have no lean twins."""


class RMSNorm(NamedTuple):
    """RMS norm, x w / sqrt(mean(x^2) + e)."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module) -> RMSNorm:
        """Return the norm of a library module. Raises UnsupportedLayersError for one of another kind."""
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
            raise UnsupportedLayersError(f"{type(module).__name__} is not an RMS norm with a weight")
        return cls(weight, epsilon)

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def _short(norm: RMSNorm) -> Callable[[Tensor], Tensor]:
    """Return the norm in four operations; torch's takes eight on a CPU, and a step of a small teacher consists of such.
    The root is the Euclidean length of (x, sqrt(d e)) / sqrt(d): as exact, but rounded otherwise.
    """
    size = len(norm.weight)
    scaled, least = norm.weight.detach() * size**0.5, torch.tensor((size * norm.epsilon) ** 0.5)

    def short(hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            return norm(hidden)
        length = torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), least)
        return torch.div(hidden, length).mul_(scaled)

    return short


class Step(NamedTuple):
    """Decoding step as the attention of a layer sees it.

    Attributes:
        rotary: cosine and sine (B or 1, R, 1, D), the sine's first half negated.
        written: slots for the rows' keys and values (B, Hk, R, D). seen: the slots in view (B, Hk, S, D).
    """

    rotary: Sequence[Tensor]
    mask: TreeRows
    written: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor]


class LeanLayer:
    """One decoder layer as matrices: norm, attention, norm and gated feed-forward, with residuals.

    Args:
        kernels: see `LeanStack`.
    """

    def __init__(self, layer: Any, kernels: bool = True) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        _only(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        _only(attention, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"})
        _only(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        self.head_size = int(attention.head_dim)
        self.scaling = float(getattr(attention, "scaling", self.head_size**-0.5))
        self.first_norm = RMSNorm.of(layer.input_layernorm)
        self.second_norm = RMSNorm.of(layer.post_attention_layernorm)
        parts = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.head_norms = [RMSNorm.of(part) for part in parts if part is not None]  # of queries and of keys, or empty
        queries, keys, values, output = (_linear(attention, f"{part}_proj") for part in "qkvo")
        self.query_heads, self.key_heads = (part.out_features // self.head_size for part in (queries, keys))
        gate, up, down = (_linear(mlp, f"{part}_proj") for part in ("gate", "up", "down"))
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn
        if isinstance(self.activation, nn.SiLU) or type(self.activation).__name__ == "SiLUActivation":
            self.activation = functional.silu
        weights = [_join(linears) for linears in ([queries, keys, values], [output], [gate, up], [down])]
        self.in_kernels = kernels and self.activation is functional.silu  # `decode` may replace `before` and `after`
        self.packed: PackedLayer | None = None  # the whole layer in the CPU's kernels
        size = sum(weight.nbytes for weight, _ in weights)
        if self.in_kernels and PackedLayer.serves(weights[0][0], self.head_size, size):
            norms = [self.first_norm, self.second_norm, *self.head_norms]
            heads = self.query_heads, self.key_heads, self.head_size
            self.packed = PackedLayer(weights, norms, heads, self.scaling)
        lean = kernels and self.packed is None
        self.joined, self.output, self.gates, self.down = (PackedLinear(*each, lean) for each in weights)

    def before(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries (B, Hq, R, D), rotated keys and values (B, Hk, R, D) of rows (B, R, d)."""
        heads = self.joined(self.first_norm(hidden)).view(*hidden.shape[:2], -1, self.head_size)
        unrotated, values = heads.split([self.query_heads + self.key_heads, self.key_heads], dim=2)
        if self.head_norms:
            parts = unrotated.split([self.query_heads, self.key_heads], dim=2)
            unrotated = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], dim=2)
        rotated = torch.addcmul(unrotated * cosine, unrotated.roll(self.head_size // 2, -1), sine)
        queries, keys = rotated.transpose(1, 2).split([self.query_heads, self.key_heads], dim=1)
        return queries, keys, values.transpose(1, 2)

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output (B, R, d) of the residual rows (B, R, d) and attention's output (B, Hq, R, D)."""
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gates(self.second_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(self.activation(gate) * up)

    def decode(self, hidden: Tensor, step: Step) -> Tensor:
        """Run the whole layer on rows (B, R, d) of a decoding step in ten kernels; `before`, the cache's `update`,
        `attend` and `after` take seventeen or more.
        """
        from firp_cli.teacher.triton_layer import silu_product

        attended, residual = self._attend(self.joined(self.first_norm(hidden)), hidden, step)
        rows = residual.flatten(0, 1)
        self.output.add_to(rows, attended.flatten(0, 1))
        self.down.add_to(rows, silu_product(self.gates(self.second_norm(rows))))
        return residual

    def decode_prepared(self, rows: Prepared, step: Step, following: Tensor | None) -> tuple[Tensor, Prepared | None]:
        """Run `decode` in seven kernels, whose products include norms, gate and residual.

        Args:
            following: weight of the next layer's first norm, for which the output rows are prepared.
        """
        from firp_cli.teacher.triton_products import add_product, normed_product

        joined = normed_product(rows, *self.joined.matrix, self.first_norm.epsilon)
        attended, residual = self._attend(joined, rows.hidden, step)
        between = add_product(attended, *self.output.matrix, residual, self.second_norm.weight)
        assert between is not None
        gated = normed_product(between, *self.gates.matrix, self.second_norm.epsilon, gated=True)
        return residual, add_product(gated, *self.down.matrix, residual, following)

    def _attend(self, joined: Tensor, hidden: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return attention's output (B, R, Hq D), and a copy of the hidden rows to which products can be added."""
        from firp_cli.teacher.triton_layer import rotate_and_write

        (cosine, sine), (keys, values) = step.rotary, step.written
        queries, residual = rotate_and_write(joined, cosine, sine, keys, values, hidden, *self.head_norms)
        return attend(queries, *step.seen, step.mask, self.scaling).transpose(1, 2).flatten(2), residual


class LeanStack:
    """Lean layers of a model in running order; the passes of a shared layer have one `LeanLayer`.

    Args:
        layers: the library's layers, or the passes of a looped teacher.
        compiled: run the parts before and after attention through `torch.compile`; requires `kernels` to be False.
        kernels: use kernels and packed products, where they exist; they round otherwise than the library.

    Raises UnsupportedLayersError for layers of another kind.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        norm: nn.Module,
        rotary: Callable[[Tensor, Tensor], Sequence[Tensor]],
        head: nn.Module,
        compiled: bool = False,
        kernels: bool = True,
    ) -> None:
        made: dict[int, LeanLayer] = {}
        self._layers: list[LeanLayer | None] = []
        self._loop_norms: list[RMSNorm | None] = []
        for item in layers:
            layer, loop_norm = (item.layer, item.norm) if isinstance(item, LayerPass) else (item, None)
            released = isinstance(layer, MissingLayer)  # another process runs it
            if not released and id(layer) not in made:
                made[id(layer)] = LeanLayer(layer, kernels)
            self._layers.append(None if released else made[id(layer)])
            self._loop_norms.append(None if loop_norm is None else RMSNorm.of(loop_norm))
        self.packed = any(lean.packed is not None for lean in made.values())  # layers run in the CPU's kernels
        self.compiled = compiled
        self.name = "lean, compiled kernels" if self.packed else "lean"
        self.final_norm = RMSNorm.of(norm)
        self.norm: Callable[[Tensor], Tensor] = self.final_norm.__call__
        if kernels and head.weight.device.type == "cpu" and head.weight.dtype == torch.float32:
            self.norm = _short(self.final_norm)
        self._rotary = rotary
        self.head = PackedLinear(head.weight, head.bias, wide=True) if type(head) is nn.Linear else head
        self.own_products = prefers_own_products(getattr(head, "weight", None))
        self._runs: dict[tuple[int, int], PackedLayers | None] = {}
        self._prepared: Prepared | None = None  # the last layer's output
        if compiled:
            for lean in made.values():
                lean.before = torch.compile(lean.before, options=COMPILE_OPTIONS)  # type: ignore[method-assign]
                lean.after = torch.compile(lean.after, options=COMPILE_OPTIONS)  # type: ignore[method-assign]

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        """Return cosine and sine (B, R, 1, D), the sine's first half negated: a layer rotates by rolling the halves."""
        cosine, sine = self._rotary(hidden, positions)
        first, second = sine.chunk(2, dim=-1)
        return [cosine[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]]

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        layer, norm = self._layers[index], self._loop_norms[index]
        assert layer is not None, f"layer {index} was released"

        def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return (keys, values) if cache is None else cache.update(keys, values, index)

        if isinstance(mask, TreeRows) and isinstance(cache, KVCache) and layer.in_kernels and not hidden.requires_grad:
            step = Step(rotary, mask, cache.written(index, hidden.shape[1]), cache.seen(index))
            output = self._decode(index, layer, hidden, step)
        elif layer.packed is not None and (mask is None or isinstance(mask, Tensor)) and takes(hidden):
            output = layer.packed(hidden, rotary, mask, update)
        else:
            queries, keys, values = layer.before(hidden, *rotary)
            output = layer.after(hidden, attend(queries, *update(keys, values), mask, layer.scaling))
        return output if norm is None else norm(output)

    def run_packed(
        self, start: int, stop: int, hidden: Tensor, rotary: Sequence[Tensor], mask: LayerMask, cache: Cache | None
    ) -> Tensor | None:
        """Return h^stop of h^start (B, R, d) in one call where the CPU's kernels serve all of these layers, or None."""
        if not isinstance(cache, KVCache) or not takes(hidden) or not (mask is None or isinstance(mask, Tensor)):
            return None
        if (start, stop) not in self._runs:
            packed = [layer.packed for layer in self._layers[start:stop] if layer and layer.packed]
            served = len(packed) == stop - start and not any(self._loop_norms[start:stop])
            self._runs[start, stop] = PackedLayers(packed) if served else None
        run = self._runs[start, stop]
        if run is None:
            return None
        written, seen = cache.written(start, hidden.shape[1]), cache.seen(start)
        return run(hidden, rotary, mask, written, seen, cache.layer_stride)

    def _decode(self, index: int, layer: LeanLayer, hidden: Tensor, step: Step) -> Tensor:
        """Run a layer in the kernels of a decoding step; their products need rows prepared for the layer's first norm,
        as the layer before returns them.
        """
        if not self.own_products or hidden.shape[0] * hidden.shape[1] > OWN_ROWS:
            return layer.decode(hidden, step)
        from firp_cli.teacher.triton_products import prepare

        rows, norm = self._prepared, layer.first_norm.weight
        if rows is None or rows.hidden is not hidden or rows.norm is not norm:
            rows = prepare(hidden, norm)
        after = self._layers[index + 1] if index + 1 < len(self._layers) else None
        output, self._prepared = layer.decode_prepared(rows, step, None if after is None else after.first_norm.weight)
        return output


def _only(module: nn.Module, known: set[str]) -> None:
    """Refuse parts other than the known ones, which lean layers would skip: adapters, hooks, parameters."""
    children = [name for name, _ in module.named_children() if name not in known]
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if children or parameters:
        raise UnsupportedLayersError(f"{type(module).__name__} has {', '.join([*children, *parameters])}")
    if placement_hook(module) is not None:
        raise UnsupportedLayersError(f"{type(module).__name__} is placed on several devices")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = getattr(module, name)
    if type(linear) is not nn.Linear:  # quantised and adapted ones are subclasses
        raise UnsupportedLayersError(f"{name} is a {type(linear).__name__}")
    if placement_hook(linear) is not None or linear._forward_hooks or linear._forward_pre_hooks:
        raise UnsupportedLayersError(f"{name} has hooks")
    return linear


@torch.no_grad()
def _join(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Join the weights (and biases) of linears with the same input; the linears' own become views into the result."""
    if len({linear.bias is None for linear in linears}) > 1 or len({linear.weight.device for linear in linears}) > 1:
        raise UnsupportedLayersError("joined matrices differ in their biases or devices")
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return _joined([linear.weight for linear in linears]), _joined(biases) if biases else None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts as one tensor, into which they become views; without a copy where they are adjacent in memory
    (joined before).
    """
    first = parts[0].data
    followed = all(part.data_ptr() == before.data_ptr() + before.nbytes for before, part in pairwise(parts))
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if followed and len(storages) == 1 and all(part.is_contiguous() for part in parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    joined = torch.cat([part.data for part in parts])
    for part, view in zip(parts, joined.split(list(map(len, parts))), strict=True):
        part.data = view
    return joined
