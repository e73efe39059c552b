"""What engines have in common: any use of slots gives what each slot alone would."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tinystories.engine.protocol import Engine


def exercise(engine: Engine, rng: np.random.Generator, logits_after: Callable[[list[int]], Any]) -> None:
    """Any order of prefills, frees and steps of any set of the 4 slots; contexts of at most 6 of 11 ids."""

    def close(a: Any, b: Any) -> None:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5, rtol=2e-5)

    content: dict[int, list[int]] = {}
    for action in ["prefill"] * 4 + rng.choice(["prefill", "free", "step", "step", "step"], 8).tolist():
        slot = int(rng.integers(4))
        if action == "prefill":
            content[slot] = rng.integers(0, 11, rng.integers(1, 7)).tolist()
            close(engine.prefill(slot, content[slot]), logits_after(content[slot]))
        elif action == "free":
            engine.free(slot)
            content.pop(slot, None)
        elif ready := [slot for slot, ids in content.items() if len(ids) < 6]:
            slots = rng.permutation(ready)[: rng.integers(1, len(ready) + 1)].tolist()
            ids = rng.integers(0, 11, len(slots)).tolist()
            for slot, one in zip(slots, ids, strict=True):
                content[slot].append(one)
            close(engine.step(slots, ids), [logits_after(content[slot]) for slot in slots])
