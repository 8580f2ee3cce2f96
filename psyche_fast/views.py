"""What a run shows: evaluation, samples, trackers and the console, as options of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from psyche_fast.options import Amount, Count, Port, Positive, Section, flag
from psyche_fast.options import describe as _help


class Evaluation(Section, frozen=True, kw_only=True):
    """Held-out loss and samples during training, for `core.evaluation`."""

    eval_data: Annotated[
        str | None, _help("held-out data, as --data-path takes it: loss and bits per byte")
    ] = None  # fmt: skip
    eval_every: Annotated[
        Count, _help("steps between evaluations; the first and the last step's are made always")
    ] = 0  # fmt: skip
    eval_sequences: Annotated[
        Count, _help("sequences of --eval-data to evaluate, the first ones; 0 = all")
    ] = 512  # fmt: skip
    samples_every: Annotated[
        Count, _help("steps between samples, the last step's among them; 0 = none")
    ] = 0  # fmt: skip
    sample_prompt: Annotated[
        tuple[str, ...], _help("what the model continues in samples; may be given several times")
    ] = ()  # fmt: skip
    sample_tokens: Annotated[Positive, _help("tokens of a sample")] = 64

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.eval_every and self.eval_data is None:
            raise ValueError("--eval-every needs --eval-data")
        if self.samples_every and not self.sample_prompt:
            raise ValueError("--samples-every needs --sample-prompt, at least one")
        if self.sample_prompt and not self.samples_every:
            raise ValueError("--sample-prompt needs --samples-every")
        if "" in self.sample_prompt:
            raise ValueError("--sample-prompt must not be empty")


class Tracking(Section, frozen=True, kw_only=True):
    """Who is told of a run, and how much, for `metrics` and `start.logs`."""

    tracker_project: Annotated[str, _help("the project that a tracker shows the run in")] = (
        "psyche-fast"
    )
    tracker_name: Annotated[
        str | None, _help("what a tracker calls the run (default: the run directory's name)")
    ] = None  # fmt: skip
    tracker_tag: Annotated[
        tuple[str, ...], _help("a tracker's tag of the run; may be given several times")
    ] = ()  # fmt: skip
    tracker_offline: Annotated[
        bool, _help("the tracker writes to the run directory alone, to be uploaded later")
    ] = False  # fmt: skip
    metrics_port: Annotated[
        Port, _help("serve the newest metrics to Prometheus on this port of --host; 0 = no")
    ] = 0  # fmt: skip
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _help("what goes into logs/rank-N.log")
    ] = "info"  # fmt: skip
    log_every: Annotated[
        Amount, _help("seconds between lines of progress where there is no terminal; 0 = each step")
    ] = 10.0  # fmt: skip

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        for name in ("tracker_project", "tracker_name"):
            if getattr(self, name) == "":
                raise ValueError(f"{flag(name)} must not be empty")
