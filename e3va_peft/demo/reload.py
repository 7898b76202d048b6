"""`python -m e3va_peft.demo.reload ADAPTER OUTPUT`: load an adapter and save what it predicts for the test slices."""

from __future__ import annotations

import sys

import numpy as np

from e3va_peft import load_adapter
from e3va_peft.demo.data import mni152_slices
from e3va_peft.demo.run import predict, quieten


def main() -> None:
    """Run the module's two arguments."""
    adapter, output = sys.argv[1:]
    quieten()
    model, _ = load_adapter(adapter)
    np.save(output, predict(model, mni152_slices()[1]).numpy())


if __name__ == "__main__":
    main()
