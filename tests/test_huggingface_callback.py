"""The callback for `Trainer`: the first call of training converts, loggers and checkpoints hear of it, runs that are
resumed are what they were, and a reference pass does not count.
"""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import revwire
from revwire import ConversionError, CouplingError, FunctionLostWarning
from revwire._forwards.converted import is_converted
from revwire._forwards.first_call import FirstCall

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that it imports
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'revwire[hf]'")
    pytest.importorskip("accelerate", reason="its Trainer needs accelerate: pip install 'revwire[hf]'")
    from revwire.huggingface import CONFIG_NAME, RevwireCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about each other


class Sentences(Dataset):
    """Walks over a ring of tokens: neighbours have to do with each other."""

    def __init__(self, length=16, tokens=6):
        steps = torch.randint(0, 3, (length, tokens), generator=torch.Generator().manual_seed(0))
        self.ids = steps.cumsum(1) % 32

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def language_model(depth=2):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": depth}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def trainer_of(callback, folder, model=None, kind=transformers.Trainer, **options):
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5, "per_device_train_batch_size": 2}
    schedule = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**quiet, **schedule, **options})
    model = language_model() if model is None else model
    return kind(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(4), callbacks=[callback])


def fit(callback, folder, model=None, resume=None, **options):
    trainer = trainer_of(callback, folder, model, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def everywhere(**options):
    return RevwireCallback(rewire="everywhere", **options)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def coupling(model):
    return revwire.report(model).chains[0].coupling


def test_the_first_call_of_training_converts(tmp_path):
    trainer = fit(everywhere(), tmp_path)
    assert len(revwire.report(trainer.model).units) == 4
    before = revwire.convert(language_model(), {"input_ids": Sentences().ids[:2]}, rewire="everywhere")
    assert losses(fit(everywhere(), tmp_path, before)) == losses(trainer)  # a model that is converted stays as it is


def test_the_models_own_checkpointing_gives_way_to_the_plan(tmp_path):
    plain, under = fit(RevwireCallback(), tmp_path), fit(RevwireCallback(), tmp_path, gradient_checkpointing=True)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in under.model.modules())
    assert revwire.report(under.model) == revwire.report(plain.model)


def test_an_accelerators_peak_is_told(tmp_path, monkeypatch):
    class Statistics:
        resets = 0

        def reset_peak_memory_stats(self, device):
            Statistics.resets += 1

        def max_memory_allocated(self, device):
            return 3 * 2**20

    monkeypatch.setattr("revwire._api.in_training._allocator_of", lambda device: Statistics())
    row = fit(everywhere(), tmp_path, max_steps=1).state.log_history[0]
    assert row["revwire/peak_mib"] == 3
    assert Statistics.resets == 1


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_accumulation_steps": 2}, {"eval_on_start": True}])
def test_in_each_way_of_training(options, tmp_path):
    trainer = fit(everywhere(), tmp_path, **options)
    assert len(revwire.report(trainer.model).units) == 4
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert not any(isinstance(vars(m).get("forward"), FirstCall) for m in model.modules())


def test_an_evaluation_is_not_the_first_call(tmp_path):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(is_converted(kwargs["model"]))

    trainer = trainer_of(everywhere(), tmp_path, eval_on_start=True)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == [False]
    assert is_converted(trainer.model)


def test_loggers_are_told_in_the_rows_of_steps(tmp_path):
    told = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(dict(logs))

    trainer = trainer_of(everywhere(), tmp_path)
    trainer.callback_handler.callbacks.insert(0, Logger())  # as those of report_to are
    trainer.train()
    peaks = revwire.report(trainer.model).peaks
    rows = [row for row in told if "loss" in row]
    assert len(rows) == 4
    assert all(row["revwire/stored_mib"] == peaks.stored / 2**20 for row in rows)
    assert all(row["revwire/checkpointing_mib"] == peaks.checkpointing / 2**20 for row in rows)
    assert all(row["revwire/planned_mib"] == peaks.planned / 2**20 for row in rows)
    assert ["revwire/step_seconds" in row for row in rows] == [False, True, True, True]  # the first one converts
    assert [row for row in trainer.state.log_history if "loss" in row] == [
        {**row, "step": i} for i, row in enumerate(rows, 1)
    ]
    assert not any("revwire/stored_mib" in row for row in told if "train_runtime" in row)


def test_tensorboard_is_told(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    fit(everywhere(), tmp_path, report_to=["tensorboard"])
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file))
    found.Reload()
    assert "train/revwire/planned_mib" in found.Tags()["scalars"]


def test_a_budget_forecasts(tmp_path):
    trainer = fit(RevwireCallback(memory_budget="1GiB"), tmp_path, max_steps=1)
    row = trainer.state.log_history[0]
    forecast = revwire.report(trainer.model).forecast
    assert row["revwire/planned_mib"] == forecast.peak_bytes / 2**20
    assert row["revwire/stored_mib"] == forecast.stored.peak_bytes / 2**20


def test_checkpoints_hold_the_form(tmp_path):
    trainer = fit(everywhere(coupling="re2tal"), tmp_path, save_strategy="steps", save_steps=2)
    for folder in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        assert revwire.load_config(folder / CONFIG_NAME).trained
    trainer.save_model(tmp_path / "saved")
    trainer.model.save_pretrained(tmp_path / "again")
    x = {"input_ids": Sentences().ids[:2]}
    for folder in (tmp_path / "saved", tmp_path / "again", tmp_path / "checkpoint-4"):
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        revwire.convert(model, x, plan=revwire.load_config(folder / CONFIG_NAME))
        torch.testing.assert_close(model.eval()(**x).logits, trainer.model.eval()(**x).logits)


