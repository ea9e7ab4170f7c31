"""TRL's DPOTrainer on our pairs: the same weights, the same ids, its own code. Wants the extra `peers`.

Where TRL's defaults are not kept, and why: bf16=False (everything here is measured in float32), use_cpu on a CPU, batch
size and beta as ours, a constant learning rate, and no logging, saving, evaluation or progress bar, all of which would
cost it time. Everything else is as it comes: gradient checkpointing on, a reference model that runs in every step, its
fused head, fused AdamW, clipping at 1, its metrics.
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
    """Switches off what the libraries print besides results: progress bars, notices of names that they will rename."""
    os.environ["TQDM_DISABLE"] = "1"
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word, one token: "t17" is id 17, the last id is EOS. TRL takes only text; this one comes back as its ids."""
    words = {f"t{i}": i for i in range(vocab - 1)} | {EOS: vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def as_text(pairs: list[Pair], eos: int) -> Dataset:
    """The pairs as TRL wants them. It appends EOS to each response itself, so ours goes; prompts end at a boundary."""
    assert all(r[-1] == eos for pair in pairs for r in (pair.chosen, pair.rejected)), "every response must end with EOS"

    def text(ids):
        return " ".join(f"t{i}" for i in ids)

    return Dataset.from_list([
        {"prompt": text(pair.prompt) + " ", "chosen": text(pair.chosen[:-1]), "rejected": text(pair.rejected[:-1])}
        for pair in pairs
    ])


def dpo_trainer(directory: Path, pairs: list[Pair], vocab: int, work: Path, beta: float = 0.1, lr: float = 1e-6,
                cpu: bool = True, reference: PreTrainedModel | None = None, **changes) -> DPOTrainer:
    """A trainer whose one batch is `pairs`, in their order; `changes` are DPOConfig's own arguments.

    directory: the model in Hugging Face layout; the policy starts from it, and so does the reference if none is given.
    Asserts that TRL's ids are ours.
    """
    quiet()
    args = DPOConfig(output_dir=str(work), per_device_train_batch_size=len(pairs), max_steps=1, beta=beta,
                     learning_rate=lr, lr_scheduler_type="constant", bf16=False, use_cpu=cpu,
                     dataloader_pin_memory=False, report_to="none", logging_strategy="no", save_strategy="no",
                     eval_strategy="no", disable_tqdm=True, **changes)
    data, tokenizer = as_text(pairs, eos=vocab - 1), word_tokenizer(vocab)
    trainer = DPOTrainer(str(directory), reference, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        theirs = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        assert theirs == (pair.prompt, pair.chosen, pair.rejected), f"TRL's ids are not ours: got {theirs}, want {pair}"
    return trainer


def one_batch(trainer: DPOTrainer) -> dict:
    """TRL's own batch of all its pairs: input_ids (2B,T), the B chosen first."""
    return trainer.data_collator(list(trainer.train_dataset))


def stepper(trainer: DPOTrainer):
    """A function that makes one optimizer step of `trainer`, and the loss of the step that was made before.

    train() runs first, for that one step: it alone switches checkpointing on, builds the optimizer, prepares the model.
    After that the function calls what the trainer's loop calls, in its order, less the loop's callbacks, NaN check and
    counters: what is left out favours TRL.
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
