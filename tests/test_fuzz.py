"""10,000 mutated inputs: each works, or is refused with one sentence; none hangs or eats memory.

    python tests/test_fuzz.py KIND SEED COUNT DIRECTORY

runs more of a kind; what failed is kept in the directory.
"""

import copy
import faulthandler
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

#: Inputs of each kind in the committed campaign.
COUNTS = {
    "configurations": 2000, "rows": 2500, "parquet": 300, "gguf": 1300, "safetensors": 1000,
    "adapters": 700, "tokenizers": 1000, "classifiers": 500, "checkpoints": 700,
}  # fmt: skip
#: Seconds after which an input counts as hanging, and memory beside Python's and its libraries'.
HANG_S, MEMORY = 30, 400 << 20

# -- mutations -------------------------------------------------------------------------------------

EXTREMES = [
    0, -1, 1, 2, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, -1e308, 1e-320,
    True, False, None, "", "x" * 5000, "1", "\ud800", "a\0b", "..", "/", "\u2028", [], {}, [[]],
    [None], {"a": 1}, {"": {}}, [0] * 50, ["a", 1, None],
]  # fmt: skip
TOKENS = [b"NaN", b"Infinity", b"-", b"1e999", b"9" * 5000, b"null", b'"', b"\\ud800", b"\\u0000",
          b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b",", b"{", b"}", b"[" * 3000, b"|",
          b"\t", "😀".encode()]  # fmt: skip


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def how_many(rng, most):
    return 1 if rng.random() < 0.6 else int(rng.integers(1, most + 1))


