"""Transformers' `Trainer`; DDP's reduction is switched off where there are several replicas.

torchrun --nproc-per-node 2 examples/transformers_trainer.py
"""

import tempfile

import torch
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from psyche_fast import DisTrO

STEPS = 60
OPTIONS = {"lr": 5e-3, "compression_decay": 0.95, "compression_topk": 16}
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip


class Counting(torch.utils.data.Dataset):
    """Counting by some number, modulo 64."""

    def __len__(self):
        return 4096

    def __getitem__(self, i):
        tokens = (i + i // 64 % 4 * torch.arange(32)) % 64
        return {"input_ids": tokens, "labels": tokens}


class OwnGradients(TrainerCallback):
    """Each replica keeps its own gradients, and what is saved are the parameters of all."""

    trainer: Trainer

    def on_train_begin(self, args, state, control, **others):
        """Takes DDP's all-reduce away."""
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, noop_hook)

    def on_step_end(self, args, state, control, optimizer=None, **others):
        """Puts the plain parameters into the model before it is saved; training goes back."""
        if control.should_save or state.global_step >= state.max_steps:
            optimizer.eval()


def main(folder=None):
    """Returns the losses and the model, whose parameters are the same on all replicas."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=folder or tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=8,
        learning_rate=5e-3, lr_scheduler_type="cosine", warmup_steps=5, max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        average_tokens_across_devices=False,
    )  # fmt: skip
    own = OwnGradients()
    own.trainer = Trainer(
        LlamaForCausalLM(CONFIG), arguments, train_dataset=Counting(), callbacks=[own],
        optimizer_cls_and_kwargs=(DisTrO, OPTIONS),
    )  # fmt: skip
    own.trainer.train()
    losses = [line["loss"] for line in own.trainer.state.log_history if "loss" in line]
    return losses, own.trainer.model


if __name__ == "__main__":
    main()
