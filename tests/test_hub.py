"""Names on the Hugging Face Hub, against a real cache of the library in a temporary directory."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from loopos import TransformerConfig, load_model, load_tokenizer
from loopos.data.tokenizer import train_bpe
from loopos.errors import MissingFileError
from loopos.hub import local_path
from loopos.models import Transformer, load_config

hub = pytest.importorskip("huggingface_hub")
COMMITS = {"main": "a" * 40, "small": "b" * 40}
NAME = "acme/tiny"
CONFIG = TransformerConfig(
    d_model=8, num_heads=2, num_layers=1, d_ff=16, vocab_size=300, family="gpt2"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Switch the network off and put the cache where the test is."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def fill(cache, name=NAME, revision="main", seed=0, tokenizer=True):
    """Lay out what the library leaves after fetching a model; return its weights' model."""
    model = Transformer(CONFIG, seed=seed)
    model.save(cache / "files", train_bpe(["the cat"], 270) if tokenizer else None)
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMITS[revision]
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMITS[revision])
    for index, file in enumerate(sorted((cache / "files").iterdir())):
        blob = repository / "blobs" / f"{revision}{index}"
        os.replace(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return model


def same(model, other):
    for name, parameter in model.parameters().items():
        assert np.array_equal(parameter.data, other.parameters()[name].data)


def refused(name, *words, read=load_model):
    with pytest.raises(MissingFileError) as caught:
        read(name)
    text = str(caught.value)
    assert text.startswith(f"{name}: no such directory")
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_a_model_and_its_tokenizer_come_by_name(cache):
    model = fill(cache)
    same(model, load_model(NAME))
    assert load_config(NAME) == CONFIG
    assert load_tokenizer(NAME).encode("the cat") == train_bpe(["the cat"], 270).encode("the cat")


def test_a_revision_is_asked_for_after_an_at_sign(cache):
    first, second = fill(cache), fill(cache, revision="small", seed=1)
    same(first, load_model(f"{NAME}@main"))
    same(second, load_model(f"{NAME}@small"))
    same(second, load_model(f"{NAME}@{COMMITS['small']}"))


def test_what_is_not_in_the_cache_is_one_sentence(cache):
    fill(cache)
    cannot = "the Hugging Face Hub cannot be reached and it is not in the cache"
    refused("acme/other", cannot)
    refused(f"{NAME}@v2", cannot)
    refused("acme/other", cannot, read=load_tokenizer)
    refused("acme/other", cannot, read=load_config)


def test_a_mistyped_directory_is_still_named(tmp_path):
    (tmp_path / "outputs" / "fine_tuned").mkdir(parents=True)
    refused("outputs/fine_tund", "did you mean 'fine_tuned', and the Hugging Face Hub")


def test_a_directory_goes_before_a_name_on_the_hub(cache, tmp_path):
    fill(cache)
    Transformer(CONFIG, seed=5).save(tmp_path / NAME)
    same(Transformer(CONFIG, seed=5), load_model(NAME))


def test_what_is_no_name_on_the_hub_is_never_asked_for(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    for name in (Path(NAME), "tiny", "a/b/c", "/acme/tiny", "./acme", "acme/", "acme/m.gguf",
                 "acme/tokenizer.json", "../acme", "acme/ti ny"):  # fmt: skip
        assert local_path(name, ["*"]) == Path(name)
        with pytest.raises(MissingFileError, match="no such"):
            load_model(name)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(NAME, "pip install 'loopos[hub]'")
    refused(NAME, "pip install 'loopos[hub]'", read=load_tokenizer)


def test_only_the_files_that_are_read_are_fetched_and_nothing_is_printed(monkeypatch, capfd):
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def download(repository, *, revision, allow_patterns, tqdm_class):
        files = ["config.json", "pytorch_model.bin", "model.safetensors", "tokenizer.json",
                 "model.safetensors.index.json", "model-00001-of-00002.safetensors", "merges.txt",
                 "tokenizer_config.json", "vocab.json", "vocab.txt", "chat_template.jinja",
                 "generation_config.json",
                 "onnx/model.onnx", "consolidated.safetensors", "training_args.bin", "tf_model.h5",
                 "onnx/config.json", "model.gguf", "pytorch_model-00001-of-00002.bin"]  # fmt: skip
        asked.append(sorted(filter_repo_objects(files, allow_patterns=allow_patterns)))
        for _ in tqdm_class(range(3), desc="fetching", name="x"):
            pass
        raise OSError("no room\non the disk {0}")

    monkeypatch.setattr(hub, "snapshot_download", download)
    refused(NAME, "it cannot be fetched (OSError: no room on the disk {0})")
    refused(NAME, read=load_tokenizer)
    refused(NAME, read=load_config)
    assert asked == [
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors",
         "model.safetensors.index.json"],
        ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
         "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"],
        ["config.json"],
    ]  # fmt: skip
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("RepositoryNotFoundError", "the Hugging Face Hub has no such model, or it is private"),
        ("GatedRepoError", "access to it on the Hugging Face Hub has to be asked for"),
        ("RevisionNotFoundError", "the Hugging Face Hub has no revision 'v9' of it"),
    ],
)
def test_what_the_hub_answers_is_told_in_its_kind(monkeypatch, kind, words):
    error = getattr(hub.errors, kind)

    def download(*args, **options):
        raise error.__new__(error)

    monkeypatch.setattr(hub, "snapshot_download", download)
    refused(f"{NAME}@v9", words)
