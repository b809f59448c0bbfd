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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from firp_cli.teacher.attention import attend, choose_backend
from firp_cli.teacher.cpu_kernels import PackedLayer, PackedLayers, Weights, takes
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.library_layers import Cache, MissingLayer, placement_hook
from firp_cli.teacher.looped import LayerPass
from firp_cli.teacher.masks import LayerMask, TreeRows
from firp_cli.teacher.packed_linear import PackedLinear

if TYPE_CHECKING:
    from firp_cli.teacher.triton_products import Prepared

OWN_ROWS = 64  # most rows of a decoding step that takes the products of teacher/triton_products.py
SLOWER_SIZES = range(1025, 4096)  # hidden sizes at which torch's products were faster, or that are not measured
HOPPER = (9, 0)


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

    On an H200 they were at d 576 and 4096, and not at 2048 (scripts/NOTES.md, GPU). Older devices are not measured.
    """
    return (
        runs_own_products(head)
        and head.shape[1] not in SLOWER_SIZES
        and torch.cuda.get_device_capability(head.device) >= HOPPER
    )


class UnsupportedLayersError(Exception):
    """Reason why a model's layers have no lean twins."""


class LeanLayer:
    """One decoder layer as matrices: norm, attention, norm and gated feed-forward, with residuals.

    Args:
        lean: use packed products, or all of the CPU's kernels. short: see `LeanStack`.
    """

    def __init__(self, layer: nn.Module, lean: bool = True, short: bool = True) -> None:
        attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
        _only(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        _only(attention, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"})
        _only(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        self.head_size = int(attention.head_dim)
        self.scaling = float(getattr(attention, "scaling", self.head_size**-0.5))
        self.first_norm = RMSNorm(_child(layer, "input_layernorm"), short)
        self.second_norm = RMSNorm(_child(layer, "post_attention_layernorm"), short)
        self.query_norm, self.key_norm = (
            RMSNorm(part, short) if (part := getattr(attention, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        )
        self.head_norms: list[tuple[Tensor, float]] = []  # of queries and of keys, for the kernels, or empty
        if self.query_norm is not None and self.key_norm is not None:
            self.head_norms = [(norm.weight, norm.epsilon) for norm in (self.query_norm, self.key_norm)]
        queries, keys, values, output = (_linear(attention, f"{part}_proj") for part in "qkvo")
        self.query_heads, self.key_heads = (part.out_features // self.head_size for part in (queries, keys))
        gate, up, down = (_linear(mlp, f"{part}_proj") for part in ("gate", "up", "down"))
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn
        if isinstance(self.activation, nn.SiLU) or type(self.activation).__name__ == "SiLUActivation":
            self.activation = functional.silu
        joined, joined_bias = _join([queries, keys, values])
        gates, gates_bias = _join([gate, up])
        weights: list[Weights] = [
            (joined, joined_bias),
            (output.weight, output.bias),
            (gates, gates_bias),
            (down.weight, down.bias),
        ]
        self.packed: PackedLayer | None = None  # the whole layer in the CPU's kernels
        size = sum(weight.nbytes for weight, _ in weights)
        if lean and short and self.activation is functional.silu and PackedLayer.serves(joined, self.head_size, size):
            norms = [(norm.weight, norm.epsilon) for norm in (self.first_norm, self.second_norm)]
            heads = self.query_heads, self.key_heads
            self.packed = PackedLayer(weights, norms, self.head_norms, heads, self.head_size, self.scaling)
        lean = lean and self.packed is None
        self.joined, self.output, self.gates, self.down = (PackedLinear(*each, lean) for each in weights)

    def before(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries (B, Hq, R, D), rotated keys and values (B, Hk, R, D) of rows (B, R, d)."""
        batch, rows, _ = hidden.shape
        joined = self.joined(self.first_norm(hidden))
        heads = joined.view(batch, rows, -1, self.head_size)
        unrotated = heads[:, :, : self.query_heads + self.key_heads]
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = unrotated.split([self.query_heads, self.key_heads], dim=2)
            unrotated = torch.cat([self.query_norm(queries), self.key_norm(keys)], dim=2)
        half = self.head_size // 2
        rotated = torch.addcmul(unrotated * cosine, unrotated.roll(half, -1), sine)
        values = heads[:, :, self.query_heads + self.key_heads :]
        rotated = rotated.transpose(1, 2)
        return rotated[:, : self.query_heads], rotated[:, self.query_heads :], values.transpose(1, 2)

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output (B, R, d) of the residual rows (B, R, d) and attention's output (B, Hq, R, D)."""
        batch, rows, _ = hidden.shape
        mixed = attended.transpose(1, 2).reshape(batch, rows, -1)
        hidden = hidden + self.output(mixed)
        gate, up = self.gates(self.second_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(self.activation(gate) * up)

    def decode(
        self,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        written: tuple[Tensor, Tensor],
        seen: tuple[Tensor, Tensor],
        mask: TreeRows,
    ) -> Tensor:
        """Run the whole layer on rows (B, R, d) of a decoding step in ten kernels; `before`, the cache's `update`,
        `attend` and `after` take seventeen or more.

        Args:
            written: slots for the rows' keys and values (B, Hk, R, D). seen: the slots in view (B, Hk, S, D).
        """
        from firp_cli.teacher.triton_layer import rotate_and_write, silu_product

        joined = self.joined(self.first_norm(hidden))
        # `residual` is a copy, so that products can be added to it in place
        queries, residual = rotate_and_write(joined, cosine, sine, *written, hidden, *self.head_norms)
        rows = residual.view(-1, residual.shape[-1])
        attended = attend(queries, *seen, mask, self.scaling).transpose(1, 2)
        self.output.add_to(rows, attended.reshape(len(rows), -1))
        self.down.add_to(rows, silu_product(self.gates(self.second_norm(rows))))
        return residual

    def decode_prepared(
        self,
        rows: Prepared,
        cosine: Tensor,
        sine: Tensor,
        written: tuple[Tensor, Tensor],
        seen: tuple[Tensor, Tensor],
        mask: TreeRows,
        following: Tensor | None,
    ) -> tuple[Tensor, Prepared | None]:
        """Run `decode` in seven kernels, whose products include norms, gate and residual.

        Args:
            following: weight of the next layer's first norm, for which the output rows are prepared.
        """
        from firp_cli.teacher.triton_layer import rotate_and_write
        from firp_cli.teacher.triton_products import add_product, normed_product

        joined = normed_product(rows, *self.joined.matrix, self.first_norm.epsilon)
        queries, residual = rotate_and_write(joined, cosine, sine, *written, rows.hidden, *self.head_norms)
        attended = attend(queries, *seen, mask, self.scaling).transpose(1, 2).flatten(2)
        between = add_product(attended, *self.output.matrix, residual, self.second_norm.weight)
        assert between is not None
        gated = normed_product(between, *self.gates.matrix, self.second_norm.epsilon, gated=True)
        return residual, add_product(gated, *self.down.matrix, residual, following)


class RMSNorm:
    """RMS norm of a library module, x w / sqrt(mean(x^2) + e).

    Args:
        short: on a CPU, take four operations instead of the seven of torch's norm: the root is the Euclidean length of
            (x, sqrt(d e)) / sqrt(d). As exact, but rounded otherwise than the library's.
    """

    def __init__(self, module: nn.Module, short: bool = True) -> None:
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(getattr(module, "weight", None), Tensor) or not isinstance(epsilon, float):
            raise UnsupportedLayersError(f"{type(module).__name__} is not an RMS norm with a weight")
        self.weight: Tensor = module.weight  # type: ignore[assignment]
        self.shape, self.epsilon = tuple(self.weight.shape), epsilon
        size = self.shape[-1]
        self.short = short and self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        self.scaled = self.weight.detach() * size**0.5 if self.short else self.weight
        self.least = torch.tensor((size * epsilon) ** 0.5)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.short and not hidden.requires_grad:
            length = torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), self.least)
            return torch.div(hidden, length).mul_(self.scaled)
        return functional.rms_norm(hidden, self.shape, self.weight, self.epsilon)


class LeanStack:
    """Lean layers of a model in running order; the passes of a shared layer have one `LeanLayer`.

    Args:
        layers: the library's layers, or the passes of a looped teacher.
        compiled: run the parts before and after attention through `torch.compile`.
        short: use kernels, and norms of fewer operations, where they exist; they round otherwise than the library.

    Raises UnsupportedLayersError for layers of another kind.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        norm: nn.Module,
        rotary: Callable[[Tensor, Tensor], Sequence[Tensor]],
        head: nn.Module,
        compiled: bool = False,
        short: bool = True,
    ) -> None:
        short = short and not compiled
        made: dict[int, LeanLayer] = {}
        self._layers: list[LeanLayer | None] = []
        self._loop_norms: list[RMSNorm | None] = []
        for item in layers:
            layer, loop_norm = (item.layer, item.norm) if isinstance(item, LayerPass) else (item, None)
            released = isinstance(layer, MissingLayer)  # another process runs it
            if not released and id(layer) not in made:
                made[id(layer)] = LeanLayer(layer, not compiled, short)  # the compiler chooses its own products
            self._layers.append(None if released else made[id(layer)])
            self._loop_norms.append(None if loop_norm is None else RMSNorm(loop_norm, short))
        packed = any(lean.packed is not None for lean in made.values())
        self.name = "lean, compiled kernels" if packed else "lean"
        self._norm = RMSNorm(norm, short)
        self._rotary = rotary
        self._head = PackedLinear(head.weight, head.bias, wide=True) if type(head) is nn.Linear else head
        self._compiled = compiled
        self.own_products = prefers_own_products(getattr(head, "weight", None))
        self._runs: dict[tuple[int, int], PackedLayers | None] = {}
        self._prepared: tuple[int, Prepared | None] = (0, None)  # a layer's index, and its input rows
        if compiled:
            for lean in made.values():
                lean.before = torch.compile(lean.before)  # type: ignore[method-assign]
                lean.after = torch.compile(lean.after)  # type: ignore[method-assign]

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        """Return cosine and sine (B, R, 1, D), the sine's first half negated: a layer rotates by rolling the halves."""
        cosine, sine = self._rotary(hidden, positions)
        first, second = sine.chunk(2, dim=-1)
        return [cosine[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]]

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden)

    def head(self, normed: Tensor) -> Tensor:
        return self._head(normed)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        layer = self._layers[index]
        assert layer is not None, f"layer {index} was released"
        if isinstance(mask, TreeRows) and isinstance(cache, KVCache) and self._in_kernels(layer, hidden):
            written, view = cache.written(index, hidden.shape[1]), cache.seen(index)
            if self.own_products and hidden.shape[0] * hidden.shape[1] <= OWN_ROWS:
                output = self._decode_prepared(index, layer, hidden, rotary, written, view, mask)
            else:
                output = layer.decode(hidden, rotary[0], rotary[1], written, view, mask)
        elif layer.packed is not None and (mask is None or isinstance(mask, Tensor)) and takes(hidden):

            def seen(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                return (keys, values) if cache is None else cache.update(keys, values, index)

            output = layer.packed(hidden, rotary[0], rotary[1], mask, seen)
        else:
            queries, keys, values = layer.before(hidden, rotary[0], rotary[1])
            if cache is not None:
                keys, values = cache.update(keys, values, index)
            output = layer.after(hidden, attend(queries, keys, values, mask, layer.scaling))
        norm = self._loop_norms[index]
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
        return run(hidden, rotary[0], rotary[1], mask, written, seen, cache.layer_stride)

    def _decode_prepared(
        self,
        index: int,
        layer: LeanLayer,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        written: tuple[Tensor, Tensor],
        seen: tuple[Tensor, Tensor],
        mask: TreeRows,
    ) -> Tensor:
        """Run a layer by `LeanLayer.decode_prepared`, on rows that the layer before has prepared if it ran just now."""
        from firp_cli.teacher.triton_products import prepare

        number, rows = self._prepared
        if rows is None or number != index or rows.hidden is not hidden:
            rows = prepare(hidden, layer.first_norm.weight)
        after = self._layers[index + 1] if index + 1 < len(self._layers) and self._loop_norms[index] is None else None
        following = None if after is None else after.first_norm.weight
        output, rows = layer.decode_prepared(rows, rotary[0], rotary[1], written, seen, mask, following)
        self._prepared = (index + 1, rows)
        return output

    def _in_kernels(self, layer: LeanLayer, hidden: Tensor) -> bool:
        """Return True where `LeanLayer.decode` serves a decoding step whose attention is a kernel."""
        return layer.activation is functional.silu and not self._compiled and not hidden.requires_grad


def _child(module: nn.Module, name: str) -> Any:
    child = getattr(module, name, None)
    if child is None:
        raise UnsupportedLayersError(f"{type(module).__name__} has no {name}")
    return child


def _only(module: nn.Module, known: set[str]) -> None:
    """Refuse parts other than the known ones, which lean layers would skip: adapters, hooks, parameters."""
    children = [name for name, _ in module.named_children() if name not in known]
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if children or parameters:
        raise UnsupportedLayersError(f"{type(module).__name__} has {', '.join([*children, *parameters])}")
    if placement_hook(module) is not None:
        raise UnsupportedLayersError(f"{type(module).__name__} is placed on several devices")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = _child(module, name)
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
    joined: list[Tensor] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            return joined[0], None
        whole = _adjoining([part.data for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
        joined.append(whole)
    return joined[0], joined[1]


def _adjoining(parts: list[Tensor]) -> Tensor:
    """Return the parts as one tensor, without a copy where they are adjacent in memory (joined before)."""
    first, size = parts[0], parts[0].element_size()
    address, adjacent = first.data_ptr(), True
    for part in parts:
        adjacent = adjacent and part.is_contiguous() and part.data_ptr() == address
        adjacent = adjacent and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        address += part.numel() * size
    if not adjacent:
        return torch.cat(parts)
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
