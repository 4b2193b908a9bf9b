"""InternViT in PyTorch, with our weights: what `gpu.py` compares with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from internvl_jax.convert import internvit
from internvl_jax.convert.mapping import TorchTensors
from internvl_jax.models.config import ViTConfig
from internvl_jax.rules import flatten


class Block(nn.Module):
    """A layer under the released keys; attention by PyTorch's fused function."""

    def __init__(self, tower: ViTConfig):
        super().__init__()
        width = tower.width
        self.heads = tower.num_heads
        self.norm1 = nn.RMSNorm(width, tower.eps)
        self.norm2 = nn.RMSNorm(width, tower.eps)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(width, 3 * width, bias=False),
                "q_norm": nn.RMSNorm(width, tower.eps),
                "k_norm": nn.RMSNorm(width, tower.eps),
                "proj": nn.Linear(width, width),
            }
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, tower.mlp_dim), "fc2": nn.Linear(tower.mlp_dim, width)}
        )
        self.ls1 = nn.Parameter(torch.ones(width))
        self.ls2 = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, D]
        attn = self.attn
        q, k, v = attn["qkv"](self.norm1(x)).chunk(3, -1)
        q, k = attn["q_norm"](q), attn["k_norm"](k)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(v.dtype) for a in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + attn["proj"](mixed) * self.ls1.to(x.dtype)
        grown = F.gelu(self.mlp["fc1"](self.norm2(x).to(x.dtype)))
        return x + self.mlp["fc2"](grown) * self.ls2.to(x.dtype)


class Tower(nn.Module):
    """Images [B, 3, H, W] → tokens [B, 1 + N, D]."""

    def __init__(self, tower: ViTConfig):
        super().__init__()
        width = tower.width
        self.recompute = tower.remat == "full"
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, tower.patch_size, tower.patch_size)
        places = torch.zeros(1, 1 + tower.grid**2, width)
        self.embeddings.position_embedding = nn.Parameter(places)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(tower) for _ in range(tower.depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embed = self.embeddings
        x = embed.patch_embedding(x).flatten(2).transpose(1, 2)
        x = torch.cat([embed.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], 1)
        x = x + embed.position_embedding.to(x.dtype)
        for layer in self.encoder.layers:
            if torch.is_grad_enabled() and self.recompute:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


def build(
    tower: ViTConfig, params: dict, pixels: np.ndarray, *, compiled: bool
) -> tuple[Tower, torch.Tensor]:
    """(the tower in float32, images [B, 3, H, W]), on the GPU if there is one.

    compiled: each layer by `torch.compile`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Tower(tower)
    tensors = TorchTensors(internvit.tower_rules(tower), flatten(params), np.float32)
    model.load_state_dict({key: torch.from_numpy(tensors.read(key)) for key in tensors.specs})
    if compiled:
        for layer in model.encoder.layers:
            layer.compile()
    return model, torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(device)


def forward(model: Tower, images: torch.Tensor, dtype: str) -> Callable[[], torch.Tensor]:
    """The forward pass with weights of `dtype`; a call waits for its result."""
    dtype = getattr(torch, dtype)
    model.to(dtype).eval().requires_grad_(False)
    images = images.to(dtype)

    def run() -> torch.Tensor:
        found = model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return found

    return run


def train_step(
    model: Tower, images: torch.Tensor, rate: float, weight_decay: float
) -> Callable[[], float]:
    """One update towards tokens of zero: float32 weights, fused AdamW, bfloat16 on a GPU."""
    optimizer: Any = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=weight_decay, fused=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = model(images).float().square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
