"""Loss time, step time and peak memory of a DPO step, stock against patched. No test; see trl.md.

    python tests/integrations/trl_measure.py [--vocab 49152] [--width 256] [--pairs 4] [--length 128]
        [--dtype float32]

The model is a Llama with two layers and random weights, on a CPU. The loss is forward and backward of the
fused head alone, on what the trainer gives it, the two in turn. The step is forward, reference and backward.
Memory is the rise of the process's resident set over what it was before.
"""

import argparse
import ctypes
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import datasets
import tokenizers
import torch
import transformers
import trl
from support.measure import Meter
from trl.trainer import utils

import rlkern.integrations.trl as integration
from rlkern.integrations.patching import Patch
from rlkern.integrations.trl.lm_head import FusedLMHead


def make_trainer(options) -> trl.DPOTrainer:
    folder = tempfile.mkdtemp()
    words = {f"w{i}": i for i in range(options.vocab - 4)} | {s: options.vocab - 4 + i for i, s in enumerate(("<unk>", "<s>", "</s>", "<pad>"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    sizes = {"vocab_size": options.vocab, "hidden_size": options.width, "intermediate_size": 2 * options.width, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = " ".join(f"w{i * 37 % 1000}" for i in range(options.length))
    pairs = datasets.Dataset.from_list(
        [{"prompt": "w1 w2", "chosen": f" w{i} {text}", "rejected": f" {text} w{i}"} for i in range(8 * options.pairs)]
    )
    args = trl.DPOConfig(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=options.pairs,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": options.dtype},
    )
    return trl.DPOTrainer(folder, args=args, train_dataset=pairs)


def measured(meter: Meter):
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of freed memory would hide what is taken from it
    return meter.measured()


def steps(options) -> Meter:
    trainer, meter = make_trainer(options), Meter()
    step = trainer.training_step

    def training_step(*args, **kwargs):
        with measured(meter):
            return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    del meter.seconds[0], meter.peak_bytes[0]  # of a first step, which also allocates the gradients
    return meter


def losses(options) -> dict[str, Meter]:
    trainer, seen, original = make_trainer(options), [], utils._ChunkedLogProbFunction

    class Recording:
        @staticmethod
        def apply(*args):
            seen.append(args)
            return original.apply(*args)

    with Patch([(utils, "_ChunkedLogProbFunction", Recording)]):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    hidden, *rest = next(args for args in seen if args[0].requires_grad)
    hidden = hidden.detach().requires_grad_()
    meters = {"stock": Meter(), "patched": Meter()}
    for _ in range(9):
        for name, function in (("stock", original), ("patched", FusedLMHead)):
            with measured(meters[name]):
                torch.autograd.grad(function.apply(hidden, *rest)[0].sum(), (hidden, rest[0]))
    return meters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("vocab", 49152), ("width", 256), ("pairs", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    rows = {"loss": losses(options), "step": {"stock": steps(options)}}
    with integration.patch():
        rows["step"]["patched"] = steps(options)
    print(f"TRL {trl.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {vars(options)}\n")
    print("| | stock | patched | stock, peak memory | patched, peak memory |\n|---|---|---|---|---|")
    for name, meters in rows.items():
        cells = [f"{m.median_seconds * 1e3:.0f} ms" for m in meters.values()] + [f"{m.median_peak_mb:.0f} MB" for m in meters.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
