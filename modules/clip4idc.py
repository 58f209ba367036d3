"""CLIP4IDC: builds the model from backbone, captioner and cross encoder, and loads its weights.

Dimensions: B pairs, K pairs that share their first image, T tokens per image, E embedding size,
L text tokens, V vocabulary, R pixels along an image's side. See docs/reference.md, Model.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloaders.images import normalize
from modules.cross import CrossEncoder
from modules.model.backbone import Features, PairBackbone, Part, build_backbone, strip_prefix
from modules.model.bert import load_cross_config, load_decoder_config
from modules.model.decoder import CaptionDecoder, DecoderState
from modules.model.layers import Attention
from modules.options.groups import TASKS
from modules.weights.fitting import abbreviate_keys, drop_unused, fill_in_optional, missing_groups
from modules.weights.key_names import to_released_float32
from modules.weights.model_info import ModelSettings, apply_model_info
from modules.weights.sources import LoadedWeights

log = logging.getLogger(__name__)

CROSS_CHUNK = 256  # combinations of text and pair that enter the cross encoder at once


class AttentionModules(NamedTuple):
    """The attention that pictures show, each list from input to output."""

    joint: list[Attention] | None  # of the backbone, over both images' tokens; None: no maps
    encoder: list[Attention]  # of the captioner's encoder layers
    decoder_cross: list[Attention]  # from the captioner's decoder layers to its encoder layers


class CLIP4IDC(nn.Module):
    """The model of one task. Build it with `from_weights`."""

    def __init__(
        self,
        backbone: PairBackbone,
        decoder: CaptionDecoder | None = None,
        cross: CrossEncoder | None = None,
    ) -> None:
        super().__init__()
        self.task = "caption" if decoder is not None else "retrieval"
        self.key_prefix = backbone.key_prefix
        self.add_module(self.key_prefix, backbone)
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
        """A task's model, from tensors under the released names or OpenAI's own.

        Sizes come from the shapes; float16 is widened to float32. The pair-specific tensors,
        `decoder.*`, and `cross.*` are initialized at random if the whole group is absent. Raises
        ValueError naming any other tensor that is missing, unexpected or misshapen.
        """
        _check_task(task, sim_header)
        weights = drop_unused(to_released_float32(weights), task, sim_header)

        def build() -> "CLIP4IDC":
            backbone = build_backbone(weights, intra_layers, linear_patch)
            decoder = _build_decoder(backbone, decoder_config) if task == "caption" else None
            cross = _build_cross(backbone, cross_config) if sim_header == "tight" else None
            return cls(backbone, decoder, cross)

        # Only names and shapes are needed here. Drawing random values that are then overwritten
        # would take seconds.
        with torch.device("meta"):
            model = build()
        weights |= model._derived_tensors(weights)
        absent = missing_groups(weights, model.optional_groups())
        for group in absent:
            log.info("not in the weights, initialized at random: %s", abbreviate_keys(group))
        if absent:
            model._complete(weights)  # rejects wrong shapes before memory is allocated for them
            model = build()
        model._load(model._complete(weights))
        return model

    @property
    def backbone(self) -> PairBackbone:
        """The encoder of pairs and sentences, also found under its key prefix: `model.clip`."""
        return self._modules[self.key_prefix]

    @property
    def uses_cross_encoder(self) -> bool:
        """Whether similarity comes from the cross encoder (--sim_header tight)."""
        return "cross" in self._modules

    @property
    def image_resolution(self) -> int:
        """R."""
        return self.backbone.image_resolution

    @property
    def context_length(self) -> int:
        """The largest L."""
        return self.backbone.context_length

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.backbone.vocab_size

    @property
    def sot(self) -> int:
        """The token id that starts a sentence."""
        return self.backbone.sot

    @property
    def eot(self) -> int:
        """The token id that ends a sentence."""
        return self.backbone.eot

    def normalize_images(self, images: Tensor) -> Tensor:
        """(..., 3, R, R) uint8 → float32 as the backbone was trained on."""
        return normalize(images, self.backbone.pixel_mean, self.backbone.pixel_std)

    def encode_pairs(self, images: Tensor) -> Features:
        """(B, 2, 3, R, R) normalized, before first → tokens (B, 2T, E), pooled (B, E)."""
        self._check_images(images, allow_more=False)
        return self.backbone.encode_pairs(images)

    def encode_against_first(self, images: Tensor) -> Features:
        """Pair image 0 with each other image: (B, 1+K, 3, R, R) → features of B·K pairs.

        They are grouped by the other image: all (0, 1), then all (0, 2).
        """
        self._check_images(images, allow_more=True)
        return self.backbone.encode_against_first(images)

    def encode_text(self, ids: Tensor) -> Features:
        """(B, L) token ids → tokens (B, L, E), pooled (B, E) at EOT, mask (B, L)."""
        return self.backbone.encode_text(ids)

    def similarity(self, text_pooled: Tensor, pair_pooled: Tensor) -> Tensor:
        """(N_text, E) and (N_pair, E) → (N_text, N_pair): cosines times exp(logit_scale).

        `score_pairs` asks the cross encoder instead, if there is one.
        """
        # Always in float32: small differences here change the loss a lot.
        with torch.autocast(text_pooled.device.type, enabled=False):
            text = F.normalize(text_pooled.float(), dim=-1)
            pair = F.normalize(pair_pooled.float(), dim=-1)
            return self.backbone.logit_scale.exp() * text @ pair.T

    def score_pairs(self, text: Features, pair: Features) -> Tensor:
        """The (N_text, N_pair) similarities of all combinations.

        They are those of `similarity`, or the cross encoder's if there is one.
        """
        if not self.uses_cross_encoder:
            return self.similarity(text.pooled, pair.pooled)
        size = (len(text.tokens), len(pair.tokens))
        grid = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))
        scores = []
        for chunk in grid.split(CROSS_CHUNK):
            row, column = chunk.unbind(dim=1)
            crossed = self.cross(text.tokens[row], pair.tokens[column], text.mask[row])
            scores.append(self.similarity_dense(crossed.pooled).flatten())
        return torch.cat(scores).unflatten(0, size).float()

    def caption_logits(self, pair_tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Teacher forcing: (B, 2T, E), ids and mask (B, L), 1 = token → logits (B, L, V)."""
        return self.decoder.predictions(self.decoder(pair_tokens, ids, mask))

    def weighted_caption_loss(
        self, pair_tokens: Tensor, ids: Tensor, mask: Tensor, target_ids: Tensor, weights: Tensor
    ) -> Tensor:
        """Teacher forcing → Σ weights · cross-entropy. All from `ids` to `weights` are (B, L).

        Logits are computed only where there is a token: where `mask` is 1.
        """
        is_token = mask.bool()
        states = self.decoder(pair_tokens, ids, mask)[is_token]
        return self.decoder.predictions.loss(states, target_ids[is_token], weights[is_token])

    def start_captions(
        self, pair_tokens: Tensor, max_words: int, per_pair: int = 1
    ) -> DecoderState:
        """Encode B pairs' tokens (B, 2T, E) for `per_pair` captions of each, up to max_words."""
        return self.decoder.start(pair_tokens, max_words, per_pair)

    def next_token_logits(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The last token ids (B, per_pair) → float32 logits (B, per_pair, V) of the next ones.

        The state grows by one token.
        """
        return self.decoder.step(ids, state)

    @property
    def attention_modules(self) -> AttentionModules:
        """The modules that `record_attention` records for pictures.

        Raises ValueError for a retrieval model, which writes no captions.
        """
        if self.task != "caption":
            raise ValueError("attention maps are those of a captioner; this is a retrieval model")
        return AttentionModules(
            joint=self.backbone.joint_attention(),
            encoder=[layer.slf_attn for layer in self.decoder.encoder.layer],
            decoder_cross=[layer.enc_attn for layer in self.decoder.decoder.layer],
        )

    def compilable_blocks(self) -> list[nn.Module]:
        """The blocks that --compile compiles: all but the decoder's layers.

        Those are small, and captioning calls them with another length for each token.
        """
        captioner = list(self.decoder.encoder.layer) if self.task == "caption" else []
        return self.backbone.blocks() + captioner

    def part_of(self, name: str) -> Part | None:
        """The part of the backbone that a parameter belongs to; None outside the backbone."""
        start = f"{self.key_prefix}."
        if not name.startswith(start):
            return None
        return self.backbone.part_of(name.removeprefix(start))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale of cosines below its limit, as CLIP's training does."""
        self.backbone.logit_scale.clamp_(max=self.backbone.max_log_scale)

    def info(self, max_words: int) -> dict[str, Any]:
        """The content of model.json: the settings that the shapes of the weights do not tell."""
        info = {**self.backbone.info(), "max_words": max_words}
        if self.task == "caption":
            config = asdict(self.decoder.config)
            info["decoder_config"] = {"num_decoder_layers": config.pop("num_layers"), **config}
        return info

    @property
    def tied_keys(self) -> dict[str, str]:
        """Names of the captioner's copies of the backbone's embeddings → their originals."""
        if self.task != "caption":
            return {}
        token_embedding, positions = self.backbone.caption_embeddings()
        names = {parameter: name for name, parameter in self.backbone.named_parameters()}
        token_key = f"{self.key_prefix}.{names[token_embedding.weight]}"
        position_key = f"{self.key_prefix}.{names[positions]}"
        return {
            "decoder.embeddings.word_embeddings.weight": token_key,
            "decoder.embeddings.position_embeddings.weight": position_key,
            "decoder.classifier.cls.predictions.decoder.weight": token_key,
        }

    def optional_groups(self) -> list[list[str]]:
        """Names of tensors that weights may lack, in groups that are lacking as a whole."""
        keys = list(self.state_dict())
        tied = self.tied_keys
        return [
            [key for key in keys if self.part_of(key) == "pair"],
            [key for key in keys if key.startswith("decoder.") and key not in tied],
            [key for key in keys if key.startswith(("cross.", "similarity_dense."))],
        ]

    def _derived_tensors(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        derived = self.backbone.derived_tensors(strip_prefix(weights, self.key_prefix))
        return {f"{self.key_prefix}.{name}": value for name, value in derived.items()}

    def _complete(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fill_in_optional(weights, self.state_dict(), self.tied_keys, self.optional_groups())

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        """Take copies of the tensors as parameters, and tie the captioner's embeddings again."""
        self.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
        if self.task == "caption":
            self.decoder.tie(*self.backbone.caption_embeddings())

    def _check_images(self, images: Tensor, allow_more: bool) -> None:
        side = self.image_resolution
        shape = tuple(images.shape)
        if shape[2:] != (3, side, side) or shape[1] < 2 or (shape[1] > 2 and not allow_more):
            count = "2 or more" if allow_more else "2"
            raise ValueError(
                f"images of shape {shape}, expected (pairs, {count}, 3, {side}, {side})"
            )


def load_model(
    weights: LoadedWeights, task: str, settings: ModelSettings
) -> tuple[CLIP4IDC, ModelSettings]:
    """A task's model from loaded weights, and the settings it was built with.

    What model.json beside the weights says takes precedence over `settings`. Raises ValueError as
    `CLIP4IDC.from_weights` does.
    """
    settings = apply_model_info(settings, weights.info, weights.named_source)
    model = CLIP4IDC.from_weights(
        weights.tensors,
        task,
        intra_layers=settings.intra_num_hidden_layers,
        linear_patch=settings.linear_patch,
        decoder_config=settings.decoder_config,
        sim_header=settings.sim_header,
        cross_config=settings.cross_config,
    )
    return model, settings


def _check_task(task: str, sim_header: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected 'retrieval' or 'caption'")
    if sim_header not in ("loose", "tight"):
        raise ValueError(f"sim_header is {sim_header!r}, expected 'loose' or 'tight'")
    if task == "caption" and sim_header == "tight":
        raise ValueError(
            "sim_header 'tight' belongs to the retrieval task; captioning computes no similarity"
        )


def _build_decoder(backbone: PairBackbone, config: str | Path | Mapping | None) -> CaptionDecoder:
    fitted = load_decoder_config(config or "decoder-base").fitted_to(backbone.embed_dim)
    return CaptionDecoder(fitted, *backbone.caption_embeddings())


def _build_cross(backbone: PairBackbone, config: str | Path | Mapping | None) -> CrossEncoder:
    return CrossEncoder(load_cross_config(config or "cross-base").fitted_to(backbone.embed_dim))
