"""A recipe on given hardware, and what it takes under one setting of the memory knobs."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.plan.hardware import Hardware
from mallowspo_cli.plan.memory import Memory, peak_memory
from mallowspo_cli.plan.propose import (
    MEMORY_SHARE,
    Proposal,
    largest_pack,
    propose,
    proposed_pack_tokens,
    smallest_budget,
)
from mallowspo_cli.plan.reference_pass import reference_memory
from mallowspo_cli.plan.setting import PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.plan.steps import Lengths, plan_steps, reference_seconds, sample_steps
from mallowspo_cli.recipe.choices import ActivationCheckpointing
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.training.loop import total_steps

Findings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a plan is made for."""

    recipe: Recipe
    shape: ModelShape
    hardware: Hardware
    lengths: Lengths
    """(N, 3) tokens of the training pairs' prompt, chosen and rejected."""
    layout: Layout
    data: str | None = None
    """Where the lengths are from, unless they are those of the recipe's own pairs."""

    @property
    def setting(self) -> Setting:
        """What memory depends on beside model and packs."""
        hardware, train = self.hardware, self.recipe.train
        return Setting(
            train.precision, hardware.world_size, hardware.device.is_cpu, train.optimizer
        )

    @property
    def memory(self) -> float:
        """Bytes of a device."""
        return self.hardware.device.memory

    @property
    def batch_size(self) -> int:
        """Pairs of a step."""
        return self.recipe.train.global_batch_size

    @cached_property
    def longest_pair(self) -> int:
        """Tokens, as it lies."""
        return smallest_budget(self.lengths, self.layout)

    @cached_property
    def steps(self) -> int:
        """Of the run."""
        return total_steps(self.recipe, len(self.lengths))

    @cached_property
    def sampled(self) -> list[Lengths]:
        """Lengths of the pairs of some steps."""
        recipe = self.recipe
        return sample_steps(
            self.lengths, self.batch_size, self.steps, recipe.seed, recipe.train.order
        )

    @property
    def has_reference_pass(self) -> bool:
        """Whether the recipe needs the frozen model's scores."""
        objective, order = self.recipe.objective, self.recipe.train.order
        return objective.needs_reference or objective.needs_dispersion or order.by_dispersion

    @cached_property
    def reference_seconds(self) -> float:
        """Of the reference pass, where the recipe needs one: once, for every later run too."""
        if not self.has_reference_pass:
            return 0.0
        return reference_seconds(
            *(self.shape, self.setting, self.hardware, self.lengths),
            *(self.recipe.reference.pack_tokens, self.layout),
        )

    def reference_memory(self, pack_tokens: int) -> Memory:
        """Of a process in the reference pass; a pack holds the longest pair in any case."""
        tokens = max(self.longest_pair, pack_tokens)
        pack = PackSize.of(self.lengths, self.layout).scaled(tokens)
        return reference_memory(self.shape, self.setting, self.recipe.model.dtype, pack)

    def proposal(self) -> Proposal | None:
        """The memory knobs to use."""
        return propose(
            *(self.shape, self.setting, self.memory, self.lengths, self.batch_size, self.layout)
        )

    def pack_tokens(self, checkpointing: ActivationCheckpointing) -> int | None:
        """The largest packs under a policy."""
        return proposed_pack_tokens(
            *(self.shape, self.setting, self.memory, self.lengths, self.batch_size),
            *(checkpointing, self.layout),
        )

    def written(self) -> Findings:
        """What the recipe says; where it leaves the size of packs to the machine, as training
        settles it: the largest that fit, or else as small as the longest pair.
        """
        train = self.recipe.train
        policy = train.activation_checkpointing
        tokens = train.pack_tokens or self.pack_tokens(policy) or self.longest_pair
        return {**self.option(tokens, policy), "pack_tokens_given": train.pack_tokens is not None}

    def on(self, devices: int) -> "Case":
        """The same on another number of devices: of one node, or of whole nodes."""
        nodes = max(1, devices // self.hardware.device.per_node)
        hardware = replace(self.hardware, nodes=nodes, devices=devices // nodes)
        return replace(self, hardware=hardware)

    def option(self, pack_tokens: int, checkpointing: ActivationCheckpointing) -> Findings:
        """Memory and time under one setting of the memory knobs."""
        world_size = self.setting.world_size
        pack = largest_pack(self.lengths, self.batch_size, world_size, pack_tokens, self.layout)
        memory = peak_memory(self.shape, self.setting, pack, checkpointing)
        step = plan_steps(
            *(self.shape, self.setting, self.hardware, self.sampled),
            *(pack_tokens, checkpointing, self.layout),
        )
        training = step.seconds * self.steps
        reference = self.reference_memory(self.recipe.reference.pack_tokens)
        return {
            "pack_tokens": pack_tokens,
            "activation_checkpointing": checkpointing.value,
            "largest_pack": round(pack.tokens),
            "memory": self._as_findings(memory),
            "step": asdict(step),
            "reference_memory": self._as_findings(reference) if self.has_reference_pass else None,
            "reference_seconds": self.reference_seconds,
            "training_seconds": training,
            "seconds": training + self.reference_seconds,
        }

    def _as_findings(self, memory: Memory) -> Findings:
        return {
            **asdict(memory),
            "peak": memory.peak,
            "share": memory.peak / self.memory,
            "fits": memory.peak <= MEMORY_SHARE * self.memory,
        }
