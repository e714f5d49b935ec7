"""Recorded kernel calls do what the calls themselves would do."""

import functools
import subprocess
import sys

import pytest
import torch

from speculative_mamba.models.language_model import ModelCache
from speculative_mamba.ops import mlp_activation, rms_norm, skinny_linear, ssd_verify
from speculative_mamba.ops.recording import ResultPool, StaleRecordingError, record, torch_op
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.testing.models import ARCHITECTURES, random_model, tiny_architecture, tiny_config
from speculative_mamba.testing.tolerance import assert_bitwise_equal


def chain(x, weight, norm):
    y, residual = rms_norm(skinny_linear(x, weight, backend="cpu"), norm, backend="cpu")
    return y, rms_norm(y, norm, residual, backend="cpu")[1]


def test_run_follows_the_tensors(cpu):
    x, weight, norm = torch.randn(3, 20), torch.randn(9, 20), torch.randn(9)
    results, recording = record(torch.empty(0), chain, x, weight, norm)
    for recorded, direct in zip(results, chain(x, weight, norm), strict=True):
        assert_bitwise_equal(recorded, direct)
    for _ in range(3):
        x.normal_()
        weight.normal_()
        recording.run()
        for recorded, direct in zip(results, chain(x, weight, norm), strict=True):
            assert_bitwise_equal(recorded, direct)


def test_a_recorded_scan_reads_start_slots_and_inputs_at_every_run(cpu):
    """Rounds of one recorded call that replays, against calls with a state per slot."""
    x, dt, BC, A, D = (
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 1, 7),
        -torch.rand(4),
        torch.ones(4),
    )
    slots, start = torch.randn(2, 3, 4, 5, 7), torch.zeros(2, dtype=torch.int32)
    inputs = ReplayBuffer(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3, 1, 7))
    kept = slots[:, :1].clone()
    for step in range(4):
        if step == 0:
            scan = functools.partial(ssd_verify, inputs=inputs, backend=cpu)
            y, recording = record(torch.empty(0), scan, x, dt, A, BC, BC, D, D, kept, start)
        else:
            recording.run()
        assert_bitwise_equal(y, ssd_verify(x, dt, A, BC, BC, D, D, slots, start, backend=cpu))
        start.copy_(torch.tensor([step % 3, 2]))
        x.normal_()
        dt.normal_()


def test_nothing_is_recorded_outside():
    x, weight = torch.randn(1, 4), torch.randn(2, 4)
    y, recording = record(torch.empty(0), lambda: skinny_linear(x, weight, backend="cpu"))
    other = skinny_linear(x, weight, backend="cpu")
    before = other.clone()
    x.zero_()
    recording.run()
    assert y.count_nonzero() == 0 and torch.equal(other, before)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_recorded_step_equals_an_unrecorded_one(batch, length):
    """Tokens and start slots change between calls; a plain list as cache is never recorded."""
    model = random_model(tiny_config(), dtype=torch.bfloat16)
    recorded = model.new_cache(batch, 6)
    plain = list(model.new_cache(batch, 6))
    start = torch.zeros(batch, dtype=torch.int32)
    for step in range(6):
        tokens = torch.randint(0, 61, (batch, length))
        actual, expected = (model.verify(tokens, cache, start) for cache in (recorded, plain))
        assert_bitwise_equal(actual, expected)
        for mine, theirs in zip(recorded, plain, strict=True):
            assert_bitwise_equal(mine.states, theirs.states)
            assert_bitwise_equal(mine.window, theirs.window)
        start = torch.tensor([(step + row) % length for row in range(batch)], dtype=torch.int32)
    assert isinstance(recorded, ModelCache) and len(recorded.steps) == 1


@pytest.mark.parametrize("vocabulary", [61, 40000])
def test_earlier_logits_keep_their_values(vocabulary):
    model = random_model(tiny_config(vocab_size=vocabulary))
    cache, start = model.new_cache(1, 1), torch.zeros(1, dtype=torch.int32)
    first = model.verify(torch.tensor([[3]]), cache, start)
    second = model.verify(torch.tensor([[4]]), cache, start)
    kept = first.clone(), second.clone()
    model.verify(torch.tensor([[5]]), cache, start)
    assert torch.equal(first, kept[0]) and torch.equal(second, kept[1])


def test_memory_is_lent_again_only_when_no_view_is_left():
    pool, source = ResultPool(), torch.randn(3, 40000)
    view = pool.copy(source)[1:, 5:]
    kept = view.clone()
    address = pool.copy(source + 1).data_ptr()
    assert torch.equal(view, kept)
    again = pool.copy(source + 2)
    assert again.data_ptr() == address and torch.equal(view, kept)
    assert torch.equal(again, source + 2)


def test_two_models_may_share_a_cache_shape():
    """A step belongs to the model that recorded it."""
    one, two = (random_model(tiny_config(), seed=seed) for seed in (0, 1))
    start, tokens = torch.zeros(1, dtype=torch.int32), torch.tensor([[7]])
    cache = one.new_cache(1, 1)
    one.verify(tokens, cache, start)
    fresh = two.new_cache(1, 1)
    for mine, theirs in zip(fresh, cache, strict=True):
        theirs.states.copy_(mine.states)
        theirs.window.copy_(mine.window)
    assert_bitwise_equal(two.verify(tokens, cache, start), two.verify(tokens, fresh, start))


