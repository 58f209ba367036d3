"""Random scenes and what changes in them. A pair depends only on its seed and index.

A scene that breaks a rule is rejected and another one drawn: objects that are too close together,
hidden, outside the picture, or that no sentence can describe.
"""

from dataclasses import dataclass, replace
from math import hypot, pi
from random import Random

import numpy as np

from dataloaders.clevr_vocabulary import CHANGE_TYPES, COLORS, MATERIALS, SHAPES, SIZES
from preprocess.scenes.geometry import (
    CAMERA,
    LAMPS,
    Point,
    Scene,
    SceneObject,
    View,
    camera_axes,
    project,
    visibility,
)
from preprocess.scenes.sentences import is_describable

NUM_OBJECTS = (3, 10)  # at least and at most, in each picture

_REACH = 3.0  # objects stand in [-3, 3]²
_GAP = (
    0.25  # between two objects, treating cubes as cylinders; cubes' corners must not touch either
)
_MARGIN = 0.4  # between two objects along both axes of the camera, so that relations are clear
_MAX_TRIES = 50  # to find a free place for an object

_SCENE_JITTER = 1.0  # of the camera, from scene to scene
_PICTURE_JITTER = 1.3  # of the camera, between the pictures of a scene, as in the real ones
_LAMP_JITTER = 1.0

# What must be visible of each object, and of an object that changes: pixels, and the fraction
# of its outline.
_MIN_PIXELS = 120
_MIN_FRACTION = 0.35
_MIN_CHANGED_PIXELS = 250
_MIN_CHANGED_FRACTION = 0.6

# How far an object must move, on the plane and in the picture.
_MIN_MOVE = 1.2
_MIN_MOVE_PIXELS = 50

_RIGHT = camera_axes(CAMERA)[0, :2].tolist()

Objects = tuple[SceneObject, ...]


@dataclass(frozen=True)
class Change:
    """One change, and the object before and after it; None if it is not in that picture."""

    type: str
    before: SceneObject | None
    after: SceneObject | None

    @property
    def value(self) -> str | None:
        """The new color or material, None for other types of change."""
        return getattr(self.after, self.type) if self.type in ("color", "material") else None


@dataclass(frozen=True)
class ScenePair:
    """What the pictures of a pair show.

    The distractor has the objects of `before` in another view and light.
    """

    before: Scene
    after: Scene
    distractor: Scene
    changes: tuple[Change, ...]


def sample_clevr_pair(seed: int, index: int, jitter: float = 1.0) -> ScenePair:
    """A pair with one change, as in CLEVR-Change.

    `jitter` is how much camera and lamps differ between its pictures: 1 as in CLEVR-Change, 0 not
    at all.
    """
    rng = Random(f"{seed} clevr {index}")
    types = (_balanced_type(seed, index),)
    count = _num_objects(types, rng)
    while True:
        base = _jitter(CAMERA, _SCENE_JITTER, rng)
        views = [_jittered_view(base, jitter, rng) for _ in range(3)]
        pair = _sample_pair(types, count, views, rng)
        if pair is not None:
            return pair


def sample_spot_pair(seed: int, index: int) -> ScenePair:
    """A pair with one to three changes, each of another object, seen by a fixed camera."""
    rng = Random(f"{seed} spot {index}")
    types = tuple(rng.sample(CHANGE_TYPES, rng.randint(1, 3)))
    count = _num_objects(types, rng)
    while True:
        view = View(_jitter(CAMERA, _SCENE_JITTER, rng), _jitter_lamps(1.0, rng))
        pair = _sample_pair(types, count, [view] * 3, rng)
        if pair is not None:
            return pair


def referent(pair: ScenePair, change: Change) -> tuple[Scene, SceneObject]:
    """The object that a sentence about the change refers to, and the scene that it is part of."""
    if change.before is None:
        return pair.after, change.after
    return pair.before, change.before


def _balanced_type(seed: int, index: int) -> str:
    """The change type of a CLEVR-Change pair; indices 0 to 4, 5 to 9, … have all five types."""
    return Random(f"{seed} types {index // 5}").sample(CHANGE_TYPES, 5)[index % 5]


def _num_objects(types: tuple[str, ...], rng: Random) -> int:
    """How many objects the first picture has.

    Drawn once for a pair: a new number for each attempt would make crowded scenes rare, since they
    are rejected more often.
    """
    least, most = NUM_OBJECTS
    if "drop" in types:
        least += 1
    if "add" in types:
        most -= 1
    return rng.randint(least, most)


def _jitter(position: Point, max_shift: float, rng: Random) -> Point:
    return tuple(value + rng.uniform(-max_shift, max_shift) for value in position)


def _jitter_lamps(jitter: float, rng: Random) -> tuple[Point, ...]:
    return tuple(_jitter(lamp, jitter * _LAMP_JITTER, rng) for lamp in LAMPS)


def _jittered_view(camera: Point, jitter: float, rng: Random) -> View:
    return View(_jitter(camera, jitter * _PICTURE_JITTER, rng), _jitter_lamps(jitter, rng))


