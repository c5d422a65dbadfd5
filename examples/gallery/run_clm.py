"""A small GPT-2 from a configuration, on Python's manual, whose text ships with Python.

After run_clm_no_trainer of Hugging Face's transformers.
"""

from __future__ import annotations

import math
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from eventrain.callbacks import GradientAccumulationCB, GradientClippingCB, MetricsCB, SchedulerCB
from eventrain.engine import DataLoaders, TrainLearner, no_decay_groups
from tokenizers import ByteLevelBPETokenizer
from torch import optim
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

FIT: dict[str, Any] = {"n_epochs": 5}
N_TOKENS, LENGTH = 500, 32


def make_model() -> GPT2LMHeadModel:
    """Return the model, which computes its own loss if it is given labels."""
    sizes: Any = {"vocab_size": N_TOKENS, "n_positions": LENGTH}
    small: Any = {"n_embd": 64, "n_layer": 2, "n_head": 2, "use_cache": False}
    config = GPT2Config(**sizes, **small, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config)


def collate(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch that is padded with 0, and has the label -100 there."""
    padded = pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "labels": padded.where(padded != 0, -100)}


def make_loaders(n_topics: int = 30) -> DataLoaders:
    """Return batches of paragraphs of the manual."""
    texts = [text for key in sorted(topics)[:n_topics] for text in topics[key].split("\n\n")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, N_TOKENS, special_tokens=["<pad>"], show_progress=False)
    codes = [torch.tensor(code.ids[:LENGTH]) for code in bpe.encode_batch(texts)]
    train, valid = codes[: len(codes) * 4 // 5], codes[len(codes) * 4 // 5 :]
    load: Any = partial(DataLoader, batch_size=8, collate_fn=collate)
    return DataLoaders(load(train, shuffle=True), load(valid))


def n_targets(learner: Any) -> Any:
    """Return how many tokens the batch predicts: all but padding and those at the beginning."""
    return (learner.batch["labels"][:, 1:] != -100).sum()


def schedule(opt: optim.Optimizer, n_steps: int) -> Any:
    """Return a scheduler whose rate rises in the first tenth of the steps, then falls to 0."""
    return get_linear_schedule_with_warmup(opt, n_steps // 10, n_steps)  # type: ignore[no-untyped-call]


def make_learner() -> TrainLearner:
    """Return the learner."""
    model = make_model()
    warm_up = SchedulerCB(schedule)
    accumulate = GradientAccumulationCB(2, weight=n_targets)
    cbs = [MetricsCB(weight=n_targets), accumulate, GradientClippingCB(1.0), warm_up]
    opt = optim.AdamW(no_decay_groups(model, weight_decay=0.1), lr=5e-3)
    return TrainLearner(model, make_loaders(), loss_func=None, cbs=cbs, opt=opt)


def main() -> None:
    """Train, and print the perplexity of text that it was not trained on."""
    torch.manual_seed(1)
    print(f"perplexity {math.exp(make_learner().run(**FIT).history[-1]['loss']):.1f}")


if __name__ == "__main__":
    main()
