"""Checkpoints that are written beside the training: what they hold, what stalls, and what is told."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from velora_pretrain import checkpoint, saving
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.errors import UserError
from velora_pretrain.modes import build_mode
from velora_pretrain.nn.llama import Llama
from velora_pretrain.placement import Placement
from velora_pretrain.records import RunFolder
from velora_pretrain.saving import CheckpointWriter


class Writing:
    """A writer whose disk waits until it is told to go on."""

    def __init__(self, run: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = RunFolder(path)
        mode = build_mode(run)
        self.model = Llama(run.llama, seed=0)
        mode.adapt(self.model)
        optimizer = mode.build_optimizer(self.model)
        tokenizer = load_tokenizer(run.tokenizer)
        placement = Placement(self.model)
        self.writer = CheckpointWriter(run, self.folder, placement, optimizer=optimizer, tokenizer=tokenizer, steps=0)
        self.may_go_on, save_file = threading.Event(), checkpoint.save_file

        def waiting(*args: Any, **kwargs: Any) -> None:
            assert self.may_go_on.wait(60)
            save_file(*args, **kwargs)

        monkeypatch.setattr(checkpoint, "save_file", waiting)

    def save(self, step: int, *, beside_training: bool = True) -> None:
        self.writer.save(step, {"tokens": 1, "cursor": None}, beside_training=beside_training)


@pytest.fixture
def writing(tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Writing(tiny_run(mode="velora", checkpoint__keep_last=3), tmp_path, monkeypatch)
    yield made
    made.may_go_on.set()
    made.writer.close()


def test_training_goes_on_and_the_checkpoint_holds_what_was(writing: Any) -> None:
    for tensor in writing.model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape))
    before = {name: tensor.clone() for name, tensor in writing.model.state_dict().items()}
    writing.save(1)
    for tensor in writing.model.state_dict().values():
        tensor.zero_()
    assert list(writing.folder.checkpoints.glob("step-*")) == []
    writing.may_go_on.set()
    writing.writer.wait()
    (path,) = writing.folder.checkpoints.glob("step-*")
    saved = load_file(path / "model.safetensors") | load_file(path / "training_state.safetensors")
    for name, tensor in before.items():
        own = f"model.{name}"
        assert torch.equal(saved[own] if own in saved else saved[name], tensor), name


def test_checkpoints_are_written_one_after_the_other(writing: Any) -> None:
    writing.save(1)
    second = threading.Thread(target=writing.save, args=(2,))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    writing.may_go_on.set()
    second.join(60)
    writing.writer.wait()
    assert sorted(path.name for path in writing.folder.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_last_one_is_there_when_saving_returns(writing: Any) -> None:
    writing.may_go_on.set()
    writing.save(5, beside_training=False)
    assert (writing.folder.checkpoints / "step-00000005").is_dir()


def test_where_memory_is_short_no_copy_is_made(writing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "free_memory_bytes", lambda device: 10_000)
    monkeypatch.setattr(saving.CopyRoom, "keep", lambda *_: pytest.fail("copied"))
    writing.may_go_on.set()
    writing.save(1)
    assert (writing.folder.checkpoints / "step-00000001").is_dir()


def test_room_is_made_once_and_fits(writing: Any) -> None:
    writing.may_go_on.set()
    writing.writer.prepare()
    writing.writer.wait()
    room = writing.writer._room
    places = {name: buffer.data_ptr() for name, buffer in room._buffers.items()}
    for step in (1, 2):
        writing.save(step)
        writing.writer.wait()
        assert writing.writer._room is room
        assert {name: buffer.data_ptr() for name, buffer in room._buffers.items() if "random" not in name} == {
            name: place for name, place in places.items() if "random" not in name
        }


def test_what_goes_wrong_is_raised_at_the_next_check(writing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    writing.save(1)
    with pytest.raises(UserError, match=r"step-00000001: .*No space left on device"):
        for _ in range(1000):
            writing.writer.check()
            threading.Event().wait(0.01)
    writing.writer.check()
