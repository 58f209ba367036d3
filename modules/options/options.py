"""Options: all that the command line of a run says, as frozen groups."""

from dataclasses import dataclass
from typing import Any

from modules.options.decoding import Decoding
from modules.options.groups import (
    DataOptions,
    ModelOptions,
    PredictOptions,
    RunOptions,
    TrainingOptions,
)
from system.flags import FlagGroup, list_flags
from system.urls import Location, redact

GROUPS: dict[str, type[FlagGroup]] = {
    "run": RunOptions,
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
    "decoding": Decoding,
    "predict": PredictOptions,
}


@dataclass(frozen=True)
class Options:
    """Every option of a run, checked. `task` is "retrieval" (adaptation) or "caption"."""

    task: str
    run: RunOptions
    data: DataOptions
    model: ModelOptions
    training: TrainingOptions
    decoding: Decoding
    predict: PredictOptions
    ignored: tuple[str, ...] = ()

    @property
    def objective(self) -> str:
        """The name of the training objective: the one given, or what the other options imply."""
        if self.training.objective is not None:
            return self.training.objective
        if self.task == "retrieval":
            return "contrastive"
        return "self_critical" if self.training.scst else "cross_entropy"

    def groups_and_settings(self) -> list[FlagGroup]:
        """The groups, and after each the settings of a plug-in that it holds."""
        groups = [getattr(self, name) for name in GROUPS]
        held = [(group, getattr(group, "settings", None)) for group in groups]
        return [part for pair in held for part in pair if part is not None]

    def items(self, changed: bool | None = None) -> list[tuple[str, Any]]:
        """Name and value of every option of this task: all, or only those that differ from their
        defaults, or only those that do not.

        They are for people and files: secrets in URLs are left out.
        """
        found = []
        for part in self.groups_and_settings():
            if part is self.predict and not self.run.do_predict:
                continue
            for one in list_flags(part, self.task):
                value = getattr(part, one.name)
                if changed is None or (value != one.default) == changed:
                    found.append((one.name, _without_secrets(value)))
        return found


def _without_secrets(value: Any) -> Any:
    """The value of an option for people and files."""
    if isinstance(value, Location):
        return str(value)
    return redact(value) if isinstance(value, str) else value
