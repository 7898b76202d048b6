"""Time of the backbone part of a training step, and of inference: E3VA beside its rivals, interleaved.

    python benchmarks/speed.py [swin-b] [vit-b] [upernet-swin-b] [inference]  # on a quiet machine

The loss is taken on the feature maps, without a head, so that nothing but backbone and adapters counts. Random
weights, fp32, AdamW, two threads, an allocator that keeps its pages; medians over rounds that take one step of every
method in turn, after one round to warm up. Inference is that of the Swin-B classifier, with the highway at random
values, at batch sizes from 1 to 32: latency, and peak of live tensor bytes beyond the weights. What is measured again
replaces its part of `speed.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import METHODS, SETTINGS, STAGES, SWIN_B, Setting, adamw, methods_of
from peft import get_peft_model
from record import RESULTS, keep_pages, origin, quiet
from torch import Tensor, nn
from transformers import SwinBackbone, SwinConfig, ViTConfig, ViTModel

from e3va_peft import E3VAConfig
from e3va_peft.files import write_whole
from e3va_peft.meter import live_bytes

ROUNDS = 5
BATCHES = (1, 2, 4, 8, 16, 32)


class BackbonePart(nn.Module):
    """A backbone whose loss is taken on its feature maps."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> mean square of the feature maps."""
        outputs = self.backbone(pixel_values)
        maps = getattr(outputs, "feature_maps", None) or [outputs.last_hidden_state]
        return torch.stack([feature_map.square().mean() for feature_map in maps]).sum()


PARTS = {
    "swin-b": Setting("Swin-B, 224 px, batch 8", lambda: swin(["stage4"]), 224, 8),
    "vit-b": Setting(
        "ViT-B, 224 px, batch 8", lambda: BackbonePart(ViTModel(ViTConfig(), add_pooling_layer=False)), 224, 8
    ),
    "upernet-swin-b": Setting("Swin-B with four maps, 512 px, batch 2", lambda: swin(STAGES), 512, 2),
}


def swin(out_features: list[str]) -> nn.Module:
    """Build Swin-B for its feature maps."""
    return BackbonePart(SwinBackbone(SwinConfig(**SWIN_B, out_features=out_features)))


def step(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Take a training step and return its seconds."""
    start = time.perf_counter()
    forward().backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    optimizer.zero_grad()
    return seconds


def training_rows(key: str) -> list[dict[str, Any]]:
    """Time every method on one backbone."""
    part = PARTS[key]
    pixel_values = part.inputs()["pixel_values"]
    models = {}
    for method in methods_of(part):
        torch.manual_seed(0)
        model = METHODS[method](part.build()).train()
        models[method] = model, adamw(model)
    rounds = interleaved({name: lambda m=m, o=o: step(lambda: m(pixel_values), o) for name, (m, o) in models.items()})
    return [
        {"setting": part.title, "method": name, "seconds": statistics.median(times), "rounds": times}
        for name, times in rounds.items()
    ]


def interleaved(tasks: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Run all tasks in turn, once to warm up and then in measured rounds."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            seconds = task()
            if number:
                times[name].append(seconds)
    return times


def inference_rows() -> list[dict[str, Any]]:
    """Time inference of base and adapted model at every batch size, and measure its peak."""
    models = {}
    for name, config in {"base": None, "E3VA": E3VAConfig, "E3VA+": E3VAConfig.plus}.items():
        torch.manual_seed(0)
        base = SETTINGS["swin-b"].build().eval()
        models[name] = base if config is None else get_peft_model(base, config(init_weights=False)).eval()
    rows = []
    for batch in BATCHES:
        pixel_values = torch.randn(batch, 3, 224, 224)

        def predict(model: nn.Module, pixel_values: Tensor = pixel_values) -> float:
            start = time.perf_counter()
            with torch.no_grad():
                model(pixel_values=pixel_values)
            return time.perf_counter() - start

        rounds = interleaved({name: lambda m=model, p=predict: p(m) for name, model in models.items()})
        for name, model in models.items():
            rows.append(
                {
                    "setting": "inference",
                    "batch": batch,
                    "method": name,
                    "seconds": statistics.median(rounds[name]),
                    "rounds": rounds[name],
                    "peak_bytes": max(live_bytes(lambda m=model, p=predict: p(m), model)),
                }
            )
    return rows


def main() -> None:
    """Measure what the command line names, all by default."""
    quiet()
    keep_pages()
    torch.set_num_threads(2)
    path, order = RESULTS / "speed.json", [*(part.title for part in PARTS.values()), "inference"]
    for key in sys.argv[1:] or [*PARTS, "inference"]:
        found = inference_rows() if key == "inference" else training_rows(key)
        for row in found:
            print({name: value for name, value in row.items() if name != "rounds"}, flush=True)
        recorded, setting = json.loads(path.read_text()), found[0]["setting"]
        recorded["origins"][setting] = origin()
        rows = [row for row in recorded["rows"] if row["setting"] != setting] + found
        recorded["rows"] = sorted(rows, key=lambda row: order.index(row["setting"]))
        write_whole(path, json.dumps(recorded, indent=2) + "\n")


if __name__ == "__main__":
    main()
