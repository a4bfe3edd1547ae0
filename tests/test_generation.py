"""Generation: tokens of transformers, rows by themselves, each option, text as it comes."""

import json
from dataclasses import replace

import numpy as np
import pytest

import loopos
from loopos import ops
from loopos.autograd import Tensor, no_grad
from loopos.backends import available_backends, use_backend
from loopos.backends.threads import get_num_threads, set_num_threads
from loopos.data.batch import Batch
from loopos.data.tokenizer import train_bpe
from loopos.errors import ConfigError, DataError, LooposError, NumericalError
from loopos.generation import SamplingOptions, generate, stream
from loopos.generation.sampling import RowNumbers
from loopos.models import TransformerConfig
from loopos.models.lora import LoraConfig, add_lora, merge_lora, without_adapters
from loopos.models.rope import RopeScaling
from loopos.models.transformer import Transformer

GPT2 = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=96
)
LLAMA = TransformerConfig(
    d_model=14, num_heads=4, num_layers=2, d_ff=18, vocab_size=31, max_seq_len=96,
    num_kv_heads=2, head_dim=6, norm="rms_norm", activation="swiglu", positions="rope",
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_seq_len=64)
CAUSAL = {
    "gpt2": GPT2,
    "gpt2-relu-untied": replace(GPT2, activation="relu", tied=False),
    "gpt2-post-norm": replace(GPT2, norm_placement="post", embedding_norm=True),
    "no-positions": replace(GPT2, positions="none"),
    "llama": LLAMA,
    "llama-llama3": replace(LLAMA, rope_scaling=LLAMA3, mlp_bias=True, tied=False),
    "qwen2-window": replace(LLAMA, attention_bias=True, attention_output_bias=False, window=3),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=10),
    "mistral": replace(LLAMA, window=20, num_kv_heads=1),
}


def scrambled(config, dtype=np.float32, seed=5):
    """A model whose every parameter matters."""
    model = Transformer(config, seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters().values():
        parameter.data += (0.3 * rng.standard_normal(parameter.shape)).astype(dtype)
    return model


def adapted(config, dtype=np.float32):
    model = add_lora(scrambled(config, dtype), LoraConfig(rank=3, alpha=6.0))
    rng = np.random.default_rng(1)
    for name, parameter in model.parameters().items():
        if name.endswith("lora_b"):
            parameter.data += rng.standard_normal(parameter.shape).astype(dtype)
    return model


RNG = np.random.default_rng(7)
HEAD = RNG.integers(0, 31, 40).tolist()
#: Some alone, some with a common head, one twice, one that is all head.
PROMPTS = [
    [3, 1, 4], [*HEAD, 1, 2, 3], [9], [*HEAD, 7], HEAD[:33], [*HEAD, 1, 2, 3], HEAD, [5] * 20,
    HEAD + [7, 8] * 6,
]  # fmt: skip
SAMPLED = SamplingOptions(max_new_tokens=12, temperature=1.3, num_samples=3, seed=4)


def ids_of(results):
    return [g.ids.tolist() for g in results]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_index, a.sample_index) == (b.prompt_index, b.sample_index)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.stop_reason, a.text) == (b.stop_reason, b.text)


