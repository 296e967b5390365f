"""Which replica computes what, decided anew for each layer of each step from the tokens that are there.

A plan's shares are right on average; a step's tokens are not the average. The dispatcher knows every expert's tokens
before it sends any, so it can even out the workers with the replicas that the plan gave it. Below some number of tokens
a call of an expert takes the same time whatever they are, for its weights are read once: then a function is not split,
only the less busy of its workers is taken. Above it, its tokens are shared.

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
_LEAST_GAIN = 0.002
"""Of the busiest worker's time."""
_MOST_ROUNDS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCost:
    """What a call of an expert costs a worker, in the time of computing one more token:
    `call_tokens` + max(tokens, `floor_tokens`) + tokens × `link_tokens`."""

    call_tokens: float = 0.0
    """Of the call itself."""
    floor_tokens: float = 0.0
    """As many tokens as take as long as reading the expert's weights."""
    link_tokens: float = 0.0
    """Of sending a token to the worker and its answer back, over the worker's link."""

    def __post_init__(self) -> None:
        for name in ("call_tokens", "floor_tokens", "link_tokens"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"call_cost.{name} must be at least 0 and finite, got {getattr(self, name)}")

    def __call__(self, tokens: float) -> float:
        """0 without tokens."""
        if not tokens:
            return 0.0
        return self.call_tokens + max(tokens, self.floor_tokens) + tokens * self.link_tokens


def balanced_split(
    tokens_F: Sequence[int],
    workers_F: Sequence[Sequence[int]],
    shares_F: Sequence[Sequence[float]],
    busy_W: list[float],
    cost: CallCost,
    *,
    speed_W: Sequence[float] | None = None,
) -> list[list[int]]:
    """Share out one layer's tokens of the functions F that have replicas, so that the busiest worker is done early.

    A function of many tokens starts with the plan's shares, which fit the load that was forecast; one of few goes whole
    to the least busy of its workers, the largest first. Then, some rounds long and as long as it helps, one of the
    busiest worker's functions moves on to another worker that has it, whole or in part, or whole to one that passes on
    another in its stead.

    Args:
        tokens_F: of each function.
        workers_F: numbers of the workers of each function's instances, different ones.
        shares_F: of each function's tokens, by the plan, in the same order; they sum to 1.
        busy_W: what the other functions cost each worker; what is shared out is added to it.
        speed_W: of the workers; default: all 1.
    Returns: for each function the tokens of each of its workers, in the order of `workers_F`; they sum to its tokens.
    """
    speeds = [1.0] * len(busy_W) if speed_W is None else speed_W
    call, floor, link = cost.call_tokens, cost.floor_tokens, cost.link_tokens
    most_whole = max(1, 2 * floor)
    split = [[0] * len(workers) for workers in workers_F]
    whole: list[tuple[float, int, int]] = []
    for function, tokens in enumerate(tokens_F):
        if tokens > most_whole:
            split[function] = parts = _by_shares(tokens, shares_F[function])
            for worker, part in zip(workers_F[function], parts, strict=True):
                busy_W[worker] += cost(part) / speeds[worker]
        elif tokens:
            added = call + (tokens if tokens > floor else floor) + tokens * link
            whole.append((-added, len(workers_F[function]), function))
    whole.sort()
    for less, num_workers, function in whole:
        workers = workers_F[function]
        if num_workers == 2 and speed_W is None:
            first, second = workers
            least = 0 if busy_W[first] <= busy_W[second] else 1
        else:
            ends = [busy_W[worker] - less / speeds[worker] for worker in workers]
            least = ends.index(min(ends))
        split[function][least] = tokens_F[function]
        worker = workers[least]
        busy_W[worker] -= less / speeds[worker]
    if speed_W is None:
        mean = sum(busy_W) / len(busy_W)
    else:
        mean = sum([busy * speed for busy, speed in zip(busy_W, speeds, strict=True)]) / sum(speeds)
    if max(busy_W) > _ENOUGH * mean:
        _move_on(split, workers_F, busy_W, cost, speeds, enough=_ENOUGH * mean)
    return split


def _by_shares(tokens: int, shares: Sequence[float]) -> list[int]:
    """Whole tokens, those that are left over to the largest share."""
    parts = [int(tokens * share) for share in shares]
    parts[max(range(len(parts)), key=shares.__getitem__)] += tokens - sum(parts)
    return parts


