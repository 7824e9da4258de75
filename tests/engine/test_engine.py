# SPDX-License-Identifier: Apache-2.0
"""What a user of `Engine` relies on, with the shipped model."""

import math

import pytest

from slora_jax import Engine, SamplingParams
from slora_jax.adapters.errors import AdapterError
from slora_jax.config import LAYER_MODULES
from slora_jax.core import EngineDeadError, FinishReason, RequestError
from slora_jax.demo import BASE_MODEL, adapter_dirs
from slora_jax.demo.tasks import COPY, TASKS
from slora_jax.hf_config import read_model_config
from slora_jax.openai.errors import ErrorResponse, error_of
from slora_jax.pool.allocator import PageUse
from tests.adapters.make import write_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        BASE_MODEL,
        adapters={name: adapter_dirs()[name] for name in ("upper", "rot13")},
        dtype="float32",
        num_pages=96,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        decode_batch_sizes=(4,),
    )


@pytest.fixture(autouse=True)
def nothing_is_lost(engine):
    """After every test the engine is empty and its books are right."""
    yield
    assert not engine.has_unfinished
    engine.check()
    assert engine.pool_usage()["kv"] == 0


def one(engine, prompt="hello world", adapter=None, **params):
    [output] = engine.generate(
        [prompt],
        SamplingParams(**{"temperature": 0, "max_tokens": 32, **params}),
        adapters=[adapter],
    )
    return output


class TestStopping:
    def test_end_of_sequence(self, engine):
        output = one(engine)
        assert output.text == "hello world"
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, None)
        assert output.token_ids[-1] in engine.config.eos_token_ids

    def test_max_tokens(self, engine):
        output = one(engine, max_tokens=5)
        assert (output.text, output.finish_reason) == ("hello", FinishReason.LENGTH)

    def test_model_length(self, engine):
        output = one(engine, [5] * 250, max_tokens=None, ignore_eos=True)
        assert len(output.prompt_token_ids) + len(output.token_ids) == 256
        assert output.finish_reason is FinishReason.LENGTH

    def test_stop_token(self, engine):
        output = one(engine, stop_token_ids=(ord("w"),))
        assert output.text == "hello "
        assert output.stop_reason == ord("w")

    def test_stop_string(self, engine):
        assert one(engine, stop="o w").text == "hell"
        output = one(engine, stop=("zzz", "o w"), include_stop_str_in_output=True)
        assert (output.text, output.stop_reason) == ("hello w", "o w")

    def test_stop_string_is_never_streamed(self, engine):
        engine.add_request("hello world", SamplingParams(temperature=0, stop="o world"))
        pieces = [output.new_text for output in engine.stream()]
        assert "".join(pieces) == "hell"

    def test_unfinished_stop_string_is_streamed_in_the_end(self, engine):
        engine.add_request("hello world", SamplingParams(temperature=0, stop="worldly"))
        assert "".join(output.new_text for output in engine.stream()) == "hello world"

    def test_ignore_eos_and_min_tokens(self, engine):
        assert len(one(engine, ignore_eos=True).token_ids) == 32
        output = one(engine, min_tokens=20)
        assert len(output.token_ids) >= 20
        assert not set(engine.config.eos_token_ids) & set(output.token_ids[:20])