# -- what is generated --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens_are_those_of_whole_forwards(name, dtype):
    model = scrambled(CAUSAL[name], dtype)
    results = generate(model, PROMPTS, temperature=0, max_new_tokens=10, batch_size=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens = list(prompt)
        for found in result.ids:
            with no_grad():
                logits = model.forward(Batch.from_sequences([tokens])).data[-1]
            assert logits[found] >= logits.max() - 1e-5
            tokens.append(int(found))
        assert result.stop_reason == "length"
        assert result.text is None


@pytest.mark.parametrize(
    "name", ["GPT2", "Llama", "Llama biased", "Llama scaled", "Qwen2", "Qwen3", "Mistral"]
)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    common = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 31}
    gpt2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 96}
    llama = {"hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 2, "head_dim": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    slides = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    configs = {"GPT2": gpt2, "Llama": llama, "Qwen2": llama | slides, "Qwen3": llama,
               "Llama biased": llama | {"attention_bias": True, "mlp_bias": True},
               "Llama scaled": llama | {"rope_parameters": rope},
               "Mistral": llama | {"sliding_window": 5}}  # fmt: skip
    changes, name = configs[name], name.split()[0]
    config = getattr(transformers, f"{name}Config")(**changes, **common)
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    theirs = theirs(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    ours = loopos.load_model(tmp_path)
    for penalty in (1.0, 1.3):
        results = generate(
            ours, PROMPTS, temperature=0, max_new_tokens=16, stop_ids=(0,), batch_size=4,
            repetition_penalty=penalty,
        )  # fmt: skip
        for prompt, result in zip(PROMPTS, results, strict=True):
            given = torch.tensor([prompt])
            expected = theirs.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=16,
                repetition_penalty=penalty,
            )  # fmt: skip
            assert result.ids.tolist() == expected[0, len(prompt) :].tolist()
            assert result.stop_reason == ("stop_token" if result.ids[-1] == 0 else "length")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_are_those_of_transformers(file, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizer = train_bpe(["the cat sat"] * 3, 270)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=12, intermediate_size=9, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    ours, prompt = loopos.load_model(tmp_path), [5, 6, 7]
    (free,) = generate(ours, [prompt], temperature=0, max_new_tokens=12)
    last = next(i for i in range(2, 12) if free.ids[i] not in free.ids[:i])
    ends = [tokenizer.eos_id, int(free.ids[last])]
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((tmp_path / file).read_text()) if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps(values | {"eos_token_id": ends}))

    loopos.load_model(tmp_path).save(tmp_path / "saved", loopos.load_tokenizer(tmp_path))
    for directory in (tmp_path, tmp_path / "saved"):
        own, words = loopos.load_model(directory), loopos.load_tokenizer(directory)
        (found,) = generate(own, [prompt], tokenizer=words, temperature=0, max_new_tokens=12)
        their = transformers.LlamaForCausalLM.from_pretrained(directory)
        given = torch.tensor([prompt])
        expected = their.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12,
            pad_token_id=0,
        )  # fmt: skip
        assert found.ids.tolist() == expected[0, 3:].tolist() == free.ids[: last + 1].tolist()
        assert found.stop_reason == "stop_token"
        (passed,) = generate(own, [prompt], tokenizer=words, temperature=0, max_new_tokens=12,
                             ignore_eos=True)  # fmt: skip
        assert passed.ids.tolist() == free.ids.tolist()


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_logprobs_are_those_of_a_whole_forward(name, temperature):
    model = scrambled(CAUSAL[name])
    options = replace(SAMPLED, temperature=temperature, top_k=9, top_p=0.9)
    for g in generate(model, PROMPTS, options):
        prompt = PROMPTS[g.prompt_index]
        tokens = np.append(prompt, g.ids)
        with no_grad():
            hidden = model.get_hidden_states(Batch.from_sequences([tokens[:-1]]))
            hidden = Tensor(hidden.data[len(prompt) - 1 :])
            expected, _ = ops.linear_logprobs(hidden, model.head_weight, g.ids, temperature or 1.0)
        np.testing.assert_allclose(g.logprobs, expected.data, atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_speak(merged):
    model = adapted(LLAMA)
    base = generate(without_adapters(model), PROMPTS, temperature=0, max_new_tokens=8)
    if merged:
        merge_lora(model)
    found = generate(model, PROMPTS, temperature=0, max_new_tokens=8)
    assert ids_of(found) != ids_of(base)
    for prompt, result in zip(PROMPTS, found, strict=True):
        with no_grad():
            tokens = np.append(prompt, result.ids[:-1])
            logits = model.forward(Batch.from_sequences([tokens])).data[len(prompt) - 1 :]
        chosen = np.take_along_axis(logits, result.ids[:, None], axis=1)[:, 0]
        assert (chosen >= logits.max(axis=1) - 1e-4).all()


# -- a row is by itself --------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("backend", available_backends())
def test_rows_do_not_depend_on_their_neighbours(backend, name, penalty):
    model, threads = scrambled(CAUSAL[name]), get_num_threads()
    options = replace(SAMPLED, repetition_penalty=penalty, stop_ids=(0, 11, 23))
    same = backend == "cython"
    with use_backend(backend):
        expected = generate(model, PROMPTS, options)
        assert {g.stop_reason for g in expected} == {"stop_token", "length"}
        try:
            for count in (1, 2, 5) if same else ():
                set_num_threads(count)
                assert_same(generate(model, PROMPTS, options), expected)
        finally:
            set_num_threads(threads)
        for how in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 40}, {"num_samples": 2},
                    {"share_prefix": False}, {"share_prefix": False, "batch_size": 5}):  # fmt: skip
            found = generate(model, PROMPTS, options, **how)
            kept = [g for g in expected if g.sample_index < how.get("num_samples", 3)]
            assert ids_of(found) == ids_of(kept)
            if same:
                assert_same(found, kept)


def test_long_prompts_in_several_passes_have_the_same_bytes(monkeypatch):
    model, options = scrambled(LLAMA), replace(SAMPLED, num_samples=1)
    with use_backend("cython" if "cython" in available_backends() else "numpy"):
        expected = generate(model, PROMPTS, options)
        for tokens in (7, 16, 41, 100):
            monkeypatch.setattr("loopos.generation.engine.PASS_TOKENS", tokens)
            assert_same(generate(model, PROMPTS, options), expected)


