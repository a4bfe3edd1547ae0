"""RLHF from a configuration: both phases in one run or alone, killed and resumed, and refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loopos.autograd import no_grad
from loopos.config import load_config
from loopos.data.preferences import read_preferences
from loopos.data.tokenizer import load_tokenizer, train_bpe
from loopos.errors import CheckpointError, ConfigError, DataError, InputError, MissingFileError
from loopos.methods.common import with_overrides
from loopos.methods.ppo import PRESETS
from loopos.methods.reward_model import Options as RewardOptions
from loopos.methods.reward_model import RewardTrainer
from loopos.methods.rlhf import RLHF, Options
from loopos.models.lora import LoraConfig
from loopos.models.reward import RewardModel, load_reward_model
from loopos.models.transformer import Transformer, TransformerConfig
from loopos.models.weights import load_model
from loopos.rehearsal import rehearse
from loopos.runner import plan, prepare, run
from loopos.training.loop import Interrupted
from loopos.training.options import TrainingOptions
from loopos.training.trackers import Callback

SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 300}
CONFIG = {
    "model": SIZES | {"max_seq_len": 48, "dropout": 0.1},
    "computation": {"method": "rlhf", "num_threads": 1},
    "training": {"learning_rate": 0.003, "batch_size": 8, "num_epochs": 1, "max_new_tokens": 6,
                 "save_steps": 2, "eval_steps": 3, "sample_steps": 2,
                 "reward_model": {"learning_rate": 0.003, "num_epochs": 1, "batch_size": 8,
                                  "save_steps": 2}},
    "data": {"preference_data": "p.jsonl", "output_dir": "out", "validation_fraction": 0.2},
}  # fmt: skip
TIMED = ("time_s", "tokens_per_s", "time/rollout_s", "time/reward_s", "time/update_s")


def pairs(count=40, seed=0):
    """Return rows of which the chosen response is polite; each prompt stands in two of them."""
    rng = np.random.default_rng(seed)

    def said(words):
        return " " + " ".join(rng.choice(words, rng.integers(2, 5)))

    return [
        {"prompt": f"The {('red', 'old')[i % 4 > 1]} hen {i // 2} says",
         "chosen": said(["yes", "good", "fine"]), "rejected": said(["no", "bad", "dull"])}
        for i in range(count)
    ]  # fmt: skip


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_project(directory, **training):
    directory.mkdir(exist_ok=True)
    write_rows(directory / "p.jsonl", pairs())
    config = CONFIG | {"training": CONFIG["training"] | training}
    (directory / "run.json").write_text(json.dumps(config, indent=1))


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Stand in a directory with ``run.json`` and preferences; load it with overrides."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)

    def configure(*overrides, **sections):
        config = json.loads(Path("run.json").read_text()) | sections
        Path("run.json").write_text(json.dumps(config, indent=1))
        return load_config("run.json", overrides)

    return configure


def refused(action, *arguments, kind=InputError):
    with pytest.raises(kind) as caught:
        action(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def outcome(directory):
    """Return what must be the same of two runs: bytes, and records without times."""
    names = ("model/model.safetensors", "reward_model/model/model.safetensors",
             "reward_model/model/reward_model.json", "samples.jsonl", "start.json",
             "evaluation.json")  # fmt: skip
    found = {name: (directory / name).read_bytes() for name in names}
    for name in ("metrics.jsonl", "reward_model/metrics.jsonl"):
        found[name] = [{k: v for k, v in record.items() if k not in TIMED}
                       for record in lines(directory / name)]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the directory of a project with a finished run in ``out``."""
    directory = tmp_path_factory.mktemp("trained")
    write_project(directory)
    here = Path.cwd()
    os.chdir(directory)
    try:
        run(load_config("run.json"))
    finally:
        os.chdir(here)
    return directory


# -- a run ---------------------------------------------------------------------------------------


