"""CLIP4IDC: wiring of CLIP, captioner and cross encoder, and the one place where weights become a model (SPEC §4)."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.bert_config import load_cross_config, load_decoder_config
from modules.clip import CLIP, ClipSizes, Features, inflate_patches
from modules.cross import CrossEncoder
from modules.decoder import CaptionDecoder, DecodingState
from modules.layers import Attention
from modules.layouts import from_plain
from modules.losses import IGNORED

log = logging.getLogger(__name__)

TASKS = ("retrieval", "caption")
PAIR_KEYS = (
    "bef_embedding",
    "aft_embedding",
    "joint_positional_embedding",
    "ln_mid.weight",
    "ln_mid.bias",
)
TIED_KEYS = {
    "decoder.embeddings.word_embeddings.weight": "clip.token_embedding.weight",
    "decoder.embeddings.position_embeddings.weight": "clip.positional_embedding",
    "decoder.classifier.cls.predictions.decoder.weight": "clip.token_embedding.weight",
}
CROSS_CHUNK = 256  # text-pair combinations that go through the cross encoder at once


class Misfit(ValueError):
    """Weights that are not this model's: what is missing, left over or of another shape."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"the weights do not fit this model: {problems[0]}{more}")


class CLIP4IDC(nn.Module):
    """The model of one stage. Build it with `from_weights`.

    Letters: B pairs, T tokens per image, E embedding size, L words, V vocabulary.
    """

    def __init__(
        self, clip: CLIP, decoder: CaptionDecoder | None = None, cross: CrossEncoder | None = None
    ) -> None:
        super().__init__()
        self.task = "caption" if decoder is not None else "retrieval"
        self.clip = clip
        self.vocab_size = clip.sizes.vocab_size
        if decoder is not None:
            self.decoder = decoder
        if cross is not None:
            self.cross = cross
            self.similarity_dense = nn.Linear(cross.config.hidden_size, 1, bias=False)
            nn.init.normal_(self.similarity_dense.weight, std=cross.config.initializer_range)

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        task: str,
        intra_layers: int = 9,
        linear_patch: str = "2d",
        decoder_config: str | Path | Mapping | None = None,
        sim_header: str = "loose",
        cross_config: str | Path | Mapping | None = None,
    ) -> "CLIP4IDC":
        """Build a stage's model from tensors under the released names, or OpenAI's own without the `clip.` prefix.

        Sizes come from the shapes; float16 is widened to float32. The pair's own vectors, conv2, `decoder.*` and `cross.*` are
        initialised where wholly absent. Raises ValueError naming any other key that is missing, unexpected or misshapen.
        """
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, expected 'retrieval' or 'caption'")
        if sim_header not in ("loose", "tight"):
            raise ValueError(f"sim_header is {sim_header!r}, expected 'loose' or 'tight'")
        if task == "caption" and sim_header == "tight":
            raise ValueError(
                "sim_header 'tight' belongs to the retrieval task; captioning compares nothing"
            )
        weights = _set_aside(released_names(weights), task, sim_header)
        sizes = ClipSizes.from_weights(clip_part(weights))

        def build() -> "CLIP4IDC":
            clip = CLIP(sizes, intra_layers, linear_patch)
            decoder = cross = None
            if task == "caption":
                config = load_decoder_config(decoder_config or "decoder-base").fitted_to(
                    sizes.embed_dim
                )
                decoder = CaptionDecoder(config, clip.token_embedding, clip.positional_embedding)
            if sim_header == "tight":
                cross = CrossEncoder(
                    load_cross_config(cross_config or "cross-base").fitted_to(sizes.embed_dim)
                )
            return cls(clip, decoder, cross)

        with torch.device(
            "meta"
        ):  # names and shapes alone: drawing weights that are overwritten takes seconds
            model = build()
        absent = _absent_groups(model.state_dict(), weights)
        for group in absent:
            log.info("initialised anew, as the weights hold none of them: %s", _summary(group))
        if absent:
            model._completed(
                weights
            )  # shapes that do not fit are found before any memory is taken for them
            model = build()
        model._load(model._completed(weights))
        return model

    def _completed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights and whatever of this model's they may lack; ValueError where they do not fit."""
        expected = self.state_dict()
        _check_tied(weights)
        weights = dict(weights)
        for tied, original in TIED_KEYS.items():
            if tied in expected:
                weights.setdefault(tied, weights.get(original, expected[original]))
        if "clip.visual.conv2.weight" in expected and "clip.visual.conv2.weight" not in weights:
            weights["clip.visual.conv2.weight"] = inflate_patches(
                weights["clip.visual.conv1.weight"]
            )
        for group in _absent_groups(expected, weights):
            weights.update({key: expected[key] for key in group})
        problems = _misfits(expected, weights)
        if problems:
            raise Misfit(problems)
        return weights

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
        if self.task == "caption":
            self.decoder.tie(self.clip.token_embedding, self.clip.positional_embedding)

    def encode_pairs(self, images: Tensor) -> Features:
        """(B, 2, 3, H, W) normalised float, before first → tokens (B, 2T, E), pooled (B, E)."""
        self._check_images(images)
        return self.clip.visual(images)

    def encode_against_first(self, images: Tensor) -> Features:
        """(B, 1+K, 3, H, W): the first image paired with each of the others → B·K pairs, all pairs of image 1 first."""
        self._check_images(images)
        return self.clip.visual.against_first(images)

    def encode_text(self, ids: Tensor) -> Features:
        """(B, L) long → tokens (B, L, E), pooled (B, E) at EOT, mask (B, L)."""
        return self.clip.encode_text(ids)

    def similarity(self, text_pooled: Tensor, pair_pooled: Tensor) -> Tensor:
        """(N_text, E) and (N_pair, E) → (N_text, N_pair): cosines times exp(logit_scale)."""
        with torch.autocast(
            text_pooled.device.type, enabled=False
        ):  # the loss is sharp in these: always float32
            text, pair = (
                F.normalize(text_pooled.float(), dim=-1),
                F.normalize(pair_pooled.float(), dim=-1),
            )
            return self.clip.logit_scale.exp() * text @ pair.T

    def compare(self, text: Features, pair: Features) -> Tensor:
        """(N_text, N_pair) similarities by the model's header: loose (cosine) or tight (cross encoder on every combination)."""
        if not hasattr(self, "cross"):
            return self.similarity(text.pooled, pair.pooled)
        rows, columns = (
            grid.flatten()
            for grid in torch.meshgrid(
                torch.arange(len(text.tokens)), torch.arange(len(pair.tokens)), indexing="ij"
            )
        )
        scores = [
            self.similarity_dense(
                self.cross(text.tokens[row], pair.tokens[column], text.mask[row]).pooled
            ).flatten()
            for row, column in zip(rows.split(CROSS_CHUNK), columns.split(CROSS_CHUNK), strict=True)
        ]
        return torch.cat(scores).unflatten(0, (len(text.tokens), len(pair.tokens))).float()

    def caption_logits(self, pair_tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Teacher forcing: (B, 2T, E), ids and mask (B, L), 1 = word → logits (B, L, V)."""
        return self.decoder.predictions(self.decoder(pair_tokens, ids, mask))

    def caption_loss(
        self, pair_tokens: Tensor, ids: Tensor, mask: Tensor, target_ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Teacher forcing → Σ weights · cross-entropy over the tokens that have a target; all of ids … weights are (B, L).

        Only positions with a target, an id other than 0, meet the vocabulary.
        """
        aimed = target_ids != IGNORED
        return self.decoder.predictions.loss(
            self.decoder(pair_tokens, ids, mask)[aimed], target_ids[aimed], weights[aimed]
        )

    @property
    def attention_modules(self) -> tuple[list[Attention], list[Attention], list[Attention]]:
        """Of the joint vision blocks, of the captioner's encoder layers, and of its decoder's looks at these; in their order."""
        joint = [
            block.attn
            for block in self.clip.visual.transformer.resblocks[self.clip.visual.intra_layers :]
        ]
        return (
            joint,
            [layer.slf_attn for layer in self.decoder.encoder.layer],
            [layer.enc_attn for layer in self.decoder.decoder.layer],
        )

    def start_captions(
        self, pair_tokens: Tensor, max_words: int, per_pair: int = 1
    ) -> DecodingState:
        """Encode B pairs' tokens (B, 2T, E) for `per_pair` captions of each, of at most max_words tokens."""
        return self.decoder.start(pair_tokens, max_words, per_pair)

    def next_word_logits(self, ids: Tensor, state: DecodingState) -> Tensor:
        """The last words (B, per_pair) → float32 logits (B, per_pair, V) of the next ones; the state moves on by one word."""
        return self.decoder.step(ids, state)

    def _check_images(self, images: Tensor) -> None:
        side = self.clip.visual.image_resolution
        if images.ndim != 5 or tuple(images.shape[2:]) != (3, side, side) or images.shape[1] < 2:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, expected (pairs, 2, 3, {side}, {side})"
            )


