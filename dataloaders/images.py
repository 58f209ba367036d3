"""Image files to tensors: decode, resize, normalise (SPEC §3, Images)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

RESOLUTION = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def load_image(path: str | Path, resolution: int = RESOLUTION) -> Tensor:
    """An image file → (3, resolution, resolution) uint8 RGB, resized bicubically to exactly this size, nothing cropped.

    Raises FileNotFoundError for no file and ValueError for one that cannot be decoded, naming it.
    """
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"cannot read the image {path}: {reason}") from None
    return pil_to_tensor(rgb.resize((resolution, resolution), Image.Resampling.BICUBIC))


class ImageFiles:
    """Paths → (n, 3, resolution, resolution) uint8, decoded and resized each time. `ImageCache` is its fast stand-in."""

    def __init__(self, resolution: int = RESOLUTION) -> None:
        self.resolution = resolution

    def __call__(self, paths: Sequence[str]) -> Tensor:
        return torch.stack([load_image(path, self.resolution) for path in paths])


def normalize(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 → float32 with CLIP's mean and standard deviation."""
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    std = torch.tensor(STD, device=images.device)[:, None, None]
    return (images.float() / 255).sub_(mean).div_(std)