@pytest.mark.parametrize("model", [scrambled(LLAMA), adapted(LLAMA)], ids=["plain", "adapted"])
def test_each_step_and_nothing_else_is_a_step_of_decoding(model, monkeypatch):
    rows, inner = [], ops.decode_linears

    def counted(x, layers, activation=None):
        rows.append(x.shape[0])
        return inner(x, layers, activation)

    monkeypatch.setattr(ops, "decode_linears", counted)
    with use_backend("numpy"):  # which repeats no step without Python
        generate(model, PROMPTS[:3], temperature=0, max_new_tokens=5)
    assert rows == [3] * 4 * (4 * model.config.num_layers + 1)


def test_a_step_of_decoding_has_no_gradient():
    x, w = Tensor(np.ones((2, 5), np.float32), requires_grad=True), Tensor(np.ones((3, 5), "f"))
    with pytest.raises(LooposError, match=r"decode_linears has no gradient: call it under no_grad"):
        ops.decode_linears(x, [(w, None)])
    with no_grad():
        (y,) = ops.decode_linears(x, [(w, None)])
    np.testing.assert_array_equal(y.data, np.full((2, 3), 5.0))


def test_a_common_prefix_is_computed_once(monkeypatch):
    model, seen = scrambled(GPT2), []
    inner = model.get_hidden_states

    def counted(batch, *args, **kwargs):
        seen.append(batch.num_tokens)
        return inner(batch, *args, **kwargs)

    monkeypatch.setattr(model, "get_hidden_states", counted)
    prompts = [[*HEAD, i, i] for i in range(6)]
    once = {"max_new_tokens": 1, "num_samples": 4}
    generate(model, prompts, **once, share_prefix=False)
    assert sum(seen) == 6 * 42
    seen.clear()
    generate(model, prompts, **once, batch_size=64)
    assert seen == [42, 5 * (42 - 40)]
    seen.clear()
    generate(model, prompts, **once, batch_size=1)  # the slot still has the last prompt
    assert sum(seen) == 42 + 5 * (42 - 40)


def test_the_numbers_of_a_row_are_uniform_and_its_own():
    numbers, slots = RowNumbers(3), np.array([2, 0], np.int32)
    numbers.start(0, 7, 1, 0)
    numbers.start(2, 7, 0, 1)
    drawn = np.array([numbers.next(slots) for _ in range(2000)])
    alone = RowNumbers(1)
    alone.start(0, 7, 1, 0)
    np.testing.assert_array_equal(drawn[:, 1], [alone.next(slots[1:])[0] for _ in range(2000)])
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05
    assert len(np.unique(drawn)) == 4000


# -- sampling ------------------------------------------------------------------------------------


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities by the definitions, one token at a time."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = sorted(range(p.size), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    total, kept, share = sum(p[i] for i in order), [], 0.0
    for i in order:
        if share >= top_p * total:
            break
        kept.append(i)
        share += p[i]
    kept = [i for i in kept if p[i] >= min_p * p.max()]
    q = np.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.8},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.06},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_have_the_exact_distribution(options, backend):
    stats = pytest.importorskip("scipy.stats")
    logits = np.random.default_rng(3).standard_normal(24).astype(np.float32) * 0.8
    draws, rows = 100_000, 1000
    expected = exact(logits.astype(np.float64), **options)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    u = np.random.default_rng(11).random((draws // rows, rows))
    many = np.tile(logits, (rows, 1))
    with use_backend(backend) as found:
        ids = np.concatenate([found.sample(many, *full.values(), part)[0] for part in u])
    counts = np.bincount(ids, minlength=24)
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert kept.sum() > 3
    assert stats.chisquare(counts[kept], draws * expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 7}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 3},
        {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 1.5}, {"stop_ids": (3, 8, 21, 30)},
        {"num_samples": 4}, {"seed": 5},
    ],
    ids=str,
)  # fmt: skip
def test_each_option_changes_the_result(change):
    model = scrambled(GPT2)
    found = generate(model, PROMPTS, SAMPLED, **change)
    assert ids_of(found) != ids_of(generate(model, PROMPTS, SAMPLED))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", 0, "a whole number of at least 1"),
        ("max_new_tokens", True, "a whole number of at least 1"),
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", float("nan"), "a number of at least 0"),
        ("temperature", "hot", "a number of at least 0"),
        ("temperature", 10**400, "a number of at least 0"),
        ("top_k", 1.5, "a whole number of at least 0"),
        ("top_p", 0, r"a number in \(0, 1\]"),
        ("min_p", 1.1, r"a number in \[0, 1\]"),
        ("repetition_penalty", 0, "a number above 0"),
        ("stop", "###", "a list of texts that are not empty"),
        ("stop", ["a", ""], "a list of texts that are not empty"),
        ("stop_ids", [-1], "a list of token ids"),
        ("ignore_eos", 1, "true or false"),
        ("num_samples", 0, "a whole number of at least 1"),
        ("seed", 0.5, "a whole number"),
    ],
)
def test_wrong_options_are_named(name, value, expected):
    with pytest.raises(ConfigError, match=f"^{name}: expected {expected}, found "):
        SamplingOptions(**{name: value})


