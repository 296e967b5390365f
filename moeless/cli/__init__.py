"""The command line: pack, serve, experts. Errors on purpose are one line on stderr and the error's exit code."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from moeless import __version__
from moeless.cli.plan import plan_command
from moeless.cli.policy import policy_app
from moeless.cli.predict import predict_app
from moeless.cli.simulate import simulate_command
from moeless.cli.trace import trace_app
from moeless.core.errors import ConfigError, MoelessError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(policy_app, name="policy")
app.add_typer(predict_app, name="predict")
app.add_typer(trace_app, name="trace")
app.command("simulate")(simulate_command)
app.command("plan")(plan_command)
_stdout = Console()
_stderr = Console(stderr=True)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint (safetensors).")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist, or hold a pack of this checkpoint.")],
) -> None:
    """Split a checkpoint into its backbone and one package for each expert function."""
    from moeless.packages.pack import pack_checkpoint

    with _PackingProgress() as (progress, on_progress):
        manifest = pack_checkpoint(checkpoint, out, on_progress=on_progress)
        progress.stop()
    _stdout.print(
        f"{out}: {manifest.model_id}, {manifest.num_moe_layers} MoE layers x {manifest.num_experts} experts, "
        f"{len(manifest.functions)} functions of {manifest.function_bytes / 1e6:.1f} MB in all"
    )


@app.command()
def serve(
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
        int | None, typer.Option(help="Most tokens of prompt and completion; default: the model's.")
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
    from moeless.packages.source import resolve_model

    with _PackingProgress() as (progress, on_progress):
        packed = resolve_model(model, on_progress=on_progress)
        progress.stop()
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
        max_context_tokens=max_model_len,
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

    with _stderr.status("") as status, ExitStack() as stack:
        at = f"[{host}]" if ":" in host else host
        url = f"http://{at}:{port}{route_prefix.rstrip('/')}"
        start = _BreakableStart(status.update, is_serving=lambda: _is_ready(url))
        stop = start.asked_to_stop
        stack.enter_context(running(packed.manifest, settings, ray_address=ray_address, on_phase=start.begin_phase))
        start.is_over = True
        status.update("connecting engine and workers")
        _wait_until_ready(url, stop)
        status.stop()
        key = " -H 'Authorization: Bearer $MOELESS_API_KEY'" if settings.api_keys else ""
        body = f'{{"model": "{settings.model_id}", "messages": [{{"role": "user", "content": "What is 12 + 7?"}}]}}'
        _stdout.print(f"serving {settings.model_id} on {url} (Ctrl-C stops)", highlight=False)
        _stdout.print(
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        _stdout.print(
            f"  openai: OpenAI(base_url='{url}/v1', api_key='...')   experts: moeless experts --url {url}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        stop.wait()
        _stdout.print("stopping")


@app.command()
def experts(
    url: Annotated[str, typer.Option(help="Where moeless serves.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MOELESS_API_KEY", help="Key, if one is asked for.")] = None,
    top: Annotated[int | None, typer.Option(help="Only so many functions, those with the most tokens.")] = None,
) -> None:
    """Show each expert function: state, replicas, worker, bytes, tokens served."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/experts", headers=headers, timeout=10.0)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise MoelessError(f"{url}/v1/experts: {error}") from error
    _stdout.print(experts_table(response.json()["data"], top=top))


def experts_table(functions: list[dict[str, object]], *, top: int | None = None) -> Table:
    """Rows of GET /v1/experts as a table, by name or, with `top`, by tokens served."""
    rows = list(functions)
    if top is not None:
        rows = sorted(rows, key=lambda row: -int(str(row["tokens_served"])))[:top]
    table = Table("function", "state", "replicas", "worker", "KB", "tokens", title="expert functions")
    for row in rows:
        workers = row["workers"]
        assert isinstance(workers, list)
        kilobytes = f"{int(str(row['bytes'])) / 1e3:.0f}"
        table.add_row(
            str(row["name"]),
            str(row["state"]),
            str(row["replicas"]),
            ", ".join(map(str, workers)),
            kilobytes,
            str(row["tokens_served"]),
        )
    return table


def main() -> None:
    """Entry point."""
    try:
        app()
    except MoelessError as error:
        _stderr.print(f"moeless: {' '.join(str(error).split())}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _stderr.print("moeless: interrupted")
        sys.exit(130)


class _PackingProgress:
    """A progress bar that a packing callback moves; nothing is shown while nothing is packed."""

    def __enter__(self) -> tuple[Progress, Callable[[int, int, str], None]]:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=_stderr,
            transient=True,
        )
        self._task: TaskID | None = None

        def on_progress(done: int, total: int, label: str) -> None:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task(label, total=total)
            self._bar.update(self._task, completed=done, total=total, description=label)

        return self._bar, on_progress

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


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


class _BreakableStart:
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


def _wait_until_ready(url: str, stop: threading.Event) -> None:
    """Return once GET /ready says 200, or when asked to stop."""
    while not stop.is_set() and not _is_ready(url):
        stop.wait(0.1)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False  # not listening yet
