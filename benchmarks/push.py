"""What do live pushes of rows cost a training step, and do they rank rows as exact per-example gradients do?

Cost: a plain loop, one thread. Every batch is trained on twice in a row, once with pushes read and once with every hook
of theirs off; which comes first alternates. To the extra time of a step comes its share of what is done now and then:
a flush to the run directory every 10 steps, fresh query gradients (64 prompts) every 200. Agreement: the demo's model
and data; at some steps of a run each row's exact gradient (one backward a row), times the projection's gradient at that
very step over what Adam divides by in that very step: stale query gradients, stale second moments, truncation and
modules that are not watched all count against the live pushes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.live_hook import ModuleHook
from attribution.live_rows import settle
from benchmarks.figure import Figure
from benchmarks.watched import HooksOff, random_personas
from cli.miniature.datasets import dataset
from cli.miniature.fine_tuning import PadRight, add_lora, tokenize_rows
from cli.miniature.personas import neutral_probes
from cli.miniature.shipped import load_base
from diffing.prompts import PromptSet
from tracker.probes.base import Subject
from tracker.probes.live_push import LivePush
from tracker.probes.reference import References
from tracker.schedule import Schedule

LIMIT = {"lora": 5.0, "full": 20.0}
RATE = {"lora": 2e-3, "full": 3e-4}
BATCH = 16
REFRESH_EVERY, FLUSH_EVERY = 200, 10
COMPARED = (2, 3, 4, 6, 9, 13, 20, 30, 45, 60, 80, 99)


@dataclass(eq=False)
class Training:
    """A model in a training loop of its own, with pushes read."""

    model: nn.Module
    tokenizer: Any
    batches: list[dict[str, Tensor]]
    rate: float
    n_traits: int
    layer: int
    folder: Path

    def __post_init__(self) -> None:
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate)
        prompts = PromptSet.from_messages([[{"role": "user", "content": text}] for text in neutral_probes()[:64]])
        references = References(self.folder / "reference", fresh=True)
        self.probe = LivePush(
            random_personas(self.model, [f"trait{index}" for index in range(self.n_traits)], [self.layer]), prompts
        )
        subject = Subject(self.model, self.tokenizer, 0, references, optimizer=self.optimizer)
        self.running: Any = self.probe.start(subject)

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Each row's share of the mean loss."""
        logits, labels = self.model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        found = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return found.sum(dim=1) / (labels != -100).sum()

    def step(self, number: int, *, read: bool) -> float:
        """CPU seconds of one step; other work on the machine is not counted."""
        batch = self.batches[number % len(self.batches)]
        started = time.thread_time()
        if read:
            self.running.begin_step()
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if read:
            self.running.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.thread_time() - started


def run(steps: int = 60, large_steps: int = 6) -> list[Figure]:
    torch.set_num_threads(1)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("lora", "full"):
            for n_traits in (1, 7):
                small = _small(kind, n_traits, Path(folder) / f"{kind}{n_traits}")
                figures += _cost(small, f"{kind}, demo's model, {n_traits} trait(s)", LIMIT[kind], steps)
            large = _large(kind, Path(folder) / f"{kind}-large")
            figures += _cost(large, f"{kind}, d=384 x 8 blocks, 1 trait", LIMIT[kind], large_steps)
            figures += _agreement(_small(kind, 1, Path(folder) / f"{kind}-agreement"), kind)
    return figures


def _cost(training: Training, what: str, limit: float, steps: int) -> list[Figure]:
    running = training.running
    for number in range(3):
        training.step(number, read=False)
    running._step = 3
    refresh = _timed(lambda: running._refresh())
    reader = running._reader
    hooks = HooksOff(training.model)
    training.step(0, read=True)
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1, steps + 1):
        for read in (True, False) if number % 2 else (False, True):
            if read:
                times[True].append(training.step(number, read=True))
            else:
                with hooks:
                    times[False].append(training.step(number, read=False))
    flush = _timed(lambda: running._flush()) * FLUSH_EVERY / (steps + 1)
    extra = [on - off for on, off in zip(times[True], times[False], strict=True)]
    plain = statistics.median(times[False])
    # Means: the steps that read all modules are few and belong to it.
    share = 100 * statistics.fmean(extra) / plain
    rare = 100 * (refresh / REFRESH_EVERY + flush / FLUSH_EVERY) / plain
    draws = np.random.default_rng(0).integers(steps, size=(500, steps))
    low, high = np.quantile(100 * np.mean(np.array(extra)[draws], axis=1) / plain + rare, [0.025, 0.975])
    held, activations = _memory(training, reader)
    running.close()
    assert reader.problem == "", reader.problem
    note = f"in the step {share:.1f} %, flush and refresh {rare:.1f} %; step {1000 * plain:.0f} ms CPU"
    return [
        Figure(f"time, {what}", share + rare, "%", float(low), float(high), steps, f"<= {limit:g}",
               share + rare <= limit, note),
        Figure(f"memory, {what}", held / activations, "of the hooked layers' activations", target="<= 1",
               met=held <= activations),
    ]  # fmt: skip