def test_numbers_of_numpy_are_as_good():
    options = SamplingOptions(
        max_new_tokens=np.int64(5), seed=np.uint32(4), top_p=np.float32(0.5), stop_ids=[np.int8(3)]
    )
    assert options == SamplingOptions(max_new_tokens=5, seed=4, top_p=0.5, stop_ids=(3,))
    assert generate(scrambled(GPT2), PROMPTS[:2], options)[0].ids.size <= 5


def test_numbers_beyond_every_bound_are_taken_as_they_are_meant():
    model = scrambled(GPT2)
    expected = generate(model, PROMPTS[:3], SAMPLED)
    assert_same(generate(model, PROMPTS[:3], SAMPLED, top_k=10**30), expected)
    hot, cold = (generate(model, PROMPTS[:3], SAMPLED, temperature=t) for t in (1e300, 1e-300))
    assert len({token for g in hot for token in g.ids.tolist()}) > 15
    assert ids_of(cold) == ids_of(generate(model, PROMPTS[:3], SAMPLED, temperature=0))
    (found,) = generate(model, [[1] * 90], max_new_tokens=10**30)
    assert (found.ids.size, found.stop_reason) == (6, "context")


def test_a_row_ends_where_the_context_does():
    model = scrambled(GPT2)
    results = generate(model, [[1] * 90, [1] * 3], max_new_tokens=50)
    assert [g.stop_reason for g in results] == ["context", "length"]
    assert [g.ids.size for g in results] == [6, 50]
    assert generate(model, [[1] * 90], max_new_tokens=6)[0].stop_reason == "length"


def test_on_finish_hears_of_every_row():
    heard = []
    results = generate(scrambled(GPT2), PROMPTS, SAMPLED, batch_size=4, on_finish=heard.append)
    assert sorted(heard, key=lambda g: (g.prompt_index, g.sample_index)) == results
    assert [(g.prompt_index, g.sample_index) for g in results] == [
        (p, s) for p in range(len(PROMPTS)) for s in range(3)
    ]
    assert generate(scrambled(GPT2), []) == []


# -- what is refused -----------------------------------------------------------------------------


def test_wrong_inputs_are_named():
    tokenizer = train_bpe(["a text"], 300)
    model = scrambled(GPT2)
    for prompts, fault in [
        ("the cat", "expected a list of prompts, found one text"),
        ([[1], "text"], "prompt 1 is a text, which needs a tokenizer"),
        ([[1], []], "prompt 1 is empty"),
        ([[0.5]], "prompt 0: expected a text or a list of token ids"),
        ([[[1], [2, 3]]], "prompt 0: expected a text or a list of token ids"),
        ([[1], [1, 31]], "prompt 1: token id 31 is outside the vocabulary of 31"),
        ([[1], [-1]], "prompt 1: token id -1 is outside"),
        ([[1], [1] * 96], r"prompt 1 has 96 tokens, .* \(max_seq_len 96\)"),
    ]:
        with pytest.raises(DataError, match=fault):
            generate(model, prompts)
    with pytest.raises(DataError, match="prompt 0 is empty"):
        generate(model, [""], tokenizer=tokenizer)
    for how, fault in [
        ({"temprature": 1}, "no sampling option 'temprature'; did you mean 'temperature'?"),
        ({"options": 3}, "options: expected SamplingOptions, found int"),
        ({"stop": ["a"]}, "stop: stop strings need a tokenizer"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1, found 0"),
        ({"weights": "int9"}, "weights: expected one of .*found 'int9'; did you mean 'int8'?"),
    ]:
        with pytest.raises(ConfigError, match=fault):
            generate(model, [[1]], **how)
    with pytest.raises(ConfigError, match="bidirectional"):
        generate(scrambled(replace(GPT2, causal=False, lm_head=True)), [[1]])
    with pytest.raises(ConfigError, match="no language-model head"):
        generate(scrambled(replace(GPT2, lm_head=False)), [[1]])
    with pytest.raises(ConfigError, match="model: expected a Transformer, found int"):
        generate(3, [[1]])
    with pytest.raises(ConfigError, match="num_samples: a stream has 1, found 2"):
        stream(model, [1], tokenizer=tokenizer, num_samples=2)


def test_logits_that_are_not_finite_are_an_error():
    model = scrambled(GPT2)
    model.parameters()["final_norm.weight"].data[0] = np.nan
    with np.errstate(all="ignore"), pytest.raises(NumericalError, match="prompt 0 after 0 new"):
        generate(model, [[1, 2]])
