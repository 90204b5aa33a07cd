"""What sits on the SDK is metered too: one message for each HTTP call that a framework makes, as the server counted it.

Each test needs a library of its own, and these agree on no version of openai. So `nox -s above` gives each library an
environment, and runs the tests that are named after it. Elsewhere, where SPRYNG_TEST_ABOVE is not set, the module is
skipped as a whole. Within, nothing is skipped: a library that cannot be imported fails its tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest

from spryng_instrument import usage_context
from spryng_instrument.testing import PracticeServer
from tests.conftest import Ledger
from tests.shapes import Invoice, settle, truth

if os.environ.get("SPRYNG_TEST_ABOVE") != "1":
    pytest.skip("these run in `nox -s above`, which sets SPRYNG_TEST_ABOVE=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # what these libraries warn of is theirs

ASKED = "Say hello to the invoice."
TOOL = "What is the weather in Paris? Use the tool."
MODEL = "gpt-4o-mini"
CONTEXT = {"key": "acme", "conversation_id": "c-42", "tags": ["support"]}
both = pytest.mark.parametrize("mode", ["sync", "async"])


@pytest.fixture
def server() -> Iterator[PracticeServer]:
    with PracticeServer() as server:
        yield server


@pytest.fixture
def metered(server: PracticeServer, instrument: Callable[..., Ledger]) -> Callable[[int], None]:
    """Instruments, and gives what compares the ledger with the server, which must have seen so many calls."""
    ledger = instrument()

    def compare(calls: int) -> None:
        seen = []
        for exchange in server.exchanges:
            assert exchange.status == 200
            counted = truth(exchange.usage)
            assert counted is not None
            assert counted.total_tokens
            # A stream that nobody has asked for its usage reports none: then there is nothing to record.
            usage = counted if exchange.usage_sent else None
            seen.append((exchange.endpoint, exchange.request["model"], exchange.stream, exchange.response_id, usage))
        messages = ledger.messages()
        recorded = [
            (message.operation, message.request_model, message.streamed, message.response_id, message.usage)
            for message in messages
        ]
        assert len(seen) == calls
        assert sorted(recorded, key=repr) == sorted(seen, key=repr)
        for message in messages:
            assert message.status == "ok"
            assert (message.key, message.conversation_id, message.tags) == ("acme", "c-42", ("support",))

    return compare


async def parts_of(stream: Any, mode: str) -> list[Any]:
    """All of a stream. By the mode, not by what it can do: those of litellm claim to be of both kinds."""
    return list(stream) if mode == "sync" else [part async for part in await settle(stream)]


def told(server: PracticeServer) -> bool:
    """Whether every answer so far came with its usage."""
    return all(exchange.usage_sent for exchange in server.exchanges)


# --- langchain-openai -----------------------------------------------------------------------------------------------


def langchain_chat(server: PracticeServer, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=server.base_url, api_key="practice", **options)


@both
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
async def test_langchain_invoke(mode, responses, server, metered):
    """ChatOpenAI.invoke and ainvoke, on either API: one message, with the tokens that langchain itself tells."""
    chat = langchain_chat(server, use_responses_api=responses)
    with usage_context(**CONTEXT):
        answer = await settle(chat.invoke(ASKED) if mode == "sync" else chat.ainvoke(ASKED))
    assert answer.usage_metadata["total_tokens"] == server.exchanges[0].usage["total_tokens"]
    metered(1)
    assert told(server)


@both
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
async def test_langchain_stream(mode, responses, server, metered):
    """ChatOpenAI.stream and astream, on either API: one message, asked for its usage."""
    chat = langchain_chat(server, use_responses_api=responses)
    with usage_context(**CONTEXT):
        stream = chat.stream(ASKED) if mode == "sync" else chat.astream(ASKED)
        assert len(await parts_of(stream, mode)) > 2
    metered(1)
    assert told(server)


@both
async def test_langchain_stream_unnoticed(mode, server, instrument):
    """A stream whose usage only we ask for has the chunks that it would have had."""
    chat = langchain_chat(server, stream_usage=False)

    async def chunks() -> list[Any]:
        stream = chat.stream(ASKED) if mode == "sync" else chat.astream(ASKED)
        return [chunk.model_dump(exclude={"id"}) for chunk in await parts_of(stream, mode)]

    bare = await chunks()
    instrument()
    assert await chunks() == bare
    assert [exchange.usage_sent for exchange in server.exchanges] == [False, True]


def test_langchain_batch(server, metered):
    """batch() calls from threads of langchain's, which carry the context: a message for each, of the same customer."""
    chat = langchain_chat(server)
    with usage_context(**CONTEXT):
        answers = chat.batch([f"{ASKED} ({number})" for number in range(5)])
    assert len(answers) == 5
    metered(5)
    assert told(server)


