"""Teachers larger than a device: each rank keeps a part of every matrix (DeepSpeed ZeRO-3) and has one layer whole at a
time, gathered when it runs.

Gathering is a collective, so all ranks must run the same layers in the same order. Training does by itself; ranks that
share out other work ask `teacher.together` before each forward and run along until nobody has any left.
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
from firp_cli.teacher.attention import LayerMask
from firp_cli.teacher.library_layers import Cache, LibraryStack
from firp_cli.teacher.load import PartError, PartialTeacher, load_upper
from firp_cli.teacher.teacher import MissingLayer, Teacher

WHOLE_ELEMENTS = 1 << 14  # parameters of at most so many elements (norms, biases) are whole on every rank
ALONE = "one rank has nothing to share teacher.sharding=zero3 with: start more with --gpus"


def load_for_ranks(config: TeacherConfig, first: int = 0) -> Teacher:
    """The teacher as the recipe wants it on this rank, without its layers below `first`; every rank calls it.

    Raises TeacherError as `load_upper`, and for one that cannot be shared out.
    """
    if config.sharding == "none":
        return load_upper(config, first)
    if world_size() == 1:
        teacher = load_upper(config, first)
        teacher.loaded_weights = replace(teacher.loaded_weights, note=teacher.loaded_weights.note or ALONE)
        return teacher
    return load_sharded(config, first)


def load_sharded(config: TeacherConfig, first: int = 0) -> Teacher:
    """A teacher whose matrices are shared out over the ranks; every rank calls it. Rank 0 reads, one parameter at a
    time; no rank ever holds more than its share and one parameter, or later one layer.

    Raises TeacherError where the weights cannot be read parameter by parameter, LaunchError when a rank has died.
    """
    start()
    load_deepspeed().init_distributed(verbose=False)
    try:
        vacant = PartialTeacher(config)
        vacant.drop_lower(first)
        sharing = _Sharing(vacant, default_device())
        with peer_loss_reported():
            vacant.fill(sharing.device, sharing.share)
            teacher = vacant.teacher
            gather = Gatherer()
            for module in _units(teacher):
                gather.watch(module)
            gather.expect(sharing.shared)
            teacher.wrap_library(lambda library: ShardedStack(library, gather, teacher.model.get_output_embeddings()))
            teacher.peers = _any_works
            held = teacher.weight_bytes + sum(part.numel() * part.element_size() for part in _parts(sharing.shared))
            return vacant.finished("zero3", held, world_size())
    except PartError as error:
        raise TeacherError(
            f"{config.model} cannot be shared out over ranks: {error}\n"
            "leave teacher.sharding out, or spread it over one process's devices: teacher.device_map=auto"
        ) from error


class _Sharing:
    """Takes each parameter as it is read and leaves this rank its part."""

    def __init__(self, vacant: PartialTeacher, device: torch.device) -> None:
        self._vacant, self.device = vacant, device
        self.shared: list[nn.Parameter] = []

    def share(self, name: str, empty: nn.Parameter) -> nn.Parameter:
        """The parameter `name`, of the shape and dtype of `empty`; a collective."""
        if is_main():
            value = self._vacant.read(name).to(self.device, empty.dtype)
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
    """Has the parameters of one module whole at a time: of the one that runs, until another one does."""

    def __init__(self) -> None:
        self._held: tuple[int, ...] = ()
        self._stack = ExitStack()
        self._covered: set[int] = set()

    def watch(self, module: nn.Module) -> None:
        """Gather the module's shared parameters whenever it is about to run."""
        parameters = _shared(module)
        self._covered.update(map(id, parameters))
        module.register_forward_pre_hook(lambda *_: self._hold(parameters))

    def hold(self, module: nn.Module) -> None:
        """Gather a module's shared parameters; a collective unless they are the ones held."""
        self._hold(_shared(module))

    def expect(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raise PartError where a parameter belongs to no module that is watched."""
        if any(id(parameter) not in self._covered for parameter in parameters):
            raise PartError("it has weights outside of its embedding, layers and head")

    def _hold(self, parameters: list[nn.Parameter]) -> None:
        wanted = tuple(map(id, parameters))
        if wanted == self._held or not parameters:
            return
        # what collecting gathers in inference mode may still be held when training saves it for its backward pass
        with peer_loss_reported(), torch.inference_mode(False), torch.no_grad():
            self._stack.close()
            self._held = ()
            self._stack.enter_context(load_deepspeed().zero.GatheredParameters(parameters, modifier_rank=None))
            self._held = wanted


class ShardedStack:
    """The library's layers over gathered weights. Under gradients a layer runs again in the backward pass, when its
    weights are gathered a second time: none stay whole in between.
    """

    name = "zero3"

    def __init__(self, library: LibraryStack, gather: Gatherer, head: nn.Module) -> None:
        self._library, self._gather, self._head = library, gather, head

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        return self._library.rotary(hidden, positions)

    def norm(self, hidden: Tensor) -> Tensor:
        return self._library.norm(hidden)

    def head(self, normed: Tensor) -> Tensor:
        """Logits; the backward pass reads the weights as they are gathered now, wherever they are cut up meanwhile."""
        self._gather.hold(self._head)
        whole = {name: parameter.detach() for name, parameter in self._head.named_parameters()}
        return functional_call(self._head, whole, (normed,))

    def head_weight(self) -> Tensor:
        """(V, d), whole until another module runs. A collective."""
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
    """What is gathered at once: the embedding, a layer, the head."""
    yield teacher.model.get_input_embeddings()
    for layer in teacher.layers.children():
        if not isinstance(layer, MissingLayer):
            yield layer
    yield teacher.model.get_output_embeddings()


def _shared(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]


def _parts(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.ds_tensor for parameter in parameters]  # type: ignore[attr-defined]


def _any_works(work: bool) -> bool:
    """Whether any rank has work; a collective."""
    flag = torch.tensor([float(work)], device=default_device())
    with peer_loss_reported():
        torch.distributed.all_reduce(flag)
    return bool(flag.item())
