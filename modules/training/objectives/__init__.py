"""What differs between the two stages in training: samples, batch → loss, and the optimizer's settings (SPEC §5)."""

from dataloaders.samples import CaptionSamples, RetrievalSamples

OPTIMIZER = {
    "retrieval": {"schedule": "cosine", "betas": (0.9, 0.98), "eps": 1e-6},
    "caption": {"schedule": "linear", "betas": (0.9, 0.999), "eps": 1e-6},
}


WEIGHT_DECAY = {"retrieval": 0.2, "caption": 0.01}


SAMPLES = {"retrieval": RetrievalSamples, "caption": CaptionSamples}


PATIENCE = {
    "retrieval": None,
    "caption": 11,
}  # epochs in a row without a better score, after which training stops