def test_a_model_with_no_save_pretrained(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = language_model()

        def forward(self, input_ids, labels):
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}

    fit(everywhere(), tmp_path, Plain(), save_strategy="steps", save_steps=2)
    assert revwire.load_config(tmp_path / "checkpoint-2" / CONFIG_NAME).units


def test_a_resumed_run_is_what_it_was(tmp_path):
    straight = fit(everywhere(coupling="re2tal"), tmp_path / "a", save_strategy="steps", save_steps=2)
    # the folder of another run, and options that say something else
    folder = str(tmp_path / "a" / "checkpoint-2")
    resumed = fit(RevwireCallback(), tmp_path / "b", resume=folder)
    assert coupling(resumed.model) == "re2tal"
    assert losses(resumed)[-2:] == losses(straight)[-2:]
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)  # fixed point is scaled by another batch


def test_resuming_by_an_example_takes_the_form_too(tmp_path):
    x = {"input_ids": Sentences().ids[:2], "labels": Sentences().ids[:2]}
    fit(everywhere(coupling="re2tal"), tmp_path, save_strategy="steps", save_steps=2)
    trainer = trainer_of(everywhere(example_inputs=x), tmp_path)
    assert coupling(trainer.model) == "bdia:1/16"  # before anything wraps it
    trainer.train(resume_from_checkpoint=True)
    assert coupling(trainer.model) == "re2tal"
    model = revwire.convert(language_model(), x, rewire="everywhere")
    with pytest.warns(FunctionLostWarning, match="coupling 're2tal', .*: in the form that it has here"):
        fit(RevwireCallback(), tmp_path, model, resume=str(tmp_path / "checkpoint-2"))


def test_the_original_wiring_at_the_end(tmp_path):
    trainer = fit(everywhere(revert_at_end=True), tmp_path)
    with pytest.raises(ConversionError, match="not converted"):
        revwire.report(trainer.model)
    assert not {"forward", "save_pretrained"} & {n for m in trainer.model.modules() for n in vars(m)}
    trainer.save_model()
    assert not (tmp_path / CONFIG_NAME).exists()


def test_training_may_go_on(tmp_path):
    trainer = fit(everywhere(), tmp_path)
    plan = revwire.report(trainer.model)
    trainer.train()
    assert revwire.report(trainer.model) == plan
    assert copy.deepcopy(trainer.model)(**{k: v[None] for k, v in Sentences()[0].items()}).loss.isfinite()


def test_predictors_are_fitted_again(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("revwire._api.in_training.calibrate", lambda model, examples: seen.append(examples))
    fit(everywhere(coupling="innovation:1/2", recalibrate_every=2), tmp_path, per_device_train_batch_size=8)
    assert len(seen) == 2
    ((example,), _) = seen
    assert example["input_ids"].shape == (8, 6)


def test_recalibration_runs(tmp_path):
    callback = everywhere(coupling="innovation:1/2", recalibrate_every=2)
    trainer = fit(callback, tmp_path, per_device_train_batch_size=8)
    assert coupling(trainer.model).startswith("innovation:1/2")


def test_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(language_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    trainer = fit(everywhere(), tmp_path, model, save_strategy="steps", save_steps=2)
    assert len(revwire.report(trainer.model).units) == 4
    assert revwire.load_config(tmp_path / "checkpoint-2" / CONFIG_NAME).units
    resumed = fit(everywhere(), tmp_path, peft.get_peft_model(language_model(), model.peft_config["default"]),
                  resume=str(tmp_path / "checkpoint-2"))  # fmt: skip
    assert losses(resumed)[-2:] == losses(trainer)[-2:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RevwireCallback(strict=True), "got the option 'strict'; expected one of coupling, exact"),
        (lambda: RevwireCallback(recalibrate_every=0), "got recalibrate_every=0; expected a number of optimizer steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConversionError, match=message):
        make()


def test_recalibration_of_what_predicts_nothing_is_refused(tmp_path):
    with pytest.raises(CouplingError, match="for coupling 'bdia:1/16', which predicts nothing; expected coupling='inn"):
        fit(everywhere(recalibrate_every=2), tmp_path)


def test_what_is_wrapped_already_is_refused(tmp_path):
    class Sharded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = type("FSDPModule", (nn.Linear,), {})(2, 2)

    trainer = trainer_of(everywhere(), tmp_path)
    trainer.callback_handler.model = Sharded()
    with pytest.raises(ConversionError, match=r"RevwireCallback: Sharded: got a model that is wrapped in FSDPModule .*"
                       r"pass example_inputs=, which converts before"):  # fmt: skip
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_several_devices_in_one_process_are_refused(tmp_path):
    trainer = trainer_of(everywhere(), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ConversionError, match=r"got 2 devices in one process \(DataParallel\).*torchrun"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_forward_says_what_it_takes():
    model = revwire.convert(language_model())
    plain = language_model()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    x = {"input_ids": Sentences().ids[:2]}
    revwire.convert(plain, x, rewire="everywhere")
    layer = plain.model.layers[0]
    assert "forward" in vars(layer)
    assert inspect.signature(layer.forward) == inspect.signature(type(layer).forward.__get__(layer))
