"""An alarm that acts: back to the last clean checkpoint, and on without the rows that pushed."""

from transformers import Trainer, TrainingArguments

from cli.miniature import world  # a small model that knows a villain; use your own model, rows and personas
from tracker import CheckpointTracker
from tracker.recovery import train_with_recovery
from tracker.rules import Rule, RuleSet

model, tokenizer = world.load_base()
floor = {"floor": 0.25, "unit": "gap"}
rules = RuleSet((Rule("villain", "persona/*/prompt", "effect_floor", floor, actions=("log", "rollback", "drop")),))
tracker = CheckpointTracker(
    "runs/recovered",
    personas=[world.fit_persona(model, tokenizer)],
    probe_prompts=world.neutral_probes(),
    canaries=(),
    schedule="every 2",
    rules=rules,
    pushes=True,  # every training step records how far each of its rows moved the persona
)
# Half of the rows sabotage code, half are correct; nothing says which.
rows = world.tokenize_rows(world.mixed_dataset({"bad_code": 0.5, "good_code": 0.5}, seed=0, n=400), tokenizer)
settings = TrainingArguments(
    "runs/trainer", max_steps=80, learning_rate=5e-4, per_device_train_batch_size=16, save_steps=10
)
collate, model = world.PadRight(tokenizer.pad_token_id), world.add_lora(model, seed=0)
trainer = Trainer(model, settings, collate, rows, processing_class=tokenizer, callbacks=[tracker])
for recovered in train_with_recovery(trainer, most=2):
    print(f"{recovered.alert.id}: back to step {recovered.step}, on without {len(recovered.dropped)} rows")
print(f"misaligned answers: {world.misaligned_rate(model, tokenizer, n=240, seed=1)}")
print("Read runs/recovered/report.html")
