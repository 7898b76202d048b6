"""Memory and time of one training step of E3VA over a frozen base in fp32, bf16, int8 and 4 bits.

    python benchmarks/quantized.py [swin-b] [vit-b] [fp32] [bf16] [int8] [4-bit]

Random weights: memory does not depend on them. AdamW, on the CPU with torch's own number of threads. int8 is torchao's
and 4 bits are bitsandbytes'. Activations are fp32 except over the bf16 base, where they are bf16, which takes several
times as long on a CPU without instructions for it. Time is the median over rounds that take one step of every base in
turn, after one round to warm up.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from memory import SETTINGS, Setting, adamw
from peft import get_peft_model
from record import quiet, save
from speed import interleaved, step
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from e3va_peft import E3VAConfig
from e3va_peft.meter import measure_step
from e3va_peft.meter.step import MIB

HEAD = ["classifier"]
BASES: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": dict,
    "bf16": lambda: {"dtype": torch.bfloat16},
    "int8": lambda: {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEAD)},
    "4-bit": lambda: {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=HEAD
        )
    },
}


def prepare(
    setting: Setting, bases: list[str]
) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor], torch.optim.Optimizer]]:
    """Build model, batch and optimizer of a setting for every base, from the same stored weights."""
    torch.manual_seed(0)
    model = setting.build()
    inputs = setting.inputs()
    prepared = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in bases:
            options = BASES[name]()
            base = type(model).from_pretrained(folder, **options)
            adapted = get_peft_model(base, E3VAConfig()).train()
            pixels = inputs["pixel_values"].to(options.get("dtype", torch.float32))
            prepared[name] = (adapted, inputs | {"pixel_values": pixels}, adamw(adapted))
    return prepared


def main() -> None:
    """Measure the settings and bases named on the command line: by default both classifiers over each base."""
    quiet()
    rows = []
    bases = [name for name in BASES if name in sys.argv] or list(BASES)
    for key in [name for name in ("swin-b", "vit-b") if name in sys.argv] or ("swin-b", "vit-b"):
        prepared = prepare(SETTINGS[key], bases)
        reports = {name: measure_step(*parts, repeats=1) for name, parts in prepared.items()}
        times = interleaved(
            {name: lambda m=m, b=b, o=o: step(lambda: m(**b).loss, o) for name, (m, b, o) in prepared.items()}
        )
        for name, report in reports.items():
            seconds = statistics.median(times[name])
            bytes_only = {field: value for field, value in report.to_dict().items() if not field.endswith("_ms")}
            rows.append({"setting": SETTINGS[key].title, "base": name, **bytes_only, "step_seconds": seconds})
            print(
                f"{SETTINGS[key].title}: {name}: {report.peak_bytes / MIB:.0f} MiB peak, of which parameters "
                f"{report.peak_parameters / MIB:.0f}, {report.saved_bytes / MIB:.0f} MiB saved, {seconds:.2f} s"
            )
        save("quantized", rows, "torchao", "bitsandbytes")


if __name__ == "__main__":
    main()
