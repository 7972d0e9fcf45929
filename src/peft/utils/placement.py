"""Where the numbers of a parameter are, when they are not simply in it.

- Off-loaded by accelerate: between calls the parameters of a layer are empty (meta device), and before a call the
  layer's hook brings the numbers from a mapping that keeps them in memory or on disk.
- Sharded over processes, by FSDP2 (a `DTensor`) or by DeepSpeed ZeRO-3 (it has a `ds_id`): every process holds a part.
  Reading and writing are collective then: all processes must call in the same order.

Left out: what FSDP1 has flattened into one parameter per block cannot be read layer by layer, and is refused. DeepSpeed
is imported only where a parameter is one of its own, accelerate never: only its hooks are called.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, MutableMapping

import torch
from torch import nn


def align_hooks(module: nn.Module) -> list:
    """accelerate's `AlignDevicesHook`s on a module, in the order in which they run."""
    hook = module.__dict__.get("_hf_hook")  # not getattr: wrappers pass unknown names on to the module inside
    return [h for h in getattr(hook, "hooks", (hook,)) if hasattr(h, "execution_device") and hasattr(h, "offload")]


def offload_hook(module: nn.Module):
    """The hook that brings the module's numbers and takes them away again, or None. The last one has the last word."""
    return next((hook for hook in reversed(align_hooks(module)) if hook.offload), None)


def home_device(module: nn.Module) -> torch.device:
    """Where a module's adapters belong: with its parameters, or where accelerate brings these when they are needed."""
    for owner in module.modules():
        # Some libraries keep packed weights in buffers.
        for tensor in (t for held in (owner._parameters, owner._buffers) for t in held.values() if t is not None):
            device = tensor.device
            for hook in align_hooks(owner) if tensor.is_meta else ():
                if hook.execution_device is not None:  # it may be 0, the first GPU
                    device = torch.device(hook.execution_device)
            return device
    return torch.device("cpu")


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within this context the numbers of an off-loaded module are here; what is written into them is lost.

    Raises:
        RuntimeError: parameters are empty, and no hook can bring their numbers.
    """
    hook = offload_hook(module)
    tensors = [*module.parameters(recurse=hook is not None and hook.place_submodules)]
    if hook is not None and hook.offload_buffers:
        tensors += module.buffers(recurse=hook.place_submodules)
    if not any(tensor.is_meta for tensor in tensors):
        yield
        return
    if hook is None:
        raise RuntimeError(
            f"The weight of {type(module).__name__} is empty (meta device) and has no accelerate hook of its own that "
            "could bring its numbers, which this needs: load the model's weights first, or dispatch it without "
            "preload_module_classes"
        )
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, None)


@contextlib.contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """Within this context `module.forward` is without accelerate's hooks, which would bring the layer's own weight."""
    hooked = module.__dict__.get("forward") if "_hf_hook" in module.__dict__ else None
    if hooked is None:
        yield
        return
    module.forward = module._old_forward
    try:
        yield
    finally:
        module.forward = hooked


_ABSENT = object()


class OffloadedTensor:
    """One tensor of an off-loaded module in the mapping that its hook reads from.

    In memory the mapping's entry is replaced. On disk nothing is overwritten (the file may be the model's checkpoint,
    or serve the next run): the new numbers go into a file beside the others in the off-load folder, and only this
    process's index names it.

    Attributes:
        tied: another entry of the mapping holds the same memory; replacing this one parts them.
    """

    def __init__(self, module: nn.Module, name: str):
        self.hook, self.name = offload_hook(module), name
        mapping, key = self.hook.weights_map, name
        while hasattr(mapping, "dataset") and hasattr(mapping, "prefix"):  # accelerate's PrefixedDataset
            mapping, key = mapping.dataset, mapping.prefix + key
        self.folder = None
        self.on_disk = False
        if hasattr(mapping, "state_dict") and hasattr(mapping, "index"):  # accelerate's OffloadedWeightsLoader
            self.on_disk = key in mapping.index and key not in mapping.state_dict
            self.folder = mapping.save_folder
            if self.on_disk:
                mapping = mapping.index
            else:
                if key not in mapping.all_keys:
                    mapping.all_keys.append(key)
                mapping = mapping.state_dict
        if not isinstance(mapping, MutableMapping):
            raise TypeError(
                f"The weight {key} is off-loaded to a {type(mapping).__name__}, which cannot be written to: load the "
                "model without off-loading"
            )
        self.mapping, self.key = mapping, key
        before = mapping.get(key, _ABSENT)
        self.is_new = before is _ABSENT
        self.tied = not (self.on_disk or self.is_new) and _holds_elsewhere(mapping, key, before)
        # Of memory that nobody else holds no second copy is kept.
        self._before = before if self.on_disk or self.tied else None
        self._file: str | None = None

    def write(self, value: torch.Tensor) -> None:
        """Let the hook bring `value` from now on.

        Raises:
            RuntimeError: the tensor is read from the model's own files and there is no folder to write to.
        """
        if self.is_new:
            # When the hooks are taken off, the new tensor has to come back with the others.
            self.hook.original_devices.setdefault(self.name, self.hook.original_devices["weight"])
        if not self.on_disk:
            self.mapping[self.key] = value.detach().to("cpu", copy=True)
            return
        if self.folder is None:
            raise RuntimeError(
                f"The weight {self.key} is off-loaded to disk, as a part of the model's own file, and there is no "
                "folder to write a changed one to: dispatch the model with offload_dir=... (transformers: "
                "offload_folder=...), or load it without off-loading to disk"
            )
        from safetensors.torch import save_file

        value = value.detach().cpu().contiguous()
        handle, path = tempfile.mkstemp(dir=self.folder, prefix=f"{self.key}.", suffix=".safetensors")
        os.close(handle)
        save_file({self.key: value}, path)
        self.mapping[self.key] = {
            "safetensors_file": path,
            "weight_name": self.key,
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        self._remove_file()
        self._file = path

    def restore(self) -> None:
        """Put back what was in the mapping before the first `write`, where it was kept."""
        if self.is_new:
            self.mapping.pop(self.key, None)
            self.hook.original_devices.pop(self.name, None)
        elif self._before is not None:
            self.mapping[self.key] = self._before
        self._remove_file()

    def _remove_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # some systems keep a file that is still mapped
                os.unlink(self._file)
        self._file = None


def _holds_elsewhere(mapping: MutableMapping, key: str, tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and any(
        other.data_ptr() == tensor.data_ptr()
        for name, other in mapping.items()
        if name != key and torch.is_tensor(other)
    )


# Sharded parameters


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned the parameter: it is empty outside of a gathering context."""
    return hasattr(tensor, "ds_id")


