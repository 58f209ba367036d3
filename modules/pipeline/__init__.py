"""A run of either entry script, from options to results: the only package that sees all options.

Imports here are late: predictions need no training, and wrong options are refused without torch.
"""

from modules.options import Options


def run(options: Options) -> None:
    """Predict, or train and evaluate.

    Raises ValueError or OSError for what the user can correct, nearly always before anything is
    written.
    """
    if options.run.do_predict:
        from modules.pipeline.predict import predict

        predict(options)
    else:
        from modules.pipeline.train_or_evaluate import train_or_evaluate

        train_or_evaluate(options)
