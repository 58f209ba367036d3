"""The registries: every choice by name, one line each.

Entries are strings, so nothing is imported until it is used.
Datasets have their own registry, `dataloaders.datasets.DATASETS`. How to add an entry, here or from
a package of your own: CONTRIBUTING.md.
"""

from system.registry import Registry

DECODING_METHODS = Registry(
    "decoding method",
    {
        "greedy": ".generation.greedy:generate_greedily",
        "beam": ".generation.beam:generate_by_beam_search",
        "sampling": ".generation.sampling:generate_by_sampling",
    },
    package=__package__,
    group="clip4idc.decoding",
)
METRICS = Registry(
    "metric",
    {
        "bleu": ".metrics.coco:Bleu",
        "meteor": ".metrics.meteor:Meteor",
        "rouge_l": ".metrics.coco:RougeL",
        "cider": ".metrics.coco:Cider",
    },
    package=__package__,
    group="clip4idc.metrics",
    members=("names", "rows", "scores"),
)
PROTOCOLS = Registry(
    "scoring protocol",
    {"coco": ".metrics.coco:COCO_PROTOCOL"},
    package=__package__,
    group="clip4idc.protocols",
    members=("tokenize", "metrics", "derived", "selection", "prepare"),
)
OBJECTIVES = Registry(
    "objective",
    {
        "contrastive": ".training.objectives.contrastive:Contrastive",
        "cross_entropy": ".training.objectives.cross_entropy:CrossEntropy",
        "self_critical": ".training.objectives.self_critical:SelfCritical",
    },
    package=__package__,
    group="clip4idc.objectives",
    members=("task", "samples", "recipe", "needs_captioner"),
)
BACKBONES = Registry(
    "backbone",
    {"clip": ".model.clip:CLIP"},
    package=__package__,
    group="clip4idc.backbones",
    members=(
        "key_prefix",
        "from_weights",
        "encode_pairs",
        "encode_against_first",
        "encode_text",
        "caption_embeddings",
        "vision_tower",
        "part_of",
        "unused_prefixes",
        "joint_attention",
        "blocks",
        "derived_tensors",
        "resize_weights",
        "pretrained_names",
        "info",
        "size_facts",
    ),
)
