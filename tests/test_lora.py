"""Low-rank adapters: what they compute, what they leave alone, and PEFT's files both ways."""

import json
from dataclasses import replace

import numpy as np
import pytest

import loopos
from loopos.data.batch import Batch
from loopos.errors import ConfigError, ModelFormatError, NumericalError, OutputError
from loopos.models import TransformerConfig, load_config, load_model
from loopos.models.lora import LoraConfig, add_lora, linear_modules, merge_lora, unmerge_lora
from loopos.models.peft_files import read_adapter_config
from loopos.models.tensor_file import TensorFile
from loopos.ops import DropoutKeys
from loopos.training.optim import AdamW

GPT2 = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=16
)
LLAMA = TransformerConfig(
    d_model=12, num_heads=2, num_layers=2, d_ff=18, vocab_size=31, num_kv_heads=1, norm="rms_norm",
    activation="swiglu", positions="rope", attention_bias=False, mlp_bias=False, tied=False,
)  # fmt: skip
BERT = TransformerConfig(
    d_model=12, num_heads=3, num_layers=2, d_ff=20, vocab_size=31, max_seq_len=16, causal=False,
    norm_placement="post", activation="gelu", token_types=2, embedding_norm=True, norm_eps=1e-12,
)  # fmt: skip
NATIVE = replace(GPT2, positions="none", activation="silu")
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "loopos": NATIVE}
BATCH = Batch.from_sequences([[3, 1, 4, 1, 5], [9], [2, 6, 5, 30]])


def states(model, batch=BATCH, **kwargs):
    return model.get_hidden_states(batch, **kwargs).data


