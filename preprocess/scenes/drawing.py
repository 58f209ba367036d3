"""Pictures of scenes as CLEVR's Blender set-up shows them, for the price of a few milliseconds.

Each thing's outline is filled as an antialiased polygon from far to near; the ground with the shadows of three area
lamps is drawn at a quarter of the resolution. Light is computed linearly and shown as sRGB.
Shape letters: N things, n pixels, P points of an outline, S points of a lamp; vectors are (3, n).
"""

import cv2
import numpy as np

from preprocess.scenes.geometry import (
    FOCAL,
    HEIGHT,
    WIDTH,
    Scene,
    bodies,
    camera_axes,
    outlines,
    painting_order,
    project,
)
from preprocess.scenes.shading import AMBIENT, LAMP_RGB, lamp_light, shade

_SHRINK = 4  # the ground is drawn at 1 / _SHRINK of the resolution


_LAMP_POINTS = np.array(
    [[0.4, 0.2, 0.3], [-0.4, 0.3, -0.3], [0.2, -0.5, -0.2], [-0.2, 0.0, 0.2]], np.float32
)  # (S, 3)


_TO_SRGB = np.empty(4097, np.uint8)


_TO_SRGB[:] = [
    round(255 * (12.92 * v if v < 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055))
    for v in np.arange(4097) / 4096
]


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (320, 480, 3) uint8, BGR as OpenCV has it."""
    picture = _draw_ground(scene)
    if scene.objects:
        _draw_objects(scene, picture)
    return picture


_GRID = (
    np.stack(
        [
            *np.meshgrid(
                (np.arange(WIDTH // _SHRINK) + 0.5) * _SHRINK - WIDTH / 2,
                (np.arange(HEIGHT // _SHRINK) + 0.5) * _SHRINK - HEIGHT / 2,
            ),
            np.full((HEIGHT // _SHRINK, WIDTH // _SHRINK), FOCAL),
        ]
    )
    .reshape(3, -1)
    .astype(np.float32)
)


def _draw_ground(scene: Scene) -> np.ndarray:
    """The plane with its light, shadows and contact darkening, (320, 480, 3) uint8 BGR."""
    rays = camera_axes(scene.view.camera).T @ _GRID
    reach = scene.view.camera[2] / np.maximum(-rays[2], 1.0)
    points = np.array(scene.view.camera, np.float32)[:, None] + rays * reach
    points[2] = 0
    shadows, contact = _shadows(scene)
    light = np.full((3, _GRID.shape[1]), AMBIENT, np.float32)
    for lamp, rgb, shadow in zip(scene.view.lamps, LAMP_RGB, shadows, strict=True):
        light += rgb[:, None] * (lamp_light(lamp, points, None) * (1 - shadow.ravel()))
    light *= 1 - contact.ravel()
    small = np.ascontiguousarray(_srgb(light[::-1]).T).reshape(
        HEIGHT // _SHRINK, WIDTH // _SHRINK, 3
    )
    return cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def _shadows(scene: Scene) -> tuple[list[np.ndarray], np.ndarray]:
    """Each lamp's shadow (three of (80, 120) in [0, 1]) and the darkening where things touch the ground."""
    size = (HEIGHT // _SHRINK, WIDTH // _SHRINK)
    if not scene.objects:
        return [np.zeros(size, np.float32)] * 3, np.zeros(size, np.float32)
    points = bodies(scene.objects)[None]  # (1, N, P, 3)
    lamps = (np.array(scene.view.lamps, np.float32)[:, None] + _LAMP_POINTS).reshape(
        -1, 1, 1, 3
    )  # (3 * S, 1, 1, 3)
    height = np.minimum(points[..., 2:], lamps[..., 2:] - 0.2)
    cast = lamps + (points - lamps) * (lamps[..., 2:] / (lamps[..., 2:] - height))
    cast[..., 2] = 0
    feet = points * np.array([1, 1, 0], np.float32)
    seen = project(np.concatenate([cast, feet]), scene.view.camera) * (16 / _SHRINK)
    masks = []
    for polygons in np.clip(seen, -9000, 9000).astype(np.int32):
        mask = np.zeros(size, np.uint8)
        for polygon in polygons:
            cv2.fillConvexPoly(mask, cv2.convexHull(polygon), 255, cv2.LINE_AA, 4)
        masks.append(mask)
    per_lamp = np.float32(masks[:-1]).reshape(3, len(_LAMP_POINTS), *size).mean(1)
    shadows = [cv2.GaussianBlur(mask, (5, 5), 1.2) * (0.95 / 255) for mask in per_lamp]
    return shadows, cv2.GaussianBlur(np.float32(masks[-1]), (13, 13), 2.5) * (0.4 / 255)


def _srgb(light: np.ndarray) -> np.ndarray:
    """Linear light to sRGB bytes of the same shape."""
    return _TO_SRGB.take(np.clip(light * 4096, 0, 4096).astype(np.uint16))


def _draw_objects(scene: Scene, picture: np.ndarray) -> None:
    """Paint all things over the ground, in place."""
    shapes = outlines(scene.objects, scene.view.camera)
    boxes = {}
    for i in sorted(
        range(len(shapes)), key=lambda i: scene.objects[i].shape
    ):  # shade wants each shape in one piece
        low = np.maximum(np.floor(shapes[i].min((0, 1))).astype(int) - 1, 0)
        high = np.minimum(np.ceil(shapes[i].max((0, 1))).astype(int) + 2, (WIDTH, HEIGHT))
        if (high > low).all():
            boxes[i] = (*low.tolist(), *high.tolist())
    if not boxes:
        return
    colors = np.ascontiguousarray(_srgb(shade(scene, boxes)).T)
    start = 0
    patches = {}
    for i, (left, top, right, bottom) in boxes.items():
        stop = start + (right - left) * (bottom - top)
        patch = colors[start:stop].reshape(bottom - top, right - left, 3)
        patches[i] = cv2.GaussianBlur(
            patch, (3, 3), 0.7
        )  # the normals of bevels change faster than pixels
        start = stop
    for i in painting_order(scene.objects, scene.view.camera):
        if i in boxes:
            _paste(picture, patches[i], shapes[i], boxes[i])


def _paste(
    picture: np.ndarray, patch: np.ndarray, outline: np.ndarray, box: tuple[int, int, int, int]
) -> None:
    """Blend a patch (h, w, 3) into its box of the picture where the antialiased outline covers it."""
    left, top, right, bottom = box
    cover = np.zeros(patch.shape[:2], np.uint8)
    shifted = np.int32((outline - (left + 0.5, top + 0.5)) * 16)
    cv2.fillConvexPoly(cover, shifted, 255, cv2.LINE_AA, 4)
    under = picture[top:bottom, left:right]
    cover = cover[..., None].astype(np.uint16)
    under[:] = (patch * cover + under * (255 - cover) + 127) // 255
