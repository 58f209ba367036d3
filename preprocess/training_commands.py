"""Commands that train on a dataset, with values that fit its size."""

from collections.abc import Sequence

from system.command import quote_script, wrap_command

MIN_STEPS = 200  # of a training, so that small datasets are seen often enough
LEAST_MAX_WORDS = 20


def format_training_commands(
    data_words: Sequence[str], num_pairs: int, num_captions: int, longest: int
) -> str:
    """Both stages, and a trial that downloads nothing.

    `data_words` are the options that name the dataset. The numbers are those of the training split;
    `longest` is its longest caption in tokens.
    """
    words = [*data_words, "--max_words", str(max(longest, LEAST_MAX_WORDS))]
    adapt = _choose_sizes(num_captions, largest_batch=128, least_epochs=20, smallest_batch=2)
    finetune = _choose_sizes(num_pairs, largest_batch=16, least_epochs=50)
    trial = _choose_sizes(num_pairs, largest_batch=4, least_epochs=20)
    adapt_words = ["main_task_retrieval.py", "--do_train", *words, *adapt, "--coef_lr", "1e-3"]
    finetune_words = ["CLIP4IDCinference.py", "--do_train", *words, *finetune, "--coef_lr", "1e-3"]
    trial_words = ["CLIP4IDCinference.py", "--do_train", *words, *trial, "--lr", "3e-4"]
    from_demo = ["--init_model", "demo", "--freeze_vision", "--patience", "0"]
    lines = [
        "To train on it, stage 1 and then stage 2 (about 350 MB are downloaded):",
        *_format(*adapt_words, "--output_dir", "runs/stage1"),
        *_format(*finetune_words, "--output_dir", "runs/stage2", "--init_model", "runs/stage1"),
        "For a trial that downloads nothing, from the small model that ships with CLIP4IDC:",
        *_format(*trial_words, *from_demo, "--output_dir", "runs/trial"),
    ]
    return "\n".join(lines)


def _format(script: str, *words: str) -> list[str]:
    return wrap_command(quote_script(script, *words))


def _choose_sizes(
    num_samples: int, largest_batch: int, least_epochs: int, smallest_batch: int = 1
) -> list[str]:
    """Batch size and epochs: a few batches an epoch, and MIN_STEPS steps in all."""
    batch_size = largest_batch
    while batch_size > smallest_batch and batch_size * 3 > num_samples:
        batch_size //= 2
    steps_per_epoch = max(num_samples // batch_size, 1)
    epochs = max(least_epochs, -(-MIN_STEPS // steps_per_epoch))
    return ["--batch_size", str(batch_size), "--batch_size_val", "32", "--epochs", str(epochs)]
