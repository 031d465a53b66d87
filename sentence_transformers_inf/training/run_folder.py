"""The output folder of a training run: one run's, resumed where it stopped, and finished.

Everything is written whole or not at all, by one command at a time. Of the processes of a run, the first one writes, and the
others wait for it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from sentence_transformers_inf.recipe import (
    LOCK_FILE,
    RECIPE_FILE,
    is_checkpoint,
    locked,
    model_files,
    read_json,
    read_recipe,
    write_recipe,
    write_whole,
)

logger = logging.get_logger(__name__)

COMPLETE_FILE = "complete"
"""In a checkpoint that was written to its end: the CRC-32 of each of its files."""

_NOT_A_RUN = {"eval", "runs", LOCK_FILE}
"""What the host and the lock write before a run."""

_Result = TypeVar("_Result")


class MarkComplete(TrainerCallback):
    """Marks every checkpoint that was written to its end."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after a checkpoint was saved."""
        PartialState().wait_for_everyone()  # each process has a file in it
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            write_whole(folder / COMPLETE_FILE, json.dumps(_sums(folder)))


class SaveByTime(TrainerCallback):
    """Asks for a checkpoint when the last is some minutes old.

    Args:
        minutes: How many.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called before the first step."""
        self.saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each step."""
        if _on_first(lambda: time.monotonic() - self.saved >= self.seconds):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after a checkpoint was saved."""
        self.saved = time.monotonic()


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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands out of the folder.

        Raises:
            FileExistsError: It holds something that is no run.
            OSError: Another command is writing there, or it cannot be written to.
        """
        if (problem := _on_first(self.foreign)) is not None:
            raise FileExistsError(problem)
        with contextlib.ExitStack() as stack:

            def lock() -> str | None:
                try:
                    stack.enter_context(locked(self.path))
                except OSError as error:
                    return str(error)
                return None

            if (problem := _on_first(lock)) is not None:
                raise BlockingIOError(problem)
            yield

    def check_outside(self, *sources: str | Path | None) -> None:
        """Refuse to train from what is in the folder: the run writes there, and removes what it replaces.

        Args:
            *sources: Of the base, the data and the like; what is no path that exists is passed over.

        Raises:
            ValueError: The message names the source.
        """
        for source in [source for source in sources if source is not None]:
            inside = {self.path.absolute(), self.path.resolve()} & {
                parent for path in (Path(source).absolute(), Path(source).resolve()) for parent in (path, *path.parents)
            }
            if inside and Path(source).exists():
                raise ValueError(f"{source} is in {self.path}, where the run is written: name another --output (output_dir)")

    def claim(self, recipe: dict[str, Any], overwrite: bool = False) -> None:
        """Make the folder this run's, or refuse one that holds something else.

        Args:
            recipe: What decides the weights.
            overwrite: Start anew in a folder that holds another or a finished run: all that it holds is removed.

        Raises:
            FileExistsError: It holds a finished model, an unfinished run of another recipe, or something else.
        """
        self.check(recipe, overwrite)
        _on_first(lambda: self._claim(json.loads(json.dumps(recipe))))

    def check(self, recipe: dict[str, Any], overwrite: bool = False) -> None:
        """Whether :meth:`claim` would refuse; nothing is written.

        Raises:
            FileExistsError: It would.
        """
        if (problem := _on_first(lambda: self._problem(json.loads(json.dumps(recipe)), overwrite))) is not None:
            raise FileExistsError(problem)

    def _problem(self, recipe: dict[str, Any], overwrite: bool) -> str | None:
        try:
            earlier = read_recipe(self.path)
        except ValueError as error:
            return str(error)
        if earlier is None:
            return self.foreign()
        if overwrite:
            return None
        if earlier.get("finished", False):
            return f"{self.path} holds a finished model: name another --output (output_dir), or replace it with --overwrite"
        if (change := _first_change(earlier, recipe)) is not None:
            name, before, now = change
            return (
                f"{self.path} holds an unfinished run with another {name} ({before!r}, now {now!r}): name another "
                "--output (output_dir), or replace it with --overwrite"
            )
        return None

    def _claim(self, recipe: dict[str, Any]) -> None:
        earlier = read_recipe(self.path)
        if (
            earlier is not None and _first_change(earlier, recipe) is not None
        ):  # nothing of one model may stay beside another
            write_recipe(self.path, {**earlier, "finished": False})
            for entry in self.path.iterdir():
                if entry.name not in (RECIPE_FILE, LOCK_FILE):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        write_recipe(self.path, recipe)

    def foreign(self) -> str | None:
        """Why no run may begin in the folder: it holds something, and that is no run; ``None`` if one may."""
        if (self.path / RECIPE_FILE).exists() or not self.path.is_dir():
            return None
        left = [entry.name for entry in self.path.iterdir() if entry.name not in _NOT_A_RUN]
        if all(name.startswith(f".{RECIPE_FILE}.") for name in left):  # killed while it wrote its recipe
            return None
        return f"{self.path} is not empty and holds no run of this recipe: name another output_dir"

    def reopen(self, recipe: dict[str, Any]) -> None:
        """Let the run of a recipe end again whose command was stopped after the model was saved: checkpoints are left."""

        def reopen() -> None:
            earlier = read_recipe(self.path) or {}
            recorded = {name: earlier.get(name) for name in recipe}
            if earlier.get("finished", False) and self.checkpoints() and recorded == json.loads(json.dumps(recipe)):
                write_recipe(self.path, recipe)

        _on_first(reopen)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.path.glob("checkpoint-*") if is_checkpoint(path) and path.is_dir()]

    def checkpoints(self) -> list[Path]:
        """The checkpoints that were written to their end, the newest first."""
        found = [path for path in self._checkpoints() if (path / COMPLETE_FILE).is_file()]
        return sorted(found, key=_step, reverse=True)

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that is as it was written, and the best one with it; what is damaged is removed."""
        return _on_first(self._last_checkpoint)

    def _last_checkpoint(self) -> str | None:
        for path in self._checkpoints():
            if not (path / COMPLETE_FILE).is_file():  # the run was killed while it wrote
                shutil.rmtree(path)
        damage = {path: _damage(path) for path in self.checkpoints()}
        for path, damaged in damage.items():
            if damaged is not None:
                logger.warning(f"{path} is damaged ({damaged}): it is passed over, and what it held is trained again")
                shutil.rmtree(path)
        for path in self.checkpoints():
            best = read_json(path / "trainer_state.json").get("best_model_checkpoint")
            if best is None or (self.path / Path(best).name).is_dir():
                logger.warning(f"Going on from step {_step(path)} ({path})")
                return str(path)
            shutil.rmtree(path)  # the weights that it would end with are gone
        if damage:
            logger.warning(f"{self.path} has no checkpoint to go on from: the training starts again from its beginning")
        return None

    def share_weights(self) -> None:
        """Let who may read a saved model read its weights, which safetensors writes for their owner alone."""
        for path in model_files(self.path, "*.safetensors"):
            path.chmod((self.path / "modules.json").stat().st_mode)

    def finish(self, recipe: dict[str, Any]) -> None:
        """Note that the model is saved, and how it was trained."""
        write_recipe(self.path, {**recipe, "finished": True})

    def remove_checkpoints(self) -> None:
        """Remove what only resuming needs."""
        for path in self._checkpoints():
            shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _sums(checkpoint: Path) -> dict[str, int]:
    """The CRC-32 of each file of a checkpoint, by its path in it."""
    sums = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != COMPLETE_FILE:
            total = 0
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    total = zlib.crc32(block, total)
            sums[path.relative_to(checkpoint).as_posix()] = total
    return sums


def _damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written; ``None`` where all is."""
    try:
        expected = read_json(checkpoint / COMPLETE_FILE)
    except ValueError:
        return COMPLETE_FILE
    found = _sums(checkpoint)
    return next((name for name, total in expected.items() if found.get(name) != total), None if expected else COMPLETE_FILE)


def _on_first(work: Callable[[], _Result]) -> _Result:
    """What the first process of a run finds, known to all."""
    found = [work() if PartialState().is_main_process else None]
    result: _Result = broadcast_object_list(found)[0]
    return result


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
