"""Captions for any two images: load a model once, caption many pairs, see where it looked.

    from modules.predictor import Predictor
    predictor = Predictor.load()  # the bundled model, demo
    print(predictor.caption("before.png", "after.png"))

To use your own weights: `Predictor.load("ckpts/ckpt_spot_caption/pytorch_model.bin.best")`.

Dimensions: B pairs, n captions of each, L tokens of a caption, T tokens per image, S = 2T,
E their size.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.images import ImageLike, to_tensor
from modules.clip4idc import CLIP4IDC, load_model
from modules.generation import generate
from modules.generation.steps import count_tokens, shift_for_teacher_forcing
from modules.model.explanation import (
    Caption,
    Explanation,
    compute_token_attention,
    explain_caption,
    rollout,
)
from modules.model.layers import record_attention
from modules.options.decoding import Decoding
from modules.report.pictures import PairExplanation
from modules.tokenizer import decode
from modules.weights.hub import HubAccess
from modules.weights.key_names import has_captioner
from modules.weights.known_models import BUNDLED, MODELS
from modules.weights.model_info import ModelSettings
from modules.weights.shareable import Origin, Shareable
from modules.weights.sources import load_weights, name_weights
from system.compute import check_finite, choose_precision, select_device, use_fast_matmuls
from system.places import ROOT
from system.runtime import Runtime
from system.urls import Location

log = logging.getLogger(__name__)

DEMO = ROOT / MODELS[BUNDLED].location


class Predictor(Shareable):
    """A captioning model that is ready to use. Build it with `load`."""

    def __init__(
        self,
        model: CLIP4IDC,
        max_words: int = 20,
        runtime: Runtime | None = None,
        origin: Origin = Origin(),
    ) -> None:
        self.runtime = runtime or Runtime()
        self.model = model.to(self.runtime.device).eval()
        self.max_words = max_words
        self.origin = origin

    def __repr__(self) -> str:
        millions = sum(one.numel() for one in self.model.parameters()) / 1e6
        size = f"{millions:.1f} M parameters"
        name = self.origin.name or "a model of your own"
        return f"<Predictor: {name}, {size}, {self.runtime.device}, {self.runtime.precision}>"

    @property
    def trained_on(self) -> str | None:
        """What the model was trained on, as its model.json says."""
        return self.origin.info.get("trained_on")

    @property
    def limits(self) -> str:
        """A sentence that says which pictures the bundled model understands; "" for others."""
        return MODELS[BUNDLED].limits if self.origin.name == BUNDLED else ""

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Location | None = None,
        device: str | torch.device | None = "auto",
        precision: str = "auto",
        intra_layers: int = 9,
        linear_patch: str = "2d",
        decoder_config: str | Path | Mapping | None = None,
        max_words: int = 20,
        clip_name: str | Location = "ViT-B/32",
        cache_dir: str | None = None,
        image_resolution: int | None = None,
        quick_gelu: bool = False,
        hub: HubAccess = HubAccess(),
    ) -> "Predictor":
        """A predictor with the weights of a finetuned captioner.

        `checkpoint` is a name that `clip4idc models` lists; a file or folder, also one below
        ckpts/; a URL; or owner/name[@revision] on the Hugging Face hub, for which `hub` has more
        options. Without one it is the bundled model, demo. A model.json beside the weights takes
        precedence over intra_layers, linear_patch, decoder_config and max_words. `device` is auto
        (a GPU, or else the CPU), cpu, cuda, cuda:NUMBER or mps. Raises ValueError or OSError for
        what cannot be found, read or used.
        """
        device = _choose_device(device)
        source = Location.of(checkpoint or DEMO)
        weights = load_weights(source, clip_name, cache_dir, image_resolution, quick_gelu, hub)
        if not has_captioner(weights.tensors):
            raise ValueError(
                f"{weights.named_source} has no captioner (decoder.*): "
                "give the result of finetuning"
            )
        settings = ModelSettings(intra_layers, linear_patch, decoder_config, max_words)
        model, settings = load_model(weights, "caption", settings)
        if not 1 <= settings.max_words <= model.context_length:
            raise ValueError(
                f"{weights.named_source}: max_words is {settings.max_words}, "
                f"expected 1 to {model.context_length}, the model's context length"
            )
        runtime = Runtime(device=device, precision=choose_precision(precision, device))
        name = name_weights(source, Path(weights.named_source))
        origin = Origin(name, weights.info)
        predictor = cls(model, settings.max_words, runtime, origin)
        if predictor.limits:
            log.warning("using the bundled model, %s. %s", BUNDLED, predictor.limits)
        return predictor

    def caption(self, before: ImageLike, after: ImageLike, decoding: Decoding = Decoding()) -> str:
        """The sentence for one pair of images.

        An image is a path, a PIL image, a uint8 array (H, W, 3), or a uint8 tensor (3, H, W).
        """
        return self.captions([(before, after)], decoding)[0][0].text

    def captions(
        self,
        pairs: Sequence[tuple[ImageLike, ImageLike]],
        decoding: Decoding = Decoding(),
        pair_indices: Sequence[int] | None = None,
    ) -> list[list[Caption]]:
        """The captions of each pair, all pairs in one batch.

        What is random in a pair's captions follows from the seed and its index (by default 0, 1,
        …). Raises ValueError for settings of the decoding that contradict each other.
        """
        _check_arguments(pairs, decoding)
        if not pairs:
            return []
        with self._inference():
            tokens = self._encode(pairs)
            ids = generate(self.model, tokens, self.max_words, decoding, pair_indices)
            by_rank = [self._scores(tokens, caption_ids) for caption_ids in ids.unbind(dim=1)]
            scores = torch.stack(by_rank, dim=1)  # (B, n)
        captions = []
        for pair_ids, pair_scores in zip(ids.tolist(), scores.tolist(), strict=True):
            texts = map(decode, pair_ids)
            captions.append([Caption(*one) for one in zip(texts, pair_scores, strict=True)])
        return captions

    def explain(
        self, before: ImageLike, after: ImageLike, decoding: Decoding = Decoding()
    ) -> PairExplanation:
        """The caption of one pair, the first if there are several, and its attention maps.

        A notebook shows it as a picture; `draw()` returns that picture.
        """
        return self.explanations([(before, after)], decoding)[0][0]

    def explanations(
        self,
        pairs: Sequence[tuple[ImageLike, ImageLike]],
        decoding: Decoding = Decoding(),
        pair_indices: Sequence[int] | None = None,
    ) -> list[list[PairExplanation]]:
        """The captions of `captions` with their attention maps, recorded in the same passes.

        There are no maps if the model's tokens are not a grid of patches.
        """
        _check_arguments(pairs, decoding)
        found = self._explain_all(pairs, decoding, pair_indices)
        explained = []
        for pair, of_pair in zip(pairs, found, strict=True):
            explained.append([PairExplanation.of(one, *pair) for one in of_pair])
        return explained

    def _explain_all(
        self,
        pairs: Sequence[tuple[ImageLike, ImageLike]],
        decoding: Decoding,
        pair_indices: Sequence[int] | None,
    ) -> list[list[Explanation]]:
        if not pairs:
            return []
        joint, encoder, decoder_cross = self.model.attention_modules
        if joint is None:
            by_pair = self.captions(pairs, decoding, pair_indices)
            return [[Explanation.without_maps(one) for one in captions] for captions in by_pair]
        by_rank = []  # the explanations of all pairs' first captions, of their second ones, …
        with self._inference():
            with record_attention(joint) as recorded:
                tokens = self._encode(pairs)
            joint_rollout = rollout(recorded, tokens)  # (B, S, S)
            class_attention = joint_rollout[:, [0, tokens.shape[1] // 2]]  # (B, 2, S)
            ids = generate(self.model, tokens, self.max_words, decoding, pair_indices)
            for caption_ids in ids.unbind(dim=1):
                with record_attention([*encoder, *decoder_cross]) as recorded:
                    scores = self._scores(tokens, caption_ids)
                encoder_weights = recorded[: len(encoder)]
                cross_weights = recorded[len(encoder) :]
                token_attention = compute_token_attention(
                    encoder_weights, cross_weights, joint_rollout
                )
                lengths = count_tokens(caption_ids, self.model.eot)
                columns = (caption_ids, lengths, scores, class_attention, token_attention)
                by_rank.append([explain_caption(*row) for row in zip(*columns, strict=True)])
        return [list(explanations) for explanations in zip(*by_rank, strict=True)]

    @contextmanager
    def _inference(self) -> Iterator[None]:
        device = self.runtime.device
        precision = use_fast_matmuls(device, self.runtime.precision)
        with precision, torch.no_grad(), self.runtime.autocast():
            yield

    def _encode(self, pairs: Sequence[tuple[ImageLike, ImageLike]]) -> Tensor:
        """The tokens (B, S, E) of the pairs."""
        side = self.model.image_resolution
        images = []
        for before, after in pairs:
            images.append(torch.stack([to_tensor(before, side), to_tensor(after, side)]))
        batch = torch.stack(images).to(self.runtime.device)
        return self.model.encode_pairs(self.model.normalize_images(batch)).tokens

    def _scores(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The mean log-probability (B,) of each caption's ids (B, L), all tokens in one pass."""
        previous, mask = shift_for_teacher_forcing(ids, self.model.sot, self.model.eot)
        logits = self.model.caption_logits(tokens, previous, mask).float()
        log_probs = logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
        scores = (log_probs * mask).sum(dim=1) / mask.sum(dim=1)
        check_finite(scores)
        return scores


def _choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for. Raises ValueError for one that is not there."""
    if isinstance(device, torch.device):
        is_gpu_here = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
        if device.type == "cpu" or is_gpu_here:
            return device
    return select_device(str(device or "auto"))


def _check_arguments(pairs: object, decoding: object) -> None:
    """Raise ValueError where one pair's images were given instead of a list of pairs, or settings
    that are not a Decoding."""
    is_list = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    if not (is_list and all(map(_is_pair, pairs))):
        raise ValueError(
            "expected a list of pairs: captions([(before, after)]); for a single pair there is "
            "caption(before, after)"
        )
    if not isinstance(decoding, Decoding):
        raise ValueError(
            f"found {type(decoding).__name__} as decoding, expected a Decoding such as "
            "Decoding(beam_size=3)"
        )


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
