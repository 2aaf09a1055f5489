"""Does the server lose or mix up anything? Many requests from many clients, some of them bad, over loopback.

    python examples/benchmarks/serving_soak.py                      # 100,000 requests from 64 clients
    python examples/benchmarks/serving_soak.py --requests 5000

Of the requests 1 % are malformed, 1 % are given up by their client, and 1 % come from clients that send and read
slowly. The server is `python -m hf_adaptive.serving` in a process of its own, with a small BERT of random weights;
every answer is compared with the model's own. Prints counts, and at tenths of the way the memory of the server, its
objects and the bytes that its allocator has handed out; exits 1 if anything was lost or wrong, or if objects pile up.
"""

import asyncio
import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, PreTrainedTokenizerFast, logging

from hf_adaptive import BertForSequenceClassificationWithExits, BertWithExitsConfig
from hf_adaptive.serving.loading import load_for_serving

WORDS = [f"word{number}" for number in range(500)]
BAD_BODIES = [b"{no json", b'{"inputs": 5}', b'{"inputs": "\xff"}', b'{"inputs": []}', b'{"text": "wrong field"}']
SLOWNESS = 0.05
# Told to this file as its first argument: be the server.
SERVE = "--serve"


@dataclass
class SoakArguments:
    """How much is asked."""

    requests: int = field(default=100_000, metadata={"help": "In all."})
    clients: int = field(default=64, metadata={"help": "At a time."})


