"""Scenes of simple objects on a plane, and where a camera like CLEVR's sees them.

Units: Blender's for lengths, radians for angles, pixels in pictures of 480 × 320.
Dimensions: N objects, P points.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import hypot, pi, sqrt
from typing import NamedTuple

import cv2
import numpy as np

from dataloaders.clevr_vocabulary import SIZES

WIDTH, HEIGHT = 480, 320

FOCAL = WIDTH * 35 / 32  # in pixels: a 35 mm lens on a 32 mm sensor

CAMERA = (7.36, -6.93, 4.96)

LAMPS = ((6.45, -2.91, 4.26), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82))  # key, fill, back
NUM_LAMPS = len(LAMPS)

# The width of an edge's rounding, as a fraction of half the object's width.
BEVELS = {"cube": 0.13, "cylinder": 0.07, "sphere": 0.0}

Point = tuple[float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """An object on the plane: its attributes, the position of its center, and its rotation."""

    shape: str
    color: str
    material: str
    size: str
    x: float
    y: float
    angle: float  # about the vertical axis

    @property
    def half_height(self) -> float:
        """Half the height, which is half the width too: cubes are as wide as cylinders."""
        return SIZES[self.size]

    @property
    def footprint_radius(self) -> float:
        """The radius of the circle around the object's footprint on the plane."""
        return self.half_height * (sqrt(2) if self.shape == "cube" else 1)


@dataclass(frozen=True)
class View:
    """The positions of the camera, which looks at the origin, and of the three lamps."""

    camera: Point = CAMERA
    lamps: tuple[Point, ...] = LAMPS


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    objects: tuple[SceneObject, ...]
    view: View


class Box(NamedTuple):
    """A rectangle of a picture's pixels; right and bottom are the first pixels outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        return self.width * self.height


@lru_cache(maxsize=64)
def camera_axes(camera: Point) -> np.ndarray:
    """The camera's directions right, down and forward, (3, 3) float32, one in each row."""
    forward = -np.array(camera) / np.linalg.norm(camera)
    right = np.array([forward[1], -forward[0], 0]) / np.hypot(forward[0], forward[1])
    return np.stack([right, np.cross(forward, right), forward]).astype(np.float32)


def project(points: np.ndarray, camera: Point) -> np.ndarray:
    """World points (..., 3) to the pixels (..., 2) where the camera sees them, x and y."""
    seen = (points - np.array(camera, np.float32)) @ camera_axes(camera).T
    depth = np.maximum(seen[..., 2:], 0.2)  # a shadow may reach behind the camera
    return seen[..., :2] * (FOCAL / depth) + np.array([WIDTH / 2, HEIGHT / 2], np.float32)


