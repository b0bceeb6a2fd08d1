"""Records the logits of transformers on small random checkpoints, so that the light suite has a parity
check too.

    python tests/parity/record.py        (needs the extra `parity`; rewrites tests/golden/*.npz)

Weights are not stored: a recipe makes them (see checkpoints.py).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from parity.checkpoints import SMALL, Recipe, tokens, write

GOLDEN = Path(__file__).parent.parent / "golden"
LENGTH = 53

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# another number of value heads per key head, other sizes of keys and values, three query heads to one of keys
_ODD = SMALL | {"key_heads": 2, "value_heads": 6, "key_dim": 24, "value_dim": 40, "heads": 6, "hidden": 48}
RECIPES = {
    "qwen3_5_moe": Recipe("qwen3_5_moe", **SMALL),
    "qwen3_5_moe-odd-sizes": Recipe("qwen3_5_moe", **_ODD),
    "qwen3_5_moe-yarn": Recipe("qwen3_5_moe", **SMALL, rope=_YARN, context=64),
    "qwen3_5-tied": Recipe("qwen3_5", **SMALL, tied=True),
    "qwen3_5-untied": Recipe("qwen3_5", **SMALL),
    "qwen3_next": Recipe("qwen3_next", **SMALL),
    "qwen3_next-odd-sizes": Recipe("qwen3_next", **_ODD),
    "qwen3_moe": Recipe("qwen3_moe", **SMALL),
    "qwen3_moe-yarn": Recipe("qwen3_moe", **SMALL, rope=_YARN, context=64),
}


def main() -> None:
    from parity.originals import Transformers

    GOLDEN.mkdir(exist_ok=True)
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            original = Transformers(write(Path(folder) / "model", recipe))
            logits = original.logits(tokens(LENGTH, recipe.vocab))
        np.savez_compressed(GOLDEN / f"{name}.npz", logits=logits)
        print(f"{name}: {logits.shape}, standard deviation {logits.std():.2f}")


if __name__ == "__main__":
    main()
