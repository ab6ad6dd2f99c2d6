"""One model over several processes: each keeps a part of every tensor, and all of a layer only while it computes it.

``fully_shard`` of torch gathers a layer's parameters before its forward and its backward pass, and sums and cuts its
gradients behind that. Each of these is a message that every process sends, so all must run every layer equally often,
whatever their samples are: they agree on how often the language model is called for a micro-batch, and whoever has
fewer calls makes calls of one token for nothing. So do blocks of encoders that train, which a process without images
calls without computing. What else trains outside the layers is gathered for the whole of a micro-batch; what is frozen
there would be, too, so each process holds it whole.

In bf16 there are no fp32 numbers of frozen parts on the device: computing would round them each time. What a stage
writes has them as they were; until then they lie in the host's memory.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from manyeyes.errors import RecipeError, SourceError
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.model.language_model import decoder_layers, decoder_of
from manyeyes.model.stored import Stored
from manyeyes.recipe import StageSpec
from manyeyes.runtime.sessions import memory_limit
from manyeyes.training.batches import Batch
from manyeyes.training.encoder_parts import Skippable, encoder_parts
from manyeyes.training.processes import Processes

_LAYERS_OF_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def shards(model: nn.Module, spec: StageSpec, *, processes: Processes) -> bool:
    """Whether each process is to hold a part of a model alone; the same in all of them.

    Args:
        model: What trains requires gradients.
        spec: The stage, whose ``sharding`` decides.
        processes: Who takes part.
    """
    if processes.device.type == "cuda":
        # As the estimate counts, to which a GPU of 80 GB has 80e9 bytes.
        memory = int(torch.cuda.get_device_properties(processes.device).total_memory / 1.07)
    else:
        memory = memory_limit() // int(os.environ.get("LOCAL_WORLD_SIZE", str(processes.size)))
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    wanted = spec.shards(
        processes=processes.size,
        parameters=sum(count for count, _ in counts),
        trained=sum(count for count, trains in counts if trains),
        frozen_matrices=sum(parameter.numel() for _, parameter in matrices(model) if not parameter.requires_grad),
        memory_bytes=memory,
    )
    return processes.maximum(wanted) > 0


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of linear layers and convolutions alone, by name, each once: autocast rounds these, and no others."""
    of_layers: dict[nn.Parameter, str] = {}
    others: set[nn.Parameter] = set()
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(place, recurse=False):
            if type(module) in _LAYERS_OF_MATRICES and parameter.is_floating_point():
                of_layers.setdefault(parameter, name)
            else:  # an embedding's, which a head may share
                others.add(parameter)
    return [(name, parameter) for parameter, name in of_layers.items() if parameter not in others]


class WholeLoss:
    """The loss of a micro-batch, where every process holds the whole model.

    Args:
        model: Moved to the device.
        compute: The loss of a batch.
        processes: Who else takes part.
        precision: With ``bf16``, what of the frozen parts autocast would round each time is held in it.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: Callable[[Batch], Tensor],
        *,
        processes: Processes,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self._model = model
        self._compute = compute
        self._originals: dict[str, Tensor] = {}
        for name, parameter in matrices(model) if precision == "bf16" else ():
            if not parameter.requires_grad:
                if processes.is_main:
                    self._originals[name] = parameter.detach().cpu()
                parameter.data = parameter.detach().to(torch.bfloat16)
        model.to(processes.device)

    def restore_frozen(self) -> None:
        """Give the main process's frozen parts the numbers that they had, in place."""
        _put_back(self._model, self._originals)

    def agree(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch | None, int]]:
        """As ``ShardedLoss.agree``; there is nothing to agree on."""
        # No generator: that would hold a batch while the next one is made.
        return map(_with_calls, batches)

    def __call__(self, batch: Batch | None, calls: int) -> Tensor:  # noqa: ARG002
        """As ``ShardedLoss.forward``."""
        assert batch is not None
        return self._compute(batch)


def _with_calls(batch: Batch) -> tuple[Batch | None, int]:
    return batch, batch.num_calls


