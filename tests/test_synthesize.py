"""Drawn datasets: scenes, sentences, pictures, files, and the command line that draws them."""

import json
import re
import signal
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest

from dataloaders.clevr_vocabulary import CHANGE_TYPES, COLORS, NO_CHANGE_SENTENCES
from preprocess.scenes.drawing import render
from preprocess.scenes.geometry import Scene, SceneObject, View, outlines, project
from preprocess.scenes.sampling import referent, sample_clevr_pair, sample_spot_pair
from preprocess.scenes.sentences import change_sentences, no_change_sentences
from preprocess.synthesize import main
from tests.runs import finish, start, wait_for

ATTRIBUTES = ("size", "color", "material", "shape")
VALUE_OF_WORD = {
    "big": "large",
    "tiny": "small",
    "matte": "rubber",
    "metallic": "metal",
    "shiny": "metal",
    "block": "cube",
    "ball": "sphere",
}
VALUES = {
    "size": {"large", "small"},
    "color": {"gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"},
    "material": {"rubber", "metal"},
    "shape": {"cube", "sphere", "cylinder"},
}
BECAME = r"(?P<ref>.+?) (?:turned|changed to|became) (?P<new>\w+)"
SENTENCE_PATTERNS = {
    "color": BECAME,
    "material": BECAME,
    "add": (
        r"(?:someone added (?P<ref2>.+)|"
        r"(?P<ref>.+?) (?:has appeared|has been added|has been newly placed))"
    ),
    "drop": (
        r"(?:someone removed (?P<ref2>.+)|"
        r"(?P<ref>.+?) (?:is no longer there|has disappeared|is gone|is missing))"
    ),
    "move": (
        r"(?P<ref>.+?) (?:changed its location|moved|was moved from its original location|"
        r"is in a different location|has been moved)"
    ),
}


def draw(folder: Path, *options: str) -> Path:
    assert main(["--output", str(folder), "--workers", "1", *options]) == 0
    return folder


def sizes(train: int, val: int, test: int) -> list[str]:
    return ["--train", str(train), "--val", str(val), "--test", str(test)]


def read(path: Path) -> object:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pictures(files: dict[str, bytes]) -> set[bytes]:
    return {data for name, data in files.items() if name.endswith(".png")}


@pytest.fixture(scope="module")
def clevr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("clevr") / "drawn", *sizes(12, 5, 3))


@pytest.fixture(scope="module")
def spot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("spot") / "drawn", "--datatype", "spot", *sizes(30, 5, 5))


# --- a parser of sentences, independent of the grammar that writes them ---


def referred(match: re.Match) -> str:
    """The reference in a sentence that SENTENCE_PATTERNS matched."""
    parts = match.groupdict()
    return parts.get("ref2") or parts["ref"]


def matching(phrase: str, objects: list[SceneObject]) -> list[SceneObject]:
    """The objects that a plain noun phrase such as "the big red ball" fits."""
    article, *words = phrase.split()
    assert article == "the"
    assert words[-1] in {"thing", "object", "cube", "block", "sphere", "ball", "cylinder"}, phrase
    found = objects
    for word in (VALUE_OF_WORD.get(word, word) for word in words):
        if word not in ("thing", "object"):
            (name,) = (name for name, values in VALUES.items() if word in values)
            found = [one for one in found if getattr(one, name) == word]
    return found


def meant(reference: str, scene: Scene) -> list[SceneObject]:
    """Every object of the scene that a reference fits, by positions in the picture."""
    objects = list(scene.objects)
    head, _, clause = reference.partition(" that ")
    candidates = matching(head, objects)
    if not clause:
        return candidates
    parts = re.fullmatch(r"(.+?) (the (?!same|left|right).+)", clause)
    relation, anchor_phrase = parts.groups()
    anchors = matching(anchor_phrase, objects)
    assert len(anchors) == 1, f"{anchor_phrase!r} is ambiguous"
    others = [one for one in candidates if one is not anchors[0]]
    same = re.search(r"same (\w+)", relation)
    if same:
        name = same.group(1)
        return [one for one in others if getattr(one, name) == getattr(anchors[0], name)]
    x, y = pixel(anchors[0], scene)
    tests = {
        "left": lambda position: position[0] < x,
        "right": lambda position: position[0] > x,
        "front": lambda position: position[1] > y,
        "behind": lambda position: position[1] < y,
    }
    (word,) = (word for word in tests if word in relation)
    return [one for one in others if tests[word](pixel(one, scene))]