class TestSampling:
    def test_a_seed_fixes_the_tokens_in_any_batch(self, engine):
        params = SamplingParams(temperature=8.0, seed=7, max_tokens=16)
        alone = one(engine, temperature=8.0, seed=7, max_tokens=16)
        others = SamplingParams(temperature=8.0, max_tokens=16)
        batch = engine.generate(["abc", "hello world", "xyz"], [others, params, others])
        assert batch[1].token_ids == alone.token_ids
        other = one(engine, temperature=8.0, seed=8, max_tokens=16)
        assert other.token_ids != alone.token_ids

    def test_requests_without_a_seed_differ(self, engine):
        params = SamplingParams(temperature=8.0, max_tokens=16)
        outputs = engine.generate(["hello world"] * 4, params)
        assert len({tuple(output.token_ids) for output in outputs}) == 4

    def test_top_k_of_one_is_greedy(self, engine):
        assert one(engine, temperature=8.0, top_k=1).text == "hello world"

    def test_penalties_survive_preemption(self, engine):
        """A repetition that greedy would make is not made; the counts are rebuilt when needed."""
        plain = one(engine, "aaaaaaaa", max_tokens=12, ignore_eos=True)
        params = SamplingParams(
            temperature=0,
            frequency_penalty=2.0,
            presence_penalty=2.0,
            max_tokens=12,
            ignore_eos=True,
        )
        [alone] = engine.generate(["aaaaaaaa"], params)
        assert alone.token_ids != plain.token_ids
        request_id = engine.add_request("aaaaaaaa", params)
        outputs = []
        for step in range(100):
            outputs += engine.step()
            if step == 5:  # as if the pages had run out
                [request] = engine.scheduler.running
                assert request.id == request_id
                engine.scheduler.preempt(request)
            if not engine.has_unfinished:
                break
        assert outputs[-1].token_ids == alone.token_ids


def test_an_enormous_top_k_harms_nobody(engine):
    params = [SamplingParams(temperature=0, max_tokens=32), SamplingParams(top_k=2**40)]
    assert engine.generate(["hello world", "hello"], params)[0].text == "hello world"


def test_outputs_are_snapshots(engine):
    engine.add_request("hello", SamplingParams(temperature=0, logprobs=0))
    outputs = list(engine.stream())
    assert [len(output.token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]
    assert [len(output.logprobs) for output in outputs] == [1, 2, 3, 4, 5, 6]


def test_a_step_that_fails_ends_the_engine(monkeypatch):
    """What was planned is lost then; to go on would give wrong tokens under the right name."""
    engine = Engine(BASE_MODEL, dtype="float32", max_num_seqs=4, max_num_batched_tokens=32)
    engine.add_request("hello", GREEDY)

    def fail(plan, staged):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    for call in (engine.step, lambda: engine.add_request("hello")):
        with pytest.raises(EngineDeadError, match="make a new one"):
            call()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    """Nearly all texts are still right; weights that overflow are refused, not served as inf."""
    engine = Engine(
        BASE_MODEL,
        adapters=adapter_dirs(),
        dtype=dtype,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        decode_batch_sizes=(8,),
    )
    names = [*adapter_dirs(), None]
    outputs = engine.generate(["red panda"] * len(names), GREEDY, adapters=names)
    right = [(TASKS[n] if n else COPY).transform("red panda") for n in names]
    assert sum(o.text == text for o, text in zip(outputs, right, strict=True)) >= len(names) - 1
    write_adapter(tmp_path, engine.config, modules=("q_proj",), scale_std=1e6)
    if dtype == "float16":
        with pytest.raises(AdapterError, match="q_proj has weights that overflow float16"):
            engine.load_adapter("overflows", tmp_path)
    else:
        engine.load_adapter("large", tmp_path)


def test_an_adapter_that_overflows_fails_alone(engine, tmp_path):
    """Its requests end with an error; nobody else's tokens change."""
    write_adapter(tmp_path, engine.config, modules=("gate_proj", "o_proj"), scale_std=1e30)
    engine.load_adapter("huge", tmp_path)
    names = ["huge", None, "upper", "huge"]
    outputs = engine.generate(["hello world"] * 4, GREEDY, adapters=names)
    for output, name in zip(outputs, names, strict=True):
        if name == "huge":
            assert output.finish_reason is FinishReason.ERROR
            assert "not finite: the adapter 'huge' overflows" in output.stop_reason
            assert output.token_ids == []
    assert [o.text for o in outputs[1:3]] == ["hello world", "HELLO WORLD"]
    engine.unload_adapter("huge")


def test_a_pool_that_no_memory_holds():
    with pytest.raises(ValueError, match=r"takes [\d.]+ GiB, 65536 bytes a page; .* at most"):
        Engine(BASE_MODEL, dtype="float32", num_pages=10**9)


def test_a_slot_forgets_that_its_adapter_had_a_head(tmp_path):
    """One adapter slot: an adapter with lm_head, then one without, then the first again."""
    head = write_adapter(
        tmp_path, read_model_config(BASE_MODEL), modules=("lm_head",), scale_std=0.5
    )
    engine = Engine(
        BASE_MODEL,
        adapters={"head": head, "upper": adapter_dirs()["upper"]},
        dtype="float32",
        max_loras=1,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        decode_batch_sizes=(4,),
    )
    names = ["head", "upper", "head"]
    first, upper, again = engine.generate(["hello"] * 3, GREEDY, adapters=names)
    assert upper.text == "HELLO"
    assert first.token_ids == again.token_ids != upper.token_ids


class TestLogprobs:
    def test_shapes_and_values(self, engine):
        output = one(engine, logprobs=2, prompt_logprobs=0)
        assert len(output.logprobs) == len(output.token_ids)
        for token, position in zip(output.token_ids, output.logprobs, strict=True):
            assert len(position) == 2
            assert position[token].rank == 1
            assert sum(math.exp(entry.logprob) for entry in position.values()) <= 1 + 1e-5
        assert output.prompt_logprobs[0] is None
        for token, position in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        ):
            assert list(position) == [token]

    def test_prompt_and_output_agree(self, engine):
        """The output's log-probabilities are those of the same tokens given as a prompt."""
        first = one(engine, logprobs=1, adapter="rot13")
        tokens = first.prompt_token_ids + first.token_ids
        second = one(engine, tokens, prompt_logprobs=1, max_tokens=1, adapter="rot13")
        given = second.prompt_logprobs[len(first.prompt_token_ids) :]
        for token, a, b in zip(first.token_ids, first.logprobs, given, strict=True):
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


