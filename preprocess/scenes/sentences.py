"""Sentences about one change of a scene, in the style of CLEVR-Change (Park et al., ICCV 2019).

A sentence refers to the changed object and says what happened to it. A reference is plain ("the
small brown rubber block"), relational ("the cube that is left of the large red metal ball"), or by
a shared attribute ("the cylinder that is the same size as the blue ball"). It is true, and it fits
exactly one object of the scene as the camera sees it.
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

# How often each kind of reference is drawn, in per cent.
_REFERENCE_WEIGHTS = {"full": 55, "partial": 15, "relational": 18, "same": 12}

# What a noun phrase names of an object that a relation or a shared attribute tells apart.
_RELATIONAL_HEADS = (("shape",), ("size", "shape"), ("color", "shape"), ("size",))
_SAME_HEADS = (("shape",), ("size", "shape"), ("color", "shape"), ("color",))

# How far apart two objects must be for a relation to be clear, in the picture and on the plane.
_CLEAR_PIXELS = 8
_CLEAR_DISTANCE = 0.3

_PARTIAL_ANCHORS = 0.4  # how often the other object of a relation has attributes left out

Attributes = tuple[str, ...]


def is_describable(scene: Scene, scene_object: SceneObject) -> bool:
    """Whether a sentence can refer to this object and to no other object of the scene."""
    if _is_unique(scene, scene_object, ATTRIBUTES):
        return True
    return bool(_distinguishing_relations(scene, scene_object, ATTRIBUTES))


def change_sentences(
    change_type: str,
    scene: Scene,
    scene_object: SceneObject,
    value: str | None,
    count: int,
    rng: Random,
) -> list[str]:
    """Up to `count` different sentences about a change; fewer if the grammar has no more.

    `scene` is the one that shows the object: the scene after an "add", else the one before.
    `value` is the new color or material, None for other types of change.
    """
    sentences: dict[str, None] = {}
    for _ in range(30 * count):
        phrase = rng.choice(CHANGE_PHRASES[change_type])
        new_value = _synonym(value, rng)
        sentences[phrase.format(_reference(scene, scene_object, rng), new_value)] = None
        if len(sentences) == count:
            break
    return list(sentences)


def no_change_sentences(count: int, rng: Random) -> list[str]:
    """Up to `count` different sentences that nothing changed; there are nine."""
    return rng.sample(NO_CHANGE_SENTENCES, min(count, len(NO_CHANGE_SENTENCES)))


def _synonym(value: str | None, rng: Random) -> str | None:
    """One of the words for a value.

    It always draws a random number, even for None or a value with only one word.
    """
    return rng.choice(SYNONYMS.get(value, (value,)))


def _reference(scene: Scene, scene_object: SceneObject, rng: Random) -> str:
    """A random reference of a random kind.

    If no reference of that kind fits one object only, all attributes are named. If they do not
    either, a relation is added.
    """
    kind = rng.choices(tuple(_REFERENCE_WEIGHTS), tuple(_REFERENCE_WEIGHTS.values()))[0]
    reference = None
    if kind == "partial":
        reference = _partial_reference(scene, scene_object, rng)
    elif kind == "relational":
        head = rng.choice(_RELATIONAL_HEADS)
        reference = _relational_reference(scene, scene_object, head, rng)
    elif kind == "same":
        reference = _same_attribute_reference(scene, scene_object, rng)
    if reference is None and _is_unique(scene, scene_object, ATTRIBUTES):
        reference = _noun_phrase(scene_object, ATTRIBUTES, rng)
    if reference is None:
        reference = _relational_reference(scene, scene_object, ATTRIBUTES, rng)
    return reference


def _noun_phrase(scene_object: SceneObject, attributes: Attributes, rng: Random) -> str:
    """The object by the given attributes, such as "the big red ball", in random synonyms."""
    words = [_synonym(getattr(scene_object, name), rng) for name in attributes]
    if "shape" not in attributes:
        words.append(rng.choice(("thing", "object")))
    return " ".join(("the", *words))


def _partial_reference(scene: Scene, scene_object: SceneObject, rng: Random) -> str | None:
    """A plain reference with some of the attributes; None if only all four are unique."""
    subsets = [subset for subset in _SUBSETS if _is_unique(scene, scene_object, subset)]
    if not subsets:
        return None
    return _noun_phrase(scene_object, rng.choice(subsets), rng)


def _anchor_phrase(scene: Scene, anchor: SceneObject, rng: Random) -> str:
    """A unique plain reference to the other object of a relation."""
    subsets = [
        subset for subset in _SUBSETS if "shape" in subset and _is_unique(scene, anchor, subset)
    ]
    attributes = ATTRIBUTES
    if subsets and rng.random() < _PARTIAL_ANCHORS:
        attributes = rng.choice(subsets)
    return _noun_phrase(anchor, attributes, rng)


def _relational_reference(
    scene: Scene, scene_object: SceneObject, head: Attributes, rng: Random
) -> str | None:
    """A reference such as "the cube that is left of the ball"; None if no relation is clear."""
    possible = _distinguishing_relations(scene, scene_object, head)
    if not possible:
        return None
    relation, anchor = rng.choice(possible)
    noun = _noun_phrase(scene_object, head, rng)
    words = rng.choice(RELATIONS[relation])
    return f"{noun} that is {words} {_anchor_phrase(scene, anchor, rng)}"


def _same_attribute_reference(scene: Scene, scene_object: SceneObject, rng: Random) -> str | None:
    """A reference such as "the cube that is the same size as the ball"; None if none fits."""
    attribute = rng.choice(tuple(SAME))
    head = rng.choice([head for head in _SAME_HEADS if attribute not in head])
    anchors = _same_attribute_anchors(scene, scene_object, attribute, head)
    if not anchors:
        return None
    noun = _noun_phrase(scene_object, head, rng)
    anchor = rng.choice(anchors)
    return f"{noun} that {SAME[attribute]} {_anchor_phrase(scene, anchor, rng)}"


def _same_attribute_anchors(
    scene: Scene, scene_object: SceneObject, attribute: str, head: Attributes
) -> list[SceneObject]:
    """Objects that share the attribute with this object, but with no other that the head fits."""
    rivals = _lookalikes(scene, scene_object, (attribute, *head))
    return [
        anchor
        for anchor in _lookalikes(scene, scene_object, (attribute,))
        if _is_unique(scene, anchor, ATTRIBUTES) and all(rival is anchor for rival in rivals)
    ]


def _lookalikes(
    scene: Scene, scene_object: SceneObject, attributes: Attributes
) -> list[SceneObject]:
    """The other objects of the scene that share all these attributes."""

    def look(one: SceneObject) -> list[str]:
        return [getattr(one, name) for name in attributes]

    others = (other for other in scene.objects if other is not scene_object)
    return [other for other in others if look(other) == look(scene_object)]


def _is_unique(scene: Scene, scene_object: SceneObject, attributes: Attributes) -> bool:
    return not _lookalikes(scene, scene_object, attributes)


def _distinguishing_relations(
    scene: Scene, scene_object: SceneObject, head: Attributes
) -> list[tuple[str, SceneObject]]:
    """All (relation, anchor) that are clearly true of this object and false of its lookalikes."""
    positions = _positions(scene)
    rivals = _lookalikes(scene, scene_object, head)
    found = []
    for anchor in scene.objects:
        if anchor is scene_object or not _is_unique(scene, anchor, ATTRIBUTES):
            continue
        origin = positions[id(anchor)]
        others = [positions[id(rival)] for rival in rivals if rival is not anchor]
        for relation in RELATIONS:
            own_margin = _margin(relation, positions[id(scene_object)], origin)
            other_margins = [_margin(relation, other, origin) for other in others]
            if _clearly_holds(own_margin) and all(map(_clearly_fails, other_margins)):
                found.append((relation, anchor))
    return found


def _positions(scene: Scene) -> dict[int, tuple[float, ...]]:
    """For each object, by id(): its footprint's center in pixels x and y, and on the plane.

    On the plane, the coordinates are the distances to the camera's right and towards the camera.
    """
    centers = np.array([(one.x, one.y, 0) for one in scene.objects], np.float32)
    pixels = project(centers, scene.view.camera)
    axes = camera_axes(scene.view.camera)
    toward = -axes[2, :2] / np.linalg.norm(axes[2, :2])
    plane = np.stack([centers[:, :2] @ axes[0, :2], centers[:, :2] @ toward], 1)
    rows = np.hstack([pixels, plane]).tolist()
    return {id(one): tuple(row) for one, row in zip(scene.objects, rows, strict=True)}


def _margin(
    relation: str, position: tuple[float, ...], anchor: tuple[float, ...]
) -> tuple[float, float]:
    """By how many pixels, and how far on the plane, a relation to the anchor holds."""
    axis = 0 if relation in ("left", "right") else 1
    sign = 1 if relation in ("right", "front") else -1
    pixels = sign * (position[axis] - anchor[axis])
    distance = sign * (position[axis + 2] - anchor[axis + 2])
    return pixels, distance


def _clearly_holds(margin: tuple[float, float]) -> bool:
    return margin[0] > _CLEAR_PIXELS and margin[1] > _CLEAR_DISTANCE


def _clearly_fails(margin: tuple[float, float]) -> bool:
    return margin[0] < -2 and margin[1] < -0.05
