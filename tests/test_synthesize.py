"""preprocess/synthesize.py: drawn scenes in the layouts of CLEVR-Change and Spot-the-Diff, and their sentences."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest

from dataloaders.clevr_vocabulary import COLORS, NO_CHANGE_SENTENCES
from preprocess.scenes.drawing import render
from preprocess.scenes.geometry import Scene, SceneObject, View, outlines, project
from preprocess.scenes.sampling import CHANGE_TYPES, referent, sample_clevr_pair, sample_spot_pair
from preprocess.scenes.sentences import change_sentences
from preprocess.synthesize import main

LOOKS = ("size", "color", "material", "shape")
MEANING = {
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
SAID_OF = {
    "color": r"(?P<ref>.+?) (?:turned|changed to|became) (?P<new>\w+)",
    "material": r"(?P<ref>.+?) (?:turned|changed to|became) (?P<new>\w+)",
    "add": r"(?:someone added (?P<ref2>.+)|(?P<ref>.+?) (?:has appeared|has been added|has been newly placed))",
    "drop": r"(?:someone removed (?P<ref2>.+)|"
    r"(?P<ref>.+?) (?:is no longer there|has disappeared|is gone|is missing))",
    "move": r"(?P<ref>.+?) (?:changed its location|moved|was moved from its original location|"
    r"is in a different location|has been moved)",
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


# --- a reader of sentences, independent of the grammar that writes them ---


def fitting(phrase: str, things: list[SceneObject]) -> list[SceneObject]:
    """The things that a plain noun phrase such as "the big red ball" fits."""
    article, *words = phrase.split()
    assert article == "the"
    assert words[-1] in {"thing", "object", "cube", "block", "sphere", "ball", "cylinder"}, phrase
    found = things
    for word in (MEANING.get(word, word) for word in words):
        if word not in ("thing", "object"):
            (name,) = (name for name, values in VALUES.items() if word in values)
            found = [thing for thing in found if getattr(thing, name) == word]
    return found


def meant(reference: str, scene: Scene) -> list[SceneObject]:
    """Everything in the scene that a reference can mean, by the things' places in the picture."""
    things = list(scene.objects)
    head, _, clause = reference.partition(" that ")
    candidates = fitting(head, things)
    if not clause:
        return candidates
    relation, anchor_phrase = re.fullmatch(
        r"(.+?) (the (?!same|left|right|same).+)", clause
    ).groups()
    anchors = fitting(anchor_phrase, things)
    assert len(anchors) == 1, f"{anchor_phrase!r} is ambiguous"
    same = re.search(r"same (\w+)", relation)
    if same:
        name = same.group(1)
        return [
            t
            for t in candidates
            if t is not anchors[0] and getattr(t, name) == getattr(anchors[0], name)
        ]
    x, y = pixel(anchors[0], scene)
    tests = {
        "left": lambda place: place[0] < x,
        "right": lambda place: place[0] > x,
        "front": lambda place: place[1] > y,
        "behind": lambda place: place[1] < y,
    }
    (word,) = (word for word in tests if word in relation)
    return [t for t in candidates if t is not anchors[0] and tests[word](pixel(t, scene))]


def pixel(thing: SceneObject, scene: Scene) -> tuple[float, float]:
    """Where the camera sees the foot of a thing, by a pinhole camera written out for this test."""
    eye = np.array(scene.view.camera)
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    ray = np.array([thing.x, thing.y, 0]) - eye
    scale = 525 / (ray @ forward)
    return 240 + scale * (ray @ right), 160 - scale * (ray @ np.cross(right, forward))


def test_reader_knows_wrong_references_from_right_ones() -> None:
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
def test_one_attribute_of_one_thing_changes(index: int) -> None:
    pair = sample_clevr_pair(5, index)
    assert pair.distractor.objects == pair.before.objects
    assert len({pair.before.view, pair.after.view, pair.distractor.view}) == 3
    (change,) = pair.changes
    lost = [thing for thing in pair.before.objects if thing not in pair.after.objects]
    new = [thing for thing in pair.after.objects if thing not in pair.before.objects]
    assert lost == [thing for thing in (change.before,) if thing is not None]
    assert new == [thing for thing in (change.after,) if thing is not None]
    assert (len(lost), len(new)) == {"add": (0, 1), "drop": (1, 0)}.get(change.type, (1, 1))
    if lost and new:
        differing = {
            name
            for name in (*LOOKS, "x", "y", "turn")
            if getattr(lost[0], name) != getattr(new[0], name)
        }
        assert differing == ({"x", "y"} if change.type == "move" else {change.type})
    if change.type == "move":
        assert np.hypot(lost[0].x - new[0].x, lost[0].y - new[0].y) >= 1.2


