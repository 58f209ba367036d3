"""Everything the command line sets, in frozen groups."""

from collections.abc import Iterator
from dataclasses import Field, dataclass
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
    """Every option of a run. `task` is "retrieval" (adaptation) or "caption" (finetuning).

    `parse_options` returns only those in which it found no problem.
    """

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

    def groups(self) -> list[FlagGroup]:
        """The groups, in the order of GROUPS."""
        return [getattr(self, name) for name in GROUPS]

    def items(self) -> list[tuple[str, Any]]:
        """Name and value of every option that this run reads, without the secrets in URLs."""
        return [(flag.name, _without_secrets(value)) for flag, value in self._flags_with_values()]

    def changed_items(self) -> list[tuple[str, Any]]:
        """Like `items`, but only the options that differ from their defaults."""
        return [
            (flag.name, _without_secrets(value))
            for flag, value in self._flags_with_values()
            if value != flag.default
        ]

    def default_items(self) -> list[tuple[str, Any]]:
        """Like `items`, but only the options that have their default values."""
        return [
            (flag.name, _without_secrets(value))
            for flag, value in self._flags_with_values()
            if value == flag.default
        ]

    def _flags_with_values(self) -> Iterator[tuple[Field, Any]]:
        """The flags of this task; those of --do_predict only if it was given."""
        for group in self.groups():
            if group is self.predict and not self.run.do_predict:
                continue
            for source in (group, getattr(group, "settings", None)):
                if source is None:
                    continue
                for flag in list_flags(source, self.task):
                    yield flag, getattr(source, flag.name)


def _without_secrets(value: Any) -> Any:
    """The value of an option, for people and files."""
    if isinstance(value, Location):
        return str(value)
    return redact(value) if isinstance(value, str) else value
