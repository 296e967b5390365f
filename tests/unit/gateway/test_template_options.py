"""Fields of a chat that go to the model's chat template, and those that it does not read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import MODEL_ID, ScriptedEngine, gateway_for, model_info, write_tokenizer

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% if reasoning_effort %}[effort {{ reasoning_effort }}]{% endif %}"
    "{% if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['name'] or message.role }}:{{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


@pytest.fixture
def engine(tmp_path: Path) -> ScriptedEngine:
    folder = write_tokenizer(tmp_path / "tokenizer", chat_template=TEMPLATE)
    return ScriptedEngine(model_info(folder, max_context_tokens=1024))


async def rendered(engine: ScriptedEngine, **fields: object) -> tuple[str, str | None]:
    """The prompt as text, and the header that names what was ignored."""
    body = {"model": MODEL_ID, "messages": [{"role": "user", "content": "hi"}]} | fields
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    backend = Tokenizer.from_file(str(Path(engine.info.tokenizer_path) / "tokenizer.json"))
    prompt = backend.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    return prompt, response.headers.get("x-moeless-ignored")


async def test_a_template_gets_the_fields_that_it_names(engine: ScriptedEngine) -> None:
    prompt, ignored = await rendered(
        engine, reasoning_effort="low", verbosity="high", chat_template_kwargs={"enable_thinking": False, "beams": 3}
    )
    assert prompt == "[effort low][thinking False]<|im_start|>user:hi<|im_end|><|im_start|>assistant:"
    assert ignored == "chat_template_kwargs.beams, verbosity"


async def test_however_many_variables_are_not_read_the_header_stays_short(engine: ScriptedEngine) -> None:
    _, ignored = await rendered(engine, chat_template_kwargs={f"{'x' * 99}{i}": i for i in range(10_000)})
    assert ignored is not None
    assert ignored.endswith(", chat_template_kwargs (9984 more)")
    assert len(ignored) < 2000


async def test_a_template_gets_the_parts_of_messages_that_it_reads(engine: ScriptedEngine) -> None:
    content = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    message = {"role": "user", "content": content, "name": "ann", "reasoning_content": "hm"}
    prompt, ignored = await rendered(engine, messages=[message])
    assert prompt == "<|im_start|>ann:hi<|im_end|><|im_start|>assistant:"
    assert ignored == "messages.reasoning_content, messages.content.cache_control"


async def test_the_head_of_the_answer_can_be_left_out(engine: ScriptedEngine) -> None:
    prompt, ignored = await rendered(engine, add_generation_prompt=False)
    assert prompt == "<|im_start|>user:hi<|im_end|>"
    assert ignored is None


async def test_the_last_message_can_be_continued(engine: ScriptedEngine) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The sea is "}]
    prompt, _ = await rendered(engine, messages=messages, continue_final_message=True)
    assert prompt == "<|im_start|>user:hi<|im_end|><|im_start|>assistant:The sea is "
    assert engine.requests[-1].continues_prompt
    await rendered(engine)
    assert not engine.requests[-1].continues_prompt


async def test_a_name_that_no_header_can_hold_is_written_with_question_marks(engine: ScriptedEngine) -> None:
    _, ignored = await rendered(engine, chat_template_kwargs={"\u00e9\r\nx-evil: 1": 1})
    assert ignored == "chat_template_kwargs.???x-evil??1"
