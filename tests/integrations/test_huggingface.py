"""Hugging Face's Trainer: it trains what it would, and goes on when a rank is killed."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import ftkit
from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import Kind, Point

pytest.importorskip("transformers", reason="transformers is not installed: ftkit[huggingface]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import transformers

    from tests.integrations import huggingface_job as job

from ftkit.integrations import huggingface
from tests.drills.jobs import fault, run

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data"),  # no memory to pin here
]

UPDATES = 40


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": job.BATCH,
        "gradient_accumulation_steps": 6,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return {"output_dir": str(folder), **chosen, **more}


def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def trained(kind: Any, arguments: Any, *, resume: Any = None, **more: Any) -> Any:
    trainer = kind(model=model(), args=arguments, train_dataset=job.Counting(), **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def bits(trainer: Any) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in trainer.model.parameters()]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("workers", [0, 1])
def test_alone_it_trains_what_the_plain_trainer_does(tmp_path: Path, workers: int) -> None:
    more = {"dataloader_num_workers": workers}
    plain = trained(
        transformers.Trainer, transformers.TrainingArguments(**settings(tmp_path, **more))
    )
    mine = trained(huggingface.Trainer, huggingface.TrainingArguments(**settings(tmp_path, **more)))
    # Six batches of four, and one: the last update of an epoch of a hundred rows is short.
    assert plain.state.epoch == mine.state.epoch == pytest.approx(2 + 12 / 25)
    for key in ("loss", "grad_norm", "learning_rate", "epoch", "train_loss"):
        assert logged(mine, key) == pytest.approx(logged(plain, key), rel=2e-4), key
    assert mine.state.total_flos == plain.state.total_flos
    for p, q in zip(plain.model.parameters(), mine.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-4)


def test_its_checkpoints_can_be_resumed_from_with_and_without_ftkit(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 7}
    arguments = huggingface.TrainingArguments(**settings(tmp_path / "a", **saving))
    whole = trained(huggingface.Trainer, arguments)
    checkpoint = tmp_path / "a" / "checkpoint-7"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 7
    read = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert type(read) is transformers.TrainingArguments

    plain = trained(
        transformers.Trainer,
        transformers.TrainingArguments(**settings(tmp_path / "b")),
        resume=str(checkpoint),
    )
    assert logged(plain, "loss") == pytest.approx(logged(whole, "loss"), rel=2e-4)


def test_it_resumes_from_a_checkpoint_in_the_middle_of_an_epoch(
    tmp_path: Path, fresh: None
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 7}
    plain = trained(
        transformers.Trainer, transformers.TrainingArguments(**settings(tmp_path, **saving))
    )
    mine = trained(
        huggingface.Trainer,
        huggingface.TrainingArguments(**settings(tmp_path)),
        resume=str(tmp_path / "checkpoint-7"),
    )
    assert mine.state.global_step == 12
    assert logged(mine, "loss") == pytest.approx(logged(plain, "loss"), rel=2e-4)


def test_a_mean_loss_is_a_mean_over_the_batches_of_an_update(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs["logits"].square().mean() / 6

    mine = trained(
        huggingface.Trainer,
        huggingface.TrainingArguments(**settings(tmp_path, max_steps=2)),
        compute_loss_func=loss,
    )
    plain = trained(
        transformers.Trainer,
        transformers.TrainingArguments(**settings(tmp_path, max_steps=2)),
        compute_loss_func=loss,
    )
    assert logged(mine, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)


def test_early_stopping_ends_the_job(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = state.global_step >= 5

    arguments = huggingface.TrainingArguments(**settings(tmp_path))
    stopped = trained(huggingface.Trainer, arguments, callbacks=[Stop()])
    assert stopped.state.global_step == ftkit.init().step == 5
    with pytest.raises(UsageError, match="once"):
        stopped.train()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"auto_find_batch_size": True}, "one size"),
        ({"ignore_data_skip": True}, "pass over"),
        ({"gradient_accumulation_steps": 0}, "accumulates 0 micro-batches"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_what_cannot_be_had_is_refused_at_the_start(
    tmp_path: Path, option: dict[str, Any], reason: str
) -> None:
    arguments = huggingface.TrainingArguments(**settings(tmp_path, **option))
    with pytest.raises(UsageError, match=reason):
        huggingface.Trainer(model=model(), args=arguments, train_dataset=job.Counting())


def test_a_stream_too_short_for_an_update_ends_the_job(tmp_path: Path) -> None:
    """The loop would begin it again for ever, and train on nothing."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (job.Counting()[i] for i in range(2 * job.BATCH))

    arguments = huggingface.TrainingArguments(**settings(tmp_path))
    trainer = huggingface.Trainer(model=model(), args=arguments, train_dataset=Stream())
    with pytest.raises(UsageError, match="ended after 2 batches, and an update takes 6"):
        trainer.train()


def test_plain_arguments_are_refused(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(**settings(tmp_path))
    with pytest.raises(UsageError, match="import TrainingArguments from ftkit"):
        huggingface.Trainer(model=model(), args=arguments, train_dataset=job.Counting())


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_the_first_rank_is_killed_and_comes_back_with_the_same_bits_and_log(
    tmp_path: Path,
) -> None:
    script = Path(job.__file__)
    truth = job.main(UPDATES, 6, tmp_path / "A")
    done = run(
        tmp_path / "b",
        script,
        [str(UPDATES), "3", str(tmp_path / "B")],
        faults=[fault(Kind.KILL, Point.BACKWARD, seat=0, step=12)],
    )
    assert done.stop.code == 0, done.log
    assert [e["seat"] for e in done.of("admit")] == [0]
    assert done.params == {ftkit.init().digest()}
    for told in done.of("trained"):
        assert told["log"] == truth["log"]
        assert told["first"] is (told["seat"] == 0)
        assert (told["loss"], told["updates"]) == (truth["loss"], UPDATES)
    saved = json.loads((tmp_path / f"B/checkpoint-{UPDATES}/trainer_state.json").read_text())
    assert saved["global_step"] == UPDATES