def test_a_run_leaves_both_models_samples_and_what_it_came_to(trained):
    out = trained / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "data_report.json", "evaluation.json", "metrics.jsonl",
        "model", "reward_model", "samples.jsonl", "start.json", "tokenizer",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "reward_model").iterdir()) == [
        "checkpoints", "metrics.jsonl", "model",
    ]  # fmt: skip
    found = json.loads((out / "evaluation.json").read_text())
    assert found["score_gain"] == pytest.approx(
        (found["score"] - found["score_before"]) / found["score_std_before"]
    )
    start = json.loads((out / "start.json").read_text())
    assert start["kl/mean"] == 0
    assert found["score_before"] == start["reward/score"]
    assert found["kl"] != 0
    assert found["reward_accuracy"] == found["reward_model"]["accuracy"]
    assert found["prompts"] == 4
    steps = [record for record in lines(out / "metrics.jsonl") if "eval" not in record]
    assert [record["step"] for record in steps] == [1, 2]
    report = json.loads((out / "data_report.json").read_text())
    assert (report["prompts"], report["held_out_prompts"]) == (16, 4)


def test_samples_stand_beside_the_metrics(trained):
    rows = lines(trained / "out/samples.jsonl")
    assert [row["step"] for row in rows] == [2] * 8
    for row in rows:
        assert list(row) == ["step", "prompt", "response", "score", "tokens", "ended"]
        assert row["prompt"].startswith("The ")
        assert 1 <= row["tokens"] <= 6
    steps = [r for r in lines(trained / "out/metrics.jsonl") if r["step"] == 2 and "loss" in r]
    assert np.mean([row["score"] for row in rows]) == pytest.approx(steps[0]["reward/score"])


def test_the_evaluation_is_that_of_the_saved_models(trained):
    """The figures of the run are found again with what it saved, and nothing else."""
    out = trained / "out"
    config = load_config(out / "config.json")
    rows = read_preferences(trained / "p.jsonl")
    judge = load_reward_model(out / "reward_model/model")
    tokenizer = load_tokenizer(out / "model")
    again = RLHF(load_model(out / "model"), tokenizer, reward_model=judge)
    found = json.loads((out / "evaluation.json").read_text())
    held_out = [i for i, text in enumerate(rows.texts) if text in told(out, rows, config)]
    figures = again.evaluate(rows.take(held_out), config.training)
    assert figures["score"] == pytest.approx(found["score"], abs=1e-6)
    assert figures["reward_accuracy"] == found["reward_accuracy"]
    assert "score_before" not in figures


def told(out, rows, config):
    """Return the prompts that the run held out: those that it was never shown."""
    from loopos.data.readers import split

    return set(split(rows, config.data.validation_fraction, 0)[1].texts)


def test_the_reward_model_is_that_of_its_own_method(trained, tmp_path):
    """Trained alone from the same start with the same options, it has the same bytes."""
    out = trained / "out"
    rows = read_preferences(trained / "p.jsonl")
    from loopos.data.readers import split

    training, validation = split(rows, 0.2, 0)
    config = load_config(out / "config.json")
    body = Transformer(TransformerConfig(**config.model), seed=0)
    alone = RewardTrainer(body, load_tokenizer(out / "tokenizer"))
    alone.fit(training, validation, config.training.of_reward_model)
    alone.save(tmp_path / "alone")
    name = "model.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (
        out / "reward_model/model" / name
    ).read_bytes()


def test_each_prompt_is_learnt_from_once_and_none_is_held_out_too(configure):
    rows = pairs(8)
    write_rows("p.jsonl", rows)
    write_rows("v.jsonl", [rows[0], *pairs(12, seed=5)[8:]])
    prepared = prepare(configure("data.validation_data=v.jsonl"))
    prompts, held_out = prepared.trainer._prompts(
        prepared.training, prepared.validation, Options(max_new_tokens=6)
    )
    decoded = [prepared.trainer.tokenizer.decode(ids.tolist()) for ids in prompts]
    assert decoded == list(dict.fromkeys(row["prompt"] for row in rows))
    assert len(held_out) == len({row["prompt"] for row in pairs(12, seed=5)[8:]})
    assert (prepared.report.prompts, prepared.report.held_out_prompts) == (
        len(prompts), len(held_out),
    )  # fmt: skip
    assert f"{'prompts':<15}{len(prompts)} training, {len(held_out)} held out" in (
        prepared.report.lines()
    )
    few = prepare(configure("data.validation_data=v.jsonl", "training.eval_prompts=1"))
    assert few.report.held_out_prompts == 1


