"""What all experiments share: the argument after the colon, the defaults, and the tiny variant."""

from ml_collections import ConfigDict

from internvl_jax import configuration


def options(argument: str, *known: str) -> set[str]:
    """The comma-separated words after a config's colon, "lora,tiny" → {"lora", "tiny"}.

    Raises:
        ConfigError: a word that the config does not know.
    """
    words = {word for word in argument.split(",") if word}
    for word in sorted(words - set(known)):
        hint = configuration.nearest(word, known)
        raise configuration.ConfigError(f"unknown config argument {word!r}; {hint}")
    return words


def experiment() -> ConfigDict:
    """Every field that a run has, with the values that most experiments keep."""
    return ConfigDict(
        dict(
            seed=0,  # of initialisation, data order, augmentation, masking: the run repeats exactly
            objective="contrastive",
            objective_options={},
            model=dict(
                family="internvl",
                size="14b",  # InternViT-6B and QLLaMA-8B
                dtype="bfloat16",  # of activations; parameters and moments are float32
                # What a layer keeps for its backward pass, from the least memory to the least
                # recomputation: "full", "attention", "projections", "dots", "none".
                remat="full",
                unroll=1,  # layers per step of the scan; a CPU likes them all
            ),
            init_from=(),  # dict(path=…, rename=((regex, replacement), …)), in order of precedence
            trainable=".*",  # regex over parameter paths; the rest is frozen
            optimizer=dict(
                learning_rate=((".*", 1e-4),),  # (regex over paths, peak), the first match counts
                schedule="cosine",  # from the peak to zero at the last step
                warmup_steps=0,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                no_decay="",  # regex; biases, norms and layer scales are exempt in any case
                clip_norm=1.0,  # of the global gradient
                layer_decay=(),  # (tower, rate): rate^(layers above) on the learning rate
            ),
            batch_size=1024,  # examples per step over all devices
            chunks=1,  # parts in which a step works through the batch: less memory, same result
            # Towers whose last chunk goes forward once for features and gradient, and holds its
            # activations until the loss is known: a second one costs the memory of a chunk.
            held_towers=1,
            steps=1000,
            data=dict(
                task="contrastive",
                sources=(("scenes", 1.0),),  # (name or FORMAT:PATH, weight), see docs/data.md
                tokenizer="",  # path of a SentencePiece model; "" is the one of this package
                image_size=224,  # pixels per side
                text_length=80,  # tokens; the released code's limit for captions
                languages=("en", "zh", "ko", "es"),  # of the embedded sources
                augment="random_resized_crop",  # or another of data/tasks.py, AUGMENTATIONS
                template="vicuna_v1",  # chat template; only for the task "instruct"
                rounds=1,  # questions per conversation drawn from embedded data; likewise
                max_tiles=1,  # squares that the image of a conversation is cut into; likewise
                packing=0,  # conversations per row on average, see docs/data.md; 0: a row each
                packed_squares=0,  # room for squares in a packed row; 0: for all that may come
                crop_scale=(0.5, 1.0),  # limits of a random crop's share of the area
                decoder="exact",  # Pillow, as the official transforms; "fast" for training
                workers=0,  # processes that make batches; 0: threads of the training process
                max_bad_fraction=1e-3,  # of records; above it the run stops and names the last
                timeout=600.0,  # seconds that a batch may take before the run stops
            ),
            # fsdp may not exceed 128, since the vision tower's width is 3200 = 128 · 25;
            # a pod with more chips sets mesh.replica.
            mesh=dict(replica=1, fsdp=-1, tensor=1),  # -1: all devices that are left
            checkpoint=dict(every=1000, keep=3),  # steps; number of checkpoints kept
            log_every=50,  # steps
            evals={},  # name → dict(every=steps, …)
            max_nonfinite=10,  # skipped updates in a row before the run stops with a report
        )
    )


def tiny(config: ConfigDict) -> ConfigDict:
    """Shrink an experiment to seconds on a CPU: every axis small, embedded data, same code."""
    config.model.update(size="tiny", dtype="float32", remat="none")
    config.init_from = ()
    config.optimizer.warmup_steps = 1
    config.update(batch_size=8, chunks=1, steps=4, log_every=1)
    config.data.update(image_size=32, text_length=48, tokenizer="", template="brief")
    with config.ignore_type():
        config.data.sources = (("scenes", 0.75), ("digits", 0.25))
    config.mesh.update(replica=1, fsdp=-1, tensor=1)
    config.checkpoint.update(every=2, keep=2)
    return config
