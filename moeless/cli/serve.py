"""`moeless serve`: start Ray, engine, workers and gateway, and serve until interrupted. docs/serving.md."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import httpx
import typer

from moeless.cli._console import PackingProgress, stderr, stdout
from moeless.core.errors import ConfigError


def serve_command(
    model: Annotated[str, typer.Argument(help="moeless-mini, a packed folder, a checkpoint folder or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(help="Worker processes; 0 keeps the experts in the engine's process.")] = 0,
    isolation: Annotated[
        str, typer.Option(help="shared: workers host many functions; function: one deployment each.")
    ] = "shared",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MOELESS_API_KEY", help="Key that clients must send; may be given more than once."),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API; default: the model's.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Maximum tokens of prompt and completion; default: the model's.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Sequences decoded together.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests held beyond that; more are answered 429.")] = 256,
    kv_cache_gb: Annotated[float | None, typer.Option(help="Memory for the KV cache, in GB.")] = None,
    worker_memory_gb: Annotated[
        float | None, typer.Option(help="Most memory for instances on one worker, in GB.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads of the engine and of each worker.")] = None,
    call_timeout: Annotated[float, typer.Option(help="Seconds after which a worker's answer counts as failed.")] = 5.0,
    function_max_replicas: Annotated[int, typer.Option(help="isolation function: most replicas of a function.")] = 4,
    function_idle: Annotated[
        float, typer.Option(help="isolation function: idle seconds until a function goes to zero.")
    ] = 60.0,
    cors_allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin that browsers may call from; may be given more than once.")
    ] = None,
    predictors: Annotated[
        Path | None, typer.Option(help="Forecast each layer's load with the predictors of `moeless predict fit`.")
    ] = None,
    predict_distance: Annotated[int, typer.Option(help="How many MoE layers ahead to forecast.")] = 1,
    predict_overhead: Annotated[
        float, typer.Option(help="Most of the steps' time that forecasting may take; 1 forecasts every step.")
    ] = 0.015,
    allow_recording: Annotated[
        bool | None, typer.Option(help="Let clients record what the engine routes; default: on a loopback host.")
    ] = None,
    allow_tracing: Annotated[bool | None, typer.Option(hidden=True)] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: start Ray here.")] = None,
    app_name: Annotated[str, typer.Option(help="Name of the Serve application on the cluster.")] = "moeless",
    route_prefix: Annotated[str, typer.Option(help="Where the API begins on the cluster.")] = "/",
) -> None:
    """Serve a model with expert functions until interrupted."""
    if allow_tracing is not None:
        raise ConfigError("--allow-tracing is now --allow-recording (and --no-allow-recording)")
    from moeless.deployments.runtime import prepare_environment
    from moeless.deployments.settings import ServeSettings
    from moeless.packages.context_length import check_context
    from moeless.packages.source import resolve_model

    with PackingProgress() as (progress, on_progress):
        packed = resolve_model(model, on_progress=on_progress)
        progress.stop()
    check_context(packed, max_model_len)
    if "MOELESS_TOKEN" in os.environ:
        raise ConfigError("MOELESS_TOKEN is no longer read; set MOELESS_RUN_SECRET instead")
    on_device = _device(device)
    settings = ServeSettings(
        packed_path=str(packed.path),
        model_id=served_model_name or packed.manifest.model_id,
        run_secret=os.environ.get("MOELESS_RUN_SECRET") or secrets.token_hex(32),
        num_workers=workers,
        isolation=isolation,  # type: ignore[arg-type]  # checked by ServeSettings
        dtype=dtype,
        device=on_device,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        max_model_len=max_model_len,
        max_running=max_running,
        max_waiting=max_waiting,
        kv_cache_bytes=_bytes("kv-cache-gb", kv_cache_gb),
        worker_memory_bytes=_bytes("worker-memory-gb", worker_memory_gb),
        num_threads=threads,
        cores=tuple(sorted(os.sched_getaffinity(0))) if ray_address is None and on_device == "cpu" else (),
        cors_allow_origins=tuple(cors_allow_origin or ()),
        predictors_path=None if predictors is None else str(predictors.resolve()),
        predict_distance=predict_distance,
        predict_overhead=predict_overhead,
        allow_recording=allow_recording,
        app_name=app_name,
        route_prefix=route_prefix,
        call_timeout_s=call_timeout,
        function_max_replicas=function_max_replicas,
        function_idle_s=function_idle,
    )
    if settings.predictors_path is not None:
        # What the engine would refuse is better told before Ray starts.
        from moeless.engine.prediction import load_live_predictor
        from moeless_predictors.live import LiveConfig

        load_live_predictor(settings.predictors_path, LiveConfig(distance=predict_distance), packed.manifest)
    prepare_environment()
    from moeless.deployments.application import running

    with stderr.status("") as status, ExitStack() as stack:
        at = f"[{host}]" if ":" in host else host
        url = f"http://{at}:{port}{route_prefix.rstrip('/')}"
        start = BreakableStart(status.update, is_serving=lambda: _is_ready(url))
        stop = start.asked_to_stop
        stack.enter_context(running(packed.manifest, settings, ray_address=ray_address, on_phase=start.begin_phase))
        start.is_over = True
        status.update("connecting engine and workers")
        wait_until_ready(url, stop)
        status.stop()
        key = " -H 'Authorization: Bearer $MOELESS_API_KEY'" if settings.api_keys else ""
        body = f'{{"model": "{settings.model_id}", "messages": [{{"role": "user", "content": "What is 12 + 7?"}}]}}'
        stdout.print(f"serving {settings.model_id} on {url} (Ctrl-C stops)", highlight=False)
        stdout.print(
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        stdout.print(
            f"  openai: OpenAI(base_url='{url}/v1', api_key='...')   experts: moeless experts --url {url}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        stop.wait()
        stdout.print("stopping")


def _bytes(option: str, gigabytes: float | None) -> int | None:
    if gigabytes is None:
        return None
    if gigabytes <= 0:
        raise ConfigError(f"--{option} must be above 0, got {gigabytes}")
    return int(gigabytes * 1e9)


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"--device must be cpu, cuda or auto, got {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    return name


class BreakableStart:
    """Lets a signal break off the start, and afterwards only sets `asked_to_stop`.

    Not in the middle of starting Ray: processes of it would be left behind. It is waited for, some seconds. Nor when
    the model is served already and Serve is only about to say so: that is a stop like any other.
    """

    def __init__(self, show: Callable[[str], None], *, is_serving: Callable[[], bool]) -> None:
        self.asked_to_stop = threading.Event()
        self.is_over = False
        self._show, self._is_serving = show, is_serving
        self._can_break = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def begin_phase(self, phase: str) -> None:
        self._show(phase)
        if self.asked_to_stop.is_set():
            raise KeyboardInterrupt
        self._can_break = phase != "starting Ray"

    def _on_signal(self, *_: object) -> None:
        is_first = not self.asked_to_stop.is_set()
        self.asked_to_stop.set()
        if self._can_break and not self.is_over and is_first and not self._is_serving():
            raise KeyboardInterrupt


def wait_until_ready(url: str, stop: threading.Event) -> None:
    """Return once GET /ready says 200, or when asked to stop."""
    while not stop.is_set() and not _is_ready(url):
        stop.wait(0.1)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False  # not listening yet
