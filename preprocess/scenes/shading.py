"""The light that reaches the camera from the objects: ray casting, three lamps, reflecting metal.

All pixels of all objects of a picture are shaded in one flat batch. Light is linear, in BGR order.
Dimensions: N objects, n pixels; vectors are (3, n) float32.
"""

import numpy as np

from dataloaders.clevr_vocabulary import COLORS
from preprocess.scenes.geometry import (
    BEVELS,
    FOCAL,
    Box,
    Point,
    Scene,
    SceneObject,
    View,
    camera_axes,
    pixel_directions,
)

# A least-squares fit to the median of 144 real CLEVR-Change images (linear RGB, error 0.006).
LAMP_RGB = np.array([[4.93, 4.55, 3.95], [0.95, 1.07, 1.35], [1.81, 1.89, 1.73]], np.float32)

AMBIENT = 0.135

_GROUND_ALBEDO = 0.72

# How far the normals of a face tilt outwards at its edges, as in Blender's smooth shading.
_EDGE_TILT = 0.12

# How metal reflects the lamps: sharpness of their images, and gain. A sharp image would flicker on
# an edge, which has few pixels, so only spheres have one.
_SPHERE_HIGHLIGHT = (220, 2.0)
_EDGED_HIGHLIGHT = (20, 0.6)


def shade(scene: Scene, boxes: dict[int, Box]) -> np.ndarray:
    """Light (3, n) of all pixels of the boxes, one box after the other.

    `boxes` maps an object's index to its box; objects of the same shape are adjacent.
    """
    objects = [scene.objects[i] for i in boxes]
    counts = [box.area for box in boxes.values()]
    grid = np.concatenate([_box_directions(box) for box in boxes.values()], 1)
    rays = camera_axes(scene.view.camera).T @ grid
    rays /= np.sqrt(_dot(rays, rays))
    points, normals = _intersect(objects, counts, scene.view.camera, rays)
    albedo = np.repeat(np.stack([_bgr(one) for one in objects], 1) / 255, counts, axis=1)
    light = _diffuse(scene.view, points, normals) * albedo
    metal = np.flatnonzero(np.repeat([one.material == "metal" for one in objects], counts))
    if len(metal):
        owner = np.repeat(list(boxes), counts)[metal]
        # `take` keeps the rows contiguous, which is faster than indexing.
        parts = [part.take(metal, axis=1) for part in (points, normals, rays, albedo)]
        light[:, metal] = _shade_metal(scene, owner, *parts)
    return light


def lamp_light(lamp: Point, points: np.ndarray, normals: np.ndarray | None) -> np.ndarray:
    """Light (n,) that a lamp facing the origin casts on points (3, n) with normals (3, n).

    Without normals the points face up.
    """
    position = np.array(lamp, np.float32)
    ray = position[:, None] - points
    square = _dot(ray, ray)
    incoming = ray[2] if normals is None else np.maximum(_dot(ray, normals), 0)
    outgoing = np.maximum((position / np.linalg.norm(position)) @ ray, 0)
    return incoming * outgoing / (square * square)


def _bgr(scene_object: SceneObject) -> np.ndarray:
    return np.array(COLORS[scene_object.color][::-1], np.float32)


def _center(scene_object: SceneObject) -> Point:
    return scene_object.x, scene_object.y, scene_object.half_height


def _box_directions(box: Box) -> np.ndarray:
    """Camera directions (3, n) of a box's pixels, row by row."""
    columns = np.arange(box.left, box.right) + 0.5
    rows = np.arange(box.top, box.bottom) + 0.5
    return pixel_directions(columns, rows)


