"""What trainers wrap weights in: dictionaries around a state dict, prefixes before its names."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

# Where programs keep the model's weights, the first that is there.
PLACES = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params", "ema")
MAX_NESTING = 4  # of dictionaries, and of prefixes
# Modules that compilers and others put around a part of a model; their names say nothing.
TRANSPARENT = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Around a whole model: data parallelism's and averaging's, and what Lightning users call it.
NAMED_PREFIXES = ("module", "model")
# A training state of this project, which also holds what its gradient scaler needs.
TRAINING_STATE = frozenset({"model", "optimizer", "scaler"})


def find_state_dict(value: Any) -> Any:
    """The state dict that a checkpoint holds, or the value itself if it holds none."""
    for _ in range(MAX_NESTING):
        if not isinstance(value, dict) or value.keys() >= TRAINING_STATE:
            return value
        inner = [value[place] for place in PLACES if isinstance(value.get(place), dict)]
        if not inner:
            return value
        value = inner[0]
    return value


def unwrap_names(
    weights: Mapping[str, Tensor], is_known: Callable[[Collection[str]], bool]
) -> dict[str, Tensor]:
    """Weights without the prefixes that hide names that `is_known`, if it knows any then.

    What is not of the wrapped model, such as the number of averaged models, is left out.
    """
    plain = {_drop_transparent(name): value for name, value in weights.items()}
    return _strip(plain, is_known, MAX_NESTING) or plain


def _drop_transparent(name: str) -> str:
    for part in TRANSPARENT:
        name = name.replace(part, "")
    return name


def _strip(
    weights: dict[str, Tensor], is_known: Callable[[Collection[str]], bool], levels: int
) -> dict[str, Tensor] | None:
    """The weights below the first prefix that leads to known names; None if there is none."""
    if is_known(weights):
        return weights
    if levels == 0:
        return None
    for prefix in _prefixes(weights):
        inner = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        found = _strip(inner, is_known, levels - 1)
        if found is not None:
            return found
    return None


def _prefixes(names: Collection[str]) -> Iterator[str]:
    """The first part of the names, if all that have several parts share it; then the usual ones."""
    dotted = [name for name in names if "." in name]
    parts = Counter(name.partition(".")[0] for name in dotted)
    for part, count in parts.items():
        if count == len(dotted) or part in NAMED_PREFIXES:
            yield f"{part}."