def test_scenes_are_sized_spaced_and_balanced() -> None:
    pairs = [sample_clevr_pair(1, index) for index in range(50)]
    assert Counter(pair.changes[0].type for pair in pairs) == dict.fromkeys(CHANGE_TYPES, 10)
    assert {len(pair.before.objects) for pair in pairs} == set(range(3, 11))
    for scene in (scene for pair in pairs for scene in (pair.before, pair.after)):
        assert 3 <= len(scene.objects) <= 10
        for i, one in enumerate(scene.objects):
            assert max(abs(one.x), abs(one.y)) <= 3
            for other in scene.objects[:i]:
                radii = [{"large": 0.7, "small": 0.35}[thing.size] for thing in (one, other)]
                corners = [
                    radius * (np.sqrt(2) if thing.shape == "cube" else 1)
                    for radius, thing in zip(radii, (one, other), strict=True)
                ]
                assert np.hypot(one.x - other.x, one.y - other.y) > max(
                    sum(radii) + 0.25, sum(corners)
                )


def test_spot_pair_changes_one_to_three_things_before_a_fixed_camera() -> None:
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
def test_sentences_are_true_and_mean_only_the_changed_thing(index: int) -> None:
    pair = sample_spot_pair(9, index) if index % 3 == 0 else sample_clevr_pair(9, index)
    for change in pair.changes:
        scene, thing = referent(pair, change)
        assert scene is (pair.after if change.type == "add" else pair.before)
        sentences = change_sentences(change.type, scene, thing, change.value, 30, Random(index))
        assert len(set(sentences)) == len(sentences)
        for sentence in sentences:
            said = re.fullmatch(SAID_OF[change.type], sentence).groupdict()
            assert meant(said.get("ref2") or said["ref"], scene) == [thing], sentence
            if change.value:
                assert MEANING.get(said["new"], said["new"]) == change.value
            assert len(sentence.split()) <= 25


def test_an_ambiguous_thing_is_told_by_its_place() -> None:
    twins = [SceneObject("cube", "red", "metal", "small", x, -x, 0.0) for x in (-2.0, 2.0)]
    ball = SceneObject("sphere", "blue", "rubber", "large", 0.0, 0.0, 0.0)
    scene = Scene((*twins, ball), View())
    for sentence in change_sentences("drop", scene, twins[1], None, 20, Random(0)):
        said = re.fullmatch(SAID_OF["drop"], sentence).groupdict()
        assert "in front of" in sentence
        assert meant(said["ref"] or said["ref2"], scene) == [twins[1]]


def test_the_plain_form_is_the_most_frequent(clevr: Path) -> None:
    sentences = [s for of_one in read(clevr / "change_captions.json").values() for s in of_one]
    full = r"(someone \w+ )?the (large|big|small|tiny) \w+ \w+ (cube|block|sphere|ball|cylinder)( (?!that ).*|$)"
    assert sum(bool(re.fullmatch(full, sentence)) for sentence in sentences) > len(sentences) / 2


def test_every_kind_of_reference_is_said() -> None:
    said = set()
    for index in range(40):
        pair = sample_clevr_pair(3, index)
        change = pair.changes[0]
        said.update(
            change_sentences(change.type, *referent(pair, change), change.value, 20, Random(0))
        )
    together = "\n".join(said)
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


def test_pictures_show_the_palette() -> None:
    """In the middle of a ball, hue as in the palette, and all balls clearly apart."""
    for color, rgb in COLORS.items():
        ball = SceneObject("sphere", color, "rubber", "large", 0.0, 0.0, 0.0)
        x, y = (round(float(v)) for v in project(np.array([0, 0, 0.7], np.float32), View().camera))
        patch = (
            render(Scene((ball,), View()))[y - 10 : y + 10, x - 10 : x + 10].reshape(-1, 3).mean(0)
        )
        seen = cv2.cvtColor(np.uint8([[patch]]), cv2.COLOR_BGR2HSV)[0, 0].astype(int)
        hue, saturation, _ = cv2.cvtColor(np.uint8([[rgb[::-1]]]), cv2.COLOR_BGR2HSV)[0, 0].astype(
            int
        )
        if color == "gray":
            assert seen[1] < 25
        else:
            assert abs((seen[0] - hue + 90) % 180 - 90) <= 4, color
            assert seen[1] > 90


def test_a_cube_that_faces_the_camera_is_as_wide_as_the_other_shapes() -> None:
    """As in CLEVR-Change's pictures, whatever its generator's text says of cubes."""
    facing = np.arctan2(View().camera[1], View().camera[0])
    widths = {}
    for shape in ("cube", "sphere", "cylinder"):
        (outline,) = outlines(
            (SceneObject(shape, "red", "rubber", "large", 0.0, 0.0, facing),), View().camera
        )
        widths[shape] = np.ptp(outline[..., 0])
    assert widths["sphere"] == pytest.approx(widths["cylinder"], rel=0.06)
    assert widths["cube"] == pytest.approx(widths["cylinder"], rel=0.08)  # its front is nearer


