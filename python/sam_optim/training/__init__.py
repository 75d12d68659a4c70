"""Whole training steps: parts of batches, passes on CUDA streams, captured steps, statistics of BatchNorm."""