class TestAdapters:
    def test_text_and_token_prompts(self, engine):
        ids = engine.tokenizer.encode("hello world")
        assert one(engine, ids, adapter="upper").text == "HELLO WORLD"

    def test_idle_adapters_stay_until_pages_are_needed(self, engine):
        one(engine, adapter="upper")
        assert "upper" in engine.pool_usage()["adapters"]
        one(engine)
        assert "upper" in engine.pool_usage()["adapters"]
        wanted = engine.pool.capacity - engine.pool_usage()["adapters"]["upper"] + 1
        assert engine.adapters.cache.make_room(wanted)
        assert "upper" not in engine.pool_usage()["adapters"]
        assert one(engine, adapter="upper").text == "HELLO WORLD"

    def test_unload_and_reload(self, engine):
        engine.load_adapter("temporary", adapter_dirs()["upper"])
        assert one(engine, adapter="temporary").text == "HELLO WORLD"
        with pytest.raises(AdapterError, match="already been loaded"):
            engine.load_adapter("temporary", adapter_dirs()["rot13"])
        engine.unload_adapter("temporary")
        engine.load_adapter("temporary", adapter_dirs()["rot13"])
        assert one(engine, adapter="temporary").text == "uryyb jbeyq"
        engine.unload_adapter("temporary")
        with pytest.raises(RequestError, match="'temporary' does not exist"):
            one(engine, adapter="temporary")
        with pytest.raises(AdapterError, match="cannot be found"):
            engine.unload_adapter("temporary")

    def test_too_large_for_the_pool(self, engine, tmp_path):
        write_adapter(tmp_path, engine.config, rank=64, modules=LAYER_MODULES)
        with pytest.raises(
            AdapterError, match=r"takes \d+ pages, the pool has 95: raise num_pages"
        ):
            engine.load_adapter("large", tmp_path)
        assert "large" not in engine.adapters.store

    def test_rank_limit(self, engine, tmp_path):
        write_adapter(tmp_path, engine.config, rank=65, modules=("q_proj",))
        with pytest.raises(AdapterError, match="max_lora_rank"):
            engine.load_adapter("high", tmp_path)


