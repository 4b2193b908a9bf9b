"""Model shapes as frozen dataclasses, the named sizes, and their construction from an experiment.

Published sizes: InternViT-6B and QLLaMA after arXiv 2312.14238 Table 1 and the released configs;
`tiny` exists for tests, `demo` for the embedded job.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from internvl_jax.models.layers import REMAT_POLICIES


class ModelConfigError(ValueError):
    """An unknown family, size or override, or sizes that contradict one another."""


@dataclass(frozen=True)
class ViTConfig:
    """InternViT."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 14
    image_size: int = 224
    norm: str = "rmsnorm"  # or "layernorm" (InternViT-300M)
    qkv_bias: bool = False
    qk_norm: bool = True
    qk_eps: float | None = None  # of the norms of q and k; None: eps
    layer_scale: float = 0.1  # initial value
    drop_path: float = 0.0
    drop_path_schedule: str = "linear"  # or "uniform" (paper Table 20, stage 1)
    eps: float = 1e-6
    dtype: str = "float32"  # of activations; parameters are float32
    remat: str = "none"
    unroll: int = 1  # layers per scan step; a CPU likes them all

    def __post_init__(self) -> None:
        _require(self.width % self.num_heads == 0, "vit width must divide by its heads")
        _require(self.image_size % self.patch_size == 0, "image_size must divide by patch_size")
        _choose("norm", self.norm, ("rmsnorm", "layernorm"))
        _choose("remat", self.remat, tuple(REMAT_POLICIES))
        _choose("drop_path_schedule", self.drop_path_schedule, ("linear", "uniform"))

    @property
    def grid(self) -> int:
        """Patches per side at the native image size."""
        return self.image_size // self.patch_size

    def drop_path_rates(self) -> list[float]:
        """Drop rate of each block: rate·i/(depth−1), or the same everywhere."""
        if self.drop_path_schedule == "uniform":
            return [self.drop_path] * self.depth
        return [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]

    def sharded_dimensions(self) -> list[tuple[str, int, str]]:
        return [
            ("vit 3·width", 3 * self.width, "vit_wide"),
            ("vit width", self.width, "vit_wide"),
            ("vit mlp_dim", self.mlp_dim, "vit_wide"),
        ]


