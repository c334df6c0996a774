"""The sampler on a GPU: greedy, unrestricted and top-k/top-p rows in one batch, no sort, no host synchronisation.

What it computes is in `aiexport_edge.kernels.sampler`, and it draws the same ids, bit for bit. A row is cut into chunks
that several programs work on:

    _highest   the largest logit of each chunk
    _race      each chunk's share of the mass; the winner of its Gumbel race, or, for rows with top-k or top-p, how many
               tokens fall into each of 256 score bins
    _collect   (top-k and top-p rows) the tokens in the bins that the answer is expected in, in any order
    _draw      the row's id: from its chunks' winners, or by a search for the pivot score and, among equals, the pivot
               id (after Qrita, arXiv 2602.01518) over the collected tokens, or over the whole row where they turn out
               too few or too many
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.launch import Architecture, Launch, architecture_of, ceil_div, next_power_of_2
from aiexport_edge.kernels.gpu.sampler_arithmetic import (
    COMPILE_OPTIONS,
    INFINITY_BITS,
    MASS_ONE,
    inverse_temperature,
    natural_log,
    noise_of_run,
    noise_of_tokens,
    probability_mass,
    rank_key,
)

TILE = 1024
NUM_BINS = 256
BINS_PER_UNIT = 8.0  # a score of -1 is 8 bins down
MOST_CANDIDATES = 4096
HIGHEST_ID = 0x7FFFFFFF
# Read a number at a time: where they lie must not make another variant of a kernel, to be compiled while serving.
PARAMETERS = ("bitmask", "temperatures", "top_ks", "top_ps", "seeds", "output_indices")


@dataclass(frozen=True, slots=True)
class SamplerSettings:
    """Tiles of a chunk and chunks of a row."""

    chunk_tiles: int
    num_chunks: int


def settings(architecture: Architecture, *, batch: int, vocabulary: int) -> SamplerSettings:
    """About four programs an SM, from the shape alone."""
    wanted = ceil_div(4 * architecture.num_sms, max(1, batch))
    num_tiles = ceil_div(vocabulary, TILE)
    chunk_tiles = ceil_div(num_tiles, wanted)
    return SamplerSettings(chunk_tiles, ceil_div(num_tiles, chunk_tiles))


@triton.jit
def _load_logits(row_logits, row_mask, tokens, vocabulary, HAS_MASK: tl.constexpr):
    """float32 logits of tokens; -inf past the vocabulary and where the grammar's bit is 0."""
    inside = tokens < vocabulary
    values = tl.load(row_logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_MASK:
        words = tl.load(row_mask + tokens // 32, mask=inside, other=0)
        values = tl.where((words >> (tokens % 32)) & 1 != 0, values, float("-inf"))
    return values


@triton.jit(do_not_specialize=["chunk_tiles"], do_not_specialize_on_alignment=PARAMETERS)
def _highest(
    logits,
    bitmask,
    chunk_highest,
    histogram,
    num_candidates,
    vocabulary,
    chunk_tiles,
    logits_stride,
    mask_stride,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """The largest logit of a chunk, +inf where there is a NaN. The first chunk clears what `_race` counts into."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if chunk == 0:
        tl.store(histogram + row * NUM_BINS + tl.arange(0, NUM_BINS), tl.zeros([NUM_BINS], tl.int32))
        tl.store(num_candidates + row, 0)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(vocabulary, TILE))):
        start = tile * TILE
        tokens = start + tl.arange(0, TILE)
        values = _load_logits(logits + row * logits_stride, bitmask + row * mask_stride, tokens, vocabulary, HAS_MASK)
        largest = tl.maximum(largest, tl.where(values != values, float("inf"), values))
    tl.store(chunk_highest + row * tl.num_programs(1) + chunk, tl.max(largest, 0))


@triton.jit
def _row_highest(chunk_highest, row, num_chunks, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return tl.max(tl.load(chunk_highest + row * num_chunks + index, mask=index < num_chunks, other=float("-inf")), 0)


@triton.jit(do_not_specialize=["chunk_tiles"], do_not_specialize_on_alignment=PARAMETERS)
def _race(
    logits,
    bitmask,
    temperatures,
    top_ks,
    top_ps,
    seeds,
    output_indices,
    chunk_highest,
    chunk_mass,
    chunk_best,
    chunk_winner,
    histogram,
    vocabulary,
    chunk_tiles,
    logits_stride,
    mask_stride,
    HAS_MASK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS_PER_UNIT: tl.constexpr,
    HIGHEST_ID: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_chunks = tl.num_programs(1)
    highest = _row_highest(chunk_highest, row, num_chunks, BLOCK_CHUNKS)
    if tl.abs(highest) == float("inf"):
        return
    temperature = tl.load(temperatures + row)
    inverse = inverse_temperature(temperature)
    greedy = temperature <= 0.0
    restricted = (temperature > 0.0) & ((tl.load(top_ks + row) > 0) | (tl.load(top_ps + row) < 1.0))
    seed = tl.load(seeds + row)
    output_index = tl.load(output_indices + row)
    mass = tl.zeros([TILE], tl.int64)
    best = tl.full([TILE], float("-inf"), tl.float32)
    winner = tl.full([TILE], HIGHEST_ID, tl.int32)
    counts = tl.zeros([NUM_BINS], tl.int32)
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(vocabulary, TILE))):
        start = tile * TILE
        tokens = start + tl.arange(0, TILE)
        values = _load_logits(logits + row * logits_stride, bitmask + row * mask_stride, tokens, vocabulary, HAS_MASK)
        scores = (values - highest) * inverse
        mass += probability_mass(scores)
        if restricted:
            bins = tl.minimum(-scores * BINS_PER_UNIT, NUM_BINS - 1.0).to(tl.int32)
            counts += tl.histogram(bins, NUM_BINS)
        else:
            if greedy:
                runs = tl.where(values == highest, 0.0, float("-inf"))
            else:
                runs = scores + noise_of_run(seed, output_index, start, TILE)
            winner = tl.where(runs > best, tokens, winner)  # on a tie the earlier one, which is lower
            best = tl.maximum(best, runs)
    out = row * num_chunks + chunk
    tl.store(chunk_mass + out, tl.sum(mass, 0))
    if restricted:
        tl.atomic_add(histogram + row * NUM_BINS + tl.arange(0, NUM_BINS), counts, sem="relaxed")
    else:
        leading = tl.max(best, 0)
        tl.store(chunk_best + out, leading)
        tl.store(chunk_winner + out, tl.min(tl.where(best == leading, winner, HIGHEST_ID), 0))


@triton.jit(do_not_specialize=["chunk_tiles"], do_not_specialize_on_alignment=PARAMETERS)
def _collect(
    logits,
    bitmask,
    temperatures,
    top_ks,
    top_ps,
    chunk_highest,
    histogram,
    last_bins,
    num_candidates,
    candidate_values,
    candidate_tokens,
    vocabulary,
    chunk_tiles,
    logits_stride,
    mask_stride,
    HAS_MASK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BINS_PER_UNIT: tl.constexpr,
    MOST_CANDIDATES: tl.constexpr,
):
    """Finite scores in bins 0 … last_bins[row] become candidates; beyond MOST_CANDIDATES they are only counted."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    highest = _row_highest(chunk_highest, row, tl.num_programs(1), BLOCK_CHUNKS)
    if (temperature <= 0.0) | ((top_k <= 0) & (top_p >= 1.0)) | (tl.abs(highest) == float("inf")):
        return
    inverse = inverse_temperature(temperature)
    index = tl.arange(0, NUM_BINS)
    counts = tl.load(histogram + row * NUM_BINS + index)
    if top_k > 0:
        enough = tl.cumsum(counts, 0) >= top_k
    else:
        # A bin's mass as if all its scores were in its middle; some of the rest besides, since that is a guess.
        guess = counts.to(tl.float32) * tl.exp((index.to(tl.float32) + 0.5) * (-1.0 / BINS_PER_UNIT))
        enough = tl.cumsum(guess, 0) >= tl.sum(guess, 0) * (top_p + 0.25 * (1.0 - top_p))
    last_bin = tl.min(tl.where(enough, index, NUM_BINS - 1), 0)
    if chunk == 0:
        tl.store(last_bins + row, last_bin)
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tl.cdiv(vocabulary, TILE))):
        start = tile * TILE
        tokens = start + tl.arange(0, TILE)
        values = _load_logits(logits + row * logits_stride, bitmask + row * mask_stride, tokens, vocabulary, HAS_MASK)
        scores = (values - highest) * inverse
        bins = tl.minimum(-scores * BINS_PER_UNIT, NUM_BINS - 1.0).to(tl.int32)
        chosen = ((bins <= last_bin) & (rank_key(scores) < INFINITY_BITS)).to(tl.int32)
        num_chosen = tl.sum(chosen, 0)
        if num_chosen > 0:
            place = tl.atomic_add(num_candidates + row, num_chosen, sem="relaxed") + tl.cumsum(chosen, 0) - 1
            fits = (chosen > 0) & (place < MOST_CANDIDATES)
            tl.store(candidate_values + row * MOST_CANDIDATES + place, values, mask=fits)
            tl.store(candidate_tokens + row * MOST_CANDIDATES + place, tokens, mask=fits)


@triton.jit
def _load_items(
    start, number, whole_row, row_logits, row_mask, row_values, row_tokens, HAS_MASK: tl.constexpr, TILE: tl.constexpr
):
    """(logits, tokens) of the row itself or of its candidates; -inf past their number."""
    index = start + tl.arange(0, TILE)
    if whole_row:
        values = _load_logits(row_logits, row_mask, index, number, HAS_MASK)
        tokens = index
    else:
        values = tl.load(row_values + index, mask=index < number, other=float("-inf"))
        tokens = tl.load(row_tokens + index, mask=index < number, other=0)
    return values, tokens


@triton.jit
def _weigh(values, tokens, highest, inverse, pivot_key, pivot_token, MASS: tl.constexpr):
    """(rank key, weight): mass or 1 of tokens up to the pivot, 0 of the others; both int64."""
    scores = (values - highest) * inverse
    key = rank_key(scores)
    kept = (key < pivot_key) | ((key == pivot_key) & (tokens <= pivot_token))
    kept &= key < INFINITY_BITS
    weight = tl.where(kept, probability_mass(scores), 0) if MASS else kept.to(tl.int64)
    return key.to(tl.int64), weight


@triton.jit
def _total_weight(
    number,
    whole_row,
    row_logits,
    row_mask,
    row_values,
    row_tokens,
    highest,
    inverse,
    pivot_key,
    pivot_token,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mass of the items up to the pivot."""
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, number, TILE):
        values, tokens = _load_items(
            start, number, whole_row, row_logits, row_mask, row_values, row_tokens, HAS_MASK, TILE
        )
        _, weight = _weigh(values, tokens, highest, inverse, pivot_key, pivot_token, True)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def _search_pivot(
    need,
    number,
    whole_row,
    row_logits,
    row_mask,
    row_values,
    row_tokens,
    highest,
    inverse,
    pivot_key,
    pivot_token,
    MASS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first token, by falling score and rising id, up to which the weight reaches `need`: its (key, id).

    Two bits of the key, then of the id, by each pass over the items: the weight up to three values that divide what is
    left of the range. Where all weigh less than `need`, the pivot stays as it was.
    """
    key = tl.zeros([], tl.int64)
    below = tl.zeros([], tl.int64)  # weight of the keys less than `key`
    for step in range(0, 16):
        quarter = tl.full([], 1, tl.int64) << (30 - 2 * step)
        sum1 = tl.zeros([TILE], tl.int64)
        sum2 = tl.zeros([TILE], tl.int64)
        sum3 = tl.zeros([TILE], tl.int64)
        for start in range(0, number, TILE):
            values, tokens = _load_items(
                start, number, whole_row, row_logits, row_mask, row_values, row_tokens, HAS_MASK, TILE
            )
            keys, weight = _weigh(values, tokens, highest, inverse, pivot_key, pivot_token, MASS)
            sum1 += tl.where(keys < key + quarter, weight, 0)
            sum2 += tl.where(keys < key + 2 * quarter, weight, 0)
            sum3 += tl.where(keys < key + 3 * quarter, weight, 0)
        weight1, weight2, weight3 = tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)
        digit = (weight1 < need).to(tl.int64) + (weight2 < need).to(tl.int64) + (weight3 < need).to(tl.int64)
        below = tl.where(digit == 0, below, tl.where(digit == 1, weight1, tl.where(digit == 2, weight2, weight3)))
        key += digit * quarter
    # Now the equals: how many there are, and what one weighs.
    count = tl.zeros([TILE], tl.int64)
    largest = tl.zeros([TILE], tl.int64)
    for start in range(0, number, TILE):
        values, tokens = _load_items(
            start, number, whole_row, row_logits, row_mask, row_values, row_tokens, HAS_MASK, TILE
        )
        keys, weight = _weigh(values, tokens, highest, inverse, pivot_key, pivot_token, MASS)
        count += ((keys == key) & (weight > 0)).to(tl.int64)
        largest = tl.maximum(largest, tl.where(keys == key, weight, 0))
    num_equals = tl.sum(count, 0)
    one = tl.maximum(tl.max(largest, 0), 1)
    wanted = (need - below + one - 1) // one
    found_key = pivot_key
    found_token = pivot_token
    if num_equals > 0:
        found_key = key.to(tl.int32)
        if num_equals > wanted:
            token = tl.zeros([], tl.int32)
            for step in range(0, 12):  # ids below 2^24
                quarter = tl.full([], 1, tl.int32) << (22 - 2 * step)
                sum1 = tl.zeros([TILE], tl.int32)
                sum2 = tl.zeros([TILE], tl.int32)
                sum3 = tl.zeros([TILE], tl.int32)
                for start in range(0, number, TILE):
                    values, tokens = _load_items(
                        start, number, whole_row, row_logits, row_mask, row_values, row_tokens, HAS_MASK, TILE
                    )
                    keys, weight = _weigh(values, tokens, highest, inverse, pivot_key, pivot_token, MASS)
                    equal = (keys == key) & (weight > 0)
                    sum1 += (equal & (tokens < token + quarter)).to(tl.int32)
                    sum2 += (equal & (tokens < token + 2 * quarter)).to(tl.int32)
                    sum3 += (equal & (tokens < token + 3 * quarter)).to(tl.int32)
                digit = (tl.sum(sum1, 0) < wanted).to(tl.int32) + (tl.sum(sum2, 0) < wanted).to(tl.int32)
                digit += (tl.sum(sum3, 0) < wanted).to(tl.int32)
                token += digit * quarter
            found_token = token
        else:
            # All equals that were kept so far: below the old pivot key that is every id.
            found_token = tl.where(found_key == pivot_key, pivot_token, 0x7FFFFFFF)
    return found_key, found_token


@triton.jit(do_not_specialize=["num_chunks"], do_not_specialize_on_alignment=PARAMETERS)
def _draw(
    logits,
    bitmask,
    temperatures,
    top_ks,
    top_ps,
    seeds,
    output_indices,
    chunk_highest,
    chunk_mass,
    chunk_best,
    chunk_winner,
    last_bins,
    num_candidates,
    candidate_values,
    candidate_tokens,
    ids,
    logprobs,
    vocabulary,
    num_chunks,
    logits_stride,
    mask_stride,
    HAS_MASK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_BINS: tl.constexpr,
    MOST_CANDIDATES: tl.constexpr,
    HIGHEST_ID: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    highest = _row_highest(chunk_highest, row, num_chunks, BLOCK_CHUNKS)
    if tl.abs(highest) == float("inf"):
        tl.store(ids + row, 0)
        tl.store(logprobs + row, float("nan"))
        return
    chunks = tl.arange(0, BLOCK_CHUNKS)
    total = tl.sum(tl.load(chunk_mass + row * num_chunks + chunks, mask=chunks < num_chunks, other=0), 0)
    temperature = tl.load(temperatures + row)
    inverse = inverse_temperature(temperature)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    row_logits = logits + row * logits_stride
    row_mask = bitmask + row * mask_stride
    token = tl.zeros([], tl.int32)
    if (temperature > 0.0) & ((top_k > 0) | (top_p < 1.0)):
        row_values = candidate_values + row * MOST_CANDIDATES
        row_tokens = candidate_tokens + row * MOST_CANDIDATES
        number = tl.load(num_candidates + row)
        complete = tl.load(last_bins + row) == NUM_BINS - 1
        whole_row = (number > MOST_CANDIDATES) | ((number < top_k) & (complete == 0))
        pivot_key = tl.full([], 0x7F7FFFFF, tl.int32)
        pivot_token = tl.full([], 0x7FFFFFFF, tl.int32)
        limit = tl.zeros([], tl.int64)
        if (top_k <= 0) & (whole_row == 0):
            limit = tl.maximum((total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)
            collected = _total_weight(
                number,
                False,
                row_logits,
                row_mask,
                row_values,
                row_tokens,
                highest,
                inverse,
                pivot_key,
                pivot_token,
                HAS_MASK,
                TILE,
            )
            whole_row = collected < limit
        if whole_row:
            number = vocabulary
        if top_k > 0:
            pivot_key, pivot_token = _search_pivot(
                top_k.to(tl.int64),
                number,
                whole_row,
                row_logits,
                row_mask,
                row_values,
                row_tokens,
                highest,
                inverse,
                pivot_key,
                pivot_token,
                False,
                HAS_MASK,
                TILE,
            )
        if top_p < 1.0:
            kept_mass = total
            if top_k > 0:
                kept_mass = _total_weight(
                    number,
                    whole_row,
                    row_logits,
                    row_mask,
                    row_values,
                    row_tokens,
                    highest,
                    inverse,
                    pivot_key,
                    pivot_token,
                    HAS_MASK,
                    TILE,
                )
            limit = tl.maximum((kept_mass.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)
            pivot_key, pivot_token = _search_pivot(
                limit,
                number,
                whole_row,
                row_logits,
                row_mask,
                row_values,
                row_tokens,
                highest,
                inverse,
                pivot_key,
                pivot_token,
                True,
                HAS_MASK,
                TILE,
            )
        seed = tl.load(seeds + row)
        output_index = tl.load(output_indices + row)
        best = tl.full([TILE], float("-inf"), tl.float32)
        winner = tl.full([TILE], HIGHEST_ID, tl.int32)
        for start in range(0, number, TILE):
            values, tokens = _load_items(
                start, number, whole_row, row_logits, row_mask, row_values, row_tokens, HAS_MASK, TILE
            )
            _, weight = _weigh(values, tokens, highest, inverse, pivot_key, pivot_token, False)
            runs = (values - highest) * inverse + noise_of_tokens(seed, output_index, tokens, TILE)
            runs = tl.where(weight > 0, runs, float("-inf"))
            ahead = (runs > best) | ((runs == best) & (weight > 0) & (tokens < winner))
            winner = tl.where(ahead, tokens, winner)
            best = tl.where(ahead, runs, best)
        leading = tl.max(best, 0)
        token = tl.min(tl.where(best == leading, winner, HIGHEST_ID), 0)
    else:
        bests = tl.load(chunk_best + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
        winners = tl.load(chunk_winner + row * num_chunks + chunks, mask=chunks < num_chunks, other=HIGHEST_ID)
        token = tl.min(tl.where(bests == tl.max(bests, 0), winners, HIGHEST_ID), 0)
    score = (tl.load(row_logits + token).to(tl.float32) - highest) * inverse
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprobs + row, score - natural_log((total.to(tl.float64) / MASS_ONE).to(tl.float32)))


def sample_launches(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    *,
    bitmask: torch.Tensor | None = None,
    architecture: Architecture | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches, in order, and what they fill: ids, logprobs."""
    batch, vocabulary = logits.shape
    if vocabulary >= 1 << 24:
        raise ValueError(f"a vocabulary of {vocabulary} is larger than {(1 << 24) - 1}")
    assert logits.stride(1) == 1
    setting = settings(architecture or architecture_of(logits.device), batch=batch, vocabulary=vocabulary)
    num_chunks = setting.num_chunks

    def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    chunk_highest = scratch(batch, num_chunks, dtype=torch.float32)
    chunk_mass = scratch(batch, num_chunks, dtype=torch.int64)
    chunk_best = scratch(batch, num_chunks, dtype=torch.float32)
    chunk_winner = scratch(batch, num_chunks, dtype=torch.int32)
    histogram = scratch(batch, NUM_BINS, dtype=torch.int32)
    last_bins = scratch(batch, dtype=torch.int32)
    num_candidates = scratch(batch, dtype=torch.int32)
    candidate_values = scratch(batch, MOST_CANDIDATES, dtype=torch.float32)
    candidate_tokens = scratch(batch, MOST_CANDIDATES, dtype=torch.int32)
    ids = scratch(batch, dtype=torch.int64)
    logprobs = scratch(batch, dtype=torch.float32)

    mask = num_candidates if bitmask is None else bitmask
    strides = (logits.stride(0), 0 if bitmask is None else bitmask.stride(0))
    grid = (batch, num_chunks)
    common = {"HAS_MASK": bitmask is not None, "TILE": TILE, "NUM_BINS": NUM_BINS, "num_stages": 1, **COMPILE_OPTIONS}
    chunked = {"num_warps": 4}
    rows = {"BLOCK_CHUNKS": next_power_of_2(ceil_div(vocabulary, TILE))}  # of the vocabulary alone: one variant
    launches = [
        Launch(
            _highest,
            grid,
            (logits, mask, chunk_highest, histogram, num_candidates, vocabulary, setting.chunk_tiles, *strides),
            {**common, **chunked},
        ),
        Launch(
            _race,
            grid,
            (
                logits,
                mask,
                temperature,
                top_k,
                top_p,
                seeds,
                output_index,
                chunk_highest,
                chunk_mass,
                chunk_best,
                chunk_winner,
                histogram,
                vocabulary,
                setting.chunk_tiles,
                *strides,
            ),
            {**common, **chunked, **rows, "BINS_PER_UNIT": BINS_PER_UNIT, "HIGHEST_ID": HIGHEST_ID},
        ),
        Launch(
            _collect,
            grid,
            (
                logits,
                mask,
                temperature,
                top_k,
                top_p,
                chunk_highest,
                histogram,
                last_bins,
                num_candidates,
                candidate_values,
                candidate_tokens,
                vocabulary,
                setting.chunk_tiles,
                *strides,
            ),
            {**common, **chunked, **rows, "BINS_PER_UNIT": BINS_PER_UNIT, "MOST_CANDIDATES": MOST_CANDIDATES},
        ),
        Launch(
            _draw,
            (batch,),
            (
                logits,
                mask,
                temperature,
                top_k,
                top_p,
                seeds,
                output_index,
                chunk_highest,
                chunk_mass,
                chunk_best,
                chunk_winner,
                last_bins,
                num_candidates,
                candidate_values,
                candidate_tokens,
                ids,
                logprobs,
                vocabulary,
                num_chunks,
                *strides,
            ),
            {**common, **rows, "MOST_CANDIDATES": MOST_CANDIDATES, "HIGHEST_ID": HIGHEST_ID, "num_warps": 8},
        ),
    ]
    return launches, ids, logprobs


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    bitmask: torch.Tensor | None = None,
    *,
    architecture: Architecture | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `aiexport_edge.kernels.sampler.sample_reference`.

    logits may also be bfloat16 or float16.
    """
    launches, ids, logprobs = sample_launches(
        logits, temperature, top_k, top_p, seeds, output_index, bitmask=bitmask, architecture=architecture
    )
    for launch in launches:
        launch.run()
    return ids, logprobs
