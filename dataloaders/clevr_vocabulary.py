"""TODO."""

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


CHANGE_PHRASES = {
    "color": ("{} turned {}", "{} changed to {}", "{} became {}"),
    "material": ("{} turned {}", "{} changed to {}", "{} became {}"),
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


SYNONYMS = {
    "large": ("large", "big"),
    "small": ("small", "tiny"),
    "rubber": ("rubber", "matte"),
    "metal": ("metal", "metallic", "shiny"),
    "cube": ("cube", "block"),
    "sphere": ("sphere", "ball"),
}


ATTRIBUTES = ("size", "color", "material", "shape")  # in the order in which they are said


SIZES = {"large": 0.7, "small": 0.35}


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