def test_running_out_of_pages(engine):
    """Requests that outgrow the pool are preempted and give the same tokens in the end."""
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    prompts = ["hello", "many adapters", "one page pool", "preempted"]
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    held = engine.pool.capacity - 30
    assert engine.adapters.cache.make_room(engine.pool.capacity)
    ballast = engine.pool.allocate(held, PageUse.KV)  # four requests need 14 pages each
    before = engine.scheduler.num_preemptions
    together = engine.generate(prompts, params)
    engine.pool.release(ballast)
    assert engine.scheduler.num_preemptions > before
    assert [output.token_ids for output in together] == alone


def small_pool() -> Engine:
    """Eleven pages, of which an adapter takes eight."""
    return Engine(
        BASE_MODEL,
        adapters={"upper": adapter_dirs()["upper"]},
        num_pages=12,
        max_num_seqs=1,
        max_num_batched_tokens=16,
    )


class TestRefusals:
    def test_pool_too_small_says_what_for(self):
        small = small_pool()
        with pytest.raises(RequestError) as error:
            small.add_request([1] * 60, SamplingParams(max_tokens=30), adapter="upper")
        assert "needs 4 pages for its prompt of 60 tokens and 8 for its adapter" in str(error.value)
        assert "the pool has 11: raise num_pages or shorten the prompt" in str(error.value)
        assert not small.has_unfinished

    @pytest.mark.parametrize("max_tokens", [None, 100, 41, 40])
    def test_a_small_pool_ends_requests_as_the_models_length_does(self, caplog, max_tokens):
        small = small_pool()
        assert "the pool's 11 pages hold 176 tokens" in caplog.text
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
        # Three pages beside the adapter's; the last token is never read.
        [output] = small.generate([[104] * 8], params, adapters="upper")
        assert len(output.token_ids) == min(max_tokens or 41, 41)
        assert output.finish_reason is FinishReason.LENGTH
        small.check()

    @pytest.mark.parametrize(
        ("prompt", "match"),
        [
            ([], "empty"),
            ([1, 999], "999; token ids are integers from 0"),
            ([1, -1], "token ids"),
            ([1, "a"], "token ids"),
            ([1] * 256, "max_model_len 256"),
        ],
    )
    def test_prompt(self, engine, prompt, match):
        with pytest.raises(RequestError, match=match) as error:
            engine.add_request(prompt)
        assert error.value.param == "prompt"

    def test_all_prompts_or_none(self, engine):
        with pytest.raises(RequestError):
            engine.generate(["fine", []], GREEDY)

    @pytest.mark.parametrize(
        ("params", "name"),
        [
            ({"temperature": -1}, "temperature"),
            ({"temperature": math.nan}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"top_k": -2}, "top_k"),
            ({"min_p": 1.5}, "min_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"min_tokens": 17}, "min_tokens"),
            ({"stop": ("",)}, "stop"),
            ({"repetition_penalty": 0}, "repetition_penalty"),
            ({"presence_penalty": 3}, "presence_penalty"),
            ({"frequency_penalty": -3}, "frequency_penalty"),
            ({"logprobs": -2}, "logprobs"),
        ],
    )
    def test_sampling_params(self, params, name):
        with pytest.raises(RequestError, match=f"{name} must be") as error:
            SamplingParams(**params)
        assert error.value.param == name

    def test_limits_of_the_engine(self, engine):
        with pytest.raises(RequestError, match="logprobs is 21: ask for at most 20"):
            engine.add_request("a", SamplingParams(logprobs=21))
        with pytest.raises(RequestError, match="token ids are below 260"):
            engine.add_request("a", SamplingParams(stop_token_ids=(999,)))
        with pytest.raises(ValueError, match="max_model_len is 300"):
            Engine(BASE_MODEL, max_model_len=300)
        with pytest.raises(ValueError, match="max_num_batched_tokens must be at least"):
            Engine(BASE_MODEL, max_num_seqs=64, max_num_batched_tokens=8)

    @pytest.mark.parametrize("name", ["max_tokens", "top_k", "min_tokens", "seed", "logprobs"])
    @pytest.mark.parametrize("value", [3.5, True, "3"])
    def test_integers(self, name, value):
        with pytest.raises(RequestError, match=f"{name} must be an integer"):
            SamplingParams(**{name: value})

    def test_one_prompt_is_not_a_list_of_prompts(self, engine):
        for prompts in ("hello", [1, 2, 3]):
            with pytest.raises(RequestError, match="list of prompts"):
                engine.generate(prompts)

    def test_text_that_is_no_text(self, engine):
        with pytest.raises(RequestError, match="no text"):
            engine.add_request("\ud800")

    def test_generate_needs_an_idle_engine(self, engine):
        request_id = engine.add_request("hello", GREEDY)
        with pytest.raises(RuntimeError, match="idle"):
            engine.generate(["hello"], GREEDY)
        engine.step()
        engine.abort(request_id)  # its step is still in flight, and harms nobody
        assert engine.generate(["hello"], GREEDY)[0].text == "hello"


