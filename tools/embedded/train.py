"""Train the embedded model: `python tools/embedded/train.py --minutes 75 --work DIR`.

Resumes from DIR/state.pt. Loss, speed and held-out accuracy go to DIR/log.jsonl, one object per line. The learning rate
follows the clock and not a step count, so that the run ends when it was told to: warm-up, flat to 60 %, then linear
decay. Skills that lag are sampled more often.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from multiprocessing import Event, Process, Queue
from pathlib import Path
from queue import Full

import torch
from data import SKILLS, encode, sample, talk
from model import Embedded, Shape
from optimizer import build
from safetensors.torch import load_file
from tokenizer import open_template, open_tokenizer
from torch import Tensor

BATCH_TOKENS = 1152
BATCHES = 4
"""A step sums the gradients of this many batches. A batch has documents of one length, hence few skills; steps of one
batch each went from skill to skill and learnt slowly."""
HARDER = {"lookup": 3.0, "arithmetic": 1.2, "sort_reverse": 1.2}
"""Skills that take more tokens than their share."""
TALK = 0.35
"""Share of the documents that are longer chats over several skills."""
LENGTHS = (48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640)
"""Lengths that documents are padded to: few, because a CPU kernel is compiled for each shape."""
HELD_OUT_SEED = 20_261_121


Document = tuple[list[int], list[float]]


def feed(queue: Queue, control: Queue, stop: Event, seed: int) -> None:
    """Worker process: keep the queue filled, with the newest skill shares and difficulty.

    Documents wait by length until there are enough for a batch of exactly BATCH_TOKENS tokens, padding included.
    """
    torch.set_num_threads(1)
    tokenizer, template = open_tokenizer(), open_template()
    rng, shares, difficulty = random.Random(seed), dict.fromkeys(SKILLS, 1.0), 0.15
    waiting: dict[int, list[Document]] = {length: [] for length in LENGTHS}
    mean = dict.fromkeys(SKILLS, 100.0)
    while not stop.is_set():
        while not control.empty():
            shares, difficulty = control.get()
        # shares are of tokens: a tool call has seven times as many as a sum, most of them the same instructions
        skill = rng.choices(SKILLS, [shares[s] / mean[s] for s in SKILLS])[0]
        if rng.random() < TALK:
            document = encode(talk(skill, rng, difficulty), tokenizer, template)
        else:
            document = encode(sample(skill, rng, difficulty, "train"), tokenizer, template, history=True)
        mean[skill] += 0.01 * (len(document[0]) - mean[skill])
        length = next((n for n in LENGTHS if n >= len(document[0])), None)
        if length is None:
            continue
        waiting[length].append(document)
        if len(waiting[length]) < BATCH_TOKENS // length:
            continue
        while not stop.is_set():
            try:
                queue.put(waiting[length], timeout=1)
                break
            except Full:
                continue
        waiting[length] = []


def padded(batch: list[Document]) -> tuple[Tensor, Tensor]:
    """ids, weights [B, longest, rounded up to one of LENGTHS]; padding has id 0 and weight 0."""
    longest = max(len(ids) for ids, _ in batch)
    longest = next(n for n in LENGTHS if n >= longest)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in batch])
    return ids, torch.tensor([w + [0.0] * (longest - len(w)) for _, w in batch])


def held_out(count: int) -> dict[str, list[tuple[list[int], list[float]]]]:
    """The same `count` held-out documents per skill at every call."""
    tokenizer, template = open_tokenizer(), open_template()
    sets = {}
    for skill in SKILLS:
        rng = random.Random(f"{HELD_OUT_SEED}/{skill}")
        sets[skill] = [encode(sample(skill, rng, 1.0, "held-out"), tokenizer, template) for _ in range(count)]
    return sets


@torch.no_grad()
def accuracy(model: Embedded, documents: list[tuple[list[int], list[float]]]) -> float:
    """Share of documents whose every trained token is the model's first choice: what greedy decoding would write."""
    right = 0
    for start in range(0, len(documents), 8):
        ids, weights = padded(documents[start : start + 8])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            choice = model(ids)[:, :-1].argmax(-1)
        right += int(((choice == ids[:, 1:]) | (weights[:, 1:] == 0)).all(1).sum())
    return right / len(documents)


