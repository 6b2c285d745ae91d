"""From text to batches of tokens.

A corpus is a list of documents. A fifth of them is held out for evaluation; the rest trains the tokenizer and
the model. Both parts are encoded once, each document followed by a separator, and kept as one array of ids:

    data/<dataset>-<hash of the text>/<tokenizer>.json
    data/<dataset>-<hash of the text>/<hash of the tokenizer>-train.npy, and ...-val.npy"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

HELD_OUT = 0.2  # share of the documents; if they are few, of each
SEPARATOR = "<|endoftext|>"  # between two documents: the last id of a tokenizer
# No token crosses a border between these: a word with the space before it, up to three digits, symbols, ...
PATTERN = r" ?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|\s*\n|\s+(?!\S)|\s+"


class Corpus(NamedTuple):
    hash: str  # of the text and its split
    tokenizer: object  # see read_tokenizer
    train: np.ndarray  # ids, uint16 or uint32, memory-mapped
    val: np.ndarray


# ---- Documents


def read_documents(dataset):
    """{name: text} of "python", a text file, or a folder, where files that are not UTF-8 are left out"""
    python = dataset == "python"
    root = Path(sysconfig.get_paths()["stdlib"] if python else dataset)
    if not root.exists():
        raise ValueError(f"--dataset={dataset}: no such file or folder")
    paths = sorted(root.rglob("*.py" if python else "*")) if root.is_dir() else [root]
    documents = {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        installed = python and "-packages/" in name  # not part of Python's library
        if path.is_file() and path.stat().st_size and not installed:
            with suppress(UnicodeDecodeError, PermissionError):
                documents[name] = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    if not documents:
        raise ValueError(f"--dataset={dataset} holds no UTF-8 text")
    return documents


def split_documents(documents):
    """-> (training texts, held-out texts). The fifth of the documents with the lowest hashes of their names
    is held out: the same ones on every machine. Of fewer than 5 documents, the last fifth of each."""
    if len(documents) < 5:
        parts = [(text, int(len(text) * (1 - HELD_OUT))) for text in documents.values()]
        return [text[:cut] for text, cut in parts], [text[cut:] for text, cut in parts]
    hashes = {name: hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in documents}
    ranked = sorted(documents, key=hashes.get)
    held_out = set(ranked[: round(len(ranked) * HELD_OUT)])
    train = [text for name, text in documents.items() if name not in held_out]
    val = [text for name, text in documents.items() if name in held_out]
    return train, val


# ---- Tokenizers


def train_bpe(texts, vocab_size):
    """Byte-pair encoding: start from the 256 bytes, and again and again make the most frequent pair of
    neighbours one token. -> {bytes: id}, without the separator.

    Each distinct word is kept once, with its frequency. A merge counts only the words again that hold it."""
    frequency = Counter()
    for text in texts:
        frequency.update(re.findall(PATTERN, text))
    words = []
    for word, n in frequency.items():
        if n > 1:  # words seen only once teach nothing
            words.append(([bytes([byte]) for byte in word.encode()], n))
    # counts[left + right]: how often such neighbours occur; a + aa and aa + a count together.
    # found_in[left + right]: the indices of the words in which they are, or were.
    counts = Counter()
    found_in = defaultdict(set)

    def count(i, sign):
        word, n = words[i]
        for left, right in pairwise(word):
            counts[left + right] += sign * n
            found_in[left + right].add(i)

    for i in range(len(words)):
        count(i, 1)
    ranks = {bytes([byte]): byte for byte in range(256)}
    bar = tqdm(total=vocab_size - 1 - 256, desc="learning tokens", unit=" merges", disable=None)
    while len(ranks) < vocab_size - 1:  # one id is the separator's
        best = max(counts, key=counts.get, default=b"")
        if counts[best] < 1:
            raise ValueError(f"the text is too short for {vocab_size} tokens: take a smaller bpeN, or byte")
        if best not in ranks:  # (the same bytes may come again, from another pair)
            ranks[best] = len(ranks)
            bar.update()
        for i in found_in.pop(best):  # (count puts some back: no harm)
            count(i, -1)
            word = words[i][0]
            j = 0
            while j < len(word) - 1:
                if word[j] + word[j + 1] == best:
                    word[j : j + 2] = [best]
                j += 1
            count(i, 1)
    bar.close()
    return ranks


def make_tokenizer(spec, texts):
    """spec: "byte" (257 ids) or "bpeN" (N ids, learnt from `texts`) -> the tokenizer as text, JSON"""
    number = re.fullmatch(r"bpe(\d{1,7})", spec)
    size = 257 if spec == "byte" else int(number[1]) if number else 0
    if size < 257:
        raise ValueError(f"--tokenizer={spec}: should be byte, or bpeN with N >= 257, such as bpe1024")
    ranks = [[base64.b64encode(token).decode(), rank] for token, rank in train_bpe(texts, size).items()]
    fields = dict(name=spec, pattern=PATTERN, special={SEPARATOR: size - 1}, ranks=ranks)
    return json.dumps(fields, separators=(",", ":"))


def read_tokenizer(text):
    """The tokenizer of a text from make_tokenizer, or from a tokenizer.json of the `tokenizers` library. It
    has encode_ordinary, encode_single_token, decode and n_vocab, as in tiktoken, and `text`."""
    fields = json.loads(text)
    if "model" not in fields:
        ranks = {base64.b64decode(token): rank for token, rank in fields["ranks"]}
        names = dict(pat_str=fields["pattern"], mergeable_ranks=ranks, special_tokens=fields["special"])
        tokenizer = tiktoken.Encoding(fields["name"], **names)
        tokenizer.text = text
        return tokenizer
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(text)
    theirs.encode_special_tokens = True  # a separator that stands in a text is text
    if theirs.token_to_id(SEPARATOR) is None:
        raise ValueError(f"it has no {SEPARATOR}, which goes between documents")
    return SimpleNamespace(
        text=text,
        n_vocab=max(theirs.get_vocab().values()) + 1,
        encode_ordinary=lambda text: theirs.encode(text, add_special_tokens=False).ids,
        encode_single_token=theirs.token_to_id,
        decode=theirs.decode,
    )


def load_tokenizer(folder, vocab_size):
    """That of a run. ValueError if it is damaged, or has more ids than vocab_size, the model's"""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = read_tokenizer(path.read_text(encoding="utf-8"))
        if tokenizer.n_vocab > vocab_size:
            raise ValueError(f"it has {tokenizer.n_vocab} ids, the model has {vocab_size}")
        return tokenizer
    except Exception as error:  # noqa: BLE001 (as in load_run)
        kind = type(error).__name__
        raise ValueError(f"{path} is not the tokenizer it should be ({kind}: {error})") from None


