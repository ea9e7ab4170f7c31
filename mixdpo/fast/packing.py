"""Fewer tokens for the same texts: a prompt once for both responses, and rows without padding.

    preferences.rows_of    prompt chosen 0 0 | prompt rejected          two rows a pair, padded
    shared                 prompt chosen rejected 0                     one row a pair; responses do not see each other
    packed                 prompt chosen rejected prompt chosen ...     one row for all pairs, without padding

The log-probs of the response tokens are the same, up to rounding.
"""

import torch
import torch.nn.functional as F

from mixdpo.models.attention import Packed, branches
from mixdpo.preferences import Batch, Rows, rows_of

SHARED = 0.9    # prompts are shared where that leaves no more than this share of the plain rows' tokens


def compact_rows(batch: Batch, shared: bool | None = None, packed: bool = False) -> Rows:
    """Equals preferences.rows_of(batch) in fewer tokens. shared: each prompt once, both responses behind it; None:
    where that saves enough (SHARED). packed: all texts in one row."""
    rows, (_, R, T) = rows_of(batch), batch.ids.shape
    longest = int((batch.start + (batch.length - batch.start[:, None]).sum(1)).max())  # of a pair's texts in one row
    if shared is None:
        shared = longest <= SHARED * R * T
    if shared:
        rows, branch = behind_one_prompt(batch, rows.token % T, rows.targets, rows.sequence, longest)
    else:
        in_text = torch.arange(T, device=batch.ids.device) < batch.length[..., None]  # (B, 2, T)
        branch = in_text.flatten(0, 1).long() - 1  # (2B, T) 0 in the text, -1 in padding
    return pack(rows, branch) if packed else rows


def behind_one_prompt(batch: Batch, position, targets, sequence, longest: int) -> tuple[Rows, torch.Tensor]:
    """A row a pair: prompt | chosen | rejected | padding; and which of these each token is in (B, longest), as 0, 1, 2
    and -1. Rankings have R responses. position (M,): of each response token, in its row so far."""
    start, R = batch.start, batch.ids.shape[1]
    pair, side = sequence // R, sequence % R
    tokens = batch.length - start[:, None]  # (B, R) of each response
    place = position + (tokens.cumsum(1) - tokens)[pair, side]  # (M,) in the row: behind the earlier responses
    before = torch.where(position == start[pair], position, place) - 1  # all begin behind the prompt's last token
    ids = torch.zeros(len(batch.ids), longest, dtype=torch.int64, device=start.device)
    in_prompt = torch.arange(longest, device=start.device) < start[:, None]  # (B, longest)
    ids[in_prompt] = batch.ids[:, 0][in_prompt[:, : batch.ids.shape[-1]]]
    ids[pair, place] = targets
    branch = in_prompt.long() - 1  # 0 in the prompt, -1 in padding
    branch[pair, place] = 1 + side
    first = pair * longest
    return Rows(ids, branches(branch), first + place, first + before, targets, sequence), branch


def pack(rows: Rows, branch: torch.Tensor) -> Rows:
    """The same rows (N, T), their tokens behind one another in one; branch (N, T): -1 in padding, which is left out.
    Filled up to a multiple of 128, the block of a GPU's attention."""
    (N, T), kept = rows.ids.shape, (branch >= 0).flatten()
    place, fill = kept.cumsum(0) - 1, (0, -int(kept.sum()) % 128)  # (N*T,) where each token goes
    positions = torch.arange(T).expand(N, T) if rows.window is None else rows.window.positions
    row = torch.arange(N)[:, None].expand(N, T)
    ids, positions, branch = (F.pad(x.flatten()[kept], fill) for x in (rows.ids, positions, branch))
    window = Packed(positions[None], F.pad(row.flatten()[kept], fill, value=-1), branch)
    return Rows(ids[None], window, place[rows.token], place[rows.where], rows.targets, rows.sequence)