def _move_on(
    split: list[list[int]],
    workers_F: Sequence[Sequence[int]],
    busy_W: list[float],
    cost: CallCost,
    speeds: Sequence[float],
    *,
    enough: float,
) -> None:
    """Take calls or parts of them off the busiest worker while whoever takes over is less busy for it."""
    least_call = cost(1)
    for _ in range(_MOST_ROUNDS):
        high = max(busy_W)
        if high <= enough:
            return
        busiest = busy_W.index(high)
        best_end, best = high * (1 - _LEAST_GAIN), (-1, -1, -1, 0)
        for function, workers in enumerate(workers_F):
            if busiest not in workers:
                continue
            origin = workers.index(busiest)
            tokens = split[function][origin]
            if not tokens:
                continue
            for target, worker in enumerate(workers):
                held = split[function][target]
                if busy_W[worker] + (0.0 if held else least_call / speeds[worker]) >= best_end:
                    continue
                for moved in _amounts(tokens, held, high - busy_W[worker], cost, speeds[busiest], speeds[worker]):
                    left = high - (cost(tokens) - cost(tokens - moved)) / speeds[busiest]
                    end = max(left, busy_W[worker] + (cost(held + moved) - cost(held)) / speeds[worker])
                    if end < best_end:
                        best_end, best = end, (function, origin, target, moved)
        function, origin, target, moved = best
        if function < 0:
            if not _pass_along(split, workers_F, busy_W, cost, speeds, busiest):
                return
            continue
        tokens, held = split[function][origin], split[function][target]
        worker = workers_F[function][target]
        busy_W[busiest] -= (cost(tokens) - cost(tokens - moved)) / speeds[busiest]
        busy_W[worker] += (cost(held + moved) - cost(held)) / speeds[worker]
        split[function][origin], split[function][target] = tokens - moved, held + moved


def _pass_along(
    split: list[list[int]],
    workers_F: Sequence[Sequence[int]],
    busy_W: list[float],
    cost: CallCost,
    speeds: Sequence[float],
    busiest: int,
) -> bool:
    """Move a call off the busiest worker to one that passes on another, and so on to one with room (an augmenting path,
    found breadth first). Returns whether there is one that leaves all workers less busy than the busiest was."""
    enough = busy_W[busiest] * (1 - _LEAST_GAIN)
    came_from: dict[int, tuple[int, int, int, int]] = {busiest: (-1, -1, -1, -1)}
    queue = [busiest]
    for worker in queue:
        for function, workers in enumerate(workers_F):
            if worker not in workers:
                continue
            origin = workers.index(worker)
            tokens = split[function][origin]
            if not tokens or sum(map(bool, split[function])) > 1:
                continue  # those that are split have been levelled already
            for target, receiver in enumerate(workers):
                if receiver in came_from:
                    continue
                came_from[receiver] = (worker, function, origin, target)
                if busy_W[receiver] + cost(tokens) / speeds[receiver] < enough:
                    if _apply_path(split, busy_W, cost, speeds, came_from, receiver, enough):
                        return True
                    del came_from[receiver]
                else:
                    queue.append(receiver)
    return False


def _apply_path(
    split: list[list[int]],
    busy_W: list[float],
    cost: CallCost,
    speeds: Sequence[float],
    came_from: dict[int, tuple[int, int, int, int]],
    last: int,
    enough: float,
) -> bool:
    """Make the moves that lead to `last`, unless one of the workers between is then as busy as the busiest."""
    path = []
    receiver = last
    while came_from[receiver][0] >= 0:
        worker, function, origin, target = came_from[receiver]
        path.append((worker, receiver, function, origin, target))
        receiver = worker
    after = {worker: busy_W[worker] for worker, *_ in path} | {last: busy_W[last]}
    for worker, receiver, function, origin, _ in path:
        added = cost(split[function][origin])
        after[worker] -= added / speeds[worker]
        after[receiver] += added / speeds[receiver]
    if max(after.values()) >= enough:
        return False
    for worker, busy in after.items():
        busy_W[worker] = busy
    for _, _, function, origin, target in path:
        split[function][target], split[function][origin] = split[function][origin], 0
    return True


def _amounts(tokens: int, held: int, gap: float, cost: CallCost, from_speed: float, to_speed: float) -> tuple[int, ...]:
    """How many of a call's tokens to move: all, or so many that both workers are then done at the same time."""
    floor = cost.floor_tokens
    if tokens <= floor:
        return (tokens,)
    token = 1 + cost.link_tokens
    new = cost.call_tokens / to_speed if not held else 0.0
    part = int((gap - new) / (token / from_speed + token / to_speed))
    if part < 1 or part >= tokens or held + part < floor:
        return (tokens,)
    return tokens, part
