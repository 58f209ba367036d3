"""Pictures of scenes that look like CLEVR's Blender renderings, in a few milliseconds each.

Each object's outline is filled as an antialiased polygon, the farthest object first. The ground,
with the shadows of three area lamps, is drawn at a quarter of the resolution. Light is computed in
linear units and converted to sRGB at the end.

Dimensions: N objects, n pixels, P points of a body, S points of a lamp; vectors are (3, n).
"""

import cv2
import numpy as np

from preprocess.scenes.geometry import (
    HEIGHT,
    NUM_LAMPS,
    WIDTH,
    Box,
    Scene,
    View,
    bodies,
    camera_axes,
    outlines,
    painting_order,
    pixel_directions,
    project,
)
from preprocess.scenes.shading import AMBIENT, LAMP_RGB, lamp_light, shade

_SHRINK = 4  # the ground is drawn at 1 / _SHRINK of the resolution
_GROUND_SIZE = (HEIGHT // _SHRINK, WIDTH // _SHRINK)

# Points (S, 3) of an area lamp around its center; each casts a shadow of its own.
_LAMP_POINTS = np.array(
    [[0.4, 0.2, 0.3], [-0.4, 0.3, -0.3], [0.2, -0.5, -0.2], [-0.2, 0.0, 0.2]], np.float32
)

# cv2.fillConvexPoly reads coordinates with 4 fractional bits, that is, in sixteenths of a pixel.
_SUBPIXEL_BITS = 4
_SUBPIXELS = 1 << _SUBPIXEL_BITS


def _srgb_byte(light: float) -> int:
    """Linear light in [0, 1] as an sRGB byte."""
    if light < 0.0031308:
        return round(255 * (12.92 * light))
    return round(255 * (1.055 * light ** (1 / 2.4) - 0.055))


_SRGB_BYTES = np.array([_srgb_byte(light) for light in np.arange(4097) / 4096], np.uint8)


def _ground_directions() -> np.ndarray:
    """Camera directions (3, n) of the pixels of the small ground picture, row by row."""
    rows = (np.arange(_GROUND_SIZE[0]) + 0.5) * _SHRINK
    columns = (np.arange(_GROUND_SIZE[1]) + 0.5) * _SHRINK
    return pixel_directions(columns, rows)


_GROUND_DIRECTIONS = _ground_directions()


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (320, 480, 3) uint8 in BGR, OpenCV's order."""
    picture = _draw_ground(scene)
    if scene.objects:
        _draw_objects(scene, picture)
    return picture


def _draw_ground(scene: Scene) -> np.ndarray:
    """The plane with its light and shadows, (320, 480, 3) uint8 in BGR."""
    points = _ground_points(scene.view)
    shadows, contact_shadow = _shadows(scene)
    light = np.full(points.shape, AMBIENT, np.float32)
    for lamp, rgb, shadow in zip(scene.view.lamps, LAMP_RGB, shadows, strict=True):
        light += rgb[:, None] * (lamp_light(lamp, points, None) * (1 - shadow.ravel()))
    light *= 1 - contact_shadow.ravel()
    pixels = np.ascontiguousarray(_to_srgb(light[::-1]).T)
    small = pixels.reshape(*_GROUND_SIZE, 3)
    return cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def _ground_points(view: View) -> np.ndarray:
    """The points (3, n) of the plane that the pixels of the small ground picture show."""
    rays = camera_axes(view.camera).T @ _GROUND_DIRECTIONS
    distance = view.camera[2] / np.maximum(-rays[2], 1.0)
    points = np.array(view.camera, np.float32)[:, None] + rays * distance
    points[2] = 0
    return points


def _shadows(scene: Scene) -> tuple[list[np.ndarray], np.ndarray]:
    """Each lamp's shadow and the contact shadow under the objects, (80, 120) each, in [0, 1]."""
    if not scene.objects:
        none = np.zeros(_GROUND_SIZE, np.float32)
        return [none] * NUM_LAMPS, none
    points = bodies(scene.objects)[None]  # (1, N, P, 3)
    lamps = np.array(scene.view.lamps, np.float32)[:, None] + _LAMP_POINTS  # (3, S, 3)
    cast = _cast_on_ground(points, lamps.reshape(-1, 1, 1, 3))
    below = points * np.array([1, 1, 0], np.float32)
    world = np.concatenate([cast, below])  # (3 * S + 1, N, P, 3)
    masks = [_fill_hulls(polygons) for polygons in project(world, scene.view.camera)]
    per_point = np.float32(masks[:-1]).reshape(NUM_LAMPS, len(_LAMP_POINTS), *_GROUND_SIZE)
    per_lamp = per_point.mean(1)
    shadows = [cv2.GaussianBlur(mask, (5, 5), 1.2) * (0.95 / 255) for mask in per_lamp]
    contact_shadow = cv2.GaussianBlur(np.float32(masks[-1]), (13, 13), 2.5) * (0.4 / 255)
    return shadows, contact_shadow


def _cast_on_ground(points: np.ndarray, lamps: np.ndarray) -> np.ndarray:
    """Where rays from lamps (3 * S, 1, 1, 3) through points (1, N, P, 3) meet the plane."""
    height = np.minimum(points[..., 2:], lamps[..., 2:] - 0.2)
    cast = lamps + (points - lamps) * (lamps[..., 2:] / (lamps[..., 2:] - height))
    cast[..., 2] = 0
    return cast


def _fill_hulls(polygons: np.ndarray) -> np.ndarray:
    """A mask (80, 120) uint8 of the convex hulls of points (N, P, 2), in the picture's pixels."""
    mask = np.zeros(_GROUND_SIZE, np.uint8)
    scaled = np.clip(polygons * (_SUBPIXELS / _SHRINK), -9000, 9000).astype(np.int32)
    for polygon in scaled:
        cv2.fillConvexPoly(mask, cv2.convexHull(polygon), 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return mask


def _to_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light as sRGB bytes of the same shape."""
    return _SRGB_BYTES.take(np.clip(light * 4096, 0, 4096).astype(np.uint16))


def _draw_objects(scene: Scene, picture: np.ndarray) -> None:
    """Paint all objects over the ground, in place."""
    shapes = outlines(scene.objects, scene.view.camera)
    boxes = _boxes(scene, shapes)
    if not boxes:
        return
    patches = _patches(scene, boxes)
    for i in painting_order(scene.objects, scene.view.camera):
        if i in boxes:
            _paste(picture, patches[i], shapes[i], boxes[i])


def _boxes(scene: Scene, shapes: list[np.ndarray]) -> dict[int, Box]:
    """The box of each object that is in the picture, by its index, sorted by shape for `shade`."""
    boxes = {}
    for i in sorted(range(len(shapes)), key=lambda i: scene.objects[i].shape):
        low = np.maximum(np.floor(shapes[i].min((0, 1))).astype(int) - 1, 0)
        high = np.minimum(np.ceil(shapes[i].max((0, 1))).astype(int) + 2, (WIDTH, HEIGHT))
        if (high > low).all():
            boxes[i] = Box(*low.tolist(), *high.tolist())
    return boxes


def _patches(scene: Scene, boxes: dict[int, Box]) -> dict[int, np.ndarray]:
    """The shaded pixels of each box, (height, width, 3) uint8 in BGR."""
    colors = np.ascontiguousarray(_to_srgb(shade(scene, boxes)).T)
    patches = {}
    start = 0
    for i, box in boxes.items():
        stop = start + box.area
        patch = colors[start:stop].reshape(box.height, box.width, 3)
        # Across a bevel the normal changes faster than from pixel to pixel.
        patches[i] = cv2.GaussianBlur(patch, (3, 3), 0.7)
        start = stop
    return patches


def _paste(picture: np.ndarray, patch: np.ndarray, outline: np.ndarray, box: Box) -> None:
    """Blend a patch into its box of the picture, where the antialiased outline covers it."""
    mask = np.zeros(patch.shape[:2], np.uint8)
    corners = np.int32((outline - (box.left + 0.5, box.top + 0.5)) * _SUBPIXELS)
    cv2.fillConvexPoly(mask, corners, 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    alpha = mask[..., None].astype(np.uint16)
    background = picture[box.top : box.bottom, box.left : box.right]
    background[:] = (patch * alpha + background * (255 - alpha) + 127) // 255