@both
async def test_langchain_structured_output(mode, server, metered):
    """with_structured_output() parses the answer into a model of the caller's: one message."""
    chat = langchain_chat(server).with_structured_output(Invoice)
    with usage_context(**CONTEXT):
        answer = await settle(chat.invoke(ASKED) if mode == "sync" else chat.ainvoke(ASKED))
    assert isinstance(answer, Invoice)
    metered(1)
    assert told(server)


@both
async def test_langchain_embeddings(mode, server, metered):
    """embed_documents in two parts: a message for each HTTP call."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model="text-embedding-3-small",
        base_url=server.base_url,
        api_key="practice",
        check_embedding_ctx_length=False,  # True fetches a tokenizer
        chunk_size=2,
    )
    texts = ["one", "and another", "and a third"]
    with usage_context(**CONTEXT):
        method = embeddings.embed_documents if mode == "sync" else embeddings.aembed_documents
        assert len(await settle(method(texts))) == 3
    metered(2)
    assert told(server)


# --- pydantic-ai ----------------------------------------------------------------------------------------------------


def pydantic_ai_agent(server: PracticeServer, api: str, **options: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[api]
    return Agent(model(MODEL, provider=OpenAIProvider(base_url=server.base_url, api_key="practice")), **options)


def paris(city: str = "Paris") -> str:
    """The weather in a city."""
    return f"rain in {city}"


apis = pytest.mark.parametrize("api", ["chat", "responses"])


@apis
async def test_pydantic_ai_run(api, server, metered):
    """Agent.run: one message, and the tokens that the agent itself tells."""
    agent = pydantic_ai_agent(server, api)
    with usage_context(**CONTEXT):
        result = await agent.run(ASKED)
    assert result.output
    metered(1)
    assert told(server)


@apis
def test_pydantic_ai_run_sync(api, server, metered):
    """Agent.run_sync, which runs a loop of its own: the message is of the customer outside it."""
    agent = pydantic_ai_agent(server, api)
    with usage_context(**CONTEXT):
        assert agent.run_sync(ASKED).output
    metered(1)
    assert told(server)


@apis
async def test_pydantic_ai_tool(api, server, metered):
    """An agent that calls a tool asks the model twice: two messages."""
    agent = pydantic_ai_agent(server, api, tools=[paris])
    with usage_context(**CONTEXT):
        assert (await agent.run(TOOL)).output
    metered(2)
    assert told(server)


@apis
async def test_pydantic_ai_stream(api, server, metered):
    """Agent.run_stream with a tool: two streams, two messages."""
    agent = pydantic_ai_agent(server, api, tools=[paris])
    with usage_context(**CONTEXT):
        async with agent.run_stream(TOOL) as result:
            assert [text async for text in result.stream_text(debounce_by=None)]
    assert [exchange.stream for exchange in server.exchanges] == [True, True]
    metered(2)
    assert told(server)


# --- openai-agents --------------------------------------------------------------------------------------------------


@pytest.fixture
def openai_agent(server: PracticeServer) -> Callable[[str], Any]:
    """Makes an agent with a tool, on either API. Its traces would go to OpenAI: they are off."""
    import agents

    agents.set_tracing_disabled(True)
    models = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}

    def make(api: str) -> Any:
        client = openai.AsyncOpenAI(base_url=server.base_url, api_key="practice", max_retries=0)
        tool = agents.function_tool(paris)
        return agents.Agent(name="clerk", model=models[api](model=MODEL, openai_client=client), tools=[tool])

    return make


@apis
async def test_openai_agents_run(api, server, metered, openai_agent):
    """Runner.run with a tool: a message for each turn."""
    from agents import Runner

    with usage_context(**CONTEXT):
        result = await Runner.run(openai_agent(api), TOOL)
    told_by_sdk = result.context_wrapper.usage.total_tokens
    assert told_by_sdk == sum(exchange.usage["total_tokens"] for exchange in server.exchanges)
    metered(2)
    assert told(server)


@apis
def test_openai_agents_run_sync(api, server, metered, openai_agent):
    """Runner.run_sync, on a loop of its own: one message."""
    from agents import Runner

    with usage_context(**CONTEXT):
        assert Runner.run_sync(openai_agent(api), ASKED).final_output
    metered(1)
    assert told(server)


@apis
async def test_openai_agents_streamed(api, server, metered, openai_agent):
    """Runner.run_streamed calls from a task of its own: the messages are of the customer it was started for."""
    from agents import Runner

    with usage_context(**CONTEXT):
        result = Runner.run_streamed(openai_agent(api), TOOL)
    assert [event async for event in result.stream_events()]
    assert [exchange.stream for exchange in server.exchanges] == [True, True]
    metered(2)
    assert told(server)


# --- instructor -----------------------------------------------------------------------------------------------------


def instructor_client(server: PracticeServer, mode: str) -> Any:
    import instructor

    kind = openai.OpenAI if mode == "sync" else openai.AsyncOpenAI
    return instructor.from_openai(kind(base_url=server.base_url, api_key="practice", max_retries=0))


@both
async def test_instructor_create(mode, server, metered):
    """create(response_model=...): one message."""
    client = instructor_client(server, mode)
    messages = [{"role": "user", "content": ASKED}]
    with usage_context(**CONTEXT):
        create = client.chat.completions.create
        answer = await settle(create(model=MODEL, messages=messages, response_model=Invoice))
    assert isinstance(answer, Invoice)
    metered(1)
    assert told(server)


@both
async def test_instructor_asks_again(mode, server, metered):
    """An answer that the caller's model refuses is asked for again, and paid for again: a message for each."""
    refusals = iter([ValueError("the number must be another")])

    class Picky(pydantic.BaseModel):
        number: int

        @pydantic.field_validator("number")
        @classmethod
        def refuse_once(cls, number: int) -> int:
            for refusal in refusals:
                raise refusal
            return number

    client = instructor_client(server, mode)
    messages = [{"role": "user", "content": ASKED}]
    with usage_context(**CONTEXT):
        create = client.chat.completions.create
        answer = await settle(create(model=MODEL, messages=messages, response_model=Picky, max_retries=2))
    assert isinstance(answer, Picky)
    metered(2)
    assert told(server)


