"""The fused operations of the decode path; each is a function with one implementation per backend.

"Activations" are what flows between layers. All of one call have one dtype: float32, or on backends other than ``cpu``
also bfloat16 or float16. Arithmetic is float32 always.

``constant_weights=True`` says that no kernel of the stream writes the named arguments while a call waits for its turn,
as holds for the weights of a model: then CUDA kernels read them before the kernels before have ended. It changes no
result. Without it a call may follow whatever wrote its arguments.
"""

from .attention_verify import attention_verify
from .causal_conv1d_verify import causal_conv1d_verify
from .commit_tokens import commit_tokens
from .embed_tokens import embed_tokens
from .expert_linear import expert_linear
from .mlp_activation import mlp_activation
from .rms_norm import rms_norm
from .sample_tokens import sample_tokens
from .select_experts import select_experts
from .selective_scan_verify import selective_scan_verify
from .skinny_linear import skinny_linear
from .speculative_accept import speculative_accept
from .ssd_verify import ssd_verify

__all__ = [
    "attention_verify",
    "causal_conv1d_verify",
    "commit_tokens",
    "embed_tokens",
    "expert_linear",
    "mlp_activation",
    "rms_norm",
    "sample_tokens",
    "select_experts",
    "selective_scan_verify",
    "skinny_linear",
    "speculative_accept",
    "ssd_verify",
]