def test_a_start_slot_out_of_range_is_refused_at_every_call():
    model = random_model(tiny_config())
    cache = model.new_cache(1, 2)
    for _ in range(2):
        model.verify(torch.tensor([[1]]), cache, torch.zeros(1, dtype=torch.int32))
        with pytest.raises(ValueError, match="start_slot"):
            model.verify(torch.tensor([[1]]), cache, torch.tensor([2], dtype=torch.int32))


def test_memory_that_was_replaced_is_noticed_and_kept():
    """``.data = …``, as adapters are merged: not read as it was, and the memory from before is not free for others."""
    x, weight, norm = torch.randn(3, 20), torch.randn(10, 20), torch.randn(9)
    for change in (
        lambda: setattr(weight, "data", weight.clone()),  # of which the step takes a part
        lambda: setattr(x, "data", x.data[:2]),  # the same address
        lambda: setattr(norm, "data", norm.data.view(torch.int32).view(torch.float32).flip(0)),
        lambda: norm.share_memory_(),  # the same tensor and storage, elsewhere
        lambda: setattr(norm, "data", norm.data.bfloat16()),
    ):
        _, recording = record(torch.empty(0), lambda: chain(x, weight[1:], norm))
        recording.run()
        change()
        with pytest.raises(StaleRecordingError, match="record again"):
            recording.run()


REFUSED = {
    "add.Tensor": lambda y: y + 1,
    "mul_.Tensor": lambda y: y.mul_(2),
    "clone": lambda y: y.t().contiguous(),
    "copy_": lambda y: y[0].copy_(y[1]),
    "cat": lambda y: torch.cat([y, y]),
    "zeros": lambda y: torch.zeros(2),
    "_to_copy": lambda y: y.double(),
    "_local_scalar_dense": lambda y: y[0, 0].item(),
    "silu": torch.nn.functional.silu,
    "transpose_": lambda y: y.transpose_(0, 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_run_again_is_refused_by_name(name):
    x, weight = torch.randn(3, 20), torch.randn(9, 20)

    def refused():
        REFUSED[name](skinny_linear(x, weight, backend="cpu"))

    with pytest.raises(ValueError, match=rf"aten.{name}.*cannot be in a recorded step"):
        record(torch.empty(0), refused)
    refused()  # outside it may


def test_views_and_new_memory_are_no_operations():
    """Memory that a step takes lives as long as its recording, whoever forgets it."""
    x, weight = torch.randn(3, 20), torch.randn(8, 20)

    def step():
        y = skinny_linear(x, weight, backend="cpu")
        left, right = y.split([4, 4], 1)
        product = mlp_activation(left, right.unflatten(1, (2, 2)).flatten(1), backend="cpu")
        return y, product, [torch.empty(5, 7).data_ptr(), torch.empty_like(y).data_ptr()]

    (y, product, addresses), recording = record(torch.empty(0), step)
    assert not {torch.empty(5, 7).data_ptr(), torch.empty_like(y).data_ptr()} & set(addresses)
    x.normal_()
    recording.run()
    y = skinny_linear(x, weight, backend="cpu")
    assert_bitwise_equal(product, mlp_activation(y[:, :4], y[:, 4:], backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, "q4_0"], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_weight_with_other_memory_is_used_from_the_next_step_on(kind, dtype):
    """Whatever weight it is; steps of other shapes notice it too, and states go on where they were."""
    model = random_model(tiny_architecture(kind, seed=1, d=32), dtype=dtype)
    recorded, plain = model.new_cache(1, 2), list(model.new_cache(1, 2))
    start, tokens = torch.zeros(1, dtype=torch.int32), torch.tensor([[7]])

    def check(tokens):
        assert_bitwise_equal(model.verify(tokens, recorded, start), model.verify(tokens, plain, start))

    pair = tokens.expand(1, 2)
    check(pair)
    for weight in model.weights():
        tensor = weight if torch.is_tensor(weight) else weight.data
        check(tokens)
        tensor.data = tensor.clone(memory_format=torch.preserve_format)
        tensor[(0,) * tensor.ndim] += 1
        check(tokens)
    check(pair)
    mixer = model.blocks[0].mixers[0]
    name, weight = next((name, part) for name, part in vars(mixer).items() if torch.is_tensor(part) and part.ndim == 1)
    object.__setattr__(mixer, name, weight * 2)
    check(tokens)


def test_a_first_step_imports_no_compiler():
    """PyTorch's takes seconds and 150 MB, and comes with its dispatch modes unless they say that they need none."""
    program = (
        "import sys, torch, speculative_mamba as sm\n"
        "model = sm.load_model('builtin:draft')\n"
        "model.verify(torch.tensor([[1]]), model.new_cache(1, 1), torch.zeros(1, dtype=torch.int32))\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pytorch_runs_again_between_kernels_where_torch_op_calls_it(cpu):
    """Catches: the operation before or behind both kernels; another that is let through from then on."""
    x, weight, doubled = torch.randn(2, 5), torch.randn(4, 5), torch.empty(2, 4)

    def step():
        y = skinny_linear(x, weight, backend=cpu)
        torch_op(torch.mul, y, 2, out=doubled)
        z = mlp_activation(doubled, backend=cpu)
        with pytest.raises(ValueError, match=r"^aten\.mul\.Tensor is PyTorch's"):
            y * 2
        return z

    z, recording = record(torch.empty(0), step)
    for _ in range(2):
        x.normal_()
        recording.run()
        assert_bitwise_equal(z, mlp_activation(2 * skinny_linear(x, weight, backend=cpu), backend=cpu))
    torch_op(doubled.zero_)
    assert not doubled.any()
