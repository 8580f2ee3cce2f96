"""DistributedDataParallel, whose reduction is switched off: DeMo wants each replica's gradients.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from psyche_fast import DeMo

STEPS = 60
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip


def batch(generator):
    """Counting by some number, modulo 64."""
    start, by = torch.randint(64, (2, 8, 1), generator=generator)
    return (start + by.remainder(4) * torch.arange(32)) % 64


def main():
    """Returns the losses and the model, whose parameters are the same on all replicas."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank())  # DDP makes replicas begin alike
    model = DistributedDataParallel(LlamaForCausalLM(CONFIG).to(device))
    # Without DDP's all-reduce. `with model.no_sync():` around each backward does the same.
    model.register_comm_hook(None, noop_hook)
    data = torch.Generator().manual_seed(dist.get_rank())

    optimizer = DeMo(
        model.named_parameters(), lr=2e-3, compression_decay=0.95, compression_topk=16,
        weight_decay=0.1,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        tokens = batch(data).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, {optimizer.data_transmit} bytes sent")
    dist.destroy_process_group()
    return losses, model.module


if __name__ == "__main__":
    main()
