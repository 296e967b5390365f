"""`moeless serve`: start Ray, engine, workers and gateway, and serve until interrupted. docs/serving.md."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import typer

from moeless.cli._console import PackingProgress, ReservedTerminal, say, say_aside, waiting
from moeless.cli._extras import require_extra
from moeless.cli._options import above_zero, from_to, input_file, not_empty, options_for
from moeless.core.errors import ConfigError, MoelessError
from moeless.deployments.run_secrets import RUN_SECRET_VARIABLE, RunSecrets, read_secrets
from moeless.deployments.settings import FunctionScaling, PredictionSettings, ServeSettings
from moeless.dispatch.config import DispatchConfig
from moeless.engine.config import EngineConfig
from moeless.gateway.config import GatewayConfig

if TYPE_CHECKING:
    from moeless.packages.manifest import Manifest

_DEFAULTS = ServeSettings(packed_path="", model_id="")

_OPTIONS = {
    name.replace("-", separator): f"--{name}"
    for name in (
        *("app-name", "api-key", "device", "dtype", "isolation", "max-model-len", "max-running", "max-waiting", "port"),
        *("predict-distance", "predict-overhead", "predictors", "route-prefix", "workers", "function-max-replicas"),
    )
    for separator in "-_"
} | {
    "num_threads": "--threads",
    "dispatch.call_timeout_s": "--call-timeout",
    "functions.max_replicas": "--function-max-replicas",
    "functions.idle_s": "--function-idle",
    "prediction.distance": "--predict-distance",
    "prediction.max_share": "--predict-overhead",
    "host": "--host",
}
"""Fields that errors begin with, to the options that set them."""
_POLL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_command(
    model: Annotated[str, typer.Argument(help="moeless-mini, a packed folder, a checkpoint folder or a hub name.")],
    host: Annotated[str, typer.Option(callback=not_empty, help="Address to listen on.")] = _DEFAULTS.host,
    port: Annotated[int, typer.Option(callback=from_to(1, 65535), help="Port to listen on.")] = _DEFAULTS.port,
    workers: Annotated[
        int, typer.Option(callback=from_to(0), help="Worker processes; 0 keeps the experts in the engine's process.")
    ] = _DEFAULTS.num_workers,
    isolation: Annotated[
        str, typer.Option(help="shared: workers host many functions; function: one deployment each.")
    ] = _DEFAULTS.isolation,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MOELESS_API_KEY", help="Key that clients must send; may be given more than once."),
    ] = None,
    secrets_file: Annotated[
        Path | None,
        typer.Option(
            callback=input_file,
            help="JSON with run_secret and api_keys, mode 0600; every node must see it under this path.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(callback=not_empty, help="Name in the API; default: the model's.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(callback=from_to(1), help="Maximum tokens of prompt and completion; default: the model's."),
    ] = None,
    max_running: Annotated[
        int, typer.Option(callback=from_to(1), help="Sequences decoded together.")
    ] = _DEFAULTS.engine.max_running,
    max_waiting: Annotated[
        int, typer.Option(callback=from_to(0), help="Requests held beyond that; more are answered 429.")
    ] = _DEFAULTS.engine.max_waiting,
    kv_cache_gb: Annotated[
        float | None, typer.Option(callback=above_zero, help="Memory for the KV cache, in GB.")
    ] = None,
    worker_memory_gb: Annotated[
        float | None, typer.Option(callback=above_zero, help="Most memory for instances on one worker, in GB.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(callback=from_to(1), help="torch threads of the engine and of each worker.")
    ] = None,
    call_timeout: Annotated[
        float, typer.Option(callback=above_zero, help="Seconds after which a worker's answer counts as failed.")
    ] = _DEFAULTS.dispatch.call_timeout_s,
    function_max_replicas: Annotated[
        int, typer.Option(callback=from_to(1), help="isolation function: most replicas of a function.")
    ] = _DEFAULTS.functions.max_replicas,
    function_idle: Annotated[
        float, typer.Option(callback=above_zero, help="isolation function: idle seconds until a function goes to zero.")
    ] = _DEFAULTS.functions.idle_s,
    cors_allow_origin: Annotated[
        list[str] | None,
        typer.Option(callback=not_empty, help="Origin that browsers may call from; may be given more than once."),
    ] = None,
    predictors: Annotated[
        Path | None,
        typer.Option(
            callback=input_file, help="Forecast each layer's load with the predictors of `moeless predict fit`."
        ),
    ] = None,
    predict_distance: Annotated[
        int | None, typer.Option(callback=from_to(1), help="How many MoE layers ahead to forecast; default: 1.")
    ] = None,
    predict_overhead: Annotated[
        float | None,
        typer.Option(help="Maximum share of the steps' time for forecasting (default: 0.015); 1 forecasts every step."),
    ] = None,
    allow_recording: Annotated[
        bool | None, typer.Option(help="Let clients record what the engine routes; default: on a loopback host.")
    ] = None,
    allow_tracing: Annotated[bool | None, typer.Option(hidden=True)] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: start Ray here.")] = None,
    app_name: Annotated[
        str, typer.Option(callback=not_empty, help="Name of the Serve application on the cluster.")
    ] = _DEFAULTS.app_name,
    route_prefix: Annotated[str, typer.Option(help="Where the API begins on the cluster.")] = _DEFAULTS.route_prefix,
) -> None:
    """Serve a model with expert functions until interrupted."""
    require_extra("serve", "moeless serve")
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    if allow_tracing is not None:
        raise ConfigError("--allow-tracing is now --allow-recording (and --no-allow-recording)")
    from moeless.deployments.runtime import prepare_environment
    from moeless.packages.context_length import check_context
    from moeless.packages.source import resolve_model

    with PackingProgress() as on_progress:
        packed = resolve_model(model, on_progress=on_progress)
    check_context(packed, max_model_len)
    run_secrets = _run_secrets(secrets_file, api_key)
    on_device = _device(device)
    with options_for(_OPTIONS):
        settings = ServeSettings(
            packed_path=str(packed.path),
            model_id=served_model_name or packed.manifest.model_id,
            secrets_file=None if secrets_file is None else str(secrets_file.resolve()),
            num_workers=workers,
            isolation=isolation,  # type: ignore[arg-type]  # checked by ServeSettings
            dtype=dtype,
            device=on_device,
            host=host,
            port=port,
            worker_memory_bytes=_bytes(worker_memory_gb),
            num_threads=threads,
            cores=tuple(sorted(os.sched_getaffinity(0))) if ray_address is None and on_device == "cpu" else (),
            allow_recording=allow_recording,
            app_name=app_name,
            route_prefix=route_prefix,
            engine=EngineConfig(
                max_model_len=max_model_len,
                max_running=max_running,
                max_waiting=max_waiting,
                max_batch_tokens=max(_DEFAULTS.engine.max_batch_tokens, max_running),
                kv_cache_bytes=_bytes(kv_cache_gb),
            ),
            gateway=GatewayConfig(cors_allow_origins=tuple(cors_allow_origin or ())),
            dispatch=DispatchConfig(call_timeout_s=call_timeout),
            functions=FunctionScaling(max_replicas=function_max_replicas, idle_s=function_idle),
            prediction=PredictionSettings(
                path=None if predictors is None else str(predictors.resolve()),
                distance=predict_distance,
                max_share=predict_overhead,
            ),
        )
    if settings.prediction.path is not None:
        # Refused here, before Ray starts.
        from moeless.engine.prediction import load_live_predictor
        from moeless_predictors.live import LiveConfig

        with options_for(_OPTIONS):
            live_config = LiveConfig(**settings.prediction.overrides())
            load_live_predictor(settings.prediction.path, live_config, packed.manifest)
    prepare_environment(ray_address)
    with options_for(_OPTIONS):
        _run(packed.manifest, settings, run_secrets, ray_address)


def _run(manifest: Manifest, settings: ServeSettings, run_secrets: RunSecrets, ray_address: str | None) -> None:
    """Start the application, print how to call it, and serve until a signal comes."""
    from moeless.deployments.application import running
    from moeless.deployments.run_log import lines_of_run

    at = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{at}:{settings.port}{settings.route_prefix.rstrip('/')}"
    refusals: list[MoelessError] = []

    def refuse(error: MoelessError) -> None:
        refusals.append(error)
        say_aside(f"moeless: {' '.join(str(error).split())}")

    with (
        _exit_once_refused(refusals),
        ReservedTerminal() as terminal,
        lines_of_run(lambda line: say_aside(str(line))),
        ExitStack() as stack,
    ):
        logs: list[Path] = []

        def take_logs(folder: Path) -> None:
            logs.append(folder)
            terminal.move_to(folder / "moeless-serve.log")

        with waiting() as show:
            start = BreakableStart(show, is_serving=lambda: _is_ready(url))
            application = running(
                manifest,
                settings,
                run_secrets,
                ray_address=ray_address,
                on_phase=start.begin_phase,
                on_logs=take_logs,
                on_failure=refuse,
            )
            stack.enter_context(application)
            start.is_over = True
            show("connecting engine and workers")
            wait_until_ready(url, lambda: start.is_asked_to_stop)
        if not start.is_asked_to_stop:
            for line in usage_lines(url, settings.model_id, with_key=bool(run_secrets.api_keys)):
                say(line)
            for folder in logs:
                say(f"  logs of Ray and of every process: {folder}")
        while not start.is_asked_to_stop:
            time.sleep(_POLL_S)


@contextmanager
def _exit_once_refused(refusals: list[MoelessError]) -> Iterator[None]:
    """End with the exit code of a refusal that has been printed already."""
    try:
        yield
    except MoelessError as error:
        if error not in refusals:
            raise
        raise typer.Exit(error.exit_code) from error


def usage_lines(url: str, model_id: str, *, with_key: bool) -> list[str]:
    """Lines that say where the model is served, and commands that call it, usable as printed."""
    key = ' -H "Authorization: Bearer $MOELESS_API_KEY"' if with_key else ""
    body = json.dumps(
        {"model": model_id, "messages": [{"role": "user", "content": "What is 12 + 7?"}]}, ensure_ascii=False
    )
    api_key = "os.environ['MOELESS_API_KEY']" if with_key else "'none'"
    return [
        f"serving {model_id} on {url} (Ctrl-C stops)",
        f"  curl {shlex.quote(f'{url}/v1/chat/completions')} -H 'Content-Type: application/json'{key} \\",
        f"    -d {shlex.quote(body)}",
        f"  openai: OpenAI(base_url='{url}/v1', api_key={api_key})   experts: moeless experts --url {url}",
    ]


def _run_secrets(file: Path | None, api_keys: list[str] | None) -> RunSecrets:
    """From the file; without one, the environment's run secret (else a new one) and the keys given as options."""
    if "MOELESS_TOKEN" in os.environ:
        raise ConfigError(f"MOELESS_TOKEN is no longer read; set {RUN_SECRET_VARIABLE} instead")
    if file is None:
        run_secret = os.environ.get(RUN_SECRET_VARIABLE) or secrets.token_hex(32)
        with options_for(_OPTIONS):
            return RunSecrets(run_secret=run_secret, api_keys=tuple(api_keys or ()))
    if api_keys:
        raise ConfigError("--api-key (or MOELESS_API_KEY) must not be given with --secrets-file, which holds the keys")
    return read_secrets(str(file.resolve()))


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"--device must be cpu, cuda or auto, got {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    return name


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class BreakableStart:
    """Lets a signal break off the start, and afterwards only sets `is_asked_to_stop`. All stop signals do the same.

    A signal does not break off starting Ray, which would leave processes of it behind; the start ends once Ray runs,
    some seconds later. Nor does it when the model is served already and Serve is about to say so: that is a stop like
    any other.
    """

    is_asked_to_stop = False
    """No threading.Event: a handler that sets one waits for ever where it has interrupted a wait for it."""

    def __init__(self, show: Callable[[str], None], *, is_serving: Callable[[], bool]) -> None:
        self.is_over = False
        self._show, self._is_serving = show, is_serving
        self._can_break = False
        for number in STOP_SIGNALS:
            # What nohup ignores stays ignored; a script's shell ignores SIGINT for what it starts in the background.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def begin_phase(self, phase: str) -> None:
        """Show the phase. Raises KeyboardInterrupt if a signal came in one that could not be broken off."""
        from moeless.deployments.runtime import STARTING_RAY, STOPPING

        if phase == STOPPING:
            self._can_break = False
            if self.is_asked_to_stop:
                say(STOPPING)
            return
        self._show(phase)
        if self.is_asked_to_stop:
            raise KeyboardInterrupt
        self._can_break = phase != STARTING_RAY

    def _on_signal(self, *_: object) -> None:
        # Had Ray's C++ put its own handler beneath this one, it would have printed a stack, into its file, and would
        # abort the process by an alarm in three seconds.
        signal.alarm(0)
        is_first = not self.is_asked_to_stop
        self.is_asked_to_stop = True
        if self._can_break and not self.is_over and is_first and not self._is_serving():
            raise KeyboardInterrupt


def wait_until_ready(url: str, is_asked_to_stop: Callable[[], bool]) -> None:
    """Return once GET /ready says 200, or when asked to stop."""
    while not is_asked_to_stop() and not _is_ready(url):
        time.sleep(_POLL_S)


def _is_ready(url: str) -> bool:
    try:
        # Without the environment's proxies, which cannot reach the addresses of this machine.
        return httpx.get(f"{url}/ready", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False  # not listening yet
