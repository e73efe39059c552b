"""Shapes of models that have every setting somewhere, by name, for tests that go through all of them."""

SHAPES: dict[str, dict[str, object]] = {
    "classic": {"architecture": "classic", "tied": False},
    "classic-tied": {"architecture": "classic", "tied": True},
    "classic-as-gpt2": {
        "architecture": "classic",
        "learned_positions": True,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "tied": True,
    },
    "classic-as-gpt-neo": {
        "architecture": "classic",
        "learned_positions": True,
        "activation": "gelu_erf",
        "scaled_scores": False,
        "window": 7,
        "tied": False,
    },
    "modern": {"tied": False},
    "modern-grouped-tied": {"n_kv_head": 2, "tied": True},
    "modern-without-qk-norm": {"qk_norm": False, "tied": False},
    "modern-head-size": {"head_size": 10, "n_kv_head": 2, "tied": True},
}
