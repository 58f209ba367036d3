"""TODO."""

from dataclasses import dataclass

from modules.options.checks import decoding_problems


@dataclass(frozen=True)
class Decoding:
    """How words are chosen: greedily, by beams, or (num_captions above 1, temperature or top_p given) drawn."""

    beam_size: int = 1
    length_penalty: float = 0.0
    num_captions: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        problems = decoding_problems(
            self.beam_size, self.num_captions, self.temperature, self.top_p
        )
        problems += [f"seed is {self.seed}, expected at least 0"] if self.seed < 0 else []
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def draws(self) -> bool:
        """Whether words are drawn."""
        return self.num_captions > 1 or self.temperature is not None or self.top_p is not None
