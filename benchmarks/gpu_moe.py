"""On a GPU: a MoE layer against transformers' grouped product, and the cold load of an expert against the bus.

`python -m benchmarks gpu_moe` packs one-layer models with the experts' shapes of Mixtral, Qwen3-30B-A3B and
DeepSeek-V2-Lite, runs the layer with every expert resident (bfloat16) in turns with transformers' grouped_mm on the
same weights, and loads experts again and again next to copies of the same size from pinned memory. A first load, which
also checks the package's sha256, is shown separately.

Wanted: the layer at most 1.1 times transformers' time; the load at least 80 % of the pinned copy's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from moeless.functions.pool import InstancePool


class Shape(NamedTuple):
    """One layer's experts."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int


SHAPES = (
    Shape("Mixtral", 4096, 14336, 8, 2),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
)
SMALL = (Shape("small", 256, 512, 8, 2),)
NUM_LOADED = 8
"""Functions that are loaded in turns."""


def main(argv: list[str] | None = None) -> None:
    """Print the tables; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cuda", help="cpu tries the benchmark itself, on a small shape")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens and repeats")
    options = parser.parse_args(argv)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing to measure")
        return
    shapes = SHAPES if options.device == "cuda" else SMALL
    if options.quick:
        shapes, options.tokens, options.repeats = shapes[-1:], [1, 128], 5
    layers: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in shapes:
            with tempfile.TemporaryDirectory(prefix="moeless-bench-") as folder:
                pool = _make_pool(Path(folder), shape, options.device)
                first_s = _load_all(pool)
                layers += _measure_layer(pool, shape, options)
                loads.append(_measure_loads(pool, shape, options) | {"first_seconds": first_s})
    _print(layers, loads)
    if options.json:
        options.json.write_text(json.dumps({"layers": layers, "loads": loads}, indent=2))


def _make_pool(folder: Path, shape: Shape, device: str) -> InstancePool:
    """A random one-layer model, packed, and an empty pool on the device."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from moeless.functions.pool import InstancePool
    from moeless.packages.pack import pack_checkpoint
    from moeless.packages.packed_model import PackedModel

    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=64,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.inference_mode(False):
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    pack_checkpoint(folder / "checkpoint", folder / "packed")
    return InstancePool(PackedModel.open(folder / "packed"), device=device, dtype=torch.bfloat16)


def _load_all(pool: InstancePool) -> float:
    """Seconds that one function's first load takes, checksum and all."""
    started_s = time.perf_counter()
    pool.start_many(pool.packed.functions)
    return (time.perf_counter() - started_s) / len(pool.packed.functions)


def _measure_layer(pool: InstancePool, shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a forward of each way, in turns."""
    import torch
    from transformers.integrations.moe import grouped_mm_experts_forward

    from moeless.functions.feed_forward import FeedForward

    feed_forward, theirs = FeedForward(pool), _transformers_experts(pool, shape)
    rows = []
    for num_tokens in options.tokens:
        hidden_TH = torch.randn(num_tokens, shape.hidden, dtype=torch.bfloat16, device=options.device)
        scores_TE = torch.rand(num_tokens, shape.experts, device=options.device)
        weights_Tk, experts_Tk = scores_TE.topk(shape.top_k, dim=-1)
        routed = (hidden_TH, experts_Tk, weights_Tk.to(torch.bfloat16))
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "moeless": partial(feed_forward.forward_resident, 0, *routed),
            "transformers": partial(grouped_mm_experts_forward, theirs, *routed),
        }
        torch.testing.assert_close(*(way() for way in ways.values()), rtol=0.05, atol=0.05)
        taken_ms: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, way in ways.items():
                ms = _time_ms(way, count=20, device=options.device)
                if repeat:  # the first one warms up
                    taken_ms[name].append(ms)
        rows.append({"shape": shape.name, "tokens": num_tokens} | taken_ms)
    return rows


def _transformers_experts(pool: InstancePool, shape: Shape) -> Any:
    """transformers' module over the pool's own memory."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts)
    with torch.device("meta"):
        experts = MixtralExperts(config)
    slots = torch.from_numpy(pool.arena_rows_LE[0]).to(pool.device)
    arena = pool.arena(0)
    up_EIH, down_EHI = arena.up_SHI.transpose(1, 2), arena.down_SIH.transpose(1, 2)
    if slots.tolist() != sorted(slots.tolist()):
        up_EIH, down_EHI = up_EIH[slots], down_EHI[slots]
    experts.gate_up_proj = torch.nn.Parameter(up_EIH, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(down_EHI, requires_grad=False)
    return experts


def _measure_loads(pool: InstancePool, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """GB/s of loading functions and of copying as many bytes from pinned memory, in turns."""
    import torch

    functions = pool.packed.functions[:NUM_LOADED]
    num_bytes = pool.instance_bytes(0)
    on_gpu = options.device == "cuda"
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=options.device)
    rates: dict[str, list[float]] = {"load": [], "pinned copy": []}
    for _ in range(options.repeats):
        for function in functions:
            pool.drain(function)
        started_s = time.perf_counter()
        pool.start_many(functions)
        rates["load"].append(len(functions) * num_bytes / (time.perf_counter() - started_s) / 1e9)
        ms = _time_ms(lambda: target.copy_(pinned, non_blocking=True), count=len(functions), device=options.device)
        rates["pinned copy"].append(num_bytes / ms / 1e6)
    return {"shape": shape.name, "megabytes": num_bytes / 1e6} | rates


def _time_ms(work: Callable[[], Any], *, count: int, device: str) -> float:
    """Milliseconds of one call, of `count` that are queued one after the other."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(count):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / count * 1e3


def _print(layers: list[dict[str, Any]], loads: list[dict[str, Any]]) -> None:
    console = Console(width=120)
    table = Table(title="milliseconds of one MoE layer: median (least to most)")
    for column in ("experts of", "tokens", "moeless", "transformers", "moeless / transformers"):
        table.add_column(column, justify="right")
    for row in layers:
        ratio = statistics.median(row["moeless"]) / statistics.median(row["transformers"])
        cells = [_spread(row[way], 3) for way in ("moeless", "transformers")]
        table.add_row(row["shape"], str(row["tokens"]), *cells, f"{ratio:.2f}")
    console.print(table)
    table = Table(title="GB/s of loading an expert: median (least to most)")
    for column in ("experts of", "MB", "load", "pinned copy", "load / copy", "first load, ms"):
        table.add_column(column, justify="right")
    for row in loads:
        ratio = statistics.median(row["load"]) / statistics.median(row["pinned copy"])
        cells = [_spread(row[way], 1) for way in ("load", "pinned copy")]
        table.add_row(
            row["shape"], f"{row['megabytes']:.1f}", *cells, f"{ratio:.2f}", f"{row['first_seconds'] * 1e3:.1f}"
        )
    console.print(table)


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