def fill(model, seed=0):
    """Give B values, so that the adapters compute something."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.parameters().items():
        if name.endswith("lora_b"):
            parameter.data = rng.normal(0, 0.3, parameter.shape).astype(model.dtype)
    return model


@pytest.fixture(params=FAMILIES)
def base(request):
    return loopos.Transformer(FAMILIES[request.param], seed=3, dtype=np.float64)


def test_a_new_adapter_changes_nothing_and_shares_every_array(base):
    before = states(base)
    model = add_lora(base, LoraConfig(rank=3))
    assert np.array_equal(states(model), before)
    ours = model.parameters()
    for name, parameter in base.parameters().items():
        assert ours[name].data is parameter.data
        assert parameter.requires_grad
        assert not ours[name].requires_grad
    trained = {name for name, p in ours.items() if p.requires_grad}
    assert trained == {name for name in ours if name.endswith(("lora_a", "lora_b"))}
    layers = [name for names in linear_modules(base).values() for name in names]
    assert {f"{name}.lora_b" for name in layers} <= trained


def test_the_update_is_scale_b_a(base):
    model = fill(add_lora(base, LoraConfig(rank=3, alpha=5.0)))
    arrays = {name: p.data.copy() for name, p in base.parameters().items()}
    for name, adapter in model.adapters.items():
        arrays[f"{name}.weight"] += 5 / 3 * adapter.b[name].data @ adapter.a.data
    whole = loopos.Transformer(base.config, dtype=np.float64, arrays=arrays)
    np.testing.assert_allclose(states(model), states(whole), rtol=0, atol=1e-12)
    assert np.abs(states(model) - states(base)).max() > 0.01


def test_merged_equals_unmerged_and_comes_apart_again_to_the_byte(base):
    model = fill(add_lora(base, LoraConfig(rank=3)))
    kept = {name: p.data.copy() for name, p in base.parameters().items()}
    apart = states(model)
    merge_lora(model)
    np.testing.assert_allclose(states(model), apart, rtol=0, atol=1e-12)
    assert all(np.array_equal(base.parameters()[n].data, a) for n, a in kept.items())
    with pytest.raises(ConfigError, match="merged already"):
        merge_lora(model)
    unmerge_lora(model)
    assert np.array_equal(states(model), apart)
    assert all(model.parameters()[n].data is p.data for n, p in base.parameters().items())
    with pytest.raises(ConfigError, match="are not merged"):
        unmerge_lora(model)
    with pytest.raises(ConfigError, match="no adapters to merge"):
        merge_lora(base)


def test_merged_logits_in_float32_equal_unmerged_to_1e_6():
    base = loopos.Transformer(LLAMA, seed=3)
    model = fill(add_lora(base, LoraConfig(rank=4, alpha=4.0)))
    apart = model.forward(BATCH).data
    merge_lora(model)
    assert np.abs(model.forward(BATCH).data - apart).max() <= 1e-6 * np.abs(apart).max()


def test_rank_equal_to_width_can_take_any_direction():
    """One step of B with A orthogonal moves the product along the full gradient."""
    base = loopos.Transformer(LLAMA, seed=3, dtype=np.float64)
    full = loopos.Transformer(LLAMA, seed=3, dtype=np.float64)
    full.next_token_loss(BATCH)[0].backward()
    model = add_lora(base, LoraConfig(rank=12, alpha=12.0, target_modules=("q", "down", "up")))
    names = [n for n in model.adapters if n.endswith(("q", "up"))]  # width 12 in
    for name in names:
        model.adapters[name].a.data = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[
            0
        ]
    model.next_token_loss(BATCH)[0].backward()
    for name in names:
        adapter = model.adapters[name]
        moved = adapter.b[name].grad @ adapter.a.data
        np.testing.assert_allclose(moved, full.parameters()[f"{name}.weight"].grad, atol=1e-12)


def test_gradients_of_adapters_agree_with_differences(base):
    model = fill(add_lora(base, LoraConfig(rank=2, dropout=0.3)))
    trained = [p for p in model.parameters().values() if p.requires_grad]
    rng = np.random.default_rng(5)
    upstream = rng.normal(size=(BATCH.num_tokens, 12))
    directions = [rng.normal(size=p.shape) for p in trained]

    def value():
        return float((states(model, dropout=DropoutKeys(1, 2)) * upstream).sum())

    model.get_hidden_states(BATCH, DropoutKeys(1, 2)).backward(upstream)
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    step, values = 3e-7, []  # norms of small states bend sharply
    for sign in (1, -1):
        for p, d in zip(trained, directions, strict=True):
            p.data = p.data + sign * step * d
        values.append(value())
        for p, d in zip(trained, directions, strict=True):
            p.data = p.data - sign * step * d
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_dropout_acts_before_a_and_one_module_has_one_mask():
    base = loopos.Transformer(GPT2, seed=3, dtype=np.float64)
    model = fill(add_lora(base, LoraConfig(rank=2, dropout=0.5)))
    plain = states(model)
    first, again = (states(model, dropout=DropoutKeys(0, 0)) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(states(model, dropout=DropoutKeys(0, 1)) - first).max() > 1e-3
    keys = DropoutKeys(0, 0)
    model.get_hidden_states(BATCH, keys)
    modules = len(linear_modules(model))  # q, k and v are one of them
    assert modules == 2 * 4
    assert keys.next() == _key_after(modules)


def _key_after(count):
    keys = DropoutKeys(0, 0)
    for _ in range(count):
        keys.next()
    return keys.next()


def test_alone_and_in_a_batch_with_dropout_are_the_same():
    base = loopos.Transformer(LLAMA, seed=3, dtype=np.float64)
    model = fill(add_lora(base, LoraConfig(rank=2, dropout=0.5)))
    whole = states(model, dropout=DropoutKeys(4, 1))
    alone = Batch.from_sequences([[2, 6, 5, 30]], sample_ids=[2])
    np.testing.assert_allclose(
        states(model, alone, dropout=DropoutKeys(4, 1)), whole[-4:], atol=1e-12
    )


def test_training_moves_adapters_only():
    base = loopos.Transformer(LLAMA, seed=3, dtype=np.float64)
    kept = {name: p.data.copy() for name, p in base.parameters().items()}
    model = add_lora(base, LoraConfig(rank=4, alpha=32.0))
    optimizer = AdamW(model.parameters(), 0.03)
    losses = []
    for _ in range(30):
        loss, count = model.next_token_loss(BATCH)
        losses.append(loss.item() / count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.15  # the head stays as it was drawn
    assert all(np.array_equal(base.parameters()[n].data, a) for n, a in kept.items())
    assert set(optimizer.parameters) == set(model.parameters())
    touched = {key.partition("/")[2] for key in optimizer.state_dict() if "/" in key}
    assert touched == {n for n, p in model.parameters().items() if p.requires_grad}


@pytest.mark.parametrize(
    ("config", "targets", "layers"),
    [
        (LLAMA, ("q_proj", "v_proj"), {"attention.q", "attention.v"}),
        (LLAMA, ("q", "down"), {"attention.q", "mlp.down"}),
        (GPT2, ("c_attn",), {"attention.q", "attention.k", "attention.v"}),
        (GPT2, ("q", "k", "v"), {"attention.q", "attention.k", "attention.v"}),
        (GPT2, ("mlp.c_proj",), {"mlp.down"}),
        (BERT, ("query", "output.dense"), {"attention.q", "attention.o", "mlp.down"}),
    ],
)
def test_targets_by_either_name(config, targets, layers):
    model = add_lora(loopos.Transformer(config), LoraConfig(target_modules=targets))
    assert {name.split(".", 2)[2] for name in model.adapters} == layers


def test_the_scale_of_rslora():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, r"training\.lora\.rank: expected a whole number of at least 1, found 0"),
        ({"rank": True}, r"rank: expected a whole number"),
        ({"alpha": 0}, r"alpha: expected a positive number, found 0\.0"),
        ({"alpha": float("nan")}, r"alpha: expected a positive number"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), found 1\.0"),
        ({"target_modules": ()}, "target_modules: expected 'all-linear' or names of layers"),
        ({"target_modules": "q"}, "target_modules: expected 'all-linear' or a list of names"),
        ({"rslora": 1}, "rslora: expected true or false"),
    ],
)
def test_values_that_do_not_fit(values, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


def test_targets_that_are_none():
    model = loopos.Transformer(GPT2)
    with pytest.raises(ConfigError, match="no linear layer 'c_atn'; did you mean 'c_attn'"):
        add_lora(model, LoraConfig(target_modules=("c_atn",)))
    with pytest.raises(ConfigError, match="'q' is part of 'c_attn' in this family; name 'c_attn'"):
        add_lora(model, LoraConfig(target_modules=("q",)))
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(add_lora(model))


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_saved_adapters_load_on_their_base_with_equal_states(base, tmp_path, rslora):
    base.save(tmp_path / "base")
    targets = "all-linear" if rslora else tuple(list(linear_modules(base))[:3])
    config = LoraConfig(3, 5.0, targets, 0.1, rslora)
    model = fill(add_lora(load_model(tmp_path / "base"), config))
    model.save(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    found = load_model(tmp_path / "adapter")
    assert np.array_equal(states(found), states(model))
    assert load_config(tmp_path / "adapter") == model.config
    assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (3, 5.0, 0.1)
    assert list(found.adapters) == list(model.adapters)
    trained = {n for n, p in found.parameters().items() if p.requires_grad}
    assert trained == {n for n in found.parameters() if "lora_" in n}


def test_a_merged_model_saves_whole(tmp_path):
    base = loopos.Transformer(GPT2, seed=3)
    base.save(tmp_path / "base")
    model = fill(add_lora(load_model(tmp_path / "base")))
    merge_lora(model)
    model.save(tmp_path / "merged")
    assert np.array_equal(states(load_model(tmp_path / "merged")), states(model))
    assert not load_model(tmp_path / "merged").adapters


def test_adapters_and_a_whole_model_do_not_share_a_directory(tmp_path):
    """What is found there when it is read would be a mixture."""
    base = loopos.Transformer(GPT2, seed=3)
    base.save(tmp_path / "base")
    model = fill(add_lora(load_model(tmp_path / "base")))
    with pytest.raises(OutputError, match="not saved, it holds a whole model"):
        model.save(tmp_path / "base")
    model.save(tmp_path / "adapter")
    model.save(tmp_path / "adapter")
    with pytest.raises(OutputError, match="not saved, it holds adapters"):
        base.save(tmp_path / "adapter")
    assert np.array_equal(states(load_model(tmp_path / "adapter")), states(model))


def test_a_base_on_the_hub_has_its_revision_apart(tmp_path):
    path = saved(tmp_path) / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values["revision"] is None
    change = {"base_model_name_or_path": "org/name", "revision": "v1.0"}
    path.write_text(json.dumps(values | change))
    assert read_adapter_config(path.parent)[1] == "org/name@v1.0"
    model = fill(add_lora(load_model(tmp_path / "base"), LoraConfig(rank=2)))
    model.origin = replace(model.origin, source="org/name@v1.0")
    model.save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {key: written[key] for key in change} == change


def saved(tmp_path, config=GPT2):
    loopos.Transformer(config, seed=3).save(tmp_path / "base")
    fill(add_lora(load_model(tmp_path / "base"), LoraConfig(rank=2))).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "key 'peft_type' is 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, "key 'use_dora' is True, expected nothing, as loopos does not"),
        ({"bias": "all"}, "key 'bias' is 'all', expected 'none'"),
        ({"rank_pattern": {"c_attn": 4}}, "key 'rank_pattern' is"),
        ({"modules_to_save": ["score"]}, "key 'modules_to_save' is"),
        ({"something_new": 1}, "key 'something_new' is 1, expected nothing"),
        ({"r": 3}, r"lora_A\.weight' has shape \[2, 12\], expected \[3, 12\]"),
        ({"r": 10**12}, r"lora_A\.weight' has shape \[2, 12\], expected \[1000000000000, 12\]"),
        ({"lora_alpha": 10**400}, "alpha: expected a positive number"),
        ({"r": "x"}, "rank: expected a whole number"),
        ({"base_model_name_or_path": None}, "expected where the base model is"),
        ({"init_lora_weights": "pissa_niter_4"}, "expected one that leaves the base as it is"),
        ({"init_lora_weights": "olora"}, "expected one that leaves the base as it is"),
    ],
)
def test_configurations_that_are_not_computed_are_refused(tmp_path, change, message):
    directory = saved(tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError, match=message):
        load_model(directory)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    from loopos.models.tensor_file import write_tensors

    directory = saved(tmp_path)
    file = TensorFile(directory / "adapter_model.safetensors")
    tensors = {name: file.read(name, np.float32) for name in file.names}
    first = file.names[0]

    def with_change(change):
        write_tensors(file.path, {k: v for k, v in (tensors | change).items() if v is not None})
        return directory

    stranger = first.replace("c_attn", "c_atn")
    with pytest.raises(ModelFormatError, match=f"'{stranger}' belongs to no .*did you mean"):
        load_model(with_change({stranger: tensors[first]}))
    with pytest.raises(ModelFormatError, match=f"tensor '{first}' is missing"):
        load_model(with_change({first: None}))
    with pytest.raises(ModelFormatError, match=f"tensor '{first}' is nan"):
        load_model(with_change({first: tensors[first] * np.float32("nan")}))
    with pytest.raises(ModelFormatError, match="there is no adapter in it"):
        load_model(with_change(dict.fromkeys(tensors)))


def test_adapters_need_a_base_that_can_be_found_again(tmp_path):
    model = add_lora(loopos.Transformer(GPT2))
    with pytest.raises(ConfigError, match="this one was not loaded from files"):
        model.save(tmp_path / "x")
    with pytest.raises(NumericalError, match="lora_A.weight' is not finite"):
        broken = load_model(saved(tmp_path))
        broken.adapters["layers.0.attention.q"].a.data[0, 0] = np.inf
        broken.save(tmp_path / "y")
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "base")
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "adapter")}))
    with pytest.raises(ModelFormatError, match="holds adapters too"):
        load_model(tmp_path / "adapter")


# -- PEFT -----------------------------------------------------------------------------------------

PEFT_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "value", "intermediate.dense"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "head"),
    [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False), ("bert", False)],
)
def test_peft_reads_ours_and_we_read_peft_s(tmp_path, family, head):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModel, AutoModelForCausalLM

    loopos.Transformer(replace(FAMILIES[family], lm_head=head), seed=3).save(tmp_path / "base")
    auto = AutoModelForCausalLM if head else AutoModel
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    batch = Batch.from_sequences([tokens[0].numpy()])

    def theirs(model):
        with torch.no_grad():
            out = model(input_ids=tokens)
        return (out.logits if head else out.last_hidden_state)[0].numpy()

    def ours(model):
        return (model.forward(batch) if head else model.get_hidden_states(batch)).data

    # Ours, read by PEFT.
    config = LoraConfig(4, 6.0, tuple(PEFT_TARGETS[family]))
    mine = fill(add_lora(load_model(tmp_path / "base"), config))
    mine.save(tmp_path / "ours")
    body = auto.from_pretrained(tmp_path / "base")
    read = peft.PeftModel.from_pretrained(body, str(tmp_path / "ours")).eval()
    expected = ours(mine)
    assert np.abs(theirs(read) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(expected - ours(load_model(tmp_path / "base"))).max() > 1e-3

    # PEFT's, read by us.
    settings = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=PEFT_TARGETS[family], fan_in_fan_out=family == "gpt2",
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), settings).eval()
    made.save_pretrained(tmp_path / "theirs")
    expected = theirs(made)
    found = ours(load_model(tmp_path / "theirs"))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    # And what it reads, it writes back: the same tensors and the same answer in PEFT.
    load_model(tmp_path / "theirs").save(tmp_path / "back")
    files = [TensorFile(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "back")]
    assert sorted(files[0].names) == sorted(files[1].names)
    for name in files[0].names:
        assert np.array_equal(*(f.read(name, np.float32) for f in files))
