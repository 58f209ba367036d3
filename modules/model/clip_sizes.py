"""The sizes of a CLIP ViT, given to build a random one or read from the shapes of weights."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from modules.model.limits import HEAD_WIDTH, MAX_LAYERS, MAX_PARAMETERS, MAX_SIZE, check_size


@dataclass(frozen=True)
class ClipSizes:
    """Nine sizes, checked. Raises ValueError for what no CLIP can have."""

    embed_dim: int
    image_resolution: int
    vision_layers: int
    vision_width: int
    vision_patch_size: int
    context_length: int
    vocab_size: int
    transformer_width: int
    transformer_layers: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
            check_size(f"CLIP size {name}", value, most)
        for name in ("vision_width", "transformer_width"):
            width = getattr(self, name)
            if width % HEAD_WIDTH:
                raise ValueError(
                    f"CLIP size {name} is {width}, expected a multiple of {HEAD_WIDTH}"
                )
        if self.image_resolution % self.vision_patch_size:
            raise ValueError(
                f"CLIP image_resolution {self.image_resolution} is not a multiple of "
                f"vision_patch_size {self.vision_patch_size}"
            )
        num_parameters = self.approximate_num_parameters
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"these CLIP sizes ask for {num_parameters / 1e9:.1f} billion parameters, "
                f"expected at most {MAX_PARAMETERS / 1e9:.1f}"
            )

    @property
    def approximate_num_parameters(self) -> int:
        """Those of all matrices and embeddings, those for pairs included."""
        vision = self.vision_width
        patches = 3 * self.vision_patch_size**2
        positions = 3 * self.num_tokens
        vision_rows = patches + positions + 12 * self.vision_layers * vision + self.embed_dim
        text = self.transformer_width
        vocabulary = self.vocab_size + self.context_length
        text_rows = vocabulary + 12 * self.transformer_layers * text + self.embed_dim
        return vision * vision_rows + text * text_rows

    @property
    def grid(self) -> int:
        """Patches along an image's side."""
        return self.image_resolution // self.vision_patch_size

    @property
    def num_tokens(self) -> int:
        """T, the tokens of one image: the class token and the patches."""
        return 1 + self.grid**2

    @property
    def sot(self) -> int:
        """The token id that starts a sentence: the last but one."""
        return self.vocab_size - 2

    @property
    def eot(self) -> int:
        """The token id that ends a sentence: the last."""
        return self.vocab_size - 1

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "ClipSizes":
        """Read from tensors under OpenAI's names. ValueError if they are not a CLIP ViT's."""
        if any(key.startswith("visual.layer1.") for key in weights):
            raise ValueError(
                "these are the weights of a ResNet CLIP; a CLIP with a ViT vision tower is expected"
            )
        patches, positions, projection, context, vocabulary = _key_shapes(weights)
        grid = math.isqrt(max(positions[0] - 1, 0))
        return cls(
            embed_dim=projection[1],
            image_resolution=grid * patches[-1],
            vision_layers=_count_blocks(weights, "visual."),
            vision_width=patches[0],
            vision_patch_size=patches[-1],
            context_length=context[0],
            vocab_size=vocabulary[0],
            transformer_width=vocabulary[1],
            transformer_layers=_count_blocks(weights, ""),
        )


# The tensors whose shapes give the sizes, and how many dimensions each has.
DIMENSIONS = {
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "text_projection": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
}


def _key_shapes(weights: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The shapes of the tensors in DIMENSIONS, in its order."""
    missing = [name for name in DIMENSIONS if name not in weights]
    if missing:
        raise ValueError(f"not CLIP weights: {missing[0]} is missing")
    shapes = {name: tuple(weights[name].shape) for name in DIMENSIONS}
    if [len(shape) for shape in shapes.values()] != list(DIMENSIONS.values()):
        raise ValueError(f"weights that are not a CLIP ViT's: {shapes}")
    return list(shapes.values())


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    block = re.compile(rf"{re.escape(prefix)}transformer\.resblocks\.(\d{{1,9}})\.")
    matches = (block.match(key) for key in weights)
    return 1 + max((int(match.group(1)) for match in matches if match), default=-1)
