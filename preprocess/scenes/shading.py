"""The light that the pixels of things send to the camera: analytic ray casting, three lamps, and mirroring metal.

All pixels of all things of a picture are shaded in one flat batch. Light is linear, in BGR order.
Shape letters: n pixels; vectors are (3, n) float32.
"""

import numpy as np

from dataloaders.clevr_vocabulary import COLORS
from preprocess.scenes.geometry import (
    BEVELS,
    FOCAL,
    HEIGHT,
    WIDTH,
    Scene,
    SceneObject,
    View,
    camera_axes,
)

# Least-squares fit of the lamps above to the median of 144 real CLEVR-Change images (linear RGB, error 0.006).
LAMP_RGB = np.array([[4.93, 4.55, 3.95], [0.95, 1.07, 1.35], [1.81, 1.89, 1.73]], np.float32)


AMBIENT = 0.135


_GROUND_ALBEDO = 0.72


_EDGE_TILT = 0.12  # how far the normals of a face lean outward at its edges, as those of Blender's smooth shading do


def shade(scene: Scene, boxes: dict[int, tuple[int, int, int, int]]) -> np.ndarray:
    """Light (3, n) of all pixels of the boxes, one box after the other.

    boxes: {index of a thing: (left, top, right, bottom)}, things of one shape in one piece.
    """
    things = [scene.objects[i] for i in boxes]
    counts = [(right - left) * (bottom - top) for left, top, right, bottom in boxes.values()]
    rays = camera_axes(scene.view.camera).T @ np.concatenate(
        [_box_grid(box) for box in boxes.values()], 1
    )
    rays /= np.sqrt(_dot(rays, rays))
    points, normals = _intersect(things, counts, np.array(scene.view.camera, np.float32), rays)
    albedo = np.array([COLORS[thing.color][::-1] for thing in things], np.float32).T / 255
    albedo = np.repeat(albedo, counts, axis=1)
    light = _diffuse(scene.view, points, normals) * albedo
    metal = np.flatnonzero(np.repeat([thing.material == "metal" for thing in things], counts))
    if len(metal):
        owner = np.repeat(list(boxes), counts)[metal]
        lit = (
            part.take(metal, axis=1) for part in (points, normals, rays, albedo)
        )  # rows stay contiguous: fast
        light[:, metal] = _shade_metal(scene, owner, *lit)
    return light


def _box_grid(box: tuple[int, int, int, int]) -> np.ndarray:
    """Camera directions (3, n) of the pixels of a box, row by row."""
    left, top, right, bottom = box
    grid = np.empty((3, bottom - top, right - left), np.float32)
    grid[0] = np.arange(left, right) + (0.5 - WIDTH / 2)
    grid[1] = np.arange(top, bottom)[:, None] + (0.5 - HEIGHT / 2)
    grid[2] = FOCAL
    return grid.reshape(3, -1)