def pixel(scene_object: SceneObject, scene: Scene) -> tuple[float, float]:
    """Where a pinhole camera, written out for this test, sees the center of a footprint."""
    eye = np.array(scene.view.camera)
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    ray = np.array([scene_object.x, scene_object.y, 0]) - eye
    scale = 525 / (ray @ forward)
    return 240 + scale * (ray @ right), 160 - scale * (ray @ np.cross(right, forward))


def test_the_parser_knows_wrong_references_from_right_ones() -> None:
    ball = SceneObject("sphere", "red", "metal", "large", 2.0, -2.0, 0.0)  # nearest to the camera
    cube = SceneObject("cube", "blue", "metal", "small", -2.0, 2.0, 0.0)
    tube = SceneObject("cylinder", "blue", "rubber", "small", -1.0, -2.0, 0.0)
    scene = Scene((ball, cube, tube), View())
    assert meant("the tiny blue block", scene) == [cube]
    assert meant("the blue thing", scene) == [cube, tube]
    assert meant("the blue thing that is to the left of the big ball", scene) == [tube]
    assert meant("the small object that is behind the large shiny ball", scene) == [cube, tube]
    assert meant("the blue thing that is made of the same material as the ball", scene) == [cube]
    assert meant("the cube that is the same size as the matte cylinder", scene) == [cube]
    assert meant("the red cube", scene) == []


# --- scenes ---


@pytest.mark.parametrize("index", range(40))
def test_one_attribute_of_one_object_changes(index: int) -> None:
    pair = sample_clevr_pair(5, index)
    assert pair.distractor.objects == pair.before.objects
    assert len({pair.before.view, pair.after.view, pair.distractor.view}) == 3
    (change,) = pair.changes
    lost = [one for one in pair.before.objects if one not in pair.after.objects]
    new = [one for one in pair.after.objects if one not in pair.before.objects]
    assert lost == [one for one in (change.before,) if one is not None]
    assert new == [one for one in (change.after,) if one is not None]
    assert (len(lost), len(new)) == {"add": (0, 1), "drop": (1, 0)}.get(change.type, (1, 1))
    if lost and new:
        names = (*ATTRIBUTES, "x", "y", "angle")
        differing = {name for name in names if getattr(lost[0], name) != getattr(new[0], name)}
        assert differing == ({"x", "y"} if change.type == "move" else {change.type})
    if change.type == "move":
        assert np.hypot(lost[0].x - new[0].x, lost[0].y - new[0].y) >= 1.2


def test_scenes_are_sized_spaced_and_balanced() -> None:
    pairs = [sample_clevr_pair(1, index) for index in range(50)]
    assert Counter(pair.changes[0].type for pair in pairs) == dict.fromkeys(CHANGE_TYPES, 10)
    assert {len(pair.before.objects) for pair in pairs} == set(range(3, 11))
    for scene in (scene for pair in pairs for scene in (pair.before, pair.after)):
        assert 3 <= len(scene.objects) <= 10
        for one in scene.objects:
            assert max(abs(one.x), abs(one.y)) <= 3
        for one, other in combinations(scene.objects, 2):
            assert np.hypot(one.x - other.x, one.y - other.y) > least_distance(one, other)


def least_distance(one: SceneObject, other: SceneObject) -> float:
    radii = [{"large": 0.7, "small": 0.35}[each.size] for each in (one, other)]
    corners = [
        radius * (np.sqrt(2) if each.shape == "cube" else 1)
        for radius, each in zip(radii, (one, other), strict=True)
    ]
    return max(sum(radii) + 0.25, sum(corners))


