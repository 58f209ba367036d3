"""Images → tensors: decode, resize, normalize (docs/reference.md, Images)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from dataloaders.picture_files import read_image
from dataloaders.pixels import to_rgb

RESOLUTION = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def load_image(path: str | Path, resolution: int = RESOLUTION) -> Tensor:
    """An image file → (3, resolution, resolution) uint8 RGB.

    Resized bicubically to exactly this size, without a crop. Raises FileNotFoundError for no file
    and ValueError for one that cannot be decoded. Both name the file.
    """
    return _resize_to_tensor(read_image(path), resolution)


def to_tensor(image: ImageLike, resolution: int = RESOLUTION) -> Tensor:
    """An image → (3, resolution, resolution) uint8, as `load_image`; errors as in `to_image`."""
    return _resize_to_tensor(to_image(image), resolution)


def to_image(image: ImageLike) -> Image.Image:
    """An image → a PIL image in RGB.

    It is a path, a PIL image, a uint8 array (H, W, 3), or a uint8 tensor (3, H, W). It is rotated
    as its EXIF data says. Raises ValueError or FileNotFoundError for anything else.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Tensor):
        image = _tensor_to_image(image)
    if isinstance(image, np.ndarray):
        image = _array_to_image(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"found {type(image).__name__}, expected a path, a PIL image, an array or a tensor"
        )
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} × {image.height} pixels")
    return to_rgb(image)


def _array_to_image(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 3 and array.shape[2] == 3 and 0 not in array.shape
    if array.dtype != np.uint8 or not is_image:
        raise ValueError(
            f"found an array of {array.dtype} {array.shape}, expected uint8 (height, width, 3)"
        )
    return Image.fromarray(array)


def _tensor_to_image(tensor: Tensor) -> Image.Image:
    is_image = tensor.ndim == 3 and tensor.shape[0] == 3 and 0 not in tensor.shape
    if tensor.dtype != torch.uint8 or not is_image:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"found a tensor of {kind} {tuple(tensor.shape)}, expected uint8 (3, height, width)"
        )
    return Image.fromarray(tensor.permute(1, 2, 0).cpu().numpy())


def _resize_to_tensor(rgb: Image.Image, resolution: int) -> Tensor:
    return pil_to_tensor(rgb.resize((resolution, resolution), Image.Resampling.BICUBIC))


class ImageFiles:
    """Paths → (n, 3, resolution, resolution) uint8, decoded and resized each time.

    `storage.image_cache.ImageCache` does the same from a cache.
    """

    def __init__(self, resolution: int = RESOLUTION) -> None:
        self.resolution = resolution

    def __call__(self, paths: Sequence[str]) -> Tensor:
        return torch.stack([load_image(path, self.resolution) for path in paths])


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """(..., 3, H, W) uint8 → float32: x / 255, minus `mean`, divided by `std`, per channel."""
    shift = torch.tensor(mean, device=images.device)[:, None, None]
    scale = torch.tensor(std, device=images.device)[:, None, None]
    return (images.float() / 255).sub_(shift).div_(scale)
