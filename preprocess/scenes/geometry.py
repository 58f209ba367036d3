"""Scenes of simple things on a plane, and where the camera of CLEVR's Blender set-up sees them.

Units: lengths are Blender's, angles radians, pictures 480 x 320 pixels. Shape letters: N things, P outline points.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import hypot, pi, sqrt

import cv2
import numpy as np

from dataloaders.clevr_vocabulary import SIZES

WIDTH, HEIGHT = 480, 320


FOCAL = WIDTH * 35 / 32  # pixels: 35 mm lens before a 32 mm sensor


CAMERA = (7.36, -6.93, 4.96)


LAMPS = ((6.45, -2.91, 4.26), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82))  # key, fill, back


BEVELS = {
    "cube": 0.13,
    "cylinder": 0.07,
    "sphere": 0.0,
}  # how much of its half width an edge rounds off


@dataclass(frozen=True)
class SceneObject:
    """One object on the plane: its four attributes, the place of its centre and its turn about the vertical."""

    shape: str
    color: str
    material: str
    size: str
    x: float
    y: float
    angle: float

    @property
    def half(self) -> float:
        """Half its height, which is also half its width; in CLEVR-Change's pictures a cube is as wide as a cylinder."""
        return SIZES[self.size]

    @property
    def footprint_radius(self) -> float:
        """Radius of the circle around what stands on the plane."""
        return self.half * (sqrt(2) if self.shape == "cube" else 1)


@dataclass(frozen=True)
class View:
    """Where the camera (it looks at the origin) and the three lamps are."""

    camera: tuple[float, float, float] = CAMERA
    lamps: tuple[tuple[float, float, float], ...] = LAMPS


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    objects: tuple[SceneObject, ...]
    view: View


@lru_cache(maxsize=64)
def camera_axes(camera: tuple[float, float, float]) -> np.ndarray:
    """The camera's right, down and forward directions, (3, 3) float32, one a row."""
    forward = -np.array(camera) / np.linalg.norm(camera)
    right = np.array([forward[1], -forward[0], 0]) / np.hypot(forward[0], forward[1])
    return np.stack([right, np.cross(forward, right), forward]).astype(np.float32)


def project(points: np.ndarray, camera: tuple[float, float, float]) -> np.ndarray:
    """Pixels (..., 2) as (x, y) at which the camera sees world points (..., 3)."""
    seen = (points - np.array(camera, np.float32)) @ camera_axes(camera).T
    depth = np.maximum(seen[..., 2:], 0.2)  # a shadow may reach behind the camera
    return seen[..., :2] * (FOCAL / depth) + np.array([WIDTH / 2, HEIGHT / 2], np.float32)


def _unit_bodies() -> dict[str, np.ndarray]:
    """For each shape, points (64, 3) on a body of half width 1 whose hull is the body."""
    angle = np.arange(32) * (pi / 16)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    rings = np.concatenate([np.c_[ring, np.full(32, z)] for z in (-1, 1)])
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    inner = 1 - BEVELS["cube"] * (1 - sqrt(0.5))
    cut = np.concatenate([corners * np.where(np.arange(3) == k, 1, inner) for k in range(3)])
    height = (np.arange(64) + 0.5) / 32 - 1
    spiral = np.arange(64) * (pi * (3 - sqrt(5)))
    wide = np.sqrt(1 - height**2)
    ball = 1.03 * np.stack([np.cos(spiral) * wide, np.sin(spiral) * wide, height], 1)
    bodies = {"cube": np.resize(cut, (64, 3)), "cylinder": rings, "sphere": ball}
    return {shape: points.astype(np.float32) for shape, points in bodies.items()}


_UNIT_BODIES = _unit_bodies()


_RING = _UNIT_BODIES["cylinder"][:32, :2]


def bodies(things: tuple[SceneObject, ...]) -> np.ndarray:
    """World points (N, 64, 3) whose hulls are the things' bodies."""
    points = np.stack([_UNIT_BODIES[thing.shape] for thing in things])
    placed = np.array(
        [(t.x, t.y, t.half, t.half * np.cos(t.angle), t.half * np.sin(t.angle)) for t in things],
        np.float32,
    )
    x, y, half, cos, sin = placed.T[..., None]
    turned = (
        cos * points[..., 0] - sin * points[..., 1],
        sin * points[..., 0] + cos * points[..., 1],
    )
    return np.stack([turned[0] + x, turned[1] + y, half * (points[..., 2] + 1)], -1)


def outlines(
    things: tuple[SceneObject, ...], camera: tuple[float, float, float]
) -> list[np.ndarray]:
    """For each thing its convex outline in the picture, (P, 1, 2) float32 pixels."""
    points = bodies(things)
    for i, thing in enumerate(things):
        if thing.shape == "sphere":
            points[i] = np.repeat(_touching_circle(thing, camera), 2, axis=0)
    return [cv2.convexHull(outline) for outline in project(points, camera)]


def _touching_circle(ball: SceneObject, camera: tuple[float, float, float]) -> np.ndarray:
    """Points (32, 3) of the circle in which the camera's rays touch a sphere."""
    x, y, z = camera[0] - ball.x, camera[1] - ball.y, camera[2] - ball.half
    flat, square = hypot(x, y), x * x + y * y + z * z
    share = ball.half**2 / square
    radius = ball.half * sqrt(1 - share)
    across = (y / flat * radius, -x / flat * radius, 0)
    upward = np.array([-x * z / flat, -y * z / flat, flat]) * (radius / sqrt(square))
    center = (ball.x + x * share, ball.y + y * share, ball.half + z * share)
    return center + _RING @ np.array([across, upward], np.float32)


def painting_order(
    things: tuple[SceneObject, ...], camera: tuple[float, float, float]
) -> list[int]:
    """Indices of the things in painting order; exact for round feet that do not overlap."""
    return sorted(
        range(len(things)),
        key=lambda i: (
            things[i].footprint_radius ** 2
            - (things[i].x - camera[0]) ** 2
            - (things[i].y - camera[1]) ** 2
        ),
    )


def visible_pixels(scene: Scene) -> tuple[list[int], list[float]]:
    """For each thing, how many pixels of it are seen, and what share that is of its whole outline."""
    labels = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    shapes = outlines(scene.objects, scene.view.camera)
    for i in painting_order(scene.objects, scene.view.camera):
        cv2.fillConvexPoly(labels, np.int32(shapes[i] * 8), i + 1, shift=4)
    seen = 4 * np.bincount(labels.ravel(), minlength=len(shapes) + 1)[1:]
    return seen.tolist(), [
        n / max(cv2.contourArea(shape), 1) for n, shape in zip(seen.tolist(), shapes, strict=True)
    ]