def test_spot_pair_changes_one_to_three_objects_before_a_fixed_camera() -> None:
    pairs = [sample_spot_pair(2, index) for index in range(25)]
    assert {len(pair.changes) for pair in pairs} == {1, 2, 3}
    for pair in pairs:
        assert pair.before.view == pair.after.view
        lost = set(pair.before.objects) - set(pair.after.objects)
        new = set(pair.after.objects) - set(pair.before.objects)
        assert lost == {change.before for change in pair.changes} - {None}
        assert new == {change.after for change in pair.changes} - {None}


# --- sentences ---


@pytest.mark.parametrize("index", range(60))
def test_sentences_are_true_and_refer_to_the_changed_object_alone(index: int) -> None:
    pair = sample_spot_pair(9, index) if index % 3 == 0 else sample_clevr_pair(9, index)
    for change in pair.changes:
        scene, changed = referent(pair, change)
        assert scene is (pair.after if change.type == "add" else pair.before)
        sentences = change_sentences(change.type, scene, changed, change.value, 30, Random(index))
        assert len(set(sentences)) == len(sentences)
        for sentence in sentences:
            match = re.fullmatch(SENTENCE_PATTERNS[change.type], sentence)
            assert meant(referred(match), scene) == [changed], sentence
            if change.value:
                assert VALUE_OF_WORD.get(match["new"], match["new"]) == change.value
            assert len(sentence.split()) <= 25


def test_an_object_with_a_twin_is_described_by_its_position() -> None:
    twins = [SceneObject("cube", "red", "metal", "small", x, -x, 0.0) for x in (-2.0, 2.0)]
    ball = SceneObject("sphere", "blue", "rubber", "large", 0.0, 0.0, 0.0)
    scene = Scene((*twins, ball), View())
    for sentence in change_sentences("drop", scene, twins[1], None, 20, Random(0)):
        match = re.fullmatch(SENTENCE_PATTERNS["drop"], sentence)
        assert "in front of" in sentence
        assert meant(referred(match), scene) == [twins[1]]


def test_a_seed_draws_the_same_sentences_as_ever() -> None:
    """Datasets that were drawn before must come out the same: the order of draws may not change."""
    ball = SceneObject("sphere", "red", "metal", "large", 2.0, -2.0, 0.0)
    cube = SceneObject("cube", "blue", "metal", "small", -2.0, 2.0, 0.0)
    tube = SceneObject("cylinder", "blue", "rubber", "small", -1.0, -2.0, 0.0)
    rng = Random(0)
    assert change_sentences("color", Scene((ball, cube, tube), View()), cube, "green", 6, rng) == [
        "the tiny blue metallic block changed to green",
        "the tiny blue metal block changed to green",
        "the small blue metallic cube became green",
        "the small blue metallic block changed to green",
        "the tiny blue shiny block turned green",
        "the cube that is behind the large red metal sphere changed to green",
    ]
    assert no_change_sentences(2, rng) == [
        "nothing was modified",
        "the scene is the same as before",
    ]


def test_the_plain_form_is_the_most_frequent(clevr: Path) -> None:
    sentences = [s for of_one in read(clevr / "change_captions.json").values() for s in of_one]
    full = (
        r"(someone \w+ )?the (large|big|small|tiny) \w+ \w+ (cube|block|sphere|ball|cylinder)"
        r"( (?!that ).*|$)"
    )
    assert sum(bool(re.fullmatch(full, sentence)) for sentence in sentences) > len(sentences) / 2


def test_every_kind_of_reference_occurs() -> None:
    found = set()
    for index in range(40):
        pair = sample_clevr_pair(3, index)
        change = pair.changes[0]
        scene, changed = referent(pair, change)
        found.update(change_sentences(change.type, scene, changed, change.value, 20, Random(0)))
    together = "\n".join(found)
    for words in (
        "left of",
        "on the left side of",
        "on the right side of",
        "in front of",
        "behind",
        "has the same color as",
        "is the same size as",
        "is made of the same material as",
        "block",
        "cube",
        "ball",
        "sphere",
        "matte",
        "rubber",
        "shiny",
        "metallic",
        "tiny",
        "big",
        "thing",
        "object",
        "has appeared",
        "someone added",
        "is missing",
        "someone removed",
        "moved",
        "became",
        "changed to",
        "turned",
    ):
        assert words in together, words