# -- one phase -----------------------------------------------------------------------------------


def test_the_phases_alone_come_to_what_they_come_to_together(trained, configure, tmp_path):
    first = configure('training.phases=["reward_model"]', "data.output_dir=first")
    run(first)
    name = "model.safetensors"
    judge = (tmp_path / "first/model" / name).read_bytes()
    assert judge == (trained / "out/reward_model/model" / name).read_bytes()
    figures = json.loads(Path("first/evaluation.json").read_text())
    assert 0 <= figures["accuracy"] <= 1
    assert not Path("first/samples.jsonl").exists()

    start = Transformer(TransformerConfig(**CONFIG["model"]), seed=0)
    start.save("start", load_tokenizer("first/tokenizer"))
    second = configure(
        'training.phases=["ppo"]', "data.reward_model=first/model", "data.output_dir=second",
        "data.pretrained_weights=start",
    )  # fmt: skip
    run(second)
    assert not Path("second/reward_model").exists()
    assert Path("second/model", name).read_bytes() == (trained / "out/model" / name).read_bytes()
    figures, together = (json.loads((path / "evaluation.json").read_text())
                         for path in (Path("second"), trained / "out"))  # fmt: skip
    assert figures == together


def test_lora_of_both(configure):
    run(configure("data.output_dir=first", 'training.phases=["reward_model"]'))
    start = Transformer(TransformerConfig(**CONFIG["model"]), seed=0)
    start.save("start", load_tokenizer("first/tokenizer"))
    base = Path("start/model.safetensors").read_bytes()
    given = ("data.pretrained_weights=start", 'training.lora={"rank": 2}',
             'training.reward_model.lora={"rank": 2}')  # fmt: skip
    summary = run(configure(*given))
    assert Path("start/model.safetensors").read_bytes() == base
    assert Path("out/model/adapter_model.safetensors").is_file()
    assert Path("out/reward_model/model/model.safetensors").is_file()  # merged
    assert summary.evaluation["kl"] != 0
    assert load_model("out/model").adapters


def test_adapters_name_the_base_that_they_were_trained_on(configure):
    """The supervised phase changes the whole policy, and adapters are saved without it."""
    run(configure("data.output_dir=first", 'training.phases=["reward_model"]'))
    start = Transformer(TransformerConfig(**CONFIG["model"]), seed=0)
    start.save("start", load_tokenizer("first/tokenizer"))
    given = configure(
        "data.pretrained_weights=start", 'training.lora={"rank": 2}',
        'training.supervised={"learning_rate": 0.01, "num_epochs": 4}',
        'training.phases=["supervised", "reward_model", "ppo"]', "training.max_new_tokens=4",
    )  # fmt: skip
    prepared = prepare(given)
    summary = run(given)
    found = load_model("out/model")
    learnt = load_model("out/supervised/model").parameters()
    for name, parameter in found.parameters().items():
        if name in learnt:
            np.testing.assert_array_equal(parameter.data, learnt[name].data)
    assert found.adapters
    tokenizer = load_tokenizer("out/tokenizer")
    options = given.training
    judge = load_reward_model("out/reward_model/model")
    again = RLHF(found, tokenizer, reward_model=judge, seed=given.computation.seed)
    figures = again.evaluate(prepared.validation, options)
    # Prompts that the run had learnt from are not known here, so those that are left may differ.
    assert figures["prompts"] == summary.evaluation["prompts"]
    assert figures["score"] == pytest.approx(summary.evaluation["score"], abs=1e-5)
    alone = RLHF(load_model("start"), tokenizer, seed=0)
    options = Options(
        phases=("supervised", "reward_model", "ppo"), lora=LoraConfig(rank=2), max_steps=1,
        max_new_tokens=3, batch_size=2, supervised=TrainingOptions(max_steps=1),
    )  # fmt: skip
    alone.fit(prepared.training, None, options)
    with pytest.raises(ConfigError, match="adapters are saved without their base"):
        alone.save("lost")


