"""Parameter shapes of the benchmarks."""

from __future__ import annotations

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 (He et al. 2015) with 1,000 classes: 161 tensors, 25,557,032 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for convolution in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def tiny() -> list[Shape]:
    """161 tensors of ten elements: what remains is the time to launch."""
    return [(10,)] * 161


def equal(tensors: int, elements: int) -> list[Shape]:
    """``elements`` parameters in tensors of equal size."""
    return [(elements // tensors,)] * tensors


MODELS = {"resnet50": resnet50(), "161 x 10": tiny()}


def vit_b16() -> list[Shape]:
    """ViT-B/16 (Dosovitskiy et al. 2021) with 1,000 classes: 152 tensors, 86,567,656 parameters."""
    width, hidden = 768, 3072
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(hidden, width), (hidden,), (width, hidden), (width,)]
    start: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return [*start, *(shape for _ in range(12) for shape in block), (width,), (width,), (1000, width), (1000,)]


def gpt(width: int, layers: int, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """A GPT-2 (Radford et al. 2019) with output weights tied to the embedding."""
    block: list[Shape] = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [
        (vocabulary, width),
        (context, width),
        *(shape for _ in range(layers) for shape in block),
        (width,),
        (width,),
    ]


def llama(width: int, layers: int, hidden: int, key_width: int, vocabulary: int) -> list[Shape]:
    """A Llama 3 (Grattafiori et al. 2024), output weights of its own."""
    block: list[Shape] = [(width, width), (key_width, width), (key_width, width), (width, width)]
    block += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    ends: list[Shape] = [(vocabulary, width), (width,), (vocabulary, width)]
    return [ends[0], *(shape for _ in range(layers) for shape in block), *ends[1:]]


GPU_MODELS = {
    "161 x 10": tiny(),
    "resnet50": resnet50(),
    "vit_b16": vit_b16(),
    "gpt2": gpt(768, 12),
    "1.24 B": gpt(1984, 24),
    "1000 small": [(1000,)] * 1000,
    "8 B": llama(4096, 32, 14336, 1024, 128256),
}
