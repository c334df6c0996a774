"""Draw the next token: grammar mask, temperature, top-k, top-p, then Gumbel-max with counter-based noise.

A draw depends on its row's logits, its seed and its output index alone: not on batch, order, threads or device. So that
every implementation draws the same ids bit for bit, all that decides is defined down to the rounding: exponentials and
logarithms are the float32 polynomials below without fused multiply-adds, and probability mass is counted in integers
(2^40 is the mass of the likeliest token), whose sums have no order. Gumbel-max: E. J. Gumbel, 1954; counters: `philox`.
"""

from __future__ import annotations

import torch

from aiexport_edge.kernels.philox import philox_reference, uniform_reference

# S. Moshier, Cephes: logf and expf, relative error below 2e-7.
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
LOG2_E = 1.44269504088896341
SQRT_HALF = 0.707106781186547524
LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
EXP_UNDERFLOW = -87.0  # below it exp is 0, so that no denormal arises
MASS_ONE = 2.0**40
MAX_INVERSE_TEMPERATURE = 3.0e38


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of normal positive float32, by float32 operations that each round once."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)  # in [0.5, 1)
    small = mantissa < SQRT_HALF
    exponent = (exponent - small.to(torch.int32)).to(torch.float32)
    f = torch.where(small, mantissa + mantissa, mantissa) - 1.0
    square = f * f
    y = torch.full_like(f, LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        y = y * f + coefficient
    y = y * f * square
    y = y + exponent * LN2_LOW
    y = y - square * 0.5
    return f + y + exponent * LN2_HIGH


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp of non-positive float32, by float32 operations that each round once; 0 below `EXP_UNDERFLOW`."""
    clamped = x.clamp(min=EXP_UNDERFLOW)
    n = torch.floor(clamped * LOG2_E + 0.5)
    r = clamped - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = torch.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        y = y * r + coefficient
    y = y * (r * r) + r + 1.0
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < EXP_UNDERFLOW, 0.0, y * power)


def _keep_top(weights: torch.Tensor, order: torch.Tensor, limit: int) -> torch.Tensor:
    """Mask of the tokens, by falling score, before which less than `limit` of weight has gone."""
    ordered = weights[order]
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept[order] = ordered.cumsum(0) - ordered < limit
    return kept


def _sample_row(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, seed: torch.Tensor, output_index: torch.Tensor
) -> tuple[int, float]:
    """One row of `sample_reference`."""
    highest = logits.max()
    if not bool(torch.isfinite(highest)):  # max of a row with a NaN is NaN
        return 0, float("nan")
    greedy = temperature <= 0.0
    one = torch.ones((), dtype=torch.float32)
    inverse = one if greedy else (one / torch.tensor(temperature)).clamp(max=MAX_INVERSE_TEMPERATURE)
    scores = (logits - highest) * inverse
    mass = (_exp(scores) * MASS_ONE).to(torch.int64)
    if greedy:
        token = int(torch.argmax((logits == highest).to(torch.uint8)))
    else:
        token = _draw(scores, mass, top_k, top_p, seed, output_index)
    total = mass.sum().to(torch.float64) / MASS_ONE
    return token, float(scores[token].double() - torch.log(total))


def _draw(
    scores: torch.Tensor, mass: torch.Tensor, top_k: int, top_p: float, seed: torch.Tensor, output_index: torch.Tensor
) -> int:
    """The id that wins the Gumbel race among those that top-k and then top-p keep."""
    kept = torch.isfinite(scores)
    order = torch.sort(scores, descending=True, stable=True).indices
    if top_k > 0:
        kept &= _keep_top(torch.ones_like(mass), order, top_k)
    if top_p < 1.0:
        kept_mass = torch.where(kept, mass, 0)
        limit = max(1, int(float(kept_mass.sum()) * top_p))
        kept &= _keep_top(kept_mass, order, limit)
    ids = torch.arange(scores.shape[0])
    zero = torch.zeros_like(ids)
    words = philox_reference(
        seed,
        (
            ids // 4,
            (output_index & 0xFFFFFFFF).expand_as(ids),
            ((output_index >> 32) & 0xFFFFFFFF).expand_as(ids),
            zero,
        ),
    )
    uniform = uniform_reference(words.gather(1, (ids % 4).unsqueeze(1)).squeeze(1))
    noisy = scores - _log(-_log(uniform))
    return int(torch.argmax(torch.where(kept, noisy, float("-inf"))))


def _allowed(bitmask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Booleans [B, V] of a bitmask."""
    bits = (bitmask.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=bitmask.device)) & 1
    return bits.flatten(1)[:, :vocabulary] != 0


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row: (ids int64 [B], logprobs float32 [B]).

    logits float32 [B, V], finite or -inf. temperature float32 [B]; 0 takes the highest logit, of equals the lowest id.
    top_k int32 [B], 0 off: exactly that many stay, of equal scores the lower ids. top_p float32 [B], 1 off: of what
    top-k left, the fewest likeliest tokens whose mass reaches top_p of it; at least one. seeds int64 [B], the bits of a
    uint64. output_index int64 [B] >= 0. bitmask int32 [B, ceil(V / 32)] or None: where bit t % 32 of word t // 32 is 0,
    the logit of token t counts as -inf. Noise of token t: -log(-log(u)), u from lane t % 4 of Philox4x32-10 with key =
    seed and counter = (t // 4, low, high half of the output index, 0). The log-probability is that of the drawn token
    under the softmax over all tokens of logits / temperature (temperature 0: of the logits). A row with a NaN, with
    +inf or with no finite logit has no distribution: its id is 0 and its log-probability NaN, so that the caller can
    tell.
    """
    if bitmask is not None:
        logits = logits.masked_fill(~_allowed(bitmask, logits.shape[1]), float("-inf"))
    rows = [
        _sample_row(
            logits[row], float(temperature[row]), int(top_k[row]), float(top_p[row]), seeds[row], output_index[row]
        )
        for row in range(logits.shape[0])
    ]
    return torch.tensor([row[0] for row in rows]).long(), torch.tensor([row[1] for row in rows]).float()


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    bitmask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sample_reference`."""
    if logits.device.type == "cpu":
        from aiexport_edge.kernels.cpu import sampler as cpu

        return cpu.sample(logits, temperature, top_k, top_p, seeds, output_index, bitmask)
    if logits.is_cuda:
        from aiexport_edge.kernels.gpu import sampler as gpu

        return gpu.sample(logits, temperature, top_k, top_p, seeds, output_index, bitmask=bitmask)
    return sample_reference(logits, temperature, top_k, top_p, seeds, output_index, bitmask)
