"""The specification in PyTorch."""

import torch

from . import CommitTokensArgs
from .rows import RECORD_COLUMNS


def commit_tokens(args: CommitTokensArgs) -> torch.Tensor:
    drafted, verdicts, rows = args.drafted, args.verdicts, args.rows
    batch, lookahead = drafted.shape
    record = drafted.new_zeros(batch, lookahead + RECORD_COLUMNS)
    for row in range(batch):
        if rows.active[row]:
            window = torch.cat([drafted[row, : args.accepted[row]], args.following[row, None]])
            tokens, stops = _committed(window, args.is_stop, 0 if verdicts[row] else int(rows.room[row]) + 1)
            count, position = len(tokens), int(rows.positions[row])
            record[row, 0], record[row, 1], record[row, 2] = count, args.accepted[row], verdicts[row]
            record[row, 3] = min(lookahead, int(args.limits[row]))
            record[row, 4 : 4 + len(window)] = window
            rows.last[row] = torch.cat([rows.last[row], tokens])[-2:]
            rows.positions[row] += count
            rows.room[row] -= count
            rows.active[row] = not stops and not verdicts[row] and rows.room[row] >= 0
            if args.output_counts is not None:
                args.output_counts[row] += torch.bincount(tokens, minlength=len(args.is_stop)).int()
            if args.text is not None:
                into = args.text[row, position : position + count]
                into[:] = tokens[: len(into)]
        rows.slots[:, row] = torch.arange(len(rows.slots), dtype=torch.int32, device=rows.slots.device)
        if not rows.active[row]:
            rows.slots[:, row] = -1
        if rows.active[row]:
            rows.slots[0, row] = record[row, 0] - 1
    return record


def _committed(window: torch.Tensor, is_stop: torch.Tensor, most: int) -> tuple[torch.Tensor, bool]:
    """The first tokens of a window, up to a stop token or as many as may come; whether it was a stop token."""
    tokens = window[:most]
    stops = is_stop[tokens].nonzero()
    return (tokens[: stops[0] + 1], True) if len(stops) else (tokens, False)