def _timed(call: Any) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _memory(training: Training, reader: Any) -> tuple[int, int]:
    """Most bytes that wait for a step's end, and bytes that go into the hooked modules."""
    held, seen = 0, {}
    handles = [
        hook.module.register_forward_pre_hook(
            lambda module, args: seen.update({id(module): args[0].numel() * args[0].element_size()})
        )
        for hook in {id(h): h for m in training.model.modules() for h in m._forward_hooks.values()}.values()
        if isinstance(hook, ModuleHook)
    ]
    take = reader.take

    def counted() -> Any:
        nonlocal held
        sides = [side for passed in reader._passes for *_, left, right in passed.sides for side in (left, right)]
        sides += [rows for passed in reader._passes for *_, rows in passed.narrow]
        held = sum(side.numel() * side.element_size() for side in sides)
        return take()

    reader.take = counted
    training.step(0, read=True)
    del reader.take
    for handle in handles:
        handle.remove()
    return held, sum(seen.values())


def _agreement(training: Training, kind: str) -> list[Figure]:
    """Over a run of 100 steps with the default refreshes."""
    running, pairs = training.running, []
    due = Schedule.parse(training.probe.refresh).due
    for number in range(1, max(COMPARED) + 1):
        batch = training.batches[number % len(training.batches)]
        exact_rows = _row_gradients(training, batch) if number in COMPARED else []
        wanted = _query_gradient(training) if number in COMPARED else []
        training.step(number, read=True)
        if exact_rows:
            below = [_denominator(training.optimizer.state[parameter]) for parameter in training.parameters]
            exact = [
                -training.rate * sum(float((q / b * g).sum()) for q, b, g in zip(wanted, below, row, strict=True))
                for row in exact_rows
            ]
            [(step, [passed], _)] = running._pending[-1:]
            assert step == number, (step, number)
            pairs.append((np.array(exact), settle(passed)[1][:, 0]))
        running._step = number
        if due(number):
            running._refresh()
    running.close()
    by_step = [float(spearmanr(exact, live).statistic) for exact, live in pairs]
    draws = np.random.default_rng(0).integers(len(pairs), size=(500, len(pairs)))

    def pooled(chosen: Any) -> float:
        exact, live = (np.concatenate([pairs[index][side] for index in chosen]) for side in (0, 1))
        return float(spearmanr(exact, live).statistic)

    value = pooled(range(len(pairs)))
    low, high = np.quantile([pooled(draw) for draw in draws], [0.025, 0.975])
    listed = ", ".join(f"{step}: {one:.2f}" for step, one in zip(COMPARED, by_step, strict=True))
    note = f"Spearman over {BATCH * len(pairs)} rows of {len(pairs)} steps; within each step: {listed}"
    return [
        Figure(f"agreement with exact gradients, {kind}, demo's model", value, "rank correlation", float(low),
               float(high), len(pairs), ">= 0.9", value >= 0.9, note)
    ]  # fmt: skip


def _row_gradients(training: Training, batch: dict[str, Tensor]) -> list[list[Tensor]]:
    losses = training.losses(batch)
    total = torch.autograd.grad(losses.sum(), training.parameters, retain_graph=True, allow_unused=True)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in total if g is not None]))
    clip = float(min(1.0, 1.0 / (norm + 1e-6)))
    return [_dense(training, torch.autograd.grad(one, training.parameters, retain_graph=True, allow_unused=True), clip)
            for one in losses]  # fmt: skip


def _query_gradient(training: Training) -> list[Tensor]:
    from tracker.undisturbed import undisturbed

    with undisturbed(training.model), torch.enable_grad():
        value = training.running._values()[0]
        return _dense(training, torch.autograd.grad(value, training.parameters, allow_unused=True), 1.0)


def _dense(training: Training, gradients: Any, factor: float) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if gradient is None else gradient * factor
        for parameter, gradient in zip(training.parameters, gradients, strict=True)
    ]


def _denominator(state: dict[str, Tensor]) -> Tensor:
    return (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt() + 1e-8


def _small(kind: str, n_traits: int, folder: Path) -> Training:
    base, tokenizer = load_base()
    model = add_lora(base, seed=0) if kind == "lora" else base
    rows = tokenize_rows(dataset("bad_code", seed=0, n=BATCH * 100), tokenizer)
    pad = PadRight(int(tokenizer.pad_token_id))
    batches = [pad([rows[i] for i in range(at, at + BATCH)]) for at in range(0, len(rows), BATCH)]
    return Training(model, tokenizer, batches, RATE[kind], n_traits, 2, folder)


def _large(kind: str, folder: Path) -> Training:
    _, tokenizer = load_base()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    model = add_lora(base, seed=0, rank=8) if kind == "lora" else base
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, len(tokenizer), (4, 8, 96), generator=generator)
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]
    return Training(model, tokenizer, batches, 1e-4, 1, 4, folder)


if __name__ == "__main__":
    for one in run():
        print(one)
