"""The Lightning callback: counted by optimizer steps or epochs, resumed from a checkpoint, refused where it makes no
sense.
"""

import csv
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import revwire
from revwire import CouplingError
from toys import encoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that Lightning imports
    lightning = pytest.importorskip("lightning.pytorch", reason="needs Lightning: pip install 'revwire[lightning]'")
    from revwire.lightning import CHECKPOINT_KEY, ConfigCallback, CouplingCallback, RevwireCallback, config_of

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::UserWarning:lightning"
    ),  # advice on workers, logging intervals and checkpoint folders
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning calls what PyTorch has renamed
]

DATA = TensorDataset(torch.randn(12, 3, 8, generator=torch.Generator().manual_seed(0)))


class Regression(lightning.LightningModule):
    """A converted encoder under one linear layer; notes the coupling with which each batch was run."""

    def __init__(self, coupling="dr2net:1,1/16", **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = encoder(2, 8, 2, 16, dropout=0.0)
        revwire.convert(self.body, DATA[0][0][None], coupling=coupling, **options)
        self.ran = []

    def training_step(self, batch):
        self.ran.append(revwire.report(self.body).chains[0].coupling)
        return self.body(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(callback, folder, module=None, resume=None, **options):
    module = module or Regression()
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    trainer = lightning.Trainer(
        callbacks=[callback], enable_checkpointing=False, default_root_dir=folder, **{**settings, **options}
    )
    trainer.fit(
        module, DataLoader(DATA, batch_size=3), ckpt_path=resume, weights_only=False if resume else None
    )  # four batches an epoch
    return trainer, module


def test_the_target_is_reached_at_the_end_of_training(tmp_path):
    _, module = fit(CouplingCallback("dr2net:0,1"), tmp_path)
    assert module.ran == ["dr2net:1,1/16", "dr2net:3/4,1/4", "dr2net:1/2,1/2", "dr2net:1/4,1"]
    assert revwire.report(module.body).chains[0].coupling == "dr2net:0,1"


def test_accumulated_gradients_are_one_step(tmp_path):
    _, module = fit(CouplingCallback("dr2net:0,1", total=4), tmp_path, accumulate_grad_batches=2)
    assert module.ran == ["dr2net:1,1/16"] * 2 + ["dr2net:3/4,1/4"] * 2
    assert revwire.report(module.body).chains[0].coupling == "dr2net:1/2,1/2"


def test_epochs_can_be_counted(tmp_path):
    _, module = fit(CouplingCallback("dr2net:0,1", interval="epoch"), tmp_path, max_epochs=2)
    assert module.ran == ["dr2net:1,1/16"] * 4 + ["dr2net:1/2,1/2"] * 4
    assert revwire.report(module.body).chains[0].coupling == "dr2net:0,1"


def test_milestones(tmp_path):
    _, module = fit(CouplingCallback("dr2net:0,1", shape="step", milestones=[1, 3]), tmp_path)
    assert module.ran == ["dr2net:1,1/16", "dr2net:1/2,1/2", "dr2net:1/2,1/2", "dr2net:0,1"]


def test_a_resumed_run_goes_the_same_way(tmp_path):
    _, whole = fit(CouplingCallback("dr2net:0,1", shape="cosine"), tmp_path, max_epochs=2)
    trainer, first = fit(CouplingCallback("dr2net:0,1", shape="cosine", total=8), tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(
        CouplingCallback("dr2net:0,1", shape="cosine"), tmp_path, resume=tmp_path / "half.ckpt", max_epochs=2
    )
    assert first.ran + second.ran == whole.ran
    for a, b in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (
            lambda: CouplingCallback("dr2net:0,1", interval="batch"),
            {},
            "got interval 'batch'; expected 'step' or 'epoch'",
        ),
        (
            lambda: CouplingCallback("dr2net:0,1", submodule="head"),
            {},
            "got converted networks 'body' in Regression; expected 'head'",
        ),
        (lambda: CouplingCallback("bdia:1/2"), {}, "got a way to 'bdia:1/2'; expected a coupling of the same kind"),
        (
            lambda: CouplingCallback("dr2net:0,1"),
            {"max_epochs": -1, "max_steps": -1},
            "got no total, and a trainer without an end.*pass total=",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(callback, options, message, tmp_path):
    with pytest.raises(CouplingError, match=message):
        fit(callback(), tmp_path, **options)


def test_a_network_must_be_converted(tmp_path):
    module = Regression()
    revwire.revert(module.body)
    with pytest.raises(
        CouplingError, match=r"got converted networks none in Regression; expected one; pass submodule="
    ):
        fit(CouplingCallback("dr2net:0,1"), tmp_path, module)


# -- the form in checkpoints -------------------------------------------------------------------------------------------


def checkpoint_of(callback, folder, coupling, **options):
    trainer, module = fit(callback, folder, Regression(coupling, **options))
    trainer.save_checkpoint(folder / "one.ckpt")
    return module, torch.load(folder / "one.ckpt", weights_only=True)


@pytest.mark.parametrize("options", [{}, {"chunks": 2}])
def test_a_checkpoint_holds_the_form(options, tmp_path):
    module, checkpoint = checkpoint_of(ConfigCallback(), tmp_path, "re2tal", **options)
    assert [*checkpoint[CHECKPOINT_KEY]] == ["body"]
    plan = config_of(checkpoint)
    assert plan == config_of(checkpoint, "body")
    assert plan.trained
    body = encoder(2, 8, 2, 16, dropout=0.0)
    state = {name.removeprefix("body."): t for name, t in checkpoint["state_dict"].items()}
    body.load_state_dict(state)
    revwire.convert(body, DATA[0][0][None], plan=plan)
    assert torch.equal(body(DATA[0][0][None]), module.body(DATA[0][0][None]))


def test_a_schedule_leaves_where_it_is(tmp_path):
    _, checkpoint = checkpoint_of(CouplingCallback("dr2net:0,1", total=8), tmp_path, "dr2net:1,1/16")
    assert config_of(checkpoint).chains[0].coupling == "dr2net:1/2,1/2"


@pytest.mark.parametrize("coupling", ["bdia", None])
def test_a_checkpoint_in_another_form_warns(coupling, tmp_path):
    checkpoint_of(ConfigCallback(), tmp_path, "re2tal")
    module = Regression(coupling or "bdia")
    if coupling is None:
        revwire.revert(module.body)
        module.training_step = lambda batch: module.body(batch[0]).square().mean()
    where = "the form that it has here" if coupling else "the original wiring"
    with pytest.warns(revwire.FunctionLostWarning, match=f"body: .* coupling 're2tal', .*: in {where}"):
        fit(ConfigCallback(), tmp_path, module, resume=tmp_path / "one.ckpt", max_epochs=2)


@pytest.mark.parametrize(("trained", "here"), [("re2tal", "re2tal"), ("bdia", "re2tal"), ("bdia", "bdia:1/8")])
def test_a_checkpoint_that_keeps_its_function_does_not(trained, here, tmp_path):
    checkpoint_of(ConfigCallback(), tmp_path, trained)
    fit(ConfigCallback("body"), tmp_path, Regression(here), resume=tmp_path / "one.ckpt", max_epochs=2)


def test_a_checkpoint_without_a_record_is_refused():
    with pytest.raises(revwire.ConversionError, match=r"got a checkpoint with records of no network; expected one"):
        config_of({"state_dict": {}})
    with pytest.raises(revwire.ConversionError, match=r"records of \['a', 'b'\]; expected one; pass name="):
        config_of({CHECKPOINT_KEY: {"a": {}, "b": {}}})


# -- conversion --------------------------------------------------------------------------------------------------------


class Plain(Regression):
    """A network that nobody has converted."""

    def __init__(self):
        super().__init__()
        revwire.revert(self.body)

    def training_step(self, batch):
        loss = self.body(batch[0]).square().mean()
        self.ran.append(loss.item())
        return loss


def everywhere(**options):
    return RevwireCallback(rewire="everywhere", **options)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_the_first_call_of_training_converts(options, tmp_path):
    _, module = fit(everywhere(coupling="re2tal"), tmp_path, Plain(), **options)
    assert revwire.report(module.body).chains[0].coupling == "re2tal"
    assert len(module.ran) == 4


def test_loggers_are_told(tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    _, module = fit(everywhere(), tmp_path, Plain(), logger=logger, log_every_n_steps=1)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = [*csv.DictReader(file)]
    peaks = revwire.report(module.body).peaks
    assert [float(row["revwire/stored_mib"]) for row in rows] == [pytest.approx(peaks.stored / 2**20)] * 4
    assert [float(row["revwire/planned_mib"]) for row in rows] == [pytest.approx(peaks.planned / 2**20)] * 4
    assert [bool(row["revwire/step_seconds"]) for row in rows] == [False, True, True, True]  # the first one converts


@pytest.mark.parametrize("example", [None, DATA[0][0][None]])
def test_a_resumed_run_takes_its_form(example, tmp_path):
    trainer, first = fit(everywhere(coupling="re2tal"), tmp_path, Plain())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    options = {"resume": tmp_path / "half.ckpt", "max_epochs": 2}
    _, second = fit(everywhere(example_inputs=example), tmp_path, Plain(), **options)
    assert revwire.report(second.body).chains[0].coupling == "re2tal"
    _, whole = fit(everywhere(coupling="re2tal"), tmp_path, Plain(), max_epochs=2)
    assert first.ran + second.ran == pytest.approx(whole.ran)


def test_the_original_wiring_at_the_end(tmp_path):
    _, module = fit(everywhere(revert_at_end=True), tmp_path, Plain())
    assert not any("forward" in vars(m) for m in module.modules())


def test_predictors_are_fitted_again(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("revwire._api.in_training.calibrate", lambda model, examples: seen.append(examples))
    callback = everywhere(coupling="innovation:1/2", calibrate=(), recalibrate_every=2)
    fit(callback, tmp_path, Plain())
    assert [example[0].shape for (example,) in seen] == [(3, 3, 8)] * 2


def test_which_network_is_meant(tmp_path):
    module = Plain()
    module.head = torch.nn.Linear(8, 8)
    with pytest.raises(revwire.ConversionError, match=r"got the networks 'body', 'head' in Plain; expected one with"):
        fit(everywhere(), tmp_path, module)
    fit(everywhere(submodule="body"), tmp_path, module)
    assert revwire.report(module.body).units
