"""FSDP2 inside a replica, DisTrO between replicas, a checkpoint for any number of shards.

torchrun --nproc-per-node 4 examples/fsdp2_replicas.py  # two replicas of two shards
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from psyche_fast import DisTrO

STEPS, REPLICAS = 40, 2
FOLDER = os.path.join(tempfile.gettempdir(), "fsdp2_replicas")
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip


def batch(generator):
    """Counting by some number, modulo 64."""
    start, by = torch.randint(64, (2, 8, 1), generator=generator)
    return (start + by.remainder(4) * torch.arange(32)) % 64


def build(mesh):
    """A model that is sharded inside a replica alone, and its optimiser."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(mesh.device_type)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])  # with the whole mesh FSDP would average the replicas'
    peers = mesh.get_group("replicate")
    return model, DisTrO(model.named_parameters(), lr=2e-3, compression_decay=0.95,
                         compression_topk=8, process_group=peers)  # fmt: skip


def main(folder=FOLDER):
    """Returns the losses and the model's parameters, the same on all replicas."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    shape = (REPLICAS, dist.get_world_size() // REPLICAS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    model, optimizer = build(mesh)
    data = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for step in range(STEPS):
        tokens = batch(data).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == STEPS // 2:  # save, and go on from there with what has been loaded
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=folder)
            model, optimizer = build(mesh)
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])  # fmt: skip
    optimizer.flush()
    parameters = {name: p.full_tensor() for name, p in model.named_parameters()}
    dist.destroy_process_group()
    return losses, parameters


if __name__ == "__main__":
    main()
