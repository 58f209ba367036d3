"""Captions for any two images: load a model once, caption many pairs, see where it looked.

    from modules.predictor import Predictor
    predictor = Predictor.load()  # the small model in ckpts/demo
    print(predictor.caption("before.png", "after.png"))

A file of one's own: `Predictor.load("ckpts/ckpt_spot_caption/pytorch_model.bin.best")`.

Letters: B pairs, n captions of each, L words, T tokens per image, S = 2T.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloaders.images import Picture, to_tensor
from modules.clip4idc import CLIP4IDC, load_model
from modules.generation.beam import beam_search
from modules.generation.greedy import greedy_search
from modules.generation.sampling import sample
from modules.generation.steps import PAD
from modules.model.explanation import Caption, Explanation, _heads_mean, _rollout, explain_caption
from modules.model.layers import record_attention
from modules.options.decoding import Decoding
from modules.tokenizer import decode
from modules.weights.model_info import ModelSettings
from modules.weights.sources import ROOT, load_weights
from system.compute import choose_device, choose_precision, matmul_precision
from system.runtime import Runtime
from system.urls import Address

log = logging.getLogger(__name__)

DEMO = ROOT / "ckpts" / "demo" / "model.safetensors"


class Predictor:
    """A captioning model that is ready to use. Build it with `load`."""

    def __init__(
        self,
        model: CLIP4IDC,
        max_words: int = 20,
        runtime: Runtime | None = None,
        trained_on: str | None = None,
    ) -> None:
        self.runtime = runtime or Runtime()
        self.model, self.max_words, self.trained_on = (
            model.to(self.runtime.device).eval(),
            max_words,
            trained_on,
        )

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | Address | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        intra_layers: int = 9,
        linear_patch: str = "2d",
        decoder_config: str | Path | Mapping | None = None,
        max_words: int = 20,
        clip_name: str | Address = "ViT-B/32",
        cache_dir: str | None = None,
        image_resolution: int | None = None,
        quick_gelu: bool = False,
    ) -> "Predictor":
        """From a finetuned checkpoint: a file or a folder, as given or below ckpts/, an address, or owner/name on the Hugging Face
        hub; without one, the small model in ckpts/demo.

        What shapes cannot say (intra_layers, linear_patch, decoder_config, max_words) comes from `model.json` beside the weights,
        where there is one. Raises ValueError or OSError for what cannot be found, read or used.
        """
        device = torch.device(device) if device else choose_device()
        weights = load_weights(
            Address.of(checkpoint or DEMO), clip_name, cache_dir, image_resolution, quick_gelu
        )
        if checkpoint is None:
            log.warning(
                "no --init_model: the small one in %s is used, trained on %s",
                DEMO.parent.relative_to(ROOT),
                weights.info["trained_on"],
            )
        if not any(key.startswith("decoder.") for key in weights.tensors):
            raise ValueError(
                f"{weights.source} has no captioner (decoder.*): give the result of finetuning"
            )
        settings = ModelSettings(intra_layers, linear_patch, decoder_config, max_words)
        model, settings = load_model(weights, "caption", settings)
        if not 1 <= settings.max_words <= model.context_length:
            raise ValueError(
                f"{weights.source}: max_words is {settings.max_words}, "
                f"expected 1 to {model.context_length}, the model's context length"
            )
        return cls(
            model,
            settings.max_words,
            Runtime(device=device, precision=choose_precision(precision, device)),
            weights.info.get("trained_on"),
        )

    def caption(self, before: Picture, after: Picture, decoding: Decoding = Decoding()) -> str:
        """The sentence for one pair: paths, PIL images, or uint8 arrays (H, W, 3) in RGB."""
        return self.captions([(before, after)], decoding)[0][0].text

    def captions(
        self,
        pairs: Sequence[tuple[Picture, Picture]],
        decoding: Decoding = Decoding(),
        numbers: Sequence[int] | None = None,
    ) -> list[list[Caption]]:
        """For each pair its captions, all pairs in one batch. `numbers` tell drawn captions of pairs apart (default: 0, 1, …)."""
        if not pairs:
            return []
        with self._computing():
            tokens = self._encode(pairs)
            ids = self._decode(tokens, decoding, numbers)
            scores = torch.stack(
                [self._scores(tokens, ids[:, n]) for n in range(ids.shape[1])], dim=1
            )
        return [
            [Caption(decode(words), score) for words, score in zip(*both, strict=True)]
            for both in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def explain(
        self, before: Picture, after: Picture, decoding: Decoding = Decoding()
    ) -> Explanation:
        """The caption of one pair (the first, where several are drawn) and the attention behind it."""
        return self.explanations([(before, after)], decoding)[0][0]

    def explanations(
        self,
        pairs: Sequence[tuple[Picture, Picture]],
        decoding: Decoding = Decoding(),
        numbers: Sequence[int] | None = None,
    ) -> list[list[Explanation]]:
        """What `captions` gives, and the attention behind each caption, from the very passes that made and scored it.

        A layer's attention, averaged over heads, is carried through the layers below by rollout (Abnar and Zuidema 2020): each
        layer passes on half of what stands at a place and half of what it attends to.
        """
        if not pairs:
            return []
        joint, encoder, decoder = self.model.attention_modules
        explained = []
        with self._computing():
            with record_attention(joint) as seen:
                tokens = self._encode(pairs)
            through = _rollout([_heads_mean(calls) for calls in seen], tokens)  # (B, S, S)
            classes = through[:, [0, tokens.shape[1] // 2]]  # (B, 2, S)
            ids = self._decode(tokens, decoding, numbers)
            for caption_ids in ids.unbind(dim=1):
                with record_attention([*encoder, *decoder]) as seen:
                    scores = self._scores(tokens, caption_ids)
                looks, below = [], None
                for encoded, decoded in zip(
                    seen[: len(encoder)], seen[len(encoder) :], strict=True
                ):
                    below = _rollout([_heads_mean(encoded)], tokens, below)
                    looks.append(_heads_mean(decoded) @ below @ through)
                parts = (
                    caption_ids,
                    scores,
                    classes,
                    torch.stack(looks).mean(dim=0),
                )  # the last: (B, L, S)
                explained.append(
                    [explain_caption(*of_pair) for of_pair in zip(*parts, strict=True)]
                )
        return [list(captions) for captions in zip(*explained, strict=True)]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with (
            matmul_precision(self.runtime.device, self.runtime.precision),
            torch.no_grad(),
            self.runtime.autocast(),
        ):
            yield

    def _encode(self, pairs: Sequence[tuple[Picture, Picture]]) -> Tensor:
        side = self.model.image_resolution
        images = torch.stack(
            [torch.stack([to_tensor(picture, side) for picture in pair]) for pair in pairs]
        )
        return self.model.encode_pairs(self.model.normalize(images.to(self.runtime.device))).tokens

    def _decode(self, tokens: Tensor, how: Decoding, numbers: Sequence[int] | None) -> Tensor:
        """(B, S, E) → ids (B, n, L), 0 after EOT."""
        if how.method() == "sampling":
            numbers = range(len(tokens)) if numbers is None else numbers
            shape = how.num_captions, self.max_words
            draws = np.stack(
                [
                    np.random.default_rng([how.seed, number]).random(shape, dtype=np.float32)
                    for number in numbers
                ]
            )
            return sample(
                self.model,
                tokens,
                torch.from_numpy(draws),
                how.temperature or 1.0,
                how.top_p or 1.0,
            )
        if how.method() == "beam":
            return beam_search(
                self.model, tokens, self.max_words, how.beam_size, how.length_penalty
            )[:, None]
        return greedy_search(self.model, tokens, self.max_words)[:, None]

    def _scores(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The mean log-probability (B,) of each caption's ids (B, L), all words in one pass."""
        start = ids.new_full((len(ids), 1), self.model.sot)
        mask = (ids != PAD).long()
        logits = self.model.caption_logits(
            tokens, torch.cat([start, ids[:, :-1]], dim=1), mask
        ).float()
        log_probs = logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
        return (log_probs * mask).sum(dim=1) / mask.sum(dim=1)
