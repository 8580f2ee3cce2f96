"""From a source to a model on its ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from psyche_fast import compat
from psyche_fast.config import Model as ModelOptions
from psyche_fast.devices import working_dtype
from psyche_fast.models import building, huggingface, parallel, registry, weights
from psyche_fast.models.attention import choose_attention
from psyche_fast.models.causal_lm import CausalLM
from psyche_fast.models.source import ModelSource, read_config, tensor_shapes
from psyche_fast.models.tensor_parallel import tensor_parallel

log = logging.getLogger(__name__)

_RECOMPILE_LIMIT = 64


def load_model(
    source: ModelSource,
    *,
    architecture: str = "HfAuto",
    device: torch.device,
    param_dtype: torch.dtype = torch.bfloat16,
    master_dtype: torch.dtype = torch.bfloat16,
    save_dtype: torch.dtype | None = None,
    shard_mesh: DeviceMesh | None = None,
    tensor_mesh: DeviceMesh | None = None,
    group: dist.ProcessGroup | None = None,
    attn_implementation: str = "sdpa",
    sequence_length: int | None = None,
    activation_checkpointing: bool = False,
    liger: bool = False,
    loss: str = "plain",
    compile_blocks: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> CausalLM:
    """Loads this rank's part of a model; with meshes, all their ranks have to call it.

    The module is built without weights, split, allocated on `device`, and filled from the
    checkpoint, each rank reading its own part.

    Args:
        source: files, or tensors from rank 0.
        architecture: see `registry.resolve`.
        device: where the parameters go.
        param_dtype: the parameters' type in forward and backward.
        master_dtype: torch.float32 for fp32 copies of parameters of a narrower type besides, from
            the checkpoint's unrounded values; torch.bfloat16 for none.
        save_dtype: the type that parameters of `param_dtype` have in checkpoints; None for theirs.
        shard_mesh: ranks to shard over with FSDP2; None for one.
        tensor_mesh: ranks to split each layer over; None for one. Where both are given they are
            slices of one mesh.
        group: all ranks of both meshes; to be given where there are two.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
        sequence_length: tokens per row, which the model's positions have to cover.
        activation_checkpointing: recompute activations in backward.
        liger: use Liger-Kernel's kernels.
        loss: see `CausalLM`; without meaning where Liger's kernels compute it.
        compile_blocks: compile each of the transformer's blocks with `torch.compile`.
        compute_dtype: with a `shard_mesh` the type of forward and backward; None for `param_dtype`.

    Raises:
        ValueError: the model cannot be loaded as asked; what and why.
    """
    meshes = [mesh for mesh in (shard_mesh, tensor_mesh) if mesh is not None]
    if group is None and meshes:
        assert len(meshes) == 1, "two meshes want the group of their ranks"
        group = meshes[0].get_group()
    config = read_config(source)
    module = _build(config, architecture, param_dtype, attn_implementation, sequence_length)
    class_name, blocks = type(module).__name__, list(parallel.blocks(module))
    aliases = building.tied_names(module)
    with weights.open_reader(source) as reader:
        plan = _plan(module, reader)
        if isinstance(module, PreTrainedModel):
            config = module.config.to_dict()
        if liger:
            _apply_liger(module, device, tensor_mesh)
        if tensor_mesh is not None:
            tensor_parallel(
                module, tensor_mesh, getattr(module, "config", None), aliases,
                in_compiled_blocks=compile_blocks,
            )  # fmt: skip
        if compile_blocks:
            _compile_blocks(module)
        if activation_checkpointing:
            _checkpoint_activations(module)
        if shard_mesh is not None:
            parallel.shard(module, shard_mesh, compute_dtype)
        building.materialise(module, device, aliases)
        masters = building.master_copies(module) if master_dtype == torch.float32 else {}
        weights.load_weights(module, reader, plan, aliases, masters)
    log.info("%s with %s attention on %s", class_name, attn_implementation, device)
    return CausalLM(
        module,
        config=config,
        device=device,
        attn_implementation=attn_implementation,
        architecture=architecture,
        class_name=class_name,
        blocks=blocks,
        shard_mesh=shard_mesh,
        tensor_mesh=tensor_mesh,
        group=group,
        fused_loss=liger,
        masters=masters,
        saved_as=(param_dtype, save_dtype or param_dtype),
        loss=loss,
    )


def load_configured(
    source: ModelSource, options: ModelOptions, *, device: torch.device, **meshes: Any
) -> CausalLM:
    """`load_model` as a run's configuration has it.

    Args:
        source: the model.
        options: the run's.
        device: where the parameters go.
        **meshes: `shard_mesh`, `tensor_mesh` and `group` of `load_model`.

    Raises:
        ValueError: the model cannot be loaded as asked; what and why.
    """
    dtype = working_dtype(options.param_dtype, options.master_dtype, device.type)
    return load_model(
        source,
        architecture=options.python_arch,
        device=device,
        param_dtype=getattr(torch, dtype),
        master_dtype=getattr(torch, options.master_dtype),
        save_dtype=getattr(torch, options.save_dtype or dtype),
        attn_implementation=choose_attention(
            options.attn_implementation, device.type, read_config(source).get("model_type")
        ),
        sequence_length=options.sequence_length,
        activation_checkpointing=options.activation_checkpointing,
        liger=options.liger,
        loss=options.loss,
        compile_blocks=options.compile,
        **meshes,
    )


def without_weights(source: ModelSource, options: ModelOptions) -> CausalLM:
    """A model of which there are names, sizes, types and configuration, but no numbers.

    What is read of it comes from elsewhere: `CausalLM.full_state_dict_iter(read)`.

    Args:
        source: the model's files, of which the headers are looked at: in their form it is saved.
        options: the run's.

    Raises:
        ValueError: the model cannot be built.
    """
    config = read_config(source)
    assert options.param_dtype != "auto", "what a run has trained has a type"
    dtype: torch.dtype = getattr(torch, options.param_dtype)
    module = _build(config, options.python_arch, dtype, "eager", options.sequence_length)
    _plan(module, weights.ShapesReader(tensor_shapes(source)))  # sets in which form
    class_name, aliases = type(module).__name__, building.tied_names(module)
    module.to("meta")
    building.tie(module, aliases)
    if isinstance(module, PreTrainedModel):
        config = module.config.to_dict()
    wide = options.master_dtype == "float32"
    return CausalLM(
        module,
        config=config,
        device=torch.device("meta"),
        attn_implementation="eager",
        architecture=options.python_arch,
        class_name=class_name,
        blocks=parallel.blocks(module),
        masters=building.master_copies(module) if wide else {},
        saved_as=(dtype, getattr(torch, options.save_dtype or options.param_dtype)),
    )


def check_fit(
    source: ModelSource,
    architecture: str = "HfAuto",
    *,
    attn_implementation: str = "eager",
    sequence_length: int | None = None,
) -> None:
    """Checks that a checkpoint has the tensors that its `config.json` promises; loads none.

    Args:
        source: the model; of its tensors only names and shapes are read.
        architecture: see `load_model`, as for the rest.
        attn_implementation: what attends.
        sequence_length: tokens per row.

    Raises:
        ValueError: the model cannot be built, or other tensors are wanted; what and why.
    """
    config = read_config(source)
    module = _build(config, architecture, torch.float32, attn_implementation, sequence_length)
    reader = weights.ShapesReader(tensor_shapes(source))
    plan, aliases = _plan(module, reader), building.tied_names(module)
    weights.load_weights(module.to("meta"), reader, plan, aliases, {})


def parameter_shapes(
    config: dict[str, Any], architecture: str = "HfAuto"
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, tied ones once, in ascending order of the names.

    Args:
        config: `config.json`.
        architecture: see `load_model`.

    Raises:
        ValueError: the model cannot be built; what and why.
    """
    module = _build(config, architecture, torch.float32, "eager", None)
    return {name: tuple(p.shape) for name, p in sorted(module.named_parameters())}


