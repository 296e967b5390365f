from __future__ import annotations

import pytest
import torch

from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, InstanceShare, RoutingTable
from moeless.engine.assemble import Assembly, assemble_engine, engine_in_process
from moeless.engine.config import EngineConfig
from tests.families import make_tokenizer
from tests.unit.engine.routed import LoadFamily
from tests.unit.engine.support import Recorder, assert_equal_tokens, prompt_of, request

CONFIG = EngineConfig(kv_cache_bytes=1 << 22, max_running=4, max_batch_tokens=32, num_threads=1)


def test_an_assembled_engine_answers_as_the_reference_does(load_family: LoadFamily) -> None:
    family = load_family("mixtral")
    recorder = Recorder()
    with engine_in_process(family.packed, make_tokenizer(), CONFIG) as engine:
        engine.set_on_step(recorder)
        engine.start()
        engine.submit(request("a", prompt_of(12)))
        [answer] = recorder.wait_for("a")
    assert not engine.is_alive
    assert_equal_tokens(family.reference, prompt_of(12), answer.token_ids)


def test_only_functions_that_the_table_places_here_are_started(load_family: LoadFamily) -> None:
    packed = load_family("mixtral").packed
    here, shared = FunctionId(0, 1), FunctionId(1, 0)
    instances = {function: (InstanceShare("worker-0"),) for function in packed.functions}
    instances[here] = (InstanceShare(LOCAL_WORKER),)
    instances[shared] = (InstanceShare("worker-0", 0.5), InstanceShare(LOCAL_WORKER, 0.5))
    assembled = assemble_engine(
        packed, make_tokenizer(), Assembly(engine=CONFIG, table=RoutingTable(version=1, instances=instances))
    )
    assert set(assembled.dispatcher.local.pool.states()) == {here, shared}


@pytest.mark.parametrize(("name", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_data_type_is_the_named_one_or_the_checkpoints(
    load_family: LoadFamily, name: str | None, dtype: torch.dtype
) -> None:
    packed = load_family("mixtral").packed
    assembled = assemble_engine(packed, make_tokenizer(), Assembly(engine=CONFIG, dtype=name))
    assert assembled.dtype == dtype
    assert assembled.dispatcher.local.pool.dtype == dtype
