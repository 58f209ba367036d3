"""CLIP4IDC: wiring of CLIP, captioner and cross encoder, and the one place where weights become a model (SPEC §4)."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.cross import CrossEncoder
from modules.losses import IGNORED_ID
from modules.model.bert import load_cross_config, load_decoder_config
from modules.model.clip import CLIP, ClipSizes, Features, inflate_patches
from modules.model.decoder import CaptionDecoder, DecoderState
from modules.model.layers import Attention
from modules.weights.fitting import (
    TIED_KEYS,
    WeightMismatch,
    check_tied,
    drop_unused,
    list_keys,
    mismatches,
    missing_groups,
)
from modules.weights.key_names import clip_tensors, released_names

log = logging.getLogger(__name__)

TASKS = ("retrieval", "caption")


CROSS_CHUNK = 256  # text-pair combinations that go through the cross encoder at once


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
        weights = drop_unused(released_names(weights), task, sim_header)
        sizes = ClipSizes.from_weights(clip_tensors(weights))

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
        absent = missing_groups(model.state_dict(), weights)
        for group in absent:
            log.info("initialised anew, as the weights hold none of them: %s", list_keys(group))
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
        check_tied(weights)
        weights = dict(weights)
        for tied, original in TIED_KEYS.items():
            if tied in expected:
                weights.setdefault(tied, weights.get(original, expected[original]))
        if "clip.visual.conv2.weight" in expected and "clip.visual.conv2.weight" not in weights:
            weights["clip.visual.conv2.weight"] = inflate_patches(
                weights["clip.visual.conv1.weight"]
            )
        for group in missing_groups(expected, weights):
            weights.update({key: expected[key] for key in group})
        problems = mismatches(expected, weights)
        if problems:
            raise WeightMismatch(problems)
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
        return self.clip.visual.encode_against_first(images)

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

    def score_pairs(self, text: Features, pair: Features) -> Tensor:
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
        aimed = target_ids != IGNORED_ID
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

    @property
    def sot(self) -> int:
        """The word id that starts a sentence."""
        return self.vocab_size - 2

    @property
    def eot(self) -> int:
        """The word id that ends a sentence."""
        return self.vocab_size - 1

    def start_captions(
        self, pair_tokens: Tensor, max_words: int, per_pair: int = 1
    ) -> DecoderState:
        """Encode B pairs' tokens (B, 2T, E) for `per_pair` captions of each, of at most max_words tokens."""
        return self.decoder.start(pair_tokens, max_words, per_pair)

    def next_word_logits(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The last words (B, per_pair) → float32 logits (B, per_pair, V) of the next ones; the state moves on by one word."""
        return self.decoder.step(ids, state)

    def _check_images(self, images: Tensor) -> None:
        side = self.clip.visual.image_resolution
        if images.ndim != 5 or tuple(images.shape[2:]) != (3, side, side) or images.shape[1] < 2:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, expected (pairs, 2, 3, {side}, {side})"
            )
