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


MODELS = {"resnet50": resnet50(), "161 x 10": tiny()}
