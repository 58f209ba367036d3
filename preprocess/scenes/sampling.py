"""Random scenes and what changes in them; a pair depends on (seed, index) alone.

A scene that breaks a rule (things too close, hidden, out of the picture, or impossible to describe) is drawn anew.
"""

from dataclasses import dataclass, replace
from math import hypot, pi
from random import Random

import numpy as np

from dataloaders.clevr_vocabulary import COLORS, MATERIALS, SHAPES, SIZES
from preprocess.scenes.geometry import (
    CAMERA,
    LAMPS,
    Scene,
    SceneObject,
    View,
    camera_axes,
    project,
    visible_pixels,
)
from preprocess.scenes.sentences import is_describable

CHANGE_TYPES = ("color", "material", "add", "drop", "move")


NUM_OBJECTS = (3, 10)


_REACH = 3.0  # things stand in [-3, 3]^2


_GAP = 0.25  # between two things, cubes being taken for cylinders; their corners do not meet either


_MARGIN = 0.4  # between two things along each axis of the usual camera: left, right, front and behind are clear


_SCENE_JITTER = 1.0  # of the camera, from scene to scene


_PICTURE_JITTER = 1.3  # of the camera, among the pictures of a scene; as far as in the real ones


_LAMP_JITTER = 1.0


_MIN_PIXELS, _MIN_SHARE = 120, 0.35  # what must be seen of every thing


_MIN_CHANGED_PIXELS, _MIN_CHANGED_SHARE = 250, 0.6  # and of a thing that changes


_MIN_MOVE, _MIN_MOVE_PIXELS = 1.2, 50


_RIGHT = camera_axes(CAMERA)[0, :2].tolist()


@dataclass(frozen=True)
class Change:
    """One change: its type and the thing as it was and as it is (None: it is not in that picture)."""

    type: str
    before: SceneObject | None
    after: SceneObject | None

    @property
    def value(self) -> str | None:
        """The new color or material, None for other types."""
        return getattr(self.after, self.type) if self.type in ("color", "material") else None


@dataclass(frozen=True)
class ScenePair:
    """What the pictures of one entry show. The distractor has before's things, seen and lit differently."""

    before: Scene
    after: Scene
    distractor: Scene
    changes: tuple[Change, ...]


def change_type(seed: int, index: int) -> str:
    """The type of a CLEVR-Change pair; each five consecutive indices from a multiple of five have all five types."""
    return Random(f"{seed} types {index // 5}").sample(CHANGE_TYPES, 5)[index % 5]


def sample_clevr_pair(seed: int, index: int, jitter: float = 1.0) -> ScenePair:
    """A pair of one change, camera and lamps of each picture a little different: `jitter` 1 as in CLEVR-Change, 0 not at all."""
    rng = Random(f"{seed} clevr {index}")
    types = (change_type(seed, index),)
    count = _num_objects(types, rng)
    while True:
        base = _jitter(CAMERA, _SCENE_JITTER, rng)
        views = [
            View(_jitter(base, jitter * _PICTURE_JITTER, rng), _jitter_lamps(rng, jitter))
            for _ in range(3)
        ]
        pair = _sample_pair(types, count, views, rng)
        if pair is not None:
            return pair


def sample_spot_pair(seed: int, index: int) -> ScenePair:
    """A pair of one to three changes of different things, seen by a fixed camera."""
    rng = Random(f"{seed} spot {index}")
    types = tuple(rng.sample(CHANGE_TYPES, rng.randint(1, 3)))
    count = _num_objects(types, rng)
    while True:
        view = View(_jitter(CAMERA, _SCENE_JITTER, rng), _jitter_lamps(rng))
        pair = _sample_pair(types, count, [view] * 3, rng)
        if pair is not None:
            return pair


def _jitter(
    place: tuple[float, float, float], most: float, rng: Random
) -> tuple[float, float, float]:
    return tuple(value + rng.uniform(-most, most) for value in place)


def _jitter_lamps(rng: Random, jitter: float = 1.0) -> tuple[tuple[float, float, float], ...]:
    return tuple(_jitter(lamp, jitter * _LAMP_JITTER, rng) for lamp in LAMPS)


def _num_objects(types: tuple[str, ...], rng: Random) -> int:
    """How many things there are at first; drawn once a pair, or crowded scenes, often rejected, would be rare."""
    return rng.randint(NUM_OBJECTS[0] + ("drop" in types), NUM_OBJECTS[1] - ("add" in types))


def _sample_pair(
    types: tuple[str, ...], count: int, views: list[View], rng: Random
) -> ScenePair | None:
    """One attempt at a pair of the given changes; views are those of before, after and distractor."""
    things = _sample_objects(count, rng)
    if things is None:
        return None
    before = Scene(things, views[0])
    if not all(_visible_enough(Scene(things, view)) for view in {views[0], views[2]}):
        return None
    changes = _sample_changes(types, before, rng)
    if changes is None:
        return None
    after = Scene(_changed(things, changes), views[1])
    pair = ScenePair(before, after, Scene(things, views[2]), changes)
    return pair if _is_valid(pair) else None


