"""Sampling with vLLM, where it is installed.

Written against the documented interface of vLLM; never run on a GPU here (docs/evaluation.md).
"""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.sampling.stage import Done, Prompt
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions

CHUNK = 256
"""Prompts handed over at a time: what a kill loses at most."""


def vllm_installed() -> bool:
    """Whether there is a vLLM to import."""
    return importlib.util.find_spec("vllm") is not None


def check_vllm() -> None:
    """Refuse to go on without vLLM.

    Raises:
        EvalError: it is not installed.
    """
    if not vllm_installed():
        raise EvalError(
            "generate.engine=vllm needs vLLM, which is not installed: pip install vllm, or set "
            "generate.engine=transformers."
        )


class VllmEngine:
    """vLLM's own batching, from token ids, with one seed for each answer."""

    def __init__(self, directory: Path, dtype: str, ends: Sequence[int], options: GenerateOptions):
        """Load the model of `directory` onto the GPU.

        Raises:
            EvalError: vLLM is not installed.
        """
        check_vllm()
        import vllm  # type: ignore[import-not-found]

        self.name, self.batch_size = f"vllm {version('vllm')}", CHUNK
        self.options, self.ends, self.vllm = options, list(ends), vllm
        self.model: Any = vllm.LLM(model=str(directory), dtype=dtype, trust_remote_code=False)

    def answer(self, batch: Sequence[Prompt], missing: Sequence[bool], done: Done) -> None:
        """Sample the missing answers; they arrive when all of the chunk have ended."""
        wanted = [prompt for prompt, lacks in zip(batch, missing, strict=True) if lacks]
        params = [self._params(prompt) for prompt in wanted]
        requests = [{"prompt_token_ids": prompt.ids.tolist()} for prompt in wanted]
        for prompt, found in zip(
            wanted, self.model.generate(requests, params, use_tqdm=False), strict=True
        ):
            answer = found.outputs[0]
            ids = np.asarray(answer.token_ids, dtype=np.int32)
            stopped = answer.finish_reason == "stop"
            if stopped and len(ids) and int(ids[-1]) in self.ends:
                ids = ids[:-1]
            done(prompt, ids, "stop" if stopped else "length")

    def _params(self, prompt: Prompt) -> Any:
        options = self.options
        return self.vllm.SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k or -1,
            max_tokens=prompt.most_tokens,
            stop_token_ids=self.ends,
            seed=prompt.stream(options.seed),
        )