def test_nine_sentences_for_no_change(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "d", *sizes(2, 0, 0), "--captions_per_image", "12")
    for sentences in read(drawn / "no_change_captions.json").values():
        assert sorted(sentences) == sorted(NO_CHANGE_SENTENCES)
    assert len(set(NO_CHANGE_SENTENCES)) == 9


def test_no_change_sentences_are_those_of_the_real_scenes() -> None:
    real = Path(__file__).parents[2] / "shared/data/clevr-change/real48/no_change_captions.json"
    if not real.is_file():
        pytest.skip(f"no real scenes at {real}")
    assert {s for of_one in read(real).values() for s in of_one} <= set(NO_CHANGE_SENTENCES)


# --- pictures ---


def hsv(bgr) -> np.ndarray:
    return cv2.cvtColor(np.uint8([[bgr]]), cv2.COLOR_BGR2HSV)[0, 0].astype(int)


def seen_at(point: tuple[float, float, float]) -> tuple[int, int]:
    x, y = project(np.array(point, np.float32), View().camera)
    return round(float(x)), round(float(y))


@pytest.mark.parametrize("color", COLORS)
def test_pictures_show_the_palette(color: str) -> None:
    """In the middle of a ball the hue is the palette's."""
    ball = SceneObject("sphere", color, "rubber", "large", 0.0, 0.0, 0.0)
    x, y = seen_at((0, 0, 0.7))
    picture = render(Scene((ball,), View()))
    seen = hsv(picture[y - 10 : y + 10, x - 10 : x + 10].reshape(-1, 3).mean(0))
    expected = hsv(COLORS[color][::-1])
    if color == "gray":
        assert seen[1] < 25
    else:
        assert abs((seen[0] - expected[0] + 90) % 180 - 90) <= 4
        assert seen[1] > 90


def test_a_cube_that_faces_the_camera_is_as_wide_as_the_other_shapes() -> None:
    """As in CLEVR-Change's pictures, whatever its generator's text says about cubes."""
    facing = np.arctan2(View().camera[1], View().camera[0])
    widths = {}
    for shape in ("cube", "sphere", "cylinder"):
        shown = SceneObject(shape, "red", "rubber", "large", 0.0, 0.0, facing)
        (outline,) = outlines((shown,), View().camera)
        widths[shape] = np.ptp(outline[..., 0])
    assert widths["sphere"] == pytest.approx(widths["cylinder"], rel=0.06)
    assert widths["cube"] == pytest.approx(widths["cylinder"], rel=0.08)  # its front is nearer


@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_pictures_change_where_the_object_changes(shape: str, material: str) -> None:
    other = SceneObject("cylinder", "blue", "rubber", "large", -2.0, 1.0, 0.0)
    added = SceneObject(shape, "red", material, "large", 1.0, 0.5, 0.4)
    without = render(Scene((other,), View())).astype(int)
    with_it = render(Scene((other, added), View())).astype(int)
    changed = np.abs(with_it - without).max(-1)
    inside = np.zeros(changed.shape, np.uint8)
    (outline,) = outlines((added,), View().camera)
    cv2.fillConvexPoly(inside, np.int32(outline), 1)
    outside_mean = changed[inside == 0].mean()
    assert outside_mean > 0, "its shadow and its mirror image change, too"
    assert changed[inside == 1].mean() > 25 * outside_mean


def green_ball(material: str) -> SceneObject:
    return SceneObject("sphere", "green", material, "large", 0.0, 0.0, 0.0)


def test_metal_differs_from_rubber() -> None:
    rubber = render(Scene((green_ball("rubber"),), View())).astype(int)
    metal = render(Scene((green_ball("metal"),), View())).astype(int)
    assert np.abs(rubber - metal).max() > 60


