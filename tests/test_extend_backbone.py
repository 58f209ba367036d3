"""A backbone is one class and one entry: a small convolutional net goes through everything."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import CLIP4IDCinference
import main_task_retrieval
from modules.clip4idc import CLIP4IDC
from modules.metrics.metric import ScoringProtocol
from modules.model.backbone import Features, PairBackbone
from modules.optimization import parameter_groups
from modules.predictor import Predictor
from modules.registries import BACKBONES, PROTOCOLS
from modules.tokenizer import EOT, SOT, VOCAB_SIZE
from modules.training.freezing import freeze, freeze_unused
from modules.weights.sources import load_weights
from modules.weights.tensor_files import read_weights
from preprocess import convert_weights, export_model
from tests.conftest import lower_case
from tests.runs import arguments, run_refused

WIDTH = 32


class ConvNet(PairBackbone):
    """Four patches of a 32×32 image, one layer over them, and sentences as bags of words."""

    key_prefix = "net"
    image_resolution = 32
    num_tokens = 4
    embed_dim = WIDTH
    vocab_size = VOCAB_SIZE
    context_length = 30
    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.25, 0.25, 0.25)
    sot = SOT
    eot = EOT
    max_log_scale = math.log(20)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 16, stride=16)
        self.side = nn.Parameter(torch.randn(2, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.words = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.places = nn.Parameter(torch.randn(self.context_length, WIDTH) / 10)
        self.sentence = nn.Linear(WIDTH, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(self.max_log_scale))

    @classmethod
    def from_weights(cls, weights, intra_layers, linear_patch) -> "ConvNet | None":
        return cls() if "patches.weight" in weights else None

    def encode_pairs(self, images: Tensor) -> Features:
        patches = self.patches(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        sides = patches.unflatten(0, images.shape[:2]) + self.side[:, None]
        tokens = sides.flatten(1, 2)
        tokens = tokens + self.layer(tokens).relu()
        return Features(tokens, tokens.mean(dim=1))

    def encode_against_first(self, images: Tensor) -> Features:
        others = range(1, images.shape[1])
        return self.encode_pairs(torch.cat([images[:, [0, other]] for other in others]))

    def encode_text(self, ids: Tensor) -> Features:
        end = (ids == EOT).int().argmax(dim=1)
        places = torch.arange(ids.shape[1], device=ids.device)
        mask = (places <= end[:, None]).long()
        tokens = self.sentence(self.words(ids) + self.places[: ids.shape[1]])
        total = (tokens * mask[..., None]).sum(dim=1)
        return Features(tokens, total / mask.sum(dim=1, keepdim=True), mask)

    def caption_embeddings(self) -> tuple[nn.Embedding, nn.Parameter]:
        return self.words, self.places

    def vision_tower(self) -> nn.Module:
        return self.patches

    def part_of(self, name: str):
        if name == "side":
            return "pair"
        if name.startswith("layer."):
            return 0
        return "head" if name.startswith(("sentence.", "logit_scale")) else "stem"

    def unused_prefixes(self, task: str) -> tuple[str, ...]:
        return ("sentence.",) if task == "caption" else ()


def net_weights() -> dict[str, Tensor]:
    """Weights from before the pairs: without `side`."""
    torch.manual_seed(0)
    state = ConvNet().state_dict()
    return {f"net.{name}": value for name, value in state.items() if name != "side"}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """The net is a backbone here, and captions are scored by CIDEr alone, without Java."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKBONES, "targets", dict(BACKBONES.targets))
        BACKBONES.register("convnet", ConvNet)
        patch.setattr(PROTOCOLS, "targets", {"coco": ScoringProtocol(lower_case, ("cider",))})
        yield


