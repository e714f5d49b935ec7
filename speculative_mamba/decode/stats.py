"""What a run did and what it cost."""

import resource
import sys
from dataclasses import asdict, dataclass, field

import torch

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@dataclass
class GenerationStats:
    """Counts over all rows; times in seconds of wall clock.

    rounds: target calls after prefill. row_rounds: rounds in which a row was still generating, summed over rows.
    tokens: tokens committed. drafted: tokens proposed to rows that were still generating. tested: drafted tokens that
    were compared with the target, that is all up to and including the first rejection, and none behind a stop.
    accepted: tested tokens that became text. The lists count by position in the window.
    setup_s covers memory and CUDA graphs, where they are not there from an earlier call; prefill_s both models'
    prompts; decode_s everything after, of which draft_s is proposing and verify_s all else of rounds (0 with "graph",
    where a whole round is one call).
    draft_dropped_at: with lookahead "auto", after how many rounds the draft was given up because it did not pay; None:
    never. peak_bytes: the most memory that the process ever had, weights that were read from their file included; on a
    GPU the most that PyTorch had allocated there (``torch.cuda.reset_peak_memory_stats`` starts anew).
    """

    prompt_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    row_rounds: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    tested_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    setup_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    draft_dropped_at: int | None = None
    peak_bytes: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / tested; None when nothing was tested."""
        return self.accepted / self.tested if self.tested else None

    @property
    def tokens_per_round(self) -> float | None:
        """Mean tokens that a row gains in a round; plain decoding has 1."""
        return self.tokens / self.row_rounds if self.row_rounds else None

    @property
    def tokens_per_s(self) -> float | None:
        """tokens / decode_s, prefill not included."""
        return self.tokens / self.decode_s if self.decode_s > 0 else None

    def count(self, drafted: int, agreed: int, committed: int) -> tuple[int, int]:
        """Books one row's round: ``agreed`` of ``drafted`` tokens matched, ``committed`` tokens became text. Tested and
        accepted ones."""
        accepted = min(agreed, committed)
        tested = min(agreed + 1, drafted, committed)
        self.row_rounds += 1
        self.tokens += committed
        self.drafted += drafted
        self.accepted += accepted
        self.tested += tested
        for position in range(tested):
            self.tested_per_position[position] += 1
            self.accepted_per_position[position] += position < accepted
        return tested, accepted

    def measure_memory(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT

    def as_dict(self) -> dict:
        """All of the above, ready for JSON."""
        derived = {
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "tokens_per_s": self.tokens_per_s,
        }
        return asdict(self) | derived