def rate(progress: float, step: int, decay: float) -> float:
    """Factor on the learning rates at `progress` 0..1 of the time."""
    return min(1.0, (step + 1) / 30) * min(1.0, max(0.01, (1.0 - progress) / decay))


def exported(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported folder, under the names of the training network."""
    stored = load_file(folder / "model.safetensors")
    return {name.replace("model.language_model.", "model."): w.float() for name, w in stored.items()}


def save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="begin with an exported folder, or with a state.pt")
    parser.add_argument(
        "--focus",
        type=json.loads,
        help="a second phase: tokens per skill as JSON, others 0.5; full difficulty, 0.4 of the rates, falling at once",
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = Embedded(Shape())
    optimizers = build(model)
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    done = {"step": 0, "tokens": 0, "seconds": 0.0, "shares": dict.fromkeys(SKILLS, 1.0)}
    state_file = args.work / "state.pt"
    begin = state_file if state_file.exists() else args.start
    if begin is not None and begin.is_dir():
        model.load_state_dict(exported(begin))
    elif begin is not None:
        state = torch.load(begin, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["done"] if begin == state_file else done
    if args.focus:
        done["shares"] = dict.fromkeys(SKILLS, 0.5) | args.focus
    queue, control, stop = Queue(maxsize=16), Queue(), Event()
    worker = Process(target=feed, args=(queue, control, stop, args.seed * 1000 + done["step"]), daemon=True)
    worker.start()
    checks = held_out(24)
    last_time = saved_at = measured_at = time.monotonic()
    log = (args.work / "log.jsonl").open("a")
    while done["seconds"] < args.minutes * 60:
        progress = done["seconds"] / (args.minutes * 60)
        difficulty = 1.0 if args.focus else min(1.0, 0.15 + progress / 0.25)
        factor = 0.4 * rate(progress, done["step"], 1.0) if args.focus else rate(progress, done["step"], 0.4)
        for optimizer, lrs in zip(optimizers, base, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        main_loss = mtp_loss = 0.0
        for _ in range(BATCHES):
            ids, weights = padded(queue.get())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model.loss(ids, weights) / BATCHES
            loss.backward()
            main_loss += model.parts[0] / BATCHES
            mtp_loss += model.parts[1] / BATCHES
            done["tokens"] += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        now = time.monotonic()
        done["seconds"] += now - last_time
        last_time = now
        done["step"] += 1
        record = {
            "step": done["step"],
            "tokens": done["tokens"],
            "seconds": round(done["seconds"], 1),
            "loss": round(main_loss, 4),
            "mtp": round(mtp_loss, 4),
            "rate": round(factor, 4),
        }
        if now - measured_at > 240 or done["seconds"] >= args.minutes * 60:
            measured_at = now
            record["accuracy"] = {
                skill: round(accuracy(model, documents), 3) for skill, documents in checks.items()
            }
            if not args.focus:  # the floor keeps what is learnt alive
                done["shares"] = {
                    skill: 0.25 + (1 - a) * HARDER.get(skill, 1) for skill, a in record["accuracy"].items()
                }
            last_time = time.monotonic()
        if done["step"] % 10 == 0:
            control.put((done["shares"], difficulty))
        if done["step"] % 10 == 0 or "accuracy" in record:
            print(json.dumps(record), file=log, flush=True)
        if now - saved_at > 60 or done["seconds"] >= args.minutes * 60:
            saved_at = now
            states = [optimizer.state_dict() for optimizer in optimizers]
            save(state_file, {"model": model.state_dict(), "optimizers": states, "done": done})
    stop.set()
    worker.terminate()


if __name__ == "__main__":
    main()
