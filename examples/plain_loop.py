"""A loop of one's own: every process is a replica, and DisTrO all that they exchange.

torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from psyche_fast import DisTrO

STEPS = 40
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
    torch.manual_seed(0)  # replicas begin alike
    model = LlamaForCausalLM(CONFIG).to(device)
    data = torch.Generator().manual_seed(dist.get_rank())  # and see different data

    # Matrices by DisTrO; norms and the embedding by AdamW, whose gradients are averaged.
    named = list(model.named_parameters())
    compressed = [(n, p) for n, p in named if p.dim() == 2 and "embed" not in n]
    others = [(n, p) for n, p in named if p.dim() < 2 or "embed" in n]
    optimizer = DisTrO(
        [{"params": compressed}, {"params": others, "method": "adamw", "lr": 3e-3}],
        lr=2e-3, compression_decay=0.95, compression_topk=8,
    )  # fmt: skip
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 5)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [5])

    losses = []
    for step in range(STEPS):
        for _ in range(2):  # gradients are accumulated
            tokens = batch(data).to(device)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}, {optimizer.data_transmit} bytes sent")
    optimizer.flush()  # results that are still under way; parameters are the plain ones then
    dist.destroy_process_group()
    return losses, model


if __name__ == "__main__":
    main()
