"""A run of either entry script, from its options to its results: the only room that knows them all.

Imports here are late: predictions need no training, and wrong options are refused without torch.
"""

from modules.options import Options


def run(options: Options) -> None:
    """Predict, or train and evaluate. What the user can correct is a ValueError or an OSError,
    nearly always raised before anything is written."""
    if options.run.do_predict:
        from modules.pipeline.predict import predict

        predict(options)
    else:
        from modules.pipeline.task import train_or_evaluate

        train_or_evaluate(options)
