"""The backends but Triton's, which has a package of its own. :mod:`sam_kernels.registry` knows them all."""
