"""The CUDA kernels of speculative_mamba, which finds them here."""
