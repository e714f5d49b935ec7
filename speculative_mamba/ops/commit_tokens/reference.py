"""The specification in PyTorch."""

import torch

from . import CommitTokensArgs, FinishReason, Record


def commit_tokens(args: CommitTokensArgs) -> torch.Tensor:
    state = args.state
    batch, lookahead = args.draft_tokens.shape
    record = args.draft_tokens.new_zeros(batch, Record.TOKENS + lookahead + 1)
    for row in range(batch):
        if state.active[row]:
            _commit(args, row, record[row])
        state.slots[:, row] = torch.arange(len(state.slots), dtype=torch.int32, device=state.slots.device)
        if state.active[row]:
            state.slots[0, row] = record[row, Record.NUM_COMMITTED] - 1
        else:
            state.slots[:, row] = -1
    return record


def _commit(args: CommitTokensArgs, row: int, record: torch.Tensor) -> None:
    """An active row: fills its record and commits what it says."""
    state, accepted = args.state, args.accepted[row]
    window = torch.cat([args.draft_tokens[row, :accepted], args.next_token[row, None]])
    record[Record.ACCEPTED] = accepted
    record[Record.ROW_STATUS] = args.row_status[row]
    record[Record.DRAFT_STATUS] = _draft_status(args, row)
    record[Record.NUM_DRAFT_TOKENS] = _num_draft_tokens(args, row)
    record[Record.TOKENS : Record.TOKENS + len(window)] = window
    if record[Record.ROW_STATUS] or record[Record.DRAFT_STATUS]:
        state.active[row] = False
        return
    tokens = window[: state.remaining[row]]
    stops = args.is_stop[row, tokens].nonzero()
    if len(stops):
        tokens = tokens[: stops[0] + 1]
    count, position = len(tokens), int(state.positions[row])
    state.last[row] = torch.cat([state.last[row], tokens])[-2:]
    state.positions[row] += count
    state.remaining[row] -= count
    if args.output_counts is not None:
        args.output_counts[row] += torch.bincount(tokens, minlength=args.is_stop.shape[1]).int()
    if args.text is not None:
        into = args.text[row, position : position + count]
        into[:] = tokens[: len(into)]
    reason = FinishReason.NONE
    if len(stops):
        reason = FinishReason.EOS
    elif not state.remaining[row]:
        reason = FinishReason.LENGTH
    record[Record.NUM_COMMITTED] = count
    record[Record.FINISH_REASON] = reason
    state.active[row] = reason == FinishReason.NONE


def _num_draft_tokens(args: CommitTokensArgs, row: int) -> int:
    lookahead = args.draft_tokens.shape[1]
    return lookahead if args.num_draft_tokens is None else min(lookahead, int(args.num_draft_tokens[row]))


def _draft_status(args: CommitTokensArgs, row: int) -> int:
    """The largest of the draft tokens that count: none behind a stop token does."""
    tokens = args.draft_tokens[row, : _num_draft_tokens(args, row)]
    stops = args.is_stop[row, tokens].nonzero()
    count = int(stops[0]) + 1 if len(stops) else len(tokens)
    return 0 if args.draft_status is None or not count else int(args.draft_status[:count, row].max())
