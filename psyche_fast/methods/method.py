"""`Method`: how replicas learn from each other, as data that is checked as a whole when it is made.

Sources: DeMo (arXiv 2411.19870), SparseLoCo (2508.15706), DiLoCo (2311.08105), Streaming DiLoCo
(2501.18512), MuLoCo (2505.23725), Muon (Keller Jordan, 2024) as `torch.optim.Muon` has it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from psyche_fast.kernels.quantise import MOST_ENTRIES

When: TypeAlias = Literal["momentum", "pseudo_gradient", "gradient"]
Gain: TypeAlias = Literal["rate", "one", "ema"]
Transform: TypeAlias = Literal["dct", "none"]
Select: TypeAlias = Literal["topk", "random", "all"]
Values: TypeAlias = Literal["sign", "2bit", "4bit", "8bit", "codebook4", "bf16", "parameter"]
Feedback: TypeAlias = Literal["exact", "sent", "none"]
Merge: TypeAlias = Literal["named", "mean"]
Clip: TypeAlias = Literal["none", "median"]
Reduce: TypeAlias = Literal["auto", "gather", "owners"]
Scale: TypeAlias = Literal["original", "match_rms_adamw", "spectral_norm"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "what": get_args(When),
    "gain": get_args(Gain),
    "transform": get_args(Transform),
    "select": get_args(Select),
    "values": get_args(Values),
    "feedback": get_args(Feedback),
    "merge": get_args(Merge),
    "clip": get_args(Clip),
    "reduce": get_args(Reduce),
}


def _refuse(reason: str) -> None:
    raise ValueError(reason)


def _check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    other: str = "",
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: wanted a number{other}, got {value!r}")
    if not (math.isfinite(value) and least <= value <= most and above < value < below):
        limits = {"at least": least, "above": above, "at most": most, "below": below}
        wanted = " and ".join(f"{w} {x:g}" for w, x in limits.items() if math.isfinite(x))
        raise ValueError(f"{name} must be {wanted or 'finite'}{other}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Outer: `A -= lr sign(M)`, `lr` the schedule's.

    Attributes:
        weight_decay: decoupled; `A` is multiplied by `1 - lr weight_decay` in every step.
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("Sign's weight_decay", self.weight_decay, least=0.0)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Outer: `A -= rate D`; of a gradient, or of momentum without `lr` in it, `A -= lr rate M`.

    Attributes:
        rate: outer learning rate; it counts once, in this step.
        weight_decay: decoupled, as `Sign`'s; none for pseudo-gradients, whose inner steps decay.
    """

    rate: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("SGD's rate", self.rate, above=0.0)
        _check_number("SGD's weight_decay", self.weight_decay, least=0.0)


