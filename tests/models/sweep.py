"""What the sweep asks of one causal language model, whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.core.estimate import estimate
from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.source import read_config, resolve_model
from psyche_fast.rank.checkpoint import save_model
from tests.models.tiny import tiny_config

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
LENGTHS = [[5, 11], [16]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE = 0.1


def write(model_type: str, folder: Path) -> Path:
    """Saves a tiny model whose state is nowhere zero, one or a bf16 number."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.02)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    """This rank's part, with the attention that `auto` takes on a CPU."""
    source = resolve_model(str(folder))
    attention = choose_attention("auto", "cpu", read_config(source)["model_type"])
    return load_model(
        source, device=torch.device("cpu"), param_dtype=dtype, attn_implementation=attention,
        **options,
    )  # fmt: skip


def losses_and_gradients(folder: Path, kind: str) -> None:
    """Loss, logits and every gradient are those of `from_pretrained`."""
    dtype = DTYPES[kind]
    model = load(folder, dtype)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=model.attn_implementation
    ).train()
    reference.load_state_dict(tensors(folder), strict=False)  # some set a buffer after loading
    state = model.module.state_dict()
    for name, tensor in reference.state_dict().items():
        assert state[name].dtype == tensor.dtype, f"{name}: {state[name].dtype}, {tensor.dtype}"
        assert torch.equal(state[name], tensor), name
    model.train()
    balanced = _balance(reference, True)
    torch.manual_seed(1)
    try:
        output = reference(input_ids=IDS, use_cache=False, **({"labels": IDS} if balanced else {}))
    except IndexError:  # without the layers that it is about, some fail
        _balance(reference, balanced := False)
        output = reference(input_ids=IDS, use_cache=False)
    except RuntimeError as error:
        raise ValueError(f"Transformers itself fails: {error}") from error
    _balance(model.module, balanced)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    if getattr(output, "aux_loss", None) is not None:
        assert output.aux_loss > 0
        expected = output.loss
    expected.backward()
    torch.manual_seed(1)
    loss = model.loss(Batch(IDS))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    found = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    compare(found, wanted, rtol=1e-5, atol=1e-7)


def _balance(module: torch.nn.Module, wanted: bool) -> bool:
    """Asks for the routers' loss of balance, where there is one."""
    configs = [module.config, module.config.get_text_config()]
    known = [config for config in configs if hasattr(config, "output_router_logits")]
    for config in known:
        config.output_router_logits = wanted
    return bool(known)


def long_rows(folder: Path) -> None:
    """Rows longer than the model was made for give what `from_pretrained` gives, or are refused."""
    ids = torch.randint(3, 96, (1, 96), generator=torch.Generator().manual_seed(2))
    model = load(folder, sequence_length=96)
    model.eval()
    with torch.no_grad():
        loss = model.loss(Batch(ids))
        assert loss.isfinite()
        if model.config == load(folder).config:
            reference = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=model.attn_implementation
            )
            logits = reference(input_ids=ids, use_cache=False).logits[0, :-1]
            expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def reload(folder: Path) -> None:
    """What is saved is what was read, and loads again."""
    again = folder.with_name(f"{folder.name}-again")
    model = load(folder)
    save_model(again, model, model.full_state_dict_iter(), [])
    compare(tensors(again), tensors(folder))
    AutoModelForCausalLM.from_pretrained(again)
    loaded = load(again)
    torch.testing.assert_close(model.loss(Batch(IDS)), loaded.loss(Batch(IDS)), rtol=0, atol=0)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            **{"rtol": 0, "atol": 0, **tolerance},
            msg=lambda m, name=name: f"{name}: {m}",
        )


def packed(folder: Path) -> None:
    """Rows of several documents give each document's own loss."""
    model = load(folder)
    model.eval()
    total, count = 0.0, 0
    for row, lengths in zip(IDS, LENGTHS, strict=True):
        for ids in row.split(lengths):
            total += model.loss(Batch(ids[None])).item() * (len(ids) - 1)
            count += len(ids) - 1
    loss = model.loss(Batch(IDS, sequence_lengths=LENGTHS)).item()
    assert abs(loss - total / count) < 2e-5, (loss, total / count)


def estimated(folder: Path, **changes: Any) -> None:
    """There is an estimate, with the right number of parameters."""
    run = RunConfig.of(
        sequence_length=16, micro_batch=2, param_dtype="float32", compression_topk=8,
        **{"distro": True, "distro_quantization": True, **changes},
    )  # fmt: skip
    found = estimate(read_config(resolve_model(str(folder))), run)
    own = sum(p.numel() for p in load(folder).named_parameters().values())
    assert changes or found.total_parameters == own
    assert found.activations > 0


def trace(model: CausalLM, shard: int | None) -> dict[str, Tensor]:
    """Two steps of SGD with an evaluation between: losses, first gradients, what came of it."""
    found: dict[str, Tensor] = {}
    batch = Batch(IDS)
    mine = batch if shard is None else batch.share(shard, 2)
    for step in range(2):
        model.train()
        loss = model.loss(mine)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        for name, parameter in model.named_parameters().items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if step == 0:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                found[f"gradient {name}"] = whole.clone()
        model.eval()
        with torch.no_grad():
            logits, _ = model.forward(mine)
            found[f"logits {step}"] = logits.detach().float().clone()
            for parameter in model.named_parameters().values():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=RATE)
                    parameter.grad = None
    found |= {f"saved {n}": t.clone() for n, t in model.full_state_dict_iter() if t is not None}
    return found


def split(rank: int, folder: Path, kind: str) -> dict[str, Tensor]:
    """This rank's part of a model that is split over two, traced."""
    mesh = init_device_mesh("cpu", (2,))
    if kind == "tp":
        return trace(load(folder, tensor_mesh=mesh), None)
    found = trace(load(folder, shard_mesh=mesh), rank)
    for name, tensor in found.items():
        if name.startswith("loss"):
            dist.all_reduce(tensor)
            tensor /= 2
        if name.startswith("logits"):
            parts = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(parts, tensor)
            found[name] = torch.cat(parts)
    return found


def compare_split(found: list[dict[str, Tensor]], folder: Path) -> None:
    """What two ranks saw is what one sees."""
    expected = trace(load(folder), None)
    for key, tensor in expected.items():
        assert key in found[0], f"{key} missing"
        scale = max(tensor.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            found[0][key], tensor, rtol=0, atol=2e-4 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    # Replicated gradients agree, bit for bit.
    for key, tensor in found[1].items():
        assert torch.equal(tensor, found[0][key]), f"{key} differs between ranks"
