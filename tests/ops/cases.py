"""One description of every op: arguments of odd sizes and unlucky strides, what a slot holds, and where a NaN goes.
Each op's own tests and the questions that all of them are asked start from here."""
# ruff: noqa: RUF012 -- nothing changes a description

import math
from typing import Any

import torch
from description import BFLOAT16, FLOAT16, FLOAT32, Arguments, Op, Random

from speculative_mamba.ops.block_weight import quantized
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.ops.replay import ReplayBuffer


class Convolution(Op):
    name = "causal_conv1d_verify"
    per_token, written = ("x", "input_gate", "output_gate"), ("window",)
    base = {
        "batch": 3, "tokens": 5, "channels": 33, "width": 4, "slots": 8, "dtype": FLOAT32, "bias": True,
        "weight": "contiguous", "silu": True, "repeat": 1, "block": None, "input_gate": False, "output_gate": False,
    }  # fmt: skip
    GATED = {"input_gate": True, "output_gate": True}
    changes = (
        {}, {"batch": 1}, {"tokens": 1}, {"tokens": 2}, {"tokens": 16, "slots": 17}, {"channels": 1}, {"channels": 16},
        {"channels": 77}, {"width": 2}, {"width": 3}, {"width": 8}, {"dtype": BFLOAT16}, {"dtype": FLOAT16},
        {"bias": False}, {"weight": "transposed"}, {"weight": "transposed", "dtype": BFLOAT16},
        {"weight": "every second"}, {"contiguous": True}, {"slots": 5}, {"silu": False}, {"repeat": 3, "block": 11},
        {"repeat": 2, "block": 16, "channels": 96}, {"repeat": 3, "block": 32, "channels": 96, "contiguous": True},
        {"repeat": 2, "block": 4, "channels": 40, "silu": False}, {"repeat": 5, "block": 1, "channels": 20},
        {"repeat": 2, "block": 24, "channels": 48}, {"block": 3}, GATED,
        {**GATED, "silu": False, "bias": False, "width": 3, "channels": 64, "contiguous": True},
        {"input_gate": True, "repeat": 3, "block": 11}, {"output_gate": True, "dtype": BFLOAT16, "tokens": 8},
        {**GATED, "repeat": 2, "block": 16, "channels": 96, "width": 8, "dtype": FLOAT16},
    )  # fmt: skip
    large = {"channels": 3001, "tokens": 7}
    nan = (
        ("x", (1, 1, 3), (1, slice(1, 5), 3)),
        ("window", (1, 2, 3), (1, slice(0, 2), 3)),  # the middle of the history: two tokens see it
        ("weight", (3, 0), (slice(None), slice(None), 3)),
        ("bias", (3,), (slice(None), slice(None), 3)),
        ("input_gate", (1, 1, 3), (1, slice(1, 5), 3)),
        ("output_gate", (1, 1, 3), (1, 1, 3)),
    )

    def arguments(self, c: dict, r: Random) -> Arguments:
        channels, width = c["channels"], c["width"]
        x, weight = r.window(channels // c["repeat"]), (r(channels, width) * width**-0.5).to(c["dtype"])
        if c["weight"] == "transposed":
            weight = weight.t().contiguous().t()
        elif c["weight"] == "every second":
            weight = weight.repeat_interleave(2, 1)[:, ::2]
        bias = r(channels) * 0.2 if c["bias"] else None
        window = r.inside(torch.full((c["batch"], width - 1 + c["slots"], channels), math.nan))
        options = {name: c[name] for name in ("silu", "repeat", "block")}
        options["input_gate"] = r.window(x.shape[2]) if c["input_gate"] else None
        options["output_gate"] = r.window(channels) if c["output_gate"] else None
        return {"x": x, "weight": weight, "bias": bias, "window": window, **options}

    def state(self, c: dict, r: Random) -> dict[str, torch.Tensor]:
        return {"history": r(c["batch"], c["width"] - 1, c["channels"])}

    def _history(self, arguments: Arguments, slots: torch.Tensor | int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the W-1 rows that end at a slot."""
        rows, slots = self.chosen(arguments, slots)
        return rows[:, None], slots[:, None] + torch.arange(1, arguments["weight"].shape[1])

    def slot(self, arguments: Arguments, slots: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        return {"history": arguments["window"][self._history(arguments, slots)]}

    def put(self, arguments: Arguments, state: dict[str, torch.Tensor]) -> None:
        arguments["window"][self._history(arguments, None)] = state["history"]

    def unwritten(self, arguments: Arguments, slots: int) -> dict[str, torch.Tensor]:
        (channels, width), batch = arguments["weight"].shape, len(arguments["x"])
        return {"window": torch.full((batch, width - 1 + slots, channels), math.nan)}

    def touched(self, arguments: Arguments, write_slot: int, tokens: int) -> dict[str, torch.Tensor]:
        mask, history = torch.zeros(arguments["window"].shape, dtype=torch.bool), arguments["weight"].shape[1] - 1
        mask[:, history + write_slot : history + write_slot + tokens] = True
        if write_slot == 0:
            mask[:, :history] = True
        return {"window": mask}

    @staticmethod
    def repeated(arguments: Arguments) -> torch.Tensor:
        """What is convolved, (B, T, D): x, gated, with every channel."""
        x, gate, block = arguments["x"], arguments["input_gate"], arguments["block"] or 1
        x = x if gate is None else x * gate
        return x.reshape(*x.shape[:2], -1, 1, block).expand(-1, -1, -1, arguments["repeat"], -1).flatten(2)


class Scan(Op):
    """Slots of states; or one state and the inputs since."""

    per_token, written = ("x", "dt", "B", "C", "z"), ("states",)

    def slot(self, arguments: Arguments, slots: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        return {"state": arguments["states"][self.chosen(arguments, slots)]}

    def put(self, arguments: Arguments, state: dict[str, torch.Tensor]) -> None:
        arguments["states"][self.chosen(arguments, None)] = state["state"]

    def unwritten(self, arguments: Arguments, slots: int) -> dict[str, torch.Tensor]:
        batch, _, *shape = arguments["states"].shape
        return {"states": arguments["states"].new_full((batch, slots, *shape), math.nan)}

    def touched(self, arguments: Arguments, write_slot: int, tokens: int) -> dict[str, torch.Tensor]:
        mask = torch.zeros(arguments["states"].shape, dtype=torch.bool)
        mask[:, write_slot : write_slot + tokens] = True
        return {"states": mask}

    @staticmethod
    def buffer(arguments: Arguments, slots: int) -> ReplayBuffer:
        """Inputs of which none was written, behind a state."""
        B = arguments["B"] if arguments["B"].ndim == 4 else arguments["B"][:, :, None]
        parts = {"x": arguments["x"], "dt": arguments["dt"], "B": B}
        inputs = {name: torch.full((len(part), slots, *part.shape[2:]), math.nan) for name, part in parts.items()}
        inputs["dt"][:, 0] = 0
        return ReplayBuffer(**inputs)


class SelectiveScan(Scan):
    name = "selective_scan_verify"
    base = {
        "batch": 3, "tokens": 5, "channels": 33, "state_size": 16, "b_groups": None, "c_groups": None, "slots": 8,
        "gate": True, "dtype": FLOAT32,
    }  # fmt: skip
    changes = (
        {}, {"batch": 1}, {"tokens": 1}, {"tokens": 2}, {"tokens": 16, "slots": 17}, {"channels": 1}, {"channels": 16},
        {"channels": 77}, {"state_size": 1}, {"state_size": 4}, {"state_size": 5}, {"state_size": 17},
        {"state_size": 33}, {"b_groups": 1, "c_groups": 1}, {"b_groups": 3}, {"c_groups": 33},
        {"b_groups": 11, "c_groups": 3, "state_size": 17}, {"b_groups": 33, "state_size": 17},
        {"b_groups": 3, "c_groups": 2, "channels": 48, "contiguous": True}, {"gate": False}, {"contiguous": True},
        {"contiguous": True, "state_size": 12, "tokens": 17, "slots": 17}, {"contiguous": True, "state_size": 100},
        {"state_size": 129}, {"slots": 5}, {"dtype": BFLOAT16}, {"dtype": FLOAT16},
        {"dtype": BFLOAT16, "tokens": 16, "slots": 17, "state_size": 5},
        {"dtype": FLOAT16, "state_size": 17, "b_groups": 11},
        {"dtype": FLOAT16, "tokens": 16, "slots": 17, "state_size": 33, "contiguous": True},
    )  # fmt: skip
    large = {"channels": 1001, "tokens": 7}
    nan_change = {"b_groups": 3, "c_groups": 11}
    nan = (
        ("x", (1, 2, 3), (1, slice(2, None), 3)),
        ("dt", (1, 2, 3), (1, slice(2, None), 3)),
        ("B", (1, 2, 1, 3), (1, slice(2, None), slice(11, 22))),
        ("C", (1, 2, 1, 3), (1, 2, slice(3, 6))),
        ("z", (1, 2, 3), (1, 2, 3)),
        ("states", (1, 0, 17, 3), (1, slice(None), 17)),
        ("A", (4, 15), (slice(None), slice(None), 4)),
        ("D", (4,), (slice(None), slice(None), 4)),
        ("dt_bias", (4,), (slice(None), slice(None), 4)),
    )

    def arguments(self, c: dict, r: Random) -> Arguments:
        channels, size = c["channels"], c["state_size"]
        groups = {name: () if c[f"{name.lower()}_groups"] is None else (c[f"{name.lower()}_groups"],) for name in "BC"}
        return {
            "x": r.window(channels), "dt": r.window(channels), "A": -r.uniform(channels, size) * size,
            "B": r.window(*groups["B"], size), "C": r.window(*groups["C"], size), "D": r(channels),
            "z": r.window(channels) if c["gate"] else None, "dt_bias": r.uniform(channels) * 3 - 4,
            "states": r.slots(c["batch"], c["slots"], channels, size, dtype=c["dtype"]),
        }  # fmt: skip

    def state(self, c: dict, r: Random) -> dict[str, torch.Tensor]:
        return {"state": r(c["batch"], c["channels"], c["state_size"]).to(c["dtype"])}


class Ssd(Scan):
    name = "ssd_verify"
    base = {
        "batch": 3, "tokens": 5, "heads": 6, "head_size": 21, "state_size": 40, "x_heads": 6, "b_groups": 2,
        "c_groups": 3, "slots": 8, "gate": True, "skip_per_channel": False, "dt_limit": (0.0, math.inf),
        "dtype": FLOAT32,
    }  # fmt: skip
    changes = (
        {}, {"batch": 1}, {"tokens": 1}, {"tokens": 2}, {"tokens": 16, "slots": 17}, {"tokens": 19, "slots": 20},
        {"heads": 1, "x_heads": 1, "b_groups": 1, "c_groups": 1}, {"heads": 36}, {"head_size": 1}, {"head_size": 16},
        {"head_size": 64}, {"state_size": 1}, {"state_size": 5}, {"state_size": 16}, {"state_size": 17},
        {"state_size": 128}, {"state_size": 129, "tokens": 17, "slots": 17}, {"state_size": 300}, {"x_heads": 2},
        {"x_heads": 1}, {"b_groups": 1, "c_groups": 1}, {"b_groups": 6, "c_groups": 1}, {"skip_per_channel": True},
        {"gate": False}, {"dt_limit": (0.01, 0.1)}, {"contiguous": True}, {"head_size": 32, "contiguous": True},
        {"head_size": 64, "state_size": 64, "x_heads": 2, "contiguous": True},
        {"head_size": 16, "state_size": 100, "tokens": 17, "slots": 17, "contiguous": True}, {"slots": 5},
        {"dtype": BFLOAT16}, {"dtype": FLOAT16}, {"dtype": BFLOAT16, "tokens": 16, "slots": 17, "state_size": 5},
        {"dtype": FLOAT16, "tokens": 16, "slots": 17, "state_size": 130, "contiguous": True},
    )  # fmt: skip
    large = {"heads": 36, "tokens": 7}
    # Three heads share x head 1; group 1 of two is that of heads 3 to 5, of three that of heads 2 and 3.
    nan_change = {"x_heads": 2, "dt_limit": (0.01, 0.1)}
    nan = (
        ("x", (1, 2, 1, 17), (1, slice(2, None), slice(3, 6), 17)),
        ("dt", (1, 2, 4), (1, slice(2, None), 4)),
        ("B", (1, 2, 1, 39), (1, slice(2, None), slice(3, 6))),
        ("C", (1, 2, 1, 39), (1, 2, slice(2, 4))),
        ("z", (1, 2, 4, 20), (1, 2, 4, 20)),
        ("states", (1, 0, 4, 20, 39), (1, slice(None), 4, 20)),
        ("A", (4,), (slice(None), slice(None), 4)),
        ("D", (4,), (slice(None), slice(None), 4)),
        ("dt_bias", (4,), (slice(None), slice(None), 4)),
    )

    def arguments(self, c: dict, r: Random) -> Arguments:
        heads, head_size, size = c["heads"], c["head_size"], c["state_size"]
        return {
            "x": r.window(c["x_heads"], head_size), "dt": r.window(heads), "A": -torch.linspace(0.5, 12, heads),
            "B": r.window(c["b_groups"], size), "C": r.window(c["c_groups"], size),
            "D": r(heads, head_size) if c["skip_per_channel"] else r(heads), "dt_bias": r.uniform(heads) * 3 - 4,
            "states": r.slots(c["batch"], c["slots"], heads, head_size, size, dtype=c["dtype"]),
            "z": r.window(heads, head_size) if c["gate"] else None, "dt_limit": c["dt_limit"],
        }  # fmt: skip

    def state(self, c: dict, r: Random) -> dict[str, torch.Tensor]:
        return {"state": r(c["batch"], c["heads"], c["head_size"], c["state_size"]).to(c["dtype"])}


class Attention(Op):
    """Slots are lengths: entries beyond a row's length are NaN, lengths that were not written make no sense."""

    name = "attention_verify"
    per_token, written = ("q", "k", "v"), ("keys", "values", "lengths")
    # The window of one row crosses the end of a block of 32 entries, one row is empty.
    base = {
        "batch": 3, "lengths": (29, 0, 40), "tokens": 5, "heads": 4, "kv_heads": 2, "dims": 20, "pairs": 10,
        "slots": 8, "capacity": 70, "dtype": FLOAT32,
    }  # fmt: skip
    changes = (
        {}, {"batch": 1, "lengths": (63,)}, {"lengths": (30, 62, 59)},  # a token ends a block, or comes just before
        {"lengths": (31, 32, 33), "tokens": 1},
        {"batch": 2, "lengths": (500, 257), "capacity": 600, "dims": 64, "pairs": 32},
        {"batch": 2, "lengths": (253, 511), "capacity": 516}, {"tokens": 2}, {"tokens": 16, "slots": 17},
        {"tokens": 64, "slots": 64, "capacity": 104}, {"heads": 2}, {"heads": 5, "kv_heads": 1},
        {"heads": 1, "kv_heads": 1}, {"heads": 9, "kv_heads": 3}, {"dims": 1, "pairs": 0}, {"dims": 10, "pairs": 5},
        {"dims": 16, "pairs": 3}, {"dims": 77, "pairs": 37}, {"dims": 128, "pairs": 64}, {"pairs": None}, {"slots": 5},
        {"contiguous": True}, {"dtype": BFLOAT16}, {"dtype": FLOAT16},
        {"dtype": BFLOAT16, "tokens": 16, "slots": 17, "dims": 16, "pairs": 8},
        {"dtype": FLOAT16, "heads": 6, "dims": 33, "pairs": 4, "contiguous": True},
    )  # fmt: skip
    large = {"lengths": (900, 7, 500), "heads": 18, "kv_heads": 9, "dims": 64, "capacity": 910}
    nan = (
        ("q", (2, 2, 1, 7), (2, 2, 1)),
        ("k", (2, 2, 1, 7), (2, slice(2, None), slice(2, 4))),
        ("v", (2, 2, 1, 7), (2, slice(2, None), slice(2, 4), 7)),
        ("keys", (2, 1, 33, 7), (2, slice(None), slice(2, None))),
        ("values", (2, 1, 33, 7), (2, slice(None), slice(2, None), 7)),
    )

    def arguments(self, c: dict, r: Random) -> Arguments:
        heads, kv_heads, dims, pairs = c["heads"], c["kv_heads"], c["dims"], c["pairs"]
        packed = r.window(heads + 2 * kv_heads, dims)
        parts = zip("qkv", packed.split([heads, kv_heads, kv_heads], 2), strict=True)
        cache = (kv_heads, c["batch"], c["capacity"], dims)
        return {
            **{name: part.contiguous() if c["contiguous"] else part for name, part in parts},
            "keys": r.slots(*cache, dtype=c["dtype"]).transpose(0, 1),
            "values": r.slots(*cache, dtype=c["dtype"]).transpose(0, 1),
            "lengths": torch.full((c["batch"], c["slots"]), 10**9, dtype=torch.int32),
            "inv_freq": None if pairs is None else 10000.0 ** -(torch.arange(pairs) / max(pairs, 1)),
        }

    def state(self, c: dict, r: Random) -> dict[str, torch.Tensor]:
        entries = (c["batch"], c["kv_heads"], c["capacity"], c["dims"])
        state = {"keys": r(*entries).to(c["dtype"]), "values": r(*entries).to(c["dtype"])}
        return self._cut_off(state, torch.tensor(c["lengths"], dtype=torch.int32))

    @staticmethod
    def _cut_off(state: dict[str, torch.Tensor], lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        beyond = torch.arange(state["keys"].shape[2])[None, None, :, None] >= lengths[:, None, None, None]
        return {name: part.masked_fill(beyond, math.nan) for name, part in state.items()} | {"length": lengths}

    def slot(self, arguments: Arguments, slots: torch.Tensor | int | None = None) -> dict[str, torch.Tensor]:
        entries = {name: arguments[name] for name in ("keys", "values")}
        return self._cut_off(entries, arguments["lengths"][self.chosen(arguments, slots)])

    def put(self, arguments: Arguments, state: dict[str, torch.Tensor]) -> None:
        arguments["keys"].copy_(state["keys"]), arguments["values"].copy_(state["values"])
        arguments["lengths"][self.chosen(arguments, None)] = state["length"]

    def unwritten(self, arguments: Arguments, slots: int) -> dict[str, torch.Tensor]:
        cache = {name: torch.full_like(arguments[name], math.nan) for name in ("keys", "values")}
        return cache | {"lengths": torch.full((len(arguments["q"]), slots), 10**9, dtype=torch.int32)}

    def touched(self, arguments: Arguments, write_slot: int, tokens: int) -> dict[str, torch.Tensor]:
        keys, lengths = arguments["keys"], torch.zeros(arguments["lengths"].shape, dtype=torch.bool)
        lengths[:, write_slot : write_slot + tokens] = True
        first = arguments["lengths"][self.chosen(arguments, None)][:, None]
        at = torch.arange(keys.shape[2])
        entries = (at >= first) & (at < first + self.num_tokens(arguments))
        entries = entries[:, None, :, None].expand_as(keys)
        return {"keys": entries, "values": entries, "lengths": lengths}


class Linear(Op):
    name = "skinny_linear"
    per_token = ("x",)
    base = {"rows": 5, "in_features": 77, "out_features": 37, "dtype": FLOAT32, "bias": False}
    changes = (
        {}, {"rows": 1}, {"rows": 2}, {"rows": 6}, {"rows": 7}, {"rows": 13}, {"rows": 64}, {"rows": 65},
        {"in_features": 1}, {"in_features": 15}, {"in_features": 16}, {"in_features": 33}, {"in_features": 1536},
        {"out_features": 1}, {"out_features": 3}, {"out_features": 64}, {"dtype": BFLOAT16}, {"dtype": FLOAT16},
        {"dtype": "q8_0", "in_features": 32}, {"dtype": "q4_0", "in_features": 96, "out_features": 3},
        {"dtype": "q8_0", "in_features": 4992, "out_features": 61}, {"dtype": "q4_0", "in_features": 4992},
        {"in_features": 5000, "out_features": 11, "rows": 11}, {"contiguous": True},
        {"contiguous": True, "in_features": 768, "dtype": BFLOAT16},
        {"contiguous": True, "in_features": 1536, "dtype": "q8_0", "rows": 7},
    )  # fmt: skip
    large = {"in_features": 1537, "out_features": 801}  # 1.2 million weights: many chunks for any number of threads
    nan_change = {"bias": True}
    nan = (
        ("x", (2, 76), (2,)), ("weight", (7, 76), (slice(None), 7)), ("bias", (7,), (slice(None), 7)),
    )  # fmt: skip

    def arguments(self, c: dict, r: Random) -> Arguments:
        outputs, x = c["out_features"], r.window(c["in_features"])
        weight = r(outputs, c["in_features"])
        if isinstance(c["dtype"], str):
            # Rows differ in size, so that the scale of another row would show.
            weight = quantized(weight * (1 + r.uniform(outputs, 1)), c["dtype"])
        else:
            weight = r.inside(weight.to(c["dtype"]))
        return {"x": x, "weight": weight, "bias": r(outputs) if c["bias"] else None}


class ExpertLinear(Op):
    """Experts that nobody has chosen are NaN."""

    name = "expert_linear"
    per_token = ("x", "experts", "expert_weights")
    base = {
        "rows": 5, "num_experts": 7, "top_k": 3, "inputs": 1, "in_features": 77, "out_features": 37, "dtype": FLOAT32,
        "weighted": False,
    }  # fmt: skip
    SUMMED = {"weighted": True, "inputs": 3}
    changes = (
        {}, SUMMED, {"rows": 1}, {"rows": 1, **SUMMED}, {"rows": 2, "num_experts": 40},
        {"num_experts": 1, "top_k": 1}, {"num_experts": 3, "rows": 23, **SUMMED}, {"inputs": 3}, {"weighted": True},
        {"in_features": 1}, {"in_features": 16, **SUMMED}, {"in_features": 1536, "out_features": 5},
        {"out_features": 1}, {"dtype": BFLOAT16, **SUMMED}, {"dtype": FLOAT16}, {"contiguous": True},
        {"contiguous": True, "in_features": 512, "dtype": BFLOAT16, "num_experts": 64, "top_k": 6},
        {"contiguous": True, "top_k": 6, "inputs": 6, "weighted": True, "rows": 3, "num_experts": 20,
         "out_features": 301},
    )  # fmt: skip
    large = {"in_features": 257, "out_features": 401, "rows": 9, **SUMMED}
    nan_change = {"weighted": True}
    nan = (("x", (2, 0, 76), (2,)), ("expert_weights", (2, 1), (2,)))

    def arguments(self, c: dict, r: Random) -> Arguments:
        rows, count, top_k = c["rows"], c["num_experts"], c["top_k"]
        shape, experts = (count, c["out_features"], c["in_features"]), r.uniform(rows, count).argsort(-1)[:, :top_k]
        matrices = (r(*shape) * c["in_features"] ** -0.5).to(c["dtype"])
        matrices[[e for e in range(count) if e not in experts]] = math.nan
        return {
            "x": r.window(c["inputs"], c["in_features"]), "experts": experts.int().contiguous(),
            "expert_weights": r.uniform(rows, top_k) if c["weighted"] else None,
            "weight": ExpertWeight(tuple(r.inside(matrices))),
        }  # fmt: skip


class SelectExperts(Op):
    name = "select_experts"
    per_token = ("logits",)
    base = {
        "rows": 5, "num_experts": 12, "top_k": 3, "bias": True, "score": "softmax", "groups": 1, "top_k_groups": 1,
        "normalize": True, "epsilon": 0.0, "scale": 1.0,
    }  # fmt: skip
    GROUPS = {"score": "sigmoid", "groups": 4, "top_k_groups": 3, "epsilon": 1e-6, "scale": 2.5}
    changes = (
        {}, {"bias": False}, {"rows": 1}, {"rows": 20}, {"num_experts": 1, "top_k": 1}, {"top_k": 12},
        {"num_experts": 64, "top_k": 6, "bias": False}, {"num_experts": 1024, "top_k": 40}, {"normalize": False},
        {"score": "sigmoid"}, {"score": "sigmoid", "normalize": False, "scale": 0.3}, GROUPS, {**GROUPS, "top_k": 9},
        {**GROUPS, "num_experts": 160, "groups": 40, "top_k_groups": 33, "top_k": 22}, {**GROUPS, "score": "softmax"},
        {"contiguous": True},
    )  # fmt: skip
    large = {"rows": 300, "num_experts": 128, "top_k": 6}
    nan = (("logits", (2, 5), (2,)),)

    def arguments(self, c: dict, r: Random) -> Arguments:
        names = ("top_k", "score", "groups", "top_k_groups", "normalize", "epsilon", "scale")
        options = {name: c[name] for name in names}
        bias = 0.3 * r(c["num_experts"]) if c["bias"] else None
        return {"logits": r.window(c["num_experts"]).mul_(2), "bias": bias, **options}

    def results(self, arguments: Arguments, backend: str, **other: Any) -> dict[str, torch.Tensor]:
        weights, experts = self.call(arguments, backend, **other)
        assert experts.dtype == torch.int32
        return {"y": weights, "experts": experts.float()}

    def exact(self, arguments: Arguments) -> tuple[dict[str, torch.Tensor], Arguments]:
        named, after = super().exact(arguments)
        return {"y": named["y"], "experts": named["residual"].double()}, after


class Norm(Op):
    name = "rms_norm"
    per_token = ("x", "residual", "gate")
    base = {
        "rows": 5, "features": 77, "dtype": FLOAT32, "residual": True, "gate": False, "groups": 1, "scale": 1.0,
        "x_scale": 1.0,
    }  # fmt: skip
    GATED = {"residual": False, "gate": True}
    changes = (
        {}, {"rows": 1}, {"rows": 64}, {"features": 1}, {"features": 15}, {"features": 16}, {"features": 33},
        {"features": 2560}, {"dtype": BFLOAT16}, {"dtype": FLOAT16}, {"residual": False}, {"contiguous": True},
        {"scale": 1e4}, {"scale": 1e-4}, {"x_scale": 0.22}, {"x_scale": 12.0, "residual": False},
        {"x_scale": -0.3, "features": 2560, "contiguous": True}, {"groups": 7}, {"groups": 77}, GATED,
        {**GATED, "rows": 1}, {**GATED, "features": 1}, {**GATED, "features": 16}, {**GATED, "contiguous": True},
        {**GATED, "dtype": BFLOAT16}, {**GATED, "scale": 1e4}, {**GATED, "groups": 11}, {**GATED, "x_scale": 0.22},
        {**GATED, "groups": 2, "features": 66}, {**GATED, "groups": 8, "features": 5120, "dtype": FLOAT16},
    )  # fmt: skip
    large = {"rows": 61, "features": 2561, **GATED, "groups": 13}
    nan = (("x", (2, 76), (2,)), ("residual", (2, 76), (2,)), ("weight", (76,), (slice(None), 76)))

    def arguments(self, c: dict, r: Random) -> Arguments:
        rows, features = c["rows"], c["features"]
        return {
            "x": r.window(features).mul_(c["scale"]), "weight": (1 + 0.3 * r(features)).to(c["dtype"]),
            "residual": r(rows, features) * c["scale"] if c["residual"] else None,
            "gate": r.window(features).mul_(2) if c["gate"] else None, "groups": c["groups"],
            "x_scale": c["x_scale"],
        }  # fmt: skip


class Silu(Op):
    name = "mlp_activation"
    per_token = ("gate", "up")
    base = {"rows": 5, "features": 77, "scale": 1.0}
    changes = (
        {}, {"rows": 1}, {"rows": 64}, {"features": 1}, {"features": 15}, {"features": 16}, {"features": 33},
        {"features": 14336}, {"contiguous": True}, {"scale": 30.0}, {"scale": 1e-4},
    )  # fmt: skip
    large = {"rows": 40, "features": 1000}
    nan = (("gate", (2, 5), (2, 5)), ("up", (4, 40), (4, 40)))

    def arguments(self, c: dict, r: Random) -> Arguments:
        return {name: r.window(c["features"]).mul_(c["scale"]) for name in self.per_token}


CONVOLUTION, SELECTIVE_SCAN, SSD, ATTENTION = Convolution(), SelectiveScan(), Ssd(), Attention()
LINEAR, NORM, SILU = Linear(), Norm(), Silu()
EXPERT_LINEAR, SELECT_EXPERTS = ExpertLinear(), SelectExperts()
SCANS = (SELECTIVE_SCAN, SSD)
WINDOWS = (CONVOLUTION, *SCANS, ATTENTION)
OPS = (*WINDOWS, LINEAR, EXPERT_LINEAR, SELECT_EXPERTS, NORM, SILU)