@both
async def test_instructor_stream(mode, server, metered):
    """create_partial() streams a model as it grows: one message."""
    client = instructor_client(server, mode)
    messages = [{"role": "user", "content": ASKED}]
    with usage_context(**CONTEXT):
        stream = client.chat.completions.create_partial(model=MODEL, messages=messages, response_model=Invoice)
        assert await parts_of(stream, mode)
    metered(1)
    assert told(server)


# --- litellm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def litellm_call(server: PracticeServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What says where a call of litellm goes; its price list, which it would fetch, is the one in the package."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return {"api_base": server.base_url, "api_key": "practice", "num_retries": 0}


@both
async def test_litellm_completion(mode, server, metered, litellm_call):
    """completion and acompletion: one message."""
    import litellm

    method = litellm.completion if mode == "sync" else litellm.acompletion
    messages = [{"role": "user", "content": ASKED}]
    with usage_context(**CONTEXT):
        answer = await settle(method(model=f"openai/{MODEL}", messages=messages, **litellm_call))
    assert answer.usage.total_tokens == server.exchanges[0].usage["total_tokens"]
    metered(1)
    assert told(server)


@both
@pytest.mark.parametrize("asked", [False, True], ids=["quiet", "asked"])
async def test_litellm_stream(mode, asked, server, metered, litellm_call):
    """A stream of litellm's is one message. It is read raw, so nobody but the caller can ask for its usage."""
    import litellm

    method = litellm.completion if mode == "sync" else litellm.acompletion
    messages = [{"role": "user", "content": ASKED}]
    options = {"stream_options": {"include_usage": True}} if asked else {}
    with usage_context(**CONTEXT):
        stream = method(model=f"openai/{MODEL}", messages=messages, stream=True, **options, **litellm_call)
        assert await parts_of(stream, mode)
    metered(1)
    assert told(server) == asked


