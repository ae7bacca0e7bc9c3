"""Lightning: it trains what it would, and goes on when a rank is killed."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ftkit
from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import fault, run

pytest.importorskip("lightning", reason="lightning is not installed: ftkit[lightning]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import lightning
    from torchmetrics import CatMetric, MeanMetric

    from ftkit.integrations import lightning as integration
    from tests.integrations import lightning_job as job

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore"),  # it has opinions on loaders, metrics and logging
]

EPOCHS = 10


def fitted(folder: Path, accumulate: int, *, resume: Path | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    model = job.Circle(dropout=0.0)
    trainer = job.trainer_of(2, accumulate, folder, **more)
    # In order: Lightning's own shuffling draws from the process.
    loader = torch.utils.data.DataLoader(job.rows(), batch_size=job.BATCH)
    trainer.fit(model, loader, job.loaders()["val_dataloaders"], ckpt_path=resume)
    return trainer


def test_on_a_machine_with_gpus_a_trainer_for_the_cpu_stays_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as there:
        there.setattr(torch.cuda, "is_available", lambda: True)
        there.setattr(torch.cuda, "device_count", lambda: 2)
        there.setenv("LOCAL_RANK", "3")
        strategy = integration.FtkitStrategy()
    assert strategy.root_device == torch.device("cuda", 1), "two ranks share it"
    trainer = lightning.Trainer(
        accelerator="cpu", strategy=strategy, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.setup_environment()
    assert trainer.strategy.root_device.type == "cpu"


def parameters(trainer: Any) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.lightning_module.parameters()]


@pytest.mark.parametrize("accumulate", [1, 5])
def test_alone_it_trains_what_plain_lightning_does(tmp_path: Path, accumulate: int) -> None:
    mine = fitted(tmp_path / "mine", accumulate)
    plain = fitted(tmp_path / "plain", accumulate, strategy="auto")
    # Twenty-four batches: by fives, the last update of an epoch has four.
    assert mine.global_step == plain.global_step == 2 * -(-24 // accumulate)
    for key in ("val_loss", "train_loss_epoch"):
        assert mine.callback_metrics[key].item() == pytest.approx(
            plain.callback_metrics[key].item(), rel=1e-3
        ), key
    for p, q in zip(parameters(mine), parameters(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    names = [sorted(p.name for p in (tmp_path / who).glob("*.ckpt")) for who in ("mine", "plain")]
    assert names[0] == names[1] != []


def test_it_resumes_from_a_checkpoint_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}"
    )
    whole = fitted(tmp_path, 2, callbacks=[saver], strategy="auto")
    resumed = fitted(tmp_path / "b", 2, resume=tmp_path / "step=15.ckpt", callbacks=[])
    assert resumed.global_step == whole.global_step == 24
    # A plain loader would begin its epoch anew.
    for p, q in zip(parameters(resumed), parameters(whole), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_what_was_logged_and_counted_in_an_attempt_is_undone() -> None:
    module: Any = torch.nn.Module()
    module.mean, module.all = MeanMetric(), CatMetric()
    trainer = SimpleNamespace(_results=None, lightning_module=module)
    module.mean.update(1.0)
    module.all.update(1.0)
    logged = integration._Logged(trainer)
    for metric in (module.mean, module.all):
        metric.update(5.0)
        assert metric.compute().sum() != 1.0
    module.late = MeanMetric()
    module.late.update(3.0)
    logged.undo()
    assert module.mean.compute() == module.all.compute() == 1.0
    assert module.mean._update_count == 1
    assert module.late._update_count == 0
    module.all.update(2.0)
    logged.undo()
    assert module.all.compute() == 1.0, "may be undone again"


@pytest.mark.parametrize("kind", ["manual", "accumulation", "twice"])
def test_what_cannot_be_had_is_refused(tmp_path: Path, kind: str) -> None:
    callbacks: list[Any] = []
    if kind == "accumulation":
        callbacks = [lightning.pytorch.callbacks.GradientAccumulationScheduler({1: 4})]
    model = job.Circle()
    model.automatic_optimization = kind != "manual"
    trainer = job.trainer_of(1, 1, tmp_path, callbacks=callbacks, gradient_clip_val=None)
    if kind == "twice":
        trainer.fit(model, **job.loaders())
    with pytest.raises(UsageError):
        trainer.fit(model, **job.loaders())


def test_the_state_of_callbacks_comes_back_with_its_types() -> None:
    state: dict[str, Any] = {
        "best": torch.tensor(0.1),
        "kept": {"a.ckpt": torch.tensor([1, 2])},
        "count": 3,
    }
    back = integration._from_json(integration._to_json("mine", state))
    assert back["count"] == 3
    assert torch.equal(back["best"], state["best"])
    assert torch.equal(back["kept"]["a.ckpt"], torch.tensor([1, 2]))
    with pytest.raises(UsageError, match="callback mine has a object"):
        integration._to_json("mine", {"what": object()})


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_the_first_rank_is_killed_and_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    script = Path(job.__file__)
    truth = job.main(EPOCHS, 6, tmp_path / "A")
    done = run(
        tmp_path / "b",
        script,
        [str(EPOCHS), "3", str(tmp_path / "B")],
        faults=[fault(Kind.KILL, Point.BACKWARD, seat=0, step=12)],
    )
    assert done.stop.code == 0, done.log
    assert [e["seat"] for e in done.of("admit")] == [0]
    assert done.params == {ftkit.init().digest()}
    for told in done.of("trained"):
        for key in ("updates", "epoch", "best", "score", "validated", "rate"):
            assert told[key] == truth[key], key
        assert told["first"] is (told["seat"] == 0)
        assert told["seen"] == sorted(told["seen"])
    assert (tmp_path / "B" / truth["best"]).exists()


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_a_rank_without_a_batch_in_the_last_update_of_an_epoch_plays_along(tmp_path: Path) -> None:
    """Twenty-four batches in updates of ten: in the third, all four are the first rank's."""
    truth = job.main(2, 10, tmp_path / "A")
    done = run(tmp_path / "b", Path(job.__file__), ["2", "5", str(tmp_path / "B")])
    assert done.stop.code == 0, done.log
    assert len(done.of("spawn")) == 2
    assert done.params == {ftkit.init().digest()}
    assert [told["updates"] for told in done.of("trained")] == [truth["updates"]] * 2 == [6, 6]
