"""OpenAI's CLIP as a backbone for pairs. Every size comes from the weights' shapes.

Dimensions: B pairs, K pairs that share their first image, T tokens per image, E embedding size,
L text tokens, W text width, D vision width, R pixels along an image's side.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloaders.images import MEAN, STD
from modules.model.backbone import Features, PairBackbone, Part
from modules.model.clip_sizes import ClipSizes
from modules.model.clip_vision import PairVisionTower, inflate_patches
from modules.model.layers import Attention, LayerNorm, Transformer
from modules.model.limits import HEAD_WIDTH

log = logging.getLogger(__name__)

PAIR_PREFIXES = (
    "visual.ln_mid.",
    "visual.joint_positional_embedding",
    "visual.bef_embedding",
    "visual.aft_embedding",
)
HEAD_PREFIXES = (
    "ln_final.",
    "text_projection",
    "logit_scale",
    "visual.ln_post.",
    "visual.proj",
    "visual.conv2.",
)
BLOCK_NUMBER = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.")


class CLIP(PairBackbone):
    """CLIP with a vision tower that reads pairs.

    Tensor names are OpenAI's, plus a few for pairs.
    """

    key_prefix = "clip"
    pixel_mean = MEAN
    pixel_std = STD
    max_log_scale = math.log(100)

    def __init__(self, sizes: ClipSizes, intra_layers: int, linear_patch: str) -> None:
        super().__init__()
        if not 0 <= intra_layers <= sizes.vision_layers:
            raise ValueError(
                f"intra_num_hidden_layers is {intra_layers}, but this CLIP's vision tower has "
                f"{sizes.vision_layers} blocks: give 0 to {sizes.vision_layers}"
            )
        if linear_patch not in ("2d", "3d"):
            raise ValueError(f"linear_patch is {linear_patch!r}, expected '2d' or '3d'")
        width = sizes.transformer_width
        self.sizes = sizes
        self.image_resolution = sizes.image_resolution
        self.num_tokens = sizes.num_tokens
        self.embed_dim = sizes.embed_dim
        self.vocab_size = sizes.vocab_size
        self.context_length = sizes.context_length
        self.sot = sizes.sot
        self.eot = sizes.eot
        self.visual = PairVisionTower(sizes, intra_layers, linear_patch)
        self.transformer = Transformer(width, sizes.transformer_layers, width // HEAD_WIDTH)
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialize()

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], intra_layers: int, linear_patch: str
    ) -> "CLIP | None":
        """A CLIP ViT of the weights' sizes; None if there are no weights at all."""
        if not weights:
            return None
        return cls(ClipSizes.from_weights(weights), intra_layers, linear_patch)

    @torch.no_grad()
    def _initialize(self) -> None:
        """Initialize as OpenAI does. The vision tower draws its own vectors when it is built."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.sizes.transformer_width**-0.5)
        _initialize_blocks(self.visual.transformer)
        _initialize_blocks(self.transformer)
        if self.visual.linear_patch == "3d":
            self.visual.conv2.weight.copy_(inflate_patches(self.visual.conv1.weight))

    def encode_pairs(self, images: Tensor) -> Features:
        """(B, 2, 3, R, R) normalized, before first → tokens (B, 2T, E), pooled (B, E)."""
        return self.visual(images)

    def encode_against_first(self, images: Tensor) -> Features:
        """Pair image 0 with each other image: (B, 1+K, 3, R, R) → features of B·K pairs.

        They are grouped by the other image: all (0, 1), then all (0, 2).
        """
        return self.visual.encode_against_first(images)

    def encode_text(self, ids: Tensor) -> Features:
        """(B, L) token ids → tokens (B, L, E), pooled (B, E) at EOT (the largest id), mask (B, L).

        Raises ValueError if L exceeds the context length.
        """
        length = ids.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"{length} tokens exceed CLIP's context length of {self.context_length}"
            )
        x = self.token_embedding(ids) + self.positional_embedding[:length]  # (B, L, W)
        tokens = self.ln_final(self.transformer(x, causal=True)) @ self.text_projection  # (B, L, E)
        end = ids.argmax(dim=1)
        mask = (torch.arange(length, device=ids.device) <= end[:, None]).long()
        return Features(tokens, tokens[torch.arange(len(ids), device=ids.device), end], mask)

    def caption_embeddings(self) -> tuple[nn.Embedding, nn.Parameter]:
        """The token and position embeddings of the text tower."""
        return self.token_embedding, self.positional_embedding

    def vision_tower(self) -> nn.Module:
        """The module `visual`."""
        return self.visual

    def joint_attention(self) -> list[Attention]:
        """The attention of the vision blocks that see both images."""
        joint = self.visual.transformer.resblocks[self.visual.intra_layers :]
        return [block.attn for block in joint]

    def blocks(self) -> list[nn.Module]:
        """The blocks of both towers."""
        return [*self.visual.transformer.resblocks, *self.transformer.resblocks]

    def part_of(self, name: str) -> Part:
        """See `PairBackbone`. The blocks of each tower are counted from 0."""
        if name.startswith(PAIR_PREFIXES):
            return "pair"
        if name.startswith(HEAD_PREFIXES):
            return "head"
        block = BLOCK_NUMBER.match(name)
        return int(block.group(1)) if block else "stem"

    def unused_prefixes(self, task: str) -> tuple[str, ...]:
        """conv1 if conv2 replaces it; for captioning also the text tower except its embeddings."""
        patches = ("visual.conv1.",) if self.visual.linear_patch == "3d" else ()
        text = ("transformer.", "ln_final.", "text_projection")
        return patches + text if task == "caption" else patches

    def derived_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """conv2, made from conv1 if a 3d model is given weights for 2d patches."""
        if self.visual.linear_patch == "2d" or "visual.conv2.weight" in weights:
            return {}
        return {"visual.conv2.weight": inflate_patches(weights["visual.conv1.weight"])}

    @classmethod
    def resize_weights(
        cls, weights: Mapping[str, Tensor], image_resolution: int
    ) -> dict[str, Tensor]:
        """Interpolate the position embeddings of an image, and of both halves of a pair.

        Bicubic and antialiased, over the grid of patches; the class token's is kept. Raises
        ValueError if patches do not fill the new side.
        """
        sizes = ClipSizes.from_weights(weights)
        resized = replace(sizes, image_resolution=image_resolution)
        if resized == sizes:
            return dict(weights)
        log.info(
            "position embeddings resized from images of %d pixels to %d",
            sizes.image_resolution,
            image_resolution,
        )
        changed = {}
        names = {"visual.positional_embedding": 1, "visual.joint_positional_embedding": 2}
        for name, num_images in names.items():
            if name not in weights:
                continue
            expected = num_images * sizes.num_tokens
            if weights[name].ndim != 2 or len(weights[name]) != expected:
                shape = tuple(weights[name].shape)
                raise ValueError(f"clip.{name} has shape {shape}, expected {expected} positions")
            parts = weights[name].chunk(num_images)
            changed[name] = torch.cat([_resize(part, sizes.grid, resized.grid) for part in parts])
        return {**weights, **changed}

    def info(self) -> dict[str, Any]:
        """How many blocks see each image alone, the kind of patches, and the width of a head."""
        return {
            "intra_num_hidden_layers": self.visual.intra_layers,
            "linear_patch": self.visual.linear_patch,
            "head_width": HEAD_WIDTH,
        }

    def size_facts(self) -> dict[str, int]:
        """The nine sizes of `ClipSizes`."""
        return dict(vars(self.sizes))


def _initialize_blocks(tower: Transformer) -> None:
    depth = len(tower.resblocks)
    for block in tower.resblocks:
        width = block.ln_1.normalized_shape[0]
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)


def _resize(positions: Tensor, grid: int, new_grid: int) -> Tensor:
    """(1 + grid², D) → (1 + new_grid², D)."""
    patches = positions[1:].T.unflatten(1, (grid, grid))[None]  # (1, D, grid, grid)
    size = (new_grid, new_grid)
    patches = F.interpolate(patches, size=size, mode="bicubic", antialias=True)
    return torch.cat([positions[:1], patches[0].flatten(1).T])