def is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def is_sharded(tensor: torch.Tensor) -> bool:
    return is_zero3(tensor) or is_dtensor(tensor)


def logical_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter; one of ZeRO-3 shows the shape of nothing."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.Tensor], write: bool = False) -> Iterator[None]:
    """Within this context parameters of ZeRO-3 are whole; if `write`, what the first process writes into them holds."""
    partitioned = [parameter for parameter in parameters if is_zero3(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a parameter that may be sharded, as a copy; itself where it is not sharded."""
    if is_dtensor(tensor):
        whole = tensor.full_tensor()
        with torch.no_grad():
            part = tensor.to_local().untyped_storage()
        # With one process, or replicated, the part is all of it, and `overwrite` would change what was read.
        return whole.clone() if whole.untyped_storage().data_ptr() == part.data_ptr() else whole
    if is_zero3(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()  # the gathered memory is given back
    return tensor


@torch.no_grad()
def overwrite(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write all of a sharded parameter: every process keeps its part of `value`, which all of them have."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = value.detach().to(parameter.device, parameter.dtype)
        parts = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(parts.to_local())
        return
    with gathered([parameter], write=True):
        parameter.data.copy_(value)


def refuse_flattened(layer: nn.Module) -> None:
    """Refuse a layer whose weight FSDP1 has flattened.

    Raises:
        RuntimeError: it has.
    """
    if torch.compiler.is_compiling():
        return  # the memory of a tensor cannot be asked for there
    weight = getattr(layer, "weight", None)  # packed ones may be called otherwise, and are never flattened
    has_memory = type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta
    is_freed = has_memory and weight.untyped_storage().nbytes() < weight.nbytes
    if getattr(weight, "_fsdp_flattened", False) or is_freed:
        raise RuntimeError(
            f"The weight of {type(layer).__name__} is flattened and sharded by FSDP1, and cannot be read or rewritten "
            "layer by layer: use FSDP2 (fully_shard), or save the adapter and merge it in one process"
        )


def reshard(model: nn.Module) -> None:
    """Let FSDP2 put its gathered parameters away, which a forward leaves behind: what is written into them is lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    # `fully_shard` makes a subclass for every class of modules that it shards.
    for module in model.modules() if kind is not None and kind.__subclasses__() else ():
        if isinstance(module, kind):
            module.reshard()


# Modules and whole models


@contextlib.contextmanager
def whole_modules(modules: Iterable[nn.Module], write: bool = False) -> Iterator[None]:
    """Within this context the modules' parameters are whole and here: sharded ones are stood in for by gathered ones.

    What is written into these is lost, unless `write`; what is written into off-loaded ones is lost.
    """
    with contextlib.ExitStack() as stack:
        stood_in = []
        for module in modules:
            stack.enter_context(onloaded(module))
            for name, parameter in module._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    whole = whole_tensor(parameter.detach() if is_dtensor(parameter) else parameter)
                    whole = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                    stack.callback(module._parameters.__setitem__, name, parameter)
                    module._parameters[name] = whole
                    stood_in.append((parameter, whole))
        yield
        for parameter, whole in stood_in if write else ():
            overwrite(parameter, whole)


def independent_copy(module: nn.Module) -> nn.Module:
    """A deep copy with the numbers in it, on the device where the module runs; its hooks move inputs, nothing else."""
    stand_ins = {}
    for part in module.modules():
        for hook in align_hooks(part):
            # The hook itself would copy all of the model's off-loaded weights along.
            stand_ins[id(hook)] = type(hook)(
                hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys
            )
    # Parts that are empty, with nothing to bring their numbers, stay so: those of a model whose weights come later.
    reachable = [
        part
        for part in module.modules()
        if offload_hook(part) is not None or not any(tensor.is_meta for tensor in part.parameters(recurse=False))
    ]
    with whole_modules(reachable):
        return copy.deepcopy(module, stand_ins)


def own_tensor(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """`(module, attribute)` that hold the tensor called `name` in `model.state_dict()`."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def whole_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` of a model, by their names in its state dict, with the numbers in them: gathered, or fetched.

    Raises:
        RuntimeError: a tensor is empty (meta device) and nothing can bring its numbers.
    """
    whole = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            module, attribute = own_tensor(model, name)
            with onloaded(module):
                tensor = getattr(module, attribute)
        whole[name] = whole_tensor(tensor).detach()
    return whole