@both
async def test_litellm_embedding(mode, server, metered, litellm_call):
    """embedding and aembedding: one message."""
    import litellm

    method = litellm.embedding if mode == "sync" else litellm.aembedding
    with usage_context(**CONTEXT):
        assert (await settle(method(model="openai/text-embedding-3-small", input=["one"], **litellm_call))).data
    metered(1)
    assert told(server)


# --- llama-index ----------------------------------------------------------------------------------------------------


def llama_index_llm(server: PracticeServer, api: str) -> Any:
    from llama_index.llms.openai import OpenAI, OpenAIResponses

    kind = {"chat": OpenAI, "responses": OpenAIResponses}[api]
    return kind(model=MODEL, api_base=server.base_url, api_key="practice", max_retries=0)


@both
@apis
@pytest.mark.parametrize("method", ["complete", "chat"])
async def test_llama_index_plain(method, api, mode, server, metered):
    """complete and chat, on either API: one message."""
    from llama_index.core.llms import ChatMessage

    call = getattr(llama_index_llm(server, api), method if mode == "sync" else f"a{method}")
    asked = ASKED if method == "complete" else [ChatMessage(role="user", content=ASKED)]
    with usage_context(**CONTEXT):
        assert await settle(call(asked))
    metered(1)
    assert told(server)


@both
@apis
@pytest.mark.parametrize("method", ["complete", "chat"])
async def test_llama_index_stream(method, api, mode, server, metered):
    """stream_complete and stream_chat, on either API: one message, asked for its usage."""
    from llama_index.core.llms import ChatMessage

    call = getattr(llama_index_llm(server, api), f"stream_{method}" if mode == "sync" else f"astream_{method}")
    asked = ASKED if method == "complete" else [ChatMessage(role="user", content=ASKED)]
    with usage_context(**CONTEXT):
        assert await parts_of(call(asked), mode)
    metered(1)
    assert told(server)


@both
async def test_llama_index_stream_unnoticed(mode, server, instrument):
    """A stream whose usage only we ask for has the chunks that it would have had, as they came too."""
    llm = llama_index_llm(server, "chat")

    async def chunks() -> list[Any]:
        call = llm.stream_complete if mode == "sync" else llm.astream_complete
        parts = await parts_of(call(ASKED), mode)
        raw = [part.raw.to_dict() for part in parts]
        return [
            (part.text, part.delta, part.additional_kwargs, {**chunk, "id": None, "created": None})
            for part, chunk in zip(parts, raw, strict=True)
        ]

    bare = await chunks()
    instrument()
    assert await chunks() == bare
    assert [exchange.usage_sent for exchange in server.exchanges] == [False, True]
