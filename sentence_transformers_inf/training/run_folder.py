"""The output folder of a training run: one run's, resumed where it stopped, and finished.

Everything is written whole or not at all. Of the processes of a run, the first one writes, and the others wait for it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_transformers_inf.recipe import RECIPE_FILE, read_recipe, write_recipe

COMPLETE_FILE = "complete"
"""In a checkpoint that was written to its end."""


_OF_THE_HOST = {"eval", "runs"}
"""What the host writes before a run."""


class MarkComplete(TrainerCallback):
    """Marks every checkpoint that was written to its end."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after a checkpoint was saved."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            (folder / COMPLETE_FILE).touch()


class KeepLast(TrainerCallback):
    """Keeps the weights of the newest checkpoint in memory, for when the host has loaded the best one's at the end."""

    weights: dict[str, Tensor]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Called before the first step, after a checkpoint was loaded."""
        self.weights = copy_of_weights(model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Called after a checkpoint was saved."""
        self.on_train_begin(args, state, control, model)


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights in main memory, for ``load_state_dict``."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


class RunFolder:
    """A folder for checkpoints, the model and its card.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def is_finished(self) -> bool:
        """Whether a finished model is there."""
        return bool((read_recipe(self.path) or {}).get("finished", False))

    def claim(self, recipe: dict[str, Any], overwrite: bool = False) -> None:
        """Make the folder this run's, or refuse one that holds something else.

        Args:
            recipe: What decides the weights.
            overwrite: Start anew in a folder that holds another or a finished run: all that it holds is removed.

        Raises:
            FileExistsError: It holds a finished model, an unfinished run of another recipe, or something else.
        """
        problem = [self._claim(recipe, overwrite) if PartialState().is_main_process else None]
        if (message := broadcast_object_list(problem)[0]) is not None:
            raise FileExistsError(message)

    def _claim(self, recipe: dict[str, Any], overwrite: bool) -> str | None:
        recipe = json.loads(json.dumps(recipe))
        if overwrite and (self.path / RECIPE_FILE).exists():  # nothing of one model may stay beside another
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if (earlier := read_recipe(self.path)) is not None:
            if earlier.get("finished", False):
                return (
                    f"{self.path} holds a finished model: name another --output (output_dir), or replace it with --overwrite"
                )
            if (change := _first_change(earlier, recipe)) is not None:
                name, before, now = change
                return (
                    f"{self.path} holds an unfinished run with another {name} ({before!r}, now {now!r}): name another "
                    "--output (output_dir), or replace it with --overwrite"
                )
        elif self.path.is_dir() and any(entry.name not in _OF_THE_HOST for entry in self.path.iterdir()):
            return f"{self.path} is not empty and holds no run of this recipe: name another output_dir"
        self.path.mkdir(parents=True, exist_ok=True)
        write_recipe(self.path, recipe)
        return None

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that was written to its end."""
        checkpoints = sorted(self.path.glob("checkpoint-[0-9]*"), key=lambda path: -int(path.name.rpartition("-")[2]))
        return next((str(path) for path in checkpoints if (path / COMPLETE_FILE).exists()), None)

    def finish(self, recipe: dict[str, Any]) -> None:
        """Note that the model is saved, and how it was trained."""
        write_recipe(self.path, {**recipe, "finished": True})

    def remove_checkpoints(self) -> None:
        """Remove what only resuming needs."""
        for path in self.path.glob("checkpoint-[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)


def _first_change(earlier: dict[str, Any], recipe: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting of a recipe that an earlier one has otherwise."""
    for name in [*recipe, *(name for name in earlier if name not in recipe)]:
        before, now = earlier.get(name), recipe.get(name)
        if isinstance(now, dict) and isinstance(before, dict):
            if (change := _first_change(before, now)) is not None:
                return change
        elif before != now:
            return name, before, now
    return None
