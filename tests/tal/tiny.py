"""A run of seconds: what it changes in the configuration `synthetic`."""

TINY = (
    *("data.drawn={}", "data.annotations=annotations.json", "data.videos=videos", "measure=false"),
    *("sampling.frames=16", "sampling.steps=8", "sampling.short_side=18", "sampling.crop=16", "sampling.stride=4"),
    "backbone.options={embed_dim: 8, depths: [2], num_heads: [2], window_size: [2, 2, 2], drop_path_rate: 0.2, "
    "weight_std: 0.02}",
    "actionformer={channels: 16, levels: 2, window: 3, max_steps: 8, loss_normalizer: 4, head_layers: 1, drop_path: "
    "0.1}",
    *(
        "training.batch=4",
        "training.steps=6",
        "training.warmup=2",
        "training.save_every=3",
        "training.lr=1.0e-3",
        "training.log_every=1",
    ),
)
"""A run of seconds, in which all that is random is there: drop-path, augmentation, order."""

PLAIN = ("backbone.options.drop_path_rate=0.0", "actionformer.drop_path=0.0")
