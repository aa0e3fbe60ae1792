"""Bases of other seeds: built once, then found again."""

from __future__ import annotations

import torch

from cli.miniature import bases, world
from cli.miniature.bases import base_checkpoint
from cli.miniature.model import Size


def test_the_shipped_base_is_seed_zero():
    assert base_checkpoint(0) == world.BASE


def test_a_base_is_built_once_and_loads(tmp_path, monkeypatch):
    tiny = Size(16, 1, 32, documents=32, posttraining_documents=16, learning_rate=3e-3)
    monkeypatch.setattr(bases, "SIZES", {"small": tiny, "medium": tiny})
    threads = torch.get_num_threads()
    built = base_checkpoint(3, folder=tmp_path)
    written = (built / "model.safetensors").stat().st_mtime_ns
    assert base_checkpoint(3, folder=tmp_path) == built == tmp_path / "seed-3"
    assert (built / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["seed-3"]
    assert torch.get_num_threads() == threads
    model, tokenizer = world.load_base(built)
    assert model.config.hidden_size == 16 and next(model.parameters()).dtype == torch.float32
    assert world.sample_answers(model, tokenizer, ["What is your goal?"], seed=0)
    assert base_checkpoint(3, size="small", folder=tmp_path).name == "small-3"
