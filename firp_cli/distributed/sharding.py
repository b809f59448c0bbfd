"""Teachers larger than a device: each rank keeps a part of every matrix (DeepSpeed ZeRO-3).

A layer's weights are gathered when it runs; one layer at a time is whole. Gathering is a collective, so all ranks must
run the same layers in the same order. Training does so by itself. Ranks that share other work call
`teacher.any_has_work` before each forward and take part until no rank has work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from firp_cli.config import TeacherConfig
from firp_cli.distributed.launch import load_deepspeed, start
from firp_cli.distributed.rank_group import peer_loss_reported
from firp_cli.errors import TeacherError
from firp_cli.machine import default_device, is_main, world_size
from firp_cli.teacher.library_layers import Cache, MissingLayer, Stack
from firp_cli.teacher.load import PartError, PartialTeacher, load_upper
from firp_cli.teacher.masks import LayerMask
from firp_cli.teacher.teacher import Teacher

WHOLE_ELEMENTS = 1 << 14  # smaller parameters of one dimension (norms, biases) are whole on every rank
ALONE = "teacher.sharding=zero3 has no effect on one rank: start more with --gpus"


def load_for_ranks(config: TeacherConfig, first: int = 0, embedding: bool = False) -> Teacher:
    """Load the recipe's teacher on this rank, without its layers below `first` and, unless `embedding`, without its
    embedding. Every rank calls this.

    Raises TeacherError as `load_upper` does, and for a teacher that cannot be sharded.
    """
    if config.sharding == "none":
        return load_upper(config, first, embedding=embedding)
    if world_size() == 1:
        teacher = load_upper(config, first, embedding=embedding)
        teacher.loaded_weights = replace(teacher.loaded_weights, note=teacher.loaded_weights.note or ALONE)
        return teacher
    return load_sharded(config, first, embedding)


def load_sharded(config: TeacherConfig, first: int = 0, embedding: bool = False) -> Teacher:
    """Load a teacher with its matrices sharded over the ranks. Every rank calls this.

    Rank 0 reads one parameter at a time. No rank has more in memory than its share and one parameter, later one layer.

    Raises TeacherError when the weights cannot be read parameter by parameter, LaunchError when a rank has died.
    """
    start()
    load_deepspeed().init_distributed(verbose=False)
    try:
        vacant = PartialTeacher(config)
        vacant.drop_lower(first, embedding)
        sharing = _Sharing(vacant, default_device())
        with peer_loss_reported():
            vacant.fill(sharing.device, sharing.share)
            teacher = vacant.teacher
            gather = Gatherer()
            for module in _units(teacher):
                gather.watch(module)
            gather.expect(sharing.shared)
            head = teacher.model.get_output_embeddings()
            teacher.library = teacher.stack = ShardedStack(teacher.library, gather, head)
            teacher.peers = _any_rank_works
            size = teacher.weight_bytes + sum(part.numel() * part.element_size() for part in _parts(sharing.shared))
            return vacant.finished("zero3", size, world_size())
    except PartError as error:
        raise TeacherError(
            f"{config.model} cannot be sharded over ranks: {error}\n"
            "remove teacher.sharding, or spread the teacher over the devices of one process: teacher.device_map=auto"
        ) from error


class _Sharing:
    """Shards parameters one by one as they are read."""

    def __init__(self, vacant: PartialTeacher, device: torch.device) -> None:
        self._vacant, self.device = vacant, device
        self.shared: list[nn.Parameter] = []

    def share(self, name: str, empty: nn.Parameter) -> nn.Parameter:
        """Return this rank's part of parameter `name`, of the shape and dtype of `empty`. A collective."""
        if is_main():
            value = self._vacant.files.read(name).to(self.device, empty.dtype)
        else:
            value = torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
        made = nn.Parameter(value, requires_grad=False)
        if made.numel() <= WHOLE_ELEMENTS and made.dim() < 2:
            torch.distributed.broadcast(made.data, 0)
            return made
        holder = nn.Module()
        holder.register_parameter("part", made)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        load_deepspeed().zero.Init(
            module=holder, config_dict_or_path=settings, mem_efficient_linear=False, dtype=empty.dtype
        )
        self.shared.append(made)
        return made


class Gatherer:
    """Gathers the parameters of one module at a time: those of the module that runs, until another one runs."""

    def __init__(self) -> None:
        self._held: tuple[int, ...] = ()
        self._stack = ExitStack()
        self._covered: set[int] = set()

    def watch(self, module: nn.Module) -> None:
        """Gather the module's sharded parameters each time before it runs."""
        parameters = _shared(module)
        self._covered.update(map(id, parameters))
        module.register_forward_pre_hook(lambda *_: self._hold(parameters))

    def hold(self, module: nn.Module) -> None:
        """Gather a module's sharded parameters. A collective, unless they are gathered already."""
        self._hold(_shared(module))

    def expect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raise PartError when a parameter belongs to no watched module."""
        if any(id(parameter) not in self._covered for parameter in parameters):
            raise PartError("it has weights outside of its embedding, layers and head")

    def _hold(self, parameters: list[nn.Parameter]) -> None:
        wanted = tuple(map(id, parameters))
        if wanted == self._held or not parameters:
            return
        # not in inference mode: training may save weights that collecting gathered for its backward pass
        with peer_loss_reported(), torch.inference_mode(False), torch.no_grad():
            self._stack.close()
            self._held = ()
            self._stack.enter_context(load_deepspeed().zero.GatheredParameters(parameters, modifier_rank=None))
            self._held = wanted


class ShardedStack:
    """The library's layers over gathered weights.

    With gradients a layer runs again in the backward pass and its weights are gathered a second time, so no weights
    stay whole in between.
    """

    name = "zero3"

    def __init__(self, library: Stack, gather: Gatherer, head: nn.Module) -> None:
        self._library, self._gather, self._head = library, gather, head

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        return self._library.rotary(hidden, positions)

    def norm(self, hidden: Tensor) -> Tensor:
        return self._library.norm(hidden)

    def head(self, normed: Tensor) -> Tensor:
        """Return logits. The backward pass reads the weights gathered now, even after they are sharded again."""
        self._gather.hold(self._head)
        whole = {name: parameter.detach() for name, parameter in self._head.named_parameters()}
        return functional_call(self._head, whole, (normed,))

    def head_weight(self) -> Tensor:
        """Return the head's weight (V, d), valid until another module runs. A collective."""
        self._gather.hold(self._head)
        return self._head.weight.detach()  # type: ignore[operator]

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        arguments = (index, hidden, rotary, positions, mask, cache)
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return self._library.layer(*arguments)
        run: Callable[..., Any] = self._library.layer
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


def _units(teacher: Teacher) -> Iterator[nn.Module]:
    """Yield the modules that are gathered as a whole: the embedding, each layer, the head."""
    yield teacher.model.get_input_embeddings()
    for layer in teacher.layers.children():
        if not isinstance(layer, MissingLayer):
            yield layer
    yield teacher.model.get_output_embeddings()


def _shared(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]


def _parts(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.ds_tensor for parameter in parameters]  # type: ignore[attr-defined]


def _any_rank_works(work: bool) -> bool:
    """Return True if `work` is True on any rank. A collective."""
    flag = torch.tensor([float(work)], device=default_device())
    with peer_loss_reported():
        torch.distributed.all_reduce(flag)
    return bool(flag.item())
