"""`Replica`: one replica's part of a method, from gradients to messages and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.distro.guard import GradientGuard
from psyche_fast.kernels.apply import apply, lookahead
from psyche_fast.kernels.outer import Local
from psyche_fast.methods.chunked import Fragment, fragment_names, side_by_side
from psyche_fast.methods.copies import Copies, parts
from psyche_fast.methods.message import Format, Picked
from psyche_fast.methods.method import Method, Sign
from psyche_fast.methods.owners import Owners, are_owned
from psyche_fast.methods.steps import OuterStep, Stepped, copied
from psyche_fast.sharding import local_gradient, local_tensor

Faults = dict[int, str]
"""What is wrong with messages, by the numbers of the replicas that sent them."""


@dataclass
class Sent:
    """A message whose results have not been applied.

    Attributes:
        step: how many steps had been made when it was sent.
        turn: number of its round.
        message: uint8 `[size]`.
        local: this rank's parts of the replica's parameters at that time by name; for
            `mix="rebase"` with a delay.
    """

    step: int
    turn: int
    message: Tensor
    local: dict[str, Tensor]


class Replica:
    """One replica of a model in a method's loop, which is the same for all methods.

    ::

        replica.before_forward(step)             # steps count from 0
        ...                                      # forward, backward: gradients in .grad
        replica.local(lr)
        message = replica.send()                 # None where this step ends no round
        if message is not None:
            pending.append(exchange(message))    # `Rounds` is all this between processes
        while replica.due():
            replica.receive(pending.popleft())   # of all replicas, or of owners

    Replicas whose parameters were equal at first, that receive the same messages in the same order
    on the same kind of device, agree on the shared parameters (`plain`) to the bit.

    Arithmetic is in float32, in float64 for float64 parameters. The shared parameters are the
    parameters themselves (or their masters) where replicas do not differ from them: else, and for
    narrower types without masters (which local steps do not take, since what AdamW changes would be
    lost to rounding), a copy. With float32 parameters and a DCT, directions of `Sign` are
    `psyche_fast.integers`' and DisTrO is `psyche_fast.Distro` to the bit.

    Parameters may be DTensors (FSDP2, tensor parallelism, both). Then each rank of a replica makes
    and calls one, all alike, and exchanges messages with the ranks of the same place in the other
    replicas, which are sharded alike. Shards whose edges are edges of chunks are worked on where
    they lie; the chunks of the others are divided among the ranks that share them, to which what is
    sent travels in one all-to-all, and what comes of it back in one. All is as of whole replicas:
    to the bit but for what is added up over a tensor as a whole (`clip="median"`) or is Muon's.

    Args:
        method: the method.
        parameters: by name; all that are given are trained. Equal on all replicas.
        replica: this replica's number.
        replicas: how many there are.
        masters: float32 copies by name of parameters of narrower types, placed as these, which are
            what they round to: local and outer steps are taken on them.
        inner: an optimiser of the parameters that takes the local steps in the method's place.
        undecayed: names of parameters without weight decay.
        backend: "auto", "triton", "torch" or "interpret".

    Attributes:
        step: how many steps have been made.
        fragments: the parts that take turns, with their layouts and messages.
        outer: the outer step.
        inner: the optimiser of the local steps, or None.

    Raises:
        TypeError: a parameter is not of floating point.
        ValueError: no parameters, more fragments than layers, bfloat16 parameters without masters
            for local steps, or a codebook of shards.
    """

    def __init__(
        self,
        method: Method,
        parameters: Mapping[str, Tensor],
        *,
        replica: int,
        replicas: int,
        masters: Mapping[str, Tensor] | None = None,
        inner: torch.optim.Optimizer | None = None,
        undecayed: Container[str] = (),
        backend: str = "auto",
    ) -> None:
        if not 0 <= replica < replicas:
            raise ValueError(f"replica must be from 0 to {replicas - 1}, got {replica}")
        self.method, self.replica, self.replicas = method, replica, replicas
        self.step = 0
        self._copies = Copies(method, parameters, masters)
        self._parameters, self._shared = self._copies.parameters, self._copies.shared
        self._stepped = self._copies.stepped
        self.fragments = [
            Fragment(method, number, names, [self._shared[n] for n in names], backend)
            for number, names in enumerate(fragment_names(method, list(self._shared)))
        ]
        if are_owned(method, replicas):
            for fragment in self.fragments:
                fragment.divide(replica, replicas)
        self.outer = OuterStep(method, self._shared, undecayed)
        if inner is not None and not method.is_local:
            raise ValueError(f"what={method.what!r} takes no local steps: there is no inner")
        self.inner, self._inner = inner, None
        if inner is None and method.inner is not None:
            self._inner = Stepped(method.inner, self._stepped, undecayed)
            self.inner = self._inner.optimizer
        sharded = any(isinstance(p, DTensor) for p in self._parameters.values())
        self._guard = GradientGuard(list(self._parameters.values()), "Replica") if sharded else None
        self._rate: float | None = None
        self._sent: deque[Sent] = deque()

    @property
    def layout(self) -> list[Any]:
        """How each fragment's parameters are cut: a `Layout` of each."""
        return [fragment.layout for fragment in self.fragments]

    @property
    def inside(self) -> list[dist.ProcessGroup]:
        """Groups that together connect all ranks of this replica; none where it has one."""
        return [] if self._guard is None else self._guard.groups

    def bytes_sent(self, step: int) -> int:
        """Size of the message that ends step `step` (from 0), 0 where there is none."""
        form = self.form(step)
        return 0 if form is None else form.size

    def form(self, step: int) -> Format | Owners | None:
        """How the message travels that ends step `step` (from 0); None where there is none."""
        turn = self._turn(step + 1)
        return None if turn is None else self.fragments[turn % len(self.fragments)].format

    @torch.no_grad()
    def before_forward(self, step: int) -> None:
        """Bring the parameters to where the gradient is wanted.

        Args:
            step: number of the step, from 0.

        Raises:
            ValueError: it is not this replica's next one.
        """
        if step != self.step:
            raise ValueError(f"step: this replica's next one is {self.step}, got {step}")
        self._copies.put_own()
        if not self.method.lookahead:
            return
        rate = self._rate or 0.0
        for fragment in self.fragments:
            assert fragment.kept is not None
            shared = parts(self._shared, fragment.names)
            ahead = parts(self._parameters, fragment.names)
            if not fragment.parts.are_shards:
                signs = fragment.shards([kept.sign() for kept in fragment.kept])
                for target, base, sign in zip(ahead, shared, signs, strict=True):
                    target.copy_(base.add(sign, alpha=-rate))
                continue
            for at, plan in enumerate(fragment.layout.plans):
                places = [m.position for m in plan.members]
                lookahead(
                    plan, [shared[i] for i in places], fragment.kept[at], [rate] * len(places),
                    [ahead[i] for i in places], backend=fragment.backends[at],
                )  # fmt: skip

    @torch.no_grad()
    def local(self, lr: float, clip: Tensor | float | None = None) -> None:
        """Take up the gradients: the local step, or later `send`'s.

        Args:
            lr: the schedule's learning rate of this step.
            clip: factor on the gradients, the same on all ranks of a replica. Where it is not
                finite they are left out whole; without one they are where an element of them is
                not (a collective, of shards).
        """
        self._rate = float(lr)
        self.step += 1
        if clip is None:
            clip = self._usable()
        self._clip = clip
        if not self.method.is_local:
            self.outer.decay(self._rate)
            return
        assert self._inner is not None
        factor = float(clip)
        if factor - factor != 0.0:  # not finite
            return
        gradients = {n: local_gradient(p) for n, p in self._parameters.items()}
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if factor != 1.0:
                gradient.mul_(factor)
            gradients[name] = gradient.to(self._stepped[name].dtype)
        self._inner.step(gradients, self._rate)
        self._copies.round()

    def _usable(self) -> Tensor | float:
        """1, or NaN where an element of a gradient is not finite, on any rank of the replica."""
        if self._guard is not None:
            return self._guard.scale([p.grad for p in self._parameters.values()], None)
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return 1.0 if all(bool(g.isfinite().all()) for g in gradients) else float("nan")

    def stepped(self) -> None:
        """In place of `local`, where the inner optimiser's step has been made by its owner."""
        assert self.method.is_local
        self.step += 1

    @torch.no_grad()
    def send(self) -> Tensor | None:
        """The message of this step, uint8 `[size]`; None where it ends no round."""
        turn = self._turn(self.step)
        if turn is None:
            return None
        fragment = self.fragments[turn % len(self.fragments)]
        factor, scale = 1.0, None
        sources: list[Tensor | None]
        anchors = None
        if self.method.is_local:
            anchors = parts(self._shared, fragment.names)
            sources = list(parts(self._stepped, fragment.names))
        else:
            sources = [local_gradient(self._parameters[n]) for n in fragment.names]
            scale = self._clip
            if self.method.what == "momentum":
                assert self._rate is not None
                gains = {"rate": self._rate, "one": 1.0, "ema": 1.0 - self.method.decay}
                factor = gains[self.method.gain]
        if isinstance(scale, float) and scale == 1.0:
            scale = None
        message = fragment.compress(sources, factor, scale, turn, self.replica, anchors)
        local = {}
        if self.method.mix == "rebase" and self.method.delay > 0:
            own = parts(self._stepped, fragment.names)
            local = {name: t.clone() for name, t in zip(fragment.names, own, strict=True)}
        self._sent.append(Sent(self.step, turn, message, local))
        if self.outer.decays and not self.due():
            self._copies.round()
        return message

    def due(self) -> bool:
        """Whether the next thing to do is `receive`."""
        return bool(self._sent) and self.step >= self._sent[0].step + self.method.delay

    def faults(self, messages: Tensor) -> Faults:
        """What is wrong with the next messages' headers or checksums.

        That is all that damage on the way can do, and may befall one receiver alone: where
        messages travel, replicas agree on what to leave out before they `receive`.

        Args:
            messages: uint8 `[replicas, size]`.

        Raises:
            ValueError: messages of another shape or dtype.
        """
        sent = self._sent[0]
        return self._fragment(sent).format.faults(sent.turn, messages)

    @torch.no_grad()
    def receive(self, messages: Tensor, leave_out: Faults | None = None) -> Faults:
        """Apply the results of the oldest message: the outer step, and the mix.

        Where nothing is left of them, the shared parameters stay as they are, and the mix is made
        all the same. All ranks of a sharded replica leave out what any of them refuses.

        Args:
            messages: uint8 `[replicas, size]`, in the order of replicas, the own one among them.
            leave_out: those that all replicas have agreed to refuse; those that `faults` sees where
                None.

        Returns:
            What has been refused, the same on all replicas that were given the same.

        Raises:
            ValueError: messages of another shape or dtype, or nothing is due.
        """
        if not self.due():
            raise ValueError(f"receive: nothing is due after {self.step} steps")
        refused = dict(self.faults(messages) if leave_out is None else leave_out)
        sent = self._sent.popleft()
        fragment = self._fragment(sent)
        rows = messages.to(fragment.layout.plans[0].device)
        picked, faults = fragment.format.unpack(rows, refused)
        refused |= faults
        # Where messages travel, all ranks have agreed on what to leave out.
        if leave_out is None and (anywhere := self._refused_elsewhere(refused)):
            refused |= anywhere
            picked, _ = fragment.format.unpack(rows, refused)
        is_mixed = picked is not None and self._apply(fragment, picked, sent)
        if self.method.is_local and not is_mixed:
            for name in fragment.names:
                self._mix(name, sent)
        self._copies.round(fragment.names)
        fragment.format.received(sent.turn)
        return refused

    @property
    def keeps_own(self) -> bool:
        """Whether a round leaves a replica something of its own in its parameters."""
        return self.method.is_local and (self.method.mix != 0.0 or self.method.fragments > 1)

    @torch.no_grad()
    def follow(self, before: Mapping[str, Tensor]) -> None:
        """Have the own parameters go with the shared ones, which another has changed in place.

        Args:
            before: the shared ones as they were, where the replica `keeps_own`.
        """
        if self.method.is_local:
            for name, own, shared in zip(
                self._shared, parts(self._stepped), parts(self._shared), strict=True
            ):
                if self.keeps_own:
                    own.add_(shared - local_tensor(before[name]))
                else:
                    own.copy_(shared)
        self._copies.round()

    def plain(self) -> Mapping[str, Tensor]:
        """The shared parameters by name, not copies: to evaluate, to export, to compare.

        Placed as the parameters; those of narrower types as the float32 that they are rounded from.
        """
        return {name: shared.detach() for name, shared in self._shared.items()}

    def put_shared(self) -> None:
        """Give the parameters, and masters, what all replicas share; until `before_forward`."""
        self._copies.put_shared()

    def put_own(self) -> None:
        """Undo `put_shared`."""
        self._copies.put_own()

    def flight(self, at: int = -1) -> tuple[Format | Owners, int]:
        """Of a message whose results are to come, the newest or `at`: its format and its round."""
        sent = self._sent[at]
        return self._fragment(sent).format, sent.turn

    def in_flight(self) -> list[Tensor]:
        """The own messages whose results are to come, the oldest first.

        After `load_state_dict` the replicas exchange them again.
        """
        return [sent.message for sent in self._sent]

    def state_dict(self) -> dict[str, Any]:
        """Everything for an exact resume at any step, own messages in flight included; copies.

        Own to this replica are `local`, `fragments`, `inner` and `in_flight`. Of what is sharded it
        has this rank's parts.
        """
        state: dict[str, Any] = {
            "method": repr(self.method),
            "replica": self.replica,
            "replicas": self.replicas,
            "step": self.step,
            "rate": self._rate,
            **self._copies.state(),
            "outer": self.outer.state(),
            "fragments": [fragment.state() for fragment in self.fragments],
            "in_flight": [copied(vars(sent)) for sent in self._sent],
        }
        if self._inner is not None:
            state["inner"] = copied(self._inner.optimizer.state_dict())
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, parameters included.

        Raises:
            ValueError: it is of another method, number of replicas, model, or place among the ranks
                of a replica.
        """
        mine = {"method": repr(self.method), "replica": self.replica, "replicas": self.replicas}
        for key, wanted in mine.items():
            if state.get(key) != wanted:
                raise ValueError(f"saved {key}: wanted {wanted}, got {state.get(key)}")
        self._copies.load(state)
        for fragment, saved in zip(self.fragments, state["fragments"], strict=True):
            fragment.load(saved)
        self.outer.load(state["outer"])
        if self._inner is not None:
            self._inner.optimizer.load_state_dict(copied(state["inner"]))
        self.step, self._rate = state["step"], state["rate"]
        self._sent = deque(Sent(**copied(sent)) for sent in state["in_flight"])

    def _turn(self, step: int) -> int | None:
        """The number of the round whose message is sent after so many steps."""
        if not self.method.is_local:
            return step - 1
        turn, left = divmod(step + self.method.delay, self.method.window)
        return turn - 1 if left == 0 else None

    def _fragment(self, sent: Sent) -> Fragment:
        return self.fragments[sent.turn % len(self.fragments)]

    def _refused_elsewhere(self, refused: Faults) -> Faults:
        """What other ranks of a sharded replica refuse, each of which has its own messages."""
        if self._guard is None:
            return {}
        flags = [float(number in refused) for number in range(self.replicas)]
        found = torch.tensor(flags, device=self._guard.refused.device)
        for group in self._guard.groups:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        why = "another rank of this replica refuses its part"
        return {n: why for n, flag in enumerate(found.tolist()) if flag and n not in refused}

    def _apply(self, fragment: Fragment, picked: list[Picked], sent: Sent) -> bool:
        """The outer step of a fragment; whether the replica's own are mixed with it, too."""
        method, rate = self.method, self._rate or 0.0  # none where others take the local steps
        if method.clip == "median":
            picked = fragment.clipped(picked)
        if self._signs_in_integers(fragment):
            self._add_signs(fragment, picked, rate)
            return False
        length = self.outer.length(rate)
        if isinstance(method.outer, Sign) and method.select != "topk":
            picked, length = fragment.signs(picked), rate
        if length is None or not fragment.parts.are_shards:
            merged = fragment.merge(picked, sent.turn)
            self.outer.step(dict(zip(fragment.names, merged, strict=True)), rate)
            return False
        momenta, momentum = self.outer.momenta(fragment.names)
        local = None
        if method.is_local:
            mix = 0.0 if isinstance(method.mix, str) else method.mix
            since = [sent.local[n] for n in fragment.names] if sent.local else None
            local = Local(parts(self._stepped, fragment.names), mix, since)
        fragment.step_out(
            parts(self._shared, fragment.names), picked, sent.turn, length, momenta, momentum, local
        )
        return True

    def _add_signs(self, fragment: Fragment, picked: list[Picked], rate: float) -> None:
        """`A -= rate sign(decode(mean))`, as `psyche_fast.integers` has the sign."""
        shared, lie_there = parts(self._shared, fragment.names), fragment.parts.are_shards
        # Of divided chunks the directions, which travel; adding them there rounds alike.
        tensors, length = shared, rate
        if not lie_there:
            layouts = fragment.layout.parameters
            tensors = [t.new_zeros(p.shape) for t, p in zip(shared, layouts, strict=True)]
            length = 1.0
        for at, (plan, p) in enumerate(zip(fragment.layout.plans, picked, strict=True)):
            apply(
                plan, [tensors[m.position] for m in plan.members], side_by_side(plan, p),
                [length] * len(plan.members), backend=fragment.backends[at],
            )  # fmt: skip
        if not lie_there:
            torch._foreach_add_(shared, fragment.parts.shards(tensors), alpha=rate)

    def _signs_in_integers(self, fragment: Fragment) -> bool:
        method, plans = self.method, fragment.layout.plans
        if not isinstance(method.outer, Sign) or method.merge != "named" or method.clip != "none":
            return False
        return all(plan.is_transformed and plan.dtype == torch.float32 for plan in plans)

    def _mix(self, name: str, sent: Sent) -> None:
        """A parameter of the replica's own, once the shared one has changed."""
        local, shared = (local_tensor(t[name].detach()) for t in (self._stepped, self._shared))
        mix = self.method.mix
        if mix == "rebase" and sent.local:
            local.sub_(sent.local[name]).add_(shared)
        elif mix == "rebase" or mix == 0.0:
            local.copy_(shared)
        else:
            local.mul_(mix).add_(shared, alpha=1.0 - mix)
