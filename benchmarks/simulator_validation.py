"""Accuracy of the simulator against the live engine: layer and request latency, predicted and measured.

`python -m benchmarks simulator_validation` serves moeless-mini with two worker processes, one thread in each process.
First it measures what the parts cost: an expert by itself, and the layers and steps of closed batches, from which the
exchange and the backbone are fitted. Then it serves requests that arrive at random, records their routing, and lets the
simulator replay the very same arrivals, lengths and routing with the fitted costs. Batches and arrivals come in turns,
so that a machine that slows down slows both; nothing is fitted to what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from torch import Tensor

from benchmarks._models import word_tokenizer
from benchmarks.decode_step import RUN_SECRET, start_worker
from moeless.core.arrays import Float64Array
from moeless.core.cluster import even_cluster
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.core.plan import Plan
from moeless.core.recording import RecordingOptions
from moeless.core.routing_table import RoutingTable, spread_evenly
from moeless.deployments.worker import MAX_ROWS
from moeless.dispatch.connect import connect
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.config import EngineConfig
from moeless.engine.observing import RowSpan
from moeless.engine.routing_recorder import RoutingRecorder
from moeless.engine.transformers.build import build_engine
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import load_backbone
from moeless.packages.packed_model import PackedModel
from moeless.packages.source import resolve_model
from moeless.planning.cost import BackboneTime, CostProfile, ExchangeTime, ExpertTime
from moeless.planning.observation import Observation
from moeless.planning.profiles import builtin_profiles
from moeless.simulate.batching import BatchingConfig
from moeless.simulate.report.results import SystemResult
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario, System
from moeless.simulate.simulation import simulate
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import ArrivalTrace, RoutingTrace, TraceMetadata

WORKERS = ("worker-0", "worker-1")
BATCHING = BatchingConfig(max_batch_tokens=512, max_running=64)
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(slots=True)
class StepNote:
    """Tokens of one step of the engine, and its duration."""

    num_tokens: int
    decode_context: float
    prefill_context: float
    began_s: float
    ended_s: float = 0.0
    layer_s: list[float] = field(default_factory=list)
    counts_LE: list[NDArray[np.int64]] = field(default_factory=list)
    """Tokens of each expert, layer by layer."""


class _TimedDispatcher(Dispatcher):
    """Notes how long each layer takes, for whoever asks."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.layer_s: list[float] = []

    def forward(self, layer: int, hidden_TH: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        began_s = time.perf_counter()
        out_TH = super().forward(layer, hidden_TH, top_k_index_Tk, top_k_weights_Tk)
        self.layer_s.append(time.perf_counter() - began_s)
        return out_TH


class LiveEngine:
    """moeless-mini over two workers, that notes its steps and when requests got their tokens."""

    def __init__(self, packed: PackedModel) -> None:
        manifest = packed.manifest
        self.packed = packed
        table = spread_evenly(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=WORKERS)
        self.plan = _plan_of(table, num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts)
        self._workers = [start_worker(packed, table, name) for name in WORKERS]
        torch.set_num_threads(1)
        register_experts()
        model = load_backbone(packed, dtype=torch.float32)
        pool = InstancePool(packed, dtype=torch.float32)
        self.local = FeedForward(pool)
        self._dispatcher = _TimedDispatcher(self.local, table)
        hidden_size = packed.layout(0).hidden_size
        channels = {
            name: connect(
                endpoint,
                run_secret=RUN_SECRET,
                engine="benchmark",
                hidden_size=hidden_size,
                top_k=manifest.top_k,
                dtype=torch.float32,
                max_rows=MAX_ROWS,
            )
            for name, (_, endpoint) in zip(WORKERS, self._workers, strict=True)
        }
        self._dispatcher.set_channels(channels)
        attach_dispatcher(model, self._dispatcher)
        self.vocab_size: int = model.config.get_text_config().vocab_size
        config = EngineConfig(
            num_threads=1,
            prefix_sharing=False,
            max_batch_tokens=BATCHING.max_batch_tokens,
            max_running=BATCHING.max_running,
            kv_cache_bytes=256 << 20,
        )
        self._engine = build_engine(model, word_tokenizer(self.vocab_size), config, self._on_step)
        self._dispatcher.set_observer(self._engine.observers)
        self._metadata = TraceMetadata(
            model="moeless-mini",
            num_experts=manifest.num_experts,
            top_k=manifest.top_k,
            num_layers=manifest.num_moe_layers,
        )
        self.steps: list[StepNote] = []
        self.first_s: dict[str, float] = {}
        self.last_s: dict[str, float] = {}
        self._step: StepNote | None = None
        self._left = 0
        self._done = threading.Event()
        self._engine.observers.add(self)
        self._engine.start()

    def serve(self, arrivals: ArrivalTrace, *, seed: int) -> tuple[RoutingTrace, Float64Array]:
        """Submit prompts of random tokens when they are due, and wait for the last; returns routing and times sent."""
        rng = np.random.default_rng(seed)
        self.steps, self.first_s, self.last_s = [], {}, {}
        self._left = arrivals.num_requests
        self._done.clear()
        total = int(arrivals.prompt_tokens.sum() + arrivals.output_tokens.sum())
        recorder = RoutingRecorder(self._engine.observers, self._metadata, RecordingOptions(max_tokens=total))
        recorder.start()
        sent_s = np.zeros(arrivals.num_requests)
        began_s = time.perf_counter()
        for request in range(arrivals.num_requests):
            time.sleep(max(0.0, began_s + float(arrivals.arrival_s[request]) - time.perf_counter()))
            prompt = rng.integers(3, self.vocab_size, int(arrivals.prompt_tokens[request])).tolist()
            sampling = SamplingParams(max_tokens=int(arrivals.output_tokens[request]), temperature=0.0, ignore_eos=True)
            sent_s[request] = time.perf_counter()
            self._engine.submit(GenerationRequest(request_id=str(request), prompt_token_ids=prompt, sampling=sampling))
        self._done.wait()
        return recorder.take_trace(), sent_s

    def close(self) -> None:
        self._engine.stop()
        self._dispatcher.close()
        for process, _ in self._workers:
            process.kill()

    # -- in the generation thread

    def begin_step(self, spans: list[RowSpan]) -> None:
        decode = [span for span in spans if span.first_position >= span.sequence.num_prompt_tokens]
        prefill = [span for span in spans if span.first_position < span.sequence.num_prompt_tokens]
        self._dispatcher.layer_s.clear()
        self._step = StepNote(
            num_tokens=sum(span.num_rows for span in spans),
            decode_context=float(sum(span.first_position for span in decode)),
            prefill_context=float(
                sum(span.num_rows * (span.first_position + (span.num_rows - 1) / 2) for span in prefill)
            ),
            began_s=time.perf_counter(),
        )

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: NDArray[Any], weights_Tk: NDArray[Any]) -> None:
        if self._step is not None:
            self._step.counts_LE.append(np.bincount(experts_Tk.reshape(-1), minlength=self._metadata.num_experts))

    def end_step(self) -> None:
        if self._step is not None:
            self._step.layer_s = list(self._dispatcher.layer_s)

    def forget(self, request_id: str) -> None:
        """Nothing is kept by request."""

    def _on_step(self, deltas: list[GenerationDelta]) -> None:
        now_s = time.perf_counter()
        for delta in deltas:
            if delta.error is not None:
                raise RuntimeError(delta.error)
            if delta.num_tokens:
                self.first_s.setdefault(delta.request_id, now_s)
                self.last_s[delta.request_id] = now_s
            self._left -= delta.finish_reason is not None
        if self._step is not None:
            self._step.ended_s = now_s
            self.steps.append(self._step)
            self._step = None
        if self._left == 0:
            self._done.set()


