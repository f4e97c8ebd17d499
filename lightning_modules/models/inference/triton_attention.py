"""Attention of a decoding step on a GPU, in Triton: three kernel launches between two matrix products.

A step with few rows reads every weight once and computes little, so each further launch costs time. The keys of a
prompt are read once for all its completions. Long sequences are split into parts, and the parts of prefixes and
completions run in parallel; their results are combined with their log-sum-exps (as in Flash-Decoding).

Shapes: A = P * G rows in order, H key-value heads, R query heads per key-value head, D head width, L and T largest
numbers of tokens in a prefix and in a completion. S parts of a sequence, M queries that share its keys: G * R for a
prefix, R for a completion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # number of keys that one iteration of the loop over a part reads
QUERIES = 64  # largest number of queries in one program
PROGRAMS = 132  # number of multiprocessors of an H100; a launch with this number of programs uses all of them


@triton.jit
def _rotate_and_write(
    qkv, cos, sin, token_index, out, keys, values,
    num_queries, num_keys, completions, key_p, key_h, key_g, key_t,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    start = qkv + (row * (num_queries + 2 * num_keys) + head) * 2 * HALF
    low = tl.load(start + column, mask=inside, other=0.0)
    high = tl.load(start + HALF + column, mask=inside, other=0.0)
    if head < num_queries + num_keys:
        turn = row * 2 * HALF + column
        a, b = low.to(tl.float32), high.to(tl.float32)
        cosine, sine = cos + turn, sin + turn
        first = a * tl.load(cosine, mask=inside, other=0.0).to(tl.float32)
        low = (first - b * tl.load(sine, mask=inside, other=0.0).to(tl.float32)).to(low.dtype)
        second = b * tl.load(cosine + HALF, mask=inside, other=0.0).to(tl.float32)
        high = (second + a * tl.load(sine + HALF, mask=inside, other=0.0).to(tl.float32)).to(high.dtype)
    if head < num_queries:
        target = out + (row * num_queries + head) * 2 * HALF
    else:
        token = tl.load(token_index + row)
        prompt, completion = (row // completions).to(tl.int64), (row % completions).to(tl.int64)
        of_completion = prompt * key_p + completion * key_g + token * key_t
        if head < num_queries + num_keys:
            target = keys + of_completion + (head - num_queries) * key_h
        else:
            target = values + of_completion + (head - num_queries - num_keys) * key_h
    tl.store(target + column, low, mask=inside)
    tl.store(target + HALF + column, high, mask=inside)


@triton.jit
def _attend_part(
    query, keys, values, lengths, out, log_sums, sequence_head, part, block, scaling,
    heads, sharing, rows, inner, key_outer, key_inner, key_h, key_t, num_parts, part_keys,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one sequence and head, for up to QUERIES of the `rows` * `sharing` queries that share it.

    Sequence b has `rows` rows, starting at row b * `rows`. Its keys are at index (b // inner, b % inner) of the memory.
    A prefix has G rows, and its index is the prompt (inner = 1). A completion has one row, and its index is (prompt,
    completion) (inner = G).
    """
    sequence, head = sequence_head // heads, sequence_head % heads
    m = block * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, BLOCK)
    is_query, in_head = m < rows * sharing, d < WIDTH
    of_query = (sequence * rows + m // sharing) * heads * sharing + head * sharing + m % sharing
    q = tl.load(query + of_query[:, None] * WIDTH + d, mask=is_query[:, None] & in_head, other=0.0)
    base = (sequence // inner).to(tl.int64) * key_outer + (sequence % inner).to(tl.int64) * key_inner + head * key_h

    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, BLOCK], tl.float32)
    end = tl.minimum((part + 1) * part_keys, tl.load(lengths + sequence).to(tl.int32))
    for start in range(part * part_keys, end, KEYS):
        n = start + tl.arange(0, KEYS)
        is_key = n < end
        where = base + n[:, None] * key_t + d
        k = tl.load(keys + where, mask=is_key[:, None] & in_head, other=0.0)
        v = tl.load(values + where, mask=is_key[:, None] & in_head, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(is_key, scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - now[:, None])
        fade = tl.exp(most - now)
        total = total * fade + tl.sum(weights, axis=1)
        mean = mean * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = now
    # A part after the end of its sequence has no keys, so its sum is 0 and its log-sum-exp is -inf.
    divisor = tl.where(total > 0, total, 1.0)
    mean /= divisor[:, None]
    of_part = (sequence_head * num_parts + part) * rows * sharing + m
    tl.store(out + of_part[:, None] * WIDTH + d, mean, mask=is_query[:, None] & in_head)
    tl.store(log_sums + of_part, most + tl.log(divisor), mask=is_query)


@triton.jit
def _attend(
    query, prefix_keys, prefix_values, prefix_lengths, prefix_out, prefix_sums,
    keys, values, lengths, out, log_sums, scaling, heads, sharing, completions,
    prefix_p, prefix_h, prefix_t, key_p, key_h, key_g, key_t,
    prefix_parts, prefix_part_keys, num_parts, part_keys, blocks, num_of_prefix,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OF_PREFIX: tl.constexpr, OF_COMPLETION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The first `num_of_prefix` programs compute parts of prefixes, the others parts of completions."""
    program = tl.program_id(0)
    if program < num_of_prefix:
        part, block = program % prefix_parts, (program // prefix_parts) % blocks
        _attend_part(
            query, prefix_keys, prefix_values, prefix_lengths, prefix_out, prefix_sums,
            program // (prefix_parts * blocks), part, block, scaling, heads, sharing, completions,
            1, prefix_p, 0, prefix_h, prefix_t, prefix_parts, prefix_part_keys, WIDTH, BLOCK, OF_PREFIX, KEYS,
        )  # fmt: skip
    else:
        program -= num_of_prefix
        _attend_part(
            query, keys, values, lengths, out, log_sums,
            program // num_parts, program % num_parts, 0, scaling, heads, sharing, 1,
            completions, key_p, key_g, key_h, key_t, num_parts, part_keys, WIDTH, BLOCK, OF_COMPLETION, KEYS,
        )  # fmt: skip


@triton.jit
def _read_parts(out, log_sums, first, step, num_parts, d, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Load the means [PARTS, BLOCK] and log-sums [PARTS] of one query, from index `first` on, every `step`-th entry."""
    s = tl.arange(0, PARTS)
    is_part = s < num_parts
    of_part = first + s * step
    sums = tl.load(log_sums + of_part, mask=is_part, other=float("-inf"))
    means = tl.load(out + of_part[:, None] * WIDTH + d, mask=is_part[:, None] & (d < WIDTH), other=0.0)
    return means, sums


@triton.jit
def _join(
    prefix_out, prefix_sums, completion_out, completion_sums, out, heads, sharing, completions,
    prefix_parts, completion_parts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PREFIX_PARTS: tl.constexpr, COMPLETION_PARTS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1) // sharing
    shared = tl.program_id(1) % sharing
    d = tl.arange(0, BLOCK)
    prompt, completion = row // completions, row % completions
    of_prompt = completions * sharing
    first = ((prompt * heads + head) * prefix_parts) * of_prompt + completion * sharing + shared
    a, a_sums = _read_parts(prefix_out, prefix_sums, first, of_prompt, prefix_parts, d, WIDTH, PREFIX_PARTS)
    first = ((row * heads + head) * completion_parts) * sharing + shared
    b, b_sums = _read_parts(
        completion_out, completion_sums, first, sharing, completion_parts, d, WIDTH, COMPLETION_PARTS
    )
    # finite, because every row attends to at least one key
    most = tl.maximum(tl.max(a_sums, axis=0), tl.max(b_sums, axis=0))
    a_weights, b_weights = tl.exp(a_sums - most), tl.exp(b_sums - most)
    mean = tl.sum(a * a_weights[:, None], axis=0) + tl.sum(b * b_weights[:, None], axis=0)
    mean /= tl.sum(a_weights, axis=0) + tl.sum(b_weights, axis=0)
    target = out + (row * heads * sharing + tl.program_id(1)) * WIDTH + d
    tl.store(target, mean.to(out.dtype.element_ty), mask=d < WIDTH)


def rotate_and_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, token_index: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys, and write keys and values into the cache.

    Args:
        qkv: queries, keys and values of one token of each row, [A, (H * R + 2 H) * D].
        cos: rotary factors, [A, D].
        sin: rotary factors, [A, D].
        token_index: position of each row's token in its completion, long [A].
        keys: memory of keys, [P, H, G, T, D]; written in place.
        values: memory of values, in the same layout as `keys`.

    Returns:
        The rotated queries, [A, H * R, D].
    """
    _, heads, completions, _, width = keys.shape
    rows, num_queries = len(qkv), qkv.shape[1] // width - 2 * heads
    out = qkv.new_empty(rows, num_queries, width)
    block = triton.next_power_of_2(width // 2)
    with torch.cuda.device_of(qkv):  # Triton uses the current device, not the device of the tensors
        _rotate_and_write[(rows, num_queries + 2 * heads)](
            qkv, cos, sin, token_index, out, keys, values, num_queries, heads, completions, *keys.stride()[:4],
            HALF=width // 2, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return out


def attend(
    query: Tensor, prefix: tuple[Tensor, Tensor], completion: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor],
    read: tuple[int, int], scaling: float,
) -> Tensor:  # fmt: skip
    """Attention of one query token of each row over its prefix and its own completion.

    Args:
        query: [A, H * R, D].
        prefix: keys and values, each [P, H, L, D].
        completion: keys and values, each [P, H, G, T, D].
        lengths: number of tokens of each prefix [P] and of each completion [A], at least 1.
        read: upper bounds of `lengths` for prefixes and for completions. The launch depends only on them, so that it
            can be captured in a CUDA graph.
        scaling: factor of the scores.

    Returns:
        [A, H * R, D].
    """
    num_prompts, heads, completions, _, width = completion[0].shape
    rows, sharing = len(query), query.shape[1] // heads
    block, of_prompt = (
        max(16, triton.next_power_of_2(width)),
        completions * sharing,
    )  # queries that share a prefix's keys
    of_prefix, of_completion = (min(QUERIES, max(16, triton.next_power_of_2(n))) for n in (of_prompt, sharing))
    blocks = triton.cdiv(of_prompt, of_prefix)
    prefix_parts, prefix_part_keys = _split(read[0], num_prompts * heads * blocks)
    parts, part_keys = _split(read[1], rows * heads)
    means = [
        query.new_empty(num_prompts * heads, prefix_parts, of_prompt, width, dtype=torch.float32),
        query.new_empty(rows * heads, parts, sharing, width, dtype=torch.float32),
    ]
    sums = [mean.new_empty(mean.shape[:-1]) for mean in means]
    num_of_prefix = num_prompts * heads * blocks * prefix_parts
    out = torch.empty_like(query)
    with torch.cuda.device_of(query):
        _attend[(num_of_prefix + rows * heads * parts,)](
            query, *prefix, lengths[0], means[0], sums[0], *completion, lengths[1], means[1], sums[1],
            scaling, heads, sharing, completions, *prefix[0].stride()[:3], *completion[0].stride()[:4],
            prefix_parts, prefix_part_keys, parts, part_keys, blocks, num_of_prefix,
            WIDTH=width, BLOCK=block, OF_PREFIX=of_prefix, OF_COMPLETION=of_completion, KEYS=KEYS, num_warps=4,
        )  # fmt: skip
        _join[(rows, heads * sharing)](
            means[0], sums[0], means[1], sums[1], out, heads, sharing, completions, prefix_parts, parts,
            WIDTH=width, BLOCK=block, PREFIX_PARTS=triton.next_power_of_2(prefix_parts),
            COMPLETION_PARTS=triton.next_power_of_2(parts), num_warps=2,
        )  # fmt: skip
    return out


def _split(length: int, sharers: int) -> tuple[int, int]:
    """How to split a sequence of `length` keys: the number of parts, and the number of keys in each part.

    `sharers` sequences of this length run in one launch; together they should use the whole GPU.
    """
    steps = triton.cdiv(length, KEYS)
    part_steps = triton.cdiv(steps, max(1, PROGRAMS // sharers))
    return triton.cdiv(steps, part_steps), part_steps * KEYS