def pixel_directions(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Camera directions (3, n) float32 of the pixels of a grid, row by row.

    `x` and `y` are the pixels' centers: the columns' from the left, the rows' from the top.
    """
    directions = np.empty((3, len(y), len(x)), np.float32)
    directions[0] = x - WIDTH / 2
    directions[1] = (y - HEIGHT / 2)[:, None]
    directions[2] = FOCAL
    return directions.reshape(3, -1)


def _unit_cube() -> np.ndarray:
    """Points (64, 3) of a cube: three at each corner, which the bevels cut off, repeated."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    inner = 1 - BEVELS["cube"] * (1 - sqrt(0.5))
    cut = [corners * np.where(np.arange(3) == axis, 1, inner) for axis in range(3)]
    return np.resize(np.concatenate(cut), (64, 3))


def _unit_cylinder() -> np.ndarray:
    """The two rims, 32 points each, (64, 3)."""
    angle = np.arange(32) * (pi / 16)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.concatenate([np.c_[ring, np.full(32, z)] for z in (-1, 1)])


def _unit_sphere() -> np.ndarray:
    """Points (64, 3) on a spiral, slightly outside, because a hull cuts between its points."""
    height = (np.arange(64) + 0.5) / 32 - 1
    angle = np.arange(64) * (pi * (3 - sqrt(5)))
    radius = np.sqrt(1 - height**2)
    return 1.03 * np.stack([np.cos(angle) * radius, np.sin(angle) * radius, height], 1)


# For each shape, points (64, 3) whose convex hull is a body of half width 1.
_UNIT_BODIES = {
    "cube": _unit_cube().astype(np.float32),
    "cylinder": _unit_cylinder().astype(np.float32),
    "sphere": _unit_sphere().astype(np.float32),
}

_UNIT_CIRCLE = _UNIT_BODIES["cylinder"][:32, :2]


def bodies(objects: tuple[SceneObject, ...]) -> np.ndarray:
    """World points (N, 64, 3) whose convex hulls are the objects' bodies."""
    points = np.stack([_UNIT_BODIES[scene_object.shape] for scene_object in objects])
    placements = np.array([_placement(one) for one in objects], np.float32)
    x, y, half, cos, sin = placements.T[..., None]  # (N, 1) each
    across = cos * points[..., 0] - sin * points[..., 1]
    along = sin * points[..., 0] + cos * points[..., 1]
    return np.stack([across + x, along + y, half * (points[..., 2] + 1)], -1)


def _placement(scene_object: SceneObject) -> tuple[float, ...]:
    """Position, half height, and the scaled cosine and sine of the rotation."""
    half = scene_object.half_height
    cos = half * np.cos(scene_object.angle)
    sin = half * np.sin(scene_object.angle)
    return scene_object.x, scene_object.y, half, cos, sin


def outlines(objects: tuple[SceneObject, ...], camera: Point) -> list[np.ndarray]:
    """Each object's convex outline in the picture, (P, 1, 2) float32, in pixels."""
    points = bodies(objects)
    for i, scene_object in enumerate(objects):
        if scene_object.shape == "sphere":
            points[i] = np.repeat(_silhouette_circle(scene_object, camera), 2, axis=0)
    return [cv2.convexHull(outline) for outline in project(points, camera)]


def _silhouette_circle(sphere: SceneObject, camera: Point) -> np.ndarray:
    """World points (32, 3) of the circle along which the camera's rays touch a sphere."""
    half = sphere.half_height
    x = camera[0] - sphere.x
    y = camera[1] - sphere.y
    z = camera[2] - half
    flat = hypot(x, y)
    square = x * x + y * y + z * z
    fraction = half**2 / square  # of the way from the sphere's center to the camera
    radius = half * sqrt(1 - fraction)
    across = (y / flat * radius, -x / flat * radius, 0)
    upward = np.array([-x * z / flat, -y * z / flat, flat]) * (radius / sqrt(square))
    center = (sphere.x + x * fraction, sphere.y + y * fraction, half + z * fraction)
    return center + _UNIT_CIRCLE @ np.array([across, upward], np.float32)


def painting_order(objects: tuple[SceneObject, ...], camera: Point) -> list[int]:
    """The objects' indices, farthest first; correct for round footprints that do not overlap."""

    def nearness(i: int) -> float:
        x = objects[i].x - camera[0]
        y = objects[i].y - camera[1]
        return objects[i].footprint_radius ** 2 - x**2 - y**2

    return sorted(range(len(objects)), key=nearness)


def visibility(scene: Scene) -> list[tuple[int, float]]:
    """For each object, how many of its pixels are visible, and what fraction of its outline."""
    labels = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    shapes = outlines(scene.objects, scene.view.camera)
    for i in painting_order(scene.objects, scene.view.camera):
        cv2.fillConvexPoly(labels, np.int32(shapes[i] * 8), i + 1, shift=4)
    pixels = 4 * np.bincount(labels.ravel(), minlength=len(shapes) + 1)[1:]
    areas = [max(cv2.contourArea(shape), 1) for shape in shapes]
    return [(count, count / area) for count, area in zip(pixels.tolist(), areas, strict=True)]
