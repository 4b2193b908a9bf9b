"""Small PyTorch models under the official names, written from the published description.

Independent of the package: they say what a checkpoint of a family means, and write tiny ones. The
language models that `transformers` has are taken from there.
"""

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers everywhere: kernels by their width, scales around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                embeds = parameter.ndim == 3 or "tokens" in name or "tok_embeddings" in name
                parameter.copy_(noise * (0.5 if embeds else parameter[0].numel() ** -0.5))
            else:
                parameter.copy_((0.0 if "bias" in name else 1.0) + 0.2 * noise)
    return model.eval()


def save(model: nn.Module, path) -> None:
    """The state dict as safetensors."""
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class VisionAttention(nn.Module):
    def __init__(self, width, heads, bias, norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
        if norm:
            self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x):
        batch, count, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.view(batch, count, self.heads, -1).transpose(1, 2) for a in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class VisionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, rms = config["hidden_size"], config["norm_type"] == "rms_norm"
        norm = RMSNorm if rms else lambda w: nn.LayerNorm(w, eps=1e-6)
        self.attn = VisionAttention(
            width, config["num_attention_heads"], config["qkv_bias"], config["qk_normalization"]
        )
        self.norm1, self.norm2 = norm(width), norm(width)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, config["intermediate_size"]),
                "fc2": nn.Linear(config["intermediate_size"], width),
            }
        )
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Vision(nn.Module):
    """InternVisionModel: every hidden state, without a final norm."""

    def __init__(self, config):
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.side = config["image_size"] // patch
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.zeros(1, self.side**2 + 1, width)
        self.embeddings.position_embedding = nn.Parameter(positions)
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.encoder = nn.Module()
        layers = [VisionLayer(config) for _ in range(config["num_hidden_layers"])]
        self.encoder.layers = nn.ModuleList(layers)

    def forward(self, pixels):
        patches = self.embeddings.patch_embedding(pixels)
        grid = tuple(patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(pixels), -1, -1)
        positions = self.embeddings.position_embedding
        if grid != (self.side, self.side):
            table = positions[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
        states = [torch.cat([first, patches], dim=1) + positions]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


def rotary(positions, dim, base):
    angles = positions[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angles, angles], dim=-1)


def rotate(x, angles):
    low, high = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()


class InternLM2Layer(nn.Module):
    """Grouped queries, fused by key/value head: (queries of the group, key, value)."""

    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim, self.base = width // self.heads, config["rope_theta"]
        self.attention = nn.Module()
        rows = (self.heads + 2 * self.groups) * self.dim
        self.attention.wqkv = nn.Linear(width, rows, bias=False)
        self.attention.wo = nn.Linear(self.heads * self.dim, width, bias=False)
        self.feed_forward = nn.ModuleDict(
            {
                "w1": nn.Linear(width, inner, bias=False),
                "w3": nn.Linear(width, inner, bias=False),
                "w2": nn.Linear(inner, width, bias=False),
            }
        )
        eps = config["rms_norm_eps"]
        self.attention_norm, self.ffn_norm = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x):
        batch, count, width = x.shape
        per = self.heads // self.groups
        qkv = self.attention.wqkv(self.attention_norm(x))
        qkv = qkv.view(batch, count, self.groups, per + 2, self.dim)
        q = qkv[..., :per, :].reshape(batch, count, self.heads, self.dim).transpose(1, 2)
        k, v = (qkv[..., i, :].repeat_interleave(per, dim=2).transpose(1, 2) for i in (-2, -1))
        angles = rotary(torch.arange(count), self.dim, self.base)
        mixed = F.scaled_dot_product_attention(
            rotate(q, angles), rotate(k, angles), v, is_causal=True
        )
        x = x + self.attention.wo(mixed.transpose(1, 2).reshape(batch, count, width))
        y, ffn = self.ffn_norm(x), self.feed_forward
        return x + ffn["w2"](F.silu(ffn["w1"](y)) * ffn["w3"](y))


class InternLM2(nn.Module):
    """InternLM2ForCausalLM."""

    def __init__(self, config):
        super().__init__()
        width, vocab = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(vocab, width)
        layers = [InternLM2Layer(config) for _ in range(config["num_hidden_layers"])]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = RMSNorm(width, config["rms_norm_eps"])
        self.output = nn.Linear(width, vocab, bias=False)

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return self.output(self.model.norm(x))


