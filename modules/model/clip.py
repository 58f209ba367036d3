"""CLIP with a vision tower that reads pairs of images (paper §3.2, SPEC §4). Every size comes from the weights' shapes.

Letters: B pairs, N images, T tokens per image (1 + grid²), D vision width, E embedding, L words, p patch size.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.model.bert import MAX_LAYERS, MAX_PARAMETERS, MAX_SIZE
from modules.model.layers import LayerNorm, Transformer

HEAD_WIDTH = 64  # OpenAI's CLIPs all have heads of 64


MAX_LOG_SCALE = math.log(100)


class Features(NamedTuple):
    """What a tower gives: every token and the pooled vector.

    A pair has tokens (B, 2T, E), before's first, and pooled (B, E); a text has tokens (B, L, E), pooled (B, E) and a mask
    (B, L), 1 up to its EOT. Where mask is None, all tokens count.
    """

    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class ClipSizes:
    """The sizes of a CLIP ViT: what a random one is built from, and what the shapes of given weights say."""

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
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(
                    f"CLIP size {name} is {reprlib.repr(value)}, expected a whole number of at least 1 and at most "
                    f"{most}"
                )
        for name in ("vision_width", "transformer_width"):
            if getattr(self, name) % HEAD_WIDTH:
                raise ValueError(
                    f"CLIP size {name} is {getattr(self, name)}, expected a multiple of {HEAD_WIDTH}"
                )
        if self.image_resolution % self.vision_patch_size:
            raise ValueError(
                f"CLIP image_resolution {self.image_resolution} is not a multiple of vision_patch_size "
                f"{self.vision_patch_size}"
            )
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"these CLIP sizes ask for {self.num_parameters / 1e9:.1f} billion parameters, expected at most "
                f"{MAX_PARAMETERS / 1e9:.1f}"
            )

    @property
    def num_parameters(self) -> int:
        """About as many as the model has: those of matrices and embeddings, the pair's own included."""
        vision, text = self.vision_width, self.transformer_width
        return vision * (
            3 * self.vision_patch_size**2
            + 3 * self.num_tokens
            + 12 * self.vision_layers * vision
            + self.embed_dim
        ) + text * (
            self.vocab_size
            + self.context_length
            + 12 * self.transformer_layers * text
            + self.embed_dim
        )

    @property
    def num_tokens(self) -> int:
        """T, the tokens of one image: the class token and the patches."""
        return 1 + (self.image_resolution // self.vision_patch_size) ** 2

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "ClipSizes":
        """Read the sizes from OpenAI's key names (no `clip.` prefix). Raises ValueError for what is no CLIP ViT."""
        shapes = {
            name: tuple(weights[name].shape) if name in weights else None
            for name in (
                "visual.conv1.weight",
                "visual.positional_embedding",
                "text_projection",
                "positional_embedding",
                "token_embedding.weight",
            )
        }
        if any(key.startswith("visual.layer1.") for key in weights):
            raise ValueError(
                "these are the weights of a ResNet CLIP; a CLIP with a ViT vision tower is expected"
            )
        missing = [name for name, shape in shapes.items() if shape is None]
        if missing:
            raise ValueError(f"no CLIP weights: {missing[0]} is missing")
        patches, positions, projection, context, vocabulary = shapes.values()
        if [len(shape) for shape in shapes.values()] != [4, 2, 2, 2, 2]:
            raise ValueError(f"no CLIP ViT weights: {shapes}")
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


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    numbers = (
        re.match(rf"{re.escape(prefix)}transformer\.resblocks\.(\d{{1,9}})\.", key)
        for key in weights
    )
    return 1 + max((int(match.group(1)) for match in numbers if match), default=-1)


class PairVisionTower(nn.Module):
    """CLIP's ViT on pairs: the first `intra_layers` blocks see each image alone, the others both images jointly."""

    def __init__(self, sizes: ClipSizes, intra_layers: int, linear_patch: str) -> None:
        super().__init__()
        width, patch, tokens = sizes.vision_width, sizes.vision_patch_size, sizes.num_tokens
        self.intra_layers, self.linear_patch = intra_layers, linear_patch
        self.image_resolution, self.patch_size = sizes.image_resolution, patch
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        if linear_patch == "3d":
            self.conv2 = nn.Conv3d(
                3, width, (3, patch, patch), stride=(1, patch, patch), padding=(1, 0, 0), bias=False
            )
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.bef_embedding = nn.Parameter(scale * torch.randn(width))
        self.aft_embedding = nn.Parameter(scale * torch.randn(width))
        self.joint_positional_embedding = nn.Parameter(scale * torch.randn(2 * tokens, width))
        self.ln_pre = LayerNorm(width)
        self.ln_mid = LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers, width // HEAD_WIDTH)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, sizes.embed_dim))

    def forward(self, images: Tensor) -> Features:
        """(B, 2, 3, H, W) normalised pairs → tokens (B, 2T, E), pooled (B, E)."""
        if self.linear_patch == "3d":
            return self._joint_blocks(
                self._intra_blocks(self._patches_3d(images)).unflatten(0, images.shape[:2])
            )
        return self._joint_blocks(self._encode_images(images))

    def encode_against_first(self, images: Tensor) -> Features:
        """(B, 1+K, 3, H, W): image 0 paired with each of the K others → B·K pairs, all of image 1's first.

        With 2d patches the first image goes through the per-image blocks once for all of its pairs.
        """
        others = range(1, images.shape[1])
        if self.linear_patch == "3d":
            return self(torch.cat([images[:, [0, other]] for other in others]))
        alone = self._encode_images(images)  # (B, 1+K, T, D)
        return self._joint_blocks(torch.cat([alone[:, [0, other]] for other in others]))

    def _encode_images(self, images: Tensor) -> Tensor:
        return self._intra_blocks(self._patches_2d(images.flatten(0, 1))).unflatten(
            0, images.shape[:2]
        )  # (B, images, T, D)

    def _patches_2d(self, images: Tensor) -> Tensor:
        """conv1 as the one matrix product that it is: (N, 3, H, W) → (N, T-1, D)."""
        return F.linear(self._patchify(images), self.conv1.weight.flatten(1))

    def _patches_3d(self, pairs: Tensor) -> Tensor:
        """conv2, over two frames and padding, likewise: (B, 2, 3, H, W) → (2B, T-1, D).

        (oneDNN's own Conv3d leaves rubbish in the weight's gradient in bf16: seen with torch 2.15 on an AMD CPU.)
        """
        taps = self.conv2.weight.transpose(
            1, 2
        )  # (D, 3 frames, 3, p, p); the middle one meets the patch's own frame
        kernel = torch.cat([taps[:, 1:], taps[:, :2]]).flatten(
            1
        )  # (2D, 2·3·p·p): for before's patches, for after's
        cut = self._patchify(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        patches = F.linear(cut.transpose(1, 2).flatten(2), kernel)  # (B, T-1, 2D)
        return patches.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)

    def _patchify(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, T-1, 3·p·p), patches in rows."""
        grid = self.image_resolution // self.patch_size
        rows = (
            images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1)).permute(0, 2, 4, 1, 3, 5)
        )  # (N, grid, grid, 3, p, p)
        return rows.flatten(3).flatten(1, 2)

    def _intra_blocks(self, patches: Tensor) -> Tensor:
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding  # (N, T, D)
        return self.transformer(self.ln_pre(x), stop=self.intra_layers)

    def _joint_blocks(self, alone: Tensor) -> Features:
        num_tokens = alone.shape[2]
        both = torch.cat(
            [alone[:, 0] + self.bef_embedding, alone[:, 1] + self.aft_embedding], dim=1
        )  # (B, 2T, D)
        both = self.ln_mid(both + self.joint_positional_embedding)
        both = self.transformer(both, start=self.intra_layers)
        tokens = self.ln_post(both) @ self.proj  # (B, 2T, E)
        return Features(tokens, (tokens[:, 0] + tokens[:, num_tokens]) / 2)


class CLIP(nn.Module):
    """OpenAI's CLIP, its vision tower reading pairs. Parameter names are OpenAI's, plus the pair's own."""

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
        self.visual = PairVisionTower(sizes, intra_layers, linear_patch)
        self.transformer = Transformer(width, sizes.transformer_layers, width // HEAD_WIDTH)
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """OpenAI's initialisation (SPEC §2); the vision tower's vectors are drawn where they are made."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.sizes.transformer_width**-0.5)
        for tower in (self.visual.transformer, self.transformer):
            width, depth = tower.resblocks[0].ln_1.normalized_shape[0], len(tower.resblocks)
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        if self.visual.linear_patch == "3d":
            self.visual.conv2.weight.copy_(inflate_patches(self.visual.conv1.weight))

    def encode_text(self, ids: Tensor) -> Features:
        """(B, L) token ids → tokens (B, L, E), pooled (B, E) at the largest id (EOT), mask. L is at most the context length."""
        if ids.shape[1] > self.sizes.context_length:
            raise ValueError(
                f"{ids.shape[1]} words exceed CLIP's context length of {self.sizes.context_length}"
            )
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]  # (B, L, W)
        tokens = self.ln_final(self.transformer(x, causal=True)) @ self.text_projection  # (B, L, E)
        end = ids.argmax(dim=1)
        mask = (torch.arange(ids.shape[1], device=ids.device) <= end[:, None]).long()
        return Features(tokens, tokens[torch.arange(len(ids), device=ids.device), end], mask)


def inflate_patches(conv1: Tensor) -> Tensor:
    """conv2 from conv1: (D, 3, p, p) → (D, 3, 3, p, p), conv1 in the middle frame and zeros elsewhere."""
    conv2 = torch.zeros(*conv1.shape[:2], 3, *conv1.shape[2:], dtype=conv1.dtype)
    conv2[:, :, 1] = conv1
    return conv2


PAIR_KEYS = (
    "bef_embedding",
    "aft_embedding",
    "joint_positional_embedding",
    "ln_mid.weight",
    "ln_mid.bias",
)