class TestAborting:
    def test_running_and_waiting(self, engine):
        ids = [engine.add_request("hello", GREEDY) for _ in range(6)]  # four rows
        engine.step()
        assert [r.id for r in engine.scheduler.waiting] == ids[4:]
        for request_id in (ids[5], ids[0]):
            assert engine.abort(request_id).finish_reason is FinishReason.ABORT
        outputs = [output for output in engine.stream() if output.finished]
        assert sorted(output.request_id for output in outputs) == sorted(ids[1:5])

    def test_an_id_used_again_gets_nothing_of_the_old_request(self, engine):
        asked = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0)
        engine.add_request("hello", asked, request_id="x")
        engine.step()
        engine.abort("x")
        engine.add_request("world", asked, request_id="x")
        [output] = [output for output in engine.stream() if output.finished]
        ids = engine.tokenizer.encode("world")
        assert [list(p) for p in output.prompt_logprobs[1:]] == [[i] for i in ids[1:]]
        assert output.text == "world"

    def test_abort(self, engine):
        ids = [engine.add_request("hello world", GREEDY, adapter=a) for a in ("upper", None)]
        engine.step()
        output = engine.abort(ids[0])
        assert output.finish_reason is FinishReason.ABORT
        assert engine.abort(ids[0]) is None
        outputs = list(engine.stream())
        assert {output.request_id for output in outputs} == {ids[1]}
        assert outputs[-1].text == "hello world"


class TestPolicies:
    def test_who_is_turned_away_is_told_why(self):
        """The second request would have to wait for the first one's 150 tokens."""
        engine = Engine(
            BASE_MODEL,
            dtype="float32",
            num_pages=64,
            max_num_seqs=1,
            max_num_batched_tokens=32,
            decode_batch_sizes=(1,),
            scheduling_policy="abort",
            slo_first_token_s=0.02,
            slo_margin_s=0.0,
        )
        long = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        first = engine.add_request("hello", long)
        while not engine.scheduler.running:
            engine.step()
        second = engine.add_request("hello", GREEDY)
        outputs = {output.request_id: output for output in engine.stream()}
        assert outputs[first].finish_reason is FinishReason.LENGTH
        assert outputs[second].finish_reason is FinishReason.REJECTED
        assert outputs[second].stop_reason.startswith("overloaded: ")
        assert outputs[second].token_ids == []
        error = error_of(outputs[second])
        assert ErrorResponse.of(error).error.code == 503
        assert error_of(outputs[first]) is None
        engine.check()
        assert engine.cost_model.num_observed > 100
        assert engine.cost_model.as_dict()["step_s"] > 0

    def test_priority_needs_its_policy(self, engine):
        with pytest.raises(RequestError, match="scheduling_policy is 'fcfs'"):
            engine.add_request("hello", priority=1)
