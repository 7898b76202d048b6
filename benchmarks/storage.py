"""Does it cost accuracy to keep taps rounded? E3VA's ways to do so on real data, three seeds each.

    python benchmarks/storage.py --data DATA --model MODEL --runs RUNS  # dsb2018/{images,semantic}; a Swin

The recipe nuclei-upernet-swin for three epochs, same head, data order and learning rate; the evaluation images are
seen once per run, at the end. A run that is finished already is not trained again.
"""

from __future__ import annotations

import json
import statistics

from record import overrides, quiet, result, save, training_parser

from e3va_peft.training.config import read_config

WAYS = {
    "exact": {},
    "int8": {"tap_storage": "int8"},
    "int4": {"tap_storage": "int4"},
    "one tap a block, int8": {"taps": ["block"], "tap_storage": "int8"},
}
SEEDS = (0, 1, 2)


def main() -> None:
    """Train, or read what is trained, and record."""
    args = training_parser(__doc__).parse_args()
    quiet()
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in SEEDS:
        for way, options in WAYS.items():
            output = f"{args.runs}/{way.replace(' ', '-').replace(',', '')}-seed{seed}"
            config = read_config(
                "nuclei-upernet-swin",
                [
                    f"data.images={args.data}/images",
                    f"data.masks={args.data}/semantic",
                    *overrides(output, args.model, 1e-3, seed),
                    f"method={json.dumps({'name': 'e3va', **options})}",
                    "training.num_train_epochs=3",
                    "data.verify=false",
                ],
            )
            record = result(config)
            scores[way].append(record["metrics"]["mean_iou"])
            print(f"{way}, seed {seed}: mean IoU {scores[way][-1]:.4f}", flush=True)
    rows = [
        {"way": way, "mean_iou": found, "mean": statistics.fmean(found), "deviation": statistics.stdev(found)}
        for way, found in scores.items()
    ]
    save("storage", rows)


if __name__ == "__main__":
    main()