def _build(
    config: dict[str, Any],
    architecture: str,
    param_dtype: torch.dtype,
    attn_implementation: str,
    sequence_length: int | None,
) -> nn.Module:
    builder = registry.resolve(architecture)
    if builder is None:
        return huggingface.build(config, param_dtype, attn_implementation, sequence_length)
    return _build_other(builder, architecture, config, param_dtype)


def _plan(module: nn.Module, reader: weights.Reader) -> weights.LoadPlan:
    if isinstance(module, PreTrainedModel):
        return huggingface.plan_load(module, list(reader.shapes))
    return weights.plan_by_name(module, reader.shapes)


def _build_other(
    builder: registry.Builder, architecture: str, config: dict[str, Any], param_dtype: torch.dtype
) -> nn.Module:
    with building.parameters_on_meta():
        module = builder(config)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"--python-arch {architecture}: wanted an nn.Module, got {type(module).__name__}"
        )
    # Only the parameters: buffers keep the precision that they were computed in.
    for param in module.parameters():
        if param.is_floating_point():
            param.data = param.data.to(param_dtype)
    return module


def _blocks(module: nn.Module, flag: str) -> Iterable[nn.Module]:
    found = parallel.blocks(module)
    if not found:
        raise ValueError(
            f"{flag}: {type(module).__name__} has no nn.ModuleList and no fsdp_modules to find its "
            "blocks by"
        )
    return found.values()


def _compile_blocks(module: nn.Module) -> None:
    # Blocks of one class share their code, and with it dynamo's count of recompilations: kinds of
    # layers (sliding windows, with and without experts) times shapes of batches. Beyond the limit
    # it would go on without compiling.
    compat.allow_recompilations(_RECOMPILE_LIMIT)
    for block in _blocks(module, "--compile"):
        # The method, not the module: checkpointing and the hooks of FSDP2 and tensor parallelism
        # stay outside, and names stay as they are.
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _checkpoint_activations(module: nn.Module) -> None:
    if isinstance(module, PreTrainedModel):
        huggingface.enable_activation_checkpointing(module)
        return
    for block in _blocks(module, "--activation-checkpointing"):
        forward = block.forward

        # On the method rather than by a wrapper module, which would change the parameters' names.
        def recomputed(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return _forward(*args, **kwargs)
            return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

        block.forward = recomputed  # type: ignore[method-assign]


def _apply_liger(module: nn.Module, device: torch.device, tensor_mesh: DeviceMesh | None) -> None:
    if not isinstance(module, PreTrainedModel):
        raise ValueError(f"--liger: Liger-Kernel has no kernels for {type(module).__name__}")
    if tensor_mesh is not None:
        raise ValueError("--liger does not work with --tensor-parallelism; use one of them")
    huggingface.apply_liger(module, device)
