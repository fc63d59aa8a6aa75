"""Experiment trackers beside metrics.jsonl, by accelerate's classes: TensorBoard, Weights & Biases, trackio.

A tracker is a guest of the run: it gets what metrics.jsonl has, and whatever goes wrong with it, the run goes on as it
would have without. A run has one place in each tracker, where it goes on when it is resumed.

    tensorboard   RUN/tensorboard; steps that are done again replace those of before
    wandb         a run with the id in RUN/tracking.json; of steps that are done again those of before stay
    trackio       a run named after the folder and that id; steps that are done again are there twice
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from velora_pretrain.config import Run
from velora_pretrain.errors import UserError
from velora_pretrain.files import read_json, write_atomically
from velora_pretrain.recipe import flat_settings
from velora_pretrain.records import EvaluationRecord, RunFolder, TrainingRecord, fields_of
from velora_pretrain.sections import TrackerName

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

LEFT_OUT = ("step", "unix_seconds")
"""Fields of records that every tracker has by itself."""
FINISH_SECONDS = 60.0
"""Longest time for which the end of a run waits until a tracker has sent everything."""


def check_installed(names: Iterable[TrackerName]) -> None:
    """Checks that trackers can be used.

    Raises:
        UserError: one cannot; names its extra.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'tracking.trackers: {name} is not installed; install it with: pip install "velora-pretrain[{name}]"'
            )


class Trackers:
    """The trackers of one process.

    Args:
        names: of them.
        run: its configuration goes to each as hyperparameters.
        folder: of the run.
        step: optimizer steps done before.
        warn: told, once for each tracker, what went wrong with it; it is then left out.
    """

    def __init__(
        self, names: Sequence[TrackerName], run: Run, folder: RunFolder, *, step: int, warn: Callable[[str], None]
    ) -> None:
        self._run, self._folder, self._warn = run, folder, warn
        self._running: dict[TrackerName, GeneralTracker] = {}
        self._wandb_step = 0
        """Before it, W&B takes nothing any more, and would complain of every step in the terminal."""
        for name in names:
            self._guarded(name, lambda name=name: self._start(name, step))

    def log(self, record: TrainingRecord | EvaluationRecord, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Passes on a record, and what the model wrote at an evaluation.

        Args:
            record: a training record or an evaluation.
            samples: lines of samples.jsonl.
        """
        kind = "training" if isinstance(record, TrainingRecord) else "evaluation"
        numbers = {key: value for key, value in fields_of(record).items() if not isinstance(value, str)}
        values: dict[str, Any] = {f"{kind}/{key}": value for key, value in numbers.items() if key not in LEFT_OUT}
        values |= {
            f"samples/{place}": f"{sample['prompt']} \N{RIGHTWARDS ARROW} {sample['continuation']}"
            for place, sample in enumerate(samples, start=1)
        }
        for name, tracker in [*self._running.items()]:
            if name != "wandb" or record.step >= self._wandb_step:
                self._guarded(name, lambda tracker=tracker: tracker.log(values, step=record.step))
        self._wandb_step = max(self._wandb_step, record.step)

    def go_back(self, step: int) -> None:
        """Drops what came after `step`, where that can be done: the run goes on from there.

        Args:
            step: optimizer steps done.
        """
        board = self._running.get("tensorboard")
        if board is not None:
            self._guarded("tensorboard", lambda: (board.finish(), self._start("tensorboard", step)))

    def close(self) -> None:
        """Returns when the trackers have what they were given, or Ctrl-C ends the wait for one."""
        for name, tracker in [*self._running.items()]:
            try:
                self._guarded(name, tracker.finish)
            except KeyboardInterrupt:
                self._warn(f"tracker {name}: its last records were not waited for")
        self._running = {}

    def _start(self, name: TrackerName, step: int) -> None:
        tracker = self._make(name, step)
        tracker.start()
        if name != "tensorboard" or not any((self._folder.path / name).glob("*/hparams.yml")):
            tracker.store_init_configuration(hyperparameters(self._run))
        if name == "wandb":
            self._wandb_step = tracker.tracker.starting_step  # pyright: ignore[reportAttributeAccessIssue]
        self._running[name] = tracker

    def _make(self, name: TrackerName, step: int) -> GeneralTracker:
        # Which imports torch.
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        path, project = self._folder.path, self._run.tracking.project
        if name == "tensorboard":
            return TensorBoardTracker(name, path, purge_step=step + 1)
        run_id = _run_id(self._folder)
        if name == "trackio":
            return TrackioTracker(project, name=f"{path.name}-{run_id}", resume="allow")
        # The terminal is the display's, which W&B would else write down frame by frame; and without a network it would
        # try for ever to send the rest, which it has on disk.
        settings = {"console": "off", "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        return WandBTracker(project, name=path.name, id=run_id, resume="allow", dir=str(path), settings=settings)

    def _guarded(self, name: TrackerName, act: Callable[[], object]) -> None:
        """Does something with a tracker, which is left out from then on if that fails."""
        try:
            act()
        # Another program's code, of which nothing may end the run.
        except (Exception, SystemExit) as error:
            self._running.pop(name, None)
            reason = next(iter(str(error).splitlines()), "").rstrip(".")
            self._warn(
                f"tracker {name}: {type(error).__name__}{reason and f': {reason}'}; it is left out, and"
                f" {self._folder.metrics} has every record"
            )


def hyperparameters(run: Run) -> dict[str, bool | int | float | str]:
    """The configuration in a form that every tracker takes: by dotted keys, lists as text, what is not set left out."""
    settings = {key: value for key, value in flat_settings(run).items() if value is not None}
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in settings.items()
    }


def _run_id(folder: RunFolder) -> str:
    """The run's id in trackers outside its folder; drawn once, so that a later folder of that name is another run."""
    path = folder.path / "tracking.json"
    if not path.exists():
        write_atomically(path, (json.dumps({"run_id": secrets.token_hex(4)}) + "\n").encode())
    return str(read_json(path)["run_id"])