def _sample_objects(count: int, rng: Random) -> tuple[SceneObject, ...] | None:
    things: tuple[SceneObject, ...] = ()
    for _ in range(count):
        thing = _place_freely(_random_object(rng), things, rng)
        if thing is None:
            return None
        things += (thing,)
    return things


def _random_object(rng: Random) -> SceneObject:
    looks = (rng.choice(options) for options in (SHAPES, tuple(COLORS), MATERIALS, tuple(SIZES)))
    return SceneObject(*looks, 0.0, 0.0, rng.uniform(0, 2 * pi))


def _place_freely(
    thing: SceneObject, others: tuple[SceneObject, ...], rng: Random
) -> SceneObject | None:
    """The thing at a random free place, None where 50 tries found none."""
    for _ in range(50):
        x, y = rng.uniform(-_REACH, _REACH), rng.uniform(-_REACH, _REACH)
        if all(
            _well_separated(
                x - other.x,
                y - other.y,
                max(
                    thing.half + other.half + _GAP, thing.footprint_radius + other.footprint_radius
                ),
            )
            for other in others
        ):
            return replace(thing, x=x, y=y)
    return None


def _well_separated(x: float, y: float, least: float) -> bool:
    """Whether two things with this offset are as far apart as they must be, and clearly left or right, in front or behind."""
    across, along = x * _RIGHT[0] + y * _RIGHT[1], x * _RIGHT[1] - y * _RIGHT[0]
    return abs(across) > _MARGIN and abs(along) > _MARGIN and hypot(x, y) > least


def _sample_changes(
    types: tuple[str, ...], before: Scene, rng: Random
) -> tuple[Change, ...] | None:
    """One change of each type, each of another thing; None where there is no room for one."""
    free = list(before.objects)
    rng.shuffle(free)
    occupied = before.objects
    changes = []
    for kind in types:
        old = None if kind == "add" else free.pop()
        new = _new_state(kind, old, occupied, before, rng)
        if new is None and kind != "drop":
            return None
        if kind in ("add", "move"):
            occupied += (new,)
        changes.append(Change(kind, old, new))
    return tuple(changes)


def _new_state(
    kind: str,
    old: SceneObject | None,
    occupied: tuple[SceneObject, ...],
    before: Scene,
    rng: Random,
) -> SceneObject | None:
    """The thing after a change of this kind: None where it is gone or finds no place."""
    if kind == "drop":
        return None
    if kind == "add":
        return _place_freely(_random_object(rng), occupied, rng)
    if kind == "move":
        new = _place_freely(old, tuple(thing for thing in occupied if thing is not old), rng)
        return new if new is not None and _moved_enough(old, new, before.view) else None
    others = [
        value for value in (COLORS if kind == "color" else MATERIALS) if value != getattr(old, kind)
    ]
    return replace(old, **{kind: rng.choice(others)})


def _moved_enough(old: SceneObject, new: SceneObject, view: View) -> bool:
    """Whether a move is clear both on the plane and in the picture."""
    pixels = project(np.array([(old.x, old.y, 0), (new.x, new.y, 0)], np.float32), view.camera)
    return (
        hypot(old.x - new.x, old.y - new.y) >= _MIN_MOVE
        and np.hypot(*(pixels[0] - pixels[1])) >= _MIN_MOVE_PIXELS
    )


def _changed(
    things: tuple[SceneObject, ...], changes: tuple[Change, ...]
) -> tuple[SceneObject, ...]:
    """The things after the changes; those that stay keep their order, new ones come last."""
    states = {id(change.before): change.after for change in changes if change.before is not None}
    kept = (states.get(id(thing), thing) for thing in things)
    return (
        *(thing for thing in kept if thing is not None),
        *(c.after for c in changes if c.before is None),
    )


def _visible_enough(scene: Scene, changed: tuple[SceneObject, ...] = ()) -> bool:
    """Whether every thing is seen, and those that change well."""
    for thing, pixels, share in zip(scene.objects, *visible_pixels(scene), strict=True):
        important = any(thing is other for other in changed)
        if pixels < (_MIN_CHANGED_PIXELS if important else _MIN_PIXELS):
            return False
        if share < (_MIN_CHANGED_SHARE if important else _MIN_SHARE):
            return False
    return True


def _is_valid(pair: ScenePair) -> bool:
    """Whether every change can be seen in each picture and be put into words."""
    old = tuple(change.before for change in pair.changes if change.before is not None)
    new = tuple(change.after for change in pair.changes if change.after is not None)
    if not (
        _visible_enough(pair.after, new)
        and _visible_enough(pair.before, old)
        and _visible_enough(pair.distractor, old)
    ):
        return False
    return all(is_describable(*referent(pair, change)) for change in pair.changes)


def referent(pair: ScenePair, change: Change) -> tuple[Scene, SceneObject]:
    """The scene and the thing in it that a sentence about the change refers to: after for add, else before."""
    return (pair.after, change.after) if change.before is None else (pair.before, change.before)