@pytest.fixture(scope="module")
def runs(spot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both trainings: adaptation in `adapted`, one epoch and a resumed one; then `captioner`."""
    root = tmp_path_factory.mktemp("runs")
    torch.save(net_weights(), root / "net.bin")
    start = ["--do_train", "--epochs", "1", "--init_model", str(root / "net.bin")]
    options = arguments(spot, root / "adapted", root / "none.json", "retrieval", *start)
    assert main_task_retrieval.main(options) == 0
    more = ["--epochs", "2", "--resume", "auto", "--resume_force"]
    assert main_task_retrieval.main([*options, *more]) == 0
    start = ["--do_train", "--epochs", "1", "--init_model", str(root / "adapted")]
    options = arguments(spot, root / "captioner", root / "none.json", "caption", *start)
    assert CLIP4IDCinference.main(options) == 0
    return root


def test_adaptation_trains_and_resumes(runs):
    first = read_weights(runs / "adapted" / "pytorch_model.bin.0")
    second = read_weights(runs / "adapted" / "pytorch_model.bin.1")
    assert first.keys() == {f"net.{name}" for name in ConvNet().state_dict()}
    assert not torch.equal(first["net.side"], second["net.side"])
    assert second["net.logit_scale"].item() <= ConvNet.max_log_scale
    log = (runs / "adapted" / "log.txt").read_text()
    assert "not in the weights, initialized at random: net.side" in log
    info = json.loads((runs / "adapted" / "model.json").read_text())
    assert info.keys() == {"max_words", "started_from", "trained_with"}


def test_evaluation_of_retrieval_repeats_the_scores_of_the_training(runs, spot):
    start = ["--do_eval", "--init_model", str(runs / "adapted")]
    options = arguments(spot, runs / "again", runs / "none.json", "retrieval", *start)
    assert main_task_retrieval.main(options) == 0
    trained = json.loads((runs / "adapted" / "metrics.json").read_text())
    assert json.loads((runs / "again" / "metrics.json").read_text()) == trained


def test_finetuning_starts_from_the_adapted_weights(runs):
    adapted = read_weights(runs / "adapted" / "pytorch_model.bin.best")
    captioner = read_weights(runs / "captioner" / "pytorch_model.bin.best")
    assert torch.equal(captioner["net.sentence.weight"], adapted["net.sentence.weight"])
    assert not torch.equal(captioner["net.layer.weight"], adapted["net.layer.weight"])
    words_of_captioner = captioner["decoder.embeddings.word_embeddings.weight"]
    assert torch.equal(words_of_captioner, captioner["net.words.weight"])
    info = json.loads((runs / "captioner" / "model.json").read_text())
    assert info["decoder_config"]["hidden_size"] == WIDTH


def test_evaluation_of_captions_repeats_the_captions_and_reports_without_maps(runs, spot):
    start = ["--do_eval", "--init_model", str(runs / "captioner")]
    options = arguments(spot, runs / "scored", runs / "none.json", "caption", *start)
    assert CLIP4IDCinference.main(options) == 0
    captions = (runs / "scored" / "hyp_ep_eval.json").read_text()
    assert captions == (runs / "captioner" / "hyp_ep_eval.json").read_text()
    page = (runs / "scored" / "report.html").read_text()
    assert "this model has no attention maps" in page
    assert "where the model looked" not in page


def test_prediction_from_the_command_line_draws_the_pair_alone(runs, spot, capsys):
    before = spot / "images_test" / "0.png"
    after = spot / "images_test" / "0_2.png"
    pictures = runs / "pictures"
    options = ["--do_predict", "--before", str(before), "--after", str(after)]
    options += ["--init_model", str(runs / "captioner"), "--save_attention", str(pictures)]
    assert CLIP4IDCinference.main(options) == 0
    assert capsys.readouterr().out.count("\n") == 1
    (picture,) = pictures.glob("*.png")
    assert Image.open(picture).height < 300, "one row"


def test_python_gets_captions_and_empty_maps(runs, spot):
    predictor = Predictor.load(runs / "captioner", "cpu", "fp32")
    pair = (spot / "images_test" / "0.png", spot / "images_test" / "0_2.png")
    (explanation,) = predictor.explanations([pair])[0]
    assert explanation.caption == predictor.captions([pair])[0][0]
    assert explanation.words == ()
    assert len(explanation.word_maps) == len(explanation.class_maps) == 0
    assert predictor.max_words == 12


def test_images_are_normalized_as_the_backbone_says():
    model = CLIP4IDC.from_weights(net_weights(), "retrieval")
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
    assert model.normalize_images(images).flatten(1).tolist() == [[-2.0] * 3, [2.0] * 3]
    assert model.backbone is model.net


def test_freezing_goes_by_parts():
    model = CLIP4IDC.from_weights(net_weights(), "caption")
    freeze(model, 1)
    freeze_unused(model)
    assert learning_parameters(model) == {"net.side"}
    freeze(model, 0, train_token_embedding=True)
    assert learning_parameters(model) == {
        "net.side",
        "net.words.weight",
        "net.layer.weight",
        "net.layer.bias",
        "net.sentence.weight",
        "net.sentence.bias",
        "net.logit_scale",
    }
    with pytest.raises(ValueError, match="freeze_layer_num is 2, expected -1 .* to 1"):
        freeze(model, 2)


def learning_parameters(model: CLIP4IDC) -> set[str]:
    """The backbone's parameters that learn."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.startswith("net.")
    }