def test_a_reward_model_that_is_given_is_not_trained(trained):
    tokenizer = load_tokenizer(trained / "out" / "tokenizer")
    judge = load_reward_model(trained / "out" / "reward_model" / "model")
    before = {name: p.data.copy() for name, p in judge.parameters().items()}
    policy = load_model(trained / "out" / "model")
    made = RLHF(policy, tokenizer, reward_model=judge)
    made.fit(read_preferences(pairs(8)), None, max_steps=1, batch_size=2, max_new_tokens=3)
    assert made.reward_model is judge
    with pytest.raises(ConfigError, match="training.phases: a reward model was given, so there is"):
        made.fit(read_preferences(pairs(8)), phases=("supervised", "reward_model"))
    assert list(made.stage_fits(read_preferences(pairs(8)), None, Options(), ())) == ["ppo"]
    for name, parameter in judge.parameters().items():
        np.testing.assert_array_equal(parameter.data, before[name])


# -- killed and resumed --------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from loopos.config import load_config
from loopos.runner import run
from loopos.training.trackers import Callback

class Kill(Callback):
    def __init__(self, stage, step):
        self.stage, self.step, self.now = stage, int(step), ""

    def die(self, step):
        if self.now == self.stage and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_start(self, info):
        inner = info.output_dir.name
        self.now = inner if inner in ("supervised", "reward_model") else "ppo"
        self.die(0)

    def on_step(self, record):
        self.die(record["step"])

    def on_end(self):
        self.die(-1)

config = load_config("run.json", sys.argv[3:])
run(config, resume=(config.output_dir / "config.json").exists(), callbacks=[Kill(*sys.argv[1:3])])
"""
#: Where a run is killed, in which stage and after which step: 0 is its start, -1 its end.
KILLS = [("reward_model", 0), ("reward_model", 3), ("reward_model", -1), ("ppo", 0), ("ppo", 3),
         ("ppo", -1)]  # fmt: skip
MORE = ("training.num_epochs=2", "training.adaptive_kl_target=0.5",
        'training.reward_normalisation="running"')  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return what came of a longer run that nobody killed."""
    directory = tmp_path_factory.mktemp("whole")
    write_project(directory)
    here = Path.cwd()
    os.chdir(directory)
    try:
        run(load_config("run.json", MORE))
    finally:
        os.chdir(here)
    return outcome(directory / "out")


