"""`Distro`: DisTrO in the order of Psyche's train loop, parameters plain between its calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psyche_fast.distro.optimizer import DistroStep
from psyche_fast.distro.results import (
    DistroResult,
    collect,
    collect_own,
    own_results,
    to_results,
    whole_results,
)


class Distro(DistroStep):
    """DisTrO with delayed application, in the order of Psyche's train loop.

    One step, with `lr` the learning rate of this step and `prev_lr` that of the one before::

        distro.error_correction(prev_lr)          # parameters -= prev_lr * sign(delta): look-ahead
        ...                                       # forward, backward, clip: gradients in .grad
        own = distro.generate(prev_own, prev_lr, lr)
        distro.apply(all_peers_previous_results, lr)

    Between the return of `generate` or `apply` and the next `error_correction` the parameters are
    the plain ones. `DisTrO` does the same in the `step` of an optimiser, exchange included. Results
    are the entries of `DistroStep` in Psyche's form. Its arguments, attributes and errors are
    these, and what it says of state, precision and DTensors holds; a loop that keeps entries and
    leaves parameters in the look-ahead saves two passes over them with it.
    """

    def error_correction(self, prev_lr: float | Tensor) -> None:
        """Keep the plain parameters aside, then `parameters -= prev_lr * sign(delta)`.

        Raises:
            RuntimeError: the parameters already hold the look-ahead.
        """
        if self.looking_ahead:
            raise RuntimeError(
                "error_correction was called twice without generate or undo_error_correction "
                "in between"
            )
        self.look_ahead(prev_lr)

    def undo_error_correction(self) -> None:
        """Put the plain parameters back bit for bit, if they hold the look-ahead."""
        self.plain()

    def generate(
        self,
        prev_self_results: Sequence[DistroResult] | Sequence[Sequence[DistroResult]] | None,
        prev_lr: float | Tensor,
        lr: float | Tensor,
        *,
        grad_scale: float | Tensor | None = None,
    ) -> list[DistroResult]:
        """Undo the look-ahead, decay the weights, take up the gradients and compress.

        Args:
            prev_self_results: own results of the previous step with their unquantised values, which
                are subtracted from delta; None or empty where there are none. Several (a list of
                lists) count with their mean.
            prev_lr: learning rate of the look-ahead. Part of Psyche's call; the undo reads the
                master copy. Without a look-ahead outstanding nothing is undone.
            lr: learning rate of this step.
            grad_scale: factor on the gradients (clipping), as `compress` takes it.

        Returns:
            One result per parameter in name order, values in the parameter's dtype.

        Raises:
            ValueError: `prev_self_results` are quantised, do not fit the parameters or are not
                finite. Nothing has been changed then. Others as `compress`.
        """
        previous = collect_own(prev_self_results, self.layout)
        entries = self.compress(previous, lr, grad_scale=grad_scale)
        self.plain()
        return to_results(self.layout, entries)

    def apply(self, results: Sequence[Sequence[DistroResult]], lr: float | Tensor) -> None:
        """`parameters -= lr * sign(decode(mean of the peers' results))`.

        The outcome is a function of the results and their order alone: peers that apply the same
        ones stay identical.

        Args:
            results: one list per peer, in an order that all peers share; quantised (bool) or not.
                Empty: no change.
            lr: learning rate.

        Raises:
            ValueError: a result does not fit, naming the peer's number and the parameter. Nothing
                has been changed.
            RuntimeError: the parameters hold the look-ahead.
        """
        if self.looking_ahead:
            raise RuntimeError("apply was called before generate had undone the look-ahead")
        if results:
            self.update(collect(results, self.layout), lr)

    def zero_optim(self) -> None:
        """Forget all momentum: delta becomes zero."""
        self.zero_momentum()

    def deltas(self) -> dict[str, Tensor]:
        """The momentum by parameter name, as `momentum` gives it."""
        return self.momentum()

    @torch.no_grad()
    def whole_results(self, results: Sequence[DistroResult]) -> list[DistroResult]:
        """Results over whole parameters, the same on every rank, from each rank's own.

        For exchanges that know nothing of shards. A collective over the ranks of a replica.
        """
        return whole_results(self.parts, results)

    def own_results(self, results: Sequence[DistroResult]) -> list[DistroResult]:
        """This rank's part of results over whole parameters.

        Raises:
            ValueError: they are not over these parameters.
        """
        return own_results(self.parts, results)
