"""CLIP's vision tower, reading pairs of images (paper, section 3.2).

Dimensions: B pairs, K pairs that share their first image, N images, T tokens per image (1 + grid²),
D vision width, E embedding size, p patch size, R pixels along an image's side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.model.backbone import Features
from modules.model.clip_sizes import ClipSizes
from modules.model.layers import LayerNorm, Transformer
from modules.model.limits import HEAD_WIDTH


class PairVisionTower(nn.Module):
    """CLIP's ViT on pairs: the first `intra_layers` blocks see each image alone, the others both.

    `linear_patch`: patches are cut from each image ("2d") or from both as two frames ("3d").
    """

    def __init__(self, sizes: ClipSizes, intra_layers: int, linear_patch: str) -> None:
        super().__init__()
        width = sizes.vision_width
        patch = sizes.vision_patch_size
        scale = width**-0.5
        self.intra_layers = intra_layers
        self.linear_patch = linear_patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        if linear_patch == "3d":
            kernel = (3, patch, patch)
            stride = (1, patch, patch)
            self.conv2 = nn.Conv3d(3, width, kernel, stride, padding=(1, 0, 0), bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(sizes.num_tokens, width))
        self.bef_embedding = nn.Parameter(scale * torch.randn(width))
        self.aft_embedding = nn.Parameter(scale * torch.randn(width))
        joint_positions = scale * torch.randn(2 * sizes.num_tokens, width)
        self.joint_positional_embedding = nn.Parameter(joint_positions)
        self.ln_pre = LayerNorm(width)
        self.ln_mid = LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers, width // HEAD_WIDTH)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, sizes.embed_dim))

    def forward(self, images: Tensor) -> Features:
        """(B, 2, 3, R, R) normalized pairs → tokens (B, 2T, E), pooled (B, E)."""
        if self.linear_patch == "3d":
            tokens = self._intra_blocks(embed_patches_3d(images, self.conv2.weight))  # (2B, T, D)
            return self._joint_blocks(tokens.unflatten(0, images.shape[:2]))
        return self._joint_blocks(self.encode_images(images))

    def encode_against_first(self, images: Tensor) -> Features:
        """Pair image 0 with each other image: (B, 1+K, 3, R, R) → features of B·K pairs.

        They are grouped by the other image: all (0, 1), then all (0, 2). With 2d patches image 0
        goes through the blocks for single images once for all its pairs.
        """
        others = range(1, images.shape[1])
        if self.linear_patch == "3d":
            return self(torch.cat([images[:, [0, other]] for other in others]))
        tokens = self.encode_images(images)  # (B, 1+K, T, D)
        return self._joint_blocks(torch.cat([tokens[:, [0, other]] for other in others]))

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, n, 3, R, R) → (B, n, T, D): each image alone, from 2d patches."""
        patches = embed_patches_2d(images.flatten(0, 1), self.conv1.weight)
        tokens = self._intra_blocks(patches)
        return tokens.unflatten(0, images.shape[:2])

    def _intra_blocks(self, patches: Tensor) -> Tensor:
        """(N, T-1, D) → (N, T, D)."""
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        return self.transformer(self.ln_pre(x), stop=self.intra_layers)

    def _joint_blocks(self, images: Tensor) -> Features:
        """(B, 2, T, D) → tokens (B, 2T, E), pooled (B, E): the mean of both class tokens."""
        num_tokens = images.shape[2]
        before = images[:, 0] + self.bef_embedding
        after = images[:, 1] + self.aft_embedding
        x = torch.cat([before, after], dim=1) + self.joint_positional_embedding  # (B, 2T, D)
        x = self.transformer(self.ln_mid(x), start=self.intra_layers)
        tokens = self.ln_post(x) @ self.proj  # (B, 2T, E)
        return Features(tokens, (tokens[:, 0] + tokens[:, num_tokens]) / 2)


def embed_patches_2d(images: Tensor, kernel: Tensor) -> Tensor:
    """conv1, whose kernel is (D, 3, p, p): (N, 3, R, R) → (N, T-1, D).

    As one matrix product it is faster than conv2d on a CPU (benchmarks/hand_written.py).
    """
    return F.linear(_cut_patches(images, kernel.shape[-1]), kernel.flatten(1))


def embed_patches_3d(pairs: Tensor, kernel: Tensor) -> Tensor:
    """conv2 over two frames and padding: (B, 2, 3, R, R), kernel (D, 3, 3, p, p) → (2B, T-1, D).

    As one matrix product it is faster than conv3d (benchmarks/hand_written.py), and oneDNN's
    conv3d gave a wrong gradient of its kernel in bf16 (torch 2.15 on an AMD CPU).
    """
    taps = kernel.transpose(1, 2)  # (D, 3 frames, 3, p, p), the own frame in between
    before_taps = taps[:, 1:]
    after_taps = taps[:, :2]
    matrix = torch.cat([before_taps, after_taps]).flatten(1)  # (2D, 2·3·p·p)
    patches = _cut_patches(pairs.flatten(0, 1), kernel.shape[-1]).unflatten(0, pairs.shape[:2])
    embedded = F.linear(patches.transpose(1, 2).flatten(2), matrix)  # (B, T-1, 2D)
    return embedded.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)


def _cut_patches(images: Tensor, size: int) -> Tensor:
    """(N, 3, R, R) → (N, T-1, 3·p·p), row by row, where p is `size`."""
    columns = images.unflatten(3, (-1, size))
    squares = columns.unflatten(2, (-1, size))  # (N, 3, grid, p, grid, p)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def inflate_patches(conv1: Tensor) -> Tensor:
    """conv2 from conv1: (D, 3, p, p) → (D, 3, 3, p, p), conv1 as the middle frame,
    zeros in the other two."""
    conv2 = torch.zeros(*conv1.shape[:2], 3, *conv1.shape[2:], dtype=conv1.dtype)
    conv2[:, :, 1] = conv1
    return conv2
