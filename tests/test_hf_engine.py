from contextlib import contextmanager, nullcontext

import pytest
import torch
from bpo_fast_kernels.inverse import draw
from relative import relative_error
from tiny_world import question
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from bpo_fast.config import ModelConfig
from bpo_fast.engine import SamplingParams, decode, request_seed
from bpo_fast.engine import decode as decoding
from bpo_fast.engine.hf import HfEngine
from bpo_fast.engine.stopping import StopStrings
from bpo_fast.head import Head
from bpo_fast.policy import load_policy
from bpo_fast.types import Prompt

EOS = 5  # of the toy model: a token that its rows are likely to sample


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    # float64: no rounding of a batch can turn a draw over
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def toy():
    """Twelve tokens, learned positions, another architecture."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=12, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).double().eval()


def engine_of(model, tokenizer, *, eos_ids=(EOS,), batch_size=64, view=nullcontext):
    return HfEngine(model, tokenizer, view=view, eos_ids=eos_ids, pad_id=0, batch_size=batch_size)


def sample(engine, prompts, *, run_seed=1, policy_version=0, **params):
    return engine.generate(
        prompts, SamplingParams(**({"max_new_tokens": 10} | params)), run_seed=run_seed, policy_version=policy_version
    )


def ids_of(found):
    return [[c.ids for c in both] for both in found]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = [question(i) + " Assistant:" if i % 3 else f"{i}?" for i in range(9)]
    return [Prompt(100 + i, t, tuple(tokenizer(t)["input_ids"])) for i, t in enumerate(texts)]


@torch.inference_mode()
def next_probs(model, ids, temperature=1.0):
    return (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)


def cut(probs, top_k=0, top_p=1.0):
    """Top-k, then the smallest set of the most likely tokens whose mass reaches top_p; by hand."""
    ranked = sorted(range(len(probs)), key=lambda t: -probs[t])
    if top_k:
        ranked = ranked[:top_k]
    kept, mass, total = [], 0.0, sum(float(probs[t]) for t in ranked)
    for t in ranked:
        if mass / total >= top_p:
            break
        kept.append(t)
        mass += float(probs[t])
    out = torch.zeros_like(probs)
    out[kept] = probs[kept] / mass
    return out


@pytest.mark.parametrize("eos", [(1,), (1, 50), (270, 300)])
def test_greedy_is_that_of_transformers(eos, model, tokenizer, prompts):
    found = sample(engine_of(model, tokenizer, eos_ids=eos), prompts, temperature=0.0, max_new_tokens=12)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        own = model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False, eos_token_id=list(eos), pad_token_id=0
        )
        assert list(completion.ids) == own[0, len(prompt.ids) :].tolist()
        assert completion.text == tokenizer.decode(completion.ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_k": 6, "top_p": 0.7, "temperature": 1.5},
    ],
    ids=str,
)
def test_the_first_token_has_the_distribution_of_the_model(params, toy, tokenizer):
    ids, num = (3, 7, 1), 4000
    probs = cut(next_probs(toy, ids, params.get("temperature", 1.0)), params.get("top_k", 0), params.get("top_p", 1.0))
    found = sample(engine_of(toy, tokenizer, batch_size=num), [Prompt(0, "", ids)], n=num, max_new_tokens=1, **params)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found[0]]), minlength=12).double()
    assert counts[probs == 0].sum() == 0, "nothing outside the cut"
    expected = num * probs[probs > 0]
    chi2 = float(((counts[probs > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, (chi2, freedom)  # four standard deviations


@pytest.mark.parametrize(("uniform", "place"), [(0.0, 0), (0.5 - 1e-9, 0), (0.5, 1), (1 - 2**-53, 1)])
@pytest.mark.parametrize("tokens", [(1, 3), (0, 127), (127, 128), (130, 260), (299, 300)])  # blocks have 128
def test_the_ends_of_the_unit_interval_fall_on_tokens_of_some_mass(uniform, place, tokens):
    masses = torch.zeros(1, 301)
    masses[0, tokens] = 0.3
    assert draw(masses, torch.tensor([uniform], dtype=torch.float64)).tolist() == [tokens[place]]


@pytest.mark.parametrize("num", [1, 127, 128, 129, 1000])
def test_a_draw_is_the_inverse_transform_of_the_whole_vocabulary(num):
    generator = torch.Generator().manual_seed(num)
    masses = torch.randn(200, num, generator=generator).mul(4).exp()
    masses[torch.rand(masses.shape, generator=generator) < 0.3] = 0
    masses[:, num // 2] += 1e-30  # a mass that rounds away in every sum, and the only one of its row at times
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    cumulative = masses.double().cumsum(-1)
    found = draw(masses, uniforms)
    above = cumulative.gather(1, found[:, None]).squeeze(1)
    mass = masses.double().gather(1, found[:, None]).squeeze(1)
    target, slack = uniforms * cumulative[:, -1], 1e-6 * cumulative[:, -1]
    assert (mass > 0).all()
    assert (target <= above + slack).all()
    assert (target >= above - mass - slack).all()


def test_the_second_token_depends_on_the_first(toy, tokenizer):
    ids, num = (3, 7, 1), 4000
    found = sample(
        engine_of(toy, tokenizer, eos_ids=(99,), batch_size=num), [Prompt(0, "", ids)], n=num, max_new_tokens=2
    )
    first = int(next_probs(toy, ids).argmax())
    seconds = torch.tensor([c.ids[1] for c in found[0] if c.ids[0] == first])
    probs = next_probs(toy, (*ids, first))
    expected = len(seconds) * probs
    chi2 = float(((torch.bincount(seconds, minlength=12) - expected) ** 2 / expected).sum())
    assert len(seconds) > 300
    assert chi2 < 11 + 4 * 22**0.5


@pytest.mark.parametrize("top", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_a_request_does_not_depend_on_its_batch(top, model, tokenizer, prompts):
    together = ids_of(sample(engine_of(model, tokenizer, batch_size=64), prompts, n=2, **top))
    assert ids_of(sample(engine_of(model, tokenizer, batch_size=1), prompts, n=2, **top)) == together
    assert ids_of(sample(engine_of(model, tokenizer, batch_size=5), prompts, n=2, **top)) == together
    backwards = ids_of(sample(engine_of(model, tokenizer, batch_size=4), prompts[::-1], n=2, **top))
    assert backwards == together[::-1]
    for prompt, both in zip(prompts, together, strict=True):
        assert ids_of(sample(engine_of(model, tokenizer), [prompt], n=2, **top)) == [both]
    assert ids_of(sample(engine_of(model, tokenizer), prompts, n=1, **top)) == [both[:1] for both in together]


def test_a_longer_limit_only_goes_on(model, tokenizer, prompts):
    short = ids_of(sample(engine_of(model, tokenizer), prompts, max_new_tokens=4))
    long = ids_of(sample(engine_of(model, tokenizer), prompts, max_new_tokens=9))
    assert [[ids[:4] for ids in both] for both in long] == short


def test_the_seed_of_a_request_is_of_what_names_it(model, tokenizer, prompts):
    engine = engine_of(model, tokenizer)
    base = sample(engine, prompts, n=2)
    assert ids_of(sample(engine, prompts, n=2)) == ids_of(base)
    assert ids_of(sample(engine, prompts, n=2, run_seed=2)) != ids_of(base)
    assert ids_of(sample(engine, prompts, n=2, policy_version=1)) != ids_of(base)
    same_text = [Prompt(1, "", prompts[0].ids), Prompt(2, "", prompts[0].ids)]
    one, two = ids_of(sample(engine, same_text, n=2))
    assert len({*one, *two}) == 4, "samples and prompts have streams of their own"
    for prompt, both in zip(prompts, base, strict=True):
        for s, completion in enumerate(both):
            assert (completion.prompt_id, completion.sample_id, completion.policy_version) == (prompt.id, s, 0)
            assert completion.seed == request_seed(1, 0, prompt.id, s)


def test_request_seeds_are_distinct_and_fixed():
    keys = [(r, v, p, s) for r in range(3) for v in (0, 1, 12) for p in range(40) for s in (-1, 0, 1, 2)]
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= s < 2**63 for s in seeds)
    assert request_seed(42, 0, 0, 0) == 7134082022248438586


def test_sampling_leaves_the_global_generator_alone(model, tokenizer, prompts):
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    sample(engine_of(model, tokenizer), prompts)
    assert torch.rand(1) == wanted


def test_eos_is_kept_exactly_where_it_was_sampled(toy, tokenizer):
    found = sample(engine_of(toy, tokenizer), [Prompt(0, "", (3, 7)), Prompt(1, "", (2,))], n=300, max_new_tokens=6)
    completions = [c for both in found for c in both]
    ended = [c for c in completions if c.ids[-1] == EOS]
    assert 50 < len(ended) < 550
    assert {len(c.ids) for c in ended} == {1, 2, 3, 4, 5, 6}
    for completion in completions:
        assert EOS not in completion.ids[:-1]
        assert completion.truncated == (completion.ids[-1] != EOS)
        assert len(completion.ids) == 6 or not completion.truncated


def test_any_of_several_eos_ids_ends_a_completion(toy, tokenizer):
    found = sample(engine_of(toy, tokenizer, eos_ids=(EOS, 7)), [Prompt(0, "", (3, 2))], n=200, max_new_tokens=6)
    assert {c.ids[-1] for c in found[0] if not c.truncated} == {EOS, 7}
    assert not any({EOS, 7} & set(c.ids[:-1]) for c in found[0])


def test_the_model_s_own_generation_settings_do_not_leak(model, tokenizer, prompts):
    engine = engine_of(model, tokenizer)
    plain, greedy = ids_of(sample(engine, prompts)), ids_of(sample(engine, prompts, temperature=0.0))
    own = GenerationConfig(
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[greedy[0][0][0]],
        temperature=0.1,
        top_k=1,
        do_sample=True,
        num_beams=3,
        min_new_tokens=5,
        max_length=3,
        forced_eos_token_id=7,
    )
    before, model.generation_config = model.generation_config, own
    try:
        assert ids_of(sample(engine, prompts)) == plain
        assert ids_of(sample(engine, prompts, temperature=0.0)) == greedy
        assert model.generation_config is own
    finally:
        model.generation_config = before


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logps_are_those_of_the_tempered_model(temperature, toy, tokenizer):
    prompts = [Prompt(i, "", ids) for i, ids in enumerate([(3, 7, 1), (2,), (9, 9, 9, 9)])]
    params = {"n": 3, "temperature": temperature, "logps": True, "top_k": 8, "max_new_tokens": 6}
    for prompt, completions in zip(prompts, sample(engine_of(toy, tokenizer), prompts, **params), strict=True):
        for completion in completions:
            assert completion.logps is not None
            for t, (token, logp) in enumerate(zip(completion.ids, completion.logps, strict=True)):
                probs = next_probs(toy, prompt.ids + completion.ids[:t], temperature or 1.0)
                assert logp == pytest.approx(float(probs[token].log()), abs=1e-5)
    assert sample(engine_of(toy, tokenizer), prompts)[0][0].logps is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_nothing_is_sampled_from_a_broken_model(bad, temperature, toy, tokenizer):
    bias = toy.transformer.ln_f.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = bad
    try:
        with pytest.raises(RuntimeError, match="the policy's logits are NaN or infinite"):
            sample(engine_of(toy, tokenizer), [Prompt(0, "", (3, 7))], temperature=temperature)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


def test_progress_counts_every_completion_once(model, tokenizer, prompts):
    done = []
    engine_of(model, tokenizer, batch_size=4).generate(
        prompts, SamplingParams(2, n=2), run_seed=0, policy_version=0, on_done=done.append
    )
    assert sorted((c.prompt_id, c.sample_id) for part in done for c in part) == [
        (p.id, s) for p in prompts for s in range(2)
    ]
    assert max(map(len, done)) == 4


@pytest.mark.parametrize("tail", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_batch_counts_logits_where_they_are_made(tail, prompts, tiny_model_dir, monkeypatch):
    config, done = ModelConfig(path=str(tiny_model_dir), full=True), []
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    engine, params = HfEngine.of(policy, None), SamplingParams(2, n=2, **tail)
    monkeypatch.setattr(decode, "MIN_ROWS", 1)
    monkeypatch.setattr(decode, "MAX_ROWS", 1)
    row = engine.kv_bytes(max(len(p.ids) for p in prompts), params)
    monkeypatch.setattr(decode, "MAX_ROWS", 512)
    monkeypatch.setattr(decode, "CPU_BYTES", 12 * row)
    engine.generate(prompts, params, run_seed=0, policy_version=0, on_done=done.append)
    with_logits = 12 * row // (row + 4 * len(policy.model.lm_head.weight))
    assert with_logits < 12
    assert max(map(len, done)) == (with_logits if tail else 12)


def test_a_stop_string_ends_a_completion_where_it_would_have_begun(model, tokenizer, prompts):
    engine = engine_of(model, tokenizer, batch_size=5)
    free = [c for both in sample(engine, prompts, n=3, max_new_tokens=12, logps=True) for c in both]
    text = tokenizer.decode(free[4].ids, skip_special_tokens=False)
    strings = (text[len(text) // 2 :][:3], free[1].text[:1])  # in the middle of a completion, and at the start of one
    stop = StopStrings(tokenizer, strings)
    cut = [c for both in sample(engine, prompts, n=3, max_new_tokens=12, logps=True, stop=strings) for c in both]
    assert any(c.stopped and not c.ids for c in cut)
    assert any(c.stopped and c.ids for c in cut)
    assert any(not c.stopped for c in cut)
    for whole, short in zip(free, cut, strict=True):
        kept = stop.cut(whole.ids)
        if kept is None:
            assert short == whole
            continue
        assert short.ids == whole.ids[:kept]
        assert (short.stopped, short.truncated) == (True, False)
        assert EOS not in short.ids
        assert short.logps == pytest.approx(whole.logps[:kept])
        assert short.text == tokenizer.decode(short.ids, skip_special_tokens=True)


def test_single_members_are_sampled_side_by_side(tiny_model_dir):
    torch.manual_seed(0)
    config = ModelConfig(path=str(tiny_model_dir), members=3, lora_r=4, lora_alpha=8.0)
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    with torch.no_grad():
        for b in policy.lora.b:
            b.normal_(std=0.5)
    engine = HfEngine(
        policy.model, policy.tokenizer, view=policy.merged, num_members=3, eos_ids=(EOS,), pad_id=0, batch_size=4
    )
    questions = [Prompt(i, "", (3 + i, 7, 1)) for i in range(12)]
    found = sample(engine, questions, n=2, single_members=True, logps=True)
    assert {c.member for both in found for c in both} == {0, 1, 2}
    assert any(a.member != b.member for a, b in found)
    for prompt, both in zip(questions, found, strict=True):
        for c in both:
            assert c.member == c.seed % 3
            with policy.member(c.member), torch.no_grad():
                logps = policy.model(input_ids=torch.tensor([prompt.ids + c.ids])).logits[0].log_softmax(-1)
            own = logps[len(prompt.ids) - 1 : -1].gather(1, torch.tensor(c.ids)[:, None]).squeeze(1)
            assert relative_error(torch.tensor(c.logps), own) < 1e-5
    averaged = sample(engine, questions, n=2)
    assert {c.member for both in averaged for c in both} == {None}
    assert ids_of(averaged) != ids_of(found)


def test_no_prompts_give_no_completions(model, tokenizer):
    assert sample(engine_of(model, tokenizer), []) == []


def test_the_behavior_is_what_samples_and_dropout_is_off(model, tokenizer, prompts):
    inside = []

    @contextmanager
    def behavior(member):
        assert member is None
        weight = model.get_output_embeddings().weight
        with torch.no_grad():
            weight.neg_()
        inside.append(model.training)
        yield
        with torch.no_grad():
            weight.neg_()

    model.train()
    try:
        other = ids_of(sample(engine_of(model, tokenizer, view=behavior), prompts, temperature=0.0))
        assert model.training
    finally:
        model.eval()
    assert inside == [False]
    assert other != ids_of(sample(engine_of(model, tokenizer), prompts, temperature=0.0))


def test_completions_are_no_inference_tensors_and_need_no_gradient(model, tokenizer, prompts):
    sample(engine_of(model, tokenizer), prompts)
    out = model(input_ids=torch.tensor([prompts[0].ids])).logits.sum()
    out.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"temperature": 0.6}, {"top_p": 0.9}, {"top_k": 5}])
def test_tokens_from_hidden_states_are_those_from_logits(tiny_model_dir, params):
    config = ModelConfig(path=str(tiny_model_dir), lora_r=4, lora_alpha=8.0)
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    by_logits = engine_of(policy.model, policy.tokenizer, view=policy.merged, eos_ids=policy.eos_ids)
    questions = [Prompt(i, "", (3 + i, 7, 1)) for i in range(12)]
    found = sample(HfEngine.of(policy, None), questions, n=2, logps=True, **params)
    expected = sample(by_logits, questions, n=2, logps=True, **params)
    assert ids_of(found) == ids_of(expected)
    for both, others in zip(found, expected, strict=True):
        for c, other in zip(both, others, strict=True):
            assert relative_error(torch.tensor(c.logps), torch.tensor(other.logps)) < 1e-5


def test_prompts_are_held_once_where_the_policy_shares_them(tiny_model_dir, monkeypatch):
    config = ModelConfig(path=str(tiny_model_dir), lora_r=4, lora_alpha=8.0)
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    engine = HfEngine.of(policy, None)
    policy.shares_prompts = False
    other = HfEngine.of(policy, None)
    monkeypatch.setattr(decoding, "CachedRows", None)
    assert sample(engine, [Prompt(0, "", (3, 7, 1))], n=2)
    with pytest.raises(TypeError):
        sample(other, [Prompt(0, "", (3, 7, 1))], n=2)


def test_in_bfloat16_tokens_come_from_hidden_states_and_prompts_are_held_once(tiny_model_dir, monkeypatch):
    """And are as likely as in float64, of the same weights."""
    config = ModelConfig(path=str(tiny_model_dir), full=True, dtype="bfloat16")
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    monkeypatch.setattr(policy.model.get_output_embeddings(), "forward", None)
    engine = HfEngine.of(policy, None)
    monkeypatch.setattr(decoding, "CachedRows", None)
    questions = [Prompt(i, "", (3 + i, 7, 1)) for i in range(12)]
    found = sample(engine, questions, n=2, logps=True)
    exact = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).double().eval()
    errors = []
    for prompt, both in zip(questions, found, strict=True):
        for c in both:
            with torch.no_grad():
                rows = exact(torch.tensor([prompt.ids + c.ids])).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
            logps = rows.gather(1, torch.tensor(c.ids)[:, None]).squeeze(1)
            errors.append((torch.tensor(c.logps) - logps).abs().mean())
    assert float(torch.stack(errors).mean()) < 0.02


@pytest.mark.parametrize("layer", ["q_proj", "k_proj", "v_proj"])
def test_a_model_that_breaks_is_noticed_where_prompts_are_held_once(layer, tiny_model_dir, monkeypatch):
    config = ModelConfig(path=str(tiny_model_dir), full=True)
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    engine = HfEngine.of(policy, None)
    monkeypatch.setattr(decoding, "CachedRows", None)
    weight = next(p for n, p in policy.model.named_parameters() if n.endswith(f"{layer}.weight"))
    weight.data[1, 1] = float("nan")
    with pytest.raises(RuntimeError, match="the policy's logits are NaN or infinite"):
        sample(engine, [Prompt(0, "", (3, 7, 1))], n=2)


@pytest.mark.parametrize("params", [{"temperature": 0.6}, {"temperature": 0.0}])
def test_logits_are_not_made_where_none_are_cut_off(tiny_model_dir, monkeypatch, params):
    config = ModelConfig(path=str(tiny_model_dir), lora_r=4, lora_alpha=8.0)
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    monkeypatch.setattr(policy.model.get_output_embeddings(), "forward", None)
    monkeypatch.setattr(Head, "logits", None)
    assert sample(HfEngine.of(policy, None), [Prompt(0, "", (3, 7, 1))], n=2, **params)
    with pytest.raises(TypeError):
        sample(HfEngine.of(policy, None), [Prompt(0, "", (3, 7, 1))], n=2, top_k=5)


def test_logits_in_bfloat16_are_not_rounded(tiny_model_dir, prompts):
    """What is drawn without them is not; one of 8 would be off by up to 0.03."""
    config = ModelConfig(path=str(tiny_model_dir), full=True, dtype="bfloat16")
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    policy.model.get_output_embeddings().weight.data *= 16
    drawn, cut = (
        [c for [c] in sample(HfEngine.of(policy, None), prompts, temperature=0.0, logps=True, top_p=top_p)]
        for top_p in (1.0, 0.9)
    )
    for a, b in zip(drawn, cut, strict=True):
        assert a.ids == b.ids
        assert torch.allclose(torch.tensor(b.logps), torch.tensor(a.logps), rtol=0, atol=1e-4)


def test_a_completion_has_the_same_bits_in_any_batch(tiny_model_dir, monkeypatch):
    """Of a float32 policy that shares prompts: no product, attention or draw of a row looks at the others."""
    monkeypatch.setattr(decode, "PROMPT_TOKENS", 40)  # prompts are encoded in parts
    config = ModelConfig(path=str(tiny_model_dir), lora_r=4, lora_alpha=8.0)
    policy = load_policy(config, device=torch.device("cpu"), seed=0, temperature=1.0, max_length=64)
    own = [vars(module).get("forward") for module in policy.model.modules()]
    questions = [Prompt(i, "", tuple(range(3, 4 + i % 11))) for i in range(60)]
    together = sample(HfEngine.of(policy, 120), questions, n=2, logps=True)
    assert len({len(c.ids) for both in together for c in both}) > 1  # some rows left before others
    for size in (1, 7, 64):
        assert sample(HfEngine.of(policy, size), questions, n=2, logps=True) == together
    backwards = sample(HfEngine.of(policy, 50), questions[::-1], n=2, logps=True)
    assert backwards[::-1] == together
    assert [vars(module).get("forward") for module in policy.model.modules()] == own
