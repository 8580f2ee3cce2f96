"""Lightning: `DDPStrategy` takes the hook that switches DDP's reduction off.

torchrun --nproc-per-node 2 examples/with_lightning.py
"""

import os

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from psyche_fast import DeMo

STEPS = 60
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip


class Counter(lightning.LightningModule):
    """Learns to count by some number, modulo 64."""

    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(CONFIG)
        self.losses = []

    def training_step(self, tokens, index):
        """The loss of a batch."""
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """DeMo with a schedule of torch's."""
        optimizer = DeMo(self.named_parameters(), lr=2e-3, compression_decay=0.95,
                         compression_topk=16, weight_decay=0.1)  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main():
    """Returns the losses and the model, whose parameters are the same on all replicas."""
    lightning.seed_everything(0, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        strategy=DDPStrategy(ddp_comm_hook=noop_hook) if world > 1 else "auto",
        accelerator="auto", devices=world, max_steps=STEPS, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    counting = [(i + i // 64 % 4 * torch.arange(32)) % 64 for i in range(4096)]
    module = Counter()
    trainer.fit(module, DataLoader(counting, batch_size=8, shuffle=True))
    return module.losses, module.model


if __name__ == "__main__":
    main()
