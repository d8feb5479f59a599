"""DiT in plain PyTorch, written from the paper "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).

What: the adaLN-Zero transformer of section 3.2 and figure 3, as a good PyTorch user would write it today: `nn.Linear`,
`F.layer_norm`, `F.scaled_dot_product_attention`. It is the peer that Anneal's speed is measured against.
Contract: parameters carry the names of the published checkpoints, so weights load from either side; `torch_dit.py --check`
compares it with golden numbers. Images are [batch, channels, height, width]; labels equal to `classes` mean "no class".
Not done: dropout, other conditioning than a class, anything that the published presets do not use.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Table 1 of the paper: hidden width, depth, heads.
PRESETS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
FREQUENCIES = 256


def preset(name: str) -> dict:
    """`DiT-S/2` -> sizes of the model."""
    try:
        size, patch = name.removeprefix("DiT-").split("/")
        hidden, depth, heads = PRESETS[size]
        return {"hidden": hidden, "depth": depth, "heads": heads, "patch": int(patch)}
    except (KeyError, ValueError):
        raise SystemExit(f"unknown model {name!r}: use DiT-<S|B|L|XL>/<patch>, for example DiT-S/2") from None


def sine_cosine(position: torch.Tensor, width: int, order: str) -> torch.Tensor:
    """Sinusoids of `position` [n] -> [n, width]; `order` says whether sines or cosines come first."""
    half = width // 2
    rate = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=position.dtype, device=position.device) / half)
    angle = position[:, None] * rate[None]
    waves = {"s": angle.sin(), "c": angle.cos()}
    return torch.cat([waves[order[0]], waves[order[1]]], dim=1)


def grid_positions(side: int, width: int) -> torch.Tensor:
    """Fixed 2-D position table [1, side*side, width]: columns in the first half of the width, rows in the second."""
    axis = torch.arange(side, dtype=torch.float64)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    parts = [sine_cosine(p.reshape(-1), width // 2, "sc") for p in (column, row)]
    return torch.cat(parts, dim=1).float()[None]


def modulate(x_bnd: torch.Tensor, shift_bd: torch.Tensor, scale_bd: torch.Tensor) -> torch.Tensor:
    return x_bnd * (1 + scale_bd[:, None]) + shift_bd[:, None]


def normalize(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, hidden: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, patch)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return self.proj(x_bchw).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t_b: torch.Tensor) -> torch.Tensor:
        return self.mlp(sine_cosine(t_b.float(), FREQUENCIES, "cs"))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, hidden: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, y_b: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(y_b)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x_bnd: torch.Tensor) -> torch.Tensor:
        b, n, d = x_bnd.shape
        q, k, v = self.qkv(x_bnd).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_bhnd = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed_bhnd.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.attn = Attention(hidden, heads)
        self.mlp = Mlp(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: torch.Tensor, c_bd: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_bd).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(normalize(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(normalize(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(hidden, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: torch.Tensor, c_bd: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c_bd).chunk(2, dim=1)
        return self.linear(modulate(normalize(x), shift, scale))


class DiT(nn.Module):
    """forward(x [b,c,h,w], t [b], y [b]) -> [b, c or 2c, h, w]: the noise, and with `learn_sigma` the variance value too."""

    def __init__(self, hidden, depth, heads, patch, image_size, channels, classes, learn_sigma):
        super().__init__()
        self.patch, self.channels, self.classes, self.learn_sigma = patch, channels, classes, learn_sigma
        self.out_channels = 2 * channels if learn_sigma else channels
        self.x_embedder = PatchEmbedder(channels, hidden, patch)
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = LabelEmbedder(classes, hidden)
        self.pos_embed = nn.Parameter(grid_positions(image_size // patch, hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden, patch * patch * self.out_channels)
        self.initialize()

    def initialize(self):
        """Xavier for linear maps, 0.02 normals for the embeddings, zeros for every gate and for the output (section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.data.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        zeros = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in [*zeros, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def unpatchify(self, x_bnk: torch.Tensor, side: int) -> torch.Tensor:
        b, p, c = x_bnk.shape[0], self.patch, self.out_channels
        tiles = x_bnk.view(b, side, side, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return tiles.reshape(b, c, side * p, side * p)

    def forward(self, x_bchw: torch.Tensor, t_b: torch.Tensor, y_b: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x_bchw) + self.pos_embed
        c = self.t_embedder(t_b) + self.y_embedder(y_b)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c), x_bchw.shape[2] // self.patch)