def _sample_pair(
    types: tuple[str, ...], count: int, views: list[View], rng: Random
) -> ScenePair | None:
    """One attempt at a pair with these changes, seen in the views of before, after, distractor."""
    objects = _sample_objects(count, rng)
    if objects is None:
        return None
    before = Scene(objects, views[0])
    distractor = Scene(objects, views[2])
    scenes = {before, distractor}  # a set, so that identical scenes are checked once
    if not all(_visible_enough(scene) for scene in scenes):
        return None
    changes = _sample_changes(types, before, rng)
    if changes is None:
        return None
    after = Scene(_apply_changes(objects, changes), views[1])
    pair = ScenePair(before, after, distractor, changes)
    return pair if _is_valid(pair) else None


def _sample_objects(count: int, rng: Random) -> Objects | None:
    objects: Objects = ()
    for _ in range(count):
        scene_object = _place_freely(_random_object(rng), objects, rng)
        if scene_object is None:
            return None
        objects += (scene_object,)
    return objects


def _random_object(rng: Random) -> SceneObject:
    return SceneObject(
        shape=rng.choice(SHAPES),
        color=rng.choice(tuple(COLORS)),
        material=rng.choice(MATERIALS),
        size=rng.choice(tuple(SIZES)),
        x=0.0,
        y=0.0,
        angle=rng.uniform(0, 2 * pi),
    )


def _place_freely(scene_object: SceneObject, others: Objects, rng: Random) -> SceneObject | None:
    """The object at a random free place; None if none was found."""
    for _ in range(_MAX_TRIES):
        x = rng.uniform(-_REACH, _REACH)
        y = rng.uniform(-_REACH, _REACH)
        placed = replace(scene_object, x=x, y=y)
        if all(_well_separated(placed, other) for other in others):
            return placed
    return None


def _well_separated(one: SceneObject, other: SceneObject) -> bool:
    """Whether two objects neither touch nor stand in one line for the usual camera.

    Then each is clearly to the left or right of the other, and clearly in front of it or behind it.
    """
    x = one.x - other.x
    y = one.y - other.y
    across = x * _RIGHT[0] + y * _RIGHT[1]
    along = x * _RIGHT[1] - y * _RIGHT[0]
    round_distance = one.half_height + other.half_height + _GAP
    corner_distance = one.footprint_radius + other.footprint_radius
    is_clear = abs(across) > _MARGIN and abs(along) > _MARGIN
    return is_clear and hypot(x, y) > max(round_distance, corner_distance)


def _sample_changes(
    types: tuple[str, ...], before: Scene, rng: Random
) -> tuple[Change, ...] | None:
    """One change of each type, each of another object; None if there is no room for one of them."""
    unchanged = list(before.objects)
    rng.shuffle(unchanged)
    occupied = before.objects
    changes = []
    for change_type in types:
        old = None if change_type == "add" else unchanged.pop()
        new = _new_state(change_type, old, occupied, before.view, rng)
        if new is None and change_type != "drop":
            return None
        if change_type in ("add", "move"):
            occupied += (new,)
        changes.append(Change(change_type, old, new))
    return tuple(changes)


def _new_state(
    change_type: str, old: SceneObject | None, occupied: Objects, view: View, rng: Random
) -> SceneObject | None:
    """The object after a change; None if it is gone or there is no place for it."""
    if change_type == "drop":
        return None
    if change_type == "add":
        return _place_freely(_random_object(rng), occupied, rng)
    if change_type == "move":
        others = tuple(other for other in occupied if other is not old)
        new = _place_freely(old, others, rng)
        return new if new is not None and _moved_enough(old, new, view) else None
    values = COLORS if change_type == "color" else MATERIALS
    new_values = [value for value in values if value != getattr(old, change_type)]
    return replace(old, **{change_type: rng.choice(new_values)})


def _moved_enough(old: SceneObject, new: SceneObject, view: View) -> bool:
    """Whether a move is clear, both on the plane and in the picture."""
    centers = np.array([(old.x, old.y, 0), (new.x, new.y, 0)], np.float32)
    pixels = project(centers, view.camera)
    distance = hypot(old.x - new.x, old.y - new.y)
    return distance >= _MIN_MOVE and np.hypot(*(pixels[0] - pixels[1])) >= _MIN_MOVE_PIXELS


def _apply_changes(objects: Objects, changes: tuple[Change, ...]) -> Objects:
    """The objects after the changes, in their order; new ones come last."""
    new_states = {
        id(change.before): change.after for change in changes if change.before is not None
    }
    states = (new_states.get(id(one), one) for one in objects)
    remaining = [one for one in states if one is not None]
    added = [change.after for change in changes if change.before is None]
    return (*remaining, *added)


def _visible_enough(scene: Scene, changed: Objects = ()) -> bool:
    """Whether enough of every object is visible; more is required of those that change."""
    for scene_object, (pixels, fraction) in zip(scene.objects, visibility(scene), strict=True):
        is_changed = any(scene_object is other for other in changed)
        min_pixels = _MIN_CHANGED_PIXELS if is_changed else _MIN_PIXELS
        min_fraction = _MIN_CHANGED_FRACTION if is_changed else _MIN_FRACTION
        if pixels < min_pixels or fraction < min_fraction:
            return False
    return True


def _is_valid(pair: ScenePair) -> bool:
    """Whether every change is visible in each picture and can be put into words."""
    old = tuple(change.before for change in pair.changes if change.before is not None)
    new = tuple(change.after for change in pair.changes if change.after is not None)
    expected = ((pair.after, new), (pair.before, old), (pair.distractor, old))
    if not all(_visible_enough(scene, changed) for scene, changed in expected):
        return False
    return all(is_describable(*referent(pair, change)) for change in pair.changes)
