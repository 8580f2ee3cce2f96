"""torchtitan: DeMo and DisTrO under their names, groups by patterns, its container and schedules.

A configuration of torchtitan's trainer takes `Optimizers.Config(...)` for its `optimizer`. Its own
`dp_replicate` averages gradients (HSDP): leave it at 1 and shard over `Optimizers.shards` ranks.

torchrun --nproc-per-node 2 examples/with_torchtitan.py
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torchtitan.components.optimizer import LRSchedulersContainer as Schedules
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from transformers import LlamaConfig, LlamaForCausalLM

from psyche_fast import DeMo, DisTrO

STEPS = 60
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip


class Optimizers(OptimizersContainer):
    """torchtitan's container, which also knows `DeMo` and `DisTrO`."""

    shards = 1  # ranks of a replica, one after the other

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's."""

    @classmethod
    def _resolve_optimizer_factory(cls, name):
        kinds = {"DeMo": DeMo, "DisTrO": DisTrO}
        if name not in kinds:
            return OptimizersContainer._resolve_optimizer_factory(name)
        ranks = range(dist.get_world_size())
        every = [list(ranks[shard :: cls.shards]) for shard in range(cls.shards)]
        peers, _ = dist.new_subgroups_by_enumeration(every)
        return partial(kinds[name], process_group=peers, compression_decay=0.95)


def main():
    """Returns the losses and the model, whose parameters are the same on all replicas."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    patterns = {
        "norm|embed": {"method": "adamw", "lr": 3e-3, "betas": (0.9, 0.95)},
        ".*": {"lr": 2e-3, "weight_decay": 0.1},
    }
    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name="DeMo", optimizer_kwargs=options)
        for pattern, options in patterns.items()
    ]
    optimizers = Optimizers.Config(param_groups=groups).build(model_parts=[model])
    schedule = Schedules.Config(warmup_steps=5)
    schedules = schedule.build(optimizers=optimizers, training_steps=STEPS)
    data, losses = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(STEPS):  # counting by some number, modulo 64
        start, by = torch.randint(64, (2, 8, 1), generator=data)
        tokens = (start + by % 4 * torch.arange(32)) % 64
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        schedules.step()
        losses.append(loss.item())
    optimizers.load_state_dict(optimizers.state_dict())  # flat, by name, as it saves them
    dist.destroy_process_group()
    return losses, model


if __name__ == "__main__":
    main()