def test_a_near_object_hides_a_far_one() -> None:
    far = green_ball("rubber")
    near = SceneObject("cube", "red", "rubber", "large", 1.2, -1.1, 0.0)
    picture = render(Scene((far, near), View()))
    np.testing.assert_array_equal(render(Scene((near, far), View())), picture)
    x, y = seen_at((1.2, -1.1, 0.6))
    blue, green, red = picture[y, x].astype(int)
    assert red > 1.5 * max(green, blue)


# --- files ---


def test_clevr_layout(clevr: Path) -> None:
    names = [f"{index:06d}.png" for index in range(20)]
    folders = {"images": "default", "sc_images": "semantic", "nsc_images": "nonsemantic"}
    for folder, infix in folders.items():
        expected = [f"CLEVR_{infix}_{name}" for name in names]
        assert sorted(path.name for path in (clevr / folder).iterdir()) == expected
        for path in (clevr / folder).iterdir():
            picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert picture.shape == (320, 480, 4)
            assert (picture[..., 3] == 255).all()
    splits = read(clevr / "splits.json")
    assert {split: len(indices) for split, indices in splits.items()} == {
        "train": 12,
        "val": 5,
        "test": 3,
    }
    assert sorted(index for indices in splits.values() for index in indices) == list(range(20))
    for file in ("change_captions", "no_change_captions"):
        captions = read(clevr / f"{file}.json")
        assert list(captions) == [f"CLEVR_default_{name}" for name in names]
        assert all(len(set(sentences)) == len(sentences) == 6 for sentences in captions.values())


def test_clevr_types_and_changed_objects(clevr: Path) -> None:
    types, objects = read(clevr / "type_mapping.json"), read(clevr / "changed_object.json")
    counts = {change_type: len(names) for change_type, names in types.items()}
    assert counts == dict.fromkeys(CHANGE_TYPES, 4)
    for change_type, names in types.items():
        assert {objects[name]["type"] for name in names} == {change_type}
    captions = read(clevr / "change_captions.json")
    for name, row in objects.items():
        extra = {"color": {"new_color"}, "material": {"new_material"}}.get(row["type"], set())
        assert row.keys() == {"type", *ATTRIBUTES} | extra
        (change,) = sample_clevr_pair(0, int(name[:6])).changes
        changed = change.before or change.after
        assert all(row[key] == getattr(changed, key) for key in ATTRIBUTES)
        for sentence in captions[f"CLEVR_default_{name}"]:
            assert re.fullmatch(SENTENCE_PATTERNS[row["type"]], sentence)


def test_spot_layout(spot: Path) -> None:
    entries = {split: read(spot / f"{split}.json") for split in ("train", "val", "test")}
    ids = {split: [entry["img_id"] for entry in of_split] for split, of_split in entries.items()}
    assert {split: len(set(of_split)) for split, of_split in ids.items()} == {
        "train": 30,
        "val": 5,
        "test": 5,
    }
    assert 30 < len(ids["train"]) < 40  # some pairs have a second annotator
    together = [image_id for split in ids.values() for image_id in set(split)]
    assert len(set(together)) == 40
    assert all(image_id.isdigit() for image_id in together)
    assert ids["train"] != sorted(ids["train"], key=int)
    files = {f"{image_id}{suffix}.png" for image_id in together for suffix in ("", "_2")}
    assert {path.name for path in (spot / "images_test").iterdir()} == files
    after = spot / "images_test" / f"{together[0]}_2.png"
    assert cv2.imread(str(after), cv2.IMREAD_UNCHANGED).shape == (320, 480, 3)
    for entry in (entry for of_split in entries.values() for entry in of_split):
        assert entry.keys() == {"img_id", "sentences"}
        assert 1 <= len(entry["sentences"]) <= 3


def test_spot_lists_can_be_reformatted(spot: Path, tmp_path: Path) -> None:
    from preprocess.reformat_dataset import main as reformat

    assert reformat(["--data_path", str(spot), "--output", str(tmp_path)]) == 0
    assert len(read(tmp_path / "reformat_train.json")) == 30