class _Fixed:
    """The live engine's plan, for ever."""

    name = "live"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        return self._plan


def measure_experts(live: LiveEngine, *, repeats: int) -> ExpertTime:
    """Measure the time of one more expert on a worker: eight against four, with equal tokens for each."""
    hidden_size = live.packed.layout(0).hidden_size

    def seconds(num_experts: int, tokens: int) -> float:
        x_RH = torch.randn(num_experts * tokens, hidden_size)
        rows_n = np.arange(num_experts * tokens)
        experts_n = np.repeat(np.arange(num_experts), tokens)
        weights_n = torch.ones(num_experts * tokens)
        began_s = time.perf_counter()
        live.local.partial_sums(0, x_RH, rows_n, experts_n, weights_n)
        return time.perf_counter() - began_s

    knots = []
    with torch.inference_mode():
        for tokens in EXPERT_TOKENS:
            taken = [(seconds(8, tokens), seconds(4, tokens)) for _ in range(repeats + 3)][3:]
            more_s, fewer_s = np.median(taken, axis=0)
            knots.append((float(tokens), max(float(more_s - fewer_s) / 4, 1e-7)))
    rising = np.maximum.accumulate([seconds for _, seconds in knots])
    return ExpertTime.from_knots([(tokens, float(s)) for (tokens, _), s in zip(knots, rising, strict=True)])


