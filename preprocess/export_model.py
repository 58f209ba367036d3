"""A finetuned checkpoint to a small folder that can be shared: float16 safetensors and model.json.

    python preprocess/export_model.py runs/demo/caption/pytorch_model.bin.best ckpts/demo --trained_on "drawn scenes"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modules.options import OneLineParser, run_and_report  # noqa: E402


def export(checkpoint: Path, folder: Path, trained_on: str) -> None:
    """Write `model.safetensors` and `model.json`; tied tensors are kept once. The checkpoint needs its run's model.json."""
    from safetensors.torch import save_file

    from modules.checkpoint import CARD, read_card, write_card
    from modules.clip4idc import TIED_KEYS
    from modules.files import written_at_once
    from modules.predictor import Predictor
    from modules.pretrained import find_checkpoint

    if not trained_on.strip():
        raise ValueError("--trained_on is empty: say what the model has seen")
    checkpoint = find_checkpoint(str(checkpoint))
    if not read_card(checkpoint):
        raise ValueError(f"no {CARD} beside {checkpoint}: export from the folder of a run")
    predictor = Predictor.load(checkpoint, "cpu", "fp32")
    weights = {key: value.half().contiguous() for key, value in predictor.model.state_dict().items() if key not in TIED_KEYS}
    with written_at_once(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    write_card(folder, predictor.model, predictor.max_words, trained_on=trained_on)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="finetuning's pytorch_model.bin.<epoch>")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--trained_on", required=True, help="what it has seen, for those who use it")
    args = parser.parse_args(argv)
    return run_and_report(parser.prog, lambda: export(args.checkpoint, args.folder, args.trained_on))


if __name__ == "__main__":
    sys.exit(main())
