"""A backbone for image pairs: all that CLIP4IDC asks of the model that encodes pairs and sentences.

A new backbone is a file with a subclass of `PairBackbone`, and one entry in
`modules.registries.BACKBONES`. It knows its tensors without its prefix: what is saved as
`clip.logit_scale` is `logit_scale` to CLIP.

Dimensions: B pairs, K pairs that share their first image, T tokens per image, E embedding size,
L text tokens, R pixels along an image's side.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modules.model.layers import Attention
from modules.registries import BACKBONES

Part = Literal["pair", "head", "stem"] | int


class Features(NamedTuple):
    """An encoder's output: every token, and one vector for the whole.

    A pair has tokens (B, 2T, E), those of before first, and pooled (B, E). A sentence has tokens
    (B, L, E), pooled (B, E) and a mask (B, L), 1 up to its end. Without a mask all tokens count.
    """

    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None = None


class PairBackbone(nn.Module, ABC):
    """A model that encodes pairs of images, and sentences, into one space."""

    key_prefix: ClassVar[str]  # "clip": `model.clip`, and its tensors are saved as `clip.…`
    image_resolution: int  # R
    num_tokens: int  # T
    embed_dim: int  # E, also the width of its token embeddings
    vocab_size: int
    context_length: int  # the largest L
    pixel_mean: tuple[float, float, float]  # of each color channel, in [0, 1]
    pixel_std: tuple[float, float, float]
    sot: int  # the token id that starts a sentence
    eot: int  # the token id that ends it
    logit_scale: nn.Parameter  # (): log of the factor on cosine similarities
    max_log_scale: float  # training keeps logit_scale at or below this

    @classmethod
    @abstractmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], intra_layers: int, linear_patch: str
    ) -> "PairBackbone | None":
        """Return a backbone with the sizes of these weights.

        Returns None if the weights belong to another kind. Only shapes are read; CLIP4IDC loads the
        values later. `intra_layers` and `linear_patch` are --intra_num_hidden_layers and
        --linear_patch. Raises ValueError if no backbone can be built from weights of its own kind.
        """

    @abstractmethod
    def encode_pairs(self, images: Tensor) -> Features:
        """(B, 2, 3, R, R) normalized, before first → tokens (B, 2T, E), pooled (B, E)."""

    @abstractmethod
    def encode_against_first(self, images: Tensor) -> Features:
        """Pair image 0 with each other image: (B, 1+K, 3, R, R) → features of B·K pairs.

        They are grouped by the other image: all (0, 1), then all (0, 2).
        """

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Features:
        """(B, L) token ids → tokens (B, L, E), pooled (B, E), mask (B, L)."""

    @abstractmethod
    def caption_embeddings(self) -> tuple[nn.Embedding, nn.Parameter]:
        """Token embedding (vocabulary, E) and positions (context, E) that the captioner shares."""

    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """What encodes images; --freeze_vision keeps all of it as it is."""

    @abstractmethod
    def part_of(self, name: str) -> Part:
        """The part that a tensor belongs to, which decides its learning rate and its freezing.

        "pair": new for image pairs, and absent from pretrained weights. "head": always trained.
        A number: its block, counted from the input. "stem": before all blocks.
        """

    @abstractmethod
    def unused_prefixes(self, task: str) -> tuple[str, ...]:
        """The prefixes of the names of tensors that this task's loss does not depend on.

        logit_scale is not among them: CLIP4IDC knows when it is used.
        """

    def joint_attention(self) -> list[Attention] | None:
        """The attention over both images' tokens, from input to output; None means no maps.

        For maps an image's tokens must be a class token and a square grid of patches. The list may
        be empty: then each image is encoded alone, and only the captioner's attention is shown.
        """
        return None

    def blocks(self) -> list[nn.Module]:
        """The blocks that --compile compiles."""
        return []

    def derived_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that the weights lack, computed from those they have."""
        return {}

    @classmethod
    def resize_weights(
        cls, weights: Mapping[str, Tensor], image_resolution: int
    ) -> dict[str, Tensor]:
        """The weights, changed for images of another size. ValueError if that is impossible."""
        raise ValueError(
            f"--image_resolution is {image_resolution}, but {cls.__name__} reads images of one "
            "size only: leave the option out"
        )

    def pretrained_names(self) -> list[str]:
        """Names of all tensors that pretrained weights contain: all but part "pair"."""
        return [name for name in self.state_dict() if self.part_of(name) != "pair"]

    def info(self) -> dict[str, Any]:
        """Settings for model.json, which cannot be read from the shapes."""
        return {}

    def size_facts(self) -> dict[str, int]:
        """Its sizes by name, for people to read."""
        names = ("image_resolution", "num_tokens", "embed_dim", "vocab_size", "context_length")
        return {name: getattr(self, name) for name in names}


def build_backbone(
    weights: Mapping[str, Tensor], intra_layers: int, linear_patch: str
) -> PairBackbone:
    """A backbone of the first registered class that takes these released-name weights.

    Its parameters still have their initial values. Raises ValueError if no class takes the weights,
    or if the class that does lacks a member.
    """
    reasons = []
    for name in BACKBONES:
        backbone_class = BACKBONES[name]
        own = strip_prefix(weights, backbone_class.key_prefix)
        try:
            backbone = backbone_class.from_weights(own, intra_layers, linear_patch)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if backbone is not None:
            _check_attributes(name, backbone)
            return backbone
    raise ValueError("; ".join(reasons) or no_backbone_message(weights))


def has_all_pretrained_tensors(weights: Mapping[str, Tensor]) -> bool:
    """Whether released-name weights hold every pretrained tensor of a registered backbone."""
    try:
        with torch.device("meta"):
            backbone = build_backbone(weights, intra_layers=0, linear_patch="2d")
    except ValueError:
        return False
    names = backbone.pretrained_names()
    return all(f"{backbone.key_prefix}.{name}" in weights for name in names)


def key_prefixes() -> tuple[str, ...]:
    """The prefixes of the registered backbones' tensors, such as `clip.`."""
    return tuple(f"{BACKBONES[name].key_prefix}." for name in BACKBONES)


def strip_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, named without both; no others."""
    start = f"{prefix}."
    own = {key: value for key, value in weights.items() if key.startswith(start)}
    return {key.removeprefix(start): value for key, value in own.items()}


def no_backbone_message(keys: Iterable[str]) -> str:
    """The message for weights of no registered backbone."""
    first = ", ".join(list(keys)[:3])
    return (
        f"no registered backbone ({', '.join(BACKBONES)}) takes these weights: "
        f"their tensors are called {first} …"
    )


def _check_attributes(name: str, backbone: PairBackbone) -> None:
    missing = [member for member in PairBackbone.__annotations__ if not hasattr(backbone, member)]
    if missing:
        raise ValueError(f"backbone {name!r} lacks {', '.join(missing)}")
