"""Chooses the transport to a worker by where both sides are, and opens it."""

from __future__ import annotations

import logging

import torch

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.channel import Channel, ChannelConfig, WorkerEndpoint, host_id
from moeless.dispatch.collective import CollectiveChannel
from moeless.dispatch.cuda_ipc import CudaIpcChannel
from moeless.dispatch.cuda_memory import CudaMemory
from moeless.dispatch.shared_memory import SharedMemoryChannel
from moeless.dispatch.tcp import TcpChannel

logger = logging.getLogger(__name__)


def connect(
    endpoint: WorkerEndpoint,
    *,
    run_secret: str,
    engine: str,
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype,
    max_rows: int,
    device: torch.device | str = "cpu",
) -> Channel:
    """Open the fastest channel to the worker at `endpoint`.

    Args:
        run_secret: the run's secret.
        engine: who calls, for the worker's log.
        hidden_size, top_k, dtype: what a call's rows are, and the most pairs that a row has.
        max_rows: most rows of one call.
        device: where the engine's hidden states lie.
    Raises: HandshakeError if the worker refuses or has another run secret; TransportError if it is unreachable.
    """
    config = ChannelConfig(
        run_secret=run_secret, engine=engine, hidden_size=hidden_size, top_k=top_k, dtype=dtype, max_rows=max_rows
    )
    here = endpoint.host_id == host_id()
    ours = torch.device(device)
    if ours.type == "cuda" and endpoint.device.startswith("cuda"):
        try:
            if here:
                return CudaIpcChannel(endpoint, config, CudaMemory(ours))
            return CollectiveChannel(endpoint, config, ours)
        except TransportError as error:
            logger.warning("rows go through host memory worker=%s reason=%s", endpoint.worker, error)
    if here:
        try:
            return SharedMemoryChannel(endpoint, config)
        except HandshakeError:
            raise
        except TransportError as error:  # another container of this machine
            logger.info("taking tcp instead of shm worker=%s reason=%s", endpoint.worker, error)
    return TcpChannel(endpoint, config)