def fit_profile(steps: Sequence[StepNote], plan: Plan, expert_time: ExpertTime) -> tuple[CostProfile, float]:
    """Costs of exchange and backbone that explain the steps best, and the link's bytes a second."""
    known = builtin_profiles()["cpu-moeless-mini"]
    model = known.model
    worker_LE = np.zeros((plan.num_layers, plan.num_experts), dtype=np.int64)
    worker_LE[plan.layer_N, plan.expert_N] = plan.worker_N
    rows, rest_s = [], []
    for step in steps:
        for layer, (counts_E, layer_s) in enumerate(zip(step.counts_LE, step.layer_s, strict=True)):
            busy_W = np.bincount(worker_LE[layer], weights=expert_time(counts_E), minlength=plan.num_workers)
            rows.append((1.0, float((busy_W > 0).sum()), float(step.num_tokens)))
            rest_s.append(layer_s - busy_W.max())
    (fixed_s, message_s, token_s), _ = nnls(np.array(rows), np.array(rest_s))
    whole = [(step, _whole_step_s(step, before)) for before, step in zip([None, *steps], steps, strict=False)]
    features = np.array([(1.0, s.num_tokens, s.decode_context, s.prefill_context) for s, _ in whole])
    backbone_s = np.array([seconds - sum(step.layer_s) for step, seconds in whole])
    scale = features.max(axis=0)
    fitted = nnls(features / np.where(scale > 0, scale, 1), backbone_s)[0] / np.where(scale > 0, scale, 1)
    devices = plan.num_workers
    profile = CostProfile(
        name="fitted",
        source="benchmarks/simulator_validation.py",
        model=model,
        expert_time=expert_time,
        backbone=BackboneTime(
            step_s=float(fitted[0]),
            token_s=float(fitted[1]) * devices,  # the simulator shares the batch among as many devices as workers
            decode_context_s=float(fitted[2]) * devices,
            prefill_context_s=float(fitted[3]) * devices,
        ),
        exchange=ExchangeTime(hub_s=float(fixed_s) / 2, message_s=float(message_s) / 2, all_to_all_s=0.0),
    )
    return profile, 2 * model.hidden_bytes / max(float(token_s), 1e-12)


def _whole_step_s(step: StepNote, before: StepNote | None) -> float:
    """From the end of the one before, if the engine did not wait for requests between them."""
    gap_s = step.began_s - before.ended_s if before is not None else np.inf
    return step.ended_s - (step.began_s - gap_s if gap_s < 3e-3 else step.began_s)


def predicted(
    live: LiveEngine, profile: CostProfile, link: float, trace: RoutingTrace, arrivals: ArrivalTrace
) -> SystemResult:
    """Simulate the same requests."""
    cluster = even_cluster(len(WORKERS), memory_bytes=1 << 30)
    scenario = Scenario(
        profile=profile,
        cluster=type(cluster)(workers=cluster.workers, local_bytes_per_s=link),
        routing=SequenceRouting(trace),
        arrivals=arrivals,
        batching=BATCHING,
        follow_in_order=True,
    )
    return simulate(scenario, System(name="live", planner=_Fixed(live.plan)))