def killed(directory, stage, step, *more):
    command = [sys.executable, "-c", KILLED, stage, str(step), *(more or MORE)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(("stage", "step"), KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(uninterrupted, configure, tmp_path, stage, step):
    done = killed(tmp_path, stage, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run(configure(*MORE), resume=True)
    found = outcome(tmp_path / "out")
    assert found.keys() == uninterrupted.keys()
    for name in found:
        assert found[name] == uninterrupted[name], name


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_again_and_again(uninterrupted, configure, tmp_path):
    for stage, step in KILLS[1:]:
        done = killed(tmp_path, stage, step)
        assert done.returncode == -signal.SIGKILL, done.stderr
    run(configure(*MORE), resume=True)
    assert outcome(tmp_path / "out") == uninterrupted


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_policy_that_learns_to_talk_first(configure, tmp_path):
    """The same bytes however often it is killed; PPO begins with what was learnt."""
    given = ('training.phases=["supervised", "reward_model", "ppo"]',
             'training.supervised={"learning_rate": 0.01, "num_epochs": 4, "save_steps": 2}',
             )  # fmt: skip
    whole = run(configure(*given, "data.output_dir=whole"))
    for stage, step in (("supervised", 3), ("supervised", -1), ("reward_model", 3), ("ppo", 1)):
        done = killed(tmp_path, stage, step, *given)
        assert done.returncode == -signal.SIGKILL, done.stderr
    run(configure(*given), resume=True)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    name = "supervised/model/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    records = lines("whole/supervised/metrics.jsonl")
    losses = [record["eval"]["loss"] for record in records if "eval" in record]
    assert losses[-1] < losses[0]
    assert whole.evaluation["kl"] > -1
    assert json.loads(Path("whole/start.json").read_text())["kl/mean"] == 0
    found = plan(configure(*given), prepare(configure(*given)))
    assert {n: s.total_steps for n, s in found.stages.items()} == {
        "supervised": 8, "reward_model": 4, "ppo": 2,
    }  # fmt: skip
    estimate = rehearse(configure(*given), given)
    assert list(estimate.stages_s) == ["supervised", "reward_model", "ppo"]


class StopAfter(Callback):
    """Asks to stop after a step of a stage."""

    def __init__(self, stage, step):
        self.wanted, self.now, self.seen = (stage, step), "", 0

    def on_start(self, info):
        self.now = "reward_model" if info.output_dir.name == "reward_model" else "ppo"

    def on_step(self, record):
        self.seen = record["step"]

    def __call__(self):
        return (self.now, self.seen) == self.wanted


@pytest.mark.parametrize("stage", ["reward_model", "ppo"])
def test_an_interrupted_run_says_where_it_goes_on(uninterrupted, configure, stage):
    stop = StopAfter(stage, 1)
    with pytest.raises(Interrupted) as caught:
        run(configure(*MORE), callbacks=[stop], stop=stop)
    place = "out/reward_model" if stage == "reward_model" else "out"
    assert str(caught.value.checkpoint) == f"{place}/checkpoints/step-00000001"
    message = refused(run, configure(*MORE))
    assert message == (
        "out: already holds a run; continue it with --resume, or choose another directory "
        "(--output-dir)"
    )
    assert run(configure(*MORE), resume=True).result.stopped_reason == "finished"
    assert outcome(Path("out")) == uninterrupted


def test_what_may_not_change_in_a_continuation(trained, configure, tmp_path):
    import shutil

    shutil.copytree(trained / "out", "out")
    for change, key in (
        ("training.kl_coefficient=0.2", "training.kl_coefficient"),
        ("training.reward_model.learning_rate=0.1", "training.reward_model"),
        ("model.dropout=0.2", "model.dropout"),
    ):
        with pytest.raises(CheckpointError, match=key):
            _resume(configure(change))


def _resume(config):
    return run(config, resume=True)


def test_another_reward_model_is_refused_in_a_continuation(configure):
    tokenizer = train_bpe([" ".join(row.values()) for row in pairs()], 290)
    body = TransformerConfig(**CONFIG["model"])
    Transformer(body, seed=3).save("start", tokenizer)
    RewardModel(Transformer(body, seed=1), 1).save("judge", tokenizer)
    given = ('training.phases=["ppo"]', "data.reward_model=judge", "data.pretrained_weights=start")
    stop = StopAfter("ppo", 1)
    with pytest.raises(Interrupted):
        run(configure(*given), callbacks=[stop], stop=stop)
    RewardModel(Transformer(body, seed=2), 1).save("judge", tokenizer)
    with pytest.raises(CheckpointError, match="data.reward_model: is not the reward model of"):
        run(configure(*given), resume=True)
    RewardModel(Transformer(body, seed=1), 1).save("judge", tokenizer)
    assert run(configure(*given), resume=True).result.steps == 2


# -- options -------------------------------------------------------------------------------------


def test_a_preset_yields_to_what_is_given(configure):
    options = configure('training.preset="tldr-2024"').training
    given = {"learning_rate": 0.003, "batch_size": 8, "max_new_tokens": 6}
    for name, value in (PRESETS["tldr-2024"] | given).items():
        assert getattr(options, name) == value, name
    for name in PRESETS:
        made = Options(preset=name)
        assert {key: getattr(made, key) for key in PRESETS[name]} == PRESETS[name]
        chosen = with_overrides(Options(batch_size=3), {"preset": name, "clip_epsilon": 0.3})
        assert chosen == Options(preset=name, batch_size=3, clip_epsilon=0.3)
        other = with_overrides(chosen, {"preset": "trl"})
        assert other == Options(preset="trl", batch_size=3, clip_epsilon=0.3)
    # A value that is the default without a preset is a value that was given.
    assert Options(preset="openai-2019", kl_coefficient=0.1).kl_coefficient == 0.1
    assert dataclasses.replace(made, kl_coefficient=0.2).temperature == made.temperature
    again = Options(**made.as_dict())
    assert again == made
    assert hash(again) == hash(made)


def test_options_of_each_phase():
    made = Options(reward_model={"num_epochs": 3}, phases=["reward_model", "ppo"])
    assert made.of_reward_model == RewardOptions(num_epochs=3)
    assert list(made.stages()) == ["reward_model", "ppo"]
    assert made.with_stage("reward_model", num_epochs=1).of_reward_model.num_epochs == 1
    assert made.with_stage("ppo", num_epochs=7).num_epochs == 7
    assert list(Options(phases=("ppo",)).stages()) == ["ppo"]
    more = Options(phases=("supervised", "ppo"), supervised={"num_epochs": 2})
    assert list(more.stages()) == ["supervised", "ppo"]
    assert more.with_stage("supervised", max_steps=3).of_supervised.max_steps == 3
    assert more.of_supervised == TrainingOptions(num_epochs=2)
    with pytest.raises(TypeError, match="unexpected option 'rate'"):
        Options(rate=1)


CHANGES = {
    "reward_model": {"learning_rate": 0.001}, "preset": "trl", "kl_coefficient": 0.5,
    "clip_epsilon": 0.01, "critic": "shared", "max_new_tokens": 4, "missing_eos_penalty": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_the_result(trained, configure, option):
    run(configure(f"training.{option}={json.dumps(CHANGES[option])}"))
    name = "model/model.safetensors"
    assert (Path("out") / name).read_bytes() != (trained / "out" / name).read_bytes()


# -- what it will take ---------------------------------------------------------------------------


def test_a_plan_has_both_stages(configure):
    config = configure("training.num_epochs=3", "training.reward_model.num_epochs=2")
    found = plan(config, prepare(config))
    stages = {n: (s.steps_per_epoch, s.total_steps) for n, s in found.stages.items()}
    assert stages == {"reward_model": (4, 8), "ppo": (2, 6)}
    assert (found.steps_per_epoch, found.total_steps) == (6, 14)
    # Policy and critic, with a head each: of the critic's own language-model head nothing.
    assert found.trained_parameters == found.stages["ppo"].trained_parameters
    assert found.stages["ppo"].trained_parameters > 1.5 * (
        found.stages["reward_model"].trained_parameters
    )
    assert not Path("out").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak")
def test_the_estimate_is_of_four_networks(configure, tmp_path):
    wide = [f"model.{name}={size}" for name, size in
            {"d_model": 256, "num_heads": 4, "num_layers": 6, "d_ff": 1024}.items()]  # fmt: skip
    given = [*wide, "data.output_dir=out"]
    config = load_config("run.json", given)
    estimate = rehearse(config, given)
    assert list(estimate.stages_s) == ["reward_model", "ppo"]
    assert all(spent > 0 for spent in estimate.stages_s.values())
    assert sum(estimate.stages_s.values()) < estimate.total_s
    code = ("import sys; from loopos.backends.memory import peak_bytes\n"
            "from loopos.config import load_config\nfrom loopos.runner import run\n"
            "run(load_config(sys.argv[1], sys.argv[2:])); print(peak_bytes())")  # fmt: skip
    command = [sys.executable, "-c", code, "run.json", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert estimate.peak_bytes == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.15)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['training.phases=["ppo"]'], "data.reward_model: is needed where training.phases trains"),
        (["data.reward_model=x"], "data.reward_model: training.phases trains one; leave this out"),
        (["training.phases=[]"], "training.phases: expected 'supervised', 'reward_model' and"),
        (['training.phases=["ppo", "reward_model"]'],
         "training.phases: expected 'supervised', 'reward_model' and 'ppo' in this order, one of"),
        (['training.phases=["supervised"]'],
         "training.phases: expected 'supervised', 'reward_model' and 'ppo' in this order, one of"),
        (['training.phases=["sft"]'],
         "training.phases: expected a list of one of 'supervised', 'reward_model', 'ppo', found"),
        (['training.supervised.lora={"rank": 2}', "data.pretrained_weights=x"],
         "training.supervised.lora: this phase trains the whole policy"),
        (["training.supervised.max_length=9"], "training.supervised.max_length: unknown key"),
        (['training.preset="tldr"'], "found \"tldr\"; did you mean 'tldr-2024'?"),
        (["training.clip_epsilom=0.2"], "unknown key; did you mean 'clip_epsilon'?"),
        (["training.reward_model.centring_coefficient=1"],
         "training.reward_model.centring_coefficient: unknown key; did you mean "),
        (["training.reward_model.batch_size=0"],
         "training.reward_model.batch_size: expected at least 1, found 0"),
        (["training.reward_model=3"], "training.reward_model: expected a section of keys, found 3"),
        (["training.kl_coefficient=-1"], "training.kl_coefficient: expected a number that is not"),
        (["training.batch_tokens=100"], "training.batch_tokens: of no use to a method that"),
        (["training.eval_prompts=0"], "training.eval_prompts: expected at least 1, found 0"),
        (["data.preference_data=null"], "data.preference_data: is needed"),
        (["data.training_data=x"], "data.training_data: the method 'rlhf' reads data.preference_"),
        (["model.num_classes=2"], "model.num_classes: a language model has no classes"),
        (["data.validation_fraction=0", "training.eval_steps=null",
          "training.reward_model.eval_steps=2"],
         "training.reward_model.eval_steps: there is no validation"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused_in_one_sentence(configure, overrides, message):
    assert message in refused(configure, *overrides, kind=ConfigError)


def test_a_stop_token_outside_the_vocabulary_is_refused_before_the_first_phase(configure):
    config = configure("training.stop_ids=[0, 9999]")
    message = refused(run, config, kind=ConfigError)
    assert "training.stop_ids: 9999 is outside the vocabulary of" in message
    assert not (Path(config.output_dir) / "reward_model" / "metrics.jsonl").exists()


def test_other_methods_have_no_reward_model(configure):
    with pytest.raises(ConfigError) as caught:
        configure('computation.method="dpo"', "data.reward_model=x", training={})
    message = str(caught.value)
    assert "--set data.reward_model: only the method 'rlhf' reads it" in message


def long_prompts(rows):
    return [row | {"prompt": "hen " * 60} for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "p.jsonl: there is no row in it"),
        ([{"prompt": "a"}], "p.jsonl:1: no field 'chosen'"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}],
         "p.jsonl: no row has a prompt and two different responses"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 1}],
         "p.jsonl: no row has a prompt and two different responses"),
        (long_prompts(pairs(8)), "every row is longer than 48 tokens"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_in_one_sentence(configure, rows, message):
    write_rows("p.jsonl", rows)
    config = configure("data.validation_fraction=0", "training.eval_steps=null")
    assert message in refused(prepare, config, kind=DataError)


def test_a_prompt_that_is_too_long_is_left_out_or_refused(configure):
    rows = pairs()
    write_rows("p.jsonl", [*long_prompts(rows[:1]), *rows[1:]])
    fraction = ("data.validation_fraction=0", "training.eval_steps=null")
    prepared = prepare(configure(*fraction))
    assert prepared.report.too_long.count == 1
    assert prepared.report.prompts == 20
    message = refused(prepare, configure(*fraction, 'training.reward_model.overflow="error"'))
    assert message.startswith("p.jsonl:1: prompt and response have ")
    message = refused(prepare, configure(*fraction, "training.reward_model.max_length=99"))
    assert "training.reward_model.max_length: 99 is more than the model's max_seq_len 48" in message


def test_a_set_without_a_new_prompt_is_refused(configure):
    config = configure("data.validation_data=p.jsonl")
    assert refused(prepare, config, kind=DataError) == (
        "p.jsonl:1: every prompt of the validation data is a training prompt, so none is held out"
    )


@pytest.fixture
def models(configure):
    """Save a policy, and reward models that do not go with it."""
    tokenizer = train_bpe([" ".join(row.values()) for row in pairs()], 290)
    other = train_bpe(["quite another text"] * 3, 290)
    sizes = CONFIG["model"]

    def body(**changed):
        return Transformer(TransformerConfig(**sizes | changed), seed=1)

    body().save("policy", tokenizer)
    body(lm_head=False, tied=False).save("headless", tokenizer)
    body(causal=False).save("bidirectional", tokenizer)
    RewardModel(body()).save("judge", tokenizer)
    RewardModel(body()).save("foreign", other)
    RewardModel(body(vocab_size=310)).save("wider", tokenizer)
    RewardModel(body(max_seq_len=16)).save("shorter", tokenizer)
    return configure


@pytest.mark.parametrize(
    ("policy", "judge", "kind", "message"),
    [
        ("policy", "wider", ConfigError,
         "data.reward_model: has a vocab_size of 310, the policy has 300"),
        ("policy", "foreign", ConfigError,
         "data.reward_model: the tokenizer in foreign is another than the policy's"),
        ("policy", "policy", InputError, "tensor 'score.weight' is missing, so no reward model"),
        ("policy", "jugde", MissingFileError, "jugde: no such file or directory; did you mean"),
        ("policy", "shorter", ConfigError, "data.reward_model: reads 16 tokens, but prompt and"),
        ("headless", "judge", ConfigError, "RLHF needs a causal model with a language-model head"),
        ("bidirectional", "judge", ConfigError, "RLHF needs a causal model with"),
    ],
)  # fmt: skip
def test_models_that_do_not_go_together(models, policy, judge, kind, message):
    config = models(
        'training.phases=["ppo"]', f"data.reward_model={judge}",
        f"data.pretrained_weights={policy}", "training.max_new_tokens=24",
        model={},
    )  # fmt: skip
    assert message in refused(prepare, config, kind=kind)


def test_the_directory_of_a_run_is_not_that_of_its_model(trained, configure):
    place = trained / "out"
    config = configure('training.phases=["ppo"]', f"data.reward_model={place}")
    assert f"{place} is a run directory; its model is {place / 'reward_model/model'}" in refused(
        prepare, config
    )


def test_conversations_end_with_a_turn_of_the_template(configure):
    """Responses end with the template's own token, which the reward model was shown too."""
    tokenizer = train_bpe([" ".join(row.values()) for row in pairs()] + ["user assistant"], 290)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    Transformer(TransformerConfig(**CONFIG["model"] | {"max_seq_len": 96}), seed=1).save(
        "policy", tokenizer
    )
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}],
         "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
         "rejected": [{"role": "assistant", "content": row["rejected"].strip()}]}
        for row in pairs()
    ]  # fmt: skip
    write_rows("p.jsonl", rows)
    prepared = prepare(configure("data.pretrained_weights=policy", model={}))
    prompts, _ = prepared.trainer._prompts(prepared.training, None, Options(max_new_tokens=6))
    text = prepared.trainer.tokenizer.decode(prompts[0].tolist())
    assert text.startswith("<user>The ")
    assert text.endswith("<assistant>")
    summary = run(configure("data.pretrained_weights=policy", model={}))
    assert summary.result.steps == 2