# ---- Tokens on disk


def load_tokens(path, tokenizer, texts):
    """The ids of the texts, each followed by a separator, memory-mapped; made if not there yet."""
    if not path.exists():
        separator = tokenizer.encode_single_token(SEPARATOR)
        dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
        arrays = []
        for text in tqdm(texts, "encoding", unit=" texts", disable=None):
            arrays.append(np.array([*tokenizer.encode_ordinary(text), separator], dtype=dtype))
        write_whole(path, lambda file: np.save(file, np.concatenate(arrays)))
    return np.load(path, mmap_mode="r")


def load_corpus(dataset="python", tokenizer="bpe1024"):
    """-> Corpus, prepared if it is not there yet. tokenizer: see make_tokenizer, or one that is loaded."""
    documents = read_documents(dataset)
    train, val = split_documents(documents)
    corpus_hash = hash_of(json.dumps({"train": train, "val": val}))
    folder = Path("data") / f"{Path(dataset).resolve().name}-{corpus_hash}"
    if isinstance(tokenizer, str):
        path = folder / f"{tokenizer}.json"
        if not path.exists():
            write_whole(path, make_tokenizer(tokenizer, train))
        tokenizer = read_tokenizer(path.read_text())
    tokenizer_hash = hash_of(tokenizer.text)
    train_ids = load_tokens(folder / f"{tokenizer_hash}-train.npy", tokenizer, train)
    val_ids = load_tokens(folder / f"{tokenizer_hash}-val.npy", tokenizer, val)
    print(f"corpus     {dataset} {corpus_hash}: {len(documents):,} files, {tokenizer.n_vocab:,} token ids")
    print(f"tokens     {len(train_ids):,} to train on, {len(val_ids):,} held out")
    return Corpus(corpus_hash, tokenizer, train_ids, val_ids)


# ---- Batches. What is drawn for a step depends on the seed and the step alone.


def random_windows(tokens, b, l, seed, step):
    """(b, l + 1) int64: windows from random places; [:, :-1] are the inputs, [:, 1:] the targets."""
    start = np.random.default_rng([seed, step]).integers(0, len(tokens) - l, size=b)
    return torch.from_numpy(tokens[start[:, None] + np.arange(l + 1)].astype(np.int64))


def next_windows(tokens, b, l, seed, step):
    """(b, l + 1) int64: b streams, each from its own place in the text; row i of step j + 1 continues row i
    of step j."""
    first = np.random.default_rng(seed).integers(len(tokens))
    distance = len(tokens) // b  # between two streams
    start = first + np.arange(b) * distance + step * l
    return torch.from_numpy(tokens[(start[:, None] + np.arange(l + 1)) % len(tokens)].astype(np.int64))


# ---- Files, flags and errors, for the other scripts too


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_whole(path, content):
    """Writes a text, or what content(file) writes, to a temporary file, and renames it: whatever interrupts,
    `path` is the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise OSError(f"{path} could not be written, it is as it was: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def within(kind, least, most=1e9):
    """A type for argparse: a number from `least` to `most`"""

    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"should be from {least} to {most:g}, not {text}")
        return kind(text)

    return number


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """For --help: line breaks as they are, defaults shown."""


def make_parser(description, epilog=None):
    """-> parser, and add(flag, default, help, ...), which adds a flag to it"""
    style = dict(formatter_class=Formatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=description, epilog=epilog, **style)

    def add(flag, default, help, **more):
        parser.add_argument(flag, default=default, help=help, **more)

    return parser, add


def run_script(main):
    """Errors in one line, with exit code 2"""
    try:
        main()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