@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_pictures_change_where_the_thing_changes(shape: str, material: str) -> None:
    other = SceneObject("cylinder", "blue", "rubber", "large", -2.0, 1.0, 0.0)
    thing = SceneObject(shape, "red", material, "large", 1.0, 0.5, 0.4)
    empty, red = (
        render(Scene(things, View())).astype(int) for things in ((other,), (other, thing))
    )
    changed = np.abs(red - empty).max(-1)
    inside = np.zeros(changed.shape, np.uint8)
    (outline,) = outlines((thing,), View().camera)
    cv2.fillConvexPoly(inside, np.int32(outline), 1)
    assert (
        changed[inside == 1].mean() > 25 * changed[inside == 0].mean() > 0
    )  # > 0: its shadow and mirror image


def test_metal_differs_from_rubber_and_a_near_thing_hides_a_far_one() -> None:
    def ball(material: str) -> SceneObject:
        return SceneObject("sphere", "green", material, "large", 0.0, 0.0, 0.0)

    rubber, metal = (render(Scene((ball(material),), View())) for material in ("rubber", "metal"))
    assert np.abs(rubber.astype(int) - metal).max() > 60
    near = SceneObject("cube", "red", "rubber", "large", 1.2, -1.1, 0.0)
    pictures = [
        render(Scene(things, View())) for things in ((ball("rubber"), near), (near, ball("rubber")))
    ]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    x, y = (round(float(v)) for v in project(np.array([1.2, -1.1, 0.6], np.float32), View().camera))
    blue, green, red = pictures[0][y, x].astype(int)
    assert red > 1.5 * max(green, blue)


# --- files ---


def test_clevr_layout(clevr: Path) -> None:
    names = [f"{index:06d}.png" for index in range(20)]
    for folder, kind in (
        ("images", "default"),
        ("sc_images", "semantic"),
        ("nsc_images", "nonsemantic"),
    ):
        assert sorted(path.name for path in (clevr / folder).iterdir()) == [
            f"CLEVR_{kind}_{name}" for name in names
        ]
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
    assert {kind: len(names) for kind, names in types.items()} == dict.fromkeys(CHANGE_TYPES, 4)
    assert {name: kind for kind, names in types.items() for name in names} == {
        n: o["type"] for n, o in objects.items()
    }
    captions = read(clevr / "change_captions.json")
    for name, said in objects.items():
        extra = {"color": {"new_color"}, "material": {"new_material"}}.get(said["type"], set())
        assert said.keys() == {"type", *LOOKS} | extra
        (change,) = sample_clevr_pair(0, int(name[:6])).changes
        thing = change.before or change.after
        assert {key: said[key] for key in LOOKS} == {key: getattr(thing, key) for key in LOOKS}
        assert all(
            re.fullmatch(SAID_OF[said["type"]], s) for s in captions[f"CLEVR_default_{name}"]
        )


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
    assert cv2.imread(
        str(spot / "images_test" / f"{together[0]}_2.png"), cv2.IMREAD_UNCHANGED
    ).shape == (320, 480, 3)
    for entry in (entry for of_split in entries.values() for entry in of_split):
        assert entry.keys() == {"img_id", "sentences"}
        assert 1 <= len(entry["sentences"]) <= 3


def test_spot_lists_can_be_reformatted(spot: Path, tmp_path: Path) -> None:
    from preprocess.reformat_dataset import main as reformat

    assert reformat(["--data_path", str(spot), "--output", str(tmp_path)]) == 0
    assert len(read(tmp_path / "reformat_train.json")) == 30


@pytest.mark.parametrize("datatype", ["clevr", "spot"])
def test_same_seed_same_bytes_whatever_the_workers(datatype: str, tmp_path: Path) -> None:
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
    ("options", "said"),
    [
        (sizes(-1, 1, 1), "--train is -1"),
        (sizes(0, 0, 0), "ask for 0 scenes"),
        (["--captions_per_image", "0"], "--captions_per_image is 0"),
        (
            ["--datatype", "spot", "--captions_per_image", "3"],
            "--captions_per_image is for --datatype clevr",
        ),
        (["--workers", "0"], "--workers is 0"),
        (["--datatype", "coco"], "--datatype"),
        (["--train", "many"], "--train"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "new"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_impossible_output_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for output, more, said in (
        ("mine", [], "not empty"),
        ("mine", ["--overwrite"], "thesis.txt"),
        ("file", [], "is a file"),
        ("file/below", [], "file"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--output", str(tmp_path / output), *sizes(1, 0, 0), *more])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert said in error
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
def test_a_failure_on_the_way_leaves_nothing(
    failure: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> int:
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "new"), *sizes(2, 0, 0), "--workers", "1"])
    assert stop.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_without_jitter_only_the_change_differs(tmp_path):
    folder = draw(tmp_path / "still", *sizes(4, 0, 0), "--jitter", "0")
    for index in range(4):
        before, distractor, after = (
            (folder / f"{kind}images" / f"CLEVR_{name}_{index:06d}.png").read_bytes()
            for kind, name in (("", "default"), ("nsc_", "nonsemantic"), ("sc_", "semantic"))
        )
        assert before == distractor
        assert before != after