class ShardedLoss(nn.Module):
    """The loss of a micro-batch, as the one forward pass that torch's hooks know.

    Args:
        model: Its parameters become parts, in place. That of the main process has the values that are not stored; the
            others' may be on the meta device.
        compute: The loss of a batch.
        processes: Who holds the other parts.
        precision: ``bf16`` gathers parameters in it, and holds frozen ones in it; parts of what trains, sums of
            gradients and moments stay fp32.
        stored: Tensors of the model whose values are in files.

    Raises:
        SourceError: A file is missing or damaged.
    """

    model: ManyEyesForConditionalGeneration

    def __init__(
        self,
        model: ManyEyesForConditionalGeneration,
        compute: Callable[[Batch], Tensor],
        *,
        processes: Processes,
        precision: Literal["fp32", "bf16"],
        stored: Stored,
    ) -> None:
        super().__init__()
        self.model = model
        self._compute = compute
        self._processes = processes
        self._hidden: list[Tensor] = []
        decoder = decoder_of(model.language_model)
        decoder.register_forward_pre_hook(_make_differentiable, with_kwargs=True)
        decoder.register_forward_hook(self._keep_hidden)
        # What re-injection gives back is a view, in which nothing is changed.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        mesh = init_device_mesh(processes.device.type, (processes.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        self._parts = encoder_parts(model)
        for part in self._parts:
            part.forward = Skippable(part, _Zero.apply)  # type: ignore[method-assign, assignment]
        layers = [*self._parts, *_layers(model)]
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        whole = {id(each) for each in self.parameters() if not each.requires_grad and id(each) not in in_layers}
        delivery = _Delivery(model, mesh, processes, stored=stored, whole=whole, halve=precision == "bf16")
        self._originals = delivery.originals
        # A layer at a time, so that a device never holds the whole model.
        for module in (*layers, self):
            delivery.deliver(module)
            ignored = {each for each in module.parameters() if not each.requires_grad} if module is self else None
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            # The loss is divided already; and gloo knows plain sums alone.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)

    def agree(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch | None, int]]:
        """This process's micro-batches, and what the others need it to do besides.

        Returns:
            A micro-batch, None once there are no more here, and how often each process calls the language model.
        """
        while True:
            held = [next(batches, None)]
            calls = self._processes.maximum(0 if held[0] is None else held[0].num_calls)
            if calls == 0:
                return
            yield held.pop(), calls  # held here, it would be in memory when the next one is made

    def forward(self, batch: Batch | None, calls: int) -> Tensor:
        """Loss summed over the supervised tokens.

        Args:
            batch: None where this process has none.
            calls: Of the language model, in all processes.
        """
        self._hidden = []
        # Made first, so its backward pass runs last, when what was used has its gradient. The messages are cut alike in
        # all processes only where everything has one.
        here = [each for each in self.parameters() if each.requires_grad and not isinstance(each, DTensor)]
        loss: Tensor = _Zero.apply(self._processes.device, *here)
        if batch is None or not (batch.pixel_values or batch.features):
            passed = torch.zeros((), device=self._processes.device, requires_grad=True)
            for part in self._parts:
                passed = part(passed, skipped=True)
            loss = loss + passed
        if batch is not None:
            loss = loss + self._compute(batch)
        table = self.model.language_model.get_input_embeddings().weight
        while len(self._hidden) < calls:
            decoder_of(self.model.language_model)(
                inputs_embeds=table.new_zeros(1, 1, table.shape[1]),
                position_ids=torch.zeros(1, 1, dtype=torch.long, device=table.device),
                use_cache=False,
            )
        # Only keys and values of a prefix are looked at; its last layer would never be told that backward begins.
        total: Tensor = loss + _Zero.apply(self._processes.device, *self._hidden)
        self._hidden = []
        return total

    def restore_frozen(self) -> None:
        """Give frozen parts the numbers that they had, in place; of what each process has whole, the main process's."""
        _put_back(self.model, self._originals)

    def _keep_hidden(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        self._hidden.append(output.last_hidden_state)


class _Delivery:
    """Brings tensors to the devices of all, one at a time: from files what is stored, else from the main process.

    Of what is stored, a process reads no more than the rows of its part; the rest of the tensor is memory that has no
    values, which ``fully_shard`` drops.

    Attributes:
        originals: What came as bf16 and was more, on the host: this process's parts, and what the main one has whole.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        processes: Processes,
        *,
        stored: Stored,
        whole: set[int],
        halve: bool,
    ) -> None:
        self._mesh = mesh
        self._processes = processes
        self._brought: dict[int, Tensor] = {}
        self._done: set[nn.Module] = set()
        # By what was there at the beginning; whole is what each process holds whole.
        self._stored = {id(tensor): found for tensor, found in stored.items()}
        self._whole = whole | {id(buffer) for buffer in model.buffers()}
        # Of what is frozen and to come as bf16, its name.
        self._halved = {id(each): name for name, each in model.named_parameters() if halve and _is_halved(each)}
        self.originals: dict[str, Tensor] = {}
        own = [(name, tuple(tensor.shape), str(tensor.dtype), tensor in stored) for name, tensor in _tensors(model)]
        if processes.from_main(own) != own:
            raise SourceError(
                "this process finds other weights than the first one",
                "the same files for every process",
                "Let all nodes mount the same volume, or fetch the sources again.",
            )

    def deliver(self, module: nn.Module) -> None:
        """Bring a module's parameters and buffers, and what else of tensors its modules have."""
        # Or what has been cut into parts would stay here whole.
        self._brought.clear()
        # An id may be given anew once a tensor is gone: nothing is looked up but what was there at the beginning.
        modules = [each for each in module.modules() if each not in self._done]
        self._done.update(modules)
        for each in modules:
            homes: tuple[dict[str, Any], ...] = (each._parameters, each._buffers, vars(each))
            for home in homes:
                for name, tensor in home.items():
                    if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                        home[name] = self._bring(tensor)

    def _bring(self, tensor: Tensor) -> Tensor:
        known = self._brought.get(id(tensor))
        if known is not None:
            return known
        device = self._processes.device
        stored = self._stored.get(id(tensor))
        place = None
        if id(tensor) not in self._whole and (stored is not None or id(tensor) in self._halved):
            place = _place(tensor.shape, self._mesh, (Shard(0),))
        if self._processes.is_main and stored is None:
            here = tensor.detach().to(device).contiguous()
        else:
            here = torch.empty_like(tensor, device=device, requires_grad=False)
        if stored is None:
            self._processes.send_from_main(here)
        else:
            (here if place is None else here[place]).copy_(stored.read(place))
        if id(tensor) in self._halved:
            name = self._halved[id(tensor)]
            if place is not None:
                self.originals[name] = here[place].to("cpu", copy=True)
            elif self._processes.is_main:
                self.originals[name] = here.cpu()
            here = here.to(torch.bfloat16)
        brought = here
        if isinstance(tensor, nn.Parameter):
            brought = nn.Parameter(here, requires_grad=tensor.requires_grad)
        # What is tied inside a module stays so, and is not sent twice.
        self._brought[id(tensor)] = brought
        return brought


def _is_halved(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad and parameter.dtype == torch.float32


def _place(shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[slice, ...]:
    """Where this process's part of a tensor is."""
    sizes, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, sizes, strict=True))


def _put_back(model: nn.Module, originals: dict[str, Tensor]) -> None:
    """Give parameters by name other numbers, and forget those."""
    news: dict[nn.Parameter, nn.Parameter] = {}
    while originals:
        name, values = originals.popitem()
        old = model.get_parameter(name)
        values = values.to(old.device)
        if isinstance(old, DTensor):
            values = DTensor.from_local(
                values, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
            )
        news[old] = nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = news.get(parameter, parameter)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for place, module in model.named_modules():
        for home in (module._parameters, module._buffers, vars(module)):
            for name, tensor in home.items():
                if isinstance(tensor, Tensor):
                    yield f"{place}.{name}", tensor


class _Zero(torch.autograd.Function):
    """Zero, whatever it comes from: a product with zero would be no number where padding is none."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, *sources: Tensor) -> Tensor:
        ctx.sources = [(source.shape, source.dtype, source.device) for source in sources]
        return torch.zeros((), device=device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ARG004
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.sources)
        return None, *zeros


def _make_differentiable(
    decoder: nn.Module,  # noqa: ARG001
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Text alone in front of frozen layers has no backward pass; another process's images have.
    embeds = kwargs["inputs_embeds"]
    if torch.is_grad_enabled() and not embeds.requires_grad:
        kwargs = {**kwargs, "inputs_embeds": embeds.detach().requires_grad_()}
    return args, kwargs


def _layers(model: ManyEyesForConditionalGeneration) -> Sequence[nn.Module]:
    try:
        return list(decoder_layers(model.language_model))
    except RecipeError:  # it is gathered as a whole
        return []


@torch.no_grad()
def add_to_part(part: DTensor, full: Tensor) -> None:
    """Add a tensor to one of which this process holds a part, in place."""
    place = _place(part.shape, part.device_mesh, part.placements)
    part.to_local().add_(full[place].to(part.dtype))


def gather_tensor(tensor: Tensor, processes: Processes) -> Tensor:
    """The whole of a tensor, on the CPU of the main process; what is a part is empty elsewhere."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    with processes.computing_together():
        full: Tensor = tensor.full_tensor().detach()
    return full.cpu() if processes.is_main else full.to("meta")


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, processes: Processes) -> float:
    """Scale gradients so that their norm over all processes is at most ``max_norm``.

    Args:
        parameters: Whole here, or parts of which each process has its own.
        max_norm: What torch's ``clip_grad_norm_`` takes.
        processes: Who has the other parts.

    Returns:
        The norm before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return nn.utils.clip_grad_norm_(parameters, max_norm).item()
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    norm = processes.sum(nn.utils.get_total_norm(parts).square()).sqrt()
    torch._foreach_mul_(parts, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm.item()


def parts_of(
    model: nn.Module, groups: Mapping[str, list[tuple[str, nn.Parameter]]]
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The same groups, with what the parameters of those names are now."""
    return {group: [(name, model.get_parameter(name)) for name, _ in pairs] for group, pairs in groups.items()}


def make_whole(modules: Iterable[nn.Module]) -> None:
    """Give every process the whole of the modules' own parameters, in place; for what is small, and trained no more."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(parameter.full_tensor().detach(), requires_grad=False)
