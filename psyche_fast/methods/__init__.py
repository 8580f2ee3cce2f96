"""Low-communication methods behind one interface: DisTrO, DeMo, SparseLoCo, DiLoCo and more.

`get("sparseloco", every=15)` is a `Method`: data, checked when it is made. `Replica` is a replica's
part of it in a loop, `simulate` several of them in one process.
"""

from psyche_fast.methods.hierarchy import Hierarchy
from psyche_fast.methods.local_steps import LocalSteps
from psyche_fast.methods.method import SGD, AdamW, Method, Muon, Nesterov, Sign
from psyche_fast.methods.muon import MuonAdamW
from psyche_fast.methods.nested import rounds_of
from psyche_fast.methods.presets import get, known
from psyche_fast.methods.replica import Replica
from psyche_fast.methods.rounds import Rounds
from psyche_fast.methods.simulation import simulate

__all__ = [
    "SGD",
    "AdamW",
    "Hierarchy",
    "LocalSteps",
    "Method",
    "Muon",
    "MuonAdamW",
    "Nesterov",
    "Replica",
    "Rounds",
    "Sign",
    "get",
    "known",
    "rounds_of",
    "simulate",
]
