"""The tables of the paper by name: which evaluators run on which sets, with which options."""

from typing import Any

from internvl_jax.evals.evaluator import EvaluatorError, near

_IMAGENETS = (
    "imagenet1k", "imagenet-a", "imagenet-r", "imagenetv2", "imagenet_sketch", "objectnet",
)  # fmt: skip
_TWENTY = (
    "cifar10", "cifar100", "mnist", "caltech101", "sun397", "fgvc_aircraft", "country211", "cars",
    "birdsnap", "dtd", "eurosat", "fer2013", "flowers", "food101", "gtsrb", "pets",
    "renderedsst2", "resisc45", "stl10", "voc2007",
)  # fmt: skip
_EVERY = ("en", "zh", "ja", "ar", "it")
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "linear_probe": {"linear_probe": dict(dataset="imagenet1k", batch_size=1024)},
    "attention_probe": {"attention_probe": dict(dataset="imagenet1k", batch_size=1024)},
    "zero_shot": {"zero_shot": dict(datasets=_IMAGENETS, languages=("en",))},
    "multilingual": {"zero_shot": dict(datasets=("imagenet1k",), languages=_EVERY)},
    "zero_shot_20": {"zero_shot": dict(datasets=_TWENTY, languages=("en",))},
    "retrieval": {
        "retrieval": dict(
            datasets=("flickr30k", "coco", "flickr30k-cn", "coco-cn"), languages=("en", "zh")
        )
    },
    "xtd": {
        "retrieval": dict(
            datasets=("xtd",), languages=("en", "es", "fr", "zh", "it", "ko", "ru", "ja")
        )
    },
    "video": {"video": dict(datasets=("k400", "k600", "k700"), languages=("en",))},
    "msrvtt": {"video": dict(datasets=("msrvtt",), languages=("en",), dual_softmax=True)},
    "captioning": {
        "captioning": dict(datasets=("coco_caption", "flickr30k_caption", "nocaps"))
    },
    "dialogue": {
        "vqa": dict(
            datasets=("vqav2", "gqa", "vizwiz", "textvqa", "okvqa", "pope", "mme", "mmbench")
        )
    },
}
_ADE20K = dict(dataset="ade20k", steps=80000, warmup=1500, rate=4e-5, batch_size=16)
TABLES |= {
    "ade20k_linear": {"segmentation": _ADE20K},
    "ade20k_upernet": {"segmentation": {**_ADE20K, "head": "upernet", "weight_decay": 0.05}},
    "ade20k_tuned": {
        "segmentation": {
            **_ADE20K, "head": "upernet", "weight_decay": 0.05, "tune": True, "layer_decay": 0.95,
        }
    },
}  # fmt: skip


def options(tables: list[str], root: str, partial: bool) -> dict[str, dict[str, Any]]:
    """Evaluators and their options for `evaluator.build`.

    root: where the data sets lie. partial: take what is there of them.

    Raises:
        EvaluatorError: an unknown table, with the list of those there are; or two that need one
            evaluator with different options.
    """
    found: dict[str, dict[str, Any]] = {}
    for table in tables:
        if table not in TABLES:
            raise EvaluatorError(f"unknown table {table!r}{near(table, TABLES)}")
        for name, chosen in TABLES[table].items():
            if name in found:
                raise EvaluatorError(f"{name!r} serves two of these tables; run them one by one")
            found[name] = {**chosen, "root": root, "partial": partial}
    return found