def _intersect(
    objects: list[SceneObject], counts: list[int], camera: Point, rays: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where unit rays (3, n) meet the objects, and the normals there, (3, n) each.

    `counts` has the number of rays of each object. A ray that just misses meets the object's rim.
    """
    eye = np.array(camera, np.float32)
    centers = np.array([_center(one) for one in objects], np.float32).T
    half = np.repeat(np.array([one.half_height for one in objects], np.float32), counts)
    eyes = np.repeat(eye[:, None] - centers, counts, axis=1) / half
    settings = np.array([(one.angle, _bevel(one, eye)) for one in objects], np.float32).T
    angle, bevel = np.repeat(settings, counts, axis=1)
    points = np.empty_like(rays)
    normals = np.empty_like(rays)
    for shape, part in _slices(objects, counts).items():
        found = _INTERSECT_UNIT[shape](eyes[:, part], rays[:, part], angle[part], bevel[part])
        points[:, part], normals[:, part] = found
    return points * half + np.repeat(centers, counts, axis=1), normals


def _slices(objects: list[SceneObject], counts: list[int]) -> dict[str, slice]:
    """For each shape that occurs, the pixels of all its objects."""
    slices: dict[str, slice] = {}
    start = 0
    for scene_object, count in zip(objects, counts, strict=True):
        first = slices[scene_object.shape].start if scene_object.shape in slices else start
        slices[scene_object.shape] = slice(first, start + count)
        start += count
    return slices


def _bevel(scene_object: SceneObject, eye: np.ndarray) -> float:
    """The fraction of its half width that an edge rounds off.

    At least three pixels: the light on a sharper edge flickers.
    """
    pixel = float(np.linalg.norm(eye - _center(scene_object))) / FOCAL
    return max(BEVELS[scene_object.shape], 3 * pixel / scene_object.half_height)


def _intersect_sphere(
    eyes: np.ndarray, rays: np.ndarray, angle: np.ndarray, bevel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the unit sphere."""
    along = _dot(eyes, rays)
    discriminant = along * along - _dot(eyes, eyes) + 1
    points = eyes + rays * (-along - np.sqrt(np.maximum(discriminant, 0)))
    points /= np.sqrt(_dot(points, points))
    return points, points


def _intersect_cylinder(
    eyes: np.ndarray, rays: np.ndarray, angle: np.ndarray, bevel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of an upright cylinder of radius and half height 1."""
    a = rays[0] ** 2 + rays[1] ** 2
    b = eyes[0] * rays[0] + eyes[1] * rays[1]
    discriminant = b * b - a * (eyes[0] ** 2 + eyes[1] ** 2 - 1)
    to_side = (-b - np.sqrt(np.maximum(discriminant, 0))) / np.maximum(a, 1e-6)
    to_top = (1 - eyes[2]) / np.minimum(rays[2], -1e-4)
    points = eyes + rays * np.maximum(to_side, to_top)
    inner = 1 - bevel
    radius = np.maximum(np.sqrt(points[0] ** 2 + points[1] ** 2), 1e-6)
    outward = np.maximum(radius - inner, 0) / radius
    upward = np.maximum(points[2] - inner, 0)
    normals = np.stack([points[0] * outward, points[1] * outward, upward])
    normals += points * (_EDGE_TILT * bevel)
    return points, normals / np.maximum(np.sqrt(_dot(normals, normals)), 1e-6)


def _intersect_cube(
    eyes: np.ndarray, rays: np.ndarray, angle: np.ndarray, bevel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of a rotated cube of half side 1."""
    eyes = _rotate(eyes, -angle)
    rays = _rotate(rays, -angle)
    steep = np.where(np.abs(rays) < 1e-5, np.float32(1e-5), rays)
    points = eyes + rays * ((-np.sign(steep) - eyes) / steep).max(0)
    points = np.clip(points, -1, 1)
    inner = 1 - bevel
    normals = points - np.clip(points, -inner, inner) + points * (_EDGE_TILT * bevel)
    normals /= np.maximum(np.sqrt(_dot(normals, normals)), 1e-6)
    return _rotate(points, angle), _rotate(normals, angle)


_INTERSECT_UNIT = {
    "cube": _intersect_cube,
    "cylinder": _intersect_cylinder,
    "sphere": _intersect_sphere,
}


def _rotate(vectors: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Vectors (3, n) rotated by angles (n,) about the vertical axis."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    x = cos * vectors[0] - sin * vectors[1]
    y = sin * vectors[0] + cos * vectors[1]
    return np.stack([x, y, vectors[2]])


def _diffuse(view: View, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light (3, n) that reaches points (3, n) from the lamps, the sky and the ground."""
    sky = (AMBIENT / _GROUND_ALBEDO) * (0.8 + 0.2 * normals[2])
    contact = 1 - 0.35 * np.exp(points[2] * -6) * (1 - np.maximum(normals[2], 0))
    light = np.repeat((sky * contact)[None], 3, axis=0)
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
    """Light (3, n) from metal: it reflects the ground, the sky, the lamps and other objects.

    `owner` (n,) is the index of the object that each pixel belongs to.
    """
    mirrored = rays - 2 * _dot(rays, normals) * normals
    world = _mirror_surroundings(scene.view, points, mirrored)
    _mirror_objects(scene, owner, points, mirrored, world)
    highlights = _mirror_lamps(scene, owner, points, mirrored)
    diffuse = _diffuse(scene.view, points, normals)
    return albedo * (1.25 * world + highlights + 0.1 * diffuse)


def _mirror_surroundings(view: View, points: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Light (3, n) along mirrored rays: from the ground, or from a backdrop above it.

    The backdrop is bright behind the objects and dark above the camera.
    """
    distance = np.minimum(points[2] / np.maximum(-mirrored[2], 0.02), 60)
    floor = points + mirrored * distance
    floor[2] = 0
    ground = np.full_like(points, AMBIENT)
    for lamp, rgb in zip(view.lamps, LAMP_RGB, strict=True):
        ground += rgb[::-1, None] * lamp_light(lamp, floor, None)
    ground *= 1 - 0.5 * np.exp(distance * -3)
    away = -np.array(view.camera[:2], np.float32) / np.hypot(*view.camera[:2])
    backdrop = np.maximum(away @ mirrored[:2], 0)
    brightness = np.clip(0.5 + 0.35 * backdrop - 0.8 * mirrored[2], 0, 1)
    return ground * brightness + 0.01 * (1 - brightness)


def _mirror_lamps(
    scene: Scene, owner: np.ndarray, points: np.ndarray, mirrored: np.ndarray
) -> np.ndarray:
    """Light (3, n) of the lamps' images.

    All lamps are equally bright in reflections, whatever light they cast.
    """
    is_sphere = np.array([one.shape == "sphere" for one in scene.objects])
    choices = [np.float32(pair)[:, None] for pair in (_SPHERE_HIGHLIGHT, _EDGED_HIGHLIGHT)]
    sharpness, gain = np.where(is_sphere, *choices).take(owner, axis=1)
    highlights = np.zeros_like(points)
    for lamp in scene.view.lamps:
        to_lamp = np.array(lamp, np.float32)[:, None] - points
        cos = _dot(to_lamp, mirrored) / np.sqrt(_dot(to_lamp, to_lamp))
        highlights += gain * np.exp(np.minimum(cos - 1, 0) * sharpness)
    return highlights


def _mirror_objects(
    scene: Scene, owner: np.ndarray, points: np.ndarray, mirrored: np.ndarray, world: np.ndarray
) -> None:
    """Replace, in place, the light where mirrored rays (3, n) meet another object.

    Objects are treated as spheres.
    """
    for i, scene_object in enumerate(scene.objects):
        offset = points - np.array(_center(scene_object), np.float32)[:, None]
        along = _dot(offset, mirrored)
        miss = _dot(offset, offset) - along * along  # squared distance of the ray to the center
        square = (1.1 * scene_object.half_height) ** 2
        hit = np.flatnonzero((miss < square) & (along < 0) & (owner != i))
        if len(hit):
            cover = np.minimum((1 - miss[hit] / square) * 3, 0.8)
            seen = _bgr(scene_object)[:, None] * (0.2 / 255)
            world[:, hit] += (seen - world[:, hit]) * cover


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products (n,) of vectors (3, n)."""
    total = one[0] * other[0]
    total += one[1] * other[1]
    total += one[2] * other[2]
    return total
