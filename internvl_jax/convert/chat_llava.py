"""InternVL-Chat 1.0 in the layout of LLaVA: Vicuna, two-layer projector, the tower inside.

With the projector `two_mlp` (paper Fig. 4d) the tower is a whole InternVL-14B, of which the chat
model needs InternViT, the queries and the middleware; such weights were never published, so their
names follow those of the parts. config.json does not describe the tower; its shapes do, with the
published head sizes, unless entries that this project writes ("vision_config", "qllama_config", …)
say more.
"""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert import from_shapes, internvit, internvl, llama
from internvl_jax.convert.config_json import ConfigError, get, require
from internvl_jax.convert.mapping import LeadingOnes, Rule, Same, Shape, Transpose
from internvl_jax.models.config import ChatConfig, InternVLConfig, ViTConfig

HOLDS = ChatConfig

TOWER = "model.vision_tower.vision_tower."
PROJECTORS = {"mlp2x_gelu": "mlp", "two_mlp": "two_mlp"}
NATIVE, INPUT = 224, 336  # a tower trained at 224 pixels is fed with 336


def config_from_json(
    config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape]
) -> ChatConfig:
    """ChatConfig of a LLaVA config.json."""
    require(config, "mm_projector_type", tuple(PROJECTORS), where)
    require(config, "mm_vision_select_feature", ("patch",), where)
    require(config, "mm_use_im_start_end", (False,), where)
    require(config, "mm_use_im_patch_token", (False,), where)
    projector = PROJECTORS[get(config, "mm_projector_type", where)]
    inner = f"{TOWER}vision_model." if projector == "two_mlp" else TOWER
    if "vision_config" in config:
        vit = internvit.tower_from_json(config["vision_config"], f"vision_config of {where}")
    else:
        embeddings = (
            f"{inner}embeddings.position_embedding",
            f"{inner}embeddings.patch_embedding.weight",
        )
        vit = from_shapes.vit(shapes, embeddings, f"{inner}encoder.layers.", where)
    language = {**config, "model_type": "llama"}  # the class is a LLaMA under its own name
    return ChatConfig(
        vit=vit,
        llm=llama.with_head_of(llama.config_from_json(language, where), shapes, ""),
        projector=projector,
        select_layer=config.get("mm_vision_select_layer", -1),
        image_size=INPUT if vit.image_size == NATIVE else None,
        template="vicuna_v1",
        middleware=_middleware(config, vit, where, shapes) if projector == "two_mlp" else None,
    )


def _middleware(
    config: Mapping[str, Any], vit: ViTConfig, where: str, shapes: Mapping[str, Shape]
) -> InternVLConfig:
    """The middleware behind the second projector; pooling is no part of the chat model."""
    queries = get(shapes, f"{TOWER}query_tokens", where)[1]
    crossing = [key for key in shapes if key.endswith(".cross_attn.norm1.weight")]
    layers = sorted(int(key.split(".")[-4]) for key in crossing)
    if "qllama_config" in config:
        text = llama.config_from_json(config["qllama_config"], f"qllama_config of {where}")
    else:
        text = from_shapes.llama(shapes, f"{TOWER}qllama.model.", where)
    every = layers[1] - layers[0] if len(layers) > 1 else max(text.depth, 1)
    return InternVLConfig(
        vit=vit,
        llama=text,
        embed_dim=config.get("clip_embed_dim", 768),
        pool_heads=config.get("attn_pool_num_heads", 16),
        num_queries=queries,
        cross_every=every,
    )


def config_to_json(config: ChatConfig) -> dict[str, Any]:
    """The config.json of the LLaVA-style class, with the tower's as a further entry."""
    names = {ours: theirs for theirs, ours in PROJECTORS.items()}
    if config.projector not in names:
        raise ConfigError(
            f"the layout chat-llava needs the projector {' or '.join(names)}, not "
            f"{config.projector!r}; export with the layout chat or hf"
        )
    if config.llm.architecture != "llama":
        raise ConfigError(
            f"the layout chat-llava holds LLaMA only, not {config.llm.architecture}"
        )
    entries = llama.config_to_json(config.llm) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_projector_type": names[config.projector],
        "mm_hidden_size": config.vit.width,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_tower": f"./pretrained/intern_vit_6b_{config.vit.image_size}px",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "vision_config": internvit.tower_to_json(config.vit),
    }
    if config.middleware is not None:
        inner = config.middleware
        entries |= {
            "qllama_config": llama.config_to_json(inner.llama),
            "clip_embed_dim": inner.embed_dim,
            "attn_pool_num_heads": inner.pool_heads,
            "mm_vision_tower": "./pretrained/internvl_14b_224px",
        }
    return entries


def rules(config: ChatConfig) -> tuple[Rule, ...]:
    """The whole model."""
    language = (
        *llama.rules(config.llm, "model.", "llm"),
        *llama.head_rules(config.llm, "", "llm"),
    )
    if config.middleware is None:
        return (
            *language,
            *internvit.tower_rules(config.vit, TOWER),
            *_projector_rules("model.mm_projector.", "projector"),
        )
    inner = config.middleware.llama
    middleware = f"{TOWER}qllama.model."
    return (
        *language,
        *internvit.tower_rules(config.vit, f"{TOWER}vision_model."),
        *_projector_rules("model.mm_projector.mlp1.", "projector"),
        *_projector_rules("model.mm_projector.mlp2.", "query_projector"),
        Rule(f"{TOWER}query_tokens", "queries", LeadingOnes(1)),
        *llama.rules(inner, middleware),
        *internvl.cross_rules(inner, config.middleware.cross_every, middleware),
    )


def _projector_rules(torch: str, ours: str) -> tuple[Rule, ...]:
    """Two linear layers with a GELU, which has no key, between them."""
    return tuple(
        rule
        for number, name in (("0", "fc1"), ("2", "fc2"))
        for rule in (
            Rule(f"{torch}{number}.weight", f"{ours}/{name}/kernel", Transpose()),
            Rule(f"{torch}{number}.bias", f"{ours}/{name}/bias", Same()),
        )
    )


def ignore(config: ChatConfig) -> tuple[str, ...]:
    """Keys that need no place: old buffers, and heads of InternVL-14B that chat does not use."""
    unused = r"(text_projection|logit_scale|clip_projector2?\..*|itm_head\..*|qllama\.lm_head\..*)"
    return (*llama.IGNORE, TOWER.replace(".", r"\.") + unused)
