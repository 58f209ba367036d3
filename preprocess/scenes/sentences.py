"""Sentences about one change of a scene, in the manner of CLEVR-Change (Park, Darrell, Rohrbach, ICCV 2019).

A sentence is a reference to the changed thing and a phrase for what happened to it. References are plain ("the small
brown rubber block"), relational ("the cube that is left of the large red metal ball") or by a shared attribute ("the
cylinder that is the same size as the blue ball"); each is true and means exactly one thing of its scene, as the camera
sees it.
"""

from itertools import combinations
from random import Random

import numpy as np

from dataloaders.clevr_vocabulary import ATTRIBUTES, CHANGE_PHRASES, NO_CHANGE_SENTENCES, SYNONYMS
from preprocess.scenes.geometry import Scene, SceneObject, camera_axes, project

RELATIONS = {
    "left": ("left of", "on the left side of", "to the left of"),
    "right": ("right of", "on the right side of", "to the right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}


SAME = {
    "color": "has the same color as",
    "size": "is the same size as",
    "material": "is made of the same material as",
}


_SUBSETS = tuple(subset for n in (1, 2, 3) for subset in combinations(ATTRIBUTES, n))


_KINDS, _KIND_WEIGHTS = ("full", "short", "relational", "same"), (55, 15, 18, 12)


_CLEAR_PIXELS, _CLEAR_DISTANCE = (
    8,
    0.3,
)  # a relation is said of two things that are at least so far apart


def is_describable(scene: Scene, thing: SceneObject) -> bool:
    """Whether some sentence can mean this thing of the scene and no other."""
    return _unique(scene, thing, ATTRIBUTES) or bool(_relations(scene, thing, ATTRIBUTES))


def change_sentences(
    kind: str, scene: Scene, thing: SceneObject, value: str | None, count: int, rng: Random
) -> list[str]:
    """Up to `count` different sentences that `thing` of `scene` changed.

    kind: a key of CHANGE_PHRASES; scene: the one that has the thing (after for add, else before); value: the new color
    or material, None for other kinds; fewer than `count` where the grammar has no more.
    """
    sentences: dict[str, None] = {}
    for _ in range(30 * count):
        phrase = rng.choice(CHANGE_PHRASES[kind])
        new = rng.choice(SYNONYMS.get(value, (value,)))
        sentences[phrase.format(_reference(scene, thing, rng), new)] = None
        if len(sentences) == count:
            break
    return list(sentences)


def no_change_sentences(count: int, rng: Random) -> list[str]:
    """Up to `count` (at most nine) different sentences that nothing changed."""
    return rng.sample(NO_CHANGE_SENTENCES, min(count, len(NO_CHANGE_SENTENCES)))


def _reference(scene: Scene, thing: SceneObject, rng: Random) -> str:
    """A random reference; the plain full one where the kind drawn cannot be, a relation where that is ambiguous."""
    kind = rng.choices(_KINDS, _KIND_WEIGHTS)[0]
    found = None
    if kind == "short":
        found = _partial_reference(scene, thing, rng)
    elif kind == "relational":
        found = _relational(
            scene,
            thing,
            rng.choice((("shape",), ("size", "shape"), ("color", "shape"), ("size",))),
            rng,
        )
    elif kind == "same":
        found = _same_attribute(scene, thing, rng)
    if found is None and _unique(scene, thing, ATTRIBUTES):
        found = _noun_phrase(thing, ATTRIBUTES, rng)
    return found or _relational(scene, thing, ATTRIBUTES, rng)


def _noun_phrase(thing: SceneObject, attributes: tuple[str, ...], rng: Random) -> str:
    """ "the" and the given attributes of a thing, synonyms drawn at random."""
    words = [
        rng.choice(SYNONYMS.get(value, (value,)))
        for value in (getattr(thing, name) for name in attributes)
    ]
    if "shape" not in attributes:
        words.append(rng.choice(("thing", "object")))
    return " ".join(("the", *words))


def _lookalikes(scene: Scene, thing: SceneObject, attributes: tuple[str, ...]) -> list[SceneObject]:
    """The other things of the scene that share all the attributes with this one."""
    return [
        other
        for other in scene.objects
        if other is not thing
        and all(getattr(other, name) == getattr(thing, name) for name in attributes)
    ]


def _unique(scene: Scene, thing: SceneObject, attributes: tuple[str, ...]) -> bool:
    return not _lookalikes(scene, thing, attributes)


def _partial_reference(scene: Scene, thing: SceneObject, rng: Random) -> str | None:
    """A plain reference that leaves attributes out."""
    enough = [subset for subset in _SUBSETS if _unique(scene, thing, subset)]
    return _noun_phrase(thing, rng.choice(enough), rng) if enough else None


def _anchor(scene: Scene, anchor: SceneObject, rng: Random) -> str:
    """A unique reference to another thing: all four attributes, or fewer now and then."""
    enough = [subset for subset in _SUBSETS if "shape" in subset and _unique(scene, anchor, subset)]
    return _noun_phrase(
        anchor, rng.choice(enough) if enough and rng.random() < 0.4 else ATTRIBUTES, rng
    )


def _relational(scene: Scene, thing: SceneObject, head: tuple[str, ...], rng: Random) -> str | None:
    possible = _relations(scene, thing, head)
    if not possible:
        return None
    relation, anchor = rng.choice(possible)
    return f"{_noun_phrase(thing, head, rng)} that is {rng.choice(RELATIONS[relation])} {_anchor(scene, anchor, rng)}"


def _relations(
    scene: Scene, thing: SceneObject, head: tuple[str, ...]
) -> list[tuple[str, SceneObject]]:
    """All (relation, anchor) that hold clearly for the thing and clearly not for the others that the head fits."""
    places = _positions(scene)
    rivals = [places[id(other)] for other in _lookalikes(scene, thing, head)]
    found = []
    for anchor in scene.objects:
        if anchor is thing or not _unique(scene, anchor, ATTRIBUTES):
            continue
        for relation in RELATIONS:
            mine = _margin(relation, places[id(thing)], places[id(anchor)])
            clear = mine[0] > _CLEAR_PIXELS and mine[1] > _CLEAR_DISTANCE
            others = (
                _margin(relation, rival, places[id(anchor)])
                for rival in rivals
                if rival is not places[id(anchor)]
            )
            if clear and all(pixels < -2 and distance < -0.05 for pixels, distance in others):
                found.append((relation, anchor))
    return found


def _positions(scene: Scene) -> dict[int, tuple[float, float, float, float]]:
    """Each thing's foot: pixel x and y, and distance on the plane to the camera's right and towards it."""
    feet = np.array([(thing.x, thing.y, 0) for thing in scene.objects], np.float32)
    pixels = project(feet, scene.view.camera)
    axes = camera_axes(scene.view.camera)
    toward = -axes[2, :2] / np.linalg.norm(axes[2, :2])
    plane = np.stack([feet[:, :2] @ axes[0, :2], feet[:, :2] @ toward], 1)
    return {
        id(thing): tuple(row)
        for thing, row in zip(scene.objects, np.hstack([pixels, plane]).tolist(), strict=True)
    }


def _margin(relation: str, one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, float]:
    """By how many pixels, and how far on the plane, `one` is left of (right of, ...) `other`."""
    axis = 0 if relation in ("left", "right") else 1
    sign = 1 if relation in ("right", "front") else -1
    return sign * (one[axis] - other[axis]), sign * (one[axis + 2] - other[axis + 2])


def _same_attribute(scene: Scene, thing: SceneObject, rng: Random) -> str | None:
    """A reference by an attribute that the thing alone (of those the head fits) shares with another."""
    attribute = rng.choice(tuple(SAME))
    head = rng.choice(
        [
            h
            for h in (("shape",), ("size", "shape"), ("color", "shape"), ("color",))
            if attribute not in h
        ]
    )
    anchors = [
        anchor
        for anchor in _lookalikes(scene, thing, (attribute,))
        if _unique(scene, anchor, ATTRIBUTES)
        and all(other is anchor for other in _lookalikes(scene, thing, (attribute, *head)))
    ]
    if not anchors:
        return None
    return f"{_noun_phrase(thing, head, rng)} that {SAME[attribute]} {_anchor(scene, rng.choice(anchors), rng)}"