@dataclass(frozen=True, kw_only=True)
class Nesterov:
    """Outer: `u = momentum u + D`, then `A -= rate (D + momentum u)`, `u` zero at first.

    That is `torch.optim.SGD` with `nesterov=True`. `lr` comes in as for `SGD`.

    Attributes:
        rate: outer learning rate.
        momentum: decay of `u`, the same on all replicas.
        weight_decay: as `SGD`'s.
    """

    rate: float = 0.7
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_number("Nesterov's rate", self.rate, above=0.0)
        _check_number("Nesterov's momentum", self.momentum, least=0.0, below=1.0)
        _check_number("Nesterov's weight_decay", self.weight_decay, least=0.0)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Inner: `torch.optim.AdamW`, its learning rate the schedule's. Also outer, of gradients.

    Attributes:
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise TypeError(f"AdamW's betas: wanted two numbers, got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            _check_number("AdamW's betas", beta, least=0.0, below=1.0)
        _check_number("AdamW's eps", self.eps, least=0.0)
        _check_number("AdamW's weight_decay", self.weight_decay, least=0.0)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for hidden matrices, AdamW for all else; the learning rate is the schedule's.

    Inner, and outer of gradients, it is `torch.optim.Muon`: `B = mu B + (1 - mu) g`, the direction
    the orthogonalised `(1 - mu) g + mu B` (`B` without nesterov). Outer of momentum it is the
    orthogonalised merged momentum, the sign for all that is no hidden matrix, and neither
    `momentum` nor `adamw` are used. A tensor of more than two dimensions is a batch of matrices.

    Attributes:
        momentum: `mu`.
        nesterov: see above.
        weight_decay: decoupled, by the learning rate itself; None for `torch.optim.Muon`'s 0.1 of
            gradients, and for 0 as of `Sign` where it is outer of momentum.
        ns_coefficients: of the quintic Newton-Schulz iteration.
        ns_steps: its steps.
        eps: least norm that a matrix is divided by.
        adjust_lr_fn: factor on the learning rate for a matrix of R x C: "original"
            `sqrt(max(1, R / C))`, "match_rms_adamw" `0.2 sqrt(max(R, C))`, "spectral_norm"
            `sqrt(R / C)`.
        by_adamw: parts of names of matrices that are not hidden ones.
        adamw: for those, and for all with less than two dimensions.
    """

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float | None = None
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    ns_steps: int = 5
    eps: float = 1e-7
    adjust_lr_fn: Scale = "original"
    by_adamw: tuple[str, ...] = ("embed", "wte", "wpe", "lm_head", "norm", "router")
    adamw: AdamW = AdamW()

    def __post_init__(self) -> None:
        _check_number("Muon's momentum", self.momentum, least=0.0, below=1.0)
        if self.weight_decay is not None:
            _check_number("Muon's weight_decay", self.weight_decay, least=0.0)
        _check_number("Muon's eps", self.eps, above=0.0)
        _check_count("Muon's ns_steps", self.ns_steps, least=1)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"Muon's nesterov: wanted True or False, got {self.nesterov!r}")
        if self.adjust_lr_fn not in get_args(Scale):
            raise ValueError(
                f"Muon's adjust_lr_fn: wanted one of {', '.join(get_args(Scale))}; got "
                f"{self.adjust_lr_fn!r}"
            )
        if len(self.ns_coefficients) != 3:
            raise ValueError(f"Muon's ns_coefficients: wanted three, got {self.ns_coefficients!r}")
        if not isinstance(self.by_adamw, tuple | list):
            raise TypeError(f"Muon's by_adamw: wanted a tuple of names, got {self.by_adamw!r}")
        if not isinstance(self.adamw, AdamW):
            raise TypeError(f"Muon's adamw: wanted an AdamW, got {self.adamw!r}")
        object.__setattr__(self, "ns_coefficients", tuple(self.ns_coefficients))
        object.__setattr__(self, "by_adamw", tuple(self.by_adamw))


Outer: TypeAlias = Sign | SGD | Nesterov | AdamW | Muon
Inner: TypeAlias = AdamW | Muon


@dataclass(frozen=True, kw_only=True)
class Method:
    """How replicas learn from each other.

    `A` are the parameters that all replicas share, `th` a replica's own, `D = A - th` its
    pseudo-gradient. A round ends every `every / fragments` inner steps, and each has its fragment.

    Attributes:
        every: inner steps until a fragment's turn comes again (H).
        fragments: parts of the model that take turns (P): whole layers, strided; what belongs to
            no layer goes with the first.
        delay: inner steps from sending to applying (tau). Results land on a round's end, so that
            of pseudo-gradients is sent `delay` steps before it.
        lookahead: gradients are taken at `A - lr sign(d)`.
        mix: share of a replica's own parameters that it keeps where a result lands, or "rebase":
            the new `A`, and on top what the replica has done since it sent.
        what: what is sent: momentum `d = decay d + c g`, the pseudo-gradient or the gradient.
        gain: `c`: the schedule's rate, 1 or `1 - decay`. A linear outer step of momentum has the
            rate in it once: by `gain="rate"`, or else in the step.
        transform: of chunks, before the selection.
        select: the k of largest magnitude, k at random (the same on all replicas), or all.
        chunk: side of a chunk of a matrix, as the largest divisor that is not larger; without
            transform a vector's chunks are of up to `chunk * chunk` elements.
        k: how many of a chunk.
        values: as what they travel: signs; 2 bits, a sign and one of two levels per chunk; 4 and 8
            bits, a whole multiple of the chunk's scale; "codebook4", four values per parameter (the
            references' own, for comparison); bfloat16; or as they are.
        decay: of momentum, or of what feedback has kept (beta).
        subtract: share of the own result that is taken out of momentum or feedback (alpha).
        feedback: what is taken out: the own result as it was ("exact"), or as the others see it
            ("sent"). Without ("none") nothing is kept of what was not sent, but for momentum.
        merge: mean over the replicas that name an entry, or over all.
        clip: "median": a replica's values of a parameter are scaled down to the lower median of
            the replicas' norms.
        reduce: how results are merged: every replica gets those of all ("gather"), or each owns a
            part of the chunks, gets that of all, merges it and sends it on ("owners", see
            `psyche_fast.methods.owners`). "auto": owners of what is sent whole, and above 16
            replicas of what is selected, where that is fewer bytes.
        outer: what becomes of the mean.
        inner: the local steps of pseudo-gradients; None where there are none.
        seed: of random selection.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range, or fields that do not go together, with the reason.
    """

    every: int = 1
    fragments: int = 1
    delay: int = 0
    lookahead: bool = False
    mix: float | Literal["rebase"] = 0.0
    what: When = "momentum"
    gain: Gain = "rate"
    transform: Transform = "dct"
    select: Select = "topk"
    chunk: int = 64
    k: int = 4
    values: Values = "sign"
    decay: float = 0.999
    subtract: float = 1.0
    feedback: Feedback = "exact"
    merge: Merge = "named"
    clip: Clip = "none"
    reduce: Reduce = "auto"
    outer: Outer = Sign()
    inner: Inner | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_fields()
        self._check_local()
        self._check_sent()
        self._check_outer()

    @property
    def window(self) -> int:
        """Inner steps of a round."""
        return self.every // self.fragments

    @property
    def is_local(self) -> bool:
        """Whether replicas' parameters differ from the shared ones between rounds."""
        return self.what == "pseudo_gradient"

    @property
    def step_by_rate(self) -> bool:
        """Whether the outer step is multiplied by the schedule's rate."""
        if self.what != "momentum" or not isinstance(self.outer, SGD | Nesterov):
            return not self.is_local
        return self.gain != "rate" or self.values == "sign"  # signs have lost what d had of it

    def hash(self) -> int:
        """64 bits that differ where a field does."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _check_fields(self) -> None:
        for name, least in (("every", 1), ("fragments", 1), ("delay", 0), ("chunk", 1), ("k", 1)):
            _check_count(name, getattr(self, name), least=least)
        _check_count("seed", self.seed, least=0)
        if not isinstance(self.lookahead, bool):
            raise TypeError(f"lookahead: wanted True or False, got {self.lookahead!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: wanted one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if self.mix != "rebase":
            _check_number("mix", self.mix, least=0.0, most=1.0, other=' or "rebase"')
        _check_number("decay", self.decay, least=0.0, most=1.0)
        _check_number("subtract", self.subtract, above=0.0, most=1.0)
        if not isinstance(self.outer, Outer):
            raise TypeError(f"outer: wanted Sign, SGD, Nesterov, AdamW or Muon, got {self.outer!r}")
        if self.inner is not None and not isinstance(self.inner, Inner):
            raise TypeError(f"inner: wanted AdamW, Muon or None, got {self.inner!r}")

    def _check_local(self) -> None:
        """When, and the local steps."""
        if self.is_local:
            if self.inner is None:
                _refuse("what='pseudo_gradient' is what local steps have done: inner is wanted")
            if self.every % self.fragments:
                _refuse(f"every={self.every} is no multiple of fragments={self.fragments}")
            if self.delay >= self.window:
                _refuse(
                    f"delay={self.delay} must be less than every / fragments = {self.window}: "
                    "a result has landed before the next is sent"
                )
        else:
            if self.inner is not None:
                _refuse(f"inner takes local steps, which what={self.what!r} has none of")
            for name, only in (("every", 1), ("fragments", 1), ("mix", 0.0)):
                if getattr(self, name) != only:
                    _refuse(f"{name}={getattr(self, name)!r} wants what='pseudo_gradient'")
        if self.lookahead and not (
            self.what == "momentum" and isinstance(self.outer, Sign) and self.delay == 1
        ):
            _refuse(
                "lookahead steps to where the own momentum's sign leads until its result lands: "
                "it wants what='momentum', outer=Sign() and delay=1"
            )

    def _check_sent(self) -> None:
        """What is sent, and what is kept of it."""
        if self.what != "momentum" and self.gain != "rate":
            _refuse(f"gain={self.gain!r} is a factor in momentum; what={self.what!r} has none")
        if self.what == "momentum" and self.decay == 1.0:
            _refuse("decay=1 would have momentum grow without bound")
        if self.select == "topk" and self.k > self.chunk**2:
            _refuse(f"k={self.k} is more than a chunk of {self.chunk} x {self.chunk} has")
        if self.select != "topk" and self.transform != "none":
            _refuse(
                f"select={self.select!r} does not go by size, for which the transform is there: "
                "transform='none' is wanted"
            )
        if self.feedback == "none" and self.subtract != 1.0:
            _refuse(f"subtract={self.subtract:g} has nothing to take out of with feedback='none'")
        if self.values == "sign" and self.feedback == "sent":
            _refuse("signs do not say how much was sent: values='sign' wants feedback='exact'")
        if self.values == "sign" and self.is_local:
            _refuse("signs have no length, and an outer step of D wants one: values='2bit' has it")
        if self.values == "sign" and self.clip == "median":
            _refuse("all signs have one norm: clip='median' wants other values")
        entries = self.k if self.select == "topk" else self.chunk**2
        if self.values == "2bit" and entries > MOST_ENTRIES:
            _refuse(f"values='2bit' takes up to {MOST_ENTRIES} values of a chunk, got {entries}")
        if self.reduce == "owners" and self.clip == "median":
            _refuse("clip='median' goes by whole parameters, of which reduce='owners' has parts")
        if self.reduce == "owners" and self.values == "codebook4":
            _refuse("values='codebook4' codes whole parameters, of which reduce='owners' has parts")

    def _check_outer(self) -> None:
        if self.is_local and not isinstance(self.outer, SGD | Nesterov):
            _refuse(
                f"outer={type(self.outer).__name__} goes by the schedule's rate, which the local "
                "steps have taken already: SGD or Nesterov is wanted"
            )
        if self.is_local and self.outer.weight_decay:
            _refuse("weight decay of pseudo-gradients belongs to inner, by the schedule's rate")
        if isinstance(self.outer, AdamW) and self.values == "sign":
            _refuse("outer=AdamW divides by the size of gradients, which signs have not")


def field_names() -> list[str]:
    """The names of a method's fields."""
    return [field.name for field in fields(Method)]
