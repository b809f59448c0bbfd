"""Progress of a run by its optimizer steps or by the clock, and the learning rate that follows it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from firp_cli.config import TrainingConfig

ADAM_BETAS = (0.9, 0.95)
FINAL_RATE = 0.1  # learning rate at the end of the cosine, as a share of the peak
EVENTS_PER_RUN = 10  # validations, and checkpoints, of a run that sets no interval
EVENTS_OF_FIRST_STAGE = 5  # its validations are over all tokens, its training steps over few


class Pace:
    """Place of a run between 0 and `total` planned optimizer steps. The learning rate and the end follow it.

    The place is the number of steps taken. In a run that is limited to `seconds` it is the larger of that number and
    the spent share of the time, times `total`: such a run goes through its whole schedule.
    """

    def __init__(self, total: int, seconds: float | None = None) -> None:
        self.total, self.seconds = total, seconds
        self.step = self.place = 0
        self._before = -1
        self._spent = 0.0
        self._began: float | None = None

    def resume(self, step: int, spent: float) -> None:
        """Go on after optimizer step `step` of a run that has spent so many seconds."""
        self._spent = spent
        self.move(step, spent)
        self._before = self.place - 1

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self._began is None:
            self._began = time.monotonic()

    def begin(self) -> None:
        """Set the place after the start values, whose time counts. The start passes a multiple of every number."""
        self.move(0, self.clock())
        self._before = -1

    def clock(self) -> float:
        """Return the seconds spent by this process's clock, those before a resume included."""
        return self._spent if self._began is None else self._spent + time.monotonic() - self._began

    def move(self, step: int, spent: float) -> int:
        """Set the place after optimizer step `step`, when so many seconds are spent, and return it."""
        self._before, self.step, self.place = self.place, step, step
        if self.seconds is not None:
            self.place = min(self.total, max(step, int(self.total * spent / self.seconds)))
        return self.place

    @property
    def ended(self) -> bool:
        """True once the last step has been taken or the time is over."""
        return self.place >= self.total

    def passed(self, every: int) -> bool:
        """Return True if the last move reached or passed a multiple of `every`."""
        return self.place // every > self._before // every

    @property
    def expected(self) -> int:
        """Expected number of optimizer steps at the end of the run, from its throughput so far."""
        return self.total if self.place <= self.step else round(self.step * self.total / self.place)


def make_pace(settings: TrainingConfig, total: int) -> Pace:
    """Return the pace of a run of `total` planned steps, limited by `training.max_minutes`."""
    return Pace(total, None if settings.max_minutes is None else 60 * settings.max_minutes)


def usual_interval(settings: TrainingConfig, total: int, events: int = EVENTS_PER_RUN) -> int:
    """Return the planned steps between validations, and checkpoints, of a run that sets no interval.

    There are `events` of each; with `training.max_minutes` at most one a minute.
    """
    if settings.max_minutes is not None:
        events = max(1, min(events, round(settings.max_minutes)))
    return max(1, math.ceil(total / events))


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Return the share of the peak rate at optimizer step `step` (from 0): linear warm-up, cosine to FINAL_RATE."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: TrainingConfig, pace: Pace
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Return AdamW and its learning rate schedule; the schedule follows `pace`, which moves before each step."""
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=settings.weight_decay
    )
    return optimizer, LambdaLR(
        optimizer, lambda step: learning_rate_factor(max(step, pace.place), pace.total, settings.warmup_ratio)
    )
