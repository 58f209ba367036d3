"""Decoding: which method chooses the words of a caption, and its settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from modules.registries import DECODING_METHODS
from system.flags import MAX_SEED, Bounds, FlagGroup, find_number_problem, flag

# Their settings are fields of Decoding, so that they are checked without loading the method.
BUILT_IN_METHODS = ("greedy", "beam", "sampling")
BEAM_SEARCH = "beam search (beam_size > 1)"
SAMPLING = "sampling (num_captions, temperature, top_p)"
SMALLEST = 1e-30  # what divides by it, or is compared with it, is still no 0 in float32
LARGEST = 1e30  # divided by it, a number is still no 0
MAX_LENGTH_PENALTY = 20  # the longest caption's divisor, 77 ** 20, is still finite in float32
MAX_CAPTIONS = 100  # beams or samples of a pair: memory grows with them


@dataclass(frozen=True)
class Decoding(FlagGroup):
    """How the words of a caption are chosen.

    `settings` holds a method's own settings: an object of its `Settings`, a dictionary to make one
    from, or None for its defaults. Raises ValueError for a method that is unknown or cannot be
    loaded, and for settings that it does not have.
    """

    decoding: str | None = flag(
        None,
        "method that chooses the words: %(choices)s; by default beam or sampling "
        "if the flags below ask for it, and greedy otherwise",
        task="caption",
        choices=DECODING_METHODS,
    )
    beam_size: int = flag(
        1,
        "partial captions that beam search keeps at each word; above 1 asks for beam search",
        int,
        task="caption",
        at_least=1,
        at_most=MAX_CAPTIONS,
    )
    length_penalty: float = flag(
        0.0,
        "exponent a in beam search's score, log-probability / length ** a; "
        "larger values favor longer captions",
        float,
        task="caption",
        at_least=0,
        at_most=MAX_LENGTH_PENALTY,
    )
    num_captions: int = flag(
        1,
        "captions per pair, with --do_predict; above 1 asks for sampling",
        int,
        task="caption",
        at_least=1,
        at_most=MAX_CAPTIONS,
    )
    temperature: float | None = flag(
        None,
        "sample words, with logits divided by this: the smaller, the closer to greedy search",
        float,
        task="caption",
        at_least=SMALLEST,
        at_most=LARGEST,
    )
    top_p: float | None = flag(
        None,
        "sample words, only from the most likely ones that together reach this probability",
        float,
        task="caption",
        at_least=SMALLEST,
        at_most=1,
    )
    seed: int = 42  # the flag --seed is in RunOptions
    settings: Any = None

    def __post_init__(self) -> None:
        if self.settings is None or isinstance(self.settings, Mapping):
            settings = _make_settings(self.decoding, self.settings or {})
            object.__setattr__(self, "settings", settings)

    def find_problems(self) -> list[str]:
        problems = super().find_problems()
        seed_problem = find_number_problem("seed", self.seed, int, Bounds(0, MAX_SEED))
        if seed_problem:
            problems.append(seed_problem)
        is_built_in = self.decoding is None or self.decoding in BUILT_IN_METHODS
        if problems or not is_built_in:
            return problems
        implied = self._implied_methods()
        if len(implied) > 1:
            problems.append(f"{BEAM_SEARCH} cannot be combined with {SAMPLING}")
        elif self.decoding is not None and implied not in ([], [self.decoding]):
            other = BEAM_SEARCH if implied == ["beam"] else SAMPLING
            problems.append(f"--decoding {self.decoding} cannot be combined with {other}")
        return problems

    def method_name(self) -> str:
        """The method that was given, or the one that the settings ask for.

        Raises ValueError for settings that are out of range or contradict each other.
        """
        problems = self.find_problems()
        if problems:
            raise ValueError("; ".join(problems))
        if self.decoding is not None:
            return self.decoding
        implied = self._implied_methods()
        return implied[0] if implied else "greedy"

    def settings_by_name(self) -> dict[str, Any]:
        """Everything that decides the words, for files.

        The method is included only if it was given.
        """
        names = [field.name for field in fields(self)]
        shared = [name for name in names if name not in ("decoding", "settings")]
        values = {name: getattr(self, name) for name in shared}
        if self.decoding is not None:
            values["decoding"] = self.decoding
        if self.settings is not None:
            values.update(asdict(self.settings))
        return values

    def _implied_methods(self) -> list[str]:
        """The built-in methods that settings other than `decoding` ask for."""
        implied = []
        if self.beam_size > 1:
            implied.append("beam")
        if self.num_captions > 1 or self.temperature is not None or self.top_p is not None:
            implied.append("sampling")
        return implied


def _make_settings(method: str | None, values: Mapping[str, Any]) -> Any:
    """The `Settings` of a method with these values; None if it has no settings of its own."""
    settings_class = None
    if method is not None and method not in BUILT_IN_METHODS:
        settings_class = getattr(DECODING_METHODS[method], "Settings", None)
    if settings_class is None:
        if values:
            owner = f"decoding method {method}" if method else "the default decoding method"
            raise ValueError(f"{owner} has no setting {next(iter(values))}")
        return None
    try:
        return settings_class(**values)
    except TypeError as error:
        raise ValueError(f"settings of the decoding method {method}: {error}") from None