def released_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the released names, in float32: OpenAI's own names get `clip.`, its archive's extras go."""
    return {key: value.float() for key, value in from_plain(weights).items()}


def resized_for(weights: Mapping[str, Tensor], image_resolution: int) -> dict[str, Tensor]:
    """Released-name weights for images of another side: the position embeddings of an image, and of both halves of a pair, are
    interpolated over their grid (bicubic, antialiased); the class token's stay. ValueError where patches do not fill the side."""
    sizes = ClipSizes.from_weights(clip_part(weights))
    if image_resolution == sizes.image_resolution:
        return dict(weights)
    grid = (
        replace(sizes, image_resolution=image_resolution).image_resolution
        // sizes.vision_patch_size
    )
    log.info(
        "position embeddings resized from images of %d pixels to %d",
        sizes.image_resolution,
        image_resolution,
    )

    def resize(positions: Tensor) -> Tensor:  # (T, D)
        side = sizes.image_resolution // sizes.vision_patch_size
        patches = positions[1:].T.unflatten(1, (side, side))[None]  # (1, D, side, side)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
        return torch.cat([positions[:1], patches[0].flatten(1).T])

    resized = dict(weights)
    for name, images in (
        ("clip.visual.positional_embedding", 1),
        ("clip.visual.joint_positional_embedding", 2),
    ):
        if name in weights:
            if weights[name].ndim != 2 or len(weights[name]) != images * sizes.num_tokens:
                raise ValueError(
                    f"{name} has shape {tuple(weights[name].shape)}, expected {images * sizes.num_tokens} positions"
                )
            resized[name] = torch.cat([resize(half) for half in weights[name].chunk(images)])
    return resized