ROPE_SCALINGS = ("linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for texts longer than `original_positions`.

    linear: all divided by `factor`. dynamic: the base grows with the length beyond
    `original_positions` (NTK-aware; InternLM2, Qwen2 in InternVL 3). llama3: only low frequencies
    are divided, with a ramp between two wavelengths. yarn (arXiv 2309.00071): a ramp between two
    numbers of rotations, and the tables times `attention_factor`.
    """

    kind: str
    factor: float
    original_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 · ln(factor) + 1

    def __post_init__(self) -> None:
        _choose("rope scaling", self.kind, ROPE_SCALINGS)


ARCHITECTURES = ("llama", "qwen2", "qwen3", "internlm2")


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA and its relatives: grouped queries, Qwen2's biases, Qwen3's per-head norms.

    `architecture` says under whose names the weights are exchanged with other programs; InternLM2
    is a LLaMA under other names. The ids and `max_positions` are what such a program needs to know
    of the model; nothing is computed from them here.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    eps: float = 1e-6
    rope_base: float = 10000.0
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    o_bias: bool = False
    tie_embeddings: bool = False
    architecture: str = "llama"
    max_positions: int = 2048
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = 0
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        _choose("remat", self.remat, tuple(REMAT_POLICIES))
        _choose("architecture", self.architecture, ARCHITECTURES)
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        if self.head_dim is None:
            _require(self.width % self.num_heads == 0, "llama width must divide by its heads")
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        _require(self.num_heads % self.num_kv_heads == 0, "heads must divide by key/value heads")
        _require(self.head_dim % 2 == 0, "rotary positions need an even head_dim")

    def sharded_dimensions(self) -> list[tuple[str, int, str]]:
        return [
            ("llama width", self.width, "embed"),
            ("llama num_heads", self.num_heads, "heads"),
            ("llama num_kv_heads", self.num_kv_heads, "kv_heads"),
            ("llama mlp_dim", self.mlp_dim, "mlp"),
        ]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on every linear kernel whose path fullmatches `targets`."""

    rank: int
    targets: str = r".*/(attn/(qkv|proj|q|k|v|o)|mlp/\w+)"


@dataclass(frozen=True)
class VisionConfig:
    """A bare vision tower, as InternViT is published on its own."""

    vit: ViTConfig
    lora: LoraConfig | None = None

    def sharded_dimensions(self) -> list[tuple[str, int, str]]:
        return self.vit.sharded_dimensions()


@dataclass(frozen=True)
class LanguageModelConfig:
    """A bare language model (stage 0)."""

    llama: LlamaConfig
    lora: LoraConfig | None = None

    def sharded_dimensions(self) -> list[tuple[str, int, str]]:
        return self.llama.sharded_dimensions()


@dataclass(frozen=True)
class InternVLConfig:
    """InternVL-C (num_queries 0: vision tower, text tower, pooling) or InternVL-G (with QLLaMA)."""

    vit: ViTConfig
    llama: LlamaConfig
    embed_dim: int
    pool_heads: int
    num_queries: int = 0
    cross_every: int = 2  # cross-attention in layers 0, k, 2k, …
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        _require(self.vit.width % self.pool_heads == 0, "vit width must divide by pool_heads")
        _require(self.llama.width % self.pool_heads == 0, "llama width must divide by pool_heads")
        _require(self.cross_every >= 1, "cross_every must be at least 1")

    @property
    def num_cross(self) -> int:
        """Number of cross-attention layers."""
        return -(-self.llama.depth // self.cross_every)

    def sharded_dimensions(self) -> list[tuple[str, int, str]]:
        dimensions = self.vit.sharded_dimensions() + self.llama.sharded_dimensions()
        if self.num_queries:
            dimensions.append(("vision width of cross-attention", self.vit.width, "embed"))
        return dimensions


PROJECTORS = ("mlp", "pixel_shuffle", "two_mlp")


@dataclass(frozen=True)
class ChatConfig:
    """InternVL-Chat: vision tower → projector → language model.

    `projector`: "mlp" maps ViT patches; "pixel_shuffle" folds 2×2 patches first (InternVL 1.1 on);
    "two_mlp" puts the QLLaMA query outputs before the patches (paper Fig. 4d) and needs
    `middleware`.

    `image_token_id` marks image positions in prompts, beside `chat.IMAGE_TOKEN`, where the
    checkpoint's vocabulary has an id for them. `template` names the layout of its conversations.
    `class_names` says that the layout "hf" names weights as the class does, not as released files.
    """

    vit: ViTConfig
    llm: LlamaConfig
    projector: str = "mlp"
    select_layer: int = -1  # hidden state of the tower; -4 in InternVL-Chat 1.0
    shuffle: int = 2  # neighbouring patches per side that "pixel_shuffle" folds into one
    shuffle_version: str = "v2"  # "v1" leaves the shuffled tokens transposed
    image_size: int | None = None  # pixels per side of the tower's input; None: its native size
    image_token_id: int | None = None
    template: str = "vicuna_v1"
    class_names: bool = False
    middleware: InternVLConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        _choose("projector", self.projector, PROJECTORS)
        _choose("shuffle_version", self.shuffle_version, ("v1", "v2"))
        folds = self.projector == "pixel_shuffle"
        side = self.input_size // self.vit.patch_size
        _require(
            not folds or side % self.shuffle == 0,
            f"{side} patches per side cannot be folded {self.shuffle} by {self.shuffle}",
        )
        _require(
            (self.projector == "two_mlp") == (self.middleware is not None),
            "projector 'two_mlp' and a middleware come together",
        )

    @property
    def input_size(self) -> int:
        """Pixels per side of the images this model is fed with."""
        return self.image_size or self.vit.image_size

    @property
    def tokens_per_image(self) -> int:
        """Language-model positions that one image of `input_size` takes."""
        side = self.input_size // self.vit.patch_size
        if self.projector == "pixel_shuffle":
            return (side // self.shuffle) ** 2
        patches = side**2
        return patches + (self.middleware.num_queries if self.middleware else 0)

    def sharded_dimensions(self) -> list[tuple[str, int, str]]:
        dimensions = self.vit.sharded_dimensions() + self.llm.sharded_dimensions()
        return dimensions + (self.middleware.sharded_dimensions() if self.middleware else [])


ModelConfig = InternVLConfig | ChatConfig | LanguageModelConfig | VisionConfig


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ModelConfigError(message)


def _choose(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ModelConfigError(f"{name} {value!r}: choose from {', '.join(options)}")


VITS = {
    "tiny": ViTConfig(width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=8, image_size=32),
    # Wide, shallow, with many small heads: in equal time it learns shapes from few pictures far
    # better than a deep narrow tower does.
    "demo": ViTConfig(
        width=384,
        depth=2,
        num_heads=24,
        mlp_dim=384,
        patch_size=16,
        image_size=48,
        layer_scale=1.0,  # as InternViT-300M: two blocks need no damping
    ),
    "300m": ViTConfig(
        width=1024,
        depth=24,
        num_heads=16,
        mlp_dim=4096,
        image_size=448,
        norm="layernorm",
        qkv_bias=True,
        qk_norm=False,
        layer_scale=1.0,
    ),
    "6b": ViTConfig(width=3200, depth=48, num_heads=25, mlp_dim=12800),
}

_QWEN2_5 = dict(
    vocab_size=151674, rope_base=1e6, qkv_bias=True, architecture="qwen2", max_positions=32768
)
_INTERNLM2_5 = dict(
    vocab_size=92553, rope_base=1e6, eps=1e-5, architecture="internlm2", max_positions=32768
)

LLAMAS = {
    "tiny": LlamaConfig(vocab_size=960, width=32, depth=3, num_heads=2, mlp_dim=64),
    "demo": LlamaConfig(vocab_size=960, width=128, depth=4, num_heads=4, mlp_dim=352),
    # Chinese-LLaMA-Alpaca, the text tower of stage 1 and the trunk of QLLaMA.
    "chinese_7b": LlamaConfig(
        vocab_size=49954, width=4096, depth=32, num_heads=32, mlp_dim=11008
    ),
    "vicuna_7b": LlamaConfig(
        vocab_size=32000, width=4096, depth=32, num_heads=32, mlp_dim=11008, eps=1e-5,
        max_positions=4096,
    ),
    "vicuna_13b": LlamaConfig(
        vocab_size=32000, width=5120, depth=40, num_heads=40, mlp_dim=13824, eps=1e-5,
        max_positions=4096,
    ),
    # Of InternVL 2.5, with the vocabularies of its releases.
    "qwen2.5_0.5b": LlamaConfig(
        width=896, depth=24, num_heads=14, num_kv_heads=2, mlp_dim=4864, **_QWEN2_5
    ),
    "internlm2.5_1.8b": LlamaConfig(
        width=2048, depth=24, num_heads=16, num_kv_heads=8, mlp_dim=8192, **_INTERNLM2_5
    ),
    "qwen2.5_3b": LlamaConfig(
        width=2048, depth=36, num_heads=16, num_kv_heads=2, mlp_dim=11008, **_QWEN2_5
    ),
    "internlm2.5_7b": LlamaConfig(
        width=4096, depth=32, num_heads=32, num_kv_heads=8, mlp_dim=14336, **_INTERNLM2_5
    ),
}

INTERNVLS = {
    "tiny": InternVLConfig(VITS["tiny"], LLAMAS["tiny"], embed_dim=24, pool_heads=2, num_queries=4),
    "demo": InternVLConfig(
        VITS["demo"], LLAMAS["demo"], embed_dim=128, pool_heads=4, num_queries=8, cross_every=1
    ),
    "14b": InternVLConfig(
        VITS["6b"], LLAMAS["chinese_7b"], embed_dim=768, pool_heads=16, num_queries=96
    ),
}

CHATS = {
    "tiny": ChatConfig(VITS["tiny"], LLAMAS["tiny"]),
    "demo": ChatConfig(VITS["demo"], LLAMAS["demo"]),
    # The tower of 224 pixels is fed with 336.
    "vicuna_7b": ChatConfig(VITS["6b"], LLAMAS["vicuna_7b"], select_layer=-4, image_size=336),
    "vicuna_13b": ChatConfig(VITS["6b"], LLAMAS["vicuna_13b"], select_layer=-4, image_size=336),
    **{  # InternVL 2.5
        f"2.5_{size}": ChatConfig(
            VITS["300m"], LLAMAS[llm], projector="pixel_shuffle", template="internvl2_5"
        )
        for size, llm in {
            "1b": "qwen2.5_0.5b",
            "2b": "internlm2.5_1.8b",
            "4b": "qwen2.5_3b",
            "8b": "internlm2.5_7b",
        }.items()
    },
}

VISION_MODELS = {name: VisionConfig(vit) for name, vit in VITS.items()}

LANGUAGE_MODELS = {name: LanguageModelConfig(llama) for name, llama in LLAMAS.items()}

FAMILIES: dict[str, dict[str, ModelConfig]] = {
    "internvl": INTERNVLS,
    "chat": CHATS,
    "language": LANGUAGE_MODELS,
    "vision": VISION_MODELS,
}


def _lookup(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelConfigError(f"unknown {what} {name!r}{hint} Known: {', '.join(table)}")
    return table[name]


def _override(config: Any, overrides: dict[str, Any], used: set[str]) -> Any:
    """Set each override on every (nested) configuration that has a field of that name."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in overrides:
            changes[field.name] = overrides[field.name]
            used.add(field.name)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _override(value, overrides, used)
    return replace(config, **changes)


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """JSON values from which `from_dict` makes this configuration again."""
    for family, sizes in FAMILIES.items():
        for size, named in sizes.items():
            if named == config:
                return {"family": family, "size": size}
    return {"class": type(config).__name__, **dataclasses.asdict(config)}


def _from_fields(kind: type, fields: Mapping[str, Any]) -> Any:
    """The inverse of `dataclasses.asdict`."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(fields) - set(hints))
    if unknown:
        raise ModelConfigError(f"{kind.__name__} has no field {', '.join(unknown)}")
    values = dict(fields)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            inside = [hints[name], *typing.get_args(hints[name])]
            values[name] = _from_fields(next(filter(dataclasses.is_dataclass, inside)), value)
    return kind(**values)


def from_dict(model: Mapping[str, Any]) -> ModelConfig:
    """Experiment fields → model configuration.

    `family` and `size` choose a named configuration; `lora` is None or dict(rank=…, targets=…);
    `middleware` names the InternVL size behind projector "two_mlp". Every other entry overrides the
    field of that name wherever it occurs (`dtype`, `remat`, `unroll`, `image_size`, `drop_path`,
    `num_queries`, …). Or `class` names the configuration and all its fields follow (`to_dict`).

    Raises:
        ModelConfigError: unknown family, size or field (with the nearest valid name), or sizes
            that contradict one another.
    """
    fields = dict(model)
    if "class" in fields:
        kinds = {kind.__name__: kind for kind in typing.get_args(ModelConfig)}
        return _from_fields(_lookup("model class", fields.pop("class"), kinds), fields)
    family = _lookup("model family", fields.pop("family"), FAMILIES)
    config = _lookup("model size", fields.pop("size"), family)
    if fields.get("lora") is not None:
        fields["lora"] = LoraConfig(**fields["lora"])
    if fields.get("middleware") is not None:
        middleware = _lookup("middleware size", fields["middleware"], INTERNVLS)
        inner = {k: v for k, v in fields.items() if k not in ("lora", "middleware", "projector")}
        fields["middleware"] = _override(replace(middleware, vit=config.vit), inner, set())
    used: set[str] = set()
    config = _override(config, fields, used)
    unknown = sorted(set(fields) - used - {"lora", "middleware", "num_queries", "cross_every"})
    if unknown:
        names = sorted({f.name for part in _parts(config) for f in dataclasses.fields(part)})
        near = [difflib.get_close_matches(u, names, n=1, cutoff=0.5) for u in unknown]
        hints = "; ".join(
            f"{u!r}" + (f" (did you mean {n[0]!r}?)" if n else "")
            for u, n in zip(unknown, near, strict=True)
        )
        raise ModelConfigError(f"unknown model field {hints}. Known: {', '.join(names)}")
    return config


def _parts(config: Any) -> list[Any]:
    nested = [getattr(config, f.name) for f in dataclasses.fields(config)]
    return [config] + [p for n in nested if dataclasses.is_dataclass(n) for p in _parts(n)]
