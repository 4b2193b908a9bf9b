"""Stage 1 and stage 2 in PyTorch, over official state-dict keys, to compare training runs with.

Functions of a dict of tensors, written from the description of the released classes; nothing of
the package is used. Float32 on the CPU.
"""

import torch
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORE = -100


def rms(x, scale, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def attend(q, k, v, heads, visible=None):
    """q [B, T, W], k and v [B, S, W] → [B, T, W]; visible: bool [B, T, S]."""
    q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def vision(w, config, pixels):
    """uint8 [B, H, W, 3] → tokens [B, 1 + N, D]."""
    at = "vision_model."
    vit = config["vision_config"]
    eps = vit["layer_norm_eps"]
    x = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    embed = f"{at}embeddings.patch_embedding"
    x = F.conv2d(
        x.permute(0, 3, 1, 2), w[f"{embed}.weight"], w[f"{embed}.bias"], stride=vit["patch_size"]
    )
    x = x.flatten(2).transpose(1, 2)
    first = w[f"{at}embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w[f"{at}embeddings.position_embedding"]
    for i in range(vit["num_hidden_layers"]):
        p = f"{at}encoder.layers.{i}."
        q, k, v = (rms(x, w[f"{p}norm1.weight"], eps) @ w[f"{p}attn.qkv.weight"].T).chunk(3, -1)
        q = rms(q, w[f"{p}attn.q_norm.weight"], eps)
        k = rms(k, w[f"{p}attn.k_norm.weight"], eps)
        y = attend(q, k, v, vit["num_attention_heads"])
        y = F.linear(y, w[f"{p}attn.proj.weight"], w[f"{p}attn.proj.bias"])
        x = x + y * w[f"{p}ls1"]
        y = rms(x, w[f"{p}norm2.weight"], eps)
        y = F.gelu(F.linear(y, w[f"{p}mlp.fc1.weight"], w[f"{p}mlp.fc1.bias"]))
        x = x + F.linear(y, w[f"{p}mlp.fc2.weight"], w[f"{p}mlp.fc2.bias"]) * w[f"{p}ls2"]
    return x


def pool(w, at, x, heads):
    """The attention pooling head: the mean token asks all."""

    def side(name, y):
        y = F.layer_norm(
            y, y.shape[-1:], w[f"{at}norm1_{name}.weight"], w[f"{at}norm1_{name}.bias"], 1e-5
        )
        return F.linear(y, w[f"{at}cross_attn.{name}.weight"], w[f"{at}cross_attn.{name}_bias"])

    y = attend(side("q", x.mean(1, keepdim=True)), side("k", x), side("v", x), heads)
    return F.linear(y, w[f"{at}cross_attn.proj.weight"], w[f"{at}cross_attn.proj.bias"])[:, 0]


def rotate(x, heads, base):
    """Rotary positions 0, 1, … on [B, T, heads · D], halves rotated against each other."""
    x = x.unflatten(-1, (heads, -1))
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def language(w, config, x, visible, images=None, queries=0):
    """The LLaMA stack over embeddings; with images [B, N, D] the first `queries` look at them."""
    text, every = config["qllama_config"], config["cross_attention_frequency"]
    heads, eps, base = (
        text["num_attention_heads"], text["rms_norm_eps"], text["rope_theta"],
    )  # fmt: skip
    for i in range(text["num_hidden_layers"]):
        p = f"qllama.model.layers.{i}."
        y = rms(x, w[f"{p}input_layernorm.weight"], eps)
        q, k, v = (y @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
        y = attend(rotate(q, heads, base), rotate(k, heads, base), v, heads, visible)
        x = x + y @ w[f"{p}self_attn.o_proj.weight"].T
        if images is not None and i % every == 0:
            c = f"{p}cross_attn."
            asking = rms(x[:, :queries], w[f"{c}norm1.weight"], eps)
            asked = rms(images, w[f"{c}norm2.weight"], eps)
            q = asking @ w[f"{c}q_proj.weight"].T
            k, v = (asked @ w[f"{c}{n}_proj.weight"].T for n in "kv")
            y = attend(q, k, v, heads) @ w[f"{c}o_proj.weight"].T
            x = torch.cat([x[:, :queries] + y, x[:, queries:]], 1)
        y = rms(x, w[f"{p}post_attention_layernorm.weight"], eps)
        y = F.silu(y @ w[f"{p}mlp.gate_proj.weight"].T) * (y @ w[f"{p}mlp.up_proj.weight"].T)
        x = x + y @ w[f"{p}mlp.down_proj.weight"].T
    return rms(x, w["qllama.model.norm.weight"], eps)


def end_state(states, ids):
    return states[torch.arange(len(ids)), (ids > 0).sum(1) - 1]


def contrast(image, text, logit_scale, labels, smoothing=0.0):
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = logit_scale.exp() * image @ text.T
    sides = [F.cross_entropy(s, labels, label_smoothing=smoothing) for s in (logits, logits.T)]
    return sum(sides) / 2


def stage1(w, config, batch):
    """Contrastive loss of the batch."""
    image = pool(w, "clip_projector.", vision(w, config, batch["image"]),
                 config["attn_pool_num_heads"])  # fmt: skip
    ids = batch["text"]
    visible = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & (ids > 0)[:, None]
    states = language(w, config, w["qllama.model.embed_tokens.weight"][ids], visible)
    text = end_state(states, ids) @ w["text_projection"]
    return contrast(image, text, w["logit_scale"], torch.arange(len(ids)))


def stage2(w, config, batch):
    """Matching + contrastive + captioning over [queries | text] rows."""
    count = config["num_query_token"]
    images = vision(w, config, batch["image"])
    size, length = batch["text"].shape
    negatives = size - size // 2
    matching = torch.cat([batch["negative"][:negatives], batch["positive"][negatives:]])
    ids = torch.cat([matching, batch["text"], batch["caption"]])
    is_query = torch.arange(count + length) < count
    causal = torch.ones(count + length, count + length).tril().bool()
    both_queries = is_query[:, None] & is_query
    modes = [
        torch.ones_like(causal),
        both_queries | (~is_query[:, None] & ~is_query & causal),
        both_queries | (~is_query[:, None] & causal),
    ]
    valid = torch.cat([torch.ones(len(ids), count).bool(), ids > 0], 1)
    visible = torch.stack(modes).repeat_interleave(size, 0) & valid[:, None]
    x = torch.cat(
        [w["query_tokens"].expand(len(ids), -1, -1), w["qllama.model.embed_tokens.weight"][ids]], 1
    )
    states = language(w, config, x, visible, images.repeat(3, 1, 1), count)
    queries, texts = states[:, :count].chunk(3), states[:, count:].chunk(3)

    match = F.linear(queries[0], w["itm_head.weight"], w["itm_head.bias"]).mean(1)
    labels = (torch.arange(size) >= negatives).long()
    labels[(matching > 0).sum(1) == 2] = IGNORE
    itm = F.cross_entropy(match, labels)

    image = pool(w, "clip_projector2.", queries[1], config["attn_pool_num_heads"])
    text = end_state(texts[1], batch["text"]) @ w["text_projection"]
    labels = torch.arange(size)
    labels[(batch["text"] > 0).sum(1) == 5] = IGNORE
    itc = contrast(image, text, w["logit_scale"], labels)

    logits = texts[2][:, :-1] @ w["qllama.lm_head.weight"].T
    itg = F.cross_entropy(logits.flatten(0, 1), batch["caption_labels"][:, 1:].flatten())
    return itm + itc + itg
