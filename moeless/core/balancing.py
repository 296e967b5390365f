"""Which replica computes what, decided anew for each layer of each step from the tokens that are there.

A plan's shares are right on average; a step's tokens are not the average. The dispatcher knows every expert's tokens
before it sends any, so it can even out the workers with the replicas that the plan gave it. Two rules follow from what
a call of an expert costs. Below some number of tokens it takes the same time whatever they are, for its weights are
read once: then a function is not split, only the less busy of its workers is taken. Above it, tokens are split as water
finds its level.

Called by dispatch for each layer and by the simulator, with the same numbers. Plain numbers, for a layer has few
functions with replicas and numpy's calls would take longer.

Shapes: E experts, W workers, R replicas of a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeless.core.errors import ConfigError

_ENOUGH = 1.02
"""Of the mean worker's time: nothing is moved to get the busiest one below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCost:
    """What a call of an expert costs, in the time of one more token: `call_tokens` + max(tokens, `floor_tokens`)."""

    call_tokens: float = 0.0
    """Of the call itself."""
    floor_tokens: float = 0.0
    """As many tokens as take as long as reading the expert's weights."""

    def __post_init__(self) -> None:
        for name in ("call_tokens", "floor_tokens"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"call_cost.{name} must be at least 0 and finite, got {getattr(self, name)}")

    def __call__(self, tokens: float) -> float:
        """0 without tokens."""
        return self.call_tokens + max(tokens, self.floor_tokens) if tokens else 0.0


def balanced_split(
    tokens_F: Sequence[int],
    workers_F: Sequence[Sequence[int]],
    busy_W: list[float],
    cost: CallCost,
    *,
    speed_W: Sequence[float] | None = None,
) -> list[list[int]]:
    """Share out one layer's tokens of the functions F that have replicas, so that the busiest worker is done early.

    The function that costs most goes first. It goes whole to the least busy of its workers if that one is then no
    busier than the mean worker will be, else over as few of them as make it so, or over as many as end earliest. Then,
    as long as that helps, one of the busiest worker's functions moves on to another that has it.

    Args:
        tokens_F: of each function.
        workers_F: numbers of the workers of each function's instances, different ones.
        busy_W: what the other functions cost each worker; what is shared out is added to it.
        speed_W: of the workers; default: all 1.
    Returns: for each function the tokens of each of its workers, in the order of `workers_F`; they sum to its tokens.
    """
    speeds = [1.0] * len(busy_W) if speed_W is None else speed_W
    work = sum(busy * speed for busy, speed in zip(busy_W, speeds, strict=True))
    mean = (work + sum(map(cost, tokens_F))) / sum(speeds)
    split: list[list[int]] = [[] for _ in tokens_F]
    order = sorted((-cost(tokens), len(workers_F[index]), index) for index, tokens in enumerate(tokens_F))
    for _, _, function in order:
        tokens, workers = tokens_F[function], workers_F[function]
        if tokens:
            split[function] = _share_out(tokens, workers, busy_W, cost, speeds, mean)
        else:
            split[function] = [0] * len(workers)
    _move_on(split, workers_F, busy_W, cost, speeds, enough=mean * _ENOUGH)
    return split


def _move_on(
    split: list[list[int]],
    workers_F: Sequence[Sequence[int]],
    busy_W: list[float],
    cost: CallCost,
    speeds: Sequence[float],
    *,
    enough: float,
) -> None:
    """Move whole calls off the busiest worker while the one that takes over is less busy for it."""
    held_by: list[list[tuple[int, int]]] = [[] for _ in busy_W]
    for function, workers in enumerate(workers_F):
        for index, worker in enumerate(workers):
            held_by[worker].append((function, index))
    for _ in range(len(split)):
        busiest = max(range(len(busy_W)), key=busy_W.__getitem__)
        if busy_W[busiest] <= enough:
            return
        best_end, best = busy_W[busiest], (-1, -1, -1)
        for function, origin in held_by[busiest]:
            tokens = split[function][origin]
            if not tokens:
                continue
            for target, worker in enumerate(workers_F[function]):
                if busy_W[worker] >= best_end:
                    continue
                held = split[function][target]
                end = busy_W[worker] + (cost(held + tokens) - cost(held)) / speeds[worker]
                if end < best_end:
                    best_end, best = end, (function, origin, target)
        function, origin, target = best
        if function < 0 or best_end >= busy_W[busiest] * (1 - 1e-9):
            return
        held, tokens = split[function][target], split[function][origin]
        split[function][origin], split[function][target] = 0, held + tokens
        busy_W[busiest] -= cost(tokens) / speeds[busiest]
        busy_W[workers_F[function][target]] = best_end


def _share_out(
    tokens: int,
    workers: Sequence[int],
    busy_W: list[float],
    cost: CallCost,
    speeds: Sequence[float],
    mean: float,
) -> list[int]:
    """Tokens for each of one function's workers."""
    ready = {worker: busy_W[worker] + cost(1) / speeds[worker] for worker in workers}
    order = sorted(workers, key=ready.__getitem__)
    whole = cost(tokens)
    best_end, best_number, best_level = busy_W[order[0]] + whole / speeds[order[0]], 1, 0.0
    if best_end > mean and tokens > 1:
        speed = level = 0.0
        for number, worker in enumerate(order, 1):
            # All are done at the same time, unless the last one's least call takes longer.
            speed += speeds[worker]
            level += busy_W[worker] * speeds[worker] + cost.call_tokens
            ends = (level + tokens) / speed
            if number > 1:
                end = max(ends, ready[worker])
                if end < best_end:
                    best_end, best_number, best_level = end, number, ends
                if end <= mean:
                    break
    taken = order[:best_number]
    if best_number == 1:
        parts = [float(tokens)]
    else:
        parts = [max(0.0, (best_level - busy_W[worker]) * speeds[worker] - cost.call_tokens) for worker in taken]
    scale = tokens / sum(parts)
    shares = dict.fromkeys(workers, 0)
    left = tokens
    for worker, part in zip(taken, parts, strict=True):
        shares[worker] = int(part * scale)
        left -= shares[worker]
    shares[taken[0]] += left
    for worker, share in shares.items():
        busy_W[worker] += cost(share) / speeds[worker]
    return list(shares.values())
