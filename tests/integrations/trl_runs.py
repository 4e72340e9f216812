"""Short runs of TRL's trainers that keep every step's loss and gradient. Imports TRL."""

from __future__ import annotations

import math
import random
import tempfile
from typing import NamedTuple

import torch
import trl
from conftest import sentence
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

STEPS = 20
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


class Step(NamedTuple):
    loss: float
    metrics: dict[str, float]
    gradient: torch.Tensor  # of all trained parameters, before clipping


class Run(NamedTuple):
    steps: list[Step]
    weights: torch.Tensor
    trainer: object


class _Recorder(TrainerCallback):
    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(_flat(p.grad for p in model.parameters() if p.requires_grad))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append({key: float(value) for key, value in logs.items()})


def _flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().float().flatten() for t in tensors])


def pairs() -> Dataset:
    g = torch.Generator().manual_seed(1)
    return Dataset.from_list(
        [{"prompt": sentence(g, 2, 6), "chosen": " " + sentence(g, 1, 8), "rejected": " " + sentence(g, 1, 8)} for _ in range(40)]
    )


def prompts() -> Dataset:
    g = torch.Generator().manual_seed(2)
    return Dataset.from_list([{"prompt": sentence(g, 2, 6)} for _ in range(40)])


def distinct_words(completions, **kwargs) -> list[float]:
    """In [0, 1], and seldom the same for all completions of a prompt."""
    return [len(set(c.split())) / 8 for c in completions]


def _common(options: dict) -> dict:
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if options.get("gradient_checkpointing") else {}
    defaults = dict(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
    )
    return defaults | checkpointing | options


def dpo(model: str, trainer=trl.DPOTrainer, lora: bool = False, extra: dict | None = None, **options) -> Run:
    torch.manual_seed(0)  # for the adapters, which TRL 1.14 makes before it seeds
    args = trl.DPOConfig(**_common({"per_device_train_batch_size": 4, "max_length": 32} | options))
    return _train(trainer(model, args=args, train_dataset=pairs(), peft_config=LORA if lora else None, **(extra or {})))


def grpo(model: str, trainer=trl.GRPOTrainer, lora: bool = False, extra: dict | None = None, **options) -> Run:
    defaults = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "temperature": 0.9}
    torch.manual_seed(0)
    reward = options.pop("reward", distinct_words)
    args = trl.GRPOConfig(**_common(defaults | options))
    made = trainer(model, reward_funcs=reward, args=args, train_dataset=prompts(), peft_config=LORA if lora else None, **(extra or {}))
    return _train(made)


def gkd(model: str, teacher, **options) -> Run:
    """Half of the steps on the student's own completions."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    defaults = {"per_device_train_batch_size": 4, "max_length": 32, "max_new_tokens": 6, "lmbda": 0.5, "temperature": 0.9}
    args = GKDConfig(**_common(defaults | options))
    turns = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] for row in pairs()]
    data = Dataset.from_list([{"messages": turn} for turn in turns])
    return _train(GKDTrainer(model, teacher, args=args, train_dataset=data, processing_class=tokenizer))


def distillation(model: str, teacher, **options) -> Run:
    defaults = {"per_device_train_batch_size": 4, "max_completion_length": 6, "temperature": 0.9}
    args = trl.DistillationConfig(**_common(defaults | options))
    return _train(trl.DistillationTrainer(model, teacher, args=args, train_dataset=prompts()))


def moved(model: str, by: float) -> torch.nn.Module:
    """A teacher: the model with noise on its weights."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in teacher.parameters():
            p += by * torch.randn(p.shape, generator=g)
    return teacher


def _train(trainer) -> Run:
    recorder = _Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    steps = [Step(log["loss"], log, gradient) for log, gradient in zip(recorder.logs, recorder.gradients, strict=True)]
    return Run(steps, _flat(p for p in trainer.model.parameters() if p.requires_grad), trainer)


def assert_same(stock: Run, patched: Run, rtol: float = 1e-5, gradient_rtol: float = 1e-4) -> None:
    """Every step's loss, to rtol of its size or of 0.1, and every gradient, to gradient_rtol of its norm."""
    assert len(stock.steps) == len(patched.steps) > 0
    for i, (a, b) in enumerate(zip(stock.steps, patched.steps, strict=True)):
        assert math.isclose(a.loss, b.loss, rel_tol=rtol, abs_tol=0.1 * rtol), f"step {i}: loss {a.loss} and {b.loss}"
        assert a.gradient.norm() > 0
        error = ((a.gradient - b.gradient).norm() / a.gradient.norm()).item()
        assert error < gradient_rtol, f"step {i}: gradients differ by {error:.1e} of their norm"