@pytest.mark.parametrize("datatype", ["clevr", "spot"])
def test_a_seed_gives_the_same_bytes_for_any_number_of_workers(
    datatype: str, tmp_path: Path
) -> None:
    options = ["--datatype", datatype, *sizes(3, 1, 1)]
    one = contents(draw(tmp_path / "one", *options))
    assert one == contents(draw(tmp_path / "again", *options))
    assert one == contents(draw(tmp_path / "two", *options, "--workers", "2"))
    other = contents(draw(tmp_path / "other", *options, "--seed", "1"))
    assert not pictures(one) & pictures(other)


def test_a_scene_does_not_depend_on_the_sizes_of_the_splits(clevr: Path, tmp_path: Path) -> None:
    few = draw(tmp_path / "few", *sizes(0, 3, 0))
    assert read(few / "splits.json") == {"train": [], "val": [0, 1, 2], "test": []}
    for name, data in contents(few).items():
        if name.endswith(".png"):
            assert data == (clevr / name).read_bytes()
    many = read(clevr / "change_captions.json")
    assert all(
        many[name] == sentences for name, sentences in read(few / "change_captions.json").items()
    )


# --- command line ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (sizes(-1, 1, 1), "--train: -1 is out of range"),
        (sizes(0, 0, 0), "ask for 0 scenes"),
        (["--captions_per_image", "0"], "--captions_per_image: 0 is out of range"),
        (
            ["--datatype", "spot", "--captions_per_image", "3"],
            "--captions_per_image is for --datatype clevr",
        ),
        (["--jitter", "2"], "--jitter: 2 is out of range"),
        (["--datatype", "spot", "--jitter", "0"], "--jitter is for --datatype clevr"),
        (["--workers", "0"], "--workers: 0 is out of range"),
        (["--datatype", "coco"], "--datatype"),
        (["--train", "many"], "--train"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "new"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for output, more, expected in (
        ("mine", [], "not empty"),
        ("mine", ["--overwrite"], "thesis.txt"),
        ("file", [], "is a file"),
        ("file/below", [], "file"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--output", str(tmp_path / output), *sizes(1, 0, 0), *more])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file",
        "mine",
        "mine/thesis.txt",
    ]


def test_overwrite_replaces_a_drawn_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "d", *sizes(3, 0, 0))
    draw(tmp_path / "d", "--datatype", "spot", *sizes(2, 0, 0), "--overwrite")
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "images_test",
        "train.json",
        "val.json",
        "test.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert re.search(
        r"2 scenes drawn in .*d in [\d.]+ s \(\d+ scenes/s, 1 workers\)\n$", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("failure", "code"), [(OSError("No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure_while_drawing_leaves_nothing(
    failure: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> int:
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "new"), *sizes(2, 0, 0), "--workers", "1"])
    assert stop.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_that_cannot_be_replaced_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "d", *sizes(1, 0, 0))
    before = sorted(tmp_path.rglob("*"))
    rename = Path.rename

    def fail_at_once(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError("Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_once)
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "d"), *sizes(2, 0, 0), "--workers", "1", "--overwrite"])
    assert sorted(tmp_path.rglob("*")) == before


def test_without_jitter_only_the_change_differs(tmp_path):
    folder = draw(tmp_path / "still", *sizes(4, 0, 0), "--jitter", "0")
    for index in range(4):
        before, distractor, after = (
            (folder / f"{kind}images" / f"CLEVR_{name}_{index:06d}.png").read_bytes()
            for kind, name in (("", "default"), ("nsc_", "nonsemantic"), ("sc_", "semantic"))
        )
        assert before == distractor
        assert before != after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_drawing_that_is_ended_leaves_nothing(number, tmp_path):
    program = ["preprocess/synthesize.py", "--output", str(tmp_path / "data"), "--train", "3000"]
    drawing = start([*program, "--workers", "1"])
    wait_for(lambda: list(tmp_path.glob("data.partial-*/images/*.png")))
    drawing.send_signal(number)
    code, errors = finish(drawing)
    assert code == 75, errors
    assert errors.splitlines()[-1].endswith("synthesize.py: stopped as asked")
    assert list(tmp_path.iterdir()) == []
