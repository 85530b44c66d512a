"""tritonclient's streams against a live server: every text is the runtime's."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc as triton
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from tests.helpers.server.closed_context import ClosedContext, Details
from tests.helpers.server.rpc_serving import Serving, serving
from tests.helpers.waiting import wait_until
from tests.server.conftest import Served, serve
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.context import GONE, RequestContext
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.generate import GenerateBody
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.text.model_text import ModelText

LONG = {"max_tokens": 900, "ignored": "x", "sampling_parameters": json.dumps({"logit_bias": {"1": -100}})}


@pytest.fixture(scope="module")
def own(talking: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    own = serve(talking, tmp_path_factory.mktemp("state"))
    yield own
    own.runtime.close()
    own.state.close()


@pytest.fixture(scope="module")
def live(own: Served) -> Iterator[Serving]:
    with serving(service=own.service) as live:
        yield live


@pytest.fixture(scope="module")
def headers(own: Served) -> dict[str, str]:
    return {"authorization": f"Bearer {own.state.keys.create('acme', 'infer', by='a test')[1]}"}


def expected(own: Served, prompt: str, task: Any, most: int, **how: Any) -> str:
    text = ModelText.open(own.bundle)
    tokens = text.encode(prompt)
    [made] = own.runtime.generate([tokens], task, max_new_tokens=most, sampling=text.sampling(**how))
    return text.decode([*tokens, *made])[len(text.decode(tokens)) :]


def test_the_configuration_says_that_a_request_may_have_several_answers(
    live: Serving, headers: dict[str, str], own: Served
) -> None:
    with triton.InferenceServerClient(live.address) as client:
        for model in ("a", "base", own.bundle.manifest.name):
            config = client.get_model_config(model, headers=headers).config
            assert config.model_transaction_policy.decoupled, model


def word(name: str, value: str, module: Any = triton) -> Any:
    tensor = module.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([value.encode()], object))
    return tensor


def text_of(result: Any) -> str:
    array = result.as_numpy("text_output")
    assert array.shape == (1,)
    found: str = array[0].decode()
    return found


def is_final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


@contextmanager
def streaming(live: Serving, headers: dict[str, str]) -> Iterator[tuple[Any, queue.Queue[Any]]]:
    found: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(live.address) as client:
        client.start_stream(lambda result, error: found.put(error or result), headers=headers)
        yield client, found


def test_the_text_of_many_requests_comes_in_pieces(live: Serving, own: Served, headers: dict[str, str]) -> None:
    prompts = {f"{task}-{number}": (f"fox {number}", task) for number, task in enumerate(["a", "b", "base", "a"])}
    with streaming(live, headers) as (client, found):
        for name, (prompt, task) in prompts.items():
            client.async_stream_infer(
                task, [word("text_input", prompt)], request_id=name, enable_empty_final_response=True,
                parameters={"max_tokens": 9, "top_k": 50},
            )  # fmt: skip
        texts, over = dict.fromkeys(prompts, ""), set[str]()
        while len(over) < len(prompts):
            result = found.get(timeout=100)
            response = result.get_response()
            assert response.id not in over
            assert (response.model_name, response.model_version) == (prompts[response.id][1], "1")
            if is_final(result):
                assert not response.outputs
                over.add(response.id)
            else:
                texts[response.id] += text_of(result)
    wanted = {
        name: expected(own, prompt, None if task == "base" else task, 9) for name, (prompt, task) in prompts.items()
    }
    assert texts == wanted


def test_inputs_and_parameters_are_those_of_tritons_backends(
    live: Serving, own: Served, headers: dict[str, str]
) -> None:
    whole = triton.InferInput("stream", [1], "BOOL")
    whole.set_data_from_numpy(np.array([False]))
    most = triton.InferInput("max_tokens", [1, 1], "INT32")
    most.set_data_from_numpy(np.array([[7]], np.int32))
    how = {"temperature": "0.7", "seed": 3}
    inputs = [word("text_input", "fox"), whole, most, word("sampling_parameters", json.dumps(how))]
    with streaming(live, headers) as (client, found):
        outputs = [triton.InferRequestedOutput("text_output")]
        client.async_stream_infer("talk", inputs, outputs=outputs, parameters={"lora_name": "b"}, model_version="1")
        assert text_of(found.get(timeout=100)) == expected(own, "fox", "b", 7, temperature=0.7, seed=3)
        client.async_stream_infer("a", [word("text_input", "lazy dog " * 400), whole, most])  # read off the event loop
        assert text_of(found.get(timeout=100)) == expected(own, "lazy dog " * 400, "a", 7)


def test_errors_do_not_end_the_stream(live: Serving, own: Served, headers: dict[str, str]) -> None:
    prompt = word("text_input", "x")
    wrong = triton.InferInput("text_input", [2], "BYTES")
    wrong.set_data_from_numpy(np.array([b"x", b"y"], object))
    calls: list[tuple[str, list[Any], dict[str, Any], str]] = [
        ("nobody", [prompt], {}, "nobody"),
        ("a", [prompt], {"parameters": {"temperature": "warm"}}, "temperature"),
        ("a", [prompt], {"parameters": {"adapter": "b"}}, "adapter"),
        ("a", [prompt], {"outputs": [triton.InferRequestedOutput("logits")]}, "text_output"),
        ("a", [prompt], {"parameters": {"max_tokens": 4000}}, "tokens"),
        ("a", [wrong], {}, "one element"),
        ("a", [prompt], {"parameters": LONG, "timeout": 1000}, "deadline"),
    ]
    with streaming(live, headers) as (client, found):
        for model, inputs, options, message in calls:
            client.async_stream_infer(model, inputs, request_id="7", **options)
            answer = found.get(timeout=100)
            while not isinstance(answer, InferenceServerException):  # what came before the deadline
                answer = found.get(timeout=100)
            assert message in str(answer)
        client.async_stream_infer("a", [prompt], parameters={"max_tokens": 3})
        assert not isinstance(found.get(timeout=100), InferenceServerException)
    wait_until(lambda: own.runtime.usage()["slots_taken"] == 0, "free slots")


def test_tokens_are_spent(live: Serving, own: Served) -> None:
    own.state.tenants.put("rival", Quota(tokens_per_min=1), by="a test")
    key = own.state.keys.create("rival", "infer", by="a test")[1]
    with streaming(live, {"authorization": f"Bearer {key}"}) as (client, found):
        for _ in range(2):  # more than a minute's worth, of a full quota and of none
            client.async_stream_infer("a", [word("text_input", "x")], parameters={"max_tokens": 9, "stream": False})
        texts = [found.get(timeout=100) for _ in range(2)]
    [refused] = [answer for answer in texts if isinstance(answer, InferenceServerException)]
    assert "1 tokens a minute" in str(refused)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_cancelled_stream_ends_its_sequences(
    live: Serving, own: Served, headers: dict[str, str], asynchronous: bool
) -> None:
    def stats() -> Any:
        return own.runtime.generation()

    before = stats().cancelled if stats() else 0
    if asynchronous:

        async def run() -> None:
            async with aio.InferenceServerClient(live.address) as client:
                requests = _requests(["one", "two"], **LONG)
                answers = client.stream_infer(requests, headers=headers)
                result, error = await anext(aiter(answers))
                assert error is None
                assert text_of(result)
                answers.cancel()

        asyncio.run(run())
    else:
        with streaming(live, headers) as (client, found):
            for prompt in ("one", "two"):
                client.async_stream_infer("a", [word("text_input", prompt)], parameters=LONG)
            assert text_of(found.get(timeout=100))
            client.stop_stream(cancel_requests=True)
    wait_until(lambda: stats().cancelled >= before + 1, "that its sequences end")
    wait_until(lambda: stats().running == stats().waiting == 0, "free slots")
    wait_until(lambda: live.exchanges[-1].status == 499, "that it is told")


def test_a_client_that_leaves_within_a_write_is_no_error(own: Served, headers: dict[str, str], caplog: Any) -> None:
    message = pb.ModelInferRequest(model_name="a", inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1]}])
    message.inputs[0].contents.bytes_contents.append(b"one")
    message.parameters["max_tokens"].int64_param = 900
    exchanges: list[RequestContext] = []
    servicer = Servicer(own.service, RpcLimits(), exchanges.append)
    details = Details(f"/{SERVICE}/ModelStreamInfer", list(headers.items()))
    handler = servicer.service(details)
    asyncio.run(asyncio.wait_for(handler.stream_stream(None, ClosedContext([message.SerializeToString()])), 100))
    assert [one.status for one in exchanges] == [GONE]
    assert not caplog.records
    stats: Any = own.runtime.generation
    wait_until(lambda: stats().running == 0, "free slots")


async def _requests(prompts: list[str], **parameters: Any) -> AsyncIterator[dict[str, Any]]:
    for prompt in prompts:
        inputs = [word("text_input", prompt, aio)]
        yield {"model_name": "a", "inputs": inputs, "parameters": parameters, "request_id": prompt}
    if parameters == LONG:
        await asyncio.Event().wait()


def test_no_value_of_a_parameter_is_an_internal_error(live: Serving, headers: dict[str, str]) -> None:
    odd: list[Any] = ["", "x", "[]", "null", -1, 1 << 62, True, float("nan")]
    names = [*GenerateBody.__struct_fields__, "sampling_parameters"]
    sent = [(name, value) for name in names for value in odd]
    with streaming(live, headers) as (client, found):
        for name, value in sent:
            parameters = {"max_tokens": 1, name: value}
            client.async_stream_infer(
                "a", [word("text_input", "x")], parameters=parameters, enable_empty_final_response=True
            )
        failed = answered = 0
        while failed + answered < len(sent):
            answer = found.get(timeout=100)
            if isinstance(answer, InferenceServerException):
                assert "internal error" not in str(answer)
                failed += 1
            else:
                answered += is_final(answer)
        assert min(failed, answered) > len(sent) // 10, (failed, answered)


def test_generation_keeps_no_other_message_waiting(live: Serving, headers: dict[str, str]) -> None:
    tensor = triton.InferInput("x", [1], "INT64")
    tensor.set_data_from_numpy(np.array([1]))
    with streaming(live, headers) as (client, found):
        client.async_stream_infer("a", [word("text_input", "x")], parameters=LONG, enable_empty_final_response=True)
        assert text_of(found.get(timeout=100))
        client.async_stream_infer("a", [tensor])  # which its graph has no input for
        answer = found.get(timeout=100)
        while not isinstance(answer, InferenceServerException):
            assert not is_final(answer)
            answer = found.get(timeout=100)
        client.stop_stream(cancel_requests=True)


def test_the_asynchronous_client_gets_the_same(live: Serving, own: Served, headers: dict[str, str]) -> None:
    async def run() -> dict[str, str]:
        texts: dict[str, str] = {}
        async with aio.InferenceServerClient(live.address) as client:
            answers = client.stream_infer(_requests(["one", "two"], max_tokens=6), headers=headers)
            async for result, error in answers:
                assert error is None
                assert not is_final(result)
                name = result.get_response().id
                texts[name] = texts.get(name, "") + text_of(result)
        return texts

    found = asyncio.run(run())
    assert found == {prompt: expected(own, prompt, "a", 6) for prompt in ("one", "two")}
    assert {each.status for each in live.exchanges[-2:]} == {200}
    assert all(each.bytes_out > 20 and each.task == "a" for each in live.exchanges[-2:])