def _intersect(
    things: list[SceneObject], counts: list[int], eye: np.ndarray, rays: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where unit rays (3, n) meet the things, and the normals there, each (3, n); near misses give the rim's."""
    middle = np.array([(t.x, t.y, t.half) for t in things], np.float32).T
    half = np.repeat(np.array([t.half for t in things], np.float32), counts)
    eyes = np.repeat(eye[:, None] - middle, counts, axis=1) / half
    points, normals = np.empty_like(rays), np.empty_like(rays)
    stops = np.cumsum(counts)
    for shape, cast in (("cube", _hit_cube), ("cylinder", _hit_cylinder), ("sphere", _hit_sphere)):
        mine = [i for i, thing in enumerate(things) if thing.shape == shape]
        if mine:
            part = slice(stops[mine[0]] - counts[mine[0]], stops[mine[-1]])
            own = np.array([(things[i].angle, _bevel(things[i], eye)) for i in mine], np.float32).T
            turn, bevel = np.repeat(own, [counts[i] for i in mine], axis=1)
            points[:, part], normals[:, part] = cast(eyes[:, part], rays[:, part], turn, bevel)
    return points * half + np.repeat(middle, counts, axis=1), normals


def _bevel(thing: SceneObject, eye: np.ndarray) -> float:
    """Share of its half width that an edge rounds off, three pixels at least: the light on a sharper one flickers."""
    pixel = float(np.linalg.norm(eye - (thing.x, thing.y, thing.half))) / FOCAL
    return max(BEVELS[thing.shape], 3 * pixel / thing.half)


def _rotate(vectors: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Vectors (3, n) turned by angles (n,) about the vertical."""
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack(
        [cos * vectors[0] - sin * vectors[1], sin * vectors[0] + cos * vectors[1], vectors[2]]
    )


def _hit_sphere(
    eyes: np.ndarray, rays: np.ndarray, turn: np.ndarray, bevel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the unit sphere."""
    along = _dot(eyes, rays)
    gap = along * along - _dot(eyes, eyes) + 1
    points = eyes + rays * (-along - np.sqrt(np.maximum(gap, 0)))
    points /= np.sqrt(_dot(points, points))
    return points, points


def _hit_cylinder(
    eyes: np.ndarray, rays: np.ndarray, turn: np.ndarray, bevel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the upright cylinder of radius and half height 1, its rim rounded."""
    a = rays[0] ** 2 + rays[1] ** 2
    b = eyes[0] * rays[0] + eyes[1] * rays[1]
    gap = b * b - a * (eyes[0] ** 2 + eyes[1] ** 2 - 1)
    side = (-b - np.sqrt(np.maximum(gap, 0))) / np.maximum(a, 1e-6)
    top = (1 - eyes[2]) / np.minimum(rays[2], -1e-4)
    points = eyes + rays * np.maximum(side, top)
    inner = 1 - bevel
    radius = np.maximum(np.sqrt(points[0] ** 2 + points[1] ** 2), 1e-6)
    out = np.maximum(radius - inner, 0) / radius
    normals = np.stack([points[0] * out, points[1] * out, np.maximum(points[2] - inner, 0)])
    normals += points * (_EDGE_TILT * bevel)
    return points, normals / np.maximum(np.sqrt(_dot(normals, normals)), 1e-6)


def _hit_cube(
    eyes: np.ndarray, rays: np.ndarray, turn: np.ndarray, bevel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the turned cube of half side 1, its edges rounded."""
    eyes, rays = _rotate(eyes, -turn), _rotate(rays, -turn)
    steep = np.where(np.abs(rays) < 1e-5, np.float32(1e-5), rays)
    points = eyes + rays * ((-np.sign(steep) - eyes) / steep).max(0)
    points = np.clip(points, -1, 1)
    inner = 1 - bevel
    normals = points - np.clip(points, -inner, inner) + points * (_EDGE_TILT * bevel)
    normals /= np.maximum(np.sqrt(_dot(normals, normals)), 1e-6)
    return _rotate(points, turn), _rotate(normals, turn)


def _diffuse(view: View, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light (3, n) in BGR order that reaches points (3, n): lamps, sky, and the ground's reflection."""
    sky = (AMBIENT / _GROUND_ALBEDO) * (0.8 + 0.2 * normals[2])
    touching = 1 - 0.35 * np.exp(points[2] * -6) * (1 - np.maximum(normals[2], 0))
    light = np.repeat((sky * touching)[None], 3, axis=0)
    for lamp, rgb in zip(view.lamps, LAMP_RGB, strict=True):
        light += rgb[::-1, None] * (lamp_light(lamp, points, normals) / _GROUND_ALBEDO)
    return light


def _shade_metal(
    scene: Scene,
    owner: np.ndarray,
    points: np.ndarray,
    normals: np.ndarray,
    rays: np.ndarray,
    albedo: np.ndarray,
) -> np.ndarray:
    """Light (3, n) in BGR order that metal pixels throw back: the ground, a dark sky, the lamps and the neighbours."""
    mirrored = rays - 2 * _dot(rays, normals) * normals
    down = np.maximum(-mirrored[2], 0.02)
    reach = np.minimum(points[2] / down, 60)
    floor = points + mirrored * reach
    floor[2] = 0
    ground = np.full_like(points, AMBIENT)
    bright = np.zeros_like(points)
    # On the few pixels of an edge a lamp's sharp image would flicker.
    round_ones = np.array([thing.shape == "sphere" for thing in scene.objects])
    sharpness, gain = np.where(
        round_ones, np.float32([[220], [2.0]]), np.float32([[20], [0.6]])
    ).take(owner, axis=1)
    for lamp, rgb in zip(scene.view.lamps, LAMP_RGB, strict=True):
        ground += rgb[::-1, None] * lamp_light(lamp, floor, None)
        to_lamp = np.array(lamp, np.float32)[:, None] - points
        cos = _dot(to_lamp, mirrored) / np.sqrt(_dot(to_lamp, to_lamp))
        bright += gain * np.exp(
            np.minimum(cos - 1, 0) * sharpness
        )  # lamps shine alike, the larger ones throw more light
    ground *= 1 - 0.5 * np.exp(reach * -3)
    away = -np.array(scene.view.camera[:2], np.float32) / np.hypot(*scene.view.camera[:2])
    backdrop = np.maximum(away @ mirrored[:2], 0)  # bright behind the things, dark above the camera
    light = np.clip(0.5 + 0.35 * backdrop - 0.8 * mirrored[2], 0, 1)
    world = ground * light + 0.01 * (1 - light)
    _mirror_neighbours(scene, owner, points, mirrored, world)
    return albedo * (1.25 * world + bright + 0.1 * _diffuse(scene.view, points, normals))


def _mirror_neighbours(
    scene: Scene, owner: np.ndarray, points: np.ndarray, mirrored: np.ndarray, world: np.ndarray
) -> None:
    """Replace what mirror rays (3, n) see, in place, where they meet another thing (taken for a ball)."""
    for i, thing in enumerate(scene.objects):
        offset = points - np.array([[thing.x], [thing.y], [thing.half]], np.float32)
        along = _dot(offset, mirrored)
        miss = _dot(offset, offset) - along * along
        size = (1.1 * thing.half) ** 2
        hit = np.flatnonzero((miss < size) & (along < 0) & (owner != i))
        if len(hit):
            cover = np.minimum((1 - miss[hit] / size) * 3, 0.8)
            seen = np.array(COLORS[thing.color][::-1], np.float32)[:, None] * (0.2 / 255)
            world[:, hit] += (seen - world[:, hit]) * cover


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products (n,) of vectors (3, n)."""
    total = one[0] * other[0]
    total += one[1] * other[1]
    total += one[2] * other[2]
    return total


def lamp_light(
    lamp: tuple[float, float, float], points: np.ndarray, normals: np.ndarray | None
) -> np.ndarray:
    """Light (n,) that a lamp facing the origin throws on points (3, n) with normals (3, n); None: facing up."""
    place = np.array(lamp, np.float32)
    ray = place[:, None] - points
    square = _dot(ray, ray)
    facing = ray[2] if normals is None else np.maximum(_dot(ray, normals), 0)
    leaving = np.maximum((place / np.linalg.norm(place)) @ ray, 0)
    return facing * leaving / (square * square)