def clip_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below `clip.`, without the prefix."""
    return {
        key.removeprefix("clip."): value
        for key, value in weights.items()
        if key.startswith("clip.")
    }


def holds_all_of_clip(weights: Mapping[str, Tensor]) -> bool:
    """Whether released-name weights have every tensor of OpenAI's CLIP, so that no CLIP file is needed."""
    try:
        sizes = ClipSizes.from_weights(clip_part(weights))
    except ValueError:
        return False
    with torch.device("meta"):
        keys = CLIP(sizes, intra_layers=0, linear_patch="2d").state_dict()
    return all(
        f"clip.{key}" in weights for key in keys if key.removeprefix("visual.") not in PAIR_KEYS
    )


def _set_aside(weights: dict[str, Tensor], task: str, sim_header: str) -> dict[str, Tensor]:
    unwanted = [] if task == "caption" else ["decoder."]
    unwanted += [] if sim_header == "tight" else ["cross.", "similarity_dense."]
    for prefix in unwanted:
        count = sum(key.startswith(prefix) for key in weights)
        if count:
            log.warning(
                "%d tensors %s* are set aside: a %s model with a %s similarity has no use for them",
                count,
                prefix,
                task,
                sim_header,
            )
    return {key: value for key, value in weights.items() if not key.startswith(tuple(unwanted))}


def _check_tied(weights: Mapping[str, Tensor]) -> None:
    for tied, original in TIED_KEYS.items():
        if (
            tied in weights
            and original in weights
            and not torch.equal(weights[tied], weights[original])
        ):
            raise ValueError(
                f"{tied} differs from {original}, but the two are one tensor in CLIP4IDC"
            )


def _absent_groups(expected: Iterable[str], weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The groups of expected keys that the weights may lack as a whole, and do lack."""
    groups = [
        [f"clip.visual.{key}" for key in PAIR_KEYS],
        [key for key in expected if key.startswith("decoder.") and key not in TIED_KEYS],
        [key for key in expected if key.startswith(("cross.", "similarity_dense."))],
    ]
    return [group for group in groups if group and not any(key in weights for key in group)]


def _misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{key} is missing" for key in expected if key not in weights]
    for key, value in weights.items():
        if key not in expected:
            advice = (
                ": these weights were made with --linear_patch 3d"
                if key.endswith("conv2.weight")
                else ""
            )
            problems.append(f"{key} is unexpected{advice}")
        elif value.shape != expected[key].shape:
            problems.append(
                f"{key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            )
    return problems


def _summary(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 5 else f"{keys[0]} … {keys[-1]} ({len(keys)} tensors)"
