"""Scenes of simple things on a plane, and pictures of them as CLEVR's Blender set-up shows them.

A scene is ray cast analytically: each thing's outline is filled as an antialiased polygon, all pixels of all things are
shaded in one flat batch, and the shadows of three lamps are drawn on a ground of a quarter of the resolution.
Light is computed linearly and shown as sRGB. Units: lengths are Blender's, angles radians, pictures 480 x 320 pixels.

Shape letters: N things, n pixels of all things, P points of an outline, S points of a lamp; vectors are (3, n).
"""

from dataclasses import dataclass
from math import pi, sqrt

import cv2
import numpy as np

WIDTH, HEIGHT = 480, 320
FOCAL = WIDTH * 35 / 32  # pixels: 35 mm lens before a 32 mm sensor
CAMERA = (7.36, -6.93, 4.96)
LAMPS = ((6.45, -2.91, 4.26), (-4.67, -4.01, 3.01), (-1.17, 2.65, 5.82))  # key, fill, back
RADII = {"large": 0.7, "small": 0.35}
SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("rubber", "metal")
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}

# Least-squares fit of the lamps above to the median of 144 real CLEVR-Change images (linear RGB, error 0.006).
_LAMP_RGB = np.array([[4.93, 4.55, 3.95], [0.95, 1.07, 1.35], [1.81, 1.89, 1.73]], np.float32)
_AMBIENT = 0.135
_GROUND_ALBEDO = 0.6
_SHRINK = 4  # the ground is drawn at 1 / _SHRINK of the resolution
_LAMP_POINTS = np.array([[0.4, 0.2, 0.3], [-0.4, 0.3, -0.3], [0.2, -0.5, -0.2], [-0.2, 0.0, 0.2]], np.float32)  # (S, 3)
_BEVEL = {"cube": 0.13, "cylinder": 0.07, "sphere": 0.0}  # of half the width
_TO_SRGB = np.empty(4097, np.uint8)
_TO_SRGB[:] = [
    round(255 * (12.92 * v if v < 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in np.arange(4097) / 4096
]


@dataclass(frozen=True)
class Thing:
    """One object on the plane: its four attributes, the place of its centre and its turn about the vertical."""

    shape: str
    color: str
    material: str
    size: str
    x: float
    y: float
    turn: float

    @property
    def half(self) -> float:
        """Half its height, which is also half its width."""
        return RADII[self.size] / (sqrt(2) if self.shape == "cube" else 1)


@dataclass(frozen=True)
class View:
    """Where the camera (it looks at the origin) and the three lamps are."""

    camera: tuple[float, float, float] = CAMERA
    lamps: tuple[tuple[float, float, float], ...] = LAMPS


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    things: tuple[Thing, ...]
    view: View


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
    inner = 1 - _BEVEL["cube"] * (1 - sqrt(0.5))
    cut = np.concatenate([corners * np.where(np.arange(3) == k, 1, inner) for k in range(3)])
    height = (np.arange(64) + 0.5) / 32 - 1
    spiral = np.arange(64) * (pi * (3 - sqrt(5)))
    wide = np.sqrt(1 - height**2)
    ball = 1.03 * np.stack([np.cos(spiral) * wide, np.sin(spiral) * wide, height], 1)
    bodies = {"cube": np.resize(cut, (64, 3)), "cylinder": rings, "sphere": ball}
    return {shape: points.astype(np.float32) for shape, points in bodies.items()}


_UNIT_BODIES = _unit_bodies()
_RING = _UNIT_BODIES["cylinder"][:32, :2]


def bodies(things: tuple[Thing, ...]) -> np.ndarray:
    """World points (N, 64, 3) whose hulls are the things' bodies."""
    points = np.stack([_UNIT_BODIES[thing.shape] for thing in things])
    placed = np.array([(t.x, t.y, t.half, t.half * np.cos(t.turn), t.half * np.sin(t.turn)) for t in things], np.float32)
    x, y, half, cos, sin = placed.T[..., None]
    turned = (cos * points[..., 0] - sin * points[..., 1], sin * points[..., 0] + cos * points[..., 1])
    return np.stack([turned[0] + x, turned[1] + y, half * (points[..., 2] + 1)], -1)


def outlines(things: tuple[Thing, ...], camera: tuple[float, float, float]) -> list[np.ndarray]:
    """For each thing its convex outline in the picture, (P, 1, 2) float32 pixels."""
    points = bodies(things)
    for i, thing in enumerate(things):
        if thing.shape == "sphere":  # exactly the circle in which the rays touch it
            to_camera = np.array(camera) - (thing.x, thing.y, thing.half)
            square = to_camera @ to_camera
            across = np.array([to_camera[1], -to_camera[0], 0]) / np.hypot(to_camera[0], to_camera[1])
            upward = np.cross(across, to_camera) / sqrt(square)
            center = (thing.x, thing.y, thing.half) + to_camera * (thing.half**2 / square)
            ring = _RING * (thing.half * sqrt(1 - thing.half**2 / square))
            points[i] = np.repeat(center + ring @ np.stack([across, upward]), 2, axis=0)
    return [cv2.convexHull(outline) for outline in project(points, camera)]


def far_to_near(things: tuple[Thing, ...], camera: tuple[float, float, float]) -> list[int]:
    """Indices of the things in painting order; exact for round feet that do not overlap."""
    return sorted(
        range(len(things)),
        key=lambda i: RADII[things[i].size] ** 2 - (things[i].x - camera[0]) ** 2 - (things[i].y - camera[1]) ** 2,
    )


def visible_pixels(scene: Scene) -> tuple[list[int], list[float]]:
    """For each thing, how many pixels of it are seen, and what share that is of its whole outline."""
    labels = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    shapes = outlines(scene.things, scene.view.camera)
    for i in far_to_near(scene.things, scene.view.camera):
        cv2.fillConvexPoly(labels, np.int32(shapes[i] * 8), i + 1, shift=4)
    seen = 4 * np.bincount(labels.ravel(), minlength=len(shapes) + 1)[1:]
    return seen.tolist(), [n / max(cv2.contourArea(shape), 1) for n, shape in zip(seen.tolist(), shapes, strict=True)]


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (320, 480, 3) uint8, BGR as OpenCV has it."""
    picture = _draw_ground(scene)
    if scene.things:
        _draw_things(scene, picture)
    return picture


def _lamp_light(lamp: tuple[float, float, float], points: np.ndarray, normals: np.ndarray | None) -> np.ndarray:
    """Light (n,) that a lamp facing the origin throws on points (3, n) with normals (3, n); None: facing up."""
    place = np.array(lamp, np.float32)
    ray = place[:, None] - points
    square = np.einsum("in,in->n", ray, ray)
    facing = ray[2] if normals is None else np.maximum(np.einsum("in,in->n", ray, normals), 0)
    leaving = np.maximum((place / np.linalg.norm(place)) @ ray, 0)
    return facing * leaving / (square * square)


_GRID = np.stack(
    [
        *np.meshgrid((np.arange(WIDTH // _SHRINK) + 0.5) * _SHRINK - WIDTH / 2,
                     (np.arange(HEIGHT // _SHRINK) + 0.5) * _SHRINK - HEIGHT / 2),
        np.full((HEIGHT // _SHRINK, WIDTH // _SHRINK), FOCAL),
    ]
).reshape(3, -1).astype(np.float32)  # fmt: skip


def _draw_ground(scene: Scene) -> np.ndarray:
    """The plane with its light, shadows and contact darkening, (320, 480, 3) uint8 BGR."""
    rays = camera_axes(scene.view.camera).T @ _GRID
    reach = scene.view.camera[2] / np.maximum(-rays[2], 1.0)
    points = np.array(scene.view.camera, np.float32)[:, None] + rays * reach
    points[2] = 0
    shadows, contact = _shadows(scene)
    light = np.full((3, _GRID.shape[1]), _AMBIENT, np.float32)
    for lamp, rgb, shadow in zip(scene.view.lamps, _LAMP_RGB, shadows, strict=True):
        light += rgb[:, None] * (_lamp_light(lamp, points, None) * (1 - shadow.ravel()))
    light *= 1 - contact.ravel()
    small = np.ascontiguousarray(_srgb(light[::-1]).T).reshape(HEIGHT // _SHRINK, WIDTH // _SHRINK, 3)
    return cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def _shadows(scene: Scene) -> tuple[list[np.ndarray], np.ndarray]:
    """Each lamp's shadow (three of (80, 120) in [0, 1]) and the darkening where things touch the ground."""
    size = (HEIGHT // _SHRINK, WIDTH // _SHRINK)
    if not scene.things:
        return [np.zeros(size, np.float32)] * 3, np.zeros(size, np.float32)
    points = bodies(scene.things)[None]  # (1, N, P, 3)
    lamps = (np.array(scene.view.lamps, np.float32)[:, None] + _LAMP_POINTS).reshape(-1, 1, 1, 3)  # (3 * S, 1, 1, 3)
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
    shadows = [cv2.GaussianBlur(mask, (5, 5), 1.2) * (0.85 / 255) for mask in per_lamp]
    return shadows, cv2.GaussianBlur(np.float32(masks[-1]), (7, 7), 1.6) * (0.4 / 255)


def _srgb(light: np.ndarray) -> np.ndarray:
    """Linear light to sRGB bytes of the same shape."""
    return _TO_SRGB[np.clip(light * 4096, 0, 4096).astype(np.uint16)]


def _draw_things(scene: Scene, picture: np.ndarray) -> None:
    """Paint all things over the ground, in place."""
    shapes = outlines(scene.things, scene.view.camera)
    boxes = {}
    for i in sorted(range(len(shapes)), key=lambda i: scene.things[i].shape):  # _hit wants each shape in one piece
        low = np.maximum(np.floor(shapes[i].min((0, 1))).astype(int) - 1, 0)
        high = np.minimum(np.ceil(shapes[i].max((0, 1))).astype(int) + 2, (WIDTH, HEIGHT))
        if (high > low).all():
            boxes[i] = (*low.tolist(), *high.tolist())
    if not boxes:
        return
    colors = _shade(scene, boxes)
    start = 0
    patches = {}
    for i, (left, top, right, bottom) in boxes.items():
        stop = start + (right - left) * (bottom - top)
        patches[i] = colors[start:stop].reshape(bottom - top, right - left, 3)
        start = stop
    for i in far_to_near(scene.things, scene.view.camera):
        if i in boxes:
            _paste(picture, patches[i], shapes[i], boxes[i])


def _paste(picture: np.ndarray, patch: np.ndarray, outline: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Blend a patch (h, w, 3) into its box of the picture where the antialiased outline covers it."""
    left, top, right, bottom = box
    cover = np.zeros(patch.shape[:2], np.uint8)
    shifted = np.int32((outline - (left + 0.5, top + 0.5)) * 16)
    cv2.fillConvexPoly(cover, shifted, 255, cv2.LINE_AA, 4)
    under = picture[top:bottom, left:right]
    cover = cover[..., None].astype(np.uint16)
    under[:] = (patch * cover + under * (255 - cover) + 127) // 255


def _shade(scene: Scene, boxes: dict[int, tuple[int, int, int, int]]) -> np.ndarray:
    """Colours (n, 3) uint8 BGR of all pixels of the things' boxes, one box after the other."""
    things = [scene.things[i] for i in boxes]
    counts = [(right - left) * (bottom - top) for left, top, right, bottom in boxes.values()]
    rays = camera_axes(scene.view.camera).T @ np.concatenate([_box_grid(box) for box in boxes.values()], 1)
    rays /= np.sqrt(np.einsum("in,in->n", rays, rays))
    points, normals = _hit(things, counts, np.array(scene.view.camera, np.float32), rays)
    albedo = np.array([COLORS[thing.color][::-1] for thing in things], np.float32).T / 255
    albedo = np.repeat(albedo, counts, axis=1)
    light = _diffuse(scene.view, points, normals) * albedo
    metal = np.flatnonzero(np.repeat([thing.material == "metal" for thing in things], counts))
    if len(metal):
        owner = np.repeat(list(boxes), counts)[metal]
        light[:, metal] = _metal(scene, owner, points[:, metal], normals[:, metal], rays[:, metal], albedo[:, metal])
    return np.ascontiguousarray(_srgb(light).T)


def _box_grid(box: tuple[int, int, int, int]) -> np.ndarray:
    """Camera directions (3, n) of the pixels of a box, row by row."""
    left, top, right, bottom = box
    grid = np.empty((3, bottom - top, right - left), np.float32)
    grid[0] = np.arange(left, right) + (0.5 - WIDTH / 2)
    grid[1] = np.arange(top, bottom)[:, None] + (0.5 - HEIGHT / 2)
    grid[2] = FOCAL
    return grid.reshape(3, -1)


def _hit(things: list[Thing], counts: list[int], eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
            turn = np.repeat(np.array([things[i].turn for i in mine], np.float32), [counts[i] for i in mine])
            points[:, part], normals[:, part] = cast(eyes[:, part], rays[:, part], turn)
    return points * half + np.repeat(middle, counts, axis=1), normals


def _turned(vectors: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Vectors (3, n) turned by angles (n,) about the vertical."""
    cos, sin = np.cos(turn), np.sin(turn)
    return np.stack([cos * vectors[0] - sin * vectors[1], sin * vectors[0] + cos * vectors[1], vectors[2]])


def _hit_sphere(eyes: np.ndarray, rays: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the unit sphere."""
    along = np.einsum("in,in->n", eyes, rays)
    gap = along * along - np.einsum("in,in->n", eyes, eyes) + 1
    points = eyes + rays * (-along - np.sqrt(np.maximum(gap, 0)))
    points /= np.sqrt(np.einsum("in,in->n", points, points))
    return points, points


def _hit_cylinder(eyes: np.ndarray, rays: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the upright cylinder of radius and half height 1, its rim rounded."""
    a = rays[0] ** 2 + rays[1] ** 2
    b = eyes[0] * rays[0] + eyes[1] * rays[1]
    gap = b * b - a * (eyes[0] ** 2 + eyes[1] ** 2 - 1)
    side = (-b - np.sqrt(np.maximum(gap, 0))) / np.maximum(a, 1e-6)
    top = (1 - eyes[2]) / np.minimum(rays[2], -1e-4)
    points = eyes + rays * np.maximum(side, top)
    inner = 1 - _BEVEL["cylinder"]
    radius = np.maximum(np.sqrt(points[0] ** 2 + points[1] ** 2), 1e-6)
    out = np.maximum(radius - inner, 0) / radius
    normals = np.stack([points[0] * out, points[1] * out, np.maximum(points[2] - inner, 0)])
    return points, normals / np.maximum(np.sqrt(np.einsum("in,in->n", normals, normals)), 1e-6)


def _hit_cube(eyes: np.ndarray, rays: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (3, n) of the turned cube of half side 1, its edges rounded."""
    eyes, rays = _turned(eyes, -turn), _turned(rays, -turn)
    steep = np.where(np.abs(rays) < 1e-5, np.float32(1e-5), rays)
    points = eyes + rays * ((-np.sign(steep) - eyes) / steep).max(0)
    points = np.clip(points, -1, 1)
    inner = 1 - _BEVEL["cube"]
    normals = points - np.clip(points, -inner, inner)
    normals /= np.maximum(np.sqrt(np.einsum("in,in->n", normals, normals)), 1e-6)
    return _turned(points, turn), _turned(normals, turn)


def _diffuse(view: View, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light (3, n) in BGR order that reaches points (3, n): lamps, sky, and the ground's reflection."""
    sky = (_AMBIENT / _GROUND_ALBEDO) * (0.8 + 0.2 * normals[2])
    touching = 1 - 0.35 * np.exp(points[2] * -6) * (1 - np.maximum(normals[2], 0))
    light = np.repeat((sky * touching)[None], 3, axis=0)
    for lamp, rgb in zip(view.lamps, _LAMP_RGB, strict=True):
        light += rgb[::-1, None] * (_lamp_light(lamp, points, normals) / _GROUND_ALBEDO)
    return light


def _metal(scene: Scene, owner: np.ndarray, points: np.ndarray, normals: np.ndarray, rays: np.ndarray,
           albedo: np.ndarray) -> np.ndarray:  # fmt: skip
    """Light (3, n) in BGR order that metal pixels throw back: the ground, a dark sky, the lamps and the neighbours."""
    mirrored = rays - 2 * np.einsum("in,in->n", rays, normals) * normals
    down = np.maximum(-mirrored[2], 0.02)
    reach = np.minimum(points[2] / down, 60)
    floor = points + mirrored * reach
    floor[2] = 0
    ground = np.full_like(points, _AMBIENT)
    bright = np.zeros_like(points)
    for lamp, rgb in zip(scene.view.lamps, _LAMP_RGB, strict=True):
        ground += rgb[::-1, None] * _lamp_light(lamp, floor, None)
        to_lamp = np.array(lamp, np.float32)[:, None] - points
        cos = np.einsum("in,in->n", to_lamp, mirrored) / np.sqrt(np.einsum("in,in->n", to_lamp, to_lamp))
        bright += rgb[::-1, None] * np.exp(np.minimum(cos - 1, 0) * 250)
    ground *= 1 - 0.5 * np.exp(reach * -3)
    below = np.clip(0.5 - mirrored[2] * 4, 0, 1)
    world = ground * below + 0.03 * (1 - below)
    _mirror_neighbours(scene, owner, points, mirrored, world)
    return albedo * (1.4 * world + 0.5 * bright + 0.15 * _diffuse(scene.view, points, normals))


def _mirror_neighbours(scene: Scene, owner: np.ndarray, points: np.ndarray, mirrored: np.ndarray,
                       world: np.ndarray) -> None:  # fmt: skip
    """Replace what mirror rays (3, n) see, in place, where they meet another thing (taken for a ball)."""
    for i, thing in enumerate(scene.things):
        offset = points - np.array([[thing.x], [thing.y], [thing.half]], np.float32)
        along = np.einsum("in,in->n", offset, mirrored)
        miss = np.einsum("in,in->n", offset, offset) - along * along
        hit = np.flatnonzero((miss < (1.1 * thing.half) ** 2) & (along < 0) & (owner != i))
        if len(hit):
            seen = np.array(COLORS[thing.color][::-1], np.float32)[:, None] * (0.25 / 255)
            world[:, hit] = seen