def test_without_an_output_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = pairs()
    tokenizer = train_bpe([" ".join(row.values()) for row in rows], 290)
    others = [row | {"prompt": row["prompt"].replace("hen", "fox")} for row in pairs(12)]
    policy = Transformer(TransformerConfig(**SIZES, max_seq_len=48), seed=1)
    before = {name: p.data.copy() for name, p in policy.parameters().items()}
    trainer = RLHF(policy, tokenizer)
    seen = []

    class Seen(Callback):
        def on_samples(self, step, samples):
            seen.append((step, len(samples)))

    result = trainer.fit(
        read_preferences(rows), read_preferences(others), max_new_tokens=5, batch_size=5,
        learning_rate=0.003, sample_steps=1, callbacks=[Seen()], max_steps=3,
        reward_model=RewardOptions(max_steps=2),
    )  # fmt: skip
    assert (result.steps, seen) == (3, [(1, 5), (2, 5), (3, 5)])
    assert list(tmp_path.iterdir()) == []
    assert any(not np.array_equal(before[n], p.data) for n, p in trainer.model.parameters().items())
    figures = trainer.evaluate(read_preferences(others))
    assert {"score_gain", "kl", "reward_accuracy"} <= set(figures)
    with no_grad(), pytest.raises(ConfigError, match=r"data\.reward_model: is needed"):
        RLHF(policy, tokenizer).fit(read_preferences(rows), phases=("ppo",))


def test_lora_config_is_read_inside_the_reward_models_options(configure):
    made = configure('training.reward_model.lora={"rank": 3}', "data.pretrained_weights=x")
    assert made.training.of_reward_model.lora == LoraConfig(rank=3)
