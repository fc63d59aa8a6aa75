"""How far a run has come: what is counted, and goes into every checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from velora_pretrain.spikes import LossSpikes


@dataclass(kw_only=True)
class Progress:
    """Counts of a run, up to the last step done."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens read, padding left out."""
    cursor: dict[str, Any] | None = None
    """Place in the data after the last batch."""
    skipped_steps: int = 0
    """Steps that were not taken because their numbers were not finite."""
    rollbacks: int = 0
    """Times that the run has gone back to a checkpoint."""
    failures_in_a_row: int = 0
    """Steps whose numbers failed since the last that was taken, or since a checkpoint beyond the one gone back to."""
    seconds_before: float = 0.0
    """Wall time of the processes that ran it before."""
    started_seconds: float = field(default_factory=time.monotonic)
    """When this process began."""
    evaluated_steps: set[int] = field(default_factory=set)
    """Steps after which it was evaluated."""
    spikes: LossSpikes = field(default_factory=lambda: LossSpikes([]))
    """Holds losses against those before."""

    @classmethod
    def of(cls, state: dict[str, Any], records: Iterable[dict[str, Any]]) -> Progress:
        """What was counted up to a checkpoint.

        Args:
            state: its training_state.json; empty at the beginning.
            records: of the run. Those after the checkpoint do not count: another process may not have dropped them yet.
        """
        step = state.get("step", 0)
        records = [record for record in records if record["step"] <= step]
        losses = (record.get("loss_nats_per_token") for record in records)
        return cls(
            step=step,
            tokens=state.get("tokens", 0),
            cursor=state.get("cursor"),
            skipped_steps=state.get("skipped_steps", 0),
            rollbacks=state.get("rollbacks", 0),
            seconds_before=state.get("seconds", 0.0),
            evaluated_steps={record["step"] for record in records if "perplexity" in record},
            spikes=LossSpikes(loss for loss in losses if loss is not None),
        )

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, over all its processes' lives."""
        return self.seconds_before + time.monotonic() - self.started_seconds

    @property
    def is_evaluated(self) -> bool:
        """Whether the last step done has its evaluation."""
        return self.step in self.evaluated_steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the step, for JSON."""
        return {
            "tokens": self.tokens,
            "cursor": self.cursor,
            "skipped_steps": self.skipped_steps,
            "rollbacks": self.rollbacks,
            "seconds": self.seconds,
        }

    def gone_back(self, earlier: Progress, cursor: dict[str, Any]) -> Progress:
        """The counts after the run has gone back to where `earlier` was, and on with the data at `cursor`."""
        earlier.cursor, earlier.skipped_steps, earlier.rollbacks = cursor, self.skipped_steps, self.rollbacks + 1
        earlier.failures_in_a_row = self.failures_in_a_row
        earlier.seconds_before, earlier.started_seconds = self.seconds_before, self.started_seconds
        return earlier
