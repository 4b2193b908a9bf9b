"""Numbers of the paper (arXiv 2312.14238) beside ours: figure → {model: value in per cent}.

CIDEr, BLEU and ROUGE are 100 × the figure; MME's are points. The tables' numbers are named after
the figures of the evaluators.
"""

_C, _G = "InternVL-C", "InternVL-G"


def _zero_shot() -> dict[str, dict[str, float]]:
    top1 = {  # Tables 6 and 16
        "imagenet1k.en": 83.2, "imagenet-a.en": 83.8, "imagenet-r.en": 95.5,
        "imagenetv2.en": 77.3, "imagenet_sketch.en": 73.9, "objectnet.en": 80.6,
        "imagenet1k.zh": 64.5, "imagenet1k.ja": 61.5, "imagenet1k.ar": 44.9, "imagenet1k.it": 65.7,
        "cifar10.en": 99.4, "cifar100.en": 93.2, "mnist.en": 80.6, "caltech101.en": 89.5,
        "sun397.en": 76.0, "fgvc_aircraft.en": 52.7, "country211.en": 34.1, "cars.en": 94.2,
        "birdsnap.en": 72.0, "dtd.en": 70.7, "eurosat.en": 79.4, "fer2013.en": 56.2,
        "flowers.en": 86.1, "food101.en": 95.3, "gtsrb.en": 65.5, "pets.en": 96.0,
        "renderedsst2.en": 67.9, "resisc45.en": 74.2, "stl10.en": 99.5, "voc2007.en": 80.0,
    }  # fmt: skip
    return {f"zero_shot.{name}.top1": {_C: value} for name, value in top1.items()}


def _recalls(prefix: str, names: tuple[str, ...], rows: dict[str, str]) -> dict:
    """Rows of numbers in the order of a table; modes c and g in the figures' names."""
    found = {}
    for mode, numbers in rows.items():
        model = {"c": _C, "g": _G}[mode]
        for name, value in zip(names, numbers.split(), strict=True):
            found[prefix.format(mode=mode) + name] = {model: float(value)}
    return found


_WAYS = tuple(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))
_VIDEO_WAYS = tuple(f"{way}_r{k}" for way in ("v2t", "t2v") for k in (1, 5, 10))


def _retrieval() -> dict[str, dict[str, float]]:
    table7 = {
        "flickr30k.{mode}.en.": ("94.7 99.6 99.9 81.7 96.0 98.2", "95.7 99.7 99.9 85.0 97.0 98.6"),
        "coco.{mode}.en.": ("70.6 89.0 93.5 54.1 77.3 84.6", "74.9 91.3 95.2 58.6 81.3 88.0"),
        "flickr30k-cn.{mode}.zh.": (
            "90.3 98.8 99.7 75.1 92.9 96.4", "92.9 99.4 99.8 77.7 94.8 97.3",
        ),
        "coco-cn.{mode}.zh.": (
            "68.8 92.0 96.7 68.9 91.9 96.5", "71.4 93.9 97.7 73.8 94.4 98.1",
        ),
    }  # fmt: skip
    found = {}
    for prefix, rows in table7.items():
        found |= _recalls(f"retrieval.{prefix}", _WAYS, dict(zip("cg", rows, strict=True)))
    xtd = tuple(f"{x}.i2t_r10" for x in ("en", "es", "fr", "zh", "it", "ko", "ru", "ja"))
    found |= _recalls(  # Table 13
        "retrieval.xtd.{mode}.", xtd,
        {"c": "97.3 95.7 95.1 95.6 96.0 92.2 93.3 95.5",
         "g": "98.6 97.7 96.5 96.7 96.9 95.1 94.8 96.1"},
    )  # fmt: skip
    table14 = {
        1: ("35.3 56.6 66.6 37.5 60.9 70.9", "36.6 58.3 67.7 39.1 61.7 70.7"),
        8: ("40.2 63.1 74.1 44.7 68.2 78.4", "42.4 65.9 75.4 46.3 70.5 79.6"),
    }
    for frames, rows in table14.items():
        prefix = f"video.msrvtt.{{mode}}.en.{frames}f."
        found |= _recalls(prefix, _VIDEO_WAYS, dict(zip("cg", rows, strict=True)))
    return found


def _videos() -> dict[str, dict[str, float]]:
    table8 = {
        "k400.en.1f": (65.9, 76.1), "k600.en.1f": (65.5, 75.5), "k700.en.1f": (56.8, 67.5),
        "k400.en.8f": (69.1, 79.4), "k600.en.8f": (68.9, 78.8), "k700.en.8f": (60.6, 71.5),
    }  # fmt: skip
    return {
        f"video.{name}.{metric}": {_C: value}
        for name, values in table8.items()
        for metric, value in zip(("top1", "avg"), values, strict=True)
    }


_PROBE = {  # Table 4
    "imagenet1k": 88.2, "imagenetv2": 79.9, "imagenet-a": 77.5, "imagenet-r": 89.8,
    "imagenet_sketch": 69.1,
}  # fmt: skip
_CHAT = {  # Table 9: Vicuna-13B, MLP at 336 pixels, and with QLLaMA at 336
    "gqa.accuracy": (63.9, 66.6), "textvqa.accuracy": (58.7, 61.5), "pope.f1": (87.1, 87.6),
    "mme.total": (1546.9, 1586.4),
}  # fmt: skip
PUBLISHED: dict[str, dict[str, float]] = {
    **_zero_shot(),
    **_retrieval(),
    **_videos(),
    **{f"linear_probe.{name}.top1": {"InternViT-6B": value} for name, value in _PROBE.items()},
    "segmentation.ade20k.linear.miou": {"InternViT-6B": 47.2},  # Table 5
    "segmentation.ade20k.upernet.miou": {"InternViT-6B": 54.9},
    "segmentation.ade20k.upernet_tuned.miou": {"InternViT-6B": 58.9},
    "captioning.coco_caption.en.cider": {_G: 128.2},  # Table 10
    "captioning.flickr30k_caption.en.cider": {_G: 79.2},
    "captioning.nocaps.en.cider": {_G: 113.7},
    "captioning.coco_caption.en.bleu4": {_G: 37.1},
    "captioning.flickr30k_caption.en.bleu4": {_G: 27.0},
    "captioning.nocaps.en.bleu4": {_G: 44.3},
    **{
        f"vqa.{name}": {"Chat 13B MLP": mlp, "Chat 13B QLLaMA": middleware}
        for name, (mlp, middleware) in _CHAT.items()
    },
}
# Figures in points instead of fractions.
POINTS = ("vqa.mme.", "vqa.embedded.mme")


def percent(name: str, value: float) -> float:
    """A figure on the scale of the published tables."""
    return value if name.startswith(POINTS) else 100 * value