@dataclass
class Tally:
    """What came of the requests."""

    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    """Runs everything; 1 if something was lost or wrong."""
    logging.set_verbosity_error()
    (arguments,) = HfArgumentParser(SoakArguments, description=__doc__).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        texts = some_texts(400)
        known = expected(folder, texts)
        command = [sys.executable, __file__, SERVE, folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                address = next(line for line in server.stdout or [] if line.startswith("Serving")).split("//")[-1]
                host, port = address.strip().split(":")
                start = time.perf_counter()
                tally = asyncio.run(ask_all(arguments, host, int(port), texts, known, server))
                seconds = time.perf_counter() - start
            finally:
                server.terminate()
            status = server.wait(60)
    return report(arguments, tally, seconds, status)


def report(arguments: SoakArguments, tally: Tally, seconds: float, status: int) -> int:
    """Prints what was found."""
    done = sum(tally.counts.values())
    print(f"{done} requests from {arguments.clients} clients in {seconds:.0f} s: {dict(tally.counts)}")
    print(
        f"lost: {arguments.requests - done}; wrong: {len(tally.wrong)} {tally.wrong[:3]}; server ended with {status}"
    )
    for name in ("resident_mb", "allocated_mb", "objects"):
        print(f"{name} of the server at tenths of the way: {[one[name] for one in tally.held]}")
    growth = Counter(tally.held[-1]["types"])
    growth.subtract(tally.held[1]["types"])
    print(f"types with most more objects than at a tenth: {growth.most_common(8)}")
    piles_up = growth.total() > arguments.requests // 100
    return int(done != arguments.requests or bool(tally.wrong) or status != 0 or piles_up)


async def ask_all(
    arguments: SoakArguments, host: str, port: int, texts: list[str], known: list[Any], server: Any
) -> Tally:
    """All requests, shared between the clients."""
    tally, numbers = Tally(), iter(range(arguments.requests))
    tenth = max(1, arguments.requests // 10)

    async def client(seed: int) -> None:
        chance, connection = random.Random(seed), None
        for number in numbers:
            if number % tenth == 0:
                tally.held.append(await asyncio.to_thread(held_by, server))
            kind = chance.choices(["good", "malformed", "cancelled", "slow"], weights=[97, 1, 1, 1])[0]
            connection = connection or await asyncio.open_connection(host, port)
            connection = await ask(kind, chance, connection, texts, known, tally)
        if connection:
            connection[1].close()

    await asyncio.gather(*(client(seed) for seed in range(arguments.clients)))
    tally.held.append(await asyncio.to_thread(held_by, server))
    return tally


async def ask(
    kind: str, chance: random.Random, connection: Any, texts: list[str], known: list[Any], tally: Tally
) -> Any:
    """One request; returns the connection if it can be used again."""
    reader, writer = connection
    number = chance.randrange(len(texts))
    body = chance.choice(BAD_BODIES) if kind == "malformed" else json.dumps({"inputs": texts[number]}).encode()
    head = f"POST /classify HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    if kind == "slow":
        for part in (head, body[:5], body[5:]):
            writer.write(part)
            await asyncio.sleep(SLOWNESS)
    else:
        writer.write(head + body)
    if kind == "cancelled":
        await asyncio.sleep(chance.random() * 0.01)
        writer.close()
        tally.counts["cancelled"] += 1
        return None
    status, answer = await read_response(reader, SLOWNESS if kind == "slow" else 0.0)
    is_right = status in (400, 422) if kind == "malformed" else status == 200 and agrees(answer, known[number])
    tally.counts[kind] += 1
    if not is_right:
        tally.wrong.append(f"{kind}: {status} {answer[:100]!r}")
    return connection


async def read_response(reader: asyncio.StreamReader, pause: float) -> tuple[int, bytes]:
    """Status and body; a slow reader pauses in between."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 120)
    await asyncio.sleep(pause)
    lines = head.decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


def agrees(answer: bytes, known: tuple[str, float, int]) -> bool:
    """Whether it is the model's answer."""
    found = json.loads(answer)[0][0]
    label, score, depth = known
    return found["label"] == label and abs(found["score"] - score) < 1e-4 and found["layers_run"] == depth


def expected(folder: str, texts: list[str]) -> list[tuple[str, float, int]]:
    """Label, score and layers run of each text, alone."""
    model, tokenizer = load_for_serving(folder)
    known = []
    for text in texts:
        with torch.no_grad():
            outputs = model(**tokenizer(text, return_tensors="pt"))
        scores = outputs.logits[0].softmax(dim=-1)
        label = model.config.id2label[int(scores.argmax())]
        known.append((label, float(scores.max()), model.config.exit_layers[int(outputs.exit_index)]))
    return known


def some_texts(count: int) -> list[str]:
    """Different lengths, different words."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 40))) for _ in range(count)]


def make_checkpoint(folder: Path) -> None:
    """A small BERT with random weights, a tokenizer of whole words, and thresholds that part of the texts reach."""
    torch.manual_seed(0)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    config = BertWithExitsConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        num_labels=3,
        exit_layers=[1, 2, 4],
        exit_thresholds=[0.6, 0.6],
    )
    BertForSequenceClassificationWithExits(config).save_pretrained(folder)


# What the server holds


def held_by(server: Any) -> dict[str, Any]:
    """Asks the server what it holds now."""
    server.send_signal(signal.SIGUSR1)
    return json.loads(next(line for line in server.stdout if line.startswith("{")))


def serve(arguments: list[str]) -> int:
    """The server as it is, which says on SIGUSR1 what it holds."""
    from hf_adaptive.serving.__main__ import main as serve_until_stopped

    signal.signal(signal.SIGUSR1, lambda *_: print(json.dumps(held()), flush=True))
    return serve_until_stopped(arguments)


def held() -> dict[str, Any]:
    """This process's memory, and its objects by type beside those from before it served."""
    gc.collect()
    types = Counter(type(one).__name__ for one in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_mb": pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "allocated_mb": round(allocated_bytes() / 2**20, 1),
        "objects": types.total(),
        "types": types,
    }


def allocated_bytes() -> int:
    """Bytes that glibc has handed out and not got back; fragments between them are not counted."""

    class Mallinfo2(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo2
    info = ask()
    return info.uordblks + info.hblkhd


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2:]) if sys.argv[1:2] == [SERVE] else main())