class QllamaLayer(nn.Module):
    """A LLaMA layer over queries alone (all see all), with cross-attention where `vision` is."""

    def __init__(self, width, heads, inner, vision):
        super().__init__()
        self.heads, self.dim = heads, width // heads
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        square = {name: nn.Linear(width, width, bias=False) for name in names}
        self.self_attn = nn.ModuleDict(square)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        if vision:
            self.cross_attn = nn.ModuleDict(
                {
                    "norm1": RMSNorm(width),
                    "norm2": RMSNorm(vision),
                    "q_proj": nn.Linear(width, width, bias=False),
                    "k_proj": nn.Linear(vision, width, bias=False),
                    "v_proj": nn.Linear(vision, width, bias=False),
                    "o_proj": nn.Linear(width, width, bias=False),
                }
            )

    def attend(self, parts, x, other, angles=None):
        def split(a):
            return a.view(*a.shape[:2], self.heads, self.dim).transpose(1, 2)

        q, k = split(parts["q_proj"](x)), split(parts["k_proj"](other))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, split(parts["v_proj"](other)))
        return parts["o_proj"](mixed.transpose(1, 2).flatten(2))

    def forward(self, x, vision):
        y = self.input_layernorm(x)
        x = x + self.attend(self.self_attn, y, y, rotary(torch.arange(x.shape[1]), self.dim, 1e4))
        if hasattr(self, "cross_attn"):
            cross = self.cross_attn
            x = x + self.attend(cross, cross["norm1"](x), cross["norm2"](vision))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def projector(inputs, width):
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


class LlavaChat(nn.Module):
    """InternVL-Chat 1.0: a LLaMA of `transformers`, whose `model` also holds the image side."""

    def __init__(self, vision, select, language, middleware=None):
        super().__init__()
        self.select, self.language = select, [language]  # a list: not a module of its own
        self.model, self.lm_head = language.model, language.lm_head
        tower = Vision(vision)
        width, outputs = vision["hidden_size"], language.config.hidden_size
        self.model.vision_tower = nn.Module()
        if middleware is None:
            self.model.vision_tower.vision_tower = tower
            self.model.mm_projector = projector(width, outputs)
            return
        whole = self.model.vision_tower.vision_tower = nn.Module()
        inner = middleware["width"]
        whole.vision_model, whole.qllama = tower, nn.Module()
        whole.query_tokens = nn.Parameter(torch.zeros(1, middleware["queries"], inner))
        stack = whole.qllama.model = nn.Module()
        stack.embed_tokens = nn.Embedding(middleware["vocab"], inner)
        stack.layers = nn.ModuleList(
            QllamaLayer(
                inner,
                middleware["heads"],
                middleware["mlp"],
                0 if i % middleware["every"] else width,
            )
            for i in range(middleware["depth"])
        )
        stack.norm = RMSNorm(inner)
        self.model.mm_projector = nn.ModuleDict(
            {"mlp1": projector(width, outputs), "mlp2": projector(inner, outputs)}
        )

    def features(self, pixels):
        tower = self.model.vision_tower.vision_tower
        if not hasattr(tower, "qllama"):
            return self.model.mm_projector(tower(pixels)[self.select][:, 1:])
        states = tower.vision_model(pixels)
        x = tower.query_tokens.expand(len(pixels), -1, -1)
        for layer in tower.qllama.model.layers:
            x = layer(x, states[-1])
        both = self.model.mm_projector
        queries = both["mlp2"](tower.qllama.model.norm(x))
        return torch.cat([queries, both["mlp1"](states[self.select][:, 1:])], dim=1)

    def forward(self, before, pixels, after):
        """Logits of ids `before`, the features of one image, ids `after`."""
        embed = self.model.embed_tokens
        x = torch.cat([embed(before), self.features(pixels), embed(after)], dim=1)
        return self.language[0](inputs_embeds=x).logits


class Chat(nn.Module):
    """InternVLChatModel with pixel shuffle 2 × 2, version "v2"."""

    def __init__(self, vision, select, language, width):
        super().__init__()
        self.select = select
        self.vision_model, self.language_model = Vision(vision), language
        inputs = 4 * vision["hidden_size"]
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width)
        )

    def features(self, pixels):
        x = self.vision_model(pixels)[self.select][:, 1:]
        side = int(x.shape[1] ** 0.5)
        # (row, row in pair, column, column in pair, channel): the pair's axes become channels.
        x = x.view(len(x), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(x.reshape(len(x), (side // 2) ** 2, -1))

    def forward(self, before, pixels, after):
        """Logits of ids `before`, the features of one image, ids `after`."""
        embed = self.language_model.get_input_embeddings()
        x = torch.cat([embed(before), self.features(pixels), embed(after)], dim=1)
        if isinstance(self.language_model, InternLM2):
            return self.language_model(x)
        return self.language_model(inputs_embeds=x).logits
