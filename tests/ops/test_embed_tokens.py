"""Rows of the embedding."""

import pytest
import torch

from speculative_mamba.ops import embed_tokens
from speculative_mamba.ops.recording import record
from speculative_mamba.testing.tolerance import assert_bitwise_equal

DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = (1, 1, 16), (1, 5, 77), (3, 2, 1), (4, 3, 1030)


def make(batch: int, tokens: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a table, each within a wider matrix. The table holds -0, an infinity and the least numbers."""
    wide = torch.randn(9, features + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = wide[:, 2 : 2 + features]
    table[:4, 0] = torch.tensor([-0.0, torch.inf, torch.finfo(dtype).smallest_normal / 4, -torch.finfo(dtype).max])
    ids = torch.arange(batch * (tokens + 2)).view(batch, tokens + 2) * 5 % 9
    return ids[:, 1 : 1 + tokens], table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_the_table(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    ids, table = make(*shape, dtype)
    before = table.clone()
    hidden = embed_tokens(ids, table, backend=backend)
    assert hidden.is_contiguous()
    assert_bitwise_equal(hidden, table.float()[ids.flatten()])
    assert_bitwise_equal(table, before)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_of_the_result(dtype: torch.dtype, out_dtype: torch.dtype, kernels: str) -> None:
    """Catches: a bfloat16 that is cut off."""
    ids, table = make(4, 3, 1030, dtype)
    if kernels == "cpu" and out_dtype is not torch.float32:
        with pytest.raises(ValueError, match=r"^out_dtype must be torch.float32, got"):
            embed_tokens(ids, table, out_dtype=out_dtype, backend=kernels)
        return
    table = table.nan_to_num()
    assert_bitwise_equal(
        embed_tokens(ids, table, out_dtype=out_dtype, backend=kernels), table[ids.flatten()].to(out_dtype)
    )


def test_instruction_sets_and_threads_agree(fused_isas: list[str], select_isa) -> None:
    ids, table = make(40, 3, 1030, torch.bfloat16)
    for isa in fused_isas:
        select_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_bitwise_equal(embed_tokens(ids, table, backend="cpu"), table.float()[ids.flatten()])


def test_a_recording_reads_the_ids_that_are_there_now(cpu: str) -> None:
    ids, table = make(2, 2, 33, torch.bfloat16)
    hidden, recording = record(torch.empty(0), lambda: embed_tokens(ids, table, backend=cpu))
    ids += 1
    ids %= 9
    recording.run()
    assert_bitwise_equal(hidden, table.float()[ids.flatten()])


def test_no_tokens(backend: str) -> None:
    assert embed_tokens(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(3, 5), backend=backend).shape == (0, 5)


@pytest.mark.parametrize(
    ("tokens", "table", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 5), r"tokens must have shape \(B, T\), got \(3,\)"),
        (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(3, 5), "tokens must be torch.int64, got torch.int32"),
        (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(5), r"table must be a matrix, got shape \(5,\)"),
        (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(3, 5).double(), "table must be torch.float32 or"),
        (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(5, 3).t(), "table must be contiguous in its last"),
        (torch.tensor([[0, 3]]), torch.zeros(3, 5), r"tokens must hold token ids from 0 to 2, got \[\[0, 3\]\]"),
        (torch.tensor([[-1]]), torch.zeros(3, 5), "tokens must hold token ids from 0 to 2"),
        (torch.zeros(1, 1, dtype=torch.int64, device="meta"), torch.zeros(3, 5), "tokens is on meta, expected cpu"),
    ],
)
def test_bad_arguments_are_refused(tokens: torch.Tensor, table: torch.Tensor, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        embed_tokens(tokens, table, backend=backend)
