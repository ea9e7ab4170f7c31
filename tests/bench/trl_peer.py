"""TRL's DPOTrainer on our pairs: the same weights and ids, TRL's code. Needs the packages of tests/peers.

These of TRL's defaults are changed: bf16=False (all measurements are in float32), use_cpu on a CPU, batch size and beta
as ours, a constant learning rate, and no logging, saving, evaluation or progress bar, which would cost it time. All
other defaults are kept: gradient checkpointing, a reference model that runs in every step, the fused head, fused AdamW,
clipping at 1, TRL's metrics.
"""

import os
import warnings
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from mixdpo.preferences import Pair

EOS = "<eos>"


def quiet() -> None:
    """Turns off the libraries' progress bars and deprecation warnings."""
    os.environ["TQDM_DISABLE"] = "1"
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Each word is one token: "t17" is id 17, the last id is EOS. TRL takes only text; this text gives our ids back."""
    words = {f"t{i}": i for i in range(vocab - 1)} | {EOS: vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def as_text(pairs: list[Pair], eos: int) -> Dataset:
    """The pairs as text for TRL. TRL appends EOS to each response, so ours is removed; a prompt ends with a blank."""
    assert all(r[-1] == eos for pair in pairs for r in (pair.chosen, pair.rejected)), "every response must end with EOS"

    def text(ids):
        return " ".join(f"t{i}" for i in ids)

    return Dataset.from_list([
        {"prompt": text(pair.prompt) + " ", "chosen": text(pair.chosen[:-1]), "rejected": text(pair.rejected[:-1])}
        for pair in pairs
    ])


def dpo_trainer(directory: Path, pairs: list[Pair], vocab: int, work: Path, reference: PreTrainedModel | None = None,
                **settings) -> DPOTrainer:
    """A trainer with a single batch, `pairs` in their order.

    directory: the model in Hugging Face layout, the start of the policy; also the reference, if `reference` is None.
    work: TRL's output folder. settings: arguments of DPOConfig, with defaults beta 0.1, learning_rate 1e-6, use_cpu.
    Asserts that TRL's ids are ours.
    """
    quiet()
    settings = {"beta": 0.1, "learning_rate": 1e-6, "use_cpu": True} | settings
    args = DPOConfig(output_dir=str(work), per_device_train_batch_size=len(pairs), max_steps=1,
                     lr_scheduler_type="constant", bf16=False, dataloader_pin_memory=False, report_to="none",
                     logging_strategy="no", save_strategy="no", eval_strategy="no", disable_tqdm=True, **settings)
    data, tokenizer = as_text(pairs, eos=vocab - 1), word_tokenizer(vocab)
    trainer = DPOTrainer(str(directory), reference, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        theirs = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        assert theirs == (pair.prompt, pair.chosen, pair.rejected), f"TRL's ids are not ours: got {theirs}, want {pair}"
    return trainer


def one_batch(trainer: DPOTrainer) -> dict:
    """TRL's batch of all its pairs: input_ids (2B,T), the B chosen responses first."""
    return trainer.data_collator(list(trainer.train_dataset))


def stepper(trainer: DPOTrainer):
    """-> a function that makes one optimizer step of `trainer`; the loss of a first step, which is made here.

    The first step runs train(), because only train() turns checkpointing on, builds the optimizer and prepares the
    model. The function then makes the same calls as the trainer's loop, in the same order, but without callbacks, NaN
    check and counters. This difference favours TRL.
    """
    first = trainer.train().training_loss
    batch, model = one_batch(trainer), trainer.model_wrapped

    def step():
        loss = trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return loss

    return step, first