def _plan_of(table: RoutingTable, *, num_layers: int, num_experts: int) -> Plan:
    layers, experts, workers = zip(
        *((f.layer, f.expert, WORKERS.index(shares[0].worker)) for f, shares in table.instances.items()), strict=True
    )
    return Plan.from_instances(
        version=1,
        num_layers=num_layers,
        num_experts=num_experts,
        num_workers=len(WORKERS),
        layer_N=np.array(layers),
        expert_N=np.array(experts),
        worker_N=np.array(workers),
        share_N=np.ones(len(layers)),
    )


def run(live: LiveEngine, *, rates: Sequence[float], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each rate: measured, predicted."""
    calibration: list[StepNote] = []
    served = []
    for number in range(rounds):
        for batch in (1, 2, 4, 8, 16, 32):
            closed = made_up_arrivals(
                rate_per_s=1e6, num_requests=batch, prompt_tokens=60, output_tokens=24, length_cv=0.7, seed=batch
            )
            live.serve(closed, seed=batch)
            calibration += live.steps
        for rate in rates:
            seed = 1000 * number + round(10 * rate)
            asked = made_up_arrivals(
                rate_per_s=rate,
                num_requests=max(2, round(rate * seconds)),
                prompt_tokens=60,
                output_tokens=24,
                length_cv=0.7,
                seed=seed,
            )
            trace, sent_s = live.serve(asked, seed=seed)
            if trace.num_sequences != asked.num_requests:
                raise RuntimeError(f"each request must be one sequence, got {trace.num_sequences}")
            came = ArrivalTrace.from_arrays(
                arrival_s=sent_s - sent_s[0], prompt_tokens=asked.prompt_tokens, output_tokens=asked.output_tokens
            )
            keys = [str(request) for request in range(asked.num_requests)]
            measured = {
                "layer": np.concatenate([step.layer_s for step in live.steps]),
                "TTFT": np.array([live.first_s[key] for key in keys]) - sent_s,
                "request": np.array([live.last_s[key] for key in keys]) - sent_s,
            }
            served.append((rate, trace, came, measured))
    profile, link = fit_profile(calibration, live.plan, measure_experts(live, repeats=30))
    rows = []
    for rate, trace, came, measured in served:
        result = predicted(live, profile, link, trace, came)
        told = {"layer": result.layer_s, "TTFT": result.ttft_s, "request": result.request_s}
        for name, values in measured.items():
            rows.append(
                {
                    "rate": rate,
                    "what": name,
                    "measured_mean_ms": float(values.mean()) * 1e3,
                    "predicted_mean_ms": told[name].mean * 1e3,
                    "measured_p50_ms": float(np.median(values)) * 1e3,
                    "predicted_p50_ms": told[name].p50 * 1e3,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, once")
    parser.add_argument("--rates", type=float, nargs="+", default=[3.0, 8.0, 16.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals, at each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    live = LiveEngine(resolve_model("moeless-mini"))
    try:
        rows = run(
            live,
            rates=arguments.rates[:1] if arguments.quick else arguments.rates,
            seconds=4.0 if arguments.quick else arguments.seconds,
            rounds=1 if arguments.quick else arguments.rounds,
        )
    finally:
        live.close()
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the rounds of each rate."""
    table = Table(title="simulated against served")
    for header in ("requests/s", "latency", "mean ms", "predicted", "error", "p50 ms", "predicted", "error"):
        table.add_column(header, justify="left" if header == "latency" else "right")
    for rate, what in dict.fromkeys((row["rate"], row["what"]) for row in rows):
        same = [row for row in rows if (row["rate"], row["what"]) == (rate, what)]
        cells = []
        for kind in ("mean", "p50"):
            measured = float(np.mean([row[f"measured_{kind}_ms"] for row in same]))
            told = float(np.mean([row[f"predicted_{kind}_ms"] for row in same]))
            cells += [f"{measured:.2f}", f"{told:.2f}", f"{told / measured - 1:+.0%}"]
        table.add_row(f"{rate:g}", what, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
