"""Small networks for end-to-end timings: a residual CNN, a vision transformer and a GPT, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18's layout (He et al. 2015) for small images."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for stage in range(4):
            for block in range(2):
                blocks.append(ResidualBlock(inputs, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                inputs = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.start(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.project(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with mean pooling."""

    def __init__(self, width: int, depth: int, heads: int, patch: int = 4, image: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(hidden)).mean(1))


class GPT(nn.Module):
    """GPT-2's layout (Radford et al. 2019), output weights tied to the embedding."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.norm(self.blocks(self.tokens(tokens) + self.position(positions)))
        return functional.linear(hidden, self.tokens.weight).flatten(0, 1)


def make(name: str, batch: int, large: bool = False) -> tuple[nn.Module, tuple[Tensor, Tensor], int]:
    """A network, a random batch for it, and the images or tokens in the batch.

    Args:
        name: "MLP", "ResNet", "ViT" or "GPT".
        large: the size for a GPU: ResNet-18's 11 M parameters, ViT-S's 21 M, GPT-2's 124 M.
    """
    torch.manual_seed(0)
    if name == "GPT":
        vocabulary, context = (50257, 512) if large else (2000, 64)
        tokens = torch.randint(vocabulary, (batch, context + 1))
        sizes = (768, 12, 12) if large else (192, 4, 4)
        return GPT(*sizes, vocabulary, context), (tokens[:, :-1], tokens[:, 1:]), batch * context
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    model: nn.Module
    if name == "MLP":
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        model.append(nn.Linear(256, 10))
    elif name == "ResNet":
        model = ResNet(64 if large else 24)
    else:
        model = VisionTransformer(384, 12, 6) if large else VisionTransformer(192, 4, 4)
    return model, (images, labels), batch


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1].reshape(-1))
