"""Accelerate: DDP's reduction is switched off on the model that `prepare` returns.

accelerate launch --num_processes 2 examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from psyche_fast import DeMo

STEPS = 60
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip


def main():
    """Returns the losses and the model, whose parameters are the same on all replicas."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    norms = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer = DeMo(
        [{"params": matrices}, {"params": norms, "method": "adamw", "lr": 3e-3}],
        lr=2e-3, compression_decay=0.95, compression_topk=16,
    )  # fmt: skip
    counting = [(i + i // 64 % 4 * torch.arange(32)) % 64 for i in range(4096)]
    loader = DataLoader(counting, batch_size=8, shuffle=True)
    # The schedule counts steps of all processes.
    steps = STEPS * accelerator.num_processes
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, noop_hook)

    losses = []
    for _, tokens in zip(range(2 * STEPS), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model = accelerator.unwrap_model(model)
    accelerator.end_training()
    return losses, model


if __name__ == "__main__":
    main()
