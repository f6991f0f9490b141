"""TRL's sides of against_trl.py and of trainers.py.

TRL is driven, not rebuilt: `DPOTrainer` with its own collator, dataloader and `training_step`. Only
two of its methods are replaced: the data is not tokenized again, and stays in its order.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sides import BETA, Side
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.files import write_json
from mallowspo_cli.models.tiny import build_byte_tokenizer

TUNED = {"train_sampling_strategy": "batch_rebalance", "remove_unused_columns": False}
"""Trainer drops the length column, by which it balances, unless told to keep all of them."""


class OrderedTrainer(DPOTrainer):
    """`DPOTrainer` for a data set that is tokenized already, in its order."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *arguments: Any) -> Any:
        sampler = super()._get_train_sampler(*arguments)
        if hasattr(sampler, "shuffle"):
            sampler.shuffle = False
        return sampler

    def order(self) -> list[int]:
        """Which pair comes when."""
        found = list(self._get_train_sampler(self.train_dataset))
        return [i for item in found for i in (item if isinstance(item, list) else [item])]


class TRL(Side):
    """TRL's `DPOTrainer`, driven by its own dataloader and `training_step`, with its metrics."""

    live_reference = False
    tuned = False

    def prepare(self) -> None:
        self.trainer = OrderedTrainer(
            model=self.model,
            ref_model=copy.deepcopy(self.model) if self.live_reference else None,
            args=self.options(),
            train_dataset=dataset_of(self.pairs),
            processing_class=build_byte_tokenizer(),
        )
        # What `train` does before its first step: casts, under bf16.
        self.trainer.accelerator.prepare_model(self.model)
        self.loader = self.trainer.get_train_dataloader()

    def options(self) -> DPOConfig:
        """Its defaults but for what the setting says."""
        setting = self.setting
        size = setting.tuned_batch if self.tuned else setting.device_batch
        return DPOConfig(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=setting.pairs // size,
            max_length=setting.max_length,
            beta=BETA,
            precompute_ref_log_probs=not self.live_reference,
            gradient_checkpointing=setting.checkpointing == "full",
            bf16=setting.precision == "bf16",
            use_cpu=setting.device == "cpu",
            report_to="none",
            disable_tqdm=True,
            **(TUNED if self.tuned else {"train_sampling_strategy": "sequential"}),
        )

    def steps(self) -> Iterator[Tensor]:
        done, loss = 0, torch.zeros((), device=self.device)
        for inputs in self.loader:
            count = len(inputs["input_ids"]) // 2
            # A mean over the step's pairs. Trainer's is one of micro-batches' means, which is
            # another loss where batch_rebalance makes them unequal.
            self.trainer.current_gradient_accumulation_steps = self.setting.pairs / count
            loss += self.trainer.training_step(self.model, inputs)
            done += count
            if done == self.setting.pairs:
                yield loss
                done, loss = 0, torch.zeros((), device=self.device)

    def logps(self) -> Tensor:
        order = np.array(self.trainer.order())
        found = [
            torch.stack(self.trainer.compute_ref_log_probs(self.model, inputs), dim=1)
            for inputs in self.loader
        ]
        return torch.cat(found)[np.argsort(order)]


class TRLDefault(TRL):
    """With a reference model beside the policy."""

    live_reference = True


class TRLTuned(TRL):
    """With cached log-probs of the reference and micro-batches of balanced padded cost."""

    tuned = True


SIDES: dict[str, type[Side]] = {
    "trl_default": TRLDefault,
    "trl_precompute": TRL,
    "trl_tuned": TRLTuned,
}


def dataset_of(pairs: Sequence[TokenizedPair]) -> Dataset:
    """The columns that TRL's collator reads, and the length for batch_rebalance."""
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list(
        [
            {f"{name}_ids": getattr(pair, name).tolist() for name in names}
            | {"length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))}
            for pair in pairs
        ]
    )


def train(options: argparse.Namespace, learning_rate: float) -> None:
    """Be TRL's process in trainers.py: a whole training, whose losses go to a file."""
    rows = json.loads(Path(options.tokens).read_text())
    pairs = [TokenizedPair("", **{k: np.array(v, np.int32) for k, v in r.items()}) for r in rows]
    tuned, result = options.side == "trl_tuned", Path(options.result)
    arguments = DPOConfig(
        output_dir=str(result.with_suffix("")),
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=options.device_batch,
        gradient_accumulation_steps=options.global_batch // options.device_batch,
        num_train_epochs=1,
        learning_rate=learning_rate,
        max_length=options.max_length,
        gradient_checkpointing=options.checkpointing == "full",
        precompute_ref_log_probs=tuned,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(TUNED if tuned else {"train_sampling_strategy": "sequential"}),
    )
    trainer = OrderedTrainer(options.directory, args=arguments, train_dataset=dataset_of(pairs))
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    write_json(result, {"loop_s": seconds, "losses": losses})