@pytest.mark.parametrize(("task", "fast"), [("retrieval", {"net.side"}), ("caption", set())])
def test_what_is_new_for_pairs_learns_faster_in_adaptation(task, fast):
    model = CLIP4IDC.from_weights(net_weights(), task)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, lr=1.0, coef_lr=0.1, weight_decay=0.2)
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    own = {name: rate for name, rate in rates.items() if name.startswith("net.")}
    assert {name for name, rate in own.items() if rate == 1.0} == fast
    assert {rate for name, rate in own.items() if name not in fast} == {0.1}


def test_weights_are_saved_and_loaded_whole(tmp_path):
    model = CLIP4IDC.from_weights(net_weights(), "caption")
    torch.save(model.state_dict(), tmp_path / "whole.bin")
    loaded = load_weights(str(tmp_path / "whole.bin"), "no CLIP is looked for")
    again = CLIP4IDC.from_weights(loaded.tensors, "caption").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_inspection_and_export_know_the_backbone(runs, capsys):
    assert convert_weights.main(["--inspect", str(runs / "captioner")]) == 0
    said = capsys.readouterr().out
    for line in (
        "names      CLIP4IDC's",
        "backbone   net",
        "stage      captioner",
        "image_resolution 32",
        "fits       yes",
    ):
        assert line in said
    assert "activation" not in said
    exported = str(runs / "exported")
    assert export_model.main([str(runs / "captioner"), exported, "--trained_on", "squares"]) == 0
    loaded = load_weights(exported, "no CLIP is looked for")
    assert loaded.tensors["net.side"].shape == (2, WIDTH)


def test_weights_that_no_backbone_takes_are_refused_by_name(tmp_path, spot, capsys):
    with pytest.raises(ValueError, match=r"no registered backbone \(clip, convnet\) takes"):
        CLIP4IDC.from_weights({"net.head.weight": torch.ones(2)}, "retrieval")
    torch.save({"resnet.conv.weight": torch.ones(2)}, tmp_path / "other.bin")
    start = ["--do_train", "--init_model", str(tmp_path / "other.bin")]
    options = arguments(spot, tmp_path / "run", tmp_path / "none.json", "retrieval", *start)
    line = run_refused("retrieval", options, capsys)
    assert "other.bin: no registered backbone (clip, convnet) takes these weights" in line
    assert "resnet.conv.weight" in line


def test_an_option_that_the_backbone_does_not_have_is_refused(runs, spot, capsys):
    start = ["--do_train", "--init_model", str(runs / "net.bin"), "--image_resolution", "64"]
    options = arguments(spot, runs / "never", runs / "none.json", "retrieval", *start)
    assert "ConvNet reads images of one size only" in run_refused("retrieval", options, capsys)


def test_a_backbone_of_another_base_lacks_what_the_base_has(monkeypatch):
    abstract = [*PairBackbone.__abstractmethods__, "key_prefix"]
    monkeypatch.setattr(BACKBONES, "targets", {"other": type("Other", (), dict.fromkeys(abstract))})
    with pytest.raises(ValueError, match="backbone 'other' lacks joint_attention, blocks, "):
        BACKBONES["other"]


def test_a_backbone_that_lacks_a_member_is_refused_by_name(monkeypatch):
    class Silent(ConvNet):
        encode_text = PairBackbone.encode_text

    class Sizeless(ConvNet):
        num_tokens = property()

    for name, kind, member in (
        ("silent", Silent, "encode_text"),
        ("sizeless", Sizeless, "num_tokens"),
    ):
        monkeypatch.setattr(BACKBONES, "targets", {name: kind})
        with pytest.raises(ValueError, match=f"backbone '{name}' lacks {member}"):
            CLIP4IDC.from_weights(net_weights(), "retrieval")
