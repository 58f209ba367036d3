"""What CLEVR-Change's objects can be, and the words that its sentences use for objects and changes.

`preprocess/scenes` draws with these values and words; `gt/caption_accuracy.py` checks captions by
them. The order of each tuple and dictionary is part of the random draws: do not sort them.
"""

SIZES = {"large": 0.7, "small": 0.35}  # half the height of an object, in Blender's units

COLORS = {  # RGB
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}

MATERIALS = ("rubber", "metal")

SHAPES = ("cube", "sphere", "cylinder")

# The attributes stand in the order in which sentences name them.
ATTRIBUTE_VALUES = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "material": MATERIALS,
    "shape": SHAPES,
}

ATTRIBUTES = tuple(ATTRIBUTE_VALUES)

SYNONYMS = {
    "large": ("large", "big"),
    "small": ("small", "tiny"),
    "rubber": ("rubber", "matte"),
    "metal": ("metal", "metallic", "shiny"),
    "cube": ("cube", "block"),
    "sphere": ("sphere", "ball"),
}

# Attribute → every word for one of its values.
WORDS = {
    attribute: tuple(word for value in values for word in SYNONYMS.get(value, (value,)))
    for attribute, values in ATTRIBUTE_VALUES.items()
}

# For each type of change, with the object in the first braces and its new value in the second.
_BECAME = ("{} turned {}", "{} changed to {}", "{} became {}")
CHANGE_PHRASES = {
    "color": _BECAME,
    "material": _BECAME,
    "add": ("{} has appeared", "{} has been added", "{} has been newly placed", "someone added {}"),
    "drop": (
        "{} is no longer there",
        "{} has disappeared",
        "{} is gone",
        "{} is missing",
        "someone removed {}",
    ),
    "move": (
        "{} changed its location",
        "{} moved",
        "{} was moved from its original location",
        "{} is in a different location",
        "{} has been moved",
    ),
}

CHANGE_TYPES = tuple(CHANGE_PHRASES)

NO_CHANGE_SENTENCES = (
    "no change was made",
    "there is no change",
    "the scene remains the same",
    "nothing has changed",
    "the two scenes seem identical",
    "nothing was modified",
    "there is no difference",
    "the scene is the same as before",
    "no change has occurred",
)