def mutated_bytes(rng, data, most=4):
    data = bytearray(data)
    for _ in range(how_many(rng, most)):
        size = max(1, len(data))
        # Headers come first: half of the places are there.
        place = int(rng.integers(size if rng.random() < 0.5 else min(size, 200)))
        end = min(len(data), place + int(rng.integers(1, 40)))
        kind = int(rng.integers(8))
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place:end] = rng.bytes(end - place)
        elif kind == 2:
            del data[place:end]
        elif kind == 3:
            data[place:place] = data[place:end]
        elif kind == 4:
            data[place:place] = pick(rng, TOKENS)
        elif kind == 5:
            del data[place + int(rng.integers(1, size + 1)) :]
        elif kind == 6:
            number = pick(rng, [0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
            data[place : place + 8] = number.to_bytes(8, "little")
        else:
            other = int(rng.integers(size))
            data[place:end] = data[other : other + end - place]
    return bytes(data)


def mutated_value(rng, value, most=3):
    """Change a JSON value in a few places: other values, keys gone or renamed, deep nesting."""
    value = copy.deepcopy(value)
    for _ in range(how_many(rng, most)):
        places = list(_places(value))
        if not places:
            return value
        holder, key = pick(rng, places)
        kind = int(rng.integers(6))
        if kind <= 1:
            holder[key] = copy.deepcopy(pick(rng, EXTREMES))
        elif kind == 2 and isinstance(holder, dict):
            del holder[key]
        elif kind == 3 and isinstance(holder, dict):
            holder[pick(rng, [f"{key}s", str(key)[1:], "", "é"])] = holder.pop(key)
        elif kind == 4:
            other, name = pick(rng, places)
            holder[key] = copy.deepcopy(other[name])
        else:
            nested = holder[key]
            for _ in range(40):
                nested = [nested] if rng.random() < 0.5 else {"a": nested}
            holder[key] = nested
    return value


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


def mutated_json(rng, value):
    """Return JSON text of a changed value, or changed text."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, json.dumps(value).encode())
    text = json.dumps(mutated_value(rng, value))
    return mutated_bytes(rng, text.encode(), 1) if rng.random() < 0.2 else text.encode()


# -- kinds of input: each makes a function (rng, number) -> (what to call, files of the input) -----


def configurations(directory):
    from loopos.config import load_config

    value = {
        "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300,
                  "num_classes": 2, "positions": "rope", "dropout": 0.1,
                  "rope_scaling": {"kind": "linear", "factor": 2.0}},
        "computation": {"method": "fine_tuning", "backend": "auto", "num_threads": 1, "seed": 3},
        "training": {"learning_rate": 1e-3, "batch_size": 4, "num_epochs": 2, "betas": [0.9, 0.99],
                     "scheduler": "step", "scheduler_gamma": 0.5, "class_weights": [1.0, 2.0],
                     "lora": {"rank": 4, "target_modules": ["q"], "dropout": 0.1}},
        "data": {"training_data": ["a.jsonl", "b/*.csv"], "pretrained_weights": "w"},
    }  # fmt: skip
    toml = 'a = 1\n[model]\nd_model = 16\n[computation]\nmethod = "fine_tuning"\n[training]\n' \
           'learning_rate = 1e-3\nlora = {rank = 2}\n[data]\ntraining_data = ["a"]\n'  # fmt: skip
    yaml = "model: {d_model: 16}\ncomputation:\n  method: fine_tuning\ntraining:\n" \
           "  betas: [0, 0.5]\n  lora:\n    rank: 2\ndata:\n  training_data: a.jsonl\n"  # fmt: skip

    def make(rng, number):
        kind = number % 4
        suffix = [".json", ".json", ".toml", ".yaml"][kind]
        text = mutated_json(rng, value) if kind < 2 else mutated_bytes(
            rng, (toml if kind == 2 else yaml).encode())  # fmt: skip
        path = directory / f"run{suffix}"
        path.write_bytes(text)
        overrides = ["training.lora.rank=8"] if rng.random() < 0.1 else []
        return lambda: load_config(path, overrides), [path]

    return make


def check_labels(data):
    assert len(data.texts) == len(data.where) == len(data.labels)
    if data.problem == "classification":
        assert ((data.labels >= 0) & (data.labels < len(data.label_names))).all()
    assert np.isfinite(data.labels).all()
    for text, place in zip(data.texts, data.where, strict=True):
        assert text.encode("utf-8").strip()
        assert place


def read(path, problem):
    from loopos.data.readers import read_labelled, read_texts

    if problem is None:
        texts = read_texts(path)
        assert all(text.strip() for text in texts.texts)
    else:
        check_labels(read_labelled(path, problem=problem))


PROBLEMS = [None, "classification", "regression", "multi_label"]
LABELS = {"classification": ["good", "bad"], "regression": [1.5, -2], None: ["x", "y"],
          "multi_label": [["a", "b"], []]}  # fmt: skip


def rows(directory):
    def make(rng, number):
        problem = PROBLEMS[number % 4]
        content = [{"text": f"text {i} 電影", "label": LABELS[problem][i % 2]} for i in range(6)]
        suffix = pick(rng, [".jsonl", ".json", ".csv", ".tsv", ".txt"])
        path = directory / f"t{suffix}"
        if suffix == ".json":
            data = mutated_json(rng, content)
        elif suffix == ".jsonl":
            lines = [json.dumps(mutated_value(rng, row, 1) if rng.random() < 0.2 else row)
                     for row in content]  # fmt: skip
            data = "\n".join(lines).encode()
            data = mutated_bytes(rng, data, 2) if rng.random() < 0.7 else data
        else:
            mark = "\t" if suffix == ".tsv" else ","
            lines = [f'"{row["text"]}"{mark}{"|".join(map(str, np.ravel(row["label"])))}'
                     for row in content]  # fmt: skip
            data = mutated_bytes(rng, "\n".join([f"text{mark}label", *lines]).encode(), 3)
        path.write_bytes(data)
        return lambda: read(path, problem), [path]

    return make


def parquet(directory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"text {i}" for i in range(40)], "label": ["a", "b"] * 20})
    pq.write_table(table, directory / "whole.parquet", row_group_size=16)
    whole = (directory / "whole.parquet").read_bytes()

    def make(rng, number):
        path = directory / "t.parquet"
        path.write_bytes(mutated_bytes(rng, whole))
        return lambda: read(path, ["classification", None][number % 2]), [path]

    return make


def check_model(model):
    for name, parameter in model.parameters().items():
        assert np.isfinite(parameter.data).all(), name


def gguf(directory):
    import gguf as library

    from loopos import Transformer, TransformerConfig, load_model, load_tokenizer
    from loopos.data.tokenizer import train_bpe

    config = TransformerConfig(
        d_model=16, num_heads=2, num_layers=1, d_ff=32, vocab_size=260, max_seq_len=16,
        norm="rms_norm", activation="swiglu", positions="rope", attention_bias=False,
        mlp_bias=False,
    )  # fmt: skip
    arrays = {name: p.data for name, p in Transformer(config).parameters().items()}
    names = {"embeddings.tokens": "token_embd", "final_norm": "output_norm"}
    parts = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate",
             "mlp.up": "ffn_up", "mlp.down": "ffn_down", "attention.o": "attn_output"}  # fmt: skip
    parts |= {f"attention.{x}": f"attn_{x}" for x in "qkv"}
    names |= {f"layers.0.{ours}": f"blk.0.{theirs}" for ours, theirs in parts.items()}
    writer = library.GGUFWriter(directory / "whole.gguf", "llama")
    sizes = {"context_length": 16, "embedding_length": 16, "block_count": 1,
             "feed_forward_length": 32, "attention.head_count": 2, "attention.head_count_kv": 2,
             "rope.dimension_count": 8}  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    words = json.loads(train_bpe(["aa bb aa bb"] * 9, 260)._backend.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_types([1] * len(words["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_chat_template("{{ messages }}")
    for name, array in arrays.items():
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", array)
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    whole = (directory / "whole.gguf").read_bytes()
    check_model(load_model(directory / "whole.gguf"))
    header = len(whole) - sum(array.nbytes for array in arrays.values())

    def make(rng, number):
        path = directory / "m.gguf"
        cut = header if rng.random() < 0.8 else len(whole)
        path.write_bytes(mutated_bytes(rng, whole[:cut]) + whole[cut:])

        def call():
            if number % 2:
                check_tokenizer(load_tokenizer(path))
            else:
                check_model(load_model(path))

        return call, [path]

    return make


def base(directory, **changes):
    from loopos import Transformer, TransformerConfig

    sizes = {"d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "vocab_size": 20}
    Transformer(TransformerConfig(**sizes, max_seq_len=8, **changes)).save(directory)
    return directory


def mutated_tensors(rng, whole):
    """Change the header of a safetensors file as JSON, or any of its bytes."""
    size = int.from_bytes(whole[:8], "little")
    if rng.random() < 0.5:
        return mutated_bytes(rng, whole)
    header = mutated_json(rng, json.loads(whole[8 : 8 + size]))
    length = len(header) if rng.random() < 0.9 else pick(rng, [0, 2**40, 2**63, len(whole)])
    return length.to_bytes(8, "little") + header + whole[8 + size :]


def safetensors(directory):
    from loopos import load_model

    kinds = {
        "gpt2": {},
        "llama": {"norm": "rms_norm", "activation": "swiglu", "positions": "rope", "tied": False,
                  "attention_bias": False, "mlp_bias": False},
        "bert": {"causal": False, "norm_placement": "post", "activation": "gelu", "token_types": 2,
                 "embedding_norm": True, "norm_eps": 1e-12},
        "loopos": {"positions": "none"},
    }  # fmt: skip
    places = [base(directory / name, **changes) for name, changes in kinds.items()]
    whole = [(p / "model.safetensors").read_bytes() for p in places]
    values = [json.loads((p / "config.json").read_text()) for p in places]

    def make(rng, number):
        which = number % len(places)
        place, changes_weights = places[which], rng.random() < 0.5
        data = mutated_tensors(rng, whole[which]) if changes_weights else whole[which]
        text = json.dumps(values[which]).encode()
        (place / "model.safetensors").write_bytes(data)
        (place / "config.json").write_bytes(
            text if changes_weights else mutated_json(rng, values[which])
        )
        index = place / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        if number % 5 == 0:  # the same as a shard and its index
            shards = {"weight_map": dict.fromkeys(header_names(whole[which]), "part.safetensors")}
            (place / "model.safetensors").rename(place / "part.safetensors")
            index.write_bytes(mutated_json(rng, shards) if changes_weights else
                              json.dumps(shards).encode())  # fmt: skip
        return lambda: check_model(load_model(place)), list(place.iterdir())

    return make


def header_names(whole):
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return [name for name in header if name != "__metadata__"]


def adapters(directory):
    from loopos import add_lora, load_model

    add_lora(load_model(base(directory / "base"))).save(directory / "adapter")
    place = directory / "adapter"
    whole = (place / "adapter_model.safetensors").read_bytes()
    value = json.loads((place / "adapter_config.json").read_text())

    def make(rng, number):
        weights = mutated_tensors(rng, whole) if number % 2 else whole
        text = json.dumps(value).encode() if number % 2 else mutated_json(rng, value)
        (place / "adapter_model.safetensors").write_bytes(weights)
        (place / "adapter_config.json").write_bytes(text)
        return lambda: check_model(load_model(str(place))), list(place.iterdir())

    return make


def check_tokenizer(tokenizer):
    ids = tokenizer.encode("Hello 12 電影 \x00")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert isinstance(tokenizer.decode(ids), str)


def tokenizers(directory):
    from loopos.data.tokenizer import load_tokenizer, train_bpe

    trained = train_bpe(["aa bb aa bb cc"] * 9, 270)
    trained.save(directory / "json")
    value = json.loads((directory / "json" / "tokenizer.json").read_text())
    settings = json.loads((directory / "json" / "tokenizer_config.json").read_text())
    model = value["model"]
    files = {
        "json/tokenizer.json": value,
        "json/tokenizer_config.json": settings | {"chat_template": "{{ m }}"},
        "gpt2/vocab.json": model["vocab"],
        "gpt2/merges.txt": "\n".join(" ".join(pair) for pair in model["merges"]).encode(),
        "bert/vocab.txt": "\n".join(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "電"]
        ).encode(),
        "bert/tokenizer_config.json": {"do_lower_case": True, "strip_accents": None},
    }

    def text_of(content):
        return content if isinstance(content, bytes) else json.dumps(content).encode()

    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(text_of(content))

    def make(rng, number):
        name = list(files)[number % len(files)]
        content, path = files[name], directory / name
        path.write_bytes(mutated_bytes(rng, content) if isinstance(content, bytes)
                         else mutated_json(rng, content))  # fmt: skip

        def call():
            try:
                check_tokenizer(load_tokenizer(path.parent))
            finally:
                path.write_bytes(text_of(content))

        return call, [path]

    return make


def classifiers(directory):
    from loopos.models import SequenceClassifier, load_classifier, load_model

    base(directory / "model")
    head = SequenceClassifier(load_model(directory / "model"), 3)
    head.labels = ["a", "b", "c"]
    place = directory / "model"
    head.save(place)
    whole = (place / "classifier.safetensors").read_bytes()
    value = json.loads((place / "classifier.json").read_text())

    def make(rng, number):
        (place / "classifier.safetensors").write_bytes(
            mutated_tensors(rng, whole) if number % 2 else whole
        )
        (place / "classifier.json").write_bytes(
            json.dumps(value).encode() if number % 2 else mutated_json(rng, value)
        )
        return lambda: load_classifier(place), [place / "classifier.json"]

    return make


def checkpoints(directory):
    import logging

    from loopos import AdamW, Parameter
    from loopos.training.checkpoint import (
        _digest,
        find_checkpoint,
        load_checkpoint,
        read_state,
        recover,
        save_checkpoint,
    )

    logging.getLogger("loopos").addHandler(logging.NullHandler())
    parameters = {"w": Parameter(np.ones((3, 2)), "w")}
    optimizer = AdamW(parameters)
    parameters["w"].add_grad(np.ones((3, 2)))
    optimizer.step()
    for step in (1, 2):
        save_checkpoint(directory / "c", parameters, optimizer, {"step": step, "epoch": 0})
    place = directory / "c" / "step-00000002"
    names = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    whole = {name: (place / name).read_bytes() for name in names}

    def make(rng, number):
        for name, data in whole.items():
            (place / name).write_bytes(data)
        name = names[number % 4]
        change = mutated_tensors if name.endswith("tensors") else (
            lambda rng, data: mutated_json(rng, json.loads(data)))  # fmt: skip
        (place / name).write_bytes(change(rng, whole[name]))
        if rng.random() < 0.6 and name != "manifest.json":  # as if it had been written so
            manifest = {n: _digest(place / n) for n in names[:3]}
            (place / "manifest.json").write_text(json.dumps(manifest))

        def call():
            recover(directory / "c")
            found = find_checkpoint(directory / "c")
            read_state(found)
            load_checkpoint(found, parameters, optimizer)

        return call, [place / name]

    return make


# -- the campaign ----------------------------------------------------------------------------------


def campaign(kind, seed, count, directory):
    """Run inputs of a kind, print what came of them as JSON; keep those that failed."""
    from loopos.errors import InputError, LooposError

    scratch = directory / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    make = globals()[kind](scratch)
    limit_memory()
    came = {"works": 0, "refused": 0}
    faults = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        try:
            call, files = make(rng, number)
        except (UnicodeEncodeError, ValueError):  # a lone surrogate, a number too long: no file
            continue
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        (directory / "now").write_text(f"{kind} {seed} {number}")
        try:
            call()
            came["works"] += 1
        except InputError as error:
            came["refused"] += 1
            text = str(error)
            if (
                not text.strip()
                or "Traceback" in text
                or ("\n" in text and kind != "configurations")
            ):
                faults.append(f"{number}: not one sentence: {text[:300]!r}")
        except LooposError as error:
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
        except BaseException as error:  # anything, panics of other languages too
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = next((f"{f.filename}:{f.lineno}" for f in
                          reversed(traceback.extract_tb(error.__traceback__))
                          if "loopos" in f.filename), last.filename)  # fmt: skip
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:200]} ({where})")
            for path in files:
                if path.is_file():
                    (directory / f"{number}-{path.name}").write_bytes(path.read_bytes())
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(json.dumps(came | {"faults": faults}))


def limit_memory():
    try:
        import resource
    except ImportError:
        return
    from loopos.backends.memory import _status

    held = _status("VmData", "/proc/self/status")
    if held is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))


def main():
    warnings.simplefilter("error")
    kind, seed, count, directory = sys.argv[1:]
    campaign(kind, int(seed), int(count), Path(directory))


if __name__ == "__main__":
    main()
else:
    import pytest

    @pytest.mark.parametrize("kind", COUNTS)
    def test_every_mutated_input_works_or_is_refused_in_one_sentence(kind, tmp_path):
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "RAYON")}
        command = [sys.executable, __file__, kind, "0", str(COUNTS[kind]), str(tmp_path)]
        done = subprocess.run(
            command, env=os.environ | single | {"PYTHONSAFEPATH": "1"}, capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        at = tmp_path / "now"
        now = at.read_text() if at.exists() else "the start"
        assert done.returncode == 0, f"at {now}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
        came = json.loads(done.stdout.splitlines()[-1])
        assert came["faults"] == []
        assert came["works"] > 0
        assert came["refused"] > 0.2 * COUNTS[kind]
        assert "panicked" not in done.stderr
